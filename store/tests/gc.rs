//! Collection on a real node: what nothing needs goes, what anything needs stays, and who was overtaken is told.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{client, connect, key, noise, record, sandbox_id, session, start};
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::Verdict;
use tidepool_proto::{CheckpointId, ChunkName, Epoch, ErrorKind, SandboxId, TreeId, TurnNo};
use tidepool_store::Role;
use tidepool_store::gc::{GcReport, Phase};
use tidepool_store_client::{Client, Commit, lower_round};

/// A chunk that refers to others, as a tree node does.
fn linked(links: &[ChunkName], seed: u64) -> (ChunkName, Bytes) {
    let mut plain = noise(seed, 64);
    plain.extend(links.iter().flat_map(|l| l.0));
    let name = key().name_linked(&plain, links);
    (name, key().encode(&name, &plain, links, None).into())
}

/// A tree of these leaves: leaves, two nodes, a root.
fn tree(leaves: &[(ChunkName, Bytes)], seed: u64) -> (TreeId, Vec<(ChunkName, Bytes)>) {
    let names: Vec<ChunkName> = leaves.iter().map(|(n, _)| *n).collect();
    let (a, b) = names.split_at(names.len() / 2);
    let nodes = [linked(a, seed), linked(b, seed + 1)];
    let root = linked(&[nodes[0].0, nodes[1].0], seed + 2);
    let id = TreeId(root.0.0);
    let all = leaves.iter().cloned().chain(nodes).chain([root]);
    (id, all.collect())
}

fn leaves(seeds: std::ops::Range<u64>) -> Vec<(ChunkName, Bytes)> {
    seeds.map(|s| common::chunk(s, 20_000)).collect()
}

struct Turn {
    sandbox: SandboxId,
    turn: u64,
    image: TreeId,
    upper: TreeId,
    parent: Option<CheckpointId>,
}

fn commit(t: &Turn, round: u64) -> (CheckpointId, Commit) {
    let bytes = Manifest {
        sandbox: t.sandbox,
        epoch: Epoch(1),
        turn: TurnNo(t.turn),
        parent: t.parent,
        created_ms: t.turn,
        verdict: Verdict::Files,
        domain: "d".parse().unwrap(),
        image_name: "image".into(),
        image: t.image,
        upper: t.upper,
        processes: None,
        spec: b"{}".to_vec(),
        init_nonce: [0; 32],
        upper_bytes: 0,
    }
    .encode();
    let id = Manifest::id_of(&bytes);
    let commit = Commit {
        sandbox: t.sandbox,
        epoch: Epoch(1),
        turn: TurnNo(t.turn),
        key: String::new(),
        record: record(TurnNo(t.turn), "", id),
        manifest: Some((id, bytes)),
        session: None,
        round,
        base: None,
    };
    (id, commit)
}

async fn upload(client: &Client, n: u8, chunks: Vec<(ChunkName, Bytes)>) -> u64 {
    let names: Vec<ChunkName> = chunks.iter().map(|(n, _)| *n).collect();
    let pinned = client.pin(session(n), &names).await.unwrap();
    let put = client.put(session(n), chunks).await.unwrap();
    lower_round(pinned.round, put.round)
}

