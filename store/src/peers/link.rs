//! Connecting to one node, again and again.

use std::net::SocketAddr;
use std::time::Duration;

use tidepool_proto::wire::SERVER_NAME;

use super::Peers;
use crate::pki::Caller;

const HANDSHAKE: Duration = Duration::from_secs(5);
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Keeps a connection to a node until it is aborted.
pub(super) async fn dial(peers: Peers, node: u64, addr: SocketAddr) {
    let mut wait = FIRST_WAIT;
    let mut said = false;
    loop {
        match connect(&peers, node, addr).await {
            Ok(connection) => {
                (wait, said) = (FIRST_WAIT, false);
                peers.run(node, connection).await;
            }
            Err(why) => {
                if !said {
                    tracing::warn!(node, %addr, %why, "a node cannot be reached; trying on");
                    said = true;
                }
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
        // Not all nodes that lost another at once come back at once.
        let spread = rand::random::<u64>() % (wait.as_millis() as u64 / 2 + 1);
        tokio::time::sleep(wait + Duration::from_millis(spread)).await;
    }
}

async fn connect(peers: &Peers, node: u64, addr: SocketAddr) -> Result<quinn::Connection, String> {
    let inner = &peers.inner;
    let connecting = inner
        .endpoint
        .connect_with(inner.tls.clone(), addr, SERVER_NAME)
        .map_err(|e| e.to_string())?;
    let connection = match tokio::time::timeout(HANDSHAKE, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(e)) => return Err(e.to_string()),
        Err(_) => return Err("it does not answer".into()),
    };
    let caller = Caller::of(&connection).map_err(|e| e.to_string())?;
    if caller.node() != Some(node) {
        connection.close(0u32.into(), b"another node was expected");
        return Err(format!("{} answers there", caller.name));
    }
    Ok(connection)
}
