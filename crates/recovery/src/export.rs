//! Serves the disks of a branch over NBD.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use agent::capture::SplitterDisk;
use nbd::{Export, ExportTable, Listen, ServeError, Server, ServerHandle, ServerOptions};
use replication::DiskId;
use replication::geometry::ByteRange;
use world::{BlockDevice, BlockError};

use crate::branch::Branch;
use crate::core::BranchCore;
use crate::error::block_error;

/// A disk of a branch as an NBD client sees it.
struct BranchExport {
    device: SplitterDisk,
    core: Arc<BranchCore>,
    disk: DiskId,
    description: String,
}

impl Export for BranchExport {
    fn device(&self) -> &dyn BlockDevice {
        &self.device
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn zeroes_fast(&self) -> bool {
        true
    }

    fn prefetch(&self, range: Range<u64>) -> Result<(), BlockError> {
        let range = ByteRange::between(range.start, range.end);
        range.map_or(Ok(()), |range| self.core.prefetch(self.disk, range).map_err(block_error))
    }
}

/// The name under which a disk is served.
pub fn export_name(disk: DiskId) -> String {
    format!("disk{}", disk.0)
}

/// The unix socket on which a branch is served.
pub fn socket_path(branch: &Branch) -> PathBuf {
    branch.directory().join("nbd.sock")
}

/// Serves all disks of `branch` on the unix socket in its directory and, if asked for, on a loopback address. A disk is
/// named `disk0` after its number; a single one is also the default export.
///
/// # Errors
/// [`ServeError`] names the place that is taken or refused.
pub fn serve(branch: &Arc<Branch>, tcp: Option<SocketAddr>) -> Result<ServerHandle, ServeError> {
    let listen: Vec<Listen> = std::iter::once(Listen::Unix(socket_path(branch))).chain(tcp.map(Listen::Tcp)).collect();
    Server::start(Arc::new(exports(branch)), ServerOptions::default(), &listen)
}

/// The exports of `branch`, for a server of one's own.
pub fn exports(branch: &Branch) -> ExportTable {
    let table = ExportTable::new();
    for geometry in branch.disks() {
        let Ok(device) = branch.disk(geometry.disk) else { continue };
        let description = format!("{} of branch {}, {}", geometry.disk, branch.id(), geometry.path);
        let export = BranchExport { device, core: Arc::clone(branch.core()), disk: geometry.disk, description };
        table.insert(export_name(geometry.disk), Arc::new(export) as Arc<dyn Export>);
    }
    table
}
