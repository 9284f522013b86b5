//! Bodies out: from the nearest node that has them, verified, and from the next one where that fails.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use tidepool_proto::body::check;
use tidepool_proto::wire::{join_names, request, response, split_bodies};
use tidepool_proto::{ChunkName, ErrorKind};
use tokio::time::{Instant, sleep, timeout_at};

use crate::chunks::{together, unique};
use crate::{Boxed, Client, ClientError};

/// Names asked for in one request: more than fit one answer, so that answers are full.
const GET_NAMES: usize = 512;
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What one node gave, and what it could not, with the reason.
#[derive(Default)]
struct Got {
    bodies: Vec<(ChunkName, Bytes)>,
    failed: Vec<(ChunkName, ClientError)>,
}

impl Client {
    /// Reads bodies, in the order of `names`, their checksums verified. All are in memory at once: ask for no more than that has room for.
    pub async fn get(&self, names: &[ChunkName]) -> Result<Vec<Bytes>, ClientError> {
        self.get_boxed(names).await
    }

    #[inline(never)]
    fn get_boxed<'a>(
        &'a self,
        names: &'a [ChunkName],
    ) -> Boxed<'a, Result<Vec<Bytes>, ClientError>> {
        Box::pin(self.get_named(names))
    }

    async fn get_named(&self, names: &[ChunkName]) -> Result<Vec<Bytes>, ClientError> {
        let wanted = unique(names);
        let found = if self.link.map().is_none_or(|m| m.is_alone()) {
            match self.get_all(&wanted).await {
                // It may have got company.
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    self.link.refresh(self.link.deadline()).await;
                    if self.link.map().is_none_or(|m| m.is_alone()) {
                        return Err(e);
                    }
                    self.get_from_many(wanted).await?
                }
                other => other?,
            }
        } else {
            self.get_from_many(wanted).await?
        };
        names
            .iter()
            .map(|n| found.get(n).cloned().ok_or_else(ClientError::unexpected))
            .collect()
    }

    /// From the one node there is.
    async fn get_all(
        &self,
        wanted: &[ChunkName],
    ) -> Result<HashMap<ChunkName, Bytes>, ClientError> {
        let parts = wanted.chunks(GET_NAMES).map(|part| {
            let (client, part) = (self.clone(), part.to_vec());
            async move { client.get_part(&part).await }
        });
        let mut found: HashMap<ChunkName, Bytes> = HashMap::with_capacity(wanted.len());
        for (i, bodies) in together(parts).await? {
            found.extend(wanted[i * GET_NAMES..].iter().copied().zip(bodies));
        }
        Ok(found)
    }

    async fn get_part(&self, names: &[ChunkName]) -> Result<Vec<Bytes>, ClientError> {
        let mut bodies: Vec<Bytes> = Vec::with_capacity(names.len());
        while bodies.len() < names.len() {
            let left = &names[bodies.len()..];
            for body in answer(self.link.call(get(left, false)).await?, left)? {
                let name = &names[bodies.len()];
                bodies.push(sound(name, body, |op| self.link.call(op)).await?);
            }
        }
        Ok(bodies)
    }

    async fn get_from_many(
        &self,
        wanted: Vec<ChunkName>,
    ) -> Result<HashMap<ChunkName, Bytes>, ClientError> {
        let deadline = self.link.deadline();
        let mut found = HashMap::with_capacity(wanted.len());
        let mut left = wanted;
        let mut wait = FIRST_WAIT;
        // Each round asks the next best node; after as many as a group has members, all were asked.
        let mut round = 0;
        loop {
            let (parts, rounds) = self.parts(&left, round)?;
            let reads = parts.into_iter().map(|(node, part)| {
                let client = self.clone();
                async move { Ok(client.get_from(node, part).await) }
            });
            let all = timeout_at(deadline, together(reads)).await.map_err(|_| {
                ClientError::new(ErrorKind::Unavailable, "the store did not answer in time")
            })??;
            let mut failed = Vec::new();
            for (_, got) in all {
                found.extend(got.bodies);
                failed.extend(got.failed);
            }
            if failed.is_empty() {
                return Ok(found);
            }
            round += 1;
            if round >= rounds {
                // Nobody has it, or all have it damaged: so it stays. A node that did not answer may have it.
                let passing = |e: &ClientError| e.kind() == ErrorKind::Unavailable;
                if let Some((_, e)) = failed.iter().find(|(_, e)| !passing(e)) {
                    let any_lost = failed.iter().any(|(_, e)| passing(e));
                    if !any_lost || Instant::now() >= deadline {
                        return Err(e.clone());
                    }
                }
                self.link.refresh(deadline).await;
                if timeout_at(deadline, sleep(wait)).await.is_err() {
                    return Err(failed.swap_remove(0).1);
                }
                wait = (wait * 2).min(LONGEST_WAIT);
                round = 0;
            }
            left = failed.into_iter().map(|(n, _)| n).collect();
        }
    }

    /// What to ask of whom in this round, and how many rounds there are.
    #[allow(clippy::type_complexity, reason = "a list of parts and their number")]
    fn parts(
        &self,
        names: &[ChunkName],
        round: usize,
    ) -> Result<(Vec<(u64, Vec<ChunkName>)>, usize), ClientError> {
        let map = self.link.map().ok_or_else(ClientError::unexpected)?;
        let mut readers: HashMap<u32, Vec<u64>> = HashMap::new();
        let mut by_node: BTreeMap<u64, Vec<ChunkName>> = BTreeMap::new();
        let mut rounds = 1;
        for name in names {
            let group = map.shards.of_chunk(name);
            let list = readers.entry(group).or_insert_with(|| {
                let list = self.link.readers(&map, group);
                if list.is_empty() {
                    map.nodes().collect()
                } else {
                    list
                }
            });
            rounds = rounds.max(list.len());
            let node = list.get(round % list.len().max(1)).copied();
            let node = node.ok_or_else(ClientError::unexpected)?;
            by_node.entry(node).or_default().push(*name);
        }
        let parts = by_node.into_iter().flat_map(|(node, names)| {
            let parts: Vec<_> = names
                .chunks(GET_NAMES)
                .map(|c| (node, c.to_vec()))
                .collect();
            parts
        });
        Ok((parts.collect(), rounds))
    }

    async fn get_from(&self, node: u64, names: Vec<ChunkName>) -> Got {
        let mut got = Got::default();
        let mut at = 0;
        while at < names.len() {
            let left = &names[at..];
            let result = self.link.once(node, get(left, false)).await;
            match result.and_then(|op| answer(op, left)) {
                Ok(bodies) => {
                    for body in bodies {
                        let name = names[at];
                        at += 1;
                        match sound(&name, body, |op| self.link.once(node, op)).await {
                            Ok(body) => got.bodies.push((name, body)),
                            Err(e) => got.failed.push((name, e)),
                        }
                    }
                }
                // About the first name only.
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Corruption) => {
                    got.failed.push((names[at], e));
                    at += 1;
                }
                Err(e) => {
                    got.failed.extend(left.iter().map(|n| (*n, e.clone())));
                    at = names.len();
                }
            }
        }
        got
    }
}

