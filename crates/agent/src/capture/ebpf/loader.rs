//! Brings the programs into the kernel, or finds those of a predecessor.
//!
//! Everything is pinned below one directory of the BPF file system: maps, the programs that are asked for counters, and the
//! links, so that capture goes on whatever becomes of this process. The ledger's ready mark is set last; a directory
//! without it is the leftover of a start that was interrupted, and is removed.
//!
//! Order of attachment: completions first, submissions last. So no bio is noted as in flight whose end nobody would see,
//! and every bio that was submitted before is marked when it completes.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use aya::maps::Map;
use aya::programs::links::FdLink;
use aya::programs::{BtfTracePoint, RawTracePoint};
use aya::{Btf, Ebpf, EbpfLoader};

use super::kernel::{self, Area, KernelRing, PAGE_BYTES};
use super::layout::{Control, Cpu, PARTS_MAX, Target, targets_bytes};
use super::ledger::Ledger;
use super::pins;
use super::places::Place;
use super::support;
use super::types;
use super::{OpenEbpfError, Shape, Variant};

/// The programs, built from `bpf/capture.bpf.c`; `cargo xtask bpf --check` compares.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../bpf/capture.bpf.o");

/// Programs to load, and what is set in them besides what the kernel decides. Tests have others with mistakes.
pub(super) struct Object<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) settings: &'a [(&'static str, u32)],
}

/// The one.
pub(super) fn object() -> Object<'static> {
    Object { bytes: OBJECT, settings: &[] }
}

const MAPS: [&str; 7] = ["ring", "control", "cpus", "dirty", "ledger", "targets", "flights"];
/// System calls after which calibration is given up: 256 GiB of addresses each, so 256 TiB.
const CALIBRATION_CALLS: usize = 1024;
/// How often it is asked whether a skipped program has been made up for.
const RESCUE_TRIES: usize = 32;
/// A program whose recursion misses are watched.
const WATCHED: [&str; 3] = ["queue", "complete", "end"];
const MARKER: &str = "marker";

/// What runs in the kernel.
pub(super) struct Installed {
    pub(super) ring: KernelRing,
    /// The ring again, as what can be waited for.
    pub(super) ring_map: OwnedFd,
    pub(super) control: Area,
    pub(super) cpus: Area,
    pub(super) cpu_count: usize,
    pub(super) dirty: Area,
    pub(super) ledger: Ledger,
    pub(super) targets: OwnedFd,
    pub(super) flights: OwnedFd,
    pub(super) marker: OwnedFd,
    pub(super) watched: Vec<OwnedFd>,
}

impl Installed {
    /// A counter over all CPUs.
    pub(super) fn sum(&self, at: usize) -> u64 {
        (0..self.cpu_count)
            .map(|cpu| self.cpus.word(cpu * size_of::<Cpu>() + at).load(Ordering::SeqCst))
            .fold(0, u64::wrapping_add)
    }

    /// How often a program was not run because it was running already, and no second one took its place. Completions that
    /// were missed so leave flights behind; submissions that were missed so are marked when they complete.
    pub(super) fn misses(&self) -> u64 {
        // A program that cannot be asked counts nothing; it was asked when it was opened.
        let skipped: u64 =
            self.watched.iter().map(|program| kernel::recursion_misses(program.as_fd()).unwrap_or(0)).sum();
        // Asked afterwards, and again: the second one runs a moment after the first was skipped.
        let lost = || skipped.saturating_sub(self.sum(Cpu::RESCUED));
        for _ in 0..RESCUE_TRIES {
            if lost() == 0 {
                return 0;
            }
            std::thread::yield_now();
        }
        lost()
    }

    /// Tells the programs which parts of the whole disk `device` are protected: all of `parts`, none others. On return no
    /// program runs that was told otherwise.
    pub(super) fn aim(&self, device: u64, parts: &[Target]) -> io::Result<()> {
        assert!(parts.len() <= PARTS_MAX, "checked before");
        let bits = parts.iter().fold(0, |bits, part| bits | 1u64 << part.disk);
        let hands_on = self.control.word(Control::HANDS_ON);
        // Before they are captured. The bit of one that has left costs a look at other disks' ends, and no more.
        match support::hands_bios_on(device) {
            true => hands_on.fetch_or(bits, Ordering::SeqCst),
            false => hands_on.fetch_and(!bits, Ordering::SeqCst),
        };
        match parts {
            [] => kernel::delete(self.targets.as_fd(), device)?,
            parts => kernel::update(self.targets.as_fd(), device, &targets_bytes(parts))?,
        }
        // The kernel gives memory of the old entry to the next one at once: programs must have let go of it.
        kernel::wait_for_programs()
    }

