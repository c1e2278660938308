//! The state directory: who this agent is, which disks it knows, and on which commit its maps rest.
//!
//! ```text
//! identity          key and certificate (link), owner only; identity.lock while it is replaced
//! enrolment         machine name and server addresses of the join
//! disks             numbers of the disks, assigned once
//! cleared           the newest commit on which maps were cleared
//! point             an application-consistent point that is being taken
//! stream            where the stream ended, from an orderly end to the next start
//! scrub             what scrubs have compared, and what they found
//! maps, maps.lock   dirty maps (docs/formats/dirty-maps.md)
//! agent.lock        held by the running agent
//! control.sock, nbd.sock
//! ```
//!
//! Small records are text (docs/formats/agent-state.md): a line with magic, kind, version and checksum, then JSON. Each is
//! replaced atomically and durably; a crash leaves the old one or the new.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use link::{JoinError, JoinPlan, JoinToken, LinkIdentity, LinkRuntime, Role};
use replication::sender::KeptStream;
use replication::{ByteRange, ChainId, DiskId, Epoch, Generation, Ranges, SequenceNumber, StreamHash};
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use world::{Clock, Files, RealFiles, SystemEntropy, durable};

use crate::engine::ClearedMark;
use crate::scrub::ScrubRecord;
use crate::scrub::memory::{Memory, StoredMemory};
use crate::service::problem::{Problem, chain};

const IDENTITY: &str = "identity";
/// The identity for another server, until it takes the place of the one before.
const NEXT_IDENTITY: &str = "identity.next";
/// Held while the identity is replaced.
const IDENTITY_LOCK: &str = "identity.lock";
const ENROLMENT: &str = "enrolment";
const CLEARED: &str = "cleared";
const STREAM: &str = "stream";
const SCRUB: &str = "scrub";
const LOCK: &str = "agent.lock";
/// The name of the map file.
pub(crate) const MAPS: &str = "maps";
const MAGIC: &str = "farshore-agent";
const VERSION: u32 = 1;
/// Largest record in bytes.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// What is known from the join besides the identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enrolment {
    /// The machine's name, for people.
    pub machine_name: String,
    /// Where the process server may be reached.
    pub server_addresses: Vec<String>,
}

/// Why a small record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Unreadable(#[source] io::Error),
    /// It is damaged, or of a version this program does not know.
    #[error("it is damaged or of another version")]
    Damaged,
}

/// The agent's directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
    files: RealFiles,
}

