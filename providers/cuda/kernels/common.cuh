/* What the kernels share: elements as f32, 16-byte accesses, sums and maxima over a row's threads, index faults.
 *
 * Layer: providers/cuda, device code. A row's threads are threadIdx.x (a multiple of 32); a block holds several rows only where that is one warp.
 * Not here: launches (each .cu has its own, behind launch.h). */
#ifndef OPD_CUDA_COMMON_CUH
#define OPD_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "providers/cuda/kernels/launch.h"

/* ---- Elements ------------------------------------------------------------------------------------------------------------ */

template <class T> static __device__ __forceinline__ float to_f32(T value)
{
	return (float)value;
}
template <> __device__ __forceinline__ float to_f32(__half value)
{
	return __half2float(value);
}
template <> __device__ __forceinline__ float to_f32(__nv_bfloat16 value)
{
	return __bfloat162float(value);
}

template <class T> static __device__ __forceinline__ T from_f32(float value);
template <> __device__ __forceinline__ float from_f32(float value)
{
	return value;
}
template <> __device__ __forceinline__ __half from_f32(float value)
{
	return __float2half_rn(value);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_f32(float value)
{
	return __float2bfloat16_rn(value);
}

/* Rounded to T, as f32. */
template <class T> static __device__ __forceinline__ float rounded(float value)
{
	return to_f32(from_f32<T>(value));
}

/* N elements that one access moves. */
template <class T, int N> struct alignas(sizeof(T) * N) pack {
	T e[N];
};

/* How many elements of T are 16 bytes. */
template <class T> constexpr int vec_of = 16 / (int)sizeof(T);

template <int BYTES> struct raw;
template <> struct raw<16> {
	typedef uint4 type;
};
template <> struct raw<8> {
	typedef uint2 type;
};
template <> struct raw<4> {
	typedef uint32_t type;
};
template <> struct raw<2> {
	typedef uint16_t type;
};
template <> struct raw<1> {
	typedef uint8_t type;
};

template <int N, class T> static __device__ __forceinline__ pack<T, N> load(const T *from)
{
	typedef typename raw<sizeof(T) * N>::type word;
	word bits = *reinterpret_cast<const word *>(from);
	return *reinterpret_cast<pack<T, N> *>(&bits);
}

/* Through the read-only path, not kept in L1: each byte is read once. */
template <int N, class T> static __device__ __forceinline__ pack<T, N> load_once(const T *from)
{
	static_assert(sizeof(T) * N == 16, "16 bytes");
	uint4 bits;
	asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(from));
	return *reinterpret_cast<pack<T, N> *>(&bits);
}

/* Past L1, where 16 bytes are moved: what each thread reads once, but may also be written (load_once wants memory that nobody writes). */
template <int N, class T> static __device__ __forceinline__ pack<T, N> load_passing(const T *from)
{
	uint4 bits;
	if (sizeof(T) * N != 16)
		return load<N>(from);
	asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(from));
	return *reinterpret_cast<pack<T, N> *>(&bits);
}

template <int N, class T> static __device__ __forceinline__ void store(T *to, const pack<T, N> &values)
{
	typedef typename raw<sizeof(T) * N>::type word;
	*reinterpret_cast<word *>(to) = *reinterpret_cast<const word *>(&values);
}

/* First to leave the second-level cache: what isn't read again soon. */
template <int N, class T> static __device__ __forceinline__ void store_passing(T *to, const pack<T, N> &values)
{
	typedef typename raw<sizeof(T) * N>::type word;
	__stcs(reinterpret_cast<word *>(to), *reinterpret_cast<const word *>(&values));
}

template <int N, class T> static __device__ __forceinline__ void load_f32(const T *from, float (&to)[N])
{
	constexpr int STEP = N * sizeof(T) > 16 ? 16 / (int)sizeof(T) : N;
#pragma unroll
	for (int i = 0; i < N; i += STEP) {
		pack<T, STEP> values = load<STEP>(from + i);
#pragma unroll
		for (int j = 0; j < STEP; j++)
			to[i + j] = to_f32(values.e[j]);
	}
}

/* A pack's elements. */
template <int N, class T> static __device__ __forceinline__ void unpack_f32(const pack<T, N> &from, float (&to)[N])
{
#pragma unroll
	for (int j = 0; j < N; j++)
		to[j] = to_f32(from.e[j]);
}

