/* The configuration's file: which keys there are, and what each is read into. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/config_internal.h"
#include "server/config_reader.h"

#define FILE_BYTES_MAX (1u << 20)

static opd_status read_value(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)name;
	(void)context;
	const struct config_key *known = config_key_find(key);
	if (known == NULL)
		return reader_fail(reader, line, key, "no such key");
	const char *text;
	opd_status status = reader_scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	line = reader_line(reader);
	status = config_set(reader->config, key, text, reader->error);
	return reader_place(reader, line, "", status);
}

static opd_status read_listener(struct reader *reader, const char *key, void *context)
{
	(void)context;
	const char *text;
	opd_status status = reader_scalar(reader, key, "an address such as unix:/run/opd/opd.sock", &text);
	if (status != OPD_OK)
		return status;
	return reader_place(reader, reader_line(reader), key, config_add_listener(reader->config, text, reader->error));
}

static opd_status read_provider(struct reader *reader, const char *key, void *context)
{
	const char *text;
	opd_status status = reader_scalar(reader, key, "a provider's name", &text);
	if (status != OPD_OK)
		return status;
	return reader_place(reader, reader_line(reader), key, config_append_provider(context, text, reader->error));
}

static opd_status read_priority(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config *config = reader->config;
	for (size_t i = 0; i < config->priority_count; i++)
		if (config->priorities[i].line != 0 && strcmp(config->priorities[i].op, name) == 0)
			return reader_fail(reader, line, key, "there already, in line %u", config->priorities[i].line);
	struct config_priority *priority;
	opd_status status = config_begin_priority(config, name, (unsigned)line, &priority, reader->error);
	if (status != OPD_OK)
		return reader_place(reader, line, key, status);
	if (reader_is_empty(reader))
		return reader_fail(reader, line, key, "nothing, expected a list of providers ([] for an empty one)");
	return reader_list(reader, key, read_provider, priority);
}

struct module_texts {
	char *name;
	char *path;
	bool isolated;
	bool confined;
};

static opd_status read_module_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	struct module_texts *texts = context;
	char **field = strcmp(name, "name") == 0 ? &texts->name : strcmp(name, "path") == 0 ? &texts->path : NULL;
	const bool isolated = strcmp(name, "isolated") == 0;
	if (field == NULL && !isolated)
		return reader_fail(reader, line, key, "no such key, expected name, path or isolated");
	const char *text;
	opd_status status = reader_scalar(reader, key, "a text", &text);
	if (status != OPD_OK)
		return status;
	if (isolated && strcmp(text, "true") != 0 && strcmp(text, "false") != 0 && strcmp(text, "confined") != 0)
		return reader_fail(reader, reader_line(reader), key, "\"%.64s\", expected true, false or confined", text);
	if (isolated) {
		texts->isolated = text[0] != 'f';
		texts->confined = text[0] == 'c';
		return OPD_OK;
	}
	*field = strdup(text);
	return *field != NULL ? OPD_OK : opd_fail(reader->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", reader->path);
}

static opd_status add_module(struct reader *reader, const char *key, size_t line, const struct module_texts *texts)
{
	if (texts->path == NULL)
		return reader_fail(reader, line, key, "a module without a path");
	struct config *config = reader->config;
	opd_status status = config_append_module(config, texts->name, texts->path, texts->isolated, (unsigned)line, reader->error);
	if (status == OPD_OK)
		config->modules[config->module_count - 1].confined = texts->confined;
	return reader_place(reader, line, key, status);
}

static opd_status read_module(struct reader *reader, const char *key, void *context)
{
	(void)context;
	size_t line = reader_line(reader);
	const char *path;
	if (reader->event.type == YAML_SCALAR_EVENT) {
		opd_status status = reader_scalar(reader, key, "a path", &path);
		if (status != OPD_OK)
			return status;
		return reader_place(reader, line, key, config_append_module(reader->config, NULL, path, false, (unsigned)line, reader->error));
	}
	struct module_texts texts = {0};
	struct reader_seen seen = {0};
	opd_status status = reader_map(reader, key, &seen, read_module_key, &texts);
	if (status == OPD_OK)
		status = add_module(reader, key, line, &texts);
	free(texts.name);
	free(texts.path);
	return status;
}

static opd_status read_lane_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	const char *text;
	opd_status status = reader_scalar(reader, key, "a single value", &text);
	return status == OPD_OK ? reader_place(reader, line, key, config_set_lane(context, name, text, reader->error)) : status;
}

static opd_status read_lane(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_lane *lane;
	struct reader_seen seen = {0};
	opd_status status = config_begin_lane(reader->config, name, (unsigned)line, &lane, reader->error);
	return status == OPD_OK ? reader_map(reader, key, &seen, read_lane_key, lane) : reader_place(reader, line, key, status);
}

static opd_status read_tenant_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	const char *text;
	opd_status status = reader_scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	status = config_set_tenant(context, name, text, reader->error);
	if (status == OPD_OK)
		status = config_note_tenant(context, name, text, reader->error);
	if (status == OPD_NOT_FOUND)
		return reader_fail(reader, line, key, "no such key, expected weight, class, class_max, lane or a quota: sessions, in_flight, queued, bytes_in, bytes_out, memory, device_memory, device_time, "
		               "or session_ and one of the last seven");
	return reader_place(reader, reader_line(reader), key, status);
}

static opd_status read_tenant(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_tenant *tenant;
	struct reader_seen seen = {0};
	opd_status status = config_begin_tenant(reader->config, name, (unsigned)line, &tenant, reader->error);
	if (status != OPD_OK)
		return reader_place(reader, line, key, status);
	status = reader_map(reader, key, &seen, read_tenant_key, tenant);
	if (status == OPD_OK && tenant->policy.class < tenant->policy.class_max)
		return reader_fail(reader, line, key, "class %s, expected one no more urgent than class_max %s", sched_class_name(tenant->policy.class),
		               sched_class_name(tenant->policy.class_max));
	return status;
}

static opd_status read_provider_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	const char *text;
	opd_status status = reader_scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	status = config_set_provider(context, name, text, reader->error);
	if (status == OPD_NOT_FOUND)
		return reader_fail(reader, line, key, "no such key, expected checked, budget, compare or compare_every");
	return reader_place(reader, reader_line(reader), key, status);
}

static opd_status read_trust(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_provider *provider;
	struct reader_seen seen = {0};
	opd_status status = config_begin_provider(reader->config, name, (unsigned)line, &provider, reader->error);
	if (status != OPD_OK)
		return reader_place(reader, line, key, status);
	return reader_map(reader, key, &seen, read_provider_key, provider);
}

struct identity_list {
	struct config_identity *identity;
	const char *name;
};

static opd_status read_identity_item(struct reader *reader, const char *key, void *context)
{
	const struct identity_list *list = context;
	const char *text;
	opd_status status = reader_scalar(reader, key, "a name", &text);
	if (status != OPD_OK)
		return status;
	return reader_place(reader, reader_line(reader), key, config_add_to_identity(list->identity, list->name, text, reader->error));
}

static opd_status read_identity_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	struct identity_list list = {context, name};
	opd_status status = config_add_to_identity(context, name, NULL, reader->error);
	if (status == OPD_OK && reader_is_empty(reader))
		return reader_fail(reader, line, key, "nothing, expected a list ([] for an empty one)");
	if (status != OPD_NOT_FOUND)
		return status == OPD_OK ? reader_list(reader, key, read_identity_item, &list) : reader_place(reader, line, key, status);
	const char *text;
	status = reader_scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	status = config_set_identity(context, name, text, reader->error);
	if (status == OPD_NOT_FOUND)
		return reader_fail(reader, line, key, "no such key, expected certificate, uid, gid, tenant, rights, ops, providers or classes");
	return reader_place(reader, reader_line(reader), key, status);
}

static opd_status read_identity(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_identity *identity;
	struct reader_seen seen = {0};
	opd_status status = config_begin_identity(reader->config, name, (unsigned)line, &identity, reader->error);
	if (status != OPD_OK)
		return reader_place(reader, line, key, status);
	return reader_map(reader, key, &seen, read_identity_key, identity);
}

static opd_status read_section(struct reader *reader, const char *key)
{
	struct reader_seen seen = {0};
	return reader_map(reader, key, &seen, read_value, NULL);
}

static opd_status read_listeners(struct reader *reader, const char *key)
{
	return reader_list(reader, key, read_listener, NULL);
}

static opd_status read_modules(struct reader *reader, const char *key)
{
	return reader_list(reader, key, read_module, NULL);
}

/* The file's lists replace the built-in one. */
static opd_status read_priorities(struct reader *reader, const char *key)
{
	config_clear_priorities(reader->config);
	return reader_map(reader, key, NULL, read_priority, NULL);
}

