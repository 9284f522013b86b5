//! What was read from the kernel for one sandbox and not taken yet. Pure.
//!
//! The kernel's buffers are shared by all sandboxes and read for all at once, so what belongs to the others
//! waits here. Bounded: past the bounds it forgets the details and keeps the doubt.
//!
//! Dirty inodes come with the epoch they were noted in. Those of the reading to come, or of an earlier one (a program was late), are this reading's;
//! those of a later one are of the next: they were noted while this one is being made.

use crate::effects::{DirtyInode, ExecEvent, ExitEvent, FileEffects, ProcessEvent};
use crate::raw::{Dirty, EVENT_EXEC, EVENT_EXIT, EVENT_FORK, Event};

/// Bounds of what may wait for one sandbox.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) inodes: usize,
    pub(crate) events: usize,
}

/// The files of one reading.
#[derive(Debug, Default)]
struct Files {
    /// Number and generation, in the order they came, possibly again.
    inodes: Vec<(u64, u32)>,
    /// How many of them are known to be different.
    distinct: usize,
    everything: Option<String>,
}

/// What waits for one sandbox.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Of the reading to come.
    epoch: u64,
    now: Files,
    next: Files,
    pub(crate) born: Vec<ProcessEvent>,
    pub(crate) execs: Vec<ExecEvent>,
    pub(crate) exited: Vec<ExitEvent>,
    pub(crate) events_lost: bool,
}

impl Files {
    fn doubt(&mut self, reason: impl Into<String>) {
        self.inodes = Vec::new();
        self.distinct = 0;
        self.everything.get_or_insert_with(|| reason.into());
    }

    fn push(&mut self, entry: (u64, u32), most: usize) {
        if self.everything.is_some() {
            return;
        }
        self.inodes.push(entry);
        // The log repeats little, so this is rare: only when there is twice as much as there was after the last time.
        if self.inodes.len() > most && self.inodes.len() > 2 * self.distinct {
            self.inodes.sort_unstable();
            self.inodes.dedup();
            self.distinct = self.inodes.len();
            if self.distinct > most {
                self.doubt(format!("more than {most} inodes were changed"));
            }
        }
    }
}

impl Pending {
    pub(crate) fn new(epoch: u64, doubt: &str) -> Self {
        let mut new = Self {
            epoch,
            now: Files::default(),
            next: Files::default(),
            born: Vec::new(),
            execs: Vec::new(),
            exited: Vec::new(),
            events_lost: false,
        };
        new.doubt(doubt);
        new
    }

    /// Nothing can be ruled out any more for the reading to come. The first reason stays.
    pub(crate) fn doubt(&mut self, reason: impl Into<String>) {
        self.now.doubt(reason);
    }

    pub(crate) fn dirty(&mut self, dirty: Dirty, bounds: Bounds) {
        let files = match dirty.epoch <= self.epoch {
            true => &mut self.now,
            false => &mut self.next,
        };
        files.push((dirty.ino, dirty.generation), bounds.inodes);
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

    /// Everything about the files of the reading of `epoch`, for a device in the form of `stat`.
    pub(crate) fn take_files(&mut self, dev: u64, epoch: u64) -> FileEffects {
        self.epoch = epoch + 1;
        let files = std::mem::replace(&mut self.now, std::mem::take(&mut self.next));
        if let Some(reason) = files.everything {
            return FileEffects::Everything { reason };
        }
        let mut inodes = files.inodes;
        inodes.sort_unstable();
        inodes.dedup();
        let inode = |(ino, generation)| DirtyInode {
            ino,
            dev,
            generation,
        };
        let mut inodes: Vec<_> = inodes.into_iter().map(inode).collect();
        // In the order of the type.
        inodes.sort_unstable();
        FileEffects::Inodes(inodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        inodes: 2,
        events: 2,
    };

    fn dirty(ino: u64, epoch: u64) -> Dirty {
        Dirty {
            ino,
            slot: 1,
            generation: 3,
            epoch,
        }
    }

    fn fresh() -> Pending {
        let mut pending = Pending::new(0, "just registered");
        pending.take_files(1, 0);
        pending
    }

    fn inode(ino: u64) -> DirtyInode {
        DirtyInode {
            ino,
            dev: 1,
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
        let mut pending = Pending::new(7, "just registered");
        pending.dirty(dirty(5, 7), BOUNDS);
        assert_eq!(
            pending.take_files(1, 7),
            FileEffects::Everything {
                reason: "just registered".into()
            }
        );
        assert!(pending.take_files(1, 8).is_none());
    }

    #[test]
    fn inodes_come_sorted_and_once() {
        let mut pending = fresh();
        for ino in [9, 4, 9] {
            pending.dirty(dirty(ino, 1), BOUNDS);
        }
        assert_eq!(
            pending.take_files(1, 1),
            FileEffects::Inodes(vec![inode(4), inode(9)])
        );
    }

    #[test]
    fn what_comes_in_a_later_epoch_waits_for_the_next_reading_and_what_is_late_does_not() {
        let mut pending = fresh();
        pending.dirty(dirty(4, 2), BOUNDS);
        pending.dirty(dirty(5, 1), BOUNDS);
        assert_eq!(
            pending.take_files(1, 1),
            FileEffects::Inodes(vec![inode(5)])
        );
        pending.dirty(dirty(6, 1), BOUNDS);
        pending.dirty(dirty(6, 2), BOUNDS);
        assert_eq!(
            pending.take_files(1, 2),
            FileEffects::Inodes(vec![inode(4), inode(6)])
        );
    }

    #[test]
    fn too_many_inodes_become_doubt_in_their_own_reading() {
        let mut pending = fresh();
        for ino in 0..4 {
            pending.dirty(dirty(ino, 2), BOUNDS);
        }
        assert!(pending.take_files(1, 1).is_none());
        assert!(matches!(
            pending.take_files(1, 2),
            FileEffects::Everything { .. }
        ));
        // The same ones again and again are few.
        for ino in 0..100 {
            pending.dirty(dirty(ino % 2, 3), BOUNDS);
        }
        assert!(matches!(
            pending.take_files(1, 3),
            FileEffects::Inodes(inodes) if inodes.len() == 2
        ));
    }

    #[test]
    fn too_many_or_unknown_events_are_lost_ones() {
        let mut pending = fresh();
        pending.event(event(EVENT_FORK), BOUNDS);
        pending.event(event(EVENT_EXIT), BOUNDS);
        assert!(!pending.events_lost);
        pending.event(event(EVENT_EXEC), BOUNDS);
        assert!(pending.events_lost);
        assert_eq!((pending.born.len(), pending.exited[0].status), (1, 256));

        let mut pending = fresh();
        pending.event(event(99), BOUNDS);
        assert!(pending.events_lost);
    }
}
