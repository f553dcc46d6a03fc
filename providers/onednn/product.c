/* linear and matmul of f32, scaled_mm of i8: blocks of a product (providers/product.h), one single-threaded primitive each.
 *
 * A plan holds the primitives for the block shapes that a product of its shape has: whole ones, and those at its lower and right edges. Blocks run on the
 * lane's threads at once; each thread has its own scratch. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "providers/onednn/onednn.h"
#include "uuid/onednn_product.h"

/* i8 sums are exact in i32 up to so many products of 128 · 128. */
enum { I8_DEPTH_MAX = 131071 };

/* ---- Which product ------------------------------------------------------------------------------------------------------ */

enum kind { LINEAR, MATMUL, SCALED_MM };

static enum kind kind_of(const opd_impl *impl)
{
	return impl->op[0] == 'l' ? LINEAR : impl->op[0] == 'm' ? MATMUL : SCALED_MM;
}

/* scaled_mm's a and b are linear's x and weight; bias and scales are ours to apply. */
static bool read_scaled(const opd_call *call, struct product *product_out, opd_reason *reason)
{
	opd_arg args[3] = {call->args[0], call->args[1], {.kind = OPD_ARG_NONE}};
	opd_call linear = *call;
	linear.args = args;
	linear.arg_count = 3;
	return product_of_linear(&linear, product_out, reason);
}

static bool read_product(const opd_impl *impl, const opd_call *call, struct product *product_out, opd_reason *reason)
{
	switch (kind_of(impl)) {
	case LINEAR:
		return product_of_linear(call, product_out, reason);
	case MATMUL:
		return product_of_matmul(call, product_out, reason);
	case SCALED_MM:
		break;
	}
	return read_scaled(call, product_out, reason);
}

static bool accept_bias(const opd_tensor *bias, opd_reason *reason)
{
	if (bias != NULL && bias->shape[0] > 1 && bias->strides[0] != 1)
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "bias has stride %lld, only 1", (long long)bias->strides[0]);
	return true;
}

static bool float_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	struct product product;
	opd_dtype dtype = call->args[0].tensor->dtype;
	(void)state;
	if (dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s, only f32", opd_dtype_name(dtype));
	return read_product(impl, call, &product, reason) && accept_bias(product.bias, reason);
}

static bool scaled_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	struct product product;
	opd_dtype dtype = call->args[0].tensor->dtype;
	(void)state;
	if (dtype != OPD_i8)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "a %s, only i8", opd_dtype_name(dtype));
	if (opd_tensor_last(call->args[0].tensor) > I8_DEPTH_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "sums of %lld products, i32 holds %d", (long long)opd_tensor_last(call->args[0].tensor),
		                  (int)I8_DEPTH_MAX);
	return read_product(impl, call, &product, reason);
}

/* 40 products a nanosecond in f32, four times as many in i8; factors come at 8 bytes a nanosecond. */
static double product_ns(const struct product *product)
{
	double products = (double)product->batches * (double)product->rows * (double)product->columns * (double)product->depth;
	double bytes = (double)opd_dtype_bytes(product->left_tensor->dtype);
	return 3000 + products * bytes / (product->rows < 20 ? 8 * (double)product->rows : 160);
}

