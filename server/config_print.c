/* What a configuration comes to, for a person who reads it: opd --check-config. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "proto/text.h"
#include "server/options.h"

static void print_text(const char *text)
{
	char escaped[1024];
	(void)fputs(text_escape(text, strlen(text), escaped, sizeof escaped), stdout);
}

static void print_quotas(const char *prefix, const uint64_t limits[QUOTA_COUNT])
{
	for (uint32_t i = 0; i < QUOTA_COUNT; i++)
		if (limits[i] != 0)
			(void)printf(", %s%s %" PRIu64 "%s", prefix, quota_name(i), limits[i], i == QUOTA_DEVICE_TIME ? " ns" : "");
}

static void print_listeners(const struct config *config)
{
	for (size_t i = 0; i < config->listener_count; i++) {
		(void)printf("listen: ");
		print_text(config->listeners[i].address);
		(void)printf("\n");
	}
}

static void print_priorities(const struct config *config)
{
	for (size_t i = 0; i < config->priority_count; i++) {
		(void)printf("priority: %s = [", config->priorities[i].op);
		for (size_t k = 0; k < config->priorities[i].count; k++)
			(void)printf("%s%s", k > 0 ? ", " : "", config->priorities[i].providers[k]);
		(void)printf("]\n");
	}
}

static void print_tenants(const struct config *config)
{
	for (size_t i = 0; i < config->lane_count; i++)
		(void)printf("lane: %s = %" PRIu32 " threads\n", config->lanes[i].name, config->lanes[i].threads);
	for (size_t i = 0; i < config->tenant_count; i++) {
		const struct tenant_policy *policy = &config->tenants[i].policy;
		(void)printf("tenant: ");
		print_text(config->tenants[i].name);
		(void)printf(" = weight %" PRIu32 ", class %s (at most %s)", policy->weight, sched_class_name(policy->class), sched_class_name(policy->class_max));
		if (policy->lane != 0)
			(void)printf(", lane %s", config->lanes[policy->lane - 1].name);
		print_quotas("", policy->quota);
		print_quotas("session_", policy->session_quota);
		(void)printf("\n");
	}
}

static void print_providers(const struct config *config)
{
	for (size_t i = 0; i < config->provider_count; i++) {
		const struct provider_policy *policy = &config->providers[i].policy;
		(void)printf("provider: %s = checked: %s", config->providers[i].name, policy->checked ? "true" : "false");
		if (policy->budget_us != 0)
			(void)printf(", budget %" PRIu64 " ms", policy->budget_us / 1000);
		if (policy->compare[0] != '\0')
			(void)printf(", compared with %s every %" PRIu32 " runs", policy->compare, policy->compare_every);
		(void)printf("\n");
	}
}

static void print_modules(const struct config *config)
{
	for (size_t i = 0; i < config->module_count; i++) {
		const struct config_module *module = &config->modules[i];
		(void)printf("module: %s%s", module->name != NULL ? module->name : "", module->name != NULL ? " = " : "");
		print_text(module->path);
		(void)printf("%s\n", config_isolation_text(module));
	}
}

static void print_limits(const struct config_limits *limits)
{
	(void)printf("limits: memory %" PRIu64 ", session %" PRIu64 ", request %" PRIu64 ", envelope %" PRIu64 ", cache %" PRIu64
	             ", derived %" PRIu64 " bytes\n",
	             limits->memory_bytes, limits->session_bytes, limits->request_bytes, limits->envelope_bytes, limits->cache_bytes, limits->derived_bytes);
	(void)printf("limits: %" PRIu32 " sessions, of each %" PRIu32 " requests in flight and %" PRIu32 " kept tensors\n", limits->sessions,
	             limits->in_flight, limits->kept);
	(void)printf("limits: of the memory in use, %" PRIu32 " %% refuse uploads, %" PRIu32 " %% new sessions, %" PRIu32 " %% drop caches\n", limits->refuse_uploads,
	             limits->refuse_sessions, limits->drop_caches);
	(void)printf("limits: handshake %" PRIu64 " ms, stall %" PRIu64 " ms, drain %" PRIu64 " ms\n", limits->handshake_us / 1000,
	             limits->stall_us / 1000, limits->drain_us / 1000);
}

static void print_certificate(const struct tls_context *context)
{
	if (context == NULL)
		return;
	(void)printf("tls: ");
	print_text(context->subject);
	(void)printf(", until %s, %s\n", context->not_after, context->fingerprint);
}

void config_print(const struct config *config)
{
	print_listeners(config);
	print_certificate(config->tls_context);
	print_priorities(config);
	print_tenants(config);
	print_providers(config);
	print_modules(config);
	print_limits(&config->limits);
	(void)printf("loops: %" PRIu32 "%s, threads: %" PRIu32 "%s, inline: %" PRIu64 " ns, checked: %s\n", config->loops, config->loops == 0 ? " (by the machine)" : "", config->threads,
	             config->threads == 0 ? " (those of the machine)" : "", config->inline_ns, config->checked ? "true" : "false");
	(void)printf("quarantine: %" PRIu32 " failures, %" PRIu32 " of a provider, in %" PRIu64 " ms, for %" PRIu64 " ms\n", config->quarantine.failures,
	             config->quarantine.provider_failures, config->quarantine.window_us / 1000, config->quarantine.cooldown_us / 1000);
	(void)printf("polling: window %" PRIu64 " us, budget %" PRIu64 " us of a second\n", config->polling_window_us, config->polling_budget_us);
	(void)printf("metrics: ");
	print_text(config->metrics.address != NULL ? config->metrics.address : "off");
	(void)printf("\nlog: %s, %s, ", log_level_name(config->level), config->format == LOG_JSON ? "json" : "text");
	print_text(config->log_path != NULL ? config->log_path : "stderr");
	(void)printf("\n");
}
