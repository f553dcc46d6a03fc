#include "server/request.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "proto/text.h"
#include "server/clock.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/metrics.h"
#include "server/graph.h"
#include "server/ring.h"
#include "server/shared.h"
#include "server/stats.h"

/* Envelopes are at most BOUND_ENVELOPE_BYTES; decoded they take a few times that. */
#define ARENA_CAP_BYTES (64u << 20)
/* Up to here a request's own memory is free; with more it is charged to the session. */
#define ARENA_FREE_BYTES (64u << 10)
/* Behind the cap, for the reply that says that the cap was reached. */
#define ARENA_SPARE_BYTES (16u << 10)
#define FREE_REQUESTS_MAX 256u

uint64_t request_now_ns(void)
{
	return clock_now_ns();
}

/* ---- The step table ---- */

static const struct step {
	const char *name;
	opd_status (*accept)(struct request *request); /* NULL: nothing to check before the payload */
	void (*start)(struct request *request);
	access_right right;
	bool work; /* counts against quotas; what only asks, frees or administers never does */
} steps[] = {
	[MSG_REQUEST_NONE] = {.name = "unknown"},
	[MSG_REQUEST_RUN] = {"run", run_accept, run_start, RIGHT_NONE, true},
	[MSG_REQUEST_FREE] = {"free", free_accept, free_start, RIGHT_NONE},
	[MSG_REQUEST_PUSH_PRIORITY] = {"push_priority", NULL, priority_push, RIGHT_NONE},
	[MSG_REQUEST_POP_PRIORITY] = {"pop_priority", NULL, priority_pop, RIGHT_NONE},
	[MSG_REQUEST_SET_PRIORITY] = {"set_priority", NULL, priority_set, RIGHT_NONE},
	[MSG_REQUEST_GET_PRIORITY] = {"get_priority", NULL, priority_get, RIGHT_NONE},
	[MSG_REQUEST_LIST_OPS] = {"list_ops", NULL, inspect_ops, RIGHT_NONE},
	[MSG_REQUEST_DESCRIBE] = {"describe", NULL, inspect_op, RIGHT_NONE},
	[MSG_REQUEST_LIST_PROVIDERS] = {"list_providers", NULL, inspect_providers, RIGHT_NONE},
	[MSG_REQUEST_PING] = {"ping", NULL, request_reply_empty, RIGHT_NONE},
	[MSG_REQUEST_INFO] = {"info", NULL, inspect_info, RIGHT_NONE},
	[MSG_REQUEST_GENERATE] = {"generate", NULL, generate_start, RIGHT_NONE, true},
	[MSG_REQUEST_LOAD_MODULE] = {"load_module", NULL, admin_load_module, RIGHT_MODULES},
	[MSG_REQUEST_SET_LOG_LEVEL] = {"set_log_level", NULL, admin_set_log_level, RIGHT_LOG},
	[MSG_REQUEST_DRAIN] = {"drain", NULL, admin_drain, RIGHT_DRAIN},
	[MSG_REQUEST_UPLOAD] = {"upload", upload_accept, upload_start, RIGHT_NONE, true},
	[MSG_REQUEST_WRITE] = {"write", write_accept, write_start, RIGHT_NONE, true},
	[MSG_REQUEST_FETCH] = {"fetch", fetch_accept, take_start, RIGHT_NONE, true},
	[MSG_REQUEST_PUBLISH] = {"publish", publish_accept, take_start, RIGHT_PUBLISH, true},
	[MSG_REQUEST_OPEN] = {"open_tensor", NULL, publish_open, RIGHT_NONE},
	[MSG_REQUEST_WITHDRAW] = {"withdraw", NULL, publish_withdraw, RIGHT_PUBLISH},
	[MSG_REQUEST_LIST_PUBLICATIONS] = {"list_publications", NULL, publish_list, RIGHT_NONE},
	[MSG_REQUEST_LIST_TENSORS] = {"list_tensors", NULL, inspect_tensors, RIGHT_NONE},
	[MSG_REQUEST_ATTACH_MEMORY] = {"attach_memory", NULL, region_attach_start, RIGHT_NONE},
	[MSG_REQUEST_DETACH_MEMORY] = {"detach_memory", NULL, region_detach_start, RIGHT_NONE},
	[MSG_REQUEST_ATTACH_RINGS] = {"attach_rings", NULL, ring_attach_start, RIGHT_NONE},
	[MSG_REQUEST_LIST_SESSIONS] = {"list_sessions", NULL, inspect_sessions, RIGHT_NONE},
	[MSG_REQUEST_GET_STATS] = {"get_stats", NULL, stats_reply, RIGHT_NONE},
	[MSG_REQUEST_RESTORE_PROVIDER] = {"restore_provider", NULL, admin_restore_provider, RIGHT_OPERATE},
	[MSG_REQUEST_SET_SESSION] = {"set_session", NULL, admin_set_session, RIGHT_NONE}, /* checks itself: its own device is a session's own business */
	[MSG_REQUEST_REGISTER_GRAPH] = {"register_graph", graph_register_accept, graph_register_start, RIGHT_NONE, true},
	[MSG_REQUEST_RUN_GRAPH] = {"run_graph", run_accept, run_start, RIGHT_NONE, true},
	[MSG_REQUEST_FREE_GRAPH] = {"free_graph", graph_free_accept, request_reply_empty, RIGHT_NONE},
};

