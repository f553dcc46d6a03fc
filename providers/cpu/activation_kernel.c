/* The activations, alone or times another row: compiled once for each instruction set (kernels.h). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* Vectors that go through a function together: their steps stand beside each other, so that one's wait for its last result is filled by the others'. With sixteen registers they would go through memory.
 * gelu of 4096 in a first-level cache on Zen 5, 2, 4 and 8 at a time: f32 1.22, 1.08, 0.87 us; bf16 0.71, 0.66, 0.61. */
#if defined(VEC_AVX512)
#define TOGETHER 8
#else
#define TOGETHER 2
#endif

#define EACH(i, n) for (size_t i = 0; i < (n); i++)

/* The functions of x take `n` vectors, at most TOGETHER, and put their results in place. dtype and n are constants of the caller: results of 16 bits need fewer digits. */

/* y = Σ terms[k]·x^(count − 1 − k). The compiler isn't to know the terms: it would keep them in registers, and the vectors in memory instead (gelu of f32, as above: 0.98 us). */
VEC_INLINE void activation_polynomial(const float *terms, size_t count, const vec_f32 *x, vec_f32 *y, size_t n)
{
	__asm__("" : "+r"(terms));
	EACH(i, n) y[i] = vec_splat(terms[0]);
	for (size_t k = 1; k < count; k++)
		EACH(i, n) y[i] = vec_fma(y[i], x[i], vec_splat(terms[k]));
}

/* 2^x of x in [-150, 129], and of any x with AVX-512, by a polynomial for 2^f, f of [0, 1). */
VEC_INLINE void activation_exp2_by(const float *terms, size_t count, vec_f32 *x, size_t n)
{
	vec_f32 f[TOGETHER], p[TOGETHER];
#if defined(VEC_AVX512)
	EACH(i, n) f[i] = _mm512_reduce_ps(x[i], _MM_FROUND_TO_NEG_INF);
	activation_polynomial(terms, count, f, p, n);
	EACH(i, n) x[i] = _mm512_scalef_ps(p[i], x[i]); /* which takes the whole part itself */
#else
	const vec_f32 magic = vec_splat(12582912.0f); /* as in vec_exp_near */
	vec_f32 shifted[TOGETHER];
	EACH(i, n) shifted[i] = (x[i] - vec_splat(0.5f)) + magic;
	EACH(i, n) f[i] = x[i] - (shifted[i] - magic);
	activation_polynomial(terms, count, f, p, n);
	EACH(i, n) x[i] = vec_scale(p[i], shifted[i] - magic, (vec_u32)shifted[i] - (vec_u32)magic + 254);
#endif
}

/* The least largest relative errors for their degrees (Lawson's iteration): 1.9e-9, 2.6e-6, 7.5e-5. */
VEC_INLINE void activation_exp2(opd_dtype dtype, vec_f32 *x, size_t n)
{
	static const float exact[] = {0.000217022563f, 0.00124396884f, 0.00967884064f, 0.0554833412f, 0.24022983f, 0.693147004f, 1.0f};
	static const float half[] = {0.0135341683f, 0.0520114619f, 0.241442755f, 0.693003835f, 1.00000259f};
	static const float brief[] = {0.0780245256f, 0.226067166f, 0.695833528f, 0.999925221f};
	if (dtype == OPD_f32)
		activation_exp2_by(exact, sizeof exact / sizeof exact[0], x, n);
	else if (dtype == OPD_f16)
		activation_exp2_by(half, sizeof half / sizeof half[0], x, n);
	else
		activation_exp2_by(brief, sizeof brief / sizeof brief[0], x, n);
}

/* y = e^x, where x is `power` times log2 e, for results of 16 bits. */
VEC_INLINE void activation_power_16(opd_dtype dtype, vec_f32 *power, size_t n)
{
#if !defined(VEC_AVX512)
	EACH(i, n) power[i] = vec_min(vec_splat(129.0f), vec_max(vec_splat(-150.0f), power[i])); /* 2^128 by a polynomial may be just below infinity */
#endif
	activation_exp2(dtype, power, n);
}

VEC_INLINE vec_f32 activation_quotient(opd_dtype dtype, vec_f32 a, vec_f32 b)
{
	return dtype == OPD_f32 ? a / b : vec_quotient_16(a, b);
}

#define LOG2_E 1.44269504f

VEC_INLINE void sigmoid_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	if (dtype == OPD_f32) {
		EACH(i, n) x[i] = vec_exp(-x[i]);
	} else {
		EACH(i, n) x[i] = x[i] * vec_splat(-LOG2_E);
		activation_power_16(dtype, x, n);
	}
	EACH(i, n) x[i] = activation_quotient(dtype, vec_splat(1.0f), vec_splat(1.0f) + x[i]);
}

VEC_INLINE void silu_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	vec_f32 e[TOGETHER];
	if (dtype == OPD_f32) {
		EACH(i, n) e[i] = vec_exp(-x[i]);
	} else {
		EACH(i, n) e[i] = x[i] * vec_splat(-LOG2_E);
		activation_power_16(dtype, e, n);
	}
	EACH(i, n) x[i] = activation_quotient(dtype, x[i], vec_splat(1.0f) + e[i]);
}

