//! The way home between real programs: the master target's server and the branch host are killed with `kill -9` in each
//! phase of a failback over TLS, and the same command is given again.
//!
//! A machine with two disks is protected, lost, and goes on in a branch. Its old disks are written over by the master
//! target of the server. In the end they hold what the branch held, the agent goes on on them without sending a disk
//! again, and the vault lists the machine's whole history. Which phase each kill met is printed (`--nocapture`).

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(dead_code, reason = "the ground is shared with the test of kills, which uses more of it")]

#[path = "kills/ledger.rs"]
mod ledger;
#[path = "kills/site.rs"]
mod site;
#[path = "kills/talking.rs"]
mod talking;

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use agent::status::ProtectionState;
use nbd::Client;
use recovery::control::Command as Ask;
use recovery::{ControlClient, Phase};
use world::BlockDevice;

use ledger::{BLOCK_BYTES, DISK_BYTES, DISKS, Ledger, mix};
use site::{Running, Site};
use talking::{LIMIT, Talking};

struct Ground {
    site: Site,
    server: Option<Running>,
    branch: Option<Talking>,
    chain: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Server,
    BranchHost,
}

impl Ground {
    fn at(&self, name: &str) -> String {
        self.site.path(name).display().to_string()
    }

    fn serve_branch(&mut self, words: &[&str]) {
        let (vault, key, state) = (self.at("vault"), self.at("key"), self.at("branches"));
        let opening = ["--vault", &vault, "--recovery-key-file", &key, "--state-dir", &state];
        let branch = Talking::start(&self.site, &[words, &opening[..]].concat());
        branch.event("open")["chain"].as_str().unwrap().clone_into(&mut self.chain);
        self.branch = Some(branch);
    }

    fn disk(&self, disk: usize) -> Client {
        let socket = self.site.path(&format!("branches/{}/nbd.sock", self.chain));
        Client::connect_unix(socket, &format!("disk{disk}")).unwrap()
    }

    fn address(&self) -> String {
        let text = fs::read_to_string(self.site.path("server.toml")).unwrap();
        text.lines().find_map(|line| line.strip_prefix("listen = ")).unwrap().trim_matches('"').to_owned()
    }

    fn fail_back(&self, options: &[&str]) -> Talking {
        let (address, state) = (self.address(), self.at("branches"));
        let homes: Vec<String> = (0..DISKS).map(|disk| format!("{disk}={}", self.site.image(disk).display())).collect();
        let mut words = vec!["failback", "failover", "--master-target", &address, "--state-dir", &state];
        homes.iter().for_each(|home| words.extend(["--to", home]));
        words.push("--wait-for-go");
        words.extend(options);
        Talking::start(&self.site, &words)
    }

    fn phase(&self) -> Option<Phase> {
        let directory = self.site.path(&format!("branches/{}", self.chain));
        let answer = ControlClient::new(&directory).ask(&Ask::Status).ok()?;
        answer.failback.map(|status| status.phase)
    }

    /// Waits for a phase, or for the next one if this one was too short to be seen. `None` if the failback is over.
    fn wait_for(&self, wanted: Phase) -> Option<Phase> {
        let order = [Phase::Connecting, Phase::Comparing, Phase::Following, Phase::CuttingOver, Phase::Proving];
        let place = |phase: Phase| order.iter().position(|known| *known == phase);
        let begun = Instant::now();
        loop {
            match self.phase() {
                Some(phase) if place(phase) >= place(wanted) && place(phase).is_some() => return Some(phase),
                Some(Phase::Done) => return None,
                _ => assert!(begun.elapsed() < LIMIT, "{wanted:?} does not come: {:?}", self.phase()),
            }
        }
    }
}

