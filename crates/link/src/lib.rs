//! Links between agents, process servers and master targets: who may talk, and how bytes travel.
//!
//! ```text
//!  token ──► join ──► LinkIdentity ─┐                     ┌─► Connection ─► FrameLink::{send, recv}
//!  Authority (CA, tokens, denials) ─┴─► Connector / Listener (TLS 1.3, mutual)
//! ```
//!
//! * [`authority`]: the server's certificate authority, its one-time tokens and its deny list, all kept in
//!   [`world::Files`].
//! * [`token`] and [`join`]: how a machine that knows nobody becomes an enrolled peer; [`Connector::renew`]: how it stays one.
//! * [`trust`]: which certificates are accepted, for how long after their end, and which are denied.
//! * [`frame`]: the opaque messages a link carries, and [`FrameLink`], the trait the engines are written against.
//! * [`memory`]: a link inside one process, for tests and for the simulation.
//! * [`connection`], [`connector`], [`listener`]: the same over TLS. Tokio moves the bytes; callers are threads.
//!
//! Invariants: no frame is delivered from a peer whose certificate did not chain to the authority; a secret is sent
//! only to a server that proved to hold the authority's certificate named in the token; every queue is bounded
//! ([`limits`]); bytes from outside never panic. A crash leaves either a complete identity or none, and a token
//! that is either unused or bound to exactly one public key.

pub mod authority;
pub mod connection;
pub mod connector;
pub mod error;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod identity;
pub mod join;
pub mod limits;
pub mod listener;
pub mod memory;
pub mod token;
pub mod trust;

mod driver;
mod queue;
mod record;
mod renew;
mod session;
mod tls;

pub use authority::{Authority, AuthorityError, TokenOrder};
pub use connection::Connection;
pub use connector::{Connector, Expected, LinkRuntime};
pub use error::{LinkError, PeerRefusal};
pub use frame::{Frame, FrameLink, TrySend};
pub use identity::{LinkIdentity, PeerIdentity, PrivateKey, PublicKey, Role};
pub use join::{Admission, JoinError, JoinPlan, JoinRefusal, join};
pub use listener::{Listener, Reception};
pub use memory::MemoryLink;
pub use token::{JoinToken, TokenError};
pub use trust::{DenyList, Trust};
