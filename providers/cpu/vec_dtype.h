/* f32, bf16 and f16 in memory to and from vectors of f32.
 *
 * Layer: providers/cpu, internal to *_kernel.c; each function takes its dtype as a constant of the caller, so that the choice is made by the
 * compiler. Threads: pure.
 * Loads convert exactly; stores round to nearest even, overflow to infinity, keep NaN. No alignment is needed. The _part forms touch `count`
 * elements (1 to VEC_LANES) of memory and not one more; the other lanes of a load are `fill`.
 * bf16 is rounded by integer arithmetic; by AVX-512's own conversion, where that is compiled for and neither a denormal, which it takes for zero, nor a NaN is among a pair: to the
 * same bits. */
#ifndef OPD_CPU_VEC_DTYPE_H
#define OPD_CPU_VEC_DTYPE_H

#include "opd/dtype.h"
#include "providers/cpu/vec.h"

VEC_INLINE vec_u32 vec_widen(vec_u16 bits)
{
#if defined(VEC_AVX512)
	return (vec_u32)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(VEC_AVX2)
	return (vec_u32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
	return __builtin_convertvector(bits, vec_u32);
#endif
}

/* The low halves. */
VEC_INLINE vec_u16 vec_narrow(vec_u32 words)
{
#if defined(VEC_AVX512)
	return (vec_u16)_mm512_cvtepi32_epi16((__m512i)words);
#elif defined(VEC_AVX2)
	__m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
	return (vec_u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#elif defined(__SSE2__)
	/* SSE2 packs with signed saturation only: sign-extended halves pass through it unchanged. */
	__m128i halves = _mm_srai_epi32(_mm_slli_epi32((__m128i)words, 16), 16);
	__m128i packed = _mm_packs_epi32(halves, halves);
	vec_u16 low;
	memcpy(&low, &packed, sizeof low);
	return low;
#else
	return __builtin_convertvector(words, vec_u16);
#endif
}

VEC_INLINE vec_f32 vec_from_bf16(vec_u16 bits)
{
	return (vec_f32)(vec_widen(bits) << 16);
}

/* The result's bits in the high half of each lane; the low half is rubbish. */
VEC_INLINE vec_u32 vec_round_bf16(vec_f32 v)
{
	vec_u32 bits = (vec_u32)v;
	vec_u32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
#if defined(VEC_AVX512)
	__mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
	return (vec_u32)_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc00000));
#else
	return vec_select((vec_u32)(v != v), vec_splat_u32(0x7fc00000), rounded);
#endif
}

VEC_INLINE vec_f32 vec_from_f16(vec_u16 bits)
{
#if defined(VEC_AVX512)
	return _mm512_cvtph_ps((__m256i)bits);
#elif defined(VEC_AVX2)
	return _mm256_cvtph_ps((__m128i)bits);
#else
	/* Exponent and fraction moved into a float's place are 2^112 too small, denormals too. */
	vec_u32 wide = vec_widen(bits);
	vec_u32 magnitude = (wide & 0x7fff) << 13;
	vec_u32 scaled = (vec_u32)((vec_f32)magnitude * vec_splat(0x1p112f));
	vec_u32 special = (vec_u32)(magnitude >= vec_splat_u32(0x7c00u << 13));
	return (vec_f32)(scaled | (special & 0x7f800000) | ((wide & 0x8000) << 16));
#endif
}

VEC_INLINE vec_u16 vec_to_f16(vec_f32 v)
{
#if defined(VEC_AVX512)
	return (vec_u16)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(VEC_AVX2)
	return (vec_u16)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
	vec_u32 bits = (vec_u32)v;
	vec_u32 magnitude = bits & 0x7fffffff;
	vec_u32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
	/* Below 2^-14 the sum with 1/2 has f16's denormal unit as its last bit: the addition rounds. */
	vec_u32 denormal = (vec_u32)((vec_f32)magnitude + vec_splat(0.5f)) - 0x3f000000;
	vec_u32 result = vec_select((vec_u32)(magnitude < vec_splat_u32(0x38800000)), denormal, normal);
	result = vec_select((vec_u32)(magnitude >= vec_splat_u32(0x47800000)), vec_splat_u32(0x7c00), result);
	result = vec_select((vec_u32)(magnitude > vec_splat_u32(0x7f800000)), vec_splat_u32(0x7e00), result);
	return vec_narrow(result | ((bits >> 16) & 0x8000));
#endif
}

