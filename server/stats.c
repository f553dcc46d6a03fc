#include "server/stats.h"

#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/metrics.h"
#include "server/request.h"

#define SECOND 1e9

struct walk {
	struct server *server;
	const struct session *who;
	struct stats_sink *sink;
	double (*value)(const struct walk *walk, const struct tenant *tenant); /* of the family under way */
};

static void family(struct stats_sink *sink, stats_kind kind, const char *name, const char *help)
{
	sink->family(sink, kind, name, help);
}

/* A family of one sample. */
static void single(struct stats_sink *sink, stats_kind kind, const char *name, const char *help, double value)
{
	family(sink, kind, name, help);
	sink->sample(sink, NULL, 0, value);
}

static void labelled(struct stats_sink *sink, const char *label, const char *text, double value)
{
	const struct stats_label labels[] = {{label, text}};
	sink->sample(sink, labels, 1, value);
}

/* ---- The daemon ---- */

/* Of each loop. */
static void tell_loops(const struct server *server, struct stats_sink *sink)
{
	char name[16];
	family(sink, STATS_GAUGE, "opd_loop_sessions", "open now, by the I/O loop that they live on");
	for (uint32_t i = 0; i < server->loop_count; i++) {
		(void)snprintf(name, sizeof name, "%u", (unsigned)i);
		labelled(sink, "loop", name, atomic_load(&server->loops[i].conn_count));
	}
	family(sink, STATS_GAUGE, "opd_loop_busy_sessions", "of them, those that sent something in the last second, or came in it");
	for (uint32_t i = 0; i < server->loop_count; i++) {
		(void)snprintf(name, sizeof name, "%u", (unsigned)i);
		labelled(sink, "loop", name, atomic_load(&server->loops[i].busy_count));
	}
	family(sink, STATS_COUNTER, "opd_loop_cpu_seconds_total", "CPU time of the loop's thread");
	for (uint32_t i = 0; i < server->loop_count; i++) {
		(void)snprintf(name, sizeof name, "%u", (unsigned)i);
		labelled(sink, "loop", name, (double)io_loop_cpu_ns(&server->loops[i]) / 1e9);
	}
}

static void tell_daemon(const struct walk *walk)
{
	struct server *server = walk->server;
	struct stats_sink *sink = walk->sink;
	struct derived_statistics derived;
	derived_count(server->derived, &derived);
	single(sink, STATS_GAUGE, "opd_uptime_seconds", "since the daemon's start", (double)(request_now_ns() / 1000 - server->started_us) / 1e6);
	single(sink, STATS_GAUGE, "opd_memory_bytes", "tensor bytes in host memory, charged now", (double)server_memory_bytes(server));
	single(sink, STATS_GAUGE, "opd_memory_limit_bytes", "limits.memory", (double)atomic_load_explicit(&server->memory.limit_bytes, memory_order_relaxed));
	single(sink, STATS_GAUGE, "opd_derived_bytes", "of them, copies that providers made of kept tensors", (double)derived.bytes);
	single(sink, STATS_GAUGE, "opd_sessions", "open now", server_sessions(server));
	tell_loops(server, sink);
	single(sink, STATS_COUNTER, "opd_sessions_opened_total", "sessions that were greeted", (double)server->sessions_opened);
	single(sink, STATS_COUNTER, "opd_sessions_refused_total", "Hellos answered with an error", (double)server->hellos_refused);
	single(sink, STATS_COUNTER, "opd_tls_handshakes_total", "TLS handshakes finished", (double)server->tls_handshakes);
	single(sink, STATS_COUNTER, "opd_tls_resumed_total", "of them, by a ticket of an earlier session", (double)server->tls_resumed);
	single(sink, STATS_COUNTER, "opd_slow_readers_total", "sessions cut off because they didn't read their replies", (double)server->slow_readers);
	family(sink, STATS_COUNTER, "opd_memory_steps_total", "what was refused or given up because memory was filling");
	labelled(sink, "step", "uploads", (double)atomic_load_explicit(&server->uploads_refused, memory_order_relaxed));
	labelled(sink, "step", "sessions", (double)server->sessions_refused);
	labelled(sink, "step", "caches", (double)server->caches_dropped);
	single(sink, STATS_COUNTER, "opd_batches_total", "kernels that ran for several requests", (double)atomic_load_explicit(&server->batches, memory_order_relaxed));
	single(sink, STATS_COUNTER, "opd_batched_runs_total", "those requests", (double)atomic_load_explicit(&server->batched, memory_order_relaxed));
	single(sink, STATS_COUNTER, "opd_graph_runs_total", "runs of graphs", (double)atomic_load_explicit(&server->graph_runs, memory_order_relaxed));
	single(sink, STATS_COUNTER, "opd_graph_dispatches_total", "of them, those that had to infer, dispatch and plan anew",
	       (double)atomic_load_explicit(&server->graph_dispatches, memory_order_relaxed));
}

