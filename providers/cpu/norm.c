/* rms_norm and fused_add_rms_norm: what is taken, what it costs, rows to kernels. */
#include "providers/cpu/call.h"
#include "uuid/cpu_norm.h"

/* How many of a row's first elements its mean square is taken over: the argument, or all. */
static size_t norm_squares(const opd_call *call, uint32_t variance_size)
{
	const opd_arg *arg = &call->args[variance_size];
	return (size_t)(arg->kind == OPD_ARG_NONE ? opd_tensor_last(cpu_tensor(call, 0)) : arg->i);
}

static bool rms_norm_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_accept_float(x, reason) && cpu_accept_rows("x", x, reason) &&
	       cpu_accept_rows("weight", cpu_tensor(call, 1), reason);
}

static bool fused_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_accept_float(x, reason) && cpu_accept_rows("x", x, reason) &&
	       cpu_accept_rows("x_residual", cpu_tensor(call, 1), reason) && cpu_accept_rows("weight", cpu_tensor(call, 2), reason);
}

static uint64_t rms_norm_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.rms_norm, x->dtype, x->elements);
}

static uint64_t fused_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.fused_add_rms_norm, x->dtype, x->elements);
}

/* One call of either op; `residual` and `sum` are the fused one's. */
struct norm_work {
	cpu_norm_fn kernel;
	struct cpu_rows x, residual, y, sum;
	struct cpu_norm norm; /* all but rows */
};

static void rms_norm_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct norm_work *work = context;
	struct cpu_norm norm = work->norm;
	for (uint64_t r = begin; r < end; r++) {
		norm.x = cpu_row(&work->x, r);
		norm.x_next = cpu_row(&work->x, r + 1 < end ? r + 1 : r);
		norm.y = cpu_row(&work->y, r);
		work->kernel(&norm);
	}
	cpu_streamed(norm.streams);
}

static void fused_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct norm_work *work = context;
	struct cpu_norm norm = work->norm;
	for (uint64_t r = begin; r < end; r++) {
		uint64_t next = r + 1 < end ? r + 1 : r;
		norm.x = cpu_row(&work->x, r);
		norm.x_next = cpu_row(&work->x, next);
		norm.residual = cpu_row(&work->residual, r);
		norm.residual_next = cpu_row(&work->residual, next);
		norm.y = cpu_row(&work->y, r);
		norm.sum = cpu_row(&work->sum, r);
		work->kernel(&norm);
	}
	cpu_streamed(norm.streams);
}

static cpu_norm_fn rms_norm_kernel(const struct cpu_kernels *kernels, const opd_tensor *x, const opd_tensor *weight)
{
	const unsigned of = cpu_weight_index(x, weight);
	return x->dtype == OPD_f64 ? kernels->f64->rms_norm[of] : kernels->norm->rms_norm[cpu_dtype_index(x->dtype)][of];
}

static cpu_norm_fn fused_kernel(const struct cpu_kernels *kernels, const opd_tensor *x, const opd_tensor *weight)
{
	const unsigned of = cpu_weight_index(x, weight);
	return x->dtype == OPD_f64 ? kernels->f64->fused_add_rms_norm[of] : kernels->norm->fused_add_rms_norm[cpu_dtype_index(x->dtype)][of];
}

static opd_status rms_norm_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	const opd_tensor *weight = cpu_tensor(call, 1);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x), error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct norm_work work = {
		.kernel = rms_norm_kernel(cpu_kernels_of(impl), x, weight),
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.norm =
			{
				.weight = weight == NULL ? NULL : opd_tensor_data(weight),
				.count = (size_t)opd_tensor_last(x),
				.squares = norm_squares(call, 3),
				.epsilon = call->args[2].f,
			},
	};
	work.norm.streams = cpu_streams(&work.y, 2 * x->elements * opd_dtype_bytes(x->dtype));
	return cpu_for(exec, x->elements / work.norm.count, rms_norm_cost(impl, call), rms_norm_rows, &work, error);
}

static opd_status fused_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	const opd_tensor *weight = cpu_tensor(call, 2);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x), error);
	if (status == OPD_OK)
		status = cpu_expect_output(impl, call, 1, x, opd_tensor_last(x), error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct norm_work work = {
		.kernel = fused_kernel(cpu_kernels_of(impl), x, weight),
		.x = cpu_rows_of(x),
		.residual = cpu_rows_of(cpu_tensor(call, 1)),
		.y = cpu_rows_of(call->outputs[0]),
		.sum = cpu_rows_of(call->outputs[1]),
		.norm =
			{
				.weight = weight == NULL ? NULL : opd_tensor_data(weight),
				.count = (size_t)opd_tensor_last(x),
				.squares = norm_squares(call, 4),
				.epsilon = call->args[3].f,
			},
	};
	uint64_t bytes = 4 * x->elements * opd_dtype_bytes(x->dtype);
	bool fresh = work.y.base != work.x.base && work.sum.base != work.residual.base; /* in place the lines have been read */
	work.norm.streams = fresh && cpu_streams(&work.y, bytes) && cpu_streams(&work.sum, bytes);
	return cpu_for(exec, x->elements / work.norm.count, fused_cost(impl, call), fused_rows, &work, error);
}

const opd_impl cpu_rms_norm = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "rms_norm",
	.schema = "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_norm,
	.predicate = rms_norm_predicate,
	.cost_ns = rms_norm_cost,
	.run = rms_norm_run,
};

const opd_impl cpu_fused_add_rms_norm = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_IN_PLACE,
	.op = "fused_add_rms_norm",
	.schema = "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) -> "
			  "(Tensor, Tensor)",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_norm,
	.predicate = fused_predicate,
	.cost_ns = fused_cost,
	.run = fused_run,
};
