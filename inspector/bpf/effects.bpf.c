// Tidepool's eBPF programs: which inodes of its upper a sandbox dirties, which processes come and go,
// and, on request, how far each of its tasks has run and what it does after a thaw.
//
// All programs only look; none changes what the kernel does. This source is compiled once for each probe set (see build.rs):
//   CTIME       tracepoints of the stamping of inodes, and of writeback
//   EXT4        tracepoints of ext4 and of writeback, as typed tracepoints with plain loads (DIRECT)
//   EXT4_RAW    the same as raw tracepoints with reads by call: where ext4 is a module, or the kernel older than 6.5
//   TRAMPOLINE  entries of VFS and security functions: any filesystem
//   SYSCALLS    entries and ends of system calls: no inodes, only "something may have changed"
#if !defined(EXT4_RAW)
#define DIRECT 1
#else
#define DIRECT 0
#endif
#include "kernel.h"
#include "records.h"
#include "maps.h"

#if defined(CTIME)
#include "files_ctime.h"
#elif defined(EXT4) || defined(EXT4_RAW)
#include "files_ext4.h"
#elif defined(TRAMPOLINE)
#include "files_trampoline.h"
#elif defined(SYSCALLS)
#include "calls.h"
#include "files_syscalls.h"
#else
#error "no probe set"
#endif

// ---- processes ----------------------------------------------------------------------------------------

static __always_inline struct event *new_event(u32 kind, struct task_struct *task,
					       struct task_struct *parent)
{
	struct sandbox *sandbox;
	struct event *event;
	u32 level = 0;

	sandbox = sandbox_of(task, &level);
	if (!sandbox)
		return 0;
	event = bpf_ringbuf_reserve(&EVENTS, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&sandbox->events_lost, 1);
		__sync_fetch_and_add(&sandbox->events, 1);
		return 0;
	}
	__sync_fetch_and_add(&sandbox->events, 1);
	event->kind = kind;
	event->slot = sandbox->slot;
	event->tid = task->pid;
	event->tgid = task->tgid;
	event->ns_tid = number_at(task, level);
	event->ns_tgid = number_at(task->group_leader, level);
	event->parent_tgid = parent->tgid;
	event->exit_code = task->exit_code;
	event->start_boottime = task->start_boottime;
	BPF_CORE_READ_INTO(&event->comm, task, comm);
	event->path[0] = 0;
	return event;
}

SEC("tp_btf/sched_process_fork")
int tp_fork(u64 *ctx)
{
	struct task_struct *parent = (struct task_struct *)ctx[0];
	struct task_struct *child = (struct task_struct *)ctx[1];
	struct event *event = new_event(EVENT_FORK, child, parent);

	if (event)
		bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int tp_exec(u64 *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx[0];
	struct linux_binprm *bprm = (struct linux_binprm *)ctx[2];
	struct event *event = new_event(EVENT_EXEC, task, task->real_parent);

	if (event) {
		bpf_probe_read_kernel_str(event->path, sizeof(event->path), bprm->filename);
		bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	}
	return 0;
}

SEC("tp_btf/sched_process_exit")
int tp_exit(u64 *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx[0];
	struct event *event = new_event(EVENT_EXIT, task, task->real_parent);

	if (event)
		bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
#ifdef SYSCALLS
	// The kernel has written a core file for it, without a call.
	if (task->exit_code & 0x80) {
		struct sandbox *sandbox;
		u32 level;

		sandbox = sandbox_of(task, &level);
		if (sandbox)
			may_have_changed(sandbox, 231);
	}
#endif
	return 0;
}

// ---- which tasks ran ----------------------------------------------------------------------------------

// The sandbox a task is of, where it is the one that is asked about.
static __always_inline struct sandbox *asked_about(struct task_struct *task, u32 *level)
{
	struct sandbox *sandbox;
	u32 zero = 0;
	u32 *wanted;

	sandbox = sandbox_of(task, level);
	if (!sandbox)
		return 0;
	wanted = bpf_map_lookup_elem(&WANTED, &zero);
	if (!wanted || *wanted != sandbox->slot)
		return 0;
	return sandbox;
}

SEC("iter/task")
int iter_tasks(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct task_record record = {};
	u32 level = 0;

	if (!task || !asked_about(task, &level))
		return 0;

	record.tid = task->pid;
	record.tgid = task->tgid;
	record.ns_tid = number_at(task, level);
	record.ns_tgid = number_at(task->group_leader, level);
	record.parent_tgid = task->real_parent->tgid;
	record.exit_state = task->exit_state;
	// The counters of a task that is on a CPU move at the next tick or switch only; so that fact is
	// itself part of the reading.
	record.running = task->__state == 0 || task->on_rq != 0;
	if (bpf_core_field_exists(task->on_cpu))
		record.running = record.running || task->on_cpu != 0;
	record.start_boottime = task->start_boottime;
	record.sum_exec_runtime = task->se.sum_exec_runtime;
	record.nvcsw = task->nvcsw;
	record.nivcsw = task->nivcsw;
	if (bpf_core_field_exists(task->sched_info.pcount))
		record.pcount = task->sched_info.pcount;
	BPF_CORE_READ_INTO(&record.comm, task, comm);
	record.state = task->__state;
	record.stopping = (task->signal->shared_pending.signal.sig[0] & STOP_SIGNALS) != 0;
	if (bpf_core_field_exists(((struct pt_regs *)0)->orig_ax)) {
		struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);

		if (regs->cs == USER_CS_64 && !(task->thread_info.status & TS_COMPAT)) {
			record.known = 1;
			record.orig_ax = regs->orig_ax;
			record.ax = regs->ax;
			record.ip = regs->ip;
			record.sp = regs->sp;
			record.si = regs->si;
			record.dx = regs->dx;
			record.r10 = regs->r10;
		}
	}
	// A record that does not fit makes the kernel offer the task again with an empty buffer.
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}

