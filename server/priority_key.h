/* The key of a list in the configuration: an op, or `*`, or an op narrowed to a dtype, to few rows, or to both.
 *
 * Layer: server, bottom. Threads: pure.
 *     linear    linear/bf16    linear/rows<=4    linear/bf16/rows<=4
 * The dtype is that of a call's first tensor; its rows are its elements over its last extent (1 for a scalar). Which provider is fastest may change with both, which is
 * preference and so belongs in lists (SEMANTICS 11). Where several keys of an op hold for a call, the first of these does: dtype and rows, dtype, rows (fewer rows
 * before more), the op's plain list.
 * Not here: lists (priority.h). */
#ifndef OPD_SERVER_PRIORITY_KEY_H
#define OPD_SERVER_PRIORITY_KEY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/dtype.h"
#include "opd/status.h"

struct priority_key {
	size_t op_bytes;   /* of the text: the op's name */
	opd_dtype dtype;   /* OPD_DTYPE_NONE: any */
	uint64_t rows_max; /* UINT64_MAX: any */
};

/* INVALID_ARGUMENT names the part that isn't understood. Whether there is such an op is the registry's to say. */
OPD_MUST_USE opd_status priority_key_parse(const char *text, struct priority_key *key_out, opd_error *error);

static inline bool priority_key_narrow(const struct priority_key *key)
{
	return key->dtype != OPD_DTYPE_NONE || key->rows_max != UINT64_MAX;
}

/* True: a's list is asked before b's. */
bool priority_key_before(const struct priority_key *a, const struct priority_key *b);

#endif
