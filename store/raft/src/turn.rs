//! A turn of the core: send what need not wait, persist what is ready, send the rest, apply what is committed, answer.
//!
//! A leader's appends go out before its own log is synced ([`Core::prepare`]), so that all members of a group sync at the same time. That is raft's
//! own rule (thesis, 10.2.1): a leader counts itself for an entry only when the entry is durable here, so a leader that dies with it
//! unsynced has acknowledged nothing by that. What a follower or candidate says always waits for its disk.

use prost::Message as _;
use raft::eraftpb::Message;
use tidepool_proto::{ChunkName, ErrorKind};
use tidepool_store_core::bugs::{Bug, is_armed};
use tidepool_store_core::{Command, Group as Kind, META_GROUP, Outcome, Refusal, Reply, apply};

use crate::api::{Action, CoreError, Rejection};
use crate::calls::waiting;
use crate::disk::{Disk, DiskError, DiskOp};
use crate::envelope::Body;
use crate::group::Committed;
use crate::machine::Core;
use crate::view::StateView;

type Answers = Vec<(u64, Result<Reply, Refusal>)>;

/// A batch that is being written, and what follows when it is.
pub(crate) struct Pending {
    ops: Vec<DiskOp>,
    sync: bool,
    then: Then,
}

enum Then {
    /// These may be sent, and what is committed applied.
    Persisted {
        send: Vec<(u32, Message)>,
    },
    /// Groups and their applied index; callers are answered.
    Applied {
        last: Vec<(u32, u64)>,
        answers: Answers,
        /// Chunks that a collection took, by group: their bodies go.
        swept: Vec<(u32, Vec<ChunkName>)>,
    },
    Nothing,
}

impl<D: Disk> Core<D> {
    /// Collects what is ready, if nothing is being written. Then the actions are to be polled, and what they send may go before
    /// [`Core::turn`] writes. Calling it is never needed: `turn` sends the same, only later.
    pub fn prepare(&mut self) {
        if self.pending.is_none() {
            self.pending = self.collect();
        }
        self.flush();
    }

    fn flush(&mut self) {
        for (to, envelopes) in std::mem::take(&mut self.outbox) {
            self.actions.push_back(Action::Send { to, envelopes });
        }
    }