VEC_INLINE vec_f32 vec_from_16(opd_dtype dtype, vec_u16 bits)
{
	return dtype == OPD_bf16 ? vec_from_bf16(bits) : vec_from_f16(bits);
}

VEC_INLINE vec_u16 vec_to_16(opd_dtype dtype, vec_f32 v)
{
	return dtype == OPD_bf16 ? vec_narrow(vec_round_bf16(v) >> 16) : vec_to_f16(v);
}

/* Elements [at, at + VEC_LANES) of `memory`. */
VEC_INLINE vec_f32 vec_load(opd_dtype dtype, const void *memory, size_t at)
{
	if (dtype == OPD_f32) {
		vec_f32 v;
		memcpy(&v, (const float *)memory + at, sizeof v);
		return v;
	}
	vec_u16 bits;
	memcpy(&bits, (const uint16_t *)memory + at, sizeof bits);
	return vec_from_16(dtype, bits);
}

VEC_INLINE void vec_store(opd_dtype dtype, void *memory, size_t at, vec_f32 v)
{
	if (dtype == OPD_f32) {
		memcpy((float *)memory + at, &v, sizeof v);
		return;
	}
	vec_u16 bits = vec_to_16(dtype, v);
	memcpy((uint16_t *)memory + at, &bits, sizeof bits);
}

/* The same past the caches, for memory aligned to the 2 or 4·VEC_LANES bytes that a vector takes there: nothing is read of lines that are overwritten as a whole. Whoever
 * hands the memory on calls cpu_streamed first. Without AVX, a plain store. */
VEC_INLINE void vec_stream(opd_dtype dtype, void *memory, size_t at, vec_f32 v)
{
#if defined(VEC_AVX512)
	if (dtype == OPD_f32)
		_mm512_stream_ps((float *)memory + at, v);
	else
		_mm256_stream_si256((__m256i *)(void *)((uint16_t *)memory + at), (__m256i)vec_to_16(dtype, v));
#elif defined(VEC_AVX2)
	if (dtype == OPD_f32)
		_mm256_stream_ps((float *)memory + at, v);
	else
		_mm_stream_si128((__m128i *)(void *)((uint16_t *)memory + at), (__m128i)vec_to_16(dtype, v));
#else
	vec_store(dtype, memory, at, v);
#endif
}

#if defined(VEC_AVX512)

VEC_INLINE __mmask16 vec_mask(size_t count)
{
	return (__mmask16)((1u << count) - 1);
}

VEC_INLINE vec_f32 vec_load_part(opd_dtype dtype, const void *memory, size_t at, size_t count, float fill)
{
	__mmask16 mask = vec_mask(count);
	if (dtype == OPD_f32)
		return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, (const float *)memory + at);
	vec_f32 v = vec_from_16(dtype, (vec_u16)_mm256_maskz_loadu_epi16(mask, (const uint16_t *)memory + at));
	return _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, v);
}

VEC_INLINE void vec_store_part(opd_dtype dtype, void *memory, size_t at, size_t count, vec_f32 v)
{
	if (dtype == OPD_f32)
		_mm512_mask_storeu_ps((float *)memory + at, vec_mask(count), v);
	else
		_mm256_mask_storeu_epi16((uint16_t *)memory + at, vec_mask(count), (__m256i)vec_to_16(dtype, v));
}

#else

