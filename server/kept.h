/* A session's kept tensors: by handle, and by (request id, output) for later requests.
 *
 * Layer: server. Threads: the session's (its loop, or its direct caller); a kept_tensor's reference count is atomic.
 * Life: kept_init → kept_expect (a request that keeps something was accepted) → kept_settle or kept_fail (it ended) → kept_free… → kept_fini.
 * A handle is an index into the session's own table and a random generation: freed, forged and other sessions' handles all are NOT_FOUND.
 * A request that names a result not yet there waits: kept_wait puts a waiter on it, called once when it is settled, in the order of waiting. When a waiter itself
 * settles or fails something, its own waiters are called after it has returned. */
#ifndef OPD_SERVER_KEPT_H
#define OPD_SERVER_KEPT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/message.h"
#include "server/parts.h"
#include "server/tensors.h"

/* One tensor that stays; row-major from the start of its buffer. */
struct kept_tensor {
	_Atomic uint32_t refs;
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t bytes;
	uint64_t id; /* never reused in this daemon */
	uint64_t version;
	struct buffer *buffer;
	struct memory *memory; /* the buffer's */
	struct hold *hold;   /* published: read-only, and others have it too; NULL: not */
	struct parts *parts; /* the session's thread alone; NULL: all its bytes are there */
};

struct waiter {
	struct waiter *next;
	struct waiter **link;       /* what points to it */
	struct kept_result *result; /* that it waits for; NULL: for none */
	uint32_t output;
	/* tensor (referenced for the waiter) when it is there; NULL with error when the request failed. */
	void (*on_settled)(struct waiter *waiter, struct kept_tensor *tensor, const opd_error *error);
};

struct kept_slot {
	struct kept_tensor *tensor; /* NULL: free */
	uint64_t generation;
	uint32_t next_free;
	uint64_t request; /* whose output it is, for kept_result's count */
	uint32_t output;
	uint64_t lineage; /* its first generation: donations change the generation, not this */
	uint64_t donated_generation; /* the one before the last donation; 0: none */
	uint64_t donated_to;         /* the request */
	uint64_t lost_to;            /* the request whose kernel failed on it; 0: it is whole */
	bool giving;                 /* donated to a run that hasn't ended: nobody reads it meanwhile */
	struct kept_lend *lent;      /* to runs of graphs that have it as a state to write, and haven't ended, the last one: nobody else reads it meanwhile */
};

/* Of one such run. */
struct kept_lend {
	struct kept_lend *older, *newer; /* of the same slot */
	uint64_t request;
	uint64_t generation; /* the run's */
	uint64_t before;     /* that the slot has again when the run gives nothing away: of the run before it, or the last one that the client was told */
};

struct kept_result;

struct kept {
	uint32_t slot_count;
	uint32_t slot_room;
	uint32_t first_free; /* UINT32_MAX: none */
	uint32_t live;
	uint32_t limit;
	struct kept_slot *slots;
	struct kept_result **results; /* hash table by request id */
	uint32_t result_count;
	uint32_t result_mask;
	uint64_t seed; /* of the hash: a client that chooses its request ids must not be able to choose their buckets */
	bool telling; /* waiters are being called; results that end meanwhile queue up, so that a long chain doesn't become a deep stack */
	struct kept_result *ended_first;
	struct kept_result *ended_last;
	struct kept_result *failed_first; /* remembered failures, oldest first, bounded */
	struct kept_result *failed_last;
	uint32_t failed_count;
};

void kept_init(struct kept *kept, uint32_t limit);
/* Drops everything; waiters must be gone. */
void kept_fini(struct kept *kept);

struct kept_tensor *kept_tensor_create(opd_dtype dtype, uint32_t rank, const int64_t *shape, uint64_t bytes, struct buffer *buffer);
struct kept_tensor *kept_tensor_ref(struct kept_tensor *tensor);
void kept_tensor_unref(struct kept_tensor *tensor);
/* Its contents are about to be others, under a new version. */
void kept_tensor_changed(struct kept_tensor *tensor);

/* Room for `count` outputs of a request that keeps some; RESOURCE_EXHAUSTED at the limit. */
OPD_MUST_USE opd_status kept_expect(struct kept *kept, uint64_t request, uint32_t count, opd_error *error);
/* Its tensors (NULL: that output isn't kept), whose references pass to the table; handles_out[count] are written, but those that are there already: outputs that are
 * in a slot because they were donated to it. Calls the waiters; the caller holds the session. */
