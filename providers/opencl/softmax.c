/* softmax over the last dimension: a work group a row. */
#include "providers/opencl/opencl.h"
#include "uuid/opencl_softmax.h"

static bool softmax_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const opd_tensor *x = opencl_tensor(call, 0);
	const int64_t dim = call->args[1].i;
	(void)impl, (void)state;
	if (x->rank != 0 && dim != -1 && dim != (int64_t)x->rank - 1)
		return OPD_REFUSE(reason, OPD_REASON_ATTRIBUTE, "dim %lld, only the last", (long long)dim);
	return opencl_takes("x", x, reason);
}

static opd_status softmax_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = opencl_tensor(call, 0);
	opd_status status = opencl_verify(impl, call, x, 0, error);
	if (status != OPD_OK || opd_tensor_empty(x))
		return status;
	struct launch launch = launch_begin(state, exec, OPENCL_softmax, x->dtype, error);
	launch_tensor(&launch, x, NULL);
	launch_tensor(&launch, call->outputs[0], NULL);
	launch_int(&launch, opd_tensor_last(x));
	return launch_rows(&launch, x->elements / (uint64_t)opd_tensor_last(x));
}

const opd_impl opencl_softmaxes[] = {
	{
		.struct_bytes = sizeof(opd_impl),
		.flags = OPD_IMPL_BATCH_INVARIANT,
		.op = "softmax",
		.schema = "softmax(Tensor x, int dim=-1) -> Tensor",
		.device = "opencl",
		.uuid = OPD_UUID_opencl_softmax,
		.predicate = softmax_supports,
		.run = softmax_run,
	},
	{0},
};
