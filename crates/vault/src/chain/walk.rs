//! The two ways of reading a chain: all of it in order, at once or bit by bit, or its newest end and checkpoints.

use std::collections::BTreeSet;
use std::sync::Arc;

use replication::ChainId;

use super::{Alarm, ChainHistory, GenerationHistory, Standing};
use crate::error::VaultError;
use crate::keys::OpenKeys;
use crate::layer::{LayerKind, LayerRef};
use crate::limits;
use crate::manifest::{GenerationState, ManifestKind, ManifestLink, SignedManifest};
use crate::numbered::NumberedNames;
use crate::store::Store;

/// A verdict that every reader reaches alike.
pub(super) enum Judged {
    /// Well-formed and signed by a granted writer.
    Signed(Box<SignedManifest>),
    /// Damaged or foreign, for ever.
    Invalid(String),
}

/// Where a chain is read from.
pub(super) struct ChainReader<'a> {
    pub(super) store: &'a Arc<dyn Store>,
    pub(super) keys: &'a OpenKeys,
    pub(super) chain: ChainId,
    pub(super) names: NumberedNames,
}

impl<'a> ChainReader<'a> {
    pub(super) fn new(store: &'a Arc<dyn Store>, keys: &'a OpenKeys, chain: ChainId) -> ChainReader<'a> {
        ChainReader { store, keys, chain, names: NumberedNames::of_chain(&keys.shared().name, chain) }
    }

    pub(super) fn judge(&self, number: u64) -> Result<Judged, VaultError> {
        match SignedManifest::read(self.store, self.keys, &self.names, self.chain, number) {
            Ok(manifest) => Ok(Judged::Signed(Box::new(manifest))),
            Err(error) if error.condemns_object() => Ok(Judged::Invalid(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// The manifest that `link` names, or `None` if what is there is another.
    fn follow(&self, link: &ManifestLink) -> Result<Option<SignedManifest>, VaultError> {
        match self.judge(link.number) {
            Ok(Judged::Signed(manifest)) if manifest.link == *link => Ok(Some(*manifest)),
            Ok(_) | Err(VaultError::Store(crate::store::StoreError::NotFound(_))) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Reads every manifest in order. `None` if no manifest counts.
pub(super) fn complete(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    chain: ChainId,
) -> Result<Option<ChainHistory>, VaultError> {
    ChainTail::new(chain).read_on(store, keys)
}

/// Reads a chain in order and, when asked again, only what was added since. Trusts no checkpoint: what it says is what
/// [`ChainHistory::load_all`] says, except that objects below the point where it goes on are not looked at again.
#[derive(Debug, Clone)]
pub struct ChainTail {
    chain: ChainId,
    /// Number at which reading goes on: everything below it is judged for ever.
    next: u64,
    genesis: Option<SignedManifest>,
    head: Option<SignedManifest>,
    standing: Option<Standing>,
    generations: Vec<GenerationHistory>,
    superseded: Vec<LayerRef>,
    alarms: Vec<Alarm>,
}

impl ChainTail {
    /// Nothing of `chain` is read yet.
    pub fn new(chain: ChainId) -> ChainTail {
        ChainTail {
            chain,
            next: 1,
            genesis: None,
            head: None,
            standing: None,
            generations: Vec::new(),
            superseded: Vec::new(),
            alarms: Vec::new(),
        }
    }

    /// What the chain holds now; `None` if it has no manifest yet. Reading costs one page of names and one object for
    /// each manifest since the last time. After an error the next call reads on where this one got to.
    ///
    /// # Errors
    /// As [`ChainHistory::load_all`].
    pub fn read_on(&mut self, store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<Option<ChainHistory>, VaultError> {
        crate::keys::revoked::refresh(store, keys)?;
        let reader = ChainReader::new(store, keys, self.chain);
        let mut unusual = Vec::new();
        let mut present = BTreeSet::new();
        store.for_each(reader.names.folder(), |name| -> Result<bool, VaultError> {
            match reader.names.number(&name) {
                // Newest first: the rest is known.
                Some(number) if number < self.next => return Ok(false),
                Some(number) => drop(present.insert(number)),
                None => unusual.push(Alarm::Untagged(name)),
            }
            Ok(true)
        })?;
        while present.remove(&self.next) {
            let verdict = reader.judge(self.next)?;
            self.add(verdict);
            self.next += 1;
        }
        // Behind a hole nothing counts, but what claims to continue something is a sign of loss.
        for number in present {
            unusual.extend(rejected(number, &reader.judge(number)?, self.head.as_ref()));
        }
        unusual.extend(self.alarms.iter().cloned());
        let (Some(genesis), Some(head), Some(standing)) = (&self.genesis, &self.head, self.standing) else {
            return Ok(None);
        };
        let generations = self.generations.clone();
        let history = history(genesis, head, standing, self.next, generations, unusual, self.chain);
        Ok(Some(ChainHistory { superseded: self.superseded.clone(), ..history }))
    }

    fn add(&mut self, verdict: Judged) {
        let manifest = match verdict {
            Judged::Signed(manifest) if manifest.continues(self.head.as_ref()) => *manifest,
            verdict => return self.alarms.extend(rejected(self.next, &verdict, self.head.as_ref())),
        };
        let Some(standing) = Standing::after(self.standing, &manifest) else {
            return self.alarms.push(Alarm::Unauthorised { number: self.next, writer: manifest.writer });
        };
        self.standing = Some(standing);
        if manifest.manifest.opened == manifest.link.number {
            self.generations.push(GenerationHistory::opening(&manifest));
        }
        let generation = self.generations.last_mut().expect("the first manifest opens a generation");
        let added = &manifest.manifest.delta.layers;
        if added.iter().any(|layer| layer.kind == LayerKind::Merged) {
            let before: Vec<LayerRef> = generation.state.layers.iter().chain(added).cloned().collect();
            generation.add(&manifest);
            let live = &generation.state.layers;
            self.superseded.extend(before.into_iter().filter(|layer| !live.contains(layer)));
        } else {
            generation.add(&manifest);
        }
        self.genesis.get_or_insert_with(|| manifest.clone());
        self.head = Some(manifest);
    }
}

/// The alarms about an object that does not count.
fn rejected(number: u64, verdict: &Judged, head: Option<&SignedManifest>) -> Vec<Alarm> {
    match verdict {
        Judged::Invalid(reason) => vec![Alarm::Invalid { number, reason: reason.clone() }],
        Judged::Signed(manifest) => {
            let rejected = Alarm::Rejected { number, writer: manifest.writer };
            [rejected].into_iter().chain(lost_parent(manifest, head)).collect()
        }
    }
}

/// A signed manifest above the head that names a parent above the head continues something that is gone.
fn lost_parent(manifest: &SignedManifest, head: Option<&SignedManifest>) -> Option<Alarm> {
    let parent = manifest.manifest.parent?.number;
    (parent > head.map_or(0, |head| head.link.number))
        .then_some(Alarm::LostParent { number: manifest.link.number, parent })
}

/// Reads the newest end and the checkpoints. `None` if anything is unusual: then only a complete reading can tell.
pub(super) fn fast(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    chain: ChainId,
) -> Result<Option<ChainHistory>, VaultError> {
    let reader = ChainReader::new(store, keys, chain);
    let page = store.list(reader.names.folder(), None, limits::INVALID_AT_HEAD_MAX + 1)?;
    let mut alarms = Vec::new();
    let mut burnt = Vec::new();
    let mut head = None;
    let mut expected = None;
    for name in page {
        let Some(number) = reader.names.number(&name) else {
            alarms.push(Alarm::Untagged(name));
            continue;
        };
        if expected.is_some_and(|expected| expected != number) {
            return Ok(None);
        }
        expected = Some(number - 1);
        match reader.judge(number)? {
            Judged::Signed(manifest) => {
                head = Some(manifest);
                break;
            }
            Judged::Invalid(reason) => burnt.push(Alarm::Invalid { number, reason }),
        }
    }
    let Some(head) = head else { return Ok(None) };
    let next_number = head.link.number + 1 + burnt.len() as u64;
    alarms.extend(burnt.into_iter().rev());

    let mut generations = Vec::new();
    let mut openings: Vec<SignedManifest> = Vec::new();
    let mut last = (*head).clone();
    let genesis = loop {
        let Some((generation, opening)) = one_generation(&reader, &last, &mut alarms)? else { return Ok(None) };
        generations.insert(0, generation);
        openings.insert(0, opening.clone());
        match opening.manifest.parent {
            None if opening.continues(None) && none_between(&reader, 0, opening.link.number, &mut alarms)? => {
                break opening;
            }
            None => return Ok(None),
            Some(parent) => {
                let Some(before) = reader.follow(&parent)? else { return Ok(None) };
                if !opening.continues(Some(&before))
                    || !none_between(&reader, parent.number, opening.link.number, &mut alarms)?
                {
                    return Ok(None);
                }
                last = before;
            }
        }
    };
    // Appends are by the writer of their opening, so the openings tell whose turn it was.
    let mut standing = None;
    for opening in &openings {
        standing = Standing::after(standing, opening);
        if standing.is_none() {
            return Ok(None);
        }
    }
    Ok(standing.map(|standing| history(&genesis, &head, standing, next_number, generations, alarms, chain)))
}

/// Reads the generation that ends with `last`: back to its last checkpoint, or to its opening. Returns it with its
/// opening manifest.
fn one_generation(
    reader: &ChainReader<'_>,
    last: &SignedManifest,
    alarms: &mut Vec<Alarm>,
) -> Result<Option<(GenerationHistory, SignedManifest)>, VaultError> {
    let mut tail = vec![last.clone()];
    let opening = loop {
        let oldest = tail.last().expect("begins with one");
        if oldest.manifest.opened == oldest.link.number {
            break oldest.clone();
        }
        if oldest.manifest.checkpoint.is_some() {
            // The generation's own writer vouches for what lies between its opening and its checkpoint.
            let Judged::Signed(opening) = reader.judge(oldest.manifest.opened)? else { return Ok(None) };
            let opens =
                matches!(opening.manifest.kind, ManifestKind::Genesis { .. } | ManifestKind::OpenGeneration { .. });
            if !opens || opening.generation != last.generation || opening.writer != last.writer {
                return Ok(None);
            }
            break *opening;
        }
        let Some(parent) = oldest.manifest.parent else { return Ok(None) };
        let Some(before) = reader.follow(&parent)? else { return Ok(None) };
        if !oldest.continues(Some(&before)) || !none_between(reader, parent.number, oldest.link.number, alarms)? {
            return Ok(None);
        }
        tail.push(before);
    };
    let mut generation = GenerationHistory::opening(&opening);
    for manifest in tail.iter().rev() {
        match &manifest.manifest.checkpoint {
            Some(checkpoint) if manifest.link == tail.last().expect("not empty").link => {
                generation.state = GenerationState::from_checkpoint(manifest.link, checkpoint);
                generation.last = manifest.link;
                generation.through = manifest.manifest.delta.through;
            }
            _ => generation.add(manifest),
        }
    }
    Ok(Some((generation, opening)))
}

/// Whether the numbers between two linked manifests, if there are any, are burnt by invalid objects. A signed
/// manifest there could count instead of the later one.
fn none_between(
    reader: &ChainReader<'_>,
    before: u64,
    after: u64,
    alarms: &mut Vec<Alarm>,
) -> Result<bool, VaultError> {
    for number in before + 1..after {
        match reader.judge(number) {
            Ok(Judged::Invalid(reason)) => alarms.push(Alarm::Invalid { number, reason }),
            Ok(Judged::Signed(_)) | Err(VaultError::Store(crate::store::StoreError::NotFound(_))) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn history(
    genesis: &SignedManifest,
    head: &SignedManifest,
    standing: Standing,
    next_number: u64,
    generations: Vec<GenerationHistory>,
    alarms: Vec<Alarm>,
    chain: ChainId,
) -> ChainHistory {
    let ManifestKind::Genesis { machine, parent } = genesis.manifest.kind else {
        unreachable!("a chain's first manifest is its genesis: SignedManifest::continues has checked")
    };
    ChainHistory {
        chain,
        machine,
        parent,
        head: head.link,
        next_number,
        through: head.manifest.delta.through,
        proven_through: head.manifest.delta.proven_through,
        skew_ns: head.manifest.delta.skew_ns,
        standing,
        superseded: Vec::new(),
        generations,
        alarms,
    }
}
