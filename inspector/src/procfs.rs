//! The tasks of a sandbox without eBPF: the same table, read from `/proc`.
//!
//! For hosts on which the programs cannot be loaded. It costs a look at every process of the host (some microseconds each), and is no single moment: a
//! caller that needs one freezes the sandbox, or reads twice. What was born and is gone between two readings leaves no trace here.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::tasks::{TaskInfo, TaskTable};

/// A sandbox in which something is born all the time is not at rest in any of its readings.
const MAX_LISTS: u32 = 8;
/// Pid namespaces may be nested this deep (the kernel's own limit).
const MAX_NESTED: usize = 32;
/// `NS_GET_PARENT`, the same on every architecture that Linux programs of today run on.
const NS_GET_PARENT: libc::c_ulong = 0xb702;

/// All tasks of the pid namespace with this inode, and of those nested in it, with their scheduler counters. Start times have the resolution of `/proc`, 10 ms.
///
/// To be compared with other readings of this function only.
///
/// # Errors
/// If `/proc` cannot be read, or does not say what it says on every supported kernel. Processes that end meanwhile are left out.
pub fn tasks_from_proc(pid_ns_inode: u64) -> io::Result<TaskTable> {
    let mut tasks = Vec::new();
    let mut known = HashSet::new();
    // Listed until there is nothing new: what was born during a list and lives on when the reading ends is in the table.
    for _ in 0..MAX_LISTS {
        let mut any = false;
        for pid in numbers("/proc")? {
            if !known.insert(pid) || !belongs(pid, pid_ns_inode) {
                continue;
            }
            any = true;
            for tid in still_there(numbers(&format!("/proc/{pid}/task")))?.unwrap_or_default() {
                tasks.extend(still_there(task(pid, tid))?);
            }
        }
        if !any {
            break;
        }
    }
    tasks.sort_by_key(|t| t.tid);
    Ok(TaskTable { tasks })
}

/// A file of `/proc`, in as few calls as it takes: the standard library begins with very small ones, and a boundary reads dozens of files.
pub(crate) fn read_whole(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    whole(&File::open(path)?)
}

/// The directory of a process, or one below it, by which its files are found without a look-up of the process each time.
pub(crate) fn directory(path: String) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// A file in such a directory that the kernel makes in one piece, as are all of one process but its lists: what does not fill the buffer is all of it, which
/// spares the call that would say so.
pub(crate) fn read_at(directory: &OwnedFd, name: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(directory, name, flags, Mode::empty())?);
    let mut bytes = vec![0; 8 << 10];
    let len = file.read(&mut bytes)?;
    if len == bytes.len() {
        file.rewind()?;
        return whole(&file);
    }
    bytes.truncate(len);
    Ok(bytes)
}

/// What a link in such a directory says.
pub(crate) fn link_at(directory: &OwnedFd, name: &str) -> io::Result<String> {
    let link = rustix::fs::readlinkat(directory, name, Vec::new())?;
    Ok(link.to_string_lossy().into_owned())
}

/// All of an open file, from where it stands.
pub(crate) fn whole(mut file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 8 << 10];
    let mut len = 0;
    loop {
        match file.read(&mut bytes[len..]) {
            Ok(0) => {
                bytes.truncate(len);
                return Ok(bytes);
            }
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if len == bytes.len() {
            bytes.resize(2 * len, 0);
        }
    }
}

/// The entries of a directory that are numbers.
fn numbers(dir: &str) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        found.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u32>().ok()),
        );
    }
    Ok(found)
}

