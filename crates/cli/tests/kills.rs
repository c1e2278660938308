//! The real programs, killed with `kill -9` at moments that hurt, under an application that keeps a ledger.
//!
//! A process server and an agent with two disks run as processes of their own. A writer in this process writes numbered
//! blocks to both disks in one order, through NBD; an observer notes every point that the vault announces. Meanwhile one
//! or both processes are killed and started again, at moments chosen by what they are doing. In the end no announced point
//! may be missing, and each must hold exactly the first *k* writes, with a *k* that its time allows: across both disks.
//!
//! What was done, and in which state each kill landed, is printed (`--nocapture`). `FARSHORE_KILLS_SEED` and
//! `FARSHORE_KILLS_ROUNDS` repeat or prolong a run; moments still depend on the scheduler.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[allow(dead_code, reason = "shared with the succession")]
#[path = "kills/ledger.rs"]
mod ledger;
#[path = "kills/points.rs"]
mod points;
#[allow(dead_code, reason = "shared with the succession")]
#[path = "kills/site.rs"]
mod site;
#[path = "kills/writer.rs"]
mod writer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::status::{AgentStatus, ProtectionState};
use replication::SequenceNumber;
use world::{Clock, SystemClock};

use ledger::{Ledger, mix};
use points::{Observer, prove, wait_current};
use site::{Running, Site};
use writer::Writer;

/// How long a moment may be waited for.
const MOMENT_LIMIT: Duration = Duration::from_secs(8);
const PROTECTED_LIMIT: Duration = Duration::from_secs(40);
/// How old a status may be that is printed with a kill whose moment is not seen in a status.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const ROUNDS: usize = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Server,
    Agent,
    Both,
}

/// When the kill comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// A heal is under way.
    Healing,
    /// The agent has just been started and is not protected yet.
    Starting,
    /// Something is journaled and not in the vault.
    Uncommitted,
    /// New data has just been written to the vault, its manifest is still to come.
    Uploading,
    /// A manifest is being written.
    Manifest,
    /// The agent has just said that a marker is durable.
    DurableMark,
}

/// The first two meet the initial replication.
const PLAN: [(Victim, When); ROUNDS] = [
    (Victim::Server, When::Uploading),
    (Victim::Agent, When::Healing),
    (Victim::Server, When::Starting),
    (Victim::Server, When::Uncommitted),
    (Victim::Agent, When::Uncommitted),
    (Victim::Agent, When::Starting),
    (Victim::Server, When::Manifest),
    (Victim::Both, When::DurableMark),
    (Victim::Server, When::Manifest),
    (Victim::Agent, When::Manifest),
    (Victim::Server, When::DurableMark),
    (Victim::Both, When::Uncommitted),
];

fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Changes journaled and not in the vault, as far as the agent knows.
fn uncommitted(status: &AgentStatus) -> u64 {
    let number = |text: &str| text.parse::<SequenceNumber>().unwrap_or_default();
    let (journaled, committed) = (number(&status.watermarks.journaled), number(&status.watermarks.committed));
    if journaled.generation() == committed.generation() { journaled.0.saturating_sub(committed.0) } else { 0 }
}

/// What the processes were seen to do when the kill came.
#[derive(Debug, Default)]
struct Seen {
    reached: bool,
    status: Option<AgentStatus>,
    in_flight: Vec<String>,
}

impl Seen {
    fn describe(&self) -> String {
        let status = self.status.as_ref().map_or("the agent did not answer".to_owned(), |status| {
            let marks = &status.watermarks;
            let heal = match status.heal.active {
                true => format!(", heal {} of {}", status.heal.compared_bytes, status.heal.planned_bytes),
                false => String::new(),
            };
            format!(
                "{}{heal}, captured {}, journaled {}, committed {}",
                status.state, marks.captured, marks.journaled, marks.committed
            )
        });
        let reached = if self.reached { "" } else { " (not seen in time)" };
        format!("{reached}: {status}; half-written: {:?}", self.in_flight)
    }
}

/// Everything that runs.
struct Ground {
    site: Arc<Site>,
    writer: Writer,
    server: Option<Running>,
    agent: Option<Running>,
    left_over: Vec<String>,
}

