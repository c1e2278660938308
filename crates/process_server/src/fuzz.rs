//! Fuzz targets of this crate: its journal, its notes, its configuration. Compiled for tests and fuzzers only; see
//! `fuzz/README.md`.

use bytes::Bytes;

use crate::config::ServerConfig;
pub use crate::journal::fuzz::{journal_file, journal_header, journal_record};
use crate::notes::{DisksNote, GapNote};

/// What is noted in the journal about open gaps and disks that are gone.
pub fn gap_note(data: &[u8]) -> bool {
    if let Ok(note) = DisksNote::decode(Bytes::copy_from_slice(data)) {
        assert_eq!(DisksNote::decode(note.encode()), Ok(note));
        return true;
    }
    if let Ok(notes) = GapNote::decode_list(Bytes::copy_from_slice(data)) {
        assert_eq!(GapNote::decode_list(GapNote::encode_list(notes.iter())), Ok(notes));
    }
    let Ok(note) = GapNote::decode(Bytes::copy_from_slice(data)) else { return false };
    if let Some(note) = &note {
        assert_eq!(GapNote::decode(note.encode()), Ok(Some(note.clone())));
    }
    true
}

/// The configuration file.
pub fn server_config(data: &[u8]) -> bool {
    let Some(config) = std::str::from_utf8(data).ok().and_then(|text| ServerConfig::parse(text).ok()) else {
        return false;
    };
    let pace = config.pace();
    assert!((1 << 20..=32 << 20).contains(&pace.seal_bytes), "{pace:?}");
    true
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
pub(crate) mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use replication::{DiskId, PointTime, Reach, SequenceNumber};

    #[test]
    fn gap_notes() {
        let note =
            GapNote { at: SequenceNumber(5), reach: Reach::Machine, time: PointTime(6), cause: "overflow".into() };
        let disks = DisksNote { at: SequenceNumber(7), time: PointTime(8), disks: vec![DiskId(0), DiskId(3)] };
        let seeds = [("open", note.encode()), ("none", Bytes::new()), ("disks", disks.encode())];
        replay::replay("gap_note", gap_note, &seeds.map(|(name, bytes)| (name, bytes.to_vec())));
    }

    #[test]
    fn server_configs() {
        let least = b"state_dir = '/a'\nvault = '/b'\n".to_vec();
        let more = b"state_dir = '/a'\nvault = '/b'\nseal_interval_ms = 1000\nseal_bytes = 9\nworkers = 2\n".to_vec();
        replay::replay("server_config", server_config, &[("least", least), ("more", more)]);
    }
}
