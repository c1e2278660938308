//! Chains: which manifests count, what they add up to, and who writes the next one.
//!
//! Manifest *n* counts if it is the first, from number 1 on and without a hole, that names the last counting one as its
//! parent, either continues its generation as the same writer or opens the next, and comes from somebody whose turn it
//! is ([`Standing`]). Objects that do not count burn
//! their number, are reported as [`Alarm`]s, and are never deleted: a sleeping writer would try that very name.
//!
//! A chain says itself in which epoch of the name key each number is named: it begins in the first, and an opening may
//! lead into a later one, from the number behind it on. The opening's own name is of the old epoch, because that is the
//! name which decides between it and the writer before. Names of any other epoch burn nothing.
//!
//! [`ChainHistory::load`] reads a chain without reading all of it, by trusting a writer's checkpoints for that writer's
//! own generation. [`ChainHistory::load_all`] trusts nothing but the manifests themselves; both give the same answer,
//! and so does [`ChainTail`], which reads on where it stopped.

mod control;
mod standing;
mod walk;
mod writer;

use std::sync::Arc;

use replication::{ChainId, Generation, MachineId, PointTime, Position, SequenceNumber, StreamHash};

use crate::error::VaultError;
use crate::keys::{NameEpoch, ObjectNonce, OpenKeys, WriterId};
use crate::layer::{LayerKind, LayerRef};
use crate::layout;
use crate::manifest::{Defect, Gap, GenerationState, GeometryChange, ManifestKind, ManifestLink, SignedManifest};
use crate::numbered::NumberedNames;
use crate::store::{ObjectName, Store};

pub use control::ChainControl;
pub use standing::{Closed, Holder, Phase, Standing};
pub use walk::ChainTail;
pub(crate) use writer::cut_text;
pub use writer::{ChainWriter, CheckpointWish, ManifestBuilder, PreparedManifest};

/// Something in a chain's folder that does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alarm {
    /// Not a manifest's name: someone without the name key put it there.
    Untagged(ObjectName),
    /// A manifest's name under a name key that is not in use at that number: made by a writer whose grant has ended. It burns
    /// nothing.
    WrongEpoch {
        /// The number.
        number: u64,
        /// The epoch of the key.
        epoch: NameEpoch,
    },
    /// A manifest's name holding something that is damaged or not from a granted writer. Its number is burnt.
    Invalid {
        /// The burnt number.
        number: u64,
        /// What is wrong.
        reason: String,
    },
    /// A well-formed manifest that does not continue the chain, such as a stale writer's. Its number is burnt.
    Rejected {
        /// The burnt number.
        number: u64,
        /// Who wrote it.
        writer: WriterId,
    },
    /// A manifest continues the chain, and its writer's grant does not allow that: a branch host on a machine's chain, or
    /// anybody on a closed one. Its number is burnt.
    Unauthorised {
        /// The burnt number.
        number: u64,
        /// Who wrote it.
        writer: WriterId,
    },
    /// A well-formed manifest continues one that is damaged or missing: history was lost. Until somebody has looked,
    /// nobody may write: a new generation would bury what another copy of the vault may still have.
    LostParent {
        /// The manifest that cannot be reached.
        number: u64,
        /// The damaged or missing one.
        parent: u64,
    },
}

/// One writer session of a chain.
#[derive(Debug, Clone)]
pub struct GenerationHistory {
    /// Which.
    pub generation: Generation,
    /// Its writer.
    pub writer: WriterId,
    /// Number of its first manifest.
    pub opened: u64,
    /// Why it was opened; `None` for a chain's first.
    pub reason: Option<String>,
    /// Its newest manifest.
    pub last: ManifestLink,
    /// Everything it committed.
    pub through: SequenceNumber,
    /// The stream's running hash there, if its writer knew it.
    pub stream: Option<StreamHash>,
    /// What its manifests add up to.
    pub state: GenerationState,
}

