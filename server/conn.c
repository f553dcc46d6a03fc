#include "server/conn.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/bounds.h"
#include "proto/codec.h"
#include "proto/text.h"
#include "server/daemon.h"
#include "server/request.h"

/* Payloads from this size on are read straight to where they belong; smaller ones are cheaper to copy than to read apart. */
#define DIRECT_BYTES 4096u
#define WRITE_BUFS 256u
/* Requests that a turn accepts, give or take what one read brings; a flood of small ones held the others up for 64 KiB of them at a time (9 ms at most,
 * 23 ms where each reply took work), now for FLOOD_BYTES. */
#define TURN_REQUESTS 128u
#define FLOOD_BYTES (8u << 10)
/* Kernel time on the loop after which a turn reads nothing more; what was read is still run, on a lane when it must. */
#define TURN_KERNEL_NS 15000u

static void conn_consume(struct conn *conn, const uint8_t *data, size_t bytes);
static void abandon_half_sent(struct conn *conn, const char *why);

/* ---- Life ---- */

struct conn *conn_create(struct server *server, const char *tenant, bool admin)
{
	struct conn *conn = calloc(1, sizeof *conn);
	if (conn == NULL)
		return NULL;
	const struct config_limits *limits = &server->config->limits;
	conn->server = server;
	conn->session = session_create(server, &server->memory, ++server->next_session, tenant, admin, limits->session_bytes, limits->kept);
	if (conn->session == NULL) {
		free(conn);
		return NULL;
	}
	conn->session->conn = conn;
	if (getrandom(&conn->chunked_seed, sizeof conn->chunked_seed, GRND_NONBLOCK) < 0)
		conn->chunked_seed = (uint64_t)(uintptr_t)conn; /* early in a boot: less secret, still a seed */
	conn->opened_us = request_now_ns() / 1000;
	conn->read_us = conn->write_us = conn->opened_us;
	conn->next = server->conns;
	if (conn->next != NULL)
		conn->next->previous = conn;
	server->conns = conn;
	server->conn_count++;
	return conn;
}

static void unlink_conn(struct conn *conn)
{
	struct server *server = conn->server;
	*(conn->previous == NULL ? &server->conns : &conn->previous->next) = conn->next;
	if (conn->next != NULL)
		conn->next->previous = conn->previous;
	server->conn_count--;
	for (struct conn **link = &server->dirty; *link != NULL; link = &(*link)->next_dirty) {
		if (*link == conn) {
			*link = conn->next_dirty;
			break;
		}
	}
}

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

static void chunked_remove(struct conn *conn, struct request *request)
{
	*(request->previous == NULL ? chunked_bucket(conn, request->id) : &request->previous->next) = request->next;
	if (request->next != NULL)
		request->next->previous = request->previous;
	request->next = request->previous = NULL;
	conn->chunked_count--;
}

/* ---- Closing ---- */

static void on_closed(uv_handle_t *handle)
{
	struct conn *conn = handle->data;
	struct server *server = conn->server;
	outbox_drop(&conn->outbox);
	conn->session->conn = NULL; /* what is in a lane ends without a reader */
	atomic_store_explicit(&conn->session->gone, true, memory_order_relaxed);
	abandon_half_sent(conn, "the connection ended before the payload was there");
	unlink_conn(conn);
	session_unref(conn->session);
	free(conn->partial);
	free(conn);
	server_wake(server); /* a drain may wait for the last one */
}

void conn_close(struct conn *conn, log_level level, const char *reason)
{
	if (conn->closing)
		return;
	conn->closing = true;
	LOG(conn->server->log, level, "session closed", LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer),
	    LOG_STR("reason", reason), LOG_UINT("in_flight", conn->session->in_flight));
	conn->handle.data = conn;
	uv_close(&conn->handle, on_closed);
}

/* ---- Writing ---- */

