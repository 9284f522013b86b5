// Noting an inode that a tracepoint gives, for the probe sets whose hooks give inodes.
#ifndef TIDEPOOL_INODE_H
#define TIDEPOOL_INODE_H

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

#endif
