//! A collector, as `store/src/gc` drives a round: begin, cut, mark, sweep, purge. It may stop at any step; two may run at once.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tidepool_proto::ChunkName;
use tidepool_proto::wire::join_names;
use tidepool_store_core::{META_GROUP, Reply, op};

use super::{Ctx, Task};
use crate::wire::{Answer, Fail, Query, Result};

/// Runs for ever.
pub(crate) fn collector(ctx: Ctx) -> Task {
    Box::pin(async move {
        loop {
            ctx.pause(500, 6000).await;
            if ctx.collect().await.is_ok() {
                ctx.done();
            }
        }
    })
}

impl Ctx {
    async fn collect(&self) -> Result<()> {
        // Some die on the way.
        let dies_at = match self.chance(25) {
            true => self.below(6),
            false => 9,
        };
        let start = op::Op::StartRound(op::StartRound {
            token: Bytes::copy_from_slice(&self.bytes::<16>()),
        });
        let Reply::Gc { round, .. } = self.propose(META_GROUP, start).await? else {
            return Err(Fail::Conflict);
        };
        let step = op::Op::BeginRound(op::Round { round });
        self.everywhere(step, |r, _| r == round).await?;
        if dies_at == 0 {
            return Err(Fail::GaveUp);
        }
        if self.chance(30) {
            self.pause(100, 3000).await;
        }
        let step = op::Op::Cut(op::Round { round });
        self.everywhere(step, |_, f| f == round).await?;
        if dies_at == 1 {
            return Err(Fail::GaveUp);
        }
        let mut marked = BTreeSet::new();
        let purges = self.mark(round, &mut marked).await?;
        if dies_at == 2 {
            return Err(Fail::GaveUp);
        }
        for group in self.shared.shards.shard_groups() {
            self.sweep(group, round, &marked).await?;
            if dies_at == 3 {
                return Err(Fail::GaveUp);
            }
        }
        for (group, purge) in purges {
            self.propose(group, purge).await?;
        }
        Ok(())
    }

    async fn everywhere(&self, step: op::Op, reached: impl Fn(u64, u64) -> bool) -> Result<()> {
        for group in self.groups() {
            match self.propose(group, step.clone()).await? {
                Reply::Gc { round, fence } if reached(round, fence) => {}
                _ => return Err(Fail::Conflict),
            }
        }
        Ok(())
    }

    async fn mark(
        &self,
        round: u64,
        marked: &mut BTreeSet<ChunkName>,
    ) -> Result<Vec<(u32, op::Op)>> {
        let mut purges = Vec::new();
        for group in self.groups() {
            let mut after = Vec::new();
            loop {
                match self.read(group, Query::Roots { round, after }).await? {
                    Answer::Roots { names, purge, next } => {
                        purges.extend(purge.map(|op| (group, *op)));
                        self.walk(names, marked).await?;
                        if next.is_empty() {
                            break;
                        }
                        after = next;
                    }
                    _ => return Err(Fail::Conflict),
                }
            }
        }
        Ok(purges)
    }

    async fn walk(
        &self,
        mut waiting: Vec<ChunkName>,
        marked: &mut BTreeSet<ChunkName>,
    ) -> Result<()> {
        while !waiting.is_empty() {
            let mut by_group: BTreeMap<u32, Vec<ChunkName>> = BTreeMap::new();
            for name in std::mem::take(&mut waiting) {
                if marked.insert(name) {
                    let group = self.shared.shards.of_chunk(&name);
                    by_group.entry(group).or_default().push(name);
                }
            }
            for (group, names) in by_group {
                let mut at = 0;
                while at < names.len() {
                    let query = Query::Links(names[at..].to_vec());
                    let Answer::Links(links) = self.read(group, query).await? else {
                        return Err(Fail::Conflict);
                    };
                    for of in &links {
                        // A mark that is not whole collects nothing.
                        waiting.extend(of.as_ref().ok_or(Fail::NoBody)?);
                    }
                    at += links.len().max(1);
                }
            }
        }
        Ok(())
    }

    async fn sweep(&self, group: u32, round: u64, marked: &BTreeSet<ChunkName>) -> Result<()> {
        let mut after = Vec::new();
        loop {
            let Answer::Old { names, next } = self.read(group, Query::Old { round, after }).await?
            else {
                return Err(Fail::Conflict);
            };
            let garbage: Vec<ChunkName> =
                names.into_iter().filter(|n| !marked.contains(n)).collect();
            for names in garbage.chunks(4) {
                let sweep = op::Op::Sweep(op::Sweep {
                    round,
                    names: join_names(names),
                });
                let Reply::Swept { names, .. } = self.propose(group, sweep).await? else {
                    return Err(Fail::Conflict);
                };
                // Somebody may want at once what was just taken.
                if let Some(name) = self.pick(&names).filter(|_| self.chance(40)) {
                    let _ = self.revive(name).await;
                }
            }
            if next.is_empty() {
                return Ok(());
            }
            after = next;
        }
    }
}
