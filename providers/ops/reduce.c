/* softmax, argmax, topk. */
#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"
#include "uuid/native_reduce.h"

#include <math.h>

static const int64_t reduce_dims[] = {4, 4096};

/* What softmax and argmax run along. */
struct line_context {
	uint32_t dim;
};

/* Parameter 1 of softmax and argmax, counted from the front; the shape function has checked it. */
static uint32_t dim_argument(const opd_call *call)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	const int64_t dim = kernel_int(call, 1, -1);
	const int64_t rank = x->rank == 0 ? 1 : x->rank;
	return (uint32_t)(dim < 0 ? dim + rank : dim);
}

/* ---- softmax ----------------------------------------------------------------------------------------------------------- */

static opd_status softmax_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	uint32_t dim;
	opd_status status = kernel_expect_float(op, "x", x, error);
	if (status == OPD_OK)
		status = kernel_expect_dim(op, x, kernel_int(call, 1, -1), &dim, error);
	return status != OPD_OK ? status : kernel_output_like(op, outputs[0], x->dtype, x, error);
}

static double softmax_max(const struct kernel_line *x)
{
	double values[KERNEL_CHUNK];
	double max = -(double)INFINITY;
	for (int64_t begin = 0; begin < x->extent; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, x->extent);
		kernel_load(x, begin, count, values);
		for (int64_t i = 0; i < count; i++)
			max = values[i] > max ? values[i] : max; /* a NaN is left to the sum */
	}
	return max;
}

/* exp(x − max) of a chunk, and their sum. An infinite maximum gives NaN: ∞ − ∞. */
static double softmax_exponentials(const struct kernel_line *x, double max, int64_t begin, int64_t count, double *to)
{
	double sum = 0;
	kernel_load(x, begin, count, to);
	for (int64_t i = 0; i < count; i++) {
		to[i] = exp(to[i] - max);
		sum += to[i];
	}
	return sum;
}

static void softmax_line(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct line_context *context = job->context;
	struct kernel_line x = kernel_line(kernel_tensor(job->call, 0), context->dim, item);
	struct kernel_line out = kernel_line(job->call->outputs[0], context->dim, item);
	double values[KERNEL_CHUNK];
	double sum = 0;
	(void)scratch;

	double max = softmax_max(&x);
	for (int64_t begin = 0; begin < x.extent; begin += KERNEL_CHUNK)
		sum += softmax_exponentials(&x, max, begin, kernel_chunk(begin, x.extent), values);
	for (int64_t begin = 0; begin < x.extent; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, x.extent);
		(void)softmax_exponentials(&x, max, begin, count, values);
		for (int64_t i = 0; i < count; i++)
			values[i] /= sum;
		kernel_store(&out, begin, count, values);
	}
}

static opd_status softmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	const opd_tensor *x = kernel_tensor(call, 0);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct line_context context = {.dim = dim_argument(call)};
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &context};
	return kernel_for(&job, kernel_lines(x, context.dim), (uint64_t)kernel_extent(x, context.dim) * 30, softmax_line, error);
}

static uint64_t softmax_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 14);
}

/* x [rows, size], or [rows, 3, size] */
static opd_status line_generate_x(const opd_op *op, opd_generator *generator, bool deep, opd_error *error)
{
	const int64_t flat[2] = {generator->dims[0], generator->dims[1]};
	const int64_t cube[3] = {generator->dims[0], 3, generator->dims[1]};
	return kernel_generate(op, generator, "x", generator->dtype, deep ? 3 : 2, deep ? cube : flat, 1, error);
}

static opd_status softmax_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	enum { LAST, FIRST, MIDDLE, VARIANTS };
	opd_status status = kernel_generator_begin(op, generator, VARIANTS, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	if (generator->variant != LAST)
		generator->set_int(generator, "dim", generator->variant == FIRST ? 0 : 1);
	return line_generate_x(op, generator, generator->variant == MIDDLE, error);
}

static const opd_op softmax_op;
static const opd_impl softmax_native = KERNEL_NATIVE("softmax", &softmax_op, softmax_run, softmax_cost, OPD_UUID_native_reduce);
static const opd_op softmax_op = {
	.struct_bytes = sizeof softmax_op,
	.schema = "softmax(Tensor x, int dim=-1) -> Tensor",
	.doc = "exp(x - maximum) over its sum, along dim",
	.activations = "x",
	.shape = softmax_shape,
	.generate = softmax_generate,
	.dims = "rows,size",
	.default_dims = reduce_dims,
	.dim_count = 2,
	.native = &softmax_native,
};

/* ---- Order ------------------------------------------------------------------------------------------------------------- */

