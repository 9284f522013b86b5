//! SIGKILL of the real binary at random moments while it is written to: everything acknowledged is there afterwards, unharmed.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{DAY, Process, chunk, commit, fast, sandbox_id};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tidepool_proto::{ChunkName, Epoch, SessionId, TurnNo};
use tidepool_store::{Node, Role};
use tidepool_store_client::Client;
use tokio::task::JoinSet;

const ROUNDS: u64 = 40;
const SANDBOXES: u8 = 3;

#[derive(Default)]
struct Acked {
    chunks: BTreeMap<ChunkName, Bytes>,
    /// The last turn of each sandbox.
    turns: BTreeMap<u8, u64>,
}

async fn put_chunks(client: Client, acked: Arc<Mutex<Acked>>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let session = SessionId(rng.random());
    loop {
        // Small batches are copied together, large ones are written in pieces.
        let bodies: Vec<_> = if rng.random_ratio(1, 4) {
            (0..3).map(|_| chunk(rng.random(), 600_000)).collect()
        } else {
            let n = rng.random_range(1..20);
            (0..n)
                .map(|_| chunk(rng.random(), rng.random_range(1..9000)))
                .collect()
        };
        let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
        client.pin(session, &names).await.unwrap();
        client.put(session, bodies.clone()).await.unwrap();
        acked.lock().unwrap().chunks.extend(bodies);
        if rng.random_ratio(1, 8) {
            client.end_session(session).await.unwrap();
        }
    }
}

async fn commit_turns(client: Client, acked: Arc<Mutex<Acked>>, n: u8) {
    let id = sandbox_id(n);
    let name = format!("crash-{n}");
    client.create_sandbox(id, &name, vec![n]).await.unwrap();
    // The last one may have been committed without an answer.
    let next = acked.lock().unwrap().turns.get(&n).map_or(0, |t| t + 1);
    for turn in next.. {
        client.commit(commit(id, Epoch(1), turn)).await.unwrap();
        acked.lock().unwrap().turns.insert(n, turn);
    }
}

async fn verify(client: &Client, acked: &Mutex<Acked>, round: u64) {
    let (chunks, turns) = {
        let acked = acked.lock().unwrap();
        (acked.chunks.clone(), acked.turns.clone())
    };
    let names: Vec<_> = chunks.keys().copied().collect();
    for part in names.chunks(1000) {
        let got = client.get(part).await.unwrap();
        for (name, body) in part.iter().zip(got) {
            assert_eq!(body, chunks[name], "round {round}: chunk {name}");
        }
    }
    for (n, last) in turns {
        let id = sandbox_id(n);
        let sandbox = client.sandbox(id).await.unwrap().unwrap();
        assert!(
            sandbox.last_turn.0 == last || sandbox.last_turn.0 == last + 1,
            "round {round}: sandbox {n} is at turn {}, {last} was acknowledged",
            sandbox.last_turn
        );
        let turns = client.turns(id, TurnNo(0), u32::MAX).await.unwrap();
        let manifests = client.manifests(id).await.unwrap();
        assert_eq!(turns.len() as u64, sandbox.turns);
        assert_eq!(manifests.len() as u64, sandbox.turns);
        for (turn, (record, (no, checkpoint, bytes))) in turns.iter().zip(manifests).enumerate() {
            let wanted = commit(id, Epoch(1), turn as u64);
            assert_eq!(*record, wanted.record, "round {round}");
            assert_eq!(
                (no, Some((checkpoint, bytes))),
                (wanted.turn, wanted.manifest)
            );
        }
        assert!(
            client
                .turn_by_key(id, &format!("key-{last}"))
                .await
                .unwrap()
                .is_some()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_acknowledged_survives_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let identity = Node::issue_client(dir.path(), Role::Host, DAY).unwrap();
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let acked = Arc::new(Mutex::new(Acked::default()));
    for round in 0..ROUNDS {
        let mut store = Process::start(dir.path(), 64);
        let client = Client::connect(fast(store.addr, identity.clone()))
            .await
            .unwrap();
        verify(&client, &acked, round).await;
        let mut writers = JoinSet::new();
        for _ in 0..3 {
            writers.spawn(put_chunks(client.clone(), acked.clone(), rng.random()));
        }
        for n in 0..SANDBOXES {
            writers.spawn(commit_turns(client.clone(), acked.clone(), n));
        }
        let end = tokio::time::sleep(Duration::from_millis(rng.random_range(1..250)));
        tokio::select! {
            () = end => {}
            ended = writers.join_next() => panic!("a writer ended before the kill: {ended:?}"),
        }
        store.kill();
        writers.shutdown().await;
    }
    let store = Process::start(dir.path(), 64);
    let client = Client::connect(fast(store.addr, identity)).await.unwrap();
    verify(&client, &acked, ROUNDS).await;
    let acked = acked.lock().unwrap();
    let turns: u64 = acked.turns.values().sum();
    println!("{} chunks, {turns} turns", acked.chunks.len());
    assert!(acked.chunks.len() > 100 && turns > 100);
    drop(client);
    assert!(store.terminate());
}
