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

/* So few rows that each waits for memory alone. */
enum { ROWS_ALONE = 8 };

/* What the kernel before this one doesn't make, on its way from memory meanwhile: the weight, and what x is added to. In a step of 8 B parameters they have left the cache since the layer before. */
template <class T, int PER_THREAD, bool FUSED> static __device__ __forceinline__ void rms_ask(const cuda_norm_call &call, int64_t row)
{
	enum { LINE = 128 / sizeof(T) };
	if (call.rows > ROWS_ALONE || row >= call.rows)
		return;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		const int at = (int)(threadIdx.x + i * blockDim.x) * vec_of<T>;
		if (at >= call.hidden || at % LINE != 0)
			continue;
		if (call.weight != NULL && !call.weight_f32)
			ask_line((const T *)call.weight + at);
		if (FUSED)
			ask_line((const T *)call.residual + row * call.residual_stride + at);
	}
}

/* Rows wait in registers in f32: unpacked again they would cost more arithmetic than the memory leaves time for. */
template <class T, int PER_THREAD, bool FUSED, bool EARLY> static __device__ __forceinline__ void rms_rows(const cuda_norm_call &call)
{
	constexpr int N = vec_of<T>;
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	factor<T, N> weights[PER_THREAD];
	float v[PER_THREAD][N], sum = 0;
	if (EARLY)
		rms_ask<T, PER_THREAD, FUSED>(call, row);
	behind_wait();
	if (row >= call.rows)
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
	if (faulted(call.fault)) /* looked at while the row is on its way */
		return;
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

template <class T, int PER_THREAD, bool FUSED, bool EARLY> static __global__ void rms_registers(const __grid_constant__ cuda_norm_call call)
{
	rms_rows<T, PER_THREAD, FUSED, EARLY>(call);
}

/* Each y of the grid is a call. */
template <class T, int PER_THREAD, bool FUSED> static __global__ void rms_together(const __grid_constant__ cuda_norm_calls calls)
{
	rms_rows<T, PER_THREAD, FUSED, true>(calls.calls[blockIdx.y]);
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

/* ---- layer_norm of 16-bit elements with a weight and a bias of their dtype
 * What counts is how many rows are under way: elements wait packed, as they lie in memory, so that 48 registers do (unpacked, with factors that may be f32, it was 64 and 30 us for 4096 rows of
 * 4096; now 24.7). One barrier a row: warps make mean and squares of their own elements, which are then put together. The weights stay in L1: rows pass it by. */
template <class T> struct pair_of_16;
template <> struct pair_of_16<__nv_bfloat16> {
	typedef __nv_bfloat162 type;
	static __device__ __forceinline__ float2 to(type pair)
	{
		return __bfloat1622float2(pair);
	}
	static __device__ __forceinline__ type from(float2 pair)
	{
		return __float22bfloat162_rn(pair);
	}
};
template <> struct pair_of_16<__half> {
	typedef __half2 type;
	static __device__ __forceinline__ float2 to(type pair)
	{
		return __half22float2(pair);
	}
	static __device__ __forceinline__ type from(float2 pair)
	{
		return __float22half2_rn(pair);
	}
};

enum { PAIRS = 4, PAIR_VECTOR = 2 * PAIRS };
template <class T> struct alignas(16) pairs {
	typename pair_of_16<T>::type e[PAIRS];
};

template <class T> static __device__ __forceinline__ pairs<T> pairs_load(const T *from)
{
	const pack<T, PAIR_VECTOR> values = load<PAIR_VECTOR>(from);
	return *reinterpret_cast<const pairs<T> *>(&values);
}

/* Not kept in L1. */
template <class T> static __device__ __forceinline__ pairs<T> pairs_load_once(const T *from)
{
	uint4 bits;
	asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(from));
	return *reinterpret_cast<pairs<T> *>(&bits);
}

template <class T, int PER_THREAD> static __device__ __forceinline__ float pairs_mean(const pairs<T> (&x)[PER_THREAD], int vectors, float share)
{
	float mean = 0;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++)
		if ((int)(threadIdx.x + i * blockDim.x) < vectors)
#pragma unroll
			for (int j = 0; j < PAIRS; j++) {
				const float2 v = pair_of_16<T>::to(x[i].e[j]);
				mean = fmaf(v.x, share, mean);
				mean = fmaf(v.y, share, mean);
			}
	return warp_sum(mean);
}

