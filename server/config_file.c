/* The YAML file: read by events, so that what isn't in the schema is refused where it begins, before anything is built from it. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml.h>

#include "proto/text.h"
#include "server/config_internal.h"

#define FILE_BYTES_MAX (1u << 20)
#define KEY_BYTES 192u
/* More different keys than any map of the schema has; `priorities` finds its repeated ones itself. */
#define KEYS_MAX 32u

struct reader {
	const char *path;
	struct config *config;
	opd_error *error;
	yaml_parser_t parser;
	yaml_event_t event; /* the one at hand */
	bool has_event;
};

/* "opd.yaml:12: limits.memory: " comes before the text. */
OPD_PRINTF(4, 5)
static opd_status fail_at(struct reader *reader, size_t line, const char *key, const char *format, ...)
{
	char text[OPD_ERROR_TEXT_BYTES];
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s:%zu: %s%s%s", reader->path, line, key, key[0] != '\0' ? ": " : "", text);
}

static size_t line_of(const struct reader *reader)
{
	return reader->event.start_mark.line + 1;
}

static opd_status fail_parse(struct reader *reader)
{
	const yaml_parser_t *parser = &reader->parser;
	const char *problem = parser->problem != NULL ? parser->problem : "not YAML";
	if (parser->error == YAML_MEMORY_ERROR)
		return opd_fail(reader->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", reader->path);
	if (parser->error == YAML_READER_ERROR)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: byte %zu: %s, expected printable UTF-8", reader->path,
		                parser->problem_offset, problem);
	bool alias = parser->context != NULL && strstr(parser->context, "alias") != NULL;
	return fail_at(reader, parser->problem_mark.line + 1, "", "%s%s", problem,
	               alias ? " (a * must be quoted: \"*\")" : "");
}

static opd_status refuse_extras(struct reader *reader)
{
	const yaml_event_t *event = &reader->event;
	const yaml_char_t *anchor = NULL, *tag = NULL;
	if (event->type == YAML_ALIAS_EVENT) {
		anchor = event->data.alias.anchor;
	} else if (event->type == YAML_SCALAR_EVENT) {
		anchor = event->data.scalar.anchor;
		tag = event->data.scalar.tag;
	} else if (event->type == YAML_SEQUENCE_START_EVENT) {
		anchor = event->data.sequence_start.anchor;
		tag = event->data.sequence_start.tag;
	} else if (event->type == YAML_MAPPING_START_EVENT) {
		anchor = event->data.mapping_start.anchor;
		tag = event->data.mapping_start.tag;
	}
	if (anchor != NULL)
		return fail_at(reader, line_of(reader), "", "anchors and aliases (\"%.64s\") aren't understood here", (const char *)anchor);
	if (tag != NULL)
		return fail_at(reader, line_of(reader), "", "tags (\"%.64s\") aren't understood here", (const char *)tag);
	return OPD_OK;
}

/* Moves on to the next event. */
static opd_status next(struct reader *reader)
{
	if (reader->has_event)
		yaml_event_delete(&reader->event);
	reader->has_event = false;
	if (yaml_parser_parse(&reader->parser, &reader->event) == 0)
		return fail_parse(reader);
	reader->has_event = true;
	return refuse_extras(reader);
}

static const char *describe(const struct reader *reader)
{
	switch (reader->event.type) {
	case YAML_SCALAR_EVENT:
		return reader->event.data.scalar.length == 0 ? "nothing" : "a single value";
	case YAML_SEQUENCE_START_EVENT:
		return "a list";
	case YAML_MAPPING_START_EVENT:
		return "a map";
	default:
		return "nothing";
	}
}

/* `limits:` with everything under it commented out. */
static bool is_empty(const struct reader *reader)
{
	return reader->event.type == YAML_SCALAR_EVENT && reader->event.data.scalar.length == 0 &&
	       reader->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
}

/* Borrowed until the next event. NUL can't be inside: the file was searched for it, and "\0" escapes are refused here. */
static opd_status scalar(struct reader *reader, const char *key, const char *expected, const char **text_out)
{
	if (reader->event.type != YAML_SCALAR_EVENT || is_empty(reader))
		return fail_at(reader, line_of(reader), key, "%s, expected %s", describe(reader), expected);
	const char *text = (const char *)reader->event.data.scalar.value;
	if (!text_valid(text, reader->event.data.scalar.length))
		return fail_at(reader, line_of(reader), key, "the value has a NUL or broken UTF-8 in it");
	*text_out = text;
	return OPD_OK;
}

