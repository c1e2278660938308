//! The reference disk: an ext4 image with real files of this machine and some random bytes, and the random 4 KiB writes that
//! make another one of it. Cases only read it.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{GIB, MIB, remove_directory, stored_bytes};
use crate::process;

const BLOCK: u64 = 4096;

/// Where real files come from: the system, then the Rust toolchain.
const SYSTEM_FILES: &str = "/usr";

/// Shares of the disk, in sixteenths, as on the published table's disk: 16 GiB with 8 GiB of files and 1 GiB random.
const FILES_SIXTEENTHS: u64 = 8;
const RANDOM_SIXTEENTHS: u64 = 1;

/// The part of the disk that the random writes change: 256 MiB of 16 GiB.
const CHANGED_PART: u64 = 64;

/// The disk, ready to be read, and the blocks that make it another one.
///
/// There is one image for both, changed in place and restored: two would not fit beside the repositories of the peers.
#[derive(Debug)]
pub(super) struct Reference {
    image: PathBuf,
    /// The blocks that differ, as they are at first and after the change, in order.
    before: PathBuf,
    after: PathBuf,
    /// Exists while the image may be in its changed state, also across a kill of this program.
    mark: PathBuf,
    pub(super) size: u64,
    pub(super) used_bytes: u64,
    pub(super) changed_bytes: u64,
}

/// Returns when everything that was written is on the medium: nobody's sync is to wait for what others left behind.
pub(super) fn settle() -> Result<()> {
    let status = Command::new("sync").status().context("cannot run sync")?;
    ensure!(status.success(), "sync failed");
    Ok(())
}

impl Reference {
    /// Builds the image below `base`, or takes the one that an earlier run with `--keep` left.
    pub(super) fn provide(base: &Path, size: u64) -> Result<Reference> {
        let path = |kind: &str| base.join(format!("disk-{}MiB.{kind}", size / MIB));
        let mut disk = Reference {
            image: path("img"),
            before: path("before"),
            after: path("after"),
            mark: path("is-changed"),
            size,
            used_bytes: 0,
            changed_bytes: size / CHANGED_PART / BLOCK * BLOCK,
        };
        ensure!(disk.changed_bytes > 0, "the disk is too small to change a part of it");
        // This file gets its name last: when it is there, all are complete.
        if !disk.after.exists() {
            println!("building the reference disk of {} MiB", size / MIB);
            build_image(base, &disk.image, size)?;
            disk.choose_changes()?;
        }
        disk.restore()?;
        disk.used_bytes = stored_bytes(&disk.image)?;
        Ok(disk)
    }

    /// The disk itself.
    pub(super) fn image(&self) -> &Path {
        &self.image
    }

    /// Gives the disk the name `path`, replacing what was there.
    pub(super) fn place_at(&self, path: &Path) -> Result<()> {
        link_over(&self.image, path)
    }

    /// Writes the random blocks, until the case ends.
    pub(super) fn change(&self) -> Result<()> {
        File::create(&self.mark)?;
        self.write_blocks(&self.after)
    }

    /// The disk as it was before [`Reference::change`].
    pub(super) fn restore(&self) -> Result<()> {
        if !self.mark.exists() {
            return Ok(());
        }
        self.write_blocks(&self.before)?;
        fs::remove_file(&self.mark).context("cannot remove the mark of a changed disk")
    }

    /// Every block of the changed disk that differs, with its offset, in order.
    pub(super) fn for_each_change(&self, mut visit: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut blocks = BufReader::with_capacity(MIB as usize, File::open(&self.after)?);
        let mut buffer = [0; BLOCK as usize];
        for block in scattered(self.size / BLOCK, self.changed_bytes / BLOCK) {
            blocks.read_exact(&mut buffer)?;
            visit(block * BLOCK, &buffer)?;
        }
        Ok(())
    }

