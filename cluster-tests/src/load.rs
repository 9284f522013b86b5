//! A load on a store, and the truth about it: writers that put chunks and commit turns, each knowing what was acknowledged to it, and
//! readers that demand of the store what was.
//!
//! A request that fails is sent again, as a host would; only what the store said for certain counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{
    CheckpointId, ChunkName, DomainKey, Epoch, ErrorKind, SandboxId, SessionId, TreeId, TurnNo,
};
use tidepool_store_client::{Client, ClientConfig, ClientError, Commit};

/// Chunks of a turn and their sizes.
const SIZES: [usize; 3] = [70_000, 9_000, 300];
/// How long one thing is tried.
const PATIENCE: Duration = Duration::from_secs(120);

fn key() -> DomainKey {
    DomainKey::new([9; 32])
}

/// The chunks of a turn: bytes that do not compress, the same each time.
fn chunks(sandbox: u64, turn: u64) -> Vec<(ChunkName, Bytes)> {
    let one = |(i, len): (usize, &usize)| {
        let mut plain = vec![0; *len];
        let mut hasher = blake3::Hasher::new();
        for n in [sandbox, turn, i as u64] {
            hasher.update(&n.to_le_bytes());
        }
        hasher.finalize_xof().fill(&mut plain);
        let name = key().name(&plain);
        (name, key().encode(&name, &plain, &[], None).into())
    };
    SIZES.iter().enumerate().map(one).collect()
}

fn sandbox_id(n: u64) -> SandboxId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    SandboxId(id)
}

/// The checkpoint of a turn.
fn manifest(sandbox: u64, epoch: Epoch, turn: TurnNo) -> (CheckpointId, Vec<u8>) {
    let bytes = Manifest {
        sandbox: sandbox_id(sandbox),
        epoch,
        turn,
        parent: None,
        created_ms: 0,
        verdict: Verdict::Files,
        domain: "d".parse().expect("a domain"),
        image_name: "image".into(),
        image: TreeId([1; 32]),
        upper: TreeId([turn.0 as u8; 32]),
        processes: None,
        spec: b"{}".to_vec(),
        init_nonce: [0; 32],
        upper_bytes: 0,
    }
    .encode();
    (Manifest::id_of(&bytes), bytes)
}

fn commit(sandbox: u64, epoch: Epoch, turn: u64, session: SessionId, round: u64) -> Commit {
    let turn = TurnNo(turn);
    let manifest = manifest(sandbox, epoch, turn);
    let record = TurnRecord {
        turn,
        key: format!("key-{turn}"),
        command: format!("command {turn}"),
        started_ms: 0,
        ended_ms: 0,
        verdict: Verdict::Files,
        checkpoint: manifest.0,
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    };
    Commit {
        sandbox: sandbox_id(sandbox),
        epoch,
        turn,
        key: record.key.clone(),
        record: record.encode(),
        manifest: Some(manifest),
        session: Some(session),
        round,
        base: None,
    }
}

/// One sandbox's acknowledged past.
#[derive(Debug, Clone, Copy)]
struct Past {
    sandbox: u64,
    epoch: Epoch,
    /// Turns `1..=turns` were acknowledged.
    turns: u64,
}

/// Writers and readers at work, until they are told to stop.
pub struct Load {
    pasts: Vec<Arc<Mutex<Past>>>,
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    /// The longest that a turn took to be acknowledged, and a turn to be read back, in milliseconds.
    longest: Arc<[AtomicU64; 2]>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

fn lock(past: &Mutex<Past>) -> Past {
    *past.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a failure is of the kind that passes, or means that something was lost.
fn passes(e: &ClientError) -> bool {
    e.kind() == ErrorKind::Unavailable
}

async fn patiently<T, F: Future<Output = Result<T, ClientError>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(value) => return value,
            Err(e) if passes(&e) && began.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(e) => panic!("{what}, after {:?}: {e} ({:?})", began.elapsed(), e.kind()),
        }
    }
}

impl Load {
    /// Starts `writers` writers and as many readers, each with a client of its own. To be called on the runtime that they are to use.
    pub async fn start(cfg: &ClientConfig, writers: u64) -> Self {
        let mut load = Self {
            pasts: Vec::new(),
            stop: Arc::default(),
            reads: Arc::default(),
            longest: Arc::default(),
            tasks: Vec::new(),
        };
        for n in 1..=writers {
            let client = patiently("connecting", || Client::connect(cfg.clone())).await;
            let name = format!("sandbox{n}");
            let create = || client.create_sandbox(sandbox_id(n), &name, b"{}".to_vec());
            let epoch = patiently("creating a sandbox", create).await;
            let past = Arc::new(Mutex::new(Past {
                sandbox: n,
                epoch,
                turns: 0,
            }));
            load.pasts.push(past.clone());
            let stop = load.stop.clone();
            let longest = load.longest.clone();
            load.tasks
                .push(tokio::spawn(write(client, past, stop, longest)));
        }
        for n in 0..writers {
            let client = patiently("connecting", || Client::connect(cfg.clone())).await;
            let (pasts, stop, reads) = (load.pasts.clone(), load.stop.clone(), load.reads.clone());
            let longest = load.longest.clone();
            load.tasks
                .push(tokio::spawn(read(client, pasts, stop, reads, longest, n)));
        }
        load
    }

    /// Turns acknowledged so far, and turns read back.
    pub fn counts(&self) -> (u64, u64) {
        let turns = self.pasts.iter().map(|p| lock(p).turns).sum();
        (turns, self.reads.load(Relaxed))
    }

