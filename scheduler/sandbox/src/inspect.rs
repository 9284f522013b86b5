//! What the processes of a sandbox are and which files they hold, read from `/proc`.
//!
//! Paths are those the processes themselves would use: the kernel prints them from the root of the mount namespace they
//! belong to. Processes come and go meanwhile; one that is gone is left out.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A process of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number on the host.
    pub pid: i32,
    /// Its number inside the sandbox.
    pub inside_pid: i32,
    /// Its short name.
    pub comm: String,
    /// Its arguments; empty for a process that has ended and is not reaped.
    pub cmdline: Vec<String>,
}

/// How a process holds a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// By an open descriptor.
    Open {
        /// The descriptor.
        fd: u32,
        /// Whether it can write through it.
        writable: bool,
    },
    /// By a mapping into memory.
    Mapped {
        /// Whether writes to memory reach the file.
        shared_writable: bool,
    },
    /// As the program it runs.
    Program,
    /// As its working directory.
    WorkingDirectory,
    /// As its root directory.
    Root,
}

/// A file that a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldFile {
    /// The path inside the sandbox; for what has no path, the kernel's name for it, like `pipe:[7]`.
    pub path: PathBuf,
    /// Whether the name is gone while the file lives on.
    pub deleted: bool,
    /// How it is held.
    pub hold: Hold,
}

const MAX_CMDLINE: usize = 64 * 1024;

/// Describes a process, or nothing if it is gone.
pub(crate) fn process(pid: i32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .map(str::trim)
    };
    let inside_pid = field("NSpid:")?.split_whitespace().last()?.parse().ok()?;
    let mut cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    cmdline.truncate(MAX_CMDLINE);
    let cmdline = cmdline
        .split(|b| *b == 0)
        .map(|a| String::from_utf8_lossy(a).into_owned());
    let mut cmdline: Vec<String> = cmdline.collect();
    cmdline.pop_if(|last| last.is_empty());
    Some(Process {
        pid,
        inside_pid,
        comm: field("Name:")?.to_owned(),
        cmdline,
    })
}

/// Splits the kernel's mark for removed names off a path. `pinned` says how many names the file still has, where known.
fn split_deleted(pid: i32, path: &[u8], links: Option<u64>) -> (PathBuf, bool) {
    let whole = || PathBuf::from(OsStr::from_bytes(path));
    let Some(name) = path.strip_suffix(b" (deleted)") else {
        return (whole(), false);
    };
    // A file may really be called so: then it has names, and this is one of them.
    if links != Some(0) {
        let mut seen = format!("/proc/{pid}/root").into_bytes();
        seen.extend_from_slice(path);
        if fs::symlink_metadata(OsStr::from_bytes(&seen)).is_ok() {
            return (whole(), false);
        }
    }
    (PathBuf::from(OsStr::from_bytes(name)), true)
}

fn link(pid: i32, name: &str, hold: Hold) -> Option<HeldFile> {
    let at = format!("/proc/{pid}/{name}");
    let target = fs::read_link(&at).ok()?;
    let links = fs::metadata(&at).ok().map(|m| m.nlink());
    let (path, deleted) = split_deleted(pid, target.as_os_str().as_bytes(), links);
    Some(HeldFile {
        path,
        deleted,
        hold,
    })
}

fn writable(pid: i32, fd: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let flags = info.lines().find_map(|l| l.strip_prefix("flags:"));
    match flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok()) {
        Some(flags) => flags & libc::O_ACCMODE != libc::O_RDONLY,
        // In doubt it can.
        None => true,
    }
}

/// The file a line of `maps` names, and whether writes to it reach the file.
fn mapping(line: &[u8]) -> Option<(&[u8], bool)> {
    let mut rest = line;
    let mut fields: [&[u8]; 5] = [b""; 5];
    for field in &mut fields {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        (*field, rest) = rest.split_at(end);
    }
    let path = rest.trim_ascii_start();
    let shared_writable = fields[1].get(1) == Some(&b'w') && fields[1].get(3) == Some(&b's');
    (path.first() == Some(&b'/')).then_some((path, shared_writable))
}

/// The files a process holds. An error means that the process is gone or cannot be looked at.
pub fn open_files(pid: i32) -> io::Result<Vec<HeldFile>> {
    let mut held = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Some(fd) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        held.extend(link(
            pid,
            &format!("fd/{fd}"),
            Hold::Open {
                fd,
                writable: writable(pid, fd),
            },
        ));
    }
    let maps = fs::read(format!("/proc/{pid}/maps"))?;
    let mut mapped: Vec<(Vec<u8>, bool)> = maps
        .split(|b| *b == b'\n')
        .filter_map(mapping)
        // Only the line end is escaped here.
        .map(|(path, w)| (replace(path, b"\\012", b"\n"), w))
        .collect();
    // The one that can write first, so that it is the one kept of equal paths.
    mapped.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    mapped.dedup_by(|a, b| a.0 == b.0);
    for (path, shared_writable) in mapped {
        let (path, deleted) = split_deleted(pid, &path, None);
        held.push(HeldFile {
            path,
            deleted,
            hold: Hold::Mapped { shared_writable },
        });
    }
    held.extend(link(pid, "exe", Hold::Program));
    held.extend(link(pid, "cwd", Hold::WorkingDirectory));
    held.extend(link(pid, "root", Hold::Root));
    Ok(held)
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(tail) = rest.strip_prefix(from) {
            out.extend_from_slice(to);
            rest = tail;
        } else {
            out.push(rest[0]);
            rest = &rest[1..];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_with_spaces_in_their_names() {
        let line = b"7f00-7f01 rw-s 00000000 00:20 12      /tmp/a b (deleted)";
        assert_eq!(mapping(line), Some((&b"/tmp/a b (deleted)"[..], true)));
        assert_eq!(
            mapping(b"7f00-7f01 r-xp 00000000 00:20 12 /bin/sh"),
            Some((&b"/bin/sh"[..], false))
        );
        assert_eq!(mapping(b"7f00-7f01 rw-p 00000000 00:00 0 [heap]"), None);
        assert_eq!(mapping(b""), None);
        assert_eq!(replace(b"a\\012b", b"\\012", b"\n"), b"a\nb");
    }

    #[test]
    fn held_files_of_this_very_process_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let (kept, gone, odd) = (
            dir.path().join("kept"),
            dir.path().join("gone"),
            dir.path().join("odd (deleted)"),
        );
        let _kept = fs::File::create(&kept).expect("made");
        let _gone = fs::File::create(&gone).expect("made");
        fs::write(&odd, "").expect("made");
        let _odd = fs::File::open(&odd).expect("opened");
        fs::remove_file(&gone).expect("removed");
        let pid = std::process::id() as i32;
        let held = open_files(pid).expect("this process is there");
        let find = |p: &PathBuf| {
            held.iter()
                .find(|h| h.path == *p)
                .map(|h| (h.deleted, h.hold))
        };
        assert!(matches!(
            find(&kept),
            Some((false, Hold::Open { writable: true, .. }))
        ));
        assert!(matches!(
            find(&gone),
            Some((true, Hold::Open { writable: true, .. }))
        ));
        assert!(matches!(
            find(&odd),
            Some((
                false,
                Hold::Open {
                    writable: false,
                    ..
                }
            ))
        ));
        assert!(held.iter().any(|h| h.hold == Hold::Program));
        assert!(held.iter().any(|h| matches!(h.hold, Hold::Mapped { .. })));
        let me = process(pid).expect("this process is there");
        assert_eq!(me.pid, pid);
        assert!(!me.cmdline.is_empty());
    }
}
