/* Who shares the lanes, and what each has had: sessions, tenants, lanes; and an administrator's hand on a session. */
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>

#include "proto/bounds.h"
#include "server/conn.h"
#include "server/daemon.h"
#include "server/request.h"

static_assert((int)QUOTA_COUNT == (int)MSG_QUOTA_KINDS, "the protocol's kinds are the daemon's");

static bool sees(const struct session *who, const struct session *session)
{
	return access_may(who->access, RIGHT_SESSIONS) || session->tenant == who->tenant;
}

static struct msg_usage usage_of(const struct sched_usage *usage)
{
	return (struct msg_usage){usage->jobs, usage->device_ns, usage->wait_ns, usage->wait_max_ns};
}

/* Of another lane. */
static void add_usage(const struct sched_usage *usage, struct msg_usage *out)
{
	out->jobs += usage->jobs;
	out->device_ns += usage->device_ns;
	out->wait_ns += usage->wait_ns;
	if (usage->wait_max_ns > out->wait_max_ns)
		out->wait_max_ns = usage->wait_max_ns;
}

/* Bytes of an account on devices, and how often a limit there was in the way. */
static uint64_t device_bytes(const struct account *account, uint64_t *refused_out)
{
	uint64_t bytes = 0;
	*refused_out = 0;
	for (const struct account *device = atomic_load_explicit(&account->devices, memory_order_acquire); device != NULL; device = device->next) {
		bytes += atomic_load_explicit(&device->used_bytes, memory_order_relaxed);
		*refused_out += atomic_load_explicit(&device->refused, memory_order_relaxed);
	}
	return bytes;
}

/* Those with a limit, and what counts without one. Out of memory shows as none. */
static struct msg_quota *fill_quotas(struct arena *arena, const struct quota *quota, const struct account *account, uint64_t sessions, uint64_t queued,
                                     uint64_t device_ns, uint32_t *count_out)
{
	uint64_t device_refused;
	const uint64_t used[QUOTA_COUNT] = {
		[QUOTA_SESSIONS] = sessions,
		[QUOTA_IN_FLIGHT] = atomic_load_explicit(&quota->in_flight, memory_order_relaxed),
		[QUOTA_QUEUED] = queued,
		[QUOTA_BYTES_IN] = atomic_load_explicit(&quota->bytes_in, memory_order_relaxed),
		[QUOTA_BYTES_OUT] = atomic_load_explicit(&quota->bytes_out, memory_order_relaxed),
		[QUOTA_MEMORY] = atomic_load_explicit(&account->used_bytes, memory_order_relaxed),
		[QUOTA_DEVICE_MEMORY] = device_bytes(account, &device_refused),
		[QUOTA_DEVICE_TIME] = device_ns,
	};
	struct msg_quota *list = arena_array(arena, QUOTA_COUNT, sizeof list[0]);
	for (uint32_t i = 0; list != NULL && i < QUOTA_COUNT; i++) {
		struct msg_quota item = {i, quota_limit(quota, i), used[i], atomic_load_explicit(&quota->refused[i], memory_order_relaxed)};
		if (i == QUOTA_MEMORY)
			item.refused = atomic_load_explicit(&account->refused, memory_order_relaxed);
		if (i == QUOTA_DEVICE_MEMORY)
			item.refused = device_refused;
		if (item.limit != 0 || item.used != 0 || item.refused != 0)
			list[(*count_out)++] = item;
	}
	return list;
}

