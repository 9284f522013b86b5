//! The state machines against a model: epochs, turns, pins and names under random commands, each also applied twice and late.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::wire::{join_names, request};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, ErrorKind, SandboxId, SessionId, TurnNo};
use tidepool_store_core::op::Op;
use tidepool_store_core::{
    ChunkState, Command, Group, KvRead, Outcome, ReadError, Refusal, Reply, SandboxState,
    ShardStats, Write, apply, keys, op,
};

/// A group's state in memory.
#[derive(Default, Clone, PartialEq, Debug)]
struct Memory(BTreeMap<Vec<u8>, Vec<u8>>);

impl KvRead for Memory {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.0.get(key).cloned())
    }
}

impl Memory {
    fn run_at(&mut self, group: Group, now_ms: u64, op: Op) -> Result<Reply, Refusal> {
        let command = Command::new(now_ms, op);
        // The log carries bytes: what is applied is what comes back from them.
        let bytes = prost::Message::encode_to_vec(&command);
        let command = <Command as prost::Message>::decode(&*bytes).unwrap();
        let Outcome { result, writes } = apply(group, self, &command);
        assert_eq!(
            apply(group, self, &command),
            Outcome {
                result: result.clone(),
                writes: writes.clone()
            }
        );
        assert!(result.is_ok() || writes.is_empty());
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    self.0.insert(key, value);
                }
                Write::Delete { key } => {
                    self.0.remove(&key);
                }
                Write::DeletePrefix { prefix } => self.0.retain(|k, _| !k.starts_with(&prefix)),
            }
        }
        result
    }

    fn run(&mut self, op: Op) -> Result<Reply, Refusal> {
        self.run_at(Group::Shard, 0, op)
    }

    fn meta(&mut self, op: Op) -> Result<Reply, Refusal> {
        self.run_at(Group::Meta, 0, op)
    }

    fn sandbox(&self, id: SandboxId) -> SandboxState {
        SandboxState::decode(&self.0[&keys::sandbox(&id)]).unwrap()
    }

    fn stamp(&self, n: u8) -> Option<u64> {
        let value = self.0.get(&keys::chunk(&name(n)))?;
        Some(ChunkState::decode(value).unwrap().stamp)
    }
}

fn id(n: u8) -> SandboxId {
    SandboxId([n; 16])
}

fn bytes16(n: u8) -> Bytes {
    Bytes::copy_from_slice(&[n; 16])
}

fn name(n: u8) -> ChunkName {
    ChunkName([n; 32])
}

fn create(n: u8, label: &str) -> Op {
    Op::CreateSandbox(request::CreateSandbox {
        id: bytes16(n),
        name: label.into(),
        meta: Bytes::from_static(b"meta"),
    })
}

fn take(n: u8, token: u8) -> Op {
    Op::TakeSandbox(request::TakeSandbox {
        id: bytes16(n),
        token: bytes16(token),
    })
}

/// `variant` makes turns of the same number that differ; `fresh` says whether it commits a checkpoint of its own.
fn commit(
    n: u8,
    epoch: u64,
    turn: u64,
    variant: u8,
    previous: Option<CheckpointId>,
) -> request::Commit {
    let manifest = vec![n, turn as u8, variant];
    let checkpoint = previous.unwrap_or_else(|| Manifest::id_of(&manifest));
    let key = format!("k{turn}-{variant}");
    let record = TurnRecord {
        turn: TurnNo(turn),
        key: key.clone(),
        command: String::new(),
        started_ms: 0,
        ended_ms: 0,
        verdict: Verdict::Full,
        checkpoint,
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    };
    let new = previous.is_none();
    request::Commit {
        sandbox: bytes16(n),
        epoch,
        turn,
        key,
        record: record.encode().into(),
        checkpoint: if new {
            Bytes::copy_from_slice(&checkpoint.0)
        } else {
            Bytes::new()
        },
        manifest: if new { manifest.into() } else { Bytes::new() },
        session: Bytes::new(),
        round: 1,
        base: Bytes::new(),
    }
}

fn kind(result: Result<Reply, Refusal>) -> ErrorKind {
    result.unwrap_err().kind
}

