//! `farshore failover`: the machine goes on as a branch, and its own history is closed meanwhile.
//!
//! ```text
//! failover MACHINE ─► close of the machine's chain, naming the branch ─► the branch is opened and served
//!                        ├── failover cancel: the machine's next process server goes on and heals
//!                        └── failover commit, or a failback: it stands
//! ```
//! A kill between the close and the branch leaves a chain that names a branch which does not exist: the same command again
//! opens it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};
use recovery::Keep;
use replication::ChainId;
use serde_json::json;
use vault::chain::Phase;
use vault::keys::WriterSession;
use vault::{Catalog, ChainControl, ChainHistory, Moment, StoreError, UnlockedVault, VaultError, WriterKeys};
use world::{Clock, SystemClock, WallTime};

use super::branch::{Serving, serve_branch};
use crate::failure::{Done, Failure, Verdict, io_failure, usage};
use crate::moment::{self, MOMENT_HELP};
use crate::output::{Output, duration_ns};
use crate::vault_access::{KeyOptions, Named, VaultPlace, choose, clock, entropy, find_or_only, warn_if_rolled_back};

/// A source that was proven current more recently than this may well be running.
const HEARD_RECENTLY_NS: u64 = 300 * 1_000_000_000;

/// Options of `failover`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Failover {
    #[command(subcommand)]
    decision: Option<Decision>,
    #[command(flatten)]
    begin: Begun,
}

/// [`Begin`], unless a subcommand was given. clap leaves the group of options that are themselves flattened empty, so that an
/// `Option` of them would never be there; the vault, which is required, tells instead.
#[derive(Debug)]
struct Begun(Option<Begin>);

impl FromArgMatches for Begun {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Begun, clap::Error> {
        matches.contains_id("vault").then(|| Begin::from_arg_matches(matches)).transpose().map(Begun)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Begun::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Begun {
    fn augment_args(command: Command) -> Command {
        Begin::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Begin::augment_args_for_update(command)
    }
}

#[derive(Debug, Subcommand)]
enum Decision {
    /// Let a failover stand: the machine's own history has ended
    Commit(Decide),
    /// Take a failover back: the machine goes on where it is, and heals
    Cancel(Decide),
}

/// Which machine, and with what keys.
#[derive(Debug, Args)]
struct Decide {
    /// Machine; may be left out if the vault holds one
    machine: Option<String>,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    authority: Authority,
}

/// How to fail over.
#[derive(Debug, Args)]
struct Begin {
    /// Machine; may be left out if the vault holds one
    machine: Option<String>,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    authority: Authority,
    #[arg(long, value_name = "MOMENT", default_value = "latest", allow_hyphen_values = true, help = MOMENT_HELP)]
    at: String,
    /// Name of the branch, for people
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The machine is gone, although it was heard from a moment ago
    #[arg(long)]
    source_is_lost: bool,
    #[command(flatten)]
    serving: Serving,
}

/// On whose word.
#[derive(Debug, Args)]
struct Authority {
    /// Keys of an operator, made by `vault grant --role operator`; else the vault owner's key is used
    #[arg(long, value_name = "FILE", env = "FARSHORE_OPERATOR_KEYS")]
    operator_keys: Option<PathBuf>,
}

impl Authority {
    fn session(&self, vault: &UnlockedVault) -> Done<Arc<WriterSession>> {
        let Some(path) = &self.operator_keys else {
            return Ok(Arc::new(vault.owner_session(&entropy(), &clock())?));
        };
        let refused = |why: String| {
            let what = format!("the operator's keys in {} cannot be used", path.display());
            Failure::new(what, why, "make them with `farshore vault grant --role operator --to FILE`")
        };
        let bytes = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
        let keys = WriterKeys::from_bytes(&bytes).map_err(|error| refused(error.to_string()))?;
        if keys.vault != vault.vault().id() {
            return Err(refused("they are for another vault".into()));
        }
        let session = WriterSession::new(keys, entropy(), clock()).map_err(|error| refused(error.to_string()))?;
        Ok(Arc::new(session))
    }

