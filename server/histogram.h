/* How long things took: counts of durations by powers of two, from 1 us to 17 s.
 *
 * Layer: server, bottom. Threads: one writer, or several with `shared`; readers any, without a lock: each number is right, and together they are as of about now.
 * A counter costs its only writer a load and a store, no locked instruction. */
#ifndef OPD_SERVER_HISTOGRAM_H
#define OPD_SERVER_HISTOGRAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Bucket k holds what took at most 1.024 us · 2^k and more than the one before; the last one all that took longer. */
#define HISTOGRAM_BUCKETS 26u
#define HISTOGRAM_FIRST_NS 1024u

typedef _Atomic uint64_t tally;

struct histogram {
	tally counts[HISTOGRAM_BUCKETS];
	tally sum_ns;
};

static inline uint64_t tally_get(const tally *of)
{
	return atomic_load_explicit(of, memory_order_relaxed);
}

static inline void tally_add(tally *of, uint64_t number, bool shared)
{
	if (shared)
		(void)atomic_fetch_add_explicit(of, number, memory_order_relaxed);
	else
		atomic_store_explicit(of, tally_get(of) + number, memory_order_relaxed);
}

static inline uint32_t histogram_bucket(uint64_t ns)
{
	const uint64_t units = ns == 0 ? 0 : (ns - 1) / HISTOGRAM_FIRST_NS;
	const uint32_t bucket = units == 0 ? 0 : 64u - (uint32_t)__builtin_clzll(units);
	return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

static inline void histogram_add(struct histogram *histogram, uint64_t ns, bool shared)
{
	tally_add(&histogram->counts[histogram_bucket(ns)], 1, shared);
	tally_add(&histogram->sum_ns, ns, shared);
}

#endif
