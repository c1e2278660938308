//! Writing a disk to an image file: raw and sparse by ourselves, other formats by `qemu-img` over NBD.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nbd::{DeviceExport, ExportTable, Listen, Server, ServerOptions};
use world::{BlockDevice, BlockError, ExtentKind};

use super::read_only::PointDevice;
use crate::failure::{Done, Failure, chain, io_failure};
use crate::progress::{Progress, StopRequest};

/// Bytes written at once. Zeroes of this length and alignment become holes.
const PIECE_BYTES: u64 = 1 << 20;
const HOLE_BYTES: usize = 64 << 10;

/// Writes `device` to the new file `to`, holes left out. Durable on return.
pub(super) fn write_raw(device: &PointDevice, to: &Path, progress: &mut Progress, stop: &StopRequest) -> Done {
    let refused = |error: &io::Error| io_failure(format!("{} cannot be written", to.display()), error);
    let file = OpenOptions::new().write(true).create_new(true).open(to).map_err(|error| refused(&error))?;
    let written = fill(device, &file, to, progress, stop)
        .and_then(|()| rustix::fs::fsync(&file).map_err(|error| refused(&error.into())));
    if written.is_err() {
        // Half an image would be taken for a whole one.
        let _ = std::fs::remove_file(to);
    }
    written
}

fn fill(device: &PointDevice, file: &File, to: &Path, progress: &mut Progress, stop: &StopRequest) -> Done {
    let refused = |error: &io::Error| io_failure(format!("{} cannot be written", to.display()), error);
    file.set_len(device.size()).map_err(|error| refused(&error))?;
    let mut position = 0;
    let mut buffer = vec![0; PIECE_BYTES as usize];
    while position < device.size() {
        let extents = device.extents(position..device.size()).map_err(|error| unreadable(&error))?;
        for extent in extents {
            if extent.kind == ExtentKind::Data {
                let mut at = extent.range.start;
                let mut fetched = at;
                while at < extent.range.end {
                    stop.check(&format!("the unfinished {} was removed", to.display()))?;
                    if at >= fetched {
                        fetched = device.prefetch(at, extent.range.end).map_err(|error| unreadable(&error))?;
                    }
                    let len = PIECE_BYTES.min(extent.range.end - at).min(fetched - at);
                    let piece = &mut buffer[..len as usize];
                    device.read_at(at, piece).map_err(|error| unreadable(&error))?;
                    write_sparsely(file, at, piece).map_err(|error| refused(&error))?;
                    at += len;
                    progress.advance(len);
                }
            } else {
                progress.advance(extent.range.end - extent.range.start);
            }
            position = extent.range.end;
        }
    }
    Ok(())
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
