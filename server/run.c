/* Running an op: which list, bind, wait for operands, infer, dispatch, execute, and how it ends. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/differential.h"
#include "server/metrics.h"
#include "server/request.h"
#include "server/shared.h"

static void run_ready(struct request *request);

opd_status run_out_of_memory(struct request *request)
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
		status = run_out_of_memory(request);
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
		return run_out_of_memory(request);
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
		status = run_take_operands(request);
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
	return request->message.kind == MSG_REQUEST_RUN_GRAPH ? graph_run_accept(request) : check_and_take(request);
}

void run_start(struct request *request)
{
	if (request->run.waiting != 0 || !request->started)
		return;
	if (request->run.failed)
		request_fail(request);
	else
		run_ready(request);
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

static void reply_refused(struct request *request)
{
	struct request_run *run = &request->run;
	uint32_t count = 0;
	const struct msg_skip *skips = dispatch_skips(&run->dispatch, run->op, &run->bound.call, &request->arena, &count);
	(void)dispatch_refused(&run->dispatch, run->op, request->message.run.device, skips, count, &request->error);
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
		status = run_place_operand(request, i);
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

/* ---- Ending ---- */

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
