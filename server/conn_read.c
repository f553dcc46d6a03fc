/* From bytes of a socket to frames and payloads in place. */
#include <stdlib.h>
#include <string.h>

#include "server/conn_internal.h"
#include "server/conn_tls.h"
#include "server/daemon.h"
#include "server/device_run.h"
#include "server/request.h"
#include "server/ring.h"

/* How much is read at once of a connection that sent as many requests as a turn may: 64 KiB of small ones held the others up for 9 ms. */
#define FLOOD_BYTES (8u << 10)
/* Kernel time on the loop after which a turn reads nothing more; what was read is still run, on a lane when it must. */
#define TURN_KERNEL_NS 15000u

/* ---- Reading ---- */

static bool decode_header(struct conn *conn, const uint8_t *bytes, struct frame_header *header_out)
{
	opd_error error;
	if (frame_decode(bytes, header_out, &error) == OPD_OK)
		return conn_check_header(conn, header_out);
	conn_protocol_error(conn, error.text);
	return false;
}

/* Keeps what came of a header or envelope until the rest is there. */
static bool keep_partial(struct conn *conn, const uint8_t *data, size_t bytes, uint32_t whole)
{
	if (conn->partial_room < whole) {
		uint8_t *partial = realloc(conn->partial, whole);
		if (partial == NULL) {
			conn_close(conn, LOG_ERROR, "out of memory for an envelope");
			return false;
		}
		conn->partial = partial;
		conn->partial_room = whole;
	}
	memcpy(conn->partial + conn->partial_bytes, data, bytes);
	conn->partial_bytes += (uint32_t)bytes;
	return true;
}

/* An idle connection keeps no buffer. */
static void drop_partial(struct conn *conn)
{
	conn->partial_bytes = 0;
	if (conn->partial_room > 4096) {
		free(conn->partial);
		conn->partial = NULL;
		conn->partial_room = 0;
	}
}

void *conn_take_head(struct conn *conn, const uint8_t *envelope)
{
	uint8_t *head = conn->partial;
	if (head == NULL || envelope != head + FRAME_HEADER_BYTES)
		return NULL;
	conn->partial = NULL;
	conn->partial_room = 0;
	return head;
}

/* Adds to the partial head up to `whole` bytes; returns how many were taken. */
static size_t extend_partial(struct conn *conn, const uint8_t *data, size_t bytes, uint32_t whole)
{
	size_t missing = whole - conn->partial_bytes;
	size_t taken = bytes < missing ? bytes : missing;
	return keep_partial(conn, data, taken, whole) ? taken : bytes; /* out of memory: the connection is closing */
}

/* What else a client has to say (CANCEL, ABORT, DATA of requests in flight, PING) is read whatever it has in flight, up to the request that is one too many. */
static bool must_wait(struct conn *conn, const struct frame_header *header)
{
	return header->type == FRAME_REQUEST && conn_throttle(conn);
}

/* A head of which a part came before. Returns the bytes taken. */
static size_t consume_partial(struct conn *conn, const uint8_t *data, size_t bytes)
{
	size_t taken = 0;
	if (conn->partial_bytes < FRAME_HEADER_BYTES) {
		taken = extend_partial(conn, data, bytes, FRAME_HEADER_BYTES);
		if (conn->closing || conn->partial_bytes < FRAME_HEADER_BYTES)
			return taken;
	}
	struct frame_header header;
	if (!decode_header(conn, conn->partial, &header))
		return bytes;
	if (must_wait(conn, &header)) {
		conn->partial_bytes -= (uint32_t)taken; /* so that something is left to go on with */
		return 0;
	}
	uint32_t whole = FRAME_HEADER_BYTES + header.envelope_bytes;
	if (conn->partial_bytes < whole)
		taken += extend_partial(conn, data + taken, bytes - taken, whole);
	if (conn->closing || conn->partial_bytes < whole)
		return taken;
	conn->partial_bytes = 0; /* on_frame doesn't come back here */
	conn_on_frame(conn, &header, conn->partial + FRAME_HEADER_BYTES);
	drop_partial(conn);
	return taken;
}

/* A head at the start of what was read. Returns the bytes taken. */
static size_t consume_head(struct conn *conn, const uint8_t *data, size_t bytes)
{
	if (conn->partial_bytes != 0)
		return consume_partial(conn, data, bytes);
	if (bytes < FRAME_HEADER_BYTES) {
		(void)keep_partial(conn, data, bytes, FRAME_HEADER_BYTES);
		return bytes;
	}
	struct frame_header header;
	if (!decode_header(conn, data, &header))
		return bytes;
	if (must_wait(conn, &header))
		return 0;
	uint32_t whole = FRAME_HEADER_BYTES + header.envelope_bytes;
	if (bytes < whole) {
		(void)keep_partial(conn, data, bytes, whole);
		return bytes;
	}
	conn_on_frame(conn, &header, data + FRAME_HEADER_BYTES);
	return whole;
}

