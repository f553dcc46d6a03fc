/* What the preloaded counter (counter.c) counts in a process, in a page that the benchmark reads while the process runs.
 *
 * Layer: bench, shared by the library and its reader. Threads: counters are relaxed atomics.
 * The library maps the file that OPD_BENCH_COUNTS names, which must have sizeof(struct counter_page) bytes. Calls made with raw
 * system calls, or inside libc (a mutex's futex, a condition's wake-up), are not seen. */
#ifndef OPD_BENCH_COUNTER_H
#define OPD_BENCH_COUNTER_H

#include <stdatomic.h>
#include <stdint.h>

#define COUNTER_ENVIRONMENT "OPD_BENCH_COUNTS"

typedef enum counter_kind {
	COUNTER_ALLOCATIONS, /* malloc, calloc, realloc of more, aligned */
	COUNTER_READS,       /* read, readv, recv, recvmsg */
	COUNTER_WRITES,      /* write, writev, send, sendmsg */
	COUNTER_WAITS,       /* epoll_wait, epoll_pwait, poll */
	COUNTER_OTHER,       /* mmap, munmap, madvise */
	COUNTER_READ_BYTES,
	COUNTER_WRITTEN_BYTES,
	COUNTER_COUNT
} counter_kind;

struct counter_page {
	_Atomic uint64_t counts[COUNTER_COUNT];
};

/* Where this process counts, when counter.c is linked into it. */
struct counter_page *counter_own(void);

#endif
