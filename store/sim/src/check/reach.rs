//! What live checkpoints, journaled outputs and images need: no collection may take it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tidepool_proto::ChunkName;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::TurnRecord;
use tidepool_store_core::keys::Table;
use tidepool_store_core::{ImageState, ManifestRow, ShardMap};

use super::Stats;
use super::ghost::{Change, chunk_of};
use crate::content::Content;

pub(super) struct Reach {
    content: Rc<Content>,
    shards: ShardMap,
    /// What a row needs, by group and key.
    holders: BTreeMap<(u32, Vec<u8>), BTreeSet<ChunkName>>,
    needed: BTreeMap<ChunkName, u32>,
    /// What became needed since it was last asked.
    new: Vec<ChunkName>,
    /// The highest round that a client was told a chunk carries.
    pinned: BTreeMap<ChunkName, u64>,
}

impl Reach {
    pub(super) fn new(content: Rc<Content>, shards: ShardMap) -> Self {
        Self {
            content,
            shards,
            holders: BTreeMap::new(),
            needed: BTreeMap::new(),
            new: Vec::new(),
            pinned: BTreeMap::new(),
        }
    }

    pub(super) fn is_needed(&self, name: &ChunkName) -> bool {
        self.needed.contains_key(name)
    }

    pub(super) fn needed(&self) -> impl Iterator<Item = &ChunkName> {
        self.needed.keys()
    }

    pub(super) fn take_new(&mut self) -> Vec<ChunkName> {
        std::mem::take(&mut self.new)
    }

    pub(super) fn pin(&mut self, name: &ChunkName, round: u64) {
        let known = self.pinned.entry(*name).or_default();
        *known = round.max(*known);
    }

    /// A row of a group changed, in this round of the group.
    pub(super) fn change(
        &mut self,
        group: u32,
        change: &Change,
        round: u64,
        stats: &mut Stats,
    ) -> Result<(), String> {
        let table = change.key.first().copied().unwrap_or_default();
        let holder = (group, change.key.clone());
        if let Some(name) = chunk_of(&change.key) {
            if change.new.is_none() {
                stats.swept += 1;
                return self.swept(group, &name, round);
            }
        } else if table == Table::Manifest as u8 {
            match &change.new {
                Some(row) => {
                    let row = ManifestRow::decode(row).map_err(|e| e.to_string())?;
                    if row.removed.is_some() {
                        stats.removed += 1;
                        self.release(&holder);
                    } else {
                        let manifest = Manifest::decode(row.manifest).map_err(|e| e.to_string())?;
                        self.hold(holder, manifest.links());
                    }
                }
                None if self.holders.contains_key(&holder) => {
                    return Err("the manifest of a live checkpoint is purged".into());
                }
                None => {}
            }
        } else if table == Table::Turn as u8 {
            match &change.new {
                Some(row) => {
                    let record = TurnRecord::decode(row).map_err(|e| e.to_string())?;
                    self.hold(holder, record.links());
                }
                None if self.holders.contains_key(&holder) => {
                    return Err("the record of a live sandbox's turn is purged".into());
                }
                None => {}
            }
        } else if table == Table::Image as u8 {
            self.release(&holder);
            if let Some(row) = &change.new {
                let image = ImageState::decode(row).map_err(|e| e.to_string())?;
                self.hold(holder, image.roots.into_iter());
            }
        } else if table == Table::Tombstone as u8 {
            for table in [Table::Manifest, Table::Turn] {
                let mut prefix = change.key.clone();
                prefix[0] = table as u8;
                let held = self.holders.range((group, prefix.clone())..);
                let held = held.take_while(|((g, k), _)| *g == group && k.starts_with(&prefix));
                let held: Vec<_> = held.map(|(k, _)| k.clone()).collect();
                held.iter().for_each(|k| self.release(k));
            }
        }
        Ok(())
    }

    fn swept(&mut self, group: u32, name: &ChunkName, round: u64) -> Result<(), String> {
        if self.is_needed(name) {
            return Err(format!(
                "a collection takes chunk {name}, which a live checkpoint needs"
            ));
        }
        if self.shards.of_chunk(name) != group {
            return Err(format!("chunk {name} was in the wrong group"));
        }
        match self.pinned.remove(name) {
            Some(pinned) if pinned >= round => Err(format!(
                "the collection of round {round} takes chunk {name}, which is pinned with round {pinned}"
            )),
            _ => Ok(()),
        }
    }

    fn hold(&mut self, holder: (u32, Vec<u8>), roots: impl Iterator<Item = ChunkName>) {
        self.release(&holder);
        let names = self.content.closure(roots);
        if names.is_empty() {
            return;
        }
        for name in &names {
            *self.needed.entry(*name).or_default() += 1;
            self.new.push(*name);
        }
        self.holders.insert(holder, names);
    }

    fn release(&mut self, holder: &(u32, Vec<u8>)) {
        for name in self.holders.remove(holder).into_iter().flatten() {
            if let Some(n) = self.needed.get_mut(&name) {
                *n -= 1;
                if *n == 0 {
                    self.needed.remove(&name);
                }
            }
        }
    }
}