/* A helper's failure gets its place; helpers write into reader->error. */
static opd_status place(struct reader *reader, size_t line, const char *key, opd_status status)
{
	if (status == OPD_OK)
		return OPD_OK;
	return opd_error_prefix(reader->error, status, "%s:%zu%s%s", reader->path, line, key[0] != '\0' ? ": " : "", key);
}

typedef opd_status (*item_fn)(struct reader *reader, const char *key, void *context);

/* The list at hand; `item` finds each element's first event at hand and leaves its last. */
static opd_status read_list(struct reader *reader, const char *key, item_fn item, void *context)
{
	if (is_empty(reader))
		return OPD_OK;
	if (reader->event.type != YAML_SEQUENCE_START_EVENT)
		return fail_at(reader, line_of(reader), key, "%s, expected a list", describe(reader));
	for (;;) {
		opd_status status = next(reader);
		if (status != OPD_OK || reader->event.type == YAML_SEQUENCE_END_EVENT)
			return status;
		status = item(reader, key, context);
		if (status != OPD_OK)
			return status;
	}
}

/* Called with the value's first event at hand. `name` is the key's own, `key` its whole path. */
typedef opd_status (*entry_fn)(struct reader *reader, const char *name, const char *key, size_t line, void *context);

struct seen {
	size_t count;
	char names[KEYS_MAX][KEY_BYTES];
};

static opd_status read_key(struct reader *reader, const char *prefix, struct seen *seen, const char **name_out)
{
	const char *name;
	opd_status status = scalar(reader, prefix, "a key", &name);
	if (status != OPD_OK)
		return status;
	if (seen == NULL || strlen(name) >= KEY_BYTES) {
		*name_out = name;
		return OPD_OK;
	}
	for (size_t i = 0; i < seen->count; i++)
		if (strcmp(seen->names[i], name) == 0)
			return fail_at(reader, line_of(reader), prefix, "key \"%.64s\" is there twice", name);
	if (seen->count < KEYS_MAX)
		(void)snprintf(seen->names[seen->count++], KEY_BYTES, "%s", name);
	*name_out = name;
	return OPD_OK;
}

static opd_status read_entry(struct reader *reader, const char *prefix, struct seen *seen, entry_fn entry, void *context)
{
	const char *text = "";
	size_t line = line_of(reader);
	opd_status status = read_key(reader, prefix, seen, &text);
	if (status != OPD_OK)
		return status;
	char name[KEY_BYTES], key[2 * KEY_BYTES];
	(void)snprintf(name, sizeof name, "%s", text);
	(void)snprintf(key, sizeof key, "%s%s%s", prefix, prefix[0] != '\0' ? "." : "", name);
	status = next(reader);
	return status == OPD_OK ? entry(reader, name, key, line, context) : status;
}

/* The map at hand. seen: NULL where `entry` itself finds repeated keys. */
static opd_status read_map(struct reader *reader, const char *prefix, struct seen *seen, entry_fn entry, void *context)
{
	if (is_empty(reader))
		return OPD_OK;
	if (reader->event.type != YAML_MAPPING_START_EVENT)
		return fail_at(reader, line_of(reader), prefix, "%s, expected a map", describe(reader));
	for (;;) {
		opd_status status = next(reader);
		if (status != OPD_OK || reader->event.type == YAML_MAPPING_END_EVENT)
			return status;
		status = read_entry(reader, prefix, seen, entry, context);
		if (status != OPD_OK)
			return status;
	}
}

/* ---- The schema -------------------------------------------------------------------------------------------------------- */

static opd_status read_value(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)name;
	(void)context;
	const struct config_key *known = config_key_find(key);
	if (known == NULL)
		return fail_at(reader, line, key, "no such key");
	const char *text;
	opd_status status = scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	line = line_of(reader);
	status = config_set(reader->config, key, text, reader->error);
	return place(reader, line, "", status);
}

static opd_status read_listener(struct reader *reader, const char *key, void *context)
{
	(void)context;
	const char *text;
	opd_status status = scalar(reader, key, "an address such as unix:/run/opd/opd.sock", &text);
	if (status != OPD_OK)
		return status;
	return place(reader, line_of(reader), key, config_add_listener(reader->config, text, reader->error));
}

static opd_status read_provider(struct reader *reader, const char *key, void *context)
{
	const char *text;
	opd_status status = scalar(reader, key, "a provider's name", &text);
	if (status != OPD_OK)
		return status;
	return place(reader, line_of(reader), key, config_append_provider(context, text, reader->error));
}

