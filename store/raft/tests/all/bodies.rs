//! Where bodies come from when the sender of what names them has not got them, and what is kept while they are waited for.

use crate::common::{Ask, Cluster, add_chunk, add_chunks, chunk, collect, sweep};
use tidepool_store_core::keys;
use tidepool_store_raft::{Action, LogBounds};

const GROUP: u32 = 1;

fn has(cluster: &Cluster, node: u64, number: u8) -> (bool, bool) {
    let row = cluster.rows(node, GROUP);
    let bodies = &cluster.nodes[&node].disk().bodies;
    (
        row.contains_key(&keys::chunk(&chunk(number))),
        bodies.contains(&chunk(number)),
    )
}

fn forget(cluster: &mut Cluster, node: u64, number: u8) {
    let disk = cluster.nodes.get_mut(&node).unwrap().disk_mut();
    assert!(disk.bodies.remove(&chunk(number)));
}

/// Three members, led by the first of what is given, the last behind: nothing reaches it.
fn one_behind() -> (Cluster, [u64; 3]) {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    let others: Vec<u64> = (1..=3).filter(|n| *n != leader).collect();
    c.part(&[others[1]]);
    (c, [leader, others[0], others[1]])
}

fn done(c: &mut Cluster, token: u64) {
    c.settle();
    assert!(c.answers[&token].is_ok(), "{:?}", c.answers[&token]);
}

fn short_logs(c: &mut Cluster) {
    for node in c.nodes.values_mut() {
        node.set_log_bounds(LogBounds {
            keep: 2,
            cut_at: 10,
        });
    }
}

#[test]
fn what_its_sender_has_not_got_comes_from_another_member() {
    let (mut c, [leader, other, behind]) = one_behind();
    for number in 1..=4 {
        let token = c.add(leader, GROUP, number);
        done(&mut c, token);
    }
    forget(&mut c, leader, 3);
    c.cut.clear();
    c.ticks(100);
    for number in 1..=4 {
        assert_eq!(has(&c, behind, number), (true, true), "chunk {number}");
    }
    let asked: Vec<u64> = (c.asked.iter())
        .filter(|a| a.node == behind && a.names.contains(&chunk(3)))
        .map(|a| a.from)
        .collect();
    assert_eq!(asked.first(), Some(&leader));
    assert_eq!(asked.last(), Some(&other));
}

#[test]
fn what_the_sender_of_a_raft_snapshot_has_not_got_comes_from_another_member() {
    let (mut c, [leader, other, behind]) = one_behind();
    short_logs(&mut c);
    for number in 1..=30 {
        let token = c.add(leader, GROUP, number);
        done(&mut c, token);
    }
    forget(&mut c, leader, 3);
    c.cut.clear();
    c.fetched = (0, 0);
    c.ticks(100);
    assert!(c.fetched.0 > 0, "no page was fetched");
    assert!((1..=30).all(|n| has(&c, behind, n) == (true, true)));
    let of = |a: &Ask| a.node == behind && a.from == other && a.names == [chunk(3)];
    assert!(c.asked.iter().any(of), "{:?}", c.asked);
}

/// Nobody may say of a body that it was collected who has not applied the entry that brings it: it may not be in anybody's state yet.
#[test]
fn a_body_is_not_gone_before_its_entry_is_applied() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    let commit = c.nodes[&leader].status(GROUP).unwrap().commit;
    let token = c.propose(leader, GROUP, add_chunk(9));
    c.ticks(20);
    assert!(!c.answers.contains_key(&token));
    assert!(c.asked.len() > 2);
    // All members were asked.
    for from in 1..=3 {
        assert!(c.asked.iter().any(|a| a.from == from), "{:?}", c.asked);
    }
    assert!(c.asked.iter().all(|a| a.index > commit));
    for node in 1..=3 {
        assert_eq!(has(&c, node, 9), (false, false), "node {node}");
    }
}

/// The leader has not applied the end of what it sends, and cannot without this member: what was collected must still be told.
#[test]
fn a_body_that_was_collected_holds_nobody_up() {
    let (mut c, [leader, other, behind]) = one_behind();
    for number in [1, 2] {
        let token = c.add(leader, GROUP, number);
        done(&mut c, token);
    }
    let round = collect(2).into_iter().chain([sweep(2, 1)]);
    for command in round {
        let token = c.propose(leader, GROUP, command);
        done(&mut c, token);
    }
    assert_eq!(has(&c, leader, 1), (false, false));
    c.cut.clear();
    c.part(&[other]);
    let token = c.add(leader, GROUP, 3);
    c.ticks(60);
    assert!(c.answers[&token].is_ok());
    let here = [1, 2, 3].map(|n| has(&c, behind, n));
    assert_eq!(here, [(false, false), (true, true), (true, true)]);
}

