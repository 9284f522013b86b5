//! SIGKILL to the daemon at random moments of capture, upload, commit and restore; after every death the work goes on, and at the end
//! every checkpoint that was ever committed restores to its digest.
//!
//! The seed is printed; `TIDEPOOL_CRASH_SEED` replays the choices (not the machine's timing).

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tidepool_cluster_tests::TestHost;

const ROUNDS: u64 = 50;

/// SplitMix64: enough to choose with.
struct Choice(u64);

impl Choice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn rounds() -> u64 {
    let long = std::env::var_os("TIDEPOOL_LONG").is_some();
    if long { 6 * ROUNDS } else { ROUNDS }
}

#[test]
fn every_committed_checkpoint_survives_any_death_of_the_daemon() {
    let seed = std::env::var("TIDEPOOL_CRASH_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("TIDEPOOL_CRASH_SEED={seed}");
    let mut choice = Choice(seed);
    let mut host = TestHost::new();
    host.create("a");
    let (mut acknowledged, mut cut) = (0, 0);
    for round in 0..rounds() {
        let key = format!("r{round}");
        let kind = choice.below(10);
        let script = match kind {
            // Files; the log tells how often each round ran.
            0..=5 => format!(
                "echo {round} >> /root/log; seq {} > /root/data-{}",
                choice.below(50_000),
                choice.below(8)
            ),
            // A process that stays, so that a dump is under way when death comes.
            6 | 7 => format!(
                "echo {round} >> /root/log; kill $(cat /root/pid) 2>/dev/null; setsid python3 -c 'memory = bytearray(8 << 20); import time; time.sleep(1e6)' >/dev/null 2>&1 & echo $! > /root/pid"
            ),
            // Nothing but a restore.
            _ => String::new(),
        };
        let args: Vec<&str> = match script.as_str() {
            "" => vec!["restore", "--force", "a"],
            script => vec!["exec", "a", "--key", &key, "--", "sh", "-c", script],
        };
        let child = host
            .command(&args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command line starts");
        std::thread::sleep(Duration::from_millis(choice.below(700)));
        host.kill();
        let said = child.wait_with_output().expect("it ends");
        host.start();
        if said.status.success() {
            acknowledged += 1;
        } else {
            cut += 1;
        }
        if host.cli(["sandbox", "show", "a"]).json()["state"] == "dead" {
            host.cli(["restore", "a"]).json();
        }
        // Asking again with the same key is always right.
        if !script.is_empty() {
            let again = host.cli(&args);
            assert_eq!(again.code, 0, "round {round}: {again:?}\n{}", host.log());
            let turn: Value = serde_json::from_str(&again.stdout).expect("JSON");
            if said.status.success() {
                assert_eq!(
                    turn["replayed"], true,
                    "round {round}: an acknowledged turn was lost"
                );
            }
        }
    }
    println!("{acknowledged} requests were answered before the daemon died, {cut} were cut off");

    let log = host.exec("a", "sort /root/log | uniq -d | head -3; wc -l < /root/log");
    println!("log: {log}");
    let out = log["stdout_base64"].as_str().expect("output");
    assert!(!out.is_empty());

    // Every committed checkpoint restores to its digest, whenever it was committed.
    let checkpoints = host.cli(["checkpoint", "list", "a"]).json();
    let checkpoints = checkpoints.as_array().expect("a list");
    assert!(
        checkpoints.len() > rounds() as usize / 4,
        "{} checkpoints",
        checkpoints.len()
    );
    for (n, checkpoint) in checkpoints.iter().enumerate() {
        let id = checkpoint["id"].as_str().expect("an id");
        let name = format!("v{n}");
        let forked = host.cli(["fork", "a", &name, "--checkpoint", id]);
        assert_eq!(
            forked.code,
            0,
            "checkpoint {id}: {forked:?}\n{}",
            host.log()
        );
        assert_eq!(forked.json()["verified"], true);
        // What it holds is of its own turn: no line stands twice in the log of any state.
        let twice = host.exec(&name, "test ! -e /root/log || sort /root/log | uniq -d");
        assert_eq!(
            twice["stdout_base64"], "",
            "checkpoint {id}: a round ran twice: {twice}"
        );
        host.cli(["sandbox", "rm", "--forget", &name]).json();
    }
    println!("{} checkpoints restored and verified", checkpoints.len());
}
