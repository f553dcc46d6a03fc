/* The device backend `cuda`: memory, copies, streams, events, graphs of CUDA's runtime, and the probe of the platform.
 *
 * Layer: providers/cuda. Threads: as opd_backend says; a stream is a cudaStream_t, an event a cudaEvent_t, memory a device address, a graph a cudaGraphExec_t, so that other
 * modules of the kind (cublaslt, cudnn) use them as they are; all share the device's primary context.
 * Life: cuda_backend_probe, and when it found devices, registration of the table that cuda_backend_init filled in. Nothing is kept between calls.
 * Not here: pools of memory, events and streams (the host's). */
#ifndef OPD_CUDA_BACKEND_H
#define OPD_CUDA_BACKEND_H

#include "providers/provider.h"

/* How many devices can be used; 0: `missing` says why, as "not available: libcuda.so.1 not found". */
uint32_t cuda_backend_probe(char *missing, size_t bytes);

void cuda_backend_init(opd_backend *backend, uint32_t device_count);

#endif
