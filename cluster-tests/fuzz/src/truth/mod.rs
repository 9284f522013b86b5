//! The truth, read without anything that is to be tested: a walk of the upper with content hashes, the memory file system, the processes with
//! their memory and what the kernel keeps for them ([`processes`]), IPC objects and mounts ([`kernel`]).
//!
//! Reading it is not free of effects: it reads status, which lets the kernel take finer time stamps at the next write. So it is read at some boundaries only.

mod kernel;
mod processes;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use processes::{Process, ProcessId};

type Digest = [u8; 32];

/// What is the case at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Truth {
    /// By path of the upper. Times of directories are left out: a file made and gone leaves nothing else.
    pub files: BTreeMap<PathBuf, Digest>,
    pub memory_files: BTreeMap<PathBuf, Digest>,
    /// Living processes but the first.
    pub processes: BTreeMap<ProcessId, Process>,
    /// IPC objects and message queues.
    pub objects: BTreeMap<String, String>,
    /// Mounts, by number.
    pub mounts: BTreeMap<String, String>,
}

impl Truth {
    /// Reads everything.
    pub fn read(upper: &Path, init: u32) -> Result<Self> {
        Ok(Self {
            files: files(upper).context("walking the upper")?,
            memory_files: memory_files(init)?,
            processes: processes::read(init).context("reading processes")?,
            objects: kernel::objects(init).context("reading IPC objects")?,
            mounts: kernel::mounts(init).context("reading mounts")?,
        })
    }
}

/// What differs between two maps, by key.
pub fn differing<K: Ord + Clone, V: PartialEq>(a: &BTreeMap<K, V>, b: &BTreeMap<K, V>) -> Vec<K> {
    let mut keys: Vec<K> = a.keys().chain(b.keys()).cloned().collect();
    keys.sort();
    keys.dedup();
    keys.retain(|k| a.get(k) != b.get(k));
    keys
}

/// Files of the sandbox's `/dev/shm`.
fn memory_files(init: u32) -> Result<BTreeMap<PathBuf, Digest>> {
    files(Path::new(&format!("/proc/{init}/root/dev/shm"))).context("walking /dev/shm")
}

fn files(root: &Path) -> io::Result<BTreeMap<PathBuf, Digest>> {
    let mut found = BTreeMap::new();
    let mut links: HashMap<u64, Vec<PathBuf>> = HashMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let at = root.join(&path);
        let meta = fs::symlink_metadata(&at)?;
        let mut hash = blake3::Hasher::new();
        let kind = meta.file_type();
        let whiteout = kind.is_char_device() && meta.rdev() == 0;
        if whiteout {
            // One inode for all of them: only its being there counts.
            hash.update(b"whiteout");
        } else {
            let mode = if kind.is_symlink() { 0 } else { meta.mode() };
            for v in [mode, meta.uid(), meta.gid()] {
                hash.update(&v.to_le_bytes());
            }
            if !meta.is_dir() {
                hash.update(&meta.mtime().to_le_bytes());
                hash.update(&meta.mtime_nsec().to_le_bytes());
            }
            attributes(&at, &mut hash)?;
        }
        if meta.is_file() {
            hash.update(&fs::read(&at)?);
            if meta.nlink() > 1 {
                links.entry(meta.ino()).or_default().push(path.clone());
            }
        } else if kind.is_symlink() {
            hash.update(fs::read_link(&at)?.as_os_str().as_bytes());
        } else if meta.is_dir() {
            for entry in fs::read_dir(&at)? {
                todo.push(path.join(entry?.file_name()));
            }
        }
        if meta.is_file() || meta.is_dir() {
            let flags = rustix::fs::ioctl_getflags(File::open(&at)?);
            let kept = rustix::fs::IFlags::NODUMP | rustix::fs::IFlags::NOATIME;
            let bits = flags.map(|f| (f & kept).bits()).unwrap_or_default();
            hash.update(&u64::from(bits).to_le_bytes());
        }
        found.insert(path, *hash.finalize().as_bytes());
    }
    // Which names are one file is part of what is there.
    for names in links.into_values().filter(|n| n.len() > 1) {
        let mut names = names;
        names.sort();
        let first = names[0].clone();
        for name in names {
            if let Some(digest) = found.get_mut(&name) {
                let mut hash = blake3::Hasher::new();
                hash.update(digest).update(first.as_os_str().as_bytes());
                *digest = *hash.finalize().as_bytes();
            }
        }
    }
    Ok(found)
}

fn attributes(path: &Path, hash: &mut blake3::Hasher) -> io::Result<()> {
    let mut room = vec![0u8; 65536];
    let len = match rustix::fs::llistxattr(path, &mut room[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::NOTSUP) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut names: Vec<&[u8]> = room[..len].split(|b| *b == 0).collect();
    names.sort_unstable();
    for name in names.into_iter().filter(|n| !n.is_empty()) {
        // The overlay's notes on where a file came from are its own; what makes a directory opaque is not.
        let own = name.starts_with(b"trusted.overlay.")
            && name != b"trusted.overlay.opaque"
            && name != b"trusted.overlay.redirect";
        if own {
            continue;
        }
        let mut value = vec![0u8; 65536];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        hash.update(name);
        hash.update(&(len as u64).to_le_bytes());
        hash.update(&value[..len]);
    }
    Ok(())
}
