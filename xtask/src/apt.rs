//! Debian's package manager with lists of its own, for packages of other suites than those the machine is set up with. The
//! machine's configuration stays as it is.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::search_path;

/// The distribution's own keys, where its package manager does not trust them by default.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// `apt-get` and its relatives, with the lists of some suites.
#[derive(Debug)]
pub(crate) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Fetches the lists of `suites` into `folder`.
    ///
    /// # Errors
    /// This is no Debian, or its archive does not have them.
    pub(crate) fn new(folder: &Path, suites: &[&str]) -> Result<Apt> {
        let own = folder.join(format!("apt-{}", suites.join("-")));
        fs::create_dir_all(own.join("lists/partial")).context("cannot make a folder")?;
        fs::create_dir_all(own.join("cache/archives/partial")).context("cannot make a folder")?;
        let archive = archive()?;
        let lines: String = suites.iter().map(|suite| format!("{archive} {suite} main\n")).collect();
        let sources = own.join("sources.list");
        fs::write(&sources, lines).context("cannot write the list of sources")?;
        let option = |name: &str, path: &Path| format!("-o{name}={}", path.display());
        let options = vec![
            option("Dir::Etc::sourcelist", &sources),
            "-oDir::Etc::sourceparts=/dev/null".to_owned(),
            option("Dir::State::lists", &own.join("lists")),
            option("Dir::Cache", &own.join("cache")),
            "-oAPT::Sandbox::User=root".to_owned(),
            "-oAcquire::Languages=none".to_owned(),
            "-oDPkg::Lock::Timeout=300".to_owned(),
        ];
        let apt = Apt { options };
        apt.run("apt-get", &["-q", "update"], &own)?;
        Ok(apt)
    }

    /// Runs `program` with these lists in `folder` and returns what it printed.
    ///
    /// # Errors
    /// It failed; with what it said.
    pub(crate) fn run(&self, program: &str, words: &[&str], folder: &Path) -> Result<String> {
        let mut command = Command::new(program);
        command.args(&self.options).args(words).current_dir(folder);
        let output = command.env("PATH", search_path()).env("DEBIAN_FRONTEND", "noninteractive").output();
        let output = output.with_context(|| format!("cannot run {program}"))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {} failed: {}", words.join(" "), errors.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Installs packages from the backports of this Debian: where what is installed came from there, the usual suites' versions
/// do not fit beside it.
///
/// # Errors
/// They cannot be had, or not without replacing something.
pub(crate) fn install_backports(packages: &[&str], folder: &Path) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = name.context("the system does not say its code name")?.trim_matches('"').to_owned();
    let backports = format!("{name}-backports");
    let apt = Apt::new(folder, &[&name, &backports])?;
    let mut words = vec!["-q", "install", "-y", "--no-install-recommends", "--no-upgrade", "--no-remove"];
    words.extend(["-t", &backports]);
    words.extend(packages);
    println!("$ apt-get {}", words.join(" "));
    apt.run("apt-get", &words, Path::new("/")).map(drop)
}

/// The archive that this machine uses for its distribution, as the beginning of a line in a list of sources.
fn archive() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"]);
    let listed = command.env("PATH", search_path()).output().context("cannot run apt-get")?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    let place = place_in(&listed).context("apt knows no archive of Debian")?;
    let signed = if Path::new(KEYS).exists() { format!("[signed-by={KEYS}] ") } else { String::new() };
    Ok(format!("deb {signed}{place}"))
}

fn place_in(listed: &str) -> Option<&str> {
    listed.lines().find_map(|line| line.strip_prefix("Debian Debian "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_debians_own() {
        let listed = "Other Other mirror:/one\nDebian Debian-Security mirror:/two\nDebian Debian mirror:/three\n";
        assert_eq!(place_in(listed), Some("mirror:/three"));
        assert_eq!(place_in("Other Other mirror:/one\n"), None);
    }
}
