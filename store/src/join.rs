//! How a node becomes a member: a token is issued, a new node shows it, gets its number and certificate, and starts.
//!
//! A token is an identity of role `join` with the addresses of the cluster: its certificate ends with the token, and the meta group
//! counts its uses. So nobody without a certificate is ever talked to, the new node knows whom it trusts before it says anything,
//! and a token that leaks is worth nothing once it is used.
//!
//! Joining again with the same directory gives the same number: the key is kept, and the meta group knows nodes by their keys. Until
//! everything is in place a marker keeps the directory from being taken for a new cluster's.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use tidepool_proto::ErrorKind;
use tidepool_proto::cluster::{Join, Joined, MAX_NODES};
use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::wire::{request, response};
use tidepool_store_client::{Client, ClientConfig, ClientIdentity};
use tidepool_store_core::{META_GROUP, Reply, op};

use crate::config::Identity;
use crate::driver::now_ms;
use crate::error::StoreError;
use crate::pki::{Caller, Pki, SigningRequest};
use crate::requests::{Failure, Shared};
use crate::roles::Role;
use crate::{cluster, files};

const PREFIX: &str = "tpj1.";
const VERSION: u8 = 1;
const MAX_PEM: usize = 8 << 10;
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
const MARKER: &str = "joining";
/// How long joining is tried.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    identity: ClientIdentity,
    addrs: Vec<SocketAddr>,
}

impl Token {
    fn encode(&self) -> String {
        let mut w = Writer::versioned(VERSION);
        w.bytes(self.identity.ca.as_bytes());
        w.bytes(self.identity.cert.as_bytes());
        w.bytes(self.identity.key.as_bytes());
        w.varint(self.addrs.len() as u64);
        for addr in &self.addrs {
            w.bytes(addr.to_string().as_bytes());
        }
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(w.into_bytes()))
    }

    pub(crate) fn decode(text: &str) -> Result<Self, StoreError> {
        let bad = |why: String| StoreError::Config(format!("this is no join token: {why}"));
        let text = text.trim().strip_prefix(PREFIX);
        let text = text.ok_or_else(|| bad(format!("it does not open with {PREFIX}")))?;
        let bytes = URL_SAFE_NO_PAD
            .decode(text)
            .map_err(|e| bad(e.to_string()))?;
        Self::read(&bytes).map_err(|e| bad(e.to_string()))
    }

    fn read(bytes: &[u8]) -> Result<Self, tidepool_proto::FormatError> {
        let mut r = Reader::versioned("join token", bytes, VERSION)?;
        let identity = ClientIdentity {
            ca: r.text(MAX_PEM)?,
            cert: r.text(MAX_PEM)?,
            key: r.text(MAX_PEM)?,
        };
        let count = r.count(MAX_NODES, 2)?;
        let mut addrs = Vec::with_capacity(count);
        for _ in 0..count {
            let text = r.text(64)?;
            addrs.push(text.parse().map_err(|_| r.invalid("an address"))?);
        }
        r.finish()?;
        Ok(Self { identity, addrs })
    }
}

fn failed(e: StoreError) -> Failure {
    Failure::new(ErrorKind::Failed, e.to_string())
}

/// Makes a token and has the meta group know it.
pub(crate) async fn issue_token(
    shared: &Arc<Shared>,
    r: request::IssueToken,
) -> Result<response::Op, Failure> {
    let ttl = Duration::from_millis(r.ttl_ms).min(MAX_TTL);
    if ttl.is_zero() {
        return Err(Failure::new(ErrorKind::Invalid, "a token needs some time"));
    }
    let id: [u8; 16] = rand::random();
    let add = op::Op::AddToken(op::AddToken {
        id: Bytes::copy_from_slice(&id),
        uses: r.uses,
        expires_ms: now_ms().saturating_add(ttl.as_millis() as u64),
    });
    shared.propose(META_GROUP, add).await?;
    let name = format!("token-{:032x}", u128::from_be_bytes(id));
    let identity = shared
        .pki
        .issue_named(Role::Join, &name, ttl)
        .map_err(failed)?;
    let nodes = cluster::nodes(shared)?;
    let token = Token {
        identity,
        addrs: nodes.iter().filter_map(|n| n.addr.parse().ok()).collect(),
    };
    Ok(response::Op::Token(token.encode()))
}

