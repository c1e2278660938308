//! What happens in the demo, in order.

use std::fs;
use std::path::Path;
use std::time::Duration;

use agent::status::{AgentStatus, ProtectionState};
use replication::SequenceNumber;
use rustix::process::Signal;
use serde_json::{Value, json};
use vault::{Catalog, ChainHistory};
use world::{Clock, SystemClock, WallTime};

use super::check::bounds;
use super::disk;
use super::home;
use super::keep::{Kept, START_IMAGE};
use super::kernel;
use super::ledger::{Ledger, mix};
use super::processes::{Programs, Running};
use super::proof::{Claim, Evidence, Opening, Proof, copy_device, mismatch, open_image, prove};
use super::site::{LIMIT, MACHINE, Paths, Site, unlock};
use super::watch::Watch;
use crate::failure::{Done, Failure, io_failure};
use crate::output::{Output, Table, bytes, columns, duration_ns};

/// Writes per second of the ordinary workload.
const RATE: u64 = 800;
/// Writes that overflow the ring: twice what it holds.
const BURST: u64 = 6144;
/// Time in which the workload just runs, between two events.
const QUIET: Duration = Duration::from_secs(4);
/// How long the process server is gone.
const OUTAGE: Duration = Duration::from_millis(1500);
/// What clocks may differ by besides the measured skew: the way of a handshake on a busy machine.
const TOLERANCE_NS: u64 = 100_000_000;
/// The name of the named point.
const NAMED: &str = "before the update";

/// What to play.
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) size: u64,
    pub(crate) keep: bool,
}

/// Figures of the run, for the table at its end.
#[derive(Default)]
pub(crate) struct Figures(Vec<(String, String)>);

impl Figures {
    pub(crate) fn add(&mut self, what: &str, value: impl Into<String>) {
        self.0.push((what.to_owned(), value.into()));
    }

    fn print(&self, output: Output) -> Done {
        let mut table = Table::new(&["FIGURE", "VALUE"]);
        let mut object = serde_json::Map::new();
        for (what, value) in &self.0 {
            table.row(vec![what.clone(), value.clone()]);
            object.insert(what.clone(), json!(value));
        }
        output.object(&json!({"type": "figures", "figures": object}))?;
        output.table(&table)
    }
}

fn rest(length: Duration) {
    std::thread::sleep(length);
}

fn now_ns() -> u64 {
    SystemClock.wall().0
}

/// The last word of an answer such as `paused 17`.
pub(crate) fn number_of(answer: &str) -> Done<u64> {
    answer
        .split(' ')
        .next_back()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| Failure::new("the workload's answer is not understood", answer, "report this"))
}

/// Tells the workload something and returns the number of its last acknowledged write.
pub(crate) fn order(workload: &mut Running, command: &str) -> Done<u64> {
    workload.tell(command)?;
    number_of(&workload.line(LIMIT)?)
}

