/* Index operands (ids, positions, slots, block tables): checks of their contents, and what generators of them need.
 *
 * Layer: providers/ops, internal to the native module. Threads: pure functions of their arguments.
 * A dimension of stride 0 repeats its elements and is read once, however long a client says it is. Others may overlap, so that a few bytes are many elements: checks look at
 * whether they are cancelled (opd_op.check_long), and the host counts the elements when it estimates. Not here: dtypes and shapes of index operands (kernel.h). */
#ifndef OPD_PROVIDERS_OPS_INDEX_H
#define OPD_PROVIDERS_OPS_INDEX_H

#include "providers/ops/kernel.h"

/* An opd_op.check for ops with a check_long: that, of which nobody can cancel. */
OPD_MUST_USE opd_status index_check_op(const opd_op *op, const opd_call *call, opd_error *error);

/* A check under way. */
struct index_reader {
	const opd_op *op;
	const opd_exec *exec; /* NULL: never cancelled */
	int64_t unasked;      /* elements read since it asked whether it is */
};

/* So many elements more are about to be read. OPD_OK, or OPD_CANCELLED. */
OPD_MUST_USE opd_status index_ask(struct index_reader *reader, int64_t elements, opd_error *error);

/* *at_out: the first element of the line (i32 or i64) outside [low, limit); its extent where there is none. OPD_OK, or OPD_CANCELLED. */
OPD_MUST_USE opd_status index_scan(struct index_reader *reader, const struct kernel_line *line, int64_t low, int64_t limit, int64_t *at_out, opd_error *error);

/* OPD_OK when every element of `indices` (i32 or i64, any shape and strides, in host memory) lies in [low, limit); OPD_CANCELLED; else
 * OPD_INVALID_ARGUMENT, naming the first that doesn't, as "embedding: ids[0, 3] is 50, expected 0 to 49 (rows of table)". `why`:
 * what the limit is. low INT64_MIN: any negative value is fine. */
OPD_MUST_USE opd_status index_check(const opd_op *op, const opd_exec *exec, const char *name, const opd_tensor *indices, int64_t low, int64_t limit,
                                    const char *why, opd_error *error);

/* The failure of index_check for one element: value `value` at `position` ([rank] coordinates). */
OPD_MUST_USE opd_status index_invalid(const opd_op *op, const char *name, uint32_t rank, const int64_t *position, int64_t value,
                                      int64_t low, int64_t limit, const char *why, opd_error *error);

/* a·b, or INT64_MAX where that is less: slots of caches that have no bytes may be more than a number holds. Both at least 0. */
int64_t index_multiply(int64_t a, int64_t b);

/* Element number `at` of contiguous i32 or i64 memory. */
void index_set(void *memory, opd_dtype dtype, int64_t at, int64_t value);
int64_t index_get(const void *memory, opd_dtype dtype, int64_t at);

/* Writes `count` random integers of [0, limit); limit at least 1. */
void index_generate(opd_generator *generator, void *memory, opd_dtype dtype, int64_t count, int64_t limit);

/* A walk that visits [0, count) in a scattered order, each once. */
struct index_scatter {
	int64_t count;
	int64_t step; /* has no divisor in common with count */
	int64_t next;
};
/* count up to 2^61. 0: nothing to visit, never call next. */
struct index_scatter index_scatter_begin(opd_generator *generator, int64_t count);
int64_t index_scatter_next(struct index_scatter *scatter);

#endif
