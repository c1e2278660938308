//! The acting half of the journal: seals records, writes, syncs, begins and removes files, as [`super::catalog`]
//! decides.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use replication::ChainId;
use world::{AppendFile, Entropy, Files, durable};

use super::catalog::{Admission, Catalog, Placement};
use super::format::{FRAME_OVERHEAD, FileKey, FileNumber, HostKey, SYNC_ALIGN, hexadecimal};
use super::record::{ChainState, Record};
use super::replay::{self, ChangeReader, TornTail};
use super::{JournalConfig, JournalError};

/// Bytes that are collected before they are given to the operating system.
const WRITE_BYTES: usize = 256 << 10;

/// A record's place in the order of everything appended since the journal was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct JournalPosition(pub u64);

/// What a journal held when it was opened.
#[derive(Debug, Clone, Default)]
pub struct Recovered {
    /// Every chain that it knows. Those with [`ChainState::has_uncommitted`] are read with [`Journal::changes_of`].
    pub chains: BTreeMap<ChainId, ChainState>,
    /// What a crash left at the end, if anything.
    pub torn: Option<TornTail>,
}

/// What a journal did since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalCounters {
    /// Records appended.
    pub records: u64,
    /// Bytes written, framing and padding included.
    pub written_bytes: u64,
    /// Syncs of files that held new records.
    pub syncs: u64,
    /// Files begun.
    pub files_created: u64,
    /// Files removed.
    pub files_removed: u64,
}

/// The file being written.
struct OpenFile {
    number: FileNumber,
    file: Box<dyn AppendFile>,
    key: FileKey,
    next_ordinal: u64,
    /// Sealed frames that the operating system was not given yet.
    pending: Vec<u8>,
    /// Bytes of the file, pending ones included.
    bytes: u64,
    /// Bytes known to be durable.
    synced: u64,
}

/// A journal in one directory. Single-threaded; exactly one may be open per directory.
pub struct Journal {
    files: Arc<dyn Files>,
    entropy: Arc<dyn Entropy>,
    directory: String,
    host: HostKey,
    catalog: Catalog,
    /// `None` once a write failed.
    open: Option<OpenFile>,
    next_number: u64,
    appended: JournalPosition,
    durable: JournalPosition,
    counters: JournalCounters,
}

impl Journal {
    /// Opens the journal in `directory`, creating it if there is none, and begins a new file.
    ///
    /// # Errors
    /// [`JournalError::Damaged`], [`JournalError::FileMissing`], [`JournalError::Undefined`]: what was durable cannot be
    /// read; the files are left as they are. Move the directory aside (its chains then need a heal) or restore it.
    pub fn open(
        files: Arc<dyn Files>,
        entropy: Arc<dyn Entropy>,
        directory: &str,
        config: JournalConfig,
        host: &HostKey,
    ) -> Result<(Journal, Recovered), JournalError> {
        config.check()?;
        files.create_directory(directory).map_err(|source| JournalError::io("create", directory, source))?;
        durable::sweep(&*files, directory).map_err(|source| JournalError::io("clean", directory, source))?;
        let mut found = replay::take_stock(&*files, directory, host)?;
        if found.has_tail
            && let Some((newest, bytes)) = found.files.last_mut()
        {
            // What a process that was killed had written but not synced can be read and may still be lost. From now on it
            // counts as journaled, and newer files describe it as whole: it is written anew, since a sync that follows a
            // failed one proves nothing.
            let path = format!("{directory}/{}", newest.number);
            let mut contents = files.read(&path).map_err(|source| JournalError::io("read", &path, source))?;
            contents.truncate(usize::try_from(newest.valid).expect("a file that was read fits into memory"));
            let unique = hexadecimal(&entropy.bytes::<8>());
            durable::replace_private(&*files, &path, &contents, &unique)
                .map_err(|source| JournalError::io("write", &path, source))?;
            *bytes = newest.valid;
        }
        let recovered = Recovered { chains: found.chains.clone(), torn: found.torn };
        let mut catalog = Catalog::new(config);
        for (chain, state) in found.chains {
            catalog.recover_chain(chain, state);
        }
        for (file, bytes) in found.files {
            catalog.recover_file(file, bytes);
        }
        for number in found.leftovers {
            catalog.creation_failed(number, 0);
        }
        let mut journal = Journal {
            files,
            entropy,
            directory: directory.to_owned(),
            host: host.clone(),
            catalog,
            open: None,
            next_number: found.highest.map_or(0, |number| number.0) + 1,
            appended: JournalPosition(0),
            durable: JournalPosition(0),
            counters: JournalCounters::default(),
        };
        if let Some(torn) = recovered.torn {
            tracing::info!(file = %torn.number, offset = torn.offset, bytes = torn.bytes, "cut the torn tail of the journal");
        }
        journal.restart()?;
        Ok((journal, recovered))
    }

