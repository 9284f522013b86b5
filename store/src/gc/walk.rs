//! The mark: from every root along the links in clear, until nothing new is met.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use tidepool_proto::wire::{ABSENT, join_names, request, response};
use tidepool_proto::{ChunkName, ErrorKind};
use tidepool_store_core::op;

use super::marks::Marks;
use super::{Failure, Round, purge_of, unexpected};

/// Names looked at in one step; what they link to comes on top of what is still to be walked.
const STEP: usize = 512;

impl Round {
    /// Marks everything that any root needs. Gives commands that clear up what is removed for good.
    pub(super) async fn mark(&mut self, marks: &mut Marks) -> Result<Vec<(u32, op::Op)>, Failure> {
        let mut purges = Vec::new();
        let mut walked: HashSet<ChunkName> = HashSet::new();
        for group in self.shared.map.groups() {
            let mut after = Bytes::new();
            loop {
                let page = request::GcPage {
                    group,
                    round: self.report.round,
                    after,
                    without: self.without.clone(),
                };
                let page = match self.ask(group, request::Op::GcRoots(page)).await? {
                    response::Op::GcRoots(page) => page,
                    _ => return Err(unexpected()),
                };
                self.report.roots += page.items;
                purges.extend(purge_of(page.purge)?.map(|op| (group, op)));
                let (names, _) = page.names.as_chunks::<32>();
                let roots = names.iter().map(|n| ChunkName(*n)).collect();
                self.walk(roots, &mut walked, marks).await?;
                self.shared.collector.set(&self.report);
                if page.next.is_empty() {
                    break;
                }
                after = page.next;
            }
        }
        self.report.nodes = walked.len() as u64;
        Ok(purges)
    }

    /// Walks depth first, so that what waits stays small. `walked` are the chunks with links that were met.
    async fn walk(
        &mut self,
        mut waiting: Vec<ChunkName>,
        walked: &mut HashSet<ChunkName>,
        marks: &mut Marks,
    ) -> Result<(), Failure> {
        while !waiting.is_empty() {
            let from = waiting.len().saturating_sub(STEP);
            let mut by_group: BTreeMap<u32, Vec<ChunkName>> = BTreeMap::new();
            let mut step = HashSet::new();
            for name in waiting.drain(from..) {
                if !walked.contains(&name) && step.insert(name) {
                    let group = self.shared.map.of_chunk(&name);
                    by_group.entry(group).or_default().push(name);
                }
            }
            for (group, names) in by_group {
                self.links(group, &names, &mut waiting, walked, marks)
                    .await?;
            }
        }
        Ok(())
    }

    async fn links(
        &mut self,
        group: u32,
        names: &[ChunkName],
        waiting: &mut Vec<ChunkName>,
        walked: &mut HashSet<ChunkName>,
        marks: &mut Marks,
    ) -> Result<(), Failure> {
        let mut at = 0;
        while at < names.len() {
            let ask = request::GcLinks {
                group,
                names: join_names(&names[at..]),
            };
            let page = match self.ask(group, request::Op::GcLinks(ask)).await? {
                response::Op::GcLinks(page) => page,
                _ => return Err(unexpected()),
            };
            let (counts, _) = page.counts.as_chunks::<4>();
            let (links, _) = page.links.as_chunks::<32>();
            if counts.is_empty() || counts.len() > names.len() - at {
                return Err(unexpected());
            }
            let mut links = links.iter();
            for (name, count) in names[at..].iter().zip(counts) {
                let count = u32::from_le_bytes(*count);
                if count == ABSENT {
                    return Err(Failure::new(
                        ErrorKind::Corruption,
                        format!(
                            "chunk {name} is needed and not there: nothing is collected while the mark is incomplete"
                        ),
                    ));
                }
                marks.add(name);
                if count > 0 {
                    walked.insert(*name);
                }
                self.report.links += u64::from(count);
                let before = waiting.len();
                waiting.extend(links.by_ref().take(count as usize).map(|n| ChunkName(*n)));
                if waiting.len() - before != count as usize {
                    return Err(unexpected());
                }
            }
            at += counts.len();
        }
        Ok(())
    }
}
