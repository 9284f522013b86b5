//! What the tests share: chunks in memory, and directories that go away.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tidepool_fs::capture::full;
use tidepool_fs::restore::remove_tree;
use tidepool_fs::{
    CaptureOptions, Captured, ChunkSink, ChunkSource, SinkError, SourceError, TreeIndex,
};
use tidepool_proto::{ChunkName, DomainKey};

/// Chunks in memory, checked as they come and go.
pub(crate) struct Chunks {
    pub(crate) key: DomainKey,
    pub(crate) map: HashMap<ChunkName, Vec<u8>>,
    /// Calls of `chunk`.
    pub(crate) taken: usize,
    /// What each chunk refers to.
    pub(crate) links: HashMap<ChunkName, Vec<ChunkName>>,
    /// The names that `get` was asked for.
    pub(crate) read: std::collections::BTreeSet<ChunkName>,
    /// Calls of `get`, and the chunks asked for.
    pub(crate) gets: usize,
    pub(crate) got: usize,
}

impl Default for Chunks {
    fn default() -> Self {
        Self {
            key: key(),
            map: HashMap::new(),
            links: HashMap::new(),
            read: Default::default(),
            taken: 0,
            gets: 0,
            got: 0,
        }
    }
}

impl ChunkSink for Chunks {
    fn chunk(
        &mut self,
        name: ChunkName,
        plain: &[u8],
        links: &[ChunkName],
    ) -> Result<(), SinkError> {
        assert_eq!(self.key.name_linked(plain, links), name);
        self.links.insert(name, links.to_vec());
        assert!(plain.len() <= tidepool_proto::MAX_CHUNK_LEN);
        self.taken += 1;
        self.map.insert(name, plain.to_vec());
        Ok(())
    }
}

impl ChunkSource for Chunks {
    fn get(&mut self, names: &[ChunkName]) -> Result<Vec<Vec<u8>>, SourceError> {
        self.gets += 1;
        self.got += names.len();
        self.read.extend(names);
        names
            .iter()
            .map(|name| {
                let plain = self.map.get(name).cloned();
                plain.ok_or(SourceError::Missing { name: *name })
            })
            .collect()
    }
}

pub(crate) fn key() -> DomainKey {
    DomainKey::new([3; 32])
}

/// A directory on the file system of the build (ext4 or the like, not memory), removed at the end whatever is in it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(what: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let base = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let dir = base.join(format!("tpfs-{what}-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let dir = self.0.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = remove_tree(&self.0) {
            eprintln!("{}: {e}", self.0.display());
        }
    }
}

pub(crate) fn capture_all(dir: &Path, prev: Option<&TreeIndex>, chunks: &mut Chunks) -> Captured {
    full(dir, &key(), CaptureOptions::default(), prev, chunks).unwrap()
}

/// Bytes that do not repeat.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 32);
    let mut n = 0u64;
    while out.len() < len {
        let block = [seed.to_le_bytes(), n.to_le_bytes()].concat();
        let mut reader = blake3::Hasher::new();
        reader.update(&block);
        let mut buf = [0; 4096];
        reader.finalize_xof().fill(&mut buf);
        out.extend_from_slice(&buf);
        n += 1;
    }
    out.truncate(len);
    out
}
