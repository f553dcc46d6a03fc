/* Memory of results: aligned blocks for payloads and the result objects themselves, kept warm for reuse.
 *
 * A fresh 64 MiB block costs more in page faults than its bytes cost to receive, so blocks that a result gives back serve the
 * next one. Results may outlive their client and may be destroyed on another thread: the pool is counted (the client holds one
 * reference, each result one) and locked.
 *
 * Layer: client, internal. Threads: any.
 * Life: pool_create → pool_take_… → pool_give_… → pool_unref. */
#ifndef OPD_CLIENT_POOL_H
#define OPD_CLIENT_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct opd_result;
struct pool;

/* `data` is 64-byte aligned and readable to the next multiple of 64 past whatever was asked for. */
struct block {
	struct block *next;
	size_t capacity;     /* bytes of data */
	size_t mapped_bytes; /* 0: from malloc */
	_Alignas(64) uint8_t data[];
};

/* NULL: out of memory. */
struct pool *pool_create(void);
void pool_unref(struct pool *pool);

/* NULL: out of memory, or more than an address space holds. Contents are whatever was there before. */
struct block *pool_take_block(struct pool *pool, uint64_t bytes);
void pool_give_block(struct pool *pool, struct block *block);

/* A result with nothing in it, an initialised arena, and a reference to the pool; NULL: out of memory. */
struct opd_result *pool_take_result(struct pool *pool);
/* Takes the result, its block (NULL: none) and its reference. */
void pool_give_result(struct pool *pool, struct opd_result *result, struct block *block);

#endif
