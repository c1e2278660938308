//! Public NBD tools against our server.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod tools;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nbd::{DeviceExport, ExportTable, Listen, Server, ServerHandle, ServerOptions};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use world::{Access, FileDevice};

const SIZE: u64 = 24 << 20;

/// A served image: 24 MiB, the first 4 MiB and 1 MiB at 16 MiB are random, the rest is a hole.
struct Served {
    folder: tempfile::TempDir,
    _server: ServerHandle,
}

impl Served {
    fn new() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        let mut bytes = vec![0; SIZE as usize];
        let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]);
        random.fill_bytes(&mut bytes[..4 << 20]);
        random.fill_bytes(&mut bytes[16 << 20..17 << 20]);
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(SIZE).unwrap();
        use std::os::unix::fs::FileExt;
        file.write_all_at(&bytes[..4 << 20], 0).unwrap();
        file.write_all_at(&bytes[16 << 20..17 << 20], 16 << 20).unwrap();
        let exports = ExportTable::new();
        let device = Arc::new(FileDevice::open(&image, Access::ReadWrite).unwrap());
        exports.insert("disk", Arc::new(DeviceExport::new(device).described("a test disk")));
        let frozen = Arc::new(FileDevice::open(&image, Access::ReadOnly).unwrap());
        exports.insert("frozen", Arc::new(DeviceExport::read_only(frozen)));
        let listen = [Listen::Unix(folder.path().join("nbd.sock"))];
        let server = Server::start(Arc::new(exports), ServerOptions::default(), &listen).unwrap();
        Served { folder, _server: server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd.sock").display())
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.path("disk.img")).unwrap()
    }
}

fn qemu_io(tool: &Path, uri: &str, commands: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(tool);
    command.args(["-f", "raw"]);
    for line in commands {
        command.args(["-c", line]);
    }
    tools::outcome(command.arg(uri))
}

#[test]
fn qemu_io_reads_writes_zeroes_and_discards() {
    let Some(tool) = tools::find("qemu_io_reads_writes_zeroes_and_discards", "qemu-io", "qemu-utils") else { return };
    let served = Served::new();
    let mut expected = served.image();
    let commands = [
        "write -P 0xab 1000 70000",
        "read -P 0xab 1000 70000",
        "write -f -P 0xcd 8M 3M",
        "read -P 0xcd 8M 3M",
        "write -z 9M 64k",
        "write -z -u 2M 1M",
        "read -P 0 9M 64k",
        "discard 1M 512k",
        "read -P 0 1M 512k",
        "aio_write -P 0x11 20M 64k",
        "aio_write -P 0x12 21M 64k",
        "aio_read 0 2M",
        "aio_flush",
        "read -P 0x11 20M 64k",
        "flush",
    ];
    let (succeeded, output, errors) = qemu_io(&tool, &served.uri("disk"), &commands);
    assert!(succeeded && !output.contains("verification failed"), "{output}\n{errors}");
    expected[1000..71_000].fill(0xab);
    expected[8 << 20..11 << 20].fill(0xcd);
    expected[9 << 20..(9 << 20) + 65_536].fill(0);
    expected[2 << 20..3 << 20].fill(0);
    expected[1 << 20..(1 << 20) + 524_288].fill(0);
    expected[20 << 20..(20 << 20) + 65_536].fill(0x11);
    expected[21 << 20..(21 << 20) + 65_536].fill(0x12);
    assert!(served.image() == expected, "the file holds other bytes than were written");

    let (succeeded, output, errors) = qemu_io(&tool, &served.uri("frozen"), &["write 0 512"]);
    assert!(!succeeded, "a read-only export was opened for writing\n{output}\n{errors}");
    let read =
        Command::new(&tool).args(["-r", "-f", "raw", "-c", "read -P 0xcd 10M 1M"]).arg(served.uri("frozen")).output();
    let read = String::from_utf8(read.unwrap().stdout).unwrap();
    assert!(read.contains("read 1048576/1048576") && !read.contains("failed"), "{read}");
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let Some(tool) = tools::find("qemu_img_converts_compares_and_maps", "qemu-img", "qemu-utils") else { return };
    let served = Served::new();
    let copy = served.path("copy.qcow2");
    tools::run(Command::new(&tool).args(["convert", "-O", "qcow2", "-f", "raw"]).arg(served.uri("disk")).arg(&copy));
    let compared = tools::run(
        Command::new(&tool).args(["compare", "-f", "raw", "-F", "qcow2"]).arg(served.uri("disk")).arg(&copy),
    );
    assert!(compared.contains("identical"), "{compared}");

    let map = tools::run(Command::new(&tool).args(["map", "--output=json", "-f", "raw"]).arg(served.uri("frozen")));
    let pieces: Vec<(u64, u64, bool)> = map
        .split('{')
        .skip(1)
        .map(|piece| (number(piece, "\"start\":"), number(piece, "\"length\":"), piece.contains("\"zero\": true")))
        .collect();
    let mib = 1 << 20;
    let expected = [(0, 4 * mib, false), (4 * mib, 12 * mib, true), (16 * mib, mib, false), (17 * mib, 7 * mib, true)];
    assert_eq!(pieces, expected, "{map}");

    let other = served.path("other.raw");
    std::fs::write(&other, vec![3; SIZE as usize]).unwrap();
    tools::run(
        Command::new(&tool).args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&other).arg(served.uri("disk")),
    );
    assert!(served.image() == vec![3; SIZE as usize]);
    let sparse = served.path("sparse.raw");
    std::fs::File::create(&sparse).unwrap().set_len(SIZE).unwrap();
    tools::run(
        Command::new(&tool).args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&sparse).arg(served.uri("disk")),
    );
    assert!(served.image() == vec![0; SIZE as usize]);
}

