//! Manifests: the links of a chain. What a manifest says became true when its name was won.
//!
//! A manifest is a delta: layers, cuts, gaps, geometry and defects added since its parent. Every 64th, and every one
//! its writer chooses, also carries a *checkpoint*: the sum of its generation so far. Bytes: `docs/formats/manifest.md`.

mod codec;
mod generation;

use std::fmt;
use std::sync::Arc;

use replication::{
    ByteRange, ChainId, Cut, DiskGeometry, DiskId, Generation, MachineId, PointTime, Position, SequenceNumber,
    StreamHash,
};

use crate::error::{Damage, VaultError};
use crate::keys::{Authority, NameEpoch, NameSwitch, ObjectNonce, OpenKeys, WriterId};
use crate::layer::LayerRef;
use crate::limits;
use crate::numbered::NumberedNames;
use crate::object::{ObjectKind, ObjectReader};
use crate::store::Store;

#[cfg(test)]
pub(crate) use codec::tests::full;
pub(crate) use codec::{decode_list, decode_manifest, decode_option, encode_manifest, list, option};
pub use generation::GenerationState;

/// Names one manifest exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestLink {
    /// Its number in the chain; the first is 1.
    pub number: u64,
    /// The name-key epoch in which it is named.
    pub epoch: NameEpoch,
    /// Its nonce.
    pub nonce: ObjectNonce,
    /// BLAKE3 of its header, which holds the digest of its body.
    pub digest: [u8; 32],
}

/// What winning the manifest's name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestKind {
    /// The chain begins, with generation 1.
    Genesis {
        /// The machine whose disks it holds.
        machine: MachineId,
        /// For a branch: the position below it.
        parent: Option<Position>,
    },
    /// A writer session begins.
    OpenGeneration {
        /// Why, for people.
        reason: String,
        /// The newest sequence number committed before.
        base: SequenceNumber,
    },
    /// More history.
    Append,
    /// The machine fails over: nobody writes to its chain until a cancel.
    Close {
        /// The branch that goes on instead.
        successor: ChainId,
        /// Why, for people.
        reason: String,
        /// Wall time of the operator, in seconds since 1970. An annotation.
        seconds: u64,
    },
    /// The failover stands: the chain has ended.
    Commit {
        /// The close.
        close: ObjectNonce,
    },
    /// The failover is taken back: the next generation goes on.
    Cancel {
        /// The close.
        close: ObjectNonce,
        /// Why, for people.
        reason: String,
    },
    /// A branch came home: its chain is the machine's from here on, and process servers write to it.
    HandOver,
}

impl ManifestKind {
    /// Whether a writer's history can follow within the same generation.
    fn takes_appends(&self) -> bool {
        matches!(self, ManifestKind::Genesis { .. } | ManifestKind::OpenGeneration { .. } | ManifestKind::Append)
    }
}

/// What a gap applies to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GapScope {
    /// No disk of the machine can be opened.
    Machine,
    /// These disks cannot; a point is offered without them.
    Disks(Vec<DiskId>),
    /// These ranges cannot be trusted (an area that was grown into); a point is offered and says so.
    Ranges(Vec<(DiskId, ByteRange)>),
}

/// A stretch of history that cannot be opened: cuts `c` with `after < c < until`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The last position before the break. Its cut can still be opened.
    pub after: SequenceNumber,
    /// What it applies to.
    pub scope: GapScope,
    /// When it opened.
    pub time: PointTime,
    /// Why, for people.
    pub cause: String,
    /// The heal end that closed it, and when; `None` while it is open.
    pub until: Option<(SequenceNumber, PointTime)>,
}

/// A heal ended: the gap that opened at `after` with `scope` is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GapClosed {
    /// The gap's last position before the break.
    pub after: SequenceNumber,
    /// The gap's scope.
    pub scope: GapScope,
    /// The heal's end: the first position that can be opened again.
    pub until: SequenceNumber,
    /// When it ended.
    pub time: PointTime,
}

/// A range of the source that could not be read. Recorded, and no obstacle to the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defect {
    /// From this position on.
    pub sequence: SequenceNumber,
    /// Which disk.
    pub disk: DiskId,
    /// Which bytes.
    pub range: ByteRange,
    /// What the device said.
    pub cause: String,
}

/// A disk's description and the position from which it holds, or behind which the disk is not protected any more
/// ([`DiskGeometry::is_removal`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeometryChange {
    /// From this position on, or behind it.
    pub sequence: SequenceNumber,
    /// The disk.
    pub geometry: DiskGeometry,
}

