/* The activations, alone or times another row: compiled once for each instruction set (kernels.h). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* The functions of x take `n` vectors, at most VEC_TOGETHER, and put their results in place. dtype and n are constants of the caller: results of 16 bits need fewer digits. */

/* y = e^x, where x is `power` times log2 e, for results of 16 bits. */
VEC_INLINE void activation_power_16(opd_dtype dtype, vec_f32 *power, size_t n)
{
#if !defined(VEC_AVX512)
	VEC_EACH(i, n) power[i] = vec_min(vec_splat(129.0f), vec_max(vec_splat(-150.0f), power[i])); /* 2^128 by a polynomial may be just below infinity */
#endif
	vec_exp2(dtype, power, n);
}

VEC_INLINE vec_f32 activation_quotient(opd_dtype dtype, vec_f32 a, vec_f32 b)
{
	return dtype == OPD_f32 ? a / b : vec_quotient_16(a, b);
}

VEC_INLINE void sigmoid_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	if (dtype == OPD_f32) {
		VEC_EACH(i, n) x[i] = vec_exp(-x[i]);
	} else {
		VEC_EACH(i, n) x[i] = x[i] * vec_splat(-VEC_LOG2_E);
		activation_power_16(dtype, x, n);
	}
	VEC_EACH(i, n) x[i] = activation_quotient(dtype, vec_splat(1.0f), vec_splat(1.0f) + x[i]);
}

VEC_INLINE void silu_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	vec_f32 e[VEC_TOGETHER];
	if (dtype == OPD_f32) {
		VEC_EACH(i, n) e[i] = vec_exp(-x[i]);
	} else {
		VEC_EACH(i, n) e[i] = x[i] * vec_splat(-VEC_LOG2_E);
		activation_power_16(dtype, e, n);
	}
	VEC_EACH(i, n) x[i] = activation_quotient(dtype, x[i], vec_splat(1.0f) + e[i]);
}

/* The second operand where either is NaN, so NaN stays. */
VEC_INLINE void relu_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	(void)dtype;
	VEC_EACH(i, n) x[i] = vec_max(vec_splat(0.0f), x[i]);
}

VEC_INLINE void relu2_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	relu_of(dtype, x, n);
	VEC_EACH(i, n) x[i] = x[i] * x[i];
}

/* x·tail below 0, x·(1 − tail) from there on, and for NaN; the tail counts as 0 where |x| is `far` or more. */
VEC_INLINE vec_f32 gelu_whole(vec_f32 x, vec_f32 tail, float far)
{
#if defined(VEC_AVX512) /* gcc 12 makes more of vec_select than this */
	tail = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(far), _CMP_LT_OQ), tail);
	return x * (vec_f32)_mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ), _mm512_set1_ps(1.0f), tail);
#else
	tail = (vec_f32)((vec_u32)tail & (vec_u32)((vec_f32)((vec_u32)x & 0x7fffffff) < vec_splat(far)));
	return x * (vec_f32)vec_select((vec_u32)(x < vec_splat(0.0f)), (vec_u32)tail, (vec_u32)(vec_splat(1.0f) - tail));
#endif
}

/* x·Φ(x). Φ(−z) is 2 to a polynomial of z, so that gelu keeps digits below 0 too: a relative error of 1.5e-7 (to z = 9.5, where gelu is −1e-20), which the rounding of the power makes 4e-7 at −2 and
 * 1e-6 at −4, and of 1.3e-4 (bf16, to z = 8, −5e-15). f16 has no room for the latter: gelu_and_mul_sparse rounds twice. */
VEC_INLINE void gelu_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	static const float exact[] = {-4.91595133e-11f, 2.91543545e-09f, -7.63622765e-08f, 1.15888122e-06f, -1.11627032e-05f, 6.87665306e-05f, -0.000233382467f,
	                              -0.000128267595f, 0.00713997707f, -0.0525978021f, -0.459159106f, -1.15111339f, -0.999999762f};
	static const float brief[] = {1.59018946e-05f, -0.000485318102f, 0.00636587525f, -0.0486862510f, -0.464639187f, -1.14853394f, -1.00019312f};
	const float far = dtype == OPD_bf16 ? 8.0f : 9.5f;
	vec_f32 z[VEC_TOGETHER], tail[VEC_TOGETHER];
	VEC_EACH(i, n) z[i] = (vec_f32)((vec_u32)x[i] & 0x7fffffff);
#if !defined(VEC_AVX512)
	VEC_EACH(i, n) z[i] = vec_min(vec_splat(far), z[i]);
#endif
	if (dtype == OPD_bf16)
		vec_polynomial(brief, sizeof brief / sizeof brief[0], z, tail, n);
	else
		vec_polynomial(exact, sizeof exact / sizeof exact[0], z, tail, n);
	vec_exp2(dtype, tail, n);
	VEC_EACH(i, n) x[i] = gelu_whole(x[i], tail[i], far);
}

