//! Memory of processes that was written through its file in `/proc`, by a process that did not stop them.
//!
//! A process that is written to in that way does not run for it, so no counter of the scheduler moves. But it is a write to a file, of the one
//! instance of procfs that a pid namespace has, and fanotify tells of it. Each look marks that instance, which does nothing where it is marked already; from the first on every write is
//! seen. Writes are counted, as the hooks' counters are, so that a reader compares and nothing is lost where a boundary fails after its look.
//!
//! Bounds: the kernel keeps 16,384 events for all sandboxes, then says that it lost some, and every process may have been written.
//!
//! Elsewhere: `process_vm_writev` goes by no file; sandboxes are refused it (`scheduler/sandbox/src/seccomp.rs`).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC};

use crate::surroundings::process_key;

/// Processes of one sandbox of which writes are counted one by one.
const MAX_PROCESSES: usize = 4096;
/// Room for one event: where several are read at a time, an error of a later one is kept back, and the event with it.
const EVENT: usize = size_of::<libc::fanotify_event_metadata>();

/// What was seen of one sandbox. Numbers only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Writes {
    /// Writes by process id, as the instance of procfs has it.
    of: BTreeMap<u32, u64>,
    /// How often any process may have been written.
    doubts: u64,
}

impl Writes {
    pub(crate) fn count(&mut self, pid: u32) {
        if self.of.len() >= MAX_PROCESSES && !self.of.contains_key(&pid) {
            self.doubts += 1;
        } else {
            *self.of.entry(pid).or_insert(0) += 1;
        }
    }

    pub(crate) fn doubt(&mut self) {
        self.doubts += 1;
    }

    /// One entry for each of these processes that was ever written to (host process id, number inside): what it is of, and a state that differs from the one before
    /// if it was written since.
    pub(crate) fn entries(
        &self,
        processes: impl IntoIterator<Item = (u32, u32)>,
    ) -> impl Iterator<Item = (String, String)> {
        processes.into_iter().filter_map(|(pid, inside)| {
            let written = self.of.get(&inside).copied().unwrap_or(0);
            (written + self.doubts > 0).then(|| {
                let doubts = self.doubts;
                (
                    format!("memory of {}", process_key(pid)),
                    format!("written {written} times by another, unknown {doubts} times"),
                )
            })
        })
    }
}

/// An instance of procfs: its device, as in `stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instance(u64);

/// What the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// The memory of this process.
    Process(Instance, u32),
    /// Anything may have been written anywhere.
    Lost,
}

/// The kernel's notices, of all sandboxes.
pub(crate) struct Notices {
    group: OwnedFd,
}

impl Notices {
    /// # Errors
    /// Where the kernel has no fanotify, or does not permit it.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
        let of_events = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE;
        // SAFETY: no pointers.
        let group = unsafe { libc::fanotify_init(flags, of_events.cast_unsigned()) };
        if group < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nothing else.
        let group = unsafe { OwnedFd::from_raw_fd(group) };
        Ok(Self { group })
    }

    /// Sees to it that writes in the instance of procfs that this process has at `/proc` are told from now on. None where it has no procfs there, or is gone.
    ///
    /// # Errors
    /// What the kernel answers; then writes may not be told.
    pub(crate) fn mark(&self, pid: u32) -> io::Result<Option<Instance>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = match rustix::fs::open(format!("/proc/{pid}/root/proc"), flags, Mode::empty()) {
            Ok(place) => place,
            // It is gone, or there is no such directory: then nobody writes through it.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH | rustix::io::Errno::NOTDIR) => {
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        };
        if rustix::fs::fstatfs(&place)?.f_type != PROC_SUPER_MAGIC {
            return Ok(None);
        }
        let what = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: a null path stands for the open directory.
        let done = unsafe {
            libc::fanotify_mark(
                self.group.as_raw_fd(),
                what,
                libc::FAN_MODIFY,
                place.as_raw_fd(),
                std::ptr::null(),
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(Instance(rustix::fs::fstat(&place)?.st_dev)))
    }

    /// Takes all notices so far.
    pub(crate) fn drain(&self, mut each: impl FnMut(Written)) {
        use rustix::io::Errno;
        let mut event = [0u8; EVENT];
        loop {
            match rustix::io::read(&self.group, &mut event) {
                Ok(0) | Err(Errno::AGAIN) => return,
                Ok(EVENT) => {
                    if let Some(written) = told(&event) {
                        each(written);
                    }
                }
                Err(Errno::INTR) => {}
                // The event's file could not be opened, and is used up: the process whose it is is gone.
                Err(Errno::NOENT | Errno::SRCH) => {}
                // Another length is not what the kernel promises.
                Ok(_) | Err(_) => return each(Written::Lost),
            }
        }
    }
}

fn told(event: &[u8; EVENT]) -> Option<Written> {
    // SAFETY: so many bytes are there, and any are valid; they need not be aligned.
    let event: libc::fanotify_event_metadata =
        unsafe { std::ptr::read_unaligned(event.as_ptr().cast()) };
    if event.fd < 0 {
        return Some(Written::Lost); // there were too many
    }
    // SAFETY: the kernel opened it for this reader, who owns it.
    let file = unsafe { OwnedFd::from_raw_fd(event.fd) };
    written(&file).unwrap_or(Some(Written::Lost))
}

