//! Where workloads do their work: a filesystem made for one measurement, ext4 with a journal, in memory.
//!
//! Not a directory of the host's own filesystem, for what others left there tells on the processor time of a workload more than any probe does. Worst is an ext4
//! without a journal: it does not give out an inode for minutes after it was freed, and passes over all of them at each new file, so that making
//! files again that were just deleted takes ten times as long and more. And what a disk does meanwhile is done by threads that the workload shares a processor with.
//!
//! It goes with the process: the image is a nameless file in memory, the loop device lets go of it with the last mount, and all mounts are in a mount namespace of the process's own.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use tempfile::TempDir;
use tidepool_inspector::supports;

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Another process may take a free device first.
const TRIES: u32 = 10;
const BYTES: u64 = 4 << 30;
/// Inodes in it, besides those that a caller asks for.
const INODES: u64 = 100_000;

/// Its own mount namespace, from which nothing gets out. Before the first thread.
pub(crate) fn own_mounts() -> Result<()> {
    // SAFETY: no pointers; the caller has one thread.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    ensure!(
        unshared == 0,
        "a mount namespace (is this root?): {}",
        std::io::Error::last_os_error()
    );
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

/// A directory on a filesystem of its own; gone when dropped.
#[derive(Debug)]
pub(crate) struct Ground {
    at: TempDir,
    device: PathBuf,
}

impl Ground {
    /// With room for so many files.
    pub(crate) fn make(files: u64) -> Result<Self> {
        let at = tempfile::Builder::new()
            .prefix("tp-inspector-bench-")
            .tempdir_in(std::env::temp_dir())?;
        let (device, held) = device()?;
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-O", "has_journal", "-J", "size=256", "-N"])
            .arg((INODES + files).to_string())
            // Nothing is left to do for a thread of the kernel later.
            .args(["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"])
            .arg(&device)
            .stdout(Stdio::null())
            .status()
            .context("mkfs.ext4")?;
        ensure!(made.success(), "mkfs.ext4: {made}");
        mount(&device, at.path(), "ext4", MountFlags::NOATIME, None)
            .with_context(|| format!("mounting {}", device.display()))?;
        drop(held);
        let ground = Self { at, device };
        supports(ground.path()).map_err(anyhow::Error::msg)?;
        Ok(ground)
    }

    pub(crate) fn path(&self) -> &Path {
        self.at.path()
    }

    /// Writes everything out, so that what comes next does not begin in the midst of that.
    pub(crate) fn settle(&self) -> Result<()> {
        Ok(rustix::fs::syncfs(File::open(self.path())?)?)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(e) = unmount(self.path(), UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {e}", self.device.display());
        }
    }
}

#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names: [u8; 64 + 64 + 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A block device over memory, that is there for as long as it is open or mounted.
fn device() -> Result<(PathBuf, File)> {
    let image: OwnedFd = memfd_create("tp-inspector-bench", MemfdFlags::CLOEXEC)?;
    ftruncate(&image, BYTES)?;
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let control = open(Path::new("/dev/loop-control")).context("/dev/loop-control")?;
    for _ in 0..TRIES {
        // SAFETY: no pointers.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        ensure!(
            number >= 0,
            "a loop device: {}",
            std::io::Error::last_os_error()
        );
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path).with_context(|| format!("{}", path.display()))?;
        // SAFETY: all of it numbers, for which zero is valid.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = image.as_raw_fd().cast_unsigned();
        config.block_size = 4096;
        config.info.flags = LO_FLAGS_AUTOCLEAR;
        // SAFETY: the kernel reads the structure, which outlives the call.
        let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        let error = std::io::Error::last_os_error();
        match (done, error.raw_os_error()) {
            (0, _) => return Ok((path, device)),
            (_, Some(libc::EBUSY)) => {}
            _ => bail!("{}: {error}", path.display()),
        }
    }
    bail!("no loop device is free")
}
