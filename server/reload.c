/* Taking over a configuration while running. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/daemon.h"
#include "server/derived.h"
#include "server/installed.h"
#include "server/request.h"
#include "server/tls_context.h"

/* The lists that come with opd name providers of modules that may be anywhere or nowhere. */
static void remember_unconfigured(struct registry *registry, const char *name)
{
	char path[PATH_MAX];
	char reason[128] = "no such module is configured";
	if (installed_is(name) && installed_path(name, path))
		(void)snprintf(reason, sizeof reason, "no such module is configured; --module %s would load it", name);
	registry_remember(registry, name, reason);
}

opd_status server_set_priorities(struct server *server, const struct config *config, opd_error *error)
{
	struct registry_list *lists = calloc(config->priority_count + 1, sizeof lists[0]);
	if (lists == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priorities: out of memory");
	for (size_t i = 0; i < config->priority_count; i++) {
		const struct config_priority *priority = &config->priorities[i];
		for (size_t k = 0; priority->standard && k < priority->count; k++)
			remember_unconfigured(server->registry, priority->providers[k]);
		lists[i] = (struct registry_list){priority->op, (const char *const *)priority->providers, (uint32_t)priority->count};
	}
	size_t failed;
	opd_status status = registry_set_configuration(server->registry, lists, config->priority_count, &failed, error);
	free(lists);
	if (status == OPD_OK)
		return OPD_OK;
	unsigned line = failed < config->priority_count ? config->priorities[failed].line : 0;
	return line == 0 ? opd_error_prefix(error, status, "priorities")
	                 : opd_error_prefix(error, status, "%s:%u: priorities", config->path == NULL ? "configuration" : config->path, line);
}

static bool same_text(const char *a, const char *b)
{
	return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

static bool same_listeners(const struct config *a, const struct config *b)
{
	if (a->listener_count != b->listener_count)
		return false;
	for (size_t i = 0; i < a->listener_count; i++)
		if (strcmp(a->listeners[i].address, b->listeners[i].address) != 0)
			return false;
	return true;
}

static bool module_known(const struct config *config, const char *path)
{
	for (size_t i = 0; i < config->module_count; i++)
		if (strcmp(config->modules[i].path, path) == 0)
			return true;
	return false;
}

static void apply_to_lane(const struct tenant_policy *policy, struct scheduler *scheduler, struct sched_group *group)
{
	sched_group_set_weight(scheduler, group, policy->weight);
	group->queue_max = (uint32_t)policy->quota[QUOTA_QUEUED];
	if (group->bucket.rate_ns != policy->quota[QUOTA_DEVICE_TIME])
		sched_group_set_rate(scheduler, group, policy->quota[QUOTA_DEVICE_TIME], request_now_ns());
}

/* Sessions that are open keep their class and quotas of their own; weights, the tenant's quotas and caps count from now on. */
static void apply_policy(struct tenant *tenant, void *argument)
{
	struct server *server = argument;
	struct tenant_policy policy;
	config_tenant(server->config, tenant->name, &policy);
	tenant_set_policy(tenant, &policy);
	if (tenant->groups[0] != NULL) {
		struct lane *lane = server->lanes[tenant->lane].lane;
		apply_to_lane(&policy, lane_scheduler_lock(lane), tenant->groups[0]);
		lane_scheduler_unlock(lane);
	}
	for (uint32_t i = 1; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(server, i);
		if (lane == NULL || tenant->groups[i] == NULL)
			continue;
		apply_to_lane(&policy, device_lane_scheduler_lock(lane), tenant->groups[i]);
		device_lane_scheduler_unlock(lane);
	}
}

/* What can't change while running. */
static opd_status check_fixed(const struct config *before, const struct config *config, opd_error *error)
{
	if (!same_listeners(before, config))
		return opd_fail(error, OPD_FAILED_PRECONDITION, "listeners can't change while running: restart the daemon");
	if (before->threads != config->threads)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "threads can't change while running (%u to %u): restart the daemon",
		                (unsigned)before->threads, (unsigned)config->threads);
	if (before->loops != config->loops)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "loops can't change while running (%u to %u): restart the daemon", (unsigned)before->loops,
		                (unsigned)config->loops);
	if (!config_same_lanes(before, config))
		return opd_fail(error, OPD_FAILED_PRECONDITION, "lanes can't change while running: restart the daemon");
	if (!same_text(before->metrics.address, config->metrics.address))
		return opd_fail(error, OPD_FAILED_PRECONDITION, "the metrics endpoint can't change while running: restart the daemon");
	if (before->format != config->format || !same_text(before->log_path, config->log_path))
		return opd_fail(error, OPD_FAILED_PRECONDITION, "log.file and log.format can't change while running: restart the daemon");
	return OPD_OK;
}

