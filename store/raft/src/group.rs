//! One raft group. The caller asks [`Group::ready`] for what must be persisted, persists it (one sync for all its groups), says so with
//! [`Group::persisted`], applies what that gives back, and says that with [`Group::applied`]. Between `ready` and
//! `persisted` nothing may be proposed or stepped: the type holds what is under way and refuses.

use std::collections::{BTreeMap, BTreeSet};

use raft::eraftpb::{
    ConfChange, ConfChangeV2, ConfState, Entry, EntryType, HardState, Message, SnapshotMetadata,
};
use raft::{Config, ProgressState, RawNode, Ready, SnapshotStatus, StateRole, Storage};
use raft_prost::Message as _;

use tidepool_store_core::bugs::{Bug, is_armed};

use crate::api::CoreError;
use crate::log::{LoadedLog, RaftLog};

/// Entries kept behind the applied index, for followers that are a little late.
const KEEP: u64 = 512;
/// The log is cut when it holds more than this.
const CUT_AT: (usize, usize) = (4096, 16 << 20);

/// How long a log may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogBounds {
    /// Entries kept behind the applied index, for followers that are a little late.
    pub keep: u64,
    /// The log is cut when it holds this many entries.
    pub cut_at: usize,
}

impl Default for LogBounds {
    fn default() -> Self {
        Self {
            keep: KEEP,
            cut_at: CUT_AT.0,
        }
    }
}

/// Ticks after which a raft snapshot of which nothing was heard is announced again. A member that still fetches it ignores the second.
const ANNOUNCE_TICKS: u32 = 50;

/// Who this node is in the group.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    pub group: u32,
    pub node: u64,
    /// Tells this run's proposals from those of earlier runs in the same log; random.
    pub run: u64,
    /// Ticks without a leader after which the node stands for election, if it is always to be the same number; otherwise
    /// it is drawn anew each time. A simulation needs it fixed, and distinct on each node.
    pub election_ticks: Option<usize>,
}

/// A proposal that was not taken; another time it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotNow;

/// What must be durable before [`Group::persisted`].
#[derive(Debug, Default)]
pub struct Persist {
    /// Replaces everything from the first one's index on.
    pub entries: Vec<Entry>,
    pub hard: Option<HardState>,
    /// A raft snapshot was taken over: the staged state becomes the state, the log begins behind it.
    pub installed: Option<SnapshotMetadata>,
    /// Whether it has to be synced, or may wait for the next sync.
    pub sync: bool,
    /// To be sent at once.
    pub messages: Vec<Message>,
    /// To be sent after it is durable.
    pub messages_after: Vec<Message>,
}

/// What is committed and has to be applied, in order.
#[derive(Debug)]
pub enum Committed {
    /// A command, and the token with which it was proposed in this run.
    Command {
        index: u64,
        data: Vec<u8>,
        token: Option<u64>,
    },
    /// A change of members, made already; the new state has to be written.
    Members { index: u64, conf: ConfState },
    /// Nothing to do but to remember the index.
    Empty { index: u64 },
}

/// One group.
pub struct Group {
    raw: RawNode<RaftLog>,
    cfg: GroupConfig,
    under_way: Option<Ready>,
    committed: Vec<Entry>,
    /// Messages that came up behind a ready: to be sent with the next.
    late: Vec<Message>,
    /// Members to which a raft snapshot was announced, and for how many ticks nothing has come of it.
    announced: BTreeMap<u64, u32>,
    /// Reads that wait for their index: the tokens in their request contexts.
    reads_asked: BTreeSet<u64>,
    reads_waiting: Vec<(u64, u64)>,
    /// Reads that came before this leader had committed in its term.
    reads_early: Vec<u64>,
    applied: u64,
    pub(crate) bounds: LogBounds,
}

