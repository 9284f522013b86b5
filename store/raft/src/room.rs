//! Who has room to write: this node's own disk, as its caller and its batches tell, and what others say of theirs.
//!
//! A member without room can vote and serve reads, and must not lead where another one can: it would refuse every write. So it
//! hands leadership over ([`crate::plan`]), and says again and again that it has none, that nobody hands it back; when it says so no more,
//! all is as before. Nothing of this is kept: it is about now.

use std::collections::{BTreeMap, BTreeSet};

use tidepool_store_core::META_GROUP;

use crate::disk::Disk;
use crate::envelope::Body;
use crate::machine::{CAUGHT_UP, Core};
use crate::messages::everybody;
use crate::plan::{Known, heir};

/// Ticks between two times that it is said.
pub(crate) const SAY_TICKS: u64 = 5;
/// Ticks after which it is forgotten of another node: three times lost, and a little.
const FORGET_TICKS: u64 = 4 * SAY_TICKS;

/// Who has room.
#[derive(Default)]
pub(crate) struct Room {
    /// This node has none, its caller says.
    none_here: bool,
    /// Nodes that said they have none, and the tick of that.
    without: BTreeMap<u64, u64>,
}

impl Room {
    /// What the caller says of this node's disk.
    pub(crate) fn set_here(&mut self, room: bool) {
        self.none_here = !room;
    }

    /// Whether the caller says that there is room here.
    pub(crate) fn is_here(&self) -> bool {
        !self.none_here
    }

    /// Another node said that it has none.
    pub(crate) fn none_at(&mut self, node: u64, tick: u64) {
        self.without.insert(node, tick);
    }

    /// Whether another node may have room.
    pub(crate) fn is_at(&self, node: u64) -> bool {
        !self.without.contains_key(&node)
    }

    /// Forgets what was said too long ago.
    pub(crate) fn tick(&mut self, tick: u64) {
        self.without
            .retain(|_, said| tick.saturating_sub(*said) <= FORGET_TICKS);
    }
}

impl<D: Disk> Core<D> {
    /// Whether new writes may be taken here.
    pub(crate) fn has_room(&self) -> bool {
        self.room.is_here() && !self.stalled()
    }

    /// Who takes a group that this node leads and has no room for.
    pub(crate) fn heir(&self, number: u32) -> Option<u64> {
        let (group, target) = (&self.groups.get(&number)?.group, self.targets.get(&number)?);
        let known = Known {
            caught_up: &|id| group.lag(id).is_some_and(|lag| lag <= CAUGHT_UP),
            room: &|id| self.room_at(id),
        };
        heir(self.cfg.node, group.conf(), target, &known)
    }

    pub(crate) fn room_at(&self, node: u64) -> bool {
        if node == self.cfg.node {
            self.has_room()
        } else {
            self.room.is_at(node)
        }
    }

    /// Says to all who may lead that this node must not.
    pub(crate) fn say_no_room(&mut self) {
        let confs = self.groups.values().map(|r| r.group.conf());
        let others: BTreeSet<u64> = confs
            .flat_map(everybody)
            .filter(|n| *n != self.cfg.node)
            .collect();
        for to in others {
            self.post(to, META_GROUP, Body::NoRoom);
        }
    }
}
