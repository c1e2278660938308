//! The way home over mutual TLS: who may order it, what the operator is told, and what travels.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod history;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use history::{CHAIN, DISK, World, noise};
use link::{Authority, Connector, LinkRuntime, Listener, Reception, Role};
use recovery::{
    Branch, BranchRunner, Failback, FailbackConfig, FailbackStatus, HomeOrder, HomeReception, HomeRules, HostView,
    MasterTarget, Phase, RemoteHome, Succession,
};
use replication::DiskId;
use vault::Moment;
use world::{BlockDevice, RealFiles, SystemClock, SystemEntropy};

/// A server's link side: its authority, its port, and the door to its master target.
struct Server {
    authority: Arc<Authority>,
    runtime: LinkRuntime,
    reception: Arc<HomeReception>,
    address: String,
    stop: Arc<AtomicBool>,
    accepting: Option<std::thread::JoinHandle<()>>,
}

fn authority(folder: &Path) -> Arc<Authority> {
    std::fs::create_dir_all(folder).unwrap();
    let files = Arc::new(RealFiles::new(folder));
    Arc::new(Authority::open(files, Arc::new(SystemClock), Arc::new(SystemEntropy), "authority").unwrap())
}

fn target(notes: &Path, rules: HomeRules) -> MasterTarget {
    std::fs::create_dir_all(notes).unwrap();
    MasterTarget::new(Arc::new(RealFiles::new(notes)), Arc::new(SystemClock), Arc::new(SystemEntropy), rules)
}

impl Server {
    fn start(folder: &Path, target: Option<MasterTarget>) -> Server {
        let authority = authority(folder);
        let runtime = LinkRuntime::new(2).unwrap();
        let identity = authority.own_identity(Role::ProcessServer).unwrap();
        let reception = Reception::new(identity, authority.trust(), None, Arc::new(SystemClock));
        let listener = Listener::bind(&runtime, "127.0.0.1:0", reception).unwrap();
        let address = listener.address().to_string();
        let (door, stop) = (Arc::new(HomeReception::new(target)), Arc::new(AtomicBool::new(false)));
        let (reception, stopping) = (Arc::clone(&door), Arc::clone(&stop));
        let accepting = std::thread::spawn(move || {
            while !stopping.load(Ordering::SeqCst) {
                if let Some((peer, connection)) = listener.accept(Duration::from_millis(20)).unwrap() {
                    let door = Arc::clone(&door);
                    std::thread::spawn(move || door.serve(peer, &connection));
                }
            }
        });
        Server { authority, runtime, reception, address, stop, accepting: Some(accepting) }
    }

    fn connector(&self, role: Role) -> Connector {
        let identity = self.authority.own_identity(role).unwrap();
        Connector::new(self.runtime.clone(), identity, self.authority.trust(), Arc::new(SystemClock))
    }

    fn line(&self) -> Box<RemoteHome> {
        Box::new(RemoteHome::new(self.connector(Role::RecoveryHost), &*self.address))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.reception.stop();
        drop(self.accepting.take().map(std::thread::JoinHandle::join));
    }
}

fn world() -> World {
    World { clock: Arc::new(SystemClock), ..World::new() }
}

fn config() -> FailbackConfig {
    FailbackConfig {
        reconnect_pause: Duration::from_millis(10),
        chunk_bytes: 256 << 10,
        succession: Succession::CloseHistory,
        ..FailbackConfig::default()
    }
}

fn order(disk: DiskId, path: &Path, size_bytes: u64) -> HomeOrder {
    HomeOrder { disk: disk.0, path: path.to_owned(), size_bytes, serial: None, any_disk: false, in_use: false }
}

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

fn come_home(failback: &Failback) -> FailbackStatus {
    wait(failback, "following", |status| status.phase == Phase::Following);
    failback.cut_over();
    wait(failback, "the end", |status| status.phase == Phase::Done)
}

fn contents(branch: &Branch, disk: DiskId) -> Vec<u8> {
    let device = branch.disk(disk).unwrap();
    let mut bytes = vec![0; device.size() as usize];
    device.read_at(0, &mut bytes).unwrap();
    bytes
}

const SIZE: u64 = 4 << 20;

