//! Scrubs: damage is found, mended from a peer, and otherwise put into quarantine; bodies that nothing names go.

mod common;

use std::collections::HashMap;
use std::fs;
use std::future::ready;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{chunk, client, operator, session, start};
use tidepool_proto::ChunkName;
use tidepool_store::bodies::BodyStore;
use tidepool_store::db::Db;
use tidepool_store::segments::{SegmentOptions, Segments};
use tidepool_store::{Node, NodeConfig, PeerBodies, ScrubReport};
use tidepool_store_client::Client;

/// Another node's bodies.
struct Copies(HashMap<ChunkName, Bytes>);

impl PeerBodies for Copies {
    fn any(&self) -> bool {
        true
    }

    fn fetch<'a>(
        &'a self,
        name: &'a ChunkName,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Bytes>, String>> + Send + 'a>> {
        Box::pin(ready(Ok(self.0.get(name).cloned())))
    }
}

async fn scrub(client: &Client) -> ScrubReport {
    client.scrub_start(1 << 30, Some(0)).await.unwrap();
    loop {
        let report: ScrubReport =
            serde_json::from_slice(&client.scrub_status().await.unwrap()).unwrap();
        if !report.running {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn offline(dir: &Path) -> Segments {
    let db = Db::open(&dir.join("db")).unwrap();
    Segments::open(db, &dir.join("bodies"), SegmentOptions::default()).unwrap()
}

/// Flips a bit in the middle of a body.
fn flip(dir: &Path, body: &[u8]) {
    let path = dir.join("bodies/00000001.seg");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(body.len()).position(|w| w == body).unwrap();
    bytes[at + body.len() / 2] ^= 8;
    fs::write(&path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_mended_from_a_peer_or_put_into_quarantine() {
    let dir = tempfile::tempdir().unwrap();
    let bodies: Vec<_> = (0..40).map(|i| chunk(i, 20_000)).collect();
    let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
    let node = start(dir.path()).await;
    let c = client(&node).await;
    c.put(session(1), bodies.clone()).await.unwrap();
    let report = scrub(&operator(&node).await).await;
    assert_eq!((report.bodies, report.damaged, report.orphans), (40, 0, 0));
    assert_eq!(report.error, None);
    drop(c);
    node.shutdown().await;

    // Damaged and gone: the peer has a copy of one of each, and a damaged one.
    for at in [3, 4, 5] {
        flip(dir.path(), &bodies[at].1);
    }
    offline(dir.path()).delete(&[names[6], names[7]]).unwrap();
    let mut copies: HashMap<_, _> = [3, 6].map(|at| bodies[at].clone()).into();
    let mut bad = bodies[5].1.to_vec();
    bad[30] ^= 1;
    copies.insert(names[5], bad.into());
    let cfg = NodeConfig::embedded(dir.path());
    let node = Node::start_with(cfg, Arc::new(Copies(copies)))
        .await
        .unwrap();
    let c = client(&node).await;
    let report = scrub(&operator(&node).await).await;
    assert_eq!(
        (report.damaged, report.repaired, report.quarantined),
        (5, 2, 3)
    );
    let mut lost: Vec<_> = [4, 5, 7].map(|at| names[at].to_string()).into();
    lost.sort();
    let mut told = report.quarantined_names.clone();
    told.sort();
    assert_eq!(told, lost);
    assert_eq!(c.get(&[names[3], names[6]]).await.unwrap().len(), 2);
    assert_eq!(node.stats().corruptions, 5);
    drop(c);
    node.shutdown().await;

    // Known after a restart, without reading: they count as missing, and an upload heals them.
    let node = start(dir.path()).await;
    let c = client(&node).await;
    let missing = c.pin(session(2), &names).await.unwrap().missing;
    assert_eq!(missing, [names[4], names[5], names[7]]);
    c.put(session(2), bodies.clone()).await.unwrap();
    let got = c.get(&names).await.unwrap();
    assert!(got.iter().zip(&bodies).all(|(g, (_, b))| g == b));
    let report = scrub(&operator(&node).await).await;
    assert_eq!((report.bodies, report.damaged), (40, 0));
    drop(c);
    node.shutdown().await;
    assert!(offline(dir.path()).quarantined(9).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_nothing_names_go_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let bodies: Vec<_> = (0..20).map(|i| chunk(i, 9000)).collect();
    let orphans: Vec<_> = (100..110).map(|i| chunk(i, 9000)).collect();
    let node = start(dir.path()).await;
    let c = client(&node).await;
    c.put(session(1), bodies.clone()).await.unwrap();
    drop(c);
    node.shutdown().await;
    offline(dir.path()).put(&orphans).unwrap();
    let node = start(dir.path()).await;
    let c = client(&node).await;
    let first = scrub(&operator(&node).await).await;
    assert_eq!((first.orphans, first.orphans_removed), (10, 0));
    // One is uploaded meanwhile: it is named now.
    c.put(session(1), orphans[..1].to_vec()).await.unwrap();
    let second = scrub(&operator(&node).await).await;
    assert_eq!((second.orphans, second.orphans_removed), (9, 9));
    let third = scrub(&operator(&node).await).await;
    assert_eq!((third.bodies, third.orphans, third.damaged), (21, 0, 0));
    let names: Vec<_> = bodies
        .iter()
        .chain(&orphans[..1])
        .map(|(n, _)| *n)
        .collect();
    assert_eq!(c.get(&names).await.unwrap().len(), 21);
    assert!(c.get(&[orphans[1].0]).await.is_err());
    drop(c);
    node.shutdown().await;
}
