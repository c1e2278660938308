//! The bytes of a manifest's root frame.

use replication::codec::{DecodeError, Decoder, Encoder};
use replication::{
    ByteRange, ChainId, Cut, CutKind, DiskGeometry, DiskId, MachineId, MarkerKind, PointTime, Position, SequenceNumber,
    StreamHash,
};

use super::{
    Checkpoint, CheckpointLink, Defect, Delta, Gap, GapClosed, GapScope, GeometryChange, Manifest, ManifestKind,
    ManifestLink,
};
use crate::error::{Damage, VaultError};
use crate::keys::{NameEpoch, NameSwitch, ObjectNonce};
use crate::layer::LayerRef;
use crate::limits;
use crate::store::ObjectName;

const GENESIS: u8 = 1;
const OPEN: u8 = 2;
const APPEND: u8 = 3;
const CLOSE: u8 = 4;
const COMMIT: u8 = 5;
const CANCEL: u8 = 6;
const HAND_OVER: u8 = 8;
// Manifest kinds of later versions; 7 is to be the watermark.
const RESERVED_KINDS: std::ops::RangeInclusive<u8> = 7..=31;
const KIND_FIELD: &str = "manifest kind";

pub(crate) fn encode_manifest(manifest: &Manifest) -> Vec<u8> {
    let mut out = Encoder::new();
    out.varint(manifest.number).varint(manifest.opened.0);
    manifest.opened.1.encode(&mut out);
    option(&mut out, manifest.names.as_ref(), |out, switch| switch.encode(out));
    option(&mut out, manifest.parent.as_ref(), |out, link| link.encode(out));
    option(&mut out, manifest.last_checkpoint.as_ref(), |out, link| link.encode(out));
    match &manifest.kind {
        ManifestKind::Genesis { machine, parent } => {
            out.u8(GENESIS).raw(&machine.0);
            option(&mut out, parent.as_ref(), |out, position| {
                out.raw(&position.chain.0).u64(position.sequence.0);
            });
        }
        ManifestKind::OpenGeneration { reason, base } => {
            out.u8(OPEN).text(reason).u64(base.0);
        }
        ManifestKind::Append => {
            out.u8(APPEND);
        }
        ManifestKind::Close { successor, reason, seconds } => {
            out.u8(CLOSE).raw(&successor.0).text(reason).u64(*seconds);
        }
        ManifestKind::Commit { close } => {
            out.u8(COMMIT).raw(&close.0);
        }
        ManifestKind::Cancel { close, reason } => {
            out.u8(CANCEL).raw(&close.0).text(reason);
        }
        ManifestKind::HandOver => {
            out.u8(HAND_OVER);
        }
    }
    encode_delta(&manifest.delta, &mut out);
    option(&mut out, manifest.checkpoint.as_deref(), |out, checkpoint| encode_checkpoint(checkpoint, out));
    out.finish()
}

pub(crate) fn decode_manifest(bytes: &bytes::Bytes) -> Result<Manifest, DecodeError> {
    let input = &mut Decoder::new(bytes.clone());
    let manifest = Manifest {
        number: input.varint("manifest number")?,
        opened: (input.varint("opening manifest")?, NameEpoch::decode(input)?),
        names: decode_option(input, NameSwitch::decode)?,
        parent: decode_option(input, ManifestLink::decode)?,
        last_checkpoint: decode_option(input, CheckpointLink::decode)?,
        kind: match input.u8(KIND_FIELD)? {
            GENESIS => ManifestKind::Genesis {
                machine: MachineId(input.array("machine id")?),
                parent: decode_option(input, |input| {
                    Ok(Position {
                        chain: ChainId(input.array("parent chain")?),
                        sequence: SequenceNumber(input.u64("parent sequence")?),
                    })
                })?,
            },
            OPEN => ManifestKind::OpenGeneration {
                reason: input.text("reason of a generation", limits::REASON_BYTES_MAX)?,
                base: SequenceNumber(input.u64("base of a generation")?),
            },
            APPEND => ManifestKind::Append,
            CLOSE => ManifestKind::Close {
                successor: ChainId(input.array("successor")?),
                reason: input.text("reason of a close", limits::REASON_BYTES_MAX)?,
                seconds: input.u64("time of a close")?,
            },
            COMMIT => ManifestKind::Commit { close: ObjectNonce(input.array("close")?) },
            CANCEL => ManifestKind::Cancel {
                close: ObjectNonce(input.array("close")?),
                reason: input.text("reason of a cancel", limits::REASON_BYTES_MAX)?,
            },
            HAND_OVER => ManifestKind::HandOver,
            value => return Err(DecodeError::Undefined { field: KIND_FIELD, value: value.into() }),
        },
        delta: decode_delta(input)?,
        checkpoint: decode_option(input, decode_checkpoint)?.map(Box::new),
    };
    if input.remaining() != 0 {
        return Err(DecodeError::Trailing(input.remaining()));
    }
    Ok(manifest)
}

