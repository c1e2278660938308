//! What capture by eBPF costs the writer: `fio` on a disk in memory without an agent, with one that streams, and with one that
//! can only mark. Five times each, one behind the other, so that a noisy machine disturbs all of them alike; what counts is the
//! median of the ratios.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::fio::{Cap, MemoryDisk, Run, Shape, Written};
use super::site::{Running, Site, bare, enrol, output_of, start};
use crate::bench::promises::{Promise, Promised};
use crate::bench::{Case, GIB, MIB, Measured, Subject, cases};
use crate::process::{mapped_bytes_now, processor_time, resident_bytes_now};

const DISK_BYTES: u64 = 512 * MIB;
const PAIRS: usize = 5;
const SECONDS: u64 = 3;
const LIMIT: Duration = Duration::from_secs(60);
const SMALL: Shape = Shape { name: "4 KiB random", pattern: "randwrite", block_bytes: 4096, queue_depth: 16 };
const MIDDLE: Shape = Shape { name: "64 KiB random", pattern: "randwrite", block_bytes: 65_536, queue_depth: 8 };
const LARGE: Shape = Shape { name: "1 MiB sequential", pattern: "write", block_bytes: MIB, queue_depth: 4 };
/// On a machine with two processors the writer has one and everything else the other.
const WRITER: u32 = 0;
const OTHERS: u32 = 1;

pub(in crate::bench::cases) struct Capture;

impl Case for Capture {
    fn name(&self) -> &'static str {
        cases::CAPTURE
    }

    fn needs(&self) -> &'static [&'static str] {
        &["fio"]
    }

    fn hindrance(&self) -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("only root may load capture programs".to_owned());
        }
        (!Path::new("/sys/kernel/btf/vmlinux").exists()).then(|| "the kernel describes no types (BTF)".to_owned())
    }

    fn is_ours(&self) -> bool {
        true
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let mut measured = Measured::default();
        println!("  a memory device, beside a server that discards");
        on_memory(subject, scratch, &mut measured)?;
        println!("  a device of 100 MB/s, beside a server with a vault");
        on_a_slow_device(subject, scratch, &mut measured)?;
        Ok(measured)
    }
}

/// An agent with one disk, and what is needed to start it.
struct Agent {
    programs: PathBuf,
    folder: PathBuf,
    config: PathBuf,
    processor: Option<u32>,
    process: Option<Running>,
}

impl Agent {
    /// Enrols a machine whose disk is `device`.
    fn join(programs: &Path, folder: &Path, token: &str, device: &Path) -> Result<Agent> {
        fs::create_dir_all(folder)?;
        let (state, config) = (folder.join("state"), folder.join("agent.toml"));
        enrol(programs, "capture", token, &state)?;
        let pins = format!("/sys/fs/bpf/farshore-bench-{}", std::process::id());
        let words = format!(
            "state_dir = {state:?}\nmachine_name = \"capture\"\nebpf_pins = {pins:?}\n\n[[disk]]\nname = \"disk\"\n\
             path = {device:?}\ncapture = \"ebpf\"\n"
        );
        fs::write(&config, words)?;
        Ok(Agent { programs: programs.to_owned(), folder: folder.to_owned(), config, processor: None, process: None })
    }

    fn start(&mut self) -> Result<()> {
        let program = self.programs.join("farshore-agent");
        let mut command = match self.processor {
            Some(processor) => {
                let mut command = bare(Path::new("taskset"));
                command.args(["-c", &processor.to_string()]).arg(program);
                command
            }
            None => bare(&program),
        };
        self.process = Some(start(command.args(["run", "--config"]).arg(&self.config), &self.folder.join("log"))?.0);
        self.wait_protected()
    }

    fn wait_protected(&self) -> Result<()> {
        let began = Instant::now();
        while !self.status().is_ok_and(|status| status["state"] == "protected") {
            let log = || fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            ensure!(began.elapsed() < LIMIT, "the disk is not protected: {:?}\n{}", self.status(), log());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn ask(&self, word: &str) -> Result<String> {
        let mut command = bare(&self.programs.join("farshore-agent"));
        output_of(command.args(["--json", word, "--config"]).arg(&self.config))
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ask("status")?)?)
    }

    /// Writes that were marked only: each belongs to a gap.
    fn tracked(&self) -> Result<u64> {
        self.status()?["writes"]["tracked"].as_u64().context("the agent counts no writes")
    }

    fn process(&mut self) -> Result<&mut Running> {
        self.process.as_mut().context("the agent does not run")
    }

    fn pid(&self) -> Result<u32> {
        self.process.as_ref().map(Running::id).context("the agent does not run")
    }

    fn processor_time(&self) -> Result<Duration> {
        let (user, system) = processor_time(self.pid()?).context("the agent has gone")?;
        Ok(user + system)
    }

    /// Ends it in order and takes the programs out of the kernel.
    fn stop(&mut self) -> Result<()> {
        self.process()?.end()?;
        self.process = None;
        self.ask("detach").map(drop)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // After an error too nothing may stay in the kernel.
        if self.process.take().is_some() {
            let _ = self.ask("detach");
        }
    }
}

