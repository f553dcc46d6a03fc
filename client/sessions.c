/* Who shares the daemon: what it says of sessions, tenants and lanes. */
#include <inttypes.h>

#include "client/connection.h"
#include "client/document.h"
#include "client/request.h"

static opd_usage usage_of(const struct msg_usage *usage)
{
	return (opd_usage){usage->jobs, usage->device_ns, usage->wait_ns, usage->wait_max_ns};
}

/* NULL: out of memory. */
static const opd_quota *quotas_of(opd_result *result, uint32_t count, const struct msg_quota *from)
{
	opd_quota *quotas = arena_array(&result->arena, count, sizeof *quotas);
	for (uint32_t i = 0; quotas != NULL && i < count; i++)
		quotas[i] = (opd_quota){(opd_quota_kind)from[i].kind, from[i].limit, from[i].used, from[i].refused};
	return quotas;
}

static bool fill_session(opd_result *result, const struct msg_session_state *from, opd_session_state *to)
{
	*to = (opd_session_state){
		.session = from->session,
		.tenant = result_text(result, from->tenant),
		.peer = result_text(result, from->peer),
		.age_us = from->age_us,
		.service_class = (opd_class)from->service_class,
		.weight = from->weight,
		.in_flight = from->in_flight,
		.queued = from->queued,
		.running = from->running,
		.memory_bytes = from->memory_bytes,
		.share = from->share,
		.usage = usage_of(&from->usage),
		.quota_count = from->quota_count,
		.quotas = quotas_of(result, from->quota_count, from->quotas),
		.device = result_text(result, from->device),
	};
	return to->quotas != NULL;
}

static bool fill_tenant(opd_result *result, const struct msg_tenant_state *from, opd_tenant_state *to)
{
	*to = (opd_tenant_state){
		.name = result_text(result, from->name),
		.weight = from->weight,
		.service_class = (opd_class)from->service_class,
		.class_max = (opd_class)from->class_max,
		.sessions = from->sessions,
		.device_rate_ns = from->device_rate_ns,
		.queued = from->queued,
		.running = from->running,
		.usage = usage_of(&from->usage),
		.quota_count = from->quota_count,
		.quotas = quotas_of(result, from->quota_count, from->quotas),
	};
	return to->quotas != NULL;
}

static void *document_sharing(opd_result *result)
{
	const struct msg_sessions *from = &result->reply.sessions;
	opd_sharing *sharing = document_alloc(result, sizeof *sharing);
	opd_session_state *sessions = arena_array(&result->arena, from->session_count, sizeof *sessions);
	opd_tenant_state *tenants = arena_array(&result->arena, from->tenant_count, sizeof *tenants);
	opd_lane_state *lanes = arena_array(&result->arena, from->lane_count, sizeof *lanes);
	if (sharing == NULL || sessions == NULL || tenants == NULL || lanes == NULL)
		return NULL;
	for (uint32_t i = 0; i < from->session_count; i++)
		if (!fill_session(result, &from->sessions[i], &sessions[i]))
			return NULL;
	for (uint32_t i = 0; i < from->tenant_count; i++)
		if (!fill_tenant(result, &from->tenants[i], &tenants[i]))
			return NULL;
	for (uint32_t i = 0; i < from->lane_count; i++)
		lanes[i] = (opd_lane_state){result_text(result, from->lanes[i].name), from->lanes[i].threads, from->lanes[i].queued, from->lanes[i].running,
		                            from->lanes[i].device_ns};
	*sharing = (opd_sharing){
		.uptime_us = from->uptime_us,
		.next = from->next,
		.session_count = from->session_count,
		.tenant_count = from->tenant_count,
		.lane_count = from->lane_count,
		.sessions = sessions,
		.tenants = tenants,
		.lanes = lanes,
	};
	return sharing;
}

/* Behind what it has, or not at all: a server must not have us ask for ever. */
static bool page_goes_on(const struct msg_sessions *page, uint64_t first)
{
	if (page->next == 0)
		return true;
	return page->session_count != 0 && page->next > first && page->next > page->sessions[page->session_count - 1].session;
}

opd_status opd_sessions(opd_client *client, uint64_t first, const opd_sharing **sharing_out, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_LIST_SESSIONS, .first_session = first};
	opd_result *result;
	const void *document;
	opd_status status = client_call(client, &message, MSG_REPLY_SESSIONS, &result, error);
	if (status == OPD_OK && !page_goes_on(&result->reply.sessions, first)) {
		status = opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: the list of sessions goes on at %" PRIu64, result->reply.sessions.next);
		opd_result_destroy(result);
	}
	if (status == OPD_OK)
		status = document_create(result, document_sharing, &document, error);
	if (status == OPD_OK)
		*sharing_out = document;
	return status;
}

static opd_status set_session(opd_client *client, const struct msg_set_session *set, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_SET_SESSION, .set_session = *set};
	opd_result *result;
	opd_status status = client_call(client, &message, MSG_REPLY_EMPTY, &result, error);
	if (status == OPD_OK)
		opd_result_destroy(result);
	return status;
}

opd_status opd_set_session(opd_client *client, uint64_t session, uint32_t weight, opd_class service_class, opd_error *error)
{
	const struct msg_set_session set = {.session = session, .weight = weight, .service_class = (uint32_t)service_class};
	return set_session(client, &set, error);
}

opd_status opd_set_session_quota(opd_client *client, uint64_t session, opd_quota_kind kind, uint64_t limit, opd_error *error)
{
	struct msg_quota quota = {.kind = (uint32_t)kind, .limit = limit};
	const struct msg_set_session set = {.session = session, .quota_count = 1, .quotas = &quota};
	return set_session(client, &set, error);
}

opd_status opd_set_session_device(opd_client *client, uint64_t session, const char *device, opd_error *error)
{
	const struct msg_set_session set = {.session = session, .device = msg_text(device)};
	return set_session(client, &set, error);
}
