//! A scan against a slow truth: a disk that is written to between any two of its reads, a receiver that does what the
//! engine and a real one do, and a ledger of every state that the disk had and when.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use proptest::prelude::*;
use replication::DiskIdentity;
use world::{Extent, WallTime};

use super::*;

const GRANULES: usize = 6;
const MS: u64 = 1_000_000;

/// A disk, and everything that ever was on it.
struct Truth {
    now: u64,
    content: Vec<u8>,
    writes: i64,
    under_way: u64,
    /// The disk had this content from then on.
    ledger: Vec<(u64, Vec<u8>)>,
    /// Writes that happen as soon as so many more reads were made: granule and byte.
    ahead: Vec<(u32, usize, u8)>,
}

#[derive(Clone)]
struct Model(Arc<Mutex<Truth>>);

impl Model {
    fn new() -> Model {
        let content = vec![1; GRANULES * GRANULE_BYTES as usize];
        let ledger = vec![(0, content.clone())];
        Model(Arc::new(Mutex::new(Truth { now: 1, content, writes: 0, under_way: 0, ledger, ahead: Vec::new() })))
    }

    fn truth(&self) -> MutexGuard<'_, Truth> {
        self.0.lock().expect("no test panics with it")
    }
}

impl Truth {
    fn write(&mut self, granule: usize, byte: u8) {
        let start = granule * GRANULE_BYTES as usize;
        self.content[start..start + 4096].fill(byte);
        self.writes += 1;
        self.ledger.push((self.now, self.content.clone()));
    }

    /// Whether the disk had `content` at `time`.
    fn had(&self, content: &[u8], time: u64) -> bool {
        let (after, until) = (self.ledger.iter().rposition(|(since, _)| *since < time), time);
        // Writes of the same instant: any of the states at it.
        let first = after.unwrap_or(0);
        self.ledger[first..].iter().take_while(|(since, _)| *since <= until).any(|(_, state)| state == content)
    }
}

impl BlockDevice for Model {
    fn size(&self) -> u64 {
        GRANULES as u64 * GRANULE_BYTES
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let mut truth = self.truth();
        let mut due = Vec::new();
        truth.ahead.retain_mut(|(reads, granule, byte)| {
            *reads = reads.saturating_sub(1);
            if *reads == 0 {
                due.push((*granule, *byte));
            }
            *reads > 0
        });
        for (granule, byte) in due {
            truth.now += 3 * MS;
            truth.write(granule, byte);
        }
        truth.now += MS;
        buffer.copy_from_slice(&truth.content[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn write_zeroes(&self, _range: Range<u64>) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn discard(&self, _range: Range<u64>) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, BlockError> {
        Ok(vec![Extent { range, kind: world::ExtentKind::Data }])
    }
}

impl Witness for Model {
    fn trace(&self) -> io::Result<Trace> {
        let truth = self.truth();
        Ok(Trace::new(vec![truth.writes], truth.under_way))
    }

    fn is_proof(&self) -> bool {
        true
    }
}

/// Says always the same, as the times of an image file might.
struct Blind;

impl Witness for Blind {
    fn trace(&self) -> io::Result<Trace> {
        Ok(Trace::new(Vec::new(), 0))
    }

    fn is_proof(&self) -> bool {
        false
    }
}

impl Clock for Model {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.truth().now)
    }

    fn wall(&self) -> WallTime {
        WallTime(self.truth().now)
    }
}

/// The engine and the receiver, as far as a scan can tell.
struct Receiver {
    capture: ScanCapture,
    /// What the newest layer of each granule is: heal data lies below every later change.
    content: Vec<u8>,
    phase: Phase,
    gaps: u64,
    /// Points: time, content.
    points: Vec<(u64, Vec<u8>)>,
    last_marker: Option<u64>,
}

impl Receiver {
    fn new(model: &Model, witness: Box<dyn Witness>, ring_bytes_max: u64) -> Receiver {
        let geometry = DiskGeometry {
            disk: DiskId(3),
            identity: DiskIdentity { serial: "s".to_owned(), fingerprint: [0; 16] },
            path: "/disk".to_owned(),
            size_bytes: model.size(),
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        };
        let disk = ScanDisk { geometry, device: Arc::new(model.clone()), witness };
        let config = ScanConfig {
            machine: MachineId([1; 16]),
            ring_bytes_max,
            quiet: Duration::from_millis(100),
            every: Duration::from_millis(700),
            limits: HealLimits::default(),
        };
        let capture = ScanCapture::new(vec![disk], Arc::new(model.clone()), config).expect("memory");
        let phase = Phase { whole: false, healing: true, ending: false };
        let content = vec![0; model.size() as usize];
        Receiver { content, capture, phase, gaps: 0, points: Vec::new(), last_marker: None }
    }

