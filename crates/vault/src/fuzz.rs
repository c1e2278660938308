//! Fuzz targets of this crate: what stands in a vault's objects, and what people type or keep in files to open one.
//! Compiled for tests and fuzzers only; see `fuzz/README.md`.
//!
//! What is encrypted and signed is fuzzed as plaintext: a writer that was taken over can sign anything.

use bytes::Bytes;
use replication::PointTime;
use replication::codec::{DecodeError, Decoder, Encoder};
use world::WallTime;

use crate::catalog::{CatalogEntry, decode_content};
use crate::keys::{Grant, KeySlot, RecoveryKey, WriterKeys};
use crate::layer::LayerRef;
use crate::manifest::{decode_manifest, encode_manifest};
use crate::object::{Header, Parse, frame_survives};
use crate::pack::{decode_index, encode_index};
use crate::points::Moment;
use crate::store::ObjectName;
use crate::table::Tree;
use crate::table_page::{LeafWriter, Page};
use crate::table_root::{Root, Sources, decode_source_page};

fn name() -> ObjectName {
    ObjectName::new("fuzz/1").expect("a name")
}

/// Decodes, encodes and decodes again; what is accepted means one thing only.
fn one_meaning<T: PartialEq + std::fmt::Debug>(
    data: &[u8],
    decode: impl Fn(&mut Decoder) -> Result<T, DecodeError>,
    encode: impl Fn(&T, &mut Encoder),
) -> bool {
    let mut input = Decoder::new(data.to_vec());
    let Ok(value) = decode(&mut input) else { return false };
    let mut out = Encoder::new();
    encode(&value, &mut out);
    assert_eq!(decode(&mut Decoder::new(out.finish())), Ok(value));
    true
}

/// A moment as somebody types it. What is understood is printed to something that is understood the same.
pub fn moment(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let moment = match text.parse::<Moment>() {
        Ok(moment) => moment,
        Err(error) => {
            assert!(!error.why.is_empty() && error.text == text.trim());
            return false;
        }
    };
    let printed = match &moment {
        Moment::Latest => "latest".to_owned(),
        Moment::LatestApplication => "latest-app".to_owned(),
        Moment::Back(seconds) => format!("-{seconds}s"),
        Moment::Sequence(sequence) => format!("@{sequence}"),
        Moment::Marker(name) => name.clone(),
        // Times are printed to the millisecond.
        Moment::At(time) => {
            let printed = WallTime(time.0 - time.0 % 1_000_000).to_string();
            assert_eq!(printed.parse(), Ok(Moment::At(PointTime(time.0 - time.0 % 1_000_000))), "{text:?}");
            return true;
        }
    };
    assert_eq!(printed.parse(), Ok(moment), "{text:?}");
    true
}

/// The clear header of an object.
pub fn object_header(data: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(data);
    match Header::parse(&name(), &bytes) {
        Ok(Parse::Complete(parsed)) => {
            assert_eq!(parsed.header.encode(), parsed.bytes, "a header has one form");
            assert!(parsed.body_start <= data.len() as u64);
            true
        }
        Ok(Parse::NeedsBytes(more)) => {
            assert!(more > data.len() as u64 && more <= crate::limits::HEADER_BYTES_MAX as u64);
            false
        }
        Err(_) => false,
    }
}

/// `plain length u32 LE ‖ codec ‖ bytes`: a frame's content after decryption, whose length the index claims.
pub fn object_frame(data: &[u8]) -> bool {
    let Some((len, content)) = data.split_first_chunk::<4>() else { return false };
    frame_survives(u32::from_le_bytes(*len) % (crate::limits::FRAME_PLAIN_BYTES_MAX as u32 + 1), content)
}

/// The name of an object, as stores list them.
pub fn object_name(data: &[u8]) -> bool {
    let Some(name) = std::str::from_utf8(data).ok().and_then(|text| ObjectName::new(text).ok()) else { return false };
    let path = std::path::Path::new(name.as_str());
    let plain = |component| matches!(component, std::path::Component::Normal(_));
    assert!(path.components().all(plain), "{name} leaves its folder");
    assert_eq!(path.components().count(), name.as_str().split('/').count(), "{name} has two paths");
    true
}

