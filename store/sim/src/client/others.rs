//! Those who read, those who remove, and those who end sessions.

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::wire::request;
use tidepool_store_core::{META_GROUP, Reply, keys, op};

use super::{Ctx, Task};
use crate::wire::{Answer, Query, Request, Result};

/// Reads rows, manifests, and bodies from any replica.
pub(crate) fn reader(ctx: Ctx) -> Task {
    Box::pin(async move {
        loop {
            ctx.pause(5, 300).await;
            let _ = ctx.read_something().await;
        }
    })
}

/// Removes checkpoints and sandboxes, and keeps some.
pub(crate) fn remover(ctx: Ctx) -> Task {
    Box::pin(async move {
        loop {
            ctx.pause(200, 3000).await;
            if ctx.remove_something().await.is_ok() {
                ctx.done();
            }
        }
    })
}

/// Ends the sessions whose time is over.
pub(crate) fn expirer(ctx: Ctx) -> Task {
    Box::pin(async move {
        loop {
            ctx.pause(1000, 6000).await;
            let groups: Vec<u32> = ctx.shared.shards.shard_groups().collect();
            let Some(group) = ctx.pick(&groups) else {
                continue;
            };
            let Ok(Answer::Sessions(all)) = ctx.read(group, Query::Sessions).await else {
                continue;
            };
            // Whether they are over is looked at again when the command is applied.
            let sessions: Vec<u8> = all.iter().flat_map(|(id, _)| *id).collect();
            let expire = op::Op::ExpireSessions(op::ExpireSessions {
                sessions: sessions.into(),
            });
            let _ = ctx.propose(group, expire).await;
        }
    })
}

impl Ctx {
    async fn read_something(&self) -> Result<()> {
        let (sandboxes, checkpoints) = {
            let dir = self.shared.dir.borrow();
            (dir.sandboxes.clone(), dir.checkpoints.clone())
        };
        if self.chance(60) {
            if let Some(id) = self.pick(&sandboxes) {
                self.row(self.home(&id), keys::sandbox(&id)).await?;
            }
            return Ok(());
        }
        if self.chance(20) {
            self.row(META_GROUP, keys::cluster()).await?;
            return Ok(());
        }
        let Some((sandbox, checkpoint)) = self.pick(&checkpoints) else {
            return Ok(());
        };
        let query = Query::Manifest {
            sandbox,
            checkpoint,
        };
        let Answer::Manifest(_, Some(bytes)) = self.read(self.home(&sandbox), query).await? else {
            return Ok(());
        };
        let Ok(manifest) = Manifest::decode(&bytes) else {
            return Ok(());
        };
        let content = self.shared.content.clone();
        for name in content.closure(manifest.links()).into_iter().take(6) {
            let nodes = self.shared.dir.borrow().nodes.clone();
            for _ in 0..3 {
                let Some(node) = self.pick(&nodes) else { break };
                if let Ok(Answer::Body(body)) = self.call(node, Request::Get { name }).await {
                    if !content.opens(&name, &body) {
                        let mut checker = self.shared.checker.borrow_mut();
                        checker.fail(format!("node {node} answers another body for {name}"));
                    }
                    break;
                }
            }
        }
        self.done();
        Ok(())
    }

    async fn remove_something(&self) -> Result<()> {
        let known = self.shared.dir.borrow().sandboxes.clone();
        let Some(id) = self.pick(&known) else {
            return Ok(());
        };
        let home = self.home(&id);
        let Answer::History(Some(history)) = self.read(home, Query::History(id)).await? else {
            return Ok(());
        };
        let bytes = || Bytes::copy_from_slice(&id.0);
        if self.chance(15) {
            let remove = op::Op::RemoveSandbox(request::RemoveSandbox {
                id: bytes(),
                epoch: history.sandbox.epoch.0,
            });
            let reply = self.propose(home, remove).await?;
            self.shared.dir.borrow_mut().sandboxes.retain(|s| *s != id);
            if let Reply::Removed { name } = reply {
                let release = op::Op::ReleaseName(op::ReleaseName { name, id: bytes() });
                self.propose(META_GROUP, release).await?;
            }
            return Ok(());
        }
        if self.chance(15)
            && let Some((_, checkpoint)) = self.pick(&history.checkpoints)
        {
            let keep = op::Op::KeepCheckpoint(request::KeepCheckpoint {
                sandbox: bytes(),
                checkpoint: Bytes::copy_from_slice(&checkpoint.0),
                keep: self.chance(50),
            });
            self.propose(home, keep).await?;
            return Ok(());
        }
        // All but the newest few.
        let stay = self.below(3) as usize;
        let old = history.checkpoints.len().saturating_sub(stay);
        let gone = history.checkpoints[..old].iter().map(|(_, c)| *c);
        let gone: Vec<u8> = gone
            .filter(|c| Some(*c) != history.sandbox.head)
            .flat_map(|c| c.0)
            .collect();
        let remove = op::Op::RemoveCheckpoints(request::RemoveCheckpoints {
            sandbox: bytes(),
            changes: history.sandbox.changes,
            checkpoints: gone.into(),
        });
        self.propose(home, remove).await?;
        Ok(())
    }
}
