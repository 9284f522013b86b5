//! Who keeps which group: a pure function of the list of nodes, so that every node that applied the same list agrees.
//!
//! Rendezvous hashing: every node has a score for every group, the highest ones keep it. A node that comes or goes moves only what it
//! gains or had. Failure domains come first: no two replicas in one zone while another zone has none.
//!
//! Who leads is balanced over all groups, one after the other: of a group's voters the one that leads fewest so far. Chance alone would leave
//! one of three nodes with half of sixteen groups. A node that comes or goes may move more leaders than replicas: that costs next to nothing.
//!
//! Elsewhere on purpose: walking from the members a group has to those it should have (`store/raft`).

use std::collections::{BTreeMap, BTreeSet};

use tidepool_proto::cluster::NodeState;

use crate::nodes::{ClusterState, NodeRecord};
use crate::shard::META_GROUP;

/// Replicas of a shard, where there are as many nodes.
pub const REPLICAS: usize = 3;
/// Voters of the meta group, where there are as many nodes.
pub const META_VOTERS: usize = 5;

/// Who is to keep a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// The preferred leader first.
    pub voters: Vec<u64>,
    /// Only of the meta group: every other member of the cluster.
    pub learners: Vec<u64>,
}

/// The target of one group. Empty where no node is active. All of them are had for the same price by [`targets`].
pub fn target(state: &ClusterState, group: u32) -> Target {
    targets(state).nth(group as usize).unwrap_or_default()
}

/// The targets of all groups, from the meta group on.
pub fn targets(state: &ClusterState) -> impl Iterator<Item = Target> {
    let mut leads: BTreeMap<u64, usize> = BTreeMap::new();
    (META_GROUP..=state.shards).map(move |group| {
        let mut target = members(state, group);
        let led = |n: &u64| leads.get(n).copied().unwrap_or(0);
        let first = target.voters.iter().enumerate().min_by_key(|(_, n)| led(n));
        if let Some((at, leader)) = first {
            *leads.entry(*leader).or_default() += 1;
            target.voters[..=at].rotate_right(1);
        }
        target
    })
}

fn members(state: &ClusterState, group: u32) -> Target {
    let active: Vec<&NodeRecord> = state
        .nodes
        .iter()
        .filter(|n| n.state == NodeState::Active)
        .collect();
    if group != META_GROUP {
        return Target {
            voters: choose(&active, group, REPLICAS),
            learners: Vec::new(),
        };
    }
    // An even number of voters is no safer than one less, but for two, which have everything twice.
    let wanted = match active.len() {
        n if n >= META_VOTERS => META_VOTERS,
        4 => 3,
        n => n,
    };
    let voters = choose(&active, group, wanted);
    let learners = state
        .nodes
        .iter()
        .filter(|n| n.state != NodeState::Removed && !voters.contains(&n.id))
        .map(|n| n.id)
        .collect();
    Target { voters, learners }
}

fn choose(active: &[&NodeRecord], group: u32, wanted: usize) -> Vec<u64> {
    let mut order: Vec<&NodeRecord> = active.to_vec();
    order.sort_by_key(|n| (std::cmp::Reverse(score(n.id, group)), n.id));
    let mut chosen: Vec<u64> = Vec::with_capacity(wanted);
    // Rounds over the zones: the best of each that has the fewest so far. A node without a zone is one of its own.
    while chosen.len() < wanted {
        let mut used = BTreeSet::new();
        let before = chosen.len();
        for node in &order {
            if chosen.len() < wanted
                && !chosen.contains(&node.id)
                && (node.zone.is_empty() || used.insert(node.zone.as_str()))
            {
                chosen.push(node.id);
            }
        }
        if chosen.len() == before {
            break;
        }
    }
    chosen
}

