//! The agent's configuration file. TOML; a key that is not known is an error, and keys name their unit.
//!
//! ```toml
//! state_dir = "/var/lib/farshore-agent"       # identity, dirty maps, sockets; not on a protected disk
//! machine_name = "db1"                        # for people; default: the host's name
//! server_addresses = ["ps1.example:7443"]     # process servers, tried in turn; default: those of the join token
//! ring_bytes_max = 67108864                   # send buffer in memory (64 MiB)
//! rotate_every_ms = 10000                     # how often the dirty maps begin anew
//! proof_every_ms = 500                        # how often an idle machine proves that nothing is missing
//! heal_chunk_bytes = 262144                   # disk bytes read at once by a heal; a multiple of 65536
//! nbd_socket = "/run/farshore-agent/nbd.sock" # default: nbd.sock in state_dir
//! nbd_tcp = "127.0.0.1:10809"                 # optional, loopback only
//! ebpf_pins = "/sys/fs/bpf/farshore-agent"    # where the kernel keeps the capture; one place for each agent
//!
//! [consistency]                               # all of it optional
//! crash_every_s = 300                         # crash-consistent markers on schedule; default 0: none
//! application_every_s = 3600                  # application-consistent points on schedule; default 0: none
//! freeze_limit_ms = 10000                     # file systems are thawed after so long, whatever happens
//! flush_limit_ms = 120000                     # for writing out what is dirty, before the freeze
//! script_limit_ms = 60000                     # for each script and hook; then its process group is killed
//! pre_script = "/etc/farshore-agent/pre"      # root's own, as is every directory above; run before the freeze
//! post_script = "/etc/farshore-agent/post"    # run after the thaw, whatever has happened
//!
//! [[consistency.hook]]
//! kind = "postgresql"                         # or "mysql" (and MariaDB)
//! user = "postgres"                           # runs the client; default: postgres, root for MySQL
//! program = "/usr/bin/psql"                   # default: psql or mysql in the usual places
//! arguments = ["--port=5433"]                 # before those of the hook
//!
//! [limits]                                    # how hard a heal may read; the live stream goes first in any case
//! heal_read_mb_per_s_max = 200                # megabytes of disk a second; default: no limit
//! heal_busy_percent_max = 50                  # of one core's time, waiting for the disk included; default: all of it
//!
//! [scan]                                      # for disks that are scanned
//! quiet_ms = 1000                             # disks at rest for so long are read, for a point
//! every_s = 60                                # disks that do not rest are read so often, to keep the copy near
//!
//! [scrub]                                     # source and vault are compared again and again; not with disks that are scanned
//! every_days = 30                             # a round begins so long after the last one; 0: only by `farshore-agent scrub`
//! read_mib_per_s = 8                          # mebibytes of disk read a second, at most
//!
//! [[disk]]
//! name = "root"                               # how the product calls the disk; never changes
//! path = "/srv/images/root.img"               # image file or block device
//! serial = "WD-1234"                          # optional; a block device must have it, an image file gets it
//! export = "root"                             # its NBD export; default: its name
//! capture = "auto"                            # "ebpf" sees every write of a block device, "splitter" those made through
//!                                             # the NBD export, "scan" none: it reads the disk again and again, and has
//!                                             # points only when it rests. auto: ebpf where all disks and the kernel
//!                                             # allow it, else scan for block devices, splitter for image files
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use replication::geometry::GRANULE_BYTES;
use replication::limits::{DISKS_MAX, NAME_BYTES_MAX};
use serde::{Deserialize, Serialize};

use crate::consistency::settings::ConsistencyConfig;
use crate::heal_pace::HealLimits;
use crate::scrub::ScrubSettings;
use crate::service::problem::Problem;

