/* Tensor memory: one pooled allocator, and the ledger that every byte of it is charged to before it exists.
 *
 * Layer: server. Threads: any; a short lock for the pool, atomics for the ledger. Of a device's memory buffer_alloc and memory_trim belong to its lane's thread; what is given back
 * is only cached, so that buffer_unref may be called by anybody.
 * Life: memory_init → account_create… → buffer_alloc, buffer_ref, buffer_unref… → account_unref → memory_fini (asserts that the ledger is zero).
 * Buffers are 64-byte aligned and readable (not writable) to the next 64-byte boundary; those of 1 MiB and more are mapped with huge pages. A freed one is kept warm for the next
 * of its size, up to the cache limit: a fresh 64 MiB costs six times the copy into a warm one. Nothing else allocates tensor bytes.
 * A device's memory is a struct memory of its own, with the same pool and ledger over the backend's alloc and free; what sessions have there is charged to sub-accounts of theirs. A
 * buffer may have *mirrors*: buffers with the same bytes in other memories, made when somebody there must read them and dropped with the buffer or when it is written. Mirrors are a
 * cache: a device that is full drops those that nobody uses, the one unused for longest first. */
#ifndef OPD_SERVER_TENSORS_H
#define OPD_SERVER_TENSORS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"
#include "proto/latch.h"

/* Bytes behind a payload buffer that a read may run into (conn.c keeps the next frame's head there). */
#define BUFFER_SLACK_BYTES 512u

#define MEMORY_CLASSES 160

/* Where a device's memory comes from; called on its lane's thread. alloc: RESOURCE_EXHAUSTED when there is none. */
struct memory_source {
	opd_status (*alloc)(void *context, uint64_t bytes, void **memory_out, opd_error *error);
	void (*free)(void *context, void *memory);
	void *context;
};
struct derived;

struct memory {
	uint32_t device;  /* the host's number of it; 0: host memory */
	const char *name; /* for texts */
	struct memory_source source; /* of a device */
	_Atomic bool lost;           /* the device is: what lies there can't be read any more */
	_Atomic uint32_t epoch;      /* of a device: rises when it was reset, and what was allocated before is gone */
	_Atomic uint64_t used_bytes; /* the ledger: charged by all accounts */
	_Atomic uint64_t limit_bytes;
	uint64_t cache_limit_bytes;
	_Atomic uint64_t mapped_from; /* bytes: from here on a buffer has pages of its own */
	struct latch latch; /* of what follows */
	uint64_t cached_bytes;
	struct buffer *cached[MEMORY_CLASSES];
	struct buffer *mirrors_first; /* in this memory, unused for longest first; under the lock of all mirrors */
	struct buffer *mirrors_last;
	struct derived *derived; /* copies made of tensors' contents (server/derived.h), which give way when the ledger is full; NULL: none. Set before there are tensors */
};

/* Who pays: a session. Outlives it while a buffer of it is in a lane. */
struct account {
	_Atomic uint32_t refs; /* a device's: the parent's count */
	_Atomic uint64_t used_bytes;
	_Atomic uint64_t limit_bytes;
	_Atomic uint64_t device_limit_bytes; /* on each device; 0: any */
	_Atomic uint64_t refused; /* charges, for a limit of its own */
	char *name;               /* for texts; NULL: "session" */
	struct account *above;    /* the tenant's, to which all that is charged here is charged too: referenced; of a device's, borrowed from the parent's. NULL: none */
	struct memory *memory;
	struct account *parent; /* of one for a device's memory: the session's */
	_Atomic(struct account *) devices; /* for devices' memories; they live as long as this one */
	struct account *next;
	bool gives_way; /* it pays for derived copies: none of them are given up for others */
};

struct buffer {
	_Atomic uint32_t refs;
	uint16_t class;
	uint32_t device; /* 0: host memory */
	uint32_t epoch;  /* the memory's, when it was allocated */
	bool mapped;     /* alone in its pages, known to server/pins.h */
	_Atomic bool failed;     /* on a device: what was to write it has failed, and others were told before that it is there (device_writes) */
	_Atomic uint32_t in_jobs; /* on a device: of `refs`, those of jobs on its stream: what comes behind them there is in nobody's way */
	uint64_t version; /* on a device: of its bytes, another one each time that work which changes them is enqueued (device_changes); whoever has the lane's */
	struct memory *memory; /* where it lies, whoever pays */
	uint64_t bytes; /* usable */
	uint64_t charged_bytes;
	struct account *account;
	unsigned char *data; /* on a device: the backend's base, never to be touched */
	struct buffer *next; /* in the pool */
	/* Under the lock of all mirrors. */
	struct buffer *mirrors; /* of this one */
	struct buffer *sibling;
	struct buffer *mirror_of;
	struct buffer *older, *newer; /* in memory.mirrors_first… */
};

