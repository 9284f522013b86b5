//! The probe sets: what they are and the order in which they are tried.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How effects are seen. In the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeSet {
    /// eBPF where change times are set and pages become dirty: dirty inodes, of ext4 only. Linux 6.13.
    Ctime,
    /// eBPF on the tracepoints of ext4 and of writeback: dirty inodes, of ext4 only. Linux 6.2.
    Ext4,
    /// eBPF at the entries of VFS and security functions: dirty inodes of any filesystem. Linux 6.6, where the kernel allows trampolines.
    Trampoline,
    /// eBPF on system calls: no inodes, only whether any call may have changed files. x86-64.
    Syscalls,
    /// No eBPF: all files may always have changed, tasks come from `/proc`.
    Walk,
}

impl ProbeSet {
    /// All of them, in the order in which they are tried.
    pub const ALL: [Self; 5] = [
        Self::Ctime,
        Self::Ext4,
        Self::Trampoline,
        Self::Syscalls,
        Self::Walk,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ctime => "ctime",
            Self::Ext4 => "ext4",
            Self::Trampoline => "trampoline",
            Self::Syscalls => "syscalls",
            Self::Walk => "walk",
        }
    }

    /// Whether readings name the inodes that were dirtied, rather than all or none.
    #[must_use]
    pub fn names_inodes(self) -> bool {
        matches!(self, Self::Ctime | Self::Ext4 | Self::Trampoline)
    }
}

impl fmt::Display for ProbeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ProbeSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|set| set.name() == text);
        found.ok_or_else(|| {
            format!("{text:?} is no probe set: ctime, ext4, trampoline, syscalls or walk")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for set in ProbeSet::ALL {
            assert_eq!(set.name().parse(), Ok(set));
        }
        assert!("fanotify".parse::<ProbeSet>().is_err());
    }
}
