//! The way home: a diverged disk becomes the branch while the branch is written to, through kills and refusals.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod history;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use history::{CHAIN, DISK, MACHINE, World, noise};
use recovery::control::{Command, HomeAddress};
use recovery::{
    Branch, BranchError, BranchRunner, ControlClient, ControlServer, Failback, FailbackConfig, FailbackStatus,
    HomeConnector, HomeLine, HomeOrder, HostView, LocalHome, MasterTarget, Phase, ProofScope, Refusal, Succession,
};
use replication::{ChainId, DiskId};
use vault::{Catalog, ChainHistory, Moment};
use world::{BlockDevice, RealFiles, SystemClock, SystemEntropy};

const SIZE: u64 = 8 << 20;

fn target(folder: &Path) -> Arc<MasterTarget> {
    std::fs::create_dir_all(folder).unwrap();
    let files = Arc::new(RealFiles::new(folder));
    Arc::new(MasterTarget::new(files, Arc::new(SystemClock), Arc::new(SystemEntropy), HostView::default()))
}

fn order(disk: DiskId, path: &Path, size: u64) -> HomeOrder {
    HomeOrder { disk: disk.0, path: path.to_owned(), size_bytes: size, serial: None, any_disk: false, in_use: false }
}

fn config() -> FailbackConfig {
    FailbackConfig {
        reconnect_pause: Duration::from_millis(10),
        chunk_bytes: 256 << 10,
        succession: Succession::CloseHistory,
        ..FailbackConfig::default()
    }
}

/// Waits until `is` holds of the failback; panics with its state after a while.
fn wait(failback: &Failback, what: &str, is: impl Fn(&FailbackStatus) -> bool) -> FailbackStatus {
    let begun = Instant::now();
    loop {
        let status = failback.status();
        if is(&status) {
            return status;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not come: {status:?}");
        assert_ne!(status.phase, Phase::Failed, "{what}: {status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn contents(branch: &Branch, disk: DiskId) -> Vec<u8> {
    let device = branch.disk(disk).unwrap();
    let mut bytes = vec![0; device.size() as usize];
    device.read_at(0, &mut bytes).unwrap();
    bytes
}

/// A world on the real clock: threads run by themselves.
fn world() -> World {
    World { clock: Arc::new(SystemClock), ..World::new() }
}

fn open_branch(world: &World) -> Arc<Branch> {
    let mut history = world.protect(&[SIZE, 1 << 20]);
    history.write(DISK, 0, noise(1, 1 << 20));
    history.write(DISK, 3 << 20, noise(2, 1 << 20));
    history.write(DiskId(1), 512, noise(3, 100_000));
    history.second();
    Arc::new(world.host().open(CHAIN, &Moment::Latest, "failover").unwrap())
}

/// The home disks as the machine left them, some of them changed since.
fn diverged_home(world: &World, branch: &Branch) -> Vec<HomeOrder> {
    let mut first = contents(branch, DISK);
    first[5 << 20..(5 << 20) + 300_000].copy_from_slice(&noise(50, 300_000));
    first[100_000..100_512].fill(7);
    first.extend([1; 4096]);
    let paths = [world.folder.path().join("home0"), world.folder.path().join("home1")];
    std::fs::write(&paths[0], first).unwrap();
    std::fs::write(&paths[1], noise(51, 1 << 20)).unwrap();
    vec![order(DISK, &paths[0], SIZE), order(DiskId(1), &paths[1], 1 << 20)]
}

#[test]
fn a_diverged_disk_follows_a_live_branch_and_ends_equal() {
    let world = world();
    let branch = open_branch(&world);
    let _runner = BranchRunner::start(Arc::clone(&branch)).unwrap();
    let orders = diverged_home(&world, &branch);
    branch.disk(DISK).unwrap().write_at(2_000_001, &noise(9, 50_000)).unwrap();
    let notes = world.folder.path().join("mt");
    let home = LocalHome::new(target(&notes));
    let killer = home.killer();
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), Box::new(home), config()).unwrap();
    // Somebody uses the branch all the time, until it comes to rest.
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = [DISK, DiskId(1)]
        .into_iter()
        .map(|disk| {
            let (device, stop, written) = (branch.disk(disk).unwrap(), Arc::clone(&stop), Arc::clone(&written));
            std::thread::spawn(move || {
                for round in 0u64.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let start = round * 7_919_333 % (device.size() - 20_000);
                    match round % 9 {
                        0 => device.write_zeroes(start..start + 15_000).unwrap(),
                        1 => device.discard(start..start + 9_000).unwrap(),
                        2 => device.flush().unwrap(),
                        _ => device.write_at(start, &noise(round, 1 + (round % 19_000) as usize)).unwrap(),
                    }
                    written.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(300));
                }
            })
        })
        .collect();
    // The master target is killed in the middle of the comparison, and once more while home follows.
    wait(&failback, "comparison", |status| status.compared_bytes > 1 << 20);
    assert!(target(&notes).unfinished().unwrap()[0].meaning.contains("not usable"));
    assert!(killer.kill());
    wait(&failback, "a second link", |status| status.connections >= 2);
    wait(&failback, "following", |status| status.phase == Phase::Following);
    assert!(killer.kill());
    wait(&failback, "a third link", |status| status.connections >= 3);
    wait(&failback, "following again", |status| status.phase == Phase::Following);
    let before = written.load(Ordering::SeqCst);
    let begun = Instant::now();
    while written.load(Ordering::SeqCst) < before + 200 {
        assert!(begun.elapsed() < Duration::from_secs(30), "the branch is in use all the time");
        std::thread::sleep(Duration::from_millis(1));
    }
    stop.store(true, Ordering::SeqCst);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let expected = [contents(&branch, DISK), contents(&branch, DiskId(1))];
    failback.cut_over();
    let done = wait(&failback, "the end", |status| status.phase == Phase::Done);
    assert_eq!(done.proved_bytes, SIZE + (1 << 20));
    assert!(done.proof_read_bytes < SIZE, "what was not written since the comparison is not read again: {done:?}");
    let homes: Vec<Vec<u8>> = orders.iter().map(|order| std::fs::read(&order.path).unwrap()).collect();
    assert!(homes[0][..SIZE as usize] == expected[0], "home equals the branch");
    assert!(homes[0][SIZE as usize..] == [1; 4096], "what lies beyond the branch's disk is left alone");
    assert!(homes[1] == expected[1]);
    assert!(target(&notes).unfinished().unwrap().is_empty());
    // The machine's history goes on along the branch's chain, whose newest point is what came home.
    let catalog = Catalog::load(world.store(), world.vault.keys()).unwrap();
    assert_eq!(catalog.machines[&MACHINE].chain, branch.id());
    assert!(branch.disk(DISK).unwrap().write_at(0, &[1]).is_err(), "the branch has ended");
    let chain = branch.id();
    let nested = world.host().open(chain, &Moment::LatestApplication, "after").unwrap();
    assert!(contents(&nested, DISK) == expected[0]);
    let session = Arc::new(world.vault.owner_session(&world.entropy, &world.clock).unwrap());
    let loaded = ChainHistory::load(world.store(), world.vault.keys(), chain).unwrap();
    let next = vault::ChainWriter::open_generation(
        world.store(),
        &session,
        world.vault.keys(),
        &loaded,
        "the machine is protected again",
        vault::Delta::default(),
    );
    assert_eq!(next.unwrap().generation().0, 3, "the hand over is a generation of its own");
}

