//! What the vault announces while the kills go on, and whether all of it is there and true afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use recovery::view_of;
use replication::{Cut, CutKind, DiskId, PointTime, SequenceNumber};
use vault::chain::Alarm;
use vault::points::{Points, Which};
use vault::view::ChainView;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{Catalog, ChainHistory, Moment, UnlockedVault};

use super::ledger::{DISK_BYTES, DISKS, Ledger, Place};
use super::site::Site;

/// Between two looks at the vault.
const LOOK_EVERY: Duration = Duration::from_millis(60);
/// The clock is read a moment before a write is numbered, and a cut's a moment after.
const TOLERANCE_NS: u64 = 50_000_000;
/// Points of which every byte is compared; of all others, every block that was ever written.
const WHOLE: usize = 6;
const PIECE_BYTES: usize = 4 << 20;
const CURRENT_LIMIT: Duration = Duration::from_secs(30);

fn history(vault: &UnlockedVault) -> Option<ChainHistory> {
    let (store, keys) = (vault.store(), vault.keys());
    let catalog = Catalog::load(store, keys).expect("the catalog can be read at any time");
    let chain = catalog.machines.values().next()?.chain;
    ChainHistory::find(store, keys, chain).expect("a chain can be read at any time")
}

/// Looks at the vault all the time, as a person who waits for a recovery would.
pub(crate) struct Observer {
    stop: Arc<AtomicBool>,
    announced: Arc<Mutex<BTreeMap<SequenceNumber, Cut>>>,
    thread: JoinHandle<()>,
}

impl Observer {
    pub(crate) fn start(vault: UnlockedVault) -> Observer {
        let stop = Arc::new(AtomicBool::new(false));
        let announced = Arc::new(Mutex::new(BTreeMap::new()));
        let thread = std::thread::spawn({
            let (stop, announced) = (Arc::clone(&stop), Arc::clone(&announced));
            move || {
                while !stop.load(Ordering::Acquire) {
                    if let Some(history) = history(&vault) {
                        let points = Points::new(vault.store(), vault.keys(), &history);
                        let cuts = points.between(PointTime(0), PointTime(u64::MAX), usize::MAX, Which::All);
                        let cuts = cuts.expect("points can be listed at any time");
                        let mut announced = announced.lock().unwrap_or_else(PoisonError::into_inner);
                        announced.extend(cuts.into_iter().map(|cut| (cut.sequence, cut)));
                    }
                    std::thread::sleep(LOOK_EVERY);
                }
            }
        });
        Observer { stop, announced, thread }
    }

    /// Every point that could be opened at some time.
    pub(crate) fn finish(self) -> Vec<Cut> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the vault could always be read");
        let announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        announced.values().cloned().collect()
    }
}

/// What was proven.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    pub(crate) points: usize,
    pub(crate) markers: usize,
    pub(crate) durable_markers: usize,
    pub(crate) whole_disks: usize,
    pub(crate) gaps: usize,
}

/// The machine's history, ready to be read.
struct Recovered<'a> {
    ledger: &'a Ledger,
    view: Arc<ChainView>,
}

impl Recovered<'_> {
    /// How many writes the point holds.
    fn prefix(&self, sequence: SequenceNumber) -> Result<u64, String> {
        self.ledger.prefix(|Place { disk, offset }, buffer| {
            let read = self.view.read(sequence, DiskId(disk as u16), offset, buffer);
            read.expect("every block of a point that lacks nothing can be read");
        })
    }

    fn compare_whole(&self, sequence: SequenceNumber, k: u64) {
        for disk in 0..DISKS {
            let expected = self.ledger.replay(disk, k);
            let mut buffer = vec![0; PIECE_BYTES];
            for (index, piece) in expected.chunks(PIECE_BYTES).enumerate() {
                let (offset, buffer) = (index * PIECE_BYTES, &mut buffer[..piece.len()]);
                self.view.read(sequence, DiskId(disk as u16), offset as u64, buffer).expect("it can be read");
                if let Some(at) = (0..piece.len()).find(|at| buffer[*at] != piece[*at]) {
                    panic!("@{sequence}, {k} writes: byte {} of disk {disk} differs from the source", offset + at);
                }
            }
        }
    }
}

fn open<'a>(vault: &UnlockedVault, ledger: &'a Ledger) -> (ChainHistory, Recovered<'a>) {
    let history = history(vault).expect("there is a machine");
    let source = FrameSource::new(Arc::clone(vault.store()), Arc::clone(vault.keys()), CacheBytes::default());
    let view = view_of(&Arc::new(source), &history).expect("the history can be opened");
    (history, Recovered { ledger, view })
}

