//! Who votes.

use raft::eraftpb::{Message, MessageType};
use tidepool_store_raft::{Action, Body, Envelope, Input};

use crate::common::Cluster;

const GROUP: u32 = 1;

/// What `node` answers when `from` asks it whether it would get its vote.
fn asked(c: &mut Cluster, node: u64, from: u64, (term, index): (u64, u64)) -> Option<Message> {
    let mut ask = Message::default();
    ask.set_msg_type(MessageType::MsgRequestPreVote);
    (ask.from, ask.to) = (from, node);
    (ask.term, ask.log_term, ask.index) = (term + 1, term, index);
    let envelope = Envelope {
        group: GROUP,
        body: Body::Raft(Box::new(ask)),
    };
    let core = c.nodes.get_mut(&node).unwrap();
    core.handle(1, Input::Message { from, envelope }).unwrap();
    core.turn().unwrap();
    let mut answer = None;
    while let Some(action) = core.poll_action() {
        let Action::Send { to, envelopes } = action else {
            continue;
        };
        for envelope in envelopes {
            if let Body::Raft(message) = envelope.body
                && message.msg_type() == MessageType::MsgRequestPreVoteResponse
            {
                assert_eq!(to, from);
                answer = Some(*message);
            }
        }
    }
    answer
}

/// The others may not know yet that it is none: if the leader dies now, their majority is one with it.
#[test]
fn a_member_that_knows_that_it_was_removed_still_votes() {
    let mut c = Cluster::new(&[GROUP], &[1, 2, 4], &[3]);
    c.target(GROUP, &[1, 2, 4], &[]);
    c.elect(GROUP, None);
    c.ticks(50);
    c.target(GROUP, &[1, 2, 3], &[]);
    let status = |c: &Cluster, node: u64| c.nodes[&node].status(GROUP);
    let mut passed = 0;
    while status(&c, 4)
        .is_some_and(|s| s.conf.voters.contains(&4) || !s.conf.voters_outgoing.is_empty())
    {
        c.ticks(1);
        passed += 1;
        assert!(passed < 300, "it is not removed");
    }
    c.part(&[4]);
    // Until it has heard of no leader for a while.
    c.ticks(25);
    let removed = status(&c, 4).expect("it is gone already");
    assert!(!removed.conf.voters.contains(&4));
    let here = (removed.term, removed.commit);
    let answer = asked(&mut c, 4, 3, here).expect("no answer");
    assert!(!answer.reject);
    let answer = asked(&mut c, 4, 3, (here.0, here.1 - 1)).expect("no answer");
    assert!(
        answer.reject,
        "a vote for a log that lacks what is committed"
    );
}
