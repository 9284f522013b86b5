//! The client of a store cluster: QUIC with mutual TLS, every request idempotent and sent again until it is answered or its time is over.
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
mod retention;
mod scrub;
pub mod transport;
mod types;

pub use config::ClientConfig;
pub use error::ClientError;
pub use identity::{ClientIdentity, IdentityError};
pub use types::{Commit, Pinned, PutStats, SandboxRecord, StoreStatus, lower_round};

use std::sync::Arc;

/// A connection to a store. Clones share it.
#[derive(Clone)]
pub struct Client {
    link: Arc<link::Link>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("addrs", &self.link.addrs())
            .finish()
    }
}

impl Client {
    /// Connects, and asks one node for its status, so that a wrong address or certificate is known at once. Needs a tokio runtime.
    pub async fn connect(cfg: ClientConfig) -> Result<Client, ClientError> {
        let client = Client {
            link: Arc::new(link::Link::new(cfg)?),
        };
        client.status().await?;
        Ok(client)
    }
}
