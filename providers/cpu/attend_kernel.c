/* Attention, pieces of one tile of query rows against a chunk of keys: compiled once for each instruction set (kernels.h).
 *
 * Every sum has one order, whichever block of rows and keys computes it: a score takes head elements in VEC_LANES chains, folded as vec_sum
 * does; a result takes values key by key. So a row's bits don't show how many rows shared the pass. */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

#if defined(VEC_AVX512)
#define ROWS 4  /* rows that share loads of keys and values */
#define KEYS 4  /* keys that share loads of those rows */
#define ALONE 16 /* keys at a time for a single row */
#define JOINED 8 /* keys whose heads are gone through one after another, where all heads of a token are read: 4 KiB each in f32, in the order in which they lie */
#define VECTORS 4 /* of a value row, for ROWS rows; twice as many for a single row */
#else
#define ROWS 2
#define KEYS 4
#define ALONE 4
#define JOINED 4
#define VECTORS 2
#endif

/* The usual head size. A single row's loop over it is unrolled; unrolling those of several rows puts their sums into memory (gcc 12: ten times as slow with 16 registers). */
#define USUAL 128
#define ATTEND_UNROLL _Pragma("GCC unroll 8")

VEC_INLINE const unsigned char *attend_row(const struct cpu_attend_run *run, size_t key)
{
	return (const unsigned char *)(uintptr_t)(run->base + run->places[key]);
}

/* What is asked for while row `key` is read. */
VEC_INLINE const unsigned char *attend_later(const struct cpu_attend_run *run, size_t key, bool ahead)
{
	return ahead ? attend_row(run, key + run->lookahead) : NULL;
}

/* One line of it. */
VEC_INLINE void attend_prefetch(const unsigned char *later, uint64_t byte)
{
	if (byte % 64 == 0)
		__builtin_prefetch(later + byte, 0, 3);
}

/* ---- Scores ------------------------------------------------------------------------------------------------------------- */

#if defined(VEC_AVX512)
/* In 128-bit lane i: what vec_sum adds up last of the i-th. */
VEC_INLINE __m512 attend_quarters(__m512 a, __m512 b, __m512 c, __m512 d)
{
	__m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
	__m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
	return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
#endif

/* to[4·i + j] = vec_sum(sums[i][j]), i's four at distance `stride`. */
VEC_INLINE void attend_fold(const vec_f32 *sums, size_t rows, size_t keys, float *to, size_t stride)
{
#if defined(VEC_AVX512)
	if (rows * keys == 16) {
		__m512 quarters[4]; /* of key j: row i in 128-bit lane i */
		for (size_t j = 0; j < 4; j++)
			quarters[j] = attend_quarters(sums[j], sums[4 + j], sums[8 + j], sums[12 + j]);
		__m512d q0 = _mm512_castps_pd(quarters[0]), q1 = _mm512_castps_pd(quarters[1]);
		__m512d q2 = _mm512_castps_pd(quarters[2]), q3 = _mm512_castps_pd(quarters[3]);
		__m512 low = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(q0, q1)), _mm512_castpd_ps(_mm512_unpackhi_pd(q0, q1)));
		__m512 high = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(q2, q3)), _mm512_castpd_ps(_mm512_unpackhi_pd(q2, q3)));
		__m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
		_mm_storeu_ps(to, _mm512_castps512_ps128(all));
		_mm_storeu_ps(to + stride, _mm512_extractf32x4_ps(all, 1));
		_mm_storeu_ps(to + 2 * stride, _mm512_extractf32x4_ps(all, 2));
		_mm_storeu_ps(to + 3 * stride, _mm512_extractf32x4_ps(all, 3));
		return;
	}
	if (rows == 1 && keys == 8) {
		__m512d low = _mm512_castps_pd(attend_quarters(sums[0], sums[1], sums[2], sums[3]));
		__m512d high = _mm512_castps_pd(attend_quarters(sums[4], sums[5], sums[6], sums[7]));
		__m512 pairs = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
		__m512 all = _mm512_add_ps(_mm512_shuffle_ps(pairs, pairs, 0x88), _mm512_shuffle_ps(pairs, pairs, 0xdd));
		__m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
		_mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all)));
		return;
	}
#endif
	for (size_t i = 0; i < rows; i++)
		for (size_t j = 0; j < keys; j++)
			to[i * stride + j] = vec_sum(sums[i * keys + j]);
}

