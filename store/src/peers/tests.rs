//! Two nodes over loopback: order, requests, bounds, and connections that come back.

use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quinn::{Endpoint, TokioRuntime};
use tidepool_proto::ChunkName;
use tidepool_proto::wire::{MAX_FRAME, PEER_ALPN, SERVER_NAME, split_bodies};
use tidepool_store_client::{tls_config, transport};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::push::{Arrivals, Coming};
use super::{Inbox, PeerError, Peers};
use crate::pki::{Caller, Pki, SigningRequest};

struct Recorder {
    got: UnboundedSender<(u64, Bytes)>,
    refused: AtomicU32,
    arrivals: Arc<Arrivals>,
}

impl Inbox for Recorder {
    fn deliver(&self, from: u64, messages: Vec<Bytes>) {
        for message in messages {
            let _ = self.got.send((from, message));
        }
    }

    fn answer(
        &self,
        from: u64,
        request: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send + '_>> {
        Box::pin(async move {
            match &*request {
                b"no" => Err(format!("not for node {from}")),
                _ => Ok(request),
            }
        })
    }

    fn coming(&self, _from: u64, head: Bytes) -> Result<Option<Coming>, String> {
        self.arrivals.take(head)
    }

    fn store(
        &self,
        from: u64,
        coming: Coming,
        bodies: Bytes,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            for body in split_bodies(&coming.lens, bodies).unwrap() {
                let _ = self.got.send((from, body));
            }
        })
    }

    fn refused(&self) {
        self.refused.fetch_add(1, SeqCst);
    }
}

struct TestNode {
    id: u64,
    pki: Pki,
    peers: Peers,
    endpoint: Endpoint,
    recorder: Arc<Recorder>,
    got: Mutex<UnboundedReceiver<(u64, Bytes)>>,
}

impl TestNode {
    fn start(id: u64, pki: Pki) -> Self {
        let socket = transport::socket(([127, 0, 0, 1], 0).into()).unwrap();
        let server = Some(pki.server(true).unwrap());
        let endpoint = Endpoint::new(
            transport::endpoint(),
            server,
            socket,
            Arc::new(TokioRuntime),
        )
        .unwrap();
        let (tx, rx) = unbounded_channel();
        let recorder = Arc::new(Recorder {
            got: tx,
            refused: AtomicU32::new(0),
            arrivals: Arc::default(),
        });
        let mut tls = tls_config(&pki.node_identity(), PEER_ALPN).unwrap();
        tls.transport_config(transport::peer());
        let peers = Peers::new(id, endpoint.clone(), tls, recorder.clone());
        let (accepting, by) = (endpoint.clone(), peers.clone());
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let by = by.clone();
                tokio::spawn(async move {
                    let Ok(connection) = incoming.await else {
                        return;
                    };
                    let from = Caller::of(&connection).unwrap().node().unwrap();
                    by.run(from, connection).await;
                });
            }
        });
        Self {
            id,
            pki,
            peers,
            endpoint,
            recorder,
            got: Mutex::new(rx),
        }
    }

    fn me(&self) -> (u64, std::net::SocketAddr) {
        (self.id, self.endpoint.local_addr().unwrap())
    }

    fn received(&self) -> Vec<(u64, Bytes)> {
        let mut got = self.got.lock().unwrap();
        std::iter::from_fn(|| got.try_recv().ok()).collect()
    }
}

/// Waits for something to come true, at most for a while.
async fn until(what: &str, mut f: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if f() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen");
}

