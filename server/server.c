#include "server/server.h"

#include <inttypes.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "providers/builtin.h"
#include "server/conn.h"
#include "server/containment.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/differential.h"
#include "server/health.h"
#include "server/publications.h"
#include "server/listener.h"
#include "server/metrics.h"
#include "server/module.h"
#include "server/placement.h"
#include "server/request.h"
#include "server/scrape.h"
#include "server/tls_context.h"

#define PLAN_ENTRIES 1024u
#define PLAN_BYTES (256ull << 20)

/* ---- Other threads ---- */

void server_wake(struct server *server)
{
	io_loop_wake(&server->loops[0]);
}

opd_status server_post(struct server *server, void (*callback)(void *argument), void *argument, opd_error *error)
{
	return io_loop_post(&server->loops[0], callback, argument, error);
}

/* On its way from loop to loop. */
struct round {
	struct server *server;
	uint32_t next;
	void (*callback)(void *argument, bool all);
	void *argument;
};

static void go_round(void *argument)
{
	struct round *round = argument;
	struct server *server = round->server;
	opd_error error;
	const bool all = round->next == server->loop_count;
	if (!all && io_loop_post(&server->loops[round->next++], go_round, round, &error) == OPD_OK)
		return;
	round->callback(round->argument, all);
	free(round);
}