/// Default size of the send buffer, in bytes.
pub const RING_BYTES_DEFAULT: u64 = 64 << 20;
/// Smallest send buffer, in bytes. One that cannot hold the largest write of a machine breaks the stream at each.
pub const RING_BYTES_MIN: u64 = 64 << 10;
/// Largest send buffer, in bytes.
pub const RING_BYTES_MAX: u64 = 64 << 30;
/// Default time between rotations of the dirty maps, in milliseconds.
pub const ROTATE_EVERY_MS_DEFAULT: u64 = 10_000;
/// Default time between proofs, in milliseconds.
pub const PROOF_EVERY_MS_DEFAULT: u64 = 500;
/// Default bytes of disk that a heal reads at once. Sixteen such chunks are in memory during a heal.
pub const HEAL_CHUNK_BYTES_DEFAULT: u64 = 256 << 10;
/// Most bytes of disk that a heal reads at once: keeps its chunks within the agent's memory budget.
pub const HEAL_CHUNK_BYTES_MAX: u64 = 1 << 20;
/// Where the kernel keeps a capture by default.
pub const EBPF_PINS_DEFAULT: &str = "/sys/fs/bpf/farshore-agent";
/// Process server addresses at most.
pub const SERVER_ADDRESSES_MAX: usize = 16;
/// Longest path of a unix socket that Linux takes, in bytes.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The file's content. See the module's documentation for the keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Where the agent keeps its identity, its maps and its control socket.
    pub state_dir: PathBuf,
    /// The machine's name, for people. Empty: the host's name.
    #[serde(default)]
    pub machine_name: String,
    /// Process servers, `host:port`, tried in turn. Empty: those of the join token.
    #[serde(default)]
    pub server_addresses: Vec<String>,
    /// Size of the send buffer in bytes.
    #[serde(default = "ring_bytes_default")]
    pub ring_bytes_max: u64,
    /// Time between rotations of the dirty maps, in milliseconds.
    #[serde(default = "rotate_every_ms_default")]
    pub rotate_every_ms: u64,
    /// Time between proofs that nothing is missing, in milliseconds.
    #[serde(default = "proof_every_ms_default")]
    pub proof_every_ms: u64,
    /// Bytes of disk read at once by a heal.
    #[serde(default = "heal_chunk_bytes_default")]
    pub heal_chunk_bytes: u64,
    /// The unix socket on which the disks are served. None: `nbd.sock` in the state directory.
    #[serde(default)]
    pub nbd_socket: Option<PathBuf>,
    /// A loopback address on which the disks are served as well.
    #[serde(default)]
    pub nbd_tcp: Option<SocketAddr>,
    /// Where in the BPF file system the capture is kept. None: `/sys/fs/bpf/farshore-agent`.
    #[serde(default)]
    pub ebpf_pins: Option<PathBuf>,
    /// Points on schedule, and what brings applications to rest.
    #[serde(default)]
    pub consistency: ConsistencyConfig,
    /// How hard a heal may read.
    #[serde(default)]
    pub limits: HealLimits,
    /// How disks are scanned.
    #[serde(default)]
    pub scan: ScanSettings,
    /// How often and how fast source and vault are compared.
    #[serde(default)]
    pub scrub: ScrubSettings,
    /// The protected disks.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskConfig>,
}

/// One protected disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// What the product calls the disk, for its whole life.
    pub name: String,
    /// The image file or block device that holds it.
    pub path: PathBuf,
    /// What tells it from another disk. A block device must report exactly this; an image file is given it.
    #[serde(default)]
    pub serial: Option<String>,
    /// The name of its NBD export. None: its name.
    #[serde(default)]
    pub export: Option<String>,
    /// How its writes are captured.
    #[serde(default)]
    pub capture: CaptureChoice,
}

/// How a disk's writes are captured. All disks of a machine get the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureChoice {
    /// By eBPF if every disk is a block device and the machine offers it, otherwise block devices by scanning, image files by
    /// the splitter.
    #[default]
    Auto,
    /// By programs in the kernel, which see every write, whoever makes it.
    Ebpf,
    /// By serving the disk: only writes through its NBD export are seen.
    Splitter,
    /// By reading it again and again: points exist only where it rested meanwhile.
    Scan,
}

