/* Dispatch: the first implementation of the effective list that accepts the call.
 *
 * Layer: server. Threads: pure; any thread, but plans_find's short lock where an implementation has a plan.
 * The hot path: no allocation, no string comparison, no formatting (SEMANTICS 30). Reasons are asked for a second time where somebody wants them. */
#ifndef OPD_SERVER_DISPATCH_H
#define OPD_SERVER_DISPATCH_H

#include "proto/arena.h"
#include "proto/message.h"
#include "server/access.h"
#include "server/bind.h"
#include "server/plans.h"
#include "server/priority.h"

/* Plans that refused, of the implementations that were passed over: explain tells why, and by then the cache may have dropped them. Of more than these it says so too, as long as they are there. */
#define DISPATCH_REFUSALS_MAX 4u

struct dispatch_refusal {
	struct plan *plan; /* referenced */
	uint32_t index;    /* of the list */
};

struct dispatch {
	const struct snapshot *snapshot;
	const struct effective *effective;
	struct plans *plans;
	struct log *log;
	const struct access *access; /* of an identity that may not use all providers; NULL: all */
	uint32_t count; /* of the effective list that counts: a strict request doesn't see an appended native */
	uint32_t index; /* of the chosen one, or where the walk goes on */
	const struct impl *impl; /* chosen; NULL: none */
	struct plan *plan;       /* its plan, referenced; NULL: has none, or it isn't made yet */
	bool plan_missing;       /* to be made (not on a loop) before it is known whether it accepts */
	uint32_t refusal_count;
	struct dispatch_refusal refusals[DISPATCH_REFUSALS_MAX];
};

/* Starts a walk of the list, or of the one of its cases that holds for the call. FAILED_PRECONDITION: strict without any list. */
OPD_MUST_USE opd_status dispatch_init(struct dispatch *dispatch, const struct snapshot *snapshot, const struct effective *effective,
                                      struct plans *plans, struct log *log, const struct op *op, bool strict, const opd_call *call,
                                      opd_error *error);

/* Before the walk: whose it is. */
static inline void dispatch_restrict(struct dispatch *dispatch, const struct access *access)
{
	dispatch->access = access->providers == NULL ? NULL : access;
}

/* Walks on from dispatch->index. True: impl (and plan, or plan_missing) are set. False: nobody accepts. Drops the plan of a walk before. */
bool dispatch_walk(struct dispatch *dispatch, const opd_call *call);
/* Goes on behind the chosen one: its plan refused, or it failed and another may try. */
bool dispatch_next(struct dispatch *dispatch, const opd_call *call);
void dispatch_fini(struct dispatch *dispatch);

/* Whether an implementation accepts, with the reason if not. */
bool dispatch_accepts(const struct impl *impl, const struct op *op, const opd_call *call, opd_reason *reason);

/* "x f32[2,4], weight f32[4]": arguments as dtype and shape, never contents. */
void dispatch_describe(const struct op *op, const opd_call *call, char *out, size_t out_bytes);

/* Everything that was passed over before dispatch->index (all, when nobody accepts), in list order: dropped names first. In the arena; NULL out of memory. */
const struct msg_skip *dispatch_skips(const struct dispatch *dispatch, const struct op *op, const opd_call *call, struct arena *arena,
                                      uint32_t *count_out);

/* FAILED_PRECONDITION with every reason, and who has the op on the device that the call wants (a text of the protocol; empty: any) and was not on the list; skips: dispatch_skips', NULL where there was no
 * memory. */
opd_status dispatch_refused(const struct dispatch *dispatch, const struct op *op, struct msg_text wanted, const struct msg_skip *skips, uint32_t count, opd_error *error);

#endif
