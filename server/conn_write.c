/* What a connection writes: replies, notices, a turn's share of them. */
#include <stdlib.h>
#include <string.h>

#include "proto/codec.h"
#include "server/conn_internal.h"
#include "server/conn_tls.h"
#include "server/daemon.h"
#include "server/metrics.h"
#include "server/request.h"
#include "server/ring.h"

#define WRITE_BUFS 256u
/* Pieces up to this size are copied together before they are written: heads, and payloads behind them. */
#define JOIN_PIECE_BYTES 512u
#define JOIN_BYTES (16u << 10)

/* ---- Writing ---- */

void conn_mark_dirty(struct conn *conn)
{
	if (conn->dirty || conn->closing)
		return;
	conn->dirty = true;
	conn->next_dirty = conn->io->dirty;
	conn->io->dirty = conn;
	io_loop_flush_soon(conn->io);
}

void conn_new_turn(struct conn *conn)
{
	if (conn->turn != conn->io->turn) {
		conn->turn = conn->io->turn;
		conn->io->turn_conns++;
		conn->turn_read = 0;
		conn->turn_written = 0;
		conn->flooding = conn->turn_requests >= CONN_TURN_REQUESTS;
		conn->turn_requests = 0;
		conn->turn_spent = false;
	}
}

void conn_spend_turn(struct conn *conn)
{
	if (conn != NULL)
		conn->turn_spent = true;
}

void conn_progress(struct conn *conn)
{
	if (conn->progress_bytes < CONN_PROGRESS_BYTES && (conn->writing || !outbox_empty(&conn->outbox)))
		return;
	conn->write_us = conn->io->turn_us;
	conn->progress_bytes = 0;
}

