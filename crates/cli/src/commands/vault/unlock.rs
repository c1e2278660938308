//! `farshore vault unlock` and `vault lock`: the read key in memory for later commands of this user on this host.

use clap::Args;
use serde_json::json;

use crate::failure::{Done, Failure, Verdict, usage};
use crate::keeper;
use crate::output::{Output, duration_ns};
use crate::vault_access::{KeyOptions, VaultPlace};

/// Longest time for which a key is kept: a week.
const SECONDS_MAX: u64 = 7 * 86_400;

/// Options of `vault unlock`.
#[derive(Debug, Args)]
pub(crate) struct Unlock {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    /// For how long: a number and s, m, h or d
    #[arg(long = "for", value_name = "DURATION", default_value = "8h")]
    duration: String,
}

/// Options of `vault lock`.
#[derive(Debug, Args)]
pub(crate) struct Lock {
    #[command(flatten)]
    place: VaultPlace,
}

impl Unlock {
    pub(crate) fn run(&self, output: Output) -> Done {
        let seconds = seconds(&self.duration)?;
        let vault = self.keys.unlock_fresh(&self.place.open()?)?;
        keeper::start(&vault, seconds)?;
        output.object(&json!({"vault": vault.vault().id().to_string(), "unlocked": true, "seconds": seconds}))?;
        let long = duration_ns(seconds.saturating_mul(1_000_000_000));
        output.line(format!("unlocked for {long}; `farshore vault lock` ends it before"))?;
        output.remark("what is kept opens disks for reading and for branches; granting and revoking still ask")
    }
}

impl Lock {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.open()?;
        if !keeper::lock(vault.id()) {
            let failure = Failure::new("the vault is not unlocked", "no process of this user holds its key", "");
            return Err(failure.with(Verdict::Unchanged));
        }
        output.object(&json!({"vault": vault.id().to_string(), "unlocked": false}))?;
        output.line("locked")
    }
}

fn seconds(text: &str) -> Done<u64> {
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86_400,
        _ => 0,
    };
    let number = text.get(..text.len().saturating_sub(1)).and_then(|digits| digits.parse::<u64>().ok());
    match number.and_then(|number| number.checked_mul(unit)).filter(|seconds| (1..=SECONDS_MAX).contains(seconds)) {
        Some(seconds) => Ok(seconds),
        None => Err(usage(
            format!("{text:?} is no duration"),
            "a key is kept for at least a second and at most 7d",
            "write a whole number and s, m, h or d, such as 30m",
        )),
    }
}
