//! The process server: takes changes in over replication links, makes them durable, seals them into vault objects and
//! commits those.
//!
//! A change's way: ingest, [`journal`], seal, upload.

pub mod config;
mod describe;
pub mod feedback;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod ingest;
pub mod journal;
pub mod machine;
pub mod notes;
pub mod pipeline;
pub mod server;

pub use config::{MasterTargetConfig, ServerConfig};
pub use server::{Server, StartError};
