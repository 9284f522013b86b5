//! The count of system calls and signals behind a [`ThawWatch`](crate::ThawWatch): its maps, and when its programs are attached.
//!
//! The programs run at every system call of the machine, so they are attached only while something is under watch. Each
//! watch has a number of its own, never used twice, so that what a program writes late belongs to no later watch.

use std::collections::{HashMap, HashSet};

use aya::maps::{self, MapData, MapError};
use aya::programs::raw_trace_point::RawTracePointLink;

use crate::error::InspectorError;
use crate::load::kernel;

/// `struct call_key`: watch, thread id.
type Key = [u32; 2];
/// `struct watch`: the number in the lower half of the first (little endian), then the lost ones.
type Watch = [u64; 2];
/// `struct task_calls`.
type Value = [u64; 9];

const WHAT: &str = "the system calls of a sandbox cannot be counted";

/// One system call, at its entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Call {
    /// Its number; -1 where it is not one of 64-bit code on x86-64.
    pub(crate) nr: i64,
    pub(crate) ip: u64,
    pub(crate) sp: u64,
    pub(crate) si: u64,
    pub(crate) dx: u64,
    pub(crate) r10: u64,
    /// The task's voluntary context switches before it.
    pub(crate) nvcsw: u64,
}

/// What one task did since its watch began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TaskCalls {
    pub(crate) tgid: u32,
    /// System calls entered.
    pub(crate) count: u32,
    /// Signals delivered.
    pub(crate) signals: u32,
    /// The first of the calls.
    pub(crate) first: Call,
}

impl From<Value> for TaskCalls {
    fn from(v: Value) -> Self {
        let [count, signals] = halves(v[0]);
        let [tgid, _] = halves(v[1]);
        Self {
            tgid,
            count,
            signals,
            first: Call {
                nr: v[2].cast_signed(),
                ip: v[3],
                sp: v[4],
                si: v[5],
                dx: v[6],
                r10: v[7],
                nvcsw: v[8],
            },
        }
    }
}

/// The two 32-bit members that share eight bytes, in the order of their addresses.
fn halves(both: u64) -> [u32; 2] {
    let b = both.to_ne_bytes();
    [
        u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
        u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
    ]
}

fn whole(first: u32) -> u64 {
    let f = first.to_ne_bytes();
    u64::from_ne_bytes([f[0], f[1], f[2], f[3], 0, 0, 0, 0])
}

pub(crate) struct Calls {
    watched: maps::HashMap<MapData, u32, Watch>,
    calls: maps::HashMap<MapData, Key, Value>,
    /// The watches under way: slot and number.
    live: HashMap<u32, u32>,
    next: u32,
    /// Detach when dropped.
    links: Vec<RawTracePointLink>,
}

impl Calls {
    pub(crate) fn new(
        watched: maps::HashMap<MapData, u32, Watch>,
        calls: maps::HashMap<MapData, Key, Value>,
    ) -> Self {
        Self {
            watched,
            calls,
            live: HashMap::new(),
            next: 1,
            links: Vec::new(),
        }
    }

    pub(crate) fn attached(&self) -> bool {
        !self.links.is_empty()
    }

    pub(crate) fn keep(&mut self, links: Vec<RawTracePointLink>) {
        self.links = links;
    }

    /// Enters a sandbox under a new number. An earlier watch of it is over.
    pub(crate) fn begin(&mut self, slot: u32) -> Result<u32, InspectorError> {
        self.sweep();
        let id = self.next;
        self.watched
            .insert(slot, [whole(id), 0], 0)
            .map_err(|e| kernel(WHAT, e))?;
        self.next += 1;
        self.live.insert(slot, id);
        Ok(id)
    }

    pub(crate) fn end(&mut self, slot: u32, id: u32) {
        if self.live.get(&slot) == Some(&id) {
            self.live.remove(&slot);
            // What stays there is replaced by the slot's next watch.
            let _ = self.watched.remove(&slot);
        }
        if self.live.is_empty() {
            self.links.clear();
        }
        self.sweep();
    }

    /// What was counted under a watch. None if it is over, or not everything found room.
    pub(crate) fn read(
        &self,
        slot: u32,
        id: u32,
    ) -> Result<Option<HashMap<u32, TaskCalls>>, InspectorError> {
        if self.live.get(&slot) != Some(&id) {
            return Ok(None);
        }
        let mut found = HashMap::new();
        for entry in self.calls.iter() {
            let ([watch, tid], value) = entry.map_err(|e| kernel(WHAT, e))?;
            if watch == id {
                found.insert(tid, value.into());
            }
        }
        // After the entries: what found no room while they were read counts too.
        match self.watched.get(&slot, 0) {
            Ok([_, 0]) => Ok(Some(found)),
            Ok(_) | Err(MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(kernel(WHAT, e)),
        }
    }

    /// Removes what belongs to no watch under way. What cannot be removed only takes room.
    fn sweep(&mut self) {
        let live: HashSet<u32> = self.live.values().copied().collect();
        let dead: Vec<Key> = self
            .calls
            .keys()
            .filter_map(Result::ok)
            .filter(|[watch, _]| !live.contains(watch))
            .collect();
        for key in dead {
            let _ = self.calls.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_at_their_offsets() {
        let mut v: Value = std::array::from_fn(|i| i as u64);
        v[0] = whole(3) + (whole(4) << 32);
        v[1] = whole(77);
        let calls = TaskCalls::from(v);
        assert_eq!((calls.count, calls.signals, calls.tgid), (3, 4, 77));
        assert_eq!((calls.first.nr, calls.first.nvcsw), (2, 8));
    }
}
