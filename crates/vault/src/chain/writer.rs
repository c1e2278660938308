//! The one writer of a chain: wins its next name, again and again, until somebody else does.
//!
//! ```text
//! begin ─► fill (frames, layers) ─► prepare ─► [journal number and nonce] ─► put ─┬─► committed
//!                                                 ▲             retry same bytes ─┤
//!                                                 └── number burnt: begin again ──┼─► fenced: final
//! ```
//! A crash leaves either nothing or a complete manifest. The journaled nonce tells which, see
//! [`ChainHistory::contains`].

use std::sync::Arc;

use replication::{ChainId, Generation, MachineId, PointTime, Position, SequenceNumber, StreamHash};

use super::walk::{ChainReader, Judged};
use super::{Alarm, ChainHistory, Standing};
use crate::error::VaultError;
use crate::keys::{NameEpoch, NameSwitch, ObjectNonce, OpenKeys, WriterSession};
use crate::limits;
use crate::manifest::{Delta, GenerationState, Manifest, ManifestKind, ManifestLink, decode_manifest, encode_manifest};
use crate::numbered::NumberedNames;
use crate::object::{Compression, FrameClass, ObjectBuilder, ObjectKind, Placement, SealedObject};
use crate::store::{Store, StoreError};

/// Holds one generation of one chain.
pub struct ChainWriter {
    store: Arc<dyn Store>,
    session: Arc<WriterSession>,
    keys: Arc<OpenKeys>,
    chain: ChainId,
    generation: Generation,
    opened: (u64, NameEpoch),
    head: ManifestLink,
    next_number: u64,
    /// The epoch in which the next manifest is named.
    epoch: NameEpoch,
    /// The epoch that the opening begins.
    begins: Option<NameSwitch>,
    through: SequenceNumber,
    stream: Option<StreamHash>,
    proven_through: PointTime,
    state: GenerationState,
    standing: Option<Standing>,
    fenced: Option<u64>,
}

/// A manifest being filled. Small segments put their frames into [`ManifestBuilder::object`].
pub struct ManifestBuilder {
    /// The object that will be the manifest.
    pub object: ObjectBuilder<'static>,
    number: u64,
    epoch: NameEpoch,
}

/// A finished manifest, ready to be put. Journal its number and nonce first, then put these very bytes, as often as it
/// takes.
pub struct PreparedManifest {
    /// Its number.
    pub number: u64,
    /// Its nonce.
    pub nonce: ObjectNonce,
    epoch: NameEpoch,
    object: SealedObject,
    manifest: Manifest,
}

impl PreparedManifest {
    /// Bytes it takes in the store.
    pub fn stored_len(&self) -> u64 {
        self.object.len()
    }

    /// The object's parts, for callers that store them by themselves.
    pub fn object(&self) -> &SealedObject {
        &self.object
    }

    fn link(&self) -> ManifestLink {
        let SealedObject { nonce, digest, .. } = self.object;
        ManifestLink { number: self.number, epoch: self.epoch, nonce, digest }
    }
}

impl ManifestBuilder {
    /// The number it will have.
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// What becomes of an attempt to win a name.
enum Attempt {
    Won,
    /// The number is taken for ever by something that does not count.
    Burnt,
}

impl ChainWriter {
    /// Begins `chain` with generation 1. Its first manifest holds `delta`, usually just geometries.
    ///
    /// # Errors
    /// [`VaultError::Fenced`] if the chain exists already.
    pub fn create(
        store: &Arc<dyn Store>,
        session: &Arc<WriterSession>,
        keys: &Arc<OpenKeys>,
        chain: ChainId,
        genesis: (MachineId, Option<Position>),
        delta: Delta,
    ) -> Result<ChainWriter, VaultError> {
        ChainWriter::create_announced(store, session, keys, chain, genesis, delta, |_, _| Ok(()))
    }

