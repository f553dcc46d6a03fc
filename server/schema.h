/* An op's schema: PyTorch's function-schema grammar, parsed once at registration.
 *
 * Layer: server, bottom. Threads: constant once parsed.
 * Grammar: name(Type name[=default], …) -> Type | (Type, …), with the types of SCHEMA_TYPES; defaults are literals (None, integers, floats, True/False, "text", [1, 2]).
 * Keyword-only parameters (`*`), repeated names, a parameter without a default behind one that has one, and names outside [a-z_][a-z_0-9]* are errors. */
#ifndef OPD_SERVER_SCHEMA_H
#define OPD_SERVER_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/status.h"
#include "providers/provider.h"

#define SCHEMA_PARAMS_MAX 64

/* X(name, text, kind of its argument, may be None) */
#define SCHEMA_TYPES(X)                                   \
	X(TENSOR, "Tensor", OPD_ARG_TENSOR, false)            \
	X(TENSOR_OPTIONAL, "Tensor?", OPD_ARG_TENSOR, true)   \
	X(TENSORS, "Tensor[]", OPD_ARG_TENSORS, false)        \
	X(INT, "int", OPD_ARG_INT, false)                     \
	X(INT_OPTIONAL, "int?", OPD_ARG_INT, true)            \
	X(INTS, "int[]", OPD_ARG_INTS, false)                 \
	X(FLOAT, "float", OPD_ARG_FLOAT, false)               \
	X(FLOAT_OPTIONAL, "float?", OPD_ARG_FLOAT, true)      \
	X(BOOL, "bool", OPD_ARG_BOOL, false)                  \
	X(STR, "str", OPD_ARG_STR, false)

typedef enum schema_type {
#define X(name, text, kind, optional) SCHEMA_##name,
	SCHEMA_TYPES(X)
#undef X
} schema_type;

const char *schema_type_text(schema_type type);
opd_arg_kind schema_type_kind(schema_type type);
bool schema_type_optional(schema_type type);

struct schema_param {
	const char *name;
	uint32_t name_bytes;
	uint32_t hash; /* schema_hash of the name */
	schema_type type;
	bool has_default;
	opd_arg value; /* the default */
};

struct schema {
	const char *name;
	const char *text; /* canonical: one space after commas and around ->, none elsewhere */
	uint32_t param_count;
	uint32_t result_count;
	struct schema_param *params;
	schema_type *results; /* TENSOR or TENSORS */
	void *memory;         /* all of it */
};

/* INVALID_ARGUMENT: the text quotes the schema and says where it goes wrong. RESOURCE_EXHAUSTED: memory. */
OPD_MUST_USE opd_status schema_parse(const char *text, struct schema **schema_out, opd_error *error);
void schema_destroy(struct schema *schema);

/* Equal in name, parameters (name, type, default) and results; or, with fewer parameters, a prefix whose missing ones have defaults. *params_out: how many it has. */
bool schema_accepts(const struct schema *op, const struct schema *impl, uint32_t *params_out);

/* Index of a parameter; -1 when there is none. One hash, then at most one comparison of equal hashes. */
int schema_find(const struct schema *schema, const char *name, size_t bytes);

uint32_t schema_hash(const char *text, size_t bytes);

/* Equal kind and value; floats by bits. */
bool schema_arg_equal(const opd_arg *a, const opd_arg *b);

#endif
