//! The two bpf(2) commands aya has no call for: draining a hash map in batches, and asking how often a
//! program was skipped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::raw::{DIRTY_KEY, DIRTY_VALUE};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_AND_DELETE_BATCH: libc::c_long = 25;

/// `union bpf_attr`, the member for batch commands.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `union bpf_attr`, the member for info commands.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// Entries asked for at a time; doubled when one hash bucket holds more.
const BATCH: usize = 4096;
/// A bucket larger than this is no longer a hash map.
const BATCH_LIMIT: usize = 1 << 20;

/// Takes every entry out of a hash map and hands each to `entry` (key bytes, value bytes).
///
/// The kernel copies and deletes bucket by bucket under the bucket's lock: an entry put in
/// meanwhile is either handed out here or is still in the map afterwards.
///
/// # Errors
/// What the kernel answers. Entries handed out before stay handed out; the caller must assume that some were lost.
pub(crate) fn drain(map: BorrowedFd<'_>, mut entry: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    let mut room = BATCH;
    let mut keys = vec![0u8; room * DIRTY_KEY];
    let mut values = vec![0u8; room * DIRTY_VALUE];
    let mut position: u64 = 0;
    let mut started = false;
    loop {
        let mut next: u64 = 0;
        let mut attr = BatchAttr {
            in_batch: if started {
                (&raw const position) as u64
            } else {
                0
            },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(room).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        // SAFETY: `keys` and `values` hold `room` entries of the map's key and value sizes, `position` and
        // `next` are 8 bytes where the kernel uses 4; all outlive the call.
        let answer = unsafe { bpf(BPF_MAP_LOOKUP_AND_DELETE_BATCH, &raw mut attr) };
        let errno = match &answer {
            Ok(()) => 0,
            Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
        };
        // What `count` says was copied out, also by a call that then stopped; after other errors it may
        // still be what was asked for.
        if matches!(errno, 0 | libc::ENOENT | libc::ENOSPC | libc::EBUSY) {
            let got = (attr.count as usize).min(room);
            for i in 0..got {
                entry(
                    &keys[i * DIRTY_KEY..(i + 1) * DIRTY_KEY],
                    &values[i * DIRTY_VALUE..(i + 1) * DIRTY_VALUE],
                );
            }
        }
        match (errno, answer) {
            (0, _) => {
                started = true;
                position = next;
            }
            (libc::ENOENT, _) => return Ok(()),
            (libc::ENOSPC, _) if room < BATCH_LIMIT => {
                // The kernel stopped at a bucket with more entries than room; `next` names that bucket.
                started = true;
                position = next;
                room *= 2;
                keys.resize(room * DIRTY_KEY, 0);
                values.resize(room * DIRTY_VALUE, 0);
            }
            (_, other) => return other,
        }
    }
}

/// How often the kernel did not run a program because it was already running on that CPU.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    /// Offset of `recursion_misses` in `struct bpf_prog_info` (fixed: the structure is part of the kernel's API).
    const AT: usize = 208;
    let mut info = [0u64; 32];
    let mut attr = InfoAttr {
        bpf_fd: program.as_raw_fd().cast_unsigned(),
        info_len: u32::try_from(size_of_val(&info)).unwrap_or(0),
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: `info` is `info_len` zeroed bytes, which asks for no optional arrays; it outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &raw mut attr) }?;
    Ok(info[AT / 8])
}

/// # Safety
/// `attr` must be the member of `union bpf_attr` that belongs to the command, with valid pointers inside.
unsafe fn bpf<T>(command: libc::c_long, attr: *mut T) -> io::Result<()> {
    // SAFETY: the caller vouches for `attr`; its size is the type's.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
