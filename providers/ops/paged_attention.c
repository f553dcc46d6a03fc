/* paged_attention: queries over keys that lie in blocks of a cache, as a block table says. */
#include <math.h>

#include "providers/ops/attend.h"
#include "providers/ops/index.h"
#include "uuid/native_paged_attention.h"

enum { PAGED_QUERY, PAGED_KEYS, PAGED_VALUES, PAGED_TABLE, PAGED_LENGTHS, PAGED_STARTS, PAGED_SCALE, PAGED_CAUSAL };

static opd_status paged_expect_dtypes(const opd_op *op, const opd_call *call, opd_error *error)
{
	const opd_tensor *query = kernel_tensor(call, PAGED_QUERY);
	opd_status status = kernel_expect_float(op, "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "key_cache", kernel_tensor(call, PAGED_KEYS), "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "value_cache", kernel_tensor(call, PAGED_VALUES), "query", query, error);
	if (status == OPD_OK)
		status = kernel_expect_index(op, "block_table", kernel_tensor(call, PAGED_TABLE), error);
	if (status == OPD_OK)
		status = kernel_expect_index(op, "seq_lens", kernel_tensor(call, PAGED_LENGTHS), error);
	if (status == OPD_OK)
		status = kernel_expect_index(op, "query_start_loc", kernel_tensor(call, PAGED_STARTS), error);
	return status;
}

static opd_status paged_expect_shapes(const opd_op *op, const opd_call *call, opd_error *error)
{
	const opd_tensor *query = kernel_tensor(call, PAGED_QUERY);
	const opd_tensor *keys = kernel_tensor(call, PAGED_KEYS);
	const opd_tensor *table = kernel_tensor(call, PAGED_TABLE);
	opd_status status = kernel_expect_rank(op, "query", query, 3, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "key_cache", keys, 4, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "block_table", table, 2, error);
	if (status != OPD_OK)
		return status;

	int64_t cache[4] = {keys->shape[0], keys->shape[1], keys->shape[2], query->shape[2]};
	int64_t sequences = table->shape[0];
	int64_t starts;
	if (__builtin_add_overflow(sequences, 1, &starts))
		return kernel_invalid(op, error, "block_table has %lld rows, expected fewer", (long long)sequences);
	status = kernel_expect_shape(op, "key_cache", keys, 4, cache, "head size of query", error);
	if (status == OPD_OK)
		status = kernel_expect_shape_of(op, "value_cache", kernel_tensor(call, PAGED_VALUES), "key_cache", keys, error);
	if (status == OPD_OK)
		status = attend_expect_heads(op, query->shape[1], "key_cache", keys->shape[2], error);
	if (status == OPD_OK)
		status =
			kernel_expect_shape(op, "seq_lens", kernel_tensor(call, PAGED_LENGTHS), 1, &sequences, "rows of block_table", error);
	if (status == OPD_OK)
		status = kernel_expect_shape(op, "query_start_loc", kernel_tensor(call, PAGED_STARTS), 1, &starts,
		                             "rows of block_table and one", error);
	return status;
}

static opd_status paged_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *query = kernel_tensor(call, PAGED_QUERY);
	opd_status status = paged_expect_dtypes(op, call, error);
	if (status == OPD_OK)
		status = kernel_expect_f32(op, "scale", kernel_float(call, PAGED_SCALE), error);
	if (status == OPD_OK)
		status = paged_expect_shapes(op, call, error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[0], query->dtype, query, error);
	return status;
}

/* Blocks that hold so many tokens. */
static int64_t blocks_of(int64_t tokens, int64_t block_size)
{
	return tokens == 0 ? 0 : (tokens - 1) / block_size + 1;
}

/* The entries that sequence `b` reads. */
static opd_status paged_check_table(struct index_reader *reader, const opd_call *call, int64_t b, int64_t length, opd_error *error)
{
	const opd_tensor *table = kernel_tensor(call, PAGED_TABLE);
	const opd_tensor *keys = kernel_tensor(call, PAGED_KEYS);
	int64_t used = blocks_of(length, keys->shape[1]);
	if (table->strides[1] == 0 && used > 1)
		used = 1; /* they all repeat the first, however many a client says there are */
	struct kernel_line row = {.dtype = table->dtype, .stride = table->strides[1], .extent = used};
	int64_t position[2] = {b, 0};
	if (used > 0)
		row.data = kernel_element(table, (uint64_t)b * (uint64_t)table->shape[1]);
	opd_status status = index_scan(reader, &row, 0, keys->shape[0], &position[1], error);
	if (status != OPD_OK || position[1] == used)
		return status;
	row.data = kernel_line_at(&row, position[1]);
	return index_invalid(reader->op, "block_table", 2, position, element_load_i64(row.dtype, row.data), 0, keys->shape[0], "blocks of key_cache", error);
}