/// The root frame of a manifest.
pub fn manifest(data: &[u8]) -> bool {
    let Ok(manifest) = decode_manifest(&Bytes::copy_from_slice(data)) else { return false };
    let written = encode_manifest(&manifest);
    assert_eq!(decode_manifest(&written.into()), Ok(manifest));
    true
}

/// A layer, as manifests refer to it.
pub fn layer(data: &[u8]) -> bool {
    one_meaning(data, LayerRef::decode, LayerRef::encode)
}

/// A page of a table; the first byte chooses the tree.
pub fn table_page(data: &[u8]) -> bool {
    let Some((first, bytes)) = data.split_first() else { return false };
    let tree = if first & 1 == 0 { Tree::Narrow } else { Tree::Wide };
    let bytes = Bytes::copy_from_slice(bytes);
    let Ok(page) = Page::decode(bytes.clone(), tree) else { return false };
    assert!(page.weight() <= 64 * bytes.len() + 1024, "{} bytes became {}", bytes.len(), page.weight());
    match &page {
        Page::Inner(inner) => assert_eq!(inner.encode(tree), bytes, "an inner page has one form"),
        Page::Leaf(leaf) => {
            let mut writer = LeafWriter::new(tree);
            for (index, entry) in leaf.entries().iter().enumerate() {
                writer.push(entry, leaf.hashes(index));
            }
            let Page::Leaf(again) = Page::decode(writer.finish().into(), tree).expect("what was written is read")
            else {
                panic!("a leaf page became an inner one");
            };
            assert_eq!(again, *leaf);
        }
    }
    true
}

/// The root frame of a table (segment, merged table, image), and a page of its sources.
pub fn table_root(data: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(data);
    let sources = decode_source_page(bytes.clone(), 3, 0);
    assert!(sources.as_ref().is_ok_and(|names| names.len() == 3) || sources.is_err());
    let Ok(root) = Root::decode(bytes) else { return sources.is_ok() };
    match &root.sources {
        Sources::Inline(names) => assert!(names.len() <= data.len()),
        Sources::Paged { count, pages } => assert!(pages.len() <= data.len() && *count as usize >= pages.len()),
    }
    true
}

/// The index of a pack.
pub fn pack_index(data: &[u8]) -> bool {
    let Ok(chunks) = decode_index(Bytes::copy_from_slice(data)) else { return false };
    assert_eq!(encode_index(&chunks), data, "an index has one form");
    true
}

/// An entry of the catalog, alone and as it stands in its object.
pub fn catalog_entry(data: &[u8]) -> bool {
    let numbered = decode_content(Bytes::copy_from_slice(data), 1).is_ok();
    one_meaning(data, CatalogEntry::decode, CatalogEntry::encode) || numbered
}

/// Key slots and grants.
pub fn keys(data: &[u8]) -> bool {
    let slot = one_meaning(data, KeySlot::decode, KeySlot::encode);
    one_meaning(data, Grant::decode, Grant::encode) || slot
}

/// A recovery key as somebody types it.
pub fn recovery_words(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let Ok(key) = RecoveryKey::parse(text) else { return false };
    let words = key.to_words();
    assert_eq!(RecoveryKey::parse(&words).expect("what is printed is read").to_words(), words);
    let typed: Vec<String> =
        text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect();
    assert_eq!(typed, words.split_whitespace().collect::<Vec<_>>(), "a key has one spelling");
    true
}

