//! The client of a store cluster: QUIC with mutual TLS, every request idempotent and sent again until it is answered or its time is over.
//!
//! A client needs one address and learns the others: it sends what changes a group to the node that leads it, reads chunks from the nearest
//! node that has them and, where one fails or has them damaged, from the next.
//!
//! Nothing here knows how a node keeps what it is given. Bodies are checked against their checksums on arrival; whether
//! they are what a name stands for only the holder of the domain's key can tell ([`tidepool_proto::DomainKey::open`]).
//!
//! Memory is bounded: a fixed number of requests is under way at once, frames are bounded, large calls are split.

mod calls;
mod chunks;
mod config;
mod error;
pub mod frame;
mod identity;
mod link;
mod nodes;
mod pool;
mod reads;
mod retention;
mod route;
mod scrub;
mod silence;
mod split;
mod suspects;
mod topology;
pub mod transport;
mod types;

pub use config::ClientConfig;
pub use error::ClientError;
pub use identity::{ClientIdentity, IdentityError};
pub use nodes::NodeStatus;
pub use pool::tls_config;
pub use types::{Commit, Pinned, PutStats, SandboxRecord, StoreStatus, lower_round};

use std::sync::Arc;

/// A connection to a store. Clones share it.
#[derive(Clone)]
pub struct Client {
    link: Arc<link::Link>,
}

/// A future behind a pointer. What is long stands behind one, made by a function that is not generic: so it is compiled here, once, and
/// not again in every crate that calls it.
pub(crate) type Boxed<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("addrs", &self.link.addrs())
            .finish()
    }
}

impl Client {
    /// A client that connects with its first call. Needs a tokio runtime.
    pub fn new(cfg: ClientConfig) -> Result<Client, ClientError> {
        Ok(Client {
            link: Arc::new(link::Link::new(cfg)?),
        })
    }

    /// Connects, and asks one node for its status and what it knows of the others, so that a wrong address or certificate is known at once. Needs a tokio runtime.
    pub async fn connect(cfg: ClientConfig) -> Result<Client, ClientError> {
        let client = Client::new(cfg)?;
        client.status().await?;
        let soon = tokio::time::Instant::now() + client.link.cfg.deadline;
        client.link.refresh(soon).await;
        Ok(client)
    }
}
