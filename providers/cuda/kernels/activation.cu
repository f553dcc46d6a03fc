/* silu, gelu, sigmoid, relu, relu2, alone and gated, and gelu_and_mul_sparse. */
#include "providers/cuda/kernels/common.cuh"

template <int FUNCTION> static __device__ __forceinline__ float activate(float x)
{
	switch (FUNCTION) {
	case CUDA_SILU:
		return x / (1.0f + expf(-x));
	case CUDA_GELU:
		return 0.5f * x * erfcf(-x * 0.70710678118654752f);
	case CUDA_GELU_TANH:
		/* 1 + tanh(u) is 2/(1 + exp(−2u)), whose digits survive for negative u. */
		return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
	case CUDA_SIGMOID:
		return 1.0f / (1.0f + expf(-x));
	case CUDA_RELU:
		return x > 0 || x != x ? x : 0;
	default:
		x = x > 0 || x != x ? x : 0;
		return x * x;
	}
}

/* 16-bit results need no more than the fast exponential's 2^-21. */
template <class T, int FUNCTION> static __device__ __forceinline__ float activate_for(float x)
{
	if (sizeof(T) == 2 && FUNCTION == CUDA_SILU)
		return __fdividef(x, 1.0f + __expf(-x));
	return activate<FUNCTION>(x);
}

enum { UNROLL = 4 };

template <class T, int N, int FUNCTION, bool GATED> static __global__ void activation_rows(const __grid_constant__ cuda_activation_call call)
{
	const int64_t row = (int64_t)blockIdx.y + (int64_t)blockIdx.z * gridDim.y;
	behind_wait();
	if (row >= call.rows)
		return;
	const T *x = (const T *)call.x + row * call.x_stride, *other = (const T *)call.other + row * call.x_stride;
	T *y = (T *)call.y + row * call.hidden;
	pack<T, N> a[UNROLL], b[UNROLL];
	const int64_t first = ((int64_t)blockIdx.x * UNROLL * blockDim.x + threadIdx.x) * N, step = (int64_t)blockDim.x * N;
#pragma unroll
	for (int u = 0; u < UNROLL; u++) {
		int64_t at = first + u * step;
		if (at >= call.hidden)
			continue;
		a[u] = load<N>(x + at);
		if (GATED)
			b[u] = load<N>(other + at);
	}
#pragma unroll
	for (int u = 0; u < UNROLL; u++) {
		int64_t at = first + u * step;
		if (at >= call.hidden)
			continue;
#pragma unroll
		for (int j = 0; j < N; j++) {
			float v = activate_for<T, FUNCTION>(to_f32(a[u].e[j]));
			a[u].e[j] = from_f32<T>(GATED ? v * to_f32(b[u].e[j]) : v);
		}
		store(y + at, a[u]);
	}
}

template <class T, int N, int FUNCTION> static void rows_launch(const cuda_activation_call *call, cudaStream_t stream)
{
	const int64_t vectors = call->hidden / N;
	const unsigned threads = vectors >= 256 * UNROLL ? 256 : vectors >= 128 * UNROLL ? 128 : vectors >= 64 * UNROLL ? 64 : 32;
	const int64_t across = (vectors + threads * UNROLL - 1) / (threads * UNROLL), high = call->rows > 32768 ? 32768 : call->rows;
	dim3 grid((unsigned)across, (unsigned)high, (unsigned)((call->rows + high - 1) / high));
	if (call->other != NULL)
		launch_behind(activation_rows<T, N, FUNCTION, true>, grid, threads, stream, *call);
	else
		launch_behind(activation_rows<T, N, FUNCTION, false>, grid, threads, stream, *call);
}

template <class T, int FUNCTION> static void function_launch(const cuda_activation_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	if (call->hidden % N == 0 && rows_aligned(call->x, call->x_stride, sizeof(T)) && aligned16(call->other) && aligned16(call->y))
		rows_launch<T, N, FUNCTION>(call, stream);
	else
		rows_launch<T, 1, FUNCTION>(call, stream);
}

