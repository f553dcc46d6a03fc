#include "server/session.h"

#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/daemon.h"
#include "server/graph.h"
#include "server/request.h"

#define STAR UINT32_MAX

struct priority_entry {
	uint32_t op_index; /* STAR: `*` */
	struct plist *list;
};

struct priority_map {
	struct priority_map *below;
	bool base; /* not pushed: pop leaves it */
	uint32_t count;
	uint32_t room;
	struct priority_entry *entries;
};

static void map_destroy(struct priority_map *map)
{
	for (uint32_t i = 0; i < map->count; i++)
		plist_unref(map->entries[i].list);
	free(map->entries);
	free(map);
}

static struct priority_entry *map_find(const struct priority_map *map, uint32_t op_index)
{
	for (uint32_t i = 0; i < map->count; i++)
		if (map->entries[i].op_index == op_index)
			return &map->entries[i];
	return NULL;
}

/* Takes `list`; false: out of memory, and it isn't taken. */
static bool map_put(struct priority_map *map, uint32_t op_index, struct plist *list)
{
	struct priority_entry *entry = map_find(map, op_index);
	if (entry != NULL) {
		plist_unref(entry->list);
		entry->list = list;
		return true;
	}
	if (map->count == map->room) {
		uint32_t room = map->room == 0 ? 4 : map->room * 2;
		struct priority_entry *entries = realloc(map->entries, room * sizeof entries[0]);
		if (entries == NULL)
			return false;
		map->entries = entries;
		map->room = room;
	}
	map->entries[map->count++] = (struct priority_entry){op_index, list};
	return true;
}

static void map_remove(struct priority_map *map, uint32_t op_index)
{
	struct priority_entry *entry = map_find(map, op_index);
	if (entry == NULL)
		return;
	plist_unref(entry->list);
	*entry = map->entries[--map->count];
}

struct session *session_create(struct server *server, struct memory *memory, uint64_t id, struct access *access, uint64_t limit_bytes, uint32_t kept_limit)
{
	struct session *session = access == NULL ? NULL : calloc(1, sizeof *session);
	if (session == NULL) {
		access_unref(access);
		return NULL;
	}
	session->refs = 1;
	session->id = id;
	session->server = server;
	session->account = account_create(memory, limit_bytes);
	session->maps = calloc(1, sizeof *session->maps);
	kept_init(&session->kept, kept_limit);
	if (session->account == NULL || session->maps == NULL || !session_set_access(session, access)) {
		access_unref(access);
		session_unref(session);
		return NULL;
	}
	session->maps->base = true;
	return session;
}

static void leave_tenant(struct session *session)
{
	if (session->tenant == NULL)
		return;
	(void)atomic_fetch_sub_explicit(&session->tenant->sessions, 1, memory_order_relaxed);
	tenant_unref(session->server->tenants, session->tenant);
	session->tenant = NULL;
}

static bool set_tenant(struct session *session, const char *name)
{
	struct server *server = session->server;
	struct tenant_policy policy;
	config_tenant(server->config, name, &policy);
	struct tenant *tenant = tenant_get(server->tenants, name, &policy);
	struct sched_group *group = tenant == NULL ? NULL : tenant_group(server->tenants, tenant, 0);
	if (group == NULL) {
		tenant_unref(server->tenants, tenant);
		return false;
	}
	leave_tenant(session);
	session->tenant = tenant;
	session->lane = server->lanes[tenant->lane].lane;
	account_set_above(session->account, tenant->total);
	(void)atomic_fetch_add_explicit(&tenant->sessions, 1, memory_order_relaxed);
	session->class = tenant->policy.class;
	sched_flow_init(&session->flow, group, SCHED_WEIGHT_DEFAULT);
	for (uint32_t i = 0; i < QUOTA_COUNT; i++)
		if (tenant->policy.session_quota[i] != quota_limit(&session->quota, i))
			session_set_quota(session, (quota_kind)i, tenant->policy.session_quota[i]);
	return true;
}

bool session_set_access(struct session *session, struct access *access)
{
	if (!set_tenant(session, access->tenant))
		return false;
	access_unref(session->access);
	session->access = access;
	return true;
}