/* Through a buffer on the stack: once a row, and the same for every processor without masks. */
VEC_INLINE vec_f32 vec_load_part(opd_dtype dtype, const void *memory, size_t at, size_t count, float fill)
{
	vec_f32 v = vec_splat(fill);
	if (dtype == OPD_f32) {
		memcpy(&v, (const float *)memory + at, count * sizeof(float));
		return v;
	}
	vec_u16 bits = {0};
	memcpy(&bits, (const uint16_t *)memory + at, count * sizeof(uint16_t));
	vec_f32 part = vec_from_16(dtype, bits);
	memcpy(&v, &part, count * sizeof(float));
	return v;
}

VEC_INLINE void vec_store_part(opd_dtype dtype, void *memory, size_t at, size_t count, vec_f32 v)
{
	if (dtype == OPD_f32) {
		memcpy((float *)memory + at, &v, count * sizeof(float));
		return;
	}
	vec_u16 bits = vec_to_16(dtype, v);
	memcpy((uint16_t *)memory + at, &bits, count * sizeof(uint16_t));
}

#endif

/* Two vectors' worth of elements for loops in which an element meets only those at its own place: of bf16 the even ones and the odd ones, which takes half of the work of telling
 * neighbours apart; of others the first ones and the next. */
struct vec_pair {
	vec_f32 v[2];
};

VEC_INLINE struct vec_pair vec_load_pair(opd_dtype dtype, const void *memory, size_t at)
{
	if (dtype != OPD_bf16)
		return (struct vec_pair){{vec_load(dtype, memory, at), vec_load(dtype, memory, at + VEC_LANES)}};
	vec_u32 words;
	memcpy(&words, (const uint16_t *)memory + at, sizeof words);
	return (struct vec_pair){{(vec_f32)(words << 16), (vec_f32)(words & 0xffff0000u)}};
}

/* A pair rounded to bf16, as it lies in memory. */
VEC_INLINE vec_u32 vec_pair_to_bf16(struct vec_pair pair)
{
#if defined(VEC_AVX512) && defined(__AVX512BF16__)
	enum { NAN_OR_DENORMAL = 0x01 | 0x20 | 0x80 };
	if (__builtin_expect(_kortestz_mask16_u8(_mm512_fpclass_ps_mask(pair.v[0], NAN_OR_DENORMAL), _mm512_fpclass_ps_mask(pair.v[1], NAN_OR_DENORMAL)), 1)) {
		const __m512i zipped = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
		return (vec_u32)_mm512_permutexvar_epi16(zipped, (__m512i)_mm512_cvtne2ps_pbh(pair.v[1], pair.v[0]));
	}
#endif
	return (vec_round_bf16(pair.v[0]) >> 16) | (vec_round_bf16(pair.v[1]) & 0xffff0000u);
}

VEC_INLINE void vec_store_pair(opd_dtype dtype, void *memory, size_t at, struct vec_pair pair)
{
	if (dtype != OPD_bf16) {
		vec_store(dtype, memory, at, pair.v[0]);
		vec_store(dtype, memory, at + VEC_LANES, pair.v[1]);
		return;
	}
	vec_u32 words = vec_pair_to_bf16(pair);
	memcpy((uint16_t *)memory + at, &words, sizeof words);
}

/* Two neighbouring vectors as a pair of bf16 has them: even elements, odd elements. */
VEC_INLINE struct vec_pair vec_apart(struct vec_pair near)
{
#if defined(VEC_AVX512)
	const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
	return (struct vec_pair){{_mm512_permutex2var_ps(near.v[0], even, near.v[1]),
	                          _mm512_permutex2var_ps(near.v[0], _mm512_add_epi32(even, _mm512_set1_epi32(1)), near.v[1])}};
#elif defined(VEC_AVX2)
	return (struct vec_pair){{__builtin_shufflevector(near.v[0], near.v[1], 0, 2, 4, 6, 8, 10, 12, 14),
	                          __builtin_shufflevector(near.v[0], near.v[1], 1, 3, 5, 7, 9, 11, 13, 15)}};
#else
	return (struct vec_pair){{__builtin_shufflevector(near.v[0], near.v[1], 0, 2, 4, 6), __builtin_shufflevector(near.v[0], near.v[1], 1, 3, 5, 7)}};
#endif
}