/* Whether element i of a line ranks above element j: greater, NaN the greatest, NaNs and zeros of both signs equal. */
static bool ranks_above(const struct kernel_line *line, int64_t i, int64_t j)
{
	const void *a = kernel_line_at(line, i);
	const void *b = kernel_line_at(line, j);
	if (opd_dtype_is_float(line->dtype) || opd_dtype_is_f8(line->dtype)) {
		double x = element_load_f64(line->dtype, a);
		double y = element_load_f64(line->dtype, b);
		return isnan(x) ? !isnan(y) : x > y;
	}
	return element_load_i64(line->dtype, a) > element_load_i64(line->dtype, b);
}

/* topk's order, total: equal values by lower index. */
static bool comes_before(const struct kernel_line *line, int64_t i, int64_t j)
{
	return ranks_above(line, i, j) || (i < j && !ranks_above(line, j, i));
}

/* How many elements of a line need a look when the first of equals win: all, or of one element repeated by stride 0 only
 * `wanted`. A client may call a single byte a line of 2^40. */
static int64_t distinct(const struct kernel_line *line, int64_t wanted)
{
	return line->stride == 0 ? wanted : line->extent;
}

/* ---- argmax ------------------------------------------------------------------------------------------------------------ */

static opd_status argmax_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	opd_output *out = outputs[0];
	uint32_t dim;
	opd_status status = kernel_expect_dim(op, x, kernel_int(call, 1, -1), &dim, error);
	if (status != OPD_OK)
		return status;
	if (kernel_extent(x, dim) == 0)
		return kernel_invalid(op, error, "x has shape %s, expected at least 1 element along dimension %u",
		                      kernel_shape_text(x).text, dim);
	status = kernel_output_like(op, out, OPD_i64, x, error);
	if (status != OPD_OK || x->rank == 0)
		return status;
	if (kernel_bool(call, 2)) {
		out->shape[dim] = 1;
		return OPD_OK;
	}
	out->rank--;
	for (uint32_t i = dim; i < out->rank; i++)
		out->shape[i] = x->shape[i + 1];
	return OPD_OK;
}

static void argmax_line(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct line_context *context = job->context;
	struct kernel_line x = kernel_line(kernel_tensor(job->call, 0), context->dim, item);
	struct kernel_line out = kernel_flat(job->call->outputs[0]);
	const int64_t extent = distinct(&x, 1);
	int64_t best = 0;
	(void)scratch;
	for (int64_t i = 1; i < extent; i++)
		if (ranks_above(&x, i, best))
			best = i;
	kernel_store_i64(&out, (int64_t)item, 1, &best);
}

static opd_status argmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	const opd_tensor *x = kernel_tensor(call, 0);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct line_context context = {.dim = dim_argument(call)};
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &context};
	return kernel_for(&job, kernel_lines(x, context.dim), (uint64_t)kernel_extent(x, context.dim) * 8, argmax_line, error);
}

static uint64_t argmax_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 8);
}

static opd_status argmax_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	enum { LAST, KEEPDIM, FIRST, MIDDLE_KEEPDIM, VARIANTS };
	opd_status status = kernel_generator_begin(op, generator, VARIANTS, error);
	if (status != OPD_OK)
		return status;
	const uint32_t variant = generator->variant;
	if (generator->dims[variant == FIRST ? 0 : 1] == 0)
		return kernel_invalid(op, error, "%s is 0, expected 1 or more", variant == FIRST ? "rows" : "size");
	if (variant == FIRST || variant == MIDDLE_KEEPDIM)
		generator->set_int(generator, "dim", variant == FIRST ? 0 : 1);
	if (variant == KEEPDIM || variant == MIDDLE_KEEPDIM)
		generator->set_bool(generator, "keepdim", true);
	return line_generate_x(op, generator, variant == MIDDLE_KEEPDIM, error);
}

static const opd_op argmax_op;
static const opd_impl argmax_native = KERNEL_NATIVE("argmax", &argmax_op, argmax_run, argmax_cost, OPD_UUID_native_reduce);
static const opd_op argmax_op = {
	.struct_bytes = sizeof argmax_op,
	.schema = "argmax(Tensor x, int dim=-1, bool keepdim=False) -> Tensor",
	.doc = "index of the maximum along dim, the first of equals; NaN is the maximum",
	.activations = "x",
	.shape = argmax_shape,
	.generate = argmax_generate,
	.dims = "rows,size",
	.default_dims = reduce_dims,
	.dim_count = 2,
	.native = &argmax_native,
};

/* ---- topk -------------------------------------------------------------------------------------------------------------- */

static opd_status topk_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	const int64_t k = kernel_int(call, 1, 0);
	opd_status status = kernel_expect_rank_min(op, "x", x, 1, error);
	if (status != OPD_OK)
		return status;
	if (k < 0 || k > opd_tensor_last(x))
		return kernel_invalid(op, error, "k is %lld, expected 0 to %lld (last dimension of x)", (long long)k,
		                      (long long)opd_tensor_last(x));
	status = kernel_output_like(op, outputs[0], x->dtype, x, error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[1], OPD_i64, x, error);
	if (status != OPD_OK)
		return status;
	outputs[0]->shape[x->rank - 1] = k;
	outputs[1]->shape[x->rank - 1] = k;
	return OPD_OK;
}

