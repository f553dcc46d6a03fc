#include "providers/ops/kernel.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>

/* ---- Shape functions --------------------------------------------------------------------------------------------------- */

/* Length of the op's name: its schema up to the parenthesis. */
static int name_length(const opd_op *op)
{
	return (int)strcspn(op->schema, "(");
}

opd_status kernel_invalid(const opd_op *op, opd_error *error, const char *format, ...)
{
	if (error == NULL)
		return OPD_INVALID_ARGUMENT;
	char text[OPD_ERROR_TEXT_BYTES];
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%.*s: %s", name_length(op), op->schema, text);
}

struct kernel_text kernel_extents_text(uint32_t rank, const int64_t *shape)
{
	struct kernel_text out = {"["};
	size_t used = 1;
	for (uint32_t i = 0; i < rank && used < sizeof out.text; i++) {
		int written = snprintf(out.text + used, sizeof out.text - used, "%s%lld", i == 0 ? "" : ", ", (long long)shape[i]);
		used += written < 0 ? 0 : (size_t)written;
	}
	if (used < sizeof out.text)
		(void)snprintf(out.text + used, sizeof out.text - used, "]");
	return out;
}

struct kernel_text kernel_shape_text(const opd_tensor *tensor)
{
	return kernel_extents_text(tensor->rank, tensor->shape);
}

opd_status kernel_expect_float(const opd_op *op, const char *name, const opd_tensor *tensor, opd_error *error)
{
	if (tensor == NULL || opd_dtype_is_float(tensor->dtype))
		return OPD_OK;
	return kernel_invalid(op, error, "%s is %s, expected f16, bf16, f32 or f64", name, opd_dtype_name(tensor->dtype));
}

opd_status kernel_expect_dtype(const opd_op *op, const char *name, const opd_tensor *tensor, opd_dtype dtype, opd_error *error)
{
	if (tensor == NULL || tensor->dtype == dtype)
		return OPD_OK;
	return kernel_invalid(op, error, "%s is %s, expected %s", name, opd_dtype_name(tensor->dtype), opd_dtype_name(dtype));
}

opd_status kernel_expect_dtype_of(const opd_op *op, const char *name, const opd_tensor *tensor, const char *like_name,
                                  const opd_tensor *like, opd_error *error)
{
	if (tensor == NULL || tensor->dtype == like->dtype)
		return OPD_OK;
	return kernel_invalid(op, error, "%s is %s, %s is %s, expected one dtype", name, opd_dtype_name(tensor->dtype), like_name,
	                      opd_dtype_name(like->dtype));
}

opd_status kernel_expect_dtype_of_or_f32(const opd_op *op, const char *name, const opd_tensor *tensor, const char *like_name,
                                         const opd_tensor *like, opd_error *error)
{
	if (tensor == NULL || tensor->dtype == like->dtype || tensor->dtype == OPD_f32)
		return OPD_OK;
	return kernel_invalid(op, error, "%s is %s, %s is %s, expected %s's dtype or f32", name, opd_dtype_name(tensor->dtype),
	                      like_name, opd_dtype_name(like->dtype), like_name);
}

opd_status kernel_expect_index(const opd_op *op, const char *name, const opd_tensor *tensor, opd_error *error)
{
	if (tensor == NULL || tensor->dtype == OPD_i32 || tensor->dtype == OPD_i64)
		return OPD_OK;
	return kernel_invalid(op, error, "%s is %s, expected i32 or i64", name, opd_dtype_name(tensor->dtype));
}

opd_status kernel_expect_rank(const opd_op *op, const char *name, const opd_tensor *tensor, uint32_t rank, opd_error *error)
{
	if (tensor == NULL || tensor->rank == rank)
		return OPD_OK;
	return kernel_invalid(op, error, "%s has shape %s, expected rank %u", name, kernel_shape_text(tensor).text, rank);
}

