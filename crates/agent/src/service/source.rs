//! Where the machine's writes come from: which capture the disks get, and what the service needs of it besides the engine.
//!
//! All disks of a machine have one capture: they share one ring and one sequence.

use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use replication::MachineId;
use world::{Clock, FileDevice};

use super::problem::{Problem, ProblemKind};
use super::{maps_problem, patiently};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use crate::capture::ebpf::{self, EbpfCapture, EbpfConfig, EbpfCounters, EbpfDisk, OpenEbpfError, Variant};
use crate::capture::scan::{ScanCapture, ScanConfig, ScanCounters, ScanDisk, ScanStatus, witness};
use crate::capture::splitter::CloseError;
use crate::capture::{Capture, FileMapStore, Frozen, Splitter, SplitterConfig, SplitterDisk};
use crate::config::{AgentConfig, CaptureChoice, DiskConfig};
use crate::disks::FoundDisk;
use crate::state::{MAPS, StateDir};
use crate::status::WriteStatus;

/// The capture of all disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureKind {
    /// The disks are used through the agent.
    Splitter,
    /// The disks are used as ever; the kernel tells.
    Ebpf,
    /// The disks are used as ever; they are read again and again. Points exist only where a scan ended undisturbed.
    Scan,
}

impl CaptureKind {
    /// Its name in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            CaptureKind::Splitter => "splitter",
            CaptureKind::Ebpf => "ebpf",
            CaptureKind::Scan => "scan",
        }
    }
}

/// Which capture the configured disks get, and for disks that were left to choose, why not eBPF if it is not.
///
/// # Errors
/// The disks want different ones, or one that the machine does not offer.
pub fn choose_capture(config: &AgentConfig) -> Result<(CaptureKind, Option<String>), Problem> {
    let mut explicit = config.disks.iter().filter(|disk| disk.capture != CaptureChoice::Auto);
    let wanted = explicit.next();
    if let Some(first) = wanted
        && let Some(other) = explicit.find(|disk| disk.capture != first.capture)
    {
        return Err(Problem::usage(
            "the disks cannot be protected together",
            format!(
                "disk `{}` wants capture by {}, disk `{}` by {}",
                first.name, first.capture, other.name, other.capture
            ),
            "choose one capture for all disks of a machine",
        ));
    }
    let obstacle = || ebpf_obstacle(config);
    match wanted.map(|disk| (disk, disk.capture)) {
        Some((_, CaptureChoice::Splitter)) => Ok((CaptureKind::Splitter, None)),
        Some((_, CaptureChoice::Scan)) => Ok((CaptureKind::Scan, None)),
        Some((disk, CaptureChoice::Ebpf)) => match obstacle() {
            None => Ok((CaptureKind::Ebpf, None)),
            Some(why) => Err(Problem::failed(
                format!("disk `{}` cannot be captured by eBPF", disk.name),
                why,
                "mend that, or set capture = \"scan\" (points only when the disks rest), or capture = \"splitter\" and \
                 use the disks through the agent",
            )),
        },
        Some((_, CaptureChoice::Auto)) | None => Ok(match obstacle() {
            None => (CaptureKind::Ebpf, None),
            // Whoever uses block devices past the agent must not be taken for somebody who writes nothing.
            Some(why) if config.disks.iter().all(is_device) => (CaptureKind::Scan, Some(why)),
            Some(why) => (CaptureKind::Splitter, Some(why)),
        }),
    }
}

fn is_device(disk: &DiskConfig) -> bool {
    std::fs::metadata(&disk.path).is_ok_and(|found| found.file_type().is_block_device())
}

