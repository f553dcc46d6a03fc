/* A YAML file, read by events: the schema's functions are called where a key or an item begins, so that an error names file, line and key.
 *
 * Layer: server, private to config_file.c. Threads: one reader, one thread. Errors go to reader->error, INVALID_ARGUMENT unless said otherwise. Source: YAML 1.1, read by libyaml.
 * Refused here: anchors and aliases, tags, a second document, repeated keys, NUL and broken UTF-8.
 * Not here: which keys there are (config_file.c). */
#ifndef OPD_SERVER_CONFIG_READER_H
#define OPD_SERVER_CONFIG_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <yaml.h>

#include "server/config.h"

#define READER_KEY_BYTES 192u
/* More different keys than any map of the schema has. */
#define READER_KEYS_MAX 32u

struct reader {
	const char *path;
	struct config *config;
	opd_error *error;
	yaml_parser_t parser;
	yaml_event_t event; /* the one at hand */
	bool has_event;
};

/* The keys that a map had so far. */
struct reader_seen {
	size_t count;
	char names[READER_KEYS_MAX][READER_KEY_BYTES];
};

/* Called with the item's first event at hand. `key` is the list's. */
typedef opd_status (*reader_item_fn)(struct reader *reader, const char *key, void *context);
/* Called with the value's first event at hand. `name` is the key's own, `key` its whole path. */
typedef opd_status (*reader_entry_fn)(struct reader *reader, const char *name, const char *key, size_t line, void *context);

/* Reads a whole file of `count` bytes; `top` is called for each key of the outermost map. */
OPD_MUST_USE opd_status reader_parse(struct reader *reader, const char *bytes, size_t count, reader_entry_fn top);

/* The list at hand, item by item; an empty value is an empty list. */
OPD_MUST_USE opd_status reader_list(struct reader *reader, const char *key, reader_item_fn item, void *context);
/* The map at hand, key by key; an empty value is an empty map. seen: NULL where `entry` itself finds repeated keys. */
OPD_MUST_USE opd_status reader_map(struct reader *reader, const char *prefix, struct reader_seen *seen, reader_entry_fn entry, void *context);
/* The single value at hand, borrowed until the next event; without NULs. */
OPD_MUST_USE opd_status reader_scalar(struct reader *reader, const char *key, const char *expected, const char **text_out);
/* `limits:` with everything under it commented out. */
OPD_MUST_USE bool reader_is_empty(const struct reader *reader);

/* Where the event at hand begins; from 1. */
size_t reader_line(const struct reader *reader);
/* "opd.yaml:12: limits.memory: " comes before the text. */
OPD_PRINTF(4, 5) opd_status reader_fail(struct reader *reader, size_t line, const char *key, const char *format, ...);
/* A helper that wrote into reader->error failed: its text gets its place. */
opd_status reader_place(struct reader *reader, size_t line, const char *key, opd_status status);

#endif
