//! What was read from the kernel for one sandbox and not taken yet. Pure.
//!
//! The kernel's maps are shared by all sandboxes and read for all at once, so what belongs to the others
//! waits here. Bounded: past the bounds it forgets the details and keeps the doubt.

use std::collections::HashMap;

use crate::effects::{DirtyInode, ExecEvent, ExitEvent, FileEffects, ProcessEvent};
use crate::raw::{Dirty, EVENT_EXEC, EVENT_EXIT, EVENT_FORK, Event};

/// Bounds of what may wait for one sandbox.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) inodes: usize,
    pub(crate) events: usize,
}

/// What waits for one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    inodes: HashMap<u64, u32>,
    everything: Option<String>,
    pub(crate) born: Vec<ProcessEvent>,
    pub(crate) execs: Vec<ExecEvent>,
    pub(crate) exited: Vec<ExitEvent>,
    pub(crate) events_lost: bool,
}

impl Pending {
    pub(crate) fn new(doubt: &str) -> Self {
        Self {
            everything: Some(doubt.to_owned()),
            ..Self::default()
        }
    }

    /// Nothing can be ruled out any more. The first reason stays.
    pub(crate) fn doubt(&mut self, reason: impl Into<String>) {
        self.inodes = HashMap::new();
        self.everything.get_or_insert_with(|| reason.into());
    }

    pub(crate) fn dirty(&mut self, dirty: Dirty, bounds: Bounds) {
        if self.everything.is_some() {
            return;
        }
        self.inodes.insert(dirty.ino, dirty.generation);
        if self.inodes.len() > bounds.inodes {
            self.doubt(format!("more than {} inodes were changed", bounds.inodes));
        }
    }

    pub(crate) fn event(&mut self, event: Event, bounds: Bounds) {
        if self.born.len() + self.execs.len() + self.exited.len() >= bounds.events {
            self.events_lost = true;
            return;
        }
        let process = ProcessEvent {
            tid: event.tid,
            tgid: event.tgid,
            ns_tid: event.ns_tid,
            ns_tgid: event.ns_tgid,
            parent_tgid: event.parent_tgid,
            start_boottime_ns: event.start_boottime,
            comm: event.comm,
        };
        match event.kind {
            EVENT_FORK => self.born.push(process),
            EVENT_EXEC => self.execs.push(ExecEvent {
                process,
                path: event.path,
            }),
            EVENT_EXIT => self.exited.push(ExitEvent {
                process,
                status: event.exit_code,
            }),
            _ => self.events_lost = true,
        }
    }

    /// Everything about files that waited, for a device in the form of `stat`.
    pub(crate) fn take_files(&mut self, dev: u64) -> FileEffects {
        let inodes = std::mem::take(&mut self.inodes);
        match self.everything.take() {
            Some(reason) => FileEffects::Everything { reason },
            None => {
                let mut inodes: Vec<_> = inodes
                    .into_iter()
                    .map(|(ino, generation)| DirtyInode {
                        ino,
                        dev,
                        generation,
                    })
                    .collect();
                inodes.sort_unstable();
                FileEffects::Inodes(inodes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        inodes: 2,
        events: 2,
    };

    fn dirty(ino: u64) -> Dirty {
        Dirty {
            ino,
            slot: 1,
            generation: 3,
        }
    }

    fn event(kind: u32) -> Event {
        Event {
            kind,
            slot: 1,
            tid: 2,
            tgid: 2,
            ns_tid: 1,
            ns_tgid: 1,
            parent_tgid: 1,
            exit_code: 256,
            start_boottime: 9,
            comm: String::new(),
            path: String::new(),
        }
    }

    #[test]
    fn a_new_registration_starts_in_doubt_and_doubt_is_taken_once() {
        let mut pending = Pending::new("just registered");
        pending.dirty(dirty(5), BOUNDS);
        assert_eq!(
            pending.take_files(1),
            FileEffects::Everything {
                reason: "just registered".into()
            }
        );
        assert!(pending.take_files(1).is_none());
    }

    #[test]
    fn inodes_come_sorted_and_once() {
        let mut pending = Pending::default();
        for ino in [9, 4, 9] {
            pending.dirty(dirty(ino), BOUNDS);
        }
        let inode = |ino| DirtyInode {
            ino,
            dev: 1,
            generation: 3,
        };
        assert_eq!(
            pending.take_files(1),
            FileEffects::Inodes(vec![inode(4), inode(9)])
        );
    }

    #[test]
    fn too_many_inodes_become_doubt() {
        let mut pending = Pending::default();
        for ino in 0..4 {
            pending.dirty(dirty(ino), BOUNDS);
        }
        assert!(matches!(
            pending.take_files(1),
            FileEffects::Everything { .. }
        ));
    }

    #[test]
    fn too_many_or_unknown_events_are_lost_ones() {
        let mut pending = Pending::default();
        pending.event(event(EVENT_FORK), BOUNDS);
        pending.event(event(EVENT_EXIT), BOUNDS);
        assert!(!pending.events_lost);
        pending.event(event(EVENT_EXEC), BOUNDS);
        assert!(pending.events_lost);
        assert_eq!((pending.born.len(), pending.exited[0].status), (1, 256));

        let mut pending = Pending::default();
        pending.event(event(99), BOUNDS);
        assert!(pending.events_lost);
    }
}
