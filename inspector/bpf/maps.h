// Maps, and the filter that stands first in every program.
#ifndef TIDEPOOL_MAPS_H
#define TIDEPOOL_MAPS_H

// The registered sandboxes: an open hash table by the inode of the pid namespace, in an array that the loader maps and
// fills. An array, because its look-up is a few instructions and no call. A sandbox is in one of the PROBES cells from its home on.
#define CELLS 8192 // mirrored in cells.rs
#define PROBES 4

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, CELLS);
	__type(key, u32);
	__type(value, struct sandbox);
} SANDBOXES SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct outside);
} OUTSIDE SEC(".maps");

// Roots of uppers, with the cell of their sandbox.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, CELLS);
	__type(key, struct upper);
	__type(value, u32);
} UPPERS SEC(".maps");

// Dirtied inodes of all sandboxes, in order. Never a map that evicts: that would be a missed change nobody hears of.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16777216); // set at load
} LOG SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4194304); // set at load
} EVENTS SEC(".maps");

// The slot whose tasks the next read of the iterator is about.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} WANTED SEC(".maps");

// The walk of `iter_members`; only one reading is made at a time.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct walk);
} WALK SEC(".maps");

// Slot -> its watch, for as long as there is one.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096); // set at load
	__type(key, u32);
	__type(value, struct watch);
} WATCHED SEC(".maps");

// What the tasks of the sandboxes under watch did.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536); // set at load
	__type(key, struct call_key);
	__type(value, struct task_calls);
} CALLS SEC(".maps");

// The kernel's limit (MAX_PID_NS_LEVEL).
#define MAX_LEVEL 32

// The number and the namespace of a task at one level of its pid namespaces. `pid` is an address, not a
// verified pointer: the array's bounds (one element in the kernel's types) do not apply to it.
static __always_inline void upid_at(const void *pid, u32 level, struct upid *out)
{
	const void *at = pid + bpf_core_field_offset(struct pid, numbers) + level * sizeof(struct upid);

	if (bpf_probe_read_kernel(out, sizeof(*out), at)) {
		out->nr = 0;
		out->ns = 0;
	}
}

// The sandbox registered for a pid namespace.
static __always_inline struct sandbox *cell_of(u32 inum)
{
	struct sandbox *sandbox;
	u32 at;

#pragma unroll
	for (u32 i = 0; i < PROBES; i++) {
		at = (inum + i) & (CELLS - 1);
		sandbox = bpf_map_lookup_elem(&SANDBOXES, &at);
		if (sandbox && sandbox->pid_ns == inum)
			return sandbox;
	}
	return 0;
}

#if DIRECT
// The levels that are looked at by plain loads, which needs the array of levels to be a flexible one in the kernel's types (6.5).
#define NEAR 2

// The verifier takes a constant offset from a typed pointer for what it is.
static __always_inline u32 near_inum(struct pid *pid, const u32 level)
{
	struct upid *upid;

	upid = (void *)pid + bpf_core_field_offset(struct pid, numbers) + level * sizeof(struct upid);
	return upid->ns->ns.inum;
}
#else
#define NEAR 0
#endif

// The sandbox a task belongs to: that of the outermost of its pid namespaces that is registered, so
// that namespaces made inside belong to it too. Kernel threads never belong to one: writeback by a
// kworker is not a change made now. io-wq workers are not kernel threads in this sense and stay.
static __always_inline struct sandbox *sandbox_of(struct task_struct *task, u32 *at_level)
{
	struct sandbox *sandbox;
	struct upid upid;
	struct pid *pid;
	u32 level, depth, inum;

	if (task->flags & PF_KTHREAD)
		return 0;
	pid = task->thread_pid;
	if (!pid)
		return 0;
	depth = pid->level;
	if (depth == 0)
		return 0; // the host's own processes: most of them end here
#if DIRECT
	sandbox = cell_of(near_inum(pid, 1));
	*at_level = 1;
	if (sandbox || depth == 1)
		return sandbox;
	sandbox = cell_of(near_inum(pid, 2));
	*at_level = 2;
	if (sandbox || depth == 2)
		return sandbox;
#endif
	for (level = NEAR + 1; level <= MAX_LEVEL; level++) {
		if (level > depth)
			break;
		upid_at(pid, level, &upid);
		inum = BPF_CORE_READ(upid.ns, ns.inum);
		sandbox = cell_of(inum);
		if (sandbox) {
			*at_level = level;
			return sandbox;
		}
	}
	return 0;
}

// The number of a task at one level; 0 if it has none (any more).
static __always_inline u32 number_at(struct task_struct *task, u32 level)
{
	struct upid upid;
	const void *pid;

	pid = BPF_CORE_READ(task, thread_pid);
	if (!pid)
		return 0;
	upid_at(pid, level, &upid);
	return upid.nr;
}

#endif
