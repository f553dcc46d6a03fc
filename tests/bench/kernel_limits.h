/* What the machine can do: copying, reading and multiplying as fast as plain loops do it. What kernels are held against.
 *
 * Layer: tests/bench. Threads: each call runs on one thread and shares its work with the host's parallel_for.
 * Compiled for the machine at hand (-march=native).
 * Not here: libraries (kernel_peers.c). */
#ifndef OPD_BENCH_KERNEL_LIMITS_H
#define OPD_BENCH_KERNEL_LIMITS_H

#include "tests/conformance/host.h"

/* Nanoseconds to copy bytes/2 to as many others, operands warm where they fit: the better of plain and non-temporal stores. */
double limit_copy_ns(struct host *host, uint32_t threads, uint64_t bytes);

/* Nanoseconds to read so many bytes: the better of one stream and of four at once. */
double limit_read_ns(struct host *host, uint32_t threads, uint64_t bytes);

/* Multiplications (with their additions) a nanosecond, in registers. dtype f32, or bf16 where the machine has the instruction; else 0. */
double limit_products(struct host *host, uint32_t threads, opd_dtype dtype);

#endif
