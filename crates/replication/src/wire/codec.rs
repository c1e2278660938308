//! The bytes of the messages.

use bytes::Bytes;

use super::{HealContent, HealNeed, Hello, Message, OfferHashes, OfferedLeaf, RefusalCode, Resume, Welcome};
use crate::change::{Change, HealId, SourceTime, StreamHash};
use crate::codec::{DecodeError, Decoder, Encoder};
use crate::cut::PointTime;
use crate::geometry::{ByteRange, DiskGeometry, LEAF_BYTES};
use crate::leaf::LeafKey;
use crate::limits;
use crate::position::{ChainId, DiskId, Generation, InstanceId, MachineId, SequenceNumber};
use crate::reach::{Ranges, Reach};

/// A message as it travels: a kind, then parts that the transport writes one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireFrame {
    /// Which message.
    pub kind: u8,
    /// The body; data of writes is shared, not copied.
    pub parts: Vec<Bytes>,
}

impl WireFrame {
    /// Length of the body in bytes.
    pub fn body_len(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// The body in one piece.
    pub fn body(&self) -> Bytes {
        match self.parts.as_slice() {
            [only] => only.clone(),
            parts => parts.concat().into(),
        }
    }
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const REFUSE: u8 = 3;
    pub(super) const CHANGES: u8 = 4;
    pub(super) const PROOF: u8 = 5;
    pub(super) const BREAK: u8 = 6;
    pub(super) const ACK: u8 = 7;
    pub(super) const HEAL_BEGIN: u8 = 8;
    pub(super) const OFFER: u8 = 9;
    pub(super) const WANTS: u8 = 10;
    pub(super) const HEAL_DATA: u8 = 11;
    pub(super) const HEAL_CREDIT: u8 = 12;
    pub(super) const HEAL_END: u8 = 13;
    pub(super) const HEAL_ABORT: u8 = 14;
    pub(super) const HEAL_COMMITTED: u8 = 15;
    pub(super) const HEAL_RESTART: u8 = 16;
    pub(super) const BYE: u8 = 17;
    pub(super) const OFFER_GRANULES: u8 = 18;
    pub(super) const OFFER_LEAVES: u8 = 19;
    pub(super) const PING: u8 = 20;
    pub(super) const PONG: u8 = 21;
    pub(super) const DESCRIBE: u8 = 22;
    pub(super) const SCRUB_OFFER: u8 = 23;
    pub(super) const SCRUB_VERDICT: u8 = 24;
    pub(super) const SUSPECT: u8 = 25;
    pub(super) const SUSPECT_NOTED: u8 = 26;
}

impl Message {
    /// The message's bytes. Panics if a limit of [`limits`] is exceeded: the sender's own bug.
    pub fn encode(&self) -> WireFrame {
        let mut out = Encoder::new();
        let mut data = Vec::new();
        let kind = match self {
            Message::Hello(hello) => {
                hello.encode(&mut out);
                kind::HELLO
            }
            Message::Welcome(welcome) => {
                welcome.encode(&mut out);
                kind::WELCOME
            }
            Message::Refuse { code, reason } => {
                out.u8(*code as u8).text(reason);
                kind::REFUSE
            }
            Message::Changes(changes) => {
                out.varint(changes.len() as u64);
                for change in changes {
                    change.encode_head(&mut out);
                    if let crate::ChangeKind::Write { data: bytes, .. } = &change.kind {
                        data.push(bytes.clone());
                    }
                }
                kind::CHANGES
            }
            Message::Proof { captured, time, now } => {
                out.u64(captured.0).u64(time.0).u64(now.0);
                kind::PROOF
            }
            Message::Break { at, reach, cause } => {
                reach.encode(out.u64(at.0));
                out.text(cause);
                kind::BREAK
            }
            Message::Ack { journaled, committed, window_bytes } => {
                out.u64(journaled.0).u64(committed.0).u64(*window_bytes);
                kind::ACK
            }
            Message::HealBegin { heal, p0, whole, reach, hashes, planned_bytes } => {
                reach.encode(out.u64(heal.0).u64(p0.0).u8(u8::from(*whole)));
                out.u64(*planned_bytes);
                match hashes {
                    OfferHashes::Plain => out.u8(0),
                    OfferHashes::Keyed(key) => out.u8(1).raw(key.expose()),
                };
                kind::HEAL_BEGIN
            }
            Message::Offer { heal, offer, disk, start, leaves } => {
                out.u64(heal.0).u32(*offer).u16(disk.0).u64(*start);
                encode_offered(leaves, &mut out);
                kind::OFFER
            }
            Message::OfferGranules { heal, offer, disk, start, leaves, granules } => {
                out.u64(heal.0).u32(*offer).u16(disk.0).u64(*start).u32(*leaves);
                encode_offered(granules, &mut out);
                kind::OFFER_GRANULES
            }
            Message::OfferLeaves { heal, offer, leaves } => {
                out.u64(heal.0).u32(*offer);
                encode_offered(leaves, &mut out);
                kind::OFFER_LEAVES
            }
            Message::Wants { heal, offer, wanted } => {
                out.u64(heal.0).u32(*offer).bytes(wanted);
                kind::WANTS
            }
            Message::HealData { heal, disk, range, content } => {
                out.u64(heal.0).u16(disk.0);
                range.encode(&mut out);
                match content {
                    HealContent::Data(bytes) => {
                        out.u8(0);
                        data.push(bytes.clone());
                    }
                    HealContent::Zero => {
                        out.u8(1);
                    }
                    HealContent::Unreadable => {
                        out.u8(2);
                    }
                }
                kind::HEAL_DATA
            }
            Message::HealCredit { heal, received_bytes } => {
                out.u64(heal.0).u64(*received_bytes);
                kind::HEAL_CREDIT
            }
            Message::HealEnd { heal, end } => {
                out.u64(heal.0).u64(end.0);
                kind::HEAL_END
            }
            Message::HealAbort { heal, cause } => {
                out.u64(heal.0).text(cause);
                kind::HEAL_ABORT
            }
            Message::HealCommitted { heal } => {
                out.u64(heal.0);
                kind::HEAL_COMMITTED
            }
            Message::HealRestart { heal, reason } => {
                out.u64(heal.0).text(reason);
                kind::HEAL_RESTART
            }
            Message::ScrubOffer { offer, behind, disk, start, leaves } => {
                out.u64(*offer).u64(behind.0).u16(disk.0).u64(*start);
                encode_offered(leaves, &mut out);
                kind::SCRUB_OFFER
            }
            Message::ScrubVerdict { offer, differing, untold } => {
                out.u64(*offer).bytes(differing).bytes(untold);
                kind::SCRUB_VERDICT
            }
            Message::Suspect { id, after, until, ranges, cause } => {
                ranges.encode(out.u64(*id).u64(after.0).u64(until.0));
                out.text(cause);
                kind::SUSPECT
            }
            Message::SuspectNoted { id } => {
                out.u64(*id);
                kind::SUSPECT_NOTED
            }
            Message::Ping => kind::PING,
            Message::Pong => kind::PONG,
            Message::Describe { document } => {
                out.text(document);
                kind::DESCRIBE
            }
            Message::Bye { reason } => {
                out.text(reason);
                kind::BYE
            }
        };
        let mut parts = vec![Bytes::from(out.finish())];
        parts.append(&mut data);
        let frame = WireFrame { kind, parts };
        assert!(frame.body_len() <= limits::MESSAGE_BYTES_MAX, "a message exceeds its limit");
        frame
    }

