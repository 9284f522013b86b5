//! The store as a cluster of real processes on hosts of their own: whatever single thing fails, what was acknowledged is there.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tidepool_cluster_tests::cluster::{TestCluster, settled};
use tidepool_cluster_tests::load::{Load, put_much};
use tidepool_proto::cluster::NodeState;
use tidepool_store_client::Client;

const SHARDS: u32 = 4;

/// Random numbers from a seed that is printed, so that a run can be made again (as far as real time allows).
struct Dice(u64);

impl Dice {
    fn new(what: &str) -> Self {
        let given = std::env::var("TIDEPOOL_SEED").ok();
        let seed = given.and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |d| d.as_nanos() as u64)
        });
        eprintln!("{what}: TIDEPOOL_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// One cluster at a time: several at once on a small machine have no leaders for want of time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// How many rounds of faults: a few in each run of all tests, many in a long one.
fn rounds() -> u64 {
    let set = std::env::var("TIDEPOOL_ROUNDS").ok();
    let long = std::env::var_os("TIDEPOOL_LONG").is_some();
    set.and_then(|s| s.parse().ok())
        .unwrap_or(if long { 100 } else { 10 })
}

/// One fault, and its end.
fn fault(cluster: &mut TestCluster, dice: &mut Dice, nodes: u64) -> String {
    let n = dice.below(nodes) + 1;
    let other = (n + dice.below(nodes - 1)) % nodes + 1;
    let ms = 500 + dice.below(2500);
    match dice.below(7) {
        0 => {
            cluster.kill(n);
            pause(ms);
            cluster.start(n);
            format!("node {n} killed for {ms} ms")
        }
        1 => {
            cluster.kill(n);
            cluster.start(n);
            format!("node {n} killed and started at once")
        }
        2 => {
            cluster.stop(n);
            pause(ms);
            cluster.go_on(n);
            format!("node {n} stopped for {ms} ms")
        }
        3 => {
            cluster.isolate(n);
            pause(ms);
            cluster.heal();
            format!("node {n} cut off for {ms} ms")
        }
        4 => {
            cluster.cut(n, other);
            pause(ms);
            cluster.heal();
            format!("nothing from node {n} to {other} for {ms} ms")
        }
        5 => {
            cluster.lose(n, 30);
            pause(ms);
            cluster.heal();
            format!("30 % of what is sent to node {n} lost for {ms} ms")
        }
        _ => {
            cluster.terminate(n);
            cluster.start(n);
            format!("node {n} ended and started")
        }
    }
}

#[test]
fn what_was_acknowledged_survives_rounds_of_random_faults() {
    let _one = alone();
    let mut dice = Dice::new("faults");
    let mut cluster = TestCluster::new(3, SHARDS);
    cluster.join(2);
    cluster.join(3);
    let runtime = cluster.client_runtime();
    let cfg = cluster.client_config("host");
    let chief = cluster.client_config("operator");
    let at_rest = |chief: tidepool_store_client::ClientConfig| async move {
        let client = Client::connect(chief).await.unwrap();
        settled(&client, &[1, 2, 3], SHARDS, 3).await;
    };
    runtime
        .block_on(runtime.spawn(at_rest(chief.clone())))
        .unwrap();
    let loading = {
        let cfg = cfg.clone();
        runtime.spawn(async move { Load::start(&cfg, 3).await })
    };
    let load = runtime.block_on(loading).unwrap();
    for round in 1..=rounds() {
        let what = fault(&mut cluster, &mut dice, 3);
        assert!(!load.failed(), "round {round}: {what}");
        for n in 1..=3 {
            assert!(
                !cluster.has_ended(n),
                "round {round}: {what}: node {n} ended"
            );
        }
        pause(dice.below(1500));
        let (turns, reads) = load.counts();
        eprintln!("round {round}: {what}; {turns} turns, {reads} read back");
    }
    let end = runtime.spawn(async move {
        let truth = load.end().await;
        let client = Client::connect(chief).await.unwrap();
        settled(&client, &[1, 2, 3], SHARDS, 3).await;
        truth
    });
    let truth = runtime.block_on(end).unwrap();
    assert!(truth.turns() > 0);
    // Every replica by itself has all of it: each pair of nodes must be able to do without the third.
    let truth = std::sync::Arc::new(truth);
    for dead in 1..=3 {
        cluster.kill(dead);
        let (truth, cfg) = (truth.clone(), cfg.clone());
        let check = runtime.spawn(async move {
            let client = Client::connect(cfg).await.unwrap();
            truth.demand(&client).await;
        });
        runtime.block_on(check).unwrap();
        cluster.start(dead);
        let rest = runtime.spawn(at_rest(cluster.client_config("operator")));
        runtime.block_on(rest).unwrap();
    }
    eprintln!("{} turns", truth.turns());
}

#[test]
fn any_two_of_five_nodes_are_lost_for_good_and_replaced_under_load() {
    let _one = alone();
    let mut dice = Dice::new("losses");
    let mut cluster = TestCluster::new(7, SHARDS);
    for n in 2..=5 {
        cluster.join(n);
    }
    let runtime = cluster.client_runtime();
    let cfg = cluster.client_config("host");
    let wait = |cluster: &TestCluster, nodes: Vec<u64>| {
        let chief = cluster.client_config("operator");
        runtime
            .block_on(runtime.spawn(async move {
                let client = Client::connect(chief).await.unwrap();
                settled(&client, &nodes, SHARDS, 3).await;
            }))
            .unwrap();
    };
    wait(&cluster, (1..=5).collect());
    let loading = {
        let cfg = cfg.clone();
        runtime.spawn(async move { Load::start(&cfg, 2).await })
    };
    let load = runtime.block_on(loading).unwrap();
    pause(2000);
    // One after the other, as each shard has three replicas; the second while the first is being replaced would be one too many.
    let mut alive: Vec<u64> = (1..=5).collect();
    for new in [6, 7] {
        let dead = alive.remove(dice.below(alive.len() as u64) as usize);
        cluster.kill(dead);
        pause(1000);
        cluster.join(new);
        alive.push(new);
        let chief = cluster.client_config("operator");
        let remove = runtime.spawn(async move {
            let client = Client::connect(chief).await.unwrap();
            client
                .change_node(dead, NodeState::Removed, true)
                .await
                .unwrap();
        });
        runtime.block_on(remove).unwrap();
        wait(&cluster, alive.clone());
        assert!(!load.failed());
        eprintln!("node {dead} replaced by {new}: {:?}", load.counts());
    }
    let check = runtime.spawn(async move {
        let truth = load.end().await;
        let client = Client::connect(cfg).await.unwrap();
        truth.demand(&client).await;
        truth.turns()
    });
    let turns = runtime.block_on(check).unwrap();
    assert!(turns > 0);
    eprintln!("{turns} turns");
}

/// Waits on the client's host until the cluster is at rest.
fn wait_for_rest(cluster: &TestCluster, runtime: &tokio::runtime::Runtime, nodes: &[u64]) {
    let (chief, nodes) = (cluster.client_config("operator"), nodes.to_vec());
    let rest = runtime.spawn(async move {
        let client = Client::connect(chief).await.unwrap();
        settled(&client, &nodes, SHARDS, 3).await;
    });
    runtime.block_on(rest).unwrap();
}

/// Waits until a load has made this much progress.
fn wait_for_turns(load: &Load, more: u64) {
    let (from, began) = (load.counts().0, std::time::Instant::now());
    while load.counts().0 < from + more {
        assert!(!load.failed());
        assert!(began.elapsed() < Duration::from_secs(120), "no progress");
        pause(50);
    }
}

#[test]
fn a_node_with_a_damaged_database_says_so_and_is_replaced_under_load() {
    let _one = alone();
    let mut cluster = TestCluster::new(4, SHARDS);
    cluster.join(2);
    cluster.join(3);
    let runtime = cluster.client_runtime();
    wait_for_rest(&cluster, &runtime, &[1, 2, 3]);
    let cfg = cluster.client_config("host");
    let loading = runtime.spawn(async move { Load::start(&cfg, 2).await });
    let load = runtime.block_on(loading).unwrap();
    wait_for_turns(&load, 20);
    // Ended in peace, so that its tables are on disk; then each has bytes of another kind in its middle.
    cluster.terminate(2);
    let mut tables = 0;
    for entry in std::fs::read_dir(cluster.data(2).join("db")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "sst") {
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 4;
            bytes[..middle * 3].iter_mut().for_each(|b| *b ^= 0x55);
            std::fs::write(&path, bytes).unwrap();
            tables += 1;
        }
    }
    assert!(tables > 0);
    let said = cluster.start_in_vain(2);
    assert!(said.to_lowercase().contains("corrupt"), "{said}");
    wait_for_turns(&load, 5);
    cluster.join(4);
    let chief = cluster.client_config("operator");
    let remove = runtime.spawn(async move {
        let client = Client::connect(chief).await.unwrap();
        client
            .change_node(2, NodeState::Removed, true)
            .await
            .unwrap();
    });
    runtime.block_on(remove).unwrap();
    wait_for_rest(&cluster, &runtime, &[1, 3, 4]);
    let cfg = cluster.client_config("host");
    let truth = runtime.block_on(runtime.spawn(load.end())).unwrap();
    cluster.kill(1);
    let check = runtime.spawn(async move {
        let client = Client::connect(cfg).await.unwrap();
        truth.demand(&client).await;
    });
    runtime.block_on(check).unwrap();
}