impl StateDir {
    /// The directory at `path`, created for its owner only if it does not exist.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn open(path: &Path) -> Result<StateDir, Problem> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| {
            Problem::caused(
                format!("the state directory {} cannot be created", path.display()),
                &error,
                "run as the user it belongs to, or name another with --state-dir",
            )
        })?;
        Ok(StateDir { path: path.to_owned(), files: RealFiles::new(path) })
    }

    /// The directory at `path`, which is only read: nothing is created.
    pub(crate) fn at(path: &Path) -> StateDir {
        StateDir { path: path.to_owned(), files: RealFiles::new(path) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps a second agent off this directory for as long as the result lives.
    ///
    /// # Errors
    /// Another agent runs here, or the file system does not lock.
    pub fn lock(&self) -> Result<File, Problem> {
        let path = self.path.join(LOCK);
        let what = format!("the state directory {} cannot be locked", self.path.display());
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| Problem::caused(&what, &error, "run as the user it belongs to"))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Problem::failed(
                what,
                "another agent runs on it",
                "stop that agent, or use a state directory of its own for each machine",
            )),
            Err(error) => Err(Problem::caused(what, &error, "use a local file system that supports locks")),
        }
    }

    /// The identity, if this machine has joined.
    ///
    /// # Errors
    /// It is there but cannot be used.
    pub fn identity(&self) -> Result<Option<LinkIdentity>, Problem> {
        let identity = LinkIdentity::load(&self.files, IDENTITY).map_err(|error| {
            Problem::caused(
                "this machine's identity cannot be used",
                &error,
                "restore it, or join again with a new token",
            )
        })?;
        match identity {
            Some(identity) if identity.peer.role != Role::Agent => Err(Problem::failed(
                "this machine's identity cannot be used",
                format!("it is that of a {}", identity.peer.role),
                "order a token for an agent and join into another state directory",
            )),
            other => Ok(other),
        }
    }

    /// The identity of a machine that has joined.
    ///
    /// # Errors
    /// It has not joined, or the identity cannot be used.
    pub fn joined_identity(&self) -> Result<LinkIdentity, Problem> {
        self.identity()?.ok_or_else(|| {
            Problem::failed(
                "this machine has not joined a process server",
                format!("{} holds no identity", self.path.display()),
                "order a token at the server, then run `farshore-agent join --token TOKEN --state-dir DIR`",
            )
        })
    }

    /// Enrols this machine; one that is enrolled at another installation keeps its machine id, maps and disks and follows
    /// the new server from now on. What was obtained is durable on return.
    ///
    /// # Errors
    /// The token, the server or the directory, with what to do. May be repeated.
    pub fn join(
        &self,
        runtime: &LinkRuntime,
        clock: Arc<dyn Clock>,
        token: &JoinToken,
        machine_name: &str,
        addresses: &[String],
    ) -> Result<LinkIdentity, Problem> {
        if token.role != Role::Agent {
            return Err(Problem::usage(
                "the token is not for an agent",
                format!("it enrols a {}", token.role),
                "order a token for an agent",
            ));
        }
        let mut servers = addresses.to_vec();
        servers.extend(token.addresses.iter().filter(|address| !addresses.contains(address)).cloned());
        let enrolment = Enrolment { machine_name: machine_name.to_owned(), server_addresses: servers };
        let record = |enrolment: &Enrolment| {
            self.write(ENROLMENT, enrolment)
                .map_err(|error| Problem::caused("the join cannot be recorded", &error, "make room, then repeat it"))
        };
        // Whose certificate has ended may have nothing to renew it with any more.
        if let Some(known) = self.identity()?
            && (link::trust::fingerprint(&known.authority) != token.fingerprint || known.has_ended(clock.wall()))
        {
            let moved = self.join_another(runtime, clock, token, addresses, &known)?;
            record(&enrolment)?;
            self.replace_identity(&moved)?;
            return Ok(moved);
        }
        // Before the identity, whose presence says that the join is done.
        if self.identity()?.is_none() {
            record(&enrolment)?;
        }
        let plan = JoinPlan { files: &self.files, path: IDENTITY, clock, entropy: &SystemEntropy, addresses };
        link::join(runtime, &plan, token).map_err(join_problem)
    }

    /// Enrols the same machine at another installation, beside what it has. A crash before the new identity replaced the
    /// old one leaves the old; repeated with the same token, it goes on.
    fn join_another(
        &self,
        runtime: &LinkRuntime,
        clock: Arc<dyn Clock>,
        token: &JoinToken,
        addresses: &[String],
        known: &LinkIdentity,
    ) -> Result<LinkIdentity, Problem> {
        let plan = JoinPlan { files: &self.files, path: NEXT_IDENTITY, clock, entropy: &SystemEntropy, addresses };
        let joined = match link::join(runtime, &plan, token) {
            Ok(joined) => joined,
            Err(JoinError::AlreadyJoined(earlier))
                if link::trust::fingerprint(&earlier.authority) == token.fingerprint =>
            {
                *earlier
            }
            Err(JoinError::AlreadyJoined(_)) => {
                // Left by a move to yet another server that was not finished.
                self.remove_record(NEXT_IDENTITY)?;
                link::join(runtime, &plan, token).map_err(join_problem)?
            }
            Err(error) => return Err(join_problem(error)),
        };
        if joined.peer.id != known.peer.id {
            self.remove_record(NEXT_IDENTITY)?;
            let machine = replication::MachineId(known.peer.id);
            return Err(Problem::failed(
                "this machine cannot go to that server",
                "the token is for a new machine: this one would lose its history",
                format!("order one with `farshore token new --machine {machine}`, or use another state directory"),
            ));
        }
        Ok(joined)
    }

    /// Keeps a renewed identity in the place of the one that it was renewed from, durably; whether that was still there. A join
    /// that ran meanwhile is not undone.
    pub(crate) fn renew_identity(&self, from: &LinkIdentity, renewed: &LinkIdentity) -> Result<bool, Problem> {
        let _held = self.hold_identity()?;
        if self.identity()?.is_none_or(|now| now.certificate != from.certificate) {
            return Ok(false);
        }
        let kept = renewed.store(&self.files, IDENTITY);
        kept.map_err(|error| Problem::caused("the renewed certificate cannot be kept", &error, "make room"))
            .map(|()| true)
    }

    /// Keeps others from replacing the identity for as long as the result lives.
    fn hold_identity(&self) -> Result<File, Problem> {
        let problem = |error: io::Error| {
            Problem::caused("the identity cannot be replaced", &error, "use a local file system that supports locks")
        };
        let path = self.path.join(IDENTITY_LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(problem)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|error| problem(error.into()))?;
        Ok(file)
    }

    fn replace_identity(&self, identity: &LinkIdentity) -> Result<(), Problem> {
        let _held = self.hold_identity()?;
        identity.store(&self.files, IDENTITY).map_err(|error| {
            Problem::caused("the new identity cannot be kept", &error, "make room, then repeat it with the same token")
        })?;
        self.remove_record(NEXT_IDENTITY)
    }

    fn remove_record(&self, name: &str) -> Result<(), Problem> {
        match self.files.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Problem::caused("an old identity cannot be removed", &error, "make the state directory writable"))
            }
            _ => Ok(()),
        }
    }

    /// What is known from the join; empty if that is lost.
    pub fn enrolment(&self) -> Enrolment {
        match self.read(ENROLMENT) {
            Ok(Some(enrolment)) => enrolment,
            Ok(None) => Enrolment { machine_name: String::new(), server_addresses: Vec::new() },
            Err(error) => {
                tracing::warn!(error = chain(&error), "the record of the join is ignored");
                Enrolment { machine_name: String::new(), server_addresses: Vec::new() }
            }
        }
    }

    /// The mark of the newest commit on which maps were cleared.
    pub fn cleared_mark(&self) -> FileClearedMark {
        let found = self
            .read::<Cleared>(CLEARED)
            .and_then(|found| found.map(|found| found.parse().ok_or(RecordError::Damaged)).transpose());
        let damaged = match &found {
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(error = chain(error), "the mark of the newest commit is lost: all disks are compared");
                true
            }
        };
        FileClearedMark { state: self.clone(), mark: found.unwrap_or_default(), damaged }
    }

    /// Remembers where the stream ended, or (`None`) that nothing of that kind holds any more. Durable on return.
    pub(crate) fn keep_stream(&self, kept: Option<&(Epoch, KeptStream)>) -> io::Result<()> {
        match kept {
            Some((ended_in, kept)) => self.write(STREAM, &StreamEnd::of(*ended_in, kept)),
            None => match self.files.remove(STREAM) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
                Ok(()) => self.files.sync_directory(""),
            },
        }
    }

    /// Where the stream ended, if the agent that ended in this epoch of the maps left word of it.
    pub(crate) fn kept_stream(&self, ended_in: Epoch) -> Option<KeptStream> {
        match self.read::<StreamEnd>(STREAM) {
            Ok(found) => found.filter(|found| found.epoch == ended_in.0)?.parse(),
            Err(error) => {
                tracing::warn!(error = chain(&error), "the end of the last stream is not known: the disks are healed");
                None
            }
        }
    }

    /// What is remembered of scrubs.
    pub fn scrub_record(&self) -> FileScrubRecord {
        FileScrubRecord(self.clone())
    }

    /// Makes `value` the record `name`, durable on return.
    pub(crate) fn write<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        durable::replace(&self.files, name, encode(name, value)?.as_bytes(), "new")
    }

    /// Removes the record `name`.
    pub(crate) fn forget(&self, name: &str) -> io::Result<()> {
        self.files.remove(name)
    }

    /// The record `name`, if there is one.
    pub(crate) fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RecordError> {
        match self.files.len(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RecordError::Unreadable(error)),
            Ok(len) if len > RECORD_BYTES_MAX => return Err(RecordError::Damaged),
            Ok(_) => {}
        }
        let bytes = self.files.read(name).map_err(RecordError::Unreadable)?;
        decode(name, &bytes).map(Some)
    }
}