/* ---- Requests ---- */

static uint64_t sum_of(const struct server *server, size_t offset)
{
	uint64_t sum = 0;
	for (uint32_t i = 0; i < server_metrics_count(server); i++)
		sum += tally_get((const tally *)(const void *)((const char *)server_metrics(server, i) + offset));
	return sum;
}

static void tell_requests(const struct walk *walk)
{
	struct stats_sink *sink = walk->sink;
	family(sink, STATS_COUNTER, "opd_requests_total", "answered requests by kind");
	for (uint32_t i = 0; i < MSG_REQUEST_KINDS; i++) {
		const uint64_t count = sum_of(walk->server, offsetof(struct metrics, requests) + i * sizeof(tally));
		if (count != 0)
			labelled(sink, "kind", request_kind_name((msg_request_kind)i), (double)count);
	}
	family(sink, STATS_COUNTER, "opd_replies_total", "replies by status");
	for (uint32_t i = 0; i < METRICS_STATUSES; i++) {
		const uint64_t count = sum_of(walk->server, offsetof(struct metrics, replies) + i * sizeof(tally));
		if (count != 0)
			labelled(sink, "status", opd_status_name((opd_status)i), (double)count);
	}
	struct histogram latency = {0};
	for (uint32_t i = 0; i < server_metrics_count(walk->server); i++)
		metrics_add_histogram(&server_metrics(walk->server, i)->latency, &latency);
	family(sink, STATS_HISTOGRAM, "opd_request_seconds", "from a request's envelope to its reply on the way out");
	sink->spread(sink, NULL, 0, &latency);
}

/* ---- Implementations ---- */

/* All families go through all implementations: a table of sums, made once. */
struct impl_sum {
	const char *op;
	const char *provider;
	struct metrics_impl sum;
};

struct impl_table {
	uint32_t count;
	struct impl_sum *items;
};

static void add_impls(const struct server *server, const struct op *op, struct impl_table *table)
{
	for (uint32_t k = 0; k < op->impl_count; k++) {
		const struct impl *impl = op->impls[k];
		struct impl_sum *item = &table->items[table->count];
		bool any = false;
		for (uint32_t i = 0; i < server_metrics_count(server); i++) {
			const struct metrics_impl *mine = atomic_load_explicit(&server_metrics(server, i)->impls[impl->index], memory_order_acquire);
			if (mine == NULL)
				continue;
			if (!any)
				*item = (struct impl_sum){.op = op->schema->name, .provider = impl->provider->name};
			metrics_add_impl(mine, &item->sum);
			any = true;
		}
		table->count += any;
	}
}

static bool make_table(struct server *server, const struct snapshot *snapshot, struct impl_table *table)
{
	uint32_t room = 1;
	for (uint32_t i = 0; i < snapshot->op_count; i++)
		room += snapshot->ops[i].impl_count;
	table->items = calloc(room, sizeof table->items[0]);
	if (table->items == NULL)
		return false;
	struct impl_sum *graphs = &table->items[table->count++];
	*graphs = (struct impl_sum){.op = "(graph)", .provider = ""};
	for (uint32_t i = 0; i < server_metrics_count(server); i++)
		metrics_add_impl(&server_metrics(server, i)->graphs, &graphs->sum);
	for (uint32_t i = 0; i < snapshot->op_count; i++)
		add_impls(server, &snapshot->ops[i], table);
	return true;
}

static void each_counter(struct stats_sink *sink, const struct impl_table *table, size_t offset, double unit, const char *name, const char *help)
{
	family(sink, STATS_COUNTER, name, help);
	for (uint32_t i = 0; i < table->count; i++) {
		const struct impl_sum *item = &table->items[i];
		const struct stats_label labels[] = {{"op", item->op}, {"provider", item->provider}};
		const uint64_t count = tally_get((const tally *)(const void *)((const char *)&item->sum + offset));
		if (count != 0)
			sink->sample(sink, labels, 2, (double)count / unit);
	}
}

