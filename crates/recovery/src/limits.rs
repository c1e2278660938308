//! Every bound of recovery, with its unit.

use std::time::Duration;

/// Bytes that one unsealed change counts besides its data.
pub const CHANGE_OVERHEAD_BYTES: u64 = 256;
/// Largest piece of one write in one journal record, in bytes.
pub const RECORD_DATA_BYTES_MAX: usize = 4 << 20;
/// Data bytes up to which a segment travels inside its manifest.
pub const INLINE_SEGMENT_BYTES_MAX: u64 = 4 << 20;
/// Most bytes of changes in one segment.
pub const SEGMENT_BYTES_MAX: u64 = 32 << 20;
/// Most changes in one segment.
pub const SEGMENT_CHANGES_MAX: usize = 1 << 18;
/// Pieces of an allocation map that one call returns; the rest of the range counts as data.
pub const EXTENTS_MAX: usize = 16 << 10;
/// How long a write waits for room before it fails.
pub const ROOM_WAIT: Duration = Duration::from_secs(60);
/// Sequential readers recognised at once on one disk.
pub const READERS_MAX: usize = 8;
/// Requests to read ahead that wait; further ones are dropped.
pub const READ_AHEAD_QUEUE_MAX: usize = 16;
/// Longest line on a control socket, in bytes.
pub const CONTROL_LINE_BYTES_MAX: u64 = 64 << 10;
/// Separate ranges of stream writes that a master target remembers during a heal. Beyond, the heal starts again later.
pub const SHIELD_RANGES_MAX: usize = 4 << 20;
/// Bytes of disk that one proof of equality covers. What is known of home takes 48 bytes for each, and 520 more while some
/// of it is known and some is not.
pub const PROOF_RANGE_BYTES: u64 = 16 << 20;
/// Such ranges of one disk that may be known in part, 64 MiB of memory. Beyond, a range that was written to is read as a
/// whole by the proof.
pub const PARTLY_KNOWN_MAX: usize = 128 << 10;
/// A machine that was proven current more recently than this may well be running.
pub const HEARD_RECENTLY: Duration = Duration::from_secs(300);
/// Stream bytes that may be under way to a master target.
pub const WINDOW_BYTES: u64 = 16 << 20;
/// How long a peer of a failback may be silent.
pub const HOME_SILENCE: Duration = Duration::from_secs(30);
/// How long a new session of a failback waits for an earlier one to let go of the disks.
pub const SEAT_WAIT: Duration = Duration::from_secs(10);
/// How often a session looks whether a newer one waits for it.
pub const SEAT_LOOK: Duration = Duration::from_millis(50);
/// Time for a last word to a recovery host to be taken.
pub const FAREWELL_WAIT: Duration = Duration::from_secs(5);