#[test]
fn only_what_differs_travels() {
    let world = world();
    let branch = open_branch(&world);
    let orders = diverged_home(&world, &branch);
    // The second disk is equal here, the first differs in 300 000 bytes and one sector.
    std::fs::write(&orders[1].path, contents(&branch, DiskId(1))).unwrap();
    branch.disk(DISK).unwrap().write_at(6 << 20, &noise(70, 100_000)).unwrap();
    branch.core().seal_all(recovery::SealWish::Now).unwrap();
    let home = LocalHome::new(target(&world.folder.path().join("mt")));
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), Box::new(home), config()).unwrap();
    wait(&failback, "following", |status| status.phase == Phase::Following);
    failback.cut_over();
    let done = wait(&failback, "the end", |status| status.phase == Phase::Done);
    // Of the 300 000 bytes the branch holds zeroes, which do not travel as data. Partly written leaves are unknown to
    // the index and sent unseen: the edges of the writes.
    assert!(done.sent_bytes >= 100_000 && done.sent_bytes <= 100_000 + 10 * 4096, "{done:?}");
    assert!(std::fs::read(&orders[0].path).unwrap()[..SIZE as usize] == contents(&branch, DISK));
    assert!(std::fs::read(&orders[1].path).unwrap() == contents(&branch, DiskId(1)));
}

