//! Collection against an upload, a fork and a removal, over two shards.
//!
//! Chunk X lives in shard 0, chunk Y in shard 1. Sandbox S (shard 0) has an old checkpoint that needs both, and stands on another that needs neither. An uploader
//! pins X and Y, brings what is missing, and commits a new checkpoint of S that needs both; it starts over once where it is told to. A forker reads
//! the old checkpoint and commits it as sandbox T's (shard 1). A remover removes the old checkpoint. A collector runs rounds; it may die at any step and another begins
//! the next round, and everything it ever sent may arrive again at any time.
//!
//! What must hold in every state: the chunks of a live checkpoint are there.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use stateright::{Model, Property};
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::wire::{join_names, request};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, SandboxId, TreeId, TurnNo};
use tidepool_store_core::gc::gc_of;
use tidepool_store_core::op::Op;
use tidepool_store_core::{
    ChunkState, Command, Group, KvRead, ManifestRow, ReadError, Refusal, Reply, SandboxState,
    Write, apply, keys, op,
};

const X: ChunkName = ChunkName([1; 32]);
const Y: ChunkName = ChunkName([2; 32]);
/// Needed by what S stands on; in shard 0.
const Z: ChunkName = ChunkName([3; 32]);
const S: SandboxId = SandboxId([1; 16]);
const T: SandboxId = SandboxId([2; 16]);

/// A rule of the protocol that the model can leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// A commit that rests on an older round than the cut is refused.
    Fence,
    /// A pin stamps what is there.
    Stamp,
    /// A commit carries the lowest round it met, not the last.
    LowestRound,
    /// No group cuts before all have begun. The one rule that nothing depends on: it only spares uploads that would be refused for nothing.
    BeginFirst,
    /// Roots are listed when all have cut.
    CutFirst,
    /// Nothing is swept before the roots of all groups are listed.
    WholeMark,
    /// What was removed in this round or later is a root.
    RemovedAreRoots,
    /// A sweep looks at the stamps again when it is applied.
    LookAgain,
}

/// One shard's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Shard(BTreeMap<Vec<u8>, Vec<u8>>);

impl KvRead for Shard {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.0.get(key).cloned())
    }
}

impl Shard {
    fn run(&mut self, op: Op, keep: impl Fn(&Write) -> bool) -> Result<Reply, Refusal> {
        let outcome = apply(Group::Shard, self, &Command::new(0, op));
        for write in outcome.writes.into_iter().filter(keep) {
            match write {
                Write::Put { key, value } => drop(self.0.insert(key, value)),
                Write::Delete { key } => drop(self.0.remove(&key)),
                Write::DeletePrefix { prefix } => self.0.retain(|k, _| !k.starts_with(&prefix)),
            }
        }
        outcome.result
    }

    fn round(&self) -> u64 {
        gc_of(self).map_or(0, |gc| gc.round)
    }

    fn has(&self, name: &ChunkName) -> bool {
        self.0.contains_key(&keys::chunk(name))
    }

    /// The manifest rows of sandboxes that exist.
    fn manifests(&self) -> Vec<(Option<u64>, Manifest)> {
        let rows = self
            .0
            .iter()
            .filter(|(k, _)| k[0] == keys::Table::Manifest as u8);
        rows.filter_map(|(_, v)| {
            let row = ManifestRow::decode(v).ok()?;
            Some((row.removed, Manifest::decode(row.manifest).ok()?))
        })
        .collect()
    }
}

/// A step of the uploader: which chunk it is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Up {
    Pin(u8),
    Put(u8),
    Commit,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Fork {
    Read,
    /// With the round it read the old checkpoint in.
    Commit(u64),
    Done,
}

/// How far the newest collector is. Masks have a bit for each shard.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Collector {
    round: u64,
    begun: u8,
    cut: u8,
    listed: u8,
    marks: BTreeSet<ChunkName>,
    /// What it will sweep, once it has looked.
    garbage: [Option<BTreeSet<ChunkName>>; 2],
}

/// A state of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    shards: [Shard; 2],
    up: Up,
    /// The rounds that the upload met, as it will carry them.
    met: u64,
    again: bool,
    fork: Fork,
    forked: bool,
    committed: bool,
    refused: bool,
    removed: bool,
    swept: bool,
    collector: Option<Collector>,
    /// What collectors sent to a shard.
    sent: BTreeSet<(u8, Sent)>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sent {
    Begin(u64),
    Cut(u64),
    Sweep(u64, Vec<ChunkName>),
}

