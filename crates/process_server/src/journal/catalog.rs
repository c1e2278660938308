//! The pure half of the journal: which files there are, what keeps each of them, what may still be written, and the
//! state of each chain. Decides; [`super::writer`] acts.
//!
//! A file can go once every chain's highest change in it is committed or dropped, *and the record that says so is
//! durable*. Everything else that an old file said is repeated in the opening of each newer one.
//!
//! The budget keeps a reserve that changes may not touch, so that a full journal can still record the commits that
//! empty it:
//!
//! ```text
//! |<------------------ changes ------------------>|<- slack ->|<- slack ->|<- opening ->|<- opening ->|
//! 0                                                                                             bytes_max
//! ```
//!
//! Records that are not changes go into the current file until one slack and two openings are left. Then a new file
//! begins, which has no changes and so can be replaced, when the second slack is used up, by another new one.

use std::collections::{BTreeMap, BTreeSet};

use replication::{ChainId, SequenceNumber};

use super::format::{FRAME_OVERHEAD, FileNumber, HEADER_BYTES, SYNC_ALIGN};
use super::record::{CHAINS_MAX, ChainState, NOTES_MAX, OlderFile, Opening, Record};
use super::{JournalConfig, JournalError};

/// Bytes set aside, twice, for records that are not changes.
const SLACK_BYTES: u64 = 32 << 10;

/// Whether room was already promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// Refuse changes that would eat into the reserve.
    Check,
    /// The thread's queue already counted these bytes.
    Granted,
}

/// Where the next record goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// Into the current file.
    Current,
    /// Into a new file.
    NewFile,
}

#[derive(Debug, Clone)]
struct FileEntry {
    /// Bytes on the disk, whether they count or not.
    bytes: u64,
    /// Bytes that count.
    valid: u64,
    /// False for a file whose creation failed half-way: it is only there to be removed.
    counts: bool,
    highest: BTreeMap<ChainId, SequenceNumber>,
}

#[derive(Debug, Clone, Default)]
struct Chain {
    /// After every record that was accepted.
    written: ChainState,
    /// After every record that is durable.
    durable: ChainState,
}

/// What is known of all files and chains.
#[derive(Debug)]
pub(super) struct Catalog {
    config: JournalConfig,
    older: BTreeMap<FileNumber, FileEntry>,
    current: Option<(FileNumber, FileEntry)>,
    chains: BTreeMap<ChainId, Chain>,
    /// Chains whose written state is ahead of the durable one.
    unsynced: BTreeSet<ChainId>,
}

impl Catalog {
    pub(super) fn new(config: JournalConfig) -> Catalog {
        Catalog { config, older: BTreeMap::new(), current: None, chains: BTreeMap::new(), unsynced: BTreeSet::new() }
    }

    /// Takes over a chain as replay found it.
    pub(super) fn recover_chain(&mut self, chain: ChainId, state: ChainState) {
        self.chains.insert(chain, Chain { written: state.clone(), durable: state });
    }

    /// Takes over a file as replay found it.
    pub(super) fn recover_file(&mut self, file: OlderFile, bytes: u64) {
        let entry = FileEntry { bytes, valid: file.valid, counts: true, highest: file.highest };
        self.older.insert(file.number, entry);
    }

    /// Where a record of `frame_bytes` belongs.
    ///
    /// # Errors
    /// [`JournalError::Full`], and what is wrong with the record.
    pub(super) fn place(
        &self,
        record: &Record,
        frame_bytes: u64,
        admission: Admission,
    ) -> Result<Placement, JournalError> {
        self.check(record)?;
        let opening = self.opening_bytes();
        let limit = self.config.file_bytes_max.saturating_sub(opening);
        let padded = frame_bytes + SYNC_ALIGN;
        if padded > limit {
            return Err(JournalError::TooLarge { record_bytes: frame_bytes, limit_bytes: limit });
        }
        let current = self.current.as_ref().map(|(_, entry)| entry);
        let new_file = current.is_none_or(|entry| entry.bytes + padded > self.config.file_bytes_max);
        let opened = if new_file { opening } else { 0 };
        let total = self.total_bytes();
        let needed = total + opened + padded;
        if matches!(record, Record::Changes { .. }) {
            let reserve = match admission {
                Admission::Check => self.reserve(),
                Admission::Granted => opening,
            };
            if needed + reserve > self.config.bytes_max {
                return Err(JournalError::Full { needed_bytes: padded + opened, free_bytes: self.free_bytes() });
            }
            return Ok(if new_file { Placement::NewFile } else { Placement::Current });
        }
        let replaceable = current.is_some_and(|entry| self.is_releasable(entry));
        let keep = if replaceable { opening } else { 2 * opening + SLACK_BYTES };
        if !new_file && needed + keep <= self.config.bytes_max {
            return Ok(Placement::Current);
        }
        // A replaced file gives its room back before the record is written.
        let returned = if replaceable { current.map_or(0, |entry| entry.bytes) } else { 0 };
        if total + opening <= self.config.bytes_max && total + 2 * opening + padded - returned <= self.config.bytes_max
        {
            return Ok(Placement::NewFile);
        }
        if !new_file && needed + opening <= self.config.bytes_max {
            return Ok(Placement::Current);
        }
        Err(JournalError::Full { needed_bytes: padded + opening, free_bytes: self.free_bytes() })
    }

