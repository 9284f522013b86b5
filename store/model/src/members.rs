//! Changes of a group's members: two of three voters are replaced at once.
//!
//! Five nodes; 0, 1 and 2 vote at first, and 0, 3 and 4 shall. The change is walked as the store walks it: an entry that enters joint consensus, and when that is
//! applied, one that leaves it. A node goes by the last change that it knows to be committed, as raft-rs does. Logs are replicated, leaders elected, values proposed
//! in every order; a leader that was replaced goes on until it hears of it.
//!
//! What must hold: what is committed once is never otherwise.

use stateright::{Model, Property};

const NODES: usize = 5;

/// A rule that the model can leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Two members are replaced through joint consensus.
    Joint,
    /// A change is proposed when the one before is applied.
    OneAtATime,
    /// Nobody votes for a log that ends before its own.
    UpToDate,
}

/// Who votes: a mask of nodes each; a quorum of all that are not empty is needed.
type Conf = [u8; 2];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Value,
    /// The members are those of this number from now on.
    Members(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    term: u8,
    kind: Kind,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Node {
    term: u8,
    leads: bool,
    log: Vec<Entry>,
    /// Entries it knows to be committed.
    commit: u8,
    /// As a leader: how much of its log the others have acknowledged.
    acked: [u8; NODES],
}

/// A state of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    nodes: [Node; NODES],
    /// What was ever committed.
    chosen: Vec<Entry>,
    contradicted: bool,
    elected: bool,
}

/// A step of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step {
    /// A node is elected by these (a mask with itself).
    Elect(usize, u8),
    Propose(usize),
    /// The leader proposes the next step of the change.
    Change(usize),
    /// From a leader to another node: its log and what is committed.
    Replicate(usize, usize),
    Commit(usize),
}

/// The model.
#[derive(Debug, Clone)]
pub struct Members {
    pub terms: u8,
    pub log: usize,
    pub without: Option<Rule>,
}

impl Members {
    fn confs(&self) -> &'static [Conf] {
        match self.without {
            Some(Rule::Joint) => &[[0b00111, 0], [0b11001, 0]],
            _ => &[[0b00111, 0], [0b11001, 0b00111], [0b11001, 0]],
        }
    }

    /// The last change in a log, by number.
    fn last_change(log: &[Entry]) -> u8 {
        let change = log.iter().rev().find_map(|e| match e.kind {
            Kind::Members(n) => Some(n),
            Kind::Value => None,
        });
        change.unwrap_or(0)
    }

    fn conf(&self, node: &Node) -> Conf {
        let known = &node.log[..node.log.len().min(usize::from(node.commit))];
        self.confs()[usize::from(Self::last_change(known))]
    }

    fn quorum(conf: Conf, have: u8) -> bool {
        conf.iter()
            .filter(|c| **c != 0)
            .all(|c| (c & have).count_ones() * 2 > c.count_ones())
    }

    fn elect(&self, s: &mut State, who: usize, voters: u8) -> Option<()> {
        let term = s.nodes[who].term + 1;
        let conf = self.conf(&s.nodes[who]);
        if term > self.terms || voters & !(conf[0] | conf[1]) != 0 || !Self::quorum(conf, voters) {
            return None;
        }
        // More votes than are needed let no more happen.
        let spare = (0..NODES).filter(|i| *i != who && voters & (1 << i) != 0);
        if spare
            .map(|i| voters & !(1 << i))
            .any(|fewer| Self::quorum(conf, fewer))
        {
            return None;
        }
        let end = |n: &Node| (n.log.last().map_or(0, |e| e.term), n.log.len());
        let mine = end(&s.nodes[who]);
        for (i, node) in s.nodes.iter_mut().enumerate() {
            if voters & (1 << i) == 0 {
                continue;
            }
            if i != who {
                let behind = self.without != Some(Rule::UpToDate) && end(node) > mine;
                if node.term >= term || behind {
                    return None;
                }
            }
            node.term = term;
            node.leads = false;
        }
        let node = &mut s.nodes[who];
        node.leads = true;
        node.acked = [0; NODES];
        s.elected = true;
        Some(())
    }

    fn append(&self, s: &mut State, who: usize, kind: Kind) -> Option<()> {
        let node = &mut s.nodes[who];
        if !node.leads || node.log.len() >= self.log {
            return None;
        }
        let term = node.term;
        node.log.push(Entry { term, kind });
        Some(())
    }

    fn replicate(&self, s: &mut State, from: usize, to: usize) -> Option<()> {
        let leader = s.nodes[from].clone();
        let node = &mut s.nodes[to];
        if !leader.leads {
            return None;
        }
        if node.term > leader.term {
            // The old leader learns that it is none.
            let (term, old) = (node.term, &mut s.nodes[from]);
            old.term = term;
            old.leads = false;
            return Some(());
        }
        node.term = leader.term;
        node.leads = false;
        node.commit = node.commit.max(leader.commit);
        s.nodes[from].acked[to] = leader.log.len() as u8;
        s.nodes[to].log = leader.log;
        Some(())
    }

    fn commit(&self, s: &mut State, who: usize) -> Option<()> {
        let node = &s.nodes[who];
        if !node.leads {
            return None;
        }
        let conf = self.conf(node);
        let held = |len: usize| {
            let others = (0..NODES).filter(|i| *i == who || usize::from(node.acked[*i]) >= len);
            others.fold(0u8, |mask, i| mask | 1 << i)
        };
        // One entry at a time, as a change among them changes who counts.
        let next = usize::from(node.commit) + 1;
        let end = (next..=node.log.len())
            .find(|len| node.log[len - 1].term == node.term && Self::quorum(conf, held(*len)))?;
        let committed = node.log[..end].to_vec();
        let common = committed.len().min(s.chosen.len());
        s.contradicted |= committed[..common] != s.chosen[..common];
        if committed.len() > s.chosen.len() {
            s.chosen = committed;
        }
        s.nodes[who].commit = end as u8;
        Some(())
    }
}

