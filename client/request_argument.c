/* The arguments of a request: names, values, operands, and those that the daemon has made. */
#include "client/request.h"

#include "proto/bounds.h"
#include "proto/tensor.h"

/* NULL: remembered. */
static struct msg_arg *request_add(opd_request *request, const char *name, msg_arg_kind kind)
{
	struct msg_run *run = &request->message.run;
	request->form = REQUEST_UNPREPARED;
	if (request->error.status != OPD_OK)
		return NULL;
	if (request->kind != MSG_REQUEST_RUN) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: argument %s, which only runs have", run->op.data, name == NULL ? "" : name);
		return NULL;
	}
	if (run->arg_count == BOUND_ARGS) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: more than %u arguments", run->op.data, BOUND_ARGS);
		return NULL;
	}
	if (run->arg_count == request->arg_capacity) {
		size_t capacity = 0;
		struct msg_arg *grown = request_grow(request, run->args, run->arg_count, sizeof *grown, &capacity);
		if (grown == NULL)
			return NULL;
		run->args = grown;
		request->arg_capacity = (uint32_t)capacity;
	}
	struct msg_arg *arg = &run->args[run->arg_count];
	*arg = (struct msg_arg){.kind = kind};
	if (!request_copy_text(request, "argument name", name, BOUND_NAME_BYTES, &arg->name))
		return NULL;
	run->arg_count++;
	return arg;
}

static bool request_add_host(opd_request *request, struct msg_tensor *tensor, const uint8_t *data, uint64_t bytes)
{
	if (request->host_count == request->host_capacity) {
		struct request_host *grown =
		    request_grow(request, request->hosts, request->host_count, sizeof *grown, &request->host_capacity);
		if (grown == NULL)
			return false;
		request->hosts = grown;
	}
	request->hosts[request->host_count++] = (struct request_host){tensor, data, bytes};
	return true;
}

/* What an error calls an argument. */
static const char *arg_name(const opd_request *request, const struct msg_arg *arg, char out[32])
{
	if (arg->name.bytes != 0)
		return arg->name.data;
	(void)snprintf(out, 32, "argument %td", arg - request->message.run.args);
	return out;
}

/* dtype, shape and strides; strides that say row-major are dropped, so that the server needn't find that out. */
static bool operand_shape(opd_request *request, const char *name, const opd_operand *operand, struct msg_tensor *tensor)
{
	const char *op = request->message.run.op.data;
	if (!opd_dtype_valid(operand->dtype)) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s has dtype %d, which is none", op, name, (int)operand->dtype);
		return false;
	}
	if (operand->rank > OPD_RANK_MAX || (operand->rank > 0 && operand->shape == NULL)) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s has rank %u%s, at most %d", op, name, operand->rank,
		             operand->shape == NULL ? " and no shape" : "", OPD_RANK_MAX);
		return false;
	}
	tensor->dtype = operand->dtype;
	tensor->rank = operand->rank;
	for (uint32_t i = 0; i < operand->rank; i++)
		tensor->shape[i] = operand->shape[i];
	tensor->byte_offset = operand->byte_offset;
	uint64_t end;
	const bool open = operand->source == OPD_FROM_VALUE && operand->rank > 0 && operand->shape[0] == -1;
	if (open) /* known when the graph runs */
		tensor->shape[0] = 1;
	if (!tensor_extent(operand->dtype, operand->rank, tensor->shape, operand->strides, operand->byte_offset, &end)) {
		request_fail(request, OPD_INVALID_ARGUMENT,
		             "%s: %s: extents and strides must be at least 0, the byte offset (%llu) a multiple of the %zu-byte element, "
		             "and all fit "
		             "in 63 bits",
		             op, name, (unsigned long long)operand->byte_offset, opd_dtype_bytes(operand->dtype));
		return false;
	}
	if (open)
		tensor->shape[0] = -1;
	if (operand->strides == NULL)
		return true;
	int64_t row_major[OPD_RANK_MAX];
	tensor_row_major(operand->rank, tensor->shape, row_major);
	for (uint32_t i = 0; i < operand->rank; i++) {
		tensor->strides[i] = operand->strides[i];
		if (operand->strides[i] != row_major[i])
			tensor->strided = true;
	}
	return true;
}

