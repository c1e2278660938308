//! `/proc/self/mountinfo`: what is mounted where.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::DeviceNumber;

/// Mounts that are looked at.
const MOUNTS_MAX: usize = 65_536;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The device of its file system; major 0 for those that lie on none, and for btrfs.
    pub device: DeviceNumber,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The type of its file system.
    pub fs_type: String,
    /// The device as it was named when it was mounted.
    pub source: String,
    /// Nobody can write to the file system, through this mount or another.
    pub read_only: bool,
}

/// Reads the kernel's list. Lines that cannot be understood are left out.
pub fn parse_mounts(bytes: &[u8]) -> Vec<Mount> {
    bytes.split(|byte| *byte == b'\n').take(MOUNTS_MAX).filter_map(parse_mount).collect()
}

/// `36 35 98:0 /root /mnt rw,noatime master:1 - ext4 /dev/sda1 rw,errors=continue`, with any number of fields before the
/// dash.
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let device = std::str::from_utf8(fields.get(2).filter(|_| dash > 5)?).ok()?.parse().ok()?;
    let text = |field: &[u8]| String::from_utf8_lossy(&unescaped(field)).into_owned();
    let options = fields.get(dash + 3).copied().unwrap_or_default();
    Some(Mount {
        device,
        mount_point: PathBuf::from(OsString::from_vec(unescaped(fields[4]))),
        fs_type: text(fields.get(dash + 1)?),
        source: text(fields.get(dash + 2)?),
        read_only: options.split(|byte| *byte == b',').any(|option| option == b"ro"),
    })
}

/// Spaces, tabs, newlines and backslashes are written as three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match digits {
            Some(digits) if *first == b'\\' && digits[0] <= b'3' => {
                plain.push(digits.iter().fold(0, |value, digit| value << 3 | (digit - b'0')));
                rest = &tail[3..];
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mounts_are_read() {
        let text = b"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw,errors=remount-ro\n\
            22 21 0:20 / /proc rw - proc proc rw\n\
            31 21 8:17 /sub /with\\040space\\134 ro master:1 propagate_from:2 - xfs /dev/sdb1 rw,attr2\n\
            32 21 7:0 / /snap ro - squashfs /dev/loop0 ro\n\
            garbage\n33 21 x:y / /a rw - ext4 a rw\n34 21 8:1\n";
        let mounts = parse_mounts(text);
        assert_eq!(mounts.len(), 4, "{mounts:?}");
        assert_eq!(mounts[0].device, DeviceNumber { major: 8, minor: 1 });
        assert_eq!((mounts[0].fs_type.as_str(), mounts[0].source.as_str()), ("ext4", "/dev/root"));
        assert_eq!(mounts[2].mount_point, PathBuf::from("/with space\\"));
        assert!(!mounts[2].read_only, "the mount is read-only, its file system is not");
        assert!(mounts[3].read_only);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>, line in "[0-9]{1,2} 1 [0-9]:[0-9] / /[\\\\0-9a-z ]{0,9} rw - ext4 a rw") {
            parse_mounts(&bytes);
            parse_mounts(line.as_bytes());
        }
    }
}
