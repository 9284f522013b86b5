//! Which checkpoints a plan lets go, and why: a table of rules against one history, and what no rule may take.

use std::collections::BTreeMap;

use tidepool_proto::{CheckpointId, DomainId, SandboxId, TurnNo};
use tidepool_store_core::retention::{
    Checkpoint, Decision, History, Keep, Policies, Reason, Scope, plan,
};

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
/// Wednesday, 2026-01-07, 12:00 UTC.
const NOW: u64 = 1_767_787_200_000;

fn id(n: u64) -> CheckpointId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    CheckpointId(bytes)
}

/// A sandbox whose checkpoints are so old, the oldest first; turn 1 is the first. It stands on the last.
fn history(n: u8, ages: &[u64]) -> History {
    let number = |turn: u64| u64::from(n) * 1000 + turn;
    let checkpoints: Vec<Checkpoint> = (1..)
        .zip(ages)
        .map(|(turn, age)| Checkpoint {
            id: id(number(turn)),
            turn: TurnNo(turn),
            created_ms: NOW - age,
            parent: (turn > 1).then(|| id(number(turn - 1))),
            keep: false,
        })
        .collect();
    History {
        id: SandboxId([n; 16]),
        name: format!("s{n}"),
        domain: Some(domain("d")),
        labels: BTreeMap::from([("env".to_owned(), "test".to_owned())]),
        changes: 7,
        head: checkpoints.last().map(|c| c.id),
        checkpoints,
    }
}

fn domain(name: &str) -> DomainId {
    name.parse().unwrap()
}

fn label(key: &str, value: &str) -> Scope {
    Scope::Label {
        key: key.into(),
        value: value.into(),
    }
}

fn policies(rules: impl IntoIterator<Item = (Scope, Keep)>) -> Policies {
    let mut all = Policies::default();
    for (scope, keep) in rules {
        all.set(scope, Some(keep));
    }
    all
}

fn decisions(rules: &Policies, history: &History) -> Vec<Decision> {
    let mut plans = plan(rules, std::slice::from_ref(history), NOW);
    assert_eq!(plans.len(), 1);
    let plan = plans.remove(0);
    assert_eq!((plan.sandbox, plan.changes), (history.id, history.changes));
    let removed: Vec<CheckpointId> = plan.removed().collect();
    let goes = plan.decisions.iter().filter(|d| d.remove);
    assert_eq!(removed, goes.map(|d| d.checkpoint).collect::<Vec<_>>());
    plan.decisions
}

fn reasons(rules: &Policies, history: &History) -> Vec<Reason> {
    let list = decisions(rules, history);
    // Each once and in order, and only what nothing keeps goes.
    let turns: Vec<TurnNo> = history.checkpoints.iter().map(|c| c.turn).collect();
    assert_eq!(list.iter().map(|d| d.turn).collect::<Vec<_>>(), turns);
    for d in &list {
        assert_eq!(d.remove, matches!(d.reason, Reason::NotKept(_)));
    }
    list.into_iter().map(|d| d.reason).collect()
}

#[test]
fn a_rule_keeps_what_any_part_of_it_says() {
    use Reason::{Daily, Head, Hourly, Last, Weekly, Within};
    let gone = || Reason::NotKept(Scope::All);
    // Turns 1 to 8. Sunday and Monday begin weeks of their own: NOW is a Wednesday noon.
    let ages = [
        16 * DAY,           // Monday before last
        4 * DAY,            // Saturday
        3 * DAY,            // Sunday
        2 * DAY + 6 * HOUR, // Monday 06:00
        2 * DAY,            // Monday 12:00
        90 * MINUTE,        // today 10:30
        61 * MINUTE,        // today 10:59
        0,
    ];
    let none = Keep::default();
    let cases: Vec<(&str, Keep, [Reason; 8])> = vec![
        (
            "nothing but the head",
            none.clone(),
            [gone(), gone(), gone(), gone(), gone(), gone(), gone(), Head],
        ),
        (
            "the newest three, the head among them",
            Keep {
                last: 3,
                ..none.clone()
            },
            [gone(), gone(), gone(), gone(), gone(), Last, Last, Head],
        ),
        (
            "more than there are",
            Keep {
                last: 99,
                ..none.clone()
            },
            [Last, Last, Last, Last, Last, Last, Last, Head],
        ),
        (
            "as old as the duration is young enough",
            Keep {
                within_ms: 2 * DAY,
                ..none.clone()
            },
            [gone(), gone(), gone(), gone(), Within, Within, Within, Head],
        ),
        (
            "a duration longer than time",
            Keep {
                within_ms: u64::MAX,
                ..none.clone()
            },
            [Within, Within, Within, Within, Within, Within, Within, Head],
        ),
        (
            "two hours that have one: this one and that of 10:59",
            Keep {
                hourly: 2,
                ..none.clone()
            },
            [gone(), gone(), gone(), gone(), gone(), gone(), Hourly, Head],
        ),
        (
            "hours without one do not count",
            Keep {
                hourly: 4,
                ..none.clone()
            },
            [gone(), gone(), gone(), Hourly, Hourly, gone(), Hourly, Head],
        ),
        (
            "the newest of each of three days",
            Keep {
                daily: 3,
                ..none.clone()
            },
            [gone(), gone(), Daily, gone(), Daily, gone(), gone(), Head],
        ),
        (
            "weeks begin on Monday",
            Keep {
                weekly: 3,
                ..none.clone()
            },
            [Weekly, gone(), Weekly, gone(), gone(), gone(), gone(), Head],
        ),
        (
            "the first part that keeps it is the reason",
            Keep {
                last: 2,
                within_ms: 2 * HOUR,
                hourly: 0,
                daily: 2,
                weekly: 2,
            },
            [gone(), gone(), Weekly, gone(), Daily, Within, Last, Head],
        ),
    ];
    for (what, keep, expected) in cases {
        let rules = policies([(Scope::All, keep)]);
        assert_eq!(reasons(&rules, &history(1, &ages)), expected, "{what}");
    }
}

