/* f8_e4m3fn and f8_e5m2 in memory to and from vectors of f32, and one pair of functions for the five narrow float dtypes.
 *
 * Layer: providers/cpu, internal to *_kernel.c; the dtype is a constant of the caller. Threads: pure.
 * Loads are exact. Stores round to nearest even, saturate (infinities too) and keep NaN. Denormals are kept at both ends.
 * Not here: f32, bf16, f16 alone (vec_dtype.h). */
#ifndef OPD_CPU_VEC_F8_H
#define OPD_CPU_VEC_F8_H

#include "providers/cpu/vec_dtype.h"

typedef uint8_t vec_u8 __attribute__((vector_size(VEC_LANES)));

VEC_INLINE vec_u32 vec_widen_8(vec_u8 bytes)
{
#if defined(VEC_AVX512)
	return (vec_u32)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(VEC_AVX2)
	long long low;
	memcpy(&low, &bytes, sizeof low);
	return (vec_u32)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low));
#else
	return __builtin_convertvector(bytes, vec_u32);
#endif
}

/* The low bytes. */
VEC_INLINE vec_u8 vec_narrow_8(vec_u32 words)
{
#if defined(VEC_AVX512)
	return (vec_u8)_mm512_cvtepi32_epi8((__m512i)words);
#elif defined(VEC_AVX2)
	const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1,
	                                       -1, -1, -1, -1, -1, -1, -1, -1);
	__m256i fours = _mm256_shuffle_epi8((__m256i)words, first);
	__m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
	vec_u8 bytes;
	memcpy(&bytes, &eight, sizeof bytes);
	return bytes;
#else
	return __builtin_convertvector(words, vec_u8);
#endif
}

/* Through f16, whose exponent is two bits wider than e4m3fn's: exact, and its denormals cost nothing. */
VEC_INLINE vec_f32 vec_from_e4m3fn(vec_u8 bytes)
{
	vec_u32 bits = vec_widen_8(bytes);
	vec_u32 magnitude = bits & 0x7f;
	vec_u32 half = ((bits & 0x80) << 8) | (magnitude << 7);
	vec_f32 value = vec_from_f16(vec_narrow(half)) * vec_splat(256.0f);
	return (vec_f32)vec_select((vec_u32)(magnitude == vec_splat_u32(0x7f)), vec_splat_u32(0x7fc00000), (vec_u32)value);
}

/* The first byte of an f16. */
VEC_INLINE vec_f32 vec_from_e5m2(vec_u8 bytes)
{
	return vec_from_f16(vec_narrow(vec_widen_8(bytes) << 8));
}

/* A float of `mantissa` bits whose least normal number is 2^(1 − bias): bits `bias` and `mantissa` are constants. Codes of finite numbers rise with the number: those above
 * `largest` become it. */
VEC_INLINE vec_u8 vec_to_f8(vec_f32 v, uint32_t bias, uint32_t mantissa, uint32_t largest, uint32_t nan)
{
	const uint32_t spare = 23 - mantissa;
	vec_u32 bits = (vec_u32)v;
	vec_u32 magnitude = bits & 0x7fffffff;
	vec_u32 normal = (magnitude - ((127 - bias) << 23) + ((1u << (spare - 1)) - 1) + ((magnitude >> spare) & 1)) >> spare;
	/* Below the least normal number the sum with a power of two has the denormal unit as its last bit: the addition rounds. */
	const uint32_t unit_exponent = 127 + 1 - bias - mantissa + 23;
	vec_u32 magic = vec_splat_u32(unit_exponent << 23);
	vec_u32 denormal = (vec_u32)((vec_f32)magnitude + (vec_f32)magic) - magic;
	vec_u32 code = vec_select((vec_u32)(magnitude < vec_splat_u32((127 + 1 - bias) << 23)), denormal, normal);
	/* Far above the range `normal` has wrapped: compare the number itself too. */
	vec_u32 above = (vec_u32)(magnitude >= vec_splat_u32((127 + bias + 2) << 23)) | (vec_u32)(code > vec_splat_u32(largest));
	code = vec_select(above, vec_splat_u32(largest), code);
	code = vec_select((vec_u32)(v != v), vec_splat_u32(nan), code);
	return vec_narrow_8(code | ((bits >> 24) & 0x80));
}

VEC_INLINE vec_f32 vec_from_8(opd_dtype dtype, vec_u8 bytes)
{
	return dtype == OPD_f8_e4m3fn ? vec_from_e4m3fn(bytes) : vec_from_e5m2(bytes);
}

VEC_INLINE vec_u8 vec_to_8(opd_dtype dtype, vec_f32 v)
{
	return dtype == OPD_f8_e4m3fn ? vec_to_f8(v, 7, 3, 0x7e, 0x7f) : vec_to_f8(v, 15, 2, 0x7b, 0x7e);
}

/* Elements [at, at + count) of f32, bf16, f16, f8_e4m3fn or f8_e5m2; count at most VEC_LANES, no byte behind them is touched. Lanes past
 * them are 0. */
VEC_INLINE vec_f32 vec_load_some(opd_dtype dtype, const void *memory, size_t at, size_t count)
{
	if (!opd_dtype_is_f8(dtype))
		return count == VEC_LANES ? vec_load(dtype, memory, at) : vec_load_part(dtype, memory, at, count, 0.0f);
	vec_u8 bytes = {0};
	if (count == VEC_LANES)
		memcpy(&bytes, (const uint8_t *)memory + at, sizeof bytes);
	else
		memcpy(&bytes, (const uint8_t *)memory + at, count);
	return vec_from_8(dtype, bytes);
}

VEC_INLINE void vec_store_some(opd_dtype dtype, void *memory, size_t at, size_t count, vec_f32 v)
{
	if (!opd_dtype_is_f8(dtype)) {
		if (count == VEC_LANES)
			vec_store(dtype, memory, at, v);
		else
			vec_store_part(dtype, memory, at, count, v);
		return;
	}
	vec_u8 bytes = vec_to_8(dtype, v);
	if (count == VEC_LANES)
		memcpy((uint8_t *)memory + at, &bytes, sizeof bytes);
	else
		memcpy((uint8_t *)memory + at, &bytes, count);
}

#endif