/// A step of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step {
    Upload,
    Fork,
    Remove,
    /// A collector begins the next round, whatever became of the last.
    Round,
    Begin(u8),
    Cut(u8),
    List(u8),
    /// Looks for old chunks that are not marked.
    Look(u8),
    Sweep(u8),
    Purge(u8),
    /// Something sent arrives again.
    Again(u8, Sent),
}

/// The model: how many rounds there are, and which rule is left out.
#[derive(Debug, Clone)]
pub struct Gc {
    pub rounds: u64,
    pub without: Option<Rule>,
}

fn manifest(sandbox: SandboxId, turn: u64, needs: [ChunkName; 2]) -> (CheckpointId, Vec<u8>) {
    let bytes = Manifest {
        sandbox,
        epoch: Epoch(1),
        turn: TurnNo(turn),
        parent: None,
        created_ms: 0,
        verdict: Verdict::Files,
        domain: "d".parse().expect("a label"),
        image_name: String::new(),
        image: TreeId(needs[0].0),
        upper: TreeId(needs[1].0),
        processes: None,
        spec: Vec::new(),
        init_nonce: [0; 32],
        upper_bytes: 0,
    }
    .encode();
    (Manifest::id_of(&bytes), bytes)
}

fn commit(sandbox: SandboxId, turn: u64, needs: [ChunkName; 2], round: u64) -> Op {
    let (id, bytes) = manifest(sandbox, turn, needs);
    let record = TurnRecord {
        turn: TurnNo(turn),
        key: String::new(),
        command: String::new(),
        started_ms: 0,
        ended_ms: 0,
        verdict: Verdict::Files,
        checkpoint: id,
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    };
    Op::Commit(request::Commit {
        sandbox: Bytes::copy_from_slice(&sandbox.0),
        epoch: 1,
        turn,
        record: record.encode().into(),
        checkpoint: Bytes::copy_from_slice(&id.0),
        manifest: bytes.into(),
        round,
        ..request::Commit::default()
    })
}

fn add(name: ChunkName) -> Op {
    Op::AddChunks(op::AddChunks {
        session: Bytes::copy_from_slice(&[1; 16]),
        expires_ms: 1,
        names: join_names(&[name]),
        lens: Bytes::copy_from_slice(&1u32.to_le_bytes()),
        kinds: Bytes::copy_from_slice(&[op::BROUGHT]),
    })
}

fn place(name: &ChunkName) -> usize {
    usize::from(*name == Y)
}

impl Gc {
    fn left_out(&self, rule: Rule) -> bool {
        self.without == Some(rule)
    }

    /// The round that a commit to this shard carries.
    fn carried(&self, shard: &Shard, met: u64) -> u64 {
        match self.left_out(Rule::Fence) {
            true => shard.round(),
            false => met,
        }
    }

    fn meet(&self, s: &mut State, round: u64) {
        s.met = match (s.met, self.left_out(Rule::LowestRound)) {
            (0, _) | (_, true) => round,
            (met, false) => met.min(round),
        };
    }

    fn upload(&self, s: &mut State) -> Option<()> {
        let name = |at: u8| if at == 0 { X } else { Y };
        let next = |at: u8| if at == 0 { Up::Pin(1) } else { Up::Commit };
        match s.up {
            Up::Pin(at) => {
                let pin = Op::Pin(op::Pin {
                    session: Bytes::copy_from_slice(&[1; 16]),
                    expires_ms: 1,
                    names: join_names(&[name(at)]),
                });
                let stamps = !self.left_out(Rule::Stamp);
                let keep = |w: &Write| {
                    stamps
                        || !matches!(w, Write::Put { key, .. } if key[0] == keys::Table::Chunk as u8)
                };
                match s.shards[usize::from(at)].run(pin, keep).ok()? {
                    Reply::Missing { names, round } => {
                        self.meet(s, round);
                        s.up = match names.is_empty() {
                            true => next(at),
                            false => Up::Put(at),
                        };
                    }
                    _ => return None,
                }
            }
            Up::Put(at) => match s.shards[usize::from(at)]
                .run(add(name(at)), |_| true)
                .ok()?
            {
                Reply::Added { round, .. } => {
                    self.meet(s, round);
                    s.up = next(at);
                }
                _ => return None,
            },
            Up::Commit => {
                let round = self.carried(&s.shards[0], s.met);
                match s.shards[0].run(commit(S, 3, [X, Y], round), |_| true) {
                    Ok(_) => {
                        s.committed = true;
                        s.up = Up::Done;
                    }
                    Err(e) if e.upload_again => {
                        s.refused = true;
                        s.up = if s.again { Up::Done } else { Up::Pin(0) };
                        s.again = true;
                        s.met = 0;
                    }
                    Err(_) => return None,
                }
            }
            Up::Done => return None,
        }
        Some(())
    }

