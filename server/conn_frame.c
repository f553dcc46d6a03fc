/* What a frame of a client means: requests, their DATA, their end. */
#include <inttypes.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/conn_internal.h"
#include "server/daemon.h"
#include "server/request.h"

/* Payloads from this size on are read straight to where they belong. Smaller ones are cheaper to copy than to read apart: of 16 KiB, 0.3 us against a system call's 0.5
 * to 1 us, and a pipelined one comes with three others in one read (one op on one core 1.43 to 1.25 of the echo, 64 in flight 80 to 100 k/s). */
#define DIRECT_BYTES 32768u
/* Envelopes from this size on are decoded on a lane, and the graphs that they bring are checked there: 1 MiB with a graph of 65,536 nodes kept the loop, and everybody, for 69 ms. */
#define LANE_ENVELOPE_BYTES (64u << 10)

/* ---- Requests whose DATA frames are still to come ---- */

/* Their number is the client's choice, and so are their ids: one list, walked for each DATA frame, was 50 ms of the loop for 64 KiB of small frames. */
static struct request **chunked_bucket(struct conn *conn, uint64_t id)
{
	return &conn->chunked[((id ^ conn->chunked_seed) * (conn->chunked_seed | 1)) >> (64 - CONN_CHUNKED_BITS)];
}

static struct request *chunked_find(struct conn *conn, uint64_t id)
{
	for (struct request *request = *chunked_bucket(conn, id); request != NULL; request = request->next)
		if (request->id == id)
			return request;
	return NULL;
}

static void chunked_add(struct conn *conn, struct request *request)
{
	struct request **first = chunked_bucket(conn, request->id);
	request->next = *first;
	if (request->next != NULL)
		request->next->previous = request;
	*first = request;
	conn->chunked_count++;
}

void conn_chunked_remove(struct conn *conn, struct request *request)
{
	*(request->previous == NULL ? chunked_bucket(conn, request->id) : &request->previous->next) = request->next;
	if (request->next != NULL)
		request->next->previous = request->previous;
	request->next = request->previous = NULL;
	conn->chunked_count--;
}

/* ---- Requests in flight ---- */

static struct request **id_bucket(struct conn *conn, uint64_t id)
{
	return &conn->by_id[((id ^ conn->chunked_seed) * (conn->chunked_seed | 1)) >> (64 - CONN_ID_BITS)];
}

static void remember_id(struct conn *conn, struct request *request)
{
	struct request **link = id_bucket(conn, request->id);
	request->id_next = *link;
	request->id_link = link;
	if (request->id_next != NULL)
		request->id_next->id_link = &request->id_next;
	*link = request;
}

void conn_forget_id(struct request *request)
{
	if (request->id_link == NULL)
		return;
	*request->id_link = request->id_next;
	if (request->id_next != NULL)
		request->id_next->id_link = request->id_link;
	request->id_link = NULL;
}

/* One that was answered isn't found, nor is another session's: a cancel may always come too late. */
static void on_cancel(struct conn *conn, uint64_t id)
{
	if ((conn->features & CONN_CANCEL) == 0)
		return;
	struct request *request = *id_bucket(conn, id);
	while (request != NULL && request->id != id)
		request = request->id_next;
	if (request != NULL && chunked_find(conn, id) == request)
		conn_chunked_remove(conn, request);
	const bool done = request != NULL && request_cancel(request);
	LOG(conn->server->log, LOG_DEBUG, done ? "request cancelled" : "nothing to cancel", LOG_UINT("session", conn->session->id),
	    LOG_UINT("request", id));
}

void conn_skip_payload(struct conn *conn, struct request *request)
{
	if (chunked_find(conn, request->id) == request)
		conn_chunked_remove(conn, request);
	if (conn->reading != request)
		return;
	conn->reading = NULL;
	conn->state = CONN_DISCARD;
}

/* Requests end others that wait for them: each bucket is looked at anew after every one. */
void conn_cancel_all(struct conn *conn)
{
	for (size_t i = 0; i < sizeof conn->by_id / sizeof conn->by_id[0]; i++) {
		while (conn->by_id[i] != NULL) {
			struct request *request = conn->by_id[i];
			conn_forget_id(request);
			(void)request_cancel(request);
		}
	}
}

/* ---- Frames ---- */

/* Requests whose payload is not there yet end now: it won't come. */
void conn_abandon_half_sent(struct conn *conn, const char *why)
{
	struct request *reading = conn->reading;
	conn->reading = NULL;
	if (reading != NULL && !reading->chunked)
		request_abandon(reading, OPD_CANCELLED, why);
	for (size_t i = 0; conn->chunked_count != 0 && i < sizeof conn->chunked / sizeof conn->chunked[0]; i++) {
		while (conn->chunked[i] != NULL) {
			struct request *request = conn->chunked[i];
			conn_chunked_remove(conn, request);
			request_abandon(request, OPD_CANCELLED, why);
		}
	}
}