    /// Persists and applies until nothing is ready, or until the disk is full, see [`Core::stalled`]. Then the actions are to be polled.
    /// After an error the core must not be used any more.
    pub fn turn(&mut self) -> Result<(), CoreError> {
        loop {
            let pending = match self.pending.take() {
                Some(pending) => pending,
                None => match self.collect() {
                    Some(pending) => pending,
                    None => break,
                },
            };
            if !pending.ops.is_empty() {
                let sync = pending.sync && !is_armed(Bug::AckBeforeFsync);
                match self.disk.write(&pending.ops, sync) {
                    Ok(()) => self.full = false,
                    Err(DiskError::Full(_)) => {
                        self.full = true;
                        self.pending = Some(pending);
                        break;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            self.written(pending.then)?;
        }
        self.settle();
        self.flush();
        Ok(())
    }

    /// What all groups have ready, in one batch. What may go before it is written is in the outbox.
    fn collect(&mut self) -> Option<Pending> {
        let (mut ops, mut send) = (Vec::new(), Vec::new());
        let mut early = Vec::new();
        let (mut any, mut sync) = (false, false);
        for (number, replica) in &mut self.groups {
            let group = *number;
            let last = replica.group.last_index();
            let Some(persist) = replica.group.ready() else {
                continue;
            };
            any = true;
            sync |= persist.sync;
            if let Some(meta) = persist.installed {
                sync = true;
                ops.push(DiskOp::Install { group });
                let to = last + 1;
                ops.push(DiskOp::DropEntries { group, from: 0, to });
                let (index, term) = (meta.index, meta.term);
                ops.push(DiskOp::Cut { group, index, term });
                ops.push(DiskOp::Applied { group, index });
                let conf = meta.conf_state.unwrap_or_default();
                ops.push(DiskOp::Conf { group, conf });
            }
            // A conflicting suffix that was longer than what replaces it.
            if let Some(end) = persist.entries.last()
                && last > end.index
                && !is_armed(Bug::ForgetTruncation)
            {
                ops.push(DiskOp::DropEntries {
                    group,
                    from: end.index + 1,
                    to: last + 1,
                });
            }
            for entry in persist.entries {
                ops.push(DiskOp::Entry { group, entry });
            }
            if let Some(hard) = persist.hard {
                ops.push(DiskOp::Hard { group, hard });
            }
            early.extend(persist.messages.into_iter().map(|m| (group, m)));
            send.extend(persist.messages_after.into_iter().map(|m| (group, m)));
        }
        for (group, message) in early {
            self.send(group, message);
        }
        any.then_some(Pending {
            ops,
            sync,
            then: Then::Persisted { send },
        })
    }

    fn written(&mut self, then: Then) -> Result<(), CoreError> {
        match then {
            Then::Persisted { send } => {
                for (group, message) in send {
                    self.send(group, message);
                }
                self.apply_all()
            }
            Then::Applied {
                last,
                answers,
                swept,
            } => {
                self.applied(last, answers)?;
                self.sweep(swept)
            }
            Then::Nothing => Ok(()),
        }
    }

    fn send(&mut self, group: u32, message: Message) {
        self.post(message.to, group, Body::Raft(Box::new(message)));
    }

    /// Applies everything that is committed, as one batch to be written next.
    fn apply_all(&mut self) -> Result<(), CoreError> {
        let (mut ops, mut last_of) = (Vec::new(), Vec::new());
        let mut answers: Answers = Vec::new();
        let (mut late, mut swept) = (Vec::new(), Vec::new());
        for (number, replica) in &mut self.groups {
            let group = *number;
            let committed = replica.group.persisted()?;
            late.extend(replica.group.late().into_iter().map(|m| (group, m)));
            let Some(last) = committed.last().map(index_of) else {
                continue;
            };
            let mut view = StateView::new(&self.disk, group);
            for entry in committed {
                match entry {
                    Committed::Empty { .. } => {}
                    Committed::Members { conf, .. } => ops.push(DiskOp::Conf { group, conf }),
                    Committed::Command { index, data, token } => {
                        let outcome = run_command(group, &view, &data);
                        if let Some(e) = view.failure() {
                            return Err(e.into());
                        }
                        // A member that has others must not go its own way: they would apply this.
                        if let Err(refusal) = &outcome.result
                            && refusal.kind == ErrorKind::Corruption
                            && !replica.group.is_alone()
                        {
                            return Err(CoreError::Damaged {
                                group,
                                what: format!("entry {index}: {refusal}"),
                            });
                        }
                        view.write(outcome.writes, &mut ops);
                        if let Ok(Reply::Swept { names, .. }) = &outcome.result {
                            swept.push((group, names.clone()));
                        }
                        if let Some(token) = token {
                            answers.push((token, outcome.result));
                        }
                    }
                }
            }
            ops.push(DiskOp::Applied { group, index: last });
            last_of.push((group, last));
        }
        for (group, message) in late {
            self.send(group, message);
        }
        if !ops.is_empty() {
            self.pending = Some(Pending {
                ops,
                sync: false,
                then: Then::Applied {
                    last: last_of,
                    answers,
                    swept,
                },
            });
        }
        Ok(())
    }

    fn applied(&mut self, last: Vec<(u32, u64)>, answers: Answers) -> Result<(), CoreError> {
        let mut cuts = Vec::new();
        for (group, index) in last {
            let Some(replica) = self.groups.get_mut(&group) else {
                continue;
            };
            replica.group.applied(index);
            if let Some((from, to, (index, term))) = replica.group.cut() {
                cuts.push(DiskOp::DropEntries { group, from, to });
                cuts.push(DiskOp::Cut { group, index, term });
            }
        }
        for (token, result) in answers {
            if self.proposals.remove(&token).is_some() {
                let result = result.map_err(Rejection::from);
                self.actions.push_back(Action::Answer { token, result });
            }
        }
        if !cuts.is_empty() {
            self.pending = Some(Pending {
                ops: cuts,
                sync: false,
                then: Then::Nothing,
            });
        }
        Ok(())
    }

    /// Deletes the bodies of what was swept, but for those that an entry brings which is not applied yet. While a raft snapshot is being
    /// fetched nothing is deleted: its state may have what this one loses. What stays for nothing is left to a scrub.
    fn sweep(&mut self, swept: Vec<(u32, Vec<ChunkName>)>) -> Result<(), CoreError> {
        for (group, names) in swept {
            let mut free = self.unneeded(group, &names);
            if is_armed(Bug::SweepNamed) {
                free = names;
            }
            self.disk.delete_bodies(group, &free)?;
        }
        Ok(())
    }

    /// Answers reads, and those whose leader is gone; reports what changed.
    fn settle(&mut self) {
        let mut changed = Vec::new();
        for (number, replica) in &mut self.groups {
            let (done, lost) = replica.group.reads();
            for token in done {
                if self.reads.remove(&token).is_some() {
                    let result = Ok(());
                    self.actions.push_back(Action::ReadReady { token, result });
                }
            }
            let again = || Rejection::Again("the group's leader changed");
            for token in lost {
                if self.reads.remove(&token).is_some() {
                    let result = Err(again());
                    self.actions.push_back(Action::ReadReady { token, result });
                }
            }
            if !replica.group.is_leader() {
                // Whether these are committed the next leader decides; sent again they do no harm.
                for token in waiting(&mut self.proposals, *number) {
                    let result = Err(again());
                    self.actions.push_back(Action::Answer { token, result });
                }
            }
            let (leader, leads) = (replica.group.leader(), replica.group.is_ready());
            let (old_leader, old_leads, old_conf) = &replica.reported;
            if (*old_leader, *old_leads) != (leader, leads) || old_conf != replica.group.conf() {
                replica.reported = (leader, leads, replica.group.conf().clone());
                changed.push(*number);
            }
        }
        for group in changed {
            self.actions.push_back(Action::Changed { group });
        }
    }
}

fn index_of(entry: &Committed) -> u64 {
    match entry {
        Committed::Command { index, .. }
        | Committed::Members { index, .. }
        | Committed::Empty { index } => *index,
    }
}

fn run_command<D: Disk>(group: u32, view: &StateView<'_, D>, data: &[u8]) -> Outcome {
    let kind = if group == META_GROUP {
        Kind::Meta
    } else {
        Kind::Shard
    };
    match Command::decode(data) {
        Ok(command) => apply(kind, view, &command),
        Err(e) => Outcome {
            result: Err(Refusal::new(
                ErrorKind::Corruption,
                format!("a log entry is not a command: {e}"),
            )),
            writes: Vec::new(),
        },
    }
}
