//! The drivers that a kernel has before it finds its root file system: those built into it, and those in its initramfs.
//!
//! An initramfs is a row of cpio archives, of which the last is usually compressed. zstd is read; of the others is said
//! that they are not.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read};

use serde::{Deserialize, Serialize};

use crate::system::SystemRoot;

/// Bytes that are taken out of an initramfs at most.
const UNPACKED_BYTES_MAX: u64 = 2 << 30;
/// Longest name in an archive, in bytes.
const NAME_BYTES_MAX: u64 = 4096;
/// Modules that are listed.
const MODULES_MAX: usize = 4096;
/// Window of a zstd stream at most: memory that a decompressor takes. `-19`, which distributions use, takes 8 MiB.
const WINDOW_LOG_MAX: u32 = 25;
/// Folders of drivers that decide whether a system starts on another machine.
const FOLDERS: &[&str] = &[
    "drivers/ata/",
    "drivers/block/",
    "drivers/hv/",
    "drivers/md/",
    "drivers/message/",
    "drivers/mmc/",
    "drivers/net/",
    "drivers/nvme/",
    "drivers/pci/",
    "drivers/scsi/",
    "drivers/usb/host/",
    "drivers/usb/storage/",
    "drivers/virtio/",
    "drivers/xen/",
    "fs/",
];

/// What the kernel has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drivers {
    /// In its initramfs.
    pub initramfs: Initramfs,
    /// Built in: those of the folders that matter to recovery.
    pub built_in: Vec<String>,
}

/// An initramfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Initramfs {
    /// Where it was found; empty: nowhere.
    pub path: String,
    /// Why `modules` is not what is in it; empty if it is.
    pub unknown_because: String,
    /// Names of modules, `-` written as `_`, of the folders that matter to recovery.
    pub modules: Vec<String>,
}

impl Initramfs {
    pub(super) fn without_modules(self) -> Initramfs {
        Initramfs { unknown_because: "the list is too long".to_owned(), modules: Vec::new(), ..self }
    }
}

impl Drivers {
    /// Whether a module is there when the kernel looks for its root; none if that is not known.
    pub(super) fn early(&self, module: &str) -> Option<bool> {
        let module = module.replace('-', "_");
        let has = |list: &[String]| list.binary_search(&module).is_ok();
        if has(&self.built_in) || has(&self.initramfs.modules) {
            return Some(true);
        }
        self.initramfs.unknown_because.is_empty().then_some(false)
    }
}

/// Looks for the initramfs of kernel `release` and for what is built into it.
pub(super) fn drivers(root: &SystemRoot, release: &str) -> Drivers {
    let listed = root.text(format!("/lib/modules/{release}/modules.builtin"));
    let listed =
        listed.or_else(|| root.text(format!("/usr/lib/modules/{release}/modules.builtin"))).unwrap_or_default();
    let built_in: BTreeSet<String> = listed.lines().filter_map(module_of).take(MODULES_MAX).collect();
    let places = [
        format!("/boot/initrd.img-{release}"),
        format!("/boot/initramfs-{release}.img"),
        format!("/boot/initrd-{release}"),
        "/boot/initramfs-linux.img".to_owned(),
        "/boot/initrd".to_owned(),
    ];
    let initramfs = match places.into_iter().find(|place| root.exists(place)) {
        None => {
            let unknown_because = "none was found in /boot".to_owned();
            Initramfs { path: String::new(), unknown_because, modules: Vec::new() }
        }
        Some(path) => {
            let (modules, unknown_because) = match File::open(root.path(&path)).map(read_initramfs) {
                Ok(read) => read,
                Err(error) => (BTreeSet::new(), format!("it cannot be read: {error}")),
            };
            Initramfs { path, unknown_because, modules: modules.into_iter().collect() }
        }
    };
    Drivers { initramfs, built_in: built_in.into_iter().collect() }
}

/// The module that a path names, if it is of a kind that matters: `…/kernel/drivers/block/virtio_blk.ko.xz`.
fn module_of(path: &str) -> Option<String> {
    let (_, below) = path.rsplit_once("kernel/")?;
    if !FOLDERS.iter().any(|folder| below.starts_with(folder)) {
        return None;
    }
    let (_, name) = below.rsplit_once('/')?;
    let name = name.split_once(".ko").filter(|(_, end)| ["", ".xz", ".zst", ".gz"].contains(end))?.0;
    (!name.is_empty() && name.len() <= 64).then(|| name.replace('-', "_"))
}

