// Noting that an inode was dirtied.
#ifndef TIDEPOOL_DIRTY_H
#define TIDEPOOL_DIRTY_H

// Whether an inode has been noted in this epoch; see below. Asked first: not even whether the inode is of the upper's filesystem matters then, for one that is not,
// and has the number of one that is, is not to be noted at all.
static __always_inline int noted(const struct sandbox *sandbox, u64 ino)
{
	u64 epoch = *(volatile u64 *)&sandbox->epoch;

	return *(volatile u64 *)&sandbox->seen[ino & (SEEN - 1)] == (epoch << 32 | (u32)ino) && !(ino >> 32);
}

// Puts an inode of the sandbox's upper into LOG, once an epoch as a rule.
//
// One change of one file raises a dozen events, so a small cache stands before the log: word `ino % SEEN` of `seen` holds
// {epoch, inode} of the last inode noted there. It forgets (an inode noted again is harmless), but must never claim what is not so:
// - The log comes first, the count second, the cache last, each with full ordering. So whoever finds {epoch, inode} in the cache knows
//   that a reading begun now, or one under way for this epoch, finds the entry.
// - A reading begins with a new epoch. What was cached before then no longer counts, and the log's entries carry the epoch they were
//   noted in: those of the new one belong to the next reading. A program that read the old epoch and is late puts the old one into
//   the log (the next reading has it) and into the cache (where nobody believes it).
// - A word is written at once, so no mixture of two is ever read. Generations are not in it: two inodes that had one number within one
//   epoch are reported once, and whatever has that number is read again.
static __always_inline void note(struct sandbox *sandbox, u64 ino, u32 generation)
{
	u64 epoch = *(volatile u64 *)&sandbox->epoch;
	u64 word = epoch << 32 | (u32)ino;
	volatile u64 *seen = &sandbox->seen[ino & (SEEN - 1)];
	struct dirty *dirty;

	if (sandbox->full == epoch)
		return;
	if (sandbox->logged >= sandbox->allow)
		goto full;
	dirty = bpf_ringbuf_reserve(&LOG, sizeof(*dirty), 0);
	if (!dirty)
		goto full;
	dirty->ino = ino;
	dirty->slot = sandbox->slot;
	dirty->generation = generation;
	dirty->epoch = epoch;
	bpf_ringbuf_submit(dirty, BPF_RB_NO_WAKEUP);
	// Fetching, for the order: an addition alone has none on some processors.
	__sync_fetch_and_add(&sandbox->logged, 1);
	*seen = word;
	return;
full:
	__sync_fetch_and_add(&sandbox->overflow, 1);
	// After the count: a reading that finds this epoch full finds the count moved.
	*(volatile u64 *)&sandbox->full = epoch;
}

#endif