/* (1 + tanh u)/2 is the sigmoid of 2u. */
VEC_INLINE void gelu_tanh_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	vec_f32 e[VEC_TOGETHER];
	if (dtype == OPD_f32) {
		VEC_EACH(i, n) e[i] = vec_exp(vec_splat(-1.59576912f) * vec_fma(vec_splat(0.044715f) * x[i], x[i] * x[i], x[i]));
	} else {
		VEC_EACH(i, n) e[i] = x[i] * vec_fma(x[i] * x[i], vec_splat(-1.59576912f * 0.044715f * VEC_LOG2_E), vec_splat(-1.59576912f * VEC_LOG2_E));
		activation_power_16(dtype, e, n);
	}
	VEC_EACH(i, n) x[i] = activation_quotient(dtype, x[i], vec_splat(1.0f) + e[i]);
}

#define ACTIVATION_MAP(X) X(sigmoid) X(silu) X(relu) X(relu2) X(gelu) X(gelu_tanh)

/* The loop of one function and dtype, both constants of the caller: y = f(x), or f(x)·other. */
typedef void (*activation_fn)(opd_dtype dtype, vec_f32 *x, size_t n);

VEC_INLINE void activation_whole(activation_fn function, opd_dtype dtype, const void *x, const void *other, bool times, void *y, size_t at, size_t n, bool past)
{
	vec_f32 v[VEC_TOGETHER];
	for (size_t p = 0; p < n; p += 2) {
		struct vec_pair pair = vec_load_pair(dtype, x, at + p * VEC_LANES);
		v[p] = pair.v[0];
		v[p + 1] = pair.v[1];
	}
	function(dtype, v, n);
	for (size_t p = 0; p < n; p += 2) {
		struct vec_pair pair = {{v[p], v[p + 1]}};
		if (times) {
			struct vec_pair factor = vec_load_pair(dtype, other, at + p * VEC_LANES);
			pair.v[0] = pair.v[0] * factor.v[0];
			pair.v[1] = pair.v[1] * factor.v[1];
		}
		pair.v[0] = vec_result(dtype, pair.v[0]);
		pair.v[1] = vec_result(dtype, pair.v[1]);
		vec_put_pair(dtype, y, at + p * VEC_LANES, past, pair);
	}
}

VEC_INLINE void activation_part(activation_fn function, opd_dtype dtype, const void *x, const void *other, bool times, void *y, size_t at, size_t count)
{
	vec_f32 v = vec_load_part(dtype, x, at, count, 0.0f);
	function(dtype, &v, 1);
	if (times)
		v = v * vec_load_part(dtype, other, at, count, 0.0f);
	vec_store_part(dtype, y, at, count, vec_result(dtype, v));
}

VEC_INLINE void activation_row(activation_fn function, opd_dtype dtype, const void *x, const void *other, bool times, void *y, size_t count, enum cpu_reach reach)
{
	const size_t step = VEC_TOGETHER * VEC_LANES, bytes = opd_dtype_bytes(dtype);
	const bool past = reach != CPU_NEAR && vec_is_aligned(y);
	const bool ahead = reach == CPU_PAST_AHEAD || (reach == CPU_PAST && times); /* two short runs of memory, row by row, are asked for too late by any processor */
	size_t i = 0;
	for (; i + step <= count; i += step) {
		if (ahead)
			vec_ask_ahead((const unsigned char *)x + i * bytes, step * bytes);
		if (ahead && times)
			vec_ask_ahead((const unsigned char *)other + i * bytes, step * bytes);
		activation_whole(function, dtype, x, other, times, y, i, VEC_TOGETHER, past);
	}
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		activation_part(function, dtype, x, other, times, y, i, here);
	}
}

#define ROW(function, name)                                                                                                    \
	static void function##_##name(const void *x, const void *other, void *y, size_t count, enum cpu_reach reach)       \
	{                                                                                                                          \
		activation_row(function##_of, OPD_##name, x, other, false, y, count, reach);                                             \
	}                                                                                                                          \
	static void function##_mul_##name(const void *x, const void *other, void *y, size_t count, enum cpu_reach reach)   \
	{                                                                                                                          \
		activation_row(function##_of, OPD_##name, x, other, true, y, count, reach);                                              \
	}
#define X(function) ROW(function, f32) ROW(function, bf16) ROW(function, f16)
ACTIVATION_MAP(X)
#undef X

#define ROWS(function) {function##_f32, function##_bf16, function##_f16}

const struct cpu_activation_kernels CPU_SYMBOL(cpu_activation) = {
	.alone = {ROWS(sigmoid), ROWS(silu), ROWS(relu), ROWS(relu2), ROWS(gelu), ROWS(gelu_tanh)},
	.times = {ROWS(sigmoid_mul), ROWS(silu_mul), ROWS(relu_mul), ROWS(relu2_mul), ROWS(gelu_mul), ROWS(gelu_tanh_mul)},
};
