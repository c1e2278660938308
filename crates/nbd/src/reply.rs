//! Replies of the transmission phase, laid out in one buffer in the order they are sent. Pure.
//!
//! Data is read from the device straight into its place behind the reply's header, so that it is never copied and a
//! batch of replies leaves with one system call.

use std::io::IoSlice;
use std::ops::Range;

use world::{BlockError, Extent, ExtentKind};

use crate::limits;
use crate::protocol::{
    CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CHUNK_ERROR_OFFSET, CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE,
    CONTEXT_ALLOCATION_ID, ErrorCode, MAGIC_CHUNK, MAGIC_SIMPLE_REPLY, STATE_HOLE, STATE_ZERO,
};
use crate::request::ReadShape;

const SIMPLE_HEADER: usize = 16;
const CHUNK_HEADER: usize = 20;
const DATA_HEADER: usize = CHUNK_HEADER + 8;
/// Unit in bytes in which runs of zeroes are looked for.
const ZERO_BLOCK: usize = 4096;

/// The number that tells a client about `error`.
pub fn error_code(error: &BlockError) -> ErrorCode {
    match error {
        BlockError::OutOfRange { .. } => ErrorCode::Invalid,
        BlockError::ReadOnly => ErrorCode::NotPermitted,
        BlockError::NoSpace => ErrorCode::NoSpace,
        BlockError::Unreadable { .. } | BlockError::Failed(_) | BlockError::Corrupt(_) => ErrorCode::Io,
    }
}

/// Replies that wait to be sent. Memory is kept between uses.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Initialised memory; only `..used` has a meaning.
    bytes: Vec<u8>,
    used: usize,
    /// Pieces of `bytes` in the order they are sent.
    order: Vec<Range<usize>>,
}

impl Outbox {
    /// An outbox without replies.
    pub fn new() -> Outbox {
        Outbox::default()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Bytes gathered.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Forgets the replies and keeps at most `keep` bytes of memory.
    pub fn clear(&mut self, keep: usize) {
        self.used = 0;
        self.order.clear();
        if self.bytes.len() > keep {
            self.bytes.truncate(keep);
            self.bytes.shrink_to_fit();
        }
    }

    /// The pieces to send, in order.
    pub fn pieces(&self) -> Vec<IoSlice<'_>> {
        self.order.iter().map(|piece| IoSlice::new(&self.bytes[piece.clone()])).collect()
    }

    /// A simple reply without data: success or an error.
    pub fn push_simple(&mut self, cookie: u64, result: Result<(), ErrorCode>) {
        let header = simple_header(cookie, result.err());
        self.push(&header);
    }

    /// The reply to a read of `range`, whose bytes `read` fills in.
    pub fn push_read(
        &mut self,
        cookie: u64,
        range: Range<u64>,
        shape: ReadShape,
        read: impl FnOnce(&mut [u8]) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        let length = usize::try_from(range.end - range.start).expect("a checked read is at most 32 MiB");
        let start = self.used;
        let header_bytes = if shape == ReadShape::Simple { SIMPLE_HEADER } else { DATA_HEADER };
        let data = self.grow(header_bytes + length).end - length..start + header_bytes + length;
        if let Err(error) = read(&mut self.bytes[data.clone()]) {
            self.used = start;
            match shape {
                ReadShape::Simple => self.push_simple(cookie, Err(error_code(&error))),
                ReadShape::OneChunk | ReadShape::Chunks => self.push_read_error(cookie, &range, &error),
            }
            return Err(error);
        }
        match shape {
            ReadShape::Simple => {
                self.bytes[start..data.start].copy_from_slice(&simple_header(cookie, None));
                self.send(start..data.end);
            }
            ReadShape::OneChunk => self.send_whole(cookie, range.start, start, data),
            ReadShape::Chunks => match runs(&self.bytes[data.clone()]).as_slice() {
                [] => {
                    self.used = start;
                    self.push(&chunk_header(CHUNK_DONE, CHUNK_NONE, cookie, 0));
                }
                [(_, Content::Data)] => self.send_whole(cookie, range.start, start, data),
                [(_, Content::Zeroes)] => {
                    self.used = start;
                    self.push(&hole_chunk(CHUNK_DONE, cookie, range.start, length));
                }
                several => self.send_runs(cookie, range.start, data.start, several),
            },
        }
        Ok(())
    }

