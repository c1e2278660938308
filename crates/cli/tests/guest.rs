//! A machine whose root disk is protected while it runs from it: an emulated guest with a kernel of the distribution, the
//! agent inside, capture by eBPF, the server outside. It loses its agent, its power, its ring, is shut down and started again,
//! gets disks, larger ones, and loses one while it runs;
//! points of all these times are exported, checked and read against the ledger that the guest kept, and at last the
//! machine starts from a branch. Another one is taken back, memory and all, to what it was a while ago.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "field/machine.rs"]
mod machine;
#[path = "field/site.rs"]
mod site;
#[path = "field/skip.rs"]
mod skip;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use machine::{Hardware, Machine, PATIENCE};
use site::{AGENT, Site, done, start};
use skip::skip;

const DISK_BYTES: u64 = 192 << 20;
const DATA_BYTES: u64 = 48 << 20;
const GROWN_BYTES: u64 = 64 << 20;
const LATE_BYTES: u64 = 24 << 20;
/// Small, so that a burst of writes overflows it.
const RING_BYTES: u64 = 8 << 20;

/// The agent in the guest.
trait Guest {
    fn start_agent(&mut self);
    fn status(&mut self) -> Option<Value>;
    fn wait_protected(&mut self) -> Value;
    fn wait_until(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value;
    fn start_load(&mut self);
    fn mark(&mut self, points: &mut Vec<Point>);
}

/// A marker of the guest's: everything up to this number was synced before.
struct Point {
    name: String,
    synced: u64,
}

impl Guest for Machine {
    fn start_agent(&mut self) {
        self.run("setsid farshore-agent run --config /agent.toml </dev/null >>/tmp/agent.log 2>&1 &");
    }

    fn status(&mut self) -> Option<Value> {
        let (code, said) = self.ask("farshore-agent --json status --config /agent.toml 2>/dev/null");
        if code == 0 { serde_json::from_str(said.trim()).ok() } else { None }
    }

    /// The status of an agent that streams everything.
    fn wait_protected(&mut self) -> Value {
        self.wait_until("it is protected", |status| status["state"] == "protected")
    }

