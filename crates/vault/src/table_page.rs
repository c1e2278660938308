//! One page of a table: a leaf with entries and their leaf hashes, or an inner page with children.
//!
//! Pages come from outside: decoding never panics and allocates no more than a small multiple of the input.

use replication::codec::{DecodeError, Decoder, Encoder};
use replication::geometry::ByteRange;
use replication::{DiskId, LeafHash, SequenceNumber};

use crate::object::{FrameClass, FrameRef};
use crate::table::{
    Content, DATA_FRAME_BYTES_MAX, End, Entry, Key, PAGE_BYTES_MAX, Place, SOURCES_MAX, SourceIndex, Tree,
    in_one_granule,
};

const NARROW_LEAF: u8 = 1;
const WIDE_LEAF: u8 = 2;
const NARROW_INNER: u8 = 3;
const WIDE_INNER: u8 = 4;

const KIND: u8 = 0b11;
const KIND_DATA: u8 = 0;
const KIND_ZERO: u8 = 1;
const KIND_DISCARDED: u8 = 2;
const KIND_UNREADABLE: u8 = 3;
const NEW_DISK: u8 = 1 << 2;
const ADJACENT: u8 = 1 << 3;
const SAME_SEQUENCE: u8 = 1 << 4;
const SAME_LEN: u8 = 1 << 5;
const FRAME: u8 = 0b11 << 6;
const FRAME_EXPLICIT: u8 = 0;
const FRAME_SAME_NEXT_BYTE: u8 = 1 << 6;
const FRAME_SAME: u8 = 2 << 6;
const FRAME_NEXT: u8 = 3 << 6;

/// Most entries of one page; an entry takes at least one byte.
const ENTRIES_MAX: u64 = PAGE_BYTES_MAX as u64;

/// A decoded page.
#[derive(Debug)]
pub(crate) enum Page {
    Leaf(LeafPage),
    Inner(InnerPage),
}

/// Entries in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LeafPage {
    entries: Vec<Entry>,
    /// Where the hashes of each entry begin.
    hash_starts: Vec<u32>,
    hashes: Vec<LeafHash>,
}

/// References to pages of the next level, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct InnerPage {
    pub(crate) children: Vec<Child>,
}

/// A page, and what is below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    /// Key of the first entry.
    pub(crate) first: Key,
    /// The largest `(disk, end)` of all entries: nothing below reaches beyond it.
    pub(crate) end: End,
    /// The object that holds the page.
    pub(crate) source: SourceIndex,
    /// The page's frame in it.
    pub(crate) frame: FrameRef,
}

impl Page {
    /// Bytes of memory the decoded page takes.
    pub(crate) fn weight(&self) -> usize {
        match self {
            Page::Leaf(leaf) => {
                size_of_val(&leaf.entries[..]) + size_of_val(&leaf.hash_starts[..]) + size_of_val(&leaf.hashes[..])
            }
            Page::Inner(inner) => size_of_val(&inner.children[..]),
        }
    }

    /// Decodes a page that is expected to belong to `tree`.
    pub(crate) fn decode(bytes: bytes::Bytes, tree: Tree) -> Result<Page, DecodeError> {
        let mut input = Decoder::new(bytes);
        let kind = input.u8("page kind")?;
        let page = match (kind, tree) {
            (NARROW_LEAF, Tree::Narrow) | (WIDE_LEAF, Tree::Wide) => Page::Leaf(LeafPage::decode(&mut input, tree)?),
            (NARROW_INNER, Tree::Narrow) | (WIDE_INNER, Tree::Wide) => Page::Inner(InnerPage::decode(&mut input)?),
            _ => return Err(DecodeError::Undefined { field: "page kind", value: kind.into() }),
        };
        input.finish()?;
        Ok(page)
    }
}

impl LeafPage {
    /// The entries, in order.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The leaf hashes of entry `index`.
    pub(crate) fn hashes(&self, index: usize) -> &[LeafHash] {
        let start = self.hash_starts[index] as usize;
        &self.hashes[start..start + self.entries[index].leaf_count()]
    }

