//! Every rule of the decision, one change at a time.

use super::*;
use crate::calls::Call;
use crate::raw::Registers;

const PLACE: u64 = 0x7000;
const STACK: u64 = 0x9000;
const ACCEPT4: i64 = 288;
const EPOLL_WAIT: i64 = 232;
const NANOSLEEP: i64 = 35;
const FUTEX: i64 = 202;
const INIT: u32 = 1;

#[derive(Debug)]
struct Readings {
    was: Task,
    did: TaskCalls,
    now: Task,
}

fn task(orig_ax: i64, ax: i64, ip: u64) -> Task {
    Task {
        tid: 7,
        tgid: 6,
        ns_tid: 3,
        ns_tgid: 2,
        parent_tgid: 5,
        exit_state: 0,
        running: 0,
        state: INTERRUPTIBLE,
        start_boottime: 1000,
        sum_exec_runtime: 50,
        nvcsw: 10,
        nivcsw: 3,
        pcount: 13,
        comm: "server".into(),
        regs: Some(Registers {
            orig_ax,
            ax,
            ip,
            sp: STACK,
            ..Registers::default()
        }),
        stopping: false,
    }
}

/// A thread frozen in a call with this result, that makes one call and sleeps in it.
fn case(orig_ax: i64, ax: i64, ip: u64, call: i64) -> Readings {
    let was = task(orig_ax, ax, ip);
    let mut now = task(call, ENOSYS, PLACE);
    (now.nvcsw, now.pcount, now.sum_exec_runtime) = (12, 16, 70);
    let did = TaskCalls {
        tgid: 6,
        count: 1,
        signals: 0,
        first: Call {
            nr: call,
            ip: PLACE,
            sp: STACK,
            nvcsw: 11,
            ..Call::default()
        },
    };
    Readings { was, did, now }
}

fn rewound() -> Readings {
    case(ACCEPT4, ACCEPT4, PLACE - 2, ACCEPT4)
}

/// What has to come out.
#[derive(Debug, PartialEq)]
enum Out {
    Rests,
    Resumed,
    Pending,
    Ran(Vec<ThawBecause>),
}

fn decide(r: &Readings) -> Out {
    let calls = HashMap::from([(r.was.tid, r.did)]);
    out(judge(
        std::slice::from_ref(&r.was),
        &calls,
        std::slice::from_ref(&r.now),
        INIT,
    ))
}

fn out(thaw: Thaw) -> Out {
    match thaw {
        Thaw::Pending => Out::Pending,
        Thaw::Quiet { resumed, .. } if resumed.is_empty() => Out::Rests,
        Thaw::Quiet { .. } => Out::Resumed,
        Thaw::Ran(ran) => Out::Ran(ran.iter().map(|r| r.because).collect()),
    }
}

fn ran(because: ThawBecause) -> Out {
    Out::Ran(vec![because])
}

#[test]
fn restarted_calls_are_no_run() {
    assert_eq!(decide(&rewound()), Out::Rests);
    for ax in [ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND] {
        assert_eq!(decide(&case(ACCEPT4, ax, PLACE, ACCEPT4)), Out::Rests);
    }
    assert_eq!(
        decide(&case(
            NANOSLEEP,
            ERESTART_RESTARTBLOCK,
            PLACE,
            RESTART_SYSCALL
        )),
        Out::Rests
    );
    assert_eq!(
        decide(&case(EPOLL_WAIT, EINTR, PLACE, EPOLL_WAIT)),
        Out::Resumed
    );
}

#[test]
fn another_call_place_or_stack_is_a_run() {
    let same = [
        case(ACCEPT4, ACCEPT4, PLACE - 2, ACCEPT4),
        case(ACCEPT4, ERESTARTSYS, PLACE, ACCEPT4),
        case(EPOLL_WAIT, EINTR, PLACE, EPOLL_WAIT),
        case(NANOSLEEP, ERESTART_RESTARTBLOCK, PLACE, RESTART_SYSCALL),
    ];
    for mut r in same {
        for change in [
            |c: &mut TaskCalls| c.first.nr = 0,
            |c: &mut TaskCalls| c.first.nr = -1,
            |c: &mut TaskCalls| c.first.ip += 2,
            |c: &mut TaskCalls| c.first.ip -= 2,
            |c: &mut TaskCalls| c.first.sp -= 8,
            |c: &mut TaskCalls| c.count = 2,
        ] {
            let kept = r.did;
            change(&mut r.did);
            assert_eq!(decide(&r), ran(ThawBecause::Called), "{:?}", r.did);
            r.did = kept;
        }
    }
}

