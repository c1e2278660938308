//! The bytes of a journal file: header, key schedule and sealed frames. `docs/formats/journal.md` is the reference.
//!
//! A file is a header and a run of frames. Each frame is one AEAD message whose nonce is its ordinal in the file, under
//! a key that only this file has; a file is never reopened for appending, so no nonce meets a second plaintext. Before
//! each sync the file is filled with zeroes up to a multiple of [`SYNC_ALIGN`], so that bytes that were promised to be
//! durable are never written again together with later ones.

use replication::codec::{DecodeError, Decoder, Encoder};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use world::{Entropy, Files, durable};
use zeroize::Zeroizing;

use super::JournalError;

/// Bytes of a file's header.
pub(super) const HEADER_BYTES: usize = 96;
/// Bytes in front of a frame's ciphertext.
pub(super) const FRAME_HEADER_BYTES: usize = 28;
/// Bytes of the authentication tag behind it.
pub(super) const TAG_BYTES: usize = 16;
/// What a frame adds to its plaintext, in bytes.
pub(super) const FRAME_OVERHEAD: usize = FRAME_HEADER_BYTES + TAG_BYTES;
/// The durable part of a file ends at a multiple of this, in bytes: the largest sector of today's disks.
pub(super) const SYNC_ALIGN: u64 = 4096;

const MAGIC: &[u8; 8] = b"FARSHJNL";
const VERSION: u16 = 1;
const KEY_MAGIC: &[u8; 8] = b"FARSHKEY";
const KEY_FILE: &str = "host.key";
const CHECKSUM_BYTES: usize = 16;

/// The secret of this host under which its journals are encrypted.
#[derive(Clone)]
pub struct HostKey(Zeroizing<[u8; 32]>);

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostKey(secret)")
    }
}

impl HostKey {
    /// A key from its 32 bytes.
    pub fn new(bytes: [u8; 32]) -> HostKey {
        HostKey(Zeroizing::new(bytes))
    }

    /// Reads the key file in `directory`; makes one if there is neither a key nor a journal. Durable on return.
    ///
    /// # Errors
    /// [`JournalError::KeyMissing`] if journal files exist without the key that opens them.
    pub fn load_or_create(files: &dyn Files, directory: &str, entropy: &dyn Entropy) -> Result<HostKey, JournalError> {
        let path = format!("{directory}/{KEY_FILE}");
        match files.read(&path) {
            Ok(bytes) => return HostKey::parse(&bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(JournalError::io("read", &path, source)),
        }
        let names = files.list_files(directory).map_err(|source| JournalError::io("list", directory, source))?;
        if names.iter().any(|name| parse_file_name(name).is_some()) {
            return Err(JournalError::KeyMissing { path });
        }
        let key = HostKey::new(entropy.bytes());
        let contents = key.file_contents();
        let unique = hexadecimal(&entropy.bytes::<8>());
        match durable::publish_private(files, &path, &[&contents], &unique) {
            Ok(()) => Ok(key),
            // Somebody else was first; theirs is the key.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let bytes = files.read(&path).map_err(|source| JournalError::io("read", &path, source))?;
                HostKey::parse(&bytes)
            }
            Err(source) => Err(JournalError::io("create", &path, source)),
        }
    }

    /// The bytes of the key file.
    pub(super) fn file_contents(&self) -> Zeroizing<Vec<u8>> {
        let mut contents = Zeroizing::new(Vec::with_capacity(64));
        contents.extend_from_slice(KEY_MAGIC);
        contents.extend_from_slice(&self.0[..]);
        let checksum = checksum(&contents);
        contents.extend_from_slice(&checksum);
        contents
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<HostKey, JournalError> {
        let (contents, found) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(JournalError::KeyDamaged)?;
        if *found != checksum(contents) {
            return Err(JournalError::KeyDamaged);
        }
        let key = contents.strip_prefix(KEY_MAGIC).ok_or(JournalError::KeyDamaged)?;
        Ok(HostKey::new(key.try_into().map_err(|_| JournalError::KeyDamaged)?))
    }
}

/// Number of a file of the journal. Files are numbered in the order of their creation; no number is used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileNumber(pub u64);

impl std::fmt::Display for FileNumber {
    /// The file's name.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}.journal", self.0)
    }
}

/// The number of the journal file called `name`.
pub(super) fn parse_file_name(name: &str) -> Option<FileNumber> {
    let digits = name.strip_suffix(".journal")?;
    let number = FileNumber(u64::from_str_radix(digits, 16).ok()?);
    (number.to_string() == name).then_some(number)
}

/// Lower-case hexadecimal digits of `bytes`.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// Bytes are not what was written.
    Damaged(&'static str),
    /// Written by a program newer than this one.
    Version(u16),
    /// Sealed under another host's key.
    WrongKey,
}

/// The keys of one file.
pub(super) struct FileKey {
    aead: LessSafeKey,
    sync_word: [u8; 8],
    key_check: [u8; 16],
}

struct Derived;

impl KeyType for Derived {
    fn len(&self) -> usize {
        32 + 8 + 16
    }
}

