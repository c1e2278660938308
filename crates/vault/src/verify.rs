//! Full verification: every object, every index, every byte that an index refers to.
//!
//! Three questions, each answered for the whole vault: is every object what was once written (header, signature,
//! digest)? Does every index entry lead to a chunk that decrypts and hashes to what the entry says? Is there anything
//! that nobody refers to? Damage is reported by object, with the chains, disks and sequence numbers it affects.
//!
//! Without the read key, data frames are covered by the digests only; the report says so.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;

use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::{ChainId, DiskId, LeafHash, PlainLeafHash, SequenceNumber};

use crate::error::{Damage, VaultError};
use crate::layer::LayerRef;
use crate::object::{FrameRef, ObjectReader};
use crate::parallel;
use crate::store::ObjectName;
use crate::table::{Content, Entry, Tree};
use crate::table_read::Table;
use crate::view_source::{FrameSource, ObjectId};

/// Objects whose bodies are in memory at once, per worker.
const OBJECTS_AT_ONCE: usize = 1;
/// Frames checked between two looks at the table.
const FRAMES_AT_ONCE: usize = 256;
/// Claims remembered, so that chunks shared by many tables are checked once. 32 MiB.
const CLAIMS_REMEMBERED_MAX: usize = 1 << 20;
/// Ranges listed for one damaged object; beyond, the last one is widened.
const AFFECTED_MAX: usize = 256;

/// A chain to be verified.
#[derive(Debug, Clone)]
pub struct ChainToVerify {
    /// Which.
    pub chain: ChainId,
    /// Its tables, each resolved to an object.
    pub layers: Vec<LayerRef>,
    /// Tables that merged ones replaced, see [`crate::ChainHistory::superseded`]. Their objects are checked like all
    /// others; that nothing refers to them any more is as it should be.
    pub superseded: Vec<LayerRef>,
}

/// What part of the history damage affects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affected {
    /// The chain.
    pub chain: ChainId,
    /// The disk.
    pub disk: DiskId,
    /// Bytes of the disk.
    pub range: ByteRange,
    /// Cuts from here on, until the range was overwritten, show the damage.
    pub from: SequenceNumber,
}

/// A damaged object.
#[derive(Debug)]
pub struct DamagedObject {
    /// The first thing found wrong with it.
    pub error: VaultError,
    /// What refers to its damaged parts. Empty if nothing does.
    pub affects: Vec<Affected>,
}

/// What a verification found.
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// Objects looked at.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
    /// Tables walked through.
    pub tables: u64,
    /// Their entries.
    pub entries: u64,
    /// Entries that record a defect of the source disk.
    pub unreadable_entries: u64,
    /// Data frames decrypted and compared with the leaf hashes of the entries that refer to them.
    pub frames: u64,
    /// Bytes of disk data compared. Partly written leaves have no hash and are authenticated only.
    pub data_bytes: u64,
    /// Whether the read key was there. If not, `frames` is zero and data is covered by object digests only.
    pub data_checked: bool,
    /// Damaged objects, by name.
    pub damaged: BTreeMap<ObjectName, DamagedObject>,
    /// Objects in formats that this program does not know, by name: nothing can be said about them.
    pub newer: BTreeMap<ObjectName, DamagedObject>,
    /// Objects that nobody with a grant for this vault wrote, and that nothing refers to. They are ignored.
    pub foreign: Vec<(ObjectName, VaultError)>,
    /// Tables that merged ones replaced. Nothing needs them; maintenance will remove them.
    pub superseded: Vec<ObjectName>,
    /// Packs and tables that no table of the chains given refers to, now or before. Left by crashes and lost races;
    /// harmless.
    pub unreferenced: Vec<ObjectName>,
}

impl VerifyReport {
    /// Whether everything is known to be right.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.newer.is_empty()
    }
}

