/* The receiving half. Headers, envelopes and small payloads come through the stage, many frames a call; a payload that isn't all
 * there goes straight into its block, with the stage behind it for what follows. All that the server says is checked before it is
 * used; what can't be is the connection's end. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "client/connection.h"
#include "client/greeting.h"
#include "proto/bounds.h"
#include "proto/codec.h"

bool reader_init(struct reader *reader)
{
	reader->stage = malloc(STAGE_BYTES);
	return reader->stage != NULL;
}

void reader_fini(struct reader *reader)
{
	free(reader->stage);
	free(reader->envelope);
	*reader = (struct reader){0};
}

/* ---- Sinks: bytes that go somewhere else than the stage ---- */

static void sink_begin(struct reader *reader, sink_kind kind, struct flight *flight, uint8_t *to, uint64_t bytes)
{
	reader->sink = kind;
	reader->flight = flight;
	reader->sink_to = to;
	reader->sink_left = bytes;
}

/* A payload, or a piece of it, for a flight; without a block it is dropped. */
static void sink_payload(struct reader *reader, struct flight *flight, uint64_t offset, uint64_t bytes)
{
	flight->reply_received += bytes;
	sink_begin(reader, SINK_PAYLOAD, flight, flight->block == NULL ? NULL : flight->block->data + offset, bytes);
}

void flight_answer(opd_client *client, struct flight *flight)
{
	flight->answered = true;
	flight->receiving = false;
	if (flight->counted) {
		flight->counted = false;
		client->counted--;
		writer_admit(client);
	}
	if (flight->forgotten) {
		flight_drop_reply(flight, client->pool);
		flights_remove(&client->flights, flight);
		flight_settle(&client->flights, flight);
		return;
	}
	if (flight->block != NULL) {
		result_place(flight->result, flight->block);
		flight->block = NULL;
	}
	list_append(&client->done, &flight->done);
	client->done_count++;
}

/* ---- Frames ---- */

/* A failure of the server's, with what it is in front. */
OPD_PRINTF(2, 3)
static opd_status malformed(opd_error *error, const char *format, ...)
{
	char text[OPD_ERROR_TEXT_BYTES];
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: %.440s", text);
}

/* The reply can't be held on this side: its request fails, the connection goes on. */
static void reply_refuse(struct flight *flight, const opd_error *error)
{
	result_set_failure(flight->result, error);
}

static opd_status reply_decode(opd_client *client, struct flight *flight, const struct frame_header *header,
                               const uint8_t *envelope, opd_error *error)
{
	flight->result = pool_take_result(client->pool);
	if (flight->result == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for the reply to request %llu",
		                (unsigned long long)flight->id);
	opd_result *result = flight->result;
	opd_error reason;
	opd_status status = codec_decode_reply(&result->arena, envelope, header->envelope_bytes, &result->reply, &reason);
	result->memories = client->memories;
	if (status == OPD_OK)
		status = result_bind(result, flight->expected, header->payload_bytes, &reason);
	if (status == OPD_OK && header->payload_bytes != 0) {
		flight->block = pool_take_block(client->pool, header->payload_bytes);
		if (flight->block == NULL)
			status = opd_fail(&reason, OPD_RESOURCE_EXHAUSTED, "no memory for the %llu bytes of the reply to request %llu",
			                  (unsigned long long)header->payload_bytes, (unsigned long long)flight->id);
	}
	if (status == OPD_OK)
		return OPD_OK;
	if (status != OPD_RESOURCE_EXHAUSTED)
		return malformed(error, "reply to request %llu: %.400s", (unsigned long long)flight->id, reason.text);
	reply_refuse(flight, &reason);
	return OPD_OK;
}

static opd_status handle_reply(opd_client *client, const struct frame_header *header, const uint8_t *envelope, opd_error *error)
{
	const unsigned long long id = header->request_id;
	struct flight *flight = flights_find(&client->flights, header->request_id);
	if (flight == NULL || flight->answered || flight->state == FLIGHT_QUEUED)
		return malformed(error, "reply to request %llu, which isn't in flight", id);
	if (flight->receiving)
		return malformed(error, "second reply to request %llu", id);
	const bool chunked = (header->flags & FRAME_CHUNKED) != 0;
	if (chunked && client->session.chunk_bytes == 0)
		return malformed(error, "reply to request %llu is chunked, which wasn't agreed", id);
	writer_stop(client, flight); /* answered before it was sent: the rest of its payload isn't wanted */
	flight->reply_bytes = header->payload_bytes;
	if (!flight->forgotten) {
		opd_status status = reply_decode(client, flight, header, envelope, error);
		if (status != OPD_OK)
			return status;
	}
	if (header->payload_bytes == 0)
		flight_answer(client, flight);
	else if (chunked)
		flight->receiving = true;
	else
		sink_payload(&client->reader, flight, 0, header->payload_bytes);
	return OPD_OK;
}

