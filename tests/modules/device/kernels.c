/* rms_norm, add and relu on the test device, f32 alone. */
#include "device.h"

#include <math.h>
#include <stdlib.h>

#include "uuid/device.h"

/* relu's plan refuses more: its scratch is bounded. */
enum { RELU_ELEMENTS = 65536 };

struct relu_plan {
	struct device *device;
	uint64_t elements;
};

/* ---- What `run` hands to the stream ---- */

struct device_operand device_operand_of(const char *name, const opd_tensor *tensor)
{
	struct device_operand operand = {.name = name,
	                                 .memory = tensor->data,
	                                 .byte_offset = tensor->byte_offset,
	                                 .elements = tensor->elements,
	                                 .rank = tensor->rank};
	for (uint32_t i = 0; i < tensor->rank && i < DEVICE_RANK; i++) {
		operand.shape[i] = tensor->shape[i];
		operand.strides[i] = tensor->strides[i];
	}
	return operand;
}

/* The bytes up to the last element that it touches. */
static uint64_t operand_bytes(const struct device_operand *operand)
{
	uint64_t last = 0;
	for (uint32_t i = 0; i < operand->rank; i++)
		last += (uint64_t)((operand->shape[i] - 1) * operand->strides[i]);
	return operand->elements == 0 ? 0 : (last + 1) * sizeof(float);
}

float *device_floats(struct device *device, uint32_t ordinal, const struct device_operand *operand, opd_error *error)
{
	return (float *)(void *)device_contents(device, ordinal, operand->memory, operand->byte_offset, operand_bytes(operand),
	                                        operand->name, error);
}

opd_status device_launch(const opd_exec *exec, struct device *device, const struct device_launch *what, opd_error *error)
{
	if (device_faulty(device, DEVICE_FAULT_MUTE)) {
		error->status = OPD_OK;
		error->text[0] = '\0';
		return (opd_status)99;
	}
	if (device_faulty(device, DEVICE_FAULT_STALL))
		device_await_gate("OPD_TEST_DEVICE_GATE");
	if (device_faulty(device, DEVICE_FAULT_HALT)) {
		device->host->log(device->host, OPD_LOG_INFO, "a launch halts");
		device_await_gate("OPD_TEST_DEVICE_GATE2");
	}
	if (device_faulty(device, DEVICE_FAULT_LAUNCH))
		return opd_fail(error, OPD_INTERNAL, "launch: injected failure");
	return device_enqueue(exec->stream, what, error);
}

/* An output that isn't what the kernel writes, or operands that lie elsewhere. */
static opd_status check_call(const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = call->args[0].tensor;
	const opd_tensor *y = call->outputs[0];
	if (call->output_count != 1 || y->dtype != OPD_f32 || !opd_tensor_same_shape(x, y))
		return opd_fail(error, OPD_INTERNAL, "the result isn't f32 of the first operand's shape");
	if (x->device != exec->device || y->device != exec->device)
		return opd_fail(error, OPD_INTERNAL, "operands on device %u, the result on %u, to be run on %u", (unsigned)x->device,
		                (unsigned)y->device, (unsigned)exec->device);
	return OPD_OK;
}

/* ---- rms_norm ---- */

static bool rms_norm_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = call->args[0].tensor;
	if (x->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only f32", opd_dtype_name(x->dtype));
	if (x->rank == 0 || x->rank > DEVICE_RANK)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "x has rank %u", (unsigned)x->rank);
	if (!opd_tensor_contiguous(x))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "x is strided");
	if (call->args[1].kind == OPD_ARG_TENSOR &&
	    (call->args[1].tensor->dtype != OPD_f32 || !opd_tensor_contiguous(call->args[1].tensor)))
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "weight isn't contiguous f32");
	if (call->args[3].kind != OPD_ARG_NONE)
		return OPD_REFUSE(reason, OPD_REASON_ATTRIBUTE, "variance_size %lld, only None", (long long)call->args[3].i);
	return true;
}

