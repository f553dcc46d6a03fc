/* An op's schema as the daemon prints it, read just far enough to type the arguments of a command line.
 *
 * Layer: client/opctl. Threads: one.
 * Not here: checking a call: the daemon does that, and says it better. */
#ifndef OPCTL_SCHEMA_H
#define OPCTL_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>

#include "opd/status.h"
#include "proto/bounds.h"

typedef enum param_type {
	PARAM_UNKNOWN = 0, /* no such parameter, or a type that this build doesn't know: the value's looks decide */
	PARAM_TENSOR,
	PARAM_TENSORS,
	PARAM_INT,
	PARAM_INTS,
	PARAM_FLOAT,
	PARAM_BOOL,
	PARAM_STR,
} param_type;

struct schema_param {
	char name[BOUND_NAME_BYTES + 1];
	param_type type;
	bool optional; /* "int?": takes none */
};

struct schema {
	size_t count;
	unsigned results;
	struct schema_param params[BOUND_ARGS];
};

/* Reads "rms_norm(Tensor x, float epsilon, int? variance_size=None) -> Tensor". INVALID_ARGUMENT quotes what isn't understood. */
OPD_MUST_USE opd_status schema_parse(const char *text, struct schema *schema, opd_error *error);

/* NULL: none has that name. */
const struct schema_param *schema_find(const struct schema *schema, const char *name, size_t name_bytes);

#endif
