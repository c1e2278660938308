//! The demo's disk: an ext4 file system full of real files, and behind it a raw area. The ledger's slots lie in both: in
//! the blocks of one preallocated file, and in the raw area.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::ledger::{BLOCK_BYTES, mix};
use crate::failure::{Done, Failure, io_failure};

/// Raw area behind the file system, in bytes.
const TAIL_BYTES: u64 = 16 << 20;
/// Size of the preallocated file, in bytes.
const FILE_BYTES: u64 = 8 << 20;
/// Its name in the root of the file system.
const FILE_NAME: &str = "ledger-blocks";
/// Random bytes on the disk, which no compressor helps with.
const RANDOM_BYTES: u64 = 64 << 20;
/// Largest file taken from this machine, in bytes.
const TAKEN_BYTES_MAX: u64 = 24 << 20;
/// Where real files are taken from.
const SOURCES: [&str; 4] = ["/usr/share", "/usr/lib", "/usr/bin", "/usr/include"];

/// A disk that was made.
pub(crate) struct MadeDisk {
    pub(crate) size: u64,
    /// Byte offsets of the places that the workload writes to; nothing else uses them.
    pub(crate) slots: Vec<u64>,
    /// Size of the file system in bytes; `None` if e2fsprogs is missing and the disk is raw data.
    pub(crate) file_system: Option<u64>,
    /// Files taken from this machine, and their bytes.
    pub(crate) files: u64,
    pub(crate) file_bytes: u64,
}

/// A program that e2fsprogs brings; its folder is often not in an ordinary user's `PATH`.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Makes a disk of `size` bytes at `image`; `scratch` is an empty folder that is removed again.
pub(crate) fn make(image: &Path, scratch: &Path, size: u64, seed: u64) -> Done<MadeDisk> {
    let refused = |error: io::Error| io_failure(format!("the disk {} cannot be made", image.display()), &error);
    fs::create_dir_all(scratch).map_err(refused)?;
    let file = OpenOptions::new().write(true).create_new(true).open(image).map_err(refused)?;
    file.set_len(size).map_err(refused)?;
    let programs = find_program("mke2fs").zip(find_program("debugfs"));
    let (files, file_bytes) = gather(scratch, (size - TAIL_BYTES) / 2, seed).map_err(refused)?;
    let mut slots = Vec::new();
    let file_system = match programs {
        Some((mke2fs, debugfs)) => {
            let bytes = size - TAIL_BYTES;
            make_file_system(&mke2fs, image, scratch, bytes, seed)?;
            slots = file_blocks(&debugfs, image)?;
            Some(bytes)
        }
        None => {
            fill_raw(&file, scratch, size - TAIL_BYTES).map_err(refused)?;
            None
        }
    };
    slots.extend((size - TAIL_BYTES..size).step_by(BLOCK_BYTES));
    fs::remove_dir_all(scratch).map_err(refused)?;
    Ok(MadeDisk { size, slots, file_system, files, file_bytes })
}

/// Copies real files below `budget` bytes, in a fixed order, and adds random bytes and the preallocated file.
fn gather(scratch: &Path, budget: u64, seed: u64) -> io::Result<(u64, u64)> {
    let mut taken = Taken { budget, files: 0, bytes: 0 };
    for source in SOURCES {
        let share = taken.budget - taken.budget / 2;
        let end = taken.budget - share.min(taken.budget);
        take(Path::new(source), &scratch.join(source.trim_start_matches('/')), &mut taken, end)?;
    }
    let mut random = File::create(scratch.join("random-bytes"))?;
    let mut state = mix(seed) | 1;
    let mut piece = Vec::with_capacity(1 << 20);
    for _ in 0..RANDOM_BYTES.min(budget / 4) >> 20 {
        piece.clear();
        while piece.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            piece.extend_from_slice(&state.to_le_bytes());
        }
        random.write_all(&piece)?;
    }
    // Not zeroes: some versions of mke2fs leave those out, and a hole has no blocks.
    fs::write(scratch.join(FILE_NAME), vec![0xff; FILE_BYTES as usize])?;
    Ok((taken.files, taken.bytes))
}

struct Taken {
    budget: u64,
    files: u64,
    bytes: u64,
}

/// Copies regular files from `source` until the budget is down to `end`. What cannot be read is left out.
fn take(source: &Path, target: &Path, taken: &mut Taken, end: u64) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(source) else { return Ok(()) };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut made = false;
    for entry in entries {
        if taken.budget <= end {
            return Ok(());
        }
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        if metadata.is_dir() {
            take(&entry.path(), &target.join(entry.file_name()), taken, end)?;
        } else if metadata.is_file() && metadata.len() <= TAKEN_BYTES_MAX && metadata.len() <= taken.budget {
            if !made {
                fs::create_dir_all(target)?;
                made = true;
            }
            if let Ok(copied) = fs::copy(entry.path(), target.join(entry.file_name())) {
                taken.files += 1;
                taken.bytes += copied;
                // A file takes whole blocks and an inode.
                taken.budget = taken.budget.saturating_sub(copied.next_multiple_of(4096) + 512);
            }
        }
    }
    Ok(())
}

