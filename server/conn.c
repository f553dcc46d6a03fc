#include "server/conn.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/bounds.h"
#include "proto/codec.h"
#include "server/conn_internal.h"
#include "server/conn_tls.h"
#include "server/daemon.h"
#include "server/listener.h"
#include "server/publications.h"
#include "server/request.h"
#include "server/ring.h"

/* ---- Life ---- */

static struct conn *make(struct io_loop *io, struct access *access)
{
	struct server *server = io->server;
	struct conn *conn = calloc(1, sizeof *conn);
	if (conn == NULL) {
		access_unref(access);
		return NULL;
	}
	const struct config_limits *limits = &server->config->limits;
	conn->io = io;
	conn->busy = true;
	conn->server = server;
	conn->session = session_create(server, &server->memory, atomic_fetch_add_explicit(&server->last_session, 1, memory_order_relaxed) + 1, access, limits->session_bytes, limits->kept);
	if (conn->session == NULL) {
		free(conn);
		return NULL;
	}
	conn->session->conn = conn;
	if (getrandom(&conn->chunked_seed, sizeof conn->chunked_seed, GRND_NONBLOCK) < 0)
		conn->chunked_seed = (uint64_t)(uintptr_t)conn; /* early in a boot: less secret, still a seed */
	conn->opened_us = request_now_ns() / 1000;
	conn->read_us = conn->write_us = conn->opened_us;
	conn->next = io->conns;
	if (conn->next != NULL)
		conn->next->previous = conn;
	io->conns = conn;
	return conn;
}

struct conn *conn_create(struct io_loop *io, struct access *access)
{
	struct conn *conn = make(io, access);
	if (conn == NULL)
		io_loop_forget(io, true);
	return conn;
}

static void unlink_conn(struct conn *conn)
{
	struct io_loop *io = conn->io;
	*(conn->previous == NULL ? &io->conns : &conn->previous->next) = conn->next;
	if (conn->next != NULL)
		conn->next->previous = conn->previous;
	for (struct conn **link = &io->dirty; *link != NULL; link = &(*link)->next_dirty) {
		if (*link == conn) {
			*link = conn->next_dirty;
			break;
		}
	}
}

/* ---- Closing ---- */

void conn_closed(struct conn *conn)
{
	struct server *server = conn->server;
	if (!conn_tls_destroy(conn))
		return;
	stranger_remove(conn);
	outbox_drop(&conn->outbox);
	conn->session->conn = NULL; /* what is in a lane ends without a reader */
	atomic_store_explicit(&conn->session->gone, true, memory_order_relaxed);
	conn_abandon_half_sent(conn, "the connection ended before the payload was there");
	conn_cancel_all(conn);
	publications_session_ended(server->publications, conn->session);
	unlink_conn(conn);
	session_unref(conn->session);
	conn_drop_descriptors(conn);
	free(conn->partial);
	free(conn->held_data);
	io_loop_forget(conn->io, conn->busy);
	free(conn);
}

static void on_closed(uv_handle_t *handle)
{
	conn_closed(handle->data);
}

void conn_close(struct conn *conn, log_level level, const char *reason)
{
	if (conn->closing)
		return;
	conn->closing = true;
	/* Requests that end without a reply have their reason in the log, always. */
	LOG_LIMITED(conn->server->log, level, &conn->server->closed_lines, conn->session->in_flight > 0 ? 0 : conn->server->config->log_lines, "session closed",
	            LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer), LOG_STR("reason", reason),
	            LOG_UINT("in_flight", conn->session->in_flight));
	ring_close(conn);
	if (conn->tls != NULL)
		conn_tls_goodbye(conn);
	if (conn->local)
		conn_drain(conn);
	conn->handle.data = conn;
	uv_close(&conn->handle, on_closed);
}

/* ---- Hello ---- */

static const struct feature {
	const char *name;
	uint32_t bit;
} known_features[] = {{"cancel", CONN_CANCEL}, {"shm", CONN_SHM}, {"rings", CONN_RINGS}};

#define FEATURE_COUNT (sizeof known_features / sizeof known_features[0])

static uint32_t feature_names(uint32_t features, struct msg_text names_out[FEATURE_COUNT])
{
	uint32_t count = 0;
	for (size_t i = 0; i < FEATURE_COUNT; i++)
		if ((features & known_features[i].bit) != 0)
			names_out[count++] = msg_text(known_features[i].name);
	return count;
}

/* Those that the client named and this server has. */
static uint32_t common_features(const struct msg_hello *hello)
{
	uint32_t features = 0;
	for (uint32_t i = 0; i < hello->feature_count; i++)
		for (size_t k = 0; k < FEATURE_COUNT; k++)
			if (hello->features[i].bytes == strlen(known_features[k].name) &&
			    memcmp(hello->features[i].data, known_features[k].name, hello->features[i].bytes) == 0)
				features |= known_features[k].bit;
	return features;
}

static uint32_t right_names(const struct access *access, struct msg_text names_out[RIGHT_COUNT])
{
	uint32_t count = 0;
	for (access_right right = RIGHT_OPERATE; right < RIGHT_COUNT; right++)
		if (access_may(access, right))
			names_out[count++] = msg_text(access_right_name(right));
	return count;
}

