//! Every bound of this crate, with its unit.

use std::time::Duration;

/// Largest read or write in bytes. What qemu and libnbd send at most.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Bytes of requests and replies that one connection has in flight at most, unless a single one is larger; its client
/// then waits. What 64 requests of nbdcopy take.
pub const IN_FLIGHT_BYTES_MAX: usize = 16 << 20;
/// The same over all connections of a server, unless the options say otherwise; requests of up to
/// [`INLINE_BYTES_MAX`] that the receiving thread executes itself do not count.
pub const SERVER_IN_FLIGHT_BYTES_MAX: usize = 256 << 20;
/// Time that a client may take nothing of a reply, or send nothing of a request's data that was begun, before it is cut
/// off: what it holds of [`SERVER_IN_FLIGHT_BYTES_MAX`] is missing to all others.
pub const STALL_MAX: Duration = Duration::from_secs(300);
/// Requests that one connection has in flight at most.
pub const IN_FLIGHT_REQUESTS_MAX: usize = 128;
/// Largest request in bytes that the thread which received it may execute itself.
pub const INLINE_BYTES_MAX: usize = 64 << 10;
/// A class of requests that recently took longer than this many nanoseconds goes to workers. Handing a request over
/// costs about 10 µs on two cores, so below this the hand-over would cost more than it hides.
pub const INLINE_NANOSECONDS_MAX: u64 = 50_000;
/// Worker threads of one connection, unless the options say otherwise.
pub const WORKERS_PER_CONNECTION: usize = 8;
/// Bytes received ahead on one connection.
pub const INBOX_BYTES: usize = 128 << 10;
/// Bytes of replies gathered before they are sent.
pub const OUTBOX_BYTES_GATHERED: usize = 256 << 10;
/// Reply buffer in bytes that a thread keeps from one request to the next.
pub const OUTBOX_BYTES_KEPT: usize = 2 << 20;
/// Reply buffer in bytes that an idle thread keeps.
pub const OUTBOX_BYTES_KEPT_IDLE: usize = 128 << 10;
/// How long a worker waits for work before it counts as idle.
pub const WORKER_IDLE_AFTER: Duration = Duration::from_secs(1);
/// Run of zero bytes from which on a read reply tells "hole" in place of sending them.
pub const HOLE_BYTES_MIN: usize = 64 << 10;
/// Pieces of the allocation map in one reply.
pub const STATUS_EXTENTS_MAX: usize = 16 << 10;
/// Bytes of the device whose allocation map is asked for at once.
pub const STATUS_WINDOW_BYTES: u64 = 256 << 20;
/// Data of one option in bytes.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Options of one connection.
pub const OPTIONS_MAX: usize = 1024;
/// Name of an export in bytes; the protocol's own bound for any string.
pub const NAME_BYTES_MAX: usize = 4096;
/// Exports told to a client that asks for a list.
pub const EXPORTS_LISTED_MAX: usize = 10_000;
/// Message inside an error reply in bytes.
pub const ERROR_MESSAGE_BYTES_MAX: usize = 512;
/// Connections of one server, unless the options say otherwise.
pub const CONNECTIONS_MAX: usize = 128;
/// Time a client has from connecting to the first request, TLS included.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time [`crate::ServerHandle::stop`] gives clients to take the replies of what is in flight.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// Pieces handed to one vectored write; the system takes 1024.
pub const SEND_PIECES_MAX: usize = 512;
