//! Every bound of the links, with its unit.

use std::time::Duration;

/// Largest frame body in bytes.
pub const FRAME_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Frame kinds from this one on belong to the link itself; senders may use those below.
pub const RESERVED_KIND_FIRST: u8 = 0xf0;

/// Frames a connection holds for sending before `send` blocks.
pub const OUTGOING_FRAMES_MAX: usize = 256;
/// Body bytes a connection holds for sending before `send` blocks. One frame is always taken.
pub const OUTGOING_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Frames a connection holds for `recv` before it stops reading from the socket.
pub const INCOMING_FRAMES_MAX: usize = 256;
/// Body bytes a connection holds for `recv` before it stops reading from the socket. One frame is always taken.
pub const INCOMING_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes asked of the socket at once. 256 KiB are 16 TLS records: large enough that system calls do not count, small
/// enough to stay in the second-level cache between the kernel's copy and decryption.
pub const READ_BYTES: usize = 256 * 1024;
/// Plaintext bytes encrypted before the socket is offered the result.
pub const WRITE_BYTES: usize = 256 * 1024;
/// Parts of a frame smaller than this are copied together into one TLS record instead of getting one each.
pub const COALESCE_BYTES: usize = 16 * 1024;
/// Copied parts are encrypted once this many bytes of them came together: several full TLS records.
pub const STAGE_BYTES: usize = 64 * 1024;

/// Time for a connection to be established, name resolution included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time from the first byte to an authenticated peer. Slower peers are dropped.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a whole join exchange after the handshake.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Strangers' connections a listener treats at the same time; further ones wait in the kernel.
pub const HANDSHAKES_MAX: usize = 128;
/// Authenticated connections that wait for `Listener::accept`; further ones are refused as busy.
pub const ACCEPT_QUEUE_MAX: usize = 64;
/// Bytes a stranger may make us hold during a handshake.
pub const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;

/// A connection that sent nothing for this long sends a sign of life.
pub const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A connection that heard nothing for this long, while listening, is given up.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often an open connection looks whether its peer was denied.
pub const DENIAL_CHECK: Duration = Duration::from_secs(1);
/// Time for a last alert or farewell to leave.
pub const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the peer to answer a farewell.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a certificate is valid, in days.
pub const CERTIFICATE_DAYS: u64 = 90;
/// A certificate is renewed when no more than this part of its life is left: a server's own and an agent's while they run, a
/// recovery host's when it brings a branch home.
pub const RENEW_BEFORE_SHARE: u64 = 3;
/// How long the authority's own certificate is valid, in days. Its validity is never checked on links.
pub const AUTHORITY_DAYS: u64 = 36_500;
/// Certificates begin this many days before their issue, for peers whose clock is behind.
pub const BACKDATE_DAYS: u64 = 1;
/// How many days after its end (or before its beginning) a certificate of an enrolled, undenied peer is accepted.
pub const TRUST_GRACE_DAYS: u64 = 180;

/// Characters of a printed token, at most.
pub const TOKEN_CHARS_MAX: usize = 4096;
/// Server addresses in a token, at most.
pub const TOKEN_ADDRESSES_MAX: usize = 8;
/// Bytes of one address, at most.
pub const ADDRESS_BYTES_MAX: usize = 255;
/// Bytes of one field of a stored record or a join message, at most.
pub const FIELD_BYTES_MAX: usize = 16 * 1024;
