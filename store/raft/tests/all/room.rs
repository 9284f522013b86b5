//! Disks without room in a group of several: leadership goes to a member that can write, stays there, and comes back.

use crate::common::{Cluster, chunk};
use tidepool_store_core::keys;
use tidepool_store_raft::Rejection;

const GROUP: u32 = 1;

/// Three members, of which the first is preferred and leads.
fn three() -> Cluster {
    let mut c = Cluster::new(&[0, GROUP], &[1, 2, 3], &[]);
    c.elect(GROUP, None);
    for group in [0, GROUP] {
        c.target(group, &[1, 2, 3], &[]);
    }
    c.ticks(50);
    assert_eq!((c.leader(0), c.leader(GROUP)), (Some(1), Some(1)));
    c
}

fn term(c: &Cluster) -> u64 {
    c.nodes[&1].status(GROUP).unwrap().term
}

fn write(c: &mut Cluster, node: u64, number: u8) {
    let token = c.add(node, GROUP, number);
    c.ticks(5);
    assert!(c.answers[&token].is_ok(), "{:?}", c.answers[&token]);
}

/// Every node has these chunks, and nothing else.
fn all_have(c: &Cluster, numbers: &[u8]) {
    for node in c.nodes.keys() {
        let rows = c.rows(*node, GROUP);
        for number in numbers {
            assert!(
                rows.contains_key(&keys::chunk(&chunk(*number))),
                "node {node} lacks {number}"
            );
        }
        assert_eq!(rows, c.rows(1, GROUP), "node {node}");
    }
}

#[test]
fn a_leader_without_room_hands_over_once_and_leads_again_when_it_has() {
    let mut c = three();
    write(&mut c, 1, 1);
    let before = term(&c);
    c.room(1, false);
    assert!(c.nodes[&1].status(GROUP).unwrap().yields);
    c.ticks(10);
    for group in [0, GROUP] {
        let led_by = c.leader(group).unwrap();
        assert_ne!(led_by, 1, "group {group}");
    }
    write(&mut c, 2, 2);
    // It still says what others do, and is given nothing back: one hand-over, one election.
    c.ticks(200);
    assert_eq!(c.leader(GROUP), Some(2));
    assert_eq!(term(&c), before + 1);
    assert!(!c.nodes[&1].status(GROUP).unwrap().yields);
    // It follows all the time.
    write(&mut c, 2, 3);
    all_have(&c, &[1, 2, 3]);
    c.room(1, true);
    c.ticks(50);
    assert_eq!((c.leader(0), c.leader(GROUP)), (Some(1), Some(1)));
    assert_eq!(term(&c), before + 2);
    write(&mut c, 1, 4);
    c.ticks(5);
    all_have(&c, &[1, 2, 3, 4]);
}

#[test]
fn leadership_goes_past_members_without_room() {
    let mut c = three();
    c.room(2, false);
    c.ticks(5);
    c.room(1, false);
    c.ticks(100);
    assert_eq!(c.leader(GROUP), Some(3));
    write(&mut c, 3, 1);
    // The one that has room again is preferred to the one that leads.
    c.room(2, true);
    c.ticks(100);
    assert_eq!(c.leader(GROUP), Some(3), "1 is preferred, and has none");
    c.room(3, false);
    c.ticks(100);
    assert_eq!(c.leader(GROUP), Some(2));
    all_have(&c, &[1]);
}

#[test]
fn a_leader_that_dies_is_not_followed_for_long_by_one_without_room() {
    let mut c = three();
    c.room(2, false);
    c.ticks(5);
    for other in [2, 3] {
        c.cut.insert((1, other));
        c.cut.insert((other, 1));
    }
    // Node 2 stands first: it waits the shortest time.
    c.ticks(60);
    assert_eq!(c.nodes[&3].status(GROUP).unwrap().leader, Some(3));
    let token = c.add(3, GROUP, 9);
    c.ticks(5);
    assert!(c.answers[&token].is_ok());
}

#[test]
fn where_nobody_has_room_the_leader_stays_and_reads_go_on() {
    let mut c = three();
    write(&mut c, 1, 1);
    let before = term(&c);
    for node in 1..=3 {
        c.room(node, false);
        // Not one byte, and nothing is written.
        c.nodes.get_mut(&node).unwrap().disk_mut().full = true;
    }
    c.ticks(100);
    assert_eq!(c.leader(GROUP), Some(1));
    assert!(!c.nodes[&1].status(GROUP).unwrap().yields);
    let read = c.read(1, GROUP);
    c.ticks(3);
    assert_eq!(c.reads[&read], Ok(()));
    assert_eq!(term(&c), before);
    for node in 1..=3 {
        c.nodes.get_mut(&node).unwrap().disk_mut().full = false;
        c.room(node, true);
    }
    c.ticks(30);
    write(&mut c, 1, 2);
    all_have(&c, &[1, 2]);
}

#[test]
fn a_leader_whose_batch_waits_for_room_is_followed_and_says_so() {
    let mut c = three();
    write(&mut c, 1, 1);
    c.nodes.get_mut(&1).unwrap().disk_mut().full = true;
    let caught = c.add(1, GROUP, 2);
    c.settle();
    assert!(c.nodes[&1].stalled());
    assert!(c.nodes[&1].status(GROUP).unwrap().yields);
    let second = c.elect(GROUP, Some(1));
    // Nothing is refused for good that another one takes.
    let moved = Rejection::NotLeader {
        group: GROUP,
        leader: None,
    };
    let (write_there, read_there) = (c.add(1, GROUP, 3), c.read(1, GROUP));
    c.settle();
    assert_eq!(c.answers[&write_there], Err(moved.clone()));
    assert_eq!(c.reads[&read_there], Err(moved));
    assert_eq!(c.nodes[&1].status(GROUP).unwrap().leader, None);
    assert!(!c.answers.contains_key(&caught));
    write(&mut c, second, 4);
    let read = c.read(second, GROUP);
    c.ticks(3);
    assert_eq!(c.reads[&read], Ok(()));
    // Room again: it learns what was decided, also of what waited here and had been sent before, and leads as before.
    c.nodes.get_mut(&1).unwrap().disk_mut().full = false;
    c.ticks(100);
    assert!(matches!(c.answers[&caught], Err(Rejection::Again(_))));
    assert_eq!(c.leader(GROUP), Some(1));
    write(&mut c, 1, 5);
    all_have(&c, &[1, 2, 4, 5]);
}
