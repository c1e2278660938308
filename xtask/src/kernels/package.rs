//! A kernel from the distribution's packages, unpacked beside the build and not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::apt::Apt;

/// A kernel that can be booted.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its release, such as `6.1.0-56-cloud-amd64`.
    pub(super) release: String,
    pub(super) image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The uncompressed module at `name`, below the kernel's module folder, without its suffix.
    pub(super) fn module(&self, name: &Path) -> Result<Vec<u8>> {
        let file = |suffix: &str| self.modules.join(format!("{}.{suffix}", name.display()));
        if file("ko").exists() {
            return fs::read(file("ko")).with_context(|| format!("cannot read {}", file("ko").display()));
        }
        let unpacked = Command::new("xz").args(["-dc"]).arg(file("ko.xz")).output().context("cannot run xz")?;
        ensure!(unpacked.status.success(), "{} has no module {}", self.release, name.display());
        Ok(unpacked.stdout)
    }
}

/// The newest kernel of `series` in `suite`, below `folder`.
pub(super) fn fetch(series: &str, suite: &str, folder: &Path) -> Result<Kernel> {
    let root = folder.join(series);
    if let Ok(kernel) = unpacked(&root) {
        return Ok(kernel);
    }
    let apt = Apt::new(folder, &[suite])?;
    let name = newest_kernel(&apt, series)?;
    println!("fetching {name}");
    let download = root.join("download");
    fs::create_dir_all(&download).context("cannot make a folder")?;
    apt.run("apt-get", &["-q", "download", &name], &download)?;
    let package = fs::read_dir(&download)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let package = package.with_context(|| format!("{name} was not downloaded"))?;
    let status = Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root).status().context("cannot run dpkg-deb")?;
    ensure!(status.success(), "cannot unpack {}", package.display());
    fs::remove_dir_all(&download).context("cannot remove the download")?;
    unpacked(&root)
}

fn unpacked(root: &Path) -> Result<Kernel> {
    let listed = fs::read_dir(root.join("boot")).with_context(|| format!("no kernel below {}", root.display()))?;
    let image = listed.flatten().map(|entry| entry.path());
    let release = |path: &Path| Some(path.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned());
    let Some((image, release)) = image.filter_map(|path| Some((path.clone(), release(&path)?))).next() else {
        bail!("no kernel below {}", root.display());
    };
    // Newer releases of the distribution have only /usr/lib.
    let places = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(&release).join("kernel"));
    let modules = places.into_iter().find(|place| place.exists()).context("the kernel has no modules")?;
    Ok(Kernel { release, image, modules })
}

fn newest_kernel(apt: &Apt, series: &str) -> Result<String> {
    // The variant for virtual machines: a fifth of the size, with all that the tests need.
    let pattern = format!("^linux-image-{}[^ ]*-cloud-amd64$", series.replace('.', r"\."));
    let found = apt.run("apt-cache", &["search", "--names-only", &pattern], Path::new("/"))?;
    let names = found.lines().filter_map(|line| line.split(' ').next());
    let newest = names.max_by_key(|name| numbers(name));
    Ok(newest.with_context(|| format!("no kernel {series} in the package lists"))?.to_owned())
}

/// The numbers in a name, so that 5.10.0-9 comes before 5.10.0-32.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_as_numbers() {
        assert!(numbers("linux-image-5.10.0-32-cloud-amd64") > numbers("linux-image-5.10.0-9-cloud-amd64"));
    }
}