#[test]
fn a_home_that_is_changed_behind_our_back_is_not_proved_by_reading_it_whole() {
    let world = world();
    let branch = open_branch(&world);
    let orders = diverged_home(&world, &branch);
    let home = LocalHome::new(target(&world.folder.path().join("mt")));
    let whole = FailbackConfig { proof: ProofScope::Whole, ..config() };
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), Box::new(home), whole).unwrap();
    wait(&failback, "following", |status| status.phase == Phase::Following);
    let file = std::fs::OpenOptions::new().write(true).open(&orders[0].path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55], 7_000_000).unwrap();
    failback.cut_over();
    let refused = wait(&failback, "the refusal", |status| status.problem.is_some());
    assert!(refused.problem.unwrap().what.contains("differs from the branch"));
    assert_ne!(failback.status().phase, Phase::Done);
    assert!(matches!(standing(&world), vault::chain::Phase::Open), "nothing is closed for a home that is not proved");
    // The branch goes on.
    branch.disk(DISK).unwrap().write_at(0, &[3; 100]).unwrap();
    assert_eq!(target(&world.folder.path().join("mt")).unfinished().unwrap().len(), 1);
    // The next cut over compares again first, and succeeds.
    failback.cut_over();
    let done = wait(&failback, "the end", |status| status.phase == Phase::Done);
    assert!(done.connections >= 2 && done.proof_read_bytes == SIZE + (1 << 20), "{done:?}");
    assert!(std::fs::read(&orders[0].path).unwrap()[..SIZE as usize] == contents(&branch, DISK));
}

#[test]
fn a_write_that_did_not_arrive_is_not_proved() {
    let world = world();
    let branch = open_branch(&world);
    let orders = diverged_home(&world, &branch);
    let home = LocalHome::new(target(&world.folder.path().join("mt")));
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), Box::new(home), config()).unwrap();
    wait(&failback, "following", |status| status.phase == Phase::Following);
    // Past the splitter, so that nobody tells home of it.
    branch.core().write(DISK, 7_000_000, &[0x55]).unwrap();
    failback.cut_over();
    let refused = wait(&failback, "the refusal", |status| status.problem.is_some());
    assert!(refused.problem.unwrap().what.contains("differs from the branch"));
    failback.cut_over();
    wait(&failback, "the end", |status| status.phase == Phase::Done);
    assert!(std::fs::read(&orders[0].path).unwrap()[..SIZE as usize] == contents(&branch, DISK));
}

fn standing(world: &World) -> vault::chain::Phase {
    ChainHistory::load(world.store(), world.vault.keys(), CHAIN).unwrap().standing.phase
}

/// Begins a failback that is refused before anything is touched; the refusal.
fn refused(branch: &Arc<Branch>, orders: &[HomeOrder], notes: &Path, succession: Succession) -> Refusal {
    let home = LocalHome::new(target(notes));
    let config = FailbackConfig { succession, ..config() };
    let before: Vec<Vec<u8>> = orders.iter().map(|order| std::fs::read(&order.path).unwrap()).collect();
    let failback = Failback::start(Arc::clone(branch), orders.to_vec(), Box::new(home), config).unwrap();
    let begun = Instant::now();
    while !failback.is_over() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", failback.status());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = failback.status();
    assert!(status.phase == Phase::Failed && status.refused && status.connections == 0, "{status:?}");
    assert!(orders.iter().zip(&before).all(|(order, before)| std::fs::read(&order.path).unwrap() == *before));
    assert!(target(notes).unfinished().unwrap().is_empty());
    status.problem.unwrap()
}

