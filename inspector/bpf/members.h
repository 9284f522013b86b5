// The tasks of one sandbox without a look at any other of the host.
//
// The task iterator goes through all tasks of the host. Here it is called for one task of the sandbox only (the loader gives it that
// number), and goes from there through the table of process numbers of the sandbox's own pid namespace, in which the kernel itself looks
// for tasks by their numbers: an xarray, whose nodes and entries are freed a grace period after they are taken out. An iterator's program runs
// within a read-side section, so:
// - Whatever is in the table for the whole of the walk is found: entries do not move between nodes, and a node that is taken out goes
//   empty (nothing to be found), or is replaced at the top by the one child it has left, which it goes on to name or marks as moved. Such
//   a mark ends the walk without an answer.
// - What comes meanwhile may be found or not, as with the iterator.
// A walk without an answer (also one that has too many tasks) writes nothing, and the loader asks the iterator for all tasks.
#ifndef TIDEPOOL_MEMBERS_H
#define TIDEPOOL_MEMBERS_H

// Entries of an xarray that are nodes, or marks.
#define INTERNAL(entry) (((entry) & 3) == 2)
#define HIGHEST_MARK 4096

// Steps of a walk: every entry of every node, and one more a node.
#define STEPS (1 << 20)

// Goes on with a node.
static __always_inline long enter(struct walk *walk, u32 depth, u64 entry)
{
	const void *slots;

	if (depth >= LEVELS || !INTERNAL(entry) || entry <= HIGHEST_MARK)
		return 1;
	slots = (const void *)(entry - 2) + bpf_core_field_offset(struct xa_node, slots);
	if (bpf_probe_read_kernel(walk->slots[depth], sizeof(walk->slots[depth]), slots))
		return 1;
	walk->at[depth] = 0;
	walk->depth = depth;
	return 0;
}

// Takes a number's task, if it has one still.
static __always_inline long found(struct walk *walk, const void *pid)
{
	struct task_record *record;
	struct task_struct *task;
	struct upid upid;
	void *first = 0;
	u32 at = walk->count;

	if (bpf_probe_read_kernel(&first, sizeof(first), pid + bpf_core_field_offset(struct pid, tasks)))
		return 1;
	if (!first)
		return 0; // of a process group or session only
	task = first - bpf_core_field_offset(struct task_struct, pid_links);
	if (BPF_CORE_READ(task, flags) & PF_KTHREAD)
		return 0;
	if (at >= MEMBERS)
		return 1;
	record = &walk->found[at];
	upid_at(pid, walk->level, &upid);
	record->tid = BPF_CORE_READ(task, pid);
	record->tgid = BPF_CORE_READ(task, tgid);
	record->ns_tid = upid.nr;
	record->ns_tgid = number_at(BPF_CORE_READ(task, group_leader), walk->level);
	record->parent_tgid = BPF_CORE_READ(task, real_parent, tgid);
	record->exit_state = BPF_CORE_READ(task, exit_state);
	record->state = BPF_CORE_READ(task, __state);
	// As in iter_tasks.
	record->running = record->state == 0 || BPF_CORE_READ(task, on_rq) != 0;
	if (bpf_core_field_exists(task->on_cpu) && BPF_CORE_READ(task, on_cpu) != 0)
		record->running = 1;
	record->start_boottime = BPF_CORE_READ(task, start_boottime);
	record->sum_exec_runtime = BPF_CORE_READ(task, se.sum_exec_runtime);
	record->nvcsw = BPF_CORE_READ(task, nvcsw);
	record->nivcsw = BPF_CORE_READ(task, nivcsw);
	record->pcount = 0;
	if (bpf_core_field_exists(task->sched_info.pcount))
		record->pcount = BPF_CORE_READ(task, sched_info.pcount);
	BPF_CORE_READ_INTO(&record->comm, task, comm);
	record->known = 0; // registers are read by iter_tasks only
	walk->count = at + 1;
	return 0;
}

// One step; not 0 ends the walk.
static long step(u32 i, void *unused)
{
	struct walk *walk;
	u32 zero = 0, depth, at;
	u64 entry;

	walk = bpf_map_lookup_elem(&WALK, &zero);
	if (!walk)
		return 1;
	depth = walk->depth;
	if (depth >= LEVELS)
		return 1;
	at = walk->at[depth];
	if (at >= SLOTS) {
		if (depth == 0) {
			walk->done = 1;
			return 1;
		}
		walk->depth = depth - 1;
		return 0;
	}
	walk->at[depth] = at + 1;
	entry = walk->slots[depth][at];
	if (!entry)
		return 0;
	if (INTERNAL(entry))
		return enter(walk, depth + 1, entry);
	return found(walk, (const void *)entry);
}

SEC("iter/task")
int iter_members(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct sandbox *sandbox;
	struct upid upid;
	struct walk *walk;
	u32 zero = 0, level = 0, count;

	if (!task)
		return 0;
	sandbox = asked_about(task, &level);
	walk = bpf_map_lookup_elem(&WALK, &zero);
	if (!sandbox || !walk)
		return 0;
	// Where a node has another size than here.
	if (bpf_core_field_size(((struct xa_node *)0)->slots) != sizeof(walk->slots[0]))
		return 0;
	upid_at(BPF_CORE_READ(task, thread_pid), level, &upid);
	if (!upid.ns || BPF_CORE_READ(upid.ns, ns.inum) != sandbox->pid_ns)
		return 0;
	walk->level = level;
	walk->count = 0;
	walk->done = 0;
	if (enter(walk, 0, (u64)BPF_CORE_READ(upid.ns, idr.idr_rt.xa_head)))
		return 0;
	bpf_loop(STEPS, step, 0, 0);
	count = walk->count;
	if (walk->done && count > 0 && count <= MEMBERS)
		bpf_seq_write(ctx->meta->seq, walk->found, count * sizeof(struct task_record));
	return 0;
}

#endif