/// Plays everything.
pub(crate) fn play(plan: &Plan, paths: Paths, programs: Programs, output: Output) -> Done {
    let began = SystemClock.monotonic();
    let say = |what: &str| output.line(format!("{:6.1} s  {what}", SystemClock.monotonic().since(began).as_secs_f64()));
    let mut figures = Figures::default();
    output.line(format!("seed {}; repeat this run with --seed {}", plan.seed, plan.seed))?;
    let made = disk::make(&paths.home, &paths.state.join("files"), plan.size, plan.seed)?;
    match made.file_system {
        Some(size) => say(&format!(
            "made a disk: {} of ext4 with {} files ({}), and {} raw",
            bytes(size),
            made.files,
            bytes(made.file_bytes),
            bytes(made.size - size)
        ))?,
        None => {
            say("e2fsprogs is missing: the disk is raw data, and no file system is checked")?;
            output.line("          get it: apt install e2fsprogs, dnf install e2fsprogs, apk add e2fsprogs")?;
        }
    }
    let start = paths.images.join(START_IMAGE);
    copy_device(&open_image(&paths.home)?, &start)?;
    figures.add("disk", bytes(made.size));

    let mut site = Site::start(paths, programs, &made, plan.seed)?;
    say(&format!("vault made, server and agent run ({})", site.programs.agent_name()))?;
    let watch = Watch::start(site.paths.agent_socket(), site.unlocked.clone());
    let protected_from = SystemClock.monotonic();
    let mut workload = site.start_workload(&site.paths.disk_socket(), "disk", RATE)?;
    watch.event("the workload begins while the disk is replicated for the first time");
    let status = site.wait_protected()?;
    let took = SystemClock.monotonic().since(protected_from);
    watch.event("initial replication ends");
    say(&format!("initial replication took {:.1} s while the workload wrote", took.as_secs_f64()))?;
    let rate = (made.size as f64 / took.as_secs_f64()) as u64;
    figures.add(
        "initial replication",
        format!("{:.1} s, {}/s of disk, {} sent", took.as_secs_f64(), bytes(rate), bytes(status.heal.sent_bytes)),
    );
    wait_committed(&mut site)?;
    figures.add("vault after it", bytes(folder_bytes(&site.paths.vault)));
    rest(QUIET);

    // A named point, with the source itself as the witness.
    let named_at = order(&mut workload, "pause")?;
    mark(&mut site)?;
    watch.event(format!("marked {NAMED:?}"));
    if plan.keep {
        copy_device(&open_image(&site.paths.home)?, &site.paths.images.join("before-the-update.raw"))?;
    }
    workload.tell(&format!("rate {RATE}"))?;
    say(&format!("marked the point {NAMED:?} after write {named_at}"))?;
    rest(QUIET);

    kill_server(&mut site, &watch, &say)?;
    site.wait_protected()?;
    rest(QUIET);

    overflow(&mut site, &mut workload, &watch, &say)?;
    rest(QUIET);

    let written = order(&mut workload, "stop")?;
    workload.end_by_itself()?;
    wait_committed(&mut site)?;
    let ledger = Ledger::load(&site.paths.ledger)?;
    say(&format!("the workload stopped after {written} writes"))?;
    figures.add("writes", format!("{written} of 4 KiB, all in the ledger"));

    let chosen = choose_second(&site, &ledger, plan.seed)?;
    let evidence = Evidence {
        start: &start,
        ledger: &ledger,
        has_file_system: made.file_system.is_some(),
        scratch: &site.paths.state.clone(),
    };
    let branches = site.paths.state.join("branches");
    let mut proofs = Vec::new();
    for (name, moment, claim) in [
        ("a random second", chosen.moment.as_str(), Claim::Between(chosen.allowed.clone())),
        (NAMED, NAMED, Claim::Exactly(named_at)),
        ("latest", "latest", Claim::Exactly(written)),
    ] {
        let opening = Opening {
            programs: &site.programs,
            vault: &site.paths.vault,
            key: &site.paths.recovery_key,
            state: &branches,
        };
        let mut branch = opening.open(MACHINE, moment, &["--throw-away", "--name", name])?;
        let proof = prove(name, &branch, &claim, &evidence)?;
        branch.process.end()?;
        say(&proven(&proof))?;
        watch.event(format!("proved {name}"));
        proofs.push(proof);
    }
    let opens: Vec<String> = proofs.iter().map(|proof| format!("{} ms", proof.open_ms)).collect();
    figures.add("opening a point", opens.join(", "));
    let (worst_read, total) = proofs.iter().fold((0, 0), |(ms, sum), proof| (ms + proof.read_ms, sum + proof.bytes));
    figures.add("reading the points", format!("{}/s", bytes(total * 1000 / worst_read.max(1))));

    let history = machine_history(&site)?;
    if history.gaps().len() < 2 {
        return Err(mismatch("the whole run", "the ring overflowed and no gap is recorded"));
    }
    if plan.keep {
        keep(&site, &history, &ledger, &proofs, plan, evidence.has_file_system)?;
    }
    let (median, worst) = watch.rpo_percentiles();
    figures.add(
        "RPO",
        format!(
            "median {:.1} s, worst {:.1} s (server stopped, ring overflowing)",
            median as f64 / 1e3,
            worst as f64 / 1e3
        ),
    );

    home::fail_over_and_return(&mut site, &evidence, plan.seed, &mut figures, &watch, &say)?;

    vault_alone(&site, &start, made.file_system.is_some(), &say)?;
    kernel::play(&mut site, plan.seed, &mut figures, output, &say)?;
    figures.add("vault at the end", bytes(folder_bytes(&site.paths.vault)));
    site.end()?;
    let picture = watch.finish(&[&history, &machine_history(&site)?]);
    output.line("")?;
    for line in picture.render(columns()).lines() {
        output.line(line)?;
    }
    output.line("")?;
    for proof in &proofs {
        output.object(&json!({
            "type": "proof", "point": proof.name, "sequence": proof.sequence, "time": proof.time, "reason": proof.reason,
            "writes": proof.k, "allowed": [proof.allowed.start(), proof.allowed.end()], "bytes_compared": proof.bytes,
            "open_ms": proof.open_ms, "read_ms": proof.read_ms, "file_system": proof.file_system,
        }))?;
    }
    let took = SystemClock.monotonic().since(began);
    figures.add("whole run", format!("{:.0} s", took.as_secs_f64()));
    figures.print(output)?;
    if plan.keep {
        output.line(format!("\nkept in {}; check it with tools/verify_second.py", site.paths.data.display()))?;
    }
    output.line("everything that was recovered is what the ledger says")
}

