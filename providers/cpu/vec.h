/* Vectors of f32 for kernels that are compiled once for each instruction set: arithmetic, reductions, exp.
 *
 * Layer: providers/cpu, internal to *_kernel.c. Threads: pure.
 * The width is the translation unit's: 16 lanes with AVX-512 (F, BW, DQ, VL), 8 with AVX2 + FMA + F16C, else 4 (any processor: GCC vector
 * types, which become SSE2 or NEON). Everything is static inline, so that code of one instruction set can't be linked into another's.
 * Reductions have one fixed order for a width: what makes a row's bits independent of threads, of other rows and of alignment.
 * Not here: element types in memory (vec_dtype.h). */
#ifndef OPD_CPU_VEC_H
#define OPD_CPU_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VEC_AVX512 1
#define VEC_LANES 16
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VEC_AVX2 1
#define VEC_LANES 8
#include <immintrin.h>
#else
#define VEC_PORTABLE 1
#define VEC_LANES 4
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

#define VEC_INLINE static inline __attribute__((always_inline, unused))

typedef float vec_f32 __attribute__((vector_size(4 * VEC_LANES)));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * VEC_LANES)));
typedef uint16_t vec_u16 __attribute__((vector_size(2 * VEC_LANES)));

VEC_INLINE vec_f32 vec_splat(float value)
{
#if defined(VEC_AVX512)
	return _mm512_set1_ps(value);
#elif defined(VEC_AVX2)
	return _mm256_set1_ps(value);
#else
	return (vec_f32){value, value, value, value};
#endif
}

VEC_INLINE vec_u32 vec_splat_u32(uint32_t value)
{
#if defined(VEC_AVX512)
	return (vec_u32)_mm512_set1_epi32((int)value);
#elif defined(VEC_AVX2)
	return (vec_u32)_mm256_set1_epi32((int)value);
#else
	return (vec_u32){value, value, value, value};
#endif
}

/* Lanes of `yes` where `mask` is all ones, of `no` where it is 0. */
VEC_INLINE vec_u32 vec_select(vec_u32 mask, vec_u32 yes, vec_u32 no)
{
	return (mask & yes) | (~mask & no);
}

/* a·b + c: one rounding where the machine has FMA, two in the portable form. */
VEC_INLINE vec_f32 vec_fma(vec_f32 a, vec_f32 b, vec_f32 c)
{
#if defined(VEC_AVX512)
	return _mm512_fmadd_ps(a, b, c);
#elif defined(VEC_AVX2)
	return _mm256_fmadd_ps(a, b, c);
#else
	return a * b + c;
#endif
}

/* The greater; `b` where either is NaN (so is it below for the lesser). */
VEC_INLINE vec_f32 vec_max(vec_f32 a, vec_f32 b)
{
#if defined(VEC_AVX512)
	return _mm512_max_ps(a, b);
#elif defined(VEC_AVX2)
	return _mm256_max_ps(a, b);
#else
	return (vec_f32)vec_select((vec_u32)(a > b), (vec_u32)a, (vec_u32)b);
#endif
}

VEC_INLINE vec_f32 vec_min(vec_f32 a, vec_f32 b)
{
#if defined(VEC_AVX512)
	return _mm512_min_ps(a, b);
#elif defined(VEC_AVX2)
	return _mm256_min_ps(a, b);
#else
	return (vec_f32)vec_select((vec_u32)(a < b), (vec_u32)a, (vec_u32)b);
#endif
}

/* Lane i and lane i + n/2, again and again: the order is part of every kernel's bits. */
VEC_INLINE float vec_sum(vec_f32 v)
{
#if defined(VEC_AVX512)
	__m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
	__m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(VEC_AVX2)
	__m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
	vec_f32 quarter = v;
#endif
	return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

/* NaN lanes may or may not show: callers must meet them elsewhere. */
VEC_INLINE float vec_highest(vec_f32 v)
{
#if defined(VEC_AVX512)
	__m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
	__m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(VEC_AVX2)
	__m128 quarter = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
	vec_f32 quarter = v;
#endif
	float even = quarter[0] > quarter[2] ? quarter[0] : quarter[2];
	float odd = quarter[1] > quarter[3] ? quarter[1] : quarter[3];
	return even > odd ? even : odd;
}

/* p·2^n for whole n of [-152, 128]; `biased` is n + 254. */
VEC_INLINE vec_f32 vec_scale(vec_f32 p, vec_f32 n, vec_u32 biased)
{
#if defined(VEC_AVX512)
	(void)biased;
	return _mm512_scalef_ps(p, n);
#else
	/* In two steps: 2^n itself is no normal float where the result is denormal or near the largest. */
	(void)n;
	vec_u32 first = biased >> 1;
	vec_u32 second = biased - first;
	return p * (vec_f32)(first << 23) * (vec_f32)(second << 23);
#endif
}

/* Asks for `bytes` from `memory` on, which are read soon. */
VEC_INLINE void vec_ask(const void *memory, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += 64)
		__builtin_prefetch((const unsigned char *)memory + at, 0, 3);
}

/* Bytes between what a pass over elements from memory computes and what it asks for. Processors ask ahead by themselves, but Intel's begin anew in every page of 4 KiB, and wait for it: sixteen threads of a Xeon past its
 * caches, none, 1, 2, 4 KiB ahead: relu of bf16 4654, 3900, 3416, 3037 us, gelu of bf16 5611, 4258, 3900, 3723 (8 KiB, of three of these: 2781 and 3788). */
