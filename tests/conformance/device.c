#include "tests/conformance/device.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum { TENSORS_MAX = 32, GUARD = 64, GUARD_BYTE = 0xa5 };

opd_status device_open(struct device *device, const opd_backend *backend, void *state, opd_error *error)
{
	*device = (struct device){.backend = backend, .state = state};
	opd_status status = backend->stream_create(state, 0, &device->stream, error);
	return status != OPD_OK ? status : backend->event_create(state, 0, &device->event, error);
}

void device_close(struct device *device)
{
	if (device->event != NULL)
		device->backend->event_destroy(device->state, device->event);
	if (device->stream != NULL)
		device->backend->stream_destroy(device->state, device->stream);
	*device = (struct device){0};
}

/* One stretch of host memory and its copy on the device, guards around it. */
struct moved {
	void *host;
	uint64_t bytes;
	void *memory;
	bool written; /* it holds a result */
	bool given;   /* it holds an operand */
};

struct device_call {
	const struct device *device;
	struct moved moved[TENSORS_MAX];
	size_t moved_count;
	opd_tensor tensors[TENSORS_MAX];
	size_t tensor_count;
	opd_arg args[TENSORS_MAX];
	const opd_tensor *outputs[TENSORS_MAX];
	opd_call call;
	void *scratch;
	void *fault;
	unsigned char *image; /* of the largest stretch with its guards */
};

static uint64_t touched_bytes(const opd_tensor *tensor)
{
	uint64_t last = 0;
	if (tensor->elements == 0)
		return tensor->byte_offset;
	for (uint32_t i = 0; i < tensor->rank; i++)
		last += (uint64_t)(tensor->shape[i] - 1) * (uint64_t)tensor->strides[i];
	return tensor->byte_offset + (last + 1) * opd_dtype_bytes(tensor->dtype);
}

/* Returns when all that was enqueued is done. */
static opd_status device_wait(const struct device *device, opd_error *error)
{
	opd_status status = device->backend->event_record(device->state, device->event, device->stream, error);
	while (status == OPD_OK && (status = device->backend->event_query(device->state, device->event, error)) == OPD_UNAVAILABLE) {
		status = OPD_OK;
		(void)sched_yield();
	}
	return status;
}

static opd_status copy_in(struct device_call *made, const struct moved *moved, opd_error *error)
{
	const struct device *device = made->device;
	uint64_t bytes = moved->bytes + 2 * (uint64_t)GUARD;
	made->image = realloc(made->image, bytes);
	if (made->image == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for %llu bytes", (unsigned long long)bytes);
	memset(made->image, GUARD_BYTE, bytes);
	if (moved->given)
		memcpy(made->image + GUARD, moved->host, moved->bytes);
	opd_status status = device->backend->copy_in(device->state, device->stream, moved->memory, 0, made->image, bytes, error);
	return status != OPD_OK ? status : device_wait(device, error);
}

/* The tensor's memory on the device: the same for all tensors that share it on the host. */
static opd_status move(struct device_call *made, const opd_tensor *tensor, bool is_result, const opd_tensor **tensor_out, opd_error *error)
{
	struct moved *moved = NULL;
	for (size_t i = 0; i < made->moved_count && moved == NULL; i++)
		if (made->moved[i].host == tensor->data)
			moved = &made->moved[i];
	if (moved == NULL) {
		if (made->moved_count == TENSORS_MAX)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "more than %d operands", TENSORS_MAX);
		moved = &made->moved[made->moved_count];
		*moved = (struct moved){.host = tensor->data, .bytes = touched_bytes(tensor), .given = !is_result};
		opd_status status = made->device->backend->alloc(made->device->state, 0, moved->bytes + 2 * (uint64_t)GUARD, &moved->memory, error);
		if (status != OPD_OK)
			return status;
		made->moved_count++;
		status = copy_in(made, moved, error);
		if (status != OPD_OK)
			return status;
	}
	moved->written |= is_result;
	opd_tensor *copy = &made->tensors[made->tensor_count++];
	*copy = *tensor;
	copy->data = (unsigned char *)moved->memory + GUARD;
	copy->device = 1;
	*tensor_out = copy;
	return OPD_OK;
}

static opd_status move_all(struct device_call *made, const opd_call *call, opd_error *error)
{
	opd_status status = OPD_OK;
	if (call->arg_count + call->output_count > TENSORS_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "more than %d arguments and results", TENSORS_MAX);
	for (uint32_t i = 0; i < call->arg_count && status == OPD_OK; i++) {
		made->args[i] = call->args[i];
		if (call->args[i].kind == OPD_ARG_TENSOR)
			status = move(made, call->args[i].tensor, false, &made->args[i].tensor, error);
	}
	for (uint32_t i = 0; i < call->output_count && status == OPD_OK; i++)
		status = move(made, call->outputs[i], true, &made->outputs[i], error);
	made->call = *call;
	made->call.args = made->args;
	made->call.outputs = made->outputs;
	return status;
}

