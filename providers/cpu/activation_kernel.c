/* The activations, alone or times another row: compiled once for each instruction set (kernels.h). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* The functions of x take its dtype as a constant of the caller: results of 16 bits need fewer digits. */
VEC_INLINE vec_f32 activation_exp(opd_dtype dtype, vec_f32 x)
{
	return dtype == OPD_f32 ? vec_exp(x) : vec_exp_16(x);
}

VEC_INLINE vec_f32 activation_quotient(opd_dtype dtype, vec_f32 a, vec_f32 b)
{
	return dtype == OPD_f32 ? a / b : vec_quotient_16(a, b);
}

VEC_INLINE vec_f32 sigmoid_of(opd_dtype dtype, vec_f32 x)
{
	return activation_quotient(dtype, vec_splat(1.0f), vec_splat(1.0f) + activation_exp(dtype, -x));
}

VEC_INLINE vec_f32 silu_of(opd_dtype dtype, vec_f32 x)
{
	return activation_quotient(dtype, x, vec_splat(1.0f) + activation_exp(dtype, -x));
}

/* The second operand where either is NaN, so NaN stays. */
VEC_INLINE vec_f32 relu_of(opd_dtype dtype, vec_f32 x)
{
	(void)dtype;
	return vec_max(vec_splat(0.0f), x);
}

VEC_INLINE vec_f32 relu2_of(opd_dtype dtype, vec_f32 x)
{
	return relu_of(dtype, x) * relu_of(dtype, x);
}

/* e^(−z²/2), z at most GELU_FAR. What z² loses in f32 shows in e^(−z²/2): it is put right. */
VEC_INLINE vec_f32 gelu_bell(vec_f32 z)
{
#if defined(VEC_PORTABLE)
	vec_f32 high = (vec_f32)((vec_u32)z & 0xfffff000u); /* its square is exact */
	vec_f32 square = high * high, lost = (z - high) * (z + high);
	lost = lost * vec_splat(-0.5f); /* up to 0.1; else no more than an ulp of z² */
	lost = vec_fma(vec_fma(vec_splat(0.16666667f), lost, vec_splat(0.5f)) * lost, lost, lost);
#else
	vec_f32 square = z * z, lost = vec_fma(z, z, -square) * vec_splat(-0.5f);
#endif
	vec_f32 bell = vec_exp_near(vec_splat(-0.5f) * square);
	return vec_fma(bell, lost, bell);
}

/* Φ(−z) = t·p(t)·e^(−z²/2), t = 1/(1 + c·z). p has the least largest relative error for z to 14 (Lawson's iteration): 1.5e-07. Below 0 gelu is a product with that tail, and keeps its digits. */
VEC_INLINE vec_f32 gelu_tail(vec_f32 z)
{
	vec_f32 t = vec_reciprocal(vec_fma(z, vec_splat(0.3f), vec_splat(1.0f)));
	vec_f32 p = vec_splat(0.035573810338974f);
	p = vec_fma(p, t, vec_splat(-0.15678244829177856f));
	p = vec_fma(p, t, vec_splat(0.20562900602817535f));
	p = vec_fma(p, t, vec_splat(-0.05301734060049057f));
	p = vec_fma(p, t, vec_splat(0.12820957601070404f));
	p = vec_fma(p, t, vec_splat(0.10001997649669647f));
	p = vec_fma(p, t, vec_splat(0.12073694169521332f));
	p = vec_fma(p, t, vec_splat(0.11963040381669998f));
	return p * t * gelu_bell(z);
}

/* The same with a relative error of 3.5e-05 and that of vec_exp_16. */
VEC_INLINE vec_f32 gelu_tail_16(vec_f32 z)
{
	vec_f32 t = vec_reciprocal(vec_fma(z, vec_splat(0.38f), vec_splat(1.0f)));
	vec_f32 p = vec_splat(-0.08992727845907211f);
	p = vec_fma(p, t, vec_splat(0.18887414038181305f));
	p = vec_fma(p, t, vec_splat(0.09198148548603058f));
	p = vec_fma(p, t, vec_splat(0.1578289419412613f));
	p = vec_fma(p, t, vec_splat(0.15122519433498383f));
	return p * t * vec_exp_16_near(vec_splat(-0.5f) * z * z);
}

/* From here on the tail is 0: its product of Φ(−z)·√(2π)·e^(z²/2), 0.03, and e^(−z²/2), the least denormal, is. */
#define GELU_FAR 14.4f

