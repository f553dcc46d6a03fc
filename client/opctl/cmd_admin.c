/* ping, info, health, module, log-level, drain: the daemon itself. */
#include <inttypes.h>
#include <string.h>
#include <time.h>

#include "client/opctl/print.h"

const struct option_use ping_options[] = {{OPTION_COUNT, "round trips (default 10)"}, {OPTION_END, NULL}};
const struct option_use health_options[] = {{OPTION_TIMEOUT, "for how long an answer is waited for (default 5)"}, {OPTION_END, NULL}};
const struct option_use drain_options[] = {{OPTION_TIMEOUT, "time that work under way has (default: the daemon's configuration)"},
                                           {OPTION_END, NULL}};

/* Checks the number of arguments and connects; EXIT_DONE to go on. */
static int begin(struct opctl *ctl, bool right, const char *usage)
{
	opd_error error;
	if (!right) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "expected %s", usage);
		return report_usage(ctl, &error);
	}
	const opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	return status == OPD_OK ? EXIT_DONE : report_failure(ctl, status, &error);
}

/* A change that was made: one line, or {"done": true}. */
static int report_done(const struct opctl *ctl, opd_status status, const opd_error *error, const char *line)
{
	if (status != OPD_OK)
		return report_failure(ctl, status, error);
	if (!ctl->json) {
		(void)puts(line);
		return EXIT_DONE;
	}
	cJSON *document = cJSON_CreateObject();
	cJSON_AddBoolToObject(document, "done", true);
	return print_json(document);
}

/* ---- ping ---- */

static uint64_t now_ns(void)
{
	struct timespec time;
	(void)clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

struct ping_times {
	uint64_t count;
	uint64_t sum_ns;
	uint64_t min_ns;
	uint64_t max_ns;
};

static opd_status ping_all(struct opctl *ctl, int64_t count, struct ping_times *times, opd_error *error)
{
	*times = (struct ping_times){.min_ns = UINT64_MAX};
	for (int64_t i = 0; i < count; i++) {
		const uint64_t start_ns = now_ns();
		const opd_status status = opd_ping(ctl->client, error);
		if (status != OPD_OK)
			return status;
		const uint64_t ns = now_ns() - start_ns;
		times->count++;
		times->sum_ns += ns;
		times->min_ns = ns < times->min_ns ? ns : times->min_ns;
		times->max_ns = ns > times->max_ns ? ns : times->max_ns;
	}
	return OPD_OK;
}

static int print_ping(const struct opctl *ctl, const struct ping_times *times)
{
	const opd_session *session = opd_client_session(ctl->client);
	const double mean_ns = (double)times->sum_ns / (double)times->count;
	if (!ctl->json) {
		(void)printf("%s: %" PRIu64 " round trips, min %s, mean %s, max %s\n", shown(session->server), times->count,
		             duration_text((double)times->min_ns), duration_text(mean_ns), duration_text((double)times->max_ns));
		return EXIT_DONE;
	}
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "server", session->server);
	cJSON_AddItemToObject(document, "count", json_u64(times->count));
	cJSON_AddItemToObject(document, "min_ns", json_u64(times->min_ns));
	cJSON_AddItemToObject(document, "mean_ns", json_f64(mean_ns));
	cJSON_AddItemToObject(document, "max_ns", json_u64(times->max_ns));
	return print_json(document);
}

int cmd_ping(struct opctl *ctl)
{
	opd_error error;
	int64_t count;
	if (options_int(&ctl->options, OPTION_COUNT, 1, 100000000, 10, &count, &error) != OPD_OK)
		return report_usage(ctl, &error);
	const int code = begin(ctl, ctl->options.count == 1, "ping [-c N]");
	if (code != EXIT_DONE)
		return code;
	struct ping_times times;
	const opd_status status = ping_all(ctl, count, &times, &error);
	return status == OPD_OK ? print_ping(ctl, &times) : report_failure(ctl, status, &error);
}

/* ---- info ---- */

static cJSON *device_states_json(const opd_server_info *info)
{
	cJSON *list = cJSON_CreateArray();
	for (uint32_t i = 0; i < info->device_state_count; i++) {
		const opd_device_state *state = &info->device_states[i];
		cJSON *item = cJSON_CreateObject();
		cJSON_AddStringToObject(item, "name", state->name);
		cJSON_AddItemToObject(item, "memory_bytes", json_u64(state->memory_bytes));
		cJSON_AddItemToObject(item, "cached_bytes", json_u64(state->cached_bytes));
		cJSON_AddItemToObject(item, "memory_limit_bytes", json_u64(state->memory_limit_bytes));
		cJSON_AddItemToObject(item, "jobs", json_u64(state->jobs));
		if (state->lost[0] != '\0')
			cJSON_AddStringToObject(item, "lost", state->lost);
		cJSON_AddItemToArray(list, item);
	}
	return list;
}