#define STEP_COUNT (sizeof steps / sizeof steps[0])
static_assert(STEP_COUNT <= MSG_REQUEST_KINDS, "every kind is counted");

const char *request_kind_name(msg_request_kind kind)
{
	return kind >= STEP_COUNT || steps[kind].name == NULL ? "unknown" : steps[kind].name;
}

static bool step_has_payload(msg_request_kind kind)
{
	return kind == MSG_REQUEST_RUN || kind == MSG_REQUEST_RUN_GRAPH || kind == MSG_REQUEST_UPLOAD || kind == MSG_REQUEST_WRITE;
}

/* ---- Life ---- */

struct request *request_create(struct context *context, struct session *session, uint64_t id)
{
	struct request *request = context->free_requests;
	if (request != NULL) {
		context->free_requests = request->next;
		context->free_count--;
	} else {
		request = calloc(1, sizeof *request);
		if (request == NULL)
			return NULL;
		arena_init(&request->arena, ARENA_CAP_BYTES);
	}
	request->context = context;
	request->session = session_ref(session);
	request->id = id;
	request->error.status = OPD_OK;
	request->error.text[0] = '\0'; /* a provider that fails without a text must not show another session's */
	return request;
}

void request_destroy(struct request *request)
{
	arena_fini(&request->arena);
	free(request);
}

/* Everything but the arena, and what is written before it is read, starts from zero. */
static void clear(struct request *request)
{
	struct arena arena = request->arena;
	arena_reset(&arena);
	arena.cap_bytes = ARENA_CAP_BYTES;
	memset(request, 0, offsetof(struct request, error));
	memset((char *)request + offsetof(struct request, run), 0, sizeof *request - offsetof(struct request, run));
	request->arena = arena;
}

void request_release(struct request *request)
{
	if (request->overdue) { /* request_returned will do it */
		request->released = true;
		return;
	}
	run_release(request);
	if (request->message.kind == MSG_REQUEST_GENERATE)
		generate_release(request);
	device_ahead_release(request);
	buffer_unref(request->payload);
	buffer_unref(request->staged);
	kept_tensor_unref(request->tensor);
	graph_unref(request->described);
	free(request->envelope_memory);
	snapshot_unref(request->snapshot);
	if (request->arena_charged_bytes != 0)
		account_release(request->session->account, request->arena_charged_bytes);
	if (request->entered)
		quota_leave(&request->session->quota, &request->session->tenant->quota);
	session_unref(request->session);
	struct context *context = request->context;
	clear(request);
	if (context->free_count == FREE_REQUESTS_MAX) {
		request_destroy(request);
		return;
	}
	request->next = context->free_requests;
	context->free_requests = request;
	context->free_count++;
}

/* What the arena has grown by since it was charged; 0: little. A decoded envelope can take fifty times its bytes (two bytes of it make a message), for as long as the request waits, and
 * an answer to a few bytes a megabyte, until it is read. */
static uint64_t arena_growth(const struct request *request)
{
	const uint64_t bytes = request->arena.used_bytes - request->arena_charged_bytes;
	return bytes > ARENA_FREE_BYTES ? bytes : 0;
}

