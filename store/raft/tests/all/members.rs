//! Replicas that come, go and come back, and fetches whose purpose went away meanwhile.

use crate::common::Cluster;
use tidepool_store_raft::{Action, LogBounds};

const GROUP: u32 = 1;

fn voters(c: &Cluster, node: u64) -> Vec<u64> {
    let mut voters = c.nodes[&node].status(GROUP).unwrap().conf.voters;
    voters.sort_unstable();
    voters
}

#[test]
fn a_replica_that_was_deleted_and_is_made_again_begins_at_nothing() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[4]);
    c.target(GROUP, &[1, 2, 3], &[]);
    c.elect(GROUP, None);
    for number in 1..=10 {
        let leader = c.leader(GROUP).unwrap();
        c.add(leader, GROUP, number);
        c.settle();
    }
    c.target(GROUP, &[1, 2, 4], &[]);
    c.ticks(300);
    assert!(c.nodes[&3].status(GROUP).is_none());
    assert_eq!(voters(&c, 1), [1, 2, 4]);
    // What it remembers is its vote, not how far it was.
    c.target(GROUP, &[1, 2, 3], &[]);
    c.ticks(300);
    assert_eq!(voters(&c, 3), [1, 2, 3]);
    assert_eq!(c.rows(3, GROUP), c.rows(1, GROUP));
    assert!(c.nodes[&4].status(GROUP).is_none());
}

#[test]
fn members_that_were_removed_behind_their_backs_find_out() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[4, 5]);
    c.target(GROUP, &[2, 1, 3], &[]);
    c.elect(GROUP, None);
    c.ticks(60);
    assert_eq!(c.leader(GROUP), Some(2));
    c.part(&[3]);
    c.target(GROUP, &[2, 4, 5], &[]);
    for _ in 0..300 {
        c.ticks(1);
        if voters(&c, 2) == [2, 4, 5] {
            break;
        }
    }
    c.cut.clear();
    c.part(&[1, 3]);
    c.ticks(100);
    assert_eq!(voters(&c, 2), [2, 4, 5]);
    for node in [1, 3] {
        assert!(c.nodes[&node].status(GROUP).is_some(), "node {node}");
    }
    c.cut.clear();
    c.ticks(150);
    for node in [1, 3] {
        assert!(c.nodes[&node].status(GROUP).is_none(), "node {node}");
    }
}

#[test]
fn the_answer_to_a_fetch_that_nobody_waits_for_changes_nothing() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3, 4, 5], &[]);
    for node in c.nodes.values_mut() {
        node.set_log_bounds(LogBounds {
            keep: 2,
            cut_at: 10,
        });
    }
    let first = c.elect(GROUP, None);
    // The first to stand for election when the leader is gone must not be it.
    let late = (1..=5).rev().find(|n| *n != first).unwrap();
    c.part(&[late]);
    for number in 1..=30 {
        c.add(first, GROUP, number);
        c.settle();
    }
    // The first page of one leader's snapshot is on its way when another announces its own.
    c.held = Some(Vec::new());
    c.cut.clear();
    c.ticks(10);
    let is_page =
        |(node, a): &(u64, Action)| *node == late && matches!(a, Action::FetchPage { .. });
    let pages = |c: &Cluster| c.held.iter().flatten().filter(|h| is_page(h)).count();
    assert_eq!(pages(&c), 1);
    c.part(&[first]);
    let second = c.elect(GROUP, Some(first));
    c.ticks(10);
    assert_ne!(second, late);
    assert_eq!(pages(&c), 2, "{:?}", c.held);
    let old = c.held.iter().flatten().position(is_page).unwrap();
    // It fails, and that is no reason to ask a second time for what is on its way.
    c.release(old);
    c.ticks(15);
    assert_eq!(pages(&c), 1, "{:?}", c.held);
    c.cut.clear();
    while !c.held.as_ref().unwrap().is_empty() {
        c.release(0);
    }
    c.held = None;
    c.ticks(50);
    assert_eq!(c.rows(late, GROUP), c.rows(second, GROUP));
}
