/* rms_norm and fused_add_rms_norm, one row: compiled once for each instruction set (kernels.h). */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* Independent chains of the sum of squares: the latency of one addition hides behind the others. */
#define CHAINS 4

static inline float norm_factor(float sum_of_squares, size_t count, float epsilon)
{
	return 1.0f / sqrtf(sum_of_squares / (float)count + epsilon);
}

VEC_INLINE float norm_sum_chains(const vec_f32 *chains)
{
	return vec_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

/* x, or x + residual. */
VEC_INLINE vec_f32 norm_load(opd_dtype dtype, const void *x, const void *residual, size_t at)
{
	vec_f32 v = vec_load(dtype, x, at);
	return residual == NULL ? v : v + vec_load(dtype, residual, at);
}

VEC_INLINE vec_f32 norm_load_part(opd_dtype dtype, const void *x, const void *residual, size_t at, size_t count)
{
	vec_f32 v = vec_load_part(dtype, x, at, count, 0.0f);
	return residual == NULL ? v : v + vec_load_part(dtype, residual, at, count, 0.0f);
}

VEC_INLINE float norm_sum_of_squares(opd_dtype dtype, const void *x, const void *residual, size_t count)
{
	vec_f32 chains[CHAINS] = {vec_splat(0.0f), vec_splat(0.0f), vec_splat(0.0f), vec_splat(0.0f)};
	size_t i = 0;
	for (; i + CHAINS * VEC_LANES <= count; i += CHAINS * VEC_LANES) {
		for (size_t c = 0; c < CHAINS; c++) {
			vec_f32 v = norm_load(dtype, x, residual, i + c * VEC_LANES);
			chains[c] = vec_fma(v, v, chains[c]);
		}
	}
	for (; i + VEC_LANES <= count; i += VEC_LANES) {
		vec_f32 v = norm_load(dtype, x, residual, i);
		chains[0] = vec_fma(v, v, chains[0]);
	}
	if (i < count) {
		vec_f32 v = norm_load_part(dtype, x, residual, i, count - i);
		chains[1] = vec_fma(v, v, chains[1]);
	}
	return norm_sum_chains(chains);
}

/* y rounded to the weight's dtype, times the weight. That product's own rounding is the store's: a weight has x's dtype or is f32. */
VEC_INLINE vec_f32 norm_weighted(opd_dtype weight_dtype, vec_f32 y, vec_f32 weight)
{
	return vec_rounded(weight_dtype, y) * weight;
}

VEC_INLINE void norm_store(opd_dtype dtype, void *y, size_t at, bool streams, vec_f32 v)
{
	if (streams)
		vec_stream(dtype, y, at, v);
	else
		vec_store(dtype, y, at, v);
}

/* streams: a constant of the caller, as the dtypes are. */
VEC_INLINE void rms_norm_row(opd_dtype dtype, opd_dtype weight_dtype, const void *x, const void *weight, void *y, size_t count,
                             size_t squares, float epsilon, bool streams)
{
	vec_f32 factor = vec_splat(norm_factor(norm_sum_of_squares(dtype, x, NULL, squares), squares, epsilon));
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES) {
		vec_f32 v = vec_load(dtype, x, i) * factor;
		if (weight_dtype != OPD_DTYPE_NONE)
			v = norm_weighted(weight_dtype, v, vec_load(weight_dtype, weight, i));
		norm_store(dtype, y, i, streams, v);
	}
	if (i < count) {
		vec_f32 v = vec_load_part(dtype, x, i, count - i, 0.0f) * factor;
		if (weight_dtype != OPD_DTYPE_NONE)
			v = norm_weighted(weight_dtype, v, vec_load_part(weight_dtype, weight, i, count - i, 0.0f));
		vec_store_part(dtype, y, i, count - i, v);
	}
	if (streams)
		vec_streamed();
}

