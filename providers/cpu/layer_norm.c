/* layer_norm: what is taken, what it costs, rows to kernels. */
#include "providers/cpu/call.h"
#include "uuid/cpu_moments.h"

enum { LAYER_X, LAYER_WEIGHT, LAYER_BIAS, LAYER_EPSILON };

static bool layer_norm_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, LAYER_X);
	return cpu_accept_float(x, reason) && cpu_accept_rows("x", x, reason) &&
	       cpu_accept_rows("weight", cpu_tensor(call, LAYER_WEIGHT), reason) &&
	       cpu_accept_rows("bias", cpu_tensor(call, LAYER_BIAS), reason);
}

static uint64_t layer_norm_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, LAYER_X);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.layer_norm, x->dtype, x->elements);
}

struct layer_norm_work {
	cpu_layer_norm_fn kernel;
	struct cpu_rows x, y;
	struct cpu_layer_norm norm; /* all but x and y */
};

static void layer_norm_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct layer_norm_work *work = context;
	struct cpu_layer_norm norm = work->norm;
	for (uint64_t r = begin; r < end; r++) {
		norm.x = cpu_row(&work->x, r);
		norm.next = cpu_row(&work->x, r + 1 < end ? r + 1 : r);
		norm.y = cpu_row(&work->y, r);
		work->kernel(&norm);
	}
	cpu_streamed(norm.streams);
}

/* A vector of x's dtype where there is none, of f32 else. */
static bool is_f32(const opd_tensor *x, const opd_tensor *vector)
{
	return vector != NULL && vector->dtype != x->dtype;
}

static cpu_layer_norm_fn layer_norm_kernel(const struct cpu_kernels *kernels, const opd_tensor *x, const opd_tensor *weight, const opd_tensor *bias)
{
	const bool f32_weight = is_f32(x, weight), f32_bias = is_f32(x, bias);
	return x->dtype == OPD_f64 ? kernels->f64->layer_norm[f32_weight][f32_bias]
	                           : kernels->moments->layer_norm[cpu_dtype_index(x->dtype)][f32_weight][f32_bias];
}

static opd_status layer_norm_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, LAYER_X);
	const opd_tensor *weight = cpu_tensor(call, LAYER_WEIGHT);
	const opd_tensor *bias = cpu_tensor(call, LAYER_BIAS);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x), error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct layer_norm_work work = {
		.kernel = layer_norm_kernel(cpu_kernels_of(impl), x, weight, bias),
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.norm =
			{
				.weight = weight == NULL ? NULL : opd_tensor_data(weight),
				.bias = bias == NULL ? NULL : opd_tensor_data(bias),
				.count = (size_t)opd_tensor_last(x),
				.epsilon = call->args[LAYER_EPSILON].f,
			},
	};
	uint64_t bytes = 2 * x->elements * opd_dtype_bytes(x->dtype);
	work.norm.streams = work.y.base != work.x.base && cpu_streams(&work.y, bytes); /* in place the lines have been read */
	return cpu_for(exec, x->elements / work.norm.count, layer_norm_cost(impl, call), layer_norm_rows, &work, error);
}

const opd_impl cpu_layer_norm = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "layer_norm",
	.schema = "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_moments,
	.predicate = layer_norm_predicate,
	.cost_ns = layer_norm_cost,
	.run = layer_norm_run,
};
