//! Pins and puts for several shards: one request for each node that leads some of them, all under way together, answered as one.
//!
//! A node that does not lead one of the shards says so; its part is then split anew. Pinning and putting twice is doing it once.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use tidepool_proto::wire::{join_bodies, join_names, request, response, split_bodies, split_names};
use tidepool_proto::{ChunkName, ErrorKind};
use tokio::time::Instant;

use crate::error::ClientError;
use crate::link::Link;
use crate::route::Route;
use crate::types::lower_round;

/// How often a request is split anew before its time is over anyway.
const ROUNDS: u32 = 1000;

/// A part of a request: which of its names, by position.
type Part = Vec<u32>;

/// Something with names that can be taken apart and its answers put together.
trait Parts {
    fn names(&self) -> &[ChunkName];
    fn part(&self, at: &[u32]) -> request::Op;
    /// Takes an answer to a part in.
    fn take(&mut self, answer: response::Op) -> Result<(), ClientError>;
}

impl Link {
    pub(crate) async fn call_split(&self, op: request::Op) -> Result<response::Op, ClientError> {
        let alone = self.map().is_none_or(|m| m.is_alone());
        match op {
            // Where there is one node it gets all, as it is.
            op if alone => match self
                .send_or_moved(op.clone(), Route::Any, self.deadline(), true)
                .await?
            {
                Ok(answer) => Ok(answer),
                Err(_) => Box::pin(self.call_apart(op)).await,
            },
            op => self.call_apart(op).await,
        }
    }

    async fn call_apart(&self, op: request::Op) -> Result<response::Op, ClientError> {
        match op {
            request::Op::Pin(r) => {
                let names = split_names(&r.names)?;
                let mut pin = Pin {
                    missing: HashMap::new(),
                    round: 0,
                    names,
                    r,
                };
                self.run(&mut pin).await?;
                Ok(pin.answer())
            }
            request::Op::Put(r) => {
                let names = split_names(&r.names)?;
                let bodies = split_bodies(&r.lens, r.bodies.clone())?;
                if bodies.len() != names.len() {
                    return Err(ClientError::new(
                        ErrorKind::Invalid,
                        "the bodies have not one name each",
                    ));
                }
                let mut put = Put {
                    answer: response::Put::default(),
                    names,
                    bodies,
                    r,
                };
                self.run(&mut put).await?;
                Ok(response::Op::Put(put.answer))
            }
            _ => Err(ClientError::unexpected()),
        }
    }

    async fn run(&self, what: &mut dyn PartsSend) -> Result<(), ClientError> {
        let deadline = self.deadline();
        let mut left: Part = (0..what.names().len() as u32).collect();
        for round in 0..ROUNDS {
            if left.is_empty() {
                return Ok(());
            }
            if round > 2 {
                wait(round, deadline).await?;
            }
            let parts = self.apart(what, &left);
            let sends = parts.into_iter().map(|(route, at)| {
                let op = what.part(&at);
                async move { (at, self.send_or_moved(op, route, deadline, true).await) }
            });
            let mut again = Part::new();
            let answers = join_all(sends.collect()).await;
            for (at, answer) in answers {
                match answer? {
                    Ok(answer) => what.take(answer)?,
                    Err(_moved) => again.extend(at),
                }
            }
            left = again;
        }
        Err(ClientError::new(
            ErrorKind::Unavailable,
            "the leaders of the shards change all the time",
        ))
    }

    /// The parts of what is left, by the node that leads their shards; where nobody is known to lead, by shard.
    fn apart(&self, what: &dyn PartsSend, left: &[u32]) -> Vec<(Route, Part)> {
        let Some(map) = self.map() else {
            return vec![(Route::Any, left.to_vec())];
        };
        let mut by_leader: BTreeMap<u64, (u32, Part)> = BTreeMap::new();
        let mut by_group: BTreeMap<u32, Part> = BTreeMap::new();
        for i in left {
            let group = map.shards.of_chunk(&what.names()[*i as usize]);
            match map.leader(group) {
                Some(leader) => {
                    let (_, part) = by_leader.entry(leader).or_insert((group, Part::new()));
                    part.push(*i);
                }
                None => by_group.entry(group).or_default().push(*i),
            }
        }
        let led = by_leader.into_values();
        led.chain(by_group)
            .map(|(group, part)| (Route::Leader(group), part))
            .collect()
    }
}

async fn wait(round: u32, deadline: Instant) -> Result<(), ClientError> {
    let late = || ClientError::new(ErrorKind::Unavailable, "the shards had no leaders in time");
    // Short for as long as an election lasts.
    let steps = if round < 40 { 4 } else { 6 };
    let pause = std::time::Duration::from_millis(10 << round.min(steps));
    tokio::time::timeout_at(deadline, tokio::time::sleep(pause))
        .await
        .map_err(|_| late())
}

/// Runs futures together, and gives all results.
async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut all = true;
        for (future, out) in &mut running {
            if out.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(v) => *out = Some(v),
                    std::task::Poll::Pending => all = false,
                }
            }
        }
        if all {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    running.into_iter().filter_map(|(_, out)| out).collect()
}

/// [`Parts`] that can be worked on from any thread.
trait PartsSend: Parts + Send + Sync {}
impl<T: Parts + Send + Sync> PartsSend for T {}

struct Pin {
    r: request::Pin,
    names: Vec<ChunkName>,
    missing: HashMap<ChunkName, ()>,
    /// The lowest of all parts.
    round: u64,
}

impl Pin {
    /// The missing names, in the order they were asked for.
    fn answer(&self) -> response::Op {
        let missing = self.names.iter().filter(|n| self.missing.contains_key(n));
        response::Op::Pinned(response::Pinned {
            missing: join_names(missing),
            round: self.round,
        })
    }
}

impl Parts for Pin {
    fn names(&self) -> &[ChunkName] {
        &self.names
    }

    fn part(&self, at: &[u32]) -> request::Op {
        request::Op::Pin(request::Pin {
            names: join_names(at.iter().map(|i| &self.names[*i as usize])),
            ..self.r.clone()
        })
    }

    fn take(&mut self, answer: response::Op) -> Result<(), ClientError> {
        match answer {
            response::Op::Pinned(pinned) => {
                self.round = lower_round(self.round, pinned.round);
                let names = split_names(&pinned.missing)?;
                self.missing.extend(names.into_iter().map(|n| (n, ())));
                Ok(())
            }
            _ => Err(ClientError::unexpected()),
        }
    }
}

struct Put {
    r: request::Put,
    names: Vec<ChunkName>,
    bodies: Vec<Bytes>,
    answer: response::Put,
}

impl Parts for Put {
    fn names(&self) -> &[ChunkName] {
        &self.names
    }

    fn part(&self, at: &[u32]) -> request::Op {
        let bodies = at.iter().map(|i| &self.bodies[*i as usize]);
        let (lens, all) = join_bodies(bodies);
        request::Op::Put(request::Put {
            names: join_names(at.iter().map(|i| &self.names[*i as usize])),
            lens,
            bodies: all,
            ..self.r.clone()
        })
    }

    fn take(&mut self, answer: response::Op) -> Result<(), ClientError> {
        match answer {
            response::Op::Put(p) => {
                self.answer.stored += p.stored;
                self.answer.stored_bytes += p.stored_bytes;
                self.answer.present += p.present;
                self.answer.round = lower_round(self.answer.round, p.round);
                Ok(())
            }
            _ => Err(ClientError::unexpected()),
        }
    }
}
