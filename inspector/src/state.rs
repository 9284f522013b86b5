//! What is registered, and how one reading after another is made of it. The argument why nothing is lost is in [`crate::inspector`].

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cells::Place;
use crate::effects::{Effects, Mark, SandboxSlot};
use crate::error::InspectorError;
use crate::load::{Anchor, Hooks};
use crate::memory::IpcLists;
use crate::outside::Upper;
use crate::pending::{Bounds, Pending};
use crate::probes::ProbeSet;
use crate::raw::Counters;
use crate::tasks::{TaskInfo, TaskTable};
use crate::written::{Instance, Notices, Writes, Written};

/// Far longer than any program writes one entry.
const PATIENCE: Duration = Duration::from_millis(200);

pub(crate) struct State {
    pub(crate) set: ProbeSet,
    /// None in the `walk` set.
    pub(crate) hooks: Option<Hooks>,
    /// None where the kernel has no such notices: writes to the memory of processes that do not run are not seen then.
    pub(crate) notices: Option<Notices>,
    /// Why better sets are not in use, one sentence each.
    pub(crate) fallbacks: Vec<String>,
    pub(crate) bounds: Bounds,
    /// Entries one sandbox may log before the log is read on.
    pub(crate) quota: u64,
    pub(crate) max_sandboxes: u32,
    pub(crate) ignore_outside: bool,
    pub(crate) own_pid_ns: Option<u64>,
    pub(crate) next_slot: u32,
    pub(crate) quick_readings: u64,
    pub(crate) registered: HashMap<u32, Registered>,
    /// Hooks skipped by the kernel, as last acted on: on files, on processes.
    pub(crate) misses: (u64, u64),
}

pub(crate) struct Registered {
    pub(crate) pid_ns: u32,
    /// In the programs' table; none in the `walk` set.
    pub(crate) place: Option<Place>,
    /// Device as in `stat`.
    pub(crate) dev: u64,
    /// The root of its upper, as the programs know it, with the device in the kernel's form.
    pub(crate) upper: (Upper, u32),
    /// Changes from outside that could not be told whose they are, at the last reading.
    pub(crate) beyond: u64,
    /// Why the hooks cannot see its filesystem, if they cannot.
    pub(crate) blind: Option<String>,
    /// By which its tasks are found without a look at all others; none before they were read once in that way.
    pub(crate) anchor: Option<Anchor>,
    /// Its System V objects; none before they were looked at.
    pub(crate) ipc: Option<IpcLists>,
    /// Its procfs, once it was looked at, and what was written in it since.
    pub(crate) procfs: Option<Instance>,
    pub(crate) writes: Writes,
    /// Counters at the last reading.
    pub(crate) seen: Counters,
    /// The `syscalls` set: whether anything was mapped shared at the last reading.
    pub(crate) mapped: bool,
    /// Entries of the log, and process events, that were read of all that were counted.
    pub(crate) logged: u64,
    pub(crate) events: u64,
    pub(crate) pending: Pending,
}

