//! Frames: compress, encrypt, and back. Pure, so that many threads can seal frames of one object at once.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use replication::codec::Encoder;
use replication::geometry::LEAF_BYTES;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;
use zstd::zstd_safe::CParameter;

use super::{FrameClass, FrameRef, Placement};
use crate::error::Damage;
use crate::keys::{ObjectNonce, VaultId, WriterId};
use crate::limits;
use crate::store::ObjectName;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// Compressed frames that save less than one part in this many are stored raw: decompressing costs more than it saves.
const LEAST_SAVING: usize = 32;
/// From this size on, frames are compressed with a table of 2^15 places for matches of 5 bytes and more instead of 2^14 for
/// 6: 2 % smaller for 9 % of zstd's time (measured in `docs/design/0007-speed-and-size.md`).
const LARGE_FRAME_BYTES: usize = 128 << 10;
const LARGE_FAST: (u32, u32) = (15, 5);
/// Bytes looked at to tell incompressible data, in `PROBE_WINDOWS` places.
const PROBE_BYTES: usize = 4096;
const PROBE_WINDOWS: usize = 16;
const PROBE_WINDOW: usize = PROBE_BYTES / PROBE_WINDOWS;

/// Whether to try to make a frame smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Store as it is.
    None,
    /// zstd level 1, unless the data looks incompressible.
    Fast,
    /// zstd level 3, for what is written rarely and read often.
    Dense,
}

/// What identifies an object before its body is known: bound to every frame.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) name: ObjectName,
    pub(crate) placement: Placement,
    pub(crate) vault: VaultId,
    pub(crate) writer: WriterId,
    pub(crate) nonce: ObjectNonce,
}

impl Identity {
    /// The associated data of the object's frames.
    fn associated(&self) -> [u8; 32] {
        let mut out = Encoder::new();
        out.u16(self.placement.kind.code())
            .raw(&self.vault.0)
            .raw(&self.placement.chain.0)
            .u32(self.placement.generation.0)
            .raw(&self.writer.0)
            .raw(&self.nonce.0)
            .text(self.name.as_str());
        blake3::derive_key("farshore frame identity v1", &out.finish())
    }

    fn key(&self, class: FrameClass, base: &[u8; 32]) -> LessSafeKey {
        let context = match class {
            FrameClass::Data => "farshore data frame key v1",
            FrameClass::Index => "farshore index frame key v1",
        };
        let mut material = Zeroizing::new(base.to_vec());
        material.extend_from_slice(&self.nonce.0);
        material.extend_from_slice(self.name.as_str().as_bytes());
        let key = Zeroizing::new(blake3::derive_key(context, &material));
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref()).expect("AES-256 takes 32 bytes"))
    }
}

/// The frame keys of one object.
#[derive(Clone)]
pub(crate) struct FrameKeys {
    associated: [u8; 32],
    data: Option<Arc<LessSafeKey>>,
    index: Arc<LessSafeKey>,
}

impl FrameKeys {
    pub(crate) fn new(identity: &Identity, data: Option<&[u8; 32]>, index: &[u8; 32]) -> FrameKeys {
        FrameKeys {
            associated: identity.associated(),
            data: data.map(|base| Arc::new(identity.key(FrameClass::Data, base))),
            index: Arc::new(identity.key(FrameClass::Index, index)),
        }
    }

    fn of(&self, class: FrameClass) -> Option<&LessSafeKey> {
        match class {
            FrameClass::Data => self.data.as_deref(),
            FrameClass::Index => Some(&self.index),
        }
    }

    /// Decrypts and decompresses `sealed`.
    pub(crate) fn open(&self, frame: &FrameRef, sealed: &[u8]) -> Result<Bytes, Damage> {
        let key = self.of(frame.class).expect("callers ask for a data key before they read a data frame");
        let mut buffer = sealed.to_vec();
        let len = key
            .open_in_place(nonce(frame.ordinal), Aad::from(self.associated), &mut buffer)
            .map_err(|_| Damage::Frame(frame.ordinal))?
            .len();
        buffer.truncate(len);
        let unfit = Damage::Compression(frame.ordinal);
        let plain_len = frame.plain_len as usize;
        match buffer.first() {
            Some(&RAW) if len == plain_len + 1 => Ok(Bytes::from(buffer).slice(1..)),
            Some(&ZSTD) => DECOMPRESSOR
                .with_borrow_mut(|decompressor| decompressor.decompress(&buffer[1..], plain_len))
                .ok()
                .filter(|plain| plain.len() == plain_len)
                .map(Bytes::from)
                .ok_or(unfit),
            _ => Err(unfit),
        }
    }
}