/// The modules in an initramfs, and why there may be more; empty if there are not.
pub fn read_initramfs(file: impl Read) -> (BTreeSet<String>, String) {
    let mut modules = BTreeSet::new();
    let mut input = Input::new(file);
    let why = match read_archives(&mut input, &mut modules, 0) {
        Ok(()) => String::new(),
        Err(Unread::Packed(how)) => format!("it is packed by {how}, which this program does not read"),
        Err(Unread::Broken(what)) => format!("it cannot be understood: {what}"),
        Err(Unread::Io(error)) => format!("it cannot be read: {error}"),
    };
    (modules, why)
}

enum Unread {
    Packed(&'static str),
    Broken(&'static str),
    Io(io::Error),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Unread {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Unread::Broken("it ends too early"),
            _ => Unread::Io(error),
        }
    }
}

/// A reader that can look a few bytes ahead, and gives up after a limit.
struct Input<'a> {
    reader: Box<dyn Read + 'a>,
    ahead: Vec<u8>,
    left: u64,
}

impl<'a> Input<'a> {
    fn new(reader: impl Read + 'a) -> Input<'a> {
        let reader = Box::new(BufReader::with_capacity(64 << 10, reader));
        Input { reader, ahead: Vec::new(), left: UNPACKED_BYTES_MAX }
    }

    /// The next bytes, up to `count` of them, without taking them.
    fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.ahead.len() < count {
            let mut byte = [0];
            if self.reader.read(&mut byte)? == 0 {
                break;
            }
            self.ahead.push(byte[0]);
        }
        Ok(&self.ahead[..count.min(self.ahead.len())])
    }

    fn skip(&mut self, count: u64) -> Result<(), Unread> {
        match io::copy(&mut Read::by_ref(self).take(count), &mut io::sink())? {
            copied if copied == count => Ok(()),
            _ => Err(Unread::Broken("it ends too early")),
        }
    }
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other("it is too large"));
        }
        let count = if self.ahead.is_empty() {
            self.reader.read(buffer)?
        } else {
            let count = buffer.len().min(self.ahead.len());
            buffer[..count].copy_from_slice(&self.ahead[..count]);
            self.ahead.drain(..count);
            count
        };
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// Archives inside a compressed one are compressed no more.
const DEPTH_MAX: u32 = 2;

fn read_archives(input: &mut Input<'_>, modules: &mut BTreeSet<String>, depth: u32) -> Result<(), Unread> {
    loop {
        // Archives are padded to any length.
        while input.peek(1)? == [0] {
            input.skip(1)?;
        }
        let magic = input.peek(6)?;
        if magic.is_empty() {
            return Ok(());
        }
        if magic == b"070701" || magic == b"070702" {
            read_archive(input, modules)?;
            continue;
        }
        let packed_by = match magic {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
            [0x1f, 0x8b, ..] => return Err(Unread::Packed("gzip")),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => return Err(Unread::Packed("xz")),
            [0x02, 0x21, 0x4c, 0x18, ..] => return Err(Unread::Packed("lz4")),
            [0x5d, 0, 0, ..] => return Err(Unread::Packed("lzma")),
            [b'B', b'Z', b'h', ..] => return Err(Unread::Packed("bzip2")),
            [0x89, b'L', b'Z', b'O', ..] => return Err(Unread::Packed("lzo")),
            _ => return Err(Unread::Broken("no archive begins like this")),
        };
        if depth == DEPTH_MAX {
            return Err(Unread::Broken(packed_by));
        }
        let mut decoder = zstd::stream::read::Decoder::new(&mut *input)?;
        decoder.window_log_max(WINDOW_LOG_MAX)?;
        // One frame after the other: nothing else comes behind it.
        return read_archives(&mut Input::new(decoder), modules, depth + 1);
    }
}

/// One archive, up to its trailer. `newc`: 110 bytes of header in ASCII, the name, the data, each padded to four bytes.
fn read_archive(input: &mut Input<'_>, modules: &mut BTreeSet<String>) -> Result<(), Unread> {
    loop {
        let mut header = [0; 110];
        input.read_exact(&mut header)?;
        if !header.starts_with(b"07070") {
            return Err(Unread::Broken("an entry has no header"));
        }
        let field = |at: usize| {
            let text = std::str::from_utf8(&header[6 + 8 * at..][..8]).ok();
            let text = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()));
            text.and_then(|text| u64::from_str_radix(text, 16).ok()).ok_or(Unread::Broken("a header holds no numbers"))
        };
        let (size, name_len) = (field(6)?, field(11)?);
        if name_len == 0 || name_len > NAME_BYTES_MAX {
            return Err(Unread::Broken("a name is too long"));
        }
        let mut name = vec![0; name_len as usize];
        input.read_exact(&mut name)?;
        input.skip(padding(110 + name_len))?;
        let name = String::from_utf8_lossy(&name);
        let name = name.trim_end_matches('\0');
        if name == "TRAILER!!!" {
            return Ok(());
        }
        if let Some(module) = module_of(name)
            && modules.len() < MODULES_MAX
        {
            modules.insert(module);
        }
        input.skip(size + padding(size))?;
    }
}