    /// Reads the image once, so that every case finds it in the page cache (as far as that is large enough), and the medium at
    /// rest.
    pub(super) fn warm(&self) -> Result<()> {
        settle()?;
        let mut buffer = vec![0; MIB as usize];
        let mut file = File::open(&self.image)?;
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// Offsets of `count` blocks with data in the middle of the disk.
    pub(super) fn blocks_with_data(&self, count: usize) -> Result<Vec<u64>> {
        let image = File::open(&self.image)?;
        let mut buffer = vec![0; MIB as usize];
        let mut found = Vec::with_capacity(count);
        for start in (self.size / 4 / MIB * MIB..self.size).step_by(MIB as usize) {
            image.read_exact_at(&mut buffer, start)?;
            let blocks = (start..).step_by(BLOCK as usize).zip(buffer.chunks_exact(BLOCK as usize));
            found.extend(blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0)).map(|(offset, _)| offset));
            if found.len() >= count {
                found.truncate(count);
                break;
            }
        }
        ensure!(!found.is_empty(), "the disk is empty");
        Ok(found)
    }

    fn choose_changes(&self) -> Result<()> {
        let image = File::open(&self.image)?;
        let mut random = File::open("/dev/urandom")?;
        let unfinished = self.after.with_extension("tmp");
        let mut before = BufWriter::with_capacity(MIB as usize, File::create(&self.before)?);
        let mut after = BufWriter::with_capacity(MIB as usize, File::create(&unfinished)?);
        let mut buffer = [0; BLOCK as usize];
        for block in scattered(self.size / BLOCK, self.changed_bytes / BLOCK) {
            image.read_exact_at(&mut buffer, block * BLOCK)?;
            before.write_all(&buffer)?;
            random.read_exact(&mut buffer)?;
            after.write_all(&buffer)?;
        }
        before.flush()?;
        after.flush()?;
        fs::hard_link(&unfinished, &self.after).context("cannot name the changed blocks")?;
        fs::remove_file(&unfinished)?;
        Ok(())
    }

    fn write_blocks(&self, from: &Path) -> Result<()> {
        let image = fs::OpenOptions::new().write(true).open(&self.image)?;
        let mut blocks = BufReader::with_capacity(MIB as usize, File::open(from)?);
        let mut buffer = [0; BLOCK as usize];
        for block in scattered(self.size / BLOCK, self.changed_bytes / BLOCK) {
            blocks.read_exact(&mut buffer)?;
            image.write_all_at(&buffer, block * BLOCK)?;
        }
        Ok(())
    }
}

fn link_over(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_file(to)?;
    }
    fs::hard_link(from, to).with_context(|| format!("cannot give the disk the name {}", to.display()))
}

fn build_image(base: &Path, image: &Path, size: u64) -> Result<()> {
    let contents = base.join("contents");
    remove_directory(&contents)?;
    fs::create_dir(&contents)?;
    let mut left = size / 16 * FILES_SIXTEENTHS;
    copy_files(Path::new(SYSTEM_FILES), &contents.join("usr"), &mut left)?;
    if let Some(toolchain) = toolchain_directory() {
        copy_files(&toolchain, &contents.join("toolchain"), &mut left)?;
    }
    let random = size / 16 * RANDOM_SIXTEENTHS;
    let mut source = File::open("/dev/urandom")?.take(random);
    std::io::copy(&mut source, &mut File::create(contents.join("random.bin"))?)?;

    if image.exists() {
        fs::remove_file(image)?;
    }
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-d"]).arg(&contents).arg(image);
    make.arg(format!("{}M", size / MIB));
    process::run(&mut make)?;
    remove_directory(&contents)
}

/// Where the Rust toolchain is; a disk without it is a reference disk too.
fn toolchain_directory() -> Option<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).stderr(Stdio::null()).output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.is_dir().then_some(path)
}