static void mark_dirty(struct conn *conn)
{
	if (conn->dirty || conn->closing)
		return;
	conn->dirty = true;
	conn->next_dirty = conn->server->dirty;
	conn->server->dirty = conn;
	server_flush_soon(conn->server);
}

static void new_turn(struct conn *conn)
{
	if (conn->turn != conn->server->turn) {
		conn->turn = conn->server->turn;
		conn->turn_read = 0;
		conn->turn_written = 0;
		conn->flooding = conn->turn_requests >= TURN_REQUESTS;
		conn->turn_requests = 0;
	}
}

static void wrote(struct conn *conn, uint64_t bytes)
{
	conn->write_us = conn->server->turn_us;
	conn->turn_written += bytes;
	outbox_consume(&conn->outbox, bytes);
}

static void on_written(uv_write_t *write, int status)
{
	struct conn *conn = write->data;
	conn->writing = false;
	if (conn->closing)
		return;
	if (status < 0) {
		conn_close(conn, LOG_INFO, uv_strerror(status));
		return;
	}
	new_turn(conn);
	wrote(conn, conn->wrote_bytes);
	mark_dirty(conn);
}

/* The socket is full: libuv writes this batch when it can. */
static void write_later(struct conn *conn, const uv_buf_t *bufs, unsigned count, uint64_t bytes)
{
	conn->write.data = conn;
	conn->wrote_bytes = bytes;
	int failed = uv_write(&conn->write, &conn->stream, bufs, count, on_written);
	if (failed < 0)
		conn_close(conn, LOG_WARN, uv_strerror(failed));
	else
		conn->writing = true;
}

static void start_reading(struct conn *conn);

static void stop_reading(struct conn *conn)
{
	if (conn->reading_on)
		(void)uv_read_stop(&conn->stream);
	conn->reading_on = false;
}

/* While payloads are half sent there is room for as many requests again: the DATA that requests in flight wait for comes behind them. */
static bool too_much_in_flight(const struct conn *conn)
{
	uint32_t limit = conn->server->config->limits.in_flight;
	return conn->session->in_flight >= (conn->chunked_count == 0 ? limit : 2 * limit);
}

/* Never within a payload: its request may be the one that the limit waits for. Its end looks again. */
static void throttle(struct conn *conn)
{
	if (conn->throttled || conn->state == CONN_PAYLOAD || !too_much_in_flight(conn))
		return;
	conn->throttled = true;
	stop_reading(conn);
}

/* Replies were written: a session that had too much in flight may go on. */
static void unthrottle(struct conn *conn)
{
	if (!conn->throttled || too_much_in_flight(conn))
		return;
	conn->throttled = false;
	conn->read_us = conn->server->turn_us; /* it was not the client that stalled */
	start_reading(conn);
}

void conn_flush(struct conn *conn)
{
	new_turn(conn);
	while (!conn->closing && !conn->writing && conn->turn_written < CONN_TURN_BYTES) {
		uv_buf_t bufs[WRITE_BUFS];
		uint64_t bytes;
		unsigned count = outbox_gather(&conn->outbox, bufs, WRITE_BUFS, CONN_TURN_BYTES - conn->turn_written, &bytes);
		if (count == 0)
			break;
		int written = uv_try_write(&conn->stream, bufs, count);
		if (written == UV_EAGAIN)
			write_later(conn, bufs, count, bytes);
		else if (written < 0)
			conn_close(conn, LOG_INFO, uv_strerror(written));
		else
			wrote(conn, (uint64_t)written);
	}
	if (conn->closing)
		return;
	unthrottle(conn);
	if (outbox_empty(&conn->outbox)) {
		if (conn->last_words && conn->session->in_flight == 0)
			conn_close(conn, LOG_INFO, "done");
	} else if (!conn->writing) {
		mark_dirty(conn); /* the turn's share is written: the rest in the next one */
	}
}

