#include "server/health.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "server/daemon.h"
#include "server/request.h"

/* From here on memory counts as used up: what comes next is probably refused. */
#define MEMORY_FULL_PERCENT 95u

#define TEXT_BYTES 800u /* of one condition: an error's text and what it is of */

/* ---- Lanes ---- */

/* Jobs that have ended, and whose loops know it. */
static uint64_t done_of(const struct server *server, uint32_t lane)
{
	uint64_t done = 0;
	for (uint32_t i = 0; i < server->loop_count; i++)
		done += tally_get(&server->loops[i].lanes_done[lane]);
	return done;
}

/* Stuck: all its threads are in kernels, more work waits, and for long nothing has ended. What waits for a tenant's rate while threads are free is no such thing. */
void health_tick(struct server *server, uint64_t now_us)
{
	for (uint32_t i = 0; i < server->lane_count; i++) {
		struct cpu_lane *mine = &server->lanes[i];
		const struct scheduler *scheduler = lane_scheduler_lock(mine->lane);
		const bool waits = scheduler->queued > 0 && scheduler->running >= lane_threads(mine->lane);
		mine->waiting = scheduler->queued;
		lane_scheduler_unlock(mine->lane);
		const uint64_t done = done_of(server, i);
		if (!waits || done != mine->done_before)
			mine->progress_us = now_us;
		mine->done_before = done;
	}
}

/* ---- Conditions ---- */

struct conditions {
	struct arena *arena;
	uint32_t count;
	struct msg_text *texts;
	bool failed;
};

static void begin(struct conditions *conditions, struct arena *arena, uint32_t most)
{
	*conditions = (struct conditions){.arena = arena, .texts = arena_array(arena, most, sizeof conditions->texts[0])};
	conditions->failed = conditions->texts == NULL;
}

OPD_PRINTF(2, 3)
static void add(struct conditions *conditions, const char *format, ...)
{
	char text[TEXT_BYTES];
	va_list arguments;
	va_start(arguments, format);
	(void)vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	const size_t bytes = strlen(text);
	char *copy = conditions->failed ? NULL : arena_array(conditions->arena, bytes + 1, 1);
	if (copy == NULL) {
		conditions->failed = true;
		return;
	}
	memcpy(copy, text, bytes + 1);
	conditions->texts[conditions->count++] = (struct msg_text){copy, bytes};
}

static void add_limits(struct conditions *unhealthy, const struct server *server, uint64_t now_us)
{
	const struct config_limits *limits = &server->config->limits;
	const uint64_t used = atomic_load_explicit(&server->memory.used_bytes, memory_order_relaxed);
	if (used >= limits->memory_bytes / 100 * MEMORY_FULL_PERCENT)
		add(unhealthy, "memory: %" PRIu64 " of %" PRIu64 " bytes are taken (limits.memory)", used, limits->memory_bytes);
	if (server_sessions(server) >= limits->sessions)
		add(unhealthy, "sessions: %" PRIu32 " are open, no more may be (limits.sessions)", server_sessions(server));
	for (uint32_t i = 0; i < server->lane_count; i++) {
		const struct cpu_lane *mine = &server->lanes[i];
		if (limits->stuck_us != 0 && now_us - mine->progress_us >= limits->stuck_us)
			add(unhealthy, "lane%s%s: no kernel of the CPU's has ended for %" PRIu64 " s, and %" PRIu32 " requests wait", i == 0 ? "" : " ", i == 0 ? "" : lane_name(mine->lane),
			    (now_us - mine->progress_us) / 1000000, mine->waiting);
	}
}

/* ---- Providers ---- */

/* NULL: it can run something. Else why not. */
static const char *why_not(const struct snapshot *snapshot, const struct provider *provider)
{
	const char *reason = provider->reason;
	uint32_t impls = 0;
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		const struct impl *impl = op_impl(&snapshot->ops[i], provider);
		if (impl == NULL)
			continue;
		opd_reason_code code;
		const char *why = snapshot_unsupported(snapshot, impl, &code);
		if (why == NULL)
			return NULL;
		impls++;
		reason = reason == NULL ? why : reason;
	}
	return impls == 0 && provider->module != NULL ? NULL : reason == NULL ? "none of its implementations can run" : reason; /* a module may bring ops or a device alone */
}

/* In a list that the configuration itself gives: those that come with opd name modules that nobody need have. */
static bool is_listed(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->priority_count; i++)
		for (size_t k = 0; !config->priorities[i].standard && k < config->priorities[i].count; k++)
			if (strcmp(config->priorities[i].providers[k], name) == 0)
				return true;
	return false;
}

static bool is_module(const struct config *config, const struct provider *provider)
{
	for (size_t i = 0; i < config->module_count; i++) {
		const struct config_module *module = &config->modules[i];
		if (strcmp(module->path, provider->source) == 0 || (module->name != NULL && strcmp(module->name, provider->name) == 0))
			return true;
	}
	return false;
}

static void add_providers(struct conditions *unhealthy, struct conditions *degraded, const struct server *server, const struct snapshot *snapshot)
{
	for (uint32_t i = 0; i < snapshot->provider_count; i++) {
		const struct provider *provider = snapshot->providers[i];
		const bool listed = is_listed(server->config, provider->name);
		const char *reason = listed || is_module(server->config, provider) ? why_not(snapshot, provider) : NULL;
		if (reason != NULL)
			add(listed ? unhealthy : degraded, "provider %s: %s", provider->name, reason);
	}
	const uint32_t stuck = lanes_stuck(server);
	if (stuck > 0)
		add(degraded, "lane: %" PRIu32 " kernels have exceeded their budget and still run", stuck);
	for (uint32_t i = 1; i < snapshot->device_count; i++)
		if (snapshot->devices[i].lost != NULL)
			add(degraded, "device %s: %s", snapshot->devices[i].name, snapshot->devices[i].lost);
}

bool health_fill(const struct server *server, const struct snapshot *snapshot, struct arena *arena, struct msg_info *info_out)
{
	struct conditions unhealthy, degraded;
	begin(&unhealthy, arena, 3 + server->lane_count + snapshot->provider_count);
	begin(&degraded, arena, 1 + snapshot->provider_count + snapshot->device_count);
	add_limits(&unhealthy, server, request_now_ns() / 1000);
	add_providers(&unhealthy, &degraded, server, snapshot);
	info_out->unhealthy_count = unhealthy.count;
	info_out->unhealthy = unhealthy.texts;
	info_out->degraded_count = degraded.count;
	info_out->degraded = degraded.texts;
	return !unhealthy.failed && !degraded.failed;
}