opd_status server_round(struct server *server, void (*callback)(void *argument, bool all), void *argument, opd_error *error)
{
	struct round *round = malloc(sizeof *round);
	if (round == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: out of memory");
	*round = (struct round){server, 1, callback, argument};
	opd_status status = server_post(server, go_round, round, error);
	if (status != OPD_OK)
		free(round);
	return status;
}

void server_drain(struct server *server, uint64_t timeout_us)
{
	atomic_store(&server->drain_timeout_us, timeout_us);
	(void)atomic_fetch_add(&server->drain_asked, 1);
	server_wake(server);
}

uint64_t server_memory_bytes(const struct server *server)
{
	return atomic_load_explicit(&server->memory.used_bytes, memory_order_relaxed);
}

uint32_t server_sessions(const struct server *server)
{
	uint32_t count = 0;
	for (uint32_t i = 0; i < server->loop_count; i++)
		count += atomic_load(&server->loops[i].conn_count);
	return count;
}

uint32_t server_metrics_count(const struct server *server)
{
	return 1 + server->loop_count;
}

struct metrics *server_metrics(const struct server *server, uint32_t index)
{
	return index == 0 ? server->direct_metrics : server->loops[index - 1].metrics;
}

/* ---- Draining ---- */

static void drain_begin(struct server *server)
{
	uint64_t timeout_us = atomic_load(&server->drain_timeout_us);
	server->drain_until_us = request_now_ns() / 1000 + (timeout_us != 0 ? timeout_us : server->config->limits.drain_us);
	LOG(server->log, LOG_INFO, "draining", LOG_UINT("sessions", server_sessions(server)));
	standstill_begin(server, &server->loops[0]);
	server->draining = true;
	listener_close_all(server);
	for (uint32_t i = 0; i < server->loop_count; i++)
		for (struct conn *conn = server->loops[i].conns; conn != NULL; conn = conn->next)
			conn_goaway(conn, "the server is draining");
	standstill_end(server);
}

static void drain_cut_off(struct server *server, const char *why)
{
	standstill_begin(server, &server->loops[0]);
	for (uint32_t i = 0; i < server->loop_count; i++) {
		for (struct conn *conn = server->loops[i].conns; conn != NULL; conn = conn->next) {
			server->drain_failed = server->drain_failed || !conn_idle(conn);
			conn_close(conn, conn_idle(conn) ? LOG_INFO : LOG_WARN, why);
		}
	}
	standstill_end(server);
}

/* Nobody is there any more, or on the way. */
static bool is_empty(const struct server *server)
{
	return server_sessions(server) == 0 && server->direct_count == 0;
}

static void drain_check(struct server *server)
{
	int asked = atomic_load(&server->drain_asked);
	if (asked > 0 && !server->draining)
		drain_begin(server);
	if (!server->draining)
		return;
	const bool empty = is_empty(server);
	if (asked > 1 && !empty)
		drain_cut_off(server, "asked to end at once");
	else if (!empty && request_now_ns() / 1000 >= server->drain_until_us)
		drain_cut_off(server, "the drain's time is over");
	if (empty)
		uv_stop(&server->loops[0].loop);
}

/* ---- The loop ---- */

void server_on_wake(struct server *server)
{
	drain_check(server);
}

/* The last step before memory is full: what can be made again goes, once until there is room again. */
static void drop_caches(struct server *server)
{
	opd_error reason;
	const bool filled = server_memory_filled(server, server->config->limits.drop_caches, "caches dropped", &reason);
	if (filled && !server->caches_are_dropped) {
		const uint32_t plans = plans_trim(server->plans);
		const uint64_t derived_bytes = derived_reclaim(server->derived, UINT64_MAX);
		(void)memory_trim(&server->memory);
		server->caches_dropped++;
		LOG(server->log, LOG_WARN, "memory is nearly full, caches dropped", LOG_STR("reason", reason.text), LOG_UINT("plans", plans),
		    LOG_UINT("derived_bytes", derived_bytes));
	}
	server->caches_are_dropped = filled;
}

static void tick_workers(struct server *server)
{
	struct snapshot *snapshot = registry_snapshot(server->registry);
	for (uint32_t i = 0; i < snapshot->provider_count; i++)
		if (snapshot->providers[i]->isolated)
			isolated_tick(snapshot->providers[i]->module->isolated);
	snapshot_unref(snapshot);
}

void server_on_tick(struct server *server, uint64_t now_ns)
{
	tick_workers(server);
	containment_tick(server->containment, now_ns);
	drop_caches(server);
	scrape_tick(server, now_ns / 1000);
	tenants_sweep(server->tenants, now_ns);
	health_tick(server, now_ns / 1000);
	drain_check(server);
}

/* ---- Modules' memory ---- */

/* In front of what modules get. */
struct allocation {
	_Alignas(64) struct buffer *buffer;
	struct allocation *next;
	struct allocation **link;
};

static void *module_alloc(void *context, uint64_t bytes)
{
	struct server *server = context;
	struct buffer *buffer;
	if (bytes > UINT64_MAX / 2 || buffer_alloc(server->account, bytes + sizeof(struct allocation), 0, &buffer, NULL) != OPD_OK)
		return NULL;
	struct allocation *allocation = (struct allocation *)(void *)buffer->data;
	allocation->buffer = buffer;
	(void)pthread_mutex_lock(&server->mutex);
	allocation->next = server->allocations;
	allocation->link = &server->allocations;
	if (allocation->next != NULL)
		allocation->next->link = &allocation->next;
	server->allocations = allocation;
	(void)pthread_mutex_unlock(&server->mutex);
	return allocation + 1;
}

static void module_free(void *context, void *memory)
{
	struct server *server = context;
	if (memory == NULL)
		return;
	struct allocation *allocation = (struct allocation *)memory - 1;
	(void)pthread_mutex_lock(&server->mutex);
	*allocation->link = allocation->next;
	if (allocation->next != NULL)
		allocation->next->link = allocation->link;
	(void)pthread_mutex_unlock(&server->mutex);
	buffer_unref(allocation->buffer);
}

/* After the modules are closed: what they forgot, so that the ledger comes back to zero. */
static void free_forgotten(struct server *server)
{
	uint64_t count = 0;
	for (; server->allocations != NULL; count++)
		module_free(server, server->allocations + 1);
	if (count > 0)
		LOG(server->log, LOG_WARN, "providers left host memory unfreed", LOG_UINT("allocations", count));
}

static void service_parallel_for(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	lane_parallel_for(exec->lane, items, grain, range, argument);
}

static bool service_cancelled(const opd_exec *exec)
{
	return lane_cancelled(exec->lane);
}

static uint64_t service_budget_ns(void *context, const struct provider *provider)
{
	const struct server *server = context;
	return server->containment == NULL ? 0 : atomic_load_explicit(&containment_policy(server->containment, provider)->budget_ns, memory_order_relaxed);
}

static void service_failed(void *context, const struct provider *provider, const opd_impl *def, failure_kind kind, const char *tenant)
{
	struct server *server = context;
	struct snapshot *snapshot = registry_snapshot(server->registry);
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		const struct impl *impl = op_impl(&snapshot->ops[i], provider);
		if (impl != NULL && impl->def == def)
			containment_failed(server->containment, impl, kind, tenant);
	}
	snapshot_unref(snapshot);
}

