// Files: the `ext4` probe set.
//
// Three hooks, because none sees everything: writeback_mark_inode_dirty misses what changes directory
// entries only, and both mark_inode_dirty hooks miss small extended attributes and inode flags, which
// only start a journal handle.
// Each of the three has the inode as its first argument.
#include "inode.h"

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
