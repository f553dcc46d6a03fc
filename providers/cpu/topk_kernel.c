/* Keys of topk and argmax: unsigned integers in the catalogue's order (greater values greater, −0 as +0, NaN above all): compiled once for each
 * instruction set (kernels.h). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_f8.h"

/* The order of f32 is that of its bits once those of negative numbers are turned around. −0 + 0 is +0. */
VEC_INLINE vec_u32 topk_key(vec_f32 v)
{
	vec_u32 bits = (vec_u32)(v + vec_splat(0.0f));
	vec_u32 negative = 0 - (bits >> 31);
	vec_u32 key = bits ^ (negative | 0x80000000u);
	return vec_select((vec_u32)(v != v), vec_splat_u32(0xffffffffu), key);
}

/* True when a key is above `floor`. */
VEC_INLINE bool topk_floats(opd_dtype dtype, const void *x, size_t count, uint32_t floor, uint32_t *keys)
{
	vec_u32 above = vec_splat_u32(0), limit = vec_splat_u32(floor);
	for (size_t i = 0; i < count; i += VEC_LANES) {
		size_t here = count - i < VEC_LANES ? count - i : VEC_LANES;
		vec_u32 key = topk_key(vec_load_some(dtype, x, i, here));
		memcpy(keys + i, &key, here * sizeof(uint32_t));
		if (here < VEC_LANES) /* lanes past the end are zeros */
			for (size_t k = here; k < VEC_LANES; k++)
				key[k] = 0;
		above |= (vec_u32)(key > limit);
	}
	uint32_t any = 0;
	for (size_t k = 0; k < VEC_LANES; k++)
		any |= above[k];
	return any != 0;
}

#define X(name)                                                                                        \
	static bool keys_##name(const void *x, size_t count, uint32_t floor, uint32_t *keys)               \
	{                                                                                                  \
		return topk_floats(OPD_##name, x, count, floor, keys);                                         \
	}
X(f32)
X(bf16)
X(f16)
X(f8_e4m3fn)
X(f8_e5m2)
#undef X

/* `expression` of `value`, as an i32, in the same order. */
#define INTEGERS(name, type, expression)                                                               \
	static bool keys_##name(const void *from, size_t count, uint32_t floor, uint32_t *restrict keys)   \
	{                                                                                                  \
		const type *restrict x = from;                                                                 \
		uint32_t any = 0;                                                                              \
		for (size_t i = 0; i < count; i++) {                                                           \
			type value = x[i];                                                                         \
			keys[i] = (uint32_t)(int32_t)(expression) ^ 0x80000000u;                                   \
			any |= keys[i] > floor;                                                                    \
		}                                                                                              \
		return any != 0;                                                                               \
	}
INTEGERS(bool, uint8_t, value != 0)
INTEGERS(u8, uint8_t, value)
INTEGERS(i8, int8_t, value)
INTEGERS(i16, int16_t, value)
INTEGERS(i32, int32_t, value)

static void wide_keys_i64(const void *from, size_t count, uint64_t *restrict keys)
{
	const int64_t *restrict x = from;
	for (size_t i = 0; i < count; i++)
		keys[i] = (uint64_t)x[i] ^ (1ull << 63);
}

static void wide_keys_f64(const void *from, size_t count, uint64_t *restrict keys)
{
	const double *restrict x = from;
	for (size_t i = 0; i < count; i++) {
		double value = x[i] + 0.0;
		uint64_t bits;
		memcpy(&bits, &value, sizeof bits);
		uint64_t key = bits >> 63 != 0 ? ~bits : bits | 1ull << 63;
		keys[i] = value != value ? UINT64_MAX : key;
	}
}

const struct cpu_topk_kernels CPU_SYMBOL(cpu_topk) = {
	.keys = {[OPD_bool] = keys_bool,
             [OPD_u8] = keys_u8,
             [OPD_i8] = keys_i8,
             [OPD_i16] = keys_i16,
             [OPD_i32] = keys_i32,
             [OPD_f16] = keys_f16,
             [OPD_bf16] = keys_bf16,
             [OPD_f32] = keys_f32,
             [OPD_f8_e4m3fn] = keys_f8_e4m3fn,
             [OPD_f8_e5m2] = keys_f8_e5m2},
	.wide_keys = {[OPD_i64] = wide_keys_i64, [OPD_f64] = wide_keys_f64},
};
