/* Ops that follow positions: embedding (rows of a table by id) and rotary_embedding (queries and keys turned by their place). */
#include <math.h>

#include "providers/ops/index.h"
#include "providers/ops/ops.h"
#include "uuid/native_position.h"

/* ---- embedding --------------------------------------------------------------------------------------------------------- */

static opd_status embedding_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *ids = kernel_tensor(call, 0);
	const opd_tensor *table = kernel_tensor(call, 1);
	opd_status status = kernel_expect_index(op, "ids", ids, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "table", table, 2, error);
	if (status != OPD_OK)
		return status;
	int64_t shape[OPD_RANK_MAX + 1];
	for (uint32_t i = 0; i < ids->rank; i++)
		shape[i] = ids->shape[i];
	shape[ids->rank] = table->shape[1];
	return kernel_output_set(op, outputs[0], table->dtype, ids->rank + 1, shape, error);
}

static opd_status embedding_check(const opd_op *op, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	return index_check(op, exec, "ids", kernel_tensor(call, 0), 0, kernel_tensor(call, 1)->shape[0], "rows of table", error);
}

static void embedding_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const opd_tensor *output = job->call->outputs[0];
	const uint64_t id = (uint64_t)kernel_index(kernel_tensor(job->call, 0), item);
	const struct kernel_line from = kernel_row(kernel_tensor(job->call, 1), id);
	const size_t bytes = opd_dtype_bytes(from.dtype);
	unsigned char *to = (unsigned char *)opd_tensor_data(output) + item * (uint64_t)from.extent * bytes;
	(void)scratch;
	for (int64_t i = 0; i < from.extent; i++)
		memcpy(to + (size_t)i * bytes, kernel_line_at(&from, i), bytes);
}

static uint64_t embedding_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return estimate_add(300, estimate_add(estimate_multiply(call->outputs[0]->elements, 2), estimate_multiply(kernel_tensor(call, 0)->elements, 20)));
}

static opd_status embedding_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct kernel_job job = {.impl = impl, .call = call, .exec = exec};
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || opd_tensor_empty(call->outputs[0]))
		return status;
	uint64_t row_ns = 20 + 2 * (uint64_t)opd_tensor_last(call->outputs[0]);
	return kernel_for(&job, kernel_tensor(call, 0)->elements, row_ns, embedding_item, error);
}

/* Variants: 0 i64 ids; 1 i32 ids; 2 ids of rank 2; 3 one id, rank 0. dtype of the generator: the table's, any. */
static opd_status embedding_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	opd_status status = kernel_generator_begin(op, generator, 4, error);
	if (status != OPD_OK)
		return status;
	int64_t tokens = generator->dims[0];
	int64_t table[2] = {generator->dims[1], generator->dims[2]};
	int64_t ids[2] = {generator->variant == 2 ? 2 : tokens, tokens};
	uint32_t rank = generator->variant == 3 ? 0 : generator->variant == 2 ? 2 : 1;
	int64_t count = rank == 0 ? 1 : rank == 1 ? tokens : 2 * tokens;
	opd_dtype dtype = generator->variant == 1 ? OPD_i32 : OPD_i64;
	if (table[0] < 1 || table[0] > INT32_MAX)
		return kernel_invalid(op, error, "dim vocabulary is %lld, expected 1 to %d", (long long)table[0], INT32_MAX);
	void *memory;
	status = kernel_generate_raw(op, generator, "ids", dtype, rank, ids, &memory, error);
	if (status != OPD_OK)
		return status;
	index_generate(generator, memory, dtype, count, table[0]);
	return kernel_generate(op, generator, "table", generator->dtype, 2, table, 1, error);
}

static const opd_op embedding;
static const opd_impl embedding_native =
	KERNEL_NATIVE("embedding", &embedding, embedding_run, embedding_cost, OPD_UUID_native_position);
static const int64_t embedding_dims[] = {8, 1000, 96};

