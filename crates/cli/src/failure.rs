//! What a command says when it does not do what it was asked: what happened, why, and what to do.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitCode;

use process_server::StartError;
use recovery::BranchError;
use serde_json::json;
use vault::points::PointError;
use vault::store::StoreError;
use vault::{Damage, VaultError};

/// How a command ended that did not succeed; the program's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It failed.
    Failed = 1,
    /// It was asked in a way that makes no sense.
    Usage = 2,
    /// Nothing changed, because it already was so.
    Unchanged = 3,
    /// It is unsafe and was refused; the remedy names the flag that overrides.
    Refused = 4,
}

/// A failure in three parts.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) verdict: Verdict,
    /// What happened: one line, no full stop.
    pub(crate) what: String,
    /// Why; may be empty where `what` says it.
    pub(crate) why: String,
    /// What the person can do about it.
    pub(crate) remedy: String,
}

/// What every command returns.
pub(crate) type Done<T = ()> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new(what: impl Into<String>, why: impl Into<String>, remedy: impl Into<String>) -> Failure {
        Failure { verdict: Verdict::Failed, what: what.into(), why: why.into(), remedy: remedy.into() }
    }

    /// The same failure with another exit code.
    pub(crate) fn with(self, verdict: Verdict) -> Failure {
        Failure { verdict, ..self }
    }

    /// A failure whose reason is `cause` and everything that caused it.
    pub(crate) fn because(what: impl Into<String>, cause: &dyn Error, remedy: impl Into<String>) -> Failure {
        Failure::new(what, chain(cause), remedy)
    }

    /// Writes it to standard error.
    pub(crate) fn print(&self, as_json: bool) {
        if as_json {
            let code = self.verdict as u8;
            let object = json!({"error": self.what, "why": self.why, "do": self.remedy, "code": code});
            eprintln!("{object}");
        } else {
            eprintln!("{self}");
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.verdict as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        for part in [&self.why, &self.remedy] {
            for line in part.lines() {
                write!(f, "\n       {line}")?;
            }
        }
        Ok(())
    }
}

/// An error and its causes in one sentence. Causes that repeat what was said are left out.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

impl From<VaultError> for Failure {
    fn from(error: VaultError) -> Failure {
        let said = error.to_string();
        match error {
            VaultError::Store(error) => error.into(),
            VaultError::WrongPassphrase => Failure::new(
                said,
                "none of its key slots accepted it",
                "check keyboard layout and capitals and try again, or use the recovery key: --recovery-key-file",
            ),
            VaultError::WrongRecoveryKey => Failure::new(
                said,
                "the words are well-formed, so nothing was mistyped",
                "look for the recovery kit whose fingerprint is the one `farshore vault status` shows",
            ),
            VaultError::NewerFormat { .. } => Failure::new(
                said,
                "an older program could misread it, so it reads nothing",
                "upgrade this farshore; nothing was changed",
            ),
            VaultError::NotAVault { .. } => Failure::new(
                said,
                "a vault begins with an object named \"vault\", made by `farshore vault init`",
                "name the folder of an existing vault with --vault, or make one with `farshore vault init`",
            ),
            VaultError::AlreadyAVault { .. } => Failure::new(
                said,
                "a vault is made once and never overwritten",
                "use it as it is, or name an empty folder with --vault",
            )
            .with(Verdict::Unchanged),
            VaultError::Damaged { ref damage, .. } => Failure::new(
                said,
                match damage {
                    Damage::Signature | Damage::Body | Damage::Frame(_) => {
                        "its bytes were changed after they were written; they are never returned as data"
                    }
                    _ => "what is stored is not what was once written",
                },
                "run `farshore vault verify` to see what it affects, and restore the object from another copy",
            ),
            VaultError::Locked { .. } => Failure::new(
                said,
                "reading disk contents takes the passphrase or the recovery key",
                "give --passphrase-file or --recovery-key-file",
            ),
            VaultError::Fenced { .. } => Failure::new(
                said,
                "a chain has one writer at a time, and the newest wins",
                "stop this writer; look at `farshore vault status` for who writes now",
            ),
            VaultError::ChainClosed { successor, ended, .. } => Failure::new(
                said,
                "nobody adds to a history that was failed over",
                match ended {
                    true => format!("bring the branch home: `farshore failback {successor}`"),
                    false => {
                        format!(
                            "`farshore failback {successor}` brings it home, `farshore failover cancel` takes it back"
                        )
                    }
                },
            ),
            VaultError::Revoked { .. } => Failure::new(
                said,
                "nothing that it writes counts any more",
                "move its file of keys aside and grant it anew with `farshore vault grant`",
            ),
            VaultError::NameKeyMissing { .. } => Failure::new(
                said,
                "each revocation begins another name key, of which every reader and writer has a sealed copy in keys/",
                "bring keys/ back from a copy of the vault, or move this writer's file of keys aside and grant it anew",
            ),
            VaultError::NotPermitted { .. } => Failure::new(
                said,
                "each writer was granted for one thing",
                "`farshore vault key show` lists the grants; `farshore vault grant --role ROLE` makes another",
            ),
            VaultError::OwnerKeyNeeded => Failure::new(
                said,
                "granting, revoking and failing over are the owner's, unless an operator's keys are given",
                "give --passphrase-file or --recovery-key-file; for a failover, --operator-keys does, too",
            )
            .with(Verdict::Refused),
            VaultError::Foreign { .. }
            | VaultError::NumberBurnt { .. }
            | VaultError::WrongChainState { .. }
            | VaultError::LimitExceeded { .. } => {
                Failure::new(said, "", "run `farshore vault status` and `farshore vault verify` to see what is there")
            }
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        let said = error.to_string();
        let source = error.source().map(chain).unwrap_or_default();
        let remedy = match &error {
            StoreError::NotAStore { .. } => "name an existing folder with --vault",
            StoreError::ReadOnly { .. } => "give this user write permission, or mount the file system writable",
            StoreError::Full { .. } => "free space or enlarge the file system, then try again; nothing was lost",
            StoreError::NotCreateOnly(_) => "keep the vault on a store that refuses to overwrite",
            StoreError::NotFound(_) => "check that the vault was copied completely: `farshore vault verify`",
            StoreError::AlreadyExists(_) => "nothing was changed; try again",
            StoreError::Unavailable { .. } => "try again once the store answers",
        };
        Failure::new(said, source, remedy)
    }
}

impl From<PointError> for Failure {
    fn from(error: PointError) -> Failure {
        let said = error.to_string();
        match error {
            PointError::NoApplicationPoint { .. } => Failure::new(
                said,
                "such a point is a marker that was set while the machine's file systems were frozen",
                "set one with `farshore-agent freeze --mark NAME`, or choose `latest`",
            ),
            PointError::OutsideHistory { .. } => Failure::new(
                said,
                "a point exists only where the source is proven to have been captured",
                "choose a moment that `farshore vault points` lists, or `latest`",
            ),
            PointError::InsideGap { asked, gap, nearest, .. } => Failure::new(
                format!("{asked} lies in a gap: {gap}"),
                "what was written there did not reach the vault in order, so no state of it is a true one",
                format!("choose another moment; {}", lower_first(&nearest)),
            ),
            PointError::NoSuchMarker(_) => Failure::new(
                said,
                "moments are: latest, latest-app, \"2026-11-22 14:03:07\" (UTC), -90s, @<sequence>, or a marker's name",
                "list the markers with `farshore vault points --markers`",
            ),
            PointError::Vault(error) => error.into(),
        }
    }
}

fn lower_first(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_lowercase().chain(letters).collect())
}

