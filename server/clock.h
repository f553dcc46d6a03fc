/* The clock that everything in the daemon is timed by: CLOCK_MONOTONIC, in nanoseconds.
 *
 * Layer: server, below all of it. Threads: any; a read takes some 25 ns, so that what has just been told the time passes it on. Not the wall's time, which the log has its own reader for (log.c). */
#ifndef OPD_SERVER_CLOCK_H
#define OPD_SERVER_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t clock_now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