    fn fork(&self, s: &mut State) -> Option<()> {
        s.fork = match s.fork {
            Fork::Read => {
                let (id, _) = manifest(S, 1, [X, Y]);
                match s.shards[0].0.contains_key(&keys::checkpoint(&S, &id)) {
                    true => Fork::Commit(s.shards[0].round()),
                    false => Fork::Done,
                }
            }
            Fork::Commit(met) => {
                let round = self.carried(&s.shards[1], met);
                s.forked = s.shards[1]
                    .run(commit(T, 1, [X, Y], round), |_| true)
                    .is_ok();
                Fork::Done
            }
            Fork::Done => return None,
        };
        Some(())
    }

    fn remove(&self, s: &mut State) -> Option<()> {
        let state = s.shards[0].0.get(&keys::sandbox(&S))?;
        let changes = SandboxState::decode(state).ok()?.changes;
        let (id, _) = manifest(S, 1, [X, Y]);
        let remove = Op::RemoveCheckpoints(request::RemoveCheckpoints {
            sandbox: Bytes::copy_from_slice(&S.0),
            changes,
            checkpoints: Bytes::copy_from_slice(&id.0),
        });
        s.shards[0].run(remove, |_| true).ok()?;
        s.removed = true;
        Some(())
    }

    fn deliver(&self, shard: &mut Shard, sent: &Sent) -> Option<Reply> {
        let op = match sent {
            Sent::Begin(round) => Op::BeginRound(op::Round { round: *round }),
            Sent::Cut(round) => Op::Cut(op::Round { round: *round }),
            Sent::Sweep(_, names) if self.left_out(Rule::LookAgain) => {
                let before = shard.0.len();
                names
                    .iter()
                    .for_each(|n| drop(shard.0.remove(&keys::chunk(n))));
                let gone = names[..before - shard.0.len()].to_vec();
                return Some(Reply::Swept {
                    names: gone,
                    bytes: 0,
                });
            }
            Sent::Sweep(round, names) => Op::Sweep(op::Sweep {
                round: *round,
                names: join_names(names),
            }),
        };
        shard.run(op, |_| true).ok()
    }

    /// Sends something to a shard, where it arrives now (and perhaps again).
    fn send(&self, s: &mut State, at: u8, sent: Sent) -> Option<Reply> {
        let reply = self.deliver(&mut s.shards[usize::from(at)], &sent);
        s.sent.insert((at, sent));
        if let Some(Reply::Swept { names, .. }) = &reply {
            s.swept |= !names.is_empty();
        }
        reply
    }

    fn collect(&self, s: &mut State, step: &Step) -> Option<()> {
        let mut c = s.collector.clone()?;
        let reached = |reply: Option<Reply>, cut: bool| match reply {
            Some(Reply::Gc { round, fence }) => (if cut { fence } else { round }) == c.round,
            _ => false,
        };
        match step {
            Step::Begin(at) => {
                let reply = self.send(s, *at, Sent::Begin(c.round));
                reached(reply, false).then_some(())?;
                c.begun |= 1 << at;
            }
            Step::Cut(at) => {
                let reply = self.send(s, *at, Sent::Cut(c.round));
                reached(reply, true).then_some(())?;
                c.cut |= 1 << at;
            }
            Step::List(at) => {
                for (removed, manifest) in s.shards[usize::from(*at)].manifests() {
                    let spared = !self.left_out(Rule::RemovedAreRoots);
                    if removed.is_none_or(|r| spared && r >= c.round) {
                        c.marks.extend(manifest.links());
                    }
                }
                c.listed |= 1 << at;
            }
            Step::Look(at) => {
                // An incomplete mark ends the round.
                let whole = |n: &ChunkName| s.shards[place(n)].has(n);
                if !c.marks.iter().all(whole) {
                    return None;
                }
                let shard = &s.shards[usize::from(*at)];
                let old = [X, Y, Z].into_iter().filter(|n| {
                    let stamp = shard.0.get(&keys::chunk(n));
                    let stamp = stamp.and_then(|v| ChunkState::decode(v).ok());
                    stamp.is_some_and(|chunk| chunk.stamp < c.round) && !c.marks.contains(n)
                });
                c.garbage[usize::from(*at)] = Some(old.collect());
            }
            Step::Sweep(at) => {
                let names = c.garbage[usize::from(*at)].take()?;
                if names.is_empty() {
                    return None;
                }
                self.send(s, *at, Sent::Sweep(c.round, names.into_iter().collect()))?;
            }
            Step::Purge(at) => {
                let mut old = S.0.to_vec();
                old.extend(1u64.to_be_bytes());
                let purge = Op::Purge(op::Purge {
                    checkpoints: old.into(),
                    ..op::Purge::default()
                });
                s.shards[usize::from(*at)].run(purge, |_| true).ok()?;
            }
            _ => return None,
        }
        s.collector = Some(c);
        Some(())
    }
}

