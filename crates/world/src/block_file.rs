//! A disk on this machine: an image file or a block device.
//!
//! Invariants:
//! * A failed [`FileDevice::flush`] poisons the device. The kernel drops the dirty pages it could not write, so a
//!   second `fdatasync` would succeed and lie about them.
//! * A file that shrank while open is an error, never zeroes, and a write never grows it again silently.
//!
//! A crash leaves behind whatever the page cache had written out; only what preceded a successful flush is promised.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::block::{BlockDevice, BlockError, Extent, ExtentKind};

/// Unit in bytes of direct reads, of the edges of a zeroed range, and of the search for an unreadable sector. No
/// disk in use has larger logical sectors.
const SECTOR: u64 = 4096;
/// Largest piece in bytes that one direct read or one write of zeroes moves.
const PIECE_BYTES_MAX: usize = 1 << 20;
/// Pieces of an allocation map that one call returns at most; what follows is reported as one piece of data.
const EXTENTS_MAX: usize = 1 << 16;
/// Aligned buffers kept for the next direct read.
const SPARE_BUFFERS_MAX: usize = 4;

/// What a device is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Every change is refused with [`BlockError::ReadOnly`].
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenDeviceError {
    /// Nothing has this name.
    #[error("there is no disk at {}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The name is taken by a directory, a pipe, a character device or the like.
    #[error("{} is neither an image file nor a block device", path.display())]
    NotADisk {
        /// What was named.
        path: PathBuf,
    },
    /// The disk exists but the system refuses to open or measure it.
    #[error("the disk {} cannot be opened", path.display())]
    Refused {
        /// What was named.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ImageFile,
    BlockDevice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caching {
    PageCache,
    Direct,
}

/// An image file or a block device as a [`BlockDevice`]. Its size is fixed when it is opened.
#[derive(Debug)]
pub struct FileDevice {
    file: File,
    path: PathBuf,
    kind: Kind,
    access: Access,
    caching: Caching,
    size: u64,
    /// Set by the first failed flush.
    poisoned: AtomicBool,
    /// Set when the file system turned out not to know the operation, to spare the next call.
    without_zero_range: AtomicBool,
    without_punch_hole: AtomicBool,
    /// Buffers of direct reads.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl FileDevice {
    /// Opens the image file or block device at `path` through the page cache.
    ///
    /// # Errors
    /// [`OpenDeviceError`] says whether it is missing, not a disk, or refused by the system.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<FileDevice, OpenDeviceError> {
        FileDevice::open_with(path.as_ref(), access, Caching::PageCache)
    }

    /// Opens `path` read-only for reads that must see the medium and not this machine's cache: a block device is
    /// read with `O_DIRECT`. An image file is read through the page cache, which its writers share.
    ///
    /// # Errors
    /// As [`FileDevice::open`].
    pub fn open_direct(path: impl AsRef<Path>) -> Result<FileDevice, OpenDeviceError> {
        let path = path.as_ref();
        let device = FileDevice::open_with(path, Access::ReadOnly, Caching::PageCache)?;
        match device.kind {
            Kind::ImageFile => Ok(device),
            Kind::BlockDevice => FileDevice::open_with(path, Access::ReadOnly, Caching::Direct),
        }
    }

    /// Keeps everybody else who asks off this image file for as long as the device lives. Block devices are not locked:
    /// udev waits for whoever locks one.
    ///
    /// # Errors
    /// [`TryLockError::WouldBlock`] if another device or program has locked it.
    pub fn lock_image(&self) -> Result<(), TryLockError> {
        match self.kind {
            Kind::ImageFile => self.file.try_lock(),
            Kind::BlockDevice => Ok(()),
        }
    }

    /// Lets go of the lock at once. It would last until nobody has the file open any more: threads that end later, and
    /// processes that were started and have not yet become another program, have it open, too.
    ///
    /// # Errors
    /// What the system says.
    pub fn unlock_image(&self) -> io::Result<()> {
        match self.kind {
            Kind::ImageFile => self.file.unlock(),
            Kind::BlockDevice => Ok(()),
        }
    }

    fn open_with(path: &Path, access: Access, caching: Caching) -> Result<FileDevice, OpenDeviceError> {
        let refused = |source| OpenDeviceError::Refused { path: path.to_owned(), source };
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let kind = match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => Kind::ImageFile,
            Ok(metadata) if metadata.file_type().is_block_device() => Kind::BlockDevice,
            Ok(_) => return Err(OpenDeviceError::NotADisk { path: path.to_owned() }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(OpenDeviceError::Missing { path: path.to_owned() });
            }
            Err(error) => return Err(refused(error)),
        };
        let flags = match caching {
            Caching::PageCache => OFlags::empty(),
            Caching::Direct => OFlags::DIRECT,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(refused)?;
        // Block devices report a length of zero in their metadata; their end can be sought.
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| refused(errno.into()))?;
        Ok(FileDevice {
            file,
            path: path.to_owned(),
            kind,
            access,
            caching,
            size,
            poisoned: AtomicBool::new(false),
            without_zero_range: AtomicBool::new(false),
            without_punch_hole: AtomicBool::new(false),
            spare: Mutex::new(Vec::new()),
        })
    }

    /// Where the disk is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the disk was opened for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Whether the disk is a block device and not an image file.
    pub fn is_block_device(&self) -> bool {
        self.kind == Kind::BlockDevice
    }

    /// Reads `buffer` through aligned memory, as `O_DIRECT` demands.
    fn read_direct(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let mut spare =
            self.spare.lock().expect("nothing panics while holding the spare buffers").pop().unwrap_or_default();
        spare.resize(PIECE_BYTES_MAX + SECTOR as usize, 0);
        let shift = spare.as_ptr().align_offset(SECTOR as usize);
        let aligned = &mut spare[shift..shift + PIECE_BYTES_MAX];
        let mut result = Ok(());
        let mut done = 0;
        while done < buffer.len() && result.is_ok() {
            let position = offset + done as u64;
            let skip = (position % SECTOR) as usize;
            let wanted = (buffer.len() - done).min(PIECE_BYTES_MAX - skip);
            let piece = (skip + wanted).next_multiple_of(SECTOR as usize);
            let start = position - skip as u64;
            // The last sectors of a device whose size is no multiple of our unit: the read ends early there.
            let present = piece.min(usize::try_from(self.size - start).unwrap_or(usize::MAX));
            result = read_fully(|at, bytes| self.file.read_at(bytes, at), start, &mut aligned[..piece], present);
            if result.is_ok() {
                buffer[done..done + wanted].copy_from_slice(&aligned[skip..skip + wanted]);
                done += wanted;
            }
        }
        let mut kept = self.spare.lock().expect("nothing panics while holding the spare buffers");
        if kept.len() < SPARE_BUFFERS_MAX {
            kept.push(spare);
        }
        result
    }

    /// `Ok` if the device takes writes to `range`.
    fn check_write(&self, range: &Range<u64>) -> Result<(), BlockError> {
        self.check_range(range)?;
        if self.access == Access::ReadOnly {
            return Err(BlockError::ReadOnly);
        }
        // A write behind the end of a file that was cut off would grow it again and turn the loss into zeroes.
        if self.kind == Kind::ImageFile {
            let length = self.file.metadata().map_err(BlockError::Failed)?.len();
            if length < self.size {
                return Err(BlockError::Failed(shrunk(self.size, length)));
            }
        }
        Ok(())
    }

    fn write_zero_bytes(&self, range: Range<u64>) -> Result<(), BlockError> {
        let zeroes = vec![0; PIECE_BYTES_MAX.min(usize::try_from(range.end - range.start).unwrap_or(usize::MAX))];
        let mut position = range.start;
        while position < range.end {
            let piece = (range.end - position).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..piece as usize], position).map_err(write_error)?;
            position += piece;
        }
        Ok(())
    }

    /// Zeroes `range` by the first of `methods` the system knows, or by writing zeroes.
    fn zero(&self, range: Range<u64>, methods: &[(FallocateFlags, &AtomicBool)]) -> Result<(), BlockError> {
        self.check_write(&range)?;
        // Block devices zero whole sectors only; the edges are written.
        let inner = match self.kind {
            Kind::ImageFile => range.clone(),
            Kind::BlockDevice => range.start.next_multiple_of(SECTOR)..range.end / SECTOR * SECTOR,
        };
        if inner.start >= inner.end {
            return self.write_zero_bytes(range);
        }
        for (flags, unknown) in methods {
            if unknown.load(Ordering::Relaxed) {
                continue;
            }
            match retry(|| rustix::fs::fallocate(&self.file, *flags, inner.start, inner.end - inner.start)) {
                Ok(()) => {
                    self.write_zero_bytes(range.start..inner.start)?;
                    return self.write_zero_bytes(inner.end..range.end);
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => unknown.store(true, Ordering::Relaxed),
                Err(errno) => return Err(write_error(errno.into())),
            }
        }
        self.write_zero_bytes(range)
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.check_range(&span(offset, buffer.len()))?;
        let result = match self.caching {
            Caching::Direct => self.read_direct(offset, buffer),
            Caching::PageCache => {
                let present = buffer.len();
                read_fully(|at, bytes| self.file.read_at(bytes, at), offset, buffer, present)
            }
        };
        result.map_err(|error| match error {
            BlockError::Unreadable { start, source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                let length = self.file.metadata().map_or(start, |metadata| metadata.len());
                BlockError::Unreadable { start, end: self.size, source: shrunk(self.size, length.min(start)) }
            }
            other => other,
        })
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check_write(&span(offset, data.len()))?;
        self.file.write_all_at(data, offset).map_err(write_error)
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        let keep = FallocateFlags::KEEP_SIZE;
        self.zero(
            range,
            &[
                (FallocateFlags::ZERO_RANGE | keep, &self.without_zero_range),
                (FallocateFlags::PUNCH_HOLE | keep, &self.without_punch_hole),
            ],
        )
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.zero(range, &[(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, &self.without_punch_hole)])
    }

    #[allow(clippy::disallowed_methods, reason = "this is the flush of a disk, which world::durable does not know")]
    fn flush(&self) -> Result<(), BlockError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        if self.poisoned.load(Ordering::Acquire) {
            return Err(BlockError::Failed(io::Error::other("an earlier flush failed; what it lost cannot be told")));
        }
        self.file.sync_data().map_err(|error| {
            self.poisoned.store(true, Ordering::Release);
            write_error(error)
        })
    }

    /// At most 65536 pieces; what follows them is one piece of data, so that memory stays bounded. Ask for smaller
    /// ranges to see more.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, BlockError> {
        self.check_range(&range)?;
        let mut extents = Vec::new();
        let mut position = range.start;
        while position < range.end {
            let (kind, end) = if extents.len() + 1 == EXTENTS_MAX {
                (ExtentKind::Data, range.end)
            } else {
                match retry(|| rustix::fs::seek(&self.file, SeekFrom::Data(position))) {
                    Ok(data) if data > position => (ExtentKind::Hole, data),
                    Ok(_) => match retry(|| rustix::fs::seek(&self.file, SeekFrom::Hole(position))) {
                        Ok(hole) if hole > position => (ExtentKind::Data, hole),
                        _ => (ExtentKind::Data, range.end),
                    },
                    // No data up to the end of the file. A shrunk file has no hole there, it has nothing.
                    Err(Errno::NXIO) if self.file.metadata().is_ok_and(|metadata| metadata.len() >= self.size) => {
                        (ExtentKind::Hole, range.end)
                    }
                    Err(_) => (ExtentKind::Data, range.end),
                }
            };
            let end = end.min(range.end);
            extents.push(Extent { range: position..end, kind });
            position = end;
        }
        Ok(extents)
    }
}

