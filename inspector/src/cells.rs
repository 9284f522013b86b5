//! The cells of the registered sandboxes: the map `SANDBOXES` in this process's memory.
//!
//! An open hash table by the inode of the pid namespace, in an array that programs look into without a call, and this side without
//! a system call: counters are read, and epochs begun, by plain atomic accesses. `bpf/records.h` says who writes which member.
//!
//! Invariants: a cell's `pid_ns` is written last when it is taken and first when it is freed; its epoch never goes back, so that what a program of its
//! last owner writes late into the cache says nothing about the next one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::raw::Counters;

/// As in `bpf/maps.h`.
const CELLS: u32 = 8192;
const PROBES: u32 = 4;
/// As in `bpf/records.h`.
const SEEN: usize = 64;

/// More sandboxes than this may not find a place although cells are free.
pub(crate) const MOST: u32 = CELLS / 4;

/// `struct sandbox`.
#[repr(C)]
struct Cell {
    pid_ns: AtomicU32,
    slot: AtomicU32,
    dev: AtomicU32,
    pad: AtomicU32,
    epoch: AtomicU64,
    allow: AtomicU64,
    full: AtomicU64,
    pad1: [AtomicU64; 3],
    logged: AtomicU64,
    overflow: AtomicU64,
    events: AtomicU64,
    events_lost: AtomicU64,
    calls: AtomicU64,
    last_call: AtomicU64,
    rings: AtomicU64,
    outside: AtomicU64,
    seen: [AtomicU64; SEEN],
}

const _: () = assert!(size_of::<Cell>() == 128 + 8 * SEEN);

/// The place of a registered sandbox. Only [`Cells`] makes them, so they are in bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(u32);

impl Place {
    /// By which the programs know it.
    pub(crate) fn number(self) -> u32 {
        self.0
    }
}

pub(crate) struct Cells {
    memory: NonNull<Cell>,
}

// SAFETY: the memory is shared with the kernel and only accessed through atomics; it is unmapped when this is dropped, and by nothing else.
unsafe impl Send for Cells {}

const LENGTH: usize = CELLS as usize * size_of::<Cell>();

impl Cells {
    pub(crate) fn map(map: BorrowedFd<'_>) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LENGTH,
                protection,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(at.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory })
    }

    fn cell(&self, at: u32) -> &Cell {
        assert!(at < CELLS);
        // SAFETY: in bounds of the mapping, which lives as long as `self`; every bit pattern is a value, and all accesses are atomic.
        unsafe { self.memory.add(at as usize).as_ref() }
    }

    /// Takes a cell for a namespace that has none, in an epoch of its own. None where all its places are taken.
    pub(crate) fn take(&self, pid_ns: u32, slot: u32, dev: u32, quota: u64) -> Option<Place> {
        let places = (0..PROBES).map(|i| pid_ns.wrapping_add(i) & (CELLS - 1));
        let at = places
            .into_iter()
            .find(|at| self.cell(*at).pid_ns.load(Ordering::Acquire) == 0)?;
        let cell = self.cell(at);
        cell.slot.store(slot, Ordering::Relaxed);
        cell.dev.store(dev, Ordering::Relaxed);
        cell.rings.store(0, Ordering::Relaxed);
        cell.epoch.fetch_add(1, Ordering::SeqCst);
        let logged = cell.logged.load(Ordering::SeqCst);
        cell.allow.store(logged + quota, Ordering::Relaxed);
        cell.pid_ns.store(pid_ns, Ordering::SeqCst);
        Some(Place(at))
    }

    pub(crate) fn free(&self, place: Place) {
        self.cell(place.0).pid_ns.store(0, Ordering::SeqCst);
    }

    /// Begins a new epoch; answers the one that is over, and the counters as they are after its end.
    pub(crate) fn turn(&self, place: Place) -> (u64, Counters) {
        let cell = self.cell(place.0);
        let over = cell.epoch.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        (over, self.counters(place))
    }

    pub(crate) fn counters(&self, place: Place) -> Counters {
        let cell = self.cell(place.0);
        let get = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        Counters {
            logged: get(&cell.logged),
            overflow: get(&cell.overflow),
            events: get(&cell.events),
            events_lost: get(&cell.events_lost),
            calls: get(&cell.calls),
            last_call: get(&cell.last_call),
            rings: get(&cell.rings),
            outside: get(&cell.outside),
        }
    }

    /// How far the log of this sandbox may go from now on.
    pub(crate) fn allow(&self, place: Place, logged: u64) {
        self.cell(place.0).allow.store(logged, Ordering::SeqCst);
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; no reference to it outlives `self`.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), LENGTH) };
    }
}