bool conn_idle(const struct conn *conn)
{
	return conn->session->in_flight == 0 && outbox_empty(&conn->outbox);
}

/* ---- Replies ---- */

static void on_reply_written(struct out *out)
{
	struct request *request = (struct request *)((char *)out - offsetof(struct request, out));
	request->session->in_flight--;
	request_release(request);
}

/* The client's time to read begins with the first reply that waits for it, not with the last one it has read. */
static void begin_writing(struct conn *conn)
{
	if (outbox_empty(&conn->outbox))
		conn->write_us = conn->server->turn_us;
}

/* The one place where a reply without a reader is dropped. */
static void on_reply(struct request *request)
{
	struct conn *conn = request->session->conn;
	if (conn == NULL || conn->closing || request->frame.frame == NULL) {
		request->session->in_flight--;
		request_release(request);
		return;
	}
	request->out.written = on_reply_written;
	begin_writing(conn);
	outbox_add(&conn->outbox, &request->out, FRAME_REPLY, request->id, request->frame.frame, request->frame.envelope_bytes, request->segments,
	           request->reply_bytes, conn->chunk_bytes);
	mark_dirty(conn);
}

/* A frame of the session's own: Hello's reply, Goaway. Has its arena with it. */
struct notice {
	struct out out; /* first */
	struct arena arena;
};

static void on_notice_written(struct out *out)
{
	struct notice *notice = (struct notice *)out;
	arena_fini(&notice->arena);
	free(notice);
}

static struct notice *notice_create(void)
{
	struct notice *notice = calloc(1, sizeof *notice);
	if (notice != NULL) {
		arena_init(&notice->arena, 64u << 10);
		notice->out.written = on_notice_written;
	}
	return notice;
}

static void notice_send(struct conn *conn, struct notice *notice, frame_type type, const struct codec_buffer *buffer)
{
	begin_writing(conn);
	outbox_add(&conn->outbox, &notice->out, type, 0, buffer->frame, buffer->envelope_bytes, NULL, 0, 0);
	mark_dirty(conn);
}

/* The last thing that the client hears; the connection is closed when all is written. */
static void say_goodbye(struct conn *conn, opd_status status, const char *why)
{
	conn->last_words = true;
	struct notice *notice = notice_create();
	struct codec_buffer buffer;
	const struct msg_goaway goaway = {.status = status, .message = msg_text(why)};
	if (conn->greeted && notice != NULL && codec_encode_goaway(&notice->arena, &goaway, &buffer, NULL) == OPD_OK)
		notice_send(conn, notice, FRAME_GOAWAY, &buffer);
	else if (notice != NULL)
		on_notice_written(&notice->out);
	mark_dirty(conn); /* an idle one is closed by the flush */
}

void conn_goaway(struct conn *conn, const char *why)
{
	if (!conn->closing && !conn->last_words)
		say_goodbye(conn, OPD_UNAVAILABLE, why);
}

/* ---- Hello ---- */

static void send_hello_reply(struct conn *conn, const opd_error *refused)
{
	const struct config_limits *limits = &conn->server->config->limits;
	struct msg_hello_reply reply = {
		.status = refused == NULL ? OPD_OK : (opd_status)refused->status,
		.message = msg_text(refused == NULL ? "" : refused->text),
		.version = 1,
		.server = msg_text("opd " OPD_VERSION),
		.chunk_bytes = conn->chunk_bytes,
		.limits = {limits->envelope_bytes, limits->request_bytes, limits->session_bytes, limits->in_flight},
		.session = conn->session->id,
		.tenant = msg_text(conn->session->tenant),
		.admin = conn->session->admin,
	};
	struct notice *notice = notice_create();
	struct codec_buffer buffer;
	if (notice == NULL || codec_encode_hello_reply(&notice->arena, &reply, &buffer, NULL) != OPD_OK) {
		if (notice != NULL)
			on_notice_written(&notice->out);
		conn_close(conn, LOG_ERROR, "out of memory for a Hello reply");
		return;
	}
	notice_send(conn, notice, FRAME_HELLO_REPLY, &buffer);
	conn->last_words = refused != NULL;
}

