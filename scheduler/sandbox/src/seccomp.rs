//! Which system calls a sandbox may not make.
//!
//! The same calls container engines refuse: those that reach beyond the sandbox, or that its capabilities would refuse
//! anyway. io_uring is answered as if the kernel did not have it, because its rings cannot be checkpointed and libraries then
//! fall back to what can.

use serde_json::{Value, json};

/// Answered with EPERM.
const REFUSED: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "clock_adjtime",
    "clock_adjtime64",
    "clock_settime",
    "clock_settime64",
    "create_module",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mount",
    "mount_setattr",
    "move_mount",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    // Nothing would show that the process it writes to was changed; debuggers take other ways.
    "process_vm_writev",
    "query_module",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "setdomainname",
    "sethostname",
    "setns",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "syslog",
    "sysfs",
    "_sysctl",
    "umount",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vm86",
    "vm86old",
];

/// Answered with ENOSYS: callers know what to do without them. The flags of `clone3` are out of a filter's sight.
const UNKNOWN: &[&str] = &[
    "clone3",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
];

const CLONE_NAMESPACES: u64 = 0x7E02_0000;
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// The `linux.seccomp` part of an OCI configuration.
pub(crate) fn profile() -> Value {
    let architectures: &[&str] = if cfg!(target_arch = "x86_64") {
        &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    } else if cfg!(target_arch = "aarch64") {
        &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    } else {
        &[]
    };
    let family = |value: u64| {
        json!({
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": libc::EAFNOSUPPORT,
            "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}],
        })
    };
    let mut rules = vec![
        json!({"names": REFUSED, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM}),
        json!({"names": UNKNOWN, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}),
        family(AF_ALG),
        family(AF_VSOCK),
    ];
    // New namespaces would give capabilities over parts of the kernel that a sandbox has no business with. One rule for
    // each flag: a masked comparison tells whether all its bits are set, not whether any is.
    for bit in (0..64)
        .map(|b| 1u64 << b)
        .filter(|b| CLONE_NAMESPACES & b != 0)
    {
        rules.push(json!({
            "names": ["clone"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": libc::EPERM,
            "args": [{"index": 0, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ"}],
        }));
    }
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": rules})
}
