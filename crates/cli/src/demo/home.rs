//! The second half of the demo: the site is lost, the machine runs on a branch, and comes home to a disk that has diverged.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::Value;
use world::{Clock, SystemClock};

use super::acts::{Figures, order, spent};
use super::ledger::{BLOCK_BYTES, Ledger, mix};
use super::proof::{Claim, Evidence, Opening, hash_device, mismatch, open_image, prove};
use super::site::{MACHINE, Site, text};
use super::watch::Watch;
use crate::failure::{Done, Failure, io_failure};
use crate::output::bytes;

/// Writes per second on the branch.
const RATE: u64 = 800;
/// How long the machine runs on the branch before, and while, it is brought home.
const RUN: Duration = Duration::from_secs(3);
/// Blocks of the home disk that somebody overwrites meanwhile.
const DIVERGED_BLOCKS: u64 = 2000;

/// Fails over to a branch, writes there, fails back, and proves equality.
pub(super) fn fail_over_and_return(
    site: &mut Site,
    evidence: &Evidence<'_>,
    seed: u64,
    figures: &mut Figures,
    watch: &Watch,
    say: &impl Fn(&str) -> Done,
) -> Done {
    if let Some(mut agent) = site.agent.take() {
        agent.kill()?;
    }
    site.server.kill()?;
    watch.event("the site is lost (kill -9 of agent and process server)");
    let branches = site.paths.state.join("branches");
    let opening =
        Opening { programs: &site.programs, vault: &site.paths.vault, key: &site.paths.recovery_key, state: &branches };
    let mut branch = opening.fail_over(MACHINE, "failover")?;
    say(&format!("failed over: {}", branch.field("reason")))?;
    let mut workload = site.start_workload(&branch.socket, &branch.export, RATE)?;
    watch.event("it runs on a branch");
    std::thread::sleep(RUN);
    diverge(site, seed)?;
    say(&format!("the machine runs on the branch; {DIVERGED_BLOCKS} blocks of the disk at home were overwritten"))?;

    let began = SystemClock.monotonic();
    let home = site.paths.home.canonicalize().map_err(|error| io_failure("the disk at home is gone", &error))?;
    let mut command = site.programs.farshore(&["--json", "--yes", "failback", "failover", "--to", text(&home)?]);
    command.args(["--state-dir", text(&branches)?, "--wait-for-go"]);
    let mut failback = site.programs.start(command, "failback")?;
    let following = wait_event(&mut failback, "following")?;
    watch.event("home follows the branch");
    say(&format!(
        "home follows the branch: {} compared, {} sent, while the machine went on writing",
        bytes(following["compared_bytes"].as_u64().unwrap_or_default()),
        bytes(following["sent_bytes"].as_u64().unwrap_or_default())
    ))?;
    std::thread::sleep(RUN / 2);
    let written = order(&mut workload, "stop")?;
    workload.end_by_itself()?;
    let branch_hash = hash_device(&branch.connect()?)?;
    failback.tell("go")?;
    let done = wait_event(&mut failback, "done")?;
    failback.end_by_itself()?;
    branch.process.end_by_itself()?;
    let took = spent(began);

    let home_hash = hash_device(&open_image(&home)?)?;
    if home_hash != branch_hash {
        return Err(mismatch("home", format!("home hashes to {home_hash}, the branch to {branch_hash}")));
    }
    watch.event("home again");
    say(&format!("home again after write {written}: home and branch hash to {}…", &home_hash.to_hex()[..16]))?;
    let sent = done["sent_bytes"].as_u64().unwrap_or_default();
    figures.add(
        "failback",
        format!("{took}, {} sent, at rest for {} ms", bytes(sent), done["rest_ms"].as_u64().unwrap_or_default()),
    );

    // The machine's history goes on along the branch's chain, without a full resend.
    site.restart_server()?;
    site.start_agent()?;
    let status = site.wait_protected()?;
    super::acts::wait_committed(site)?;
    watch.event("protected again");
    say(&format!(
        "protected again: {} compared, {} sent",
        bytes(status.heal.compared_bytes),
        bytes(status.heal.sent_bytes)
    ))?;
    figures.add("protecting it again", format!("{} sent", bytes(status.heal.sent_bytes)));
    let ledger = Ledger::load(&site.paths.ledger)?;
    let evidence = Evidence { ledger: &ledger, ..*evidence };
    let opening =
        Opening { programs: &site.programs, vault: &site.paths.vault, key: &site.paths.recovery_key, state: &branches };
    let mut after = opening.open(MACHINE, "latest", &["--throw-away"])?;
    let proof = prove("after the return", &after, &Claim::Exactly(written), &evidence)?;
    after.process.end()?;
    say(&format!("proved the newest point after the return: all {} writes, {} compared", proof.k, bytes(proof.bytes)))
}

/// Waits for an object with this event, past reports of progress.
fn wait_event(process: &mut super::processes::Running, event: &str) -> Done<Value> {
    loop {
        let object = process.object(super::site::LIMIT)?;
        if object["event"] == event {
            return Ok(object);
        }
        if object["event"] == "failed" {
            return Err(Failure::new("the failback failed", object.to_string(), "report this with the seed"));
        }
    }
}

/// Overwrites blocks of the disk at home behind everybody's back.
fn diverge(site: &Site, seed: u64) -> Done {
    let refused = |error: std::io::Error| io_failure("the disk at home cannot be written", &error);
    let file = std::fs::File::options().write(true).open(&site.paths.home).map_err(refused)?;
    let blocks = file.metadata().map_err(refused)?.len() / BLOCK_BYTES as u64;
    for index in 0..DIVERGED_BLOCKS {
        let block = mix(seed ^ mix(index)) % blocks;
        file.write_all_at(&[index as u8; BLOCK_BYTES], block * BLOCK_BYTES as u64).map_err(refused)?;
    }
    Ok(())
}
