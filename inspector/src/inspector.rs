//! The inspector: registrations, readings, and the argument why no change falls between two readings.
//!
//! # Why nothing is lost
//! A hook that sees an inode puts `{inode, device, slot}` into the map `DIRTY` unless it is there, and then counts `added` up. A reading first reads the counters,
//! then drains the map. The kernel deletes what it hands out under the bucket's lock, so at every moment an entry is in the map or in
//! this process. Three races remain, all harmless:
//! - A hook finds its entry present, and the drain takes it: the reading that follows the event reports it.
//! - A hook inserts behind the drain: the entry stays for the next reading, and `added` has moved past what this reading saw, so that the next one does not skip the drain.
//! - A hook has inserted and not counted yet when the counters are read: the drain takes the entry or the next reading sees the counter move. Either way it is reported.
//!
//! So no epochs or banks are needed in the key. What a reading cannot say is that the *store* that follows an event has happened: a task may be between
//! the hook and its copy of data. So read with the sandbox frozen, or check afterwards with [`Inspector::activity_since`] that no task ran.
//!
//! Slots are never reused; entries under a slot that is no longer registered are dropped at the next drain.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::effects::{Effects, Mark, SandboxSlot, Target};
use crate::error::InspectorError;
use crate::load::Hooks;
use crate::pending::{Bounds, Pending};
use crate::raw::Sandbox;
use crate::support::{kernel_dev, supports};
use crate::tasks::{TaskInfo, TaskRan, TaskTable};
use crate::watch::ThawWatch;

/// Bounds given at load.
#[derive(Clone, Debug)]
pub struct InspectorOptions {
    /// Inodes that may be dirty in all sandboxes together between two readings (of any of them), and that may wait
    /// in this process for one sandbox. More means "everything" for the sandboxes concerned. About 100 bytes of kernel memory each, when used.
    pub max_dirty_inodes: u32,
    /// Sandboxes registered at a time.
    pub max_sandboxes: u32,
    /// Bytes for process events between two readings, rounded up to a power of two; an event takes 192.
    pub event_bytes: u32,
    /// Process events that may wait in this process for one sandbox.
    pub max_process_events: u32,
    /// Tasks of all sandboxes under a [`ThawWatch`] at a time together. More means that something ran. About 120 bytes of kernel memory each, when used.
    pub max_watched_tasks: u32,
    /// Tracepoints on files that are not attached to. Only for tests that show what each is needed for: changes are missed.
    #[doc(hidden)]
    pub leave_out: &'static [&'static str],
}

impl Default for InspectorOptions {
    fn default() -> Self {
        Self {
            max_dirty_inodes: 262_144,
            max_sandboxes: 4096,
            event_bytes: 8 << 20,
            max_process_events: 131_072,
            max_watched_tasks: 65_536,
            leave_out: &[],
        }
    }
}

/// The eBPF programs and what they saw: one per host process. They are detached when it and all its watches are dropped.
pub struct Inspector {
    state: Arc<Mutex<State>>,
}

pub(crate) struct State {
    pub(crate) hooks: Hooks,
    bounds: Bounds,
    max_sandboxes: u32,
    own_pid_ns: Option<u64>,
    next_slot: u32,
    registered: HashMap<u32, Registered>,
    /// Hooks skipped by the kernel, as last acted on: on files, on processes.
    misses: (u64, u64),
}

pub(crate) struct Registered {
    pid_ns: u32,
    /// Device as in `stat`.
    dev: u64,
    /// Why the hooks cannot see its filesystem, if they cannot.
    blind: Option<String>,
    /// Counters at the last reading.
    seen: Sandbox,
    pending: Pending,
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
    /// Loads and attaches the programs (about 100 ms).
    ///
    /// # Errors
    /// [`InspectorError::Unsupported`] with a sentence on what the kernel lacks or forbids.
    pub fn load(options: &InspectorOptions) -> Result<Self, InspectorError> {
        let hooks = Hooks::load(options)?;
        let misses = hooks.misses()?;
        let state = State {
            hooks,
            bounds: Bounds {
                inodes: options.max_dirty_inodes as usize,
                events: options.max_process_events as usize,
            },
            max_sandboxes: options.max_sandboxes.max(1),
            own_pid_ns: crate::pid_ns_inode(std::process::id()).ok(),
            next_slot: 1,
            registered: HashMap::new(),
            misses,
        };
        Ok(Self {
            state: Arc::new(Mutex::new(state)),
        })
    }

