/* Cached plans: what an implementation prepared for one set of dtypes, shapes, strides, alignments and attributes, or its refusal.
 *
 * Layer: server. Threads: any; a short lock, never held while a plan is made.
 * Bounded by entries and by the bytes that plans declare; the least recently used goes first. An entry belongs to one registry snapshot: when the registry changes, older ones fall out by age.
 * Two threads may make the same plan at once: the second one's is dropped. */
#ifndef OPD_SERVER_PLANS_H
#define OPD_SERVER_PLANS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"
#include "server/registry.h"

struct plans;

struct plan {
	_Atomic uint32_t refs;
	bool refused;
	opd_reason reason; /* of a refusal */
	opd_plan made;
	uint64_t hash;
	struct plan *next;            /* in its bucket */
	struct plan *newer, *older;   /* by use */
	uint32_t key_bytes;
	unsigned char key[];
};

OPD_MUST_USE opd_status plans_create(uint32_t entries, uint64_t bytes, struct plans **plans_out, opd_error *error);
void plans_destroy(struct plans *plans);

/* Referenced; NULL: not made yet. */
struct plan *plans_find(struct plans *plans, const struct snapshot *snapshot, const struct impl *impl, const opd_call *call);
/* Calls the implementation's plan function (it may take long: not on a loop) and keeps what came of it. OK with *plan_out referenced, a refusal included; or the plan's failure. */
OPD_MUST_USE opd_status plans_make(struct plans *plans, const struct snapshot *snapshot, const struct impl *impl, const opd_call *call,
                                   struct plan **plan_out, opd_error *error);
/* Forgets all of them; those in use live on until they aren't. Returns how many. */
uint32_t plans_trim(struct plans *plans);
void plan_unref(struct plan *plan);

#endif
