//! The inspector: registrations, readings, and the argument why no change falls between two readings.
//!
//! # Why nothing is lost
//! A hook that sees an inode puts it into the log with the current epoch of its sandbox, counts that, and only then remembers it in a small cache that spares the next
//! hooks the same work (`bpf/dirty.h`). A reading begins a new epoch first, then reads the counts, then drains the log until it has all that was counted. So:
//! - A hook that ended before the reading began: it found its inode in the cache under the epoch that is over, and then the entry was logged and counted before;
//!   or it logged and counted it itself. Either way the drain has it.
//! - A hook that runs meanwhile: if it read the old epoch, what it logs is this reading's or, where it is late, the next one's, and what it leaves in the
//!   cache is never believed again. If it read the new epoch it finds nothing cached from before, so it logs the inode under the new epoch, for the next reading.
//!
//! The log is a ring that stops at an entry that is just being written, of whichever sandbox; the counts tell that, and the drain goes on until it has passed it.
//! A sandbox may put only so much into the log before somebody reads it; past that its epoch is full: it means "everything", and nothing more of it is logged.
//! What a reading cannot say is that the *store* that follows an event has happened: a task may be between
//! the hook and its copy of data. So read with the sandbox frozen, or check afterwards with [`Inspector::activity_since`] that no task ran.
//!
//! Slots are never reused; entries under a slot that is no longer registered are dropped at the next drain.
//!
//! # What a reading costs
//! Counters are plain memory; where nothing was counted nothing is drained. The log holds what the sandboxes did since anybody's last reading, each entry of
//! which is read once, so that idle sandboxes add nothing.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cells::MOST;
use crate::effects::{Effects, Mark, SandboxSlot, Target};
use crate::error::InspectorError;
use crate::load::{Hooks, kernel};
use crate::outside;
use crate::pending::{Bounds, Pending};
use crate::probes::ProbeSet;
use crate::raw::Counters;
use crate::state::{Registered, State};
use crate::support::{kernel_dev, supports};
use crate::tasks::{TaskRan, TaskTable};
use crate::watch::ThawWatch;
use crate::written::{Notices, Writes};

/// Bounds given at load.
#[derive(Clone, Debug)]
pub struct InspectorOptions {
    /// The probe set to use, or the first that can be used.
    pub probe_set: Option<ProbeSet>,
    /// Inodes that may be dirty in one sandbox between two of its readings. More means "everything". The log has twice the room, 32 bytes each, in
    /// the kernel; one sandbox gets no more than half of it between two readings of any, and the other half is for the others.
    pub max_dirty_inodes: u32,
    /// Sandboxes registered at a time, at most 2048.
    pub max_sandboxes: u32,
    /// Bytes for process events between two readings, rounded up to a power of two; an event takes 192.
    pub event_bytes: u32,
    /// Process events that may wait in this process for one sandbox.
    pub max_process_events: u32,
    /// Tasks of all sandboxes under a [`ThawWatch`] at a time together. More means that something ran. About 120 bytes of kernel memory each, when used.
    pub max_watched_tasks: u32,
    /// What processes do to uppers that this one started (and theirs, a few times removed) does not come from outside: they dump and restore
    /// sandboxes for it. What runs in a sandbox is never meant.
    pub trust_started: bool,
    /// Use the form of the programs for kernels on which the better one cannot be loaded. Only for tests.
    #[doc(hidden)]
    pub plainest_form: bool,
    /// Look for the tasks of a sandbox among all tasks of the host. Only for tests.
    #[doc(hidden)]
    pub whole_readings: bool,
    /// Do not look at what the host does to uppers. Only for tests that show what that is needed for: changes are missed.
    #[doc(hidden)]
    pub ignore_outside: bool,
    /// Tracepoints on files that are not attached to. Only for tests that show what each is needed for: changes are missed.
    #[doc(hidden)]
    pub leave_out: &'static [&'static str],
}