/// Runs of one shape: bare, and the same with an agent right after.
#[derive(Default)]
struct Pairs {
    ratios: Vec<f64>,
    bare_bytes_per_s: Vec<f64>,
    /// What a write cost the writer more, in nanoseconds of processor time.
    added_ns: Vec<f64>,
    /// Runs in which the ring overflowed.
    overflows: usize,
    agent: Duration,
    captured_bytes: f64,
}

impl Pairs {
    fn add(&mut self, bare: Written, with: Written) {
        self.ratios.push(with.bytes_per_s / bare.bytes_per_s);
        self.bare_bytes_per_s.push(bare.bytes_per_s);
        let each = |run: Written| run.processor.as_nanos() as f64 / run.writes;
        self.added_ns.push(each(with) - each(bare));
        self.captured_bytes += with.bytes;
    }

    fn ratio(&self) -> f64 {
        median(&self.ratios)
    }

    fn shown(&self) -> String {
        let (least, most) = self.ratios.iter().fold((f64::MAX, 0f64), |(a, b), ratio| (a.min(*ratio), b.max(*ratio)));
        format!("{:.2} × ({least:.2} to {most:.2}) of {:.0} MB/s", self.ratio(), median(&self.bare_bytes_per_s) / 1e6)
    }

    fn overflowed(&self) -> String {
        match self.overflows {
            0 => "no gap".to_owned(),
            runs => format!("a gap in {runs} of {PAIRS} runs"),
        }
    }