/* Only the bytes that elements touch are sent: from element 0, the lowest since strides aren't negative, to the highest. */
static bool operand_host(opd_request *request, const char *name, const opd_operand *operand, struct msg_tensor *tensor)
{
	const char *op = request->message.run.op.data;
	uint64_t end = 0;
	if (!tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strided ? tensor->strides : NULL, tensor->byte_offset,
	                   &end))
		return false; /* operand_shape has checked it */
	const uint64_t begin = tensor->byte_offset;
	if (operand->data_bytes != 0 && end > operand->data_bytes) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s reaches to byte %llu, its data has %llu", op, name,
		             (unsigned long long)end, (unsigned long long)operand->data_bytes);
		return false;
	}
	if (end > begin && operand->data == NULL) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s has no data, expected %llu bytes", op, name, (unsigned long long)end);
		return false;
	}
	tensor->byte_offset = 0;
	return request_add_host(request, tensor, end > begin ? (const uint8_t *)operand->data + begin : NULL, end - begin);
}

static bool operand_convert(opd_request *request, const char *name, const opd_operand *operand, struct msg_tensor *tensor)
{
	const bool whole =
	    operand->dtype == OPD_DTYPE_NONE &&
	    (operand->source == OPD_FROM_HANDLE || operand->source == OPD_FROM_RESULT || operand->source == OPD_FROM_VALUE);
	tensor->donate = operand->donate;
	if (!whole && !operand_shape(request, name, operand, tensor))
		return false;
	switch (operand->source) {
	case OPD_FROM_HOST:
		return operand_host(request, name, operand, tensor);
	case OPD_FROM_HANDLE:
		tensor->source = MSG_SOURCE_HANDLE;
		tensor->handle = (struct msg_handle){operand->handle.index, operand->handle.generation};
		return true;
	case OPD_FROM_RESULT:
		tensor->source = MSG_SOURCE_RESULT;
		tensor->result.request = operand->ticket;
		tensor->result.output = operand->output;
		return true;
	case OPD_FROM_NOTHING:
		tensor->source = MSG_SOURCE_NONE;
		return true;
	case OPD_FROM_VALUE:
		if (operand->value.node == OPD_GRAPH_INPUT) {
			tensor->source = MSG_SOURCE_GRAPH_INPUT;
			tensor->graph_input = operand->value.output;
		} else {
			tensor->source = MSG_SOURCE_NODE;
			tensor->node = (struct msg_node_output){operand->value.node, operand->value.output};
		}
		return true;
	}
	request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s has source %d, which is none", request->message.run.op.data, name,
	             (int)operand->source);
	return false;
}

/* Callers built against an older header pass smaller structs: they lie struct_bytes apart, and what they lack is zero. */
static bool request_operands(opd_request *request, struct msg_arg *arg, const opd_operand *operands, size_t count)
{
	char number[32];
	const char *name = arg_name(request, arg, number);
	const size_t step = count == 0 ? 0 : operands[0].struct_bytes;
	if (count != 0 && step < sizeof(opd_operand)) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s: operand has struct_bytes %zu, expected %zu",
		             request->message.run.op.data, name, step, sizeof(opd_operand));
		return false;
	}
	arg->count = (uint32_t)count;
	arg->tensor = arena_array(&request->arena, count, sizeof *arg->tensor);
	if (arg->tensor == NULL) {
		request_fail_memory(request);
		return false;
	}
	for (size_t i = 0; i < count; i++) {
		opd_operand operand;
		memcpy(&operand, (const uint8_t *)operands + i * step, sizeof operand);
		if (!operand_convert(request, name, &operand, &arg->tensor[i]))
			return false;
	}
	return true;
}

void opd_request_tensor(opd_request *request, const char *name, const opd_operand *operand)
{
	struct msg_arg *arg = request_add(request, name, MSG_ARG_TENSOR);
	if (arg != NULL)
		(void)request_operands(request, arg, operand, 1);
}

void opd_request_value(opd_request *request, const char *name, opd_value value)
{
	opd_request_tensor(request, name, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .value = value});
}