impl Group {
    /// A group from its log. A sole voter stands for election at once.
    pub fn new(
        cfg: GroupConfig,
        loaded: LoadedLog,
        logger: &slog::Logger,
    ) -> Result<Self, CoreError> {
        let applied = loaded.applied;
        let group = cfg.group;
        let log = RaftLog::new(loaded).map_err(|what| CoreError::Damaged { group, what })?;
        let fixed = cfg.election_ticks;
        let config = Config {
            id: cfg.node,
            applied,
            election_tick: 10,
            heartbeat_tick: 2,
            max_size_per_msg: 1 << 20,
            max_inflight_msgs: 64,
            max_uncommitted_size: 64 << 20,
            max_committed_size_per_ready: 16 << 20,
            pre_vote: true,
            check_quorum: true,
            min_election_tick: fixed.unwrap_or(0),
            max_election_tick: fixed.map_or(0, |n| n + 1),
            ..Config::default()
        };
        let wrong = |source| CoreError::Raft { group, source };
        let mut raw = RawNode::new(&config, log, logger).map_err(wrong)?;
        if raw.store().conf().voters == [cfg.node] && raw.store().conf().voters_outgoing.is_empty()
        {
            raw.campaign().map_err(wrong)?;
        }
        Ok(Self {
            raw,
            cfg,
            under_way: None,
            committed: Vec::new(),
            late: Vec::new(),
            announced: BTreeMap::new(),
            reads_asked: BTreeSet::new(),
            reads_waiting: Vec::new(),
            reads_early: Vec::new(),
            applied,
            bounds: LogBounds::default(),
        })
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.cfg.group
    }

