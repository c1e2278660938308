//! Whether a reader that sleeps is woken by the next write, and one that is awake is left alone.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use super::loader::Object;
use super::tests::{ANY_VARIANT, Aligned, BLKDISCARD, BLKZEROOUT, Bench, can_test, range_ioctl, rotate};
use super::*;
use crate::service::bell::Bell;

/// A sleep that only a wake-up ends.
const LONG: Duration = Duration::from_secs(8);
/// What counts as at once, on an emulated machine that others use as well.
const AT_ONCE: Duration = Duration::from_secs(3);
/// Time for a wake-up that should not come.
const A_WHILE: Duration = Duration::from_millis(40);

fn drain(capture: &mut EbpfCapture) -> usize {
    let mut count = 0;
    while let Some(captured) = capture.next() {
        capture.release(captured.end);
        count += 1;
    }
    count
}

/// Looks as the engine's thread does: until it may sleep.
fn lie_down(capture: &mut EbpfCapture, bell: &Bell) {
    let since = Instant::now();
    loop {
        drain(capture);
        if capture.doze() {
            return;
        }
        assert!(since.elapsed() < LONG, "it may never sleep");
        bell.wait(Duration::from_millis(2));
    }
}

pub(super) fn check_waking(bench: &Bench, mut capture: EbpfCapture) {
    let bell = Bell::new().expect("a bell");
    bell.watch(Capture::bell(&capture).expect("it rings")).expect("watched");
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    let file = bench.file();
    let mut slowest = Duration::ZERO;
    for round in 0..24u64 {
        lie_down(&mut capture, &bell);
        let woken = thread::scope(|scope| {
            let writing = scope.spawn(|| {
                // Usually after the wait has begun.
                thread::sleep(Duration::from_millis(round % 4 * 4));
                let began = Instant::now();
                match round % 6 {
                    0 => range_ioctl(&file, BLKDISCARD, round << 17, 65_536),
                    1 => range_ioctl(&file, BLKZEROOUT, round << 17, 65_536),
                    2 => file.write_all_at(Aligned::random(300 << 10).bytes(), 32 << 20).expect("written"),
                    _ => file.write_all_at(Aligned::random(512).bytes(), round << 17).expect("written"),
                }
                began
            });
            assert!(bell.wait(LONG), "round {round}: a reader that sleeps is woken by a write");
            let woken = Instant::now();
            woken.saturating_duration_since(writing.join().expect("it does not panic"))
        });
        slowest = slowest.max(woken);
        assert!(woken < AT_ONCE, "round {round}: woken after {woken:?}");
        assert!(drain(&mut capture) > 0, "round {round}: and finds what was written");
    }
    println!("the slowest wake-up took {slowest:?}");
    // Awake: a write costs no wake-up.
    while bell.wait(A_WHILE) {}
    for round in 0..8u64 {
        file.write_all_at(Aligned::random(4096).bytes(), round << 17).expect("written");
    }
    assert!(!bell.wait(A_WHILE), "a reader that is awake is left alone");
    assert_eq!(drain(&mut capture), 8);
    // What was said before a write, the write has answered: it has to be said again.
    assert!(!capture.doze());
    file.write_all_at(Aligned::random(4096).bytes(), 0).expect("written");
    assert!(!capture.doze() && !capture.doze(), "there is something to read");
    assert!(bell.wait(LONG) && drain(&mut capture) == 1);
    assert_eq!(capture.status().gap_count, 0);
}

fn a_sleeping_reader_is_woken(test: &str, variant: Variant) {
    if !can_test(test, variant) {
        return;
    }
    let Some(bench) = Bench::of(test, 64 << 20) else { return };
    check_waking(&bench, bench.open_object(&[variant], 32 << 20, &loader::object()));
}

#[test]
fn a_reader_that_sleeps_is_woken_by_a_large_record() {
    a_sleeping_reader_is_woken("a_reader_that_sleeps_is_woken_by_a_large_record", Variant::Dynptr);
}

#[test]
fn a_reader_that_sleeps_is_woken_by_small_records() {
    a_sleeping_reader_is_woken("a_reader_that_sleeps_is_woken_by_small_records", Variant::Bounded);
}

/// Writers that never rest, a reader that sleeps as often as it can: what it is woken for is all there is.
#[test]
fn nothing_waits_for_the_end_of_a_sleep() {
    const WRITES: u64 = 3000;
    let Some(bench) = Bench::of("nothing_waits_for_the_end_of_a_sleep", 64 << 20) else { return };
    let mut capture = bench.open_object(&ANY_VARIANT, 32 << 20, &loader::object());
    let bell = Bell::new().expect("a bell");
    bell.watch(Capture::bell(&capture).expect("it rings")).expect("watched");
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    let writers = [0u64, 1].map(|writer| {
        let file = bench.file();
        thread::spawn(move || {
            for round in 0..WRITES / 2 {
                file.write_all_at(Aligned::random(512).bytes(), (writer << 24) + (round % 512) * 4096)
                    .expect("written");
                if round % 7 == 0 {
                    thread::sleep(Duration::from_micros(round % 900));
                }
            }
        })
    });
    let (mut taken, mut sleeps) = (0, 0);
    while taken < WRITES {
        taken += drain(&mut capture) as u64;
        // The second look comes at once here, and not after milliseconds: what slips through is rung for by the next write.
        if taken < WRITES && capture.doze() {
            sleeps += 1;
            assert!(bell.wait(LONG), "{taken} of {WRITES} writes were taken, and nobody rang for the next");
        }
    }
    println!("{sleeps} sleeps");
    writers.into_iter().for_each(|writer| writer.join().expect("it does not panic"));
}

/// With programs that do not wake: see [`super::planted`].
pub(super) fn without_wake_ups(bench: &Bench, object: &Object<'_>) {
    check_waking(bench, bench.open_object(&[Variant::Dynptr], 32 << 20, object));
}