    /// Appends a record. Not durable before [`Journal::sync`].
    ///
    /// # Errors
    /// [`JournalError::Full`]: nothing changed. [`JournalError::Io`]: the journal is poisoned. Others: nothing changed.
    pub fn append(&mut self, record: &Record) -> Result<JournalPosition, JournalError> {
        self.append_as(record, Admission::Check)
    }

    pub(super) fn append_granted(&mut self, record: &Record) -> Result<JournalPosition, JournalError> {
        self.append_as(record, Admission::Granted)
    }

    fn append_as(&mut self, record: &Record, admission: Admission) -> Result<JournalPosition, JournalError> {
        if self.open.is_none() {
            return Err(JournalError::Poisoned);
        }
        let encoded = record.encode()?;
        let frame_bytes = (encoded.len() + FRAME_OVERHEAD) as u64;
        let placement = match self.catalog.place(record, frame_bytes, admission) {
            Err(JournalError::Full { .. }) if self.catalog.current_is_replaceable() => {
                self.begin_next_file()?;
                self.catalog.place(record, frame_bytes, admission)?
            }
            other => other?,
        };
        if placement == Placement::NewFile {
            self.begin_next_file()?;
        }
        let open = self.open.as_mut().ok_or(JournalError::Poisoned)?;
        open.pending.reserve(frame_bytes as usize);
        open.key.seal(&mut open.pending, open.next_ordinal, open.synced, |out| encoded.write(out));
        open.next_ordinal += 1;
        open.bytes += frame_bytes;
        self.catalog.appended(record, frame_bytes);
        self.counters.records += 1;
        self.appended.0 += 1;
        let position = self.appended;
        if open.pending.len() >= WRITE_BYTES {
            self.write_pending()?;
        }
        Ok(position)
    }

    /// Gives everything appended to the system: from then on it survives the end of this process, but not of the machine.
    ///
    /// # Errors
    /// As [`Journal::sync`].
    pub fn write_through(&mut self) -> Result<(), JournalError> {
        self.write_pending()
    }

    /// Makes everything appended durable; returns the position through which that holds. Then removes the files that
    /// are needed no more.
    ///
    /// # Errors
    /// The journal is poisoned. Everything up to [`Journal::durable`] is safe, nothing after it.
    pub fn sync(&mut self) -> Result<JournalPosition, JournalError> {
        self.make_durable()?;
        self.remove_released();
        Ok(self.durable)
    }

    /// Begins a new file, whatever happened to the one before. Afterwards [`Journal::durable`] is the last position
    /// that exists: the caller appends again what came after it.
    ///
    /// # Errors
    /// The journal is poisoned (still, or now); call again.
    pub fn restart(&mut self) -> Result<(), JournalError> {
        self.open = None;
        self.appended = self.durable;
        self.catalog.abandoned();
        self.create_file()?;
        self.remove_released();
        Ok(())
    }

    /// Whether a write failed since the last [`Journal::restart`].
    pub fn is_poisoned(&self) -> bool {
        self.open.is_none()
    }

    /// The last position that is durable.
    pub fn durable(&self) -> JournalPosition {
        self.durable
    }

    /// Bytes that [`Record::Changes`] may still take, framing included.
    pub fn free_bytes(&self) -> u64 {
        self.catalog.free_bytes()
    }

    /// Bytes on the disk.
    pub fn used_bytes(&self) -> u64 {
        self.catalog.total_bytes()
    }

    /// Number of files on the disk.
    pub fn file_count(&self) -> usize {
        self.catalog.file_count()
    }

    /// The chains whose uncommitted changes keep the oldest file.
    pub fn pinned_by(&self) -> Vec<ChainId> {
        self.catalog.pinned_by()
    }

    /// Every chain, as its durable records say.
    pub fn chains(&self) -> BTreeMap<ChainId, ChainState> {
        self.catalog.chains()
    }

    /// A reader of the durable changes of `chain` that are neither committed nor dropped.
    pub fn changes_of(&self, chain: ChainId) -> ChangeReader {
        ChangeReader {
            files: Arc::clone(&self.files),
            directory: self.directory.clone(),
            host: self.host.clone(),
            chain,
            released: self.catalog.chain(chain).map_or_else(Default::default, |state| state.released),
            last: self.catalog.last(chain),
            intent: self.catalog.chain(chain).and_then(|state| state.intent),
            parts: self.catalog.files_of(chain),
        }
    }

