//! What a node does with what other nodes send.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use super::Inbox;
use crate::stats::Counters;

/// The inbox of a node whose groups have no other members: everything is refused.
pub(crate) struct PeerInbox {
    counters: Arc<Counters>,
}

impl PeerInbox {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self { counters }
    }
}

impl Inbox for PeerInbox {
    fn deliver(&self, from: u64, messages: Vec<Bytes>) {
        tracing::debug!(
            from,
            messages = messages.len(),
            "messages for groups that are not here"
        );
        self.counters.refuse();
    }

    fn answer(
        &self,
        _from: u64,
        _request: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send + '_>> {
        self.counters.refuse();
        Box::pin(async { Err("there is nothing of this here".to_owned()) })
    }

    fn refused(&self) {
        self.counters.refuse();
    }
}
