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

struct moments {
	double mean, variance;
};

/* Vectors of a chain between two folds into f64: so few lose no digit that counts. */
#define BLOCK 16

/* Both from one pass in f32 over differences from the row's first element: right where that lies among the others. False where it doesn't (most of the squares' mean would cancel), where
 * squares overflow or vanish, and with NaN. */
VEC_INLINE bool moments_quick(opd_dtype dtype, const void *x, size_t count, struct moments *moments_out)
{
	const float pivot = vec_load_some(dtype, x, 0, 1)[0];
	vec_f64 sum = {0}, squares = {0};
	size_t i = 0;
	while (i + CHAINS * VEC_LANES <= count) {
		vec_f32 sums[CHAINS], products[CHAINS];
		for (size_t c = 0; c < CHAINS; c++)
			sums[c] = products[c] = vec_splat(0.0f);
		for (size_t end = i + BLOCK * CHAINS * VEC_LANES; i + CHAINS * VEC_LANES <= count && i < end; i += CHAINS * VEC_LANES) {
			for (size_t c = 0; c < CHAINS; c++) {
				struct vec_pair pair = vec_load_pair(dtype, x, i + c / 2 * 2 * VEC_LANES);
				vec_f32 d = pair.v[c % 2] - vec_splat(pivot);
				sums[c] = sums[c] + d;
				products[c] = vec_fma(d, d, products[c]);
			}
		}
		sum = sum + moments_fold((sums[0] + sums[1]) + (sums[2] + sums[3]));
		squares = squares + moments_fold((products[0] + products[1]) + (products[2] + products[3]));
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_f32 d = vec_load_part(dtype, x, i, here, pivot) - vec_splat(pivot);
		sum = sum + moments_fold(d);
		squares = squares + moments_fold(d * d);
	}
	double shift = 0, square = 0;
	for (size_t l = 0; l < HALF; l++) {
		shift += sum[l];
		square += squares[l];
	}
	shift /= (double)count;
	square /= (double)count;
	*moments_out = (struct moments){(double)pivot + shift, square - shift * shift};
	return square > 1e-30 && square < 1e36 && moments_out->variance * 16 > square;
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

VEC_INLINE vec_f32 layer_norm_of(opd_dtype dtype, const struct cpu_layer_norm *norm, vec_f32 x, vec_f32 weight, vec_f32 bias, const struct moments_mean *mean, vec_f32 factor)
{
	vec_f32 v = moments_difference(x, mean) * factor;
	if (norm->weight != NULL && norm->bias != NULL)
		v = layer_norm_affine(v, weight, bias);
	else if (norm->weight != NULL)
		v = v * weight;
	else if (norm->bias != NULL)
		v = v + bias;
	return vec_result(dtype, v);
}

/* Weights or biases [at, at + 2·VEC_LANES) in the order in which x's pairs have them; of none, anything. */
VEC_INLINE struct vec_pair layer_norm_vector(opd_dtype dtype, opd_dtype vector_dtype, const void *vector, size_t at)
{
	if (vector == NULL)
		return (struct vec_pair){{vec_splat(0.0f), vec_splat(0.0f)}};
	struct vec_pair pair = vec_load_pair(vector_dtype, vector, at);
	return dtype == OPD_bf16 && vector_dtype == OPD_f32 ? vec_apart(pair) : pair;
}

VEC_INLINE vec_f32 layer_norm_vector_part(opd_dtype dtype, const void *vector, size_t at, size_t count)
{
	return vector == NULL ? vec_splat(0.0f) : vec_load_part(dtype, vector, at, count, 0.0f);
}

/* streams: a constant of the caller. */
VEC_INLINE void layer_norm_row(opd_dtype dtype, opd_dtype weight_dtype, opd_dtype bias_dtype, const struct cpu_layer_norm *norm, bool streams)
{
	const size_t count = norm->count, bytes = opd_dtype_bytes(dtype);
	struct moments moments;
	struct moments_mean mean;
	if (moments_quick(dtype, norm->x, count, &moments)) {
		mean = moments_mean_of(moments.mean);
	} else {
		mean = moments_mean_of(moments_mean(dtype, norm->x, count));
		moments.variance = moments_variance(dtype, norm->x, count, &mean);
	}
	vec_f32 factor = vec_splat(1.0f / sqrtf((float)moments.variance + (float)norm->epsilon));
	size_t i = 0;
	for (; i + 2 * VEC_LANES <= count; i += 2 * VEC_LANES) {
		struct vec_pair x = vec_load_pair(dtype, norm->x, i);
		struct vec_pair weight = layer_norm_vector(dtype, weight_dtype, norm->weight, i), bias = layer_norm_vector(dtype, bias_dtype, norm->bias, i);
		for (size_t p = 0; p < 2; p++)
			x.v[p] = layer_norm_of(dtype, norm, x.v[p], weight.v[p], bias.v[p], &mean, factor);
		vec_put_pair(dtype, norm->y, i, streams, x);
		vec_ask((const unsigned char *)norm->next + i * bytes, 2 * VEC_LANES * bytes); /* results take longer to make than rows to come */
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_f32 x = vec_load_part(dtype, norm->x, i, here, 0.0f);
		vec_f32 weight = layer_norm_vector_part(weight_dtype, norm->weight, i, here), bias = layer_norm_vector_part(bias_dtype, norm->bias, i, here);
		vec_store_part(dtype, norm->y, i, here, layer_norm_of(dtype, norm, x, weight, bias, &mean, factor));
	}
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
		if (norm->streams)                                                                        \
			layer_norm_row(OPD_##name, OPD_##weight_name, OPD_##bias_name, norm, true);           \
		else                                                                                      \
			layer_norm_row(OPD_##name, OPD_##weight_name, OPD_##bias_name, norm, false);          \
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
