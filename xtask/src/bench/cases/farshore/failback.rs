//! Bringing a branch home: the home disk is what the machine had when it was lost, the branch differs from it by 1 %.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::MACHINE;
use super::nbd_client::NbdClient;
use super::site::Site;
use crate::bench::disk::{scattered, settle};
use crate::bench::promises::{Promise, Promised};
use crate::bench::{MIB, Measured, Reference};

const BLOCK: u64 = 4096;
const BRANCH: &str = "failover";

/// The agent of the machine is stopped, and its disk is home.
pub(super) fn measure(site: &Site, disk: &Reference, measured: &mut Measured) -> Result<()> {
    let home = site.image(MACHINE);
    let mut branch = site.open_branch(MACHINE, &["--name", BRANCH])?;
    let blocks = disk.size / BLOCK / 100;
    let changed = blocks * BLOCK;
    let mut writer = NbdClient::connect(&branch.socket, &branch.export)?;
    let mut random = std::fs::File::open("/dev/urandom")?;
    let mut block = [0; BLOCK as usize];
    for index in scattered(disk.size / BLOCK, blocks) {
        std::io::Read::read_exact(&mut random, &mut block)?;
        writer.write(index * BLOCK, &block)?;
    }
    writer.flush()?;
    drop(writer);
    settle()?;
    let read = read_once(&home)?;

    // The machine is not failed over to the branch: it is given up.
    let mut command = site.with_key(&["--yes", "failback", BRANCH, "--close-history", "--wait-for-go", "--to"]);
    command.arg(&home).arg("--state-dir").arg(site.branches());
    let began = Instant::now();
    let mut failback = Failback::start(&mut command)?;
    failback.until("following")?;
    let following = began.elapsed();
    failback.go()?;
    let done = failback.until("done")?;
    let took = began.elapsed();
    failback.end()?;
    branch.process.wait()?;

    let figure = |name: &str| done[name].as_u64().unwrap_or(0);
    let sent = figure("wire_bytes").max(figure("sent_bytes"));
    let ratio = sent as f64 / changed as f64;
    let text = format!("{ratio:.3} × ({:.1} MiB for {:.1} MiB changed)", mib(sent), mib(changed));
    measured.promises.push(Promise::new(Promised::FailbackBytes, text, ratio <= 1.1));
    let times = following.as_secs_f64() / read.as_secs_f64();
    let again = figure("proof_read_bytes");
    let text = format!(
        "{:.2} s, {times:.1} × one read of the warm disk ({:.2} s); {:.2} s until proved equal, the branch at rest for {} ms, in \
         which {:.1} MiB of home were read again",
        following.as_secs_f64(),
        read.as_secs_f64(),
        took.as_secs_f64(),
        figure("rest_ms"),
        mib(again)
    );
    // Home is read, hashed and compared once; what is judged is that nothing else takes the time, and that what was not
    // written since is not read again.
    measured.promises.push(Promise::new(Promised::FailbackTime, text, times <= 2.0 && again <= 2 * changed));
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// How long one read of a disk takes, after another that brought it into the page cache.
fn read_once(path: &std::path::Path) -> Result<Duration> {
    let mut took = Duration::ZERO;
    for _ in 0..2 {
        let begun = Instant::now();
        let mut command = Command::new("dd");
        command.arg(format!("if={}", path.display())).args(["of=/dev/null", "bs=1M"]).stderr(Stdio::null());
        ensure!(command.status()?.success(), "the disk at home cannot be read");
        took = begun.elapsed();
    }
    Ok(took)
}

struct Failback {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Failback {
    fn start(command: &mut Command) -> Result<Failback> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot fail back")?;
        let said = BufReader::new(child.stdout.take().expect("standard output is piped one line above"));
        Ok(Failback { child, said })
    }

    /// Reads on until it says that `event` happened.
    fn until(&mut self, event: &str) -> Result<Value> {
        let mut line = String::new();
        while self.said.read_line(&mut line)? > 0 {
            let said: Value = serde_json::from_str(&line)?;
            if said["event"] == event {
                return Ok(said);
            }
            if said["event"] == "failed" {
                bail!("the failback failed: {said}");
            }
            line.clear();
        }
        bail!("the failback ended before it was {event}")
    }

    fn go(&mut self) -> Result<()> {
        self.child.stdin.as_mut().context("it was told already")?.write_all(b"go\n").context("the failback is gone")
    }

    fn end(&mut self) -> Result<()> {
        ensure!(self.child.wait()?.success(), "the failback failed");
        Ok(())
    }
}

impl Drop for Failback {
    fn drop(&mut self) {
        // It may have ended; only this very child is meant.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
