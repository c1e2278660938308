//! `farshore vault status`: what the vault is; with a key, how current each machine is.

use clap::Args;
use serde_json::json;
use vault::chain::{Alarm, Phase, list_chains};
use vault::{Catalog, ChainHistory, UnlockedVault};
use world::{Clock, SystemClock, WallTime};

use crate::failure::{Done, io_failure};
use crate::output::{Output, duration_ns};
use crate::vault_access::{KeyOptions, VaultPlace, rolled_back, seen_heads};

/// Options of `vault status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    /// The vault was restored from an older copy on purpose: forget what this host has seen of it
    #[arg(long)]
    forget_seen: bool,
}

impl Status {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.open()?;
        let place = vault.store().describe();
        let created = WallTime::from_seconds(vault.created_seconds());
        let unlocked = self.keys.unlock_if_given(&vault)?;
        output.line(format!("vault        {}", vault.id()))?;
        output.line(format!("fingerprint  {}", vault.fingerprint()))?;
        output.line(format!("place        {place}"))?;
        output.line(format!("made         {created}"))?;
        let Some(unlocked) = unlocked else {
            output.object(&json!({
                "vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "place": place,
                "created_seconds": vault.created_seconds(), "unlocked": false,
            }))?;
            return output.remark("locked: give --passphrase-file or --recovery-key-file to see what it holds");
        };
        let (store, keys) = (unlocked.store(), unlocked.keys());
        let catalog = Catalog::load(store, keys)?;
        let mut alarms: Vec<String> = catalog.alarms.clone();
        if self.forget_seen {
            forget(&unlocked)?;
        }
        for (writer, reason) in &catalog.revoked {
            let label = catalog.writers.get(writer).map_or("", String::as_str);
            output.line(format!("revoked      {label} {writer}: {reason}"))?;
        }
        let mut machines = Vec::new();
        let now = SystemClock.wall();
        for machine in catalog.machines.values() {
            let Some(history) = ChainHistory::find(store, keys, machine.chain)? else {
                output.line(format!("machine      {}: enrolled; initial replication has not begun", machine.name))?;
                continue;
            };
            let age = now.0.saturating_sub(history.proven_through.0);
            let open = history.gaps().iter().filter(|gap| gap.until.is_none()).count();
            alarms.extend(rolled_back(&unlocked, &history)?.map(|rolled_back| rolled_back.to_string()));
            let failed_over = history.standing.closed();
            let current = match (history.last_cut(), open) {
                _ if let Some(closed) = failed_over => {
                    let committed = matches!(history.standing.phase, Phase::Ended(_));
                    let state = if committed { "committed" } else { "not committed" };
                    let since = WallTime::from_seconds(closed.seconds);
                    format!("failed over at {since} to the branch {} ({state})", closed.successor)
                }
                (None, _) => "no point yet: initial replication has not ended".to_owned(),
                (Some(_), 0) => format!("current to {}, {} ago", WallTime(history.proven_through.0), duration_ns(age)),
                (Some((_, last)), _) => format!("a gap is open; the newest point is of {}", WallTime(last.0)),
            };
            output.line(format!("machine      {}: {current}", machine.name))?;
            alarms.extend(history.alarms.iter().map(|alarm| format!("{}: {}", machine.name, describe(alarm))));
            machines.push(json!({
                "name": machine.name, "chain": machine.chain.to_string(), "committed": history.through.to_string(),
                "proven_through_ns": history.proven_through.0, "rpo_ns": age, "open_gaps": open,
                "failed_over_to": failed_over.map(|closed| closed.successor.to_string()),
                "failover_committed": matches!(history.standing.phase, Phase::Ended(_)),
                "newest_point_ns": history.last_cut().map(|(_, time)| time.0), "skew_ns": history.skew_ns,
            }));
        }
        let branches = catalog.branches.values().filter(|branch| !branch.discarded).count();
        output.line(format!("holds        {} machines, {branches} branches", catalog.machines.len()))?;
        for alarm in &alarms {
            output.line(format!("ALARM        {alarm}"))?;
        }
        output.object(&json!({
            "vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "place": place,
            "created_seconds": vault.created_seconds(), "unlocked": true, "machines": machines, "branches": branches,
            "alarms": alarms,
        }))
    }
}

fn forget(vault: &UnlockedVault) -> Done {
    let Some(heads) = seen_heads() else { return Ok(()) };
    for chain in list_chains(vault.store().as_ref())? {
        let forgotten = heads.forget(vault.vault().id(), chain);
        forgotten.map_err(|error| io_failure("what was seen of the vault cannot be forgotten", &error))?;
    }
    Ok(())
}

/// An alarm for people.
pub(super) fn describe(alarm: &Alarm) -> String {
    match alarm {
        Alarm::Untagged(name) => format!("a stranger put {name} into the chain's folder; it is ignored"),
        Alarm::WrongEpoch { number, epoch } => {
            format!("somebody used a name key that ended (epoch {epoch}) for number {number}; it is ignored")
        }
        Alarm::Invalid { number, reason } => format!("manifest {number} does not count: {reason}"),
        Alarm::Rejected { number, writer } => {
            format!("manifest {number} of writer {writer} came too late and does not count")
        }
        Alarm::Unauthorised { number, writer } => {
            format!("manifest {number} of writer {writer} does not count: its grant does not allow it")
        }
        Alarm::LostParent { number, parent } => {
            format!("manifest {number} continues manifest {parent}, which is damaged or missing: history was lost")
        }
    }
}