template <class T, int PER_THREAD> static __device__ __forceinline__ float pairs_squares(const pairs<T> (&x)[PER_THREAD], int vectors, float mean, float share)
{
	float square = 0;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++)
		if ((int)(threadIdx.x + i * blockDim.x) < vectors)
#pragma unroll
			for (int j = 0; j < PAIRS; j++) {
				const float2 v = pair_of_16<T>::to(x[i].e[j]);
				square = fmaf(v.x - mean, (v.x - mean) * share, square);
				square = fmaf(v.y - mean, (v.y - mean) * share, square);
			}
	return warp_sum(square);
}

/* What a warp knows of its elements: their mean, the sum of their squared differences from it by shares of the row, and their share of the row. */
struct alignas(16) layer_part {
	float mean;
	float square;
	float share;
};

static __device__ __forceinline__ layer_statistics layer_joined(const cuda_norm_call &call, const layer_part &own)
{
	__shared__ layer_part parts[32];
	const int warps = blockDim.x / 32;
	float mean = 0, square = 0;
	if (threadIdx.x % 32 == 0)
		parts[threadIdx.x / 32] = own;
	__syncthreads();
	for (int w = 0; w < warps; w++)
		mean = fmaf(parts[w].mean, parts[w].share, mean);
	for (int w = 0; w < warps; w++) {
		const float d = parts[w].mean - mean;
		square += fmaf(d, d * parts[w].share, parts[w].square);
	}
	return layer_statistics_of(call, mean, 0, square);
}

template <class T> static __device__ __forceinline__ void pairs_store(const cuda_norm_call &call, int64_t row, int at, const pairs<T> &x, const layer_statistics &statistics)
{
	typedef pair_of_16<T> pair;
	const pairs<T> weight = pairs_load((const T *)call.weight + at), bias = pairs_load((const T *)call.bias + at);
	pairs<T> y;
#pragma unroll
	for (int j = 0; j < PAIRS; j++) {
		const float2 v = pair::to(x.e[j]), w = pair::to(weight.e[j]), b = pair::to(bias.e[j]);
		const float first = (v.x - statistics.mean) * statistics.scale, second = (v.y - statistics.mean) * statistics.scale;
		y.e[j] = pair::from(make_float2(fmaf(first, w.x, b.x), fmaf(second, w.y, b.y)));
	}
	__stcs(reinterpret_cast<uint4 *>((T *)call.y + row * call.hidden + at), *reinterpret_cast<const uint4 *>(&y));
}

template <class T, int THREADS, int BLOCKS> static __global__ void __launch_bounds__(THREADS, BLOCKS) layer_pairs(const __grid_constant__ cuda_norm_call call)
{
	enum { PER_THREAD = 4 };
	const int64_t row = blockIdx.x;
	const int vectors = call.hidden / PAIR_VECTOR, first = (int)(threadIdx.x / 32 * 32);
	const T *from = (const T *)call.x + row * call.x_stride;
	pairs<T> x[PER_THREAD];
	int count = 0; /* of this warp's vectors */
	behind_wait();
	if (faulted(call.fault))
		return;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		const int at = (int)(threadIdx.x + i * blockDim.x);
		if (at < vectors)
			x[i] = pairs_load_once(from + at * PAIR_VECTOR);
		count += min(max(vectors - first - i * (int)blockDim.x, 0), 32);
	}
	const float share = 1.0f / (float)call.hidden, mean = pairs_mean<T, PER_THREAD>(x, vectors, 1.0f / (float)(count * PAIR_VECTOR));
	const float square = pairs_squares<T, PER_THREAD>(x, vectors, mean, share);
	const layer_statistics statistics = layer_joined(call, {mean, square, (float)(count * PAIR_VECTOR) * share});
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		const int at = (int)(threadIdx.x + i * blockDim.x);
		if (at < vectors)
			pairs_store<T>(call, row, at * PAIR_VECTOR, x[i], statistics);
	}
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