static const opd_op embedding = {
	.struct_bytes = sizeof embedding,
	.schema = "embedding(Tensor ids, Tensor table) -> Tensor",
	.doc = "rows of table [V, H] by id",
	.activations = "ids",
	.shape = embedding_shape,
	.check = index_check_op,
	.check_long = embedding_check,
	.indices = "ids",
	.generate = embedding_generate,
	.dims = "tokens,vocabulary,hidden",
	.default_dims = embedding_dims,
	.dim_count = 3,
	.native = &embedding_native,
};

/* ---- rotary_embedding -------------------------------------------------------------------------------------------------- */

enum { ROTARY_POSITIONS, ROTARY_QUERY, ROTARY_KEY, ROTARY_HEAD_SIZE, ROTARY_CACHE, ROTARY_NEOX };

/* query or key: [T, a multiple of head_size]. */
static opd_status rotary_expect_heads(const opd_op *op, const char *name, const opd_tensor *heads, int64_t tokens,
                                      int64_t head_size, opd_error *error)
{
	opd_status status = kernel_expect_rank(op, name, heads, 2, error);
	if (status != OPD_OK)
		return status;
	if (heads->shape[0] == tokens && heads->shape[1] % head_size == 0)
		return OPD_OK;
	return kernel_invalid(op, error, "%s has shape %s, expected [%lld (length of positions), a multiple of %lld (head_size)]",
	                      name, kernel_shape_text(heads).text, (long long)tokens, (long long)head_size);
}

static opd_status rotary_expect_cache(const opd_op *op, const opd_tensor *cache, int64_t head_size, opd_error *error)
{
	opd_status status = kernel_expect_rank(op, "cos_sin_cache", cache, 2, error);
	if (status != OPD_OK)
		return status;
	if (cache->shape[1] % 2 == 0 && cache->shape[1] <= head_size)
		return OPD_OK;
	return kernel_invalid(op, error, "cos_sin_cache has shape %s, expected an even last dimension of at most %lld (head_size)",
	                      kernel_shape_text(cache).text, (long long)head_size);
}

static opd_status rotary_expect_dtypes(const opd_op *op, const opd_call *call, opd_error *error)
{
	const opd_tensor *query = kernel_tensor(call, ROTARY_QUERY);
	opd_status status = kernel_expect_index(op, "positions", kernel_tensor(call, ROTARY_POSITIONS), error);
	if (status == OPD_OK)
		status = kernel_expect_float(op, "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "key", kernel_tensor(call, ROTARY_KEY), "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of_or_f32(op, "cos_sin_cache", kernel_tensor(call, ROTARY_CACHE), "query", query, error);
	return status;
}

static opd_status rotary_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *positions = kernel_tensor(call, ROTARY_POSITIONS);
	const opd_tensor *query = kernel_tensor(call, ROTARY_QUERY);
	const opd_tensor *key = kernel_tensor(call, ROTARY_KEY);
	int64_t head_size = kernel_int(call, ROTARY_HEAD_SIZE, 0);
	opd_status status = rotary_expect_dtypes(op, call, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "positions", positions, 1, error);
	if (status != OPD_OK)
		return status;
	if (head_size < 1)
		return kernel_invalid(op, error, "head_size is %lld, expected at least 1", (long long)head_size);
	status = rotary_expect_heads(op, "query", query, positions->shape[0], head_size, error);
	if (status == OPD_OK)
		status = rotary_expect_heads(op, "key", key, positions->shape[0], head_size, error);
	if (status == OPD_OK)
		status = rotary_expect_cache(op, kernel_tensor(call, ROTARY_CACHE), head_size, error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[0], query->dtype, query, error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[1], key->dtype, key, error);
	return status;
}

static opd_status rotary_check(const opd_op *op, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	return index_check(op, exec, "positions", kernel_tensor(call, ROTARY_POSITIONS), 0, kernel_tensor(call, ROTARY_CACHE)->shape[0],
	                   "rows of cos_sin_cache", error);
}

