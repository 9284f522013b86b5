//! The walk of a group from the members it has to those it should have, one safe step at a time. Pure: the leader asks at every
//! few ticks, proposes what it is told, and asks again when that is applied; a new leader goes on from whatever it finds.
//!
//! New members come as learners and are promoted when they have caught up, so that no quorum ever waits for a member that is
//! still being filled. Voters change by explicit joint consensus only. A leader that is to go hands leadership over first.

use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState,
};

use crate::api::Target;

/// What a leader does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// The members are as they should be, or something has to happen first.
    Nothing,
    /// Propose this.
    Change(ConfChangeV2),
    /// Hand leadership to this voter.
    Transfer(u64),
}

fn change(kind: ConfChangeType, node: u64) -> ConfChangeSingle {
    let mut single = ConfChangeSingle {
        node_id: node,
        ..ConfChangeSingle::default()
    };
    single.set_change_type(kind);
    single
}

fn changes(list: Vec<ConfChangeSingle>, transition: ConfChangeTransition) -> Step {
    let mut all = ConfChangeV2 {
        changes: list,
        ..ConfChangeV2::default()
    };
    all.set_transition(transition);
    Step::Change(all)
}

/// The next step of the leader `me`. `caught_up` tells of a member whether it was heard lately and lacks next to nothing.
pub fn next_step(
    me: u64,
    conf: &ConfState,
    target: &Target,
    caught_up: &dyn Fn(u64) -> bool,
) -> Step {
    if !conf.voters_outgoing.is_empty() {
        // An empty change leaves the joint configuration.
        return Step::Change(ConfChangeV2::default());
    }
    if target.voters.is_empty() {
        return Step::Nothing;
    }
    let is_voter = |id: &u64| conf.voters.contains(id);
    let is_learner = |id: &u64| conf.learners.contains(id);
    // One at a time: filling a member is the dear part.
    let mut wanted = target.voters.iter().chain(&target.learners);
    if let Some(new) = wanted.find(|id| !is_voter(id) && !is_learner(id)) {
        return changes(
            vec![change(ConfChangeType::AddLearnerNode, *new)],
            ConfChangeTransition::Auto,
        );
    }
    if target
        .voters
        .iter()
        .any(|id| is_learner(id) && !caught_up(*id))
    {
        return Step::Nothing;
    }
    let promoted = target.voters.iter().filter(|id| is_learner(id));
    let mut list: Vec<_> = promoted
        .map(|id| change(ConfChangeType::AddNode, *id))
        .collect();
    let leaving = |id: &&u64| !target.voters.contains(id) && **id != me;
    list.extend(conf.voters.iter().filter(leaving).map(|id| {
        if target.learners.contains(id) {
            change(ConfChangeType::AddLearnerNode, *id)
        } else {
            change(ConfChangeType::RemoveNode, *id)
        }
    }));
    if !list.is_empty() {
        return changes(list, ConfChangeTransition::Explicit);
    }
    if let Some(old) = conf.learners.iter().find(|id| !target.has(**id)) {
        return changes(
            vec![change(ConfChangeType::RemoveNode, *old)],
            ConfChangeTransition::Auto,
        );
    }
    let preferred = target.voters[0];
    if !target.voters.contains(&me) {
        // Whoever takes over finds one voter too many and removes it.
        let mut heirs = target.voters.iter().filter(|id| caught_up(**id));
        return heirs.next().map_or(Step::Nothing, |id| Step::Transfer(*id));
    }
    if preferred != me && caught_up(preferred) {
        return Step::Transfer(preferred);
    }
    Step::Nothing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(voters: &[u64], learners: &[u64]) -> ConfState {
        ConfState {
            voters: voters.to_vec(),
            learners: learners.to_vec(),
            ..ConfState::default()
        }
    }

    fn target(voters: &[u64], learners: &[u64]) -> Target {
        Target {
            group: 1,
            voters: voters.to_vec(),
            learners: learners.to_vec(),
        }
    }

    /// Makes a change, as raft would.
    fn make(conf: &mut ConfState, step: &ConfChangeV2) {
        if step.changes.is_empty() {
            conf.voters_outgoing.clear();
            conf.learners.append(&mut conf.learners_next);
            return;
        }
        if step.transition == ConfChangeTransition::Explicit as i32 {
            conf.voters_outgoing = conf.voters.clone();
        }
        for c in &step.changes {
            conf.voters.retain(|id| *id != c.node_id);
            conf.learners.retain(|id| *id != c.node_id);
            match c.change_type() {
                ConfChangeType::AddNode => conf.voters.push(c.node_id),
                ConfChangeType::AddLearnerNode if conf.voters_outgoing.contains(&c.node_id) => {
                    conf.learners_next.push(c.node_id);
                }
                ConfChangeType::AddLearnerNode => conf.learners.push(c.node_id),
                ConfChangeType::RemoveNode => {}
            }
        }
    }

    /// Walks to the end, and gives the members, the leader and the number of steps.
    fn walk(mut conf: ConfState, mut me: u64, target: &Target) -> (ConfState, u64, usize) {
        for steps in 0..50 {
            assert!(
                conf.voters.contains(&me),
                "the leader {me} is no voter of {conf:?}"
            );
            match next_step(me, &conf, target, &|_| true) {
                Step::Nothing => {
                    conf.voters.sort_unstable();
                    conf.learners.sort_unstable();
                    return (conf, me, steps);
                }
                Step::Change(c) => {
                    assert!(!c.changes.iter().any(|c| c.node_id == me));
                    make(&mut conf, &c);
                }
                Step::Transfer(to) => {
                    assert!(conf.voters.contains(&to));
                    me = to;
                }
            }
        }
        panic!("no end: {conf:?}, {target:?}");
    }

    #[test]
    fn every_walk_ends_at_its_target_with_the_preferred_leader() {
        let sets: &[(&[u64], &[u64])] = &[
            (&[1], &[]),
            (&[1, 2, 3], &[]),
            (&[3, 4, 5], &[1]),
            (&[5, 2, 1], &[3, 4]),
            (&[6, 7, 8], &[]),
        ];
        for (from_voters, from_learners) in sets {
            for (voters, learners) in sets {
                for me in *from_voters {
                    let goal = target(voters, learners);
                    let (end, leader, steps) = walk(conf(from_voters, from_learners), *me, &goal);
                    let mut want = conf(voters, learners);
                    want.voters.sort_unstable();
                    assert_eq!((end, leader), (want, voters[0]), "after {steps} steps");
                }
            }
        }
    }

    #[test]
    fn nobody_is_promoted_before_it_has_caught_up() {
        let goal = target(&[1, 2], &[]);
        let step = next_step(1, &conf(&[1], &[2]), &goal, &|id| id != 2);
        assert_eq!(step, Step::Nothing);
    }

    #[test]
    fn a_joint_configuration_is_left_first_and_no_opinion_moves_nothing() {
        let joint = ConfState {
            voters_outgoing: vec![1],
            ..conf(&[1, 2], &[])
        };
        let step = next_step(1, &joint, &target(&[], &[]), &|_| true);
        assert_eq!(step, Step::Change(ConfChangeV2::default()));
        let step = next_step(1, &conf(&[1, 2], &[]), &target(&[], &[]), &|_| true);
        assert_eq!(step, Step::Nothing);
    }
}
