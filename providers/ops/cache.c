/* reshape_and_cache: tokens' keys and values into the slots of a paged cache. */
#include "providers/ops/attend.h"
#include "providers/ops/index.h"
#include "uuid/native_cache.h"

enum { CACHE_KEY, CACHE_VALUE, CACHE_KEYS, CACHE_VALUES, CACHE_SLOTS };

static opd_status cache_expect_dtypes(const opd_op *op, const opd_call *call, opd_error *error)
{
	static const char *const names[] = {"key", "value", "key_cache", "value_cache"};
	opd_status status = OPD_OK;
	for (uint32_t i = 1; i < 4 && status == OPD_OK; i++)
		status = kernel_expect_dtype_of(op, names[i], kernel_tensor(call, i), "key", kernel_tensor(call, CACHE_KEY), error);
	if (status == OPD_OK)
		status = kernel_expect_index(op, "slot_mapping", kernel_tensor(call, CACHE_SLOTS), error);
	return status;
}

static opd_status cache_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *key = kernel_tensor(call, CACHE_KEY);
	const opd_tensor *keys = kernel_tensor(call, CACHE_KEYS);
	opd_status status = cache_expect_dtypes(op, call, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "key", key, 3, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "key_cache", keys, 4, error);
	if (status != OPD_OK)
		return status;

	int64_t shape[4] = {keys->shape[0], keys->shape[1], key->shape[1], key->shape[2]};
	status = kernel_expect_shape_of(op, "value", kernel_tensor(call, CACHE_VALUE), "key", key, error);
	if (status == OPD_OK)
		status = kernel_expect_shape(op, "key_cache", keys, 4, shape, "heads and head size of key", error);
	if (status == OPD_OK)
		status = kernel_expect_shape_of(op, "value_cache", kernel_tensor(call, CACHE_VALUES), "key_cache", keys, error);
	if (status == OPD_OK)
		status = kernel_expect_shape(op, "slot_mapping", kernel_tensor(call, CACHE_SLOTS), 1, key->shape, "tokens of key", error);
	for (uint32_t i = 0; i < 2 && status == OPD_OK; i++)
		status = kernel_output_like(op, outputs[i], keys->dtype, keys, error);
	return status;
}

static opd_status cache_check(const opd_op *op, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *keys = kernel_tensor(call, CACHE_KEYS);
	return index_check(op, exec, "slot_mapping", kernel_tensor(call, CACHE_SLOTS), INT64_MIN,
	                   index_multiply(keys->shape[0], keys->shape[1]), "slots of key_cache", error);
}

static void copy_row(const struct kernel_line *to, const struct kernel_line *from)
{
	size_t bytes = opd_dtype_bytes(from->dtype);
	for (int64_t i = 0; i < from->extent; i++)
		memcpy(kernel_line_at(to, i), kernel_line_at(from, i), bytes);
}

/* One block of one cache into its output, unless they are the same memory (donated). Items are (block, cache). */
static void cache_copy_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const uint32_t which = item % 2;
	const opd_tensor *cache = kernel_tensor(job->call, CACHE_KEYS + which);
	const opd_tensor *output = job->call->outputs[which];
	const uint64_t rows = (uint64_t)cache->shape[1] * (uint64_t)cache->shape[2]; /* of a block */
	(void)scratch;
	if (opd_tensor_data(cache) == opd_tensor_data(output))
		return;
	for (uint64_t row = item / 2 * rows; row < (item / 2 + 1) * rows; row++) {
		struct kernel_line from = kernel_row(cache, row);
		struct kernel_line to = kernel_row(output, row);
		copy_row(&to, &from);
	}
}

/* One head of all tokens, in order: so of two tokens for one slot the later stays, whole, however heads are spread over threads.
 * Items are (head, cache). */
static void cache_write_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const uint32_t which = item % 2;
	const opd_tensor *tokens = kernel_tensor(job->call, CACHE_KEY + which);
	const opd_tensor *slots = kernel_tensor(job->call, CACHE_SLOTS);
	const uint64_t heads = (uint64_t)tokens->shape[1];
	const uint64_t head = item / 2;
	/* Slots of stride 0 are all one, and the last token stays there: a client may claim any number of such tokens. */
	uint64_t first = slots->strides[0] == 0 ? slots->elements - 1 : 0;
	(void)scratch;
	for (uint64_t t = first; t < slots->elements; t++) {
		int64_t slot = kernel_index(slots, t);
		if (slot < 0)
			continue;
		struct kernel_line from = kernel_row(tokens, t * heads + head);
		struct kernel_line to = kernel_row(job->call->outputs[which], (uint64_t)slot * heads + head);
		copy_row(&to, &from);
	}
}

