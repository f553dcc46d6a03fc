/* A request being built: the message with everything copied but host tensors, and its encoded form, which is kept for the
 * next submit.
 *
 * Layer: client, internal. Threads: those of its owner, one at a time (submitting it may encode it anew).
 * Life: opd_request_create → opd_request_… → request_prepare → pieces and envelope read → opd_request_destroy. */
#ifndef OPD_CLIENT_REQUEST_H
#define OPD_CLIENT_REQUEST_H

#include <sys/uio.h>

#include "opd/client.h"
#include "proto/arena.h"
#include "proto/codec.h"
#include "proto/message.h"

/* Bytes of the caller's that go with the request; `tensor` is theirs in the message. */
struct request_host {
	struct msg_tensor *tensor;
	const uint8_t *data;
	uint64_t bytes;
};

typedef enum request_form {
	REQUEST_UNPREPARED = 0,
	REQUEST_WIRE,   /* encoded, host tensors are payload ranges */
	REQUEST_DIRECT, /* host tensors are inline, nothing is encoded */
} request_form;

struct opd_request {
	struct arena arena;   /* everything that was copied */
	struct arena encoded; /* envelope and pieces of the prepared form */
	opd_error error;      /* the first thing that went wrong, for submit */
	msg_request_kind kind;      /* RUN; or UPLOAD, WRITE, FETCH, whose tensor is the run's only argument */
	struct msg_request message; /* a run */
	struct msg_request other;   /* what goes out of another kind */
	struct msg_handle handle;   /* WRITE */
	uint64_t offset;
	uint32_t arg_capacity;
	uint32_t output_capacity;
	struct msg_output_option *outputs;
	struct request_host *hosts; /* in the payload's order */
	size_t host_count;
	size_t host_capacity;
	const opd_graph *once; /* the graph that it runs; NULL: a registered one, or an op */
	opd_result *owned; /* whose memory host tensors lie in; NULL: the caller's */
	request_form form;
	struct codec_buffer envelope;
	struct iovec *pieces; /* the payload, gaps included */
	size_t piece_count;
	uint64_t payload_bytes;
};

/* Brings the request into `form` unless it is. The builder's remembered error comes out here. */
OPD_MUST_USE opd_status request_prepare(opd_request *request, request_form form, opd_error *error);

/* What is sent, once prepared: borrowed from the request. And the kind of its answer. */
const struct msg_request *request_message(opd_request *request);
msg_reply_kind request_expected(const opd_request *request);

/* For those that build requests (request.c, request_argument.c, tensors.c) alone: */

/* Remembers the first failure only: the later ones are often its consequences. */
OPD_PRINTF(3, 4)
void request_fail(opd_request *request, opd_status status, const char *format, ...);
void request_fail_memory(opd_request *request);

/* The next size of a growing array, and the array moved there; NULL: out of memory (remembered), and the old one stays. */
void *request_grow(opd_request *request, const void *array, size_t count, size_t element_bytes, size_t *capacity_out);

/* UTF-8 of at most `limit` bytes, copied; NULL is empty. False: remembered, `what` in front. */
bool request_copy_text(opd_request *request, const char *what, const char *text, size_t limit, struct msg_text *out);

/* graph.c: the description, or what was wrong with it. */
OPD_MUST_USE opd_status graph_description(const opd_graph *graph, const struct msg_graph **graph_out, opd_error *error);

/* Appends an argument that the server made. Host bytes stay where they are. False: remembered in request->error. */
bool request_add_generated(opd_request *request, const struct msg_arg *arg);

#endif