    /// Which hooks are in use.
    #[must_use]
    pub fn probe_set(&self) -> &'static str {
        "ext4"
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
        let dev = std::fs::metadata(&target.upper_dir)
            .map_err(|source| InspectorError::Upper {
                path: target.upper_dir.clone(),
                source,
            })?
            .dev();
        let blind = supports(&target.upper_dir).err();

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
        let seen = Sandbox {
            slot,
            dev: kernel_dev(dev),
            ..Sandbox::default()
        };
        state.hooks.insert(pid_ns, seen)?;
        let pending = Pending::new("this is the first reading since the sandbox was registered");
        state.registered.insert(
            slot,
            Registered {
                pid_ns,
                dev,
                blind,
                seen,
                pending,
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
    /// A failed call into the kernel; nothing can then be ruled out for any sandbox, and their next takes say so.
    pub fn pump(&self) -> Result<(), InspectorError> {
        let state = &mut *self.lock();
        state.drain_dirty()?;
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
        let counters = state.hooks.counters(state.get(slot)?.pid_ns)?;
        let skipped = state.hooks.misses()? != state.misses;
        Ok(Activity {
            ran: now.ran_since(tasks),
            dirtied: skipped || counters.added != mark.added || counters.overflow != mark.overflow,
            process_events: skipped || counters.events != mark.events,
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

impl State {
    pub(crate) fn get(&self, slot: SandboxSlot) -> Result<&Registered, InspectorError> {
        self.registered
            .get(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))
    }

    fn forget(&mut self, slot: u32) {
        let Some(gone) = self.registered.remove(&slot) else {
            return;
        };
        if let Err(error) = self.hooks.remove(gone.pid_ns) {
            tracing::warn!(slot, %error, "a sandbox stays in the eBPF programs' table until it is registered again");
        }
    }

    fn tasks(&mut self, slot: SandboxSlot) -> Result<TaskTable, InspectorError> {
        self.get(slot)?;
        let tasks = self
            .hooks
            .tasks(slot.0)?
            .into_iter()
            .map(TaskInfo::from)
            .collect();
        Ok(TaskTable { tasks })
    }

    fn take(&mut self, slot: SandboxSlot) -> Result<Effects, InspectorError> {
        let pid_ns = self.get(slot)?.pid_ns;
        // The order matters: counters before the drains (see the module's documentation).
        let counters = self.hooks.counters(pid_ns)?;
        let seen = self.get(slot)?.seen;
        if counters.added != seen.added || counters.overflow != seen.overflow {
            self.drain_dirty()?;
        }
        self.drain_events();
        self.check_misses()?;

        let registered = self
            .registered
            .get_mut(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))?;
        let pending = &mut registered.pending;
        let overflowed = counters.overflow.wrapping_sub(seen.overflow);
        if overflowed > 0 {
            pending.doubt(format!(
                "{overflowed} changes found no room in the map of dirty inodes"
            ));
        }
        if let Some(reason) = &registered.blind {
            pending.doubt(reason.clone());
        }
        if counters.events_lost != seen.events_lost {
            pending.events_lost = true;
        }
        registered.seen = counters;
        Ok(Effects {
            files: pending.take_files(registered.dev),
            born: std::mem::take(&mut pending.born),
            execs: std::mem::take(&mut pending.execs),
            exited: std::mem::take(&mut pending.exited),
            process_events_lost: std::mem::take(&mut pending.events_lost),
            mark: Mark {
                added: counters.added,
                overflow: counters.overflow,
                events: counters.events,
            },
        })
    }

    fn drain_dirty(&mut self) -> Result<(), InspectorError> {
        let Self {
            hooks,
            registered,
            bounds,
            ..
        } = self;
        let drained = hooks.drain_dirty(|dirty| {
            if let Some(r) = registered.get_mut(&dirty.slot) {
                r.pending.dirty(dirty, *bounds);
            }
        });
        drained.map_err(|source| {
            for r in registered.values_mut() {
                r.pending
                    .doubt("the map of dirty inodes could not be read to its end");
            }
            InspectorError::Kernel {
                what: "the map of dirty inodes cannot be read",
                source,
            }
        })
    }

    fn drain_events(&mut self) {
        let Self {
            hooks,
            registered,
            bounds,
            ..
        } = self;
        let mut unreadable = false;
        hooks.drain_events(|event| match event {
            Some(event) => {
                if let Some(r) = registered.get_mut(&event.slot) {
                    r.pending.event(event, *bounds);
                }
            }
            None => unreadable = true,
        });
        if unreadable {
            for r in registered.values_mut() {
                r.pending.events_lost = true;
            }
        }
    }

    /// A hook that the kernel skipped (it does so when the program is already running on that CPU) may
    /// have been about any sandbox.
    fn check_misses(&mut self) -> Result<(), InspectorError> {
        let misses = self.hooks.misses()?;
        let (files, processes) = (misses.0 != self.misses.0, misses.1 != self.misses.1);
        self.misses = misses;
        if files || processes {
            tracing::warn!(files, processes, "the kernel skipped eBPF programs");
        }
        for r in self.registered.values_mut() {
            if files {
                r.pending.doubt("the kernel skipped a hook");
            }
            if processes {
                r.pending.events_lost = true;
            }
        }
        Ok(())
    }
}