static uint64_t cost_ns(const opd_impl *impl, const opd_call *call)
{
	struct product product;
	if (!read_product(impl, call, &product, NULL))
		return 0;
	double ns = product_ns(&product);
	return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

/* ---- Plan --------------------------------------------------------------------------------------------------------------- */

/* Index into a plan's primitives: bit 0, a block of fewer columns; bit 1, of fewer rows. */
enum { EDGE_COLUMNS = 1, EDGE_ROWS = 2, SHAPES = 4 };

struct multiply {
	dnnl_primitive_t primitive; /* NULL: no block has this shape */
	dnnl_memory_desc_t left, right, bias, y, scratchpad;
};

struct multiply_plan {
	const struct dnn *dnn;
	uint64_t scratchpad_bytes; /* of a thread */
	uint64_t sums_bytes;       /* of a thread, behind its scratchpad: i8's sums of one block */
	struct multiply shapes[SHAPES];
};

static void plan_destroy(void *data)
{
	struct multiply_plan *plan = data;
	for (unsigned i = 0; i < SHAPES; i++)
		if (plan->shapes[i].primitive != NULL)
			(void)plan->dnn->primitive_destroy(plan->shapes[i].primitive);
	free(plan);
}

static uint64_t round_up(uint64_t bytes)
{
	return (bytes + 63) / 64 * 64;
}

static bool describe(const struct dnn *dnn, dnnl_memory_desc_t *desc, int64_t rows, int64_t columns, dnnl_data_type_t type,
                     struct product_matrix matrix)
{
	const dnnl_dims_t dims = {rows, columns};
	const dnnl_dims_t strides = {matrix.transposed ? 1 : matrix.lead, matrix.transposed ? matrix.lead : 1};
	return dnn->memory_desc_init_by_strides(desc, 2, dims, type, strides) == dnnl_success;
}

static bool describe_all(const struct dnn *dnn, struct multiply *made, const struct product *product, int64_t rows, int64_t columns)
{
	bool sums = product->left_tensor->dtype == OPD_i8;
	dnnl_data_type_t from = sums ? dnnl_s8 : dnnl_f32, to = sums ? dnnl_s32 : dnnl_f32;
	struct product_matrix y = {.lead = sums ? columns : product->columns};
	return describe(dnn, &made->left, rows, product->depth, from, product->left) &&
	       describe(dnn, &made->right, product->depth, columns, from, product->right) && describe(dnn, &made->y, rows, columns, to, y) &&
	       (product->bias == NULL || describe(dnn, &made->bias, 1, columns, from, (struct product_matrix){.lead = columns}));
}

static dnnl_status_t create_primitive(const struct dnn *dnn, struct multiply *made, const struct product *product)
{
	dnnl_matmul_desc_t desc;
	dnnl_primitive_attr_t attr = NULL;
	dnnl_primitive_desc_t primitive_desc = NULL;
	dnnl_status_t status = dnn->matmul_desc_init(&desc, &made->left, &made->right, product->bias != NULL ? &made->bias : NULL, &made->y);
	if (status == dnnl_success)
		status = dnn->primitive_attr_create(&attr);
	if (status == dnnl_success)
		status = dnn->primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
	if (status == dnnl_success)
		status = dnn->primitive_desc_create(&primitive_desc, &desc, attr, dnn->engine, NULL);
	if (status == dnnl_success) {
		made->scratchpad = *dnn->primitive_desc_query_md(primitive_desc, dnnl_query_scratchpad_md, 0);
		status = dnn->primitive_create(&made->primitive, primitive_desc);
	}
	if (primitive_desc != NULL)
		(void)dnn->primitive_desc_destroy(primitive_desc);
	if (attr != NULL)
		(void)dnn->primitive_attr_destroy(attr);
	return status;
}

static opd_status plan_shape(const struct dnn *dnn, struct multiply_plan *plan, const struct product *product, int64_t rows, int64_t columns,
                             opd_error *error)
{
	bool short_rows = rows < PRODUCT_BLOCK_ROWS, short_columns = columns < product_block_columns(product);
	struct multiply *made = &plan->shapes[(short_rows ? EDGE_ROWS : 0) | (short_columns ? EDGE_COLUMNS : 0)];
	if (rows == 0 || columns == 0 || made->primitive != NULL)
		return OPD_OK;
	dnnl_status_t status = describe_all(dnn, made, product, rows, columns) ? create_primitive(dnn, made, product) : dnnl_invalid_arguments;
	if (status != dnnl_success)
		return opd_fail(error, status == dnnl_out_of_memory ? OPD_RESOURCE_EXHAUSTED : OPD_INTERNAL,
		                "no oneDNN primitive for a product of %lld x %lld x %lld: its status is %d", (long long)rows, (long long)product->depth,
		                (long long)columns, (int)status);
	uint64_t bytes = round_up(dnn->memory_desc_get_size(&made->scratchpad));
	plan->scratchpad_bytes = bytes > plan->scratchpad_bytes ? bytes : plan->scratchpad_bytes;
	if (product->left_tensor->dtype == OPD_i8) {
		bytes = round_up((uint64_t)rows * (uint64_t)columns * sizeof(int32_t));
		plan->sums_bytes = bytes > plan->sums_bytes ? bytes : plan->sums_bytes;
	}
	return OPD_OK;
}

static opd_status plan_shapes(const struct dnn *dnn, struct multiply_plan *plan, const struct product *product, opd_error *error)
{
	int64_t block = product_block_columns(product);
	int64_t rows[2] = {product->rows >= PRODUCT_BLOCK_ROWS ? PRODUCT_BLOCK_ROWS : 0, product->rows % PRODUCT_BLOCK_ROWS};
	int64_t columns[2] = {product->columns >= block ? block : 0, product->columns % block};
	opd_status status = OPD_OK;
	for (int i = 0; i < 4 && status == OPD_OK; i++)
		status = plan_shape(dnn, plan, product, rows[i / 2], columns[i % 2], error);
	return status;
}

static opd_status make_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	const struct dnn *dnn = state;
	struct product product;
	if (!read_product(impl, call, &product, reason))
		return opd_fail(error, OPD_INTERNAL, "%s: a plan for operands that the predicate refuses", impl->op);
	struct multiply_plan *plan = calloc(1, sizeof *plan);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for a plan", impl->op);
	plan->dnn = dnn;
	dnn_enter(dnn);
	opd_status status = product.depth == 0 || product.batches == 0 ? OPD_OK : plan_shapes(dnn, plan, &product, error);
	if (status != OPD_OK) {
		plan_destroy(plan);
		return status;
	}
	plan_out->memory_bytes = sizeof *plan + SHAPES * (uint64_t)65536; /* a primitive's code, generously */
	plan_out->data = plan;
	plan_out->destroy = plan_destroy;
	return OPD_OK;
}