    /// As [`ChainWriter::create`]; `announce` is told number and nonce before each attempt to put the manifest.
    ///
    /// # Errors
    /// As [`ChainWriter::create`], and those of `announce`.
    pub fn create_announced<E: From<VaultError>>(
        store: &Arc<dyn Store>,
        session: &Arc<WriterSession>,
        keys: &Arc<OpenKeys>,
        chain: ChainId,
        genesis: (MachineId, Option<Position>),
        delta: Delta,
        announce: impl FnMut(u64, ObjectNonce) -> Result<(), E>,
    ) -> Result<ChainWriter, E> {
        let kind = ManifestKind::Genesis { machine: genesis.0, parent: genesis.1 };
        ChainWriter::open_with(store, session, keys, (chain, Generation(1)), None, (kind, delta), announce)
    }

    /// Opens the next generation of the chain whose head is `history`. Whether a journaled tail may be committed
    /// under it is decided by comparing that head with the one the journal continues; because this wins the name right
    /// behind `history`, nothing can slip in between.
    ///
    /// # Errors
    /// [`VaultError::Fenced`] if the chain went on since `history` was loaded: load it again and decide anew.
    /// [`VaultError::WrongChainState`] if the chain's newest manifests are damaged.
    pub fn open_generation(
        store: &Arc<dyn Store>,
        session: &Arc<WriterSession>,
        keys: &Arc<OpenKeys>,
        history: &ChainHistory,
        reason: &str,
        delta: Delta,
    ) -> Result<ChainWriter, VaultError> {
        ChainWriter::open_generation_announced(store, session, keys, history, reason, delta, |_, _| Ok(()))
    }

    /// As [`ChainWriter::open_generation`]; `announce` is told number and nonce before each attempt to put the manifest, so
    /// that whoever writes them down can tell after a lost answer that the generation is its own.
    ///
    /// # Errors
    /// As [`ChainWriter::open_generation`], and those of `announce`.
    pub fn open_generation_announced<E: From<VaultError>>(
        store: &Arc<dyn Store>,
        session: &Arc<WriterSession>,
        keys: &Arc<OpenKeys>,
        history: &ChainHistory,
        reason: &str,
        delta: Delta,
        announce: impl FnMut(u64, ObjectNonce) -> Result<(), E>,
    ) -> Result<ChainWriter, E> {
        let chain = history.chain;
        let before = checked(history)?;
        let kind = ManifestKind::OpenGeneration { reason: cut_text(reason), base: history.through };
        let delta = Delta {
            through: delta.through.max(history.through),
            proven_through: delta.proven_through.max(history.proven_through),
            ..delta
        };
        ChainWriter::open_with(store, session, keys, (chain, before.next()), Some(history), (kind, delta), announce)
    }

    /// Puts a decision about the chain behind `history`, under a generation of its own that takes no history.
    pub(super) fn decide(
        store: &Arc<dyn Store>,
        session: &Arc<WriterSession>,
        keys: &Arc<OpenKeys>,
        history: &ChainHistory,
        kind: ManifestKind,
    ) -> Result<(), VaultError> {
        let before = checked(history)?;
        let delta = Delta {
            through: history.through,
            proven_through: history.proven_through,
            skew_ns: history.skew_ns,
            ..Delta::default()
        };
        let place = (history.chain, before.next());
        ChainWriter::open_with(store, session, keys, place, Some(history), (kind, delta), |_, _| Ok(())).map(drop)
    }

