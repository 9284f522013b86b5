// Files: the `trampoline` probe set.
//
// At the entries of the kernel's security functions and of a few of its VFS, so on any filesystem. Overlay calls them for its own inodes and
// again for those of the upper; the device tells which are which. The functions are entered before the change is made, so the rule for readings is
// the same as for the other sets: an event may be ahead of its change for as long as its task is in the kernel.
//
// Linux 6.6: before, some of the functions had other arguments.
#include "outside.h"

#define MAY_WRITE 0x2
#define MAY_APPEND 0x8
#define I_DIRTY_TIME (1 << 11)

static __always_inline void note_inode(const struct inode *inode)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct sandbox *sandbox;
	u32 level;

	if (!inode)
		return;
	sandbox = sandbox_of(task, &level);
	if (!sandbox) {
		note_outside(task, inode, inode->i_sb->s_dev);
		return;
	}
	if (noted(sandbox, inode->i_ino) || inode->i_sb->s_dev != sandbox->dev)
		return;
	note(sandbox, inode->i_ino, inode->i_generation);
}

#define ENTRY(function) SEC("fentry/" #function) int function(u64 *ctx)
#define INODE(n) note_inode((const struct inode *)ctx[n])
// What a name stands for; nothing as long as it is only to become one.
#define DENTRY(n) note_inode(((const struct dentry *)ctx[n])->d_inode)
#define FILE(n) note_inode(((const struct file *)ctx[n])->f_inode)

// Names: what is new is found by its directory.
ENTRY(security_inode_create) { INODE(0); return 0; }
ENTRY(security_inode_symlink) { INODE(0); return 0; }
ENTRY(security_inode_mkdir) { INODE(0); return 0; }
ENTRY(security_inode_mknod) { INODE(0); return 0; }
ENTRY(security_inode_rmdir) { INODE(0); return 0; }
ENTRY(security_inode_unlink) { INODE(0); DENTRY(1); return 0; }
ENTRY(security_inode_link) { DENTRY(0); INODE(1); return 0; }
ENTRY(security_inode_rename) { INODE(0); DENTRY(1); INODE(2); DENTRY(3); return 0; }

// Attributes, truncation.
ENTRY(security_inode_setattr) { DENTRY(1); return 0; }
ENTRY(security_inode_setxattr) { DENTRY(1); return 0; }
ENTRY(security_inode_removexattr) { DENTRY(1); return 0; }
ENTRY(security_inode_set_acl) { DENTRY(1); return 0; }
ENTRY(security_inode_remove_acl) { DENTRY(1); return 0; }
ENTRY(vfs_fileattr_set) { DENTRY(1); return 0; }

// Contents: every way of writing asks for permission; stores to a mapping update the times when they first make a page writable, and
// every page that becomes dirty marks its inode.
ENTRY(security_file_permission)
{
	if (ctx[1] & (MAY_WRITE | MAY_APPEND))
		FILE(0);
	return 0;
}
ENTRY(file_update_time) { FILE(0); return 0; }
ENTRY(__mark_inode_dirty)
{
	// Times alone, kept in memory for later: of reading, or set by one of the above.
	if ((u32)ctx[1] != I_DIRTY_TIME)
		INODE(0);
	return 0;
}
