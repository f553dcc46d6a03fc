/* How fast this machine reads memory: what a token's weights are held against. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "client/examples/llama/llama.h"

#define READ_BYTES ((size_t)256 << 20) /* more than any cache of a machine that this is run on alone */
#define PASSES 4
#define HUGE_PAGE ((size_t)2 << 20) /* as the daemon keeps weights */
#define AHEAD 1024                  /* bytes that are asked for early: the processor alone doesn't ask for enough */
#define THREADS_MAX 256u

typedef uint64_t line __attribute__((vector_size(64), aligned(64)));

struct reader {
	const line *lines;
	size_t count;
	uint64_t sum;
	pthread_t thread;
	bool started;
};

static void *reader_main(void *argument)
{
	struct reader *reader = argument;
	const size_t quarter = reader->count / 4; /* four streams */
	line sums[4] = {{0}};
	for (size_t i = 0; i < quarter; i++)
		for (size_t k = 0; k < 4; k++) {
			sums[k] |= reader->lines[k * quarter + i];
			__builtin_prefetch((const char *)&reader->lines[k * quarter + i] + AHEAD, 0, 3);
		}
	for (size_t k = 0; k < 4; k++)
		reader->sum |= sums[k][0];
	return NULL;
}

/* Nanoseconds of one pass of all threads; 0: one couldn't be started. */
static uint64_t pass(struct reader *readers, unsigned threads)
{
	const uint64_t begin = llama_now_ns();
	bool all = true;
	for (unsigned i = 0; i < threads; i++) {
		readers[i].started = pthread_create(&readers[i].thread, NULL, reader_main, &readers[i]) == 0;
		all = all && readers[i].started;
	}
	for (unsigned i = 0; i < threads; i++)
		if (readers[i].started)
			(void)pthread_join(readers[i].thread, NULL);
	return all ? llama_now_ns() - begin : 0;
}

double llama_read_rate(unsigned threads)
{
	struct reader readers[THREADS_MAX] = {{0}};
	void *lines = NULL;
	uint64_t best = 0;
	threads = threads == 0 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
	if (posix_memalign(&lines, HUGE_PAGE, READ_BYTES) != 0)
		return 0;
	(void)madvise(lines, READ_BYTES, MADV_HUGEPAGE);
	memset(lines, 1, READ_BYTES);
	for (unsigned i = 0; i < threads; i++) {
		readers[i].count = READ_BYTES / sizeof(line) / threads;
		readers[i].lines = (const line *)lines + i * readers[i].count;
	}
	for (int i = 0; i < PASSES; i++) {
		const uint64_t took = pass(readers, threads);
		if (took != 0 && (best == 0 || took < best))
			best = took;
	}
	free(lines);
	return best == 0 ? 0 : (double)READ_BYTES / (double)best * 1e9;
}
