//! Fuzz targets of the journal: its records, and whole files. Compiled for tests and fuzzers only.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use replication::SequenceNumber;
use world::{AppendFile, Files};

use super::JournalError;
use super::format::{FileKey, FileNumber, HEADER_BYTES, HostKey, SYNC_ALIGN};
use super::record::{Opening, Record};
use super::replay::{ChangeReader, Replayed, TornTail, take_stock};

/// Files that are only read.
#[derive(Default)]
struct Still(BTreeMap<String, Vec<u8>>);

impl Still {
    fn file(&self, path: &str) -> io::Result<&[u8]> {
        self.0.get(path).map(Vec::as_slice).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Files for Still {
    fn create_new(&self, _: &str) -> io::Result<Box<dyn AppendFile>> {
        unreachable!("replay reads")
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.file(path).map(<[u8]>::to_vec)
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let rest = self.file(path)?.get(offset as usize..).unwrap_or_default();
        rest.get(..len).map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn len(&self, path: &str) -> io::Result<u64> {
        self.file(path).map(|file| file.len() as u64)
    }

    fn link(&self, _: &str, _: &str) -> io::Result<()> {
        unreachable!("replay reads")
    }

    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        unreachable!("replay reads")
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        unreachable!("replay reads")
    }

    fn create_directory(&self, _: &str) -> io::Result<()> {
        unreachable!("replay reads")
    }

    fn sync_directory(&self, _: &str) -> io::Result<()> {
        unreachable!("replay reads")
    }

    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        let inside = |name: &String| name.strip_prefix(path)?.strip_prefix('/').map(str::to_owned);
        Ok(self.0.keys().filter_map(inside).collect())
    }

    fn list_directories(&self, _: &str) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }
}

fn host() -> HostKey {
    HostKey::new([5; 32])
}

/// A record or an opening record, as a frame's plaintext.
pub fn journal_record(data: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(opening) = Opening::decode(bytes.clone()) {
        assert_eq!(Opening::decode(opening.encode().into()), Ok(opening));
        return true;
    }
    let Ok(record) = Record::decode(bytes) else { return false };
    let mut written = Vec::new();
    record.encode().expect("what was read may be written").write(&mut written);
    assert_eq!(Record::decode(written.into()), Ok(record));
    true
}

/// The file of the host's key and a file's header.
pub fn journal_header(data: &[u8]) -> bool {
    let key = HostKey::parse(data);
    if let Ok(key) = &key {
        assert_eq!(key.file_contents()[..], *data, "a key file has one form");
    }
    let header = FileKey::open(&host(), FileNumber(7), &data[..data.len().min(HEADER_BYTES)]);
    key.is_ok() || header.is_ok()
}

