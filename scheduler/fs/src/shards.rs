//! A map by inode that is cheap to copy: its parts are shared until they are changed.

use std::collections::HashMap;
use std::sync::Arc;

const SHARDS: usize = 256;

#[derive(Clone)]
pub(crate) struct ByInode<V> {
    shards: Vec<Arc<HashMap<u64, V>>>,
}

impl<V: Clone> ByInode<V> {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Arc::default()).collect(),
        }
    }

    fn shard(&mut self, ino: u64) -> &mut HashMap<u64, V> {
        Arc::make_mut(&mut self.shards[ino as usize % SHARDS])
    }

    pub(crate) fn get(&self, ino: u64) -> Option<&V> {
        self.shards[ino as usize % SHARDS].get(&ino)
    }

    pub(crate) fn insert(&mut self, ino: u64, value: V) {
        self.shard(ino).insert(ino, value);
    }

    pub(crate) fn remove(&mut self, ino: u64) {
        self.shard(ino).remove(&ino);
    }

    /// Changes a value, `V::default()` where there is none; where `change` says so, it is removed.
    pub(crate) fn change<T>(&mut self, ino: u64, change: impl FnOnce(&mut V) -> (T, bool)) -> T
    where
        V: Default,
    {
        let shard = self.shard(ino);
        let (result, remove) = change(shard.entry(ino).or_default());
        if remove {
            shard.remove(&ino);
        }
        result
    }
}
