//! A process server whose grant was revoked, with everything it had: real processes go on without it, and what it puts into
//! the vault from the next generation on is not even in the way.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/ledger.rs"]
mod ledger;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/points.rs"]
mod points;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/site.rs"]
mod site;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/writer.rs"]
mod writer;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::status::ProtectionState;
use vault::chain::Alarm;
use vault::keys::NameEpoch;
use vault::numbered::NumberedNames;
use vault::{Catalog, ChainHistory, FolderStore, OpenKeys, Store, UnlockedVault, WriterKeys};
use world::SystemEntropy;

use ledger::Ledger;
use points::wait_current;
use site::Site;
use writer::Writer;

const SOON: Duration = Duration::from_secs(60);

fn wait_protected(site: &Site) {
    let began = Instant::now();
    while site.status().is_none_or(|status| status.state != ProtectionState::Protected) {
        assert!(began.elapsed() < SOON, "waited in vain for protection: {:?}\n{}", site.status(), site.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The chain as the second server opened it: under the name key that the first never got. (`Protected` alone may still be
/// what the agent said of the first server.)
fn wait_taken_over(site: &Site, vault: &UnlockedVault) -> ChainHistory {
    let began = Instant::now();
    loop {
        let history = complete(vault);
        if history.name_epoch == NameEpoch(1) {
            wait_protected(site);
            return history;
        }
        assert!(began.elapsed() < SOON, "the second server never opened the chain under its own key\n{}", site.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn complete(vault: &UnlockedVault) -> ChainHistory {
    let catalog = Catalog::load(vault.store(), vault.keys()).expect("readable");
    let chain = catalog.machines.values().next().expect("a machine").chain;
    ChainHistory::load_all(vault.store(), vault.keys(), chain).expect("readable")
}

#[test]
fn what_a_revoked_server_puts_into_the_vault_is_ignored_from_the_next_generation_on() {
    let folder = tempfile::Builder::new().prefix("fr").tempdir().expect("a temporary folder");
    let ledger = Arc::new(Ledger::new(23));
    let site = Arc::new(Site::make(folder.path(), &ledger));
    site.grant_server("second");
    let vault = site.unlock();
    let (first, second) = (site.start_server(), site.start_server_named("second"));
    let agent = site.start_agent();
    wait_protected(&site);
    let writer = Writer::start(Arc::clone(&site), Arc::clone(&ledger));
    std::thread::sleep(Duration::from_millis(800));

    let revoked = site.with_key(&["vault", "revoke"], &["server", "--reason", "stolen"]);
    assert_eq!(revoked[0]["stopped_chains"].as_array().map(Vec::len), Some(1), "{revoked:?}");
    site.move_to("second", 5);
    let history = wait_taken_over(&site, &vault);

    // All that the first server has, and the right to create objects.
    let keys = WriterKeys::from_bytes(&fs::read(site.path("server/writer.keys")).unwrap()).expect("its key file");
    let names = NumberedNames::of_chain(&OpenKeys::of_writer(&keys), history.chain);
    assert!(!names.has(NameEpoch(1)));
    let store = FolderStore::open(&site.path("vault"), &SystemEntropy).expect("it can write");
    let burnt: Vec<u64> = (history.next_number..history.next_number + 60).chain([1 << 40]).collect();
    for number in &burnt {
        let name = names.name(*number, NameEpoch::FIRST).expect("it has this key");
        store.create(&name, &[b"revenge".to_vec().into()]).expect("nobody else has the name");
    }
    std::thread::sleep(Duration::from_millis(800));
    second.kill();
    let second = site.start_server_named("second");
    wait_protected(&site);
    writer.finish();
    wait_current(&site, &vault, &ledger);

    let after = complete(&vault);
    assert!(after.head.number > history.head.number + 2, "it went on: {} {}", history.head.number, after.head.number);
    let between = after.next_number - history.next_number;
    let manifests = after.head.number - history.head.number;
    assert_eq!(between, manifests, "no number was lost");
    for number in burnt {
        let ignored = Alarm::WrongEpoch { number, epoch: NameEpoch::FIRST };
        assert!(after.alarms.contains(&ignored), "{number} of {:?}", after.alarms);
    }
    let foreign = |alarm: &&Alarm| !matches!(alarm, Alarm::WrongEpoch { .. } | Alarm::Rejected { .. });
    assert_eq!(after.alarms.iter().find(foreign), None);
    // Whoever starts with an empty machine and the recovery key finds the same.
    let fresh = complete(&site.unlock());
    assert_eq!((fresh.head.number >= after.head.number, fresh.name_epoch), (true, NameEpoch(1)));
    let said = site.with_key(&["vault", "status"], &[]);
    assert!(said.iter().any(|object| object.to_string().contains("name key that ended")), "{said:?}");
    agent.kill();
    second.kill();
    drop(first);
}
