//! The two ways of reading a chain: all of it in order, at once or bit by bit, or its newest end and checkpoints.

use std::collections::BTreeSet;
use std::sync::Arc;

use replication::ChainId;

use super::{Alarm, ChainHistory, GenerationHistory, Standing};
use crate::error::VaultError;
use crate::keys::{Authority, NameEpoch, OpenKeys, WriterRole, revoked};
use crate::layer::LayerRef;
use crate::limits;
use crate::manifest::{GenerationState, ManifestKind, ManifestLink, SignedManifest};
use crate::numbered::NumberedNames;
use crate::store::{Store, StoreError};

/// A verdict that every reader reaches alike.
pub(super) enum Judged {
    /// Well-formed and signed by a granted writer.
    Signed(Box<SignedManifest>),
    /// Damaged or foreign, for ever.
    Invalid(String),
}

/// Where a chain is read from.
pub(super) struct ChainReader<'a> {
    store: &'a Arc<dyn Store>,
    keys: &'a OpenKeys,
    chain: ChainId,
    names: NumberedNames,
}

impl<'a> ChainReader<'a> {
    pub(super) fn new(store: &'a Arc<dyn Store>, keys: &'a OpenKeys, chain: ChainId) -> ChainReader<'a> {
        ChainReader { store, keys, chain, names: NumberedNames::of_chain(keys, chain) }
    }

    pub(super) fn judge(&self, number: u64, epoch: NameEpoch) -> Result<Judged, VaultError> {
        match SignedManifest::read(self.store, self.keys, &self.names, self.chain, (number, epoch)) {
            Ok(manifest) => Ok(Judged::Signed(Box::new(manifest))),
            Err(error) if error.condemns_object() => Ok(Judged::Invalid(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// The signed manifest of that number; `None` if there is none. The number and the epoch are somebody's word.
    fn find(&self, number: u64, epoch: NameEpoch) -> Result<Option<SignedManifest>, VaultError> {
        if !self.names.has(epoch) {
            return Ok(None);
        }
        match self.judge(number, epoch) {
            Ok(Judged::Signed(manifest)) => Ok(Some(*manifest)),
            Ok(Judged::Invalid(_)) | Err(VaultError::Store(StoreError::NotFound(_))) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The manifest that `link` names, or `None` if what is there is another.
    fn follow(&self, link: &ManifestLink) -> Result<Option<SignedManifest>, VaultError> {
        Ok(self.find(link.number, link.epoch)?.filter(|manifest| manifest.link == *link))
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
    /// Number at which reading goes on, and the epoch in which it is named: everything below it is judged for ever.
    next: u64,
    epoch: NameEpoch,
    genesis: Option<SignedManifest>,
    head: Option<SignedManifest>,
    standing: Option<Standing>,
    generations: Vec<GenerationHistory>,
    superseded: Vec<LayerRef>,
    /// Well-formed manifests that do not count: what continues them is no sign of loss.
    refused: Vec<ManifestLink>,
    alarms: Vec<Alarm>,
}

/// Numbers with the epochs in which they are named.
type Places = BTreeSet<(u64, NameEpoch)>;

impl ChainTail {
    /// Nothing of `chain` is read yet.
    pub fn new(chain: ChainId) -> ChainTail {
        ChainTail {
            chain,
            next: 1,
            epoch: NameEpoch::FIRST,
            genesis: None,
            head: None,
            standing: None,
            generations: Vec::new(),
            superseded: Vec::new(),
            refused: Vec::new(),
            alarms: Vec::new(),
        }
    }

    /// What the chain holds now; `None` if it has no manifest yet. Reading costs one page of names and one object for
    /// each manifest since the last time. After an error the next call reads on where this one got to.
    ///
    /// # Errors
    /// As [`ChainHistory::load_all`].
    pub fn read_on(&mut self, store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<Option<ChainHistory>, VaultError> {
        revoked::refresh(store, keys)?;
        let mut alarms = loop {
            let reader = ChainReader::new(store, keys, self.chain);
            let (mut present, mut alarms) = self.names_from_next(&reader)?;
            while present.remove(&(self.next, self.epoch)) {
                let verdict = reader.judge(self.next, self.epoch)?;
                self.add(verdict);
                self.next += 1;
            }
            // An opening that is newer than what was read of the catalog leads to names that looked like a stranger's.
            if reader.names.has(self.epoch) {
                for (number, epoch) in present {
                    alarms.extend(self.left_over(&reader, number, epoch)?);
                }
                break alarms;
            }
        };
        alarms.extend(self.alarms.iter().cloned());
        let (Some(genesis), Some(head), Some(standing)) = (&self.genesis, &self.head, self.standing) else {
            return Ok(None);
        };
        let generations = self.generations.clone();
        let history = history(genesis, head, standing, self.next, generations, alarms, self.chain);
        Ok(Some(ChainHistory { superseded: self.superseded.clone(), ..history }))
    }

    /// The places from the next number on that are taken, in whatever epoch, and what has no place.
    fn names_from_next(&self, reader: &ChainReader<'_>) -> Result<(Places, Vec<Alarm>), VaultError> {
        let (mut present, mut alarms) = (Places::new(), Vec::new());
        reader.store.for_each(reader.names.folder(), |name| -> Result<bool, VaultError> {
            match reader.names.number(&name) {
                // Newest first: the rest is known.
                Some((number, _)) if number < self.next => return Ok(false),
                Some(place) => drop(present.insert(place)),
                None => alarms.push(Alarm::Untagged(name)),
            }
            Ok(true)
        })?;
        Ok((present, alarms))
    }

    /// What to say of an object that is not where the chain goes on.
    fn left_over(&self, reader: &ChainReader<'_>, number: u64, epoch: NameEpoch) -> Result<Vec<Alarm>, VaultError> {
        let behind_a_hole = epoch == self.epoch && number > self.next;
        if behind_a_hole {
            return Ok(self.rejected(number, &reader.judge(number, epoch)?));
        }
        let mut alarms = vec![Alarm::WrongEpoch { number, epoch }];
        // A name of an epoch that the chain never reached: the opening that led there may be gone.
        if epoch > self.epoch
            && let Judged::Signed(manifest) = reader.judge(number, epoch)?
        {
            alarms.extend(self.lost_parent(&manifest));
        }
        Ok(alarms)
    }

    fn add(&mut self, verdict: Judged) {
        let manifest = match verdict {
            Judged::Signed(manifest) if manifest.continues(self.head.as_ref()) => *manifest,
            verdict => {
                self.alarms.extend(self.rejected(self.next, &verdict));
                if let Judged::Signed(manifest) = verdict {
                    self.refused.push(manifest.link);
                }
                return;
            }
        };
        let Some(standing) = Standing::after(self.standing, &manifest) else {
            self.refused.push(manifest.link);
            return self.alarms.push(Alarm::Unauthorised { number: self.next, writer: manifest.writer });
        };
        self.standing = Some(standing);
        self.epoch = manifest.names_behind();
        if manifest.is_opening() {
            self.generations.push(GenerationHistory::opening(&manifest));
        }
        let generation = self.generations.last_mut().expect("the first manifest that continues a chain opens it");
        self.superseded.extend(generation.add(&manifest));
        self.genesis.get_or_insert_with(|| manifest.clone());
        self.head = Some(manifest);
    }

    /// The alarms about an object that does not count and burns its number.
    fn rejected(&self, number: u64, verdict: &Judged) -> Vec<Alarm> {
        match verdict {
            Judged::Invalid(reason) => vec![Alarm::Invalid { number, reason: reason.clone() }],
            Judged::Signed(manifest) => {
                let rejected = Alarm::Rejected { number, writer: manifest.writer };
                [rejected].into_iter().chain(self.lost_parent(manifest)).collect()
            }
        }
    }

    /// A signed manifest that names a parent above the head continues something that is gone; unless its parent was read
    /// and refused, or its writer could never have continued such a chain and may say what it likes.
    fn lost_parent(&self, manifest: &SignedManifest) -> Option<Alarm> {
        let parent = manifest.manifest.parent?;
        let of_machine = self
            .genesis
            .as_ref()
            .is_some_and(|genesis| matches!(genesis.manifest.kind, ManifestKind::Genesis { parent: None, .. }));
        let outsider = match manifest.authority {
            Authority::Granted(WriterRole::BranchHost) => of_machine,
            Authority::Granted(WriterRole::Maintenance) => true,
            Authority::Granted(WriterRole::ProcessServer | WriterRole::Operator) | Authority::Owner => false,
        };
        let above = parent.number > self.head.as_ref().map_or(0, |head| head.link.number);
        (above && !outsider && !self.refused.contains(&parent))
            .then_some(Alarm::LostParent { number: manifest.link.number, parent: parent.number })
    }
}

/// Reads the newest end and the checkpoints. `None` if anything is unusual: then only a complete reading can tell.
pub(super) fn fast(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    chain: ChainId,
) -> Result<Option<ChainHistory>, VaultError> {
    let reader = ChainReader::new(store, keys, chain);
    let Some((head, next_number, mut alarms)) = newest_end(&reader)? else { return Ok(None) };
    let mut generations = Vec::new();
    let mut openings: Vec<SignedManifest> = Vec::new();
    let mut last = head.clone();
    let genesis = loop {
        let Some((generation, opening)) = one_generation(&reader, &last, &mut alarms)? else { return Ok(None) };
        generations.insert(0, generation);
        openings.insert(0, opening.clone());
        match opening.manifest.parent {
            None if opening.continues(None)
                && none_between(&reader, (0, NameEpoch::FIRST), opening.link.number, &mut alarms)? =>
            {
                break opening;
            }
            None => return Ok(None),
            Some(parent) => {
                let Some(before) = reader.follow(&parent)? else { return Ok(None) };
                let place = (parent.number, before.names_behind());
                if !opening.continues(Some(&before)) || !none_between(&reader, place, opening.link.number, &mut alarms)?
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

/// The newest signed manifest, the next number, and the alarms about what lies above it.
///
/// Whoever holds the key of the newest epoch that a page of names shows is trusted so far: names of older epochs above the
/// head are a revoked writer's, and are not even read.
fn newest_end(reader: &ChainReader<'_>) -> Result<Option<(SignedManifest, u64, Vec<Alarm>)>, VaultError> {
    let places = |limit| -> Result<Vec<_>, VaultError> {
        let page = reader.store.list(reader.names.folder(), None, limit)?;
        Ok(page.into_iter().map(|name| (reader.names.number(&name), name)).collect())
    };
    let newest =
        |page: &[(Option<(u64, NameEpoch)>, _)]| page.iter().filter_map(|(place, _)| Some(place.as_ref()?.1)).max();
    let mut page = places(limits::INVALID_AT_HEAD_MAX + 1)?;
    if newest(&page) != Some(reader.names.newest()) {
        // The chain has not come to the newest epoch yet, or many names of older ones hide it.
        page = places(limits::LIST_PAGE)?;
    }
    let Some(epoch) = newest(&page) else { return Ok(None) };
    let (mut alarms, mut burnt, mut expected) = (Vec::new(), Vec::new(), None);
    for (place, name) in page {
        let number = match place {
            Some((number, named)) if named == epoch => number,
            Some((number, epoch)) => {
                alarms.push(Alarm::WrongEpoch { number, epoch });
                continue;
            }
            None => {
                alarms.push(Alarm::Untagged(name));
                continue;
            }
        };
        if expected.is_some_and(|expected| expected != number) || burnt.len() == limits::INVALID_AT_HEAD_MAX {
            return Ok(None);
        }
        expected = Some(number.saturating_sub(1));
        match reader.judge(number, epoch)? {
            Judged::Signed(head) => {
                let leads_on = head.names_behind() != epoch;
                if leads_on && (!burnt.is_empty() || !reader.names.has(head.names_behind())) {
                    return Ok(None);
                }
                let next_number = head.link.number + 1 + burnt.len() as u64;
                alarms.extend(burnt.into_iter().rev());
                return Ok(Some((*head, next_number, alarms)));
            }
            Judged::Invalid(reason) => burnt.push(Alarm::Invalid { number, reason }),
        }
    }
    Ok(None)
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
        if oldest.is_opening() {
            break oldest.clone();
        }
        if oldest.manifest.checkpoint.is_some() {
            // The generation's own writer vouches for what lies between its opening and its checkpoint.
            let (number, epoch) = oldest.manifest.opened;
            let Some(opening) = reader.find(number, epoch)? else { return Ok(None) };
            let opens =
                matches!(opening.manifest.kind, ManifestKind::Genesis { .. } | ManifestKind::OpenGeneration { .. });
            if !opens
                || !opening.is_opening()
                || opening.names_behind() != oldest.link.epoch
                || opening.generation != last.generation
                || opening.writer != last.writer
            {
                return Ok(None);
            }
            break opening;
        }
        let Some(parent) = oldest.manifest.parent else { return Ok(None) };
        let Some(before) = reader.follow(&parent)? else { return Ok(None) };
        let place = (parent.number, before.names_behind());
        if !oldest.continues(Some(&before)) || !none_between(reader, place, oldest.link.number, alarms)? {
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
                generation.stream = manifest.manifest.delta.stream;
            }
            _ => drop(generation.add(manifest)),
        }
    }
    Ok(Some((generation, opening)))
}

/// Whether the numbers between two linked manifests, if there are any, are burnt by invalid objects; `epoch` is the one in
/// which they are named. A signed manifest there could count instead of the later one.
fn none_between(
    reader: &ChainReader<'_>,
    (before, epoch): (u64, NameEpoch),
    after: u64,
    alarms: &mut Vec<Alarm>,
) -> Result<bool, VaultError> {
    for number in before + 1..after {
        match reader.judge(number, epoch) {
            Ok(Judged::Invalid(reason)) => alarms.push(Alarm::Invalid { number, reason }),
            Ok(Judged::Signed(_)) | Err(VaultError::Store(StoreError::NotFound(_))) => return Ok(false),
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
        name_epoch: head.names_behind(),
        through: head.manifest.delta.through,
        proven_through: head.manifest.delta.proven_through,
        skew_ns: head.manifest.delta.skew_ns,
        standing,
        superseded: Vec::new(),
        generations,
        alarms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{ChainWriter, CheckpointWish};
    use crate::keys::NameSwitch;
    use crate::manifest::{Delta, Manifest, encode_manifest};
    use crate::object::{Compression, FrameClass, ObjectBuilder, ObjectKind, Placement};
    use crate::view_fixture::Fixture;
    use replication::{Generation, MachineId, SequenceNumber};

    /// Puts a manifest that no program of ours makes, signed by somebody who may sign.
    fn forge(fixture: &Fixture, generation: u32, manifest: &Manifest) {
        let placement = Placement::on_chain(ObjectKind::Manifest, fixture.chain, Generation(generation));
        let names = NumberedNames::of_chain(&fixture.reader, fixture.chain);
        let name = names.name(manifest.number, NameEpoch::FIRST).expect("the first key");
        let mut object = ObjectBuilder::new(&fixture.session, placement, name);
        let root = object.add(FrameClass::Index, &encode_manifest(manifest), Compression::None).expect("it fits");
        object.finish(Some(root)).put(fixture.store.as_ref()).expect("the name is free");
    }

    fn begun(fixture: &Fixture) -> ChainWriter {
        let genesis = (MachineId([1; 16]), None);
        ChainWriter::create(&fixture.store, &fixture.session, &fixture.reader, fixture.chain, genesis, Delta::default())
            .expect("create")
    }

    fn both(fixture: &Fixture) -> [Option<ChainHistory>; 2] {
        [
            ChainHistory::find(&fixture.store, &fixture.reader, fixture.chain).expect("find"),
            complete(&fixture.store, &fixture.reader, fixture.chain).expect("complete"),
        ]
    }

    fn opening(number: u64, parent: Option<ManifestLink>) -> Manifest {
        Manifest {
            number,
            parent,
            opened: (number, NameEpoch::FIRST),
            names: None,
            last_checkpoint: None,
            kind: ManifestKind::OpenGeneration { reason: "forged".into(), base: SequenceNumber(0) },
            delta: Delta::default(),
            checkpoint: None,
        }
    }

    #[test]
    fn an_opening_leads_only_into_epochs_that_the_owner_made() {
        for epoch in [0, 1, 7, u32::MAX] {
            let fixture = Fixture::new();
            let mut writer = begun(&fixture);
            let switch = NameSwitch { epoch: NameEpoch(epoch), check: [1; 16] };
            forge(&fixture, 2, &Manifest { names: Some(switch), ..opening(2, Some(writer.head())) });
            for history in both(&fixture).into_iter().flatten() {
                assert_eq!((history.head, history.next_number), (writer.head(), 3), "epoch {epoch}");
                assert_eq!(history.name_epoch, NameEpoch::FIRST);
            }
            // And whoever was writing is not stopped by it.
            writer.commit(CheckpointWish::Now, |_| Ok(Delta::default())).expect("it goes on");
            assert_eq!(both(&fixture).map(|history| history.expect("it is there").head), [writer.head(); 2]);
        }
    }

    #[test]
    fn what_a_granted_writer_may_sign_is_answered() {
        // A genesis that does not call itself an opening.
        let fixture = Fixture::new();
        let kind = ManifestKind::Genesis { machine: MachineId([1; 16]), parent: None };
        forge(&fixture, 1, &Manifest { opened: (7, NameEpoch(3)), kind, ..opening(1, None) });
        assert!(both(&fixture).iter().all(Option::is_none));
        // Numbers at the ends, and epochs that nobody made in what should be links.
        let fixture = Fixture::new();
        let mut writer = begun(&fixture);
        let lost = ManifestLink { number: u64::MAX, epoch: NameEpoch(77), ..writer.head() };
        forge(&fixture, 2, &opening(0, Some(lost)));
        let append = Manifest { kind: ManifestKind::Append, opened: (1, NameEpoch(77)), ..opening(2, Some(lost)) };
        forge(&fixture, 1, &append);
        let [fast, slow] = both(&fixture).map(|history| history.expect("it is there"));
        assert_eq!((fast.head, slow.head, slow.next_number), (writer.head(), writer.head(), 3));
        // Such a manifest claims to continue what is gone: somebody has to look before anybody writes over it.
        assert!(slow.alarms.contains(&Alarm::LostParent { number: 2, parent: u64::MAX }), "{:?}", slow.alarms);
        writer.commit(CheckpointWish::Now, |_| Ok(Delta::default())).expect("who is writing goes on");
        let checkpoint = Manifest {
            kind: ManifestKind::Append,
            opened: (1, NameEpoch(77)),
            checkpoint: Some(Box::default()),
            ..opening(4, Some(writer.head()))
        };
        forge(&fixture, 1, &checkpoint);
        assert_eq!(both(&fixture).map(|history| history.expect("it is there").head), [writer.head(); 2]);
    }
}
