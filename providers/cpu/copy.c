/* embedding and reshape_and_cache: rows of any dtype, copied to where indices say. */
#include <string.h>

#include "providers/cpu/call.h"
#include "uuid/cpu_copy.h"

/* Nanoseconds: of a row that lies anywhere, and of so many bytes (about 10 GB/s, from memory to memory). */
static uint64_t copy_ns(uint64_t rows, uint64_t bytes)
{
	return 50 + estimate_add(estimate_multiply(rows, 5), bytes / 10);
}

/* ---- embedding ---------------------------------------------------------------------------------------------------------- */

static bool embedding_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *ids = cpu_tensor(call, 0);
	if (!opd_tensor_contiguous(ids))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "ids are strided");
	return cpu_accept_rows("table", cpu_tensor(call, 1), reason);
}

static uint64_t embedding_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	const opd_tensor *y = call->outputs[0];
	return copy_ns(cpu_tensor(call, 0)->elements, y->elements * opd_dtype_bytes(y->dtype));
}

struct embedding_work {
	const opd_tensor *ids;
	struct cpu_rows table;
	unsigned char *y;
};

static void embedding_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct embedding_work *work = context;
	const uint64_t bytes = work->table.row_bytes;
	for (uint64_t i = begin; i < end; i++)
		memcpy(work->y + i * bytes, cpu_row(&work->table, (uint64_t)cpu_index(work->ids, i)), bytes);
}

static opd_status embedding_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *ids = cpu_tensor(call, 0);
	const opd_tensor *table = cpu_tensor(call, 1);
	int64_t shape[OPD_RANK_MAX + 1];
	for (uint32_t i = 0; i < ids->rank; i++)
		shape[i] = ids->shape[i];
	shape[ids->rank] = table->shape[1];
	opd_status status = cpu_expect_shape(impl, call, 0, table->dtype, ids->rank + 1, shape, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct embedding_work work = {.ids = ids, .table = cpu_rows_of(table), .y = opd_tensor_data(call->outputs[0])};
	return cpu_for(exec, ids->elements, embedding_cost(impl, call), embedding_rows, &work, error);
}

const opd_impl cpu_embedding = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "embedding",
	.schema = "embedding(Tensor ids, Tensor table) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_copy,
	.predicate = embedding_predicate,
	.cost_ns = embedding_cost,
	.run = embedding_run,
};

/* ---- reshape_and_cache -------------------------------------------------------------------------------------------------- */

enum { CACHE_KEY, CACHE_VALUE, CACHE_KEYS, CACHE_VALUES, CACHE_SLOTS };

static bool cache_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return cpu_accept_rows("key", cpu_tensor(call, CACHE_KEY), reason) &&
	       cpu_accept_rows("value", cpu_tensor(call, CACHE_VALUE), reason) &&
	       cpu_accept_rows("key_cache", cpu_tensor(call, CACHE_KEYS), reason) &&
	       cpu_accept_rows("value_cache", cpu_tensor(call, CACHE_VALUES), reason);
}

static uint64_t cache_write_ns(const opd_call *call)
{
	const opd_tensor *key = cpu_tensor(call, CACHE_KEY);
	return copy_ns(2 * (uint64_t)key->shape[0], 2 * (key->elements * opd_dtype_bytes(key->dtype)));
}

static uint64_t cache_copy_ns(const opd_call *call)
{
	const opd_tensor *keys = cpu_tensor(call, CACHE_KEYS);
	return copy_ns(1, 2 * keys->elements * opd_dtype_bytes(keys->dtype));
}

/* With the copy: whether the caches are donated is unknown here. */
static uint64_t cache_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return cache_copy_ns(call) + cache_write_ns(call);
}

/* One of the two caches. */
struct cache_work {
	const opd_tensor *slots;
	const opd_tensor *tokens;
	struct cpu_rows from, to; /* the cache before and after: rows are heads of slots */
	uint64_t heads;
	uint64_t element_bytes;
};

/* Items are slots. */
static void cache_copy(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct cache_work *work = context;
	const uint64_t slot_bytes = work->heads * work->to.row_bytes;
	if (work->from.scattered == NULL) {
		memcpy(work->to.base + begin * slot_bytes, work->from.base + begin * slot_bytes, (end - begin) * slot_bytes);
		return;
	}
	for (uint64_t row = begin * work->heads; row < end * work->heads; row++)
		memcpy(cpu_row(&work->to, row), cpu_row(&work->from, row), work->to.row_bytes);
}

/* Items are heads; each goes through the tokens in order, so of two tokens for one slot the later stays, whole, however heads are split. */
static void cache_write(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct cache_work *work = context;
	const opd_tensor *tokens = work->tokens;
	const uint64_t row_bytes = work->to.row_bytes;
	const uint64_t token_bytes = (uint64_t)tokens->strides[0] * work->element_bytes;
	const uint64_t head_bytes = (uint64_t)tokens->strides[1] * work->element_bytes;
	const unsigned char *base = opd_tensor_data(tokens);
	/* Slots of stride 0 are all one, and the last token stays there: a client may claim any number of such tokens. */
	uint64_t stride = (uint64_t)work->slots->strides[0];
	for (uint64_t t = stride == 0 ? work->slots->elements - 1 : 0; t < work->slots->elements; t++) {
		int64_t slot = cpu_index(work->slots, t * stride);
		if (slot < 0)
			continue;
		unsigned char *to = work->to.base + (uint64_t)slot * work->heads * row_bytes;
		const unsigned char *from = base + t * token_bytes;
		if (head_bytes == row_bytes) {
			memcpy(to + begin * row_bytes, from + begin * head_bytes, (end - begin) * row_bytes);
			continue;
		}
		for (uint64_t h = begin; h < end; h++)
			memcpy(to + h * row_bytes, from + h * head_bytes, row_bytes);
	}
}

static opd_status cache_run_one(const opd_call *call, uint32_t which, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *cache = cpu_tensor(call, CACHE_KEYS + which);
	const opd_tensor *tokens = cpu_tensor(call, CACHE_KEY + which);
	struct cache_work work = {
		.slots = cpu_tensor(call, CACHE_SLOTS),
		.tokens = tokens,
		.from = cpu_rows_of(cache),
		.to = cpu_rows_of(call->outputs[which]),
		.heads = (uint64_t)cache->shape[2],
		.element_bytes = opd_dtype_bytes(cache->dtype),
	};
	uint64_t slots = (uint64_t)cache->shape[0] * (uint64_t)cache->shape[1];
	opd_status status = OPD_OK;
	if (work.from.base != work.to.base)
		status = cpu_for(exec, slots, cache_copy_ns(call) / 2, cache_copy, &work, error);
	if (status == OPD_OK && tokens->elements > 0)
		status = cpu_for(exec, work.heads, cache_write_ns(call) / 2, cache_write, &work, error);
	return status;
}

static opd_status cache_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; i < 2 && status == OPD_OK; i++) {
		const opd_tensor *cache = cpu_tensor(call, CACHE_KEYS + i);
		status = cpu_expect_output(impl, call, i, cache, opd_tensor_last(cache), error);
	}
	if (call->outputs[0]->elements == 0)
		return status;
	for (uint32_t i = 0; i < 2 && status == OPD_OK; i++)
		status = cache_run_one(call, i, exec, error);
	return status;
}

const opd_impl cpu_reshape_and_cache = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_IN_PLACE,
	.op = "reshape_and_cache",
	.schema = "reshape_and_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) "
			  "-> (Tensor, Tensor)",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_copy,
	.predicate = cache_predicate,
	.cost_ns = cache_cost,
	.run = cache_run,
};
