//! What has to be known about a sandbox's processes before CRIU can dump them.
//!
//! A file watch is known to the kernel by the inode it watches, and overlayfs cannot turn that back into a file. CRIU finds
//! the name if it is told where to look, so the names are looked for here. A process that is traced by a debugger cannot be
//! dumped; CRIU would try for ten seconds with everything frozen, so that is found out here too.

use crate::error::{Context, Result, SandboxError};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Entries looked at before the search is given up; CRIU then fails with its own reason.
const MAX_ENTRIES: usize = 4_000_000;

/// A watched inode: its device as the kernel numbers it, and its number.
type Inode = (u64, u64);

/// Refuses what CRIU could not dump, and gives the paths inside where it finds what is watched.
pub(crate) fn examine(pids: &[i32], root: &Path) -> Result<Vec<PathBuf>> {
    let mut watched = BTreeSet::new();
    for pid in pids {
        refuse_traced(*pid)?;
        watched.extend(inodes(*pid));
    }
    if watched.is_empty() {
        return Ok(Vec::new());
    }
    find(root, watched)
}

fn refuse_traced(pid: i32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .unwrap_or("")
            .trim()
    };
    let tracer = field("TracerPid:");
    if tracer.is_empty() || tracer == "0" {
        return Ok(());
    }
    let comm = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
    Err(SandboxError::Dump {
        reason: format!(
            "process {:?} with host pid {pid} is traced by {:?} with host pid {tracer}; traced processes cannot be checkpointed",
            field("Name:"),
            comm.trim(),
        ),
        log: String::new(),
    })
}

/// The inodes a process watches.
fn inodes(pid: i32) -> Vec<Inode> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        if !fs::read_link(entry.path()).is_ok_and(|l| l.as_os_str() == "anon_inode:inotify") {
            continue;
        }
        let Some(fd) = entry.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        found.extend(info.lines().filter_map(parse));
    }
    found
}

/// Reads a line like `inotify wd:1 ino:9e7e sdev:800013 mask:...`, all in hexadecimal.
fn parse(line: &str) -> Option<Inode> {
    let fields = line.strip_prefix("inotify ")?;
    let hex = |name: &str| {
        let value = fields.split(' ').find_map(|f| f.strip_prefix(name))?;
        u64::from_str_radix(value, 16).ok()
    };
    Some((hex("sdev:")?, hex("ino:")?))
}

/// A device number as the kernel shows it in hexadecimal.
fn kernel_device(dev: u64) -> u64 {
    (u64::from(libc::major(dev)) << 20) | u64::from(libc::minor(dev))
}

fn find(root: &Path, mut watched: BTreeSet<Inode>) -> Result<Vec<PathBuf>> {
    let what = || format!("cannot look for watched files in {}", root.display());
    let device = kernel_device(fs::metadata(root).context(what)?.dev());
    let mut paths = Vec::new();
    let elsewhere = watched.iter().any(|(dev, _)| *dev != device);
    watched.retain(|(dev, _)| *dev == device);
    let mut dirs = vec![root.to_owned()];
    let mut seen = 0;
    while let Some(dir) = dirs.pop() {
        // What vanishes meanwhile is not watched by name any more.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if watched.is_empty() || seen > MAX_ENTRIES {
                break;
            }
            seen += 1;
            let Ok(meta) = entry.metadata() else { continue };
            if watched.remove(&(kernel_device(meta.dev()), meta.ino()))
                && let Ok(inside) = entry.path().strip_prefix(root)
            {
                paths.push(speakable(&Path::new("/").join(inside)));
            }
            if meta.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    if elsewhere {
        paths.push("/dev".into());
    }
    // CRIU searches the last one first, and below each before the next: so deep ones come last.
    paths.retain(|p| p != Path::new("/"));
    paths.sort_by_key(|p| p.components().count());
    paths.dedup();
    Ok(paths)
}

/// The path itself, or the nearest directory above it that CRIU's configuration file can name.
fn speakable(path: &Path) -> PathBuf {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+@".contains(b);
    let mut path = path;
    while !path.as_os_str().as_bytes().iter().all(plain) {
        let Some(parent) = path.parent() else { break };
        path = parent;
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read_as_the_kernel_writes_them() {
        let line = "inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1";
        assert_eq!(parse(line), Some((0x80_0013, 0x9e7e)));
        assert_eq!(parse("pos:\t0"), None);
        assert_eq!(kernel_device(libc::makedev(8, 0x13)), 0x80_0013);
    }

    #[test]
    fn watched_files_are_found_or_their_nearest_nameable_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        for d in ["a/b", "c d/e"] {
            fs::create_dir_all(dir.path().join(d)).expect("made");
        }
        fs::write(dir.path().join("a/b/file"), "").expect("made");
        let inode = |p: &str| {
            let m = fs::metadata(dir.path().join(p)).expect("there");
            (kernel_device(m.dev()), m.ino())
        };
        let watched = BTreeSet::from([inode("a"), inode("a/b/file"), inode("c d/e")]);
        let found = find(dir.path(), watched).expect("searched");
        assert_eq!(found, vec![PathBuf::from("/a"), "/a/b/file".into()]);
        let found = find(dir.path(), BTreeSet::from([(1, 1)])).expect("searched");
        assert_eq!(found, vec![PathBuf::from("/dev")]);
    }

    #[test]
    fn an_untraced_process_is_not_refused() {
        assert!(refuse_traced(std::process::id() as i32).is_ok());
    }
}
