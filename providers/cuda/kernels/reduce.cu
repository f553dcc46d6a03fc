/* softmax, argmax, topk along the last dimension. */
#include <cooperative_groups.h>

#include "providers/cuda/kernels/common.cuh"

/* ---- softmax --------------------------------------------------------------------------------------------------------------------------- */

/* A maximum that is infinite makes NaN of the row: ∞ − ∞; a NaN among the elements comes by the sum. */
static __device__ __forceinline__ float exponential(float x)
{
	return __expf(x); /* results are at most 1: its 2^-21 is a tenth of their tolerance */
}

template <class T, int PER_THREAD> static __global__ void softmax_registers(const __grid_constant__ cuda_softmax_call call)
{
	constexpr int N = vec_of<T>;
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	const int size = (int)call.size;
	float v[PER_THREAD][N], largest = -INFINITY, sum = 0;
	if (row >= call.rows)
		return;
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
		if (at < size) {
			load_f32<N>((const T *)call.x + row * call.x_stride + at, v[i]);
		} else {
#pragma unroll
			for (int j = 0; j < N; j++)
				v[i][j] = -INFINITY;
		}
	}
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++)
#pragma unroll
		for (int j = 0; j < N; j++)
			largest = fmaxf(largest, v[i][j]);
	largest = row_reduce<max_of>(largest);
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		bool there = (int)(threadIdx.x + i * blockDim.x) * N < size;
#pragma unroll
		for (int j = 0; j < N; j++) {
			v[i][j] = exponential(v[i][j] - largest);
			sum += there ? v[i][j] : 0;
		}
	}
	const float inverse = 1.0f / row_reduce<sum_of>(sum, 1);
#pragma unroll
	for (int i = 0; i < PER_THREAD; i++) {
		int at = (int)(threadIdx.x + i * blockDim.x) * N;
#pragma unroll
		for (int j = 0; j < N; j++)
			v[i][j] *= inverse;
		if (at < size)
			store_f32<N>((T *)call.y + row * size + at, v[i]);
	}
}

template <class T, int N> static __global__ void softmax_passes(const __grid_constant__ cuda_softmax_call call)
{
	const T *x = (const T *)call.x + (int64_t)blockIdx.x * call.x_stride;
	T *y = (T *)call.y + (int64_t)blockIdx.x * call.size;
	const int64_t step = (int64_t)blockDim.x * N;
	float v[N], largest = -INFINITY, sum = 0;
	for (int64_t at = threadIdx.x * N; at < call.size; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++)
			largest = fmaxf(largest, v[j]);
	}
	largest = row_reduce<max_of>(largest);
	for (int64_t at = threadIdx.x * N; at < call.size; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++)
			sum += exponential(v[j] - largest);
	}
	const float inverse = 1.0f / row_reduce<sum_of>(sum, 1);
	for (int64_t at = threadIdx.x * N; at < call.size; at += step) {
		load_f32<N>(x + at, v);
		for (int j = 0; j < N; j++)
			v[j] = exponential(v[j] - largest) * inverse;
		store_f32<N>(y + at, v);
	}
}

/* ---- A row that only the registers of several multiprocessors hold: a cluster of blocks, which share its maximum and sum by each other's shared memory. The row is read once.
 * A warp takes exponentials from its own maximum, and block and cluster put pairs of a maximum and a sum together: one exchange instead of one for each (108 us for 256 rows of 128256, now 96). */
enum { CLUSTER = 8, CLUSTER_THREADS = 512, CLUSTER_VECTORS = 8 };

struct softmax_part {
	float largest;
	float sum;
};

/* What exponentials are taken from: nothing but -inf so far adds nothing. */
static __device__ __forceinline__ float softmax_base(float largest)
{
	return largest == -INFINITY ? 0 : largest;
}

static __device__ __forceinline__ softmax_part softmax_joined(const softmax_part &a, const softmax_part &b)
{
	const float largest = fmaxf(a.largest, b.largest), base = softmax_base(largest);
	return {largest, a.sum * exponential(a.largest - base) + b.sum * exponential(b.largest - base)};
}