static opd_status charge_arena(struct request *request, const char *what, opd_error *error)
{
	const uint64_t bytes = arena_growth(request);
	opd_status status = bytes == 0 ? OPD_OK : account_charge(request->session->account, bytes, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", what);
	request->arena_charged_bytes += bytes;
	return OPD_OK;
}

/* ---- Quotas ---- */

/* When somebody who has too much in flight may hope for room: when the lane has done what it has of the session. */
static uint64_t lane_wait_ns(const struct request *request)
{
	struct lane *lane = request->session->lane;
	const uint64_t wait_ns = scheduler_wait_ns(lane_scheduler_lock(lane), &request->session->flow, request->session->class);
	lane_scheduler_unlock(lane);
	return wait_ns;
}

static opd_status refuse_quota(struct request *request, const char *what, const struct quota_refusal *refusal)
{
	const struct tenant *tenant = request->session->tenant;
	const bool in_flight = refusal->kind == QUOTA_IN_FLIGHT;
	const char *whose = refusal->of_tenant ? "tenant " : "this session";
	const uint64_t wait_us = (in_flight ? lane_wait_ns(request) : refusal->wait_ns) / 1000 + 1;
	if (in_flight)
		(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED,
		               "%s: quota in_flight of %s%s: %" PRIu64 " requests are in flight, at most %" PRIu64 " may be: try again in about %" PRIu64 " us", what,
		               whose, refusal->of_tenant ? tenant->name : "", refusal->used, refusal->limit, wait_us);
	else
		(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED,
		               "%s: quota %s of %s%s: more was sent than %" PRIu64 " bytes a second: try again in about %" PRIu64 " us", what, quota_name(refusal->kind),
		               whose, refusal->of_tenant ? tenant->name : "", refusal->limit, wait_us);
	opd_error_retry_after(&request->error, wait_us);
	return OPD_RESOURCE_EXHAUSTED;
}

/* Part of limits.memory in use, in percent: what gives way to tensors doesn't count. */
static bool memory_filled(const struct server *server, uint32_t percent, uint64_t *used_out, uint64_t *limit_out)
{
	struct derived_statistics derived;
	derived_count(server->derived, &derived);
	const uint64_t used = server_memory_bytes(server);
	*used_out = used > derived.bytes ? used - derived.bytes : 0;
	*limit_out = atomic_load_explicit(&server->memory.limit_bytes, memory_order_relaxed);
	return percent < 100 && *used_out >= *limit_out / 100 * percent;
}

bool server_memory_filled(const struct server *server, uint32_t percent, const char *what, opd_error *error)
{
	uint64_t used, limit;
	if (!memory_filled(server, percent, &used, &limit))
		return false;
	(void)opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s while %" PRIu64 " of at most %" PRIu64 " bytes of daemon memory are in use (%" PRIu32 " %%)", what, used, limit,
	               percent);
	return true;
}

/* Before anything is taken for it: what its session and its tenant may, and what the daemon has room for. */
static opd_status enter(struct request *request, const struct step *step, uint64_t payload_bytes)
{
	struct server *server = request->context->server;
	struct session *session = request->session;
	struct quota_refusal refusal;
	if (!step->work)
		return OPD_OK;
	if (request->message.kind == MSG_REQUEST_UPLOAD &&
	    server_memory_filled(server, atomic_load_explicit(&server->refuse_uploads, memory_order_relaxed), "upload: none is taken", &request->error)) {
		(void)atomic_fetch_add_explicit(&server->uploads_refused, 1, memory_order_relaxed);
		return OPD_RESOURCE_EXHAUSTED;
	}
	if (!quota_enter(&session->quota, &session->tenant->quota, request->envelope_bytes + payload_bytes, request->clock.received, &refusal))
		return refuse_quota(request, step->name, &refusal);
	request->entered = true;
	return OPD_OK;
}

static opd_status accept_decoded(struct request *request, opd_status status, uint64_t payload_bytes)
{
	if (status == OPD_OK)
		status = charge_arena(request, "envelope, decoded", &request->error);
	if (status == OPD_OK)
		return request_accept_message(request, payload_bytes);
	/* Nothing was taken yet: its memory must not wait for a client that doesn't read the refusal. */
	request->message = (struct msg_request){0};
	arena_reset(&request->arena);
	return status;
}

/* The graph that a request brings; NULL: none. */
static const struct msg_graph *graph_of(const struct msg_request *message)
{
	if (message->kind == MSG_REQUEST_REGISTER_GRAPH)
		return &message->graph;
	return message->kind == MSG_REQUEST_RUN_GRAPH && message->run.graph == 0 ? message->run.once : NULL;
}

