/* A result: the decoded reply, the block with its payload, and what the public functions show of it.
 *
 * Layer: client, internal. Threads: one at a time, not necessarily its client's.
 * Life: pool_take_result → reply filled in → result_bind → (public functions) → result_release. */
#ifndef OPD_CLIENT_RESULT_H
#define OPD_CLIENT_RESULT_H

#include "client/pool.h"
#include "client/scheme.h"
#include "opd/client.h"
#include "proto/arena.h"
#include "proto/message.h"

struct result_output {
	opd_tensor tensor;
	opd_handle handle;
};

struct opd_result {
	struct pool *pool;
	struct opd_result *next; /* in the pool */
	struct arena arena;      /* the decoded reply and what is derived from it */
	struct block *payload;   /* NULL: none */
	bool direct;             /* the reply's texts and tensors belong to `owner`, not to the arena */
	void *owner;
	void (*release)(void *owner);
	struct msg_reply reply;
	const char *message;
	const char *provider;
	const char *uuid;
	uint32_t output_count;
	struct result_output *outputs;
	const opd_explain *explain;
	const opd_graph_explain *graph;
};

/* A whole envelope and what the arena makes of it. */
#define RESULT_ARENA_BYTES ((size_t)64 << 20)

/* Checks the decoded reply against the payload that the frame announced, and derives the public view. `data` of payload outputs
 * stays NULL until result_place. INVALID_ARGUMENT: the reply is malformed (text says how); RESOURCE_EXHAUSTED: no memory. */
OPD_MUST_USE opd_status result_bind(opd_result *result, msg_reply_kind expected, uint64_t payload_bytes, opd_error *error);

/* The payload's block is known (its bytes may still be on their way): points the outputs into it. Takes `block`. */
void result_place(opd_result *result, struct block *block);

/* Makes a result without a reply: a failure on this side. Keeps the connection's other requests going. */
void result_set_failure(opd_result *result, const opd_error *error);

/* Copies the reply's status and message into `error` unless it is OK, and returns the status. */
opd_status result_report(const opd_result *result, opd_error *error);

/* NUL-terminated and as long-lived as the result; "" when absent or out of memory. */
const char *result_text(opd_result *result, struct msg_text text);

/* The same of a list; NULL when empty or out of memory. */
const char *const *result_texts(opd_result *result, uint32_t count, const struct msg_text *texts);

#endif
