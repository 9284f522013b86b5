//! What a core says of itself: how its groups are, and which bodies it needs.

use std::collections::BTreeSet;

use raft::eraftpb::ConfState;
use tidepool_proto::ChunkName;

use crate::api::GroupStatus;
use crate::disk::Disk;
use crate::machine::{CAUGHT_UP, Core};
use crate::parked;

impl<D: Disk> Core<D> {
    /// A group's state of affairs; none where it is not here.
    pub fn status(&self, group: u32) -> Option<GroupStatus> {
        let replica = self.groups.get(&group)?;
        let g = &replica.group;
        let conf = g.conf().clone();
        let behind = if g.is_leader() {
            let all = conf.voters.iter().chain(&conf.learners);
            all.map(|id| (*id, g.lag(*id).unwrap_or(u64::MAX)))
                .filter(|(_, lag)| *lag > CAUGHT_UP)
                .collect()
        } else {
            Vec::new()
        };
        // One that waits for room is heard by nobody: whoever has room leads soon.
        let mute = self.stalled() && !g.is_alone();
        let me = self.cfg.node;
        Some(GroupStatus {
            group,
            term: g.term(),
            leader: g.leader().filter(|l| *l != me || !mute),
            leads: g.is_ready() && !mute,
            conf,
            applied: g.applied_at().0,
            commit: g.commit(),
            log_entries: g.log_entries(),
            installing: replica.install.is_some(),
            behind,
            yields: g.is_ready() && (mute || self.heir(group).is_some()),
        })
    }

    /// Applied index and term of a group, for a page of a raft snapshot whose view is opened in the same moment. Commands that are
    /// applied but wait for room on the disk are not in the state yet: there is no view then.
    pub fn view_point(&self, group: u32) -> Option<(u64, u64, ConfState)> {
        let replica = self.groups.get(&group).filter(|_| !self.stalled())?;
        let (index, term) = replica.group.applied_at();
        (term > 0).then(|| (index, term, replica.group.conf().clone()))
    }

    /// Whether an entry that is not applied yet, or not in the log yet, brings this chunk: its body must stay.
    pub fn is_named(&self, names: &[ChunkName]) -> Vec<bool> {
        let mut waiting = BTreeSet::new();
        for replica in self.groups.values() {
            for entry in replica.group.unapplied() {
                waiting.extend(parked::names_of(entry));
            }
            waiting.extend(replica.parked.names().copied());
        }
        names.iter().map(|n| waiting.contains(n)).collect()
    }

    /// Those of some bodies of a group that nothing under way here needs, whether the group is here or not. What the state names and
    /// what is held by a put is for [`Disk::delete_bodies`] to spare.
    pub fn unneeded(&self, group: u32, names: &[ChunkName]) -> Vec<ChunkName> {
        if self.groups.get(&group).is_some_and(|r| r.install.is_some()) {
            return Vec::new();
        }
        let named = self.is_named(names);
        let free = names.iter().zip(named).filter(|(_, named)| !named);
        free.map(|(n, _)| *n).collect()
    }
}