/// Waits until the newest point holds every write of the ledger.
pub(crate) fn wait_current(site: &Site, vault: &UnlockedVault, ledger: &Ledger) {
    let began = Instant::now();
    loop {
        let (history, recovered) = open(vault, ledger);
        let latest = Points::new(vault.store(), vault.keys(), &history).resolve(&Moment::Latest);
        let held = latest.ok().map(|point| (point.cut.sequence, recovered.prefix(point.cut.sequence)));
        if let Some((_, Ok(k))) = held
            && k == ledger.len()
        {
            return;
        }
        assert!(
            began.elapsed() < CURRENT_LIMIT,
            "the newest point does not become current: {held:?} of {} writes; the agent: {:?}\n{}",
            ledger.len(),
            site.status(),
            site.logs()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Opens every point and compares it with the ledger.
pub(crate) fn prove(site: &Site, vault: &UnlockedVault, ledger: &Ledger, announced: &[Cut]) -> Proven {
    let (history, recovered) = open(vault, ledger);
    let complete = ChainHistory::load_all(vault.store(), vault.keys(), history.chain).expect("readable");
    let bad: Vec<&Alarm> = complete.alarms.iter().filter(|alarm| !matches!(alarm, Alarm::Rejected { .. })).collect();
    assert!(bad.is_empty(), "the vault raises alarms: {bad:?}");
    let points = Points::new(vault.store(), vault.keys(), &history);
    let cuts = points.between(PointTime(0), PointTime(u64::MAX), usize::MAX, Which::All).expect("readable");
    for cut in announced {
        let kept = cuts.iter().any(|kept| kept == cut);
        assert!(kept, "the point {cut:?} was announced and is gone; gaps: {:?}", points.gaps());
    }
    let listed: Vec<String> = site
        .with_key(&["vault", "points"], &["--limit", "100000"])
        .iter()
        .filter(|object| object["type"] == "point")
        .map(|object| object["sequence"].as_str().expect("text").to_owned())
        .collect();
    let expected: Vec<String> = cuts.iter().map(|cut| cut.sequence.to_string()).collect();
    assert_eq!(listed, expected, "`vault points` lists what the vault holds");

    let mut proven = Proven { gaps: points.gaps().len(), ..Proven::default() };
    let mut held = Vec::new();
    for cut in &cuts {
        let point = points.resolve(&Moment::Sequence(cut.sequence)).expect("a listed point can be chosen");
        let found = (point.cut.sequence, point.lacking.len());
        assert_eq!(found, (cut.sequence, 0), "no part of the machine was ever lost alone");
        let k = match recovered.prefix(cut.sequence) {
            Ok(k) => k,
            Err(what) => panic!("{cut:?} is no state the machine was ever in: {what}; gaps: {:?}", points.gaps()),
        };
        let (least, most) = ledger.allowed(cut.time.0, TOLERANCE_NS);
        assert!((least..=most).contains(&k), "{cut:?} holds {k} writes, its time allows {least} to {most}");
        assert!(held.last().is_none_or(|(_, before)| *before <= k), "{cut:?} holds less than the point before it");
        if let CutKind::Marker { name, .. } = &cut.kind {
            let mark = ledger.marks().into_iter().find(|mark| mark.name == *name).expect("marks are in the ledger");
            assert_eq!(k, mark.k, "the point {name:?} is that of its moment");
            proven.markers += 1;
        }
        held.push((cut.sequence, k));
    }
    proven.points = held.len();
    for mark in ledger.marks().iter().filter(|mark| mark.durable) {
        let kept = cuts.iter().any(|cut| matches!(&cut.kind, CutKind::Marker { name, .. } if *name == mark.name));
        assert!(kept, "{:?} was durable and is gone; gaps: {:?}", mark.name, points.gaps());
        proven.durable_markers += 1;
    }
    assert_eq!(held.last().map(|(_, k)| *k), Some(ledger.len()), "the newest point holds all");
    for index in 0..WHOLE {
        let (sequence, k) = held[index * (held.len() - 1) / (WHOLE - 1)];
        recovered.compare_whole(sequence, k);
        proven.whole_disks += DISKS;
    }
    let (sequence, k) = held[held.len() / 2];
    export(site, ledger, sequence, k);
    proven
}

/// The same with the program that a person would use.
fn export(site: &Site, ledger: &Ledger, sequence: SequenceNumber, k: u64) {
    for disk in 0..DISKS {
        let file = site.path(&format!("export{disk}.raw"));
        let (at, number, to) = (format!("@{sequence}"), disk.to_string(), file.display().to_string());
        site.with_key(&["branch", "export"], &["--at", &at, "--disk", &number, "--to", &to]);
        assert!(fs::read(&file).unwrap() == ledger.replay(disk, k), "the export of disk {disk} at {at} differs");
        assert_eq!(fs::metadata(&file).unwrap().len(), DISK_BYTES);
    }
}
