//! The clear, signed header of every object.

use replication::codec::{DecodeError, Decoder, Encoder};
use replication::{ChainId, Generation};

use super::{FrameRef, ObjectKind};
use crate::error::{Damage, VaultError};
use crate::keys::{ObjectNonce, SealedKey, VaultId, WriterId};
use crate::limits;
use crate::store::ObjectName;

const MAGIC: &[u8; 8] = b"FARSHORE";
const VERSION: u16 = 1;
/// AES-256-GCM frames, BLAKE3 digests and derivations, Ed25519 signatures, HPKE X25519-HKDF-SHA256 / AES-256-GCM.
const SUITE: u16 = 1;
/// The only epoch of the shared keys so far. Under a later one names are tagged anew, and this program would not find
/// what it has to read.
const KEY_EPOCH: u32 = 0;
/// Magic, version, header length, three feature words.
const PRELUDE_LEN: usize = 8 + 2 + 4 + 3 * 8;
const SIGNATURE_LEN: usize = 64;
/// Feature bits that a reader must know. None is defined yet.
const INCOMPATIBLE_KNOWN: u64 = 0;

/// Where in the vault's history an object belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// What it is.
    pub kind: ObjectKind,
    /// Its chain; all zeroes for objects of no chain.
    pub chain: ChainId,
    /// The generation that wrote it; zero for objects of no chain.
    pub generation: Generation,
}

impl Placement {
    /// An object of a chain.
    pub fn on_chain(kind: ObjectKind, chain: ChainId, generation: Generation) -> Placement {
        Placement { kind, chain, generation }
    }

    /// An object of no chain.
    pub fn of_vault(kind: ObjectKind) -> Placement {
        Placement { kind, chain: ChainId::default(), generation: Generation::default() }
    }
}

/// A parsed header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Features a reader must know to read the object at all. Known, or parsing had failed.
    pub incompatible: u64,
    /// Features a writer must know to add to what the object belongs to.
    pub read_compatible: u64,
    /// Features anyone may ignore.
    pub compatible: u64,
    /// Kind, chain and generation.
    pub placement: Placement,
    /// The vault.
    pub vault: VaultId,
    /// Who signed it.
    pub writer: WriterId,
    /// Epoch of the shared keys it was written under.
    pub key_epoch: u32,
    /// Its nonce.
    pub nonce: ObjectNonce,
    /// Hour of the writer's wall clock for which the data key was made, since 1970.
    pub hour: u64,
    /// The data key, sealed to each recipient's read key of the given epoch. Empty if no frame needs it.
    pub recipients: Vec<(u32, SealedKey)>,
    /// The frame to start reading at.
    pub root: Option<FrameRef>,
    /// Bytes of the body.
    pub body_len: u64,
    /// BLAKE3 of the body.
    pub body_digest: [u8; 32],
    /// Clear fields of the kind.
    pub clear: Vec<u8>,
}

/// A header with its signature and extent, not yet verified.
#[derive(Debug, Clone)]
pub(crate) struct ParsedHeader {
    pub(crate) header: Header,
    /// The exact bytes that were signed, after the name.
    pub(crate) bytes: bytes::Bytes,
    pub(crate) signature: [u8; SIGNATURE_LEN],
    /// Where the body starts.
    pub(crate) body_start: u64,
}

/// What a first read of an object's beginning gave.
pub(crate) enum Parse {
    Complete(Box<ParsedHeader>),
    /// Read at least this many bytes from the start.
    NeedsBytes(u64),
}

