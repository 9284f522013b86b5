//! One write by io_uring, made by one of its kernel-side workers. By plain system calls: it is the only use of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};

const OP_WRITE: u8 = 23;
/// Never in the submitting task: always by a worker.
const SQE_ASYNC: u8 = 1 << 4;
const ENTER_GETEVENTS: u32 = 1;
const OFF_SQ_RING: i64 = 0;
const OFF_CQ_RING: i64 = 0x800_0000;
const OFF_SQES: i64 = 0x1000_0000;
const SQE: usize = 64;
const CQE: usize = 16;

/// `struct io_uring_params`: ten words, then the offsets of both rings.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags_to_reserved: [u32; 8],
    sq: Offsets,
    cq: Offsets,
}

/// For submissions: head, tail, mask, entries, flags, dropped, array. For completions: head, tail, mask, entries, overflow, cqes.
#[repr(C)]
#[derive(Default)]
struct Offsets {
    word: [u32; 8],
    user_addr: u64,
}

struct Mapping {
    at: *mut u8,
    length: usize,
}

impl Mapping {
    fn new(ring: &OwnedFd, offset: i64, length: usize) -> Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                ring.as_raw_fd(),
                offset,
            )
        };
        ensure!(
            at != libc::MAP_FAILED,
            "mapping a ring: {}",
            io::Error::last_os_error()
        );
        Ok(Self {
            at: at.cast(),
            length,
        })
    }

    /// A place in the mapping.
    fn place<T>(&self, offset: u32) -> Result<*mut T> {
        let offset = offset as usize;
        ensure!(offset + size_of::<T>() <= self.length && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: inside the mapping, as checked.
        Ok(unsafe { self.at.add(offset) }.cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; places do not outlive the mapping.
        unsafe { libc::munmap(self.at.cast(), self.length) };
    }
}

pub(crate) fn write_by_a_worker(file: &File, data: &[u8]) -> Result<()> {
    let mut params = Params::default();
    // SAFETY: `params` is the kernel's structure (120 bytes) and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, &raw mut params) };
    ensure!(fd >= 0, "io_uring_setup: {}", io::Error::last_os_error());
    // SAFETY: just made, owned by nothing else.
    let ring = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };

    let (sq, cq) = (params.sq.word, params.cq.word);
    let submissions = Mapping::new(
        &ring,
        OFF_SQ_RING,
        sq[6] as usize + 4 * params.sq_entries as usize,
    )?;
    let completions = Mapping::new(
        &ring,
        OFF_CQ_RING,
        cq[5] as usize + CQE * params.cq_entries as usize,
    )?;
    let entries = Mapping::new(&ring, OFF_SQES, SQE * params.sq_entries as usize)?;

    let mut entry = [0u8; SQE];
    entry[0] = OP_WRITE;
    entry[1] = SQE_ASYNC;
    entry[4..8].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
    entry[16..24].copy_from_slice(&(data.as_ptr() as u64).to_ne_bytes());
    entry[24..28].copy_from_slice(&u32::try_from(data.len())?.to_ne_bytes());
    let (slot, index) = (
        entries.place::<[u8; SQE]>(0)?,
        submissions.place::<u32>(sq[6])?,
    );
    let tail = submissions.place::<AtomicU32>(sq[1])?;
    // SAFETY: places inside live mappings; the kernel reads them only after the tail has moved.
    unsafe {
        slot.write(entry);
        index.write(0);
        (*tail).store(1, Ordering::Release);
    }
    // SAFETY: `data` stays where it is until the completion that this call waits for.
    let submitted = unsafe {
        let nothing = std::ptr::null::<u8>();
        libc::syscall(
            libc::SYS_io_uring_enter,
            ring.as_raw_fd(),
            1u32,
            1u32,
            ENTER_GETEVENTS,
            nothing,
            0usize,
        )
    };
    ensure!(
        submitted == 1,
        "io_uring_enter: {submitted}: {}",
        io::Error::last_os_error()
    );
    let completion = completions.place::<[u8; CQE]>(cq[5])?;
    // SAFETY: a place inside a live mapping, complete since the call before has returned.
    let completion = unsafe { completion.read_volatile() };
    let result = i32::from_ne_bytes(completion[8..12].try_into()?);
    ensure!(
        usize::try_from(result).ok() == Some(data.len()),
        "the write answered {result}"
    );
    Ok(())
}
