//! The targets that the project set itself, and what became of them.

use std::fmt;

/// What was promised, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Promised {
    FirstCopyTime,
    FirstCopySize,
    SecondMachine,
    RandomWritesSent,
    RandomWritesStored,
    Churn,
    OpenBranch,
    ColdRead,
    WarmReads,
    AgentMemory,
    ServerMemory,
    FailbackBytes,
    FailbackTime,
    CaptureCapped,
    CaptureMemory,
    CaptureSequential,
    CaptureMarks,
    AgentRestart,
    IdleAgent,
}

impl Promised {
    fn what(self) -> &'static str {
        match self {
            Promised::FirstCopyTime => "initial replication into an encrypted, deduplicated, signed vault",
            Promised::FirstCopySize => "size of that vault",
            Promised::SecondMachine => "the same disk again from a second machine: new bytes in the vault",
            Promised::RandomWritesSent => "incompressible random 4 KiB writes: bytes sent",
            Promised::RandomWritesStored => "incompressible random 4 KiB writes: bytes stored",
            Promised::Churn => "random 4 KiB and sequential churn with RPO p99 ≤ 10 s",
            Promised::OpenBranch => "open a branch of a sparse 1 TiB disk after 17,280 seals",
            Promised::ColdRead => "sequential read of a branch, cold",
            Promised::WarmReads => "random 4 KiB reads on a branch, warm",
            Promised::AgentMemory => "memory of the agent besides its ring",
            Promised::ServerMemory => "memory of the process server per idle machine",
            Promised::FailbackBytes => "failback after a change of 1 %: bytes sent",
            Promised::FailbackTime => "failback after a change of 1 %: time until home follows, and what is read twice",
            Promised::CaptureCapped => {
                "eBPF: random 4 KiB writes, queue depth 16, on a device of 100 MB/s, all roles here"
            }
            Promised::CaptureMemory => "eBPF: the same on a memory device, beside a server that discards",
            Promised::CaptureSequential => {
                "eBPF: sequential 1 MiB writes on a device of 1 GB/s, beside a server that discards"
            }
            Promised::CaptureMarks => "eBPF: dirty map mode, random 4 KiB writes on a memory device",
            Promised::AgentRestart => "eBPF: from `kill -9` of the agent to streaming again",
            Promised::IdleAgent => "eBPF: an idle agent",
        }
    }

    fn target(self) -> &'static str {
        match self {
            Promised::FirstCopyTime => "≤ 1.5 × zstd -1 -T2",
            Promised::FirstCopySize => "≤ restic's",
            Promised::SecondMachine => "≤ 5 %",
            Promised::RandomWritesSent => "≤ 1.05 ×",
            Promised::RandomWritesStored => "≤ 1.03 ×",
            Promised::Churn => "≥ 150 MB/s",
            Promised::OpenBranch => "≤ 1 s, ≤ 200 MiB",
            Promised::ColdRead => "≥ 2 × restic dump's rate",
            Promised::WarmReads => "≥ 0.9 × qemu-nbd on raw",
            Promised::AgentMemory => "≤ 40 MiB",
            Promised::ServerMemory => "≤ 4 MiB",
            Promised::FailbackBytes => "≤ 1.1 × changed bytes",
            Promised::FailbackTime => "about one local read of the home disk, and ≤ 2 × changed bytes again",
            Promised::CaptureCapped => "≥ 0.90 × bare, no gap",
            Promised::CaptureMemory => "≥ 0.80 × bare",
            Promised::CaptureSequential => "≥ 0.90 × bare, no gap at 300 MB/s",
            Promised::CaptureMarks => "≥ 0.98 × bare",
            Promised::AgentRestart => "≤ 1 s, no gap",
            Promised::IdleAgent => "≤ 0.5 % of a core, ≤ 40 MiB besides the ring",
        }
    }
}

/// A promise and the figure that keeps or breaks it.
#[derive(Debug, Clone)]
pub(super) struct Promise {
    pub(super) promised: Promised,
    measured: String,
    kept: bool,
}

impl Promise {
    pub(super) fn new(promised: Promised, measured: impl Into<String>, kept: bool) -> Promise {
        Promise { promised, measured: measured.into(), kept }
    }

    /// A line of the table: what, target, measured, verdict.
    pub(super) fn cells(&self) -> Vec<String> {
        let verdict = if self.kept { "met" } else { "MISSED" };
        vec![self.promised.what().into(), self.promised.target().into(), self.measured.clone(), verdict.into()]
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.kept { "met" } else { "MISSED" };
        write!(f, "{}: {} ({}: {verdict})", self.promised.what(), self.measured, self.promised.target())
    }
}
