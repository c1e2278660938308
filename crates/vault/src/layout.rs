//! The names of a vault's objects. `docs/formats/store-layout.md` is the map.

use replication::{ChainId, Generation};

use crate::keys::{NameEpoch, VaultId, WriterId};
use crate::store::ObjectName;

fn name(text: String) -> ObjectName {
    ObjectName::new(text).expect("names made here are valid")
}

/// The vault header, the first object of every vault.
pub fn vault_header() -> ObjectName {
    name("vault".into())
}

/// Folder of key slots and shared keys.
pub const KEYS: &str = "keys/";
/// Folder of grants.
pub const GRANTS: &str = "grants/";
/// Folder of the catalog.
pub const CATALOG: &str = "catalog/";
/// Folder of chains.
pub const CHAINS: &str = "chains/";

/// Folder of one vault's keys. The id keeps the leftovers of a vault that was never finished apart.
pub fn keys_of(vault: VaultId) -> String {
    format!("keys/{vault}/")
}

/// The shared keys of one epoch.
pub fn shared_keys(vault: VaultId, epoch: u32) -> ObjectName {
    name(format!("keys/{vault}/shared-{epoch}"))
}

/// A copy of a later epoch's name key, sealed to a writer or, for the owner, to the read key. Random, so that nobody can
/// take the name first.
pub(crate) fn name_key(vault: VaultId, epoch: NameEpoch, to: WriterId, unique: u64) -> ObjectName {
    match to {
        WriterId::OWNER => name(format!("keys/{vault}/name-{epoch}-{READER}-{unique:016x}")),
        writer => name(format!("keys/{vault}/name-{epoch}-{writer}-{unique:016x}")),
    }
}

const READER: &str = "read";

/// Which epoch's copy, and to whom, an object with this name is meant to be.
pub(crate) fn parse_name_key(vault: VaultId, name: &ObjectName) -> Option<(NameEpoch, WriterId)> {
    let rest = name.as_str().strip_prefix(&keys_of(vault))?.strip_prefix("name-")?;
    let (epoch, rest) = rest.split_once('-')?;
    let (to, _) = rest.split_once('-')?;
    let to = match to {
        READER => WriterId::OWNER,
        id => WriterId(id.parse::<ChainId>().ok()?.0),
    };
    Some((NameEpoch(epoch.parse().ok()?), to))
}

/// A key slot.
pub(crate) fn key_slot(vault: VaultId, kind: &str, unique: u64) -> ObjectName {
    name(format!("keys/{vault}/slot-{kind}-{unique:016x}"))
}

/// A writer's grant.
pub fn grant(writer: WriterId) -> ObjectName {
    name(format!("grants/{writer}"))
}

/// Folder of a chain's manifests.
pub fn manifests(chain: ChainId) -> String {
    format!("chains/{chain}/m/")
}

/// A segment or another table object of a chain.
pub fn segment(chain: ChainId, generation: Generation, unique: u128) -> ObjectName {
    name(format!("chains/{chain}/s/{:08x}-{unique:032x}", generation.0))
}

/// A pack of chunks.
pub fn pack(writer: WriterId, unique: u128) -> ObjectName {
    name(format!("packs/{writer}/{unique:032x}"))
}
