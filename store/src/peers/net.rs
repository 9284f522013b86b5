//! What the groups want of other nodes: envelopes go as control messages; bodies and pages of raft snapshots are requests. Bodies are
//! checked and stored as they come, a few MiB at a time, so that memory is bounded whatever is missing.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tidepool_proto::ChunkName;
use tidepool_proto::body::check;
use tidepool_proto::wire::{
    ANSWER_BYTES, MAX_NAMES, join_bodies, join_names, split_bodies, split_names,
};
use tidepool_store_core::{ShardMap, keys};
use tidepool_store_raft::{Envelope, Page, PageRequest};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Arrivals, Peers};
use crate::bodies::{self, BodyStore, BodyWriter, Damaged};
use crate::db::{Db, DbError};
use crate::driver::{Handle, Net};
use crate::logs;
use crate::scrub::PeerBodies;
use crate::stats::Counters;

/// Fetches under way at once: each holds an answer of a little more than [`ANSWER_BYTES`] at a time.
const FETCHES: usize = 16;
/// How long a fetch waits for a push.
const ARRIVE: Duration = Duration::from_secs(2);

/// What is asked of another node.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PeerRequest {
    #[prost(oneof = "Ask", tags = "1, 2")]
    pub(super) ask: Option<Ask>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Ask {
    #[prost(message, tag = "1")]
    Bodies(BodiesRequest),
    #[prost(message, tag = "2")]
    Page(PageRequest),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BodiesRequest {
    #[prost(uint32, tag = "1")]
    pub(super) group: u32,
    /// The sender has to have applied this much to call a name gone.
    #[prost(uint64, tag = "2")]
    pub(super) index: u64,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) names: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BodiesAnswer {
    /// Those whose bodies follow.
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) names: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) lens: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) bodies: Bytes,
    /// Those that were collected.
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) gone: Bytes,
    /// How many of the names asked for were looked at.
    #[prost(uint32, tag = "5")]
    pub(super) looked_at: u32,
}

