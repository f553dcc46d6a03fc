#include "client/request.h"

#include <stdlib.h>

#include "client/memory.h"
#include "proto/bounds.h"
#include "proto/tensor.h"
#include "proto/text.h"

#define REQUEST_ARENA_BYTES ((size_t)64 << 20)

void request_fail(opd_request *request, opd_status status, const char *format, ...)
{
	if (request->error.status != OPD_OK)
		return;
	va_list args;
	va_start(args, format);
	request->error.status = (int32_t)status;
	(void)vsnprintf(request->error.text, sizeof request->error.text, format, args);
	va_end(args);
}

void request_fail_memory(opd_request *request)
{
	request_fail(request, OPD_RESOURCE_EXHAUSTED, "request of %s: out of memory", request->message.run.op.data);
}

void *request_grow(opd_request *request, const void *array, size_t count, size_t element_bytes, size_t *capacity_out)
{
	const size_t capacity = count < 8 ? 8 : count * 2;
	void *grown = arena_array(&request->arena, capacity, element_bytes);
	if (grown == NULL) {
		request_fail_memory(request);
		return NULL;
	}
	if (count != 0)
		memcpy(grown, array, count * element_bytes);
	*capacity_out = capacity;
	return grown;
}

bool request_copy_text(opd_request *request, const char *what, const char *text, size_t limit, struct msg_text *out)
{
	const size_t bytes = text == NULL ? 0 : strlen(text);
	if (bytes > limit || !text_valid(text == NULL ? "" : text, bytes)) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: %s of %zu bytes, expected UTF-8 of at most %zu",
		             request->message.run.op.data, what, bytes, limit);
		return false;
	}
	const char *copy = bytes == 0 ? "" : arena_text(&request->arena, text, bytes);
	if (copy == NULL) {
		request_fail_memory(request);
		return false;
	}
	*out = (struct msg_text){copy, bytes};
	return true;
}

opd_request *opd_request_create(const char *op)
{
	opd_request *request = calloc(1, sizeof *request);
	if (request == NULL)
		return NULL;
	arena_init(&request->arena, REQUEST_ARENA_BYTES);
	arena_init(&request->encoded, REQUEST_ARENA_BYTES);
	request->message.kind = MSG_REQUEST_RUN;
	request->kind = MSG_REQUEST_RUN;
	const char *name = op == NULL ? "" : op;
	char *copy = arena_text(&request->arena, name, strlen(name));
	if (copy == NULL) {
		opd_request_destroy(request);
		return NULL;
	}
	request->message.run.op = msg_text(copy);
	if (!text_valid(copy, strlen(copy)) || strlen(copy) > BOUND_NAME_BYTES)
		request_fail(request, OPD_INVALID_ARGUMENT, "op: name of %zu bytes, expected UTF-8 of at most %u", strlen(copy),
		             BOUND_NAME_BYTES);
	return request;
}

void opd_request_destroy(opd_request *request)
{
	if (request == NULL)
		return;
	opd_result_destroy(request->owned);
	arena_fini(&request->arena);
	arena_fini(&request->encoded);
	free(request);
}

/* ---- How to run ---- */

void opd_request_priority(opd_request *request, const char *const *providers, size_t count)
{
	request->form = REQUEST_UNPREPARED;
	if (count > BOUND_PROVIDERS) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: priority list of %zu, at most %u", request->message.run.op.data, count,
		             BOUND_PROVIDERS);
		return;
	}
	struct msg_text *names = arena_array(&request->arena, count, sizeof *names);
	if (names == NULL) {
		request_fail_memory(request);
		return;
	}
	for (size_t i = 0; i < count; i++)
		if (!request_copy_text(request, "provider's name", providers[i], BOUND_NAME_BYTES, &names[i]))
			return;
	request->message.run.priority = (struct msg_list){.present = true, .count = (uint32_t)count, .names = names};
}

void opd_request_strict(opd_request *request, bool strict)
{
	request->form = REQUEST_UNPREPARED;
	request->message.run.strict = strict;
}

