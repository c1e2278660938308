//! Files that keep exactly what POSIX promises, and lose the rest when the power fails.
//!
//! * Appended bytes are durable after [`AppendFile::sync`]. At a power cut each sector that was not synced is
//!   independently kept, lost or (with [`PowerCut::Torn`]) cut in the middle; the file's length is anything in between.
//! * A failed sync leaves the bytes that it was to save *lost*: a later sync succeeds without saving them, as kernels do.
//! * Names (created, linked, renamed, removed) are durable after [`Files::sync_directory`]. At a power cut any prefix
//!   or any subset of the changes since then has happened; a rename happens as a whole.
//! * [`SimFiles::cut_power_after`] lets the power fail inside a chosen operation; everything then fails until
//!   [`SimFiles::power_on`].

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use world::{AppendFile, Files};

use crate::rng::Rng;

/// The smallest unit that a disk writes as a whole, in bytes.
const SECTOR_BYTES: usize = 512;

/// Faults that happen on their own.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileFaults {
    /// Syncs (of files and directories) that fail, in a thousand.
    pub sync_errors_per_thousand: u64,
    /// Appends that fail after writing a part, in a thousand.
    pub append_errors_per_thousand: u64,
    /// Bytes of all files together beyond which the disk is full.
    pub capacity_bytes: Option<u64>,
}

/// What a power cut leaves of bytes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerCut {
    /// Nothing: the harshest legal outcome.
    LoseAll,
    /// Everything: the kernel happened to have written it all.
    KeepAll,
    /// A random prefix of each file, and of each directory's changes.
    Prefix,
    /// Any sectors, any bytes of one sector, and any of a directory's changes.
    Torn,
}

/// A file system in memory. Clones are the same file system.
#[derive(Clone)]
pub struct SimFiles {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stability {
    /// The next successful sync saves it.
    Unsynced,
    /// A sync failed; nothing will save it.
    Lost,
}

#[derive(Debug, Clone, Default)]
struct Node {
    contents: Vec<u8>,
    /// Ranges of `contents` that are not durable, ascending.
    unstable: Vec<(usize, usize, Stability)>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Set { path: String, node: u64 },
    Unset { path: String },
    Move { from: String, to: String, node: u64 },
}

impl NameChange {
    fn directory(&self) -> &str {
        match self {
            NameChange::Set { path, .. } | NameChange::Unset { path } => directory_of(path),
            NameChange::Move { to, .. } => directory_of(to),
        }
    }

