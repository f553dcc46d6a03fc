/* scaled_mm's last step where cuBLASLt doesn't do it: sums times the scales, plus the bias.
 *
 * Layer: providers/cublaslt; C and C++. Returns a cudaError_t. */
#ifndef OPD_CUBLASLT_SCALE_H
#define OPD_CUBLASLT_SCALE_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "opd/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

struct scale_call {
	bool integers;        /* sums are i32, else f32 */
	const void *sums;     /* [rows, columns] */
	int64_t rows;
	int64_t columns;
	const float *scale_a; /* [rows] by this stride, 0: one for all */
	int64_t scale_a_stride;
	const float *scale_b; /* [columns] */
	int64_t scale_b_stride;
	const void *bias;     /* [columns], y's dtype; NULL: none */
	int64_t bias_stride;
	opd_dtype dtype;      /* of y: f32, f16 or bf16 */
	void *y;
};
int scale_launch(const struct scale_call *call, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
