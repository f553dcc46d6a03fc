/* Sessions that another thread of this process has: adopted sockets, and calls without frames. */
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

#include "server/conn.h"
#include "server/daemon.h"
#include "server/request.h"

/* A call that waits for the loop. */
struct handshake {
	struct server *server;
	sem_t done;
	int fd;
	struct session *session;
	opd_status status;
	opd_error *error;
};

static void adopt_on_loop(void *argument)
{
	struct handshake *shake = argument;
	struct server *server = shake->server;
	struct conn *conn = server->draining ? NULL : conn_create(io_loop_expect(&server->loops[0]), access_create("embedded", "embedded", ACCESS_ALL));
	int failed = conn == NULL ? UV_ENOMEM : uv_pipe_init(&conn->io->loop, &conn->pipe, 0);
	if (failed == 0) {
		conn->handle.data = conn;
		failed = uv_pipe_open(&conn->pipe, shake->fd);
	}
	if (failed == 0) {
		(void)snprintf(conn->peer, sizeof conn->peer, "embedded");
		conn->session->credential.kind = CREDENTIAL_EMBEDDED;
		shake->session = session_ref(conn->session);
		shake->status = OPD_OK;
		conn_start(conn, NULL);
	} else {
		shake->status = opd_fail(shake->error, OPD_UNAVAILABLE, "server: %s", uv_strerror(failed));
		if (conn != NULL)
			conn_close(conn, LOG_WARN, uv_strerror(failed));
	}
	(void)sem_post(&shake->done);
}

static opd_status handshake(struct handshake *shake, void (*callback)(void *))
{
	(void)sem_init(&shake->done, 0, 0);
	opd_status status = server_post(shake->server, callback, shake, shake->error);
	if (status == OPD_OK) {
		while (sem_wait(&shake->done) != 0)
			;
		status = shake->status;
	}
	(void)sem_destroy(&shake->done);
	return status;
}

opd_status server_adopt(struct server *server, int fd, struct session **session_out, opd_error *error)
{
	struct handshake shake = {.server = server, .fd = fd, .error = error};
	opd_status status = handshake(&shake, adopt_on_loop);
	if (status == OPD_OK)
		*session_out = shake.session;
	return status;
}

/* What a direct call leaves to a lane comes back through the loop, which therefore doesn't end before the last direct scope. */
static void end_direct(struct server *server, struct session *session)
{
	if (session->direct)
		server->direct_count--;
	session->direct = false;
}

static void forget_on_loop(void *argument)
{
	struct handshake *shake = argument;
	end_direct(shake->server, shake->session);
	session_unref(shake->session);
	(void)sem_post(&shake->done);
}

void server_forget(struct server *server, struct session *session)
{
	struct handshake shake = {.server = server, .session = session, .status = OPD_OK};
	if (handshake(&shake, forget_on_loop) != OPD_OK)
		session_unref(session);
}

static void direct_begin_on_loop(void *argument)
{
	struct handshake *shake = argument;
	if (shake->server->draining) {
		shake->status = opd_fail(shake->error, OPD_UNAVAILABLE, "direct calls: the server is draining");
	} else if (shake->session->in_flight != 0) {
		shake->status = opd_fail(shake->error, OPD_FAILED_PRECONDITION, "direct calls: %u requests are in flight", (unsigned)shake->session->in_flight);
	} else {
		shake->session->direct = true;
		shake->server->direct_count++;
		shake->status = OPD_OK;
	}
	(void)sem_post(&shake->done);
}

static void direct_end_on_loop(void *argument)
{
	struct handshake *shake = argument;
	end_direct(shake->server, shake->session);
	(void)sem_post(&shake->done);
}

opd_status server_direct_begin(struct server *server, struct session *session, opd_error *error)
{
	struct handshake shake = {.server = server, .session = session, .error = error};
	return handshake(&shake, direct_begin_on_loop);
}

void server_direct_end(struct server *server, struct session *session)
{
	struct handshake shake = {.server = server, .session = session, .status = OPD_OK};
	(void)handshake(&shake, direct_end_on_loop);
}

struct server_reply {
	struct context context; /* of this call alone */
	struct request *request;
	sem_t done;
};

static void on_direct_reply(struct request *request)
{
	(void)request; /* the caller reads request->reply */
}

struct server_reply *server_direct_call(struct server *server, struct session *session, uint64_t request_id, const struct msg_request *message)
{
	struct server_reply *reply = calloc(1, sizeof *reply);
	if (reply == NULL)
		return NULL;
	context_init(&reply->context, server);
	(void)sem_init(&reply->done, 0, 0);
	struct request *request = request_create(&reply->context, session, request_id);
	if (request == NULL) {
		server_reply_release(reply);
		return NULL;
	}
	reply->request = request;
	request->direct = true;
	request->owner = &reply->done;
	request->on_reply = on_direct_reply;
	request->message = *message;
	request->clock.received = request_now_ns();
	session->last_request = request_id;
	if (request_accept_message(request, 0) != OPD_OK)
		request_reject(request);
	else
		request_start(request);
	return reply;
}

const struct msg_reply *server_reply_message(const struct server_reply *reply)
{
	return &reply->request->reply;
}

void server_reply_release(struct server_reply *reply)
{
	if (reply == NULL)
		return;
	if (reply->request != NULL)
		request_release(reply->request);
	context_fini(&reply->context);
	(void)sem_destroy(&reply->done);
	free(reply);
}
