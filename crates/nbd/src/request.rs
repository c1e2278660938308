//! Requests of the transmission phase: decoding, and the checks that turn them into something to execute. Pure.

use std::ops::Range;

use crate::limits;
pub use crate::protocol::ErrorCode;
use crate::protocol::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, MAGIC_REQUEST,
};

/// The stream holds something that is not a request: it cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client sent {0:#010x} where a request must begin")]
pub struct BadMagic(pub u32);

/// The fixed part of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Flags of the command.
    pub flags: u16,
    /// What to do.
    pub command: u16,
    /// Chosen by the client, repeated in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u32,
}

impl RequestHeader {
    /// Size on the wire in bytes.
    pub const BYTES: usize = 28;

    /// Reads the header of a request.
    ///
    /// # Errors
    /// [`BadMagic`]: close the connection.
    pub fn decode(bytes: &[u8; RequestHeader::BYTES]) -> Result<RequestHeader, BadMagic> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != MAGIC_REQUEST {
            return Err(BadMagic(magic));
        }
        let [k0, k1, k2, k3, k4, k5, k6, k7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(RequestHeader {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: u64::from_be_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// The header as it goes over the wire.
    pub fn encode(&self) -> [u8; RequestHeader::BYTES] {
        let mut bytes = [0; RequestHeader::BYTES];
        bytes[0..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Bytes that follow the header, whether or not the request is accepted.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == CMD_WRITE { self.length } else { 0 }
    }
}

/// How the data of a read is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadShape {
    /// A simple reply: all data in one piece, or an error.
    Simple,
    /// A structured reply of exactly one chunk.
    OneChunk,
    /// A structured reply that may tell holes.
    Chunks,
}

/// When a change must be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// With the next flush.
    Later,
    /// Before the reply.
    BeforeReply,
}

/// A request that passed the checks: its range lies inside the export and the export allows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Return the bytes of the range.
    Read(Range<u64>, ReadShape),
    /// Store the payload at this offset.
    Write(u64, Durability),
    /// Make everything completed durable.
    Flush,
    /// The range is no longer needed.
    Discard(Range<u64>, Durability),
    /// Make the range read as zeroes.
    Zero(Range<u64>, Durability),
    /// Tell what the range holds, in at most that many pieces.
    Status(Range<u64>, usize),
    /// The range will be read soon.
    Prefetch(Range<u64>),
    /// The client goes; there is no reply.
    Disconnect,
}

/// What both sides agreed on before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export in bytes.
    pub size: u64,
    /// Whether changes are refused.
    pub read_only: bool,
    /// Offsets and lengths are multiples of this many bytes.
    pub block_bytes: u32,
    /// Largest read or write in bytes.
    pub request_bytes_max: u32,
    /// Whether fast zeroes were offered.
    pub zeroes_fast: bool,
    /// Whether structured replies were agreed on.
    pub structured: bool,
    /// Whether the client asked for `base:allocation` of this export.
    pub allocation: bool,
}

