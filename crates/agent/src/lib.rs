//! The mobility agent: captures every write of a machine's protected disks and sends it to a process server.
//!
//! ```text
//! NBD clients ─► SplitterDisk ─► disk                      control.sock: status, mark, freeze, stop
//!                   └► ring, maps ─► Engine ─► LinkWire ─► process server
//! ```
//!
//! * [`config`]: the configuration file. [`state`]: the state directory. [`disks`]: which disk is which.
//! * [`capture`]: writes, the ring, the dirty maps. [`engine`]: moves them to a receiver. [`wire`]: over TLS.
//! * [`consistency`]: application-consistent points. [`system`]: what `/proc` and `/sys` say.
//! * [`discovery`]: which disks there are, for who has to choose. [`hardware`]: the machine, for recovery.
//! * [`scrub`]: source and vault compared again and again.
//! * [`service`]: the running agent, made of all of these. [`status`]: what it says about itself.

pub mod capture;
pub mod config;
pub mod consistency;
pub mod discovery;
pub mod disks;
pub mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod hardware;
mod heal_buffers;
pub mod heal_pace;
pub mod scrub;
pub mod service;
pub mod state;
pub mod status;
pub mod system;
pub mod vm_generation;
pub mod wire;