/// A manifest of a reserved kind is no damage: a newer program wrote it, and skipping it would fork the chain.
pub(super) fn refusal(name: &ObjectName, error: DecodeError) -> VaultError {
    match error {
        DecodeError::Undefined { field: KIND_FIELD, value }
            if u8::try_from(value).is_ok_and(|value| RESERVED_KINDS.contains(&value)) =>
        {
            VaultError::NewerFormat { name: name.clone(), what: format!("manifest kind {value}") }
        }
        error => VaultError::damaged(name, Damage::Content(error)),
    }
}

impl ManifestLink {
    fn encode(&self, out: &mut Encoder) {
        self.epoch.encode(out.varint(self.number));
        out.raw(&self.nonce.0).raw(&self.digest);
    }

    fn decode(input: &mut Decoder) -> Result<ManifestLink, DecodeError> {
        Ok(ManifestLink {
            number: input.varint("linked number")?,
            epoch: NameEpoch::decode(input)?,
            nonce: ObjectNonce(input.array("linked nonce")?),
            digest: input.array("linked digest")?,
        })
    }
}

impl CheckpointLink {
    fn encode(&self, out: &mut Encoder) {
        self.manifest.encode(out);
        out.varint(self.index).u64(self.last_time.0).u64(self.last_cut.0);
    }

    fn decode(input: &mut Decoder) -> Result<CheckpointLink, DecodeError> {
        Ok(CheckpointLink {
            manifest: ManifestLink::decode(input)?,
            index: input.varint("checkpoint index")?,
            last_time: PointTime(input.u64("checkpoint time")?),
            last_cut: SequenceNumber(input.u64("checkpoint sequence")?),
        })
    }
}

fn encode_delta(delta: &Delta, out: &mut Encoder) {
    out.u64(delta.through.0).u64(delta.proven_through.0).u64(delta.skew_ns.cast_unsigned());
    option(out, delta.stream.as_ref(), |out, hash| {
        out.raw(&hash.0);
    });
    list(out, &delta.layers, |out, layer| layer.encode(out));
    encode_cuts(&delta.cuts, out);
    list(out, &delta.gaps_opened, |out, gap| encode_gap(gap, out));
    list(out, &delta.gaps_closed, |out, closed| encode_gap_closed(closed, out));
    list(out, &delta.defects, |out, defect| encode_defect(defect, out));
    list(out, &delta.geometries, |out, change| encode_geometry(change, out));
    out.varint(delta.honoured_condemned);
}

fn decode_delta(input: &mut Decoder) -> Result<Delta, DecodeError> {
    Ok(Delta {
        through: SequenceNumber(input.u64("through")?),
        proven_through: PointTime(input.u64("proven through")?),
        skew_ns: input.u64("skew")?.cast_signed(),
        stream: decode_option(input, |input| Ok(StreamHash(input.array("stream hash")?)))?,
        layers: decode_list(input, "layers", limits::LAYERS_MAX, LayerRef::decode)?,
        cuts: decode_cuts(input)?,
        gaps_opened: decode_list(input, "gaps", limits::GAPS_MAX, decode_gap)?,
        gaps_closed: decode_list(input, "closed gaps", limits::GAPS_MAX, decode_gap_closed)?,
        defects: decode_list(input, "defects", limits::DEFECTS_MAX, decode_defect)?,
        geometries: decode_list(input, "geometries", limits::GEOMETRIES_MAX, decode_geometry)?,
        honoured_condemned: input.varint("condemned list")?,
    })
}

fn encode_checkpoint(checkpoint: &Checkpoint, out: &mut Encoder) {
    out.varint(checkpoint.index);
    list(out, &checkpoint.covered, |out, link| link.encode(out));
    list(out, &checkpoint.layers, |out, layer| layer.encode(out));
    list(out, &checkpoint.gaps, |out, gap| encode_gap(gap, out));
    list(out, &checkpoint.gaps_closed, |out, closed| encode_gap_closed(closed, out));
    list(out, &checkpoint.defects, |out, defect| encode_defect(defect, out));
    list(out, &checkpoint.geometries, |out, change| encode_geometry(change, out));
    encode_cuts(&checkpoint.cuts, out);
    list(out, &checkpoint.skips, |out, link| link.encode(out));
}