static void each_histogram(struct stats_sink *sink, const struct impl_table *table, size_t offset, const char *name, const char *help)
{
	family(sink, STATS_HISTOGRAM, name, help);
	for (uint32_t i = 0; i < table->count; i++) {
		const struct impl_sum *item = &table->items[i];
		const struct stats_label labels[] = {{"op", item->op}, {"provider", item->provider}};
		if (tally_get(&item->sum.runs) != tally_get(&item->sum.on_loop))
			sink->spread(sink, labels, 2, (const struct histogram *)(const void *)((const char *)&item->sum + offset));
	}
}

static void each_reason(struct stats_sink *sink, const struct impl_table *table)
{
	family(sink, STATS_COUNTER, "opd_skip_reasons_total", "skips by reason, of those whose reason was asked for: by explain, or because nobody took the call");
	for (uint32_t i = 0; i < table->count; i++) {
		const struct impl_sum *item = &table->items[i];
		for (uint32_t k = 0; k < METRICS_REASONS; k++) {
			const struct stats_label labels[] = {{"op", item->op}, {"provider", item->provider}, {"reason", opd_reason_code_text((opd_reason_code)k)}};
			if (tally_get(&item->sum.reasons[k]) != 0)
				sink->sample(sink, labels, 3, (double)tally_get(&item->sum.reasons[k]));
		}
	}
}

static void tell_impls(const struct walk *walk)
{
	struct snapshot *snapshot = registry_snapshot(walk->server->registry);
	struct stats_sink *sink = walk->sink;
	struct impl_table table = {0};
	if (make_table(walk->server, snapshot, &table)) {
		each_counter(sink, &table, offsetof(struct metrics_impl, runs), 1, "opd_runs_total", "kernels run, by op and provider; (graph): whole graphs");
		each_counter(sink, &table, offsetof(struct metrics_impl, failures), 1, "opd_run_failures_total", "of them, those that failed");
		each_counter(sink, &table, offsetof(struct metrics_impl, on_loop), 1, "opd_runs_on_loop_total",
		             "of them, small ones on the I/O loop: their time is an estimate, and in no histogram");
		each_counter(sink, &table, offsetof(struct metrics_impl, device_ns), SECOND, "opd_run_device_seconds_total", "device time that they took");
		each_counter(sink, &table, offsetof(struct metrics_impl, skips), 1, "opd_skips_total", "so often it stood before the one that ran, and refused");
		each_reason(sink, &table);
		each_histogram(sink, &table, offsetof(struct metrics_impl, kernel), "opd_kernel_seconds", "device time of one run");
		each_histogram(sink, &table, offsetof(struct metrics_impl, wait), "opd_run_wait_seconds", "waiting for the lane");
	}
	free(table.items);
	snapshot_unref(snapshot);
}

/* ---- Lanes ---- */

#define LANES_MAX (1u + CONFIG_LANES_MAX + REGISTRY_DEVICES_MAX)

struct lane_numbers {
	const char *name;
	uint32_t threads;
	uint32_t queued;
	uint32_t running;
	uint64_t device_ns;
	const struct lane *cpu;
	const struct device_lane *device;
};

static struct lane_numbers numbers_of(const char *name, uint32_t threads, const struct scheduler *scheduler)
{
	return (struct lane_numbers){.name = name, .threads = threads, .queued = scheduler->queued, .running = scheduler->running, .device_ns = scheduler->device_ns};
}

/* The CPU's first, everybody's before the others; then those of devices that were used. */
static uint32_t read_lanes(struct server *server, struct lane_numbers lanes[LANES_MAX])
{
	uint32_t count = 0;
	for (; count < server->lane_count; count++) {
		struct lane *lane = server->lanes[count].lane;
		lanes[count] = numbers_of(lane_name(lane), lane_threads(lane), lane_scheduler_lock(lane));
		lane_scheduler_unlock(lane);
		lanes[count].cpu = lane;
	}
	for (uint32_t i = 1; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(server, i);
		if (lane == NULL)
			continue;
		lanes[count] = numbers_of(device_lane_name(lane), 1, device_lane_scheduler_lock(lane));
		device_lane_scheduler_unlock(lane);
		lanes[count++].device = lane;
	}
	return count;
}