/// The bytes of the record `name`.
fn encode<T: Serialize>(name: &str, value: &T) -> io::Result<String> {
    let json = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    let checksum = blake3::hash(json.as_bytes()).to_hex();
    Ok(format!("{MAGIC} {name} {VERSION} {checksum}\n{json}\n"))
}

/// What the bytes of the record `name` say.
fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, RecordError> {
    let text = std::str::from_utf8(bytes).map_err(|_| RecordError::Damaged)?;
    let (head, json) = text.split_once('\n').ok_or(RecordError::Damaged)?;
    let json = json.strip_suffix('\n').ok_or(RecordError::Damaged)?;
    let checksum = blake3::hash(json.as_bytes()).to_hex();
    if head != format!("{MAGIC} {name} {VERSION} {checksum}") {
        return Err(RecordError::Damaged);
    }
    serde_json::from_str(json).map_err(|_| RecordError::Damaged)
}

/// A record's bytes for the fuzzer, which cannot know checksums: the first byte names the kind, the rest is the JSON. What
/// is understood is written and read back the same. Also the bytes as they are.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzzed_record(data: &[u8]) -> bool {
    fn check<T: Serialize + DeserializeOwned>(name: &str, json: &str, judge: impl Fn(&T)) -> bool {
        let checksum = blake3::hash(json.as_bytes()).to_hex();
        let bytes = format!("{MAGIC} {name} {VERSION} {checksum}\n{json}\n");
        let Ok(value) = decode::<T>(name, bytes.as_bytes()) else { return false };
        judge(&value);
        let written = encode(name, &value).expect("a record is plain data");
        let again = decode::<T>(name, written.as_bytes()).expect("what was written is read");
        assert_eq!(encode(name, &again).expect("a record is plain data"), written);
        true
    }
    assert!(decode::<Cleared>(CLEARED, data).is_err() || data.starts_with(MAGIC.as_bytes()));
    let Some((&kind, rest)) = data.split_first() else { return false };
    let Ok(json) = std::str::from_utf8(rest) else { return false };
    match kind {
        b'e' => check::<Enrolment>(ENROLMENT, json, |_| ()),
        b'c' => check::<Cleared>(CLEARED, json, |cleared| {
            let _ = cleared.parse();
        }),
        b's' => check::<StreamEnd>(STREAM, json, |end| {
            let Some(kept) = end.parse() else { return };
            let again = StreamEnd::of(Epoch(end.epoch), &kept).parse().expect("what was kept is read");
            assert_eq!(again, kept);
        }),
        b'r' => check::<StoredMemory>(SCRUB, json, |stored| {
            let Some(memory) = stored.parse() else { return };
            assert_eq!(StoredMemory::of(&memory).parse(), Some(memory), "what was remembered is read");
        }),
        b'd' => check::<crate::disks::DiskRegister>("disks", json, crate::disks::DiskRegister::check_fuzzed),
        _ => false,
    }
}