void kept_settle(struct kept *kept, uint64_t request, struct kept_tensor *const *tensors, uint32_t count, struct msg_handle *handles_out);
/* It failed: waiters and later requests get ABORTED, naming it. */
void kept_fail(struct kept *kept, uint64_t request);

/* A tensor outside of any request's results (generated ones). generation 0: at the limit, error written. */
struct msg_handle kept_add(struct kept *kept, struct kept_tensor *tensor, opd_error *error);

/* Referenced; NULL with NOT_FOUND in error, or FAILED_PRECONDITION: its upload isn't complete. */
struct kept_tensor *kept_find(struct kept *kept, struct msg_handle handle, opd_error *error);
/* The same, complete or not. */
struct kept_tensor *kept_find_any(struct kept *kept, struct msg_handle handle, opd_error *error);
/* The same by request id and output. A result that is still to come: NULL, and *pending_out is true. */
struct kept_tensor *kept_find_result(struct kept *kept, uint64_t request, uint32_t output, bool *pending_out, opd_error *error);
void kept_wait(struct kept *kept, uint64_t request, struct waiter *waiter);
/* It won't be called. False: it waits for nothing (it was called, or zeroed and never waited). Not from a waiter's callback. */
bool kept_unwait(struct waiter *waiter);

/* ---- A tensor that a graph has as its state: followed through donations by slot and lineage ---- */

/* 0: NOT_FOUND. Result: once it is there, by the handle that kept_handle gives. */
uint64_t kept_lineage(const struct kept *kept, struct msg_handle handle, opd_error *error);
struct msg_handle kept_handle(const struct kept *kept, uint64_t request, uint32_t output, opd_error *error);
/* What the slot holds now, borrowed; NULL: NOT_FOUND (freed), or DATA_LOSS. handle_out: its name now. */
struct kept_tensor *kept_follow(const struct kept *kept, uint32_t index, uint64_t lineage, struct msg_handle *handle_out, opd_error *error);
/* Donated to a single run: the handle that the slot has from now on. Until kept_given nobody reads it, not even by that. kept_take_back: the client isn't told of it, and the slot has its former handle again. */
struct msg_handle kept_give(struct kept *kept, uint32_t index, uint64_t request);
void kept_given(struct kept *kept, struct msg_handle donated);
void kept_take_back(struct kept *kept, struct msg_handle donated);
/* The same to a run of a graph, of which several may follow one another. The lend is in the run's memory until kept_returned: it has ended. Not `given`: its handle was told to nobody, and the one before it is good
 * again, here or when the runs behind it have ended as well. */
struct msg_handle kept_lend(struct kept *kept, uint32_t index, uint64_t request, struct kept_lend *lend);
void kept_returned(struct kept *kept, uint32_t index, uint64_t lineage, struct kept_lend *lend, bool given);
/* A result still to come is donated to request `to`: whoever names it from now on is refused; who waits for it already gets it. kept_unpromise: `to` has ended before it came. */
void kept_promise(struct kept *kept, uint64_t request, uint32_t output, uint64_t to);
void kept_unpromise(struct kept *kept, uint64_t request, uint32_t output, uint64_t to);
/* The slot's tensor from now on; takes the reference (dropped when the slot was freed meanwhile). */
void kept_replace(struct kept *kept, uint32_t index, uint64_t lineage, struct kept_tensor *tensor);
/* The slot of `handle` has `tensor` in place of `expected`, whose contents are the same; takes the reference. Result: the handle, or generation 0 where the slot has something
 * else by now. */
struct msg_handle kept_exchange(struct kept *kept, struct msg_handle handle, const struct kept_tensor *expected, struct kept_tensor *tensor);
/* A kernel of `request` failed while it wrote: whoever names it gets DATA_LOSS. */
void kept_lose(struct kept *kept, uint32_t index, uint64_t lineage, uint64_t request);

OPD_MUST_USE opd_status kept_free(struct kept *kept, struct msg_handle handle, opd_error *error);
OPD_MUST_USE opd_status kept_free_result(struct kept *kept, uint64_t request, uint32_t output, opd_error *error);

#endif
