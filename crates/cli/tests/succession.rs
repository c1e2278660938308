//! Another process server for a machine that writes on: after the first was lost with its journal, and by a planned move;
//! and another run of its agent, after the first fell silent. Real processes; what the vault announced is proved as after
//! the kills (`kills.rs`).

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/ledger.rs"]
mod ledger;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/points.rs"]
mod points;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/site.rs"]
mod site;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/writer.rs"]
mod writer;

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::status::{AgentStatus, ProtectionState};

use ledger::{DISK_BYTES, DISKS, Ledger};
use points::{Observer, prove, wait_current};
use site::Site;
use writer::Writer;

const SOON: Duration = Duration::from_secs(60);

fn wait_for(site: &Site, agent: &str, what: &str, done: impl Fn(&AgentStatus) -> bool) {
    let began = Instant::now();
    loop {
        let status = site.status_of(agent);
        if status.as_ref().is_some_and(&done) {
            return;
        }
        assert!(began.elapsed() < SOON, "waited in vain until {what}: {status:?}\n{}", site.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_protected(site: &Site, agent: &str) {
    wait_for(site, agent, "protected", |status| status.state == ProtectionState::Protected);
}

fn site() -> (tempfile::TempDir, Arc<Site>, Arc<Ledger>) {
    let folder = tempfile::Builder::new().prefix("fs").tempdir().expect("a temporary folder");
    let ledger = Arc::new(Ledger::new(7));
    let site = Arc::new(Site::make(folder.path(), &ledger));
    site.grant_server("second");
    (folder, site, ledger)
}

#[test]
fn a_lost_server_is_succeeded_without_a_full_resend() {
    let (_folder, site, ledger) = site();
    let (vault, observer) = (site.unlock(), Observer::start(site.unlock()));
    let first = site.start_server();
    let agent = site.start_agent();
    wait_protected(&site, "agent");
    let writer = Writer::start(Arc::clone(&site), Arc::clone(&ledger));
    std::thread::sleep(Duration::from_millis(1500));
    first.kill();
    fs::remove_dir_all(site.path("server")).unwrap();
    ledger.forget_durable_marks();
    let second = site.start_server_named("second");
    assert_eq!(site.move_to("second", 5), Some(false), "nobody could commit what the lost server had");
    wait_protected(&site, "agent");
    let healed = site.status().unwrap().heal;
    assert!(healed.sent_bytes < DISK_BYTES * DISKS as u64 / 4, "only what differs travels: {healed:?}");
    std::thread::sleep(Duration::from_millis(1000));
    writer.finish();
    wait_current(&site, &vault, &ledger);
    let proven = prove(&site, &vault, &ledger, &observer.finish());
    assert!(proven.gaps > 1, "the loss is a recorded gap: {proven:?}");
    agent.kill();
    second.kill();
}

#[test]
fn a_planned_move_has_no_gap() {
    let (_folder, site, ledger) = site();
    let (vault, observer) = (site.unlock(), Observer::start(site.unlock()));
    let (first, second) = (site.start_server(), site.start_server_named("second"));
    let agent = site.start_agent();
    wait_protected(&site, "agent");
    let writer = Writer::start(Arc::clone(&site), Arc::clone(&ledger));
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(site.move_to("second", 30), Some(true));
    wait_for(&site, "agent", "it goes on", |status| status.link.connected);
    std::thread::sleep(Duration::from_millis(1000));
    writer.finish();
    wait_current(&site, &vault, &ledger);
    first.kill();
    let proven = prove(&site, &vault, &ledger, &observer.finish());
    assert_eq!(proven.gaps, 1, "only that before the initial replication: {proven:?}");
    agent.kill();
    second.kill();
}

fn signal(name: &str, process: u32) {
    assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
}

/// A machine that was copied: the same identity and state, disks and sockets of its own.
fn copy_agent(site: &Site) {
    fs::create_dir(site.path("copy")).unwrap();
    for entry in fs::read_dir(site.path("agent")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), site.path("copy").join(entry.file_name())).unwrap();
        }
    }
    let mut config = fs::read_to_string(site.path("agent.toml")).unwrap();
    for disk in 0..DISKS {
        let (image, copy) = (site.image(disk), site.path(&format!("copy{disk}.raw")));
        fs::copy(&image, &copy).unwrap();
        config = config.replace(image.to_str().unwrap(), copy.to_str().unwrap());
    }
    let (state, nbd) = (site.path("agent").display().to_string(), site.path("nbd").display().to_string());
    config = config.replace(&format!("{state:?}"), &format!("{:?}", site.path("copy").display().to_string()));
    config = config.replace(&format!("{nbd:?}"), &format!("{:?}", site.path("nbd2").display().to_string()));
    fs::write(site.path("copy.toml"), config).unwrap();
}

#[test]
fn a_silent_agent_gives_way_to_a_newer_run_and_a_live_one_does_not() {
    let (_folder, site, _ledger) = site();
    let server = site.start_server();
    let agent = site.start_agent();
    wait_protected(&site, "agent");
    copy_agent(&site);
    // As after the death of its machine: the link is open and silent.
    signal("-STOP", agent.id());
    let began = Instant::now();
    let copy = site.start_agent_named("copy");
    wait_for(&site, "copy", "it has the place", |status| status.link.connected);
    assert!(began.elapsed() < Duration::from_secs(20), "an idle link lives for 30 s, which nobody must wait for");
    signal("-CONT", agent.id());
    wait_for(&site, "agent", "the older one is refused", |status| {
        status.state == ProtectionState::Refused && status.reason.contains("another running agent")
    });
    wait_protected(&site, "copy");
    copy.kill();
    agent.kill();
    server.kill();
}
