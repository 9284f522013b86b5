//! Uploads and commits, as a host's engine makes them: pin, bring what is missing, commit with the lowest round met, and start over where told to.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::turn::{
    Evidence, ExecResult, ExitStatus, Output, TurnRecord, TurnStats, Verdict,
};
use tidepool_proto::wire::{join_names, request};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, SandboxId, TreeId, TurnNo};
use tidepool_store_core::{Reply, op};

use super::Ctx;
use crate::wire::{Answer, Fail, Request, Result};

/// The lower of two rounds, where 0 stands for none.
pub(super) fn lower_round(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, other) | (other, 0) => other,
        (a, b) => a.min(b),
    }
}

/// A turn that is to be committed.
pub(super) struct Turn {
    pub(super) sandbox: SandboxId,
    pub(super) epoch: Epoch,
    pub(super) turn: TurnNo,
    /// What the sandbox stands on before.
    pub(super) head: Option<CheckpointId>,
    /// The roots of a new checkpoint; none where nothing changed.
    pub(super) trees: Option<[ChunkName; 2]>,
    pub(super) processes: Option<ChunkName>,
    pub(super) output: Option<ChunkName>,
}

impl Turn {
    fn manifest(&self) -> Option<Vec<u8>> {
        let [image, upper] = self.trees?;
        let processes = self
            .processes
            .map(|tree| tidepool_proto::manifest::ProcessImage {
                tree: TreeId(tree.0),
                bytes: 1,
                count: 1,
                compat: tidepool_proto::manifest::Compat {
                    arch: String::new(),
                    kernel: String::new(),
                    criu: String::new(),
                    cpu_flags: String::new(),
                },
            });
        let manifest = Manifest {
            sandbox: self.sandbox,
            epoch: self.epoch,
            turn: self.turn,
            parent: self.head,
            created_ms: 0,
            verdict: Verdict::Full,
            domain: "d".parse().ok()?,
            image_name: String::new(),
            image: TreeId(image.0),
            upper: TreeId(upper.0),
            processes,
            spec: Vec::new(),
            init_nonce: [0; 32],
            upper_bytes: 0,
        };
        Some(manifest.encode())
    }

    fn record(&self, checkpoint: CheckpointId) -> Vec<u8> {
        let result = self.output.map(|name| ExecResult {
            status: ExitStatus::Code(0),
            stdout: Output::Stored(BlobRef {
                len: 24,
                chunks: vec![name],
            }),
            stderr: Output::Inline(Vec::new()),
        });
        TurnRecord {
            turn: self.turn,
            key: format!("k{}", self.turn),
            command: String::new(),
            started_ms: 0,
            ended_ms: 0,
            verdict: Verdict::Full,
            checkpoint,
            evidence: Evidence::default(),
            stats: TurnStats::default(),
            result,
        }
        .encode()
    }
}

impl Ctx {
    /// Pins names, and brings those that are missing. Gives the lowest round that all carry.
    pub(super) async fn upload(
        &self,
        session: [u8; 16],
        names: &BTreeSet<ChunkName>,
    ) -> Result<u64> {
        let ttl_ms = 1000 * (1 + self.below(40));
        let expires_ms = |ctx: &Ctx| 1_800_000_000_000 + ctx.shared.now_us.get() / 1000 + ttl_ms;
        let mut by_group: BTreeMap<u32, Vec<ChunkName>> = BTreeMap::new();
        for name in names {
            let group = self.shared.shards.of_chunk(name);
            by_group.entry(group).or_default().push(*name);
        }
        let mut round = 0;
        let mut missing: BTreeMap<u32, Vec<ChunkName>> = BTreeMap::new();
        for (group, names) in &by_group {
            let pin = op::Op::Pin(op::Pin {
                session: Bytes::copy_from_slice(&session),
                expires_ms: expires_ms(self),
                names: join_names(names),
            });
            match self.propose(*group, pin).await? {
                Reply::Missing {
                    names: absent,
                    round: met,
                } => {
                    let is_absent = |i: usize| absent.contains(&(i as u32));
                    let here = names.iter().enumerate().filter(|(i, _)| !is_absent(*i));
                    let mut checker = self.shared.checker.borrow_mut();
                    checker.pinned(here.map(|(_, n)| n), met);
                    round = lower_round(round, met);
                    let bring = absent.iter().filter_map(|i| names.get(*i as usize));
                    missing.entry(*group).or_default().extend(bring);
                }
                _ => return Err(Fail::Conflict),
            }
        }
        for (group, names) in missing {
            // In pieces, so that a session is open for a while.
            let piece = 1 + self.below(6) as usize;
            for names in names.chunks(piece) {
                let put = Request::Put {
                    group,
                    session,
                    ttl_ms,
                    names: names.to_vec(),
                };
                match self.lead(group, put).await? {
                    Answer::Put { round: met } => {
                        self.shared.checker.borrow_mut().pinned(names, met);
                        round = lower_round(round, met);
                    }
                    _ => return Err(Fail::Conflict),
                }
            }
            if self.chance(10) {
                self.pause(10, 2000).await;
            }
        }
        Ok(round)
    }

    /// Uploads what a turn needs and commits it. `rests_on`: the round in which everything was read elsewhere, which then is not uploaded.
    pub(super) async fn commit(
        &self,
        turn: &Turn,
        rests_on: Option<u64>,
    ) -> Result<Option<CheckpointId>> {
        let manifest = turn.manifest();
        let new = manifest.as_ref().map(|m| Manifest::id_of(m));
        let Some(checkpoint) = new.or(turn.head) else {
            return Err(Fail::Conflict);
        };
        let record = turn.record(checkpoint);
        let session: [u8; 16] = self.bytes();
        let trees = turn.trees.iter().flatten().chain(&turn.processes);
        let roots: Vec<ChunkName> = trees.chain(&turn.output).copied().collect();
        let names = self.shared.content.closure(roots);
        let mut rests_on = rests_on;
        for _ in 0..6 {
            let round = match rests_on.take() {
                Some(round) => round,
                None => self.upload(session, &names).await?,
            };
            // A capture goes on for a while; collections go on too.
            if self.chance(15) {
                self.pause(100, 4000).await;
            }
            let commit = op::Op::Commit(request::Commit {
                sandbox: Bytes::copy_from_slice(&turn.sandbox.0),
                epoch: turn.epoch.0,
                turn: turn.turn.0,
                key: format!("k{}", turn.turn),
                record: record.clone().into(),
                checkpoint: new.map(|c| c.0.to_vec()).unwrap_or_default().into(),
                manifest: manifest.clone().unwrap_or_default().into(),
                session: Bytes::copy_from_slice(&session),
                round,
                base: Bytes::new(),
            });
            match self.propose(self.home(&turn.sandbox), commit).await {
                Ok(_) => {
                    self.shared
                        .checker
                        .borrow_mut()
                        .acked(turn.sandbox, turn.turn, &record);
                    if self.chance(60) {
                        self.end(session).await;
                    }
                    return Ok(Some(checkpoint));
                }
                Err(Fail::Refused(r)) if r.upload_again => {}
                Err(e) => return Err(e),
            }
        }
        Err(Fail::GaveUp)
    }

    async fn end(&self, session: [u8; 16]) {
        for group in self.shared.shards.shard_groups() {
            let session = Bytes::copy_from_slice(&session);
            let end = op::Op::EndSession(op::EndSession { session });
            if self.propose(group, end).await.is_err() {
                return;
            }
        }
    }
}