opd_status kernel_expect_rank_min(const opd_op *op, const char *name, const opd_tensor *tensor, uint32_t rank, opd_error *error)
{
	if (tensor == NULL || tensor->rank >= rank)
		return OPD_OK;
	return kernel_invalid(op, error, "%s has shape %s, expected rank %u or more", name, kernel_shape_text(tensor).text, rank);
}

opd_status kernel_expect_shape(const opd_op *op, const char *name, const opd_tensor *tensor, uint32_t rank, const int64_t *shape,
                               const char *why, opd_error *error)
{
	if (tensor == NULL)
		return OPD_OK;
	bool equal = tensor->rank == rank;
	for (uint32_t i = 0; equal && i < rank; i++)
		equal = tensor->shape[i] == shape[i];
	if (equal)
		return OPD_OK;
	return kernel_invalid(op, error, "%s has shape %s, expected %s (%s)", name, kernel_shape_text(tensor).text,
	                      kernel_extents_text(rank, shape).text, why);
}

opd_status kernel_expect_shape_of(const opd_op *op, const char *name, const opd_tensor *tensor, const char *like_name,
                                  const opd_tensor *like, opd_error *error)
{
	if (tensor == NULL || opd_tensor_same_shape(tensor, like))
		return OPD_OK;
	return kernel_invalid(op, error, "%s has shape %s, expected %s (shape of %s)", name, kernel_shape_text(tensor).text,
	                      kernel_shape_text(like).text, like_name);
}

opd_status kernel_expect_finite(const opd_op *op, const char *name, double value, opd_error *error)
{
	return isfinite(value) ? OPD_OK : kernel_invalid(op, error, "%s is %g, expected a finite number", name, value);
}

opd_status kernel_expect_f32(const opd_op *op, const char *name, double value, opd_error *error)
{
	opd_status status = kernel_expect_finite(op, name, value, error);
	if (status != OPD_OK || fabs(value) <= (double)FLT_MAX)
		return status;
	return kernel_invalid(op, error, "%s is %g, expected at most %g in magnitude, as f32 has it", name, value, (double)FLT_MAX);
}

opd_status kernel_expect_approximate(const opd_op *op, const char *value, opd_error *error)
{
	if (strcmp(value, "none") == 0 || strcmp(value, "tanh") == 0)
		return OPD_OK;
	return kernel_invalid(op, error, "approximate is \"%.64s\", expected \"none\" or \"tanh\"", value);
}

opd_status kernel_expect_dim(const opd_op *op, const opd_tensor *x, int64_t dim, uint32_t *dim_out, opd_error *error)
{
	int64_t rank = x->rank == 0 ? 1 : x->rank;
	if (dim < -rank || dim >= rank)
		return kernel_invalid(op, error, "dim is %lld, expected %lld to %lld (x has shape %s)", (long long)dim, (long long)-rank,
		                      (long long)(rank - 1), kernel_shape_text(x).text);
	*dim_out = (uint32_t)(dim < 0 ? dim + rank : dim);
	return OPD_OK;
}

opd_status kernel_output_set(const opd_op *op, opd_output *output, opd_dtype dtype, uint32_t rank, const int64_t *shape,
                             opd_error *error)
{
	if (rank > output->rank_max)
		return kernel_invalid(op, error, "the result has rank %u, expected at most %u", rank, output->rank_max);
	output->dtype = dtype;
	output->rank = rank;
	for (uint32_t i = 0; i < rank; i++)
		output->shape[i] = shape[i];
	return OPD_OK;
}

opd_status kernel_output_like(const opd_op *op, opd_output *output, opd_dtype dtype, const opd_tensor *x, opd_error *error)
{
	return kernel_output_set(op, output, dtype, x->rank, x->shape, error);
}

