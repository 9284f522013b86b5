//! What a node does with what other nodes send: messages go to the driver, bodies and pages of raft snapshots are answered from here.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use tidepool_store_core::ShardMap;
use tidepool_store_raft::Envelope;

use super::Inbox;
use super::net::{Ask, PeerRequest, bodies_of};
use crate::bodies::BodyStore;
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
}

impl PeerInbox {
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

    fn refused(&self) {
        self.counters.refuse();
    }
}
