//! Damaged data: answered as corruption and counted, never as something else, and healed by the next upload.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use common::{DAY, Process, chunk, client, commit, fast, sandbox_id, session, start};
use tidepool_proto::{Epoch, ErrorKind};
use tidepool_store::bodies::BodyStore;
use tidepool_store::db::Db;
use tidepool_store::segments::{SegmentOptions, Segments};
use tidepool_store::{Node, NodeConfig, Role};
use tidepool_store_client::Client;
use tidepool_store_core::{META_GROUP, ShardMap, keys};

/// Replaces bytes in a stopped node's files, and tells how often they were found.
fn replace(dir: &Path, extension: &str, old: &[u8], new: &[u8]) -> usize {
    let mut found = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != extension) {
            continue;
        }
        let mut bytes = fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(old.len()).position(|w| w == old) {
            bytes[at..at + old.len()].copy_from_slice(new);
            fs::write(&path, bytes).unwrap();
            found += 1;
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_body_is_corruption_and_is_healed() {
    let dir = tempfile::tempdir().unwrap();
    let segments = dir.path().join("bodies");
    let bodies: Vec<_> = (0..6).map(|i| chunk(i, 20_000)).collect();
    let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
    let node = start(dir.path()).await;
    client(&node)
        .await
        .put(session(1), bodies.clone())
        .await
        .unwrap();
    node.shutdown().await;

    // One bit of one body, on disk.
    let middle = &bodies[1].1[5000..5064];
    let mut flipped = middle.to_vec();
    flipped[30] ^= 4;
    assert_eq!(replace(&segments, "seg", middle, &flipped), 1);
    // Another whole body in its place; one whose second half never reached the disk; and one that the index lost.
    let (_, other) = chunk(77, 20_000);
    assert_eq!(replace(&segments, "seg", &bodies[2].1, &other), 1);
    let half = &bodies[3].1[10_000..];
    assert_eq!(replace(&segments, "seg", half, &vec![0; half.len()]), 1);
    {
        let db = Db::open(&dir.path().join("db")).unwrap();
        let bodies = Segments::open(db, &segments, SegmentOptions::default()).unwrap();
        bodies.delete(&[names[4]]).unwrap();
    }

    let node = start(dir.path()).await;
    let client = client(&node).await;
    for bad in &names[1..=4] {
        let e = client.get(&[*bad]).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corruption, "{bad}: {e}");
        assert!(e.to_string().contains(&bad.to_string()), "{e}");
    }
    assert_eq!(client.status().await.unwrap().corruptions, 4);
    let e = client.get(&names).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corruption);
    assert_eq!(client.get(&[names[0], names[5]]).await.unwrap().len(), 2);

    // Known to be damaged, they count as missing, and the next upload heals them.
    assert_eq!(
        client.pin(session(2), &names).await.unwrap().missing,
        names[1..=4]
    );
    let put = client.put(session(2), bodies.clone()).await.unwrap();
    assert_eq!((put.stored, put.present), (4, 2));
    assert!(
        client
            .pin(session(2), &names)
            .await
            .unwrap()
            .missing
            .is_empty()
    );
    let got = client.get(&names).await.unwrap();
    assert!(got.iter().zip(&bodies).all(|(g, (_, b))| g == b));
    let chunks = client.status().await.unwrap().chunks;
    assert_eq!(chunks, 6);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_is_corruption_and_harms_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let map = ShardMap::new(4).unwrap();
    let one = Epoch(1);
    let ids = [sandbox_id(1), sandbox_id(2), sandbox_id(3), sandbox_id(4)];
    let node = start(dir.path()).await;
    let c = client(&node).await;
    for (i, id) in ids.iter().enumerate() {
        c.create_sandbox(*id, &format!("s{i}"), vec![])
            .await
            .unwrap();
        for turn in 0..3 {
            c.commit(commit(*id, one, turn)).await.unwrap();
        }
    }
    c.put_image("i", b"record".to_vec(), &[], 0).await.unwrap();
    node.shutdown().await;

    let (checkpoint, manifest) = commit(ids[1], one, 1).manifest.unwrap();
    {
        // Values with a right checksum and a wrong content: an undecodable state, a manifest that is not its id's.
        let db = Db::open(&dir.path().join("db")).unwrap();
        let mut batch = db.batch().unwrap();
        batch.put_state(
            map.of_sandbox(&ids[0]),
            &keys::sandbox(&ids[0]),
            b"\x01nonsense",
        );
        let key = keys::manifest(&ids[1], tidepool_proto::TurnNo(1));
        let mut row = vec![1];
        row.extend_from_slice(&checkpoint.0);
        row.extend_from_slice(&manifest);
        *row.last_mut().unwrap() ^= 1;
        batch.put_state(map.of_sandbox(&ids[1]), &key, &row);
        db.commit(batch, true).unwrap();
    }
    {
        // A value whose checksum does not fit.
        let families = ["default", "raft", "state", "bodies", "segments"];
        let options = rocksdb::Options::default();
        let db = rocksdb::DB::open_cf(&options, dir.path().join("db"), families).unwrap();
        let state = db.cf_handle("state").unwrap();
        let mut key = META_GROUP.to_be_bytes().to_vec();
        key.extend(keys::image("i"));
        let mut value = db.get_cf(&state, &key).unwrap().unwrap();
        value[2] ^= 1;
        db.put_cf(&state, &key, value).unwrap();
    }

    let node = start(dir.path()).await;
    let c = client(&node).await;
    let corrupt = |e: tidepool_store_client::ClientError| {
        assert_eq!(e.kind(), ErrorKind::Corruption, "{e}");
    };
    corrupt(c.sandbox(ids[0]).await.unwrap_err());
    corrupt(c.commit(commit(ids[0], one, 3)).await.unwrap_err());
    corrupt(c.take_sandbox(ids[0]).await.unwrap_err());
    corrupt(c.manifest(ids[1], checkpoint).await.unwrap_err());
    corrupt(c.image("i").await.unwrap_err());
    // Lists leave out the damaged ones only.
    let left: Vec<_> = c.sandboxes().await.unwrap().iter().map(|s| s.id).collect();
    assert!(left.len() == 3 && !left.contains(&ids[0]), "{left:?}");
    assert_eq!(c.manifests(ids[1]).await.unwrap().len(), 2);
    assert_eq!(c.manifests(ids[2]).await.unwrap().len(), 3);
    assert!(c.images().await.unwrap().is_empty());
    assert!(node.stats().corruptions >= 8);
    // Everything else goes on, also after the damaged commands are in the log.
    let other = commit(ids[1], one, 2).manifest.unwrap();
    assert_eq!(c.manifest(ids[1], other.0).await.unwrap(), other.1);
    for id in &ids[1..] {
        c.commit(commit(*id, one, 3)).await.unwrap();
    }
    node.shutdown().await;
    let node = start(dir.path()).await;
    let c = client(&node).await;
    assert_eq!(c.sandbox(ids[3]).await.unwrap().unwrap().turns, 4);
    node.shutdown().await;
}

