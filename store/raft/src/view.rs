//! A group's state, as the pure core sees it while a run of commands is applied: the disk below, and what these commands have
//! written so far on top. Everything goes to disk in one batch.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tidepool_store_core::{KvRead, ReadError, Write};

use crate::disk::{Disk, DiskError, DiskOp};

/// The view of one group.
pub(crate) struct StateView<'a, D> {
    disk: &'a D,
    group: u32,
    /// None: deleted.
    over: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Prefixes deleted; what was put there later is in `over`.
    deleted: Vec<Vec<u8>>,
    /// A read failed otherwise than by damage: nothing may be concluded from it.
    failed: RefCell<Option<DiskError>>,
}

impl<'a, D: Disk> StateView<'a, D> {
    pub(crate) fn new(disk: &'a D, group: u32) -> Self {
        Self {
            disk,
            group,
            over: BTreeMap::new(),
            deleted: Vec::new(),
            failed: RefCell::new(None),
        }
    }

    /// Makes writes visible to the next command, and adds them to the batch.
    pub(crate) fn write(&mut self, writes: Vec<Write>, batch: &mut Vec<DiskOp>) {
        for write in writes {
            match &write {
                Write::Put { key, value } => {
                    self.over.insert(key.clone(), Some(value.clone()));
                }
                Write::Delete { key } => {
                    self.over.insert(key.clone(), None);
                }
                Write::DeletePrefix { prefix } => {
                    self.over.retain(|key, _| !key.starts_with(prefix));
                    self.deleted.push(prefix.clone());
                }
            }
            batch.push(DiskOp::State {
                group: self.group,
                write,
            });
        }
    }

    /// A failure that ends the node, if one was met.
    pub(crate) fn failure(&self) -> Option<DiskError> {
        self.failed.borrow().clone()
    }
}

impl<D: Disk> KvRead for StateView<'_, D> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        if let Some(value) = self.over.get(key) {
            return Ok(value.clone());
        }
        if self.deleted.iter().any(|p| key.starts_with(p)) {
            return Ok(None);
        }
        self.disk.get(self.group, key).map_err(|e| {
            let text = e.to_string();
            if !matches!(e, DiskError::Corruption(_)) {
                *self.failed.borrow_mut() = Some(e);
            }
            ReadError(text)
        })
    }
}