    fn agent_s_per_gib(&self) -> f64 {
        self.agent.as_secs_f64() / (self.captured_bytes / GIB as f64)
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One run with the agent in place.
fn captured(agent: &Agent, run: &Run<'_>, shape: &Shape, bare: Written, pairs: &mut Pairs) -> Result<()> {
    agent.wait_protected()?;
    let (before, used) = (agent.tracked()?, agent.processor_time()?);
    let with = run.write(shape)?;
    pairs.overflows += usize::from(agent.tracked()? > before);
    pairs.agent += agent.processor_time()? - used;
    pairs.add(bare, with);
    Ok(())
}

fn on_memory(subject: &Subject<'_>, scratch: &Path, measured: &mut Measured) -> Result<()> {
    let disk = MemoryDisk::make("fast", DISK_BYTES)?;
    let two = thread::available_parallelism().is_ok_and(|processors| processors.get() >= 2);
    let (writer, others) = if two { (Some(WRITER), Some(OTHERS)) } else { (None, None) };
    let mut discarding = bare(&subject.programs.join("examples/discarding_server"));
    if let Some(processor) = others {
        discarding = bare(Path::new("taskset"));
        discarding.args(["-c", &processor.to_string()]).arg(subject.programs.join("examples/discarding_server"));
    }
    let (server, said) = start(&mut discarding, &scratch.join("discarding.log"))?;
    let mut said = BufReader::new(said);
    let mut token = String::new();
    said.read_line(&mut token)?;
    // Its figures would fill the pipe.
    thread::spawn(move || said.lines().for_each(drop));
    let mut agent = Agent::join(subject.programs, &scratch.join("fast"), token.trim(), &disk.device)?;
    agent.processor = others;

    let run = |seconds| Run { device: &disk.device, seconds, cap: None, processor: writer, bytes_per_s_max: None };
    let gigabyte = Cap::new(&disk, 1_000_000_000)?;
    let capped = Run { cap: Some(&gigabyte), ..run(SECONDS) };
    let shapes = [SMALL, MIDDLE, LARGE];
    let (mut streamed, mut marked) = (<[Pairs; 3]>::default(), <[Pairs; 3]>::default());
    let mut sequential = Pairs::default();
    // The first run finds out where the device's memory is.
    run(SECONDS).write(&LARGE)?;
    for _ in 0..PAIRS {
        let bare = [run(SECONDS).write(&SMALL)?, run(SECONDS).write(&MIDDLE)?, run(SECONDS).write(&LARGE)?];
        let bare_sequential = capped.write(&LARGE)?;
        agent.start()?;
        for (index, shape) in shapes.iter().enumerate() {
            captured(&agent, &run(SECONDS), shape, bare[index], &mut streamed[index])?;
        }
        captured(&agent, &capped, &LARGE, bare_sequential, &mut sequential)?;
        // Nobody takes anything any more: the ring fills, and from then on writes are marked.
        agent.wait_protected()?;
        server.suspend(true)?;
        run(1).write(&LARGE)?;
        for (index, shape) in shapes.iter().enumerate() {
            let before = agent.tracked()?;
            let with = run(SECONDS).write(shape)?;
            let all = with.writes as u64;
            ensure!(agent.tracked()? - before >= all / 2, "the writes that were to be marked only were captured");
            marked[index].add(bare[index], with);
        }
        server.suspend(false)?;
        agent.wait_protected()?;
        agent.stop()?;
    }

    agent.start()?;
    let before = agent.tracked()?;
    let steady = Run { bytes_per_s_max: Some(300_000_000), ..run(10) }.write(&LARGE)?;
    let holds = agent.tracked()? == before && steady.bytes_per_s >= 290e6;
    let restart = restart(&mut agent, &run(8))?;
    let idle = idle(&agent)?;
    agent.stop()?;

    for (index, shape) in shapes.iter().enumerate() {
        let (streamed, marked) = (&streamed[index], &marked[index]);
        measured.remarks.push(format!(
            "Capture by eBPF, {} on a memory device, writer and everything else on a processor each: streaming {}, {}, {:+.0} ns of the \
             writer's processor a write, {:.2} s of the agent's a GiB; marking {}, {:+.0} ns.",
            shape.name,
            streamed.shown(),
            streamed.overflowed(),
            median(&streamed.added_ns),
            streamed.agent_s_per_gib(),
            marked.shown(),
            median(&marked.added_ns),
        ));
    }
    let small = &streamed[0];
    let text = format!("{}, {:+.0} ns a write, {}", small.shown(), median(&small.added_ns), small.overflowed());
    measured.promises.push(Promise::new(Promised::CaptureMemory, text, small.ratio() >= 0.80));
    measured.promises.push(Promise::new(Promised::CaptureMarks, marked[0].shown(), marked[0].ratio() >= 0.98));
    let text = format!(
        "{}, {}; {} at {:.0} MB/s for 10 s",
        sequential.shown(),
        sequential.overflowed(),
        if holds { "no gap" } else { "a gap" },
        steady.bytes_per_s / 1e6
    );
    measured.promises.push(Promise::new(Promised::CaptureSequential, text, sequential.ratio() >= 0.90 && holds));
    measured.promises.push(restart);
    measured.promises.push(idle);
    Ok(())
}

/// Kills the agent in the middle of writes, and starts it again at once.
fn restart(agent: &mut Agent, run: &Run<'_>) -> Result<Promise> {
    agent.wait_protected()?;
    let slow = Run { bytes_per_s_max: Some(4_000_000), ..*run };
    let (took, healed) = thread::scope(|scope| -> Result<(Duration, u64)> {
        let writing = scope.spawn(|| slow.write(&SMALL));
        thread::sleep(Duration::from_secs(2));
        agent.process()?.kill()?;
        let began = Instant::now();
        agent.start()?;
        let took = began.elapsed();
        let healed = agent.status()?["heal"]["sent_bytes"].as_u64().context("the agent tells of no heal")?;
        writing.join().expect("fio's thread does not panic")?;
        Ok((took, healed))
    })?;
    let gap = if healed == 0 { "no gap" } else { "a gap" };
    let text = format!("{:.2} s with 4 MB/s of 4 KiB writes, {gap}", took.as_secs_f64());
    Ok(Promise::new(Promised::AgentRestart, text, took <= Duration::from_secs(1) && healed == 0))
}

fn idle(agent: &Agent) -> Result<Promise> {
    const WATCHED: Duration = Duration::from_secs(20);
    agent.wait_protected()?;
    // What came before may still be committed and cleared.
    thread::sleep(Duration::from_secs(5));
    let before = agent.processor_time()?;
    thread::sleep(WATCHED);
    let share = (agent.processor_time()? - before).as_secs_f64() / WATCHED.as_secs_f64();
    let (kernels, resident) = (mapped_bytes_now(agent.pid()?, "bpf-map"), resident_bytes_now(agent.pid()?));
    let besides = resident.saturating_sub(kernels) as f64 / MIB as f64;
    let text = format!(
        "{:.2} % of a core; {besides:.1} MiB besides {:.1} MiB that it has mapped of the kernel's ring and maps",
        share * 100.0,
        kernels as f64 / MIB as f64
    );
    Ok(Promise::new(Promised::IdleAgent, text, share <= 0.005 && besides <= 40.0))
}

fn on_a_slow_device(subject: &Subject<'_>, scratch: &Path, measured: &mut Measured) -> Result<()> {
    let disk = MemoryDisk::make("slow", DISK_BYTES / 2)?;
    let folder = scratch.join("site");
    fs::create_dir_all(&folder)?;
    let site = Site::make(&folder, subject.programs)?;
    let mut agent = Agent::join(subject.programs, &scratch.join("slow"), &site.token()?, &disk.device)?;
    let cap = Cap::new(&disk, 100_000_000)?;
    let run = Run { device: &disk.device, seconds: SECONDS, cap: Some(&cap), processor: None, bytes_per_s_max: None };
    let mut pairs = Pairs::default();
    for _ in 0..PAIRS {
        let bare = run.write(&SMALL)?;
        agent.start()?;
        captured(&agent, &run, &SMALL, bare, &mut pairs)?;
        agent.wait_protected()?;
        agent.stop()?;
    }
    let text = format!("{}, {}", pairs.shown(), pairs.overflowed());
    let kept = pairs.ratio() >= 0.90 && pairs.overflows == 0;
    measured.promises.push(Promise::new(Promised::CaptureCapped, text, kept));
    Ok(())
}