static void refuse_hello(struct conn *conn, const opd_error *error)
{
	conn->broken = true; /* one answer, however much comes behind */
	stop_reading(conn);
	LOG(conn->server->log, LOG_WARN, "session refused", LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer),
	    LOG_STR("reason", error->text));
	send_hello_reply(conn, error);
}

static opd_status check_hello(const struct msg_hello *hello, opd_error *error)
{
	if (hello->version_min > hello->version_max || hello->version_min > 1 || hello->version_max < 1)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "hello: client speaks protocol versions %u to %u, this server 1",
		                (unsigned)hello->version_min, (unsigned)hello->version_max);
	if (hello->reattach_bytes != 0)
		return opd_fail(error, OPD_UNIMPLEMENTED, "hello: sessions can't be attached to again");
	if (hello->chunk_bytes != 0 && (hello->chunk_bytes < BOUND_CHUNK_BYTES_MIN || hello->chunk_bytes > BOUND_CHUNK_BYTES_MAX))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "hello: chunk_bytes %" PRIu64 ", expected %u to %u", hello->chunk_bytes,
		                BOUND_CHUNK_BYTES_MIN, BOUND_CHUNK_BYTES_MAX);
	return OPD_OK;
}

static void on_hello(struct conn *conn, const uint8_t *envelope, size_t bytes)
{
	struct arena arena;
	struct msg_hello hello;
	opd_error error;
	arena_init(&arena, 64u << 10);
	opd_status status = codec_decode_hello(&arena, envelope, bytes, &hello, &error);
	if (status == OPD_OK)
		status = check_hello(&hello, &error);
	if (status == OPD_OK) {
		conn->greeted = true;
		conn->chunk_bytes = hello.no_chunks ? 0 : hello.chunk_bytes == 0 ? BOUND_CHUNK_BYTES_DEFAULT : hello.chunk_bytes;
		LOG(conn->server->log, LOG_INFO, "session opened", LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer),
		    LOG_STR("tenant", conn->session->tenant), LOG_STR("client", hello.client.data));
		send_hello_reply(conn, NULL);
	} else {
		refuse_hello(conn, &error);
	}
	arena_fini(&arena);
}

/* ---- Frames ---- */

/* Requests whose payload is not there yet end now: it won't come. */
static void abandon_half_sent(struct conn *conn, const char *why)
{
	struct request *reading = conn->reading;
	conn->reading = NULL;
	if (reading != NULL && !reading->chunked)
		request_abandon(reading, OPD_CANCELLED, why);
	for (size_t i = 0; conn->chunked_count != 0 && i < sizeof conn->chunked / sizeof conn->chunked[0]; i++) {
		while (conn->chunked[i] != NULL) {
			struct request *request = conn->chunked[i];
			chunked_remove(conn, request);
			request_abandon(request, OPD_CANCELLED, why);
		}
	}
}

/* Where the next frame begins is not known any more. The client is told why; what it has in flight is still answered. */
static void protocol_error(struct conn *conn, const char *what)
{
	if (conn->broken)
		return;
	conn->broken = true;
	stop_reading(conn);
	opd_error error;
	(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "%s", what);
	if (!conn->greeted) {
		refuse_hello(conn, &error);
		return;
	}
	char shown[300];
	LOG(conn->server->log, LOG_WARN, "protocol error", LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer),
	    LOG_STR("reason", text_escape(what, strlen(what), shown, sizeof shown)));
	abandon_half_sent(conn, "the connection ended before the payload was there");
	conn->last_words = false;
	say_goodbye(conn, OPD_INVALID_ARGUMENT, what);
}