/// A writer's key file, raw and under a right checksum.
pub fn writer_keys(data: &[u8]) -> bool {
    let body = &data[..data.len().saturating_sub(32)];
    let resealed = [body, blake3::hash(body).as_bytes()].concat();
    [data, &resealed].into_iter().fold(false, |valid, bytes| match WriterKeys::from_bytes(bytes) {
        Ok(keys) => {
            assert_eq!(keys.to_bytes()[..], *bytes, "a key file has one form");
            true
        }
        Err(_) => valid,
    })
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{
        NameEpoch, NameSwitch, ObjectNonce, PassphraseCost, ReadSecret, SealedKey, SharedKeys, SigningSecret, SlotKind,
        SlotOf, VaultId, VaultSecrets, WriterId, WriterRole,
    };
    use crate::layer::{Host, LayerKind};
    use crate::manifest::{Manifest, ManifestKind, full};
    use crate::object::{FrameClass, FrameRef, ObjectKind, Placement};
    use crate::pack::ChunkPlace;
    use crate::table::{Content, Entry, Place, SourceIndex};
    use crate::table_page::{Child, InnerPage};
    use crate::table_root::{RootParts, encode_source_page};
    use replication::{
        ByteRange, ChainId, DiskGeometry, DiskId, DiskIdentity, Generation, LeafHash, MachineId, Position,
        SequenceNumber,
    };
    use world::Entropy;

    /// Bytes that are the same on every run, so that the corpus is.
    struct Fixed;

    impl Entropy for Fixed {
        fn fill(&self, buffer: &mut [u8]) {
            buffer.fill(9);
        }
    }

    fn encoded(encode: impl FnOnce(&mut Encoder)) -> Vec<u8> {
        let mut out = Encoder::new();
        encode(&mut out);
        out.finish()
    }

    fn frame(class: FrameClass) -> FrameRef {
        FrameRef { offset: 4096, sealed_len: 900, plain_len: 8192, ordinal: 3, class }
    }

    fn a_layer(host: Host) -> LayerRef {
        LayerRef {
            kind: LayerKind::Merged,
            level: 2,
            host,
            root: frame(FrameClass::Index),
            first: SequenceNumber(5),
            last: SequenceNumber(1 << 50),
            begin: (DiskId(0), 0),
            end: (DiskId(3), 1 << 40),
            entries: 77,
            data_bytes: 1 << 20,
            index_bytes: 900,
        }
    }

    fn geometry() -> DiskGeometry {
        DiskGeometry {
            disk: DiskId(1),
            path: "/dev/vda".into(),
            identity: DiskIdentity { serial: "serial-1".into(), fingerprint: [3; 16] },
            size_bytes: 1 << 30,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        }
    }

    fn seed<const N: usize>(all: [(&'static str, Vec<u8>); N]) -> Vec<(&'static str, Vec<u8>)> {
        all.to_vec()
    }

    #[test]
    fn object_headers() {
        let header = Header {
            incompatible: 0,
            read_compatible: 0,
            compatible: 1,
            placement: Placement::on_chain(ObjectKind::Segment, ChainId([1; 16]), Generation(2)),
            vault: VaultId([2; 16]),
            writer: WriterId([3; 16]),
            key_epoch: 0,
            nonce: ObjectNonce([4; 16]),
            hour: 500_000,
            recipients: vec![(0, SealedKey(vec![5; 80]))],
            root: Some(frame(FrameClass::Index)),
            body_len: 10_000,
            body_digest: [6; 32],
            clear: vec![7; 10],
        };
        let bare = Header { recipients: Vec::new(), root: None, clear: Vec::new(), ..header.clone() };
        let signed = |header: &Header| [header.encode(), vec![0; 64]].concat();
        let seeds = seed([("full", signed(&header)), ("bare", signed(&bare))]);
        replay::replay("object_header", object_header, &seeds);
    }

    #[test]
    fn moments() {
        let texts = [
            ("latest", "latest"),
            ("app", " latest-app "),
            ("time", "2026-11-22 14:03:07"),
            ("fraction", "2026-11-22T14:03:07.000000001Z"),
            ("minutes", "2024-02-29 23:59 UTC"),
            ("back", "-90s"),
            ("days", "-3d"),
            ("position", "@3.1042"),
            ("number", "@77"),
            ("marker", "before the update"),
        ];
        let seeds = texts.map(|(name, text)| (name, text.as_bytes().to_vec()));
        replay::replay("moment", moment, &seeds);
    }

    #[test]
    fn object_frames() {
        let plain = b"All happy families are alike. ".repeat(40);
        let framed = |codec: u8, bytes: &[u8]| [&(plain.len() as u32).to_le_bytes()[..], &[codec], bytes].concat();
        let packed = zstd::bulk::compress(&plain, 3).expect("it compresses");
        let seeds = seed([("raw", framed(0, &plain)), ("zstd", framed(1, &packed))]);
        replay::replay("object_frame", object_frame, &seeds);
    }

    #[test]
    fn object_names() {
        let seeds = seed([("manifest", b"chains/00ff/000001-abc.m".to_vec()), ("plain", b"vault".to_vec())]);
        replay::replay("object_name", object_name, &seeds);
    }

    #[test]
    fn manifests() {
        let parent = Some(Position { chain: ChainId([8; 16]), sequence: SequenceNumber(77) });
        let (successor, close) = (ChainId([9; 16]), ObjectNonce([1; 16]));
        let kinds = [
            ("append", ManifestKind::Append),
            ("open", ManifestKind::OpenGeneration { reason: "take-over".into(), base: SequenceNumber(5) }),
            ("genesis", ManifestKind::Genesis { machine: MachineId([7; 16]), parent }),
            ("close", ManifestKind::Close { successor, reason: "the site burns".into(), seconds: 12 }),
            ("cancel", ManifestKind::Cancel { close, reason: "it does not".into() }),
        ];
        let layers = vec![a_layer(Host::ThisManifest), a_layer(Host::Object(name()))];
        let mut seeds = Vec::new();
        for (name, kind) in kinds {
            let mut manifest = Manifest { kind, ..full() };
            manifest.delta.layers.clone_from(&layers);
            if name != "append" {
                manifest.checkpoint = None;
            }
            seeds.push((name, encode_manifest(&manifest)));
        }
        replay::replay("manifest", manifest, &seeds);
    }

    #[test]
    fn layers() {
        let bytes = |host| encoded(|out| a_layer(host).encode(out));
        let seeds = seed([("own", bytes(Host::ThisManifest)), ("named", bytes(Host::Object(name())))]);
        replay::replay("layer", layer, &seeds);
    }

    fn narrow_page() -> Vec<u8> {
        let mut page = LeafWriter::new(Tree::Narrow);
        let place = |at| Content::Data(Place { source: SourceIndex(0), frame: frame(FrameClass::Data), at });
        let entry = |start, content| Entry {
            disk: DiskId(1),
            range: ByteRange::new(start, 4096),
            sequence: SequenceNumber(1 << 44 | start),
            content,
        };
        let hash = [LeafHash([8; 16])];
        page.push(&entry(0, place(0)), &hash);
        page.push(&entry(4096, place(4096)), &hash);
        page.push(&entry(16_384, Content::Zero), &[]);
        page.push(&entry(20_480, Content::Unreadable), &[]);
        page.push(&Entry { disk: DiskId(2), ..entry(0, Content::Discarded) }, &[]);
        page.finish()
    }

    fn wide_page() -> Vec<u8> {
        let mut page = LeafWriter::new(Tree::Wide);
        let range = ByteRange::new(1 << 30, 1 << 35);
        page.push(&Entry { disk: DiskId(0), range, sequence: SequenceNumber(7), content: Content::Zero }, &[]);
        page.finish()
    }

    #[test]
    fn table_pages() {
        let key = |start| (DiskId(1), start, SequenceNumber(9));
        let child = |start: u64| Child {
            first: key(start),
            end: (DiskId(1), start + 4096),
            source: SourceIndex(1),
            frame: FrameRef { plain_len: 900, ..frame(FrameClass::Index) },
        };
        let inner = InnerPage { children: vec![child(0), child(8192)] };
        let seeds = seed([
            ("narrow", [vec![0], narrow_page()].concat()),
            ("wide", [vec![1], wide_page()].concat()),
            ("inner", [vec![0], inner.encode(Tree::Narrow)].concat()),
        ]);
        replay::replay("table_page", table_page, &seeds);
    }

    #[test]
    fn table_roots() {
        let root = |sources| RootParts { entries: 5, sources, narrow: Some(narrow_page()), wide: Some(wide_page()) };
        let inline = root(Sources::Inline(vec![name(), name()])).encode();
        let pages = vec![FrameRef { sealed_len: 90, plain_len: 80, ..frame(FrameClass::Index) }];
        let paged = root(Sources::Paged { count: 2, pages }).encode();
        let names = encode_source_page(&[name(), name(), name()]);
        replay::replay("table_root", table_root, &seed([("inline", inline), ("paged", paged), ("names", names)]));
    }

    #[test]
    fn pack_indexes() {
        let chunk = |name: u8, ordinal: u32, at: u32, plain_len: u32| {
            let frame = FrameRef {
                offset: u64::from(ordinal) * 1000,
                sealed_len: 900,
                plain_len,
                ordinal,
                class: FrameClass::Data,
            };
            (LeafHash([name; 16]), ChunkPlace { frame, at })
        };
        let chunks =
            [chunk(1, 0, 0, 65_536), chunk(2, 1, 0, 69_632), chunk(3, 1, 65_536, 69_632), chunk(4, 4, 0, 65_536)];
        replay::replay(
            "pack_index",
            pack_index,
            &seed([("three", encode_index(&chunks)), ("none", encode_index(&[]))]),
        );
    }

    #[test]
    fn catalog_entries() {
        let (machine, chain) = (MachineId([1; 16]), ChainId([2; 16]));
        let parent = Position { chain, sequence: SequenceNumber(9) };
        let protected = CatalogEntry::MachineProtected { machine, name: "db".into(), chain, disks: vec![geometry()] };
        let opened = CatalogEntry::BranchOpened { chain, parent, name: "drill".into(), pinned: true };
        let revoked = CatalogEntry::GrantRevoked {
            writer: WriterId([5; 16]),
            fails_from: [(chain, 9)].into(),
            reason: "taken over".into(),
            names: Some(NameSwitch { epoch: NameEpoch(3), check: [7; 16] }),
        };
        let bytes = |entry: &CatalogEntry| encoded(|out| entry.encode(out));
        let numbered = encoded(|out| {
            protected.encode(out.varint(1).u64(1_700_000_000));
        });
        let seeds = seed([
            ("protected", bytes(&protected)),
            ("numbered", numbered),
            ("follows", bytes(&CatalogEntry::MachineFollows { machine, chain })),
            ("opened", bytes(&opened)),
            ("discarded", bytes(&CatalogEntry::BranchDiscarded { chain })),
            ("granted", bytes(&CatalogEntry::WriterGranted { writer: WriterId([5; 16]), label: "ps1".into() })),
            ("note", bytes(&CatalogEntry::Note { text: "a note".into() })),
            ("revoked", bytes(&revoked)),
        ]);
        replay::replay("catalog_entry", catalog_entry, &seeds);
    }

    fn grant() -> Grant {
        Grant {
            writer: WriterId([1; 16]),
            key: SigningSecret::generate(&Fixed).public(),
            sealing: ReadSecret::new([3; 32]).public(),
            role: WriterRole::ProcessServer,
            label: "ps1".into(),
            granted_seconds: 1_700_000_000,
        }
    }

    #[test]
    fn slots_and_grants() {
        let (read, owner) = (ReadSecret::new([2; 32]), SigningSecret::generate(&Fixed));
        let of = SlotOf { vault: VaultId([4; 16]), owner: owner.public(), read: read.public() };
        let secrets = VaultSecrets { read, owner: Some(owner) };
        let kind = SlotKind::Passphrase(PassphraseCost::TRIVIAL);
        let passphrase = KeySlot::under_passphrase("correct horse", kind, of, &secrets, &Fixed);
        let recovery = KeySlot::under_recovery_key(&RecoveryKey::generate(&Fixed), of, &secrets, &Fixed);
        let seeds = seed([
            ("passphrase", encoded(|out| passphrase.encode(out))),
            ("recovery", encoded(|out| recovery.encode(out))),
            ("grant", encoded(|out| grant().encode(out))),
        ]);
        replay::replay("keys", keys, &seeds);
    }

    #[test]
    fn recovery_keys() {
        let words = RecoveryKey::generate(&Fixed).to_words();
        let loud = words.to_uppercase().replace(' ', "-").into_bytes();
        replay::replay("recovery_words", recovery_words, &seed([("printed", words.into_bytes()), ("loud", loud)]));
    }

    #[test]
    fn key_files() {
        let keys = WriterKeys {
            vault: VaultId([4; 16]),
            grant: grant(),
            signing: SigningSecret::generate(&Fixed),
            shared: SharedKeys::generate(&Fixed),
            read_public: ReadSecret::new([2; 32]).public(),
            owner_public: SigningSecret::generate(&Fixed).public(),
        };
        replay::replay("writer_keys", writer_keys, &seed([("file", keys.to_bytes().to_vec())]));
    }
}
