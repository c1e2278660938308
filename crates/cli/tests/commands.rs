//! The command line as people and scripts meet it: help texts, messages, exit codes. Runs the real program.
//!
//! Help texts are compared with `tests/golden`; `FARSHORE_BLESS=1` writes them anew.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The user and group that owns nothing.
const NOBODY: u32 = 65534;
const PASSPHRASE: &str = "correct horse battery staple";

struct World {
    folder: TempDir,
}

struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    fn of(output: Output) -> Said {
        Said {
            code: output.status.code().expect("it was not killed"),
            out: String::from_utf8(output.stdout).expect("UTF-8"),
            err: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }
}

impl World {
    fn new() -> World {
        let world = World { folder: tempfile::tempdir().expect("a temporary folder") };
        fs::write(world.path("passphrase"), format!("{PASSPHRASE}\n")).expect("written");
        world
    }

    /// A world with a vault in `vault` whose recovery key is in `key`.
    fn with_vault() -> World {
        let world = World::new();
        let said = world.run("vault init --vault vault --passphrase-file passphrase --recovery-key-to key");
        assert_eq!(said.code, 0, "{}", said.err);
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `farshore` with these words, in the folder, without a terminal.
    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FARSHORE_")) {
            command.env_remove(name);
        }
        command
            .args(words.split_whitespace())
            .current_dir(self.folder.path())
            .env("COLUMNS", "100")
            .env("FARSHORE_SEEN_HEADS", self.folder.path().join("host"))
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &str) -> Said {
        Said::of(self.command(words).output().expect("the program runs"))
    }

    /// Runs it and expects this failure: exit code, and the three parts of the message.
    #[track_caller]
    fn fails(&self, words: &str, code: i32, message: &str) {
        let said = self.run(words);
        assert_eq!((said.code, said.err.trim_end()), (code, message), "farshore {words}\nout: {}", said.out);
    }
}

#[test]
fn help_texts_are_as_reviewed() {
    let world = World::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let bless = std::env::var_os("FARSHORE_BLESS").is_some();
    for verb in [
        "",
        "server",
        "token new",
        "join",
        "vault",
        "vault init",
        "vault status",
        "vault machines",
        "vault points",
        "vault verify",
        "vault key",
        "vault key check",
        "vault key add",
        "vault key change",
        "vault key show",
        "vault revoke",
        "vault unlock",
        "vault lock",
        "failover",
        "failover commit",
        "failover cancel",
        "vault grant",
        "branch",
        "branch open",
        "branch reopen",
        "branch list",
        "branch discard",
        "branch export",
        "failback",
        "demo",
        "config check",
        "completion",
    ] {
        let said = world.run(&format!("{verb} --help"));
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{verb}");
        let file = folder
            .join(format!("help-{}.txt", if verb.is_empty() { "farshore".into() } else { verb.replace(' ', "-") }));
        if bless {
            fs::write(&file, &said.out).expect("written");
            continue;
        }
        let golden = fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(said.out, golden, "{} differs; look, then FARSHORE_BLESS=1", file.display());
    }
}

#[test]
fn a_new_vault_is_made_once() {
    let world = World::new();
    let said = world.run("--json vault init --vault vault --passphrase-file passphrase");
    assert_eq!(said.code, 0, "{}", said.err);
    let object: serde_json::Value = serde_json::from_str(&said.out).expect("one object");
    let words = object["recovery_key"].as_str().expect("shown once").to_owned();
    assert_eq!(words.split_whitespace().count(), 24);
    fs::write(world.path("key"), &words).expect("written");

    let again = world.run("vault init --vault vault --passphrase-file passphrase");
    assert_eq!(again.code, 3, "{}", again.err);
    assert!(again.err.contains("already holds the vault"), "{}", again.err);

    let fingerprint = object["fingerprint"].as_str().expect("text");
    for key in ["--passphrase-file passphrase", "--recovery-key-file key"] {
        let said = world.run(&format!("vault key check --vault vault {key}"));
        assert_eq!(said.code, 0, "{}", said.err);
        assert!(said.out.contains(fingerprint), "{}", said.out);
    }
    let status = world.run("vault status --vault vault");
    assert!(status.code == 0 && status.out.contains(fingerprint) && status.out.contains("locked"), "{}", status.out);
    let verified = world.run("vault verify --vault vault --recovery-key-file key");
    assert!(verified.code == 0 && verified.out.contains("the vault is sound"), "{}{}", verified.out, verified.err);
}

