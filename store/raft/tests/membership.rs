//! Changes of a group's members as an exhaustive model at small size: every order of steps is tried.
//!
//! Four nodes; 0, 1 and 2 vote at first, and 0, 1 and 3 shall: two majorities of these need not meet. The change is walked as
//! [`tidepool_store_raft::plan`] has it walked and raft-rs executes it: an entry that enters joint consensus, and when that is applied,
//! one that leaves it. A node goes by the last change that it knows to be committed. Meanwhile logs are replicated, leaders elected and values
//! proposed in every order, and a leader that was replaced goes on until it hears of it.
//!
//! What must hold: what is committed once is never otherwise. Each rule left out is found, so the model is known to see.
//!
//! What is left out, to keep it small: a message brings the whole log, and an acknowledgement comes with it, in one step (that a message may
//! be lost is the step not taken); members are not filled as learners first, which only decides when a change is proposed; a term has
//! one candidate that wins. The simulation (`store/sim`) runs the real code with all of these.

use std::collections::{HashSet, VecDeque};

const NODES: usize = 4;
const OLD: u8 = 0b0111;
const NEW: u8 = 0b1011;

/// A rule that the model can leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// A voter is replaced through joint consensus.
    Joint,
    /// A change is proposed when the one before is applied.
    OneAtATime,
    /// Nobody votes for a log that ends before its own.
    UpToDate,
    /// A leader counts acknowledgements of entries of its own term only.
    OwnTerm,
}

/// Who votes: a mask of nodes each; a quorum of both is needed, where there are two.
type Conf = [u8; 2];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Value,
    /// The members are those of this number from now on.
    Members(u8),
}

/// Term and kind.
type Entry = (u8, Kind);

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

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    nodes: [Node; NODES],
    /// The longest log that was ever committed.
    chosen: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A node is elected by these, a mask with itself.
    Elect(usize, u8),
    Propose(usize),
    /// The leader proposes the next step of the change.
    Change(usize),
    /// From a leader to another node: its log and what is committed.
    Replicate(usize, usize),
    Commit(usize),
}

#[derive(Clone, Copy)]
struct Model {
    terms: u8,
    log: usize,
    without: Option<Rule>,
}

/// What a search came to.
#[derive(Debug, Default)]
struct Found {
    states: usize,
    contradiction: bool,
    /// States in which the whole change is committed, and ones where a second leader was elected in the midst of it.
    done: usize,
    elected_meanwhile: usize,
}

fn quorum(conf: Conf, have: u8) -> bool {
    let met = |c: u8| c == 0 || (c & have).count_ones() * 2 > c.count_ones();
    conf.iter().all(|c| met(*c))
}

fn last_change(log: &[Entry]) -> u8 {
    let change = log.iter().rev().find_map(|(_, kind)| match kind {
        Kind::Members(n) => Some(*n),
        Kind::Value => None,
    });
    change.unwrap_or(0)
}

impl Model {
    fn lacks(&self, rule: Rule) -> bool {
        self.without == Some(rule)
    }