/* ---- Starting ---- */

static opd_status open_providers(struct server *server, opd_error *error)
{
	const struct registry_services services = {
		.parallel_for = service_parallel_for,
		.cancelled = service_cancelled,
		.alloc = module_alloc,
		.free = module_free,
		.context = server,
		.derived = server->derived,
		.isolated = {server->config->worker, server->account, server->derived, service_budget_ns, service_failed, server},
	};
	opd_status status = registry_create(server->log, &services, &server->registry, error);
	for (size_t i = 0; status == OPD_OK && builtin_modules[i] != NULL; i++)
		status = registry_open_builtin(server->registry, builtin_modules[i], error);
	if (status != OPD_OK)
		return status;
	for (size_t i = 0; i < server->config->module_count; i++) {
		const struct config_module *module = &server->config->modules[i];
		opd_error reason;
		opd_status loaded = module->isolated ? registry_load_isolated(server->registry, module->path, module->name, module->confined, true, &reason)
		                                     : registry_load(server->registry, module->path, module->name, true, &reason);
		if (loaded != OPD_OK)
			LOG(server->log, LOG_WARN, "module not loaded", LOG_STR("path", module->path), LOG_STR("reason", reason.text));
	}
	return OPD_OK;
}

/* Who is there, and who isn't and why. */
static void log_start(struct server *server)
{
	char listeners[1024] = "";
	char there[1024] = "";
	char missing[2048] = "";
	struct msg_text addresses[64];
	uint32_t count = listener_list(server, addresses, 64);
	for (uint32_t i = 0; i < count && i < 64; i++)
		(void)snprintf(listeners + strlen(listeners), sizeof listeners - strlen(listeners), "%s%s", i == 0 ? "" : " ", addresses[i].data);
	struct snapshot *snapshot = registry_snapshot(server->registry);
	for (uint32_t i = 0; i < snapshot->provider_count; i++) {
		const struct provider *provider = snapshot->providers[i];
		const char *reason = provider->reason;
		bool available = false;
		for (uint32_t k = 0; k < snapshot->op_count; k++) {
			const struct impl *impl = op_impl(&snapshot->ops[k], provider);
			available = available || (impl != NULL && impl->supported);
			if (impl != NULL && !impl->supported && reason == NULL)
				reason = impl->unsupported;
		}
		if (available || reason == NULL)
			(void)snprintf(there + strlen(there), sizeof there - strlen(there), "%s%s", there[0] == '\0' ? "" : " ", provider->name);
		else
			(void)snprintf(missing + strlen(missing), sizeof missing - strlen(missing), "%s%s (%s)", missing[0] == '\0' ? "" : ", ",
			               provider->name, reason);
	}
	snapshot_unref(snapshot);
	LOG(server->log, LOG_INFO, "opd started", LOG_STR("version", OPD_VERSION), LOG_UINT("pid", getpid()), LOG_STR("listening", listeners),
	    LOG_STR("providers", there), LOG_STR("not_available", missing), LOG_UINT("threads", lanes_threads(server)), LOG_UINT("loops", server->loop_count),
	    LOG_UINT("memory_bytes", atomic_load(&server->memory.limit_bytes)));
}

