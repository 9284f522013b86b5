"""Loads the smallest eBPF program of the kind the inspector uses, to see whether this kernel and this user may.

Uses the bpf system call directly, so that nothing has to be built or installed first. Prints what worked; on failure
the last line says in one sentence why, and the exit code is 1.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

SYS_BPF = {"x86_64": 321, "aarch64": 280}
BPF_PROG_LOAD = 5
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
BPF_RAW_TRACEPOINT_OPEN = 17


def bpf(libc, number, command, attributes):
    buffer = ctypes.create_string_buffer(attributes, 128)
    fd = libc.syscall(number, command, buffer, 128)
    return fd, ctypes.get_errno()


def fail(sentence):
    print(sentence)
    sys.exit(1)


def main():
    number = SYS_BPF.get(platform.machine())
    if number is None:
        fail(f"Tidepool does not know this processor: {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    # r0 = 0; exit
    code = ctypes.create_string_buffer(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "<IIQQIIQ", BPF_PROG_TYPE_RAW_TRACEPOINT, 2, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0
    )
    program, error = bpf(libc, number, BPF_PROG_LOAD, attributes)
    if program < 0:
        if error == errno.EPERM:
            fail("this user may not load eBPF programs: CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN) are needed")
        if error == errno.ENOSYS:
            fail("this kernel has no bpf system call (CONFIG_BPF_SYSCALL)")
        fail(f"the kernel refuses to load an eBPF program: {os.strerror(error)}")
    name = ctypes.create_string_buffer(b"sys_enter")
    link, error = bpf(libc, number, BPF_RAW_TRACEPOINT_OPEN, struct.pack("<QI", ctypes.addressof(name), program))
    os.close(program)
    if link < 0:
        fail(f"the kernel refuses to attach an eBPF program to a tracepoint: {os.strerror(error)}")
    os.close(link)
    print("raw tracepoint loaded and attached")


if __name__ == "__main__":
    main()
