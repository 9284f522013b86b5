//! Stopping the threads of frozen processes by tracing, and making one of them do a system call.
//!
//! A frozen thread cannot do anything, and a thawed one does what it likes. Traced and interrupted while frozen, it stops
//! on the way out of the freezer, before its next own instruction. This is how CRIU itself works.
//!
//! All calls for one thread must come from the same thread of this program; [`Stopped`] is therefore not `Send`.

use crate::error::{Context, Result};
use std::fs;
use std::io;
use std::marker::PhantomData;

/// Threads that stand still because they are traced; dropping this lets them go on.
pub(crate) struct Stopped {
    threads: Vec<i32>,
    not_send: PhantomData<*const ()>,
}

/// What a thread was doing, to be put back.
#[cfg(target_arch = "x86_64")]
struct Saved {
    registers: libc::user_regs_struct,
    text: (u64, i64),
    data: (u64, [i64; 4]),
}

fn check(r: libc::c_long) -> io::Result<libc::c_long> {
    if r == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// The threads of processes, less those that have ended.
fn threads(pids: &[i32]) -> Vec<i32> {
    let mut all = Vec::new();
    for pid in pids {
        for entry in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let state = stat
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            let tid = entry.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(tid), Some(state)) = (tid, state)
                && !matches!(state, 'Z' | 'X')
            {
                all.push(tid);
            }
        }
    }
    all
}

impl Stopped {
    /// Takes hold of all threads of these frozen processes, calls `thaw`, and waits until all have stopped again.
    pub(crate) fn take(pids: &[i32], thaw: impl FnOnce() -> Result<()>) -> Result<Self> {
        let mut this = Self {
            threads: Vec::new(),
            not_send: PhantomData,
        };
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP;
        for tid in threads(pids) {
            let what = || format!("cannot trace thread {tid} of the sandbox");
            // SAFETY: no pointers into this program's memory; the thread belongs to the sandbox being restored.
            unsafe {
                check(libc::ptrace(
                    libc::PTRACE_SEIZE,
                    tid,
                    0usize,
                    options as usize,
                ))
                .context(what)?;
                this.threads.push(tid);
                check(libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0usize, 0usize)).context(what)?;
            }
        }
        thaw()?;
        for tid in &this.threads {
            wait_stop(*tid).context(|| format!("thread {tid} of the sandbox did not stop"))?;
        }
        Ok(this)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for tid in &self.threads {
            // SAFETY: no pointers into this program's memory. A thread that is gone is no matter.
            unsafe { libc::ptrace(libc::PTRACE_DETACH, *tid, 0usize, 0usize) };
        }
    }
}

