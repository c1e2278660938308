//! Farshore itself: a disk behind `farshore-agent`, over TLS to `farshore server`, into an encrypted, deduplicated vault in
//! a folder, all on this machine.
//!
//! Times end when the vault can recover what is measured: a point of it is listed with the recovery key.

mod capture;
mod churn;
mod counted_link;
mod day;
mod failback;
mod fio;
mod idle;
mod nbd_client;
mod read;
mod site;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

pub(super) use self::capture::Capture;
pub(super) use self::churn::Churn;
pub(super) use self::day::Day;
pub(super) use self::idle::Idle;
use self::nbd_client::NbdClient;
use self::site::{Site, Way};
use crate::bench::disk::{copy_sparse, settle};
use crate::bench::promises::{Promise, Promised};
use crate::bench::{Case, MIB, Measured, Question, Reference, Row, Subject, Target, stored_bytes};
use crate::process::{Usage, measure_processes, resident_bytes_peak, thread_times};

/// How long one measurement may take at most; a full-size disk takes well under a tenth.
const LIMIT: Duration = Duration::from_secs(1800);
/// The machine that the measurements follow, and what its disk is called.
const MACHINE: &str = "first";
const EXPORT: &str = "disk";

/// From the first copy of a disk to its way home.
pub(super) struct Farshore;

impl Case for Farshore {
    fn name(&self) -> &'static str {
        "farshore"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["nbdcopy", "qemu-nbd"]
    }

    fn is_ours(&self) -> bool {
        true
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let disk = subject.disk;
        let mut site = Site::make(scratch, subject.programs)?;
        let mut measured = Measured::default();
        println!("  initial replication");
        first_copy(&mut site, disk, &mut measured)?;
        println!("  reading a branch");
        read::whole(&site, scratch, &mut measured)?;
        read::random(&site, disk, scratch, &mut measured)?;
        println!("  {} MiB of random 4 KiB writes", disk.changed_bytes / MIB);
        random_writes(&mut site, disk, &mut measured)?;
        println!("  a second machine with the same disk");
        second_machine(&mut site, disk, &mut measured)?;
        println!("  failback after a change of 1 %");
        failback::measure(&site, disk, &mut measured)?;
        Ok(measured)
    }
}

fn first_copy(site: &mut Site, disk: &Reference, measured: &mut Measured) -> Result<()> {
    // A copy of its own: the random writes go to it later, and then it is the disk that a branch comes home to.
    copy_sparse(disk.image(), &site.image(MACHINE))?;
    site.join(MACHINE)?;
    disk.warm()?;
    let (usage, stages) = replicate(site, MACHINE)?;
    let stored = site.vault_bytes()?;
    let mut row = Row::new(Question::FirstCopy, "farshore", usage).stored(stored);
    row.target = Target {
        time_ratio_max: Some((Promised::FirstCopyTime, 1.5)),
        stored_ratio_max: Some((Promised::FirstCopySize, 1.0)),
    };
    measured.rows.push(row.note("agent and server together; encrypted, any second from here on"));
    measured.remarks.push(format!("Initial replication, processor time by thread: {stages}."));
    // Nothing was written yet, so none of its ring was ever touched.
    let memory = resident_bytes_peak(site.agent_pid(MACHINE)?);
    let text = format!("{:.1} MiB at most during initial replication", memory as f64 / MIB as f64);
    measured.promises.push(Promise::new(Promised::AgentMemory, text, memory <= 40 * MIB));
    Ok(())
}

/// Starts the agent of `machine` and waits until its disk is in the vault. Also says which threads worked how long.
fn replicate(site: &mut Site, machine: &str) -> Result<(Usage, String)> {
    let started = Instant::now();
    let server = site.server_pid();
    let server_before = thread_times(server);
    site.start_agent(machine, Way::Direct)?;
    let agent = site.agent_pid(machine)?;
    let (stages, usage) = measure_processes(&[server, agent], started, || {
        site.wait_until("the machine is protected", LIMIT, || site.is_protected(machine))?;
        site.wait_until("the vault has a point", LIMIT, || Ok(site.has_point(machine, "latest")))?;
        let agent = thread_times(agent).since(&Default::default());
        Ok(format!("agent {agent}; server {}", thread_times(server).since(&server_before)))
    })?;
    Ok((usage, stages))
}