/* Where the next frame begins is not known any more. The client is told why; what it has in flight is still answered. */
void conn_protocol_error(struct conn *conn, const char *what)
{
	if (conn->broken)
		return;
	conn->broken = true;
	conn_stop_reading(conn);
	opd_error error;
	(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "%s", what);
	if (!conn->greeted) {
		conn_refuse_hello(conn, &error);
		return;
	}
	char shown[300];
	LOG_LIMITED(conn->server->log, LOG_WARN, &conn->server->broken_lines, conn->server->config->log_lines, "protocol error",
	            LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer), LOG_STR("reason", text_escape(what, strlen(what), shown, sizeof shown)));
	conn_abandon_half_sent(conn, "the connection ended before the payload was there");
	conn->last_words = false;
	conn_say_goodbye(conn, OPD_INVALID_ARGUMENT, what);
}

static void expect_payload(struct conn *conn, struct request *request, uint64_t bytes)
{
	conn->state = bytes == 0 ? CONN_HEAD : request == NULL ? CONN_DISCARD : CONN_PAYLOAD;
	conn->reading = bytes == 0 ? NULL : request;
	conn->frame_left = bytes;
}

/* What the header tells of a request that is refused before it is one: it still gets its reply. */
static opd_status check_head(const struct conn *conn, const struct frame_header *header, opd_error *error)
{
	const struct config_limits *limits = &conn->server->config->limits;
	const uint64_t last = conn->session->last_request;
	if (header->request_id <= last)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "request id %" PRIu64 " is not above %" PRIu64 ", the last one", header->request_id, last);
	if (conn->server->draining)
		return opd_fail(error, OPD_UNAVAILABLE, "the server is draining");
	if (header->payload_bytes > limits->request_bytes)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "payload of %" PRIu64 " bytes, at most %" PRIu64, header->payload_bytes, limits->request_bytes);
	if ((header->flags & FRAME_CHUNKED) != 0 && conn->chunk_bytes == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "a chunked request, but this connection negotiated no chunks");
	return OPD_OK;
}

/* It was accepted, or refused: its payload comes next, or it starts. */
static void go_on_with(struct conn *conn, struct request *request, opd_status status, uint64_t payload_bytes, bool chunked)
{
	const uint64_t follows = chunked ? 0 : payload_bytes;
	request->chunked = chunked && payload_bytes != 0;
	if (status != OPD_OK) {
		expect_payload(conn, NULL, follows);
		request_reject(request);
	} else if (request->chunked) {
		chunked_add(conn, request);
	} else if (follows != 0) {
		expect_payload(conn, request, follows);
	} else {
		request_start(request);
	}
}

/* Back from the lane. */
static void on_decoded(struct request *request)
{
	struct conn *conn = request->session->conn;
	if (conn == NULL) {
		(void)opd_fail(&request->error, OPD_CANCELLED, "the session has ended");
		request->message = (struct msg_request){0}; /* decoded, and nothing of it was taken */
		request_reject(request);
		return;
	}
	conn_new_turn(conn);
	go_on_with(conn, request, request_accept_decoded(request, conn->held_payload_bytes), conn->held_payload_bytes, conn->held_chunked);
	if (conn->broken) /* meanwhile: what isn't there yet won't come */
		conn_abandon_half_sent(conn, "the connection ended before the payload was there");
	conn_go_on(conn);
}

static void note_id(struct conn *conn, struct request *request)
{
	if (request->id <= conn->session->last_request)
		return;
	conn->session->last_request = request->id;
	remember_id(conn, request);
}

/* False: the envelope doesn't lie in memory that can be handed on; one of this size that came in pieces does. */
static bool decode_on_lane(struct conn *conn, struct request *request, const struct frame_header *header, const uint8_t *envelope)
{
	void *memory = conn_take_head(conn, envelope);
	if (memory == NULL)
		return false;
	note_id(conn, request);
	conn->held_payload_bytes = header->payload_bytes;
	conn->held_chunked = (header->flags & FRAME_CHUNKED) != 0;
	conn_hold(conn);
	request_decode(request, memory, envelope, header->envelope_bytes, on_decoded);
	return true;
}