/* Start and end of sequence `b`'s queries. */
static opd_status paged_check_starts(const opd_op *op, const opd_call *call, int64_t b, int64_t *queries_out, opd_error *error)
{
	const opd_tensor *starts = kernel_tensor(call, PAGED_STARTS);
	int64_t tokens = kernel_tensor(call, PAGED_QUERY)->shape[0];
	int64_t begin = kernel_index(starts, (uint64_t)b);
	int64_t end = kernel_index(starts, (uint64_t)b + 1);
	if (end < begin || end > tokens)
		return kernel_invalid(op, error,
		                      "query_start_loc[%lld] is %lld, expected %lld (the entry before) to %lld (tokens of query)",
		                      (long long)b + 1, (long long)end, (long long)begin, (long long)tokens);
	*queries_out = end - begin;
	return OPD_OK;
}

static opd_status paged_check_sequence(struct index_reader *reader, const opd_call *call, int64_t b, opd_error *error)
{
	const opd_op *op = reader->op;
	const opd_tensor *table = kernel_tensor(call, PAGED_TABLE);
	int64_t room = index_multiply(table->shape[1], kernel_tensor(call, PAGED_KEYS)->shape[1]);
	int64_t length = kernel_index(kernel_tensor(call, PAGED_LENGTHS), (uint64_t)b);
	int64_t queries = 0;
	opd_status status = index_ask(reader, 3, error); /* its length, the starts of its queries and of those behind them */
	if (status == OPD_OK)
		status = paged_check_starts(op, call, b, &queries, error);
	if (status != OPD_OK)
		return status;
	if (length < 0 || length > room)
		return kernel_invalid(op, error, "seq_lens[%lld] is %lld, expected 0 to %lld (slots of a row of block_table)",
		                      (long long)b, (long long)length, (long long)room);
	if (length < queries)
		return kernel_invalid(op, error, "seq_lens[%lld] is %lld, expected at least %lld (its queries)", (long long)b,
		                      (long long)length, (long long)queries);
	return paged_check_table(reader, call, b, length, error);
}

static opd_status paged_check(const opd_op *op, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct index_reader reader = {.op = op, .exec = exec};
	const opd_tensor *table = kernel_tensor(call, PAGED_TABLE);
	const opd_tensor *starts = kernel_tensor(call, PAGED_STARTS);
	const int64_t sequences = table->shape[0];
	const int64_t tokens = kernel_tensor(call, PAGED_QUERY)->shape[0];
	/* Sequences without an entry of their own are all the first. */
	const bool repeated =
		table->strides[0] == 0 && starts->strides[0] == 0 && kernel_tensor(call, PAGED_LENGTHS)->strides[0] == 0;

	int64_t first = kernel_index(starts, 0);
	if (first != 0)
		return kernel_invalid(op, error, "query_start_loc[0] is %lld, expected 0", (long long)first);
	for (int64_t b = 0; b < (repeated && sequences > 1 ? 1 : sequences); b++) {
		opd_status status = paged_check_sequence(&reader, call, b, error);
		if (status != OPD_OK)
			return status;
	}
	int64_t last = kernel_index(starts, (uint64_t)sequences);
	if (last != tokens)
		return kernel_invalid(op, error, "query_start_loc[%lld] is %lld, expected %lld (tokens of query)", (long long)sequences,
		                      (long long)last, (long long)tokens);
	return OPD_OK;
}

static struct attend paged_call(const opd_call *call)
{
	const opd_tensor *query = kernel_tensor(call, PAGED_QUERY);
	const opd_tensor *keys = kernel_tensor(call, PAGED_KEYS);
	return (struct attend){
		.query = query,
		.key = keys,
		.value = kernel_tensor(call, PAGED_VALUES),
		.block_table = kernel_tensor(call, PAGED_TABLE),
		.block_size = keys->shape[1],
		.heads = query->shape[1],
		.kv_heads = keys->shape[2],
		.head_size = query->shape[2],
		.scale = kernel_float(call, PAGED_SCALE),
		.causal = kernel_bool(call, PAGED_CAUSAL),
	};
}

/* Items are (sequence, head). */
static void paged_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct attend *attend = job->context;
	const uint64_t sequence = item / (uint64_t)attend->heads;
	const opd_tensor *starts = kernel_tensor(job->call, PAGED_STARTS);
	const int64_t begin = kernel_index(starts, sequence);
	struct attend_part part = {
		.sequence = (int64_t)sequence,
		.head = (int64_t)(item % (uint64_t)attend->heads),
		.queries = kernel_index(starts, sequence + 1) - begin,
		.keys = kernel_index(kernel_tensor(job->call, PAGED_LENGTHS), sequence),
	};
	for (; part.query < part.queries; part.query += ATTEND_ROWS) {
		part.token = begin + part.query;
		part.count = part.queries - part.query < ATTEND_ROWS ? part.queries - part.query : ATTEND_ROWS;
		attend_part_run(job, &part, scratch);
	}
}