/// Verifies all objects of a vault, and all tables of `chains`.
///
/// # Errors
/// Those of the store that are no verdict about an object. Damage is no error: it is in the report.
pub fn verify(
    source: &FrameSource,
    chains: &[ChainToVerify],
    workers: NonZeroUsize,
) -> Result<VerifyReport, VaultError> {
    let report = VerifyReport { data_checked: source.keys().is_unlocked(), ..VerifyReport::default() };
    let mut verifier = Verifier { source, workers, report, referenced: HashSet::new(), claims: HashSet::new() };
    let names = verifier.check_objects()?;
    for chain in chains {
        for layer in &chain.layers {
            verifier.check_layer(chain.chain, layer)?;
        }
    }
    let replaced = verifier.replaced_tables(chains);
    let Verifier { mut report, referenced, .. } = verifier;
    let of_tables = |name: &ObjectName| name.as_str().starts_with("packs/") || name.as_str().contains("/s/");
    report.foreign.retain(|(name, _)| !referenced.contains(name));
    (report.superseded, report.unreferenced) = names
        .into_iter()
        .filter(|name| of_tables(name) && !referenced.contains(name))
        .partition(|name| replaced.contains(name));
    Ok(report)
}

struct Verifier<'a> {
    source: &'a FrameSource,
    workers: NonZeroUsize,
    report: VerifyReport,
    referenced: HashSet<ObjectName>,
    claims: HashSet<[u8; 16]>,
}

/// What entries say about one frame.
type Claims = HashMap<(ObjectId, FrameRef), Vec<Claim>>;

struct Claim {
    entry: Entry,
    at: u32,
    hashes: Vec<LeafHash>,
}

