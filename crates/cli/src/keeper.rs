//! The keeper: a process of this user that holds a vault's read key in memory for a while, so that later commands need not
//! ask. It never holds the owner's key, so nothing can be granted or revoked through it.
//!
//! It listens on a socket in a directory that only this user can enter, and answers `read` with the key's 32 bytes and
//! `lock` by ending. The key reaches it through a pipe; nothing is written to a disk.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use vault::keys::ReadSecret;
use vault::{UnlockedVault, VaultId};
use zeroize::Zeroizing;

use crate::failure::{Done, Failure, io_failure};

const KEY_LEN: usize = 32;
/// How long one side waits for the other.
const SILENCE: Duration = Duration::from_secs(5);

/// Options of the hidden command that is the keeper.
#[derive(Debug, Args)]
pub(crate) struct Keeper {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    seconds: u64,
}

/// The directory of this user's keepers. Made if need be; one that others could enter is refused.
fn directory() -> io::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let directory = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) => PathBuf::from(runtime).join("farshore"),
        None => std::env::temp_dir().join(format!("farshore-{user}")),
    };
    match fs::DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(&directory)?;
    match found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0 {
        true => Ok(directory),
        false => Err(io::Error::other(format!("{} can be entered by others", directory.display()))),
    }
}

fn socket(vault: VaultId) -> io::Result<PathBuf> {
    Ok(directory()?.join(format!("{vault}.key")))
}

fn connect(vault: VaultId) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket(vault)?)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

/// The read key of `vault`, if a keeper holds it.
pub(crate) fn read_key(vault: VaultId) -> Option<ReadSecret> {
    let mut stream = connect(vault).ok()?;
    let mut key = Zeroizing::new([0; KEY_LEN]);
    stream.write_all(b"read\n").and_then(|()| stream.read_exact(key.as_mut())).ok()?;
    Some(ReadSecret::new(*key))
}

/// Ends the keeper of `vault`. `false` if there is none.
pub(crate) fn lock(vault: VaultId) -> bool {
    let Ok(mut stream) = connect(vault) else { return false };
    let told = stream.write_all(b"lock\n");
    // It closes the connection when it has forgotten the key.
    told.is_ok() && stream.read(&mut [0]).is_ok()
}

/// Starts a keeper of the vault's read key for `seconds`. An earlier one is ended.
pub(crate) fn start(vault: &UnlockedVault, seconds: u64) -> Done {
    let refused = |error: io::Error| io_failure("the key cannot be kept", &error);
    lock(vault.vault().id());
    let socket = socket(vault.vault().id()).map_err(refused)?;
    let program = std::env::current_exe().map_err(refused)?;
    let mut child = Command::new(program)
        .arg("__keeper")
        .arg("--socket")
        .arg(&socket)
        .args(["--seconds", &seconds.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(refused)?;
    let mut pipe = child.stdin.take().expect("it was asked for");
    pipe.write_all(vault.read_secret().expose()).map_err(refused)?;
    drop(pipe);
    let mut line = String::new();
    let answer = child.stdout.take().expect("it was asked for");
    BufReader::new(answer).read_line(&mut line).map_err(refused)?;
    match line.trim() {
        "ready" => Ok(()),
        said => Err(Failure::new("the key cannot be kept", said, "see whether the directory of its socket is usable")),
    }
}

impl Keeper {
    /// Holds the key that comes on standard input until the time is over or somebody locks.
    pub(crate) fn run(&self) -> Done {
        let refused = |error: io::Error| io_failure("the key cannot be kept", &error);
        // Neither a debugger of this user nor a core dump gets the key.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
            .map_err(|error| refused(error.into()))?;
        let mut key = Zeroizing::new([0; KEY_LEN]);
        io::stdin().lock().read_exact(key.as_mut()).map_err(refused)?;
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket).map_err(refused)?;
        fs::set_permissions(&self.socket, fs::Permissions::from_mode(0o600)).map_err(refused)?;
        let (socket, time) = (self.socket.clone(), Duration::from_secs(self.seconds));
        std::thread::spawn(move || {
            std::thread::sleep(time);
            end(&socket);
        });
        println!("ready");
        for stream in listener.incoming().flatten() {
            let mut line = String::new();
            let asked = stream
                .set_read_timeout(Some(SILENCE))
                .and_then(|()| BufReader::new((&stream).take(16)).read_line(&mut line));
            match (asked, line.as_str()) {
                (Ok(_), "read\n") => drop((&stream).write_all(key.as_ref())),
                (Ok(_), "lock\n") => end(&self.socket),
                _ => {}
            }
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "a thread ends the whole keeper; it holds nothing but a key")]
fn end(socket: &Path) {
    let _ = fs::remove_file(socket);
    // The system clears the memory of a process that is gone before anybody else gets it.
    std::process::exit(0);
}