    /// Reads a message from outside.
    pub fn decode(kind: u8, body: Bytes) -> Result<Message, DecodeError> {
        if body.len() > limits::MESSAGE_BYTES_MAX {
            return Err(DecodeError::TooLarge {
                field: "message",
                value: body.len() as u64,
                limit: limits::MESSAGE_BYTES_MAX as u64,
            });
        }
        let mut input = Decoder::new(body);
        let reason = |input: &mut Decoder| input.text("reason", limits::REASON_BYTES_MAX);
        let heal = |input: &mut Decoder| input.u64("heal id").map(HealId);
        let sequence = |input: &mut Decoder| input.u64("sequence").map(SequenceNumber);
        let message = match kind {
            kind::HELLO => Message::Hello(Hello::decode(&mut input)?),
            kind::WELCOME => Message::Welcome(Welcome::decode(&mut input)?),
            kind::REFUSE => Message::Refuse { code: refusal(input.u8("refusal code")?)?, reason: reason(&mut input)? },
            kind::CHANGES => Message::Changes(decode_changes(&mut input)?),
            kind::PROOF => Message::Proof {
                captured: sequence(&mut input)?,
                time: SourceTime(input.u64("proof time")?),
                now: SourceTime(input.u64("source now")?),
            },
            kind::BREAK => Message::Break {
                at: sequence(&mut input)?,
                reach: Reach::decode(&mut input)?,
                cause: reason(&mut input)?,
            },
            kind::ACK => Message::Ack {
                journaled: sequence(&mut input)?,
                committed: sequence(&mut input)?,
                window_bytes: input.u64("window")?,
            },
            kind::HEAL_BEGIN => Message::HealBegin {
                heal: heal(&mut input)?,
                p0: sequence(&mut input)?,
                whole: input.u8("whole")? != 0,
                reach: Reach::decode(&mut input)?,
                planned_bytes: input.u64("planned bytes")?,
                hashes: match input.u8("hash kind")? {
                    0 => OfferHashes::Plain,
                    1 => OfferHashes::Keyed(LeafKey::new(input.array("leaf key")?)),
                    value => return Err(DecodeError::Undefined { field: "hash kind", value: value.into() }),
                },
            },
            kind::OFFER => decode_offer(&mut input)?,
            kind::OFFER_GRANULES => decode_offer_of_granules(&mut input)?,
            kind::OFFER_LEAVES => Message::OfferLeaves {
                heal: heal(&mut input)?,
                offer: input.u32("offer")?,
                leaves: decode_offered(&mut input)?,
            },
            kind::WANTS => Message::Wants {
                heal: heal(&mut input)?,
                offer: input.u32("offer")?,
                wanted: input.bytes("wanted", limits::OFFER_HASHES_MAX / 8)?,
            },
            kind::HEAL_DATA => decode_heal_data(&mut input)?,
            kind::HEAL_CREDIT => {
                Message::HealCredit { heal: heal(&mut input)?, received_bytes: input.u64("received bytes")? }
            }
            kind::HEAL_END => Message::HealEnd { heal: heal(&mut input)?, end: sequence(&mut input)? },
            kind::HEAL_ABORT => Message::HealAbort { heal: heal(&mut input)?, cause: reason(&mut input)? },
            kind::HEAL_COMMITTED => Message::HealCommitted { heal: heal(&mut input)? },
            kind::HEAL_RESTART => Message::HealRestart { heal: heal(&mut input)?, reason: reason(&mut input)? },
            kind::SCRUB_OFFER => decode_scrub_offer(&mut input)?,
            kind::SCRUB_VERDICT => Message::ScrubVerdict {
                offer: input.u64("offer")?,
                differing: input.bytes("differing", limits::OFFER_HASHES_MAX / 8)?,
                untold: input.bytes("untold", limits::OFFER_HASHES_MAX / 8)?,
            },
            kind::SUSPECT => decode_suspect(&mut input)?,
            kind::SUSPECT_NOTED => Message::SuspectNoted { id: input.u64("suspicion")? },
            kind::PING => Message::Ping,
            kind::PONG => Message::Pong,
            kind::DESCRIBE => Message::Describe { document: input.text("description", limits::DESCRIPTION_BYTES_MAX)? },
            kind::BYE => Message::Bye { reason: reason(&mut input)? },
            value => return Err(DecodeError::Undefined { field: "message kind", value: value.into() }),
        };
        input.finish()?;
        Ok(message)
    }
}

fn decode_changes(input: &mut Decoder) -> Result<Vec<Change>, DecodeError> {
    let count = input.count("changes", limits::BATCH_CHANGES_MAX as u64)?;
    let mut changes = Vec::with_capacity(count);
    for _ in 0..count {
        changes.push(Change::decode_head(input)?);
    }
    for change in &mut changes {
        change.attach_data(input)?;
    }
    Ok(changes)
}

fn decode_offer(input: &mut Decoder) -> Result<Message, DecodeError> {
    let heal = HealId(input.u64("heal id")?);
    let offer = input.u32("offer")?;
    let disk = DiskId(input.u16("disk id")?);
    let start = input.u64("offer start")?;
    check_offer_start(start)?;
    let leaves = decode_offered(input)?;
    Ok(Message::Offer { heal, offer, disk, start, leaves })
}

fn decode_scrub_offer(input: &mut Decoder) -> Result<Message, DecodeError> {
    let offer = input.u64("offer")?;
    let behind = SequenceNumber(input.u64("sequence")?);
    let disk = DiskId(input.u16("disk id")?);
    let start = input.u64("offer start")?;
    check_offer_start(start)?;
    let leaves = decode_offered(input)?;
    Ok(Message::ScrubOffer { offer, behind, disk, start, leaves })
}

fn decode_suspect(input: &mut Decoder) -> Result<Message, DecodeError> {
    let id = input.u64("suspicion")?;
    let (after, until) = (SequenceNumber(input.u64("sequence")?), SequenceNumber(input.u64("sequence")?));
    let ranges = Ranges::decode(input)?;
    if ranges.is_empty() || until <= after {
        return Err(DecodeError::Inconsistent("a suspicion of nothing"));
    }
    let cause = input.text("reason", limits::REASON_BYTES_MAX)?;
    Ok(Message::Suspect { id, after, until, ranges, cause })
}

fn decode_offer_of_granules(input: &mut Decoder) -> Result<Message, DecodeError> {
    let heal = HealId(input.u64("heal id")?);
    let offer = input.u32("offer")?;
    let disk = DiskId(input.u16("disk id")?);
    let start = input.u64("offer start")?;
    check_offer_start(start)?;
    let leaves = input.u32("leaves of the offer")?;
    if leaves as usize > limits::OFFER_HASHES_MAX {
        return Err(DecodeError::Inconsistent("an offer of granules covers too many leaves"));
    }
    let granules = decode_offered(input)?;
    if granules.contains(&OfferedLeaf::Unreadable) {
        return Err(DecodeError::Inconsistent("a granule is known, unknown or zero, never unreadable"));
    }
    Ok(Message::OfferGranules { heal, offer, disk, start, leaves, granules })
}

fn check_offer_start(start: u64) -> Result<(), DecodeError> {
    if !start.is_multiple_of(LEAF_BYTES) || start > limits::DISK_BYTES_MAX {
        return Err(DecodeError::Inconsistent("an offer is unaligned or beyond any disk"));
    }
    Ok(())
}

/// Kinds in an offer that share a byte.
const KINDS_PER_BYTE: usize = 4;

/// Count, two bits of kind for each entry (the first in the lowest bits), then the hashes of those that have one.
fn encode_offered(offered: &[OfferedLeaf], out: &mut Encoder) {
    out.varint(offered.len() as u64);
    for entries in offered.chunks(KINDS_PER_BYTE) {
        let kind = |entry: &OfferedLeaf| match entry {
            OfferedLeaf::Zero => 0,
            OfferedLeaf::Hash(_) => 1,
            OfferedLeaf::Unknown => 2,
            OfferedLeaf::Unreadable => 3,
        };
        out.u8(entries.iter().enumerate().fold(0, |byte, (index, entry)| byte | kind(entry) << (2 * index)));
    }
    for entry in offered {
        if let OfferedLeaf::Hash(hash) = entry {
            out.raw(hash);
        }
    }
}

fn decode_offered(input: &mut Decoder) -> Result<Vec<OfferedLeaf>, DecodeError> {
    // Four entries may share a byte, so the count cannot be held against the bytes that are left.
    let count = input.varint_max("offered hashes", limits::OFFER_HASHES_MAX as u64)? as usize;
    if count == 0 {
        return Err(DecodeError::Inconsistent("an offer is empty"));
    }
    let kinds = input.raw(count.div_ceil(KINDS_PER_BYTE), "kinds of an offer")?;
    let unused = 2 * (kinds.len() * KINDS_PER_BYTE - count);
    // Bytes that mean nothing would let one message be written in several ways.
    if kinds.last().is_some_and(|last| unused > 0 && last >> (8 - unused) != 0) {
        return Err(DecodeError::Inconsistent("kinds follow the last entry of an offer"));
    }
    (0..count)
        .map(|index| match kinds[index / KINDS_PER_BYTE] >> (2 * (index % KINDS_PER_BYTE)) & 3 {
            0 => Ok(OfferedLeaf::Zero),
            1 => input.array("offered hash").map(OfferedLeaf::Hash),
            2 => Ok(OfferedLeaf::Unknown),
            _ => Ok(OfferedLeaf::Unreadable),
        })
        .collect()
}

fn decode_heal_data(input: &mut Decoder) -> Result<Message, DecodeError> {
    let heal = HealId(input.u64("heal id")?);
    let disk = DiskId(input.u16("disk id")?);
    let range = ByteRange::decode(input, limits::CHANGE_RANGE_BYTES_MAX)?;
    let content = match input.u8("heal content")? {
        0 if range.len <= limits::HEAL_DATA_BYTES_MAX as u64 => {
            HealContent::Data(input.raw(range.len as usize, "heal data")?)
        }
        0 => return Err(DecodeError::Inconsistent("heal data exceeds its limit")),
        1 => HealContent::Zero,
        2 => HealContent::Unreadable,
        value => return Err(DecodeError::Undefined { field: "heal content", value: value.into() }),
    };
    Ok(Message::HealData { heal, disk, range, content })
}

fn refusal(value: u8) -> Result<RefusalCode, DecodeError> {
    Ok(match value {
        0 => RefusalCode::Version,
        1 => RefusalCode::NotAuthorised,
        2 => RefusalCode::DuplicateIdentity,
        3 => RefusalCode::Fenced,
        4 => RefusalCode::Busy,
        5 => RefusalCode::Protocol,
        value => return Err(DecodeError::Undefined { field: "refusal code", value: value.into() }),
    })
}

impl HealNeed {
    fn decode(input: &mut Decoder) -> Result<HealNeed, DecodeError> {
        Ok(match input.u8("heal need")? {
            0 => HealNeed::Nothing,
            1 => HealNeed::Maps,
            2 => HealNeed::Whole,
            value => return Err(DecodeError::Undefined { field: "heal need", value: value.into() }),
        })
    }
}

impl Hello {
    fn encode(&self, out: &mut Encoder) {
        out.u16(self.version)
            .raw(&self.machine.0)
            .raw(&self.instance.0)
            .raw(&self.boot)
            .raw(&self.vm_generation)
            .text(&self.name)
            .varint(self.disks.len() as u64);
        self.disks.iter().for_each(|disk| disk.encode(out));
        match &self.resume {
            None => {
                out.u8(0);
            }
            Some(resume) => {
                out.u8(1).raw(&resume.chain.0).u32(resume.generation.0).u64(resume.released.0).u64(resume.sent.0);
                out.raw(&resume.hash.0);
            }
        }
        out.u8(self.need as u8);
        match &self.cleared {
            None => out.u8(0),
            Some((chain, sequence)) => out.u8(1).raw(&chain.0).u64(sequence.0),
        };
        self.lacking.encode(out.u64(self.now.0).u64(self.started.0));
        match &self.followed {
            None => out.u8(0),
            Some(chain) => out.u8(1).raw(&chain.0),
        };
    }

