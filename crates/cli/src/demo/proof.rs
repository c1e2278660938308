//! Proving a point: open it as a branch in a process of its own, read all of it over NBD, and compare.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbd::Client;
use serde_json::Value;
use world::{Access, BlockDevice, Clock, FileDevice, SystemClock};

use super::check::{Mismatch, equals_replay, prefix_held};
use super::disk::check_file_system;
use super::ledger::{Ledger, block};
use super::processes::{Programs, Running};
use super::site::text;
use crate::failure::{Done, Failure, io_failure};

/// How long a branch may take to open.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
const PIECE_BYTES: usize = 1 << 20;
/// Zeroes of this length and alignment become holes.
const HOLE_BYTES: usize = 64 << 10;

/// A branch that a process serves.
pub(crate) struct OpenBranch {
    pub(crate) process: Running,
    /// What the process said when it was open.
    pub(crate) said: Value,
    pub(crate) socket: PathBuf,
    pub(crate) export: String,
}

/// What opens the vault, and where a branch keeps its state.
pub(crate) struct Opening<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) vault: &'a Path,
    pub(crate) key: &'a Path,
    pub(crate) state: &'a Path,
}

impl Opening<'_> {
    /// Opens `machine` at `moment`; `more` are further options.
    pub(crate) fn open(&self, machine: &str, moment: &str, more: &[&str]) -> Done<OpenBranch> {
        let mut command = self.programs.farshore(&["--json", "branch", "open", machine, "--at", moment]);
        command.args(["--vault", text(self.vault)?, "--recovery-key-file", text(self.key)?]);
        command.args(["--state-dir", text(self.state)?]).args(more);
        self.serve(command)
    }

    /// Fails `machine` over to its newest point: its own history is closed.
    pub(crate) fn fail_over(&self, machine: &str, name: &str) -> Done<OpenBranch> {
        let mut command = self.programs.farshore(&["--json", "--yes", "failover", machine, "--name", name]);
        command.args(["--source-is-lost", "--vault", text(self.vault)?, "--recovery-key-file", text(self.key)?]);
        command.args(["--state-dir", text(self.state)?]);
        self.serve(command)
    }

    fn serve(&self, command: std::process::Command) -> Done<OpenBranch> {
        let mut process = self.programs.start(command, "branch")?;
        let mut said = process.object(OPEN_LIMIT)?;
        if said["event"] == "failed-over" {
            said = process.object(OPEN_LIMIT)?;
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (socket, export) = (PathBuf::from(text(&said["socket"])), text(&said["disks"][0]["export"]));
        Ok(OpenBranch { process, said, socket, export })
    }
}

impl OpenBranch {
    /// A connection to its disk.
    pub(crate) fn connect(&self) -> Done<Client> {
        Client::connect_unix(&self.socket, &self.export)
            .map_err(|error| Failure::because("the branch's disk cannot be used", &error, "report this"))
    }

    /// A field of what it said, as text.
    pub(crate) fn field(&self, name: &str) -> String {
        self.said[name].as_str().unwrap_or_default().to_owned()
    }
}

/// What a point must hold.
#[derive(Debug, Clone)]
pub(crate) enum Claim {
    /// Exactly the first so many writes.
    Exactly(u64),
    /// Some number of first writes in this range.
    Between(RangeInclusive<u64>),
}

/// A point that was proven.
#[derive(Debug, Clone)]
pub(crate) struct Proof {
    pub(crate) name: String,
    pub(crate) sequence: String,
    pub(crate) chain: String,
    pub(crate) time: String,
    pub(crate) time_ns: u64,
    pub(crate) reason: String,
    /// It holds the first so many writes of the ledger.
    pub(crate) k: u64,
    /// Writes that its moment allowed.
    pub(crate) allowed: RangeInclusive<u64>,
    pub(crate) bytes: u64,
    pub(crate) open_ms: u64,
    pub(crate) read_ms: u64,
    /// What e2fsck said.
    pub(crate) file_system: String,
}

/// What every proof compares with.
pub(crate) struct Evidence<'a> {
    /// The disk before the first write.
    pub(crate) start: &'a Path,
    pub(crate) ledger: &'a Ledger,
    /// Whether the disk holds an ext4 file system.
    pub(crate) has_file_system: bool,
    /// A folder for what was read.
    pub(crate) scratch: &'a Path,
}

