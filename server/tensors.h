/* Tensor memory: one pooled allocator, and the ledger that every byte of it is charged to before it exists.
 *
 * Layer: server. Threads: any; a short lock for the pool, atomics for the ledger.
 * Life: memory_init → account_create… → buffer_alloc, buffer_ref, buffer_unref… → account_unref → memory_fini (asserts that the ledger is zero).
 * Buffers are 64-byte aligned and readable (not writable) to the next 64-byte boundary; those of 1 MiB and more are mapped with huge pages. A freed one is kept warm for the next
 * of its size, up to the cache limit: a fresh 64 MiB costs six times the copy into a warm one. Nothing else allocates tensor bytes. */
#ifndef OPD_SERVER_TENSORS_H
#define OPD_SERVER_TENSORS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"

/* Bytes behind a payload buffer that a read may run into (conn.c keeps the next frame's head there). */
#define BUFFER_SLACK_BYTES 512u

#define MEMORY_CLASSES 160

struct derived;

struct memory {
	_Atomic uint64_t used_bytes; /* the ledger: charged by all accounts */
	_Atomic uint64_t limit_bytes;
	uint64_t cache_limit_bytes;
	pthread_mutex_t mutex; /* of what follows */
	uint64_t cached_bytes;
	struct buffer *cached[MEMORY_CLASSES];
	struct derived *derived; /* copies made of tensors' contents (server/derived.h), which give way when the ledger is full; NULL: none. Set before there are tensors */
};

/* Who pays: a session. Outlives it while a buffer of it is in a lane. */
struct account {
	_Atomic uint32_t refs;
	_Atomic uint64_t used_bytes;
	_Atomic uint64_t limit_bytes;
	struct memory *memory;
	bool gives_way; /* it pays for derived copies: none of them are given up for others */
};

struct buffer {
	_Atomic uint32_t refs;
	uint16_t class;
	uint64_t bytes; /* usable */
	uint64_t charged_bytes;
	struct account *account;
	unsigned char *data;
	struct buffer *next; /* in the pool */
};

OPD_MUST_USE opd_status memory_init(struct memory *memory, uint64_t limit_bytes, uint64_t cache_limit_bytes, opd_error *error);
void memory_fini(struct memory *memory);

/* NULL: out of memory. */
struct account *account_create(struct memory *memory, uint64_t limit_bytes);
struct account *account_ref(struct account *account);
void account_unref(struct account *account);

/* Charges without memory (a promise for later); RESOURCE_EXHAUSTED names the limit, what is used and what was wanted. */
OPD_MUST_USE opd_status account_charge(struct account *account, uint64_t bytes, opd_error *error);
void account_release(struct account *account, uint64_t bytes);

/* Charges `bytes` and allocates at least as many, plus `slack_bytes` uncharged ones behind. Contents are whatever was there before: of any session, so every byte must be written before
 * it can be read. bytes 0 is allowed. */
OPD_MUST_USE opd_status buffer_alloc(struct account *account, uint64_t bytes, uint64_t slack_bytes, struct buffer **buffer_out, opd_error *error);
/* Another account pays from now on, whatever its limit. The caller holds a reference; one such call at a time. */
void buffer_recharge(struct buffer *buffer, struct account *account);
struct buffer *buffer_ref(struct buffer *buffer);
void buffer_unref(struct buffer *buffer);

#endif