/* With the copy: whether the caches are donated is unknown here. */
static uint64_t cache_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 2);
}

static bool cache_in_place(const opd_call *call)
{
	return opd_tensor_data(kernel_tensor(call, CACHE_KEYS)) == opd_tensor_data(call->outputs[0]) &&
	       opd_tensor_data(kernel_tensor(call, CACHE_VALUES)) == opd_tensor_data(call->outputs[1]);
}

static opd_status cache_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct kernel_job job = {.impl = impl, .call = call, .exec = exec};
	const opd_tensor *key = kernel_tensor(call, CACHE_KEY);
	const opd_tensor *output = call->outputs[0];
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || opd_tensor_empty(output))
		return status;
	uint64_t blocks = (uint64_t)output->shape[0];
	if (!cache_in_place(call))
		status = kernel_for(&job, 2 * blocks, 2 * output->elements / blocks, cache_copy_item, error);
	if (status != OPD_OK || opd_tensor_empty(key))
		return status;
	uint64_t heads = (uint64_t)key->shape[1];
	return kernel_for(&job, 2 * heads, 2 * key->elements / heads, cache_write_item, error);
}

/* Variants: 0 i64 slots; 1 i32; 2 every third token skipped. dtype of the generator: any. */
static opd_status cache_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	const int64_t *dims = generator->dims;
	opd_status status = kernel_generator_begin(op, generator, 3, error);
	if (status != OPD_OK)
		return status;
	int64_t slots = index_multiply(dims[3], dims[4]);
	int64_t key[3] = {dims[0], dims[1], dims[2]};
	int64_t cache[4] = {dims[3], dims[4], dims[1], dims[2]};
	opd_dtype index = generator->variant == 1 ? OPD_i32 : OPD_i64;
	if (dims[0] > slots || slots > INT32_MAX)
		return kernel_invalid(op, error, "dims tokens, blocks, block_size are %lld, %lld, %lld, expected tokens <= slots <= %d",
		                      (long long)dims[0], (long long)dims[3], (long long)dims[4], INT32_MAX);
	status = kernel_generate(op, generator, "key", generator->dtype, 3, key, 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "value", generator->dtype, 3, key, 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "key_cache", generator->dtype, 4, cache, 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "value_cache", generator->dtype, 4, cache, 1, error);
	void *memory;
	if (status == OPD_OK)
		status = kernel_generate_raw(op, generator, "slot_mapping", index, 1, key, &memory, error);
	if (status != OPD_OK)
		return status;
	struct index_scatter scatter = index_scatter_begin(generator, slots);
	for (int64_t t = 0; t < key[0]; t++) {
		int64_t slot = index_scatter_next(&scatter);
		index_set(memory, index, t, generator->variant == 2 && t % 3 == 1 ? -1 - t : slot);
	}
	return OPD_OK;
}

static const opd_impl cache_native = {
	.struct_bytes = sizeof cache_native,
	.flags = OPD_IMPL_IN_PLACE | OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "reshape_and_cache",
	.device = "cpu",
	.uuid = OPD_UUID_native_cache,
	.cost_ns = cache_cost,
	.run = cache_run,
	.user = &reshape_and_cache,
};
static const opd_in_place cache_pairs[] = {{CACHE_KEYS, 0}, {CACHE_VALUES, 1}};
static const int64_t cache_dims[] = {9, 2, 64, 6, 8};

const opd_op reshape_and_cache = {
	.struct_bytes = sizeof reshape_and_cache,
	.schema = "reshape_and_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) "
              "-> (Tensor, Tensor)",
	.doc = "key, value [T, kv_heads, D] into caches [blocks, block_size, kv_heads, D] at slot_mapping [T]; negative slots are "
           "skipped",
	.activations = "key,value,slot_mapping",
	.shape = cache_shape,
	.check = index_check_op,
	.check_long = cache_check,
	.indices = "slot_mapping",
	.generate = cache_generate,
	.dims = "tokens,kv_heads,head_size,blocks,block_size",
	.default_dims = cache_dims,
	.dim_count = 5,
	.in_place_count = 2,
	.in_place = cache_pairs,
	.native = &cache_native,
};
