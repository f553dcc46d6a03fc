/* Arithmetic of estimates: nanoseconds and amounts of work that are compared and added up, never allocated. What would wrap stays at the largest value, so that
 * more work never looks like less: an estimate decides whether the I/O loop runs a kernel itself.
 *
 * Layer: providers, internal: for the providers that are linked in, and the daemon. Threads: pure. Life: none.
 * Not here: sizes of memory, which are refused when they don't fit (proto/tensor.h). */
#ifndef OPD_PROVIDERS_ESTIMATE_H
#define OPD_PROVIDERS_ESTIMATE_H

#include <stdint.h>

/* 146 years in nanoseconds: two of them still have a sum. */
#define ESTIMATE_MAX ((uint64_t)1 << 62)

static inline uint64_t estimate_add(uint64_t a, uint64_t b)
{
	return a >= ESTIMATE_MAX || b >= ESTIMATE_MAX - a ? ESTIMATE_MAX : a + b;
}

static inline uint64_t estimate_multiply(uint64_t a, uint64_t b)
{
	uint64_t product;
	return __builtin_mul_overflow(a, b, &product) || product > ESTIMATE_MAX ? ESTIMATE_MAX : product;
}

/* Of a computation in floating point; not for NaN. */
static inline uint64_t estimate_of(double value)
{
	return value < (double)ESTIMATE_MAX ? (uint64_t)value : ESTIMATE_MAX;
}

#endif