static opd_status fault_init(struct device_call *made, opd_error *error)
{
	const struct device *device = made->device;
	opd_index_fault none = {0};
	opd_status status = device->backend->alloc(device->state, 0, sizeof none, &made->fault, error);
	if (status == OPD_OK)
		status = device->backend->copy_in(device->state, device->stream, made->fault, 0, &none, sizeof none, error);
	return status != OPD_OK ? status : device_wait(device, error);
}

static opd_status fault_read(struct device_call *made, const opd_impl *impl, opd_error *error)
{
	const struct device *device = made->device;
	opd_index_fault fault = {0};
	if (made->fault == NULL)
		return OPD_OK;
	opd_status status = device->backend->copy_out(device->state, device->stream, &fault, made->fault, 0, sizeof fault, error);
	if (status == OPD_OK)
		status = device_wait(device, error);
	if (status != OPD_OK || fault.state == 0)
		return status;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: element %llu of parameter %u is %lld, expected %lld to %lld", impl->op,
	                (unsigned long long)fault.position, (unsigned)fault.param, (long long)fault.value, (long long)fault.low, (long long)fault.high);
}

static opd_status enqueue(struct device_call *made, const opd_host *host, const opd_impl *impl, void *state, opd_error *error)
{
	const struct device *device = made->device;
	opd_plan plan = {.struct_bytes = sizeof plan};
	opd_reason reason = {0};
	opd_status status = OPD_OK;
	if (impl->plan != NULL)
		status = impl->plan(impl, state, &made->call, &plan, &reason, error);
	if (status == OPD_FAILED_PRECONDITION)
		return opd_fail(error, status, "the plan refused: %s", reason.detail);
	if (status == OPD_OK && plan.scratch_bytes > 0)
		status = device->backend->alloc(device->state, 0, plan.scratch_bytes, &made->scratch, error);
	if (status == OPD_OK && (impl->flags & OPD_IMPL_CHECKS_INDICES) != 0)
		status = fault_init(made, error);
	opd_exec exec = {
		.struct_bytes = sizeof exec,
		.threads = 1,
		.host = host,
		.plan = impl->plan == NULL ? NULL : &plan,
		.scratch = made->scratch,
		.stream = device->stream,
		.device = 1,
		.fault = made->fault,
	};
	if (status == OPD_OK)
		status = impl->run(impl, state, &made->call, &exec, error);
	opd_error waited = {0};
	opd_status done = device_wait(device, &waited); /* also after a failure: what was enqueued uses the memory */
	if (status == OPD_OK && done != OPD_OK) {
		*error = waited;
		status = done;
	}
	if (plan.destroy != NULL)
		plan.destroy(plan.data);
	return status;
}

static bool is_guard(const unsigned char *bytes)
{
	for (int i = 0; i < GUARD; i++)
		if (bytes[i] != GUARD_BYTE)
			return false;
	return true;
}

/* Brings a stretch back. What the call may not write is compared, what it writes goes to the host's memory. */
static opd_status copy_out(struct device_call *made, const struct moved *moved, const opd_impl *impl, bool keep, opd_error *error)
{
	const struct device *device = made->device;
	uint64_t bytes = moved->bytes + 2 * (uint64_t)GUARD;
	unsigned char *image = malloc(bytes);
	if (image == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for %llu bytes", (unsigned long long)bytes);
	opd_status status = device->backend->copy_out(device->state, device->stream, image, moved->memory, 0, bytes, error);
	if (status == OPD_OK)
		status = device_wait(device, error);
	if (status == OPD_OK && (!is_guard(image) || !is_guard(image + GUARD + moved->bytes)))
		status = opd_fail(error, OPD_INTERNAL, "%s wrote beside its operands on the device", impl->op);
	if (status == OPD_OK && moved->given && (!moved->written || !keep) && memcmp(image + GUARD, moved->host, moved->bytes) != 0)
		status = opd_fail(error, OPD_INTERNAL, "%s changed an operand on the device", impl->op);
	if (status == OPD_OK && moved->written && keep)
		memcpy(moved->host, image + GUARD, moved->bytes);
	free(image);
	return status;
}

static void device_call_fini(struct device_call *made)
{
	const struct device *device = made->device;
	for (size_t i = 0; i < made->moved_count; i++)
		device->backend->free(device->state, 0, made->moved[i].memory);
	if (made->scratch != NULL)
		device->backend->free(device->state, 0, made->scratch);
	if (made->fault != NULL)
		device->backend->free(device->state, 0, made->fault);
	free(made->image);
}

opd_status device_run(const struct device *device, const opd_host *host, const opd_impl *impl, void *state, const opd_call *call, opd_error *error)
{
	struct device_call made = {.device = device};
	opd_status status = move_all(&made, call, error);
	if (status == OPD_OK)
		status = enqueue(&made, host, impl, state, error);
	opd_status index = status == OPD_OK ? fault_read(&made, impl, error) : status;
	status = index == OPD_INVALID_ARGUMENT ? OPD_OK : index;
	for (size_t i = 0; i < made.moved_count && status == OPD_OK; i++)
		status = copy_out(&made, &made.moved[i], impl, index == OPD_OK, error);
	device_call_fini(&made);
	return status == OPD_OK ? index : status;
}