static void wrote(struct conn *conn, uint64_t bytes)
{
	conn->turn_written += bytes;
	conn->progress_bytes += bytes;
	outbox_consume(&conn->outbox, bytes);
	conn_progress(conn);
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
	conn_new_turn(conn);
	wrote(conn, conn->wrote_bytes);
	conn_mark_dirty(conn);
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

/* A socket that is only a life line is read on: its end must be seen. */
void conn_stop_reading(struct conn *conn)
{
	if (conn->ring != NULL)
		return;
	if (conn->reading_on)
		(void)uv_read_stop(&conn->stream);
	conn->reading_on = false;
}

/* Large answers that a client doesn't read: with more memory in them no request is begun. */
#define UNREAD_BYTES_MAX (8u << 20)

/* While payloads are half sent there is room for as many requests again: the DATA that requests in flight wait for comes behind them. */
static bool takes_requests(const struct conn *conn)
{
	const uint32_t limit = conn->server->config->limits.in_flight;
	return conn->session->in_flight < (conn->chunked_count == 0 ? limit : 2 * limit) && conn->unread_bytes <= UNREAD_BYTES_MAX && !conn->turn_spent;
}

bool conn_throttle(struct conn *conn)
{
	if (takes_requests(conn))
		return false;
	conn->throttled = true;
	conn_stop_reading(conn);
	if (conn->turn_spent) /* its reply may have left already: the next turn looks again */
		conn_mark_dirty(conn);
	return true;
}

/* Replies were written, or it is another turn: a session that had too much in flight may go on. */
static void unthrottle(struct conn *conn)
{
	if (!conn->throttled || !takes_requests(conn))
		return;
	conn->throttled = false;
	if (conn->held_bytes != 0 && !conn->held) {
		conn_go_on(conn);
		return;
	}
	conn->read_us = conn->io->turn_us; /* it was not the client that stalled */
	conn_start_reading(conn);
}

/* What is written in one call, with small pieces that follow each other as one. */
struct joined {
	unsigned count;
	uv_buf_t bufs[WRITE_BUFS];
	char room[JOIN_BYTES];
};

static void join_small(const uv_buf_t *bufs, unsigned count, struct joined *out)
{
	size_t used = 0;
	bool open = false; /* the last of out->bufs ends where `used` does */
	out->count = 0;
	for (unsigned i = 0; i < count; i++) {
		if (bufs[i].len > JOIN_PIECE_BYTES || bufs[i].len > JOIN_BYTES - used) {
			out->bufs[out->count++] = bufs[i];
			open = false;
			continue;
		}
		if (!open)
			out->bufs[out->count++] = uv_buf_init(out->room + used, 0);
		memcpy(out->room + used, bufs[i].base, bufs[i].len);
		used += bufs[i].len;
		out->bufs[out->count - 1].len += bufs[i].len;
		open = true;
	}
}

/* A function of its own: what it has on the stack must not spread what a lone reply touches over more pages. */
static __attribute__((noinline)) int put_many(struct conn *conn, const uv_buf_t *bufs, unsigned count)
{
	struct joined joined;
	join_small(bufs, count, &joined);
	return uv_try_write(&conn->stream, joined.bufs, joined.count);
}

/* As uv_try_write. The kernel's work for a piece of 64 bytes is several times that of copying it here: the replies of 64 small ops in flight are one piece instead
 * of 128 (0.27 instead of 0.24 of the echo's rate on one core). A lone reply gains nothing by it. */
static int put_socket(struct conn *conn, const uv_buf_t *bufs, unsigned count)
{
	return count <= 2 ? uv_try_write(&conn->stream, bufs, count) : put_many(conn, bufs, count);
}

/* As uv_try_write. Where it says UV_EAGAIN, what is left goes on by itself: libuv writes it, or the ring's client makes room. */
static int put(struct conn *conn, const uv_buf_t *bufs, unsigned count, uint64_t bytes)
{
	if (conn->tls != NULL)
		return conn_tls_put(conn, bufs, count);
	const bool ring = conn->ring != NULL;
	const int written = ring ? ring_put(conn, bufs, count) : put_socket(conn, bufs, count);
	if (written == UV_EAGAIN && ring)
		conn->writing = true;
	else if (written == UV_EAGAIN)
		write_later(conn, bufs, count, bytes);
	return written;
}

void conn_flush(struct conn *conn)
{
	conn_new_turn(conn);
	const uint64_t share = conn->io->crowded ? CONN_TURN_BYTES : CONN_TURN_ALONE_BYTES;
	while (!conn->closing && !conn->writing && conn->turn_written < share) {
		uv_buf_t bufs[WRITE_BUFS];
		uint64_t bytes;
		unsigned count = outbox_gather(&conn->outbox, bufs, WRITE_BUFS, share - conn->turn_written, &bytes);
		if (count == 0)
			break;
		int written = put(conn, bufs, count, bytes);
		if (written >= 0)
			wrote(conn, (uint64_t)written);
		else if (written != UV_EAGAIN)
			conn_close(conn, LOG_INFO, uv_strerror(written));
	}
	if (conn->closing)
		return;
	unthrottle(conn);
	if (conn->closing)
		return;
	if (conn->throttled && conn->turn_spent)
		conn_mark_dirty(conn);
	if (outbox_empty(&conn->outbox)) {
		if (conn->last_words && !conn->writing && conn->session->in_flight == 0)
			conn_close(conn, LOG_INFO, "done");
	} else if (!conn->writing) {
		conn_mark_dirty(conn); /* the turn's share is written: the rest in the next one */
	}
}

void conn_expect_reply(struct conn *conn)
{
	static const struct frame_header any = {.version = FRAME_VERSION};
	uint8_t header[FRAME_HEADER_BYTES];
	if (!conn->local || conn->closing || conn->writing || conn->tls != NULL || conn->ring != NULL || !outbox_empty(&conn->outbox) || conn->outbox.begun_bytes != 0)
		return;
	frame_encode(&any, header);
	const uv_buf_t begin = uv_buf_init((char *)header, FRAME_BEGIN_BYTES);
	const int written = uv_try_write(&conn->stream, &begin, 1);
	if (written > 0) /* what fails now fails again when the reply leaves */
		outbox_begin(&conn->outbox, (uint32_t)written);
}

bool conn_idle(const struct conn *conn)
{
	return conn->session->in_flight == 0 && outbox_empty(&conn->outbox) && !conn->writing;
}

/* ---- Replies ---- */

static void on_reply_written(struct out *out)
{
	struct request *request = (struct request *)((char *)out - offsetof(struct request, out));
	const uint64_t sent_ns = request->context->io->now_ns;
	request->session->in_flight--;
	if (request->session->conn != NULL)
		request->session->conn->unread_bytes -= request->answer_bytes;
	metrics_written(request->context->metrics, sent_ns > request->clock.received ? sent_ns - request->clock.received : 0);
	request_release(request);
}

/* The client's time to read begins with the first reply that waits for it, not with the last one it has read. */
static void begin_writing(struct conn *conn)
{
	if (outbox_empty(&conn->outbox) && !conn->writing)
		conn->write_us = conn->io->turn_us;
}

/* The one place where a reply without a reader is dropped. */
void conn_on_reply(struct request *request)
{
	struct conn *conn = request->session->conn;
	conn_forget_id(request);
	if (conn == NULL || conn->closing || request->frame.frame == NULL) {
		request->session->in_flight--;
		request_release(request);
		return;
	}
	conn->unread_bytes += request->answer_bytes;
	if (request->answer_bytes != 0)
		conn_spend_turn(conn);
	request->out.written = on_reply_written;
	begin_writing(conn);
	outbox_add(&conn->outbox, &request->out, FRAME_REPLY, request->id, request->frame.frame, request->frame.envelope_bytes, request->segments,
	           request->reply_bytes, conn->chunk_bytes);
	conn_mark_dirty(conn);
}

void conn_notice_written(struct out *out)
{
	struct notice *notice = (struct notice *)out;
	arena_fini(&notice->arena);
	free(notice);
}

struct notice *conn_notice_create(void)
{
	struct notice *notice = calloc(1, sizeof *notice);
	if (notice != NULL) {
		arena_init(&notice->arena, 64u << 10);
		notice->out.written = conn_notice_written;
	}
	return notice;
}

void conn_notice_send(struct conn *conn, struct notice *notice, frame_type type, const struct codec_buffer *buffer)
{
	begin_writing(conn);
	outbox_add(&conn->outbox, &notice->out, type, 0, buffer->frame, buffer->envelope_bytes, NULL, 0, 0);
	conn_mark_dirty(conn);
}

/* The last thing that the client hears; the connection is closed when all is written. */
void conn_say_goodbye(struct conn *conn, opd_status status, const char *why)
{
	conn->last_words = true;
	struct notice *notice = conn_notice_create();
	struct codec_buffer buffer;
	const struct msg_goaway goaway = {.status = status, .message = msg_text(why)};
	if (conn->greeted && notice != NULL && codec_encode_goaway(&notice->arena, &goaway, &buffer, NULL) == OPD_OK)
		conn_notice_send(conn, notice, FRAME_GOAWAY, &buffer);
	else if (notice != NULL)
		conn_notice_written(&notice->out);
	conn_mark_dirty(conn); /* an idle one is closed by the flush */
}

void conn_goaway(struct conn *conn, const char *why)
{
	if (!conn->closing && !conn->last_words)
		conn_say_goodbye(conn, OPD_UNAVAILABLE, why);
}