/* The lane is locked for one session at a time: thousands of them must not hold it up. */
static void fill_session(struct arena *arena, const struct session *session, const struct snapshot *snapshot, struct msg_session_state *out)
{
	const struct sched_flow *flow = &session->flow;
	const struct scheduler *scheduler = lane_scheduler_lock(session->lane);
	*out = (struct msg_session_state){
		.session = session->id,
		.tenant = msg_text(session->tenant->name),
		.peer = msg_text(session->conn == NULL ? "" : session->conn->peer),
		.age_us = session->conn == NULL ? 0 : session->conn->io->turn_us - session->conn->opened_us,
		.service_class = session->class + 1,
		.weight = flow->weight,
		.in_flight = session->in_flight,
		.queued = flow->queued,
		.running = flow->running,
		.memory_bytes = atomic_load_explicit(&session->account->used_bytes, memory_order_relaxed),
		.share = scheduler_share(scheduler, flow, session->class),
		.usage = usage_of(&flow->usage),
	};
	lane_scheduler_unlock(session->lane);
	out->usage.device_ns += session->inline_ns;
	for (uint32_t i = 1; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(session->server, i);
		const struct sched_flow *there = lane == NULL ? NULL : session_find_flow(session, i);
		if (there == NULL)
			continue;
		(void)device_lane_scheduler_lock(lane);
		out->queued += there->queued;
		out->running += there->running;
		add_usage(&there->usage, &out->usage);
		device_lane_scheduler_unlock(lane);
	}
	const uint32_t pinned = atomic_load_explicit(&session->pinned_device, memory_order_relaxed);
	if (pinned != 0 && pinned < snapshot->device_count)
		out->device = msg_text(snapshot->devices[pinned].name);
	out->quotas = fill_quotas(arena, &session->quota, session->account, 0, out->queued, out->usage.device_ns, &out->quota_count);
}

/* Each session that this one sees, from `first` on. At a standstill. */
static uint32_t walk_sessions(const struct server *server, const struct session *who, uint64_t first, const struct session **out)
{
	uint32_t count = 0;
	for (uint32_t i = 0; i < server->loop_count; i++) {
		for (const struct conn *conn = server->loops[i].conns; conn != NULL; conn = conn->next) {
			if (conn->session->id < first || !sees(who, conn->session))
				continue;
			if (out != NULL)
				out[count] = conn->session;
			count++;
		}
	}
	return count;
}

static int by_id(const void *a, const void *b)
{
	const uint64_t one = (*(const struct session *const *)a)->id;
	const uint64_t other = (*(const struct session *const *)b)->id;
	return one < other ? -1 : one > other;
}

/* Oldest first, as many as a reply may have. */
static bool fill_sessions(struct request *request, struct msg_sessions *out)
{
	const struct server *server = request->context->server;
	const uint64_t first = request->message.first_session;
	const uint32_t all = walk_sessions(server, request->session, first, NULL);
	const uint32_t count = all < BOUND_LIST ? all : BOUND_LIST;
	const struct session **found = calloc((size_t)all + 1, sizeof found[0]);
	out->sessions = arena_array(&request->arena, count, sizeof out->sessions[0]);
	if (found != NULL && out->sessions != NULL) {
		(void)walk_sessions(server, request->session, first, found);
		qsort(found, all, sizeof found[0], by_id);
		for (uint32_t i = 0; i < count; i++)
			fill_session(&request->arena, found[i], request->snapshot, &out->sessions[i]);
		out->session_count = count;
		out->next = count < all ? found[count]->id : 0;
	}
	const bool filled = found != NULL && out->sessions != NULL;
	free(found);
	return filled;
}

struct tenant_list {
	const struct session *who;
	struct arena *arena;
	struct msg_tenant_state *items;
	uint32_t count;
};

static void count_tenant(struct tenant *tenant, void *argument)
{
	struct tenant_list *list = argument;
	list->count += access_may(list->who->access, RIGHT_SESSIONS) || tenant == list->who->tenant;
}

static void fill_tenant(struct tenant *tenant, void *argument)
{
	struct tenant_list *list = argument;
	if (list->count == 0 || !(access_may(list->who->access, RIGHT_SESSIONS) || tenant == list->who->tenant))
		return;
	struct msg_tenant_state *out = &list->items[--list->count];
	*out = (struct msg_tenant_state){
		.name = msg_text(tenant->name),
		.weight = tenant->policy.weight,
		.service_class = tenant->policy.class + 1,
		.class_max = tenant->policy.class_max + 1,
		.device_rate_ns = tenant->policy.quota[QUOTA_DEVICE_TIME],
		.sessions = atomic_load_explicit(&tenant->sessions, memory_order_relaxed),
	};
	const struct sched_group *group = tenant->groups[0];
	if (group != NULL) {
		struct lane *lane = list->who->server->lanes[tenant->lane].lane;
		(void)lane_scheduler_lock(lane);
		out->queued = group->queued;
		out->running = group->running;
		out->usage = usage_of(&group->usage);
		lane_scheduler_unlock(lane);
	}
	for (uint32_t i = 1; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(list->who->server, i);
		group = tenant->groups[i];
		if (lane == NULL || group == NULL)
			continue;
		(void)device_lane_scheduler_lock(lane);
		out->queued += group->queued;
		out->running += group->running;
		add_usage(&group->usage, &out->usage);
		device_lane_scheduler_unlock(lane);
	}
	out->quotas = fill_quotas(list->arena, &tenant->quota, tenant->total, out->sessions, out->queued, out->usage.device_ns, &out->quota_count);
}

