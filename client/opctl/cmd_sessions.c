/* sessions, session: who shares the daemon. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "client/opctl/print.h"

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

/* ---- sessions ---- */

static void add_usage(cJSON *item, const opd_usage *usage)
{
	cJSON_AddItemToObject(item, "jobs", json_u64(usage->jobs));
	cJSON_AddItemToObject(item, "device_ns", json_u64(usage->device_ns));
	cJSON_AddItemToObject(item, "wait_ns", json_u64(usage->wait_ns));
	cJSON_AddItemToObject(item, "wait_max_ns", json_u64(usage->wait_max_ns));
}

static const char *const quota_names[] = {"sessions", "in_flight", "queued", "bytes_in", "bytes_out", "memory", "device_memory", "device_time"};

#define QUOTA_KINDS (sizeof quota_names / sizeof quota_names[0])

static void add_quotas(cJSON *item, uint32_t count, const opd_quota *quotas)
{
	cJSON *object = cJSON_AddObjectToObject(item, "quotas");
	for (uint32_t i = 0; i < count; i++) {
		cJSON *quota = cJSON_AddObjectToObject(object, quota_names[quotas[i].kind]);
		cJSON_AddItemToObject(quota, "limit", json_u64(quotas[i].limit));
		cJSON_AddItemToObject(quota, "used", json_u64(quotas[i].used));
		cJSON_AddItemToObject(quota, "refused", json_u64(quotas[i].refused));
	}
}

static void add_session(cJSON *list, const opd_session_state *session)
{
	cJSON *item = cJSON_CreateObject();
	cJSON_AddItemToArray(list, item);
	cJSON_AddItemToObject(item, "session", json_u64(session->session));
	cJSON_AddStringToObject(item, "tenant", session->tenant);
	cJSON_AddStringToObject(item, "peer", session->peer);
	cJSON_AddItemToObject(item, "age_us", json_u64(session->age_us));
	cJSON_AddStringToObject(item, "class", class_text(session->service_class));
	cJSON_AddItemToObject(item, "weight", json_u64(session->weight));
	cJSON_AddItemToObject(item, "in_flight", json_u64(session->in_flight));
	cJSON_AddItemToObject(item, "queued", json_u64(session->queued));
	cJSON_AddItemToObject(item, "running", json_u64(session->running));
	cJSON_AddItemToObject(item, "memory_bytes", json_u64(session->memory_bytes));
	cJSON_AddItemToObject(item, "share", json_f64(session->share));
	if (session->device[0] != '\0')
		cJSON_AddStringToObject(item, "device", session->device);
	add_usage(item, &session->usage);
	add_quotas(item, session->quota_count, session->quotas);
}

static void add_tenant(cJSON *list, const opd_tenant_state *tenant)
{
	cJSON *item = cJSON_CreateObject();
	cJSON_AddItemToArray(list, item);
	cJSON_AddStringToObject(item, "tenant", tenant->name);
	cJSON_AddItemToObject(item, "weight", json_u64(tenant->weight));
	cJSON_AddStringToObject(item, "class", class_text(tenant->service_class));
	cJSON_AddStringToObject(item, "class_max", class_text(tenant->class_max));
	cJSON_AddItemToObject(item, "device_rate_ns", json_u64(tenant->device_rate_ns));
	cJSON_AddItemToObject(item, "sessions", json_u64(tenant->sessions));
	cJSON_AddItemToObject(item, "queued", json_u64(tenant->queued));
	cJSON_AddItemToObject(item, "running", json_u64(tenant->running));
	add_usage(item, &tenant->usage);
	add_quotas(item, tenant->quota_count, tenant->quotas);
}

static cJSON *lanes_json(const opd_sharing *sharing)
{
	cJSON *list = cJSON_CreateArray();
	for (uint32_t i = 0; i < sharing->lane_count; i++) {
		cJSON *item = cJSON_CreateObject();
		cJSON_AddItemToArray(list, item);
		cJSON_AddStringToObject(item, "lane", sharing->lanes[i].name);
		cJSON_AddItemToObject(item, "threads", json_u64(sharing->lanes[i].threads));
		cJSON_AddItemToObject(item, "queued", json_u64(sharing->lanes[i].queued));
		cJSON_AddItemToObject(item, "running", json_u64(sharing->lanes[i].running));
		cJSON_AddItemToObject(item, "device_ns", json_u64(sharing->lanes[i].device_ns));
	}
	return list;
}