static void send_hello_reply(struct conn *conn, const opd_error *refused)
{
	const struct config_limits *limits = &conn->server->config->limits;
	struct msg_text features[FEATURE_COUNT], rights[RIGHT_COUNT];
	struct msg_hello_reply reply = {
		.status = refused == NULL ? OPD_OK : (opd_status)refused->status,
		.message = msg_text(refused == NULL ? "" : refused->text),
		.version = 1,
		.server = msg_text("opd " OPD_VERSION),
		.chunk_bytes = conn->chunk_bytes,
		.limits = {limits->envelope_bytes, limits->request_bytes, limits->session_bytes, limits->in_flight},
		.session = conn->session->id,
		.tenant = msg_text(conn->session->tenant->name),
		.admin = access_administers(conn->session->access),
		.identity = msg_text(conn->session->access->identity),
		.right_count = right_names(conn->session->access, rights),
		.rights = rights,
		.feature_count = feature_names(conn->features, features),
		.features = features,
	};
	struct notice *notice = conn_notice_create();
	struct codec_buffer buffer;
	if (notice == NULL || codec_encode_hello_reply(&notice->arena, &reply, &buffer, NULL) != OPD_OK) {
		if (notice != NULL)
			conn_notice_written(&notice->out);
		conn_close(conn, LOG_ERROR, "out of memory for a Hello reply");
		return;
	}
	conn_notice_send(conn, notice, FRAME_HELLO_REPLY, &buffer);
	conn->last_words = refused != NULL;
}

void conn_refuse_hello(struct conn *conn, const opd_error *error)
{
	conn->broken = true; /* one answer, however much comes behind */
	conn->server->hellos_refused++;
	conn_stop_reading(conn);
	LOG_LIMITED(conn->server->log, LOG_WARN, &conn->server->refused_lines, conn->server->config->log_lines, "session refused",
	            LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer), LOG_STR("reason", error->text));
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

static opd_status identify(struct conn *conn, struct msg_text token, opd_error *error)
{
	opd_status status = identity_settle(conn, token, error);
	if (status != OPD_OK || conn->session->credential.kind == CREDENTIAL_EMBEDDED)
		return status;
	error->status = OPD_OK;
	listener_check(conn, error);
	return (opd_status)error->status;
}

void conn_on_hello(struct conn *conn, const uint8_t *envelope, size_t bytes)
{
	struct arena arena;
	struct msg_hello hello;
	opd_error error;
	arena_init(&arena, 64u << 10);
	opd_status status = codec_decode_hello(&arena, envelope, bytes, &hello, &error);
	if (status == OPD_OK)
		status = check_hello(&hello, &error);
	if (status == OPD_OK && (!conn->local || hello.token.bytes != 0)) /* what the kernel says of a Unix peer is known since accept */
		status = identify(conn, hello.token, &error);
	if (status == OPD_OK) {
		conn->greeted = true;
		stranger_remove(conn);
		conn->features = common_features(&hello) & ~(conn->local ? 0u : CONN_PASSES);
		if (conn->server->config->limits.ring_bytes == 0)
			conn->features &= ~CONN_RINGS;
		conn->chunk_bytes = hello.no_chunks ? 0 : hello.chunk_bytes == 0 ? BOUND_CHUNK_BYTES_DEFAULT : hello.chunk_bytes;
		conn->server->sessions_opened++;
		LOG_LIMITED(conn->server->log, LOG_INFO, &conn->server->opened_lines, conn->server->config->log_lines, "session opened",
		            LOG_UINT("session", conn->session->id), LOG_STR("peer", conn->peer), LOG_STR("tenant", conn->session->tenant->name), LOG_STR("identity", conn->session->access->identity), LOG_STR("client", hello.client.data));
		send_hello_reply(conn, NULL);
	} else {
		conn_refuse_hello(conn, &error);
	}
	arena_fini(&arena);
}

/* ---- Starting ---- */

void conn_start(struct conn *conn, const opd_error *refuse)
{
	conn->handle.data = conn;
	if (refuse != NULL && conn->tls != NULL && !conn_tls_refuse_later(conn, refuse))
		conn_close(conn, LOG_WARN, refuse->text);
	else if (refuse != NULL && conn->tls == NULL)
		conn_refuse_hello(conn, refuse);
	else
		conn_start_reading(conn);
}

/* ---- Stalls ---- */

/* Its replies hold memory that others could use. */
static void cut_off(struct conn *conn)
{
	conn->server->slow_readers++;
	conn_close(conn, LOG_WARN, "the client doesn't read its replies");
}

void conn_tick(struct conn *conn, uint64_t now_us)
{
	const struct config_limits *limits = &conn->server->config->limits;
	bool half_read = !conn->broken && !conn->held && (conn->partial_bytes != 0 || conn->state != CONN_HEAD || conn->chunked_count != 0);
	/* Throttled, it isn't read: then only payloads that nothing in flight can do without are stalled, and only when nothing is answered either. */
	uint64_t read_us = !conn->throttled || conn->read_us > conn->write_us ? conn->read_us : conn->write_us;
	if (conn->closing)
		return;
	if (!conn->greeted && now_us > conn->opened_us && now_us - conn->opened_us > limits->handshake_us)
		conn_close(conn, LOG_WARN, "no Hello within the handshake's time");
	else if (half_read && (!conn->throttled || conn->chunked_count != 0) && now_us > read_us && now_us - read_us > limits->stall_us)
		conn_close(conn, LOG_WARN, "a half-sent request stalled");
	else if ((!outbox_empty(&conn->outbox) || conn->writing) && now_us > conn->write_us && now_us - conn->write_us > limits->stall_us)
		cut_off(conn);
}
