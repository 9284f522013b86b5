//! The segment files themselves: made, opened, written at an offset, punched, removed. A bounded number is open at a time.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;

use super::format::segment_header;

/// What the kernel takes in one call.
const MAX_SLICES: usize = 1024;
/// Holes are whole blocks of this size; where blocks are larger, less comes back at once.
const BLOCK: u64 = 4096;

#[derive(Debug, Default)]
struct Open {
    /// By segment: the file and when it was last asked for.
    files: HashMap<u32, (Arc<File>, u64)>,
    clock: u64,
}

/// A directory of segments.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    max_open: usize,
    open: Mutex<Open>,
    /// The file system cannot punch holes: only whole files give space back.
    solid: AtomicBool,
}

impl Files {
    pub(super) fn new(dir: &Path, max_open: usize) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            max_open: max_open.max(1),
            open: Mutex::default(),
            solid: AtomicBool::new(false),
        })
    }

    pub(super) fn path(&self, segment: u32) -> PathBuf {
        self.dir.join(format!("{segment:08x}.seg"))
    }

    /// The segments that have a file, in order.
    pub(super) fn list(&self) -> io::Result<Vec<u32>> {
        let mut out = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|n| n.strip_suffix(".seg"));
            match number.and_then(|n| u32::from_str_radix(n, 16).ok()) {
                Some(segment) => out.push(segment),
                None => tracing::warn!(file = ?name, "a file that is not a segment is left alone"),
            }
        }
        out.sort_unstable();
        Ok(out)
    }

    /// Makes a segment. Its header is durable with the first sync of the file, its name on return.
    pub(super) fn create(&self, segment: u32) -> io::Result<Arc<File>> {
        let path = self.path(segment);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let made = write_all(&file, &mut [IoSlice::new(&segment_header(segment))], 0)
            .and_then(|()| self.sync_dir());
        if let Err(e) = made {
            let _ = fs::remove_file(&path);
            return Err(e);
        }
        let file = Arc::new(file);
        self.keep(segment, file.clone());
        Ok(file)
    }

    /// An open file of the segment.
    pub(super) fn get(&self, segment: u32) -> io::Result<Arc<File>> {
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.clock += 1;
            let now = open.clock;
            if let Some((file, used)) = open.files.get_mut(&segment) {
                *used = now;
                return Ok(file.clone());
            }
        }
        let path = self.path(segment);
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(path)?);
        self.keep(segment, file.clone());
        Ok(file)
    }

    fn keep(&self, segment: u32, file: Arc<File>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.clock += 1;
        let now = open.clock;
        open.files.insert(segment, (file, now));
        while open.files.len() > self.max_open {
            let oldest = open.files.iter().min_by_key(|(_, (_, used))| *used);
            let Some(oldest) = oldest.map(|(segment, _)| *segment) else {
                break;
            };
            open.files.remove(&oldest);
        }
    }

    /// Removes a segment: its name is gone for good on return. No file is no error.
    pub(super) fn remove(&self, segment: u32) -> io::Result<()> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .files
            .remove(&segment);
        match fs::remove_file(self.path(segment)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        self.sync_dir()
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Gives back the whole blocks between two offsets, which read as zeros from then on. Returns how many bytes that are.
    pub(super) fn punch(&self, segment: u32, from: u64, to: u64) -> io::Result<u64> {
        let (from, to) = (from.next_multiple_of(BLOCK), to / BLOCK * BLOCK);
        if from >= to || self.solid.load(Relaxed) {
            return Ok(0);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&*self.get(segment)?, flags, from, to - from) {
            Ok(()) => Ok(to - from),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                self.solid.store(true, Relaxed);
                Ok(0)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// What a segment takes on the disk, in bytes.
    pub(super) fn allocated(&self, segment: u32) -> io::Result<u64> {
        Ok(fs::metadata(self.path(segment))?.blocks() * 512)
    }
}

/// Writes everything at `offset`.
pub(super) fn write_all(
    file: &File,
    mut slices: &mut [IoSlice<'_>],
    mut offset: u64,
) -> io::Result<()> {
    // Empty ones at the front would look like a write of nothing.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let now = &slices[..slices.len().min(MAX_SLICES)];
        match rustix::io::pwritev(file, now, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                offset += n as u64;
                IoSlice::advance_slices(&mut slices, n);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// `len` bytes from `offset` on. None: the file ends before.
pub(super) fn read(file: &File, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
    // Zeros first would cost as much as the reading.
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let at = offset + out.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut out), at) {
            Ok(0) => return Ok(None),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    out.truncate(len);
    Ok(Some(out))
}
