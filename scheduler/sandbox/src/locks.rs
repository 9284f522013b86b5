//! POSIX record locks that CRIU loses.
//!
//! Such a lock goes when its process closes any descriptor of the same file. CRIU restores the locks and then maps files
//! through descriptors of its own, which it closes: the locks on every mapped file are gone. Databases in WAL mode hold
//! exactly such a lock on a file they map, and without it the next program that opens the database truncates that file under them.
//!
//! So the locks are written down when a dump is taken, and after a restore, before anything has run, the processes that
//! miss one are made to take it again (see [`crate::tracing_stop`]).

use crate::error::{Context, Result, SandboxError};
use crate::inspect;
use crate::record::write_whole;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// Beside the images; only there if it is needed.
const LIST: &str = "posix-locks.json";
const MAX_LIST: u64 = 16 << 20;

/// One lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    /// Its owner's number inside the sandbox.
    pub(crate) pid: i32,
    /// A descriptor that it was taken through.
    pub(crate) fd: i32,
    /// Whether it excludes readers too.
    pub(crate) write: bool,
    /// The first byte.
    pub(crate) start: i64,
    /// The number of bytes; 0 for all that follow.
    pub(crate) len: i64,
}

/// Reads a line like `lock: 1: POSIX  ADVISORY  READ 8 00:29:935 128 128`, with a tab after the colon.
fn parse(line: &str, pid: i32, fd: i32) -> Option<Lock> {
    let fields: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let &[_, "POSIX", _, kind, _, _, start, end] = fields.as_slice() else {
        return None;
    };
    let start: i64 = start.parse().ok()?;
    let len = match end {
        "EOF" => 0,
        end => end
            .parse::<i64>()
            .ok()?
            .checked_sub(start)?
            .checked_add(1)?,
    };
    Some(Lock {
        pid,
        fd,
        write: kind == "WRITE",
        start,
        len,
    })
}

/// The locks that a process on this host holds, under the number it has inside.
fn held(host_pid: i32, pid: i32) -> Vec<Lock> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{host_pid}/fdinfo"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        found.extend(info.lines().filter_map(|l| parse(l, pid, fd)));
    }
    found
}

/// The locks of these processes, which must stand still.
pub(crate) fn all(host_pids: &[i32]) -> Vec<Lock> {
    let processes = host_pids.iter().filter_map(|pid| inspect::process(*pid));
    processes.flat_map(|p| held(p.pid, p.inside_pid)).collect()
}

/// Writes locks beside the images, if there are any.
pub(crate) fn save(locks: &[Lock], images: &Path) -> Result<()> {
    if locks.is_empty() {
        return Ok(());
    }
    let json = serde_json::to_vec(locks).context(|| "the list of locks".into())?;
    write_whole(&images.join(LIST), &json)
}

/// Reads the locks beside the images.
pub(crate) fn load(images: &Path) -> Result<Vec<Lock>> {
    let path = images.join(LIST);
    let Ok(meta) = fs::metadata(&path) else {
        return Ok(Vec::new());
    };
    if meta.len() > MAX_LIST {
        return Err(SandboxError::Invalid(format!(
            "{} is too large",
            path.display()
        )));
    }
    let bytes = fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).context(|| format!("cannot read {}", path.display()))
}

/// Which of `wanted` are missing, with the number of the process on this host that should hold it.
pub(crate) fn missing(wanted: &[Lock], host_pids: &[i32]) -> Result<Vec<(i32, Lock)>> {
    let processes: Vec<_> = host_pids
        .iter()
        .filter_map(|pid| inspect::process(*pid))
        .collect();
    let mut missing = Vec::new();
    for lock in wanted {
        let Some(owner) = processes.iter().find(|p| p.inside_pid == lock.pid) else {
            return Err(failed(format!(
                "process {} inside, which held a file lock, is missing",
                lock.pid
            )));
        };
        if !held(owner.pid, lock.pid).contains(lock) {
            missing.push((owner.pid, *lock));
        }
    }
    Ok(missing)
}

pub(crate) fn failed(reason: String) -> SandboxError {
    SandboxError::Restore {
        reason,
        log: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_as_the_kernel_writes_them() {
        let at = |line| parse(line, 8, 3);
        let read = Lock {
            pid: 8,
            fd: 3,
            write: false,
            start: 128,
            len: 1,
        };
        assert_eq!(
            at("lock:\t1: POSIX  ADVISORY  READ 8 00:29:10010935 128 128"),
            Some(read)
        );
        let write = Lock {
            write: true,
            start: 0,
            len: 0,
            ..read
        };
        assert_eq!(
            at("lock:\t2: POSIX  ADVISORY  WRITE 8 00:29:10011203 0 EOF"),
            Some(write)
        );
        assert_eq!(
            at("lock:\t3: FLOCK  ADVISORY  WRITE 8 00:29:10011203 0 EOF"),
            None
        );
        assert_eq!(
            at("lock:\t4: OFDLCK ADVISORY  WRITE 8 00:29:10011203 0 EOF"),
            None
        );
        assert_eq!(at("pos:\t0"), None);
    }

    #[test]
    fn lists_come_back_and_absent_ones_are_empty() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(load(dir.path()).expect("read"), vec![]);
        save(&[], dir.path()).expect("saved");
        assert!(!dir.path().join(LIST).exists());
        let locks = [Lock {
            pid: 1,
            fd: 2,
            write: true,
            start: 3,
            len: 4,
        }];
        save(&locks, dir.path()).expect("saved");
        assert_eq!(load(dir.path()).expect("read"), locks);
        fs::write(dir.path().join(LIST), "junk").expect("written");
        assert!(load(dir.path()).is_err());
    }
}