    fn decode(input: &mut Decoder, tree: Tree) -> Result<LeafPage, DecodeError> {
        let count = input.count("page entries", ENTRIES_MAX)?;
        let mut page = LeafPage { entries: Vec::with_capacity(count), ..LeafPage::default() };
        page.hash_starts.reserve(count);
        let mut previous = Previous::default();
        for _ in 0..count {
            let entry = previous.decode(input, tree)?;
            page.hash_starts.push(page.hashes.len() as u32);
            for _ in 0..entry.leaf_count() {
                page.hashes.push(LeafHash(input.array("leaf hash")?));
            }
            page.entries.push(entry);
        }
        Ok(page)
    }
}

impl InnerPage {
    /// Encodes the page.
    pub(crate) fn encode(&self, tree: Tree) -> Vec<u8> {
        let mut out = Encoder::with_capacity(8 + self.children.len() * 40);
        out.u8(if tree == Tree::Wide { WIDE_INNER } else { NARROW_INNER }).varint(self.children.len() as u64);
        for child in &self.children {
            out.varint(child.first.0.0.into()).varint(child.first.1).varint(child.first.2.0);
            out.varint(child.end.0.0.into()).varint(child.end.1);
            out.varint(child.source.0.into());
            encode_frame(child.frame, &mut out);
        }
        out.finish()
    }

    fn decode(input: &mut Decoder) -> Result<InnerPage, DecodeError> {
        let count = input.count("page children", ENTRIES_MAX)?;
        let mut children: Vec<Child> = Vec::with_capacity(count);
        for _ in 0..count {
            let first = (decode_disk(input)?, input.varint("first start")?, SequenceNumber(input.varint("sequence")?));
            let end = (decode_disk(input)?, input.varint("last end")?);
            let source = decode_source(input)?;
            let frame = decode_frame(input, FrameClass::Index, PAGE_BYTES_MAX)?;
            if children.last().is_some_and(|last| last.first > first) || (first.0, first.1) >= end {
                return Err(DecodeError::Inconsistent("the children of a page are out of order"));
            }
            children.push(Child { first, end, source, frame });
        }
        Ok(InnerPage { children })
    }
}

/// Appends a frame reference; its class is known from where it stands.
pub(crate) fn encode_frame(frame: FrameRef, out: &mut Encoder) {
    out.varint(frame.offset)
        .varint(frame.sealed_len.into())
        .varint(frame.plain_len.into())
        .varint(frame.ordinal.into());
}

/// Reads a frame reference whose plaintext has at most `plain_max` bytes.
pub(crate) fn decode_frame(input: &mut Decoder, class: FrameClass, plain_max: usize) -> Result<FrameRef, DecodeError> {
    let offset = input.varint("frame offset")?;
    let (sealed_len, plain_len) = decode_frame_lens(input, plain_max)?;
    let ordinal = input.varint_max("frame ordinal", u32::MAX.into())? as u32;
    checked_frame(FrameRef { offset, sealed_len, plain_len, ordinal, class })
}

fn decode_frame_lens(input: &mut Decoder, plain_max: usize) -> Result<(u32, u32), DecodeError> {
    // A sealed frame is at most its plaintext and a little.
    let sealed_len = input.varint_max("sealed length", plain_max as u64 + 1024)? as u32;
    let plain_len = input.varint_max("plain length", plain_max as u64)? as u32;
    Ok((sealed_len, plain_len))
}

fn checked_frame(frame: FrameRef) -> Result<FrameRef, DecodeError> {
    match frame.offset.checked_add(frame.sealed_len.into()) {
        Some(_) => Ok(frame),
        None => Err(DecodeError::Inconsistent("a frame ends beyond 2^64")),
    }
}

fn decode_disk(input: &mut Decoder) -> Result<DiskId, DecodeError> {
    Ok(DiskId(input.varint_max("disk id", u16::MAX.into())? as u16))
}

fn decode_source(input: &mut Decoder) -> Result<SourceIndex, DecodeError> {
    Ok(SourceIndex(input.varint_max("source index", SOURCES_MAX as u64)? as u32))
}

/// Collects entries into an encoded leaf page.
#[derive(Debug)]
pub(crate) struct LeafWriter {
    tree: Tree,
    body: Encoder,
    count: u64,
    previous: Previous,
    first: Option<Key>,
    end: End,
}