static bool fill_tenants(struct request *request, struct msg_sessions *out)
{
	struct tenants *tenants = request->context->server->tenants;
	struct tenant_list list = {.who = request->session, .arena = &request->arena};
	tenants_walk(tenants, count_tenant, &list);
	list.count = list.count < BOUND_LIST ? list.count : BOUND_LIST;
	list.items = out->tenants = arena_zalloc(&request->arena, (list.count + 1) * sizeof list.items[0]);
	if (list.items == NULL)
		return false;
	out->tenant_count = list.count;
	tenants_walk(tenants, fill_tenant, &list);
	return true;
}

static struct msg_lane_state lane_state(const char *name, uint32_t threads, const struct scheduler *scheduler)
{
	return (struct msg_lane_state){
		.name = msg_text(name), .threads = threads, .queued = scheduler->queued, .running = scheduler->running, .device_ns = scheduler->device_ns};
}

/* The CPU's, and those of devices that were used. */
static bool fill_lanes(struct request *request, struct msg_sessions *out)
{
	struct server *server = request->context->server;
	out->lanes = arena_array(&request->arena, server->lane_count + REGISTRY_DEVICES_MAX, sizeof out->lanes[0]);
	if (out->lanes == NULL)
		return false;
	for (uint32_t i = 0; i < server->lane_count; i++) {
		struct lane *lane = server->lanes[i].lane;
		out->lanes[out->lane_count++] = lane_state(lane_name(lane), lane_threads(lane), lane_scheduler_lock(lane));
		lane_scheduler_unlock(lane);
	}
	for (uint32_t i = 1; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(server, i);
		if (lane == NULL)
			continue;
		out->lanes[out->lane_count++] = lane_state(device_lane_name(lane), 1, device_lane_scheduler_lock(lane));
		device_lane_scheduler_unlock(lane);
	}
	return true;
}

/* At a standstill: the reply has texts of other loops' sessions until it is encoded. */
static void list_sessions(struct request *request)
{
	const struct server *server = request->context->server;
	struct msg_sessions *out = &request->reply.sessions;
	*out = (struct msg_sessions){.uptime_us = request_now_ns() / 1000 - server->started_us};
	if (fill_sessions(request, out) && fill_tenants(request, out) && fill_lanes(request, out)) {
		request_reply(request, MSG_REPLY_SESSIONS);
		return;
	}
	(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "list_sessions: out of memory");
	request_fail(request);
}

void inspect_sessions(struct request *request)
{
	struct context *context = request->context; /* the request may be gone then */
	conn_spend_turn(request->session->conn);
	standstill_begin(context->server, context->io);
	list_sessions(request);
	standstill_end(context->server);
}

/* At a standstill. */
static struct session *find_session(const struct server *server, uint64_t id)
{
	for (uint32_t i = 0; i < server->loop_count; i++)
		for (const struct conn *conn = server->loops[i].conns; conn != NULL; conn = conn->next)
			if (conn->session->id == id)
				return conn->session;
	return NULL;
}

/* At a standstill: it may be another loop's. */
static opd_status set_priority(struct request *request, const struct msg_set_priority *set)
{
	struct session *session = find_session(request->context->server, set->session);
	if (session == NULL)
		return opd_fail(&request->error, OPD_NOT_FOUND, "session %" PRIu64 ": there is none", set->session);
	return session_set_base_priority(session, request->snapshot, set->op, &set->list, &request->error);
}

/* Below what the session has pushed for itself: that goes before. */
opd_status admin_set_session_priority(struct request *request, const struct msg_set_priority *set)
{
	struct server *server = request->context->server;
	opd_status status = access_check_right(request->session->access, RIGHT_SESSIONS, "set_priority (of a session)", server->log, &request->error);
	if (status != OPD_OK)
		return status;
	conn_spend_turn(request->session->conn);
	standstill_begin(server, request->context->io);
	status = set_priority(request, set);
	standstill_end(server);
	return status;
}

