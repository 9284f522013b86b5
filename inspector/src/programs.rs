//! The embedded objects: which there are of each probe set, and what their hooks on files are attached to.

use aya::include_bytes_aligned;

use crate::probes::ProbeSet;

/// One compilation of the programs.
pub(crate) struct Object {
    pub(crate) bytes: &'static [u8],
    /// Program and what it is attached to, of each hook on files.
    pub(crate) files: &'static [(&'static str, &'static str)],
    /// What a kernel lacks that has not one of them.
    pub(crate) lacks: &'static str,
}

static CTIME: Object = Object {
    bytes: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/CTIME.o")),
    files: &[
        ("tp_stamped", "ctime_ns_xchg"),
        ("tp_page_dirty", "writeback_dirty_folio"),
    ],
    lacks: "it needs Linux 6.13 or newer",
};
static EXT4: Object = Object {
    bytes: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/EXT4.o")),
    files: &EXT4_HOOKS,
    lacks: "it needs Linux 6.5 or newer with ext4 built in",
};
static EXT4_RAW: Object = Object {
    bytes: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/EXT4_RAW.o")),
    files: &EXT4_HOOKS,
    lacks: "it needs Linux 6.2 or newer with ext4",
};

const EXT4_HOOKS: [(&str, &str); 3] = [
    ("tp_inode_dirty", "writeback_mark_inode_dirty"),
    ("tp_ext4_dirty", "ext4_mark_inode_dirty"),
    ("tp_ext4_journal", "ext4_journal_start_inode"),
];
static TRAMPOLINE: Object = Object {
    bytes: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/TRAMPOLINE.o")),
    files: &TRAMPOLINE_HOOKS,
    lacks: "it needs Linux 6.6 or newer with CONFIG_SECURITY, that allows trampolines",
};
/// Program and function have one name.
const TRAMPOLINE_HOOKS: [(&str, &str); 17] = [
    ("security_inode_create", "security_inode_create"),
    ("security_inode_symlink", "security_inode_symlink"),
    ("security_inode_mkdir", "security_inode_mkdir"),
    ("security_inode_mknod", "security_inode_mknod"),
    ("security_inode_rmdir", "security_inode_rmdir"),
    ("security_inode_unlink", "security_inode_unlink"),
    ("security_inode_link", "security_inode_link"),
    ("security_inode_rename", "security_inode_rename"),
    ("security_inode_setattr", "security_inode_setattr"),
    ("security_inode_setxattr", "security_inode_setxattr"),
    ("security_inode_removexattr", "security_inode_removexattr"),
    ("security_inode_set_acl", "security_inode_set_acl"),
    ("security_inode_remove_acl", "security_inode_remove_acl"),
    ("vfs_fileattr_set", "vfs_fileattr_set"),
    ("security_file_permission", "security_file_permission"),
    ("file_update_time", "file_update_time"),
    ("__mark_inode_dirty", "__mark_inode_dirty"),
];

static SYSCALLS: Object = Object {
    bytes: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/SYSCALLS.o")),
    files: &[("tp_call", "sys_enter"), ("tp_call_done", "sys_exit")],
    lacks: "it needs Linux 6.5 or newer on x86-64",
};

/// The objects of a probe set, best first.
pub(crate) fn objects(set: ProbeSet) -> Vec<&'static Object> {
    match set {
        ProbeSet::Ctime => vec![&CTIME],
        ProbeSet::Ext4 => vec![&EXT4, &EXT4_RAW],
        ProbeSet::Trampoline => vec![&TRAMPOLINE],
        // The numbers of system calls are those of x86-64.
        ProbeSet::Syscalls if cfg!(target_arch = "x86_64") => vec![&SYSCALLS],
        ProbeSet::Syscalls | ProbeSet::Walk => vec![],
    }
}
