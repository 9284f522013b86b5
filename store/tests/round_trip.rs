//! Everything a client can ask of a node, over real QUIC, and again after a restart.

mod common;

use common::{chunk, client, commit, record, sandbox_id, session, start};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, ErrorKind, TurnNo};
use tidepool_store_client::Commit;

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_pinned_put_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let client = client(&node).await;
    let s = session(1);
    let bodies: Vec<_> = (0..200).map(|i| chunk(i, 1 + i as usize * 997)).collect();
    let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();

    assert!(client.pin(s, &[]).await.unwrap().missing.is_empty());
    assert_eq!(client.put(s, vec![]).await.unwrap().stored, 0);
    assert!(client.get(&[]).await.unwrap().is_empty());
    client.end_session(s).await.unwrap();

    let mut doubled = names.clone();
    doubled.extend(&names);
    assert_eq!(client.pin(s, &doubled).await.unwrap().missing, names);
    let mut doubled = bodies.clone();
    doubled.extend(bodies.clone());
    let put = client.put(s, doubled).await.unwrap();
    assert_eq!((put.stored, put.present), (200, 0));
    let put = client.put(s, bodies.clone()).await.unwrap();
    assert_eq!((put.stored, put.present, put.stored_bytes), (0, 200, 0));
    assert!(client.pin(s, &names).await.unwrap().missing.is_empty());

    let mut asked = names.clone();
    asked.reverse();
    asked.push(names[3]);
    let got = client.get(&asked).await.unwrap();
    for (name, body) in asked.iter().zip(&got) {
        let at = names.iter().position(|n| n == name).unwrap();
        assert_eq!(*body, bodies[at].1);
    }
    client.end_session(s).await.unwrap();
    client.end_session(s).await.unwrap();

    let absent = ChunkName([9; 32]);
    let e = client.get(&[names[0], absent]).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert!(e.to_string().contains(&absent.to_string()), "{e}");
    let e = client
        .put(s, vec![(absent, b"no body".to_vec().into())])
        .await;
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Invalid);

    let status = client.status().await.unwrap();
    let bytes: u64 = bodies.iter().map(|(_, b)| b.len() as u64).sum();
    assert_eq!((status.chunks, status.chunk_bytes), (200, bytes));
    assert!(status.ready && !status.full);
    assert_eq!(status.shards, 4);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_uploads_are_split() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let client = client(&node).await;
    let bodies: Vec<_> = (0..60).map(|i| chunk(1000 + i, 1 << 20)).collect();
    let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
    let put = client.put(session(2), bodies.clone()).await.unwrap();
    assert_eq!(put.stored, 60);
    let got = client.get(&names).await.unwrap();
    assert!(got.iter().zip(&bodies).all(|(g, (_, b))| g == b));
    let many: Vec<_> = (0..20_000u32)
        .map(|i| {
            let mut name = [3; 32];
            name[..4].copy_from_slice(&i.to_le_bytes());
            ChunkName(name)
        })
        .collect();
    assert_eq!(client.pin(session(3), &many).await.unwrap().missing, many);
    client.end_session(session(3)).await.unwrap();
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_commit_turns_and_keep_them_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let client = client(&node).await;
    let id = sandbox_id(1);
    let one = Epoch(1);
    assert_eq!(
        client
            .create_sandbox(id, "alpha", b"meta".to_vec())
            .await
            .unwrap(),
        one
    );
    // Again is the same.
    assert_eq!(
        client
            .create_sandbox(id, "alpha", b"meta".to_vec())
            .await
            .unwrap(),
        one
    );
    let taken = client.create_sandbox(sandbox_id(2), "alpha", vec![]).await;
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::Conflict);

    for turn in 0..5 {
        client.commit(commit(id, one, turn)).await.unwrap();
    }
    client.commit(commit(id, one, 4)).await.unwrap();
    let head = commit(id, one, 4).manifest.unwrap().0;
    // A turn without a checkpoint of its own, pointing back: a rollback.
    let back = commit(id, one, 2).manifest.unwrap().0;
    let clean = |checkpoint: CheckpointId| Commit {
        sandbox: id,
        epoch: one,
        turn: TurnNo(5),
        key: "back".into(),
        record: record(TurnNo(5), "back", checkpoint),
        manifest: None,
        session: None,
        round: 1,
        base: None,
    };
    let e = client
        .commit(clean(CheckpointId([0; 32])))
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Invalid);
    assert_eq!(client.sandbox(id).await.unwrap().unwrap().head, Some(head));
    client.commit(clean(back)).await.unwrap();
    client
        .update_sandbox_meta(id, one, b"new".to_vec())
        .await
        .unwrap();
    client
        .put_image("base:1", b"image".to_vec(), &[], 0)
        .await
        .unwrap();
    node.shutdown().await;

    let node = start(dir.path()).await;
    let client = common::client(&node).await;
    let sandbox = client.sandbox(id).await.unwrap().unwrap();
    assert_eq!(sandbox.name, "alpha");
    assert_eq!(sandbox.meta, b"new");
    assert_eq!((sandbox.turns, sandbox.last_turn), (6, TurnNo(5)));
    assert_eq!(sandbox.head, Some(back));
    assert_eq!(client.sandboxes().await.unwrap(), vec![sandbox]);
    let turns = client.turns(id, TurnNo(3), 100).await.unwrap();
    assert_eq!(
        turns,
        [
            commit(id, one, 3).record,
            commit(id, one, 4).record,
            clean(back).record
        ]
    );
    assert_eq!(client.turns(id, TurnNo(0), 2).await.unwrap().len(), 2);
    assert_eq!(
        client.turn_by_key(id, "key-3").await.unwrap(),
        Some(commit(id, one, 3).record)
    );
    assert_eq!(client.turn_by_key(id, "key-77").await.unwrap(), None);
    let manifests = client.manifests(id).await.unwrap();
    assert_eq!(manifests.len(), 5);
    let (checkpoint, bytes) = commit(id, one, 2).manifest.unwrap();
    assert_eq!(client.manifest(id, checkpoint).await.unwrap(), bytes);
    assert_eq!(manifests[2], (TurnNo(2), checkpoint, bytes));
    let e = client
        .manifest(id, CheckpointId([1; 32]))
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert_eq!(
        client.image("base:1").await.unwrap(),
        Some(b"image".to_vec())
    );

    client.remove_sandbox(id, one).await.unwrap();
    client.remove_sandbox(id, one).await.unwrap();
    assert_eq!(client.sandbox(id).await.unwrap(), None);
    assert!(client.turns(id, TurnNo(0), 10).await.unwrap().is_empty());
    assert!(client.manifests(id).await.unwrap().is_empty());
    assert_eq!(client.turn_by_key(id, "key-3").await.unwrap(), None);
    let e = client.commit(commit(id, one, 6)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Fenced);
    // The name is free again, the id is not.
    client
        .create_sandbox(sandbox_id(2), "alpha", vec![])
        .await
        .unwrap();
    let e = client
        .create_sandbox(id, "other", vec![])
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Conflict);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_epoch_is_fenced() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let client = client(&node).await;
    let id = sandbox_id(5);
    let old = client.create_sandbox(id, "s", vec![]).await.unwrap();
    client.commit(commit(id, old, 1)).await.unwrap();
    let new = client.take_sandbox(id).await.unwrap();
    assert!(new > old);
    let fenced =
        |e: tidepool_store_client::ClientError| assert_eq!(e.kind(), ErrorKind::Fenced, "{e}");
    fenced(client.commit(commit(id, old, 2)).await.unwrap_err());
    fenced(
        client
            .update_sandbox_meta(id, old, vec![])
            .await
            .unwrap_err(),
    );
    fenced(client.remove_sandbox(id, old).await.unwrap_err());
    fenced(
        client
            .commit(commit(id, Epoch(new.0 + 1), 2))
            .await
            .unwrap_err(),
    );
    client.commit(commit(id, new, 2)).await.unwrap();
    let e = client.commit(commit(id, new, 4)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Conflict);
    let mut other = commit(id, new, 2);
    other.record = record(TurnNo(2), "key-2", commit(id, old, 1).manifest.unwrap().0);
    let e = client.commit(other).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Conflict);
    let e = client.take_sandbox(sandbox_id(99)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_lists_of_many() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let client = client(&node).await;
    for i in 0..40u8 {
        let record = vec![i; 200 << 10];
        client
            .put_image(&format!("image-{i:02}"), record, &[], 0)
            .await
            .unwrap();
    }
    let images = client.images().await.unwrap();
    assert_eq!(images.len(), 40);
    assert!(
        images
            .iter()
            .enumerate()
            .all(|(i, (n, r))| *n == format!("image-{i:02}")
                && r.len() == 200 << 10
                && r[0] == i as u8)
    );
    client
        .put_image("image-00", vec![0; 200 << 10], &[], 0)
        .await
        .unwrap();
    let e = client
        .put_image("image-00", vec![1], &[], 0)
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Conflict);
    client.remove_image("image-00").await.unwrap();
    let e = client.remove_image("image-00").await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert_eq!(client.image("image-00").await.unwrap(), None);
    let e = client
        .put_image("big", vec![0; 300 << 10], &[], 0)
        .await
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Invalid);

    for i in 0..80 {
        let meta = vec![i; 100 << 10];
        client
            .create_sandbox(sandbox_id(i), &format!("s{i}"), meta)
            .await
            .unwrap();
    }
    let list = client.sandboxes().await.unwrap();
    let mut names: Vec<_> = list.iter().map(|s| s.name.clone()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 80);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_uploads_at_once_than_there_is_memory_for() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let clients = [client(&node).await, client(&node).await];
    let mut uploads = tokio::task::JoinSet::new();
    for i in 0..48u64 {
        let client = clients[i as usize % 2].clone();
        uploads.spawn(async move {
            let bodies: Vec<_> = (0..8).map(|n| chunk(i * 8 + n, 1_000_000)).collect();
            let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
            client.put(session(i as u8), bodies.clone()).await.unwrap();
            let got = client.get(&names).await.unwrap();
            assert!(got.iter().zip(&bodies).all(|(g, (_, b))| g == b));
        });
    }
    while let Some(upload) = uploads.join_next().await {
        upload.unwrap();
    }
    assert_eq!(node.stats().chunks, 48 * 8);
    node.shutdown().await;
}