/* Rows r < rows against keys key … key + keys − 1; rows, keys and ahead (later keys are asked for) are constants of the caller. */
VEC_INLINE void attend_scores_block(opd_dtype dtype, const float *query, size_t rows, size_t padded, const struct cpu_attend_run *run,
                                    size_t key, size_t keys, bool ahead, float *scores)
{
	vec_f32 sums[16];
	for (size_t i = 0; i < rows * keys; i++)
		sums[i] = vec_splat(0.0f);
	if (rows == 1) { /* key by key, in the order of memory; their chains overlap */
		for (size_t j = 0; j < keys; j++) {
			const void *row = attend_row(run, key + j);
			const unsigned char *later = attend_later(run, key + j, ahead);
			ATTEND_UNROLL
			for (size_t d = 0; d < padded; d += VEC_LANES) {
				if (ahead)
					attend_prefetch(later, d * opd_dtype_bytes(dtype));
				sums[j] = vec_fma(vec_load(OPD_f32, query, d), vec_load(dtype, row, d), sums[j]);
			}
		}
	}
	for (size_t d = 0; rows > 1 && d < padded; d += VEC_LANES) {
		vec_f32 q[ROWS];
		for (size_t r = 0; r < rows; r++)
			q[r] = vec_load(OPD_f32, query + r * padded, d);
		for (size_t j = 0; j < keys; j++) {
			vec_f32 k = vec_load(dtype, attend_row(run, key + j), d);
			if (ahead)
				attend_prefetch(attend_later(run, key + j, true), d * opd_dtype_bytes(dtype));
			for (size_t r = 0; r < rows; r++)
				sums[r * keys + j] = vec_fma(q[r], k, sums[r * keys + j]);
		}
	}
	if (rows == 1 && keys == 16)
		attend_fold(sums, 4, 4, scores + key, 4);
	else
		attend_fold(sums, rows, keys, scores + key, CPU_ATTEND_KEYS);
}

VEC_INLINE void attend_scores(opd_dtype dtype, const float *query, size_t rows, size_t padded, const struct cpu_attend_run *run, bool ahead,
                              float *scores)
{
	size_t r = 0;
	for (; r + ROWS <= rows; r += ROWS) {
		size_t j = 0;
		for (; j + KEYS <= run->count; j += KEYS)
			attend_scores_block(dtype, query + r * padded, ROWS, padded, run, j, KEYS, ahead, scores + r * CPU_ATTEND_KEYS);
		for (; j < run->count; j++)
			attend_scores_block(dtype, query + r * padded, ROWS, padded, run, j, 1, ahead, scores + r * CPU_ATTEND_KEYS);
	}
	for (; r < rows; r++) {
		size_t j = 0;
		for (; j + ALONE <= run->count; j += ALONE)
			attend_scores_block(dtype, query + r * padded, 1, padded, run, j, ALONE, ahead, scores + r * CPU_ATTEND_KEYS);
		for (; j + JOINED <= run->count; j += JOINED)
			attend_scores_block(dtype, query + r * padded, 1, padded, run, j, JOINED, ahead, scores + r * CPU_ATTEND_KEYS);
		for (; j < run->count; j++)
			attend_scores_block(dtype, query + r * padded, 1, padded, run, j, 1, ahead, scores + r * CPU_ATTEND_KEYS);
	}
}

/* Keys whose heads are gone through one after another: of f32 half as many, where rows' queries, results and weights take room in a first-level cache beside two such blocks
 * (32 heads over 8, 4096 keys, one thread on Zen 5: 1485 to 1090 us). */
VEC_INLINE size_t attend_together(opd_dtype dtype, size_t rows)
{
	return rows > 1 && dtype == OPD_f32 ? JOINED / 2 : JOINED;
}

/* Keys [at, at + joined) of a run, or what is left of it, for the head that begins `head` bytes from the run's. */
VEC_INLINE struct cpu_attend_run attend_joined(const struct cpu_attend_run *run, size_t at, size_t joined, uint64_t head)
{
	size_t count = run->count - at < joined ? run->count - at : joined;
	return (struct cpu_attend_run){run->base + head, run->places + at, count, run->lookahead};
}

/* A single row of f32 a head keeps up with memory as the processor's own prefetcher brings it. Others compute so long that asking ahead pays: 4096 keys of 8 heads in bf16, one thread
 * on Zen 5, 388 to 260 us; in f32 it costs as much. */
