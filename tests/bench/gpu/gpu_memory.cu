#include "tests/bench/gpu/gpu_memory.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static __device__ uint32_t random_bits(uint64_t state)
{
	state += 0x9e3779b97f4a7c15u;
	state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
	state = (state ^ state >> 27) * 0x94d049bb133111ebu;
	return (uint32_t)(state >> 32);
}

static __global__ void fill(void *memory, enum gpu_kind kind, uint64_t elements, uint64_t seed)
{
	for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (uint64_t)gridDim.x * blockDim.x) {
		uint32_t bits = random_bits(seed * 0x100000001b3u + i);
		float value = (float)(bits >> 8) * 0x1p-22f - 2.0f;
		if (kind == GPU_F32)
			((float *)memory)[i] = value;
		else if (kind == GPU_F16)
			((__half *)memory)[i] = __float2half(value);
		else if (kind == GPU_BF16)
			((__nv_bfloat16 *)memory)[i] = __float2bfloat16(value);
		else
			((uint8_t *)memory)[i] = (uint8_t)(bits & 0xb7);
	}
}

int gpu_fill(void *memory, enum gpu_kind kind, uint64_t elements, uint64_t seed, cudaStream_t stream)
{
	if (elements > 0)
		fill<<<2048, 256, 0, stream>>>(memory, kind, elements, seed);
	return (int)cudaGetLastError();
}

enum { UNROLL = 4 };

static __global__ void copy(uint4 *to, const uint4 *from, uint64_t words)
{
	uint4 moved[UNROLL];
	const uint64_t first = (uint64_t)blockIdx.x * blockDim.x * UNROLL + threadIdx.x;
#pragma unroll
	for (int u = 0; u < UNROLL; u++)
		if (first + u * blockDim.x < words)
			moved[u] = from[first + u * blockDim.x];
#pragma unroll
	for (int u = 0; u < UNROLL; u++)
		if (first + u * blockDim.x < words)
			to[first + u * blockDim.x] = moved[u];
}

int gpu_copy(void *to, const void *from, uint64_t bytes, cudaStream_t stream)
{
	const uint64_t words = bytes / 16, per_block = 256 * UNROLL;
	if (words > 0)
		copy<<<(unsigned)((words + per_block - 1) / per_block), 256, 0, stream>>>((uint4 *)to, (const uint4 *)from, words);
	return (int)cudaGetLastError();
}