/// Answers a request for bodies, as many as fit.
pub(super) fn bodies_of(
    db: &Db,
    bodies: &dyn BodyStore,
    request: &BodiesRequest,
) -> Result<BodiesAnswer, String> {
    let names = split_names(&request.names).map_err(|e| e.to_string())?;
    if names.len() > MAX_NAMES {
        return Err("too many names".into());
    }
    // Before the rows: what is gone at this index stays so, or is brought again by a later entry.
    let applied = logs::applied(db, request.group).map_err(|e| e.to_string())?;
    let may_be_gone = applied.is_some_and(|a| a >= request.index);
    let (mut found, mut all, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    let (mut bytes, mut looked_at) = (0, 0);
    for name in &names {
        if bytes >= ANSWER_BYTES {
            break;
        }
        looked_at += 1;
        match bodies.get(name) {
            Ok(Some(body)) => {
                bytes += body.len();
                found.push(*name);
                all.push(body);
            }
            Ok(None) if may_be_gone => {
                let row = db.state(request.group, &keys::chunk(name));
                if row.map_err(|e| e.to_string())?.is_none() {
                    gone.push(*name);
                }
            }
            // Damaged here, or not here yet: another source may have it.
            Ok(None) | Err(DbError::Corruption(_)) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    let (lens, all) = join_bodies(all.iter());
    Ok(BodiesAnswer {
        names: join_names(&found),
        lens,
        bodies: all,
        gone: join_names(&gone),
        looked_at,
    })
}

/// Carries out what the groups want of other nodes. Clones share it.
#[derive(Clone)]
pub(crate) struct PeerNet {
    pub(crate) peers: Peers,
    pub(crate) writer: BodyWriter,
    pub(crate) damaged: Arc<Damaged>,
    pub(crate) driver: Handle,
    pub(crate) fetches: Arc<Semaphore>,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) arrivals: Arc<Arrivals>,
    pub(crate) bodies: Arc<dyn BodyStore>,
    pub(crate) counters: Arc<Counters>,
}

impl PeerNet {
    /// Needs a runtime that outlives it.
    pub(crate) fn new(
        peers: Peers,
        writer: BodyWriter,
        damaged: Arc<Damaged>,
        driver: Handle,
        arrivals: Arc<Arrivals>,
        bodies: Arc<dyn BodyStore>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            arrivals,
            bodies,
            counters,
            peers,
            writer,
            damaged,
            driver,
            fetches: Arc::new(Semaphore::new(FETCHES)),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    fn missing(&self, names: &[ChunkName]) -> Result<Vec<ChunkName>, String> {
        let sound = bodies::sound(&*self.bodies, &self.damaged, names);
        let all = names.iter().zip(sound.map_err(|e| e.to_string())?);
        let missing = all.filter(|(_, sound)| !sound);
        Ok(missing.map(|(name, _)| *name).collect())
    }

    /// Gets and stores what node `from` has of these, and gives those that it has collected.
    async fn bodies(
        &self,
        from: u64,
        group: u32,
        index: u64,
        names: &[ChunkName],
    ) -> Result<Vec<ChunkName>, String> {
        // What its leader has pushed, or is pushing, need not be asked for.
        let arriving = timeout(ARRIVE, self.arrivals.wait(names)).await;
        let missing;
        let names = match arriving {
            Ok(false) => names,
            Ok(true) | Err(_) => {
                missing = self.missing(names)?;
                &missing
            }
        };
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let _permit = self.fetches.acquire().await.map_err(|e| e.to_string())?;
        let mut gone = Vec::new();
        let mut at = 0;
        while at < names.len() {
            let part = &names[at..names.len().min(at + MAX_NAMES)];
            let answer = ask_bodies(&self.peers, from, group, index, part).await?;
            gone.extend(answer.gone);
            if !answer.found.is_empty() {
                let count = answer.found.len();
                let put = self.writer.put(answer.found).await;
                put.map_err(|e| e.to_string())?;
                self.counters.fetched(count);
            }
            at += answer.looked_at;
        }
        Ok(gone)
    }
}

impl Net for PeerNet {
    fn send(&self, to: u64, envelopes: Vec<Envelope>) {
        for envelope in envelopes {
            self.peers.send(to, envelope.encode().into());
        }
    }

    fn fetch_bodies(&self, fetch: u64, from: u64, group: u32, index: u64, names: Vec<ChunkName>) {
        let net = self.clone();
        self.runtime.spawn(async move {
            match net.bodies(from, group, index, &names).await {
                Ok(gone) => net.driver.bodies_fetched(fetch, gone),
                Err(why) => {
                    tracing::debug!(from, group, %why, "bodies could not be fetched");
                    net.driver.fetch_failed(fetch);
                }
            }
        });
    }

    fn fetch_page(&self, fetch: u64, from: u64, request: PageRequest) {
        let net = self.clone();
        self.runtime.spawn(async move {
            let group = request.group;
            let ask = PeerRequest {
                ask: Some(Ask::Page(request)),
            };
            let answer = net.peers.request(from, ask.encode_to_vec().into()).await;
            let page = answer
                .map_err(|e| e.to_string())
                .and_then(|bytes| Page::decode(bytes).map_err(|e| e.to_string()));
            match page {
                Ok(page) => net.driver.page_fetched(fetch, page),
                Err(why) => {
                    tracing::debug!(from, group, %why, "a page of a raft snapshot could not be fetched");
                    net.driver.fetch_failed(fetch);
                }
            }
        });
    }
}

/// What a node answered.
struct Got {
    found: Vec<(ChunkName, Bytes)>,
    gone: Vec<ChunkName>,
    looked_at: usize,
}

/// Asks for bodies once; what comes is checked.
async fn ask_bodies(
    peers: &Peers,
    from: u64,
    group: u32,
    index: u64,
    names: &[ChunkName],
) -> Result<Got, String> {
    let ask = PeerRequest {
        ask: Some(Ask::Bodies(BodiesRequest {
            group,
            index,
            names: join_names(names),
        })),
    };
    let answer = peers.request(from, ask.encode_to_vec().into()).await;
    let answer = BodiesAnswer::decode(answer.map_err(|e| e.to_string())?)
        .map_err(|e| format!("not an answer: {e}"))?;
    let found = split_names(&answer.names).map_err(|e| e.to_string())?;
    let gone = split_names(&answer.gone).map_err(|e| e.to_string())?;
    let bodies = split_bodies(&answer.lens, answer.bodies).map_err(|e| e.to_string())?;
    let looked_at = answer.looked_at as usize;
    let asked = |n: &ChunkName| names.contains(n);
    if found.len() != bodies.len()
        || looked_at == 0
        || looked_at > names.len()
        || !found.iter().all(asked)
        || !gone.iter().all(asked)
    {
        return Err("an answer to something that was not asked for".into());
    }
    for (name, body) in found.iter().zip(&bodies) {
        check(body).map_err(|e| format!("chunk {name} arrived damaged: {e}"))?;
    }
    Ok(Got {
        found: found.into_iter().zip(bodies).collect(),
        gone,
        looked_at,
    })
}

/// Other nodes' copies, for what is damaged here.
pub(crate) struct OtherCopies {
    pub(crate) peers: Peers,
    pub(crate) map: ShardMap,
    pub(crate) driver: Handle,
}

impl PeerBodies for OtherCopies {
    fn any(&self) -> bool {
        let has_others = |s: &tidepool_store_raft::GroupStatus| {
            s.conf.voters.len() + s.conf.learners.len() > 1 || !s.conf.voters_outgoing.is_empty()
        };
        self.driver.status().iter().any(has_others) || !self.peers.connected().is_empty()
    }

    fn fetch<'a>(
        &'a self,
        name: &'a ChunkName,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Bytes>, String>> + Send + 'a>> {
        Box::pin(async move {
            let group = self.map.of_chunk(name);
            let statuses = self.driver.status();
            let status = statuses.iter().find(|s| s.group == group);
            let members = status.map(|s| s.conf.clone()).unwrap_or_default();
            let mut failed = None;
            let all = members.voters.iter().chain(&members.learners);
            for node in all.filter(|n| **n != self.peers.me()) {
                match ask_bodies(&self.peers, *node, group, u64::MAX, &[*name]).await {
                    Ok(got) => {
                        if let Some((_, body)) = got.found.into_iter().next() {
                            return Ok(Some(body));
                        }
                    }
                    Err(why) => failed = Some(why),
                }
            }
            failed.map_or(Ok(None), Err)
        })
    }
}