void opd_request_explain(opd_request *request, bool explain)
{
	request->form = REQUEST_UNPREPARED;
	request->message.run.explain = explain;
}

void opd_request_uuid(opd_request *request, bool uuid)
{
	request->form = REQUEST_UNPREPARED;
	request->message.run.uuid = uuid;
}

void opd_request_retry(opd_request *request, bool retry)
{
	request->form = REQUEST_UNPREPARED;
	request->message.run.retry = retry;
}

void opd_request_allow_tf32(opd_request *request, bool allow)
{
	request->form = REQUEST_UNPREPARED;
	request->message.run.allow_tf32 = allow;
}

void opd_request_device(opd_request *request, const char *device)
{
	request->form = REQUEST_UNPREPARED;
	(void)request_copy_text(request, "device", device, BOUND_NAME_BYTES, &request->message.run.device);
}

void opd_request_timeout(opd_request *request, uint64_t timeout_us)
{
	request->form = REQUEST_UNPREPARED;
	request->message.run.timeout_us = timeout_us;
}

void opd_request_class(opd_request *request, opd_class service_class)
{
	request->form = REQUEST_UNPREPARED;
	if ((unsigned)service_class > MSG_SERVICE_CLASS_MAX)
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: class %d, which is none", request->message.run.op.data, (int)service_class);
	else
		request->message.run.service_class = (uint32_t)service_class;
}

void opd_request_mode(opd_request *request, opd_mode mode)
{
	request->form = REQUEST_UNPREPARED;
	if (mode != OPD_MODE_RUN && mode != OPD_MODE_FAKE && mode != OPD_MODE_DRY)
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: mode %d, which is none", request->message.run.op.data, (int)mode);
	else
		request->message.run.mode = (msg_mode)mode;
}

/* The output's options, defaults where there were none; NULL: remembered. range: it goes to shared memory, which a fetch's may too. */
static struct msg_output_option *output_option(opd_request *request, uint32_t output, bool range)
{
	struct msg_run *run = &request->message.run;
	request->form = REQUEST_UNPREPARED;
	if (request->kind != MSG_REQUEST_RUN && !(range && request->kind == MSG_REQUEST_FETCH && output == 0)) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: options of output %u, which only runs have", run->op.data, output);
		return NULL;
	}
	if (output >= BOUND_OUTPUTS) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: output %u, expected less than %u", run->op.data, output, BOUND_OUTPUTS);
		return NULL;
	}
	while (request->output_capacity <= output) {
		size_t capacity = 0;
		struct msg_output_option *grown =
		    request_grow(request, request->outputs, request->output_capacity, sizeof *grown, &capacity);
		if (grown == NULL)
			return NULL;
		request->outputs = grown;
		request->output_capacity = (uint32_t)capacity;
	}
	run->outputs = request->outputs;
	if (run->output_count <= output)
		run->output_count = output + 1;
	return &request->outputs[output];
}

void opd_request_output(opd_request *request, uint32_t output, bool keep, bool copy)
{
	struct msg_output_option *option = output_option(request, output, false);
	if (option != NULL)
		*option = (struct msg_output_option){.keep = keep, .no_copy = !copy};
}

void opd_request_output_memory(opd_request *request, uint32_t output, const opd_memory *memory, void *to, uint64_t bytes)
{
	uint64_t offset = 0;
	if (!memory_offset(memory, to, bytes, &offset) || offset % OPD_TENSOR_ALIGNMENT != 0) {
		request_fail(request, OPD_INVALID_ARGUMENT, "%s: output %u, of %llu bytes, doesn't lie at a multiple of 64 in its shared memory of %llu",
		             request->message.run.op.data, output, (unsigned long long)bytes, (unsigned long long)memory->bytes);
		return;
	}
	struct msg_output_option *option = output_option(request, output, true);
	if (option != NULL)
		*option = (struct msg_output_option){.shared = {memory->region, offset, bytes}};
}

/* ---- Preparing ---- */

