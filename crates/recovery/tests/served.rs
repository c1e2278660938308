//! A branch over NBD, with our client and with public tools.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod history;
#[path = "../../nbd/tests/tools/mod.rs"]
#[allow(dead_code, reason = "shared with the tests of the server")]
mod tools;

use std::process::Command;
use std::sync::Arc;

use history::{CHAIN, DISK, World, noise};
use recovery::{BranchRunner, export};
use replication::DiskId;
use vault::Moment;
use world::{BlockDevice, ExtentKind};

const SIZE: u64 = 4 << 20;

#[test]
fn a_served_branch_is_read_written_and_mapped_by_clients() {
    let world = World::new();
    let mut history = world.protect(&[SIZE, SIZE]);
    history.write(DISK, 1 << 20, noise(1, 300_000));
    history.second();
    let branch = Arc::new(world.host().open(CHAIN, &Moment::Latest, "served").unwrap());
    let runner = BranchRunner::start(Arc::clone(&branch)).unwrap();
    let server = export::serve(&branch, Some("127.0.0.1:0".parse().unwrap())).unwrap();
    let client = nbd::Client::connect_unix(export::socket_path(&branch), "disk0").unwrap();
    let other = nbd::Client::connect_tcp(server.tcp_addresses()[0], "disk1").unwrap();
    assert!(nbd::Client::connect_unix(export::socket_path(&branch), "disk2").is_err());
    assert_eq!(client.size(), SIZE);
    let mut expected = vec![0; SIZE as usize];
    expected[1 << 20..][..300_000].copy_from_slice(&noise(1, 300_000));
    client.write_durable(2_000_000, &noise(2, 70_000)).unwrap();
    expected[2_000_000..2_070_000].copy_from_slice(&noise(2, 70_000));
    client.discard((1 << 20)..(1 << 20) + 65_536).unwrap();
    expected[1 << 20..(1 << 20) + 65_536].fill(0);
    other.write_at(5, b"the other disk").unwrap();
    let mut found = vec![1; SIZE as usize];
    client.read_at(0, &mut found).unwrap();
    assert!(found == expected);
    let extents = branch.disk(DISK).unwrap().extents(0..SIZE).unwrap();
    assert_eq!(extents.first().map(|extent| extent.kind), Some(ExtentKind::Hole), "{extents:?}");
    let uri = format!("nbd+unix:///disk0?socket={}", export::socket_path(&branch).display());
    if let Some(nbdinfo) = tools::find("a_served_branch", "nbdinfo", "libnbd-bin") {
        let map = tools::run(Command::new(nbdinfo).arg("--map").arg(&uri));
        for extent in extents {
            let kind = if extent.kind == ExtentKind::Data { "data" } else { "hole,zero" };
            let (start, len) = (extent.range.start.to_string(), (extent.range.end - extent.range.start).to_string());
            let mut lines = map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let shown = lines.any(|fields| fields.starts_with(&[&start, &len]) && fields.last() == Some(&kind));
            assert!(shown, "{start} {len} {kind} in\n{map}");
        }
    }
    if let Some(nbdcopy) = tools::find("a_served_branch", "nbdcopy", "libnbd-bin") {
        let copy = world.folder.path().join("copy");
        tools::run(Command::new(nbdcopy).arg(uri).arg(&copy));
        assert!(std::fs::read(copy).unwrap() == expected, "nbdcopy reads the same");
    }
    server.stop();
    drop(runner);
    let id = branch.id();
    drop((client, other));
    drop(branch);
    let branch = world.host().reopen(id).unwrap();
    let mut text = [0; 14];
    branch.disk(DiskId(1)).unwrap().read_at(5, &mut text).unwrap();
    assert_eq!(&text, b"the other disk", "served writes are in the journal");
}