fn make_file_system(mke2fs: &Path, image: &Path, scratch: &Path, bytes: u64, seed: u64) -> Done {
    let words = [mix(seed), mix(seed ^ 1)];
    let uuid = format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        words[0] >> 32,
        words[0] >> 16 & 0xffff,
        words[0] & 0xfff,
        words[1] >> 52,
        words[1] & 0xffff_ffff_ffff
    );
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-i", "8192", "-U", &uuid]);
    command.arg("-E").arg(format!("hash_seed={uuid},lazy_itable_init=0,root_owner=0:0"));
    command.arg("-d").arg(scratch).arg(image).arg((bytes / 4096).to_string());
    run(&mut command, "the file system cannot be made").map(drop)
}

/// Byte offsets of the blocks of the preallocated file.
fn file_blocks(debugfs: &Path, image: &Path) -> Done<Vec<u64>> {
    let mut command = Command::new(debugfs);
    command.arg("-R").arg(format!("blocks /{FILE_NAME}")).arg(image);
    let said = run(&mut command, "the blocks of a file cannot be found")?;
    let blocks: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    if blocks.len() as u64 != FILE_BYTES / 4096 {
        return Err(Failure::new(
            "the blocks of a file cannot be found",
            format!("debugfs named {} blocks of {}", blocks.len(), FILE_BYTES / 4096),
            "report this with the version of e2fsprogs",
        ));
    }
    Ok(blocks.into_iter().map(|block| block * 4096).collect())
}

fn run(command: &mut Command, what: &str) -> Done<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| io_failure(what, &error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::new(what, format!("{}: {said}", command.get_program().display()), "see what it said"))
}

/// Without e2fsprogs: the same files, one after the other, up to `end`.
fn fill_raw(disk: &File, scratch: &Path, end: u64) -> io::Result<()> {
    let mut folders = vec![scratch.to_path_buf()];
    let mut at = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)?.flatten() {
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
                continue;
            }
            let contents = fs::read(entry.path())?;
            if at + contents.len() as u64 <= end {
                disk.write_all_at(&contents, at)?;
                at = (at + contents.len() as u64).next_multiple_of(4096);
            }
        }
    }
    Ok(())
}

/// Has `e2fsck -fn` look at the file system in `image`. It changes nothing.
pub(crate) fn check_file_system(image: &Path) -> Done<String> {
    let Some(e2fsck) = find_program("e2fsck") else {
        return Err(Failure::new("e2fsck is missing", "", "install e2fsprogs"));
    };
    let output = Command::new(e2fsck)
        .args(["-f", "-n"])
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io_failure("e2fsck cannot be run", &error))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // `image: 12/34 files (…), 56/78 blocks`
    let last = said.lines().last().unwrap_or_default();
    let last = last.rsplit_once(": ").map_or(last, |(_, figures)| figures).to_owned();
    if output.status.success() {
        return Ok(last);
    }
    Err(Failure::new(format!("e2fsck finds faults in {}", image.display()), said, "keep the folder and report it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slots_lie_in_the_file_and_behind_the_file_system() {
        if find_program("mke2fs").is_none() || find_program("debugfs").is_none() {
            println!("SKIPPED: demo disk: e2fsprogs is not installed");
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (image, scratch) = (folder.path().join("disk.raw"), folder.path().join("files"));
        let made = make(&image, &scratch, 96 << 20, 3).expect("made");
        assert!(!scratch.exists() && made.files > 0 && made.file_bytes > 1 << 20);
        assert_eq!(made.slots.len() as u64, (FILE_BYTES + TAIL_BYTES) / 4096);
        let mut sorted = made.slots.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), made.slots.len(), "no place is two slots");
        let file = File::options().read(true).write(true).open(&image).expect("opened");
        let mut bytes = [0; BLOCK_BYTES];
        for slot in &made.slots[..(FILE_BYTES / 4096) as usize] {
            file.read_exact_at(&mut bytes, *slot).expect("readable");
            assert_eq!(bytes, [0xff; BLOCK_BYTES], "the file's own bytes");
            file.write_all_at(&[0x5a; BLOCK_BYTES], *slot).expect("written");
        }
        check_file_system(&image).expect("writing to slots harms no file system");
        file.write_all_at(&[0x5a; 1 << 16], 0).expect("written");
        file.write_all_at(&[0x5a; 1 << 20], 1 << 16).expect("written");
        assert!(check_file_system(&image).is_err(), "a destroyed one is noticed");
    }

    #[test]
    fn without_e2fsprogs_the_files_lie_raw() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let scratch = folder.path().join("files");
        fs::create_dir_all(scratch.join("a")).expect("made");
        fs::write(scratch.join("a/b"), [7; 5000]).expect("written");
        let image =
            File::options().read(true).write(true).create_new(true).open(folder.path().join("d")).expect("made");
        image.set_len(1 << 20).expect("sized");
        fill_raw(&image, &scratch, 1 << 20).expect("filled");
        let mut bytes = [0; 5001];
        image.read_exact_at(&mut bytes, 0).expect("readable");
        assert!(bytes[..5000] == [7; 5000] && bytes[5000] == 0);
    }
}
