//! A deterministic world for the real code: one thread, one seed, virtual time.
//!
//! The world owns time, randomness, disks, files, stores and links, and injects what goes wrong in them. Agent, process
//! server, vault, branches and master target in it are the product's own. The model ([`model`]) is independent: it knows
//! what was written to each disk and when, and judges every point that the vault announces.

pub mod branch_site;
pub mod clock;
pub mod disk;
pub mod files;
pub mod home;
pub mod life;
pub mod link;
pub mod model;
pub mod planted;
pub mod rng;
pub mod server;
pub mod source;
pub mod spoiled;
pub mod spoiled_files;
pub mod store;
pub mod tenant;