impl From<BranchError> for Failure {
    fn from(error: BranchError) -> Failure {
        let said = chain(&error);
        let remedy = match error {
            BranchError::Vault(error) => return error.into(),
            BranchError::Point(error) => return error.into(),
            BranchError::NoDisks(_) => "choose a later moment; `farshore vault points` lists them",
            BranchError::NoMachine(_) => "list them with `farshore vault machines`",
            BranchError::NoBranch(_) => {
                "name the state directory it was opened with, or open its chain as a new branch"
            }
            BranchError::InUse(_) => "stop the process that serves it first",
            BranchError::Ended { .. } => "open its chain as a new branch",
            BranchError::TakenOver { .. } => "open its chain as a new branch to go on from its newest point",
            BranchError::NotGranted => {
                "run `farshore vault grant --role branch-host --state-dir DIR` with the owner's passphrase once, or keep the \
                 branch on this host with --local"
            }
            BranchError::NoRoom => "see whether the vault can be reached and has space",
            BranchError::Read(_) => "run `farshore vault verify` to see what is damaged",
            _ => "see the reason; the branch's state is as it was",
        };
        Failure::new(said, "", remedy)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        Failure::new(error.what, error.why, error.what_to_do)
    }
}

/// A failure of the operating system at something named.
pub(crate) fn io_failure(what: impl Into<String>, error: &io::Error) -> Failure {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "check the name",
        io::ErrorKind::PermissionDenied => "check the permissions, or run as a user who has them",
        io::ErrorKind::StorageFull => "free space and try again",
        io::ErrorKind::AlreadyExists => "name another place; nothing was overwritten",
        io::ErrorKind::ConnectionRefused => "check that the server is running and that the address is right",
        _ => "see what the system said, and try again",
    };
    Failure::new(what, error.to_string(), remedy)
}

/// A failure of the way in which the command was asked.
pub(crate) fn usage(what: impl Into<String>, why: impl Into<String>, remedy: impl Into<String>) -> Failure {
    Failure::new(what, why, remedy).with(Verdict::Usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_and_indented_reasons() {
        let failure = Failure::new("disk /dev/sdb is mounted at /srv", "failback writes over it", "unmount it");
        let text = "error: disk /dev/sdb is mounted at /srv\n       failback writes over it\n       unmount it";
        assert_eq!(failure.to_string(), text);
        assert_eq!(Failure::new("no", "", "wait").to_string(), "error: no\n       wait");
    }

    #[test]
    fn causes_are_told_once() {
        let inner = io::Error::other("disk on fire");
        let error = StoreError::Unavailable { at: "packs/1".into(), source: Box::new(inner) };
        assert_eq!(chain(&error), "the store failed at packs/1: disk on fire");
        assert_eq!(chain(&VaultError::from(error)), "the store failed at packs/1: disk on fire");
    }
}
