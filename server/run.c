/* Running an op: bind, wait for operands, infer, dispatch, execute, reply. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/tensor.h"
#include "proto/text.h"
#include "server/daemon.h"
#include "server/differential.h"
#include "server/metrics.h"
#include "server/request.h"
#include "server/shared.h"

static void run_ready(struct request *request);

static opd_status out_of_memory(struct request *request)
{
	return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "run: out of memory");
}

/* ---- Which list ---- */

/* The list that holds: the request's own, the session's, the server's or the configuration's; nearest wins whole. */
static opd_status find_list(struct request *request, const struct msg_run *run, const struct op *op)
{
	const struct snapshot *snapshot = request->snapshot;
	struct effective **made = &request->run.list_made;
	opd_status status = OPD_OK;
	struct plist *list = run->priority.present ? NULL : session_priority(request->session, op->index);
	if (run->priority.present)
		status = context_list(request->context, snapshot, op, &run->priority, made, &request->error);
	else if (list != NULL && (*made = effective_get(snapshot, op, list)) == NULL)
		status = out_of_memory(request);
	request->run.effective = *made != NULL ? *made : op->fallback;
	return status;
}

/* The same, cut for the device that the request asks for. */
static opd_status find_list_for_device(struct request *request, const struct msg_run *run, const struct op *op)
{
	struct device_filter filter;
	opd_status status = device_filter_parse(run->device, &filter, &request->error);
	if (status != OPD_OK)
		return status;
	msg_level level = MSG_LEVEL_REQUEST;
	const struct plist *stored = NULL;
	const struct msg_text *names = run->priority.names;
	uint32_t count = run->priority.count;
	if (run->priority.present) {
		status = plist_check(request->snapshot, op, names, count, &request->error);
		if (status != OPD_OK)
			return status;
	} else {
		struct plist *list = session_priority(request->session, op->index);
		if (list == NULL)
			list = op->fallback->list;
		level = list->level;
		names = list->names;
		count = list->count;
		stored = list;
	}
	struct effective *made = effective_create(request->snapshot, op, level, names, count, &filter, NULL);
	request->run.effective = request->run.list_made = made;
	if (made == NULL || (stored != NULL && !effective_add_cases(made, request->snapshot, op, stored, &filter)))
		return out_of_memory(request);
	return OPD_OK;
}

static void warn_of_fallback(struct request *request, const struct msg_run *run, const struct op *op)
{
	struct effective *effective = request->run.effective;
	_Atomic uint32_t *once = NULL;
	if ((!effective->appended && effective->case_count == 0) || run->strict || run->mode == MSG_FAKE)
		return;
	if (effective->level == MSG_LEVEL_SESSION)
		once = session_priority(request->session, op->index)->warned;
	else if (effective->level != MSG_LEVEL_REQUEST)
		once = op->fallback->list->warned;
	effective_warn(effective, op, request->context->server->log, once, &request->context->server->list_warnings);
}

/* ---- Operands ---- */

struct run_waiter {
	struct waiter waiter; /* first */
	struct run_waiter *next;
	struct request *request;
	uint32_t operand;
};

/* Goes on when payload and all results are there. */
static void run_proceed(struct request *request)
{
	if (request->run.waiting != 0 || !request->started)
		return;
	if (request->run.failed)
		request_fail(request);
	else
		run_ready(request);
}

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
	run_proceed(request);
}

