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
//! * [`failback`] follows a branch home, [`master_target`] writes it to [`home_disk`]s; [`home_wire`] is between them, and
//!   [`home_proof`] is how home is proved equal. [`succession`] says whether the branch may become the machine's history.
//! * A master target is in this process ([`local_home`]) or in a server that TLS leads to ([`remote_home`], which knocks at
//!   [`home_reception`]); [`home_rules`] are its own, whatever an order says.
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
pub mod home_proof;
pub mod home_reception;
pub mod home_rules;
pub mod home_wire;
pub mod host;
pub mod identity;
pub mod layered_store;
mod lent_capture;
pub mod limits;
pub mod local_home;
pub mod master_target;
mod overlay;
pub mod read_ahead;
pub mod remote_home;
mod seats;
mod shield;
pub mod succession;

pub use branch::{Branch, BranchInfo, BranchRunner};
pub use control::{ControlClient, ControlServer, HomeAddress, HomeConnector};
pub use core::{BranchCore, BranchFigures, SealConfig, SealWish, Sealed};
pub use error::BranchError;
pub use failback::{Failback, FailbackConfig, FailbackRun, FailbackStatus, HomeLine, LineError, Phase, Turn};
pub use history_view::{open_chain, view_of};
pub use home_disk::{HomeDisk, HomeDisks, HomeOrder, HostView, Refusal};
pub use home_proof::ProofScope;
pub use home_reception::HomeReception;
pub use home_rules::HomeRules;
pub use host::{BranchConfig, BranchHost, Keep};
pub use identity::branch_host_keys;
pub use local_home::LocalHome;
pub use master_target::{HomeError, HomeVisit, MasterTarget, Served, Visit};
pub use remote_home::RemoteHome;
pub use succession::Succession;
