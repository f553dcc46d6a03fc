/* rms_norm and fused_add_rms_norm, one row: compiled once for each instruction set (kernels.h). */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* Independent chains of the sum of squares: the latency of one addition hides behind the others. */
#define CHAINS 4

static inline float norm_factor(float sum_of_squares, size_t count, float epsilon)
{
	float factor = 1.0f / sqrtf(sum_of_squares / (float)count + epsilon);
	return factor != factor ? NAN : factor; /* whatever NaN epsilon is: vec_rounded_to_bf16 */
}

VEC_INLINE float norm_sum_chains(const vec_f32 *chains)
{
	return vec_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

/* x, or x + residual. */
VEC_INLINE struct vec_pair norm_load_pair(opd_dtype dtype, const void *x, const void *residual, size_t at)
{
	struct vec_pair pair = vec_load_pair(dtype, x, at);
	if (residual != NULL) {
		struct vec_pair other = vec_load_pair(dtype, residual, at);
		for (size_t p = 0; p < 2; p++)
			pair.v[p] = pair.v[p] + other.v[p];
	}
	return pair;
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
		for (size_t c = 0; c < CHAINS; c += 2) {
			struct vec_pair pair = norm_load_pair(dtype, x, residual, i + c * VEC_LANES);
			for (size_t p = 0; p < 2; p++)
				chains[c + p] = vec_fma(pair.v[p], pair.v[p], chains[c + p]);
		}
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_f32 v = norm_load_part(dtype, x, residual, i, here);
		chains[0] = vec_fma(v, v, chains[0]);
	}
	return norm_sum_chains(chains);
}

/* y rounded to the weight's dtype, times the weight. That product's own rounding is the store's: a weight has x's dtype or is f32. */
VEC_INLINE vec_f32 norm_weighted(opd_dtype weight_dtype, vec_f32 y, vec_f32 weight)
{
	return (weight_dtype == OPD_bf16 ? vec_rounded_to_bf16(y) : vec_rounded(weight_dtype, y)) * weight;
}

/* Weights [at, at + 2·VEC_LANES) in the order in which x's pairs have them. */
VEC_INLINE struct vec_pair norm_weight_pair(opd_dtype dtype, opd_dtype weight_dtype, const void *weight, size_t at)
{
	struct vec_pair pair = vec_load_pair(weight_dtype, weight, at);
	return dtype == OPD_bf16 && weight_dtype == OPD_f32 ? vec_apart(pair) : pair;
}

/* The norm of x, or of x + residual, whose sum is computed twice rather than kept: it must not be rounded, and in place there is nowhere to keep it. While results are made,
 * which is the longer half, the next row is on its way. residual and sum: both NULL, or neither; streams, too, is a constant of the caller. */
VEC_INLINE void norm_row(opd_dtype dtype, opd_dtype weight_dtype, const struct cpu_norm *norm, const void *residual, void *sum, bool streams)
{
	const size_t count = norm->count, bytes = opd_dtype_bytes(dtype);
	const unsigned char *const next = norm->x_next, *const residual_next = norm->residual_next;
	const void *const x = norm->x, *const weights = norm->weight;
	void *const y = norm->y;
	vec_f32 factor = vec_splat(norm_factor(norm_sum_of_squares(dtype, norm->x, residual, norm->squares), norm->squares, (float)norm->epsilon));
	size_t i = 0;
	for (; i + 2 * VEC_LANES <= count; i += 2 * VEC_LANES) {
		struct vec_pair s = norm_load_pair(dtype, x, residual, i), v, weight;
		if (weight_dtype != OPD_DTYPE_NONE)
			weight = norm_weight_pair(dtype, weight_dtype, weights, i);
		for (size_t p = 0; p < 2; p++) {
			v.v[p] = s.v[p] * factor;
			if (weight_dtype != OPD_DTYPE_NONE)
				v.v[p] = norm_weighted(weight_dtype, v.v[p], weight.v[p]);
		}
		vec_ask(next + i * bytes, 2 * VEC_LANES * bytes);
		if (residual != NULL) {
			vec_ask(residual_next + i * bytes, 2 * VEC_LANES * bytes);
			vec_put_pair(dtype, sum, i, streams, s);
		}
		vec_put_pair(dtype, y, i, streams, v);
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_f32 s = norm_load_part(dtype, x, residual, i, here);
		vec_f32 v = s * factor;
		if (weight_dtype != OPD_DTYPE_NONE)
			v = norm_weighted(weight_dtype, v, vec_load_part(weight_dtype, weights, i, here, 0.0f));
		if (residual != NULL)
			vec_store_part(dtype, sum, i, here, s);
		vec_store_part(dtype, y, i, here, v);
	}
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

#define X(name, dtype, weight_dtype)                                                             \
	static void rms_norm_##name(const struct cpu_norm *norm)                                     \
	{                                                                                            \
		if (norm->streams)                                                                       \
			norm_row(dtype, weight_dtype, norm, NULL, NULL, true);                               \
		else                                                                                     \
			norm_row(dtype, weight_dtype, norm, NULL, NULL, false);                              \
	}                                                                                            \
	static void fused_add_rms_norm_##name(const struct cpu_norm *norm)                           \
	{                                                                                            \
		if (norm->streams)                                                                       \
			norm_row(dtype, weight_dtype, norm, norm->residual, norm->sum, true);                \
		else                                                                                     \
			norm_row(dtype, weight_dtype, norm, norm->residual, norm->sum, false);               \
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
