/* What a run reads: kept tensors and results of others, taken when it is accepted; then where each operand lies. */
#include <inttypes.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/request.h"
#include "server/shared.h"

struct run_waiter {
	struct waiter waiter; /* first */
	struct run_waiter *next;
	struct request *request;
	uint32_t operand;
};

static void on_settled(struct waiter *waiter, struct kept_tensor *tensor, const opd_error *error)
{
	struct run_waiter *mine = (struct run_waiter *)waiter;
	struct request *request = mine->request;
	request->run.kept[mine->operand] = tensor;
	request->run.waiting--;
	if (tensor == NULL && !request->run.failed) {
		request->run.failed = true;
		request->error = *error;
	}
	if (!request->run.failed && donate_arrived(request, mine->operand) != OPD_OK)
		request->run.failed = true;
	run_start(request);
}

static opd_status wait_for_result(struct request *request, uint32_t index)
{
	const struct msg_tensor *source = request->run.bound.operands[index].source;
	struct run_waiter *waiter = arena_zalloc(&request->arena, sizeof *waiter);
	if (waiter == NULL)
		return run_out_of_memory(request);
	waiter->waiter.output = source->result.output;
	waiter->waiter.on_settled = on_settled;
	waiter->request = request;
	waiter->operand = index;
	waiter->next = request->run.waiters;
	request->run.waiters = waiter;
	kept_wait(&request->session->kept, source->result.request, &waiter->waiter);
	request->run.waiting++;
	return OPD_OK;
}

/* Kept operands are taken when the request is accepted: a free that comes later doesn't touch them. */
static opd_status take_kept(struct request *request, uint32_t index)
{
	struct kept *kept = &request->session->kept;
	const struct operand *operand = &request->run.bound.operands[index];
	const struct msg_tensor *source = operand->source;
	bool pending = false;
	if (source->source == MSG_SOURCE_HANDLE)
		request->run.kept[index] = kept_find(kept, source->handle, &request->error);
	else if (source->source == MSG_SOURCE_RESULT)
		request->run.kept[index] = kept_find_result(kept, source->result.request, source->result.output, &pending, &request->error);
	else
		return OPD_OK;
	if (pending)
		return wait_for_result(request, index);
	return request->run.kept[index] != NULL
	           ? OPD_OK
	           : opd_error_prefix(&request->error, (opd_status)request->error.status, "%s: %s", request->run.op->schema->name, operand->param);
}

opd_status run_take_operands(struct request *request)
{
	uint32_t count = request->run.bound.operand_count;
	request->run.kept = arena_array(&request->arena, count, sizeof request->run.kept[0]);
	if (request->run.kept == NULL)
		return run_out_of_memory(request);
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < count; i++)
		status = take_kept(request, i);
	return status;
}

void run_stop_waiting(struct request *request)
{
	for (struct run_waiter *waiter = request->run.waiters; waiter != NULL; waiter = waiter->next)
		if (kept_unwait(&waiter->waiter))
			request->run.waiting--;
}

/* ---- Where they lie ---- */

static opd_status place_payload(struct request *request, struct operand *operand)
{
	const struct msg_tensor *source = operand->source;
	const char *name = request->run.op->schema->name;
	uint64_t end;
	if (source->payload.offset % OPD_TENSOR_ALIGNMENT != 0)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s has payload offset %" PRIu64 ", expected a multiple of 64", name,
		                operand->param, source->payload.offset);
	if (!size_add(source->payload.offset, source->payload.bytes, &end) || end > request->payload_bytes)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT,
		                "%s: %s lies at payload bytes %" PRIu64 " + %" PRIu64 ", but the payload has %" PRIu64, name, operand->param,
		                source->payload.offset, source->payload.bytes, request->payload_bytes);
	unsigned char *data = request->payload == NULL ? NULL : request->payload->data + source->payload.offset;
	return bind_place(request->run.op, operand, data, source->payload.bytes, true, &request->error);
}

/* A direct caller's memory is used where it lies if it is aligned as every buffer is: kernels rely on that, and the same call must be taken by the same provider on
 * both ways. Everything else is copied to where kernels want it. */