opd_status kernel_broadcast(const opd_op *op, const char *a_name, const opd_tensor *a, uint32_t a_rank, const char *b_name,
                            const opd_tensor *b, uint32_t b_rank, int64_t *shape_out, opd_error *error)
{
	uint32_t rank = a_rank > b_rank ? a_rank : b_rank;
	if (rank > OPD_RANK_MAX)
		return kernel_invalid(op, error, "%s and %s have rank %u and %u, expected at most %d", a_name, b_name, a->rank, b->rank,
		                      OPD_RANK_MAX);
	for (uint32_t i = 0; i < rank; i++) { /* i counts from the last dimension */
		int64_t x = i < a_rank ? a->shape[a_rank - 1 - i] : 1;
		int64_t y = i < b_rank ? b->shape[b_rank - 1 - i] : 1;
		if (x != y && x != 1 && y != 1)
			return kernel_invalid(op, error, "%s has shape %s, %s has shape %s: %lld and %lld don't broadcast", a_name,
			                      kernel_shape_text(a).text, b_name, kernel_shape_text(b).text, (long long)x, (long long)y);
		shape_out[rank - 1 - i] = x == 1 ? y : x;
	}
	return OPD_OK;
}

/* ---- Running ----------------------------------------------------------------------------------------------------------- */

#define OUTPUTS_MAX 4

static opd_status output_differs(const opd_impl *impl, uint32_t index, const opd_output *wanted, const opd_tensor *given,
                                 opd_error *error)
{
	return opd_fail(error, OPD_INTERNAL, "%s: result %u was allocated as %s %s, the kernel writes %s %s", impl->op, index,
	                opd_dtype_name(given->dtype), kernel_shape_text(given).text, opd_dtype_name(wanted->dtype),
	                kernel_extents_text(wanted->rank, wanted->shape).text);
}

static bool output_fits(const opd_output *wanted, const opd_tensor *given)
{
	bool equal = wanted->dtype == given->dtype && wanted->rank == given->rank;
	for (uint32_t i = 0; equal && i < wanted->rank; i++)
		equal = wanted->shape[i] == given->shape[i];
	return equal;
}

opd_status kernel_verify_outputs(const opd_impl *impl, const opd_call *call, opd_error *error)
{
	const opd_op *op = impl->user;
	int64_t shapes[OUTPUTS_MAX][OPD_RANK_MAX];
	opd_output wanted[OUTPUTS_MAX];
	opd_output *outputs[OUTPUTS_MAX];
	if (call->output_count > OUTPUTS_MAX)
		return opd_fail(error, OPD_INTERNAL, "%s: %u results, the kernel writes at most %d", impl->op, call->output_count,
		                OUTPUTS_MAX);
	for (uint32_t i = 0; i < call->output_count; i++) {
		wanted[i] = (opd_output){.struct_bytes = sizeof wanted[i], .rank_max = OPD_RANK_MAX, .shape = shapes[i]};
		outputs[i] = &wanted[i];
	}
	opd_status status = op->shape(op, call, outputs, error);
	if (status != OPD_OK)
		return status;
	for (uint32_t i = 0; i < call->output_count; i++)
		if (!output_fits(&wanted[i], call->outputs[i]))
			return output_differs(impl, i, &wanted[i], call->outputs[i], error);
	return OPD_OK;
}

/* A thread should get at least so much work: handing it out costs some microseconds. */
#define SHARE_NS 50000

struct loop {
	const struct kernel_job *job;
	kernel_item_fn item;
	atomic_int status; /* the first failure; others stop when they see it */
};

static void loop_fail(struct loop *loop, opd_status status)
{
	int expected = OPD_OK;
	(void)atomic_compare_exchange_strong(&loop->status, &expected, (int)status);
}

static void loop_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct loop *loop = argument;
	const struct kernel_job *job = loop->job;
	void *scratch = NULL;
	(void)thread;

	if (job->scratch_bytes > 0) {
		scratch = job->exec->host->alloc(job->exec->host, job->scratch_bytes);
		if (scratch == NULL) {
			loop_fail(loop, OPD_RESOURCE_EXHAUSTED);
			return;
		}
	}
	for (uint64_t i = begin; i < end && atomic_load_explicit(&loop->status, memory_order_relaxed) == OPD_OK; i++) {
		if (job->exec->host->cancelled(job->exec))
			loop_fail(loop, OPD_CANCELLED);
		else
			loop->item(job, i, scratch);
	}
	if (scratch != NULL)
		job->exec->host->free(job->exec->host, scratch);
}