fn decode_checkpoint(input: &mut Decoder) -> Result<Checkpoint, DecodeError> {
    Ok(Checkpoint {
        index: input.varint("checkpoint index")?,
        covered: decode_list(input, "covered manifests", limits::COVERED_MAX, ManifestLink::decode)?,
        layers: decode_list(input, "layers", limits::LAYERS_MAX, LayerRef::decode)?,
        gaps: decode_list(input, "gaps", limits::GAPS_MAX, decode_gap)?,
        gaps_closed: decode_list(input, "closed gaps", limits::GAPS_MAX, decode_gap_closed)?,
        defects: decode_list(input, "defects", limits::DEFECTS_MAX, decode_defect)?,
        geometries: decode_list(input, "geometries", limits::GEOMETRIES_MAX, decode_geometry)?,
        cuts: decode_cuts(input)?,
        skips: decode_list(input, "skips", limits::SKIPS_MAX, CheckpointLink::decode)?,
    })
}

const SECOND: u8 = 1;
const MARKER: u8 = 2;
const HEAL_END: u8 = 3;
const GENERATION_END: u8 = 4;

/// Cuts are stored as differences: a day has 86 400 of them.
fn encode_cuts(cuts: &[Cut], out: &mut Encoder) {
    out.varint(cuts.len() as u64);
    let (mut sequence, mut time) = (0u64, 0u64);
    for cut in cuts {
        // Wrapping: order is the chain's business, and every value must survive the codec.
        out.varint(cut.sequence.0.wrapping_sub(sequence)).varint(cut.time.0.wrapping_sub(time));
        (sequence, time) = (cut.sequence.0, cut.time.0);
        match &cut.kind {
            CutKind::Second => {
                out.u8(SECOND);
            }
            CutKind::Marker { kind, name } => {
                out.u8(MARKER);
                kind.encode(out);
                out.text(name);
            }
            CutKind::HealEnd => {
                out.u8(HEAL_END);
            }
            CutKind::GenerationEnd => {
                out.u8(GENERATION_END);
            }
        }
    }
}

fn decode_cuts(input: &mut Decoder) -> Result<Vec<Cut>, DecodeError> {
    let (mut sequence, mut time) = (0u64, 0u64);
    decode_list(input, "cuts", limits::CUTS_MAX, |input| {
        sequence = sequence.wrapping_add(input.varint("cut sequence")?);
        time = time.wrapping_add(input.varint("cut time")?);
        let kind = match input.u8("cut kind")? {
            SECOND => CutKind::Second,
            MARKER => CutKind::Marker {
                kind: MarkerKind::decode(input)?,
                name: input.text("marker name", replication::limits::NAME_BYTES_MAX)?,
            },
            HEAL_END => CutKind::HealEnd,
            GENERATION_END => CutKind::GenerationEnd,
            value => return Err(DecodeError::Undefined { field: "cut kind", value: value.into() }),
        };
        Ok(Cut { sequence: SequenceNumber(sequence), time: PointTime(time), kind })
    })
}

fn encode_gap(gap: &Gap, out: &mut Encoder) {
    out.u64(gap.after.0).u64(gap.time.0).text(&gap.cause);
    encode_scope(&gap.scope, out);
    option(out, gap.until.as_ref(), |out, (until, time)| {
        out.u64(until.0).u64(time.0);
    });
}

fn decode_gap(input: &mut Decoder) -> Result<Gap, DecodeError> {
    Ok(Gap {
        after: SequenceNumber(input.u64("gap start")?),
        time: PointTime(input.u64("gap time")?),
        cause: input.text("gap cause", limits::REASON_BYTES_MAX)?,
        scope: decode_scope(input)?,
        until: decode_option(input, |input| {
            Ok((SequenceNumber(input.u64("gap end")?), PointTime(input.u64("gap end time")?)))
        })?,
    })
}

fn encode_gap_closed(closed: &GapClosed, out: &mut Encoder) {
    out.u64(closed.after.0).u64(closed.until.0).u64(closed.time.0);
    encode_scope(&closed.scope, out);
}

fn decode_gap_closed(input: &mut Decoder) -> Result<GapClosed, DecodeError> {
    Ok(GapClosed {
        after: SequenceNumber(input.u64("gap start")?),
        until: SequenceNumber(input.u64("gap end")?),
        time: PointTime(input.u64("gap end time")?),
        scope: decode_scope(input)?,
    })
}

