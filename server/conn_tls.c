#include "server/conn_tls.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "server/conn_internal.h"
#include "server/daemon.h"
#include "server/tls_context.h"

/* Of a loop's connections at a time so many keep OpenSSL's buffers: 2 MiB that nobody misses. Where thousands are connected, the later ones do without. */
#define CONNS_WITH_BUFFERS 64u

struct conn_tls {
	struct tls tls;
	struct conn *conn;
	struct conn_tls *next; /* in the jobs' list */
	bool computing;        /* waits for a thread, or is in one: nobody else touches `tls` */
	bool closed;           /* the socket is closed meanwhile */
	uint8_t *held;         /* ciphertext of the handshake, as far as it isn't used */
	size_t held_bytes;
	size_t received;       /* ciphertext bytes before the handshake was over */
	uint8_t *sending;      /* libuv's until it is written */
	uv_work_t work;
	opd_status status;     /* of the handshake */
	opd_error error;
	opd_error *refused;    /* what the client is told once it can be; NULL: it is served */
};

struct conn_tls *conn_tls_create(struct conn *conn)
{
	struct conn_tls *own = calloc(1, sizeof *own);
	if (own != NULL)
		own->conn = conn;
	return own;
}

bool conn_tls_destroy(struct conn *conn)
{
	struct conn_tls *own = conn->tls;
	if (own == NULL)
		return true;
	own->closed = true;
	if (own->computing)
		return false;
	tls_fini(&own->tls);
	free(own->held);
	free(own->sending);
	free(own->refused);
	free(own);
	conn->tls = NULL;
	return true;
}

/* ---- Sending ---- */

static void on_sent(uv_write_t *write, int status)
{
	struct conn *conn = write->data;
	struct conn_tls *own = conn->tls;
	conn->writing = false;
	free(own->sending);
	own->sending = NULL;
	if (conn->closing)
		return;
	if (status < 0) {
		conn_close(conn, LOG_INFO, uv_strerror(status));
		return;
	}
	conn_new_turn(conn);
	conn_progress(conn);
	conn_mark_dirty(conn);
}

/* What is sealed goes out, now or when the socket has room. 0 or libuv's error. */
static int push(struct conn *conn)
{
	struct conn_tls *own = conn->tls;
	if (own->tls.out_bytes == 0 || conn->writing)
		return 0;
	const uv_buf_t now = uv_buf_init((char *)own->tls.out, (unsigned)own->tls.out_bytes);
	const int written = uv_try_write(&conn->stream, &now, 1);
	if (written < 0 && written != UV_EAGAIN)
		return written;
	if (!tls_sent(&own->tls, written < 0 ? 0 : (size_t)written))
		return UV_ENOMEM;
	if (own->tls.out_bytes == 0)
		return 0;
	own->sending = own->tls.out;
	const uv_buf_t later = uv_buf_init((char *)own->sending, (unsigned)own->tls.out_bytes);
	own->tls.out = NULL;
	own->tls.out_bytes = own->tls.out_room = 0;
	conn->write.data = conn;
	const int failed = uv_write(&conn->write, &conn->stream, &later, 1, on_sent);
	conn->writing = failed == 0;
	return failed;
}

static void push_or_close(struct conn *conn)
{
	const int failed = push(conn);
	if (failed != 0)
		conn_close(conn, LOG_INFO, uv_strerror(failed));
}

/* Not inlined: its room must not spread what others touch. */
static __attribute__((noinline)) opd_status seal(struct conn *conn, const uv_buf_t *bufs, unsigned count, size_t *taken_out, opd_error *error)
{
	struct iovec pieces[64];
	const size_t some = count < 64 ? count : 64;
	for (size_t i = 0; i < some; i++)
		pieces[i] = (struct iovec){bufs[i].base, bufs[i].len};
	return tls_write(&conn->tls->tls, pieces, some, taken_out, error);
}

int conn_tls_put(struct conn *conn, const uv_buf_t *bufs, unsigned count)
{
	opd_error error;
	size_t taken;
	assert(conn->tls->tls.established);
	/* What an answer to a key update left goes first. */
	int failed = push(conn);
	if (failed != 0 || conn->writing)
		return failed != 0 ? failed : UV_EAGAIN;
	tls_lend(&conn->tls->tls, conn->io->tls_sealed, TLS_SEALED_BYTES);
	if (seal(conn, bufs, count, &taken, &error) != OPD_OK) {
		conn_close(conn, LOG_WARN, error.text);
		return UV_EAGAIN;
	}
	failed = push(conn);
	assert(!conn->tls->tls.out_lent || failed != 0); /* the loop's buffer is free for the next connection */
	return failed != 0 ? failed : (int)taken;
}