/* `bytes` of the payload are where they belong. */
void conn_received_payload(struct conn *conn, uint64_t bytes)
{
	struct request *request = conn->reading;
	conn->frame_left -= bytes;
	if (request != NULL)
		request->payload_received += bytes;
	if (request != NULL && request->payload_received != request->payload_bytes)
		device_ahead_received(request);
	if (conn->frame_left != 0)
		return;
	conn->state = CONN_HEAD;
	conn->reading = NULL;
	if (request == NULL || request->payload_received != request->payload_bytes)
		return;
	if (request->chunked)
		conn_chunked_remove(conn, request);
	request_start(request);
}

static unsigned char *payload_at(const struct conn *conn)
{
	return conn->reading->payload->data + conn->reading->payload_received;
}

/* Nothing that was read is looked at now: an envelope is decoded elsewhere, or a request is one too many. */
static bool waits(const struct conn *conn)
{
	return conn->held || conn->throttled;
}

/* What was read already; nothing more is. */
static void keep_held(struct conn *conn, const uint8_t *data, size_t bytes)
{
	uint8_t *larger = realloc(conn->held_data, conn->held_bytes + bytes);
	if (larger == NULL) {
		conn_close(conn, LOG_ERROR, "out of memory for what is held");
		return;
	}
	memcpy(larger + conn->held_bytes, data, bytes);
	conn->held_data = larger;
	conn->held_bytes += bytes;
}

uint8_t *conn_payload_room(const struct conn *conn, uint64_t *bytes_out)
{
	*bytes_out = conn->frame_left;
	return conn->state == CONN_PAYLOAD ? payload_at(conn) : NULL;
}

/* A head, a part of one, or what there is of a payload. Returns the bytes taken. */
static size_t consume_one(struct conn *conn, const uint8_t *data, size_t bytes)
{
	if (conn->state == CONN_HEAD)
		return consume_head(conn, data, bytes);
	const size_t taken = bytes < conn->frame_left ? bytes : (size_t)conn->frame_left;
	if (conn->state == CONN_PAYLOAD)
		memcpy(payload_at(conn), data, taken);
	conn_received_payload(conn, taken);
	return taken;
}

void conn_consume(struct conn *conn, const uint8_t *data, size_t bytes)
{
	size_t taken = 0;
	conn->io->context.read_ns = request_now_ns();
	while (taken < bytes && !conn->closing && !conn->broken && !waits(conn))
		taken += consume_one(conn, data + taken, bytes - taken);
	if (taken < bytes && waits(conn))
		keep_held(conn, data + taken, bytes - taken);
}

/* Who has asked for rings sends frames there and not here, also before it has the answer. */
static void consume_socket(struct conn *conn, const uint8_t *data, size_t bytes)
{
	size_t taken = 0;
	conn->io->context.read_ns = request_now_ns();
	while (taken < bytes && conn->ring == NULL && !conn->closing && !conn->broken && !waits(conn))
		taken += consume_one(conn, data + taken, bytes - taken);
	if (taken < bytes && conn->ring != NULL)
		ring_socket_bytes(conn, data + taken, bytes - taken);
	else if (taken < bytes && waits(conn))
		keep_held(conn, data + taken, bytes - taken);
}

/* The buffer's slack takes in the next frame's head, so that a pipelined request costs one read. */
static size_t slack_bytes(const struct conn *conn)
{
	const struct request *request = conn->reading;
	if (request->chunked || conn->read_hint == 0 || conn->read_hint > BUFFER_SLACK_BYTES)
		return 0;
	return conn->read_hint;
}

/* This turn's share is used up, of the socket or of kernels on the loop: the others come first. */
static bool turn_over(const struct conn *conn)
{
	return conn->turn_read >= CONN_TURN_BYTES || conn->turn_requests >= CONN_TURN_REQUESTS || conn->io->context.inline_ns > TURN_KERNEL_NS;
}

bool conn_may_read(const struct conn *conn)
{
	return !conn->closing && !conn->broken && !conn->throttled && !conn->held && !turn_over(conn);
}

