//! The walk of a group from the members it has to those it should have, one safe step at a time. Pure: the leader asks at every
//! few ticks, proposes what it is told, and asks again when that is applied; a new leader goes on from whatever it finds.
//!
//! New members come as learners and are promoted when they have caught up, so that no quorum ever waits for a member that is
//! still being filled. Voters change by explicit joint consensus only. A leader that is to go hands leadership over first, and so does one
//! that has no room to write, before anything else: it can hardly propose. Where nobody has room, whoever leads goes on: reads need a leader too.

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

/// What a leader knows of the members' state.
pub struct Known<'a> {
    /// Whether a member was heard lately and lacks next to nothing.
    pub caught_up: &'a dyn Fn(u64) -> bool,
    /// Whether a member, the leader itself too, has room to write, as far as is known.
    pub room: &'a dyn Fn(u64) -> bool,
}

impl Known<'_> {
    fn can_lead(&self, id: u64) -> bool {
        (self.caught_up)(id) && (self.room)(id)
    }
}

/// The voter to which a leader without room yields; none where it has room, or nobody else has.
pub fn heir(me: u64, conf: &ConfState, target: &Target, known: &Known<'_>) -> Option<u64> {
    if (known.room)(me) {
        return None;
    }
    // In the order of the target: the next after it is not the best one by chance only.
    let wanted = target.voters.iter().filter(|id| conf.voters.contains(id));
    let mut voters = wanted.chain(&conf.voters).filter(|id| **id != me);
    voters.find(|id| known.can_lead(**id)).copied()
}

/// The next step of the leader `me`.
pub fn next_step(me: u64, conf: &ConfState, target: &Target, known: &Known<'_>) -> Step {
    if let Some(heir) = heir(me, conf, target, known) {
        return Step::Transfer(heir);
    }
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
        .any(|id| is_learner(id) && !(known.caught_up)(*id))
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
        let room = (known.room)(me);
        let can = |id: &&u64| (known.caught_up)(**id) && ((known.room)(**id) || !room);
        return target
            .voters
            .iter()
            .find(can)
            .map_or(Step::Nothing, |id| Step::Transfer(*id));
    }
    if preferred != me && known.can_lead(preferred) {
        return Step::Transfer(preferred);
    }
    Step::Nothing
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL_WELL: Known<'static> = Known {
        caught_up: &|_| true,
        room: &|_| true,
    };

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
            match next_step(me, &conf, target, &ALL_WELL) {
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
        let known = Known {
            caught_up: &|id| id != 2,
            ..ALL_WELL
        };
        let step = next_step(1, &conf(&[1], &[2]), &goal, &known);
        assert_eq!(step, Step::Nothing);
    }

    #[test]
    fn a_joint_configuration_is_left_first_and_no_opinion_moves_nothing() {
        let joint = ConfState {
            voters_outgoing: vec![1],
            ..conf(&[1, 2], &[])
        };
        let step = next_step(1, &joint, &target(&[], &[]), &ALL_WELL);
        assert_eq!(step, Step::Change(ConfChangeV2::default()));
        let step = next_step(1, &conf(&[1, 2], &[]), &target(&[], &[]), &ALL_WELL);
        assert_eq!(step, Step::Nothing);
    }

    #[test]
    fn a_leader_without_room_yields_to_whoever_has_and_gets_nothing_back_meanwhile() {
        let (members, goal) = (conf(&[1, 2, 3], &[]), target(&[1, 2, 3], &[]));
        let step = |me: u64, full: &[u64], behind: &[u64]| {
            let known = Known {
                caught_up: &|id| !behind.contains(&id),
                room: &|id| !full.contains(&id),
            };
            next_step(me, &members, &goal, &known)
        };
        assert_eq!(step(1, &[1], &[]), Step::Transfer(2));
        assert_eq!(step(1, &[1, 2], &[]), Step::Transfer(3));
        assert_eq!(step(1, &[1], &[2]), Step::Transfer(3));
        assert_eq!(step(1, &[1], &[2, 3]), Step::Nothing);
        // The preferred one has none: it stays where it is.
        assert_eq!(step(2, &[1], &[]), Step::Nothing);
        assert_eq!(step(2, &[], &[]), Step::Transfer(1));
        // Nobody has: nobody moves.
        for me in 1..=3 {
            assert_eq!(step(me, &[1, 2, 3], &[]), Step::Nothing);
        }
        // Also in the middle of a change, which it could not finish.
        let joint = ConfState {
            voters_outgoing: vec![1, 2],
            ..conf(&[1, 2, 3], &[])
        };
        let known = Known {
            room: &|id| id != 1,
            ..ALL_WELL
        };
        assert_eq!(next_step(1, &joint, &goal, &known), Step::Transfer(2));
    }

    #[test]
    fn leadership_does_not_go_round_in_circles_whoever_has_room() {
        let goal = target(&[4, 2, 3], &[]);
        for full in 0..32u64 {
            let known = Known {
                room: &|id| full & (1 << id) == 0,
                ..ALL_WELL
            };
            for start in 1..=4u64 {
                let (members, mut me) = (conf(&[1, 2, 3, 4], &[]), start);
                let mut moves = 0;
                // Changes are not made: only where leadership goes is looked at.
                while let Step::Transfer(to) = next_step(me, &members, &goal, &known) {
                    me = to;
                    moves += 1;
                    assert!(moves < 5, "{full:b} from {start}");
                }
            }
        }
    }
}
