/* cast between any two dtypes: compiled once for each instruction set (kernels.h).
 *
 * The five narrow floats go from one to another in one pass of vectors: all are exact in f32, so the store's rounding is the only one. Every other
 * pair goes through a chunk of f32 (narrow floats and integers of up to 16 bits, exactly), f64, or i64. Those are plain loops, which the
 * compiler makes vectors of.
 *
 * From f64, i32 and i64 to a narrow float two roundings would show. What goes on the way is rounded to odd instead: the neighbour with an odd last bit
 * wherever anything was lost. That is no tie of any format with at least two bits less, so the second rounding gives what one would. */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_f8.h"

/* ---- Narrow floats ------------------------------------------------------------------------------------------------------ */

/* Vectors that are loaded before the first of them is stored. */
#define VECTORS 4

/* streams: a constant of the caller. Returns how many elements are done. */
VEC_INLINE size_t cast_several(opd_dtype from, opd_dtype to, const void *x, void *y, size_t count, bool streams, bool ahead)
{
	const size_t step = VECTORS * VEC_LANES;
	size_t i = 0;
	for (; i + step <= count; i += step) {
		vec_f32 v[VECTORS];
		if (ahead)
			vec_ask_ahead((const unsigned char *)x + i * opd_dtype_bytes(from), step * opd_dtype_bytes(from));
		VEC_EACH(k, VECTORS) v[k] = vec_load_some(from, x, i + k * VEC_LANES, VEC_LANES);
		VEC_EACH(k, VECTORS)
		{
			if (streams && !opd_dtype_is_f8(to))
				vec_stream(to, y, i + k * VEC_LANES, v[k]);
			else
				vec_store_some(to, y, i + k * VEC_LANES, VEC_LANES, v[k]);
		}
	}
	return i;
}

VEC_INLINE void cast_vectors(opd_dtype from, opd_dtype to, const void *x, void *y, size_t count, enum cpu_reach reach)
{
	size_t i = reach != CPU_NEAR && vec_is_aligned(y) ? cast_several(from, to, x, y, count, true, reach == CPU_PAST_AHEAD) : cast_several(from, to, x, y, count, false, false);
	for (; i + VEC_LANES <= count; i += VEC_LANES)
		vec_store_some(to, y, i, VEC_LANES, vec_load_some(from, x, i, VEC_LANES));
	if (i < count)
		vec_store_some(to, y, i, count - i, vec_load_some(from, x, i, count - i));
}

#define NARROW_MAP(X) X(f32) X(bf16) X(f16) X(f8_e4m3fn) X(f8_e5m2)