/// A branch with two disks, and files that are not what it holds.
fn ground(world: &World) -> (Arc<Branch>, Vec<HomeOrder>) {
    let mut history = world.protect(&[SIZE, 1 << 20]);
    history.write(DISK, 0, noise(1, 1 << 20));
    history.write(DiskId(1), 512, noise(3, 100_000));
    history.second();
    let branch = Arc::new(world.host().open(CHAIN, &Moment::Latest, "failover").unwrap());
    let homes: Vec<PathBuf> = (0..2).map(|disk| world.folder.path().join(format!("homes/{disk}"))).collect();
    std::fs::create_dir(world.folder.path().join("homes")).unwrap();
    std::fs::write(&homes[0], noise(50, SIZE as usize)).unwrap();
    std::fs::write(&homes[1], noise(51, 1 << 20)).unwrap();
    let orders = vec![order(DISK, &homes[0], SIZE), order(DiskId(1), &homes[1], 1 << 20)];
    (branch, orders)
}

fn rules(world: &World) -> HomeRules {
    let allowed = Some(vec![world.folder.path().join("homes"), world.folder.path().join("vault")]);
    let own = vec![(world.folder.path().join("vault"), "the vault".to_owned())];
    HomeRules { allowed, own, host: HostView::default() }
}

#[test]
fn a_recovery_host_brings_a_machine_home_and_a_newer_link_takes_over() {
    let world = world();
    let (branch, orders) = ground(&world);
    let _runner = BranchRunner::start(Arc::clone(&branch)).unwrap();
    let notes = world.folder.path().join("mt");
    let server = Server::start(&world.folder.path().join("server"), Some(target(&notes, rules(&world))));
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), server.line(), config()).unwrap();
    wait(&failback, "following", |status| status.phase == Phase::Following);
    let unfinished = target(&notes, rules(&world)).unfinished().unwrap();
    assert_eq!(unfinished[0].disks, orders, "the server knows which disks are not usable");
    // The branch host is lost without a word, and comes again: its old session still holds the disks.
    drop(failback);
    let failback = Failback::start(Arc::clone(&branch), orders.clone(), server.line(), config()).unwrap();
    branch.disk(DISK).unwrap().write_at(2_000_001, &noise(9, 50_000)).unwrap();
    let done = come_home(&failback);
    for (order, disk) in orders.iter().zip([DISK, DiskId(1)]) {
        assert!(std::fs::read(&order.path).unwrap() == contents(&branch, disk), "{disk}");
    }
    assert!(target(&notes, rules(&world)).unfinished().unwrap().is_empty());
    assert!(done.wire_bytes > done.sent_bytes && !done.refused, "{done:?}");
}