    fn confs(&self) -> &'static [Conf] {
        match self.lacks(Rule::Joint) {
            true => &[[OLD, 0], [NEW, 0]],
            false => &[[OLD, 0], [NEW, OLD], [NEW, 0]],
        }
    }

    fn known<'a>(&self, node: &'a Node) -> &'a [Entry] {
        &node.log[..node.log.len().min(usize::from(node.commit))]
    }

    fn conf(&self, node: &Node) -> Conf {
        self.confs()[usize::from(last_change(self.known(node)))]
    }

    fn start(&self) -> State {
        let mut nodes: [Node; NODES] = Default::default();
        for node in &mut nodes[..3] {
            node.term = 1;
        }
        nodes[0].leads = true;
        let chosen = Vec::new();
        State { nodes, chosen }
    }

    fn steps(&self, s: &State) -> Vec<Step> {
        let mut steps = Vec::new();
        for (i, node) in s.nodes.iter().enumerate() {
            if node.leads {
                let others = (0..NODES).filter(|to| *to != i);
                steps.extend(others.map(|to| Step::Replicate(i, to)));
                steps.extend([Step::Propose(i), Step::Change(i), Step::Commit(i)]);
            } else {
                let masks = (0..1 << NODES).filter(|m| m & (1 << i) != 0);
                steps.extend(masks.map(|m| Step::Elect(i, m)));
            }
        }
        steps
    }

    /// The state after a step; none where it cannot be taken. Tells of a contradiction.
    fn next(&self, s: &State, step: Step) -> Option<(State, bool)> {
        let mut next = s.clone();
        let mut contradiction = false;
        match step {
            Step::Elect(who, voters) => self.elect(&mut next, who, voters)?,
            Step::Propose(who) => self.append(&mut next, who, Kind::Value)?,
            Step::Change(who) => {
                let node = &s.nodes[who];
                let last = last_change(&node.log);
                let applied = last_change(self.known(node)) == last;
                let more = usize::from(last) + 1 < self.confs().len();
                if !more || !(applied || self.lacks(Rule::OneAtATime)) {
                    return None;
                }
                self.append(&mut next, who, Kind::Members(last + 1))?;
            }
            Step::Replicate(from, to) => replicate(&mut next, from, to),
            Step::Commit(who) => contradiction = self.commit(&mut next, who)?,
        }
        (contradiction || next != *s).then_some((next, contradiction))
    }

    fn elect(&self, s: &mut State, who: usize, voters: u8) -> Option<()> {
        let term = s.nodes[who].term + 1;
        let conf = self.conf(&s.nodes[who]);
        if term > self.terms || voters & !(conf[0] | conf[1]) != 0 || !quorum(conf, voters) {
            return None;
        }
        // More votes than are needed let no more happen.
        let mut spare = (0..NODES).filter(|i| *i != who && voters & (1 << i) != 0);
        if spare.any(|i| quorum(conf, voters & !(1 << i))) {
            return None;
        }
        let end = |n: &Node| (n.log.last().map_or(0, |e| e.0), n.log.len());
        let mine = end(&s.nodes[who]);
        for (i, node) in s.nodes.iter_mut().enumerate() {
            if voters & (1 << i) == 0 {
                continue;
            }
            let behind = !self.lacks(Rule::UpToDate) && end(node) > mine;
            if i != who && (node.term >= term || behind) {
                return None;
            }
            (node.term, node.leads, node.acked) = (term, false, [0; NODES]);
        }
        s.nodes[who].leads = true;
        Some(())
    }

    fn append(&self, s: &mut State, who: usize, kind: Kind) -> Option<()> {
        let node = &mut s.nodes[who];
        if node.log.len() >= self.log {
            return None;
        }
        node.log.push((node.term, kind));
        Some(())
    }

    fn commit(&self, s: &mut State, who: usize) -> Option<bool> {
        let node = &s.nodes[who];
        let conf = self.conf(node);
        let held = |len: usize| {
            let others = (0..NODES).filter(|i| *i == who || usize::from(node.acked[*i]) >= len);
            others.fold(0u8, |mask, i| mask | 1 << i)
        };
        // One entry at a time, as a change among them changes who counts.
        let next = usize::from(node.commit) + 1;
        let own = |len: usize| self.lacks(Rule::OwnTerm) || node.log[len - 1].0 == node.term;
        let end = (next..=node.log.len()).find(|len| own(*len) && quorum(conf, held(*len)))?;
        let committed = &node.log[..end];
        let common = end.min(s.chosen.len());
        let contradiction = committed[..common] != s.chosen[..common];
        if end > s.chosen.len() {
            s.chosen = committed.to_vec();
        }
        s.nodes[who].commit = end as u8;
        Some(contradiction)
    }

    /// Tries every order, where a rule is missing until that shows.
    fn search(&self) -> Found {
        let mut found = Found::default();
        let start = self.start();
        let mut met = HashSet::from([start.clone()]);
        let mut waiting = VecDeque::from([start]);
        while let Some(s) = waiting.pop_front() {
            let change = last_change(&s.chosen);
            found.done += usize::from(usize::from(change) + 1 == self.confs().len());
            found.elected_meanwhile +=
                usize::from(change == 1 && s.nodes.iter().any(|n| n.leads && n.term > 1));
            for step in self.steps(&s) {
                let Some((next, contradiction)) = self.next(&s, step) else {
                    continue;
                };
                found.contradiction |= contradiction;
                if contradiction && self.without.is_some() {
                    found.states = met.len();
                    return found;
                }
                if met.insert(next.clone()) {
                    waiting.push_back(next);
                }
            }
        }
        found.states = met.len();
        found
    }
}

fn replicate(s: &mut State, from: usize, to: usize) {
    let leader = s.nodes[from].clone();
    let node = &mut s.nodes[to];
    if node.term > leader.term {
        // The old leader learns that it is none.
        let term = node.term;
        let old = &mut s.nodes[from];
        (old.term, old.leads, old.acked) = (term, false, [0; NODES]);
        return;
    }
    *node = Node {
        term: leader.term,
        leads: false,
        commit: node.commit.max(leader.commit),
        acked: [0; NODES],
        log: leader.log.clone(),
    };
    s.nodes[from].acked[to] = leader.log.len() as u8;
}

#[test]
fn what_is_committed_stays_through_a_change_of_members() {
    for (terms, log) in [(2, 3), (3, 2), (4, 1)] {
        let without = None;
        let found = Model {
            terms,
            log,
            without,
        }
        .search();
        eprintln!("{terms} terms, {log} entries: {found:?}");
        assert!(!found.contradiction, "{found:?}");
        // Of two entries the change takes both.
        let whole = found.done > 0 && found.elected_meanwhile > 0;
        assert!(whole || log < 2, "{found:?}");
    }
}

#[test]
fn each_rule_of_a_change_of_members_is_needed() {
    use Rule::*;
    for (rule, terms, log) in [
        (Joint, 2, 2),
        (OneAtATime, 2, 3),
        (UpToDate, 2, 2),
        (OwnTerm, 4, 1),
    ] {
        let without = Some(rule);
        let found = Model {
            terms,
            log,
            without,
        }
        .search();
        eprintln!("without {rule:?}: {} states", found.states);
        assert!(found.contradiction, "{rule:?} was not missed: {found:?}");
    }
}