static bool request_list_fits(opd_request *request, const char *name, size_t count)
{
	if (count <= BOUND_LIST)
		return true;
	request_fail(request, OPD_INVALID_ARGUMENT, "%s: list %s of %zu, at most %u", request->message.run.op.data,
	             name == NULL ? "" : name, count, BOUND_LIST);
	return false;
}

void opd_request_tensors(opd_request *request, const char *name, const opd_operand *operands, size_t count)
{
	struct msg_arg *arg = request_list_fits(request, name, count) ? request_add(request, name, MSG_ARG_TENSORS) : NULL;
	if (arg != NULL)
		(void)request_operands(request, arg, operands, count);
}

void opd_request_int(opd_request *request, const char *name, int64_t value)
{
	struct msg_arg *arg = request_add(request, name, MSG_ARG_INT);
	if (arg != NULL)
		arg->i = value;
}

void opd_request_ints(opd_request *request, const char *name, const int64_t *values, size_t count)
{
	struct msg_arg *arg = request_list_fits(request, name, count) ? request_add(request, name, MSG_ARG_INTS) : NULL;
	if (arg == NULL)
		return;
	int64_t *copy = arena_array(&request->arena, count, sizeof *copy);
	if (copy == NULL) {
		request_fail_memory(request);
		return;
	}
	if (count != 0)
		memcpy(copy, values, count * sizeof *copy);
	arg->count = (uint32_t)count;
	arg->ints = copy;
}

void opd_request_float(opd_request *request, const char *name, double value)
{
	struct msg_arg *arg = request_add(request, name, MSG_ARG_FLOAT);
	if (arg != NULL)
		arg->f = value;
}

void opd_request_bool(opd_request *request, const char *name, bool value)
{
	struct msg_arg *arg = request_add(request, name, MSG_ARG_BOOL);
	if (arg != NULL)
		arg->b = value;
}

void opd_request_str(opd_request *request, const char *name, const char *value)
{
	struct msg_arg *arg = request_add(request, name, MSG_ARG_STR);
	if (arg != NULL)
		(void)request_copy_text(request, "str argument", value, BOUND_STR_BYTES, &arg->str);
}

void opd_request_none(opd_request *request, const char *name)
{
	(void)request_add(request, name, MSG_ARG_NONE);
}

static bool generated_tensors(opd_request *request, struct msg_arg *arg, const struct msg_arg *from)
{
	const uint32_t count = from->kind == MSG_ARG_TENSOR ? 1 : from->count;
	arg->count = count;
	arg->tensor = arena_array(&request->arena, count, sizeof *arg->tensor);
	if (arg->tensor == NULL) {
		request_fail_memory(request);
		return false;
	}
	for (uint32_t i = 0; i < count; i++) {
		struct msg_tensor *tensor = &arg->tensor[i];
		*tensor = from->tensor[i];
		if (tensor->source == MSG_SOURCE_INLINE &&
		    !request_add_host(request, tensor, tensor->inlined.data, tensor->inlined.bytes))
			return false;
	}
	return true;
}

bool request_add_generated(opd_request *request, const struct msg_arg *from)
{
	struct msg_arg *arg = request_add(request, NULL, from->kind);
	if (arg == NULL)
		return false;
	arg->name = from->name; /* lives in `owned`, as ints and str do */
	switch (from->kind) {
	case MSG_ARG_TENSOR:
	case MSG_ARG_TENSORS:
		return generated_tensors(request, arg, from);
	case MSG_ARG_INTS:
		arg->count = from->count;
		arg->ints = from->ints;
		return true;
	case MSG_ARG_INT:
		arg->i = from->i;
		return true;
	case MSG_ARG_FLOAT:
		arg->f = from->f;
		return true;
	case MSG_ARG_BOOL:
		arg->b = from->b;
		return true;
	case MSG_ARG_STR:
		arg->str = from->str;
		return true;
	case MSG_ARG_NONE:
		return true;
	}
	request_fail(request, OPD_DATA_LOSS, "generated argument has kind %d, which is none", (int)from->kind);
	return false;
}
