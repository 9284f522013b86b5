//! How to reach a store.

use std::net::SocketAddr;
use std::time::Duration;

use tidepool_proto::wire::SERVER_NAME;

use crate::identity::ClientIdentity;

/// How to reach a store, and how long to try.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Nodes, tried in turn.
    pub addrs: Vec<SocketAddr>,
    /// The name their certificates must carry.
    pub server_name: String,
    pub identity: ClientIdentity,
    /// How long one call is tried before it fails as unavailable.
    pub deadline: Duration,
    /// How long a session lives after its last call.
    pub session_ttl: Duration,
    /// The failure domain of this client: nodes of the same one are read from first.
    pub zone: Option<String>,
}

impl ClientConfig {
    /// The defaults: 30 s a call, 15 min a session.
    pub fn new(addrs: Vec<SocketAddr>, identity: ClientIdentity) -> Self {
        Self {
            addrs,
            server_name: SERVER_NAME.to_owned(),
            identity,
            deadline: Duration::from_secs(30),
            session_ttl: Duration::from_secs(15 * 60),
            zone: None,
        }
    }
}
