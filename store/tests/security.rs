//! Who may not talk to a node, and what may not be said: refused, counted, and nobody else is disturbed.

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use common::{chunk, client, fast, session, start};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tidepool_proto::wire::{self, MAX_FRAME, Response, response};
use tidepool_proto::{ErrorKind, wire::ALPN};
use tidepool_store_client::{Client, ClientConfig, ClientError, ClientIdentity, frame};

async fn refused(cfg: ClientConfig) -> ClientError {
    match Client::connect(cfg).await {
        Ok(_) => panic!("the store let a stranger in"),
        Err(e) => e,
    }
}

/// A bare QUIC connection, with or without a certificate.
async fn raw(
    addr: SocketAddr,
    identity: &ClientIdentity,
    cert: bool,
    alpn: &[u8],
) -> Result<(Endpoint, Connection), String> {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(identity.ca.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = if cert {
        let chain = vec![CertificateDer::from_pem_slice(identity.cert.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
        builder.with_client_auth_cert(chain, key).unwrap()
    } else {
        builder.with_no_client_auth()
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    let quic = QuicClientConfig::try_from(tls).unwrap();
    let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let connection = endpoint
        .connect_with(
            quinn::ClientConfig::new(Arc::new(quic)),
            addr,
            "tidepool-store",
        )
        .unwrap()
        .await
        .map_err(|e| e.to_string())?;
    Ok((endpoint, connection))
}

async fn answer(mut recv: RecvStream) -> response::Error {
    let bytes = frame::read(&mut recv).await.unwrap();
    match wire::decode::<Response>(bytes).unwrap().op {
        Some(response::Op::Error(e)) => e,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let node = start(dir.path()).await;
    let stranger = start(other.path()).await;
    let addr = node.local_addr();

    // A certificate of another cluster, whose node is not trusted either.
    let e = refused(fast(addr, stranger.client_identity())).await;
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    // The right authority to trust, and a certificate of the wrong one.
    let mixed = ClientIdentity {
        ca: node.client_identity().ca,
        ..stranger.client_identity()
    };
    let e = refused(fast(addr, mixed)).await;
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    // Another name than the node's.
    let e = refused(ClientConfig {
        server_name: "elsewhere".into(),
        ..fast(addr, node.client_identity())
    })
    .await;
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    // No certificate: the handshake may look done to the client, but nothing is answered.
    if let Ok((_endpoint, connection)) = raw(addr, &node.client_identity(), false, ALPN).await {
        let why = connection.closed().await;
        assert!(why.to_string().contains("certificate"), "{why}");
    }
    // Another protocol.
    let e = raw(addr, &node.client_identity(), true, b"tidepool/99").await;
    assert!(e.is_err());

    assert!(node.stats().refused >= 4, "{:?}", node.stats());
    client(&node)
        .await
        .put(session(1), vec![chunk(1, 100)])
        .await
        .unwrap();
    node.shutdown().await;
    stranger.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_disturbs_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let client = client(&node).await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for i in 0..2000u64 {
        let junk = common::noise(i, 1 + (i as usize * 37) % 1400);
        socket.send_to(&junk, node.local_addr()).unwrap();
    }
    let bodies: Vec<_> = (0..50).map(|i| chunk(i, 5000)).collect();
    client.put(session(1), bodies.clone()).await.unwrap();

    let (_endpoint, connection) = raw(node.local_addr(), &node.client_identity(), true, ALPN)
        .await
        .unwrap();
    let send = |bytes: Vec<u8>| {
        let connection = connection.clone();
        async move {
            let (mut send, recv): (SendStream, RecvStream) = connection.open_bi().await.unwrap();
            let _ = send.write_all(&bytes).await;
            let _ = send.finish();
            answer(recv).await
        }
    };
    let before = node.stats().refused;
    let invalid = wire::kind_code(ErrorKind::Invalid);
    // A frame that ends early, in its length and in its body.
    for bytes in [vec![1], vec![100, 0, 0, 0, 1, 2, 3]] {
        let e = send(bytes).await;
        assert_eq!(e.kind, invalid);
        assert!(e.text.contains("ended inside a frame"), "{}", e.text);
    }
    // One that is too long: refused by its length, before anything is read.
    let e = send((MAX_FRAME as u32 + 1).to_le_bytes().to_vec()).await;
    assert!(
        e.kind == invalid && e.text.contains("over the bound"),
        "{}",
        e.text
    );
    // Bytes that are no message, and a message that asks for nothing known.
    let mut junk = 64u32.to_le_bytes().to_vec();
    junk.extend(common::noise(1, 64));
    assert_eq!(send(junk).await.kind, invalid);
    assert_eq!(send(0u32.to_le_bytes().to_vec()).await.kind, invalid);
    assert!(node.stats().refused >= before + 4, "{:?}", node.stats());

    let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
    assert_eq!(client.get(&names).await.unwrap().len(), 50);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused_one_by_one() {
    use bytes::Bytes;
    use wire::request::{self, Op};
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let (_endpoint, connection) = raw(node.local_addr(), &node.client_identity(), true, ALPN)
        .await
        .unwrap();
    let id = Bytes::from_static(&[1; 16]);
    let short = Bytes::from_static(&[1; 15]);
    let (name, body) = chunk(1, 10);
    let name = Bytes::copy_from_slice(&name.0);
    let len = Bytes::copy_from_slice(&(body.len() as u32).to_le_bytes());
    let put = |names: &Bytes, lens: &Bytes, bodies: Bytes| {
        Op::Put(request::Put {
            session: id.clone(),
            ttl_ms: 1,
            names: names.clone(),
            lens: lens.clone(),
            bodies,
        })
    };
    let mut flipped = body.to_vec();
    flipped[9] ^= 1;
    let wrong = [
        Op::Pin(request::Pin {
            session: short.clone(),
            ttl_ms: 1,
            names: name.clone(),
        }),
        Op::Pin(request::Pin {
            session: id.clone(),
            ttl_ms: 1,
            names: name.slice(1..),
        }),
        Op::Pin(request::Pin {
            session: id.clone(),
            ttl_ms: 1,
            names: vec![0; 32 * 8193].into(),
        }),
        put(&name, &len, body.slice(1..)),
        put(&name, &len.slice(1..), body.clone()),
        put(&Bytes::new(), &len, body.clone()),
        put(&name, &len, flipped.into()),
        Op::Get(request::Get {
            names: name.slice(2..),
            verify: false,
        }),
        Op::EndSession(request::EndSession {
            session: short.clone(),
        }),
        Op::TakeSandbox(request::TakeSandbox {
            id: short.clone(),
            token: id.clone(),
        }),
        Op::CreateSandbox(request::CreateSandbox {
            id: id.clone(),
            name: String::new(),
            meta: Bytes::new(),
        }),
        Op::CreateSandbox(request::CreateSandbox {
            id: id.clone(),
            name: "x".repeat(257),
            meta: Bytes::new(),
        }),
        Op::Sandboxes(request::After {
            after: Bytes::from_static(&[9; 20]),
        }),
        Op::Sandboxes(request::After {
            after: Bytes::from_static(&[9; 2]),
        }),
        Op::Commit(request::Commit {
            sandbox: id.clone(),
            ..Default::default()
        }),
    ];
    for op in wrong {
        let what = format!("{op:?}");
        let (mut send, recv) = connection.open_bi().await.unwrap();
        send.write_all(&wire::frame(&wire::Request::from(op)).unwrap())
            .await
            .unwrap();
        send.finish().unwrap();
        let e = answer(recv).await;
        assert_eq!(
            wire::kind_of(e.kind),
            ErrorKind::Invalid,
            "{what:.200}: {}",
            e.text
        );
        assert!(!e.again);
    }
    assert_eq!(node.stats().chunks, 0);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_finds_a_restarted_node_again() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let addr = node.local_addr();
    let client = client(&node).await;
    client.put(session(1), vec![chunk(1, 100)]).await.unwrap();
    node.shutdown().await;
    let later = {
        let client = client.clone();
        tokio::spawn(async move { client.get(&[chunk(1, 100).0]).await })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    let node = tidepool_store::Node::start(tidepool_store::NodeConfig {
        listen: addr,
        ..tidepool_store::NodeConfig::embedded(dir.path())
    })
    .await
    .unwrap();
    assert_eq!(later.await.unwrap().unwrap(), [chunk(1, 100).1]);
    node.shutdown().await;
}