    /// Appends the marker that the control page describes. `false`: no room, or nothing streams.
    pub(super) fn emit_marker(&self) -> io::Result<bool> {
        kernel::run(self.marker.as_fd()).map(|taken| taken == 1)
    }
}

/// Finds what a predecessor pinned in `directory`, if it is of this machine and has a ring of this size; otherwise removes it.
///
/// # Errors
/// It is there and fits, but cannot be opened.
pub(super) fn adopt(
    directory: &Path,
    digest: [u64; 2],
    ring_bytes: u64,
) -> Result<Option<(Installed, Shape)>, OpenEbpfError> {
    let pinned = |error| OpenEbpfError::Pins { path: directory.to_owned(), source: error };
    if !directory.exists() {
        return Ok(None);
    }
    let known = kernel::open_pin(&directory.join("ledger"))
        .and_then(|map| Area::of(map.as_fd(), PAGE_BYTES))
        .map(|area| Ledger::new(area).shape())
        .unwrap_or_default();
    let Some(shape) = known.filter(|known| known.digest == digest && known.ring_bytes == ring_bytes) else {
        tracing::info!(path = %directory.display(), "what was captured before does not fit and is taken down");
        pins::empty(directory).map_err(pinned)?;
        return Ok(None);
    };
    Ok(Some((open(directory, &shape).map_err(pinned)?, shape)))
}

fn open(directory: &Path, shape: &Shape) -> io::Result<Installed> {
    let map = |name: &str| kernel::open_pin(&directory.join(name));
    let cpu_count = possible_cpus()?;
    let ring_map = map("ring")?;
    Ok(Installed {
        ring: KernelRing::open(ring_map.as_fd(), shape.ring_bytes)?,
        ring_map,
        control: Area::of(map("control")?.as_fd(), size_of::<Control>())?,
        cpus: Area::of(map("cpus")?.as_fd(), cpu_count * size_of::<Cpu>())?,
        cpu_count,
        dirty: Area::of(map("dirty")?.as_fd(), shape.dirty_bytes())?,
        ledger: Ledger::new(Area::of(map("ledger")?.as_fd(), PAGE_BYTES)?),
        targets: map("targets")?,
        flights: map("flights")?,
        marker: map(MARKER)?,
        watched: WATCHED.into_iter().map(map).collect::<io::Result<_>>()?,
    })
}

/// Loads, calibrates, attaches and pins. Nothing streams yet.
pub(super) fn install(
    directory: &Path,
    shape: &Shape,
    places: &[Place],
    variants: &[Variant],
    object: &Object<'_>,
) -> Result<Installed, OpenEbpfError> {
    kernel::lift_memory_limit();
    let pinned = |error| OpenEbpfError::Pins { path: directory.to_owned(), source: error };
    // Before the library reads the same megabytes: together they would stay with this process.
    let queues_before = queues_before()?;
    let btf = Btf::from_sys_fs().map_err(|error| OpenEbpfError::Btf(error.to_string()))?;
    fs::create_dir_all(directory).map_err(pinned)?;
    let mut refusals = Vec::new();
    for variant in variants {
        let mut ebpf = load(shape, &btf, object, &queues_before)?;
        match programs(&mut ebpf, &btf, *variant) {
            Ok(()) => {
                let installed = pin_and_open(&ebpf, directory, shape, *variant).map_err(pinned)?;
                prepare(&installed, shape, &mut ebpf, places)?;
                attach(&mut ebpf, directory, *variant)?;
                installed.ledger.found(shape);
                tracing::info!(?variant, path = %directory.display(), "capture programs attached");
                return Ok(installed);
            }
            Err(refusal) => refusals.push(format!("{variant:?}: {refusal}")),
        }
    }
    Err(OpenEbpfError::Refused(refusals.join("; ")))
}

/// Whether the tracepoints of submissions and of requests issued have the queue as their first argument.
fn queues_before() -> Result<(u32, u32), OpenEbpfError> {
    let types = fs::read(types::OF_THE_KERNEL).map_err(OpenEbpfError::System)?;
    let before = |tracepoint: &str| match types::arguments_of(&types, tracepoint) {
        Some(count) => Ok(u32::from(count > 1)),
        None => Err(OpenEbpfError::Btf(format!("it does not tell the arguments of the tracepoint {tracepoint}"))),
    };
    Ok((before("block_bio_queue")?, before("block_rq_issue")?))
}