#[test]
fn the_narrowest_rule_decides_alone() {
    let s = history(1, &[3 * DAY, 2 * DAY, 0]);
    let keep = |last| Keep {
        last,
        ..Keep::default()
    };
    // Each with the rule before it, which is broader and would keep more.
    let scopes = [
        Scope::All,
        Scope::Domain(domain("d")),
        label("env", "test"),
        Scope::Sandbox(s.id),
    ];
    for at in 0..scopes.len() {
        let rules = scopes[..=at].iter().enumerate();
        let rules = policies(rules.map(|(i, scope)| (scope.clone(), keep((at - i) as u32 * 2))));
        let expected = Reason::NotKept(scopes[at].clone());
        let found = reasons(&rules, &s);
        assert_eq!(found[..2], [expected.clone(), expected], "{:?}", scopes[at]);
    }
    // Rules for others do not count, nor does one that was taken back.
    let mut others = policies([
        (Scope::Domain(domain("other")), keep(0)),
        (label("env", "prod"), keep(0)),
        (label("test", "env"), keep(0)),
        (Scope::Sandbox(SandboxId([9; 16])), keep(0)),
        (Scope::All, keep(0)),
    ]);
    others.set(Scope::All, None);
    let no_rule = [Reason::NoRule, Reason::NoRule, Reason::Head];
    assert_eq!(reasons(&others, &s), no_rule);
    assert_eq!(reasons(&Policies::default(), &s), no_rule);
    // A sandbox without a checkpoint has no domain, and nothing to decide.
    let empty = History {
        domain: None,
        ..history(2, &[])
    };
    assert!(decisions(&others, &empty).is_empty());
}

#[test]
fn of_several_labels_the_first_in_order_decides() {
    let mut s = history(1, &[DAY, 0]);
    s.labels.insert("app".into(), "x".into());
    let rules = policies([
        (
            label("env", "test"),
            Keep {
                last: 9,
                ..Keep::default()
            },
        ),
        (label("app", "x"), Keep::default()),
    ]);
    assert_eq!(reasons(&rules, &s)[0], Reason::NotKept(label("app", "x")));
}

#[test]
fn no_rule_takes_what_is_stood_on_kept_or_forked_from() {
    let strict = policies([(Scope::All, Keep::default())]);
    let mut parent = history(1, &[4 * DAY, 3 * DAY, 2 * DAY, DAY, 0]);
    parent.checkpoints[1].keep = true;
    // It was rolled back: the newest is not what it stands on.
    parent.head = Some(parent.checkpoints[3].id);
    let mut fork = history(2, &[DAY, 0]);
    fork.checkpoints[0].parent = Some(parent.checkpoints[2].id);
    let gone = || Reason::NotKept(Scope::All);
    let of = |histories: &[History]| -> Vec<Vec<Reason>> {
        let plans = plan(&strict, histories, NOW).into_iter();
        plans
            .map(|p| p.decisions.into_iter().map(|d| d.reason).collect())
            .collect()
    };
    assert_eq!(
        of(&[parent.clone(), fork.clone()]),
        [
            vec![
                gone(),
                Reason::Kept,
                Reason::BranchPoint(fork.id),
                Reason::Head,
                gone()
            ],
            vec![gone(), Reason::Head],
        ]
    );
    // In whatever order they are shown.
    assert_eq!(
        of(&[fork.clone(), parent.clone()])[1],
        of(&[parent.clone(), fork.clone()])[0]
    );
    // A fork that is gone, or whose first checkpoint is, protects nothing any more.
    fork.checkpoints.remove(0);
    assert_eq!(of(&[parent.clone(), fork])[0][2], gone());
    // Of two forks of one checkpoint one is named.
    let two: Vec<History> = [2, 3]
        .map(|n| {
            let mut h = history(n, &[0]);
            h.checkpoints[0].parent = Some(parent.checkpoints[2].id);
            h
        })
        .into();
    let all: Vec<History> = std::iter::once(parent).chain(two.clone()).collect();
    assert_eq!(of(&all)[0][2], Reason::BranchPoint(two[0].id));
}

#[test]
fn clocks_that_are_wrong_keep_more_never_less() {
    let within = policies([(
        Scope::All,
        Keep {
            within_ms: HOUR,
            ..Keep::default()
        },
    )]);
    let mut s = history(1, &[DAY, 0, 0]);
    // From the future, and from before time.
    s.checkpoints[1].created_ms = u64::MAX;
    s.checkpoints[0].created_ms = 0;
    let gone = Reason::NotKept(Scope::All);
    assert_eq!(reasons(&within, &s), [gone, Reason::Within, Reason::Head]);
    let early = plan(&within, std::slice::from_ref(&s), 0);
    assert_eq!(early[0].removed().count(), 0);
    let weekly = policies([(
        Scope::All,
        Keep {
            weekly: 9,
            ..Keep::default()
        },
    )]);
    assert_eq!(
        reasons(&weekly, &s),
        [Reason::Weekly, Reason::Weekly, Reason::Head]
    );
}