impl Terms {
    /// What `header` asks for.
    ///
    /// # Errors
    /// The number to reply with. The payload, if any, still has to be skipped.
    pub fn check(&self, header: &RequestHeader) -> Result<Request, ErrorCode> {
        let allowed = match header.command {
            CMD_READ if self.structured => CMD_FLAG_DF,
            CMD_WRITE | CMD_TRIM => CMD_FLAG_FUA,
            CMD_WRITE_ZEROES if self.zeroes_fast => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
            CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE,
            CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
            _ => 0,
        };
        // qemu sets FUA wherever it was offered, reads and flushes included; the protocol lets servers ignore it.
        if header.flags & !(allowed | CMD_FLAG_FUA) != 0 {
            return Err(ErrorCode::Invalid);
        }
        let durability = if header.flags & CMD_FLAG_FUA == 0 { Durability::Later } else { Durability::BeforeReply };
        match header.command {
            CMD_READ => {
                let range = self.range(header, ErrorCode::Invalid)?;
                self.check_length(header)?;
                Ok(Request::Read(range, self.shape(header.flags)))
            }
            CMD_WRITE => {
                self.check_writable()?;
                self.check_length(header)?;
                let range = self.range(header, ErrorCode::NoSpace)?;
                Ok(Request::Write(range.start, durability))
            }
            CMD_WRITE_ZEROES => {
                self.check_writable()?;
                Ok(Request::Zero(self.range(header, ErrorCode::NoSpace)?, durability))
            }
            CMD_TRIM => {
                self.check_writable()?;
                Ok(Request::Discard(self.range(header, ErrorCode::Invalid)?, durability))
            }
            CMD_FLUSH => Ok(Request::Flush),
            CMD_CACHE => Ok(Request::Prefetch(self.range(header, ErrorCode::Invalid)?)),
            CMD_BLOCK_STATUS if self.allocation && header.length > 0 => {
                let pieces = if header.flags & CMD_FLAG_REQ_ONE == 0 { limits::STATUS_EXTENTS_MAX } else { 1 };
                Ok(Request::Status(self.range(header, ErrorCode::Invalid)?, pieces))
            }
            CMD_DISC => Ok(Request::Disconnect),
            _ => Err(ErrorCode::Invalid),
        }
    }

    fn shape(&self, flags: u16) -> ReadShape {
        match (self.structured, flags & CMD_FLAG_DF) {
            (false, _) => ReadShape::Simple,
            (true, 0) => ReadShape::Chunks,
            (true, _) => ReadShape::OneChunk,
        }
    }

    fn check_writable(&self) -> Result<(), ErrorCode> {
        if self.read_only { Err(ErrorCode::NotPermitted) } else { Ok(()) }
    }

    fn check_length(&self, header: &RequestHeader) -> Result<(), ErrorCode> {
        if header.length <= self.request_bytes_max {
            Ok(())
        } else if header.command == CMD_READ && header.flags & CMD_FLAG_DF != 0 {
            Err(ErrorCode::TooLarge)
        } else {
            Err(ErrorCode::Invalid)
        }
    }

