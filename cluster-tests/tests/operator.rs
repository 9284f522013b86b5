//! What operators do to a store that runs: retention from rules to a plan to its execution, collection, scrubs. Real processes on both sides;
//! what hosts would write comes from a client here.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};
use tidepool_cluster_tests::{Said, StoreProcess, issue};
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{
    CheckpointId, ChunkName, DomainKey, Epoch, ErrorKind, SandboxId, SessionId, TreeId, TurnNo,
};
use tidepool_store_client::{Client, ClientConfig, ClientIdentity, Commit, lower_round};

/// Bodies of whole disk blocks, so that their space can be seen to come back.
const LEAF: usize = 256 << 10;
const LEAVES: u64 = 4;
const DAY_MS: u64 = 24 * 3600 * 1000;

type Chunk = (ChunkName, Bytes);

/// A store with an operator and a host that may use it.
struct Rig {
    dir: tempfile::TempDir,
    store: Option<StoreProcess>,
    operator: PathBuf,
    host: PathBuf,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("tp-operator-")
            .tempdir_in("/var/tmp")
            .unwrap();
        let data = dir.path().join("data");
        let store = StoreProcess::run(&data, "127.0.0.1:0");
        let operator = issue(&data, "operator", &dir.path().join("operator"));
        let host = issue(&data, "host", &dir.path().join("host"));
        Self {
            dir,
            store: Some(store),
            operator,
            host,
        }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn store(&self) -> &StoreProcess {
        self.store.as_ref().expect("it runs")
    }

    /// SIGKILL, and a new process at the same address.
    fn restart(&mut self) {
        let addr = self.store().addr.clone();
        self.store.take().expect("it runs").kill();
        self.store = Some(StoreProcess::run(&self.data(), &addr));
    }

    /// `tidepool LINE`, split at blanks, as the operator.
    fn run(&self, line: &str) -> Said {
        self.store().cli(&self.operator, line.split(' '))
    }

    async fn client(&self) -> Client {
        let addr = self.store().addr.parse().unwrap();
        let identity = ClientIdentity::load(&self.host).unwrap();
        Client::connect(ClientConfig::new(vec![addr], identity))
            .await
            .unwrap()
    }

    /// Chunks of the one node, and bytes of their bodies.
    fn held(&self) -> (u64, u64) {
        let list = self.run("node list").json();
        let number = |key: &str| list[0][key].as_u64().unwrap();
        (number("chunks"), number("chunk_bytes"))
    }
}

fn key() -> DomainKey {
    DomainKey::new([7; 32])
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut out);
    out
}

fn chunk(plain: &[u8], links: &[ChunkName]) -> Chunk {
    let name = key().name_linked(plain, links);
    (name, key().encode(&name, plain, links, None).into())
}

/// A tree of leaves that no other seed has.
fn tree(seed: u64) -> (TreeId, Vec<Chunk>) {
    let mut chunks: Vec<Chunk> = (0..LEAVES)
        .map(|i| chunk(&noise(seed * LEAVES + i, LEAF), &[]))
        .collect();
    let links: Vec<ChunkName> = chunks.iter().map(|(n, _)| *n).collect();
    let root = chunk(&seed.to_le_bytes(), &links);
    let id = TreeId(root.0.0);
    chunks.push(root);
    (id, chunks)
}

