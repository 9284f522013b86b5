//! The sandbox that workloads run in: own pid, mount, network and IPC namespaces, an overlay on ext4 as working directory, another over `/usr`.
//!
//! Its first process obeys lines on its standard input, runs each in a child and answers with the processor time of that child and of all
//! that it waited for. Everything is removed with it.
//!
//! This is not a container: the inspector knows a sandbox by its pid namespace and its upper, and nothing more is needed to measure it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};
use tidepool_inspector::{Target, pid_ns_inode};

use crate::ground::Ground;
use crate::processors::keep_to;
use crate::workloads;

/// First argument of the binary when it is to be a sandbox.
pub(crate) const FLAG: &str = "--tp-stage";

/// What a workload cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// User and system time of all its processes, in microseconds.
    pub(crate) cpu_us: u64,
}

/// A sandbox, seen from outside.
#[derive(Debug)]
pub(crate) struct Stage {
    child: Child,
    commands: ChildStdin,
    replies: BufReader<ChildStdout>,
    init: u32,
    // Dropped last: the mounts in it go with the processes.
    ground: Ground,
}

impl Stage {
    /// Starts one on a ground that has a `lower`, with a processor of its own, where there is one for it.
    pub(crate) fn start(ground: Ground, processor: Option<usize>) -> Result<Self> {
        let dir = ground.path();
        for name in ["lower", "upper", "work", "merged", "usr-upper", "usr-work"] {
            fs::create_dir_all(dir.join(name))?;
        }
        let mut child = Command::new(std::env::current_exe()?)
            .arg(FLAG)
            .arg(dir)
            .args(processor.map(|cpu| cpu.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the sandbox")?;
        let commands = child.stdin.take().context("no stdin")?;
        let replies = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut stage = Self {
            child,
            commands,
            replies,
            init: 0,
            ground,
        };
        let first = stage.reply()?;
        let init = first.strip_prefix("init ").context("no first process")?;
        stage.init = init.parse()?;
        Ok(stage)
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.ground.path().join("upper")
    }

    /// Host process id of its first process.
    pub(crate) fn init(&self) -> u32 {
        self.init
    }

    pub(crate) fn target(&self) -> Result<Target> {
        Ok(Target {
            pid_ns_inode: pid_ns_inode(self.init)?,
            upper_dir: self.upper(),
        })
    }

    /// Writes out what was left to be written, so that the next line has nothing to do with that.
    pub(crate) fn settle(&self) -> Result<()> {
        self.ground.settle()
    }

    /// Runs a line to its end.
    pub(crate) fn run(&mut self, line: &str) -> Result<Usage> {
        self.commands.write_all(format!("{line}\n").as_bytes())?;
        let reply = self.reply()?;
        let words: Vec<&str> = reply.splitn(2, ' ').collect();
        match words[..] {
            ["ok", cpu] => Ok(Usage {
                cpu_us: cpu.parse()?,
            }),
            _ => bail!("{line}: {reply}"),
        }
    }

    fn reply(&mut self) -> Result<String> {
        let mut line = String::new();
        let got = self.replies.read_line(&mut line)?;
        ensure!(got > 0, "the sandbox ended (is this root?)");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let init = i32::try_from(self.init).ok().and_then(Pid::from_raw);
        let init = init.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(init) = init {
            let mut fds = [rustix::event::PollFd::new(
                &init,
                rustix::event::PollFlags::IN,
            )];
            // All others of the namespace die before it does.
            let _ = rustix::event::poll(&mut fds, None);
        }
    }
}

/// The sandbox's side.
pub(crate) fn inside(dir: &Path, processor: &str) -> ExitCode {
    match enter(dir, processor) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sandbox: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn enter(dir: &Path, processor: &str) -> Result<()> {
    if !processor.is_empty() {
        keep_to(&[processor.parse()?])?;
    }
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let own = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;
    // SAFETY: no pointers; this process has one thread.
    let unshared = unsafe { libc::unshare(own) };
    ensure!(
        unshared == 0,
        "unshare: {}",
        std::io::Error::last_os_error()
    );
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    overlay(dir, &dir.join("lower"), "", &dir.join("merged"))?;
    // Programs come from an image in a sandbox; where /usr cannot be one here, they come from the host.
    if let Err(e) = overlay(dir, Path::new("/usr"), "usr-", Path::new("/usr")) {
        eprintln!("programs are not on an overlay: {e:#}");
    }
    mount("tp-shm", "/dev/shm", "tmpfs", MountFlags::NOATIME, None).context("mounting tmpfs")?;
    std::env::set_current_dir(dir.join("merged"))?;
    fs::create_dir_all("tmp")?;
    fs::create_dir_all("run")?;

    // SAFETY: this process has one thread, so the child is a whole one.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            mount("tp-proc", "/proc", "proc", MountFlags::empty(), None).context("proc")?;
            obey()
        }
        init => {
            say(&format!("init {init}"))?;
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            unsafe { libc::waitpid(init, &raw mut status, 0) };
            Ok(())
        }
    }
}

fn overlay(dir: &Path, lower: &Path, prefix: &str, at: &Path) -> Result<()> {
    let own = |name: &str| dir.join(format!("{prefix}{name}")).display().to_string();
    let data = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        own("upper"),
        own("work")
    );
    let data = std::ffi::CString::new(data)?;
    mount(
        "tp-overlay",
        at,
        "overlay",
        MountFlags::NOATIME,
        data.as_c_str(),
    )
    .with_context(|| format!("mounting an overlay on {}", at.display()))
}

fn obey() -> Result<()> {
    let stdin = std::io::stdin();
    for line in stdin.lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let before = children_us()?;
        let began = Instant::now();
        let outcome = in_a_child(&words);
        let cpu = children_us()? - before;
        match outcome {
            Ok(()) => say(&format!("ok {cpu}"))?,
            Err(e) => say(&format!("failed after {:?}: {e:#}", began.elapsed()))?,
        }
    }
    Ok(())
}

/// Runs one line. `idle N` leaves N processes behind that wait for ever.
fn in_a_child(words: &[&str]) -> Result<()> {
    let resting = match words {
        ["idle", n] => n.parse()?,
        _ => 0u32,
    };
    for _ in 0..resting {
        // SAFETY: this process has one thread, so the child is a whole one, which does nothing but wait.
        match unsafe { libc::fork() } {
            -1 => bail!("fork: {}", std::io::Error::last_os_error()),
            0 => loop {
                // SAFETY: no pointers.
                unsafe { libc::pause() };
            },
            _ => {}
        }
    }
    if resting > 0 {
        return Ok(());
    }
    // SAFETY: this process has one thread, so the child is a whole one.
    let pid = match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let outcome = workloads::run(words);
            if let Err(e) = &outcome {
                eprintln!("{words:?}: {e:?}");
            }
            // SAFETY: ends the child without running what its parent registered for its own end.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        pid => pid,
    };
    let mut status = 0;
    loop {
        // Also takes leave of what the workload left to its first process.
        // SAFETY: `status` outlives the call.
        let gone = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if gone == pid {
            ensure!(status == 0, "status {status:#x}");
            return Ok(());
        }
        ensure!(gone > 0, "wait: {}", std::io::Error::last_os_error());
    }
}

/// Processor time of all children waited for so far, and of theirs.
fn children_us() -> Result<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure, which outlives the call.
    let answer = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    ensure!(
        answer == 0,
        "getrusage: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: all zeroes are a valid value already.
    let usage = unsafe { usage.assume_init() };
    let us = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
    Ok(us(usage.ru_utime) + us(usage.ru_stime))
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