/* The second operand where either is NaN, so NaN stays. */
VEC_INLINE void relu_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	(void)dtype;
	EACH(i, n) x[i] = vec_max(vec_splat(0.0f), x[i]);
}

VEC_INLINE void relu2_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	relu_of(dtype, x, n);
	EACH(i, n) x[i] = x[i] * x[i];
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

/* x·Φ(x). Φ(−z) is 2 to a polynomial of z, so that gelu keeps digits below 0 too: a relative error of 1.5e-7 (f32, to z = 9.5, where gelu is −1e-20), which the rounding of the power makes 4e-7 at −2 and
 * 1e-6 at −4, and of 1.3e-4 (16 bits, to z = 8, −5e-15). */
VEC_INLINE void gelu_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	static const float exact[] = {-4.91595133e-11f, 2.91543545e-09f, -7.63622765e-08f, 1.15888122e-06f, -1.11627032e-05f, 6.87665306e-05f, -0.000233382467f,
	                              -0.000128267595f, 0.00713997707f, -0.0525978021f, -0.459159106f, -1.15111339f, -0.999999762f};
	static const float brief[] = {1.59018946e-05f, -0.000485318102f, 0.00636587525f, -0.0486862510f, -0.464639187f, -1.14853394f, -1.00019312f};
	const float far = dtype == OPD_f32 ? 9.5f : 8.0f;
	vec_f32 z[TOGETHER], tail[TOGETHER];
	EACH(i, n) z[i] = (vec_f32)((vec_u32)x[i] & 0x7fffffff);
#if !defined(VEC_AVX512)
	EACH(i, n) z[i] = vec_min(vec_splat(far), z[i]);
#endif
	if (dtype == OPD_f32)
		activation_polynomial(exact, sizeof exact / sizeof exact[0], z, tail, n);
	else
		activation_polynomial(brief, sizeof brief / sizeof brief[0], z, tail, n);
	activation_exp2(dtype, tail, n);
	EACH(i, n) x[i] = gelu_whole(x[i], tail[i], far);
}

/* (1 + tanh u)/2 is the sigmoid of 2u. */
VEC_INLINE void gelu_tanh_of(opd_dtype dtype, vec_f32 *x, size_t n)
{
	vec_f32 e[TOGETHER];
	if (dtype == OPD_f32) {
		EACH(i, n) e[i] = vec_exp(vec_splat(-1.59576912f) * vec_fma(vec_splat(0.044715f) * x[i], x[i] * x[i], x[i]));
	} else {
		EACH(i, n) e[i] = x[i] * vec_fma(x[i] * x[i], vec_splat(-1.59576912f * 0.044715f * LOG2_E), vec_splat(-1.59576912f * LOG2_E));
		activation_power_16(dtype, e, n);
	}
	EACH(i, n) x[i] = activation_quotient(dtype, x[i], vec_splat(1.0f) + e[i]);
}

#define ACTIVATION_MAP(X) X(sigmoid) X(silu) X(relu) X(relu2) X(gelu) X(gelu_tanh)

/* The loop of one function and dtype, both constants of the caller: y = f(x), or f(x)·other. */
typedef void (*activation_fn)(opd_dtype dtype, vec_f32 *x, size_t n);

VEC_INLINE void activation_whole(activation_fn function, opd_dtype dtype, const void *x, const void *other, bool times, void *y, size_t at, size_t n)
{
	vec_f32 v[TOGETHER];
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
		vec_store_pair(dtype, y, at + p * VEC_LANES, pair);
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

VEC_INLINE void activation_row(activation_fn function, opd_dtype dtype, const void *x, const void *other, bool times, void *y, size_t count)
{
	size_t i = 0;
	for (; i + TOGETHER * VEC_LANES <= count; i += TOGETHER * VEC_LANES)
		activation_whole(function, dtype, x, other, times, y, i, TOGETHER);
	for (size_t here; i < count; i += here) {
		here = count - i < VEC_LANES ? count - i : VEC_LANES;
		activation_part(function, dtype, x, other, times, y, i, here);
	}
}

#define ROW(function, name)                                                                                                    \
	static void function##_##name(const void *x, const void *other, void *y, size_t count)                                     \
	{                                                                                                                          \
		activation_row(function##_of, OPD_##name, x, other, false, y, count);                                                  \
	}                                                                                                                          \
	static void function##_mul_##name(const void *x, const void *other, void *y, size_t count)                                 \
	{                                                                                                                          \
		activation_row(function##_of, OPD_##name, x, other, true, y, count);                                                   \
	}
#define X(function) ROW(function, f32) ROW(function, bf16) ROW(function, f16)
ACTIVATION_MAP(X)
#undef X

#define ROWS(function) {function##_f32, function##_bf16, function##_f16}

const struct cpu_activation_kernels CPU_SYMBOL(cpu_activation) = {
	.alone = {ROWS(sigmoid), ROWS(silu), ROWS(relu), ROWS(relu2), ROWS(gelu), ROWS(gelu_tanh)},
	.times = {ROWS(sigmoid_mul), ROWS(silu_mul), ROWS(relu_mul), ROWS(relu2_mul), ROWS(gelu_mul), ROWS(gelu_tanh_mul)},
};