fn newest_log(db: &Path) -> PathBuf {
    let mut logs: Vec<_> = fs::read_dir(db)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .filter(|p| p.metadata().unwrap().len() > 0)
        .collect();
    logs.sort();
    logs.pop().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_log_opens_and_a_damaged_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let db = dir.path().join("db");
    let identity = Node::issue_client(dir.path(), Role::Host, DAY).unwrap();
    let mut store = Process::start(dir.path(), 64);
    let c = Client::connect(fast(store.addr, identity.clone()))
        .await
        .unwrap();
    let bodies: Vec<(_, Bytes)> = (0..200).map(|i| chunk(i, 3000)).collect();
    for part in bodies.chunks(10) {
        c.put(session(1), part.to_vec()).await.unwrap();
    }
    store.kill();
    let log = newest_log(&db);
    let whole = fs::read(&log).unwrap();
    assert!(whole.len() > 20_000);

    // A flipped bit in the middle must not silently lose what comes after.
    let mut bad = whole.clone();
    bad[whole.len() / 2] ^= 1;
    fs::write(&log, &bad).unwrap();
    let e = Node::start(NodeConfig::embedded(dir.path()))
        .await
        .unwrap_err();
    assert!(e.to_string().to_lowercase().contains("corrupt"), "{e}");

    // A record that is cut off at the end was never acknowledged: it goes, all before it stays. Bodies stay all: what the index
    // lost with it is found again in their segments.
    for cut in [1, 7, 100, 4000] {
        fs::write(&log, &whole[..whole.len() - cut]).unwrap();
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        let node = start(copy.path()).await;
        let c = client(&node).await;
        let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
        let got = c.get(&names).await.unwrap();
        assert!(
            got.iter().zip(&bodies).all(|(g, (_, b))| g == b),
            "cut {cut}"
        );
        c.put(session(2), bodies.clone()).await.unwrap();
        node.shutdown().await;
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_directory_has_one_node_and_one_cluster() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let node = start(a.path()).await;
    let e = Node::start(NodeConfig::embedded(a.path()))
        .await
        .unwrap_err();
    assert!(e.to_string().contains("lock"), "{e}");
    node.shutdown().await;
    start(b.path()).await.shutdown().await;
    fs::copy(b.path().join("node.json"), a.path().join("node.json")).unwrap();
    let e = Node::start(NodeConfig::embedded(a.path()))
        .await
        .unwrap_err();
    assert!(e.to_string().contains("another cluster"), "{e}");
    fs::write(a.path().join("node.json"), b"{").unwrap();
    let e = Node::start(NodeConfig::embedded(a.path()))
        .await
        .unwrap_err();
    assert!(e.to_string().contains("damaged"), "{e}");
}