fn proven(proof: &Proof) -> String {
    format!(
        "proved {}: {} = write {} of {} to {} allowed; {} compared, opened in {} ms, e2fsck: {}",
        proof.name,
        proof.time,
        proof.k,
        proof.allowed.start(),
        proof.allowed.end(),
        bytes(proof.bytes),
        proof.open_ms,
        proof.file_system
    )
}

/// Waits until everything written so far is in the vault, and proven.
pub(crate) fn wait_committed(site: &mut Site) -> Done {
    let from = now_ns();
    let position = |text: &str| text.parse::<SequenceNumber>().unwrap_or_default();
    let captured = position(&site.wait_protected()?.watermarks.captured);
    site.wait_for("everything is in the vault", |status| {
        status.state == ProtectionState::Protected && position(&status.watermarks.committed) >= captured
    })?;
    let began = SystemClock.monotonic();
    while SystemClock.monotonic().since(began) < LIMIT {
        let history = machine_history(site)?;
        if history.proven_through.0 > from && history.gaps().iter().all(|gap| gap.until.is_some()) {
            return Ok(());
        }
        rest(Duration::from_millis(100));
    }
    let why = format!("it is proven to {}", WallTime(machine_history(site)?.proven_through.0));
    Err(Failure::new("the vault does not become current", why, "this is a fault: report it with the seed"))
}

fn machine_history(site: &Site) -> Done<ChainHistory> {
    let (store, keys) = (site.unlocked.store(), site.unlocked.keys());
    let catalog = Catalog::load(store, keys)?;
    let machine = catalog.machines.values().find(|machine| machine.name == MACHINE);
    let chain =
        machine.map(|machine| machine.chain).ok_or_else(|| Failure::new("the vault knows no machine", "", ""))?;
    Ok(ChainHistory::load(store, keys, chain)?)
}

fn mark(site: &mut Site) -> Done {
    let state = site.paths.state.join("agent");
    let answer = agent::service::control::ask(
        &state.join("control.sock"),
        &agent::service::control::Request::Mark { name: NAMED.to_owned(), wait_ms: 20_000 },
    );
    match answer {
        Ok(agent::service::control::Answer::Marked { durable: true, .. }) => Ok(()),
        Ok(other) => Err(Failure::new("the moment was not marked", format!("{other:?}"), "report this with the seed")),
        Err(problem) => Err(Failure::new(problem.what, problem.why, problem.advice)),
    }
}

/// `kill -9` while something is journaled and not yet in the vault, a pause, and a new start.
fn kill_server(site: &mut Site, watch: &Watch, say: &impl Fn(&str) -> Done) -> Done {
    let status = site.wait_for("something is journaled and not yet in the vault", |status| {
        status.watermarks.journaled != status.watermarks.committed
    })?;
    site.server.kill()?;
    watch.event("kill -9 of the process server");
    say(&format!(
        "killed the process server; @{} was journaled, @{} in the vault",
        status.watermarks.journaled, status.watermarks.committed
    ))?;
    rest(OUTAGE);
    site.restart_server()?;
    watch.event("the process server is started again");
    say("started it again")
}

/// Stops the process server for so long that the ring overflows.
fn overflow(site: &mut Site, workload: &mut Running, watch: &Watch, say: &impl Fn(&str) -> Done) -> Done {
    let before = site.wait_protected()?.writes.tracked;
    let gaps = machine_history(site)?.gaps().len();
    site.server.signal(Signal::STOP)?;
    watch.event("the process server is suspended, and the workload writes a burst");
    workload.tell(&format!("burst {BURST}"))?;
    let overflowed = site.wait_for("the ring overflows", |status| status.writes.tracked > before);
    site.server.signal(Signal::CONT)?;
    let status = overflowed?;
    watch.event("the ring has overflowed; the process server goes on");
    say(&format!("the ring overflowed: {} writes were only remembered in the maps", status.writes.tracked - before))?;
    let healed = wait_healed(site, gaps)?;
    watch.event("healed from the maps");
    say(&format!(
        "healed: {} compared, {} sent again, nothing else",
        bytes(healed.heal.compared_bytes),
        bytes(healed.heal.sent_bytes)
    ))
}

