//! Loading and attaching the embedded programs, and the typed ends of their maps.
//!
//! The programs are loaded once; those on files and processes are attached only while a sandbox is registered, those of a watch only
//! while something is watched: what nobody needs costs the machine nothing.

use std::any::Any;
use std::error::Error;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{Array, HashMap, Map, MapData, RingBuf};
use aya::programs::{Iter, Program, ProgramError, RawTracePoint};
use aya::{Btf, Ebpf, EbpfLoader};

use crate::calls::{Calls, TaskCalls};
use crate::cells::Cells;
use crate::error::InspectorError;
use crate::inspector::chain;
use crate::outside::Outside;
use crate::probes::ProbeSet;
use crate::programs::{Object, objects};
use crate::raw::{self, Event, Task};
use crate::{InspectorOptions, sys};

/// Program and tracepoint of each hook on processes.
const PROCESS_HOOKS: [(&str, &str); 3] = [
    ("tp_fork", "sched_process_fork"),
    ("tp_exec", "sched_process_exec"),
    ("tp_exit", "sched_process_exit"),
];
/// Program and tracepoint of each hook attached during a watch only.
const WATCH_HOOKS: [(&str, &str); 2] = [
    ("tp_sys_enter", "sys_enter"),
    ("tp_signal", "signal_deliver"),
];
const ITERATOR: &str = "iter_tasks";
/// See `bpf/members.h`.
const MEMBERS: &str = "iter_members";

/// More tasks than any pids limit allows one sandbox.
const MAX_TASKS: u64 = 1 << 18;

/// Bytes of an entry of the log, with the ring's own header.
const LOG_ENTRY: u32 = 32;

/// The programs, loaded for as long as this lives.
pub(crate) struct Hooks {
    ebpf: Ebpf,
    /// On files and processes, without those left out.
    hooks: Vec<(&'static str, &'static str)>,
    object: &'static Object,
    /// Detach when dropped. Empty while no sandbox is registered.
    links: Vec<Box<dyn Any + Send>>,
    pub(crate) cells: Cells,
    pub(crate) outside: Outside,
    wanted: Array<MapData, u32>,
    log: RingBuf<MapData>,
    events: RingBuf<MapData>,
    calls: Calls,
    /// Whether [`Hooks::anchor`] can be used.
    quick: bool,
}

/// A task of a sandbox, from which the others are found.
pub(crate) struct Anchor(OwnedFd);

impl Hooks {
    /// Loads the programs of a probe set.
    pub(crate) fn load(set: ProbeSet, options: &InspectorOptions) -> Result<Self, InspectorError> {
        let mut failed = None;
        let mut forms = objects(set);
        if options.plainest_form {
            forms = forms.split_off(forms.len().saturating_sub(1));
        }
        for object in forms {
            match Self::load_object(object, options) {
                Ok(hooks) => return Ok(hooks),
                Err(e) => {
                    // The last error is of the least demanding one.
                    tracing::info!(set = set.name(), error = %e, "one form of the eBPF programs cannot be used");
                    failed = Some(e);
                }
            }
        }
        Err(failed.unwrap_or_else(|| InspectorError::Object(format!("the {set} probe set"))))
    }

