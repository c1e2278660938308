//! A fuzz target as an ordinary test: on the seeds that the encoders of today make, on the committed corpus, and on a
//! fixed number of mutations of both.
//!
//! Included by path into the tests of every crate that has targets, so that none of them exposes anything for it.
//! With `FARSHORE_WRITE_CORPUS=1` the seeds are also written to the corpus.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

/// Mutations of each input; of large inputs fewer, so that a test takes a second at most.
const MUTATIONS: usize = 400;
/// Bytes of mutated input of one test, roughly.
const MUTATED_BYTES: usize = 32 << 20;

/// A target: takes any bytes, panics if an invariant is broken, and says whether it took the bytes for valid.
pub(crate) type Target = fn(&[u8]) -> bool;

/// Runs `target` as the fuzzer called `name` would. Every seed must be valid, or the target tests nothing.
pub(crate) fn replay(name: &str, target: Target, seeds: &[(&str, Vec<u8>)]) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    if std::env::var_os("FARSHORE_WRITE_CORPUS").is_some() {
        fs::create_dir_all(&corpus).expect("the corpus can be written");
        for (seed, bytes) in seeds {
            fs::write(corpus.join(seed), bytes).expect("the corpus can be written");
        }
    }
    for (seed, bytes) in seeds {
        assert!(run(name, target, seed, bytes), "the seed {seed} of {name} is not valid");
    }
    let files = files_of(&corpus);
    for (seed, _) in seeds {
        let there = files.iter().any(|file| file.ends_with(seed));
        assert!(there, "{name} lacks the seed {seed}; run this test once with FARSHORE_WRITE_CORPUS=1");
    }
    let mut inputs: Vec<(String, Vec<u8>)> =
        seeds.iter().map(|(seed, bytes)| ((*seed).into(), bytes.clone())).collect();
    for file in files {
        let bytes = fs::read(&file).expect("the corpus can be read");
        inputs.push((file.display().to_string(), bytes));
    }
    let bytes: usize = inputs.iter().map(|(_, bytes)| bytes.len()).sum();
    let mutations = MUTATIONS.min(MUTATED_BYTES / bytes.max(1)).max(8);
    let mut random = Random(name.bytes().fold(1, |state: u64, byte| state.wrapping_mul(31) + u64::from(byte)));
    for index in 0..inputs.len() {
        let (label, bytes) = &inputs[index];
        run(name, target, label, bytes);
        for number in 0..mutations {
            let other = &inputs[random.below(inputs.len())].1;
            let mutated = mutate(bytes, other, &mut random);
            run(name, target, &format!("{label}, mutation {number}"), &mutated);
        }
    }
}

fn files_of(corpus: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(corpus).unwrap_or_else(|error| panic!("no corpus {}: {error}", corpus.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("the corpus can be listed").path()).collect();
    files.sort();
    files
}

/// Runs the target; if it panics, says on what and leaves the input where `cargo xtask fuzz` can be given it.
fn run(name: &str, target: Target, label: &str, bytes: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(bytes))).unwrap_or_else(|panic| {
        let path = std::env::temp_dir().join(format!("farshore-fuzz-{name}-{}", std::process::id()));
        fs::write(&path, bytes).expect("the failing input can be written");
        eprintln!("{name} failed on {label}; replay: cargo xtask fuzz {name} --input {}", path.display());
        resume_unwind(panic)
    })
}

/// One to four changes of the kinds that find the most: flips, interesting numbers, cuts, repeats, splices.
fn mutate(bytes: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.below(256) as u8),
            2 => {
                let piece = bytes[at..(at + random.below(32)).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            3 => {
                let from = random.below(other.len() + 1);
                bytes.splice(at.., other[from..].iter().copied());
            }
            4 => {
                let values = [0u64, 1, 0x7f, 0x80, 0xff, 0xffff, 1 << 31, u64::MAX >> 1, u64::MAX];
                let value = values[random.below(values.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value[..width]);
            }
            5 => {
                bytes.drain(at..(at + 1 + random.below(8)).min(bytes.len()));
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => bytes.push(random.below(256) as u8),
        }
    }
    bytes
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}
