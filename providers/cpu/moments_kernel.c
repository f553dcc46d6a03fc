/* layer_norm, one row, and what gelu_and_mul_sparse takes of a gate row: compiled once for each instruction set (kernels.h).
 *
 * The mean is summed in f64 and kept as an f32 and the rest of it: a row far from 0 loses nothing, and no sum overflows. */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_f8.h"

/* Independent chains: the latency of one addition hides behind the others. */
#define CHAINS 4
#define HALF (VEC_LANES / 2)

typedef double vec_f64 __attribute__((vector_size(8 * HALF)));
typedef float vec_half __attribute__((vector_size(4 * HALF)));

/* Both halves of `v` in f64, added. */
VEC_INLINE vec_f64 moments_fold(vec_f32 v)
{
#if defined(VEC_AVX512)
	return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(VEC_AVX2)
	return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
	vec_half halves[2];
	memcpy(halves, &v, sizeof halves);
	return __builtin_convertvector(halves[0], vec_f64) + __builtin_convertvector(halves[1], vec_f64);
#endif
}

/* Both halves' squares in f64, added. */
VEC_INLINE vec_f64 moments_fold_squares(vec_f32 v)
{
#if defined(VEC_AVX512)
	__m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
	return _mm512_fmadd_pd(low, low, _mm512_mul_pd(high, high));
#elif defined(VEC_AVX2)
	__m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
	return _mm256_fmadd_pd(low, low, _mm256_mul_pd(high, high));
#else
	vec_half halves[2];
	memcpy(halves, &v, sizeof halves);
	vec_f64 low = __builtin_convertvector(halves[0], vec_f64), high = __builtin_convertvector(halves[1], vec_f64);
	return low * low + high * high;
#endif
}

VEC_INLINE double moments_sum(const vec_f64 *chains)
{
	vec_f64 v = (chains[0] + chains[1]) + (chains[2] + chains[3]);
	double sum = v[0];
	for (size_t i = 1; i < HALF; i++)
		sum += v[i];
	return sum;
}

/* The mean: `high` + `low`. */
struct moments_mean {
	vec_f32 high, low;
};

VEC_INLINE struct moments_mean moments_mean_of(double mean)
{
	float high = (float)mean;
	/* An infinite mean has no rest. */
	float low = high - high == 0.0f ? (float)(mean - (double)high) : 0.0f;
	return (struct moments_mean){vec_splat(high), vec_splat(low)};
}

VEC_INLINE vec_f32 moments_difference(vec_f32 v, const struct moments_mean *mean)
{
	return (v - mean->high) - mean->low;
}

VEC_INLINE double moments_mean(opd_dtype dtype, const void *x, size_t count)
{
	vec_f64 chains[CHAINS] = {{0}};
	size_t i = 0;
	for (; i + CHAINS * VEC_LANES <= count; i += CHAINS * VEC_LANES)
		for (size_t c = 0; c < CHAINS; c++)
			chains[c] = chains[c] + moments_fold(vec_load(dtype, x, i + c * VEC_LANES));
	for (; i < count; i += VEC_LANES)
		chains[0] = chains[0] + moments_fold(vec_load_some(dtype, x, i, count - i < VEC_LANES ? count - i : VEC_LANES));
	return moments_sum(chains) / (double)count;
}

/* Mean square of the differences from `mean`. */
VEC_INLINE double moments_variance(opd_dtype dtype, const void *x, size_t count, const struct moments_mean *mean)
{
	vec_f64 chains[CHAINS] = {{0}};
	size_t i = 0;
	for (; i + CHAINS * VEC_LANES <= count; i += CHAINS * VEC_LANES)
		for (size_t c = 0; c < CHAINS; c++)
			chains[c] = chains[c] + moments_fold_squares(moments_difference(vec_load(dtype, x, i + c * VEC_LANES), mean));
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		chains[0] = chains[0] + moments_fold_squares(moments_difference(vec_load(dtype, x, i), mean));
	if (i < count) {
		vec_f32 d = moments_difference(vec_load_some(dtype, x, i, count - i), mean);
		vec_f32 part = vec_splat(0.0f);
		memcpy(&part, &d, (count - i) * sizeof(float));
		chains[1] = chains[1] + moments_fold_squares(part);
	}
	return moments_sum(chains) / (double)count;
}

/* ---- layer_norm --------------------------------------------------------------------------------------------------------- */

/* v · weight + bias, where the product alone may be past what f32 holds and the sum isn't. */
VEC_INLINE vec_f32 layer_norm_affine(vec_f32 v, vec_f32 weight, vec_f32 bias)
{
#if defined(VEC_AVX512) || defined(VEC_AVX2)
	return vec_fma(v, weight, bias);
#else
	const vec_f32 half = vec_splat(0.5f);
	return (v * (weight * half) + bias * half) * vec_splat(2.0f);
#endif
}

