/* What a thread that handles requests keeps for itself: the registry's snapshot, lists it has cut, requests to use again.
 *
 * Layer: server. Threads: one owner: an I/O loop, or a direct caller.
 * Life: context_init → context_snapshot, context_list… → context_fini. */
#ifndef OPD_SERVER_CONTEXT_H
#define OPD_SERVER_CONTEXT_H

#include <stdint.h>

#include "proto/message.h"
#include "server/priority.h"

struct io_loop;
struct server;
struct metrics;
struct request;

#define CONTEXT_LISTS 256

struct context {
	struct server *server;
	struct io_loop *io; /* NULL: a direct caller's */
	uint32_t loop;      /* number of the loop that takes what lanes have done for it: its own, a direct caller's is 0 */
	struct snapshot *snapshot;
	struct effective *lists[CONTEXT_LISTS]; /* of requests' own lists */
	char *list_keys[CONTEXT_LISTS];         /* the names they were cut from, each with its NUL */
	uint32_t list_key_bytes[CONTEXT_LISTS];
	struct request *free_requests;
	uint32_t free_count;
	struct metrics *metrics; /* its loop's, or that of all direct callers */
	uint64_t read_ns; /* of a loop: when the bytes that are being taken were read, by request_now_ns */
	uint64_t inline_ns; /* estimated kernel time spent on this thread in this turn */
	uint32_t inline_runs; /* of single ops on the loop: one of so many is measured */
};

void context_init(struct context *context, struct server *server);
void context_fini(struct context *context);

/* The newest snapshot, borrowed until the next call: one atomic load when nothing has changed. */
struct snapshot *context_snapshot(struct context *context);

/* The effective list of a request's own list, from a bounded cache; referenced. NOT_FOUND names an unknown provider. */
OPD_MUST_USE opd_status context_list(struct context *context, const struct snapshot *snapshot, const struct op *op, const struct msg_list *list,
                                     struct effective **effective_out, opd_error *error);

#endif