/// Copies a tree in sorted order until `left` bytes are used up, so that the same machine gives the same disk. Only
/// plain files, directories and symbolic links; what we may not read is left out.
///
/// Copies, not hard links: `mke2fs -d` searches a list for every file that has more than one name.
fn copy_files(from: &Path, to: &Path, left: &mut u64) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("cannot create {}", to.display()))?;
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(meta) = entry.metadata() else { continue };
        let target = to.join(entry.file_name());
        if *left < BLOCK {
            return Ok(());
        }
        if meta.is_dir() {
            *left -= BLOCK;
            copy_files(&entry.path(), &target, left)?;
        } else if meta.is_symlink() {
            symlink(fs::read_link(entry.path())?, &target)?;
        } else if meta.is_file() {
            // Whole blocks are what a file costs on the disk.
            let cost = meta.len().div_ceil(BLOCK) * BLOCK;
            if cost <= *left && fs::copy(entry.path(), &target).is_ok() {
                *left -= cost;
            }
        }
    }
    Ok(())
}

/// A copy of an image that needs no room for its holes.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    process::run(Command::new("cp").args(["--sparse=always", "--reflink=auto", "--"]).arg(from).arg(to))
}

/// `count` different numbers below `total`, scattered, the same in each run: one per stretch of equal length.
pub(super) fn scattered(total: u64, count: u64) -> impl Iterator<Item = u64> {
    let stretch = total / count;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..count).map(move |index| {
        // xorshift64 (Marsaglia 2003): the places need to be scattered, not unpredictable.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        index * stretch + state % stretch
    })
}

/// A size for people.
pub(super) fn describe_size(bytes: u64) -> String {
    if bytes >= GIB { format!("{:.2} GiB", bytes as f64 / GIB as f64) } else { format!("{} MiB", bytes / MIB) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_blocks_are_different_blocks_all_over_the_disk() {
        let blocks: Vec<u64> = scattered(64_000, 1000).collect();
        assert_eq!(blocks.len(), 1000);
        assert!(blocks.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(*blocks.last().unwrap() < 64_000 && *blocks.last().unwrap() >= 63_936);
        let offsets: std::collections::BTreeSet<u64> = blocks.iter().map(|block| block % 64).collect();
        assert!(offsets.len() > 50, "the places follow a pattern: {offsets:?}");
    }

    #[test]
    fn a_changed_disk_is_restored_also_after_a_kill() {
        let base = std::env::temp_dir().join(format!("farshore-xtask-changes-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let path = |name: &str| base.join(name);
        let image: Vec<u8> = (0..64 * 4096u32).map(|index| (index / 4096) as u8).collect();
        fs::write(path("img"), &image).unwrap();
        let disk = Reference {
            image: path("img"),
            before: path("before"),
            after: path("after"),
            mark: path("mark"),
            size: 64 * 4096,
            used_bytes: 0,
            changed_bytes: 8 * 4096,
        };
        disk.choose_changes().unwrap();
        disk.change().unwrap();
        let changed = fs::read(path("img")).unwrap();
        let mut seen = 0;
        disk.for_each_change(|offset, block| {
            seen += 1;
            assert!(changed[offset as usize..][..4096] == *block && image[offset as usize..][..4096] != *block);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 8);
        disk.restore().unwrap();
        assert!(fs::read(path("img")).unwrap() == image && !path("mark").exists());
        fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn copying_stops_at_the_limit_and_keeps_links() {
        let base = std::env::temp_dir().join(format!("farshore-xtask-disk-{}", std::process::id()));
        let from = base.join("from");
        fs::create_dir_all(from.join("deep")).unwrap();
        for name in ["a", "deep/b", "z"] {
            fs::write(from.join(name), [1; 5000]).unwrap();
        }
        symlink("a", from.join("another")).unwrap();
        let mut left = 2 * 8192 + BLOCK;
        copy_files(&from, &base.join("to"), &mut left).unwrap();
        assert_eq!(left, 0);
        assert!(base.join("to/a").exists() && base.join("to/deep/b").exists() && !base.join("to/z").exists());
        assert_eq!(fs::read_link(base.join("to/another")).unwrap(), Path::new("a"));
        fs::remove_dir_all(base).unwrap();
    }
}