    fn load_object(
        object: &'static Object,
        options: &InspectorOptions,
    ) -> Result<Self, InspectorError> {
        let btf = Btf::from_sys_fs().map_err(|e| {
            unsupported(
                "the kernel offers no type information in /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)",
                e,
            )
        })?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .map_max_entries("WATCHED", options.max_sandboxes.max(1))
            .map_max_entries("CALLS", options.max_watched_tasks.max(1))
            .map_max_entries(
                "LOG",
                ring_size(options.max_dirty_inodes.saturating_mul(2 * LOG_ENTRY), 4096),
            )
            .map_max_entries("EVENTS", ring_size(options.event_bytes, 64 * 1024))
            .load(object.bytes)
            .map_err(|e| denied_or(e, "the kernel does not accept the eBPF maps"))?;

        let mut hooks = object.files.to_vec();
        hooks.extend(PROCESS_HOOKS);
        for (name, on) in &hooks {
            load_hook(&mut ebpf, name, on, &btf).map_err(|e| {
                denied_or(
                    e,
                    &format!(
                        "the kernel does not accept program {name} on {on} ({})",
                        object.lacks
                    ),
                )
            })?;
        }
        hooks.retain(|(_, on)| !options.leave_out.contains(on));
        for (name, _) in WATCH_HOOKS {
            let hook: &mut RawTracePoint = program(&mut ebpf, name)?;
            hook.load()
                .map_err(|e| denied_or(e, &format!("the kernel does not accept program {name}")))?;
        }
        let iterator: &mut Iter = program(&mut ebpf, ITERATOR)?;
        iterator.load("task", &btf).map_err(|e| {
            denied_or(
                e,
                "the kernel has no task iterator for eBPF (it needs Linux 5.15 or newer)",
            )
        })?;

        // Nothing depends on it but time.
        let members: &mut Iter = program(&mut ebpf, MEMBERS)?;
        let quick = members.load("task", &btf).inspect_err(|e| {
            tracing::info!(error = %chain(e), "the tasks of a sandbox are found among all tasks");
        });
        let quick = quick.is_ok() && !options.whole_readings;

        let Map::Array(sandboxes) = map(&mut ebpf, "SANDBOXES")? else {
            return Err(InspectorError::Object("an array named SANDBOXES".into()));
        };
        let cells = Cells::map(sandboxes.fd().as_fd())
            .map_err(|e| kernel("the table of sandboxes cannot be mapped", e))?;
        let wrong = |e: aya::maps::MapError| InspectorError::Object(format!("a usable map ({e})"));
        let Map::Array(outside) = map(&mut ebpf, "OUTSIDE")? else {
            return Err(InspectorError::Object("an array named OUTSIDE".into()));
        };
        let uppers = HashMap::try_from(map(&mut ebpf, "UPPERS")?).map_err(wrong)?;
        let outside = Outside::map(outside.fd().as_fd(), options.trust_started, uppers)
            .map_err(|e| kernel("what is known of changes from outside cannot be mapped", e))?;
        let mut this = Self {
            cells,
            outside,
            wanted: Array::try_from(map(&mut ebpf, "WANTED")?).map_err(wrong)?,
            log: RingBuf::try_from(map(&mut ebpf, "LOG")?).map_err(wrong)?,
            events: RingBuf::try_from(map(&mut ebpf, "EVENTS")?).map_err(wrong)?,
            calls: Calls::new(
                HashMap::try_from(map(&mut ebpf, "WATCHED")?).map_err(wrong)?,
                HashMap::try_from(map(&mut ebpf, "CALLS")?).map_err(wrong)?,
            ),
            links: Vec::new(),
            quick,
            hooks,
            object,
            ebpf,
        };
        // Tried at once, so that a set that cannot be attached is not chosen.
        this.attach()?;
        this.detach();
        Ok(this)
    }

    /// Attaches the hooks on files and processes, unless they are.
    pub(crate) fn attach(&mut self) -> Result<(), InspectorError> {
        if !self.links.is_empty() {
            return Ok(());
        }
        let mut links = Vec::new();
        for (name, on) in &self.hooks {
            links.push(attach_hook(&mut self.ebpf, name, on).map_err(|e| {
                denied_or(
                    e,
                    &format!("{on} cannot be attached to ({})", self.object.lacks),
                )
            })?);
        }
        self.links = links;
        Ok(())
    }

    /// Detaches them.
    pub(crate) fn detach(&mut self) {
        self.links.clear();
    }

    /// Takes what was logged of all sandboxes out of the kernel, up to what is being written just now.
    pub(crate) fn drain_log(&mut self, mut entry: impl FnMut(raw::Dirty)) {
        while let Some(item) = self.log.next() {
            if let Some(dirty) = raw::Dirty::decode(&item) {
                entry(dirty);
            }
        }
    }