/* Those with a limit, or that somebody ran into. */
static void print_quotas(const char *whose, uint32_t count, const opd_quota *quotas)
{
	for (uint32_t i = 0; i < count; i++)
		if (quotas[i].limit != 0 || quotas[i].refused != 0)
			(void)printf("quota %-13s of %s: %" PRIu64 " used, limit %" PRIu64 "%s, %" PRIu64 " times refused\n", quota_names[quotas[i].kind], whose,
			             quotas[i].used, quotas[i].limit, quotas[i].limit == 0 ? " (any)" : "", quotas[i].refused);
}

static void print_session(const opd_session_state *session)
{
	const opd_usage *usage = &session->usage;
	const double jobs = usage->jobs == 0 ? 1 : (double)usage->jobs;
	(void)printf("%7" PRIu64 "  %-14s %-11s %7u %6u %6u %9" PRIu64 " %10s %10s %10s  %s\n", session->session, shown(session->tenant),
	             class_text(session->service_class), session->weight, session->queued, session->running, usage->jobs,
	             duration_text((double)usage->device_ns), duration_text((double)usage->wait_ns / jobs), bytes_text(session->memory_bytes),
	             shown(session->peer));
	if (session->device[0] != '\0')
		(void)printf("pinned               session %" PRIu64 " to %s\n", session->session, shown(session->device));
	char whose[40];
	(void)snprintf(whose, sizeof whose, "session %" PRIu64, session->session);
	print_quotas(whose, session->quota_count, session->quotas);
}

static void print_tenant(const opd_tenant_state *tenant)
{
	(void)printf("tenant %-14s weight %u, class %s (at most %s), %u sessions, %u queued, %u running, %" PRIu64 " jobs, %s of device time\n",
	             shown(tenant->name), tenant->weight, class_text(tenant->service_class), class_text(tenant->class_max), tenant->sessions, tenant->queued,
	             tenant->running, tenant->usage.jobs, duration_text((double)tenant->usage.device_ns));
	char whose[600];
	(void)snprintf(whose, sizeof whose, "tenant %s", shown(tenant->name));
	print_quotas(whose, tenant->quota_count, tenant->quotas);
}

static void print_heading(const opd_sharing *sharing)
{
	for (uint32_t i = 0; i < sharing->lane_count; i++)
		(void)printf("lane %s: %u threads, %u queued, %u running, %s of device time used\n", shown(sharing->lanes[i].name), sharing->lanes[i].threads,
		             sharing->lanes[i].queued, sharing->lanes[i].running, duration_text((double)sharing->lanes[i].device_ns));
	for (uint32_t i = 0; i < sharing->tenant_count; i++)
		print_tenant(&sharing->tenants[i]);
}

int cmd_sessions(struct opctl *ctl)
{
	const int code = begin(ctl, ctl->options.count == 1, "sessions");
	if (code != EXIT_DONE)
		return code;
	cJSON *document = ctl->json ? cJSON_CreateObject() : NULL;
	cJSON *list = cJSON_AddArrayToObject(document, "sessions");
	uint64_t next = 0;
	do {
		opd_error error;
		const opd_sharing *sharing;
		const opd_status status = opd_sessions(ctl->client, next, &sharing, &error);
		if (status != OPD_OK) {
			cJSON_Delete(document);
			return report_failure(ctl, status, &error);
		}
		if (next == 0 && ctl->json) {
			cJSON *tenants = cJSON_AddArrayToObject(document, "tenants");
			for (uint32_t i = 0; i < sharing->tenant_count; i++)
				add_tenant(tenants, &sharing->tenants[i]);
			cJSON_AddItemToObject(document, "lanes", lanes_json(sharing));
		}
		if (next == 0 && !ctl->json) {
			print_heading(sharing);
			(void)puts("session  tenant         class        weight queued    run      jobs     device  mean wait     memory  peer");
		}
		for (uint32_t i = 0; i < sharing->session_count; i++) {
			if (ctl->json)
				add_session(list, &sharing->sessions[i]);
			else
				print_session(&sharing->sessions[i]);
		}
		next = sharing->next;
		opd_document_free(sharing);
	} while (next != 0);
	return ctl->json ? print_json(document) : EXIT_DONE;
}

