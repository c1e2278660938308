//! What a journal says: records, and the state of a chain that follows from them.

use std::collections::BTreeMap;

use bytes::Bytes;
use replication::codec::{DecodeError, Decoder, Encoder};
use replication::{ChainId, Change, ChangeKind, Generation, MachineId, SequenceNumber, StreamHash, limits};

use super::JournalError;
use super::format::FileNumber;

/// Largest encoded record, in bytes. As large as a message of the wire, whose changes become one record.
pub const RECORD_BYTES_MAX: usize = limits::MESSAGE_BYTES_MAX + (64 << 10);
/// Largest note, in bytes.
pub const NOTE_BYTES_MAX: usize = 4096;
/// Most different notes of one chain.
pub const NOTES_MAX: usize = 8;
/// Most chains of which a journal holds anything.
pub const CHAINS_MAX: usize = 4096;
/// Most files of one journal.
pub(super) const FILES_MAX: usize = 1 << 16;

/// Number of a manifest in its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ManifestNumber(pub u64);

/// What tells two manifests apart that were written under one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ManifestNonce(pub [u8; 16]);

/// A writer session on a chain: what this journal continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Session {
    /// The machine whose changes these are.
    pub machine: MachineId,
    /// The generation that was opened.
    pub generation: Generation,
    /// The chain's head when it was opened.
    pub head: Manifest,
}

/// One manifest, by number and nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Manifest {
    /// Its number.
    pub number: ManifestNumber,
    /// Its nonce.
    pub nonce: ManifestNonce,
}

/// Kind of a [`Record::Note`]; assigned by whoever writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NoteKind(pub u8);

/// One entry of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Changes of a machine, in the order of their sequence numbers.
    Changes {
        /// The chain they belong to.
        chain: ChainId,
        /// At least one.
        changes: Vec<Change>,
    },
    /// A generation was opened.
    SessionOpened {
        /// Its chain.
        chain: ChainId,
        /// What is continued.
        session: Session,
    },
    /// A manifest is about to be created. Journaled before the request, so that a lost answer can be recognised.
    Intent {
        /// The chain it extends.
        chain: ChainId,
        /// Which manifest.
        manifest: Manifest,
    },
    /// Everything up to a position is in the vault; the journal need not keep it.
    Committed {
        /// Whose position.
        chain: ChainId,
        /// The last change that is durable in the vault.
        through: SequenceNumber,
        /// The manifest that says so.
        number: ManifestNumber,
    },
    /// The stream's running hash.
    StreamHash {
        /// Whose stream.
        chain: ChainId,
        /// The change up to which it was computed.
        sequence: SequenceNumber,
        /// The hash.
        hash: StreamHash,
    },
    /// Nothing that the journal holds of this chain will be committed.
    Dropped {
        /// Which chain.
        chain: ChainId,
        /// Why, for people.
        reason: String,
    },
    /// Something that a stage of the process server wants to find again, in its place among the changes.
    Note {
        /// Whose.
        chain: ChainId,
        /// What it is. The newest of each kind is part of [`ChainState`].
        kind: NoteKind,
        /// At most [`NOTE_BYTES_MAX`].
        bytes: Bytes,
    },
}

const OPENING: u8 = 0;
const CHANGES: u8 = 1;
const SESSION_OPENED: u8 = 2;
const INTENT: u8 = 3;
const COMMITTED: u8 = 4;
const STREAM_HASH: u8 = 5;
const DROPPED: u8 = 6;
const NOTE: u8 = 7;

/// An encoded record whose data still lies where the caller has it.
pub(super) struct Encoded<'a> {
    head: Vec<u8>,
    data: &'a [Change],
    len: usize,
}

impl Encoded<'_> {
    /// Bytes of the whole.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends the whole: the only time that the data is copied.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        for change in self.data {
            if let ChangeKind::Write { data, .. } = &change.kind {
                out.extend_from_slice(data);
            }
        }
    }
}

impl Record {
    /// The chain it speaks of.
    pub fn chain(&self) -> ChainId {
        match self {
            Record::Changes { chain, .. }
            | Record::SessionOpened { chain, .. }
            | Record::Intent { chain, .. }
            | Record::Committed { chain, .. }
            | Record::StreamHash { chain, .. }
            | Record::Dropped { chain, .. }
            | Record::Note { chain, .. } => *chain,
        }
    }

