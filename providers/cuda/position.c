/* embedding, rotary_embedding, reshape_and_cache: calls to kernels/position.cu. Indices are checked by the kernels. */
#include "providers/cuda/call.h"
#include "uuid/cuda_position.h"

#define FLAGS (OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_CHECKS_INDICES)

/* ---- embedding */

static bool embedding_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return cuda_accept_index("ids", cuda_tensor(call, 0), reason) && cuda_accept_rows("table", cuda_tensor(call, 1), NULL, reason);
}

static opd_status embedding_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *ids = cuda_tensor(call, 0), *table = cuda_tensor(call, 1);
	int64_t shape[OPD_RANK_MAX] = {0};
	for (uint32_t i = 0; i < ids->rank && i + 1 < OPD_RANK_MAX; i++)
		shape[i] = ids->shape[i];
	shape[ids->rank < OPD_RANK_MAX ? ids->rank : 0] = opd_tensor_last(table);
	opd_status status = cuda_expect(impl, call, 0, table->dtype, ids->rank + 1, shape, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || ids->elements == 0)
		return status;
	const int64_t element = (int64_t)opd_dtype_bytes(table->dtype);
	struct cuda_embedding_call made = {
		.ids = cuda_index_of(ids),
		.tokens = (int64_t)ids->elements,
		.vocabulary = table->shape[0],
		.row_bytes = opd_tensor_last(table) * element,
		.table_stride_bytes = cuda_rows_of(table).row_stride * element,
		.table = cuda_data(table),
		.y = opd_tensor_data(call->outputs[0]),
		.fault = cuda_fault_of(exec),
	};
	return cudart_status(impl->op, cuda_embedding_launch(&made, exec->stream), error);
}

/* ---- rotary_embedding */

enum { ROT_MAX = 2048 };
enum { ROTARY_POSITIONS, ROTARY_QUERY, ROTARY_KEY, ROTARY_HEAD_SIZE, ROTARY_CACHE, ROTARY_NEOX };

/* A block has a thread for each pair of a head. */
static bool accept_rot(const opd_tensor *cache, opd_reason *reason)
{
	if (opd_tensor_last(cache) <= ROT_MAX)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_SHAPE, "rows of cos_sin_cache have %lld elements, at most %d", (long long)opd_tensor_last(cache), ROT_MAX);
}

static bool rotary_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *query = cuda_tensor(call, ROTARY_QUERY), *key = cuda_tensor(call, ROTARY_KEY);
	return cuda_accept_dtype("query", query, reason) && cuda_accept_index("positions", cuda_tensor(call, ROTARY_POSITIONS), reason) &&
	       cuda_accept_rows("query", query, NULL, reason) && cuda_accept_rows("key", key, NULL, reason) &&
	       cuda_accept_rows("cos_sin_cache", cuda_tensor(call, ROTARY_CACHE), NULL, reason) &&
	       cuda_accept_extent("a token's query", opd_tensor_last(query) + opd_tensor_last(key), reason) && accept_rot(cuda_tensor(call, ROTARY_CACHE), reason);
}

static opd_status rotary_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *positions = cuda_tensor(call, ROTARY_POSITIONS), *cache = cuda_tensor(call, ROTARY_CACHE);
	struct cuda_rotary_call made = {
		.cache_f32 = cache->dtype == OPD_f32,
		.neox = call->args[ROTARY_NEOX].b,
		.positions = cuda_index_of(positions),
		.tokens = (int64_t)positions->elements,
		.positions_max = cache->shape[0],
		.head_size = (int)call->args[ROTARY_HEAD_SIZE].i,
		.rot = (int)opd_tensor_last(cache),
		.cache = cuda_data(cache),
		.cache_stride = cuda_rows_of(cache).row_stride,
	};
	opd_status status = cudart_begin(impl, exec, error);
	for (uint32_t i = 0; i < 2 && status == OPD_OK; i++) {
		const opd_tensor *heads = cuda_tensor(call, ROTARY_QUERY + i);
		status = cuda_expect(impl, call, i, heads->dtype, heads->rank, heads->shape, error);
		made.heads[i] = opd_tensor_empty(heads) ? 0 : (int)(opd_tensor_last(heads) / made.head_size);
		made.strides[i] = cuda_rows_of(heads).row_stride;
		made.from[i] = cuda_data(heads);
		made.to[i] = opd_tensor_data(call->outputs[i]);
		(void)cuda_dtype_of(heads->dtype, &made.dtype);
	}
	made.fault = cuda_fault_of(exec);
	if (status != OPD_OK || made.tokens == 0)
		return status;
	return cudart_status(impl->op, cuda_rotary_launch(&made, exec->stream), error);
}

/* ---- reshape_and_cache */

