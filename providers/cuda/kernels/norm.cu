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

/* A row's mean in two parts, and 1/deviation. The first part is a sum of shares, which doesn't overflow where the mean itself doesn't; the second is the mean of what is left, so that
 * a row of nearly equal elements keeps its digits. */
struct layer_statistics {
	float mean;
	float rest;
	float scale;
};

static __device__ __forceinline__ layer_statistics layer_finish(const cuda_norm_call &call, float mean, float2 sums)
{
	const float rest = sums.x - sums.x == 0 ? sums.x : 0; /* a difference that overflows is its own element's */
	const float variance = fmaxf(sums.y - rest * rest, 0.0f);
	return {mean, rest, rsqrtf((sums.y - sums.y != 0 ? sums.y : variance) + call.epsilon)}; /* NaN and infinities stay what they are */
}

/* The means of d and of d², by shares too, of differences from the mean's first part. 16-bit elements have no digits that the second part would keep. */
template <class T, int N> static __device__ __forceinline__ void layer_add(const float (&v)[N], float mean, float share, float2 &sums)
{
#pragma unroll
	for (int j = 0; j < N; j++) {
		const float d = v[j] - mean;
		if (sizeof(T) > 2)
			sums.x += d * share;
		sums.y += d * (d * share);
	}
}

template <class T, int N>
static __device__ __forceinline__ void layer_store(const cuda_norm_call &call, int64_t row, int at, float (&v)[N], const layer_statistics &statistics)
{
	float f[N];
#pragma unroll
	for (int j = 0; j < N; j++) /* ((v − mean) − rest)·scale */
		v[j] = fmaf(v[j] - statistics.mean, statistics.scale, -statistics.rest * statistics.scale);
	if (call.weight != NULL) {
		factor<T, N> weight;
		factor_ask<T, N>(weight, call.weight, call.weight_f32, at);
		factor_get<T, N>(weight, call.weight, call.weight_f32, at, f);
#pragma unroll
		for (int j = 0; j < N; j++)
			v[j] *= f[j];
	}
	if (call.bias != NULL) {
		factor<T, N> bias;
		factor_ask<T, N>(bias, call.bias, call.bias_f32, at);
		factor_get<T, N>(bias, call.bias, call.bias_f32, at, f);
#pragma unroll
		for (int j = 0; j < N; j++)
			v[j] += f[j];
	}
	store_f32<N>((T *)call.y + row * call.hidden + at, v);
}

template <class T, int PER_THREAD> static __global__ void layer_registers(const __grid_constant__ cuda_norm_call call)
{
	constexpr int N = vec_of<T>;
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	const float share = 1.0f / (float)call.hidden;
	float v[PER_THREAD][N], mean = 0;
	float2 sums = make_float2(0, 0);
	if (row >= call.rows || faulted(call.fault))
		return;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < call.hidden)
			load_f32<N>((const T *)call.x + row * call.x_stride + at, v[i]);
	}
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		if ((int)(threadIdx.x + i * blockDim.x) * N >= call.hidden)
			continue;
#pragma unroll
		for (int j = 0; j < N; j++)
			mean += v[i][j] * share;
	}
	mean = row_reduce<sum_of>(mean);
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++)
		if ((int)(threadIdx.x + i * blockDim.x) * N < call.hidden)
			layer_add<T, N>(v[i], mean, share, sums);
	const layer_statistics statistics = layer_finish(call, mean, row_sums(sums));
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < call.hidden)
			layer_store<T, N>(call, row, at, v[i], statistics);
	}
}

template <class T, int N> static __global__ void layer_passes(const __grid_constant__ cuda_norm_call call)
{
	const int64_t row = blockIdx.x;
	const T *x = (const T *)call.x + row * call.x_stride;
	const int step = (int)blockDim.x * N;
	const float share = 1.0f / (float)call.hidden;
	float v[N], mean = 0;
	float2 sums = make_float2(0, 0);
	if (faulted(call.fault))
		return;
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++)
			mean += v[j] * share;
	}
	mean = row_reduce<sum_of>(mean);
	for (int at = (int)threadIdx.x * N; at < call.hidden; at += step) {
		load_f32<N>(x + at, v);
		layer_add<T, N>(v, mean, share, sums);
	}
	const layer_statistics statistics = layer_finish(call, mean, row_sums(sums));
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
		rms_passes<T, 1, FUSED><<<(unsigned)call->rows, threads, 0, stream>>>(*call);
	else if (grid.per_thread == 1)
		rms_registers<T, 1, FUSED, true><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 2 && (FUSED || grid.grid <= FEW_BLOCKS))
		rms_registers<T, 2, FUSED, true><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 2)
		rms_registers<T, 2, FUSED, FUSED><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 4)
		rms_registers<T, 4, FUSED, FUSED><<<grid.grid, grid.block, 0, stream>>>(*call);
	else
		rms_passes<T, N, FUSED><<<(unsigned)call->rows, 1024, 0, stream>>>(*call);
}

template <class T> static void layer_launch(const cuda_norm_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	struct row_grid grid = row_grid_of(call->rows, call->hidden / N);
	unsigned threads = call->hidden >= 1024 ? 256 : 32;
	if (!takes_vectors<T>(call))
		layer_passes<T, 1><<<(unsigned)call->rows, threads, 0, stream>>>(*call);
	else if (grid.per_thread == 1)
		layer_registers<T, 1><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 2)
		layer_registers<T, 2><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 4)
		layer_registers<T, 4><<<grid.grid, grid.block, 0, stream>>>(*call);
	else
		layer_passes<T, N><<<(unsigned)call->rows, 1024, 0, stream>>>(*call);
}

int cuda_norm_launch(const struct cuda_norm_call *call, cudaStream_t stream)
{
	CUDA_BY_DTYPE(call->dtype, T,
	              if (call->norm == CUDA_LAYER_NORM) layer_launch<T>(call, stream);
	              else if (call->residual != NULL) rms_launch<T, true>(call, stream);
	              else rms_launch<T, false>(call, stream));
	return launched();
}