/// Opens a frame that holds `content` and claims `plain_len` bytes; whatever it gives has that length.
#[cfg(any(test, fuzzing))]
pub(crate) fn frame_survives(plain_len: u32, content: &[u8]) -> bool {
    let key = || LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[1; 32]).expect("AES-256 takes 32 bytes"));
    let keys = FrameKeys { associated: [2; 32], data: Some(Arc::new(key())), index: Arc::new(key()) };
    let mut sealed = content.to_vec();
    key()
        .seal_in_place_append_tag(nonce(3), Aad::from(keys.associated), &mut sealed)
        .expect("a frame is below the cipher's limit of 64 GiB");
    let sealed_len = sealed.len() as u32;
    let frame = FrameRef { offset: 0, sealed_len, plain_len, ordinal: 3, class: FrameClass::Index };
    match keys.open(&frame, &sealed) {
        Ok(plain) => {
            assert_eq!(plain.len(), plain_len as usize);
            true
        }
        Err(damage) => {
            assert_eq!(damage, Damage::Compression(3));
            false
        }
    }
}

fn nonce(ordinal: u32) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&ordinal.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Seals frames of one object. Cheap to clone; clones may work on several threads, as long as every ordinal is used
/// once.
#[derive(Clone)]
pub struct FrameSealer {
    keys: FrameKeys,
}

impl fmt::Debug for FrameSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameSealer")
    }
}

impl FrameSealer {
    pub(crate) fn new(keys: FrameKeys) -> FrameSealer {
        FrameSealer { keys }
    }

    /// The bytes of frame `ordinal` holding `plaintext`, at most [`limits::FRAME_PLAIN_BYTES_MAX`] long.
    ///
    /// Each ordinal of an object must be sealed exactly once: it is the AEAD nonce.
    pub fn seal(&self, class: FrameClass, ordinal: u32, plaintext: &[u8], compression: Compression) -> Vec<u8> {
        assert!(plaintext.len() <= limits::FRAME_PLAIN_BYTES_MAX, "a frame's plaintext is bounded");
        let mut buffer = compress(plaintext, compression).unwrap_or_else(|| {
            let mut raw = Vec::with_capacity(plaintext.len() + 1 + AES_256_GCM.tag_len());
            raw.push(RAW);
            raw.extend_from_slice(plaintext);
            raw
        });
        self.keys
            .of(class)
            .expect("a writer has a data key")
            .seal_in_place_append_tag(nonce(ordinal), Aad::from(self.keys.associated), &mut buffer)
            .expect("a frame is below the cipher's limit of 64 GiB");
        buffer
    }
}

thread_local! {
    // Setting a context up costs more than compressing a small frame.
    static COMPRESSOR: RefCell<zstd::bulk::Compressor<'static>> =
        RefCell::new(zstd::bulk::Compressor::new(1).expect("zstd allocates its context"));
    // Where frames are compressed before their size is known: zeroing room for each would cost as much as hashing it.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::new().expect("zstd allocates its context"));
}

/// Codec byte and compressed bytes, or `None` if storing raw is better.
fn compress(plaintext: &[u8], compression: Compression) -> Option<Vec<u8>> {
    let level = match compression {
        Compression::None => return None,
        Compression::Fast => 1,
        Compression::Dense => 3,
    };
    if plaintext.len() < 32 || looks_incompressible(plaintext) {
        return None;
    }
    let large = plaintext.len() >= LARGE_FRAME_BYTES && compression == Compression::Fast;
    let (hash_log, min_match) = if large { LARGE_FAST } else { (0, 0) };
    let parameters =
        [CParameter::CompressionLevel(level), CParameter::HashLog(hash_log), CParameter::MinMatch(min_match)];
    SCRATCH.with_borrow_mut(|scratch| {
        // Room for the worst case: a compressor that ran out of room once refuses its next parameters, and from then on
        // everything would silently be stored raw.
        let bound = zstd::zstd_safe::compress_bound(plaintext.len());
        if scratch.len() < bound {
            scratch.resize(bound, 0);
        }
        let len = COMPRESSOR.with_borrow_mut(|compressor| {
            for parameter in parameters {
                compressor.set_parameter(parameter).expect("the value is valid and no compression is under way");
            }
            compressor.compress_to_buffer(plaintext, &mut scratch[..]).expect("the buffer has room for the worst case")
        });
        if len > plaintext.len() - plaintext.len() / LEAST_SAVING {
            return None;
        }
        let mut buffer = Vec::with_capacity(1 + len + AES_256_GCM.tag_len());
        buffer.push(ZSTD);
        buffer.extend_from_slice(&scratch[..len]);
        Some(buffer)
    })
}

