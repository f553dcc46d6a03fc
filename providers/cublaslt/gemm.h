/* One product for cuBLASLt: y (rows x columns) = left · right, what is fixed about it (a plan) and its run.
 *
 * Layer: providers/cublaslt. Threads: gemm_plan and gemm_run from any thread, on the calling thread's device; a plan is read only.
 * The library counts columns first: it computes yᵀ = rightᵀ·leftᵀ. Candidates that its heuristic names are timed once, on memory of the operands' sizes, and the fastest is
 * kept: so two plans for one shape may differ in a result's last bits, and two runs of one plan don't.
 * Not here: which calls are taken (cublaslt.c). */
#ifndef OPD_CUBLASLT_GEMM_H
#define OPD_CUBLASLT_GEMM_H

#include "providers/cublaslt/library.h"
#include "providers/product.h"

/* What scales f8 sums inside the library. */
enum gemm_scales {
	GEMM_SCALES_NONE,
	GEMM_SCALES_ONE, /* one for each factor */
	GEMM_SCALES_ROW, /* one for each row of each factor */
};

struct gemm {
	opd_dtype factor; /* dtypes of left and right, of y, of bias */
	opd_dtype result; /* also i32 */
	bool tf32;
	bool bias;
	enum gemm_scales scales;
	struct product_matrix left;
	struct product_matrix right;
	int64_t rows;
	int64_t columns;
	int64_t depth;
	int64_t batches;
	int64_t left_batch; /* elements from one batch to the next */
	int64_t right_batch;
	uint32_t left_alignment; /* bytes */
	uint32_t right_alignment;
};

struct gemm_plan {
	cublasLtMatmulDescOpaque_t product;
	cublasLtMatrixLayoutOpaque_t right;
	cublasLtMatrixLayoutOpaque_t left;
	cublasLtMatrixLayoutOpaque_t y;
	cublasLtMatmulAlgo_t algorithm;
	uint64_t workspace_bytes;
	opd_dtype factor;
	opd_dtype result;
	bool bias;
	enum gemm_scales scales;
};

/* OPD_FAILED_PRECONDITION with a reason: the library has no algorithm for it. */
OPD_MUST_USE opd_status gemm_plan(struct library *library, const struct gemm *gemm, struct gemm_plan *plan_out, opd_reason *reason, opd_error *error);

/* Where everything lies; on the plan's device. */
struct gemm_operands {
	const void *left;
	const void *right;
	const void *bias;    /* contiguous; where the plan has one */
	const void *scale_left;
	const void *scale_right;
	void *y;
	void *workspace;     /* [plan->workspace_bytes] */
};
OPD_MUST_USE opd_status gemm_run(struct library *library, cublasLtHandle_t handle, const struct gemm_plan *plan, const struct gemm_operands *operands,
                                 void *stream, opd_error *error);

#endif
