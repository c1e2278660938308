//! An agent that stopped in order goes on where it was; disks that were added or have grown meanwhile join at the end of
//! their own heal, while everything else streams on.

mod site;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use agent::status::ProtectionState;
use replication::wire::HealNeed;
use replication::{ByteRange, DiskId, Ranges};
use site::Server;
use world::{BlockDevice, Entropy, SystemClock, SystemEntropy};

const SOON: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

fn image(path: &Path, size: u64) {
    let file = File::create(path).expect("created");
    file.set_len(size).expect("sized");
    fill(&file, 0, size / 2);
}

fn fill(file: &File, start: u64, len: u64) {
    let mut data = vec![0; len as usize];
    SystemEntropy.fill(&mut data);
    file.write_all_at(&data, start).expect("written");
}

/// Makes an image larger, with data in the new area, as a block device grows: its time of modification tells nothing.
fn grow(path: &PathBuf, from: u64, to: u64) {
    let file = File::options().read(true).write(true).open(path).expect("opens");
    let modified = file.metadata().expect("metadata").modified().expect("a time");
    file.set_len(to).expect("grown");
    fill(&file, from, to - from);
    file.set_modified(modified).expect("set back");
}

fn config(server: &Server, sizes: &[u64]) -> AgentConfig {
    let folder = server.folder("m");
    std::fs::create_dir_all(&folder).expect("created");
    let mut config = AgentConfig::new(folder.join("state"));
    (config.rotate_every_ms, config.proof_every_ms) = (200, 50);
    for size in sizes {
        add_disk(&mut config, &folder, *size);
    }
    let state = StateDir::open(&config.state_dir).expect("opens");
    state.join(&server.runtime, Arc::new(SystemClock), &server.token(), "m", &[]).expect("joins");
    config
}

fn add_disk(config: &mut AgentConfig, folder: &Path, size: u64) {
    let name = format!("disk{}", config.disks.len());
    let path = folder.join(format!("{name}.img"));
    image(&path, size);
    let mut disk = DiskConfig::new(&name, &path);
    disk.capture = CaptureChoice::Splitter;
    config.disks.push(disk);
}

fn start(config: &AgentConfig) -> Service {
    let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
    Service::start(config, options).unwrap_or_else(|problems| panic!("{problems:?}"))
}

