//! A layer: one table of a chain, as manifests and checkpoints refer to it.

use replication::codec::{DecodeError, Decoder, Encoder};
use replication::geometry::ByteRange;
use replication::{DiskId, SequenceNumber};

use crate::limits;
use crate::object::{FrameClass, FrameRef};
use crate::store::ObjectName;
use crate::table_page::{decode_frame, encode_frame};
use crate::table_root::decode_name;

/// What a table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// The changes of one seal interval.
    Segment,
    /// Several segments or merged tables of one generation; all their entries.
    Merged,
    /// What one heal read, or a part of it; every entry at the heal's `p0`.
    Image,
}

/// The object that holds a table's root frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// An object of its own.
    Object(ObjectName),
    /// The manifest that the reference stands in. [`LayerRef::resolve`] turns it into a name.
    ThisManifest,
}

/// One table of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRef {
    /// What it holds.
    pub kind: LayerKind,
    /// How often its content was merged: 0 for segments and images.
    pub level: u8,
    /// Where it is.
    pub host: Host,
    /// The table's root frame in the host.
    pub root: FrameRef,
    /// Smallest sequence number of an entry.
    pub first: SequenceNumber,
    /// Largest sequence number of an entry.
    pub last: SequenceNumber,
    /// Smallest disk, and first byte on it, that an entry is about.
    pub begin: (DiskId, u64),
    /// Largest disk, and one past the last byte on it, that an entry is about.
    pub end: (DiskId, u64),
    /// Number of entries.
    pub entries: u64,
    /// Bytes of disk data that the entries refer to, before compression.
    pub data_bytes: u64,
    /// Bytes of the table itself.
    pub index_bytes: u64,
}

const SEGMENT: u8 = 1;
const MERGED: u8 = 2;
const IMAGE: u8 = 3;

impl LayerRef {
    /// This reference as seen from outside the manifest `manifest` that holds it.
    pub fn resolve(mut self, manifest: &ObjectName) -> LayerRef {
        if self.host == Host::ThisManifest {
            self.host = Host::Object(manifest.clone());
        }
        self
    }

    /// The object that holds the table's root, once resolved.
    pub fn object(&self) -> Option<&ObjectName> {
        match &self.host {
            Host::Object(name) => Some(name),
            Host::ThisManifest => None,
        }
    }

    /// Whether the table may hold an entry about `range`.
    pub fn may_cover(&self, disk: DiskId, range: ByteRange) -> bool {
        self.begin < (disk, range.end()) && self.end > (disk, range.start)
    }

    /// Appends the reference.
    pub fn encode(&self, out: &mut Encoder) {
        out.u8(match self.kind {
            LayerKind::Segment => SEGMENT,
            LayerKind::Merged => MERGED,
            LayerKind::Image => IMAGE,
        });
        out.u8(self.level);
        // An empty text is no object name, so it can stand for the manifest itself.
        out.text(self.object().map_or("", ObjectName::as_str));
        encode_frame(self.root, out);
        out.varint(self.first.0).varint(self.last.0);
        for (disk, byte) in [self.begin, self.end] {
            out.varint(disk.0.into()).varint(byte);
        }
        out.varint(self.entries).varint(self.data_bytes).varint(self.index_bytes);
    }

    /// Reads a reference.
    pub fn decode(input: &mut Decoder) -> Result<LayerRef, DecodeError> {
        let kind = match input.u8("layer kind")? {
            SEGMENT => LayerKind::Segment,
            MERGED => LayerKind::Merged,
            IMAGE => LayerKind::Image,
            value => return Err(DecodeError::Undefined { field: "layer kind", value: value.into() }),
        };
        let level = input.u8("layer level")?;
        let mut ahead = input.clone();
        let host = if ahead.varint("layer host")? == 0 {
            *input = ahead;
            Host::ThisManifest
        } else {
            Host::Object(decode_name(input)?)
        };
        let root = decode_frame(input, FrameClass::Index, limits::FRAME_PLAIN_BYTES_MAX)?;
        let first = SequenceNumber(input.varint("first sequence")?);
        let last = SequenceNumber(input.varint("last sequence")?);
        let mut place = || -> Result<(DiskId, u64), DecodeError> {
            let disk = DiskId(input.varint_max("disk id", u16::MAX.into())? as u16);
            Ok((disk, input.varint("layer bound")?))
        };
        let (begin, end) = (place()?, place()?);
        if first > last || begin > end {
            return Err(DecodeError::Inconsistent("a layer ends before it begins"));
        }
        let entries = input.varint("layer entries")?;
        let data_bytes = input.varint("layer data bytes")?;
        let index_bytes = input.varint("layer index bytes")?;
        Ok(LayerRef { kind, level, host, root, first, last, begin, end, entries, data_bytes, index_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layer(host: Host) -> LayerRef {
        LayerRef {
            kind: LayerKind::Merged,
            level: 2,
            host,
            root: FrameRef { offset: 1 << 40, sealed_len: 900, plain_len: 800, ordinal: 7, class: FrameClass::Index },
            first: SequenceNumber(5),
            last: SequenceNumber(1 << 50),
            begin: (DiskId(0), 4096),
            end: (DiskId(3), 8192),
            entries: 12,
            data_bytes: 34,
            index_bytes: 56,
        }
    }

    #[test]
    fn references_read_back_and_resolve() {
        let name = ObjectName::new("chains/00/s/01").expect("valid");
        for host in [Host::ThisManifest, Host::Object(name.clone())] {
            let mut out = Encoder::new();
            layer(host.clone()).encode(&mut out);
            let mut input = Decoder::new(out.finish());
            let decoded = LayerRef::decode(&mut input).expect("decodes");
            input.finish().expect("nothing left");
            assert_eq!(decoded, layer(host));
            assert_eq!(decoded.resolve(&name).object(), Some(&name));
        }
    }

    #[test]
    fn bounds_span_disks() {
        let layer = layer(Host::ThisManifest);
        assert!(!layer.may_cover(DiskId(0), ByteRange::new(0, 4096)));
        assert!(layer.may_cover(DiskId(0), ByteRange::new(0, 4097)));
        assert!(layer.may_cover(DiskId(2), ByteRange::new(1 << 60, 1)));
        assert!(layer.may_cover(DiskId(3), ByteRange::new(8191, 10)));
        assert!(!layer.may_cover(DiskId(3), ByteRange::new(8192, 10)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>, flip in 0..200usize, value: u8) {
            let _ = LayerRef::decode(&mut Decoder::new(bytes));
            let mut out = Encoder::new();
            layer(Host::ThisManifest).encode(&mut out);
            let mut bytes = out.finish();
            let index = flip % bytes.len();
            bytes[index] = value;
            let _ = LayerRef::decode(&mut Decoder::new(bytes));
        }
    }
}