static void print_device_states(const opd_server_info *info)
{
	for (uint32_t i = 0; i < info->device_state_count; i++) {
		const opd_device_state *state = &info->device_states[i];
		(void)printf("%-10s ", shown(state->name));
		if (state->lost[0] != '\0')
			(void)printf("lost: %s\n", shown(state->lost));
		else if (state->memory_limit_bytes == 0)
			(void)puts("nothing has run there yet");
		else
			(void)printf("%s of %s, %s cached, %u jobs\n", bytes_text(state->memory_bytes), bytes_text(state->memory_limit_bytes), bytes_text(state->cached_bytes), state->jobs);
	}
}

static int print_info_json(const opd_server_info *info, const opd_session *session)
{
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "version", info->version);
	cJSON_AddItemToObject(document, "pid", json_u64(info->pid));
	cJSON_AddItemToObject(document, "uptime_us", json_u64(info->uptime_us));
	cJSON_AddBoolToObject(document, "draining", info->draining);
	cJSON_AddItemToObject(document, "listeners", json_texts(info->listeners, info->listener_count));
	cJSON_AddItemToObject(document, "devices", json_texts(info->devices, info->device_count));
	cJSON_AddItemToObject(document, "device_states", device_states_json(info));
	cJSON_AddItemToObject(document, "loops", json_u64(info->loops));
	cJSON_AddItemToObject(document, "threads", json_u64(info->threads));
	cJSON_AddItemToObject(document, "sessions", json_u64(info->sessions));
	cJSON_AddItemToObject(document, "requests", json_u64(info->requests));
	cJSON_AddItemToObject(document, "graph_runs", json_u64(info->graph_runs));
	cJSON_AddItemToObject(document, "graph_dispatches", json_u64(info->graph_dispatches));
	cJSON_AddItemToObject(document, "derived_copies", json_u64(info->derived_copies));
	cJSON_AddItemToObject(document, "derived_bytes", json_u64(info->derived_bytes));
	cJSON_AddItemToObject(document, "derived_found", json_u64(info->derived_found));
	cJSON_AddItemToObject(document, "derived_made", json_u64(info->derived_made));
	cJSON_AddItemToObject(document, "stuck", json_u64(info->stuck));
	cJSON_AddItemToObject(document, "compared", json_u64(info->compared));
	cJSON_AddItemToObject(document, "diverged", json_u64(info->diverged));
	cJSON_AddItemToObject(document, "left_out", json_u64(info->left_out));
	cJSON_AddItemToObject(document, "memory_bytes", json_u64(info->memory_bytes));
	cJSON_AddItemToObject(document, "memory_limit_bytes", json_u64(info->memory_limit_bytes));
	cJSON_AddItemToObject(document, "unhealthy", json_texts(info->unhealthy, info->unhealthy_count));
	cJSON_AddItemToObject(document, "degraded", json_texts(info->degraded, info->degraded_count));
	cJSON *own = cJSON_AddObjectToObject(document, "session");
	cJSON_AddItemToObject(own, "number", json_u64(session->session));
	cJSON_AddStringToObject(own, "tenant", session->tenant);
	cJSON_AddStringToObject(own, "identity", session->identity);
	cJSON_AddStringToObject(own, "rights", session->rights);
	cJSON_AddBoolToObject(own, "admin", session->admin);
	cJSON_AddItemToObject(own, "memory_bytes", json_u64(info->session_memory_bytes));
	cJSON_AddItemToObject(own, "memory_limit_bytes", json_u64(session->session_bytes));
	cJSON_AddItemToObject(own, "in_flight_limit", json_u64(session->in_flight));
	return print_json(document);
}

static void print_info(const opd_server_info *info, const opd_session *session)
{
	(void)printf("server     %s (opd %s), pid %" PRIu64 "%s\n", shown(session->server), shown(info->version), info->pid,
	             info->draining ? ", draining" : "");
	(void)printf("uptime     %s\n", duration_text((double)info->uptime_us * 1e3));
	print_list("listeners  ", info->listeners, info->listener_count);
	print_list("devices    ", info->devices, info->device_count);
	print_device_states(info);
	(void)printf("threads    %u kernel, %u I/O\n", info->threads, info->loops);
	(void)printf("sessions   %" PRIu64 "\nrequests   %" PRIu64 "\n", info->sessions, info->requests);
	if (info->graph_runs != 0)
		(void)printf("graphs     %" PRIu64 " runs, %" PRIu64 " of them dispatched\n", info->graph_runs, info->graph_dispatches);
	if (info->derived_made != 0)
		(void)printf("derived    %" PRIu64 " copies of kept tensors, %" PRIu64 " bytes; made %" PRIu64 ", found %" PRIu64 "\n", info->derived_copies,
		             info->derived_bytes, info->derived_made, info->derived_found);
	if (info->compared + info->left_out != 0)
		(void)printf("compared   %" PRIu64 " runs with a second provider, %" PRIu64 " differed, %" PRIu64 " were left out\n", info->compared, info->diverged, info->left_out);
	if (info->stuck != 0)
		(void)printf("stuck      %u threads in kernels that have exceeded their budget\n", info->stuck);
	(void)printf("memory     %s of %s\n", bytes_text(info->memory_bytes), bytes_text(info->memory_limit_bytes));
	(void)printf("session    %" PRIu64 ", tenant %s%s, %s of %s, %u requests in flight at most\n", session->session,
	             shown(session->tenant), session->admin ? ", administrator" : "", bytes_text(info->session_memory_bytes),
	             bytes_text(session->session_bytes), session->in_flight);
	(void)printf("identity   %s, rights: %s\n", shown(session->identity), session->rights[0] == '\0' ? "none" : shown(session->rights));
}