VEC_INLINE bool attend_asks(opd_dtype dtype, size_t rows)
{
	return rows > 1 || dtype != OPD_f32;
}

VEC_INLINE void attend_scores_joined(opd_dtype dtype, const float *query, size_t heads, size_t rows, size_t padded,
                                     const struct cpu_attend_run *run, uint64_t head_bytes, float *scores)
{
	const size_t joined = attend_together(dtype, rows);
	for (size_t j = 0; j < run->count; j += joined) {
		for (size_t h = 0; h < heads; h++) {
			struct cpu_attend_run keys = attend_joined(run, j, joined, h * head_bytes);
			attend_scores(dtype, query + h * rows * padded, rows, padded, &keys, attend_asks(dtype, rows),
			              scores + h * rows * CPU_ATTEND_KEYS + j);
		}
	}
}

/* The usual shapes are constants to the compiler: loops over a head's vectors are then unrolled. */
VEC_INLINE void attend_scores_heads(opd_dtype dtype, const float *query, size_t heads, size_t rows, size_t padded,
                                    const struct cpu_attend_run *run, uint64_t head_bytes, float *scores)
{
	if (rows == 1 && padded == USUAL)
		attend_scores_joined(dtype, query, heads, 1, USUAL, run, head_bytes, scores);
	else if (rows == ROWS && padded == USUAL)
		attend_scores_joined(dtype, query, heads, ROWS, USUAL, run, head_bytes, scores);
	else
		attend_scores_joined(dtype, query, heads, rows, padded, run, head_bytes, scores);
}

#if defined(__AVX512BF16__)
/* Elements of one instruction: of each of 16 lanes, two neighbours. */
#define PAIRED 32

VEC_INLINE __m512bh attend_pair_load(const void *row, size_t at)
{
	return (__m512bh)_mm512_loadu_si512((const uint16_t *)row + at);
}

/* The largest element that doesn't lose, in bf16: 2^60. */
#define PAIRS_LARGEST ((127 + 60) << 7)
#define LEAST_NORMAL 0x80

static bool attend_pairs_lose(const uint16_t *query, size_t head_size)
{
	__mmask32 lose = 0;
	for (size_t d = 0; d < head_size; d += PAIRED) {
		__m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(query + d), _mm512_set1_epi16(0x7fff));
		lose |= _mm512_cmpgt_epu16_mask(magnitude, _mm512_set1_epi16(PAIRS_LARGEST));
		lose |= _mm512_cmplt_epu16_mask(_mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)), _mm512_set1_epi16(LEAST_NORMAL - 1));
	}
	return lose != 0;
}

/* attend_scores_block by products of pairs. A score is one chain over its head, folded as vec_sum does, in every block. */
VEC_INLINE void attend_pairs_block(const uint16_t *query, size_t rows, size_t head_size, const struct cpu_attend_run *run, size_t key, size_t keys,
                                   float *scores)
{
	vec_f32 sums[16];
	for (size_t i = 0; i < rows * keys; i++)
		sums[i] = vec_splat(0.0f);
	if (rows == 1) { /* key by key: addresses of eight of them and of what is asked for need more registers than there are */
		ATTEND_UNROLL
		for (size_t j = 0; j < keys; j++) {
			const unsigned char *row = attend_row(run, key + j), *later = attend_later(run, key + j, true);
			ATTEND_UNROLL
			for (size_t d = 0; d < head_size; d += PAIRED) {
				attend_prefetch(later, d * sizeof(uint16_t));
				sums[j] = (vec_f32)_mm512_dpbf16_ps((__m512)sums[j], attend_pair_load(query, d), attend_pair_load(row, d));
			}
		}
	}
	ATTEND_UNROLL
	for (size_t d = 0; rows > 1 && d < head_size; d += PAIRED) {
		__m512bh q[ROWS];
		for (size_t r = 0; r < rows; r++)
			q[r] = attend_pair_load(query + r * head_size, d);
		for (size_t j = 0; j < keys; j++) {
			__m512bh k = attend_pair_load(attend_row(run, key + j), d);
			attend_prefetch(attend_later(run, key + j, true), d * sizeof(uint16_t));
			for (size_t r = 0; r < rows; r++)
				sums[r * keys + j] = (vec_f32)_mm512_dpbf16_ps((__m512)sums[r * keys + j], q[r], k);
		}
	}
	if (rows == 1 && keys == 16)
		attend_fold(sums, 4, 4, scores + key, 4);
	else
		attend_fold(sums, rows, keys, scores + key, CPU_ATTEND_KEYS);
}