static __device__ __forceinline__ softmax_part softmax_warp(softmax_part part)
{
#pragma unroll
	for (int step = 16; step > 0; step /= 2)
		part = softmax_joined(part, {__shfl_xor_sync(0xffffffffu, part.largest, step), __shfl_xor_sync(0xffffffffu, part.sum, step)});
	return part;
}

/* Of this thread's elements and its warp's others. An f32 element's exponential takes its place; one that is rounded to 16 bits is computed again. */
template <class T> static __device__ __forceinline__ softmax_part softmax_own(pack<T, vec_of<T>> (&x)[CLUSTER_VECTORS])
{
	softmax_part part = {-INFINITY, 0};
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++)
#pragma unroll
		for (int j = 0; j < vec_of<T>; j++)
			part.largest = fmaxf(part.largest, to_f32(x[i].e[j]));
	part.largest = warp_reduce<max_of>(part.largest);
	const float base = softmax_base(part.largest);
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++)
#pragma unroll
		for (int j = 0; j < vec_of<T>; j++) {
			const float made = exponential(to_f32(x[i].e[j]) - base);
			part.sum += made;
			if (sizeof(T) == 4)
				x[i].e[j] = from_f32<T>(made);
		}
	part.sum = warp_sum(part.sum);
	return part;
}

template <class T> static __global__ void __launch_bounds__(CLUSTER_THREADS, sizeof(T) == 4 ? 2 : 1) softmax_cluster(const __grid_constant__ cuda_softmax_call call)
{
#if __CUDA_ARCH__ >= 900
	namespace groups = cooperative_groups;
	constexpr int N = vec_of<T>;
	groups::cluster_group cluster = groups::this_cluster();
	__shared__ softmax_part warps[CLUSTER_THREADS / 32], block;
	const int64_t row = blockIdx.x / CLUSTER;
	const int first = ((int)cluster.block_rank() * CLUSTER_THREADS * CLUSTER_VECTORS + (int)threadIdx.x) * N, size = (int)call.size, lane = threadIdx.x % 32;
	const T *from = (const T *)call.x + row * call.x_stride;
	T *to = (T *)call.y + row * call.size;
	const softmax_part nothing = {-INFINITY, 0};
	pack<T, N> x[CLUSTER_VECTORS];
	behind_wait();
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++) {
		const int at = first + i * CLUSTER_THREADS * N;
		if (at < size)
			x[i] = load<N>(from + at);
		else
#pragma unroll
			for (int j = 0; j < N; j++)
				x[i].e[j] = from_f32<T>(-INFINITY);
	}
	const softmax_part own = softmax_own<T>(x);
	if (lane == 0)
		warps[threadIdx.x / 32] = own;
	__syncthreads();
	if (threadIdx.x < 32) {
		const softmax_part part = softmax_warp(lane < CLUSTER_THREADS / 32 ? warps[lane] : nothing);
		if (lane == 0)
			block = part;
	}
	cluster.sync();
	const softmax_part all = softmax_warp(lane < CLUSTER ? *cluster.map_shared_rank(&block, lane) : nothing);
	cluster.barrier_arrive(); /* this block has read the others' shared memory */
	const float inverse = 1.0f / all.sum, base = softmax_base(all.largest), factor = exponential(own.largest - base) * inverse;
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++) {
		const int at = first + i * CLUSTER_THREADS * N;
		if (at >= size)
			continue;
#pragma unroll
		for (int j = 0; j < N; j++)
			x[i].e[j] = from_f32<T>(sizeof(T) == 4 ? to_f32(x[i].e[j]) * factor : exponential(to_f32(x[i].e[j]) - base) * inverse);
		store(to + at, x[i]);
	}
	cluster.barrier_wait(); /* nobody leaves while its shared memory is read */
#endif
}

