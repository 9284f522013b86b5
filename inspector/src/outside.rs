//! What the programs have to know to tell changes made to uppers from outside: where uppers are, and whose doing does not count. `bpf/outside.h` says how they go about it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use aya::maps::{HashMap, MapData, MapError};

use crate::cells::Place;

/// As in `bpf/records.h`.
const KNOWN: usize = 1024;
const DEVICES: usize = 4;

/// `struct outside`.
#[repr(C)]
struct Shared {
    own: AtomicU32,
    dev: [AtomicU32; DEVICES],
    more: AtomicU32,
    started: AtomicU32,
    pad: u32,
    generation: AtomicU64,
    changed: AtomicU64,
    beyond: AtomicU64,
    known: [AtomicU64; KNOWN],
}

const LENGTH: usize = size_of::<Shared>();
const _: () = assert!(LENGTH == 56 + 8 * KNOWN);

/// `struct upper`: number and device of the root of an upper.
pub(crate) type Upper = [u8; 16];

/// Of an inode number, and a device in the kernel's form.
pub(crate) fn upper(ino: u64, dev: u32) -> Upper {
    let mut bytes = Upper::default();
    bytes[..8].copy_from_slice(&ino.to_ne_bytes());
    bytes[8..12].copy_from_slice(&dev.to_ne_bytes());
    bytes
}

/// The maps `OUTSIDE`, in this process's memory, and `UPPERS`.
pub(crate) struct Outside {
    memory: NonNull<Shared>,
    uppers: HashMap<MapData, Upper, u32>,
    /// The device of each upper that is known to the programs.
    devices: Vec<u32>,
}

// SAFETY: the memory is shared with the kernel and only accessed through atomics; it is unmapped when this is dropped, and by nothing else.
unsafe impl Send for Outside {}

impl Outside {
    /// With changes by this process left out, and those by processes that it `started` where that is so.
    pub(crate) fn map(
        map: BorrowedFd<'_>,
        started: bool,
        uppers: HashMap<MapData, Upper, u32>,
    ) -> io::Result<Self> {
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
        let this = Self {
            memory,
            uppers,
            devices: Vec::new(),
        };
        let shared = this.shared();
        shared.started.store(u32::from(started), Ordering::SeqCst);
        shared.own.store(std::process::id(), Ordering::SeqCst);
        Ok(this)
    }

    fn shared(&self) -> &Shared {
        // SAFETY: the mapping lives as long as `self`; every bit pattern is a value, and all accesses are atomic.
        unsafe { self.memory.as_ref() }
    }

    /// Has changes to an upper, on this device, noted for a sandbox.
    pub(crate) fn add(&mut self, upper: Upper, dev: u32, place: Place) -> Result<(), MapError> {
        self.uppers.insert(upper, place.number(), 0)?;
        self.devices.push(dev);
        self.devices_changed();
        // Last: what is remembered from now on was looked for with this upper known.
        self.forget();
        Ok(())
    }

    /// What is remembered of inodes outside counts no longer.
    pub(crate) fn forget(&self) {
        self.shared().generation.fetch_add(1, Ordering::SeqCst);
    }

    /// No longer, unless the upper is another sandbox's by now.
    pub(crate) fn remove(&mut self, upper: Upper, dev: u32, place: Place) {
        if self.uppers.get(&upper, 0).ok() == Some(place.number()) {
            // It is there, and nobody else takes it out.
            let _ = self.uppers.remove(&upper);
        }
        if let Some(at) = self.devices.iter().position(|d| *d == dev) {
            self.devices.swap_remove(at);
            self.devices_changed();
        }
    }

    fn devices_changed(&self) {
        let mut devices = self.devices.clone();
        devices.sort_unstable();
        devices.dedup();
        let shared = self.shared();
        let more = u32::from(devices.len() > DEVICES);
        // On in time, and off late: a device is known at each moment.
        if more == 1 {
            shared.more.store(1, Ordering::SeqCst);
        }
        let all = devices.iter().copied().chain(std::iter::repeat(0));
        let moved = shared
            .dev
            .iter()
            .zip(all.clone())
            .any(|(d, now)| d.load(Ordering::SeqCst) != now);
        if moved {
            shared.more.store(1, Ordering::SeqCst);
            for (d, now) in shared.dev.iter().zip(all) {
                d.store(now, Ordering::SeqCst);
            }
        }
        shared.more.store(more, Ordering::SeqCst);
    }

    /// How many changes could not be told where they were. It only grows.
    pub(crate) fn beyond(&self) -> u64 {
        self.shared().beyond.load(Ordering::SeqCst)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; no reference to it outlives `self`.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), LENGTH) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upper_is_as_the_programs_write_it() {
        let bytes = upper(5 << 32 | 7, 0x80_0001);
        assert_eq!(
            u64::from_ne_bytes(bytes[..8].try_into().expect("eight")),
            5 << 32 | 7
        );
        assert_eq!(
            u32::from_ne_bytes(bytes[8..12].try_into().expect("four")),
            0x80_0001
        );
        assert_eq!(bytes[12..], [0; 4]);
    }
}