#include "members.h"

// ---- what tasks do after a thaw -----------------------------------------------------------------------
//
// Attached only while something is under watch: they cost every system call of the machine something.

static __always_inline struct task_calls *calls_of(struct task_struct *task)
{
	struct task_calls fresh = {};
	struct task_calls *calls;
	struct call_key key = {};
	struct sandbox *sandbox;
	struct watch *watch;
	u32 level, slot;

	sandbox = sandbox_of(task, &level);
	if (!sandbox)
		return 0;
	slot = sandbox->slot;
	watch = bpf_map_lookup_elem(&WATCHED, &slot);
	if (!watch)
		return 0;
	key.watch = watch->id;
	key.tid = task->pid;
	calls = bpf_map_lookup_elem(&CALLS, &key);
	if (calls)
		return calls;
	fresh.tgid = task->tgid;
	bpf_map_update_elem(&CALLS, &key, &fresh, BPF_NOEXIST);
	calls = bpf_map_lookup_elem(&CALLS, &key);
	if (!calls)
		__sync_fetch_and_add(&watch->lost, 1);
	return calls;
}

static __always_inline void note_call(struct call *call, struct task_struct *task,
				      const struct pt_regs *regs, s64 nr)
{
	call->nr = -1;
	call->nvcsw = task->nvcsw;
	if (!bpf_core_field_exists(((struct pt_regs *)0)->orig_ax))
		return;
	if (BPF_CORE_READ(regs, cs) != USER_CS_64 || task->thread_info.status & TS_COMPAT)
		return; // the numbers mean other calls there
	call->nr = nr;
	call->ip = BPF_CORE_READ(regs, ip);
	call->sp = BPF_CORE_READ(regs, sp);
	call->si = BPF_CORE_READ(regs, si);
	call->dx = BPF_CORE_READ(regs, dx);
	call->r10 = BPF_CORE_READ(regs, r10);
}

SEC("raw_tracepoint/sys_enter")
int tp_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	const struct pt_regs *regs = (const struct pt_regs *)ctx->args[0];
	struct task_calls *calls = calls_of(task);

	if (!calls)
		return 0;
	if (calls->count == 0)
		note_call(&calls->first, task, regs, (s64)ctx->args[1]);
	// After the call, never before: a reader that finds the count finds the call.
	__sync_fetch_and_add(&calls->count, 1);
	return 0;
}

SEC("raw_tracepoint/signal_deliver")
int tp_signal(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_calls *calls = calls_of(bpf_get_current_task_btf());

	if (calls)
		__sync_fetch_and_add(&calls->signals, 1);
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