    fn apply(&self, names: &mut BTreeMap<String, u64>) {
        match self {
            NameChange::Set { path, node } => drop(names.insert(path.clone(), *node)),
            NameChange::Unset { path } => drop(names.remove(path)),
            NameChange::Move { from, to, node } => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
        }
    }
}

struct State {
    random: Rng,
    nodes: BTreeMap<u64, Node>,
    next_node: u64,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    /// Changes of names since the last sync of their directory, in order.
    changes: Vec<NameChange>,
    /// Directories; the root is not among them. Durable when created, as [`Files::create_directory`] promises.
    directories: Vec<String>,
    faults: FileFaults,
    /// Files opened before a power cut are of no use after it.
    boot: u64,
    powered: bool,
    /// Operations until the power fails.
    fuse: Option<u64>,
    operations: u64,
    syncs_to_fail: u64,
}

fn directory_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

fn name_of(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

fn no_power() -> io::Error {
    io::Error::other("the machine has no power")
}

fn injected(what: &str) -> io::Error {
    io::Error::other(format!("injected: {what}"))
}

fn not_found(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{path} does not exist"))
}

impl SimFiles {
    /// An empty file system whose accidents follow from `seed`.
    pub fn new(seed: u64) -> SimFiles {
        let state = State {
            random: Rng::new(seed),
            nodes: BTreeMap::new(),
            next_node: 0,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            changes: Vec::new(),
            directories: Vec::new(),
            faults: FileFaults::default(),
            boot: 0,
            powered: true,
            fuse: None,
            operations: 0,
            syncs_to_fail: 0,
        };
        SimFiles { state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what goes wrong on its own from now on.
    pub fn set_faults(&self, faults: FileFaults) {
        self.lock().faults = faults;
    }

    /// Lets the next `count` syncs of files or directories fail.
    pub fn fail_next_syncs(&self, count: u64) {
        self.lock().syncs_to_fail = count;
    }

    /// Lets the power fail during the `operations`-th operation from now that writes, counting from 0.
    pub fn cut_power_after(&self, operations: u64) {
        self.lock().fuse = Some(operations);
    }

    /// Whether the machine runs.
    pub fn is_powered(&self) -> bool {
        self.lock().powered
    }

    /// Operations so far that wrote something.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Cuts the power, if it is not off already, and starts the machine again: what was not durable survives as `cut`
    /// says.
    pub fn power_cycle(&self, cut: PowerCut) {
        self.lock().power_cycle(cut);
    }

    /// As [`SimFiles::power_cycle`], with an outcome chosen by the seed.
    pub fn power_on(&self) {
        let mut state = self.lock();
        let cut = match state.random.below(8) {
            0 => PowerCut::LoseAll,
            1 => PowerCut::KeepAll,
            2 | 3 => PowerCut::Prefix,
            _ => PowerCut::Torn,
        };
        state.power_cycle(cut);
    }

    /// Lets the process die and start again, with the machine up: everything written stays, files must be reopened.
    pub fn restart_process(&self) {
        self.lock().boot += 1;
    }

    /// Bytes of all files in `directory`.
    pub fn bytes_in(&self, directory: &str) -> u64 {
        let state = self.lock();
        let named = state.names.iter().filter(|(path, _)| directory_of(path) == directory);
        named.map(|(_, node)| state.nodes[node].contents.len() as u64).sum()
    }

    /// Overwrites part of a file behind everybody's back, durably, as a failing medium does.
    pub fn corrupt(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.lock();
        let node = *state.names.get(path).expect("a test corrupts files that exist");
        let node = state.nodes.get_mut(&node).expect("names point to nodes");
        change(&mut node.contents);
        let len = node.contents.len();
        node.unstable.retain_mut(|range| {
            range.1 = range.1.min(len);
            range.0 < range.1
        });
    }

    /// A copy as it is now, with accidents of its own.
    pub fn fork(&self, seed: u64) -> SimFiles {
        let state = self.lock();
        let copy = State {
            random: Rng::new(seed),
            nodes: state.nodes.clone(),
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            changes: state.changes.clone(),
            directories: state.directories.clone(),
            ..*state
        };
        SimFiles { state: Arc::new(Mutex::new(copy)) }
    }
}

impl State {
    /// Counts an operation that writes. An error if the power is off, or fails just now.
    fn operate(&mut self) -> io::Result<()> {
        if !self.powered {
            return Err(no_power());
        }
        self.operations += 1;
        match &mut self.fuse {
            Some(0) => {
                self.fuse = None;
                self.powered = false;
                Err(no_power())
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The operation under way when the power fails may or may not have been done.
    fn change_name(&mut self, change: NameChange) -> io::Result<()> {
        self.live()?;
        let outcome = self.operate();
        if outcome.is_ok() || self.random.one_in(2) {
            change.apply(&mut self.names);
            self.changes.push(change);
        }
        outcome
    }

    fn live(&self) -> io::Result<()> {
        if self.powered { Ok(()) } else { Err(no_power()) }
    }

    fn node(&self, path: &str) -> io::Result<(u64, &Node)> {
        self.live()?;
        let id = *self.names.get(path).ok_or_else(|| not_found(path))?;
        Ok((id, self.nodes.get(&id).expect("names point to nodes")))
    }

    fn used_bytes(&self) -> u64 {
        self.names.values().map(|node| self.nodes[node].contents.len() as u64).sum()
    }

    fn append(&mut self, node: u64, bytes: &[u8]) -> io::Result<()> {
        self.live()?;
        let outcome = self.operate();
        let room = self.faults.capacity_bytes.map(|capacity| capacity.saturating_sub(self.used_bytes()));
        let (written, outcome) = match (outcome, room) {
            // The power failed in the middle of it.
            (Err(error), _) => (self.random.below(bytes.len() as u64 + 1), Err(error)),
            (Ok(()), Some(room)) if room < bytes.len() as u64 => {
                (room, Err(io::Error::new(io::ErrorKind::StorageFull, "the disk is full")))
            }
            (Ok(()), _) if self.random.below(1000) < self.faults.append_errors_per_thousand => {
                (self.random.below(bytes.len() as u64 + 1), Err(injected("append")))
            }
            (Ok(()), _) => (bytes.len() as u64, Ok(())),
        };
        if written > 0 {
            let node = self.nodes.get_mut(&node).expect("open files have nodes");
            let start = node.contents.len();
            node.contents.extend_from_slice(&bytes[..written as usize]);
            match node.unstable.last_mut() {
                Some((_, end, Stability::Unsynced)) if *end == start => *end = node.contents.len(),
                _ => node.unstable.push((start, node.contents.len(), Stability::Unsynced)),
            }
        }
        outcome
    }

    fn sync_fails(&mut self) -> bool {
        if self.syncs_to_fail > 0 {
            self.syncs_to_fail -= 1;
            return true;
        }
        self.random.below(1000) < self.faults.sync_errors_per_thousand
    }

    fn sync(&mut self, node: u64) -> io::Result<()> {
        self.operate()?;
        let fails = self.sync_fails();
        let node = self.nodes.get_mut(&node).expect("open files have nodes");
        if fails {
            node.unstable.iter_mut().for_each(|range| range.2 = Stability::Lost);
            return Err(injected("sync"));
        }
        node.unstable.retain(|range| range.2 == Stability::Lost);
        Ok(())
    }

    fn power_cycle(&mut self, cut: PowerCut) {
        let random = &mut self.random;
        // Names first: they decide which files there are.
        let changes = std::mem::take(&mut self.changes);
        let prefix = random.below(changes.len() as u64 + 1) as usize;
        for (index, change) in changes.iter().enumerate() {
            let happened = match cut {
                PowerCut::LoseAll => false,
                PowerCut::KeepAll => true,
                PowerCut::Prefix => index < prefix,
                PowerCut::Torn => random.one_in(2),
            };
            if happened {
                change.apply(&mut self.durable_names);
            }
        }
        self.names = self.durable_names.clone();
        let named = &self.names;
        self.nodes.retain(|node, _| named.values().any(|named| named == node));
        for node in self.nodes.values_mut() {
            node.lose_power(cut, random);
        }
        self.boot += 1;
        self.powered = true;
        self.fuse = None;
    }
}

impl Node {
    fn lose_power(&mut self, cut: PowerCut, random: &mut Rng) {
        let unstable = std::mem::take(&mut self.unstable);
        // Where the last durable byte ends.
        let mut floor = self.contents.len();
        for (start, end, _) in unstable.iter().rev() {
            if *end != floor {
                break;
            }
            floor = *start;
        }
        let len = match cut {
            PowerCut::LoseAll => floor,
            PowerCut::KeepAll => self.contents.len(),
            PowerCut::Prefix | PowerCut::Torn => {
                floor + random.below((self.contents.len() - floor) as u64 + 1) as usize
            }
        };
        for (start, end, stability) in unstable {
            let mut at = start;
            while at < end.min(len) {
                let sector_end = (at / SECTOR_BYTES + 1) * SECTOR_BYTES;
                let piece = at..sector_end.min(end).min(len);
                at = piece.end;
                let kept = match (cut, stability) {
                    (PowerCut::KeepAll | PowerCut::Prefix, Stability::Unsynced) => continue,
                    (PowerCut::LoseAll, _) => 0,
                    // What a failed sync dropped may have reached the disk all the same.
                    _ if random.one_in(2) => continue,
                    _ if random.one_in(4) => random.below(piece.len() as u64) as usize,
                    _ => 0,
                };
                let lost = piece.start + kept..piece.end;
                if random.one_in(4) {
                    // Blocks that were allocated but never written show what lay there before.
                    random.fill(&mut self.contents[lost]);
                } else {
                    self.contents[lost].fill(0);
                }
            }
        }
        self.contents.truncate(len);
    }
}

struct SimAppendFile {
    files: SimFiles,
    node: u64,
    boot: u64,
}

impl SimAppendFile {
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.files.lock();
        if state.boot == self.boot { Ok(state) } else { Err(io::Error::other("the file was opened in another life")) }
    }
}

impl AppendFile for SimAppendFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let node = self.node;
        self.state()?.append(node, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        let node = self.node;
        self.state()?.sync(node)
    }
}

impl Files for SimFiles {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let mut state = self.lock();
        state.live()?;
        let directory = directory_of(path);
        if !directory.is_empty() && !state.directories.iter().any(|known| known == directory) {
            return Err(not_found(directory));
        }
        if state.names.contains_key(path) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{path} exists")));
        }
        let node = state.next_node;
        state.next_node += 1;
        state.nodes.insert(node, Node::default());
        state.change_name(NameChange::Set { path: path.to_owned(), node })?;
        Ok(Box::new(SimAppendFile { files: self.clone(), node, boot: state.boot }))
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let state = self.lock();
        Ok(state.node(path)?.1.contents.clone())
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let state = self.lock();
        let (_, node) = state.node(path)?;
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(len).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(node.contents.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?.to_vec())
    }

    fn len(&self, path: &str) -> io::Result<u64> {
        Ok(self.lock().node(path)?.1.contents.len() as u64)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.lock();
        let (node, _) = state.node(from)?;
        if state.names.contains_key(to) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{to} exists")));
        }
        state.change_name(NameChange::Set { path: to.to_owned(), node })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.lock();
        let (node, _) = state.node(from)?;
        state.change_name(NameChange::Move { from: from.to_owned(), to: to.to_owned(), node })
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.node(path)?;
        state.change_name(NameChange::Unset { path: path.to_owned() })
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        let mut state = self.lock();
        let mut at = String::new();
        for component in path.split('/').filter(|component| !component.is_empty()) {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(component);
            if !state.directories.contains(&at) {
                state.operate()?;
                let directory = at.clone();
                state.directories.push(directory);
            }
        }
        state.live()
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.operate()?;
        // The changes stay pending after a failure: a journaling file system has aborted, or will write them.
        if state.sync_fails() {
            return Err(injected("directory sync"));
        }
        let state = &mut *state;
        let durable = &mut state.durable_names;
        state.changes.retain(|change| {
            let here = change.directory() == path;
            if here {
                change.apply(durable);
            }
            !here
        });
        Ok(())
    }

    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        let state = self.lock();
        state.live()?;
        let here = state.names.keys().filter(|name| directory_of(name) == path);
        let mut names: Vec<String> = here.map(|name| name_of(name).to_owned()).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn list_directories(&self, path: &str) -> io::Result<Vec<String>> {
        let state = self.lock();
        state.live()?;
        let here = state.directories.iter().filter(|name| directory_of(name) == path);
        let mut names: Vec<String> = here.map(|name| name_of(name).to_owned()).collect();
        names.sort_unstable();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use world::durable;

    #[test]
    fn synced_bytes_survive_and_others_need_not() {
        for seed in 0..200 {
            let files = SimFiles::new(seed);
            let mut file = files.create_new("a").expect("create");
            files.sync_directory("").expect("sync names");
            file.append(&[1; 3000]).expect("append");
            file.sync().expect("sync");
            file.append(&[2; 3000]).expect("append");
            files.power_on();
            let found = files.read("a").expect("the name was synced");
            assert_eq!(found[..3000], [1; 3000], "seed {seed}");
            assert!(found.len() <= 6000);
            assert!(file.append(b"x").is_err(), "a handle does not survive a power cut");
        }
        let files = SimFiles::new(0);
        let mut file = files.create_new("a").expect("create");
        file.append(b"x").expect("append");
        files.power_cycle(PowerCut::LoseAll);
        assert_eq!(files.list_files("").expect("list"), [""; 0]);
    }

    #[test]
    fn a_failed_sync_is_not_made_good_by_the_next() {
        let files = SimFiles::new(1);
        let mut file = files.create_new("a").expect("create");
        files.sync_directory("").expect("sync names");
        file.append(&[1; 600]).expect("append");
        files.fail_next_syncs(1);
        assert!(file.sync().is_err());
        file.append(&[2; 600]).expect("append");
        file.sync().expect("the lie");
        files.power_cycle(PowerCut::LoseAll);
        let found = files.read("a").expect("read");
        assert_eq!(found.len(), 1200);
        assert_ne!(found[..600], [1; 600]);
        assert_eq!(found[600..], [2; 600]);
    }

    /// `durable` keeps its word at every point at which the power can fail.
    #[test]
    fn publish_and_replace_are_atomic_at_every_operation() {
        for (fuse, seed) in (0..20).flat_map(|fuse| (0..20).map(move |seed| (fuse, seed))) {
            let files = SimFiles::new(seed);
            files.create_directory("d").expect("create");
            durable::publish(&files, "d/old", &[b"before"], "1").expect("publish");
            files.cut_power_after(fuse);
            let published = durable::publish(&files, "d/new", &[b"contents"], "2").is_ok();
            let replaced = durable::replace(&files, "d/old", b"after", "3").is_ok();
            files.power_on();
            match files.read("d/new") {
                Ok(found) => assert_eq!(found, b"contents", "fuse {fuse}, seed {seed}"),
                Err(_) => assert!(!published, "fuse {fuse}, seed {seed}"),
            }
            let old = files.read("d/old").expect("a replaced file never vanishes");
            assert!(old == b"after" || old == b"before" && !replaced, "fuse {fuse}, seed {seed}");
            durable::sweep(&files, "d").expect("sweep");
            assert!(files.list_files("d").expect("list").iter().all(|name| name == "new" || name == "old"));
        }
    }
}