    fn decode(input: &mut Decoder) -> Result<Hello, DecodeError> {
        let version = input.u16("version")?;
        let machine = MachineId(input.array("machine")?);
        let instance = InstanceId(input.array("instance")?);
        let boot = input.array("boot id")?;
        let vm_generation = input.array("VM generation id")?;
        let name = input.text("machine name", limits::NAME_BYTES_MAX)?;
        let count = input.count("disks", limits::DISKS_MAX as u64)?;
        let disks = (0..count).map(|_| DiskGeometry::decode(input)).collect::<Result<_, _>>()?;
        let resume = match input.u8("resume")? {
            0 => None,
            1 => Some(Resume {
                chain: ChainId(input.array("chain")?),
                generation: generation(input)?,
                released: SequenceNumber(input.u64("released")?),
                sent: SequenceNumber(input.u64("sent")?),
                hash: StreamHash(input.array("stream hash")?),
            }),
            value => return Err(DecodeError::Undefined { field: "resume", value: value.into() }),
        };
        let need = HealNeed::decode(input)?;
        let cleared = match input.u8("cleared")? {
            0 => None,
            1 => Some((ChainId(input.array("chain")?), SequenceNumber(input.u64("sequence")?))),
            value => return Err(DecodeError::Undefined { field: "cleared", value: value.into() }),
        };
        let now = SourceTime(input.u64("source now")?);
        let started = PointTime(input.u64("start of the sender")?);
        let lacking = Ranges::decode(input)?;
        let followed = match input.u8("followed")? {
            0 => None,
            1 => Some(ChainId(input.array("chain")?)),
            value => return Err(DecodeError::Undefined { field: "followed", value: value.into() }),
        };
        Ok(Hello {
            version,
            machine,
            instance,
            boot,
            vm_generation,
            name,
            disks,
            resume,
            need,
            cleared,
            now,
            started,
            lacking,
            followed,
        })
    }
}

impl Welcome {
    fn encode(&self, out: &mut Encoder) {
        out.u16(self.version)
            .raw(&self.chain.0)
            .u32(self.generation.0)
            .u64(self.resume_after.0)
            .u8(u8::from(self.continues))
            .raw(&self.hash.0)
            .u64(self.committed.0)
            .u8(self.need as u8)
            .u8(u8::from(self.base_empty))
            .u64(self.window_bytes);
        match &self.past {
            None => out.u8(0),
            Some((at, hash)) => out.u8(1).u64(at.0).raw(&hash.0),
        };
    }

    fn decode(input: &mut Decoder) -> Result<Welcome, DecodeError> {
        Ok(Welcome {
            version: input.u16("version")?,
            chain: ChainId(input.array("chain")?),
            generation: generation(input)?,
            resume_after: SequenceNumber(input.u64("resume after")?),
            continues: input.u8("continues")? != 0,
            hash: StreamHash(input.array("stream hash")?),
            committed: SequenceNumber(input.u64("committed")?),
            need: HealNeed::decode(input)?,
            base_empty: input.u8("base empty")? != 0,
            window_bytes: input.u64("window")?,
            past: match input.u8("past")? {
                0 => None,
                1 => Some((SequenceNumber(input.u64("past position")?), StreamHash(input.array("past hash")?))),
                value => return Err(DecodeError::Undefined { field: "past", value: value.into() }),
            },
        })
    }
}

fn generation(input: &mut Decoder) -> Result<Generation, DecodeError> {
    let value = input.u32("generation")?;
    if value >= Generation::MAX.0 {
        return Err(DecodeError::TooLarge {
            field: "generation",
            value: value.into(),
            limit: Generation::MAX.0.into(),
        });
    }
    Ok(Generation(value))
}

#[cfg(test)]
mod tests;