/* ---- Run ---------------------------------------------------------------------------------------------------------------- */

struct work {
	const struct dnn *dnn;
	const struct multiply_plan *plan;
	const opd_call *call;
	const opd_exec *exec;
	struct product product;
	unsigned char *scratch; /* of thread t: at t · scratch_bytes */
	uint64_t scratch_bytes;
	_Atomic int failed; /* a dnnl_status_t */
	atomic_bool cancelled;
};

static dnnl_status_t execute(const struct work *work, const struct multiply *multiply, const struct product_block *block, dnnl_stream_t stream,
                             unsigned char *scratch, void *y)
{
	const struct dnn *dnn = work->dnn;
	const opd_tensor *bias = work->product.bias;
	void *bias_data = bias == NULL ? NULL : (float *)opd_tensor_data(bias) + block->column;
	/* The library's memory objects take non-const addresses; sources are only read. */
	union {
		const unsigned char *from;
		void *to;
	} left = {block->left}, right = {block->right};
	const struct {
		int name;
		const dnnl_memory_desc_t *desc;
		void *data;
	} operands[] = {
		{DNNL_ARG_SRC, &multiply->left, left.to},        {DNNL_ARG_WEIGHTS, &multiply->right, right.to},
		{DNNL_ARG_DST, &multiply->y, y},                 {DNNL_ARG_SCRATCHPAD, &multiply->scratchpad, scratch},
		{DNNL_ARG_BIAS, &multiply->bias, bias_data},
	};
	enum { OPERANDS = sizeof operands / sizeof operands[0] };
	dnnl_exec_arg_t args[OPERANDS];
	int count = 0, used = bias == NULL ? OPERANDS - 1 : OPERANDS;
	dnnl_status_t status = dnnl_success;
	for (; count < used && status == dnnl_success; count++) {
		args[count] = (dnnl_exec_arg_t){.arg = operands[count].name, .memory = NULL};
		status = dnn->memory_create(&args[count].memory, operands[count].desc, dnn->engine, operands[count].data);
	}
	if (status == dnnl_success)
		status = dnn->primitive_execute(multiply->primitive, stream, count, args);
	for (int i = 0; i < count; i++)
		(void)dnn->memory_destroy(args[i].memory);
	return status;
}

static float scale_at(const opd_tensor *scale, int64_t index)
{
	return ((const float *)opd_tensor_data(scale))[scale->elements == 1 ? 0 : index * scale->strides[0]];
}

/* y = sums · scale_a · scale_b + bias for one block. sums: NULL where nothing was summed. */
static void scale_block(const struct work *work, const struct product_block *block, const int32_t *sums)
{
	const opd_call *call = work->call;
	const opd_tensor *scale_a = call->args[2].tensor, *scale_b = call->args[3].tensor;
	const opd_tensor *bias = call->args[4].kind == OPD_ARG_TENSOR ? call->args[4].tensor : NULL;
	opd_dtype dtype = work->product.y->dtype;
	uint64_t bytes = opd_dtype_bytes(dtype);
	uint64_t first = (uint64_t)(block->y - (unsigned char *)opd_tensor_data(work->product.y)) / bytes / (uint64_t)work->product.columns;
	for (int64_t r = 0; r < block->rows; r++) {
		float row_scale = scale_at(scale_a, (int64_t)first + r);
		for (int64_t c = 0; c < block->columns; c++) {
			float value = sums == NULL ? 0 : (float)sums[r * block->columns + c];
			value = value * row_scale * scale_at(scale_b, block->column + c);
			if (bias != NULL)
				value += element_load_f32(dtype, (unsigned char *)opd_tensor_data(bias) + (uint64_t)((block->column + c) * bias->strides[0]) * bytes);
			element_store_f32(dtype, block->y + (uint64_t)(r * work->product.columns + c) * bytes, value);
		}
	}
}

/* f32 results of sums over nothing: zeros, or the bias. */
static void fill_block(const struct work *work, const struct product_block *block)
{
	const opd_tensor *bias = work->product.bias;
	float *y = (void *)block->y;
	for (int64_t r = 0; r < block->rows; r++)
		for (int64_t c = 0; c < block->columns; c++)
			y[r * work->product.columns + c] = bias == NULL ? 0 : ((const float *)opd_tensor_data(bias))[block->column + c];
}

