/* A histogram of durations in nanoseconds: constant memory, quantiles to within 0.4 %.
 *
 * Layer: tests, header only. Threads: one at a time.
 * Life: zeroed memory is an empty one; histogram_add…, histogram_quantile; nothing to free.
 * Values below 256 have a bucket each; above, every power of two is split into 256 equal buckets. */
#ifndef OPD_TESTS_LIB_HISTOGRAM_H
#define OPD_TESTS_LIB_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_SPLIT_BITS 8
#define HISTOGRAM_SPLIT (1u << HISTOGRAM_SPLIT_BITS)
#define HISTOGRAM_OCTAVES 36 /* up to 2^43 ns, over two hours */
#define HISTOGRAM_BUCKETS (HISTOGRAM_SPLIT * (HISTOGRAM_OCTAVES + 1))

struct histogram {
	uint64_t count;
	uint64_t max_ns;
	uint32_t buckets[HISTOGRAM_BUCKETS];
};

static inline unsigned histogram_bucket(uint64_t ns)
{
	if (ns < HISTOGRAM_SPLIT)
		return (unsigned)ns;
	unsigned octave = 63u - (unsigned)__builtin_clzll(ns) - HISTOGRAM_SPLIT_BITS;
	if (octave >= HISTOGRAM_OCTAVES)
		return HISTOGRAM_BUCKETS - 1;
	return (octave + 1) * HISTOGRAM_SPLIT + (unsigned)((ns >> octave) & (HISTOGRAM_SPLIT - 1));
}

/* The lowest value of a bucket. */
static inline uint64_t histogram_value(unsigned bucket)
{
	if (bucket < HISTOGRAM_SPLIT)
		return bucket;
	unsigned octave = bucket / HISTOGRAM_SPLIT - 1;
	return ((uint64_t)HISTOGRAM_SPLIT + bucket % HISTOGRAM_SPLIT) << octave;
}

static inline void histogram_add(struct histogram *histogram, uint64_t ns)
{
	histogram->count++;
	if (ns > histogram->max_ns)
		histogram->max_ns = ns;
	histogram->buckets[histogram_bucket(ns)]++;
}

/* The value below or at which the part `fraction` (0 to 1) of all lies; 0 when empty. */
static inline uint64_t histogram_quantile(const struct histogram *histogram, double fraction)
{
	if (fraction >= 1)
		return histogram->max_ns;
	uint64_t rank = (uint64_t)(fraction * (double)histogram->count);
	uint64_t seen = 0;
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
		seen += histogram->buckets[i];
		if (seen > rank)
			return histogram_value(i);
	}
	return histogram->max_ns;
}

#endif