opd_status kernel_for(const struct kernel_job *job, uint64_t items, uint64_t item_ns, kernel_item_fn item, opd_error *error)
{
	struct loop loop = {.job = job, .item = item};
	atomic_init(&loop.status, OPD_OK);
	uint64_t grain = item_ns >= SHARE_NS ? 1 : SHARE_NS / (item_ns == 0 ? 1 : item_ns);

	if (job->exec->threads <= 1 || items / 2 < grain)
		loop_range(&loop, 0, items, 0);
	else
		job->exec->host->parallel_for(job->exec, items, grain, loop_range, &loop);

	switch (atomic_load(&loop.status)) {
	case OPD_OK:
		return OPD_OK;
	case OPD_CANCELLED:
		return opd_fail(error, OPD_CANCELLED, "%s: cancelled while it ran", job->impl->op);
	default:
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for %llu bytes of scratch", job->impl->op,
		                (unsigned long long)job->scratch_bytes);
	}
}

opd_status kernel_for_long(const struct kernel_job *job, uint64_t items, uint64_t item_ns, kernel_item_fn item, opd_error *error)
{
	opd_status status = kernel_for(job, items, item_ns, item, error);
	if (status == OPD_OK && job->exec->host->cancelled(job->exec))
		return opd_fail(error, OPD_CANCELLED, "%s: cancelled while it ran", job->impl->op);
	return status;
}

uint64_t kernel_cost_pass(const opd_call *call, uint64_t element_ns)
{
	uint64_t elements = 0;
	for (uint32_t i = 0; i < call->arg_count; i++) {
		const opd_tensor *tensor = kernel_tensor(call, i);
		elements = estimate_add(elements, tensor == NULL ? 0 : tensor->elements);
	}
	for (uint32_t i = 0; i < call->output_count; i++)
		elements = estimate_add(elements, call->outputs[i]->elements);
	const uint64_t call_ns = 300; /* checks, views, the loop itself */
	return estimate_add(call_ns, estimate_multiply(elements, element_ns));
}

/* ---- Lines ------------------------------------------------------------------------------------------------------------- */

struct kernel_line kernel_line(const opd_tensor *tensor, uint32_t dim, uint64_t line)
{
	int64_t offset = 0;
	for (uint32_t i = tensor->rank; i-- > 0;) {
		if (i == dim)
			continue;
		uint64_t extent = (uint64_t)tensor->shape[i];
		offset += (int64_t)(line % extent) * tensor->strides[i];
		line /= extent;
	}
	return (struct kernel_line){
		.dtype = tensor->dtype,
		.data = (unsigned char *)opd_tensor_data(tensor) + offset * (int64_t)opd_dtype_bytes(tensor->dtype),
		.stride = kernel_extent(tensor, dim) > 1 ? kernel_stride(tensor, dim) : 0,
		.extent = kernel_extent(tensor, dim),
	};
}

struct kernel_line kernel_row(const opd_tensor *tensor, uint64_t row)
{
	return kernel_line(tensor, tensor->rank == 0 ? 0 : tensor->rank - 1, row);
}

struct kernel_line kernel_flat(const opd_tensor *tensor)
{
	return (struct kernel_line){
		.dtype = tensor->dtype,
		.data = opd_tensor_data(tensor),
		.stride = 1,
		.extent = (int64_t)tensor->elements,
	};
}

void *kernel_element(const opd_tensor *tensor, uint64_t index)
{
	if (opd_tensor_contiguous(tensor))
		return (unsigned char *)opd_tensor_data(tensor) + index * opd_dtype_bytes(tensor->dtype);
	uint64_t last = (uint64_t)opd_tensor_last(tensor);
	struct kernel_line line = kernel_row(tensor, index / last);
	return kernel_line_at(&line, (int64_t)(index % last));
}

void kernel_load(const struct kernel_line *line, int64_t begin, int64_t count, double *to)
{
	for (int64_t i = 0; i < count; i++)
		to[i] = element_load_f64(line->dtype, kernel_line_at(line, begin + i));
}

