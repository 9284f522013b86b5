//! What a client knows of the cluster: its nodes, who keeps each group and who leads it. All of it may be old; a node that is asked in
//! vain says so.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use tidepool_proto::cluster::{self, NodeState};
use tidepool_store_core::ShardMap;

/// A client's map.
#[derive(Debug, Clone)]
pub(crate) struct Map {
    pub(crate) shards: ShardMap,
    nodes: BTreeMap<u64, Place>,
    groups: HashMap<u32, Group>,
}

#[derive(Debug, Clone)]
struct Place {
    addr: SocketAddr,
    zone: String,
}

#[derive(Debug, Clone, Default)]
struct Group {
    /// 0 where it is not known.
    leader: u64,
    members: Vec<u64>,
}

impl Map {
    /// Reads a node's answer. The node that answered is reached at the address it was asked at, whatever it says about itself.
    pub(crate) fn read(t: &cluster::Topology, asked: SocketAddr) -> Option<Self> {
        let mut nodes = BTreeMap::new();
        for node in &t.nodes {
            if NodeState::of(node.state) == Some(NodeState::Removed) {
                continue;
            }
            let addr = if node.id == t.node {
                asked
            } else {
                match node.addr.parse() {
                    Ok(addr) => addr,
                    Err(_) => continue,
                }
            };
            let zone = node.zone.clone();
            nodes.insert(node.id, Place { addr, zone });
        }
        let groups = t.groups.iter().map(|g| {
            // Old members and new ones both may have it; a target has it soon.
            let members = if g.voters.is_empty() {
                g.targets.clone()
            } else {
                g.voters.clone()
            };
            let leader = g.leader;
            (g.group, Group { leader, members })
        });
        Some(Self {
            shards: ShardMap::new(t.shards)?,
            groups: groups.collect(),
            nodes,
        })
    }

    /// Takes over what an older map knew about leaders that this one knows nothing about.
    pub(crate) fn keep_leaders(&mut self, old: &Map) {
        for (number, group) in &mut self.groups {
            if group.leader == 0
                && let Some(before) = old.groups.get(number)
            {
                group.leader = before.leader;
            }
        }
    }

    pub(crate) fn addr(&self, node: u64) -> Option<SocketAddr> {
        self.nodes.get(&node).map(|p| p.addr)
    }

    pub(crate) fn node_at(&self, addr: SocketAddr) -> Option<u64> {
        let at = self.nodes.iter().find(|(_, p)| p.addr == addr);
        at.map(|(id, _)| *id)
    }

    pub(crate) fn zone(&self, node: u64) -> &str {
        self.nodes.get(&node).map_or("", |p| p.zone.as_str())
    }

    /// Every node.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = u64> {
        self.nodes.keys().copied()
    }

    pub(crate) fn is_alone(&self) -> bool {
        self.nodes.len() < 2
    }

    /// Where to go with something for a group's leader: the leader, else who may be or know it.
    pub(crate) fn leader(&self, group: u32) -> Option<u64> {
        let leader = self.groups.get(&group)?.leader;
        self.nodes.contains_key(&leader).then_some(leader)
    }

    pub(crate) fn members(&self, group: u32) -> &[u64] {
        self.groups.get(&group).map_or(&[], |g| &g.members)
    }

    /// Notes a leader. Says whether it is a node that the map knows.
    pub(crate) fn set_leader(&mut self, group: u32, leader: u64) -> bool {
        self.groups.entry(group).or_default().leader = leader;
        leader == 0 || self.nodes.contains_key(&leader)
    }

    /// Forgets what a node leads, for it does not answer.
    pub(crate) fn lost(&mut self, node: u64) {
        for group in self.groups.values_mut() {
            if group.leader == node {
                group.leader = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_knows_where_to_go() {
        let node = |id: u64, addr: &str, state: NodeState| cluster::Node {
            id,
            addr: addr.into(),
            zone: format!("z{id}"),
            state: state.code(),
        };
        let t = cluster::Topology {
            cluster: "c".into(),
            shards: 2,
            node: 2,
            nodes: vec![
                node(1, "10.0.0.1:1", NodeState::Active),
                node(2, "0.0.0.0:1", NodeState::Active),
                node(3, "10.0.0.3:1", NodeState::Removed),
            ],
            groups: vec![
                cluster::Group {
                    group: 1,
                    leader: 1,
                    voters: vec![1, 2],
                    ..Default::default()
                },
                cluster::Group {
                    group: 2,
                    targets: vec![2, 3],
                    ..Default::default()
                },
            ],
        };
        let asked = "192.0.2.1:9".parse().unwrap();
        let mut map = Map::read(&t, asked).unwrap();
        assert_eq!(map.addr(2), Some(asked));
        assert_eq!((map.leader(1), map.leader(2)), (Some(1), None));
        assert_eq!(map.members(2), [2, 3]);
        assert_eq!(map.nodes().collect::<Vec<_>>(), [1, 2]);
        assert!(!map.set_leader(2, 3) && map.leader(2).is_none());
        assert!(map.set_leader(2, 1));
        map.lost(1);
        assert!(map.leader(1).is_none() && map.leader(2).is_none());
        let mut newer = Map::read(&t, asked).unwrap();
        newer.set_leader(1, 0);
        map.set_leader(1, 2);
        newer.keep_leaders(&map);
        assert_eq!(newer.leader(1), Some(2));
        assert!(Map::read(&cluster::Topology::default(), asked).is_none());
    }
}
