// What the programs and the loader hand each other. src/raw.rs mirrors every struct here;
// the _Static_asserts keep both sides to one size.
#ifndef TIDEPOOL_RECORDS_H
#define TIDEPOOL_RECORDS_H

// Words of the cache in front of the log, a power of two.
#define SEEN 64

// One registered sandbox: a cell of SANDBOXES, mapped into the loader's memory (src/cells.rs mirrors it).
//
// The first line is the loader's, but for `full`; the programs only read it. The counters only ever grow, so that a reader
// compares instead of resetting and no increment can fall between a read and a reset.
struct sandbox {
	u32 pid_ns; // 0 where the cell is free; written last when it is taken
	u32 slot;   // never used twice while the programs are loaded
	u32 dev;    // device of the upper, kernel form (major << 20 | minor)
	u32 pad;
	u64 epoch; // of the reading that is to come; 0 never
	u64 allow; // `logged` may come this far before the loader has read on
	u64 full;  // the epoch in which something found no room: all is dirty in it, nothing more is noted
	u64 pad1[3];

	u64 logged;      // entries put into LOG
	u64 overflow;    // changes that found no room in LOG, the first of an epoch only
	u64 events;      // process events, delivered or lost
	u64 events_lost; // process events that found no room in EVENTS
	u64 calls;       // the `syscalls` set: calls that may have changed files
	u64 last_call;   // one of them
	u64 rings;       // the `syscalls` set: asynchronous rings made; they act without calls
	u64 outside;     // changes made from outside

	u64 seen[SEEN]; // see note in dirty.h
};
_Static_assert(sizeof(struct sandbox) == 128 + 8 * SEEN, "mirrored in cells.rs");

// Words of the cache in front of the look at where a file is, a power of two.
#define KNOWN 1024
// Devices that uppers may be on, before every device is looked at.
#define DEVICES 4

// What is known of changes by tasks outside of all sandboxes: the one cell of OUTSIDE, mapped into the loader's memory (src/outside.rs mirrors it).
struct outside {
	u32 own;           // the loader's process, whose doing is not reported
	u32 dev[DEVICES];  // devices of uppers, kernel form; 0 where there are fewer
	u32 more;          // there are more
	u32 started;       // what processes do that the loader started is not reported either
	u32 pad;
	u64 generation;    // of `known`; moves where something may have come to lie in an upper
	u64 changed;       // when something in an upper was last changed from outside, by the kernel's coarse clock
	u64 beyond;        // changes of which could not be told where they were
	u64 known[KNOWN];  // {generation, inode}: surely in no upper. See note_outside
};
_Static_assert(sizeof(struct outside) == 56 + 8 * KNOWN, "mirrored in outside.rs");

// The root of an upper.
struct upper {
	u64 ino;
	u32 dev;
	u32 pad;
};
_Static_assert(sizeof(struct upper) == 16, "mirrored in outside.rs");

// An entry of LOG.
struct dirty {
	u64 ino;
	u32 slot;
	u32 generation;
	u64 epoch;
};
_Static_assert(sizeof(struct dirty) == 24, "mirrored in raw.rs");

enum event_kind { EVENT_FORK = 1, EVENT_EXEC = 2, EVENT_EXIT = 3 };

struct event {
	u32 kind;
	u32 slot;
	u32 tid; // in the root pid namespace
	u32 tgid;
	u32 ns_tid; // in the sandbox's pid namespace
	u32 ns_tgid;
	u32 parent_tgid;
	s32 exit_code; // as in task_struct: status << 8 | signal
	u64 start_boottime;
	char comm[16];
	char path[128]; // exec only
};
_Static_assert(sizeof(struct event) == 184, "mirrored in raw.rs");

struct task_record {
	u32 tid;
	u32 tgid;
	u32 ns_tid;
	u32 ns_tgid;
	u32 parent_tgid;
	u32 exit_state;
	u32 running; // on a CPU, queued for one, or about to be
	u32 state;   // as in task_struct
	u64 start_boottime;
	u64 sum_exec_runtime;
	u64 nvcsw;
	u64 nivcsw;
	u64 pcount;
	char comm[16];
	// Where it entered the kernel: its registers as they will be on the return to user mode.
	u64 known; // 1: in 64-bit code on x86-64; otherwise the following are 0
	u64 orig_ax;
	u64 ax;
	u64 ip;
	u64 sp;
	u64 si;
	u64 dx;
	u64 r10;
	u64 stopping; // a signal that stops its process waits for it
};
_Static_assert(sizeof(struct task_record) == 160, "mirrored in raw.rs");

// Tasks that one reading by `iter_members` can have: they fit into the kernel's buffer for one answer (32 KiB).
#define MEMBERS 192 // mirrored in raw.rs

// Levels of the kernel's table of process numbers, 64 entries a node, that are gone down: 2^24 numbers, more than there can be.
#define LEVELS 4
#define SLOTS 64

// Where a walk through that table is.
struct walk {
	u64 slots[LEVELS][SLOTS]; // of the node at each level
	u32 at[LEVELS];           // the next of them
	u32 depth;
	u32 level; // of the pid namespace
	u32 count; // tasks found
	u32 done;  // to the end
	struct task_record found[MEMBERS];
};

// A sandbox under watch at a thaw.
struct watch {
	u32 id; // never used twice while the programs are loaded
	u32 pad;
	u64 lost; // tasks that found no room in CALLS
};
_Static_assert(sizeof(struct watch) == 16, "mirrored in calls.rs");

struct call_key {
	u32 watch;
	u32 tid;
};
_Static_assert(sizeof(struct call_key) == 8, "mirrored in calls.rs");

struct call {
	s64 nr;
	u64 ip;
	u64 sp;
	u64 si;
	u64 dx;
	u64 r10;
	u64 nvcsw; // voluntary context switches before it
};

// What a task did since the watch began. Written by the task itself only.
struct task_calls {
	u32 count;   // system calls entered
	u32 signals; // signals delivered
	u32 tgid;
	u32 pad;
	struct call first; // the first of them
};
_Static_assert(sizeof(struct task_calls) == 72, "mirrored in calls.rs");

#endif