fn add_kind(session: u8, names: &[u8], expires_ms: u64, kind: u8) -> Op {
    let lens: Vec<u8> = names
        .iter()
        .flat_map(|n| u32::from(*n).to_le_bytes())
        .collect();
    Op::AddChunks(op::AddChunks {
        session: bytes16(session),
        expires_ms,
        names: join_names(&names.iter().map(|n| name(*n)).collect::<Vec<_>>()),
        lens: lens.into(),
        kinds: vec![kind; names.len()].into(),
    })
}

fn add(session: u8, names: &[u8], expires_ms: u64) -> Op {
    add_kind(session, names, expires_ms, op::BROUGHT)
}

fn pin(session: u8, names: &[u8], expires_ms: u64) -> Op {
    Op::Pin(op::Pin {
        session: bytes16(session),
        expires_ms,
        names: join_names(&names.iter().map(|n| name(*n)).collect::<Vec<_>>()),
    })
}

fn end(session: u8) -> Op {
    Op::EndSession(op::EndSession {
        session: bytes16(session),
    })
}

fn expire(session: u8) -> Op {
    Op::ExpireSessions(op::ExpireSessions {
        sessions: bytes16(session),
    })
}

#[test]
fn taking_over_fences_and_is_done_once_a_token() {
    let mut m = Memory::default();
    m.run(create(1, "a")).unwrap();
    assert_eq!(m.run(take(1, 7)), Ok(Reply::Epoch(Epoch(2))));
    assert_eq!(m.run(take(1, 7)), Ok(Reply::Epoch(Epoch(2))));
    assert_eq!(m.run(take(1, 8)), Ok(Reply::Epoch(Epoch(3))));
    assert_eq!(kind(m.run(take(2, 7))), ErrorKind::NotFound);
    assert_eq!(kind(m.run(take(1, 0))), ErrorKind::Invalid);
    for epoch in [0, 1, 2, 4] {
        assert_eq!(
            kind(m.run(Op::Commit(commit(1, epoch, 1, 0, None)))),
            ErrorKind::Fenced
        );
    }
    m.run(Op::Commit(commit(1, 3, 1, 0, None))).unwrap();
}

#[test]
fn a_commit_must_fit_itself() {
    let mut m = Memory::default();
    m.run(create(1, "a")).unwrap();
    let good = commit(1, 1, 1, 0, None);
    let bad = [
        request::Commit {
            manifest: Bytes::from_static(b"other"),
            ..good.clone()
        },
        request::Commit {
            checkpoint: Bytes::new(),
            ..good.clone()
        },
        request::Commit {
            checkpoint: good.checkpoint.slice(1..),
            ..good.clone()
        },
        request::Commit {
            key: "another".into(),
            ..good.clone()
        },
        request::Commit {
            turn: 0,
            ..good.clone()
        },
        request::Commit {
            record: good.record.slice(1..),
            ..good.clone()
        },
        request::Commit {
            sandbox: bytes16(1).slice(1..),
            ..good.clone()
        },
        commit(1, 1, 1, 0, Some(CheckpointId([5; 32]))),
    ];
    for c in bad {
        assert_eq!(kind(m.run(Op::Commit(c))), ErrorKind::Invalid);
    }
    assert_eq!(
        kind(m.run(Op::Commit(commit(1, 1, 2, 0, None)))),
        ErrorKind::Conflict
    );
    m.run(Op::Commit(good.clone())).unwrap();
    // A key belongs to one turn.
    let mut again = commit(1, 1, 2, 0, None);
    let mut record = TurnRecord::decode(&again.record).unwrap();
    record.key = good.key.clone();
    again.key = good.key;
    again.record = record.encode().into();
    assert_eq!(kind(m.run(Op::Commit(again))), ErrorKind::Conflict);
}

#[test]
fn the_same_manifest_twice_is_found_by_its_first_turn() {
    let mut m = Memory::default();
    m.run(create(1, "a")).unwrap();
    let first = commit(1, 1, 1, 0, None);
    m.run(Op::Commit(first.clone())).unwrap();
    let mut second = commit(1, 1, 2, 0, Some(Manifest::id_of(&first.manifest)));
    second.checkpoint = first.checkpoint.clone();
    second.manifest = first.manifest.clone();
    m.run(Op::Commit(second.clone())).unwrap();
    m.run(Op::Commit(second)).unwrap();
    assert_eq!(m.sandbox(id(1)).turns, 2);
}

