/* rotary_embedding and argmax: what is taken, what it costs, rows to kernels. */
#include <string.h>

#include "providers/cpu/columns.h"
#include "uuid/cpu_position.h"

/* ---- rotary_embedding --------------------------------------------------------------------------------------------------- */

enum { ROTARY_POSITIONS, ROTARY_QUERY, ROTARY_KEY, ROTARY_HEAD_SIZE, ROTARY_CACHE, ROTARY_NEOX };

static bool rotary_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *query = cpu_tensor(call, ROTARY_QUERY);
	return cpu_accept_float_of("query", query, reason) && cpu_accept_rows("query", query, reason) &&
	       cpu_accept_rows("key", cpu_tensor(call, ROTARY_KEY), reason) &&
	       cpu_accept_rows("cos_sin_cache", cpu_tensor(call, ROTARY_CACHE), reason);
}

static uint64_t rotary_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *query = cpu_tensor(call, ROTARY_QUERY);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.rotary, query->dtype, query->elements + cpu_tensor(call, ROTARY_KEY)->elements);
}

struct rotary_work {
	cpu_rotary_fn kernel;
	const opd_tensor *positions;
	struct cpu_rows from[2], to[2], cos_sin; /* of query and key */
	struct cpu_rotary shape[2];
};

static void rotary_tokens(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct rotary_work *work = context;
	for (uint64_t t = begin; t < end; t++) {
		uint64_t position = (uint64_t)cpu_index(work->positions, t * (uint64_t)work->positions->strides[0]);
		const void *cos_sin = work->shape[0].half == 0 ? NULL : cpu_row(&work->cos_sin, position);
		for (int i = 0; i < 2; i++)
			if (work->shape[i].elements > 0)
				work->kernel(cpu_row(&work->from[i], t), cos_sin, cpu_row(&work->to[i], t), &work->shape[i]);
	}
}

static cpu_rotary_fn rotary_kernel(const struct cpu_kernels *kernels, opd_dtype dtype, opd_dtype cache, bool neox)
{
	return dtype == OPD_f64 ? kernels->f64->rotary[cache != dtype][neox] : kernels->position->rotary[cpu_dtype_index(dtype)][cache != dtype][neox];
}

static opd_status rotary_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *heads[2] = {cpu_tensor(call, ROTARY_QUERY), cpu_tensor(call, ROTARY_KEY)};
	const opd_tensor *cache = cpu_tensor(call, ROTARY_CACHE);
	struct rotary_work work = {.positions = cpu_tensor(call, ROTARY_POSITIONS)};
	work.kernel = rotary_kernel(cpu_kernels_of(impl), heads[0]->dtype, cache->dtype, call->args[ROTARY_NEOX].b);
	for (uint32_t i = 0; i < 2; i++) {
		opd_status status = cpu_expect_output(impl, call, i, heads[i], opd_tensor_last(heads[i]), error);
		if (status != OPD_OK)
			return status;
		work.shape[i] = (struct cpu_rotary){
			.elements = heads[i]->elements == 0 ? 0 : (size_t)opd_tensor_last(heads[i]),
			.head_size = (size_t)call->args[ROTARY_HEAD_SIZE].i,
			.half = (size_t)opd_tensor_last(cache) / 2,
		};
		if (heads[i]->elements == 0)
			continue;
		work.from[i] = cpu_rows_of(heads[i]);
		work.to[i] = cpu_rows_of(call->outputs[i]);
	}
	if (heads[0]->elements + heads[1]->elements == 0)
		return OPD_OK;
	if (cache->elements > 0)
		work.cos_sin = cpu_rows_of(cache);
	return cpu_for(exec, work.positions->elements, rotary_cost(impl, call), rotary_tokens, &work, error);
}

const opd_impl cpu_rotary_embedding = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_IN_PLACE,
	.op = "rotary_embedding",
	.schema = "rotary_embedding(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, "
			  "bool is_neox_style=True) -> (Tensor, Tensor)",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_position,
	.predicate = rotary_predicate,
	.cost_ns = rotary_cost,
	.run = rotary_run,
};

/* ---- argmax ------------------------------------------------------------------------------------------------------------- */

static bool argmax_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	if (opd_tensor_last(x) > INT32_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "last dimension %lld, at most %d", (long long)opd_tensor_last(x), INT32_MAX);
	return cpu_accept_rows("x", x, reason);
}

/* The kernel that scans f32, bf16, f16 rows. */
static bool argmax_has_kernel(const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_dtype_index(x->dtype) != CPU_DTYPES && cpu_dim_is_last(x, call->args[1].i);
}

static uint64_t argmax_cost(const opd_impl *impl, const opd_call *call)
{
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	const opd_tensor *x = cpu_tensor(call, 0);
	return argmax_has_kernel(call) ? cpu_cost_ns(&costs->argmax, x->dtype, x->elements) : cpu_any_cost_ns(&costs->topk, x->dtype, x->elements);
}

