//! What an agent says of its machine comes into the vault, once.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/ledger.rs"]
mod ledger;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/site.rs"]
mod site;

use std::process::Command;
use std::time::{Duration, Instant};

use agent::hardware::MachineDescription;
use serde_json::Value;
use vault::{Catalog, CatalogEntry};

use ledger::Ledger;
use site::Site;

#[test]
fn the_vault_knows_what_the_machine_is_made_of() {
    let folder = tempfile::Builder::new().prefix("fs").tempdir().expect("a temporary folder");
    let site = Site::make(folder.path(), &Ledger::new(7));
    let server = site.start_server();
    let shown =
        || site.with_key(&["vault", "machines"], &[]).first().map_or(Value::Null, |it| it["description"].clone());
    let vault = site.unlock();
    let descriptions = || {
        let catalog = Catalog::load(vault.store(), vault.keys()).expect("readable");
        catalog.records.iter().filter(|record| matches!(record.entry, CatalogEntry::MachineDescribed { .. })).count()
    };
    for _ in 0..2 {
        let agent = site.start_agent();
        let since = Instant::now();
        while shown() == Value::Null {
            assert!(since.elapsed() < Duration::from_secs(60), "never described\n{}", site.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        // Long enough for another one to arrive, if it did.
        std::thread::sleep(Duration::from_millis(500));
        agent.kill();
    }
    assert_eq!(descriptions(), 1, "the same is not said twice");
    let local =
        Command::new(env!("CARGO_BIN_EXE_farshore-agent")).args(["--json", "hardware"]).output().expect("it runs");
    let local: Value = serde_json::from_slice(&local.stdout).expect("JSON");
    assert_eq!(shown(), local, "what the machine says now");
    let described: MachineDescription = serde_json::from_value(local).expect("a description");
    assert!(!described.kernel.release.is_empty() && described.memory_bytes > 0, "{described:?}");
    server.kill();
}