fn encode_scope(scope: &GapScope, out: &mut Encoder) {
    match scope {
        GapScope::Machine => {
            out.u8(1);
        }
        GapScope::Disks(disks) => list(out.u8(2), disks, |out, disk| {
            out.u16(disk.0);
        }),
        GapScope::Ranges(ranges) => list(out.u8(3), ranges, |out, (disk, range)| range.encode(out.u16(disk.0))),
    }
}

fn decode_scope(input: &mut Decoder) -> Result<GapScope, DecodeError> {
    Ok(match input.u8("gap scope")? {
        1 => GapScope::Machine,
        2 => GapScope::Disks(decode_list(input, "gap disks", replication::limits::DISKS_MAX as u64, decode_disk)?),
        3 => GapScope::Ranges(decode_list(input, "gap ranges", limits::GAP_RANGES_MAX, |input| {
            Ok((decode_disk(input)?, ByteRange::decode(input, replication::limits::DISK_BYTES_MAX)?))
        })?),
        value => return Err(DecodeError::Undefined { field: "gap scope", value: value.into() }),
    })
}

fn encode_defect(defect: &Defect, out: &mut Encoder) {
    defect.range.encode(out.u64(defect.sequence.0).u16(defect.disk.0));
    out.text(&defect.cause);
}

fn decode_defect(input: &mut Decoder) -> Result<Defect, DecodeError> {
    Ok(Defect {
        sequence: SequenceNumber(input.u64("defect sequence")?),
        disk: decode_disk(input)?,
        range: ByteRange::decode(input, replication::limits::DISK_BYTES_MAX)?,
        cause: input.text("defect cause", limits::REASON_BYTES_MAX)?,
    })
}

fn encode_geometry(change: &GeometryChange, out: &mut Encoder) {
    change.geometry.encode(out.u64(change.sequence.0));
}

fn decode_geometry(input: &mut Decoder) -> Result<GeometryChange, DecodeError> {
    Ok(GeometryChange {
        sequence: SequenceNumber(input.u64("geometry sequence")?),
        geometry: DiskGeometry::decode(input)?,
    })
}

fn decode_disk(input: &mut Decoder) -> Result<DiskId, DecodeError> {
    Ok(DiskId(input.u16("disk id")?))
}

pub(crate) fn list<T>(out: &mut Encoder, items: &[T], encode: impl Fn(&mut Encoder, &T)) {
    out.varint(items.len() as u64);
    items.iter().for_each(|item| encode(out, item));
}

pub(crate) fn decode_list<T>(
    input: &mut Decoder,
    field: &'static str,
    limit: u64,
    mut decode: impl FnMut(&mut Decoder) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let count = input.count(field, limit)?;
    // Not sized by the count: an element is larger in memory than the byte that the input must at least hold.
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(decode(input)?);
    }
    Ok(items)
}

pub(crate) fn option<T: ?Sized>(out: &mut Encoder, value: Option<&T>, encode: impl Fn(&mut Encoder, &T)) {
    match value {
        Some(value) => encode(out.u8(1), value),
        None => {
            out.u8(0);
        }
    }
}

