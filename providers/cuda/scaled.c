/* scaled_mm of f8 with few rows: calls to kernels/scaled.cu. More rows, and i8, are left to a library's provider. */
#include "providers/cuda/call.h"
#include "uuid/cuda_scaled.h"

enum { SCALED_A, SCALED_B, SCALED_SCALE_A, SCALED_SCALE_B, SCALED_BIAS };

/* Rows that 16-byte accesses read whole. */
static bool accept_factor(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	struct cuda_rows rows = {0};
	if (tensor->dtype != OPD_f8_e4m3fn)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s is %s, only f8_e4m3fn", name, opd_dtype_name(tensor->dtype));
	if (!cuda_accept_rows(name, tensor, &rows, reason))
		return false;
	if (rows.size % 16 != 0)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "a depth of %lld, only multiples of 16", (long long)rows.size);
	if (rows.rows > 1 && rows.row_stride % 16 != 0)
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "rows of %s are %lld bytes apart, only multiples of 16", name, (long long)rows.row_stride);
	return tensor->alignment >= 16 || OPD_REFUSE(reason, OPD_REASON_ALIGNMENT, "%s is aligned to %u bytes, expected 16", name, (unsigned)tensor->alignment);
}

static bool scaled_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *a = cuda_tensor(call, SCALED_A);
	if (!accept_factor("a", a, reason) || !accept_factor("b", cuda_tensor(call, SCALED_B), reason))
		return false;
	if (a->shape[0] > CUDA_SCALED_ROWS)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "a has %lld rows, at most %d", (long long)a->shape[0], CUDA_SCALED_ROWS);
	return true;
}

/* Elements from one row's scale to the next. */
static int64_t scale_stride(const opd_tensor *scale)
{
	return scale->elements == 1 ? 0 : scale->strides[0];
}

static opd_status scaled_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *a = cuda_tensor(call, SCALED_A), *b = cuda_tensor(call, SCALED_B), *bias = cuda_tensor(call, SCALED_BIAS);
	const opd_tensor *scale_a = cuda_tensor(call, SCALED_SCALE_A), *scale_b = cuda_tensor(call, SCALED_SCALE_B);
	const int64_t shape[2] = {a->shape[0], b->shape[0]};
	enum cuda_dtype dtype;
	if (!cuda_dtype_of(call->outputs[0]->dtype, &dtype))
		return opd_fail(error, OPD_INTERNAL, "scaled_mm: a result of %s", opd_dtype_name(call->outputs[0]->dtype));
	opd_status status = cuda_expect(impl, call, 0, call->outputs[0]->dtype, 2, shape, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	if (shape[0] > CUDA_SCALED_ROWS)
		return opd_fail(error, OPD_INTERNAL, "scaled_mm: %lld rows, the predicate accepts %d", (long long)shape[0], CUDA_SCALED_ROWS);
	const struct cuda_scaled_call made = {
		.dtype = dtype,
		.rows = (int)shape[0],
		.columns = shape[1],
		.depth = a->shape[1],
		.a_stride = cuda_rows_of(a).row_stride,
		.b_stride = cuda_rows_of(b).row_stride,
		.bias_stride = bias == NULL ? 0 : bias->strides[0],
		.scale_a_stride = scale_stride(scale_a),
		.scale_b_stride = scale_stride(scale_b),
		.a = cuda_data(a),
		.b = cuda_data(b),
		.bias = cuda_data(bias),
		.scale_a = cuda_data(scale_a),
		.scale_b = cuda_data(scale_b),
		.y = opd_tensor_data(call->outputs[0]),
	};
	return cudart_status(impl->op, cuda_scaled_launch(&made, exec->stream), error);
}

static const opd_impl scaled_mm = {
	CUDA_IMPL("scaled_mm", "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None, str out_dtype=\"bf16\") -> Tensor", OPD_UUID_cuda_scaled,
              scaled_predicate, scaled_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
};
const opd_impl *const cuda_impls_scaled[] = {&scaled_mm, NULL};
