/* The loop over keys that attention and paged_attention share: they differ in where the keys of a sequence lie.
 *
 * Layer: providers/ops, internal to the native module. Threads: pure functions of their arguments and the job.
 * It goes over a sequence's keys once, in order, for a few query rows at a time, with the largest score so far as the softmax's
 * offset: a long context needs no memory, and a row's bits depend on that row and its keys alone. All in double, rounded once to
 * f32 and then to the result's dtype. A row that sees no key is zeros; a row whose scores hold +inf, or are all −inf, is NaN, as
 * a softmax is. Not here: who may see what beyond causal, and checks of indices (paged_attention.c). */
#ifndef OPD_PROVIDERS_OPS_ATTEND_H
#define OPD_PROVIDERS_OPS_ATTEND_H

#include "providers/ops/kernel.h"

/* Query rows that share a pass over the keys. */
enum { ATTEND_ROWS = 8 };

/* A call: query and output are rows of D, numbered (token, head); key and value rows are numbered (place, kv head). */
struct attend {
	const opd_tensor *query;
	const opd_tensor *key;
	const opd_tensor *value;
	const opd_tensor *block_table; /* NULL: the keys of sequence b are places b·keys and up */
	int64_t block_size;
	int64_t heads;
	int64_t kv_heads;
	int64_t head_size;
	double scale;
	bool causal;
};

/* Some queries of one sequence and head. */
struct attend_part {
	int64_t sequence;
	int64_t head;
	int64_t token;   /* of the first query, among all sequences */
	int64_t query;   /* the same, within its sequence */
	int64_t count;   /* up to ATTEND_ROWS */
	int64_t queries; /* of the sequence */
	int64_t keys;    /* of the sequence */
};

/* heads is a multiple of the key's heads (none of either is fine). */
OPD_MUST_USE opd_status attend_expect_heads(const opd_op *op, int64_t heads, const char *key_name, int64_t kv_heads,
                                            opd_error *error);

/* Scratch that attend_part_run needs. */
uint64_t attend_scratch_bytes(const struct attend *attend);

/* Computes a part's rows of result 0. job->context is the struct attend; the output isn't empty. Returns early when the job is
 * cancelled: run it by kernel_for_long. */
void attend_part_run(const struct kernel_job *job, const struct attend_part *part, double *scratch);

/* Estimate for `rows` queries of one head over `keys` keys. */
double attend_ns(const struct attend *attend, double rows, double keys);

/* For generators: the usual scale, and a check of two dims. */
double attend_generate_scale(int64_t head_size);
OPD_MUST_USE opd_status attend_generate_expect_heads(const opd_op *op, int64_t heads, int64_t kv_heads, opd_error *error);

/* The family's ops outside of attention.c. */
extern const opd_op paged_attention;   /* paged_attention.c */
extern const opd_op reshape_and_cache; /* cache.c */

#endif
