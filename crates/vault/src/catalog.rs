//! The catalog: which machines the vault protects, which chain each follows, which branches were opened. A numbered
//! log with several writers: whoever loses a number takes the next. Reading it all gives the state.
//!
//! A revocation begins another epoch of the name key with the number behind it. Everybody who had not read so far loses
//! that number's old name to the revocation itself, or to whoever came before.

use std::collections::BTreeMap;
use std::sync::Arc;

use replication::codec::{DecodeError, Decoder, Encoder};
use replication::{ChainId, DiskGeometry, MachineId, Position, SequenceNumber};

use crate::error::VaultError;
use crate::keys::revoked::{self, epoch_behind};
use crate::keys::{Authority, NameEpoch, NameSwitch, OpenKeys, WriterId, WriterRole, WriterSession};
use crate::limits;
use crate::manifest::{decode_list, decode_option, list, option};
use crate::numbered::NumberedNames;
use crate::object::{Compression, FrameClass, ObjectBuilder, ObjectKind, ObjectReader, Placement};
use crate::store::{ObjectName, Store, StoreError};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogEntry {
    /// A machine is protected, or its description changed.
    MachineProtected {
        /// The machine.
        machine: MachineId,
        /// Its name for people.
        name: String,
        /// The chain it follows.
        chain: ChainId,
        /// Its disks.
        disks: Vec<DiskGeometry>,
    },
    /// The machine's history goes on along another chain, after a failback.
    MachineFollows {
        /// The machine.
        machine: MachineId,
        /// The chain.
        chain: ChainId,
    },
    /// A branch was opened.
    BranchOpened {
        /// Its chain.
        chain: ChainId,
        /// The position below it.
        parent: Position,
        /// Its name for people.
        name: String,
        /// Whether its parent's history must be kept for it.
        pinned: bool,
    },
    /// A branch is no longer wanted.
    BranchDiscarded {
        /// Its chain.
        chain: ChainId,
    },
    /// A writer was granted.
    WriterGranted {
        /// Who.
        writer: WriterId,
        /// Its name for people.
        label: String,
    },
    /// A remark of a person or a program.
    Note {
        /// What.
        text: String,
    },
    /// A writer's grant ends. What it committed before stays valid.
    GrantRevoked {
        /// Whose.
        writer: WriterId,
        /// The number from which its manifests fail, for each chain it wrote to; in any other chain all fail.
        fails_from: BTreeMap<ChainId, u64>,
        /// Why, for people.
        reason: String,
        /// The name-key epoch in which the next entry is named, and every chain from its next generation on; `None` leaves
        /// names as they are.
        names: Option<NameSwitch>,
    },
    /// What a machine is made of, as its agent says: a JSON document that this crate does not look into.
    MachineDescribed {
        /// The machine.
        machine: MachineId,
        /// The document.
        document: String,
    },
}

impl CatalogEntry {
    /// Whether whoever signs with `authority` may say this.
    fn is_for(&self, authority: Authority) -> bool {
        match self {
            CatalogEntry::MachineProtected { .. } | CatalogEntry::MachineDescribed { .. } => {
                authority.is(WriterRole::ProcessServer)
            }
            CatalogEntry::MachineFollows { .. }
            | CatalogEntry::BranchOpened { .. }
            | CatalogEntry::BranchDiscarded { .. } => {
                authority.is(WriterRole::BranchHost) || authority.is(WriterRole::Operator)
            }
            CatalogEntry::WriterGranted { .. } | CatalogEntry::GrantRevoked { .. } => authority == Authority::Owner,
            CatalogEntry::Note { .. } => true,
        }
    }
}

/// An entry with its place and author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number.
    pub number: u64,
    /// Who wrote it.
    pub writer: WriterId,
    /// Wall time of its writer, in seconds since 1970. An annotation.
    pub seconds: u64,
    /// What happened.
    pub entry: CatalogEntry,
}

/// A protected machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its name for people.
    pub name: String,
    /// The chain it follows.
    pub chain: ChainId,
    /// Its disks when they were last described.
    pub disks: Vec<DiskGeometry>,
}

/// An opened branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// The position below it.
    pub parent: Position,
    /// Its name for people.
    pub name: String,
    /// Whether its parent's history must be kept for it.
    pub pinned: bool,
    /// No longer wanted.
    pub discarded: bool,
}

