//! The system calls of x86-64 that leave all files as they are: the source of `bpf/calls.h`, which a test compares.
//!
//! Whatever is not here counts as a change, so a kernel's new calls do. Those that depend on their arguments are judged in `bpf/files_syscalls.h`.

/// First and last number.
const RANGES: &[(usize, usize)] = &[
    (0, 0),     // read
    (3, 8),     // close, stat, fstat, lstat, poll, lseek
    (10, 15),   // mprotect, munmap, brk, rt_sigaction, rt_sigprocmask, rt_sigreturn
    (17, 17),   // pread64
    (19, 19),   // readv
    (21, 27),   // access, pipe, select, sched_yield, mremap, msync, mincore
    (29, 39),   // shmget, shmat, shmctl, dup, dup2, pause, nanosleep, timers, getpid
    (41, 48),   // sockets, but bind: it can make a file
    (50, 75),   // listen ... processes, System V IPC, fcntl, flock, fsync
    (78, 81),   // getdents, getcwd, chdir, fchdir
    (89, 89),   // readlink
    (95, 102),  // umask, times, limits, ptrace, getuid
    (104, 131), // identities, capabilities, signals
    (135, 135), // personality
    (137, 138), // statfs
    (140, 152), // scheduling, mlock
    (157, 158), // prctl, arch_prctl
    (160, 160), // setrlimit
    (162, 162), // sync
    (186, 187), // gettid, readahead
    (191, 196), // getxattr, listxattr
    (200, 204), // tkill, time, futex, affinity
    (208, 208), // io_getevents
    (213, 213), // epoll_create
    (217, 226), // getdents64, set_tid_address, restart_syscall, semtimedop, fadvise64, POSIX timers
    (228, 234), // clocks, exit_group, epoll, tgkill
    (237, 245), // memory policies, message queues
    (247, 247), // waitid
    (251, 255), // I/O priorities, inotify
    (262, 262), // newfstatat
    (267, 267), // readlinkat
    (269, 274), // faccessat, pselect6, ppoll, unshare, robust lists
    (276, 278), // tee, sync_file_range, vmsplice
    (281, 284), // epoll_pwait, signalfd, timerfd, eventfd
    (286, 295), // timerfd, accept4, signalfd4, ... preadv
    (297, 299), // rt_tgsigqueueinfo, perf_event_open, recvmmsg
    (302, 302), // prlimit64
    (306, 312), // syncfs, sendmmsg, setns, getcpu, process_vm_*, kcmp
    (314, 315), // sched_setattr, sched_getattr
    (317, 319), // seccomp, getrandom, memfd_create
    (322, 325), // execveat, userfaultfd, membarrier, mlock2
    (327, 327), // preadv2
    (329, 332), // memory keys, statx
    (334, 334), // rseq
    (424, 424), // pidfd_send_signal
    (434, 436), // pidfd_open, clone3, close_range
    (438, 441), // pidfd_getfd, faccessat2, process_madvise, epoll_pwait2
    (444, 449), // landlock, memfd_secret, process_mrelease, futex_waitv
    (451, 451), // cachestat
    (453, 456), // map_shadow_stack, futexes
];

#[test]
fn the_programs_have_the_same_table() {
    let mut words = [0u64; 8];
    for number in RANGES.iter().flat_map(|(first, last)| *first..=*last) {
        words[number / 64] |= 1 << (number % 64);
    }
    let header = include_str!("../bpf/calls.h");
    let found: Vec<&str> = header
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| word.starts_with("0x"))
        .collect();
    let wanted: Vec<String> = words.iter().map(|w| format!("0x{w:016x}ull")).collect();
    assert_eq!(found, wanted);
}
