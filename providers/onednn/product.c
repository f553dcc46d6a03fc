/* linear and matmul of f32 and bf16, scaled_mm of i8: blocks of a product (providers/product.h), one single-threaded primitive each.
 *
 * A plan holds the primitives for the block shapes that a product of its shape has: whole ones, and those at its lower and right edges. Blocks run on the
 * lane's threads at once; each thread has its own scratch. A right factor whose contents stay is packed once, into the layout that the library likes best. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "providers/onednn/multiply.h"
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
	const struct dnn *dnn = state;
	struct product product;
	opd_dtype dtype = call->args[0].tensor->dtype;
	if (dtype == OPD_bf16 && !dnn->has_bf16)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "bf16, only f32: the processor has no AVX-512 BF16");
	if (dtype != OPD_f32 && dtype != OPD_bf16)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s, only f32, bf16", opd_dtype_name(dtype));
	if (dtype == OPD_bf16 && opd_tensor_last(call->args[0].tensor) % 2 != 0) /* it multiplies in pairs: the last one twice, once by 0, which makes a NaN of an infinity */
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "sums of %lld bf16 products, only even numbers", (long long)opd_tensor_last(call->args[0].tensor));
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

/* 40 products a nanosecond in f32, twice as many in bf16, four times in i8; factors come at 8 bytes a nanosecond. */
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

static opd_status make_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	const struct dnn *dnn = state;
	struct product product;
	struct multiply_plan *plan;
	if (!read_product(impl, call, &product, reason))
		return opd_fail(error, OPD_INTERNAL, "%s: a plan for operands that the predicate refuses", impl->op);
	dnn_enter(dnn);
	opd_status status = multiply_plan_create(dnn, &product, &plan, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", impl->op);
	plan_out->memory_bytes = sizeof *plan + 2 * SHAPES * (uint64_t)65536; /* a primitive's code, generously */
	plan_out->data = plan;
	plan_out->destroy = multiply_plan_destroy;
	return OPD_OK;
}

/* ---- Run ---------------------------------------------------------------------------------------------------------------- */

struct work {
	const struct dnn *dnn;
	const struct multiply_plan *plan;
	const opd_call *call;
	const opd_exec *exec;
	struct product product;
	const unsigned char *packed; /* the right factor; NULL: it isn't */
	unsigned char *to_pack;      /* what it is packed into now */
	unsigned char *scratch;      /* of thread t: at t · scratch_bytes */
	uint64_t scratch_bytes;
	_Atomic int failed; /* a dnnl_status_t */
	atomic_bool cancelled;
};

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

/* Results of sums over nothing: zeros, or the bias. */
static void fill_block(const struct work *work, const struct product_block *block)
{
	const opd_tensor *bias = work->product.bias;
	const uint64_t bytes = opd_dtype_bytes(work->product.y->dtype), row_bytes = (uint64_t)block->columns * bytes;
	for (int64_t r = 0; r < block->rows; r++) {
		unsigned char *row = block->y + (uint64_t)(r * work->product.columns) * bytes;
		if (bias == NULL)
			memset(row, 0, row_bytes);
		else
			memcpy(row, (const unsigned char *)opd_tensor_data(bias) + (uint64_t)block->column * bytes, row_bytes);
	}
}

static void copy_block(const struct work *work, const struct product_block *block, const unsigned char *results)
{
	const uint64_t bytes = opd_dtype_bytes(work->product.y->dtype), row_bytes = (uint64_t)block->columns * bytes;
	for (int64_t r = 0; r < block->rows; r++)
		memcpy(block->y + (uint64_t)(r * work->product.columns) * bytes, results + (uint64_t)r * row_bytes, row_bytes);
}

static dnnl_status_t run_block(const struct work *work, const struct product_block *block, dnnl_stream_t stream, unsigned char *scratch)
{
	const struct product *product = &work->product;
	const struct multiply_plan *plan = work->plan;
	const struct multiply_set *set = work->packed != NULL ? &plan->packed : &plan->plain;
	const bool scaled = product->left_tensor->dtype == OPD_i8, apart = set->apart && (scaled || block->rows > 1);
	const unsigned char *right = work->packed != NULL ? packing_at(plan, block, work->packed) : block->right;
	void *sums = scratch + plan->scratchpad_bytes;
	dnnl_status_t status = dnnl_success;
	if (product->depth > 0)
		status = multiply_execute(work->dnn, multiply_of(set, block), stream, product, block, right, scratch, apart ? sums : block->y);
	else if (!scaled)
		fill_block(work, block);
	if (status == dnnl_success && apart && !scaled && product->depth > 0)
		copy_block(work, block, sums);
	if (status == dnnl_success && scaled)
		scale_block(work, block, product->depth > 0 ? sums : NULL);
	return status;
}