void memory_init(struct memory *memory, uint64_t limit_bytes, uint64_t cache_limit_bytes);
/* A device's memory, of at most limit_bytes; `name` is borrowed. */
void memory_init_device(struct memory *memory, uint32_t device, const char *name, uint64_t limit_bytes, struct memory_source source);
void memory_fini(struct memory *memory);
/* There are devices: smaller buffers too get pages of their own from now on, which a driver can lock (server/pins.h). */
void memory_map_small(struct memory *memory);
/* Bytes that are free and kept for whoever comes next. */
uint64_t memory_cached_bytes(struct memory *memory);
/* Gives back what is only cached; false: nothing was. */
bool memory_trim(struct memory *memory);
/* The device was reset: nothing of what was allocated before is there any more, cached or not. On its lane's thread. */
void memory_forget(struct memory *memory);
/* Drops the mirror there that was unused for longest; false: every one is in use. */
bool memory_evict(struct memory *memory);

/* NULL: out of memory. */
struct account *account_create(struct memory *memory, uint64_t limit_bytes);
/* For texts. False: out of memory. */
OPD_MUST_USE bool account_name(struct account *account, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* All that it will have counts there too. Before anything is charged to it. */
void account_set_above(struct account *account, struct account *above);
/* device_bytes: on each device; 0: any. What is above a new limit already stays. */
void account_set_limits(struct account *account, uint64_t bytes, uint64_t device_bytes);
struct account *account_ref(struct account *account);
void account_unref(struct account *account);
/* The account's own for a device's memory, made when it is first asked for; borrowed. NULL: out of memory. */
struct account *account_on(struct account *account, struct memory *memory);
/* Who pays for a buffer: never a sub-account. */
struct account *buffer_payer(const struct buffer *buffer);

/* Charges without memory (a promise for later); RESOURCE_EXHAUSTED names whose limit it is, what is used and what was wanted. */
OPD_MUST_USE opd_status account_charge(struct account *account, uint64_t bytes, opd_error *error);
void account_release(struct account *account, uint64_t bytes);

/* Charges `bytes` and allocates at least as many, plus `slack_bytes` uncharged ones behind. Contents are whatever was there before: of any session, so every byte must be written before
 * it can be read. bytes 0 is allowed. */
OPD_MUST_USE opd_status buffer_alloc(struct account *account, uint64_t bytes, uint64_t slack_bytes, struct buffer **buffer_out, opd_error *error);
/* Another account pays from now on, whatever its limit. The caller holds a reference; one such call at a time. */
void buffer_recharge(struct buffer *buffer, struct account *account);
struct buffer *buffer_ref(struct buffer *buffer);
void buffer_unref(struct buffer *buffer);
/* It lies on a device that is lost, or was reset since, or what was to write it has failed. */
bool buffer_lost(const struct buffer *buffer);
/* "it lay on cuda:0, …": why one is lost. */
const char *buffer_lost_why(const struct buffer *buffer);
/* Of a device: whether somebody has it beside its only owner and the jobs that are on the device's stream. */
bool buffer_shared(const struct buffer *buffer);

/* The buffer itself, or its mirror, in that device's memory (0: the host's); referenced. NULL: it has none there. */
struct buffer *buffer_on(struct buffer *buffer, uint32_t device);
bool buffer_is_on(const struct buffer *buffer, uint32_t device);
/* `mirror` holds the same bytes from now on; takes a reference. Nothing happens if there is one in that memory. */
void buffer_add_mirror(struct buffer *buffer, struct buffer *mirror);
/* The bytes change, or the mirror has turned out to be wrong (NULL: all of them). */
void buffer_drop_mirrors(struct buffer *buffer, const struct buffer *mirror);

#endif
