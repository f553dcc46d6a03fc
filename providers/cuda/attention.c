/* attention, paged_attention: calls to kernels/attend_*.cu. What a table, lengths and starts hold is checked by the kernels. */
#include <limits.h>

#include "providers/cuda/call.h"
#include "uuid/cuda_attention.h"

enum { PAGED_QUERY, PAGED_KEYS, PAGED_VALUES, PAGED_TABLE, PAGED_LENGTHS, PAGED_STARTS, PAGED_SCALE, PAGED_CAUSAL };

/* Kernels count keys in an int, and some stretches further. */
enum { HEAD_SIZE_MAX = 512, GRID_MAX = 65535, KEYS_MAX = INT_MAX / 2 };

static bool accept_last(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	int64_t stride = tensor->strides[tensor->rank - 1];
	if (opd_tensor_contiguous(tensor) || opd_tensor_last(tensor) <= 1 || stride == 1)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has stride %lld in its last dimension, only 1", name, (long long)stride);
}

static bool accept_sizes(const opd_tensor *query, int64_t tokens, int64_t keys, opd_reason *reason)
{
	const int64_t heads = query->shape[query->rank - 2], size = opd_tensor_last(query);
	if (size > HEAD_SIZE_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "head size %lld, at most %d", (long long)size, HEAD_SIZE_MAX);
	if (heads > GRID_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "%lld heads, at most %d", (long long)heads, GRID_MAX);
	if (tokens > INT_MAX || keys > KEYS_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "%lld query rows, at most %d, and %lld keys, at most %d", (long long)tokens, INT_MAX, (long long)keys, KEYS_MAX);
	return true;
}

/* Strides of extents of 1 don't matter and may be anything: those of a contiguous tensor. */
static int64_t stride_of(const opd_tensor *tensor, uint32_t dim)
{
	int64_t stride = 1;
	if (tensor->shape[dim] != 1)
		return tensor->strides[dim];
	for (uint32_t i = dim + 1; i < tensor->rank; i++)
		stride *= tensor->shape[i];
	return stride;
}

/* Keys and values: dimensions of tokens, heads; of sequences or blocks. */
static void read_keys(struct cuda_attention_call *made, int which, const opd_tensor *tensor)
{
	made->key_sequence_stride[which] = stride_of(tensor, 0);
	made->key_stride[which] = stride_of(tensor, 1);
	made->key_head_stride[which] = stride_of(tensor, 2);
}

static void read_common(struct cuda_attention_call *made, const opd_tensor *query, const opd_tensor *key, const opd_tensor *value)
{
	(void)cuda_dtype_of(query->dtype, &made->dtype);
	made->heads = (int)query->shape[query->rank - 2];
	made->kv_heads = (int)key->shape[2];
	made->head_size = (int)opd_tensor_last(query);
	made->query_stride = stride_of(query, query->rank - 3);
	made->query_head_stride = stride_of(query, query->rank - 2);
	read_keys(made, 0, key);
	read_keys(made, 1, value);
}

static opd_status finish(const opd_impl *impl, const opd_call *call, const opd_exec *exec, struct cuda_attention_call *made, opd_error *error)
{
	const opd_tensor *query = cuda_tensor(call, 0);
	opd_status status = cuda_expect(impl, call, 0, query->dtype, query->rank, query->shape, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK)
		return status;
	/* A cache without blocks has nothing to read, and strides that mean nothing: any query's table entry is out of range. */
	if (call->outputs[0]->elements == 0 || (made->paged && opd_tensor_empty(cuda_tensor(call, PAGED_KEYS))))
		return cudart_status(impl->op, cuda_attention_check_launch(made, exec->stream), error);
	made->query = cuda_data(query);
	made->key = cuda_data(cuda_tensor(call, 1));
	made->value = cuda_data(cuda_tensor(call, 2));
	made->y = opd_tensor_data(call->outputs[0]);
	made->scratch = exec->scratch;
	return cudart_status(impl->op, cuda_attention_launch(made, exec->stream), error);
}

/* ---- attention */

static struct cuda_attention_call attention_read(const opd_call *call)
{
	const opd_tensor *query = cuda_tensor(call, 0), *key = cuda_tensor(call, 1);
	struct cuda_attention_call made = {
		.causal = call->args[4].b,
		.scale = (float)call->args[3].f,
		.sequences = query->shape[0],
		.tokens = query->shape[0] * query->shape[1],
		.queries = query->shape[1],
		.keys = key->shape[1],
	};
	read_common(&made, query, key, cuda_tensor(call, 2));
	return made;
}

/* Query rows of all sequences at one distance. */
static bool accept_query(const opd_tensor *query, opd_reason *reason)
{
	if (query->shape[0] == 1 || query->shape[1] == 1 || opd_tensor_empty(query) || query->strides[0] == query->strides[1] * query->shape[1])
		return true;
	return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "query has rows that aren't at one distance");
}

