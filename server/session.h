/* A session: what one connection has in the daemon. Its priorities, its kept tensors, its account, its requests in flight.
 *
 * Layer: server. Threads: its loop's, or its direct caller's between server_direct_begin and _end; references are atomic.
 * Life: session_create → requests → session_close (the connection is gone) → destroyed when its last request has ended and the last reference is dropped.
 * Not here: sockets and frames (server/conn.h), what a request does (server/request.h). */
#ifndef OPD_SERVER_SESSION_H
#define OPD_SERVER_SESSION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/message.h"
#include "server/identity.h"
#include "server/kept.h"
#include "server/priority.h"
#include "server/region.h"
#include "server/tenant.h"

struct server;
struct conn;
struct priority_map;
struct graphs;
struct device_flow;
struct lane;

struct session {
	_Atomic uint32_t refs;
	uint64_t id;
	struct server *server;
	struct conn *conn; /* NULL: closed, or not begun */
	struct tenant *tenant; /* "uid:1000", "anonymous": referenced */
	struct lane *lane;      /* where its work for the CPU runs: its tenant's */
	struct sched_flow flow; /* its place in that lane's order */
	_Atomic(struct device_flow *) device_flows; /* … of devices', made on first use */
	sched_class class;      /* of requests that name none */
	_Atomic uint32_t pinned_device; /* where requests that name none run, if what runs them is of its kind; 0: none */
	uint64_t inline_ns;     /* what ran on the loop and the lane's order doesn't know yet */
	struct access *access; /* referenced; before Hello that of nobody, of a Unix peer its own */
	struct credential credential;
	bool direct; /* handed over to a direct caller: its loop keeps its hands off */
	struct account *account;
	struct quota quota; /* of this session alone */
	struct kept kept;
	struct regions regions;
	struct priority_map *maps; /* newest first; the last one is the base */
	uint32_t map_depth;
	uint64_t priority_epoch; /* rises whenever a list changes */
	struct graphs *graphs;   /* registered ones and their runs; NULL: none yet */
	uint64_t last_request; /* highest id seen */
	uint32_t in_flight;    /* accepted, reply not yet written */
	bool explains;         /* it has asked for times: each request of its reads the clock when it comes, else one does for all that came together */
	_Atomic bool gone;     /* its connection has ended: lanes start nothing more of it */
};

/* Takes `access`, also when it fails (NULL: it fails). NULL: out of memory. */
struct session *session_create(struct server *server, struct memory *memory, uint64_t id, struct access *access, uint64_t limit_bytes, uint32_t kept_limit);
/* Before its first request: what it may do, and whose it is. Takes `access` on success. False: out of memory, nothing has changed. */
OPD_MUST_USE bool session_set_access(struct session *session, struct access *access);
/* 0: as `limits` has it. */
void session_set_quota(struct session *session, quota_kind kind, uint64_t limit);
/* Its place in the order of a device's lane (0: the CPU's); in use under that lane's lock. By its thread. NULL: out of memory. */
struct sched_flow *session_flow(struct session *session, uint32_t device);
/* The same if it is there; any thread. */
struct sched_flow *session_find_flow(const struct session *session, uint32_t device);
/* Among its tenant's sessions, on all lanes. */
void session_set_weight(struct session *session, uint32_t weight);
struct session *session_ref(struct session *session);
void session_unref(struct session *session);

/* A pushed map; a bad entry changes nothing. FAILED_PRECONDITION: nothing to pop. */
OPD_MUST_USE opd_status session_push_priority(struct session *session, const struct snapshot *snapshot, const struct msg_priority_map *map,
                                              opd_error *error);
OPD_MUST_USE opd_status session_pop_priority(struct session *session, opd_error *error);
/* Into the newest map. list not present: clear there. */
OPD_MUST_USE opd_status session_set_priority(struct session *session, const struct snapshot *snapshot, struct msg_text op,
                                             const struct msg_list *list, opd_error *error);
/* The session's list for an op, borrowed; NULL: it has none. */
/* The same in the map below all that are pushed: an administrator's word, which a pop doesn't end. */
OPD_MUST_USE opd_status session_set_base_priority(struct session *session, const struct snapshot *snapshot, struct msg_text op, const struct msg_list *list, opd_error *error);
struct plist *session_priority(const struct session *session, uint32_t op_index);

#endif
