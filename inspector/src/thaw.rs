//! Whether anything ran after a thaw, decided from three readings. Pure; the readings are made in [`crate::watch`].
//!
//! # What is asked
//! A dump of the processes interrupts every thread, and the thaw lets each find back into what it waited for. That moves the scheduler's
//! counters of all of them, so [`TaskTable::ran_since`] cannot tell an idle server from a busy one, and would have it dumped at every turn.
//! The question is: *is the dump still as good as one taken now?*
//!
//! # The readings
//! - **F**, frozen, after the dump: all threads with the registers they will return to user mode with. In a system call these hold its number
//!   (`orig_ax`, negative outside) and its result (`ax`).
//! - **A**, later, after the thaw: the same, with `nvcsw`, the count of voluntary context switches.
//! - **C**, read after A: for each thread, how many system calls it entered and how many signals were delivered to it since before F; of the first call the number, place
//!   (`ip`, behind the two bytes of the instruction), stack (`sp`), arguments and `nvcsw` at the entry. C only grows, so what it does not show had not happened at A.
//!
//! # Why a thread did not run
//! A thread counts as not having run in five cases only. In all of them but the last no signal was delivered to it, so that it goes on exactly where its registers say.
//!
//! 1. *Its call was restarted.* After `-ERESTARTSYS` and its like the next instruction is the call itself: the kernel turns the instruction pointer back by two bytes, or CRIU has
//!    done so already and put the number into `ax`. C shows one call, with that number (`restart_syscall` after `-ERESTART_RESTARTBLOCK`), from that place and stack, and A shows the thread asleep
//!    in it. So the first instruction executed was that call; and had the call come back, the thread could not be in a call again without a second entry.
//! 2. *Its call came back with `-EINTR` and was made again* ("resumed"). Some calls are never restarted (`epoll_wait`), and others not by CRIU (`nanosleep`, `poll`, `futex` with a time limit).
//!    C shows one call, the same one from the same place and stack, and A shows the thread asleep in it. Here instructions in user mode *were* executed. The dump is as good as a new one all the same: it
//!    holds these very registers and this memory, so a restored thread executes the same instructions. Nobody can have noticed what they did, because the thread entered no call but one that
//!    waits, and what they put into its memory is put there again. Memory shared with others is no exception while those are in the same dump
//!    and did not run; a shared mapping of a file shows as a dirtied inode, which is the caller's to look at. These threads are listed apart ([`Thaw::Quiet`]).
//! 3. *It did not move.* F shows it in a call that has no result yet (`-ENOSYS`; freezers can stop a thread in the midst of its sleep), or A shows it stopped by job control; it
//!    entered no call, and its counters in A are those in F.
//! 4. *It had ended* in F, and still waits to be reaped in A.
//! 5. *It was stopped again.* CRIU takes a stopped thread out of its stop, and lets go of it with a signal that stops it anew: F shows that signal waiting, A the thread stopped, without a call
//!    and with the registers that it had within one. Those of a thread that returned to user mode would be others, whatever brought it back.
//!
//! "Asleep" means: interruptibly, not on a CPU, nor queued for one, nor frozen; disk sleep ends by itself, so it is waited for. In 1 and 2 two more things are asked:
//! - The call is on a short list ([`waits`]) of calls that do nothing before they have something to return. A `write` into a full pipe would also sleep in the same call, with
//!   half of its data gone.
//! - The thread went to sleep exactly once since it entered the call (`nvcsw` in A is that of the entry plus one). Had anything woken it there, say a part of the data
//!   that is waited for, it would have gone to sleep a second time.
//!
//! # Why nothing else ran
//! - *User mode at the freeze* (`orig_ax` negative), or a call that was over by then (any other result): counts, even if the thread then rests in one call.
//! - *Births and ends*: the threads of A must be those of F, by number and start. One that came and went between the two is in C; a C
//!   that has no room for a thread is void. The parent's own call counts as well, unless the parent is the process left out: the sandbox's init, which starts what the host asks for.
//! - *`vfork`, job control, tracers*: the waiting parent is in disk sleep, which no dump gets past; a stop (but see 5) or a continuation is a delivered signal; a tracer has to enter calls.
//! - *Timers*: one that fired before A left a delivered signal, a second call, or a second sleep.
//! - *Page faults* that wait are disk sleep, or leave the thread outside of any call (`orig_ax` in A).
//! - *Calls refused by seccomp* are not counted but have no effect, and the restart that has to come first is counted. (A supervisor outside of the sandbox that answers
//!   calls in its stead is not foreseen.)
//! - *32-bit code* has other numbers and always counts, as does every program on another architecture.
//!
//! # What this does not see
//! State that changes while no thread wakes: what init or the host puts into a pipe or terminal that nobody reads, a connection that nobody accepts, a blocked signal. All of these come from
//! outside of the sandbox and are known to whoever sent them; [`TaskTable::ran_since`] does not see them either.
//!
//! # Afterwards
//! A is a reading of sleeping threads: whatever they do later moves their counters, so A is the baseline for the next [`TaskTable::ran_since`]. A timer that fires
//! after A counts then. In every doubt a thread ran.

