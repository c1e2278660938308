//! What all fuzzers share: how a target becomes one, and an allocator that makes a greedy parser fail.

use std::alloc::{GlobalAlloc, Layout, System};

/// Largest single allocation in bytes. The largest honest one is a message's, or a frame's, and both are far below.
const ALLOCATION_BYTES_MAX: usize = 128 << 20;

struct Bounded;

// SAFETY: everything is the system allocator's, except that a large request ends the process.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check(size);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

fn check(size: usize) {
    if size > ALLOCATION_BYTES_MAX {
        // A panic would allocate; an abort is what libFuzzer takes for a finding.
        std::process::abort();
    }
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// Makes a fuzzer of a function from bytes to whether they were valid.
#[macro_export]
macro_rules! target {
    ($target:path) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| {
            $target(data);
        });
    };
}