    /// Takes all process events of all sandboxes out of the kernel. `None` is a record that could not be read.
    pub(crate) fn drain_events(&mut self, mut event: impl FnMut(Option<Event>)) {
        while let Some(item) = self.events.next() {
            event(Event::decode(&item));
        }
    }

    /// How often a hook on files, and one on processes, was skipped by the kernel since load.
    pub(crate) fn misses(&self) -> Result<(u64, u64), InspectorError> {
        Ok((
            self.misses_of(self.object.files)?,
            self.misses_of(&PROCESS_HOOKS)?,
        ))
    }

    fn misses_of(&self, hooks: &[(&str, &str)]) -> Result<u64, InspectorError> {
        let mut total = 0u64;
        for (name, _) in hooks {
            let fd = self
                .ebpf
                .program(name)
                .ok_or_else(|| InspectorError::Object(format!("program {name}")))?
                .fd()
                .map_err(|e| kernel("an eBPF program is not loaded", e))?;
            let misses = sys::recursion_misses(fd.as_fd())
                .map_err(|e| kernel("the state of an eBPF program cannot be read", e))?;
            total = total.wrapping_add(misses);
        }
        Ok(total)
    }

    /// Begins to count the system calls of a sandbox's tasks. Nothing is missed from when this returns.
    pub(crate) fn watch(&mut self, slot: u32) -> Result<u32, InspectorError> {
        let id = self.calls.begin(slot)?;
        if !self.calls.attached() {
            let mut links = Vec::new();
            for (name, tracepoint) in WATCH_HOOKS {
                let attached =
                    program(&mut self.ebpf, name).and_then(|hook: &mut RawTracePoint| {
                        let link = hook.attach(tracepoint).and_then(|id| hook.take_link(id));
                        link.map_err(|e| kernel("system calls cannot be watched", e))
                    });
                match attached {
                    Ok(link) => links.push(link),
                    Err(e) => {
                        self.calls.end(slot, id);
                        return Err(e);
                    }
                }
            }
            self.calls.keep(links);
        }
        Ok(id)
    }

    /// Ends a watch. The programs are detached with the last one.
    pub(crate) fn unwatch(&mut self, slot: u32, id: u32) {
        self.calls.end(slot, id);
    }

    /// What was counted under a watch; None where it was not all counted, or is another's.
    pub(crate) fn calls(
        &self,
        slot: u32,
        id: u32,
    ) -> Result<Option<std::collections::HashMap<u32, TaskCalls>>, InspectorError> {
        self.calls.read(slot, id)
    }

    /// How often a hook of a watch was skipped by the kernel since load.
    pub(crate) fn watch_misses(&self) -> Result<u64, InspectorError> {
        self.misses_of(&WATCH_HOOKS)
    }

    /// What [`Self::members`] needs, from a reading of all tasks. None where that is not to be had, or would not help.
    pub(crate) fn anchor(&self, tasks: &[Task]) -> Option<Anchor> {
        if !self.quick || tasks.len() > raw::MEMBERS {
            return None;
        }
        let living = || tasks.iter().filter(|t| t.exit_state == 0);
        // The first process lives longest.
        let first = living()
            .find(|t| t.ns_tid == 1)
            .or_else(|| living().next())?;
        let fd = self.ebpf.program(MEMBERS)?.fd().ok()?;
        sys::link_to_task(fd.as_fd(), first.tid).ok().map(Anchor)
    }

    /// All tasks of one sandbox, without registers and signals, by one of them; costs nothing for the tasks of others. None where they have to be read by [`Self::tasks`].
    pub(crate) fn members(&mut self, slot: u32, anchor: &Anchor) -> Option<Vec<Task>> {
        self.wanted.set(0, slot, 0).ok()?;
        let mut bytes = vec![0; raw::MEMBERS * raw::TASK];
        // All is in one answer, or none of it.
        let got = sys::iterate(anchor.0.as_fd()).ok()?.read(&mut bytes).ok()?;
        let tasks = bytes.get(..got).filter(|b| !b.is_empty())?;
        tasks.chunks(raw::TASK).map(Task::decode).collect()
    }

