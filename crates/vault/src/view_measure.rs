//! Figures about the two paths whose speed is promised: receiving an image, and reading a view.
//!
//! `FARSHORE_MEASURE=1 cargo test --release -p vault measure -- --nocapture --test-threads 1`

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use replication::geometry::ByteRange;
use replication::{Change, DiskId, LeafKey, PlainLeafHash, SequenceNumber};
use world::RealFiles;

use crate::merge::{MERGE_WAYS, merge_layers};
use crate::object::Compression;
use crate::store::{FolderStore, Store};
use crate::view::ChainView;
use crate::view_cache::Cache;
use crate::view_fixture::{Fixture, GENERATION, SeededEntropy, noise, write};
use crate::view_source::CacheBytes;

const MIB: u64 = 1 << 20;

/// Figures take minutes and prove nothing by themselves, so they are only made when asked for.
fn is_wanted(test: &str) -> bool {
    let wanted = std::env::var_os("FARSHORE_MEASURE").is_some();
    if !wanted {
        println!("SKIPPED: {test}: set FARSHORE_MEASURE=1 for figures");
    }
    wanted
}

/// This test's own program, over and over, each time shifted so that nothing repeats granule by granule.
fn machine_code(len: usize) -> Bytes {
    let program = std::fs::read(std::env::current_exe().expect("has a path")).expect("readable");
    let mut bytes = Vec::with_capacity(len + program.len());
    let mut shift = 0;
    while bytes.len() < len {
        bytes.extend_from_slice(&program[shift..]);
        shift += 1009;
    }
    bytes.truncate(len);
    bytes.into()
}

fn rate(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / 1e6 / since.elapsed().as_secs_f64()
}

fn folder() -> (tempfile::TempDir, Arc<dyn Store>) {
    let folder = tempfile::tempdir().expect("a folder");
    let entropy = SeededEntropy(std::sync::Mutex::new(blake3::Hasher::new_derive_key("names").finalize_xof()));
    let files = Arc::new(RealFiles::new(folder.path()));
    let store = FolderStore::new(files, &entropy, "a folder");
    (folder, Arc::new(store))
}

#[test]
fn measure_receiving_an_image() {
    if !is_wanted("measure_receiving_an_image") {
        return;
    }
    let data = machine_code(512 << 20);
    let len = data.len() as u64;
    let begun = Instant::now();
    let mut compressor = zstd::bulk::Compressor::new(1).expect("a context");
    let compressed: usize =
        data.chunks(65_536).map(|frame| compressor.compress(frame).expect("compresses").len()).sum();
    println!(
        "zstd -1 in 64 KiB frames, one thread: {:.0} MB/s, {:.3} of the size",
        rate(len, begun),
        compressed as f64 / len as f64
    );
    let begun = Instant::now();
    let key = LeafKey::new([1; 32]);
    let mut sum = 0u64;
    for leaf in data.chunks(4096) {
        sum += u64::from(key.leaf(PlainLeafHash::of(leaf)).0[0]);
    }
    println!("leaf hashes, one thread: {:.0} MB/s ({sum})", rate(len, begun));
    for workers in [1, 2] {
        for (name, compression) in [("zstd", Compression::Fast), ("no compression", Compression::None)] {
            let (_folder, store) = folder();
            let fixture = Fixture::on(store);
            let begun = Instant::now();
            let mut image = fixture.image_with(1, NonZeroUsize::new(workers).expect("some"), compression);
            for start in (0..len).step_by(MIB as usize) {
                image.data(DiskId(0), start, data.slice(start as usize..(start + MIB) as usize)).expect("stores");
            }
            let layer = image.cut().expect("stores").expect("a layer");
            let stats = image.stats();
            println!(
                "image, {workers} threads, {name}: {:.0} MB/s, stored {:.3}, index {:.4} of the size",
                rate(len, begun),
                stats.stored_bytes as f64 / len as f64,
                layer.index_bytes as f64 / len as f64,
            );
        }
    }
}