static opd_status wait_for_result(struct request *request, uint32_t index)
{
	const struct msg_tensor *source = request->run.bound.operands[index].source;
	struct run_waiter *waiter = arena_zalloc(&request->arena, sizeof *waiter);
	if (waiter == NULL)
		return out_of_memory(request);
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

static opd_status take_all_kept(struct request *request)
{
	uint32_t count = request->run.bound.operand_count;
	request->run.kept = arena_array(&request->arena, count, sizeof request->run.kept[0]);
	if (request->run.kept == NULL)
		return out_of_memory(request);
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < count; i++)
		status = take_kept(request, i);
	return status;
}

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
		return opd_fail(&request->error, OPD_DATA_LOSS, "%s: %s is lost: it lay on %s, which was lost", request->run.op->schema->name, operand->param,
		                request->snapshot->devices[kept->buffer->device].name);
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
static opd_status check_extent(struct request *request, const struct operand *operand)
{
	uint64_t limit = atomic_load_explicit(&request->session->account->limit_bytes, memory_order_relaxed);
	uint64_t bytes = operand->tensor.elements * opd_dtype_bytes(operand->tensor.dtype); /* checked by bind_place */
	if (bytes <= limit || request->message.run.mode != MSG_RUN)
		return OPD_OK;
	return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: %s is a view of %" PRIu64 " bytes, of at most %" PRIu64 " that the session may have",
	                request->run.op->schema->name, operand->param, bytes, limit);
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

static opd_status place_operand(struct request *request, uint32_t index)
{
	opd_status status = place_source(request, index);
	return status == OPD_OK ? check_extent(request, &request->run.bound.operands[index]) : status;
}

/* ---- Accepting ---- */

/* Before memory is charged for it: bytes that no operand lies in are a mistake of the client's. Ranges themselves are checked when placed. */
static opd_status check_payload(struct request *request)
{
	const struct bound *bound = &request->run.bound;
	uint64_t needed = 0;
	for (uint32_t i = 0; i < bound->operand_count; i++) {
		const struct msg_tensor *source = bound->operands[i].source;
		uint64_t end;
		if (source->source != MSG_SOURCE_PAYLOAD)
			continue;
		if (!size_add(source->payload.offset, source->payload.bytes, &end))
			return OPD_OK;
		needed = end > needed ? end : needed;
	}
	uint64_t padding = needed == 0 ? 0 : OPD_TENSOR_ALIGNMENT;
	if (request->payload_bytes <= needed || request->payload_bytes - needed <= padding)
		return OPD_OK;
	return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: the payload has %" PRIu64 " bytes, its operands end at %" PRIu64,
	                request->run.op->schema->name, request->payload_bytes, needed);
}

static bool keeps_any(const struct msg_run *run)
{
	bool keeps = false;
	for (uint32_t i = 0; i < run->output_count; i++)
		keeps = keeps || run->outputs[i].keep;
	return keeps && run->mode == MSG_RUN;
}

static opd_status expect_kept(struct request *request, const struct msg_run *run)
{
	if (!keeps_any(run) && request->run.donation_count == 0)
		return OPD_OK;
	opd_status status = kept_expect(&request->session->kept, request->id, request->run.op->schema->result_count, &request->error);
	request->run.expected = status == OPD_OK;
	return status;
}

/* What it asks for, but nothing more urgent than its tenant may. */
static sched_class class_of(const struct request *request)
{
	const uint32_t asked = request->message.run.service_class;
	const struct session *session = request->session;
	const sched_class class = asked == 0 ? session->class : (sched_class)(asked - 1);
	return class < session->tenant->policy.class_max ? session->tenant->policy.class_max : class;
}

opd_status run_take(struct request *request)
{
	const struct msg_run *run = &request->message.run;
	opd_status status = check_payload(request);
	if (status == OPD_OK)
		status = take_all_kept(request);
	if (status == OPD_OK)
		status = shared_take(request);
	if (status == OPD_OK)
		status = donate_accept(request);
	if (status == OPD_OK)
		status = expect_kept(request, run);
	if (run->explain) {
		request->clock.accepted = request_now_ns();
		request->session->explains = true;
	}
	if (status == OPD_OK && run->service_class != 0)
		status = access_check_class(request->session->access, (sched_class)(run->service_class - 1), request->context->server->log, &request->error);
	request->run.class = class_of(request);
	if (run->timeout_us != 0)
		request->run.deadline_ns = request->clock.received + (run->timeout_us < UINT64_MAX / 2000 ? run->timeout_us * 1000 : UINT64_MAX / 2);
	if (request->run.deadline_ns != 0 && !request->direct && status == OPD_OK)
		deadline_set(&request->context->io->deadlines, request);
	return status;
}