/// What one manifest adds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// Everything up to here is now in the vault.
    pub through: SequenceNumber,
    /// The source is proven to have written nothing else before this moment.
    pub proven_through: PointTime,
    /// How far the source's clock moved against the receiver's, in nanoseconds.
    pub skew_ns: i64,
    /// The stream's running hash at `through`, which its sender knows too; `None` if the writer does not know it, or
    /// nothing of this stream is committed yet.
    pub stream: Option<StreamHash>,
    /// Tables added.
    pub layers: Vec<LayerRef>,
    /// Positions that can be opened, in order.
    pub cuts: Vec<Cut>,
    /// Gaps that began.
    pub gaps_opened: Vec<Gap>,
    /// Gaps that heals closed.
    pub gaps_closed: Vec<GapClosed>,
    /// Ranges that could not be read.
    pub defects: Vec<Defect>,
    /// Disks that appeared or changed.
    pub geometries: Vec<GeometryChange>,
    /// Number of the last condemned list that the writer honoured. Reserved, 0.
    pub honoured_condemned: u64,
}

/// A checkpoint as later checkpoints refer to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointLink {
    /// The manifest that carries it.
    pub manifest: ManifestLink,
    /// Its place among its generation's checkpoints, from 0.
    pub index: u64,
    /// Point time of the newest cut in it or before it.
    pub last_time: PointTime,
    /// Sequence number of that cut.
    pub last_cut: SequenceNumber,
}

/// The sum of one generation's manifests from its opening up to and including the one that carries it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its place among its generation's checkpoints, from 0.
    pub index: u64,
    /// The manifests since the previous checkpoint, oldest first, without the one that carries this.
    pub covered: Vec<ManifestLink>,
    /// Layers that still count, oldest first. Those that merged layers replaced are left out.
    pub layers: Vec<LayerRef>,
    /// Gaps that the generation opened, and how they ended.
    pub gaps: Vec<Gap>,
    /// Ends of gaps that an earlier generation opened.
    pub gaps_closed: Vec<GapClosed>,
    /// Unreadable ranges that the generation recorded.
    pub defects: Vec<Defect>,
    /// Geometries that the generation recorded.
    pub geometries: Vec<GeometryChange>,
    /// Cuts since the previous checkpoint.
    pub cuts: Vec<Cut>,
    /// Earlier checkpoints, newest first, distances at most doubling: a binary search over the past.
    pub skips: Vec<CheckpointLink>,
}

/// A manifest's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its number, also in its name.
    pub number: u64,
    /// The manifest it continues. None only for genesis.
    pub parent: Option<ManifestLink>,
    /// Number of the manifest that opened its generation, and the name-key epoch in which that is named; its own for an
    /// opening.
    pub opened: (u64, NameEpoch),
    /// The name-key epoch in which every manifest behind this one is named, if it is another one. Only openings begin
    /// one: an opening takes the last name of the old epoch, so that it fences whoever wrote before.
    pub names: Option<NameSwitch>,
    /// The generation's last manifest with a checkpoint before this one.
    pub last_checkpoint: Option<CheckpointLink>,
    /// What it means.
    pub kind: ManifestKind,
    /// What it adds.
    pub delta: Delta,
    /// The sum so far, on every 64th or on request.
    pub checkpoint: Option<Box<Checkpoint>>,
}

/// A manifest as read from the store, with what its header says. Signed by a granted writer and well-formed; whether
/// it continues the chain is for the chain to judge.
#[derive(Debug, Clone)]
pub struct SignedManifest {
    /// Its exact identity.
    pub link: ManifestLink,
    /// The generation it was written under.
    pub generation: Generation,
    /// Who wrote it.
    pub writer: WriterId,
    /// On whose word it was signed.
    pub authority: Authority,
    /// Its content; layers are resolved to the objects that hold them.
    pub manifest: Manifest,
}

impl fmt::Display for GapScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GapScope::Machine => f.write_str("the whole machine"),
            GapScope::Disks(disks) => {
                let disks: Vec<String> = disks.iter().map(DiskId::to_string).collect();
                f.write_str(&disks.join(", "))
            }
            GapScope::Ranges(ranges) => {
                let ranges: Vec<String> =
                    ranges.iter().map(|(disk, range)| format!("bytes {range} of {disk}")).collect();
                f.write_str(&ranges.join(", "))
            }
        }
    }
}

impl Gap {
    /// Whether the gap hides what lies at `sequence`.
    pub fn hides(&self, sequence: SequenceNumber) -> bool {
        self.after < sequence && self.until.is_none_or(|(until, _)| sequence < until)
    }

    pub(crate) fn is_closed_by(&self, closed: &GapClosed) -> bool {
        self.until.is_none() && self.after == closed.after && self.scope == closed.scope
    }
}

