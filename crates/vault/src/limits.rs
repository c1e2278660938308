//! Every bound of the vault, with its unit. Exceeding one is an error, never an allocation.

/// Longest name of an object, in bytes.
pub const OBJECT_NAME_BYTES_MAX: usize = 512;
/// Largest object header with its signature, in bytes.
pub const HEADER_BYTES_MAX: usize = 16 << 10;
/// What the first read of an object asks for, in bytes. Nearly every header fits.
pub const HEADER_READ_BYTES: u64 = 1 << 10;
/// What the first read of a manifest asks for, in bytes: the header and, nearly always, the whole delta.
pub const MANIFEST_READ_BYTES: u64 = 16 << 10;
/// Largest plaintext of one frame, in bytes.
pub const FRAME_PLAIN_BYTES_MAX: usize = 8 << 20;
/// Most bytes that sealing adds to a frame: the codec byte, the AEAD tag, and what zstd needs for its own framing.
pub const FRAME_OVERHEAD_BYTES_MAX: usize = 1 << 10;
/// Largest body of an object, in bytes. Readers and writers hold objects in memory while they are made.
pub const OBJECT_BODY_BYTES_MAX: u64 = 80 << 20;
/// Most frames in one object.
pub const OBJECT_FRAMES_MAX: u32 = 1 << 20;
/// Most bytes of clear, signed, kind-specific fields in a header.
pub const CLEAR_FIELDS_BYTES_MAX: usize = 8 << 10;
/// Most recipients a data key is sealed to.
pub const RECIPIENTS_MAX: u64 = 16;
/// Longest label of a writer, a machine or a branch, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;
/// Unsealed data keys that a reader keeps.
pub const DATA_KEYS_CACHED_MAX: usize = 4096;
/// Headers that a reader remembers to have verified; 32 bytes each.
pub const HEADERS_VERIFIED_MAX: usize = 8192;
/// Names asked for in one listing.
pub const LIST_PAGE: usize = 1000;
/// Most memory that a key slot may demand for argon2id, in KiB. A forged slot must not exhaust the machine.
pub const ARGON2_MEMORY_KIB_MAX: u32 = 4 << 20;
/// Most passes that a key slot may demand for argon2id.
pub const ARGON2_PASSES_MAX: u32 = 64;
/// Threads that race for one name when a store is probed.
pub const PROBE_RACERS: usize = 4;
/// Names they race for.
pub const PROBE_RACES: usize = 8;
/// Manifests after which a writer adds a checkpoint.
pub const CHECKPOINT_EVERY: usize = 64;
/// Most manifests that one checkpoint covers.
pub const COVERED_MAX: u64 = 4096;
/// Most layers named by one manifest. A generation has fewer live ones as long as its writer merges.
pub const LAYERS_MAX: u64 = 1 << 16;
/// Most gaps of one generation. A writer that needs more opens the next generation.
pub const GAPS_MAX: u64 = 4096;
/// Most ranges one gap names.
pub const GAP_RANGES_MAX: u64 = 4096;
/// Most unreadable ranges recorded by one generation.
pub const DEFECTS_MAX: u64 = 1 << 16;
/// Most geometry records of one generation.
pub const GEOMETRIES_MAX: u64 = 4096;
/// Most cuts in one manifest or one checkpoint.
pub const CUTS_MAX: u64 = 1 << 18;
/// Most links to earlier checkpoints.
pub const SKIPS_MAX: u64 = 512;
/// Longest text that explains a gap, a generation or a defect, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;
/// Invalid manifests at the end of a chain that the fast way of reading it skips.
pub const INVALID_AT_HEAD_MAX: usize = 16;
/// Most key slots of a vault that one slot supersedes.
pub const SLOTS_MAX: u64 = 64;
/// Most chains that one revocation names.
pub const REVOKED_CHAINS_MAX: u64 = 1 << 16;
/// How often somebody else's manifest may come first while a chain is closed, committed, cancelled or handed over.
pub const CONTROL_RACES_MAX: usize = 256;