#[test]
fn a_failback_over_tls_survives_a_kill_in_every_phase() {
    let begun = Instant::now();
    let folder = tempfile::Builder::new().prefix("fh").tempdir().expect("a temporary folder");
    let ledger = Ledger::new(7);
    let site = Site::make(folder.path(), &ledger);
    let images: Vec<String> = (0..DISKS).map(|disk| format!("{:?}", site.image(disk))).collect();
    let mut config = fs::read_to_string(site.path("server.toml")).unwrap();
    config += &format!("\n[master_target]\nenabled = true\ndisks = [{}]\n", images.join(", "));
    fs::write(site.path("server.toml"), config).unwrap();
    let mut ground = Ground { site, server: None, branch: None, chain: String::new() };

    // Protected, then lost.
    ground.server = Some(ground.site.start_server());
    let agent = ground.site.start_agent();
    let wait_protected = |site: &Site| {
        let begun = Instant::now();
        loop {
            match site.status() {
                Some(status) if status.state == ProtectionState::Protected => return status,
                status => assert!(begun.elapsed() < LIMIT, "never protected: {status:?}\n{}", site.logs()),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_protected(&ground.site);
    assert!(ground.site.mark("before the loss"));
    let begun_points = Instant::now();
    while !ground.site.with_key(&["vault", "points"], &["--markers"]).iter().any(|p| p["marker"] == "before the loss") {
        assert!(begun_points.elapsed() < LIMIT, "the marker is not in the vault\n{}", ground.site.logs());
    }
    agent.kill();

    // It goes on in a branch; its old disks are not what they were either.
    ground.serve_branch(&["failover", "--source-is-lost", "--name", "failover", "--at", "before the loss"]);
    for disk in 0..DISKS {
        let client = ground.disk(disk);
        for write in 0..200u64 {
            let offset = mix(write) % (DISK_BYTES / BLOCK_BYTES as u64) * BLOCK_BYTES as u64;
            client.write_at(offset, &[write as u8 + 1; BLOCK_BYTES]).unwrap();
        }
        client.flush().unwrap();
        let old = fs::File::options().write(true).open(ground.site.image(disk)).unwrap();
        old.write_all_at(&vec![0xee; 3 << 20], 1 << 20).unwrap();
    }
    let expected: Vec<Vec<u8>> = (0..DISKS)
        .map(|disk| {
            let mut bytes = vec![0; DISK_BYTES as usize];
            ground.disk(disk).read_at(0, &mut bytes).unwrap();
            bytes
        })
        .collect();

    // Without an identity nobody may order anything.
    let refused = ground.fail_back(&[]);
    assert_eq!(refused.end(), Some(4), "this host has not joined");
    let token =
        ground.site.farshore(&["token", "new"], &["--role", "recovery-host", "--config", &ground.at("server.toml")]);
    fs::write(ground.site.path("token"), token[0]["token"].as_str().unwrap()).unwrap();
    let joining = ["--token-file", &ground.at("token"), "--state-dir", &ground.at("branches")];
    ground.site.farshore(&["join"], &joining);

    let plan = [
        (Victim::Server, Phase::Comparing),
        (Victim::BranchHost, Phase::Comparing),
        (Victim::Server, Phase::Following),
        (Victim::BranchHost, Phase::Following),
        (Victim::Server, Phase::CuttingOver),
        (Victim::BranchHost, Phase::CuttingOver),
        (Victim::Server, Phase::Proving),
        (Victim::BranchHost, Phase::Proving),
    ];
    let mut met = Vec::new();
    for (victim, wanted) in plan {
        // Of what home knows already, nothing needs to be read: the proof would be over before it can be killed.
        let mut failback = ground.fail_back(if wanted == Phase::Proving { &["--prove-whole"] } else { &[] });
        if matches!(wanted, Phase::CuttingOver | Phase::Proving) {
            failback.event("following");
            failback.tell("go");
        }
        let Some(phase) = ground.wait_for(wanted) else { panic!("the failback was over before {victim:?} was killed") };
        match victim {
            Victim::Server => ground.server.take().unwrap().kill(),
            Victim::BranchHost => ground.branch.take().unwrap().kill(),
        }
        println!("{:5.1} s: killed {victim:?} at {phase:?}, wanted {wanted:?}", begun.elapsed().as_secs_f64());
        met.push(phase);
        // Whoever watched it has to give the command again.
        failback.kill();
        if victim == Victim::Server {
            ground.server = Some(ground.site.start_server());
            let log = fs::read_to_string(ground.site.path("server.log")).unwrap();
            let ready = log.lines().rev().find(|line| line.contains("\"event\":\"ready\"")).unwrap();
            assert!(ready.contains(&ground.chain), "the server says which disks are not usable: {ready}");
            // The branch host still tries the old order; it is given up like the command that watched it.
            ground.branch.take().unwrap().kill();
        }
        let chain = ground.chain.clone();
        ground.serve_branch(&["branch", "reopen", &chain]);
    }
    for phase in [Phase::Comparing, Phase::Following, Phase::Proving] {
        assert!(met.contains(&phase), "no kill came at {phase:?}: {met:?}");
    }

    // The same command once more.
    let mut failback = ground.fail_back(&[]);
    failback.event("following");
    failback.tell("go");
    let done = failback.event("done");
    let read = done["proof_read_bytes"].as_u64().unwrap();
    assert!(read < DISK_BYTES, "only what was written since the comparison is read again: {done}");
    println!("{:5.1} s: home: {done}", begun.elapsed().as_secs_f64());
    assert_eq!(failback.end(), Some(0));
    assert_eq!(ground.branch.take().unwrap().end(), Some(0), "the branch has ended");
    for (disk, expected) in expected.iter().enumerate() {
        assert!(fs::read(ground.site.image(disk)).unwrap() == *expected, "disk {disk} holds what the branch held");
    }

    // The agent goes on on the old disks, and the server with it, without a restart.
    let agent = ground.site.start_agent();
    let status = wait_protected(&ground.site);
    assert!(status.heal.sent_bytes < 1 << 20, "nothing is sent again: {:?}", status.heal);
    let begun_mark = Instant::now();
    while !ground.site.mark("after the return") {
        assert!(begun_mark.elapsed() < LIMIT, "{}", ground.site.logs());
    }
    let points = loop {
        let points = ground.site.with_key(&["vault", "points"], &["--markers"]);
        if points.iter().any(|point| point["marker"] == "after the return") {
            break points;
        }
        assert!(begun_mark.elapsed() < LIMIT, "the marker is not in the vault\n{}", ground.site.logs());
    };
    agent.kill();
    // One history over both chains, and either can be opened by the machine's name.
    let of = |name: &str| points.iter().find(|point| point["marker"] == name).unwrap_or_else(|| panic!("{points:?}"));
    assert_eq!(of("after the return")["chain"], ground.chain.as_str());
    assert_ne!(of("before the loss")["chain"], ground.chain.as_str());
    let target = ground.at("exported");
    ground.site.with_key(&["branch", "export"], &["--at", "before the loss", "--disk", "1", "--to", &target]);
    assert!(fs::read(target).unwrap() == ledger.replay(1, 0), "what was before the failover is still there");
    ground.site.with_key(&["vault", "verify"], &[]);
    println!("{:5.1} s: verified", begun.elapsed().as_secs_f64());
}
