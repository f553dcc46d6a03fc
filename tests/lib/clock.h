/* Monotonic time in nanoseconds, for tests and benchmarks.
 *
 * Layer: tests, header only. Threads: any.
 * Not here: what many readings say together (histogram.h). */
#ifndef OPD_TESTS_LIB_CLOCK_H
#define OPD_TESTS_LIB_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t clock_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* CPU time of the calling process, all its threads. */
static inline uint64_t clock_process_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
