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
//! * [`failback`] follows a branch home, [`master_target`] writes it to [`home_disk`]s; [`home_wire`] is between them.
//! * [`control`] lets another process ask the one that serves a branch.

pub mod branch;
pub mod control;
pub mod core;
pub mod device;
pub mod error;
pub mod export;
pub mod failback;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod history_view;
pub mod home_disk;
pub mod home_wire;
pub mod host;
pub mod layered_store;
mod lent_capture;
pub mod limits;
pub mod local_home;
pub mod master_target;
mod overlay;
pub mod read_ahead;
mod shield;

pub use branch::{Branch, BranchInfo, BranchRunner};
pub use control::{ControlClient, ControlServer, HomeAddress, HomeConnector};
pub use core::{BranchCore, BranchFigures, SealConfig, SealWish, Sealed};
pub use error::BranchError;
pub use failback::{Failback, FailbackConfig, FailbackStatus, HomeLine, Phase};
pub use history_view::{open_chain, view_of};
pub use home_disk::{HomeDisk, HomeOrder, HostView, Refusal};
pub use host::{BranchConfig, BranchHost, Keep};
pub use local_home::LocalHome;
pub use master_target::{HomeError, MasterTarget, Served};
