//! Fences, removals and retention's part of the state machines.

use std::collections::BTreeMap;

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::wire::{join_names, request};
use tidepool_proto::{CheckpointId, ChunkName, ErrorKind, SandboxId, TurnNo};
use tidepool_store_core::op::Op;
use tidepool_store_core::retention::{Keep, Policies, Scope, encode_labels};
use tidepool_store_core::{
    Command, Group, KvRead, ManifestRow, ReadError, Refusal, Reply, SandboxState, Write, apply,
    keys, op,
};

#[derive(Default, Clone, PartialEq, Debug)]
struct Memory(BTreeMap<Vec<u8>, Vec<u8>>);

impl KvRead for Memory {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.0.get(key).cloned())
    }
}

impl Memory {
    fn run_in(&mut self, group: Group, op: Op) -> Result<Reply, Refusal> {
        let outcome = apply(group, self, &Command::new(0, op));
        assert!(outcome.result.is_ok() || outcome.writes.is_empty());
        for write in outcome.writes {
            match write {
                Write::Put { key, value } => drop(self.0.insert(key, value)),
                Write::Delete { key } => drop(self.0.remove(&key)),
                Write::DeletePrefix { prefix } => self.0.retain(|k, _| !k.starts_with(&prefix)),
            }
        }
        outcome.result
    }

    fn run(&mut self, op: Op) -> Result<Reply, Refusal> {
        self.run_in(Group::Shard, op)
    }

    fn meta(&mut self, op: Op) -> Result<Reply, Refusal> {
        self.run_in(Group::Meta, op)
    }

    fn round(&mut self, round: u64) {
        self.run(Op::BeginRound(op::Round { round })).unwrap();
    }

    fn cut(&mut self, round: u64) {
        self.run(Op::Cut(op::Round { round })).unwrap();
    }

    fn changes(&self) -> u64 {
        let state = &self.0[&keys::sandbox(&SandboxId([1; 16]))];
        SandboxState::decode(state).unwrap().changes
    }
}

fn id() -> Bytes {
    Bytes::copy_from_slice(&[1; 16])
}

fn checkpoint(turn: u64) -> CheckpointId {
    Manifest::id_of(&[turn as u8])
}

fn listed(turns: &[u64]) -> Bytes {
    turns
        .iter()
        .flat_map(|t| checkpoint(*t).0)
        .collect::<Vec<u8>>()
        .into()
}

fn commit(turn: u64, round: u64, base: Option<u64>) -> Op {
    let record = TurnRecord {
        turn: TurnNo(turn),
        key: String::new(),
        command: String::new(),
        started_ms: 0,
        ended_ms: 0,
        verdict: Verdict::Full,
        checkpoint: checkpoint(turn),
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    };
    Op::Commit(request::Commit {
        sandbox: id(),
        epoch: 1,
        turn,
        record: record.encode().into(),
        checkpoint: Bytes::copy_from_slice(&checkpoint(turn).0),
        manifest: vec![turn as u8].into(),
        round,
        base: base.map(|t| listed(&[t])).unwrap_or_default(),
        ..request::Commit::default()
    })
}

fn remove(changes: u64, turns: &[u64]) -> Op {
    Op::RemoveCheckpoints(request::RemoveCheckpoints {
        sandbox: id(),
        changes,
        checkpoints: listed(turns),
    })
}

fn sandbox_with(turns: u64) -> Memory {
    let mut m = Memory::default();
    m.run(Op::CreateSandbox(request::CreateSandbox {
        id: id(),
        name: "a".into(),
        meta: Bytes::new(),
    }))
    .unwrap();
    for turn in 1..=turns {
        m.run(commit(turn, 1, None)).unwrap();
    }
    m
}