fn number(text: &str, key: &str) -> u64 {
    let rest = &text[text.find(key).unwrap_or_else(|| panic!("no {key} in {text}")) + key.len()..];
    rest.trim_start().split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn nbdinfo_lists_and_describes_the_exports() {
    let Some(tool) = tools::find("nbdinfo_lists_and_describes_the_exports", "nbdinfo", "libnbd-bin") else { return };
    let served = Served::new();
    let listed = tools::run(Command::new(&tool).args(["--json", "--list"]).arg(served.uri("")));
    let told: String = listed.chars().filter(|c| !c.is_whitespace()).collect();
    for part in [
        "\"protocol\":\"newstyle-fixed\"",
        "\"structured\":true",
        "\"export-name\":\"disk\"",
        "\"export-name\":\"frozen\"",
        "\"description\":\"atestdisk\"",
        "\"contexts\":[\"base:allocation\"]",
        "\"is_read_only\":false",
        "\"is_read_only\":true",
        "\"can_multi_conn\":true",
        "\"can_flush\":true",
        "\"can_fua\":true",
        "\"can_trim\":true",
        "\"can_zero\":true",
        "\"can_df\":true",
        "\"can_cache\":true",
        "\"block_size_minimum\":1",
        "\"block_size_preferred\":4096",
        "\"block_size_maximum\":33554432",
        "\"export-size\":25165824",
    ] {
        assert!(told.contains(part), "{part} is not in {listed}");
    }
    let map = tools::run(Command::new(&tool).arg("--map").arg(served.uri("disk")));
    let kinds: Vec<&str> = map.lines().map(|line| line.split_whitespace().last().unwrap()).collect();
    assert_eq!(kinds, ["data", "hole,zero", "data", "hole,zero"], "{map}");
    let (succeeded, _, errors) = tools::outcome(Command::new(&tool).arg(served.uri("nonsense")));
    assert!(!succeeded && errors.contains("nonsense"), "{errors}");
}

#[test]
fn nbdcopy_copies_both_ways_over_several_connections() {
    let Some(tool) = tools::find("nbdcopy_copies_both_ways_over_several_connections", "nbdcopy", "libnbd-bin") else {
        return;
    };
    let served = Served::new();
    let out = served.path("out.raw");
    tools::run(Command::new(&tool).args(["--connections=4", "--requests=32"]).arg(served.uri("disk")).arg(&out));
    assert!(std::fs::read(&out).unwrap() == served.image());
    // Without the allocation map every byte is read, and holes come as chunks of the reads.
    let out = served.path("again.raw");
    tools::run(Command::new(&tool).arg("--no-extents").arg(served.uri("disk")).arg(&out));
    assert!(std::fs::read(&out).unwrap() == served.image());
    let mut bytes = vec![0; SIZE as usize];
    TestRng::from_seed(RngAlgorithm::ChaCha, &[4; 32]).fill_bytes(&mut bytes[5 << 20..20 << 20]);
    let other = served.path("in.raw");
    std::fs::write(&other, &bytes).unwrap();
    tools::run(Command::new(&tool).args(["--flush", "--connections=4"]).arg(&other).arg(served.uri("disk")));
    assert!(served.image() == bytes);
}

#[test]
fn nbdfuse_makes_the_export_a_file() {
    const TEST: &str = "nbdfuse_makes_the_export_a_file";
    let Some(tool) = tools::find(TEST, "nbdfuse", "libnbd-bin") else { return };
    let Some(unmount) = tools::find(TEST, "fusermount3", "fuse3") else { return };
    if std::fs::File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return tools::missing(TEST, "/dev/fuse cannot be opened by this user");
    }
    let served = Served::new();
    let file = served.path("mounted");
    std::fs::write(&file, []).unwrap();
    let mut mounted = Command::new(tool).arg(&file).arg(served.uri("disk")).stdin(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while std::fs::metadata(&file).map_or(0, |metadata| metadata.len()) != SIZE {
        let ended = mounted.try_wait().unwrap();
        assert!(ended.is_none() && start.elapsed() < Duration::from_secs(20), "nbdfuse did not mount: {ended:?}");
        thread::sleep(Duration::from_millis(20));
    }
    let same = std::fs::read(&file).unwrap() == served.image();
    let written = {
        use std::os::unix::fs::FileExt;
        let opened = std::fs::File::options().write(true).open(&file).unwrap();
        opened.write_all_at(&[0x5a; 10_000], 777)
    };
    let unmounted = Command::new(unmount).arg("-u").arg(&file).status();
    mounted.wait().unwrap();
    assert!(same, "the mounted file holds other bytes");
    written.unwrap();
    assert!(unmounted.unwrap().success());
    assert_eq!(served.image()[777..10_777], [0x5a; 10_000]);
}

/// A certificate authority, and the folder in the shape libnbd wants.
fn authority(folder: &Path) -> rcgen::CertifiedIssuer<'static, rcgen::KeyPair> {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let issuer = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    std::fs::create_dir(folder).unwrap();
    std::fs::write(folder.join("ca-cert.pem"), issuer.as_ref().pem()).unwrap();
    issuer
}

