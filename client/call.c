/* Everything but running: calls that wait for their answer. */
#include <stdlib.h>

#include "client/connection.h"
#include "client/document.h"
#include "client/request.h"
#include "proto/bounds.h"
#include "proto/codec.h"

opd_status client_call(opd_client *client, const struct msg_request *message, msg_reply_kind expected, opd_result **result_out,
                       opd_error *error)
{
	opd_result *result = NULL;
	opd_status status;
	if (client->direct_depth != 0) {
		status = direct_call(client, message, expected, &result, error);
	} else {
		struct codec_buffer envelope;
		arena_reset(&client->scratch);
		status = codec_encode_request(&client->scratch, message, &envelope, error);
		const struct submission submission = {.envelope = &envelope, .expected = expected};
		struct flight *flight;
		if (status == OPD_OK)
			status = connection_submit(client, &submission, &flight, error);
		if (status == OPD_OK)
			status = connection_finish(client, flight, &result, error);
	}
	if (status != OPD_OK) {
		opd_result_destroy(result);
		return status;
	}
	*result_out = result;
	return OPD_OK;
}

/* One whose answer says only whether it worked. */
static opd_status call_empty(opd_client *client, const struct msg_request *message, opd_error *error)
{
	opd_result *result;
	opd_status status = client_call(client, message, MSG_REPLY_EMPTY, &result, error);
	if (status == OPD_OK)
		opd_result_destroy(result);
	return status;
}

static opd_status check_name(const char *what, const char *name, opd_error *error)
{
	if (name != NULL && strlen(name) <= BOUND_STR_BYTES)
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s, expected at most %u bytes", what, name == NULL ? "missing" : "too long",
	                BOUND_STR_BYTES);
}

/* ---- Kept tensors ---- */

static opd_status free_some(opd_client *client, const opd_handle *handles, size_t count, opd_error *error)
{
	struct msg_tensor *tensors = calloc(count, sizeof *tensors);
	if (tensors == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "free: out of memory for %zu handles", count);
	for (size_t i = 0; i < count; i++) {
		tensors[i].source = MSG_SOURCE_HANDLE;
		tensors[i].handle = (struct msg_handle){handles[i].index, handles[i].generation};
	}
	const struct msg_request message = {.kind = MSG_REQUEST_FREE, .free = {.count = (uint32_t)count, .tensors = tensors}};
	opd_status status = call_empty(client, &message, error);
	free(tensors);
	return status;
}

opd_status opd_free(opd_client *client, const opd_handle *handles, size_t count, opd_error *error)
{
	opd_status first = OPD_OK;
	for (size_t i = 0; i < count; i += BOUND_LIST) {
		const size_t some = count - i < BOUND_LIST ? count - i : BOUND_LIST;
		opd_status status = free_some(client, handles + i, some, first == OPD_OK ? error : NULL);
		if (first == OPD_OK)
			first = status;
	}
	return first;
}

/* One page of the list, behind what there is; *next_inout: where it begins, and where the next one does (0: nowhere). */
static opd_status kept_page(opd_client *client, opd_kept_tensor **tensors, uint32_t *count, uint32_t *next_inout, opd_result **result_out,
                            opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_LIST_TENSORS, .first = *next_inout};
	opd_status status = client_call(client, &message, MSG_REPLY_TENSORS, result_out, error);
	if (status != OPD_OK)
		return status;
	const uint32_t more = (*result_out)->reply.tensors.count, next = (*result_out)->reply.tensors.next;
	const bool stuck = next != 0 && next <= *next_inout; /* a server that would have us ask for ever */
	opd_kept_tensor *grown = stuck ? NULL : realloc(*tensors, ((size_t)*count + more + 1) * sizeof *grown);
	if (grown == NULL) {
		opd_result_destroy(*result_out);
		return stuck ? opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: the list of tensors goes on at %u", next)
		             : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "list of kept tensors: out of memory for %u", *count + more);
	}
	*tensors = grown;
	*count += document_fill_kept(*result_out, grown + *count);
	*next_inout = next;
	return OPD_OK;
}

opd_status opd_kept_tensors(opd_client *client, const opd_kept_list **list_out, opd_error *error)
{
	opd_kept_tensor *tensors = NULL;
	uint32_t count = 0, next = 0;
	opd_result *result = NULL;
	opd_status status = kept_page(client, &tensors, &count, &next, &result, error);
	while (status == OPD_OK && next != 0) {
		opd_result_destroy(result);
		status = kept_page(client, &tensors, &count, &next, &result, error);
	}
	if (status == OPD_OK) {
		const opd_kept_list *list = document_kept(result, tensors, count);
		if (list != NULL)
			*list_out = list;
		else
			opd_result_destroy(result);
		if (list == NULL)
			status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "list of kept tensors: out of memory for %u", count);
	}
	free(tensors);
	return status;
}

/* ---- Priorities ---- */

