/* softmax, argmax, topk along the last dimension: calls to kernels/reduce.cu. */
#include "providers/cuda/call.h"
#include "uuid/cuda_reduce.h"

static bool accept_x(const opd_call *call, opd_reason *reason)
{
	const opd_tensor *x = cuda_tensor(call, 0);
	return cuda_accept_dtype("x", x, reason) && cuda_accept_rows("x", x, NULL, reason) &&
	       cuda_accept_extent("the last dimension of x", opd_tensor_last(x), reason);
}

static bool line_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	int64_t dim = call->args[1].i;
	if (dim != -1 && dim + 1 != (int64_t)x->rank && !(x->rank == 0 && dim == 0))
		return OPD_REFUSE(reason, OPD_REASON_ATTRIBUTE, "dim %lld of rank %u, only the last", (long long)dim, (unsigned)x->rank);
	return accept_x(call, reason);
}

static bool topk_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	int64_t size = opd_tensor_last(cuda_tensor(call, 0));
	if (call->args[1].i > CUDA_TOP_FEW && size > CUDA_TOP_SORTED)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "k %lld of %lld elements, above %d elements at most %d", (long long)call->args[1].i, (long long)size,
		                  CUDA_TOP_SORTED, CUDA_TOP_FEW);
	return accept_x(call, reason);
}

static opd_status softmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	struct cuda_rows rows = cuda_rows_of(x);
	opd_status status = cuda_expect_rows(impl, call, 0, x->dtype, x, rows.size, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct cuda_softmax_call made = {
		.rows = rows.rows, .size = rows.size, .x_stride = rows.row_stride, .x = cuda_data(x), .y = opd_tensor_data(call->outputs[0])};
	(void)cuda_dtype_of(x->dtype, &made.dtype);
	return cudart_status(impl->op, cuda_softmax_launch(&made, exec->stream), error);
}

static struct cuda_top_call top_call(const opd_tensor *x, const opd_tensor *indices)
{
	struct cuda_rows rows = cuda_rows_of(x);
	struct cuda_top_call made = {
		.rows = rows.rows, .size = rows.size, .k = 1, .x_stride = rows.row_stride, .x = cuda_data(x), .indices = opd_tensor_data(indices)};
	(void)cuda_dtype_of(x->dtype, &made.dtype);
	return made;
}

static opd_status argmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	opd_status status = call->args[2].b ? cuda_expect_rows(impl, call, 0, OPD_i64, x, 1, error)
	                                    : cuda_expect(impl, call, 0, OPD_i64, x->rank == 0 ? 0 : x->rank - 1, x->shape, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct cuda_top_call made = top_call(x, call->outputs[0]);
	return cudart_status(impl->op, cuda_argmax_launch(&made, exec->stream), error);
}

static opd_status topk_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	opd_status status = cuda_expect_rows(impl, call, 0, x->dtype, x, call->args[1].i, error);
	if (status == OPD_OK)
		status = cuda_expect_rows(impl, call, 1, OPD_i64, x, call->args[1].i, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct cuda_top_call made = top_call(x, call->outputs[1]);
	made.k = call->args[1].i;
	made.values = opd_tensor_data(call->outputs[0]);
	return cudart_status(impl->op, cuda_topk_launch(&made, exec->stream), error);
}

static const opd_impl softmax = {
	CUDA_IMPL("softmax", "softmax(Tensor x, int dim=-1) -> Tensor", OPD_UUID_cuda_reduce, line_predicate, softmax_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
static const opd_impl argmax = {
	CUDA_IMPL("argmax", "argmax(Tensor x, int dim=-1, bool keepdim=False) -> Tensor", OPD_UUID_cuda_reduce, line_predicate, argmax_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
static const opd_impl topk = {
	CUDA_IMPL("topk", "topk(Tensor x, int k) -> (Tensor, Tensor)", OPD_UUID_cuda_reduce, topk_predicate, topk_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
const opd_impl *const cuda_impls_reduce[] = {&softmax, &argmax, &topk, NULL};
