/* rms_norm, fused_add_rms_norm, layer_norm: a work group a row. */
#include "providers/opencl/opencl.h"
#include "uuid/opencl_norm.h"

/* Where an op of the two has its arguments. */
struct rms_parameters {
	uint32_t residual; /* 0: none */
	uint32_t weight;
	uint32_t epsilon;
	uint32_t variance_size;
};

static const struct rms_parameters plain_parameters = {0, 1, 2, 3};
static const struct rms_parameters fused_parameters = {1, 2, 3, 4};

static bool takes_weight(const char *name, const opd_tensor *weight, const opd_tensor *x, opd_reason *reason)
{
	if (weight != NULL && weight->dtype != x->dtype && weight->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s %s, only x's dtype or f32", name, opd_dtype_name(weight->dtype));
	return opencl_takes(name, weight, reason);
}

static bool rms_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const struct rms_parameters *parameters = impl->user;
	const opd_tensor *x = opencl_tensor(call, 0);
	(void)state;
	return opencl_takes("x", x, reason) &&
	       (parameters->residual == 0 || opencl_takes("x_residual", opencl_tensor(call, parameters->residual), reason)) &&
	       takes_weight("weight", opencl_tensor(call, parameters->weight), x, reason);
}

static opd_status rms_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct rms_parameters *parameters = impl->user;
	const opd_tensor *x = opencl_tensor(call, 0);
	const opd_tensor *residual = parameters->residual == 0 ? NULL : opencl_tensor(call, parameters->residual);
	const opd_tensor *weight = opencl_tensor(call, parameters->weight);
	const int64_t columns = opd_tensor_last(x);
	for (uint32_t i = 0; i < call->output_count; i++)
		if (opencl_verify(impl, call, x, i, error) != OPD_OK)
			return OPD_INTERNAL;
	if (opd_tensor_empty(x))
		return OPD_OK;
	struct launch launch = launch_begin(state, exec, OPENCL_rms_norm, x->dtype, error);
	launch_tensor(&launch, x, NULL);
	launch_tensor(&launch, residual, x);
	launch_tensor(&launch, weight, x);
	launch_tensor(&launch, call->outputs[0], NULL);
	launch_tensor(&launch, residual == NULL ? NULL : call->outputs[1], call->outputs[0]);
	launch_int(&launch, columns);
	launch_int(&launch, call->args[parameters->variance_size].kind == OPD_ARG_INT ? call->args[parameters->variance_size].i : columns);
	launch_int(&launch, residual != NULL);
	launch_int(&launch, weight != NULL);
	launch_int(&launch, weight != NULL && weight->dtype == OPD_f32);
	launch_float(&launch, call->args[parameters->epsilon].f);
	return launch_rows(&launch, x->elements / (uint64_t)columns);
}

static bool layer_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const opd_tensor *x = opencl_tensor(call, 0);
	(void)impl, (void)state;
	return opencl_takes("x", x, reason) && takes_weight("weight", opencl_tensor(call, 1), x, reason) &&
	       takes_weight("bias", opencl_tensor(call, 2), x, reason);
}

static opd_status layer_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = opencl_tensor(call, 0);
	const opd_tensor *weight = opencl_tensor(call, 1);
	const opd_tensor *bias = opencl_tensor(call, 2);
	const int64_t columns = opd_tensor_last(x);
	opd_status status = opencl_verify(impl, call, x, 0, error);
	if (status != OPD_OK || opd_tensor_empty(x))
		return status;
	struct launch launch = launch_begin(state, exec, OPENCL_layer_norm, x->dtype, error);
	launch_tensor(&launch, x, NULL);
	launch_tensor(&launch, weight, x);
	launch_tensor(&launch, bias, x);
	launch_tensor(&launch, call->outputs[0], NULL);
	launch_int(&launch, columns);
	launch_int(&launch, weight != NULL);
	launch_int(&launch, weight != NULL && weight->dtype == OPD_f32);
	launch_int(&launch, bias != NULL);
	launch_int(&launch, bias != NULL && bias->dtype == OPD_f32);
	launch_float(&launch, call->args[3].f);
	return launch_rows(&launch, x->elements / (uint64_t)columns);
}

#define NORM(NAME, SCHEMA, FLAGS, SUPPORTS, RUN, USER)                                                                                                 \
	{                                                                                                                                                  \
		.struct_bytes = sizeof(opd_impl), .flags = OPD_IMPL_BATCH_INVARIANT | (FLAGS), .op = NAME, .schema = NAME SCHEMA, .device = "opencl",          \
		.uuid = OPD_UUID_opencl_norm, .predicate = SUPPORTS, .run = RUN, .user = USER                                                                  \
	}

const opd_impl opencl_norms[] = {
	NORM("rms_norm", "(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor", 0, rms_supports, rms_run, &plain_parameters),
	NORM("fused_add_rms_norm", "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) -> (Tensor, Tensor)",
         OPD_IMPL_IN_PLACE, rms_supports, rms_run, &fused_parameters),
	NORM("layer_norm", "(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor", 0, layer_supports, layer_run, NULL),
	{0},
};