/* Restores a heap whose root is the last in topk's order, when only entry `at` may be out of place. */
static void heap_sink(const struct kernel_line *x, int64_t *heap, int64_t size, int64_t at)
{
	for (;;) {
		int64_t child = 2 * at + 1;
		if (child >= size)
			return;
		if (child + 1 < size && comes_before(x, heap[child], heap[child + 1]))
			child++;
		if (!comes_before(x, heap[at], heap[child]))
			return;
		int64_t swapped = heap[at];
		heap[at] = heap[child];
		heap[child] = swapped;
		at = child;
	}
}

/* The indices of a row's first k elements in topk's order, in that order. They are gathered where they are wanted, in the
 * result. */
static void topk_select(const struct kernel_line *x, int64_t *heap, int64_t k)
{
	for (int64_t i = 0; i < k; i++)
		heap[i] = i;
	for (int64_t i = k / 2; i-- > 0;)
		heap_sink(x, heap, k, i);
	const int64_t extent = distinct(x, k);
	for (int64_t i = k; i < extent; i++) {
		if (!comes_before(x, i, heap[0]))
			continue;
		heap[0] = i;
		heap_sink(x, heap, k, 0);
	}
	for (int64_t size = k; size-- > 1;) {
		int64_t last = heap[0];
		heap[0] = heap[size];
		heap[size] = last;
		heap_sink(x, heap, size, 0);
	}
}

/* An element as it is, a NaN's bits too; a bool is written as 0 or 1. */
static void topk_copy(const struct kernel_line *to, int64_t i, const struct kernel_line *from, int64_t j)
{
	if (from->dtype == OPD_bool)
		element_store_i64(OPD_bool, kernel_line_at(to, i), element_load_i64(OPD_bool, kernel_line_at(from, j)));
	else
		memcpy(kernel_line_at(to, i), kernel_line_at(from, j), opd_dtype_bytes(from->dtype));
}

static void topk_row(const struct kernel_job *job, uint64_t row, void *scratch)
{
	struct kernel_line x = kernel_row(kernel_tensor(job->call, 0), row);
	struct kernel_line values = kernel_row(job->call->outputs[0], row);
	struct kernel_line indices = kernel_row(job->call->outputs[1], row);
	int64_t *heap = indices.data;
	(void)scratch;
	topk_select(&x, heap, values.extent);
	for (int64_t i = 0; i < values.extent; i++)
		topk_copy(&values, i, &x, heap[i]);
}

static opd_status topk_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	const opd_tensor *out = call->outputs[0];
	if (status != OPD_OK || out->elements == 0)
		return status;
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec};
	uint64_t row_ns = (uint64_t)opd_tensor_last(kernel_tensor(call, 0)) * 10 + (uint64_t)opd_tensor_last(out) * 200;
	return kernel_for(&job, kernel_lines(out, out->rank - 1), row_ns, topk_row, error);
}

static uint64_t topk_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return estimate_add(kernel_cost_pass(call, 8), estimate_multiply(call->outputs[0]->elements, 200));
}

static opd_status topk_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	enum { SOME, ALL, NONE, ONE, RANK_1, VARIANTS };
	opd_status status = kernel_generator_begin(op, generator, VARIANTS, error);
	if (status != OPD_OK)
		return status;
	const int64_t size = generator->dims[1];
	int64_t k = generator->dims[2];
	if (k > size)
		return kernel_invalid(op, error, "k is %lld, expected at most size, %lld", (long long)k, (long long)size);
	if (generator->variant == ALL)
		k = size;
	if (generator->variant == NONE || size == 0)
		k = 0;
	else if (generator->variant == ONE)
		k = 1;
	generator->set_int(generator, "k", k);
	if (generator->variant == RANK_1)
		return kernel_generate(op, generator, "x", generator->dtype, 1, &size, 1, error);
	return line_generate_x(op, generator, false, error);
}

static const int64_t topk_dims[] = {4, 4096, 8};

static const opd_op topk_op;
static const opd_impl topk_native = KERNEL_NATIVE("topk", &topk_op, topk_run, topk_cost, OPD_UUID_native_reduce);
static const opd_op topk_op = {
	.struct_bytes = sizeof topk_op,
	.schema = "topk(Tensor x, int k) -> (Tensor, Tensor)",
	.doc = "the k greatest of the last dimension, descending, and their indices; equals by lower index, NaN the greatest",
	.activations = "x",
	.shape = topk_shape,
	.generate = topk_generate,
	.dims = "rows,size,k",
	.default_dims = topk_dims,
	.dim_count = 3,
	.native = &topk_native,
};

const opd_op *const ops_reduce[] = {&softmax_op, &argmax_op, &topk_op, NULL};