fn bytes(chunks: &[Chunk]) -> u64 {
    chunks.iter().map(|(_, body)| body.len() as u64).sum()
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

async fn upload(client: &Client, chunks: &[Chunk]) -> u64 {
    let session = SessionId([9; 16]);
    let names: Vec<ChunkName> = chunks.iter().map(|(n, _)| *n).collect();
    let pinned = client.pin(session, &names).await.unwrap();
    let put = client.put(session, chunks.to_vec()).await.unwrap();
    client.end_session(session).await.unwrap();
    lower_round(pinned.round, put.round)
}

/// Commits a turn whose checkpoint is these trees.
async fn turn(
    client: &Client,
    sandbox: SandboxId,
    turn: u64,
    (image, upper): (TreeId, TreeId),
    parent: Option<CheckpointId>,
    round: u64,
) -> CheckpointId {
    // One a day, the newest of today.
    let created_ms = now_ms() - (6 - turn) * DAY_MS;
    let turn = TurnNo(turn);
    let manifest = Manifest {
        sandbox,
        epoch: Epoch(1),
        turn,
        parent,
        created_ms,
        verdict: Verdict::Files,
        domain: "d".parse().unwrap(),
        image_name: "image".into(),
        image,
        upper,
        processes: None,
        spec: b"{}".to_vec(),
        init_nonce: [0; 32],
        upper_bytes: 0,
    }
    .encode();
    let checkpoint = Manifest::id_of(&manifest);
    let record = TurnRecord {
        turn,
        key: String::new(),
        command: "true".into(),
        started_ms: created_ms,
        ended_ms: created_ms,
        verdict: Verdict::Files,
        checkpoint,
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    };
    let commit = Commit {
        sandbox,
        epoch: Epoch(1),
        turn,
        key: String::new(),
        record: record.encode(),
        manifest: Some((checkpoint, manifest)),
        session: None,
        round,
        base: None,
    };
    client.commit(commit).await.unwrap();
    checkpoint
}

/// What a plan says of a sandbox's turns: whether each goes, and why.
fn fates(plan: &Value, name: &str) -> BTreeMap<u64, (bool, Value)> {
    let sandboxes = plan["sandboxes"].as_array().unwrap();
    let of = sandboxes.iter().find(|s| s["name"] == name).unwrap();
    let decisions = of["decisions"].as_array().unwrap().iter();
    decisions
        .map(|d| {
            let fate = (d["remove"].as_bool().unwrap(), d["reason"].clone());
            (d["turn"].as_u64().unwrap(), fate)
        })
        .collect()
}

/// Bytes of disk below a directory.
fn on_disk(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    // A file may be gone by now: space comes back meanwhile.
    let blocks = entries.filter_map(|e| e.metadata().ok().map(|m| m.blocks()));
    blocks.sum::<u64>() * 512
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_is_applied_and_a_collection_gives_the_space_back() {
    let mut rig = Rig::new();
    let client = rig.client().await;
    let (a, b) = (SandboxId([1; 16]), SandboxId([2; 16]));
    client.create_sandbox(a, "a", vec![]).await.unwrap();
    client.create_sandbox(b, "b", vec![]).await.unwrap();
    let (image, image_chunks) = tree(100);
    let round = upload(&client, &image_chunks).await;
    let roots = [ChunkName(image.0)];
    client
        .put_image("image", vec![], &roots, round)
        .await
        .unwrap();
    let mut ids: Vec<CheckpointId> = Vec::new();
    let mut trees: Vec<(TreeId, Vec<Chunk>)> = Vec::new();
    for n in 1..=6 {
        let (upper, chunks) = tree(n);
        let round = upload(&client, &chunks).await;
        let parent = ids.last().copied();
        ids.push(turn(&client, a, n, (image, upper), parent, round).await);
        trees.push((upper, chunks));
    }
    // A fork of the third, which has brought nothing of its own.
    let fork = (image, trees[2].0);
    turn(&client, b, 1, fork, Some(ids[2]), round).await;

    // Without rules everything stays.
    assert_eq!(rig.run("retention show").json()["rules"], json!([]));
    assert_eq!(rig.run("gc status").json()["phase"], "never");
    let plan = rig.run("retention plan").json();
    assert_eq!(
        (&plan["removes"], &plan["keeps"], &plan["bytes_back"]),
        (&json!(0), &json!(7), &json!(0))
    );

    let set = "retention set --label env=test --keep-last 2";
    assert_eq!(rig.run(set).json()["rules"][0]["keep"]["last"], 2);
    assert_eq!(
        rig.run("retention label a env=test owner=x").json(),
        json!({"env": "test", "owner": "x"})
    );
    assert_eq!(
        rig.run("retention label a owner=").json(),
        json!({"env": "test"})
    );
    let second = ids[1].to_string();
    let kept = rig.run(&format!("retention keep a {second}"));
    assert_eq!(kept.json(), json!({"checkpoint": second, "kept": true}));

    // The first and the fourth go: nobody wants them, and nobody came from them.
    let file = rig.dir.path().join("plan");
    let make = format!("retention plan --out {}", file.display());
    let plan = rig.run(&make).json();
    let rule = json!({"not_kept": {"label": {"key": "env", "value": "test"}}});
    let expected: BTreeMap<u64, (bool, Value)> = BTreeMap::from([
        (1, (true, rule.clone())),
        (2, (false, json!("kept"))),
        (3, (false, json!({"branch_point": b.to_string()}))),
        (4, (true, rule)),
        (5, (false, json!("last"))),
        (6, (false, json!("head"))),
    ]);
    assert_eq!(fates(&plan, "a"), expected);
    assert_eq!(
        fates(&plan, "b"),
        BTreeMap::from([(1, (false, json!("head")))])
    );
    let gone: Vec<Chunk> = [0, 3]
        .into_iter()
        .flat_map(|i| trees[i].1.clone())
        .collect();
    assert_eq!(plan["bytes_back"], bytes(&gone));
    let written: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(written, plan);

    // A plan is good for what it was made on only.
    let apply = format!("retention apply {}", file.display());
    rig.run("retention set --keep-last 9").json();
    let stale = rig.run(&apply);
    assert_eq!(stale.code, 11, "{stale:?}");
    rig.run("retention set --clear").json();
    rig.run(&make).json();
    rig.run(&format!("retention keep a {second} --release"))
        .json();
    let stale = rig.run(&apply);
    assert_eq!(stale.code, 11, "{stale:?}");
    rig.run(&format!("retention keep a {second}")).json();
    assert_eq!(client.manifests(a).await.unwrap().len(), 6);
    let again = rig.run(&make).json();
    assert_eq!(fates(&again, "a"), expected);
    let applied = rig.run(&apply).json();
    assert_eq!(
        applied,
        json!({"removed": 2, "sandboxes": 1, "changed": []})
    );
    let twice = rig.run(&apply);
    assert_eq!(twice.code, 11, "{twice:?}");
    let left = client.manifests(a).await.unwrap();
    let turns: Vec<u64> = left.iter().map(|(turn, ..)| turn.0).collect();
    assert_eq!(turns, [2, 3, 5, 6]);

    // Collection takes what was said, and no more.
    let bodies = rig.data().join("bodies");
    let (before, taken) = (rig.held(), on_disk(&bodies));
    let dry = rig.run("gc run --dry-run").json();
    assert_eq!((&dry["phase"], &dry["dry"]), (&json!("done"), &json!(true)));
    assert_eq!(
        (&dry["garbage"], &dry["garbage_bytes"], &dry["swept"]),
        (&json!(gone.len()), &plan["bytes_back"], &json!(0))
    );
    assert_eq!(rig.held(), before);
    let as_host = rig.store().cli(&rig.host, ["gc", "run"]);
    assert_eq!(as_host.code, 1, "{as_host:?}");
    let report = rig.run("gc run --grace 0s").json();
    assert_eq!(
        (&report["swept"], &report["swept_bytes"]),
        (&json!(gone.len()), &plan["bytes_back"])
    );
    let after = (
        before.0 - gone.len() as u64,
        before.1 - report["swept_bytes"].as_u64().unwrap(),
    );
    assert_eq!(rig.held(), after);
    for _ in 0..600 {
        if taken.saturating_sub(on_disk(&bodies)) >= bytes(&gone) * 9 / 10 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let back = taken.saturating_sub(on_disk(&bodies));
    assert!(back >= bytes(&gone) * 9 / 10, "{back} of {}", bytes(&gone));

    // What stays is whole, also after the process died; so is the account.
    drop(client);
    rig.restart();
    let client = rig.client().await;
    assert_eq!(rig.run("gc status").json(), report);
    assert_eq!(rig.held(), after);
    let stay = [1, 2, 4, 5].into_iter().flat_map(|i| &trees[i].1);
    for (name, _) in stay.chain(&image_chunks) {
        let body = client.get(&[*name]).await.unwrap().remove(0);
        key().open(name, &body).unwrap();
    }
    let lost = client.get(&[gone[0].0]).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_finds_damage_and_says_so_until_it_is_healed() {
    let mut rig = Rig::new();
    let client = rig.client().await;
    let chunks: Vec<Chunk> = (0..20).map(|i| chunk(&noise(i, 20_000), &[])).collect();
    upload(&client, &chunks).await;
    assert_eq!(rig.run("scrub status").json()[0]["started_ms"], 0);
    let scrub = "scrub start --wait --pace 1GiB";
    let clean = rig.run(scrub).json();
    assert_eq!(
        (&clean[0]["node"], &clean[0]["running"], &clean[0]["pace"]),
        (&json!(1), &json!(false), &json!(1 << 30))
    );
    assert_eq!(
        (&clean[0]["bodies"], &clean[0]["bytes"]),
        (&json!(chunks.len()), &json!(bytes(&chunks)))
    );
    assert_eq!(
        (&clean[0]["damaged"], &clean[0]["orphans"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(rig.run("scrub status").json(), clean);

    // Who may, and what there is.
    let as_host = rig.store().cli(&rig.host, ["scrub", "start"]);
    assert_eq!(as_host.code, 1, "{as_host:?}");
    let as_host = rig.store().cli(&rig.host, ["scrub", "status"]);
    assert_eq!(as_host.json(), clean);
    assert_eq!(rig.run("scrub status --node 7").code, 10);
    assert_eq!(rig.run("scrub start --pace 0").code, 2);

    // A bit of one body flips under the running node.
    let (name, body) = &chunks[7];
    let path = rig.data().join("bodies/00000001.seg");
    let stored = std::fs::read(&path).unwrap();
    let mut found = stored.windows(body.len());
    let at = found.position(|w| w == &body[..]).unwrap() + body.len() / 2;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[stored[at] ^ 8], at as u64).unwrap();
    let found = rig.run(scrub);
    assert_eq!(found.code, 13, "{found:?}");
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(
        (&report[0]["damaged"], &report[0]["quarantined_names"]),
        (&json!(1), &json!([name.to_string()]))
    );
    assert!(found.stderr.contains(&name.to_string()), "{found:?}");
    assert_eq!(rig.run("scrub status").code, 13);
    assert!(client.get(&[*name]).await.is_err());

    // Nothing forgets it over a restart, and an upload of the same data ends it.
    drop(client);
    rig.restart();
    let client = rig.client().await;
    assert!(client.get(&[*name]).await.is_err());
    let session = SessionId([1; 16]);
    assert_eq!(
        client.pin(session, &[*name]).await.unwrap().missing,
        [*name]
    );
    let put = client.put(session, vec![chunks[7].clone()]).await.unwrap();
    assert_eq!(put.stored, 1);
    let healed = client.get(&[*name]).await.unwrap();
    assert_eq!(healed, std::slice::from_ref(body));
    let clean = rig.run(scrub).json();
    assert_eq!(
        (&clean[0]["bodies"], &clean[0]["damaged"]),
        (&json!(chunks.len()), &json!(0))
    );
}
