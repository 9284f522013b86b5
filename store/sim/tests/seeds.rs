//! The quick set of seeds, replay, and that the checker sees what is put in on purpose.

use tidepool_store_core::bugs::Bug;
use tidepool_store_sim::{Plan, Summary, run};

fn plan(seeds: std::ops::Range<u64>, bug: Option<Bug>) -> Plan {
    Plan {
        seeds,
        nodes: None,
        steps: 10_000,
        trace: false,
        bug,
        stop: bug.is_some(),
        threads: 2,
    }
}

fn reasons(plan: &Plan) -> (Summary, Vec<String>) {
    let found = std::sync::Mutex::new(Vec::new());
    let summary = run(plan, |outcome| {
        if let Some(why) = &outcome.violation {
            found
                .lock()
                .unwrap()
                .push(format!("seed {}: {why}", outcome.seed));
        }
    });
    (summary, found.into_inner().unwrap())
}

#[test]
fn the_quick_seeds_hold() {
    let (summary, found) = reasons(&plan(0..100, None));
    assert_eq!(found, Vec::<String>::new());
    // A run in which nothing happened would prove nothing.
    for what in [
        "commits",
        "reads",
        "swept",
        "removed",
        "rounds",
        "snapshots",
    ] {
        assert!(summary.checked[what] > 20, "{what}: {summary:?}");
    }
    assert_eq!(summary.seeds, 100);
}

#[test]
fn a_seed_replays_exactly() {
    let (once, _) = reasons(&plan(40..52, None));
    let again = Plan {
        threads: 1,
        ..plan(40..52, None)
    };
    let (again, _) = reasons(&again);
    assert_eq!(
        (once.steps, &once.trace_hash),
        (again.steps, &again.trace_hash)
    );
    let (other, _) = reasons(&plan(41..53, None));
    assert_ne!(once.trace_hash, other.trace_hash);
}

/// Each within so many seeds.
#[test]
fn faults_put_in_on_purpose_are_caught() {
    for (bug, seeds) in [
        (Bug::AckBeforeFsync, 10),
        (Bug::AppendBeforeBodies, 10),
        (Bug::NoFence, 30),
        (Bug::ApplyReadsClock, 10),
        (Bug::ForgetTruncation, 60),
        (Bug::StaleRead, 40),
        (Bug::InstallBeforeBodies, 30),
        (Bug::SweepNamed, 100),
    ] {
        let (summary, found) = reasons(&plan(0..seeds, Some(bug)));
        assert!(!found.is_empty(), "{bug:?} was not seen in {summary:?}");
    }
}
