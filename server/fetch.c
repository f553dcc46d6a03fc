/* Kept tensors going back to their client: whole or a view, from where they lie if that is row-major, else laid out on the lane; or copied into a range of shared memory. From a device
 * only the bytes that are wanted come over, and they don't stay. */
#include <inttypes.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/bring.h"
#include "server/daemon.h"
#include "server/request.h"
#include "server/shared.h"

/* Up to here a row-major tensor is copied into its range on the loop: 10 us. */
#define COPY_ON_LOOP_BYTES (64u << 10)

struct fetch {
	struct take take; /* first */
	struct operand operand;
};

/* What errors call it: a view is checked as an op's operand is. */
static struct schema fetch_schema = {.name = "fetch"};
static const struct op fetch_op = {.schema = &fetch_schema};

static uint64_t bytes_of(const struct request *request)
{
	const struct msg_tensor *source = request->message.fetch.tensor;
	uint64_t bytes = 0;
	(void)!tensor_bytes(source->dtype, source->rank, source->shape, &bytes); /* checked by bind_place */
	return bytes;
}

/* The range that it goes to; NULL: it is sent. */
static const struct msg_shared_range *range_of(const struct request *request)
{
	return request->message.fetch.into.region == 0 ? NULL : &request->message.fetch.into;
}

/* Says where its bytes are. False: out of memory. */
static bool describe(struct request *request, struct msg_tensor *tensor, const void *data)
{
	const struct msg_tensor *source = request->message.fetch.tensor;
	const struct msg_shared_range *range = range_of(request);
	tensor->dtype = source->dtype;
	tensor->rank = source->rank;
	memcpy(tensor->shape, source->shape, sizeof tensor->shape);
	if (range == NULL)
		return request_send(request, tensor, data, bytes_of(request));
	tensor->source = MSG_SOURCE_SHARED;
	tensor->shared.region = range->region;
	tensor->shared.offset = range->offset;
	tensor->shared.bytes = bytes_of(request);
	return true;
}

static void reply(struct request *request, const void *data)
{
	struct msg_result *result = arena_zalloc(&request->arena, sizeof *result);
	if (result == NULL || !describe(request, &result->tensor, data)) {
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

/* Where its bytes are laid out; NULL: nowhere, they are sent from where they lie. */
static unsigned char *target(const struct request *request)
{
	if (range_of(request) != NULL)
		return shared_range(request, range_of(request)->offset);
	return request->payload == NULL ? NULL : request->payload->data;
}

static void fetch_task(struct request *request)
{
	const opd_tensor *from = &((const struct fetch *)request->task_data)->operand.tensor;
	const uint64_t bytes = bytes_of(request);
	if (!opd_tensor_contiguous(from))
		(void)lay_out(from, 0, opd_tensor_data(from), target(request));
	else if (bytes != 0)
		memcpy(target(request), opd_tensor_data(from), bytes);
}

static void fetch_done(struct request *request)
{
	reply(request, target(request));
}

static opd_status check_room(struct request *request)
{
	const struct msg_shared_range *range = range_of(request);
	const uint64_t bytes = bytes_of(request);
	if (range == NULL || bytes <= range->bytes)
		return OPD_OK;
	return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "fetch: the tensor has %" PRIu64 " bytes, but %" PRIu64 " of region %u were named", bytes, range->bytes,
	                (unsigned)range->region);
}

static opd_status place(struct request *request, struct fetch *fetch)
{
	struct msg_tensor *source = request->message.fetch.tensor;
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
	if (status == OPD_OK)
		status = check_room(request);
	if (status != OPD_OK || range_of(request) != NULL || opd_tensor_contiguous(&fetch->operand.tensor))
		return status;
	return buffer_alloc(request->session->account, bytes_of(request), 0, &request->payload, &request->error);
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
	if (target(request) == NULL) {
		reply(request, opd_tensor_data(tensor));
	} else if (opd_tensor_contiguous(tensor) && bytes_of(request) <= COPY_ON_LOOP_BYTES) {
		fetch_task(request);
		fetch_done(request);
	} else {
		request_task(request, fetch_task, fetch_done);
	}
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
	if (range_of(request) != NULL && shared_take_range(request, "fetch", "the range", range_of(request)) != OPD_OK)
		return (opd_status)request->error.status;
	return take_accept(request, &fetch->take, request->message.fetch.tensor, "fetch", fetch_ready);
}

void take_stop_waiting(struct request *request)
{
	struct take *take = request->task_data;
	if (take != NULL && kept_unwait(&take->waiter))
		take->waiting = false;
}
