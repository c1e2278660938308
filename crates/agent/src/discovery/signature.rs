//! What lies on a device, told by its first and last bytes: partition table, file system, member of something larger,
//! swap space.
//!
//! Only what decides whether a disk is worth protecting is told apart; offsets are those of the formats' own documents.

use serde::{Deserialize, Serialize};

/// Bytes from a device's beginning that are looked at: btrfs keeps its superblock at 64 KiB.
pub const HEAD_BYTES: usize = 128 << 10;
/// Bytes from its end: md of versions 0.90 and 1.0 keeps its superblock there.
pub const TAIL_BYTES: usize = 128 << 10;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// `ext4`, `xfs`, `btrfs`, `vfat`, `swap`, `lvm`, `md`, `luks`, …; empty: nothing that is known.
    pub kind: String,
    /// What tells it from others.
    pub uuid: String,
    /// What people called it.
    pub label: String,
    /// `gpt` or `dos`; empty: none.
    pub partition_table: String,
    /// The partition table's UUID, or the disk signature of a `dos` one.
    pub partition_table_uuid: String,
}

impl Content {
    /// Looks at the first and the last bytes of a device, [`HEAD_BYTES`] and [`TAIL_BYTES`] of them or fewer.
    pub fn of(head: &[u8], tail: &[u8], size_bytes: u64) -> Content {
        let mut content = Content::default();
        for probe in [md, luks, lvm, swap, ext, xfs, btrfs, vfat, others] {
            if let Some((kind, uuid, label)) = probe(head, tail, size_bytes) {
                content = Content { kind: kind.to_owned(), uuid, label, ..content };
                break;
            }
        }
        if let Some((table, uuid)) = partition_table(head)
            && !matches!(content.kind.as_str(), "vfat" | "ext4" | "xfs" | "btrfs")
        {
            (content.partition_table, content.partition_table_uuid) = (table.to_owned(), uuid);
        }
        content
    }
}

type Found = (&'static str, String, String);

fn at(bytes: &[u8], offset: usize, len: usize) -> Option<&[u8]> {
    bytes.get(offset..offset.checked_add(len)?)
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(at(bytes, offset, 4)?.try_into().ok()?))
}

fn is(bytes: &[u8], offset: usize, magic: &[u8]) -> bool {
    at(bytes, offset, magic.len()) == Some(magic)
}

fn uuid(bytes: &[u8], offset: usize) -> String {
    let Some(bytes) = at(bytes, offset, 16) else { return String::new() };
    let hex = |range: std::ops::Range<usize>| bytes[range].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16)].join("-")
}

/// The first three parts of a GUID are stored with their last byte first.
fn guid(bytes: &[u8], offset: usize) -> String {
    let Some(bytes) = at(bytes, offset, 16) else { return String::new() };
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    uuid(&order.map(|index| bytes[index]), 0)
}

fn text(bytes: &[u8], offset: usize, len: usize) -> String {
    let bytes = at(bytes, offset, len).unwrap_or_default();
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(len);
    let text = String::from_utf8_lossy(&bytes[..end.min(bytes.len())]).into_owned();
    text.replace(char::is_control, "").trim().to_owned()
}

/// Superblocks at 0 (1.1), 4 KiB (1.2), 8 KiB before the end (1.0), and in the last whole 64 KiB (0.90).
fn md(head: &[u8], tail: &[u8], size_bytes: u64) -> Option<Found> {
    const MAGIC: u32 = 0xa92b_4efc;
    for offset in [0, 4096] {
        if word(head, offset) == Some(MAGIC) {
            return Some(("md", uuid(head, offset + 16), text(head, offset + 32, 32)));
        }
    }
    let in_tail = |place: u64| usize::try_from(place.checked_sub(size_bytes.checked_sub(tail.len() as u64)?)?).ok();
    let new = in_tail((size_bytes & !511).checked_sub(8192)? & !4095)?;
    if word(tail, new) == Some(MAGIC) {
        return Some(("md", uuid(tail, new + 16), text(tail, new + 32, 32)));
    }
    let old = in_tail((size_bytes & !65535).checked_sub(65536)?)?;
    (word(tail, old) == Some(MAGIC)).then(|| ("md", String::new(), String::new()))
}

fn luks(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    is(head, 0, b"LUKS\xba\xbe").then(|| ("luks", text(head, 168, 40), text(head, 24, 48)))
}

