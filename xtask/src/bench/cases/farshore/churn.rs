//! Sustained churn: the highest rate of random 4 KiB and sequential writes at which the newest recoverable moment stays
//! young, as the product itself says it (`vault status`, read with the recovery key several times a second).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::nbd_client::NbdClient;
use super::site::{Site, Way};
use super::{EXPORT, LIMIT};
use crate::bench::promises::{Promise, Promised};
use crate::bench::{Case, GIB, MIB, Measured, Reference, Subject};
use crate::process::{measure_processes, resident_bytes_peak, resident_file_bytes_now};

const MACHINE: &str = "churn";
const TARGET_MB_PER_S: u64 = 150;
/// Rates tried upwards from the target while they hold, and downwards while they do not, in MB/s.
const UPWARDS: [u64; 5] = [150, 200, 250, 300, 400];
const DOWNWARDS: [u64; 4] = [125, 100, 75, 50];
const RPO_LIMIT: Duration = Duration::from_secs(10);
/// How often the vault is asked.
const SAMPLE: Duration = Duration::from_millis(250);
/// Half of the bytes are written in requests of this size at random places, the other half in larger ones, in order.
const RANDOM_BYTES: u64 = 4096;
const SEQUENTIAL_BYTES: u64 = 256 << 10;
/// What is written: bytes of real files, so that they compress as real ones do.
const POOL_BYTES: u64 = 64 * MIB;

pub(in crate::bench::cases) struct Churn;

impl Case for Churn {
    fn name(&self) -> &'static str {
        "farshore-churn"
    }

    fn needs(&self) -> &'static [&'static str] {
        &[]
    }

    fn is_ours(&self) -> bool {
        true
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let large = subject.disk.size >= 4 * GIB;
        let (size, time) = if large { (4 * GIB, Duration::from_secs(30)) } else { (GIB, Duration::from_secs(15)) };
        let mut site = Site::make(scratch, subject.programs)?;
        File::create(site.image(MACHINE))?.set_len(size)?;
        site.join(MACHINE)?;
        site.start_agent(MACHINE, Way::Direct)?;
        site.wait_until("the machine is protected", LIMIT, || site.is_protected(MACHINE))?;
        let load = Load { pool: pool(subject.disk)?, size, time, protected_since: Said::by(&site)?.now };
        let mut measured = Measured::default();
        let mut best: Option<Step> = None;
        let mut attempt = |rate| -> Result<Step> {
            let step = load.step(&site, rate)?;
            println!("  {step}");
            measured.remarks.push(format!("Churn: {step}."));
            Ok(step)
        };
        for rate in UPWARDS {
            let step = attempt(rate)?;
            if !step.holds() {
                break;
            }
            best = Some(step);
        }
        for rate in DOWNWARDS {
            if best.is_some() {
                break;
            }
            best = Some(attempt(rate)?).filter(Step::holds);
        }
        let kept = best.as_ref().is_some_and(|step| step.rate >= TARGET_MB_PER_S);
        let text = best.map_or_else(|| "none of the rates tried held".to_owned(), |step| step.to_string());
        measured.promises.push(Promise::new(Promised::Churn, text, kept));
        let peak = resident_bytes_peak(site.agent_pid(MACHINE)?);
        let besides = peak.saturating_sub(site.ring_bytes(MACHINE)?);
        let text = format!("{:.1} MiB at most under churn", besides as f64 / MIB as f64);
        let files = resident_file_bytes_now(site.agent_pid(MACHINE)?) as f64 / MIB as f64;
        measured
            .remarks
            .push(format!("Churn: of the agent's memory {files:.1} MiB are its program and its mapped maps."));
        measured.promises.push(Promise::new(Promised::AgentMemory, text, besides <= 40 * MIB));
        Ok(measured)
    }
}

/// A part of the disk that holds data.
fn pool(disk: &Reference) -> Result<Vec<u8>> {
    let image = File::open(disk.image())?;
    let mut pool = vec![0; POOL_BYTES as usize];
    let offsets = disk.blocks_with_data((POOL_BYTES / RANDOM_BYTES) as usize)?;
    for (block, offset) in pool.chunks_exact_mut(RANDOM_BYTES as usize).zip(offsets) {
        image.read_exact_at(block, offset)?;
    }
    Ok(pool)
}

struct Load {
    pool: Vec<u8>,
    size: u64,
    time: Duration,
    /// Wall time; nothing is older than this.
    protected_since: Duration,
}

/// What one rate did.
struct Step {
    rate: u64,
    reached: f64,
    rpo_p50: Duration,
    rpo_p99: Duration,
    /// Writes that the ring could not carry.
    dropped: u64,
    cores: f64,
}