#[test]
fn measure_reading_a_view() {
    if !is_wanted("measure_reading_a_view") {
        return;
    }
    let data = machine_code(256 << 20);
    let len = data.len() as u64;
    let (_folder, store) = folder();
    let fixture = Fixture::on(store);
    let two = NonZeroUsize::new(2).expect("two");
    let mut image = fixture.image_with(1, two, Compression::Fast);
    image.data(DiskId(0), 0, data.clone()).expect("stores");
    let layers = vec![image.cut().expect("stores").expect("a layer")];
    let cut = SequenceNumber(9);
    let cache = CacheBytes { data: 320 << 20, ..CacheBytes::default() };
    let fresh = || ChainView::new(fixture.source_with(Arc::clone(&fixture.reader), cache), layers.clone(), None);
    let mut buffer = vec![0; MIB as usize];
    let view = fresh();
    let begun = Instant::now();
    for start in (0..len).step_by(MIB as usize) {
        view.read(cut, DiskId(0), start, &mut buffer).expect("reads");
        assert!(buffer == data[start as usize..(start + MIB) as usize]);
    }
    println!("sequential cold read: {:.0} MB/s", rate(len, begun));
    let begun = Instant::now();
    let mut block = [0; 4096];
    let mut state = 1u64;
    let reads = 1_000_000;
    for _ in 0..reads {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let start = (state >> 20) % (len / 4096) * 4096;
        view.read(cut, DiskId(0), start, &mut block).expect("reads");
    }
    println!("warm random 4 KiB reads: {:.0} ns each", begun.elapsed().as_nanos() as f64 / f64::from(reads));
    let view = fresh();
    let begun = Instant::now();
    for start in (0..len).step_by(MIB as usize) {
        if start % (8 * MIB) == 0 {
            view.prefetch(cut, DiskId(0), ByteRange::new(start, 8 * MIB), two).expect("reads");
        }
        view.read(cut, DiskId(0), start, &mut buffer).expect("reads");
    }
    println!("sequential cold read with prefetch on two threads: {:.0} MB/s", rate(len, begun));
    let view = fresh();
    let begun = Instant::now();
    let hashes = view.leaf_hashes(cut, DiskId(0), ByteRange::new(0, len)).expect("reads");
    println!("leaf hashes from the index: {:.0} MB/s of disk, {} of them", rate(len, begun), hashes.len());
    let hits: Cache<(u64, u64), Arc<[u8]>> = Cache::new(1 << 20);
    (0..1000).for_each(|key| hits.insert((key, key), Arc::new([1]), 1));
    let begun = Instant::now();
    let found = (0..1_000_000u64).filter(|key| hits.get(&(key % 1000, key % 1000)).is_some()).count();
    println!("cache hits: {:.0} ns each ({found})", begun.elapsed().as_nanos() as f64 / 1e6);
}

#[test]
fn measure_a_day_of_seals() {
    if !is_wanted("measure_a_day_of_seals") {
        return;
    }
    let (_folder, store) = folder();
    let fixture = Fixture::on(store);
    let source = fixture.source();
    let mut next = 0;
    let mut segment = || {
        let changes: Vec<Change> = (0..50)
            .map(|_| {
                next += 1;
                write(next, 0, noise(next, 2).iter().fold(0, |n, b| n * 256 + u64::from(*b)) * 4096, noise(next, 4096))
            })
            .collect();
        fixture.layer(&changes, &[SequenceNumber(next)])
    };
    // As after 17 280 seals: 4 tables of 64², 13 of 64, 63 segments; the large ones made of fewer entries here.
    let begun = Instant::now();
    let mut layers: Vec<_> = (0..17)
        .map(|_| {
            let segments: Vec<_> = (0..MERGE_WAYS).map(|_| segment()).collect();
            merge_layers(&source, &segments, &fixture.session, fixture.chain, GENERATION).expect("merges")
        })
        .collect();
    layers.extend((0..63).map(|_| segment()));
    println!("1151 seals and 17 merges: {:?}", begun.elapsed());
    let view = ChainView::new(fixture.source(), layers, None);
    let cut = SequenceNumber(u64::MAX);
    let mut block = [0; 4096];
    let begun = Instant::now();
    view.read(cut, DiskId(0), 0, &mut block).expect("reads");
    println!("first read through {} layers: {:?}", view.layers().len(), begun.elapsed());
    let begun = Instant::now();
    for granule in 0..4096 {
        view.read(cut, DiskId(0), granule * 65_536, &mut block).expect("reads");
    }
    println!("4096 cold granules: {:.0} us each", begun.elapsed().as_micros() as f64 / 4096.0);
}
