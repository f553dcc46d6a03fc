/* static_quant_fp8, dynamic_quant_fp8: calls to kernels/quant.cu. */
#include <limits.h>

#include "providers/cuda/call.h"
#include "uuid/cuda_quant.h"

static bool quant_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	return cuda_accept_dtype("x", x, reason) && cuda_accept_rows("x", x, NULL, reason) &&
	       cuda_accept_extent("the last dimension of x", opd_tensor_last(x), reason);
}

static struct cuda_quant_call quant_call(const opd_call *call, bool per_token)
{
	const opd_tensor *x = cuda_tensor(call, 0);
	struct cuda_rows rows = cuda_rows_of(x);
	struct cuda_quant_call made = {
		.per_token = per_token,
		.rows = rows.rows,
		.hidden = (int)rows.size,
		.x_stride = rows.row_stride,
		.x = cuda_data(x),
		.y = opd_tensor_data(call->outputs[0]),
	};
	(void)cuda_dtype_of(x->dtype, &made.dtype);
	if (!per_token && opd_tensor_contiguous(x) && x->elements <= INT_MAX / 2) {
		made.rows = 1;
		made.hidden = (int)x->elements;
	}
	return made;
}

static opd_status static_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	opd_status status = cuda_expect_rows(impl, call, 0, OPD_f8_e4m3fn, x, opd_tensor_last(x), error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct cuda_quant_call made = quant_call(call, false);
	made.scale = cuda_data(cuda_tensor(call, 1));
	return cudart_status(impl->op, cuda_quant_launch(&made, exec->stream), error);
}

/* A word for the largest magnitude of all of x. */
static opd_status dynamic_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	(void)impl, (void)state, (void)reason, (void)error;
	plan_out->scratch_bytes = call->args[1].b ? 0 : sizeof(uint32_t);
	return OPD_OK;
}

static opd_status dynamic_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const int64_t one = 1;
	const opd_tensor *x = cuda_tensor(call, 0);
	const bool per_token = call->args[1].b;
	opd_status status = cuda_expect_rows(impl, call, 0, OPD_f8_e4m3fn, x, opd_tensor_last(x), error);
	if (status == OPD_OK)
		status = per_token ? cuda_expect_rows(impl, call, 1, OPD_f32, x, 1, error) : cuda_expect(impl, call, 1, OPD_f32, 1, &one, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || call->outputs[1]->elements == 0)
		return status;
	struct cuda_quant_call made = quant_call(call, per_token);
	if (x->elements == 0) /* the scale of nothing: of rows without elements, or of no row */
		made.rows = per_token ? (int64_t)call->outputs[1]->elements : 0;
	made.scales_out = opd_tensor_data(call->outputs[1]);
	made.largest = exec->scratch;
	return cudart_status(impl->op, cuda_quant_launch(&made, exec->stream), error);
}

static const opd_impl static_quant_fp8 = {
	CUDA_IMPL("static_quant_fp8", "static_quant_fp8(Tensor x, Tensor scale) -> Tensor", OPD_UUID_cuda_quant, quant_predicate, static_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
static const opd_impl dynamic_quant_fp8 = {
	CUDA_IMPL("dynamic_quant_fp8", "dynamic_quant_fp8(Tensor x, bool per_token) -> (Tensor, Tensor)", OPD_UUID_cuda_quant, quant_predicate, dynamic_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.plan = dynamic_plan,
};
const opd_impl *const cuda_impls_quant[] = {&static_quant_fp8, &dynamic_quant_fp8, NULL};