impl fmt::Display for CaptureChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CaptureChoice::Auto => "whatever fits",
            CaptureChoice::Ebpf => "eBPF",
            CaptureChoice::Splitter => "the splitter",
            CaptureChoice::Scan => "scanning",
        })
    }
}

/// How disks are scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScanSettings {
    /// Disks at rest for so long, in milliseconds, are read.
    pub quiet_ms: u64,
    /// Disks that do not rest are read so often, in seconds.
    pub every_s: u64,
}

impl Default for ScanSettings {
    fn default() -> ScanSettings {
        ScanSettings { quiet_ms: 1000, every_s: 60 }
    }
}

impl DiskConfig {
    /// A disk with every default.
    pub fn new(name: &str, path: &Path) -> DiskConfig {
        DiskConfig {
            name: name.to_owned(),
            path: path.to_owned(),
            serial: None,
            export: None,
            capture: CaptureChoice::Auto,
        }
    }

    /// The name of its NBD export.
    pub fn export_name(&self) -> &str {
        self.export.as_deref().unwrap_or(&self.name)
    }
}

fn ring_bytes_default() -> u64 {
    RING_BYTES_DEFAULT
}

fn rotate_every_ms_default() -> u64 {
    ROTATE_EVERY_MS_DEFAULT
}

fn proof_every_ms_default() -> u64 {
    PROOF_EVERY_MS_DEFAULT
}

fn heal_chunk_bytes_default() -> u64 {
    HEAL_CHUNK_BYTES_DEFAULT
}