impl Model for Gc {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut shards = [Shard::default(), Shard::default()];
        for name in [X, Y, Z] {
            let _ = shards[place(&name)].run(add(name), |_| true);
        }
        for (at, id) in [(0, S), (1, T)] {
            let create = Op::CreateSandbox(request::CreateSandbox {
                id: Bytes::copy_from_slice(&id.0),
                name: format!("s{at}"),
                meta: Bytes::new(),
            });
            let _ = shards[at].run(create, |_| true);
        }
        let _ = shards[0].run(commit(S, 1, [X, Y], 1), |_| true);
        let _ = shards[0].run(commit(S, 2, [Z, Z], 1), |_| true);
        // What the courtesy of waiting would look at is not part of the protocol.
        for shard in &mut shards {
            shard.0.retain(|k, _| k[0] != keys::Table::Session as u8);
        }
        vec![State {
            shards,
            up: Up::Pin(0),
            met: 0,
            again: false,
            fork: Fork::Read,
            forked: false,
            committed: false,
            refused: false,
            removed: false,
            swept: false,
            collector: None,
            sent: BTreeSet::new(),
        }]
    }

    fn actions(&self, s: &State, steps: &mut Vec<Step>) {
        if s.up != Up::Done {
            steps.push(Step::Upload);
        }
        if s.fork != Fork::Done {
            steps.push(Step::Fork);
        }
        if !s.removed {
            steps.push(Step::Remove);
        }
        let last = s.collector.as_ref().map_or(1, |c| c.round);
        if last <= self.rounds {
            steps.push(Step::Round);
        }
        if let Some(c) = &s.collector {
            for at in 0..2u8 {
                let bit = 1 << at;
                if c.begun & bit == 0 {
                    steps.push(Step::Begin(at));
                }
                let may_cut =
                    c.begun == 3 || (self.left_out(Rule::BeginFirst) && c.begun & bit != 0);
                if may_cut && c.cut & bit == 0 {
                    steps.push(Step::Cut(at));
                }
                let may_list = c.cut == 3 || (self.left_out(Rule::CutFirst) && c.begun == 3);
                if may_list && c.listed & bit == 0 {
                    steps.push(Step::List(at));
                }
                let marked = c.listed == 3 || (self.left_out(Rule::WholeMark) && c.listed != 0);
                if marked && c.cut == 3 {
                    if c.garbage[usize::from(at)].is_none() {
                        steps.push(Step::Look(at));
                    }
                    steps.push(Step::Sweep(at));
                    steps.push(Step::Purge(at));
                }
            }
        }
        steps.extend(
            s.sent
                .iter()
                .map(|(at, sent)| Step::Again(*at, sent.clone())),
        );
    }

    fn next_state(&self, s: &State, step: Step) -> Option<State> {
        let mut next = s.clone();
        match &step {
            Step::Upload => self.upload(&mut next)?,
            Step::Fork => self.fork(&mut next)?,
            Step::Remove => self.remove(&mut next)?,
            Step::Round => {
                next.collector = Some(Collector {
                    round: s.collector.as_ref().map_or(1, |c| c.round) + 1,
                    begun: 0,
                    cut: 0,
                    listed: 0,
                    marks: BTreeSet::new(),
                    garbage: [None, None],
                });
            }
            Step::Again(at, sent) => drop(self.deliver(&mut next.shards[usize::from(*at)], sent)),
            other => self.collect(&mut next, other)?,
        }
        for shard in &mut next.shards {
            shard.0.retain(|k, _| k[0] != keys::Table::Session as u8);
        }
        (next != *s).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "the chunks of live checkpoints are there",
                |_, s: &State| {
                    let all = s.shards.iter().flat_map(Shard::manifests);
                    all.filter(|(removed, _)| removed.is_none())
                        .flat_map(|(_, m)| m.links().collect::<Vec<_>>())
                        .all(|n| s.shards[place(&n)].has(&n))
                },
            ),
            Property::sometimes("something is swept", |_, s: &State| s.swept),
            Property::sometimes("a commit is refused and made good", |_, s: &State| {
                s.refused && s.committed
            }),
            Property::sometimes("a fork outlives what it came from", |_, s: &State| {
                s.forked && s.removed
            }),
        ]
    }
}