    /// Checks every bound that a reader relies on, and encodes.
    pub(super) fn encode(&self) -> Result<Encoded<'_>, JournalError> {
        let mut head = Encoder::new();
        let mut data: &[Change] = &[];
        let mut data_len = 0;
        match self {
            Record::Changes { chain, changes } => {
                if changes.is_empty() || changes.len() > limits::BATCH_CHANGES_MAX {
                    return Err(JournalError::Invalid("a record has between one and 4096 changes"));
                }
                if !changes.is_sorted_by_key(|change| change.sequence) {
                    return Err(JournalError::Invalid("a record's changes are not in the order of their numbers"));
                }
                head.u8(CHANGES).raw(&chain.0).varint(changes.len() as u64);
                for change in changes {
                    if change.kind.data_len() > limits::CHANGE_DATA_BYTES_MAX {
                        return Err(JournalError::Invalid("a change carries more than 1 MiB"));
                    }
                    change.encode_head(&mut head);
                    data_len += change.kind.data_len();
                }
                data = changes;
            }
            Record::SessionOpened { chain, session } => {
                head.u8(SESSION_OPENED).raw(&chain.0);
                session.encode(&mut head);
            }
            Record::Intent { chain, manifest } => {
                head.u8(INTENT).raw(&chain.0);
                manifest.encode(&mut head);
            }
            Record::Committed { chain, through, number } => {
                head.u8(COMMITTED).raw(&chain.0).u64(through.0).u64(number.0);
            }
            Record::StreamHash { chain, sequence, hash } => {
                head.u8(STREAM_HASH).raw(&chain.0).u64(sequence.0).raw(&hash.0);
            }
            Record::Dropped { chain, reason } => {
                // A longer reason is not worth failing for.
                let mut end = reason.len().min(limits::REASON_BYTES_MAX);
                while !reason.is_char_boundary(end) {
                    end -= 1;
                }
                head.u8(DROPPED).raw(&chain.0).text(&reason[..end]);
            }
            Record::Note { chain, kind, bytes } => {
                if bytes.len() > NOTE_BYTES_MAX {
                    return Err(JournalError::Invalid("a note is longer than 4 KiB"));
                }
                head.u8(NOTE).raw(&chain.0).u8(kind.0).bytes(bytes);
            }
        }
        let head = head.finish();
        let len = head.len() + data_len;
        if len > RECORD_BYTES_MAX {
            return Err(JournalError::TooLarge { record_bytes: len as u64, limit_bytes: RECORD_BYTES_MAX as u64 });
        }
        Ok(Encoded { head, data, len })
    }

    /// Reads a record. The data of its changes shares the memory of `bytes`.
    pub(super) fn decode(bytes: Bytes) -> Result<Record, DecodeError> {
        let mut input = Decoder::new(bytes);
        let tag = input.u8("record kind")?;
        if tag == OPENING {
            return Err(DecodeError::Inconsistent("a second opening record"));
        }
        let chain = ChainId(input.array("chain id")?);
        let record = match tag {
            CHANGES => {
                let count = input.count("number of changes", limits::BATCH_CHANGES_MAX as u64)?;
                let mut changes = Vec::with_capacity(count);
                for _ in 0..count {
                    changes.push(Change::decode_head(&mut input)?);
                }
                for change in &mut changes {
                    change.attach_data(&mut input)?;
                }
                if changes.is_empty() || !changes.is_sorted_by_key(|change| change.sequence) {
                    return Err(DecodeError::Inconsistent("changes are missing or out of order"));
                }
                Record::Changes { chain, changes }
            }
            SESSION_OPENED => Record::SessionOpened { chain, session: Session::decode(&mut input)? },
            INTENT => Record::Intent { chain, manifest: Manifest::decode(&mut input)? },
            COMMITTED => Record::Committed {
                chain,
                through: SequenceNumber(input.u64("committed position")?),
                number: ManifestNumber(input.u64("manifest number")?),
            },
            STREAM_HASH => Record::StreamHash {
                chain,
                sequence: SequenceNumber(input.u64("stream hash position")?),
                hash: StreamHash(input.array("stream hash")?),
            },
            DROPPED => Record::Dropped { chain, reason: input.text("reason", limits::REASON_BYTES_MAX)? },
            NOTE => Record::Note {
                chain,
                kind: NoteKind(input.u8("note kind")?),
                bytes: input.bytes("note", NOTE_BYTES_MAX)?,
            },
            value => return Err(DecodeError::Undefined { field: "record kind", value: value.into() }),
        };
        input.finish()?;
        Ok(record)
    }
}

impl Session {
    fn encode(&self, out: &mut Encoder) {
        out.raw(&self.machine.0).u32(self.generation.0);
        self.head.encode(out);
    }

