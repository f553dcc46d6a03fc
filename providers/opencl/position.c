/* embedding and rotary_embedding: they check the ids and positions that they follow. */
#include "providers/opencl/opencl.h"
#include "uuid/opencl_position.h"

enum { POSITIONS, QUERY, KEY, HEAD_SIZE, CACHE, NEOX };

static bool takes_indices(const char *name, const opd_tensor *indices, opd_reason *reason)
{
	if (!opd_tensor_contiguous(indices))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s is strided", name);
	return opencl_fits(name, indices, reason);
}

/* Where a kernel reports a bad index; without one, memory that it isn't told to look at. */
static void launch_fault(struct launch *launch, const opd_exec *exec, const opd_tensor *otherwise)
{
	launch_memory(launch, exec->fault == NULL ? otherwise->data : exec->fault);
	launch_int(launch, exec->fault_node);
	launch_int(launch, exec->fault != NULL);
}

/* Where the results have no elements the indices are looked at all the same: the answer to a bad one isn't another. */
static opd_status check_indices(void *state, const opd_exec *exec, const opd_tensor *indices, int64_t rows, opd_error *error)
{
	if (exec->fault == NULL || opd_tensor_empty(indices))
		return OPD_OK;
	struct launch launch = launch_begin(state, exec, OPENCL_index_check, OPD_f32, error);
	launch_tensor(&launch, indices, NULL);
	launch_int(&launch, (int64_t)indices->elements);
	launch_int(&launch, rows);
	launch_int(&launch, indices->dtype == OPD_i64);
	launch_fault(&launch, exec, indices);
	return launch_elements(&launch, indices->elements);
}

/* ---- embedding ---- */

static bool embedding_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const opd_tensor *table = opencl_tensor(call, 1);
	(void)impl, (void)state;
	if (!opd_tensor_contiguous(table))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "table is strided");
	return takes_indices("ids", opencl_tensor(call, 0), reason);
}

/* A row is copied in units as large as its bytes and where it lies allow. */
static uint64_t unit_of(const opd_tensor *table, uint64_t row_bytes)
{
	const uint64_t together = row_bytes | table->byte_offset;
	return together % 4 == 0 ? 4 : together % 2 == 0 ? 2 : 1;
}

static opd_status embedding_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *ids = opencl_tensor(call, 0);
	const opd_tensor *table = opencl_tensor(call, 1);
	const opd_tensor *y = call->outputs[0];
	opd_status status = opencl_verify(impl, call, table, 0, error);
	if (status != OPD_OK)
		return status;
	if (opd_tensor_empty(y))
		return check_indices(state, exec, ids, table->shape[0], error);
	const uint64_t row_bytes = (uint64_t)table->shape[1] * opd_dtype_bytes(table->dtype);
	const uint64_t unit = unit_of(table, row_bytes);
	const uint64_t units = row_bytes / unit;
	struct launch launch = launch_begin(state, exec, OPENCL_embedding, OPD_f32, error);
	launch_tensor(&launch, ids, NULL);
	launch_memory(&launch, table->data);
	launch_memory(&launch, y->data);
	launch_int(&launch, (int64_t)y->byte_offset);
	launch_int(&launch, (int64_t)(ids->elements * units));
	launch_int(&launch, (int64_t)units);
	launch_int(&launch, (int64_t)unit);
	launch_int(&launch, table->shape[0]);
	launch_int(&launch, ids->dtype == OPD_i64);
	launch_fault(&launch, exec, y);
	launch_int(&launch, (int64_t)table->byte_offset);
	return launch_elements(&launch, ids->elements * units);
}

/* ---- rotary_embedding ---- */

static bool rotary_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const opd_tensor *cache = opencl_tensor(call, CACHE);
	const opd_tensor *query = opencl_tensor(call, QUERY);
	(void)impl, (void)state;
	if (cache->dtype != query->dtype && cache->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "cos_sin_cache %s, only query's dtype or f32", opd_dtype_name(cache->dtype));
	return takes_indices("positions", opencl_tensor(call, POSITIONS), reason) && opencl_takes("query", query, reason) &&
	       opencl_takes("key", opencl_tensor(call, KEY), reason) && opencl_takes("cos_sin_cache", cache, reason);
}

static opd_status rotate(const opd_call *call, void *state, const opd_exec *exec, const opd_tensor *x, const opd_tensor *y, opd_error *error)
{
	const opd_tensor *positions = opencl_tensor(call, POSITIONS);
	const opd_tensor *cache = opencl_tensor(call, CACHE);
	const int64_t head_size = call->args[HEAD_SIZE].i;
	const int64_t rotated = cache->shape[1];
	if (opd_tensor_empty(x))
		return OPD_OK;
	const int64_t heads = x->shape[1] / head_size;
	const int64_t work = x->shape[0] * heads * (head_size - rotated / 2);
	struct launch launch = launch_begin(state, exec, OPENCL_rotary_embedding, x->dtype, error);
	launch_tensor(&launch, positions, NULL);
	launch_tensor(&launch, x, NULL);
	launch_tensor(&launch, opd_tensor_empty(cache) ? NULL : cache, x);
	launch_tensor(&launch, y, NULL);
	launch_int(&launch, work);
	launch_int(&launch, heads);
	launch_int(&launch, head_size);
	launch_int(&launch, rotated);
	launch_int(&launch, cache->shape[0]);
	launch_int(&launch, call->args[NEOX].b);
	launch_int(&launch, positions->dtype == OPD_i64);
	launch_int(&launch, cache->dtype == OPD_f32);
	launch_fault(&launch, exec, y);
	return launch_elements(&launch, (uint64_t)work);
}

static opd_status rotary_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *query = opencl_tensor(call, QUERY);
	opd_status status = opencl_verify(impl, call, query, 0, error);
	if (status == OPD_OK)
		status = opencl_verify(impl, call, query, 1, error);
	if (status == OPD_OK && opd_tensor_empty(query) && opd_tensor_empty(opencl_tensor(call, KEY)))
		return check_indices(state, exec, opencl_tensor(call, POSITIONS), opencl_tensor(call, CACHE)->shape[0], error);
	if (status == OPD_OK)
		status = rotate(call, state, exec, query, call->outputs[0], error);
	return status == OPD_OK ? rotate(call, state, exec, opencl_tensor(call, KEY), call->outputs[1], error) : status;
}

const opd_impl opencl_positions[] = {
	{
		.struct_bytes = sizeof(opd_impl),
		.flags = OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_CHECKS_INDICES,
		.op = "embedding",
		.schema = "embedding(Tensor ids, Tensor table) -> Tensor",
		.device = "opencl",
		.uuid = OPD_UUID_opencl_position,
		.predicate = embedding_supports,
		.run = embedding_run,
	},
	{
		.struct_bytes = sizeof(opd_impl),
		.flags = OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_CHECKS_INDICES | OPD_IMPL_IN_PLACE,
		.op = "rotary_embedding",
		.schema = "rotary_embedding(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, bool is_neox_style=True) -> "
                  "(Tensor, Tensor)",
		.device = "opencl",
		.uuid = OPD_UUID_opencl_position,
		.predicate = rotary_supports,
		.run = rotary_run,
	},
	{0},
};