fn padding(len: u64) -> u64 {
    len.next_multiple_of(4) - len
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An archive of files with these names and sizes.
    pub(in super::super) fn archive(files: &[(&str, usize)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, size) in files.iter().copied().chain([("TRAILER!!!", 0)]) {
            let mut fields = [0; 13];
            (fields[6], fields[11]) = (size, name.len() + 1);
            out.extend(b"070701");
            fields.iter().for_each(|field| out.extend(format!("{field:08X}").bytes()));
            out.extend(name.bytes().chain([0]));
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend(vec![0xab; size]);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    fn names(modules: &BTreeSet<String>) -> Vec<&str> {
        modules.iter().map(String::as_str).collect()
    }

    #[test]
    fn archives_plain_padded_and_packed_are_read() {
        let early = archive(&[("kernel/x86/microcode/GenuineIntel.bin", 777)]);
        let main = archive(&[
            ("usr/lib/modules/6.1.0/kernel/drivers/block/virtio_blk.ko", 5001),
            ("lib/modules/6.1.0/kernel/drivers/net/ethernet/intel/e1000/e1000.ko.zst", 30),
            ("lib/modules/6.1.0/kernel/drivers/ata/ahci-platform.ko.xz", 3),
            ("lib/modules/6.1.0/kernel/fs/ext4/ext4.ko.gz", 4),
            ("lib/modules/6.1.0/kernel/sound/snd.ko", 1),
            ("lib/modules/6.1.0/kernel/drivers/ata/libata.ko.debug", 1),
            ("bin/sh", 12),
        ]);
        let expected = ["ahci_platform", "e1000", "ext4", "virtio_blk"];
        let packed = zstd::encode_all(&main[..], 1).expect("packed");
        for rest in [main, packed] {
            let mut image = early.clone();
            image.resize(image.len().next_multiple_of(512), 0);
            image.extend(rest);
            let (modules, why) = read_initramfs(&image[..]);
            assert_eq!((names(&modules), why.as_str()), (expected.to_vec(), ""));
            // Cut off anywhere: what was read until then, and a word about it.
            for end in (early.len() + 4..image.len() - 4).step_by(97) {
                let (modules, why) = read_initramfs(&image[..end]);
                assert!(modules.len() <= expected.len());
                assert!(!why.is_empty() || image[..end].ends_with(&[0]), "{end}");
            }
        }
        for (magic, name) in
            [(&[0x1f, 0x8b, 8, 0, 0, 0][..], "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x02\x21\x4c\x18aa", "lz4")]
        {
            let image = [&early[..], magic].concat();
            let (modules, why) = read_initramfs(&image[..]);
            assert!(modules.is_empty() && why.contains(name), "{why}");
        }
    }

    #[test]
    fn what_is_known_of_a_module() {
        let initramfs = |why: &str| Initramfs {
            path: "/boot/initrd".into(),
            unknown_because: why.into(),
            modules: vec!["ahci".into(), "virtio_blk".into()],
        };
        let known = Drivers { initramfs: initramfs(""), built_in: vec!["nvme".into()] };
        assert_eq!(["ahci", "virtio-blk", "nvme"].map(|module| known.early(module)), [Some(true); 3]);
        assert_eq!(known.early("vmw_pvscsi"), Some(false));
        let unknown = Drivers { initramfs: initramfs("packed"), built_in: vec!["nvme".into()] };
        assert_eq!((unknown.early("nvme"), unknown.early("vmw_pvscsi")), (Some(true), None));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(mut bytes: Vec<u8>, prefix in 0usize..4, at: prop::sample::Index, byte: u8) {
            let mut image = match prefix {
                0 => Vec::new(),
                1 => b"070701".to_vec(),
                2 => archive(&[("lib/modules/1/kernel/fs/xfs/xfs.ko", 40)]),
                _ => zstd::encode_all(&archive(&[("lib/modules/1/kernel/fs/xfs/xfs.ko", 40)])[..], 1).expect("packed"),
            };
            image.append(&mut bytes);
            read_initramfs(&image[..]);
            if !image.is_empty() {
                let at = at.index(image.len());
                image[at] = byte;
                read_initramfs(&image[..]);
            }
        }

        #[test]
        fn any_path_is_answered(path: String, name in "[a-z_-]{1,20}", folder in prop::sample::select(FOLDERS)) {
            module_of(&path);
            let module = module_of(&format!("lib/modules/x/kernel/{folder}{name}.ko"));
            prop_assert_eq!(module, Some(name.replace('-', "_")));
        }
    }
}
