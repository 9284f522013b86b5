// Files: the `ctime` probe set.
//
// Whatever changes an inode for others to see stamps its change time; the hooks of ext4 fire several times for the same change, and also where blocks
// are allocated or time stamps of reading are kept. A filesystem with multigrain time stamps sets another stamp in one place, which has a tracepoint.
//
// It has none for a stamp that would be what is there already: a second change within a tick of the clock, of an inode that nobody has looked at in between. In one
// turn that is no loss, the first has been noted. Over a boundary it does not happen, for two reasons of which each is enough for all that is captured:
// - what was dirty is looked at by the capture, which makes the kernel take a finer stamp at the next change (src/rearm.rs);
// - the daemon lets a tick pass between a reading in which files were dirty and what the sandbox does next.
// The stamp of a task that another one was ahead of by an instant needs no hook: that one stamped the same inode.
//
// The second hook tells that a clean page became dirty. A write is stamped first, so this is there for what might write without.
//
// Reading an inode from disk sets its time by another way, which is not looked at.
#include "inode.h"

FILE_HOOK("ctime_ns_xchg")
int tp_stamped(u64 *ctx)
{
	return note_dirty((const struct inode *)ctx[0]);
}

FILE_HOOK("writeback_dirty_folio")
int tp_page_dirty(u64 *ctx)
{
	const struct address_space *mapping = (const struct address_space *)ctx[1];

	if (!mapping)
		return 0;
	return note_dirty(mapping->host);
}
