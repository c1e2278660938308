//! The verbs, one file each.

pub(crate) mod agent;
pub(crate) mod branch;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod failback;
pub(crate) mod failover;
pub(crate) mod inner_agent;
pub(crate) mod join;
pub(crate) mod server;
pub(crate) mod token;
pub(crate) mod vault;