#[test]
fn tls_is_demanded_and_carries_a_copy() {
    const TEST: &str = "tls_is_demanded_and_carries_a_copy";
    let Some(nbdcopy) = tools::find(TEST, "nbdcopy", "libnbd-bin") else { return };
    let Some(nbdinfo) = tools::find(TEST, "nbdinfo", "libnbd-bin") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (ours, foreign) = (folder.path().join("ours"), folder.path().join("foreign"));
    let issuer = authority(&ours);
    authority(&foreign);
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();

    let image = folder.path().join("disk.img");
    let mut bytes = vec![0; 8 << 20];
    TestRng::from_seed(RngAlgorithm::ChaCha, &[5; 32]).fill_bytes(&mut bytes[..5 << 20]);
    std::fs::write(&image, &bytes).unwrap();
    let exports = ExportTable::new();
    let device = Arc::new(FileDevice::open(&image, Access::ReadWrite).unwrap());
    exports.insert("disk", Arc::new(DeviceExport::new(device)));
    let options = ServerOptions { tls: Some(Arc::new(config)), ..ServerOptions::default() };
    let listen = [Listen::Tcp("127.0.0.1:0".parse().unwrap())];
    let server = Server::start(Arc::new(exports), options, &listen).unwrap();
    let port = server.tcp_addresses()[0].port();

    let uri =
        |scheme: &str, trust: &Path| format!("{scheme}://localhost:{port}/disk?tls-certificates={}", trust.display());
    let copy = folder.path().join("copy.img");
    tools::run(Command::new(&nbdcopy).arg(uri("nbds", &ours)).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == bytes);
    bytes.reverse();
    std::fs::write(&copy, &bytes).unwrap();
    tools::run(Command::new(&nbdcopy).arg("--flush").arg(&copy).arg(uri("nbds", &ours)));
    assert!(std::fs::read(&image).unwrap() == bytes);
    let told = tools::run(Command::new(&nbdinfo).arg(uri("nbds", &ours)));
    assert!(told.contains("with TLS"), "{told}");

    let (succeeded, _, errors) = tools::outcome(Command::new(&nbdinfo).arg(uri("nbds", &foreign)));
    assert!(!succeeded, "a certificate of a foreign authority was accepted");
    assert!(errors.contains("certificate"), "{errors}");
    let plain = format!("nbd://localhost:{port}/disk");
    let (succeeded, told, errors) = tools::outcome(Command::new(&nbdinfo).arg(plain));
    assert!(!succeeded && !told.contains("export-size"), "a disk was shown in the clear: {told}\n{errors}");
}
