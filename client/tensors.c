/* Tensors that stay in the session: uploads, whole or in parts, and fetches. */
#include <stdlib.h>
#include <time.h>

#include "client/connection.h"
#include "client/request.h"

#define PART_BYTES ((uint64_t)4 << 20)
#define WINDOW 8u /* parts in flight: enough that the server never waits for the client's next one */
#define TRIES 5u
#define PAUSE_NS 20000000 /* after a refusal, times the number of tries so far: memory comes back as others finish */

/* ---- Requests ---- */

static opd_request *operand_request(const char *name, msg_request_kind kind, const opd_operand *operand)
{
	opd_request *request = opd_request_create(name);
	if (request == NULL)
		return NULL;
	opd_request_tensor(request, "tensor", operand);
	request->kind = kind;
	return request;
}

opd_request *opd_upload_create(const opd_operand *operand)
{
	opd_request *request = operand_request("upload", MSG_REQUEST_UPLOAD, operand);
	if (request == NULL || request->error.status != OPD_OK)
		return request;
	const struct msg_tensor *tensor = request->message.run.args[0].tensor;
	if (operand->source != OPD_FROM_HOST && operand->source != OPD_FROM_MEMORY && operand->source != OPD_FROM_NOTHING)
		request_fail(request, OPD_INVALID_ARGUMENT, "upload: the operand has source %d, expected host data, shared memory (or nothing: bytes that follow in writes)",
		             (int)operand->source);
	else if (tensor->strided || tensor->byte_offset != 0)
		request_fail(request, OPD_INVALID_ARGUMENT, "upload: the operand has strides or a byte offset, expected it row-major");
	return request;
}

opd_request *opd_write_create(opd_handle handle, uint64_t offset, const void *data, uint64_t bytes)
{
	const int64_t shape = bytes <= INT64_MAX ? (int64_t)bytes : -1;
	const opd_operand operand = {.struct_bytes = sizeof operand, .dtype = OPD_u8, .rank = 1, .shape = &shape, .data = data};
	opd_request *request = operand_request("write", MSG_REQUEST_WRITE, &operand);
	if (request == NULL)
		return NULL;
	request->handle = (struct msg_handle){handle.index, handle.generation};
	request->offset = offset;
	return request;
}

opd_request *opd_fetch_create(const opd_operand *operand)
{
	opd_request *request = operand_request("fetch", MSG_REQUEST_FETCH, operand);
	if (request != NULL && operand->source != OPD_FROM_HANDLE && operand->source != OPD_FROM_RESULT)
		request_fail(request, OPD_INVALID_ARGUMENT, "fetch: the operand has source %d, expected a handle or a result", (int)operand->source);
	return request;
}

/* ---- Uploads that wait ---- */

/* One part: sent, and sent again after a refusal that may pass. */
struct part {
	opd_request *request;
	opd_ticket ticket; /* 0: none in flight */
	uint64_t bytes;
	unsigned tries;
};

struct upload {
	opd_client *client;
	const opd_upload_options *options;
	const uint8_t *data;
	uint64_t bytes;
	uint64_t part_bytes;
	uint64_t begun;
	uint64_t done;
	opd_handle handle;
	struct part parts[WINDOW];
};

static opd_status no_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "upload: out of memory");
}

/* Runs a request of one output that is its own; the handle is the output's. */
static opd_status run_for_handle(opd_client *client, opd_request *request, opd_handle *handle_out, opd_error *error)
{
	if (request == NULL)
		return no_memory(error);
	opd_result *result = NULL;
	opd_status status = opd_run(client, request, &result, error);
	if (status == OPD_OK)
		*handle_out = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return status;
}

static opd_status part_send(struct upload *upload, struct part *part, opd_error *error)
{
	part->tries++;
	return opd_submit(upload->client, part->request, &part->ticket, error);
}

static opd_status part_begin(struct upload *upload, struct part *part, opd_error *error)
{
	const uint64_t left = upload->bytes - upload->begun;
	part->bytes = left < upload->part_bytes ? left : upload->part_bytes;
	part->tries = 0;
	part->request = opd_write_create(upload->handle, upload->begun, upload->data + upload->begun, part->bytes);
	if (part->request == NULL)
		return no_memory(error);
	upload->begun += part->bytes;
	return part_send(upload, part, error);
}

/* What passes by itself when others finish. */
static bool part_again(const struct part *part, const opd_client *client, opd_status status)
{
	return status == OPD_RESOURCE_EXHAUSTED && part->tries < TRIES && client->failure.status == OPD_OK;
}

/* Until it is there, whatever that takes of attempts. */
static opd_status part_finish(struct upload *upload, struct part *part, opd_error *error)
{
	const uint64_t timeout_us = upload->client->timeout_us == 0 ? UINT64_MAX : upload->client->timeout_us;
	for (;;) {
		opd_result *result;
		opd_status status = opd_wait(upload->client, part->ticket, timeout_us, &result, error);
		if (status == OPD_DEADLINE_EXCEEDED && result == NULL)
			return status; /* still in flight: cancelled with the others */
		opd_result_destroy(result);
		part->ticket = 0;
		if (status != OPD_OK && part_again(part, upload->client, status)) {
			const struct timespec pause = {.tv_nsec = PAUSE_NS * (long)part->tries};
			(void)nanosleep(&pause, NULL);
			status = part_send(upload, part, error);
			if (status == OPD_OK)
				continue;
		}
		if (status != OPD_OK)
			return status;
		upload->done += part->bytes;
		opd_request_destroy(part->request);
		part->request = NULL;
		if (upload->options != NULL && upload->options->on_progress != NULL)
			upload->options->on_progress(upload->options->progress_data, upload->done, upload->bytes);
		return OPD_OK;
	}
}

