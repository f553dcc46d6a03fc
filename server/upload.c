/* Tensors that clients bring: whole, their payload becoming the tensor, or in parts that are copied to their place. One that is to live on a device is copied there from the
 * payload, which then goes: no copy stays in host memory. A large one begins to be copied there before all of it has come (server/device_ahead.c). */
#include <inttypes.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/device_run.h"
#include "server/request.h"
#include "server/shared.h"

/* Up to here a part is copied on the loop: 10 us. */
#define COPY_ON_LOOP_BYTES (64u << 10)

static opd_status out_of_memory(struct request *request, const char *what)
{
	return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", what);
}

static uint64_t sent_bytes(const struct msg_tensor *tensor)
{
	return tensor->source == MSG_SOURCE_PAYLOAD ? tensor->payload.bytes : tensor->source == MSG_SOURCE_SHARED ? tensor->shared.bytes : tensor->inlined.bytes;
}

/* Its bytes are the whole payload, inline, or a range of shared memory, and are as many as `bytes`; a payload that isn't them comes with none. */
static opd_status check_source(struct request *request, const char *what, const struct msg_tensor *tensor, uint64_t bytes)
{
	const uint64_t sent = sent_bytes(tensor);
	if (tensor->source != MSG_SOURCE_PAYLOAD && tensor->source != MSG_SOURCE_INLINE && tensor->source != MSG_SOURCE_SHARED)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: the tensor's bytes are neither payload, inline nor shared", what);
	if (tensor->source == MSG_SOURCE_PAYLOAD && (tensor->payload.offset != 0 || tensor->payload.bytes != request->payload_bytes))
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT,
		                "%s: the tensor lies at payload bytes %" PRIu64 " + %" PRIu64 ", expected the whole payload of %" PRIu64, what,
		                tensor->payload.offset, tensor->payload.bytes, request->payload_bytes);
	if (tensor->source != MSG_SOURCE_PAYLOAD && request->payload_bytes != 0)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: the tensor's bytes are %s, expected no payload, but %" PRIu64 " bytes of one come", what,
		                tensor->source == MSG_SOURCE_INLINE ? "inline" : "shared", request->payload_bytes);
	if (sent != bytes)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: the tensor has %" PRIu64 " bytes, but %" PRIu64 " were sent", what, bytes,
		                sent);
	return tensor->source == MSG_SOURCE_SHARED ? shared_take_range(request, what, "the tensor", &tensor->shared) : OPD_OK;
}

static opd_status check_upload(struct request *request, const struct msg_upload *message, uint64_t *bytes_out)
{
	const struct msg_tensor *tensor = message->tensor;
	if (!opd_dtype_valid(tensor->dtype))
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "upload: the tensor has no dtype");
	if (tensor->strided || tensor->byte_offset != 0 || tensor->donate)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "upload: the tensor has %s, expected it row-major from its first byte",
		                tensor->strided ? "strides" : tensor->donate ? "donate" : "a byte offset");
	if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, bytes_out))
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "upload: an extent is negative, or the tensor has more than 2^63 - 1 bytes");
	if (!message->parts)
		return check_source(request, "upload", tensor, *bytes_out);
	if (tensor->source != MSG_SOURCE_NONE || request->payload_bytes != 0)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "upload: with parts the tensor brings no bytes");
	return OPD_OK;
}

opd_status upload_accept(struct request *request)
{
	const struct msg_upload *message = &request->message.upload;
	uint64_t bytes;
	opd_status status = check_upload(request, message, &bytes);
	if (status == OPD_OK && (status = device_wanted(request, message->device, &request->move.device)) != OPD_OK)
		(void)opd_error_prefix(&request->error, status, "upload");
	const bool elsewhere = request->move.device != 0 && (message->parts || message->tensor->source == MSG_SOURCE_SHARED);
	if (status == OPD_OK && request->payload_bytes == 0 && !elsewhere)
		status = buffer_alloc(request->session->account, bytes, 0, &request->payload, &request->error);
	if (status != OPD_OK)
		return status;
	if (!message->parts && message->tensor->source == MSG_SOURCE_INLINE && bytes != 0)
		memcpy(request->payload->data, message->tensor->inlined.data, bytes);
	status = kept_expect(&request->session->kept, request->id, 1, &request->error);
	request->run.expected = status == OPD_OK;
	return status;
}

static uint64_t upload_bytes(const struct request *request)
{
	const struct msg_tensor *tensor = request->message.upload.tensor;
	uint64_t bytes = 0;
	(void)!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &bytes); /* checked when it was accepted */
	return bytes;
}

static struct kept_tensor *upload_tensor(struct request *request, struct buffer *buffer)
{
	const struct msg_tensor *from = request->message.upload.tensor;
	const uint64_t bytes = upload_bytes(request);
	struct kept_tensor *tensor = kept_tensor_create(from->dtype, from->rank, from->shape, bytes, buffer);
	if (tensor == NULL || !request->message.upload.parts || bytes == 0)
		return tensor;
	tensor->parts = parts_create();
	if (tensor->parts != NULL)
		return tensor;
	kept_tensor_unref(tensor);
	return NULL;
}

static void upload_settle(struct request *request, struct buffer *buffer)
{
	struct msg_result *result = arena_zalloc(&request->arena, sizeof *result);
	struct kept_tensor *tensor = result == NULL ? NULL : upload_tensor(request, buffer);
	if (tensor == NULL) {
		(void)out_of_memory(request, "upload");
		request_fail(request);
		return;
	}
	result->tensor = *request->message.upload.tensor;
	result->tensor.source = MSG_SOURCE_NONE;
	request->run.expected = false;
	kept_settle(&request->session->kept, request->id, &tensor, 1, &result->kept);
	if (result->kept.generation == 0) {
		(void)out_of_memory(request, "upload");
		request_fail(request);
		return;
	}
	request->reply.run = (struct msg_run_reply){.output_count = 1, .outputs = result};
	request_reply(request, MSG_REPLY_RUN);
}

