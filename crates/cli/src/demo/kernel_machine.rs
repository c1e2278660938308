//! A machine whose disk is in use: ext4 on a loop device, with files being written, in a process of its own, which also takes
//! everything down again. It has a process group of its own and ends when its standard input does, so that nothing of it
//! outlives a demo that failed, was interrupted or killed: not the mount, not the loop device, not the programs in the kernel.
//!
//! Told over standard input, one command per line: `load` (begins to write files), `count` (answers `written N`: files 1 to N
//! are on the disk, synced), `stop` (ends the load, answers in the same way), `verify IMAGE` (mounts a copy of the disk, answers
//! `holds N` if files 1 to N and no others are there and right and the file system is clean, otherwise `wrong WHY`). When
//! the input ends it cleans up and answers `gone`.

use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::config::AgentConfig;
use agent::service::control::{Request, ask};
use agent::service::detach;
use agent::state::StateDir;
use clap::Args;

use super::disk::{check_file_system, find_program};
use super::ledger::mix;
use crate::failure::{Done, Failure, io_failure};

/// How long the agent may take to end, and an unmount to succeed.
const PATIENCE: u32 = 200;
const POLL: Duration = Duration::from_millis(50);
/// Files that the noise writes over and over.
const NOISE_FILES: u64 = 24;
/// Pause between two pieces of work, so that a demo on two cores goes on.
const PAUSE: Duration = Duration::from_millis(3);

/// Options of the hidden command.
#[derive(Debug, Args)]
pub(crate) struct KernelMachine {
    /// An empty folder for image and mount points
    #[arg(long)]
    folder: PathBuf,
    /// The configuration of the agent that will protect the device
    #[arg(long)]
    agent: PathBuf,
    #[arg(long)]
    mib: u64,
    #[arg(long)]
    seed: u64,
}

/// A loop device with ext4, mounted. Gone when dropped.
struct Mounted {
    device: String,
    place: PathBuf,
    is_mounted: bool,
}

fn tool(name: &str, arguments: &[&str]) -> Result<String, String> {
    let program = find_program(name).ok_or_else(|| format!("{name} is not installed"))?;
    let run = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let run = run.map_err(|error| format!("{name} cannot be run: {error}"))?;
    match run.status.success() {
        true => Ok(String::from_utf8_lossy(&run.stdout).trim().to_owned()),
        false => Err(format!("{name}: {}", String::from_utf8_lossy(&run.stderr).trim().replace('\n', " "))),
    }
}

impl Mounted {
    fn attach(image: &Path, place: &Path) -> Result<Mounted, String> {
        fs::create_dir_all(place).map_err(|error| format!("{} cannot be made: {error}", place.display()))?;
        let device = tool("losetup", &["-f", "--show", &image.display().to_string()])?;
        Ok(Mounted { device, place: place.to_owned(), is_mounted: false })
    }

    fn mount(&mut self) -> Result<(), String> {
        tool("mount", &["-t", "ext4", &self.device, &self.place.display().to_string()])?;
        self.is_mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        let place = self.place.display().to_string();
        let mut last = Ok(());
        for _ in 0..PATIENCE {
            last = tool("umount", &[&place]).map(drop);
            if last.is_ok() {
                self.is_mounted = false;
                return Ok(());
            }
            thread::sleep(POLL);
        }
        last
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.is_mounted && self.unmount().is_err() {
            // Goes when whoever uses it is gone.
            let _ = tool("umount", &["-l", &self.place.display().to_string()]);
        }
        let _ = tool("losetup", &["-d", &self.device]);
    }
}