impl State {
    pub(crate) fn get(&self, slot: SandboxSlot) -> Result<&Registered, InspectorError> {
        self.registered
            .get(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))
    }

    /// The programs, where there are any.
    pub(crate) fn hooks(&mut self, what: &'static str) -> Result<&mut Hooks, InspectorError> {
        let set = self.set;
        self.hooks
            .as_mut()
            .ok_or(InspectorError::NotInSet { what, set })
    }

    pub(crate) fn forget(&mut self, slot: u32) {
        let Some(gone) = self.registered.remove(&slot) else {
            return;
        };
        let Some(hooks) = &mut self.hooks else {
            return;
        };
        if let Some(place) = gone.place {
            hooks.outside.remove(gone.upper.0, gone.upper.1, place);
            hooks.cells.free(place);
        }
        if self.registered.is_empty() {
            hooks.detach();
            // Nobody's any more.
            hooks.drain_log(drop);
            hooks.drain_events(drop);
        }
    }

    /// Counters as they are now; all zero where nothing counts.
    pub(crate) fn counters(&self, slot: SandboxSlot) -> Result<Counters, InspectorError> {
        let registered = self.get(slot)?;
        Ok(match (&self.hooks, registered.place) {
            (Some(hooks), Some(place)) => hooks.cells.counters(place),
            _ => Counters::default(),
        })
    }

    pub(crate) fn tasks(&mut self, slot: SandboxSlot) -> Result<TaskTable, InspectorError> {
        let registered = self
            .registered
            .get_mut(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))?;
        let Some(hooks) = &mut self.hooks else {
            let tasks = crate::tasks_from_proc(u64::from(registered.pid_ns));
            return tasks.map_err(|source| InspectorError::Kernel {
                what: "the tasks of a sandbox cannot be listed",
                source,
            });
        };
        let anchor = registered.anchor.as_ref();
        let mut tasks = match anchor.and_then(|a| hooks.members(slot.0, a)) {
            Some(tasks) => {
                self.quick_readings += 1;
                tasks
            }
            None => {
                let tasks = hooks.tasks(slot.0)?;
                registered.anchor = hooks.anchor(&tasks);
                tasks
            }
        };
        tasks.sort_unstable_by_key(|t| t.tid);
        let tasks = tasks.into_iter().map(TaskInfo::from).collect();
        Ok(TaskTable { tasks })
    }

    /// What was written to memory of its processes, without running them, up to now.
    pub(crate) fn writes(
        &mut self,
        slot: SandboxSlot,
        init: u32,
    ) -> Result<&Writes, InspectorError> {
        let marked = self.notices.as_ref().map(|notices| {
            let marked = notices.mark(init);
            notices.drain(|written| {
                for r in self.registered.values_mut() {
                    match written {
                        Written::Process(at, pid) if r.procfs == Some(at) => r.writes.count(pid),
                        Written::Process(..) => {}
                        Written::Lost => r.writes.doubt(),
                    }
                }
            });
            marked
        });
        let own = self
            .registered
            .get_mut(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))?;
        match marked {
            Some(Ok(marked)) if own.procfs != marked => {
                // Of before nothing is known.
                own.procfs = marked;
                own.writes.doubt();
            }
            Some(Err(e)) => {
                tracing::warn!(slot = slot.0, error = %e, "writes to the memory of its processes may not be seen");
                own.writes.doubt();
            }
            _ => {}
        }
        Ok(&own.writes)
    }

    /// Whether System V objects exist in the sandbox with this first process.
    pub(crate) fn ipc_in_use(
        &mut self,
        slot: SandboxSlot,
        init: u32,
    ) -> Result<bool, InspectorError> {
        let registered = self
            .registered
            .get_mut(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))?;
        let mut look = || {
            let lists = match registered.ipc.take() {
                Some(lists) if lists.are_of(init)? => lists,
                _ => IpcLists::open(init)?,
            };
            registered.ipc.insert(lists).in_use()
        };
        look().map_err(|source| InspectorError::Kernel {
            what: "the sandbox's IPC objects cannot be listed",
            source,
        })
    }

    pub(crate) fn take(&mut self, slot: SandboxSlot) -> Result<Effects, InspectorError> {
        let registered = self.get(slot)?;
        let (Some(hooks), Some(place)) = (&self.hooks, registered.place) else {
            return self.take_unseen(slot);
        };
        // The order matters: the epoch, then the counters, then the drains (see the module's documentation).
        let (epoch, counters) = hooks.cells.turn(place);
        let beyond = hooks.outside.beyond();
        self.drain_until(slot, &counters)?;
        self.check_misses()?;
        let mapped = match self.set {
            ProbeSet::Syscalls => self.mapped(slot)?,
            _ => None,
        };

        let registered = self
            .registered
            .get_mut(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))?;
        let seen = std::mem::replace(&mut registered.seen, counters);
        let pending = &mut registered.pending;
        if std::mem::replace(&mut registered.beyond, beyond) != beyond {
            pending.doubt(
                "something outside wrote where it cannot be told whether that is in the upper",
            );
        }
        if counters.overflow != seen.overflow {
            pending.doubt("so many inodes were changed that they found no room in the log");
        }
        if let Some(reason) = &registered.blind {
            pending.doubt(reason.clone());
        }
        if counters.calls != seen.calls {
            pending.doubt(format!(
                "a system call (number {}) may have changed files",
                counters.last_call
            ));
        }
        if counters.rings > 0 {
            pending.doubt(
                "it has made an asynchronous ring, which may change files without system calls",
            );
        }
        // What is mapped now was mapped by a call that counted, or before the last reading; what was mapped then may have been stored to and unmapped since.
        if let Some(path) = &mapped {
            pending.doubt(format!("{} is mapped shared", path.display()));
        } else if registered.mapped && self.set == ProbeSet::Syscalls {
            pending.doubt("a file was mapped shared");
        }
        registered.mapped = mapped.is_some();
        if counters.events_lost != seen.events_lost {
            pending.events_lost = true;
        }
        let effects = Effects {
            files: pending.take_files(registered.dev, epoch),
            born: std::mem::take(&mut pending.born),
            execs: std::mem::take(&mut pending.execs),
            exited: std::mem::take(&mut pending.exited),
            from_outside: counters.outside != seen.outside,
            process_events_lost: std::mem::take(&mut pending.events_lost),
            mark: mark(&counters),
        };
        // What came into a directory in the tick in which the sandbox had changed that gave no event of its own (see files_ctime.h).
        if self.set == ProbeSet::Ctime
            && counters.logged != seen.logged
            && let Some(hooks) = &self.hooks
        {
            hooks.outside.forget();
        }
        Ok(effects)
    }

    /// A file that any process of the sandbox has mapped shared.
    fn mapped(&mut self, slot: SandboxSlot) -> Result<Option<PathBuf>, InspectorError> {
        let tasks = self.tasks(slot)?;
        let living = tasks.tasks.iter().filter(|t| !t.exited).map(|t| t.tgid);
        for pid in living.collect::<BTreeSet<_>>() {
            let mappings =
                crate::mappings::shared_mappings(pid).map_err(|source| InspectorError::Kernel {
                    what: "the mappings of a process cannot be read",
                    source,
                })?;
            let files = mappings.into_iter().map(|m| m.mapping);
            // Memory without a name, and System V segments, are no files.
            let file = |m: &crate::SharedMapping| {
                let name = m.path.as_os_str().as_encoded_bytes();
                !(m.deleted
                    && [&b"/memfd:"[..], b"/SYSV", b"/dev/zero"]
                        .iter()
                        .any(|p| name.starts_with(p)))
            };
            if let Some(found) = files.into_iter().find(file) {
                return Ok(Some(found.path));
            }
        }
        Ok(None)
    }

    /// A reading without probes.
    fn take_unseen(&mut self, slot: SandboxSlot) -> Result<Effects, InspectorError> {
        let registered = self
            .registered
            .get_mut(&slot.0)
            .ok_or(InspectorError::UnknownSlot(slot))?;
        registered
            .pending
            .doubt("no probe watches files: all of them are looked at");
        let epoch = 0;
        Ok(Effects {
            files: registered.pending.take_files(registered.dev, epoch),
            born: Vec::new(),
            execs: Vec::new(),
            exited: Vec::new(),
            from_outside: false,
            process_events_lost: true,
            mark: Mark::default(),
        })
    }

    /// Drains until everything that was counted for a sandbox has been read.
    fn drain_until(
        &mut self,
        slot: SandboxSlot,
        counters: &Counters,
    ) -> Result<(), InspectorError> {
        let start = Instant::now();
        for round in 0u32.. {
            let r = self.get(slot)?;
            let (files, events) = (
                r.logged < counters.logged,
                r.events < counters.events - counters.events_lost,
            );
            if files {
                self.drain_log();
            }
            if events {
                self.drain_events();
            }
            let r = self
                .registered
                .get_mut(&slot.0)
                .ok_or(InspectorError::UnknownSlot(slot))?;
            let behind = (
                r.logged < counters.logged,
                r.events < counters.events - counters.events_lost,
            );
            if behind == (false, false) {
                break;
            }
            // Somebody is in the midst of writing an entry: some instructions without preemption, longer only where the whole machine stands still.
            if start.elapsed() > PATIENCE {
                if behind.0 {
                    r.logged = counters.logged;
                    r.pending
                        .doubt("the log of dirty inodes could not be read to its end");
                }
                if behind.1 {
                    r.events = counters.events - counters.events_lost;
                    r.pending.events_lost = true;
                }
                break;
            }
            match round {
                0..1000 => std::hint::spin_loop(),
                _ => std::thread::yield_now(),
            }
        }
        Ok(())
    }

    pub(crate) fn drain_log(&mut self) {
        let Self {
            hooks,
            registered,
            bounds,
            quota,
            ..
        } = self;
        let Some(hooks) = hooks else { return };
        // What comes in a row is mostly of one sandbox.
        let mut touched: Vec<u32> = Vec::new();
        hooks.drain_log(|dirty| {
            if let Some(r) = registered.get_mut(&dirty.slot) {
                r.logged += 1;
                if touched.last() != Some(&dirty.slot) {
                    touched.push(dirty.slot);
                }
                r.pending.dirty(dirty, *bounds);
            }
        });
        touched.sort_unstable();
        touched.dedup();
        for slot in touched {
            if let Some((place, logged)) = registered
                .get(&slot)
                .and_then(|r| Some((r.place?, r.logged)))
            {
                hooks.cells.allow(place, logged + *quota);
            }
        }
    }

    pub(crate) fn drain_events(&mut self) {
        let Self {
            hooks,
            registered,
            bounds,
            ..
        } = self;
        let Some(hooks) = hooks else { return };
        let mut unreadable = false;
        hooks.drain_events(|event| match event {
            Some(event) => {
                if let Some(r) = registered.get_mut(&event.slot) {
                    r.events += 1;
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
        let Some(hooks) = &self.hooks else {
            return Ok(());
        };
        let misses = hooks.misses()?;
        let (files, processes) = (misses.0 != self.misses.0, misses.1 != self.misses.1);
        if !files && !processes {
            return Ok(());
        }
        self.misses = misses;
        tracing::warn!(files, processes, "the kernel skipped eBPF programs");
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

fn mark(counters: &Counters) -> Mark {
    Mark {
        files: (counters.logged, counters.overflow, counters.calls),
        events: counters.events,
    }
}
