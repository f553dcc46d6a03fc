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

/* Of an f32 element its exponential takes the place; one that is rounded to 16 bits is computed again. */
template <class T> static __device__ __forceinline__ float first_exponential(T &x, float largest)
{
	return exponential(to_f32(x) - largest);
}
template <> [[maybe_unused]] __device__ __forceinline__ float first_exponential(float &x, float largest)
{
	return x = exponential(x - largest);
}
template <class T> static __device__ __forceinline__ float second_exponential(T x, float largest)
{
	return exponential(to_f32(x) - largest);
}
template <> [[maybe_unused]] __device__ __forceinline__ float second_exponential(float x, float largest)
{
	return x;
}

/* Rows that only the registers of several multiprocessors hold: CLUSTER blocks a row, which share their maximum and sum by each other's shared memory. The row is read once. */
enum { CLUSTER = 16, CLUSTER_THREADS = 256, CLUSTER_VECTORS = 8 };

template <class T> static __global__ void __launch_bounds__(CLUSTER_THREADS, 4) softmax_cluster(const __grid_constant__ cuda_softmax_call call)
{
#if __CUDA_ARCH__ >= 900
	namespace groups = cooperative_groups;
	constexpr int N = vec_of<T>;
	groups::cluster_group cluster = groups::this_cluster();
	__shared__ float parts[2];
	const int64_t row = blockIdx.x / CLUSTER;
	const int first = ((int)cluster.block_rank() * CLUSTER_THREADS * CLUSTER_VECTORS + (int)threadIdx.x) * N, size = (int)call.size;
	const T *from = (const T *)call.x + row * call.x_stride;
	T *to = (T *)call.y + row * call.size;
	pack<T, N> x[CLUSTER_VECTORS];
	float largest = -INFINITY, sum = 0;
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++) {
		const int at = first + i * CLUSTER_THREADS * N;
		if (at < size)
			x[i] = load<N>(from + at);
	}
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++)
#pragma unroll
		for (int j = 0; j < N; j++)
			if (first + i * CLUSTER_THREADS * N < size)
				largest = fmaxf(largest, to_f32(x[i].e[j]));
	largest = row_reduce<max_of>(largest);
	if (threadIdx.x == 0)
		parts[0] = largest;
	cluster.sync();
	for (int i = 0; i < CLUSTER; i++)
		largest = fmaxf(largest, *cluster.map_shared_rank(&parts[0], i));
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++)
#pragma unroll
		for (int j = 0; j < N; j++)
			if (first + i * CLUSTER_THREADS * N < size)
				sum += first_exponential(x[i].e[j], largest);
	sum = row_reduce<sum_of>(sum, 1);
	if (threadIdx.x == 0)
		parts[1] = sum;
	cluster.sync();
	sum = 0;
	for (int i = 0; i < CLUSTER; i++)
		sum += *cluster.map_shared_rank(&parts[1], i);
	cluster.barrier_arrive(); /* this block has read the others' shared memory */
	const float inverse = 1.0f / sum;
#pragma unroll
	for (int i = 0; i < CLUSTER_VECTORS; i++) {
		const int at = first + i * CLUSTER_THREADS * N;
		if (at >= size)
			continue;
#pragma unroll
		for (int j = 0; j < N; j++)
			x[i].e[j] = from_f32<T>(second_exponential(x[i].e[j], largest) * inverse);
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
	/* 16 blocks are more than every device of the kind must have together; those there are do. */
	cudaError_t failed = cudaFuncSetAttribute(softmax_cluster<T>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
	if (failed != cudaSuccess)
		return (int)failed;
	cudaLaunchAttribute attribute = {};
	attribute.id = cudaLaunchAttributeClusterDimension;
	attribute.val.clusterDim.x = CLUSTER;
	attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
	cudaLaunchConfig_t config = {};
	config.gridDim = dim3((unsigned)(call->rows * CLUSTER));
	config.blockDim = dim3(CLUSTER_THREADS);
	config.stream = stream;
	config.attrs = &attribute;
	config.numAttrs = 1;
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