VEC_INLINE vec_f32 layer_norm_at(opd_dtype dtype, opd_dtype weight_dtype, opd_dtype bias_dtype, const struct cpu_layer_norm *norm, size_t i, size_t count,
                                 const struct moments_mean *mean, vec_f32 factor)
{
	vec_f32 v = moments_difference(vec_load_some(dtype, norm->x, i, count), mean) * factor;
	if (norm->weight != NULL && norm->bias != NULL)
		v = layer_norm_affine(v, vec_load_some(weight_dtype, norm->weight, i, count), vec_load_some(bias_dtype, norm->bias, i, count));
	else if (norm->weight != NULL)
		v = v * vec_load_some(weight_dtype, norm->weight, i, count);
	else if (norm->bias != NULL)
		v = v + vec_load_some(bias_dtype, norm->bias, i, count);
	return vec_one_nan(v);
}

VEC_INLINE void layer_norm_row(opd_dtype dtype, opd_dtype weight_dtype, opd_dtype bias_dtype, const struct cpu_layer_norm *norm)
{
	const size_t count = norm->count;
	struct moments_mean mean = moments_mean_of(moments_mean(dtype, norm->x, count));
	float variance = (float)moments_variance(dtype, norm->x, count, &mean);
	vec_f32 factor = vec_splat(1.0f / sqrtf(variance + norm->epsilon));
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		vec_store(dtype, norm->y, i, layer_norm_at(dtype, weight_dtype, bias_dtype, norm, i, VEC_LANES, &mean, factor));
	if (i < count)
		vec_store_part(dtype, norm->y, i, count - i, layer_norm_at(dtype, weight_dtype, bias_dtype, norm, i, count - i, &mean, factor));
}

/* ---- gelu_and_mul_sparse -------------------------------------------------------------------------------------------------- */

/* `value` rounded to `dtype`, once: through the lane of a vector. A double is rounded to f32 first; the definition does so too. */
VEC_INLINE float sparse_rounded(opd_dtype dtype, double value)
{
	return vec_rounded(dtype, vec_splat((float)value))[0];
}

/* mean + std·multiplier, each step rounded to `dtype`. */
VEC_INLINE float sparse_cutoff(opd_dtype dtype, const void *x, size_t count, float multiplier)
{
	double mean = moments_mean(dtype, x, count);
	struct moments_mean split = moments_mean_of(mean);
	float variance = (float)moments_variance(dtype, x, count, &split);
	float above = sparse_rounded(dtype, (double)sparse_rounded(dtype, sqrt((double)variance)) * (double)multiplier);
	return sparse_rounded(dtype, (double)sparse_rounded(dtype, mean) + (double)above);
}

/* y = relu of x − cutoff, rounded. */
VEC_INLINE void sparse_gate(opd_dtype dtype, const void *x, void *y, size_t count, float cutoff)
{
	vec_f32 shift = vec_splat(cutoff);
	for (size_t i = 0; i < count; i += VEC_LANES) {
		size_t here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_store_some(dtype, y, i, here, vec_max(vec_splat(0.0f), vec_load_some(dtype, x, i, here) - shift));
	}
}

/* ---- The table ------------------------------------------------------------------------------------------------------------ */

#define LAYER_NORM(name, weight_name, bias_name)                                                  \
	static void layer_norm_##name##_##weight_name##_##bias_name(const struct cpu_layer_norm *norm) \
	{                                                                                             \
		layer_norm_row(OPD_##name, OPD_##weight_name, OPD_##bias_name, norm);                     \
	}
#define LAYER_NORMS(name) LAYER_NORM(name, name, name) LAYER_NORM(name, name, f32) LAYER_NORM(name, f32, name) LAYER_NORM(name, f32, f32)
LAYER_NORM(f32, f32, f32)
LAYER_NORMS(bf16)
LAYER_NORMS(f16)

#define X(name)                                                                                   \
	static float cutoff_##name(const void *x, size_t count, float multiplier)                     \
	{                                                                                             \
		return sparse_cutoff(OPD_##name, x, count, multiplier);                                   \
	}                                                                                             \
	static void gate_##name(const void *x, void *y, size_t count, float cutoff)                   \
	{                                                                                             \
		sparse_gate(OPD_##name, x, y, count, cutoff);                                             \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_moments_kernels CPU_SYMBOL(cpu_moments) = {
	.layer_norm = {{{layer_norm_f32_f32_f32}},
                   {{layer_norm_bf16_bf16_bf16, layer_norm_bf16_bf16_f32}, {layer_norm_bf16_f32_bf16, layer_norm_bf16_f32_f32}},
                   {{layer_norm_f16_f16_f16, layer_norm_f16_f16_f32}, {layer_norm_f16_f32_f16, layer_norm_f16_f32_f32}}},
	.cutoff = {cutoff_f32, cutoff_bf16, cutoff_f16},
	.gate = {gate_f32, gate_bf16, gate_f16},
};
