/* Who shares the lanes, and what each has had: sessions, tenants, lanes; and an administrator's hand on a session. */
#include <inttypes.h>

#include "proto/bounds.h"
#include "server/conn.h"
#include "server/daemon.h"
#include "server/request.h"

static bool sees(const struct session *who, const struct session *session)
{
	return access_may(who->access, RIGHT_SESSIONS) || session->tenant == who->tenant;
}

static struct msg_usage usage_of(const struct sched_usage *usage)
{
	return (struct msg_usage){usage->jobs, usage->device_ns, usage->wait_ns, usage->wait_max_ns};
}

/* The lane is locked for one session at a time: thousands of them must not hold it up. */
static void fill_session(const struct session *session, const struct server *server, struct msg_session_state *out)
{
	const struct sched_flow *flow = &session->flow;
	const struct scheduler *scheduler = lane_scheduler_lock(server->lane);
	*out = (struct msg_session_state){
		.session = session->id,
		.tenant = msg_text(session->tenant->name),
		.peer = msg_text(session->conn == NULL ? "" : session->conn->peer),
		.age_us = session->conn == NULL ? 0 : server->turn_us - session->conn->opened_us,
		.service_class = session->class + 1,
		.weight = flow->weight,
		.in_flight = session->in_flight,
		.queued = flow->queued,
		.running = flow->running,
		.memory_bytes = atomic_load_explicit(&session->account->used_bytes, memory_order_relaxed),
		.share = scheduler_share(scheduler, flow, session->class),
		.usage = usage_of(&flow->usage),
	};
	lane_scheduler_unlock(server->lane);
	out->usage.device_ns += session->inline_ns;
}

/* The server's sessions that this one sees, oldest first, from `first` on. */
static uint32_t count_sessions(const struct server *server, const struct session *who, uint64_t first)
{
	uint32_t count = 0;
	for (const struct conn *conn = server->conns; conn != NULL; conn = conn->next)
		count += conn->session->id >= first && sees(who, conn->session);
	return count;
}

static bool fill_sessions(struct request *request, struct msg_sessions *out)
{
	const struct server *server = request->context->server;
	const uint64_t first = request->message.first_session;
	const uint32_t all = count_sessions(server, request->session, first);
	const uint32_t count = all < BOUND_LIST ? all : BOUND_LIST;
	out->sessions = arena_array(&request->arena, count, sizeof out->sessions[0]);
	if (out->sessions == NULL)
		return false;
	/* Connections are linked newest first; ids rise. */
	uint32_t at = all;
	for (const struct conn *conn = server->conns; conn != NULL; conn = conn->next) {
		if (conn->session->id < first || !sees(request->session, conn->session))
			continue;
		at--;
		if (at < count)
			fill_session(conn->session, server, &out->sessions[at]);
		else if (at == count)
			out->next = conn->session->id;
	}
	out->session_count = count;
	return true;
}

struct tenant_list {
	const struct session *who;
	struct lane *lane;
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
		.device_rate_ns = tenant->policy.device_rate_ns,
		.sessions = atomic_load_explicit(&tenant->sessions, memory_order_relaxed),
	};
	const struct sched_group *group = tenant->groups[0];
	if (group == NULL)
		return;
	(void)lane_scheduler_lock(list->lane);
	out->queued = group->queued;
	out->running = group->running;
	out->usage = usage_of(&group->usage);
	lane_scheduler_unlock(list->lane);
}

static bool fill_tenants(struct request *request, struct msg_sessions *out)
{
	struct tenants *tenants = request->context->server->tenants;
	struct tenant_list list = {.who = request->session, .lane = request->context->server->lane};
	tenants_walk(tenants, count_tenant, &list);
	list.count = list.count < BOUND_LIST ? list.count : BOUND_LIST;
	list.items = out->tenants = arena_zalloc(&request->arena, (list.count + 1) * sizeof list.items[0]);
	if (list.items == NULL)
		return false;
	out->tenant_count = list.count;
	tenants_walk(tenants, fill_tenant, &list);
	return true;
}

static bool fill_lane(struct request *request, struct msg_sessions *out)
{
	struct lane *lane = request->context->server->lane;
	out->lanes = arena_zalloc(&request->arena, sizeof out->lanes[0]);
	if (out->lanes == NULL)
		return false;
	out->lane_count = 1;
	const struct scheduler *scheduler = lane_scheduler_lock(lane);
	out->lanes[0] = (struct msg_lane_state){
		.name = msg_text("cpu"),
		.threads = lane_threads(lane),
		.queued = scheduler->queued,
		.running = scheduler->running,
		.device_ns = scheduler->device_ns,
	};
	lane_scheduler_unlock(lane);
	return true;
}

void inspect_sessions(struct request *request)
{
	const struct server *server = request->context->server;
	struct msg_sessions *out = &request->reply.sessions;
	*out = (struct msg_sessions){.uptime_us = request_now_ns() / 1000 - server->started_us};
	if (fill_sessions(request, out) && fill_tenants(request, out) && fill_lane(request, out)) {
		request_reply(request, MSG_REPLY_SESSIONS);
		return;
	}
	(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "list_sessions: out of memory");
	request_fail(request);
}

static struct session *find_session(const struct server *server, uint64_t id)
{
	for (const struct conn *conn = server->conns; conn != NULL; conn = conn->next)
		if (conn->session->id == id)
			return conn->session;
	return NULL;
}

void admin_set_session(struct request *request)
{
	const struct msg_set_session *set = &request->message.set_session;
	struct server *server = request->context->server;
	struct session *session = find_session(server, set->session);
	if (session == NULL)
		(void)opd_fail(&request->error, OPD_NOT_FOUND, "session %" PRIu64 ": there is none", set->session);
	else if (set->weight > SCHED_WEIGHT_MAX)
		(void)opd_fail(&request->error, OPD_INVALID_ARGUMENT, "weight %" PRIu32 ", expected 1 to %u (0: as it is)", set->weight, SCHED_WEIGHT_MAX);
	if (request->error.status == OPD_OK && set->weight != 0) {
		(void)lane_scheduler_lock(server->lane);
		sched_flow_set_weight(&session->flow, set->weight);
		lane_scheduler_unlock(server->lane);
	}
	if (request->error.status == OPD_OK && set->service_class != 0)
		session->class = (sched_class)(set->service_class - 1);
	request_reply_empty(request);
}
