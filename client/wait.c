/* Submitting and waiting, for requests of every kind. */
#include "client/connection.h"
#include "client/request.h"
#include "proto/bounds.h"
#include "proto/codec.h"

/* Frames up to this size are copied whole: one piece for the kernel, and the caller's memory is free at once. */
#define COPY_BYTES 1024u

/* opd_submit holds small requests back up to this much while finished ones wait to be taken. */
#define HOLD_BYTES ((size_t)64 << 10)

/* ---- Submitting ---- */

static opd_status check_limits(const opd_client *client, const struct submission *submission, opd_error *error)
{
	const unsigned long long envelope = submission->envelope->envelope_bytes, payload = submission->payload_bytes;
	if (client->leaving)
		return opd_fail(error, OPD_UNAVAILABLE, "the server takes no more requests: %s", client->leaving_text);
	if (client->envelope_limit != 0 && envelope > client->envelope_limit)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "the request's envelope has %llu bytes, the server takes at most %llu",
		                envelope, (unsigned long long)client->envelope_limit);
	if (client->session.payload_bytes != 0 && payload > client->session.payload_bytes)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "the request's tensors have %llu bytes, the server takes at most %llu",
		                payload, (unsigned long long)client->session.payload_bytes);
	return OPD_OK;
}

/* Header, envelope, and the payload where that is small; else references to its pieces. */
static void flight_fill(struct flight *flight, const struct submission *submission, bool copied)
{
	const size_t head = FRAME_HEADER_BYTES + submission->envelope->envelope_bytes;
	const struct frame_header header = {
	    .version = FRAME_VERSION,
	    .type = FRAME_REQUEST,
	    .flags = flight->chunked ? FRAME_CHUNKED : 0,
	    .request_id = flight->id,
	    .envelope_bytes = (uint32_t)submission->envelope->envelope_bytes,
	    .payload_bytes = submission->payload_bytes,
	};
	frame_encode(&header, flight->frame);
	memcpy(flight->frame + FRAME_HEADER_BYTES, submission->envelope->frame + FRAME_HEADER_BYTES,
	       submission->envelope->envelope_bytes);
	flight->frame_bytes = head;
	for (size_t i = 0; i < submission->piece_count; i++) {
		const struct iovec *piece = &submission->pieces[i];
		if (copied) {
			memcpy(flight->frame + flight->frame_bytes, piece->iov_base, piece->iov_len);
			flight->frame_bytes += piece->iov_len;
		} else {
			flight->pieces[flight->piece_count++] = *piece;
		}
	}
	flight->payload_bytes = copied ? 0 : submission->payload_bytes;
}

static opd_status submit_memory(opd_client *client, struct flight *flight, opd_error *error)
{
	if (flight != NULL) {
		flights_remove(&client->flights, flight);
		flight->state = FLIGHT_SENT;
		flight_settle(&client->flights, flight);
	}
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for a request in flight");
}

opd_status connection_submit(opd_client *client, const struct submission *submission, struct flight **flight_out,
                             opd_error *error)
{
	opd_status status = connection_check(client, error);
	if (status == OPD_OK)
		status = check_limits(client, submission, error);
	if (status != OPD_OK)
		return status;
	struct flight *flight = flights_take(&client->flights);
	if (flight == NULL)
		return submit_memory(client, flight, error);
	const uint64_t payload = submission->payload_bytes;
	const size_t head = FRAME_HEADER_BYTES + submission->envelope->envelope_bytes;
	const bool copied = payload != 0 && payload < COPY_BYTES && head + payload <= COPY_BYTES;
	flight->id = client->last_id + 1;
	flight->chunked = !copied && client->session.chunk_bytes != 0 && payload > client->session.chunk_bytes;
	flight->expected = submission->expected;
	flight->descriptor = submission->descriptor;
	if (!flight_reserve(flight, head + (copied ? (size_t)payload : 0), copied ? 0 : submission->piece_count) ||
	    !writer_reserve(&client->writer, submission->piece_count + 1) || !flights_add(&client->flights, flight))
		return submit_memory(client, flight, error);
	client->last_id++;
	client->live++;
	client->writer.passing += flight->descriptor != 0;
	flight_fill(flight, submission, copied);
	writer_add(client, flight);
	*flight_out = flight;
	return OPD_OK;
}

