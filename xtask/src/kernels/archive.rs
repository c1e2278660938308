//! The files of a guest: a folder that becomes the archive which the kernel unpacks into memory at its start.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process::search_path;

/// Files for a guest, below a folder of this machine.
#[derive(Debug)]
pub(super) struct Archive {
    root: PathBuf,
}

impl Archive {
    /// Begins with nothing, in `root`, which is emptied.
    pub(super) fn new(root: PathBuf) -> Result<Archive> {
        if root.exists() {
            fs::remove_dir_all(&root).with_context(|| format!("cannot empty {}", root.display()))?;
        }
        Ok(Archive { root })
    }

    /// Adds a file at `name`, a path without a leading slash.
    pub(super) fn bytes(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.root.join(name);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            fs::write(&path, content)?;
            fs::set_permissions(&path, Permissions::from_mode(0o755))
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Adds a program of this machine at `name`, and every library it is linked with where it lies here.
    pub(super) fn program(&self, program: &Path, name: &str) -> Result<()> {
        let add = |from: &Path, name: &str| {
            let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            self.bytes(name, &content)
        };
        add(program, name)?;
        let listed = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
        // It fails for a static program, which needs nothing.
        for library in libraries(&String::from_utf8_lossy(&listed.stdout)) {
            add(Path::new(library), library.trim_start_matches('/'))?;
        }
        Ok(())
    }

    /// Writes the archive to `file`, in the form that the kernel knows.
    pub(super) fn finish(self, file: &Path) -> Result<()> {
        let archive = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
        let mut pack = Command::new("sh");
        pack.args(["-c", "find . | busybox cpio -o -H newc"]).current_dir(&self.root).env("PATH", search_path());
        let status = pack.stdout(archive).stderr(Stdio::null()).status().context("cannot run sh")?;
        ensure!(status.success(), "busybox cannot write {}", file.display());
        fs::remove_dir_all(&self.root).with_context(|| format!("cannot remove {}", self.root.display()))
    }
}

/// The paths in what `ldd` prints: `libc.so.6 => /lib/libc.so.6 (0x...)`, or the loader alone.
fn libraries(listed: &str) -> impl Iterator<Item = &str> {
    listed.lines().filter_map(|line| {
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        path.split_whitespace().next().filter(|path| path.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_by_path() {
        let listed = "\tlinux-vdso.so.1 (0x7ff)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld-linux.so.2 (0x7f)\n";
        assert_eq!(libraries(listed).collect::<Vec<_>>(), ["/lib/libc.so.6", "/lib64/ld-linux.so.2"]);
        assert_eq!(libraries("\tnot a dynamic executable\n").count(), 0);
    }
}
