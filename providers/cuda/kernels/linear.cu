/* linear with few rows: the time is that of reading the weights once.
 *
 * f16 and bf16 on the matrix unit: the weights are its rows (A), read 16 bytes at a time straight into its registers, and x its columns (B). A block takes 16 weight rows; its
 * warps share the depth and add up at the end, always in one order: the bits of a row of x don't depend on the others. f32 (no TF32), and what 16-byte accesses can't
 * reach, by multiplications of f32. */
#include "providers/cuda/kernels/mma.cuh"

enum { WARPS = 16, COLUMNS = MMA_ROWS, STEP = 64 /* of the depth, a warp's turn */, TURNS_AT_ONCE = 2 };

template <class T> static __device__ __forceinline__ uint4 words_at(const T *row, int64_t at, int64_t depth, bool there)
{
	uint4 words = make_uint4(0, 0, 0, 0);
	if (there && at < depth) {
		pack<T, 8> values = load<8>(row + at);
		words = *reinterpret_cast<uint4 *>(&values);
	}
	return words;
}

template <class T> static __device__ __forceinline__ uint4 weight_words(const T *row, int64_t at, int64_t depth)
{
	return at < depth ? row_words(row + at) : make_uint4(0, 0, 0, 0);
}

template <class T> static __device__ __forceinline__ void products(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &x)
{
	const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
	mma<T>(c, first, x.x, x.y);
	mma<T>(c, second, x.z, x.w);
}

/* A part of what the first turns of the block's warps read of its weights: on their way from memory while the kernel before this one makes x. More of it takes the memory from who reads it now:
 * a step of 8 B parameters took 5.73 ms by 512 elements a row, 5.77 by 1024, 5.83 by 2048, the whole first turn. Blocks that come later have nothing to wait for. */
template <class T> static __device__ __forceinline__ void ask_weights(const cuda_linear_call &call, int64_t column)
{
	enum { DEPTH = 512, AT_ONCE = 2 * 132 };
	if (blockIdx.x < AT_ONCE && threadIdx.x < COLUMNS && column + threadIdx.x < call.columns)
		ask_ahead((const T *)call.weight + (column + threadIdx.x) * call.weight_stride, (uint32_t)(call.depth < DEPTH ? call.depth : DEPTH) * (uint32_t)sizeof(T));
}

template <class T> static __global__ void __launch_bounds__(WARPS * 32, 2) linear_matrix(const __grid_constant__ cuda_linear_call call)
{
	__shared__ mma_shares<WARPS, CUDA_LINEAR_ROWS> shares;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const int64_t column = (int64_t)blockIdx.x * COLUMNS, last = call.columns - 1;
	const int64_t low_column = column + g < last ? column + g : last, high_column = column + g + 8 < last ? column + g + 8 : last;
	const T *low = (const T *)call.weight + low_column * call.weight_stride, *high = (const T *)call.weight + high_column * call.weight_stride;
	const T *x = (const T *)call.x + (g < call.rows ? g : 0) * call.x_stride;
	float c[4] = {0, 0, 0, 0};
	ask_weights<T>(call, column);
	behind_wait();
	for (int64_t from = (int64_t)warp * STEP; from < call.depth; from += WARPS * STEP * TURNS_AT_ONCE) {
		uint4 a[TURNS_AT_ONCE][2][2], b[TURNS_AT_ONCE][2];
#pragma unroll
		for (int i = 0; i < TURNS_AT_ONCE; i++)
#pragma unroll
			for (int h = 0; h < 2; h++) {
				const int64_t at = from + (int64_t)i * WARPS * STEP + h * 32 + t * 8;
				a[i][h][0] = weight_words(low, at, call.depth);
				a[i][h][1] = weight_words(high, at, call.depth);
				b[i][h] = words_at(x, at, call.depth, g < call.rows);
			}
#pragma unroll
		for (int i = 0; i < TURNS_AT_ONCE; i++)
#pragma unroll
			for (int h = 0; h < 2; h++)
				products<T>(c, a[i][h][0], a[i][h][1], b[i][h]);
	}
	shares.put(warp, 0, c);
	__syncthreads();
	const int offset = threadIdx.x % COLUMNS, row = threadIdx.x / COLUMNS;
	if (row >= call.rows || column + offset > last)
		return;
	float sum = shares.sum(offset, row);
	if (call.bias != NULL)
		sum += to_f32(((const T *)call.bias)[(column + offset) * call.bias_stride]);
	((T *)call.y)[row * call.columns + column + offset] = from_f32<T>(sum);
}