/// What a chain holds.
#[derive(Debug, Clone)]
pub struct ChainHistory {
    /// Which chain.
    pub chain: ChainId,
    /// The machine whose disks it holds.
    pub machine: MachineId,
    /// For a branch: the position below it.
    pub parent: Option<Position>,
    /// The newest manifest that counts.
    pub head: ManifestLink,
    /// Number of the next manifest: the head's, plus one, plus one per burnt number behind it.
    pub next_number: u64,
    /// The name-key epoch in which the next manifest is named.
    pub name_epoch: NameEpoch,
    /// Everything committed.
    pub through: SequenceNumber,
    /// The source is proven to have written nothing else before this moment.
    pub proven_through: PointTime,
    /// Skew of the source's clock at the head, in nanoseconds.
    pub skew_ns: i64,
    /// Who may write next, and what.
    pub standing: Standing,
    /// The generations, oldest first; never empty.
    pub generations: Vec<GenerationHistory>,
    /// Tables that merged ones replaced: they lie in the store, and nothing needs them. Only
    /// [`ChainHistory::load_all`] knows them.
    pub superseded: Vec<LayerRef>,
    /// What does not count, of what was seen. A complete list comes from [`ChainHistory::load_all`].
    pub alarms: Vec<Alarm>,
}

impl ChainHistory {
    /// Reads what `chain` holds: one page of a listing, the head, and per generation at most one checkpoint and the
    /// manifests since.
    ///
    /// # Errors
    /// [`VaultError::WrongChainState`] if there is no such chain; [`VaultError::NewerFormat`] if a newer program wrote
    /// to it; errors of the store.
    pub fn load(store: &Arc<dyn Store>, keys: &OpenKeys, chain: ChainId) -> Result<ChainHistory, VaultError> {
        ChainHistory::find(store, keys, chain)?.ok_or(no_such_chain(chain))
    }

    /// As [`ChainHistory::load`]; `None` if the chain has no manifest yet. The catalog names a machine's chain before
    /// the chain exists, so that a crash in between leaves no chain that nobody knows.
    ///
    /// # Errors
    /// As [`ChainHistory::load`].
    pub fn find(store: &Arc<dyn Store>, keys: &OpenKeys, chain: ChainId) -> Result<Option<ChainHistory>, VaultError> {
        crate::keys::revoked::refresh(store, keys)?;
        walk::fast(store, keys, chain)?.map_or_else(|| walk::complete(store, keys, chain), |found| Ok(Some(found)))
    }

    /// As [`ChainHistory::load`], reading every manifest and trusting no checkpoint.
    ///
    /// # Errors
    /// As [`ChainHistory::load`].
    pub fn load_all(store: &Arc<dyn Store>, keys: &OpenKeys, chain: ChainId) -> Result<ChainHistory, VaultError> {
        walk::complete(store, keys, chain)?.ok_or(no_such_chain(chain))
    }

    /// The newest generation.
    pub fn generation(&self) -> &GenerationHistory {
        self.generations.last().expect("a chain has a generation")
    }

    /// The newest position whose stream hash is known, and that hash. Positions of one stream are never given again to
    /// another, so whoever sent it and knows the hash there can compare.
    pub fn stream(&self) -> Option<(SequenceNumber, StreamHash)> {
        self.generations.iter().rev().find_map(|generation| Some((generation.through, generation.stream?)))
    }

    /// All layers that count, newest first: by their largest sequence number, images of equal number last.
    pub fn layers(&self) -> Vec<LayerRef> {
        let mut layers: Vec<LayerRef> =
            self.generations.iter().flat_map(|generation| generation.state.layers.iter().cloned()).collect();
        layers.sort_by_key(|layer| std::cmp::Reverse((layer.last, layer.kind != LayerKind::Image)));
        layers
    }

