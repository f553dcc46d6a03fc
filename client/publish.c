/* Publications: tensors that other sessions open by name or by content. */
#include <string.h>

#include "client/connection.h"
#include "client/document.h"
#include "client/request.h"
#include "proto/bounds.h"

static opd_status check_text(const char *what, const char *name, opd_error *error)
{
	if (name != NULL && name[0] != '\0' && strlen(name) <= BOUND_NAME_BYTES)
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: name %s, expected 1 to %u bytes", what, name == NULL || name[0] == '\0' ? "missing" : "too long",
	                BOUND_NAME_BYTES);
}

/* The answer has one. */
static opd_status call_one(opd_client *client, const struct msg_request *message, const opd_publication **out, opd_error *error)
{
	opd_result *result;
	opd_status status = client_call(client, message, MSG_REPLY_PUBLICATIONS, &result, error);
	if (status != OPD_OK)
		return status;
	if (result->reply.publications.count != 1) {
		opd_result_destroy(result);
		return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: not one publication");
	}
	const void *document;
	status = document_create(result, document_publication, &document, error);
	if (status == OPD_OK)
		*out = document;
	return status;
}

opd_status opd_publish(opd_client *client, opd_handle handle, const char *name, const opd_publish_options *options, const opd_publication **publication_out,
                       opd_error *error)
{
	if (options != NULL && options->struct_bytes < sizeof *options)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "publish: options have struct_bytes %u, expected %zu", options->struct_bytes, sizeof *options);
	struct msg_tensor tensor = {.source = MSG_SOURCE_HANDLE, .handle = {handle.index, handle.generation}};
	const struct msg_request message = {
	    .kind = MSG_REQUEST_PUBLISH,
	    .publish = {.tensor = &tensor, .name = msg_text(name), .all = options != NULL && options->all, .lasting = options != NULL && options->lasting},
	};
	opd_status status = check_text("publish", name, error);
	return status == OPD_OK ? call_one(client, &message, publication_out, error) : status;
}

opd_status opd_open(opd_client *client, const char *name, const opd_publication **publication_out, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_OPEN, .open = {.name = msg_text(name)}};
	opd_status status = check_text("open", name, error);
	return status == OPD_OK ? call_one(client, &message, publication_out, error) : status;
}

opd_status opd_open_contents(opd_client *client, const uint8_t sha256[32], const opd_publication **publication_out, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_OPEN, .open = {.sha256 = sha256}};
	return call_one(client, &message, publication_out, error);
}

opd_status opd_withdraw(opd_client *client, const char *name, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_WITHDRAW, .withdraw = msg_text(name)};
	opd_result *result;
	opd_status status = check_text("withdraw", name, error);
	if (status == OPD_OK)
		status = client_call(client, &message, MSG_REPLY_EMPTY, &result, error);
	if (status == OPD_OK)
		opd_result_destroy(result);
	return status;
}

opd_status opd_publications(opd_client *client, const opd_publication_list **list_out, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_LIST_PUBLICATIONS};
	opd_result *result;
	const void *document;
	opd_status status = client_call(client, &message, MSG_REPLY_PUBLICATIONS, &result, error);
	if (status == OPD_OK)
		status = document_create(result, document_publications, &document, error);
	if (status == OPD_OK)
		*list_out = document;
	return status;
}