/* The sum is computed twice rather than kept: it must not be rounded, and in place there is nowhere to keep it. */
VEC_INLINE void fused_add_rms_norm_row(opd_dtype dtype, opd_dtype weight_dtype, const void *x, const void *residual, const void *weight,
                                       void *y, void *sum, size_t count, size_t squares, float epsilon, bool streams)
{
	vec_f32 factor = vec_splat(norm_factor(norm_sum_of_squares(dtype, x, residual, squares), squares, epsilon));
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES) {
		vec_f32 s = norm_load(dtype, x, residual, i);
		vec_f32 v = s * factor;
		if (weight_dtype != OPD_DTYPE_NONE)
			v = norm_weighted(weight_dtype, v, vec_load(weight_dtype, weight, i));
		norm_store(dtype, sum, i, streams, s);
		norm_store(dtype, y, i, streams, v);
	}
	if (i < count) {
		vec_f32 s = norm_load_part(dtype, x, residual, i, count - i);
		vec_f32 v = s * factor;
		if (weight_dtype != OPD_DTYPE_NONE)
			v = norm_weighted(weight_dtype, v, vec_load_part(weight_dtype, weight, i, count - i, 0.0f));
		vec_store_part(dtype, sum, i, count - i, s);
		vec_store_part(dtype, y, i, count - i, v);
	}
	if (streams)
		vec_streamed();
}

/* X(name, dtype of x, dtype of weight) */
#define NORM_MAP(X)                   \
	X(f32_none, OPD_f32, OPD_DTYPE_NONE)   \
	X(f32_f32, OPD_f32, OPD_f32)           \
	X(bf16_none, OPD_bf16, OPD_DTYPE_NONE) \
	X(bf16_bf16, OPD_bf16, OPD_bf16)       \
	X(bf16_f32, OPD_bf16, OPD_f32)         \
	X(f16_none, OPD_f16, OPD_DTYPE_NONE)   \
	X(f16_f16, OPD_f16, OPD_f16)           \
	X(f16_f32, OPD_f16, OPD_f32)

#define X(name, dtype, weight_dtype)                                                                                         \
	static void rms_norm_##name(const void *x, const void *weight, void *y, size_t count, size_t squares, float epsilon, bool streams) \
	{                                                                                                                        \
		if (streams)                                                                                                         \
			rms_norm_row(dtype, weight_dtype, x, weight, y, count, squares, epsilon, true);                                  \
		else                                                                                                                 \
			rms_norm_row(dtype, weight_dtype, x, weight, y, count, squares, epsilon, false);                                 \
	}                                                                                                                        \
	static void fused_add_rms_norm_##name(const void *x, const void *residual, const void *weight, void *y, void *sum,       \
	                                      size_t count, size_t squares, float epsilon, bool streams)                         \
	{                                                                                                                        \
		if (streams)                                                                                                         \
			fused_add_rms_norm_row(dtype, weight_dtype, x, residual, weight, y, sum, count, squares, epsilon, true);         \
		else                                                                                                                 \
			fused_add_rms_norm_row(dtype, weight_dtype, x, residual, weight, y, sum, count, squares, epsilon, false);        \
	}
NORM_MAP(X)
#undef X

const struct cpu_norm_kernels CPU_SYMBOL(cpu_norm) = {
	.rms_norm = {{rms_norm_f32_none, rms_norm_f32_f32, rms_norm_f32_f32},
                 {rms_norm_bf16_none, rms_norm_bf16_bf16, rms_norm_bf16_f32},
                 {rms_norm_f16_none, rms_norm_f16_f16, rms_norm_f16_f32}},
	.fused_add_rms_norm = {{fused_add_rms_norm_f32_none, fused_add_rms_norm_f32_f32, fused_add_rms_norm_f32_f32},
                           {fused_add_rms_norm_bf16_none, fused_add_rms_norm_bf16_bf16, fused_add_rms_norm_bf16_f32},
                           {fused_add_rms_norm_f16_none, fused_add_rms_norm_f16_f16, fused_add_rms_norm_f16_f32}},
};
