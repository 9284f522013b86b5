//! Who has room to write: this node's own disk, as its caller and its batches tell, and what others say of theirs.
//!
//! A member without room can vote and serve reads, and must not lead where another one can: it would refuse every write. So it
//! hands leadership over ([`crate::plan`]), and says again and again that it has none, that nobody hands it back; when it says so no more,
//! all is as before. Nothing of this is kept: it is about now.

use std::collections::BTreeMap;

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
