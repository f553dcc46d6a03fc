/* Attention as one graph of cuDNN's: scores, scale, mask, softmax, product, which its flash-attention engine recognises and runs as one kernel.
 *
 * Layer: providers/cudnn. Threads: attend_plan and attend_run take the library's mutex. A plan is freed by attend_plan_destroy.
 * Not here: which calls are taken (cudnn.c). */
#ifndef OPD_CUDNN_ATTEND_H
#define OPD_CUDNN_ATTEND_H

#include "providers/cudnn/library.h"

/* Tensors as [sequence, head, token, element], with strides. */
struct attend {
	opd_dtype dtype; /* f16, bf16 */
	bool causal;     /* only with as many keys as queries */
	int64_t sequences, heads, kv_heads, queries, keys, size;
	int64_t query_strides[4];
	int64_t key_strides[4];
	int64_t value_strides[4];
	int64_t result_strides[4];
};

struct attend_plan {
	struct library *library;
	cudnnBackendDescriptor_t plan;
	uint64_t workspace_bytes;
	bool causal;
};

/* OPD_FAILED_PRECONDITION with a reason: no engine takes it. Compiles a kernel: may take seconds. */
OPD_MUST_USE opd_status attend_plan(struct library *library, uint32_t ordinal, const struct attend *attend, struct attend_plan *plan_out, opd_reason *reason,
                                    opd_error *error);
void attend_plan_destroy(struct attend_plan *plan);

OPD_MUST_USE opd_status attend_run(const struct attend_plan *plan, uint32_t ordinal, const void *query, const void *key, const void *value, void *result,
                                   float scale, void *workspace, void *stream, opd_error *error);

#endif