template <int N, class T> static __device__ __forceinline__ void store_f32(T *to, const float (&from)[N])
{
	constexpr int STEP = N * sizeof(T) > 16 ? 16 / (int)sizeof(T) : N;
#pragma unroll
	for (int i = 0; i < N; i += STEP) {
		pack<T, STEP> values;
#pragma unroll
		for (int j = 0; j < STEP; j++)
			values.e[j] = from_f32<T>(from[i + j]);
		store(to + i, values);
	}
}

/* ---- A row's threads ------------------------------------------------------------------------------------------------------- */

struct sum_of {
	static constexpr float identity = 0;
	static __device__ __forceinline__ float of(float a, float b)
	{
		return a + b;
	}
};
/* A NaN on either side is passed over: callers that want it look for it elsewhere. */
struct max_of {
	static constexpr float identity = -INFINITY;
	static __device__ __forceinline__ float of(float a, float b)
	{
		return fmaxf(a, b);
	}
};

template <class Op> static __device__ __forceinline__ float warp_reduce(float value)
{
#pragma unroll
	for (int step = 16; step > 0; step /= 2)
		value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, step));
	return value;
}

/* Over threadIdx.x of the caller's row, in an order that depends on blockDim.x alone. Everybody gets the result. A kernel that reduces more than once numbers its turns: each
 * has memory of its own, so that one barrier does. */
enum { TURNS = 2 };
template <class Op> static __device__ __forceinline__ float row_reduce(float value, int turn = 0)
{
	value = warp_reduce<Op>(value);
	if (blockDim.x == 32)
		return value;
	__shared__ float parts[TURNS][32];
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
	if (lane == 0)
		parts[turn][warp] = value;
	__syncthreads();
	return warp_reduce<Op>(lane < warps ? parts[turn][lane] : Op::identity);
}

template <class V> static __device__ __forceinline__ V warp_sum(V value)
{
#pragma unroll
	for (int step = 16; step > 0; step /= 2)
		value += __shfl_xor_sync(0xffffffffu, value, step);
	return value;
}

/* A sum of floats or doubles, as row_reduce. */
template <class V> static __device__ __forceinline__ V row_sum(V value, int turn)
{
	value = warp_sum(value);
	if (blockDim.x == 32)
		return value;
	__shared__ V parts[TURNS][32];
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
	if (lane == 0)
		parts[turn][warp] = value;
	__syncthreads();
	return warp_sum(lane < warps ? parts[turn][lane] : (V)0);
}

/* How rows are spread: `vectors` accesses a row. */
struct row_grid {
	dim3 block;
	unsigned grid;
	int per_thread; /* accesses a thread: 1, 2, 4; 0: too many to keep in registers */
};

static inline struct row_grid row_grid_of(int64_t rows, int64_t vectors)
{
	struct row_grid made = {dim3(32, 1), 0, 0};
	if (vectors <= 128) { /* a warp a row, so that short rows fill the device too */
		made.block = dim3(32, 4);
		made.per_thread = vectors <= 32 ? 1 : vectors <= 64 ? 2 : 4;
	} else {
		made.per_thread = vectors <= 256 ? 1 : vectors <= 1024 ? 2 : 4;
		int64_t threads = (vectors + made.per_thread - 1) / made.per_thread;
		if (threads > 1024) {
			threads = 1024;
			made.per_thread = 0;
		}
		made.block = dim3((unsigned)((threads + 31) / 32 * 32), 1);
	}
	made.grid = (unsigned)((rows + made.block.y - 1) / made.block.y);
	return made;
}

/* ---- Index faults ---------------------------------------------------------------------------------------------------------- */

/* A kernel does nothing where an earlier one of its request has found a bad index. */
static __device__ __forceinline__ bool faulted(const struct cuda_fault &fault)
{
	return fault.word != NULL && *(volatile uint32_t *)&fault.word->state != 0;
}

/* The same answer for all threads of a block, which ask together. The word is written while they look: those that went on without the others would find in shared memory what nobody has
 * written, and take it for a number of a sequence. */