struct argmax_work {
	cpu_argmax_fn kernel; /* NULL: by keys */
	const struct cpu_topk_kernels *keys;
	opd_dtype dtype;
	struct cpu_rows x;
	struct columns columns; /* along another dimension than the last */
	int64_t *y;
	size_t count;
	struct cpu_cancel *cancel;
};

/* Of a line's elements, or of a tile's rows, between two looks at whether the call was cancelled. */
#define ASK_EVERY ((size_t)1 << 16)

/* Keys of up to COLUMNS_TILE elements, in topk's order: 64 bits hold those of any dtype. */
static void argmax_keys(const struct argmax_work *work, const unsigned char *x, size_t count, uint64_t *keys)
{
	uint32_t narrow[COLUMNS_TILE];
	if (work->keys->wide_keys[work->dtype] != NULL) {
		work->keys->wide_keys[work->dtype](x, count, keys);
		return;
	}
	(void)work->keys->keys[work->dtype](x, count, 0, narrow);
	for (size_t i = 0; i < count; i++)
		keys[i] = narrow[i];
}

static int64_t argmax_of_keys(const struct argmax_work *work, const unsigned char *x)
{
	uint64_t keys[COLUMNS_TILE], best = 0;
	size_t at = 0;
	for (size_t from = 0; from < work->count; from += COLUMNS_TILE) {
		if (from % ASK_EVERY == 0 && cpu_cancelled(work->cancel))
			break;
		size_t here = work->count - from < COLUMNS_TILE ? work->count - from : COLUMNS_TILE;
		argmax_keys(work, x + from * opd_dtype_bytes(work->dtype), here, keys);
		for (size_t i = 0; i < here; i++)
			if (keys[i] > best)
				best = keys[i], at = from + i;
	}
	return (int64_t)at;
}

static void argmax_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct argmax_work *work = context;
	for (uint64_t r = begin; r < end; r++) {
		const void *x = cpu_row(&work->x, r);
		work->y[r] = work->kernel != NULL ? (int64_t)work->kernel(x, work->count) : argmax_of_keys(work, x);
	}
}

static void argmax_tiles(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct argmax_work *work = context;
	for (uint64_t t = begin; t < end; t++) {
		struct columns_tile tile = columns_tile_at(&work->columns, t);
		uint64_t keys[COLUMNS_TILE], best[COLUMNS_TILE] = {0};
		int64_t at[COLUMNS_TILE] = {0};
		for (uint64_t e = 0; e < work->columns.extent; e++) {
			if (e % ASK_EVERY == 0 && cpu_cancelled(work->cancel))
				break;
			argmax_keys(work, tile.data + e * work->columns.step * work->columns.bytes, tile.count, keys);
			for (size_t i = 0; i < tile.count; i++) {
				at[i] = keys[i] > best[i] ? (int64_t)e : at[i];
				best[i] = keys[i] > best[i] ? keys[i] : best[i];
			}
		}
		memcpy(work->y + tile.line, at, tile.count * sizeof at[0]);
	}
}

/* OPD_INTERNAL unless the result is what argmax along `dim` writes. */
static opd_status argmax_expect_output(const opd_impl *impl, const opd_call *call, uint32_t dim, opd_error *error)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	bool keep = call->args[2].b;
	int64_t shape[OPD_RANK_MAX];
	uint32_t rank = 0;
	for (uint32_t i = 0; i < x->rank; i++)
		if (i != dim || keep)
			shape[rank++] = i == dim ? 1 : x->shape[i];
	return cpu_expect_shape(impl, call, 0, OPD_i64, rank, shape, error);
}

static opd_status argmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	const uint32_t dim = cpu_dim(x, call->args[1].i);
	opd_status status = argmax_expect_output(impl, call, dim, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct cpu_cancel cancel = {.exec = exec};
	struct argmax_work work = {
		.cancel = &cancel,
		.keys = cpu_kernels_of(impl)->topk,
		.dtype = x->dtype,
		.y = opd_tensor_data(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x),
	};
	if (!cpu_dim_is_last(x, call->args[1].i)) {
		work.columns = columns_of(x, dim);
		if (work.columns.step == 0) /* the first of equals, however many a client says there are */
			work.columns.extent = 1;
		return cpu_for_long(&cancel, work.columns.tiles, argmax_cost(impl, call), argmax_tiles, &work, error);
	}
	work.x = cpu_rows_of(x);
	if (argmax_has_kernel(call))
		work.kernel = cpu_kernels_of(impl)->position->argmax[cpu_dtype_index(x->dtype)];
	return cpu_for_long(&cancel, x->elements / work.count, argmax_cost(impl, call), argmax_rows, &work, error);
}

const opd_impl cpu_argmax = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "argmax",
	.schema = "argmax(Tensor x, int dim=-1, bool keepdim=False) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_position,
	.predicate = argmax_predicate,
	.cost_ns = argmax_cost,
	.run = argmax_run,
};