static void expect_payload(struct conn *conn, struct request *request, uint64_t bytes)
{
	conn->state = bytes == 0 ? CONN_HEAD : request == NULL ? CONN_DISCARD : CONN_PAYLOAD;
	conn->reading = bytes == 0 ? NULL : request;
	conn->frame_left = bytes;
}

/* A request that is refused before it is one: it still gets its reply. */
static void check_request(struct conn *conn, struct request *request, const struct frame_header *header, const uint8_t *envelope)
{
	struct session *session = conn->session;
	const struct config_limits *limits = &conn->server->config->limits;
	bool chunked = (header->flags & FRAME_CHUNKED) != 0;
	opd_status status;
	if (header->request_id <= session->last_request)
		status = opd_fail(&request->error, OPD_INVALID_ARGUMENT, "request id %" PRIu64 " is not above %" PRIu64 ", the last one", header->request_id,
		                  session->last_request);
	else if (conn->server->draining)
		status = opd_fail(&request->error, OPD_UNAVAILABLE, "the server is draining");
	else if (header->payload_bytes > limits->request_bytes)
		status = opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "payload of %" PRIu64 " bytes, at most %" PRIu64, header->payload_bytes,
		                  limits->request_bytes);
	else if (chunked && conn->chunk_bytes == 0)
		status = opd_fail(&request->error, OPD_INVALID_ARGUMENT, "a chunked request, but this connection negotiated no chunks");
	else
		status = request_accept(request, envelope, header->envelope_bytes, header->payload_bytes);
	if (header->request_id > session->last_request)
		session->last_request = header->request_id;

	request->chunked = chunked && header->payload_bytes != 0;
	uint64_t follows = chunked ? 0 : header->payload_bytes;
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

static void on_request(struct conn *conn, const struct frame_header *header, const uint8_t *envelope)
{
	struct request *request = request_create(&conn->server->context, conn->session, header->request_id);
	if (request == NULL) {
		conn_close(conn, LOG_ERROR, "out of memory for a request");
		return;
	}
	conn->session->in_flight++;
	conn->turn_requests++;
	request->on_reply = on_reply;
	uint32_t head = FRAME_HEADER_BYTES + header->envelope_bytes;
	conn->read_hint = header->payload_bytes >= DIRECT_BYTES && (header->flags & FRAME_CHUNKED) == 0 ? head : 0;
	check_request(conn, request, header, envelope);
	throttle(conn);
}

