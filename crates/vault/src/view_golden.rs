//! Objects written by version 1 of the formats, read for ever.
//!
//! `fixtures/layers-v1.txt` holds layer references and objects in hexadecimal. A change that makes this test fail has
//! changed a format: it needs a new layout number and a new fixture beside the old one, never a new version of this one.
//! `FARSHORE_WRITE_FIXTURES=1` prints what the present code would write.

use std::sync::Arc;

use bytes::Bytes;
use replication::codec::{Decoder, Encoder};
use replication::geometry::ByteRange;
use replication::{ChangeKind, DiskId, SequenceNumber};

use crate::image::Absence;
use crate::layer::LayerRef;
use crate::merge::merge_layers;
use crate::store::{ObjectName, ObjectStoreAdapter, Store};
use crate::verify::{ChainToVerify, verify};
use crate::view::ChainView;
use crate::view_fixture::{Fixture, GENERATION, ONE, change, write};

const FIXTURE: &str = include_str!("../fixtures/layers-v1.txt");

fn text(byte: u8) -> Vec<u8> {
    std::iter::repeat_n([byte, byte + 1], 4096).flatten().collect()
}

/// A little of everything, and what disk 0 then holds from 0 to 256 KiB at its last cut.
fn write_history(fixture: &Fixture) -> (Vec<LayerRef>, Vec<u8>) {
    let mut expected = vec![0; 256 << 10];
    let mut image = fixture.image(1 << 44 | 1);
    let disk = DiskId(0);
    image.data(disk, 0, text(b'a').into()).expect("stores");
    image.data(disk, 65_536, text(b'a').into()).expect("stores");
    image.absent(disk, ByteRange::new(1 << 30, 1 << 40), Absence::Zero);
    let image = image.cut().expect("stores").expect("a layer");
    expected[..8192].copy_from_slice(&text(b'a'));
    expected[65_536..65_536 + 8192].copy_from_slice(&text(b'a'));
    let number = |counter: u64| 1 << 44 | counter;
    let first = [
        write(number(2), 0, 4096, text(b'c')),
        write(number(3), 0, 131_072 - 512, text(b'e')),
        write(number(4), 3, 512, text(b'g')),
    ];
    let second = [
        change(number(5), 0, ChangeKind::Zero { range: ByteRange::new(0, 1024) }),
        change(number(6), 0, ChangeKind::Discard { range: ByteRange::new(65_536, 4 << 20) }),
    ];
    expected[4096..12_288].copy_from_slice(&text(b'c'));
    expected[..1024].fill(0);
    expected[65_536..].fill(0);
    let first = fixture.layer(&first, &[SequenceNumber(number(2))]);
    let second = fixture.layer(&second, &[]);
    let source = fixture.source();
    let merged = merge_layers(&source, &[first, second], &fixture.session, fixture.chain, GENERATION);
    (vec![image, merged.expect("merges")], expected)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Bytes {
    let digit = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
    (0..digits.len()).step_by(2).map(digit).collect::<Vec<u8>>().into()
}

fn dump(fixture: &Fixture, layers: &[LayerRef]) -> String {
    let mut lines = String::new();
    for layer in layers {
        let mut out = Encoder::new();
        layer.encode(&mut out);
        lines += &format!("layer {}\n", hex(&out.finish()));
    }
    for name in fixture.store.list("", None, 1000).expect("lists") {
        lines += &format!("{name} {}\n", hex(&fixture.store.read_all(&name).expect("reads")));
    }
    lines
}

#[test]
fn version_1_reads_as_it_did_and_is_written_as_it_was() {
    let fixture = Fixture::new();
    let (layers, expected) = write_history(&fixture);
    let written = dump(&fixture, &layers);
    if std::env::var_os("FARSHORE_WRITE_FIXTURES").is_some() {
        println!("{written}");
        return;
    }
    let store = ObjectStoreAdapter::in_memory();
    let mut layers = Vec::new();
    for line in FIXTURE.lines() {
        let (name, digits) = line.split_once(' ').expect("two words");
        if name == "layer" {
            layers.push(LayerRef::decode(&mut Decoder::new(unhex(digits))).expect("decodes"));
        } else {
            store.create(&ObjectName::new(name).expect("a name"), &[unhex(digits)]).expect("stores");
        }
    }
    let old = Fixture::on(Arc::new(store));
    let view = ChainView::new(old.source(), layers.clone(), None);
    let mut found = vec![0xee; expected.len()];
    view.read(SequenceNumber(u64::MAX), DiskId(0), 0, &mut found).expect("reads");
    assert!(found == expected);
    let chains = [ChainToVerify { chain: old.chain, layers, superseded: Vec::new() }];
    let report = verify(&old.source(), &chains, ONE).expect("verifies");
    assert!(report.is_sound() && report.entries > 0, "{report:?}");
    // Pages, packs and references are compared byte by byte; compression may differ between versions of zstd.
    let line = |text: &str, word: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with(word)).map(str::to_owned).collect()
    };
    assert_eq!(line(&written, "layer"), line(FIXTURE, "layer"));
}
