//! The sandbox's side: sets itself up from a fresh start of the test binary and obeys commands from stdin.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::cases::{CASES, Cx};

pub(crate) fn run(arguments: &[String]) -> ExitCode {
    match arguments
        .first()
        .context("no directory")
        .and_then(|dir| stage(Path::new(dir)))
    {
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
    let unshared =
        unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET) };
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
    // noatime, as sandboxes are mounted: reading must not look like a change.
    mount(
        "tp-overlay",
        dir.join("merged"),
        "overlay",
        MountFlags::NOATIME,
        data.as_c_str(),
    )
    .context("mounting the overlay")?;
    std::env::set_current_dir(dir.join("merged"))?;
    loopback_up()?;

    // SAFETY: this process has one thread, so the child is a whole one.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", last()),
        0 => {
            set_parent_process_death_signal(Some(Signal::KILL))?;
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

fn obey() -> Result<()> {
    let merged = std::env::current_dir()?;
    let mut cx = Cx::default();
    for line in std::io::stdin().lines() {
        let line = line?;
        let outcome = command(&mut cx, &line);
        std::env::set_current_dir(&merged)?;
        match outcome {
            Ok(()) => say("ok")?,
            Err(error) => say(&format!("{error:?}").replace('\n', "; "))?,
        }
    }
    Ok(())
}

fn command(cx: &mut Cx, line: &str) -> Result<()> {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    match verb {
        "prepare" | "act" => {
            let case = CASES
                .iter()
                .find(|c| c.name == rest)
                .context("no such case")?;
            std::env::set_current_dir(case.name)?;
            if verb == "act" {
                return (case.act)(cx);
            }
            std::fs::write("still", b"must not be dirty")?;
            (case.prepare)(cx)
        }
        "write" => Ok(std::fs::write(rest, rest)?),
        "again" => {
            use std::os::unix::fs::FileExt;
            std::fs::OpenOptions::new()
                .write(true)
                .open(rest)?
                .write_all_at(b"again", 0)?;
            Ok(())
        }
        "map" => cx.map_new(rest),
        "store" => cx.store(),
        "protect" => cx.protect(libc::PROT_READ),
        "unprotect" => cx.protect(libc::PROT_READ | libc::PROT_WRITE),
        "relink" => {
            let (from, to) = rest.split_once(' ').context("relink FROM TO")?;
            std::fs::hard_link(from, to)?;
            Ok(std::fs::remove_file(from)?)
        }
        "many" => {
            let (dir, count) = rest.split_once(' ').context("many DIR COUNT")?;
            std::fs::create_dir(dir)?;
            for i in 0..count.parse::<u32>()? {
                std::fs::write(format!("{dir}/{i}"), b"x")?;
            }
            Ok(())
        }
        "spawn" => {
            for _ in 0..rest.parse::<u32>()? {
                ensure!(
                    !Command::new("/bin/false").status()?.success(),
                    "false succeeded"
                );
            }
            Ok(())
        }
        "thread" => std::thread::spawn(|| ())
            .join()
            .map_err(|_| anyhow::anyhow!("thread panicked")),
        "spin" => {
            // Until the next command begins to arrive.
            let stdin = std::io::stdin();
            let mut fds = [rustix::event::PollFd::new(
                &stdin,
                rustix::event::PollFlags::IN,
            )];
            say("spinning")?;
            while rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default()))? == 0 {}
            Ok(())
        }
        "wait" => wait_in_every_way(),
        #[cfg(target_arch = "x86_64")]
        "old-pause" => {
            // SAFETY: the call of that number (pause) touches no memory.
            std::thread::spawn(|| unsafe {
                std::arch::asm!("int 0x80", inout("eax") 29 => _, options(nostack));
            });
            Ok(())
        }
        "read" => read_everything(Path::new(".")),
        // Opens what is asked for and does not run again: a process whose state others can change.
        "hold" => {
            let mut child = Command::new(std::env::current_exe()?);
            child.arg(crate::sandbox::HOLD).args(rest.split(' '));
            let mut child = child.stdout(std::process::Stdio::piped()).spawn()?;
            let mut ready = [0; 6];
            std::io::Read::read_exact(&mut child.stdout.take().context("no stdout")?, &mut ready)?;
            say(&format!("holding {}", child.id()))
        }
        "put" => {
            let (path, text) = rest.split_once(' ').context("put PATH TEXT")?;
            Ok(std::fs::OpenOptions::new()
                .write(true)
                .open(path)?
                .write_all(text.as_bytes())?)
        }
        "fifo" => crate::ops::mknod(rest, libc::S_IFIFO),
        "connect" => {
            std::mem::forget(std::net::TcpStream::connect(rest)?);
            Ok(())
        }
        "mount" => {
            std::fs::create_dir(rest)?;
            Ok(mount("tmpfs", rest, "tmpfs", MountFlags::empty(), None)?)
        }
        "umount" => Ok(rustix::mount::unmount(
            rest,
            rustix::mount::UnmountFlags::empty(),
        )?),
        "stop" | "signal" | "limit" => {
            // SAFETY: `limit` outlives the call.
            unsafe {
                let pid = rest.parse()?;
                let limit = libc::rlimit {
                    rlim_cur: 7,
                    rlim_max: 77,
                };
                let answer = match verb {
                    "stop" => libc::kill(pid, libc::SIGSTOP),
                    "signal" => libc::kill(pid, libc::SIGUSR1),
                    _ => libc::prlimit(
                        pid,
                        libc::RLIMIT_NOFILE,
                        &raw const limit,
                        std::ptr::null_mut(),
                    ),
                };
                ensure!(answer == 0, "{}", last());
            }
            Ok(())
        }
        "nothing" => Ok(()),
        other => bail!("no such command: {other}"),
    }
}

