//! The two ways in which Farshore makes a file's existence durable. No other module links or renames.
//!
//! Both write a temporary file first, sync it, give it its name, and sync the directory. A crash leaves either the
//! complete file under its name or a temporary file that [`sweep`] removes at the next start.

use std::io;

use crate::files::{AppendFile, Files};

/// Suffix of files that were being written when the process died.
const TEMPORARY_SUFFIX: &str = ".partial";

/// Creates `path` with the concatenation of `parts`, once and for ever.
///
/// Durable on return. `unique` distinguishes concurrent callers' temporary files and must differ between them.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if the name is taken (by anyone, at any time): nothing was changed. Any other
/// error: the name may or may not exist afterwards; read it back to know.
pub fn publish(files: &dyn Files, path: &str, parts: &[&[u8]], unique: &str) -> io::Result<()> {
    publish_as(files, path, parts, unique, Readers::Any)
}

/// As [`publish`], for a file that holds a secret: only its owner may read it.
pub fn publish_private(files: &dyn Files, path: &str, parts: &[&[u8]], unique: &str) -> io::Result<()> {
    publish_as(files, path, parts, unique, Readers::Owner)
}

/// As [`publish`], for a file that its creator goes on appending to: `parts` are durable under the name on return, what
/// is appended afterwards is durable after [`AppendFile::sync`].
pub fn publish_growing(
    files: &dyn Files,
    path: &str,
    parts: &[&[u8]],
    unique: &str,
) -> io::Result<Box<dyn AppendFile>> {
    publish_file(files, path, parts, unique, Readers::Owner)
}

/// As [`replace`], for a file that holds a secret: only its owner may read it.
pub fn replace_private(files: &dyn Files, path: &str, contents: &[u8], unique: &str) -> io::Result<()> {
    replace_as(files, path, contents, unique, Readers::Owner)
}

/// Who may read a new file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Readers {
    Any,
    Owner,
}

fn publish_as(files: &dyn Files, path: &str, parts: &[&[u8]], unique: &str, readers: Readers) -> io::Result<()> {
    publish_file(files, path, parts, unique, readers).map(drop)
}

fn publish_file(
    files: &dyn Files,
    path: &str,
    parts: &[&[u8]],
    unique: &str,
    readers: Readers,
) -> io::Result<Box<dyn AppendFile>> {
    let temporary = format!("{path}.{unique}{TEMPORARY_SUFFIX}");
    let file = write_synced(files, &temporary, parts, readers)?;
    let linked = files.link(&temporary, path);
    // The temporary name is rubbish from here on; losing this error costs a file that `sweep` finds.
    let _ = files.remove(&temporary);
    linked?;
    files.sync_directory(directory_of(path))?;
    Ok(file)
}

/// Makes `path` hold exactly `contents`, whatever it held before.
///
/// Durable on return; a crash in between leaves the old contents or the new, never a mixture.
pub fn replace(files: &dyn Files, path: &str, contents: &[u8], unique: &str) -> io::Result<()> {
    replace_as(files, path, contents, unique, Readers::Any)
}

fn replace_as(files: &dyn Files, path: &str, contents: &[u8], unique: &str, readers: Readers) -> io::Result<()> {
    let temporary = format!("{path}.{unique}{TEMPORARY_SUFFIX}");
    write_synced(files, &temporary, &[contents], readers)?;
    files.rename(&temporary, path)?;
    files.sync_directory(directory_of(path))
}

/// Removes what interrupted calls left in directory `path`; returns how many files that were.
///
/// Call only while nobody else publishes into the directory.
pub fn sweep(files: &dyn Files, path: &str) -> io::Result<usize> {
    let mut removed = 0;
    for name in files.list_files(path)?.iter().filter(|name| is_temporary(name)) {
        files.remove(&if path.is_empty() { name.clone() } else { format!("{path}/{name}") })?;
        removed += 1;
    }
    Ok(removed)
}

/// Whether `name` belongs to an unfinished file that readers must ignore.
pub fn is_temporary(name: &str) -> bool {
    name.ends_with(TEMPORARY_SUFFIX)
}

fn write_synced(files: &dyn Files, path: &str, parts: &[&[u8]], readers: Readers) -> io::Result<Box<dyn AppendFile>> {
    let create = || match readers {
        Readers::Any => files.create_new(path),
        Readers::Owner => files.create_new_private(path),
    };
    let mut file = match create() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            files.create_directory(directory_of(path))?;
            create()?
        }
        other => other?,
    };
    let written = parts.iter().try_for_each(|part| file.append(part)).and_then(|()| file.sync());
    if written.is_err() {
        // A full disk must not stay full of halves.
        let _ = files.remove(path);
    }
    written.map(|()| file)
}

fn directory_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::RealFiles;

    #[test]
    fn publish_creates_once_and_replace_replaces() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = RealFiles::new(folder.path());
        publish(&files, "a/b/c", &[b"one", b"two"], "x").expect("first create");
        assert_eq!(files.read("a/b/c").expect("readable"), b"onetwo");
        let again = publish(&files, "a/b/c", &[b"three"], "y").expect_err("the name is taken");
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(files.read("a/b/c").expect("readable"), b"onetwo");
        replace(&files, "a/b/c", b"four", "z").expect("replace");
        assert_eq!(files.read("a/b/c").expect("readable"), b"four");
        assert_eq!(files.list_files("a/b").expect("listable"), ["c"]);
    }

    #[test]
    fn secrets_are_readable_by_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = RealFiles::new(folder.path());
        publish_private(&files, "keys/a", &[b"secret"], "x").expect("publish");
        replace_private(&files, "keys/b", b"secret", "y").expect("replace");
        for name in ["keys/a", "keys/b"] {
            let mode = std::fs::metadata(folder.path().join(name)).expect("exists").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn sweep_removes_only_unfinished_files() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = RealFiles::new(folder.path());
        files.create_new("done").expect("create");
        files.create_new("half.1.partial").expect("create");
        assert_eq!(sweep(&files, "").expect("sweep"), 1);
        assert_eq!(files.list_files("").expect("list"), ["done"]);
    }
}