static void tell_waits(struct stats_sink *sink, const struct lane_numbers *lane)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++) {
		const struct stats_label labels[] = {{"lane", lane->name}, {"class", sched_class_name(i)}};
		sink->spread(sink, labels, 2, lane->cpu != NULL ? lane_waits(lane->cpu, (sched_class)i) : device_lane_waits(lane->device, (sched_class)i));
	}
}

static void tell_lanes(const struct walk *walk)
{
	struct stats_sink *sink = walk->sink;
	struct lane_numbers lanes[LANES_MAX];
	const uint32_t count = read_lanes(walk->server, lanes);
	family(sink, STATS_GAUGE, "opd_lane_threads", "that run its jobs");
	for (uint32_t i = 0; i < count; i++)
		labelled(sink, "lane", lanes[i].name, lanes[i].threads);
	family(sink, STATS_GAUGE, "opd_lane_queued", "requests that wait for it");
	for (uint32_t i = 0; i < count; i++)
		labelled(sink, "lane", lanes[i].name, lanes[i].queued);
	family(sink, STATS_GAUGE, "opd_lane_running", "requests that it runs");
	for (uint32_t i = 0; i < count; i++)
		labelled(sink, "lane", lanes[i].name, lanes[i].running);
	family(sink, STATS_COUNTER, "opd_lane_device_seconds_total", "device time used");
	for (uint32_t i = 0; i < count; i++)
		labelled(sink, "lane", lanes[i].name, (double)lanes[i].device_ns / SECOND);
	family(sink, STATS_HISTOGRAM, "opd_queue_wait_seconds", "waiting for a lane, by class");
	for (uint32_t i = 0; i < count; i++)
		tell_waits(sink, &lanes[i]);
}

/* ---- Tenants ---- */

static void tell_tenant(struct tenant *tenant, void *argument)
{
	const struct walk *walk = argument;
	if (walk->who == NULL || access_may(walk->who->access, RIGHT_SESSIONS) || walk->who->tenant == tenant)
		labelled(walk->sink, "tenant", tenant->name, walk->value(walk, tenant));
}

static void tell_refusals(struct tenant *tenant, void *argument)
{
	const struct walk *walk = argument;
	if (walk->who != NULL && !access_may(walk->who->access, RIGHT_SESSIONS) && walk->who->tenant != tenant)
		return;
	for (uint32_t i = 0; i < QUOTA_COUNT; i++) {
		const struct stats_label labels[] = {{"tenant", tenant->name}, {"quota", quota_name(i)}};
		const uint64_t of_memory = i == QUOTA_MEMORY ? atomic_load_explicit(&tenant->total->refused, memory_order_relaxed) : 0;
		const uint64_t count = of_memory + atomic_load_explicit(&tenant->quota.refused[i], memory_order_relaxed);
		if (count != 0)
			walk->sink->sample(walk->sink, labels, 2, (double)count);
	}
}

/* On all lanes. */
static struct sched_usage tenant_usage(const struct walk *walk, const struct tenant *tenant)
{
	struct sched_usage sum = {0};
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = i == 0 ? NULL : device_lane_started(walk->server, i);
		const struct sched_group *group = tenant->groups[i];
		if (group == NULL || (i != 0 && lane == NULL))
			continue;
		(void)(lane == NULL ? lane_scheduler_lock(walk->server->lanes[tenant->lane].lane) : device_lane_scheduler_lock(lane));
		sum.jobs += group->usage.jobs;
		sum.device_ns += group->usage.device_ns;
		if (lane == NULL)
			lane_scheduler_unlock(walk->server->lanes[tenant->lane].lane);
		else
			device_lane_scheduler_unlock(lane);
	}
	return sum;
}

static double tenant_device_seconds(const struct walk *walk, const struct tenant *tenant)
{
	return (double)tenant_usage(walk, tenant).device_ns / SECOND;
}

static double tenant_jobs(const struct walk *walk, const struct tenant *tenant)
{
	return (double)tenant_usage(walk, tenant).jobs;
}

static double tenant_sessions(const struct walk *walk, const struct tenant *tenant)
{
	(void)walk;
	return atomic_load_explicit(&tenant->sessions, memory_order_relaxed);
}

static double tenant_in_flight(const struct walk *walk, const struct tenant *tenant)
{
	(void)walk;
	return (double)atomic_load_explicit(&tenant->quota.in_flight, memory_order_relaxed);
}

static double tenant_memory(const struct walk *walk, const struct tenant *tenant)
{
	(void)walk;
	return (double)atomic_load_explicit(&tenant->total->used_bytes, memory_order_relaxed);
}

