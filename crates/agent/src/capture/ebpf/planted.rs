//! Whether the tests notice when the capture is wrong: the same checks, with programs that make a mistake.
//!
//! The programs are built of the same source into an object of their own, which nothing but these tests contains. What
//! must be noticed besides is planted in the simulation (crate `sim`), at the seams of the agent's own code.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::layout::Cpu;
use super::loader::Object;
use super::tests::{Bench, can_test, check_full_ring, check_streaming};
use super::{RING_BYTES_MIN, Variant, overdue_tests, waking_tests};

static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../bpf/planted.bpf.o");

/// A mistake, as `bpf/capture.bpf.c` numbers them.
#[derive(Debug, Clone, Copy)]
enum Plant {
    Nothing = 0,
    /// A write is not put into the ring, and nothing is said.
    Write,
    /// A write that has ended is taken for one under way.
    Completion,
    /// A write is not marked *uncommitted*.
    Uncommitted,
    /// A write that is not in the ring is not marked *unstreamed*.
    Unstreamed,
    /// Nobody is told that the ring lacks something.
    Gap,
    /// The first of two completion programs is skipped, as the kernel does when it interrupts itself. No mistake of ours:
    /// the second has to take its place.
    Skip,
    /// A reader that sleeps is not woken.
    Wake,
}

/// One in a thousand is forgotten.
const SELDOM: u32 = 1000;
/// Enough writes for some to be forgotten: every fourth is of several requests.
const ROUNDS: u64 = 1000;
/// So often may a check pass by luck: eight times in a row it is none.
const RUNS: usize = 8;
const FULL_RING_DISK_BYTES: u64 = 256 << 20;
const FULL_RING_WRITES: u64 = 3000;

fn streaming(test: &str, plant: Plant) -> Option<()> {
    let bench = Bench::of(test, 64 << 20)?;
    let settings = [("planted", plant as u32), ("planted_every", SELDOM)];
    let object = Object { bytes: OBJECT, settings: &settings };
    check_streaming(&bench, bench.open_object(&[Variant::Dynptr], 32 << 20, &object), ROUNDS);
    Some(())
}

#[test]
fn the_second_completion_program_takes_what_the_first_does_not_get() {
    let test = "the_second_completion_program_takes";
    let Some(bench) = Bench::of(test, 64 << 20).filter(|_| can_test(test, Variant::Dynptr)) else { return };
    let settings = [("planted", Plant::Skip as u32), ("planted_every", 3)];
    let object = Object { bytes: OBJECT, settings: &settings };
    let capture = bench.open_object(&[Variant::Dynptr], 32 << 20, &object);
    let installed = capture.installed.clone();
    check_streaming(&bench, capture, 200);
    let rescued = installed.sum(Cpu::RESCUED);
    assert!(rescued > 50, "every third end of a request or a bio: {rescued}");
    assert_eq!(installed.misses(), 0);
}

fn full_ring(test: &str, plant: Plant, every: u32) -> Option<()> {
    let bench = Bench::of(test, FULL_RING_DISK_BYTES)?;
    let settings = [("planted", plant as u32), ("planted_every", every)];
    let object = Object { bytes: OBJECT, settings: &settings };
    check_full_ring(&bench, bench.open_object(&[Variant::Dynptr], RING_BYTES_MIN, &object), FULL_RING_WRITES);
    Some(())
}

/// `check` fails in one of its first runs, and says `words`.
///
/// A run forgets one thing or two, and what is forgotten may do no harm: a mark that is lost where an earlier write left
/// one hides nothing.
fn assert_caught(mut check: impl FnMut() -> Option<()>, words: &str) {
    let mut caught = None;
    for _ in 0..RUNS {
        match catch_unwind(AssertUnwindSafe(&mut check)) {
            Ok(Some(())) => {}
            // It could not run here, and has said so.
            Ok(None) => return,
            Err(panic) => {
                caught = Some(panic);
                break;
            }
        }
    }
    let panic = caught.expect("the mistake was not noticed");
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
    assert!(text.contains(words), "noticed, but otherwise: {text}");
    println!("caught: {}", text.lines().next().unwrap_or_default());
}

#[test]
fn without_a_mistake_the_checks_pass() {
    let test = "without_a_mistake_the_checks_pass";
    if can_test(test, Variant::Dynptr) {
        streaming(test, Plant::Nothing);
        full_ring(test, Plant::Nothing, SELDOM);
    }
}

#[test]
fn a_lost_write_is_noticed() {
    let test = "a_lost_write_is_noticed";
    if can_test(test, Variant::Dynptr) {
        assert_caught(|| streaming(test, Plant::Write), "every write is in the ring");
    }
}

#[test]
fn a_lost_completion_is_noticed() {
    let test = "a_lost_completion_is_noticed";
    if can_test(test, Variant::Dynptr) {
        assert_caught(|| streaming(test, Plant::Completion), "what has ended is known to have ended");
    }
}

#[test]
fn lost_completions_are_waited_for_only_so_long() {
    let test = "lost_completions_are_waited_for_only_so_long";
    let Some(bench) = Bench::of(test, 64 << 20).filter(|_| can_test(test, Variant::Dynptr)) else { return };
    let settings = [("planted", Plant::Completion as u32), ("planted_every", 1)];
    overdue_tests::untold_ends_are_given_up(&bench, &Object { bytes: OBJECT, settings: &settings });
}

#[test]
fn a_lost_mark_is_noticed() {
    let test = "a_lost_mark_is_noticed";
    if can_test(test, Variant::Dynptr) {
        assert_caught(|| streaming(test, Plant::Uncommitted), "every write is marked");
    }
}

#[test]
fn a_lost_mark_of_what_the_ring_lacks_is_noticed() {
    let test = "a_lost_mark_of_what_the_ring_lacks_is_noticed";
    if can_test(test, Variant::Dynptr) {
        assert_caught(|| full_ring(test, Plant::Unstreamed, SELDOM), "what the stream lacks is named");
    }
}

#[test]
fn a_lost_wake_up_is_noticed() {
    let test = "a_lost_wake_up_is_noticed";
    if can_test(test, Variant::Dynptr) {
        let settings = [("planted", Plant::Wake as u32), ("planted_every", 20)];
        let object = Object { bytes: OBJECT, settings: &settings };
        assert_caught(
            || Bench::of(test, 64 << 20).map(|bench| waking_tests::without_wake_ups(&bench, &object)),
            "a reader that sleeps is woken",
        );
    }
}

#[test]
fn a_lost_gap_is_noticed() {
    let test = "a_lost_gap_is_noticed";
    if can_test(test, Variant::Dynptr) {
        assert_caught(|| full_ring(test, Plant::Gap, 1), "nothing behind the break is handed out");
    }
}
