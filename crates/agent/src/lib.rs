//! The mobility agent: captures every write of a machine's protected disks and sends it to a process server.

pub mod capture;
pub mod engine;