    fn range(&self, header: &RequestHeader, beyond: ErrorCode) -> Result<Range<u64>, ErrorCode> {
        let end = header.offset.checked_add(u64::from(header.length)).ok_or(beyond)?;
        if end > self.size {
            return Err(beyond);
        }
        let block = u64::from(self.block_bytes.max(1));
        if !header.offset.is_multiple_of(block) || !u64::from(header.length).is_multiple_of(block) {
            return Err(ErrorCode::Invalid);
        }
        Ok(header.offset..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn terms() -> Terms {
        Terms {
            size: 1 << 20,
            read_only: false,
            block_bytes: 1,
            request_bytes_max: limits::REQUEST_BYTES_MAX,
            zeroes_fast: false,
            structured: true,
            allocation: true,
        }
    }

    fn header(command: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
        RequestHeader { flags, command, cookie: 7, offset, length }
    }

    #[test]
    fn errors_are_those_of_the_protocol() {
        let read_only = Terms { read_only: true, ..terms() };
        let bare = Terms { structured: false, allocation: false, ..terms() };
        let coarse = Terms { block_bytes: 512, ..terms() };
        let huge = Terms { size: 1 << 40, ..terms() };
        let end = 1 << 20;
        for (terms, header, expected) in [
            (terms(), header(CMD_READ, 0, end, 1), ErrorCode::Invalid),
            (terms(), header(CMD_READ, 0, u64::MAX, 1), ErrorCode::Invalid),
            (terms(), header(CMD_WRITE, 0, end - 1, 2), ErrorCode::NoSpace),
            (terms(), header(CMD_WRITE_ZEROES, 0, end - 1, 2), ErrorCode::NoSpace),
            (terms(), header(CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 0, 2), ErrorCode::Invalid),
            (terms(), header(CMD_TRIM, 0, end - 1, 2), ErrorCode::Invalid),
            (terms(), header(CMD_BLOCK_STATUS, 0, 0, 0), ErrorCode::Invalid),
            (terms(), header(8, 0, 0, 0), ErrorCode::Invalid),
            (terms(), header(CMD_READ, 1 << 9, 0, 1), ErrorCode::Invalid),
            (read_only, header(CMD_WRITE, 0, 0, 1), ErrorCode::NotPermitted),
            (read_only, header(CMD_TRIM, 0, 0, 1), ErrorCode::NotPermitted),
            (read_only, header(CMD_WRITE_ZEROES, 0, 0, 1), ErrorCode::NotPermitted),
            (bare, header(CMD_BLOCK_STATUS, 0, 0, 1), ErrorCode::Invalid),
            (bare, header(CMD_READ, CMD_FLAG_DF, 0, 1), ErrorCode::Invalid),
            (coarse, header(CMD_READ, 0, 256, 512), ErrorCode::Invalid),
            (huge, header(CMD_READ, 0, 0, limits::REQUEST_BYTES_MAX + 1), ErrorCode::Invalid),
            (huge, header(CMD_READ, CMD_FLAG_DF, 0, limits::REQUEST_BYTES_MAX + 1), ErrorCode::TooLarge),
            (huge, header(CMD_WRITE, 0, 0, limits::REQUEST_BYTES_MAX + 1), ErrorCode::Invalid),
        ] {
            assert_eq!(terms.check(&header), Err(expected), "{header:?}");
        }
    }

    #[test]
    fn accepted_requests_carry_their_flags() {
        assert_eq!(terms().check(&header(CMD_READ, CMD_FLAG_DF, 4, 8)), Ok(Request::Read(4..12, ReadShape::OneChunk)));
        assert_eq!(
            terms().check(&header(CMD_WRITE, CMD_FLAG_FUA, 4, 8)),
            Ok(Request::Write(4, Durability::BeforeReply))
        );
        assert_eq!(terms().check(&header(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 4, 8)), Ok(Request::Status(4..12, 1)));
        let huge = Terms { size: 1 << 40, ..terms() };
        assert_eq!(
            huge.check(&header(CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 0, u32::MAX)),
            Ok(Request::Zero(0..u64::from(u32::MAX), Durability::Later))
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_bytes_are_refused_or_lie_inside_the_export(bytes in any::<[u8; 24]>(), command in 0u16..10,
                                                          small in any::<bool>()) {
            let mut wire = [0; RequestHeader::BYTES];
            wire[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
            wire[4..].copy_from_slice(&bytes);
            wire[6..8].copy_from_slice(&command.to_be_bytes());
            if small {
                wire[4] = 0;
                wire[5] &= 0x1F;
                wire[16..22].fill(0);
                wire[24..26].fill(0);
            }
            let header = RequestHeader::decode(&wire).unwrap();
            prop_assert_eq!(header.encode(), wire);
            match terms().check(&header) {
                Ok(Request::Read(range, _) | Request::Discard(range, _) | Request::Zero(range, _)
                    | Request::Status(range, _) | Request::Prefetch(range)) => {
                    prop_assert!(range.start <= range.end && range.end <= terms().size);
                    prop_assert_eq!(range.end - range.start, u64::from(header.length));
                }
                Ok(Request::Write(offset, _)) => prop_assert!(offset + u64::from(header.length) <= terms().size),
                Ok(Request::Flush | Request::Disconnect) | Err(_) => {}
            }
        }

        #[test]
        fn what_is_no_request_is_refused(bytes in any::<[u8; 28]>()) {
            prop_assert_eq!(RequestHeader::decode(&bytes).is_ok(), bytes[..4] == MAGIC_REQUEST.to_be_bytes());
        }
    }
}