use std::collections::{HashMap, HashSet};

use crate::calls::TaskCalls;
use crate::raw::Task;
use crate::tasks::{TaskInfo, TaskTable};

/// What is known some time after a thaw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Thaw {
    /// Nothing ran so far, but not all threads are back at rest: ask again in a moment.
    Pending,
    /// No process ran since the dump, and all threads are at rest. Final.
    Quiet {
        /// The baseline for the next [`TaskTable::ran_since`]. It holds all tasks, also those of the process left out.
        tasks: TaskTable,
        /// Threads whose interrupted call came back with `EINTR` and that made it again without any other: they executed
        /// instructions, but a restored thread executes the same ones, and nobody can have noticed. As of `tasks`.
        resumed: Vec<TaskInfo>,
    },
    /// Something ran, or that cannot be ruled out. Final; not all that ran need be listed.
    Ran(Vec<ThawRan>),
}

/// A task that ran after a thaw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThawRan {
    /// The task as of the last reading; none where the doubt is about all of them, or where it came and went unread.
    pub task: Option<TaskInfo>,
    /// Why it counts.
    pub because: ThawBecause,
}

/// Why a task counts as having run after a thaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThawBecause {
    /// It was born after the dump.
    New,
    /// It ended after the dump.
    Gone,
    /// It was not at rest when the watch began.
    NotFrozen,
    /// It was in user mode when it was frozen.
    UserMode,
    /// Its system call was over when it was frozen.
    CallOver,
    /// Its system call is not one of those known to do nothing but wait.
    MayAct,
    /// A signal was delivered to it.
    Signal,
    /// It made other system calls than the interrupted one.
    Called,
    /// It is back in its call, but was woken in it, or moved in another way.
    Moved,
    /// It is not in 64-bit code on x86-64, the only one whose registers are understood.
    Unknown,
    /// Not everything could be counted.
    Doubt,
}

const EINTR: i64 = -4;
const ENOSYS: i64 = -38;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Number of `restart_syscall` on x86-64.
const RESTART_SYSCALL: i64 = 219;

/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// `TASK_INTERRUPTIBLE`.
const INTERRUPTIBLE: u32 = 0x1;
/// `__TASK_STOPPED`.
const STOPPED: u32 = 0x4;
/// The states a resting thread must not have besides: uninterruptible, traced, parked, dead, waking, frozen.
const NOT_RESTING: u32 = 0x2 | 0x8 | 0x40 | 0x80 | 0x200 | 0x8000;

/// Whether a system call (by its number on x86-64) does nothing but wait before it has something to return.
fn waits(nr: i64, si: u64, dx: u64, r10: u64) -> bool {
    const MSG_WAITALL: u64 = 0x100;
    match nr {
        // read, readv, poll, ppoll, select, pselect6
        0 | 19 | 7 | 271 | 23 | 270 => true,
        // epoll_wait, epoll_pwait, epoll_pwait2
        232 | 281 | 441 => true,
        // pause, rt_sigsuspend, rt_sigtimedwait, nanosleep, clock_nanosleep, and what some are restarted by
        34 | 130 | 128 | 35 | 230 | RESTART_SYSCALL => true,
        // wait4, waitid, accept, accept4
        61 | 247 | 43 | 288 => true,
        // recvfrom, recvmsg: not those that collect
        45 => r10 & MSG_WAITALL == 0,
        47 => dx & MSG_WAITALL == 0,
        // futex: FUTEX_WAIT and FUTEX_WAIT_BITSET, not the locks
        202 => matches!(si & 0x7f, 0 | 9),
        // futex_waitv, futex_wait
        449 | 455 => true,
        _ => false,
    }
}

/// What the readings say of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// It did not run and rests.
    Rests,
    /// As that, in the second of the module's cases.
    Resumed,
    /// It has not run so far.
    Pending,
    Ran(ThawBecause),
}

