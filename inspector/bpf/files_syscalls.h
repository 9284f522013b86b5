// Files: the `syscalls` probe set, where no better can be had. x86-64.
//
// It names no inodes. A system call is harmless when it is known to leave all files as they are; any other counts, and one that counts
// means that every file may have changed. What writes through a descriptor counts where that stands for a file or directory, of
// whatever filesystem. What is done without calls is the loader's to find: stores to shared mappings (it looks at those of all
// processes), and asynchronous rings, which count for ever once made.
//
// Calls are judged at their entry, before they do anything. Only opening a file is judged at its end, when it is known what was opened: /dev/null is opened for
// writing all the time. An open that is under way during a reading belongs to the next; its task shows as having run.
// Not seen: a descriptor that another thread replaces between this look at it and the kernel's own.

#define FMODE_WRITE 0x2
#define O_ACCMODE 03
#define O_MAKES (0100 | 01000 | 020000000) // O_CREAT, O_TRUNC, the bit of O_TMPFILE
#define MAP_TYPE 0xf
#define MAP_ANONYMOUS 0x20
#define MADV_REMOVE 9

static __always_inline struct file *file_at(struct task_struct *task, u64 fd)
{
	struct files_struct *files = task->files;
	struct fdtable *fdt;
	struct file **table, *file = 0;

	if (!files)
		return 0;
	fdt = files->fdt;
	fd = (u32)fd;
	if (fd >= fdt->max_fds)
		return 0;
	table = BPF_CORE_READ(fdt, fd);
	bpf_probe_read_kernel(&file, sizeof(file), table + fd);
	return file;
}

// A descriptor that stands for nothing makes the call fail.
static __always_inline int is_file(struct task_struct *task, u64 fd, u32 mode)
{
	struct file *file = file_at(task, fd);
	u32 kind;

	if (!file)
		return 0;
	if (mode && !(BPF_CORE_READ(file, f_mode) & mode))
		return 0;
	kind = BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT;
	return kind == S_IFREG || kind == S_IFDIR || kind == S_IFBLK;
}

static __always_inline void may_have_changed(struct sandbox *sandbox, u64 nr)
{
	sandbox->last_call = nr;
	__sync_fetch_and_add(&sandbox->calls, 1);
}

// 64 numbers a word.
static const volatile u64 HARMLESS[8] = { HARMLESS_CALLS };

static __always_inline int harmless(u64 nr)
{
	return nr < 512 && HARMLESS[nr >> 6] >> (nr & 63) & 1;
}

// Whether a call may change files, as far as that can be told before it is made.
static __always_inline int may_change(struct task_struct *task, struct pt_regs *regs, u64 nr)
{
	switch (nr) {
	case 1:   // write
	case 18:  // pwrite64
	case 20:  // writev
	case 40:  // sendfile
	case 77:  // ftruncate
	case 285: // fallocate
	case 296: // pwritev
	case 328: // pwritev2
		return is_file(task, regs->di, 0);
	case 275: // splice
	case 326: // copy_file_range
		return is_file(task, regs->dx, 0);
	case 16: // ioctl
		switch ((u32)regs->si) {
		case 0x5401:     // TCGETS
		case 0x5413:     // TIOCGWINSZ
		case 0x541b:     // FIONREAD
		case 0x5421:     // FIONBIO
		case 0x5450:     // FIONCLEX
		case 0x5451:     // FIOCLEX
		case 0x80086601: // FS_IOC_GETFLAGS
		case 0xc020660b: // FS_IOC_FIEMAP
			return 0;
		}
		return is_file(task, regs->di, 0);
	case 9: // mmap: a shared mapping that may be stored to, now or after an mprotect
		if (regs->r10 & MAP_ANONYMOUS)
			return 0;
		return ((regs->r10 & MAP_TYPE) & 1) && is_file(task, regs->r8, FMODE_WRITE);
	case 28: // madvise
		return (u32)regs->dx == MADV_REMOVE;
	case 2:   // open
	case 257: // openat
		return 0; // at its end
	}
	return 1;
}

SEC("tp_btf/sys_enter")
int tp_call(u64 *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs *regs = (struct pt_regs *)ctx[0];
	u64 nr = ctx[1];
	struct sandbox *sandbox;
	u32 level;

	// Most calls are harmless, which is told without asking whose they are. In 32-bit code the numbers mean others.
	if (harmless(nr) && !(task->thread_info.status & TS_COMPAT))
		return 0;
	sandbox = sandbox_of(task, &level);
	if (!sandbox)
		return 0;
	if (task->thread_info.status & TS_COMPAT)
		may_have_changed(sandbox, nr);
	else if (nr == 425 || nr == 206) // io_uring_setup, io_setup
		__sync_fetch_and_add(&sandbox->rings, 1);
	else if (may_change(task, regs, nr))
		may_have_changed(sandbox, nr);
	return 0;
}

SEC("tp_btf/sys_exit")
int tp_call_done(u64 *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs *regs = (struct pt_regs *)ctx[0];
	u64 nr = regs->orig_ax, flags;
	s64 result = ctx[1];
	struct sandbox *sandbox;
	u32 level;

	if (nr == 2)
		flags = regs->si;
	else if (nr == 257)
		flags = regs->dx;
	else
		return 0;
	if (!(flags & (O_ACCMODE | O_MAKES)) || task->thread_info.status & TS_COMPAT)
		return 0;
	sandbox = sandbox_of(task, &level);
	if (!sandbox)
		return 0;
	if (result >= 0) {
		if (is_file(task, result, 0))
			may_have_changed(sandbox, nr);
		return 0;
	}
	switch (result) {
	case -1:  // EPERM
	case -2:  // ENOENT
	case -13: // EACCES
	case -17: // EEXIST
	case -20: // ENOTDIR
	case -21: // EISDIR
	case -30: // EROFS
	case -40: // ELOOP
		return 0;
	}
	// Others may come after a file was made or cut short.
	if (flags & O_MAKES)
		may_have_changed(sandbox, nr);
	return 0;
}
