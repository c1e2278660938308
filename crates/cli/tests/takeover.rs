//! Which history counts, between real programs: a machine that failed over is refused until that is taken back; a branch does
//! not become the history of a machine that lives, unless that is said; a failback outlives its terminal; what a server
//! refuses to protect or to write to; and what the list of points says of disks that come and go.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/ledger.rs"]
mod ledger;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/site.rs"]
mod site;
#[allow(dead_code, reason = "shared with the way home")]
#[path = "kills/talking.rs"]
mod talking;

#[path = "field/skip.rs"]
mod skip;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::status::{AgentStatus, ProtectionState};
use link::{Connector, DenyList, Expected, Frame, FrameLink, LinkIdentity, LinkRuntime, Role, Trust};
use nbd::Client;
use replication::{ChainId, SequenceNumber};
use serde_json::Value;
use vault::chain::Phase;
use vault::{Catalog, ChainHistory};
use world::{BlockDevice, RealFiles, SystemClock};

use ledger::{DISK_BYTES, DISKS, Ledger};
use site::{Running, Site};
use skip::skip;
use talking::{LIMIT, Talking};

/// A refused agent tries again after half a minute.
const SOON: Duration = Duration::from_secs(120);

struct Ground {
    site: Site,
    _folder: tempfile::TempDir,
}

impl Ground {
    fn new() -> Ground {
        let folder = tempfile::Builder::new().prefix("ft").tempdir().expect("a temporary folder");
        let site = Site::make(folder.path(), &Ledger::new(11));
        Ground { site, _folder: folder }
    }

    fn at(&self, name: &str) -> String {
        self.site.path(name).display().to_string()
    }

    /// Starts `farshore` on the vault, with its recovery key.
    fn with_vault(&self, words: &[&str]) -> Talking {
        let (vault, key) = (self.at("vault"), self.at("key"));
        Talking::start(&self.site, &[words, &["--vault", &vault, "--recovery-key-file", &key]].concat())
    }

    fn serve_branch(&self, words: &[&str]) -> (Talking, String) {
        let state = self.at("branches");
        let branch = self.with_vault(&[words, &["--state-dir", &state]].concat());
        let chain = branch.event("open")["chain"].as_str().unwrap().to_owned();
        (branch, chain)
    }

    fn fail_back(&self, options: &[&str]) -> Talking {
        let state = self.at("branches");
        Talking::start(&self.site, &[&["failback", "away", "--state-dir", &state], options].concat())
    }