    /// A heal from its rotation to its last read. Its content lies below what is handed out from here on, and nothing is.
    fn heal(&mut self) {
        let epoch = self.capture.rotate(Mode::Stream).or_else(|| {
            self.capture.fold(self.capture.status().epoch);
            self.capture.rotate(Mode::Stream)
        });
        self.capture.fold(epoch.expect("a slot is free after a fold"));
        for range in self.capture.heal_set(DiskId(3)) {
            for chunk in range.split_at_multiples(2 * GRANULE_BYTES) {
                let mut buffer = vec![0; chunk.len as usize];
                self.capture.read(DiskId(3), chunk.start, &mut buffer).expect("readable");
                self.content[chunk.within(0)].copy_from_slice(&buffer);
            }
        }
        self.phase = Phase { whole: false, healing: true, ending: true };
        self.capture.follow(self.phase);
    }

    /// One step of the engine. `lost`: the link is lost before a heal can end.
    fn step(&mut self, lost: bool) {
        while let Some(record) = self.capture.next() {
            for kind in record.kinds {
                match kind {
                    ChangeKind::Write { range, data } => {
                        assert!(!self.phase.whole, "a change outside of a gap would be cut");
                        self.content[range.within(0)].copy_from_slice(&data);
                        self.last_marker = None;
                    }
                    ChangeKind::Zero { range } => {
                        self.content[range.within(0)].fill(0);
                        self.last_marker = None;
                    }
                    ChangeKind::Marker { .. } => self.last_marker = Some(record.time.0),
                    other => panic!("{other:?}"),
                }
            }
            self.capture.release(record.end);
        }
        let status = self.capture.status();
        if status.gap_count != self.gaps {
            self.gaps = status.gap_count;
            assert!(self.phase.whole, "one gap at a time");
            self.phase = Phase { whole: false, healing: true, ending: false };
            self.capture.follow(self.phase);
            self.heal();
            return;
        }
        if lost && !self.phase.whole {
            self.phase = Phase { whole: false, healing: true, ending: false };
            self.capture.follow(self.phase);
            self.heal();
            return;
        }
        if self.phase.ending
            && let Some(end) = self.capture.heal_end()
        {
            assert_eq!(end, self.capture.status().producer);
            let time = self.last_marker.expect("a heal ends with a marker");
            self.points.push((time, self.content.clone()));
            self.phase = Phase { whole: true, healing: true, ending: false };
        } else if self.phase.whole && self.phase.healing {
            self.capture.clear_heal_set();
            self.phase.healing = false;
        }
        self.capture.follow(self.phase);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u8),
    /// Written when so many reads were made from now on.
    Later(u32, usize, u8),
    /// Begins a write that takes until the next step of this kind.
    UnderWay(bool),
    Wait(u64),
    Engine(u8),
    LinkLost,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..GRANULES, 1u8..4).prop_map(|(granule, byte)| Step::Write(granule, byte)),
        3 => (1u32..20, 0..GRANULES, 1u8..4).prop_map(|(reads, granule, byte)| Step::Later(reads, granule, byte)),
        1 => any::<bool>().prop_map(Step::UnderWay),
        3 => (1u64..400).prop_map(Step::Wait),
        8 => (1u8..30).prop_map(Step::Engine),
        1 => Just(Step::LinkLost),
    ];
    prop::collection::vec(step, 1..120)
}