/* Whether they are one kernel's work: what rms_launch would choose for each of them, in blocks of one shape, and none so large that it needs no company. */
template <class T> static bool goes_together(const cuda_norm_calls *calls, struct row_grid *grid_out)
{
	const cuda_norm_call *first = &calls->calls[0];
	*grid_out = row_grid_of(first->rows, first->hidden / vec_of<T>);
	for (uint32_t i = 0; i < calls->count; i++) {
		const cuda_norm_call *call = &calls->calls[i];
		const struct row_grid grid = row_grid_of(call->rows, call->hidden / vec_of<T>);
		const bool same = call->dtype == first->dtype && call->hidden == first->hidden && (call->residual == NULL) == (first->residual == NULL) && grid.block.x == grid_out->block.x &&
		                  grid.block.y == grid_out->block.y;
		if (!same || !takes_vectors<T>(call) || grid.grid > FEW_BLOCKS)
			return false;
		grid_out->grid = grid.grid > grid_out->grid ? grid.grid : grid_out->grid;
	}
	return grid_out->per_thread == 1 || grid_out->per_thread == 2;
}

template <class T, bool FUSED> static bool rms_together_launch(const cuda_norm_calls *calls, cudaStream_t stream)
{
	struct row_grid grid;
	if (!goes_together<T>(calls, &grid))
		return false;
	const dim3 blocks((unsigned)grid.grid, calls->count);
	if (grid.per_thread == 1)
		launch_behind(rms_together<T, 1, FUSED>, blocks, grid.block, stream, *calls);
	else
		launch_behind(rms_together<T, 2, FUSED>, blocks, grid.block, stream, *calls);
	return true;
}

/* Rows of more than a warp's 128 vectors. False: the others' kernels. */
template <class T> static bool layer_pairs_launch(const cuda_norm_call *call, cudaStream_t stream)
{
	const int vectors = call->hidden / PAIR_VECTOR;
	const unsigned rows = (unsigned)call->rows, threads = (unsigned)((vectors + 127) / 128 * 32);
	if (call->weight == NULL || call->bias == NULL || call->weight_f32 || call->bias_f32 || vectors <= 128 || vectors > 4096)
		return false;
	if (threads <= 128)
		launch_behind(layer_pairs<T, 128, 10>, rows, threads, stream, *call);
	else if (threads <= 256)
		launch_behind(layer_pairs<T, 256, 5>, rows, threads, stream, *call);
	else
		launch_behind(layer_pairs<T, 1024, 1>, rows, threads, stream, *call);
	return true;
}
template <> [[maybe_unused]] bool layer_pairs_launch<float>(const cuda_norm_call *, cudaStream_t)
{
	return false;
}

template <class T> static void layer_launch(const cuda_norm_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	struct row_grid grid = row_grid_of(call->rows, call->hidden / N);
	unsigned threads = call->hidden >= 1024 ? 256 : 32;
	if (!takes_vectors<T>(call))
		launch_behind(layer_passes<T, 1>, (unsigned)call->rows, threads, stream, *call);
	else if (layer_pairs_launch<T>(call, stream))
		return;
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

int cuda_norm_together(const struct cuda_norm_calls *calls, cudaStream_t stream)
{
	const cuda_norm_call *first = &calls->calls[0];
	bool taken = false;
	if (first->norm != CUDA_RMS_NORM)
		return cudaErrorNotSupported;
	CUDA_BY_DTYPE(first->dtype, T, taken = first->residual != NULL ? rms_together_launch<T, true>(calls, stream) : rms_together_launch<T, false>(calls, stream));
	return taken ? launched() : cudaErrorNotSupported;
}