VEC_INLINE void attend_pairs(const uint16_t *query, size_t rows, size_t head_size, const struct cpu_attend_run *run, float *scores)
{
	size_t r = 0;
	for (; r + ROWS <= rows; r += ROWS) {
		size_t j = 0;
		for (; j + KEYS <= run->count; j += KEYS)
			attend_pairs_block(query + r * head_size, ROWS, head_size, run, j, KEYS, scores + r * CPU_ATTEND_KEYS);
		for (; j < run->count; j++)
			attend_pairs_block(query + r * head_size, ROWS, head_size, run, j, 1, scores + r * CPU_ATTEND_KEYS);
	}
	for (; r < rows; r++) {
		size_t j = 0;
		for (; j + ALONE <= run->count; j += ALONE)
			attend_pairs_block(query + r * head_size, 1, head_size, run, j, ALONE, scores + r * CPU_ATTEND_KEYS);
		for (; j + JOINED <= run->count; j += JOINED)
			attend_pairs_block(query + r * head_size, 1, head_size, run, j, JOINED, scores + r * CPU_ATTEND_KEYS);
		for (; j < run->count; j++)
			attend_pairs_block(query + r * head_size, 1, head_size, run, j, 1, scores + r * CPU_ATTEND_KEYS);
	}
}

VEC_INLINE void attend_pairs_joined(const uint16_t *query, size_t heads, size_t rows, size_t head_size, const struct cpu_attend_run *run,
                                    uint64_t head_bytes, float *scores)
{
	const size_t joined = heads == 1 ? CPU_ATTEND_KEYS : attend_together(OPD_bf16, rows);
	for (size_t j = 0; j < run->count; j += joined) {
		for (size_t h = 0; h < heads; h++) {
			struct cpu_attend_run keys = attend_joined(run, j, joined, h * head_bytes);
			attend_pairs(query + h * rows * head_size, rows, head_size, &keys, scores + h * rows * CPU_ATTEND_KEYS + j);
		}
	}
}

static void attend_scores_pairs(const uint16_t *query, size_t heads, size_t rows, size_t head_size, const struct cpu_attend_run *run,
                                uint64_t head_bytes, float *scores)
{
	if (rows == 1 && head_size == USUAL)
		attend_pairs_joined(query, heads, 1, USUAL, run, head_bytes, scores);
	else if (rows == ROWS && head_size == USUAL)
		attend_pairs_joined(query, heads, ROWS, USUAL, run, head_bytes, scores);
	else
		attend_pairs_joined(query, heads, rows, head_size, run, head_bytes, scores);
}
#endif

/* ---- Weights ------------------------------------------------------------------------------------------------------------ */

/* What is taken off scores before exp: the maximum; 0 before the first score above −inf, so that e^−inf is 0 there too. */
static inline float attend_shift(float maximum)
{
	return maximum == -INFINITY ? 0.0f : maximum;
}

/* Scores [at, at + VEC_LANES) times scale; −inf past `count`. */
VEC_INLINE vec_f32 attend_scaled(const float *scores, size_t at, size_t count, float scale)
{
	if (at + VEC_LANES <= count)
		return vec_load(OPD_f32, scores, at) * vec_splat(scale);
	vec_f32 v = vec_splat(-INFINITY);
	if (at < count)
		v = vec_load_part(OPD_f32, scores, at, count - at, 0.0f) * vec_splat(scale);
	for (size_t i = count > at ? count - at : 0; i < VEC_LANES; i++)
		v[i] = -INFINITY;
	return v;
}

