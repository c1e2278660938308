//! Writing a disk to an image file: raw and sparse by ourselves, other formats by `qemu-img` over NBD.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, Scope};

use nbd::{DeviceExport, ExportTable, Listen, Server, ServerOptions};
use world::{BlockDevice, BlockError, Extent, ExtentKind};

use super::read_only::PointDevice;
use crate::failure::{Done, Failure, chain, io_failure};
use crate::progress::{Progress, StopRequest};

/// Bytes decoded at once, on all cores. Two of these are in the cache.
const WINDOW_BYTES: u64 = 16 << 20;
/// Bytes after which the system is made to write, so that little is left to wait for at the end.
const FLUSH_BYTES: u64 = 64 << 20;
/// Bytes written at once. Zeroes of this length and alignment become holes.
const PIECE_BYTES: u64 = 1 << 20;
const HOLE_BYTES: usize = 64 << 10;

/// Writes `device` to the new file `to`, holes left out. Durable on return.
pub(super) fn write_raw(device: &PointDevice, to: &Path, progress: &mut Progress, stop: &StopRequest) -> Done {
    let file = OpenOptions::new().write(true).create_new(true).open(to).map_err(|error| refused(to, &error))?;
    let mut image = Image { file: &file, to, progress, stop };
    let written =
        image.fill(device).and_then(|()| rustix::fs::fsync(&file).map_err(|error| refused(to, &error.into())));
    if written.is_err() {
        // Half an image would be taken for a whole one.
        let _ = std::fs::remove_file(to);
    }
    written
}

/// A raw image that is being written.
struct Image<'a> {
    file: &'a File,
    to: &'a Path,
    progress: &'a mut Progress,
    stop: &'a StopRequest,
}

impl Image<'_> {
    /// While a window is written the next one is decoded, and what was written before is on its way to the medium: three
    /// things that would wait for each other otherwise.
    fn fill(&mut self, device: &PointDevice) -> Done {
        self.file.set_len(device.size()).map_err(|error| refused(self.to, &error))?;
        let file = self.file;
        thread::scope(|scope| {
            // If it is still busy when the next word comes, that one includes this one.
            let (flush, words) = sync_channel(1);
            let flushing = scope.spawn(move || words.iter().try_for_each(|()| rustix::fs::fdatasync(file)));
            let filled = self.fill_windows(scope, device, &flush);
            drop(flush);
            // The system tells of a failed write once only, so what it said here must not be lost.
            let flushed = flushing.join().expect("a thread that flushes does not panic");
            filled?;
            flushed.map_err(|error| refused(self.to, &error.into()))
        })
    }

    fn fill_windows<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        device: &'scope PointDevice,
        flush: &SyncSender<()>,
    ) -> Done {
        let mut windows = Windows { device, position: 0, extents: VecDeque::new() };
        let fetch = |window: Option<Extent>| {
            window.map(|window| {
                scope.spawn(move || match window.kind {
                    ExtentKind::Data => device.prefetch(&window.range).map(|()| window),
                    ExtentKind::Zero | ExtentKind::Hole => Ok(window),
                })
            })
        };
        let mut buffer = vec![0; PIECE_BYTES as usize];
        let mut fetching = fetch(windows.next().map_err(|error| unreadable(&error))?);
        let mut unflushed = 0;
        while let Some(fetched) = fetching {
            let window = fetched.join().expect("decoding does not panic").map_err(|error| unreadable(&error))?;
            fetching = fetch(windows.next().map_err(|error| unreadable(&error))?);
            let len = window.range.end - window.range.start;
            if window.kind == ExtentKind::Data {
                self.copy(device, window.range, &mut buffer)?;
                unflushed += len;
            } else {
                self.progress.advance(len);
            }
            if unflushed >= FLUSH_BYTES && flush.try_send(()).is_ok() {
                unflushed = 0;
            }
        }
        Ok(())
    }

    fn copy(&mut self, device: &PointDevice, range: Range<u64>, buffer: &mut [u8]) -> Done {
        let mut at = range.start;
        while at < range.end {
            self.stop.check(&format!("the unfinished {} was removed", self.to.display()))?;
            let piece = &mut buffer[..PIECE_BYTES.min(range.end - at) as usize];
            device.read_at(at, piece).map_err(|error| unreadable(&error))?;
            write_sparsely(self.file, at, piece).map_err(|error| refused(self.to, &error))?;
            at += piece.len() as u64;
            self.progress.advance(piece.len() as u64);
        }
        Ok(())
    }
}