static opd_status upload_parts(struct upload *upload, opd_error *error)
{
	opd_status status = OPD_OK;
	for (unsigned at = 0; status == OPD_OK && upload->done != upload->bytes; at = (at + 1) % WINDOW) {
		struct part *part = &upload->parts[at];
		if (part->request != NULL)
			status = part_finish(upload, part, error);
		if (status == OPD_OK && upload->begun != upload->bytes)
			status = part_begin(upload, part, error);
	}
	for (unsigned i = 0; i < WINDOW; i++) {
		if (upload->parts[i].ticket != 0)
			opd_cancel(upload->client, upload->parts[i].ticket);
		opd_request_destroy(upload->parts[i].request);
	}
	return status;
}

static const char *wanted_device(const opd_upload_options *options)
{
	return options != NULL && options->struct_bytes >= sizeof *options ? options->device : NULL;
}

static opd_status upload_in_parts(struct upload *upload, const opd_operand *operand, opd_error *error)
{
	opd_operand bare = *operand;
	bare.source = OPD_FROM_NOTHING;
	opd_request *request = opd_upload_create(&bare);
	if (request != NULL)
		opd_request_device(request, wanted_device(upload->options));
	opd_status status = run_for_handle(upload->client, request, &upload->handle, error);
	if (status != OPD_OK)
		return status;
	status = upload_parts(upload, error);
	if (status != OPD_OK && upload->client->failure.status == OPD_OK)
		(void)!opd_free(upload->client, &upload->handle, 1, NULL);
	return status;
}

/* The request, its checks done; the operand's bytes in *bytes_out. */
static opd_status check_upload(const opd_operand *operand, const opd_upload_options *options, opd_request **request_out, uint64_t *bytes_out,
                               opd_error *error)
{
	if (options != NULL && options->struct_bytes < offsetof(opd_upload_options, device))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "upload: options have struct_bytes %u, expected %zu", options->struct_bytes, sizeof *options);
	opd_request *request = opd_upload_create(operand);
	if (request == NULL)
		return no_memory(error);
	opd_request_device(request, wanted_device(options));
	if (request->error.status == OPD_OK && operand->source != OPD_FROM_HOST && operand->source != OPD_FROM_MEMORY)
		request_fail(request, OPD_INVALID_ARGUMENT, "upload: the operand has source %d, expected host data or shared memory", (int)operand->source);
	if (request->error.status != OPD_OK) {
		opd_status status = opd_fail(error, (opd_status)request->error.status, "%s", request->error.text);
		opd_request_destroy(request);
		return status;
	}
	*bytes_out = operand->source == OPD_FROM_MEMORY ? request->message.run.args[0].tensor->shared.bytes : request->hosts[0].bytes;
	*request_out = request;
	return OPD_OK;
}

static opd_status upload_shared(const struct upload *upload, opd_request *request, opd_handle *handle_out, opd_error *error)
{
	opd_status status = run_for_handle(upload->client, request, handle_out, error);
	if (status == OPD_OK && upload->options != NULL && upload->options->on_progress != NULL)
		upload->options->on_progress(upload->options->progress_data, upload->bytes, upload->bytes);
	return status;
}

opd_status opd_upload(opd_client *client, const opd_operand *operand, const opd_upload_options *options, opd_handle *handle_out, opd_error *error)
{
	struct upload upload = {.client = client, .options = options, .part_bytes = PART_BYTES};
	opd_request *request = NULL;
	opd_status status = check_upload(operand, options, &request, &upload.bytes, error);
	if (status != OPD_OK)
		return status;
	if (operand->source == OPD_FROM_MEMORY) /* nothing is sent: one request, however large */
		return upload_shared(&upload, request, handle_out, error);
	const uint64_t limit = client->session.payload_bytes;
	const bool watched = options != NULL && (options->on_progress != NULL || options->part_bytes != 0);
	if (upload.bytes == 0 || (!watched && (limit == 0 || upload.bytes <= limit)))
		return run_for_handle(client, request, handle_out, error);
	upload.data = request->hosts[0].data;
	opd_request_destroy(request);
	if (options != NULL && options->part_bytes != 0)
		upload.part_bytes = options->part_bytes;
	if (limit != 0 && upload.part_bytes > limit)
		upload.part_bytes = limit;
	status = upload_in_parts(&upload, operand, error);
	if (status == OPD_OK)
		*handle_out = upload.handle;
	return status;
}

opd_status opd_fetch(opd_client *client, const opd_operand *operand, opd_result **result_out, opd_error *error)
{
	*result_out = NULL;
	opd_request *request = opd_fetch_create(operand);
	if (request == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "fetch: out of memory");
	opd_status status = opd_run(client, request, result_out, error);
	opd_request_destroy(request);
	return status;
}