/* One share of a loop over blocks. */
static void run_share(struct work *work, uint64_t begin, uint64_t end, uint32_t thread,
                      dnnl_status_t (*run_one)(const struct work *work, uint64_t index, dnnl_stream_t stream, unsigned char *scratch))
{
	dnnl_stream_t stream = NULL;
	dnn_enter(work->dnn);
	dnnl_status_t status = work->dnn->stream_create(&stream, work->dnn->engine, dnnl_stream_default_flags);
	for (uint64_t i = begin; i < end && status == dnnl_success && !atomic_load(&work->cancelled); i++) {
		status = run_one(work, i, stream, work->scratch + thread * work->scratch_bytes);
		if (i + 1 < end && work->exec->host->cancelled(work->exec))
			atomic_store(&work->cancelled, true);
	}
	if (status != dnnl_success)
		atomic_store(&work->failed, (int)status);
	if (stream != NULL)
		(void)work->dnn->stream_destroy(stream);
}

static dnnl_status_t multiply_one(const struct work *work, uint64_t index, dnnl_stream_t stream, unsigned char *scratch)
{
	const struct product_block block = product_block_at(&work->product, index);
	return run_block(work, &block, stream, scratch);
}

static void multiply_blocks(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	run_share(argument, begin, end, thread, multiply_one);
}

static dnnl_status_t pack_one(const struct work *work, uint64_t index, dnnl_stream_t stream, unsigned char *scratch)
{
	return packing_fill(work->plan, &work->product, index, stream, scratch, work->to_pack);
}

static void pack_blocks(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	run_share(argument, begin, end, thread, pack_one);
}

/* Finds or makes the packed right factor, if there may be one. */
static void pack(struct work *work)
{
	const struct packing *packing = &work->plan->packing;
	const opd_exec *exec = work->exec;
	const opd_host *host = exec->host;
	if (packing->bytes == 0 || host->struct_bytes < offsetof(opd_host, derived_keep) + sizeof host->derived_keep)
		return;
	const opd_tensor *right = work->product.right_tensor;
	work->packed = host->derived_find(exec, right, &packing->key, sizeof packing->key);
	if (work->packed != NULL)
		return;
	work->to_pack = host->derived_make(exec, right, &packing->key, sizeof packing->key, packing->bytes);
	if (work->to_pack == NULL)
		return;
	host->parallel_for(exec, packing->blocks, 1, pack_blocks, work);
	if (atomic_load(&work->failed) != 0 || atomic_load(&work->cancelled))
		return;
	host->derived_keep(exec, work->to_pack);
	work->packed = work->to_pack;
}

static opd_status run_product(const opd_impl *impl, struct work *work, opd_error *error)
{
	const opd_host *host = work->exec->host;
	uint64_t bytes;
	/* The plan can't know the lane's threads: scratch for each is asked for here. */
	work->scratch_bytes = (work->plan->scratchpad_bytes + work->plan->sums_bytes + 64) / 64 * 64;
	bytes = work->scratch_bytes * work->exec->threads;
	work->scratch = host->alloc(host, bytes);
	if (work->scratch == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no %llu bytes of host memory for scratch", impl->op, (unsigned long long)bytes);
	pack(work);
	work->product.block_columns = work->packed != NULL ? work->plan->packed.block_columns : work->plan->plain.block_columns;
	if (atomic_load(&work->failed) == 0 && !atomic_load(&work->cancelled))
		product_for(work->exec, &work->product, product_ns(&work->product), multiply_blocks, work);
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
	opd_dtype wanted = kind_of(impl) == SCALED_MM ? work.product.y->dtype : work.product.left_tensor->dtype;
	opd_status status = product_expect_output(impl, &work.product, wanted, error);
	if (status != OPD_OK || work.product.y->elements == 0)
		return status;
	atomic_init(&work.failed, 0);
	atomic_init(&work.cancelled, false);
	return run_product(impl, &work, error);
}

bool onednn_has_bf16(void)
{
#if defined __x86_64__
	return __builtin_cpu_supports("avx512bf16");
#else
	return false;
#endif
}

const char *onednn_scaled_mm_unsupported(void)
{
#if defined __x86_64__
	return __builtin_cpu_supports("avx512vnni") ? NULL : "needs AVX-512 VNNI: without it sums of 8-bit products saturate";
#else
	return NULL;
#endif
}

#define ONEDNN_PRODUCT(op_name, schema_text, supports, more_flags)                                                                  \
	{                                                                                                                               \
		.struct_bytes = sizeof(opd_impl), .flags = OPD_IMPL_THREAD_INVARIANT | (more_flags), .op = op_name, .schema = schema_text, \
		.device = "cpu",                                                                                                            \
		.uuid = OPD_UUID_onednn_product, .predicate = supports, .plan = make_plan, .cost_ns = cost_ns, .run = run,                   \
	}

const opd_impl onednn_linear = ONEDNN_PRODUCT("linear", "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", float_predicate,
                                              OPD_IMPL_BF16_DENORMALS_ZERO);
const opd_impl onednn_matmul = ONEDNN_PRODUCT("matmul", "matmul(Tensor a, Tensor b) -> Tensor", float_predicate, OPD_IMPL_BF16_DENORMALS_ZERO);
const opd_impl onednn_scaled_mm = ONEDNN_PRODUCT(
	"scaled_mm",
	"scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None, str out_dtype=\"bf16\") -> Tensor", scaled_predicate,
	0);