/// The extents of a disk, those with data in pieces that are decoded at once.
struct Windows<'a> {
    device: &'a PointDevice,
    /// Where the extents that were not looked up yet begin.
    position: u64,
    extents: VecDeque<Extent>,
}

impl Windows<'_> {
    fn next(&mut self) -> Result<Option<Extent>, BlockError> {
        if self.extents.is_empty() && self.position < self.device.size() {
            self.extents = self.device.extents(self.position..self.device.size())?.into();
            self.position = self.extents.back().map_or(self.device.size(), |last| last.range.end);
        }
        let Some(extent) = self.extents.front_mut() else { return Ok(None) };
        let len = extent.range.end - extent.range.start;
        if extent.kind != ExtentKind::Data || len <= WINDOW_BYTES {
            return Ok(self.extents.pop_front());
        }
        let end = extent.range.start + WINDOW_BYTES;
        let window = Extent { range: extent.range.start..end, kind: extent.kind };
        extent.range.start = end;
        Ok(Some(window))
    }
}

fn write_sparsely(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = 0;
    for piece in bytes.chunks(HOLE_BYTES) {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, offset + at as u64)?;
        }
        at += piece.len();
    }
    Ok(())
}

fn refused(to: &Path, error: &io::Error) -> Failure {
    io_failure(format!("{} cannot be written", to.display()), error)
}

fn unreadable(error: &BlockError) -> Failure {
    let remedy = match error {
        BlockError::Corrupt(_) => "run `farshore vault verify` to see what is damaged and which points it affects",
        BlockError::Unreadable { .. } => "this range was a defect of the source; open the branch and copy around it",
        _ => "try again once the vault can be read",
    };
    Failure::new("the disk cannot be read at this point", chain(error), remedy)
}

/// Has `qemu-img` write `device` to `to` as `format`. Durable on return.
pub(super) fn write_by_qemu(device: PointDevice, to: &Path, format: &str, stop: &StopRequest) -> Done {
    let folder = tempfile::Builder::new()
        .prefix("farshore-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()
        .map_err(|error| io_failure("a folder for a socket cannot be made", &error))?;
    let socket = folder.path().join("nbd");
    let exports = ExportTable::new();
    exports.insert("disk", Arc::new(DeviceExport::read_only(Arc::new(device))));
    let listen = [Listen::Unix(socket.clone())];
    let server = Server::start(Arc::new(exports), ServerOptions::default(), &listen)
        .map_err(|error| Failure::because("the disk cannot be served", &error, "check the temporary folder"))?;
    let address = format!("nbd+unix:///disk?socket={}", socket.display());
    let ran = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", format])
        // A VHD is rounded up to whole cylinders unless told otherwise; a disk is no larger than it was.
        .args((format == "vpc").then_some(["-o", "force_size=on"]).into_iter().flatten())
        .arg(&address)
        .arg(to)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut running = ran.map_err(|error| {
        Failure::new(
            format!("qemu-img is needed to write {format} and cannot be run"),
            error.to_string(),
            "install it (the package is qemu-utils or qemu-img), or export --format raw",
        )
    })?;
    stop.wait(|| !matches!(running.try_wait(), Ok(None)));
    // Nothing is left to stop if it has ended by itself, as it does when Ctrl-C reaches both.
    let _ = running.kill();
    let ran = running.wait_with_output().map_err(|error| io_failure("qemu-img cannot be waited for", &error));
    server.stop();
    let ran = ran?;
    if ran.status.success() {
        let refused = |error: &io::Error| io_failure(format!("{} cannot be made durable", to.display()), error);
        let file = File::open(to).map_err(|error| refused(&error))?;
        return rustix::fs::fsync(&file).map_err(|error| refused(&error.into()));
    }
    let _ = std::fs::remove_file(to);
    stop.check(&format!("the unfinished {} was removed", to.display()))?;
    let said = String::from_utf8_lossy(&ran.stderr).trim().to_owned();
    Err(Failure::new(
        format!("qemu-img could not write {}", to.display()),
        said,
        "mend what it says, or export --format raw, which takes no qemu-img",
    ))
}
