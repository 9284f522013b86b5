// Files: the `ctime` probe set.
//
// Whatever changes an inode for others to see stamps its change time, once; the hooks of ext4 fire several times for the same change, and
// also where blocks are allocated or time stamps of reading are kept. A filesystem with multigrain time stamps does that in one
// place, which has a tracepoint for either outcome: another time was set, or it was that time already (several changes within a tick of the clock).
// The third outcome, another task being ahead by an instant, has none, and needs none: that one stamped the same inode.
//
// Data may be written without a stamp: in the same tick as the last one, by a store to a mapping that was writable already. So the third hook tells
// that a clean page became dirty. What remains is a page that is dirty already, of a file that was stamped in this tick, before a boundary:
// after it the file has been looked at, which makes the kernel stamp it again at the next write, and its pages are written back (src/rearm.rs).
//
// That same look makes the next stamp another one, so that the first hook alone sees all that the fuzzer does. The other two are
// there so that this does not hang on everything having been looked at: without a look too, no change of names or attributes goes unseen.
//
// Reading an inode from disk sets its time by another way, which is not looked at.
#include "inode.h"

FILE_HOOK("ctime_ns_xchg")
int tp_stamped(u64 *ctx)
{
	return note_dirty((const struct inode *)ctx[0]);
}

FILE_HOOK("ctime_xchg_skip")
int tp_stamped_alike(u64 *ctx)
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