/* A token's heads, where they come from and where they go. In place the two are the same memory. */
struct rotary_token {
	struct kernel_line from;
	struct kernel_line to;
	struct kernel_line cache; /* its row of cos_sin_cache */
	int64_t head_size;
	bool neox;
};

/* Both elements of a pair are read before either is written: so it works in place. */
static void rotary_turn(const struct rotary_token *token, int64_t first, int64_t second, double cosine, double sine)
{
	double a = element_load_f64(token->from.dtype, kernel_line_at(&token->from, first));
	double b = element_load_f64(token->from.dtype, kernel_line_at(&token->from, second));
	double turned_a = a * cosine - b * sine;
	double turned_b = b * cosine + a * sine;
	kernel_store(&token->to, first, 1, &turned_a);
	kernel_store(&token->to, second, 1, &turned_b);
}

static void rotary_pass(const struct rotary_token *token, int64_t element)
{
	/* memmove: in place the element is copied onto itself. */
	memmove(kernel_line_at(&token->to, element), kernel_line_at(&token->from, element), opd_dtype_bytes(token->to.dtype));
}

static void rotary_heads(const struct rotary_token *token)
{
	int64_t half = token->cache.extent / 2;
	for (int64_t i = 0; i < half; i++) {
		double cosine = element_load_f64(token->cache.dtype, kernel_line_at(&token->cache, i));
		double sine = element_load_f64(token->cache.dtype, kernel_line_at(&token->cache, half + i));
		int64_t first = token->neox ? i : 2 * i;
		int64_t second = token->neox ? i + half : 2 * i + 1;
		for (int64_t head = 0; head < token->from.extent; head += token->head_size)
			rotary_turn(token, head + first, head + second, cosine, sine);
	}
	for (int64_t head = 0; head < token->from.extent; head += token->head_size)
		for (int64_t i = 2 * half; i < token->head_size; i++)
			rotary_pass(token, head + i);
}

static void rotary_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const opd_call *call = job->call;
	uint64_t position = (uint64_t)kernel_index(kernel_tensor(call, ROTARY_POSITIONS), item);
	(void)scratch;
	for (uint32_t i = 0; i < 2; i++) {
		const opd_tensor *heads = kernel_tensor(call, i == 0 ? ROTARY_QUERY : ROTARY_KEY);
		if (opd_tensor_empty(heads))
			continue;
		struct rotary_token token = {
			.from = kernel_row(heads, item),
			.to = kernel_row(call->outputs[i], item),
			.cache = kernel_row(kernel_tensor(call, ROTARY_CACHE), position),
			.head_size = kernel_int(call, ROTARY_HEAD_SIZE, 0),
			.neox = kernel_bool(call, ROTARY_NEOX),
		};
		rotary_heads(&token);
	}
}

static uint64_t rotary_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return estimate_add(300, estimate_multiply(estimate_add(call->outputs[0]->elements, call->outputs[1]->elements), 12));
}

static opd_status rotary_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct kernel_job job = {.impl = impl, .call = call, .exec = exec};
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || (opd_tensor_empty(call->outputs[0]) && opd_tensor_empty(call->outputs[1])))
		return status;
	uint64_t tokens = kernel_tensor(call, ROTARY_POSITIONS)->elements;
	return kernel_for(&job, tokens, rotary_cost(impl, call) / tokens, rotary_item, error);
}

/* A typical cache: the angle of pair i at position p is p / 10000^(2i / rot). Other kinds of values are the generator's. */
static void rotary_generate_cache(opd_generator *generator, void *memory, opd_dtype dtype, int64_t positions, int64_t rot)
{
	if (generator->values != OPD_VALUES_RANDOM) {
		generator->fill(generator, memory, dtype, (uint64_t)(positions * rot), 1);
		return;
	}
	unsigned char *at = memory;
	for (int64_t p = 0; p < positions; p++) {
		for (int64_t i = 0; i < rot; i++, at += opd_dtype_bytes(dtype)) {
			int64_t pair = i < rot / 2 ? i : i - rot / 2;
			double angle = (double)p * pow(10000, -2 * (double)pair / (double)rot);
			element_store_f64(dtype, at, i < rot / 2 ? cos(angle) : sin(angle));
		}
	}
}