/// The bodies of an answer to a get of these names.
fn answer(op: response::Op, names: &[ChunkName]) -> Result<Vec<Bytes>, ClientError> {
    let bodies = match op {
        response::Op::Bodies(b) => split_bodies(&b.lens, b.bodies)?,
        response::Op::NotLeader(_) => {
            return Err(ClientError::new(
                ErrorKind::Unavailable,
                "the node does not keep this shard",
            ));
        }
        _ => return Err(ClientError::unexpected()),
    };
    if bodies.is_empty() || bodies.len() > names.len() {
        return Err(ClientError::unexpected());
    }
    Ok(bodies)
}

fn get(names: &[ChunkName], verify: bool) -> request::Op {
    request::Op::Get(request::Get {
        names: join_names(names),
        verify,
    })
}

/// A body that arrived, if it is whole. Its node is asked again where it is not, for what it verifies itself: so it learns of the damage, counts
/// the body as missing and has it mended. What is whole then was damaged on its way.
async fn sound<F>(
    name: &ChunkName,
    body: Bytes,
    again: impl FnOnce(request::Op) -> F,
) -> Result<Bytes, ClientError>
where
    F: Future<Output = Result<response::Op, ClientError>>,
{
    if body_is_whole(name, &body).is_ok() {
        return Ok(body);
    }
    let names = std::slice::from_ref(name);
    let answered = answer(again(get(names, true)).await?, names)?.pop();
    let body = answered.ok_or_else(ClientError::unexpected)?;
    body_is_whole(name, &body).map(|()| body)
}

fn body_is_whole(name: &ChunkName, body: &Bytes) -> Result<(), ClientError> {
    check(body).map(|_| ()).map_err(|e| {
        ClientError::new(
            ErrorKind::Corruption,
            format!("chunk {name} arrived damaged: {e}"),
        )
    })
}