/* A graph that is wrong is refused when it is accepted: graph_create finds the error. */
static void decode_task(struct request *request)
{
	request->status = codec_decode_request(&request->arena, request->envelope, request->envelope_bytes, &request->message, &request->error);
	free(request->envelope_memory);
	request->envelope_memory = NULL;
	const struct msg_graph *graph = request->status == OPD_OK ? graph_of(&request->message) : NULL;
	const uint64_t id = request->message.kind == MSG_REQUEST_REGISTER_GRAPH ? request->id : 0;
	if (graph != NULL)
		(void)!graph_describe(request->snapshot, graph, id, &request->described, &request->error);
}

void request_decode(struct request *request, void *memory, const uint8_t *envelope, size_t bytes, request_task_fn decoded)
{
	request->envelope_memory = memory;
	request->envelope = envelope;
	request->envelope_bytes = bytes;
	request->decoding = true;
	request->clock.received = request_now_ns();
	request->snapshot = snapshot_ref(context_snapshot(request->context));
	request_task(request, decode_task, decoded);
}

opd_status request_accept_decoded(struct request *request, uint64_t payload_bytes)
{
	request->decoding = false;
	request->job = (struct lane_job){0}; /* nothing to withdraw */
	return accept_decoded(request, request->status, payload_bytes);
}

opd_status request_accept(struct request *request, const uint8_t *envelope, size_t bytes, uint64_t payload_bytes)
{
	request->clock.received = request->session->explains ? request_now_ns() : request->context->read_ns;
	request->envelope_bytes = bytes;
	opd_status status = codec_decode_request(&request->arena, envelope, bytes, &request->message, &request->error);
	return accept_decoded(request, status, payload_bytes);
}

opd_status request_accept_message(struct request *request, uint64_t payload_bytes)
{
	struct server *server = request->context->server;
	const struct step *step = &steps[request->message.kind];
	(void)atomic_fetch_add_explicit(&server->requests, 1, memory_order_relaxed);
	if (request->snapshot == NULL)
		request->snapshot = snapshot_ref(context_snapshot(request->context));
	if (step->start == NULL)
		return opd_fail(&request->error, OPD_UNIMPLEMENTED, "this server (opd %s) doesn't know this kind of request", OPD_VERSION);
	if (!access_may(request->session->access, step->right))
		return access_check_right(request->session->access, step->right, step->name, server->log, &request->error);
	if (payload_bytes != 0 && !step_has_payload(request->message.kind))
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s has a payload of %" PRIu64 " bytes, expected none", step->name, payload_bytes);
	opd_status status = enter(request, step, payload_bytes);
	if (status == OPD_OK) {
		request->payload_bytes = payload_bytes;
		status = step->accept == NULL ? OPD_OK : step->accept(request);
	}
	if (status == OPD_OK && payload_bytes != 0)
		status = buffer_alloc(request->session->account, payload_bytes, BUFFER_SLACK_BYTES, &request->payload, &request->error);
	if (status != OPD_OK)
		run_refused(request);
	return status;
}

/* Before its payload is whole every kind can be cancelled, also one that a lane still decodes. Later those that compute or send; the others are short, or change what the session has. */
static bool is_cancelled_while_it_runs(msg_request_kind kind)
{
	return kind == MSG_REQUEST_RUN || kind == MSG_REQUEST_RUN_GRAPH || kind == MSG_REQUEST_GENERATE || kind == MSG_REQUEST_FETCH || kind == MSG_REQUEST_PUBLISH;
}

void request_start(struct request *request)
{
	request->started = true;
	request->unstoppable = !is_cancelled_while_it_runs(request->message.kind);
	steps[request->message.kind].start(request);
}

/* ---- Ending ---- */

/* Says this instead. What is in the arena stays: the release goes through the lists of buffers there. */
static void encode_refusal(struct request *request, const char *why)
{
	opd_error error;
	request->segment_count = 0;
	request->reply_bytes = 0;
	request->arena.cap_bytes += ARENA_SPARE_BYTES;
	request->reply = (struct msg_reply){.status = OPD_RESOURCE_EXHAUSTED, .message = msg_text(why)};
	if (codec_encode_reply(&request->arena, &request->reply, &request->frame, &error) != OPD_OK)
		request->frame = (struct codec_buffer){0};
}

