/* add, sub, mul over two runs of elements, either of which may be one element repeated: compiled once for each instruction set (kernels.h).
 *
 * Narrow floats compute in f32 and round once, f64 in f64, integers modulo their width: signed and unsigned ones have the same bits. */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_f8.h"

#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))

/* Of two NaNs the compiler's order of operands would decide which one shows. */
VEC_INLINE vec_f32 arithmetic_of(opd_dtype dtype, unsigned op, vec_f32 a, vec_f32 b)
{
	return vec_result(dtype, op == CPU_ADD ? a + b : op == CPU_SUB ? a - b : a * b);
}

static inline double arithmetic_one_nan(double value)
{
	return value != value ? __builtin_nan("") : value;
}

#define AS_IT_IS(value) (value)

/* One element for all lanes. */
VEC_INLINE vec_f32 arithmetic_splat(opd_dtype dtype, const void *memory)
{
	return vec_splat(vec_load_some(dtype, memory, 0, 1)[0]);
}

/* Pairs that are loaded before the first of them is stored: past the caches two are faster than one by a seventh, and no slower elsewhere. */
#define PAIRS 2

/* a_step, b_step, streams: constants of the caller. Returns how many elements are done: of f8 none, which don't come in pairs. */
VEC_INLINE size_t arithmetic_pairs(unsigned op, opd_dtype dtype, const void *a, size_t a_step, const void *b, size_t b_step, void *y, size_t count, bool streams, bool ahead)
{
	const size_t step = PAIRS * 2 * VEC_LANES, bytes = opd_dtype_bytes(dtype);
	vec_f32 one_a = a_step == 0 ? arithmetic_splat(dtype, a) : vec_splat(0.0f);
	vec_f32 one_b = b_step == 0 ? arithmetic_splat(dtype, b) : vec_splat(0.0f);
	size_t i = 0;
	for (; !opd_dtype_is_f8(dtype) && i + step <= count; i += step) {
		struct vec_pair v[PAIRS], w[PAIRS];
		if (ahead && a_step != 0)
			vec_ask_ahead((const unsigned char *)a + i * bytes, step * bytes);
		if (ahead && b_step != 0)
			vec_ask_ahead((const unsigned char *)b + i * bytes, step * bytes);
		VEC_EACH(k, PAIRS) v[k] = a_step == 0 ? (struct vec_pair){{one_a, one_a}} : vec_load_pair(dtype, a, i + k * 2 * VEC_LANES);
		VEC_EACH(k, PAIRS) w[k] = b_step == 0 ? (struct vec_pair){{one_b, one_b}} : vec_load_pair(dtype, b, i + k * 2 * VEC_LANES);
		VEC_EACH(k, PAIRS)
		{
			VEC_EACH(p, 2) v[k].v[p] = arithmetic_of(dtype, op, v[k].v[p], w[k].v[p]);
			vec_put_pair(dtype, y, i + k * 2 * VEC_LANES, streams, v[k]);
		}
	}
	return i;
}

/* a_step, b_step: constants of the caller. */
VEC_INLINE void arithmetic_run(unsigned op, opd_dtype dtype, const void *a, size_t a_step, const void *b, size_t b_step, void *y, size_t count, enum cpu_reach reach)
{
	vec_f32 one_a = a_step == 0 ? arithmetic_splat(dtype, a) : vec_splat(0.0f);
	vec_f32 one_b = b_step == 0 ? arithmetic_splat(dtype, b) : vec_splat(0.0f);
	size_t i = reach != CPU_NEAR && vec_is_aligned(y) ? arithmetic_pairs(op, dtype, a, a_step, b, b_step, y, count, true, reach == CPU_PAST_AHEAD)
	                                                  : arithmetic_pairs(op, dtype, a, a_step, b, b_step, y, count, false, false);
	for (; i + VEC_LANES <= count; i += VEC_LANES) {
		vec_f32 v = a_step == 0 ? one_a : vec_load_some(dtype, a, i, VEC_LANES);
		vec_f32 w = b_step == 0 ? one_b : vec_load_some(dtype, b, i, VEC_LANES);
		vec_store_some(dtype, y, i, VEC_LANES, arithmetic_of(dtype, op, v, w));
	}
	if (i < count) {
		vec_f32 v = a_step == 0 ? one_a : vec_load_some(dtype, a, i, count - i);
		vec_f32 w = b_step == 0 ? one_b : vec_load_some(dtype, b, i, count - i);
		vec_store_some(dtype, y, i, count - i, arithmetic_of(dtype, op, v, w));
	}
}