#[test]
fn who_was_not_in_a_call_has_run_however_it_rests_now() {
    assert_eq!(
        decide(&case(-1, ACCEPT4, PLACE - 2, ACCEPT4)),
        ran(ThawBecause::UserMode)
    );
    // A call that was over: some bytes, an error, a connection.
    for ax in [0, 5, -11, -512 - 3] {
        assert_eq!(
            decide(&case(ACCEPT4, ax, PLACE, ACCEPT4)),
            ran(ThawBecause::CallOver)
        );
    }
    // `read`, number 0, at the end of the file returned its own number: it is not about to be made.
    assert_eq!(
        decide(&case(0, 0, PLACE, 0)),
        ran(ThawBecause::Called),
        "the next call would have to come from two bytes further"
    );
}

#[test]
fn calls_with_effects_and_unknown_ones_are_a_run() {
    // write, sendto, connect, io_uring_enter, flock, and numbers that are none
    for nr in [1, 44, 42, 426, 73, 9999, 0x4000_0000] {
        assert_eq!(
            decide(&case(nr, nr, PLACE - 2, nr)),
            ran(ThawBecause::MayAct)
        );
    }
    // The same number may mean a wait or more.
    for (si, what) in [
        (0, Out::Rests),
        (9 | 128, Out::Rests),
        (6, ran(ThawBecause::MayAct)),
    ] {
        let mut r = case(FUTEX, ERESTARTSYS, PLACE, FUTEX);
        if let Some(regs) = &mut r.was.regs {
            regs.si = si;
        }
        r.did.first.si = si;
        assert_eq!(decide(&r), what, "futex {si}");
    }
    // A resumed call may have other arguments than the interrupted one.
    let mut r = case(FUTEX, EINTR, PLACE, FUTEX);
    r.did.first.si = 6;
    assert_eq!(decide(&r), ran(ThawBecause::MayAct));
    assert!(!waits(45, 0, 0, 0x100) && waits(45, 0, 0, 0x40));
    assert!(!waits(47, 0, 0x100, 0) && waits(47, 0, 0x40, 0));
}

#[test]
fn signals_and_wakes_are_a_run() {
    let mut r = rewound();
    r.did.signals = 1;
    assert_eq!(decide(&r), ran(ThawBecause::Signal));
    let mut r = rewound();
    r.now.nvcsw += 1;
    assert_eq!(decide(&r), ran(ThawBecause::Moved));
    // Asleep in a page fault behind the call.
    let mut r = rewound();
    if let Some(regs) = &mut r.now.regs {
        regs.orig_ax = -1;
    }
    assert_eq!(decide(&r), ran(ThawBecause::Moved));
    let mut r = rewound();
    r.now.regs = None;
    assert_eq!(decide(&r), ran(ThawBecause::Moved));
}

#[test]
fn what_is_not_asleep_yet_is_waited_for() {
    let changes: [fn(&mut Readings); 7] = [
        |r| r.did.count = 0,
        |r| r.now.running = 1,
        |r| r.now.nvcsw = r.did.first.nvcsw,
        |r| r.now.state = 0x2,
        |r| r.now.state = 0x200,
        |r| r.now.state = 0x8000 | INTERRUPTIBLE,
        |r| r.now.state = 0x8,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut r = rewound();
        change(&mut r);
        assert_eq!(decide(&r), Out::Pending, "{i}");
    }
}

#[test]
fn who_did_not_move_at_all_did_not_run() {
    let frozen_asleep = || {
        let mut r = case(NANOSLEEP, ENOSYS, PLACE, NANOSLEEP);
        r.was.state = 0x8000;
        r.now = Task {
            state: INTERRUPTIBLE,
            ..r.was.clone()
        };
        r.did = TaskCalls::default();
        r
    };
    assert_eq!(decide(&frozen_asleep()), Out::Rests);
    let mut r = frozen_asleep();
    r.now.nvcsw += 1;
    assert_eq!(decide(&r), ran(ThawBecause::Moved));
    let mut r = frozen_asleep();
    r.did.count = 1;
    assert_eq!(decide(&r), ran(ThawBecause::Called));
    let mut r = frozen_asleep();
    r.now.state = 0x8000;
    assert_eq!(decide(&r), Out::Pending);
    // The same stillness means nothing for one that has to move: it has not been thawed yet.
    let mut r = rewound();
    r.now = r.was.clone();
    r.did = TaskCalls::default();
    assert_eq!(decide(&r), Out::Pending);

    // Stopped by job control, wherever it was.
    let mut r = case(-1, 0, PLACE, 0);
    r.now = Task {
        state: STOPPED,
        ..r.was.clone()
    };
    r.did = TaskCalls::default();
    assert_eq!(decide(&r), Out::Rests);
    r.now.pcount += 1;
    assert_eq!(decide(&r), ran(ThawBecause::UserMode));
}