static void encode(struct request *request)
{
	opd_error error;
	if (codec_encode_reply(&request->arena, &request->reply, &request->frame, &error) != OPD_OK) {
		LOG(request->context->server->log, LOG_WARN, "reply could not be encoded", LOG_UINT("session", request->session->id),
		    LOG_UINT("request", request->id), LOG_STR("error", error.text));
		encode_refusal(request, "the reply is too large to be encoded");
	}
	/* What a run has done can't be taken back because it takes much to tell: how many such answers wait is bounded all the same (conn.unread_bytes). */
	request->answer_bytes = arena_growth(request);
	if (request->reply.kind != MSG_REPLY_RUN && charge_arena(request, "the answer", &error) != OPD_OK)
		encode_refusal(request, error.text);
}

static void finish(struct request *request)
{
	request->replied = true;
	metrics_replied(request->context->metrics, request->message.kind, request->reply.status);
	if (request->run.deadline_ns != 0 && !request->direct)
		deadline_clear(&request->context->io->deadlines, request);
	if (!request->direct)
		encode(request);
	if (request->entered) {
		const uint64_t bytes = request->frame.envelope_bytes + request->reply_bytes;
		struct session *session = request->session;
		const bool timed = quota_limit(&session->quota, QUOTA_BYTES_OUT) != 0 || quota_limit(&session->tenant->quota, QUOTA_BYTES_OUT) != 0;
		quota_send(&session->quota, &session->tenant->quota, bytes, timed ? request_now_ns() : 0);
	}
	request->on_reply(request);
}

void request_reply(struct request *request, msg_reply_kind kind)
{
	request->reply.kind = kind;
	request->reply.status = OPD_OK;
	request->reply.message = (struct msg_text){0};
	finish(request);
}

void request_reply_empty(struct request *request)
{
	if (request->error.status != OPD_OK)
		request_fail(request);
	else
		request_reply(request, MSG_REPLY_EMPTY);
}

/* Texts are cut to their room, perhaps within a character, and may come from a module: what isn't UTF-8 would not survive the wire. */
static struct msg_text error_message(struct request *request, const opd_error *error)
{
	const char *text = error->text;
	const size_t bytes = strnlen(text, sizeof error->text);
	if (text_valid(text, bytes))
		return (struct msg_text){text, bytes};
	char *shown = arena_alloc(&request->arena, 2 * sizeof error->text);
	return msg_text(shown == NULL ? "" : text_escape(text, bytes, shown, 2 * sizeof error->text));
}

static void fail_with(struct request *request, const opd_error *error)
{
	run_failed(request);
	request->segment_count = 0;
	request->reply_bytes = 0;
	if (request->reply.kind != MSG_REPLY_RUN || request->reply.run.explain == NULL)
		request->reply.kind = MSG_REPLY_NONE; /* an explain record survives a failure */
	request->reply.status = error->status == OPD_OK ? OPD_INTERNAL : (opd_status)error->status;
	request->reply.retry_after_us = error->status == OPD_RESOURCE_EXHAUSTED ? error->retry_after_us : 0;
	request->reply.message = error_message(request, error);
	LOG(request->context->server->log, LOG_DEBUG, "request failed", LOG_UINT("session", request->session->id), LOG_UINT("request", request->id),
	    LOG_STR("status", opd_status_name(request->reply.status)), LOG_STR("error", error->text));
	finish(request);
}

void request_fail(struct request *request)
{
	fail_with(request, &request->error);
}

void request_reject(struct request *request)
{
	if (!run_abandoned(request))
		request_fail(request);
}

void request_abandon(struct request *request, opd_status status, const char *why)
{
	(void)opd_fail(&request->error, status, "%s", why);
	request_reject(request);
}

/* ---- Cancelling ---- */

static void stop_waiting(struct request *request)
{
	if (request->message.kind == MSG_REQUEST_FETCH || request->message.kind == MSG_REQUEST_PUBLISH)
		take_stop_waiting(request);
	else
		run_stop_waiting(request);
}

/* It has no job, or one that hasn't begun and now never will. */
static bool withdraw(struct request *request)
{
	if (request->job.run == NULL && request->device_lane == NULL)
		return true;
	return (request->device_lane != NULL && device_lane_withdraw(request->device_lane, &request->device_job)) ||
	       lane_withdraw(request->session->lane, &request->job);
}

