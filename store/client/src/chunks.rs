//! Chunks: sessions, and bodies in (out: [`crate::reads`]). Large calls are split into requests that are under way together.

use std::collections::HashSet;
use std::future::Future;

use bytes::Bytes;
use tidepool_proto::body::MAX_BODY_LEN;
use tidepool_proto::wire::{
    MAX_NAMES, MAX_PUT_BODIES, MAX_PUT_BYTES, join_bodies, join_names, request, response,
    split_names,
};
use tidepool_proto::{ChunkName, ErrorKind, SessionId};
use tokio::task::JoinSet;

use crate::types::lower_round;
use crate::{Boxed, Client, ClientError, Pinned, PutStats};

/// Requests with bodies that one call has under way.
const AT_ONCE: usize = 4;

impl Client {
    /// Pins names for a session, which opens with its first call and lives on with each: whatever rests on the round in the answer is either committed before
    /// a collection could take them, or refused.
    /// Gives the names that are not in the store, in order, each once.
    pub async fn pin(
        &self,
        session: SessionId,
        names: &[ChunkName],
    ) -> Result<Pinned, ClientError> {
        let names = unique(names);
        let mut pinned = Pinned::default();
        for part in names.chunks(MAX_NAMES) {
            let op = request::Op::Pin(request::Pin {
                session: Bytes::copy_from_slice(&session.0),
                ttl_ms: self.ttl_ms(),
                names: join_names(part),
            });
            match self.link.call(op).await? {
                response::Op::Pinned(p) => {
                    pinned.missing.extend(split_names(&p.missing)?);
                    pinned.round = lower_round(pinned.round, p.round);
                }
                _ => return Err(ClientError::unexpected()),
            }
        }
        Ok(pinned)
    }

    /// Stores bodies, which are durable and pinned for the session when this returns. Bodies that are there already cost a look-up.
    pub async fn put(
        &self,
        session: SessionId,
        bodies: Vec<(ChunkName, Bytes)>,
    ) -> Result<PutStats, ClientError> {
        self.put_boxed(session, bodies).await
    }

    #[inline(never)]
    fn put_boxed(
        &self,
        session: SessionId,
        bodies: Vec<(ChunkName, Bytes)>,
    ) -> Boxed<'_, Result<PutStats, ClientError>> {
        Box::pin(self.put_all(session, bodies))
    }

    async fn put_all(
        &self,
        session: SessionId,
        bodies: Vec<(ChunkName, Bytes)>,
    ) -> Result<PutStats, ClientError> {
        let mut seen = HashSet::with_capacity(bodies.len());
        let mut batches: Vec<Vec<(ChunkName, Bytes)>> = Vec::new();
        let mut bytes = 0;
        for (name, body) in bodies {
            if body.len() > MAX_BODY_LEN {
                return Err(ClientError::new(
                    ErrorKind::Invalid,
                    format!("the body of chunk {name} has {} bytes", body.len()),
                ));
            }
            if !seen.insert(name) {
                continue;
            }
            match batches.last_mut() {
                Some(last)
                    if last.len() < MAX_PUT_BODIES && bytes + body.len() <= MAX_PUT_BYTES =>
                {
                    bytes += body.len();
                    last.push((name, body));
                }
                _ => {
                    bytes = body.len();
                    batches.push(vec![(name, body)]);
                }
            }
        }
        let parts = batches.into_iter().map(|batch| {
            let client = self.clone();
            async move { client.put_batch(session, batch).await }
        });
        let mut total = PutStats::default();
        for (_, part) in together(parts).await? {
            total.stored += part.stored;
            total.stored_bytes += part.stored_bytes;
            total.present += part.present;
            total.round = lower_round(total.round, part.round);
        }
        Ok(total)
    }

    async fn put_batch(
        &self,
        session: SessionId,
        batch: Vec<(ChunkName, Bytes)>,
    ) -> Result<PutStats, ClientError> {
        let (lens, bodies) = join_bodies(batch.iter().map(|(_, b)| b));
        let op = request::Op::Put(request::Put {
            session: Bytes::copy_from_slice(&session.0),
            ttl_ms: self.ttl_ms(),
            names: join_names(batch.iter().map(|(n, _)| n)),
            lens,
            bodies,
        });
        drop(batch);
        match self.link.call(op).await? {
            response::Op::Put(p) => Ok(PutStats {
                stored: p.stored,
                stored_bytes: p.stored_bytes,
                present: p.present,
                round: p.round,
            }),
            _ => Err(ClientError::unexpected()),
        }
    }

    /// Ends a session: no collection has to wait for it. One that does not exist has ended.
    pub async fn end_session(&self, session: SessionId) -> Result<(), ClientError> {
        let op = request::Op::EndSession(request::EndSession {
            session: Bytes::copy_from_slice(&session.0),
        });
        self.done(op).await
    }

    fn ttl_ms(&self) -> u64 {
        u64::try_from(self.link.cfg.session_ttl.as_millis()).unwrap_or(u64::MAX)
    }
}

pub(crate) fn unique(names: &[ChunkName]) -> Vec<ChunkName> {
    let mut seen = HashSet::with_capacity(names.len());
    names.iter().copied().filter(|n| seen.insert(*n)).collect()
}

/// Runs futures, a few at once, and gives their results with their positions. The first error ends them all.
pub(crate) async fn together<T, F>(
    parts: impl Iterator<Item = F>,
) -> Result<Vec<(usize, T)>, ClientError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, ClientError>> + Send + 'static,
{
    let mut parts = parts.enumerate();
    let mut running = JoinSet::new();
    let mut out = Vec::new();
    loop {
        while running.len() < AT_ONCE
            && let Some((i, part)) = parts.next()
        {
            running.spawn(async move { part.await.map(|t| (i, t)) });
        }
        match running.join_next().await {
            None => return Ok(out),
            Some(Ok(result)) => out.push(result?),
            Some(Err(e)) => {
                return Err(ClientError::new(
                    ErrorKind::Failed,
                    format!("a part of the call died: {e}"),
                ));
            }
        }
    }
}
