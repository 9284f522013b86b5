//! The state directory: locked by one daemon, and on a file system the inspector can watch.
//!
//! The inspector's probes see ext4. Where the state directory is on something else, a sparse ext4 image is made in it and mounted over its `fs` directory; sandboxes live there.
//! The mount is left behind when the daemon ends, since running sandboxes stand on it, and is found again at the next start.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock, statfs, statvfs};

use crate::error::{Context, HostError, Result};

const EXT4_MAGIC: u64 = 0xef53;
/// Kept aside on the disk, so that a daemon can start (and serve and remove) where sandboxes filled it.
const BALLAST: u64 = 96 << 20;
/// As long as CRIU gets by default, and some.
const ORPHAN_TIME: Duration = Duration::from_secs(150);

/// The paths of a host's state. Held as long as the daemon runs.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    /// Where uppers and images lie: `root` itself, or the mounted image.
    fs: PathBuf,
    dumps: PathBuf,
    /// Set where an ext4 image had to be used.
    pub note: Option<String>,
    _lock: File,
}

impl StateDir {
    /// Opens and locks the state directory at `root`, making it where it is absent.
    ///
    /// # Errors
    /// Conflict where another daemon holds it; failed where it cannot be made or mounted.
    pub fn open(root: &Path, image_gib: u64, dump_base: &Path) -> Result<Self> {
        fs::create_dir_all(root).context(format!("making {}", root.display()))?;
        let root = fs::canonicalize(root).context(format!("resolving {}", root.display()))?;
        if root
            .to_str()
            .is_none_or(|s| s.contains([',', ':', '\\', '\n']))
        {
            return Err(HostError::invalid(format!(
                "{}: an overlay's path may not hold a comma, a colon or a backslash",
                root.display()
            )));
        }
        let lock = File::create(root.join("host.lock")).context("making the lock file")?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            HostError::conflict(format!("another tidepool-host holds {}", root.display()))
        })?;
        let full = ballast(&root)?;
        let (fs_dir, mut note) = if is_ext4(&root)? {
            (root.join("fs"), None)
        } else {
            let mounted = mount_image(&root, image_gib)?;
            let note = format!(
                "{} is not on ext4: sandboxes live in an ext4 image, {}",
                root.display(),
                root.join("fs.img").display()
            );
            (mounted, Some(note))
        };
        if full {
            note = Some(format!(
                "{} is full: what was kept aside is used; make room and start again",
                root.display()
            ));
        }
        for dir in ["images", "sandboxes"] {
            let path = fs_dir.join(dir);
            fs::create_dir_all(&path).context(format!("making {}", path.display()))?;
        }
        // Two daemons of one machine (tests) must not meet in the shared memory file system.
        let tag = blake3::hash(root.as_os_str().as_encoded_bytes()).to_hex();
        let dumps = dump_base.join(format!("tidepool-{}", &tag[..12]));
        wait_for_orphans(&dumps);
        // What an earlier daemon left there belonged to captures and restores it never finished.
        match fs::remove_dir_all(&dumps) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).context(format!("clearing {}", dumps.display()));
            }
            _ => {}
        }
        fs::create_dir_all(&dumps).context(format!("making {}", dumps.display()))?;
        Ok(Self {
            root,
            fs: fs_dir,
            dumps,
            note,
            _lock: lock,
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    pub fn images(&self) -> PathBuf {
        self.fs.join("images")
    }

    pub fn sandboxes(&self) -> PathBuf {
        self.fs.join("sandboxes")
    }

    /// Removes what lies outside the state directory and is empty.
    pub fn close(&self) {
        let _ = fs::remove_dir(&self.dumps);
    }

    /// A fresh, empty, memory-backed directory for process images.
    pub fn dump_dir(&self) -> Result<DumpDir> {
        let path = self.dumps.join(hex::encode(rand::random::<[u8; 8]>()));
        fs::create_dir(&path).context(format!("making {}", path.display()))?;
        Ok(DumpDir { path })
    }
}

/// Sets space aside, or gives it back where the disk is full (true).
fn ballast(root: &Path) -> Result<bool> {
    let path = root.join("ballast");
    let free = statvfs(root).context(format!("looking at the room of {}", root.display()))?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    let have = fs::metadata(&path).map_or(0, |m| m.len());
    if free < BALLAST / 2 {
        let gave = fs::remove_file(&path).is_ok();
        tracing::warn!(free, gave, "the disk is full");
        return Ok(true);
    }
    if have < BALLAST && free > 3 * BALLAST {
        let file = File::create(&path).context(format!("making {}", path.display()))?;
        // Where the file system cannot, there is no ballast: nothing else depends on it.
        if let Err(e) = fallocate(&file, FallocateFlags::empty(), 0, BALLAST) {
            tracing::debug!(error = %e, "no space could be set aside");
        }
    }
    Ok(false)
}

/// Waits for dumps and restores that an earlier daemon began and did not live to see end.
///
/// A dump has the sandbox's processes stopped and its own code inside them: ending it, or letting the sandbox go on meanwhile, would break them. It ends by itself.
fn wait_for_orphans(dumps: &Path) {
    let until = Instant::now() + ORPHAN_TIME;
    let mut told = false;
    while let Some(pid) = works_on(dumps) {
        if Instant::now() > until {
            tracing::warn!(pid, "a dump or restore of an earlier daemon does not end");
            return;
        }
        if !told {
            tracing::info!(pid, "waiting for a dump or restore of an earlier daemon");
            told = true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that was told of a path below `dumps`.
fn works_on(dumps: &Path) -> Option<u32> {
    let wanted = dumps.as_os_str().as_encoded_bytes();
    let me = std::process::id();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        let told = arguments.split(|b| *b == 0).any(|a| a.starts_with(wanted));
        (told && pid != me).then_some(pid)
    })
}

/// A directory of process images, removed when dropped.
#[derive(Debug)]
pub struct DumpDir {
    path: PathBuf,
}

impl DumpDir {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DumpDir {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), error = %e, "process images are left behind");
        }
    }
}

fn is_ext4(path: &Path) -> Result<bool> {
    let st = statfs(path).context(format!("looking at the file system of {}", path.display()))?;
    Ok(st.f_type as u64 == EXT4_MAGIC)
}

fn mount_image(root: &Path, gib: u64) -> Result<PathBuf> {
    let (image, at) = (root.join("fs.img"), root.join("fs"));
    fs::create_dir_all(&at).context(format!("making {}", at.display()))?;
    if is_ext4(&at)? {
        return Ok(at);
    }
    if !image.exists() {
        let tmp = root.join("fs.img.tmp");
        let file = File::create(&tmp).context(format!("making {}", tmp.display()))?;
        file.set_len(gib << 30).context("sizing the ext4 image")?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&tmp))?;
        file.sync_all().context("syncing the ext4 image")?;
        fs::rename(&tmp, &image).context("placing the ext4 image")?;
    }
    run(Command::new("mount")
        .args(["-o", "loop,noatime"])
        .arg(&image)
        .arg(&at))?;
    Ok(at)
}

fn run(command: &mut Command) -> Result<()> {
    let name = format!("{command:?}");
    let out = command.output().context(format!("running {name}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(HostError::failed(format!(
        "{name}: {}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr).trim()
    )))
}
