/* Libraries called directly, without a provider around them: what a user could pick instead.
 *
 * Layer: tests/bench. Threads: each call runs on one; the library starts its own (OMP_NUM_THREADS, OPENBLAS_NUM_THREADS say how many).
 * Operands are filled with ones: these products and norms take as long for any finite values.
 * Not here: what they are compared with (conformance --serve). */
#ifndef OPD_BENCH_KERNEL_PEERS_H
#define OPD_BENCH_KERNEL_PEERS_H

#include <stdint.h>

#include "opd/dtype.h"

struct peer_case {
	const char *op;
	opd_dtype dtype;
	uint32_t dim_count;
	int64_t dims[8];
};

/* Nanoseconds of oneDNN's own primitive, made before: weights of linear in the layout that it likes best. Negative: this program was built without
 * oneDNN, or it has no such op or dtype. */
double peer_onednn_ns(const struct peer_case *peer);

/* Nanoseconds of cblas_sgemm or cblas_sgemv for linear and matmul of f32. Negative: no libopenblas.so.0, or another op. */
double peer_openblas_ns(const struct peer_case *peer);

#endif