/* Up to VEC_LANES rows. First their maxima, then their weights, which don't wait for each other's; e^x of what older weights shrink by is made of all rows at once. */
VEC_INLINE void attend_weigh_some(float *scores, size_t rows, size_t count, float scale, struct cpu_attend_row *state, float *shrinks)
{
	vec_f32 shrinking = vec_splat(0.0f), shrink;
	bool steady[VEC_LANES];
	for (size_t r = 0; r < rows; r++) {
		const float before = state[r].maximum;
		vec_f32 highest = vec_splat(before);
		for (size_t at = 0; at < CPU_ATTEND_KEYS; at += VEC_LANES)
			highest = vec_max(attend_scaled(scores + r * CPU_ATTEND_KEYS, at, count, scale), highest);
		state[r].maximum = vec_highest(highest);
		shrinking[r] = before - attend_shift(state[r].maximum);
		steady[r] = before == state[r].maximum && before - before == 0.0f;
	}
	shrink = vec_exp(shrinking);
	for (size_t r = 0; r < rows; r++) {
		const vec_f32 shift = vec_splat(attend_shift(state[r].maximum));
		vec_f32 total = vec_splat(0.0f);
		for (size_t at = 0; at < CPU_ATTEND_KEYS; at += VEC_LANES) {
			vec_f32 e = vec_exp(attend_scaled(scores + r * CPU_ATTEND_KEYS, at, count, scale) - shift);
			vec_store(OPD_f32, scores + r * CPU_ATTEND_KEYS, at, e);
			total = total + e;
		}
		shrinks[r] = steady[r] ? 1.0f : shrink[r];
		state[r].sum = state[r].sum * shrinks[r] + vec_sum(total);
	}
}

static void attend_weigh(float *scores, size_t rows, size_t count, float scale, struct cpu_attend_row *state, float *shrinks)
{
	for (size_t r = 0; r < rows; r += VEC_LANES) {
		const size_t here = rows - r < VEC_LANES ? rows - r : VEC_LANES;
		if (count == CPU_ATTEND_KEYS)
			attend_weigh_some(scores + r * CPU_ATTEND_KEYS, here, CPU_ATTEND_KEYS, scale, state + r, shrinks + r);
		else
			attend_weigh_some(scores + r * CPU_ATTEND_KEYS, here, count, scale, state + r, shrinks + r);
	}
}

/* ---- Values ------------------------------------------------------------------------------------------------------------- */

/* Two vectors' worth of values lie in a result as vec_load_pair hands them over: of bf16 the even ones, then the odd ones. So no value is put back to its place before attend_finish;
 * what remains of a head after whole pairs lies as it is. */

/* Rows r < rows, `vectors` vectors (a constant of the caller, as rows is: 1, or even) of their values from element `at` on. shrinks: NULL for none. */
VEC_INLINE void attend_mix_block(opd_dtype dtype, const float *weights, const float *shrinks, size_t rows, size_t vectors, size_t padded,
                                 const struct cpu_attend_run *run, size_t at, bool ahead, float *mixed)
{
	vec_f32 sums[ROWS * VECTORS];
	for (size_t r = 0; r < rows; r++)
		for (size_t v = 0; v < vectors; v++)
			sums[r * vectors + v] = vec_load(OPD_f32, mixed + r * padded, at + v * VEC_LANES);
	for (size_t r = 0; shrinks != NULL && r < rows; r++)
		for (size_t v = 0; v < vectors; v++)
			sums[r * vectors + v] = sums[r * vectors + v] * vec_splat(shrinks[r]);
	for (size_t j = 0; j < run->count; j++) {
		vec_f32 w[ROWS];
		for (size_t r = 0; r < rows; r++)
			w[r] = vec_splat(weights[r * CPU_ATTEND_KEYS + j]);
		const unsigned char *row = attend_row(run, j), *later = attend_later(run, j, ahead);
		for (size_t v = 0; v < vectors; v += 2) {
			const size_t d = at + v * VEC_LANES, size = opd_dtype_bytes(dtype);
			struct vec_pair x = vectors == 1 ? (struct vec_pair){{vec_load(dtype, row, d)}} : vec_load_pair(dtype, row, d);
			for (size_t p = 0; p < 2 && v + p < vectors; p++) {
				if (ahead)
					attend_prefetch(later, (d + p * VEC_LANES) * size);
				for (size_t r = 0; r < rows; r++)
					sums[r * vectors + v + p] = vec_fma(w[r], x.v[p], sums[r * vectors + v + p]);
			}
		}
	}
	for (size_t r = 0; r < rows; r++)
		for (size_t v = 0; v < vectors; v++)
			vec_store(OPD_f32, mixed + r * padded, at + v * VEC_LANES, sums[r * vectors + v]);
}