/* Where somebody's work runs is its own business, as it is in each request; how much it gets isn't. */
static bool may_set(struct request *request)
{
	const struct msg_set_session *set = &request->message.set_session;
	const bool own = set->session == 0 || set->session == request->session->id;
	if (own && set->weight == 0 && set->service_class == 0 && set->quota_count == 0)
		return true;
	return access_check_right(request->session->access, RIGHT_SESSIONS, "set_session", request->context->server->log, &request->error) == OPD_OK;
}

/* The number of a device by its name; 0 with OK: "any". */
static opd_status find_device(const struct snapshot *snapshot, struct msg_text name, uint32_t *number_out, opd_error *error)
{
	*number_out = 0;
	if (strcmp(name.data, "any") == 0)
		return OPD_OK;
	for (uint32_t i = 1; i < snapshot->device_count; i++)
		if (strcmp(snapshot->devices[i].name, name.data) == 0)
			*number_out = i;
	return *number_out != 0 ? OPD_OK : opd_fail(error, OPD_FAILED_PRECONDITION, "device %s: there is none to pin (a device, such as cuda:1, or any)", name.data);
}

static opd_status check_class(const struct session *session, uint32_t service_class, opd_error *error)
{
	const struct tenant *tenant = session->tenant;
	if (service_class == 0 || service_class - 1 >= (uint32_t)tenant->policy.class_max)
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "class %s: tenant %s may have %s at most (class_max)", sched_class_name((sched_class)(service_class - 1)), tenant->name,
	                sched_class_name(tenant->policy.class_max));
}

static opd_status check_quota(const struct msg_quota *quota, opd_error *error)
{
	if (quota->kind == QUOTA_SESSIONS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "quota sessions is a tenant's: the configuration has it");
	return quota_check((quota_kind)quota->kind, quota->limit, error);
}

/* All of it, before any of it is done. */
static opd_status check_set(const struct request *request, const struct session *session, uint32_t *device_out, opd_error *error)
{
	const struct msg_set_session *set = &request->message.set_session;
	if (set->weight > SCHED_WEIGHT_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "weight %" PRIu32 ", expected 1 to %u (0: as it is)", set->weight, SCHED_WEIGHT_MAX);
	opd_status status = check_class(session, set->service_class, error);
	if (status == OPD_OK && set->device.bytes != 0)
		status = find_device(request->snapshot, set->device, device_out, error);
	for (uint32_t i = 0; status == OPD_OK && i < set->quota_count; i++)
		status = check_quota(&set->quotas[i], error);
	return status;
}

static void set_quota(struct session *session, const struct msg_quota *quota)
{
	const uint64_t configured = session->tenant->policy.session_quota[quota->kind];
	session_set_quota(session, (quota_kind)quota->kind, quota->limit != 0 ? quota->limit : configured);
}

/* At a standstill: it may be another loop's. */
static void set_session(struct request *request)
{
	const struct msg_set_session *set = &request->message.set_session;
	struct session *session = set->session == 0 ? request->session : find_session(request->context->server, set->session);
	uint32_t device = 0;
	if (session == NULL)
		(void)opd_fail(&request->error, OPD_NOT_FOUND, "session %" PRIu64 ": there is none", set->session);
	else
		(void)!check_set(request, session, &device, &request->error);
	if (request->error.status != OPD_OK)
		return;
	if (set->weight != 0)
		session_set_weight(session, set->weight);
	if (set->service_class != 0)
		session->class = (sched_class)(set->service_class - 1);
	if (set->device.bytes != 0)
		atomic_store_explicit(&session->pinned_device, device, memory_order_relaxed);
	for (uint32_t i = 0; i < set->quota_count; i++)
		set_quota(session, &set->quotas[i]);
}

void admin_set_session(struct request *request)
{
	struct server *server = request->context->server;
	if (may_set(request)) {
		conn_spend_turn(request->session->conn);
		standstill_begin(server, request->context->io);
		set_session(request);
		standstill_end(server);
	}
	request_reply_empty(request);
}