static opd_status read_priority(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config *config = reader->config;
	for (size_t i = 0; i < config->priority_count; i++)
		if (config->priorities[i].line != 0 && strcmp(config->priorities[i].op, name) == 0)
			return fail_at(reader, line, key, "there already, in line %u", config->priorities[i].line);
	struct config_priority *priority;
	opd_status status = config_begin_priority(config, name, (unsigned)line, &priority, reader->error);
	if (status != OPD_OK)
		return place(reader, line, key, status);
	if (is_empty(reader))
		return fail_at(reader, line, key, "nothing, expected a list of providers ([] for an empty one)");
	return read_list(reader, key, read_provider, priority);
}

struct module_texts {
	char *name;
	char *path;
	bool isolated;
};

static opd_status read_module_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	struct module_texts *texts = context;
	char **field = strcmp(name, "name") == 0 ? &texts->name : strcmp(name, "path") == 0 ? &texts->path : NULL;
	const bool isolated = strcmp(name, "isolated") == 0;
	if (field == NULL && !isolated)
		return fail_at(reader, line, key, "no such key, expected name, path or isolated");
	const char *text;
	opd_status status = scalar(reader, key, "a text", &text);
	if (status != OPD_OK)
		return status;
	if (isolated && strcmp(text, "true") != 0 && strcmp(text, "false") != 0)
		return fail_at(reader, line_of(reader), key, "\"%.64s\", expected true or false", text);
	if (isolated) {
		texts->isolated = text[0] == 't';
		return OPD_OK;
	}
	*field = strdup(text);
	return *field != NULL ? OPD_OK : opd_fail(reader->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", reader->path);
}

static opd_status add_module(struct reader *reader, const char *key, size_t line, const struct module_texts *texts)
{
	if (texts->path == NULL)
		return fail_at(reader, line, key, "a module without a path");
	opd_status status = config_append_module(reader->config, texts->name, texts->path, texts->isolated, (unsigned)line, reader->error);
	return place(reader, line, key, status);
}

static opd_status read_module(struct reader *reader, const char *key, void *context)
{
	(void)context;
	size_t line = line_of(reader);
	const char *path;
	if (reader->event.type == YAML_SCALAR_EVENT) {
		opd_status status = scalar(reader, key, "a path", &path);
		if (status != OPD_OK)
			return status;
		return place(reader, line, key, config_append_module(reader->config, NULL, path, false, (unsigned)line, reader->error));
	}
	struct module_texts texts = {0};
	struct seen seen = {0};
	opd_status status = read_map(reader, key, &seen, read_module_key, &texts);
	if (status == OPD_OK)
		status = add_module(reader, key, line, &texts);
	free(texts.name);
	free(texts.path);
	return status;
}

static opd_status read_tenant_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	const char *text;
	opd_status status = scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	status = config_set_tenant(context, name, text, reader->error);
	if (status == OPD_OK)
		status = config_note_tenant(context, name, text, reader->error);
	if (status == OPD_NOT_FOUND)
		return fail_at(reader, line, key, "no such key, expected weight, class, class_max or a quota: sessions, in_flight, queued, bytes_in, bytes_out, memory, device_memory, device_time, "
		               "or session_ and one of the last seven");
	return place(reader, line_of(reader), key, status);
}

static opd_status read_tenant(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_tenant *tenant;
	struct seen seen = {0};
	opd_status status = config_begin_tenant(reader->config, name, (unsigned)line, &tenant, reader->error);
	if (status != OPD_OK)
		return place(reader, line, key, status);
	status = read_map(reader, key, &seen, read_tenant_key, tenant);
	if (status == OPD_OK && tenant->policy.class < tenant->policy.class_max)
		return fail_at(reader, line, key, "class %s, expected one no more urgent than class_max %s", sched_class_name(tenant->policy.class),
		               sched_class_name(tenant->policy.class_max));
	return status;
}

static opd_status read_provider_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	const char *text;
	opd_status status = scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	status = config_set_provider(context, name, text, reader->error);
	if (status == OPD_NOT_FOUND)
		return fail_at(reader, line, key, "no such key, expected checked, budget, compare or compare_every");
	return place(reader, line_of(reader), key, status);
}

static opd_status read_trust(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_provider *provider;
	struct seen seen = {0};
	opd_status status = config_begin_provider(reader->config, name, (unsigned)line, &provider, reader->error);
	if (status != OPD_OK)
		return place(reader, line, key, status);
	return read_map(reader, key, &seen, read_provider_key, provider);
}

struct identity_list {
	struct config_identity *identity;
	const char *name;
};