VEC_INLINE void attend_mix_rows(opd_dtype dtype, const float *weights, const float *shrinks, size_t rows, size_t vectors, size_t padded,
                                const struct cpu_attend_run *run, bool ahead, float *mixed)
{
	size_t at = 0;
	for (; at + vectors * VEC_LANES <= padded; at += vectors * VEC_LANES)
		attend_mix_block(dtype, weights, shrinks, rows, vectors, padded, run, at, ahead, mixed);
	for (; vectors > 2 && at + 2 * VEC_LANES <= padded; at += 2 * VEC_LANES)
		attend_mix_block(dtype, weights, shrinks, rows, 2, padded, run, at, ahead, mixed);
	for (; at < padded; at += VEC_LANES)
		attend_mix_block(dtype, weights, shrinks, rows, 1, padded, run, at, ahead, mixed);
}

VEC_INLINE void attend_mix(opd_dtype dtype, const float *weights, const float *shrinks, size_t rows, size_t padded,
                           const struct cpu_attend_run *run, bool ahead, float *mixed)
{
	size_t r = 0;
	for (; r + ROWS <= rows; r += ROWS)
		attend_mix_rows(dtype, weights + r * CPU_ATTEND_KEYS, shrinks == NULL ? NULL : shrinks + r, ROWS, VECTORS, padded, run, ahead, mixed + r * padded);
	for (; r < rows; r++)
		attend_mix_rows(dtype, weights + r * CPU_ATTEND_KEYS, shrinks == NULL ? NULL : shrinks + r, 1, 2 * VECTORS, padded, run, ahead, mixed + r * padded);
}

VEC_INLINE void attend_mix_joined(opd_dtype dtype, const float *weights, const float *shrinks, size_t heads, size_t rows, size_t padded,
                                  const struct cpu_attend_run *run, uint64_t head_bytes, float *mixed)
{
	const size_t joined = attend_together(dtype, rows);
	for (size_t j = 0; j < run->count; j += joined) {
		for (size_t h = 0; h < heads; h++) {
			struct cpu_attend_run values = attend_joined(run, j, joined, h * head_bytes);
			attend_mix(dtype, weights + h * rows * CPU_ATTEND_KEYS + j, j == 0 ? shrinks + h * rows : NULL, rows, padded, &values,
			           attend_asks(dtype, rows), mixed + h * rows * padded);
		}
	}
}

VEC_INLINE void attend_mix_heads(opd_dtype dtype, const float *weights, const float *shrinks, size_t heads, size_t rows, size_t padded,
                                 const struct cpu_attend_run *run, uint64_t head_bytes, float *mixed)
{
	if (rows == 1 && padded == USUAL)
		attend_mix_joined(dtype, weights, shrinks, heads, 1, USUAL, run, head_bytes, mixed);
	else if (rows == ROWS && padded == USUAL)
		attend_mix_joined(dtype, weights, shrinks, heads, ROWS, USUAL, run, head_bytes, mixed);
	else
		attend_mix_joined(dtype, weights, shrinks, heads, rows, padded, run, head_bytes, mixed);
}

/* Up to VEC_LANES rows: what both sides shrink by is made of all of them at once. */
static void attend_merge_some(struct cpu_attend_row *to, float *mixed, const struct cpu_attend_row *part, const float *part_mixed, size_t rows, size_t padded)
{
	vec_f32 keep = vec_splat(0.0f), add = vec_splat(0.0f);
	for (size_t r = 0; r < rows; r++) {
		const float maximum = part[r].maximum > to[r].maximum ? part[r].maximum : to[r].maximum;
		keep[r] = to[r].maximum - attend_shift(maximum);
		add[r] = part[r].maximum - attend_shift(maximum);
		to[r].maximum = maximum;
	}
	keep = vec_exp(keep);
	add = vec_exp(add);
	for (size_t r = 0; r < rows; r++, mixed += padded, part_mixed += padded) {
		const vec_f32 old = vec_splat(keep[r]), new = vec_splat(add[r]);
		to[r].sum = to[r].sum * keep[r] + part[r].sum * add[r];
		for (size_t d = 0; d < padded; d += VEC_LANES)
			vec_store(OPD_f32, mixed, d, vec_fma(vec_load(OPD_f32, part_mixed, d), new, vec_load(OPD_f32, mixed, d) * old));
	}
}

static void attend_merge(struct cpu_attend_row *to, float *mixed, const struct cpu_attend_row *part, const float *part_mixed, size_t rows, size_t padded)
{
	for (size_t r = 0; r < rows; r += VEC_LANES)
		attend_merge_some(to + r, mixed + r * padded, part + r, part_mixed + r * padded, rows - r < VEC_LANES ? rows - r : VEC_LANES, padded);
}

