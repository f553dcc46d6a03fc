/* add, sub, mul, cast: any dtypes and strides; calls to kernels/elementwise.cu. */
#include "providers/cuda/call.h"
#include "uuid/cuda_elementwise.h"

/* Strides of a tensor over the result's shape: 0 where it is broadcast. */
static void strides_over(const opd_tensor *tensor, const opd_tensor *y, int64_t *strides)
{
	for (uint32_t i = 0; i < y->rank; i++) {
		uint32_t missing = y->rank - tensor->rank;
		strides[i] = i < missing || tensor->shape[i - missing] == 1 ? 0 : tensor->strides[i - missing];
	}
}

/* Leaves out extents of 1 and makes one dimension of neighbours that all of `sets` stride sets run through. Returns the rank. */
static uint32_t dims_merge(uint32_t rank, int64_t *shape, int64_t *const *strides, unsigned sets)
{
	uint32_t kept = 0;
	for (uint32_t i = 0; i < rank; i++) {
		if (shape[i] == 1)
			continue;
		bool merges = kept > 0;
		for (unsigned s = 0; s < sets && merges; s++)
			merges = strides[s][kept - 1] == strides[s][i] * shape[i];
		uint32_t to = merges ? kept - 1 : kept++;
		shape[to] = merges ? shape[to] * shape[i] : shape[i];
		for (unsigned s = 0; s < sets; s++)
			strides[s][to] = strides[s][i];
	}
	return kept;
}

static opd_status arithmetic_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *a = cuda_tensor(call, 0), *b = cuda_tensor(call, 1), *y = call->outputs[0];
	/* The shape is a broadcast: what it must be is the op's to say; what the kernel needs is that both operands fit into it. */
	opd_status status = cuda_expect(impl, call, 0, a->dtype, a->rank > b->rank ? a->rank : b->rank, y->shape, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || y->elements == 0)
		return status;
	struct cuda_arithmetic_call made = {
		.arithmetic = *(const enum cuda_arithmetic *)impl->user,
		.dtype = y->dtype,
		.elements = (int64_t)y->elements,
		.a = cuda_data(a),
		.b = cuda_data(b),
		.y = opd_tensor_data(y),
	};
	for (uint32_t i = 0; i < y->rank; i++)
		made.shape[i] = y->shape[i];
	strides_over(a, y, made.a_strides);
	strides_over(b, y, made.b_strides);
	int64_t *const strides[] = {made.a_strides, made.b_strides};
	made.rank = dims_merge(y->rank, made.shape, strides, 2);
	return cudart_status(impl->op, cuda_arithmetic_launch(&made, exec->stream), error);
}

static opd_status cast_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cuda_tensor(call, 0), *y = call->outputs[0];
	opd_status status = cuda_expect(impl, call, 0, opd_dtype_parse(call->args[1].str), x->rank, x->shape, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || y->elements == 0)
		return status;
	struct cuda_cast_call made = {
		.from = x->dtype, .to = y->dtype, .elements = (int64_t)y->elements, .x = cuda_data(x), .y = opd_tensor_data(y)};
	for (uint32_t i = 0; i < x->rank; i++) {
		made.shape[i] = x->shape[i];
		made.strides[i] = x->strides[i];
	}
	int64_t *const strides[] = {made.strides};
	made.rank = dims_merge(x->rank, made.shape, strides, 1);
	return cudart_status(impl->op, cuda_cast_launch(&made, exec->stream), error);
}

static const enum cuda_arithmetic arithmetics[] = {CUDA_ADD, CUDA_SUB, CUDA_MUL};

#define ARITHMETIC(name, number)                                                                                              \
	static const opd_impl name = {                                                                                            \
		CUDA_IMPL(#name, #name "(Tensor a, Tensor b) -> Tensor", OPD_UUID_cuda_elementwise, NULL, arithmetic_run),            \
		.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_MAPPED,                                                        \
		.user = &arithmetics[number],                                                                                         \
	}
ARITHMETIC(add, 0);
ARITHMETIC(sub, 1);
ARITHMETIC(mul, 2);
static const opd_impl cast = {
	CUDA_IMPL("cast", "cast(Tensor x, str dtype) -> Tensor", OPD_UUID_cuda_elementwise, NULL, cast_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_MAPPED,
};
const opd_impl *const cuda_impls_elementwise[] = {&add, &sub, &mul, &cast, NULL};