    /// Unlocks with what suffices: an operator with keys of their own needs the vault for reading only.
    fn unlock(&self, place: &VaultPlace, keys: &KeyOptions) -> Done<UnlockedVault> {
        let vault = place.open()?;
        if self.operator_keys.is_some() { keys.unlock(&vault) } else { keys.unlock_fresh(&vault) }
    }
}

impl Failover {
    pub(crate) fn run(&self, output: Output) -> Done {
        match (&self.decision, &self.begin.0) {
            (Some(Decision::Commit(command)), _) => command.run(output, true),
            (Some(Decision::Cancel(command)), _) => command.run(output, false),
            (None, Some(begin)) => begin.run(output),
            (None, None) => Err(usage("no vault was named", "", "give --vault")),
        }
    }
}

/// The machine that was asked for, and its history.
fn machine(vault: &UnlockedVault, asked: Option<&str>) -> Done<(Named, ChainHistory)> {
    let (store, keys) = (vault.store(), vault.keys());
    let named = find_or_only(store, &Catalog::load(store, keys)?, asked)?;
    if named.machine.is_none() {
        let what = format!("{} is a branch, not a machine", named.name);
        return Err(usage(what, "only a machine fails over", "name a machine that `farshore vault machines` lists"));
    }
    let history = ChainHistory::load(store, keys, named.chain)?;
    warn_if_rolled_back(vault, &history)?;
    Ok((named, history))
}

impl Begin {
    fn run(&self, output: Output) -> Done {
        let moment = moment::parse(&self.at)?;
        let vault = self.authority.unlock(&self.place, &self.keys)?;
        let operator = self.authority.session(&vault)?;
        let began = SystemClock.monotonic();
        let (named, history) = machine(&vault, self.machine.as_deref())?;
        // What cannot be opened is told before anything is closed.
        choose(vault.store(), vault.keys(), named.chain, &moment)?;
        let branch = match history.standing.phase {
            Phase::Open => {
                self.refuse_if_alive(&named, &history)?;
                confirm(output, &named.name)?;
                ChainId(entropy().bytes())
            }
            Phase::Closed(closed) => unfinished(&vault, &named, closed.successor)?,
            Phase::Ended(closed) => {
                let what = format!("{} has failed over for good", named.name);
                let why = format!("it was committed; it goes on as the branch {}", closed.successor);
                let remedy = format!("`farshore branch reopen {}` where the branch's state is", closed.successor);
                return Err(Failure::new(what, why, remedy).with(Verdict::Unchanged));
            }
        };
        let fenced = self.close(&vault, &operator, &named, branch, output)?;
        // Chosen again: what was committed until the close counts.
        let (history, point) = choose(vault.store(), vault.keys(), named.chain, &moment)?;
        let host = self.serving.host(vault, Keep::VaultIfWritable)?.with_operator(operator);
        let name = self.name.clone().unwrap_or_else(|| format!("failover of {}", named.name));
        let opened = host.open_as(branch, history.chain, &Moment::Sequence(point.cut.sequence), &name)?;
        output.object(&json!({
            "event": "failed-over", "machine": named.name, "chain": named.chain.to_string(), "branch": branch.to_string(),
            "source_fenced": fenced,
        }))?;
        if fenced {
            output.line(format!("closed the history of {}: whatever it writes now is not protected", named.name))?;
        }
        let took = u64::try_from(SystemClock.monotonic().since(began).as_nanos()).unwrap_or(u64::MAX);
        serve_branch(&Arc::new(opened), &self.serving, &self.place, output, (&point.reason, took), false)
    }

    /// Two machines that both believe to be the one lose somebody's work.
    fn refuse_if_alive(&self, named: &Named, history: &ChainHistory) -> Done {
        let age = SystemClock.wall().0.saturating_sub(history.proven_through.0);
        if self.source_is_lost || age >= HEARD_RECENTLY_NS {
            return Ok(());
        }
        let failure = Failure::new(
            format!("{} was heard from {} ago", named.name, duration_ns(age)),
            "it may be running, and what is written there after a failover is not protected",
            "stop it first; if it is gone, say so with --source-is-lost; to only try, use `farshore branch open`",
        );
        Err(failure.with(Verdict::Refused))
    }