static opd_status read_tenants(struct reader *reader, const char *key)
{
	return reader_map(reader, key, NULL, read_tenant, NULL);
}

static opd_status read_lanes(struct reader *reader, const char *key)
{
	return reader_map(reader, key, NULL, read_lane, NULL);
}

static opd_status read_identities(struct reader *reader, const char *key)
{
	return reader_map(reader, key, NULL, read_identity, NULL);
}

static opd_status read_providers(struct reader *reader, const char *key)
{
	return reader_map(reader, key, NULL, read_trust, NULL);
}

/* What isn't a single value of its own. */
static const struct section {
	const char *name;
	opd_status (*read)(struct reader *reader, const char *key);
} sections[] = {
	{"listen", read_listeners},
	{"modules", read_modules},
	{"priorities", read_priorities},
	{"tenants", read_tenants},
	{"lanes", read_lanes},
	{"identities", read_identities},
	{"providers", read_providers},
	{"limits", read_section},
	{"log", read_section},
	{"polling", read_section},
	{"batching", read_section},
	{"quarantine", read_section},
	{"tls", read_section},
	{"differential", read_section},
};

static opd_status read_top(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	for (size_t i = 0; i < sizeof sections / sizeof *sections; i++)
		if (strcmp(sections[i].name, name) == 0)
			return sections[i].read(reader, key);
	if (strchr(name, '.') != NULL)
		return reader_fail(reader, line, key, "no such key (write the part before the dot as a map of its own)");
	return read_value(reader, name, key, line, context);
}

