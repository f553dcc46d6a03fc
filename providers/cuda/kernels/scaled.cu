/* scaled_mm of f8 with few rows of a: the time is that of reading b once.
 *
 * As linear.cu: rows of b are the matrix unit's rows (A), read 16 bytes at a time straight into its registers, rows of a its columns (B). A block takes 16 rows of b; its warps share
 * the depth and add up at the end, always in one order: the bits of a row of a don't depend on the others. Where the unit has no e4m3, elements become f16, which holds them exactly.
 * Asking for b before behind_wait, as linear.cu does, is slower here (8.9 us against 7.9 for 16 rows of 4096 by 4096): all of a warp's reads are on their way at once anyway. */
#include "providers/cuda/kernels/mma.cuh"

enum { WARPS = 8, COLUMNS = 16, STEP = 128 /* of the depth, a warp's turn */, TURNS_AT_ONCE = 4, TILE_ROWS = 8 };

static __device__ __forceinline__ uint32_t halves_of(uint32_t four, bool high)
{
	const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(high ? four >> 16 : four), __NV_E4M3);
	return (uint32_t)pair.x | (uint32_t)pair.y << 16;
}

/* 4 elements of k of rows g and g + 8 of b. */
[[maybe_unused]] static __device__ __forceinline__ void products_f16(float (&c)[4], uint32_t low, uint32_t high, uint32_t x)
{
	const uint32_t a[4] = {halves_of(low, false), halves_of(high, false), halves_of(low, true), halves_of(high, true)};
	mma<__half>(c, a, halves_of(x, false), halves_of(x, true));
}

[[maybe_unused]] static __device__ __forceinline__ void products_f8(float (&c)[4], uint32_t low0, uint32_t high0, uint32_t low1, uint32_t high1, uint32_t x0, uint32_t x1)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
	asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	             : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(x0), "r"(x1));
#else
	products_f16(c, low0, high0, x0);
	products_f16(c, low1, high1, x1);
#endif
}

static __device__ __forceinline__ void products(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &x)
{
	products_f8(c, low.x, high.x, low.y, high.y, x.x, x.y);
	products_f8(c, low.z, high.z, low.w, high.w, x.z, x.w);
}

static __device__ __forceinline__ uint4 words_at(const uint8_t *row, int64_t at, int64_t depth, bool there)
{
	return there && at < depth ? *reinterpret_cast<const uint4 *>(row + at) : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ uint4 words_once(const uint8_t *row, int64_t at, int64_t depth)
{
	uint4 words = make_uint4(0, 0, 0, 0);
	if (at < depth) {
		pack<uint8_t, 16> values = load_once<16>(row + at);
		words = *reinterpret_cast<uint4 *>(&values);
	}
	return words;
}

template <class T> static __device__ __forceinline__ float result_of(const cuda_scaled_call &call, float sum, int row, int64_t column)
{
	sum = sum * call.scale_a[row * call.scale_a_stride] * call.scale_b[column * call.scale_b_stride];
	return call.bias == NULL ? sum : sum + to_f32(((const T *)call.bias)[column * call.bias_stride]);
}

/* TILES: of 8 rows of a. */
template <class T, int TILES> static __global__ void __launch_bounds__(WARPS * 32, 2) scaled_matrix(const __grid_constant__ cuda_scaled_call call)
{
	__shared__ mma_shares<WARPS, TILES * TILE_ROWS> shares;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const int64_t column = (int64_t)blockIdx.x * COLUMNS, last = call.columns - 1;
	const int64_t low_column = column + g < last ? column + g : last, high_column = column + g + 8 < last ? column + g + 8 : last;
	const uint8_t *low = (const uint8_t *)call.b + low_column * call.b_stride, *high = (const uint8_t *)call.b + high_column * call.b_stride;
	float c[TILES][4] = {};
	behind_wait();
	for (int64_t from = (int64_t)warp * STEP; from < call.depth; from += WARPS * STEP * TURNS_AT_ONCE) {
		uint4 b[TURNS_AT_ONCE][2][2];
#pragma unroll
		for (int i = 0; i < TURNS_AT_ONCE; i++)
#pragma unroll
			for (int h = 0; h < 2; h++) {
				const int64_t at = from + (int64_t)i * WARPS * STEP + h * (STEP / 2) + t * 16;
				b[i][h][0] = words_once(low, at, call.depth);
				b[i][h][1] = words_once(high, at, call.depth);
			}
#pragma unroll
		for (int tile = 0; tile < TILES; tile++) {
			const int row = tile * TILE_ROWS + g;
			const uint8_t *a = (const uint8_t *)call.a + (row < call.rows ? row : 0) * call.a_stride;
			uint4 x[TURNS_AT_ONCE][2];
#pragma unroll
			for (int i = 0; i < TURNS_AT_ONCE; i++)
#pragma unroll
				for (int h = 0; h < 2; h++)
					x[i][h] = words_at(a, from + (int64_t)i * WARPS * STEP + h * (STEP / 2) + t * 16, call.depth, row < call.rows);
#pragma unroll
			for (int i = 0; i < TURNS_AT_ONCE; i++)
#pragma unroll
				for (int h = 0; h < 2; h++)
					products(c[tile], b[i][h][0], b[i][h][1], x[i][h]);
		}
	}
#pragma unroll
	for (int tile = 0; tile < TILES; tile++)
		shares.put(warp, tile, c[tile]);
	__syncthreads();
	const int offset = threadIdx.x % COLUMNS, row = threadIdx.x / COLUMNS;
	if (row >= call.rows || column + offset > last)
		return;
	const float sum = shares.sum(offset, row);
	((T *)call.y)[row * call.columns + column + offset] = from_f32<T>(result_of<T>(call, sum, row, column + offset));
}

int cuda_scaled_launch(const struct cuda_scaled_call *call, cudaStream_t stream)
{
	const unsigned grid = (unsigned)((call->columns + COLUMNS - 1) / COLUMNS);
	CUDA_BY_DTYPE(call->dtype, T,
	              if (call->rows <= TILE_ROWS) launch_behind(scaled_matrix<T, 1>, grid, WARPS * 32, stream, *call);
	              else launch_behind(scaled_matrix<T, 2>, grid, WARPS * 32, stream, *call));
	return launched();
}
