//! Ready-made ways to bring an application to rest.
//!
//! PostgreSQL recovers from any frozen file system by itself; a checkpoint before it makes that short. MySQL and MariaDB
//! get their tables flushed and locked in a session that lasts until the file systems are thawed; a session that ends
//! in whatever way lets go of the lock.

use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use world::Clock;

use super::script::{Running, User, check_trusted, command, first_present};
use super::settings::{HookConfig, HookKind};
use crate::system::SystemRoot;

/// What the client says when the lock is held.
const LOCKED: &str = "farshore-holds-the-lock";
/// How long a session may take to end when its work is done.
const FAREWELL_LIMIT: Duration = Duration::from_secs(10);

/// An application at rest. Dropping it lets the application go on.
pub(super) struct AtRestBy {
    name: &'static str,
    session: Option<Running>,
}

/// Brings an application to rest.
///
/// # Errors
/// Why it is not, in words.
pub(super) fn begin(
    root: &SystemRoot,
    hook: &HookConfig,
    clock: &dyn Clock,
    limit: Duration,
) -> Result<AtRestBy, String> {
    let name = hook.kind.name();
    let what = format!("the {name} hook");
    let (usual, owner): (&[&str], &str) = match hook.kind {
        HookKind::Postgresql => (&["/usr/bin/psql", "/usr/local/bin/psql"], "postgres"),
        HookKind::Mysql => (&["/usr/bin/mysql", "/usr/bin/mariadb", "/usr/local/bin/mysql"], "root"),
    };
    let program: Option<PathBuf> = hook.program.clone().or_else(|| first_present(usual));
    let program = program.ok_or_else(|| format!("{what} finds no client program; name it with `program`"))?;
    check_trusted(&program).map_err(|why| format!("{what} is not run: {why}"))?;
    let owner = hook.user.as_deref().unwrap_or(owner);
    let user = User::named(root, owner).ok_or_else(|| format!("{what} finds no user {owner}"))?;
    let mut command = command(&program, Some(&user));
    command.args(&hook.arguments);
    match hook.kind {
        HookKind::Postgresql => {
            command.args(["--no-psqlrc", "--no-password", "--quiet", "--set=ON_ERROR_STOP=1", "--command=CHECKPOINT"]);
            Running::start(what, command, Stdio::null())?.end(clock, limit)?;
            Ok(AtRestBy { name, session: None })
        }
        HookKind::Mysql => {
            command.args(["--batch", "--skip-column-names", "--unbuffered"]);
            let mut session = Running::start(what.clone(), command, Stdio::piped())?;
            let order = format!("FLUSH TABLES WITH READ LOCK;\nSELECT '{LOCKED}';\n");
            // Whoever has ended already says why in what it printed.
            let _ = session.input().map(|input| input.write_all(order.as_bytes()).and_then(|()| input.flush()));
            session.hear(LOCKED, clock, limit)?;
            Ok(AtRestBy { name, session: Some(session) })
        }
    }
}

impl AtRestBy {
    /// Whether the application still is at rest.
    ///
    /// # Errors
    /// It went on by itself, in words.
    pub(super) fn check(&mut self) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if session.is_running() {
            return Ok(());
        }
        Err(format!("{} went on before the point was taken: {}", self.name, session.said()))
    }

    /// Lets the application go on.
    ///
    /// # Errors
    /// It may not have been at rest until now, in words.
    pub(super) fn release(mut self, clock: &dyn Clock) -> Result<(), String> {
        let Some(mut session) = self.session.take() else { return Ok(()) };
        let _ = session.input().map(|input| input.write_all(b"UNLOCK TABLES;\n"));
        session.close_input();
        let ended = session.end(clock, FAREWELL_LIMIT);
        session.abandon(clock);
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use world::SystemClock;

    /// A stand-in for the client: it says what a MySQL client says, and notes in `log` what it was told.
    fn client(folder: &Path, body: &str) -> HookConfig {
        let path = folder.join("mysql");
        fs::write(&path, format!("#!/bin/sh\ncd {}\n{body}\n", folder.display())).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
        let arguments = vec!["--defaults-file=/etc/mysql/farshore.cnf".to_owned()];
        HookConfig { kind: HookKind::Mysql, program: Some(path), user: None, arguments }
    }

    const GOOD: &str = "test \"$1\" = --defaults-file=/etc/mysql/farshore.cnf || exit 9\n\
        while read -r line; do echo \"$line\" >> log; case \"$line\" in SELECT*) echo farshore-holds-the-lock;; esac; done\n\
        echo ended >> log";

    #[test]
    fn a_lock_is_held_until_it_is_released_and_never_longer_than_its_session() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let limit = Duration::from_secs(5);
        let begin = |hook: &HookConfig, limit| super::begin(&SystemRoot::running(), hook, &SystemClock, limit);
        let log = || fs::read_to_string(folder.path().join("log")).unwrap_or_default();

        let mut held = begin(&client(folder.path(), GOOD), limit).expect("the lock is held");
        held.check().expect("still held");
        assert_eq!(log().lines().count(), 2, "flushed and asked: {}", log());
        held.release(&SystemClock).expect("released in order");
        assert!(log().ends_with("UNLOCK TABLES;\nended\n"), "{}", log());

        // Dropped, as by a failure elsewhere.
        drop(begin(&client(folder.path(), GOOD), limit).expect("the lock is held"));

        let failed = begin(&client(folder.path(), "echo 'ERROR 1045: Access denied' >&2; exit 1"), limit);
        let failed = failed.err().expect("refused");
        assert!(failed.contains("exited with 1: ERROR 1045: Access denied"), "{failed}");
        let failed = begin(&client(folder.path(), "sleep 60"), Duration::from_millis(200)).err().expect("it hangs");
        assert!(failed.contains("did not come to rest within 200 ms"), "{failed}");

        // The server was restarted while the tables were locked.
        let short = "read -r a; read -r b; echo farshore-holds-the-lock; echo 'ERROR 2013: Lost connection'; exit 1";
        let mut held = begin(&client(folder.path(), short), limit).expect("the lock is held");
        let lost = (0..500).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            held.check().err()
        });
        assert!(lost.expect("noticed").contains("Lost connection"));
    }
}
