//! The kernel's side of things, made safe: shared memory, the ring, and the few calls that the loader library lacks.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// Bytes of a page.
pub(super) const PAGE_BYTES: usize = 4096;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// Bytes of the kernel's argument union that the calls below fill; the rest counts as zero.
const ATTRIBUTE_WORDS: usize = 16;

fn bpf(command: libc::c_long, attributes: &mut [u64; ATTRIBUTE_WORDS]) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is a valid buffer of the size passed. The callers put only pointers to memory into it that
    // outlives the call and has the size that the command demands.
    #[allow(unsafe_code)]
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn path_of(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Keeps a map, program or link in the BPF file system at `path`, beyond the end of this process.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_of(path)?;
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[0] = path.as_ptr() as u64;
    attributes[1] = pair(number(fd), 0);
    bpf(BPF_OBJ_PIN, &mut attributes).map(|_| ())
}

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_of(path)?;
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[0] = path.as_ptr() as u64;
    let fd = bpf(BPF_OBJ_GET, &mut attributes)?;
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    #[allow(unsafe_code)]
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    Ok(fd)
}

/// Sets an element of a hash map whose keys have 8 bytes and whose values have as many as `value`.
pub(super) fn update(map: BorrowedFd<'_>, key: u64, value: &[u8]) -> io::Result<()> {
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[0] = pair(number(map), 0);
    attributes[1] = std::ptr::from_ref(&key) as u64;
    attributes[2] = value.as_ptr() as u64;
    bpf(BPF_MAP_UPDATE_ELEM, &mut attributes).map(|_| ())
}

/// Removes an element of a hash map whose keys have 8 bytes; one that is not there is removed already.
pub(super) fn delete(map: BorrowedFd<'_>, key: u64) -> io::Result<()> {
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[0] = pair(number(map), 0);
    attributes[1] = std::ptr::from_ref(&key) as u64;
    match bpf(BPF_MAP_DELETE_ELEM, &mut attributes) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a walk through a hash map found.
pub(super) struct Walk<const BYTES: usize> {
    /// Keys and values.
    pub(super) entries: Vec<(u64, [u8; BYTES])>,
    /// What was in the map all the time is among them.
    pub(super) complete: bool,
}

/// The entries of a hash map whose keys have 8 bytes and whose values have `BYTES`. Others may change it meanwhile.
pub(super) fn walk<const BYTES: usize>(map: BorrowedFd<'_>) -> io::Result<Walk<BYTES>> {
    /// The kernel begins anew when the key it should go on from has gone; in a map that changes fast, again and again.
    const STEPS_MAX: usize = 1 << 18;
    let mut entries = Vec::new();
    let mut last: Option<u64> = None;
    for _ in 0..STEPS_MAX {
        let mut key = 0u64;
        let mut attributes = [0; ATTRIBUTE_WORDS];
        attributes[0] = pair(number(map), 0);
        attributes[1] = last.as_ref().map_or(0, |last| std::ptr::from_ref(last) as u64);
        attributes[2] = std::ptr::from_mut(&mut key) as u64;
        match bpf(BPF_MAP_GET_NEXT_KEY, &mut attributes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Walk { entries, complete: true }),
            result => result?,
        };
        let mut value = [0; BYTES];
        let mut attributes = [0; ATTRIBUTE_WORDS];
        attributes[0] = pair(number(map), 0);
        attributes[1] = std::ptr::from_ref(&key) as u64;
        attributes[2] = value.as_mut_ptr() as u64;
        match bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes) {
            Ok(_) => entries.push((key, value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        last = Some(key);
    }
    Ok(Walk { entries, complete: false })
}

/// Runs a raw tracepoint program once, now; what it returned.
pub(super) fn run(program: BorrowedFd<'_>) -> io::Result<u32> {
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[0] = pair(number(program), 0);
    bpf(BPF_PROG_TEST_RUN, &mut attributes)?;
    Ok(attributes[0].wrapping_shr(32) as u32)
}

/// How often the kernel did not run a program because it was running already on that CPU.
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    /// `recursion_misses` in `struct bpf_prog_info`, in bytes. Kernels before 5.12 end earlier and leave it zero.
    const MISSES_AT: usize = 208;
    let mut info = [0u8; 256];
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[0] = pair(number(program), info.len() as u32);
    attributes[1] = info.as_mut_ptr() as u64;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(u64::from_ne_bytes(*info[MISSES_AT..].first_chunk().expect("the buffer is longer")))
}

const MEMBARRIER_CMD_QUERY: libc::c_long = 0;
const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;

fn membarrier(command: libc::c_long) -> io::Result<libc::c_long> {
    // SAFETY: the call takes three integers and touches no memory of ours.
    #[allow(unsafe_code)]
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Whether this kernel tells when every program that ran has ended. With `nohz_full` it does not.
pub(super) fn has_grace_periods() -> bool {
    membarrier(MEMBARRIER_CMD_QUERY).is_ok_and(|commands| commands & MEMBARRIER_CMD_GLOBAL != 0)
}

/// Returns when every program that was running at the call has ended: an RCU grace period.
pub(super) fn wait_for_programs() -> io::Result<()> {
    membarrier(MEMBARRIER_CMD_GLOBAL).map(|_| ())
}

/// Lets this process lock as much memory as the maps take; kernels before 5.11 count it.
pub(super) fn lift_memory_limit() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is a valid structure for the duration of the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    if result != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "the limit of locked memory stays as it is");
    }
}

