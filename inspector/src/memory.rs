//! Memory-backed file systems and IPC objects of a sandbox, read from outside.
//!
//! No probe set sees tmpfs; its contents are few, so they are walked and hashed (a store through a shared mapping leaves no other
//! trace). System V objects and POSIX message queues have contents that cannot be read from outside: their mere existence counts.
//! Both live in the process image, never in the file tree.
//!
//! Invariant: whatever cannot be read in full is reported as unsure, which counts as changed.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::procfs::whole;
use crate::surroundings::mount_table;

/// Entries looked at in one sandbox's memory-backed file systems before giving up on telling.
const MAX_ENTRIES: u64 = 50_000;
/// Bytes hashed before giving up on telling.
const MAX_BYTES: u64 = 64 << 20;

/// The contents of a sandbox's memory-backed file systems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFiles {
    #[serde(with = "hex::serde")]
    digest: [u8; 32],
    /// Why the contents could not be told.
    pub unsure: Option<String>,
}

impl MemoryFiles {
    /// Whether these are surely the same contents.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.unsure.is_none() && other.unsure.is_none() && self.digest == other.digest
    }

    /// Reads those of the sandbox whose init has this host process id.
    #[must_use]
    pub fn read(init_pid: u32) -> Self {
        Self::of(init_pid, mount_table(init_pid).as_deref())
    }

    /// The same with its mount table at hand.
    pub(crate) fn of(init_pid: u32, mounts: Result<&[u8], &io::Error>) -> Self {
        let mut walk = Walk::default();
        let walked = match mounts {
            Ok(mounts) => walk.all(init_pid, mounts).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        Self {
            digest: *walk.hasher.finalize().as_bytes(),
            unsure: walked.err().map(|e| format!("memory-backed files: {e}")),
        }
    }
}

#[derive(Default)]
struct Walk {
    hasher: blake3::Hasher,
    entries: u64,
    bytes: u64,
    /// For names of attributes, and for values and contents; made when needed, and once.
    buffers: [Vec<u8>; 2],
}

/// The most that an attribute, or the names of all of a file, can be.
const BUFFER: usize = 64 << 10;

impl Walk {
    fn all(&mut self, init_pid: u32, mounts: &[u8]) -> io::Result<()> {
        let root = PathBuf::from(format!("/proc/{init_pid}/root"));
        for (mount, queues) in memory_mounts(mounts) {
            let relative = mount.strip_prefix("/").unwrap_or(&mount);
            let at = rustix::fs::open(
                root.join(relative),
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            );
            // A masked path may be a file bound over; it holds nothing of the sandbox's.
            let Ok(at) = at else { continue };
            let dev = statat(&at, c"", AtFlags::EMPTY_PATH)?.st_dev;
            self.hasher.update(mount.as_os_str().as_bytes());
            let before = self.entries;
            self.directory(at, dev, 0)?;
            if queues && self.entries > before {
                return Err(io::Error::other(
                    "the messages of a queue cannot be read from outside",
                ));
            }
        }
        Ok(())
    }

    fn directory(&mut self, dir: OwnedFd, dev: u64, depth: u32) -> io::Result<()> {
        if depth > 64 {
            return Err(io::Error::other("nested deeper than 64 directories"));
        }
        let mut names = Vec::new();
        for entry in Dir::read_from(dir.as_fd())? {
            let name = entry?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
            if self.entries + names.len() as u64 > MAX_ENTRIES {
                return Err(io::Error::other(format!("more than {MAX_ENTRIES} entries")));
            }
        }
        names.sort();
        self.entries += names.len() as u64;
        for name in names {
            let st = match statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(st) => st,
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(e.into()),
            };
            self.hasher
                .update(&(name.to_bytes().len() as u64).to_le_bytes());
            self.hasher.update(name.to_bytes());
            for v in [
                u64::from(st.st_mode),
                u64::from(st.st_uid),
                u64::from(st.st_gid),
                st.st_ino,
            ] {
                self.hasher.update(&v.to_le_bytes());
            }
            // A directory's changes with what is in it, also where that is gone again.
            if FileType::from_raw_mode(st.st_mode) != FileType::Directory {
                self.hasher.update(&st.st_mtime.to_le_bytes());
                self.hasher.update(&(st.st_mtime_nsec as u64).to_le_bytes());
            }
            // What is mounted inside is another file system's.
            if st.st_dev != dev {
                continue;
            }
            match FileType::from_raw_mode(st.st_mode) {
                FileType::RegularFile => {
                    let file = openat(
                        &dir,
                        &name,
                        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                        Mode::empty(),
                    )?;
                    self.file(file, st.st_size as u64)?;
                }
                FileType::Directory => {
                    let flags =
                        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let inner = openat(&dir, &name, flags, Mode::empty())?;
                    self.attributes(&inner)?;
                    self.directory(inner, dev, depth + 1)?;
                }
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(&dir, &name, Vec::new())?;
                    self.hasher.update(target.to_bytes());
                }
                _ => {
                    self.hasher.update(&st.st_rdev.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// Extended attributes, where the file system keeps any.
    fn attributes(&mut self, fd: &OwnedFd) -> io::Result<()> {
        use rustix::fs::{fgetxattr, flistxattr};
        let [names, value] = &mut self.buffers;
        names.resize(BUFFER, 0);
        value.resize(BUFFER, 0);
        let len = match flistxattr(fd, &mut names[..]) {
            Ok(len) => len,
            Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOSYS) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let mut names: Vec<&[u8]> = names[..len].split(|b| *b == 0).collect();
        names.sort_unstable();
        for name in names.into_iter().filter(|n| !n.is_empty()) {
            let len = fgetxattr(fd, name, &mut value[..])?;
            self.hasher.update(name);
            self.hasher.update(&(len as u64).to_le_bytes());
            self.hasher.update(&value[..len]);
        }
        Ok(())
    }

    fn file(&mut self, file: OwnedFd, len: u64) -> io::Result<()> {
        self.attributes(&file)?;
        self.bytes += len;
        if self.bytes > MAX_BYTES {
            return Err(io::Error::other(format!(
                "more than {} MiB of contents",
                MAX_BYTES >> 20
            )));
        }
        self.hasher.update(&len.to_le_bytes());
        let mut file = fs::File::from(file).take(MAX_BYTES);
        let [_, buffer] = &mut self.buffers;
        buffer.resize(BUFFER, 0);
        loop {
            match file.read(buffer)? {
                0 => return Ok(()),
                n => self.hasher.update(&buffer[..n]),
            };
        }
    }
}

/// Mount points of tmpfs, and of message queues (true), in a mount table.
fn memory_mounts(table: &[u8]) -> Vec<(PathBuf, bool)> {
    let mut mounts = Vec::new();
    for line in table.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let kind = fields
            .iter()
            .position(|f| *f == b"-")
            .and_then(|at| fields.get(at + 1));
        let point = fields.get(4);
        if let (Some(kind), Some(point)) = (kind, point)
            && matches!(*kind, b"tmpfs" | b"mqueue")
        {
            let point = PathBuf::from(OsStr::from_bytes(&unescape(point)));
            mounts.push((point, *kind == b"mqueue"));
        }
    }
    mounts.sort();
    mounts
}

/// Undoes mountinfo's octal escapes.
pub(crate) fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = field
            .get(at + 1..at + 4)
            .filter(|_| field[at] == b'\\')
            .filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                out.push(
                    d.iter()
                        .fold(0u8, |v, b| v.wrapping_mul(8).wrapping_add(b - b'0')),
                );
                at += 4;
            }
            None => {
                out.push(field[at]);
                at += 1;
            }
        }
    }
    out
}

