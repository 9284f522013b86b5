//! Which tasks of a sandbox ran: readings of the task iterator, and the comparison of two.
//!
//! A task has run between two readings when its scheduler counters moved. A task on a CPU, or about to get one, moves them only at the next tick
//! or switch; so a task that was runnable at either reading counts as having run.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// One task at the moment of a reading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskInfo {
    /// Thread id on the host.
    pub tid: u32,
    /// Process id on the host.
    pub tgid: u32,
    /// Thread id in the sandbox's pid namespace.
    pub ns_tid: u32,
    /// Process id in the sandbox's pid namespace.
    pub ns_tgid: u32,
    /// Process id of the parent, on the host.
    pub parent_tgid: u32,
    /// Start, in nanoseconds since boot; with `tid` an identity that is not reused.
    pub start_boottime_ns: u64,
    /// Name, at most 15 bytes.
    pub comm: String,
    /// Whether it has ended and only waits to be reaped.
    pub exited: bool,
    /// Whether it was on a CPU or queued for one.
    pub running: bool,
    /// Nanoseconds on a CPU.
    pub sum_exec_runtime_ns: u64,
    /// Voluntary context switches.
    pub nvcsw: u64,
    /// Involuntary context switches.
    pub nivcsw: u64,
    /// Times it got a CPU; 0 on kernels that do not count it.
    pub pcount: u64,
}

/// All tasks of a sandbox, in the order of their host thread ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskTable {
    /// The tasks.
    pub tasks: Vec<TaskInfo>,
}

/// Why a task counts as having run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RanBecause {
    /// It is in the later reading only.
    New,
    /// It is in the earlier reading only.
    Gone,
    /// Its counters, its state or its name differ.
    Moved,
    /// Its counters are the same, but it was on a CPU or queued for one at a reading.
    Running,
}

/// A task that ran between two readings, as of the later one (the earlier one if it is gone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRan {
    /// The task.
    pub task: TaskInfo,
    /// Why it counts.
    pub because: RanBecause,
}

impl TaskTable {
    /// The tasks that ran, came or went since `earlier`. Empty means that no task of the sandbox has
    /// executed an instruction between the two readings, except such as were born and gone in
    /// between without a parent inside (an exec by the host): the process events show those.
    #[must_use]
    pub fn ran_since(&self, earlier: &TaskTable) -> Vec<TaskRan> {
        let mut before: HashMap<(u32, u64), &TaskInfo> = earlier
            .tasks
            .iter()
            .map(|t| ((t.tid, t.start_boottime_ns), t))
            .collect();
        let mut ran = Vec::new();
        for now in &self.tasks {
            let because = match before.remove(&(now.tid, now.start_boottime_ns)) {
                None => RanBecause::New,
                Some(was) if was.running == now.running && was == now => {
                    if now.running {
                        RanBecause::Running
                    } else {
                        continue;
                    }
                }
                Some(was) if was.counters() == now.counters() && (was.running || now.running) => {
                    RanBecause::Running
                }
                Some(_) => RanBecause::Moved,
            };
            ran.push(TaskRan {
                task: now.clone(),
                because,
            });
        }
        let mut gone: Vec<_> = before.into_values().cloned().collect();
        gone.sort_by_key(|t| (t.tid, t.start_boottime_ns));
        ran.extend(gone.into_iter().map(|task| TaskRan {
            task,
            because: RanBecause::Gone,
        }));
        ran
    }
}

impl TaskInfo {
    fn counters(&self) -> (u64, u64, u64, u64) {
        (
            self.sum_exec_runtime_ns,
            self.nvcsw,
            self.nivcsw,
            self.pcount,
        )
    }
}

impl From<crate::raw::Task> for TaskInfo {
    fn from(raw: crate::raw::Task) -> Self {
        Self {
            tid: raw.tid,
            tgid: raw.tgid,
            ns_tid: raw.ns_tid,
            ns_tgid: raw.ns_tgid,
            parent_tgid: raw.parent_tgid,
            start_boottime_ns: raw.start_boottime,
            comm: raw.comm,
            exited: raw.exit_state != 0,
            running: raw.running != 0,
            sum_exec_runtime_ns: raw.sum_exec_runtime,
            nvcsw: raw.nvcsw,
            nivcsw: raw.nivcsw,
            pcount: raw.pcount,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(tid: u32) -> TaskInfo {
        TaskInfo {
            tid,
            tgid: tid,
            ns_tid: 1,
            ns_tgid: 1,
            parent_tgid: 1,
            start_boottime_ns: 1000,
            comm: "sleep".into(),
            exited: false,
            running: false,
            sum_exec_runtime_ns: 5,
            nvcsw: 1,
            nivcsw: 1,
            pcount: 2,
        }
    }

    fn ran(earlier: Vec<TaskInfo>, later: Vec<TaskInfo>) -> Vec<(u32, RanBecause)> {
        TaskTable { tasks: later }
            .ran_since(&TaskTable { tasks: earlier })
            .into_iter()
            .map(|r| (r.task.tid, r.because))
            .collect()
    }

    #[test]
    fn a_sleeping_task_has_not_run() {
        assert_eq!(ran(vec![task(7)], vec![task(7)]), []);
    }

    #[test]
    fn every_counter_counts() {
        for change in [
            |t: &mut TaskInfo| t.sum_exec_runtime_ns += 1,
            |t: &mut TaskInfo| t.nvcsw += 1,
            |t: &mut TaskInfo| t.nivcsw += 1,
            |t: &mut TaskInfo| t.pcount += 1,
            |t: &mut TaskInfo| t.exited = true,
            |t: &mut TaskInfo| t.comm = "cat".into(),
        ] {
            let mut later = task(7);
            change(&mut later);
            assert_eq!(ran(vec![task(7)], vec![later]), [(7, RanBecause::Moved)]);
        }
    }

    #[test]
    fn a_runnable_task_counts_even_with_equal_counters() {
        let mut on_cpu = task(7);
        on_cpu.running = true;
        let both = vec![on_cpu.clone()];
        assert_eq!(ran(both.clone(), both), [(7, RanBecause::Running)]);
        assert_eq!(
            ran(vec![task(7)], vec![on_cpu.clone()]),
            [(7, RanBecause::Running)]
        );
        assert_eq!(ran(vec![on_cpu], vec![task(7)]), [(7, RanBecause::Running)]);
    }

    #[test]
    fn a_reused_thread_id_is_another_task() {
        let mut other = task(7);
        other.start_boottime_ns = 2000;
        assert_eq!(
            ran(vec![task(7), task(8)], vec![other, task(9)]),
            [
                (7, RanBecause::New),
                (9, RanBecause::New),
                (7, RanBecause::Gone),
                (8, RanBecause::Gone)
            ]
        );
    }
}
