/* matmul: a register tile over packed f32, and one row against rows of b where they lie: compiled once for each instruction set (kernels.h).
 *
 * An element's sum has one order on both ways: per block of CPU_MATMUL_BLOCK k one chain of FMAs that starts at 0, and the blocks' sums one after another. NaN
 * gets its one form at the end (linear's finish). */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

#define TILE_VECTORS 2
#if defined(VEC_AVX512)
#define TILE_ROWS 12 /* 24 sums, 2 of b, 1 of a: of 32 registers */
#elif defined(VEC_AVX2)
#define TILE_ROWS 6 /* 12 + 2 + 1: of 16 */
#else
#define TILE_ROWS 4 /* 8 + 2 + 1 and what a product needs without FMA: of 16 */
#endif

static void matmul_tile(const float *a, size_t a_lead, const float *b, size_t b_lead, size_t depth, float *sums, size_t stride)
{
	vec_f32 chains[TILE_ROWS][TILE_VECTORS];
	for (size_t m = 0; m < TILE_ROWS; m++)
		for (size_t n = 0; n < TILE_VECTORS; n++)
			chains[m][n] = vec_splat(0.0f);
	for (size_t k = 0; k < depth; k++) {
		vec_f32 w[TILE_VECTORS];
		for (size_t n = 0; n < TILE_VECTORS; n++)
			w[n] = vec_load(OPD_f32, b, k * b_lead + n * VEC_LANES);
		for (size_t m = 0; m < TILE_ROWS; m++) {
			vec_f32 v = vec_splat(a[m * a_lead + k]);
			for (size_t n = 0; n < TILE_VECTORS; n++)
				chains[m][n] = vec_fma(v, w[n], chains[m][n]);
		}
	}
	for (size_t m = 0; m < TILE_ROWS; m++)
		for (size_t n = 0; n < TILE_VECTORS; n++)
			vec_store(OPD_f32, sums, m * stride + n * VEC_LANES, vec_load(OPD_f32, sums, m * stride + n * VEC_LANES) + chains[m][n]);
}

/* Rows of b that one pass over the sums takes: as many streams of memory. */
#define STREAMS 8

VEC_INLINE vec_f32 matmul_load(opd_dtype dtype, const void *memory, size_t at, size_t count)
{
	return count == VEC_LANES ? vec_load(dtype, memory, at) : vec_load_part(dtype, memory, at, count, 0.0f);
}

/* block [columns rounded up to whole vectors] += a[k] · row k of b, for `streams` (a constant of the caller) k. */
VEC_INLINE void matmul_streams(opd_dtype dtype, const float *a, const unsigned char *b, int64_t row_bytes, size_t streams, size_t columns,
                               float *block)
{
	vec_f32 v[STREAMS];
	for (size_t k = 0; k < streams; k++)
		v[k] = vec_splat(a[k]);
	for (size_t n = 0; n < columns; n += VEC_LANES) {
		size_t here = columns - n < VEC_LANES ? columns - n : VEC_LANES;
		vec_f32 sum = vec_load(OPD_f32, block, n);
		for (size_t k = 0; k < streams; k++)
			sum = vec_fma(v[k], matmul_load(dtype, b + (int64_t)k * row_bytes, n, here), sum);
		vec_store(OPD_f32, block, n, sum);
	}
}

VEC_INLINE void matmul_row(opd_dtype dtype, const float *a, const void *b, int64_t stride, size_t depth, size_t columns, float *sums)
{
	float block[CPU_MATMUL_COLUMNS] = {0};
	const unsigned char *row = b;
	const int64_t row_bytes = stride * (int64_t)opd_dtype_bytes(dtype);
	size_t k = 0;
	for (; k + STREAMS <= depth; k += STREAMS)
		matmul_streams(dtype, a + k, row + (int64_t)k * row_bytes, row_bytes, STREAMS, columns, block);
	for (; k < depth; k++)
		matmul_streams(dtype, a + k, row + (int64_t)k * row_bytes, row_bytes, 1, columns, block);
	for (size_t n = 0; n < columns; n++)
		sums[n] += block[n];
}

#define X(name)                                                                                                               \
	static void matmul_row_##name(const float *a, const void *b, int64_t stride, size_t depth, size_t columns, float *sums)   \
	{                                                                                                                         \
		matmul_row(OPD_##name, a, b, stride, depth, columns, sums);                                                           \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_matmul_kernels CPU_SYMBOL(cpu_matmul) = {
	.tile_rows = TILE_ROWS,
	.tile_columns = TILE_VECTORS * VEC_LANES,
	.tile = matmul_tile,
	.row = {matmul_row_f32, matmul_row_bf16, matmul_row_f16},
};
