/* rms_norm (alone, and of a sum) and layer_norm: one pass for rows that a block's registers hold, two for longer or misaligned ones.
 *
 * The threads of a row depend on its length alone, and so does the order of its sums: a row's bits don't change with the other rows. */
#include "providers/cuda/kernels/common.cuh"

/* N factors from element `at` on: x's dtype or f32. What is of x's dtype waits in registers as it lies in memory: where few rows are on their way it is asked for before the row's sum
 * is known. (Many rows hide that wait, and are slower for asking early: 106 us against 92 for 16384 rows of 4096 in bf16.) */
template <class T, int N> struct factor {
	pack<T, N> same;
};

template <class T, int N> static __device__ __forceinline__ void factor_ask(factor<T, N> &made, const void *from, bool is_f32, int at)
{
	if (from != NULL && !is_f32)
		made.same = load<N>((const T *)from + at);
}

template <class T, int N> static __device__ __forceinline__ void factor_get(const factor<T, N> &made, const void *from, bool is_f32, int at, float (&to)[N])
{
	if (is_f32) {
		load_f32<N>((const float *)from + at, to);
		return;
	}
#pragma unroll
	for (int j = 0; j < N; j++)
		to[j] = to_f32(made.same.e[j]);
}

/* y rounded to T, times a weight of T, in T: two elements at once, whose product the unit rounds once. */
static __device__ __forceinline__ void weigh_pair(float *, const float *, const float *, float)
{
}
static __device__ __forceinline__ void weigh_pair(__nv_bfloat16 *to, const float *y, const __nv_bfloat16 *weight, float scale)
{
	const __nv_bfloat162 product = __hmul2(__floats2bfloat162_rn(y[0] * scale, y[1] * scale), __halves2bfloat162(weight[0], weight[1]));
	to[0] = product.x;
	to[1] = product.y;
}
static __device__ __forceinline__ void weigh_pair(__half *to, const float *y, const __half *weight, float scale)
{
	const __half2 product = __hmul2(__floats2half2_rn(y[0] * scale, y[1] * scale), __halves2half2(weight[0], weight[1]));
	to[0] = __low2half(product);
	to[1] = __high2half(product);
}

/* An f32 weight: multiplied in f32. */
template <class T, int N>
static __device__ __forceinline__ void rms_store(const cuda_norm_call &call, int64_t row, int at, float (&v)[N], float scale, const factor<T, N> &weight)
{
	T *y = (T *)call.y + row * call.hidden + at;
	if (N > 1 && sizeof(T) == 2 && call.weight != NULL && !call.weight_f32) {
		pack<T, N> made;
#pragma unroll
		for (int j = 0; j + 1 < N; j += 2)
			weigh_pair(&made.e[j], &v[j], &weight.same.e[j], scale);
		store(y, made);
		return;
	}
	float w[N];
	if (call.weight != NULL)
		factor_get<T, N>(weight, call.weight, call.weight_f32, at, w);
#pragma unroll
	for (int j = 0; j < N; j++) {
		v[j] *= scale;
		if (call.weight != NULL)
			v[j] = call.weight_f32 ? v[j] * w[j] : rounded<T>(rounded<T>(v[j]) * w[j]);
	}
	store_f32<N>(y, v);
}

/* x, or x + residual in f32. */
template <class T, int N, bool FUSED> static __device__ __forceinline__ void rms_load(const cuda_norm_call &call, int64_t row, int at, float (&v)[N])
{
	load_f32<N>((const T *)call.x + row * call.x_stride + at, v);
	if (FUSED) {
		float r[N];
		load_f32<N>((const T *)call.residual + row * call.residual_stride + at, r);
#pragma unroll
		for (int j = 0; j < N; j++)
			v[j] += r[j];
	}
}

