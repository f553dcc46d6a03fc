/* Keys with one value: what they are called, where they lie, what they may be. */
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/bounds.h"
#include "server/config_internal.h"

enum {
	GIVEN_SESSION = 1u << 0,
	GIVEN_REQUEST = 1u << 1,
	GIVEN_CACHE = 1u << 2,
	GIVEN_DERIVED = 1u << 3,
};

struct unit {
	const char *name;
	uint64_t factor;
};

static const struct unit byte_units[] = {
	{"", 1},
	{"B", 1},
	{"KiB", 1ull << 10},
	{"MiB", 1ull << 20},
	{"GiB", 1ull << 30},
	{"TiB", 1ull << 40},
	{NULL, 0},
};

static const struct unit time_units[] = {
	{"ns", 1},
	{"us", 1000},
	{"ms", 1000000},
	{"s", 1000000000},
	{"min", 60000000000},
	{"h", 3600000000000},
	{NULL, 0},
};

/* Digits only: no sign, no blank, no octal. False: no digit, or more than 64 bits hold. */
static bool parse_digits(const char **text, uint64_t *value_out)
{
	const char *at = *text;
	uint64_t value = 0;
	for (; *at >= '0' && *at <= '9'; at++)
		if (__builtin_mul_overflow(value, 10u, &value) || __builtin_add_overflow(value, (uint64_t)(*at - '0'), &value))
			return false;
	if (at == *text)
		return false;
	*text = at;
	*value_out = value;
	return true;
}

static bool parse_scaled(const char *text, const struct unit *units, uint64_t *value_out)
{
	uint64_t number;
	if (!parse_digits(&text, &number))
		return false;
	while (*text == ' ')
		text++;
	for (; units->name != NULL; units++)
		if (strcmp(text, units->name) == 0)
			return !__builtin_mul_overflow(number, units->factor, value_out);
	*value_out = 0;
	return number == 0 && *text == '\0'; /* nothing needs no unit */
}

opd_status config_parse_bytes(const char *text, uint64_t *bytes_out, opd_error *error)
{
	uint64_t bytes = 0;
	if (!parse_scaled(text, byte_units, &bytes))
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "\"%.64s\" is not a size, expected a whole number of bytes, KiB, MiB, GiB or TiB, such as 64 MiB", text);
	*bytes_out = bytes;
	return OPD_OK;
}

opd_status config_parse_duration(const char *text, uint64_t *ns_out, opd_error *error)
{
	uint64_t ns = 0;
	if (!parse_scaled(text, time_units, &ns))
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "\"%.64s\" is not a duration, expected a whole number of ns, us, ms, s, min or h, such as 500ms", text);
	*ns_out = ns;
	return OPD_OK;
}

static void *field(struct config *config, const struct config_key *key)
{
	return (char *)config + key->offset;
}

static opd_status set_bytes(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	uint64_t bytes = 0;
	opd_status status = config_parse_bytes(value, &bytes, error);
	if (status != OPD_OK)
		return status;
	if (bytes < key->low || bytes > key->high)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%" PRIu64 " bytes, expected %" PRIu64 " to %" PRIu64, bytes, key->low,
		                key->high);
	*(uint64_t *)field(config, key) = bytes;
	return OPD_OK;
}

static opd_status set_count(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	const char *end = value;
	uint64_t number;
	if (!parse_digits(&end, &number) || *end != '\0' || number < key->low || number > key->high)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected a whole number of %" PRIu64 " to %" PRIu64, value,
		                key->low, key->high);
	*(uint32_t *)field(config, key) = (uint32_t)number;
	return OPD_OK;
}

/* `unit` nanoseconds are one of the field's. */
static opd_status set_time(struct config *config, const struct config_key *key, uint64_t unit, const char *value, opd_error *error)
{
	uint64_t ns = 0;
	opd_status status = config_parse_duration(value, &ns, error);
	if (status != OPD_OK)
		return status;
	const char *name = unit == 1 ? "ns" : "us";
	if (ns % unit != 0 || ns / unit < key->low || ns / unit > key->high)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected %" PRIu64 "%s to %" PRIu64 "%s", value, key->low, name,
		                key->high, name);
	*(uint64_t *)field(config, key) = ns / unit;
	return OPD_OK;
}

static opd_status set_us(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	return set_time(config, key, 1000, value, error);
}

static opd_status set_ns(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	return set_time(config, key, 1, value, error);
}