enum { CACHE_KEY, CACHE_VALUE, CACHE_KEYS, CACHE_VALUES, CACHE_SLOTS };

/* Heads and head size side by side; only tokens may be apart. */
static bool accept_tokens(const char *name, const opd_tensor *tokens, opd_reason *reason)
{
	if (opd_tensor_contiguous(tokens) || opd_tensor_empty(tokens))
		return true;
	bool dense = (tokens->shape[2] == 1 || tokens->strides[2] == 1) && (tokens->shape[1] == 1 || tokens->strides[1] == tokens->shape[2]);
	return dense || OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has heads that aren't side by side", name);
}

static bool accept_cache(const char *name, const opd_tensor *cache, opd_reason *reason)
{
	return opd_tensor_contiguous(cache) || OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s is strided", name);
}

static bool cache_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return accept_tokens("key", cuda_tensor(call, CACHE_KEY), reason) && accept_tokens("value", cuda_tensor(call, CACHE_VALUE), reason) &&
	       accept_cache("key_cache", cuda_tensor(call, CACHE_KEYS), reason) && accept_cache("value_cache", cuda_tensor(call, CACHE_VALUES), reason) &&
	       cuda_accept_index("slot_mapping", cuda_tensor(call, CACHE_SLOTS), reason);
}

static int64_t slots_of(const opd_tensor *cache)
{
	int64_t slots;
	return __builtin_mul_overflow(cache->shape[0], cache->shape[1], &slots) ? INT64_MAX : slots;
}

/* Sizes and strides: what is known before the operands' addresses are. */
static struct cuda_cache_call cache_read(const opd_call *call)
{
	const opd_tensor *key = cuda_tensor(call, CACHE_KEY), *keys = cuda_tensor(call, CACHE_KEYS);
	const int64_t element = (int64_t)opd_dtype_bytes(keys->dtype);
	return (struct cuda_cache_call){
		.slots.stride = cuda_index_of(cuda_tensor(call, CACHE_SLOTS)).stride,
		.tokens = key->shape[0],
		.slot_count = slots_of(keys),
		.row_bytes = key->shape[1] * key->shape[2] * element,
		.cache_bytes = keys->elements * (uint64_t)element,
	};
}

static opd_status cache_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	(void)impl, (void)state, (void)reason, (void)error;
	const struct cuda_cache_call made = cache_read(call);
	plan_out->scratch_bytes = cuda_cache_scratch(&made);
	return OPD_OK;
}

static opd_status cache_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const int64_t element = (int64_t)opd_dtype_bytes(cuda_tensor(call, CACHE_KEYS)->dtype);
	struct cuda_cache_call made = cache_read(call);
	made.slots = cuda_index_of(cuda_tensor(call, CACHE_SLOTS));
	made.fault = cuda_fault_of(exec);
	made.last = cuda_cache_scratch(&made) == 0 ? NULL : exec->scratch;
	opd_status status = cudart_begin(impl, exec, error);
	for (uint32_t i = 0; i < 2 && status == OPD_OK; i++) {
		const opd_tensor *tokens = cuda_tensor(call, CACHE_KEY + i), *cache = cuda_tensor(call, CACHE_KEYS + i);
		status = cuda_expect(impl, call, i, cache->dtype, cache->rank, cache->shape, error);
		made.token_stride_bytes[i] = tokens->strides[0] * element;
		made.tokens_from[i] = cuda_data(tokens);
		made.cache_from[i] = cuda_data(cache);
		made.cache_to[i] = opd_tensor_data(call->outputs[i]);
	}
	if (status != OPD_OK)
		return status;
	return cudart_status(impl->op, cuda_cache_launch(&made, exec->stream), error);
}

static const opd_impl embedding = {
	CUDA_IMPL("embedding", "embedding(Tensor ids, Tensor table) -> Tensor", OPD_UUID_cuda_position, embedding_predicate, embedding_run),
	.flags = FLAGS,
};
static const opd_impl rotary_embedding = {
	CUDA_IMPL("rotary_embedding",
              "rotary_embedding(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, bool is_neox_style=True) -> (Tensor, Tensor)",
              OPD_UUID_cuda_position, rotary_predicate, rotary_run),
	.flags = FLAGS | OPD_IMPL_IN_PLACE,
};
static const opd_impl reshape_and_cache = {
	CUDA_IMPL("reshape_and_cache",
              "reshape_and_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) -> (Tensor, Tensor)",
              OPD_UUID_cuda_position, cache_predicate, cache_run),
	.flags = FLAGS | OPD_IMPL_IN_PLACE,
	.plan = cache_plan,
};
const opd_impl *const cuda_impls_position[] = {&embedding, &rotary_embedding, &reshape_and_cache, NULL};
