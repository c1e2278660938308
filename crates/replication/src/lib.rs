//! The language that both ends of a replication link share: positions, changes, dirty maps, heals, wire messages, and
//! the sender and receiver as pure state machines. No I/O, no clock, no threads.
//!
//! A write's way through this crate: a capture hands a request to [`sender`], which numbers it and batches it into a
//! [`wire`] message; [`receiver`] checks continuity and tells its owner what to make durable; acknowledgements flow
//! back and release the capture's buffer. [`heal`] is the one procedure for everything that the stream did not carry.

pub mod change;
pub mod codec;
pub mod cut;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod geometry;
mod heal;
pub mod leaf;
pub mod limits;
pub mod maps;
pub mod offers;
pub mod position;
pub mod reach;
pub mod receiver;
pub mod sender;
pub mod wire;

pub use change::{Change, ChangeKind, HealId, MarkerKind, SourceTime, StreamHash};
pub use cut::{Cut, CutKind, PointTime};
pub use geometry::{ByteRange, DiskGeometry, DiskIdentity};
pub use leaf::{LeafHash, LeafKey, PlainLeafHash};
pub use position::{ChainId, DiskId, Epoch, Generation, InstanceId, MachineId, Position, SequenceNumber};
pub use reach::{Ranges, Reach};
