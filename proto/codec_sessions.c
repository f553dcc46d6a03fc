/* Sessions, tenants and lanes as the daemon reports them, both ways. */
#include "proto/bounds.h"
#include "proto/codec_internal.h"

/* ---- Reading ---- */

static struct msg_usage read_usage(const Opd__V1__Usage *in)
{
	return in == NULL ? (struct msg_usage){0, 0, 0, 0} : (struct msg_usage){in->jobs, in->device_ns, in->wait_ns, in->wait_max_ns};
}

static opd_status read_quota(struct reader *reader, const Opd__V1__Quota *in, struct msg_quota *out)
{
	if ((int)in->kind < 0 || (uint32_t)in->kind >= MSG_QUOTA_KINDS)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "quota: kind %d, expected 0 to %u", (int)in->kind, MSG_QUOTA_KINDS - 1);
	*out = (struct msg_quota){(uint32_t)in->kind, in->limit, in->used, in->refused};
	return OPD_OK;
}

static opd_status read_quotas(struct reader *reader, size_t count, Opd__V1__Quota *const *in, uint32_t *count_out, struct msg_quota **out)
{
	opd_status status = read_count(reader, "quotas", count, MSG_QUOTA_KINDS);
	if (status != OPD_OK)
		return status;
	*out = arena_array(reader->arena, count, sizeof **out);
	if (*out == NULL)
		return read_full(reader);
	for (*count_out = 0; status == OPD_OK && *count_out < count; ++*count_out)
		status = read_quota(reader, in[*count_out], &(*out)[*count_out]);
	return status;
}

opd_status read_set_session(struct reader *reader, const Opd__V1__SetSession *in, struct msg_set_session *out)
{
	*out = (struct msg_set_session){.session = in->session, .weight = in->weight};
	opd_status status = read_service_class(reader, (int)in->service_class, &out->service_class);
	if (status == OPD_OK)
		status = read_text(reader, "device", in->device, BOUND_NAME_BYTES, &out->device);
	return status == OPD_OK ? read_quotas(reader, in->n_quotas, in->quotas, &out->quota_count, &out->quotas) : status;
}

static opd_status read_session(struct reader *reader, const Opd__V1__SessionState *in, struct msg_session_state *out)
{
	*out = (struct msg_session_state){
		.session = in->session,
		.age_us = in->age_us,
		.weight = in->weight,
		.in_flight = in->in_flight,
		.queued = in->queued,
		.running = in->running,
		.memory_bytes = in->memory_bytes,
		.share = in->share,
		.usage = read_usage(in->usage),
	};
	opd_status status = read_service_class(reader, (int)in->service_class, &out->service_class);
	if (status == OPD_OK)
		status = read_text(reader, "tenant", in->tenant, BOUND_STR_BYTES, &out->tenant);
	if (status == OPD_OK)
		status = read_quotas(reader, in->n_quotas, in->quotas, &out->quota_count, &out->quotas);
	if (status == OPD_OK)
		status = read_text(reader, "device", in->device, BOUND_NAME_BYTES, &out->device);
	return status == OPD_OK ? read_text(reader, "peer", in->peer, BOUND_STR_BYTES, &out->peer) : status;
}

static opd_status read_tenant(struct reader *reader, const Opd__V1__TenantState *in, struct msg_tenant_state *out)
{
	*out = (struct msg_tenant_state){
		.weight = in->weight,
		.sessions = in->sessions,
		.queued = in->queued,
		.running = in->running,
		.device_rate_ns = in->device_rate_ns,
		.usage = read_usage(in->usage),
	};
	opd_status status = read_service_class(reader, (int)in->service_class, &out->service_class);
	if (status == OPD_OK)
		status = read_service_class(reader, (int)in->class_max, &out->class_max);
	if (status == OPD_OK)
		status = read_quotas(reader, in->n_quotas, in->quotas, &out->quota_count, &out->quotas);
	return status == OPD_OK ? read_text(reader, "tenant", in->name, BOUND_STR_BYTES, &out->name) : status;
}

static opd_status read_lane(struct reader *reader, const Opd__V1__LaneState *in, struct msg_lane_state *out)
{
	*out = (struct msg_lane_state){.threads = in->threads, .queued = in->queued, .running = in->running, .device_ns = in->device_ns};
	return read_text(reader, "lane", in->name, BOUND_STR_BYTES, &out->name);
}