static void on_data(struct conn *conn, const struct frame_header *header, const uint8_t *envelope)
{
	struct request *request = chunked_find(conn, header->request_id);
	conn->read_hint = FRAME_HEADER_BYTES + FRAME_DATA_OFFSET_BYTES;
	if (request == NULL) {
		if (header->request_id > conn->session->last_request)
			protocol_error(conn, "a DATA frame for a request that was never sent");
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
	chunked_remove(conn, request);
	expect_payload(conn, NULL, header->payload_bytes);
	request_abandon(request, OPD_INVALID_ARGUMENT, text);
}

static void on_abort(struct conn *conn, uint64_t id)
{
	struct request *request = chunked_find(conn, id);
	if (request == NULL)
		return; /* answered already, or never chunked: nothing to end */
	chunked_remove(conn, request);
	request_abandon(request, OPD_CANCELLED, "the client aborted the request");
}

static void on_frame(struct conn *conn, const struct frame_header *header, const uint8_t *envelope)
{
	if (!conn->greeted) {
		on_hello(conn, envelope, header->envelope_bytes);
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
		break; /* a wish; this server lets the request end by itself */
	default:
		protocol_error(conn, "a frame of a type that only servers send");
	}
}

/* What the header alone tells, before a byte of the envelope is kept. */
static bool check_header(struct conn *conn, const struct frame_header *header)
{
	uint64_t limit = conn->greeted ? conn->server->config->limits.envelope_bytes : BOUND_HELLO_BYTES;
	char text[120];
	if (!conn->greeted && (header->type != FRAME_HELLO || header->payload_bytes != 0)) {
		protocol_error(conn, "the first frame is no Hello");
		return false;
	}
	if (conn->greeted && header->type == FRAME_HELLO) {
		protocol_error(conn, "a second Hello");
		return false;
	}
	if (header->envelope_bytes > limit) {
		(void)snprintf(text, sizeof text, "an envelope of %" PRIu32 " bytes, at most %" PRIu64, header->envelope_bytes, limit);
		protocol_error(conn, text);
		return false;
	}
	if ((header->type == FRAME_ABORT || header->type == FRAME_CANCEL) && header->payload_bytes != 0) {
		protocol_error(conn, "an ABORT or CANCEL frame with a payload");
		return false;
	}
	return true;
}

/* ---- Reading ---- */

static bool decode_header(struct conn *conn, const uint8_t *bytes, struct frame_header *header_out)
{
	opd_error error;
	if (frame_decode(bytes, header_out, &error) == OPD_OK)
		return check_header(conn, header_out);
	protocol_error(conn, error.text);
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

/* Adds to the partial head up to `whole` bytes; returns how many were taken. */
static size_t extend_partial(struct conn *conn, const uint8_t *data, size_t bytes, uint32_t whole)
{
	size_t missing = whole - conn->partial_bytes;
	size_t taken = bytes < missing ? bytes : missing;
	return keep_partial(conn, data, taken, whole) ? taken : bytes; /* out of memory: the connection is closing */
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
	uint32_t whole = FRAME_HEADER_BYTES + header.envelope_bytes;
	if (conn->partial_bytes < whole)
		taken += extend_partial(conn, data + taken, bytes - taken, whole);
	if (conn->closing || conn->partial_bytes < whole)
		return taken;
	conn->partial_bytes = 0; /* on_frame doesn't come back here */
	on_frame(conn, &header, conn->partial + FRAME_HEADER_BYTES);
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
	uint32_t whole = FRAME_HEADER_BYTES + header.envelope_bytes;
	if (bytes < whole) {
		(void)keep_partial(conn, data, bytes, whole);
		return bytes;
	}
	on_frame(conn, &header, data + FRAME_HEADER_BYTES);
	return whole;
}

/* `bytes` of the payload are where they belong. */
static void received_payload(struct conn *conn, uint64_t bytes)
{
	struct request *request = conn->reading;
	conn->frame_left -= bytes;
	if (request != NULL)
		request->payload_received += bytes;
	if (conn->frame_left != 0)
		return;
	conn->state = CONN_HEAD;
	conn->reading = NULL;
	if (request == NULL || request->payload_received != request->payload_bytes)
		return;
	if (request->chunked)
		chunked_remove(conn, request);
	request_start(request);
	throttle(conn);
}

static unsigned char *payload_at(const struct conn *conn)
{
	return conn->reading->payload->data + conn->reading->payload_received;
}

static void conn_consume(struct conn *conn, const uint8_t *data, size_t bytes)
{
	while (bytes > 0 && !conn->closing && !conn->broken) {
		size_t taken;
		if (conn->state == CONN_HEAD) {
			taken = consume_head(conn, data, bytes);
		} else {
			taken = bytes < conn->frame_left ? bytes : (size_t)conn->frame_left;
			if (conn->state == CONN_PAYLOAD)
				memcpy(payload_at(conn), data, taken);
			received_payload(conn, taken);
		}
		data += taken;
		bytes -= taken;
	}
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
	return conn->turn_read >= CONN_TURN_BYTES || conn->turn_requests >= TURN_REQUESTS || conn->server->context.inline_ns > TURN_KERNEL_NS;
}

/* An empty buffer makes libuv leave the socket for the next turn, without the two epoll_ctl of a stop and a start. */
static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
	struct conn *conn = handle->data;
	(void)suggested;
	new_turn(conn);
	*buf = uv_buf_init(NULL, 0);
	if (turn_over(conn))
		return;
	if (conn->state == CONN_PAYLOAD) {
		uint64_t left = conn->frame_left + slack_bytes(conn);
		uint64_t share = CONN_TURN_BYTES - (conn->turn_read < CONN_TURN_BYTES / 2 ? conn->turn_read : CONN_TURN_BYTES / 2);
		*buf = uv_buf_init((char *)payload_at(conn), (unsigned)(left < share ? left : share));
		return;
	}
	size_t bytes = conn->flooding ? FLOOD_BYTES : CONN_STAGE_BYTES;
	if (conn->state == CONN_HEAD && conn->read_hint != 0)
		bytes = conn->read_hint > conn->partial_bytes ? conn->read_hint - conn->partial_bytes : FRAME_HEADER_BYTES;
	*buf = uv_buf_init(conn->server->stage, (unsigned)(bytes < CONN_STAGE_BYTES ? bytes : CONN_STAGE_BYTES));
}

/* Payload read in place, and perhaps the next frame's head behind it. */
static void read_in_place(struct conn *conn, const uint8_t *base, size_t bytes)
{
	size_t payload = bytes < conn->frame_left ? bytes : (size_t)conn->frame_left;
	uint8_t head[BUFFER_SLACK_BYTES];
	size_t extra = bytes - payload;
	memcpy(head, base + payload, extra); /* the buffer may be gone once its request has run */
	received_payload(conn, payload);
	conn_consume(conn, head, extra);
}

static void on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf)
{
	struct conn *conn = stream->data;
	if (nread == UV_ENOBUFS)
		return;
	if (nread < 0) {
		conn_close(conn, LOG_INFO, nread == UV_EOF ? "the client closed" : uv_strerror((int)nread));
		return;
	}
	if (nread == 0)
		return;
	conn->read_us = conn->server->turn_us;
	conn->turn_read += (uint64_t)nread;
	if (buf->base == conn->server->stage)
		conn_consume(conn, (const uint8_t *)buf->base, (size_t)nread);
	else
		read_in_place(conn, (const uint8_t *)buf->base, (size_t)nread);
}

