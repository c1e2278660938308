//! Which vault a command is about and what opens it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use replication::{ChainId, MachineId, PointTime, SequenceNumber};
use vault::chain::list_chains;
use vault::{
    Catalog, ChainHistory, Credential, FolderStore, Moment, OpenKeys, Point, PointError, Points, RolledBack, SeenHeads,
    Store, UnlockedVault, Vault,
};
use world::{Clock, Entropy, RealFiles, SystemClock, SystemEntropy};

use crate::failure::{Done, Failure, usage};
use crate::{keeper, secrets};

/// Branches on branches that are followed.
pub(crate) const ANCESTORS_MAX: usize = 64;

/// Where the vault is.
#[derive(Debug, Clone, Args)]
pub(crate) struct VaultPlace {
    /// Folder of the vault
    #[arg(long, value_name = "DIR", env = "FARSHORE_VAULT")]
    pub(crate) vault: PathBuf,
}

/// What opens it.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct KeyOptions {
    /// File whose contents are the passphrase; else FARSHORE_PASSPHRASE, else the terminal is asked
    #[arg(long, value_name = "FILE", env = "FARSHORE_PASSPHRASE_FILE", conflicts_with = "recovery_key_file")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// File with the words of the recovery key; - asks for them
    #[arg(long, value_name = "FILE", env = "FARSHORE_RECOVERY_KEY_FILE")]
    pub(crate) recovery_key_file: Option<PathBuf>,
}

/// The randomness of this machine.
pub(crate) fn entropy() -> Arc<dyn Entropy> {
    Arc::new(SystemEntropy)
}

/// The clocks of this machine.
pub(crate) fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock)
}

impl VaultPlace {
    /// The store, which must exist.
    pub(crate) fn store(&self) -> Done<Arc<dyn Store>> {
        Ok(Arc::new(FolderStore::open(&self.vault, entropy().as_ref())?))
    }

    /// The vault, locked.
    pub(crate) fn open(&self) -> Done<Vault> {
        Ok(Vault::open(self.store()?)?)
    }

    /// The vault, unlocked with what was given or what is asked for.
    pub(crate) fn unlock(&self, keys: &KeyOptions) -> Done<UnlockedVault> {
        keys.unlock(&self.open()?)
    }
}

impl KeyOptions {
    /// Unlocks with what was given; else with the key that `vault unlock` keeps, which opens for reading; else asks.
    pub(crate) fn unlock(&self, vault: &Vault) -> Done<UnlockedVault> {
        match self.kept(vault)? {
            Some(unlocked) => Ok(unlocked),
            None => self.unlock_fresh(vault),
        }
    }

    /// What the key that `vault unlock` keeps opens, unless another key was given.
    fn kept(&self, vault: &Vault) -> Done<Option<UnlockedVault>> {
        if self.is_given()? {
            return Ok(None);
        }
        Ok(keeper::read_key(vault.id()).map(|key| vault.unlock_reading(key)).transpose()?)
    }

    fn is_given(&self) -> Done<bool> {
        Ok(self.recovery_key_file.is_some() || secrets::given_passphrase(self.passphrase_file.as_deref())?.is_some())
    }

    /// As [`KeyOptions::unlock`], past the key that is kept: for what takes the owner's.
    pub(crate) fn unlock_fresh(&self, vault: &Vault) -> Done<UnlockedVault> {
        match &self.recovery_key_file {
            Some(path) => Ok(vault.unlock(Credential::Recovery(&secrets::recovery_key(path)?))?),
            None => {
                let passphrase = secrets::passphrase(self.passphrase_file.as_deref())?;
                Ok(vault.unlock(Credential::Passphrase(&passphrase))?)
            }
        }
    }

    /// As [`KeyOptions::unlock`], but nothing is asked for: `None` if nothing was given.
    pub(crate) fn unlock_if_given(&self, vault: &Vault) -> Done<Option<UnlockedVault>> {
        if self.is_given()? { self.unlock_fresh(vault).map(Some) } else { self.kept(vault) }
    }
}

/// What to say if the store lacks what this host has seen of `history`'s chain. Whatever keeps it from remembering is no
/// reason to keep anybody from recovering.
pub(crate) fn rolled_back(vault: &UnlockedVault, history: &ChainHistory) -> Done<Option<RolledBack>> {
    let Some(heads) = seen_heads() else { return Ok(None) };
    let (verdict, kept) = heads.observe(vault.store(), vault.keys(), history)?;
    if let Err(error) = kept {
        tracing::debug!(%error, "the newest manifest cannot be remembered");
    }
    Ok(verdict)
}

/// Where this user's commands remember what they have seen.
pub(crate) fn seen_heads() -> Option<SeenHeads> {
    let root = match std::env::var_os("FARSHORE_SEEN_HEADS") {
        Some(given) => PathBuf::from(given),
        None => crate::commands::branch::default_state().ok()?,
    };
    std::fs::create_dir_all(&root).ok()?;
    Some(SeenHeads::new(Arc::new(RealFiles::new(root)), "heads", entropy()))
}

/// Says aloud that the store was rolled back, whatever else is printed.
pub(crate) fn warn_if_rolled_back(vault: &UnlockedVault, history: &ChainHistory) -> Done {
    if let Some(rolled_back) = rolled_back(vault, history)? {
        eprintln!("ALARM: {rolled_back}");
        eprintln!("       if it was restored on purpose: farshore vault status --forget-seen");
    }
    Ok(())
}