/// What file `number` holds.
fn content(seed: u64, number: u64) -> Vec<u8> {
    let len = mix(seed ^ number) % 65_536 + 1;
    let mut bytes = vec![0; len as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Threads that write files.
struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Load {
    fn begin(folder: &Path, seed: u64) -> Load {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let counted = {
            let (stop, written, folder) = (stop.clone(), written.clone(), folder.join("files"));
            thread::spawn(move || write_files(&folder, seed, &stop, &written))
        };
        let noise = {
            let (stop, folder) = (stop.clone(), folder.join("noise"));
            thread::spawn(move || make_noise(&folder, seed, &stop))
        };
        Load { stop, written, threads: vec![counted, noise] }
    }

    fn end(&mut self) -> Result<(), String> {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let ended = thread.join().map_err(|_| "the load panicked".to_owned())?;
            ended.map_err(|error| format!("a file cannot be written: {error}"))?;
        }
        Ok(())
    }
}

/// One file after the other: written, synced, renamed, its folder synced; then it counts.
#[allow(clippy::disallowed_methods, reason = "this is the load, which syncs as any program would")]
fn write_files(folder: &Path, seed: u64, stop: &AtomicBool, written: &AtomicU64) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for number in 1.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let new = folder.join("new");
        let mut file = File::create(&new)?;
        file.write_all(&content(seed, number))?;
        file.sync_all()?;
        fs::rename(&new, folder.join(number.to_string()))?;
        File::open(folder)?.sync_all()?;
        written.store(number, Ordering::SeqCst);
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Files that are overwritten, cut off, renamed and removed without a sync.
#[allow(clippy::disallowed_methods, reason = "this is the load, which renames as any program would")]
fn make_noise(folder: &Path, seed: u64, stop: &AtomicBool) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for step in 0u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let choice = mix(seed.wrapping_add(step << 20));
        let path = folder.join((choice % NOISE_FILES).to_string());
        match choice >> 32 & 7 {
            0 if path.exists() => fs::remove_file(&path)?,
            1 if path.exists() => File::options().write(true).open(&path)?.set_len(choice % 9000)?,
            2 if path.exists() => fs::rename(&path, folder.join((choice / 7 % NOISE_FILES).to_string()))?,
            _ => fs::write(&path, content(seed ^ 77, choice))?,
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

impl KernelMachine {
    pub(crate) fn run(&self) -> Done {
        // Before anything else: whoever started this may be gone at any moment.
        let (orders, received) = std::sync::mpsc::sync_channel(16);
        thread::spawn(move || {
            for line in io::stdin().lock().lines().map_while(Result::ok) {
                if orders.send(line).is_err() {
                    return;
                }
            }
        });
        let mut disk = match self.make() {
            Ok(disk) => disk,
            Err(why) => {
                println!("cannot {why}");
                return Ok(());
            }
        };
        println!("ready {}", disk.device);
        let mut load = None;
        for line in received {
            let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match word {
                "load" => load = Some(Load::begin(&disk.place, self.seed)),
                "count" => println!("written {}", load.as_ref().map_or(0, |load| load.written.load(Ordering::SeqCst))),
                "stop" => match load.as_mut().map(|load| (load.end(), load.written.load(Ordering::SeqCst))) {
                    Some((Err(why), _)) => println!("wrong {why}"),
                    Some((Ok(()), written)) => println!("written {written}"),
                    None => println!("written 0"),
                },
                "verify" => match self.verify(Path::new(rest)) {
                    Ok(held) => println!("holds {held}"),
                    Err(why) => println!("wrong {}", why.replace('\n', " ")),
                },
                _ => {}
            }
        }
        let ended = load.map_or(Ok(()), |mut load| load.end());
        self.take_down(&mut disk)?;
        // The answer may find nobody.
        let _ = writeln!(io::stdout(), "gone");
        ended.map_err(|why| Failure::new("the load failed", why, "report this"))
    }

    fn make(&self) -> Result<Mounted, String> {
        let image = self.folder.join("disk.raw");
        let made = File::create(&image).and_then(|file| file.set_len(self.mib << 20));
        made.map_err(|error| format!("make an image: {error}"))?;
        let mut disk = Mounted::attach(&image, &self.folder.join("mnt"))?;
        tool("mkfs.ext4", &["-q", "-F", &disk.device])?;
        disk.mount()?;
        Ok(disk)
    }

    /// Whether a copy of the disk is right: how many files it holds.
    fn verify(&self, image: &Path) -> Result<u64, String> {
        let mut copy = Mounted::attach(image, &self.folder.join("recovered"))?;
        copy.mount()?;
        let mut held = 0;
        let folder = copy.place.join("files");
        let numbers = fs::read_dir(&folder).map_err(|error| format!("the files cannot be listed: {error}"))?;
        for entry in numbers.flatten() {
            held = held.max(entry.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(0));
        }
        for number in 1..=held {
            match fs::read(folder.join(number.to_string())) {
                Ok(found) if found == content(self.seed, number) => {}
                Ok(_) => return Err(format!("file {number} of {held} holds something else")),
                Err(error) => return Err(format!("file {number} of {held}: {error}")),
            }
        }
        copy.unmount()?;
        check_file_system(image).map_err(|failure| failure.to_string())?;
        Ok(held)
    }

    /// Ends the agent, takes its programs out of the kernel, and lets go of the disk.
    fn take_down(&self, disk: &mut Mounted) -> Done {
        if let Ok(config) = AgentConfig::load(&self.agent) {
            if let (Ok(_), Ok(state)) =
                (ask(&config.control_socket(), &Request::Stop), StateDir::open(&config.state_dir))
            {
                for _ in 0..PATIENCE {
                    if state.lock().is_ok() {
                        break;
                    }
                    thread::sleep(POLL);
                }
            }
            // The agent may just be about to end, or to be killed by whoever started it.
            for _ in 0..PATIENCE {
                if !config.ebpf_pins().exists() || detach(&config).is_ok() {
                    break;
                }
                thread::sleep(POLL);
            }
            if config.ebpf_pins().exists() {
                return Err(Failure::new(
                    "the capture was not taken out of the kernel",
                    format!("{} is still there", config.ebpf_pins().display()),
                    "run `farshore-agent detach`, or restart the machine",
                ));
            }
        }
        disk.unmount().map_err(|why| Failure::new("the demo's disk was not unmounted", why, "unmount it by hand"))?;
        fs::remove_dir(&disk.place).map_err(|error| io_failure("the mount point cannot be removed", &error))
    }
}