impl Header {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut fields = Encoder::new();
        fields
            .u16(SUITE)
            .u16(self.placement.kind.code())
            .raw(&self.vault.0)
            .raw(&self.placement.chain.0)
            .u32(self.placement.generation.0)
            .raw(&self.writer.0)
            .u32(self.key_epoch)
            .raw(&self.nonce.0)
            .u64(self.hour)
            .varint(self.recipients.len() as u64);
        for (epoch, sealed) in &self.recipients {
            fields.u32(*epoch).bytes(&sealed.0);
        }
        match &self.root {
            Some(root) => root.encode(fields.u8(1)),
            None => {
                fields.u8(0);
            }
        }
        fields.u64(self.body_len).raw(&self.body_digest).bytes(&self.clear);
        let fields = fields.finish();
        let mut out = Encoder::with_capacity(PRELUDE_LEN + fields.len());
        out.raw(MAGIC)
            .u16(VERSION)
            .u32((PRELUDE_LEN + fields.len()) as u32)
            .u64(self.incompatible)
            .u64(self.read_compatible)
            .u64(self.compatible)
            .raw(&fields);
        out.finish()
    }

    /// Parses the beginning of an object, as far as `start` holds it.
    pub(crate) fn parse(name: &ObjectName, start: &bytes::Bytes) -> Result<Parse, VaultError> {
        let newer = |what: String| VaultError::NewerFormat { name: name.clone(), what };
        let malformed = |error| VaultError::damaged(name, Damage::Header(error));
        if !start.starts_with(MAGIC) {
            return Err(VaultError::damaged(name, Damage::NotAnObject));
        }
        let mut input = Decoder::new(start.slice(MAGIC.len()..));
        let version = input.u16("version").map_err(malformed)?;
        if version != VERSION {
            return Err(newer(format!("format version {version}, this program knows {VERSION}")));
        }
        let header_len = input.u32("header length").map_err(malformed)? as usize;
        let incompatible = input.u64("features").map_err(malformed)?;
        let read_compatible = input.u64("features").map_err(malformed)?;
        let compatible = input.u64("features").map_err(malformed)?;
        if incompatible & !INCOMPATIBLE_KNOWN != 0 {
            return Err(newer(format!("feature bits {:#x}", incompatible & !INCOMPATIBLE_KNOWN)));
        }
        let total = header_len.saturating_add(SIGNATURE_LEN);
        if header_len < PRELUDE_LEN || total > limits::HEADER_BYTES_MAX {
            return Err(malformed(DecodeError::Inconsistent("the header length is impossible")));
        }
        if start.len() < total {
            return Ok(Parse::NeedsBytes(total as u64));
        }
        let mut input = Decoder::new(start.slice(PRELUDE_LEN..header_len));
        let suite = input.u16("suite").map_err(malformed)?;
        if suite != SUITE {
            return Err(newer(format!("cipher suite {suite}")));
        }
        let kind = input.u16("kind").map_err(malformed)?;
        let kind = ObjectKind::from_code(kind).ok_or_else(|| newer(format!("object kind {kind}")))?;
        let features = [incompatible, read_compatible, compatible];
        let header = Header::decode_fields(&mut input, kind, features).map_err(malformed)?;
        input.finish().map_err(malformed)?;
        if header.key_epoch != KEY_EPOCH {
            return Err(newer(format!("key epoch {}", header.key_epoch)));
        }
        Ok(Parse::Complete(Box::new(ParsedHeader {
            header,
            bytes: start.slice(..header_len),
            signature: start[header_len..total].try_into().expect("a signature's length"),
            body_start: total as u64,
        })))
    }

    fn decode_fields(input: &mut Decoder, kind: ObjectKind, features: [u64; 3]) -> Result<Header, DecodeError> {
        let vault = VaultId(input.array("vault id")?);
        let chain = ChainId(input.array("chain id")?);
        let generation = Generation(input.u32("generation")?);
        if generation > Generation::MAX {
            return Err(DecodeError::Undefined { field: "generation", value: generation.0.into() });
        }
        let writer = WriterId(input.array("writer id")?);
        let key_epoch = input.u32("key epoch")?;
        let nonce = ObjectNonce(input.array("nonce")?);
        let hour = input.u64("hour")?;
        let recipients = (0..input.count("recipients", limits::RECIPIENTS_MAX)?)
            .map(|_| Ok((input.u32("read key epoch")?, SealedKey(input.bytes("sealed data key", 1024)?.to_vec()))))
            .collect::<Result<_, DecodeError>>()?;
        let root = match input.u8("root")? {
            0 => None,
            1 => Some(FrameRef::decode(input)?),
            value => return Err(DecodeError::Undefined { field: "root", value: value.into() }),
        };
        let body_len = input.u64("body length")?;
        if root.is_some_and(|root| root.body_range().end > body_len) || body_len > limits::OBJECT_BODY_BYTES_MAX {
            return Err(DecodeError::Inconsistent("the body is shorter than its root or longer than allowed"));
        }
        Ok(Header {
            incompatible: features[0],
            read_compatible: features[1],
            compatible: features[2],
            placement: Placement { kind, chain, generation },
            vault,
            writer,
            key_epoch,
            nonce,
            hour,
            recipients,
            root,
            body_len,
            body_digest: input.array("body digest")?,
            clear: input.bytes("clear fields", limits::CLEAR_FIELDS_BYTES_MAX)?.to_vec(),
        })
    }
}

/// What a writer signs: purpose, name, header. The name is not stored, so a moved object does not verify.
pub(crate) fn signed_message(name: &ObjectName, header: &[u8]) -> Vec<u8> {
    let mut message = Encoder::with_capacity(64 + name.as_str().len() + header.len());
    message.raw(b"farshore object v1\0").text(name.as_str()).raw(header);
    message.finish()
}