#[test]
fn a_full_disk_of_one_node_holds_nobody_up_and_it_catches_up() {
    let _one = alone();
    let mut cluster = TestCluster::new(3, SHARDS);
    cluster.give_disk(3, 256);
    cluster.join(2);
    cluster.join(3);
    let runtime = cluster.client_runtime();
    wait_for_rest(&cluster, &runtime, &[1, 2, 3]);
    let cfg = cluster.client_config("host");
    let loading = runtime.spawn(async move { Load::start(&cfg, 2).await });
    let load = runtime.block_on(loading).unwrap();
    wait_for_turns(&load, 5);
    // All that is left of the disk.
    let ballast = cluster.data(3).join("ballast");
    let filled = std::process::Command::new("dd")
        .args(["if=/dev/zero", "bs=1M"])
        .arg(format!("of={}", ballast.display()))
        .output()
        .unwrap();
    assert!(!filled.status.success(), "the disk has no end: {filled:?}");
    wait_for_turns(&load, 100);
    assert!(!cluster.has_ended(3), "a full disk ended the node");
    std::fs::remove_file(&ballast).unwrap();
    let cfg = cluster.client_config("host");
    let truth = runtime.block_on(runtime.spawn(load.end())).unwrap();
    wait_for_rest(&cluster, &runtime, &[1, 2, 3]);
    // It has everything: another one is not needed.
    cluster.kill(1);
    let check = runtime.spawn(async move {
        let client = Client::connect(cfg).await.unwrap();
        truth.demand(&client).await;
    });
    runtime.block_on(check).unwrap();
}

