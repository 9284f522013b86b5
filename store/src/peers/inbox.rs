//! What a node does with what other nodes send: messages go to the driver, bodies and pages of raft snapshots are answered from here,
//! bodies that are pushed are stored.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use tidepool_proto::ChunkName;
use tidepool_proto::body::check;
use tidepool_proto::wire::split_bodies;
use tidepool_store_core::ShardMap;
use tidepool_store_raft::Envelope;

use super::Inbox;
use super::net::{Ask, PeerRequest, bodies_of};
use super::push::{Arrivals, Coming};
use crate::bodies::{self, BodyStore, BodyWriter, Damaged};
use crate::db::Db;
use crate::driver::Handle;
use crate::stats::Counters;

/// The inbox of a running node.
pub(crate) struct PeerInbox {
    pub(crate) db: Db,
    pub(crate) map: ShardMap,
    pub(crate) bodies: Arc<dyn BodyStore>,
    pub(crate) driver: Handle,
    pub(crate) counters: Arc<Counters>,
    pub(crate) writer: BodyWriter,
    pub(crate) damaged: Arc<Damaged>,
    pub(crate) arrivals: Arc<Arrivals>,
}

/// Bodies of more bytes than this are checked where it holds nobody up.
const CHECK_HERE: usize = 256 << 10;

impl PeerInbox {
    /// The bodies of a push that are good, of groups that are here, and not stored yet.
    fn wanted(&self, coming: &Coming, arrived: Bytes) -> Result<Vec<(ChunkName, Bytes)>, String> {
        let arrived = split_bodies(&coming.lens, arrived).map_err(|e| e.to_string())?;
        let sound = bodies::sound(&*self.bodies, &self.damaged, &coming.names);
        let sound = sound.map_err(|e| e.to_string())?;
        let mut wanted = Vec::with_capacity(arrived.len());
        for ((name, body), sound) in coming.names.iter().zip(arrived).zip(sound) {
            if sound || !self.driver.is_here(self.map.of_chunk(name)) {
                continue;
            }
            check(&body).map_err(|e| format!("chunk {name} arrived damaged: {e}"))?;
            wanted.push((*name, body));
        }
        Ok(wanted)
    }

    async fn stored(&self, coming: &Coming, bodies: Bytes) -> Result<(), String> {
        let wanted = if bodies.len() <= CHECK_HERE {
            self.wanted(coming, bodies)?
        } else {
            tokio::task::block_in_place(|| self.wanted(coming, bodies))?
        };
        if wanted.is_empty() {
            return Ok(());
        }
        let count = wanted.len();
        let put = self.writer.put(wanted).await;
        put.map_err(|e| e.to_string())?;
        self.counters.pushed(count);
        Ok(())
    }

    fn envelope(&self, bytes: &[u8]) -> Result<Envelope, String> {
        let envelope = Envelope::decode(bytes).map_err(|e| e.to_string())?;
        if !self.map.groups().contains(&envelope.group) {
            return Err(format!("there is no group {}", envelope.group));
        }
        Ok(envelope)
    }

    async fn answered(&self, request: Bytes) -> Result<Bytes, String> {
        let request = PeerRequest::decode(request).map_err(|e| {
            self.counters.refuse();
            format!("not a request: {e}")
        })?;
        match request.ask {
            Some(Ask::Bodies(r)) => {
                let (db, bodies) = (self.db.clone(), self.bodies.clone());
                let answer = tokio::task::spawn_blocking(move || bodies_of(&db, &*bodies, &r))
                    .await
                    .map_err(|e| e.to_string())??;
                Ok(answer.encode_to_vec().into())
            }
            Some(Ask::Page(r)) => Ok(self.driver.page(r).await?.encode_to_vec().into()),
            None => {
                self.counters.refuse();
                Err("the request is not one that this version knows".into())
            }
        }
    }
}

impl Inbox for PeerInbox {
    fn deliver(&self, from: u64, messages: Vec<Bytes>) {
        let mut envelopes = Vec::with_capacity(messages.len());
        for message in messages {
            match self.envelope(&message) {
                Ok(envelope) => envelopes.push(envelope),
                Err(why) => {
                    self.counters.refuse();
                    tracing::warn!(from, %why, "a node sent a message that is refused");
                }
            }
        }
        self.driver.deliver(from, envelopes);
    }

    fn answer(
        &self,
        _from: u64,
        request: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send + '_>> {
        Box::pin(self.answered(request))
    }

    fn coming(&self, from: u64, head: Bytes) -> Result<Option<Coming>, String> {
        let coming = self.arrivals.take(head)?;
        if coming.is_none() {
            tracing::debug!(from, "a push finds no room: what it brings is fetched");
        }
        Ok(coming)
    }

    fn store(
        &self,
        from: u64,
        coming: Coming,
        bodies: Bytes,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            if let Err(why) = self.stored(&coming, bodies).await {
                tracing::debug!(from, %why, "bodies that were pushed are not stored: they are fetched");
            }
        })
    }

    fn refused(&self) {
        self.counters.refuse();
    }
}
