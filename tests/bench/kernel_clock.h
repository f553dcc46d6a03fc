/* The median time of a call, for the programs behind tests/bench/kernels: header only. */
#ifndef OPD_BENCH_KERNEL_CLOCK_H
#define OPD_BENCH_KERNEL_CLOCK_H

#include <stdlib.h>
#include <time.h>

enum { CLOCK_SAMPLES = 401, CLOCK_SAMPLES_MIN = 5 };

static inline double clock_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static inline int clock_compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* Nanoseconds a call of `run`: the median over 40 ms, of samples of at least 20 us; five samples at least. As conformance --serve does it. */
static inline double clock_median(void (*run)(void *argument), void *argument)
{
	double samples[CLOCK_SAMPLES];
	size_t count = 0;
	double before = clock_ns();
	run(argument);
	double first = clock_ns() - before;
	int repeats = first >= 20e3 ? 1 : (int)(20e3 / (first + 1)) + 1;
	for (double start = clock_ns(); count < CLOCK_SAMPLES && (count < CLOCK_SAMPLES_MIN || clock_ns() - start < 40e6); count++) {
		before = clock_ns();
		for (int i = 0; i < repeats; i++)
			run(argument);
		samples[count] = (clock_ns() - before) / repeats;
	}
	qsort(samples, count, sizeof samples[0], clock_compare);
	return samples[count / 2];
}

#endif
