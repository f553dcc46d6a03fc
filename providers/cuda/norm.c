/* rms_norm, fused_add_rms_norm, layer_norm: what is taken, calls to kernels/norm.cu. */
#include "providers/cuda/call.h"
#include "uuid/cuda_norm.h"

/* A weight or bias: contiguous, x's dtype or f32 (the op's shape function has seen to that). */
static bool accept_factor(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (tensor == NULL || opd_tensor_contiguous(tensor))
		return true;
	return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s is strided", name);
}

static bool accept_x(const opd_tensor *x, opd_reason *reason)
{
	return cuda_accept_dtype("x", x, reason) && cuda_accept_rows("x", x, NULL, reason) && cuda_accept_extent("the last dimension of x", opd_tensor_last(x), reason);
}

static bool rms_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return accept_x(cuda_tensor(call, 0), reason) && accept_factor("weight", cuda_tensor(call, 1), reason);
}

static bool fused_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return accept_x(cuda_tensor(call, 0), reason) && cuda_accept_rows("x_residual", cuda_tensor(call, 1), NULL, reason) &&
	       accept_factor("weight", cuda_tensor(call, 2), reason);
}

static bool layer_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return accept_x(cuda_tensor(call, 0), reason) && accept_factor("weight", cuda_tensor(call, 1), reason) &&
	       accept_factor("bias", cuda_tensor(call, 2), reason);
}

/* What all three have: x, its rows, the first result. */
static opd_status norm_begin(const opd_impl *impl, const opd_call *call, const opd_exec *exec, enum cuda_norm norm, struct cuda_norm_call *made,
                             opd_error *error)
{
	const opd_tensor *x = cuda_tensor(call, 0);
	struct cuda_rows rows = cuda_rows_of(x);
	opd_status status = cuda_expect_rows(impl, call, 0, x->dtype, x, opd_tensor_last(x), error);
	if (status != OPD_OK)
		return status;
	*made = (struct cuda_norm_call){
		.norm = norm,
		.rows = rows.rows,
		.hidden = (int)rows.size,
		.variance_size = (int)rows.size,
		.x = cuda_data(x),
		.x_stride = rows.row_stride,
		.y = opd_tensor_data(call->outputs[0]),
	};
	(void)cuda_dtype_of(x->dtype, &made->dtype);
	return cudart_begin(impl, exec, error);
}

static void norm_weight(struct cuda_norm_call *made, const opd_tensor *weight)
{
	made->weight = cuda_data(weight);
	made->weight_f32 = weight != NULL && weight->dtype == OPD_f32;
}

static void norm_scalars(struct cuda_norm_call *made, const opd_call *call, uint32_t epsilon)
{
	made->epsilon = (float)call->args[epsilon].f;
	if (call->args[epsilon + 1].kind == OPD_ARG_INT)
		made->variance_size = (int)call->args[epsilon + 1].i;
}

static opd_status rms_make(const opd_impl *impl, const opd_call *call, const opd_exec *exec, struct cuda_norm_call *made, opd_error *error)
{
	opd_status status = norm_begin(impl, call, exec, CUDA_RMS_NORM, made, error);
	norm_weight(made, cuda_tensor(call, 1));
	norm_scalars(made, call, 2);
	return status;
}

static opd_status fused_make(const opd_impl *impl, const opd_call *call, const opd_exec *exec, struct cuda_norm_call *made, opd_error *error)
{
	const opd_tensor *x = cuda_tensor(call, 0), *residual = cuda_tensor(call, 1);
	opd_status status = norm_begin(impl, call, exec, CUDA_RMS_NORM, made, error);
	if (status == OPD_OK)
		status = cuda_expect_rows(impl, call, 1, x->dtype, x, opd_tensor_last(x), error);
	norm_weight(made, cuda_tensor(call, 2));
	norm_scalars(made, call, 3);
	made->residual = cuda_data(residual);
	made->residual_stride = cuda_rows_of(residual).row_stride;
	made->sum = opd_tensor_data(call->outputs[1]);
	made->fault = cuda_fault_where(cuda_in_place(call, 0, x) || cuda_in_place(call, 1, residual), exec);
	return status;
}

typedef opd_status (*norm_make_fn)(const opd_impl *impl, const opd_call *call, const opd_exec *exec, struct cuda_norm_call *made, opd_error *error);

static opd_status run_made(const opd_impl *impl, norm_make_fn make, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct cuda_norm_call made;
	const opd_status status = make(impl, call, exec, &made, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	return cudart_status(impl->op, cuda_norm_launch(&made, exec->stream), error);
}

static opd_status run_made_many(const opd_impl *impl, norm_make_fn make, const opd_call *const *calls, uint32_t count, const opd_exec *exec, opd_error *error)
{
	struct cuda_norm_calls made = {.count = count};
	opd_status status = OPD_OK;
	for (uint32_t i = 0; i < count && status == OPD_OK; i++)
		status = calls[i]->outputs[0]->elements == 0 ? OPD_UNIMPLEMENTED : make(impl, calls[i], exec, &made.calls[i], error);
	if (status != OPD_OK)
		return status;
	const int code = cuda_norm_together(&made, exec->stream);
	return code == (int)cudaErrorNotSupported ? OPD_UNIMPLEMENTED : cudart_status(impl->op, code, error);
}

static opd_status rms_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	return run_made(impl, rms_make, call, exec, error);
}

static opd_status rms_run_many(const opd_impl *impl, void *state, const opd_call *const *calls, uint32_t count, const opd_exec *exec, opd_error *error)
{
	(void)state;
	return run_made_many(impl, rms_make, calls, count, exec, error);
}

static opd_status fused_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	return run_made(impl, fused_make, call, exec, error);
}

static opd_status fused_run_many(const opd_impl *impl, void *state, const opd_call *const *calls, uint32_t count, const opd_exec *exec, opd_error *error)
{
	(void)state;
	return run_made_many(impl, fused_make, calls, count, exec, error);
}

static opd_status layer_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	struct cuda_norm_call made;
	const opd_tensor *bias = cuda_tensor(call, 2);
	opd_status status = norm_begin(impl, call, exec, CUDA_LAYER_NORM, &made, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	norm_weight(&made, cuda_tensor(call, 1));
	made.bias = cuda_data(bias);
	made.bias_f32 = bias != NULL && bias->dtype == OPD_f32;
	made.epsilon = (float)call->args[3].f;
	return cudart_status(impl->op, cuda_norm_launch(&made, exec->stream), error);
}

static const opd_impl rms_norm = {
	CUDA_IMPL("rms_norm", "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor", OPD_UUID_cuda_norm, rms_predicate, rms_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_MAPPED,
	.run_many = rms_run_many,
};
static const opd_impl fused_add_rms_norm = {
	CUDA_IMPL("fused_add_rms_norm",
              "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) -> (Tensor, Tensor)",
              OPD_UUID_cuda_norm, fused_predicate, fused_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_MAPPED | OPD_IMPL_IN_PLACE,
	.run_many = fused_run_many,
};
static const opd_impl layer_norm = {
	CUDA_IMPL("layer_norm", "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor", OPD_UUID_cuda_norm, layer_predicate, layer_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_MAPPED,
};
const opd_impl *const cuda_impls_norm[] = {&rms_norm, &fused_add_rms_norm, &layer_norm, NULL};