struct rotary_form {
	bool neox;
	bool partial; /* half of a head turns */
	bool cache_f32;
	opd_dtype positions;
};

static opd_status rotary_generate_form(const opd_op *op, opd_generator *generator, const struct rotary_form *form,
                                       opd_error *error)
{
	const int64_t *dims = generator->dims;
	int64_t tokens = dims[0], head_size = dims[3], max_position = dims[4];
	int64_t rot = form->partial ? head_size / 4 * 2 : head_size / 2 * 2;
	int64_t query[2] = {tokens, dims[1] * head_size};
	int64_t key[2] = {tokens, dims[2] * head_size};
	int64_t cache[2] = {max_position, rot};
	opd_dtype cache_dtype = form->cache_f32 ? OPD_f32 : generator->dtype;
	void *positions;
	void *cache_memory;

	generator->set_int(generator, "head_size", head_size);
	generator->set_bool(generator, "is_neox_style", form->neox);
	opd_status status = kernel_generate_raw(op, generator, "positions", form->positions, 1, &tokens, &positions, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "query", generator->dtype, 2, query, 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "key", generator->dtype, 2, key, 1, error);
	if (status == OPD_OK)
		status = kernel_generate_raw(op, generator, "cos_sin_cache", cache_dtype, 2, cache, &cache_memory, error);
	if (status != OPD_OK)
		return status;
	index_generate(generator, positions, form->positions, tokens, max_position);
	rotary_generate_cache(generator, cache_memory, cache_dtype, max_position, rot);
	return OPD_OK;
}

static opd_status rotary_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	static const struct rotary_form forms[] = {
		{true, false, false, OPD_i64}, {false, false, false, OPD_i32}, {true, true, false, OPD_i32},
		{false, true, true, OPD_i64},  {true, false, true, OPD_i32},
	};
	opd_status status = kernel_generator_begin(op, generator, sizeof forms / sizeof forms[0], error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	const int64_t *dims = generator->dims;
	for (uint32_t i = 1; i < op->dim_count; i++)
		if (dims[i] > INT32_MAX / 2 || (i > 2 && dims[i] < 1))
			return kernel_invalid(op, error, "dim %u is %lld, expected %d to %d (%s)", i, (long long)dims[i], i > 2,
			                      INT32_MAX / 2, op->dims);
	return rotary_generate_form(op, generator, &forms[generator->variant], error);
}

static const opd_op rotary_embedding;
static const opd_impl rotary_native = {
	.struct_bytes = sizeof rotary_native,
	.flags = OPD_IMPL_IN_PLACE | OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "rotary_embedding",
	.device = "cpu",
	.uuid = OPD_UUID_native_position,
	.cost_ns = rotary_cost,
	.run = rotary_run,
	.user = &rotary_embedding,
};
static const opd_in_place rotary_in_place[] = {{ROTARY_QUERY, 0}, {ROTARY_KEY, 1}};
static const int64_t rotary_dims[] = {8, 6, 2, 64, 512};

static const opd_op rotary_embedding = {
	.struct_bytes = sizeof rotary_embedding,
	.schema = "rotary_embedding(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, "
              "bool is_neox_style=True) -> (Tensor, Tensor)",
	.doc = "query [T, heads*head_size] and key turned by their positions; cos_sin_cache [max_pos, rot]: cos, then sin",
	.activations = "positions,query,key",
	.shape = rotary_shape,
	.check = index_check_op,
	.check_long = rotary_check,
	.indices = "positions",
	.generate = rotary_generate,
	.dims = "tokens,heads,kv_heads,head_size,max_position",
	.default_dims = rotary_dims,
	.dim_count = 5,
	.in_place_count = 2,
	.in_place = rotary_in_place,
	.native = &rotary_native,
};

const opd_op *const ops_position[] = {&embedding, &rotary_embedding, NULL};