#[test]
fn the_recovery_key_file_is_private_and_not_in_the_vault() {
    let world = World::with_vault();
    let mode = fs::metadata(world.path("key")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    world.fails(
        "vault init --vault other --passphrase-file passphrase --recovery-key-to other/key",
        4,
        "error: other/key lies in the vault itself\n       whoever holds the vault would hold its key\n       name a file elsewhere",
    );
}

#[test]
fn a_vault_is_not_made_without_a_place_for_its_key() {
    let world = World::new();
    fs::write(world.path("taken"), "something else").expect("written");
    for (place, says) in [("missing/key", "No such file"), ("taken", "exists")] {
        let said =
            world.run(&format!("vault init --vault vault --passphrase-file passphrase --recovery-key-to {place}"));
        assert!(said.code == 1 && said.err.contains("the recovery key cannot be written to"), "{}", said.err);
        assert!(said.err.contains(says), "{}", said.err);
        assert_eq!(fs::read_dir(world.path("vault")).expect("made").count(), 0, "no vault whose key nobody has");
    }
    assert_eq!(fs::read_to_string(world.path("taken")).expect("there"), "something else");
    // A vault that cannot be made leaves no file that looks like a key.
    fs::write(world.path("file"), "hello").expect("written");
    fs::write(world.path("short"), "short").expect("written");
    for words in ["--vault file --passphrase-file passphrase", "--vault vault --passphrase-file short"] {
        assert_ne!(world.run(&format!("vault init {words} --recovery-key-to key")).code, 0);
        assert!(!world.path("key").exists(), "{words}");
    }
    assert_eq!(world.run("vault init --vault vault --passphrase-file passphrase --recovery-key-to key").code, 0);
    assert_eq!(world.run("vault key check --vault vault --recovery-key-file key").code, 0);
}

#[test]
fn keys_that_are_no_text_are_wrong_usage() {
    let world = World::with_vault();
    fs::write(world.path("binary"), [0xff, 0xfe, 0, 1]).expect("written");
    fs::write(world.path("long"), "a".repeat(5000)).expect("written");
    for option in ["--passphrase-file", "--recovery-key-file"] {
        for (file, says) in [("binary", "it is not text"), ("long", "more than 4096 bytes")] {
            let said = world.run(&format!("vault machines --vault vault {option} {file}"));
            assert!(said.code == 2 && said.err.contains(says), "{option} {file}: {}", said.err);
        }
    }
}

#[test]
fn wrong_keys_are_told_apart() {
    let world = World::with_vault();
    fs::write(world.path("wrong"), "another passphrase").expect("written");
    world.fails(
        "vault key check --vault vault --passphrase-file wrong",
        1,
        "error: the passphrase does not open this vault\n       none of its key slots accepted it\n       check keyboard \
         layout and capitals and try again, or use the recovery key: --recovery-key-file",
    );
    let said = world.run("vault init --vault second --passphrase-file passphrase --recovery-key-to second-key");
    assert_eq!(said.code, 0);
    let foreign = world.run("vault machines --vault vault --recovery-key-file second-key");
    assert_eq!(foreign.code, 1);
    assert!(foreign.err.contains("it belongs to another one"), "{}", foreign.err);
    let key = fs::read_to_string(world.path("key")).expect("there");
    let third = key.lines().nth(1).expect("words").split(' ').nth(2).expect("a word").to_owned();
    fs::write(world.path("typo"), key.replacen(&third, "xxxxxx", 1)).expect("written");
    let typo = world.run("vault key check --vault vault --recovery-key-file typo");
    assert_eq!(typo.code, 2, "{}", typo.err);
    assert!(typo.err.contains("word 3"), "{}", typo.err);
    fs::write(world.path("empty"), "\n").expect("written");
    world.fails(
        "vault key check --vault vault --passphrase-file empty",
        2,
        "error: the passphrase file empty is empty\n       put the passphrase into it",
    );
}

#[test]
fn nothing_is_asked_without_a_terminal() {
    let world = World::with_vault();
    let nobody = "error: a passphrase is needed and there is no terminal to ask on\n       questions are asked of people \
                  only\n       give --passphrase-file, --recovery-key-file, or FARSHORE_PASSPHRASE in the environment";
    for words in ["vault machines --vault vault", "branch list --vault vault", "vault init --vault new"] {
        world.fails(words, 2, nobody);
    }
    assert_eq!(fs::read_dir(world.path("new")).expect("made").count(), 0, "nothing was written");
}

#[test]
fn places_that_are_no_vaults_are_named() {
    let world = World::with_vault();
    fs::write(world.path("file"), "hello").expect("written");
    fs::create_dir(world.path("empty")).expect("made");
    fs::create_dir(world.path("full")).expect("made");
    fs::write(world.path("full/notes"), "hello").expect("written");
    fs::create_dir(world.path("garbage")).expect("made");
    fs::write(world.path("garbage/vault"), "hello").expect("written");
    for (place, says) in [
        ("file", "it is a file, not a folder"),
        ("missing", "there is no such folder"),
        ("empty", "it is empty"),
        ("full", "it holds files, but no vault header"),
        ("garbage", "the file named \"vault\" is not a vault header"),
    ] {
        let said = world.run(&format!("vault status --vault {place}"));
        assert!(said.code == 1 && said.err.contains(says), "{place}: {}", said.err);
        assert_eq!(said.err.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{}", said.err);
        assert!(said.err.lines().count() >= 2, "what to do is missing: {}", said.err);
    }
    // A vault is not made among other people's files.
    let said = world.run("vault init --vault full --passphrase-file passphrase");
    assert!(said.code == 1 && said.err.contains("it holds other files"), "{}", said.err);
    let said = world.run("vault init --vault file --passphrase-file passphrase");
    assert!(said.code == 1 && said.err.contains("it is a file"), "{}", said.err);
}

#[test]
fn a_vault_of_a_newer_format_and_a_damaged_one_are_told_apart() {
    let world = World::with_vault();
    let path = world.path("vault/vault");
    let bytes = fs::read(&path).expect("there");
    // The format's version stands behind the eight bytes of magic (docs/formats).
    let mut newer = bytes.clone();
    newer[8] = newer[8].wrapping_add(1);
    replace(&path, &newer);
    let said = world.run("vault status --vault vault");
    assert!(said.code == 1 && said.err.contains("use a newer Farshore"), "{}", said.err);
    let mut damaged = bytes.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    replace(&path, &damaged);
    let said = world.run("vault status --vault vault");
    assert!(said.code == 1 && said.err.contains("is damaged"), "{}", said.err);
    replace(&path, &bytes);
    assert_eq!(world.run("vault status --vault vault").code, 0);
    // What a newer version added is told apart from damage when everything is read.
    fs::create_dir_all(world.path("vault/packs/00")).expect("made");
    fs::write(world.path("vault/packs/00/of-a-newer-farshore"), &newer).expect("written");
    let verify = "vault verify --vault vault --recovery-key-file key";
    let said = world.run(verify);
    assert!(said.code == 1 && said.out.contains("NEWER") && !said.out.contains("DAMAGED"), "{}{}", said.out, said.err);
    assert!(said.err.contains("1 object or chain of a newer format could not be verified"), "{}", said.err);
    assert!(said.err.lines().last().expect("three parts").contains("update farshore"), "{}", said.err);
    let said = world.run(&format!("{verify} --json"));
    assert!(said.out.contains("\"newer_format\":1") && said.out.contains("\"damaged\":0"), "{}", said.out);
}

#[test]
fn a_server_that_cannot_start_says_what_to_do() {
    let world = World::with_vault();
    let key = "--vault vault --recovery-key-file key";
    assert_eq!(world.run(&format!("vault grant {key} --label ps1 --state-dir state")).code, 0);
    let root = world.folder.path().canonicalize().expect("there");
    let config = |vault: &str| {
        let (state, vault) = (root.join("state"), root.join(vault));
        let text = format!("state_dir = {state:?}\nvault = {vault:?}\nlisten = \"127.0.0.1:0\"\n");
        fs::write(world.path("server.toml"), text).expect("written");
    };
    let refused = |says: &str, remedy: &str| {
        let said = world.run("server --config server.toml");
        assert!(said.code == 1 && said.err.contains(says), "{}", said.err);
        assert!(said.err.lines().last().expect("three parts").contains(remedy), "{}", said.err);
    };
    config("nowhere");
    refused("there is no such folder", "name the folder");
    fs::create_dir(world.path("empty")).expect("made");
    config("empty");
    refused("the vault cannot be opened", "farshore vault init");
    assert_eq!(world.run("vault init --vault other --passphrase-file passphrase --recovery-key-to other-key").code, 0);
    config("other");
    refused("another one than this server was granted", "correct `vault`");
    config("vault");
    let path = world.path("vault/vault");
    let bytes = fs::read(&path).expect("there");
    let mut newer = bytes.clone();
    newer[8] = newer[8].wrapping_add(1);
    replace(&path, &newer);
    refused("use a newer Farshore", "upgrade this farshore");
    replace(&path, &bytes);
    // As another running server holds it.
    let lock = fs::File::create(world.path("state/server.lock")).expect("made");
    lock.try_lock().expect("nobody has it");
    refused("another server runs on the state directory", "stop the other one");
}

fn replace(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).expect("removed");
    fs::write(path, bytes).expect("written");
}

#[test]
fn a_folder_that_takes_no_writes_is_refused() {
    let world = World::new();
    fs::create_dir(world.path("locked")).expect("made");
    fs::set_permissions(world.path("locked"), fs::Permissions::from_mode(0o555)).expect("changed");
    let mut command = world.command("vault init --vault locked --passphrase-file passphrase");
    if fs::write(world.path("locked/probe"), "x").is_ok() {
        // Permissions do not hold root back: the program runs as somebody else.
        fs::remove_file(world.path("locked/probe")).expect("removed");
        fs::set_permissions(world.folder.path(), fs::Permissions::from_mode(0o755)).expect("changed");
        command.uid(NOBODY).gid(NOBODY);
    }
    let Ok(output) = command.output() else {
        println!("SKIPPED: read-only folder: the program cannot be run as an ordinary user");
        return;
    };
    let said = Said::of(output);
    assert!(said.code == 1 && said.err.contains("read-only"), "{}", said.err);
    assert_eq!(fs::read_dir(world.path("locked")).expect("there").count(), 0);
}

#[test]
fn foreign_objects_in_the_vault_are_found_by_verify() {
    let world = World::with_vault();
    fs::create_dir_all(world.path("vault/packs/00")).expect("made");
    fs::write(world.path("vault/packs/00/11"), "not ours").expect("written");
    let said = world.run("vault verify --vault vault --recovery-key-file key");
    assert_eq!(said.code, 1);
    assert!(said.out.contains("packs/00/11") && said.out.contains("it is not a Farshore object"), "{}", said.out);
    assert!(said.err.starts_with("error: 1 damaged or foreign object, 0 alarms"), "{}", said.err);
}

#[test]
fn machines_branches_and_moments_that_are_not_there() {
    let world = World::with_vault();
    let key = "--vault vault --recovery-key-file key";
    world.fails(
        &format!("vault points web {key}"),
        1,
        "error: no machine or branch is named \"web\"\n       this vault protects no machine yet\n       see `farshore vault \
         machines` and `farshore branch list`",
    );
    world.fails(
        &format!("branch open --at -9y {key}"),
        2,
        "error: \"-9y\" is no moment\n       a way back is a whole number and s, m, h or d, such as -90s\n       Moment: latest, \
         latest-app, \"2026-11-22 14:03:07\" (UTC), -90s (m, h, d), @<sequence>, or a marker's name",
    );
    world.fails(
        &format!("branch export --to passphrase {key}"),
        4,
        "error: passphrase exists already\n       an export never overwrites a file\n       name another file, or remove it first",
    );
    world.fails(
        "failback failover --to passphrase --state-dir states",
        1,
        &format!(
            "error: no branch \"failover\" has state in {}\n       a branch is brought home by the host that serves it\n       \
             name the state directory it was opened with, with --state-dir",
            world.folder.path().canonicalize().expect("there").join("states").display()
        ),
    );
    let none = world.run(&format!("branch list {key}"));
    assert_eq!((none.code, none.out.as_str()), (0, "there is no branch\n"));
}

#[test]
fn grants_and_tokens_come_from_the_command_line() {
    let world = World::with_vault();
    let key = "--vault vault --recovery-key-file key";
    let grant = format!("vault grant {key} --label ps1 --state-dir state");
    assert_eq!(world.run(&grant).code, 0);
    let mode = fs::metadata(world.path("state/writer.keys")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(world.run(&grant).code, 3, "a server that has its keys keeps them");
    let shown = world.run(&format!("--json vault key show {key}"));
    assert!(shown.out.contains("\"label\":\"ps1\""), "{}", shown.out);

    let root = world.folder.path().canonicalize().expect("there");
    let config =
        format!("state_dir = {:?}\nvault = {:?}\nlisten = \"127.0.0.1:0\"\n", root.join("state"), root.join("vault"));
    fs::write(world.path("server.toml"), &config).expect("written");
    assert_eq!(world.run("config check server.toml").code, 0);
    let token = world.run("--json token new --config server.toml --address ps1.example:7443");
    let object: serde_json::Value = serde_json::from_str(&token.out).expect("one object");
    assert!(object["token"].as_str().expect("text").starts_with("farshore-join-"), "{}", token.out);
    assert_eq!(object["addresses"][0], "ps1.example:7443");
    fs::write(world.path("token"), object["token"].as_str().expect("text")).expect("written");
    world.fails(
        "join --token-file token --state-dir branches",
        2,
        "error: the token is not for a recovery host\n       it is a token for another role: agent\n       run `farshore-agent join` on the \
         machine that is to be protected",
    );
    let token = world.run("--json token new --config server.toml --role recovery-host --address 127.0.0.1:1");
    let object: serde_json::Value = serde_json::from_str(&token.out).expect("one object");
    assert_eq!(object["role"], "rh");
    fs::write(world.path("token"), object["token"].as_str().expect("text")).expect("written");
    let said = world.run("join --token-file token --state-dir branches");
    assert!(said.code == 1 && said.err.contains("could not be enrolled"), "nobody listens there: {}", said.err);
}

#[test]
fn a_kept_key_reads_and_grants_nothing() {
    let world = World::with_vault();
    assert_eq!(world.run("vault lock --vault vault").code, 3, "nothing is kept yet");
    let unlock = world.run("vault unlock --vault vault --passphrase-file passphrase --for 2m");
    assert_eq!(unlock.code, 0, "{}", unlock.err);
    let machines = world.run("vault machines --vault vault");
    assert_eq!(machines.code, 0, "no key was given, none was asked for: {}", machines.err);
    assert!(world.run("--json vault status --vault vault").out.contains("\"unlocked\":true"));
    let mode = fs::metadata(world.path("farshore")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    // What takes the owner's key is asked for all the same.
    assert_eq!(world.run("vault grant --vault vault --label ps --state-dir state").code, 2);
    assert_eq!(world.run("vault lock --vault vault").code, 0);
    assert_eq!(world.run("vault machines --vault vault").code, 2, "the key is forgotten");
    assert_eq!(world.run("vault unlock --vault vault --passphrase-file passphrase --for 2y").code, 2);
}

#[test]
fn passphrases_change_and_some_open_for_reading_only() {
    let world = World::with_vault();
    fs::write(world.path("new"), "a better passphrase").expect("written");
    fs::write(world.path("reader"), "a passphrase for reading").expect("written");
    let owner = "--vault vault --passphrase-file passphrase";
    let added = world.run(&format!("vault key add {owner} --for-reading --new-passphrase-file reader"));
    assert_eq!(added.code, 0, "{}", added.err);
    assert_eq!(world.run("vault machines --vault vault --passphrase-file reader").code, 0);
    let refused = world.run("vault grant --vault vault --passphrase-file reader --label ps --state-dir state");
    assert_eq!(refused.code, 4, "{}", refused.err);
    assert!(refused.err.contains("takes the vault owner's key"), "{}", refused.err);
    let changed = world.run(&format!("vault key change {owner} --new-passphrase-file new"));
    assert_eq!(changed.code, 0, "{}", changed.err);
    assert_eq!(world.run(&format!("vault key check {owner}")).code, 1, "the old one opens nothing");
    assert_eq!(world.run("vault key check --vault vault --passphrase-file new").code, 0);
    let shown = world.run("vault key show --vault vault");
    assert!(shown.out.contains("not tried any more") && shown.out.contains("opens reading"), "{}", shown.out);
}

#[test]
fn a_revoked_writer_is_listed_and_revoked_once() {
    let world = World::with_vault();
    let key = "--vault vault --recovery-key-file key";
    assert_eq!(world.run(&format!("vault grant {key} --label ps1 --state-dir state")).code, 0);
    assert_eq!(world.run(&format!("vault revoke nobody {key}")).code, 2);
    let revoked = world.run(&format!("vault revoke ps1 {key} --reason stolen"));
    assert!(revoked.code == 0 && revoked.out.contains("what it committed stays"), "{}{}", revoked.out, revoked.err);
    assert_eq!(world.run(&format!("vault revoke ps1 {key}")).code, 3);
    assert!(world.run(&format!("vault key show {key}")).out.contains("revoked (stolen)"));
    assert!(world.run(&format!("vault status {key}")).out.contains("stolen"));
    assert_eq!(world.run(&format!("vault grant {key} --role operator --label me --state-dir x")).code, 2);
    assert_eq!(world.run(&format!("vault grant {key} --role operator --label me --to operator")).code, 0);
}

#[test]
fn a_failover_without_a_machine_is_refused() {
    let world = World::with_vault();
    let key = "--vault vault --recovery-key-file key";
    for verb in ["failover", "failover commit", "failover cancel"] {
        let said = world.run(&format!("{verb} web {key}"));
        assert!(said.code == 1 && said.err.contains("no machine or branch is named"), "{verb}: {}", said.err);
    }
    let said = world.run(&format!("failover web {key} --operator-keys passphrase"));
    assert!(said.code == 1 && said.err.contains("the operator's keys in passphrase cannot be used"), "{}", said.err);
}

#[test]
fn configuration_mistakes_name_line_and_key() {
    let world = World::new();
    for (text, says) in [
        ("state_dir = '/a'\nvault = '/b'\nseal_bites = 3\n", "seal_bites"),
        ("state_dir = 'a'\nvault = '/b'\n", "state_dir is not an absolute path"),
        ("state_dir = '/a'\nvault = '/b'\nlisten = 'here'\n", "is not host:port"),
        ("state_dir = '/a'\n", "missing field `vault`"),
        ("state_dir = '/a'\nvault = '/b'\njournal_bytes_max = 1000\n", "less than twice seal_bytes"),
        ("state_dir = '/a'\nvault = '/b'\n[master_target]\nenabled = true\n", "`disks` names nothing"),
        (
            "state_dir = '/a'\nvault = '/b'\n[master_target]\nenabled = true\ndisks = ['sdb']\n",
            "sdb in `disks` of [master_target] is not an absolute path",
        ),
        ("state_dir = '/a'\nvault = '/b'\n[master_target]\ndisk = ['/b']\n", "unknown field `disk`"),
    ] {
        fs::write(world.path("server.toml"), text).expect("written");
        let said = world.run("config check server.toml");
        assert!(said.code == 2 && said.err.contains(says), "{says}: {}", said.err);
    }
    let said = world.run("server --config nowhere.toml");
    assert!(
        said.code == 1 && said.err.starts_with("error: the configuration nowhere.toml cannot be used"),
        "{}",
        said.err
    );
}

#[test]
fn quiet_leaves_out_remarks_and_nothing_that_was_asked_for() {
    let world = World::new();
    let said = world.run("--quiet vault init --vault vault --passphrase-file passphrase --recovery-key-to key");
    assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (0, "", ""));
    let said = world.run("-q branch list --vault vault --recovery-key-file key");
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    let said = world.run("-q vault status --vault nowhere");
    assert!(said.code == 1 && said.err.starts_with("error: "), "{}", said.err);
}

#[test]
fn with_json_failures_are_objects_too() {
    let world = World::new();
    let said = world.run("--json vault status --vault nowhere");
    let object: serde_json::Value = serde_json::from_str(&said.err).expect("one object");
    assert_eq!((said.code, object["code"].as_i64()), (1, Some(1)));
    assert!(object["error"].as_str().expect("text").contains("there is no such folder"));
    assert!(!object["do"].as_str().expect("text").is_empty());
}

#[test]
fn wrong_usage_is_exit_code_two_and_completion_knows_the_verbs() {
    let world = World::new();
    for words in ["", "nonsense", "vault", "vault status", "demo --size 1"] {
        assert_eq!(world.run(words).code, 2, "{words}");
    }
    let script = world.run("completion bash");
    assert!(
        script.code == 0 && script.out.contains("farshore__subcmd__vault") || script.out.contains("farshore__vault")
    );
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = world.run(&format!("completion {shell}"));
        assert!(
            script.code == 0 && script.err.is_empty() && script.out.contains("failback"),
            "{shell}: {}",
            script.err
        );
    }
    assert!(world.run("demo --keep .").err.contains("is not empty"));
}

/// The command lines of the processes whose parent is `parent`, or that name `folder`.
fn processes(parent: u32, folder: &str) -> Vec<String> {
    let numbers = fs::read_dir("/proc").expect("listed").flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let line = |process: u32| {
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let of = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // One that has ended and was not waited for has no command line.
        (!line.is_empty() && (of == Some(parent) || line.contains(folder))).then_some(line)
    };
    numbers.filter_map(line).collect()
}

#[test]
fn a_demo_that_is_killed_leaves_no_process() {
    let world = World::new();
    let mut command = world.command("demo --keep kept");
    let mut demo = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    let (id, folder) = (demo.id(), world.path("kept"));
    let until = |good: &dyn Fn(&[String]) -> bool| {
        let now = || processes(id, folder.to_str().expect("a text"));
        let waited = (0..600).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            good(&now())
        });
        assert!(waited, "{:?}", now());
    };
    let has = |lines: &[String], word: &str| lines.iter().any(|line| line.contains(word));
    until(&|lines| has(lines, " server ") && has(lines, " run "));
    demo.kill().expect("killed");
    demo.wait().expect("ended");
    until(&|lines| lines.is_empty());
}
