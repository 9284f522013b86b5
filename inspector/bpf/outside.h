// Changes made to an upper by a task that is in no sandbox: by the host, or through /proc/PID/root.
//
// Whose an inode is tells the way up from it: through the names it has, and the directories they are in, to the root of an upper or of the
// filesystem. That is long for a hook, and hosts write a lot that is in no upper, so inodes of which that is known are remembered. That must never be wrong:
// - What is remembered counts for one generation. A change in an upper from outside begins a new one, and for a while after it nothing is remembered: a file that
//   is moved or linked into an upper is marked dirty once more after the directory is, and before its name is there.
// - With stamps alone (files_ctime.h) a directory's change has no event where another one stamped it in the same tick, be that from outside, when the above
//   holds already, or the sandbox: so a reading that found anything dirty begins a new generation too.
// - Files without a name, or with several, are not remembered, nor what could not be followed to its end.
// What a sandbox's own tasks do never comes here. The loader's process is left out, and where it wants that, those that it started: it
// makes uppers, arms them again, and has sandboxes dumped, for which CRIU makes directories in them and takes them away.
#ifndef TIDEPOOL_OUTSIDE_H
#define TIDEPOOL_OUTSIDE_H

#include "dirty.h"

// Names of one file that are followed: those that the kernel has met. Some hosts have files with hundreds, none of which is in an upper, and to doubt each time
// such a file is written would have uppers walked for nothing; so what has its name in an upper behind that many others is missed.
#define NAMES 16
// Directories above it. What lies deeper is in doubt.
#define DEPTH 48

// Far longer than from the change of a directory to the end of its call.
#define WHILE_AFTER 2000000000ull

// What is not the number of a cell.
enum whose {
	NOBODYS = -1,      // surely in no upper
	NOBODYS_NOW = -2,  // the same, but not to be remembered
	UNTOLD = -3,
};

// Of the file of this name: a cell, NOBODYS or UNTOLD.
static __always_inline int upper_above(const struct dentry *dentry, u32 dev)
{
	const struct dentry *parent;
	struct upper key = { .dev = dev };
	u32 *found;

	for (u32 i = 0; i < DEPTH; i++) {
		key.ino = BPF_CORE_READ(dentry, d_inode, i_ino);
		found = bpf_map_lookup_elem(&UPPERS, &key);
		if (found)
			return *found & (CELLS - 1);
		parent = BPF_CORE_READ(dentry, d_parent);
		if (parent == dentry)
			return NOBODYS;
		dentry = parent;
	}
	return UNTOLD;
}

static __noinline int whose(const struct inode *inode, u32 dev)
{
	const void *alias;
	int at, untold = 0;
	u32 names;

	if (!bpf_core_field_exists(((struct dentry *)0)->d_u.d_alias))
		return UNTOLD;
	alias = BPF_CORE_READ(inode, i_dentry.first);
	for (names = 0; names < NAMES && alias; names++) {
		at = upper_above(alias - bpf_core_field_offset(struct dentry, d_u.d_alias), dev);
		if (at >= 0)
			return at;
		if (at == UNTOLD)
			untold = 1;
		alias = BPF_CORE_READ((const struct hlist_node *)alias, next);
	}
	if (untold)
		return UNTOLD;
	if (names != 1)
		return NOBODYS_NOW;
	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) != S_IFDIR && BPF_CORE_READ(inode, i_nlink) > 1)
		return NOBODYS_NOW;
	return NOBODYS;
}

// Generations of processes between the loader and one that works for it.
#define LINE 6

static __always_inline int works_for(const struct task_struct *task, u32 own)
{
	for (u32 i = 0; i < LINE; i++) {
		task = BPF_CORE_READ(task, real_parent);
		if ((u32)BPF_CORE_READ(task, tgid) == own)
			return 1;
	}
	return 0;
}

static __always_inline void note_outside(struct task_struct *task, const struct inode *inode, u32 dev)
{
	struct sandbox *sandbox;
	struct outside *outside;
	u32 zero = 0;
	u64 ino, word, now;
	int at;

	if (task->flags & PF_KTHREAD)
		return;
	outside = bpf_map_lookup_elem(&OUTSIDE, &zero);
	if (!outside)
		return;
	if (dev != outside->dev[0] && dev != outside->dev[1] && dev != outside->dev[2] &&
	    dev != outside->dev[3] && !outside->more)
		return;
	if (task->tgid == outside->own)
		return;
	ino = BPF_CORE_READ(inode, i_ino);
	// Before the look.
	word = *(volatile u64 *)&outside->generation << 32 | (u32)ino;
	if (*(volatile u64 *)&outside->known[ino & (KNOWN - 1)] == word && !(ino >> 32))
		return;
	at = whose(inode, dev);
	now = bpf_ktime_get_ns();
	switch (at) {
	case NOBODYS:
		if (now - *(volatile u64 *)&outside->changed > WHILE_AFTER)
			*(volatile u64 *)&outside->known[ino & (KNOWN - 1)] = word;
		return;
	case NOBODYS_NOW:
		return;
	case UNTOLD:
		__sync_fetch_and_add(&outside->beyond, 1);
		return;
	}
	*(volatile u64 *)&outside->changed = now;
	__sync_fetch_and_add(&outside->generation, 1);
	if (outside->started && works_for(task, outside->own))
		return;
	zero = at;
	sandbox = bpf_map_lookup_elem(&SANDBOXES, &zero);
	if (!sandbox || !sandbox->pid_ns || sandbox->dev != dev)
		return;
	// First, so that a reading that has the entry has its reason.
	__sync_fetch_and_add(&sandbox->outside, 1);
	if (!noted(sandbox, ino))
		note(sandbox, ino, BPF_CORE_READ(inode, i_generation));
}

#endif