static opd_status check_and_take(struct request *request)
{
	const struct msg_run *run = &request->message.run;
	const struct op *op = snapshot_find_op(request->snapshot, run->op, &request->error);
	if (op == NULL)
		return OPD_NOT_FOUND;
	request->run.op = op;
	if (run->output_count > op->schema->result_count)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: options for %u outputs, it has %u", op->schema->name,
		                (unsigned)run->output_count, (unsigned)op->schema->result_count);
	struct access *access = request->session->access;
	opd_status status = access->ops == NULL ? OPD_OK : access_check_op(access, op->schema->name, request->context->server->log, &request->error);
	if (status == OPD_OK && access->providers != NULL && run->priority.present)
		status = access_check_providers(access, run->priority.names, run->priority.count, request->context->server->log, &request->error);
	if (status == OPD_OK)
		status = run->device.bytes == 0 ? find_list(request, run, op) : find_list_for_device(request, run, op);
	if (status != OPD_OK)
		return opd_error_prefix(&request->error, status, "%s", op->schema->name);
	warn_of_fallback(request, run, op);
	status = bind_args(&request->arena, op, run, &request->run.bound, &request->error);
	return status == OPD_OK ? run_take(request) : status;
}

void run_refused(struct request *request)
{
	struct kept *kept = &request->session->kept;
	const msg_request_kind kind = request->message.kind;
	const bool keeps = kind == MSG_REQUEST_UPLOAD || ((kind == MSG_REQUEST_RUN || kind == MSG_REQUEST_RUN_GRAPH) && keeps_any(&request->message.run));
	if (keeps && !request->run.expected && kept_expect(kept, request->id, 0, NULL) == OPD_OK)
		kept_fail(kept, request->id);
}

opd_status run_accept(struct request *request)
{
	opd_status status = request->message.kind == MSG_REQUEST_RUN_GRAPH ? graph_run_accept(request) : check_and_take(request);
	if (status != OPD_OK)
		run_refused(request);
	return status;
}

void run_start(struct request *request)
{
	run_proceed(request);
}

void run_stop_waiting(struct request *request)
{
	for (struct run_waiter *waiter = request->run.waiters; waiter != NULL; waiter = waiter->next)
		if (kept_unwait(&waiter->waiter))
			request->run.waiting--;
}

bool run_abandoned(struct request *request)
{
	if ((request->message.kind != MSG_REQUEST_RUN && request->message.kind != MSG_REQUEST_RUN_GRAPH) || request->run.waiting == 0)
		return false;
	request->run.failed = true;
	request->started = true;
	return true;
}

/* ---- Running ---- */

void run_reply_fake(struct request *request)
{
	struct bound *bound = &request->run.bound;
	uint32_t count = bound->call.output_count;
	struct msg_result *results = arena_array(&request->arena, count, sizeof results[0]);
	if (results == NULL) {
		(void)out_of_memory(request);
		request_fail(request);
		return;
	}
	for (uint32_t i = 0; i < count; i++) {
		results[i].tensor.dtype = bound->outputs[i].dtype;
		results[i].tensor.rank = bound->outputs[i].rank;
		memcpy(results[i].tensor.shape, bound->outputs[i].shape, bound->outputs[i].rank * sizeof(int64_t));
	}
	request->reply.run.outputs = results;
	request->reply.run.output_count = count;
	if (request->run.dispatch.impl != NULL) {
		const struct impl *impl = request->run.dispatch.impl;
		request->reply.run.provider = msg_text(impl->provider->name);
		if (request->message.run.uuid)
			request->reply.run.uuid = msg_text(impl->def->uuid);
	}
	request_reply(request, MSG_REPLY_RUN);
}

