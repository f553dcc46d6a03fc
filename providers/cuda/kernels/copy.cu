/* Several small copies in one launch: what a captured run brings to its places and takes from them, instead of a copy of the driver's for each, which takes 2 to 4 us of the device's time and
 * as much of the host's. Blocks of a copy are grid rows; source and target may be host memory that kernels reach. */
#include "providers/cuda/kernels/common.cuh"

/* Each thread has so many bytes at once. */
enum { WIDE = 16, THREADS = 256, BLOCK_BYTES = 4 * WIDE * THREADS, BLOCKS_MAX = 64 };

template <class T> static __device__ __forceinline__ void copy_as(const opd_copy &copy, uint64_t first, uint64_t step)
{
	T *to = (T *)((unsigned char *)copy.to + copy.to_offset);
	const T *from = (const T *)((const unsigned char *)copy.from + copy.from_offset);
	for (uint64_t i = first; i < copy.bytes / sizeof(T); i += step)
		to[i] = copy.from == NULL ? T{} : from[i];
}

static __global__ void copies(const cuda_copy_call call)
{
	const opd_copy &copy = call.copies[blockIdx.y];
	const uint64_t first = (uint64_t)blockIdx.x * THREADS + threadIdx.x, step = (uint64_t)gridDim.x * THREADS;
	const uint64_t together = ((uintptr_t)copy.to + copy.to_offset) | ((uintptr_t)copy.from + copy.from_offset) | copy.bytes;
	behind_wait();
	if (together % WIDE == 0)
		copy_as<uint4>(copy, first, step);
	else if (together % sizeof(uint32_t) == 0)
		copy_as<uint32_t>(copy, first, step);
	else
		copy_as<unsigned char>(copy, first, step);
}

extern "C" int cuda_copy_launch(const struct cuda_copy_call *call, cudaStream_t stream)
{
	uint64_t largest = 0;
	for (uint32_t i = 0; i < call->count; i++)
		largest = call->copies[i].bytes > largest ? call->copies[i].bytes : largest;
	uint64_t blocks = (largest + BLOCK_BYTES - 1) / BLOCK_BYTES;
	blocks = blocks > BLOCKS_MAX ? BLOCKS_MAX : blocks;
	if (blocks == 0)
		return 0;
	launch_behind(copies, dim3((unsigned)blocks, call->count), dim3(THREADS), stream, *call);
	return launched();
}