/* Borrows all texts; *names_out is the caller's to free. */
static opd_status list_of(const opd_priority_entry *entry, struct msg_text **names_out, struct msg_list *list_out,
                          opd_error *error)
{
	opd_status status = check_name("priority: op", entry->op, error);
	if (status != OPD_OK)
		return status;
	if (entry->count > BOUND_PROVIDERS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "priority of %.128s: %zu providers, at most %u", entry->op, entry->count,
		                BOUND_PROVIDERS);
	struct msg_text *names = calloc(entry->count + 1, sizeof *names);
	if (names == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority of %.128s: out of memory", entry->op);
	for (size_t i = 0; i < entry->count && status == OPD_OK; i++) {
		status = check_name("priority: provider", entry->providers[i], error);
		names[i] = msg_text(status == OPD_OK ? entry->providers[i] : NULL);
	}
	if (status != OPD_OK) {
		free(names);
		return status;
	}
	*names_out = names;
	*list_out = (struct msg_list){.present = true, .count = (uint32_t)entry->count, .names = names};
	return OPD_OK;
}

static void free_entries(struct msg_priority_entry *entries, size_t count)
{
	for (size_t i = 0; i < count; i++)
		free((void *)(uintptr_t)entries[i].list.names);
	free(entries);
}

opd_status opd_priority_push(opd_client *client, const opd_priority_entry *entries, size_t count, opd_error *error)
{
	if (count > BOUND_PRIORITY_OPS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "priority map of %zu ops, at most %u", count, BOUND_PRIORITY_OPS);
	struct msg_priority_entry *list = calloc(count + 1, sizeof *list);
	if (list == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority map: out of memory for %zu ops", count);
	opd_status status = OPD_OK;
	size_t filled = 0;
	while (filled < count && status == OPD_OK) {
		struct msg_text *names;
		status = list_of(&entries[filled], &names, &list[filled].list, error);
		if (status == OPD_OK) {
			list[filled].op = msg_text(entries[filled].op);
			filled++;
		}
	}
	const struct msg_request message = {.kind = MSG_REQUEST_PUSH_PRIORITY, .push = {.count = (uint32_t)count, .entries = list}};
	if (status == OPD_OK)
		status = call_empty(client, &message, error);
	free_entries(list, filled);
	return status;
}

opd_status opd_priority_pop(opd_client *client, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_POP_PRIORITY};
	return call_empty(client, &message, error);
}

/* session 0: the client's own. */
static opd_status set_list(opd_client *client, msg_scope scope, uint64_t session, const opd_priority_entry *entry, opd_error *error)
{
	struct msg_request message = {.kind = MSG_REQUEST_SET_PRIORITY};
	struct msg_text *names;
	opd_status status = list_of(entry, &names, &message.set.list, error);
	if (status != OPD_OK)
		return status;
	message.set.scope = scope;
	message.set.session = session;
	message.set.op = msg_text(entry->op);
	status = call_empty(client, &message, error);
	free(names);
	return status;
}

static opd_status clear_list(opd_client *client, msg_scope scope, uint64_t session, const char *op, opd_error *error)
{
	opd_status status = check_name("priority: op", op, error);
	if (status != OPD_OK)
		return status;
	const struct msg_request message = {.kind = MSG_REQUEST_SET_PRIORITY, .set = {.scope = scope, .session = session, .op = msg_text(op)}};
	return call_empty(client, &message, error);
}

opd_status opd_priority_set(opd_client *client, opd_scope scope, const opd_priority_entry *entry, opd_error *error)
{
	return set_list(client, scope == OPD_SCOPE_SERVER ? MSG_SCOPE_SERVER : MSG_SCOPE_SESSION, 0, entry, error);
}

opd_status opd_priority_clear(opd_client *client, opd_scope scope, const char *op, opd_error *error)
{
	return clear_list(client, scope == OPD_SCOPE_SERVER ? MSG_SCOPE_SERVER : MSG_SCOPE_SESSION, 0, op, error);
}

opd_status opd_set_session_priority(opd_client *client, uint64_t session, const opd_priority_entry *entry, opd_error *error)
{
	return set_list(client, MSG_SCOPE_SESSION, session, entry, error);
}

opd_status opd_clear_session_priority(opd_client *client, uint64_t session, const char *op, opd_error *error)
{
	return clear_list(client, MSG_SCOPE_SESSION, session, op, error);
}

/* ---- Inspecting ---- */

/* Calls and makes a document of the answer. */
static opd_status call_document(opd_client *client, const struct msg_request *message, msg_reply_kind expected, document_fn make,
                                const void **document_out, opd_error *error)
{
	opd_result *result;
	opd_status status = client_call(client, message, expected, &result, error);
	return status == OPD_OK ? document_create(result, make, document_out, error) : status;
}

static opd_status call_op_document(opd_client *client, msg_request_kind kind, const char *op, msg_reply_kind expected,
                                   document_fn make, const void **document_out, opd_error *error)
{
	opd_status status = check_name("op", op, error);
	if (status != OPD_OK)
		return status;
	const struct msg_request message = {.kind = kind, .op = msg_text(op)};
	return call_document(client, &message, expected, make, document_out, error);
}

opd_status opd_priority_get(opd_client *client, const char *op, const opd_priority **priority_out, opd_error *error)
{
	const void *document;
	opd_status status =
	    call_op_document(client, MSG_REQUEST_GET_PRIORITY, op, MSG_REPLY_PRIORITY, document_priority, &document, error);
	if (status == OPD_OK)
		*priority_out = document;
	return status;
}

opd_status opd_describe(opd_client *client, const char *op, const opd_op_description **description_out, opd_error *error)
{
	const void *document;
	opd_status status = call_op_document(client, MSG_REQUEST_DESCRIBE, op, MSG_REPLY_OP, document_op, &document, error);
	if (status == OPD_OK)
		*description_out = document;
	return status;
}

opd_status opd_ops(opd_client *client, const opd_op_list **list_out, opd_error *error)
{
	const void *document;
	const struct msg_request message = {.kind = MSG_REQUEST_LIST_OPS};
	opd_status status = call_document(client, &message, MSG_REPLY_OPS, document_ops, &document, error);
	if (status == OPD_OK)
		*list_out = document;
	return status;
}

opd_status opd_providers(opd_client *client, const opd_provider_list **list_out, opd_error *error)
{
	const void *document;
	const struct msg_request message = {.kind = MSG_REQUEST_LIST_PROVIDERS};
	opd_status status = call_document(client, &message, MSG_REPLY_PROVIDERS, document_providers, &document, error);
	if (status == OPD_OK)
		*list_out = document;
	return status;
}

opd_status opd_info(opd_client *client, const opd_server_info **info_out, opd_error *error)
{
	const void *document;
	const struct msg_request message = {.kind = MSG_REQUEST_INFO};
	opd_status status = call_document(client, &message, MSG_REPLY_INFO, document_info, &document, error);
	if (status == OPD_OK)
		*info_out = document;
	return status;
}

opd_status opd_ping(opd_client *client, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_PING};
	return call_empty(client, &message, error);
}