static bool attention_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *query = cuda_tensor(call, 0), *key = cuda_tensor(call, 1), *value = cuda_tensor(call, 2);
	return cuda_accept_dtype("query", query, reason) && accept_last("query", query, reason) && accept_last("key", key, reason) &&
	       accept_last("value", value, reason) && accept_query(query, reason) &&
	       accept_sizes(query, opd_tensor_empty(query) ? 0 : query->shape[0] * query->shape[1], key->shape[1], reason);
}

static opd_status attention_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	(void)impl, (void)state, (void)reason, (void)error;
	struct cuda_attention_call made = attention_read(call);
	plan_out->scratch_bytes = call->outputs[0]->elements == 0 ? 0 : cuda_attention_scratch(&made);
	return OPD_OK;
}

static opd_status attention_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	struct cuda_attention_call made = attention_read(call);
	if (cuda_tensor(call, 0)->shape[1] == 1) /* its rows are the sequences */
		made.query_stride = stride_of(cuda_tensor(call, 0), 0);
	return finish(impl, call, exec, &made, error);
}

/* ---- paged_attention */

/* Slots of successive blocks at one distance. */
static bool accept_cache(const char *name, const opd_tensor *cache, opd_reason *reason)
{
	if (!accept_last(name, cache, reason))
		return false;
	if (opd_tensor_contiguous(cache) || cache->shape[0] == 1 || stride_of(cache, 0) == stride_of(cache, 1) * cache->shape[1])
		return true;
	return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has slots that aren't at one distance", name);
}

static int64_t room_of(const opd_tensor *table, const opd_tensor *cache)
{
	int64_t room;
	return __builtin_mul_overflow(table->shape[1], cache->shape[1], &room) ? INT64_MAX : room;
}

static int64_t slots_of(const opd_tensor *cache)
{
	int64_t slots;
	return __builtin_mul_overflow(cache->shape[0], cache->shape[1], &slots) ? INT64_MAX : slots;
}

static bool paged_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *query = cuda_tensor(call, PAGED_QUERY), *keys = cuda_tensor(call, PAGED_KEYS), *table = cuda_tensor(call, PAGED_TABLE);
	if (!cuda_accept_dtype("query", query, reason) || !accept_last("query", query, reason) || !accept_cache("key_cache", keys, reason) ||
	    !accept_cache("value_cache", cuda_tensor(call, PAGED_VALUES), reason) || !accept_last("block_table", table, reason))
		return false;
	if (slots_of(keys) > INT_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "key_cache has %lld slots, at most %d", (long long)slots_of(keys), INT_MAX);
	return accept_sizes(query, query->shape[0], room_of(table, keys), reason);
}

static struct cuda_attention_call paged_read(const opd_call *call)
{
	const opd_tensor *query = cuda_tensor(call, PAGED_QUERY), *keys = cuda_tensor(call, PAGED_KEYS), *table = cuda_tensor(call, PAGED_TABLE);
	struct cuda_attention_call made = {
		.causal = call->args[PAGED_CAUSAL].b,
		.paged = true,
		.scale = (float)call->args[PAGED_SCALE].f,
		.sequences = table->shape[0],
		.tokens = query->shape[0],
		.keys = room_of(table, keys),
		.table_stride = stride_of(table, 0),
		.table_blocks = table->shape[1],
		.blocks = keys->shape[0],
		.block_size = (int)keys->shape[1],
	};
	read_common(&made, query, keys, cuda_tensor(call, PAGED_VALUES));
	return made;
}

static opd_status paged_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	(void)impl, (void)state, (void)reason, (void)error;
	struct cuda_attention_call made = paged_read(call);
	plan_out->scratch_bytes = call->outputs[0]->elements == 0 ? 0 : cuda_attention_scratch(&made);
	return OPD_OK;
}

static opd_status paged_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	struct cuda_attention_call made = paged_read(call);
	made.table = (struct cuda_index){cuda_data(cuda_tensor(call, PAGED_TABLE)), 1, cuda_tensor(call, PAGED_TABLE)->dtype == OPD_i64};
	made.lengths = cuda_index_of(cuda_tensor(call, PAGED_LENGTHS));
	made.starts = cuda_index_of(cuda_tensor(call, PAGED_STARTS));
	made.fault = cuda_fault_of(exec);
	return finish(impl, call, exec, &made, error);
}

static const opd_impl attention = {
	CUDA_IMPL("attention", "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal=False) -> Tensor", OPD_UUID_cuda_attention,
              attention_predicate, attention_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.plan = attention_plan,
};
static const opd_impl paged_attention = {
	CUDA_IMPL("paged_attention",
              "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, float "
              "scale, bool causal=True) -> Tensor",
              OPD_UUID_cuda_attention, paged_predicate, paged_run),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_CHECKS_INDICES,
	.plan = paged_plan,
};
const opd_impl *const cuda_impls_attention[] = {&attention, &paged_attention, NULL};
