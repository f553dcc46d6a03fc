/* Latencies in constant memory: a histogram with buckets of under 1 % of their value.
 *
 * Layer: client/opctl. Threads: one. Zeroed memory is an empty histogram. */
#ifndef OPCTL_LATENCY_H
#define OPCTL_LATENCY_H

#include <stdint.h>

enum {
	LATENCY_SUB_BITS = 7, /* 128 buckets a power of two */
	LATENCY_BUCKETS = (64 - LATENCY_SUB_BITS) << LATENCY_SUB_BITS,
};

struct latency {
	uint64_t count;
	uint64_t sum_ns;
	uint64_t max_ns;
	uint64_t buckets[LATENCY_BUCKETS + (1 << LATENCY_SUB_BITS)];
};

void latency_add(struct latency *latency, uint64_t ns);

/* The value that `fraction` (0 to 1) of the latencies do not exceed; 0 when empty. */
uint64_t latency_at(const struct latency *latency, double fraction);

#endif
