/* paged_attention: queries over keys that lie in blocks of a cache. */
#include "providers/cpu/attend.h"
#include "uuid/cpu_attend.h"

enum { PAGED_QUERY, PAGED_KEYS, PAGED_VALUES, PAGED_TABLE, PAGED_LENGTHS, PAGED_STARTS, PAGED_SCALE, PAGED_CAUSAL };

static bool paged_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return attend_accept(cpu_tensor(call, PAGED_QUERY), cpu_tensor(call, PAGED_KEYS), "key_cache", cpu_tensor(call, PAGED_VALUES),
	                     "value_cache", reason);
}

/* As if every sequence filled its row of the table: contents are unknown here. */
static uint64_t paged_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *query = cpu_tensor(call, PAGED_QUERY);
	const opd_tensor *cache = cpu_tensor(call, PAGED_KEYS);
	const opd_tensor *table = cpu_tensor(call, PAGED_TABLE);
	double keys = (double)table->shape[1] * (double)cache->shape[1];
	double elements = 2 * (double)table->shape[0] * keys * (double)cache->shape[2] * (double)cache->shape[3];
	return attend_cost_ns(cpu_kernels_of(impl), query->dtype, (double)query->shape[0] * (double)query->shape[1], keys,
	                      (double)query->shape[2], elements);
}

/* The op's check has seen starts and lengths. */
static void paged_sequence(const struct attend *attend, uint64_t index, struct attend_sequence *sequence)
{
	const opd_tensor *starts = cpu_tensor(attend->call, PAGED_STARTS);
	const opd_tensor *lengths = cpu_tensor(attend->call, PAGED_LENGTHS);
	uint64_t stride = (uint64_t)starts->strides[0];
	uint64_t begin = (uint64_t)cpu_index(starts, index * stride);
	uint64_t row_bytes = attend->heads * attend->head_size * attend->element_bytes;
	*sequence = (struct attend_sequence){
		.query = (const unsigned char *)opd_tensor_data(cpu_tensor(attend->call, PAGED_QUERY)) + begin * attend->query_token,
		.y = (unsigned char *)opd_tensor_data(attend->call->outputs[0]) + begin * row_bytes,
		.key = opd_tensor_data(cpu_tensor(attend->call, PAGED_KEYS)),
		.value = opd_tensor_data(cpu_tensor(attend->call, PAGED_VALUES)),
		.index = index,
		.queries = (uint64_t)cpu_index(starts, (index + 1) * stride) - begin,
		.keys = (uint64_t)cpu_index(lengths, index * (uint64_t)lengths->strides[0]),
	};
}

static opd_status paged_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *query = cpu_tensor(call, PAGED_QUERY);
	const opd_tensor *keys = cpu_tensor(call, PAGED_KEYS);
	const opd_tensor *values = cpu_tensor(call, PAGED_VALUES);
	opd_status status = cpu_expect_output(impl, call, 0, query, opd_tensor_last(query), error);
	if (status != OPD_OK || query->elements == 0)
		return status;
	uint64_t bytes = opd_dtype_bytes(query->dtype);
	struct attend attend = {
		.kernels = cpu_kernels_of(impl),
		.dtype = cpu_dtype_index(query->dtype),
		.element_bytes = bytes,
		.heads = (uint64_t)query->shape[1],
		.kv_heads = (uint64_t)keys->shape[2],
		.head_size = (uint64_t)query->shape[2],
		.scale = (float)call->args[PAGED_SCALE].f,
		.causal = call->args[PAGED_CAUSAL].b,
		.sequences = (uint64_t)cpu_tensor(call, PAGED_TABLE)->shape[0],
		.query_token = (uint64_t)query->strides[0] * bytes,
		.query_head = (uint64_t)query->strides[1] * bytes,
		.key_block = (uint64_t)keys->strides[0] * bytes,
		.key_token = (uint64_t)keys->strides[1] * bytes,
		.key_head = (uint64_t)keys->strides[2] * bytes,
		.value_block = (uint64_t)values->strides[0] * bytes,
		.value_token = (uint64_t)values->strides[1] * bytes,
		.value_head = (uint64_t)values->strides[2] * bytes,
		.block_size = (uint64_t)keys->shape[1],
		.block_table = cpu_tensor(call, PAGED_TABLE),
		.sequence = paged_sequence,
		.call = call,
	};
	return attend_run(&attend, exec, error);
}

const opd_impl cpu_paged_attention = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "paged_attention",
	.schema = "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
			  "Tensor query_start_loc, float scale, bool causal=True) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_attend,
	.predicate = paged_predicate,
	.cost_ns = paged_cost,
	.run = paged_run,
};