static bool has_clusters(void)
{
	int device = 0, major = 0;
	return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

template <class T> static int cluster_launch(const cuda_softmax_call *call, cudaStream_t stream)
{
	cudaLaunchAttribute attributes[2] = {};
	attributes[0].id = cudaLaunchAttributeClusterDimension;
	attributes[0].val.clusterDim.x = CLUSTER;
	attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
	attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attributes[1].val.programmaticStreamSerializationAllowed = 1;
	cudaLaunchConfig_t config = {};
	config.gridDim = dim3((unsigned)(call->rows * CLUSTER));
	config.blockDim = dim3(CLUSTER_THREADS);
	config.stream = stream;
	config.attrs = attributes;
	config.numAttrs = 2;
	return (int)cudaLaunchKernelEx(&config, softmax_cluster<T>, *call);
}

template <class T> static int softmax_launch(const cuda_softmax_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	const int64_t vectors = call->size / N;
	struct row_grid grid = row_grid_of(call->rows, vectors);
	if (call->size % N != 0 || !rows_aligned(call->x, call->x_stride, sizeof(T)) || !aligned16(call->y))
		softmax_passes<T, 1><<<(unsigned)call->rows, call->size >= 1024 ? 512 : 32, 0, stream>>>(*call);
	else if (grid.per_thread == 1)
		softmax_registers<T, 1><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 2)
		softmax_registers<T, 2><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (grid.per_thread == 4)
		softmax_registers<T, 4><<<grid.grid, grid.block, 0, stream>>>(*call);
	else if (vectors <= CLUSTER * CLUSTER_THREADS * CLUSTER_VECTORS && call->rows <= INT32_MAX / CLUSTER && has_clusters())
		return cluster_launch<T>(call, stream);
	else
		softmax_passes<T, N><<<(unsigned)call->rows, 1024, 0, stream>>>(*call);
	return launched();
}

int cuda_softmax_launch(const struct cuda_softmax_call *call, cudaStream_t stream)
{
	int failed = 0;
	CUDA_BY_DTYPE(call->dtype, T, failed = softmax_launch<T>(call, stream));
	return failed;
}

/* ---- argmax, topk: elements as keys whose order is the definition's --------------------------------------------------------------------- */

/* Greater elements have greater keys: NaNs are equal and the greatest, zeros of both signs equal. The lower half is what makes the lower index the greater. */
static __device__ __forceinline__ uint64_t key_of(float x, uint32_t index)
{
	uint32_t bits = __float_as_uint(x + 0.0f); /* −0 becomes +0 */
	bits = x != x ? 0xff800001u : bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
	return (uint64_t)bits << 32 | (uint32_t)~index;
}

static __device__ __forceinline__ uint32_t index_of(uint64_t key)
{
	return ~(uint32_t)key;
}

static __device__ __forceinline__ uint64_t warp_largest(uint64_t key)
{
#pragma unroll
	for (int step = 16; step > 0; step /= 2) {
		uint64_t other = __shfl_xor_sync(0xffffffffu, key, step);
		key = other > key ? other : key;
	}
	return key;
}

static __device__ __forceinline__ uint64_t block_largest(uint64_t key)
{
	__shared__ uint64_t parts[32];
	key = warp_largest(key);
	__syncthreads();
	if (threadIdx.x % 32 == 0)
		parts[threadIdx.x / 32] = key;
	__syncthreads();
	return warp_largest(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0);
}

/* The largest key below `limit` of N elements and what is there already. No key is 0 or all ones. */
template <class T, int N> static __device__ __forceinline__ uint64_t largest_of(const T *x, int64_t at, uint64_t limit, uint64_t largest)
{
	float v[N];
	load_f32<N>(x + at, v);
#pragma unroll
	for (int j = 0; j < N; j++) {
		uint64_t key = key_of(v[j], (uint32_t)(at + j));
		largest = key > largest && key < limit ? key : largest;
	}
	return largest;
}

/* Of a row. */
template <class T, int N> static __device__ __forceinline__ uint64_t row_largest(const T *x, int64_t size, uint64_t limit)
{
	uint64_t largest = 0;
	for (int64_t at = threadIdx.x * N; at < size; at += (int64_t)blockDim.x * N)
		largest = largest_of<T, N>(x, at, limit, largest);
	return block_largest(largest);
}

template <class T, int N> static __global__ void argmax_rows(const __grid_constant__ cuda_top_call call)
{
	behind_wait();
	uint64_t key = row_largest<T, N>((const T *)call.x + (int64_t)blockIdx.x * call.x_stride, call.size, ~(uint64_t)0);
	if (threadIdx.x == 0)
		call.indices[blockIdx.x] = index_of(key);
}

