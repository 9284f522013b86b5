//! Bodies and pages of raft snapshots that are fetched from other members, for appends that wait and for new replicas.

use raft::eraftpb::ConfState;
use tidepool_proto::ChunkName;

use crate::api::{Action, CoreError};
use crate::disk::{Disk, DiskError};
use crate::install;
use crate::machine::Core;
use crate::messages::everybody;
use crate::parked;

/// What one is for: a group's appends, or its raft snapshot.
#[derive(Clone, Copy)]
pub(crate) enum Fetch {
    Parked(u32),
    Install(u32),
}

impl<D: Disk> Core<D> {
    /// Where it stands which fetch is waited for.
    fn awaited(&mut self, what: Fetch) -> Option<&mut Option<u64>> {
        let (Fetch::Parked(group) | Fetch::Install(group)) = what;
        let replica = self.groups.get_mut(&group)?;
        Some(match what {
            Fetch::Parked(_) => &mut replica.parked.fetch,
            Fetch::Install(_) => &mut replica.install.as_mut()?.fetch,
        })
    }

    /// What an answered fetch was for; none where that is not waited for any more: another snapshot took the place of the one it was
    /// for, or the group went and came again. A page of one view must never pass for one of another.
    pub(crate) fn take_fetch(&mut self, fetch: u64) -> Option<Fetch> {
        let what = self.fetches.remove(&fetch)?;
        (*self.awaited(what)? == Some(fetch)).then_some(what)
    }

    /// A new fetch, which is waited for from now on.
    fn fetch(&mut self, what: Fetch) -> u64 {
        let fetch = self.next_fetch;
        self.next_fetch += 1;
        self.fetches.insert(fetch, what);
        if let Some(awaited) = self.awaited(what) {
            *awaited = Some(fetch);
        }
        fetch
    }

    fn fetch_bodies(&mut self, what: Fetch, from: u64, index: u64, names: Vec<ChunkName>) {
        let (Fetch::Parked(group) | Fetch::Install(group)) = what;
        let fetch = self.fetch(what);
        self.actions.push_back(Action::FetchBodies {
            fetch,
            from,
            group,
            index,
            names,
        });
    }

    /// Steps what waits no more, and asks for what is missing.
    pub(crate) fn advance(&mut self, number: u32) -> Result<(), CoreError> {
        while let Some(replica) = self.groups.get_mut(&number) {
            match replica.parked.next(&self.disk)? {
                parked::Next::Step(message) => replica.group.step(*message),
                parked::Next::Fetch { from, index, names } => {
                    let from = source(
                        replica.group.conf(),
                        self.cfg.node,
                        from,
                        replica.parked.in_vain,
                    );
                    self.fetch_bodies(Fetch::Parked(number), from, index, names);
                }
                parked::Next::Wait => break,
            }
        }
        let Some(replica) = self.groups.get_mut(&number) else {
            return Ok(());
        };
        let Some(install) = &mut replica.install else {
            return Ok(());
        };
        let from = install.from;
        match install.next(&self.disk)? {
            install::Next::Wait => {}
            install::Next::Done(message) => {
                replica.install = None;
                replica.group.step(*message);
            }
            install::Next::Page(request) => {
                let fetch = self.fetch(Fetch::Install(number));
                self.actions.push_back(Action::FetchPage {
                    fetch,
                    from,
                    request,
                });
            }
            install::Next::Bodies(names) => {
                let index = install.index();
                let from = source(replica.group.conf(), self.cfg.node, from, install.in_vain);
                self.fetch_bodies(Fetch::Install(number), from, index, names);
            }
        }
        Ok(())
    }

    pub(crate) fn page(&mut self, number: u32, page: crate::page::Page) -> Result<(), CoreError> {
        let Some(replica) = self.groups.get_mut(&number) else {
            return Ok(());
        };
        let Some(install) = &mut replica.install else {
            return Ok(());
        };
        if let Some(ops) = install.page(page) {
            match self.disk.write(&ops, false) {
                Ok(()) => {}
                // The rows are not there: from the beginning, when there is room.
                Err(DiskError::Full(_)) => replica.install = None,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whom to ask for bodies: the sender of what names them, who should have them, and after fetches in vain the other members in turn.
fn source(conf: &ConfState, me: u64, sender: u64, in_vain: usize) -> u64 {
    let mut others: Vec<u64> = everybody(conf)
        .filter(|id| ![me, sender].contains(id))
        .collect();
    others.sort_unstable();
    others.dedup();
    match in_vain % (others.len() + 1) {
        0 => sender,
        n => others[n - 1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_asked_for_of_the_sender_first_and_of_the_others_in_turn() {
        let conf = ConfState {
            voters: vec![3, 1, 2],
            learners: vec![4],
            ..ConfState::default()
        };
        let asked: Vec<u64> = (0..5).map(|n| source(&conf, 2, 3, n)).collect();
        assert_eq!(asked, [3, 1, 4, 3, 1]);
        // A new replica knows no members yet.
        assert_eq!(source(&ConfState::default(), 2, 3, 7), 3);
    }
}
