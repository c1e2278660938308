//! Which disks a master target may write to, whatever an order says.
//!
//! An order comes from another host. What its flags override (a disk in use, another serial number) is the operator's
//! to decide; what this file refuses is the master target's.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::home_disk::{HomeDisk, HomeDisks, HomeOrder, HostView, Refusal};

/// What a master target may write to and what it never does.
#[derive(Debug, Clone, Default)]
pub struct HomeRules {
    /// Disks, image files, and folders whose contents are meant; `None` allows every path.
    pub allowed: Option<Vec<PathBuf>>,
    /// Folders of this host that Farshore itself lives on, with their names for people. Neither what lies in them nor the
    /// disks below them are ever written to.
    pub own: Vec<(PathBuf, String)>,
    /// What this host's kernel says about its disks.
    pub host: HostView,
}

impl HomeDisks for HomeRules {
    fn claim(&self, order: &HomeOrder) -> Result<HomeDisk, Refusal> {
        self.check(order)?;
        self.host.claim(order)
    }
}

/// How deep devices are built on one another at most, where that is followed.
const DEVICE_DEPTH_MAX: usize = 8;

impl HomeRules {
    /// Whether `order` may be carried out as far as the rules go. A path that does not exist is left to whoever opens it.
    ///
    /// # Errors
    /// Which rule forbids it.
    fn check(&self, order: &HomeOrder) -> Result<(), Refusal> {
        let shown = order.path.display();
        if !order.path.is_absolute() {
            return Err(Refusal::new(
                format!("{shown} is not an absolute path"),
                "a master target does not depend on where it was started",
                "begin the path with /",
            ));
        }
        let Ok(path) = order.path.canonicalize() else { return self.check_allowed(order, &order.path) };
        self.check_allowed(order, &path)?;
        for (folder, name) in &self.own {
            let folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
            let holds = path.starts_with(&folder) || is_below(&path, &folder, &self.host);
            if holds {
                return Err(Refusal::new(
                    format!("{shown} holds {name}"),
                    "a failback writes over the whole disk, and would destroy what it recovers from",
                    "name another disk with --to; no flag overrides this",
                ));
            }
        }
        Ok(())
    }

    fn check_allowed(&self, order: &HomeOrder, path: &Path) -> Result<(), Refusal> {
        let Some(allowed) = &self.allowed else { return Ok(()) };
        let named = |entry: &PathBuf| {
            let entry = entry.canonicalize().unwrap_or_else(|_| entry.clone());
            path == entry || entry.is_dir() && path.starts_with(&entry)
        };
        if allowed.iter().any(named) {
            return Ok(());
        }
        Err(Refusal::new(
            format!("this master target may not write to {}", order.path.display()),
            "`disks` in the [master_target] of its configuration does not name it",
            "add the disk or its folder there and restart the server, or name another disk with --to",
        ))
    }
}

/// Whether the block device `path`, or a part of it, is what the file system of `folder` lies on.
fn is_below(path: &Path, folder: &Path, host: &HostView) -> bool {
    let (Ok(device), Ok(folder)) = (std::fs::metadata(path), std::fs::metadata(folder)) else { return false };
    if !device.file_type().is_block_device() {
        return false;
    }
    let wanted = host.numbers_of(device.rdev());
    let mut layer = vec![HostView::number(folder.dev())];
    for _ in 0..DEVICE_DEPTH_MAX {
        if layer.iter().any(|number| wanted.contains(number)) {
            return true;
        }
        layer = layer.iter().flat_map(|number| host.built_on(number)).collect();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(path: &Path) -> HomeOrder {
        HomeOrder { disk: 0, path: path.to_owned(), size_bytes: 1, serial: None, any_disk: true, in_use: true }
    }

    #[test]
    fn only_what_is_named_may_be_written_and_never_what_farshore_lives_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for name in ["homes", "state/journal"] {
            std::fs::create_dir_all(at(name)).expect("made");
        }
        for name in ["homes/a", "b", "state/journal/1", "c"] {
            std::fs::write(at(name), "x").expect("written");
        }
        std::os::unix::fs::symlink(at("state/journal/1"), at("homes/sly")).expect("linked");
        let host = HostView { mountinfo: at("none"), sys: at("sys") };
        let own = vec![(at("state"), "this server's journal".to_owned())];
        let rules = HomeRules { allowed: Some(vec![at("homes"), at("b"), at("state")]), own, host };
        rules.check(&order(&at("homes/a"))).expect("in a folder that is named");
        rules.check(&order(&at("b"))).expect("named itself");
        rules.check(&order(&at("homes/missing"))).expect("whoever opens it says that it is missing");
        let refusal = rules.check(&order(&at("c"))).expect_err("not named");
        assert!(refusal.why.contains("[master_target]"), "{refusal}");
        for path in ["state/journal/1", "homes/sly"] {
            let rules = HomeRules { allowed: rules.allowed.clone().filter(|_| path != "homes/sly"), ..rules.clone() };
            let refusal = rules.check(&order(&at(path))).expect_err("Farshore's own");
            assert!(refusal.what.contains("this server's journal"), "{refusal}");
        }
        rules.check(&order(&at("homes/sly"))).expect_err("a link leads out of the folder");
        rules.check(&order(Path::new("homes/a"))).expect_err("relative");
    }

    #[test]
    fn devices_are_followed_down_to_the_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let host = HostView { mountinfo: folder.path().join("none"), sys: folder.path().to_owned() };
        let below = folder.path().join("dev/block/253:1/slaves/sda2");
        std::fs::create_dir_all(&below).expect("made");
        std::fs::write(below.join("dev"), "8:2\n").expect("written");
        assert_eq!(host.built_on("253:1"), ["8:2"]);
        assert!(host.built_on("8:2").is_empty());
    }
}