void kernel_load_f32(const struct kernel_line *line, int64_t begin, int64_t count, float *to)
{
	for (int64_t i = 0; i < count; i++)
		to[i] = element_load_f32(line->dtype, kernel_line_at(line, begin + i));
}

void kernel_load_i64(const struct kernel_line *line, int64_t begin, int64_t count, int64_t *to)
{
	for (int64_t i = 0; i < count; i++)
		to[i] = element_load_i64(line->dtype, kernel_line_at(line, begin + i));
}

void kernel_store(const struct kernel_line *line, int64_t begin, int64_t count, const double *from)
{
	for (int64_t i = 0; i < count; i++) {
		void *at = kernel_line_at(line, begin + i);
		if (line->dtype == OPD_f64)
			element_store_f64(OPD_f64, at, from[i]);
		else
			element_store_f32(line->dtype, at, (float)from[i]);
	}
}

void kernel_store_f32(const struct kernel_line *line, int64_t begin, int64_t count, const float *from)
{
	for (int64_t i = 0; i < count; i++)
		element_store_f32(line->dtype, kernel_line_at(line, begin + i), from[i]);
}

void kernel_store_i64(const struct kernel_line *line, int64_t begin, int64_t count, const int64_t *from)
{
	for (int64_t i = 0; i < count; i++)
		element_store_i64(line->dtype, kernel_line_at(line, begin + i), from[i]);
}

double kernel_round(opd_dtype dtype, double value)
{
	switch (dtype) {
	case OPD_f64:
		return value;
	case OPD_f32:
		return (double)(float)value;
	case OPD_bf16:
		return (double)element_bf16_to_f32(element_f32_to_bf16((float)value));
	case OPD_f16:
		return (double)element_f16_to_f32(element_f32_to_f16((float)value));
	default: {
		uint64_t bits = 0;
		element_store_f32(dtype, &bits, (float)value);
		return element_load_f64(dtype, &bits);
	}
	}
}

/* ---- Views ------------------------------------------------------------------------------------------------------------- */

/* Puts a dimension in front of those that `view` has (they are kept from the last on, in reverse), or merges it into the
 * first. */
static void view_push(struct kernel_view *view, int64_t extent, int64_t stride)
{
	if (extent == 1)
		return;
	if (view->rank > 0) {
		uint32_t inner = view->rank - 1;
		int64_t behind, merged;
		if (!__builtin_mul_overflow(view->strides[inner], view->shape[inner], &behind) && behind == stride &&
		    !__builtin_mul_overflow(view->shape[inner], extent, &merged)) {
			view->shape[inner] = merged;
			return;
		}
	}
	view->shape[view->rank] = extent;
	view->strides[view->rank] = stride;
	view->rank++;
}

struct kernel_view kernel_view(const opd_tensor *tensor, uint32_t rank, const int64_t *shape)
{
	struct kernel_view view = {.dtype = tensor->dtype, .data = opd_tensor_data(tensor)};
	for (uint32_t i = 0; i < rank; i++) { /* from the last dimension on */
		bool own = i < tensor->rank && tensor->shape[tensor->rank - 1 - i] != 1;
		view_push(&view, shape[rank - 1 - i], own ? tensor->strides[tensor->rank - 1 - i] : 0);
	}
	return view;
}

struct kernel_view kernel_view_half(const opd_tensor *tensor, int64_t first)
{
	uint32_t last = tensor->rank - 1;
	int64_t offset_bytes = first * tensor->strides[last] * (int64_t)opd_dtype_bytes(tensor->dtype);
	struct kernel_view view = {.dtype = tensor->dtype, .data = (unsigned char *)opd_tensor_data(tensor) + offset_bytes};
	view_push(&view, tensor->shape[last] / 2, tensor->strides[last]);
	for (uint32_t i = last; i-- > 0;)
		view_push(&view, tensor->shape[i], tensor->strides[i]);
	return view;
}