/// Bodies that were found once are looked for again before the append is taken, and are not swept while others are fetched.
#[test]
fn what_an_append_found_stays_while_it_waits_for_the_rest() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3, 4, 5], &[]);
    let leader = c.elect(GROUP, None);
    let token = c.add(leader, GROUP, 1);
    done(&mut c, token);
    for command in collect(2) {
        let token = c.propose(leader, GROUP, command);
        done(&mut c, token);
    }
    c.ticks(3);
    // One follower has the sweep in its log, and the leader knows; it is not committed yet when the next append brings what it takes, and more.
    let slow = (1..=5).find(|n| *n != leader).unwrap();
    c.part(&[leader, slow]);
    let swept = c.propose(leader, GROUP, sweep(2, 1));
    c.settle();
    c.held = Some(Vec::new());
    let disk = c.nodes.get_mut(&leader).unwrap().disk_mut();
    disk.bodies.extend([chunk(1), chunk(2)]);
    let again = c.propose(leader, GROUP, add_chunks(&[1, 2]));
    c.settle();
    assert_eq!(c.held.as_ref().unwrap().len(), 1);
    // All others get all of it, so that this one hears of the sweep while it still waits. It is not heard, else the append would come again.
    c.cut.clear();
    c.cut.insert((slow, leader));
    for _ in 0..10 {
        c.ticks(1);
        let others = |held: &(u64, Action)| held.0 != slow;
        while let Some(at) = c.held.as_ref().unwrap().iter().position(others) {
            c.release(at);
        }
    }
    assert!(c.answers[&swept].is_ok() && c.answers[&again].is_ok());
    assert_eq!(has(&c, slow, 1), (false, true), "the sweep is applied");
    while !c.held.as_ref().unwrap().is_empty() {
        c.release(0);
    }
    c.held = None;
    c.cut.clear();
    c.ticks(10);
    for node in 1..=5 {
        for number in [1, 2] {
            assert_eq!(has(&c, node, number), (true, true), "node {node}");
        }
    }
}

/// Otherwise it would ask as fast as the network can, and [`Cluster::settle`] would not come to rest.
#[test]
fn a_fetch_that_brings_nothing_is_not_repeated_at_once() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 3], &[]);
    let leader = c.elect(GROUP, None);
    c.propose(leader, GROUP, add_chunk(9));
    c.settle();
    let asks = c.asked.len();
    assert!((1..=2).contains(&asks), "{asks} asks");
}

/// The same for raft snapshots.
#[test]
fn a_raft_snapshot_whose_bodies_are_nowhere_waits() {
    let (mut c, [leader, other, behind]) = one_behind();
    short_logs(&mut c);
    for number in 1..=30 {
        let token = c.add(leader, GROUP, number);
        done(&mut c, token);
    }
    for node in [leader, other] {
        forget(&mut c, node, 3);
    }
    c.cut.clear();
    c.ticks(20);
    let of = |a: &&Ask| a.node == behind && a.names == [chunk(3)];
    let asks = c.asked.iter().filter(of).count();
    assert!((1..=4).contains(&asks), "{asks} asks");
    assert_eq!(has(&c, behind, 1), (false, true));
    let disk = c.nodes.get_mut(&leader).unwrap().disk_mut();
    disk.bodies.insert(chunk(3));
    c.ticks(60);
    assert!((1..=30).all(|n| has(&c, behind, n) == (true, true)));
}

/// An append that cannot be completed gives way to what another leader sends.
#[test]
fn what_a_dead_leader_sent_does_not_hold_up_what_comes_after() {
    let (mut c, [first, ..]) = one_behind();
    c.cut.clear();
    // It alone had the body.
    c.add(first, GROUP, 9);
    c.held = Some(Vec::new());
    c.ticks(1);
    assert!(!c.held.as_ref().unwrap().is_empty());
    c.part(&[first]);
    let others: Vec<u64> = (1..=3).filter(|n| *n != first).collect();
    while !c.held.as_ref().unwrap().is_empty() {
        c.release(0);
    }
    c.held = None;
    let second = c.elect(GROUP, Some(first));
    assert!(others.contains(&second));
    let token = c.add(second, GROUP, 5);
    c.ticks(30);
    assert!(c.answers[&token].is_ok());
}