opd_status read_sessions(struct reader *reader, const Opd__V1__Sessions *in, struct msg_sessions *out)
{
	opd_status status = read_count(reader, "sessions", in->n_sessions, BOUND_LIST);
	if (status == OPD_OK)
		status = read_count(reader, "tenants", in->n_tenants, BOUND_LIST);
	if (status == OPD_OK)
		status = read_count(reader, "lanes", in->n_lanes, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	*out = (struct msg_sessions){.uptime_us = in->uptime_us, .next = in->next};
	out->sessions = arena_array(reader->arena, in->n_sessions, sizeof out->sessions[0]);
	out->tenants = arena_array(reader->arena, in->n_tenants, sizeof out->tenants[0]);
	out->lanes = arena_array(reader->arena, in->n_lanes, sizeof out->lanes[0]);
	if (out->sessions == NULL || out->tenants == NULL || out->lanes == NULL)
		return read_full(reader);
	for (; status == OPD_OK && out->session_count < in->n_sessions; out->session_count++)
		status = read_session(reader, in->sessions[out->session_count], &out->sessions[out->session_count]);
	for (; status == OPD_OK && out->tenant_count < in->n_tenants; out->tenant_count++)
		status = read_tenant(reader, in->tenants[out->tenant_count], &out->tenants[out->tenant_count]);
	for (; status == OPD_OK && out->lane_count < in->n_lanes; out->lane_count++)
		status = read_lane(reader, in->lanes[out->lane_count], &out->lanes[out->lane_count]);
	return status;
}

/* ---- Writing ---- */

static Opd__V1__Usage *write_usage(struct arena *arena, const struct msg_usage *in)
{
	Opd__V1__Usage *out = write_new(arena, &opd__v1__usage__descriptor);
	if (out == NULL)
		return NULL;
	out->jobs = in->jobs;
	out->device_ns = in->device_ns;
	out->wait_ns = in->wait_ns;
	out->wait_max_ns = in->wait_max_ns;
	return out;
}

/* NULL: out of memory. */
static Opd__V1__Quota **write_quotas(struct arena *arena, uint32_t count, const struct msg_quota *in, size_t *count_out)
{
	Opd__V1__Quota **list = arena_array(arena, count, sizeof list[0]);
	for (uint32_t i = 0; list != NULL && i < count; i++) {
		if ((list[i] = write_new(arena, &opd__v1__quota__descriptor)) == NULL)
			return NULL;
		list[i]->kind = (Opd__V1__QuotaKind)in[i].kind;
		list[i]->limit = in[i].limit;
		list[i]->used = in[i].used;
		list[i]->refused = in[i].refused;
	}
	*count_out = count;
	return list;
}

static Opd__V1__SessionState *write_session(struct arena *arena, const struct msg_session_state *in)
{
	Opd__V1__SessionState *out = write_new(arena, &opd__v1__session_state__descriptor);
	if (out == NULL || (out->usage = write_usage(arena, &in->usage)) == NULL ||
	    (out->quotas = write_quotas(arena, in->quota_count, in->quotas, &out->n_quotas)) == NULL)
		return NULL;
	out->session = in->session;
	out->tenant = write_text(in->tenant);
	out->peer = write_text(in->peer);
	out->device = write_text(in->device);
	out->age_us = in->age_us;
	out->service_class = (Opd__V1__ServiceClass)in->service_class;
	out->weight = in->weight;
	out->in_flight = in->in_flight;
	out->queued = in->queued;
	out->running = in->running;
	out->memory_bytes = in->memory_bytes;
	out->share = in->share;
	return out;
}

static Opd__V1__TenantState *write_tenant(struct arena *arena, const struct msg_tenant_state *in)
{
	Opd__V1__TenantState *out = write_new(arena, &opd__v1__tenant_state__descriptor);
	if (out == NULL || (out->usage = write_usage(arena, &in->usage)) == NULL ||
	    (out->quotas = write_quotas(arena, in->quota_count, in->quotas, &out->n_quotas)) == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->weight = in->weight;
	out->service_class = (Opd__V1__ServiceClass)in->service_class;
	out->class_max = (Opd__V1__ServiceClass)in->class_max;
	out->device_rate_ns = in->device_rate_ns;
	out->sessions = in->sessions;
	out->queued = in->queued;
	out->running = in->running;
	return out;
}

static Opd__V1__LaneState *write_lane(struct arena *arena, const struct msg_lane_state *in)
{
	Opd__V1__LaneState *out = write_new(arena, &opd__v1__lane_state__descriptor);
	if (out == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->threads = in->threads;
	out->queued = in->queued;
	out->running = in->running;
	out->device_ns = in->device_ns;
	return out;
}

Opd__V1__Sessions *write_sessions(struct arena *arena, const struct msg_sessions *in)
{
	Opd__V1__Sessions *out = write_new(arena, &opd__v1__sessions__descriptor);
	if (out == NULL || (out->sessions = arena_array(arena, in->session_count, sizeof out->sessions[0])) == NULL ||
	    (out->tenants = arena_array(arena, in->tenant_count, sizeof out->tenants[0])) == NULL ||
	    (out->lanes = arena_array(arena, in->lane_count, sizeof out->lanes[0])) == NULL)
		return NULL;
	out->uptime_us = in->uptime_us;
	out->next = in->next;
	for (; out->n_sessions < in->session_count; out->n_sessions++)
		if ((out->sessions[out->n_sessions] = write_session(arena, &in->sessions[out->n_sessions])) == NULL)
			return NULL;
	for (; out->n_tenants < in->tenant_count; out->n_tenants++)
		if ((out->tenants[out->n_tenants] = write_tenant(arena, &in->tenants[out->n_tenants])) == NULL)
			return NULL;
	for (; out->n_lanes < in->lane_count; out->n_lanes++)
		if ((out->lanes[out->n_lanes] = write_lane(arena, &in->lanes[out->n_lanes])) == NULL)
			return NULL;
	return out;
}

bool write_session_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out)
{
	if (in->kind == MSG_REQUEST_LIST_SESSIONS) {
		out->body_case = OPD__V1__REQUEST__BODY_LIST_SESSIONS;
		out->list_sessions = write_new(arena, &opd__v1__list_sessions__descriptor);
		if (out->list_sessions == NULL)
			return false;
		out->list_sessions->first = in->first_session;
		return true;
	}
	out->body_case = OPD__V1__REQUEST__BODY_SET_SESSION;
	out->set_session = write_new(arena, &opd__v1__set_session__descriptor);
	if (out->set_session == NULL)
		return false;
	out->set_session->session = in->set_session.session;
	out->set_session->weight = in->set_session.weight;
	out->set_session->service_class = (Opd__V1__ServiceClass)in->set_session.service_class;
	out->set_session->device = write_text(in->set_session.device);
	out->set_session->quotas = write_quotas(arena, in->set_session.quota_count, in->set_session.quotas, &out->set_session->n_quotas);
	return out->set_session->quotas != NULL;
}