static opd_status handle_data(opd_client *client, const struct frame_header *header, const uint8_t *envelope, opd_error *error)
{
	const unsigned long long id = header->request_id, bytes = header->payload_bytes, offset = frame_load_u64(envelope);
	struct flight *flight = flights_find(&client->flights, header->request_id);
	if (flight == NULL || !flight->receiving)
		return malformed(error, "DATA for request %llu, of which none is due", id);
	if (offset != flight->reply_received)
		return malformed(error, "DATA for request %llu at offset %llu, expected %llu", id, offset,
		                 (unsigned long long)flight->reply_received);
	if (bytes == 0 || bytes > client->session.chunk_bytes || bytes > flight->reply_bytes - offset)
		return malformed(error, "DATA for request %llu of %llu bytes at offset %llu, the payload has %llu, a chunk at most %llu",
		                 id, bytes, offset, (unsigned long long)flight->reply_bytes,
		                 (unsigned long long)client->session.chunk_bytes);
	sink_payload(&client->reader, flight, offset, bytes);
	return OPD_OK;
}

static opd_status handle_goaway(opd_client *client, const struct frame_header *header, const uint8_t *envelope, opd_error *error)
{
	struct msg_goaway goaway;
	opd_error reason;
	arena_reset(&client->scratch);
	if (codec_decode_goaway(&client->scratch, envelope, header->envelope_bytes, &goaway, &reason) != OPD_OK)
		return malformed(error, "goodbye: %.400s", reason.text);
	client->leaving = true;
	(void)snprintf(client->leaving_text, sizeof client->leaving_text, "%s: %.*s", opd_status_name(goaway.status),
	               (int)(goaway.message.bytes < 400 ? goaway.message.bytes : 400),
	               goaway.message.data == NULL ? "" : goaway.message.data);
	return OPD_OK;
}

static opd_status handle_frame(opd_client *client, const struct frame_header *header, const uint8_t *envelope, opd_error *error)
{
	switch ((frame_type)header->type) {
	case FRAME_HELLO_REPLY:
		return greeting_accept(client, envelope, header->envelope_bytes, error);
	case FRAME_REPLY:
		return handle_reply(client, header, envelope, error);
	case FRAME_DATA:
		return handle_data(client, header, envelope, error);
	case FRAME_GOAWAY:
		return handle_goaway(client, header, envelope, error);
	case FRAME_HELLO:
	case FRAME_REQUEST:
	case FRAME_ABORT:
	case FRAME_CANCEL:
		break;
	}
	return malformed(error, "frame of type %u, which only clients send", header->type);
}

/* What the header alone can tell, before its envelope is waited for. */
static opd_status check_header(const opd_client *client, const struct frame_header *header, opd_error *error)
{
	const bool greeting = header->type == FRAME_HELLO_REPLY;
	if (!client->greeted && !greeting && header->type != FRAME_GOAWAY)
		return malformed(error, "frame of type %u before the answer to Hello", header->type);
	if (client->greeted && greeting)
		return malformed(error, "second answer to Hello");
	const uint32_t limit = client->greeted ? BOUND_ENVELOPE_BYTES : GREETING_BYTES;
	if (header->envelope_bytes > limit)
		return malformed(error, "envelope of %u bytes, at most %u", header->envelope_bytes, limit);
	if (header->type == FRAME_DATA && header->envelope_bytes != FRAME_DATA_OFFSET_BYTES)
		return malformed(error, "DATA frame with an envelope of %u bytes, expected %u", header->envelope_bytes,
		                 FRAME_DATA_OFFSET_BYTES);
	if ((greeting || header->type == FRAME_GOAWAY) && header->payload_bytes != 0)
		return malformed(error, "frame of type %u with a payload", header->type);
	return OPD_OK;
}

/* ---- Parsing ---- */

static opd_status sink_finish(opd_client *client, opd_error *error)
{
	struct reader *reader = &client->reader;
	const sink_kind kind = reader->sink;
	struct flight *flight = reader->flight;
	sink_begin(reader, SINK_NONE, NULL, NULL, 0);
	if (kind == SINK_PAYLOAD) {
		if (flight->reply_received == flight->reply_bytes)
			flight_answer(client, flight);
		return OPD_OK;
	}
	struct frame_header header;
	opd_status status = frame_decode(reader->envelope_header, &header, error);
	if (status == OPD_OK)
		status = handle_frame(client, &header, reader->envelope, error);
	free(reader->envelope);
	reader->envelope = NULL;
	return status;
}

static void sink_take(struct reader *reader)
{
	size_t bytes = reader->end - reader->begin;
	if (bytes > reader->sink_left)
		bytes = (size_t)reader->sink_left;
	if (reader->sink_to != NULL) {
		memcpy(reader->sink_to, reader->stage + reader->begin, bytes);
		reader->sink_to += bytes;
	}
	reader->begin += bytes;
	reader->sink_left -= bytes;
}

