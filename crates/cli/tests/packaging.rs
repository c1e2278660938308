//! What is packaged fits the programs that it starts.

#[path = "field/skip.rs"]
mod skip;

use std::path::PathBuf;
use std::process::Command;

use skip::skip;

fn unit() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../packaging/farshore-agent.service")
}

#[test]
fn the_unit_starts_commands_that_exist() {
    let text = std::fs::read_to_string(unit()).expect("the unit");
    let commands: Vec<&str> = text.lines().filter(|line| line.starts_with("Exec")).collect();
    assert_eq!(commands.len(), 3, "start, reload, and what follows a stop: {commands:?}");
    for line in commands {
        let (_, command) = line.split_once('=').expect("a command");
        let mut words = command.trim_start_matches('-').split(' ');
        assert_eq!(words.next(), Some("/usr/bin/farshore-agent"), "{line}");
        let subcommand = words.next().expect("a subcommand");
        let known = Command::new(env!("CARGO_BIN_EXE_farshore-agent")).args([subcommand, "--help"]).output();
        let known = known.expect("it runs");
        let help = String::from_utf8_lossy(&known.stdout);
        assert!(known.status.success() && help.contains("--config"), "{line}: {help}");
    }
}

#[test]
fn systemd_understands_the_unit() {
    // The program is not installed here, and that is all that may be wrong.
    let Ok(verified) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(unit()).output() else {
        return skip("systemd_understands_the_unit", "there is no systemd-analyze");
    };
    let said = String::from_utf8_lossy(&verified.stderr);
    let of_unit = said.lines().filter(|line| line.contains("farshore-agent"));
    let wrong: Vec<&str> = of_unit.filter(|line| !line.contains("is not executable")).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