/// The other side of `hold`: opens, blocks a signal, unshares, says so, and sleeps for ever.
pub(crate) fn hold(words: &[String]) -> ExitCode {
    let done = || -> Result<()> {
        for word in words {
            match word.split_once('=').unwrap_or((word, "")) {
                ("fifo", path) => {
                    let both = std::fs::OpenOptions::new()
                        .read(true)
                        .write(true)
                        .open(path)?;
                    std::mem::forget(both);
                }
                ("listen", address) => std::mem::forget(std::net::TcpListener::bind(address)?),
                ("block", _) => {
                    // SAFETY: the set is initialised before it is used, and outlives the calls.
                    unsafe {
                        let mut set = std::mem::zeroed();
                        libc::sigemptyset(&raw mut set);
                        libc::sigaddset(&raw mut set, libc::SIGUSR1);
                        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
                    }
                }
                ("unshare", _) => {
                    // SAFETY: no pointers; one thread.
                    let result = unsafe { libc::unshare(libc::CLONE_NEWUTS) };
                    ensure!(result == 0, "{}", last());
                }
                _ => bail!("cannot hold {word}"),
            }
        }
        say("ready")
    };
    match done() {
        Ok(()) => loop {
            // SAFETY: no pointers.
            unsafe { libc::pause() };
        },
        Err(e) => {
            eprintln!("{e:?}");
            ExitCode::FAILURE
        }
    }
}

/// Brings the loopback device of the own network namespace up.
fn loopback_up() -> Result<()> {
    // SAFETY: `ifreq` is plain data; it outlives the calls.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        ensure!(socket >= 0, "{}", last());
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let answer = libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request);
        libc::close(socket);
        ensure!(answer == 0, "{}", last());
    }
    Ok(())
}

/// Threads that wait for ever, each in another call.
fn wait_in_every_way() -> Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
    use std::io::Read;
    const LONG: std::time::Duration = std::time::Duration::from_secs(1_000_000);

    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let (mut reader, writer) = std::io::pipe()?;
    let (quiet, other) = std::io::pipe()?;
    let events = epoll::create(epoll::CreateFlags::empty())?;
    let waits: Vec<Box<dyn FnOnce() + Send>> = vec![
        Box::new(move || drop(listener.accept())),
        Box::new(move || drop((reader.read(&mut [0]), writer))),
        Box::new(|| std::thread::sleep(LONG)),
        Box::new(std::thread::park),
        Box::new(|| std::thread::park_timeout(LONG)),
        Box::new(move || {
            let mut fds = [PollFd::new(&quiet, PollFlags::IN)];
            // SAFETY: one descriptor in an array of one, for as long as the call takes; it has no end.
            unsafe { libc::poll(fds.as_mut_ptr().cast(), 1, -1) };
            drop(other);
        }),
        Box::new(|| {
            // SAFETY: no descriptors, so no memory.
            unsafe { libc::poll(std::ptr::null_mut(), 0, 1_000_000_000) };
        }),
        Box::new(|| {
            let limit = Timespec {
                tv_sec: 1_000_000,
                tv_nsec: 0,
            };
            let _ = poll(&mut [], Some(&limit));
        }),
        Box::new(move || {
            let mut room = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }];
            while epoll::wait(&events, &mut room, None).is_err() {}
        }),
        Box::new(|| {
            // SAFETY: no pointers.
            unsafe { libc::pause() };
        }),
    ];
    for wait in waits {
        std::thread::spawn(wait);
    }
    Ok(())
}

/// Looks at everything in every way that changes nothing.
fn read_everything(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = std::fs::symlink_metadata(&path)?;
        let mut buffer = [0u8; 4096];
        let _ = rustix::fs::lgetxattr(&path, "user.nothing", &mut buffer[..]);
        let _ = rustix::fs::access(&path, rustix::fs::Access::READ_OK);
        if meta.is_dir() {
            read_everything(&path)?;
        } else if meta.is_symlink() {
            std::fs::read_link(&path)?;
        } else if meta.is_file() {
            std::fs::read(&path)?;
        }
    }
    Ok(())
}

/// One line to the other side, past all buffers.
fn say(line: &str) -> Result<()> {
    // SAFETY: descriptor 1 is open for this process's whole life; ManuallyDrop keeps it so.
    let mut out = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
    Ok(out.write_all(format!("{line}\n").as_bytes())?)
}

fn last() -> std::io::Error {
    std::io::Error::last_os_error()
}