static opd_status place_inline(struct request *request, struct operand *operand)
{
	const struct msg_tensor *source = operand->source;
	if (request->direct && (uintptr_t)source->inlined.data % OPD_TENSOR_ALIGNMENT == 0)
		return bind_place(request->run.op, operand, (void *)source->inlined.data, source->inlined.bytes, false, &request->error);
	opd_status status = buffer_alloc(request->session->account, source->inlined.bytes, 0, &operand->buffer, &request->error);
	if (status != OPD_OK)
		return status;
	if (source->inlined.bytes != 0)
		memcpy(operand->buffer->data, source->inlined.data, source->inlined.bytes);
	return bind_place(request->run.op, operand, operand->buffer->data, source->inlined.bytes, !request->direct, &request->error);
}

/* The whole kept tensor, or a view of it. */
static opd_status place_kept(struct request *request, struct operand *operand, const struct kept_tensor *kept)
{
	struct msg_tensor *source = operand->source;
	if (source->dtype == OPD_DTYPE_NONE) {
		source->dtype = kept->dtype;
		source->rank = kept->rank;
		memcpy(source->shape, kept->shape, kept->rank * sizeof kept->shape[0]);
		source->strided = false;
		source->byte_offset = 0;
	} else if (source->dtype != kept->dtype) {
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s views a tensor of %s as %s", request->run.op->schema->name,
		                operand->param, opd_dtype_name(kept->dtype), opd_dtype_name(source->dtype));
	}
	if (buffer_lost(kept->buffer))
		return opd_fail(&request->error, OPD_DATA_LOSS, "%s: %s is lost: it lay on %s, %s", request->run.op->schema->name, operand->param,
		                request->snapshot->devices[kept->buffer->device].name, buffer_lost_why(kept->buffer));
	unsigned char *data = kept->buffer->device == 0 ? kept->buffer->data : NULL; /* what lies on a device is no address for us */
	opd_status status = bind_place(request->run.op, operand, data, kept->bytes, false, &request->error);
	if (status == OPD_OK) {
		operand->tensor.id = kept->id;
		operand->tensor.version = kept->version;
		if (!source->donate)
			operand->tensor.flags |= OPD_TENSOR_CONSTANT;
	}
	return status;
}

/* Strides of 0 make a few bytes as large as a shape can say. What an operand would take if it were laid out is held to the session's limit all the same: a
 * provider may have to lay it out, and four bytes as [1, 2^40] kept a thread in one product for hours. */
opd_status operand_check_extent(const struct session *session, const struct op *op, const struct operand *operand, opd_error *error)
{
	uint64_t limit = atomic_load_explicit(&session->account->limit_bytes, memory_order_relaxed);
	uint64_t bytes = operand->tensor.elements * opd_dtype_bytes(operand->tensor.dtype); /* checked by bind_place */
	if (bytes <= limit)
		return OPD_OK;
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: %s is a view of %" PRIu64 " bytes, of at most %" PRIu64 " that the session may have", op->schema->name,
	                operand->param, bytes, limit);
}

static opd_status place_source(struct request *request, uint32_t index)
{
	struct operand *operand = &request->run.bound.operands[index];
	if (request->run.kept[index] != NULL)
		return place_kept(request, operand, request->run.kept[index]);
	if (operand->source->source == MSG_SOURCE_PAYLOAD)
		return place_payload(request, operand);
	if (operand->source->source == MSG_SOURCE_INLINE)
		return place_inline(request, operand);
	if (operand->source->source == MSG_SOURCE_SHARED)
		return shared_place(request, index);
	if (request->message.run.mode == MSG_RUN)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s has no bytes: give it a payload range, inline bytes, a handle or a result",
		                request->run.op->schema->name, operand->param);
	return bind_place(request->run.op, operand, NULL, UINT64_MAX, false, &request->error);
}

opd_status run_place_operand(struct request *request, uint32_t index)
{
	opd_status status = place_source(request, index);
	if (status != OPD_OK || request->message.run.mode == MSG_FAKE) /* a dry run's plan may try itself out on memory of the operands' sizes */
		return status;
	return operand_check_extent(request->session, request->run.op, &request->run.bound.operands[index], &request->error);
}