impl LeafWriter {
    /// An empty page of `tree`.
    pub(crate) fn new(tree: Tree) -> LeafWriter {
        let body = Encoder::with_capacity(PAGE_BYTES_MAX);
        LeafWriter { tree, body, count: 0, previous: Previous::default(), first: None, end: End::default() }
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.body.len()
    }

    /// Key of the first entry and the largest end, if there is an entry.
    pub(crate) fn span(&self) -> Option<(Key, End)> {
        self.first.map(|first| (first, self.end))
    }

    /// Appends an entry, which must not sort before the last one, with its leaf hashes.
    pub(crate) fn push(&mut self, entry: &Entry, hashes: &[LeafHash]) {
        assert_eq!(hashes.len(), entry.leaf_count(), "one hash for each whole leaf of data");
        assert!(self.tree == Tree::Wide || in_one_granule(entry.range), "a narrow entry lies inside one granule");
        assert!(self.count == 0 || self.previous.key() <= entry.key(), "entries come in order");
        self.previous.encode(entry, &mut self.body);
        for hash in hashes {
            self.body.raw(&hash.0);
        }
        self.count += 1;
        self.first.get_or_insert(entry.key());
        self.end = self.end.max(entry.end());
    }

    /// The page.
    pub(crate) fn finish(self) -> Vec<u8> {
        let body = self.body.finish();
        let mut out = Encoder::with_capacity(body.len() + 8);
        out.u8(if self.tree == Tree::Wide { WIDE_LEAF } else { NARROW_LEAF }).varint(self.count).raw(&body);
        out.finish()
    }
}

/// What an entry's fields are encoded against.
#[derive(Debug, Default)]
struct Previous {
    disk: DiskId,
    start: u64,
    len: u64,
    sequence: SequenceNumber,
    place: Option<Place>,
    /// Length of the entry at `place`.
    place_len: u64,
}

impl Previous {
    fn key(&self) -> Key {
        (self.disk, self.start, self.sequence)
    }

    fn remember(&mut self, entry: &Entry) {
        self.disk = entry.disk;
        self.start = entry.range.start;
        self.len = entry.range.len;
        self.sequence = entry.sequence;
        if let Content::Data(place) = entry.content {
            self.place = Some(place);
            self.place_len = entry.range.len;
        }
    }

    fn encode(&mut self, entry: &Entry, out: &mut Encoder) {
        let mut flags = match entry.content {
            Content::Data(place) => KIND_DATA | self.frame_flag(place),
            Content::Zero => KIND_ZERO,
            Content::Discarded => KIND_DISCARDED,
            Content::Unreadable => KIND_UNREADABLE,
        };
        let new_disk = entry.disk != self.disk;
        let adjacent = !new_disk && entry.range.start == self.start + self.len;
        for (set, flag) in [
            (new_disk, NEW_DISK),
            (adjacent, ADJACENT),
            (entry.sequence == self.sequence, SAME_SEQUENCE),
            (entry.range.len == self.len, SAME_LEN),
        ] {
            flags |= if set { flag } else { 0 };
        }
        out.u8(flags);
        if new_disk {
            out.varint((entry.disk.0 - self.disk.0).into()).varint(entry.range.start);
        } else if !adjacent {
            out.varint(entry.range.start - self.start);
        }
        if flags & SAME_SEQUENCE == 0 {
            out.varint(zigzag(entry.sequence.0.wrapping_sub(self.sequence.0) as i64));
        }
        if flags & SAME_LEN == 0 {
            out.varint(entry.range.len);
        }
        if let Content::Data(place) = entry.content {
            match flags & FRAME {
                FRAME_SAME_NEXT_BYTE => {}
                FRAME_SAME => {
                    out.varint(place.at.into());
                }
                FRAME_NEXT => {
                    out.varint(place.frame.sealed_len.into()).varint(place.frame.plain_len.into());
                    out.varint(place.at.into());
                }
                _ => {
                    out.varint(place.source.0.into());
                    encode_frame(place.frame, out);
                    out.varint(place.at.into());
                }
            }
        }
        self.remember(entry);
    }

    fn frame_flag(&self, place: Place) -> u8 {
        let Some(last) = self.place else { return FRAME_EXPLICIT };
        if place.source != last.source {
            FRAME_EXPLICIT
        } else if place.frame == last.frame {
            let next_byte = u64::from(last.at) + self.place_len;
            if u64::from(place.at) == next_byte { FRAME_SAME_NEXT_BYTE } else { FRAME_SAME }
        } else if place.frame.offset == last.frame.offset + u64::from(last.frame.sealed_len)
            && last.frame.ordinal.checked_add(1) == Some(place.frame.ordinal)
        {
            FRAME_NEXT
        } else {
            FRAME_EXPLICIT
        }
    }