/// The same random 4 KiB writes that the peers see as a changed disk, through the agent's NBD export.
fn random_writes(site: &mut Site, disk: &Reference, measured: &mut Measured) -> Result<()> {
    // From here on through the relay that counts.
    site.stop_agent(MACHINE)?;
    site.start_agent(MACHINE, Way::Counted)?;
    site.wait_until("the machine is protected again", LIMIT, || site.is_protected(MACHINE))?;
    let before = site.vault_bytes()?;
    settle()?;
    let mut writer = NbdClient::connect(&site.disk_socket(MACHINE), EXPORT)?;
    let pids = [site.server_pid(), site.agent_pid(MACHINE)?];
    let sent_before = site.bytes_sent();
    let started = Instant::now();
    let ((written, whole), usage) = measure_processes(&pids, started, || {
        disk.for_each_change(|offset, block| writer.write(offset, block))?;
        writer.flush()?;
        let written = started.elapsed();
        // A ring that overflowed has to be healed first; what that costs is part of the figures.
        let marked = site.mark(MACHINE, "written");
        let whole = marked.is_ok();
        if let Err(error) = marked {
            println!("  {error:#}: marked again once it is protected");
            site.wait_until("the writes are healed", LIMIT, || site.is_protected(MACHINE))?;
            site.mark(MACHINE, "written")?;
        }
        site.wait_until("the writes are in the vault", LIMIT, || Ok(site.has_point(MACHINE, "written")))?;
        Ok((written, whole))
    })?;
    let sent = site.bytes_sent() - sent_before;
    let stored = site.vault_bytes()?.saturating_sub(before);
    site.stop_agent(MACHINE)?;
    let ratio = |bytes: u64| bytes as f64 / disk.changed_bytes as f64;
    for (promised, bytes, max) in
        [(Promised::RandomWritesSent, sent, 1.05), (Promised::RandomWritesStored, stored, 1.03)]
    {
        let text = format!("{:.3} × ({:.1} MiB)", ratio(bytes), bytes as f64 / MIB as f64);
        measured.promises.push(Promise::new(promised, text, ratio(bytes) <= max));
    }
    let broke = if whole { "" } else { "; it could not be marked before a heal" };
    let note = format!("written in {:.2} s; sent {:.1} MiB{broke}", written.as_secs_f64(), sent as f64 / MIB as f64);
    measured.rows.push(Row::new(Question::AfterRandomWrites, "farshore", usage).stored(stored).note(note));
    Ok(())
}

/// Another machine with the disk as it was at first: everything in it is known to the vault.
fn second_machine(site: &mut Site, disk: &Reference, measured: &mut Measured) -> Result<()> {
    const SECOND: &str = "second";
    let before = site.vault_bytes()?;
    // Nobody writes to it.
    disk.place_at(&site.image(SECOND))?;
    site.join(SECOND)?;
    disk.warm()?;
    let (usage, _) = replicate(site, SECOND)?;
    site.stop_agent(SECOND)?;
    let grown = site.vault_bytes()?.saturating_sub(before);
    let percent = grown as f64 * 100.0 / before as f64;
    let text = format!("{percent:.2} % ({:.1} MiB)", grown as f64 / MIB as f64);
    measured.promises.push(Promise::new(Promised::SecondMachine, text, percent <= 5.0));
    let row = Row::new(Question::FirstCopy, "farshore, a second machine with this disk", usage).stored(grown);
    measured.rows.push(row.note("new bytes only"));
    Ok(())
}

/// Bytes of a folder, for the site.
fn folder_bytes(path: &Path) -> Result<u64> {
    stored_bytes(path)
}