    /// All gaps, by position, with the ends that later generations recorded.
    pub fn gaps(&self) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = Vec::new();
        for generation in &self.generations {
            for closed in &generation.state.gaps_closed {
                if let Some(gap) = gaps.iter_mut().find(|gap| gap.is_closed_by(closed)) {
                    gap.until = Some((closed.until, closed.time));
                }
            }
            gaps.extend(generation.state.gaps.iter().cloned());
        }
        gaps.sort_by(|a, b| (a.after, &a.scope).cmp(&(b.after, &b.scope)));
        // A suspicion is said until it is known to be noted: a server that took over in between has noted it again.
        let end = |gap: &Gap| gap.until.map(|(until, _)| until);
        gaps.dedup_by(|a, b| (a.after, &a.scope) == (b.after, &b.scope) && end(a) == end(b) && a.until.is_some());
        gaps
    }

    /// All recorded geometries, oldest first.
    pub fn geometries(&self) -> Vec<GeometryChange> {
        self.generations.iter().flat_map(|generation| generation.state.geometries.iter().cloned()).collect()
    }

    /// The disks as they are at `sequence`, by id. Those that were taken out of protection before are not among them.
    pub fn geometry_at(&self, sequence: SequenceNumber) -> Vec<replication::DiskGeometry> {
        let mut disks = std::collections::BTreeMap::new();
        for change in self.geometries() {
            // A removal is behind its position: the points up to there have the disk.
            if change.geometry.is_removal() && change.sequence < sequence {
                disks.remove(&change.geometry.disk);
            } else if !change.geometry.is_removal() && change.sequence <= sequence {
                disks.insert(change.geometry.disk, change.geometry);
            }
        }
        disks.into_values().collect()
    }

    /// All unreadable ranges, oldest first.
    pub fn defects(&self) -> Vec<Defect> {
        self.generations.iter().flat_map(|generation| generation.state.defects.iter().cloned()).collect()
    }

    /// The newest openable cut of any generation.
    pub fn last_cut(&self) -> Option<(SequenceNumber, PointTime)> {
        self.generations.iter().rev().find_map(|generation| generation.state.last_cut)
    }

    /// Whether the manifest that a writer was about to put, when it lost the answer or its life, is part of the chain.
    ///
    /// # Errors
    /// Those of the store.
    pub fn contains(
        &self,
        store: &Arc<dyn Store>,
        keys: &OpenKeys,
        number: u64,
        nonce: ObjectNonce,
    ) -> Result<bool, VaultError> {
        if number > self.head.number {
            return Ok(false);
        }
        // A burnt number may hold one's own nonce too: the manifest that was refused. Only the chain knows.
        let names = NumberedNames::of_chain(keys, self.chain);
        let mut link = Some(self.head);
        for generation in self.generations.iter().rev() {
            if number < generation.opened {
                continue;
            }
            let known = generation.state.since_checkpoint.iter().chain([&generation.last]);
            if let Some(found) = known.clone().find(|known| known.number == number) {
                return Ok(found.nonce == nonce);
            }
            link = generation.state.last_checkpoint().map(|link| link.manifest);
            break;
        }
        while let Some(current) = link.filter(|link| link.number >= number) {
            if current.number == number {
                return Ok(current.nonce == nonce);
            }
            let place = (current.number, current.epoch);
            link = SignedManifest::read(store, keys, &names, self.chain, place)?.manifest.parent;
        }
        Ok(false)
    }
}

fn no_such_chain(chain: ChainId) -> VaultError {
    VaultError::WrongChainState { chain, reason: "there is no such chain in this vault" }
}

/// All chains that have a folder in the vault, in the order of their ids.
///
/// # Errors
/// Those of the store.
pub fn list_chains(store: &dyn Store) -> Result<Vec<ChainId>, VaultError> {
    let mut chains: Vec<ChainId> = Vec::new();
    let mut after: Option<ObjectName> = None;
    let mut seen = String::new();
    loop {
        // One name per chain, then jump over its folder; what strangers put behind the jump is passed one by one.
        let page = store.list(layout::CHAINS, after.as_ref(), 1)?;
        let Some(name) = page.into_iter().next() else { return Ok(chains) };
        let folder = name.as_str()[layout::CHAINS.len()..].split('/').next().unwrap_or_default().to_owned();
        if folder == seen {
            after = Some(name);
            continue;
        }
        chains.extend(folder.parse::<ChainId>().ok());
        after = ObjectName::new(format!("{}{folder}/zzzz", layout::CHAINS)).ok().or(Some(name));
        seen = folder;
    }
}

impl GenerationHistory {
    fn opening(manifest: &SignedManifest) -> GenerationHistory {
        GenerationHistory {
            generation: manifest.generation,
            writer: manifest.writer,
            opened: manifest.manifest.opened.0,
            reason: match &manifest.manifest.kind {
                ManifestKind::OpenGeneration { reason, .. } => Some(reason.clone()),
                ManifestKind::Close { reason, .. } => Some(format!("closed: {reason}")),
                ManifestKind::Commit { .. } => Some("the failover was committed".into()),
                ManifestKind::Cancel { reason, .. } => Some(format!("the failover was cancelled: {reason}")),
                ManifestKind::HandOver => Some("the branch came home".into()),
                ManifestKind::Genesis { .. } | ManifestKind::Append => None,
            },
            last: manifest.link,
            through: manifest.manifest.delta.through,
            stream: manifest.manifest.delta.stream,
            state: GenerationState::default(),
        }
    }

    /// Adds a manifest. Returns the layers that merged ones replaced.
    fn add(&mut self, manifest: &SignedManifest) -> Vec<LayerRef> {
        self.last = manifest.link;
        self.through = manifest.manifest.delta.through;
        self.stream = manifest.manifest.delta.stream;
        self.state.apply(manifest.link, &manifest.manifest)
    }
}