impl Verifier<'_> {
    /// Header, signature and digest of every object in the store.
    fn check_objects(&mut self) -> Result<BTreeSet<ObjectName>, VaultError> {
        let store = self.source.store();
        let mut names = BTreeSet::new();
        let at_once = self.workers.get() * OBJECTS_AT_ONCE;
        let mut batch = Vec::with_capacity(at_once);
        let mut results: Vec<(ObjectName, Result<u64, VaultError>)> = Vec::new();
        let mut check = |batch: &mut Vec<ObjectName>| {
            let checked = parallel::map(self.workers, batch, |name| {
                let object = ObjectReader::open(store, self.source.keys(), name)?;
                object.verify_body()?;
                Ok(object.stored_len())
            });
            results.extend(batch.drain(..).zip(checked));
        };
        store.as_ref().for_each::<VaultError>("", |name| {
            // Left by the test whether the store honours create-only; they hold no history and have no header.
            if name.as_str().starts_with("probe/") {
                return Ok(true);
            }
            batch.push(name.clone());
            names.insert(name);
            if batch.len() == at_once {
                check(&mut batch);
            }
            Ok(true)
        })?;
        check(&mut batch);
        for (name, result) in results {
            self.report.objects += 1;
            match result {
                Ok(bytes) => self.report.object_bytes += bytes,
                Err(error @ VaultError::Foreign { .. }) => self.report.foreign.push((name, error)),
                Err(error) => self.note(&name, error, None)?,
            }
        }
        Ok(names)
    }

    /// The objects of superseded tables that nothing else needs, as far as they can be read.
    fn replaced_tables(&self, chains: &[ChainToVerify]) -> HashSet<ObjectName> {
        let mut objects = HashSet::new();
        for layer in chains.iter().flat_map(|chain| &chain.superseded) {
            let Some(host) = layer.object().filter(|host| !self.referenced.contains(*host)) else { continue };
            objects.insert(host.clone());
            let Ok(table) = self.source.table(layer) else { continue };
            for tree in [Tree::Wide, Tree::Narrow] {
                let pages = table.page_objects(tree, self.source).unwrap_or_default();
                objects.extend(pages.into_iter().map(|object| self.source.name(object)));
            }
        }
        objects
    }

    fn check_layer(&mut self, chain: ChainId, layer: &LayerRef) -> Result<(), VaultError> {
        let name = layer.object().expect("layers are resolved before they are verified").clone();
        self.referenced.insert(name.clone());
        self.report.tables += 1;
        let whole = affected_by_table(chain, layer);
        let table = match self.source.table(layer) {
            Ok(table) => table,
            Err(error) => return self.note(&name, error, whole),
        };
        let mut found = 0;
        for tree in [Tree::Wide, Tree::Narrow] {
            if let Err(error) = self.check_tree(chain, layer, &table, tree, &mut found) {
                self.note(&name, error, whole.clone())?;
                return Ok(());
            }
        }
        if found != table.entries || found != layer.entries {
            let error = VaultError::damaged(&name, Damage::Contradiction("its table has lost or gained entries"));
            self.note(&name, error, whole)?;
        }
        Ok(())
    }

    /// Walks one tree. Errors are those of its pages; what is wrong with data is noted.
    fn check_tree(
        &mut self,
        chain: ChainId,
        layer: &LayerRef,
        table: &Arc<Table>,
        tree: Tree,
        found: &mut u64,
    ) -> Result<(), VaultError> {
        let mut claims = Claims::new();
        let mut stream = table.stream(tree, self.source)?;
        let mut known = HashMap::new();
        while let Some((entry, hashes)) = stream.current() {
            *found += 1;
            self.report.entries += 1;
            if entry.sequence < layer.first || entry.sequence > layer.last {
                return Err(self.source.damaged(table.host, "an entry lies outside its table's sequence numbers"));
            }
            match entry.content {
                Content::Data(place) => {
                    let object = match known.get(&place.source) {
                        Some(object) => *object,
                        None => {
                            let object = table.source(place.source, self.source)?;
                            self.referenced.insert(self.source.name(object));
                            known.insert(place.source, object);
                            object
                        }
                    };
                    if self.report.data_checked && self.is_new_claim(object, place.frame, place.at, entry, hashes) {
                        let claim = Claim { entry: *entry, at: place.at, hashes: hashes.to_vec() };
                        claims.entry((object, place.frame)).or_default().push(claim);
                    }
                }
                Content::Unreadable => self.report.unreadable_entries += 1,
                Content::Zero | Content::Discarded => {}
            }
            stream.advance()?;
            if claims.len() >= FRAMES_AT_ONCE {
                self.check_claims(chain, std::mem::take(&mut claims))?;
            }
        }
        self.check_claims(chain, claims)?;
        for object in table.page_objects(tree, self.source)? {
            self.referenced.insert(self.source.name(object));
        }
        Ok(())
    }

    fn is_new_claim(&mut self, object: ObjectId, frame: FrameRef, at: u32, entry: &Entry, hashes: &[LeafHash]) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.source.name(object).as_str().as_bytes());
        for number in [frame.offset, frame.sealed_len.into(), frame.ordinal.into(), at.into(), entry.range.len] {
            hasher.update(&number.to_le_bytes());
        }
        // Which bytes of the frame are whole leaves depends on the place on the disk.
        hasher.update(&(entry.range.start % LEAF_BYTES).to_le_bytes());
        hashes.iter().for_each(|hash| {
            hasher.update(&hash.0);
        });
        if self.claims.len() >= CLAIMS_REMEMBERED_MAX {
            self.claims.clear();
        }
        self.claims.insert(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    fn check_claims(&mut self, chain: ChainId, claims: Claims) -> Result<(), VaultError> {
        let mut claims: Vec<((ObjectId, FrameRef), Vec<Claim>)> = claims.into_iter().collect();
        claims.sort_unstable_by_key(|(place, _)| *place);
        let checked = parallel::map(self.workers, &claims, |((object, frame), claims)| {
            check_frame(self.source, *object, frame, claims)
        });
        for (((object, _), claims), checked) in claims.iter().zip(checked) {
            self.report.frames += 1;
            let name = self.source.name(*object);
            for (claim, result) in claims.iter().zip(checked) {
                match result {
                    Ok(bytes) => self.report.data_bytes += bytes,
                    Err(error) => {
                        let Entry { disk, range, sequence: from, .. } = claim.entry;
                        self.note(&name, error, Some(Affected { chain, disk, range, from }))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Records what is wrong with an object; passes on what is no verdict about it. The object blamed is the one that
    /// the error names, if it names one: a table may fail because of an object that holds one of its pages.
    fn note(&mut self, name: &ObjectName, error: VaultError, affected: Option<Affected>) -> Result<(), VaultError> {
        let name = match &error {
            VaultError::Damaged { name, .. }
            | VaultError::Foreign { name, .. }
            | VaultError::NewerFormat { name, .. } => name.clone(),
            VaultError::Store(crate::store::StoreError::NotFound(name)) => name.clone(),
            VaultError::Locked { .. } => name.clone(),
            _ => return Err(error),
        };
        let found = match error {
            VaultError::NewerFormat { .. } => &mut self.report.newer,
            _ => &mut self.report.damaged,
        };
        let entry = found.entry(name).or_insert(DamagedObject { error, affects: Vec::new() });
        if let Some(affected) = affected {
            add_affected(&mut entry.affects, affected);
        }
        Ok(())
    }
}

/// Without its table, nothing is known of what a layer held but its bounds.
fn affected_by_table(chain: ChainId, layer: &LayerRef) -> Option<Affected> {
    let (disk, start) = layer.begin;
    let end = if layer.end.0 == disk { layer.end.1 } else { u64::MAX };
    Some(Affected { chain, disk, range: ByteRange::between(start, end)?, from: layer.first })
}

fn add_affected(affects: &mut Vec<Affected>, new: Affected) {
    if let Some(last) = affects.last_mut() {
        let same = last.chain == new.chain && last.disk == new.disk;
        let touching = last.range.end() >= new.range.start && new.range.end() >= last.range.start;
        if same && (touching || affects.len() >= AFFECTED_MAX) {
            let last = affects.last_mut().expect("it was just there");
            let start = last.range.start.min(new.range.start);
            last.range = ByteRange::new(start, last.range.end().max(new.range.end()) - start);
            last.from = last.from.min(new.from);
            return;
        }
    }
    affects.push(new);
}

/// For each claim, the bytes compared or what is wrong.
fn check_frame(
    source: &FrameSource,
    object: ObjectId,
    frame: &FrameRef,
    claims: &[Claim],
) -> Vec<Result<u64, VaultError>> {
    // Past the cache: each frame is wanted once.
    let plain = match source.reader(object).and_then(|reader| reader.frame(frame)) {
        Ok(plain) => plain,
        Err(first) => {
            let again = || source.reader(object).and_then(|reader| reader.frame(frame)).map(|_| 0);
            let mut results = vec![Err(first)];
            results.extend(claims.iter().skip(1).map(|_| again()));
            return results;
        }
    };
    let key = &source.keys().shared().leaf;
    let check = |claim: &Claim| {
        let contradiction = |what| Err(source.damaged(object, what));
        let Some(bytes) = plain.get(claim.at as usize..claim.at as usize + claim.entry.range.len as usize) else {
            return contradiction("a frame is shorter than its index says");
        };
        let Some(leaves) = claim.entry.range.whole_units(LEAF_BYTES) else { return Ok(0) };
        let whole = &bytes[leaves.within(claim.entry.range.start)];
        let whole: Vec<&[u8]> = whole.chunks_exact(LEAF_BYTES as usize).collect();
        let found = PlainLeafHash::of_each(&whole).into_iter().map(|plain| key.leaf(plain));
        if found.eq(claim.hashes.iter().copied()) {
            Ok(leaves.len)
        } else {
            contradiction("its data does not hash to what its index says")
        }
    };
    claims.iter().map(check).collect()
}
