/* The direct path: requests that go to the dispatcher of this process without being encoded. */
#include "client/connection.h"

opd_status opd_direct_begin(opd_client *client, opd_error *error)
{
	if (client->scheme == NULL || client->scheme->direct_begin == NULL)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "direct calls: the daemon isn't in this process (connect to embedded:)");
	opd_status status = connection_check(client, error);
	if (status != OPD_OK)
		return status;
	if (client->leaving)
		return opd_fail(error, OPD_UNAVAILABLE, "direct calls: the server takes no more requests: %s", client->leaving_text);
	if (client->direct_depth == 0) {
		/* Cancelled requests count until the server has answered them, for it is still at work on them. */
		if (client->counted != 0 || !list_empty(&client->writer.waiting))
			return opd_fail(error, OPD_FAILED_PRECONDITION, "direct calls: %zu requests are in flight, expected none",
			                client->counted);
		status = client->scheme->direct_begin(client->scheme_state, error);
		if (status != OPD_OK)
			return status;
	}
	client->direct_depth++;
	return OPD_OK;
}

void opd_direct_end(opd_client *client)
{
	if (client->direct_depth == 0 || --client->direct_depth != 0)
		return;
	client->scheme->direct_end(client->scheme_state);
}

opd_status direct_call(opd_client *client, const struct msg_request *message, msg_reply_kind expected, opd_result **result_out,
                       opd_error *error)
{
	opd_status status = connection_check(client, error);
	if (status != OPD_OK)
		return status;
	opd_result *result = pool_take_result(client->pool);
	if (result == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for a result");
	struct scheme_reply reply = {0};
	client->scheme->direct_call(client->scheme_state, ++client->last_id, message, &reply);
	result->direct = true;
	result->reply = reply.reply;
	result->owner = reply.owner;
	result->release = reply.release;
	opd_error reason;
	if (result_bind(result, expected, 0, &reason) != OPD_OK)
		result_set_failure(result, &reason);
	*result_out = result;
	return result_report(result, error);
}