struct kernel_line kernel_view_run(const struct kernel_view *view, uint64_t begin, int64_t count)
{
	struct kernel_line run = {.dtype = view->dtype, .data = view->data, .stride = 0, .extent = 1};
	if (view->rank == 0)
		return run;
	uint64_t inner = (uint64_t)view->shape[0];
	int64_t rest = (int64_t)(inner - begin % inner);
	int64_t offset = 0;
	for (uint32_t i = 0; i < view->rank; i++) { /* the last dimension comes first */
		uint64_t extent = (uint64_t)view->shape[i];
		offset += (int64_t)(begin % extent) * view->strides[i];
		begin /= extent;
	}
	run.data = view->data + offset * (int64_t)opd_dtype_bytes(view->dtype);
	run.stride = view->strides[0];
	run.extent = rest < count ? rest : count;
	return run;
}

void kernel_gather(const struct kernel_view *view, uint64_t begin, int64_t count, double *to)
{
	for (int64_t done = 0; done < count;) {
		struct kernel_line run = kernel_view_run(view, begin + (uint64_t)done, count - done);
		kernel_load(&run, 0, run.extent, to + done);
		done += run.extent;
	}
}

void kernel_gather_i64(const struct kernel_view *view, uint64_t begin, int64_t count, int64_t *to)
{
	for (int64_t done = 0; done < count;) {
		struct kernel_line run = kernel_view_run(view, begin + (uint64_t)done, count - done);
		kernel_load_i64(&run, 0, run.extent, to + done);
		done += run.extent;
	}
}

/* ---- Generators -------------------------------------------------------------------------------------------------------- */

#define DIM_MAX ((int64_t)1 << 40)

opd_status kernel_generator_begin(const opd_op *op, const opd_generator *generator, uint32_t variants, opd_error *error)
{
	if (generator->variant >= variants)
		return opd_fail(error, OPD_OUT_OF_RANGE, "%.*s: generator variant %u, expected 0 to %u", name_length(op), op->schema,
		                generator->variant, variants - 1);
	if (generator->dim_count != op->dim_count)
		return kernel_invalid(op, error, "%u dims, expected %u (%s)", generator->dim_count, op->dim_count, op->dims);
	for (uint32_t i = 0; i < op->dim_count; i++)
		if (generator->dims[i] < 0 || generator->dims[i] > DIM_MAX)
			return kernel_invalid(op, error, "dim %u is %lld, expected 0 to %lld (%s)", i, (long long)generator->dims[i],
			                      (long long)DIM_MAX, op->dims);
	return OPD_OK;
}

opd_status kernel_generator_float(const opd_op *op, const opd_generator *generator, opd_error *error)
{
	if (opd_dtype_is_float(generator->dtype))
		return OPD_OK;
	return kernel_invalid(op, error, "dtype is %s, expected f16, bf16, f32 or f64", opd_dtype_name(generator->dtype));
}

opd_status kernel_generate_raw(const opd_op *op, opd_generator *generator, const char *name, opd_dtype dtype, uint32_t rank,
                               const int64_t *shape, void **memory_out, opd_error *error)
{
	*memory_out = generator->tensor(generator, name, dtype, rank, shape);
	if (*memory_out != NULL)
		return OPD_OK;
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%.*s: no memory for %s %s of %s", name_length(op), op->schema, name,
	                kernel_extents_text(rank, shape).text, opd_dtype_name(dtype));
}

opd_status kernel_generate(const opd_op *op, opd_generator *generator, const char *name, opd_dtype dtype, uint32_t rank,
                           const int64_t *shape, double scale, opd_error *error)
{
	void *memory;
	opd_status status = kernel_generate_raw(op, generator, name, dtype, rank, shape, &memory, error);
	if (status != OPD_OK)
		return status;
	uint64_t elements = 1; /* the host made the tensor, so the product fits */
	for (uint32_t i = 0; i < rank; i++)
		elements *= (uint64_t)shape[i];
	generator->fill(generator, memory, dtype, elements, scale);
	return OPD_OK;
}
