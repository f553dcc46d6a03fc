#include "server/tenant.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/tensors.h"

struct tenants {
	pthread_mutex_t mutex;
	struct memory *memory;
	struct tenant *first;
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
	assert(table->first == NULL);
	(void)pthread_mutex_destroy(&table->mutex);
	free(table);
}

static void tenant_destroy(struct tenant *tenant)
{
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++)
		free(tenant->groups[i]);
	account_unref(tenant->account);
	free(tenant);
}

static struct tenant *tenant_create(struct tenants *table, const char *name, const struct tenant_policy *policy)
{
	struct tenant *tenant = calloc(1, sizeof *tenant);
	if (tenant == NULL)
		return NULL;
	tenant->account = account_create(table->memory, UINT64_MAX); /* the daemon's ledger limits it */
	if (tenant->account == NULL) {
		free(tenant);
		return NULL;
	}
	(void)snprintf(tenant->name, sizeof tenant->name, "%s", name);
	tenant->policy = *policy;
	tenant->next = table->first;
	table->first = tenant;
	return tenant;
}

struct tenant *tenant_get(struct tenants *table, const char *name, const struct tenant_policy *policy)
{
	(void)pthread_mutex_lock(&table->mutex);
	struct tenant *tenant = table->first;
	while (tenant != NULL && strcmp(tenant->name, name) != 0)
		tenant = tenant->next;
	if (tenant == NULL)
		tenant = tenant_create(table, name, policy);
	if (tenant != NULL)
		tenant->refs++;
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

void tenant_unref(struct tenants *table, struct tenant *tenant)
{
	if (tenant == NULL)
		return;
	(void)pthread_mutex_lock(&table->mutex);
	const bool last = --tenant->refs == 0;
	if (last) {
		struct tenant **link = &table->first;
		while (*link != tenant)
			link = &(*link)->next;
		*link = tenant->next;
	}
	(void)pthread_mutex_unlock(&table->mutex);
	if (last)
		tenant_destroy(tenant);
}

struct sched_group *tenant_group(struct tenants *table, struct tenant *tenant, uint32_t device)
{
	(void)pthread_mutex_lock(&table->mutex);
	struct sched_group *group = tenant->groups[device];
	if (group == NULL && (group = calloc(1, sizeof *group)) != NULL) {
		sched_group_init(group, tenant->policy.weight);
		group->rate_ns = tenant->policy.device_rate_ns;
		group->tokens_ns = (double)group->rate_ns;
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