template <int N> static __device__ __forceinline__ float squares(const cuda_norm_call &call, int at, const float (&v)[N])
{
	float sum = 0;
	if (call.variance_size == call.hidden) {
#pragma unroll
		for (int j = 0; j < N; j++)
			sum += v[j] * v[j];
		return sum;
	}
#pragma unroll
	for (int j = 0; j < N; j++)
		sum += at + j < call.variance_size ? v[j] * v[j] : 0;
	return sum;
}

/* Rows wait in registers in f32: unpacked again they would cost more arithmetic than the memory leaves time for. */
template <class T, int PER_THREAD, bool FUSED, bool EARLY> static __global__ void rms_registers(const __grid_constant__ cuda_norm_call call)
{
	constexpr int N = vec_of<T>;
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	factor<T, N> weights[PER_THREAD];
	float v[PER_THREAD][N], sum = 0;
	behind_wait();
	if (row >= call.rows || faulted(call.fault))
		return;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < call.hidden)
			rms_load<T, N, FUSED>(call, row, at, v[i]);
	}
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (EARLY && at < call.hidden)
			factor_ask<T, N>(weights[i], call.weight, call.weight_f32, at);
	}
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at >= call.hidden)
			continue;
		sum += squares<N>(call, at, v[i]);
		if (FUSED)
			store_f32<N>((T *)call.sum + row * call.hidden + at, v[i]);
	}
	float scale = rsqrtf(row_reduce<sum_of>(sum) / (float)call.variance_size + call.epsilon);
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at >= call.hidden)
			continue;
		if (!EARLY)
			factor_ask<T, N>(weights[i], call.weight, call.weight_f32, at);
		rms_store<T, N>(call, row, at, v[i], scale, weights[i]);
	}
}

/* In place the sum is written by the second pass, over what the first has read. */
template <class T, int N, bool FUSED> static __global__ void rms_passes(const __grid_constant__ cuda_norm_call call)
{
	const int64_t row = blockIdx.x;
	const int step = (int)blockDim.x * N;
	factor<T, N> weight;
	float v[N], sum = 0;
	behind_wait();
	if (faulted(call.fault))
		return;
	for (int at = (int)threadIdx.x * N; at < call.variance_size; at += step) {
		rms_load<T, N, FUSED>(call, row, at, v);
		sum += squares<N>(call, at, v);
	}
	float scale = rsqrtf(row_reduce<sum_of>(sum) / (float)call.variance_size + call.epsilon);
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		factor_ask<T, N>(weight, call.weight, call.weight_f32, at);
		rms_load<T, N, FUSED>(call, row, at, v);
		if (FUSED)
			store_f32<N>((T *)call.sum + row * call.hidden + at, v);
		rms_store<T, N>(call, row, at, v, scale, weight);
	}
}

/* A row's mean in two parts, and 1/deviation. */
struct layer_statistics {
	float mean;
	float rest;
	float scale;
};

static __device__ __forceinline__ layer_statistics layer_statistics_of(const cuda_norm_call &call, float mean, float rest, float variance)
{
	return {mean, rest, rsqrtf(variance + call.epsilon)}; /* NaN and infinities stay what they are */
}

/* The mean of f32 elements is summed in double and kept as an f32 and what is left: near FLT_MAX elements may cancel to a mean that f32 sums don't have a digit of. */
static __device__ __forceinline__ void layer_split(double mean, float &high, float &low)
{
	high = (float)mean;
	low = high - high == 0 ? (float)(mean - (double)high) : 0; /* an infinite mean has no rest */
}

template <class T> static __device__ __forceinline__ float layer_difference(float v, float mean, float rest)
{
	return sizeof(T) > 2 ? (v - mean) - rest : v - mean; /* 16-bit elements have no digits that a rest would keep */
}

