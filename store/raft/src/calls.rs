//! What callers ask of groups: proposals and reads, and who is told that nothing comes of them.

use std::collections::BTreeMap;

use prost::Message as _;

use tidepool_store_core::Command;

use crate::api::{Action, Rejection};
use crate::disk::Disk;
use crate::machine::Core;

impl<D: Disk> Core<D> {
    pub(crate) fn propose(&mut self, number: u32, token: u64, mut command: Command) {
        let refuse = |why| Action::Answer {
            token,
            result: Err(why),
        };
        if self.stalled() {
            let why = self.why_stalled(number);
            return self.actions.push_back(refuse(why));
        }
        command.now_ms = self.last_ms;
        let Some(replica) = self.groups.get_mut(&number) else {
            let not_here = Rejection::NotLeader {
                group: number,
                leader: None,
            };
            return self.actions.push_back(refuse(not_here));
        };
        if !replica.group.is_leader() {
            let leader = replica.group.leader();
            let elsewhere = Rejection::NotLeader {
                group: number,
                leader,
            };
            return self.actions.push_back(refuse(elsewhere));
        }
        match replica.group.propose(token, command.encode_to_vec()) {
            Ok(()) => {
                self.proposals.insert(token, number);
            }
            Err(_) => self.actions.push_back(refuse(Rejection::Again(
                "the group has too much to do, or its leader is about to change",
            ))),
        }
    }

    /// Why nothing can be had of a group while a batch waits for room: nobody else can do it, or others are asked, who have a leader soon.
    pub(crate) fn why_stalled(&self, number: u32) -> Rejection {
        match self.groups.get(&number) {
            Some(r) if r.group.is_alone() => Rejection::Full,
            replica => {
                let me = self.cfg.node;
                let leader = replica.and_then(|r| r.group.leader());
                Rejection::NotLeader {
                    group: number,
                    leader: leader.filter(|l| *l != me),
                }
            }
        }
    }

    pub(crate) fn read(&mut self, number: u32, token: u64) {
        let stalled = self.stalled();
        let answer = |result| Action::ReadReady { token, result };
        let elsewhere = |leader| {
            Err(Rejection::NotLeader {
                group: number,
                leader,
            })
        };
        let Some(replica) = self.groups.get_mut(&number) else {
            return self.actions.push_back(answer(elsewhere(None)));
        };
        if stalled {
            // Nothing newer was acknowledged by a group that has no other voter.
            let result = if replica.group.is_alone() {
                Ok(())
            } else {
                Err(self.why_stalled(number))
            };
            return self.actions.push_back(answer(result));
        }
        match replica.group.read(token) {
            Ok(()) => {
                self.reads.insert(token, number);
            }
            Err(_) => {
                let leader = replica.group.leader();
                self.actions.push_back(answer(elsewhere(leader)));
            }
        }
    }

    /// Nobody here will decide these any more.
    pub(crate) fn reject_all(&mut self, number: u32) {
        let why = Rejection::NotLeader {
            group: number,
            leader: None,
        };
        for token in waiting(&mut self.proposals, number) {
            let result = Err(why.clone());
            self.actions.push_back(Action::Answer { token, result });
        }
        for token in waiting(&mut self.reads, number) {
            let result = Err(why.clone());
            self.actions.push_back(Action::ReadReady { token, result });
        }
    }
}

/// Takes out those that wait for a group, in the order of their tokens.
pub(crate) fn waiting(all: &mut BTreeMap<u64, u32>, group: u32) -> Vec<u64> {
    let of_group = all.iter().filter(|(_, of)| **of == group);
    let tokens: Vec<u64> = of_group.map(|(token, _)| *token).collect();
    for token in &tokens {
        all.remove(token);
    }
    tokens
}
