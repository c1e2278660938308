//! Passphrases and recovery keys: from a file, the environment, or a terminal without echo.

use std::fs::{self, File};
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use vault::RecoveryKey;
use zeroize::Zeroizing;

use crate::failure::{Done, Failure, io_failure, usage};

/// The environment variable that may hold the passphrase.
pub(crate) const PASSPHRASE_VARIABLE: &str = "FARSHORE_PASSPHRASE";
/// Largest passphrase or recovery key file in bytes.
const SECRET_BYTES_MAX: u64 = 4096;
/// Shortest passphrase accepted for a new vault, in characters.
const PASSPHRASE_CHARS_MIN: usize = 8;

/// The passphrase of an existing vault, if it was given without a terminal.
pub(crate) fn given_passphrase(file: Option<&Path>) -> Done<Option<Zeroizing<String>>> {
    if let Some(path) = file {
        return read_secret(path, "passphrase").map(Some);
    }
    match std::env::var(PASSPHRASE_VARIABLE) {
        Ok(text) if !text.is_empty() => Ok(Some(Zeroizing::new(text))),
        Ok(_) | Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(usage(format!("{PASSPHRASE_VARIABLE} is not UTF-8"), "", "set it again, or use --passphrase-file"))
        }
    }
}

/// The passphrase, asked for on the terminal if it was not given.
pub(crate) fn passphrase(file: Option<&Path>) -> Done<Zeroizing<String>> {
    match given_passphrase(file)? {
        Some(text) => Ok(text),
        None => ask("Passphrase: "),
    }
}

/// A passphrase for a new vault; asked for twice.
pub(crate) fn new_passphrase(file: Option<&Path>) -> Done<Zeroizing<String>> {
    let text = match given_passphrase(file)? {
        Some(text) => text,
        None => {
            let first = ask("New passphrase: ")?;
            if *ask("The same again:  ")? != *first {
                return Err(usage("the two passphrases differ", "one of them was mistyped", "try again"));
            }
            first
        }
    };
    if text.chars().count() < PASSPHRASE_CHARS_MIN {
        return Err(usage(
            format!("the passphrase has fewer than {PASSPHRASE_CHARS_MIN} characters"),
            "whoever copies the vault can try passphrases for as long as they like",
            "use a longer one, such as five random words",
        ));
    }
    Ok(text)
}

/// The recovery key in `path`; `-` stands for the terminal or standard input.
pub(crate) fn recovery_key(path: &Path) -> Done<RecoveryKey> {
    let text = match path.as_os_str() == "-" {
        true if io::stdin().is_terminal() => ask("Recovery key (24 words): ")?,
        true => read_limited(io::stdin().lock(), "recovery key", "standard input")?,
        false => read_secret(path, "recovery key")?,
    };
    // The printed kit has a heading; only the words count.
    let words: String = text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    RecoveryKey::parse(&words).map_err(|error| {
        usage(error.to_string(), "each word carries a checksum for its place", "compare it with the printed kit")
    })
}

fn read_secret(path: &Path, what: &str) -> Done<Zeroizing<String>> {
    let refused = |error: &io::Error| io_failure(format!("the {what} file {} cannot be read", path.display()), error);
    let file = File::open(path).map_err(|error| refused(&error))?;
    let text = read_limited(file, what, &path.display().to_string())?;
    match text.trim_end_matches(['\n', '\r']) {
        "" => Err(usage(format!("the {what} file {} is empty", path.display()), "", format!("put the {what} into it"))),
        trimmed => Ok(Zeroizing::new(trimmed.to_owned())),
    }
}

fn read_limited(from: impl Read, what: &str, place: &str) -> Done<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(256));
    from.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => {
            usage(format!("{place} holds no {what}"), "it is not text", "name the right file")
        }
        _ => io_failure(format!("the {what} cannot be read from {place}"), &error),
    })?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        let why = format!("it has more than {SECRET_BYTES_MAX} bytes");
        return Err(usage(format!("{place} is too long for a {what}"), why, "name the right file"));
    }
    Ok(text)
}

/// Asks for one line without showing what is typed.
fn ask(prompt: &str) -> Done<Zeroizing<String>> {
    if !io::stdin().is_terminal() {
        return Err(no_terminal());
    }
    let refused = |error: io::Error| io_failure("the terminal cannot be read", &error);
    let stdin = io::stdin();
    let mut stderr = io::stderr();
    stderr.write_all(prompt.as_bytes()).and_then(|()| stderr.flush()).map_err(refused)?;
    let silent = Silence::begin(&stdin).map_err(refused)?;
    let mut text = Zeroizing::new(String::with_capacity(256));
    let read = stdin.lock().read_line(&mut text);
    drop(silent);
    // The line end that was typed was not shown either.
    let _ = stderr.write_all(b"\n");
    if read.map_err(refused)? == 0 {
        return Err(usage("nothing was typed", "", "try again, or use --passphrase-file"));
    }
    Ok(Zeroizing::new(text.trim_end_matches(['\n', '\r']).to_owned()))
}

fn no_terminal() -> Failure {
    usage(
        "a passphrase is needed and there is no terminal to ask on",
        "questions are asked of people only",
        format!("give --passphrase-file, --recovery-key-file, or {PASSPHRASE_VARIABLE} in the environment"),
    )
}

/// A terminal that does not echo, until this is dropped.
struct Silence<'a, F: AsFd> {
    terminal: &'a F,
    before: Termios,
}

impl<'a, F: AsFd> Silence<'a, F> {
    fn begin(terminal: &'a F) -> io::Result<Silence<'a, F>> {
        let before = tcgetattr(terminal)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(terminal, OptionalActions::Flush, &silent)?;
        Ok(Silence { terminal, before })
    }
}

impl<F: AsFd> Drop for Silence<'_, F> {
    fn drop(&mut self) {
        // Nothing better can be done about a terminal that went away.
        let _ = tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}

/// Writes a secret to a new file that only its owner may read.
pub(crate) fn write_new_secret(path: &Path, text: &[u8], what: &str) -> Done {
    NewSecret::create(path, what)?.write(text)
}

/// A new file that only its owner may read, for a secret that is about to exist. It is removed unless that was written.
pub(crate) struct NewSecret {
    file: File,
    path: PathBuf,
    what: String,
    written: bool,
}

impl NewSecret {
    /// Makes the empty file.
    pub(crate) fn create(path: &Path, what: &str) -> Done<NewSecret> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file =
            file.map_err(|error| io_failure(format!("the {what} cannot be written to {}", path.display()), &error))?;
        Ok(NewSecret { file, path: path.to_owned(), what: what.to_owned(), written: false })
    }

    /// Writes the secret. Durable on return.
    pub(crate) fn write(&mut self, text: &[u8]) -> Done {
        self.file.write_all(text).and_then(|()| rustix::fs::fsync(&self.file).map_err(io::Error::from)).map_err(
            |error| io_failure(format!("the {} cannot be written to {}", self.what, self.path.display()), &error),
        )?;
        self.written = true;
        Ok(())
    }
}

impl Drop for NewSecret {
    fn drop(&mut self) {
        if !self.written {
            // An empty file would be taken for a key. If it stays, that is all it is.
            let _ = fs::remove_file(&self.path);
        }
    }
}