/* Its bytes are on the device; or it has room there, for those that follow. */
static void upload_moved(struct request *request)
{
	struct buffer *buffer = request->move.buffer;
	if (request->status == OPD_OK)
		upload_settle(request, buffer);
	else
		request_fail(request);
	buffer_unref(buffer);
}

/* What goes to a device is read where it lies, also in shared memory: the copy there is the one that its client can't reach. */
static void *upload_source(const struct request *request)
{
	const struct msg_tensor *tensor = request->message.upload.tensor;
	return tensor->source == MSG_SOURCE_SHARED ? shared_range(request, tensor->shared.offset) : request->payload->data;
}

/* The payload's buffer is the tensor's: nothing is copied, but to a device. */
static void upload_go(struct request *request)
{
	const bool parts = request->message.upload.parts;
	if (request->move.device == 0) {
		upload_settle(request, request->payload);
		return;
	}
	if (device_ahead_finish(request, upload_moved))
		return;
	request->move = (struct device_move){.device = request->move.device, .bytes = upload_bytes(request), .host = parts ? NULL : upload_source(request)};
	device_move_start(request, "upload", upload_moved);
}

static void upload_copy(struct request *request)
{
	const struct msg_tensor *tensor = request->message.upload.tensor;
	memcpy(request->payload->data, shared_range(request, tensor->shared.offset), tensor->shared.bytes);
}

/* What lies in shared memory is copied, since its client may go on writing there. */
void upload_start(struct request *request)
{
	const struct msg_tensor *tensor = request->message.upload.tensor;
	if (tensor->source == MSG_SOURCE_SHARED && request->move.device != 0) {
		upload_go(request);
		return;
	}
	if (tensor->source == MSG_SOURCE_SHARED && tensor->shared.bytes > COPY_ON_LOOP_BYTES) {
		request_task(request, upload_copy, upload_go);
		return;
	}
	if (tensor->source == MSG_SOURCE_SHARED && tensor->shared.bytes != 0)
		upload_copy(request);
	upload_go(request);
}

/* ---- Parts ---- */

static opd_status not_in_parts(struct request *request)
{
	const struct msg_handle handle = request->message.write.handle;
	return opd_fail(&request->error, OPD_FAILED_PRECONDITION, "write: handle %u.%016" PRIx64 " is complete: its bytes don't change any more",
	                (unsigned)handle.index, handle.generation);
}

opd_status write_accept(struct request *request)
{
	const struct msg_write *message = &request->message.write;
	const struct msg_tensor *data = message->data;
	uint64_t end;
	if (data->dtype != OPD_u8 || data->rank != 1 || data->shape[0] < 1 || data->strided || data->byte_offset != 0 || data->donate)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "write: data is no row-major u8 tensor of rank 1 with at least one element");
	opd_status status = check_source(request, "write", data, (uint64_t)data->shape[0]);
	if (status != OPD_OK)
		return status;
	request->tensor = kept_find_any(&request->session->kept, message->handle, &request->error);
	if (request->tensor == NULL)
		return opd_error_prefix(&request->error, (opd_status)request->error.status, "write");
	if (request->tensor->parts == NULL)
		return not_in_parts(request);
	if (!size_add(message->offset, (uint64_t)data->shape[0], &end) || end > request->tensor->bytes)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "write: bytes %" PRIu64 " + %" PRIi64 " don't lie in the tensor's %" PRIu64,
		                message->offset, data->shape[0], request->tensor->bytes);
	return OPD_OK;
}

static const void *write_source(const struct request *request)
{
	const struct msg_tensor *data = request->message.write.data;
	if (data->source == MSG_SOURCE_SHARED)
		return shared_range(request, data->shared.offset);
	return data->source == MSG_SOURCE_PAYLOAD ? request->payload->data : data->inlined.data;
}

static void write_copy(struct request *request)
{
	const struct msg_write *message = &request->message.write;
	memcpy(request->tensor->buffer->data + message->offset, write_source(request), (size_t)message->data->shape[0]);
}

static void write_done(struct request *request)
{
	const struct msg_write *message = &request->message.write;
	struct kept_tensor *tensor = request->tensor;
	tensor->parts->writing--;
	opd_status status = request->status;
	if (status == OPD_OK)
		status = parts_add(tensor->parts, message->offset, message->offset + (uint64_t)message->data->shape[0], &request->error);
	if (tensor->parts->received_bytes == tensor->bytes && tensor->parts->writing == 0) {
		parts_destroy(tensor->parts);
		tensor->parts = NULL;
	}
	if (status == OPD_OK)
		request_reply(request, MSG_REPLY_EMPTY);
	else
		request_fail(request);
}

void write_start(struct request *request)
{
	if (request->tensor->parts == NULL) { /* complete since it was accepted */
		(void)not_in_parts(request);
		request_fail(request);
		return;
	}
	request->tensor->parts->writing++;
	request->status = OPD_OK;
	if (request->tensor->buffer->device != 0) {
		const struct msg_write *message = &request->message.write;
		request->move = (struct device_move){.device = request->tensor->buffer->device,
		                                     .buffer = request->tensor->buffer,
		                                     .offset = message->offset,
		                                     .bytes = (uint64_t)message->data->shape[0],
		                                     .host = (void *)(uintptr_t)write_source(request)};
		device_move_start(request, "write", write_done);
		return;
	}
	if ((uint64_t)request->message.write.data->shape[0] > COPY_ON_LOOP_BYTES) {
		request_task(request, write_copy, write_done);
		return;
	}
	write_copy(request);
	write_done(request);
}
