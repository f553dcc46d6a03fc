/* rotary_embedding, the heads of one token, and argmax, one row: compiled once for each instruction set (kernels.h). */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* ---- rotary_embedding --------------------------------------------------------------------------------------------------- */

VEC_INLINE vec_f32 rotary_load(opd_dtype dtype, const void *memory, size_t at, size_t count)
{
	return count == VEC_LANES ? vec_load(dtype, memory, at) : vec_load_part(dtype, memory, at, count, 0.0f);
}

VEC_INLINE void rotary_store(opd_dtype dtype, void *memory, size_t at, size_t count, vec_f32 v)
{
	if (count == VEC_LANES)
		vec_store(dtype, memory, at, v);
	else
		vec_store_part(dtype, memory, at, count, v);
}

/* Where an f32 product overflowed although the difference doesn't: a double holds both products exactly. */
static __attribute__((noinline)) vec_f32 rotary_wide(vec_f32 turned, vec_f32 a, vec_f32 cosine, vec_f32 b, vec_f32 sine)
{
	for (size_t i = 0; i < VEC_LANES; i++)
		if (turned[i] - turned[i] != 0.0f)
			turned[i] = (float)((double)a[i] * (double)cosine[i] + (double)b[i] * (double)sine[i]);
	return turned;
}

/* a·cosine + b·sine, with what rounding took from the second product added at the end: where the two nearly cancel it is as large as the result. (W. Kahan's sum of
 * two products; without FMA the last term is 0.) */
VEC_INLINE vec_f32 rotary_turn(vec_f32 a, vec_f32 cosine, vec_f32 b, vec_f32 sine)
{
	vec_f32 product = b * sine;
	vec_f32 turned = vec_fma(a, cosine, product) + vec_fma(b, sine, -product);
	return vec_sum(turned * vec_splat(0.0f)) == 0.0f ? turned : rotary_wide(turned, a, cosine, b, sine);
}

/* Pairs i with i + half: both are read before either is written, so `to` may be `from`. */
VEC_INLINE void rotary_halves(opd_dtype dtype, opd_dtype cache_dtype, const void *from, const void *cos_sin, void *to, size_t head,
                              size_t half)
{
	for (size_t i = 0; i < half; i += VEC_LANES) {
		size_t count = half - i < VEC_LANES ? half - i : VEC_LANES;
		vec_f32 cosine = rotary_load(cache_dtype, cos_sin, i, count);
		vec_f32 sine = rotary_load(cache_dtype, cos_sin, half + i, count);
		vec_f32 a = rotary_load(dtype, from, head + i, count);
		vec_f32 b = rotary_load(dtype, from, head + half + i, count);
		rotary_store(dtype, to, head + i, count, rotary_turn(a, cosine, b, -sine));
		rotary_store(dtype, to, head + half + i, count, rotary_turn(b, cosine, a, sine));
	}
}

/* Elements [at, at + count) to or from f32; count at most 2·VEC_LANES. */
VEC_INLINE void rotary_unpack(opd_dtype dtype, const void *memory, size_t at, size_t count, float *to)
{
	for (size_t i = 0; i < count; i += VEC_LANES)
		vec_store(OPD_f32, to, i, rotary_load(dtype, memory, at + i, count - i < VEC_LANES ? count - i : VEC_LANES));
}

/* Pairs 2i with 2i + 1, through f32 on the stack: the compiler finds the shuffles. In double, as rotary_wide. */
VEC_INLINE void rotary_neighbours(opd_dtype dtype, opd_dtype cache_dtype, const void *from, const void *cos_sin, void *to, size_t head,
                                  size_t half)
{
	float x[2 * VEC_LANES], y[2 * VEC_LANES], cosine[VEC_LANES], sine[VEC_LANES];
	for (size_t i = 0; i < half; i += VEC_LANES) {
		size_t count = half - i < VEC_LANES ? half - i : VEC_LANES;
		rotary_unpack(cache_dtype, cos_sin, i, count, cosine);
		rotary_unpack(cache_dtype, cos_sin, half + i, count, sine);
		memset(x, 0, sizeof x);
		rotary_unpack(dtype, from, head + 2 * i, 2 * count, x);
		for (size_t k = 0; k < VEC_LANES; k++) {
			double a = x[2 * k], b = x[2 * k + 1];
			y[2 * k] = (float)(a * (double)cosine[k] - b * (double)sine[k]);
			y[2 * k + 1] = (float)(b * (double)cosine[k] + a * (double)sine[k]);
		}
		for (size_t k = 0; k < 2 * count; k += VEC_LANES)
			rotary_store(dtype, to, head + 2 * i + k, 2 * count - k < VEC_LANES ? 2 * count - k : VEC_LANES, vec_load(OPD_f32, y, k));
	}
}

