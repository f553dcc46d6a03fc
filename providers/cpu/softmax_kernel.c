/* softmax, one row: compiled once for each instruction set (kernels.h). */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* e^(x − highest), in place; the difference is never above 0. */
VEC_INLINE void softmax_exp(opd_dtype dtype, vec_f32 *x, size_t n, vec_f32 highest)
{
	VEC_EACH(i, n) x[i] = x[i] - highest;
	if (dtype == OPD_f32) {
		VEC_EACH(i, n) x[i] = vec_exp(x[i]);
		return;
	}
	VEC_EACH(i, n) x[i] = x[i] * vec_splat(VEC_LOG2_E);
#if !defined(VEC_AVX512)
	VEC_EACH(i, n) x[i] = vec_max(vec_splat(-150.0f), x[i]);
#endif
	vec_exp2(dtype, x, n);
}

/* `n` vectors from element `at` on, an even number, in the order of pairs. */
VEC_INLINE void softmax_load(opd_dtype dtype, const void *x, size_t at, vec_f32 *v, size_t n)
{
	for (size_t p = 0; p < n; p += 2) {
		struct vec_pair pair = vec_load_pair(dtype, x, at + p * VEC_LANES);
		v[p] = pair.v[0];
		v[p + 1] = pair.v[1];
	}
}

VEC_INLINE vec_f32 softmax_exp_part(opd_dtype dtype, const void *x, size_t at, size_t count, float fill, vec_f32 highest)
{
	vec_f32 e = vec_load_part(dtype, x, at, count, fill);
	softmax_exp(dtype, &e, 1, highest);
	return e;
}

/* Misses NaN: it then shows in the sum, as e^NaN, and so in every element. */
VEC_INLINE float softmax_highest(opd_dtype dtype, const void *x, size_t count)
{
	vec_f32 chains[4] = {vec_splat(-INFINITY), vec_splat(-INFINITY), vec_splat(-INFINITY), vec_splat(-INFINITY)};
	size_t i = 0;
	for (; i + 4 * VEC_LANES <= count; i += 4 * VEC_LANES) {
		for (size_t c = 0; c < 4; c += 2) {
			struct vec_pair pair = vec_load_pair(dtype, x, i + c * VEC_LANES);
			for (size_t p = 0; p < 2; p++)
				chains[c + p] = vec_max(pair.v[p], chains[c + p]);
		}
	}
	for (; i < count; i += VEC_LANES) {
		size_t left = count - i;
		vec_f32 v = left >= VEC_LANES ? vec_load(dtype, x, i) : vec_load_part(dtype, x, i, left, -INFINITY);
		chains[0] = vec_max(v, chains[0]);
	}
	return vec_highest(vec_max(vec_max(chains[0], chains[1]), vec_max(chains[2], chains[3])));
}

/* Σ e^(x − highest); each e also goes to `kept` [count], if there is one: two vectors at a time as vec_load_pair has them. This is the longest part, and no memory is
 * waited for: the next row is asked for. */
VEC_INLINE float softmax_sum(opd_dtype dtype, const void *x, const void *next, float *kept, size_t count, float highest)
{
	const size_t bytes = opd_dtype_bytes(dtype);
	vec_f32 chains[2] = {vec_splat(0.0f), vec_splat(0.0f)};
	vec_f32 shift = vec_splat(highest);
	size_t i = 0;
	for (; i + VEC_TOGETHER * VEC_LANES <= count; i += VEC_TOGETHER * VEC_LANES) {
		vec_f32 e[VEC_TOGETHER];
		softmax_load(dtype, x, i, e, VEC_TOGETHER);
		softmax_exp(dtype, e, VEC_TOGETHER, shift);
		for (size_t p = 0; p < VEC_TOGETHER; p++) {
			if (kept != NULL)
				vec_store(OPD_f32, kept, i + p * VEC_LANES, e[p]);
			chains[p % 2] = chains[p % 2] + e[p];
		}
		vec_ask((const unsigned char *)next + i * bytes, VEC_TOGETHER * VEC_LANES * bytes);
	}
	for (; i < count; i += VEC_LANES) {
		size_t here = count - i < VEC_LANES ? count - i : VEC_LANES;
		/* Lanes past the end are −infinity, and add nothing. Only a row of −infinity makes them NaN, as all of it. */
		vec_f32 e = softmax_exp_part(dtype, x, i, here, -INFINITY, shift);
		if (kept != NULL)
			vec_store_part(OPD_f32, kept, i, here, e);
		chains[0] = chains[0] + e;
	}
	return vec_sum(chains[0] + chains[1]);
}