static opd_status read_identity_item(struct reader *reader, const char *key, void *context)
{
	const struct identity_list *list = context;
	const char *text;
	opd_status status = scalar(reader, key, "a name", &text);
	if (status != OPD_OK)
		return status;
	return place(reader, line_of(reader), key, config_add_to_identity(list->identity, list->name, text, reader->error));
}

static opd_status read_identity_key(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	struct identity_list list = {context, name};
	opd_status status = config_add_to_identity(context, name, NULL, reader->error);
	if (status == OPD_OK && is_empty(reader))
		return fail_at(reader, line, key, "nothing, expected a list ([] for an empty one)");
	if (status != OPD_NOT_FOUND)
		return status == OPD_OK ? read_list(reader, key, read_identity_item, &list) : place(reader, line, key, status);
	const char *text;
	status = scalar(reader, key, "a single value", &text);
	if (status != OPD_OK)
		return status;
	status = config_set_identity(context, name, text, reader->error);
	if (status == OPD_NOT_FOUND)
		return fail_at(reader, line, key, "no such key, expected certificate, uid, gid, tenant, rights, ops, providers or classes");
	return place(reader, line_of(reader), key, status);
}

static opd_status read_identity(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	(void)context;
	struct config_identity *identity;
	struct seen seen = {0};
	opd_status status = config_begin_identity(reader->config, name, (unsigned)line, &identity, reader->error);
	if (status != OPD_OK)
		return place(reader, line, key, status);
	return read_map(reader, key, &seen, read_identity_key, identity);
}

static opd_status read_top(struct reader *reader, const char *name, const char *key, size_t line, void *context)
{
	struct seen seen = {0};
	if (strcmp(name, "listen") == 0)
		return read_list(reader, key, read_listener, NULL);
	if (strcmp(name, "modules") == 0)
		return read_list(reader, key, read_module, NULL);
	if (strcmp(name, "priorities") == 0) {
		config_clear_priorities(reader->config); /* the file's lists replace the built-in one */
		return read_map(reader, key, NULL, read_priority, NULL);
	}
	if (strcmp(name, "tenants") == 0)
		return read_map(reader, key, NULL, read_tenant, NULL);
	if (strcmp(name, "identities") == 0)
		return read_map(reader, key, NULL, read_identity, NULL);
	if (strcmp(name, "providers") == 0)
		return read_map(reader, key, NULL, read_trust, NULL);
	if (strcmp(name, "limits") == 0 || strcmp(name, "log") == 0 || strcmp(name, "polling") == 0 || strcmp(name, "quarantine") == 0 || strcmp(name, "tls") == 0 ||
	    strcmp(name, "differential") == 0)
		return read_map(reader, key, &seen, read_value, NULL);
	if (strchr(name, '.') != NULL)
		return fail_at(reader, line, key, "no such key (write the part before the dot as a map of its own)");
	return read_value(reader, name, key, line, context);
}

/* ---- The file ---------------------------------------------------------------------------------------------------------- */

static opd_status read_document(struct reader *reader)
{
	opd_status status = next(reader); /* stream start */
	if (status == OPD_OK)
		status = next(reader);
	if (status != OPD_OK || reader->event.type == YAML_STREAM_END_EVENT)
		return status; /* an empty file says nothing, and that is fine */
	struct seen seen = {0};
	status = next(reader);
	if (status == OPD_OK)
		status = read_map(reader, "", &seen, read_top, NULL);
	if (status == OPD_OK)
		status = next(reader); /* document end */
	if (status == OPD_OK)
		status = next(reader);
	if (status == OPD_OK && reader->event.type != YAML_STREAM_END_EVENT)
		status = fail_at(reader, line_of(reader), "", "a second document begins, expected one");
	return status;
}

static opd_status parse(struct reader *reader, const char *bytes, size_t count)
{
	const char *nul = memchr(bytes, '\0', count);
	if (nul != NULL)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: byte %zu is NUL, expected UTF-8 text", reader->path,
		                (size_t)(nul - bytes));
	if (yaml_parser_initialize(&reader->parser) == 0)
		return opd_fail(reader->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", reader->path);
	yaml_parser_set_encoding(&reader->parser, YAML_UTF8_ENCODING);
	yaml_parser_set_input_string(&reader->parser, (const unsigned char *)bytes, count);
	opd_status status = read_document(reader);
	if (reader->has_event)
		yaml_event_delete(&reader->event);
	yaml_parser_delete(&reader->parser);
	return status;
}

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
		status = parse(&reader, bytes, count);
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
