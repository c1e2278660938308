//! Every bound of the replication language, with its unit. Exceeding one is an error, never an allocation.

/// Longest name, serial number or path, in bytes.
pub const NAME_BYTES_MAX: usize = 1024;
/// Largest disk, in bytes.
pub const DISK_BYTES_MAX: u64 = 1 << 63;
/// Most disks of one machine.
pub const DISKS_MAX: usize = 64;
/// Most bytes of data in one change; longer writes are split where they are captured, under one bio number.
pub const CHANGE_DATA_BYTES_MAX: usize = 1 << 20;
/// Longest range of one zero or discard change, in bytes.
pub const CHANGE_RANGE_BYTES_MAX: u64 = 1 << 62;
/// Most changes in one message.
pub const BATCH_CHANGES_MAX: usize = 4096;
/// Data bytes after which a batch of changes is sent, in bytes. A batch may exceed it by one change.
pub const BATCH_BYTES_TARGET: usize = 1 << 20;
/// Largest message body on the wire, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Most bytes of a disk named by one hash offer.
pub const OFFER_RANGE_BYTES_MAX: u64 = 256 << 20;
/// Most hashes in one offer.
pub const OFFER_HASHES_MAX: usize = 65_536;
/// Most bytes of disk data in one heal message.
pub const HEAL_DATA_BYTES_MAX: usize = 1 << 20;
/// Most hash offers whose verdict is still out.
pub const OFFERS_IN_FLIGHT_MAX: usize = 32;
/// Most heal data sent but not yet stored, in bytes.
pub const HEAL_WINDOW_BYTES: u64 = 32 << 20;
/// Most ranges that one break or one heal of ranges names; more are joined.
pub const BREAK_RANGES_MAX: usize = 32;
/// Longest description of a machine's hardware, in bytes.
pub const DESCRIPTION_BYTES_MAX: usize = 256 << 10;
/// Most positions behind *committed* of which a sender remembers the stream's hash; the oldest are forgotten first, but for
/// the newest committed one. A minute of small writes.
pub const MARKS_MAX: usize = 8192;
/// Longest text that explains a gap, a refusal or a defect, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;
