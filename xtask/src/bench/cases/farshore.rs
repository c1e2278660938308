//! Farshore itself: a disk behind `farshore-agent`, over TLS to `farshore server`, into an encrypted, deduplicated vault in
//! a folder, all on this machine.
//!
//! Times end when the vault can recover what is measured: a point of it is listed with the recovery key.

mod counted_link;
mod nbd_writer;
mod site;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::nbd_writer::NbdWriter;
use self::site::Site;
use crate::bench::{Case, MIB, Question, Reference, Row, Target, measure_in, stored_bytes};
use crate::process::{Usage, measure_processes, run};
use crate::workspace::cargo;

/// How long one measurement may take at most; a full-size disk takes well under a tenth.
const LIMIT: Duration = Duration::from_secs(1800);

pub(super) struct Farshore;

impl Case for Farshore {
    fn name(&self) -> &'static str {
        "farshore"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["nbdcopy"]
    }

    fn run(&self, disk: &Reference, scratch: &Path) -> Result<Vec<Row>> {
        run(cargo().args(["build", "--release", "--package", "farshore", "--bins"]))?;
        let mut site = Site::make(scratch)?;
        let mut rows = vec![first_copy(&mut site, disk)?];
        rows.extend(whole_read(&site, scratch)?);
        rows.push(random_writes(&mut site, disk)?);
        rows.push(second_machine(&mut site, disk)?);
        Ok(rows)
    }
}

fn first_copy(site: &mut Site, disk: &Reference) -> Result<Row> {
    // A copy of its own: the random writes go to it later.
    let image = site.image("first");
    run(Command::new("cp").args(["--sparse=always", "--reflink=auto", "--"]).arg(disk.image()).arg(&image))?;
    site.join("first", &image)?;
    disk.warm()?;
    let usage = replicate(site, "first")?;
    let mut row = Row::new(Question::FirstCopy, "farshore", usage).stored(site.vault_bytes()?);
    row.target = Target { time_ratio_max: Some(1.5), stored_ratio_max: Some(1.0) };
    Ok(row.note("agent and server together; encrypted, any second from here on"))
}

/// Starts the agent of `machine` and waits until its disk is in the vault.
fn replicate(site: &mut Site, machine: &str) -> Result<Usage> {
    let started = Instant::now();
    site.start_agent(machine)?;
    let pids = [site.server_pid(), site.agent_pid()?];
    let ((), usage) = measure_processes(&pids, started, || {
        site.wait_until("the machine is protected", LIMIT, || site.is_protected(machine))?;
        site.wait_until("the vault has a point", LIMIT, || Ok(site.has_point(machine, "latest")))
    })?;
    Ok(usage)
}

/// Reads the newest point as a branch, over NBD, and as a file. Nothing of it is in any cache of ours.
fn whole_read(site: &Site, scratch: &Path) -> Result<Vec<Row>> {
    let started = Instant::now();
    let mut branch = site.open_branch("first")?;
    let opened = started.elapsed();
    let mut copy = Command::new("nbdcopy").args(["--", &branch.uri, "null:"]).spawn().context("cannot run nbdcopy")?;
    let (status, usage) =
        measure_processes(&[branch.process.id(), copy.id()], started, || crate::process::wait_without_reaping(&copy))
            .and_then(|((), usage)| Ok((copy.wait()?, usage)))?;
    ensure!(status.success(), "nbdcopy failed: {status}");
    branch.process.end()?;
    let mut row = Row::new(Question::WholeRead, "farshore branch open, nbdcopy", usage);
    row.target.time_ratio_max = Some(0.5);
    let row = row.note(format!("to nowhere; opened after {} ms", opened.as_millis()));

    let file = scratch.join("export.raw");
    let usage = measure_in(scratch, site.with_key(&["branch", "export", "first", "--to"]).arg(&file))?;
    std::fs::remove_file(&file)?;
    Ok(vec![row, Row::new(Question::WholeRead, "farshore branch export", usage).note("to a sparse file, synced")])
}

/// The same random 4 KiB writes that the peers see as a changed disk, through the agent's NBD export.
fn random_writes(site: &mut Site, disk: &Reference) -> Result<Row> {
    let before = site.vault_bytes()?;
    let mut writer = NbdWriter::connect(&site.disk_socket("first"), "disk")?;
    let pids = [site.server_pid(), site.agent_pid()?];
    let sent_before = site.bytes_sent();
    let started = Instant::now();
    let (written, usage) = measure_processes(&pids, started, || {
        disk.for_each_change(|offset, block| writer.write(offset, block))?;
        writer.flush()?;
        let written = started.elapsed();
        site.mark("first", "written")?;
        site.wait_until("the writes are in the vault", LIMIT, || Ok(site.has_point("first", "written")))?;
        Ok(written)
    })?;
    let sent = site.bytes_sent() - sent_before;
    let stored = site.vault_bytes()?.saturating_sub(before);
    let ratio = |bytes: u64| bytes as f64 / disk.changed_bytes as f64;
    let note = format!(
        "written in {:.2} s; sent {:.1} MiB = {:.3} × (target ≤ 1.05), stored {:.3} × (target ≤ 1.03)",
        written.as_secs_f64(),
        sent as f64 / MIB as f64,
        ratio(sent),
        ratio(stored)
    );
    Ok(Row::new(Question::AfterRandomWrites, "farshore", usage).stored(stored).note(note))
}

/// Another machine with the disk as it was at first: everything in it is known to the vault.
fn second_machine(site: &mut Site, disk: &Reference) -> Result<Row> {
    site.stop_agent()?;
    let before = site.vault_bytes()?;
    let image = site.image("second");
    // Nobody writes to it.
    disk.place_at(&image)?;
    site.join("second", &image)?;
    disk.warm()?;
    let usage = replicate(site, "second")?;
    site.stop_agent()?;
    let grown = site.vault_bytes()?.saturating_sub(before);
    let percent = grown as f64 * 100.0 / before as f64;
    let row = Row::new(Question::FirstCopy, "farshore, a second machine with this disk", usage).stored(grown);
    Ok(row.note(format!("new bytes only: {percent:.2} % of the vault (target ≤ 5 %)")))
}

/// Bytes of a folder, for the site.
fn folder_bytes(path: &Path) -> Result<u64> {
    stored_bytes(path)
}