/* A long row by a cluster of blocks: one multiprocessor alone waits for memory. */
enum { ARGMAX_CLUSTER = 8, ARGMAX_THREADS = 512, ARGMAX_LONG = 32768, ARGMAX_ROWS = 64 };

template <class T> static __global__ void __launch_bounds__(ARGMAX_THREADS) argmax_cluster(const __grid_constant__ cuda_top_call call)
{
#if __CUDA_ARCH__ >= 900
	namespace groups = cooperative_groups;
	constexpr int N = vec_of<T>;
	groups::cluster_group cluster = groups::this_cluster();
	__shared__ uint64_t found;
	const int64_t row = blockIdx.x / ARGMAX_CLUSTER, step = (int64_t)ARGMAX_CLUSTER * ARGMAX_THREADS * N;
	const T *x = (const T *)call.x + row * call.x_stride;
	uint64_t largest = 0;
	behind_wait();
	for (int64_t at = ((int64_t)cluster.block_rank() * ARGMAX_THREADS + threadIdx.x) * N; at < call.size; at += step)
		largest = largest_of<T, N>(x, at, ~(uint64_t)0, largest);
	largest = block_largest(largest);
	if (threadIdx.x == 0)
		found = largest;
	cluster.sync();
	if (cluster.block_rank() == 0 && threadIdx.x == 0) {
		for (int i = 1; i < ARGMAX_CLUSTER; i++) {
			const uint64_t other = *cluster.map_shared_rank(&found, i);
			largest = other > largest ? other : largest;
		}
		call.indices[row] = index_of(largest);
	}
	cluster.sync(); /* nobody leaves while its shared memory is read */
#endif
}

template <class T> static void argmax_cluster_launch(const cuda_top_call *call, cudaStream_t stream)
{
	cudaLaunchAttribute attributes[2] = {};
	attributes[0].id = cudaLaunchAttributeClusterDimension;
	attributes[0].val.clusterDim.x = ARGMAX_CLUSTER;
	attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
	attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attributes[1].val.programmaticStreamSerializationAllowed = 1;
	cudaLaunchConfig_t config = {};
	config.gridDim = dim3((unsigned)(call->rows * ARGMAX_CLUSTER));
	config.blockDim = dim3(ARGMAX_THREADS);
	config.stream = stream;
	config.attrs = attributes;
	config.numAttrs = 2;
	(void)cudaLaunchKernelEx(&config, argmax_cluster<T>, *call);
}

template <class T> static void argmax_launch(const cuda_top_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	const unsigned threads = call->size >= 8192 ? 1024 : call->size >= 1024 ? 256 : 32;
	const bool vectors = call->size % N == 0 && rows_aligned(call->x, call->x_stride, sizeof(T));
	if (vectors && call->size >= ARGMAX_LONG && call->rows <= ARGMAX_ROWS && has_clusters())
		argmax_cluster_launch<T>(call, stream);
	else if (vectors)
		launch_behind(argmax_rows<T, N>, (unsigned)call->rows, threads, stream, *call);
	else
		launch_behind(argmax_rows<T, 1>, (unsigned)call->rows, threads, stream, *call);
}

int cuda_argmax_launch(const struct cuda_top_call *call, cudaStream_t stream)
{
	CUDA_BY_DTYPE(call->dtype, T, argmax_launch<T>(call, stream));
	return launched();
}

template <class T> static __device__ __forceinline__ void take(const cuda_top_call &call, int64_t row, int64_t place, uint64_t key)
{
	call.indices[row * call.k + place] = index_of(key);
	((T *)call.values)[row * call.k + place] = ((const T *)call.x)[row * call.x_stride + index_of(key)];
}