/* vec_stream of both. */
VEC_INLINE void vec_stream_pair(opd_dtype dtype, void *memory, size_t at, struct vec_pair pair)
{
#if defined(VEC_PORTABLE)
	vec_store_pair(dtype, memory, at, pair);
#else
	if (dtype != OPD_bf16) {
		vec_stream(dtype, memory, at, pair.v[0]);
		vec_stream(dtype, memory, at + VEC_LANES, pair.v[1]);
		return;
	}
	vec_u32 words = vec_pair_to_bf16(pair);
#if defined(VEC_AVX512)
	_mm512_stream_si512((void *)((uint16_t *)memory + at), (__m512i)words);
#else
	_mm256_stream_si256((void *)((uint16_t *)memory + at), (__m256i)words);
#endif
#endif
}

/* Both to memory; past the caches where `past`, for memory aligned as vec_stream wants it. */
VEC_INLINE void vec_put_pair(opd_dtype dtype, void *memory, size_t at, bool past, struct vec_pair pair)
{
	if (past)
		vec_stream_pair(dtype, memory, at, pair);
	else
		vec_store_pair(dtype, memory, at, pair);
}

/* What begins at a whole line. */
VEC_INLINE bool vec_is_aligned(const void *memory)
{
	return (uintptr_t)memory % 64 == 0;
}

/* 2^x as results of `dtype` need it. The least largest relative errors for their degrees (Lawson's iteration): 1.9e-9, 2.6e-6, 7.5e-5. */
VEC_INLINE void vec_exp2(opd_dtype dtype, vec_f32 *x, size_t n)
{
	static const float exact[] = {0.000217022563f, 0.00124396884f, 0.00967884064f, 0.0554833412f, 0.24022983f, 0.693147004f, 1.0f};
	static const float half[] = {0.0135341683f, 0.0520114619f, 0.241442755f, 0.693003835f, 1.00000259f};
	static const float brief[] = {0.0780245256f, 0.226067166f, 0.695833528f, 0.999925221f};
	if (dtype == OPD_f32)
		vec_exp2_by(exact, sizeof exact / sizeof exact[0], x, n);
	else if (dtype == OPD_f16)
		vec_exp2_by(half, sizeof half / sizeof half[0], x, n);
	else
		vec_exp2_by(brief, sizeof brief / sizeof brief[0], x, n);
}

/* One NaN for all: which of two NaNs a sum hands on is the compiler's choice of operand order. */
VEC_INLINE vec_f32 vec_one_nan(vec_f32 v)
{
#if defined(VEC_AVX512) /* gcc 12 makes six operations of vec_select here */
	return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
#else
	return (vec_f32)vec_select((vec_u32)(v != v), vec_splat_u32(0x7fc00000), (vec_u32)v);
#endif
}

/* What is stored as `dtype`: bf16's rounding has one NaN anyway. */
VEC_INLINE vec_f32 vec_result(opd_dtype dtype, vec_f32 v)
{
	return dtype == OPD_bf16 ? v : vec_one_nan(v);
}

/* `v` as it would read after a store as bf16, where v is a number, or a NaN whose low half is 0, as those of bf16 are. Four operations less than for any NaN. */
VEC_INLINE vec_f32 vec_rounded_to_bf16(vec_f32 v)
{
	vec_u32 bits = (vec_u32)v;
	return (vec_f32)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

/* `v` as it would read after a store as `dtype`. */
VEC_INLINE vec_f32 vec_rounded(opd_dtype dtype, vec_f32 v)
{
	if (dtype == OPD_f32)
		return v;
	if (dtype == OPD_bf16)
		return (vec_f32)(vec_round_bf16(v) & 0xffff0000u);
	return vec_from_f16(vec_to_f16(v));
}

#endif
