/* linear: dot products of one row, and register tiles over packed blocks: compiled once for each instruction set (kernels.h).
 *
 * Every sum is made in the same order on both ways: per block of CPU_LINEAR_BLOCK k, lane l takes k = l, l + VEC_LANES, … by FMA; the lanes
 * are folded by vec_sum; the blocks' sums are added in order. Zeros that pad a block change nothing: a chain that starts at +0 never
 * becomes −0, so +0 may be added to it. NaN has one form in results, since its sign and payload would tell the ways apart. */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* Rows of weight that one pass over x reads side by side: enough chains to hide FMA's latency, few enough streams for the prefetcher. */
#define DOTS 8

#if defined(VEC_AVX512)
#define TILE_ROWS 4 /* 24 sums, 4 of x, 1 to 2 of weight: of 32 registers */
#define TILE_COLUMNS 6
#elif defined(VEC_AVX2)
#define TILE_ROWS 3 /* 12 + 3 + 1: of 16 */
#define TILE_COLUMNS 4
#else
#define TILE_ROWS 2 /* 8 + 2 + 1 and what a product needs without FMA: of 16 */
#define TILE_COLUMNS 4
#endif

/* How far ahead weights are asked for, a line at a time: the processor's own prefetcher stops at each row's page borders. By itself, 4096 x 4096 f32 on two Zen 5 threads: 770 to 627 us,
 * for which plain reading takes 730; twice as far, or half as many rows side by side, lose. */
#define LINE_BYTES 64
#define AHEAD_BYTES 1024

/* chains[j] += x · row j of weight, over elements [at, at + vectors · VEC_LANES); columns and vectors are constants of the caller. */
VEC_INLINE void linear_vectors(opd_dtype dtype, const void *x, const void *const *rows, size_t columns, size_t at, size_t vectors, vec_f32 *chains)
{
	for (size_t end = at + vectors * VEC_LANES; at < end; at += VEC_LANES) {
		vec_f32 v = vec_load(dtype, x, at);
		for (size_t j = 0; j < columns; j++)
			chains[j] = vec_fma(v, vec_load(dtype, rows[j], at), chains[j]);
	}
}

/* sums[j] += x [count] · row j of weight, one block, j < columns (a constant of the caller, as ahead is). */
VEC_INLINE void linear_block(opd_dtype dtype, const void *x, const void *const *rows, size_t columns, size_t from, size_t count,
                             bool ahead, float *sums)
{
	vec_f32 chains[DOTS];
	for (size_t j = 0; j < columns; j++)
		chains[j] = vec_splat(0.0f);
	const size_t bytes = opd_dtype_bytes(dtype), line = LINE_BYTES / bytes;
	size_t k = 0;
	for (; k + line <= count; k += line) {
		linear_vectors(dtype, x, rows, columns, from + k, line / VEC_LANES, chains);
		for (size_t j = 0; ahead && j < columns; j++)
			__builtin_prefetch((const unsigned char *)rows[j] + (from + k) * bytes + AHEAD_BYTES, 0, 3);
	}
	for (; k + VEC_LANES <= count; k += VEC_LANES)
		linear_vectors(dtype, x, rows, columns, from + k, 1, chains);
	if (k < count) {
		vec_f32 v = vec_load_part(dtype, x, from + k, count - k, 0.0f);
		for (size_t j = 0; j < columns; j++)
			chains[j] = vec_fma(v, vec_load_part(dtype, rows[j], from + k, count - k, 0.0f), chains[j]);
	}
	for (size_t j = 0; j < columns; j++)
		sums[j] += vec_sum(chains[j]);
}

VEC_INLINE void linear_dots_some(opd_dtype dtype, const void *x, const void *weight, int64_t stride, size_t k, size_t columns,
                                 bool ahead, float *sums)
{
	const void *rows[DOTS];
	for (size_t j = 0; j < columns; j++) {
		rows[j] = (const unsigned char *)weight + (int64_t)j * stride * (int64_t)opd_dtype_bytes(dtype);
		sums[j] = 0.0f;
	}
	for (size_t from = 0; from < k; from += CPU_LINEAR_BLOCK)
		linear_block(dtype, x, rows, columns, from, k - from < CPU_LINEAR_BLOCK ? k - from : CPU_LINEAR_BLOCK, ahead, sums);
}

