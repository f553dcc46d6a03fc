/* silu_and_mul, one row: compiled once for each instruction set (kernels.h). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

VEC_INLINE vec_f32 silu_times(vec_f32 gate, vec_f32 up)
{
	return gate / (vec_splat(1.0f) + vec_exp(-gate)) * up;
}

VEC_INLINE void silu_and_mul_row(opd_dtype dtype, const void *gate, const void *up, void *y, size_t count)
{
	size_t i = 0;
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		vec_store(dtype, y, i, silu_times(vec_load(dtype, gate, i), vec_load(dtype, up, i)));
	if (i < count) {
		vec_f32 tail = vec_load_part(dtype, gate, i, count - i, 0.0f);
		vec_store_part(dtype, y, i, count - i, silu_times(tail, vec_load_part(dtype, up, i, count - i, 0.0f)));
	}
}

static void silu_and_mul_f32(const void *gate, const void *up, void *y, size_t count)
{
	silu_and_mul_row(OPD_f32, gate, up, y, count);
}

static void silu_and_mul_bf16(const void *gate, const void *up, void *y, size_t count)
{
	silu_and_mul_row(OPD_bf16, gate, up, y, count);
}

static void silu_and_mul_f16(const void *gate, const void *up, void *y, size_t count)
{
	silu_and_mul_row(OPD_f16, gate, up, y, count);
}

const struct cpu_activation_kernels CPU_SYMBOL(cpu_activation) = {
	.silu_and_mul = {silu_and_mul_f32, silu_and_mul_bf16, silu_and_mul_f16},
};