static opd_status make_loops(struct server *server, uint32_t count, opd_error *error)
{
	opd_status status = OPD_OK;
	server->direct_metrics = metrics_create(true);
	server->loops = calloc(count, sizeof server->loops[0]);
	if (server->direct_metrics == NULL || server->loops == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: out of memory");
	while (status == OPD_OK && server->loop_count < count) {
		struct io_loop *io = &server->loops[server->loop_count];
		io->server = server;
		io->number = server->loop_count++;
		status = io_loop_open(io, error);
	}
	return status;
}

static opd_status start(struct server *server, opd_error *error)
{
	struct config *config = server->config;
	opd_status status = OPD_OK;
	memory_init(&server->memory, config->limits.memory_bytes, config->limits.cache_bytes);
	server->account = account_create(&server->memory, config->limits.memory_bytes);
	server->tenants = tenants_create(&server->memory);
	server->publications = publications_create(&server->memory, server->tenants);
	server->placement = placement_create();
	if (server->account == NULL || server->placement == NULL || server->tenants == NULL || server->publications == NULL)
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: out of memory");
	if (status == OPD_OK)
		status = derived_create(&server->memory, config->limits.derived_bytes, &server->derived, error);
	if (status == OPD_OK)
		status = lanes_start(server, error);
	if (status == OPD_OK)
		status = plans_create(PLAN_ENTRIES, PLAN_BYTES, &server->plans, error);
	if (status == OPD_OK)
		status = open_providers(server, error);
	if (status == OPD_OK)
		status = containment_create(server->registry, server->tenants, server->log, &server->containment, error);
	if (status == OPD_OK)
		status = differential_create(server, &server->differential, error);
	if (status == OPD_OK) {
		containment_configure(server->containment, config);
		differential_configure(server->differential, config);
	}
	if (status == OPD_OK)
		status = server_set_priorities(server, config, error);
	for (size_t i = 0; status == OPD_OK && i < config->listener_count; i++)
		status = listener_open(server, &config->listeners[i], error);
	if (status == OPD_OK && config->metrics.address != NULL)
		status = listener_open_metrics(server, &config->metrics, error);
	for (uint32_t i = 1; status == OPD_OK && i < server->loop_count; i++)
		status = io_loop_start(&server->loops[i], error);
	return status;
}

void server_bound_queues(struct server *server)
{
	lanes_bound(server);
	for (uint32_t i = 1; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(server, i);
		if (lane == NULL)
			continue;
		struct scheduler *scheduler = device_lane_scheduler_lock(lane);
		scheduler->flow_queue_max = server->config->limits.queue;
		scheduler->queue_max = server->config->limits.lane_queue;
		device_lane_scheduler_unlock(lane);
	}
}

void server_take_config(struct server *server, struct config *config)
{
	server->config = config;
	bool checked = config->checked;
	for (size_t i = 0; i < config->provider_count; i++)
		checked = checked || config->providers[i].policy.checked;
	atomic_store_explicit(&server->checked, checked, memory_order_relaxed);
	if (server->containment != NULL)
		containment_configure(server->containment, config);
	if (server->differential != NULL)
		differential_configure(server->differential, config);
	atomic_store_explicit(&server->inline_ns, config->inline_ns, memory_order_relaxed);
	atomic_store_explicit(&server->segment_ns, config->segment_ns, memory_order_relaxed);
	atomic_store_explicit(&server->batch_rows, config->batch_rows, memory_order_relaxed);
	atomic_store_explicit(&server->batch_devices, config->batch_devices, memory_order_relaxed);
	atomic_store_explicit(&server->batch_shared_bytes, config->batch_shared_bytes, memory_order_relaxed);
	atomic_store_explicit(&server->refuse_uploads, config->limits.refuse_uploads, memory_order_relaxed);
}

opd_status server_create(struct config *config, struct log *log, struct server **server_out, opd_error *error)
{
	struct server *server = calloc(1, sizeof *server);
	if (server == NULL || pthread_mutex_init(&server->mutex, NULL) != 0) {
		free(server);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: out of memory");
	}
	standstill_init(&server->standstill);
	server->log = log;
	server_take_config(server, config);
	server->started_us = request_now_ns() / 1000;
	machine_read(&server->machine);
	opd_status status = make_loops(server, config->loops != 0 ? config->loops : machine_loops(&server->machine), error);
	if (status == OPD_OK)
		status = start(server, error);
	if (status != OPD_OK) {
		server->config = NULL; /* the caller's still */
		server_destroy(server);
		return status;
	}
	log_start(server);
	tls_context_log(config->tls_context, log);
	*server_out = server;
	return OPD_OK;
}

opd_status server_run(struct server *server)
{
	while (!server->draining || !is_empty(server)) {
		io_loop_run(&server->loops[0]);
		drain_check(server);
	}
	for (uint32_t i = 1; i < server->loop_count; i++)
		io_loop_stop(&server->loops[i]);
	for (uint32_t i = 0; i < server->loop_count; i++)
		io_loop_end_posts(&server->loops[i]);
	const uint32_t stuck = lanes_stuck(server);
	if (stuck != 0)
		LOG(server->log, LOG_ERROR, "kernels that exceed their budget still run", LOG_UINT("stuck", stuck));
	server->drain_failed = server->drain_failed || stuck != 0; /* taking the daemon apart would wait for them */
	LOG(server->log, server->drain_failed ? LOG_WARN : LOG_INFO, "drained", LOG_STR("result", server->drain_failed ? "work was cut off" : "clean"));
	return server->drain_failed ? OPD_DEADLINE_EXCEEDED : OPD_OK;
}

/* ---- Ending ---- */

static void close_conns(struct io_loop *io)
{
	for (struct conn *conn = io->conns; conn != NULL; conn = conn->next)
		conn_close(conn, LOG_INFO, "the server ends");
	(void)uv_run(&io->loop, UV_RUN_NOWAIT);
}

/* All on this thread; loop 0 last, which the others wake. */
static void close_loops(struct server *server)
{
	for (uint32_t i = 1; i < server->loop_count; i++)
		io_loop_stop(&server->loops[i]);
	listener_close_all(server);
	scrape_close_all(server);
	for (uint32_t i = server->loop_count; i-- > 0;)
		if (server->loops[i].running)
			close_conns(&server->loops[i]);
	/* Jobs of closed connections end without a reader, and nothing follows them: not the next provider, nor a request that waited for a result. */
	server->ending = true;
	lanes_stop(server);
	for (uint32_t i = 0; i < server->loop_count; i++)
		io_loop_let_go(&server->loops[i]);
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++)
		if (server->device_lanes[i] != NULL)
			device_lane_drain(server->device_lanes[i]);
	for (uint32_t i = 0; i < server->loop_count; i++)
		io_loop_finish(&server->loops[i]);
	for (uint32_t i = server->loop_count; i-- > 0;)
		if (server->loops[i].running)
			io_loop_close(&server->loops[i]);
}

void server_destroy(struct server *server)
{
	if (server == NULL)
		return;
	close_loops(server);
	for (uint32_t i = 0; i < server->loop_count; i++)
		io_loop_fini(&server->loops[i]);
	publications_destroy(server->publications); /* before the devices on which some of them lie */
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++)
		device_lane_stop(server->device_lanes[i]);
	lanes_destroy(server);
	metrics_destroy(server->direct_metrics);
	free(server->loops);
	placement_destroy(server->placement);
	tenants_destroy(server->tenants);
	plans_destroy(server->plans);
	derived_destroy(server->derived); /* before their makers are closed */
	differential_destroy(server->differential);
	containment_destroy(server->containment);
	registry_destroy(server->registry);
	free_forgotten(server);
	if (server->account != NULL) {
		account_unref(server->account);
		memory_fini(&server->memory);
	}
	config_destroy(server->config);
	standstill_fini(&server->standstill);
	(void)pthread_mutex_destroy(&server->mutex);
	free(server);
}
