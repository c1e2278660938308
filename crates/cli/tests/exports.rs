//! What an administrator asks of a machine's history and gets, or is refused: exports in every format, moments that no point
//! has, disks that are in use, keys of the answers in JSON. Real processes.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/ledger.rs"]
mod ledger;
#[allow(dead_code, reason = "shared with the kills")]
#[path = "kills/site.rs"]
mod site;

use std::fs;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use agent::status::ProtectionState;
use serde_json::Value;

use ledger::Ledger;
use site::Site;

const SOON: Duration = Duration::from_secs(60);

/// `farshore` with the vault's key, whatever it answers.
fn farshore(site: &Site, verb: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
    command.env("FARSHORE_SEEN_HEADS", site.path("seen")).args(verb);
    command.arg("--vault").arg(site.path("vault")).arg("--recovery-key-file").arg(site.path("key"));
    command.output().unwrap()
}

#[track_caller]
fn refused(site: &Site, verb: &[&str], code: i32, parts: &[&str]) {
    let output = farshore(site, verb);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{verb:?}: {said}");
    assert!(parts.iter().all(|part| said.contains(part)), "{verb:?}: {said}");
    assert!(said.starts_with("error: ") && said.lines().count() >= 3, "what, why and what to do: {said}");
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_history_is_asked_for_in_every_right_and_wrong_way() {
    let folder = tempfile::Builder::new().prefix("fs").tempdir().unwrap();
    let site = Site::make(folder.path(), &Ledger::new(11));
    let (server, agent) = (site.start_server(), site.start_agent());
    let began = Instant::now();
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        while !done() {
            assert!(began.elapsed() < SOON, "waited in vain until {what}\n{}", site.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    wait("protected", &|| site.status().is_some_and(|status| status.state == ProtectionState::Protected));
    wait("marked", &|| site.mark("evening"));
    let listed = || site.with_key(&["vault", "points"], &["--markers"]);
    wait("in the vault", &|| listed().iter().any(|point| point["marker"] == "evening"));

    // A second agent on the image would write past the first one's stream.
    let image = fs::File::open(site.image(0)).unwrap();
    assert!(image.try_lock().is_err(), "the agent holds its image");

    let at = |name: &str| site.path(name).display().to_string();
    let export = |format: &str, name: &str| {
        let options = ["--at", "evening", "--disk", "0", "--format", format, "--to", &at(name)];
        site.with_key(&["branch", "export"], &options)
    };
    let said = export("raw", "out.raw");
    let expected = ["disk", "file", "format", "machine", "reason", "sequence", "size_bytes", "time", "time_ns"];
    assert_eq!(keys(&said[0]), expected, "docs/operations/json.md");
    assert_eq!(fs::read(site.path("out.raw")).unwrap(), fs::read(site.image(0)).unwrap(), "nothing was written since");
    for format in ["qcow2", "vmdk", "vhdx", "vpc"] {
        export(format, &format!("out.{format}"));
        let compare = ["compare", "-f", "raw", "-F", format, &at("out.raw"), &at(&format!("out.{format}"))];
        let compared = Command::new("qemu-img").args(compare).output().unwrap();
        assert!(compared.status.success(), "{format}: {}", String::from_utf8_lossy(&compared.stdout));
        let said = Command::new("qemu-img").args(["info", "--output", "json", &at(&format!("out.{format}"))]).output();
        let info: Value = serde_json::from_slice(&said.unwrap().stdout).unwrap();
        assert_eq!(info["virtual-size"], fs::metadata(site.image(0)).unwrap().len(), "{format}: no larger than it was");
    }
    let point = listed().into_iter().find(|point| point["marker"] == "evening").unwrap();
    for key in ["type", "sequence", "time", "time_ns", "kind", "marker", "consistency"] {
        assert!(point.get(key).is_some(), "{key} is in docs/operations/json.md: {point}");
    }

    let to = at("never");
    let wrong = |moment: &str, code: i32, parts: &[&str]| {
        refused(&site, &["branch", "export", "--disk", "0", "--at", moment, "--to", &to], code, parts);
        assert!(!site.path("never").exists());
    };
    wrong("2020-01-01 00:00:00", 1, &["outside this history", "`farshore vault points` lists"]);
    wrong("2099-01-01 00:00:00", 1, &["outside this history"]);
    wrong("-9000d", 1, &["outside this history"]);
    wrong("@1.0", 1, &["lies in a gap", "initial replication", "choose another moment; the nearest point"]);
    wrong("latest-app", 1, &["there is no application-consistent point", "freeze --mark"]);
    wrong("morning", 1, &["no marker is named", "--markers"]);
    wrong("-9y", 2, &["is no moment"]);
    refused(&site, &["branch", "export", "--to", &to], 2, &["disks", "--disk"]);
    refused(&site, &["branch", "export", "--disk", "9", "--to", &to], 2, &["no disk 9"]);
    refused(&site, &["branch", "export", "--disk", "0", "--to", &at("out.raw")], 4, &["exists already"]);
    refused(&site, &["branch", "export", "--disk", "0", "--to", &at("no/where")], 1, &["cannot be written"]);
    agent.kill();
    server.kill();
}
