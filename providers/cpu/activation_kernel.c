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

/* x·Φ(x), with Φ(−z) = t·p(t)·e^(−z²/2), t = 1/(1 + 0.318 z): p has the least largest error of Φ for z to 6, 5e-10 (Lawson's iteration). Below 0 the product with the
 * tail itself keeps its digits as far as that. Beyond 20 the tail is 0. */
VEC_INLINE vec_f32 gelu_of(vec_f32 x)
{
	vec_f32 magnitude = vec_min(vec_splat(20.0f), (vec_f32)((vec_u32)x & 0x7fffffff));
	vec_f32 t = vec_reciprocal(vec_fma(magnitude, vec_splat(0.3181980515339463f), vec_splat(1.0f)));
	vec_f32 p = vec_splat(0.046284922302732324f);
	p = vec_fma(p, t, vec_splat(-0.24705264557133189f));
	p = vec_fma(p, t, vec_splat(0.4285848362128906f));
	p = vec_fma(p, t, vec_splat(-0.18790237734098158f));
	p = vec_fma(p, t, vec_splat(0.23008587919295048f));
	p = vec_fma(p, t, vec_splat(0.10050451999767188f));
	p = vec_fma(p, t, vec_splat(0.12949486573029542f));
	vec_f32 tail = p * t * vec_exp(vec_splat(-0.5f) * magnitude * magnitude);
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
