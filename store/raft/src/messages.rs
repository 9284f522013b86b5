//! What members say to each other, the replicas that are made by it, and those that go because of it.
//!
//! A replica is made where a leader's message finds none, and begins at nothing. One that hears of no leader asks whether it is still a
//! member, and goes when one who knows more says that it is not.

use raft::eraftpb::{ConfState, Message, MessageType};

use crate::api::{Action, CoreError};
use crate::disk::{Disk, DiskError, DiskOp};
use crate::envelope::{Body, Envelope};
use crate::install::Install;
use crate::machine::Core;

/// Ticks without a leader's message after which a replica asks whether it is still a member, again and again.
const LONELY_TICKS: u32 = 50;

impl<D: Disk> Core<D> {
    pub(crate) fn message(&mut self, from: u64, envelope: Envelope) -> Result<(), CoreError> {
        if envelope.body == Body::NoRoom {
            self.room.none_at(from, self.ticks);
            return Ok(());
        }
        // While a batch waits for room nothing can be stepped; raft sends again.
        if self.stalled() || from == self.cfg.node {
            return Ok(());
        }
        let number = envelope.group;
        match envelope.body {
            Body::Raft(message) => {
                if message.from != from || message.to != self.cfg.node {
                    return Ok(());
                }
                if !self.groups.contains_key(&number) && !self.create(number, &message)? {
                    return Ok(());
                }
                let Some(replica) = self.groups.get_mut(&number) else {
                    return Ok(());
                };
                // What others refuse it says nothing of: one that was removed asks for votes, and is answered, for ever.
                if is_from_leader(&message) {
                    replica.lonely = 0;
                }
                // A replica that knows no members has no vote: one that was deleted and made again, its log forgotten, could
                // otherwise help members of long ago to a quorum. One that was removed, and has its log, votes on: those who do
                // not know of it yet may need it.
                let asks_for_vote = matches!(
                    message.msg_type(),
                    MessageType::MsgRequestVote | MessageType::MsgRequestPreVote
                );
                if asks_for_vote && knows_nobody(replica.group.conf()) {
                    return Ok(());
                }
                match message.msg_type() {
                    MessageType::MsgAppend if !message.entries.is_empty() => {
                        replica.parked.push(from, *message);
                    }
                    MessageType::MsgSnapshot => {
                        let known = |i: &Install| i.is(from, message.term);
                        if message.term >= replica.group.term()
                            && !replica.install.as_ref().is_some_and(known)
                        {
                            replica.install = Some(Install::new(number, from, *message));
                        }
                    }
                    _ => replica.group.step(*message),
                }
                self.advance(number)
            }
            Body::Member { last } => {
                if let Some(replica) = self.groups.get(&number)
                    && replica.group.is_ready()
                    && !everybody(replica.group.conf()).any(|id| id == from)
                    && last <= replica.group.applied_at().0
                {
                    let index = replica.group.applied_at().0;
                    let body = Body::NotMember { index };
                    self.post(from, number, body);
                }
                Ok(())
            }
            Body::NotMember { index } => {
                // What is not below this log cannot be an older list of members than the one here.
                let ours = self.groups.get(&number);
                if ours.is_some_and(|r| r.group.last_index() <= index && !r.group.is_alone()) {
                    self.destroy(number)?;
                }
                Ok(())
            }
            Body::NoRoom => Ok(()),
        }
    }

    pub(crate) fn post(&mut self, to: u64, group: u32, body: Body) {
        self.outbox
            .entry(to)
            .or_default()
            .push(Envelope { group, body });
    }

    /// Makes an empty replica where a leader wants one here.
    pub(crate) fn create(&mut self, number: u32, message: &Message) -> Result<bool, CoreError> {
        let unwanted = self
            .targets
            .get(&number)
            .is_some_and(|t| !t.voters.is_empty() && !t.has(self.cfg.node));
        if !is_from_leader(message) || unwanted {
            return Ok(false);
        }
        // Term and vote outlived the replica that was here before; what it knew to be committed went with its log.
        let mut hard = self.disk.load(number)?.hard;
        hard.commit = 0;
        let ops = [
            DiskOp::Hard {
                group: number,
                hard,
            },
            DiskOp::Conf {
                group: number,
                conf: ConfState::default(),
            },
        ];
        match self.disk.write(&ops, false) {
            Ok(()) => {}
            Err(DiskError::Full(_)) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        self.add(number)?;
        self.actions.push_back(Action::Changed { group: number });
        Ok(true)
    }

    pub(crate) fn destroy(&mut self, number: u32) -> Result<(), CoreError> {
        let ops = [
            DiskOp::ClearStage { group: number },
            DiskOp::Destroy { group: number },
        ];
        match self.disk.write(&ops, true) {
            Ok(()) => {}
            Err(DiskError::Full(_)) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        self.groups.remove(&number);
        self.reject_all(number);
        self.actions.push_back(Action::Changed { group: number });
        Ok(())
    }

    pub(crate) fn ask_lonely(&mut self, number: u32) {
        let Some(replica) = self.groups.get_mut(&number) else {
            return;
        };
        // One that was removed remembers its last leader for ever: what counts is whether anything is heard.
        if replica.group.is_leader() {
            replica.lonely = 0;
            return;
        }
        replica.lonely += 1;
        if !replica.lonely.is_multiple_of(LONELY_TICKS) {
            return;
        }
        let last = replica.group.last_index();
        let mut asked: Vec<u64> = everybody(replica.group.conf()).collect();
        let target = self.targets.get(&number);
        asked.extend(target.iter().flat_map(|t| &t.voters));
        asked.sort_unstable();
        asked.dedup();
        let me = self.cfg.node;
        for to in asked.into_iter().filter(|id| *id != me) {
            self.post(to, number, Body::Member { last });
        }
    }
}

/// Whether only a leader sends this.
fn is_from_leader(message: &Message) -> bool {
    matches!(
        message.msg_type(),
        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
    )
}

/// Whether this is the list of members of a replica that was just made.
fn knows_nobody(conf: &ConfState) -> bool {
    conf.voters.is_empty() && conf.learners.is_empty()
}

/// Everybody who belongs to a group in any way: who votes or learns, now or before or after the change under way. One may come several times.
pub(crate) fn everybody(conf: &ConfState) -> impl Iterator<Item = u64> + '_ {
    let lists = [
        &conf.voters,
        &conf.voters_outgoing,
        &conf.learners,
        &conf.learners_next,
    ];
    lists.into_iter().flatten().copied()
}