pub(crate) fn decode_option<T>(
    input: &mut Decoder,
    decode: impl FnOnce(&mut Decoder) -> Result<T, DecodeError>,
) -> Result<Option<T>, DecodeError> {
    match input.u8("presence")? {
        0 => Ok(None),
        1 => decode(input).map(Some),
        value => Err(DecodeError::Undefined { field: "presence", value: value.into() }),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use replication::DiskIdentity;

    fn link(number: u64) -> ManifestLink {
        ManifestLink { number, epoch: NameEpoch(2), nonce: ObjectNonce([number as u8; 16]), digest: [3; 32] }
    }

    /// One of everything.
    pub(crate) fn full() -> Manifest {
        let sequence = SequenceNumber(1 << 45 | 7);
        let gap = |scope| Gap { after: sequence, scope, time: PointTime(9), cause: "why".into(), until: None };
        let closed = GapClosed { after: sequence, scope: GapScope::Machine, until: sequence, time: PointTime(11) };
        let cuts = [
            CutKind::Second,
            CutKind::Marker { kind: MarkerKind::Final, name: "end".into() },
            CutKind::Marker {
                kind: MarkerKind::Attempted { failed: "pre-script exited with 3".into() },
                name: "nightly".into(),
            },
            CutKind::HealEnd,
            CutKind::GenerationEnd,
        ];
        let cuts: Vec<Cut> = (0u64..)
            .zip(cuts)
            // Decreasing, to show that the codec takes no offence.
            .map(|(index, kind)| Cut { sequence: SequenceNumber(9 - index), time: PointTime(u64::MAX - index), kind })
            .collect();
        let geometry = DiskGeometry {
            disk: DiskId(3),
            identity: DiskIdentity { serial: "s".into(), fingerprint: [1; 16] },
            path: "/dev/x".into(),
            size_bytes: 4096,
            logical_sector_bytes: 512,
            physical_sector_bytes: 512,
        };
        let geometries = vec![GeometryChange { sequence, geometry }];
        let defects =
            vec![Defect { sequence, disk: DiskId(1), range: ByteRange::new(512, 512), cause: "medium".into() }];
        let gaps = vec![
            gap(GapScope::Machine),
            gap(GapScope::Disks(vec![DiskId(1), DiskId(2)])),
            Gap {
                until: Some((sequence, PointTime(12))),
                ..gap(GapScope::Ranges(vec![(DiskId(1), ByteRange::new(0, 9))]))
            },
        ];
        let skip = CheckpointLink { manifest: link(4), index: 2, last_time: PointTime(5), last_cut: sequence };
        Manifest {
            number: 300,
            parent: Some(link(299)),
            opened: (200, NameEpoch(1)),
            names: Some(NameSwitch { epoch: NameEpoch(2), check: [6; 16] }),
            last_checkpoint: Some(skip),
            kind: ManifestKind::Append,
            delta: Delta {
                through: sequence,
                proven_through: PointTime(8),
                skew_ns: -4,
                stream: Some(StreamHash([5; 32])),
                layers: Vec::new(),
                cuts: cuts.clone(),
                gaps_opened: gaps.clone(),
                gaps_closed: vec![closed.clone()],
                defects: defects.clone(),
                geometries: geometries.clone(),
                honoured_condemned: 6,
            },
            checkpoint: Some(Box::new(Checkpoint {
                index: 3,
                covered: vec![link(298), link(299)],
                layers: Vec::new(),
                gaps,
                gaps_closed: vec![closed],
                defects,
                geometries,
                cuts,
                skips: vec![skip, skip],
            })),
        }
    }

    #[test]
    fn every_kind_of_manifest_reads_back() {
        let parent = Some(Position { chain: ChainId([8; 16]), sequence: SequenceNumber(77) });
        for kind in [
            ManifestKind::Append,
            ManifestKind::OpenGeneration { reason: "take-over".into(), base: SequenceNumber(5) },
            ManifestKind::Genesis { machine: MachineId([7; 16]), parent },
            ManifestKind::Genesis { machine: MachineId([7; 16]), parent: None },
            ManifestKind::Close { successor: ChainId([9; 16]), reason: "the site burns".into(), seconds: 12 },
            ManifestKind::Commit { close: ObjectNonce([1; 16]) },
            ManifestKind::Cancel { close: ObjectNonce([2; 16]), reason: "it does not".into() },
            ManifestKind::HandOver,
        ] {
            let manifest = Manifest { kind, ..full() };
            assert_eq!(decode_manifest(&encode_manifest(&manifest).into()), Ok(manifest));
        }
    }

    #[test]
    fn reserved_kinds_are_newer_and_undefined_ones_damage() {
        let name = ObjectName::new("x").expect("a name");
        let bare = Manifest { parent: None, names: None, last_checkpoint: None, checkpoint: None, ..full() };
        let mut bytes = encode_manifest(&bare);
        // number (2), opened (3), no other names, no parent, no checkpoint, kind.
        assert_eq!(bytes[8], APPEND);
        for (kind, newer) in [(7, true), (9, true), (31, true), (32, false), (0, false)] {
            bytes[8] = kind;
            let error = decode_manifest(&bytes.clone().into()).expect_err("unknown");
            assert_eq!(matches!(refusal(&name, error), VaultError::NewerFormat { .. }), newer, "{kind}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(
            garbage: Vec<u8>, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5), keep: prop::sample::Index,
        ) {
            let _ = decode_manifest(&garbage.clone().into());
            let mut bytes = encode_manifest(&full());
            for (index, value) in flips {
                let index = index.index(bytes.len());
                bytes[index] = value;
            }
            let cut = keep.index(bytes.len());
            for bytes in [bytes.clone(), bytes[..cut].to_vec(), [&bytes[..cut], &garbage].concat()] {
                // What is accepted means one thing only.
                if let Ok(manifest) = decode_manifest(&bytes.clone().into()) {
                    prop_assert_eq!(decode_manifest(&encode_manifest(&manifest).into()), Ok(manifest));
                }
            }
        }
    }
}
