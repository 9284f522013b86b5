// Files: the `ext4` probe set.
//
// Three hooks, because none sees everything: writeback_mark_inode_dirty misses what changes directory
// entries only, and both mark_inode_dirty hooks miss small extended attributes and inode flags, which
// only start a journal handle.
#include "outside.h"

#if DIRECT
#define FILE_HOOK(tracepoint) SEC("tp_btf/" tracepoint)
#define GET(inode, field) ((inode)->field)
#define DEVICE(inode) ((inode)->i_sb->s_dev)
#else
#define FILE_HOOK(tracepoint) SEC("raw_tracepoint/" tracepoint)
#define GET(inode, field) BPF_CORE_READ(inode, field)
#define DEVICE(inode) BPF_CORE_READ(inode, i_sb, s_dev)
#endif

// Each of the three has the inode as its first argument.
static __always_inline int note_dirty(const struct inode *inode)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct sandbox *sandbox;
	u32 level;
	u64 ino;

	sandbox = sandbox_of(task, &level);
	if (!sandbox) {
		note_outside(task, inode, DEVICE(inode));
		return 0;
	}
	ino = GET(inode, i_ino);
	if (noted(sandbox, ino))
		return 0;
	if (DEVICE(inode) != sandbox->dev)
		return 0; // pipes, proc, the overlay itself, other mounts
	note(sandbox, ino, GET(inode, i_generation));
	return 0;
}

FILE_HOOK("writeback_mark_inode_dirty")
int tp_inode_dirty(u64 *ctx)
{
	return note_dirty((const struct inode *)ctx[0]);
}

FILE_HOOK("ext4_mark_inode_dirty")
int tp_ext4_dirty(u64 *ctx)
{
	return note_dirty((const struct inode *)ctx[0]);
}

FILE_HOOK("ext4_journal_start_inode")
int tp_ext4_journal(u64 *ctx)
{
	return note_dirty((const struct inode *)ctx[0]);
}