#[test]
fn metadata_changes_once_a_version() {
    let mut m = Memory::default();
    m.run(create(1, "a")).unwrap();
    let update = |version, text: &'static str| {
        Op::UpdateSandboxMeta(request::UpdateSandboxMeta {
            id: bytes16(1),
            epoch: 1,
            version,
            meta: Bytes::from_static(text.as_bytes()),
        })
    };
    m.run(update(1, "b")).unwrap();
    m.run(update(1, "b")).unwrap();
    m.run(update(2, "c")).unwrap();
    // A late copy of an older one undoes nothing.
    assert_eq!(kind(m.run(update(1, "b"))), ErrorKind::Conflict);
    assert_eq!(m.0[&keys::meta(&id(1))], b"c");
    assert_eq!(m.sandbox(id(1)).meta_version, 3);
}

#[test]
fn a_removed_sandbox_stays_removed() {
    let mut m = Memory::default();
    m.run(create(1, "a")).unwrap();
    m.run(Op::Commit(commit(1, 1, 1, 0, None))).unwrap();
    let before_other = {
        let mut other = Memory::default();
        other.run(create(2, "b")).unwrap();
        other
    };
    m.run(create(2, "b")).unwrap();
    let remove = |epoch| {
        Op::RemoveSandbox(request::RemoveSandbox {
            id: bytes16(1),
            epoch,
        })
    };
    assert_eq!(kind(m.run(remove(2))), ErrorKind::Fenced);
    let gone = Ok(Reply::Removed { name: "a".into() });
    assert_eq!(m.run(remove(1)), gone);
    assert_eq!(m.run(remove(1)), gone);
    assert_eq!(kind(m.run(create(1, "a"))), ErrorKind::Conflict);
    assert_eq!(
        kind(m.run(Op::Commit(commit(1, 1, 2, 0, None)))),
        ErrorKind::Fenced
    );
    // What a collection may still need goes when one has cut after the removal.
    let purge = || {
        Op::Purge(op::Purge {
            sandboxes: bytes16(1),
            ..op::Purge::default()
        })
    };
    let whole = m.clone();
    m.run(purge()).unwrap();
    assert_eq!(m, whole);
    m.run(Op::BeginRound(op::Round { round: 2 })).unwrap();
    m.run(Op::Cut(op::Round { round: 2 })).unwrap();
    m.run(purge()).unwrap();
    m.0.remove(&keys::tombstone(&id(1)));
    m.0.remove(&keys::gc());
    assert_eq!(m, before_other);
}

#[test]
fn a_name_that_was_never_used_can_be_taken_away() {
    let (mut meta, mut shard) = (Memory::default(), Memory::default());
    let reserve = |n, replacing: Option<u8>| {
        Op::ReserveName(op::ReserveName {
            name: "x".into(),
            id: bytes16(n),
            replacing: replacing.map(bytes16).unwrap_or_default(),
        })
    };
    let fence = |n| Op::FenceUnborn(op::FenceUnborn { id: bytes16(n) });
    assert_eq!(meta.meta(reserve(1, None)), Ok(Reply::Done));
    // The creator died here. Another fences it in its shard and takes the name.
    assert_eq!(meta.meta(reserve(2, None)), Ok(Reply::TakenBy(id(1))));
    assert_eq!(shard.run(fence(1)), Ok(Reply::Exists(false)));
    assert_eq!(meta.meta(reserve(2, Some(1))), Ok(Reply::Done));
    // The dead one's late command finds itself fenced.
    assert_eq!(kind(shard.run(create(1, "x"))), ErrorKind::Conflict);
    shard.run(create(2, "x")).unwrap();
    assert_eq!(meta.meta(reserve(3, None)), Ok(Reply::TakenBy(id(2))));
    assert_eq!(shard.run(fence(2)), Ok(Reply::Exists(true)));
    assert_eq!(meta.meta(reserve(3, Some(1))), Ok(Reply::TakenBy(id(2))));
    let release = |n| {
        Op::ReleaseName(op::ReleaseName {
            name: "x".into(),
            id: bytes16(n),
        })
    };
    meta.meta(release(1)).unwrap();
    assert_eq!(meta.meta(reserve(3, None)), Ok(Reply::TakenBy(id(2))));
    meta.meta(release(2)).unwrap();
    assert_eq!(meta.meta(reserve(3, None)), Ok(Reply::Done));
}