/// The range of `len` bytes at `offset`; saturates, so that a range check refuses it.
fn span(offset: u64, len: usize) -> Range<u64> {
    offset..offset.saturating_add(len as u64)
}

fn shrunk(size: u64, length: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("the disk shrank from {size} to {length} bytes while it was open"),
    )
}

fn write_error(error: io::Error) -> BlockError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => BlockError::NoSpace,
        io::ErrorKind::ReadOnlyFilesystem => BlockError::ReadOnly,
        _ => BlockError::Failed(error),
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Fills at least the first `present` bytes of `buffer` with `pread(position, bytes)`. If the medium fails, the
/// error names the first unreadable sector, so that a caller can read on behind it.
fn read_fully(
    mut pread: impl FnMut(u64, &mut [u8]) -> io::Result<usize>,
    offset: u64,
    buffer: &mut [u8],
    present: usize,
) -> Result<(), BlockError> {
    let end = offset + present as u64;
    let mut done = 0;
    // Nothing until the medium failed, then the sector the search has reached.
    let mut searching = false;
    while done < present {
        let position = offset + done as u64;
        let piece = if searching {
            ((position / SECTOR + 1) * SECTOR - position).min((buffer.len() - done) as u64) as usize
        } else {
            buffer.len() - done
        };
        match pread(position, &mut buffer[done..done + piece]) {
            Ok(0) => {
                return Err(BlockError::Unreadable {
                    start: position,
                    end,
                    source: io::ErrorKind::UnexpectedEof.into(),
                });
            }
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A long read fails as a whole: go on in sectors to find the one that is to blame.
            Err(_) if !searching => searching = true,
            Err(source) => {
                return Err(BlockError::Unreadable {
                    start: position,
                    end: (position + piece as u64).min(end),
                    source,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[derive(Debug, Clone)]
    enum Operation {
        Write(u64, Vec<u8>),
        Zero(u64, u64),
        Discard(u64, u64),
        Read(u64, u64),
        Flush,
    }

    const SIZE: u64 = 300_000;

    fn operation() -> impl Strategy<Value = Operation> {
        let start = 0..SIZE;
        prop_oneof![
            (start.clone(), proptest::collection::vec(any::<u8>(), 0..9000)).prop_map(|(at, mut data)| {
                data.truncate((SIZE - at) as usize);
                Operation::Write(at, data)
            }),
            (start.clone(), 0..SIZE).prop_map(|(at, len)| Operation::Zero(at, len.min(SIZE - at))),
            (start.clone(), 0..40_000u64).prop_map(|(at, len)| Operation::Discard(at, len.min(SIZE - at))),
            (start, 0..SIZE).prop_map(|(at, len)| Operation::Read(at, len.min(SIZE - at))),
            Just(Operation::Flush),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn behaves_like_an_array(operations in proptest::collection::vec(operation(), 1..60)) {
            let file = image(SIZE);
            let device = FileDevice::open(file.path(), Access::ReadWrite).unwrap();
            let direct = FileDevice::open_with(file.path(), Access::ReadOnly, Caching::Direct).ok();
            let mut oracle = vec![0u8; SIZE as usize];
            for operation in operations {
                match operation {
                    Operation::Write(at, data) => {
                        device.write_at(at, &data).unwrap();
                        oracle[at as usize..at as usize + data.len()].copy_from_slice(&data);
                    }
                    Operation::Zero(at, len) => {
                        device.write_zeroes(at..at + len).unwrap();
                        oracle[at as usize..(at + len) as usize].fill(0);
                    }
                    Operation::Discard(at, len) => {
                        device.discard(at..at + len).unwrap();
                        oracle[at as usize..(at + len) as usize].fill(0);
                    }
                    Operation::Read(at, len) => {
                        let expected = &oracle[at as usize..(at + len) as usize];
                        let mut buffer = vec![0xEE; len as usize];
                        device.read_at(at, &mut buffer).unwrap();
                        prop_assert!(buffer == expected);
                        if let Some(direct) = &direct {
                            device.flush().unwrap();
                            buffer.fill(0xEE);
                            direct.read_at(at, &mut buffer).unwrap();
                            prop_assert!(buffer == expected, "direct read differs");
                        }
                        let extents = device.extents(at..at + len).unwrap();
                        let mut position = at;
                        for extent in extents {
                            prop_assert_eq!(extent.range.start, position);
                            prop_assert!(extent.range.end > position);
                            position = extent.range.end;
                            let bytes = &oracle[extent.range.start as usize..extent.range.end as usize];
                            prop_assert!(extent.kind == ExtentKind::Data || bytes.iter().all(|byte| *byte == 0));
                        }
                        prop_assert_eq!(position, at + len);
                    }
                    Operation::Flush => device.flush().unwrap(),
                }
            }
        }
    }

    #[test]
    fn names_the_first_unreadable_sector() {
        let bad = 5 * SECTOR..7 * SECTOR;
        let pread = |at: u64, bytes: &mut [u8]| {
            let end = at + bytes.len() as u64;
            if at < bad.end && bad.start < end {
                return Err(io::Error::from_raw_os_error(5));
            }
            bytes.fill(7);
            Ok(bytes.len())
        };
        let mut buffer = vec![0; 10 * SECTOR as usize];
        match read_fully(pread, 100, &mut buffer, 9 * SECTOR as usize) {
            Err(BlockError::Unreadable { start, end, source }) => {
                assert_eq!((start, end), (5 * SECTOR, 6 * SECTOR));
                assert_eq!(source.raw_os_error(), Some(5));
            }
            other => panic!("{other:?}"),
        }
        read_fully(pread, 0, &mut buffer[..5 * SECTOR as usize], 5 * SECTOR as usize).unwrap();
        read_fully(pread, 7 * SECTOR, &mut buffer[..SECTOR as usize], SECTOR as usize).unwrap();
    }

    #[test]
    fn a_file_that_shrank_is_an_error_and_is_not_grown_again() {
        let file = image(64 * 1024);
        let device = FileDevice::open(file.path(), Access::ReadWrite).unwrap();
        file.as_file().set_len(20_000).unwrap();
        let mut buffer = vec![0; 8192];
        device.read_at(4096, &mut buffer).unwrap();
        match device.read_at(16_384, &mut buffer) {
            Err(BlockError::Unreadable { start: 20_000, end: 65_536, source }) => {
                assert_eq!(source.to_string(), "the disk shrank from 65536 to 20000 bytes while it was open");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(device.write_at(40_000, &buffer), Err(BlockError::Failed(_))));
        assert!(matches!(device.discard(40_000..50_000), Err(BlockError::Failed(_))));
        assert_eq!(file.as_file().metadata().unwrap().len(), 20_000);
        let extents = device.extents(0..65_536).unwrap();
        assert!(extents.iter().all(|extent| extent.kind == ExtentKind::Data || extent.range.end <= 20_480));
    }

    #[test]
    fn refuses_what_is_not_a_disk() {
        let directory = tempfile::tempdir().unwrap();
        let missing = FileDevice::open(directory.path().join("none"), Access::ReadOnly).unwrap_err();
        assert!(matches!(missing, OpenDeviceError::Missing { .. }), "{missing}");
        let not_a_disk = FileDevice::open(directory.path(), Access::ReadOnly).unwrap_err();
        assert!(matches!(not_a_disk, OpenDeviceError::NotADisk { .. }), "{not_a_disk}");
        let character = FileDevice::open("/dev/null", Access::ReadOnly).unwrap_err();
        assert!(matches!(character, OpenDeviceError::NotADisk { .. }), "{character}");
    }

    #[test]
    fn a_read_only_device_and_the_end_are_respected() {
        let file = image(10_000);
        let device = FileDevice::open_direct(file.path()).unwrap();
        assert_eq!((device.size(), device.access(), device.is_block_device()), (10_000, Access::ReadOnly, false));
        assert!(matches!(device.write_at(0, b"x"), Err(BlockError::ReadOnly)));
        assert!(matches!(device.discard(0..1), Err(BlockError::ReadOnly)));
        assert!(matches!(device.read_at(9_999, &mut [0, 0]), Err(BlockError::OutOfRange { .. })));
        assert!(matches!(device.read_at(u64::MAX, &mut [0, 0]), Err(BlockError::OutOfRange { .. })));
    }

    #[test]
    fn discarded_ranges_become_holes() {
        let file = image(1 << 20);
        let device = FileDevice::open(file.path(), Access::ReadWrite).unwrap();
        device.write_at(0, &vec![1; 1 << 20]).unwrap();
        device.discard(65_536..131_072).unwrap();
        if device.without_punch_hole.load(Ordering::Relaxed) {
            return;
        }
        let kinds: Vec<_> = device.extents(0..1 << 20).unwrap().into_iter().map(|e| (e.range, e.kind)).collect();
        assert_eq!(
            kinds,
            [(0..65_536, ExtentKind::Data), (65_536..131_072, ExtentKind::Hole), (131_072..1 << 20, ExtentKind::Data)]
        );
    }
}