/// How many nodes are killed where it is measured what that costs those who wait.
const KILLS: u64 = 10;

const WAITS: [&str; 4] = [
    "turn after a kill",
    "reading back after a kill",
    "turn after a start",
    "reading back after a start",
];

/// Waits until every writer of a load has made this much progress.
fn wait_for_each(load: &Load, more: u64) {
    let (from, began) = (load.each(), std::time::Instant::now());
    while load.each().iter().zip(&from).any(|(n, f)| *n < f + more) {
        assert!(!load.failed());
        assert!(began.elapsed() < Duration::from_secs(120), "no progress");
        pause(50);
    }
}

#[test]
fn nobody_waits_for_ever_when_a_leader_is_killed() {
    let _one = alone();
    let mut cluster = TestCluster::new(3, SHARDS);
    cluster.join(2);
    cluster.join(3);
    let runtime = cluster.client_runtime();
    wait_for_rest(&cluster, &runtime, &[1, 2, 3]);
    let cfg = cluster.client_config("host");
    let loading = runtime.spawn(async move { Load::start(&cfg, 4).await });
    let load = runtime.block_on(loading).unwrap();
    wait_for_turns(&load, 20);
    let mut stalls: [Vec<Duration>; 4] = Default::default();
    for round in 0..KILLS {
        let n = round % 3 + 1;
        load.longest();
        // At rest most of them lead some of the groups.
        cluster.kill(n);
        pause(4000);
        wait_for_each(&load, 3);
        let longest = load.longest();
        eprintln!(
            "node {n} killed: longest turn {:?}, reading back {:?}",
            longest[0], longest[1]
        );
        cluster.start(n);
        wait_for_rest(&cluster, &runtime, &[1, 2, 3]);
        wait_for_each(&load, 3);
        let back = load.longest();
        eprintln!(
            "node {n} is back: longest turn {:?}, reading back {:?}",
            back[0], back[1]
        );
        for (all, one) in stalls.iter_mut().zip(longest.into_iter().chain(back)) {
            all.push(one);
        }
    }
    for (what, mut all) in WAITS.into_iter().zip(stalls) {
        all.sort_unstable();
        let middle = all[all.len() / 2];
        eprintln!("longest {what}: median {middle:?}, all {all:?}");
    }
    let cfg = cluster.client_config("host");
    let truth = runtime.block_on(runtime.spawn(load.end())).unwrap();
    let check = runtime.spawn(async move {
        let client = Client::connect(cfg).await.unwrap();
        truth.demand(&client).await;
    });
    runtime.block_on(check).unwrap();
}

#[test]
fn what_is_slow_to_arrive_is_not_given_up() {
    let _one = alone();
    let mut cluster = TestCluster::new(3, SHARDS);
    cluster.join(2);
    cluster.join(3);
    let runtime = cluster.client_runtime();
    wait_for_rest(&cluster, &runtime, &[1, 2, 3]);
    // A put of 4 MiB is one request for each node that leads, which takes far longer than any bound on an answer.
    cluster.slow_client(2400);
    let mut cfg = cluster.client_config("host");
    cfg.deadline = Duration::from_secs(180);
    let put = runtime.spawn(async move {
        let client = Client::connect(cfg).await.unwrap();
        let began = std::time::Instant::now();
        put_much(&client, 64).await;
        eprintln!("4 MiB took {:?}", began.elapsed());
    });
    runtime.block_on(put).unwrap();
}
