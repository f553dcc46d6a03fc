/* silu, gelu, relu, relu2, sigmoid, the gated forms, gelu_and_mul_sparse: calls to kernels/activation.cu. */
#include <string.h>

#include "providers/cuda/call.h"
#include "uuid/cuda_activation.h"

static bool activation_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	return cuda_accept_dtype("x", x, reason) && cuda_accept_rows("x", x, NULL, reason);
}

static bool sparse_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	return activation_predicate(impl, state, call, reason) &&
	       cuda_accept_extent("the last dimension of x", opd_tensor_last(cuda_tensor(call, 0)), reason);
}

/* An implementation's `user`. */
struct form {
	enum cuda_activation function;
	bool gated;
	bool second;      /* it is the second half that goes through the function */
	bool approximate; /* parameter 1 chooses gelu's form */
};

static bool is_tanh(const opd_call *call, uint32_t index)
{
	return strcmp(call->args[index].str, "tanh") == 0;
}

static opd_status activation_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const struct form *form = impl->user;
	const opd_tensor *x = cuda_tensor(call, 0);
	struct cuda_rows rows = cuda_rows_of(x);
	int64_t hidden = form->gated ? rows.size / 2 : rows.size;
	opd_status status = cuda_expect_rows(impl, call, 0, x->dtype, x, hidden, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct cuda_activation_call made = {
		.function = form->approximate && is_tanh(call, 1) ? CUDA_GELU_TANH : form->function,
		.rows = rows.rows,
		.hidden = hidden,
		.x_stride = rows.row_stride,
		.x = cuda_data(x),
		.y = opd_tensor_data(call->outputs[0]),
	};
	(void)cuda_dtype_of(x->dtype, &made.dtype);
	if (form->gated) {
		const unsigned char *half = (const unsigned char *)made.x + (uint64_t)hidden * opd_dtype_bytes(x->dtype);
		made.other = form->second ? made.x : half;
		made.x = form->second ? half : made.x;
	} else if (opd_tensor_contiguous(x)) { /* one run, whatever its rows */
		made.rows = 1;
		made.hidden = made.x_stride = (int64_t)x->elements;
	}
	return cudart_status(impl->op, cuda_activation_launch(&made, exec->stream), error);
}

static opd_status sparse_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0);
	struct cuda_rows rows = cuda_rows_of(x);
	opd_status status = cuda_expect_rows(impl, call, 0, x->dtype, x, rows.size / 2, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct cuda_sparse_call made = {
		.tanh_form = is_tanh(call, 2),
		.multiplier = (float)call->args[1].f,
		.rows = rows.rows,
		.hidden = (int)(rows.size / 2),
		.x_stride = rows.row_stride,
		.x = cuda_data(x),
		.y = opd_tensor_data(call->outputs[0]),
	};
	(void)cuda_dtype_of(x->dtype, &made.dtype);
	return cudart_status(impl->op, cuda_sparse_launch(&made, exec->stream), error);
}

static const struct form forms[] = {
	{CUDA_SILU, false, false, false},  {CUDA_GELU, false, false, true}, {CUDA_RELU, false, false, false}, {CUDA_RELU2, false, false, false},
	{CUDA_SIGMOID, false, false, false}, {CUDA_SILU, true, false, false}, {CUDA_SILU, true, true, false},   {CUDA_GELU, true, false, true},
};

#define ACTIVATION(name, schema_text, form)                                                                                  \
	static const opd_impl name = {                                                                                           \
		CUDA_IMPL(#name, schema_text, OPD_UUID_cuda_activation, activation_predicate, activation_run),                       \
		.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_MAPPED,                                                       \
		.user = &forms[form],                                                                                                \
	}
ACTIVATION(silu, "silu(Tensor x) -> Tensor", 0);
ACTIVATION(gelu, "gelu(Tensor x, str approximate=\"none\") -> Tensor", 1);
ACTIVATION(relu, "relu(Tensor x) -> Tensor", 2);
ACTIVATION(relu2, "relu2(Tensor x) -> Tensor", 3);
ACTIVATION(sigmoid, "sigmoid(Tensor x) -> Tensor", 4);
ACTIVATION(silu_and_mul, "silu_and_mul(Tensor x) -> Tensor", 5);
ACTIVATION(mul_and_silu, "mul_and_silu(Tensor x) -> Tensor", 6);
ACTIVATION(gelu_and_mul, "gelu_and_mul(Tensor x, str approximate=\"none\") -> Tensor", 7);
static const opd_impl gelu_and_mul_sparse = {
	CUDA_IMPL("gelu_and_mul_sparse", "gelu_and_mul_sparse(Tensor x, float std_multiplier, str approximate=\"none\") -> Tensor", OPD_UUID_cuda_activation,
              sparse_predicate, sparse_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
const opd_impl *const cuda_impls_activation[] = {&silu,         &gelu,         &relu,         &relu2,               &sigmoid,
                                                 &silu_and_mul, &mul_and_silu, &gelu_and_mul, &gelu_and_mul_sparse, NULL};