static opd_status submit_wire(opd_client *client, opd_request *request, struct flight **flight_out, opd_error *error)
{
	opd_status status = request_prepare(request, REQUEST_WIRE, error);
	if (status != OPD_OK)
		return status;
	const struct submission submission = {
	    .envelope = &request->envelope,
	    .pieces = request->pieces,
	    .piece_count = request->piece_count,
	    .payload_bytes = request->payload_bytes,
	    .expected = request_expected(request),
	};
	return connection_submit(client, &submission, flight_out, error);
}

/* In a direct scope: runs it now, and leaves the result to be taken. */
static opd_status submit_direct(opd_client *client, opd_request *request, struct flight **flight_out, opd_error *error)
{
	opd_status status = request_prepare(request, REQUEST_DIRECT, error);
	if (status != OPD_OK)
		return status;
	struct flight *flight = flights_take(&client->flights);
	if (flight == NULL)
		return submit_memory(client, flight, error);
	flight->state = FLIGHT_SENT;
	flight->id = client->last_id + 1;
	if (!flights_add(&client->flights, flight))
		return submit_memory(client, flight, error);
	opd_result *result = NULL;
	status = direct_call(client, request_message(request), request_expected(request), &result, error);
	if (result == NULL) {
		flights_remove(&client->flights, flight);
		flight_settle(&client->flights, flight);
		return status;
	}
	flight->result = result;
	client->live++;
	flight_answer(client, flight);
	*flight_out = flight;
	return OPD_OK;
}

static opd_status submit(opd_client *client, const opd_request *request, struct flight **flight_out, opd_error *error)
{
	/* What a request says doesn't change by being submitted; its encoded form, kept inside it for the next time, does. */
	opd_request *inside = (opd_request *)(uintptr_t)request;
	return client->direct_depth != 0 ? submit_direct(client, inside, flight_out, error)
	                                 : submit_wire(client, inside, flight_out, error);
}

opd_status opd_submit(opd_client *client, const opd_request *request, opd_ticket *ticket_out, opd_error *error)
{
	struct flight *flight;
	opd_status status = submit(client, request, &flight, error);
	if (status != OPD_OK)
		return status;
	*ticket_out = flight->id;
	/* A caller with finished requests still to take is about to submit more: those leave together, at the latest when it takes
	 * the last. */
	if (client->done_count == 0 || client->writer.ready_bytes >= HOLD_BYTES)
		writer_flush(client);
	return OPD_OK;
}

/* ---- Taking ---- */

/* The caller's memory isn't ours any more. Out of memory here leaves no way to finish the frame, so the connection goes. */
static void release_operands(opd_client *client, struct flight *flight)
{
	if (flight->batched == 0 || writer_detach(client, flight))
		return;
	opd_error failure;
	(void)opd_fail(&failure, OPD_RESOURCE_EXHAUSTED, "out of memory for the rest of a half-sent request");
	connection_break(client, &failure);
}

static void done_remove(opd_client *client, struct flight *flight)
{
	list_remove(&flight->done);
	client->done_count--;
	client->live--;
	release_operands(client, flight);
	flights_remove(&client->flights, flight);
}

static opd_status take(opd_client *client, struct flight *flight, opd_result **result_out, opd_error *error)
{
	opd_result *result = flight->result;
	flight->result = NULL;
	done_remove(client, flight);
	flight_settle(&client->flights, flight);
	if (client->done_count == 0 && writer_pending(client))
		writer_flush(client);
	*result_out = result;
	return result_report(result, error);
}

void connection_forget(opd_client *client, struct flight *flight)
{
	if (flight->answered) {
		done_remove(client, flight);
		flight_drop_reply(flight, client->pool);
		flight_settle(&client->flights, flight);
		return;
	}
	const bool unsent = flight->state == FLIGHT_QUEUED, whole = flight->state == FLIGHT_SENT;
	client->live--;
	flight->forgotten = true;
	writer_stop(client, flight);
	if (unsent) {
		flights_remove(&client->flights, flight);
		flight_settle(&client->flights, flight);
		writer_admit(client);
	} else {
		if (whole)
			writer_cancel(client, flight);
		release_operands(client, flight);
	}
	writer_flush(client);
}

/* ---- Waiting ---- */

