//! Reading a branch: the whole disk once, cold; and a small part of it over and over, beside qemu-nbd on a raw image.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::nbd_client::NbdClient;
use super::site::{Running, Site};
use super::{EXPORT, MACHINE};
use crate::bench::promises::{Promise, Promised};
use crate::bench::{MIB, Measured, Question, Reference, Row, measure_in};
use crate::process::{measure_processes, wait_without_reaping};

/// The part of the disk that is read over and over: it fits into the cache of a branch, which holds 64 MiB.
const WARM_BYTES: u64 = 32 * MIB;
const BLOCK: u64 = 4096;
/// Connections, and requests under way on each.
const CLIENTS: u64 = 2;
const DEPTH: usize = 4;
/// Each server is measured this often, in turns, for so long.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);

/// Reads the newest point as a branch, over NBD, and as a file. Nothing of it is in any cache of ours.
pub(super) fn whole(site: &Site, scratch: &Path, measured: &mut Measured) -> Result<()> {
    let started = Instant::now();
    let mut branch = site.open_branch(MACHINE, &["--throw-away"])?;
    let opened = started.elapsed();
    let mut copy = Command::new("nbdcopy").args(["--", &branch.uri, "null:"]).spawn().context("cannot run nbdcopy")?;
    let (status, usage) = measure_processes(&[branch.process.id(), copy.id()], started, || wait_without_reaping(&copy))
        .and_then(|((), usage)| Ok((copy.wait()?, usage)))?;
    ensure!(status.success(), "nbdcopy failed: {status}");
    branch.process.end()?;
    let mut row = Row::new(Question::WholeRead, "farshore branch open, nbdcopy", usage);
    row.target.time_ratio_max = Some((Promised::ColdRead, 0.5));
    measured.rows.push(row.note(format!("to nowhere; opened after {} ms", opened.as_millis())));

    let file = scratch.join("export.raw");
    let usage = measure_in(scratch, site.with_key(&["branch", "export", MACHINE, "--to"]).arg(&file))?;
    std::fs::remove_file(&file)?;
    let row = Row::new(Question::WholeRead, "farshore branch export", usage);
    measured.rows.push(row.note("to a sparse file, synced"));
    Ok(())
}

/// Random 4 KiB reads of a part that is in the caches of both.
pub(super) fn random(site: &Site, disk: &Reference, scratch: &Path, measured: &mut Measured) -> Result<()> {
    let mut branch = site.open_branch(MACHINE, &["--throw-away"])?;
    let theirs = scratch.join("qemu-nbd.sock");
    let mut command = Command::new("qemu-nbd");
    command.args(["-f", "raw", "-r", "-t", "-e", "8", "-x", EXPORT, "-k"]).arg(&theirs).arg(disk.image());
    let qemu = Running::start(command.stdin(Stdio::null()))?;
    site.wait_until("qemu-nbd listens", Duration::from_secs(10), || Ok(theirs.exists()))?;
    let blocks = disk.blocks_with_data((WARM_BYTES / BLOCK) as usize)?;
    let ours = branch.socket.clone();
    for (socket, export) in [(&ours, branch.export.as_str()), (&theirs, EXPORT)] {
        NbdClient::connect(socket, export)?.read_each(blocks.iter().copied(), BLOCK, DEPTH)?;
    }
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let own = reads_per_second(&ours, &branch.export, &blocks)?;
        rates.push((own, reads_per_second(&theirs, EXPORT, &blocks)?));
    }
    // The round in the middle: neither the luckiest nor the one that something disturbed.
    rates.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let (own, their) = rates[ROUNDS / 2];
    let text = format!("{:.2} × ({own:.0} against {their:.0} reads/s)", own / their);
    measured.promises.push(Promise::new(Promised::WarmReads, text, own >= 0.9 * their));
    drop(qemu);
    branch.process.end()
}

fn reads_per_second(socket: &Path, export: &str, blocks: &[u64]) -> Result<f64> {
    let begun = Instant::now();
    let counts: Vec<Result<u64>> = std::thread::scope(|scope| {
        let clients: Vec<_> = (1..=CLIENTS)
            .map(|seed| {
                scope.spawn(move || {
                    let mut state = seed;
                    let mut count = 0;
                    let offsets = std::iter::from_fn(|| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        count += 1;
                        let offset = blocks[(state >> 33) as usize % blocks.len()];
                        (begun.elapsed() < ROUND).then_some(offset)
                    });
                    NbdClient::connect(socket, export)?.read_each(offsets, BLOCK, DEPTH)?;
                    Ok(count)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("a reader does not panic")).collect()
    });
    let mut reads = 0;
    for count in counts {
        reads += count?;
    }
    Ok(reads as f64 / begun.elapsed().as_secs_f64())
}
