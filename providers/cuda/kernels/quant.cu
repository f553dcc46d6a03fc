/* static_quant_fp8, dynamic_quant_fp8. Each step is rounded as the definition rounds it, so that results are exact. */
#include "providers/cuda/kernels/common.cuh"

#define F8_LARGEST 448.0f
#define SCALE_LEAST (1.0f / (448.0f * 512.0f))

static __device__ __forceinline__ uint8_t quantised(float x, float inverse)
{
	/* Saturates, also infinities; a NaN stays one. */
	return (uint8_t)__nv_cvt_float_to_fp8(x * inverse, __NV_SATFINITE, __NV_E4M3);
}

static __device__ __forceinline__ float scale_for(float largest)
{
	float scale = __fdiv_rn(largest, F8_LARGEST);
	return scale > SCALE_LEAST ? scale : SCALE_LEAST;
}

template <int N> static __device__ __forceinline__ void quantise(const float (&v)[N], float inverse, uint8_t *to)
{
	pack<uint8_t, N> q;
#pragma unroll
	for (int j = 0; j < N; j++)
		q.e[j] = quantised(v[j], inverse);
	store(to, q);
}

/* The magnitude, 0 for a NaN. */
static __device__ __forceinline__ float magnitude(float x)
{
	return fmaxf(fabsf(x), 0.0f);
}

template <class T, int PER_THREAD> static __global__ void token_registers(const __grid_constant__ cuda_quant_call call)
{
	constexpr int N = vec_of<T>;
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	float v[PER_THREAD][N], largest = 0;
	if (row >= call.rows)
		return;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < call.hidden)
			load_f32<N>((const T *)call.x + row * call.x_stride + at, v[i]);
	}
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++)
		for (int j = 0; j < N; j++)
			largest = (int)(threadIdx.x + i * blockDim.x) * N < call.hidden ? fmaxf(largest, magnitude(v[i][j])) : largest;
	const float scale = scale_for(row_reduce<max_of>(largest)), inverse = __fdiv_rn(1.0f, scale);
	if (threadIdx.x == 0)
		call.scales_out[row] = scale;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < call.hidden)
			quantise<N>(v[i], inverse, (uint8_t *)call.y + row * call.hidden + at);
	}
}

template <class T, int N> static __global__ void token_passes(const __grid_constant__ cuda_quant_call call)
{
	const int64_t row = blockIdx.x;
	const T *x = (const T *)call.x + row * call.x_stride;
	const int step = (int)blockDim.x * N;
	float v[N], largest = 0;
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++)
			largest = fmaxf(largest, magnitude(v[j]));
	}
	const float scale = scale_for(row_reduce<max_of>(largest)), inverse = __fdiv_rn(1.0f, scale);
	if (threadIdx.x == 0)
		call.scales_out[row] = scale;
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		quantise<N>(v, inverse, (uint8_t *)call.y + row * call.hidden + at);
	}
}

template <class T> static void token_launch(const cuda_quant_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	struct row_grid grid = row_grid_of(call->rows, call->hidden / N);
	bool vectors = call->hidden % N == 0 && rows_aligned(call->x, call->x_stride, sizeof(T)) && aligned16(call->y);
	if (!vectors)
		token_passes<T, 1><<<(unsigned)call->rows, call->hidden >= 1024 ? 256 : 32, 0, stream>>>(*call);
	else if (grid.per_thread == 1)
		token_registers<T, 1><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 2)
		token_registers<T, 2><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 4)
		token_registers<T, 4><<<grid.grid, grid.block, 0, stream>>>(*call);
	else
		token_passes<T, N><<<(unsigned)call->rows, 1024, 0, stream>>>(*call);
}

/* ---- One scale for all of x: rows of `hidden` at a distance ------------------------------------------------------------------- */

template <class T, int N> static __global__ void all_largest(const __grid_constant__ cuda_quant_call call)
{
	const int64_t vectors = call.hidden / N, items = call.rows * vectors;
	float v[N], largest = 0;
	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < items; i += (int64_t)gridDim.x * blockDim.x) {
		load_f32<N>((const T *)call.x + i / vectors * call.x_stride + i % vectors * N, v);
		for (int j = 0; j < N; j++)
			largest = fmaxf(largest, magnitude(v[j]));
	}
	largest = row_reduce<max_of>(largest);
	if (threadIdx.x == 0) /* bits of floats that aren't negative rise with the number */
		atomicMax(call.largest, __float_as_uint(largest));
}

template <class T, int N> static __global__ void all_quantise(const __grid_constant__ cuda_quant_call call)
{
	const int64_t vectors = call.hidden / N, items = call.rows * vectors;
	float v[N], scale;
	if (call.scale != NULL) {
		scale = *call.scale;
	} else {
		scale = scale_for(__uint_as_float(*call.largest));
		if (blockIdx.x == 0 && threadIdx.x == 0)
			*call.scales_out = scale;
	}
	const float inverse = __fdiv_rn(1.0f, scale);
	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < items; i += (int64_t)gridDim.x * blockDim.x) {
		load_f32<N>((const T *)call.x + i / vectors * call.x_stride + i % vectors * N, v);
		quantise<N>(v, inverse, (uint8_t *)call.y + i * N);
	}
}

template <class T, int N> static int all_launch(const cuda_quant_call *call, cudaStream_t stream)
{
	const int64_t blocks = (call->rows * (call->hidden / N) + 255) / 256;
	const unsigned grid = (unsigned)(blocks < 1 ? 1 : blocks > 132 * 16 ? 132 * 16 : blocks);
	if (call->scale == NULL) {
		cudaError_t failed = cudaMemsetAsync(call->largest, 0, sizeof *call->largest, stream);
		if (failed != cudaSuccess)
			return (int)failed;
		all_largest<T, N><<<grid, 256, 0, stream>>>(*call);
	}
	all_quantise<T, N><<<grid, 256, 0, stream>>>(*call);
	return launched();
}

template <class T> static int quant_launch(const cuda_quant_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	if (call->per_token) {
		token_launch<T>(call, stream);
		return launched();
	}
	if (call->hidden % N == 0 && rows_aligned(call->x, call->x_stride, sizeof(T)) && aligned16(call->y))
		return all_launch<T, N>(call, stream);
	return all_launch<T, 1>(call, stream);
}

int cuda_quant_launch(const struct cuda_quant_call *call, cudaStream_t stream)
{
	int failed = 0;
	CUDA_BY_DTYPE(call->dtype, T, failed = quant_launch<T>(call, stream));
	return failed;
}