impl Default for InspectorOptions {
    fn default() -> Self {
        Self {
            probe_set: None,
            max_dirty_inodes: 262_144,
            max_sandboxes: MOST,
            event_bytes: 8 << 20,
            max_process_events: 131_072,
            max_watched_tasks: 65_536,
            trust_started: false,
            plainest_form: false,
            whole_readings: false,
            ignore_outside: false,
            leave_out: &[],
        }
    }
}

/// The eBPF programs and what they saw: one per host process. They are detached when it and all its watches are dropped.
pub struct Inspector {
    state: Arc<Mutex<State>>,
}

/// What a sandbox did since a reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// Tasks that ran, came or went.
    pub ran: Vec<TaskRan>,
    /// Inodes were dirtied, or that cannot be ruled out.
    pub dirtied: bool,
    /// Processes were born, started programs or ended.
    pub process_events: bool,
    /// The later reading of the tasks.
    pub tasks: TaskTable,
}

impl Activity {
    /// Nothing happened at all: what was captured meanwhile is one consistent state.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.ran.is_empty() && !self.dirtied && !self.process_events
    }
}

impl fmt::Debug for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inspector")
            .field("registered", &self.lock().registered.len())
            .finish_non_exhaustive()
    }
}

impl Inspector {
    /// Loads the programs of the probe set asked for, or of the first that can be used here (about 100 ms).
    ///
    /// # Errors
    /// [`InspectorError::Unsupported`] with a sentence on what the kernel lacks or forbids; never where no probe set is asked for, since `walk` needs nothing.
    pub fn load(options: &InspectorOptions) -> Result<Self, InspectorError> {
        let mut fallbacks = Vec::new();
        for set in ProbeSet::ALL {
            if options.probe_set.is_some_and(|wanted| wanted != set) {
                continue;
            }
            let hooks = match set {
                ProbeSet::Walk => None,
                _ => match Hooks::load(set, options) {
                    Ok(hooks) => Some(hooks),
                    Err(e) if options.probe_set.is_some() => return Err(e),
                    Err(e) => {
                        let why = format!("the {set} probes cannot be used: {}", chain(&e));
                        tracing::info!("{why}");
                        fallbacks.push(why);
                        continue;
                    }
                },
            };
            return Self::new(set, hooks, fallbacks, options);
        }
        Err(InspectorError::Object("any probe set".into()))
    }

    fn new(
        set: ProbeSet,
        hooks: Option<Hooks>,
        fallbacks: Vec<String>,
        options: &InspectorOptions,
    ) -> Result<Self, InspectorError> {
        let misses = match &hooks {
            Some(hooks) => hooks.misses()?,
            None => (0, 0),
        };
        let state = State {
            set,
            hooks,
            notices: Notices::new()
                .inspect_err(|e| {
                    tracing::info!(error = %e, "writes to the memory of processes that do not run are not seen: the kernel has no fanotify");
                })
                .ok(),
            fallbacks,
            bounds: Bounds {
                inodes: options.max_dirty_inodes as usize,
                events: options.max_process_events as usize,
            },
            quota: u64::from(options.max_dirty_inodes.max(1)),
            max_sandboxes: options.max_sandboxes.clamp(1, MOST),
            ignore_outside: options.ignore_outside,
            own_pid_ns: crate::pid_ns_inode(std::process::id()).ok(),
            next_slot: 1,
            quick_readings: 0,
            registered: HashMap::new(),
            misses,
        };
        Ok(Self {
            state: Arc::new(Mutex::new(state)),
        })
    }