#[test]
fn a_session_ends_by_itself_when_it_is_over() {
    let mut m = Memory::default();
    m.run(pin(1, &[1, 2], 100)).unwrap();
    m.run(add(1, &[1], 200)).unwrap();
    // Renewed meanwhile: a late shorter renewal does not count.
    m.run(pin(1, &[3], 50)).unwrap();
    let key = keys::session(&SessionId([1; 16]));
    m.run_at(Group::Shard, 150, expire(1)).unwrap();
    assert!(m.0.contains_key(&key));
    m.run_at(Group::Shard, 200, expire(1)).unwrap();
    assert!(!m.0.contains_key(&key));
    // Chunks stay until a collection takes them.
    assert!(m.0.contains_key(&keys::chunk(&name(1))));
}

#[test]
fn commands_keep_to_their_groups() {
    let mut m = Memory::default();
    assert_eq!(kind(m.meta(create(1, "a"))), ErrorKind::Invalid);
    let image = Op::PutImage(request::PutImage {
        name: "i".into(),
        record: Bytes::new(),
        ..request::PutImage::default()
    });
    assert_eq!(kind(m.run(image.clone())), ErrorKind::Invalid);
    m.meta(image).unwrap();
    let empty = Command::default();
    assert!(apply(Group::Meta, &m, &empty).result.is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Take {
        token: u8,
    },
    Commit {
        behind: u64,
        ahead: u64,
        variant: u8,
        clean: bool,
    },
    Repeat {
        back: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => (1u8..5).prop_map(|token| Step::Take { token }),
        6 => (0u64..3, 0u64..3, 0u8..2, any::<bool>()).prop_map(|(behind, ahead, variant, clean)| {
            Step::Commit { behind, ahead, variant, clean }
        }),
        2 => (0usize..20).prop_map(|back| Step::Repeat { back }),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// Epochs only grow, turns have no gap and never change, a stale epoch never gets through, and old commands sent
    /// again change nothing.
    #[test]
    fn histories_only_grow(steps in steps()) {
        let mut m = Memory::default();
        m.run(create(1, "a")).unwrap();
        let mut sent: Vec<(Op, Result<Reply, Refusal>)> = Vec::new();
        let mut turns: BTreeMap<u64, (Bytes, Bytes)> = BTreeMap::new();
        for step in steps {
            let before = m.sandbox(id(1));
            match step {
                Step::Take { token } => {
                    let op = take(1, token);
                    let result = m.run(op.clone());
                    let after = m.sandbox(id(1));
                    let wanted = before.epoch.0 + u64::from(before.token != [token; 16]);
                    prop_assert_eq!(after.epoch.0, wanted);
                    prop_assert_eq!(&result, &Ok(Reply::Epoch(after.epoch)));
                    sent.push((op, result));
                }
                Step::Commit { behind, ahead, variant, clean } => {
                    let next = before.last_turn.0 + 1;
                    let turn = (next + 1).saturating_sub(ahead).max(1);
                    let epoch = before.epoch.0.saturating_sub(behind);
                    let previous = before.head.filter(|_| clean);
                    let c = commit(1, epoch, turn, variant, previous);
                    let content = (c.record.clone(), c.checkpoint.clone());
                    let op = Op::Commit(c.clone());
                    let result = m.run(op.clone());
                    match &result {
                        Err(e) if e.kind == ErrorKind::Fenced => prop_assert_ne!(epoch, before.epoch.0),
                        Err(e) => {
                            prop_assert_eq!(e.kind, ErrorKind::Conflict);
                            prop_assert!(turns.get(&turn).is_some_and(|old| *old != content) || turn > next);
                        }
                        Ok(_) => {
                            prop_assert_eq!(epoch, before.epoch.0);
                            let old = turns.insert(turn, content.clone());
                            prop_assert!(old.is_none_or(|old| old == content));
                        }
                    }
                    sent.push((op, result));
                }
                Step::Repeat { back } => {
                    if let Some((op, _)) = sent.len().checked_sub(back + 1).map(|i| sent[i].clone()) {
                        let is_take = matches!(op, Op::TakeSandbox(_));
                        let state = m.clone();
                        let result = m.run(op.clone());
                        // One that came too early then may be in time now.
                        if let (Op::Commit(c), Ok(_)) = (op, result) {
                            let content = (c.record, c.checkpoint);
                            let old = turns.insert(c.turn, content.clone());
                            prop_assert!(old.is_none_or(|old| old == content));
                        }
                        // A taking with an older token is a new one: clients never use a token again.
                        if !is_take {
                            let old = state.sandbox(id(1));
                            let new = m.sandbox(id(1));
                            if old.epoch == new.epoch && old.turns == new.turns {
                                prop_assert_eq!(&state, &m);
                            }
                        }
                    }
                }
            }
            let after = m.sandbox(id(1));
            prop_assert!(after.epoch >= before.epoch);
            prop_assert!(after.turns >= before.turns);
        }
        for (turn, (record, _)) in &turns {
            prop_assert_eq!(&m.0[&keys::turn(&id(1), TurnNo(*turn))], record);
        }
    }

    /// Chunks carry the newest round in which they were added or pinned, and counts follow them.
    #[test]
    fn stamps_and_counts_follow_chunks(steps in prop::collection::vec((0u8..6, 0u8..3, prop::collection::vec(0u8..20, 0..8)), 1..60)) {
        let mut m = Memory::default();
        let mut chunks: BTreeMap<u8, u64> = BTreeMap::new();
        let (mut round, mut fence) = (1, 1);
        for (what, session, names) in steps {
            match what {
                0 => {
                    m.run(end(session)).unwrap();
                }
                1 => {
                    let missing = m.run(pin(session, &names, 1)).unwrap();
                    let wanted = (0..names.len() as u32).filter(|i| !chunks.contains_key(&names[*i as usize]));
                    prop_assert_eq!(missing, Reply::Missing { names: wanted.collect(), round });
                    for n in &names {
                        chunks.entry(*n).and_modify(|stamp| *stamp = round);
                    }
                }
                2 => {
                    round += 1;
                    let begun = m.run(Op::BeginRound(op::Round { round })).unwrap();
                    prop_assert_eq!(begun, Reply::Gc { round, fence });
                }
                3 => {
                    fence = round;
                    let cut = m.run(Op::Cut(op::Round { round })).unwrap();
                    prop_assert_eq!(cut, Reply::Gc { round, fence });
                }
                4 => {
                    let sweep = Op::Sweep(op::Sweep {
                        round,
                        names: join_names(&names.iter().map(|n| name(*n)).collect::<Vec<_>>()),
                    });
                    let result = m.run(sweep);
                    if round != fence {
                        prop_assert_eq!(kind(result), ErrorKind::Conflict);
                    } else {
                        let gone: BTreeSet<u8> = names.iter().copied().filter(|n| chunks.get(n).is_some_and(|s| *s < round)).collect();
                        let bytes = gone.iter().map(|n| u64::from(*n)).sum();
                        prop_assert_eq!(result, Ok(Reply::Swept { names: gone.iter().map(|n| name(*n)).collect(), bytes }));
                        chunks.retain(|n, _| !gone.contains(n));
                    }
                }
                _ => {
                    let new: BTreeSet<u8> = names.iter().copied().filter(|n| !chunks.contains_key(n)).collect();
                    if session == 0 && !new.is_empty() {
                        // Thought to be there, and gone: nothing of it is taken.
                        let before = m.clone();
                        let refused = m.run(add_kind(session, &names, 1, 0)).unwrap_err();
                        prop_assert!(refused.again && !refused.upload_again);
                        prop_assert_eq!(&before, &m);
                    }
                    let bytes = new.iter().map(|n| u64::from(*n)).sum();
                    let added = m.run(add(session, &names, 1)).unwrap();
                    prop_assert_eq!(added, Reply::Added { chunks: new.len() as u64, bytes, round });
                    chunks.extend(names.iter().map(|n| (*n, round)));
                }
            }
            for n in 0..20 {
                prop_assert_eq!(m.stamp(n), chunks.get(&n).copied());
            }
            let stats = m.0.get(&keys::stats()).map(|b| ShardStats::decode(b).unwrap()).unwrap_or_default();
            prop_assert_eq!(stats.chunks, chunks.len() as u64);
            prop_assert_eq!(stats.chunk_bytes, chunks.keys().map(|n| u64::from(*n)).sum::<u64>());
        }
    }
}