static void reply_refused(struct request *request)
{
	struct request_run *run = &request->run;
	uint32_t count = 0;
	const struct msg_skip *skips = dispatch_skips(&run->dispatch, run->op, &run->bound.call, &request->arena, &count);
	(void)dispatch_refused(run->op, skips, count, &request->error);
	metrics_reasons(request->context->metrics, &run->dispatch, skips, count);
	run_explain(request);
	request_fail(request);
}

/* An implementation is chosen, or nobody accepts. */
static void run_chosen(struct request *request, bool accepted)
{
	if (!accepted)
		reply_refused(request);
	else if (request->message.run.mode == MSG_RUN)
		execute_run(request);
	else if (request->run.dispatch.plan_missing)
		execute_plan(request);
	else {
		run_explain(request);
		run_reply_fake(request);
	}
}

static void run_ready(struct request *request)
{
	struct request_run *run = &request->run;
	const struct msg_run *message = &request->message.run;
	opd_status status = OPD_OK;
	if (message->explain)
		request->clock.ready = request_now_ns();
	for (uint32_t i = 0; status == OPD_OK && i < run->bound.operand_count; i++)
		status = place_operand(request, i);
	if (status == OPD_OK && request->message.kind == MSG_REQUEST_RUN_GRAPH) {
		graph_run_ready(request);
		return;
	}
	if (status == OPD_OK)
		status = bind_outputs(&request->arena, &run->bound, &request->error);
	if (status == OPD_OK)
		status = donate_check(request);
	if (status == OPD_OK && run->donation_count != 0) /* before anything is written in place */
		status = run_check_inline(request);
	if (status == OPD_OK)
		status = shared_check_results(request);
	if (status == OPD_OK && message->mode != MSG_FAKE)
		status = dispatch_init(&run->dispatch, request->snapshot, run->effective, request->context->server->plans,
		                       request->context->server->log, run->op, message->strict, &run->bound.call, &request->error);
	if (status != OPD_OK) {
		request_fail(request);
		return;
	}
	if (message->mode != MSG_FAKE)
		dispatch_restrict(&run->dispatch, request->session->access);
	if (message->mode == MSG_FAKE) {
		run_reply_fake(request);
		return;
	}
	if (message->explain)
		request->clock.bound = request_now_ns();
	bool accepted = dispatch_walk(&run->dispatch, &run->bound.call);
	if (run->dispatch.index != 0)
		metrics_skipped(request->context->metrics, &run->dispatch, 0);
	if (message->explain)
		request->clock.dispatched = request_now_ns();
	run_chosen(request, accepted);
}

/* ---- Results ---- */

static bool donates(const struct request_run *run, uint32_t output)
{
	for (uint32_t i = 0; i < run->donation_count; i++)
		if (run->donations[i].result == output)
			return true;
	return false;
}

/* What is kept, and goes nowhere else, is the table's alone from now on: whoever has waited for it may be given its memory. */
static void let_go(struct request *request)
{
	struct request_run *run = &request->run;
	const struct msg_run *message = &request->message.run;
	for (uint32_t i = 0; i < run->bound.call.output_count && i < message->output_count; i++) {
		if (!message->outputs[i].no_copy)
			continue;
		buffer_unref(run->outputs[i]);
		run->outputs[i] = NULL;
		if (run->resident != NULL)
			buffer_unref(run->resident[i]);
		if (run->resident != NULL)
			run->resident[i] = NULL;
	}
	for (uint32_t i = 0; i < run->donation_count; i++) {
		const uint32_t operand = run->donations[i].operand;
		kept_tensor_unref(run->kept[operand]);
		run->kept[operand] = NULL;
	}
}

bool run_keeps(const struct request *request, uint32_t output)
{
	const struct msg_run *message = &request->message.run;
	return donates(&request->run, output) || (output < message->output_count && message->outputs[output].keep);
}

