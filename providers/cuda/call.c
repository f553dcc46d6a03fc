#include "providers/cuda/call.h"

#include <limits.h>

bool cuda_dtype_of(opd_dtype dtype, enum cuda_dtype *dtype_out)
{
	switch (dtype) {
	case OPD_f32:
		*dtype_out = CUDA_F32;
		return true;
	case OPD_f16:
		*dtype_out = CUDA_F16;
		return true;
	case OPD_bf16:
		*dtype_out = CUDA_BF16;
		return true;
	default:
		return false;
	}
}

bool cuda_accept_dtype(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	enum cuda_dtype dtype;
	if (tensor == NULL || cuda_dtype_of(tensor->dtype, &dtype))
		return true;
	return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s %s, only f32, f16, bf16", name, opd_dtype_name(tensor->dtype));
}

/* Dimensions [0, count) as one, `stride` elements from each to the next; false: they aren't at one distance. */
static bool dims_merge(const opd_tensor *tensor, uint32_t count, int64_t *extent_out, int64_t *stride_out)
{
	int64_t extent = 1, stride = 0;
	for (uint32_t i = count; i-- > 0;) {
		if (tensor->shape[i] == 1)
			continue;
		if (extent == 1)
			stride = tensor->strides[i];
		else if (tensor->strides[i] != stride * extent)
			return false;
		extent *= tensor->shape[i];
	}
	*extent_out = extent;
	*stride_out = stride;
	return true;
}

bool cuda_accept_rows(const char *name, const opd_tensor *tensor, struct cuda_rows *rows_out, opd_reason *reason)
{
	struct cuda_rows rows = {1, 1, 1};
	if (tensor == NULL)
		return true;
	if (tensor->rank > 0)
		rows.size = rows.row_stride = opd_tensor_last(tensor);
	if (opd_tensor_contiguous(tensor)) {
		for (uint32_t i = 0; i + 1 < tensor->rank; i++) /* rows of no elements are rows too */
			rows.rows *= tensor->shape[i];
	} else {
		if (rows.size > 1 && tensor->strides[tensor->rank - 1] != 1)
			return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has stride %lld in its last dimension, only 1", name,
			                  (long long)tensor->strides[tensor->rank - 1]);
		if (!dims_merge(tensor, tensor->rank - 1, &rows.rows, &rows.row_stride))
			return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has rows that aren't at one distance", name);
	}
	if (rows.rows > INT_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "%s has %lld rows, at most %d", name, (long long)rows.rows, INT_MAX);
	if (rows_out != NULL)
		*rows_out = rows;
	return true;
}

struct cuda_rows cuda_rows_of(const opd_tensor *tensor)
{
	struct cuda_rows rows = {0};
	(void)!cuda_accept_rows("", tensor, &rows, NULL);
	return rows;
}

bool cuda_accept_extent(const char *what, int64_t extent, opd_reason *reason)
{
	if (extent <= INT_MAX / 2)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_SIZE, "%s is %lld, at most %d", what, (long long)extent, INT_MAX / 2);
}

bool cuda_accept_index(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	int64_t extent, stride;
	if (opd_tensor_empty(tensor))
		return true;
	if (!dims_merge(tensor, tensor->rank, &extent, &stride))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has elements that aren't at one distance", name);
	if (extent > INT_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "%s has %lld elements, at most %d", name, (long long)extent, INT_MAX);
	return true;
}

struct cuda_index cuda_index_of(const opd_tensor *tensor)
{
	int64_t extent, stride = 0;
	(void)!dims_merge(tensor, tensor->rank, &extent, &stride);
	return (struct cuda_index){.data = opd_tensor_data(tensor), .stride = stride, .wide = tensor->dtype == OPD_i64};
}

opd_status cuda_expect(const opd_impl *impl, const opd_call *call, uint32_t index, opd_dtype dtype, uint32_t rank, const int64_t *shape, opd_error *error)
{
	const opd_tensor *output = call->outputs[index];
	bool same = output->dtype == dtype && output->rank == rank && opd_tensor_contiguous(output);
	for (uint32_t i = 0; same && i < rank; i++)
		same = output->shape[i] == shape[i];
	if (same)
		return OPD_OK;
	return opd_fail(error, OPD_INTERNAL, "%s: result %u is %s of rank %u, strided or of another shape than the contiguous %s of rank %u that the kernel writes",
	                impl->op, (unsigned)index, opd_dtype_name(output->dtype), (unsigned)output->rank, opd_dtype_name(dtype), (unsigned)rank);
}

opd_status cuda_expect_rows(const opd_impl *impl, const opd_call *call, uint32_t index, opd_dtype dtype, const opd_tensor *x, int64_t last, opd_error *error)
{
	int64_t shape[OPD_RANK_MAX] = {0};
	for (uint32_t i = 0; i < x->rank; i++)
		shape[i] = x->shape[i];
	if (x->rank > 0)
		shape[x->rank - 1] = last;
	return cuda_expect(impl, call, index, dtype, x->rank, shape, error);
}