static void set_memory(struct session *session)
{
	const uint64_t own = quota_limit(&session->quota, QUOTA_MEMORY);
	const uint64_t all = session->server->config->limits.session_bytes;
	account_set_limits(session->account, own == 0 || own > all ? all : own, quota_limit(&session->quota, QUOTA_DEVICE_MEMORY));
}

struct device_flow {
	struct device_flow *next;
	uint32_t device;
	struct sched_flow flow;
};

struct sched_flow *session_find_flow(const struct session *session, uint32_t device)
{
	struct device_flow *found = atomic_load_explicit(&session->device_flows, memory_order_acquire);
	while (found != NULL && found->device != device)
		found = found->next;
	return found == NULL ? NULL : &found->flow;
}

static uint32_t weight_of(struct session *session)
{
	(void)lane_scheduler_lock(session->lane);
	const uint32_t weight = session->flow.weight;
	lane_scheduler_unlock(session->lane);
	return weight;
}

struct sched_flow *session_flow(struct session *session, uint32_t device)
{
	struct sched_flow *found = device == 0 ? &session->flow : session_find_flow(session, device);
	if (found != NULL)
		return found;
	struct tenants *tenants = session->server->tenants;
	struct sched_group *group = tenant_group(tenants, session->tenant, device);
	struct device_flow *made = group == NULL ? NULL : calloc(1, sizeof *made);
	if (made == NULL)
		return NULL;
	made->device = device;
	sched_flow_init(&made->flow, group, weight_of(session));
	made->flow.queue_max = (uint32_t)quota_limit(&session->quota, QUOTA_QUEUED);
	made->flow.bucket.rate_ns = quota_limit(&session->quota, QUOTA_DEVICE_TIME);
	made->flow.bucket.tokens_ns = (double)made->flow.bucket.rate_ns;
	made->next = atomic_load_explicit(&session->device_flows, memory_order_relaxed);
	atomic_store_explicit(&session->device_flows, made, memory_order_release);
	return &made->flow;
}

static void set_rates(struct session *session, struct scheduler *scheduler, struct sched_flow *flow)
{
	const uint64_t rate_ns = quota_limit(&session->quota, QUOTA_DEVICE_TIME);
	flow->queue_max = (uint32_t)quota_limit(&session->quota, QUOTA_QUEUED);
	if (flow->bucket.rate_ns != rate_ns)
		sched_flow_set_rate(scheduler, flow, rate_ns, request_now_ns());
}

/* On every lane where it has a place. */
static void set_lanes(struct session *session)
{
	struct server *server = session->server;
	set_rates(session, lane_scheduler_lock(session->lane), &session->flow);
	lane_scheduler_unlock(session->lane);
	for (struct device_flow *each = atomic_load_explicit(&session->device_flows, memory_order_acquire); each != NULL; each = each->next) {
		struct device_lane *lane = device_lane_started(server, each->device);
		set_rates(session, device_lane_scheduler_lock(lane), &each->flow);
		device_lane_scheduler_unlock(lane);
	}
}

void session_set_weight(struct session *session, uint32_t weight)
{
	struct server *server = session->server;
	(void)lane_scheduler_lock(session->lane);
	sched_flow_set_weight(&session->flow, weight);
	lane_scheduler_unlock(session->lane);
	for (struct device_flow *each = atomic_load_explicit(&session->device_flows, memory_order_acquire); each != NULL; each = each->next) {
		struct device_lane *lane = device_lane_started(server, each->device);
		(void)device_lane_scheduler_lock(lane);
		sched_flow_set_weight(&each->flow, weight);
		device_lane_scheduler_unlock(lane);
	}
}

void session_set_quota(struct session *session, quota_kind kind, uint64_t limit)
{
	atomic_store_explicit(&session->quota.limits[kind], limit, memory_order_relaxed);
	if (kind == QUOTA_MEMORY || kind == QUOTA_DEVICE_MEMORY)
		set_memory(session);
	else if (kind == QUOTA_QUEUED || kind == QUOTA_DEVICE_TIME)
		set_lanes(session);
}

struct session *session_ref(struct session *session)
{
	(void)atomic_fetch_add_explicit(&session->refs, 1, memory_order_relaxed);
	return session;
}

