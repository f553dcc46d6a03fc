/* Quotas: how much of the daemon a session, or all sessions of a tenant together, may use.
 *
 * Layer: server, bottom. Threads: a session's is written by its own thread alone, a tenant's by any (locked instructions); limits and reading: any. No lock.
 * Life: zeroed memory has no limits → quota_set, quota_enter, quota_leave… Nothing is to be freed.
 * This object counts what is in flight and what was sent. The other kinds are counted where they arise, and their limits are handed on: memory by accounts (server/tensors.h),
 * queues and device time by the lanes' schedulers (server/scheduler.h), sessions by the listener. What was refused is counted here for all of them.
 * Bytes in and out are rates, as a bucket that holds one second's: whoever has paid for what came before may send anything, also more than that at once, and then waits. */
#ifndef OPD_SERVER_QUOTA_H
#define OPD_SERVER_QUOTA_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"
#include "server/histogram.h"

/* What limits may be, wherever they come from: numbers up to, device time a second from and to (0 is any). Bytes: 64 bits. */
#define QUOTA_NUMBER_MAX 1000000u
#define QUOTA_RATE_MIN_NS 1000000u
#define QUOTA_RATE_MAX_NS 1024000000000u /* as many threads as a lane may have */

typedef enum quota_kind {
	QUOTA_SESSIONS = 0,      /* open at once, of a tenant */
	QUOTA_IN_FLIGHT = 1,     /* requests accepted and not yet answered */
	QUOTA_QUEUED = 2,        /* of them, waiting for one lane */
	QUOTA_BYTES_IN = 3,      /* of requests, a second */
	QUOTA_BYTES_OUT = 4,     /* of replies, a second */
	QUOTA_MEMORY = 5,        /* tensor bytes in host memory */
	QUOTA_DEVICE_MEMORY = 6, /* tensor bytes on each device */
	QUOTA_DEVICE_TIME = 7,   /* nanoseconds a second, on each lane */
	QUOTA_COUNT = 8,
} quota_kind;

struct quota {
	_Atomic uint64_t limits[QUOTA_COUNT]; /* 0: any */
	_Atomic uint64_t refused[QUOTA_COUNT];
	tally in_flight;
	tally bytes_in; /* since the beginning */
	tally bytes_out;
	_Atomic uint64_t in_paid_ns; /* what came is paid for at this time, by the rate */
	_Atomic uint64_t out_paid_ns;
};

/* Why not. */
struct quota_refusal {
	quota_kind kind;
	bool of_tenant;
	uint64_t used;
	uint64_t limit;
	uint64_t wait_ns; /* until it may be tried again; 0: nobody knows */
};

/* "in_flight"…; NULL for a number out of range. */
const char *quota_name(uint32_t kind);
/* QUOTA_COUNT: no such name. */
quota_kind quota_parse(const char *name);

/* INVALID_ARGUMENT names the quota, the limit, and what it may be. */
OPD_MUST_USE opd_status quota_check(quota_kind kind, uint64_t limit, opd_error *error);

static inline uint64_t quota_limit(const struct quota *quota, quota_kind kind)
{
	return atomic_load_explicit(&quota->limits[kind], memory_order_relaxed);
}

/* Somebody ran into a limit of this kind. */
void quota_count_refusal(struct quota *quota, quota_kind kind);

/* A request of `bytes` that does work: it is counted as in flight, and its bytes as come, until quota_leave; or false, and only the refusal is counted. */
bool quota_enter(struct quota *session, struct quota *tenant, uint64_t bytes, uint64_t now_ns, struct quota_refusal *refusal_out);
void quota_leave(struct quota *session, struct quota *tenant);
/* A reply goes out; it is never refused, but the next request may be. */
void quota_send(struct quota *session, struct quota *tenant, uint64_t bytes, uint64_t now_ns);

#endif
