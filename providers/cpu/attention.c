/* attention: queries over contiguous keys. */
#include "providers/cpu/attend.h"
#include "uuid/cpu_attend.h"

static bool attention_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return attend_accept(cpu_tensor(call, 0), cpu_tensor(call, 1), "key", cpu_tensor(call, 2), "value", reason);
}

static uint64_t attention_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *query = cpu_tensor(call, 0);
	const opd_tensor *key = cpu_tensor(call, 1);
	double rows = (double)query->shape[0] * (double)query->shape[1] * (double)query->shape[2];
	return attend_cost_ns(cpu_kernels_of(impl), query->dtype, rows, (double)key->shape[1], (double)query->shape[3],
	                      2 * (double)key->elements);
}

static void attention_sequence(const struct attend *attend, uint64_t index, struct attend_sequence *sequence)
{
	const opd_tensor *query = cpu_tensor(attend->call, 0);
	const opd_tensor *key = cpu_tensor(attend->call, 1);
	const opd_tensor *value = cpu_tensor(attend->call, 2);
	uint64_t bytes = attend->element_bytes;
	*sequence = (struct attend_sequence){
		.query = (const unsigned char *)opd_tensor_data(query) + index * (uint64_t)query->strides[0] * bytes,
		.y = (unsigned char *)opd_tensor_data(attend->call->outputs[0]) + index * (query->elements / (uint64_t)query->shape[0]) * bytes,
		.index = index,
		.queries = (uint64_t)query->shape[1],
		.keys = (uint64_t)key->shape[1],
	};
	if (sequence->keys > 0) {
		sequence->key = (const unsigned char *)opd_tensor_data(key) + index * (uint64_t)key->strides[0] * bytes;
		sequence->value = (const unsigned char *)opd_tensor_data(value) + index * (uint64_t)value->strides[0] * bytes;
	}
}

static opd_status attention_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *query = cpu_tensor(call, 0);
	const opd_tensor *key = cpu_tensor(call, 1);
	const opd_tensor *value = cpu_tensor(call, 2);
	opd_status status = cpu_expect_output(impl, call, 0, query, opd_tensor_last(query), error);
	if (status != OPD_OK || query->elements == 0)
		return status;
	uint64_t bytes = opd_dtype_bytes(query->dtype);
	struct attend attend = {
		.kernels = cpu_kernels_of(impl),
		.dtype = cpu_dtype_index(query->dtype),
		.element_bytes = bytes,
		.heads = (uint64_t)query->shape[2],
		.kv_heads = (uint64_t)key->shape[2],
		.head_size = (uint64_t)query->shape[3],
		.scale = (float)call->args[3].f,
		.causal = call->args[4].b,
		.sequences = (uint64_t)query->shape[0],
		.query_token = (uint64_t)query->strides[1] * bytes,
		.query_head = (uint64_t)query->strides[2] * bytes,
		.key_token = (uint64_t)key->strides[1] * bytes,
		.key_head = (uint64_t)key->strides[2] * bytes,
		.value_token = (uint64_t)value->strides[1] * bytes,
		.value_head = (uint64_t)value->strides[2] * bytes,
		.sequence = attention_sequence,
		.call = call,
	};
	return attend_run(&attend, exec, error);
}

const opd_impl cpu_attention = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "attention",
	.schema = "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal=False) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_attend,
	.predicate = attention_predicate,
	.cost_ns = attention_cost,
	.run = attention_run,
};
