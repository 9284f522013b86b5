//! The end of a seed: all heals, and everything has to come together.

use tidepool_proto::cluster::NodeState;
use tidepool_store_core::placement;
use tidepool_store_raft::GroupStatus;

use crate::world::{Machine, World};

/// How long clients go on after everything is healed, in microseconds.
const GO_ON: u64 = 6_000_000;
/// How long coming together may take.
const LONGEST: u64 = 240_000_000;
/// Between two scrubs.
const SCRUB: u64 = 3_000_000;

impl World {
    /// Heals everything, lets clients go on for a while, and waits until all replicas are equal and whole.
    pub(crate) fn end(&mut self) {
        self.say(|| "all heals".into());
        self.shared.ending.set(true);
        self.heal_all();
        let until = self.now_us + GO_ON;
        let before = self.shared.dir.borrow().done;
        while self.now_us < until && !self.is_over() {
            self.step();
        }
        // Elections may take most of that time, but some of it must have been good.
        let patience = until + LONGEST;
        while self.shared.dir.borrow().done == before && self.now_us < patience && !self.is_over() {
            self.step();
        }
        if self.shared.dir.borrow().done == before {
            self.fail("no client gets anything done, although everything is healed".into());
        }
        self.stop_clients();
        let until = self.now_us + LONGEST;
        let mut scrub_at = self.now_us;
        let mut look_at = self.now_us;
        loop {
            if self.is_over() {
                return;
            }
            if self.now_us >= look_at {
                look_at = self.now_us + 200_000;
                match self.is_together() {
                    Ok(()) => break,
                    Err(why) if self.now_us >= until => {
                        return self.fail(format!("the cluster does not come together: {why}"));
                    }
                    Err(_) => {}
                }
            }
            if self.now_us >= scrub_at {
                scrub_at = self.now_us + SCRUB;
                let ids: Vec<u64> = self.machines.keys().copied().collect();
                ids.into_iter().for_each(|id| self.scrub(id));
            }
            self.step();
        }
        self.env.checker.borrow_mut().check_acks();
    }

    /// What each running node says of a group.
    fn statuses(&self, group: u32) -> impl Iterator<Item = (u64, Option<GroupStatus>)> {
        let running = self.machines.iter();
        let running = running.filter_map(|(id, m)| m.node().map(|n| (*id, n)));
        running.map(move |(id, node)| (id, node.core.status(group)))
    }

    /// Whether every group is where it should be, and every member has all of it.
    fn is_together(&self) -> Result<(), String> {
        let checker = self.env.checker.borrow();
        let cluster = checker.cluster().ok_or("there is no list of nodes")?;
        for node in &cluster.nodes {
            if !matches!(node.state, NodeState::Active | NodeState::Removed) {
                return Err(format!("node {} is {}", node.id, node.state.name()));
            }
            let up = self.machines.get(&node.id).and_then(Machine::node);
            if node.state == NodeState::Active && up.is_none() {
                return Err(format!("node {} does not run", node.id));
            }
        }
        for group in self.env.shards.groups() {
            let target = placement::target(&cluster, group);
            let sorted = |list: &[u64]| {
                let mut list = list.to_vec();
                list.sort_unstable();
                list
            };
            let mut leaders = 0;
            for (id, machine) in &self.machines {
                let Some(node) = machine.node() else { continue };
                let state = cluster.node(*id).map(|n| n.state);
                let status = node.core.status(group);
                let member = target.voters.contains(id) || target.learners.contains(id);
                let Some(status) = status else {
                    match member {
                        true => return Err(format!("node {id} has no replica of group {group}")),
                        false => continue,
                    }
                };
                // A node that was removed may never hear of it.
                if !member && state == Some(NodeState::Removed) {
                    continue;
                }
                if !member {
                    return Err(format!("node {id} still has a replica of group {group}"));
                }
                if sorted(&status.conf.voters) != sorted(&target.voters)
                    || sorted(&status.conf.learners) != sorted(&target.learners)
                    || !status.conf.voters_outgoing.is_empty()
                {
                    let all: Vec<_> = self.statuses(group).collect();
                    return Err(format!(
                        "node {id} has members {:?} of group {group}, which should be {target:?}: {all:#?}",
                        status.conf
                    ));
                }
                checker
                    .holds_all(group, node.core.disk())
                    .map_err(|why| format!("node {id}, group {group}: {why}"))?;
                if status.installing || !status.behind.is_empty() {
                    return Err(format!("node {id}, group {group}: {status:?}"));
                }
                leaders += u32::from(status.leads);
            }
            if leaders != 1 {
                return Err(format!("{leaders} nodes lead group {group}"));
            }
        }
        Ok(())
    }
}
