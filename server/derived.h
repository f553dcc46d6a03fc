/* Derived copies: what implementations made of kept tensors' contents (packed weights), kept for later runs in a bounded cache.
 *
 * Layer: server, beside tensors. Threads: any; a short lock for the table, never held while a copy is made, read, allocated or freed.
 * Life: derived_create → for each kernel: a zeroed struct derived_run, derived_find, derived_make, derived_keep, derived_end → derived_destroy, when no kernel runs.
 * A copy is of one module's making, of the contents of one tensor (id, version) in one view, and of one key of the module's. It is dropped when those contents end
 * (derived_forget, before the tensor's memory goes back to the pool), when the ledger runs into its ceiling, and for newer ones; never under a run that was given it: that
 * one's end frees it then. Ids are never reused and one session's alone until a tensor is published: so sessions share copies of published tensors, and of no others.
 * A copy is made when its contents come for the second time, so that what is used once isn't packed. When there is no room, the least recently used go, but only those that weren't
 * used since the newcomer came last: weights of a model that doesn't fit are then packed in part and stay so, where plain LRU would pack all of them again in every pass.
 * Charged to the daemon's ledger, to no session: each may cause copies of what it has, and all are given up when a session needs the memory.
 * Not here: what is in a copy (the modules), contents themselves (server/kept.h). */
#ifndef OPD_SERVER_DERIVED_H
#define OPD_SERVER_DERIVED_H

#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"

struct derived;
struct derived_copy;
struct memory;

/* The copies that a running kernel was given. */
struct derived_run {
	uint32_t count;
	struct derived_copy *copies[OPD_DERIVED_RUN_MAX];
};

struct derived_statistics {
	uint64_t copies;
	uint64_t bytes;
	uint64_t found; /* since the start: runs that were given a copy that was there */
	uint64_t made;
};

/* Becomes the memory's own: kept tensors that end are forgotten by it, and it gives way when the ledger is full. limit_bytes 0: no copies. */
OPD_MUST_USE opd_status derived_create(struct memory *memory, uint64_t limit_bytes, struct derived **derived_out, opd_error *error);
/* NULL is allowed. */
void derived_destroy(struct derived *derived);
void derived_set_limit(struct derived *derived, uint64_t limit_bytes);

/* A finished copy, until derived_end; NULL: none. owner: the module. derived NULL: there are none. */
const void *derived_find(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, const void *key, uint32_t key_bytes);
/* Memory for one, 64-byte aligned, until derived_end; NULL: not now. Nobody finds it before derived_keep. */
void *derived_make(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, const void *key, uint32_t key_bytes,
                   uint64_t bytes);
/* A copy that lies elsewhere, in memory of its maker's: charged and dropped like others, and then `release`d, from any thread. derived_find and derived_keep have it for the copy's memory. */
struct derived_own {
	void (*release)(struct derived_own *own);
};

/* False: not now, and `own` is still the caller's. Else it is released with the copy, or at the run's end unless it was kept. */
OPD_MUST_USE bool derived_make_own(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, uint64_t bytes, struct derived_own *own);
/* `memory`, which derived_make gave to this run, is filled in. */
void derived_keep(struct derived *derived, const struct derived_run *run, const void *memory);
/* The kernel has returned. run NULL is allowed, as in the others. */
void derived_end(struct derived *derived, struct derived_run *run);

/* The contents of tensor `id` up to `version` end: nobody reads them any more. derived NULL is allowed. One relaxed load when there is no copy. */
void derived_forget(struct derived *derived, uint64_t id, uint64_t version);
/* Frees copies that no run has, the least recently used first, until at least `bytes` are free; how many are. */
uint64_t derived_reclaim(struct derived *derived, uint64_t bytes);
void derived_count(struct derived *derived, struct derived_statistics *out);

#endif