/// What an operator is told when this failback fails.
#[track_caller]
fn told(branch: &Arc<Branch>, orders: &[HomeOrder], line: RemoteHome) -> FailbackStatus {
    let failback = Failback::start(Arc::clone(branch), orders.to_vec(), Box::new(line), config()).unwrap();
    let begun = Instant::now();
    while failback.status().phase != Phase::Failed {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", failback.status());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = failback.status();
    let problem = status.problem.as_ref().unwrap();
    assert!(!problem.what.is_empty() && !problem.why.is_empty() && !problem.advice.is_empty(), "{problem:?}");
    status
}

#[test]
fn whoever_may_not_is_refused_before_anything_is_touched_and_is_told_why() {
    let world = world();
    let (branch, orders) = ground(&world);
    let at = |name: &str| world.folder.path().join(name);
    let server = Server::start(&at("server"), Some(target(&at("mt"), rules(&world))));
    let before: Vec<Vec<u8>> = orders.iter().map(|order| std::fs::read(&order.path).unwrap()).collect();
    let what = |orders: &[HomeOrder], line: RemoteHome| {
        let status = told(&branch, orders, line);
        (status.problem.unwrap(), status.refused)
    };
    let line = |role| RemoteHome::new(server.connector(role), &*server.address);
    let home = || line(Role::RecoveryHost);

    // Who asks.
    for role in [Role::Agent, Role::ProcessServer, Role::MasterTarget] {
        let (problem, refused) = what(&orders, line(role));
        assert!(refused && problem.what.contains(&role.to_string()), "{problem}");
    }
    let stranger = Server::start(&at("stranger"), None);
    let (problem, refused) = what(&orders, RemoteHome::new(stranger.connector(Role::RecoveryHost), &*server.address));
    assert!(!refused && problem.what.contains("another installation"), "{problem}");
    // A stranger that trusts our server is turned away by it.
    let identity = stranger.authority.own_identity(Role::RecoveryHost).unwrap();
    let trusting = Connector::new(server.runtime.clone(), identity, server.authority.trust(), Arc::new(SystemClock));
    let (problem, _) = what(&orders, RemoteHome::new(trusting, &*server.address));
    assert!(
        problem.what.contains("does not accept this host") && problem.advice.contains("farshore join"),
        "{problem}"
    );
    // Where.
    let (problem, refused) = what(&orders, RemoteHome::new(stranger.connector(Role::RecoveryHost), &*stranger.address));
    assert!(refused && problem.what.contains("no master target"), "{problem}");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (problem, refused) = what(&orders, RemoteHome::new(server.connector(Role::RecoveryHost), nobody));
    assert!(!refused && problem.what.contains("no way to a master target"), "{problem}");

    // Which disks.
    let other = |path: PathBuf| vec![orders[0].clone(), HomeOrder { path, in_use: true, ..orders[1].clone() }];
    std::fs::write(at("elsewhere"), vec![0; 1 << 20]).unwrap();
    let (problem, refused) = what(&other(at("elsewhere")), home());
    assert!(refused && problem.what.contains("may not write to"), "{problem}");
    std::fs::write(at("vault/object"), vec![0; 1 << 20]).unwrap();
    let (problem, refused) = what(&other(at("vault/object")), home());
    assert!(refused && problem.what.contains("holds the vault"), "{problem}");
    let (problem, _) = what(&other("homes/1".into()), home());
    assert!(problem.what.contains("not an absolute path"), "{problem}");
    std::fs::write(at("homes/small"), vec![0; 1000]).unwrap();
    let (problem, refused) = what(&other(at("homes/small")), home());
    assert!(refused && problem.what.contains("1000 bytes"), "{problem}");
    let named = vec![orders[0].clone(), HomeOrder { serial: Some("other.img".into()), ..orders[1].clone() }];
    let (problem, refused) = what(&named, home());
    assert!(refused && problem.advice.contains("--any-disk"), "{problem}");

    assert!(target(&at("mt"), rules(&world)).unfinished().unwrap().is_empty());
    for (order, before) in orders.iter().zip(before) {
        assert!(std::fs::read(&order.path).unwrap() == before, "nothing was written");
    }
}

/// After 1 % of a disk was written in random 4 KiB blocks, at most 1.1 times as many bytes travel.
/// `FARSHORE_FAILBACK_MIB` makes the disk larger.
#[test]
fn one_percent_of_change_costs_little_more_than_itself() {
    let mib: u64 = std::env::var("FARSHORE_FAILBACK_MIB").map_or(64, |text| text.parse().unwrap());
    let size = mib << 20;
    let world = world();
    let at = |name: &str| world.folder.path().join(name);
    let image = at("image");
    {
        let mut history = world.protect(&[size]);
        let mut file = std::fs::File::create(&image).unwrap();
        for megabyte in 0..mib {
            let data = noise(megabyte, 1 << 20);
            std::io::Write::write_all(&mut file, &data).unwrap();
            history.write(DISK, megabyte << 20, data);
            if megabyte % 16 == 15 {
                history.second();
            }
        }
        history.second();
    }
    let branch = Arc::new(world.host().open(CHAIN, &Moment::Latest, "failover").unwrap());
    let runner = BranchRunner::start(Arc::clone(&branch)).unwrap();
    let leaves = size / 4096;
    let device = branch.disk(DISK).unwrap();
    for change in 0..leaves / 100 {
        // A multiplier without common factors: no place comes twice.
        device.write_at(change * 7_919_333 % leaves * 4096, &noise(mib + change, 4096)).unwrap();
    }
    branch.core().seal_all(recovery::SealWish::Now).unwrap();
    let changed = leaves / 100 * 4096;
    let rules = HomeRules { allowed: Some(vec![image.clone()]), ..HomeRules::default() };
    let server = Server::start(&at("server"), Some(target(&at("mt"), rules)));
    let begun = Instant::now();
    let orders = vec![order(DISK, &image, size)];
    let config = FailbackConfig { chunk_bytes: 4 << 20, ..config() };
    let failback = Failback::start(Arc::clone(&branch), orders, server.line(), config).unwrap();
    wait(&failback, "following", |status| status.phase == Phase::Following);
    let compared = begun.elapsed();
    let done = come_home(&failback);
    println!(
        "{mib} MiB, {changed} bytes changed: {} of data, {} on the wire ({:.3}); compared in {compared:.1?}, at rest {} ms",
        done.sent_bytes,
        done.wire_bytes,
        done.wire_bytes as f64 / changed as f64,
        done.rest_ms
    );
    assert_eq!(done.sent_bytes, changed);
    assert!(done.wire_bytes * 10 <= changed * 11, "{done:?}");
    assert!(std::fs::read(&image).unwrap() == contents(&branch, DISK));
    drop(runner);
}
