//! Disks as they were at some moment, mounted and judged.
#![allow(dead_code, unreachable_pub)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use replication::{Change, ChangeKind};

use super::ledger::Ledger;
use super::loops::{Loop, output_of, succeeds};

const PIECE_BYTES: usize = 64 << 10;

/// A disk in a sparse file, and how far it has come.
pub struct Image {
    path: PathBuf,
    file: File,
    /// The changes before this one are in it.
    next: usize,
    /// So many rounds of the ledger were synced then.
    promised: u64,
}

impl Image {
    /// The disk with this content.
    pub fn make(path: &Path, content: &[u8]) -> Image {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).expect("created");
        file.set_len(content.len() as u64).expect("sized");
        for (index, piece) in content.chunks(PIECE_BYTES).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, (index * PIECE_BYTES) as u64).expect("written");
            }
        }
        Image { path: path.to_owned(), file, next: 0, promised: 0 }
    }

    /// Another one with the same content.
    pub fn copy(&self, path: &Path) -> Image {
        let (from, to) = (self.path.display().to_string(), path.display().to_string());
        assert!(succeeds("cp", &["--sparse=always", &from, &to]), "{from} is copied");
        let file = OpenOptions::new().read(true).write(true).open(path).expect("opens");
        Image { path: path.to_owned(), file, next: self.next, promised: self.promised }
    }

    /// Goes on to just after the change `at` of `log`, without the changes of which `is_kept` says no.
    pub fn advance(&mut self, log: &[Change], at: usize, is_kept: impl Fn(usize) -> bool) {
        for (index, change) in log.iter().enumerate().take(at + 1).skip(self.next) {
            let zeroes;
            let (range, data) = match &change.kind {
                ChangeKind::Write { range, data } => (range, &data[..]),
                ChangeKind::Zero { range } | ChangeKind::Discard { range } => {
                    zeroes = vec![0; range.len as usize];
                    (range, &zeroes[..])
                }
                ChangeKind::Marker { name, .. } => {
                    self.promised = name.parse().expect("a number");
                    continue;
                }
                _ => continue,
            };
            if is_kept(index) {
                self.file.write_all_at(data, range.start).expect("written");
            }
        }
        self.next = self.next.max(at + 1);
    }

    /// Mounts a copy of it, judges the ledger in it, and has the file system checked. How many rounds the ledger has.
    pub fn open(&self, fs_type: &'static str, folder: &Path) -> Result<u64, String> {
        let copy = self.copy(&folder.join("point.img"));
        let mut point = Loop::attach(&copy.path, fs_type, &folder.join("point")).ok_or("no loop device")?;
        // A journal that has to be replayed wants a writable device, which it is; anything else is damage.
        if !point.mount("ro") {
            return Err("it cannot be mounted".to_owned());
        }
        let judged = Ledger::judge(&point.mount, self.promised);
        point.unmount();
        let judged = judged?;
        let device = point.device.display().to_string();
        let (program, words): (&str, &[&str]) = match fs_type {
            "xfs" => ("xfs_repair", &["-n", &device]),
            "btrfs" => ("btrfs", &["check", "--readonly", &device]),
            _ => ("e2fsck", &["-fn", &device]),
        };
        if !succeeds(program, words) {
            return Err(format!("the file system is damaged: {}", output_of(program, words)));
        }
        Ok(judged)
    }
}
