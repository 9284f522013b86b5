//! The core of several nodes over disks in memory: elections, parked appends, raft snapshots, changes of members, full disks, crashes.

use crate::common::{Cluster, add_chunk, chunk, collect, sweep};
use tidepool_store_core::keys;
use tidepool_store_raft::Rejection;

const GROUP: u32 = 1;

fn has(cluster: &Cluster, node: u64, number: u8) -> bool {
    cluster
        .rows(node, GROUP)
        .contains_key(&keys::chunk(&chunk(number)))
}

#[test]
fn a_chunk_is_acknowledged_when_a_quorum_has_entry_and_body() {
    let mut c = Cluster::new(&[0, GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    let token = c.add(leader, GROUP, 7);
    c.settle();
    assert!(c.answers[&token].is_ok(), "{:?}", c.answers[&token]);
    c.ticks(3);
    for node in [1, 2, 3] {
        assert!(has(&c, node, 7));
        assert!(
            c.nodes[&node].disk().bodies.contains(&chunk(7)),
            "node {node}"
        );
    }
    assert_eq!(c.fetched.1, 2);
    // Others say who leads.
    let other = (1..=3).find(|n| *n != leader).unwrap();
    let token = c.propose(other, GROUP, add_chunk(8));
    let read = c.read(other, GROUP);
    c.settle();
    let elsewhere = Rejection::NotLeader {
        group: GROUP,
        leader: Some(leader),
    };
    assert_eq!(c.answers[&token], Err(elsewhere.clone()));
    assert_eq!(c.reads[&read], Err(elsewhere));
}

#[test]
fn an_append_waits_until_its_bodies_are_there() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    // The entry without the body, anywhere: no follower may acknowledge it.
    let token = c.propose(leader, GROUP, add_chunk(9));
    let read = c.read(leader, GROUP);
    c.ticks(5);
    assert!(!c.answers.contains_key(&token));
    c.nodes
        .get_mut(&leader)
        .unwrap()
        .disk_mut()
        .bodies
        .insert(chunk(9));
    c.ticks(10);
    assert!(c.answers[&token].is_ok());
    assert!(c.reads[&read].is_ok());
    assert!(
        c.nodes
            .values()
            .all(|n| n.disk().bodies.contains(&chunk(9)))
    );
}

#[test]
fn bodies_that_a_dead_leader_owes_hold_the_next_one_up_no_longer() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let first = c.elect(GROUP, None);
    c.hangs = Some(first);
    let owed = c.add(first, GROUP, 7);
    c.settle();
    assert!(!c.answers.contains_key(&owed));
    for other in (1..=3).filter(|n| *n != first) {
        c.cut.insert((first, other));
        c.cut.insert((other, first));
    }
    let second = c.elect(GROUP, Some(first));
    let token = c.add(second, GROUP, 8);
    c.ticks(5);
    assert!(c.answers[&token].is_ok(), "{:?}", c.answers[&token]);
    c.cut.clear();
    c.hangs = None;
    c.ticks(50);
    assert!((1..=3).all(|n| has(&c, n, 8) && !has(&c, n, 7)));
}

#[test]
fn what_was_acknowledged_survives_the_death_of_its_leader_and_crashes() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let first = c.elect(GROUP, None);
    for number in 1..=20 {
        let token = c.add(first, GROUP, number);
        c.settle();
        assert!(c.answers[&token].is_ok());
    }
    let others: Vec<u64> = (1..=3).filter(|n| *n != first).collect();
    for other in &others {
        c.cut.insert((first, *other));
        c.cut.insert((*other, first));
    }
    let lost = c.add(first, GROUP, 99);
    let stale = c.read(first, GROUP);
    let second = c.elect(GROUP, Some(first));
    for number in 1..=20 {
        assert!(has(&c, second, number));
    }
    // The old leader can neither decide nor read.
    assert!(!matches!(c.answers.get(&lost), Some(Ok(_))));
    assert!(!matches!(c.reads.get(&stale), Some(Ok(()))));
    c.crash(second);
    c.cut.clear();
    c.ticks(50);
    let third = c.elect(GROUP, None);
    let token = c.add(third, GROUP, 50);
    c.ticks(30);
    assert!(c.answers[&token].is_ok());
    let rows = c.rows(third, GROUP);
    assert!((1..=20).all(|n| has(&c, third, n)));
    for node in 1..=3 {
        assert_eq!(c.rows(node, GROUP), rows, "node {node}");
    }
}