/* The factor may be infinite where the difference is 0 or past f32: it is multiplied once. A product alone may be past what f32 holds where the sum with the bias isn't. */
template <class T, int N>
static __device__ __forceinline__ void layer_store(const cuda_norm_call &call, int64_t row, int at, float (&v)[N], const layer_statistics &statistics)
{
	float weights[N], biases[N];
	if (call.weight != NULL) {
		factor<T, N> weight;
		factor_ask<T, N>(weight, call.weight, call.weight_f32, at);
		factor_get<T, N>(weight, call.weight, call.weight_f32, at, weights);
	}
	if (call.bias != NULL) {
		factor<T, N> bias;
		factor_ask<T, N>(bias, call.bias, call.bias_f32, at);
		factor_get<T, N>(bias, call.bias, call.bias_f32, at, biases);
	}
#pragma unroll
	for (int j = 0; j < N; j++) {
		v[j] = layer_difference<T>(v[j], statistics.mean, statistics.rest) * statistics.scale;
		if (call.weight != NULL && call.bias != NULL)
			v[j] = fmaf(v[j], weights[j], biases[j]);
		else if (call.weight != NULL)
			v[j] *= weights[j];
		else if (call.bias != NULL)
			v[j] += biases[j];
	}
	store_f32<N>((T *)call.y + row * call.hidden + at, v);
}

/* Calls f for each access that the thread has in a row. */
template <int PER_THREAD, int N, class F> static __device__ __forceinline__ void layer_each(const cuda_norm_call &call, F f)
{
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		const int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < call.hidden)
			f(i, at);
	}
}

/* The mean square of the differences from the mean, by shares: those don't overflow where the mean square itself doesn't. */
template <class T, int N, int PER_THREAD>
static __device__ __forceinline__ layer_statistics layer_squares(const cuda_norm_call &call, const float (&v)[PER_THREAD][N], float mean, float rest)
{
	const float share = 1.0f / (float)call.hidden;
	float sum = 0;
	layer_each<PER_THREAD, N>(call, [&](int i, int) {
#pragma unroll
		for (int j = 0; j < N; j++) {
			const float d = layer_difference<T>(v[i][j], mean, rest);
			sum += d * (d * share);
		}
	});
	return layer_statistics_of(call, mean, rest, row_sum(sum, 1));
}

template <int N, int PER_THREAD> static __device__ __forceinline__ layer_statistics layer_exact(const cuda_norm_call &call, const float (&v)[PER_THREAD][N])
{
	double sum = 0;
	float mean, rest;
	layer_each<PER_THREAD, N>(call, [&](int i, int) {
#pragma unroll
		for (int j = 0; j < N; j++)
			sum += (double)v[i][j];
	});
	layer_split(row_sum(sum, 0) / (double)call.hidden, mean, rest);
	return layer_squares<float, N, PER_THREAD>(call, v, mean, rest);
}

/* 16-bit elements: a sum of shares, which doesn't overflow where the mean itself doesn't. */
template <class T, int N, int PER_THREAD> static __device__ __forceinline__ layer_statistics layer_short(const cuda_norm_call &call, const float (&v)[PER_THREAD][N])
{
	const float share = 1.0f / (float)call.hidden;
	float mean = 0;
	layer_each<PER_THREAD, N>(call, [&](int i, int) {
#pragma unroll
		for (int j = 0; j < N; j++)
			mean += v[i][j] * share;
	});
	return layer_squares<T, N, PER_THREAD>(call, v, row_sum(mean, 0), 0);
}

template <class T, int PER_THREAD> static __global__ void layer_registers(const __grid_constant__ cuda_norm_call call)
{
	constexpr int N = vec_of<T>;
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	float v[PER_THREAD][N];
	layer_statistics statistics;
	behind_wait();
	if (row >= call.rows || faulted(call.fault))
		return;
	const T *x = (const T *)call.x + row * call.x_stride;
	layer_each<PER_THREAD, N>(call, [&](int i, int at) { load_f32<N>(x + at, v[i]); });
	if (sizeof(T) == 2)
		statistics = layer_short<T, N, PER_THREAD>(call, v);
	else
		statistics = layer_exact<N, PER_THREAD>(call, v);
	layer_each<PER_THREAD, N>(call, [&](int i, int at) { layer_store<T, N>(call, row, at, v[i], statistics); });
}

