//! The reference disk: an ext4 image with real files of this machine and some random bytes, and a second image that
//! differs from it by random 4 KiB writes. Both are only ever read by the cases.

use std::fs::{self, File};
use std::io::{Read, Write};
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

/// Both images, ready to be read.
#[derive(Debug)]
pub(super) struct Reference {
    image: PathBuf,
    changed: PathBuf,
    pub(super) size: u64,
    pub(super) used_bytes: u64,
    pub(super) changed_bytes: u64,
}

impl Reference {
    /// Builds the images below `base`, or takes those that an earlier run with `--keep` left.
    pub(super) fn provide(base: &Path, size: u64) -> Result<Reference> {
        let image = base.join(format!("disk-{}MiB.img", size / MIB));
        let changed = base.join(format!("changed-{}MiB.img", size / MIB));
        let blocks = size / CHANGED_PART / BLOCK;
        // The changed image gets its name last: when it is there, both are complete.
        if !changed.exists() {
            println!("building the reference disk of {} MiB", size / MIB);
            build_image(base, &image, size)?;
            let unfinished = base.join("changed.tmp");
            copy_sparse(&image, &unfinished)?;
            write_random_blocks(&unfinished, size, blocks)?;
            fs::hard_link(&unfinished, &changed).context("cannot name the changed disk")?;
            fs::remove_file(&unfinished)?;
        }
        let used_bytes = stored_bytes(&image)?;
        Ok(Reference { image, changed, size, used_bytes, changed_bytes: blocks * BLOCK })
    }

    /// The disk itself.
    pub(super) fn image(&self) -> &Path {
        &self.image
    }

    /// Gives the disk the name `path`, replacing what was there.
    pub(super) fn place_at(&self, path: &Path) -> Result<()> {
        link_over(&self.image, path)
    }

    /// Gives the changed disk the name `path`, replacing what was there.
    pub(super) fn place_changed_at(&self, path: &Path) -> Result<()> {
        link_over(&self.changed, path)
    }

    /// Every block that the changed disk has in another way, with its offset, in order.
    pub(super) fn for_each_change(&self, mut visit: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let changed = File::open(&self.changed)?;
        let mut buffer = [0; BLOCK as usize];
        for block in scattered(self.size / BLOCK, self.changed_bytes / BLOCK) {
            changed.read_exact_at(&mut buffer, block * BLOCK)?;
            visit(block * BLOCK, &buffer)?;
        }
        Ok(())
    }

    /// Reads both images once, so that every case finds them in the page cache (as far as it is large enough).
    pub(super) fn warm(&self) -> Result<()> {
        let mut buffer = vec![0; MIB as usize];
        for path in [&self.changed, &self.image] {
            let mut file = File::open(path)?;
            while file.read(&mut buffer)? > 0 {}
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

fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    process::run(Command::new("cp").args(["--sparse=always", "--reflink=auto", "--"]).arg(from).arg(to))
}

/// Overwrites `count` random blocks, each once, with random bytes.
fn write_random_blocks(path: &Path, size: u64, count: u64) -> Result<()> {
    ensure!(count > 0, "the disk is too small to change a part of it");
    let file = fs::OpenOptions::new().write(true).open(path)?;
    let mut random = File::open("/dev/urandom")?;
    let mut buffer = [0; BLOCK as usize];
    for block in scattered(size / BLOCK, count) {
        random.read_exact(&mut buffer)?;
        file.write_all_at(&buffer, block * BLOCK)?;
    }
    (&file).flush()?;
    Ok(())
}

/// `count` different numbers below `total`, scattered, the same in each run: one per stretch of equal length.
fn scattered(total: u64, count: u64) -> impl Iterator<Item = u64> {
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
