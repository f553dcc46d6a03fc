/* Quantisation to f8_e4m3fn: the largest magnitude of a run, and a run times a factor, clamped: compiled once for each instruction set
 * (kernels.h). Each step is one f32 operation, so results are exact. */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_f8.h"

#define CHAINS 4

/* NaN is passed over: vec_max gives its second operand then. */
VEC_INLINE vec_f32 quant_larger(vec_f32 v, vec_f32 largest)
{
	return vec_max((vec_f32)((vec_u32)v & 0x7fffffff), largest);
}

VEC_INLINE float quant_largest(opd_dtype dtype, const void *x, size_t count)
{
	vec_f32 chains[CHAINS] = {vec_splat(0.0f), vec_splat(0.0f), vec_splat(0.0f), vec_splat(0.0f)};
	size_t i = 0;
	for (; i + CHAINS * VEC_LANES <= count; i += CHAINS * VEC_LANES)
		for (size_t c = 0; c < CHAINS; c++)
			chains[c] = quant_larger(vec_load(dtype, x, i + c * VEC_LANES), chains[c]);
	for (; i < count; i += VEC_LANES)
		chains[0] = quant_larger(vec_load_some(dtype, x, i, count - i < VEC_LANES ? count - i : VEC_LANES), chains[0]);
	return vec_highest(vec_max(vec_max(chains[0], chains[1]), vec_max(chains[2], chains[3])));
}

/* The store saturates at 448: no clamp is needed before it. */
VEC_INLINE void quant_scale(opd_dtype dtype, const void *x, void *y, size_t count, float factor)
{
	vec_f32 by = vec_splat(factor);
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		vec_store_some(OPD_f8_e4m3fn, y, i, VEC_LANES, vec_load(dtype, x, i) * by);
	if (i < count)
		vec_store_some(OPD_f8_e4m3fn, y, i, count - i, vec_load_some(dtype, x, i, count - i) * by);
}

#define X(name)                                                                         \
	static float largest_##name(const void *x, size_t count)                            \
	{                                                                                   \
		return quant_largest(OPD_##name, x, count);                                     \
	}                                                                                   \
	static void scale_##name(const void *x, void *y, size_t count, float factor)        \
	{                                                                                   \
		quant_scale(OPD_##name, x, y, count, factor);                                   \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_quant_kernels CPU_SYMBOL(cpu_quant) = {
	.largest = {largest_f32, largest_bf16, largest_f16},
	.scale = {scale_f32, scale_bf16, scale_f16},
};