/// The label lies in one of the first four sectors; its identifier has 32 characters.
fn lvm(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    let sector =
        (0..4).map(|sector| sector * 512).find(|at| is(head, *at, b"LABELONE") && is(head, at + 24, b"LVM2 001"))?;
    Some(("lvm", text(head, sector + 32, 32), String::new()))
}

/// The signature stands at the end of the first page, whose size depends on the machine.
fn swap(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    let pages = [4096, 8192, 16384, 65536];
    pages.iter().find(|page| is(head, *page - 10, b"SWAPSPACE2"))?;
    Some(("swap", uuid(head, 1024 + 12), text(head, 1024 + 28, 16)))
}

fn ext(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    is(head, 1024 + 56, &[0x53, 0xef]).then_some(())?;
    let (compatible, incompatible) = (word(head, 1024 + 92)?, word(head, 1024 + 96)?);
    // Extents, 64 bits, flexible groups: what ext3 does not have. A journal: what ext2 does not have.
    let kind = match (incompatible & 0x2c0 != 0, compatible & 4 != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    Some((kind, uuid(head, 1024 + 104), text(head, 1024 + 120, 16)))
}

fn xfs(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    is(head, 0, b"XFSB").then(|| ("xfs", uuid(head, 32), text(head, 108, 12)))
}

fn btrfs(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    const SUPER: usize = 64 << 10;
    is(head, SUPER + 64, b"_BHRfS_M").then(|| ("btrfs", uuid(head, SUPER + 32), text(head, SUPER + 299, 256)))
}

fn vfat(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    is(head, 510, &[0x55, 0xaa]).then_some(())?;
    let serial = |offset| {
        let number = word(head, offset).unwrap_or(0);
        format!("{:04X}-{:04X}", number >> 16, number & 0xffff)
    };
    if is(head, 82, b"FAT32   ") {
        return Some(("vfat", serial(67), text(head, 71, 11)));
    }
    [&b"FAT16   "[..], b"FAT12   "]
        .iter()
        .any(|magic| is(head, 54, magic))
        .then(|| ("vfat", serial(39), text(head, 43, 11)))
}

fn others(head: &[u8], _: &[u8], _: u64) -> Option<Found> {
    let known: [(&str, usize, &[u8]); 7] = [
        ("ntfs", 3, b"NTFS    "),
        ("exfat", 3, b"EXFAT   "),
        ("iso9660", 0x8001, b"CD001"),
        ("f2fs", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
        ("squashfs", 0, b"hsqs"),
        ("bcache", 4096 + 24, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]),
        // The uberblock of a pool written by a machine of the usual byte order.
        ("zfs", 128 << 9, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]),
    ];
    let found = known.iter().find(|(_, offset, magic)| is(head, *offset, magic))?;
    Some((found.0, String::new(), String::new()))
}

