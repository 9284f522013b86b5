// What the programs and the loader hand each other. src/raw.rs mirrors every struct here;
// the _Static_asserts keep both sides to one size.
#ifndef TIDEPOOL_RECORDS_H
#define TIDEPOOL_RECORDS_H

// One registered sandbox. The counters only ever grow, so that a reader compares instead of resetting
// and no increment can fall between a read and a reset.
struct sandbox {
	u32 slot;        // never used twice while the programs are loaded
	u32 dev;         // device of the upper, kernel form (major << 20 | minor)
	u64 added;       // inodes newly put into DIRTY
	u64 overflow;    // inodes that could not be put into DIRTY
	u64 events;      // process events, delivered or lost
	u64 events_lost; // process events that found no room in EVENTS
};
_Static_assert(sizeof(struct sandbox) == 40, "mirrored in raw.rs");

struct dirty_key {
	u64 ino;
	u32 dev;
	u32 slot;
};
_Static_assert(sizeof(struct dirty_key) == 16, "mirrored in raw.rs");

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
};
_Static_assert(sizeof(struct task_record) == 152, "mirrored in raw.rs");

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
