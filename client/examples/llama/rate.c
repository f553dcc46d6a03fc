/* How fast this machine reads memory: what a token's weights are held against. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "client/examples/llama/llama.h"

#define READ_BYTES ((size_t)256 << 20) /* more than any cache of a machine that this is run on alone */
#define PASSES 4
#define THREADS_MAX 256u

struct reader {
	const uint64_t *words;
	size_t count;
	uint64_t sum;
	pthread_t thread;
	bool started;
};

static void *reader_main(void *argument)
{
	struct reader *reader = argument;
	uint64_t sums[8] = {0};
	for (size_t i = 0; i + 8 <= reader->count; i += 8)
		for (size_t k = 0; k < 8; k++)
			sums[k] += reader->words[i + k];
	for (size_t k = 0; k < 8; k++)
		reader->sum += sums[k];
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
	uint64_t *words = malloc(READ_BYTES), best = 0;
	threads = threads == 0 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
	if (words == NULL)
		return 0;
	memset(words, 1, READ_BYTES);
	for (unsigned i = 0; i < threads; i++) {
		readers[i].count = READ_BYTES / sizeof words[0] / threads;
		readers[i].words = words + i * readers[i].count;
	}
	for (int i = 0; i < PASSES; i++) {
		const uint64_t took = pass(readers, threads);
		if (took != 0 && (best == 0 || took < best))
			best = took;
	}
	free(words);
	return best == 0 ? 0 : (double)READ_BYTES / (double)best * 1e9;
}
