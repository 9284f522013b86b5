//! The rules of verdicts, row by row, and that knowing less never captures less. The turn machine and the queue.

use tidepool_proto::TurnNo;
use tidepool_proto::turn::Verdict;
use tidepool_scheduler_core::engine::{Engine, Job, JobId, Limits, Rank, Stage};
use tidepool_scheduler_core::turn::{Action, Input, MAX_WAITING, Refusal, State, TurnMachine};
use tidepool_scheduler_core::verdict::{
    Decision, FilesSeen, Observation, Previous, ProcessPart, ProcessesSeen, Seen, decide, net,
};

/// Nothing happened, and the last checkpoint holds what lives.
fn quiet(alive: u64) -> Observation {
    Observation {
        files: FilesSeen::None,
        processes: ProcessesSeen {
            alive: Some(alive),
            ran: Some(0),
            born: Some(0),
            exited: Some(0),
            lost: false,
        },
        open_dirty: Seen::No,
        tmpfs: Seen::No,
        held: Seen::No,
        previous: match alive {
            0 => Previous::FilesOnly,
            n => Previous::WithProcesses(n as u32),
        },
        forced: None,
    }
}

fn row(what: &str, seen: Observation, verdict: Verdict, part: ProcessPart, walk: bool) {
    let d = decide(&seen);
    assert_eq!(
        (d.verdict, d.processes, d.full_walk),
        (verdict, part, walk),
        "{what}: {:?}",
        d.reasons
    );
}

#[test]
fn the_rules_row_by_row() {
    use ProcessPart::{Drop, Dump, Keep};
    use Verdict::{Clean, Files, Full, Processes};
    type Change = fn(&mut Observation);
    let inodes: Change = |o| o.files = FilesSeen::Inodes(3);
    let rows: &[(&str, u64, Change, Verdict, ProcessPart, bool)] = &[
        ("nothing, only the init", 0, |_| {}, Clean, Keep, false),
        ("nothing, an idle server", 2, |_| {}, Clean, Keep, false),
        (
            "no inode",
            0,
            |o| o.files = FilesSeen::Inodes(0),
            Clean,
            Keep,
            false,
        ),
        ("files, only the init", 0, inodes, Files, Keep, false),
        (
            "files, an idle server that has none of them",
            2,
            inodes,
            Files,
            Keep,
            false,
        ),
        (
            "overflow",
            0,
            |o| o.files = FilesSeen::Everything("overflow".into()),
            Files,
            Keep,
            true,
        ),
        (
            "a server ran",
            2,
            |o| o.processes.ran = Some(1),
            Processes,
            Dump,
            false,
        ),
        (
            "a process was born and stayed",
            2,
            |o| o.processes.born = Some(1),
            Processes,
            Dump,
            false,
        ),
        (
            "one of two ended",
            1,
            |o| o.processes.exited = Some(1),
            Processes,
            Dump,
            false,
        ),
        (
            "a server wrote",
            1,
            |o| {
                o.files = FilesSeen::Inodes(1);
                o.processes.ran = Some(1);
            },
            Full,
            Dump,
            false,
        ),
        (
            "a file that an idle server holds changed",
            1,
            |o| {
                o.files = FilesSeen::Inodes(1);
                o.open_dirty = Seen::Yes;
            },
            Full,
            Dump,
            false,
        ),
        (
            "it is unknown whether a server holds what changed",
            1,
            |o| {
                o.files = FilesSeen::Inodes(1);
                o.open_dirty = Seen::Unknown;
            },
            Full,
            Dump,
            false,
        ),
        (
            "a held file matters only if it changed",
            1,
            |o| o.open_dirty = Seen::Unknown,
            Clean,
            Keep,
            false,
        ),
        (
            "shared memory changed",
            1,
            |o| o.tmpfs = Seen::Yes,
            Processes,
            Dump,
            false,
        ),
        (
            "shared memory unknown",
            1,
            |o| o.tmpfs = Seen::Unknown,
            Processes,
            Dump,
            false,
        ),
        (
            "somebody wrote into a pipe that an idle process holds",
            1,
            |o| o.held = Seen::Yes,
            Processes,
            Dump,
            false,
        ),
        (
            "what processes hold is unknown",
            1,
            |o| o.held = Seen::Unknown,
            Processes,
            Dump,
            false,
        ),
        (
            "events were lost, processes live",
            1,
            |o| o.processes.lost = true,
            Processes,
            Dump,
            false,
        ),
        (
            "events were lost, none lives",
            0,
            |o| o.processes.lost = true,
            Clean,
            Keep,
            false,
        ),
        (
            "it is unknown what lives",
            1,
            |o| o.processes.alive = None,
            Processes,
            Dump,
            false,
        ),
        (
            "it is unknown what ran",
            1,
            |o| o.processes.ran = None,
            Processes,
            Dump,
            false,
        ),
        (
            "it is unknown what was born",
            1,
            |o| o.processes.born = None,
            Processes,
            Dump,
            false,
        ),
        (
            "it is unknown what ended",
            1,
            |o| o.processes.exited = None,
            Processes,
            Dump,
            false,
        ),
        (
            "all have ended",
            0,
            |o| {
                o.previous = Previous::WithProcesses(2);
                o.processes.exited = Some(2);
            },
            Processes,
            Drop,
            false,
        ),
        (
            "all have ended, and files changed",
            0,
            |o| {
                o.previous = Previous::WithProcesses(2);
                o.files = FilesSeen::Inodes(1);
            },
            Full,
            Drop,
            false,
        ),
        (
            "a command left a server behind",
            1,
            |o| {
                o.previous = Previous::FilesOnly;
                o.processes.born = Some(1);
            },
            Processes,
            Dump,
            false,
        ),
        (
            "a server the last checkpoint lacks",
            1,
            |o| o.previous = Previous::FilesOnly,
            Processes,
            Dump,
            false,
        ),
        (
            "the first checkpoint",
            0,
            |o| o.previous = Previous::None,
            Files,
            Keep,
            true,
        ),
        (
            "the first, with a server",
            1,
            |o| o.previous = Previous::None,
            Full,
            Dump,
            true,
        ),
        (
            "asked for by hand",
            0,
            |o| o.forced = Some("by hand".into()),
            Files,
            Keep,
            false,
        ),
        (
            "asked for by hand, with a server",
            1,
            |o| o.forced = Some("by hand".into()),
            Full,
            Dump,
            false,
        ),
    ];
    for (what, alive, change, verdict, part, walk) in rows {
        let mut seen = quiet(*alive);
        change(&mut seen);
        row(what, seen, *verdict, *part, *walk);
    }
    let unknown = decide(&Observation::default());
    assert_eq!((unknown.verdict, unknown.full_walk), (Verdict::Full, true));
    assert!(!unknown.reasons.is_empty());
}

