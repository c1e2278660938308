//! `farshore vault verify`: reads everything that is stored and everything that refers to it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use vault::chain::{Alarm, list_chains};
use vault::verify::{ChainToVerify, DamagedObject, verify};
use vault::view_source::{CacheBytes, FrameSource};
use vault::{Catalog, ChainHistory, ObjectName, VaultError};

use super::status::describe;
use crate::failure::{Done, Failure, chain};
use crate::output::{Output, bytes};
use crate::progress::Progress;
use crate::vault_access::{KeyOptions, VaultPlace, rolled_back};

/// Options of `vault verify`.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
}

impl Verify {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.unlock(&self.keys)?;
        let (store, keys) = (vault.store(), vault.keys());
        let progress = Progress::spinner(output, "reading the vault");
        let mut problems: Vec<String> = Catalog::load(store, keys)?.alarms;
        // Chains that a newer farshore has written to, and why they cannot be followed.
        let mut newer: Vec<String> = Vec::new();
        let mut chains = Vec::new();
        for id in list_chains(store.as_ref())? {
            // Nothing is taken from checkpoints: every manifest is read.
            match ChainHistory::load_all(store, keys, id) {
                Ok(history) => {
                    let rolled_back = rolled_back(&vault, &history)?;
                    problems.extend(rolled_back.map(|rolled_back| rolled_back.to_string()));
                    chains.push(ChainToVerify {
                        chain: id,
                        layers: history.layers(),
                        superseded: history.superseded.clone(),
                    });
                    // A stale writer's late manifest is history working as it should.
                    let bad = history.alarms.iter().filter(|alarm| !matches!(alarm, Alarm::Rejected { .. }));
                    problems.extend(bad.map(|alarm| format!("chain {id}: {}", describe(alarm))));
                }
                Err(error @ VaultError::NewerFormat { .. }) => newer.push(format!("chain {id}: {}", chain(&error))),
                Err(error) => problems.push(format!("chain {id} cannot be read: {}", chain(&error))),
            }
        }
        let workers = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let source = FrameSource::new(Arc::clone(store), Arc::clone(keys), CacheBytes::default());
        let report = verify(&source, &chains, workers)?;
        let took = progress.took();
        progress.finish();
        tell(output, ("damage", "DAMAGED"), &report.damaged)?;
        tell(output, ("newer-format", "NEWER   "), &report.newer)?;
        for text in &newer {
            output.object(&json!({"type": "newer-format", "error": text, "affects": []}))?;
            output.line(format!("NEWER    {text}"))?;
        }
        for problem in &problems {
            output.object(&json!({"type": "alarm", "alarm": problem}))?;
            output.line(format!("ALARM    {problem}"))?;
        }
        let newer = report.newer.len() + newer.len();
        let sound = report.is_sound() && problems.is_empty() && newer == 0;
        output.object(&json!({
            "type": "summary", "sound": sound, "objects": report.objects, "object_bytes": report.object_bytes,
            "chains": chains.len(), "tables": report.tables, "entries": report.entries, "frames": report.frames,
            "data_bytes": report.data_bytes, "unreadable_entries": report.unreadable_entries,
            "damaged": report.damaged.len(), "newer_format": newer, "alarms": problems.len(), "unreferenced": report.unreferenced.len(),
            "superseded": report.superseded.len(),
        }))?;
        output.line(format!(
            "read {} objects ({}) of {} chains, compared {} of disk data in {} frames, in {took}",
            report.objects,
            bytes(report.object_bytes),
            chains.len(),
            bytes(report.data_bytes),
            report.frames,
        ))?;
        if report.unreadable_entries > 0 {
            output.line(format!("{} ranges were unreadable at the source; recorded", report.unreadable_entries))?;
        }
        if !report.superseded.is_empty() {
            let count = report.superseded.len();
            output
                .remark(format!("{count} index tables were replaced by merged ones; maintenance will remove them"))?;
        }
        if !report.unreferenced.is_empty() {
            let count = report.unreferenced.len();
            output.remark(format!("{count} objects are referred to by nothing: left by crashes, harmless"))?;
        }
        if report.damaged.is_empty() && problems.is_empty() && newer > 0 {
            return Err(Failure::new(
                format!("{} of a newer format could not be verified", counted(newer, "object or chain")),
                "a newer farshore wrote them; everything else is sound",
                "update farshore and verify again",
            ));
        }
        if !sound {
            let also = if newer > 0 {
                format!(", {} of a newer format", counted(newer, "object or chain"))
            } else {
                String::new()
            };
            return Err(Failure::new(
                format!(
                    "{}, {}{also}",
                    counted(report.damaged.len(), "damaged or foreign object"),
                    counted(problems.len(), "alarm")
                ),
                "what is named above is not what was once written; other points and disks are not affected",
                "restore the damaged objects from another copy of the vault, file by file; what never was Farshore's may be \
                 removed; what is of a newer format takes a newer farshore",
            ));
        }
        output.line("the vault is sound")
    }
}

/// Lists objects with what depends on them.
fn tell(output: Output, (kind, word): (&str, &str), objects: &BTreeMap<ObjectName, DamagedObject>) -> Done {
    for (name, damaged) in objects {
        let affects: Vec<_> = damaged
            .affects
            .iter()
            .map(|part| {
                json!({"chain": part.chain.to_string(), "disk": part.disk.0, "start": part.range.start,
                       "len": part.range.len, "from": part.from.to_string()})
            })
            .collect();
        let error = chain(&damaged.error);
        output.object(&json!({"type": kind, "object": name.as_str(), "error": error, "affects": affects}))?;
        output.line(format!("{word}  {error}"))?;
        for part in &damaged.affects {
            output.line(format!(
                "         {} bytes {}..{} of chain {}, points from @{} on",
                part.disk,
                part.range.start,
                part.range.end(),
                part.chain,
                part.from
            ))?;
        }
    }
    Ok(())
}

/// `1 alarm`, `2 alarms`.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