/// A line of history that was asked for by name.
pub(crate) struct Named {
    /// Its chain.
    pub(crate) chain: ChainId,
    /// What people call it.
    pub(crate) name: String,
    /// The machine, if the name is one's; `None` for a branch.
    pub(crate) machine: Option<MachineId>,
}

/// Finds the machine or branch that `asked` names: by name, by id, or by its chain's id. Beginnings of ids of at least
/// eight digits do.
pub(crate) fn find(store: &Arc<dyn Store>, catalog: &Catalog, asked: &str) -> Done<Named> {
    let matches = |id: &str| id == asked || asked.len() >= 8 && id.starts_with(asked);
    let mut found: Vec<Named> = Vec::new();
    for (id, machine) in &catalog.machines {
        if machine.name == asked || matches(&id.to_string()) || matches(&machine.chain.to_string()) {
            found.push(Named { chain: machine.chain, name: machine.name.clone(), machine: Some(*id) });
        }
    }
    for (chain, branch) in &catalog.branches {
        let followed = catalog.machines.values().any(|machine| machine.chain == *chain);
        if !followed && (branch.name == asked && !branch.discarded || matches(&chain.to_string())) {
            found.push(Named { chain: *chain, name: branch.name.clone(), machine: None });
        }
    }
    if found.len() == 1 {
        return Ok(found.remove(0));
    }
    // A chain that no machine follows any more, such as the one before a failback.
    if let Ok(chain) = asked.parse::<ChainId>()
        && list_chains(store.as_ref())?.contains(&chain)
    {
        return Ok(Named { chain, name: format!("chain {}", &asked[..8]), machine: None });
    }
    let known: Vec<String> = catalog.machines.values().map(|machine| machine.name.clone()).collect();
    match found.len() {
        0 => Err(Failure::new(
            format!("no machine or branch is named {asked:?}"),
            match known.is_empty() {
                true => "this vault protects no machine yet".to_owned(),
                false => format!("this vault knows {}", known.join(", ")),
            },
            "see `farshore vault machines` and `farshore branch list`",
        )),
        count => Err(usage(
            format!("{count} machines or branches are named {asked:?}"),
            "",
            "name it by the id that `farshore vault machines --json` or `farshore branch list` shows",
        )),
    }
}

/// The only machine of the vault, or the one that was named.
pub(crate) fn find_or_only(store: &Arc<dyn Store>, catalog: &Catalog, asked: Option<&str>) -> Done<Named> {
    match (asked, catalog.machines.len()) {
        (Some(asked), _) => find(store, catalog, asked),
        (None, 1) => {
            let (id, machine) = catalog.machines.iter().next().expect("there is one");
            Ok(Named { chain: machine.chain, name: machine.name.clone(), machine: Some(*id) })
        }
        (None, 0) => Err(Failure::new(
            "this vault protects no machine yet",
            "",
            "join an agent: `farshore token new --role agent`, then `farshore-agent join`",
        )),
        (None, count) => {
            let names: Vec<&str> = catalog.machines.values().map(|machine| machine.name.as_str()).collect();
            Err(usage(format!("this vault holds {count} machines"), names.join(", "), "name the one you mean"))
        }
    }
}

/// Chooses the point for `moment` on `chain`; what lies before the chain began is looked for on the chains below it.
///
/// # Errors
/// That of the chain itself, if no chain below knows the moment either.
pub(crate) fn choose(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    chain: ChainId,
    moment: &Moment,
) -> Done<(ChainHistory, Point)> {
    let mut history = ChainHistory::load(store, keys, chain)?;
    let mut first: Option<PointError> = None;
    // Seconds are counted back from the newest moment of the chain that was asked about, whichever chain holds the point.
    let newest = history.proven_through;
    for _ in 0..ANCESTORS_MAX {
        let counted = match moment {
            Moment::Back(seconds) if first.is_some() => {
                Moment::At(PointTime(newest.0.saturating_sub(seconds.saturating_mul(1_000_000_000))))
            }
            other => other.clone(),
        };
        let error = match Points::new(store, keys, &history).resolve(&counted) {
            Ok(point) => return Ok((history, point)),
            Err(error) => error,
        };
        let elsewhere = matches!(
            error,
            PointError::OutsideHistory { .. } | PointError::NoApplicationPoint { .. } | PointError::NoSuchMarker(_)
        );
        let parent = history.parent.filter(|_| elsewhere);
        first.get_or_insert(error);
        let Some(parent) = parent else { break };
        history = ChainHistory::load(store, keys, parent.chain)?;
    }
    Err(first.expect("the loop ends early with an error only").into())
}

/// Geometry of every disk at `sequence`; a branch that recorded none has its parent's.
pub(crate) fn disks_at(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    history: &ChainHistory,
    sequence: SequenceNumber,
) -> Done<Vec<replication::DiskGeometry>> {
    let mut disks = history.geometry_at(sequence);
    let mut parent = history.parent;
    for _ in 0..ANCESTORS_MAX {
        let (true, Some(position)) = (disks.is_empty(), parent) else { break };
        let below = ChainHistory::load(store, keys, position.chain)?;
        disks = below.geometry_at(position.sequence);
        parent = below.parent;
    }
    Ok(disks)
}
