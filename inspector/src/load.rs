//! Loading and attaching the embedded programs, and the typed ends of their maps.

use std::error::Error;
use std::io::{self, Read};
use std::os::fd::AsFd;

use aya::maps::{Array, HashMap, Map, MapData, RingBuf};
use aya::programs::{BtfTracePoint, Iter, Program, ProgramError, RawTracePoint};
use aya::{Btf, Ebpf, EbpfLoader, include_bytes_aligned};

use crate::calls::{Calls, TaskCalls};
use crate::error::InspectorError;
use crate::raw::{self, Event, Sandbox, Task};
use crate::{InspectorOptions, sys};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/effects.o"));

/// Program and tracepoint of each hook on files.
const FILE_HOOKS: [(&str, &str); 3] = [
    ("tp_inode_dirty", "writeback_mark_inode_dirty"),
    ("tp_ext4_dirty", "ext4_mark_inode_dirty"),
    ("tp_ext4_journal", "ext4_journal_start_inode"),
];
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

/// More tasks than any pids limit allows one sandbox.
const MAX_TASKS: u64 = 1 << 18;

/// The programs, attached for as long as this lives.
pub(crate) struct Hooks {
    ebpf: Ebpf,
    sandboxes: HashMap<MapData, u32, Sandbox>,
    wanted: Array<MapData, u32>,
    dirty: MapData,
    events: RingBuf<MapData>,
    calls: Calls,
}

impl Hooks {
    pub(crate) fn load(options: &InspectorOptions) -> Result<Self, InspectorError> {
        let btf = Btf::from_sys_fs().map_err(|e| {
            unsupported(
                "the kernel offers no type information in /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)",
                e,
            )
        })?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .map_max_entries("SANDBOXES", options.max_sandboxes.max(1))
            .map_max_entries("WATCHED", options.max_sandboxes.max(1))
            .map_max_entries("CALLS", options.max_watched_tasks.max(1))
            .map_max_entries("DIRTY", options.max_dirty_inodes.max(1))
            .map_max_entries("EVENTS", ring_size(options.event_bytes))
            .load(OBJECT)
            .map_err(|e| denied_or(e, "the kernel does not accept the eBPF maps"))?;

        for (name, tracepoint) in FILE_HOOKS {
            let hook: &mut RawTracePoint = program(&mut ebpf, name)?;
            hook.load()
                .map_err(|e| denied_or(e, &format!("the kernel does not accept program {name}")))?;
            if options.leave_out.contains(&tracepoint) {
                continue;
            }
            hook.attach(tracepoint).map_err(|e| {
                denied_or(
                    e,
                    &format!(
                        "tracepoint {tracepoint} is missing (it needs Linux 6.2 or newer with ext4)"
                    ),
                )
            })?;
        }
        for (name, tracepoint) in PROCESS_HOOKS {
            let hook: &mut BtfTracePoint = program(&mut ebpf, name)?;
            hook.load(tracepoint, &btf)
                .map_err(|e| denied_or(e, &format!("the kernel does not accept program {name}")))?;
            hook.attach().map_err(|e| {
                denied_or(e, &format!("tracepoint {tracepoint} cannot be attached to"))
            })?;
        }
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

        let dirty = match map(&mut ebpf, "DIRTY")? {
            Map::HashMap(data) => data,
            _ => return Err(InspectorError::Object("a hash map named DIRTY".into())),
        };
        let wrong = |e: aya::maps::MapError| InspectorError::Object(format!("a usable map ({e})"));
        Ok(Self {
            sandboxes: HashMap::try_from(map(&mut ebpf, "SANDBOXES")?).map_err(wrong)?,
            wanted: Array::try_from(map(&mut ebpf, "WANTED")?).map_err(wrong)?,
            events: RingBuf::try_from(map(&mut ebpf, "EVENTS")?).map_err(wrong)?,
            calls: Calls::new(
                HashMap::try_from(map(&mut ebpf, "WATCHED")?).map_err(wrong)?,
                HashMap::try_from(map(&mut ebpf, "CALLS")?).map_err(wrong)?,
            ),
            dirty,
            ebpf,
        })
    }

    pub(crate) fn insert(&mut self, pid_ns: u32, sandbox: Sandbox) -> Result<(), InspectorError> {
        self.sandboxes
            .insert(pid_ns, sandbox, 0)
            .map_err(|e| kernel("a sandbox cannot be registered with the eBPF programs", e))
    }

    pub(crate) fn remove(&mut self, pid_ns: u32) -> Result<(), InspectorError> {
        self.sandboxes
            .remove(&pid_ns)
            .map_err(|e| kernel("a sandbox cannot be unregistered from the eBPF programs", e))
    }

    pub(crate) fn counters(&self, pid_ns: u32) -> Result<Sandbox, InspectorError> {
        self.sandboxes
            .get(&pid_ns, 0)
            .map_err(|e| kernel("the counters of a sandbox cannot be read", e))
    }

    /// Takes all dirty inodes of all sandboxes out of the kernel.
    pub(crate) fn drain_dirty(&self, mut entry: impl FnMut(raw::Dirty)) -> io::Result<()> {
        sys::drain(self.dirty.fd().as_fd(), |key, value| {
            if let Some(dirty) = raw::Dirty::decode(key, value) {
                entry(dirty);
            }
        })
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
            self.misses_of(&FILE_HOOKS)?,
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

/// A ring's size has to be a power of two and at least a page.
fn ring_size(bytes: u32) -> u32 {
    bytes.clamp(64 * 1024, 1 << 30).next_power_of_two()
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
