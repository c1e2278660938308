//! Where a table's pages go: into the one object being built, or into as many as it takes.

use replication::{ChainId, Generation};

use crate::error::VaultError;
use crate::keys::WriterSession;
use crate::layer::{Host, LayerKind, LayerRef};
use crate::object::{Compression, FrameClass, FrameRef, ObjectBuilder, ObjectKind, Placement};
use crate::store::{ObjectName, Store};
use crate::table_build::{PageSink, TableSummary};

/// Bytes of pages after which a table goes on in another object.
const TABLE_OBJECT_BYTES_TARGET: u64 = 48 << 20;

/// Seals pages into an object that hosts the table.
pub(crate) struct HostSink<'a, 'b>(pub(crate) &'a mut ObjectBuilder<'b>);

impl PageSink for HostSink<'_, '_> {
    type Error = VaultError;

    fn page(&mut self, plain: Vec<u8>) -> Result<(Option<ObjectName>, FrameRef), VaultError> {
        Ok((None, self.host_page(plain)?))
    }

    fn host_page(&mut self, plain: Vec<u8>) -> Result<FrameRef, VaultError> {
        // Mostly hashes, and delta-coded otherwise: nothing is left to compress.
        self.0.add(FrameClass::Index, &plain, Compression::None)
    }
}

/// Seals pages into objects of a chain, starting another one whenever one is large enough. The last hosts the table.
pub(crate) struct RollingSink<'a> {
    session: &'a WriterSession,
    store: &'a dyn Store,
    kind: ObjectKind,
    chain: ChainId,
    generation: Generation,
    current: ObjectBuilder<'a>,
    object_bytes_target: u64,
}

impl<'a> RollingSink<'a> {
    pub(crate) fn new(
        session: &'a WriterSession,
        store: &'a dyn Store,
        kind: ObjectKind,
        chain: ChainId,
        generation: Generation,
    ) -> RollingSink<'a> {
        let current = RollingSink::begin(session, kind, chain, generation);
        let object_bytes_target = TABLE_OBJECT_BYTES_TARGET;
        RollingSink { session, store, kind, chain, generation, current, object_bytes_target }
    }

    /// With another size per object, for tests.
    #[cfg(test)]
    pub(crate) fn with_object_bytes(self, object_bytes_target: u64) -> RollingSink<'a> {
        RollingSink { object_bytes_target, ..self }
    }

    fn begin(
        session: &'a WriterSession,
        kind: ObjectKind,
        chain: ChainId,
        generation: Generation,
    ) -> ObjectBuilder<'a> {
        let placement = Placement::on_chain(kind, chain, generation);
        ObjectBuilder::new(session, placement, session.segment_name(chain, generation))
    }

    /// Stores the last object and says what layer it hosts.
    pub(crate) fn finish(
        self,
        kind: LayerKind,
        level: u8,
        root: FrameRef,
        summary: &TableSummary,
    ) -> Result<LayerRef, VaultError> {
        let host = Host::Object(self.current.name().clone());
        self.current.finish(Some(root)).put(self.store)?;
        Ok(layer(kind, level, host, root, summary))
    }
}

impl PageSink for RollingSink<'_> {
    type Error = VaultError;

    fn page(&mut self, plain: Vec<u8>) -> Result<(Option<ObjectName>, FrameRef), VaultError> {
        if self.current.body_len() + plain.len() as u64 > self.object_bytes_target {
            let next = RollingSink::begin(self.session, self.kind, self.chain, self.generation);
            std::mem::replace(&mut self.current, next).finish(None).put(self.store)?;
        }
        let frame = self.current.add(FrameClass::Index, &plain, Compression::None)?;
        // Only the last object will be the host, and nobody knows yet which that is.
        Ok((Some(self.current.name().clone()), frame))
    }

    fn host_page(&mut self, plain: Vec<u8>) -> Result<FrameRef, VaultError> {
        self.current.add(FrameClass::Index, &plain, Compression::None)
    }
}

/// The reference to a finished table.
pub(crate) fn layer(kind: LayerKind, level: u8, host: Host, root: FrameRef, summary: &TableSummary) -> LayerRef {
    LayerRef {
        kind,
        level,
        host,
        root,
        first: summary.first_sequence,
        last: summary.last_sequence,
        begin: summary.begin,
        end: summary.end,
        entries: summary.entries,
        data_bytes: summary.data_bytes,
        index_bytes: summary.index_bytes,
    }
}