static opd_status set_bool(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	if (strcmp(value, "true") != 0 && strcmp(value, "false") != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected true or false", value);
	*(bool *)field(config, key) = value[0] == 't';
	return OPD_OK;
}

static opd_status set_level(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	int level = log_level_parse(value);
	if (level < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected error, warn, info or debug", value);
	*(log_level *)field(config, key) = (log_level)level;
	return OPD_OK;
}

static opd_status set_format(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	bool json = strcmp(value, "json") == 0;
	if (!json && strcmp(value, "text") != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected text or json", value);
	*(log_format *)field(config, key) = json ? LOG_JSON : LOG_TEXT;
	return OPD_OK;
}

static opd_status set_path(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	if (value[0] == '\0')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "empty, expected a path");
	char *copy = strdup(value);
	if (copy == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	char **path = field(config, key);
	free(*path);
	*path = copy;
	return OPD_OK;
}

static const char *const tls_clients_names[] = {
	[TLS_CLIENTS_UNSAID] = "", [TLS_CLIENTS_OFF] = "off", [TLS_CLIENTS_OPTIONAL] = "optional", [TLS_CLIENTS_REQUIRED] = "required"};

static opd_status set_tls_clients(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	for (size_t i = TLS_CLIENTS_OFF; i <= TLS_CLIENTS_REQUIRED; i++) {
		if (strcmp(value, tls_clients_names[i]) == 0) {
			*(tls_clients *)field(config, key) = (tls_clients)i;
			return OPD_OK;
		}
	}
	return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected off, optional or required", value);
}

static opd_status set_log_file(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	if (value[0] == '\0')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "empty, expected a path or stderr");
	char *copy = strcmp(value, "stderr") == 0 ? NULL : strdup(value);
	if (copy == NULL && strcmp(value, "stderr") != 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	char **path = field(config, key);
	free(*path);
	*path = copy;
	return OPD_OK;
}

static opd_status set_metrics(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	(void)key;
	return config_set_metrics(config, value, error);
}

static opd_status set_folder(struct config *config, const struct config_key *key, const char *value, opd_error *error)
{
	if (value[0] != '/' || strlen(value) > 500)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.200s\", expected the absolute path of a folder", value);
	char *copy = strdup(value);
	if (copy == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	char **path = field(config, key);
	free(*path);
	*path = copy;
	return OPD_OK;
}

#define MINUTE_US 60000000ull
#define MEMORY_MAX (1ull << 50)
#define AT(member) offsetof(struct config, member)

static const struct config_key keys[] = {
	{"limits.memory", set_bytes, AT(limits.memory_bytes), 1u << 20, MEMORY_MAX, 0},
	{"limits.session", set_bytes, AT(limits.session_bytes), 64u << 10, MEMORY_MAX, GIVEN_SESSION},
	{"limits.request", set_bytes, AT(limits.request_bytes), 64u << 10, BOUND_PAYLOAD_BYTES, GIVEN_REQUEST},
	{"limits.envelope", set_bytes, AT(limits.envelope_bytes), BOUND_HELLO_BYTES, BOUND_ENVELOPE_BYTES, 0},
	{"limits.cache", set_bytes, AT(limits.cache_bytes), 0, MEMORY_MAX, GIVEN_CACHE},
	{"limits.derived", set_bytes, AT(limits.derived_bytes), 0, MEMORY_MAX, GIVEN_DERIVED},
	{"limits.sessions", set_count, AT(limits.sessions), 1, 1000000, 0},
	{"limits.in_flight", set_count, AT(limits.in_flight), 1, 65536, 0},
	{"limits.kept", set_count, AT(limits.kept), 0, 1u << 24, 0},
	{"limits.regions", set_count, AT(limits.regions), 0, 1024, 0},
	{"limits.shared", set_bytes, AT(limits.shared_bytes), 0, MEMORY_MAX, 0},
	{"limits.rings", set_bytes, AT(limits.ring_bytes), 0, 2 * BOUND_RING_BYTES_MAX, 0},
	{"limits.queue", set_count, AT(limits.queue), 0, 1u << 20, 0},
	{"limits.lane_queue", set_count, AT(limits.lane_queue), 0, 1u << 24, 0},
	{"limits.handshakes", set_count, AT(limits.handshakes), 1, 1000000, 0},
	{"limits.refuse_uploads", set_count, AT(limits.refuse_uploads), 1, 100, 0},
	{"limits.refuse_sessions", set_count, AT(limits.refuse_sessions), 1, 100, 0},
	{"limits.drop_caches", set_count, AT(limits.drop_caches), 1, 100, 0},
	{"limits.handshake", set_us, AT(limits.handshake_us), 10000, 60 * MINUTE_US, 0},
	{"limits.stall", set_us, AT(limits.stall_us), 100000, 24 * 60 * MINUTE_US, 0},
	{"limits.drain", set_us, AT(limits.drain_us), 1000, 24 * 60 * MINUTE_US, 0},
	{"metrics", set_metrics, AT(metrics), 0, 0, 0},
	{"limits.stuck", set_us, AT(limits.stuck_us), 0, 24 * 60 * MINUTE_US, 0},
	{"tls.certificate", set_path, AT(tls.certificate), 0, 0, 0},
	{"tls.key", set_path, AT(tls.key), 0, 0, 0},
	{"tls.client_ca", set_path, AT(tls.client_ca), 0, 0, 0},
	{"tls.client_certificates", set_tls_clients, AT(tls.clients), 0, 0, 0},
	{"quarantine.failures", set_count, AT(quarantine.failures), 0, QUARANTINE_FAILURES_MAX, 0},
	{"quarantine.provider_failures", set_count, AT(quarantine.provider_failures), 0, QUARANTINE_FAILURES_MAX, 0},
	{"quarantine.window", set_us, AT(quarantine.window_us), 1000, 24 * 60 * MINUTE_US, 0},
	{"quarantine.cooldown", set_us, AT(quarantine.cooldown_us), 1000, 24 * 60 * MINUTE_US, 0},
	{"tokens", set_path, AT(tokens_path), 0, 0, 0},
	{"differential.memory", set_bytes, AT(differential_bytes), 0, MEMORY_MAX, 0},
	{"differential.folder", set_folder, AT(differential_folder), 0, 0, 0},
	{"threads", set_count, AT(threads), 0, 1024, 0},
	{"loops", set_count, AT(loops), 0, CONFIG_LOOPS_MAX, 0},
	{"checked", set_bool, AT(checked), 0, 0, 0},
	{"inline", set_ns, AT(inline_ns), 0, 1000000, 0},
	{"segment", set_ns, AT(segment_ns), 1000, 1000000000, 0},
	{"batching.rows", set_count, AT(batch_rows), 0, 256, 0},
	{"batching.devices", set_bool, AT(batch_devices), 0, 0, 0},
	{"batching.shared", set_bytes, AT(batch_shared_bytes), 0, MEMORY_MAX, 0},
	{"polling.window", set_us, AT(polling_window_us), 0, 10000, 0},
	{"polling.budget", set_us, AT(polling_budget_us), 0, 1000000, 0},
	{"log.level", set_level, AT(level), 0, 0, 0},
	{"log.format", set_format, AT(format), 0, 0, 0},
	{"log.lines", set_count, AT(log_lines), 0, 1000000, 0},
	{"core", set_bool, AT(core), 0, 0, 0},
	{"log.file", set_log_file, AT(log_path), 0, 0, 0},
};

const struct config_key *config_key_find(const char *name)
{
	for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
		if (strcmp(keys[i].name, name) == 0)
			return &keys[i];
	return NULL;
}

const struct config_key *config_key_at(size_t index)
{
	return index < sizeof keys / sizeof *keys ? &keys[index] : NULL;
}

/* ---- As text ---- */

/* By the largest unit that divides it. */
static void print_scaled(uint64_t value, const struct unit *units, const char *blank, char *out, size_t out_bytes)
{
	const struct unit *best = units;
	for (; value != 0 && units->name != NULL; units++)
		if (value % units->factor == 0)
			best = units;
	(void)snprintf(out, out_bytes, "%" PRIu64 "%s%s", value / best->factor, best->name[0] == '\0' ? "" : blank, best->name);
}

static void print_bytes(const void *field, char *out, size_t out_bytes)
{
	print_scaled(*(const uint64_t *)field, byte_units, " ", out, out_bytes);
}

static void print_count(const void *field, char *out, size_t out_bytes)
{
	(void)snprintf(out, out_bytes, "%" PRIu32, *(const uint32_t *)field);
}

static void print_us(const void *field, char *out, size_t out_bytes)
{
	print_scaled(*(const uint64_t *)field * 1000, time_units, "", out, out_bytes);
}

static void print_ns(const void *field, char *out, size_t out_bytes)
{
	print_scaled(*(const uint64_t *)field, time_units, "", out, out_bytes);
}

static void print_bool(const void *field, char *out, size_t out_bytes)
{
	(void)snprintf(out, out_bytes, "%s", *(const bool *)field ? "true" : "false");
}

static void print_level(const void *field, char *out, size_t out_bytes)
{
	(void)snprintf(out, out_bytes, "%s", log_level_name(*(const log_level *)field));
}

static void print_format(const void *field, char *out, size_t out_bytes)
{
	(void)snprintf(out, out_bytes, "%s", *(const log_format *)field == LOG_JSON ? "json" : "text");
}

static void print_path(const void *field_at, char *out, size_t out_bytes)
{
	const char *const *path = field_at;
	(void)snprintf(out, out_bytes, "%s", *path == NULL ? "" : *path);
}

static void print_tls_clients(const void *field_at, char *out, size_t out_bytes)
{
	(void)snprintf(out, out_bytes, "%s", tls_clients_names[*(const tls_clients *)field_at]);
}

static void print_log_file(const void *field, char *out, size_t out_bytes)
{
	const char *path = *(char *const *)field;
	(void)snprintf(out, out_bytes, "%s", path == NULL ? "stderr" : path);
}

static void print_metrics(const void *field, char *out, size_t out_bytes)
{
	const char *address = ((const struct config_listener *)field)->address;
	(void)snprintf(out, out_bytes, "%s", address == NULL ? "off" : address);
}

static void print_folder(const void *field, char *out, size_t out_bytes)
{
	const char *path = *(char *const *)field;
	(void)snprintf(out, out_bytes, "%s", path == NULL ? "" : path);
}

/* One for each way to set. */
static const struct {
	opd_status (*set)(struct config *config, const struct config_key *key, const char *value, opd_error *error);
	void (*print)(const void *field, char *out, size_t out_bytes);
} printers[] = {
	{set_bytes, print_bytes}, {set_count, print_count}, {set_us, print_us},         {set_ns, print_ns},
	{set_path, print_path},   {set_tls_clients, print_tls_clients},
	{set_bool, print_bool},   {set_level, print_level}, {set_format, print_format}, {set_log_file, print_log_file},
	{set_metrics, print_metrics},
	{set_folder, print_folder},
};

void config_key_text(const struct config *config, const struct config_key *key, char *out, size_t out_bytes)
{
	(void)snprintf(out, out_bytes, "?"); /* a way to set without a row above: test_config finds it */
	for (size_t i = 0; i < sizeof printers / sizeof *printers; i++)
		if (printers[i].set == key->set)
			printers[i].print((const char *)config + key->offset, out, out_bytes);
}

opd_status config_set(struct config *config, const char *name, const char *value, opd_error *error)
{
	const struct config_key *key = config_key_find(name);
	if (key == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "%s: no such key with one value", name);
	opd_status status = key->set(config, key, value, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", name);
	config->given |= key->given;
	config_derive_limits(config);
	return OPD_OK;
}

static uint64_t at_most(uint64_t value, uint64_t limit)
{
	return value < limit ? value : limit;
}

void config_derive_limits(struct config *config)
{
	struct config_limits *limits = &config->limits;
	if ((config->given & GIVEN_SESSION) == 0)
		limits->session_bytes = limits->memory_bytes / 2;
	if ((config->given & GIVEN_REQUEST) == 0)
		limits->request_bytes = at_most(4ull << 30, limits->session_bytes);
	if ((config->given & GIVEN_CACHE) == 0)
		limits->cache_bytes = at_most(256ull << 20, limits->memory_bytes);
	if ((config->given & GIVEN_DERIVED) == 0)
		limits->derived_bytes = limits->memory_bytes / 4;
}

static opd_status check_order(const char *name, uint64_t value, const char *of, uint64_t limit, opd_error *error)
{
	if (value <= limit)
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %" PRIu64 " bytes, expected at most %s (%" PRIu64 ")", name, value, of, limit);
}

opd_status config_check_limits(const struct config *config, opd_error *error)
{
	const struct config_limits *limits = &config->limits;
	opd_status status = check_order("limits.session", limits->session_bytes, "limits.memory", limits->memory_bytes, error);
	if (status == OPD_OK)
		status = check_order("limits.request", limits->request_bytes, "limits.session", limits->session_bytes, error);
	if (status == OPD_OK)
		status = check_order("limits.cache", limits->cache_bytes, "limits.memory", limits->memory_bytes, error);
	if (status == OPD_OK)
		status = check_order("limits.derived", limits->derived_bytes, "limits.memory", limits->memory_bytes, error);
	return status;
}