    fn open_with<E: From<VaultError>>(
        store: &Arc<dyn Store>,
        session: &Arc<WriterSession>,
        keys: &Arc<OpenKeys>,
        (chain, generation): (ChainId, Generation),
        history: Option<&ChainHistory>,
        (kind, delta): (ManifestKind, Delta),
        mut announce: impl FnMut(u64, ObjectNonce) -> Result<(), E>,
    ) -> Result<ChainWriter, E> {
        let parent = history.map(|history| history.head);
        let next_number = history.map_or(1, |history| history.next_number);
        let standing = history.map(|history| history.standing);
        crate::keys::revoked::refresh(store, keys)?;
        admit(session, keys, chain, standing, &kind, next_number)?;
        let nothing = ManifestLink { number: 0, epoch: NameEpoch::FIRST, nonce: ObjectNonce([0; 16]), digest: [0; 32] };
        let epoch = history.map_or(NameEpoch::FIRST, |history| history.name_epoch);
        let names = NumberedNames::of_chain(keys, chain);
        if !names.has(epoch) {
            return Err(VaultError::NameKeyMissing { epoch }.into());
        }
        let begins = keys.newest_names().filter(|switch| switch.follows(epoch) && names.has(switch.epoch));
        let mut writer = ChainWriter {
            store: Arc::clone(store),
            session: Arc::clone(session),
            keys: Arc::clone(keys),
            chain,
            generation,
            opened: (next_number, epoch),
            head: parent.unwrap_or(nothing),
            next_number,
            epoch,
            begins,
            through: SequenceNumber(0),
            stream: None,
            proven_through: PointTime(0),
            state: GenerationState::default(),
            standing,
            fenced: None,
        };
        loop {
            writer.opened.0 = writer.next_number;
            let builder = writer.begin();
            let prepared = writer.seal(builder, parent, kind.clone(), delta.clone(), false)?;
            announce(prepared.number, prepared.nonce)?;
            if writer.attempt(&prepared, parent)? {
                return Ok(writer);
            }
        }
    }

    /// The chain.
    pub fn chain(&self) -> ChainId {
        self.chain
    }

    /// The generation this writer holds.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The newest manifest.
    pub fn head(&self) -> ManifestLink {
        self.head
    }

    /// Everything committed.
    pub fn through(&self) -> SequenceNumber {
        self.through
    }

    /// The stream's running hash there, as the newest manifest states it.
    pub fn stream(&self) -> Option<StreamHash> {
        self.stream
    }

    /// The moment through which the source is proven to have written nothing else.
    pub fn proven_through(&self) -> PointTime {
        self.proven_through
    }

    /// What the generation's manifests add up to: live layers, gaps, cuts.
    pub fn state(&self) -> &GenerationState {
        &self.state
    }

    /// The session it writes with.
    pub fn session(&self) -> &Arc<WriterSession> {
        &self.session
    }

    /// Whether another writer took over. Final.
    pub fn is_fenced(&self) -> bool {
        self.fenced.is_some()
    }

    /// Begins the next manifest.
    pub fn begin(&self) -> ManifestBuilder {
        let names = NumberedNames::of_chain(&self.keys, self.chain);
        let placement = Placement::on_chain(ObjectKind::Manifest, self.chain, self.generation);
        let name =
            names.name(self.next_number, self.epoch).expect("the key was at hand when the generation was opened");
        ManifestBuilder {
            object: ObjectBuilder::shared(Arc::clone(&self.session), placement, name),
            number: self.next_number,
            epoch: self.epoch,
        }
    }

    /// Finishes a manifest that adds `delta`. Adds a checkpoint if one is due or `with_checkpoint` asks for it; do
    /// ask for one before the writer goes away in an orderly manner.
    ///
    /// # Errors
    /// [`VaultError::LimitExceeded`] if `delta` holds more than a manifest can: commit it in pieces.
    pub fn prepare(
        &self,
        builder: ManifestBuilder,
        delta: Delta,
        with_checkpoint: CheckpointWish,
    ) -> Result<PreparedManifest, VaultError> {
        assert_eq!(builder.number, self.next_number, "a manifest is prepared and put before the next is begun");
        assert!(delta.through >= self.through, "committed only grows");
        let due = self.state.since_checkpoint.len() + 1 >= limits::CHECKPOINT_EVERY;
        let checkpoint = due || with_checkpoint == CheckpointWish::Now;
        self.seal(builder, Some(self.head), ManifestKind::Append, delta, checkpoint)
    }