    fn decode(input: &mut Decoder) -> Result<Session, DecodeError> {
        let machine = MachineId(input.array("machine id")?);
        let generation = Generation(input.u32("generation")?);
        if generation > Generation::MAX {
            return Err(DecodeError::Undefined { field: "generation", value: generation.0.into() });
        }
        Ok(Session { machine, generation, head: Manifest::decode(input)? })
    }
}

impl Manifest {
    fn encode(&self, out: &mut Encoder) {
        out.u64(self.number.0).raw(&self.nonce.0);
    }

    fn decode(input: &mut Decoder) -> Result<Manifest, DecodeError> {
        Ok(Manifest {
            number: ManifestNumber(input.u64("manifest number")?),
            nonce: ManifestNonce(input.array("manifest nonce")?),
        })
    }
}

/// What the journal knows of a chain, apart from the changes themselves. Position 0 means "none yet".
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChainState {
    /// The session that the journal continues; none before the first and after a drop.
    pub session: Option<Session>,
    /// The last change that the journal was given or knows to be committed.
    pub last: SequenceNumber,
    /// Changes up to here are needed no more: committed or dropped.
    pub released: SequenceNumber,
    /// The newest commit.
    pub committed: Option<(SequenceNumber, ManifestNumber)>,
    /// The newest stream hash and its position.
    pub stream_hash: Option<(SequenceNumber, StreamHash)>,
    /// A manifest that may or may not have been created.
    pub intent: Option<Manifest>,
    /// Why the chain was dropped, if nothing came after.
    pub dropped: Option<String>,
    /// The newest note of each kind.
    pub notes: BTreeMap<NoteKind, Bytes>,
}

impl ChainState {
    /// Whether the journal holds changes that are neither committed nor dropped.
    pub fn has_uncommitted(&self) -> bool {
        self.last > self.released
    }

    /// Whether it can be forgotten once no file holds changes of the chain: unknown, or dropped and nothing since.
    pub(super) fn says_nothing(&self) -> bool {
        let nothing = ChainState {
            last: self.last,
            released: self.released,
            dropped: self.dropped.clone(),
            ..ChainState::default()
        };
        *self == nothing && (self.dropped.is_some() || self.last.0 == 0 && self.released.0 == 0)
    }

    /// The state after `record`, which speaks of this chain.
    pub(super) fn apply(&mut self, record: &Record) {
        match record {
            Record::Changes { changes, .. } => {
                self.last = changes.last().map_or(self.last, |change| change.sequence);
                self.dropped = None;
            }
            Record::SessionOpened { session, .. } => {
                self.session = Some(*session);
                self.dropped = None;
                self.resolve_intent(session.head.number);
            }
            Record::Intent { manifest, .. } => self.intent = Some(*manifest),
            Record::Committed { through, number, .. } => {
                self.released = self.released.max(*through);
                self.last = self.last.max(*through);
                self.committed = Some((*through, *number));
                self.resolve_intent(*number);
            }
            Record::StreamHash { sequence, hash, .. } => self.stream_hash = Some((*sequence, *hash)),
            Record::Dropped { reason, .. } => {
                let last = self.last.max(self.released);
                *self = ChainState { last, released: last, dropped: Some(reason.clone()), ..ChainState::default() };
            }
            Record::Note { kind, bytes, .. } => {
                self.notes.insert(*kind, bytes.clone());
            }
        }
    }

    /// Once a manifest with the intent's number or a later one exists, it is known which one it is.
    fn resolve_intent(&mut self, head: ManifestNumber) {
        self.intent = self.intent.filter(|intent| intent.number > head);
    }

    /// Upper bound of the encoded length, in bytes.
    pub(super) fn encoded_max(&self) -> u64 {
        let texts = self.dropped.as_ref().map_or(0, |reason| reason.len() + 3);
        let notes: usize = self.notes.values().map(|note| note.len() + 4).sum();
        (200 + texts + notes) as u64
    }

    fn encode(&self, out: &mut Encoder) {
        let flags = u8::from(self.session.is_some())
            | u8::from(self.committed.is_some()) << 1
            | u8::from(self.stream_hash.is_some()) << 2
            | u8::from(self.intent.is_some()) << 3
            | u8::from(self.dropped.is_some()) << 4;
        out.u8(flags).u64(self.last.0).u64(self.released.0);
        if let Some(session) = &self.session {
            session.encode(out);
        }
        if let Some((through, number)) = self.committed {
            out.u64(through.0).u64(number.0);
        }
        if let Some((sequence, hash)) = self.stream_hash {
            out.u64(sequence.0).raw(&hash.0);
        }
        if let Some(intent) = &self.intent {
            intent.encode(out);
        }
        if let Some(reason) = &self.dropped {
            out.text(reason);
        }
        out.varint(self.notes.len() as u64);
        for (kind, note) in &self.notes {
            out.u8(kind.0).bytes(note);
        }
    }

