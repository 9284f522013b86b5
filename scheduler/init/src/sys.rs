//! The few system calls the standard library has no words for.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use tidepool_init::message::ExitStatus;

/// Turns a negative result into the error it stands for.
pub(crate) fn check(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// Points descriptors 0, 1 and 2 to the sandbox's own `/dev/null`: files of the host would tie the sandbox to it.
pub(crate) fn detach_stdio() -> io::Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    for fd in 0..3 {
        // SAFETY: both are plain descriptor numbers; 0 to 2 are not owned by anything in this program.
        check(unsafe { libc::dup2(null.as_raw_fd(), fd) })?;
    }
    Ok(())
}

extern "C" fn on_child(_: libc::c_int) {}

/// Makes this process unreadable to others, and child exits interrupt only [`wait_ready`].
pub(crate) fn prepare_process() {
    // SAFETY: plain calls without pointers, except for `sigaction` and `sigprocmask`, whose arguments live on this stack
    // and are initialised; the handler does nothing, so it is safe at any moment.
    unsafe {
        // Without this, a process of the same user could read the key out of this one's memory.
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        libc::umask(0o022);
        // Large buffers go back to the system when they are freed: all memory held here is part of every process image.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 * 1024);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_child as *const () as libc::sighandler_t;
        libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut());
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

/// Undoes what [`prepare_process`] did to signals; for a child before it becomes another program.
pub(crate) fn reset_signals() {
    // SAFETY: as above; signal numbers that do not exist are refused without effect.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Waits until a descriptor is ready, a child ended, or `timeout` passed. An interruption is not an error.
pub(crate) fn wait_ready(
    fds: &mut [libc::pollfd],
    timeout: Option<std::time::Duration>,
) -> io::Result<()> {
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` and `spec` outlive the call, the signal set is initialised by `sigemptyset`.
    let r = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, spec, &none)
    };
    match check(r) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => {
            fds.iter_mut().for_each(|f| f.revents = 0);
            Ok(())
        }
        other => other.map(|_| ()),
    }
}

/// The next child that ended, still to be reaped by [`reap`].
pub(crate) fn peek_exited() -> Option<libc::pid_t> {
    // SAFETY: `info` is a plain C structure for which zero is valid and which the call fills in.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        let r = libc::waitid(libc::P_ALL, 0, &mut info, flags);
        (r == 0 && info.si_pid() != 0).then(|| info.si_pid())
    }
}

/// Reaps one ended child.
pub(crate) fn reap(pid: libc::pid_t) -> ExitStatus {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
    if libc::WIFSIGNALED(status) {
        ExitStatus::Signal(libc::WTERMSIG(status))
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status))
    }
}

/// A pipe, both ends closed on exec: (read, write).
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two descriptors, which are owned from here on.
    unsafe {
        check(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain flag calls on an open descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(
            fd.as_raw_fd(),
            libc::F_SETFL,
            flags | libc::O_NONBLOCK,
        ))?;
    }
    Ok(())
}

/// A new pseudo-terminal: (our side, the job's side).
pub(crate) fn open_pty(cols: u16, rows: u16, owner: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let open = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: constant paths; descriptors are owned as soon as they exist; ioctl arguments live on this stack.
    unsafe {
        let ours = OwnedFd::from_raw_fd(check(libc::open(c"/dev/ptmx".as_ptr(), open))?);
        let unlock: libc::c_int = 0;
        check(libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &unlock))?;
        // Opened through our side, not by name: nothing in the file system can come between.
        let theirs = OwnedFd::from_raw_fd(check(libc::ioctl(
            ours.as_raw_fd(),
            libc::TIOCGPTPEER,
            open,
        ))?);
        check(libc::fchown(theirs.as_raw_fd(), owner, libc::gid_t::MAX))?;
        resize_pty(&ours, cols, rows)?;
        Ok((ours, theirs))
    }
}

pub(crate) fn resize_pty(fd: &OwnedFd, cols: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `size` outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(|_| ())
}

/// Bytes that wait in a pipe.
pub(crate) fn waiting(fd: &OwnedFd) -> u64 {
    let mut n: libc::c_int = 0;
    // SAFETY: `n` is a valid place for the result.
    match check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut n) }) {
        Ok(_) => u64::try_from(n).unwrap_or(0),
        Err(_) => 0,
    }
}

/// Reads once. An end that reports an error, like a terminal nobody holds any more, counts as the end: `Ok(0)`.
pub(crate) fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    if n >= 0 {
        return Ok(n.unsigned_abs());
    }
    let e = io::Error::last_os_error();
    if matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    ) {
        Err(e)
    } else {
        Ok(0)
    }
}

pub(crate) fn write(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the data is valid for its length.
    let n = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
    if n >= 0 {
        Ok(n.unsigned_abs())
    } else {
        Err(io::Error::last_os_error())
    }
}

pub(crate) fn kill(target: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers. Never called with 0, 1 or -1, which would mean this process or everything.
    check(unsafe { libc::kill(target, signal) }).map(|_| ())
}

/// Signals every process of a session, whatever its group.
pub(crate) fn kill_session(session: libc::pid_t, signal: libc::c_int) {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        let _ = kill(-session, signal);
        return;
    };
    let mut members = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<libc::pid_t>().ok())
        else {
            continue;
        };
        // SAFETY: no pointers.
        if pid > 1 && unsafe { libc::getsid(pid) } == session {
            members.push(pid);
        }
    }
    for pid in members {
        let _ = kill(pid, signal);
    }
    // Catches what was forked since the look; already gone groups are no error.
    let _ = kill(-session, signal);
}

pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut out = [0; N];
    // SAFETY: the buffer is valid for its length; 256 bytes or fewer are always filled at once.
    let n = unsafe { libc::getrandom(out.as_mut_ptr().cast(), N, 0) };
    if n == N as isize {
        Ok(out)
    } else {
        Err(io::Error::last_os_error())
    }
}