int cmd_info(struct opctl *ctl)
{
	int code = begin(ctl, ctl->options.count == 1, "info");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_server_info *info;
	const opd_status status = opd_info(ctl->client, &info, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	if (ctl->json)
		code = print_info_json(info, opd_client_session(ctl->client));
	else
		print_info(info, opd_client_session(ctl->client));
	opd_document_free(info);
	return code;
}

/* ---- health ---- */

static void print_conditions(const char *what, const char *const *texts, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		(void)printf("%s: %s\n", what, shown(texts[i]));
}

static int print_health(const struct opctl *ctl, const opd_server_info *info)
{
	const bool healthy = info->unhealthy_count == 0;
	int code = EXIT_DONE;
	if (ctl->json) {
		cJSON *document = cJSON_CreateObject();
		cJSON_AddBoolToObject(document, "healthy", healthy);
		cJSON_AddItemToObject(document, "unhealthy", json_texts(info->unhealthy, info->unhealthy_count));
		cJSON_AddItemToObject(document, "degraded", json_texts(info->degraded, info->degraded_count));
		code = print_json(document);
	} else {
		if (healthy)
			(void)puts("healthy");
		print_conditions("unhealthy", info->unhealthy, info->unhealthy_count);
		print_conditions("degraded", info->degraded, info->degraded_count);
	}
	return healthy ? code : EXIT_REQUEST;
}

int cmd_health(struct opctl *ctl)
{
	opd_error error;
	if (options_seconds(&ctl->options, OPTION_TIMEOUT, 5000000, &ctl->timeout_us, &error) != OPD_OK)
		return report_usage(ctl, &error);
	int code = begin(ctl, ctl->options.count == 1, "health [--timeout SECONDS]");
	if (code != EXIT_DONE)
		return code;
	const opd_server_info *info;
	const opd_status status = opd_info(ctl->client, &info, &error);
	if (status == OPD_DEADLINE_EXCEEDED) {
		(void)report_failure(ctl, status, &error);
		return EXIT_UNREACHABLE;
	}
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	code = print_health(ctl, info);
	opd_document_free(info);
	return code;
}

/* ---- module, log-level, drain ---- */

int cmd_module(struct opctl *ctl)
{
	const struct options *options = &ctl->options;
	const int code = begin(ctl, options->count == 3 && strcmp(options->positional[1], "load") == 0, "module load PATH");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_status status = opd_load_module(ctl->client, options->positional[2], &error);
	return report_done(ctl, status, &error, "loaded");
}

int cmd_provider(struct opctl *ctl)
{
	const struct options *options = &ctl->options;
	const bool right = (options->count == 3 || options->count == 4) && strcmp(options->positional[2], "restore") == 0;
	const int code = begin(ctl, right, "provider NAME restore [OP]");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_status status = opd_restore_provider(ctl->client, options->positional[1], options->count == 4 ? options->positional[3] : NULL, &error);
	return report_done(ctl, status, &error, "restored");
}

int cmd_log_level(struct opctl *ctl)
{
	const int code = begin(ctl, ctl->options.count == 2, "log-level error|warn|info|debug");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_status status = opd_set_log_level(ctl->client, ctl->options.positional[1], &error);
	return report_done(ctl, status, &error, "set");
}

int cmd_drain(struct opctl *ctl)
{
	opd_error error;
	uint64_t timeout_us;
	if (options_seconds(&ctl->options, OPTION_TIMEOUT, 0, &timeout_us, &error) != OPD_OK)
		return report_usage(ctl, &error);
	const int code = begin(ctl, ctl->options.count == 1, "drain [--timeout SECONDS]");
	if (code != EXIT_DONE)
		return code;
	const opd_status status = opd_drain(ctl->client, timeout_us, &error);
	return report_done(ctl, status, &error, "draining");
}
