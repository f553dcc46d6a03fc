/* Times implementations over the generators' calls: `conformance --time`.
 *
 * Layer: tests. Threads: one, and those of the host's parallel_for, which spin between calls: figures of several threads don't hold the time to wake a core.
 * Not here: requests through a daemon (tests/bench). */
#ifndef OPD_TESTS_CONFORMANCE_TIMING_H
#define OPD_TESTS_CONFORMANCE_TIMING_H

#include "tests/conformance/host.h"

enum { TIMING_DIMS = 8 };

struct timing {
	const char *provider; /* NULL: every one */
	const char *op;       /* NULL: every one that takes the dims */
	opd_dtype dtype;
	uint32_t threads;
	uint32_t dim_count;   /* 0: the op's default sizes */
	int64_t dims[TIMING_DIMS];
};

/* Prints one line an implementation: the median of many runs of its typical call, what its cost function says, bytes of all operands a
 * second. Returns how many were timed. */
size_t timing_run(const struct host *host, const struct timing *timing);

/* "32,4096" to timing's dims; false when it isn't such a text. */
bool timing_dims(const char *text, struct timing *timing);

/* Answers lines "PROVIDER OP DTYPE N,N,... THREADS" of stdin until it ends, each by a line "US ESTIMATE_US BYTES", or "-" for what can't be timed. Short: so that
 * tests/bench/kernels can ask for everything of one row in turns. The operands of the last question stay. False: a line wasn't such a question. */
bool timing_serve(const struct host *host);

#endif
