//! Witnesses: what tells whether a disk was written to between two moments, without seeing the writes.
//!
//! * A block device counts the writes that have ended and those under way. If the counts of two moments are the same and
//!   nothing is under way at the second, nothing was written in between: a write that began before the first and goes on
//!   is under way, one that ended is counted. That alone is a proof.
//! * An image file has the times of its last change. A long write changes them once, at its beginning, so that they prove
//!   nothing alone: the content must be found unchanged as well.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use world::{BlockDevice, FileDevice};

/// What a witness says of one moment. Two that are equal and [`Trace::is_rest`]: nothing was written in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    counts: Vec<i64>,
    under_way: u64,
}

impl Trace {
    /// A trace of these counts, with so many writes under way.
    pub fn new(counts: Vec<i64>, under_way: u64) -> Trace {
        Trace { counts, under_way }
    }

    /// No write was under way.
    pub fn is_rest(&self) -> bool {
        self.under_way == 0
    }
}

/// Tells whether a disk was written to.
pub trait Witness: Send {
    /// The trace of this moment.
    ///
    /// # Errors
    /// The disk is gone, or its counters are.
    fn trace(&self) -> io::Result<Trace>;

    /// Whether equal traces prove by themselves that nothing was written in between.
    fn is_proof(&self) -> bool;
}

/// Why a disk has no witness.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// It cannot be looked at.
    #[error("{} cannot be looked at", .0.display())]
    Unreachable(PathBuf, #[source] io::Error),
    /// Statistics are switched off.
    #[error("{} does not count its requests: write 1 to {}", .0.display(), .1.display())]
    SwitchedOff(PathBuf, PathBuf),
    /// The driver keeps none.
    #[error("{} does not count its requests: its driver keeps no statistics", .0.display())]
    DoesNotCount(PathBuf),
}

/// The witness of the disk at `path`, which `device` reads past every cache.
///
/// # Errors
/// The disk cannot tell: no point could ever be proven.
pub fn of(path: &Path, device: &FileDevice) -> Result<Box<dyn Witness>, WitnessError> {
    let unreachable = |error| WitnessError::Unreachable(path.to_owned(), error);
    let metadata = fs::metadata(path).map_err(unreachable)?;
    if !metadata.file_type().is_block_device() {
        return Ok(Box::new(ImageTimes { file: File::open(path).map_err(unreachable)? }));
    }
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let folder = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    let switch = [folder.join("queue/iostats"), folder.join("../queue/iostats")].into_iter().find(|file| file.exists());
    if let Some(switch) = switch
        && fs::read_to_string(&switch).is_ok_and(|text| text.trim() == "0")
    {
        return Err(WitnessError::SwitchedOff(path.to_owned(), switch));
    }
    let counters = Counters { folder };
    // Some drivers have the files and never count.
    let before = counters.fields("stat").map_err(unreachable)?;
    device.read_at(0, &mut [0; 4096]).map_err(|error| unreachable(io::Error::other(error)))?;
    let after = counters.fields("stat").map_err(unreachable)?;
    if before.first() == after.first() {
        return Err(WitnessError::DoesNotCount(path.to_owned()));
    }
    counters.trace().map_err(unreachable)?;
    Ok(Box::new(counters))
}

/// A block device's counters below `/sys`.
struct Counters {
    folder: PathBuf,
}

/// Writes ended, merged, sectors; discards ended, merged, sectors. See `Documentation/block/stat.rst` of the kernel.
const COUNTED: [usize; 6] = [4, 5, 6, 11, 12, 13];

impl Counters {
    fn fields(&self, name: &str) -> io::Result<Vec<i64>> {
        let text = fs::read_to_string(self.folder.join(name))?;
        let fields = text.split_whitespace().map(str::parse::<i64>).collect::<Result<Vec<_>, _>>();
        fields.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

impl Witness for Counters {
    fn trace(&self) -> io::Result<Trace> {
        // Under way first: what ends between the two readings is counted by the second.
        let under_way = self.fields("inflight")?.get(1).copied().ok_or(io::ErrorKind::InvalidData)?;
        let stat = self.fields("stat")?;
        // Kernels before 4.18 count discards as writes.
        let counts = COUNTED.iter().filter_map(|field| stat.get(*field).copied()).collect::<Vec<_>>();
        if counts.len() < 3 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Trace::new(counts, under_way.max(0).cast_unsigned()))
    }

    fn is_proof(&self) -> bool {
        true
    }
}

/// When an image file was last changed.
struct ImageTimes {
    file: File,
}

impl Witness for ImageTimes {
    fn trace(&self) -> io::Result<Trace> {
        let seen = self.file.metadata()?;
        let times = vec![seen.mtime(), seen.mtime_nsec(), seen.ctime(), seen.ctime_nsec(), seen.size().cast_signed()];
        Ok(Trace::new(times, 0))
    }

    fn is_proof(&self) -> bool {
        false
    }
}