static __device__ __forceinline__ bool faulted_together(const struct cuda_fault &fault)
{
	return fault.word != NULL && __syncthreads_or(faulted(fault)) != 0;
}

/* True when low <= value <= high; else false, after reporting it. */
static __device__ __forceinline__ bool index_ok(const struct cuda_fault &fault, uint32_t param, uint64_t position, int64_t value, int64_t low,
                                                int64_t high)
{
	if (value >= low && value <= high)
		return true;
	if (fault.word != NULL && atomicCAS(&fault.word->state, 0u, 1u) == 0u) {
		fault.word->param = param;
		fault.word->position = position;
		fault.word->value = value;
		fault.word->low = low;
		fault.word->high = high;
		fault.word->node = fault.node;
		__threadfence();
		atomicExch(&fault.word->state, 2u);
	}
	return false;
}

static __device__ __forceinline__ int64_t index_at(const struct cuda_index &index, int64_t at)
{
	at *= index.stride;
	return index.wide ? ((const int64_t *)index.data)[at] : ((const int32_t *)index.data)[at];
}

/* ---- Launching --------------------------------------------------------------------------------------------------------------- */

/* A kernel that is launched by launch_behind may be on the device while the one before it on the stream still runs: it calls behind_wait before it reads or writes anything that another
 * kernel may write or read, and all of its threads that do more than return call it. Then what came before is done and seen. It lets the next one come as soon as all its own blocks are there.
 * In a chain of short kernels that hides what a launch costs: 1.1 us a node of a graph, on an H100, and the time until memory is busy. */
static __device__ __forceinline__ void behind_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
	asm volatile("griddepcontrol.launch_dependents;");
	asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Asks for memory that will be read soon; it isn't looked at, so that this may stand before behind_wait. 16-byte aligned, a multiple of 16. */
static __device__ __forceinline__ void ask_ahead(const void *from, uint32_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
	asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

/* The same for the line of 128 bytes that an address lies in. */
static __device__ __forceinline__ void ask_line(const void *at)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
	asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
#endif
}

/* Whether the current device can. Only Hopper runs the code that waits: later ones compile what was made for 8.0. */
static inline bool launches_behind()
{
	enum { DEVICES = 64, UNKNOWN = 0, NO = 1, YES = 2 };
	static int known[DEVICES];
	int device = 0, major = 0;
	if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= DEVICES)
		return false;
	int answer = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
	if (answer == UNKNOWN) {
		answer = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9 ? YES : NO;
		__atomic_store_n(&known[device], answer, __ATOMIC_RELAXED);
	}
	return answer == YES;
}

/* Of a kernel that calls behind_wait; what fails is the runtime's last error. */
template <class Call, class... More>
static void launch_behind(void (*kernel)(Call, More...), dim3 grid, dim3 block, cudaStream_t stream, const Call &call, More... more)
{
	cudaLaunchAttribute behind;
	behind.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	behind.val.programmaticStreamSerializationAllowed = 1;
	cudaLaunchConfig_t config = {};
	config.gridDim = grid;
	config.blockDim = block;
	config.stream = stream;
	config.attrs = &behind;
	config.numAttrs = launches_behind() ? 1 : 0;
	(void)cudaLaunchKernelEx(&config, kernel, call, more...);
}

/* Calls `function<T>(…)` for the dtype. */
#define CUDA_BY_DTYPE(dtype, T, ...)             \
	switch (dtype) {                             \
	case CUDA_F32: {                             \
		typedef float T;                         \
		__VA_ARGS__;                             \
		break;                                   \
	}                                            \
	case CUDA_F16: {                             \
		typedef __half T;                        \
		__VA_ARGS__;                             \
		break;                                   \
	}                                            \
	case CUDA_BF16: {                            \
		typedef __nv_bfloat16 T;                 \
		__VA_ARGS__;                             \
		break;                                   \
	}                                            \
	}

static inline int launched(void)
{
	return (int)cudaGetLastError();
}

static inline bool aligned16(const void *pointer)
{
	return (uintptr_t)pointer % 16 == 0;
}

/* Rows at this distance (elements) can be read by 16-byte accesses. */
static inline bool rows_aligned(const void *pointer, int64_t stride, size_t element)
{
	return aligned16(pointer) && (uint64_t)stride * element % 16 == 0;
}

#endif