void conn_tls_goodbye(struct conn *conn)
{
	struct conn_tls *own = conn->tls;
	if (own->computing || conn->writing || own->tls.ssl == NULL)
		return;
	tls_shutdown(&own->tls);
	if (own->tls.out_bytes != 0) {
		const uv_buf_t last = uv_buf_init((char *)own->tls.out, (unsigned)own->tls.out_bytes);
		(void)uv_try_write(&conn->stream, &last, 1);
	}
}

/* ---- Records ---- */

/* All of it: what isn't a whole record stays in OpenSSL's own buffer, the rest goes where it belongs. */
static void open_records(struct conn *conn, const uint8_t *data, size_t bytes)
{
	struct conn_tls *own = conn->tls;
	opd_error error;
	own->tls.in = data;
	own->tls.in_bytes = bytes;
	while (!conn->closing && !conn->broken) {
		uint64_t room;
		uint8_t *to = conn_payload_room(conn, &room);
		const bool direct = to != NULL && room != 0;
		size_t got;
		if (!direct) {
			to = (uint8_t *)conn->io->stage;
			room = CONN_STAGE_BYTES;
		}
		if (tls_read(&own->tls, to, (size_t)room, &got, &error) != OPD_OK) {
			conn_close(conn, LOG_WARN, error.text);
			return;
		}
		if (got == 0)
			break;
		if (direct)
			conn_received_payload(conn, got);
		else
			conn_consume(conn, to, got);
	}
	if (conn->closing)
		return;
	if (own->tls.ended)
		conn_close(conn, LOG_INFO, "the client closed");
	else
		push_or_close(conn);
}

/* ---- Handshake ---- */

static void start_jobs(struct io_loop *io);

/* On a thread of the pool. */
static void compute(uv_work_t *work)
{
	struct conn_tls *own = (struct conn_tls *)((char *)work - offsetof(struct conn_tls, work));
	own->tls.in = own->held;
	own->tls.in_bytes = own->held_bytes;
	own->status = tls_handshake(&own->tls, &own->error);
	OPENSSL_thread_stop(); /* the thread is libuv's, and may end after OpenSSL could forget what it keeps for it: a few microseconds of a handshake's hundreds */
}

static void refuse(struct conn *conn, const opd_error *error)
{
	static struct log_limit limit;
	uint32_t suppressed;
	if (log_limit_take(&limit, 5, &suppressed))
		LOG(conn->server->log, LOG_WARN, "handshake failed", LOG_STR("peer", conn->peer), LOG_STR("reason", error->text), LOG_UINT("suppressed", suppressed));
	conn_close(conn, LOG_DEBUG, error->text);
}

bool conn_tls_refuse_later(struct conn *conn, const opd_error *error)
{
	conn->tls->refused = malloc(sizeof *error);
	if (conn->tls->refused != NULL)
		*conn->tls->refused = *error;
	return conn->tls->refused != NULL;
}

/* The client's first frames may have come with the end of its handshake. */
static void go_on(struct conn *conn)
{
	struct conn_tls *own = conn->tls;
	if (own->refused != NULL) {
		conn_refuse_hello(conn, own->refused);
		return;
	}
	uint8_t *rest = own->held;
	const size_t bytes = own->tls.in_bytes;
	const uint8_t *data = own->tls.in;
	own->held = NULL;
	own->held_bytes = 0;
	conn_new_turn(conn);
	if (bytes != 0)
		open_records(conn, data, bytes);
	free(rest);
}

static void keep_rest(struct conn_tls *own)
{
	if (own->tls.in_bytes != 0)
		memmove(own->held, own->tls.in, own->tls.in_bytes);
	own->held_bytes = own->tls.in_bytes;
}

static void on_computed(uv_work_t *work, int status)
{
	struct conn_tls *own = (struct conn_tls *)((char *)work - offsetof(struct conn_tls, work));
	struct conn *conn = own->conn;
	(void)status; /* nobody cancels it */
	own->computing = false;
	conn->io->tls_jobs.running--;
	start_jobs(conn->io);
	if (own->closed) {
		conn_closed(conn);
		return;
	}
	if (conn->closing)
		return;
	push_or_close(conn);
	if (conn->closing)
		return;
	if (own->status != OPD_OK) {
		refuse(conn, &own->error);
		return;
	}
	if (own->tls.established) {
		conn->server->tls_handshakes++;
		conn->server->tls_resumed += SSL_session_reused(own->tls.ssl) == 1;
		if (conn->io->conn_count <= CONNS_WITH_BUFFERS)
			tls_keep_buffers(&own->tls);
		go_on(conn);
	} else {
		keep_rest(own);
	}
	if (!conn->closing)
		conn_start_reading(conn);
}

