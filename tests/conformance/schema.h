/* Function schemas as the conformance tool needs them: parameter names, kinds, defaults, number of results.
 *
 * Layer: tests. Threads: values. A small reader for schemas that a registry would accept; what it can't read it refuses.
 * Not here: the daemon's parser, which checks everything a module may get wrong. */
#ifndef OPD_TESTS_CONFORMANCE_SCHEMA_H
#define OPD_TESTS_CONFORMANCE_SCHEMA_H

#include "providers/provider.h"

enum { SCHEMA_PARAMS = 16, SCHEMA_RESULTS = 8, SCHEMA_NAME = 64 };

struct schema_param {
	char name[SCHEMA_NAME];
	uint32_t kind;           /* an opd_arg_kind */
	bool optional;           /* "?": may be None */
	bool has_default;
	opd_arg fallback;        /* the default; its str points at text */
	char text[SCHEMA_NAME];
};

struct schema {
	char name[SCHEMA_NAME];
	uint32_t param_count;
	uint32_t result_count;
	struct schema_param params[SCHEMA_PARAMS];
};

/* False when `text` is no schema that this reader knows. `schema_out` isn't moved afterwards (defaults point into it). */
OPD_MUST_USE bool schema_read(const char *text, struct schema *schema_out);

/* Index of a parameter; -1 when there is none of this name. */
int schema_find(const struct schema *schema, const char *name);

#endif
