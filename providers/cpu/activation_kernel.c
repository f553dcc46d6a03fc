/* The activations, alone or times another row: compiled once for each instruction set (kernels.h). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

VEC_INLINE vec_f32 sigmoid_of(vec_f32 x)
{
	return vec_splat(1.0f) / (vec_splat(1.0f) + vec_exp(-x));
}

VEC_INLINE vec_f32 silu_of(vec_f32 x)
{
	return x / (vec_splat(1.0f) + vec_exp(-x));
}

/* The second operand where either is NaN, so NaN stays. */
VEC_INLINE vec_f32 relu_of(vec_f32 x)
{
	return vec_max(vec_splat(0.0f), x);
}

VEC_INLINE vec_f32 relu2_of(vec_f32 x)
{
	return relu_of(x) * relu_of(x);
}

/* x·Φ(x), with erfc(z) = t·p(t)·e^(−z²), t = 1/(1 + 0.4 z): p interpolates at Chebyshev's nodes for z to 10, relative error 1.6e-07 in f32. Below
 * 0 the product with the tail itself keeps its digits: so e^(−x²/2) must have them too. The square of x's first 12 bits is exact, the rest r is small.
 * Beyond 20 the tail is 0. */
VEC_INLINE vec_f32 gelu_of(vec_f32 x)
{
	vec_f32 magnitude = vec_min(vec_splat(20.0f), (vec_f32)((vec_u32)x & 0x7fffffff));
	vec_f32 high = (vec_f32)((vec_u32)magnitude & 0xfffff000u);
	vec_f32 r = vec_splat(0.5f) * (magnitude - high) * (magnitude + high);
	vec_f32 near = vec_fma(vec_fma(vec_splat(-0.16666667f), r, vec_splat(0.5f)), r, vec_splat(-1.0f)) * r + vec_splat(1.0f);
	vec_f32 t = vec_splat(1.0f) / vec_fma(magnitude, vec_splat(0.2828427255153656f), vec_splat(1.0f));
	vec_f32 p = vec_splat(-0.015730947256088257f);
	p = vec_fma(p, t, vec_splat(0.061826396733522415f));
	p = vec_fma(p, t, vec_splat(-0.03484600409865379f));
	p = vec_fma(p, t, vec_splat(-0.15711070597171783f));
	p = vec_fma(p, t, vec_splat(0.22812911868095398f));
	p = vec_fma(p, t, vec_splat(-0.0861860141158104f));
	p = vec_fma(p, t, vec_splat(0.18946927785873413f));
	p = vec_fma(p, t, vec_splat(0.15247152745723724f));
	p = vec_fma(p, t, vec_splat(0.21093852818012238f));
	p = vec_fma(p, t, vec_splat(0.2253490686416626f));
	p = vec_fma(p, t, vec_splat(0.22568973898887634f));
	vec_f32 tail = vec_splat(0.5f) * p * t * near * vec_exp(vec_splat(-0.5f) * high * high);
	vec_u32 negative = (vec_u32)(x < vec_splat(0.0f));
	return x * (vec_f32)vec_select(negative, (vec_u32)tail, (vec_u32)(vec_splat(1.0f) - tail));
}

/* (1 + tanh u)/2 is the sigmoid of 2u. */
VEC_INLINE vec_f32 gelu_tanh_of(vec_f32 x)
{
	vec_f32 u = vec_splat(1.59576912f) * vec_fma(vec_splat(0.044715f) * x, x * x, x);
	return x / (vec_splat(1.0f) + vec_exp(-u));
}

#define ACTIVATION_MAP(X) X(sigmoid) X(silu) X(relu) X(relu2) X(gelu) X(gelu_tanh)

/* The loop of one function and dtype: y = f(x), or f(x)·other. */
#define ROW(function, name)                                                                                                    \
	static void function##_##name(const void *x, const void *other, void *y, size_t count)                                     \
	{                                                                                                                          \
		(void)other;                                                                                                           \
		size_t i = 0;                                                                                                          \
		for (; i + VEC_LANES <= count; i += VEC_LANES)                                                                         \
			vec_store(OPD_##name, y, i, function##_of(vec_load(OPD_##name, x, i)));                                            \
		if (i < count)                                                                                                         \
			vec_store_part(OPD_##name, y, i, count - i, function##_of(vec_load_part(OPD_##name, x, i, count - i, 0.0f)));      \
	}                                                                                                                          \
	static void function##_mul_##name(const void *x, const void *other, void *y, size_t count)                                 \
	{                                                                                                                          \
		size_t i = 0;                                                                                                          \
		for (; i + VEC_LANES <= count; i += VEC_LANES)                                                                         \
			vec_store(OPD_##name, y, i, function##_of(vec_load(OPD_##name, x, i)) * vec_load(OPD_##name, other, i));           \
		if (i < count) {                                                                                                       \
			vec_f32 tail = function##_of(vec_load_part(OPD_##name, x, i, count - i, 0.0f));                                    \
			vec_store_part(OPD_##name, y, i, count - i, tail * vec_load_part(OPD_##name, other, i, count - i, 0.0f));          \
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