    fn decode(input: &mut Decoder) -> Result<ChainState, DecodeError> {
        let flags = input.u8("chain flags")?;
        if flags >> 5 != 0 {
            return Err(DecodeError::Undefined { field: "chain flags", value: flags.into() });
        }
        let mut state = ChainState {
            last: SequenceNumber(input.u64("last position")?),
            released: SequenceNumber(input.u64("released position")?),
            ..ChainState::default()
        };
        if flags & 1 != 0 {
            state.session = Some(Session::decode(input)?);
        }
        if flags & 2 != 0 {
            state.committed =
                Some((SequenceNumber(input.u64("committed position")?), ManifestNumber(input.u64("manifest number")?)));
        }
        if flags & 4 != 0 {
            state.stream_hash =
                Some((SequenceNumber(input.u64("stream hash position")?), StreamHash(input.array("stream hash")?)));
        }
        if flags & 8 != 0 {
            state.intent = Some(Manifest::decode(input)?);
        }
        if flags & 16 != 0 {
            state.dropped = Some(input.text("reason", limits::REASON_BYTES_MAX)?);
        }
        for _ in 0..input.count("number of notes", NOTES_MAX as u64)? {
            let kind = NoteKind(input.u8("note kind")?);
            state.notes.insert(kind, input.bytes("note", NOTE_BYTES_MAX)?);
        }
        Ok(state)
    }
}

/// An older file of the journal, as a newer one describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OlderFile {
    /// Which file.
    pub(super) number: FileNumber,
    /// How many of its bytes count. What follows was never promised to anybody.
    pub(super) valid: u64,
    /// The highest change of each chain in it.
    pub(super) highest: BTreeMap<ChainId, SequenceNumber>,
}

/// The first record of each file: all that is known when it is created.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Opening {
    /// Every chain that the journal knows.
    pub(super) chains: BTreeMap<ChainId, ChainState>,
    /// The files before this one that still count, ascending. Any other is a leftover.
    pub(super) files: Vec<OlderFile>,
}

impl Opening {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::new();
        out.u8(OPENING).varint(self.chains.len() as u64);
        for (chain, state) in &self.chains {
            out.raw(&chain.0);
            state.encode(&mut out);
        }
        let index: BTreeMap<ChainId, u64> = self.chains.keys().copied().zip(0..).collect();
        out.varint(self.files.len() as u64);
        for file in &self.files {
            out.u64(file.number.0).u64(file.valid).varint(file.highest.len() as u64);
            for (chain, highest) in &file.highest {
                out.varint(index[chain]).u64(highest.0);
            }
        }
        out.finish()
    }

    pub(super) fn decode(bytes: Bytes) -> Result<Opening, DecodeError> {
        let mut input = Decoder::new(bytes);
        match input.u8("record kind")? {
            OPENING => {}
            value => return Err(DecodeError::Undefined { field: "record kind", value: value.into() }),
        }
        let mut opening = Opening::default();
        let mut ids = Vec::new();
        for _ in 0..input.count("number of chains", CHAINS_MAX as u64)? {
            let chain = ChainId(input.array("chain id")?);
            ids.push(chain);
            opening.chains.insert(chain, ChainState::decode(&mut input)?);
        }
        for _ in 0..input.count("number of files", FILES_MAX as u64)? {
            let number = FileNumber(input.u64("file number")?);
            let valid = input.u64("file length")?;
            let mut highest = BTreeMap::new();
            for _ in 0..input.count("number of chains in a file", CHAINS_MAX as u64)? {
                let index = input.varint_max("chain index", ids.len() as u64)? as usize;
                let chain = ids.get(index).ok_or(DecodeError::Inconsistent("a file names an unknown chain"))?;
                highest.insert(*chain, SequenceNumber(input.u64("highest position")?));
            }
            opening.files.push(OlderFile { number, valid, highest });
        }
        input.finish()?;
        if !opening.files.is_sorted_by(|a, b| a.number < b.number) {
            return Err(DecodeError::Inconsistent("the files are not in the order of their numbers"));
        }
        Ok(opening)
    }
}