    /// Turns acknowledged so far to each writer.
    pub fn each(&self) -> Vec<u64> {
        self.pasts.iter().map(|p| lock(p).turns).collect()
    }

    /// How long the longest turn, and the longest reading back, took that ended since this was asked last.
    pub fn longest(&self) -> [Duration; 2] {
        [0, 1].map(|i| Duration::from_millis(self.longest[i].swap(0, Relaxed)))
    }

    /// Whether a writer or reader has failed.
    pub fn failed(&self) -> bool {
        self.tasks.iter().any(tokio::task::JoinHandle::is_finished)
    }

    /// Ends it, and gives what was acknowledged.
    ///
    /// # Panics
    /// Where a writer or reader met something that must not be.
    pub async fn end(self) -> Truth {
        self.stop.store(true, Relaxed);
        for task in self.tasks {
            task.await.expect("a writer or reader failed");
        }
        let pasts = self.pasts.iter().map(|p| lock(p)).collect();
        Truth { pasts }
    }
}

async fn write(
    client: Client,
    past: Arc<Mutex<Past>>,
    stop: Arc<AtomicBool>,
    longest: Arc<[AtomicU64; 2]>,
) {
    let mut at = lock(&past);
    let mut session = [0; 16];
    session[..8].copy_from_slice(&at.sandbox.to_le_bytes());
    while !stop.load(Relaxed) {
        let (turn, began) = (at.turns + 1, Instant::now());
        session[8..].copy_from_slice(&turn.to_le_bytes());
        let id = SessionId(session);
        let bodies = chunks(at.sandbox, turn);
        loop {
            let put = patiently("a put", || client.put(id, bodies.clone())).await;
            let wanted = commit(at.sandbox, at.epoch, turn, id, put.round);
            match client.commit(wanted).await {
                Ok(()) => break,
                // Whether it was done is not known; it is the same commit again.
                Err(e) if passes(&e) || e.upload_again() => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(e) => panic!("a commit of sandbox {}: {e}", at.sandbox),
            }
        }
        at.turns = turn;
        longest[0].fetch_max(began.elapsed().as_millis() as u64, Relaxed);
        *past.lock().unwrap_or_else(PoisonError::into_inner) = at;
        // A courtesy.
        let _ = client.end_session(id).await;
    }
}

async fn read(
    client: Client,
    pasts: Vec<Arc<Mutex<Past>>>,
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    longest: Arc<[AtomicU64; 2]>,
    seed: u64,
) {
    let mut n = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while !stop.load(Relaxed) {
        n = n
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let past = lock(&pasts[(n >> 33) as usize % pasts.len()]);
        if past.turns == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        let (turn, began) = ((n >> 17) % past.turns + 1, Instant::now());
        demand(&client, past, turn).await;
        let head = patiently("reading a sandbox", || {
            client.sandbox(sandbox_id(past.sandbox))
        })
        .await;
        let last = head.expect("an acknowledged sandbox").last_turn;
        assert!(
            last.0 >= past.turns,
            "sandbox {}: {last} after {}",
            past.sandbox,
            past.turns
        );
        longest[1].fetch_max(began.elapsed().as_millis() as u64, Relaxed);
        reads.fetch_add(1, Relaxed);
    }
}

/// A turn that was acknowledged has to be there, whole.
async fn demand(client: &Client, past: Past, turn: u64) {
    let (id, want) = manifest(past.sandbox, past.epoch, TurnNo(turn));
    let got = patiently("reading a manifest", || {
        client.manifest(sandbox_id(past.sandbox), id)
    })
    .await;
    assert_eq!(got, want, "sandbox {} turn {turn}", past.sandbox);
    let bodies = chunks(past.sandbox, turn);
    let names: Vec<_> = bodies.iter().map(|(n, _)| *n).collect();
    let got = patiently("reading chunks", || client.get(&names)).await;
    let same = got.iter().eq(bodies.iter().map(|(_, b)| b));
    assert!(same, "sandbox {} turn {turn}: other bytes", past.sandbox);
}

/// Stores this many bodies of 64 KiB and reads them back, with one call each.
///
/// # Panics
/// Where a call fails.
pub async fn put_much(client: &Client, bodies: u64) {
    let one = |n: u64| {
        let mut plain = vec![0; 64 << 10];
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"much").update(&n.to_le_bytes());
        hasher.finalize_xof().fill(&mut plain);
        let name = key().name(&plain);
        let body: Bytes = key().encode(&name, &plain, &[], None).into();
        (name, body)
    };
    let all: Vec<(ChunkName, Bytes)> = (0..bodies).map(one).collect();
    let session = SessionId([0xee; 16]);
    let put = client.put(session, all.clone()).await.expect("a put");
    assert_eq!(put.stored + put.present, bodies);
    let names: Vec<_> = all.iter().map(|(n, _)| *n).collect();
    let got = client.get(&names).await.expect("a get");
    assert!(got.iter().eq(all.iter().map(|(_, b)| b)), "other bytes");
}

/// What was acknowledged.
pub struct Truth {
    pasts: Vec<Past>,
}

impl Truth {
    /// How many turns.
    pub fn turns(&self) -> u64 {
        self.pasts.iter().map(|p| p.turns).sum()
    }

    /// Demands all of it from the store.
    ///
    /// # Panics
    /// Where anything is missing or different.
    pub async fn demand(&self, client: &Client) {
        for past in &self.pasts {
            for turn in 1..=past.turns {
                demand(client, *past, turn).await;
            }
        }
    }
}