/* Fills the gap before a tensor whose range begins at a multiple of 64. */
static const uint8_t padding[OPD_TENSOR_ALIGNMENT];

/* Gives each host tensor its range of the payload and lists the pieces that make it up. */
static opd_status request_lay_out(opd_request *request, opd_error *error)
{
	const char *op = request->message.run.op.data;
	uint64_t end = 0;
	request->pieces = arena_array(&request->encoded, request->host_count * 2, sizeof *request->pieces);
	if (request->pieces == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "request of %s: out of memory", op);
	for (size_t i = 0; i < request->host_count; i++) {
		const struct request_host *host = &request->hosts[i];
		uint64_t offset;
		host->tensor->source = MSG_SOURCE_PAYLOAD;
		if (!size_align(end, &offset))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the operands' bytes don't fit in 63 bits", op);
		host->tensor->payload.offset = host->bytes == 0 ? 0 : offset;
		host->tensor->payload.bytes = host->bytes;
		if (host->bytes == 0)
			continue;
		if (offset != end)
			request->pieces[request->piece_count++] = (struct iovec){(void *)(uintptr_t)padding, (size_t)(offset - end)};
		request->pieces[request->piece_count++] = (struct iovec){(void *)(uintptr_t)host->data, (size_t)host->bytes};
		if (!size_add(offset, host->bytes, &end))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the operands' bytes don't fit in 63 bits", op);
	}
	request->payload_bytes = end;
	return OPD_OK;
}

/* No tensor data moves for a fake or a dry run, and none is copied for a direct call. */
static void request_point(opd_request *request, msg_source source)
{
	for (size_t i = 0; i < request->host_count; i++) {
		const struct request_host *host = &request->hosts[i];
		host->tensor->source = source;
		host->tensor->inlined.data = host->data;
		host->tensor->inlined.bytes = (size_t)host->bytes;
	}
}

const struct msg_request *request_message(opd_request *request)
{
	struct msg_request *other = &request->other;
	const struct msg_run *run = &request->message.run;
	other->kind = request->kind;
	switch (request->kind) {
	case MSG_REQUEST_UPLOAD:
		other->upload = (struct msg_upload){.tensor = run->args[0].tensor, .parts = run->args[0].tensor->source == MSG_SOURCE_NONE, .device = run->device};
		return other;
	case MSG_REQUEST_WRITE:
		other->write = (struct msg_write){.handle = request->handle, .offset = request->offset, .data = run->args[0].tensor};
		return other;
	case MSG_REQUEST_FETCH:
		other->fetch = (struct msg_fetch){.tensor = run->args[0].tensor};
		if (run->output_count != 0)
			other->fetch.into = run->outputs[0].shared;
		return other;
	default:
		return &request->message;
	}
}

msg_reply_kind request_expected(const opd_request *request)
{
	return request->kind == MSG_REQUEST_WRITE ? MSG_REPLY_EMPTY : MSG_REPLY_RUN;
}

opd_status request_prepare(opd_request *request, request_form form, opd_error *error)
{
	if (request->form == form)
		return OPD_OK;
	if (request->error.status != OPD_OK)
		return opd_fail(error, (opd_status)request->error.status, "%s", request->error.text);
	request->form = REQUEST_UNPREPARED;
	arena_reset(&request->encoded);
	request->piece_count = 0;
	request->payload_bytes = 0;
	opd_status status = request->once == NULL ? OPD_OK : graph_description(request->once, &request->message.run.once, error);
	if (status != OPD_OK)
		return status;
	if (request->message.run.mode != MSG_RUN)
		request_point(request, MSG_SOURCE_NONE);
	else if (form == REQUEST_DIRECT)
		request_point(request, MSG_SOURCE_INLINE);
	else
		status = request_lay_out(request, error);
	if (status == OPD_OK && form == REQUEST_WIRE)
		status = codec_encode_request(&request->encoded, request_message(request), &request->envelope, error);
	if (status == OPD_OK)
		request->form = form;
	return status;
}