async fn collect(client: &Client, dry: bool) -> GcReport {
    match dry {
        true => client.gc_try(&[]).await.unwrap(),
        false => client.gc_run(0).await.unwrap(),
    };
    loop {
        let report: GcReport = serde_json::from_slice(&client.gc_status().await.unwrap()).unwrap();
        if report.ended_ms != 0 {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_needs_goes_and_all_else_stays() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let operator = connect(
        node.local_addr(),
        node.issue(Role::Operator, Duration::from_secs(600))
            .unwrap(),
    )
    .await;
    let client = client(&node).await;
    let id = sandbox_id(1);
    client.create_sandbox(id, "a", vec![]).await.unwrap();

    let (image, image_chunks) = tree(&leaves(0..10), 1000);
    let round = upload(&client, 1, image_chunks.clone()).await;
    let roots = [ChunkName(image.0)];
    client
        .put_image("image", vec![], &roots, round)
        .await
        .unwrap();
    let (old, old_chunks) = tree(&leaves(10..40), 2000);
    let (new, new_chunks) = tree(&leaves(20..50), 3000);
    let mut ids = Vec::new();
    for (turn, upper, chunks) in [(1, old, &old_chunks), (2, new, &new_chunks)] {
        let round = upload(&client, 2, chunks.clone()).await;
        let (id, commit) = commit(
            &Turn {
                sandbox: id,
                turn,
                image,
                upper,
                parent: None,
            },
            round,
        );
        client.commit(commit).await.unwrap();
        ids.push(id);
    }
    // Uploaded and never committed.
    upload(&client, 3, leaves(100..110)).await;
    let before = node.stats();

    let dry = collect(&operator, true).await;
    assert_eq!((dry.phase, dry.error.as_deref()), (Phase::Done, None));
    assert_eq!(
        (dry.roots, dry.nodes, dry.garbage, dry.swept),
        (3, 9, 10, 0)
    );
    assert_eq!(node.stats().chunks, before.chunks);
    let first = collect(&operator, false).await;
    assert!(first.round > dry.round);
    assert_eq!((first.garbage, first.swept), (10, 10));
    assert_eq!(first.swept_bytes, dry.garbage_bytes);
    assert_eq!(node.stats().chunks, before.chunks - 10);

    // The older checkpoint goes: what only it needs are ten leaves and three nodes.
    let changes = client.sandbox(id).await.unwrap().unwrap().changes;
    operator
        .remove_checkpoints(id, changes, &ids[..1])
        .await
        .unwrap();
    assert_eq!(client.manifests(id).await.unwrap().len(), 1);
    let second = collect(&operator, false).await;
    assert_eq!((second.phase, second.swept), (Phase::Done, 13));
    let live: Vec<ChunkName> = image_chunks
        .iter()
        .chain(&new_chunks)
        .map(|c| c.0)
        .collect();
    let bodies = client.get(&live).await.unwrap();
    for (name, body) in live.iter().zip(bodies) {
        key().open(name, &body).unwrap();
    }
    assert_eq!(node.stats().chunks, live.len() as u64);
    let gone = client.get(&[ChunkName(old.0)]).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);

    // It can be uploaded again; the sandbox and its image go, and then everything does.
    client.remove_sandbox(id, Epoch(1)).await.unwrap();
    assert!(client.manifests(id).await.unwrap().is_empty());
    client.remove_image("image").await.unwrap();
    let last = collect(&operator, false).await;
    assert_eq!((last.roots, last.phase), (0, Phase::Done));
    assert_eq!(node.stats().chunks, 0);
    assert_eq!(node.stats().chunk_bytes, 0);
    let round = upload(&client, 4, old_chunks.clone()).await;
    assert_eq!(round, last.round);
    let names: Vec<ChunkName> = old_chunks.iter().map(|c| c.0).collect();
    client.get(&names).await.unwrap();
    node.shutdown().await;

    // The account outlives the node.
    let node = start(dir.path()).await;
    let client = common::client(&node).await;
    let report: GcReport = serde_json::from_slice(&client.gc_status().await.unwrap()).unwrap();
    assert_eq!(report, last);
    assert_eq!(node.stats().chunks, names.len() as u64);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_misses_a_chunk_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let operator = connect(
        node.local_addr(),
        node.issue(Role::Operator, Duration::from_secs(600))
            .unwrap(),
    )
    .await;
    let client = client(&node).await;
    let id = sandbox_id(1);
    client.create_sandbox(id, "a", vec![]).await.unwrap();
    let (upper, mut chunks) = tree(&leaves(0..10), 1000);
    let lost = chunks.remove(3).0;
    let round = upload(&client, 1, chunks).await;
    upload(&client, 2, leaves(50..60)).await;
    let (_, commit) = commit(
        &Turn {
            sandbox: id,
            turn: 1,
            image: upper,
            upper,
            parent: None,
        },
        round,
    );
    client.commit(commit).await.unwrap();
    let before = node.stats().chunks;
    let report = collect(&operator, false).await;
    assert_eq!((report.phase, report.swept), (Phase::Failed, 0));
    let why = report.error.unwrap();
    assert!(why.contains(&lost.to_string()), "{why}");
    assert_eq!(node.stats().chunks, before);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_a_collection_overtook_is_told_and_made_good() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let operator = connect(
        node.local_addr(),
        node.issue(Role::Operator, Duration::from_secs(600))
            .unwrap(),
    )
    .await;
    let client = client(&node).await;
    let (a, b) = (sandbox_id(1), sandbox_id(2));
    client.create_sandbox(a, "a", vec![]).await.unwrap();
    client.create_sandbox(b, "b", vec![]).await.unwrap();
    let (upper, chunks) = tree(&leaves(0..10), 1000);
    let turn = |sandbox, parent| Turn {
        sandbox,
        turn: 1,
        image: upper,
        upper,
        parent,
    };
    let round = upload(&client, 1, chunks.clone()).await;
    let report = collect(&operator, false).await;
    assert_eq!((report.interrupted, report.swept), (1, chunks.len() as u64));
    let (_, late) = commit(&turn(a, None), round);
    let e = client.commit(late).await.unwrap_err();
    assert!(e.upload_again() && e.kind() == ErrorKind::Conflict, "{e}");
    // Everything is gone, and pinning says so.
    let names: Vec<ChunkName> = chunks.iter().map(|c| c.0).collect();
    assert_eq!(client.pin(session(2), &names).await.unwrap().missing, names);
    let round = upload(&client, 2, chunks.clone()).await;
    let (first, good) = commit(&turn(a, None), round);
    client.commit(good).await.unwrap();
    client.end_session(session(1)).await.unwrap();
    client.end_session(session(2)).await.unwrap();

    // A fork that read a checkpoint before a round and commits after its cut is refused, for the checkpoint may be gone by then.
    let (_, read) = client.manifest_at(a, first).await.unwrap();
    let report = collect(&operator, false).await;
    assert_eq!((report.interrupted, report.swept), (0, 0));
    let (_, fork) = commit(&turn(b, Some(first)), read);
    assert!(client.commit(fork).await.unwrap_err().upload_again());
    // Read again, it is a root as long as that round is the newest, even if it is removed at once.
    let (_, read) = client.manifest_at(a, first).await.unwrap();
    client.remove_sandbox(a, Epoch(1)).await.unwrap();
    let (_, fork) = commit(&turn(b, Some(first)), read);
    client.commit(fork).await.unwrap();
    for _ in 0..2 {
        assert_eq!(collect(&operator, false).await.phase, Phase::Done);
    }
    client.get(&names).await.unwrap();
    node.shutdown().await;
}