impl Model for Members {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut nodes: [Node; NODES] = Default::default();
        for node in &mut nodes[..3] {
            node.term = 1;
        }
        nodes[0].leads = true;
        vec![State {
            nodes,
            chosen: Vec::new(),
            contradicted: false,
            elected: false,
        }]
    }

    fn actions(&self, s: &State, steps: &mut Vec<Step>) {
        for (i, node) in s.nodes.iter().enumerate() {
            if node.leads {
                steps.push(Step::Propose(i));
                let last = Self::last_change(&node.log);
                let known = node.log.len().min(usize::from(node.commit));
                let applied = Self::last_change(&node.log[..known]) == last;
                let more = usize::from(last) + 1 < self.confs().len();
                if more && (applied || self.without == Some(Rule::OneAtATime)) {
                    steps.push(Step::Change(i));
                }
                steps.push(Step::Commit(i));
                let others = (0..NODES).filter(|to| *to != i);
                steps.extend(others.map(|to| Step::Replicate(i, to)));
            } else if node.term < self.terms {
                let masks = (0..1u8 << NODES).filter(|m| m & (1 << i) != 0 && m.count_ones() <= 4);
                steps.extend(masks.map(|m| Step::Elect(i, m)));
            }
        }
    }

    fn next_state(&self, s: &State, step: Step) -> Option<State> {
        let mut next = s.clone();
        match step {
            Step::Elect(who, voters) => self.elect(&mut next, who, voters)?,
            Step::Propose(who) => self.append(&mut next, who, Kind::Value)?,
            Step::Change(who) => {
                let number = Self::last_change(&next.nodes[who].log) + 1;
                self.append(&mut next, who, Kind::Members(number))?;
            }
            Step::Replicate(from, to) => self.replicate(&mut next, from, to)?,
            Step::Commit(who) => self.commit(&mut next, who)?,
        }
        (next != *s).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("what is committed stays", |_, s: &State| !s.contradicted),
            Property::sometimes("the change is done", |m: &Members, s: &State| {
                usize::from(Members::last_change(&s.chosen)) + 1 == m.confs().len()
            }),
            Property::sometimes("a leader is elected meanwhile", |_, s: &State| {
                s.elected && Members::last_change(&s.chosen) > 0
            }),
        ]
    }
}