/// Makes the holder of a token a member.
pub(crate) async fn join(
    shared: &Arc<Shared>,
    caller: &Caller,
    r: Join,
) -> Result<response::Op, Failure> {
    let invalid = |text: &str| Failure::new(ErrorKind::Invalid, text);
    let token = caller
        .name
        .strip_prefix("token-")
        .and_then(|hex| u128::from_str_radix(hex, 16).ok())
        .ok_or_else(|| invalid("the certificate names no token"))?;
    let csr = SigningRequest::read(&r.csr).map_err(|e| invalid(&e.to_string()))?;
    let add = op::Op::AddNode(op::AddNode {
        token: Bytes::copy_from_slice(&token.to_be_bytes()),
        key: Bytes::copy_from_slice(&csr.key_hash()),
        addr: r.addr,
        zone: r.zone,
    });
    let Reply::Node(node) = shared.propose(META_GROUP, add).await? else {
        return Err(Failure::new(ErrorKind::Failed, "no number was given"));
    };
    let node_cert = shared.pki.sign_node(&csr, node).map_err(failed)?;
    let (ca_cert, ca_key) = shared.pki.authority();
    tracing::info!(node, "a node joins");
    Ok(response::Op::Joined(Joined {
        node,
        cluster: shared.cluster.clone(),
        shards: shared.map.shards(),
        ca_cert: ca_cert.to_owned(),
        ca_key: ca_key.to_owned(),
        node_cert,
        nodes: cluster::nodes(shared)?,
    }))
}

/// Makes `data` the directory of a new member. `addr` is where the others will reach it.
pub(crate) async fn become_member(
    data: &Path,
    token: &str,
    addr: SocketAddr,
    zone: &str,
) -> Result<u64, StoreError> {
    let token = Token::decode(token)?;
    if let Some(identity) = Identity::read(data)? {
        // Trusting the same authority is being of the same cluster.
        return match Pki::open(data, identity.node)?.authority().0 == token.identity.ca {
            true => Ok(identity.node),
            false => Err(StoreError::Config(format!(
                "{} holds a node of another cluster: join with an empty directory",
                data.display()
            ))),
        };
    }
    let marker = data.join(MARKER);
    if !marker.exists() && fs::read_dir(data).is_ok_and(|mut d| d.next().is_some()) {
        return Err(StoreError::Config(format!(
            "{} is not empty and no node's",
            data.display()
        )));
    }
    crate::node::make_dir(data)?;
    files::write_atomic(&marker, b"", 0o600)?;
    let key = Pki::joining_key(data)?;
    let client = Client::new(ClientConfig {
        deadline: DEADLINE,
        ..ClientConfig::new(token.addrs.clone(), token.identity)
    })
    .map_err(|e| StoreError::Config(e.to_string()))?;
    let join = request::Op::Join(Join {
        csr: SigningRequest::make(&key)?.into(),
        addr: addr.to_string(),
        zone: zone.to_owned(),
    });
    let joined = match client.call(join).await {
        Ok(response::Op::Joined(joined)) => joined,
        Ok(_) => return Err(StoreError::Network("an unexpected answer".into())),
        Err(e) => return Err(StoreError::Network(format!("the cluster refused: {e}"))),
    };
    let ca = (joined.ca_cert.as_str(), joined.ca_key.as_str());
    Pki::install(data, ca, &key.serialize_pem(), &joined.node_cert)?;
    cluster::save_seeds(data, &joined.nodes)?;
    Identity::create(data, joined.cluster, joined.node, joined.shards, zone)?;
    fs::remove_file(&marker).map_err(|e| StoreError::io(&marker, e))?;
    Ok(joined.node)
}

/// Whether joining was begun here and not finished.
pub(crate) fn is_unfinished(data: &Path) -> bool {
    data.join(MARKER).exists() && !Identity::exists(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_read_back_and_junk_does_not() {
        let token = Token {
            identity: ClientIdentity {
                ca: "ca".into(),
                cert: "cert".into(),
                key: "key".into(),
            },
            addrs: vec!["10.0.0.1:7480".parse().unwrap(), "[::1]:1".parse().unwrap()],
        };
        let text = token.encode();
        assert_eq!(Token::decode(&format!(" {text}\n")).unwrap(), token);
        for bad in [
            "",
            "tpj1.",
            "tpj1.????",
            &text[1..],
            &text[..text.len() - 4],
        ] {
            assert!(Token::decode(bad).is_err(), "{bad}");
        }
    }
}
