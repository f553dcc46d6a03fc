/* Device memory for the GPU bench: filling with random numbers, and a copy as the ceiling of what memory can do.
 *
 * Layer: tests; C and C++. Each returns a cudaError_t. Threads: one. */
#ifndef OPD_BENCH_GPU_MEMORY_H
#define OPD_BENCH_GPU_MEMORY_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum gpu_kind { GPU_F32, GPU_F16, GPU_BF16, GPU_BYTES /* any bits but those of an f8 NaN */ };

/* Uniform values of [−2, 2). */
int gpu_fill(void *memory, enum gpu_kind kind, uint64_t elements, uint64_t seed, cudaStream_t stream);

/* 16 bytes an access; bytes is a multiple of 16. */
int gpu_copy(void *to, const void *from, uint64_t bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