fn load(shape: &Shape, btf: &Btf, object: &Object<'_>, queues_before: &(u32, u32)) -> Result<Ebpf, OpenEbpfError> {
    let cpus = possible_cpus().map_err(OpenEbpfError::System)? as u32;
    let mut loader = EbpfLoader::new();
    for (name, value) in object.settings {
        loader.override_global(name, value, true);
    }
    loader
        .btf(Some(btf))
        .map_max_entries("ring", u32::try_from(shape.ring_bytes).map_err(|_| OpenEbpfError::RingSize)?)
        .map_max_entries("cpus", cpus)
        .map_max_entries("dirty", (shape.dirty_bytes() / 8) as u32)
        .override_global("queue_before_bio", &queues_before.0, true)
        .override_global("queue_before_request", &queues_before.1, true)
        .load(object.bytes)
        .map_err(|error| OpenEbpfError::Refused(chain(&error)))
}

/// The programs of a variant with the tracepoint of each, in the order in which they are attached.
fn plan(variant: Variant) -> [(&'static str, &'static str); 6] {
    let (queue, complete, end) = match variant {
        Variant::Dynptr => {
            ("queue_dynptr", ["complete_dynptr", "complete_dynptr_second"], ["end_dynptr", "end_dynptr_second"])
        }
        Variant::Bounded => {
            ("queue_bounded", ["complete_bounded", "complete_bounded_second"], ["end_bounded", "end_bounded_second"])
        }
    };
    // The kernel runs the programs of a tracepoint in the order in which they were attached.
    [
        (complete[0], "block_rq_complete"),
        (complete[1], "block_rq_complete"),
        (end[0], "block_bio_complete"),
        (end[1], "block_bio_complete"),
        ("issue", "block_rq_issue"),
        (queue, "block_bio_queue"),
    ]
}

fn tracepoint<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint, String> {
    let program = ebpf.program_mut(name).ok_or_else(|| format!("there is no program {name}"))?;
    program.try_into().map_err(|error| chain(&error))
}

fn raw<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut RawTracePoint, String> {
    let program = ebpf.program_mut(name).ok_or_else(|| format!("there is no program {name}"))?;
    program.try_into().map_err(|error| chain(&error))
}

/// Has the kernel verify every program of `variant`.
fn programs(ebpf: &mut Ebpf, btf: &Btf, variant: Variant) -> Result<(), String> {
    for (name, at) in plan(variant) {
        tracepoint(ebpf, name)?.load(at, btf).map_err(|error| format!("{name}: {}", chain(&error)))?;
    }
    for name in ["emit_marker", "calibrate"] {
        raw(ebpf, name)?.load().map_err(|error| format!("{name}: {}", chain(&error)))?;
    }
    Ok(())
}

fn pin_and_open(ebpf: &Ebpf, directory: &Path, shape: &Shape, variant: Variant) -> io::Result<Installed> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "the object lacks a map or a program");
    for name in MAPS {
        let fd = match ebpf.map(name).ok_or_else(missing)? {
            Map::Array(map) | Map::RingBuf(map) | Map::HashMap(map) => map.fd().as_fd(),
            _ => return Err(missing()),
        };
        kernel::pin(fd, &directory.join(name))?;
    }
    let plan = plan(variant);
    let named = [("emit_marker", MARKER), (plan[5].0, "queue"), (plan[0].0, "complete"), (plan[2].0, "end")];
    for (program, name) in named {
        let program = ebpf.program(program).ok_or_else(missing)?;
        let fd = program.fd().map_err(|error| io::Error::other(chain(&error)))?;
        kernel::pin(fd.as_fd(), &directory.join(name))?;
    }
    open(directory, shape)
}

