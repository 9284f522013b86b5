//! Watching a sandbox from before its thaw until all its threads are at rest: the readings, and their order.
//!
//! What they mean is decided in [`crate::thaw`], whose argument rests on this order: the programs are attached and the watch is entered, then the frozen tasks are read (F), and
//! only then may the caller thaw. A poll reads the tasks (A), then what was counted (C), then the tasks again: a reading that is equal to the next
//! one was not taken in the midst of a change.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::effects::SandboxSlot;
use crate::error::InspectorError;
use crate::inspector::lock;
use crate::raw::Task;
use crate::state::State;
use crate::thaw::{Thaw, ThawBecause, ThawRan, judge};

const WHAT: &str = "a thaw from work";

/// Counts what the threads of one sandbox do, from its making until it is dropped. See [`Inspector::watch_thaw`](crate::Inspector::watch_thaw).
///
/// While any watch lives, every system call of the machine costs a little more; none should outlive the first tenth of a second after its thaw by much.
#[must_use = "dropping it ends the watch"]
pub struct ThawWatch {
    state: Arc<Mutex<State>>,
    slot: SandboxSlot,
    id: u32,
    before: Vec<Task>,
    misses: u64,
}

impl fmt::Debug for ThawWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThawWatch")
            .field("slot", &self.slot)
            .field("tasks", &self.before.len())
            .finish_non_exhaustive()
    }
}

impl ThawWatch {
    pub(crate) fn begin(
        shared: &Arc<Mutex<State>>,
        slot: SandboxSlot,
    ) -> Result<Self, InspectorError> {
        let state = &mut *lock(shared);
        state.get(slot)?;
        let hooks = state.hooks(WHAT)?;
        let misses = hooks.watch_misses()?;
        let id = hooks.watch(slot.0)?;
        match hooks.tasks(slot.0) {
            Ok(before) => Ok(Self {
                state: Arc::clone(shared),
                slot,
                id,
                before,
                misses,
            }),
            Err(e) => {
                hooks.unwatch(slot.0, id);
                Err(e)
            }
        }
    }

    /// What is known by now. Call after the thaw, every millisecond or so, until the answer is final
    /// or patience ends; without a final answer everything counts as having run.
    ///
    /// Threads of `ignore_tgid` (a process id on the host; the sandbox's init, which runs for the host) are left out, but are in the
    /// baseline. A watch that a later one of the same sandbox has replaced answers that something ran.
    ///
    /// # Errors
    /// [`InspectorError::UnknownSlot`], or a failed call into the kernel.
    pub fn poll(&self, ignore_tgid: u32) -> Result<Thaw, InspectorError> {
        let state = &mut *lock(&self.state);
        state.get(self.slot)?;
        let hooks = state.hooks(WHAT)?;
        let now = hooks.tasks(self.slot.0)?;
        let calls = hooks.calls(self.slot.0, self.id)?;
        let again = hooks.tasks(self.slot.0)?;
        let Some(calls) = calls.filter(|_| hooks.watch_misses().ok() == Some(self.misses)) else {
            return Ok(Thaw::Ran(vec![ThawRan {
                task: None,
                because: ThawBecause::Doubt,
            }]));
        };
        Ok(match judge(&self.before, &calls, &now, ignore_tgid) {
            Thaw::Quiet { .. } if !same(&now, &again, ignore_tgid) => Thaw::Pending,
            known => known,
        })
    }
}

/// Whether two readings are equal in all tasks but those of one process.
fn same(a: &[Task], b: &[Task], ignore_tgid: u32) -> bool {
    let rest = |t: &&Task| t.tgid != ignore_tgid;
    a.iter().filter(rest).eq(b.iter().filter(rest))
}

impl Drop for ThawWatch {
    fn drop(&mut self) {
        if let Ok(hooks) = lock(&self.state).hooks(WHAT) {
            hooks.unwatch(self.slot.0, self.id);
        }
    }
}
