/* Kept tensors going back to their client: whole or a view, from where they lie if that is row-major, else laid out on the lane. From a device only the bytes that are wanted come over,
 * and they don't stay. */
#include <string.h>

#include "proto/tensor.h"
#include "server/bring.h"
#include "server/daemon.h"
#include "server/request.h"

struct fetch {
	struct take take; /* first */
	struct operand operand;
	opd_tensor output;
};

/* What errors call it: a view is checked as an op's operand is. */
static struct schema fetch_schema = {.name = "fetch"};
static const struct op fetch_op = {.schema = &fetch_schema};

static void reply(struct request *request, const void *data)
{
	const struct msg_tensor *source = request->message.fetch;
	struct msg_result *result = arena_zalloc(&request->arena, sizeof *result);
	uint64_t bytes = 0;
	(void)!tensor_bytes(source->dtype, source->rank, source->shape, &bytes); /* checked by bind_place */
	bool made = result != NULL;
	if (made) {
		result->tensor.dtype = source->dtype;
		result->tensor.rank = source->rank;
		memcpy(result->tensor.shape, source->shape, sizeof result->tensor.shape);
		made = request_send(request, &result->tensor, data, bytes);
	}
	if (!made) {
		(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "fetch: out of memory");
		request_fail(request);
		return;
	}
	request->reply.run = (struct msg_run_reply){.output_count = 1, .outputs = result};
	request_reply(request, MSG_REPLY_RUN);
}

/* Copies dimensions from `dimension` on, row-major; returns where the next element goes. */
static unsigned char *lay_out(const opd_tensor *from, uint32_t dimension, const unsigned char *at, unsigned char *to)
{
	size_t element = opd_dtype_bytes(from->dtype);
	if (dimension == from->rank) {
		memcpy(to, at, element);
		return to + element;
	}
	size_t count = (size_t)from->shape[dimension];
	if (dimension + 1 == from->rank && from->strides[dimension] == 1) {
		memcpy(to, at, count * element);
		return to + count * element;
	}
	for (size_t i = 0; i < count; i++)
		to = lay_out(from, dimension + 1, at + i * (size_t)from->strides[dimension] * element, to);
	return to;
}

static void fetch_task(struct request *request)
{
	const opd_tensor *from = &((const struct fetch *)request->task_data)->operand.tensor;
	(void)lay_out(from, 0, opd_tensor_data(from), request->payload->data);
}

static void fetch_done(struct request *request)
{
	reply(request, request->payload->data);
}

static opd_status place(struct request *request, struct fetch *fetch)
{
	struct msg_tensor *source = request->message.fetch;
	const struct kept_tensor *kept = request->tensor;
	if (source->dtype == OPD_DTYPE_NONE) {
		source->dtype = kept->dtype;
		source->rank = kept->rank;
		memcpy(source->shape, kept->shape, kept->rank * sizeof kept->shape[0]);
		source->strided = false;
		source->byte_offset = 0;
	} else if (source->dtype != kept->dtype) {
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "fetch: a view of %s, the tensor is of %s", opd_dtype_name(source->dtype),
		                opd_dtype_name(kept->dtype));
	}
	fetch->operand = (struct operand){.param = "the view", .source = source};
	opd_status status = bind_place(&fetch_op, &fetch->operand, NULL, kept->bytes, false, &request->error);
	if (status != OPD_OK || opd_tensor_contiguous(&fetch->operand.tensor))
		return status;
	return buffer_alloc(request->session->account, fetch->operand.tensor.elements * opd_dtype_bytes(source->dtype), 0, &request->payload,
	                    &request->error);
}

/* The bytes are in host memory. */
static void fetch_here(struct request *request)
{
	struct fetch *fetch = request->task_data;
	opd_tensor *tensor = &fetch->operand.tensor;
	if (request->status == OPD_OK && request->cancelled)
		request->status = opd_fail(&request->error, OPD_CANCELLED, "fetch: the client cancelled the request");
	if (request->status != OPD_OK) {
		request_fail(request);
		return;
	}
	if (request->tensor->buffer->device != 0)
		tensor->byte_offset = 0; /* only what is wanted came over */
	tensor->data = request->staged->data;
	if (request->payload == NULL)
		reply(request, opd_tensor_data(tensor));
	else
		request_task(request, fetch_task, fetch_done);
}

static void fetch_ready(struct request *request)
{
	struct fetch *fetch = request->task_data;
	uint64_t end = 0;
	if (request->tensor == NULL || place(request, fetch) != OPD_OK) {
		request_fail(request);
		return;
	}
	const opd_tensor *tensor = &fetch->operand.tensor;
	const uint64_t first = opd_tensor_empty(tensor) ? 0 : tensor->byte_offset;
	(void)!tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strides, first, &end); /* checked by bind_place */
	bring_to_host(request, request->tensor->buffer, first, end < first ? 0 : end - first, "fetch", fetch_here);
}

static void on_settled(struct waiter *waiter, struct kept_tensor *tensor, const opd_error *error)
{
	struct take *take = (struct take *)waiter;
	struct request *request = take->request;
	request->tensor = tensor;
	if (tensor == NULL)
		request->error = *error;
	take->waiting = false;
	if (request->started)
		take->ready(request);
}

opd_status take_accept(struct request *request, struct take *take, const struct msg_tensor *source, const char *what, void (*ready)(struct request *))
{
	struct kept *kept = &request->session->kept;
	request->task_data = take;
	take->request = request;
	take->ready = ready;
	if (source->donate)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: the tensor has donate", what);
	if (source->source == MSG_SOURCE_HANDLE)
		request->tensor = kept_find(kept, source->handle, &request->error);
	else if (source->source == MSG_SOURCE_RESULT)
		request->tensor = kept_find_result(kept, source->result.request, source->result.output, &take->waiting, &request->error);
	else
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: the tensor is neither a handle nor a result", what);
	if (take->waiting) {
		take->waiter = (struct waiter){.output = source->result.output, .on_settled = on_settled};
		kept_wait(kept, source->result.request, &take->waiter);
	} else if (request->tensor == NULL) {
		return opd_error_prefix(&request->error, (opd_status)request->error.status, "%s", what);
	}
	return OPD_OK;
}

void take_start(struct request *request)
{
	struct take *take = request->task_data;
	if (!take->waiting)
		take->ready(request);
}

opd_status fetch_accept(struct request *request)
{
	struct fetch *fetch = arena_zalloc(&request->arena, sizeof *fetch);
	if (fetch == NULL)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "fetch: out of memory");
	return take_accept(request, &fetch->take, request->message.fetch, "fetch", fetch_ready);
}

void take_stop_waiting(struct request *request)
{
	struct take *take = request->task_data;
	if (take != NULL && kept_unwait(&take->waiter))
		take->waiting = false;
}