/* As if every sequence filled its row of the table: contents are unknown here. */
static double paged_ns(const struct attend *attend)
{
	double sequences = (double)attend->block_table->shape[0];
	double keys = (double)attend->block_table->shape[1] * (double)attend->block_size;
	if (sequences == 0)
		return 0;
	return sequences * (double)attend->heads * attend_ns(attend, (double)attend->query->shape[0] / sequences, keys);
}

static uint64_t paged_cost(const opd_impl *impl, const opd_call *call)
{
	struct attend attend = paged_call(call);
	(void)impl;
	return kernel_ns(300 + paged_ns(&attend));
}

static opd_status paged_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || opd_tensor_empty(call->outputs[0]))
		return status;
	struct attend attend = paged_call(call);
	struct kernel_job job = {
		.impl = impl, .call = call, .exec = exec, .context = &attend, .scratch_bytes = attend_scratch_bytes(&attend)};
	uint64_t items = (uint64_t)attend.block_table->shape[0] * (uint64_t)attend.heads;
	return kernel_for_long(&job, items, kernel_ns(paged_ns(&attend) / (double)items), paged_item, error);
}

/* ---- paged_attention's generator ------------------------------------------------------------------------------------------ */

struct paged_form {
	bool causal;
	bool ragged; /* lengths differ, some sequences have no query; unused table entries and slots hold rubbish */
	opd_dtype index;
};

/* The sizes of a generated call. */
struct paged_sizes {
	int64_t sequences, queries, context, heads, kv_heads, head_size, block_size;
	int64_t table_blocks; /* a row of block_table */
	int64_t blocks;
};

static opd_status paged_generate_sizes(const opd_op *op, const opd_generator *generator, struct paged_sizes *sizes,
                                       opd_error *error)
{
	const int64_t *dims = generator->dims;
	*sizes = (struct paged_sizes){dims[0], dims[1], dims[2], dims[3], dims[4], dims[5], dims[6], 0, 0};
	if (sizes->block_size < 1)
		return kernel_invalid(op, error, "dim block_size is %lld, expected at least 1", (long long)sizes->block_size);
	if (sizes->context < sizes->queries)
		return kernel_invalid(op, error, "dim context is %lld, expected at least dim queries, %lld", (long long)sizes->context,
		                      (long long)sizes->queries);
	if (index_multiply(sizes->sequences, sizes->context) > INT32_MAX / 4)
		return kernel_invalid(op, error, "dims sequences and context are %lld and %lld, expected a product of at most %d",
		                      (long long)sizes->sequences, (long long)sizes->context, INT32_MAX / 4);
	sizes->table_blocks = blocks_of(sizes->context, sizes->block_size);
	sizes->blocks = sizes->sequences * sizes->table_blocks;
	return attend_generate_expect_heads(op, sizes->heads, sizes->kv_heads, error);
}

/* query_start_loc and seq_lens; the number of queries in all. */
static opd_status paged_generate_lengths(const opd_op *op, opd_generator *generator, const struct paged_form *form,
                                         const struct paged_sizes *sizes, const void **lengths_out, int64_t *tokens_out,
                                         opd_error *error)
{
	int64_t starts_shape = sizes->sequences + 1;
	int64_t tokens = 0;
	void *starts;
	void *lengths;
	opd_status status = kernel_generate_raw(op, generator, "query_start_loc", form->index, 1, &starts_shape, &starts, error);
	if (status == OPD_OK)
		status = kernel_generate_raw(op, generator, "seq_lens", form->index, 1, &sizes->sequences, &lengths, error);
	if (status != OPD_OK)
		return status;
	for (int64_t b = 0; b < sizes->sequences; b++) {
		int64_t queries = form->ragged ? generator->pick(generator, 0, sizes->queries) : sizes->queries;
		int64_t length = form->ragged ? generator->pick(generator, queries, sizes->context) : sizes->context;
		tokens += queries;
		index_set(starts, form->index, b + 1, tokens);
		index_set(lengths, form->index, b, length);
	}
	*lengths_out = lengths;
	*tokens_out = tokens;
	return OPD_OK;
}

/* Puts NaN into every slot of `block` from `slot` on: what lies past a sequence's end must never show. */
static void paged_poison(const struct paged_sizes *sizes, opd_dtype dtype, unsigned char *cache, int64_t block, int64_t slot)
{
	int64_t slot_elements = sizes->kv_heads * sizes->head_size;
	int64_t first = (block * sizes->block_size + slot) * slot_elements;
	int64_t end = (block + 1) * sizes->block_size * slot_elements;
	for (int64_t i = first; i < end; i++)
		element_store_f64(dtype, cache + (size_t)i * opd_dtype_bytes(dtype), (double)NAN);
}