/// Tells the programs where memory is and which disks are ours.
fn prepare(installed: &Installed, shape: &Shape, ebpf: &mut Ebpf, places: &[Place]) -> Result<(), OpenEbpfError> {
    let control = &installed.control;
    control.word(Control::MAP_CELLS).store(shape.map_cells, Ordering::SeqCst);
    let program = raw(ebpf, "calibrate").map_err(OpenEbpfError::Refused)?;
    let link = program.attach("sys_enter").map_err(|error| OpenEbpfError::Refused(chain(&error)))?;
    let calibrated = calibrate(control);
    program.detach(link).map_err(|error| OpenEbpfError::Refused(chain(&error)))?;
    calibrated?;
    // Epoch 1, marking only, until the engine rotates.
    installed.ledger.occupy(1, Some(replication::Epoch(1)));
    control.word(Control::WORD).store(super::opening_word(), Ordering::SeqCst);
    for (slot, place) in places.iter().enumerate() {
        installed.ledger.set_place(slot, place);
    }
    let devices: BTreeSet<u64> = places.iter().map(|place| place.device).collect();
    for device in devices {
        let of_it = places.iter().enumerate().filter(|(_, place)| place.device == device);
        let parts: Vec<Target> = of_it.map(|(slot, place)| Target::of(slot, place, 0)).collect();
        installed.aim(device, &parts).map_err(OpenEbpfError::System)?;
    }
    Ok(())
}

fn attach(ebpf: &mut Ebpf, directory: &Path, variant: Variant) -> Result<(), OpenEbpfError> {
    let refused = |error: String| OpenEbpfError::Refused(error);
    for (index, (name, _)) in plan(variant).into_iter().enumerate() {
        let program = tracepoint(ebpf, name).map_err(refused)?;
        let id = program.attach().map_err(|error| refused(format!("{name}: {}", chain(&error))))?;
        let link: FdLink = program.take_link(id).map_err(|error| refused(chain(&error)))?.into();
        link.pin(directory.join(format!("link_{index}"))).map_err(|error| refused(chain(&error)))?;
    }
    Ok(())
}

/// Lets the kernel find where its struct pages and the bytes of its pages lie. See the program of that name.
fn calibrate(control: &Area) -> Result<(), OpenEbpfError> {
    let failed = |why: &str| OpenEbpfError::Calibration(why.to_owned());
    let system = |error: rustix::io::Errno| OpenEbpfError::System(error.into());
    let file = rustix::fs::memfd_create("calibration", rustix::fs::MemfdFlags::CLOEXEC).map_err(system)?;
    let mut content = [0; PAGE_BYTES];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut content)).map_err(OpenEbpfError::System)?;
    let file = fs::File::from(file);
    file.write_all_at(&content, 0).map_err(OpenEbpfError::System)?;
    let map = memmap2::MmapOptions::new().len(PAGE_BYTES).populate().map_raw(&file).map_err(OpenEbpfError::System)?;
    let pagemap = fs::File::open("/proc/self/pagemap").map_err(OpenEbpfError::System)?;
    let mut entry = [0; 8];
    let at = map.as_ptr() as u64 / PAGE_BYTES as u64 * 8;
    pagemap.read_exact_at(&mut entry, at).map_err(OpenEbpfError::System)?;
    let frame = u64::from_ne_bytes(entry) & ((1 << 55) - 1);
    if frame == 0 {
        return Err(failed("the kernel does not tell where a page lies: CAP_SYS_ADMIN is needed"));
    }
    let words: Vec<u64> =
        content.chunks_exact(8).map(|word| u64::from_ne_bytes(*word.first_chunk().expect("8"))).collect();
    control.word(Control::CALIBRATE_PFN).store(frame, Ordering::SeqCst);
    control.word(Control::CALIBRATE_CONTENT).store(words[0], Ordering::SeqCst);
    control.word(Control::CALIBRATE_CONTENT + 8).store(words[1], Ordering::SeqCst);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file).cast_unsigned();
    control.half(Control::CALIBRATE_FD).store(fd, Ordering::SeqCst);
    control.half(Control::CALIBRATE_TGID).store(std::process::id(), Ordering::SeqCst);
    let found = (0..CALIBRATION_CALLS).any(|_| {
        // Any system call will do; this one changes nothing.
        let _ = rustix::process::getppid();
        control.half(Control::CALIBRATE_DONE).load(Ordering::SeqCst) != 0
    });
    control.half(Control::CALIBRATE_TGID).store(0, Ordering::SeqCst);
    if found { Ok(()) } else { Err(failed("a page of known content was not found in the kernel's memory")) }
}

/// CPUs that this machine may ever have.
fn possible_cpus() -> io::Result<usize> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, text))
}

/// The running kernel's version and patch level.
pub(super) fn kernel_release() -> Option<(u32, u32)> {
    let name = rustix::system::uname();
    let mut parts = name.release().to_str().ok()?.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn chain(error: &dyn std::error::Error) -> String {
    let text = crate::service::problem::chain(error);
    // The verifier's log is long; its end says what it did not like.
    let from = text.len().saturating_sub(600);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(from);
    text[from..].to_owned()
}