#define VEC_AHEAD 4096

/* Asks for `bytes` that come VEC_AHEAD after `memory`: past an operand's end, too, where they are nobody's to read, but may be asked for. */
VEC_INLINE void vec_ask_ahead(const void *memory, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += 64)
		__builtin_prefetch((const void *)((uintptr_t)memory + VEC_AHEAD + at), 0, 3);
}

/* e^x for x of [-105, 89], or NaN, which stays: relative error under 2 ulp, denormal results included.
 * x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r = 1 + r + r²·q(r), q of degree 4 fitted for the least relative error (3.1e-9). ln 2 is split in
 * two, the first part short, so that n·first is exact also without FMA. */
VEC_INLINE vec_f32 vec_exp_near(vec_f32 x)
{
	const vec_f32 magic = vec_splat(12582912.0f); /* 1.5·2^23: adding it rounds to a whole number, which ends up in the low bits */
	vec_f32 shifted = vec_fma(x, vec_splat(1.44269504f), magic);
	vec_f32 n = shifted - magic;
	vec_u32 biased = (vec_u32)shifted - (vec_u32)magic + 254;
	vec_f32 r = vec_fma(n, vec_splat(-0.693359375f), x);
	r = vec_fma(n, vec_splat(2.12194440e-4f), r);
	vec_f32 p = vec_splat(0.0013814540579915047f);
	p = vec_fma(p, r, vec_splat(0.00836874544620514f));
	p = vec_fma(p, r, vec_splat(0.04166838899254799f));
	p = vec_fma(p, r, vec_splat(0.1666652113199234f));
	p = vec_fma(p, r, vec_splat(0.4999999403953552f));
	p = vec_fma(p * r, r, r) + vec_splat(1.0f);
	return vec_scale(p, n, biased);
}

/* Where e^x is 0 or +inf anyway, x is as good as at the border. */
VEC_INLINE vec_f32 vec_exp_bounded(vec_f32 x)
{
	return vec_min(vec_splat(89.0f), vec_max(vec_splat(-105.0f), x));
}

/* e^x of any x: e^-inf is 0, overflow is +inf, NaN stays. */
VEC_INLINE vec_f32 vec_exp(vec_f32 x)
{
	return vec_exp_near(vec_exp_bounded(x));
}

/* Vectors that go through a function together, n at most of them (a constant of the caller): their steps stand beside each other, so that one's wait for its last result is filled by the others'.
 * gelu of 4096 in a first-level cache on Zen 5, 2, 4 and 8 at a time: f32 1.22, 1.08, 0.87 us; bf16 0.71, 0.66, 0.61; sixteen registers hold what four need (avx2, 4 in place of 2: a fifth to a quarter less). */
#if defined(VEC_AVX512)
#define VEC_TOGETHER 8
#elif defined(VEC_AVX2)
#define VEC_TOGETHER 4
#else
#define VEC_TOGETHER 2
#endif

#define VEC_LOG2_E 1.44269504f
#define VEC_EACH(i, n) for (size_t i = 0; i < (n); i++)

/* y = Σ terms[k]·x^(count − 1 − k). The compiler isn't to know the terms: it would keep them in registers, and the vectors in memory instead (gelu of f32, as above: 0.98 us). */
VEC_INLINE void vec_polynomial(const float *terms, size_t count, const vec_f32 *x, vec_f32 *y, size_t n)
{
	__asm__("" : "+r"(terms));
	VEC_EACH(i, n) y[i] = vec_splat(terms[0]);
	for (size_t k = 1; k < count; k++)
		VEC_EACH(i, n) y[i] = vec_fma(y[i], x[i], vec_splat(terms[k]));
}

/* 2^x of x in [-150, 129], and of any x with AVX-512, by a polynomial for 2^f, f of [0, 1). */
VEC_INLINE void vec_exp2_by(const float *terms, size_t count, vec_f32 *x, size_t n)
{
	vec_f32 f[VEC_TOGETHER], p[VEC_TOGETHER];
#if defined(VEC_AVX512)
	VEC_EACH(i, n) f[i] = _mm512_reduce_ps(x[i], _MM_FROUND_TO_NEG_INF);
	vec_polynomial(terms, count, f, p, n);
	VEC_EACH(i, n) x[i] = _mm512_scalef_ps(p[i], x[i]); /* which takes the whole part itself */
#else
	const vec_f32 magic = vec_splat(12582912.0f); /* as in vec_exp_near */
	vec_f32 shifted[VEC_TOGETHER];
	VEC_EACH(i, n) shifted[i] = (x[i] - vec_splat(0.5f)) + magic;
	VEC_EACH(i, n) f[i] = x[i] - (shifted[i] - magic);
	vec_polynomial(terms, count, f, p, n);
	VEC_EACH(i, n) x[i] = vec_scale(p[i], shifted[i] - magic, (vec_u32)shifted[i] - (vec_u32)magic + 254);
#endif
}

/* a/b for results of 16 bits, b at least 1: a relative error of 2^-14. */
VEC_INLINE vec_f32 vec_quotient_16(vec_f32 a, vec_f32 b)
{
#if defined(VEC_AVX512)
	return a * (vec_f32)_mm512_rcp14_ps(b);
#else
	return a / b;
#endif
}

#endif