/// Certificates of two nodes of one cluster.
fn two(dir: &Path) -> (Pki, Pki) {
    let (a, b) = (dir.join("1"), dir.join("2"));
    let one = Pki::open(&a, 1).unwrap();
    let key = Pki::joining_key(&b).unwrap();
    let csr = SigningRequest::read(&SigningRequest::make(&key).unwrap()).unwrap();
    let cert = one.sign_node(&csr, 2).unwrap();
    Pki::install(&b, one.authority(), &key.serialize_pem(), &cert).unwrap();
    (one, Pki::open(&b, 2).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_talk_both_ways_over_one_connection() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = two(dir.path());
    let (one, two) = (TestNode::start(1, one), TestNode::start(2, two));
    let all = [one.me(), two.me()];
    // The lower number waits to be called.
    one.peers.send(2, Bytes::from_static(b"nobody hears this"));
    assert_eq!(one.peers.dropped(), 1);
    one.peers.set_nodes(&all[1..]);
    two.peers.set_nodes(&all[..1]);
    until("a connection", || {
        one.peers.connected() == [2] && two.peers.connected() == [1]
    })
    .await;
    for i in 0..1000u32 {
        one.peers.send(2, Bytes::copy_from_slice(&i.to_le_bytes()));
        two.peers.send(1, Bytes::copy_from_slice(&i.to_le_bytes()));
    }
    for (node, from) in [(&two, 1), (&one, 2)] {
        let mut next = 0u32;
        until("all messages", || {
            for (sender, message) in node.received() {
                assert_eq!((sender, &*message), (from, &next.to_le_bytes()[..]));
                next += 1;
            }
            next == 1000
        })
        .await;
    }
    // Requests, long ones too; a refusal is the peer's word.
    let long = Bytes::from(vec![7; 8 << 20]);
    assert_eq!(one.peers.request(2, long.clone()).await.unwrap(), long);
    let e = two.peers.request(1, Bytes::from_static(b"no")).await;
    assert!(
        matches!(&e, Err(PeerError::Refused(1, why)) if why == "not for node 2"),
        "{e:?}"
    );
    let e = two.peers.request(9, Bytes::new()).await;
    assert!(matches!(e, Err(PeerError::NotConnected(9))), "{e:?}");
    // Pushes arrive whole, each once.
    for n in 0..3u8 {
        one.peers
            .push(2, ChunkName([n; 32]), &Bytes::from(vec![n; 3 << 20]));
    }
    one.peers.push(9, ChunkName([9; 32]), &Bytes::new());
    let mut pushed = Vec::new();
    until("all pushes", || {
        pushed.extend(two.received());
        pushed.len() == 3
    })
    .await;
    pushed.sort();
    for (n, (from, body)) in (0u8..).zip(&pushed) {
        assert_eq!((*from, body), (1, &Bytes::from(vec![n; 3 << 20])));
    }
    until("room again", || two.recorder.arrivals.is_idle()).await;
    // A connection that ends is made again; one to a node that is none any more is not.
    one.peers.set_nodes(&[]);
    one.peers.set_nodes(&all[1..]);
    until("a new connection", || {
        two.peers.send(1, Bytes::from_static(b"again"));
        one.received().iter().any(|(_, m)| &**m == b"again")
    })
    .await;
    two.peers.close();
    until("the end", || one.peers.connected().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_ends_the_connection_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = two(dir.path());
    let one = TestNode::start(1, one);
    let mut tls = tls_config(&two.node_identity(), PEER_ALPN).unwrap();
    tls.transport_config(transport::peer());
    let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let too_long = ((MAX_FRAME + 1) as u32).to_le_bytes();
    let bad: [&[u8]; 6] = [
        // An unknown kind of stream; a frame, a request and a push's head over the bound; lengths that lie; a head that is none.
        &[9],
        &[&[1], &too_long[..]].concat(),
        &[&[2], &too_long[..]].concat(),
        &[&[3], &too_long[..]].concat(),
        &[3, 2, 0, 0, 0, 255, 255],
        &[1, 5, 0, 0, 0, 200, 0, 0, 0, 1],
    ];
    for (i, bytes) in bad.iter().enumerate() {
        let connection = endpoint
            .connect_with(tls.clone(), one.me().1, SERVER_NAME)
            .unwrap()
            .await
            .unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        connection.closed().await;
        assert_eq!(one.recorder.refused.load(SeqCst), i as u32 + 1);
        assert_eq!(one.received(), []);
    }
    assert_eq!(one.pki.authority().0, two.authority().0);
}
