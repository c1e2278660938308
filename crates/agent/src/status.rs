//! What the agent says about itself: one document for people, scripts and metrics.

use replication::sender::StreamState;
use serde::{Deserialize, Serialize};

use crate::capture::scan::ScanStatus;
use crate::consistency::ConsistencyStatus;
use crate::engine::EngineStatus;
use crate::scrub::ScrubProgress;

/// Version of this document. Fields are added; a change of meaning gets a new version.
pub const STATUS_FORMAT: u32 = 1;

/// The answer to: is this machine protected?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProtectionState {
    /// No session yet.
    Starting,
    /// A session stands; the disks are being compared or sent, and the newest points are incomplete.
    Healing,
    /// Every write is in the stream.
    Protected,
    /// No session. Writes are remembered in the ring and the maps.
    Disconnected,
    /// The server does not want this machine. A person is needed.
    Refused,
    /// Replication has ended because of a fault of the program. Disks are still served and writes remembered.
    Failed,
    /// The agent is ending in order.
    Stopping,
}

impl std::fmt::Display for ProtectionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ProtectionState::Starting => "starting",
            ProtectionState::Healing => "healing",
            ProtectionState::Protected => "protected",
            ProtectionState::Disconnected => "disconnected",
            ProtectionState::Refused => "refused",
            ProtectionState::Failed => "failed",
            ProtectionState::Stopping => "stopping",
        })
    }
}

/// A snapshot of the whole agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// [`STATUS_FORMAT`].
    pub format: u32,
    /// The program's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// The machine's id, in hex.
    pub machine: String,
    /// The machine's name.
    pub machine_name: String,
    /// Is it protected?
    pub state: ProtectionState,
    /// Seconds in this state.
    pub state_for_s: u64,
    /// What stands in the way, in words; empty if nothing.
    pub reason: String,
    /// How writes are captured: `ebpf`, `splitter` or `scan`.
    #[serde(default)]
    pub capture: String,
    /// How scanning goes, if the disks are scanned: points exist only at the ends of scans.
    #[serde(default)]
    pub scan: Option<ScanStatus>,
    /// How source and vault are compared again and again; null if that is not possible with this capture.
    #[serde(default)]
    pub scrub: Option<ScrubProgress>,
    /// The link to the process server.
    pub link: LinkStatus,
    /// With what it shows itself there.
    #[serde(default)]
    pub certificate: CertificateStatus,
    /// How far changes have come.
    pub watermarks: Watermarks,
    /// The send buffer.
    pub ring: RingStatus,
    /// The heal under way or, if none is, the last one.
    pub heal: HealStatus,
    /// What passed through the disks.
    pub writes: WriteStatus,
    /// The protected disks.
    pub disks: Vec<DiskStatus>,
    /// Where they are served.
    pub nbd: NbdStatus,
    /// Points taken at rest and on schedule.
    #[serde(default)]
    pub consistency: ConsistencyStatus,
}

/// The link to the process server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// A session stands.
    pub connected: bool,
    /// The server's address, of the session or of the latest attempt.
    pub server: String,
    /// Why the latest session or attempt ended; empty if none did.
    pub last_error: String,
    /// Sessions since the start.
    pub sessions: u64,
}

/// The certificate that a process server accepts this machine by.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// When it ends; it is renewed when a third of its life is left.
    pub ends: String,
    /// Why it was not renewed although it is time, and how long it is accepted; empty if all is well.
    pub problem: String,
}

/// Positions, written `generation.number`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermarks {
    /// Newest change numbered.
    pub captured: String,
    /// Newest change handed to the link.
    pub sent: String,
    /// Newest change durable on the process server.
    pub journaled: String,
    /// Newest change in the vault.
    pub committed: String,
}

/// The send buffer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingStatus {
    /// Bytes in use.
    pub used_bytes: u64,
    /// Its size in bytes.
    pub max_bytes: u64,
}

/// A heal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealStatus {
    /// Needed or running.
    pub active: bool,
    /// Bytes of disk that it covers.
    pub planned_bytes: u64,
    /// Bytes of disk looked at so far.
    pub compared_bytes: u64,
    /// Bytes of data that had to travel.
    pub sent_bytes: u64,
}

/// What passed through the disks since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteStatus {
    /// Requests that changed a disk.
    pub changes: u64,
    /// Data bytes written.
    pub written_bytes: u64,
    /// Requests that were only marked, because the stream was broken or not yet begun.
    pub tracked: u64,
    /// Requests that a disk refused.
    pub failed: u64,
    /// Requests whose end was not told in time, and that are not waited for any more.
    #[serde(default)]
    pub untold: u64,
}

/// A protected disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its number.
    pub disk: u16,
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: String,
    /// Its serial number.
    pub serial: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The name of its NBD export.
    pub export: String,
    /// Why it is not captured at the moment, or not all of it; empty if it is.
    #[serde(default)]
    pub problem: String,
}

/// Where the disks are served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdStatus {
    /// The unix socket.
    pub socket: String,
    /// TCP addresses.
    pub tcp: Vec<String>,
    /// Clients now.
    pub connections: u64,
}

impl AgentStatus {
    /// Takes over what the engine says of itself.
    pub(crate) fn take_engine(&mut self, engine: &EngineStatus) {
        let text = |number: replication::SequenceNumber| number.to_string();
        self.watermarks = Watermarks {
            captured: text(engine.captured),
            sent: text(engine.sent),
            journaled: text(engine.journaled),
            committed: text(engine.committed),
        };
        self.ring = RingStatus { used_bytes: engine.ring_bytes_used, max_bytes: engine.ring_bytes_max };
        self.heal = HealStatus {
            active: engine.healing,
            planned_bytes: engine.heal.planned_bytes,
            compared_bytes: engine.heal.compared_bytes,
            sent_bytes: engine.heal.sent_bytes,
        };
    }
}

/// Why the stream is not whole; empty if it is.
pub(crate) fn gap_in_words(stream: &StreamState) -> &str {
    match stream {
        StreamState::Whole => "",
        StreamState::Draining { cause, .. } | StreamState::Broken { cause, .. } => cause,
    }
}
