#include "server/tenant.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/request.h"
#include "server/tensors.h"

#define REST_NS 10000000000u
#define RESTING_MAX 1024u

struct tenants {
	pthread_mutex_t mutex;
	struct memory *memory;
	struct tenant *first;
	uint32_t resting;
};

struct tenants *tenants_create(struct memory *memory)
{
	struct tenants *table = calloc(1, sizeof *table);
	if (table == NULL)
		return NULL;
	if (pthread_mutex_init(&table->mutex, NULL) != 0) {
		free(table);
		return NULL;
	}
	table->memory = memory;
	return table;
}

void tenants_destroy(struct tenants *table)
{
	if (table == NULL)
		return;
	tenants_sweep(table, UINT64_MAX);
	assert(table->first == NULL);
	(void)pthread_mutex_destroy(&table->mutex);
	free(table);
}

static void tenant_destroy(struct tenant *tenant)
{
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++)
		free(tenant->groups[i]);
	account_unref(tenant->account);
	account_unref(tenant->total);
	free(tenant);
}

static struct tenant *tenant_create(struct tenants *table, const char *name, const struct tenant_policy *policy)
{
	struct tenant *tenant = calloc(1, sizeof *tenant);
	if (tenant == NULL)
		return NULL;
	(void)snprintf(tenant->name, sizeof tenant->name, "%s", name);
	tenant->total = account_create(table->memory, UINT64_MAX);
	tenant->account = account_create(table->memory, UINT64_MAX); /* the tenant's total and the daemon's ledger limit it */
	if (tenant->total == NULL || tenant->account == NULL || !account_name(tenant->total, "tenant %s", tenant->name)) {
		tenant_destroy(tenant);
		return NULL;
	}
	account_set_above(tenant->account, tenant->total);
	tenant_set_policy(tenant, policy);
	tenant->lane = policy->lane;
	tenant->next = table->first;
	table->first = tenant;
	return tenant;
}

void tenant_set_policy(struct tenant *tenant, const struct tenant_policy *policy)
{
	tenant->policy = *policy;
	for (uint32_t i = 0; i < QUOTA_COUNT; i++)
		atomic_store_explicit(&tenant->quota.limits[i], policy->quota[i], memory_order_relaxed);
	account_set_limits(tenant->total, policy->quota[QUOTA_MEMORY] == 0 ? UINT64_MAX : policy->quota[QUOTA_MEMORY], policy->quota[QUOTA_DEVICE_MEMORY]);
}

struct tenant *tenant_get(struct tenants *table, const char *name, const struct tenant_policy *policy)
{
	(void)pthread_mutex_lock(&table->mutex);
	struct tenant *tenant = table->first;
	while (tenant != NULL && strcmp(tenant->name, name) != 0)
		tenant = tenant->next;
	if (tenant == NULL)
		tenant = tenant_create(table, name, policy);
	if (tenant != NULL && tenant->refs++ == 0 && tenant->resting_until_ns != 0) {
		tenant->resting_until_ns = 0;
		table->resting--;
	}
	(void)pthread_mutex_unlock(&table->mutex);
	return tenant;
}

struct tenant *tenant_ref(struct tenants *table, struct tenant *tenant)
{
	(void)pthread_mutex_lock(&table->mutex);
	tenant->refs++;
	(void)pthread_mutex_unlock(&table->mutex);
	return tenant;
}

/* Whoever could come back as somebody new would have a full bucket each time. */
static bool has_rates(const struct tenant *tenant)
{
	return quota_limit(&tenant->quota, QUOTA_BYTES_IN) != 0 || quota_limit(&tenant->quota, QUOTA_BYTES_OUT) != 0 ||
	       quota_limit(&tenant->quota, QUOTA_DEVICE_TIME) != 0;
}

/* Until its buckets are full again, whatever it has used; what it owes for device time alone is cut off at REST_NS. */
static uint64_t rest_until_ns(const struct tenant *tenant)
{
	uint64_t until_ns = request_now_ns() + REST_NS;
	const uint64_t in_ns = atomic_load_explicit(&tenant->quota.in_paid_ns, memory_order_relaxed);
	const uint64_t out_ns = atomic_load_explicit(&tenant->quota.out_paid_ns, memory_order_relaxed);
	until_ns = until_ns > in_ns ? until_ns : in_ns;
	return until_ns > out_ns ? until_ns : out_ns;
}

void tenant_unref(struct tenants *table, struct tenant *tenant)
{
	if (tenant == NULL)
		return;
	(void)pthread_mutex_lock(&table->mutex);
	const bool last = --tenant->refs == 0;
	const bool rests = last && has_rates(tenant) && table->resting < RESTING_MAX;
	if (rests) {
		tenant->resting_until_ns = rest_until_ns(tenant);
		table->resting++;
	} else if (last) {
		struct tenant **link = &table->first;
		while (*link != tenant)
			link = &(*link)->next;
		*link = tenant->next;
	}
	(void)pthread_mutex_unlock(&table->mutex);
	if (last && !rests)
		tenant_destroy(tenant);
}

void tenants_sweep(struct tenants *table, uint64_t now_ns)
{
	struct tenant *gone = NULL;
	(void)pthread_mutex_lock(&table->mutex);
	for (struct tenant **link = &table->first; *link != NULL;) {
		struct tenant *tenant = *link;
		if (tenant->refs != 0 || tenant->resting_until_ns > now_ns) {
			link = &tenant->next;
			continue;
		}
		*link = tenant->next;
		table->resting--;
		tenant->next = gone;
		gone = tenant;
	}
	(void)pthread_mutex_unlock(&table->mutex);
	while (gone != NULL) {
		struct tenant *tenant = gone;
		gone = tenant->next;
		tenant_destroy(tenant);
	}
}

struct sched_group *tenant_group(struct tenants *table, struct tenant *tenant, uint32_t device)
{
	(void)pthread_mutex_lock(&table->mutex);
	struct sched_group *group = tenant->groups[device];
	if (group == NULL && (group = calloc(1, sizeof *group)) != NULL) {
		sched_group_init(group, tenant->policy.weight);
		group->bucket.rate_ns = tenant->policy.quota[QUOTA_DEVICE_TIME];
		group->bucket.tokens_ns = (double)group->bucket.rate_ns;
		group->queue_max = (uint32_t)tenant->policy.quota[QUOTA_QUEUED];
		tenant->groups[device] = group;
	}
	(void)pthread_mutex_unlock(&table->mutex);
	return group;
}

void tenants_walk(struct tenants *table, void (*visit)(struct tenant *tenant, void *argument), void *argument)
{
	(void)pthread_mutex_lock(&table->mutex);
	for (struct tenant *tenant = table->first; tenant != NULL; tenant = tenant->next)
		visit(tenant, argument);
	(void)pthread_mutex_unlock(&table->mutex);
}