    fn decode(&mut self, input: &mut Decoder, tree: Tree) -> Result<Entry, DecodeError> {
        let flags = input.u8("entry flags")?;
        let beyond = DecodeError::Inconsistent("an entry lies beyond 2^64 bytes or disk 65535");
        let (disk, start) = if flags & NEW_DISK != 0 {
            let delta = input.varint_max("disk delta", u16::MAX.into())? as u16;
            let disk = self.disk.0.checked_add(delta).filter(|_| delta > 0).ok_or(beyond.clone())?;
            (DiskId(disk), Some(input.varint("entry start")?))
        } else if flags & ADJACENT != 0 {
            (self.disk, self.start.checked_add(self.len))
        } else {
            (self.disk, self.start.checked_add(input.varint("entry start delta")?))
        };
        let start = start.ok_or(beyond.clone())?;
        let sequence = if flags & SAME_SEQUENCE != 0 {
            self.sequence
        } else {
            let delta = unzigzag(input.varint("sequence delta")?);
            SequenceNumber(self.sequence.0.wrapping_add(delta as u64))
        };
        let len = if flags & SAME_LEN != 0 { self.len } else { input.varint("entry length")? };
        if len == 0 || start.checked_add(len).is_none() {
            return Err(beyond);
        }
        let range = ByteRange { start, len };
        if (disk, start, sequence) < self.key() {
            return Err(DecodeError::Inconsistent("the entries of a page are out of order"));
        }
        if tree == Tree::Narrow && !in_one_granule(range) {
            return Err(DecodeError::Inconsistent("an entry crosses a granule's edge"));
        }
        let content = match flags & KIND {
            KIND_ZERO => Content::Zero,
            KIND_DISCARDED => Content::Discarded,
            KIND_UNREADABLE if tree == Tree::Narrow => Content::Unreadable,
            KIND_DATA if tree == Tree::Narrow => Content::Data(self.decode_place(flags, len, input)?),
            kind => return Err(DecodeError::Undefined { field: "wide entry kind", value: kind.into() }),
        };
        let entry = Entry { disk, range, sequence, content };
        self.remember(&entry);
        Ok(entry)
    }

    fn decode_place(&self, flags: u8, len: u64, input: &mut Decoder) -> Result<Place, DecodeError> {
        let last = || self.place.ok_or(DecodeError::Inconsistent("a page's first data entry refers to one before it"));
        let place = match flags & FRAME {
            FRAME_SAME_NEXT_BYTE => {
                let last = last()?;
                // Both were checked against the frame's plaintext, which is small.
                Place { at: last.at + self.place_len as u32, ..last }
            }
            FRAME_SAME => Place { at: decode_at(input)?, ..last()? },
            FRAME_NEXT => {
                let last = last()?;
                let (sealed_len, plain_len) = decode_frame_lens(input, DATA_FRAME_BYTES_MAX)?;
                let ordinal = last.frame.ordinal.checked_add(1);
                let ordinal = ordinal.ok_or(DecodeError::Inconsistent("a frame ordinal is beyond 2^32"))?;
                let offset = last.frame.offset + u64::from(last.frame.sealed_len);
                let frame =
                    checked_frame(FrameRef { offset, sealed_len, plain_len, ordinal, class: FrameClass::Data })?;
                Place { source: last.source, frame, at: decode_at(input)? }
            }
            _ => Place {
                source: decode_source(input)?,
                frame: decode_frame(input, FrameClass::Data, DATA_FRAME_BYTES_MAX)?,
                at: decode_at(input)?,
            },
        };
        if u64::from(place.at) + len > u64::from(place.frame.plain_len) {
            return Err(DecodeError::Inconsistent("an entry reaches beyond its frame"));
        }
        Ok(place)
    }
}

fn decode_at(input: &mut Decoder) -> Result<u32, DecodeError> {
    Ok(input.varint_max("offset in the frame", DATA_FRAME_BYTES_MAX as u64)? as u32)
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
