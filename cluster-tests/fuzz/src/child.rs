//! The sandbox's side: namespaces and mounts from a fresh start of this program, then a first process that obeys, and processes it has made.
//!
//! The first process reads a turn (a count, then so many lines) and hands each line to the process in its slot, one at a time; every other process
//! waits for its next line in a read of its own pipe. So between two turns all are at rest, and nothing depends on how they are scheduled.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::ops::{ELSEWHERE, Held};
use crate::script::SLOTS;

/// How long one operation may take; only to end a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the sandbox's side.
#[must_use]
pub fn run(dir: &Path) -> ExitCode {
    match stage(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sandbox: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn stage(dir: &Path) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // SAFETY: no pointers; this process has one thread.
    let unshared = unsafe {
        libc::unshare(
            libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWNET,
        )
    };
    ensure!(unshared == 0, "unshare: {}", last());
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let at = |name: &str| dir.join(name).display().to_string();
    let data = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower"),
        at("upper"),
        at("work")
    );
    let data = std::ffi::CString::new(data)?;
    // noatime, as sandboxes are mounted: reading must not look like a change. nodev: a name that is a device now may be written to next.
    mount(
        "tp-overlay",
        dir.join("merged"),
        "overlay",
        MountFlags::NOATIME | MountFlags::NODEV,
        data.as_c_str(),
    )
    .context("mounting the overlay")?;
    rustix::mount::mount_bind(dir.join("merged"), ELSEWHERE).context("mounting it elsewhere")?;
    mount("tp-shm", "/dev/shm", "tmpfs", MountFlags::NOATIME, None).context("mounting tmpfs")?;
    fs::create_dir_all("/dev/mqueue")?;
    mount(
        "tp-queues",
        "/dev/mqueue",
        "mqueue",
        MountFlags::empty(),
        None,
    )
    .context("queues")?;
    loopback_up()?;
    // Signals that wait for ever, so that they can be sent to a process that does not run.
    hold_back(libc::SIGUSR1)?;
    std::env::set_current_dir(dir.join("merged"))?;

    // SAFETY: this process has one thread, so the child is a whole one.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", last()),
        0 => {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            mount("tp-proc", "/proc", "proc", MountFlags::empty(), None).context("proc")?;
            obey()
        }
        init => {
            say(1, &format!("init {init}"))?;
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            unsafe { libc::waitpid(init, &raw mut status, 0) };
            Ok(())
        }
    }
}

/// The pipes of a slot: lines to its process, its answers. Made before any process, so that each inherits all.
struct Slot {
    pid: i32,
    lines: (PipeReader, PipeWriter),
    answers: (PipeReader, PipeWriter),
}

fn obey() -> Result<()> {
    let mut slots = Vec::new();
    for _ in 0..SLOTS {
        slots.push(Slot {
            pid: 0,
            lines: std::io::pipe()?,
            answers: std::io::pipe()?,
        });
    }
    let mut held = Held::default();
    say(1, "ready")?;
    loop {
        let count: usize = read_line(0, None)?.parse()?;
        let mut lines = Vec::new();
        for _ in 0..count {
            lines.push(read_line(0, None)?);
        }
        for line in lines {
            let outcome = dispatch(&mut slots, &mut held, &line);
            reap();
            say(1, &outcome)?;
        }
        say(1, "end")?;
    }
}

fn dispatch(slots: &mut [Slot], held: &mut Held, line: &str) -> String {
    match try_dispatch(slots, held, line) {
        Ok(answer) => answer,
        Err(e) => format!("{e:#}").replace('\n', "; "),
    }
}

fn try_dispatch(slots: &mut [Slot], held: &mut Held, line: &str) -> Result<String> {
    let (slot, operation) = line.split_once(' ').context("SLOT OPERATION")?;
    let slot: usize = slot.parse()?;
    let words: Vec<&str> = operation.split(' ').collect();
    let number = |at: usize| -> Result<usize> { Ok(words.get(at).context("number")?.parse()?) };
    if slot == 0 && matches!(words[0], "stop" | "continue" | "kill") {
        let slot = slots.get_mut(number(1)?).context("slot")?;
        let outcome = signal(slot, words[0]);
        held.pids[number(1)?] = slot.pid;
        return outcome;
    }
    let answer = if slot == 0 {
        execute(slots, held, &words)
    } else {
        let it = slots.get(slot).context("slot")?;
        say(it.lines.1.as_raw_fd(), operation)?;
        read_line(it.answers.0.as_raw_fd(), Some(PATIENCE)).context("HANG")?
    };
    if matches!(words[0], "fork" | "orphan")
        && let Some(pid) = answer.strip_prefix("pid ")
    {
        slots[number(1)?].pid = pid.parse()?;
        held.pids[number(1)?] = slots[number(1)?].pid;
        return Ok("ok".into());
    }
    Ok(answer)
}

/// The loopback interface of a new network namespace.
fn loopback_up() -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeroes are a valid value; the name is short and terminated.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as _;
    request.ifr_name[1] = b'o' as _;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: the structure outlives the call.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    ensure!(answer == 0, "loopback: {}", last());
    Ok(())
}

fn hold_back(signal: i32) -> Result<()> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    let old = std::ptr::null_mut();
    // SAFETY: the set is filled before it is used; the old one is not asked for.
    let answer = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), old)
    };
    ensure!(answer == 0, "{}", last());
    Ok(())
}