/* Where what comes next goes; empty: nothing more in this turn. */
static uv_buf_t read_room(const struct conn *conn)
{
	if (turn_over(conn))
		return uv_buf_init(NULL, 0);
	const bool small = conn->read_hint == 0 && conn->frame_left < CONN_STAGE_BYTES; /* its end is copied as its beginning was: what comes behind it is read with it */
	if (conn->state == CONN_PAYLOAD && conn->ring == NULL && !small) {
		uint64_t left = conn->frame_left + slack_bytes(conn);
		uint64_t share = CONN_TURN_BYTES - (conn->turn_read < CONN_TURN_BYTES / 2 ? conn->turn_read : CONN_TURN_BYTES / 2);
		return uv_buf_init((char *)payload_at(conn), (unsigned)(left < share ? left : share));
	}
	size_t bytes = conn->flooding ? FLOOD_BYTES : CONN_STAGE_BYTES;
	if (conn->state == CONN_HEAD && conn->read_hint != 0)
		bytes = conn->read_hint > conn->partial_bytes ? conn->read_hint - conn->partial_bytes : FRAME_HEADER_BYTES;
	return uv_buf_init(conn->io->stage, (unsigned)(bytes < CONN_STAGE_BYTES ? bytes : CONN_STAGE_BYTES));
}

/* An empty buffer makes libuv leave the socket for the next turn, without the two epoll_ctl of a stop and a start, or to receive_local. */
static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
	struct conn *conn = handle->data;
	(void)suggested;
	conn_new_turn(conn);
	*buf = conn->local ? uv_buf_init(NULL, 0) : read_room(conn);
}

/* Payload read in place, and perhaps the next frame's head behind it. */
static void read_in_place(struct conn *conn, const uint8_t *base, size_t bytes)
{
	size_t payload = bytes < conn->frame_left ? bytes : (size_t)conn->frame_left;
	uint8_t head[BUFFER_SLACK_BYTES];
	size_t extra = bytes - payload;
	memcpy(head, base + payload, extra); /* the buffer may be gone once its request has run */
	conn_received_payload(conn, payload);
	consume_socket(conn, head, extra);
}

/* No frame is under way that they could belong to. */
static void drop_unclaimed_descriptors(struct conn *conn)
{
	if (conn->descriptor_count != 0 && conn->partial_bytes == 0 && conn->ring == NULL && !waits(conn))
		conn_drop_descriptors(conn);
}

static void on_bytes(struct conn *conn, ssize_t nread, const uv_buf_t *buf)
{
	if (nread < 0) {
		conn_close(conn, LOG_INFO, nread == UV_EOF ? "the client closed" : uv_strerror((int)nread));
		return;
	}
	if (nread == 0)
		return;
	conn->read_us = conn->io->turn_us;
	conn->turn_read += (uint64_t)nread;
	if (buf->base == conn->io->stage)
		consume_socket(conn, (const uint8_t *)buf->base, (size_t)nread);
	else
		read_in_place(conn, (const uint8_t *)buf->base, (size_t)nread);
	drop_unclaimed_descriptors(conn);
}

/* Until it is empty or may not be read any more. */
static void receive_local(struct conn *conn)
{
	bool full = true;
	while (full && conn->reading_on && !conn->closing) {
		const uv_buf_t room = read_room(conn);
		const ssize_t got = room.len == 0 ? UV_EAGAIN : conn_receive(conn, room.base, room.len);
		if (got == UV_EAGAIN || got == UV_EINTR)
			return;
		full = (size_t)got == room.len;
		on_bytes(conn, got == 0 ? UV_EOF : got, &room);
	}
}

static void on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf)
{
	struct conn *conn = stream->data;
	if (nread != UV_ENOBUFS)
		on_bytes(conn, nread, buf);
	else if (conn->local)
		receive_local(conn);
}

void conn_hold(struct conn *conn)
{
	conn->held = true;
	conn_stop_reading(conn);
}

void conn_go_on(struct conn *conn)
{
	uint8_t *data = conn->held_data;
	const size_t bytes = conn->held_bytes;
	conn->held = false;
	conn->held_data = NULL;
	conn->held_bytes = 0;
	conn->read_us = conn->io->turn_us; /* it was not the client that stalled */
	if (conn->ring == NULL)
		consume_socket(conn, data, bytes);
	else
		conn_consume(conn, data, bytes);
	free(data);
	drop_unclaimed_descriptors(conn);
	conn_start_reading(conn);
}

void conn_start_reading(struct conn *conn)
{
	if (conn->closing || conn->broken || conn->throttled || conn->held)
		return;
	if (conn->ring != NULL)
		ring_wake(conn);
	if (conn->reading_on)
		return;
	int failed = conn->tls == NULL ? uv_read_start(&conn->stream, on_alloc, on_read) : uv_read_start(&conn->stream, conn_tls_on_alloc, conn_tls_on_read);
	if (failed < 0)
		conn_close(conn, LOG_WARN, uv_strerror(failed));
	else
		conn->reading_on = true;
}
