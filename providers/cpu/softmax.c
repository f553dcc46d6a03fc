/* softmax: what is taken, what it costs, rows to kernels. */
#include "providers/cpu/columns.h"
#include "uuid/cpu_softmax.h"

static bool softmax_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_accept_float(x, reason) && cpu_accept_rows("x", x, reason);
}

static uint64_t softmax_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	return cpu_cost_ns(cpu_dim_is_last(x, call->args[1].i) ? &costs->softmax : &costs->softmax_columns, x->dtype, x->elements);
}

/* Longer rows aren't kept by a core's own caches. */
#define KEPT_MAX (256u << 10)

struct softmax_work {
	cpu_softmax_fn kernel;
	struct cpu_rows x, y;
	size_t count;
	float *kept; /* a thread's [kept_count], one after another; NULL: results go through the caches */
	size_t kept_count;
};

static void softmax_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct softmax_work *work = context;
	float *kept = work->kept == NULL ? NULL : work->kept + thread * work->kept_count;
	for (uint64_t r = begin; r < end; r++)
		work->kernel(cpu_row(&work->x, r), cpu_row(&work->x, r + 1 < end ? r + 1 : r), cpu_row(&work->y, r), work->count, kept);
	cpu_streamed(kept != NULL);
}

/* Along another dimension: items are tiles of neighbouring lines. */
struct softmax_columns_work {
	void (*kernel)(const struct cpu_columns *tile);
	struct columns x, y;
};

static void softmax_tiles(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct softmax_columns_work *work = context;
	for (uint64_t i = begin; i < end; i++) {
		struct columns_tile from = columns_tile_at(&work->x, i), to = columns_tile_at(&work->y, i);
		struct cpu_columns tile = {
			.x = from.data,
			.y = to.data,
			.x_step = (size_t)(work->x.step * work->x.bytes),
			.y_step = (size_t)(work->y.step * work->y.bytes),
			.extent = (size_t)work->x.extent,
			.columns = from.count,
		};
		work->kernel(&tile);
	}
}

/* Results past the caches from 64 MiB on. Elsewhere powers are kept in the results' place, or on the stack, or are computed twice. */
static bool softmax_streams(const struct softmax_work *work, const opd_tensor *x)
{
	return x->dtype != OPD_f64 && work->count <= KEPT_MAX && work->x.base != work->y.base && cpu_streams(&work->y, x->elements * opd_dtype_bytes(x->dtype) / 2);
}

static opd_status softmax_along_rows(struct softmax_work *work, const opd_tensor *x, const opd_exec *exec, uint64_t cost_ns, opd_error *error)
{
	const uint64_t rows = x->elements / work->count;
	if (softmax_streams(work, x)) {
		const uint64_t threads = cpu_threads(exec, rows, cost_ns);
		work->kept_count = (work->count + 15) / 16 * 16;
		work->kept = exec->host->alloc(exec->host, threads * work->kept_count * sizeof(float));
		if (work->kept == NULL)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "softmax: no %llu bytes of host memory for a row of each of %llu threads",
			                (unsigned long long)(threads * work->kept_count * sizeof(float)), (unsigned long long)threads);
	}
	opd_status status = cpu_for(exec, rows, cost_ns, softmax_rows, work, error);
	exec->host->free(exec->host, work->kept);
	return status;
}

static opd_status softmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	const struct cpu_kernels *kernels = cpu_kernels_of(impl);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x), error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	if (!cpu_dim_is_last(x, call->args[1].i)) {
		uint32_t dim = cpu_dim(x, call->args[1].i);
		struct softmax_columns_work columns = {
			.kernel = x->dtype == OPD_f64 ? kernels->f64->softmax_columns : kernels->columns->softmax[cpu_dtype_index(x->dtype)],
			.x = columns_of(x, dim),
			.y = columns_of(call->outputs[0], dim),
		};
		return cpu_for(exec, columns.x.tiles, softmax_cost(impl, call), softmax_tiles, &columns, error);
	}
	struct softmax_work work = {
		.kernel = x->dtype == OPD_f64 ? kernels->f64->softmax : kernels->softmax->softmax[cpu_dtype_index(x->dtype)],
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x),
	};
	return softmax_along_rows(&work, x, exec, softmax_cost(impl, call), error);
}

const opd_impl cpu_softmax = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "softmax",
	.schema = "softmax(Tensor x, int dim=-1) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_softmax,
	.predicate = softmax_predicate,
	.cost_ns = softmax_cost,
	.run = softmax_run,
};