static opd_status sink_envelope(struct reader *reader, const struct frame_header *header, opd_error *error)
{
	reader->envelope = malloc(header->envelope_bytes);
	if (reader->envelope == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for an envelope of %u bytes", header->envelope_bytes);
	memcpy(reader->envelope_header, reader->stage + reader->begin, FRAME_HEADER_BYTES);
	reader->begin += FRAME_HEADER_BYTES;
	sink_begin(reader, SINK_ENVELOPE, NULL, reader->envelope, header->envelope_bytes);
	return OPD_OK;
}

/* One frame's head, if it is all there (*progress_out). */
static opd_status parse_head(opd_client *client, bool *progress_out, opd_error *error)
{
	struct reader *reader = &client->reader;
	const size_t there = reader->end - reader->begin;
	*progress_out = false;
	if (there < FRAME_HEADER_BYTES)
		return OPD_OK;
	struct frame_header header;
	opd_error reason;
	if (frame_decode(reader->stage + reader->begin, &header, &reason) != OPD_OK)
		return malformed(error, "%.440s", reason.text);
	opd_status status = check_header(client, &header, error);
	if (status != OPD_OK)
		return status;
	const size_t head = FRAME_HEADER_BYTES + (size_t)header.envelope_bytes;
	*progress_out = head > STAGE_BYTES || there >= head;
	if (head > STAGE_BYTES)
		return sink_envelope(reader, &header, error);
	if (there < head)
		return OPD_OK;
	const uint8_t *envelope = reader->stage + reader->begin + FRAME_HEADER_BYTES;
	reader->begin += head;
	return handle_frame(client, &header, envelope, error);
}

static opd_status reader_parse(opd_client *client, opd_error *error)
{
	struct reader *reader = &client->reader;
	for (;;) {
		bool progress = true;
		opd_status status = OPD_OK;
		if (reader->sink == SINK_NONE) {
			status = parse_head(client, &progress, error);
		} else {
			sink_take(reader);
			if (reader->sink_left != 0)
				return OPD_OK;
			status = sink_finish(client, error);
		}
		if (status != OPD_OK || !progress)
			return status;
	}
}

/* ---- Receiving ---- */

/* Makes room in the stage; what is half there moves to its beginning when the rest would get small. */
static void stage_compact(struct reader *reader)
{
	if (reader->begin == reader->end) {
		reader->begin = 0;
		reader->end = 0;
	} else if (reader->begin != 0 && STAGE_BYTES - reader->end < STAGE_BYTES / 2) {
		memmove(reader->stage, reader->stage + reader->begin, reader->end - reader->begin);
		reader->end -= reader->begin;
		reader->begin = 0;
	}
}

static opd_status receive_end(const opd_client *client, int number, opd_error *error)
{
	const struct reader *reader = &client->reader;
	const opd_error *sealed = client->tls == NULL ? NULL : client_tls_failure(client->tls);
	if (sealed != NULL)
		return opd_fail(error, (opd_status)sealed->status, "%s", sealed->text);
	const char *why = number == 0 ? "the server closed the connection" : strerrordesc_np(number);
	const bool middle = reader->sink != SINK_NONE || reader->begin != reader->end;
	return opd_fail(error, OPD_UNAVAILABLE, "%s%s%s%s", why == NULL ? "the connection failed" : why,
	                middle ? " in the middle of a frame" : "", client->leaving ? ": " : "",
	                client->leaving ? client->leaving_text : "");
}

opd_status reader_receive(opd_client *client, bool wait, bool *more_out, opd_error *error)
{
	struct reader *reader = &client->reader;
	stage_compact(reader);
	struct iovec pieces[2];
	size_t count = 0;
	const size_t direct = reader->sink_to == NULL ? 0 : (size_t)reader->sink_left;
	if (direct != 0)
		pieces[count++] = (struct iovec){reader->sink_to, direct};
	/* Behind a piece of a chunked payload only the next piece's head: its bytes then go straight to their block. */
	const size_t room = direct != 0 && reader->flight != NULL && reader->flight->receiving && reader->begin == reader->end
	                        ? FRAME_HEADER_BYTES + FRAME_DATA_OFFSET_BYTES
	                        : STAGE_BYTES - reader->end;
	pieces[count++] = (struct iovec){reader->stage + reader->end, room};
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
	const int flags = wait ? 0 : MSG_DONTWAIT;
	*more_out = false;
	_Alignas(struct cmsghdr) uint8_t control[RING_CONTROL_BYTES];
	ssize_t got;
	if (client->ring != NULL) {
		got = ring_receive(client, pieces, count);
	} else if (client->tls != NULL) {
		got = client_tls_receive(client->tls, client->fd, pieces, count, wait);
	} else if (client->takes_descriptors) {
		message.msg_control = control;
		message.msg_controllen = sizeof control;
		got = recvmsg(client->fd, &message, flags | MSG_CMSG_CLOEXEC);
		if (got > 0)
			ring_take_descriptors(client, &message);
	} else {
		got = count == 1 ? recv(client->fd, pieces[0].iov_base, pieces[0].iov_len, flags) : recvmsg(client->fd, &message, flags);
	}
	if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
		return OPD_OK;
	if (got <= 0)
		return receive_end(client, got == 0 ? 0 : errno, error);
	size_t bytes = (size_t)got;
	*more_out = bytes == direct + room;
	const size_t placed = bytes < direct ? bytes : direct;
	if (placed != 0) {
		reader->sink_to += placed;
		reader->sink_left -= placed;
	}
	reader->end += bytes - placed;
	return reader_parse(client, error);
}