#[test]
fn no_net_change_of_files_is_no_files() {
    let decision = |verdict, processes| Decision {
        verdict,
        processes,
        full_walk: false,
        reasons: Vec::new(),
    };
    for (verdict, part, changed, after) in [
        (Verdict::Files, ProcessPart::Keep, false, Verdict::Clean),
        (Verdict::Files, ProcessPart::Keep, true, Verdict::Files),
        (Verdict::Full, ProcessPart::Dump, false, Verdict::Processes),
        (Verdict::Full, ProcessPart::Drop, true, Verdict::Full),
        (Verdict::Clean, ProcessPart::Keep, true, Verdict::Clean),
    ] {
        assert_eq!(net(&decision(verdict, part), changed), after);
    }
}

/// Every observation there is, up to numbers.
fn observations() -> Vec<Observation> {
    let mut out = Vec::new();
    let files = [
        FilesSeen::None,
        FilesSeen::Inodes(1),
        FilesSeen::Everything("x".into()),
    ];
    let counts = [Some(0), Some(1), None];
    let seens = [Seen::No, Seen::Yes, Seen::Unknown];
    let previous = [
        Previous::FilesOnly,
        Previous::WithProcesses(1),
        Previous::None,
    ];
    for files in &files {
        for alive in counts {
            for ran in counts {
                for born in counts {
                    for exited in counts {
                        for (open_dirty, tmpfs) in seens
                            .iter()
                            .flat_map(|a| seens.iter().map(move |b| (*a, *b)))
                        {
                            for previous in previous {
                                for (lost, held, forced) in [
                                    (false, Seen::No, None),
                                    (true, Seen::No, None),
                                    (false, Seen::Yes, None),
                                    (false, Seen::No, Some("x".to_owned())),
                                ] {
                                    out.push(Observation {
                                        files: files.clone(),
                                        processes: ProcessesSeen {
                                            alive,
                                            ran,
                                            born,
                                            exited,
                                            lost,
                                        },
                                        open_dirty,
                                        tmpfs,
                                        held,
                                        previous,
                                        forced,
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    out
}

#[test]
fn knowing_less_never_captures_less() {
    let covers = |more: &Decision, less: &Decision| {
        (more.verdict.files() || !less.verdict.files())
            && (more.full_walk || !less.full_walk)
            && match (less.processes, more.processes) {
                (ProcessPart::Dump, more) => more == ProcessPart::Dump,
                // An image is dropped only where it is known that nothing lives; a dump in doubt is more.
                (ProcessPart::Drop, more) => more != ProcessPart::Keep,
                (ProcessPart::Keep, _) => true,
            }
    };
    type Worse = fn(&mut Observation);
    let worse: &[(&str, Worse)] = &[
        ("files", |o| {
            o.files = match o.files {
                FilesSeen::None => FilesSeen::Inodes(1),
                _ => FilesSeen::Everything("x".into()),
            }
        }),
        ("alive", |o| o.processes.alive = None),
        ("ran", |o| o.processes.ran = None),
        ("born", |o| o.processes.born = None),
        ("exited", |o| o.processes.exited = None),
        ("lost", |o| o.processes.lost = true),
        ("open", |o| o.open_dirty = Seen::Unknown),
        ("tmpfs", |o| o.tmpfs = Seen::Unknown),
        ("held", |o| o.held = Seen::Unknown),
        ("forced", |o| o.forced = Some("x".into())),
        ("previous", |o| o.previous = Previous::None),
    ];
    for seen in observations() {
        let before = decide(&seen);
        for (what, change) in worse {
            let mut less_known = seen.clone();
            change(&mut less_known);
            // Without an earlier checkpoint there is no image to drop: the new manifest has none by itself.
            if *what == "previous" && before.processes == ProcessPart::Drop {
                continue;
            }
            let after = decide(&less_known);
            assert!(
                covers(&after, &before),
                "{what}: {seen:?}\n{before:?}\n{after:?}"
            );
        }
    }
}

fn actions(m: &mut TurnMachine) -> Vec<Action> {
    std::iter::from_fn(|| m.poll_action()).collect()
}

fn exec(key: &str) -> Input {
    Input::Exec { key: key.into() }
}

#[test]
fn a_turn_goes_its_way_and_the_next_waits() {
    let mut m = TurnMachine::new(TurnNo(1), 0);
    m.handle(1, exec("a"));
    m.handle(2, exec("b"));
    let (turn, key) = (TurnNo(1), "a".to_owned());
    assert_eq!(
        actions(&mut m),
        [Action::Run {
            turn,
            key: key.clone()
        }]
    );
    assert_eq!(m.waiting(), 1);
    m.handle(3, Input::Ended);
    assert_eq!(actions(&mut m), [Action::Observe { turn, forced: None }]);
    m.handle(4, Input::Decided { capture: true });
    assert_eq!(actions(&mut m), [Action::Capture { turn }]);
    m.handle(5, Input::Captured(Ok(())));
    assert_eq!(
        actions(&mut m),
        [Action::Commit {
            turn,
            checkpoint: true
        }]
    );
    assert_eq!(m.since(), 5);
    m.handle(6, Input::Committed(Ok(())));
    let result = Ok(());
    assert_eq!(
        actions(&mut m),
        [
            Action::Finish { turn, key, result },
            Action::Run {
                turn: TurnNo(2),
                key: "b".into()
            }
        ]
    );
    // A clean turn commits its record only.
    m.handle(7, Input::Ended);
    m.handle(8, Input::Decided { capture: false });
    let turn = TurnNo(2);
    assert_eq!(
        actions(&mut m),
        [
            Action::Observe { turn, forced: None },
            Action::Commit {
                turn,
                checkpoint: false
            }
        ]
    );
}

#[test]
fn a_failed_capture_forces_the_next_boundary() {
    let mut m = TurnMachine::new(TurnNo(5), 0);
    let forced = |m: &mut TurnMachine| {
        actions(m).into_iter().find_map(|a| match a {
            Action::Observe { forced, .. } => Some(forced),
            _ => None,
        })
    };
    for (n, fail_commit) in [false, true].into_iter().enumerate() {
        m.handle(0, exec(&format!("fails{n}")));
        m.handle(0, Input::Ended);
        m.handle(0, Input::Decided { capture: true });
        match fail_commit {
            false => m.handle(0, Input::Captured(Err("no CRIU".into()))),
            true => {
                m.handle(0, Input::Captured(Ok(())));
                m.handle(0, Input::Committed(Err("no store".into())));
            }
        }
        let all = actions(&mut m);
        let failed = all
            .iter()
            .any(|a| matches!(a, Action::Finish { result: Err(_), .. }));
        assert!(failed, "{all:?}");
        assert_eq!(*m.state(), State::Idle);
        m.handle(
            0,
            Input::Checkpoint {
                key: format!("hand{n}"),
            },
        );
        let why = forced(&mut m).unwrap().unwrap();
        assert!(why.contains(["no CRIU", "no store"][n]), "{why}");
        // A commit that works clears it.
        m.handle(0, Input::Decided { capture: true });
        m.handle(0, Input::Captured(Ok(())));
        m.handle(0, Input::Committed(Ok(())));
        actions(&mut m);
        m.handle(
            0,
            Input::Checkpoint {
                key: format!("again{n}"),
            },
        );
        assert_eq!(forced(&mut m), Some(None));
        m.handle(0, Input::Decided { capture: false });
        m.handle(0, Input::Committed(Ok(())));
        actions(&mut m);
    }
}

#[test]
fn refusals_and_stray_inputs() {
    let mut m = TurnMachine::new(TurnNo(1), 0);
    m.handle(0, exec("a"));
    m.handle(0, exec("a"));
    m.handle(0, exec("b"));
    m.handle(0, exec("b"));
    let refused = |m: &mut TurnMachine| -> Vec<Refusal> {
        let all = actions(m).into_iter();
        all.filter_map(|a| match a {
            Action::Refuse { why, .. } => Some(why),
            _ => None,
        })
        .collect()
    };
    assert_eq!(refused(&mut m), [Refusal::Duplicate, Refusal::Duplicate]);
    let running = m.state().clone();
    for stray in [
        Input::Decided { capture: true },
        Input::Captured(Ok(())),
        Input::Committed(Ok(())),
    ] {
        m.handle(0, stray);
        assert_eq!(*m.state(), running);
    }
    m.handle(0, Input::Cancel { key: "b".into() });
    assert_eq!(m.waiting(), 0);
    for n in 0..=MAX_WAITING {
        m.handle(0, exec(&format!("w{n}")));
    }
    assert_eq!(refused(&mut m), [Refusal::TooMany]);
    m.handle(9, Input::Stop);
    assert_eq!(refused(&mut m).len(), MAX_WAITING);
    m.handle(9, exec("late"));
    assert_eq!(refused(&mut m), [Refusal::Stopped]);
    m.handle(9, Input::Ended);
    assert_eq!(*m.state(), State::Stopped);
}

fn job(id: u64, tenant: &str, rank: Rank) -> Job {
    Job {
        id: JobId(id),
        tenant: tenant.into(),
        rank,
    }
}

#[test]
fn the_queue_keeps_limits_and_order() {
    let limits = Limits {
        capture: 1,
        cut: 1,
        upload: 2,
        commit: 2,
        queued: 4,
    };
    let mut e = Engine::new(limits);
    e.push(job(1, "a", Rank::Bulk)).unwrap();
    e.push(job(2, "a", Rank::Due(900))).unwrap();
    e.push(job(3, "a", Rank::Due(500))).unwrap();
    e.push(job(4, "a", Rank::Waiting)).unwrap();
    assert!(e.push(job(5, "a", Rank::Waiting)).is_err());
    let mut order = Vec::new();
    let mut running: Vec<(JobId, Stage)> = Vec::new();
    while !e.is_empty() {
        while let Some((id, stage)) = e.poll(100) {
            if stage == Stage::Capture {
                order.push(id.0);
            }
            running.push((id, stage));
            for (stage, most) in [
                (Stage::Capture, 1),
                (Stage::Cut, 1),
                (Stage::Upload, 2),
                (Stage::Commit, 2),
            ] {
                assert!(running.iter().filter(|(_, s)| *s == stage).count() <= most);
            }
        }
        let (id, _) = running.remove(0);
        e.done(id, true);
    }
    assert_eq!(order, [4, 3, 2, 1]);
    // What is due by now waits as much as what waits, and came first.
    e.push(job(1, "a", Rank::Due(50))).unwrap();
    e.push(job(2, "a", Rank::Waiting)).unwrap();
    assert_eq!(e.poll(100), Some((JobId(1), Stage::Capture)));
    // A failed job leaves.
    e.done(JobId(1), false);
    assert_eq!(e.len(), 1);
    assert_eq!(e.load(Stage::Capture), (1, 0));
}

#[test]
fn tenants_take_turns() {
    let mut e = Engine::new(Limits {
        capture: 1,
        ..Limits::for_cores(4)
    });
    for n in 0..20 {
        e.push(job(n, "greedy", Rank::Waiting)).unwrap();
    }
    for n in 0..3 {
        e.push(job(100 + n, "modest", Rank::Waiting)).unwrap();
    }
    let mut modest_at = Vec::new();
    for n in 0.. {
        let Some((id, _)) = e.poll(0) else { break };
        if id.0 >= 100 {
            modest_at.push(n);
        }
        // Leaves after its capture.
        e.done(id, false);
    }
    assert_eq!(modest_at.len(), 3);
    assert!(modest_at[2] <= 6, "{modest_at:?}");
}
