//! A machine whose applications are brought to rest, and what the server has of it.
#![allow(dead_code, unreachable_pub)]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::capture::ebpf;
use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::Problem;
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use replication::{Change, ChangeKind, DiskId, MarkerKind};
use world::SystemClock;

use super::loops::{Loop, skip};
use super::process::{self, Agent};
use super::site::Server;
use super::waits::{status_of, wait_protected};

/// How large its disk is.
const DISK_BYTES: u64 = 192 << 20;

/// A machine with an ext4 on a disk that is captured by eBPF.
pub struct Machine {
    pub config: AgentConfig,
    pub folder: PathBuf,
    pub disk: Loop,
}

impl Machine {
    pub fn new(server: &Server, test: &str) -> Option<Machine> {
        if let Err(why) = ebpf::support::check_machine() {
            skip(test, &why);
            return None;
        }
        let folder = server.folder(test);
        std::fs::create_dir_all(&folder).expect("created");
        let disk = Loop::make(test, &folder.join("disk.img"), DISK_BYTES, "ext4", &folder.join("mnt"))?;
        let mut config = AgentConfig::new(folder.join("state"));
        config.rotate_every_ms = 200;
        config.proof_every_ms = 50;
        config.ebpf_pins = Some(PathBuf::from(format!("/sys/fs/bpf/farshore-{test}-{}", std::process::id())));
        config.disks.push(DiskConfig { capture: CaptureChoice::Ebpf, ..DiskConfig::new("disk", &disk.device) });
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), test, &[]).expect("joins");
        Some(Machine { config, folder, disk })
    }

    pub fn start(&self) -> Service {
        let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
        let service = Service::start(&self.config, options).unwrap_or_else(|problems| panic!("{problems:?}"));
        wait_protected(|| Some(service.status()));
        service
    }

    pub fn spawn(&self) -> Agent {
        self.spawn_by(&[])
    }

    /// Starts the agent as a process of its own, by a program that starts others.
    pub fn spawn_by(&self, starter: &[String]) -> Agent {
        let agent = Agent::spawn(&self.config, &self.folder, starter);
        wait_protected(|| status_of(&self.config));
        agent
    }

    pub fn ask(&self, request: &Request) -> Result<Answer, Problem> {
        ask(&self.config.control_socket(), request)
    }

    /// Takes a point at rest; why it is not application-consistent, and the remarks.
    pub fn point(&self, name: &str) -> (Option<String>, Vec<String>) {
        match self.ask(&Request::Point { name: name.to_owned(), wait_ms: 20_000 }) {
            Ok(Answer::PointTaken { failed, remarks, durable: true, connected: true, .. }) => (failed, remarks),
            other => panic!("{other:?}"),
        }
    }

    /// A script of root's own.
    pub fn script(&self, name: &str, body: &str) -> Option<PathBuf> {
        let path = self.folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
        Some(path)
    }

    /// That somebody can write to the disk's file system.
    pub fn assert_writable(&self) {
        let (path, since) = (self.disk.mount.join("writable"), Instant::now());
        let mut file = File::create(path).expect("created");
        file.write_all(b"x").and_then(|()| Ok(rustix::fs::fsync(&file)?)).expect("written");
        assert!(since.elapsed() < Duration::from_secs(5), "after {:?}", since.elapsed());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        process::take_down(&self.config);
    }
}

/// From now on the server keeps the order of changes; the disk as it is there now.
pub fn begin_log(server: &Server) -> Vec<u8> {
    let mut store = server.store();
    store.log = Some(Vec::new());
    store.replicas[&DiskId(0)].bytes.clone()
}

/// The markers that the server has, in order.
pub fn markers(server: &Server) -> Vec<(MarkerKind, String)> {
    let store = server.store();
    let log = store.log.as_ref().expect("it is kept");
    let marker = |change: &Change| match &change.kind {
        ChangeKind::Marker { kind, name } => Some((kind.clone(), name.clone())),
        _ => None,
    };
    log.iter().filter_map(marker).collect()
}

/// The disk as it was at the marker `name`.
pub fn at_marker(server: &Server, base: &[u8], name: &str) -> Vec<u8> {
    let store = server.store();
    let mut content = base.to_vec();
    for change in store.log.as_ref().expect("it is kept") {
        match &change.kind {
            ChangeKind::Write { range, data } => content[range.within(0)].copy_from_slice(data),
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => content[range.within(0)].fill(0),
            ChangeKind::Marker { name: found, .. } if found == name => return content,
            _ => {}
        }
    }
    panic!("there is no marker {name}");
}
