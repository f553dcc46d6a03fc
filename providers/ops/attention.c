/* attention: queries over contiguous keys. */
#include "providers/ops/attend.h"
#include "providers/ops/ops.h"
#include "uuid/native_attention.h"

static opd_status attention_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *query = kernel_tensor(call, 0);
	const opd_tensor *key = kernel_tensor(call, 1);
	const opd_tensor *value = kernel_tensor(call, 2);
	opd_status status = kernel_expect_float(op, "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "key", key, "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "value", value, "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_f32(op, "scale", kernel_float(call, 3), error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "query", query, 4, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "key", key, 4, error);
	if (status != OPD_OK)
		return status;

	int64_t shape[4] = {query->shape[0], key->shape[1], key->shape[2], query->shape[3]};
	status = kernel_expect_shape(op, "key", key, 4, shape, "batch and head size of query", error);
	if (status == OPD_OK)
		status = kernel_expect_shape_of(op, "value", value, "key", key, error);
	if (status == OPD_OK)
		status = attend_expect_heads(op, query->shape[2], "key", key->shape[2], error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[0], query->dtype, query, error);
	return status;
}

static struct attend attention_call(const opd_call *call)
{
	const opd_tensor *query = kernel_tensor(call, 0);
	const opd_tensor *key = kernel_tensor(call, 1);
	return (struct attend){
		.query = query,
		.key = key,
		.value = kernel_tensor(call, 2),
		.heads = query->shape[2],
		.kv_heads = key->shape[2],
		.head_size = query->shape[3],
		.scale = kernel_float(call, 3),
		.causal = kernel_bool(call, 4),
	};
}

static int64_t attention_parts(const opd_call *call)
{
	return (kernel_tensor(call, 0)->shape[1] - 1) / ATTEND_ROWS + 1;
}

/* Items are (batch, head, part of the queries). */
static void attention_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct attend *attend = job->context;
	const int64_t parts = attention_parts(job->call);
	const int64_t queries = attend->query->shape[1];
	const int64_t number = (int64_t)item;
	struct attend_part part = {
		.sequence = number / parts / attend->heads,
		.head = number / parts % attend->heads,
		.query = number % parts * ATTEND_ROWS,
		.queries = queries,
		.keys = attend->key->shape[1],
	};
	part.token = part.sequence * queries + part.query;
	part.count = queries - part.query < ATTEND_ROWS ? queries - part.query : ATTEND_ROWS;
	attend_part_run(job, &part, scratch);
}

static double attention_ns(const struct attend *attend)
{
	const int64_t *shape = attend->query->shape;
	return (double)shape[0] * (double)shape[2] * attend_ns(attend, (double)shape[1], (double)attend->key->shape[1]);
}

static uint64_t attention_cost(const opd_impl *impl, const opd_call *call)
{
	struct attend attend = attention_call(call);
	(void)impl;
	return kernel_ns(300 + attention_ns(&attend));
}

static opd_status attention_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || opd_tensor_empty(call->outputs[0]))
		return status;
	struct attend attend = attention_call(call);
	struct kernel_job job = {
		.impl = impl, .call = call, .exec = exec, .context = &attend, .scratch_bytes = attend_scratch_bytes(&attend)};
	uint64_t items = (uint64_t)attend.query->shape[0] * (uint64_t)attend.heads * (uint64_t)attention_parts(call);
	return kernel_for_long(&job, items, kernel_ns(attention_ns(&attend) / (double)items), attention_item, error);
}

/* Variants: 0 causal; 1 not; 2 a kv head a head; 3 one kv head, not causal; 4 one query; 5 more queries than keys, the first see
 * none. */
static opd_status attention_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	const int64_t *dims = generator->dims;
	opd_status status = kernel_generator_begin(op, generator, 6, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status == OPD_OK)
		status = attend_generate_expect_heads(op, dims[3], dims[4], error);
	if (status != OPD_OK)
		return status;
	uint32_t variant = generator->variant;
	int64_t query[4] = {dims[0], variant == 4 ? 1 : dims[1], dims[3], dims[5]};
	int64_t key[4] = {dims[0], dims[2], dims[4], dims[5]};
	if (variant == 2)
		key[2] = dims[3];
	if (variant == 3)
		key[2] = 1;
	if (variant == 5)
		key[1] = query[1] / 2;

	generator->set_float(generator, "scale", attend_generate_scale(dims[5]));
	generator->set_bool(generator, "causal", variant != 1 && variant != 3);
	status = kernel_generate(op, generator, "query", generator->dtype, 4, query, 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "key", generator->dtype, 4, key, 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "value", generator->dtype, 4, key, 1, error);
	return status;
}

static const opd_op attention;
static const opd_impl attention_native =
	KERNEL_NATIVE("attention", &attention, attention_run, attention_cost, OPD_UUID_native_attention);
static const int64_t attention_dims[] = {2, 11, 27, 4, 2, 64};

static const opd_op attention = {
	.struct_bytes = sizeof attention,
	.sum = OPD_SUM_ATTENTION,
	.schema = "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal=False) -> Tensor",
	.doc = "query [B, S, heads, D] over key and value [B, S_kv, kv_heads, D]; softmax(scale*q.k) times v",
	.activations = "query,key,value",
	.shape = attention_shape,
	.generate = attention_generate,
	.dims = "batch,queries,keys,heads,kv_heads,head_size",
	.default_dims = attention_dims,
	.dim_count = 6,
	.native = &attention_native,
};

const opd_op *const ops_attention[] = {&attention, &paged_attention, &reshape_and_cache, NULL};