static double tenant_bytes_in(const struct walk *walk, const struct tenant *tenant)
{
	(void)walk;
	return (double)atomic_load_explicit(&tenant->quota.bytes_in, memory_order_relaxed);
}

static double tenant_bytes_out(const struct walk *walk, const struct tenant *tenant)
{
	(void)walk;
	return (double)atomic_load_explicit(&tenant->quota.bytes_out, memory_order_relaxed);
}

static const struct tenant_family {
	stats_kind kind;
	const char *name;
	const char *help;
	double (*value)(const struct walk *walk, const struct tenant *tenant);
} tenant_families[] = {
	{STATS_GAUGE, "opd_tenant_sessions", "open now", tenant_sessions},
	{STATS_GAUGE, "opd_tenant_in_flight", "requests that do work, not yet answered", tenant_in_flight},
	{STATS_GAUGE, "opd_tenant_memory_bytes", "tensor bytes in host memory", tenant_memory},
	{STATS_COUNTER, "opd_tenant_bytes_in_total", "of its requests", tenant_bytes_in},
	{STATS_COUNTER, "opd_tenant_bytes_out_total", "of its replies", tenant_bytes_out},
	{STATS_COUNTER, "opd_tenant_jobs_total", "jobs of the lanes", tenant_jobs},
	{STATS_COUNTER, "opd_tenant_device_seconds_total", "device time used, on all lanes", tenant_device_seconds},
};

static void tell_tenants(struct walk *walk)
{
	struct tenants *tenants = walk->server->tenants;
	for (size_t i = 0; i < sizeof tenant_families / sizeof tenant_families[0]; i++) {
		const struct tenant_family *of = &tenant_families[i];
		family(walk->sink, of->kind, of->name, of->help);
		walk->value = of->value;
		tenants_walk(tenants, tell_tenant, walk);
	}
	family(walk->sink, STATS_COUNTER, "opd_tenant_refused_total", "what was refused for a quota of the tenant's");
	tenants_walk(tenants, tell_refusals, walk);
}

void stats_collect(struct server *server, const struct session *who, struct stats_sink *sink)
{
	struct walk walk = {.server = server, .who = who, .sink = sink};
	tell_daemon(&walk);
	tell_requests(&walk);
	tell_impls(&walk);
	tell_lanes(&walk);
	tell_tenants(&walk);
}

/* ---- As text ---- */

struct text_sink {
	struct stats_sink sink; /* first */
	FILE *out;
	const char *name;
};

static const char *const kind_names[] = {"counter", "gauge", "histogram"};

static void text_family(struct stats_sink *sink, stats_kind kind, const char *name, const char *help)
{
	struct text_sink *text = (struct text_sink *)(void *)sink;
	text->name = name;
	(void)fprintf(text->out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind_names[kind]);
}

static void write_escaped(FILE *out, const char *value)
{
	for (; *value != '\0'; value++) {
		if (*value == '\\' || *value == '"')
			(void)fputc('\\', out);
		if (*value == '\n')
			(void)fputs("\\n", out);
		else
			(void)fputc(*value, out);
	}
}

/* {op="relu",provider="cpu"}; `more` is one that is written already. */
static void write_labels(FILE *out, const struct stats_label *labels, uint32_t count, const char *more)
{
	if (count == 0 && more == NULL)
		return;
	(void)fputc('{', out);
	for (uint32_t i = 0; i < count; i++) {
		(void)fprintf(out, "%s%s=\"", i == 0 ? "" : ",", labels[i].name);
		write_escaped(out, labels[i].value);
		(void)fputc('"', out);
	}
	if (more != NULL)
		(void)fprintf(out, "%s%s", count == 0 ? "" : ",", more);
	(void)fputc('}', out);
}

static void text_sample(struct stats_sink *sink, const struct stats_label *labels, uint32_t count, double value)
{
	struct text_sink *text = (struct text_sink *)(void *)sink;
	(void)fputs(text->name, text->out);
	write_labels(text->out, labels, count, NULL);
	(void)fprintf(text->out, " %.15g\n", value);
}

