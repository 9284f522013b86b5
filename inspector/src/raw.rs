//! The records of `bpf/records.h`, and how bytes from the kernel become them.
//!
//! Decoding copies fields out of byte slices at fixed offsets and needs no `unsafe`; a slice of the wrong
//! length is an error of the caller, seen as `None`.

/// The counters of `struct sandbox`. They only ever grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) logged: u64,
    pub(crate) overflow: u64,
    pub(crate) events: u64,
    pub(crate) events_lost: u64,
    pub(crate) calls: u64,
    pub(crate) last_call: u64,
    pub(crate) rings: u64,
    pub(crate) outside: u64,
}

/// Length of `struct dirty`.
pub(crate) const DIRTY: usize = 24;
/// Length of `struct event`.
pub(crate) const EVENT: usize = 184;
/// Length of `struct task_record`.
pub(crate) const TASK: usize = 160;
/// Tasks that `iter_members` can answer.
pub(crate) const MEMBERS: usize = 192;

/// `struct dirty`: one entry of `LOG`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirty {
    pub(crate) ino: u64,
    pub(crate) slot: u32,
    pub(crate) generation: u32,
    pub(crate) epoch: u64,
}

impl Dirty {
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != DIRTY {
            return None;
        }
        Some(Self {
            ino: u64_at(bytes, 0)?,
            slot: u32_at(bytes, 8)?,
            generation: u32_at(bytes, 12)?,
            epoch: u64_at(bytes, 16)?,
        })
    }
}

pub(crate) const EVENT_FORK: u32 = 1;
pub(crate) const EVENT_EXEC: u32 = 2;
pub(crate) const EVENT_EXIT: u32 = 3;

/// `struct event`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: u32,
    pub(crate) slot: u32,
    pub(crate) tid: u32,
    pub(crate) tgid: u32,
    pub(crate) ns_tid: u32,
    pub(crate) ns_tgid: u32,
    pub(crate) parent_tgid: u32,
    pub(crate) exit_code: i32,
    pub(crate) start_boottime: u64,
    pub(crate) comm: String,
    pub(crate) path: String,
}

impl Event {
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != EVENT {
            return None;
        }
        Some(Self {
            kind: u32_at(bytes, 0)?,
            slot: u32_at(bytes, 4)?,
            tid: u32_at(bytes, 8)?,
            tgid: u32_at(bytes, 12)?,
            ns_tid: u32_at(bytes, 16)?,
            ns_tgid: u32_at(bytes, 20)?,
            parent_tgid: u32_at(bytes, 24)?,
            exit_code: u32_at(bytes, 28)?.cast_signed(),
            start_boottime: u64_at(bytes, 32)?,
            comm: text(bytes.get(40..56)?),
            path: text(bytes.get(56..184)?),
        })
    }
}

/// `struct task_record`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) tid: u32,
    pub(crate) tgid: u32,
    pub(crate) ns_tid: u32,
    pub(crate) ns_tgid: u32,
    pub(crate) parent_tgid: u32,
    pub(crate) exit_state: u32,
    pub(crate) running: u32,
    pub(crate) state: u32,
    pub(crate) start_boottime: u64,
    pub(crate) sum_exec_runtime: u64,
    pub(crate) nvcsw: u64,
    pub(crate) nivcsw: u64,
    pub(crate) pcount: u64,
    pub(crate) comm: String,
    /// None where it is not in 64-bit code on x86-64.
    pub(crate) regs: Option<Registers>,
    /// A signal that stops its process waits for it. Not read by `iter_members`, which reads no registers either.
    pub(crate) stopping: bool,
}

/// A task's registers at its entry into the kernel, as they will be on its return.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    /// Number of the system call; negative outside of one.
    pub(crate) orig_ax: i64,
    /// The call's result, where it has one already.
    pub(crate) ax: i64,
    pub(crate) ip: u64,
    pub(crate) sp: u64,
    pub(crate) si: u64,
    pub(crate) dx: u64,
    pub(crate) r10: u64,
}

impl Task {
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != TASK {
            return None;
        }
        Some(Self {
            tid: u32_at(bytes, 0)?,
            tgid: u32_at(bytes, 4)?,
            ns_tid: u32_at(bytes, 8)?,
            ns_tgid: u32_at(bytes, 12)?,
            parent_tgid: u32_at(bytes, 16)?,
            exit_state: u32_at(bytes, 20)?,
            running: u32_at(bytes, 24)?,
            state: u32_at(bytes, 28)?,
            start_boottime: u64_at(bytes, 32)?,
            sum_exec_runtime: u64_at(bytes, 40)?,
            nvcsw: u64_at(bytes, 48)?,
            nivcsw: u64_at(bytes, 56)?,
            pcount: u64_at(bytes, 64)?,
            comm: text(bytes.get(72..88)?),
            regs: Registers::decode(bytes.get(88..152)?)?,
            stopping: u64_at(bytes, 152)? != 0,
        })
    }
}

impl Registers {
    /// The outer `None` is a record cut off.
    fn decode(bytes: &[u8]) -> Option<Option<Self>> {
        if u64_at(bytes, 0)? == 0 {
            return Some(None);
        }
        Some(Some(Self {
            orig_ax: u64_at(bytes, 8)?.cast_signed(),
            ax: u64_at(bytes, 16)?.cast_signed(),
            ip: u64_at(bytes, 24)?,
            sp: u64_at(bytes, 32)?,
            si: u64_at(bytes, 40)?,
            dx: u64_at(bytes, 48)?,
            r10: u64_at(bytes, 56)?,
        }))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + 8)?
        .try_into()
        .ok()
        .map(u64::from_ne_bytes)
}

/// A C string of a fixed field; names are the sandbox's to choose, so any bytes may come.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_a_wrong_length_are_refused() {
        assert_eq!(Dirty::decode(&[0; DIRTY - 1]), None);
        assert_eq!(Event::decode(&[0; EVENT - 1]), None);
        assert_eq!(Task::decode(&[0; TASK + 1]), None);
    }

    #[test]
    fn a_dirty_entry_is_read_at_its_offsets() {
        let mut entry = [0u8; DIRTY];
        entry[..8].copy_from_slice(&77u64.to_ne_bytes());
        entry[8..12].copy_from_slice(&5u32.to_ne_bytes());
        entry[12..16].copy_from_slice(&9u32.to_ne_bytes());
        entry[16..].copy_from_slice(&3u64.to_ne_bytes());
        assert_eq!(
            Dirty::decode(&entry),
            Some(Dirty {
                ino: 77,
                slot: 5,
                generation: 9,
                epoch: 3
            })
        );
    }

    #[test]
    fn names_end_at_the_first_zero_and_may_be_any_bytes() {
        assert_eq!(text(b"sh\0junk"), "sh");
        assert_eq!(text(b"exactlyfull"), "exactlyfull");
        assert_eq!(text(b"\xff\0"), "\u{fffd}");
    }
}