impl Step {
    fn holds(&self) -> bool {
        self.rpo_p99 <= RPO_LIMIT && self.reached >= 0.97 * self.rate as f64
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Step { rate, reached, rpo_p50, rpo_p99, dropped, cores } = self;
        let (p50, p99) = (rpo_p50.as_secs_f64(), rpo_p99.as_secs_f64());
        write!(f, "{rate} MB/s asked, {reached:.0} written, RPO p50 {p50:.1} s, p99 {p99:.1} s, {cores:.1} cores")?;
        if *dropped > 0 {
            write!(f, ", the ring overflowed ({dropped} writes healed)")?;
        }
        Ok(())
    }
}

impl Load {
    /// Writes at `rate` MB/s for the step's time while the vault is watched; then waits until it has caught up.
    fn step(&self, site: &Site, rate: u64) -> Result<Step> {
        println!("  writing {rate} MB/s for {} s", self.time.as_secs());
        let tracked = site.tracked_writes(MACHINE)?;
        let written = AtomicU64::new(0);
        let begun = Instant::now();
        let pids = [site.server_pid(), site.agent_pid(MACHINE)?];
        let (mut ages, usage) = measure_processes(&pids, begun, || {
            std::thread::scope(|scope| {
                let half = rate * 1_000_000 / 2;
                let writers = [RANDOM_BYTES, SEQUENTIAL_BYTES].map(|bytes| {
                    scope.spawn({
                        let written = &written;
                        move || self.write(site, half, bytes, written)
                    })
                });
                let mut ages = Vec::new();
                while begun.elapsed() < self.time {
                    std::thread::sleep(SAMPLE);
                    ages.push(self.rpo(site)?);
                }
                for writer in writers {
                    writer.join().expect("a writer does not panic")?;
                }
                Ok(ages)
            })
        })?;
        let took = usage.wall.as_secs_f64();
        let dropped = site.tracked_writes(MACHINE)? - tracked;
        // Judged too: a backlog that was still growing shows here.
        ages.push(self.rpo(site)?);
        site.wait_until("the vault has caught up", LIMIT, || {
            let protected = site.is_protected(MACHINE)?;
            Ok(protected && self.rpo(site)? < Duration::from_secs(5))
        })?;
        ages.sort_unstable();
        let at = |percent: usize| ages[(ages.len() * percent / 100).min(ages.len() - 1)];
        // The writers' time and not `took`, which ends when their last flush and the last look at the vault have ended.
        let reached = written.load(Ordering::Relaxed) as f64 / 1e6 / self.time.as_secs_f64();
        let cores = (usage.user + usage.system).as_secs_f64() / took;
        Ok(Step { rate, reached, rpo_p50: at(50), rpo_p99: at(99), dropped, cores })
    }

    /// Writes `rate` bytes a second in requests of `bytes`, at random places if they are small.
    fn write(&self, site: &Site, rate: u64, bytes: u64, written: &AtomicU64) -> Result<()> {
        let mut disk = NbdClient::connect(&site.disk_socket(MACHINE), EXPORT)?;
        let begun = Instant::now();
        let (mut state, mut done, mut next) = (bytes, 0, 0);
        while begun.elapsed() < self.time {
            let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
            if done >= due {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let from = (state >> 33) % ((POOL_BYTES - bytes) / RANDOM_BYTES) * RANDOM_BYTES;
            let offset = if bytes == RANDOM_BYTES { (state >> 20) % (self.size / bytes) * bytes } else { next };
            next = (next + bytes) % self.size;
            disk.write(offset, &self.pool[from as usize..][..bytes as usize])?;
            done += bytes;
            written.fetch_add(bytes, Ordering::Relaxed);
        }
        disk.flush()
    }

    /// The age of the newest moment that the vault can recover, now.
    fn rpo(&self, site: &Site) -> Result<Duration> {
        let said = Said::by(site)?;
        // Until a heal ends, nothing behind its gap can be recovered. A machine that nobody wrote to has no point before.
        let through = if said.open_gaps == 0 { said.proven_through } else { said.newest_point };
        Ok(said.now.saturating_sub(through.max(self.protected_since)))
    }
}

/// What the vault says of the machine. Moments are wall time.
struct Said {
    now: Duration,
    proven_through: Duration,
    newest_point: Duration,
    open_gaps: u64,
}

impl Said {
    fn by(site: &Site) -> Result<Said> {
        let status = site.vault_status(MACHINE)?.context("the vault does not know the machine")?;
        let number = |name: &str| status[name].as_u64().with_context(|| format!("the status has no {name}"));
        let time = |name: &str| number(name).map(Duration::from_nanos);
        let proven_through = time("proven_through_ns")?;
        let now = proven_through + time("rpo_ns")?;
        Ok(Said { now, proven_through, newest_point: time("newest_point_ns")?, open_gaps: number("open_gaps")? })
    }
}