static void check_request(struct conn *conn, struct request *request, const struct frame_header *header, const uint8_t *envelope)
{
	const bool chunked = (header->flags & FRAME_CHUNKED) != 0;
	opd_status status = check_head(conn, header, &request->error);
	if (status == OPD_OK && header->envelope_bytes >= LANE_ENVELOPE_BYTES && decode_on_lane(conn, request, header, envelope))
		return;
	if (status == OPD_OK)
		status = request_accept(request, envelope, header->envelope_bytes, header->payload_bytes);
	note_id(conn, request);
	go_on_with(conn, request, status, header->payload_bytes, chunked);
}

static void on_request(struct conn *conn, const struct frame_header *header, const uint8_t *envelope)
{
	struct request *request = request_create(&conn->io->context, conn->session, header->request_id);
	if (request == NULL) {
		conn_close(conn, LOG_ERROR, "out of memory for a request");
		return;
	}
	conn->session->in_flight++;
	conn->turn_requests++;
	request->on_reply = conn_on_reply;
	uint32_t head = FRAME_HEADER_BYTES + header->envelope_bytes;
	conn->read_hint = header->payload_bytes >= DIRECT_BYTES && (header->flags & FRAME_CHUNKED) == 0 ? head : 0;
	check_request(conn, request, header, envelope);
}

static void on_data(struct conn *conn, const struct frame_header *header, const uint8_t *envelope)
{
	struct request *request = chunked_find(conn, header->request_id);
	conn->read_hint = FRAME_HEADER_BYTES + FRAME_DATA_OFFSET_BYTES;
	if (request == NULL) {
		if (header->request_id > conn->session->last_request)
			conn_protocol_error(conn, "a DATA frame for a request that was never sent");
		else
			expect_payload(conn, NULL, header->payload_bytes); /* answered already: nobody wants the rest */
		return;
	}
	uint64_t offset = frame_load_u64(envelope);
	uint64_t left = request->payload_bytes - request->payload_received;
	char text[200];
	if (offset == request->payload_received && header->payload_bytes <= left && header->payload_bytes <= conn->chunk_bytes &&
	    header->payload_bytes != 0) {
		expect_payload(conn, request, header->payload_bytes);
		return;
	}
	(void)snprintf(text, sizeof text, "a DATA frame of %" PRIu64 " bytes at offset %" PRIu64 ", expected 1 to %" PRIu64 " at offset %" PRIu64,
	               header->payload_bytes, offset, left < conn->chunk_bytes ? left : conn->chunk_bytes, request->payload_received);
	conn_chunked_remove(conn, request);
	expect_payload(conn, NULL, header->payload_bytes);
	request_abandon(request, OPD_INVALID_ARGUMENT, text);
}

static void on_abort(struct conn *conn, uint64_t id)
{
	struct request *request = chunked_find(conn, id);
	if (request == NULL)
		return; /* answered already, or never chunked: nothing to end */
	conn_chunked_remove(conn, request);
	request_abandon(request, OPD_CANCELLED, "the client aborted the request");
}

void conn_on_frame(struct conn *conn, const struct frame_header *header, const uint8_t *envelope)
{
	if (!conn->greeted) {
		conn_on_hello(conn, envelope, header->envelope_bytes);
		return;
	}
	switch ((frame_type)header->type) {
	case FRAME_REQUEST:
		on_request(conn, header, envelope);
		break;
	case FRAME_DATA:
		on_data(conn, header, envelope);
		break;
	case FRAME_ABORT:
		on_abort(conn, header->request_id);
		break;
	case FRAME_CANCEL:
		on_cancel(conn, header->request_id);
		break;
	default:
		conn_protocol_error(conn, "a frame of a type that only servers send");
	}
}

/* What the header alone tells, before a byte of the envelope is kept. */
bool conn_check_header(struct conn *conn, const struct frame_header *header)
{
	uint64_t limit = conn->greeted ? conn->server->config->limits.envelope_bytes : BOUND_HELLO_BYTES;
	char text[120];
	if (!conn->greeted && (header->type != FRAME_HELLO || header->payload_bytes != 0)) {
		conn_protocol_error(conn, "the first frame is no Hello");
		return false;
	}
	if (conn->greeted && header->type == FRAME_HELLO) {
		conn_protocol_error(conn, "a second Hello");
		return false;
	}
	if (header->envelope_bytes > limit) {
		(void)snprintf(text, sizeof text, "an envelope of %" PRIu32 " bytes, at most %" PRIu64, header->envelope_bytes, limit);
		conn_protocol_error(conn, text);
		return false;
	}
	if ((header->type == FRAME_ABORT || header->type == FRAME_CANCEL) && header->payload_bytes != 0) {
		conn_protocol_error(conn, "an ABORT or CANCEL frame with a payload");
		return false;
	}
	return true;
}