/// Runs an operation in the process it was meant for.
fn execute(slots: &[Slot], held: &mut Held, words: &[&str]) -> String {
    let outcome = match words {
        ["fork", k] => return fork(slots, held, k),
        ["orphan", k] => return orphan(slots, held, k),
        ["bear", rest @ ..] => bear(held, rest),
        words => held.operate(words),
    };
    match outcome {
        Ok(()) => "ok".into(),
        Err(e) => format!("{e:#}").replace('\n', "; "),
    }
}

/// A process in slot `k`, with everything this one holds.
fn fork(slots: &[Slot], held: &mut Held, k: &str) -> String {
    let Some(slot) = k.parse::<usize>().ok().and_then(|k| slots.get(k)) else {
        return "no such slot".into();
    };
    // SAFETY: this process's other threads only wait, so the child can go on as it is.
    match unsafe { libc::fork() } {
        -1 => format!("fork: {}", last()),
        0 => {
            held.without_threads();
            let _ = serve(slots, held, slot);
            // SAFETY: ends the child without running what its parent registered for its own end.
            unsafe { libc::_exit(1) }
        }
        pid => format!("pid {pid}"),
    }
}

/// A process in slot `k` whose parent ends at once, so that it has another one.
fn orphan(slots: &[Slot], held: &mut Held, k: &str) -> String {
    let Ok((mut answer, mut teller)) = std::io::pipe() else {
        return "no pipe".into();
    };
    // SAFETY: this process's other threads only wait, so the child can go on as it is.
    match unsafe { libc::fork() } {
        -1 => format!("fork: {}", last()),
        0 => {
            let said = fork(slots, held, k);
            let _ = teller.write_all(said.as_bytes());
            // SAFETY: ends the child without running what its parent registered for its own end.
            unsafe { libc::_exit(0) }
        }
        between => {
            drop(teller);
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            unsafe { libc::waitpid(between, &raw mut status, 0) };
            // The new process has the other end too: one read is all there is.
            let mut said = [0; 64];
            let got = answer.read(&mut said).unwrap_or(0);
            String::from_utf8_lossy(&said[..got]).into_owned()
        }
    }
}

fn serve(slots: &[Slot], held: &mut Held, slot: &Slot) -> Result<()> {
    loop {
        let line = read_line(slot.lines.0.as_raw_fd(), None)?;
        reap();
        let words: Vec<&str> = line.split(' ').collect();
        let answer = execute(slots, held, &words);
        say(slot.answers.1.as_raw_fd(), &answer)?;
        if let ["loop", name] = words[..] {
            let mut round = 0;
            while !readable(slot.lines.0.as_raw_fd()) {
                round += 1;
                // Its directory may be gone, for example.
                let _ = held.work_on(name, round);
            }
        }
    }
}

/// Runs an operation in a process that is born for it and gone after it.
fn bear(held: &mut Held, words: &[&str]) -> Result<()> {
    // SAFETY: this process has one thread, so the child is a whole one.
    match unsafe { libc::fork() } {
        -1 => Err(last().into()),
        0 => {
            let outcome = held.operate(words);
            // SAFETY: ends the child without running what its parent registered for its own end.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
            ensure!(waited == pid && status == 0, "the child failed: {status}");
            Ok(())
        }
    }
}

/// Sends a signal and waits for what it does.
fn signal(slot: &mut Slot, what: &str) -> Result<String> {
    ensure!(slot.pid > 0, "nobody there");
    let number = match what {
        "stop" => libc::SIGSTOP,
        "continue" => libc::SIGCONT,
        _ => libc::SIGKILL,
    };
    // SAFETY: no pointers.
    ensure!(unsafe { libc::kill(slot.pid, number) } == 0, "{}", last());
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let stat = fs::read_to_string(format!("/proc/{}/stat", slot.pid)).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|s| s.chars().next());
        let state = if stat.is_empty() { None } else { state };
        let there = match what {
            "stop" => state == Some('T'),
            "continue" => state.is_some_and(|s| s != 'T'),
            _ => matches!(state, None | Some('Z')),
        };
        if there {
            if what == "kill" {
                slot.pid = 0;
            }
            return Ok("ok".into());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    bail!("HANG: {what} has no effect")
}

/// Takes leave of children that have ended.
fn reap() {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    while unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } > 0 {}
}

fn readable(fd: i32) -> bool {
    let mut one = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one descriptor in an array of one.
    unsafe { libc::poll(&raw mut one, 1, 0) == 1 }
}

fn read_line(fd: i32, limit: Option<Duration>) -> Result<String> {
    let mut line = Vec::new();
    loop {
        if let Some(limit) = limit {
            let mut one = libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one descriptor in an array of one.
            let ready = unsafe { libc::poll(&raw mut one, 1, limit.as_millis() as i32) };
            ensure!(ready == 1, "no answer");
        }
        let mut byte = 0u8;
        // SAFETY: one byte into a byte.
        match unsafe { libc::read(fd, (&raw mut byte).cast(), 1) } {
            1 if byte == b'\n' => return Ok(String::from_utf8(line)?),
            1 => line.push(byte),
            _ => bail!("the pipe has ended"),
        }
    }
}

/// One line, past all buffers.
fn say(fd: i32, line: &str) -> Result<()> {
    // SAFETY: the descriptors given are open for this process's whole life; ManuallyDrop keeps them so.
    let mut out = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
    Ok(out.write_all(format!("{line}\n").as_bytes())?)
}

pub(crate) fn last() -> std::io::Error {
    std::io::Error::last_os_error()
}
