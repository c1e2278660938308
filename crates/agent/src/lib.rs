//! The mobility agent: captures every write of a machine's protected disks and sends it to a process server.
//!
//! ```text
//! NBD clients ─► SplitterDisk ─► disk                      control.sock: status, mark, freeze, stop
//!                   └► ring, maps ─► Engine ─► LinkWire ─► process server
//! ```
//!
//! * [`config`]: the configuration file. [`state`]: the state directory. [`disks`]: which disk is which.
//! * [`capture`]: writes, the ring, the dirty maps. [`engine`]: moves them to a receiver. [`wire`]: over TLS.
//! * [`service`]: the running agent, made of all of these. [`status`]: what it says about itself.

pub mod capture;
pub mod config;
pub mod disks;
pub mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod heal_buffers;
pub mod service;
pub mod state;
pub mod status;
pub mod wire;