static void text_spread(struct stats_sink *sink, const struct stats_label *labels, uint32_t count, const struct histogram *histogram)
{
	struct text_sink *text = (struct text_sink *)(void *)sink;
	uint64_t sum = 0;
	for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
		char le[40] = "le=\"+Inf\"";
		if (i < HISTOGRAM_BUCKETS - 1)
			(void)snprintf(le, sizeof le, "le=\"%.9g\"", (double)((uint64_t)HISTOGRAM_FIRST_NS << i) / SECOND);
		sum += tally_get(&histogram->counts[i]);
		(void)fprintf(text->out, "%s_bucket", text->name);
		write_labels(text->out, labels, count, le);
		(void)fprintf(text->out, " %llu\n", (unsigned long long)sum);
	}
	(void)fprintf(text->out, "%s_sum", text->name);
	write_labels(text->out, labels, count, NULL);
	(void)fprintf(text->out, " %.15g\n%s_count", (double)tally_get(&histogram->sum_ns) / SECOND, text->name);
	write_labels(text->out, labels, count, NULL);
	(void)fprintf(text->out, " %llu\n", (unsigned long long)sum);
}

void stats_write(struct server *server, FILE *out)
{
	struct text_sink text = {.sink = {text_family, text_sample, text_spread}, .out = out};
	stats_collect(server, NULL, &text.sink);
}

/* ---- As a reply ---- */

struct reply_sink {
	struct stats_sink sink; /* first */
	struct arena *arena;
	struct msg_stats *out;
	uint32_t room;
	const char *name;
	stats_kind kind;
	bool failed;
};

static void reply_family(struct stats_sink *sink, stats_kind kind, const char *name, const char *help)
{
	struct reply_sink *reply = (struct reply_sink *)(void *)sink;
	(void)help;
	reply->name = name;
	reply->kind = kind;
}

/* NULL: no memory, or more than a list may have; then *out says that it was cut. */
static struct msg_stat *reply_add(struct reply_sink *reply, const struct stats_label *labels, uint32_t count)
{
	struct msg_stats *out = reply->out;
	if (out->count == BOUND_LIST) {
		out->cut = true;
		return NULL;
	}
	if (out->count == reply->room) {
		const uint32_t room = reply->room == 0 ? 64 : reply->room * 2;
		struct msg_stat *items = arena_array(reply->arena, room, sizeof items[0]);
		reply->failed = reply->failed || items == NULL;
		if (items == NULL)
			return NULL;
		if (out->count > 0)
			memcpy(items, out->items, out->count * sizeof items[0]);
		out->items = items;
		reply->room = room;
	}
	struct msg_stat *stat = &out->items[out->count++];
	*stat = (struct msg_stat){.name = msg_text(reply->name), .kind = reply->kind, .label_count = count};
	for (uint32_t i = 0; i < count; i++) { /* copied: a direct caller reads them later */
		stat->labels[i].name = msg_text(labels[i].name);
		stat->labels[i].value = msg_text(arena_text(reply->arena, labels[i].value, strlen(labels[i].value)));
	}
	return stat;
}

static void reply_sample(struct stats_sink *sink, const struct stats_label *labels, uint32_t count, double value)
{
	struct msg_stat *stat = reply_add((struct reply_sink *)(void *)sink, labels, count);
	if (stat != NULL)
		stat->value = value;
}

static void reply_spread(struct stats_sink *sink, const struct stats_label *labels, uint32_t count, const struct histogram *histogram)
{
	struct reply_sink *reply = (struct reply_sink *)(void *)sink;
	struct msg_stat *stat = reply_add(reply, labels, count);
	if (stat == NULL)
		return;
	stat->buckets = arena_array(reply->arena, HISTOGRAM_BUCKETS, sizeof stat->buckets[0]);
	reply->failed = reply->failed || stat->buckets == NULL;
	for (uint32_t i = 0; stat->buckets != NULL && i < HISTOGRAM_BUCKETS; i++)
		stat->buckets[i] = tally_get(&histogram->counts[i]);
	stat->bucket_count = stat->buckets == NULL ? 0 : HISTOGRAM_BUCKETS;
	stat->value = (double)tally_get(&histogram->sum_ns) / SECOND;
}

void stats_reply(struct request *request)
{
	struct reply_sink reply = {
		.sink = {reply_family, reply_sample, reply_spread}, .arena = &request->arena, .out = &request->reply.stats};
	*reply.out = (struct msg_stats){.count = 0};
	stats_collect(request->context->server, request->session, &reply.sink);
	if (!reply.failed) {
		request_reply(request, MSG_REPLY_STATS);
		return;
	}
	(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "get_stats: out of memory");
	request_fail(request);
}