/* A warp a row of up to 32·PER_LANE elements; k turns of the largest that is left. */
template <class T, int PER_LANE> static __global__ void topk_warp(const __grid_constant__ cuda_top_call call)
{
	const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
	uint64_t keys[PER_LANE], best = 0;
	if (row >= call.rows)
		return;
	const T *x = (const T *)call.x + row * call.x_stride;
#pragma unroll
	for (int i = 0; i < PER_LANE; i++) {
		int at = i * 32 + (int)threadIdx.x;
		keys[i] = at < call.size ? key_of(to_f32(x[at]), (uint32_t)at) : 0;
		best = keys[i] > best ? keys[i] : best;
	}
	uint64_t mine = 0; /* lane i keeps the i-th */
	for (int place = 0; place < call.k; place++) {
		uint64_t largest = warp_largest(best);
		mine = (int)threadIdx.x == place ? largest : mine;
		if (best == largest) {
			best = 0;
#pragma unroll
			for (int i = 0; i < PER_LANE; i++) {
				keys[i] = keys[i] == largest ? 0 : keys[i];
				best = keys[i] > best ? keys[i] : best;
			}
		}
	}
	if ((int)threadIdx.x < call.k)
		take<T>(call, row, threadIdx.x, mine);
}

/* A block sorts a row's keys in shared memory, descending (bitonic): `length` is the next power of two. */
template <class T> static __global__ void topk_sort(const __grid_constant__ cuda_top_call call, int length)
{
	extern __shared__ uint64_t keys[];
	const T *x = (const T *)call.x + (int64_t)blockIdx.x * call.x_stride;
	for (int i = threadIdx.x; i < length; i += blockDim.x)
		keys[i] = i < call.size ? key_of(to_f32(x[i]), (uint32_t)i) : 0;
	for (int run = 2; run <= length; run *= 2) {
		for (int step = run / 2; step > 0; step /= 2) {
			__syncthreads();
			for (int i = threadIdx.x; i < length; i += blockDim.x) {
				int other = i ^ step;
				if (other < i)
					continue;
				uint64_t a = keys[i], b = keys[other];
				if ((a < b) == ((i & run) == 0)) {
					keys[i] = b;
					keys[other] = a;
				}
			}
		}
	}
	__syncthreads();
	for (int i = threadIdx.x; i < call.k; i += blockDim.x)
		take<T>(call, blockIdx.x, i, keys[i]);
}

/* Long rows, few of them wanted: k passes. */
template <class T, int N> static __global__ void topk_passes(const __grid_constant__ cuda_top_call call)
{
	uint64_t limit = ~(uint64_t)0;
	for (int place = 0; place < call.k; place++) {
		limit = row_largest<T, N>((const T *)call.x + (int64_t)blockIdx.x * call.x_stride, call.size, limit);
		if (threadIdx.x == 0)
			take<T>(call, blockIdx.x, place, limit);
	}
}

template <class T> static int topk_launch(const cuda_top_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	const dim3 warps(32, 4);
	const unsigned grid = (unsigned)((call->rows + 3) / 4);
	int length = 32;
	while (length < call->size && length < CUDA_TOP_SORTED)
		length *= 2;
	if (call->k <= 32 && call->size <= 128) {
		topk_warp<T, 4><<<grid, warps, 0, stream>>>(*call);
	} else if (call->k <= 32 && call->size <= 512) {
		topk_warp<T, 16><<<grid, warps, 0, stream>>>(*call);
	} else if (call->size <= CUDA_TOP_SORTED && (call->k > 32 || call->size <= 4096)) {
		int bytes = length * (int)sizeof(uint64_t);
		cudaError_t failed = cudaFuncSetAttribute(topk_sort<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
		if (failed != cudaSuccess)
			return (int)failed;
		topk_sort<T><<<(unsigned)call->rows, length >= 2048 ? 1024 : 256, bytes, stream>>>(*call, length);
	} else if (call->size % N == 0 && rows_aligned(call->x, call->x_stride, sizeof(T))) {
		topk_passes<T, N><<<(unsigned)call->rows, 1024, 0, stream>>>(*call);
	} else {
		topk_passes<T, 1><<<(unsigned)call->rows, 1024, 0, stream>>>(*call);
	}
	return launched();
}

int cuda_topk_launch(const struct cuda_top_call *call, cudaStream_t stream)
{
	int failed = 0;
	CUDA_BY_DTYPE(call->dtype, T, failed = topk_launch<T>(call, stream));
	return failed;
}
