//! The order in which CRIU takes hold of threads, where some of them are stopped by a signal (`SIGSTOP`, ctrl-Z).
//!
//! CRIU seizes all threads by ptrace while the version 1 freezer holds them, then thaws them into their trap. Seizing a thread in a signal stop waits, in the kernel and for as
//! long as it takes, until the thread has moved from that stop into ptrace's own, which a frozen thread cannot do: CRIU never ends. Seized *after* the thaw it does at once; and a
//! stopped thread does not need to be frozen, since it executes nothing and those that could continue it are held.
//!
//! So CRIU is shown, by its option `freeze-cgroup`, a directory of our own in place of the cgroup: the state file is a link to the real one, and the list of threads is a fifo into
//! which this module writes first all that are not stopped, waits until CRIU has seized them, thaws the cgroup (they go into their traps, as they would later) and writes the others.
//! That a chunk of a fifo was worked off is known by CRIU reading the next one.
//!
//! Version 2 has no such trouble: its frozen threads can be seized.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};

use crate::error::{Context, Result};

/// Between two looks at what CRIU does.
const STEP: Duration = Duration::from_micros(500);
/// After a list was given; CRIU waits longer before it asks again.
const AGAIN: Duration = Duration::from_millis(50);

/// The directory shown to CRIU, and who serves it. Dropping ends both.
pub(crate) struct Seizing {
    dir: PathBuf,
    over: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Seizing {
    /// Makes the directory `dir` for the frozen version 1 cgroup at `freezer`. None where none of its threads is stopped, so that CRIU needs no help.
    pub(crate) fn prepare(freezer: &Path, dir: PathBuf) -> Result<Option<Self>> {
        let mut threads = Vec::new();
        list(freezer, &mut threads)
            .context(|| format!("cannot list the threads of {}", freezer.display()))?;
        let (stopped, held): (Vec<i32>, Vec<i32>) =
            threads.into_iter().partition(|t| is_stopped(*t));
        if stopped.is_empty() {
            return Ok(None);
        }
        let what = || format!("cannot make {}", dir.display());
        crate::mounts::remove_tree(&dir)?;
        fs::create_dir(&dir).context(what)?;
        let state = freezer.join("freezer.state");
        std::os::unix::fs::symlink(&state, dir.join("freezer.state")).context(what)?;
        let fifo = dir.join("tasks");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .map_err(io::Error::from)
        .context(what)?;
        let over = Arc::new(AtomicBool::new(false));
        let list = List {
            fifo,
            state,
            held,
            stopped,
            over: over.clone(),
        };
        let server = std::thread::Builder::new()
            .name("seizing".into())
            .spawn(move || list.serve())
            .context(what)?;
        Ok(Some(Self {
            dir,
            over,
            server: Some(server),
        }))
    }

    /// The line of CRIU's configuration.
    pub(crate) fn config(&self) -> String {
        format!("freeze-cgroup {}\n", self.dir.display())
    }
}

impl Drop for Seizing {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

struct List {
    fifo: PathBuf,
    state: PathBuf,
    held: Vec<i32>,
    stopped: Vec<i32>,
    over: Arc<AtomicBool>,
}

impl List {
    fn serve(&self) {
        while !self.over.load(Ordering::Relaxed) {
            match self.once() {
                Ok(()) => std::thread::sleep(AGAIN),
                // Nobody reads yet.
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => std::thread::sleep(STEP),
                // CRIU has turned away; it may come again.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
                Err(e) => {
                    tracing::warn!(error = %e, "CRIU cannot be told of stopped threads");
                    return;
                }
            }
        }
    }

    /// Gives the list once.
    fn once(&self) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&self.fifo, flags, Mode::empty())?;
        if let Some(first) = self.held.first() {
            self.write(&fd, &self.held)?;
            self.taken(&fd)?;
            // It asks for more only when it is through with what it has; one it has already is passed over.
            self.write(&fd, &[*first])?;
            self.taken(&fd)?;
        }
        fs::write(&self.state, "THAWED")?;
        self.write(&fd, &self.stopped)
    }

    fn write(&self, fd: &OwnedFd, threads: &[i32]) -> io::Result<()> {
        let text: String = threads.iter().map(|t| format!("{t}\n")).collect();
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match rustix::io::write(fd, rest) {
                Ok(n) => rest = &rest[n..],
                Err(rustix::io::Errno::AGAIN) => self.pause()?,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Waits until the fifo is empty.
    fn taken(&self, fd: &OwnedFd) -> io::Result<()> {
        loop {
            let mut waiting = 0i32;
            // SAFETY: FIONREAD writes one int.
            if unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut waiting) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if waiting == 0 {
                return Ok(());
            }
            self.pause()?;
        }
    }

    fn pause(&self) -> io::Result<()> {
        if self.over.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        std::thread::sleep(STEP);
        Ok(())
    }
}

/// The threads of a cgroup and of those below it.
fn list(dir: &Path, threads: &mut Vec<i32>) -> io::Result<()> {
    let text = fs::read_to_string(dir.join("tasks"))?;
    threads.extend(text.lines().filter_map(|l| l.trim().parse::<i32>().ok()));
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list(&entry.path(), threads)?;
        }
    }
    Ok(())
}

/// Whether a frozen thread is in a signal stop. Newer kernels (6.1) show frozen threads as in an uninterruptible sleep, so it is asked where it waits.
fn is_stopped(tid: i32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{tid}/{name}")).unwrap_or_default();
    let stat = read("stat");
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state == Some('T') || read("wchan").trim() == "do_signal_stop"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn stopped_threads_come_after_the_thaw() {
        let dir = tempfile::tempdir().expect("a directory");
        let (cgroup, shown) = (dir.path().join("cgroup"), dir.path().join("shown"));
        fs::create_dir(&cgroup).expect("made");
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .expect("started");
        let pid = i32::try_from(child.id()).expect("a number");
        // SAFETY: no pointers; a child of this test.
        unsafe { libc::kill(pid, libc::SIGSTOP) };
        while !is_stopped(pid) {
            std::thread::sleep(STEP);
        }
        let own = std::process::id();
        fs::write(cgroup.join("tasks"), format!("{pid}\n{own}\n")).expect("written");
        fs::write(cgroup.join("freezer.state"), "FROZEN").expect("written");
        let seizing = Seizing::prepare(&cgroup, shown.clone())
            .expect("prepared")
            .expect("one is stopped");
        assert_eq!(
            seizing.config(),
            format!("freeze-cgroup {}\n", shown.display())
        );
        let mut tasks = fs::File::open(shown.join("tasks")).expect("opened");
        let mut buffer = [0; 4096];
        let mut chunk = |tasks: &mut fs::File| {
            let n = tasks.read(&mut buffer).expect("read");
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        };
        assert_eq!(chunk(&mut tasks), format!("{own}\n"));
        let state = || fs::read_to_string(cgroup.join("freezer.state")).expect("read");
        assert_eq!(state(), "FROZEN");
        assert_eq!(chunk(&mut tasks), format!("{own}\n"));
        assert_eq!(chunk(&mut tasks), format!("{pid}\n"));
        assert_eq!(state(), "THAWED");
        assert_eq!(chunk(&mut tasks), "");
        drop(seizing);
        assert!(!shown.exists());
        child.kill().expect("killed");
        child.wait().expect("gone");
        fs::write(cgroup.join("tasks"), format!("{own}\n")).expect("written");
        assert!(
            Seizing::prepare(&cgroup, shown)
                .expect("prepared")
                .is_none()
        );
    }
}
