//! What an idle machine costs its process server.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::site::{Site, Way};
use crate::bench::promises::{Promise, Promised};
use crate::bench::{Case, MIB, Measured, Subject};
use crate::process::resident_bytes_now;

const MACHINES: u64 = 50;
/// Long enough that every machine was sealed once and what initial replication took is free again.
const SETTLE: Duration = Duration::from_secs(8);
const LIMIT: Duration = Duration::from_secs(300);

pub(in crate::bench::cases) struct Idle;

impl Case for Idle {
    fn name(&self) -> &'static str {
        "farshore-idle"
    }

    fn needs(&self) -> &'static [&'static str] {
        &[]
    }

    fn is_ours(&self) -> bool {
        true
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let mut site = Site::make(scratch, subject.programs)?;
        println!("  {MACHINES} idle machines");
        let mut before = 0;
        for number in 0..=MACHINES {
            let machine = format!("m{number}");
            File::create(site.image(&machine))?.set_len(MIB)?;
            site.join(&machine)?;
            site.start_agent(&machine, Way::Direct)?;
            site.wait_until("the machine is protected", LIMIT, || site.is_protected(&machine))?;
            // The first one's share is what the server needs for any.
            if number == 0 {
                std::thread::sleep(SETTLE);
                before = resident_bytes_now(site.server_pid());
            }
        }
        std::thread::sleep(SETTLE);
        let after = resident_bytes_now(site.server_pid());
        let each = after.saturating_sub(before) as f64 / MACHINES as f64 / MIB as f64;
        let text = format!(
            "{each:.2} MiB ({} MiB with {} machines, {} MiB with one)",
            after / MIB,
            MACHINES + 1,
            before / MIB
        );
        let promise = Promise::new(Promised::ServerMemory, text, each <= 4.0);
        Ok(Measured { promises: vec![promise], ..Measured::default() })
    }
}
