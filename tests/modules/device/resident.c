/* What tensors that live on a device need of a kernel: fused_add_rms_norm works in place, embedding checks its indices there. f32 alone. */
#include <math.h>
#include <string.h>

#include "device.h"
#include "uuid/device.h"

/* ---- fused_add_rms_norm: both results in the places of both inputs ---- */

static bool fused_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	for (uint32_t i = 0; i < 2; i++)
		if (call->args[i].tensor->dtype != OPD_f32 || !opd_tensor_contiguous(call->args[i].tensor))
			return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x or x_residual isn't contiguous f32");
	if (call->args[2].kind != OPD_ARG_NONE || call->args[4].kind != OPD_ARG_NONE)
		return OPD_REFUSE(reason, OPD_REASON_ATTRIBUTE, "a weight, or variance_size");
	return true;
}

static opd_status fused_kernel(struct device *device, uint32_t ordinal, const struct device_launch *what, opd_error *error)
{
	const float *x = device_floats(device, ordinal, &what->inputs[0], error);
	const float *residual = device_floats(device, ordinal, &what->inputs[1], error);
	float *y = device_floats(device, ordinal, &what->output, error);
	float *sum = device_floats(device, ordinal, &what->second, error);
	if (x == NULL || residual == NULL || y == NULL || sum == NULL)
		return OPD_INTERNAL;
	const uint64_t columns = what->output.elements == 0 ? 1 : (uint64_t)what->output.shape[what->output.rank - 1];
	for (uint64_t at = 0; at < what->output.elements; at += columns) {
		double squares = 0;
		for (uint64_t i = at; i < at + columns; i++) {
			sum[i] = x[i] + residual[i];
			squares += (double)sum[i] * (double)sum[i];
		}
		const double scale = 1 / sqrt(squares / (double)columns + what->epsilon);
		for (uint64_t i = at; i < at + columns; i++)
			y[i] = (float)((double)sum[i] * scale);
	}
	return OPD_OK;
}

static opd_status fused_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	struct device_launch what = {
	    .kernel = fused_kernel,
	    .input_count = 2,
	    .inputs = {device_operand_of("x", call->args[0].tensor), device_operand_of("x_residual", call->args[1].tensor)},
	    .output = device_operand_of("result 0", call->outputs[0]),
	    .second = device_operand_of("result 1", call->outputs[1]),
	    .epsilon = call->args[3].f,
	};
	return device_launch(exec, state, &what, error);
}

/* ---- embedding ---- */

static bool embedding_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *ids = call->args[0].tensor;
	const opd_tensor *table = call->args[1].tensor;
	if (table->dtype != OPD_f32 || !opd_tensor_contiguous(table))
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "table isn't contiguous f32");
	if (ids->dtype != OPD_i64 || !opd_tensor_contiguous(ids))
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "ids aren't contiguous i64");
	return true;
}

/* The host checks ids that it has; then there is no word to report in. */
static opd_status embedding_kernel(struct device *device, uint32_t ordinal, const struct device_launch *what, opd_error *error)
{
	const uint64_t count = what->inputs[0].elements;
	const int64_t *ids = (const int64_t *)(void *)device_contents(device, ordinal, what->inputs[0].memory, what->inputs[0].byte_offset,
	                                                              count * sizeof ids[0], "ids", error);
	const float *table = device_floats(device, ordinal, &what->inputs[1], error);
	float *y = device_floats(device, ordinal, &what->output, error);
	opd_index_fault *fault =
	    what->fault == NULL ? NULL : (opd_index_fault *)(void *)device_contents(device, ordinal, what->fault, 0, sizeof *fault, "fault", error);
	if (ids == NULL || table == NULL || y == NULL || (what->fault != NULL && fault == NULL))
		return OPD_INTERNAL;
	const int64_t rows = what->inputs[1].shape[0];
	const size_t columns = (size_t)what->inputs[1].shape[1];
	for (uint64_t i = 0; i < count; i++) {
		if (ids[i] >= 0 && ids[i] < rows) {
			memcpy(y + i * columns, table + (size_t)ids[i] * columns, columns * sizeof y[0]);
			continue;
		}
		if (fault == NULL)
			return opd_fail(error, OPD_INTERNAL, "ids were not checked");
		if (fault->state == 0)
			*fault = (opd_index_fault){.state = 2, .param = 0, .position = i, .value = ids[i], .low = 0, .high = rows - 1};
	}
	return OPD_OK;
}

static opd_status embedding_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	struct device_launch what = {
	    .kernel = embedding_kernel,
	    .input_count = 2,
	    .inputs = {device_operand_of("ids", call->args[0].tensor), device_operand_of("table", call->args[1].tensor)},
	    .output = device_operand_of("the result", call->outputs[0]),
	    .fault = exec->fault,
	};
	return device_launch(exec, state, &what, error);
}

/* ---- */

static const opd_impl impls[] = {
    {
        .struct_bytes = sizeof impls[0],
        .flags = OPD_IMPL_IN_PLACE,
        .op = "fused_add_rms_norm",
        .schema = "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) -> (Tensor, Tensor)",
        .device = "test",
        .uuid = OPD_UUID_device,
        .predicate = fused_supports,
        .run = fused_run,
    },
    {
        .struct_bytes = sizeof impls[0],
        .flags = OPD_IMPL_CHECKS_INDICES,
        .op = "embedding",
        .schema = "embedding(Tensor ids, Tensor table) -> Tensor",
        .device = "test",
        .uuid = OPD_UUID_device,
        .predicate = embedding_supports,
        .run = embedding_run,
    },
};

opd_status device_register_resident(const opd_host *host, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; status == OPD_OK && i < sizeof impls / sizeof impls[0]; i++)
		status = host->register_impl(host, &impls[i], error);
	return status;
}