impl AgentConfig {
    /// A configuration with every default, for `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> AgentConfig {
        AgentConfig {
            state_dir: state_dir.into(),
            machine_name: String::new(),
            server_addresses: Vec::new(),
            ring_bytes_max: RING_BYTES_DEFAULT,
            rotate_every_ms: ROTATE_EVERY_MS_DEFAULT,
            proof_every_ms: PROOF_EVERY_MS_DEFAULT,
            heal_chunk_bytes: HEAL_CHUNK_BYTES_DEFAULT,
            nbd_socket: None,
            nbd_tcp: None,
            ebpf_pins: None,
            limits: HealLimits::default(),
            scan: ScanSettings::default(),
            scrub: ScrubSettings::default(),
            consistency: ConsistencyConfig::default(),
            disks: Vec::new(),
        }
    }

    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// Names the key and what it should be.
    pub fn load(path: &Path) -> Result<AgentConfig, Problem> {
        let what = format!("the configuration {} cannot be used", path.display());
        let text = std::fs::read_to_string(path)
            .map_err(|error| Problem::usage(&what, error.to_string(), "name another file with --config"))?;
        AgentConfig::parse(&text).map_err(|problem| Problem { what, ..problem })
    }

    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// As [`AgentConfig::load`].
    pub fn parse(text: &str) -> Result<AgentConfig, Problem> {
        let config: AgentConfig = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
            let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            wrong(format!("{place}{}", error.message()), "correct the key; all keys are listed in the documentation")
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks every value that the types leave open.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn check(&self) -> Result<(), Problem> {
        if !self.state_dir.is_absolute() {
            return Err(wrong("state_dir is not an absolute path", "name the directory from the root on"));
        }
        if self.machine_name.len() > NAME_BYTES_MAX {
            return Err(wrong(format!("machine_name is longer than {NAME_BYTES_MAX} bytes"), "shorten it"));
        }
        if self.server_addresses.len() > SERVER_ADDRESSES_MAX {
            return Err(wrong(format!("more than {SERVER_ADDRESSES_MAX} server_addresses"), "name fewer"));
        }
        if let Some(bad) = self.server_addresses.iter().find(|address| !is_address(address)) {
            return Err(wrong(format!("the server address `{bad}` is not host:port"), "write it as ps1.example:7443"));
        }
        between("ring_bytes_max", self.ring_bytes_max, RING_BYTES_MIN, RING_BYTES_MAX)?;
        between("rotate_every_ms", self.rotate_every_ms, 100, 3_600_000)?;
        between("proof_every_ms", self.proof_every_ms, 50, 60_000)?;
        between("heal_chunk_bytes", self.heal_chunk_bytes, GRANULE_BYTES, HEAL_CHUNK_BYTES_MAX)?;
        if !self.heal_chunk_bytes.is_multiple_of(GRANULE_BYTES) {
            return Err(wrong(format!("heal_chunk_bytes is not a multiple of {GRANULE_BYTES}"), "round it"));
        }
        between("quiet_ms", self.scan.quiet_ms, 100, 3_600_000)?;
        between("every_s", self.scan.every_s, 1, 7 * 86_400)?;
        between("every_days", self.scrub.every_days.into(), 0, 3650)?;
        between("read_mib_per_s", self.scrub.read_mib_per_s.into(), 1, 100_000)?;
        if let Some(rate) = self.limits.heal_read_mb_per_s_max {
            between("heal_read_mb_per_s_max", rate.into(), 1, 1_000_000)?;
        }
        if let Some(percent) = self.limits.heal_busy_percent_max {
            between("heal_busy_percent_max", percent.into(), 1, 100)?;
        }
        if let Some(address) = self.nbd_tcp
            && !address.ip().is_loopback()
        {
            return Err(wrong(
                format!("nbd_tcp {address} is not a loopback address"),
                "disks are served in the clear: use 127.0.0.1, or the unix socket",
            ));
        }
        if !self.ebpf_pins().is_absolute() {
            return Err(wrong("ebpf_pins is not an absolute path", "name a directory below /sys/fs/bpf"));
        }
        for socket in [self.nbd_socket(), self.control_socket()] {
            if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
                return Err(wrong(
                    format!("the socket path {} is longer than {SOCKET_PATH_BYTES_MAX} bytes", socket.display()),
                    "choose a shorter state_dir or nbd_socket",
                ));
            }
        }
        self.consistency.check()?;
        self.check_disks()
    }

    fn check_disks(&self) -> Result<(), Problem> {
        if self.disks.is_empty() {
            return Err(wrong("no disk is named", "add a [[disk]] section for each disk to protect"));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(wrong(format!("more than {DISKS_MAX} disks are named"), "a machine has at most so many"));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let texts = [Some(&disk.name), disk.serial.as_ref(), disk.export.as_ref()];
            if texts.into_iter().flatten().any(|text| text.is_empty() || text.len() > NAME_BYTES_MAX) {
                return Err(wrong(
                    format!("disk {} has an empty or too long name, serial or export", index + 1),
                    format!("use 1 to {NAME_BYTES_MAX} bytes"),
                ));
            }
            if !disk.path.is_absolute() || disk.path.as_os_str().len() > NAME_BYTES_MAX {
                return Err(wrong(
                    format!("the path of disk `{}` is not an absolute path", disk.name),
                    "name it from the root on",
                ));
            }
            for other in &self.disks[..index] {
                if other.name == disk.name || other.path == disk.path || other.export_name() == disk.export_name() {
                    return Err(wrong(
                        format!("disks `{}` and `{}` share a name, a path or an export", other.name, disk.name),
                        "name each disk once",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The unix socket on which the disks are served.
    pub fn nbd_socket(&self) -> PathBuf {
        self.nbd_socket.clone().unwrap_or_else(|| self.state_dir.join("nbd.sock"))
    }

    /// Where in the BPF file system the capture is kept.
    pub fn ebpf_pins(&self) -> PathBuf {
        self.ebpf_pins.clone().unwrap_or_else(|| PathBuf::from(EBPF_PINS_DEFAULT))
    }

    /// The unix socket on which the running agent is asked and told things.
    pub fn control_socket(&self) -> PathBuf {
        self.state_dir.join("control.sock")
    }
}

fn wrong(why: impl Into<String>, advice: impl Into<String>) -> Problem {
    Problem::usage("the configuration cannot be used", why, advice)
}

fn between(key: &str, value: u64, least: u64, most: u64) -> Result<(), Problem> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(wrong(format!("{key} is {value}"), format!("choose a value from {least} to {most}")))
}

/// Whether `text` is a host and a port.
pub fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "state_dir = \"/s\"\n[[disk]]\nname = \"a\"\npath = \"/a.img\"\n";

    #[test]
    fn the_documented_file_is_valid_and_its_defaults_are_those_of_the_code() {
        let source = include_str!("config.rs");
        let lines = source.lines().skip_while(|line| *line != "//! ```toml").skip(1);
        let example: String = lines
            .take_while(|line| *line != "//! ```")
            .map(|line| line.trim_start_matches("//!").trim_start().to_owned() + "\n")
            .collect();
        let documented = AgentConfig::parse(&example).expect("the documentation is right");
        let smallest = AgentConfig::parse(SMALLEST).expect("valid");
        for config in [&documented, &smallest] {
            assert_eq!(config.ring_bytes_max, 64 << 20);
            assert_eq!((config.rotate_every_ms, config.proof_every_ms), (10_000, 500));
            assert_eq!(config.heal_chunk_bytes, 256 << 10);
        }
        assert_eq!(documented.scrub, smallest.scrub);
        assert_eq!(smallest.disks[0].export_name(), "a");
        assert_eq!(smallest.nbd_socket(), Path::new("/s/nbd.sock"));
        assert_eq!(documented.nbd_tcp.expect("given").port(), 10809);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            (format!("ring_bytes = 1\n{SMALLEST}"), "line 1: unknown field `ring_bytes`"),
            (format!("{SMALLEST}sise = 4\n"), "unknown field `sise`"),
            (format!("ring_bytes_max = 5\n{SMALLEST}"), "ring_bytes_max is 5"),
            (format!("heal_chunk_bytes = 65537\n{SMALLEST}"), "not a multiple of 65536"),
            (format!("{SMALLEST}[limits]\nheal_busy_percent_max = 101"), "heal_busy_percent_max is 101"),
            (format!("{SMALLEST}[limits]\nheal_read_mb_per_s_max = 0"), "heal_read_mb_per_s_max is 0"),
            (format!("{SMALLEST}[limits]\nspeed = 1"), "speed"),
            (format!("{SMALLEST}[scan]\nquiet_ms = 20"), "quiet_ms is 20"),
            (format!("{SMALLEST}[scrub]\nread_mib_per_s = 0"), "read_mib_per_s is 0"),
            (format!("{SMALLEST}[scrub]\nevery_days = 4000"), "every_days is 4000"),
            (format!("{SMALLEST}[scrub]\nevery_days = -1"), "invalid value"),
            (format!("{SMALLEST}[scrub]\nevery_hours = 1"), "unknown field `every_hours`"),
            (format!("nbd_tcp = \"10.0.0.1:1\"\n{SMALLEST}"), "not a loopback address"),
            (format!("server_addresses = [\"ps1\"]\n{SMALLEST}"), "not host:port"),
            ("state_dir = \"s\"".to_owned(), "not an absolute path"),
            ("state_dir = \"/s\"".to_owned(), "no disk is named"),
            (format!("{SMALLEST}[[disk]]\nname = \"b\"\npath = \"/a.img\"\n"), "share a name"),
            (SMALLEST.replace("/s", &format!("/{}", "s".repeat(100))), "longer than 107 bytes"),
            (SMALLEST.replace("\"a\"", "\"\""), "empty or too long name"),
        ] {
            let problem = AgentConfig::parse(&text).expect_err(expected);
            assert!(problem.why.contains(expected), "{expected}: {problem:?}");
            assert!(!problem.advice.is_empty(), "{problem:?}");
        }
    }
}