template <class T> static void activation_launch(const cuda_activation_call *call, cudaStream_t stream)
{
	switch (call->function) {
	case CUDA_SILU:
		return function_launch<T, CUDA_SILU>(call, stream);
	case CUDA_GELU:
		return function_launch<T, CUDA_GELU>(call, stream);
	case CUDA_GELU_TANH:
		return function_launch<T, CUDA_GELU_TANH>(call, stream);
	case CUDA_SIGMOID:
		return function_launch<T, CUDA_SIGMOID>(call, stream);
	case CUDA_RELU:
		return function_launch<T, CUDA_RELU>(call, stream);
	case CUDA_RELU2:
		return function_launch<T, CUDA_RELU2>(call, stream);
	}
}

int cuda_activation_launch(const struct cuda_activation_call *call, cudaStream_t stream)
{
	CUDA_BY_DTYPE(call->dtype, T, activation_launch<T>(call, stream));
	return launched();
}

/* ---- gelu_and_mul_sparse: a block a row; the gate is read three times, from the cache after the first ------------------------- */

template <class T> static __device__ __forceinline__ T from_f64(double value);
template <> __device__ __forceinline__ float from_f64(double value)
{
	return __double2float_rn(value);
}
template <> __device__ __forceinline__ __half from_f64(double value)
{
	return __double2half(value);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_f64(double value)
{
	return __double2bfloat16(value);
}

template <class T> static __device__ __forceinline__ double rounded_f64(double value)
{
	return (double)to_f32(from_f64<T>(value));
}

/* Over the block. In double: the definition rounds the statistics to x's dtype, and a sum that is off by a little may round the other way. */
static __device__ __forceinline__ double block_sum(double value, double *parts)
{
	for (int step = 16; step > 0; step /= 2)
		value += __shfl_xor_sync(0xffffffffu, value, step);
	if (threadIdx.x % 32 == 0)
		parts[threadIdx.x / 32] = value;
	__syncthreads();
	value = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0;
	for (int step = 16; step > 0; step /= 2)
		value += __shfl_xor_sync(0xffffffffu, value, step);
	return value;
}

template <class T> static __global__ void sparse_rows(const __grid_constant__ cuda_sparse_call call)
{
	__shared__ double parts[2][32];
	const T *gate = (const T *)call.x + (int64_t)blockIdx.x * call.x_stride, *up = gate + call.hidden;
	T *y = (T *)call.y + (int64_t)blockIdx.x * call.hidden;
	double sum = 0;
	for (int i = threadIdx.x; i < call.hidden; i += blockDim.x)
		sum += to_f32(gate[i]);
	const double mean = block_sum(sum, parts[0]) / call.hidden;
	sum = 0;
	for (int i = threadIdx.x; i < call.hidden; i += blockDim.x) {
		const double difference = __double2float_rn(to_f32(gate[i]) - mean);
		sum += difference * difference;
	}
	const double variance = __double2float_rn(block_sum(sum, parts[1]) / call.hidden);
	const double above = rounded_f64<T>(rounded_f64<T>(sqrt(variance)) * call.multiplier);
	const float cutoff = to_f32(from_f64<T>(rounded_f64<T>(mean) + above));
	for (int i = threadIdx.x; i < call.hidden; i += blockDim.x) {
		float g = activate<CUDA_RELU>(rounded<T>(to_f32(gate[i]) - cutoff));
		g = rounded<T>(call.tanh_form ? activate<CUDA_GELU_TANH>(g) : activate<CUDA_GELU>(g));
		y[i] = from_f32<T>(g * to_f32(up[i]));
	}
}

int cuda_sparse_launch(const struct cuda_sparse_call *call, cudaStream_t stream)
{
	const unsigned threads = call->hidden >= 4096 ? 1024 : call->hidden >= 1024 ? 256 : 64;
	CUDA_BY_DTYPE(call->dtype, T, sparse_rows<T><<<(unsigned)call->rows, threads, 0, stream>>>(*call));
	return launched();
}