VEC_INLINE void linear_dots(opd_dtype dtype, const void *x, const void *weight, int64_t stride, size_t k, size_t columns, bool ahead, float *sums)
{
	const unsigned char *row = weight;
	int64_t step = stride * (int64_t)opd_dtype_bytes(dtype);
	size_t n = 0;
	for (; n + DOTS <= columns; n += DOTS)
		linear_dots_some(dtype, x, row + (int64_t)n * step, stride, k, DOTS, ahead, sums + n);
	for (; n < columns; n++)
		linear_dots_some(dtype, x, row + (int64_t)n * step, stride, k, 1, ahead, sums + n);
}

VEC_INLINE void linear_pack(opd_dtype dtype, const void *source, size_t count, size_t padded, float *packed)
{
	size_t k = 0;
	for (; k + VEC_LANES <= count; k += VEC_LANES)
		vec_store(OPD_f32, packed, k, vec_load(dtype, source, k));
	if (k < count) {
		vec_store(OPD_f32, packed, k, vec_load_part(dtype, source, k, count - k, 0.0f));
		k += VEC_LANES;
	}
	for (; k < padded; k += VEC_LANES)
		vec_store(OPD_f32, packed, k, vec_splat(0.0f));
}

VEC_INLINE void linear_finish(opd_dtype dtype, const float *sums, const void *bias, void *y, size_t count)
{
	size_t n = 0;
	for (; n < count; n += VEC_LANES) {
		size_t here = count - n < VEC_LANES ? count - n : VEC_LANES;
		vec_f32 v = vec_load_part(OPD_f32, sums, n, here, 0.0f);
		if (bias != NULL)
			v = v + vec_load_part(dtype, bias, n, here, 0.0f);
		vec_store_part(dtype, y, n, here, vec_one_nan(v));
	}
}

static void linear_tile(const float *x, const float *weight, size_t padded, float *sums, size_t stride)
{
	vec_f32 chains[TILE_ROWS][TILE_COLUMNS];
	for (size_t m = 0; m < TILE_ROWS; m++)
		for (size_t n = 0; n < TILE_COLUMNS; n++)
			chains[m][n] = vec_splat(0.0f);
	for (size_t k = 0; k < padded; k += VEC_LANES) {
		vec_f32 v[TILE_ROWS];
		for (size_t m = 0; m < TILE_ROWS; m++)
			v[m] = vec_load(OPD_f32, x, m * padded + k);
		for (size_t n = 0; n < TILE_COLUMNS; n++) {
			vec_f32 w = vec_load(OPD_f32, weight, n * padded + k);
			for (size_t m = 0; m < TILE_ROWS; m++)
				chains[m][n] = vec_fma(v[m], w, chains[m][n]);
		}
	}
	for (size_t m = 0; m < TILE_ROWS; m++)
		for (size_t n = 0; n < TILE_COLUMNS; n++)
			sums[m * stride + n] += vec_sum(chains[m][n]);
}

#if defined(__AVX512BF16__)
/* Elements of one instruction: of each of 16 lanes, two neighbours. */
#define PAIRED 32
/* 24 sums, 4 of x, 1 to 2 of weight, as a tile has; a row or two have more streams of weight instead. */
#define PAIR_COLUMNS 6
#define PAIR_COLUMNS_FEW 8