/// Waits until more than `gaps` gaps are recorded and none is open.
fn wait_healed(site: &mut Site, gaps: usize) -> Done<AgentStatus> {
    let began = SystemClock.monotonic();
    while SystemClock.monotonic().since(began) < LIMIT {
        let recorded = machine_history(site)?.gaps();
        if recorded.len() > gaps && recorded.iter().all(|gap| gap.until.is_some()) {
            return site.wait_protected();
        }
        rest(Duration::from_millis(100));
    }
    Err(mismatch("the overflow", "the ring overflowed, and no gap was recorded and closed"))
}

/// A second that will be opened.
struct Chosen {
    moment: String,
    allowed: std::ops::RangeInclusive<u64>,
}

/// Chooses a second among those that can be opened and in which something was written.
fn choose_second(site: &Site, ledger: &Ledger, seed: u64) -> Done<Chosen> {
    let seconds: Vec<Value> =
        site.points()?.into_iter().filter(|point| point["type"] == "point" && point["kind"] == "second").collect();
    let Some(second) = seconds.get((mix(seed) % seconds.len().max(1) as u64) as usize) else {
        return Err(mismatch("a random second", "no second can be opened"));
    };
    let time_ns = second["time_ns"].as_u64().unwrap_or_default();
    let moment = WallTime(time_ns).to_string();
    let point = site.point(&moment)?;
    if point["time_ns"].as_u64() != Some(time_ns) {
        return Err(mismatch("a random second", format!("{moment} was asked for, {} answered", point["time"])));
    }
    let skew = point["skew_ns"].as_i64().unwrap_or_default().unsigned_abs();
    Ok(Chosen { moment, allowed: bounds(ledger, time_ns, TOLERANCE_NS + skew) })
}

fn keep(
    site: &Site,
    history: &ChainHistory,
    ledger: &Ledger,
    proofs: &[Proof],
    plan: &Plan,
    has_file_system: bool,
) -> Done {
    let gaps = history.gaps();
    let closed = |gap: &vault::Gap| gap.until.map_or(u64::MAX, |(_, time)| time.0);
    let first = gaps.iter().find(|gap| gap.after == gap.after.generation().base()).map_or(0, closed);
    let kept = Kept {
        seed: plan.seed,
        tolerance_ns: TOLERANCE_NS + history.skew_ns.unsigned_abs(),
        chain: history.chain.to_string(),
        openable_ns: (first, history.proven_through.0),
        gaps_ns: gaps.iter().map(|gap| (gap.time.0, closed(gap))).collect(),
        proofs,
        writes: ledger.writes.len() as u64,
        has_file_system,
    };
    kept.write(&site.paths.data, ledger)?;
    fs::copy(&site.paths.ledger, site.paths.data.join("ledger-of-the-source"))
        .map(drop)
        .map_err(|error| io_failure("the ledger cannot be kept", &error))
}

/// Recovers once more from a copy of the vault and the recovery key, with nothing else of this site.
fn vault_alone(site: &Site, start: &Path, has_file_system: bool, say: &impl Fn(&str) -> Done) -> Done {
    let refused = |error: std::io::Error| io_failure("the vault cannot be copied", &error);
    let elsewhere = tempfile::Builder::new().prefix("farshore-elsewhere-").tempdir().map_err(refused)?;
    let (vault, key) = (elsewhere.path().join("vault"), elsewhere.path().join("key"));
    copy_folder(&site.paths.vault, &vault).map_err(refused)?;
    fs::copy(&site.paths.recovery_key, &key).map_err(refused)?;
    unlock(&vault, &key)?;
    let opening =
        Opening { programs: &site.programs, vault: &vault, key: &key, state: &elsewhere.path().join("state") };
    let ledger = Ledger::load(&site.paths.ledger)?;
    let evidence = Evidence { start, ledger: &ledger, has_file_system, scratch: elsewhere.path() };
    let mut branch = opening.open(MACHINE, "latest", &["--throw-away"])?;
    let proof = prove("from the vault alone", &branch, &Claim::Exactly(ledger.writes.len() as u64), &evidence)?;
    branch.process.end()?;
    say(&proven(&proof))
}

fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Bytes of all files below `folder`.
pub(crate) fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// How long something took, in words.
pub(crate) fn spent(began: world::Monotonic) -> String {
    duration_ns(u64::try_from(SystemClock.monotonic().since(began).as_nanos()).unwrap_or(u64::MAX))
}