/// A mismatch is a failure that nothing excuses.
pub(crate) fn mismatch(name: &str, what: impl std::fmt::Display) -> Failure {
    Failure::new(
        format!("MISMATCH at the point {name}: {what}"),
        "what was recovered is not what the ledger says",
        "this is a fault: report it with the seed, and repeat with --keep",
    )
}

/// Reads all of `branch` and proves it.
pub(crate) fn prove(name: &str, branch: &OpenBranch, claim: &Claim, evidence: &Evidence<'_>) -> Done<Proof> {
    let began = SystemClock.monotonic();
    let recovered = evidence.scratch.join("recovered.raw");
    copy_device(&branch.connect()?, &recovered)?;
    let read_ms = u64::try_from(SystemClock.monotonic().since(began).as_millis()).unwrap_or(u64::MAX);
    let wrong = |error: Mismatch| mismatch(name, error.0);
    let device = open_image(&recovered)?;
    let k = prefix_held(&device, evidence.ledger).map_err(wrong)?;
    let allowed = match claim {
        Claim::Exactly(number) => *number..=*number,
        Claim::Between(range) => range.clone(),
    };
    if !allowed.contains(&k) {
        let (least, most) = (allowed.start(), allowed.end());
        return Err(mismatch(name, format!("it holds {k} writes, its moment allows {least} to {most}")));
    }
    let bytes = equals_replay(&device, &open_image(evidence.start)?, evidence.ledger, k).map_err(wrong)?;
    let file_system = match evidence.has_file_system {
        true => check_file_system(&recovered)?,
        false => "no file system".to_owned(),
    };
    std::fs::remove_file(&recovered).map_err(|error| io_failure("a copy cannot be removed", &error))?;
    Ok(Proof {
        name: name.to_owned(),
        sequence: branch.field("sequence"),
        chain: branch.field("parent_chain"),
        time: branch.field("time"),
        time_ns: branch.said["time_ns"].as_u64().unwrap_or_default(),
        reason: branch.field("reason"),
        k,
        allowed,
        bytes,
        open_ms: branch.said["took_ns"].as_u64().unwrap_or_default() / 1_000_000,
        read_ms,
        file_system,
    })
}

/// An image file, for reading.
pub(crate) fn open_image(path: &Path) -> Done<FileDevice> {
    FileDevice::open(path, Access::ReadOnly)
        .map_err(|error| Failure::because(format!("{} cannot be read", path.display()), &error, "report this"))
}

/// Copies a whole device to a new sparse file.
pub(crate) fn copy_device(device: &dyn BlockDevice, to: &Path) -> Done {
    let refused = |error: std::io::Error| io_failure(format!("{} cannot be written", to.display()), &error);
    let file = File::create(to).map_err(refused)?;
    file.set_len(device.size()).map_err(refused)?;
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < device.size() {
        let len = (device.size() - at).min(PIECE_BYTES as u64) as usize;
        let piece = &mut buffer[..len];
        device.read_at(at, piece).map_err(|error| Failure::because("a disk cannot be read", &error, "report this"))?;
        for (index, part) in piece.chunks(HOLE_BYTES).enumerate() {
            if part.iter().any(|byte| *byte != 0) {
                file.write_all_at(part, at + (index * HOLE_BYTES) as u64).map_err(refused)?;
            }
        }
        at += len as u64;
    }
    Ok(())
}

/// Writes what the source held after the first `k` writes to a new file.
pub(crate) fn write_replay(start: &Path, ledger: &Ledger, k: u64, to: &Path) -> Done {
    copy_device(&open_image(start)?, to)?;
    let refused = |error: std::io::Error| io_failure(format!("{} cannot be written", to.display()), &error);
    let file = File::options().write(true).open(to).map_err(refused)?;
    for (offset, number) in ledger.slots.iter().zip(ledger.last_in_slots(k)) {
        if number > 0 {
            file.write_all_at(&block(ledger.seed, number, *offset), *offset).map_err(refused)?;
        }
    }
    Ok(())
}

/// BLAKE3 of a whole device.
pub(crate) fn hash_device(device: &dyn BlockDevice) -> Done<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < device.size() {
        let len = (device.size() - at).min(PIECE_BYTES as u64) as usize;
        device
            .read_at(at, &mut buffer[..len])
            .map_err(|error| Failure::because("a disk cannot be read", &error, "report this"))?;
        hasher.update(&buffer[..len]);
        at += len as u64;
    }
    Ok(hasher.finalize())
}