VEC_INLINE void rotary_token(opd_dtype dtype, opd_dtype cache_dtype, bool neox, const void *from, const void *cos_sin, void *to,
                             const struct cpu_rotary *shape)
{
	const size_t bytes = opd_dtype_bytes(dtype);
	const size_t rest = shape->head_size - 2 * shape->half;
	for (size_t head = 0; head < shape->elements; head += shape->head_size) {
		if (neox)
			rotary_halves(dtype, cache_dtype, from, cos_sin, to, head, shape->half);
		else
			rotary_neighbours(dtype, cache_dtype, from, cos_sin, to, head, shape->half);
		if (rest > 0 && from != to)
			memcpy((unsigned char *)to + (head + 2 * shape->half) * bytes,
			       (const unsigned char *)from + (head + 2 * shape->half) * bytes, rest * bytes);
	}
}

/* X(name, dtype, dtype of cos_sin) */
#define ROTARY_MAP(X)              \
	X(f32, OPD_f32, OPD_f32)       \
	X(bf16, OPD_bf16, OPD_bf16)    \
	X(bf16_f32, OPD_bf16, OPD_f32) \
	X(f16, OPD_f16, OPD_f16)       \
	X(f16_f32, OPD_f16, OPD_f32)

#define X(name, dtype, cache_dtype)                                                                                            \
	static void rotary_neox_##name(const void *from, const void *cos_sin, void *to, const struct cpu_rotary *shape)            \
	{                                                                                                                          \
		rotary_token(dtype, cache_dtype, true, from, cos_sin, to, shape);                                                      \
	}                                                                                                                          \
	static void rotary_pairs_##name(const void *from, const void *cos_sin, void *to, const struct cpu_rotary *shape)           \
	{                                                                                                                          \
		rotary_token(dtype, cache_dtype, false, from, cos_sin, to, shape);                                                     \
	}
ROTARY_MAP(X)
#undef X

/* ---- argmax ------------------------------------------------------------------------------------------------------------- */

VEC_INLINE size_t argmax_nan(opd_dtype dtype, const void *x, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		float value = vec_load_part(dtype, x, i, 1, 0.0f)[0];
		if (value != value)
			return i;
	}
	return 0;
}

/* Each lane keeps the first of its greatest; the lanes' first of equals is the row's. */
VEC_INLINE size_t argmax_row(opd_dtype dtype, const void *x, size_t count)
{
	vec_f32 best = rotary_load(dtype, x, 0, count < VEC_LANES ? count : VEC_LANES);
	vec_u32 at, lane, nan = (vec_u32)(best != best);
	for (uint32_t i = 0; i < VEC_LANES; i++) {
		lane[i] = i;
		if (i >= count)
			best[i] = -INFINITY;
	}
	at = lane;
	for (size_t i = VEC_LANES; i < count; i += VEC_LANES) {
		vec_f32 v = count - i < VEC_LANES ? vec_load_part(dtype, x, i, count - i, -INFINITY) : vec_load(dtype, x, i);
		vec_u32 above = (vec_u32)(v > best);
		nan |= (vec_u32)(v != v);
		best = (vec_f32)vec_select(above, (vec_u32)v, (vec_u32)best);
		at = vec_select(above, lane + vec_splat_u32((uint32_t)i), at);
	}
	uint32_t first = 0, any = nan[0];
	for (uint32_t i = 1; i < VEC_LANES; i++) {
		any |= nan[i];
		if (best[i] > best[first] || (best[i] == best[first] && at[i] < at[first]))
			first = i;
	}
	return any != 0 ? argmax_nan(dtype, x, count) : at[first];
}

#define X(name)                                                  \
	static size_t argmax_##name(const void *x, size_t count)     \
	{                                                            \
		return argmax_row(OPD_##name, x, count);                 \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_position_kernels CPU_SYMBOL(cpu_position) = {
	.rotary = {{{rotary_pairs_f32, rotary_neox_f32}, {rotary_pairs_f32, rotary_neox_f32}},
               {{rotary_pairs_bf16, rotary_neox_bf16}, {rotary_pairs_bf16_f32, rotary_neox_bf16_f32}},
               {{rotary_pairs_f16, rotary_neox_f16}, {rotary_pairs_f16_f32, rotary_neox_f16_f32}}},
	.argmax = {argmax_f32, argmax_bf16, argmax_f16},
};