static opd_status rms_norm_kernel(struct device *device, uint32_t ordinal, const struct device_launch *what, opd_error *error)
{
	const float *x = device_floats(device, ordinal, &what->inputs[0], error);
	float *y = device_floats(device, ordinal, &what->output, error);
	const float *weight = what->input_count < 2 ? NULL : device_floats(device, ordinal, &what->inputs[1], error);
	if (x == NULL || y == NULL || (what->input_count == 2 && weight == NULL))
		return OPD_INTERNAL;
	uint64_t columns = (uint64_t)what->output.shape[what->output.rank - 1];
	for (uint64_t at = 0; at < what->output.elements; at += columns) {
		double sum = 0;
		for (uint64_t i = 0; i < columns; i++)
			sum += (double)x[at + i] * (double)x[at + i];
		double scale = 1 / sqrt(sum / (double)columns + what->epsilon);
		for (uint64_t i = 0; i < columns; i++)
			y[at + i] = (float)((double)x[at + i] * scale) * (weight == NULL ? 1 : weight[i]);
	}
	return OPD_OK;
}

static struct device_launch rms_norm_launch(const opd_call *call)
{
	struct device_launch what = {
	    .kernel = rms_norm_kernel,
	    .input_count = 1,
	    .inputs = {device_operand_of("x", call->args[0].tensor)},
	    .output = device_operand_of("the result", call->outputs[0]),
	    .epsilon = call->args[2].f,
	};
	if (call->args[1].kind == OPD_ARG_TENSOR)
		what.inputs[what.input_count++] = device_operand_of("weight", call->args[1].tensor);
	return what;
}

static opd_status rms_norm_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	opd_status status = check_call(call, exec, error);
	if (status != OPD_OK)
		return status;
	const struct device_launch what = rms_norm_launch(call);
	return device_launch(exec, state, &what, error);
}

static opd_status rms_norm_run_many(const opd_impl *impl, void *state, const opd_call *const *calls, uint32_t count, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	struct device *device = state;
	opd_status status = count < 2 || count > OPD_CALLS_MAX ? opd_fail(error, OPD_INTERNAL, "run_many: %u calls", (unsigned)count) : OPD_OK;
	if (status == OPD_OK && device_faulty(device, DEVICE_FAULT_TOGETHER))
		status = opd_fail(error, OPD_UNIMPLEMENTED, "run_many: injected refusal");
	for (uint32_t i = 0; i < count && status == OPD_OK; i++)
		status = check_call(calls[i], exec, error);
	for (uint32_t i = 0; i < count && status == OPD_OK; i++) {
		const struct device_launch what = rms_norm_launch(calls[i]);
		status = device_enqueue(exec->stream, &what, error);
	}
	(void)atomic_fetch_add(&device->together, 1);
	(void)atomic_fetch_add(&device->calls, count);
	return status;
}

/* ---- add ---- */

static bool add_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *a = call->args[0].tensor;
	const opd_tensor *b = call->args[1].tensor;
	if (a->dtype != OPD_f32 || b->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "a %s, b %s, only f32", opd_dtype_name(a->dtype), opd_dtype_name(b->dtype));
	if (!opd_tensor_same_shape(a, b))
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "a and b differ: no broadcasting");
	if (a->rank > DEVICE_RANK)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "rank %u", (unsigned)a->rank);
	return true;
}

/* Where the element of this row-major number lies, in elements. */
static uint64_t element_at(const struct device_operand *operand, uint64_t number)
{
	uint64_t at = 0;
	for (uint32_t i = operand->rank; i-- > 0;) {
		at += number % (uint64_t)operand->shape[i] * (uint64_t)operand->strides[i];
		number /= (uint64_t)operand->shape[i];
	}
	return at;
}

static opd_status add_kernel(struct device *device, uint32_t ordinal, const struct device_launch *what, opd_error *error)
{
	const float *a = device_floats(device, ordinal, &what->inputs[0], error);
	const float *b = device_floats(device, ordinal, &what->inputs[1], error);
	float *y = device_floats(device, ordinal, &what->output, error);
	if (a == NULL || b == NULL || y == NULL)
		return OPD_INTERNAL;
	for (uint64_t i = 0; i < what->output.elements; i++)
		y[i] = a[element_at(&what->inputs[0], i)] + b[element_at(&what->inputs[1], i)];
	return OPD_OK;
}

static opd_status add_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	opd_status status = check_call(call, exec, error);
	if (status != OPD_OK)
		return status;
	struct device_launch what = {
	    .kernel = add_kernel,
	    .input_count = 2,
	    .inputs = {device_operand_of("a", call->args[0].tensor), device_operand_of("b", call->args[1].tensor)},
	    .output = device_operand_of("the result", call->outputs[0]),
	};
	return device_launch(exec, state, &what, error);
}

