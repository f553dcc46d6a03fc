/* Which device of a kind does the next job: the one that is asked for, else where its operands lie, else where it would be done first by what the op has cost there and what waits there.
 *
 * Layer: server. Threads: any; costs are atomic, and each device's queue is looked at for a few instructions.
 * Life: placement_create → placement_note whenever a device has run an op → placement_destroy.
 * A device's cost of an implementation is measured, in classes of sizes. The first run of a class isn't believed (kernels are built then, memory is taken), and nothing is believed for longer than
 * a minute: a device that was once slow is tried again. What hasn't been measured on one device is taken to cost there what it costs on the fastest of the others, so that it is tried.
 * Not here: which implementation runs (server/dispatch.h), and who is next on a device (server/scheduler.h). */
#ifndef OPD_SERVER_PLACEMENT_H
#define OPD_SERVER_PLACEMENT_H

#include <stdint.h>

#include "server/registry.h"
#include "server/scheduler.h"

struct placement;
struct server;
struct session;

/* What is to be placed. */
struct placement_wish {
	struct msg_text device;  /* that was asked for: "test", "test:1"; empty: any. One that is no device's name counts as empty */
	const char *kind;        /* of devices; NULL: what `device` says */
	const struct impl *impl; /* whose measured costs count; NULL: only what waits does */
	uint64_t bytes;          /* that it reads and writes */
	uint64_t estimate_ns;    /* where nothing was measured; 0: unknown */
	sched_class class;
	uint64_t (*home_bytes)(const void *what, uint32_t device); /* of its operands, how many lie there; NULL: none has */
	const void *what;
};

/* NULL: out of memory. */
struct placement *placement_create(void);
/* NULL is allowed. */
void placement_destroy(struct placement *placement);

/* An implementation has run on a device: reading and writing so many bytes took it so long. */
void placement_note(struct placement *placement, const struct impl *impl, uint32_t device, uint64_t bytes, uint64_t device_ns, uint64_t now_ns);
/* What that would cost there; 0: not measured lately. */
uint64_t placement_cost_ns(const struct placement *placement, const struct impl *impl, uint32_t device, uint64_t bytes, uint64_t now_ns);

/* The device's number, in the snapshot: the request's, else the session's (session.h), else as above; among equals the first. Lost ones are passed over. 0: there is none. */
uint32_t placement_choose(struct server *server, const struct snapshot *snapshot, struct session *session, const struct placement_wish *wish);

#endif