fn settle(service: &Service) {
    let since = Instant::now();
    loop {
        let status = service.status();
        if since.elapsed() > Duration::from_millis(250)
            && status.state == ProtectionState::Protected
            && status.ring.used_bytes == 0
            && status.watermarks.captured == status.watermarks.journaled
        {
            return;
        }
        assert!(since.elapsed() < SOON, "not protected: {status:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn write(config: &AgentConfig, disk: usize, at: u64, byte: u8) {
    let client = nbd::Client::connect_unix(config.nbd_socket(), &config.disks[disk].name).expect("served");
    client.write_at(at, &[byte; 8192]).expect("written");
}

fn assert_replicated(config: &AgentConfig, server: &Server) {
    let store = server.store();
    for (index, disk) in config.disks.iter().enumerate() {
        let image = std::fs::read(&disk.path).expect("readable");
        let replica = &store.replicas[&DiskId(index as u16)].bytes;
        let differs = image.chunks(512).zip(replica.chunks(512)).filter(|(a, b)| a != b).count();
        assert!(image.len() == replica.len() && differs == 0, "{} differs in {differs} sectors", disk.name);
    }
}

#[test]
fn an_agent_that_stopped_in_order_goes_on_without_a_gap() {
    let server = Server::start(false);
    let config = config(&server, &[4 * MIB, MIB]);
    let service = start(&config);
    settle(&service);
    write(&config, 0, 8192, 1);
    service.stop().expect("stops in order");
    let offered = server.store().offered_leaves;
    for round in 2..4 {
        let service = start(&config);
        write(&config, 1, 4096, round);
        settle(&service);
        write(&config, 0, 8192, round);
        service.stop().expect("stops in order");
    }
    assert_replicated(&config, &server);
    let store = server.store();
    assert_eq!(store.needs, [HealNeed::Whole, HealNeed::Nothing, HealNeed::Nothing]);
    assert_eq!((store.gaps.len(), store.heals, store.offered_leaves), (0, 1, offered), "{:?}", store.gaps);
    drop(store);

    // A kill is another matter: what the ring held is gone.
    let service = start(&config);
    settle(&service);
    service.abort();
    let service = start(&config);
    settle(&service);
    assert_eq!(server.store().needs[3..], [HealNeed::Nothing, HealNeed::Maps]);
    service.stop().expect("stops in order");
    assert_replicated(&config, &server);
}

#[test]
fn a_start_that_fails_costs_no_heal() {
    let server = Server::start(false);
    let mut config = config(&server, &[4 * MIB, MIB]);
    let service = start(&config);
    settle(&service);
    write(&config, 0, 8192, 1);
    service.stop().expect("stops in order");
    let fail = |config: &AgentConfig, what: &str| {
        let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
        let problems = Service::start(config, options).err().expect("it cannot start");
        assert!(problems[0].what.contains(what), "{problems:?}");
    };
    // After the disks were opened, and after they were served.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    config.nbd_tcp = Some(taken.local_addr().expect("an address"));
    fail(&config, "the disks cannot be served");
    config.nbd_tcp = None;
    std::fs::create_dir(config.control_socket()).expect("stands in the way");
    fail(&config, "the control socket");
    fail(&config, "the control socket");
    std::fs::remove_dir(config.control_socket()).expect("out of the way");

    let service = start(&config);
    write(&config, 1, 4096, 2);
    settle(&service);
    service.stop().expect("stops in order");
    assert_replicated(&config, &server);
    {
        let store = server.store();
        assert_eq!(store.needs, [HealNeed::Whole, HealNeed::Nothing]);
        assert_eq!((store.gaps.len(), store.heals), (0, 1), "{:?}", store.gaps);
    }

    // Somebody else's hands in between are noticed as ever.
    std::fs::create_dir(config.control_socket()).expect("stands in the way");
    fail(&config, "the control socket");
    std::fs::remove_dir(config.control_socket()).expect("out of the way");
    let file = File::options().write(true).open(&config.disks[0].path).expect("opens");
    fill(&file, MIB, 8192);
    drop(file);
    let service = start(&config);
    settle(&service);
    service.stop().expect("stops in order");
    assert_replicated(&config, &server);
}

#[test]
fn added_and_grown_disks_join_while_the_others_stream_on() {
    let server = Server::start(false);
    let mut config = config(&server, &[4 * MIB, MIB + 512]);
    let service = start(&config);
    settle(&service);
    service.stop().expect("stops in order");
    let offered = server.store().offered_leaves;
    grow(&config.disks[1].path, MIB + 512, 3 * MIB);
    add_disk(&mut config, &server.folder("m"), 2 * MIB);
    let service = start(&config);
    for round in 0..20 {
        write(&config, 0, u64::from(round) * 65536, round);
        write(&config, 1, MIB - 4096, round);
        write(&config, 2, 65536, round);
    }
    settle(&service);
    service.stop().expect("stops in order");
    assert_replicated(&config, &server);
    let store = server.store();
    assert!(store.needs[1..].iter().all(|need| *need == HealNeed::Nothing), "{:?}", store.needs);
    assert!(store.gaps.is_empty(), "the machine had no gap: {:?}", store.gaps);
    // What joins begins where a leaf begins: a heal moves whole leaves.
    let joined = Ranges::of([(DiskId(1), ByteRange::new(MIB, 2 * MIB)), (DiskId(2), ByteRange::new(0, 2 * MIB))]);
    assert_eq!(Ranges::of(store.range_gaps.iter().flat_map(|ranges| ranges.iter().collect::<Vec<_>>())), joined);
    let compared = (store.offered_leaves - offered) * 4096;
    assert!(compared <= 3 * (4 * MIB + 8192), "{compared} bytes were compared for 4 MiB that joined");
}

#[test]
fn a_disk_in_doubt_is_compared_alone() {
    let server = Server::start(false);
    let config = config(&server, &[4 * MIB, MIB]);
    let service = start(&config);
    settle(&service);
    service.stop().expect("stops in order");
    // Somebody used the image while nobody watched.
    let file = File::options().write(true).open(&config.disks[1].path).expect("opens");
    fill(&file, 300 << 10, 5000);
    drop(file);
    let service = start(&config);
    settle(&service);
    service.stop().expect("stops in order");
    assert_replicated(&config, &server);
    let store = server.store();
    assert_eq!(store.needs, [HealNeed::Whole, HealNeed::Nothing]);
    assert!(store.gaps.is_empty(), "{:?}", store.gaps);
    assert_eq!(store.range_gaps[0], Ranges::of([(DiskId(1), ByteRange::new(0, MIB))]));
}