    #[track_caller]
    fn wait_for(&self, what: &str, done: impl Fn(&AgentStatus) -> bool) -> AgentStatus {
        let began = Instant::now();
        loop {
            match self.site.status() {
                Some(status) if done(&status) => return status,
                status => assert!(began.elapsed() < SOON, "never {what}: {status:?}\n{}", self.site.logs()),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn wait_protected(&self) -> AgentStatus {
        self.wait_for("protected", |status| status.state == ProtectionState::Protected)
    }

    /// Names the moment, and waits until the vault has it.
    #[track_caller]
    fn mark(&self, name: &str) -> Value {
        let began = Instant::now();
        while !self.site.mark(name) {
            assert!(began.elapsed() < LIMIT, "{}", self.site.logs());
        }
        loop {
            let points = self.site.with_key(&["vault", "points"], &["--markers"]);
            if let Some(point) = points.into_iter().find(|point| point["marker"] == name) {
                return point;
            }
            assert!(began.elapsed() < LIMIT, "{name} is not in the vault\n{}", self.site.logs());
        }
    }

    fn write(&self, offset: u64, byte: u8) {
        let client = Client::connect_unix(self.site.path("nbd"), "disk0").unwrap();
        client.write_at(offset, &[byte; 4096]).unwrap();
        client.flush().unwrap();
    }

    fn followed(&self) -> ChainId {
        let vault = self.site.unlock();
        let catalog = Catalog::load(vault.store(), vault.keys()).unwrap();
        catalog.machines.values().next().unwrap().chain
    }

    fn standing(&self, chain: ChainId) -> Phase {
        let vault = self.site.unlock();
        ChainHistory::load_all(vault.store(), vault.keys(), chain).unwrap().standing.phase
    }
}

#[test]
fn a_machine_that_failed_over_is_refused_until_that_is_cancelled_and_then_heals() {
    let ground = Ground::new();
    let server = ground.site.start_server();
    let agent = ground.site.start_agent();
    ground.wait_protected();
    ground.mark("before");
    let chain = ground.followed();
    // It lives, which somebody was wrong about.
    let (branch, successor) = ground.serve_branch(&["failover", "--source-is-lost", "--name", "away"]);
    let refused = ground.wait_for("refused", |status| status.state == ProtectionState::Refused);
    assert!(
        refused.reason.contains("closed by a failover") && refused.reason.contains(&successor),
        "{}",
        refused.reason
    );
    assert!(refused.reason.contains("farshore failover cancel"), "it says what to do: {}", refused.reason);
    assert!(matches!(ground.standing(chain), Phase::Closed(closed) if closed.successor.to_string() == successor));
    // The machine goes on writing, more than the ring holds: only its maps remember that.
    let disk = Client::connect_unix(ground.site.path("nbd"), "disk0").unwrap();
    for index in 0..100 {
        disk.write_at(index * 400 * 1024, &[0x5a; 64 << 10]).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    branch.kill();
    assert_eq!(ground.with_vault(&["failover", "cancel"]).end(), Some(0));
    let healed = ground.wait_protected();
    let sent = healed.heal.sent_bytes;
    assert!((2 << 20..DISK_BYTES / 2).contains(&sent), "what the maps name travels, and no more: {:?}", healed.heal);
    assert_eq!(ground.followed(), chain);
    let after = ground.mark("after");
    assert_eq!(after["chain"], chain.to_string());
    let points = ground.site.with_key(&["vault", "points"], &[]);
    let gap = points.iter().rfind(|point| point["type"] == "gap").unwrap();
    assert!(
        gap["until"].is_string() && gap["whole_machine"] == true,
        "the time in between is a gap that has ended: {gap}"
    );
    // It streams again: what is written now is in the next point, and so is what was written meanwhile.
    ground.write(8 << 20, 0x77);
    ground.mark("streams");
    agent.kill();
    let target = ground.at("exported");
    ground.site.with_key(&["branch", "export"], &["--at", "streams", "--disk", "0", "--to", &target]);
    assert!(fs::read(&target).unwrap() == fs::read(ground.site.image(0)).unwrap());
    ground.site.with_key(&["vault", "verify"], &[]);
    server.kill();
}

#[test]
fn a_branch_does_not_become_a_live_machines_history_unless_that_is_said() {
    let ground = Ground::new();
    let server = ground.site.start_server();
    let agent = ground.site.start_agent();
    ground.wait_protected();
    ground.mark("first");
    let chain = ground.followed();
    let (branch, drill) = ground.serve_branch(&["branch", "open", "--name", "away"]);
    let socket = ground.site.path(&format!("branches/{drill}/nbd.sock"));
    let client = Client::connect_unix(&socket, "disk0").unwrap();
    client.write_at(1 << 20, &[0xd1; 8192]).unwrap();
    client.flush().unwrap();
    let homes: Vec<String> = (0..DISKS).map(|disk| ground.at(&format!("home{disk}.raw"))).collect();
    for (disk, home) in homes.iter().enumerate() {
        fs::copy(ground.site.image(disk), home).unwrap();
    }
    let expected: Vec<Vec<u8>> = (0..DISKS)
        .map(|disk| {
            let mut bytes = vec![0; DISK_BYTES as usize];
            Client::connect_unix(&socket, &format!("disk{disk}")).unwrap().read_at(0, &mut bytes).unwrap();
            bytes
        })
        .collect();
    let to: Vec<String> = homes.iter().enumerate().map(|(disk, home)| format!("{disk}={home}")).collect();
    let to: Vec<&str> = to.iter().flat_map(|home| ["--to", home]).collect();

    // Nobody failed over, and the machine is heard from: its history stays its own, and home is not touched.
    let before: Vec<Vec<u8>> = homes.iter().map(|home| fs::read(home).unwrap()).collect();
    let failback = ground.fail_back(&to);
    let failed = failback.event("failed");
    assert!(failed["problem"].as_str().unwrap().contains("victim has not failed over"), "{failed}");
    assert_eq!(failback.end(), Some(4));
    let errors = fs::read_to_string(ground.site.path("talking.log")).unwrap();
    assert!(errors.contains("heard from") && errors.contains("--close-history"), "what, why, what to do: {errors}");
    assert!(homes.iter().zip(&before).all(|(home, before)| fs::read(home).unwrap() == *before), "home was not touched");
    assert_eq!(ground.followed(), chain);
    assert_eq!(ground.site.status().unwrap().state, ProtectionState::Protected, "replication was not disturbed");
    ground.mark("undisturbed");

    // Said explicitly. The terminal dies on the way, and the failback goes on without it.
    let words = [&to[..], &["--close-history", "--wait-for-go"]].concat();
    let failback = ground.fail_back(&words);
    failback.event("following");
    failback.kill();
    let elsewhere = ["--to", &format!("0={}", homes[1]), "--to", &format!("1={}", homes[0])];
    let other = ground.fail_back(&elsewhere);
    assert_eq!(other.end(), Some(4), "another destination is another failback");
    assert_eq!(ground.fail_back(&["--cancel"]).end(), Some(0));
    assert_ne!(ground.fail_back(&["--cancel"]).end(), Some(0), "nothing is left to stop");
    assert_ne!(ground.fail_back(&[]).end(), Some(0), "nothing runs to go on with");
    let failback = ground.fail_back(&words);
    failback.event("following");
    failback.kill();
    assert!(matches!(ground.standing(chain), Phase::Open), "nothing is closed before home is proved equal");
    let mut failback = ground.fail_back(&["--wait-for-go"]);
    failback.event("attached");
    failback.event("following");
    failback.tell("go");
    let done = failback.event("done");
    assert_eq!(failback.end(), Some(0));
    assert_eq!(branch.end(), Some(0));
    assert!(done["proof_read_bytes"].as_u64().unwrap() < DISK_BYTES / 4, "home was read once: {done}");
    for (home, expected) in homes.iter().zip(&expected) {
        assert!(fs::read(home).unwrap() == *expected, "{home} holds what the branch held");
    }
    let drill: ChainId = drill.parse().unwrap();
    assert_eq!(ground.followed(), drill);
    assert!(
        matches!(ground.standing(chain), Phase::Ended(closed) if closed.successor == drill),
        "by the manifests of a failover"
    );

    // The agent lived through it, on disks that nothing came home to.
    let refused = ground.wait_for("refused for good", |status| {
        status.state == ProtectionState::Refused && status.reason.contains("stop this agent")
    });
    assert!(refused.reason.contains(&drill.to_string()), "{}", refused.reason);
    ground.write(3 << 20, 0x66);
    agent.kill();
    // Started again on what came home, nothing travels a second time.
    for (disk, home) in homes.iter().enumerate() {
        fs::copy(home, ground.site.image(disk)).unwrap();
    }
    let agent = ground.site.start_agent();
    let status = ground.wait_protected();
    assert!(status.heal.sent_bytes < 1 << 20, "nothing is sent again: {:?}", status.heal);
    assert_eq!(ground.mark("home")["chain"], drill.to_string());
    server.kill();
    let server = ground.site.start_server();
    ground.wait_protected();
    ground.write(5 << 20, 0x44);
    ground.mark("after a restart of the server");
    let log = fs::read_to_string(ground.site.path("server.log")).unwrap();
    assert!(!log.contains("not brought home"), "the server takes the machine up on the branch's chain:\n{log}");
    agent.kill();
    let target = ground.at("exported");
    ground
        .site
        .with_key(&["branch", "export"], &["--at", "after a restart of the server", "--disk", "0", "--to", &target]);
    assert!(fs::read(&target).unwrap() == fs::read(ground.site.image(0)).unwrap());
    ground.site.with_key(&["vault", "verify"], &[]);
    server.kill();
}

/// Ends the agent in order, so that its stream goes on with the next one.
fn stop(agent: Running) {
    says("kill", &["-TERM", &agent.id().to_string()]).expect("told");
    let stat = format!("/proc/{}/stat", agent.id());
    let began = Instant::now();
    // It stays behind as a zombie until somebody waits for it.
    while fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
        assert!(began.elapsed() < LIMIT, "the agent does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The list of points as people see it, with what was wrapped put together again.
fn listed(ground: &Ground) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
    command.env("FARSHORE_SEEN_HEADS", ground.site.path("seen")).args([
        "vault",
        "points",
        "--vault",
        &ground.at("vault"),
    ]);
    let output = command.args(["--recovery-key-file", &ground.at("key")]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().all(|line| line.chars().count() <= 100), "it fits:\n{text}");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn points_say_which_disks_they_lack() {
    let ground = Ground::new();
    let server = ground.site.start_server();
    let agent = ground.site.start_agent();
    ground.wait_protected();
    ground.mark("two disks");
    stop(agent);
    // A disk that takes a while to compare joins.
    let late = ground.site.path("late.raw");
    let mut noise = vec![0; 128 << 20];
    blake3::Hasher::new().update(b"late").finalize_xof().fill(&mut noise);
    fs::write(&late, noise).unwrap();
    let config = fs::read_to_string(ground.site.path("agent.toml")).unwrap();
    let with_late = format!("{config}\n[[disk]]\nname = \"late\"\npath = {late:?}\n");
    fs::write(ground.site.path("agent.toml"), with_late).unwrap();
    let agent = ground.site.start_agent();
    let began = Instant::now();
    let mut meanwhile = 0;
    while ground.site.status().is_none_or(|status| status.state != ProtectionState::Protected) {
        assert!(began.elapsed() < SOON, "{}", ground.site.logs());
        if ground.site.mark(&format!("meanwhile {meanwhile}")) {
            meanwhile += 1;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    ground.mark("three disks");
    let points = ground.site.with_key(&["vault", "points"], &["--limit", "1000"]);
    let gaps: Vec<&Value> = points.iter().filter(|it| it["type"] == "gap" && it["whole_machine"] == false).collect();
    let [gap] = &gaps[..] else { panic!("one gap is the new disk's alone: {gaps:?}") };
    assert!(gap["scope"].as_str().unwrap().contains("disk 2") && gap["until"].is_string(), "{gap}");
    let lacking = |marker: &str| {
        let said = ground.site.with_key(&["vault", "points"], &["--at", marker]);
        said[0]["lacking"].as_array().unwrap().clone()
    };
    assert!(lacking("two disks").is_empty(), "it was not protected then");
    assert!(lacking("three disks").is_empty());
    let place = |value: &Value| value.as_str().unwrap().parse::<SequenceNumber>().unwrap();
    let inside = points.iter().find(|it| {
        let is_ours = it["marker"].as_str().is_some_and(|name| name.starts_with("meanwhile"));
        is_ours
            && place(&it["sequence"]) > place(&gap["after"])
            && place(&it["sequence"]) < place(&gap["until_sequence"])
    });
    let inside = inside.unwrap_or_else(|| panic!("a marker of {meanwhile} lies in the gap {gap}"));
    let lacks = lacking(inside["marker"].as_str().unwrap());
    assert_eq!(lacks.len(), 1, "{inside}");
    assert_eq!(lacks[0]["scope"], gap["scope"]);
    let text = listed(&ground);
    let cause = gap["cause"].as_str().unwrap();
    assert!(
        text.contains(cause) && text.contains(gap["scope"].as_str().unwrap()),
        "{cause:?} is told in full:\n{text}"
    );
    // It is taken out again.
    stop(agent);
    fs::write(ground.site.path("agent.toml"), config).unwrap();
    let agent = ground.site.start_agent();
    ground.wait_protected();
    ground.mark("without it");
    let points = ground.site.with_key(&["vault", "points"], &["--limit", "1000"]);
    let removal = points.iter().find(|it| it["type"] == "removal").unwrap_or_else(|| panic!("no removal: {points:?}"));
    assert_eq!(removal["disk"], 2);
    assert!(listed(&ground).contains("late.raw) is not protected any more"), "{}", listed(&ground));
    agent.kill();
    server.kill();
}

/// Runs `farshore-agent scrub`; whether it did, and what it said.
fn begin_scrub(ground: &Ground, words: &[&str]) -> (Option<i32>, String) {
    let state = ground.at("agent");
    let words = [&["scrub", "--state-dir", &state], words].concat();
    let run = Command::new(env!("CARGO_BIN_EXE_farshore-agent")).args(words).stdin(Stdio::null()).output().unwrap();
    let said = [run.stdout, run.stderr].concat();
    (run.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// What the disk became behind the agent's back is found, healed, and told of the points in between.
#[test]
fn a_scrub_finds_what_was_written_past_the_agent_and_its_points_say_so() {
    let ground = Ground::new();
    let config = fs::read_to_string(ground.site.path("agent.toml")).unwrap();
    let scrubbed = format!("{config}\n[scrub]\nevery_days = 0\nread_mib_per_s = 1000\n");
    fs::write(ground.site.path("agent.toml"), scrubbed).unwrap();
    let server = ground.site.start_server();
    let agent = ground.site.start_agent();
    ground.wait_protected();
    ground.mark("before");
    let scrub = |words: &[&str]| {
        assert_eq!(begin_scrub(&ground, words).0, Some(0));
        std::thread::sleep(Duration::from_millis(250));
        let ended = |status: &AgentStatus| {
            status.scrub.is_some_and(|scrub| !scrub.running) && status.state == ProtectionState::Protected
        };
        ground.wait_for("scrubbed", ended).scrub.unwrap()
    };
    let clean = scrub(&[]);
    assert_eq!((clean.same_bytes, clean.differing_bytes, clean.rounds), (DISKS as u64 * DISK_BYTES, 0, 1));
    ground.write(2 << 20, 0x11);
    ground.mark("not wrong yet");
    let image = fs::OpenOptions::new().write(true).open(ground.site.image(1)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[0xee; 8192], 3 << 20).unwrap();
    ground.mark("wrong");
    let found = scrub(&["disk1"]);
    assert_eq!((found.differing_bytes, found.rounds), (8192, 1), "{found:?}");
    ground.mark("healed");
    let lacking = |marker: &str| {
        let said = ground.site.with_key(&["vault", "points"], &["--at", marker]);
        said[0]["lacking"].as_array().unwrap().clone()
    };
    assert!(lacking("before").is_empty(), "it was found equal since");
    assert!(lacking("healed").is_empty());
    for marker in ["not wrong yet", "wrong"] {
        let [lacks] = &lacking(marker)[..] else { panic!("{marker} lacks {:?}", lacking(marker)) };
        assert_eq!(lacks["scope"], "bytes 3145728..3153920 of disk 1");
        let cause = lacks["cause"].as_str().unwrap();
        assert!(
            cause.starts_with("suspect: a scrub found") && cause.contains("last known to be equal at 2"),
            "{cause}"
        );
    }
    let text = listed(&ground);
    assert!(text.contains("suspect: a scrub found it to differ"), "{text}");
    let (code, said) = begin_scrub(&ground, &["disk7"]);
    assert!(code == Some(2) && said.contains("disk7") && said.contains("disk1"), "{code:?} {said}");
    agent.kill();
    let target = ground.at("exported");
    ground.site.with_key(&["branch", "export"], &["--at", "healed", "--disk", "1", "--to", &target]);
    assert!(fs::read(&target).unwrap() == fs::read(ground.site.image(1)).unwrap());
    ground.site.with_key(&["vault", "verify"], &[]);
    server.kill();
}

/// The answer of the server at `address` to an order of a branch host that speaks another version.
fn answer_to_another_version(state: &Path, address: &str) -> Value {
    let identity = LinkIdentity::load(&RealFiles::new(state), "link.identity").unwrap().unwrap();
    let clock = Arc::new(SystemClock);
    let trust = Trust::new(identity.authority.clone(), clock.clone(), DenyList::default());
    let connector = Connector::new(LinkRuntime::new(1).unwrap(), identity, trust, clock);
    let link = connector.connect(address, &Expected { role: Role::ProcessServer, id: None }).unwrap();
    let order = r#"{"say":"order","version":7,"machines":["of a kind that version 7 knows"],"where":"somewhere"}"#;
    link.send(Frame::new(0x60, order.as_bytes().to_vec())).unwrap();
    let answer = link.recv(LIMIT).unwrap().expect("an answer");
    assert_eq!(answer.kind(), 0x60);
    serde_json::from_slice(&answer.into_body()).unwrap()
}

#[test]
fn a_master_target_of_another_version_is_refused_clearly() {
    let ground = Ground::new();
    let text = fs::read_to_string(ground.site.path("server.toml")).unwrap();
    let address = text.lines().find_map(|line| line.strip_prefix("listen = ")).unwrap().trim_matches('"').to_owned();
    let homes = ground.at("homes");
    let text = format!("{text}\n[master_target]\nenabled = true\ndisks = [{homes:?}]\n");
    fs::write(ground.site.path("server.toml"), text).unwrap();
    let server = ground.site.start_server();
    let config = ground.at("server.toml");
    let token = ground.site.farshore(&["token", "new"], &["--role", "recovery-host", "--config", &config]);
    fs::write(ground.site.path("token"), token[0]["token"].as_str().unwrap()).unwrap();
    let state = ground.at("branches");
    ground.site.farshore(&["join"], &["--token-file", &ground.at("token"), "--state-dir", &state]);
    let answer = answer_to_another_version(&ground.site.path("branches"), &address);
    assert_eq!(answer["say"], "refused");
    let refusal = &answer["refusal"];
    assert!(refusal["what"].as_str().unwrap().contains("speaks version 7"), "{refusal}");
    assert!(!refusal["why"].as_str().unwrap().is_empty(), "{refusal}");
    assert!(refusal["advice"].as_str().unwrap().contains("same version"), "{refusal}");
    server.kill();
}

/// A file system of its own, in an image file. Gone when dropped, also by a failing test.
struct Mounted<'a> {
    device: String,
    folder: &'a Path,
}

fn says(program: &str, words: &[&str]) -> Option<String> {
    let run = Command::new(program).args(words).stderr(Stdio::null()).output().ok()?;
    run.status.success().then(|| String::from_utf8_lossy(&run.stdout).trim().to_owned())
}

impl<'a> Mounted<'a> {
    fn make(image: &Path, folder: &'a Path) -> Option<Mounted<'a>> {
        fs::File::create(image).unwrap().set_len(96 << 20).unwrap();
        fs::create_dir(folder).unwrap();
        let image = image.display().to_string();
        says("mkfs.ext4", &["-q", "-F", &image])?;
        let device = says("losetup", &["-f", "--show", &image])?;
        let mounted = Mounted { device, folder };
        says("mount", &[&mounted.device, &folder.display().to_string()])?;
        Some(mounted)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        says("umount", &[&self.folder.display().to_string()]);
        says("losetup", &["-d", &self.device]);
    }
}

#[test]
fn a_machine_that_holds_the_journal_of_its_own_replication_is_refused() {
    let ground = Ground::new();
    let (image, folder) = (ground.site.path("own.raw"), ground.site.path("own"));
    let Some(_mounted) = Mounted::make(&image, &folder) else {
        return skip("feedback loop", "root, loop devices and e2fsprogs are needed");
    };
    // The server's state moves onto a disk of the machine that it protects.
    let (before, after) = (ground.at("server"), folder.join("server").display().to_string());
    says("cp", &["-a", &before, &after]).expect("copied");
    let text = fs::read_to_string(ground.site.path("server.toml")).unwrap();
    fs::write(ground.site.path("server.toml"), text.replace(&format!("{before:?}"), &format!("{after:?}"))).unwrap();
    let config = fs::read_to_string(ground.site.path("agent.toml")).unwrap();
    let with_own = format!("{config}\n[[disk]]\nname = \"own\"\npath = {image:?}\n");
    fs::write(ground.site.path("agent.toml"), with_own).unwrap();
    let server = ground.site.start_server();
    let agent = ground.site.start_agent();
    let refused = ground.wait_for("refused", |status| status.state == ProtectionState::Refused);
    for part in ["own.raw", "holds this server's journal", "without end", "leave the disk out"] {
        assert!(refused.reason.contains(part), "{part}: {}", refused.reason);
    }
    agent.kill();
    // Without that disk it is protected.
    fs::write(ground.site.path("agent.toml"), config).unwrap();
    let agent = ground.site.start_agent();
    ground.wait_protected();
    agent.kill();
    server.kill();
}