/* ---- session ID set weight|class|priority|quota|device VALUE, session ID clear priority OP ---- */

struct change {
	uint64_t session;
	uint32_t weight;
	opd_class service_class;
	bool quota;
	opd_quota_kind kind;
	uint64_t limit;
	const char *device; /* NULL: something else is changed */
	bool clear;         /* the list of op */
	const char *op;     /* whose list is changed; NULL: none is */
	struct name_list list;
	char op_text[128];
};

struct unit {
	const char *name;
	uint64_t factor;
};

static const struct unit byte_units[] = {{"", 1}, {"KiB", 1ull << 10}, {"MiB", 1ull << 20}, {"GiB", 1ull << 30}, {"TiB", 1ull << 40}, {NULL, 0}};
static const struct unit time_units[] = {{"ns", 1}, {"us", 1000}, {"ms", 1000000}, {"s", 1000000000}, {NULL, 0}};

/* The digits that a text begins with; NULL: there are none, or more than 64 bits hold. */
static const char *parse_digits(const char *text, uint64_t *out)
{
	char *end;
	if (text[0] < '0' || text[0] > '9')
		return NULL;
	errno = 0;
	*out = strtoull(text, &end, 10);
	return errno == 0 ? end : NULL;
}

/* A whole number and one of the units; 0 needs none. */
static opd_status parse_scaled(const char *what, const char *text, const struct unit *units, uint64_t *out, opd_error *error)
{
	uint64_t number = 0;
	const char *end = parse_digits(text, &number);
	const struct unit *unit = units;
	while (end != NULL && *end == ' ')
		end++;
	while (end != NULL && unit->name != NULL && strcmp(unit->name, end) != 0)
		unit++;
	if (end == NULL || (unit->name == NULL && (number != 0 || *end != '\0')) || (unit->name != NULL && __builtin_mul_overflow(number, unit->factor, out)))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is '%s', expected a whole number of 64 bits with a unit, such as 64%s", what, shown(text), units[2].name);
	if (unit->name == NULL)
		*out = 0;
	return OPD_OK;
}

static opd_status parse_number(const char *what, const char *text, uint64_t *out, opd_error *error)
{
	const char *end = parse_digits(text, out);
	return end != NULL && *end == '\0' ? OPD_OK : opd_fail(error, OPD_INVALID_ARGUMENT, "%s is '%s', expected a whole number of 64 bits", what, shown(text));
}

/* "bytes_in=64MiB", "device_time=500ms", "in_flight=32"; 0: as the daemon's configuration has it. */
static opd_status parse_quota(const char *text, struct change *change, opd_error *error)
{
	const char *equals = strchr(text, '=');
	const size_t bytes = equals == NULL ? 0 : (size_t)(equals - text);
	uint32_t kind = 1; /* the first is a tenant's */
	while (kind < QUOTA_KINDS && (strlen(quota_names[kind]) != bytes || memcmp(quota_names[kind], text, bytes) != 0))
		kind++;
	if (kind == QUOTA_KINDS)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "the quota is '%s', expected in_flight, queued, bytes_in, bytes_out, memory, device_memory or device_time, = and its limit", shown(text));
	change->quota = true;
	change->kind = (opd_quota_kind)kind;
	if (kind == OPD_QUOTA_DEVICE_TIME)
		return parse_scaled("the quota", equals + 1, time_units, &change->limit, error);
	if (kind == OPD_QUOTA_IN_FLIGHT || kind == OPD_QUOTA_QUEUED)
		return parse_number("the quota", equals + 1, &change->limit, error);
	return parse_scaled("the quota", equals + 1, byte_units, &change->limit, error);
}

static opd_status parse_weight(const char *text, uint32_t *weight_out, opd_error *error)
{
	uint64_t number = 0;
	opd_status status = parse_number("the weight", text, &number, error);
	if (status == OPD_OK && (number == 0 || number > 1000000))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the weight is %s, expected 1 to 1000000", shown(text));
	*weight_out = (uint32_t)number;
	return status;
}