template <class T, int N> static __global__ void layer_passes(const __grid_constant__ cuda_norm_call call)
{
	const int64_t row = blockIdx.x;
	const T *x = (const T *)call.x + row * call.x_stride;
	const int step = (int)blockDim.x * N;
	const float share = 1.0f / (float)call.hidden;
	float v[N], square = 0, mean, rest;
	double sum = 0;
	behind_wait();
	if (faulted(call.fault))
		return;
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++)
			sum += (double)v[j];
	}
	layer_split(row_sum(sum, 0) / (double)call.hidden, mean, rest);
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++) {
			const float d = layer_difference<T>(v[j], mean, rest);
			square += d * (d * share);
		}
	}
	const layer_statistics statistics = layer_statistics_of(call, mean, rest, row_sum(square, 1));
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		layer_store<T, N>(call, row, at, v, statistics);
	}
}

template <class T> static bool takes_vectors(const cuda_norm_call *call)
{
	return call->hidden % vec_of<T> == 0 && rows_aligned(call->x, call->x_stride, sizeof(T)) &&
	       (call->residual == NULL || rows_aligned(call->residual, call->residual_stride, sizeof(T))) && aligned16(call->weight) &&
	       aligned16(call->bias) && aligned16(call->y) && aligned16(call->sum);
}

enum { FEW_BLOCKS = 1024 };

template <class T, bool FUSED> static void rms_launch(const cuda_norm_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	struct row_grid grid = row_grid_of(call->rows, call->hidden / N);
	unsigned threads = call->hidden >= 1024 ? 256 : 32;
	if (!takes_vectors<T>(call))
		launch_behind(rms_passes<T, 1, FUSED>, (unsigned)call->rows, threads, stream, *call);
	else if (grid.per_thread == 1)
		launch_behind(rms_registers<T, 1, FUSED, true>, grid.grid, grid.block, stream, *call);
	else if (grid.per_thread == 2 && (FUSED || grid.grid <= FEW_BLOCKS))
		launch_behind(rms_registers<T, 2, FUSED, true>, grid.grid, grid.block, stream, *call);
	else if (grid.per_thread == 2)
		launch_behind(rms_registers<T, 2, FUSED, FUSED>, grid.grid, grid.block, stream, *call);
	else if (grid.per_thread == 4)
		launch_behind(rms_registers<T, 4, FUSED, FUSED>, grid.grid, grid.block, stream, *call);
	else
		launch_behind(rms_passes<T, N, FUSED>, (unsigned)call->rows, 1024, stream, *call);
}

template <class T> static void layer_launch(const cuda_norm_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	struct row_grid grid = row_grid_of(call->rows, call->hidden / N);
	unsigned threads = call->hidden >= 1024 ? 256 : 32;
	if (!takes_vectors<T>(call))
		launch_behind(layer_passes<T, 1>, (unsigned)call->rows, threads, stream, *call);
	else if (grid.per_thread == 1)
		launch_behind(layer_registers<T, 1>, grid.grid, grid.block, stream, *call);
	else if (grid.per_thread == 2)
		launch_behind(layer_registers<T, 2>, grid.grid, grid.block, stream, *call);
	else if (grid.per_thread == 4)
		launch_behind(layer_registers<T, 4>, grid.grid, grid.block, stream, *call);
	else
		launch_behind(layer_passes<T, N>, (unsigned)call->rows, 1024, stream, *call);
}

int cuda_norm_launch(const struct cuda_norm_call *call, cudaStream_t stream)
{
	CUDA_BY_DTYPE(call->dtype, T,
	              if (call->norm == CUDA_LAYER_NORM) layer_launch<T>(call, stream);
	              else if (call->residual != NULL) rms_launch<T, true>(call, stream);
	              else rms_launch<T, false>(call, stream));
	return launched();
}