    /// What was done so far.
    pub fn counters(&self) -> JournalCounters {
        self.counters
    }

    /// Upper bound of what a new file begins with, in bytes.
    pub(super) fn opening_bytes(&self) -> u64 {
        self.catalog.opening_bytes()
    }

    fn write_pending(&mut self) -> Result<(), JournalError> {
        let open = self.open.as_mut().ok_or(JournalError::Poisoned)?;
        if open.pending.is_empty() {
            return Ok(());
        }
        match open.file.append(&open.pending) {
            Ok(()) => {
                self.counters.written_bytes += open.pending.len() as u64;
                open.pending.clear();
                Ok(())
            }
            Err(source) => Err(self.poison("write", source)),
        }
    }

    pub(super) fn make_durable(&mut self) -> Result<(), JournalError> {
        let open = self.open.as_mut().ok_or(JournalError::Poisoned)?;
        if open.bytes == open.synced {
            return Ok(());
        }
        let padding = open.bytes.next_multiple_of(SYNC_ALIGN) - open.bytes;
        open.pending.resize(open.pending.len() + padding as usize, 0);
        open.bytes += padding;
        self.catalog.padded(padding);
        self.write_pending()?;
        let open = self.open.as_mut().ok_or(JournalError::Poisoned)?;
        if let Err(source) = open.file.sync() {
            return Err(self.poison("sync", source));
        }
        open.synced = open.bytes;
        self.counters.syncs += 1;
        self.durable = self.appended;
        self.catalog.synced();
        Ok(())
    }

    /// No byte since the last sync can be trusted to ever become durable, and asking again would be answered with a
    /// lie: the file ends where it was last synced.
    fn poison(&mut self, action: &'static str, source: io::Error) -> JournalError {
        let number = self.open.take().map_or(FileNumber(0), |open| open.number);
        let path = format!("{}/{number}", self.directory);
        tracing::warn!(%path, action, error = %source, "a journal file failed");
        JournalError::io(action, &path, source)
    }

    fn begin_next_file(&mut self) -> Result<(), JournalError> {
        self.make_durable()?;
        // Nothing may be appended to the old file once the new one may exist: it says where the old one ends.
        self.open = None;
        self.catalog.finished();
        self.create_file()?;
        self.remove_released();
        Ok(())
    }

    fn create_file(&mut self) -> Result<(), JournalError> {
        let number = FileNumber(self.next_number);
        self.next_number += 1;
        let (key, mut bytes) = FileKey::create(&self.host, number, self.entropy.bytes());
        let opening = self.catalog.opening().encode();
        key.seal(&mut bytes, 0, 0, |out| out.extend_from_slice(&opening));
        bytes.resize((bytes.len() as u64).next_multiple_of(SYNC_ALIGN) as usize, 0);
        let len = bytes.len() as u64;
        let path = format!("{}/{number}", self.directory);
        let unique = hexadecimal(&self.entropy.bytes::<8>());
        match durable::publish_growing(&*self.files, &path, &[&bytes], &unique) {
            Ok(file) => {
                self.catalog.created(number, len);
                let pending = Vec::with_capacity(2 * WRITE_BYTES);
                self.open = Some(OpenFile { number, file, key, next_ordinal: 1, pending, bytes: len, synced: len });
                self.counters.files_created += 1;
                self.counters.written_bytes += len;
                Ok(())
            }
            Err(source) => {
                self.catalog.creation_failed(number, len);
                Err(JournalError::io("create", &path, source))
            }
        }
    }

    /// Removes the files that are needed no more. Failing to remove one costs room, nothing else: it is tried again after
    /// the next sync. `true` if the journal has become smaller.
    pub(super) fn remove_released(&mut self) -> bool {
        let mut removed = false;
        for number in self.catalog.removable() {
            let path = format!("{}/{number}", self.directory);
            match self.files.remove(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(%path, %error, "could not remove a journal file that is needed no more");
                    continue;
                }
            }
            self.catalog.removed(number);
            self.counters.files_removed += 1;
            removed = true;
        }
        if removed && let Err(error) = self.files.sync_directory(&self.directory) {
            // A name that comes back is recognised at the next start.
            tracing::warn!(%error, "could not make the removal of journal files durable");
        }
        removed
    }
}