fn partition_table(head: &[u8]) -> Option<(&'static str, String)> {
    // The table of a disk whose sectors have 512 bytes, or 4096.
    for sector in [512, 4096] {
        if is(head, sector, b"EFI PART") {
            return Some(("gpt", guid(head, sector + 56)));
        }
    }
    is(head, 510, &[0x55, 0xaa]).then_some(())?;
    let entries = (0..4).map(|entry| &head[446 + 16 * entry..][..16]);
    let sound = entries.clone().all(|entry| entry[0] & 0x7f == 0);
    let used = entries.into_iter().any(|entry| entry[4] != 0);
    (sound && used).then(|| ("dos", format!("{:08x}", word(head, 440).unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        parts.iter().for_each(|(at, bytes)| head[*at..at + bytes.len()].copy_from_slice(bytes));
        head
    }

    fn kind(parts: &[(usize, &[u8])]) -> Content {
        Content::of(&head(parts), &[], 1 << 30)
    }

    #[test]
    fn formats_are_told_apart() {
        let id: Vec<u8> = (1..17).collect();
        let uuid = "01020304-0506-0708-090a-0b0c0d0e0f10";
        let ext = [(1024 + 56, &[0x53, 0xef][..]), (1024 + 104, &id), (1024 + 120, b"root")];
        let found = kind(&[&ext[..], &[(1024 + 92, &[4, 0, 0, 0]), (1024 + 96, &[0xc2, 2, 0, 0])]].concat());
        assert_eq!((found.kind.as_str(), found.uuid.as_str(), found.label.as_str()), ("ext4", uuid, "root"));
        assert_eq!(kind(&[&ext[..], &[(1024 + 92, &[4, 0, 0, 0])]].concat()).kind, "ext3");
        assert_eq!(kind(&ext).kind, "ext2");
        let found = kind(&[(0, b"XFSB"), (32, &id), (108, b"data")]);
        assert_eq!((found.kind.as_str(), found.uuid.as_str(), found.label.as_str()), ("xfs", uuid, "data"));
        assert_eq!(kind(&[(65536 + 64, b"_BHRfS_M"), (65536 + 32, &id)]).kind, "btrfs");
        assert_eq!(kind(&[(4086, b"SWAPSPACE2")]).kind, "swap");
        assert_eq!(kind(&[(0, b"LUKS\xba\xbe"), (168, uuid.as_bytes())]).uuid, uuid);
        let found = kind(&[(512, b"LABELONE"), (536, b"LVM2 001"), (544, b"abcdefghijklmnopqrstuvwxyz012345")]);
        assert_eq!((found.kind.as_str(), found.uuid.as_str()), ("lvm", "abcdefghijklmnopqrstuvwxyz012345"));
        let fat = [(510, &[0x55, 0xaa][..]), (82, b"FAT32   "), (67, &[0x78, 0x56, 0x34, 0x12]), (71, b"EFI        ")];
        let found = kind(&fat);
        assert_eq!((found.kind.as_str(), found.uuid.as_str(), found.label.as_str()), ("vfat", "1234-5678", "EFI"));
        assert_eq!(found.partition_table, "", "the same signature, no table");
        assert_eq!(kind(&[(4096, &0xa92b_4efcu32.to_le_bytes()), (4112, &id)]).kind, "md");

        let found = kind(&[(512, b"EFI PART"), (568, &id), (510, &[0x55, 0xaa]), (450, &[0xee])]);
        assert_eq!((found.kind.as_str(), found.partition_table.as_str()), ("", "gpt"));
        assert_eq!(found.partition_table_uuid, "04030201-0605-0807-090a-0b0c0d0e0f10");
        let dos = kind(&[(510, &[0x55, 0xaa]), (440, &[0xef, 0xbe, 0xad, 0xde]), (446, &[0x80]), (450, &[0x83])]);
        assert_eq!((dos.partition_table.as_str(), dos.partition_table_uuid.as_str()), ("dos", "deadbeef"));
        assert_eq!(kind(&[(510, &[0x55, 0xaa])]), Content::default(), "boot code without partitions");
        assert_eq!(kind(&[]), Content::default());
    }

    #[test]
    fn members_of_arrays_are_found_by_their_end() {
        let magic = 0xa92b_4efcu32.to_le_bytes();
        for (size, back) in [(1u64 << 30, 8192u64), ((1 << 30) + 512 * 3, 8192 + 512 * 3)] {
            let mut tail = vec![0; TAIL_BYTES];
            let place = TAIL_BYTES - back as usize;
            tail[place..place + 4].copy_from_slice(&magic);
            assert_eq!(Content::of(&[], &tail, size).kind, "md", "version 1.0 on {size}");
        }
        let mut tail = vec![0; TAIL_BYTES];
        tail[TAIL_BYTES - 65536..TAIL_BYTES - 65532].copy_from_slice(&magic);
        assert_eq!(Content::of(&[], &tail, 1 << 30).kind, "md", "version 0.90");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(
            size in 0u64..(1 << 40),
            head_len in 0usize..HEAD_BYTES,
            tail_len in 0usize..TAIL_BYTES,
            byte: u8,
            places in prop::collection::vec((any::<prop::sample::Index>(), any::<[u8; 8]>()), 0..20),
        ) {
            let mut head = vec![byte; head_len];
            let tail = vec![byte; tail_len];
            for (place, bytes) in places {
                if head.len() > 8 {
                    let at = place.index(head.len() - 8);
                    head[at..at + 8].copy_from_slice(&bytes);
                }
            }
            Content::of(&head, &tail, size);
            let magics: [&[u8]; 4] = [b"EFI PART", b"LABELONE", b"XFSB", &[0x55, 0xaa]];
            for magic in magics {
                for at in [0, 510, 512] {
                    if head.len() > at + magic.len() {
                        head[at..at + magic.len()].copy_from_slice(magic);
                    }
                }
                Content::of(&head, &tail, size);
            }
        }
    }
}