    /// A structured reply that is an error without a place in a read.
    pub fn push_error_chunk(&mut self, cookie: u64, error: ErrorCode, message: &str) {
        let message = shorten(message);
        self.push(&chunk_header(CHUNK_DONE, CHUNK_ERROR, cookie, 6 + message.len()));
        self.push(&(error as u32).to_be_bytes());
        self.push(&(message.len() as u16).to_be_bytes());
        self.push(message.as_bytes());
    }

    /// The allocation map: `extents` in order, adjacent ones of the same kind already merged.
    pub fn push_status(&mut self, cookie: u64, extents: &[Extent]) {
        self.push(&chunk_header(CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, 4 + 8 * extents.len()));
        self.push(&CONTEXT_ALLOCATION_ID.to_be_bytes());
        for extent in extents {
            let length = u32::try_from(extent.range.end - extent.range.start)
                .expect("the pieces of a request whose length is 32 bits have at most 32 bits");
            let state = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Zero => STATE_ZERO,
                ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
            };
            self.push(&length.to_be_bytes());
            self.push(&state.to_be_bytes());
        }
    }

    fn push_read_error(&mut self, cookie: u64, range: &Range<u64>, error: &BlockError) {
        let BlockError::Unreadable { start, .. } = error else {
            return self.push_error_chunk(cookie, error_code(error), &error.to_string());
        };
        let text = error.to_string();
        let message = shorten(&text);
        let place = (*start).clamp(range.start, range.end.saturating_sub(1).max(range.start));
        self.push(&chunk_header(CHUNK_DONE, CHUNK_ERROR_OFFSET, cookie, 14 + message.len()));
        self.push(&(error_code(error) as u32).to_be_bytes());
        self.push(&(message.len() as u16).to_be_bytes());
        self.push(message.as_bytes());
        self.push(&place.to_be_bytes());
    }

    /// Sends the data in `data`, whose chunk header belongs at `start`, as one chunk.
    fn send_whole(&mut self, cookie: u64, offset: u64, start: usize, data: Range<usize>) {
        if data.is_empty() {
            self.used = start;
            return self.push(&chunk_header(CHUNK_DONE, CHUNK_NONE, cookie, 0));
        }
        self.bytes[start..data.start].copy_from_slice(&data_header(CHUNK_DONE, cookie, offset, data.len()));
        self.send(start..data.end);
    }

    /// Sends data that lies at `base` as one chunk for each run; the headers are put behind the data.
    fn send_runs(&mut self, cookie: u64, offset: u64, base: usize, runs: &[(Range<usize>, Content)]) {
        for (index, (run, content)) in runs.iter().enumerate() {
            let flags = if index + 1 == runs.len() { CHUNK_DONE } else { 0 };
            let at = offset + run.start as u64;
            match content {
                Content::Zeroes => self.push(&hole_chunk(flags, cookie, at, run.len())),
                Content::Data => {
                    self.push(&data_header(flags, cookie, at, run.len()));
                    self.send(base + run.start..base + run.end);
                }
            }
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        let place = self.grow(bytes.len());
        self.bytes[place.clone()].copy_from_slice(bytes);
        self.send(place);
    }

    fn grow(&mut self, bytes: usize) -> Range<usize> {
        let place = self.used..self.used + bytes;
        if self.bytes.len() < place.end {
            self.bytes.resize(place.end, 0);
        }
        self.used = place.end;
        place
    }

    fn send(&mut self, piece: Range<usize>) {
        match self.order.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => self.order.push(piece),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Data,
    Zeroes,
}

/// Splits `bytes` into data and runs of zeroes that are worth a chunk of their own.
fn runs(bytes: &[u8]) -> Vec<(Range<usize>, Content)> {
    let mut runs: Vec<(Range<usize>, Content)> = Vec::new();
    for start in (0..bytes.len()).step_by(ZERO_BLOCK) {
        let end = (start + ZERO_BLOCK).min(bytes.len());
        let content = if is_zero(&bytes[start..end]) { Content::Zeroes } else { Content::Data };
        match runs.last_mut() {
            Some((run, last)) if *last == content => run.end = end,
            _ => runs.push((start..end, content)),
        }
    }
    if runs.len() < 2 {
        return runs;
    }
    // A short run of zeroes costs more as a chunk than as bytes.
    let mut merged: Vec<(Range<usize>, Content)> = Vec::new();
    for (run, content) in runs {
        let content = if run.len() < limits::HOLE_BYTES_MIN { Content::Data } else { content };
        match merged.last_mut() {
            Some((last_run, last)) if *last == content => last_run.end = run.end,
            _ => merged.push((run, content)),
        }
    }
    merged
}

fn is_zero(bytes: &[u8]) -> bool {
    // Data nearly always shows in its first bytes; the rest is summed without branches, which compiles to vectors.
    let (head, tail) = bytes.split_at(bytes.len().min(32));
    head.iter().all(|byte| *byte == 0) && tail.iter().fold(0, |sum, byte| sum | byte) == 0
}

fn simple_header(cookie: u64, error: Option<ErrorCode>) -> [u8; SIMPLE_HEADER] {
    let mut header = [0; SIMPLE_HEADER];
    header[..4].copy_from_slice(&MAGIC_SIMPLE_REPLY.to_be_bytes());
    header[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    header[8..].copy_from_slice(&cookie.to_be_bytes());
    header
}

fn chunk_header(flags: u16, kind: u16, cookie: u64, payload: usize) -> [u8; CHUNK_HEADER] {
    let mut header = [0; CHUNK_HEADER];
    header[..4].copy_from_slice(&MAGIC_CHUNK.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    let payload = u32::try_from(payload).expect("a reply is bounded by the largest request and the longest map");
    header[16..].copy_from_slice(&payload.to_be_bytes());
    header
}

fn data_header(flags: u16, cookie: u64, offset: u64, length: usize) -> [u8; DATA_HEADER] {
    let mut header = [0; DATA_HEADER];
    header[..CHUNK_HEADER].copy_from_slice(&chunk_header(flags, CHUNK_OFFSET_DATA, cookie, 8 + length));
    header[CHUNK_HEADER..].copy_from_slice(&offset.to_be_bytes());
    header
}

fn hole_chunk(flags: u16, cookie: u64, offset: u64, length: usize) -> [u8; CHUNK_HEADER + 12] {
    let mut chunk = [0; CHUNK_HEADER + 12];
    chunk[..CHUNK_HEADER].copy_from_slice(&chunk_header(flags, CHUNK_OFFSET_HOLE, cookie, 12));
    chunk[CHUNK_HEADER..CHUNK_HEADER + 8].copy_from_slice(&offset.to_be_bytes());
    let length = u32::try_from(length).expect("a checked read is at most 32 MiB");
    chunk[CHUNK_HEADER + 8..].copy_from_slice(&length.to_be_bytes());
    chunk
}

fn shorten(message: &str) -> &str {
    let mut end = message.len().min(limits::ERROR_MESSAGE_BYTES_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::split;
    use proptest::prelude::*;

    fn sent(outbox: &Outbox) -> Vec<u8> {
        outbox.pieces().iter().flat_map(|piece| piece.to_vec()).collect()
    }

    /// Reads a structured read reply the slow way.
    fn decode(mut wire: &[u8], offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0xEE; length];
        let mut covered = 0;
        loop {
            let (header, rest) = split::<CHUNK_HEADER>(wire).unwrap();
            assert_eq!(header[..4], MAGIC_CHUNK.to_be_bytes());
            assert_eq!(header[8..16], 42u64.to_be_bytes());
            let kind = u16::from_be_bytes([header[6], header[7]]);
            let payload = u32::from_be_bytes(header[16..].try_into().unwrap()) as usize;
            let (body, rest) = rest.split_at(payload);
            if kind != CHUNK_NONE {
                let at = (u64::from_be_bytes(body[..8].try_into().unwrap()) - offset) as usize;
                match kind {
                    CHUNK_OFFSET_DATA => {
                        data[at..at + payload - 8].copy_from_slice(&body[8..]);
                        covered += payload - 8;
                    }
                    CHUNK_OFFSET_HOLE => {
                        let hole = u32::from_be_bytes(body[8..].try_into().unwrap()) as usize;
                        data[at..at + hole].fill(0);
                        covered += hole;
                    }
                    other => panic!("chunk of kind {other}"),
                }
            }
            wire = rest;
            if header[5] & 1 == 1 {
                assert!(wire.is_empty(), "something follows the last chunk");
                assert_eq!(covered, length, "every byte is told exactly once");
                return data;
            }
        }
    }

    fn content() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec((any::<bool>(), 0usize..200_000), 0..6).prop_map(|parts| {
            parts.into_iter().flat_map(|(zero, len)| std::iter::repeat_n(u8::from(!zero) * 7, len)).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn chunks_say_what_was_read(contents in proptest::collection::vec(content(), 1..3), offset in 0u64..1 << 40) {
            for shape in [ReadShape::Chunks, ReadShape::OneChunk] {
                let mut outbox = Outbox::new();
                for content in &contents {
                    let range = offset..offset + content.len() as u64;
                    outbox.clear(usize::MAX);
                    outbox.push_read(42, range, shape, |buffer| {
                        buffer.copy_from_slice(content);
                        Ok(())
                    }).unwrap();
                    prop_assert!(&decode(&sent(&outbox), offset, content.len()) == content);
                }
            }
        }
    }

    #[test]
    fn replies_of_a_batch_stay_in_order_and_in_one_piece() {
        let mut outbox = Outbox::new();
        outbox.push_simple(1, Ok(()));
        outbox
            .push_read(2, 10..14, ReadShape::Simple, |buffer| {
                buffer.copy_from_slice(b"data");
                Ok(())
            })
            .unwrap();
        outbox.push_simple(3, Err(ErrorCode::NoSpace));
        let mut expected = simple_header(1, None).to_vec();
        expected.extend(simple_header(2, None));
        expected.extend(b"data");
        expected.extend(simple_header(3, Some(ErrorCode::NoSpace)));
        assert_eq!(outbox.pieces().len(), 1);
        assert_eq!(sent(&outbox), expected);
    }

    #[test]
    fn an_unreadable_sector_is_named_and_its_data_is_not_sent() {
        let mut outbox = Outbox::new();
        let failed = outbox.push_read(42, 4096..12_288, ReadShape::Chunks, |buffer| {
            buffer.fill(9);
            Err(BlockError::Unreadable { start: 8192, end: 12_288, source: std::io::ErrorKind::Other.into() })
        });
        assert!(failed.is_err());
        let wire = sent(&outbox);
        assert_eq!(wire[6..8], CHUNK_ERROR_OFFSET.to_be_bytes());
        assert_eq!(wire[20..24], 5u32.to_be_bytes());
        assert_eq!(wire[wire.len() - 8..], 8192u64.to_be_bytes());
        assert_eq!(&wire[26..wire.len() - 8], b"bytes 8192..12288 cannot be read");
    }
}
