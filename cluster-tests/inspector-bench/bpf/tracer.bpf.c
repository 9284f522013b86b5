// The reference: a tracer of the kind that security tools attach. Each system call of one pid namespace, at its entry and at its
// exit, becomes a record in a ring buffer that user space reads.
//
// It is kinder than those tools are: it looks at one sandbox and not at the whole host, and copies no paths or buffers.
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

typedef __u32 u32;
typedef __s64 s64;
typedef __u64 u64;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct ns_common {
	unsigned int inum;
};

struct pid_namespace {
	struct ns_common ns;
};

struct upid {
	int nr;
	struct pid_namespace *ns;
};

struct pid {
	unsigned int level;
	struct upid numbers[1];
};

struct task_struct {
	struct pid *thread_pid;
};

// x86-64. Elsewhere the fields do not exist, which the program asks before it reads them.
struct pt_regs {
	unsigned long r10, r9, r8, dx, si, di, orig_ax;
};

#pragma clang attribute pop

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} CALLS SEC(".maps");

// Records that found no room.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} LOST SEC(".maps");

// Set at load: inode of the pid namespace.
const volatile u32 PID_NS = 0;

struct call {
	u64 time_ns;
	u64 pid_tgid;
	s64 nr; // -1 at an exit
	s64 answer;
	u64 args[6];
	char comm[16];
};

static __always_inline struct call *new_call(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	const void *pid = BPF_CORE_READ(task, thread_pid);
	struct upid upid;
	struct call *call;
	u32 zero = 0;
	u64 *lost;

	if (!pid || BPF_CORE_READ((const struct pid *)pid, level) < 1)
		return 0;
	if (bpf_probe_read_kernel(&upid, sizeof(upid),
				  pid + bpf_core_field_offset(struct pid, numbers) + sizeof(upid)))
		return 0;
	if (BPF_CORE_READ(upid.ns, ns.inum) != PID_NS)
		return 0;
	call = bpf_ringbuf_reserve(&CALLS, sizeof(*call), 0);
	if (!call) {
		lost = bpf_map_lookup_elem(&LOST, &zero);
		if (lost)
			*lost += 1;
		return 0;
	}
	call->time_ns = bpf_ktime_get_boot_ns();
	call->pid_tgid = bpf_get_current_pid_tgid();
	bpf_get_current_comm(call->comm, sizeof(call->comm));
	return call;
}

SEC("raw_tracepoint/sys_enter")
int ref_enter(struct bpf_raw_tracepoint_args *ctx)
{
	const struct pt_regs *regs = (const struct pt_regs *)ctx->args[0];
	struct call *call = new_call();

	if (!call)
		return 0;
	call->nr = (s64)ctx->args[1];
	call->answer = 0;
	if (bpf_core_field_exists(((struct pt_regs *)0)->orig_ax)) {
		call->args[0] = BPF_CORE_READ(regs, di);
		call->args[1] = BPF_CORE_READ(regs, si);
		call->args[2] = BPF_CORE_READ(regs, dx);
		call->args[3] = BPF_CORE_READ(regs, r10);
		call->args[4] = BPF_CORE_READ(regs, r8);
		call->args[5] = BPF_CORE_READ(regs, r9);
	}
	bpf_ringbuf_submit(call, BPF_RB_NO_WAKEUP);
	return 0;
}

SEC("raw_tracepoint/sys_exit")
int ref_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct call *call = new_call();

	if (!call)
		return 0;
	call->nr = -1;
	call->answer = (s64)ctx->args[1];
	bpf_ringbuf_submit(call, BPF_RB_NO_WAKEUP);
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
