/* Tenants: who gets how much of the lanes. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"
#include "server/config_internal.h"
#include "server/tenant.h"

static const struct tenant_policy default_policy = {
	.weight = SCHED_WEIGHT_DEFAULT,
	.class = CLASS_INTERACTIVE,
	.class_max = CLASS_REALTIME,
};

static const struct config_tenant *find(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->tenant_count; i++)
		if (strcmp(config->tenants[i].name, name) == 0)
			return &config->tenants[i];
	return NULL;
}

void config_tenant(const struct config *config, const char *name, struct tenant_policy *policy_out)
{
	const struct config_tenant *tenant = find(config, name);
	if (tenant == NULL)
		tenant = find(config, "*");
	*policy_out = tenant == NULL ? default_policy : tenant->policy;
}

/* config_resolve_lanes finds it. */
static opd_status set_lane(struct config_tenant *tenant, const char *value, opd_error *error)
{
	char *name = strdup(value);
	if (name == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	free(tenant->lane);
	tenant->lane = name;
	return OPD_OK;
}

opd_status config_begin_tenant(struct config *config, const char *name, unsigned line, struct config_tenant **tenant_out, opd_error *error)
{
	const struct config_tenant *before = find(config, name);
	if (before != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "there already, in line %u", before->line);
	if (name[0] == '\0' || strlen(name) >= TENANT_NAME_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "a name of %zu bytes, expected 1 to %u, such as uid:1000, anonymous or \"*\"", strlen(name),
		                TENANT_NAME_BYTES - 1);
	struct config_tenant *grown = reallocarray(config->tenants, config->tenant_count + 1, sizeof *grown);
	if (grown == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	config->tenants = grown;
	struct config_tenant *tenant = &grown[config->tenant_count];
	*tenant = (struct config_tenant){.name = strdup(name), .line = line};
	if (tenant->name == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	config_tenant(config, "*", &tenant->policy);
	const struct config_tenant *others = find(config, "*");
	config->tenant_count++;
	*tenant_out = tenant;
	return others == NULL || others->lane == NULL ? OPD_OK : set_lane(tenant, others->lane, error);
}

static opd_status set_number(uint32_t *field, uint32_t low, uint32_t high, const char *value, opd_error *error)
{
	char *end;
	const unsigned long number = value[0] >= '0' && value[0] <= '9' ? strtoul(value, &end, 10) : 0;
	if (value[0] < '0' || value[0] > '9' || *end != '\0' || number < low || number > high)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected a whole number of %" PRIu32 " to %" PRIu32, value, low, high);
	*field = (uint32_t)number;
	return OPD_OK;
}

static opd_status set_class(sched_class *field, const char *value, opd_error *error)
{
	const sched_class class = sched_class_parse(value, strlen(value));
	if (class == CLASS_COUNT)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected realtime, interactive or batch", value);
	*field = class;
	return OPD_OK;
}

#define SESSION_PREFIX "session_"

static opd_status set_rate(uint64_t *field, const char *value, opd_error *error)
{
	uint64_t ns;
	opd_status status = config_parse_duration(value, &ns, error);
	if (status != OPD_OK)
		return status;
	if (ns != 0 && (ns < QUOTA_RATE_MIN_NS || ns > QUOTA_RATE_MAX_NS))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected 1ms to 1024s (of device time, each second), or 0 for any", value);
	*field = ns;
	return OPD_OK;
}

static opd_status set_bytes(uint64_t *field, const char *value, opd_error *error)
{
	uint64_t bytes;
	opd_status status = config_parse_bytes(value, &bytes, error);
	if (status == OPD_OK)
		*field = bytes;
	return status;
}

static opd_status set_wide_number(uint64_t *field, const char *value, opd_error *error)
{
	uint32_t number;
	opd_status status = set_number(&number, 0, QUOTA_NUMBER_MAX, value, error);
	if (status == OPD_OK)
		*field = number;
	return status;
}

/* "in_flight": of all the tenant's sessions together; "session_in_flight": of each. */
static opd_status set_quota(struct tenant_policy *policy, const char *key, const char *value, opd_error *error)
{
	const bool of_session = strncmp(key, SESSION_PREFIX, strlen(SESSION_PREFIX)) == 0;
	const quota_kind kind = quota_parse(of_session ? key + strlen(SESSION_PREFIX) : key);
	if (kind == QUOTA_COUNT || (of_session && kind == QUOTA_SESSIONS))
		return opd_fail(error, OPD_NOT_FOUND, "no such key");
	uint64_t *field = of_session ? &policy->session_quota[kind] : &policy->quota[kind];
	if (kind == QUOTA_DEVICE_TIME)
		return set_rate(field, value, error);
	if (kind == QUOTA_SESSIONS || kind == QUOTA_IN_FLIGHT || kind == QUOTA_QUEUED)
		return set_wide_number(field, value, error);
	return set_bytes(field, value, error);
}

opd_status config_set_tenant(struct config_tenant *tenant, const char *key, const char *value, opd_error *error)
{
	struct tenant_policy *policy = &tenant->policy;
	if (strcmp(key, "weight") == 0)
		return set_number(&policy->weight, 1, SCHED_WEIGHT_MAX, value, error);
	if (strcmp(key, "class") == 0)
		return set_class(&policy->class, value, error);
	if (strcmp(key, "class_max") == 0)
		return set_class(&policy->class_max, value, error);
	if (strcmp(key, "lane") == 0)
		return set_lane(tenant, value, error);
	return set_quota(policy, key, value, error);
}

opd_status config_note_tenant(struct config_tenant *tenant, const char *key, const char *value, opd_error *error)
{
	char *text;
	if (asprintf(&text, "%s%s%s: %s", tenant->text == NULL ? "" : tenant->text, tenant->text == NULL ? "" : ", ", key, value) < 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	free(tenant->text);
	tenant->text = text;
	return OPD_OK;
}

void config_clear_tenants(struct config *config)
{
	for (size_t i = 0; i < config->tenant_count; i++) {
		free(config->tenants[i].name);
		free(config->tenants[i].text);
		free(config->tenants[i].lane);
	}
	free(config->tenants);
	config->tenants = NULL;
	config->tenant_count = 0;
}