#define PAIR(from, to)                                                  \
	static void from##_to_##to(const void *x, void *y, size_t count, enum cpu_reach reach) \
	{                                                                                      \
		cast_vectors(OPD_##from, OPD_##to, x, y, count, reach);                              \
	}
#define PAIRS(from) PAIR(from, f32) PAIR(from, bf16) PAIR(from, f16) PAIR(from, f8_e4m3fn) PAIR(from, f8_e5m2)
NARROW_MAP(PAIRS)

/* ---- Chunks of f32, f64, i64 ------------------------------------------------------------------------------------------------ */

#define LOOP(name, source, target, expression)                               \
	static void name(const void *from, void *to, size_t count, enum cpu_reach reach) \
	{                                                                        \
		(void)reach;                                                           \
		const source *restrict x = from;                                     \
		target *restrict y = to;                                             \
		for (size_t i = 0; i < count; i++) {                                 \
			source value = x[i];                                             \
			y[i] = (target)(expression);                                     \
		}                                                                    \
	}

/* Integers in. A bool is 0 or 1 whatever its byte. */
LOOP(bool_to_f32, uint8_t, float, value != 0)
LOOP(u8_to_f32, uint8_t, float, value)
LOOP(i8_to_f32, int8_t, float, value)
LOOP(i16_to_f32, int16_t, float, value)
LOOP(bool_to_i64, uint8_t, int64_t, value != 0)
LOOP(u8_to_i64, uint8_t, int64_t, value)
LOOP(i8_to_i64, int8_t, int64_t, value)
LOOP(i16_to_i64, int16_t, int64_t, value)
LOOP(i32_to_i64, int32_t, int64_t, value)
LOOP(i64_to_i64, int64_t, int64_t, value)

/* Integers out of i64: they wrap. Two's complement is what C's unsigned conversion keeps. */
LOOP(i64_to_bool, int64_t, uint8_t, value != 0)
LOOP(i64_to_8, int64_t, uint8_t, (uint64_t)value)
LOOP(i64_to_16, int64_t, uint16_t, (uint64_t)value)
LOOP(i64_to_32, int64_t, uint32_t, (uint64_t)value)
LOOP(i64_to_f32, int64_t, float, value)
LOOP(i64_to_f64, int64_t, double, value)

/* Exact below 2^53; beyond, the low twelve bits become one that says whether they were 0: far under the last bit of any narrow float. */
static inline int64_t odd_i64(int64_t value)
{
	int64_t odd = (int64_t)((uint64_t)value & ~(uint64_t)0xfff) | ((value & 0xfff) != 0 ? 0x800 : 0);
	return value >= -((int64_t)1 << 53) && value <= (int64_t)1 << 53 ? value : odd;
}

/* The nearest f32; where that isn't exact, the one of both neighbours whose last bit is odd. */
static inline float odd_f32(double value)
{
	float near = (float)value;
	uint32_t bits;
	memcpy(&bits, &near, sizeof bits);
	uint32_t away = __builtin_fabs((double)near) > __builtin_fabs(value);
	uint32_t inexact = (double)near != value && value == value;
	bits = (bits - away) | inexact;
	memcpy(&near, &bits, sizeof near);
	return near;
}

LOOP(i64_to_odd, int64_t, float, odd_f32((double)odd_i64(value)))
LOOP(f64_to_odd, double, float, odd_f32(value))
LOOP(f64_to_f32, double, float, value)
LOOP(f32_to_f64, float, double, value)
LOOP(f64_to_f64, double, double, value)

/* Floats to integers truncate and saturate, NaN is 0. `past` is the first value above the range; the range's ends are exact in f32. */
#define TRUNCATED(value, low, past, low_integer, high_integer, integer) \
	((value) != (value) ? 0 : (value) <= (low) ? (low_integer) : (value) >= (past) ? (high_integer) : (integer)(value))

#define TO_INTEGERS(name, source)                                                                                         \
	LOOP(name##_to_bool, source, uint8_t, !(value == 0))                                                                  \
	LOOP(name##_to_u8, source, uint8_t, TRUNCATED(value, 0, 256, 0, 255, int32_t))                                        \
	LOOP(name##_to_i8, source, int8_t, TRUNCATED(value, -128, 128, -128, 127, int32_t))                                   \
	LOOP(name##_to_i16, source, int16_t, TRUNCATED(value, -32768, 32768, -32768, 32767, int32_t))                         \
	LOOP(name##_to_i32, source, int32_t, TRUNCATED(value, -0x1p31f, 0x1p31f, INT32_MIN, INT32_MAX, int32_t))              \
	LOOP(name##_to_i64, source, int64_t, TRUNCATED(value, -0x1p63f, 0x1p63f, INT64_MIN, INT64_MAX, int64_t))
TO_INTEGERS(f32, float)
TO_INTEGERS(f64, double)

/* ---- The table ------------------------------------------------------------------------------------------------------------ */

#define TO_NARROW(from)                                                                                                    \
	{                                                                                                                      \
		[OPD_f32] = from##_to_f32, [OPD_bf16] = from##_to_bf16, [OPD_f16] = from##_to_f16,                                 \
		[OPD_f8_e4m3fn] = from##_to_f8_e4m3fn, [OPD_f8_e5m2] = from##_to_f8_e5m2,                                          \
	}

const struct cpu_cast_kernels CPU_SYMBOL(cpu_cast) = {
	.narrow =
		{
			[OPD_f32] = TO_NARROW(f32),
			[OPD_bf16] = TO_NARROW(bf16),
			[OPD_f16] = TO_NARROW(f16),
			[OPD_f8_e4m3fn] = TO_NARROW(f8_e4m3fn),
			[OPD_f8_e5m2] = TO_NARROW(f8_e5m2),
		},
	.small_to_f32 = {[OPD_bool] = bool_to_f32, [OPD_u8] = u8_to_f32, [OPD_i8] = i8_to_f32, [OPD_i16] = i16_to_f32},
	.to_i64 = {[OPD_bool] = bool_to_i64,
               [OPD_u8] = u8_to_i64,
               [OPD_i8] = i8_to_i64,
               [OPD_i16] = i16_to_i64,
               [OPD_i32] = i32_to_i64,
               [OPD_i64] = i64_to_i64},
	.from_i64 = {[OPD_bool] = i64_to_bool,
                 [OPD_u8] = i64_to_8,
                 [OPD_i8] = i64_to_8,
                 [OPD_i16] = i64_to_16,
                 [OPD_i32] = i64_to_32,
                 [OPD_i64] = i64_to_i64,
                 [OPD_f32] = i64_to_f32,
                 [OPD_f64] = i64_to_f64},
	.from_f32 = {[OPD_bool] = f32_to_bool,
                 [OPD_u8] = f32_to_u8,
                 [OPD_i8] = f32_to_i8,
                 [OPD_i16] = f32_to_i16,
                 [OPD_i32] = f32_to_i32,
                 [OPD_i64] = f32_to_i64,
                 [OPD_f64] = f32_to_f64},
	.from_f64 = {[OPD_bool] = f64_to_bool,
                 [OPD_u8] = f64_to_u8,
                 [OPD_i8] = f64_to_i8,
                 [OPD_i16] = f64_to_i16,
                 [OPD_i32] = f64_to_i32,
                 [OPD_i64] = f64_to_i64,
                 [OPD_f32] = f64_to_f32,
                 [OPD_f64] = f64_to_f64},
	.odd = {[OPD_i64] = i64_to_odd, [OPD_f64] = f64_to_odd},
};
