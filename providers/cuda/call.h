/* What the implementations share: reading a call for the kernels, and refusing it.
 *
 * Layer: providers/cuda. Threads: pure functions of their arguments.
 * Kernels want the last dimension's elements next to each other and rows at one distance. Not here: launches (kernels/launch.h), the device backend (backend.h). */
#ifndef OPD_CUDA_CALL_H
#define OPD_CUDA_CALL_H

#include "providers/cuda/kernels/launch.h"
#include "providers/cudart.h"
#include "providers/provider.h"

/* Templates of the implementations, in the order in which `open` registers them: NULL ends. */
extern const opd_impl *const cuda_impls_norm[];
extern const opd_impl *const cuda_impls_activation[];
extern const opd_impl *const cuda_impls_elementwise[];
extern const opd_impl *const cuda_impls_quant[];
extern const opd_impl *const cuda_impls_reduce[];
extern const opd_impl *const cuda_impls_position[];
extern const opd_impl *const cuda_impls_linear[];
extern const opd_impl *const cuda_impls_scaled[];
extern const opd_impl *const cuda_impls_attention[];

/* The tensor of argument `index`; NULL when it is None. */
static inline const opd_tensor *cuda_tensor(const opd_call *call, uint32_t index)
{
	return call->args[index].kind == OPD_ARG_TENSOR ? call->args[index].tensor : NULL;
}

static inline const void *cuda_data(const opd_tensor *tensor)
{
	return tensor == NULL ? NULL : opd_tensor_data(tensor);
}

/* False: no kernel has it. */
bool cuda_dtype_of(opd_dtype dtype, enum cuda_dtype *dtype_out);

/* f32, f16 or bf16. */
OPD_MUST_USE bool cuda_accept_dtype(const char *name, const opd_tensor *tensor, opd_reason *reason);

/* The tensor as rows of its last dimension: `row_stride` elements from one to the next. A rank-0 tensor is one row of one. */
struct cuda_rows {
	int64_t rows;
	int64_t size;
	int64_t row_stride;
};
/* False with a reason: the last dimension isn't contiguous, rows aren't at one distance, or there are more than a grid has. NULL passes. rows_out may be NULL. */
OPD_MUST_USE bool cuda_accept_rows(const char *name, const opd_tensor *tensor, struct cuda_rows *rows_out, opd_reason *reason);

/* The same in run, for what the predicate accepted. */
struct cuda_rows cuda_rows_of(const opd_tensor *tensor);

/* An extent fits into an int. */
OPD_MUST_USE bool cuda_accept_extent(const char *what, int64_t extent, opd_reason *reason);

/* An index operand of any rank whose elements are at one distance. */
OPD_MUST_USE bool cuda_accept_index(const char *name, const opd_tensor *tensor, opd_reason *reason);
struct cuda_index cuda_index_of(const opd_tensor *tensor);

static inline struct cuda_fault cuda_fault_of(const opd_exec *exec)
{
	return (struct cuda_fault){.word = exec->fault, .node = exec->fault_node};
}

/* Where nothing is written in place and no index is read, an earlier fault needs no look. */
static inline struct cuda_fault cuda_fault_where(bool in_place, const opd_exec *exec)
{
	return in_place ? cuda_fault_of(exec) : (struct cuda_fault){0};
}

/* OPD_INTERNAL unless result `index` is contiguous and has this dtype and shape. */
OPD_MUST_USE opd_status cuda_expect(const opd_impl *impl, const opd_call *call, uint32_t index, opd_dtype dtype, uint32_t rank, const int64_t *shape,
                                    opd_error *error);
/* The same for x's shape with the last extent `last` (which a rank-0 x hasn't). */
OPD_MUST_USE opd_status cuda_expect_rows(const opd_impl *impl, const opd_call *call, uint32_t index, opd_dtype dtype, const opd_tensor *x, int64_t last,
                                         opd_error *error);

/* Result `index` lies where the operand does. */
static inline bool cuda_in_place(const opd_call *call, uint32_t index, const opd_tensor *tensor)
{
	return tensor != NULL && opd_tensor_data(call->outputs[index]) == opd_tensor_data(tensor);
}

/* An implementation of this module; fields may follow. */
#define CUDA_IMPL(name, schema_text, uuid_text, predicate_function, run_function)                                                       \
	.struct_bytes = sizeof(opd_impl), .op = (name), .schema = (schema_text), .device = "cuda", .uuid = (uuid_text), .predicate = (predicate_function), \
	.run = (run_function)

#endif
