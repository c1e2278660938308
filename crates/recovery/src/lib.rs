//! Recovery: branches of a vault's history as writable disks, and the way home.
//!
//! ```text
//! BranchHost ─ open at a moment ─► Branch ─► Splitter ─► NBD export          FailbackRun ─► link ─► MasterTarget ─► HomeDisk
//!                                   │ └─ BranchCore: journal, overlay, seal     ▲
//!                                   └──────────── capture, index hashes ────────┘
//! ```
//!
//! * [`host`] opens branches and keeps their state; [`core`] is a branch without threads; [`branch`] is one that is open.
//! * [`device`] and [`export`] are its disks, as block devices and over NBD.

pub mod branch;
pub mod core;
pub mod device;
pub mod error;
pub mod export;
mod history_view;
pub mod host;
pub mod layered_store;
pub mod limits;
mod overlay;
pub mod read_ahead;

pub use branch::{Branch, BranchInfo, BranchRunner};
pub use core::{BranchCore, BranchFigures, SealConfig, SealWish, Sealed};
pub use error::BranchError;
pub use history_view::{open_chain, view_of};
pub use host::{BranchConfig, BranchHost, Keep};
