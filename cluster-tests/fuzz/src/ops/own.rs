//! What a process changes of its own state in the kernel, besides files and memory.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};

use super::Held;
use super::files::noise;
use crate::child::last;

/// Kept until replaced.
#[derive(Default)]
pub(super) struct Own {
    pipe: Option<(PipeReader, PipeWriter)>,
    pair: Option<(UnixStream, UnixStream)>,
    memory: Option<File>,
    shared: Option<usize>,
    descriptor: Option<OwnedFd>,
    datagrams: Option<UnixDatagram>,
    listener: Option<TcpListener>,
    thread: Option<(PipeWriter, JoinHandle<()>)>,
}

/// Answers a call's result, or its error.
fn check(answer: i32) -> Result<i32> {
    ensure!(answer >= 0, "{}", last());
    Ok(answer)
}

impl Held {
    pub(super) fn own(&mut self, words: &[&str]) -> Result<()> {
        let word = |i: usize| words.get(i).copied().context("too few words");
        let number = |i: usize| -> Result<u64> { Ok(word(i)?.parse()?) };
        let own = &mut self.own;
        match word(0)? {
            "name" => {
                let name = std::ffi::CString::new(word(1)?)?;
                // SAFETY: a terminated string that outlives the call.
                check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) })?;
            }
            // SAFETY: no pointers.
            "mask" => drop(unsafe { libc::umask(number(1)? as u32 & 0o77) }),
            // SAFETY: no pointers.
            "group" => drop(check(unsafe { libc::setpgid(0, 0) })?),
            // SAFETY: no pointers.
            "session" => drop(check(unsafe { libc::setsid() })?),
            "nice" => {
                let (which, nice) = (libc::PRIO_PROCESS, number(1)? as i32 % 19);
                // SAFETY: no pointers.
                check(unsafe { libc::setpriority(which, 0, nice) })?;
            }
            "limit" => limit(0, number(1)?)?,
            "timer" => {
                let far = libc::timeval {
                    tv_sec: 100_000 + number(1)? as i64,
                    tv_usec: 0,
                };
                let none = libc::timeval {
                    tv_sec: 0,
                    tv_usec: 0,
                };
                let timer = libc::itimerval {
                    it_interval: none,
                    it_value: far,
                };
                let old = std::ptr::null_mut();
                // SAFETY: the structure outlives the call; the old one is not asked for.
                check(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, old) })?;
            }
            "pipe" => {
                let mut pipe = std::io::pipe()?;
                pipe.1.write_all(&noise(number(1)? % 60_000, 1))?;
                own.pipe = Some(pipe);
            }
            "pair" => {
                let mut pair = UnixStream::pair()?;
                pair.0.write_all(&noise(number(1)? % 20_000, 2))?;
                own.pair = Some(pair);
            }
            "memfd" => {
                let flags = rustix::fs::MemfdFlags::CLOEXEC;
                let mut file = File::from(rustix::fs::memfd_create("tp", flags)?);
                file.write_all(&noise(number(1)?, 3))?;
                own.memory = Some(file);
            }
            "shared" => own.share(number(1)? as u8)?,
            "event" => {
                // SAFETY: no pointers; what is answered is this process's own.
                let fd = unsafe { OwnedFd::from_raw_fd(check(libc::eventfd(0, 0))?) };
                let mut file = File::from(fd.try_clone()?);
                file.write_all(&number(1)?.to_ne_bytes())?;
                own.descriptor = Some(fd);
            }
            "lock" => {
                let file = self.files[number(1)? as usize % self.files.len()].as_ref();
                let file = file.context("nothing held")?;
                // SAFETY: no pointers; the descriptor is open.
                check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })?;
            }
            "seek" => {
                let file = self.files[number(1)? as usize % self.files.len()].as_ref();
                let mut file = file.context("nothing held")?;
                file.seek(SeekFrom::Start(number(2)?))?;
            }
            "datagrams" => own.datagrams = Some(UnixDatagram::bind(word(1)?)?),
            "listen" => {
                let port = 20_000 + number(1)? as u16;
                own.listener = Some(TcpListener::bind(("127.0.0.1", port))?);
            }
            "thread" => own.start_thread()?,
            "unthread" => {
                let (end, thread) = own.thread.take().context("no thread")?;
                drop(end);
                thread.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
            }
            other => bail!("no such operation on itself: {other}"),
        }
        Ok(())
    }

    /// After a fork: the threads of the parent are not here.
    pub(crate) fn without_threads(&mut self) {
        if let Some((end, thread)) = self.own.thread.take() {
            // Waiting for one would wait for ever.
            std::mem::forget(thread);
            drop(end);
        }
    }
}

impl Own {
    /// Memory without a name that a process shares with those it makes.
    fn share(&mut self, byte: u8) -> Result<()> {
        let at = match self.shared {
            Some(at) => at,
            None => {
                let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let none = std::ptr::null_mut();
                // SAFETY: a new mapping at an address of the kernel's choice, kept for the process's whole life.
                let at = unsafe { libc::mmap(none, 4096, protection, flags, -1, 0) };
                ensure!(at != libc::MAP_FAILED, "{}", last());
                at as usize
            }
        };
        self.shared = Some(at);
        // SAFETY: within the mapping; operations run one at a time.
        unsafe { (at as *mut u8).add(usize::from(byte)).write_volatile(byte) };
        Ok(())
    }

    fn start_thread(&mut self) -> Result<()> {
        ensure!(self.thread.is_none(), "one is enough");
        let (mut until, end) = std::io::pipe()?;
        let builder = std::thread::Builder::new().stack_size(64 * 1024);
        let thread = builder.spawn(move || drop(until.read(&mut [0])))?;
        self.thread = Some((end, thread));
        Ok(())
    }
}

/// Sets how much of a process may be dumped; 0 is the process itself.
pub(super) fn limit(pid: i32, bytes: u64) -> Result<()> {
    let new = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: 1 << 40,
    };
    let old = std::ptr::null_mut();
    // SAFETY: the structure outlives the call; the old one is not asked for.
    check(unsafe { libc::prlimit(pid, libc::RLIMIT_CORE, &raw const new, old) })?;
    Ok(())
}