#[test]
fn a_branch_becomes_the_machines_history_after_a_failover_or_by_closing_it_only() {
    let world = world();
    let branch = open_branch(&world);
    let orders = diverged_home(&world, &branch);
    let notes = world.folder.path().join("mt");
    let refusal = refused(&branch, &orders, &notes, Succession::AfterFailover);
    assert!(refusal.what.contains("has not failed over"), "{refusal}");
    assert!(refusal.advice.contains("farshore failover") && refusal.advice.contains("--close-history"), "{refusal}");
    // Another branch took over: this one does not, whatever is said.
    let operator = Arc::new(world.vault.owner_session(&world.entropy, &world.clock).unwrap());
    let control = vault::ChainControl::new(world.store(), &operator, world.vault.keys());
    let other = ChainId([0x99; 16]);
    control.close(CHAIN, other, "the site is lost").unwrap();
    for wish in [Succession::AfterFailover, Succession::CloseHistory] {
        let refusal = refused(&branch, &orders, &notes, wish);
        assert!(refusal.what.contains(&other.to_string()), "{refusal}");
        assert!(refusal.advice.contains("farshore failover cancel"), "{refusal}");
    }
    control.commit(CHAIN).unwrap();
    let refusal = refused(&branch, &orders, &notes, Succession::AfterFailover);
    assert!(refusal.what.contains("for good") && refusal.advice.contains("--close-history"), "{refusal}");
    drop(branch);

    // Without the authority to close it is refused at the beginning, not at the end.
    let world = self::world();
    drop(open_branch(&world));
    let reader = world.vault.without_owner();
    let branch = world.host_with(reader, World::config()).open(CHAIN, &Moment::Latest, "away").unwrap();
    let branch = Arc::new(branch);
    let orders = diverged_home(&world, &branch);
    let notes = world.folder.path().join("mt");
    let refusal = refused(&branch, &orders, &notes, Succession::CloseHistory);
    assert!(refusal.why.contains("operator") && refusal.advice.contains("branch reopen"), "{refusal}");
    // The machine failed over to this very branch: nothing more is needed.
    let operator = Arc::new(world.vault.owner_session(&world.entropy, &world.clock).unwrap());
    vault::ChainControl::new(world.store(), &operator, world.vault.keys()).close(CHAIN, branch.id(), "lost").unwrap();
    let home = LocalHome::new(target(&notes));
    let config = FailbackConfig { succession: Succession::AfterFailover, ..config() };
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), Box::new(home), config).unwrap();
    wait(&failback, "following", |status| status.phase == Phase::Following);
    failback.cut_over();
    wait(&failback, "the end", |status| status.phase == Phase::Done);
    let catalog = Catalog::load(world.store(), world.vault.keys()).unwrap();
    assert_eq!(catalog.machines[&MACHINE].chain, branch.id());
}

struct Here(Arc<MasterTarget>);

impl HomeConnector for Here {
    fn line(&self, address: &HomeAddress) -> Result<Box<dyn HomeLine>, Refusal> {
        match address {
            HomeAddress::Here => Ok(Box::new(LocalHome::new(Arc::clone(&self.0)))),
            HomeAddress::At(address) => {
                Err(Refusal { what: format!("no way to {address}"), why: "a test".into(), advice: "none".into() })
            }
        }
    }
}

#[test]
fn another_process_fails_back_through_the_control_socket() {
    let world = world();
    let branch = open_branch(&world);
    let mut orders = diverged_home(&world, &branch);
    let target = target(&world.folder.path().join("mt"));
    let server = ControlServer::start(Arc::clone(&branch), Arc::new(Here(target)), config()).unwrap();
    let client = ControlClient::new(branch.directory());
    let status = client.ask(&Command::Status).unwrap();
    assert!(status.ok && status.failback.is_none() && status.branch == branch.id().to_string());
    assert!(!client.ask(&Command::CutOver).unwrap().ok);
    let order = |home: HomeAddress, disks: &[HomeOrder]| Command::Failback {
        home,
        disks: disks.to_vec(),
        proof: ProofScope::WrittenSince,
        succession: Succession::CloseHistory,
    };
    let away = order(HomeAddress::At("nowhere".into()), &orders);
    assert!(client.ask(&away).unwrap().problem.unwrap().what.contains("nowhere"));
    // Too small: refused, nothing written, and another attempt is possible.
    let small = world.folder.path().join("small");
    std::fs::write(&small, vec![9; 4096]).unwrap();
    let good = std::mem::replace(&mut orders[1].path, small.clone());
    assert!(client.ask(&order(HomeAddress::Here, &orders)).unwrap().ok);
    let begun = Instant::now();
    let refused = loop {
        let answer = client.ask(&Command::Status).unwrap();
        if let Some(status) = answer.failback.filter(|status| status.phase == Phase::Failed) {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(refused.problem.unwrap().what.contains("4096 bytes"));
    assert!(std::fs::read(&small).unwrap() == vec![9; 4096]);
    orders[1].path = good;
    let answer = client.ask(&order(HomeAddress::Here, &orders)).unwrap();
    assert!(answer.ok);
    let destination = answer.destination.expect("it runs");
    assert_eq!(
        (destination.home, destination.disks),
        (HomeAddress::Here, orders.clone()),
        "whoever comes later is told"
    );
    assert!(client.ask(&Command::CutOver).unwrap().ok);
    assert!(!client.ask(&Command::Discard).unwrap().ok, "not while it is being brought home");
    while !server.is_over() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", server.failback());
        std::thread::sleep(Duration::from_millis(2));
    }
    let id: ChainId = branch.id();
    drop(server);
    drop(branch);
    assert!(matches!(world.host().reopen(id), Err(BranchError::Ended { .. })));
}