static dnnl_status_t run_block(const struct work *work, const struct product_block *block, dnnl_stream_t stream, unsigned char *scratch)
{
	bool scaled = work->product.left_tensor->dtype == OPD_i8;
	bool short_rows = block->rows < PRODUCT_BLOCK_ROWS, short_columns = block->columns < product_block_columns(&work->product);
	const struct multiply *multiply = &work->plan->shapes[(short_rows ? EDGE_ROWS : 0) | (short_columns ? EDGE_COLUMNS : 0)];
	void *sums = scratch + work->plan->scratchpad_bytes;
	dnnl_status_t status = dnnl_success;
	if (work->product.depth > 0)
		status = execute(work, multiply, block, stream, scratch, scaled ? sums : block->y);
	else if (!scaled)
		fill_block(work, block);
	if (status == dnnl_success && scaled)
		scale_block(work, block, work->product.depth > 0 ? sums : NULL);
	return status;
}

static void run_blocks(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct work *work = argument;
	unsigned char *scratch = work->scratch + thread * work->scratch_bytes;
	dnnl_stream_t stream = NULL;
	dnn_enter(work->dnn);
	dnnl_status_t status = work->dnn->stream_create(&stream, work->dnn->engine, dnnl_stream_default_flags);
	for (uint64_t i = begin; i < end && status == dnnl_success && !atomic_load(&work->cancelled); i++) {
		struct product_block block = product_block_at(&work->product, i);
		status = run_block(work, &block, stream, scratch);
		if (i + 1 < end && work->exec->host->cancelled(work->exec))
			atomic_store(&work->cancelled, true);
	}
	if (status != dnnl_success)
		atomic_store(&work->failed, (int)status);
	if (stream != NULL)
		(void)work->dnn->stream_destroy(stream);
}

static opd_status run_product(const opd_impl *impl, struct work *work, opd_error *error)
{
	const opd_host *host = work->exec->host;
	uint64_t bytes;
	/* The plan can't know the lane's threads: scratch for each is asked for here. */
	work->scratch_bytes = round_up(work->plan->scratchpad_bytes + work->plan->sums_bytes + 1);
	bytes = work->scratch_bytes * work->exec->threads;
	work->scratch = host->alloc(host, bytes);
	if (work->scratch == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no %llu bytes of host memory for scratch", impl->op, (unsigned long long)bytes);
	product_for(work->exec, &work->product, product_ns(&work->product), run_blocks, work);
	host->free(host, work->scratch);
	if (atomic_load(&work->failed) != 0)
		return opd_fail(error, atomic_load(&work->failed) == dnnl_out_of_memory ? OPD_RESOURCE_EXHAUSTED : OPD_INTERNAL,
		                "%s: a oneDNN primitive failed with status %d", impl->op, atomic_load(&work->failed));
	return atomic_load(&work->cancelled) ? opd_fail(error, OPD_CANCELLED, "%s: cancelled while the kernel ran", impl->op) : OPD_OK;
}

static opd_status run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct work work = {.dnn = state, .plan = exec->plan->data, .call = call, .exec = exec};
	opd_reason reason;
	if (!read_product(impl, call, &work.product, &reason))
		return opd_fail(error, OPD_INTERNAL, "%s: the operands' layout isn't what the predicate accepted", impl->op);
	opd_dtype wanted = kind_of(impl) == SCALED_MM ? work.product.y->dtype : OPD_f32;
	opd_status status = product_expect_output(impl, &work.product, wanted, error);
	if (status != OPD_OK || work.product.y->elements == 0)
		return status;
	atomic_init(&work.failed, 0);
	atomic_init(&work.cancelled, false);
	return run_product(impl, &work, error);
}

const char *onednn_scaled_mm_unsupported(void)
{
#if defined __x86_64__
	return __builtin_cpu_supports("avx512vnni") ? NULL : "needs AVX-512 VNNI: without it sums of 8-bit products saturate";
#else
	return NULL;
#endif
}

#define ONEDNN_PRODUCT(op_name, schema_text, supports)                                                                              \
	{                                                                                                                               \
		.struct_bytes = sizeof(opd_impl), .flags = OPD_IMPL_THREAD_INVARIANT, .op = op_name, .schema = schema_text, .device = "cpu", \
		.uuid = OPD_UUID_onednn_product, .predicate = supports, .plan = make_plan, .cost_ns = cost_ns, .run = run,                   \
	}

const opd_impl onednn_linear = ONEDNN_PRODUCT("linear", "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", float_predicate);
const opd_impl onednn_matmul = ONEDNN_PRODUCT("matmul", "matmul(Tensor a, Tensor b) -> Tensor", float_predicate);
const opd_impl onednn_scaled_mm = ONEDNN_PRODUCT(
	"scaled_mm",
	"scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None, str out_dtype=\"bf16\") -> Tensor", scaled_predicate);