/* ---- The file ---------------------------------------------------------------------------------------------------------- */

static opd_status check_file(int fd, const char *path, opd_error *error)
{
	struct stat info;
	if (fstat(fd, &info) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
	if (!S_ISREG(info.st_mode))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: is not a regular file", path);
	if (info.st_size > FILE_BYTES_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has %lld bytes, expected at most %u", path, (long long)info.st_size,
		                FILE_BYTES_MAX);
	return OPD_OK;
}

/* Reads at most one byte more than allowed: a file may grow after it was measured. */
static opd_status read_bytes(int fd, const char *path, char *bytes, size_t *count_out, opd_error *error)
{
	size_t count = 0;
	while (count <= FILE_BYTES_MAX) {
		ssize_t got = read(fd, bytes + count, FILE_BYTES_MAX + 1 - count);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
		if (got == 0)
			break;
		count += (size_t)got;
	}
	if (count > FILE_BYTES_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has more than %u bytes", path, FILE_BYTES_MAX);
	*count_out = count;
	return OPD_OK;
}

static opd_status load_open(struct config *config, int fd, const char *path, opd_error *error)
{
	opd_status status = check_file(fd, path, error);
	if (status != OPD_OK)
		return status;
	char *bytes = malloc(FILE_BYTES_MAX + 1);
	size_t count = 0;
	if (bytes == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	status = read_bytes(fd, path, bytes, &count, error);
	if (status == OPD_OK) {
		struct reader reader = {.path = path, .config = config, .error = error};
		status = reader_parse(&reader, bytes, count, read_top);
	}
	free(bytes);
	return status;
}

opd_status config_load(struct config *config, const char *path, opd_error *error)
{
	opd_error own;
	if (error == NULL)
		error = &own;
	char *copy = strdup(path);
	if (copy == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	free(config->path);
	config->path = copy;
	/* O_NONBLOCK: opening a FIFO must not hang a reload. */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return opd_fail(error, OPD_NOT_FOUND, "%s: %s", path, strerror(errno));
	opd_status status = load_open(config, fd, path, error);
	(void)close(fd);
	return status;
}
