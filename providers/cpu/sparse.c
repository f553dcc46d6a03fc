/* gelu_and_mul_sparse, from the kernels of three families: the gate row's cutoff, gelu of what exceeds it, and the product with the other half. Each rounds to x's
 * dtype, as the definition does; what lies between them is a chunk on the stack. */
#include <string.h>

#include "providers/cpu/walk.h"
#include "uuid/cpu_moments.h"

static bool sparse_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, false);
	return cpu_accept_dtype(x, reason) && cpu_accept_rows("x", x, reason);
}

static uint64_t sparse_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, false);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.sparse, x->dtype, call->outputs[0]->elements);
}

struct sparse_work {
	cpu_cutoff_fn cutoff;
	cpu_gate_fn gate;
	cpu_activation_fn gelu;
	cpu_arithmetic_fn multiply;
	struct cpu_rows x, y;
	size_t count; /* of y's row */
	size_t bytes; /* of an element */
	float multiplier;
};

static void sparse_row(const struct sparse_work *work, const unsigned char *x, unsigned char *y)
{
	unsigned char gated[WALK_CHUNK * sizeof(float)] __attribute__((aligned(64)));
	unsigned char active[WALK_CHUNK * sizeof(float)] __attribute__((aligned(64)));
	const unsigned char *up = x + work->count * work->bytes;
	float cutoff = work->cutoff(x, work->count, work->multiplier);
	for (size_t i = 0; i < work->count; i += WALK_CHUNK) {
		size_t here = work->count - i < WALK_CHUNK ? work->count - i : WALK_CHUNK;
		work->gate(x + i * work->bytes, gated, here, cutoff);
		work->gelu(gated, NULL, active, here, CPU_NEAR);
		work->multiply(active, 1, up + i * work->bytes, 1, y + i * work->bytes, here, CPU_NEAR);
	}
}

static void sparse_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct sparse_work *work = context;
	for (uint64_t r = begin; r < end; r++)
		sparse_row(work, cpu_row(&work->x, r), cpu_row(&work->y, r));
}

static opd_status sparse_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, false);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x) / 2, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	const struct cpu_kernels *kernels = cpu_kernels_of(impl);
	const unsigned dtype = cpu_dtype_index(x->dtype);
	struct sparse_work work = {
		.cutoff = kernels->moments->cutoff[dtype],
		.gate = kernels->moments->gate[dtype],
		.gelu = kernels->activation->alone[strcmp(call->args[2].str, "tanh") == 0 ? CPU_GELU_TANH : CPU_GELU][dtype],
		.multiply = kernels->arithmetic->run[CPU_MUL][x->dtype],
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x) / 2,
		.bytes = opd_dtype_bytes(x->dtype),
		.multiplier = (float)call->args[1].f,
	};
	return cpu_for(exec, call->outputs[0]->elements / work.count, sparse_cost(impl, call), sparse_rows, &work, error);
}

const opd_impl cpu_gelu_and_mul_sparse = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "gelu_and_mul_sparse",
	.schema = "gelu_and_mul_sparse(Tensor x, float std_multiplier, str approximate=\"none\") -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_moments,
	.predicate = sparse_predicate,
	.cost_ns = sparse_cost,
	.run = sparse_run,
};