/// Decides from the readings F (`before`), C (`calls`) and A (`now`), leaving out one process.
pub(crate) fn judge(
    before: &[Task],
    calls: &HashMap<u32, TaskCalls>,
    now: &[Task],
    ignore_tgid: u32,
) -> Thaw {
    let mut were: HashMap<(u32, u64), &Task> = before
        .iter()
        .filter(|t| t.tgid != ignore_tgid)
        .map(|t| ((t.tid, t.start_boottime), t))
        .collect();
    let mut known: HashSet<u32> = were.keys().map(|(tid, _)| *tid).collect();
    let (mut ran, mut resumed, mut pending) = (Vec::new(), Vec::new(), false);
    for task in now.iter().filter(|t| t.tgid != ignore_tgid) {
        known.insert(task.tid);
        let said = match were.remove(&(task.tid, task.start_boottime)) {
            None => Said::Ran(ThawBecause::New),
            Some(was) => thread(
                was,
                &calls.get(&task.tid).copied().unwrap_or_default(),
                task,
            ),
        };
        match said {
            Said::Rests => {}
            Said::Resumed => resumed.push(TaskInfo::from(task.clone())),
            Said::Pending => pending = true,
            Said::Ran(because) => ran.push(ThawRan {
                task: Some(task.clone().into()),
                because,
            }),
        }
    }
    ran.extend(were.into_values().map(|gone| ThawRan {
        task: Some(gone.clone().into()),
        because: ThawBecause::Gone,
    }));
    // Born and gone between the readings.
    let strangers = calls
        .iter()
        .filter(|(tid, c)| c.tgid != ignore_tgid && !known.contains(*tid));
    ran.extend(strangers.map(|_| ThawRan {
        task: None,
        because: ThawBecause::New,
    }));
    if !ran.is_empty() {
        Thaw::Ran(ran)
    } else if pending {
        Thaw::Pending
    } else {
        let tasks = now.iter().cloned().map(TaskInfo::from).collect();
        Thaw::Quiet {
            tasks: TaskTable { tasks },
            resumed,
        }
    }
}

fn thread(was: &Task, did: &TaskCalls, now: &Task) -> Said {
    if was.exit_state != 0 {
        return Said::Rests;
    }
    if now.exit_state != 0 {
        return Said::Ran(ThawBecause::Gone);
    }
    if was.running != 0 {
        return Said::Ran(ThawBecause::NotFrozen);
    }
    // Stopped before the dump, which had to let go of the stop and asked for it again; and that came before it was back in user mode.
    let stopped = now.running == 0 && now.state & STOPPED != 0 && now.state & NOT_RESTING == 0;
    let inside = was.regs.is_some_and(|r| r.orig_ax >= 0) && was.regs == now.regs;
    if was.stopping && did.count == 0 && stopped && inside {
        return Said::Rests;
    }
    if did.signals > 0 {
        return Said::Ran(ThawBecause::Signal);
    }
    let still = did.count == 0 && counters(was) == counters(now) && now.running == 0;
    if still && now.state & STOPPED != 0 && now.state & NOT_RESTING == 0 {
        return Said::Rests;
    }
    let Some(at) = was.regs else {
        return Said::Ran(ThawBecause::Unknown);
    };
    if at.orig_ax < 0 {
        return Said::Ran(ThawBecause::UserMode);
    }
    if at.ax == ENOSYS {
        return match (did.count, rests(now)) {
            (0, true) if still && now.regs == was.regs => Said::Rests,
            (0, false) => Said::Pending,
            (0, true) => Said::Ran(ThawBecause::Moved),
            _ => Said::Ran(ThawBecause::Called),
        };
    }
    // The one call it has to enter, and from where, before it is at rest again.
    let (nr, ip, resumed) = match at.ax {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => (at.orig_ax, at.ip, false),
        ERESTART_RESTARTBLOCK => (RESTART_SYSCALL, at.ip, false),
        EINTR => (at.orig_ax, at.ip, true),
        ax if ax == at.orig_ax => (ax, at.ip.wrapping_add(SYSCALL_LEN), false),
        _ => return Said::Ran(ThawBecause::CallOver),
    };
    if !waits(at.orig_ax, at.si, at.dx, at.r10) {
        return Said::Ran(ThawBecause::MayAct);
    }
    let call = &did.first;
    match did.count {
        0 => return Said::Pending,
        1 if (call.nr, call.ip, call.sp) == (nr, ip, at.sp) => {}
        _ => return Said::Ran(ThawBecause::Called),
    }
    if !waits(call.nr, call.si, call.dx, call.r10) {
        return Said::Ran(ThawBecause::MayAct);
    }
    if !rests(now) || now.nvcsw <= call.nvcsw {
        return Said::Pending;
    }
    let there = now
        .regs
        .is_some_and(|r| (r.orig_ax, r.ip, r.sp) == (call.nr, call.ip, call.sp));
    match (there && now.nvcsw == call.nvcsw + 1, resumed) {
        (true, false) => Said::Rests,
        (true, true) => Said::Resumed,
        (false, _) => Said::Ran(ThawBecause::Moved),
    }
}

/// Asleep in a way that only an event ends.
fn rests(task: &Task) -> bool {
    task.running == 0 && task.state & INTERRUPTIBLE != 0 && task.state & NOT_RESTING == 0
}

fn counters(task: &Task) -> (u64, u64, u64, u64) {
    (task.sum_exec_runtime, task.nvcsw, task.nivcsw, task.pcount)
}

#[cfg(test)]
#[path = "thaw_tests.rs"]
mod tests;