/* ---- Inputs made by the daemon ---- */

static opd_status generated_request(opd_result *result, const char *op, opd_request **request_out, opd_error *error)
{
	opd_request *request = opd_request_create(op);
	if (request == NULL) {
		opd_result_destroy(result);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "generate: out of memory");
	}
	request->owned = result;
	for (uint32_t i = 0; i < result->reply.generated.count; i++)
		if (!request_add_generated(request, &result->reply.generated.args[i]))
			break;
	if (request->error.status != OPD_OK) {
		const opd_status status = opd_fail(error, (opd_status)request->error.status, "%s", request->error.text);
		opd_request_destroy(request);
		return status;
	}
	*request_out = request;
	return OPD_OK;
}

opd_status opd_generate(opd_client *client, const char *op, const opd_generate_options *options, opd_request **request_out,
                        opd_error *error)
{
	opd_status status = check_name("generate: op", op, error);
	if (status != OPD_OK)
		return status;
	if (options->struct_bytes < sizeof *options || options->dim_count > BOUND_LIST)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "generate: struct_bytes %u, expected %zu; %u dims, at most %u",
		                options->struct_bytes, sizeof *options, options->dim_count, BOUND_LIST);
	const struct msg_request message = {
	    .kind = MSG_REQUEST_GENERATE,
	    .generate = {.op = msg_text(op),
	                 .dtype = options->dtype,
	                 .dim_count = options->dim_count,
	                 .dims = options->dims,
	                 .variant = options->variant,
	                 .seed = options->seed,
	                 .values = options->values,
	                 .keep = options->keep},
	};
	opd_result *result;
	status = client_call(client, &message, MSG_REPLY_GENERATED, &result, error);
	return status == OPD_OK ? generated_request(result, op, request_out, error) : status;
}

/* ---- Administration ---- */

opd_status opd_load_module(opd_client *client, const char *path, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_LOAD_MODULE, .path = msg_text(path)};
	opd_status status = check_name("module: path", path, error);
	return status == OPD_OK ? call_empty(client, &message, error) : status;
}

opd_status opd_restore_provider(opd_client *client, const char *provider, const char *op, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_RESTORE_PROVIDER, .restore = {msg_text(provider), msg_text(op)}};
	opd_status status = check_name("restore: provider", provider, error);
	if (status == OPD_OK && op != NULL)
		status = check_name("restore: op", op, error);
	return status == OPD_OK ? call_empty(client, &message, error) : status;
}

opd_status opd_set_log_level(opd_client *client, const char *level, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_SET_LOG_LEVEL, .log_level = msg_text(level)};
	opd_status status = check_name("log level", level, error);
	return status == OPD_OK ? call_empty(client, &message, error) : status;
}

opd_status opd_drain(opd_client *client, uint64_t timeout_us, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_DRAIN, .timeout_us = timeout_us};
	return call_empty(client, &message, error);
}
