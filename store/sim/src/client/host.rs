//! A host: creates sandboxes or takes over others', commits turns, forks what others committed.

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::wire::request;
use tidepool_proto::{CheckpointId, ChunkName, Epoch, SandboxId, TurnNo};
use tidepool_store_core::{META_GROUP, Reply, SandboxState, keys, op};

use super::upload::Turn;
use super::{Ctx, Task};
use crate::wire::{Answer, Fail, Query, Result};

/// A sandbox that this host holds.
struct Held {
    id: SandboxId,
    epoch: Epoch,
    next: TurnNo,
    head: Option<CheckpointId>,
}

/// Runs for ever.
pub(crate) fn host(ctx: Ctx) -> Task {
    Box::pin(async move {
        loop {
            ctx.pause(10, 500).await;
            let Ok(Some(mut held)) = ctx.obtain().await else {
                continue;
            };
            for _ in 0..ctx.below(8) {
                match ctx.turn(&mut held).await {
                    Ok(()) => ctx.done(),
                    Err(_) => break,
                }
                ctx.pause(1, 800).await;
            }
        }
    })
}

impl Ctx {
    async fn obtain(&self) -> Result<Option<Held>> {
        let known = self.shared.dir.borrow().sandboxes.clone();
        match self.pick(&known) {
            Some(id) if known.len() >= 4 || self.chance(50) => self.take(id).await,
            _ => self.create().await,
        }
    }

    async fn create(&self) -> Result<Option<Held>> {
        let id = SandboxId(self.bytes());
        let name = format!("s{}", self.below(40));
        let bytes = || Bytes::copy_from_slice(&id.0);
        let mut replacing = Bytes::new();
        for _ in 0..3 {
            let reserve = op::Op::ReserveName(op::ReserveName {
                name: name.clone(),
                id: bytes(),
                replacing: replacing.clone(),
            });
            match self.propose(META_GROUP, reserve).await? {
                Reply::TakenBy(other) => {
                    let id = Bytes::copy_from_slice(&other.0);
                    let fence = op::Op::FenceUnborn(op::FenceUnborn { id: id.clone() });
                    match self.propose(self.home(&other), fence).await? {
                        Reply::Exists(false) => replacing = id,
                        _ => return Ok(None),
                    }
                }
                _ => break,
            }
        }
        let create = op::Op::CreateSandbox(request::CreateSandbox {
            id: bytes(),
            name,
            meta: Bytes::from_static(b"m"),
        });
        let Reply::Epoch(epoch) = self.propose(self.home(&id), create).await? else {
            return Err(Fail::Conflict);
        };
        self.shared.dir.borrow_mut().sandboxes.push(id);
        Ok(Some(Held {
            id,
            epoch,
            next: TurnNo(0),
            head: None,
        }))
    }

    async fn take(&self, id: SandboxId) -> Result<Option<Held>> {
        let take = op::Op::TakeSandbox(request::TakeSandbox {
            id: Bytes::copy_from_slice(&id.0),
            token: Bytes::copy_from_slice(&self.bytes::<16>()),
        });
        let epoch = match self.propose(self.home(&id), take).await {
            Ok(Reply::Epoch(epoch)) => epoch,
            Err(Fail::Refused(_)) => {
                let mut dir = self.shared.dir.borrow_mut();
                dir.sandboxes.retain(|s| *s != id);
                return Ok(None);
            }
            Err(e) => return Err(e),
            Ok(_) => return Err(Fail::Conflict),
        };
        let Some(row) = self.row(self.home(&id), keys::sandbox(&id)).await? else {
            return Ok(None);
        };
        let state = SandboxState::decode(&row).map_err(|_| Fail::NoBody)?;
        Ok(Some(Held {
            id,
            epoch,
            next: TurnNo(state.last_turn.0 + u64::from(state.turns > 0)),
            head: state.head,
        }))
    }

    async fn turn(&self, held: &mut Held) -> Result<()> {
        let content = self.shared.content.clone();
        let mut turn = Turn {
            sandbox: held.id,
            epoch: held.epoch,
            turn: held.next,
            head: held.head,
            trees: None,
            processes: None,
            output: None,
        };
        let mut rests_on = None;
        let kind = self.below(100);
        if held.head.is_some() && kind < 20 {
            // Nothing changed, but something may have been said.
            if self.chance(50) {
                turn.output = self.pick(&content.leaves);
            }
        } else {
            turn.trees = self.trees();
            if kind > 80 {
                turn.processes = self.pick(&content.trees);
            }
            if kind > 60 {
                turn.output = self.pick(&content.leaves);
            }
            if kind.is_multiple_of(10)
                && let Some((trees, round)) = self.of_another().await?
            {
                turn.trees = Some(trees);
                (turn.processes, turn.output) = (None, None);
                rests_on = Some(round);
            }
        }
        let checkpoint = self.commit(&turn, rests_on).await?;
        held.next = TurnNo(held.next.0 + 1);
        held.head = checkpoint.or(held.head);
        if let (Some(checkpoint), true) = (checkpoint, turn.trees.is_some()) {
            let mut dir = self.shared.dir.borrow_mut();
            dir.checkpoints.push((held.id, checkpoint));
            if dir.checkpoints.len() > 60 {
                dir.checkpoints.remove(0);
            }
        }
        Ok(())
    }

    /// Commits a turn that needs this chunk. It is brought before anything else, so that the entries that take it and bring it again come
    /// close together in the log: a replica that is a little behind applies the first when it has the other already.
    pub(super) async fn revive(&self, name: ChunkName) -> Result<()> {
        let content = self.shared.content.clone();
        let mut of = content.trees.iter().copied();
        let tree = of.find(|t| content.closure([*t]).contains(&name));
        self.upload(self.bytes(), &content.closure([tree.unwrap_or(name)]))
            .await?;
        let Some(held) = self.obtain().await? else {
            return Ok(());
        };
        let turn = Turn {
            sandbox: held.id,
            epoch: held.epoch,
            turn: held.next,
            head: held.head,
            trees: tree.map(|t| [t, t]).or_else(|| self.trees()),
            processes: None,
            output: tree.is_none().then_some(name),
        };
        self.commit(&turn, None).await?;
        self.done();
        Ok(())
    }

    fn trees(&self) -> Option<[ChunkName; 2]> {
        let trees = &self.shared.content.trees;
        Some([self.pick(trees)?, self.pick(trees)?])
    }

    /// The trees of a checkpoint of anybody's, and the round in which it was there: what a fork rests on.
    async fn of_another(&self) -> Result<Option<([ChunkName; 2], u64)>> {
        let known = self.shared.dir.borrow().checkpoints.clone();
        let Some((sandbox, checkpoint)) = self.pick(&known) else {
            return Ok(None);
        };
        let query = Query::Manifest {
            sandbox,
            checkpoint,
        };
        let Answer::Manifest(round, Some(bytes)) = self.read(self.home(&sandbox), query).await?
        else {
            return Ok(None);
        };
        let manifest = Manifest::decode(&bytes).map_err(|_| Fail::NoBody)?;
        // A fork takes its time to restore.
        if self.chance(40) {
            self.pause(100, 5000).await;
        }
        let trees = [ChunkName(manifest.image.0), ChunkName(manifest.upper.0)];
        Ok(Some((trees, round)))
    }
}