#define FLOATS(op, OP, name)                                                                                                   \
	static void op##_##name(const void *a, size_t a_step, const void *b, size_t b_step, void *y, size_t count, enum cpu_reach reach) \
	{                                                                                                                          \
		if (a_step == 0)                                                                                                       \
			arithmetic_run(CPU_##OP, OPD_##name, a, 0, b, b_step == 0 ? 0 : 1, y, count, reach);                                 \
		else if (b_step == 0)                                                                                                  \
			arithmetic_run(CPU_##OP, OPD_##name, a, 1, b, 0, y, count, reach);                                                   \
		else                                                                                                                   \
			arithmetic_run(CPU_##OP, OPD_##name, a, 1, b, 1, y, count, reach);                                                   \
	}

/* Plain loops, which the compiler makes vectors of. Computed in `wide`, where C's promotions can't overflow. */
#define NUMBERS(op, OP, name, type, wide, finish)                                                                                     \
	static void op##_##name(const void *from_a, size_t a_step, const void *from_b, size_t b_step, void *to, size_t count, enum cpu_reach reach) \
	{                                                                                                                          \
		(void)reach;                                                                                                             \
		const type *restrict a = from_a;                                                                                       \
		const type *restrict b = from_b;                                                                                       \
		type *restrict y = to;                                                                                                 \
		if (a_step == 0 && b_step != 0)                                                                                        \
			for (size_t i = 0; i < count; i++)                                                                                 \
				y[i] = (type)finish(OP((wide)a[0], (wide)b[i]));                                                                       \
		else if (a_step == 0 || b_step == 0)                                                                                   \
			for (size_t i = 0; i < count; i++)                                                                                 \
				y[i] = (type)finish(OP((wide)a[i * a_step], (wide)b[0]));                                                              \
		else                                                                                                                   \
			for (size_t i = 0; i < count; i++)                                                                                 \
				y[i] = (type)finish(OP((wide)a[i], (wide)b[i]));                                                                       \
	}

#define OPERATION(op, OP)                       \
	FLOATS(op, OP, f32)                         \
	FLOATS(op, OP, bf16)                        \
	FLOATS(op, OP, f16)                         \
	FLOATS(op, OP, f8_e4m3fn)                   \
	FLOATS(op, OP, f8_e5m2)                     \
	NUMBERS(op, OP, f64, double, double, arithmetic_one_nan) \
	NUMBERS(op, OP, 8, uint8_t, uint32_t, AS_IT_IS)       \
	NUMBERS(op, OP, 16, uint16_t, uint32_t, AS_IT_IS)     \
	NUMBERS(op, OP, 32, uint32_t, uint32_t, AS_IT_IS)     \
	NUMBERS(op, OP, 64, uint64_t, uint64_t, AS_IT_IS)
OPERATION(add, ADD)
OPERATION(sub, SUB)
OPERATION(mul, MUL)

/* By dtype's number. */
#define DTYPES(op)                                                                                                       \
	{                                                                                                                    \
		[OPD_u8] = op##_8, [OPD_i8] = op##_8, [OPD_i16] = op##_16, [OPD_i32] = op##_32, [OPD_i64] = op##_64,             \
		[OPD_f16] = op##_f16, [OPD_bf16] = op##_bf16, [OPD_f32] = op##_f32, [OPD_f64] = op##_f64,                        \
		[OPD_f8_e4m3fn] = op##_f8_e4m3fn, [OPD_f8_e5m2] = op##_f8_e5m2,                                                  \
	}

const struct cpu_arithmetic_kernels CPU_SYMBOL(cpu_arithmetic) = {
	.run = {DTYPES(add), DTYPES(sub), DTYPES(mul)},
};
