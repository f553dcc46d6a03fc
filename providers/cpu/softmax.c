/* softmax: what is taken, what it costs, rows to kernels. */
#include "providers/cpu/call.h"
#include "uuid/cpu_softmax.h"

static bool softmax_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	int64_t dim = call->args[1].i;
	if (dim != -1 && dim + 1 != (int64_t)(x->rank == 0 ? 1 : x->rank))
		return OPD_REFUSE(reason, OPD_REASON_ATTRIBUTE, "dim %lld of rank %u, only the last", (long long)dim, x->rank);
	return cpu_accept_dtype(x, reason) && cpu_accept_rows("x", x, reason);
}

static uint64_t softmax_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.softmax, x->dtype, x->elements);
}

struct softmax_work {
	cpu_softmax_fn kernel;
	struct cpu_rows x, y;
	size_t count;
};

static void softmax_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct softmax_work *work = context;
	for (uint64_t r = begin; r < end; r++)
		work->kernel(cpu_row(&work->x, r), cpu_row(&work->y, r), work->count);
}

static opd_status softmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x), error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct softmax_work work = {
		.kernel = cpu_kernels_of(impl)->softmax->softmax[cpu_dtype_index(x->dtype)],
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x),
	};
	return cpu_for(exec, x->elements / work.count, softmax_cost(impl, call), softmax_rows, &work, error);
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