/// What a write to this file did.
fn written(file: &OwnedFd) -> io::Result<Option<Written>> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let Some(pid) = process_of(&path) else {
        return Ok(None);
    };
    let instance = Instance(rustix::fs::fstat(file)?.st_dev);
    Ok(Some(match pid {
        Some(pid) => Written::Process(instance, pid),
        None => Written::Lost,
    }))
}

/// Whose memory a file of procfs is: `.../PID/mem` or `.../PID/task/TID/mem`. None if it is no memory; `Some(None)` if it is, but whose cannot be told.
fn process_of(path: &Path) -> Option<Option<u32>> {
    let mut names = path.components().rev().map(|c| match c {
        Component::Normal(name) => name.to_str().unwrap_or_default(),
        _ => "",
    });
    let last = names.next()?;
    if last.strip_suffix(" (deleted)").unwrap_or(last) != "mem" {
        return None;
    }
    let of = names.next().unwrap_or_default();
    let of = match names.next() {
        Some("task") => names.next().unwrap_or_default(),
        _ => of,
    };
    Some(of.parse().ok())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_path_tells_whose_memory_it_is() {
        let whose = |path: &str| process_of(Path::new(path));
        assert_eq!(whose("/proc/12/mem"), Some(Some(12)));
        assert_eq!(whose("/12/mem"), Some(Some(12)));
        assert_eq!(whose("/proc/12/task/13/mem"), Some(Some(12)));
        assert_eq!(whose("/proc/12/mem (deleted)"), Some(Some(12)));
        assert_eq!(whose("/proc/12/comm"), None);
        assert_eq!(whose("/proc/sys/vm/overcommit_memory"), None);
        assert_eq!(whose("/proc/x/mem"), Some(None));
        assert_eq!(whose("/mem"), Some(None));
        assert_eq!(whose("/"), None);
    }

    #[test]
    fn counts_only_grow_and_doubt_is_everybodys() {
        let mut writes = Writes::default();
        let entries = |w: &Writes| w.entries([(100, 1), (200, 2)]).collect::<Vec<_>>();
        assert!(entries(&writes).is_empty());
        writes.count(2);
        let once = entries(&writes);
        assert_eq!(once.len(), 1);
        assert_eq!(once[0].0, "memory of process 200");
        writes.count(2);
        assert_ne!(entries(&writes), once);
        writes.doubt();
        assert_eq!(entries(&writes).len(), 2);
        for pid in 0..2 * MAX_PROCESSES as u32 {
            writes.count(pid);
        }
        assert_eq!(writes.of.len(), MAX_PROCESSES);
        assert!(writes.doubts > 1);
    }

    #[test]
    fn a_write_to_another_processes_memory_is_told() {
        let notices = Notices::new().expect("fanotify, as root");
        // A procfs of its own, in a mount namespace of its own: nothing that others do is told.
        let script = "mount -t proc proc /proc && exec cat";
        let mut child = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-ec",
                script,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        to.write_all(b"x").unwrap();
        from.read_exact(&mut [0]).unwrap();
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let inner: u32 = std::fs::read_to_string(children)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let instance = notices.mark(inner).unwrap().expect("a procfs");
        assert_eq!(notices.mark(inner).unwrap(), Some(instance), "marked again");
        let told = || {
            let mut told = Vec::new();
            notices.drain(|w| told.push(w));
            told
        };
        assert_eq!(told(), []);
        let inside = format!("/proc/{inner}/root/proc/1");
        // Nor anything of a process that is gone when the notice is read.
        let gone = Command::new("nsenter")
            .args([
                "--mount",
                "--pid",
                "--target",
                &inner.to_string(),
                "sh",
                "-ec",
            ])
            .arg("echo x >/proc/self/comm; (echo y >/proc/self/comm)")
            .status()
            .unwrap();
        assert!(gone.success());
        assert_eq!(told(), []);
        // What changes no memory is not told.
        std::fs::write(format!("{inside}/oom_score_adj"), "5").unwrap();
        let maps = std::fs::read_to_string(format!("{inside}/maps")).unwrap();
        let stack = maps.lines().find(|l| l.ends_with("[stack]")).unwrap();
        let at = u64::from_str_radix(stack.split('-').next().unwrap(), 16).unwrap();
        assert_eq!(told(), []);
        let mem = std::fs::File::options()
            .read(true)
            .write(true)
            .open(format!("{inside}/mem"))
            .unwrap();
        let mut byte = [0];
        mem.read_exact_at(&mut byte, at).unwrap();
        assert_eq!(told(), [], "reading");
        mem.write_all_at(&byte, at).unwrap();
        assert_eq!(told(), [Written::Process(instance, 1)]);
        assert_eq!(told(), [], "once");
        drop((mem, to));
        child.wait().unwrap();
        assert_eq!(notices.mark(u32::MAX >> 2).unwrap(), None, "nobody");
    }
}