impl FileKey {
    /// Derives the keys of a new file and its header.
    pub(super) fn create(host: &HostKey, number: FileNumber, salt: [u8; 32]) -> (FileKey, Vec<u8>) {
        let mut header = Encoder::with_capacity(HEADER_BYTES);
        header.raw(MAGIC).u16(VERSION).u16(0).u32(0).u64(number.0).raw(&salt);
        let mut header = header.finish();
        let key = FileKey::derive(host, &header);
        header.extend_from_slice(&key.key_check);
        header.extend_from_slice(&[0; 8]);
        let checksum = checksum(&header);
        header.extend_from_slice(&checksum);
        debug_assert_eq!(header.len(), HEADER_BYTES, "the layout of the header is fixed");
        (key, header)
    }

    /// Checks the header of file `number` and derives its keys.
    pub(super) fn open(host: &HostKey, number: FileNumber, header: &[u8]) -> Result<FileKey, HeaderError> {
        let truncated = |_: DecodeError| HeaderError::Damaged("the header is cut off");
        let mut input = Decoder::new(header.to_vec());
        let magic = input.array::<8>("magic").map_err(truncated)?;
        let version = input.u16("version").map_err(truncated)?;
        let features = input.u16("features").map_err(truncated)?;
        if header.len() != HEADER_BYTES {
            return Err(HeaderError::Damaged("the header is cut off"));
        }
        if header[HEADER_BYTES - CHECKSUM_BYTES..] != checksum(&header[..HEADER_BYTES - CHECKSUM_BYTES]) {
            return Err(HeaderError::Damaged("the header's checksum does not match"));
        }
        if &magic != MAGIC {
            return Err(HeaderError::Damaged("this is not a journal file"));
        }
        if version != VERSION || features != 0 {
            return Err(HeaderError::Version(version));
        }
        let _reserved = input.u32("reserved").map_err(truncated)?;
        if input.u64("file number").map_err(truncated)? != number.0 {
            return Err(HeaderError::Damaged("the file has another file's name"));
        }
        let key = FileKey::derive(host, &header[..56]);
        if header[56..72] != key.key_check {
            return Err(HeaderError::WrongKey);
        }
        Ok(key)
    }

    /// Keys bound to everything that `identity` (magic to salt) says.
    fn derive(host: &HostKey, identity: &[u8]) -> FileKey {
        let mut derived = Zeroizing::new([0; 56]);
        Salt::new(HKDF_SHA256, &identity[24..56])
            .extract(&host.0[..])
            .expand(&[b"farshore journal file", &identity[..24]], Derived)
            .and_then(|okm| okm.fill(&mut derived[..]))
            .expect("56 bytes are within what HKDF can give");
        let (aead, rest) = derived.split_at(32);
        let (sync_word, key_check) = rest.split_at(8);
        FileKey {
            aead: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, aead).expect("the key has 32 bytes")),
            sync_word: sync_word.try_into().expect("8 bytes"),
            key_check: key_check.try_into().expect("16 bytes"),
        }
    }

    /// Appends the frame with ordinal `ordinal` to `out`; `fill` appends its plaintext. `synced` is how much of the
    /// file was known to be durable.
    pub(super) fn seal(&self, out: &mut Vec<u8>, ordinal: u64, synced: u64, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = out.len();
        out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        fill(out);
        let body = start + FRAME_HEADER_BYTES;
        let len = u32::try_from(out.len() - body).expect("records are bounded far below 4 GiB");
        let header = FrameHeader { len, synced, ordinal }.encode(&self.sync_word);
        out[start..body].copy_from_slice(&header);
        let tag = self
            .aead
            .seal_in_place_separate_tag(nonce(ordinal), Aad::from(header), &mut out[body..])
            .expect("a record is far below the AEAD's limit");
        out.extend_from_slice(tag.as_ref());
    }

    /// The header at the front of `bytes`, if a frame may begin there.
    pub(super) fn frame_header(&self, bytes: &[u8]) -> Option<FrameHeader> {
        let bytes: &[u8; FRAME_HEADER_BYTES] = bytes.first_chunk()?;
        let rest = bytes.strip_prefix(&self.sync_word)?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let (synced, rest) = rest.split_first_chunk::<8>()?;
        let ordinal = rest.first_chunk::<8>()?;
        Some(FrameHeader {
            len: u32::from_le_bytes(*len),
            synced: u64::from_le_bytes(*synced),
            ordinal: u64::from_le_bytes(*ordinal),
        })
    }

    /// Opens `sealed` (ciphertext and tag) in place; `None` if it is not what was sealed.
    pub(super) fn open_frame<'a>(&self, header: FrameHeader, sealed: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let aad = Aad::from(header.encode(&self.sync_word));
        self.aead.open_in_place(nonce(header.ordinal), aad, sealed).ok()
    }

    /// The eight bytes that begin each frame of this file. Derived from the key: content cannot imitate them.
    pub(super) fn sync_word(&self) -> &[u8; 8] {
        &self.sync_word
    }
}

/// The clear, authenticated part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    /// Bytes of ciphertext.
    pub(super) len: u32,
    /// How many bytes of the file had been synced when the frame was sealed: a witness against whatever claims later
    /// that these were never durable.
    pub(super) synced: u64,
    /// Place among the file's frames, from 0.
    pub(super) ordinal: u64,
}

impl FrameHeader {
    fn encode(self, sync_word: &[u8; 8]) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[..8].copy_from_slice(sync_word);
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.synced.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes
    }
}

fn nonce(ordinal: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&ordinal.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
}