/* x·Φ(x). */
VEC_INLINE vec_f32 gelu_of(opd_dtype dtype, vec_f32 x)
{
	vec_f32 magnitude = vec_min(vec_splat(GELU_FAR), (vec_f32)((vec_u32)x & 0x7fffffff));
	vec_f32 tail = dtype == OPD_f32 ? gelu_tail(magnitude) : gelu_tail_16(magnitude);
#if defined(VEC_AVX512) /* gcc 12 makes more of vec_select than this */
	__mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ);
	return x * (vec_f32)_mm512_mask_sub_ps(tail, positive, _mm512_set1_ps(1.0f), tail);
#else
	vec_u32 negative = (vec_u32)(x < vec_splat(0.0f));
	return x * (vec_f32)vec_select(negative, (vec_u32)tail, (vec_u32)(vec_splat(1.0f) - tail));
#endif
}

/* (1 + tanh u)/2 is the sigmoid of 2u. */
VEC_INLINE vec_f32 gelu_tanh_of(opd_dtype dtype, vec_f32 x)
{
	vec_f32 u = vec_splat(1.59576912f) * vec_fma(vec_splat(0.044715f) * x, x * x, x);
	return activation_quotient(dtype, x, vec_splat(1.0f) + activation_exp(dtype, -u));
}

#define ACTIVATION_MAP(X) X(sigmoid) X(silu) X(relu) X(relu2) X(gelu) X(gelu_tanh)

/* The loop of one function and dtype: y = f(x), or f(x)·other. */
#define ROW(function, name)                                                                                                    \
	static void function##_##name(const void *x, const void *other, void *y, size_t count)                                     \
	{                                                                                                                          \
		(void)other;                                                                                                           \
		size_t i = 0;                                                                                                          \
		for (; i + 2 * VEC_LANES <= count; i += 2 * VEC_LANES) {                                                               \
			struct vec_pair pair = vec_load_pair(OPD_##name, x, i);                                                            \
			for (size_t p = 0; p < 2; p++)                                                                                     \
				pair.v[p] = vec_result(OPD_##name, function##_of(OPD_##name, pair.v[p]));                                      \
			vec_store_pair(OPD_##name, y, i, pair);                                                                            \
		}                                                                                                                      \
		for (size_t here; i < count; i += here) {                                                                              \
			here = count - i < VEC_LANES ? count - i : VEC_LANES;                                                              \
			vec_f32 tail = function##_of(OPD_##name, vec_load_part(OPD_##name, x, i, here, 0.0f));                             \
			vec_store_part(OPD_##name, y, i, here, vec_result(OPD_##name, tail));                                              \
		}                                                                                                                      \
	}                                                                                                                          \
	static void function##_mul_##name(const void *x, const void *other, void *y, size_t count)                                 \
	{                                                                                                                          \
		size_t i = 0;                                                                                                          \
		for (; i + 2 * VEC_LANES <= count; i += 2 * VEC_LANES) {                                                               \
			struct vec_pair pair = vec_load_pair(OPD_##name, x, i), factor = vec_load_pair(OPD_##name, other, i);              \
			for (size_t p = 0; p < 2; p++)                                                                                     \
				pair.v[p] = vec_result(OPD_##name, function##_of(OPD_##name, pair.v[p]) * factor.v[p]);                        \
			vec_store_pair(OPD_##name, y, i, pair);                                                                            \
		}                                                                                                                      \
		for (size_t here; i < count; i += here) {                                                                              \
			here = count - i < VEC_LANES ? count - i : VEC_LANES;                                                              \
			vec_f32 tail = function##_of(OPD_##name, vec_load_part(OPD_##name, x, i, here, 0.0f));                             \
			tail = vec_result(OPD_##name, tail * vec_load_part(OPD_##name, other, i, here, 0.0f));                             \
			vec_store_part(OPD_##name, y, i, here, tail);                                                                      \
		}                                                                                                                      \
	}
#define X(function) ROW(function, f32) ROW(function, bf16) ROW(function, f16)
ACTIVATION_MAP(X)
#undef X

#define ROWS(function) {function##_f32, function##_bf16, function##_f16}

const struct cpu_activation_kernels CPU_SYMBOL(cpu_activation) = {
	.alone = {ROWS(sigmoid), ROWS(silu), ROWS(relu), ROWS(relu2), ROWS(gelu), ROWS(gelu_tanh)},
	.times = {ROWS(sigmoid_mul), ROWS(silu_mul), ROWS(relu_mul), ROWS(relu2_mul), ROWS(gelu_mul), ROWS(gelu_tanh_mul)},
};