/// Nothing, where the answer is that the process has ended.
fn still_there<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    match answer {
        Ok(it) => Ok(Some(it)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Whether a process is in this namespace, or in one nested in it.
fn belongs(pid: u32, pid_ns_inode: u64) -> bool {
    let Ok(mut at) = File::open(format!("/proc/{pid}/ns/pid")) else {
        return false;
    };
    for _ in 0..=MAX_NESTED {
        match at.metadata() {
            Ok(meta) if meta.ino() == pid_ns_inode => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
        // SAFETY: no pointers; `at` is open.
        let parent = unsafe { libc::ioctl(at.as_raw_fd(), NS_GET_PARENT) };
        if parent < 0 {
            // The namespace above is this process's own, or outside of what it may see.
            return false;
        }
        // SAFETY: just made, owned by nothing else.
        at = File::from(unsafe { OwnedFd::from_raw_fd(parent) });
    }
    false
}

fn task(pid: u32, tid: u32) -> io::Result<TaskInfo> {
    let at = |name: &str| read_whole(format!("/proc/{pid}/task/{tid}/{name}"));
    let (stat, status, schedstat) = (at("stat")?, at("status")?, at("schedstat")?);
    parse(pid, tid, &stat, &status, &schedstat)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/task/{tid} cannot be understood")))
}

fn parse(pid: u32, tid: u32, stat: &[u8], status: &[u8], schedstat: &[u8]) -> Option<TaskInfo> {
    // The name is in parentheses and may hold any byte.
    let (open, close) = (
        stat.iter().position(|b| *b == b'(')?,
        stat.iter().rposition(|b| *b == b')')?,
    );
    let comm = String::from_utf8_lossy(stat.get(open + 1..close)?).into_owned();
    let rest = std::str::from_utf8(stat.get(close + 2..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let state = *fields.first()?;
    let start_ticks: u64 = fields.get(19)?.parse().ok()?;

    let status = String::from_utf8_lossy(status);
    let line = |key: &str| status.lines().find_map(|l| l.strip_prefix(key));
    // Outermost first: the reader's own namespace, then the sandbox's.
    let inside = |key: &str| line(key)?.split_ascii_whitespace().nth(1)?.parse().ok();
    let counter = |key: &str| line(key)?.trim().parse().ok();

    let mut sched = std::str::from_utf8(schedstat)
        .ok()?
        .split_ascii_whitespace();
    Some(TaskInfo {
        tid,
        tgid: pid,
        // None is left of those of a task that has ended.
        ns_tid: inside("NSpid:").unwrap_or(0),
        ns_tgid: inside("NStgid:").unwrap_or(0),
        parent_tgid: fields.get(1)?.parse().ok()?,
        start_boottime_ns: start_ticks.saturating_mul(10_000_000),
        comm,
        exited: matches!(state, "Z" | "X"),
        running: state == "R",
        sum_exec_runtime_ns: sched.next()?.parse().ok()?,
        nvcsw: counter("voluntary_ctxt_switches:")?,
        nivcsw: counter("nonvoluntary_ctxt_switches:")?,
        pcount: sched.nth(1)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pid_ns_inode;

    #[test]
    fn a_task_is_read_whatever_its_name() {
        let stat = b"77 (a) R (b) S 5 77 77 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 1234 1 1\n";
        let status = b"Name:\tx\nNStgid:\t77\t3\nNSpid:\t77\t3\n\
            voluntary_ctxt_switches:\t4\nnonvoluntary_ctxt_switches:\t6\n";
        let task = parse(77, 77, stat, status, b"100 20 9\n").expect("a task");
        assert_eq!((task.comm.as_str(), task.running), ("a) R (b", false));
        assert_eq!((task.parent_tgid, task.ns_tgid), (5, 3));
        assert_eq!(task.start_boottime_ns, 12_340_000_000);
        let counters = (task.sum_exec_runtime_ns, task.nvcsw, task.nivcsw);
        assert_eq!((counters, task.pcount), ((100, 4, 6), 9));
        assert!(parse(77, 77, b"77 (a", status, b"").is_none());
    }

    #[test]
    fn this_process_is_in_its_own_namespace() {
        let own = pid_ns_inode(std::process::id()).expect("a namespace");
        let table = tasks_from_proc(own).expect("a table");
        let this = |t: &&TaskInfo| t.tid == std::process::id();
        let this = table.tasks.iter().find(this).expect("this process");
        assert!(!this.exited && this.sum_exec_runtime_ns > 0);
        assert_eq!(tasks_from_proc(1).expect("a table").tasks, []);
    }
}
