/* One element of any dtype to and from C's numbers, exactly as the catalogue's `cast` defines it.
 *
 * Layer: proto, internal. Threads: pure.
 * Rounding: to nearest, ties to even, once, also from f64. Overflow: to infinity for f16, bf16, f32; f8 saturates to its largest finite
 * value (infinities too). NaN stays NaN. To an integer: truncates, saturates, NaN is 0. To bool: not zero (NaN is true).
 * Not here: loops over tensors (providers/ops/, providers/cpu/), and anything fast. */
#ifndef OPD_PROTO_ELEMENT_H
#define OPD_PROTO_ELEMENT_H

#include <stdint.h>

#include "opd/dtype.h"

/* Value of the element at `at` (any alignment). i64 beyond 2^53 rounds. bool: 0 or 1. */
double element_load_f64(opd_dtype dtype, const void *at);

/* The same as a float: exact for every dtype but i32, i64 and f64, which round once. */
float element_load_f32(opd_dtype dtype, const void *at);

/* Value of an integer or bool element; a float dtype is converted as cast does. */
int64_t element_load_i64(opd_dtype dtype, const void *at);

void element_store_f64(opd_dtype dtype, void *at, double value);
void element_store_f32(opd_dtype dtype, void *at, float value);

/* To an integer dtype: wraps (two's complement); to a float: one rounding; to bool: not zero. */
void element_store_i64(opd_dtype dtype, void *at, int64_t value);

/* The 16-bit formats as such, for kernels that know their dtype. */
float element_f16_to_f32(uint16_t bits);
uint16_t element_f32_to_f16(float value);

static inline float element_bf16_to_f32(uint16_t bits)
{
	union {
		uint32_t u;
		float f;
	} word = {.u = (uint32_t)bits << 16};
	return word.f;
}

uint16_t element_f32_to_bf16(float value);

#endif