fn run(model: &Model, receiver: &mut Receiver, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Write(granule, byte) => model.truth().write(granule, byte),
            Step::Later(reads, granule, byte) => model.truth().ahead.push((reads, granule, byte)),
            Step::UnderWay(begins) => model.truth().under_way = u64::from(begins),
            Step::Wait(millis) => model.truth().now += millis * MS,
            Step::Engine(times) => {
                for _ in 0..times {
                    model.truth().now += 10 * MS;
                    receiver.step(false);
                }
            }
            Step::LinkLost => receiver.step(true),
        }
        model.truth().now += 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is written when, every point is a state that the disk had at the point's time; and once the disk rests there
    /// is one, and it is what the disk holds.
    #[test]
    fn every_point_is_a_state_the_disk_had_then(steps in steps(), small in any::<bool>()) {
        let model = Model::new();
        let ring = if small { 64 << 10 } else { 8 << 20 };
        let mut receiver = Receiver::new(&model, Box::new(model.clone()), ring);
        receiver.heal();
        run(&model, &mut receiver, &steps);
        model.truth().under_way = 0;
        model.truth().ahead.clear();
        run(&model, &mut receiver, &[Step::Wait(1000), Step::Engine(250)]);
        let truth = model.truth();
        for (time, content) in &receiver.points {
            prop_assert!(truth.had(content, *time), "the point at {time} is no state of that moment");
        }
        prop_assert_eq!(&receiver.points.last().expect("the disk rests").1, &truth.content);
    }

    /// Where the witness proves nothing, two passes have to agree.
    #[test]
    fn without_a_proof_the_content_has_to_be_read_twice(at in 1u32..14, then in 1u32..5) {
        let model = Model::new();
        let mut receiver = Receiver::new(&model, Box::new(Blind), 8 << 20);
        receiver.heal();
        model.truth().ahead.extend([(at, 0, 2), (at + then, GRANULES - 1, 3)]);
        for _ in 0..200 {
            model.truth().now += 10 * MS;
            receiver.step(false);
        }
        let truth = model.truth();
        let (_, content) = receiver.points.first().expect("a point");
        prop_assert!(truth.ledger.iter().any(|(_, state)| state == content), "a state that never was");
    }
}

#[test]
fn a_disk_that_never_rests_has_no_point_and_its_copy_stays_near() {
    let model = Model::new();
    let mut receiver = Receiver::new(&model, Box::new(model.clone()), 8 << 20);
    receiver.heal();
    let mut near = BTreeMap::new();
    for round in 0..600u64 {
        model.truth().now += 30 * MS;
        model.truth().write((round % 6) as usize, (round / 100) as u8 + 1);
        receiver.step(false);
        let differs = receiver.content.iter().zip(&model.truth().content).filter(|(a, b)| a != b).count();
        *near.entry(differs / 4096).or_insert(0) += 1;
    }
    assert!(receiver.points.is_empty());
    let status = receiver.capture.counters().status();
    assert!(status.passes > 5 && status.passes == status.disturbed, "{status:?}");
    assert!(near.contains_key(&0), "the copy caught up now and then: {near:?}");
}

#[test]
fn a_marker_is_taken_only_of_a_disk_that_rests() {
    let model = Model::new();
    let mut receiver = Receiver::new(&model, Box::new(model.clone()), 8 << 20);
    assert!(!receiver.capture.mark(MarkerKind::Crash, "early"), "nothing is known yet");
    receiver.heal();
    run(&model, &mut receiver, &[Step::Wait(500), Step::Engine(60)]);
    assert!(receiver.phase.whole && !receiver.phase.healing);
    assert!(receiver.capture.mark(MarkerKind::Crash, "at rest"));
    receiver.step(false);
    model.truth().write(1, 9);
    assert!(!receiver.capture.mark(MarkerKind::Crash, "late"), "it was written to since");
    assert_eq!(receiver.capture.known_until(receiver.capture.clock.monotonic()), None);
    // A hurried pass ends the gap with the marker that was asked for.
    receiver.step(false);
    receiver.capture.counters().hurry();
    for _ in 0..20 {
        model.truth().now += 10 * MS;
        if receiver.capture.takes_markers() == Some(true) && !receiver.phase.whole {
            assert!(receiver.capture.mark(MarkerKind::Application, "frozen"));
            assert!(receiver.capture.ends_gap_with_marker());
        }
        receiver.step(false);
    }
    assert_eq!(receiver.points.len(), 2, "no other point ends this gap");
    assert_eq!(receiver.points[1].1, model.truth().content);
}
