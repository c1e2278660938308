//! What `--keep` leaves for a program that shares no code with ours: `points.json` says which images prove which points.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::proof::{Proof, write_replay};
use super::site::MACHINE;
use crate::failure::{Done, io_failure};

/// Name of the image of the disk before the first write, below the images' folder.
pub(crate) const START_IMAGE: &str = "start.raw";

/// Something to be kept.
pub(crate) struct Kept<'a> {
    pub(crate) seed: u64,
    /// Nanoseconds by which the ledger's clock and the points' may differ.
    pub(crate) tolerance_ns: u64,
    /// The chain of the machine before it failed over.
    pub(crate) chain: String,
    /// First and last time of the chain at which any second can be opened, and the gaps in between.
    pub(crate) openable_ns: (u64, u64),
    pub(crate) gaps_ns: Vec<(u64, u64)>,
    pub(crate) proofs: &'a [Proof],
    /// The whole of the ledger that belongs to the chain.
    pub(crate) writes: u64,
    pub(crate) has_file_system: bool,
}

impl Kept<'_> {
    /// Writes the source's image at each proven point, and `points.json`.
    pub(crate) fn write(&self, data: &Path, ledger: &super::ledger::Ledger) -> Done {
        let images = data.join("images");
        let mut points = Vec::new();
        for proof in self.proofs {
            let file = format!("{}.raw", proof.name.replace(' ', "-"));
            // A copy taken from the paused source itself is better evidence than a replay.
            if !images.join(&file).exists() {
                write_replay(&images.join(START_IMAGE), ledger, proof.k, &images.join(&file))?;
            }
            points.push(json!({
                "name": proof.name, "chain": proof.chain, "at": format!("@{}", proof.sequence), "time_ns": proof.time_ns,
                "writes": proof.k, "image": format!("images/{file}"),
            }));
        }
        let gaps: Vec<_> = self.gaps_ns.iter().map(|(from, to)| json!([from, to])).collect();
        let content = json!({
            "format": 1, "seed": self.seed, "machine": MACHINE, "chain": self.chain, "vault": "vault",
            "recovery_key": "recovery-key", "ledger": "ledger", "start_image": format!("images/{START_IMAGE}"),
            "tolerance_ns": self.tolerance_ns, "openable_ns": [self.openable_ns.0, self.openable_ns.1], "gaps_ns": gaps,
            "writes": self.writes, "file_system": self.has_file_system, "points": points,
        });
        let text = serde_json::to_string_pretty(&content).expect("texts and numbers serialize");
        fs::write(data.join("points.json"), text + "\n")
            .map_err(|error| io_failure("points.json cannot be written", &error))
    }
}