#[test]
fn what_rests_on_an_older_round_than_the_cut_is_refused() {
    let mut m = sandbox_with(1);
    // Not said on what it rests.
    assert_eq!(
        m.run(commit(2, 0, None)).unwrap_err().kind,
        ErrorKind::Invalid
    );
    m.round(2);
    // Begun is not cut: it is a root when that comes.
    m.run(commit(2, 1, None)).unwrap();
    m.cut(2);
    let refused = m.run(commit(3, 1, None)).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Conflict);
    assert!(refused.upload_again);
    // What was committed before is answered as it was.
    m.run(commit(2, 1, None)).unwrap();
    m.run(commit(3, 2, None)).unwrap();
    // A round that this group has not heard of is newer than its cut.
    m.run(commit(4, 9, None)).unwrap();
    // A checkpoint that is there is enough, however old the round of the cut; with a round both count.
    m.round(5);
    m.cut(5);
    m.run(commit(5, 0, Some(4))).unwrap();
    assert!(m.run(commit(6, 2, Some(5))).unwrap_err().upload_again);
    m.run(remove(m.changes(), &[4])).unwrap();
    assert!(m.run(commit(6, 0, Some(4))).unwrap_err().upload_again);
    m.run(commit(6, 5, Some(5))).unwrap();
}

#[test]
fn rounds_only_grow_and_sweeps_keep_to_theirs() {
    let mut m = Memory::default();
    let cut = |round| Op::Cut(op::Round { round });
    assert_eq!(m.run(cut(2)).unwrap_err().kind, ErrorKind::Invalid);
    m.round(3);
    m.round(2);
    m.cut(3);
    let now = Reply::Gc { round: 3, fence: 3 };
    assert_eq!(m.run(cut(2)), Ok(now.clone()));
    assert_eq!(m.run(Op::BeginRound(op::Round { round: 1 })), Ok(now));
    let sweep = |round| {
        Op::Sweep(op::Sweep {
            round,
            names: join_names(&[ChunkName([1; 32])]),
        })
    };
    for round in [0, 2, 4] {
        assert_eq!(m.run(sweep(round)).unwrap_err().kind, ErrorKind::Conflict);
    }
    m.run(sweep(3)).unwrap();
    // Between a begin and its cut nobody sweeps.
    m.round(4);
    for round in [3, 4] {
        assert_eq!(m.run(sweep(round)).unwrap_err().kind, ErrorKind::Conflict);
    }
}

#[test]
fn one_asking_is_one_round() {
    let mut m = Memory::default();
    let start = |t: u8| {
        Op::StartRound(op::StartRound {
            token: Bytes::copy_from_slice(&[t; 16]),
        })
    };
    let two = Ok(Reply::Gc { round: 2, fence: 1 });
    assert_eq!(m.meta(start(1)), two);
    assert_eq!(m.meta(start(1)), two);
    assert_eq!(m.meta(start(2)), Ok(Reply::Gc { round: 3, fence: 1 }));
    assert!(m.meta(start(0)).is_err());
    assert!(m.run(start(1)).is_err());
    let report = |round| {
        Op::ReportGc(op::ReportGc {
            round,
            report: Bytes::from_static(b"{}"),
        })
    };
    assert!(m.meta(report(2)).is_err());
    m.meta(report(3)).unwrap();
}