/* A warp takes PER_WARP weight rows, and reads UNROLL accesses of each at once. ROWS: at least those of x. */
template <class T, int N, int PER_WARP, int UNROLL, int ROWS> static __global__ void __launch_bounds__(256) linear_lanes(const __grid_constant__ cuda_linear_call call)
{
	const int lane = threadIdx.x % 32;
	const int64_t column = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * PER_WARP;
	float sums[PER_WARP][ROWS] = {};
	behind_wait();
	if (column >= call.columns)
		return;
	for (int64_t from = (int64_t)lane * N; from < call.depth; from += 32 * N * UNROLL) {
		float w[UNROLL][PER_WARP][N];
#pragma unroll
		for (int u = 0; u < UNROLL; u++)
#pragma unroll
			for (int p = 0; p < PER_WARP; p++) {
				const int64_t at = from + u * 32 * N, c = column + p < call.columns ? column + p : call.columns - 1;
				if (at < call.depth)
					load_f32<N>((const T *)call.weight + c * call.weight_stride + at, w[u][p]);
			}
#pragma unroll
		for (int u = 0; u < UNROLL; u++) {
			const int64_t at = from + u * 32 * N;
			if (at >= call.depth)
				continue;
#pragma unroll
			for (int r = 0; r < ROWS; r++) { /* without a branch: a row that isn't there is the last one again, and its sums aren't stored */
				float x[N];
				load_f32<N>((const T *)call.x + (r < call.rows ? r : call.rows - 1) * call.x_stride + at, x);
#pragma unroll
				for (int p = 0; p < PER_WARP; p++)
#pragma unroll
					for (int j = 0; j < N; j++)
						sums[p][r] = fmaf(x[j], w[u][p][j], sums[p][r]);
			}
		}
	}
#pragma unroll
	for (int p = 0; p < PER_WARP; p++)
#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			if (r >= call.rows)
				continue;
			float sum = warp_reduce<sum_of>(sums[p][r]);
			if (lane != 0 || column + p >= call.columns)
				continue;
			if (call.bias != NULL)
				sum += to_f32(((const T *)call.bias)[(column + p) * call.bias_stride]);
			((T *)call.y)[r * call.columns + column + p] = from_f32<T>(sum);
		}
}

template <class T> static bool takes_vectors(const cuda_linear_call *call)
{
	return call->depth % vec_of<T> == 0 && rows_aligned(call->x, call->x_stride, sizeof(T)) && rows_aligned(call->weight, call->weight_stride, sizeof(T));
}

template <class T, int N, int PER_WARP, int UNROLL> static void lanes_launch(const cuda_linear_call *call, cudaStream_t stream)
{
	const unsigned grid = (unsigned)((call->columns + 8 * PER_WARP - 1) / (8 * PER_WARP));
	if (call->rows == 1)
		launch_behind(linear_lanes<T, N, PER_WARP, UNROLL, 1>, grid, 256, stream, *call);
	else if (call->rows <= 4)
		launch_behind(linear_lanes<T, N, PER_WARP, UNROLL, 4>, grid, 256, stream, *call);
	else
		launch_behind(linear_lanes<T, N, PER_WARP, UNROLL, CUDA_LINEAR_ROWS>, grid, 256, stream, *call);
}

template <class T> static void matrix_launch(const cuda_linear_call *call, cudaStream_t stream)
{
	if (takes_vectors<T>(call))
		launch_behind(linear_matrix<T>, (unsigned)((call->columns + COLUMNS - 1) / COLUMNS), WARPS * 32, stream, *call);
	else
		lanes_launch<T, 1, 1, 4>(call, stream);
}

int cuda_linear_launch(const struct cuda_linear_call *call, cudaStream_t stream)
{
	if (call->dtype == CUDA_BF16)
		matrix_launch<__nv_bfloat16>(call, stream);
	else if (call->dtype == CUDA_F16)
		matrix_launch<__half>(call, stream);
	else if (takes_vectors<float>(call))
		lanes_launch<float, 4, 2, 4>(call, stream);
	else
		lanes_launch<float, 1, 1, 4>(call, stream);
	return launched();
}