/// What all entries add up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    /// Protected machines.
    pub machines: BTreeMap<MachineId, Machine>,
    /// Branches, discarded ones included.
    pub branches: BTreeMap<ChainId, Branch>,
    /// The newest description of each machine that has one: JSON.
    pub descriptions: BTreeMap<MachineId, String>,
    /// Granted writers by label.
    pub writers: BTreeMap<WriterId, String>,
    /// Writers whose grant ended, and why.
    pub revoked: BTreeMap<WriterId, String>,
    /// Number of the next entry.
    pub next_number: u64,
    /// The name-key epoch in which it is named.
    pub name_epoch: NameEpoch,
    /// Every entry, oldest first.
    pub records: Vec<Record>,
    /// What does not count, for people.
    pub alarms: Vec<String>,
}

impl Catalog {
    /// Reads all entries.
    ///
    /// # Errors
    /// Those of the store, and [`VaultError::NewerFormat`].
    pub fn load(store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<Catalog, VaultError> {
        let mut catalog = Catalog { next_number: 1, ..Catalog::default() };
        catalog.refresh(store, keys)?;
        Ok(catalog)
    }

    /// Adds the entries written since.
    ///
    /// # Errors
    /// As [`Catalog::load`].
    pub fn refresh(&mut self, store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<(), VaultError> {
        loop {
            let name = self.next_name(store, keys)?;
            let record = match read_entry(store, keys, &name, self.next_number) {
                Ok(record) => Some(record),
                Err(VaultError::Store(StoreError::NotFound(_))) => return Ok(()),
                Err(error) if error.condemns_object() => {
                    self.alarms.push(error.to_string());
                    None
                }
                Err(error) => return Err(error),
            };
            let entry = record.as_ref().map(|record| &record.entry);
            let begins = epoch_behind(store, keys, (self.next_number, self.name_epoch), entry)?;
            keys.with_revocations(|known| known.note(self.next_number, entry, begins));
            self.next_number += 1;
            self.name_epoch = begins.map_or(self.name_epoch, |switch| switch.epoch);
            if let Some(record) = record {
                self.add(record);
            }
        }
    }

    fn next_name(&self, store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<ObjectName, VaultError> {
        let names = NumberedNames::of_catalog(keys);
        if names.has(self.name_epoch) {
            return names.name(self.next_number, self.name_epoch);
        }
        // Which key is that epoch's is told by what these keys know of the catalog.
        revoked::refresh(store, keys)?;
        NumberedNames::of_catalog(keys).name(self.next_number, self.name_epoch)
    }

    /// Writes `entry` under the next number that nobody else takes, and adds it and whatever came before it. Durable
    /// on return. An answer that was lost and an entry that was nevertheless written make it appear twice; entries
    /// are written so that this does no harm.
    ///
    /// # Errors
    /// Those of the store.
    pub fn append(
        &mut self,
        store: &Arc<dyn Store>,
        keys: &OpenKeys,
        session: &WriterSession,
        entry: &CatalogEntry,
    ) -> Result<u64, VaultError> {
        loop {
            self.refresh(store, keys)?;
            let number = self.next_number;
            if self.append_next(store, keys, session, entry)? {
                return Ok(number);
            }
        }
    }

    /// As [`Catalog::append`], if nothing was added since this was read; otherwise adds that and returns `false`.
    ///
    /// # Errors
    /// As [`Catalog::append`].
    pub(crate) fn append_next(
        &mut self,
        store: &Arc<dyn Store>,
        keys: &OpenKeys,
        session: &WriterSession,
        entry: &CatalogEntry,
    ) -> Result<bool, VaultError> {
        let number = self.next_number;
        let name = self.next_name(store, keys)?;
        let mut builder = ObjectBuilder::new(session, Placement::of_vault(ObjectKind::Catalog), name);
        let mut content = Encoder::new();
        content.varint(number).u64(session.clock().wall().seconds());
        entry.encode(&mut content);
        let content = bytes::Bytes::from(content.finish());
        if let Err(DecodeError::TooLarge { field, value, limit }) = decode_content(content.clone(), number) {
            return Err(VaultError::LimitExceeded { what: field, value, limit });
        }
        let root = builder.add(FrameClass::Index, &content, Compression::Fast)?;
        let won = match builder.finish(Some(root)).put(store.as_ref()) {
            Ok(()) => true,
            Err(StoreError::AlreadyExists(_)) => false,
            Err(error) => return Err(error.into()),
        };
        self.refresh(store, keys)?;
        Ok(won)
    }

    fn add(&mut self, record: Record) {
        match record.entry.clone() {
            CatalogEntry::MachineProtected { machine, name, chain, disks } => {
                self.machines.insert(machine, Machine { name, chain, disks });
            }
            CatalogEntry::MachineFollows { machine, chain } => {
                if let Some(machine) = self.machines.get_mut(&machine) {
                    machine.chain = chain;
                }
            }
            CatalogEntry::BranchOpened { chain, parent, name, pinned } => {
                self.branches.insert(chain, Branch { parent, name, pinned, discarded: false });
            }
            CatalogEntry::BranchDiscarded { chain } => {
                if let Some(branch) = self.branches.get_mut(&chain) {
                    branch.discarded = true;
                }
            }
            CatalogEntry::WriterGranted { writer, label } => {
                self.writers.insert(writer, label);
            }
            CatalogEntry::GrantRevoked { writer, reason, .. } => {
                self.revoked.insert(writer, reason);
            }
            CatalogEntry::MachineDescribed { machine, document } => {
                self.descriptions.insert(machine, document);
            }
            CatalogEntry::Note { .. } => {}
        }
        self.records.push(record);
    }
}

pub(crate) fn read_entry(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    name: &ObjectName,
    number: u64,
) -> Result<Record, VaultError> {
    let foreign = |reason| VaultError::Foreign { name: name.clone(), reason };
    let object = ObjectReader::open_reading(store, keys, name, limits::MANIFEST_READ_BYTES)?;
    if object.header().placement.kind != ObjectKind::Catalog {
        return Err(foreign("it is no catalog entry"));
    }
    let writer = object.header().writer;
    if keys.with_revocations(|known| known.fails_entry(writer, number)) {
        return Err(foreign("its writer's grant was revoked before"));
    }
    let content = object.root()?;
    // An entry kind of a later version: what it changes is unknown here, so nothing may be concluded from the rest.
    let mut record = decode_content(content, number).map_err(|error| match error {
        DecodeError::Undefined { field: KIND_FIELD, value } => {
            VaultError::NewerFormat { name: name.clone(), what: format!("catalog entry {value}") }
        }
        error => VaultError::content(name)(error),
    })?;
    record.writer = writer;
    if !record.entry.is_for(keys.authority(store, writer)?) {
        return Err(foreign("its writer's grant does not allow what it says"));
    }
    Ok(record)
}

pub(crate) fn decode_content(content: bytes::Bytes, number: u64) -> Result<Record, DecodeError> {
    let mut input = Decoder::new(content);
    if input.varint("entry number")? != number {
        return Err(DecodeError::Inconsistent("an entry states another number than its name"));
    }
    let seconds = input.u64("entry time")?;
    let entry = CatalogEntry::decode(&mut input)?;
    input.finish()?;
    Ok(Record { number, writer: WriterId::OWNER, seconds, entry })
}

const KIND_FIELD: &str = "catalog entry kind";
const MACHINE_PROTECTED: u8 = 1;
const MACHINE_FOLLOWS: u8 = 2;
const BRANCH_OPENED: u8 = 3;
const BRANCH_DISCARDED: u8 = 4;
const WRITER_GRANTED: u8 = 5;
const NOTE: u8 = 6;
const GRANT_REVOKED: u8 = 7;
const MACHINE_DESCRIBED: u8 = 10;
// Reserved: 8 pin changed, 9 format enabled.

impl CatalogEntry {
    pub(crate) fn encode(&self, out: &mut Encoder) {
        match self {
            CatalogEntry::MachineProtected { machine, name, chain, disks } => {
                out.u8(MACHINE_PROTECTED).raw(&machine.0).text(name).raw(&chain.0);
                list(out, disks, |out, disk| disk.encode(out));
            }
            CatalogEntry::MachineFollows { machine, chain } => {
                out.u8(MACHINE_FOLLOWS).raw(&machine.0).raw(&chain.0);
            }
            CatalogEntry::BranchOpened { chain, parent, name, pinned } => {
                out.u8(BRANCH_OPENED).raw(&chain.0).raw(&parent.chain.0).u64(parent.sequence.0).text(name);
                out.u8((*pinned).into());
            }
            CatalogEntry::BranchDiscarded { chain } => {
                out.u8(BRANCH_DISCARDED).raw(&chain.0);
            }
            CatalogEntry::WriterGranted { writer, label } => {
                out.u8(WRITER_GRANTED).raw(&writer.0).text(label);
            }
            CatalogEntry::MachineDescribed { machine, document } => {
                out.u8(MACHINE_DESCRIBED).raw(&machine.0).text(document);
            }
            CatalogEntry::Note { text } => {
                out.u8(NOTE).text(text);
            }
            CatalogEntry::GrantRevoked { writer, fails_from, reason, names } => {
                out.u8(GRANT_REVOKED).raw(&writer.0).varint(fails_from.len() as u64);
                for (chain, number) in fails_from {
                    out.raw(&chain.0).varint(*number);
                }
                out.text(reason);
                option(out, names.as_ref(), |out, switch| switch.encode(out));
            }
        }
    }

    pub(crate) fn decode(input: &mut Decoder) -> Result<CatalogEntry, DecodeError> {
        Ok(match input.u8(KIND_FIELD)? {
            MACHINE_PROTECTED => CatalogEntry::MachineProtected {
                machine: MachineId(input.array("machine id")?),
                name: input.text("machine name", limits::LABEL_BYTES_MAX)?,
                chain: ChainId(input.array("chain id")?),
                disks: decode_list(input, "disks", replication::limits::DISKS_MAX as u64, DiskGeometry::decode)?,
            },
            MACHINE_FOLLOWS => CatalogEntry::MachineFollows {
                machine: MachineId(input.array("machine id")?),
                chain: ChainId(input.array("chain id")?),
            },
            BRANCH_OPENED => CatalogEntry::BranchOpened {
                chain: ChainId(input.array("chain id")?),
                parent: Position {
                    chain: ChainId(input.array("parent chain")?),
                    sequence: SequenceNumber(input.u64("parent sequence")?),
                },
                name: input.text("branch name", limits::LABEL_BYTES_MAX)?,
                pinned: match input.u8("pinned")? {
                    0 => false,
                    1 => true,
                    value => return Err(DecodeError::Undefined { field: "pinned", value: value.into() }),
                },
            },
            BRANCH_DISCARDED => CatalogEntry::BranchDiscarded { chain: ChainId(input.array("chain id")?) },
            WRITER_GRANTED => CatalogEntry::WriterGranted {
                writer: WriterId(input.array("writer id")?),
                label: input.text("writer label", limits::LABEL_BYTES_MAX)?,
            },
            MACHINE_DESCRIBED => CatalogEntry::MachineDescribed {
                machine: MachineId(input.array("machine id")?),
                document: input.text("description", replication::limits::DESCRIPTION_BYTES_MAX)?,
            },
            NOTE => CatalogEntry::Note { text: input.text("note", limits::REASON_BYTES_MAX)? },
            GRANT_REVOKED => CatalogEntry::GrantRevoked {
                writer: WriterId(input.array("writer id")?),
                fails_from: decode_list(input, "chains of a revocation", limits::REVOKED_CHAINS_MAX, |input| {
                    Ok((ChainId(input.array("chain id")?), input.varint("number")?))
                })?
                .into_iter()
                .collect(),
                reason: input.text("reason of a revocation", limits::REASON_BYTES_MAX)?,
                names: decode_option(input, NameSwitch::decode)?,
            },
            value => return Err(DecodeError::Undefined { field: KIND_FIELD, value: value.into() }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_answered(mut bytes: Vec<u8>, kind in 0u8..12) {
            let _ = decode_content(bytes.clone().into(), 1);
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Ok(entry) = CatalogEntry::decode(&mut Decoder::new(bytes)) {
                let mut out = Encoder::new();
                entry.encode(&mut out);
                prop_assert_eq!(CatalogEntry::decode(&mut Decoder::new(out.finish())), Ok(entry));
            }
        }
    }
}
