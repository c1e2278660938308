//! Disks over the network block device (NBD) protocol: a server for branches and the splitter, and a small client.
//!
//! ```text
//! client ─► Server ─► Negotiation (pure) ─► transmission ─► Export ─► world::BlockDevice
//!                                            │  RequestHeader → Terms::check → Request (pure)
//!                                            └  Outbox: replies in wire order (pure)
//! ```
//!
//! * [`Server`] listens on unix sockets and TCP; one thread per connection, a few workers when requests wait.
//! * [`Exports`] and [`Export`] are what it serves; [`ExportTable`] and [`DeviceExport`] are the plain ones.
//! * [`Client`] is a [`world::BlockDevice`] over one connection.
//! * [`negotiation`], [`request`] and [`reply`] are the protocol without I/O; nothing a peer sends makes them panic.
//!
//! The protocol is the one of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle,
//! structured replies, `base:allocation`, TLS by `STARTTLS`.

mod channel;
pub mod client;
pub mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod limits;
mod memory;
pub mod negotiation;
mod protocol;
pub mod reply;
pub mod request;
pub mod server;
mod transmission;

pub use client::{Client, ConnectError};
pub use export::{BlockSizes, DeviceExport, Export, ExportTable, Exports, Listed};
pub use server::{Listen, ServeError, Server, ServerHandle, ServerOptions};