void session_unref(struct session *session)
{
	if (session == NULL || atomic_fetch_sub_explicit(&session->refs, 1, memory_order_acq_rel) != 1)
		return;
	graphs_destroy(session->graphs);
	kept_fini(&session->kept);
	regions_fini(&session->regions);
	while (session->maps != NULL) {
		struct priority_map *map = session->maps;
		session->maps = map->below;
		map_destroy(map);
	}
	account_unref(session->account);
	for (struct device_flow *each = session->device_flows, *next; each != NULL; each = next) {
		next = each->next;
		free(each);
	}
	leave_tenant(session);
	access_unref(session->access);
	free(session->credential.subject);
	free(session);
}

/* The op that an entry is for, as index; STAR for `*`. */
static opd_status entry_op(const struct snapshot *snapshot, struct msg_text name, const struct op **op_out, uint32_t *index_out,
                           opd_error *error)
{
	*op_out = NULL;
	*index_out = STAR;
	if (name.bytes == 1 && name.data[0] == '*')
		return OPD_OK;
	const struct op *op = snapshot_find_op(snapshot, name, error);
	if (op == NULL)
		return OPD_NOT_FOUND;
	*op_out = op;
	*index_out = op->index;
	return OPD_OK;
}

static opd_status put_entry(struct priority_map *map, const struct snapshot *snapshot, struct msg_text name, const struct msg_list *list,
                            opd_error *error)
{
	const struct op *op;
	uint32_t index;
	opd_status status = entry_op(snapshot, name, &op, &index, error);
	if (status != OPD_OK)
		return status;
	if (!list->present) {
		map_remove(map, index);
		return OPD_OK;
	}
	status = plist_check(snapshot, op, list->names, list->count, error);
	if (status != OPD_OK)
		return status;
	struct plist *stored = plist_create(MSG_LEVEL_SESSION, index == STAR, list->names, list->count);
	if (stored != NULL && map_put(map, index, stored))
		return OPD_OK;
	plist_unref(stored);
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority list: out of memory");
}

opd_status session_push_priority(struct session *session, const struct snapshot *snapshot, const struct msg_priority_map *message,
                                 opd_error *error)
{
	if (session->map_depth == BOUND_PRIORITY_DEPTH)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priorities: %u maps are pushed, no more may be", BOUND_PRIORITY_DEPTH);
	struct priority_map *map = calloc(1, sizeof *map);
	if (map == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priorities: out of memory");
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < message->count; i++) {
		struct msg_list list = message->entries[i].list;
		list.present = true; /* an entry without a list has an empty one */
		status = put_entry(map, snapshot, message->entries[i].op, &list, error);
	}
	if (status != OPD_OK) {
		map_destroy(map);
		return status;
	}
	map->below = session->maps;
	session->maps = map;
	session->map_depth++;
	session->priority_epoch++;
	return OPD_OK;
}

opd_status session_pop_priority(struct session *session, opd_error *error)
{
	struct priority_map *map = session->maps;
	if (map->base)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "priorities: nothing is pushed, so nothing can be popped");
	session->maps = map->below;
	session->map_depth--;
	session->priority_epoch++;
	map_destroy(map);
	return OPD_OK;
}

opd_status session_set_priority(struct session *session, const struct snapshot *snapshot, struct msg_text op, const struct msg_list *list,
                                opd_error *error)
{
	session->priority_epoch++;
	return put_entry(session->maps, snapshot, op, list, error);
}

opd_status session_set_base_priority(struct session *session, const struct snapshot *snapshot, struct msg_text op, const struct msg_list *list, opd_error *error)
{
	struct priority_map *base = session->maps;
	while (!base->base)
		base = base->below;
	session->priority_epoch++;
	return put_entry(base, snapshot, op, list, error);
}

struct plist *session_priority(const struct session *session, uint32_t op_index)
{
	for (const struct priority_map *map = session->maps; map != NULL; map = map->below) {
		const struct priority_entry *entry = map_find(map, op_index);
		if (entry == NULL)
			entry = map_find(map, STAR);
		if (entry != NULL)
			return entry->list;
	}
	return NULL;
}