static void start_reading(struct conn *conn)
{
	if (conn->closing || conn->broken || conn->reading_on || conn->throttled)
		return;
	int failed = uv_read_start(&conn->stream, on_alloc, on_read);
	if (failed < 0)
		conn_close(conn, LOG_WARN, uv_strerror(failed));
	else
		conn->reading_on = true;
}

void conn_start(struct conn *conn, const opd_error *refuse)
{
	conn->handle.data = conn;
	if (refuse != NULL)
		refuse_hello(conn, refuse);
	else
		start_reading(conn);
}

/* ---- Stalls ---- */

void conn_tick(struct conn *conn, uint64_t now_us)
{
	const struct config_limits *limits = &conn->server->config->limits;
	bool half_read = !conn->broken && (conn->partial_bytes != 0 || conn->state != CONN_HEAD || conn->chunked_count != 0);
	/* Throttled, it isn't read: then only payloads that nothing in flight can do without are stalled, and only when nothing is answered either. */
	uint64_t read_us = !conn->throttled || conn->read_us > conn->write_us ? conn->read_us : conn->write_us;
	if (conn->closing)
		return;
	if (!conn->greeted && now_us > conn->opened_us && now_us - conn->opened_us > limits->handshake_us)
		conn_close(conn, LOG_WARN, "no Hello within the handshake's time");
	else if (half_read && (!conn->throttled || conn->chunked_count != 0) && now_us > read_us && now_us - read_us > limits->stall_us)
		conn_close(conn, LOG_WARN, "a half-sent request stalled");
	else if (!outbox_empty(&conn->outbox) && now_us > conn->write_us && now_us - conn->write_us > limits->stall_us)
		conn_close(conn, LOG_WARN, "the client doesn't read its replies");
}