/* Where the result is: on a device if it stays there. */
static struct buffer *result_buffer(const struct request_run *run, uint32_t output)
{
	return run->resident != NULL && run->resident[output] != NULL ? run->resident[output] : run->outputs[output];
}

/* Kept outputs go into the session's table; false when there is no memory for that. */
static bool keep_outputs(struct request *request)
{
	struct request_run *run = &request->run;
	const struct msg_run *message = &request->message.run;
	uint32_t count = run->bound.call.output_count;
	struct kept_tensor **tensors = arena_array(&request->arena, count, sizeof tensors[0]);
	run->handles = arena_array(&request->arena, count, sizeof run->handles[0]);
	bool made = tensors != NULL && run->handles != NULL;
	for (uint32_t i = 0; made && i < count && i < message->output_count; i++) {
		const opd_tensor *output = &run->bound.outputs[i];
		if (!message->outputs[i].keep || donates(run, i))
			continue;
		tensors[i] = kept_tensor_create(output->dtype, output->rank, output->shape, output->elements * opd_dtype_bytes(output->dtype),
		                                result_buffer(run, i));
		made = tensors[i] != NULL;
	}
	if (!made || !donate_settle(request, run->handles)) {
		for (uint32_t i = 0; tensors != NULL && i < count; i++)
			kept_tensor_unref(tensors[i]);
		return false;
	}
	run->expected = false;
	let_go(request);
	kept_settle(&request->session->kept, request->id, tensors, count, run->handles);
	return true;
}

static bool fill_result(struct request *request, uint32_t index, struct msg_result *result)
{
	const struct msg_run *message = &request->message.run;
	const opd_tensor *output = &request->run.bound.outputs[index];
	struct msg_tensor *tensor = &result->tensor;
	tensor->dtype = output->dtype;
	tensor->rank = output->rank;
	memcpy(tensor->shape, output->shape, output->rank * sizeof output->shape[0]);
	if (request->run.handles != NULL)
		result->kept = request->run.handles[index];
	if (shared_fill(request, index, tensor) || (index < message->output_count && message->outputs[index].no_copy))
		return true;
	uint64_t bytes = output->elements * opd_dtype_bytes(output->dtype);
	if (message->inline_results) {
		tensor->source = MSG_SOURCE_INLINE;
		tensor->inlined.data = opd_tensor_data(output);
		tensor->inlined.bytes = bytes;
		return true;
	}
	return request_send(request, tensor, opd_tensor_data(output), bytes);
}

opd_status run_check_inline(struct request *request)
{
	if (!request->message.run.inline_results || request->direct)
		return OPD_OK;
	uint64_t limit = request->context->server->config->limits.envelope_bytes;
	if (request->run.bound.output_bytes > limit / 2)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: results of %" PRIu64 " bytes don't fit inline (at most %" PRIu64 "): take them as payload",
		                request->run.op->schema->name, request->run.bound.output_bytes, limit / 2);
	return OPD_OK;
}

/* Nobody reads the operands any more, and the next request finds their memory warm instead of writing over that of all replies that wait to leave. */
static void drop_payload(struct request *request)
{
	if (request->direct)
		return;
	buffer_unref(request->payload);
	request->payload = NULL;
}

void run_reply_results(struct request *request)
{
	struct request_run *run = &request->run;
	uint32_t count = run->bound.call.output_count;
	const struct impl *impl = run->dispatch.impl;
	struct msg_result *results = arena_array(&request->arena, count, sizeof results[0]);
	bool filled = results != NULL && (!run->expected || keep_outputs(request));
	for (uint32_t i = 0; filled && i < count; i++)
		filled = fill_result(request, i, &results[i]);
	if (!filled) {
		(void)out_of_memory(request);
		request_fail(request);
		return;
	}
	if (impl != NULL) { /* a graph has one a node */
		request->reply.run.provider = msg_text(impl->provider->name);
		if (request->message.run.uuid)
			request->reply.run.uuid = msg_text(impl->def->uuid);
		run_explain(request);
	}
	request->reply.run.outputs = results;
	request->reply.run.output_count = count;
	drop_payload(request);
	request_reply(request, MSG_REPLY_RUN);
}