static opd_status parse_class(const char *text, opd_class *class_out, opd_error *error)
{
	for (opd_class class = OPD_CLASS_REALTIME; class <= OPD_CLASS_BATCH; class++)
		if (strcmp(text, class_text(class)) == 0)
			*class_out = class;
	if (*class_out == OPD_CLASS_NORMAL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the class is '%s', expected realtime, interactive or batch", shown(text));
	return OPD_OK;
}

/* "linear=onednn,cpu", "*=cpu"; "linear=": an empty list, which differs from none. */
static opd_status parse_list(const char *text, struct change *change, opd_error *error)
{
	const char *equals = strchr(text, '=');
	if (equals == NULL || equals == text || (size_t)(equals - text) >= sizeof change->op_text)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the priority is '%s', expected OP=LIST, such as linear=onednn,cpu or '*=cpu'", shown(text));
	(void)snprintf(change->op_text, sizeof change->op_text, "%.*s", (int)(equals - text), text);
	change->op = change->op_text;
	return name_list_parse("the list", equals + 1, &change->list, error);
}

/* 0 is the protocol's word for the session that asks: opctl's own, which ends with the command. */
static opd_status parse_session(const char *text, uint64_t *session_out, opd_error *error)
{
	const opd_status status = parse_number("the session", text, session_out, error);
	if (status == OPD_OK && *session_out == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the session is '%s', expected the number of one that opctl sessions lists", shown(text));
	return status;
}

static opd_status parse_change(const struct options *options, struct change *change, opd_error *error)
{
	const char *what = options->positional[3], *value = options->positional[4];
	const opd_status status = parse_session(options->positional[1], &change->session, error);
	if (status != OPD_OK)
		return status;
	if (strcmp(options->positional[2], "clear") == 0) {
		change->clear = true;
		change->op = value;
		return OPD_OK;
	}
	if (strcmp(what, "weight") == 0)
		return parse_weight(value, &change->weight, error);
	if (strcmp(what, "quota") == 0)
		return parse_quota(value, change, error);
	if (strcmp(what, "class") == 0)
		return parse_class(value, &change->service_class, error);
	if (strcmp(what, "priority") == 0)
		return parse_list(value, change, error);
	change->device = value;
	return OPD_OK;
}

static bool is_settable(const char *what)
{
	static const char *const names[] = {"weight", "class", "priority", "quota", "device"};
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
		if (strcmp(what, names[i]) == 0)
			return true;
	return false;
}

/* `session ID set WHAT VALUE`, or `session ID clear priority OP`. */
static bool is_change(const struct options *options)
{
	const char *const *words = (const char *const *)options->positional;
	if (options->count != 5)
		return false;
	return strcmp(words[2], "set") == 0 ? is_settable(words[3]) : strcmp(words[2], "clear") == 0 && strcmp(words[3], "priority") == 0;
}

static opd_status send_change(opd_client *client, const struct change *change, opd_error *error)
{
	if (change->clear)
		return opd_clear_session_priority(client, change->session, change->op, error);
	if (change->op != NULL) {
		const opd_priority_entry entry = {.op = change->op, .providers = change->list.names, .count = change->list.count};
		return opd_set_session_priority(client, change->session, &entry, error);
	}
	if (change->device != NULL)
		return opd_set_session_device(client, change->session, change->device, error);
	if (change->quota)
		return opd_set_session_quota(client, change->session, change->kind, change->limit, error);
	return opd_set_session(client, change->session, change->weight, change->service_class, error);
}

static int print_change(const struct opctl *ctl, const struct change *change)
{
	if (ctl->json) {
		cJSON *document = cJSON_CreateObject();
		cJSON_AddBoolToObject(document, "done", true);
		return print_json(document);
	}
	(void)printf("session %" PRIu64 ": %s %s%s\n", change->session, ctl->options.positional[3], shown(ctl->options.positional[4]), change->clear ? " cleared" : "");
	return EXIT_DONE;
}

int cmd_session(struct opctl *ctl)
{
	const bool right = is_change(&ctl->options);
	struct change change = {0};
	opd_error error;
	if (right && parse_change(&ctl->options, &change, &error) != OPD_OK)
		return report_usage(ctl, &error);
	int code = begin(ctl, right, "session ID set weight|class|priority|quota|device VALUE, or session ID clear priority OP");
	if (code == EXIT_DONE) {
		const opd_status status = send_change(ctl->client, &change, &error);
		code = status == OPD_OK ? print_change(ctl, &change) : report_failure(ctl, status, &error);
	}
	name_list_fini(&change.list);
	return code;
}