    fn check(&self, record: &Record) -> Result<(), JournalError> {
        let chain = self.chains.get(&record.chain());
        if chain.is_none() && self.chains.len() >= CHAINS_MAX {
            return Err(JournalError::Invalid("a journal holds at most 4096 chains"));
        }
        let Some(chain) = chain else { return Ok(()) };
        match record {
            Record::Changes { changes, .. } => {
                let first = changes.first().map_or(SequenceNumber(0), |change| change.sequence);
                if first < chain.written.last || first <= chain.written.released && first.0 != 0 {
                    return Err(JournalError::OutOfOrder {
                        chain: record.chain(),
                        given: first,
                        last: chain.written.last.max(chain.written.released),
                    });
                }
            }
            Record::Note { kind, .. } => {
                let notes = &chain.written.notes;
                if notes.len() >= NOTES_MAX && !notes.contains_key(kind) {
                    return Err(JournalError::Invalid("a chain has at most 8 notes"));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes that `record` was given to the current file.
    pub(super) fn appended(&mut self, record: &Record, frame_bytes: u64) {
        let id = record.chain();
        let chain = self.chains.entry(id).or_default();
        chain.written.apply(record);
        self.unsynced.insert(id);
        let (_, current) = self.current.as_mut().expect("a record is appended to the current file");
        current.bytes += frame_bytes;
        if let Record::Changes { .. } = record {
            current.highest.insert(id, chain.written.last);
        }
    }

    /// Notes that the current file was filled up with `bytes` of zeroes.
    pub(super) fn padded(&mut self, bytes: u64) {
        let (_, current) = self.current.as_mut().expect("the current file is padded");
        current.bytes += bytes;
    }

    /// Notes that everything appended is durable.
    pub(super) fn synced(&mut self) {
        for id in std::mem::take(&mut self.unsynced) {
            let chain = self.chains.get_mut(&id).expect("chains are not forgotten while they have unsynced records");
            chain.durable = chain.written.clone();
        }
        if let Some((_, current)) = &mut self.current {
            current.valid = current.bytes;
        }
    }

    /// Gives the current file up at what was durable; what was appended since never happened.
    pub(super) fn abandoned(&mut self) {
        for id in std::mem::take(&mut self.unsynced) {
            let chain = self.chains.get_mut(&id).expect("chains are not forgotten while they have unsynced records");
            chain.written = chain.durable.clone();
        }
        self.finished();
    }

    /// The current file gets no more records.
    pub(super) fn finished(&mut self) {
        if let Some((number, mut entry)) = self.current.take() {
            let chains = &self.chains;
            entry.highest.retain(|id, highest| chains.get(id).is_some_and(|chain| *highest > chain.durable.released));
            self.older.insert(number, entry);
        }
        // A chain of which nothing is left but the memory that it was dropped is forgotten.
        let mentioned: BTreeSet<ChainId> =
            self.older.values().flat_map(|entry| entry.highest.keys().copied()).collect();
        self.chains.retain(|id, chain| !chain.durable.says_nothing() || mentioned.contains(id));
    }

    /// Notes that a file could not be created; it may or may not be there.
    pub(super) fn creation_failed(&mut self, number: FileNumber, bytes: u64) {
        let entry = FileEntry { bytes, valid: 0, counts: false, highest: BTreeMap::new() };
        self.older.insert(number, entry);
    }

    /// The file that was just created is the current one.
    pub(super) fn created(&mut self, number: FileNumber, bytes: u64) {
        assert!(self.current.is_none(), "the file before was finished");
        let entry = FileEntry { bytes, valid: bytes, counts: true, highest: BTreeMap::new() };
        self.current = Some((number, entry));
    }

    /// What a file that is created now begins with. Describes durable things only.
    pub(super) fn opening(&self) -> Opening {
        assert!(self.current.is_none() && self.unsynced.is_empty(), "the file before was finished");
        let files = self.older.iter().filter(|(_, entry)| entry.counts).map(|(number, entry)| {
            let mut highest = entry.highest.clone();
            highest.retain(|id, highest| self.chains.get(id).is_some_and(|chain| *highest > chain.durable.released));
            OlderFile { number: *number, valid: entry.valid, highest }
        });
        Opening {
            files: files.collect(),
            chains: self.chains.iter().map(|(id, chain)| (*id, chain.durable.clone())).collect(),
        }
    }

    /// Whether the current file holds no change that is needed, so that a new file would let it go.
    pub(super) fn current_is_replaceable(&self) -> bool {
        self.current
            .as_ref()
            .is_some_and(|(_, entry)| self.is_releasable(entry) && entry.bytes > self.opening_bytes() + SYNC_ALIGN)
    }

    /// Files that can be removed.
    pub(super) fn removable(&self) -> Vec<FileNumber> {
        self.older.iter().filter(|(_, entry)| self.is_releasable(entry)).map(|(number, _)| *number).collect()
    }

    /// Notes that a file is gone.
    pub(super) fn removed(&mut self, number: FileNumber) {
        self.older.remove(&number);
    }

    fn is_releasable(&self, entry: &FileEntry) -> bool {
        self.needing(entry).next().is_none()
    }

    fn needing(&self, entry: &FileEntry) -> impl Iterator<Item = ChainId> {
        entry
            .highest
            .iter()
            .filter(|(id, highest)| self.chains.get(id).is_some_and(|chain| **highest > chain.durable.released))
            .map(|(id, _)| *id)
    }

    /// Chains that keep the oldest file.
    pub(super) fn pinned_by(&self) -> Vec<ChainId> {
        let older = self.older.values().chain(self.current.as_ref().map(|(_, entry)| entry));
        older.map(|entry| self.needing(entry).collect::<Vec<_>>()).find(|ids| !ids.is_empty()).unwrap_or_default()
    }

    /// Bytes on the disk.
    pub(super) fn total_bytes(&self) -> u64 {
        let older: u64 = self.older.values().map(|entry| entry.bytes).sum();
        older + self.current.as_ref().map_or(0, |(_, entry)| entry.bytes)
    }

    fn reserve(&self) -> u64 {
        2 * (self.opening_bytes() + SLACK_BYTES)
    }

    /// Bytes that changes may still take, framing included.
    pub(super) fn free_bytes(&self) -> u64 {
        let returned = match &self.current {
            Some((_, entry)) if self.is_releasable(entry) => entry.bytes,
            _ => 0,
        };
        self.config.bytes_max.saturating_sub(self.reserve() + self.total_bytes() - returned)
    }

    /// Upper bound of what the header and opening of a new file take, in bytes.
    pub(super) fn opening_bytes(&self) -> u64 {
        let chains: u64 =
            self.chains.values().map(|chain| chain.written.encoded_max().max(chain.durable.encoded_max())).sum();
        let current = self.current.iter().map(|(_, entry)| entry);
        let files: u64 = self.older.values().chain(current).map(|entry| 24 + 11 * entry.highest.len() as u64).sum();
        (HEADER_BYTES as u64 + FRAME_OVERHEAD as u64 + 64 + chains + files + 256).next_multiple_of(SYNC_ALIGN)
    }

    /// Every chain with its durable state.
    pub(super) fn chains(&self) -> BTreeMap<ChainId, ChainState> {
        self.chains.iter().map(|(id, chain)| (*id, chain.durable.clone())).collect()
    }

    /// A chain's durable state.
    pub(super) fn chain(&self, id: ChainId) -> Option<&ChainState> {
        self.chains.get(&id).map(|chain| &chain.durable)
    }

    /// The newest change of `chain` that was accepted, or is known to be committed or dropped.
    pub(super) fn last(&self, id: ChainId) -> SequenceNumber {
        self.chains.get(&id).map_or_else(Default::default, |chain| chain.written.last.max(chain.written.released))
    }

    /// The files that hold changes of `chain` that are still needed, ascending.
    pub(super) fn files_of(&self, chain: ChainId) -> Vec<(FileNumber, u64)> {
        let released = self.chain(chain).map_or(SequenceNumber(0), |state| state.released);
        let current = self.current.as_ref().map(|(number, entry)| (number, entry));
        let all = self.older.iter().chain(current);
        all.filter(|(_, entry)| entry.highest.get(&chain).is_some_and(|highest| *highest > released))
            .map(|(number, entry)| (*number, entry.valid))
            .collect()
    }

    /// Number of files on the disk.
    pub(super) fn file_count(&self) -> usize {
        self.older.len() + usize::from(self.current.is_some())
    }
}