/// Memory that the kernel programs write too.
#[derive(Debug)]
pub(super) struct Area(MmapRaw);

impl Area {
    /// The first `bytes` bytes of an array map that may be mapped.
    pub(super) fn of(map: BorrowedFd<'_>, bytes: usize) -> io::Result<Area> {
        MmapOptions::new().len(bytes.next_multiple_of(PAGE_BYTES)).map_raw(&map).map(Area)
    }

    /// The eight bytes at `at`.
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.0.len(), "a word of the shared area");
        // SAFETY: within the mapping (checked), aligned (checked; mappings begin at pages), readable and writable,
        // alive as long as `self`. This process touches these bytes through atomics only.
        #[allow(unsafe_code)]
        unsafe {
            &*self.0.as_ptr().add(at).cast::<AtomicU64>()
        }
    }

    /// The four bytes at `at`.
    pub(super) fn half(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.0.len(), "half a word of the shared area");
        // SAFETY: as in `word`.
        #[allow(unsafe_code)]
        unsafe {
            &*self.0.as_ptr().add(at).cast::<AtomicU32>()
        }
    }

    /// The bytes at `range`.
    pub(super) fn cells(&self, range: std::ops::Range<usize>) -> &[AtomicU8] {
        assert!(range.start <= range.end && range.end <= self.0.len(), "cells of the shared area");
        // SAFETY: as in `word`; bytes need no alignment.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.0.as_ptr().add(range.start).cast::<AtomicU8>(), range.len())
        }
    }
}

/// Set in a record's length while it is being written.
const BUSY: u32 = 1 << 31;
/// Set in a record's length if it was given up.
const DISCARDED: u32 = 1 << 30;
/// The kernel's own head of a record, in bytes.
const HEAD_BYTES: u64 = 8;

/// A place in the ring that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Somebody is still writing here; everything behind waits.
    Busy,
    /// Nothing to read; go on at this position.
    Skip(u64),
    /// A record of `bytes` bytes; the next one is at `end`.
    Record {
        /// Its length.
        bytes: usize,
        /// Where the next one begins.
        end: u64,
    },
}

/// The kernel's ring buffer. Positions count bytes since it was made; the kernel writes to no byte between the
/// consumer's and the producer's position that belongs to a finished record.
pub(super) struct KernelRing {
    consumer: Area,
    /// The producer's page, then the data twice in a row, so that no record wraps.
    data: MmapRaw,
    bytes: u64,
}

impl KernelRing {
    /// The ring buffer map of `bytes` bytes.
    pub(super) fn open(map: BorrowedFd<'_>, bytes: u64) -> io::Result<KernelRing> {
        assert!(bytes.is_power_of_two() && bytes >= PAGE_BYTES as u64, "the kernel makes no other");
        let consumer = Area::of(map, PAGE_BYTES)?;
        let len = PAGE_BYTES + 2 * bytes as usize;
        let data = MmapOptions::new().offset(PAGE_BYTES as u64).len(len).map_raw_read_only(&map)?;
        Ok(KernelRing { consumer, data, bytes })
    }

    /// Its size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The position after the last record reserved so far.
    pub(super) fn producer(&self) -> u64 {
        // SAFETY: the first page of the read-only mapping begins with the position; aligned, alive as long as `self`.
        #[allow(unsafe_code)]
        let position = unsafe { &*self.data.as_ptr().cast::<AtomicU64>() };
        position.load(Ordering::Acquire)
    }

    /// Everything before this position is free.
    pub(super) fn consumer(&self) -> u64 {
        self.consumer.word(0).load(Ordering::Acquire)
    }

    /// Frees everything before `position`.
    pub(super) fn free(&self, position: u64) {
        assert!(position >= self.consumer() && position <= self.producer(), "only what is in the ring is freed");
        self.consumer.word(0).store(position, Ordering::Release);
    }

    /// What lies at `position`, which is between consumer and producer.
    pub(super) fn look(&self, position: u64) -> Found {
        let at = PAGE_BYTES + (position & (self.bytes - 1)) as usize;
        // SAFETY: records begin at multiples of eight within the data, of which a full copy follows; the mapping lives
        // as long as `self`. The kernel writes this word atomically.
        #[allow(unsafe_code)]
        let head = unsafe { &*self.data.as_ptr().add(at).cast::<AtomicU32>() }.load(Ordering::Acquire);
        if head & BUSY != 0 {
            return Found::Busy;
        }
        let bytes = u64::from(head & !(BUSY | DISCARDED));
        let end = position + (HEAD_BYTES + bytes).next_multiple_of(8);
        if head & DISCARDED != 0 { Found::Skip(end) } else { Found::Record { bytes: bytes as usize, end } }
    }

    /// The content of the finished record at `position`, which nobody frees meanwhile.
    pub(super) fn content(&self, position: u64, bytes: usize) -> &[u8] {
        let at = PAGE_BYTES + (position & (self.bytes - 1)) as usize + HEAD_BYTES as usize;
        assert!(bytes as u64 <= self.bytes && at + bytes <= self.data.len(), "a record lies within the ring");
        // SAFETY: within the mapping (checked). `look` saw the record finished (acquire), so the kernel has written it
        // and writes there again only after `free` passed it; `free` is called by the one owner of this ring, who
        // copies what it needs before (the borrow of `self` ends first).
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.data.as_ptr().add(at), bytes)
        }
    }
}