impl Ground {
    fn wait_protected(&self) {
        let began = Instant::now();
        loop {
            self.writer.assert_running();
            let status = self.site.status();
            if status.as_ref().is_some_and(|status| status.state == ProtectionState::Protected) {
                return;
            }
            let logs = || self.site.logs();
            assert!(began.elapsed() < PROTECTED_LIMIT, "never protected again: {status:?}\n{}", logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns as soon as the moment has come. Whatever takes long is left for after the kill.
    fn wait_for(&self, when: When) -> Seen {
        let began = Instant::now();
        let (marks, objects) = (self.writer.durable_marks(), self.site.data_objects());
        let mut seen = Seen { status: self.site.status(), ..Seen::default() };
        let mut looked = began;
        while began.elapsed() < MOMENT_LIMIT && !seen.reached {
            self.writer.assert_running();
            match when {
                When::Uploading => seen.reached = self.site.data_objects() > objects,
                When::Manifest => {
                    let half_written = self.site.partial_files();
                    let mut new = half_written.iter().filter(|name| !self.left_over.contains(name));
                    seen.reached = new.any(|name| name.contains("/m/"));
                }
                When::DurableMark => seen.reached = self.writer.durable_marks() > marks,
                When::Healing | When::Starting | When::Uncommitted => {
                    seen.status = self.site.status();
                    seen.reached = seen.status.as_ref().is_some_and(|status| match when {
                        When::Healing => status.link.connected && status.heal.active,
                        When::Starting => status.state != ProtectionState::Protected,
                        _ => uncommitted(status) > 0,
                    });
                }
            }
            if !seen.reached && looked.elapsed() > LOOK_EVERY {
                seen.status = self.site.status();
                looked = Instant::now();
            }
            if !seen.reached {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        seen
    }

    fn kill(&mut self, victim: Victim) {
        if victim != Victim::Agent {
            self.server.take().expect("it runs").kill();
        }
        if victim != Victim::Server {
            self.agent.take().expect("it runs").kill();
        }
    }

    fn start_again(&mut self, random: u64) {
        if self.agent.is_none() && random.is_multiple_of(2) {
            self.agent = Some(self.site.start_agent());
        }
        if self.server.is_none() {
            self.server = Some(self.site.start_server());
        }
        if self.agent.is_none() {
            self.agent = Some(self.site.start_agent());
        }
    }
}

#[test]
fn no_kill_loses_an_announced_point_or_makes_one_up() {
    let seed = number_from_environment("FARSHORE_KILLS_SEED").unwrap_or_else(|| SystemClock.wall().0 / 1_000_000);
    let rounds = number_from_environment("FARSHORE_KILLS_ROUNDS").map_or(ROUNDS, |rounds| rounds as usize);
    println!("repeat with FARSHORE_KILLS_SEED={seed} FARSHORE_KILLS_ROUNDS={rounds}");
    let began = Instant::now();
    // Names of sockets are limited to about a hundred bytes.
    let folder = tempfile::Builder::new().prefix("fk").tempdir().expect("a temporary folder");
    let ledger = Arc::new(Ledger::new(seed));
    let site = Arc::new(Site::make(folder.path(), &ledger));
    let vault = site.unlock();
    let observer = Observer::start(site.unlock());
    let server = Some(site.start_server());
    let agent = Some(site.start_agent());
    let writer = Writer::start(Arc::clone(&site), Arc::clone(&ledger));
    let mut ground = Ground { site: Arc::clone(&site), writer, server, agent, left_over: Vec::new() };
    let mut landed = Vec::new();
    for round in 0..rounds {
        let (victim, when) = PLAN[round % PLAN.len()];
        let random = mix(seed ^ round as u64);
        // Small seals lie within their manifests: a heal is what writes objects of data.
        if !matches!(when, When::Healing | When::Starting | When::Uploading) {
            ground.wait_protected();
        }
        let mut seen = ground.wait_for(when);
        // Not always at once: what follows the moment must be hit, too.
        std::thread::sleep(Duration::from_micros((random % 4) * (random >> 8) % 3000));
        ground.kill(victim);
        let partial = site.partial_files();
        seen.in_flight = partial.iter().filter(|name| !ground.left_over.contains(name)).cloned().collect();
        ground.left_over = partial;
        let at = began.elapsed().as_secs_f64();
        println!("{at:5.1} s, {} writes: killed {victim:?} at {when:?}{}", ledger.len(), seen.describe());
        landed.push((victim, when, seen));
        std::thread::sleep(Duration::from_millis(random >> 16 & 255));
        ground.start_again(random);
    }
    ground.wait_protected();
    let Ground { writer, server, agent, .. } = ground;
    writer.finish();
    wait_current(&site, &vault, &ledger);
    let announced = observer.finish();
    agent.expect("it runs").kill();
    server.expect("it runs").kill();
    println!(
        "{:5.1} s: {} writes, {} points were announced",
        began.elapsed().as_secs_f64(),
        ledger.len(),
        announced.len()
    );

    for disk in 0..ledger::DISKS {
        let image = std::fs::read(site.image(disk)).expect("the disk");
        assert!(image == ledger.replay(disk, ledger.len()), "disk {disk} itself holds what was acknowledged");
    }
    let proven = prove(&site, &vault, &ledger, &announced);
    site.with_key(&["vault", "verify"], &[]);
    println!("{:5.1} s: {proven:?}", began.elapsed().as_secs_f64());

    // A run in which no kill met its moment would prove nothing.
    assert!(proven.points > rounds && proven.durable_markers > 0 && proven.gaps > 0, "{proven:?}");
    for when in [When::Healing, When::Uncommitted, When::DurableMark] {
        let met = landed.iter().any(|(_, wanted, seen)| *wanted == when && seen.reached);
        assert!(met || rounds < ROUNDS, "no kill came at {when:?}");
    }
}