VEC_INLINE void softmax_store(opd_dtype dtype, void *y, size_t at, const vec_f32 *e, size_t n, vec_f32 scale, bool streams)
{
	for (size_t p = 0; p < n; p += 2)
		vec_put_pair(dtype, y, at + p * VEC_LANES, streams, (struct vec_pair){{e[p] * scale, e[p + 1] * scale}});
}

/* Elements lie in `kept` as softmax_sum has put them there: whole steps as pairs have them, the rest in its place. streams: a constant of the caller. */
VEC_INLINE void softmax_scale_kept(opd_dtype dtype, const float *kept, void *y, size_t count, vec_f32 scale, bool streams)
{
	size_t i = 0;
	for (; i + VEC_TOGETHER * VEC_LANES <= count; i += VEC_TOGETHER * VEC_LANES) {
		vec_f32 e[VEC_TOGETHER];
		VEC_EACH(p, VEC_TOGETHER) e[p] = vec_load(OPD_f32, kept, i + p * VEC_LANES);
		softmax_store(dtype, y, i, e, VEC_TOGETHER, scale, streams);
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_store_part(dtype, y, i, here, vec_load_part(OPD_f32, kept, i, here, 0.0f) * scale);
	}
}

VEC_INLINE void softmax_scale_again(opd_dtype dtype, const void *x, void *y, size_t count, vec_f32 shift, vec_f32 scale)
{
	size_t i = 0;
	for (; i + VEC_TOGETHER * VEC_LANES <= count; i += VEC_TOGETHER * VEC_LANES) {
		vec_f32 e[VEC_TOGETHER];
		softmax_load(dtype, x, i, e, VEC_TOGETHER);
		softmax_exp(dtype, e, VEC_TOGETHER, shift);
		softmax_store(dtype, y, i, e, VEC_TOGETHER, scale, false);
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_store_part(dtype, y, i, here, softmax_exp_part(dtype, x, i, here, 0.0f, shift) * scale);
	}
}

/* Results past the caches: powers are kept in a cache of the thread's, so that memory is read once and written once. */
VEC_INLINE void softmax_past(opd_dtype dtype, const void *x, const void *next, void *y, size_t count, float *kept)
{
	float highest = softmax_highest(dtype, x, count);
	softmax_scale_kept(dtype, kept, y, count, vec_splat(1.0f / softmax_sum(dtype, x, next, kept, count, highest)), true);
}

static void softmax_f32(const void *x, const void *next, void *y, size_t count, float *kept)
{
	if (kept != NULL) {
		softmax_past(OPD_f32, x, next, y, count, kept);
		return;
	}
	float highest = softmax_highest(OPD_f32, x, count);
	vec_f32 scale = vec_splat(1.0f / softmax_sum(OPD_f32, x, next, y, count, highest));
	softmax_scale_kept(OPD_f32, y, y, count, scale, false);
}

/* 16-bit results have no room for each e. A first-level cache has, for rows of usual length; longer rows compute it twice, to the same
 * bits. */
#define KEPT 4096

VEC_INLINE void softmax_16(opd_dtype dtype, const void *x, const void *next, void *y, size_t count, float *kept)
{
	float near[KEPT];
	if (kept != NULL) {
		softmax_past(dtype, x, next, y, count, kept);
		return;
	}
	float highest = softmax_highest(dtype, x, count);
	if (count <= KEPT)
		softmax_scale_kept(dtype, near, y, count, vec_splat(1.0f / softmax_sum(dtype, x, next, near, count, highest)), false);
	else
		softmax_scale_again(dtype, x, y, count, vec_splat(highest),
		                    vec_splat(1.0f / softmax_sum(dtype, x, next, NULL, count, highest)));
}

static void softmax_bf16(const void *x, const void *next, void *y, size_t count, float *kept)
{
	softmax_16(OPD_bf16, x, next, y, count, kept);
}

static void softmax_f16(const void *x, const void *next, void *y, size_t count, float *kept)
{
	softmax_16(OPD_f16, x, next, y, count, kept);
}

const struct cpu_softmax_kernels CPU_SYMBOL(cpu_softmax) = {
	.softmax = {softmax_f32, softmax_bf16, softmax_f16},
};
