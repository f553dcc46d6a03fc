/* YAML read by events, so that what isn't in the schema is refused where it begins, before anything is built from it. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "proto/text.h"
#include "server/config_reader.h"

opd_status reader_fail(struct reader *reader, size_t line, const char *key, const char *format, ...)
{
	char text[OPD_ERROR_TEXT_BYTES];
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s:%zu: %s%s%s", reader->path, line, key, key[0] != '\0' ? ": " : "", text);
}

size_t reader_line(const struct reader *reader)
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
	return reader_fail(reader, parser->problem_mark.line + 1, "", "%s%s", problem,
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
		return reader_fail(reader, reader_line(reader), "", "anchors and aliases (\"%.64s\") aren't understood here", (const char *)anchor);
	if (tag != NULL)
		return reader_fail(reader, reader_line(reader), "", "tags (\"%.64s\") aren't understood here", (const char *)tag);
	return OPD_OK;
}

/* Moves on to the next event. */
static opd_status reader_next(struct reader *reader)
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

bool reader_is_empty(const struct reader *reader)
{
	return reader->event.type == YAML_SCALAR_EVENT && reader->event.data.scalar.length == 0 &&
	       reader->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
}

/* Borrowed until the next event. NUL can't be inside: the file was searched for it, and "\0" escapes are refused here. */
opd_status reader_scalar(struct reader *reader, const char *key, const char *expected, const char **text_out)
{
	if (reader->event.type != YAML_SCALAR_EVENT || reader_is_empty(reader))
		return reader_fail(reader, reader_line(reader), key, "%s, expected %s", describe(reader), expected);
	const char *text = (const char *)reader->event.data.scalar.value;
	if (!text_valid(text, reader->event.data.scalar.length))
		return reader_fail(reader, reader_line(reader), key, "the value has a NUL or broken UTF-8 in it");
	*text_out = text;
	return OPD_OK;
}

opd_status reader_place(struct reader *reader, size_t line, const char *key, opd_status status)
{
	if (status == OPD_OK)
		return OPD_OK;
	return opd_error_prefix(reader->error, status, "%s:%zu%s%s", reader->path, line, key[0] != '\0' ? ": " : "", key);
}

/* The list at hand; `item` finds each element's first event at hand and leaves its last. */
opd_status reader_list(struct reader *reader, const char *key, reader_item_fn item, void *context)
{
	if (reader_is_empty(reader))
		return OPD_OK;
	if (reader->event.type != YAML_SEQUENCE_START_EVENT)
		return reader_fail(reader, reader_line(reader), key, "%s, expected a list", describe(reader));
	for (;;) {
		opd_status status = reader_next(reader);
		if (status != OPD_OK || reader->event.type == YAML_SEQUENCE_END_EVENT)
			return status;
		status = item(reader, key, context);
		if (status != OPD_OK)
			return status;
	}
}

static opd_status read_key(struct reader *reader, const char *prefix, struct reader_seen *seen, const char **name_out)
{
	const char *name;
	opd_status status = reader_scalar(reader, prefix, "a key", &name);
	if (status != OPD_OK)
		return status;
	if (seen == NULL || strlen(name) >= READER_KEY_BYTES) {
		*name_out = name;
		return OPD_OK;
	}
	for (size_t i = 0; i < seen->count; i++)
		if (strcmp(seen->names[i], name) == 0)
			return reader_fail(reader, reader_line(reader), prefix, "key \"%.64s\" is there twice", name);
	if (seen->count < READER_KEYS_MAX)
		(void)snprintf(seen->names[seen->count++], READER_KEY_BYTES, "%s", name);
	*name_out = name;
	return OPD_OK;
}

static opd_status read_entry(struct reader *reader, const char *prefix, struct reader_seen *seen, reader_entry_fn entry, void *context)
{
	const char *text = "";
	size_t line = reader_line(reader);
	opd_status status = read_key(reader, prefix, seen, &text);
	if (status != OPD_OK)
		return status;
	char name[READER_KEY_BYTES], key[2 * READER_KEY_BYTES];
	(void)snprintf(name, sizeof name, "%s", text);
	(void)snprintf(key, sizeof key, "%s%s%s", prefix, prefix[0] != '\0' ? "." : "", name);
	status = reader_next(reader);
	return status == OPD_OK ? entry(reader, name, key, line, context) : status;
}

opd_status reader_map(struct reader *reader, const char *prefix, struct reader_seen *seen, reader_entry_fn entry, void *context)
{
	if (reader_is_empty(reader))
		return OPD_OK;
	if (reader->event.type != YAML_MAPPING_START_EVENT)
		return reader_fail(reader, reader_line(reader), prefix, "%s, expected a map", describe(reader));
	for (;;) {
		opd_status status = reader_next(reader);
		if (status != OPD_OK || reader->event.type == YAML_MAPPING_END_EVENT)
			return status;
		status = read_entry(reader, prefix, seen, entry, context);
		if (status != OPD_OK)
			return status;
	}
}

static opd_status read_document(struct reader *reader, reader_entry_fn top)
{
	opd_status status = reader_next(reader); /* stream start */
	if (status == OPD_OK)
		status = reader_next(reader);
	if (status != OPD_OK || reader->event.type == YAML_STREAM_END_EVENT)
		return status; /* an empty file says nothing, and that is fine */
	struct reader_seen seen = {0};
	status = reader_next(reader);
	if (status == OPD_OK)
		status = reader_map(reader, "", &seen, top, NULL);
	if (status == OPD_OK)
		status = reader_next(reader); /* document end */
	if (status == OPD_OK)
		status = reader_next(reader);
	if (status == OPD_OK && reader->event.type != YAML_STREAM_END_EVENT)
		status = reader_fail(reader, reader_line(reader), "", "a second document begins, expected one");
	return status;
}

opd_status reader_parse(struct reader *reader, const char *bytes, size_t count, reader_entry_fn top)
{
	const char *nul = memchr(bytes, '\0', count);
	if (nul != NULL)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: byte %zu is NUL, expected UTF-8 text", reader->path,
		                (size_t)(nul - bytes));
	if (yaml_parser_initialize(&reader->parser) == 0)
		return opd_fail(reader->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", reader->path);
	yaml_parser_set_encoding(&reader->parser, YAML_UTF8_ENCODING);
	yaml_parser_set_input_string(&reader->parser, (const unsigned char *)bytes, count);
	opd_status status = read_document(reader, top);
	if (reader->has_event)
		yaml_event_delete(&reader->event);
	yaml_parser_delete(&reader->parser);
	return status;
}