    /// Whether this node leads, and everything of earlier terms is committed: reads and writes are answered.
    pub fn is_ready(&self) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.raft.commit_to_current_term()
    }

    /// Whether this node leads.
    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Whether this node is the only voter.
    pub fn is_alone(&self) -> bool {
        let conf = self.raw.store().conf();
        conf.voters == [self.cfg.node] && conf.voters_outgoing.is_empty()
    }

    /// Proposes a command. `token` comes back with it when it is committed.
    pub fn propose(&mut self, token: u64, data: Vec<u8>) -> Result<(), NotNow> {
        if self.under_way.is_some() || !self.is_leader() {
            return Err(NotNow);
        }
        let mut context = self.cfg.run.to_le_bytes().to_vec();
        context.extend_from_slice(&token.to_le_bytes());
        self.raw.propose(context, data).map_err(|_| NotNow)
    }

    /// Asks for a point after which a read sees everything acknowledged before now; `token` comes back from [`Group::reads`].
    pub fn read(&mut self, token: u64) -> Result<(), NotNow> {
        if self.under_way.is_some() || !self.is_leader() {
            return Err(NotNow);
        }
        // raft-rs drops a request silently before the leader has committed in its term.
        if !self.raw.raft.commit_to_current_term() {
            self.reads_early.push(token);
            return Ok(());
        }
        if is_armed(Bug::StaleRead) {
            self.reads_waiting.push((0, token));
            return Ok(());
        }
        self.reads_asked.insert(token);
        let mut context = self.cfg.run.to_le_bytes().to_vec();
        context.extend_from_slice(&token.to_le_bytes());
        self.raw.read_index(context);
        Ok(())
    }

    /// One tick of logical time.
    pub fn tick(&mut self) {
        if self.under_way.is_some() {
            return;
        }
        self.raw.tick();
        if !self.is_leader() {
            self.announced.clear();
            return;
        }
        // A member that is sent a raft snapshot gets nothing else until it has it; one that died meanwhile would wait for ever.
        let waiting: Vec<u64> = self
            .raw
            .raft
            .prs()
            .iter()
            .filter(|(_, p)| p.state == ProgressState::Snapshot)
            .map(|(id, _)| *id)
            .collect();
        self.announced.retain(|id, _| waiting.contains(id));
        for id in waiting {
            let ticks = self.announced.entry(id).or_default();
            *ticks += 1;
            if *ticks > ANNOUNCE_TICKS {
                *ticks = 0;
                self.raw.report_snapshot(id, SnapshotStatus::Failure);
            }
        }
    }

    /// A message from another member. What cannot be taken is dropped, as the network might have done.
    pub fn step(&mut self, message: Message) {
        if self.under_way.is_none() {
            // Errors tell of messages from strangers and from terms gone by.
            let _ = self.raw.step(message);
        }
    }

    /// Proposes a change of members. Refused ones turn into empty entries.
    pub fn propose_members(&mut self, change: ConfChangeV2) -> Result<(), NotNow> {
        if self.under_way.is_some() || !self.is_ready() || self.raw.raft.has_pending_conf() {
            return Err(NotNow);
        }
        self.raw
            .propose_conf_change(Vec::new(), change)
            .map_err(|_| NotNow)
    }

    /// Hands leadership to a voter, if this node leads.
    pub fn transfer(&mut self, to: u64) {
        if self.under_way.is_none() && self.is_leader() && self.raw.raft.lead_transferee.is_none() {
            self.raw.transfer_leader(to);
        }
    }

    /// The leader, where it is known.
    pub fn leader(&self) -> Option<u64> {
        Some(self.raw.raft.leader_id).filter(|id| *id != 0)
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// The committed index.
    pub fn commit(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// The members.
    pub fn conf(&self) -> &ConfState {
        self.raw.store().conf()
    }

    /// The last applied index, and its term.
    pub fn applied_at(&self) -> (u64, u64) {
        let term = self.raw.store().term(self.applied).unwrap_or(0);
        (self.applied, term)
    }

    /// Entries kept.
    pub fn log_entries(&self) -> u64 {
        self.raw.store().size().0 as u64
    }

    /// Of a leader: how many committed entries a member lacks; none of a stranger, of one that was not heard lately, and of one that has
    /// nothing yet: it knows no members and could not vote, however short the log is.
    pub fn lag(&self, member: u64) -> Option<u64> {
        if member == self.cfg.node {
            return Some(0);
        }
        let progress = self.raw.raft.prs().get(member)?;
        (progress.recent_active && progress.matched > 0)
            .then(|| self.commit().saturating_sub(progress.matched))
    }

    /// Entries that are in the log and not applied yet.
    pub fn unapplied(&self) -> impl Iterator<Item = &Entry> {
        let applied = self.applied;
        let unstable = self.raw.raft.raft_log.unstable.entries.iter();
        self.raw
            .store()
            .after(applied)
            .chain(unstable.filter(move |e| e.index > applied))
    }

    /// What has to be persisted next; none where nothing is new.
    pub fn ready(&mut self) -> Option<Persist> {
        if self.under_way.is_some() || !self.raw.has_ready() {
            return None;
        }
        let mut ready = self.raw.ready();
        self.committed.extend(ready.take_committed_entries());
        for state in ready.take_read_states() {
            if let Some(token) = self.token(&state.request_ctx)
                && self.reads_asked.remove(&token)
            {
                self.reads_waiting.push((state.index, token));
            }
        }
        let entries = ready.take_entries();
        let hard = ready.hs().cloned();
        let installed = Some(ready.snapshot().clone())
            .filter(|s| !s.is_empty())
            .map(|s| s.metadata.unwrap_or_default());
        let log = self.raw.mut_store();
        if let Some(meta) = &installed {
            log.restart(meta);
        }
        log.append(&entries);
        if let Some(hard) = &hard {
            log.set_hard(hard.clone());
        }
        let persist = Persist {
            sync: ready.must_sync(),
            messages: ready.take_messages(),
            messages_after: ready.take_persisted_messages(),
            entries,
            hard,
            installed,
        };
        self.under_way = Some(ready);
        Some(persist)
    }

    /// What [`Group::ready`] gave is durable. Gives what is committed now.
    pub fn persisted(&mut self) -> Result<Vec<Committed>, CoreError> {
        if let Some(ready) = self.under_way.take() {
            if let Some(meta) = &ready.snapshot().metadata
                && meta.index > self.applied
            {
                self.applied = meta.index;
            }
            let snapshot = ready.snapshot().metadata.as_ref().map_or(0, |m| m.index);
            let mut light = self.raw.advance_append(ready);
            if let Some(commit) = light.commit_index() {
                self.raw.mut_store().set_commit(commit);
            }
            self.committed.extend(light.take_committed_entries());
            self.late.extend(light.take_messages());
            if snapshot > 0 {
                self.raw.advance_apply_to(snapshot);
            }
        }
        let entries = std::mem::take(&mut self.committed);
        entries.into_iter().map(|e| self.classify(e)).collect()
    }

    /// Messages that came up behind the last ready; they may be sent.
    pub fn late(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.late)
    }

    fn classify(&mut self, entry: Entry) -> Result<Committed, CoreError> {
        let index = entry.index;
        let group = self.cfg.group;
        let damaged = |e: raft_prost::DecodeError| CoreError::Damaged {
            group,
            what: format!("entry {index} is not a change of members: {e}"),
        };
        let change = match entry.entry_type() {
            EntryType::EntryNormal if entry.data.is_empty() => {
                return Ok(Committed::Empty { index });
            }
            EntryType::EntryNormal => {
                let token = self.token(&entry.context);
                return Ok(Committed::Command {
                    index,
                    data: entry.data,
                    token,
                });
            }
            EntryType::EntryConfChange => {
                let change = ConfChange::decode(&*entry.data).map_err(damaged)?;
                raft_change(change)
            }
            EntryType::EntryConfChangeV2 => ConfChangeV2::decode(&*entry.data).map_err(damaged)?,
        };
        let conf = self
            .raw
            .apply_conf_change(&change)
            .map_err(|source| CoreError::Raft { group, source })?;
        self.raw.mut_store().set_conf(conf.clone());
        // A leader that was removed (it took over while that was decided) leads no more: raft-rs would go on, and fall over the first
        // acknowledgement.
        if self.is_leader() && self.raw.raft.prs().get(self.cfg.node).is_none() {
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, 0);
        }
        Ok(Committed::Members { index, conf })
    }

    /// Everything up to `index` is applied.
    pub fn applied(&mut self, index: u64) {
        if index > self.applied {
            self.applied = index;
            self.raw.mut_store().set_applied(index);
            self.raw.advance_apply_to(index);
        }
        if self.is_ready() {
            for token in std::mem::take(&mut self.reads_early) {
                // Ready implies that it leads and nothing is under way here.
                let _ = self.read(token);
            }
        }
    }

    /// Reads that may go ahead, and, where this node leads no more, reads that may not.
    pub fn reads(&mut self) -> (Vec<u64>, Vec<u64>) {
        let applied = self.applied;
        let done = self
            .reads_waiting
            .extract_if(.., |(index, _)| *index <= applied)
            .map(|(_, token)| token)
            .collect();
        let mut lost = Vec::new();
        if !self.is_leader() {
            lost.extend(std::mem::take(&mut self.reads_asked));
            lost.append(&mut self.reads_early);
        }
        (done, lost)
    }

    /// Cuts the log where it has grown. Gives what is to be deleted, `from..to`, and the new cut's index and term.
    pub fn cut(&mut self) -> Option<(u64, u64, (u64, u64))> {
        let log = self.raw.store();
        let (entries, bytes) = log.size();
        if entries < self.bounds.cut_at && bytes < CUT_AT.1 {
            return None;
        }
        let (from, _) = log.cut();
        // A log that is long in bytes keeps fewer.
        let keep = if bytes < CUT_AT.1 {
            self.bounds.keep
        } else {
            16
        };
        let to = self.applied.checked_sub(keep).filter(|to| *to > from)?;
        self.raw.mut_store().cut_to(to);
        Some((from + 1, to + 1, self.raw.store().cut()))
    }

    fn token(&self, context: &[u8]) -> Option<u64> {
        let (run, token) = context.split_first_chunk::<8>()?;
        if u64::from_le_bytes(*run) != self.cfg.run {
            return None;
        }
        Some(u64::from_le_bytes(token.try_into().ok()?))
    }

    /// The last index in the log.
    pub fn last_index(&self) -> u64 {
        self.raw.store().last_index().unwrap_or(0)
    }
}