/// A whole file: the input is a run of `command u8 ‖ length u16 LE ‖ bytes`, written under the right key, so that
/// every step of the replay is reached.
///
/// Commands: 0 and above 3 a frame with that plaintext, 1 raw bytes, 2 a frame that claims to come after a sync,
/// 3 padding to the next sync.
pub fn journal_file(data: &[u8]) -> bool {
    let (key, mut file) = FileKey::create(&host(), FileNumber(1), [3; 32]);
    let (mut rest, mut ordinal, mut synced) = (data, 0, 0);
    while let Some((&[command, low, high], after)) = rest.split_first_chunk::<3>() {
        let (bytes, after) = after.split_at(usize::from(u16::from_le_bytes([low, high])).min(after.len()));
        rest = after;
        match command {
            1 => file.extend_from_slice(bytes),
            3 => {
                file.resize(file.len().next_multiple_of(SYNC_ALIGN as usize), 0);
                synced = file.len() as u64;
            }
            _ => {
                let claimed = if command == 2 { file.len() as u64 + 1 } else { synced };
                key.seal(&mut file, ordinal, claimed, |out| out.extend_from_slice(bytes));
                ordinal += 1;
            }
        }
    }
    let (directory, host, len) = ("journal", host(), file.len() as u64);
    let files: Arc<dyn Files> = Arc::new(Still([(format!("{directory}/{}", FileNumber(1)), file)].into()));
    let found = match take_stock(&*files, directory, &host) {
        Ok(found) => found,
        Err(JournalError::Io { source, .. }) => panic!("the files are all there: {source}"),
        Err(_) => return false,
    };
    let valid = found.files.last().map(|(file, _)| file.valid).expect("there is one file");
    assert_eq!(valid + found.torn.map_or(0, |TornTail { bytes, .. }| bytes), len, "every byte counts or is torn off");
    for (chain, state) in &found.chains {
        let parts = vec![(FileNumber(1), valid)];
        let (files, directory, released) = (files.clone(), directory.to_owned(), SequenceNumber(0));
        let reader = ChangeReader {
            files,
            directory,
            host: host.clone(),
            chain: *chain,
            released,
            last: released,
            intent: None,
            parts,
        };
        let mut last = None;
        let visited = reader.visit(|replayed| {
            if let Replayed::Record(Record::Changes { changes, .. }) = &replayed {
                last = changes.last().map(|change| change.sequence);
            }
            ControlFlow::<()>::Continue(())
        });
        visited.expect("what was taken stock of can be read back");
        assert!(last.is_none() || state.dropped.is_some() || last <= Some(state.last), "{last:?} of {state:?}");
    }
    found.torn.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::replay::replay;
    use crate::journal::ChainState;
    use crate::journal::record::{Manifest, ManifestNonce, ManifestNumber, NoteKind, OlderFile, Session};
    use replication::{ByteRange, ChainId, Change, ChangeKind, DiskId, Generation, MachineId, SourceTime, StreamHash};

    const CHAIN: ChainId = ChainId([1; 16]);

    fn manifest() -> Manifest {
        Manifest { number: ManifestNumber(7), nonce: ManifestNonce([2; 16]) }
    }

    fn session() -> Session {
        Session { machine: MachineId([3; 16]), generation: Generation(2), head: manifest() }
    }

    fn records() -> Vec<(&'static str, Record)> {
        let change = |sequence, kind| Change {
            sequence: SequenceNumber(sequence),
            time: SourceTime(sequence),
            disk: DiskId(0),
            continues: false,
            kind,
        };
        let changes = vec![
            change(5, ChangeKind::Write { range: ByteRange::new(4096, 5), data: Bytes::from_static(b"bytes") }),
            change(6, ChangeKind::Zero { range: ByteRange::new(0, 4096) }),
        ];
        let (chain, sequence) = (CHAIN, SequenceNumber(6));
        vec![
            ("session", Record::SessionOpened { chain, session: session() }),
            ("changes", Record::Changes { chain, changes }),
            ("hash", Record::StreamHash { chain, sequence, hash: StreamHash([4; 32]) }),
            ("intent", Record::Intent { chain, manifest: manifest() }),
            ("note", Record::Note { chain, kind: NoteKind(1), bytes: Bytes::from_static(b"note") }),
            ("committed", Record::Committed { chain, through: sequence, number: ManifestNumber(8) }),
            ("dropped", Record::Dropped { chain, reason: "moved away".into() }),
        ]
    }

    fn bytes(record: &Record) -> Vec<u8> {
        let mut out = Vec::new();
        record.encode().expect("within the limits").write(&mut out);
        out
    }

    fn opening() -> Opening {
        let state = ChainState {
            session: Some(session()),
            last: SequenceNumber(9),
            committed: Some((SequenceNumber(3), ManifestNumber(6))),
            stream_hash: Some((SequenceNumber(9), StreamHash([4; 32]))),
            intent: Some(manifest()),
            notes: [(NoteKind(2), Bytes::from_static(b"n"))].into(),
            ..ChainState::default()
        };
        let older = OlderFile { number: FileNumber(0), valid: 4096, highest: [(CHAIN, SequenceNumber(9))].into() };
        Opening { chains: [(CHAIN, state)].into(), files: vec![older] }
    }

    #[test]
    fn journal_records() {
        let mut seeds: Vec<_> = records().iter().map(|(name, record)| (*name, bytes(record))).collect();
        seeds.push(("opening", opening().encode()));
        replay("journal_record", journal_record, &seeds);
    }

    #[test]
    fn journal_headers() {
        let (_, header) = FileKey::create(&host(), FileNumber(7), [3; 32]);
        replay("journal_header", journal_header, &[("key", host().file_contents().to_vec()), ("header", header)]);
    }

    #[test]
    fn journal_files() {
        let command = |command: u8, bytes: &[u8]| [&[command][..], &(bytes.len() as u16).to_le_bytes(), bytes].concat();
        let first = command(0, &Opening { files: Vec::new(), ..opening() }.encode());
        let all: Vec<u8> = records().iter().flat_map(|(_, record)| command(0, &bytes(record))).collect();
        let whole = [first.clone(), all.clone(), command(3, &[])].concat();
        let synced = [first.clone(), command(3, &[]), all].concat();
        replay("journal_file", journal_file, &[("whole", whole), ("synced", synced.clone())]);
        // Torn behind the last sync, and contradicted by a frame that had seen a sync.
        assert!(!journal_file(&[synced.clone(), command(1, b"torn")].concat()));
        let witness = command(2, &bytes(&records()[0].1));
        assert!(!journal_file(&[first, command(1, b"torn"), witness].concat()));
    }
}