static void start_jobs(struct io_loop *io)
{
	struct tls_jobs *jobs = &io->tls_jobs;
	while (jobs->first != NULL && jobs->running < (io->server->loop_count == 1 ? TLS_THREADS : 1)) {
		struct conn_tls *own = jobs->first;
		jobs->first = own->next;
		if (jobs->first == NULL)
			jobs->last = NULL;
		if (own->conn->closing) { /* nobody waits for it any more */
			own->computing = false;
			if (own->closed)
				conn_closed(own->conn);
			continue;
		}
		jobs->running++;
		(void)uv_queue_work(&io->loop, &own->work, compute, on_computed); /* it fails only without a function */
	}
}

static void submit(struct conn *conn)
{
	struct tls_jobs *jobs = &conn->io->tls_jobs;
	struct conn_tls *own = conn->tls;
	conn_stop_reading(conn);
	own->computing = true;
	own->next = NULL;
	*(jobs->last == NULL ? &jobs->first : &jobs->last->next) = own;
	jobs->last = own;
	start_jobs(conn->io);
}

/* A client of the plain protocol gets an answer that it understands. */
static bool is_plain(const struct conn_tls *own)
{
	return own->held_bytes >= 4 && memcmp(own->held, "OPD1", 4) == 0;
}

static void answer_plain(struct conn *conn)
{
	opd_error error;
	(void)opd_fail(&error, OPD_FAILED_PRECONDITION, "this port speaks TLS, and the client doesn't: use tls:// instead of tcp://");
	const bool destroyed = conn_tls_destroy(conn);
	assert(destroyed); /* nothing was computed yet */
	(void)destroyed;
	conn_refuse_hello(conn, &error);
}

static bool hold(struct conn_tls *own, const uint8_t *data, size_t bytes)
{
	uint8_t *held = realloc(own->held, own->held_bytes + bytes);
	if (held == NULL)
		return false;
	memcpy(held + own->held_bytes, data, bytes);
	own->held = held;
	own->held_bytes += bytes;
	own->received += bytes;
	return true;
}

static void on_handshake_bytes(struct conn *conn, const uint8_t *data, size_t bytes)
{
	struct conn_tls *own = conn->tls;
	opd_error error;
	if (own->received + bytes > TLS_HANDSHAKE_BYTES) {
		(void)opd_fail(&error, OPD_RESOURCE_EXHAUSTED, "TLS: more than %u bytes before the handshake was over", TLS_HANDSHAKE_BYTES);
		refuse(conn, &error);
		return;
	}
	if (!hold(own, data, bytes)) {
		conn_close(conn, LOG_ERROR, "out of memory for a handshake");
		return;
	}
	if (own->tls.ssl == NULL && is_plain(own)) {
		answer_plain(conn);
		return;
	}
	if (own->tls.ssl == NULL && tls_init(&own->tls, conn->server->config->tls_context->ssl, true, &error) != OPD_OK) {
		conn_close(conn, LOG_ERROR, error.text);
		return;
	}
	submit(conn);
}

/* ---- Who it is ---- */

bool conn_tls_has_certificate(const struct conn *conn)
{
	X509 *certificate = SSL_get1_peer_certificate(conn->tls->tls.ssl);
	const bool verified = certificate != NULL && SSL_get_verify_result(conn->tls->tls.ssl) == X509_V_OK;
	X509_free(certificate);
	return verified;
}

bool conn_tls_subject(const struct conn *conn, char out[TLS_SUBJECT_BYTES])
{
	X509 *certificate = SSL_get1_peer_certificate(conn->tls->tls.ssl);
	const bool fits = certificate != NULL && tls_subject(certificate, out) && out[0] != '\0';
	X509_free(certificate);
	return fits;
}

/* ---- Reading ---- */

void conn_tls_on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
	struct conn *conn = handle->data;
	(void)suggested;
	conn_new_turn(conn);
	/* Before the handshake is over no more than what may come then. */
	const unsigned bytes = conn->tls == NULL || !conn->tls->tls.established ? TLS_HANDSHAKE_BYTES / 2 : TLS_STAGE_BYTES;
	*buf = conn_may_read(conn) ? uv_buf_init((char *)conn->io->tls_stage, bytes) : uv_buf_init(NULL, 0);
}

void conn_tls_on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf)
{
	struct conn *conn = stream->data;
	if (nread == UV_ENOBUFS || nread == 0)
		return;
	if (nread < 0) {
		conn_close(conn, LOG_INFO, nread == UV_EOF ? "the client closed" : uv_strerror((int)nread));
		return;
	}
	if (conn->broken)
		return;
	conn->read_us = conn->io->turn_us;
	conn->turn_read += (uint64_t)nread;
	if (conn->tls->tls.established)
		open_records(conn, (const uint8_t *)buf->base, (size_t)nread);
	else
		on_handshake_bytes(conn, (const uint8_t *)buf->base, (size_t)nread);
}
