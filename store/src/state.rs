//! A group's state, as the pure core sees it while a run of commands is applied: the database below, and what these commands
//! have written so far on top. Everything goes to disk in one batch.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tidepool_store_core::{KvRead, ReadError, Write};

use crate::db::{Batch, Db, DbError};

/// The view of one group.
pub(crate) struct StateView<'a> {
    db: &'a Db,
    group: u32,
    /// None: deleted.
    over: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Prefixes deleted; what was put there later is in `over`.
    deleted: Vec<Vec<u8>>,
    /// A read failed otherwise than by damage: nothing may be concluded from it.
    failed: RefCell<Option<DbError>>,
}

impl<'a> StateView<'a> {
    pub(crate) fn new(db: &'a Db, group: u32) -> Self {
        Self {
            db,
            group,
            over: BTreeMap::new(),
            deleted: Vec::new(),
            failed: RefCell::new(None),
        }
    }

    /// Makes writes visible to the next command, and adds them to the batch.
    pub(crate) fn write(&mut self, writes: Vec<Write>, batch: &mut Batch<'_>) {
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    batch.put_state(self.group, &key, &value);
                    self.over.insert(key, Some(value));
                }
                Write::Delete { key } => {
                    batch.delete_state(self.group, &key);
                    self.over.insert(key, None);
                }
                Write::DeletePrefix { prefix } => {
                    batch.delete_state_prefix(self.group, &prefix);
                    self.over.retain(|key, _| !key.starts_with(&prefix));
                    self.deleted.push(prefix);
                }
            }
        }
    }

    /// A failure that ends the node, if one was met.
    pub(crate) fn failure(&self) -> Option<DbError> {
        self.failed.borrow().clone()
    }
}

impl KvRead for StateView<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        if let Some(value) = self.over.get(key) {
            return Ok(value.clone());
        }
        if self.deleted.iter().any(|p| key.starts_with(p)) {
            return Ok(None);
        }
        self.db.state(self.group, key).map_err(|e| {
            let text = e.to_string();
            if !matches!(e, DbError::Corruption(_)) {
                *self.failed.borrow_mut() = Some(e);
            }
            ReadError(text)
        })
    }
}