/* ---- relu: a plan that needs scratch, and may refuse ---- */

static bool relu_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = call->args[0].tensor;
	if (x->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only f32", opd_dtype_name(x->dtype));
	if (x->rank > DEVICE_RANK || !opd_tensor_contiguous(x))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "x is strided");
	return true;
}

static void relu_plan_destroy(void *data)
{
	struct relu_plan *plan = data;
	(void)atomic_fetch_sub(&plan->device->plans, 1);
	free(plan);
}

static opd_status relu_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason,
                            opd_error *error)
{
	(void)impl;
	struct device *device = state;
	const opd_tensor *x = call->args[0].tensor;
	if (x->elements > RELU_ELEMENTS) {
		opd_reason_set(reason, OPD_REASON_SIZE, "%llu elements, at most %d", (unsigned long long)x->elements, RELU_ELEMENTS);
		return OPD_FAILED_PRECONDITION;
	}
	struct relu_plan *plan = malloc(sizeof *plan);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "relu: no memory for a plan");
	*plan = (struct relu_plan){.device = device, .elements = x->elements};
	(void)atomic_fetch_add(&device->plans, 1);
	plan_out->scratch_bytes = x->elements * sizeof(float);
	plan_out->memory_bytes = sizeof *plan;
	plan_out->data = plan;
	plan_out->destroy = relu_plan_destroy;
	return OPD_OK;
}

static opd_status relu_kernel(struct device *device, uint32_t ordinal, const struct device_launch *what, opd_error *error)
{
	uint64_t bytes = what->output.elements * sizeof(float);
	const float *x = device_floats(device, ordinal, &what->inputs[0], error);
	float *y = device_floats(device, ordinal, &what->output, error);
	float *scratch =
	    bytes == 0 ? y : (float *)(void *)device_contents(device, ordinal, what->scratch, 0, bytes, "scratch", error);
	if (x == NULL || y == NULL || scratch == NULL)
		return OPD_INTERNAL;
	memcpy(scratch, x, bytes);
	for (uint64_t i = 0; i < what->output.elements; i++)
		y[i] = scratch[i] > 0 || isnan(scratch[i]) ? scratch[i] : 0;
	return OPD_OK;
}

static opd_status relu_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	opd_status status = check_call(call, exec, error);
	if (status != OPD_OK)
		return status;
	const struct relu_plan *plan = exec->plan == NULL ? NULL : exec->plan->data;
	if (plan == NULL || plan->elements != call->outputs[0]->elements)
		return opd_fail(error, OPD_INTERNAL, "relu: run without its plan, or with another's");
	struct device_launch what = {
	    .kernel = relu_kernel,
	    .input_count = 1,
	    .inputs = {device_operand_of("x", call->args[0].tensor)},
	    .output = device_operand_of("the result", call->outputs[0]),
	    .scratch = exec->scratch,
	};
	return device_launch(exec, state, &what, error);
}

/* ---- */

static const opd_impl impls[] = {
    {
        .struct_bytes = sizeof impls[0],
        .flags = OPD_IMPL_BATCH_INVARIANT,
        .op = "rms_norm",
        .schema = "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
        .device = "test",
        .uuid = OPD_UUID_device,
        .predicate = rms_norm_supports,
        .run = rms_norm_run,
        .run_many = rms_norm_run_many,
    },
    {
        .struct_bytes = sizeof impls[0],
        .op = "add",
        .schema = "add(Tensor a, Tensor b) -> Tensor",
        .device = "test",
        .uuid = OPD_UUID_device,
        .predicate = add_supports,
        .run = add_run,
    },
    {
        .struct_bytes = sizeof impls[0],
        .flags = OPD_IMPL_PLAN_MAY_REFUSE,
        .op = "relu",
        .schema = "relu(Tensor x) -> Tensor",
        .device = "test",
        .uuid = OPD_UUID_device,
        .predicate = relu_supports,
        .plan = relu_plan,
        .run = relu_run,
    },
};

opd_status device_register_kernels(const opd_host *host, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; status == OPD_OK && i < sizeof impls / sizeof impls[0]; i++)
		status = host->register_impl(host, &impls[i], error);
	return status;
}