VEC_INLINE __m512bh linear_pair_load(const void *row, size_t at, size_t count)
{
	const uint16_t *from = (const uint16_t *)row + at;
	return count >= PAIRED ? (__m512bh)_mm512_loadu_si512(from) : (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
}

/* chains[m][n] += one pair a lane; rows and columns are constants of the caller. */
VEC_INLINE void linear_pair_step(const void *const *x, size_t rows, const void *const *weights, size_t columns, size_t at, size_t count,
                                 __m512 chains[CPU_LINEAR_PAIR_ROWS][PAIR_COLUMNS_FEW])
{
	__m512bh v[CPU_LINEAR_PAIR_ROWS];
	for (size_t m = 0; m < rows; m++)
		v[m] = linear_pair_load(x[m], at, count);
	for (size_t n = 0; n < columns; n++) {
		__m512bh w = linear_pair_load(weights[n], at, count);
		for (size_t m = 0; m < rows; m++)
			chains[m][n] = _mm512_dpbf16_ps(chains[m][n], v[m], w);
	}
}

VEC_INLINE void linear_pair_tile(const void *const *x, size_t rows, const void *weight, int64_t stride, size_t columns, size_t k, bool ahead, float *sums,
                                 size_t sums_stride)
{
	const void *weights[PAIR_COLUMNS_FEW];
	__m512 chains[CPU_LINEAR_PAIR_ROWS][PAIR_COLUMNS_FEW];
	for (size_t n = 0; n < columns; n++) {
		weights[n] = (const unsigned char *)weight + (int64_t)n * stride * (int64_t)sizeof(uint16_t);
		for (size_t m = 0; m < rows; m++)
			chains[m][n] = _mm512_setzero_ps();
	}
	size_t at = 0;
	for (; at + PAIRED <= k; at += PAIRED) {
		linear_pair_step(x, rows, weights, columns, at, PAIRED, chains);
		for (size_t n = 0; ahead && n < columns; n++)
			__builtin_prefetch((const unsigned char *)weights[n] + at * sizeof(uint16_t) + AHEAD_BYTES, 0, 3);
	}
	if (at < k)
		linear_pair_step(x, rows, weights, columns, at, k - at, chains);
	for (size_t m = 0; m < rows; m++)
		for (size_t n = 0; n < columns; n++)
			sums[m * sums_stride + n] = vec_sum((vec_f32)chains[m][n]);
}

VEC_INLINE void linear_pair_rows(const void *const *x, size_t rows, const void *weight, int64_t stride, size_t columns, size_t wide, size_t k, bool ahead, float *sums,
                                 size_t sums_stride)
{
	const unsigned char *row = weight;
	const int64_t step = stride * (int64_t)sizeof(uint16_t);
	size_t n = 0;
	for (; n + wide <= columns; n += wide)
		linear_pair_tile(x, rows, row + (int64_t)n * step, stride, wide, k, ahead, sums + n, sums_stride);
	for (; n < columns; n++)
		linear_pair_tile(x, rows, row + (int64_t)n * step, stride, 1, k, ahead, sums + n, sums_stride);
}

static void linear_pairs(const void *const *x, size_t rows, const void *weight, int64_t stride, size_t columns, size_t k, bool ahead, float *sums, size_t sums_stride)
{
	if (rows == 4)
		linear_pair_rows(x, 4, weight, stride, columns, PAIR_COLUMNS, k, ahead, sums, sums_stride);
	else if (rows == 3)
		linear_pair_rows(x, 3, weight, stride, columns, PAIR_COLUMNS, k, ahead, sums, sums_stride);
	else if (rows == 2)
		linear_pair_rows(x, 2, weight, stride, columns, PAIR_COLUMNS_FEW, k, ahead, sums, sums_stride);
	else
		linear_pair_rows(x, 1, weight, stride, columns, PAIR_COLUMNS_FEW, k, ahead, sums, sums_stride);
}
#else
#define linear_pairs NULL
#endif

#define LINEAR_MAP(X) X(f32) X(bf16) X(f16)

#define X(name)                                                                                                               \
	static void linear_dots_##name(const void *x, const void *weight, int64_t stride, size_t k, size_t columns, bool ahead,   \
	                               float *sums)                                                                               \
	{                                                                                                                         \
		if (ahead)                                                                                                            \
			linear_dots(OPD_##name, x, weight, stride, k, columns, true, sums);                                               \
		else                                                                                                                  \
			linear_dots(OPD_##name, x, weight, stride, k, columns, false, sums);                                              \
	}                                                                                                                         \
	static void linear_pack_##name(const void *source, size_t count, size_t padded, float *packed)                            \
	{                                                                                                                         \
		linear_pack(OPD_##name, source, count, padded, packed);                                                               \
	}                                                                                                                         \
	static void linear_finish_##name(const float *sums, const void *bias, void *y, size_t count)                              \
	{                                                                                                                         \
		linear_finish(OPD_##name, sums, bias, y, count);                                                                      \
	}
LINEAR_MAP(X)
#undef X

const struct cpu_linear_kernels CPU_SYMBOL(cpu_linear) = {
	.tile_rows = TILE_ROWS,
	.tile_columns = TILE_COLUMNS,
	.dots = {linear_dots_f32, linear_dots_bf16, linear_dots_f16},
	.pack = {linear_pack_f32, linear_pack_bf16, linear_pack_f16},
	.finish = {linear_finish_f32, linear_finish_bf16, linear_finish_f16},
	.tile = linear_tile,
	.pairs = linear_pairs,
};