#[test]
fn a_group_grows_from_one_node_to_three_and_moves_away() {
    let mut c = Cluster::new(&[GROUP], &[1], &[2, 3, 4]);
    c.elect(GROUP, None);
    for number in 1..=30 {
        c.add(1, GROUP, number);
        c.settle();
    }
    c.target(GROUP, &[1, 2, 3], &[]);
    c.ticks(200);
    let status = c.nodes[&1].status(GROUP).unwrap();
    let mut voters = status.conf.voters.clone();
    voters.sort_unstable();
    assert_eq!(voters, [1, 2, 3]);
    assert!(status.conf.voters_outgoing.is_empty() && status.conf.learners.is_empty());
    assert!(status.leads);
    for node in [2, 3] {
        assert_eq!(c.rows(node, GROUP), c.rows(1, GROUP));
        assert!((1..=30).all(|n| c.nodes[&node].disk().bodies.contains(&chunk(n))));
    }
    // Its first member leaves, although it leads, and deletes what it had.
    c.target(GROUP, &[4, 2, 3], &[]);
    c.ticks(400);
    assert_eq!(c.leader(GROUP), Some(4));
    let mut voters = c.nodes[&4].status(GROUP).unwrap().conf.voters;
    voters.sort_unstable();
    assert_eq!(voters, [2, 3, 4]);
    assert!(
        c.nodes[&1].status(GROUP).is_none(),
        "the old replica is still there"
    );
    assert!(c.rows(1, GROUP).is_empty());
    assert!((1..=30).all(|n| has(&c, 4, n)));
}

#[test]
fn a_member_behind_a_cut_log_gets_a_raft_snapshot_in_pages() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    let late = (1..=3).find(|n| *n != leader).unwrap();
    for other in 1..=3 {
        c.cut.insert((late, other));
        c.cut.insert((other, late));
    }
    // More entries than a log keeps.
    for i in 0..5000u32 {
        c.add(leader, GROUP, (i % 40) as u8);
        if i % 50 == 0 {
            c.settle();
        }
    }
    c.settle();
    assert!(c.nodes[&leader].status(GROUP).unwrap().log_entries < 4200);
    c.cut.clear();
    c.fetched = (0, 0);
    c.ticks(150);
    assert!(c.fetched.0 > 5, "{} pages", c.fetched.0);
    assert_eq!(c.rows(late, GROUP), c.rows(leader, GROUP));
    assert!((0..40).all(|n| c.nodes[&late].disk().bodies.contains(&chunk(n))));
    // It is a member like any other afterwards, also after a crash.
    c.crash(late);
    let token = c.add(leader, GROUP, 77);
    c.ticks(20);
    assert!(c.answers[&token].is_ok());
    assert!(has(&c, late, 77));
}

#[test]
fn a_full_disk_refuses_writes_answers_reads_and_goes_on() {
    let mut c = Cluster::new(&[GROUP], &[1], &[]);
    c.elect(GROUP, None);
    c.nodes.get_mut(&1).unwrap().disk_mut().full = true;
    let caught = c.add(1, GROUP, 1);
    c.settle();
    assert!(c.nodes[&1].stalled());
    let refused = c.add(1, GROUP, 2);
    let read = c.read(1, GROUP);
    c.ticks(3);
    assert_eq!(c.answers[&refused], Err(Rejection::Full));
    assert_eq!(c.reads[&read], Ok(()));
    assert!(!c.answers.contains_key(&caught));
    c.nodes.get_mut(&1).unwrap().disk_mut().full = false;
    c.settle();
    assert!(c.answers[&caught].is_ok());
    assert!(has(&c, 1, 1) && !has(&c, 1, 2));
}

#[test]
fn swept_bodies_go_on_every_replica_unless_a_later_entry_brings_them() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    for number in [1, 2] {
        c.add(leader, GROUP, number);
    }
    c.settle();
    for command in collect(2) {
        let token = c.propose(leader, GROUP, command);
        c.settle();
        assert!(c.answers[&token].is_ok(), "{:?}", c.answers[&token]);
    }
    let sweeps = [1, 2].map(|number| c.propose(leader, GROUP, sweep(2, number)));
    // In the log behind the sweep, before that is applied.
    let again = c.add(leader, GROUP, 2);
    c.ticks(5);
    assert!(c.answers[&again].is_ok());
    for token in sweeps {
        assert!(c.answers[&token].is_ok(), "{:?}", c.answers[&token]);
    }
    for node in 1..=3 {
        assert!(!has(&c, node, 1) && has(&c, node, 2), "node {node}");
        let bodies = &c.nodes[&node].disk().bodies;
        assert!(
            !bodies.contains(&chunk(1)) && bodies.contains(&chunk(2)),
            "node {node}"
        );
    }
}
