//! Certificates, roles, tokens and joining: who may do what, and who becomes a member.

mod common;

use std::time::Duration;

use common::{DAY, chunk, client, connect, fast, session, start};
use tidepool_proto::ErrorKind;
use tidepool_proto::cluster::NodeState;
use tidepool_store::{Node, NodeConfig, Role};
use tidepool_store_client::Client;

const HOUR: Duration = Duration::from_secs(3600);

async fn operator(node: &Node) -> Client {
    connect(node.local_addr(), node.issue(Role::Operator, DAY).unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_do_what_they_may_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let host = client(&node).await;
    let operator = operator(&node).await;
    host.put(session(1), vec![chunk(1, 100)]).await.unwrap();
    let before = node.stats().refused;
    let e = operator
        .put(session(2), vec![chunk(2, 100)])
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    let e = host.issue_token(HOUR, 1).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    let e = host
        .change_node(1, NodeState::Draining, false)
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    assert_eq!(node.stats().refused, before + 3);
    // Reading is for both.
    assert_eq!(operator.get(&[chunk(1, 100).0]).await.unwrap().len(), 1);
    assert_eq!(operator.sandboxes().await.unwrap(), []);
    // The only active node stays.
    let e = operator
        .change_node(1, NodeState::Removed, true)
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Conflict, "{e}");
    assert!(operator.issue_token(HOUR, 0).await.is_err());
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let identity = node.issue(Role::Host, Duration::from_secs(1)).unwrap();
    // Certificates end on a second.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let before = node.stats().refused;
    let e = Client::connect(fast(node.local_addr(), identity))
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
    assert!(e.to_string().to_lowercase().contains("expired"), "{e}");
    assert!(node.stats().refused > before);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_makes_one_member_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&dir.path().join("1")).await;
    let operator_one = operator(&node).await;
    let token = operator_one.issue_token(HOUR, 1).await.unwrap();
    let config = |name: &str, port: u16| NodeConfig {
        listen: ([127, 0, 0, 1], port).into(),
        zone: "b".into(),
        ..NodeConfig::embedded(dir.path().join(name))
    };
    let two = config("2", 2);
    assert_eq!(Node::join(&two, &token).await.unwrap(), 2);
    // Again: the same node.
    assert_eq!(Node::join(&two, &token).await.unwrap(), 2);
    let known = operator_one.topology().await.unwrap();
    let nodes: Vec<_> = known
        .nodes
        .iter()
        .map(|n| (n.id, n.zone.as_str()))
        .collect();
    assert_eq!(nodes, [(1, ""), (2, "b")]);
    // Another one: the token is used up.
    let e = Node::join(&config("3", 3), &token).await.unwrap_err();
    assert!(e.to_string().contains("used up"), "{e}");
    // What was begun is not taken for a new cluster.
    let e = Node::start(config("3", 0)).await.unwrap_err();
    assert!(e.to_string().contains("join again"), "{e}");
    let token = operator_one.issue_token(HOUR, 1).await.unwrap();
    assert_eq!(Node::join(&config("3", 3), &token).await.unwrap(), 3);
    // An address that is taken, and a token of another cluster on a member's directory.
    let token = operator_one.issue_token(HOUR, 2).await.unwrap();
    let e = Node::join(&config("4", 3), &token).await.unwrap_err();
    assert!(e.to_string().contains("address of node 3"), "{e}");
    let other = start(&dir.path().join("other")).await;
    let foreign = operator(&other).await.issue_token(HOUR, 1).await.unwrap();
    let e = Node::join(&two, &foreign).await.unwrap_err();
    assert!(e.to_string().contains("another cluster"), "{e}");
    for junk in ["", "tpj1.AAAA", "hello"] {
        assert!(Node::join(&config("5", 5), junk).await.is_err());
    }
    node.shutdown().await;
    other.shutdown().await;
}