/// Splitmix64 of both numbers: every bit depends on every bit.
fn score(node: u64, group: u32) -> u64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    mix(mix(node) ^ u64::from(group).rotate_left(32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(zones: &[&str]) -> ClusterState {
        let nodes = zones.iter().enumerate().map(|(i, zone)| NodeRecord {
            id: i as u64 + 1,
            addr: format!("10.0.0.{i}:1"),
            zone: (*zone).to_owned(),
            state: NodeState::Active,
            key: [i as u8; 32],
        });
        ClusterState {
            shards: 64,
            next_node: zones.len() as u64 + 1,
            nodes: nodes.collect(),
            tokens: Vec::new(),
        }
    }

    #[test]
    fn replicas_go_to_different_zones() {
        let state = cluster(&["a", "a", "a", "b", "b", "c"]);
        for group in 1..=64 {
            let voters = target(&state, group).voters;
            assert_eq!(voters.len(), 3);
            let zones: BTreeSet<_> = voters
                .iter()
                .map(|v| state.nodes[*v as usize - 1].zone.as_str())
                .collect();
            assert_eq!(zones.len(), 3, "{group}: {voters:?}");
        }
        // Fewer zones than replicas: still three of them, on different nodes.
        let state = cluster(&["a", "a", "a", "b"]);
        for group in 1..=64 {
            let voters: BTreeSet<_> = target(&state, group).voters.into_iter().collect();
            assert!(voters.len() == 3 && voters.contains(&4), "{voters:?}");
        }
    }

    #[test]
    fn a_new_node_takes_its_share_and_moves_nothing_else() {
        let before = cluster(&["", "", "", ""]);
        let after = cluster(&["", "", "", "", ""]);
        let (mut gained, mut moved) = (0, 0);
        let mut leads = [0; 6];
        for group in 1..=64 {
            let old: BTreeSet<_> = target(&before, group).voters.into_iter().collect();
            let list = target(&after, group).voters;
            leads[list[0] as usize] += 1;
            let new: BTreeSet<_> = list.into_iter().collect();
            gained += usize::from(new.contains(&5));
            moved += new.difference(&old).count();
        }
        assert_eq!(gained, moved);
        assert!((20..60).contains(&gained), "{gained}");
        assert!(
            leads[1..].iter().all(|n| (11..=15).contains(n)),
            "{leads:?}"
        );
    }

    #[test]
    fn leaders_are_spread_evenly() {
        for nodes in 1..=7 {
            for shards in [1, 3, 16, 255] {
                let mut state = cluster(&vec![""; nodes]);
                state.shards = shards;
                let mut leads = vec![0usize; nodes];
                let all: Vec<Target> = targets(&state).collect();
                assert_eq!(all.len(), shards as usize + 1);
                for (group, list) in all.into_iter().enumerate() {
                    leads[list.voters[0] as usize - 1] += 1;
                    assert_eq!(target(&state, group as u32), list);
                    let same: BTreeSet<_> =
                        members(&state, group as u32).voters.into_iter().collect();
                    assert_eq!(same, list.voters.into_iter().collect());
                }
                let (least, most) = (leads.iter().min(), leads.iter().max());
                let apart = most.unwrap() - least.unwrap();
                assert!(apart <= 1 + usize::from(nodes > REPLICAS), "{leads:?}");
            }
        }
        let mut none = cluster(&[""]);
        none.nodes[0].state = NodeState::Draining;
        assert_eq!(target(&none, 1), Target::default());
        assert_eq!(target(&none, 65), Target::default());
    }

    #[test]
    fn the_meta_group_is_everywhere() {
        let mut state = cluster(&["", "", "", "", "", "", ""]);
        state.nodes[6].state = NodeState::Joining;
        state.nodes[5].state = NodeState::Removed;
        state.nodes[4].state = NodeState::Draining;
        let t = target(&state, META_GROUP);
        assert_eq!(t.voters.len(), 3);
        let mut all: Vec<u64> = t.voters.iter().chain(&t.learners).copied().collect();
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3, 4, 5, 7]);
        assert!(!t.voters.contains(&5) && !t.voters.contains(&7));
        for (nodes, voters) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (6, 5)] {
            let state = cluster(&vec![""; nodes]);
            assert_eq!(target(&state, META_GROUP).voters.len(), voters);
        }
    }
}
