/* linear with few rows: calls to kernels/linear.cu. More rows are left to a library's provider. */
#include "providers/cuda/call.h"
#include "uuid/cuda_linear.h"

static bool linear_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	struct cuda_rows rows = {0};
	if (!cuda_accept_dtype("x", x, reason) || !cuda_accept_rows("x", x, &rows, reason) || !cuda_accept_rows("weight", cuda_tensor(call, 1), NULL, reason))
		return false;
	if (rows.rows > CUDA_LINEAR_ROWS)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "x has %lld rows, at most %d", (long long)rows.rows, CUDA_LINEAR_ROWS);
	return true;
}

static opd_status linear_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0), *weight = cuda_tensor(call, 1), *bias = cuda_tensor(call, 2);
	struct cuda_rows rows = cuda_rows_of(x);
	opd_status status = cuda_expect_rows(impl, call, 0, x->dtype, x, weight->shape[0], error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct cuda_linear_call made = {
		.rows = (int)(call->outputs[0]->elements / (uint64_t)weight->shape[0]), /* x may have no elements to count them by */
		.columns = weight->shape[0],
		.depth = rows.size,
		.x_stride = rows.row_stride,
		.weight_stride = cuda_rows_of(weight).row_stride,
		.bias_stride = bias == NULL ? 0 : bias->strides[0],
		.x = cuda_data(x),
		.weight = cuda_data(weight),
		.bias = cuda_data(bias),
		.y = opd_tensor_data(call->outputs[0]),
	};
	(void)cuda_dtype_of(x->dtype, &made.dtype);
	if (made.rows > CUDA_LINEAR_ROWS)
		return opd_fail(error, OPD_INTERNAL, "linear: %d rows, the predicate accepts %d", made.rows, CUDA_LINEAR_ROWS);
	return cudart_status(impl->op, cuda_linear_launch(&made, exec->stream), error);
}

static const opd_impl linear = {
	CUDA_IMPL("linear", "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", OPD_UUID_cuda_linear, linear_predicate, linear_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
const opd_impl *const cuda_impls_linear[] = {&linear, NULL};
