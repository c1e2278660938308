//! How fast frames cross a link on this machine, both ends included. Not a test of correctness:
//! `FARSHORE_MEASURE=1 cargo test --release -p link --test throughput -- --nocapture`.

mod site;

use std::time::{Duration, Instant};

use bytes::Bytes;
use link::{Frame, FrameLink};
use site::{SOON, Site};

#[test]
fn throughput() {
    if std::env::var_os("FARSHORE_MEASURE").is_none() {
        println!("SKIPPED: throughput: set FARSHORE_MEASURE for figures");
        return;
    }
    for (len, total) in [(4096, 1_usize << 30), (65_536, 2 << 30), (262_144, 4 << 30), (1 << 20, 4 << 30)] {
        let site = Site::new();
        let (a, b) = site.connected();
        let body = Bytes::from(vec![0xa5; len]);
        let frames = total / len;
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        std::thread::scope(|scope| {
            scope.spawn(|| (0..frames).for_each(|_| a.send(Frame::new(1, body.clone())).expect("open")));
            let mut left = frames;
            while left > 0 {
                assert_eq!(b.recv(SOON).expect("open").expect("in time").len(), len);
                left -= 1;
            }
        });
        let seconds = start.elapsed().as_secs_f64();
        let gigabytes = total as f64 / 1e9;
        println!(
            "one way, {len:>8}-byte frames: {:.2} GB/s, {:.2} s of processor time per GB for both ends",
            gigabytes / seconds,
            (cpu_seconds() - cpu_start) / gigabytes
        );
    }
    let site = Site::new();
    let (a, b) = site.connected();
    let start = Instant::now();
    let rounds = 20_000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..rounds {
                let frame = b.recv(Duration::from_secs(60)).expect("open").expect("in time");
                b.send(frame).expect("open");
            }
        });
        for _ in 0..rounds {
            a.send(Frame::new(1, "ping")).expect("open");
            a.recv(SOON).expect("open").expect("in time");
        }
    });
    println!("round trip of a small frame: {:.1} us", start.elapsed().as_secs_f64() / f64::from(rounds) * 1e6);
}

/// Processor time of this process, which says more than the clock on a machine that others use too.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