    /// Whether the machine's chain is closed now; a vault that takes no writes cannot be.
    fn close(
        &self,
        vault: &UnlockedVault,
        operator: &Arc<WriterSession>,
        named: &Named,
        branch: ChainId,
        output: Output,
    ) -> Done<bool> {
        let control = ChainControl::new(vault.store(), operator, vault.keys());
        match control.close(named.chain, branch, &format!("failover of {}", named.name)) {
            Ok(_) => Ok(true),
            Err(VaultError::Store(StoreError::ReadOnly { .. })) => {
                output.line("the vault takes no writes: source not fenced, points not pinned")?;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The branch of a failover that was interrupted before its branch existed.
fn unfinished(vault: &UnlockedVault, named: &Named, successor: ChainId) -> Done<ChainId> {
    match ChainHistory::find(vault.store(), vault.keys(), successor)? {
        None => Ok(successor),
        Some(_) => {
            let what = format!("{} has failed over already", named.name);
            let why = format!("it goes on as the branch {successor}");
            let remedy = format!(
                "`farshore branch reopen {successor}` serves it again; `farshore failover cancel` takes the failover back"
            );
            Err(Failure::new(what, why, remedy).with(Verdict::Unchanged))
        }
    }
}

impl Decide {
    fn run(&self, output: Output, commit: bool) -> Done {
        let vault = self.authority.unlock(&self.place, &self.keys)?;
        let operator = self.authority.session(&vault)?;
        let (named, history) = machine(&vault, self.machine.as_deref())?;
        let nothing = |what: String| {
            let why = "its history is open";
            Failure::new(what, why, "nothing is left to do").with(Verdict::Unchanged)
        };
        let Some(closed) = history.standing.closed() else {
            return Err(nothing(format!("{} has not failed over", named.name)));
        };
        let control = ChainControl::new(vault.store(), &operator, vault.keys());
        if commit {
            if matches!(history.standing.phase, Phase::Ended(_)) {
                let what = format!("the failover of {} was committed before", named.name);
                return Err(Failure::new(what, "", "nothing is left to do").with(Verdict::Unchanged));
            }
            control.commit(named.chain)?;
        } else {
            confirm(output, &named.name)?;
            control.cancel(named.chain, "taken back by an operator")?;
        }
        let event = if commit { "committed" } else { "cancelled" };
        output.object(&json!({
            "event": event, "machine": named.name, "chain": named.chain.to_string(), "branch": closed.successor.to_string(),
        }))?;
        let since = WallTime::from_seconds(closed.seconds);
        match commit {
            true => output.line(format!("committed: {} goes on as the branch {}", named.name, closed.successor)),
            false => {
                output.line(format!(
                    "cancelled the failover of {since}: {} goes on where it is, and heals",
                    named.name
                ))?;
                output.remark(format!(
                    "the branch stays as it is; `farshore branch discard {}` gives it up",
                    closed.successor
                ))
            }
        }
    }
}

/// Has a person type the machine's name. Without a terminal, `--yes` is needed.
fn confirm(output: Output, name: &str) -> Done {
    use std::io::{BufRead, IsTerminal, Write};
    if output.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        let what = format!("this decides which {name} is the one that counts");
        return Err(usage(what, "there is no terminal to ask on", "add --yes if that is meant").with(Verdict::Refused));
    }
    let refused = |error: std::io::Error| io_failure("the terminal cannot be read", &error);
    let mut err = std::io::stderr();
    write!(err, "this decides which {name} is the one that counts\ntype its name to go on: ")
        .and_then(|()| err.flush())
        .map_err(refused)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(refused)?;
    match answer.trim() == name {
        true => Ok(()),
        false => {
            Err(Failure::new("not confirmed", "nothing was done", "type the name, or add --yes").with(Verdict::Refused))
        }
    }
}