impl SignedManifest {
    /// Reads manifest `number` of `chain`, named in `epoch`.
    ///
    /// # Errors
    /// [`VaultError::condemns_object`] tells whether the object is invalid for ever; other errors are no verdict.
    pub fn read(
        store: &Arc<dyn Store>,
        keys: &OpenKeys,
        names: &NumberedNames,
        chain: ChainId,
        (number, epoch): (u64, NameEpoch),
    ) -> Result<SignedManifest, VaultError> {
        let name = names.name(number, epoch)?;
        let object = ObjectReader::open_reading(store, keys, &name, limits::MANIFEST_READ_BYTES)?;
        let placement = object.header().placement;
        if placement.kind != ObjectKind::Manifest || placement.chain != chain {
            return Err(VaultError::Foreign { name, reason: "it is no manifest of this chain" });
        }
        let writer = object.header().writer;
        if keys.with_revocations(|known| known.fails_from(writer, chain)).is_some_and(|from| number >= from) {
            return Err(VaultError::Foreign { name, reason: "its writer's grant was revoked before" });
        }
        let mut manifest = decode_manifest(&object.root()?).map_err(|error| codec::refusal(&name, error))?;
        if manifest.number != number {
            return Err(object.damaged(Damage::Contradiction("it states another number than its name")));
        }
        if let Some(switch) = manifest.names
            && !keys.accepts(store, switch)?
        {
            return Err(VaultError::Foreign { name, reason: "it begins a name-key epoch that the owner never made" });
        }
        manifest.resolve_layers(&name);
        Ok(SignedManifest {
            link: ManifestLink { number, epoch, nonce: object.header().nonce, digest: object.digest() },
            generation: placement.generation,
            writer,
            authority: keys.authority(store, writer)?,
            manifest,
        })
    }

    /// Whether this manifest may follow `parent` by its shape: it names it exactly, and either continues its generation as
    /// the same writer or opens the next. `None` asks for a chain's first manifest. Whether its writer may do so, and
    /// whether the chain is closed, is for [`crate::chain::Standing`] to judge.
    pub fn continues(&self, parent: Option<&SignedManifest>) -> bool {
        let Some(parent) = parent else {
            return self.manifest.parent.is_none()
                && self.generation == Generation(1)
                && matches!(self.manifest.kind, ManifestKind::Genesis { .. })
                && self.opens_by_name(NameEpoch::FIRST);
        };
        if self.manifest.parent != Some(parent.link) {
            return false;
        }
        match self.manifest.kind {
            ManifestKind::Genesis { .. } => false,
            ManifestKind::OpenGeneration { .. } => self.opens_after(parent),
            ManifestKind::Close { .. }
            | ManifestKind::Commit { .. }
            | ManifestKind::Cancel { .. }
            | ManifestKind::HandOver => self.opens_after(parent) && self.adds_nothing(&parent.manifest.delta),
            ManifestKind::Append => {
                parent.manifest.kind.takes_appends()
                    && self.generation == parent.generation
                    && self.manifest.names.is_none()
                    && self.link.epoch == parent.names_behind()
                    && self.writer == parent.writer
                    && self.manifest.opened == parent.manifest.opened
                    && self.manifest.delta.through >= parent.manifest.delta.through
            }
        }
    }
}

impl SignedManifest {
    /// The name-key epoch in which the next manifest is named if this one counts.
    pub(crate) fn names_behind(&self) -> NameEpoch {
        self.manifest.names.map_or(self.link.epoch, |switch| switch.epoch)
    }

    /// Whether it opened its generation.
    pub(crate) fn is_opening(&self) -> bool {
        self.manifest.opened == (self.link.number, self.link.epoch)
    }

    fn opens_after(&self, parent: &SignedManifest) -> bool {
        self.generation.0 == parent.generation.0.saturating_add(1) && self.opens_by_name(parent.names_behind())
    }

    /// Whether it calls itself an opening, is named as it has to be, and begins no epoch but a later one.
    fn opens_by_name(&self, epoch: NameEpoch) -> bool {
        self.is_opening()
            && self.link.epoch == epoch
            && self.manifest.names.is_none_or(|switch| switch.follows(self.link.epoch))
    }

    /// A manifest that is only a decision repeats where the chain stands and adds no history.
    fn adds_nothing(&self, before: &Delta) -> bool {
        let nothing = Delta {
            through: before.through,
            proven_through: before.proven_through,
            skew_ns: self.manifest.delta.skew_ns,
            ..Delta::default()
        };
        self.manifest.delta == nothing && self.manifest.checkpoint.is_none()
    }
}

impl Manifest {
    pub(crate) fn resolve_layers(&mut self, name: &crate::store::ObjectName) {
        let checkpoint = self.checkpoint.iter_mut().flat_map(|checkpoint| checkpoint.layers.iter_mut());
        for layer in self.delta.layers.iter_mut().chain(checkpoint) {
            *layer = layer.clone().resolve(name);
        }
    }
}