/* The failure was the kernel's, or of the device that it was to run on: nothing that another provider must run into as well. */
static bool may_retry(const struct request *request)
{
	const opd_status status = request->status;
	if (status == OPD_OK || status == OPD_CANCELLED)
		return false;
	if (request->run.device == 0)
		return request->run.written;
	return status != OPD_INVALID_ARGUMENT && status != OPD_DEADLINE_EXCEEDED;
}

void execute_done(struct request *request)
{
	struct request_run *run = &request->run;
	if (request->overdue) {
		request_returned(request);
		return;
	}
	if (request->graph_run != NULL) {
		graph_run_done(request);
		return;
	}
	bool again = run->plan_refused || (may_retry(request) && request->message.run.retry && !donate_is_written(request));
	if (again && request->cancelled) { /* nothing more is begun for it */
		run->plan_refused = false;
		request->status = opd_fail(&request->error, OPD_CANCELLED, "%s: the client cancelled the request", run->op->schema->name);
	} else if (again) {
		if (!run->plan_refused)
			LOG(request->context->server->log, LOG_WARN, "kernel failed, another provider may try", LOG_UINT("session", request->session->id),
			    LOG_UINT("request", request->id), LOG_STR("provider", run->dispatch.impl->provider->name),
			    LOG_STR("op", run->op->schema->name), LOG_STR("error", request->error.text));
		opd_error failure = request->error;
		bool refused = run->plan_refused;
		run->move_count = 0;
		run->plan_refused = false;
		const uint32_t from = run->dispatch.index + (refused ? 0 : 1); /* a plan that refused is a skip, a failed kernel is not */
		bool accepted = dispatch_next(&run->dispatch, &run->bound.call);
		metrics_skipped(request->context->metrics, &run->dispatch, from);
		if (!accepted && !refused) { /* nobody else: the kernel's failure is the answer */
			request->error = failure;
			request_fail(request);
			return;
		}
		run_chosen(request, accepted);
		return;
	}
	opd_status status = request->status;
	if (status == OPD_OK && request->message.run.mode == MSG_RUN)
		status = run_check_inline(request);
	if (status != OPD_OK) {
		run_explain(request);
		request_fail(request);
	} else if (request->message.run.mode == MSG_RUN) {
		differential_sample(request->context->server->differential, request);
		run_reply_results(request);
	} else {
		run_explain(request);
		run_reply_fake(request);
	}
}

void run_failed(struct request *request)
{
	graph_run_failed(request);
	donate_failed(request);
	if (request->run.expected) {
		request->run.expected = false;
		kept_fail(&request->session->kept, request->id);
	}
}

void run_release(struct request *request)
{
	struct request_run *run = &request->run;
	shared_release(request);
	if (request->message.kind != MSG_REQUEST_RUN && request->message.kind != MSG_REQUEST_RUN_GRAPH)
		return;
	for (uint32_t i = 0; i < run->bound.operand_count; i++) {
		buffer_unref(run->bound.operands[i].buffer);
		if (run->kept != NULL)
			kept_tensor_unref(run->kept[i]);
	}
	for (uint32_t i = 0; run->outputs != NULL && i < run->bound.call.output_count; i++)
		buffer_unref(run->outputs[i]);
	for (uint32_t i = 0; run->resident != NULL && i < run->bound.call.output_count; i++)
		buffer_unref(run->resident[i]);
	buffer_unref(run->scratch);
	dispatch_fini(&run->dispatch);
	effective_unref(run->list_made);
	graph_run_release(request);
}
