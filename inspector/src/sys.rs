//! The bpf(2) command aya has no call for: asking how often a program was skipped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;

/// `union bpf_attr`, the member for info commands.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
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