fn join_problem(error: JoinError) -> Problem {
    let why = chain(&error);
    let what = "this machine could not be enrolled";
    match error {
        JoinError::AlreadyJoined(identity) => Problem::new(
            crate::service::problem::ProblemKind::AlreadySo,
            "this machine is enrolled already",
            format!("it is {}", identity.peer),
            "to enrol it as another machine, use another state directory",
        ),
        JoinError::Refused(_) => Problem::failed(what, why, "if the reason persists, order a new token at the server"),
        JoinError::Link(_) => {
            Problem::failed(what, why, "check the address and the network, then repeat with the same token")
        }
        JoinError::NoAddress => Problem::usage(what, why, "name the server with --server HOST:PORT"),
        JoinError::Identity(_) => Problem::failed(what, why, "make the state directory writable, then repeat"),
        JoinError::BadAnswer(_) => Problem::failed(what, why, "use the same version on both machines"),
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamEnd {
    /// The maps' epoch in which the agent ended.
    epoch: u32,
    chain: String,
    generation: u32,
    released: String,
    hash: String,
    heals_started: u64,
    /// Disk, first byte, number of bytes.
    lacking: Vec<(u16, u64, u64)>,
}

impl StreamEnd {
    fn of(ended_in: Epoch, kept: &KeptStream) -> StreamEnd {
        StreamEnd {
            epoch: ended_in.0,
            chain: kept.chain.to_string(),
            generation: kept.generation.0,
            released: kept.released.to_string(),
            hash: blake3::Hash::from_bytes(kept.hash.0).to_hex().to_string(),
            heals_started: kept.heals_started,
            lacking: kept.lacking.iter().map(|(disk, range)| (disk.0, range.start, range.len)).collect(),
        }
    }

    fn parse(&self) -> Option<KeptStream> {
        let range = |(disk, start, len): &(u16, u64, u64)| {
            Some((DiskId(*disk), ByteRange::between(*start, start.checked_add(*len)?)?))
        };
        Some(KeptStream {
            chain: self.chain.parse().ok()?,
            generation: Generation(self.generation),
            released: self.released.parse().ok()?,
            hash: StreamHash(*blake3::Hash::from_hex(&self.hash).ok()?.as_bytes()),
            heals_started: self.heals_started,
            lacking: Ranges::of(self.lacking.iter().map(range).collect::<Option<Vec<_>>>()?),
        })
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cleared {
    chain: String,
    committed: String,
}

impl Cleared {
    fn parse(&self) -> Option<(ChainId, SequenceNumber)> {
        Some((self.chain.parse().ok()?, self.committed.parse().ok()?))
    }
}

/// What is remembered of scrubs, in the state directory.
pub struct FileScrubRecord(StateDir);

impl ScrubRecord for FileScrubRecord {
    fn load(&self) -> Option<Memory> {
        let found = self
            .0
            .read::<StoredMemory>(SCRUB)
            .and_then(|found| found.map(|found| found.parse().ok_or(RecordError::Damaged)).transpose());
        found.unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "what scrubs have compared is not known any more");
            None
        })
    }

    fn store(&mut self, memory: &Memory) -> io::Result<()> {
        self.0.write(SCRUB, &StoredMemory::of(memory))
    }
}

/// The cleared mark in the state directory.
pub struct FileClearedMark {
    state: StateDir,
    mark: Option<(ChainId, SequenceNumber)>,
    damaged: bool,
}

impl FileClearedMark {
    /// Whether there was a mark that cannot be used. Then the vault may be behind what was once committed without
    /// anybody noticing, and only a comparison of whole disks will do.
    pub fn is_damaged(&self) -> bool {
        self.damaged
    }
}

impl ClearedMark for FileClearedMark {
    fn load(&self) -> Option<(ChainId, SequenceNumber)> {
        self.mark
    }

    fn store(&mut self, chain: ChainId, committed: SequenceNumber) -> io::Result<()> {
        if self.mark == Some((chain, committed)) {
            return Ok(());
        }
        self.state.write(CLEARED, &Cleared { chain: chain.to_string(), committed: committed.to_string() })?;
        self.mark = Some((chain, committed));
        Ok(())
    }
}

/// The kernel's id of this boot.
///
/// # Errors
/// The kernel does not tell it.
pub fn boot_id() -> Result<[u8; 16], Problem> {
    let path = "/proc/sys/kernel/random/boot_id";
    let problem = |why: String| Problem::failed("the kernel does not tell the id of this boot", why, "mount /proc");
    let text = std::fs::read_to_string(path).map_err(|error| problem(format!("{path}: {error}")))?;
    let digits: String = text.trim().chars().filter(|digit| *digit != '-').collect();
    let id: replication::MachineId = digits.parse().map_err(|_| problem(format!("{path} holds `{}`", text.trim())))?;
    Ok(id.0)
}

/// The host's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_or_are_told_to_be_damaged() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let state = StateDir::open(folder.path()).expect("opens");
        let (chain, committed) = (ChainId([7; 16]), SequenceNumber(5 << 44 | 9));
        assert_eq!(state.cleared_mark().load(), None);
        state.cleared_mark().store(chain, committed).expect("stored");
        assert_eq!(state.cleared_mark().load(), Some((chain, committed)));

        let path = folder.path().join(CLEARED);
        let text = std::fs::read(&path).expect("readable");
        for at in 0..text.len() {
            let mut damaged = text.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).expect("writable");
            let mark = state.cleared_mark();
            assert!(mark.is_damaged() && mark.load().is_none(), "byte {at}");
            std::fs::write(&path, &text[..at]).expect("writable");
            assert!(state.cleared_mark().is_damaged(), "cut at {at}");
        }
    }

    #[test]
    fn one_agent_at_a_time() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let state = StateDir::open(&folder.path().join("deep/er")).expect("created");
        let first = state.lock().expect("free");
        assert!(state.lock().expect_err("taken").why.contains("another agent"));
        drop(first);
        state.lock().expect("free again");
        assert!(state.joined_identity().expect_err("not joined").advice.contains("join"));
        assert_ne!(boot_id().expect("linux"), [0; 16]);
        assert_eq!(boot_id().expect("linux"), boot_id().expect("linux"));
    }
}