    fn wait_until(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let status = self.status();
            if let Some(status) = status.as_ref().filter(|status| is_so(status)) {
                return status.clone();
            }
            if began.elapsed() > PATIENCE {
                panic!("waited in vain until {what}: {status:?}\n{}", self.ask("tail -n 30 /tmp/agent.log").1);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn start_load(&mut self) {
        self.run("rm -f /tmp/stop; setsid load </dev/null >/dev/null 2>&1 &");
        self.run("until [ -e /tmp/synced ]; do sleep 0.1; done");
    }

    fn mark(&mut self, points: &mut Vec<Point>) {
        let synced = self.run("cat /tmp/synced").trim().parse().expect("a number of the ledger");
        let name = format!("point-{}", points.len());
        self.run(&format!("farshore-agent mark {name} --wait-s 60 --config /agent.toml"));
        points.push(Point { name, synced });
    }
}

/// `agent.toml`, but for the disks.
fn settings() -> String {
    format!(
        "state_dir = \"/var/farshore\"\nmachine_name = \"guest\"\nring_bytes_max = {RING_BYTES}\nrotate_every_ms = 2000\n"
    )
}

/// The part of it that protects a disk.
fn named(name: &str, path: &str) -> String {
    format!("[[disk]]\nname = {name:?}\npath = {path:?}\ncapture = \"ebpf\"\n")
}

fn gaps_of(site: &Site) -> usize {
    let points = site.with_key(&["vault", "points", "--limit", "100000"]);
    points.iter().filter(|object| object["type"] == "gap").count()
}

/// The causes of those that withhold points.
fn machine_gaps_of(site: &Site) -> Vec<String> {
    let points = site.with_key(&["vault", "points", "--limit", "100000"]);
    let gaps = points.iter().filter(|object| object["type"] == "gap" && object["whole_machine"] == true);
    gaps.map(|gap| gap["cause"].to_string()).collect()
}

/// Exports the point and checks file system and ledger; how many numbers it holds.
fn prove(site: &Site, point: &Point) -> u64 {
    let image = site.path("export.raw");
    let _ = fs::remove_file(&image);
    site.with_key(&["branch", "export", "--at", &point.name, "--disk", "0", "--to", &image.display().to_string()]);
    // As a start after a power cut does it: the journal first, and then nothing may be left to repair.
    replay_journal(&image);
    let check = Command::new("e2fsck").arg("-fn").arg(&image).output().unwrap();
    assert!(check.status.success(), "{}: {}", point.name, String::from_utf8_lossy(&check.stdout));
    let ledger = done(Command::new("debugfs").args(["-R", "cat /ledger"]).arg(&image));
    // The file system may have counted a line that was not synced yet: zeroes, and only behind everything that was.
    let lines = ledger.trim_end_matches('\0').lines();
    let numbers: Vec<u64> =
        lines.map(|line| line.parse().unwrap_or_else(|_| panic!("{}: {line:?} in {ledger:?}", point.name))).collect();
    assert!(numbers.iter().enumerate().all(|(index, number)| index as u64 == *number), "{}: {ledger}", point.name);
    let last = *numbers.last().unwrap();
    assert!(last >= point.synced, "{} holds {last}, but {} was synced before", point.name, point.synced);
    last
}

fn replay_journal(image: &Path) {
    let replay = Command::new("e2fsck").args(["-p", "-E", "journal_only"]).arg(image).output().unwrap();
    assert!(replay.status.code().is_some_and(|code| code < 4), "{}: {replay:?}", image.display());
}

fn equal(a: &Path, b: &Path) -> bool {
    fs::read(a).unwrap() == fs::read(b).unwrap()
}

#[test]
fn a_guest_with_a_protected_root_disk_loses_nothing_and_starts_again_from_a_branch() {
    let kernel = match machine::kernel() {
        Ok(kernel) => kernel,
        Err(why) => return skip("a_guest_with_a_protected_root_disk", &why),
    };
    let folder = tempfile::Builder::new().prefix("fs").tempdir().unwrap();
    let site = Site { folder: folder.path().to_owned() };
    // The guest's network has this machine at its gateway's address.
    let (server, token) = site.make("10.0.2.2");
    let (disk, initramfs) = (site.path("disk.raw"), site.path("initramfs"));
    let image = machine::make_initramfs(folder.path(), &kernel, &initramfs);
    let config = settings() + &named("root", "/dev/vda");
    let size = format!("{}M", DISK_BYTES >> 20);
    machine::make_disk(folder.path(), &disk, &size, Path::new(AGENT), &[("agent.toml", &config), ("token", &token)]);
    let data = site.path("data.raw");
    machine::make_data_disk(&data, &format!("{}M", DATA_BYTES >> 20));
    let (place, more) = (disk.display().to_string(), [data.clone()]);
    let boot = |disk: &str| {
        let (folder, kernel, initramfs) = (folder.path(), &image, &initramfs);
        Machine::boot(&Hardware { folder, kernel, initramfs, disk, format: "raw", more: &more })
    };
    let mut points = Vec::new();
    let mut told = Vec::new();
    let sent = |status: &Value| status["heal"]["sent_bytes"].as_u64().unwrap();
    // Starts again, under load, and is protected.
    let come_back = |points: &mut Vec<Point>| {
        let mut guest = boot(&place);
        guest.start_load();
        guest.start_agent();
        let status = guest.wait_protected();
        guest.mark(points);
        (guest, status)
    };

    // Initial replication while the root file system is in use.
    let mut guest = boot(&place);
    guest.run("farshore-agent join --token-file /token --state-dir /var/farshore --name guest");
    guest.start_load();
    guest.start_agent();
    let first = guest.wait_protected();
    told.push(format!("initial replication of {} MiB: {} bytes sent", DISK_BYTES >> 20, sent(&first)));
    for _ in 0..2 {
        guest.mark(&mut points);
    }

    // The agent dies. Its programs live on in the kernel.
    let gaps = gaps_of(&site);
    guest.run("kill -9 $(pidof farshore-agent)");
    guest.start_agent();
    let status = guest.wait_protected();
    guest.mark(&mut points);
    assert_eq!(sent(&status), 0, "the ring and the stream go on");
    assert_eq!(gaps_of(&site), gaps, "a killed agent costs no gap");

    // More than the ring holds at once.
    guest.run("dd if=/dev/urandom of=/burst bs=1M count=48 2>/dev/null; sync");
    let status = guest.wait_protected();
    guest.mark(&mut points);
    assert!(gaps_of(&site) > gaps, "an overflow is a recorded gap");
    told.push(format!("overflow: {} bytes sent by the heal", sent(&status)));

    // An orderly restart of the machine.
    guest.run("farshore-agent stop --config /agent.toml");
    guest.shut_down();
    let (guest, status) = come_back(&mut points);
    assert!(sent(&status) < sent(&first) / 2, "only what differs travels: {status}");
    told.push(format!("restart: {} bytes sent", sent(&status)));

    // The power fails under load.
    guest.cut_power();
    let (mut guest, status) = come_back(&mut points);
    assert!(sent(&status) < sent(&first) / 2, "only what differs travels: {status}");
    told.push(format!("power cut: {} bytes sent", sent(&status)));

    // A second disk is protected from now on. The agent runs on, and so does the load on both of them.
    let reload = |guest: &mut Machine, config: &str| {
        guest.run(&format!("cat > /agent.toml <<'end'\n{config}end"));
        guest.run("farshore-agent reload --config /agent.toml");
    };
    let gaps = machine_gaps_of(&site);
    let both = config.clone() + &named("data", "/dev/vdb");
    reload(&mut guest, &both);
    let status = guest.wait_until("two disks are protected", |status| {
        status["state"] == "protected" && status["disks"].as_array().is_some_and(|disks| disks.len() == 2)
    });
    guest.mark(&mut points);
    told.push(format!("second disk of {} MiB: {} bytes sent", DATA_BYTES >> 20, sent(&status)));

    // It grows.
    guest.hardware("block_resize", &json!({ "device": "disk1", "size": GROWN_BYTES }));
    guest.wait_until("the agent has noticed", |status| status["disks"][1]["size_bytes"] == GROWN_BYTES);
    // No more at once than the ring holds beside the load.
    guest.run("dd if=/dev/urandom of=/dev/vdb bs=64k seek=808 count=16 conv=notrunc,fsync 2>/dev/null");
    let status = guest.wait_protected();
    guest.mark(&mut points);
    told.push(format!("grown to {} MiB: {} bytes sent", GROWN_BYTES >> 20, sent(&status)));

    // A third one is plugged in, written to, and taken.
    let late = site.path("late.raw");
    fs::File::create(&late).and_then(|file| file.set_len(LATE_BYTES)).unwrap();
    let file = json!({ "driver": "file", "filename": late });
    guest.hardware("blockdev-add", &json!({ "driver": "raw", "node-name": "late", "file": file }));
    let device =
        json!({ "driver": "virtio-blk-pci", "id": "late-device", "drive": "late", "serial": "guest-disk-late" });
    guest.hardware("device_add", &device);
    guest.run("i=0; until [ -b /dev/vdc ] || [ $i -gt 300 ]; do i=$((i+1)); sleep 0.1; done");
    guest.run("dd if=/dev/urandom of=/dev/vdc bs=1M count=8 conv=notrunc,fsync 2>/dev/null");
    reload(&mut guest, &(both.clone() + &named("late", "/dev/vdc")));
    guest.run("dd if=/dev/urandom of=/dev/vdc bs=64k seek=120 count=16 conv=notrunc,fsync 2>/dev/null");
    guest.wait_until("three disks are protected", |status| {
        status["state"] == "protected" && status["disks"].as_array().is_some_and(|disks| disks.len() == 3)
    });
    guest.mark(&mut points);
    let with_late = points[points.len() - 1].name.clone();

    // It is pulled out: the agent says so, and the others go on.
    guest.hardware("device_del", &json!({ "id": "late-device" }));
    let status = guest.wait_until("the agent has noticed", |status| status["disks"][2]["problem"] != "");
    told.push(format!("pulled out: {}", status["disks"][2]["problem"]));
    guest.wait_protected();
    guest.mark(&mut points);
    assert_eq!(machine_gaps_of(&site), gaps, "the machine as a whole has no gap");

    // Once nothing writes to it any more, the replica is that disk.
    guest.run("touch /tmp/stop; while pidof load; do sleep 0.1; done; umount /data");
    guest.mark(&mut points);
    guest.cut_power();
    let held: Vec<u64> = points.iter().map(|point| prove(&site, point)).collect();
    assert!(held.is_sorted(), "{held:?}");
    let last = &points[points.len() - 1].name;
    site.with_key(&["branch", "export", "--at", last, "--disk", "1", "--to", &site.at("data.export")]);
    assert!(equal(&site.path("data.export"), &data), "the replica of the second disk is not what the disk is");
    assert_eq!(fs::metadata(&data).unwrap().len(), GROWN_BYTES);
    site.with_key(&["branch", "export", "--at", &with_late, "--disk", "2", "--to", &site.at("late.export")]);
    assert!(equal(&site.path("late.export"), &late), "the replica of the third disk is not what the disk is");

    // The machine starts from a branch of its own history.
    let point = &points[points.len() / 2];
    let state = site.at("branches");
    let (vault, key) = (site.at("vault"), site.at("key"));
    let words = ["branch", "open", "--at", &point.name, "--name", "drill", "--state-dir", &state];
    let opening = ["--vault", &vault, "--recovery-key-file", &key];
    let (branch, open) = start(&site, &[&words[..], &opening].concat(), "open");
    let mut recovered = boot(open["disks"][0]["uri"].as_str().unwrap());
    let last: u64 = recovered.run("tr -d '\\000' < /ledger | tail -n 1").trim().parse().unwrap();
    assert_eq!(last, held[points.len() / 2], "the recovered machine has its ledger");
    recovered.start_load();
    recovered.shut_down();
    drop((branch, server));
    for line in told {
        println!("{line}");
    }
}

/// A snapshot of the machine is loaded while it streams: its agent does not know what it sent since.
#[test]
fn a_machine_that_is_reverted_with_its_memory_is_compared_and_has_no_false_point() {
    let kernel = match machine::kernel() {
        Ok(kernel) => kernel,
        Err(why) => return skip("a_machine_that_is_reverted_with_its_memory", &why),
    };
    let folder = tempfile::Builder::new().prefix("fs").tempdir().unwrap();
    let site = Site { folder: folder.path().to_owned() };
    let (server, token) = site.make("10.0.2.2");
    let initramfs = site.path("initramfs");
    let image = machine::make_initramfs(folder.path(), &kernel, &initramfs);
    let config = settings() + &named("root", "/dev/vda") + &named("data", "/dev/vdb");
    let (raw, data) = (site.path("disk.raw"), site.path("data.raw"));
    let size = format!("{}M", DISK_BYTES >> 20);
    machine::make_disk(folder.path(), &raw, &size, Path::new(AGENT), &[("agent.toml", &config), ("token", &token)]);
    machine::make_data_disk(&data, &format!("{}M", DATA_BYTES >> 20));
    // A format that can keep snapshots.
    let convert = |from: &str, to: &str, source: &Path, target: &Path| {
        done(Command::new("qemu-img").args(["convert", "-f", from, "-O", to]).arg(source).arg(target));
    };
    let [disk, more] = [&raw, &data].map(|source| {
        let target = source.with_extension("qcow2");
        convert("raw", "qcow2", source, &target);
        target
    });
    let (disk, more, kernel, initramfs) = (disk.display().to_string(), [more], &image, &initramfs);
    let hardware = Hardware { folder: folder.path(), kernel, initramfs, disk: &disk, format: "qcow2", more: &more };
    let mut guest = Machine::boot(&hardware);
    guest.run("farshore-agent join --token-file /token --state-dir /var/farshore --name guest");
    guest.start_load();
    guest.start_agent();
    let first = guest.wait_protected();
    let sent = |status: &Value| status["heal"]["sent_bytes"].as_u64().unwrap();
    let mut points = Vec::new();
    guest.mark(&mut points);

    guest.snapshot("savevm before");
    let gaps = machine_gaps_of(&site).len();
    guest.run("echo abandoned > /data/abandoned; sync");
    guest.mark(&mut points);
    guest.snapshot("loadvm before");
    // Its memory says that it is protected, until it hears from the server.
    let began = Instant::now();
    while machine_gaps_of(&site).len() == gaps {
        assert!(began.elapsed() < PATIENCE, "nobody notices");
        std::thread::sleep(Duration::from_millis(500));
    }
    let healed = guest.wait_protected();
    assert!(sent(&healed) < sent(&first) / 2, "only what differs travels: {healed}");
    points.push(Point { name: "after".into(), synced: guest.run("cat /tmp/synced").trim().parse().unwrap() });
    guest.run("farshore-agent mark after --wait-s 60 --config /agent.toml");

    // Once nothing writes to it any more, the replica is that disk.
    guest.run("touch /tmp/stop; while pidof load; do sleep 0.1; done; umount /data");
    guest.run("farshore-agent mark still --wait-s 60 --config /agent.toml");
    guest.cut_power();
    for point in &points {
        prove(&site, point);
    }
    let export = |name: &str| {
        let target = site.at(&format!("{name}.export"));
        site.with_key(&["branch", "export", "--at", name, "--disk", "1", "--to", &target]);
        target
    };
    let abandoned = |name: &str| {
        let image = export(name);
        replay_journal(Path::new(&image));
        !done(Command::new("debugfs").args(["-R", "cat /abandoned"]).arg(image)).is_empty()
    };
    assert!(abandoned("point-1"), "what was before the snapshot was loaded is a point");
    assert!(!abandoned("after"), "and what came of it is another");
    let now = site.path("now.raw");
    convert("qcow2", "raw", &more[0], &now);
    assert!(equal(Path::new(&export("still")), &now), "the replica of the second disk is not what the disk is");
    println!(
        "reverted with its memory: {} of {} bytes sent again; {:?}",
        sent(&healed),
        sent(&first),
        machine_gaps_of(&site).last()
    );
    drop(server);
}
