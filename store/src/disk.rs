//! A node's storage as the raft core sees it: the database for logs and states, the body store for bodies.
//!
//! The order that the core relies on is the database's: one write-ahead log, so that a synced batch makes everything before it durable,
//! index entries of bodies too (see [`crate::bodies`]).

use std::sync::Arc;

use tidepool_proto::ChunkName;
use tidepool_store_core::{ShardMap, keys};
use tidepool_store_raft::{Disk, DiskError, DiskOp, LoadedLog, StagedRow};

use crate::bodies::{self, BodyStore, Damaged};
use crate::db::{Batch, Db, DbError};
use crate::holds::Holds;
use crate::logs;

impl From<DbError> for DiskError {
    fn from(e: DbError) -> Self {
        match e {
            DbError::Full(text) => DiskError::Full(text),
            DbError::Corruption(text) => DiskError::Corruption(text),
            DbError::Failed(text) => DiskError::Failed(text),
        }
    }
}

/// The storage.
pub(crate) struct NodeDisk {
    pub(crate) db: Db,
    pub(crate) map: ShardMap,
    pub(crate) bodies: Arc<dyn BodyStore>,
    /// What is known to be damaged counts as missing, so that an entry that brings it heals it.
    pub(crate) damaged: Arc<Damaged>,
    pub(crate) holds: Holds,
}

/// The batch of these writes.
pub(crate) fn batch<'a>(db: &'a Db, ops: &[DiskOp]) -> Result<Batch<'a>, DbError> {
    let mut batch = db.batch()?;
    ops.iter().for_each(|op| logs::put(&mut batch, op));
    Ok(batch)
}

impl Disk for NodeDisk {
    fn write(&mut self, ops: &[DiskOp], sync: bool) -> Result<(), DiskError> {
        let batch = batch(&self.db, ops)?;
        Ok(self.db.commit(batch, sync)?)
    }

    fn groups(&self) -> Result<Vec<u32>, DiskError> {
        let mut here = Vec::new();
        for group in self.map.groups() {
            if logs::is_here(&self.db, group)? {
                here.push(group);
            }
        }
        Ok(here)
    }

    fn load(&self, group: u32) -> Result<LoadedLog, DiskError> {
        Ok(logs::load(&self.db, group)?)
    }

    fn get(&self, group: u32, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.db.state(group, key)?)
    }

    fn staged(
        &self,
        group: u32,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<StagedRow>, DiskError> {
        let mut rows = Vec::new();
        let mut bad = None;
        self.db.scan_stage(group, prefix, after, |key, value| {
            if key == after {
                return true;
            }
            match value {
                Ok(value) => rows.push((key.to_vec(), value)),
                Err(e) => bad = Some(e),
            }
            bad.is_none() && rows.len() < limit
        })?;
        bad.map_or(Ok(rows), |e| Err(e.into()))
    }

    fn has_body(&self, name: &ChunkName) -> Result<bool, DiskError> {
        let sound = bodies::sound(&*self.bodies, &self.damaged, std::slice::from_ref(name))?;
        Ok(sound.first() == Some(&true))
    }

    fn delete_bodies(&mut self, group: u32, names: &[ChunkName]) -> Result<(), DiskError> {
        Ok(self.holds.unheld(names, |free| {
            let mut gone = Vec::with_capacity(free.len());
            for name in free {
                if self.db.state(group, &keys::chunk(name))?.is_none() {
                    gone.push(*name);
                }
            }
            self.bodies.delete(&gone)
        })?)
    }
}
