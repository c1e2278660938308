//! Reading a journal back: after a start, and while it is being written.
//!
//! A file that a newer one describes must be whole to the length given there. Only the newest file may end in a torn
//! tail, and only where no later frame bears witness that the bytes before it had been synced.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use replication::{ChainId, SequenceNumber};
use world::Files;

use super::JournalError;
use super::format::{
    FRAME_HEADER_BYTES, FileKey, FileNumber, FrameHeader, HEADER_BYTES, HeaderError, HostKey, SYNC_ALIGN, TAG_BYTES,
    parse_file_name,
};
use super::record::{ChainState, Manifest, OlderFile, Opening, Record};

/// Bytes read at a time.
const WINDOW_BYTES: u64 = 1 << 20;

/// Why the next frame cannot be had.
enum FrameError {
    Read(io::Error),
    Bad(&'static str),
}

/// The frames of one file, in order.
struct FrameReader<'a> {
    files: &'a dyn Files,
    path: String,
    number: FileNumber,
    key: FileKey,
    /// Length of the part of the file that counts.
    end: u64,
    offset: u64,
    ordinal: u64,
    window: Bytes,
    window_start: u64,
}

impl<'a> FrameReader<'a> {
    fn open(
        files: &'a dyn Files,
        directory: &str,
        host: &HostKey,
        number: FileNumber,
        end: u64,
    ) -> Result<FrameReader<'a>, JournalError> {
        let path = format!("{directory}/{number}");
        let header = match files.read_at(&path, 0, HEADER_BYTES) {
            Ok(header) => header,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(JournalError::FileMissing { number }),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(JournalError::Damaged { number, offset: 0, what: "the header is cut off" });
            }
            Err(source) => return Err(JournalError::io("read", &path, source)),
        };
        let key = FileKey::open(host, number, &header).map_err(|error| match error {
            HeaderError::Damaged(what) => JournalError::Damaged { number, offset: 0, what },
            HeaderError::Version(version) => JournalError::Version { number, version },
            HeaderError::WrongKey => JournalError::WrongKey { number },
        })?;
        let offset = HEADER_BYTES as u64;
        let window = Bytes::new();
        Ok(FrameReader { files, path, number, key, end, offset, ordinal: 0, window, window_start: 0 })
    }

    /// The bytes from `offset`, at least `len` of them if the file has as many.
    fn bytes(&mut self, offset: u64, len: u64) -> io::Result<Bytes> {
        let window_end = self.window_start + self.window.len() as u64;
        let wanted_end = (offset + len).min(self.end);
        if offset < self.window_start || wanted_end > window_end {
            let load = len.max(WINDOW_BYTES).min(self.end - offset.min(self.end));
            self.window = Bytes::new();
            self.window = self.files.read_at(&self.path, offset, load as usize)?.into();
            self.window_start = offset;
        }
        Ok(self.window.slice((offset - self.window_start) as usize..))
    }

    /// Steps over the zeroes in front of the next frame. True at the end.
    fn skip_padding(&mut self) -> Result<bool, FrameError> {
        let at = self.offset;
        if at == self.end {
            return Ok(true);
        }
        let head = self.bytes(at, FRAME_HEADER_BYTES as u64).map_err(FrameError::Read)?;
        if head.starts_with(self.key.sync_word()) || at.is_multiple_of(SYNC_ALIGN) {
            return Ok(false);
        }
        let boundary = at.next_multiple_of(SYNC_ALIGN).min(self.end);
        let padding = self.bytes(at, boundary - at).map_err(FrameError::Read)?;
        if padding[..(boundary - at) as usize].iter().any(|byte| *byte != 0) {
            return Err(FrameError::Bad("neither a record nor padding begins here"));
        }
        self.offset = boundary;
        Ok(self.offset == self.end)
    }

    /// The next frame's plaintext, or `None` at the end. After an error, [`FrameReader::offset`] is where it is.
    fn next(&mut self) -> Result<Option<Bytes>, FrameError> {
        if self.skip_padding()? {
            return Ok(None);
        }
        let head = self.bytes(self.offset, FRAME_HEADER_BYTES as u64).map_err(FrameError::Read)?;
        let header = self.key.frame_header(&head).ok_or(FrameError::Bad("no record begins here"))?;
        if header.ordinal != self.ordinal {
            return Err(FrameError::Bad("a record is missing"));
        }
        let body = self.offset + FRAME_HEADER_BYTES as u64;
        let sealed_len = u64::from(header.len) + TAG_BYTES as u64;
        if sealed_len > self.end - body.min(self.end) {
            return Err(FrameError::Bad("a record is cut off"));
        }
        let mut sealed = self.bytes(body, sealed_len).map_err(FrameError::Read)?[..sealed_len as usize].to_vec();
        if self.key.open_frame(header, &mut sealed).is_none() {
            return Err(FrameError::Bad("a record does not match its authentication tag"));
        }
        sealed.truncate(header.len as usize);
        self.offset = body + sealed_len;
        self.ordinal += 1;
        Ok(Some(sealed.into()))
    }

    /// As [`FrameReader::next`], for a file that must be whole.
    fn next_whole(&mut self) -> Result<Option<Bytes>, JournalError> {
        match self.next() {
            Ok(frame) => Ok(frame),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, error: FrameError) -> JournalError {
        match error {
            FrameError::Bad(what) => self.damaged(what),
            FrameError::Read(error) if error.kind() == io::ErrorKind::NotFound => {
                JournalError::FileMissing { number: self.number }
            }
            FrameError::Read(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.damaged("the file is shorter than it was")
            }
            FrameError::Read(source) => JournalError::io("read", &self.path, source),
        }
    }

    fn damaged(&self, what: &'static str) -> JournalError {
        JournalError::Damaged { number: self.number, offset: self.offset, what }
    }

    fn undefined(&self, source: replication::codec::DecodeError) -> JournalError {
        JournalError::Undefined { number: self.number, before_offset: self.offset, source }
    }

    fn opening(&mut self) -> Result<Opening, JournalError> {
        let first = self.next_whole()?.ok_or_else(|| self.damaged("the opening record is missing"))?;
        Opening::decode(first).map_err(|source| self.undefined(source))
    }

    /// Whether a frame behind the current offset proves that the file had been synced beyond it.
    fn is_contradicted(&self) -> io::Result<bool> {
        let rest = self.files.read_at(&self.path, self.offset, (self.end - self.offset) as usize)?;
        let word = self.key.sync_word();
        let mut at = 0;
        while let Some(found) = find(&rest[at..], word) {
            let header = self.key.frame_header(&rest[at + found..]);
            let body = at + found + FRAME_HEADER_BYTES;
            at += found + 1;
            let Some(header) = header else { break };
            if header.synced > self.offset && self.is_authentic(header, rest.get(body..).unwrap_or_default()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_authentic(&self, header: FrameHeader, rest: &[u8]) -> bool {
        let sealed = rest.get(..header.len as usize + TAG_BYTES);
        sealed.is_some_and(|sealed| self.key.open_frame(header, &mut sealed.to_vec()).is_some())
    }
}

fn find(haystack: &[u8], word: &[u8; 8]) -> Option<usize> {
    let mut at = 0;
    while let Some(next) = haystack[at..].iter().position(|byte| *byte == word[0]) {
        at += next;
        if haystack[at..].starts_with(word) {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// Bytes at the end of the newest file that a crash left unfinished. None of them had been promised to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TornTail {
    /// The file.
    pub number: FileNumber,
    /// Where what counts ends.
    pub offset: u64,
    /// How many bytes follow.
    pub bytes: u64,
}

/// What was found at start-up.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) chains: BTreeMap<ChainId, ChainState>,
    /// Files that count, with their length on the disk; the newest is last.
    pub(super) files: Vec<(OlderFile, u64)>,
    /// Files that do not.
    pub(super) leftovers: Vec<FileNumber>,
    pub(super) torn: Option<TornTail>,
    /// The newest file holds records that may have been written without being synced.
    pub(super) has_tail: bool,
    /// Highest number ever seen.
    pub(super) highest: Option<FileNumber>,
}

/// Reads the newest file and takes stock of the others; reads none of their changes.
pub(super) fn take_stock(files: &dyn Files, directory: &str, host: &HostKey) -> Result<Found, JournalError> {
    let names = files.list_files(directory).map_err(|source| JournalError::io("list", directory, source))?;
    let mut numbers: Vec<FileNumber> = names.iter().filter_map(|name| parse_file_name(name)).collect();
    numbers.sort_unstable();
    let Some(newest) = numbers.pop() else { return Ok(Found::default()) };
    let len_of = |number: FileNumber| {
        let path = format!("{directory}/{number}");
        files.len(&path).map_err(|source| JournalError::io("measure", &path, source))
    };
    let len = len_of(newest)?;
    let mut reader = FrameReader::open(files, directory, host, newest, len)?;
    let opening = reader.opening()?;
    let mut chains = opening.chains;
    let mut highest: BTreeMap<ChainId, SequenceNumber> = BTreeMap::new();
    let torn = loop {
        match reader.next() {
            Ok(None) => break None,
            Ok(Some(plain)) => {
                let record = Record::decode(plain).map_err(|source| reader.undefined(source))?;
                let state = chains.entry(record.chain()).or_default();
                state.apply(&record);
                if let Record::Changes { chain, .. } = &record {
                    highest.insert(*chain, state.last);
                }
            }
            Err(error @ FrameError::Read(_)) => return Err(reader.failed(error)),
            Err(FrameError::Bad(what)) => {
                if reader.is_contradicted().map_err(|error| reader.failed(FrameError::Read(error)))? {
                    return Err(reader.damaged(what));
                }
                break Some(TornTail { number: newest, offset: reader.offset, bytes: len - reader.offset });
            }
        }
    };
    let has_tail = reader.ordinal > 1;
    let mut found = Found { chains, torn, has_tail, highest: Some(newest), ..Found::default() };
    for file in opening.files {
        match numbers.binary_search(&file.number) {
            Ok(index) => {
                numbers.remove(index);
                let bytes = len_of(file.number)?;
                found.files.push((file, bytes));
            }
            Err(_) => {
                let needed = |(chain, highest): (&ChainId, &SequenceNumber)| {
                    found.chains.get(chain).is_some_and(|state| *highest > state.released)
                };
                if file.highest.iter().any(needed) {
                    return Err(JournalError::FileMissing { number: file.number });
                }
            }
        }
    }
    found.leftovers = numbers;
    found.files.push((OlderFile { number: newest, valid: reader.offset, highest }, len));
    Ok(found)
}

/// What [`ChangeReader::visit`] shows, in the order in which it was journaled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// The chain as it was when the next file began.
    State(Box<ChainState>),
    /// A record of the chain. Of [`Record::Changes`] only the changes that are neither committed nor dropped.
    Record(Record),
}

/// Reads the changes of one chain that are durable in the journal and not yet released, a record at a time.
///
/// Independent of the writer: it sees what was durable when it was made. Files do not vanish under it as long as nobody
/// commits or drops the chain.
#[derive(Clone)]
pub struct ChangeReader {
    pub(super) files: Arc<dyn Files>,
    pub(super) directory: String,
    pub(super) host: HostKey,
    pub(super) chain: ChainId,
    pub(super) released: SequenceNumber,
    pub(super) last: SequenceNumber,
    pub(super) intent: Option<Manifest>,
    /// Files and how many of their bytes count, ascending.
    pub(super) parts: Vec<(FileNumber, u64)>,
}

impl ChangeReader {
    /// The newest change of the chain that the journal was ever given, or knows to be committed or dropped.
    pub fn last(&self) -> SequenceNumber {
        self.last
    }

    /// The manifest that may have been created without anybody's having heard of it.
    pub fn intent(&self) -> Option<Manifest> {
        self.intent
    }

    /// Leaves out everything up to and including `sequence`.
    pub fn after(mut self, sequence: SequenceNumber) -> ChangeReader {
        self.released = self.released.max(sequence);
        self
    }

    /// Calls `visit` for everything there is, until it breaks. At most one record is in memory at a time.
    ///
    /// # Errors
    /// [`JournalError::Damaged`] and [`JournalError::FileMissing`]: what was visited before is sound, what follows is
    /// lost; the caller drops the chain and heals.
    pub fn visit<B>(&self, mut visit: impl FnMut(Replayed) -> ControlFlow<B>) -> Result<Option<B>, JournalError> {
        for (number, valid) in &self.parts {
            let mut reader = FrameReader::open(&*self.files, &self.directory, &self.host, *number, *valid)?;
            let opening = reader.opening()?;
            let state = opening.chains.get(&self.chain).cloned().unwrap_or_default();
            if let ControlFlow::Break(value) = visit(Replayed::State(Box::new(state))) {
                return Ok(Some(value));
            }
            while let Some(plain) = reader.next_whole()? {
                let mut record = Record::decode(plain).map_err(|source| reader.undefined(source))?;
                if record.chain() != self.chain {
                    continue;
                }
                if let Record::Changes { changes, .. } = &mut record {
                    changes.retain(|change| change.sequence > self.released);
                    if changes.is_empty() {
                        continue;
                    }
                }
                if let ControlFlow::Break(value) = visit(Replayed::Record(record)) {
                    return Ok(Some(value));
                }
            }
        }
        Ok(None)
    }
}
