//! The bpf(2) commands aya has no call for: asking how often a program was skipped, and an iterator over one task.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
/// `BPF_TRACE_ITER` of `enum bpf_attach_type`.
const TRACE_ITER: u32 = 28;

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

/// `union bpf_attr`, the member for links, of an iterator.
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    pad: u32,
}

/// `union bpf_iter_link_info`, the member for tasks.
#[repr(C)]
#[derive(Default)]
struct TaskInfo {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    pad: u32,
}

/// `union bpf_attr`, the member for iterators.
#[repr(C)]
#[derive(Default)]
struct IterAttr {
    link: u32,
    flags: u32,
}

/// Links a task iterator to one task; [`iterate`] runs it.
///
/// # Errors
/// What the kernel answers; before 6.1 it knows no such iterators.
pub(crate) fn link_to_task(program: BorrowedFd<'_>, tid: u32) -> io::Result<OwnedFd> {
    let mut info = TaskInfo {
        tid,
        ..TaskInfo::default()
    };
    let mut attr = LinkAttr {
        program: program.as_raw_fd().cast_unsigned(),
        attach_type: TRACE_ITER,
        iter_info: (&raw mut info) as u64,
        iter_info_len: u32::try_from(size_of_val(&info)).unwrap_or(0),
        ..LinkAttr::default()
    };
    // SAFETY: `info` is `iter_info_len` bytes and outlives the call.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &raw mut attr) }?;
    // SAFETY: just made, owned by nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One run of a linked iterator, to be read.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn iterate(link: BorrowedFd<'_>) -> io::Result<File> {
    let mut attr = IterAttr {
        link: link.as_raw_fd().cast_unsigned(),
        ..IterAttr::default()
    };
    // SAFETY: no pointers.
    let fd = unsafe { bpf(BPF_ITER_CREATE, &raw mut attr) }?;
    // SAFETY: just made, owned by nothing else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// # Safety
/// `attr` must be the member of `union bpf_attr` that belongs to the command, with valid pointers inside.
unsafe fn bpf<T>(command: libc::c_long, attr: *mut T) -> io::Result<i32> {
    // SAFETY: the caller vouches for `attr`; its size is the type's.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        i32::try_from(answer).map_err(io::Error::other)
    }
}
