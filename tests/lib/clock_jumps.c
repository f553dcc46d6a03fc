/* Preloaded into a daemon: the wall clock jumps by a year with every look at it, once forward and once back. Monotonic clocks are left alone. */
#include <stddef.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SHOWN __attribute__((visibility("default")))
#define YEAR_S 31557600

static _Atomic unsigned looks;

static time_t jump(void)
{
	return atomic_fetch_add(&looks, 1) % 2 == 0 ? YEAR_S : -YEAR_S;
}

SHOWN int clock_gettime(clockid_t clock, struct timespec *now)
{
	const int failed = (int)syscall(SYS_clock_gettime, clock, now);
	if (failed == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		now->tv_sec += jump();
	return failed;
}

SHOWN int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	(void)zone;
	struct timespec exact;
	if (clock_gettime(CLOCK_REALTIME, &exact) != 0)
		return -1;
	now->tv_sec = exact.tv_sec;
	now->tv_usec = exact.tv_nsec / 1000;
	return 0;
}

SHOWN time_t time(time_t *out)
{
	struct timespec now = {0};
	(void)clock_gettime(CLOCK_REALTIME, &now);
	if (out != NULL)
		*out = now.tv_sec;
	return now.tv_sec;
}