#[test]
fn removed_checkpoints_stay_roots_until_a_cut_and_go_by_the_plan_only() {
    let mut m = sandbox_with(4);
    let kept = |keep| {
        Op::KeepCheckpoint(request::KeepCheckpoint {
            sandbox: id(),
            checkpoint: listed(&[2]),
            keep,
        })
    };
    m.run(kept(true)).unwrap();
    m.run(kept(true)).unwrap();
    let changes = m.changes();
    assert_eq!(changes, 5);
    let kind = |r: Result<Reply, Refusal>| r.unwrap_err().kind;
    // The one it stands on, one that is kept, one that does not exist, a plan that is out of date.
    assert_eq!(kind(m.run(remove(changes, &[4]))), ErrorKind::Invalid);
    assert_eq!(kind(m.run(remove(changes, &[2]))), ErrorKind::Invalid);
    assert_eq!(kind(m.run(remove(changes, &[9]))), ErrorKind::NotFound);
    assert_eq!(kind(m.run(remove(changes - 1, &[1]))), ErrorKind::Conflict);
    m.run(remove(changes, &[1, 3])).unwrap();
    let after = m.clone();
    m.run(remove(changes, &[1, 3])).unwrap();
    assert_eq!(m, after);
    let row = |m: &Memory, turn| {
        m.0.get(&keys::manifest(&SandboxId([1; 16]), TurnNo(turn)))
            .cloned()
    };
    let bytes = row(&m, 1).unwrap();
    assert_eq!(ManifestRow::decode(&bytes).unwrap().removed, Some(1));
    let mut places = vec![];
    for turn in [1u64, 2, 3] {
        places.extend([1; 16]);
        places.extend(turn.to_be_bytes());
    }
    let purge = || {
        Op::Purge(op::Purge {
            checkpoints: places.clone().into(),
            ..op::Purge::default()
        })
    };
    m.round(2);
    m.run(purge()).unwrap();
    assert!(row(&m, 1).is_some());
    m.cut(2);
    m.run(purge()).unwrap();
    assert!(row(&m, 1).is_none() && row(&m, 3).is_none());
    assert!(row(&m, 2).is_some());
    // The same turn's record is history, and stays.
    assert!(m.0.contains_key(&keys::turn(&SandboxId([1; 16]), TurnNo(1))));
    m.run(kept(false)).unwrap();
    m.run(remove(m.changes(), &[2])).unwrap();
}

#[test]
fn an_image_that_goes_is_a_root_until_a_cut() {
    let mut m = Memory::default();
    let put = |round| {
        Op::PutImage(request::PutImage {
            name: "i".into(),
            record: Bytes::from_static(b"r"),
            roots: join_names(&[ChunkName([1; 32])]),
            round,
        })
    };
    m.meta(Op::BeginRound(op::Round { round: 2 })).unwrap();
    m.meta(Op::Cut(op::Round { round: 2 })).unwrap();
    assert!(m.meta(put(1)).unwrap_err().upload_again);
    m.meta(put(2)).unwrap();
    m.meta(put(1)).unwrap();
    m.meta(Op::RemoveImage(request::Image { name: "i".into() }))
        .unwrap();
    let tail = keys::image_grave_tail(2, "i");
    let grave = keys::image_grave(&tail);
    let purge = Op::Purge(op::Purge {
        images: vec![tail.into()],
        ..op::Purge::default()
    });
    m.meta(purge.clone()).unwrap();
    assert!(m.0.contains_key(&grave));
    m.meta(Op::BeginRound(op::Round { round: 3 })).unwrap();
    m.meta(Op::Cut(op::Round { round: 3 })).unwrap();
    m.meta(purge).unwrap();
    assert!(!m.0.contains_key(&grave));
}

#[test]
fn policies_and_labels_are_set_once_a_version() {
    let mut m = sandbox_with(1);
    let mut policies = Policies::default();
    let set = |p: &Policies| {
        Op::SetPolicies(request::SetPolicies {
            policies: p.encode().into(),
        })
    };
    policies.set(
        Scope::All,
        Some(Keep {
            last: 3,
            ..Keep::default()
        }),
    );
    m.meta(set(&policies)).unwrap();
    m.meta(set(&policies)).unwrap();
    let stored = Policies::decode(&m.0[&keys::policies()]).unwrap();
    assert_eq!((stored.version, &stored.rules), (1, &policies.rules));
    policies.set(Scope::All, None);
    assert_eq!(
        m.meta(set(&policies)).unwrap_err().kind,
        ErrorKind::Conflict
    );
    let before = m.changes();
    let labels = BTreeMap::from([("team".to_owned(), "x".to_owned())]);
    let label = || {
        Op::LabelSandbox(request::LabelSandbox {
            sandbox: id(),
            labels: encode_labels(&labels).into(),
        })
    };
    m.run(label()).unwrap();
    m.run(label()).unwrap();
    assert_eq!(m.changes(), before + 1);
}