    /// Creates the prepared manifest. Committed on return.
    ///
    /// # Errors
    /// * retryable [`VaultError::Store`]: call again with the same `prepared`; whether it was created is unknown;
    /// * [`VaultError::NumberBurnt`]: an object that does not count holds the name; begin, fill and prepare again;
    /// * [`VaultError::Fenced`]: another writer took over. Final for this writer.
    pub fn put(&mut self, prepared: &PreparedManifest) -> Result<(), VaultError> {
        let parent = Some(self.head);
        if self.attempt(prepared, parent)? { Ok(()) } else { Err(VaultError::NumberBurnt { number: prepared.number }) }
    }

    /// Prepares and puts in one go, for writers without a journal. `fill` puts frames into the object and names the
    /// layers; it is called again, with a new object, if a number turns out to be burnt.
    ///
    /// # Errors
    /// As [`ChainWriter::put`], without [`VaultError::NumberBurnt`], and those of `fill`.
    pub fn commit(
        &mut self,
        with_checkpoint: CheckpointWish,
        mut fill: impl FnMut(&mut ObjectBuilder<'static>) -> Result<Delta, VaultError>,
    ) -> Result<ManifestLink, VaultError> {
        loop {
            let mut builder = self.begin();
            let delta = fill(&mut builder.object)?;
            let prepared = self.prepare(builder, delta, with_checkpoint)?;
            match self.put(&prepared) {
                Err(VaultError::NumberBurnt { .. }) => {}
                Err(error) => return Err(error),
                Ok(()) => return Ok(self.head),
            }
        }
    }

    fn seal(
        &self,
        mut builder: ManifestBuilder,
        parent: Option<ManifestLink>,
        kind: ManifestKind,
        delta: Delta,
        checkpoint: bool,
    ) -> Result<PreparedManifest, VaultError> {
        let (number, epoch) = (builder.number, builder.epoch);
        let is_opening = self.opened == (number, epoch);
        let manifest = Manifest {
            number,
            parent,
            opened: self.opened,
            names: self.begins.filter(|_| is_opening),
            last_checkpoint: self.state.last_checkpoint(),
            checkpoint: checkpoint.then(|| Box::new(self.state.checkpoint_with(&delta))),
            kind,
            delta,
        };
        let bytes = bytes::Bytes::from(encode_manifest(&manifest));
        // What cannot be read back must never be won: everything behind it would be lost.
        match decode_manifest(&bytes) {
            Ok(decoded) => assert!(decoded == manifest, "a manifest reads back as it was written"),
            Err(replication::codec::DecodeError::TooLarge { field, value, limit }) => {
                return Err(VaultError::LimitExceeded { what: field, value, limit });
            }
            Err(error) => unreachable!("a manifest reads back unless a limit is exceeded: {error}"),
        }
        let root = builder.object.add(FrameClass::Index, &bytes, Compression::Fast)?;
        let object = builder.object.finish(Some(root));
        Ok(PreparedManifest { number, nonce: object.nonce, epoch, object, manifest })
    }

    /// Tries to win `prepared`'s name. `false` if the number is burnt; the writer has moved on to the next then.
    fn attempt(&mut self, prepared: &PreparedManifest, parent: Option<ManifestLink>) -> Result<bool, VaultError> {
        if let Some(number) = self.fenced {
            return Err(VaultError::Fenced { number });
        }
        assert_eq!(prepared.number, self.next_number, "manifests are put in the order they were prepared");
        let outcome = match prepared.object.put(self.store.as_ref()) {
            Ok(()) => Attempt::Won,
            Err(StoreError::AlreadyExists(_)) => self.look_at(prepared.number, parent)?,
            Err(error) => return Err(error.into()),
        };
        match outcome {
            Attempt::Won => {
                let (kind, authority) = (&prepared.manifest.kind, self.session.keys().grant.authority());
                self.standing = match self.standing {
                    None => Standing::begun(kind, authority),
                    Some(standing) => standing.then(kind, authority, prepared.link()),
                };
                assert!(self.standing.is_some(), "a writer puts what it may put");
                self.head = prepared.link();
                self.next_number += 1;
                self.epoch = prepared.manifest.names.map_or(self.epoch, |switch| switch.epoch);
                self.through = prepared.manifest.delta.through;
                self.stream = prepared.manifest.delta.stream;
                self.proven_through = prepared.manifest.delta.proven_through;
                // Layers in the manifest itself are known by its name from now on.
                let mut manifest = prepared.manifest.clone();
                manifest.resolve_layers(&prepared.object.name);
                self.state.apply(self.head, &manifest);
                Ok(true)
            }
            Attempt::Burnt => {
                self.next_number += 1;
                Ok(false)
            }
        }
    }

    /// What took the name?
    fn look_at(&mut self, number: u64, parent: Option<ManifestLink>) -> Result<Attempt, VaultError> {
        let reader = ChainReader::new(&self.store, &self.keys, self.chain);
        let fences = match reader.judge(number, self.epoch)? {
            Judged::Invalid(_) => false,
            // Whoever names our head as its parent counts instead of us, if it is that writer's turn.
            Judged::Signed(manifest) if manifest.manifest.parent == parent => {
                Standing::after(self.standing, &manifest).is_some()
            }
            // Whoever has a later generation may have won an earlier number, even one that cannot be read any more.
            Judged::Signed(manifest) if manifest.generation > self.generation => self.is_overtaken()?,
            Judged::Signed(_) => false,
        };
        if fences {
            self.fenced = Some(number);
            return Err(VaultError::Fenced { number });
        }
        Ok(Attempt::Burnt)
    }

    fn is_overtaken(&self) -> Result<bool, VaultError> {
        let Some(history) = super::walk::complete(&self.store, &self.keys, self.chain)? else { return Ok(true) };
        let lost = history.alarms.iter().any(|alarm| matches!(alarm, Alarm::LostParent { .. }));
        Ok(lost || history.head != self.head)
    }
}

/// The chain's generation, if another one may follow it.
fn checked(history: &ChainHistory) -> Result<Generation, VaultError> {
    let chain = history.chain;
    if history.alarms.iter().any(|alarm| matches!(alarm, Alarm::LostParent { .. })) {
        return Err(VaultError::WrongChainState {
            chain,
            reason: "manifests at its end are damaged or missing; bring them back from a copy of the vault \
                     before anything is written to it",
        });
    }
    match history.generation().generation {
        generation if generation >= Generation::MAX => {
            Err(VaultError::WrongChainState { chain, reason: "it has used up its generations" })
        }
        generation => Ok(generation),
    }
}

/// Refuses a manifest that would not count, before its number is burnt for it.
fn admit(
    session: &WriterSession,
    keys: &OpenKeys,
    chain: ChainId,
    standing: Option<Standing>,
    kind: &ManifestKind,
    number: u64,
) -> Result<(), VaultError> {
    let grant = &session.keys().grant;
    let (writer, authority) = (grant.writer, grant.authority());
    if keys.with_revocations(|known| known.fails_from(writer, chain)).is_some_and(|from| number >= from) {
        return Err(VaultError::Revoked { writer });
    }
    let link = ManifestLink { number, epoch: NameEpoch::FIRST, nonce: ObjectNonce([0; 16]), digest: [0; 32] };
    match standing {
        None if Standing::begun(kind, authority).is_some() => Ok(()),
        None => Err(VaultError::NotPermitted {
            writer,
            reason: "process servers begin machines' chains, and branch hosts those of branches",
        }),
        Some(standing) if standing.then(kind, authority, link).is_some() => Ok(()),
        Some(standing) => Err(standing.refusal(chain, kind, writer)),
    }
}

/// Whether a manifest shall carry a checkpoint although none is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointWish {
    /// Only when one is due.
    WhenDue,
    /// In any case.
    Now,
}

pub(crate) fn cut_text(text: &str) -> String {
    let mut end = text.len().min(limits::REASON_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