/// The kernel's lists of System V objects in one IPC namespace. They show that of whoever opened them, and entering one takes the kernel some milliseconds: so they stay open.
#[derive(Debug)]
pub(crate) struct IpcLists {
    namespace: PathBuf,
    lists: [fs::File; 3],
}

impl IpcLists {
    /// Opens those of a sandbox.
    pub(crate) fn open(init_pid: u32) -> io::Result<Self> {
        let namespace = Self::namespace(init_pid)?;
        let ns = fs::File::open(format!("/proc/{init_pid}/ns/ipc"))?;
        // A thread of its own: a thread of the pool must not stay in the sandbox's namespace.
        let open = move || -> io::Result<[fs::File; 3]> {
            move_into_link_name_space(
                ns.as_fd(),
                Some(LinkNameSpaceType::InterProcessCommunication),
            )?;
            let open = |kind: &str| fs::File::open(Path::new("/proc/sysvipc").join(kind));
            Ok([open("shm")?, open("sem")?, open("msg")?])
        };
        let lists = std::thread::Builder::new()
            .name("ipc-look".into())
            .spawn(open)?
            .join()
            .map_err(|_| io::Error::other("the thread that looks at IPC objects panicked"))??;
        Ok(Self { namespace, lists })
    }

    fn namespace(init_pid: u32) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/{init_pid}/ns/ipc"))
    }

    /// Whether they are those of this sandbox. As long as they are open no other namespace has that name.
    pub(crate) fn are_of(&self, init_pid: u32) -> io::Result<bool> {
        Ok(Self::namespace(init_pid)? == self.namespace)
    }

    /// Whether there are any objects.
    pub(crate) fn in_use(&self) -> io::Result<bool> {
        for mut list in &self.lists {
            list.rewind()?;
            // A line of headings comes first.
            if whole(list)?.iter().filter(|b| **b == b'\n').count() > 1 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether System V objects exist in the sandbox.
///
/// # Errors
/// If its namespace cannot be looked into.
pub fn ipc_in_use(init_pid: u32) -> io::Result<bool> {
    IpcLists::open(init_pid)?.in_use()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(br"/a\04"), br"/a\04");
    }

    #[test]
    fn contents_of_memory_backed_files_are_told_apart() {
        // This process's own mounts: /dev/shm is among them.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = dir.path().join("f");
        fs::write(&file, b"one").unwrap();
        let look = || {
            let mut walk = Walk::default();
            let fd = rustix::fs::open(
                dir.path(),
                OFlags::RDONLY | OFlags::DIRECTORY,
                Mode::empty(),
            )
            .unwrap();
            let dev = statat(&fd, c"", AtFlags::EMPTY_PATH).unwrap().st_dev;
            walk.directory(fd, dev, 0).unwrap();
            walk.hasher.finalize()
        };
        let before = look();
        assert_eq!(before, look());
        fs::write(&file, b"two").unwrap();
        assert_ne!(before, look());
    }

    #[test]
    fn system_v_objects_are_seen() {
        let pid = std::process::id();
        // SAFETY: plain system calls on an object of our own, removed below.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, 0o600) };
        assert!(id >= 0);
        let lists = IpcLists::open(pid).unwrap();
        assert!(lists.are_of(pid).unwrap());
        let seen = ipc_in_use(pid).and_then(|seen| Ok(seen && lists.in_use()?));
        // SAFETY: as above.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
        assert!(seen.unwrap());
    }
}