/// Whether the byte histogram of samples is as flat as noise. Encrypted and compressed files are; it costs a
/// hundredth of what zstd takes to find out. Long repetitions of noise are missed: rare, and only size is lost.
fn looks_incompressible(plaintext: &[u8]) -> bool {
    if plaintext.len() < PROBE_BYTES {
        return false;
    }
    let stride = (plaintext.len() - PROBE_WINDOW) / (PROBE_WINDOWS - 1);
    is_flat((0..PROBE_WINDOWS).map(|index| &plaintext[index * stride..][..PROBE_WINDOW]))
}

/// As [`looks_incompressible`], of whole leaves that lie here and there, at least one.
pub(crate) fn leaves_look_incompressible(leaves: &[&[u8]]) -> bool {
    let last = LEAF_BYTES as usize - PROBE_WINDOW;
    is_flat((0..PROBE_WINDOWS).map(|index| {
        let leaf = leaves[index * leaves.len() / PROBE_WINDOWS];
        // Not the same place in each: formats have headers.
        &leaf[(index * last / (PROBE_WINDOWS - 1)).min(leaf.len() - PROBE_WINDOW)..][..PROBE_WINDOW]
    }))
}

fn is_flat<'a>(windows: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut histogram = [0u32; 256];
    for byte in windows.flatten() {
        histogram[usize::from(*byte)] += 1;
    }
    // Sum of squared counts: for 4096 bytes of noise about 16² × 256 + 4096 = 69 632 with a deviation of 360 or so;
    // the threshold corresponds to about 7.9 bits per byte. Text and machine code lie above 150 000.
    let squares: u64 = histogram.iter().map(|count| u64::from(*count) * u64::from(*count)).sum();
    squares < 72_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::ObjectKind;
    use proptest::prelude::*;

    fn identity(name: &str) -> Identity {
        Identity {
            name: ObjectName::new(name).expect("a name"),
            placement: Placement::of_vault(ObjectKind::Pack),
            vault: VaultId([1; 16]),
            writer: WriterId([2; 16]),
            nonce: ObjectNonce([3; 16]),
        }
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_come_back_and_changed_ones_do_not(
            seed in prop::collection::vec(any::<u8>(), 0..600), repeat in 1usize..40, flip: prop::sample::Index, ordinal in 0u32..9,
        ) {
            let plain = seed.repeat(repeat);
            let keys = FrameKeys::new(&identity("a"), Some(&[5; 32]), &[6; 32]);
            for class in [FrameClass::Data, FrameClass::Index] {
                for compression in [Compression::None, Compression::Fast, Compression::Dense] {
                    let sealed = FrameSealer::new(keys.clone()).seal(class, ordinal, &plain, compression);
                    let frame = FrameRef {
                        offset: 0, sealed_len: sealed.len() as u32, plain_len: plain.len() as u32, ordinal, class,
                    };
                    prop_assert_eq!(keys.open(&frame, &sealed).expect("opens"), plain.clone());
                    let mut changed = sealed.clone();
                    let place = flip.index(changed.len());
                    changed[place] ^= 1;
                    prop_assert_eq!(keys.open(&frame, &changed), Err(Damage::Frame(ordinal)));
                    let elsewhere = FrameKeys::new(&identity("b"), Some(&[5; 32]), &[6; 32]);
                    prop_assert!(elsewhere.open(&frame, &sealed).is_err());
                    let misplaced = FrameRef { ordinal: ordinal + 1, ..frame };
                    prop_assert!(keys.open(&misplaced, &sealed).is_err());
                }
            }
        }
    }

    #[test]
    fn noise_is_stored_raw_and_text_is_not() {
        for len in [4096, 65_536, 262_144] {
            assert!(looks_incompressible(&noise(len)), "{len}");
            assert!(leaves_look_incompressible(&noise(len).chunks(LEAF_BYTES as usize).collect::<Vec<_>>()), "{len}");
            assert!(compress(&noise(len), Compression::Fast).is_none());
        }
        let text = "All happy families are alike; each unhappy one is unhappy in its own way. ".repeat(1000);
        assert!(compress(text.as_bytes(), Compression::Fast).expect("compresses").len() < text.len() / 10);
        assert!(!leaves_look_incompressible(&text.as_bytes().chunks_exact(LEAF_BYTES as usize).collect::<Vec<_>>()));
        // What one frame turned out to be must not decide about the next.
        for _ in 0..2 {
            assert!(compress(&noise(3000), Compression::Fast).is_none());
            assert!(compress(text.as_bytes(), Compression::Dense).is_some());
        }
        // Half noise, half zeroes must still be compressed.
        let mut half = noise(65_536);
        half[32_768..].fill(0);
        assert!(compress(&half, Compression::Fast).expect("compresses").len() < 34_000);
    }
}
