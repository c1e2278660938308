//! The workload: a process of its own that writes blocks through NBD and keeps the ledger.
//!
//! Told over standard input, one command per line: `rate N` (writes per second), `burst N` (this many at once), `pause`
//! (answers when nothing is in flight), `stop`. It answers `paused N` and `stopped N` with the number of the last
//! acknowledged write. When standard input ends, it stops: no workload outlives its demo.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::Duration;

use clap::Args;
use nbd::Client;
use world::{BlockDevice, Clock, SystemClock};

use super::ledger::{Ledger, LedgerWriter, block, mix};
use crate::failure::{Done, Failure, io_failure};

/// Writes noted, made durable in the ledger and submitted together.
const BATCH: u64 = 32;
/// Batches after which the disk is flushed.
const FLUSH_EVERY: u64 = 8;

/// Options of the hidden command.
#[derive(Debug, Args)]
pub(crate) struct Workload {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    export: String,
    #[arg(long)]
    ledger: PathBuf,
    #[arg(long)]
    rate: u64,
}

enum Order {
    Rate(u64),
    Burst(u64),
    Pause,
    Stop,
}

impl Workload {
    pub(crate) fn run(&self) -> Done {
        let ledger = Ledger::load(&self.ledger)?;
        let client = Client::connect_unix(&self.socket, &self.export)
            .map_err(|error| Failure::because("the workload has no disk", &error, "see the agent's log"))?;
        let refused = |error: io::Error| io_failure("the ledger cannot be kept", &error);
        let writer = LedgerWriter::resume(&self.ledger).map_err(refused)?;
        let (orders, received) = sync_channel(16);
        std::thread::spawn(move || {
            for line in io::stdin().lock().lines().map_while(Result::ok) {
                let number = |text: &str| text.trim().parse().ok();
                let order = match line.split_once(' ') {
                    Some(("rate", rate)) => number(rate).map(Order::Rate),
                    Some(("burst", count)) => number(count).map(Order::Burst),
                    _ if line == "pause" => Some(Order::Pause),
                    _ => Some(Order::Stop),
                };
                if orders.send(order.unwrap_or(Order::Stop)).is_err() {
                    return;
                }
            }
        });
        let next = ledger.writes.len() as u64 + 1;
        let mut running = Running { ledger, client, writer, next, batches: 0 };
        running.run(&received, self.rate)
    }
}

struct Running {
    ledger: Ledger,
    client: Client,
    writer: LedgerWriter,
    next: u64,
    batches: u64,
}

impl Running {
    fn run(&mut self, orders: &Receiver<Order>, mut rate: u64) -> Done {
        let mut due = SystemClock.monotonic();
        loop {
            let now = SystemClock.monotonic();
            match orders.try_recv() {
                Ok(Order::Rate(new)) => (rate, due) = (new, now),
                Ok(Order::Burst(count)) => {
                    let end = self.next + count;
                    while self.next < end {
                        self.batch(BATCH.min(end - self.next))?;
                    }
                    due = SystemClock.monotonic();
                }
                Ok(Order::Pause) => {
                    self.settle()?;
                    rate = 0;
                    self.answer("paused")?;
                }
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => {
                    self.settle()?;
                    return self.answer("stopped");
                }
                Err(TryRecvError::Empty) if rate > 0 && now >= due => {
                    let count = BATCH.min(rate.div_ceil(10).max(1));
                    self.batch(count)?;
                    due = due.plus(Duration::from_nanos(1_000_000_000 * count / rate));
                    // Time lost to a stall is not caught up with: that would be a burst nobody asked for.
                    if SystemClock.monotonic().since(due) > Duration::from_secs(1) {
                        due = SystemClock.monotonic();
                    }
                }
                Err(TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Notes `count` writes, submits them in order, and notes that they were acknowledged.
    fn batch(&mut self, count: u64) -> Done {
        let numbers = self.next..self.next + count;
        let ledger_failed = |error: io::Error| io_failure("the ledger cannot be kept", &error);
        let slot = |ledger: &Ledger, number: u64| (mix(ledger.seed ^ mix(number)) % ledger.slots.len() as u64) as usize;
        for number in numbers.clone() {
            self.writer.submit(number, slot(&self.ledger, number), SystemClock.wall().0);
        }
        self.writer.sync().map_err(ledger_failed)?;
        let disk_failed = |error| Failure::because("the workload's disk failed", &error, "see the agent's log");
        for number in numbers.clone() {
            let offset = self.ledger.slots[slot(&self.ledger, number)];
            self.client.write_at(offset, &block(self.ledger.seed, number, offset)).map_err(disk_failed)?;
        }
        self.batches += 1;
        if self.batches.is_multiple_of(FLUSH_EVERY) {
            self.client.flush().map_err(disk_failed)?;
        }
        self.next = numbers.end;
        // Not synced alone: it becomes durable with the next batch, and a lost note only makes the check laxer.
        self.writer.acknowledge(numbers.end - 1, SystemClock.wall().0);
        Ok(())
    }

    fn settle(&mut self) -> Done {
        self.client.flush().map_err(|error| Failure::because("the workload's disk failed", &error, "see its log"))?;
        self.writer.sync().map_err(|error| io_failure("the ledger cannot be kept", &error))
    }

    fn answer(&self, word: &str) -> Done {
        let mut out = io::stdout().lock();
        writeln!(out, "{word} {}", self.next - 1)
            .and_then(|()| out.flush())
            .map_err(|error| io_failure("the demo cannot be answered", &error))
    }
}