fn raft_change(change: ConfChange) -> ConfChangeV2 {
    use raft::eraftpb::ConfChangeSingle;
    ConfChangeV2 {
        changes: vec![ConfChangeSingle {
            change_type: change.change_type,
            node_id: change.node_id,
        }],
        context: change.context,
        ..ConfChangeV2::default()
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfState, MessageType};

    use super::*;

    fn logger() -> slog::Logger {
        slog::Logger::root(slog::Discard, slog::o!())
    }

    fn group(node: u64, voters: &[u64], run: u64, mut loaded: LoadedLog) -> Group {
        loaded.conf = ConfState {
            voters: voters.to_vec(),
            ..ConfState::default()
        };
        let cfg = GroupConfig {
            group: 1,
            node,
            run,
            election_ticks: None,
        };
        Group::new(cfg, loaded, &logger()).unwrap()
    }

    /// What a member keeps on its disk, and what it applied.
    #[derive(Default)]
    struct Disk {
        log: LoadedLog,
        applied: Vec<(Vec<u8>, Option<u64>)>,
    }

    /// Persists and applies what is ready, and gives the messages to send.
    fn turn(group: &mut Group, disk: &mut Disk) -> Vec<Message> {
        let mut out = Vec::new();
        while let Some(persist) = group.ready() {
            assert_eq!(group.propose(0, vec![1]), Err(NotNow));
            if let Some(first) = persist.entries.first() {
                disk.log.entries.retain(|e| e.index < first.index);
            }
            disk.log.entries.extend(persist.entries);
            disk.log.hard = persist.hard.unwrap_or(disk.log.hard.clone());
            out.extend(persist.messages);
            out.extend(persist.messages_after);
            let committed = group.persisted().unwrap();
            out.extend(group.late());
            for committed in committed {
                disk.log.applied = match committed {
                    Committed::Command { index, data, token } => {
                        disk.applied.push((data, token));
                        index
                    }
                    Committed::Members { index, .. } | Committed::Empty { index } => index,
                };
            }
            group.applied(disk.log.applied);
        }
        out
    }

    #[test]
    fn a_sole_voter_leads_answers_and_comes_back() {
        let mut disk = Disk::default();
        let mut one = group(1, &[1], 7, LoadedLog::default());
        assert!(!one.is_ready());
        // A read that comes before the first commit of its term waits for it.
        one.read(5).unwrap();
        assert_eq!(one.reads(), (vec![], vec![]));
        turn(&mut one, &mut disk);
        assert!(one.is_ready() && one.is_alone());
        assert_eq!(one.reads(), (vec![5], vec![]));
        one.propose(1, b"a".to_vec()).unwrap();
        one.propose(2, b"b".to_vec()).unwrap();
        one.read(3).unwrap();
        turn(&mut one, &mut disk);
        assert_eq!(one.reads(), (vec![3], vec![]));
        let wanted = [(b"a".to_vec(), Some(1)), (b"b".to_vec(), Some(2))];
        assert_eq!(disk.applied, wanted);

        // Another run does not take the old one's tokens for its own, and applies nothing twice.
        one.propose(3, b"c".to_vec()).unwrap();
        let persist = one.ready().unwrap();
        disk.log.entries.extend(persist.entries);
        drop(one);
        let mut two = group(1, &[1], 8, disk.log.clone());
        turn(&mut two, &mut disk);
        assert!(two.is_ready());
        assert_eq!(disk.applied[2..], [(b"c".to_vec(), None)]);
    }

    #[test]
    fn a_long_log_is_cut_behind_what_is_applied() {
        let mut disk = Disk::default();
        let mut one = group(1, &[1], 7, LoadedLog::default());
        turn(&mut one, &mut disk);
        for token in 0..CUT_AT.0 as u64 {
            one.propose(token, vec![0; 8]).unwrap();
            turn(&mut one, &mut disk);
        }
        let (from, to, cut) = one.cut().unwrap();
        assert_eq!((from, to - 1), (1, cut.0));
        assert_eq!(cut.0, disk.log.applied - KEEP);
        assert!(one.cut().is_none());
        disk.log.entries.retain(|e| e.index >= to);
        disk.log.cut = cut;
        let mut two = group(1, &[1], 8, disk.log.clone());
        turn(&mut two, &mut disk);
        assert!(two.is_ready());
    }

    #[test]
    fn three_voters_agree_through_a_change_of_leader() {
        let voters = [1, 2, 3];
        let mut groups: Vec<Group> = voters
            .iter()
            .map(|n| group(*n, &voters, *n, LoadedLog::default()))
            .collect();
        let mut disks: Vec<Disk> = voters.iter().map(|_| Disk::default()).collect();
        // Everything reaches everyone but the one that is cut off.
        let settle = |groups: &mut [Group], disks: &mut [Disk], off: Option<usize>| loop {
            let mut mail = Vec::new();
            for (i, group) in groups.iter_mut().enumerate() {
                mail.extend(turn(group, &mut disks[i]).into_iter().map(|m| (i, m)));
            }
            if mail.is_empty() {
                break;
            }
            for (from, message) in mail {
                let to = message.to as usize - 1;
                if Some(from) != off && Some(to) != off {
                    groups[to].step(message);
                }
            }
        };
        let elect = |groups: &mut [Group], disks: &mut [Disk], off: Option<usize>| {
            for _ in 0..1000 {
                groups.iter_mut().for_each(Group::tick);
                settle(groups, disks, off);
                let ready = |(i, g): (usize, &Group)| Some(i) != off && g.is_ready();
                if let Some(leader) = groups.iter().enumerate().position(ready) {
                    return leader;
                }
            }
            panic!("nobody was elected");
        };
        let first = elect(&mut groups, &mut disks, None);
        groups[first].propose(1, b"a".to_vec()).unwrap();
        groups[first].read(9).unwrap();
        settle(&mut groups, &mut disks, None);
        assert_eq!(groups[first].reads(), (vec![9], vec![]));
        // The leader is cut off with a proposal and a read that it cannot finish.
        groups[first].propose(2, b"lost".to_vec()).unwrap();
        groups[first].read(10).unwrap();
        settle(&mut groups, &mut disks, Some(first));
        assert_eq!(groups[first].reads(), (vec![], vec![]));
        let second = elect(&mut groups, &mut disks, Some(first));
        assert_ne!(first, second);
        groups[second].propose(1, b"b".to_vec()).unwrap();
        settle(&mut groups, &mut disks, Some(first));
        for _ in 0..50 {
            groups.iter_mut().for_each(Group::tick);
            settle(&mut groups, &mut disks, None);
        }
        assert!(!groups[first].is_leader());
        assert_eq!(groups[first].reads(), (vec![], vec![10]));
        for disk in &disks {
            let data: Vec<_> = disk.applied.iter().map(|(d, _)| d.as_slice()).collect();
            assert_eq!(data, [b"a", b"b"]);
        }
    }

    /// The first of three voters leads; what `lost` says does not arrive.
    fn deliver(
        groups: &mut [Group],
        disks: &mut [Disk],
        lost: impl Fn(usize, usize, &Message) -> bool,
    ) {
        loop {
            let mut mail = Vec::new();
            for (i, group) in groups.iter_mut().enumerate() {
                mail.extend(turn(group, &mut disks[i]).into_iter().map(|m| (i, m)));
            }
            if mail.is_empty() {
                return;
            }
            for (from, message) in mail {
                let to = message.to as usize - 1;
                if to < groups.len() && !lost(from, to, &message) {
                    groups[to].step(message);
                }
            }
        }
    }

    fn three() -> (Vec<Group>, Vec<Disk>) {
        let of = |n: &u64| group(*n, &[1, 2, 3], *n, LoadedLog::default());
        let mut groups: Vec<Group> = [1, 2, 3].iter().map(of).collect();
        let mut disks: Vec<Disk> = (0..3).map(|_| Disk::default()).collect();
        groups[0].raw.campaign().unwrap();
        deliver(&mut groups, &mut disks, |_, _, _| false);
        assert!(groups[0].is_ready());
        (groups, disks)
    }

    fn change(kind: ConfChangeType, node_id: u64) -> ConfChangeV2 {
        let mut one = ConfChangeSingle {
            node_id,
            ..ConfChangeSingle::default()
        };
        one.set_change_type(kind);
        ConfChangeV2 {
            changes: vec![one],
            ..ConfChangeV2::default()
        }
    }

    #[test]
    fn a_leader_that_is_removed_by_what_it_took_over_leads_no_more() {
        let (mut groups, mut disks) = three();
        let removal = change(ConfChangeType::RemoveNode, 2);
        groups[0].propose_members(removal).unwrap();
        // The change reaches the logs of the others; that it is decided they never hear from this leader.
        let answers = |from: usize, to: usize, _: &Message| from != 0 && to == 0;
        deliver(&mut groups, &mut disks, answers);
        let one_is_dead = |from: usize, to: usize, _: &Message| from == 0 || to == 0;
        let stand_now = Message {
            msg_type: MessageType::MsgTimeoutNow as i32,
            from: 1,
            to: 2,
            term: groups[1].term(),
            ..Message::default()
        };
        groups[1].step(stand_now);
        deliver(&mut groups, &mut disks, one_is_dead);
        assert_eq!(groups[2].leader(), Some(2), "it was not elected");
        assert!(!groups[1].is_leader());
        assert!(!groups[1].conf().voters.contains(&2));
    }

    #[test]
    fn a_member_that_has_nothing_has_not_caught_up() {
        let (mut groups, mut disks) = three();
        groups[0]
            .propose_members(change(ConfChangeType::AddLearnerNode, 4))
            .unwrap();
        deliver(&mut groups, &mut disks, |_, _, _| false);
        assert_eq!(groups[0].lag(2), Some(0));
        // It is there and says so, but has not taken anything.
        let message = Message {
            msg_type: MessageType::MsgHeartbeatResponse as i32,
            from: 4,
            to: 1,
            term: groups[0].term(),
            ..Message::default()
        };
        groups[0].step(message);
        assert!(groups[0].commit() < 64);
        assert_eq!(groups[0].lag(4), None);
    }
}