/* Also one that an earlier configuration named, or that was loaded by a request. */
static bool module_loaded(struct server *server, const char *path)
{
	struct snapshot *snapshot = registry_snapshot(server->registry);
	bool found = false;
	for (uint32_t i = 0; i < snapshot->provider_count; i++)
		found = found || (snapshot->providers[i]->module != NULL && strcmp(snapshot->providers[i]->source, path) == 0);
	snapshot_unref(snapshot);
	return found;
}

static opd_status load_new_modules(struct server *server, const struct config *config, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; status == OPD_OK && i < config->module_count; i++) {
		const struct config_module *module = &config->modules[i];
		if (!module_known(server->config, module->path) && !module_loaded(server, module->path))
			status = module->isolated ? registry_load_isolated(server->registry, module->path, module->name, module->confined, false, error)
			                          : registry_load(server->registry, module->path, module->name, false, error);
	}
	return status;
}

/* New modules and the lists that may name them: all or none. */
static opd_status change_registry(struct server *server, const struct config *config, opd_error *error)
{
	struct registry_change *change;
	opd_status status = registry_change_begin(server->registry, &change, error);
	if (status != OPD_OK)
		return status;
	status = load_new_modules(server, config, error);
	if (status == OPD_OK)
		status = server_set_priorities(server, config, error);
	if (status == OPD_OK)
		registry_change_commit(change);
	else
		registry_change_cancel(change);
	return status;
}

/* ---- The difference ---- */

#define CHANGES_LOGGED 64u

struct changes {
	struct log *log;
	uint64_t count;
};

static void log_change(const char *key, const char *before, const char *after, void *argument)
{
	struct changes *changes = argument;
	if (changes->count++ < CHANGES_LOGGED)
		LOG(changes->log, LOG_INFO, "configuration changed", LOG_STR("key", key), LOG_STR("old", before == NULL ? "(none)" : before),
		    LOG_STR("new", after == NULL ? "(none)" : after));
}

static void log_changes(struct server *server, const struct config *before, const struct config *config)
{
	struct changes changes = {.log = server->log};
	opd_error error;
	if (config_compare(before, config, log_change, &changes, &error) != OPD_OK)
		LOG(server->log, LOG_WARN, "what has changed isn't known", LOG_STR("error", error.text));
	LOG(server->log, LOG_INFO, "configuration reloaded", LOG_STR("path", config->path), LOG_UINT("changes", changes.count));
}

static void warn_of_modules_that_stay(struct server *server, const struct config *before, const struct config *config)
{
	for (size_t i = 0; i < before->module_count; i++)
		if (!module_known(config, before->modules[i].path))
			LOG(server->log, LOG_WARN, "a module stays loaded until a restart", LOG_STR("path", before->modules[i].path));
}

/* Nothing here fails. */
static void take(struct server *server, struct config *config)
{
	log_set_level(server->log, config->level);
	server_take_config(server, config);
	server_bound_queues(server);
	tenants_walk(server->tenants, apply_policy, server);
	atomic_store(&server->memory.limit_bytes, config->limits.memory_bytes);
	derived_set_limit(server->derived, config->limits.derived_bytes);
	atomic_store(&server->account->limit_bytes, config->limits.memory_bytes);
}

opd_status server_reload(struct server *server, struct config *config, opd_error *error)
{
	struct config *before = server->config;
	opd_status status = check_fixed(before, config, error);
	io_loop_let_go(&server->loops[0]); /* opening a module may take seconds */
	if (status == OPD_OK)
		status = change_registry(server, config, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "reload");
	/* Nobody is in the middle of something that the old one says. */
	standstill_begin(server, &server->loops[0]);
	take(server, config);
	identity_recheck(server);
	standstill_end(server);
	log_changes(server, before, config);
	warn_of_modules_that_stay(server, before, config);
	config_destroy(before);
	tls_context_log(config->tls_context, server->log);
	return OPD_OK;
}
