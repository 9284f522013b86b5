// The system calls of x86-64 that leave all files as they are, as bits: from the table in src/harmless.rs, by its test.
#ifndef TIDEPOOL_CALLS_H
#define TIDEPOOL_CALLS_H

#define HARMLESS_CALLS \
	0xfffdfeffefeafdf9ull, 0xffffff7f8203cfffull, \
	0x8c00000561fff68full, 0xf8bfe7f7fe211f1full, \
	0xedfc4effde77e840ull, 0x0000000000005ebcull, \
	0xf3dc010000000000ull, 0x00000000000001ebull

#endif