/// Why these disks cannot be captured by eBPF.
fn ebpf_obstacle(config: &AgentConfig) -> Option<String> {
    if let Some(image) = config.disks.iter().find(|disk| !is_device(disk)) {
        return Some(format!("{} is not a block device", image.path.display()));
    }
    machine_obstacle()
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn machine_obstacle() -> Option<String> {
    ebpf::support::check_machine().err()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn machine_obstacle() -> Option<String> {
    Some("this program captures by eBPF on x86-64 Linux only".to_owned())
}

/// What the service holds of the capture while the engine owns it.
#[derive(Clone)]
pub(crate) enum Source {
    Splitter(Splitter),
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    Ebpf(EbpfCounters),
    Scan(Arc<ScanCounters>),
}

impl Source {
    /// Takes the disks under protection.
    pub(super) fn open(
        kind: CaptureKind,
        config: &AgentConfig,
        state: &StateDir,
        found: &[FoundDisk],
        clock: Arc<dyn Clock>,
        machine: MachineId,
        boot: [u8; 16],
    ) -> Result<(Source, Box<dyn Capture>), Problem> {
        match kind {
            CaptureKind::Splitter => {
                let maps = patiently(|| FileMapStore::open(state.path(), MAPS)).map_err(maps_problem)?;
                let splitter_config = SplitterConfig { machine, boot, ring_bytes_max: config.ring_bytes_max };
                let protected = found.iter().map(FoundDisk::protected).collect();
                let (splitter, capture) =
                    Splitter::open(protected, &maps, clock, splitter_config).map_err(|error| {
                        Problem::caused("the disks cannot be protected", &error, "make room in the state directory")
                    })?;
                Ok((Source::Splitter(splitter), Box::new(capture)))
            }
            CaptureKind::Ebpf => open_ebpf(config, found, clock, machine),
            CaptureKind::Scan => open_scan(config, found, clock, machine),
        }
    }

    /// The disk as its users see it, where they use it through the agent.
    pub(super) fn served(&self, disk: &FoundDisk) -> Option<SplitterDisk> {
        match self {
            Source::Splitter(splitter) => Some(splitter.disk(disk.geometry.disk).expect("every disk found was opened")),
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Source::Ebpf(_) => None,
            Source::Scan(_) => None,
        }
    }

    pub(super) fn writes(&self) -> WriteStatus {
        let counts = match self {
            Source::Splitter(splitter) => splitter.counts(),
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Source::Ebpf(counters) => counters.counts(),
            Source::Scan(counters) => counters.counts(),
        };
        WriteStatus {
            changes: counts.changes,
            written_bytes: counts.written_bytes,
            tracked: counts.tracked,
            failed: counts.failed,
            untold: counts.untold,
        }
    }

    /// Brings disks that are used through the agent to rest; those of others are by their file systems.
    pub(crate) fn freeze(&self, limit: Duration) -> Result<Frozen, Problem> {
        match self {
            Source::Splitter(splitter) => splitter.freeze(limit).map_err(|error| {
                Problem::caused("the disks were not frozen", &error, "try again, with a longer limit if it timed out")
            }),
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Source::Ebpf(_) => Err(Problem::new(
                ProblemKind::WrongUsage,
                "the disks were not frozen",
                "disks captured by eBPF are used past the agent",
                "freeze their file systems",
            )),
            Source::Scan(_) => Err(Problem::new(
                ProblemKind::WrongUsage,
                "the disks were not frozen",
                "disks that are scanned are used past the agent",
                "freeze their file systems",
            )),
        }
    }

    /// Ends the service of the disks in order. What the kernel captures goes on without the agent.
    pub(super) fn close(&self, limit: Duration) -> Result<(), CloseError> {
        match self {
            Source::Splitter(splitter) => splitter.close(limit),
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Source::Ebpf(_) => Ok(()),
            Source::Scan(_) => Ok(()),
        }
    }

    /// How scanning goes, if the disks are scanned.
    pub(crate) fn scan(&self) -> Option<ScanStatus> {
        match self {
            Source::Scan(counters) => Some(counters.status()),
            _ => None,
        }
    }

    /// Has scanned disks be read at once.
    pub(crate) fn hurry(&self) {
        if let Source::Scan(counters) = self {
            counters.hurry();
        }
    }

    /// Whether the disks are used without the agent, whether it runs or not.
    pub(crate) fn used_past_the_agent(&self) -> bool {
        !matches!(self, Source::Splitter(_))
    }
}

fn open_scan(
    config: &AgentConfig,
    found: &[FoundDisk],
    clock: Arc<dyn Clock>,
    machine: MachineId,
) -> Result<(Source, Box<dyn Capture>), Problem> {
    let advice = "mend that, or choose another capture for all disks";
    let disk = |disk: &FoundDisk| {
        let what = format!("disk `{}` cannot be scanned", disk.name);
        let device = FileDevice::open_direct(disk.path()).map_err(|error| Problem::caused(&what, &error, advice))?;
        let witness = witness::of(disk.path(), &device).map_err(|error| Problem::caused(&what, &error, advice))?;
        Ok(ScanDisk { geometry: disk.geometry.clone(), device: Arc::new(device), witness })
    };
    let disks = found.iter().map(disk).collect::<Result<Vec<_>, Problem>>()?;
    let scan_config = ScanConfig {
        machine,
        ring_bytes_max: config.ring_bytes_max,
        quiet: Duration::from_millis(config.scan.quiet_ms),
        every: Duration::from_secs(config.scan.every_s),
        limits: config.limits,
    };
    let capture = ScanCapture::new(disks, clock, scan_config)
        .map_err(|error| Problem::caused("the disks cannot be scanned", &error, advice))?;
    Ok((Source::Scan(capture.counters()), Box::new(capture)))
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn open_ebpf(
    config: &AgentConfig,
    found: &[FoundDisk],
    clock: Arc<dyn Clock>,
    machine: MachineId,
) -> Result<(Source, Box<dyn Capture>), Problem> {
    let disks = found.iter().map(|disk| EbpfDisk { geometry: disk.geometry.clone(), path: disk.path().to_owned() });
    let ebpf_config = EbpfConfig {
        machine,
        pins: config.ebpf_pins(),
        ring_bytes_max: config.ring_bytes_max,
        variants: vec![Variant::Dynptr, Variant::Bounded],
    };
    let disks: Vec<EbpfDisk> = disks.collect();
    // A predecessor that was just killed may not have let go yet; anything else does not change by waiting.
    let opened = patiently(|| match EbpfCapture::open(disks.clone(), clock.clone(), &ebpf_config) {
        Err(error @ OpenEbpfError::InUse(_)) => Err(error),
        opened => Ok(opened),
    });
    let capture = opened.and_then(|opened| opened).map_err(|error| {
        let advice = match error {
            OpenEbpfError::InUse(_) => "stop the other agent, or set ebpf_pins to a place of its own for each",
            _ => "run `farshore-agent check`; or set capture = \"splitter\" and use the disks through the agent",
        };
        Problem::caused("the disks cannot be captured", &error, advice)
    })?;
    Ok((Source::Ebpf(capture.counters()), Box::new(capture)))
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn open_ebpf(
    _config: &AgentConfig,
    _found: &[FoundDisk],
    _clock: Arc<dyn Clock>,
    _machine: MachineId,
) -> Result<(Source, Box<dyn Capture>), Problem> {
    unreachable!("never chosen where it does not exist")
}
