/* What is counted while requests run: by op and provider, by kind of request, by status.
 *
 * Layer: server. Threads: a struct metrics belongs to the thread that records into it (an I/O loop), or is shared by direct callers, who pay for locked instructions; reading: any.
 * Life: metrics_create → recording → metrics_destroy. Numbers only rise.
 * Recording takes no lock and, but for the first time with an implementation, no memory: 14 ns a request for all of it (opd-bench-dispatch, 2-core Zen 4 VM).
 * Not here: what sessions, tenants and lanes have had (server/scheduler.h, server/quota.h), and how all of it is told (server/stats.h). */
#ifndef OPD_SERVER_METRICS_H
#define OPD_SERVER_METRICS_H

#include "opd/status.h"
#include "proto/message.h"
#include "providers/provider.h"
#include "server/dispatch.h"
#include "server/histogram.h"
#include "server/registry.h"

#define METRICS_STATUSES 17u
#define METRICS_REASONS 16u

/* One implementation. */
struct metrics_impl {
	tally runs;
	tally failures;
	tally on_loop;   /* of runs: those that took no lane; their time is their estimate, and in no histogram */
	tally device_ns; /* measured, with what other threads did for it */
	tally skips;     /* so often it stood in front of the one that ran and refused */
	tally reasons[METRICS_REASONS]; /* of those whose reason somebody asked for, by opd_reason_code: dispatch itself asks for none */
	struct histogram kernel;
	struct histogram wait; /* for the lane */
};

struct metrics {
	bool shared;
	tally requests[MSG_REQUEST_KINDS]; /* accepted or refused, by kind */
	tally replies[METRICS_STATUSES];
	struct histogram latency; /* from a request's envelope to the first byte of its reply on the way out */
	struct metrics_impl graphs; /* runs of graphs on the CPU lane, whole */
	_Atomic(struct metrics_impl *) impls[REGISTRY_IMPLS_MAX]; /* by impl->index; NULL: nothing yet */
};

/* NULL: out of memory. */
struct metrics *metrics_create(bool shared);
/* NULL is allowed. */
void metrics_destroy(struct metrics *metrics);

/* A kernel has run (impl NULL: a graph). */
void metrics_ran(struct metrics *metrics, const struct impl *impl, uint64_t wait_ns, uint64_t device_ns, opd_status status);
/* The same on the loop: estimated, not measured. */
void metrics_ran_on_loop(struct metrics *metrics, const struct impl *impl, uint64_t estimate_ns, opd_status status);
/* A walk went on from `from` to dispatch->index: who was passed over. */
void metrics_skipped(struct metrics *metrics, const struct dispatch *dispatch, uint32_t from);
/* The reasons of a walk, as dispatch_skips has them. NULL is allowed. */
void metrics_reasons(struct metrics *metrics, const struct dispatch *dispatch, const struct msg_skip *skips, uint32_t count);
void metrics_replied(struct metrics *metrics, msg_request_kind kind, opd_status status);
void metrics_written(struct metrics *metrics, uint64_t ns);

/* Adds what one thread's has to a sum. */
void metrics_add_impl(const struct metrics_impl *from, struct metrics_impl *sum);
void metrics_add_histogram(const struct histogram *from, struct histogram *sum);

#endif