/* ---- Rows in and out ------------------------------------------------------------------------------------------------------ */

VEC_INLINE void attend_pack(opd_dtype dtype, const struct cpu_attend_run *run, size_t head_size, size_t padded, float *to)
{
	for (size_t j = 0; j < run->count; j++, to += padded) {
		const void *row = attend_row(run, j);
		size_t d = 0;
		for (; d + VEC_LANES <= head_size; d += VEC_LANES)
			vec_store(OPD_f32, to, d, vec_load(dtype, row, d));
		if (d < head_size)
			vec_store(OPD_f32, to, d, vec_load_part(dtype, row, d, head_size - d, 0.0f));
	}
}

VEC_INLINE vec_f32 attend_mean(const float *mixed, size_t d, float sum)
{
	return vec_one_nan(vec_load(OPD_f32, mixed, d) / vec_splat(sum));
}

VEC_INLINE void attend_finish(opd_dtype dtype, const float *mixed, float sum, bool pairs, void *y, size_t head_size)
{
	size_t d = 0;
	for (; pairs && d + 2 * VEC_LANES <= head_size; d += 2 * VEC_LANES)
		vec_store_pair(dtype, y, d, (struct vec_pair){{attend_mean(mixed, d, sum), attend_mean(mixed, d + VEC_LANES, sum)}});
	for (; d < head_size; d += VEC_LANES) {
		size_t here = head_size - d < VEC_LANES ? head_size - d : VEC_LANES;
		vec_store_part(dtype, y, d, here, attend_mean(mixed, d, sum));
	}
}

#define X(name)                                                                                                                \
	static void attend_pack_##name(const struct cpu_attend_run *run, size_t head_size, size_t padded, float *to)               \
	{                                                                                                                          \
		attend_pack(OPD_##name, run, head_size, padded, to);                                                                   \
	}                                                                                                                          \
	static void attend_scores_##name(const float *query, size_t rows, size_t padded, const struct cpu_attend_run *run,         \
	                                 float *scores)                                                                            \
	{                                                                                                                          \
		attend_scores(OPD_##name, query, rows, padded, run, false, scores);                                                          \
	}                                                                                                                          \
	static void attend_mix_##name(const float *weights, const float *shrinks, size_t rows, size_t padded,                      \
	                              const struct cpu_attend_run *run, float *mixed)                                              \
	{                                                                                                                          \
		attend_mix(OPD_##name, weights, shrinks, rows, padded, run, false, mixed);                                                   \
	}                                                                                                                          \
	static void attend_scores_heads_##name(const float *query, size_t heads, size_t rows, size_t padded,                       \
	                                       const struct cpu_attend_run *run, uint64_t head_bytes, float *scores)               \
	{                                                                                                                          \
		attend_scores_heads(OPD_##name, query, heads, rows, padded, run, head_bytes, scores);                                  \
	}                                                                                                                          \
	static void attend_mix_heads_##name(const float *weights, const float *shrinks, size_t heads, size_t rows, size_t padded,  \
	                                    const struct cpu_attend_run *run, uint64_t head_bytes, float *mixed)                   \
	{                                                                                                                          \
		attend_mix_heads(OPD_##name, weights, shrinks, heads, rows, padded, run, head_bytes, mixed);                           \
	}                                                                                                                          \
	static void attend_finish_##name(const float *mixed, float sum, bool pairs, void *y, size_t head_size)                     \
	{                                                                                                                          \
		attend_finish(OPD_##name, mixed, sum, pairs, y, head_size);                                                            \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_attend_kernels CPU_SYMBOL(cpu_attend) = {
	.lanes = VEC_LANES,
	.pack = {attend_pack_f32, attend_pack_bf16, attend_pack_f16},
	.scores = {attend_scores_f32, attend_scores_bf16, attend_scores_f16},
	.scores_heads = {attend_scores_heads_f32, attend_scores_heads_bf16, attend_scores_heads_f16},
#if defined(__AVX512BF16__)
	.scores_pairs = attend_scores_pairs,
	.pairs_lose = attend_pairs_lose,
#endif
	.weigh = attend_weigh,
	.mix = {attend_mix_f32, attend_mix_bf16, attend_mix_f16},
	.mix_heads = {attend_mix_heads_f32, attend_mix_heads_bf16, attend_mix_heads_f16},
	.merge = attend_merge,
	.finish = {attend_finish_f32, attend_finish_bf16, attend_finish_f16},
};
