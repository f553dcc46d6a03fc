/* silu_and_mul: what is taken, what it costs, rows to kernels. */
#include "providers/cpu/call.h"
#include "uuid/cpu_activation.h"

static bool silu_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_accept_dtype(x, reason) && cpu_accept_rows("x", x, reason);
}

static uint64_t silu_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.silu_and_mul, x->dtype, x->elements / 2);
}

struct silu_work {
	cpu_silu_and_mul_fn kernel;
	struct cpu_rows x, y;
	size_t count; /* of y's row */
};

static void silu_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct silu_work *work = context;
	for (uint64_t r = begin; r < end; r++) {
		const unsigned char *gate = cpu_row(&work->x, r);
		work->kernel(gate, gate + work->y.row_bytes, cpu_row(&work->y, r), work->count);
	}
}

static opd_status silu_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x) / 2, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct silu_work work = {
		.kernel = cpu_kernels_of(impl)->activation->silu_and_mul[cpu_dtype_index(x->dtype)],
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x) / 2,
	};
	return cpu_for(exec, call->outputs[0]->elements / work.count, silu_cost(impl, call), silu_rows, &work, error);
}

const opd_impl cpu_silu_and_mul = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "silu_and_mul",
	.schema = "silu_and_mul(Tensor x) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_activation,
	.predicate = silu_predicate,
	.cost_ns = silu_cost,
	.run = silu_run,
};
