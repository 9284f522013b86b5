//! Durable puts, one body a request, by clients that each have a connection of their own and one request under way.

use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use tidepool_proto::{ChunkName, DomainKey, SessionId};
use tidepool_store_client::Client;

use crate::etcd::Kv;
use crate::stats::ms;

/// What bodies are put into.
pub(crate) enum Target {
    Store(Client, SessionId),
    Etcd(Kv),
}

/// A client and what it puts: the same bytes under ever new names, so that making them costs neither side anything.
pub(crate) struct Putter {
    target: Target,
    body: Bytes,
}

/// A name that never was.
pub(crate) fn fresh() -> ChunkName {
    ChunkName(rand::random())
}

/// Bytes that do not compress, as a body.
pub(crate) fn body(len: usize) -> Bytes {
    let mut plain = vec![0; len];
    blake3::Hasher::new()
        .update(&rand::random::<[u8; 16]>())
        .finalize_xof()
        .fill(&mut plain);
    let key = DomainKey::new([7; 32]);
    key.encode(&key.name(&plain), &plain, &[], None).into()
}

/// What a round of puts did.
pub(crate) struct Round {
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
    /// Of each put, in milliseconds.
    pub(crate) latencies: Vec<f64>,
}

impl Putter {
    pub(crate) fn store(client: Client, body: Bytes) -> Self {
        let target = Target::Store(client, SessionId(rand::random()));
        Self { target, body }
    }

    pub(crate) fn etcd(kv: Kv, body: Bytes) -> Self {
        let target = Target::Etcd(kv);
        Self { target, body }
    }

    async fn put(&self) -> Result<()> {
        let name = fresh();
        match &self.target {
            Target::Store(client, session) => {
                let put = client
                    .put(*session, vec![(name, self.body.clone())])
                    .await?;
                anyhow::ensure!(put.stored == 1, "a fresh body was there already");
                Ok(())
            }
            Target::Etcd(kv) => {
                let key = Bytes::copy_from_slice(&name.0);
                kv.put(key, self.body.clone()).await
            }
        }
    }

    async fn run(self, time: Duration, most: u64) -> Result<(Self, u64, Vec<f64>)> {
        let begun = Instant::now();
        let (mut bytes, mut latencies) = (0, Vec::new());
        while begun.elapsed() < time && bytes < most {
            let at = Instant::now();
            self.put().await?;
            latencies.push(ms(at.elapsed()));
            bytes += self.body.len() as u64;
        }
        Ok((self, bytes, latencies))
    }
}

/// Has all of them put for this long, or until each has put so many bytes.
pub(crate) async fn round(putters: &mut Vec<Putter>, time: Duration, most: u64) -> Result<Round> {
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for putter in putters.drain(..) {
        tasks.spawn(putter.run(time, most));
    }
    let (mut bytes, mut latencies) = (0, Vec::new());
    while let Some(done) = tasks.join_next().await {
        let (putter, more, of) = done??;
        putters.push(putter);
        bytes += more;
        latencies.extend(of);
    }
    Ok(Round {
        bytes,
        took: begun.elapsed(),
        latencies,
    })
}