static opd_status wait_for(opd_client *client, struct flight *flight, uint64_t timeout_us, opd_error *error)
{
	if (flight->answered)
		return OPD_OK;
	const uint64_t id = flight->id;
	const uint64_t deadline_us = timeout_us == UINT64_MAX ? UINT64_MAX : deadline_after(timeout_us);
	bool fresh = timeout_us == client->timeout_us;
	for (;;) {
		opd_status status = connection_pump(client, deadline_us, fresh, error);
		if (status != OPD_OK && status != OPD_DEADLINE_EXCEEDED) /* its last words may still have been this answer */
			return flights_find(&client->flights, id) == flight ? OPD_OK : status;
		if (flight->answered)
			return OPD_OK;
		if (status == OPD_DEADLINE_EXCEEDED || (deadline_us != UINT64_MAX && clock_us() >= deadline_us))
			return opd_fail(error, OPD_DEADLINE_EXCEEDED, "request %llu isn't answered after %llu us",
			                (unsigned long long)flight->id, (unsigned long long)timeout_us);
		fresh = false;
	}
}

opd_status connection_finish(opd_client *client, struct flight *flight, opd_result **result_out, opd_error *error)
{
	const opd_status status = wait_for(client, flight, client->timeout_us == 0 ? UINT64_MAX : client->timeout_us, error);
	if (status == OPD_OK)
		return take(client, flight, result_out, error);
	if (client->failure.status == OPD_OK)
		connection_forget(client, flight);
	return status;
}

opd_status opd_run(opd_client *client, const opd_request *request, opd_result **result_out, opd_error *error)
{
	*result_out = NULL;
	struct flight *flight;
	opd_status status = submit(client, request, &flight, error);
	return status == OPD_OK ? connection_finish(client, flight, result_out, error) : status;
}

opd_status opd_wait(opd_client *client, opd_ticket ticket, uint64_t timeout_us, opd_result **result_out, opd_error *error)
{
	*result_out = NULL;
	struct flight *flight = flights_find(&client->flights, ticket);
	if (flight == NULL || flight->forgotten) {
		opd_status status = connection_check(client, error);
		if (status != OPD_OK)
			return status;
		return opd_fail(error, OPD_NOT_FOUND, "request %llu isn't in flight", (unsigned long long)ticket);
	}
	opd_status status = wait_for(client, flight, timeout_us, error);
	return status == OPD_OK ? take(client, flight, result_out, error) : status;
}

/* Until anything at all is finished. */
static opd_status wait_for_any(opd_client *client, uint64_t timeout_us, opd_error *error)
{
	const uint64_t deadline_us = timeout_us == UINT64_MAX ? UINT64_MAX : deadline_after(timeout_us);
	bool fresh = timeout_us == client->timeout_us;
	while (client->done_count == 0) {
		opd_status status = connection_pump(client, deadline_us, fresh, error);
		if (status != OPD_OK && status != OPD_DEADLINE_EXCEEDED)
			return client->done_count != 0 ? OPD_OK : status;
		if (client->done_count == 0 &&
		    (status == OPD_DEADLINE_EXCEEDED || (deadline_us != UINT64_MAX && clock_us() >= deadline_us)))
			return opd_fail(error, OPD_DEADLINE_EXCEEDED, "none of %zu requests is answered after %llu us", client->live,
			                (unsigned long long)timeout_us);
		fresh = false;
	}
	return OPD_OK;
}

opd_status opd_wait_any(opd_client *client, uint64_t timeout_us, opd_ticket *ticket_out, opd_result **result_out,
                        opd_error *error)
{
	*result_out = NULL;
	if (client->live == 0) {
		opd_status status = connection_check(client, error);
		return status == OPD_OK ? opd_fail(error, OPD_NOT_FOUND, "no request is in flight") : status;
	}
	opd_status status = wait_for_any(client, timeout_us, error);
	if (status != OPD_OK)
		return status;
	struct flight *flight = LIST_ENTRY(client->done.next, struct flight, done);
	*ticket_out = flight->id;
	return take(client, flight, result_out, error);
}

void opd_cancel(opd_client *client, opd_ticket ticket)
{
	struct flight *flight = flights_find(&client->flights, ticket);
	if (flight != NULL && !flight->forgotten)
		connection_forget(client, flight);
}