void request_expire(struct request *request)
{
	/* What has begun is finished: its kernel can't be taken back, and a result that is there is worth more than an error. */
	if (request->replied || request->cancelled || !withdraw(request))
		return;
	request->cancelled = true;
	stop_waiting(request);
	(void)opd_fail(&request->error, OPD_DEADLINE_EXCEEDED, "%s: not started within its timeout of %" PRIu64 " us",
	               request->run.op != NULL ? request->run.op->schema->name : steps[request->message.kind].name, request->message.run.timeout_us);
	request_fail(request);
}

void request_overdue(struct request *request, const opd_error *error)
{
	if (request->replied)
		return;
	request->overdue = true;
	fail_with(request, error); /* the request's own is the kernel's */
}

void request_returned(struct request *request)
{
	const bool released = request->released;
	if (request->graph_run != NULL)
		graph_run_returned(request);
	request->overdue = false;
	request->released = false;
	if (released)
		request_release(request);
}

bool request_cancel(struct request *request)
{
	if (request->replied || request->cancelled || request->unstoppable)
		return false;
	request->cancelled = true;
	if (!request->decoding) /* else it waits for nothing yet, and its message is a lane's */
		stop_waiting(request);
	if (!withdraw(request)) {
		lane_cancel(&request->job);
		return true;
	}
	const char *name = request->run.op != NULL ? request->run.op->schema->name : steps[request->message.kind].name;
	(void)opd_fail(&request->error, OPD_CANCELLED, "%s: the client cancelled the request", name);
	request_fail(request);
	return true;
}

/* ---- Tasks on the lane ---- */

static void task_run(struct lane_job *job, struct lane_exec *exec)
{
	(void)exec;
	struct request *request = (struct request *)((char *)job - offsetof(struct request, job));
	request->task(request);
}

static void task_done(struct lane_job *job)
{
	struct request *request = (struct request *)((char *)job - offsetof(struct request, job));
	request->task_done(request);
}

void request_task(struct request *request, request_task_fn task, request_task_fn done)
{
	request->task = task;
	request->task_done = done;
	if (request->direct) { /* the caller waits anyway */
		task(request);
		done(request);
		return;
	}
	/* Whatever a session has a lane do is its own: it waits its turn, and pays. What was read must be told from what it says before anything else is read from its connection. */
	request->job = (struct lane_job){
		.run = task_run,
		.done = task_done,
		.owner = request->context->loop,
		.item = {.flow = &request->session->flow, .class = (uint8_t)request->session->class, .unbounded = true, .first = request->decoding},
	};
	const bool queued = lane_submit(request->session->lane, &request->job);
	assert(queued);
	(void)queued;
}

/* ---- Payloads ---- */

/* Room for two more: padding and data. NULL: the arena is full. */
static struct segment *segments_grow(struct request *request)
{
	if (request->segment_count + 2 <= request->segment_room)
		return request->segments;
	uint32_t room = request->segment_room == 0 ? 4 : request->segment_room * 2;
	struct segment *segments = arena_alloc(&request->arena, room * sizeof segments[0]);
	if (segments == NULL)
		return NULL;
	if (request->segment_count != 0)
		memcpy(segments, request->segments, request->segment_count * sizeof segments[0]);
	request->segments = segments;
	request->segment_room = room;
	return segments;
}

bool request_send(struct request *request, struct msg_tensor *tensor, const void *data, uint64_t bytes)
{
	static const unsigned char zeros[OPD_TENSOR_ALIGNMENT];
	if (request->direct) {
		tensor->source = MSG_SOURCE_INLINE;
		tensor->inlined.data = data;
		tensor->inlined.bytes = bytes;
		return true;
	}
	uint64_t aligned = (request->reply_bytes + OPD_TENSOR_ALIGNMENT - 1) & ~(uint64_t)(OPD_TENSOR_ALIGNMENT - 1);
	struct segment *segments = segments_grow(request);
	if (segments == NULL)
		return false;
	if (aligned != request->reply_bytes)
		segments[request->segment_count++] = (struct segment){zeros, aligned - request->reply_bytes};
	if (bytes != 0)
		segments[request->segment_count++] = (struct segment){data, bytes};
	tensor->source = MSG_SOURCE_PAYLOAD;
	tensor->payload.offset = aligned;
	tensor->payload.bytes = bytes;
	request->reply_bytes = aligned + bytes;
	return true;
}
