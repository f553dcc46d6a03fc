/* The flash-style pass over keys that attention and paged_attention share: they differ in where a sequence's keys lie.
 *
 * Layer: providers/cpu. Threads: attend_run spreads its work over the lane's threads.
 * Keys are taken in splits of ATTEND_SPLIT, those in chunks of CPU_ATTEND_KEYS, query rows in tiles of up to CPU_ATTEND_ROWS that share a
 * kv head (for a single query: those of several heads); a split's result (maximum, sum, mixed values, all f32) is joined to its neighbour's, that of both to that of the next two, and so on:
 * where a run of 2^n splits that begins at a multiple of 2^n ends. These borders stand at fixed keys, so a row's bits depend on that row and its keys alone: any such run may be computed by
 * one thread, or its halves by two.
 * Not here: kernels (kernels.h), checks of indices (the op's, before run). */
#ifndef OPD_CPU_ATTEND_H
#define OPD_CPU_ATTEND_H

#include "providers/cpu/call.h"

/* Keys whose result is computed apart from others': 32 MiB of cache (4096 keys, 8 heads of 128 in f32) make 32 items of a single query, which 16 threads share better than 16. */
#define ATTEND_SPLIT 128
/* Scratch of a thread grows with it. */
#define ATTEND_HEAD_SIZE_MAX 1024

/* One sequence: `queries` rows of tokens over `keys` keys. */
struct attend_sequence {
	const unsigned char *query; /* of its first token and head 0 */
	unsigned char *y;
	const unsigned char *key; /* of its first key; of the cache, with a block table */
	const unsigned char *value;
	uint64_t index;
	uint64_t queries;
	uint64_t keys;
};

/* A call. Distances are in bytes. */
struct attend {
	const struct cpu_kernels *kernels;
	unsigned dtype;
	uint64_t element_bytes;
	uint64_t heads, kv_heads, head_size;
	float scale;
	bool causal;
	uint64_t sequences;
	uint64_t query_token, query_head;
	uint64_t key_token, key_head, key_block;       /* key_block: only with a block table */
	uint64_t value_token, value_head, value_block; /* likewise */
	uint64_t block_size;
	const opd_tensor *block_table; /* [sequences, …]; NULL: a sequence's keys are key_token apart */
	/* Sequence `index` of the call. */
	void (*sequence)(const struct attend *attend, uint64_t index, struct attend_sequence *sequence_out);
	const opd_call *call;
};

/* f32, bf16 or f16, elements of a head next to each other, a head size that fits. */
bool attend_accept(const opd_tensor *query, const opd_tensor *key, const char *key_name, const opd_tensor *value, const char *value_name,
                   opd_reason *reason);

/* Computes result 0, which has elements. OPD_OK, OPD_CANCELLED, OPD_RESOURCE_EXHAUSTED (no scratch). */
OPD_MUST_USE opd_status attend_run(const struct attend *attend, const opd_exec *exec, opd_error *error);

/* Nanoseconds on one thread for `rows` pairs of a query and a head that see `keys` keys each, from caches of `cache_elements` elements. */
uint64_t attend_cost_ns(const struct cpu_kernels *kernels, opd_dtype dtype, double rows, double keys, double head_size,
                        double cache_elements);

#endif