    /// The name of the probe set in use.
    #[must_use]
    pub fn probe_set(&self) -> &'static str {
        self.probes().name()
    }

    /// The probe set in use.
    #[must_use]
    pub fn probes(&self) -> ProbeSet {
        self.lock().set
    }

    /// Why better probe sets are not in use, one sentence each.
    #[must_use]
    pub fn fallbacks(&self) -> Vec<String> {
        self.lock().fallbacks.clone()
    }

    /// Begins to watch a sandbox: after its pid namespace exists and before its first program runs (between
    /// `runc create` and `runc start`), or at any time if the caller takes the first reading, which says "everything", for what it is.
    ///
    /// A namespace registered before is registered anew and its old slot is unknown from then on: the
    /// kernel reuses the inodes of namespaces that are gone.
    ///
    /// # Errors
    /// If the upper directory cannot be read, the namespace is this process's own, or no place is free.
    pub fn register(&self, target: &Target) -> Result<SandboxSlot, InspectorError> {
        let refuse = |why| InspectorError::Namespace {
            pid_ns_inode: target.pid_ns_inode,
            why,
        };
        let pid_ns = u32::try_from(target.pid_ns_inode)
            .ok()
            .filter(|inode| *inode != 0)
            .ok_or_else(|| refuse("that is not the inode of a namespace"))?;
        let upper =
            std::fs::metadata(&target.upper_dir).map_err(|source| InspectorError::Upper {
                path: target.upper_dir.clone(),
                source,
            })?;
        let (dev, root) = (
            upper.dev(),
            outside::upper(upper.ino(), kernel_dev(upper.dev())),
        );
        let state = &mut *self.lock();
        if state.own_pid_ns == Some(target.pid_ns_inode) {
            return Err(refuse("it is the namespace of the watching process itself"));
        }
        let before = state
            .registered
            .iter()
            .find(|(_, r)| r.pid_ns == pid_ns)
            .map(|(slot, _)| *slot);
        if let Some(slot) = before {
            tracing::warn!(slot, pid_ns, "a pid namespace is registered anew");
            state.forget(slot);
        }
        if state.registered.len() >= state.max_sandboxes as usize {
            return Err(InspectorError::TooManySandboxes {
                limit: state.max_sandboxes,
            });
        }
        let slot = state.next_slot;
        state.next_slot = slot
            .checked_add(1)
            .ok_or(InspectorError::TooManySandboxes {
                limit: state.max_sandboxes,
            })?;
        let blind = match state.set {
            ProbeSet::Ctime | ProbeSet::Ext4 => supports(&target.upper_dir).err(),
            _ => None,
        };
        let (mut place, mut seen, mut epoch, mut beyond) = (None, Counters::default(), 0, 0);
        if let Some(hooks) = &mut state.hooks {
            hooks.attach()?;
            let taken = hooks
                .cells
                .take(pid_ns, slot, kernel_dev(dev), state.quota)
                .ok_or(InspectorError::TooManySandboxes {
                    limit: state.max_sandboxes,
                })?;
            place = Some(taken);
            if !state.ignore_outside
                && let Err(e) = hooks.outside.add(root, kernel_dev(dev), taken)
            {
                hooks.cells.free(taken);
                return Err(kernel("the upper cannot be made known", e));
            }
            beyond = hooks.outside.beyond();
            (epoch, seen) = hooks.cells.turn(taken);
        }
        let first = "this is the first reading since the sandbox was registered";
        state.registered.insert(
            slot,
            Registered {
                pid_ns,
                place,
                dev,
                upper: (root, kernel_dev(dev)),
                beyond,
                blind,
                seen,
                mapped: true,
                anchor: None,
                ipc: None,
                procfs: None,
                writes: Writes::default(),
                logged: seen.logged,
                events: seen.events - seen.events_lost,
                pending: Pending::new(epoch + 1, first),
            },
        );
        tracing::debug!(slot, pid_ns, dev, "sandbox registered");
        Ok(SandboxSlot(slot))
    }

    /// Stops watching a sandbox. Unknown slots are ignored.
    pub fn unregister(&self, slot: SandboxSlot) {
        self.lock().forget(slot.0);
    }

    /// Takes everything seen since the last take of this sandbox.
    ///
    /// # Errors
    /// [`InspectorError::UnknownSlot`], or a failed call into the kernel: after which nothing can be ruled
    /// out, and the next successful take says so.
    pub fn take(&self, slot: SandboxSlot) -> Result<Effects, InspectorError> {
        self.lock().take(slot)
    }

    /// Moves what waits in the kernel's bounded maps into this process, for all sandboxes. Not needed for correct readings;
    /// called from time to time it keeps a busy turn from overflowing.
    ///
    /// # Errors
    /// None so far.
    pub fn pump(&self) -> Result<(), InspectorError> {
        let state = &mut *self.lock();
        state.drain_log();
        state.drain_events();
        Ok(())
    }

    /// All tasks of the sandbox, with their scheduler counters. Changes nothing.
    ///
    /// # Errors
    /// [`InspectorError::UnknownSlot`], or a failed call into the kernel.
    pub fn tasks(&self, slot: SandboxSlot) -> Result<TaskTable, InspectorError> {
        self.lock().tasks(slot)
    }

    /// Whether System V objects exist in the sandbox, whose first process is `init`.
    pub(crate) fn ipc_in_use(&self, slot: SandboxSlot, init: u32) -> Result<bool, InspectorError> {
        self.lock().ipc_in_use(slot, init)
    }

    /// What was written to memory of these processes (host process id, number inside) by others, without running them: entries that differ
    /// from those of an earlier look where something was.
    pub(crate) fn memory_written(
        &self,
        slot: SandboxSlot,
        init: u32,
        processes: impl IntoIterator<Item = (u32, u32)>,
    ) -> Result<Vec<(String, String)>, InspectorError> {
        let state = &mut *self.lock();
        Ok(state.writes(slot, init)?.entries(processes).collect())
    }

    /// How many readings of tasks had no need to look at others. Only for tests.
    #[doc(hidden)]
    #[must_use]
    pub fn quick_readings(&self) -> u64 {
        self.lock().quick_readings
    }

    /// Whether anything happened in the sandbox since an earlier pair of readings; takes nothing.
    ///
    /// For a capture without a freeze: read `tasks`, then `take`, capture, and call this with both. If
    /// the answer [is quiet](Activity::is_quiet), no task executed an instruction in between, so that the capture is one state. `mark` may be of any take of
    /// this slot, as long as no later take was made.
    ///
    /// # Errors
    /// [`InspectorError::UnknownSlot`], or a failed call into the kernel.
    pub fn activity_since(
        &self,
        slot: SandboxSlot,
        mark: &Mark,
        tasks: &TaskTable,
    ) -> Result<Activity, InspectorError> {
        let state = &mut *self.lock();
        let now = state.tasks(slot)?;
        let ran = now.ran_since(tasks);
        let counters = state.counters(slot)?;
        let skipped = match &state.hooks {
            Some(hooks) => hooks.misses()? != state.misses,
            None => false,
        };
        Ok(Activity {
            // Without probes it takes a task that ran to change anything.
            dirtied: skipped
                || (counters.logged, counters.overflow, counters.calls) != mark.files
                || state.set == ProbeSet::Walk && !ran.is_empty(),
            process_events: skipped || counters.events != mark.events,
            ran,
            tasks: now,
        })
    }

    /// Begins to count what the threads of a sandbox do. Call while it is frozen, after the dump; then thaw it and [poll](ThawWatch::poll).
    ///
    /// The answer tells whether the dump is still as good as one taken then, although freezing, dumping and thawing move the counters that [`Self::tasks`] reads.
    /// A second watch of the same sandbox ends the first.
    ///
    /// # Errors
    /// [`InspectorError::UnknownSlot`], or a failed call into the kernel.
    pub fn watch_thaw(&self, slot: SandboxSlot) -> Result<ThawWatch, InspectorError> {
        ThawWatch::begin(&self.state, slot)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

pub(crate) fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // The state is valid after every step; a panic elsewhere while it was held does not change that.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes, as one sentence.
pub(crate) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text.push_str(": ");
        text.push_str(&e.to_string());
        next = e.source();
    }
    text
}
