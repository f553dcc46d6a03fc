/* softmax, one row: compiled once for each instruction set (kernels.h). */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* Misses NaN: it then shows in the sum, as e^NaN, and so in every element. */
VEC_INLINE float softmax_highest(opd_dtype dtype, const void *x, size_t count)
{
	vec_f32 chains[2] = {vec_splat(-INFINITY), vec_splat(-INFINITY)};
	size_t i = 0;
	for (; i + 2 * VEC_LANES <= count; i += 2 * VEC_LANES)
		for (size_t c = 0; c < 2; c++)
			chains[c] = vec_max(vec_load(dtype, x, i + c * VEC_LANES), chains[c]);
	for (; i < count; i += VEC_LANES) {
		size_t left = count - i;
		vec_f32 v = left >= VEC_LANES ? vec_load(dtype, x, i) : vec_load_part(dtype, x, i, left, -INFINITY);
		chains[0] = vec_max(v, chains[0]);
	}
	return vec_highest(vec_max(chains[0], chains[1]));
}

/* Σ e^(x − highest); each e also goes to `kept` [count], if there is one. */
VEC_INLINE float softmax_sum(opd_dtype dtype, const void *x, float *kept, size_t count, float highest)
{
	vec_f32 chains[2] = {vec_splat(0.0f), vec_splat(0.0f)};
	vec_f32 shift = vec_splat(highest);
	size_t i = 0;
	for (; i + 2 * VEC_LANES <= count; i += 2 * VEC_LANES) {
		for (size_t c = 0; c < 2; c++) {
			vec_f32 e = vec_exp(vec_load(dtype, x, i + c * VEC_LANES) - shift);
			if (kept != NULL)
				vec_store(OPD_f32, kept, i + c * VEC_LANES, e);
			chains[c] = chains[c] + e;
		}
	}
	for (; i < count; i += VEC_LANES) {
		size_t here = count - i < VEC_LANES ? count - i : VEC_LANES;
		/* Lanes past the end are −infinity, and add nothing. Only a row of −infinity makes them NaN, as all of it. */
		vec_f32 e = vec_exp(vec_load_part(dtype, x, i, here, -INFINITY) - shift);
		if (kept != NULL)
			vec_store_part(OPD_f32, kept, i, here, e);
		chains[0] = chains[0] + e;
	}
	return vec_sum(chains[0] + chains[1]);
}

VEC_INLINE void softmax_scale_kept(opd_dtype dtype, const float *kept, void *y, size_t count, vec_f32 scale)
{
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		vec_store(dtype, y, i, vec_load(OPD_f32, kept, i) * scale);
	if (i < count)
		vec_store_part(dtype, y, i, count - i, vec_load_part(OPD_f32, kept, i, count - i, 0.0f) * scale);
}

VEC_INLINE void softmax_scale_again(opd_dtype dtype, const void *x, void *y, size_t count, vec_f32 shift, vec_f32 scale)
{
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		vec_store(dtype, y, i, vec_exp(vec_load(dtype, x, i) - shift) * scale);
	if (i < count)
		vec_store_part(dtype, y, i, count - i, vec_exp(vec_load_part(dtype, x, i, count - i, 0.0f) - shift) * scale);
}

static void softmax_f32(const void *x, void *y, size_t count)
{
	float highest = softmax_highest(OPD_f32, x, count);
	vec_f32 scale = vec_splat(1.0f / softmax_sum(OPD_f32, x, y, count, highest));
	softmax_scale_kept(OPD_f32, y, y, count, scale);
}

/* 16-bit results have no room for each e. A first-level cache has, for rows of usual length; longer rows compute it twice, to the same
 * bits. */
#define KEPT 4096

VEC_INLINE void softmax_16(opd_dtype dtype, const void *x, void *y, size_t count)
{
	float kept[KEPT];
	float highest = softmax_highest(dtype, x, count);
	if (count <= KEPT)
		softmax_scale_kept(dtype, kept, y, count, vec_splat(1.0f / softmax_sum(dtype, x, kept, count, highest)));
	else
		softmax_scale_again(dtype, x, y, count, vec_splat(highest),
		                    vec_splat(1.0f / softmax_sum(dtype, x, NULL, count, highest)));
}

static void softmax_bf16(const void *x, void *y, size_t count)
{
	softmax_16(OPD_bf16, x, y, count);
}

static void softmax_f16(const void *x, void *y, size_t count)
{
	softmax_16(OPD_f16, x, y, count);
}

const struct cpu_softmax_kernels CPU_SYMBOL(cpu_softmax) = {
	.softmax = {softmax_f32, softmax_bf16, softmax_f16},
};