#[test]
fn births_and_ends_are_a_run() {
    let r = rewound();
    let none = HashMap::new();
    let calls = HashMap::from([(7, r.did)]);
    let (was, now) = (vec![r.was.clone()], vec![r.now.clone()]);
    assert_eq!(out(judge(&[], &none, &now, INIT)), ran(ThawBecause::New));
    assert_eq!(out(judge(&was, &calls, &[], INIT)), ran(ThawBecause::Gone));
    // The number taken by another.
    let mut other = r.now.clone();
    other.start_boottime = 2000;
    assert_eq!(
        out(judge(&was, &calls, &[other], INIT)),
        Out::Ran(vec![ThawBecause::New, ThawBecause::Gone])
    );
    // Came and went between the readings.
    let mut both = calls.clone();
    both.insert(8, r.did);
    assert_eq!(out(judge(&was, &both, &now, INIT)), ran(ThawBecause::New));
    // What init does is not asked, and init is in the baseline.
    let mut init = r.now.clone();
    (init.tid, init.tgid, init.running) = (INIT, INIT, 1);
    both.insert(
        8,
        TaskCalls {
            tgid: INIT,
            ..r.did
        },
    );
    let now = [init, r.now.clone()];
    let Thaw::Quiet { tasks, resumed } = judge(&was, &both, &now, INIT) else {
        panic!("not quiet");
    };
    assert_eq!((tasks.tasks.len(), resumed.len()), (2, 0));

    let mut r = rewound();
    r.now.exit_state = 32;
    assert_eq!(decide(&r), ran(ThawBecause::Gone));
    r.was.exit_state = 32;
    assert_eq!(decide(&r), Out::Rests);
}

#[test]
fn what_cannot_be_read_is_a_run() {
    let mut r = rewound();
    r.was.running = 1;
    assert_eq!(decide(&r), ran(ThawBecause::NotFrozen));
    let mut r = rewound();
    r.was.regs = None;
    assert_eq!(decide(&r), ran(ThawBecause::Unknown));
}

#[test]
fn one_that_ran_outweighs_those_that_wait() {
    let (a, mut b) = (rewound(), rewound());
    b.was.tid = 8;
    b.now.tid = 8;
    let mut waiting = a.now.clone();
    waiting.running = 1;
    b.did.count = 3;
    let calls = HashMap::from([(7, a.did), (8, b.did)]);
    let thaw = judge(&[a.was, b.was], &calls, &[waiting, b.now], INIT);
    assert_eq!(out(thaw), ran(ThawBecause::Called));
}

/// Stopped in a call before the dump; let go with a stop that waits for it; stopped again.
fn stopped() -> Readings {
    let mut r = case(ACCEPT4, ERESTARTSYS, PLACE, ACCEPT4);
    r.was.stopping = true;
    r.now = Task {
        state: STOPPED,
        stopping: false,
        nvcsw: 12,
        ..r.was.clone()
    };
    r.did = TaskCalls {
        signals: 1,
        ..TaskCalls::default()
    };
    r
}

#[test]
fn what_a_dump_stops_again_rests() {
    assert_eq!(decide(&stopped()), Out::Rests);
    for (change, because) in [
        // It was not stopped when it was dumped.
        (
            (|r| r.was.stopping = false) as fn(&mut Readings),
            ThawBecause::Signal,
        ),
        // It came as far as another call, or to another place.
        (|r| r.did.count = 1, ThawBecause::Signal),
        (
            |r| r.now.regs = task(ACCEPT4, ERESTARTSYS, PLACE + 2).regs,
            ThawBecause::Signal,
        ),
        // Between two readings of user mode anything may have been done.
        (
            |r| {
                r.was.regs = task(-1, 0, PLACE).regs;
                r.now.regs = r.was.regs;
            },
            ThawBecause::Signal,
        ),
        (|r| r.now.state = INTERRUPTIBLE, ThawBecause::Signal),
        (|r| r.now.running = 1, ThawBecause::Signal),
    ] {
        let mut r = stopped();
        change(&mut r);
        assert_eq!(decide(&r), Out::Ran(vec![because]), "{r:?}");
    }
}