    /// All tasks of one sandbox.
    pub(crate) fn tasks(&mut self, slot: u32) -> Result<Vec<Task>, InspectorError> {
        const WHAT: &str = "the tasks of a sandbox cannot be listed";
        self.wanted.set(0, slot, 0).map_err(|e| kernel(WHAT, e))?;
        let iterator: &mut Iter = program(&mut self.ebpf, ITERATOR)?;
        let link = iterator.attach().map_err(|e| kernel(WHAT, e))?;
        let link = iterator.take_link(link).map_err(|e| kernel(WHAT, e))?;
        let file = link.into_file().map_err(|e| kernel(WHAT, e))?;

        let limit = MAX_TASKS * raw::TASK as u64;
        let mut bytes = Vec::with_capacity(32 * 1024);
        let got = file
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|e| kernel(WHAT, e))?;
        let tasks: Option<Vec<_>> = bytes.chunks(raw::TASK).map(Task::decode).collect();
        match tasks {
            Some(tasks) if (got as u64) < limit => Ok(tasks),
            _ => Err(kernel(
                WHAT,
                io::Error::other("the kernel's list is cut off"),
            )),
        }
    }
}

fn load_hook(ebpf: &mut Ebpf, name: &str, on: &str, btf: &Btf) -> Result<(), ProgramError> {
    match ebpf.program_mut(name) {
        Some(Program::BtfTracePoint(hook)) => hook.load(on, btf),
        Some(Program::RawTracePoint(hook)) => hook.load(),
        Some(Program::FEntry(hook)) => hook.load(on, btf),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Attaches a hook; what it answers detaches it when dropped.
fn attach_hook(ebpf: &mut Ebpf, name: &str, on: &str) -> Result<Box<dyn Any + Send>, ProgramError> {
    Ok(match ebpf.program_mut(name) {
        Some(Program::BtfTracePoint(hook)) => {
            let link = hook.attach()?;
            Box::new(hook.take_link(link)?)
        }
        Some(Program::RawTracePoint(hook)) => {
            let link = hook.attach(on)?;
            Box::new(hook.take_link(link)?)
        }
        Some(Program::FEntry(hook)) => {
            let link = hook.attach()?;
            Box::new(hook.take_link(link)?)
        }
        _ => return Err(ProgramError::UnexpectedProgramType),
    })
}

/// A ring's size has to be a power of two and at least a page.
fn ring_size(bytes: u32, least: u32) -> u32 {
    bytes.clamp(least, 1 << 30).next_power_of_two()
}

fn map(ebpf: &mut Ebpf, name: &str) -> Result<Map, InspectorError> {
    ebpf.take_map(name)
        .ok_or_else(|| InspectorError::Object(format!("map {name}")))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, InspectorError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let missing = || InspectorError::Object(format!("program {name} of the expected kind"));
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    <&mut P>::try_from(program).map_err(|_| missing())
}

pub(crate) fn kernel(what: &'static str, e: impl Error + Send + Sync + 'static) -> InspectorError {
    let source = match errno(&e) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(e),
    };
    InspectorError::Kernel { what, source }
}

fn unsupported(what: &str, e: impl Error + Send + Sync + 'static) -> InspectorError {
    InspectorError::Unsupported {
        what: what.to_owned(),
        source: Box::new(e),
    }
}

fn denied_or(e: impl Error + Send + Sync + 'static, what: &str) -> InspectorError {
    if errno(&e) == Some(libc::EPERM)
        || errno(&e) == Some(libc::EACCES) && !rustix::process::geteuid().is_root()
    {
        return unsupported(
            "loading eBPF programs is not permitted (it needs root, and a kernel whose lockdown and seccomp rules allow it)",
            e,
        );
    }
    unsupported(what, e)
}

/// The error number at the bottom of a chain of errors, if there is one.
fn errno(e: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(e);
    while let Some(e) = next {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = e.source();
    }
    None
}
