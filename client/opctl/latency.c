#include "client/opctl/latency.h"

#include <math.h>

/* Values under 128 have a bucket each; above, the top 7 bits behind the highest one choose. */
static uint32_t bucket_of(uint64_t ns)
{
	if (ns < (1u << LATENCY_SUB_BITS))
		return (uint32_t)ns;
	const unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - LATENCY_SUB_BITS;
	return ((shift + 1) << LATENCY_SUB_BITS) + (uint32_t)((ns >> shift) & ((1u << LATENCY_SUB_BITS) - 1));
}

/* The bucket's middle. */
static uint64_t value_of(uint32_t bucket)
{
	const unsigned power = bucket >> LATENCY_SUB_BITS;
	const uint64_t low = bucket & ((1u << LATENCY_SUB_BITS) - 1);
	if (power == 0)
		return low;
	return ((low | 1u << LATENCY_SUB_BITS) << (power - 1)) + ((1ull << (power - 1)) >> 1);
}

void latency_add(struct latency *latency, uint64_t ns)
{
	latency->count++;
	latency->sum_ns += ns;
	latency->max_ns = ns > latency->max_ns ? ns : latency->max_ns;
	latency->buckets[bucket_of(ns)]++;
}

uint64_t latency_at(const struct latency *latency, double fraction)
{
	const uint64_t wanted = (uint64_t)ceil(fraction * (double)latency->count);
	uint64_t seen = 0;
	for (uint32_t i = 0; i < sizeof latency->buckets / sizeof latency->buckets[0]; i++) {
		seen += latency->buckets[i];
		if (seen >= wanted && seen > 0)
			return value_of(i) < latency->max_ns ? value_of(i) : latency->max_ns;
	}
	return 0;
}
