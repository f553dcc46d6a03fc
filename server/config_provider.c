/* Providers: how far each is trusted. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/config_internal.h"

#define BUDGET_MAX_US (24ull * 3600 * 1000000)

static const struct config_provider *find(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->provider_count; i++)
		if (strcmp(config->providers[i].name, name) == 0)
			return &config->providers[i];
	return NULL;
}

void config_provider(const struct config *config, const char *name, struct provider_policy *policy_out)
{
	const struct config_provider *provider = find(config, name);
	if (provider == NULL)
		provider = find(config, "*");
	*policy_out = provider == NULL ? (struct provider_policy){.compare_every = 1000} : provider->policy;
}

opd_status config_begin_provider(struct config *config, const char *name, unsigned line, struct config_provider **provider_out, opd_error *error)
{
	const struct config_provider *before = find(config, name);
	if (before != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "there already, in line %u", before->line);
	if (strcmp(name, "*") != 0 && !text_is_name(name, strlen(name)))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\" is no provider's name, expected [a-z_][a-z_0-9]* or \"*\"", name);
	struct config_provider *grown = reallocarray(config->providers, config->provider_count + 1, sizeof *grown);
	if (grown == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	config->providers = grown;
	struct config_provider *provider = &grown[config->provider_count];
	*provider = (struct config_provider){.name = strdup(name), .line = line};
	if (provider->name == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	config_provider(config, "*", &provider->policy);
	config->provider_count++;
	*provider_out = provider;
	return OPD_OK;
}

static opd_status set_flag(bool *field, const char *value, opd_error *error)
{
	if (strcmp(value, "true") != 0 && strcmp(value, "false") != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected true or false", value);
	*field = value[0] == 't';
	return OPD_OK;
}

static opd_status set_budget(uint64_t *field_us, const char *value, opd_error *error)
{
	uint64_t ns;
	opd_status status = config_parse_duration(value, &ns, error);
	if (status != OPD_OK)
		return status;
	if (ns % 1000 != 0 || (ns != 0 && ns < 1000000) || ns / 1000 > BUDGET_MAX_US)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected 1ms to 24h, or 0 for any", value);
	*field_us = ns / 1000;
	return OPD_OK;
}

static opd_status set_compare(char *field, const char *value, opd_error *error)
{
	if (value[0] != '\0' && (!text_is_name(value, strlen(value)) || strlen(value) > BOUND_NAME_BYTES))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\" is no provider's name", value);
	(void)snprintf(field, BOUND_NAME_BYTES + 1, "%s", value);
	return OPD_OK;
}

static opd_status set_every(uint32_t *field, const char *value, opd_error *error)
{
	char *end;
	const unsigned long number = value[0] >= '0' && value[0] <= '9' ? strtoul(value, &end, 10) : 0;
	if (number < 1 || number > 1000000000 || *end != '\0')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected a whole number of 1 to 1000000000", value);
	*field = (uint32_t)number;
	return OPD_OK;
}

opd_status config_set_provider(struct config_provider *provider, const char *key, const char *value, opd_error *error)
{
	struct provider_policy *policy = &provider->policy;
	if (strcmp(key, "checked") == 0)
		return set_flag(&policy->checked, value, error);
	if (strcmp(key, "budget") == 0)
		return set_budget(&policy->budget_us, value, error);
	if (strcmp(key, "compare") == 0)
		return set_compare(policy->compare, value, error);
	if (strcmp(key, "compare_every") == 0)
		return set_every(&policy->compare_every, value, error);
	return opd_fail(error, OPD_NOT_FOUND, "no such key");
}

void config_clear_providers(struct config *config)
{
	for (size_t i = 0; i < config->provider_count; i++)
		free(config->providers[i].name);
	free(config->providers);
	config->providers = NULL;
	config->provider_count = 0;
}
