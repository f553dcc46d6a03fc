/* A request built from a command line or a case file, with the tensors that it reads.
 *
 * Layer: client/opctl. Threads: one.
 * Life: call_init (asks the daemon for the op's schema) → call_add_text or call_add_json and call_add_tensor → the request is
 * submitted → call_fini. The schema types the values; what it doesn't know is typed by its looks and left to the daemon to
 * refuse. */
#ifndef OPCTL_CALL_H
#define OPCTL_CALL_H

#include <cjson/cJSON.h>

#include "client/file_tensor.h"
#include "client/opctl/schema.h"
#include "opd/client.h"

struct call {
	const char *op; /* borrowed */
	opd_request *request;
	struct schema schema;
	bool bare;         /* tensors go as dtype and shape alone */
	uint64_t seed;     /* of the next randn */
	size_t positional; /* arguments without a name so far */
	size_t named;      /* … and of those with one, from call_add_text */
	opd_client *shares; /* its tensors go through memory shared with the daemon; NULL: they are sent */
	size_t memory_count;
	opd_memory **memories;
	size_t tensor_count;
	struct file_tensor *tensors; /* owned; their data is read by the request */
};

/* An op that the daemon doesn't know is NOT_FOUND. */
OPD_MUST_USE opd_status call_init(struct call *call, opd_client *client, const char *op, opd_error *error);
/* The same with a schema already at hand; NULL: none. */
OPD_MUST_USE opd_status call_init_schema(struct call *call, const char *op, const struct schema *schema, opd_error *error);
void call_fini(struct call *call);

/* Results go to memory shared with the daemon, as operands do; once all arguments are added. */
OPD_MUST_USE opd_status call_share_results(struct call *call, opd_error *error);

/* "value" or "name=value". */
OPD_MUST_USE opd_status call_add_text(struct call *call, const char *text, opd_error *error);

/* An entry of a case's attrs. */
OPD_MUST_USE opd_status call_add_json(struct call *call, const char *name, const cJSON *value, opd_error *error);

/* Takes the tensor's data, on success. */
OPD_MUST_USE opd_status call_add_tensor(struct call *call, const char *name, struct file_tensor *tensor, opd_error *error);

#endif
