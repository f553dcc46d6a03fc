/* Lanes: threads of the CPU that the configuration keeps for some tenants. */
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"
#include "server/config_internal.h"

static const struct config_lane *find(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->lane_count; i++)
		if (strcmp(config->lanes[i].name, name) == 0)
			return &config->lanes[i];
	return NULL;
}

opd_status config_begin_lane(struct config *config, const char *name, unsigned line, struct config_lane **lane_out, opd_error *error)
{
	const struct config_lane *before = find(config, name);
	if (before != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "there already, in line %u", before->line);
	if (!text_is_name(name, strlen(name)) || strlen(name) >= CONFIG_LANE_NAME_BYTES || strcmp(name, "cpu") == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "expected a name of at most %u small letters, digits and _, but not cpu (everybody's lane)", CONFIG_LANE_NAME_BYTES - 1);
	if (config->lane_count == CONFIG_LANES_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "more than %u lanes", CONFIG_LANES_MAX);
	struct config_lane *grown = reallocarray(config->lanes, config->lane_count + 1, sizeof *grown);
	if (grown == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	config->lanes = grown;
	struct config_lane *lane = &grown[config->lane_count++];
	*lane = (struct config_lane){.threads = 1, .line = line};
	(void)strcpy(lane->name, name);
	*lane_out = lane;
	return OPD_OK;
}

opd_status config_set_lane(struct config_lane *lane, const char *key, const char *value, opd_error *error)
{
	char *end;
	if (strcmp(key, "threads") != 0)
		return opd_fail(error, OPD_NOT_FOUND, "no such key, expected threads");
	const unsigned long threads = value[0] >= '0' && value[0] <= '9' ? strtoul(value, &end, 10) : 0;
	if (threads == 0 || *end != '\0' || threads > CONFIG_LANE_THREADS_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected a whole number of 1 to %u", value, CONFIG_LANE_THREADS_MAX);
	lane->threads = (uint32_t)threads;
	return OPD_OK;
}

opd_status config_resolve_lanes(struct config *config, opd_error *error)
{
	for (size_t i = 0; i < config->tenant_count; i++) {
		struct config_tenant *tenant = &config->tenants[i];
		const struct config_lane *lane = tenant->lane == NULL ? NULL : find(config, tenant->lane);
		if (tenant->lane == NULL || strcmp(tenant->lane, "cpu") == 0)
			tenant->policy.lane = 0;
		else if (lane == NULL)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s:%u: tenants.%s.lane: \"%s\" is no lane of `lanes`, nor cpu", config->path == NULL ? "configuration" : config->path,
			                tenant->line, tenant->name, tenant->lane);
		else
			tenant->policy.lane = (uint32_t)(lane - config->lanes) + 1;
	}
	return OPD_OK;
}

bool config_same_lanes(const struct config *a, const struct config *b)
{
	bool same = a->lane_count == b->lane_count;
	for (size_t i = 0; same && i < a->lane_count; i++)
		same = strcmp(a->lanes[i].name, b->lanes[i].name) == 0 && a->lanes[i].threads == b->lanes[i].threads;
	return same;
}