/// Waits until a traced thread stands still and gives the status it stopped with.
fn wait_stop(tid: i32) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the result.
        let r = unsafe { libc::waitpid(tid, &mut status, libc::__WALL) };
        if r == tid && libc::WIFSTOPPED(status) {
            return Ok(status);
        }
        if r < 0 {
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        } else {
            return Err(io::Error::other("it ended"));
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Stopped {
    /// Makes a stopped process take a record lock.
    pub(crate) fn take_lock(&self, pid: i32, lock: &crate::locks::Lock) -> Result<()> {
        let what = || format!("process {pid} of the sandbox cannot take its file lock again");
        if !self.threads.contains(&pid) {
            return Err(io::Error::other("it has no main thread")).context(what);
        }
        let kind = if lock.write {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        };
        // `struct flock`: type and origin (from the start), start, length, and a process number that is not used.
        let flock = [i64::from(kind), lock.start, lock.len, 0];
        let saved = Saved::of(pid).context(what)?;
        let result = saved.call(pid, libc::SYS_fcntl, lock.fd, libc::F_SETLK, &flock);
        saved.put_back(pid).context(what)?;
        result.context(what)
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Stopped {
    /// Making a process do a system call is not written for this processor.
    pub(crate) fn take_lock(&self, pid: i32, _: &crate::locks::Lock) -> Result<()> {
        Err(io::Error::from(io::ErrorKind::Unsupported)).context(|| {
            format!(
                "process {pid} of the sandbox cannot take its file lock again on this processor"
            )
        })
    }
}

#[cfg(target_arch = "x86_64")]
impl Saved {
    const SYSCALL: i64 = 0x050f;
    /// The code segment of 64-bit programs.
    const CODE_64: u64 = 0x33;

    fn peek(pid: i32, at: u64) -> io::Result<i64> {
        // SAFETY: reads a word of the stopped process. -1 may be a value or an error, which errno tells apart.
        unsafe {
            *libc::__errno_location() = 0;
            let word = libc::ptrace(libc::PTRACE_PEEKDATA, pid, at as usize, 0usize);
            if word == -1 && *libc::__errno_location() != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(word)
        }
    }

    fn poke(pid: i32, at: u64, word: i64) -> io::Result<()> {
        // SAFETY: writes a word of the stopped process, which is put back before it goes on.
        check(unsafe { libc::ptrace(libc::PTRACE_POKEDATA, pid, at as usize, word as usize) })
            .map(drop)
    }

    fn registers(pid: i32) -> io::Result<libc::user_regs_struct> {
        // SAFETY: zero is valid for this plain structure, which the call fills in.
        unsafe {
            let mut registers: libc::user_regs_struct = std::mem::zeroed();
            check(libc::ptrace(
                libc::PTRACE_GETREGS,
                pid,
                0usize,
                &mut registers,
            ))?;
            Ok(registers)
        }
    }

    fn set_registers(pid: i32, registers: &libc::user_regs_struct) -> io::Result<()> {
        // SAFETY: the structure outlives the call.
        check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, pid, 0usize, registers) }).map(drop)
    }

    /// What will be overwritten: registers, a word of code, and four of the stack. All threads of the process stand still, so
    /// any place will do as long as it is put back.
    fn of(pid: i32) -> io::Result<Self> {
        let registers = Self::registers(pid)?;
        if registers.cs != Self::CODE_64 {
            return Err(io::Error::other("it is not a 64-bit program"));
        }
        let (code, stack) = (registers.rip & !7, registers.rsp & !7);
        let mut data = [0; 4];
        for (n, word) in (0u64..).zip(&mut data) {
            *word = Self::peek(pid, stack + 8 * n)?;
        }
        Ok(Self {
            registers,
            text: (code, Self::peek(pid, code)?),
            data: (stack, data),
        })
    }

    fn call(&self, pid: i32, number: libc::c_long, a: i32, b: i32, c: &[i64; 4]) -> io::Result<()> {
        for (n, word) in (0u64..).zip(c) {
            Self::poke(pid, self.data.0 + 8 * n, *word)?;
        }
        Self::poke(pid, self.text.0, Self::SYSCALL)?;
        let mut registers = self.registers;
        registers.rip = self.text.0;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        registers.rdi = a as u64;
        registers.rsi = b as u64;
        registers.rdx = self.data.0;
        Self::set_registers(pid, &registers)?;
        // Once into the call and once out of it. Stops for other reasons in between would be signals; none is delivered to a
        // process that has not run since its restore, so one is a failure.
        for _ in 0..2 {
            // SAFETY: no pointers into this program's memory.
            check(unsafe { libc::ptrace(libc::PTRACE_SYSCALL, pid, 0usize, 0usize) })?;
            let status = wait_stop(pid)?;
            if libc::WSTOPSIG(status) != libc::SIGTRAP | 0x80 {
                return Err(io::Error::other(format!(
                    "it stopped for another reason: {status:#x}"
                )));
            }
        }
        let result = Self::registers(pid)?.rax as i64;
        if result < 0 {
            Err(io::Error::from_raw_os_error(
                i32::try_from(-result).unwrap_or(libc::EIO),
            ))
        } else {
            Ok(())
        }
    }

    fn put_back(&self, pid: i32) -> io::Result<()> {
        Self::poke(pid, self.text.0, self.text.1)?;
        for (n, word) in (0u64..).zip(&self.data.1) {
            Self::poke(pid, self.data.0 + 8 * n, *word)?;
        }
        let mut registers = self.registers;
        // An interrupted system call is restarted by the kernel on its way to deliver a signal, which this thread has left;
        // so what the kernel would do is done here.
        if registers.orig_rax as i64 >= 0 {
            match -(registers.rax as i64) {
                512..=514 => {
                    registers.rax = registers.orig_rax;
                    registers.rip -= 2;
                }
                516 => {
                    registers.rax = libc::SYS_restart_syscall as u64;
                    registers.rip -= 2;
                }
                _ => {}
            }
            registers.orig_rax = u64::MAX;
        }
        Self::set_registers(pid, &registers)
    }
}