/* block_table: scattered blocks; a ragged form's unused entries are −1 or past the cache, and its unused slots NaN. */
static opd_status paged_generate_table(const opd_op *op, opd_generator *generator, const struct paged_form *form,
                                       const struct paged_sizes *sizes, const void *lengths, void *const *caches,
                                       opd_error *error)
{
	int64_t shape[2] = {sizes->sequences, sizes->table_blocks};
	void *table;
	opd_status status = kernel_generate_raw(op, generator, "block_table", form->index, 2, shape, &table, error);
	if (status != OPD_OK)
		return status;
	struct index_scatter scatter = index_scatter_begin(generator, sizes->blocks);
	for (int64_t i = 0; i < sizes->blocks; i++) {
		int64_t length = index_get(lengths, form->index, i / sizes->table_blocks);
		int64_t kept = length - i % sizes->table_blocks * sizes->block_size; /* tokens in this block and later ones */
		int64_t block = index_scatter_next(&scatter);
		if (form->ragged && kept < sizes->block_size)
			for (int c = 0; c < 2; c++)
				paged_poison(sizes, generator->dtype, caches[c], block, kept < 0 ? 0 : kept);
		if (form->ragged && kept <= 0)
			block = i % 2 == 0 ? -1 : sizes->blocks;
		index_set(table, form->index, i, block);
	}
	return OPD_OK;
}

static opd_status paged_generate_form(const opd_op *op, opd_generator *generator, const struct paged_form *form,
                                      const struct paged_sizes *sizes, opd_error *error)
{
	static const char *const names[2] = {"key_cache", "value_cache"};
	int64_t cache[4] = {sizes->blocks, sizes->block_size, sizes->kv_heads, sizes->head_size};
	int64_t query[3] = {0, sizes->heads, sizes->head_size};
	uint64_t cache_elements = (uint64_t)(sizes->blocks * sizes->block_size) * (uint64_t)(sizes->kv_heads * sizes->head_size);
	const void *lengths;
	void *caches[2];
	opd_status status = paged_generate_lengths(op, generator, form, sizes, &lengths, &query[0], error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "query", generator->dtype, 3, query, 1, error);
	for (int c = 0; c < 2 && status == OPD_OK; c++) {
		status = kernel_generate_raw(op, generator, names[c], generator->dtype, 4, cache, &caches[c], error);
		if (status == OPD_OK)
			generator->fill(generator, caches[c], generator->dtype, cache_elements, 1);
	}
	if (status == OPD_OK)
		status = paged_generate_table(op, generator, form, sizes, lengths, caches, error);
	return status;
}

/* Variants: 0 every sequence has its dims' lengths; 1 the same, i64 and not causal; 2 ragged; 3 ragged, i64, not causal. */
static opd_status paged_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	static const struct paged_form forms[] = {
		{true, false, OPD_i32}, {false, false, OPD_i64}, {true, true, OPD_i32}, {false, true, OPD_i64}};
	struct paged_sizes sizes;
	opd_status status = kernel_generator_begin(op, generator, sizeof forms / sizeof forms[0], error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status == OPD_OK)
		status = paged_generate_sizes(op, generator, &sizes, error);
	if (status != OPD_OK)
		return status;
	generator->set_float(generator, "scale", attend_generate_scale(sizes.head_size));
	generator->set_bool(generator, "causal", forms[generator->variant].causal);
	return paged_generate_form(op, generator, &forms[generator->variant], &sizes, error);
}

static const opd_impl paged_native =
	KERNEL_NATIVE("paged_attention", &paged_attention, paged_run, paged_cost, OPD_UUID_native_paged_attention);
static const int64_t paged_dims[] = {4, 10, 43, 4, 2, 64, 8};

const opd_op paged_attention = {
	.struct_bytes = sizeof paged_attention,
	.sum = OPD_SUM_ATTENTION,
	.schema = "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
              "Tensor query_start_loc, float scale, bool causal=True) -> Tensor",
	.doc = "query [T, heads, D], packed by query_start_loc [B+1], over caches [blocks, block_size, kv_heads, D] by block_table",
	.activations = "query,block_table,seq_lens,query_start_loc",
	.shape = paged_shape,
	.check = index_check_op,
	.check_long = paged_check,
	.indices = "block_table,seq_lens,query_start_loc",
	.generate = paged_generate,
	.dims = "sequences,queries,context,heads,kv_heads,head_size,block_size",
	.default_dims = paged_dims,
	.dim_count = 7,
	.native = &paged_native,
};
