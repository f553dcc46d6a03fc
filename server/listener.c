#include "server/listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "server/conn.h"
#include "server/daemon.h"
#include "server/scrape.h"

#define BACKLOG 1024
/* Connections that a turn of the loop takes of one listener, give or take one: some 0.2 ms of it. A storm of clients that vanish costs those who stay that much a turn, instead of the whole backlog. */
#define TURN_ACCEPTS 8u

struct listener {
	struct listener *next;
	struct server *server;
	union {
		uv_handle_t handle;
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	};
	listen_kind kind;
	bool remote; /* other machines may reach it */
	bool metrics;
	char *path; /* of a Unix socket, to be removed */
	char address[300];
	/* A connection that there is no memory for is taken and closed all the same: libuv looks at the socket again only when it has been taken. */
	union {
		uv_handle_t handle;
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	} turned_away;
	uint64_t turn;     /* the loop's, in which `accepted` were taken */
	uint32_t accepted;
	bool due;      /* one waits in libuv, which looks at the socket again when it is taken: in the next turn */
	bool turning;  /* that handle is being closed */
	bool waiting;  /* … and another connection waits for its end */
	bool closed;   /* the listener is: its memory goes with that handle's end */
};

/* ---- Accepting ---- */

static void describe_peer(struct conn *conn)
{
	struct sockaddr_storage peer;
	int bytes = sizeof peer;
	char host[INET6_ADDRSTRLEN] = "?";
	const char *scheme = conn->tls != NULL ? "tls" : "tcp";
	if (uv_tcp_getpeername(&conn->tcp, (struct sockaddr *)&peer, &bytes) != 0)
		return;
	uint16_t port;
	if (peer.ss_family == AF_INET6) {
		const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)&peer;
		(void)inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof host);
		port = ntohs(six->sin6_port);
		(void)snprintf(conn->peer, sizeof conn->peer, "%s://[%s]:%u", scheme, host, port);
	} else {
		const struct sockaddr_in *four = (const struct sockaddr_in *)&peer;
		(void)inet_ntop(AF_INET, &four->sin_addr, host, sizeof host);
		port = ntohs(four->sin_port);
		(void)snprintf(conn->peer, sizeof conn->peer, "%s://%s:%u", scheme, host, port);
	}
}

/* Who is on the other end, as the kernel says. */
static void identify_unix(struct conn *conn, opd_error *refused)
{
	opd_error error;
	identity_of_unix(conn);
	if (identity_settle(conn, (struct msg_text){0}, &error) != OPD_OK && refused->status == OPD_OK)
		*refused = error;
}

/* As much as the system lets a Unix socket hold (it doubles what is asked for): 64 replies of 16 KiB in flight then leave in half as many system calls. TCP finds
 * its own size. */
static void widen(struct conn *conn)
{
	uv_os_fd_t fd;
	const int bytes = 512 << 10;
	if (uv_fileno(&conn->handle, &fd) == 0)
		(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

/* A stream's handle in the loop, of the one type or the other; nothing is open in it yet. 0 or libuv's error. */
static int init_stream(uv_loop_t *loop, listen_kind kind, uv_pipe_t *pipe, uv_tcp_t *tcp)
{
	return kind == LISTEN_UNIX ? uv_pipe_init(loop, pipe, 0) : uv_tcp_init(loop, tcp);
}

/* A connection that was accepted, on its way to its loop. */
struct arrival {
	struct io_loop *io;
	listen_kind kind;
	bool remote;
	int fd; /* of one for another loop */
	opd_error refused;
};

/* The handle, in its loop; and what TLS needs. 0 or libuv's error. */
static int open_handle(const struct arrival *arrival, struct conn *conn)
{
	conn->handle.data = conn;
	const int failed = init_stream(&conn->io->loop, arrival->kind, &conn->pipe, &conn->tcp);
	if (failed == 0 && arrival->kind == LISTEN_TLS && (conn->tls = conn_tls_create(conn)) == NULL)
		return UV_ENOMEM;
	return failed;
}

static void log_accept_error(struct server *server, const char *listener, int failed)
{
	static struct log_limit limit;
	uint32_t suppressed;
	if (log_limit_take(&limit, 5, &suppressed))
		LOG(server->log, LOG_WARN, "connection not accepted", LOG_STR("listener", listener), LOG_STR("reason", uv_strerror(failed)),
		    LOG_UINT("suppressed", suppressed));
}

/* The session counts already. */
static void check_tenant(struct tenant *tenant, opd_error *refused)
{
	const uint32_t sessions = atomic_load_explicit(&tenant->sessions, memory_order_relaxed);
	const uint64_t limit = quota_limit(&tenant->quota, QUOTA_SESSIONS);
	if (refused->status != OPD_OK || limit == 0 || sessions <= limit)
		return;
	quota_count_refusal(&tenant->quota, QUOTA_SESSIONS);
	(void)opd_fail(refused, OPD_RESOURCE_EXHAUSTED, "%u sessions of tenant %s are open, no more may be", (unsigned)(sessions - 1), tenant->name);
}

/* An administrator is let in: somebody must be able to look, and to free. */
static void check_memory(const struct session *session, opd_error *refused)
{
	struct server *server = session->server;
	if (refused->status == OPD_OK && !access_administers(session->access) &&
	    server_memory_filled(server, server->config->limits.refuse_sessions, "no session is opened", refused))
		server->sessions_refused++;
}

void listener_check(const struct conn *conn, opd_error *refused)
{
	check_memory(conn->session, refused);
	check_tenant(conn->session->tenant, refused);
}

static void on_connection(uv_stream_t *stream, int status);

static void listener_free(struct listener *listener)
{
	free(listener->path);
	free(listener);
}

static void on_turned_away(uv_handle_t *handle)
{
	struct listener *listener = handle->data;
	const bool waiting = listener->waiting;
	listener->turning = listener->waiting = false;
	if (listener->closed)
		listener_free(listener);
	else if (waiting && !uv_is_closing(&listener->handle))
		on_connection(&listener->stream, 0);
}

static void turn_away(struct listener *listener)
{
	if (listener->turning) {
		listener->waiting = true;
		return;
	}
	listener->turned_away.handle.data = listener;
	int failed = init_stream(&listener->server->loops[0].loop, listener->kind, &listener->turned_away.pipe, &listener->turned_away.tcp);
	if (failed != 0)
		return;
	(void)uv_accept(&listener->stream, &listener->turned_away.stream);
	listener->turning = true;
	uv_close(&listener->turned_away.handle, on_turned_away);
}

/* False: it has to wait for the next turn. */
static bool may_accept(struct listener *listener)
{
	struct io_loop *io = &listener->server->loops[0];
	if (listener->turn != io->turn) {
		listener->turn = io->turn;
		listener->accepted = 0;
	}
	listener->due = listener->accepted >= TURN_ACCEPTS;
	if (listener->due)
		io_loop_flush_soon(io);
	else
		listener->accepted++;
	return !listener->due;
}

void listener_turn(struct server *server)
{
	for (struct listener *listener = server->listeners, *next; listener != NULL; listener = next) {
		next = listener->next;
		if (listener->due)
			on_connection(&listener->stream, 0);
	}
}

/* The socket is the connection's, or that has failed. */
static void begin(struct conn *conn, struct arrival *arrival, int failed)
{
	if (failed != 0) {
		conn_close(conn, LOG_WARN, uv_strerror(failed));
		return;
	}
	if (arrival->kind == LISTEN_UNIX) {
		conn->local = true;
		identify_unix(conn, &arrival->refused);
		widen(conn);
	} else {
		conn->remote = arrival->remote && arrival->kind == LISTEN_TLS;
		stranger_add(conn);
		describe_peer(conn);
		(void)uv_tcp_nodelay(&conn->tcp, 1);
		(void)uv_tcp_keepalive(&conn->tcp, 1, 60);
	}
	if (conn->local) /* who another is, is known at Hello */
		listener_check(conn, &arrival->refused);
	conn_start(conn, arrival->refused.status == OPD_OK ? NULL : &arrival->refused);
}

static struct conn *make_conn(const struct arrival *arrival)
{
	return conn_create(arrival->io, access_create("anonymous", "anonymous", ACCESS_USER));
}

static void accept_here(struct listener *listener, struct arrival *arrival)
{
	struct conn *conn = make_conn(arrival);
	if (conn == NULL) {
		log_accept_error(listener->server, listener->address, UV_ENOMEM);
		turn_away(listener);
		return;
	}
	int failed = open_handle(arrival, conn);
	if (failed == 0)
		failed = uv_accept(&listener->stream, &conn->stream);
	begin(conn, arrival, failed);
}

/* ---- For another loop ---- */

/* On its thread. */
static void arrive(void *argument)
{
	struct arrival *arrival = argument;
	struct server *server = arrival->io->server;
	struct conn *conn = NULL;
	if (server->draining)
		io_loop_forget(arrival->io, true);
	else if ((conn = make_conn(arrival)) == NULL)
		log_accept_error(server, "(for another loop)", UV_ENOMEM);
	int failed = conn == NULL ? UV_ECANCELED : open_handle(arrival, conn);
	if (failed == 0)
		failed = arrival->kind == LISTEN_UNIX ? uv_pipe_open(&conn->pipe, arrival->fd) : uv_tcp_open(&conn->tcp, arrival->fd);
	if (failed != 0)
		(void)close(arrival->fd);
	if (conn != NULL)
		begin(conn, arrival, failed);
	free(arrival);
}

/* What libuv accepts into: a handle of this loop, which another loop can't have. */
struct transit {
	union {
		uv_handle_t handle;
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	};
};

static void on_transit_closed(uv_handle_t *handle)
{
	free(handle->data);
}

/* The next socket's descriptor, the caller's; libuv's error. */
static int accept_descriptor(struct listener *listener)
{
	struct transit *transit = calloc(1, sizeof *transit);
	uv_os_fd_t fd;
	if (transit == NULL)
		return UV_ENOMEM;
	int failed = init_stream(&listener->server->loops[0].loop, listener->kind, &transit->pipe, &transit->tcp);
	if (failed != 0) {
		free(transit);
		return failed;
	}
	transit->handle.data = transit;
	failed = uv_accept(&listener->stream, &transit->stream);
	if (failed == 0)
		failed = uv_fileno(&transit->handle, &fd);
	const int own = failed == 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : failed;
	const int result = failed == 0 && own < 0 ? uv_translate_sys_error(errno) : own;
	uv_close(&transit->handle, on_transit_closed);
	return result;
}

static void hand_over(struct listener *listener, const struct arrival *arrival)
{
	opd_error error;
	struct arrival *copy = malloc(sizeof *copy);
	if (copy == NULL) {
		log_accept_error(listener->server, listener->address, UV_ENOMEM);
		turn_away(listener);
		io_loop_forget(arrival->io, true);
		return;
	}
	*copy = *arrival;
	copy->fd = accept_descriptor(listener);
	if (copy->fd >= 0 && io_loop_post(arrival->io, arrive, copy, &error) == OPD_OK)
		return;
	if (copy->fd >= 0)
		(void)close(copy->fd);
	else
		log_accept_error(listener->server, listener->address, copy->fd);
	free(copy);
	io_loop_forget(arrival->io, true);
}

static void on_connection(uv_stream_t *stream, int status)
{
	struct listener *listener = stream->data;
	struct server *server = listener->server;
	if (status < 0) {
		log_accept_error(server, listener->address, status);
		return;
	}
	if (!may_accept(listener))
		return;
	if (listener->metrics) {
		if (!scrape_accept(server, stream, listener->kind == LISTEN_UNIX))
			turn_away(listener);
		return;
	}
	struct arrival arrival = {.io = io_loop_choose(server), .kind = listener->kind, .remote = listener->remote};
	const uint32_t open = server_sessions(server);
	if (open >= server->config->limits.sessions)
		(void)opd_fail(&arrival.refused, OPD_RESOURCE_EXHAUSTED, "%u sessions are open, no more may be", (unsigned)open);
	(void)io_loop_expect(arrival.io);
	if (arrival.io->number == 0)
		accept_here(listener, &arrival);
	else
		hand_over(listener, &arrival);
}

/* ---- Opening ---- */

static opd_status cannot_listen(const struct config_listener *config, const char *why, opd_error *error)
{
	return opd_fail(error, OPD_UNAVAILABLE, "can't listen on %s: %s", config->address, why);
}

#define FOLDER_LOCK_TRIES 200u /* of 10 ms */

/* Two daemons that start at once must not both find the stale socket of a third, and one of them remove the other's: who looks, removes and binds holds the folder's lock until it listens.
 * Nothing is left behind, and somebody else's lock on a shared folder holds nobody up for long. -1: none; else to be closed. */
static int lock_folder(const char *path)
{
	char folder[sizeof ((struct sockaddr_un *)NULL)->sun_path];
	(void)snprintf(folder, sizeof folder, "%s", path);
	char *slash = strrchr(folder, '/');
	if (slash == NULL)
		return -1;
	slash[slash == folder] = '\0';
	const int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	const struct timespec pause = {.tv_nsec = 10000000};
	for (unsigned tries = 0; fd >= 0 && tries < FOLDER_LOCK_TRIES && flock(fd, LOCK_EX | LOCK_NB) != 0; tries++)
		(void)nanosleep(&pause, NULL);
	return fd;
}

/* A socket file that nobody answers on is left from a daemon that was killed. */
static opd_status remove_stale(const struct config_listener *config, opd_error *error)
{
	struct stat file;
	if (lstat(config->path, &file) != 0)
		return errno == ENOENT ? OPD_OK : cannot_listen(config, strerror(errno), error);
	if (!S_ISSOCK(file.st_mode))
		return cannot_listen(config, "there is a file of that name that is no socket", error);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	(void)snprintf(address.sun_path, sizeof address.sun_path, "%s", config->path);
	int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (probe < 0)
		return cannot_listen(config, strerror(errno), error);
	int connected = connect(probe, (const struct sockaddr *)&address, sizeof address);
	int why = errno;
	(void)close(probe);
	if (connected == 0 || why == EAGAIN)
		return cannot_listen(config, "another daemon answers there", error);
	if (why != ECONNREFUSED)
		return cannot_listen(config, strerror(why), error);
	return unlink(config->path) == 0 || errno == ENOENT ? OPD_OK : cannot_listen(config, strerror(errno), error);
}

static opd_status bind_unix(struct listener *listener, const struct config_listener *config, opd_error *error)
{
	struct sockaddr_un limit;
	if (strlen(config->path) >= sizeof limit.sun_path)
		return cannot_listen(config, "the path is too long for a Unix socket (at most 107 bytes)", error);
	opd_status status = remove_stale(config, error);
	if (status != OPD_OK)
		return status;
	int failed = uv_pipe_bind(&listener->pipe, config->path);
	if (failed != 0)
		return cannot_listen(config, uv_strerror(failed), error);
	listener->path = strdup(config->path);
	(void)snprintf(listener->address, sizeof listener->address, "%s", config->address);
	return OPD_OK;
}

static void name_tcp(struct listener *listener, const struct config_listener *config)
{
	struct sockaddr_storage own;
	int bytes = sizeof own;
	unsigned port = config->port;
	if (uv_tcp_getsockname(&listener->tcp, (struct sockaddr *)&own, &bytes) == 0)
		port = ntohs(own.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&own)->sin6_port : ((struct sockaddr_in *)&own)->sin_port);
	const bool six = strchr(config->host, ':') != NULL;
	(void)snprintf(listener->address, sizeof listener->address, "%s://%s%s%s:%u", config->kind == LISTEN_TLS ? "tls" : "tcp", six ? "[" : "", config->host, six ? "]" : "", port);
}

static opd_status bind_tcp(struct listener *listener, const struct config_listener *config, opd_error *error)
{
	char port[8];
	(void)snprintf(port, sizeof port, "%u", (unsigned)config->port);
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
	struct addrinfo *found = NULL;
	int failed = getaddrinfo(config->host, port, &hints, &found);
	if (failed != 0)
		return cannot_listen(config, gai_strerror(failed), error);
	failed = uv_tcp_bind(&listener->tcp, found->ai_addr, found->ai_family == AF_INET6 ? UV_TCP_IPV6ONLY : 0);
	freeaddrinfo(found);
	return failed == 0 ? OPD_OK : cannot_listen(config, uv_strerror(failed), error);
}

static void on_listener_closed(uv_handle_t *handle)
{
	struct listener *listener = handle->data;
	listener->closed = true;
	if (!listener->turning)
		listener_free(listener);
}

/* One that the service manager has opened, and that stays its own: the path isn't removed at the end, and clients wait there for the next daemon. */
static opd_status take_passed(struct listener *listener, const struct config_listener *config, opd_error *error)
{
	int failed = config->kind == LISTEN_UNIX ? uv_pipe_open(&listener->pipe, config->fd) : uv_tcp_open(&listener->tcp, config->fd);
	if (failed != 0)
		return cannot_listen(config, uv_strerror(failed), error);
	(void)snprintf(listener->address, sizeof listener->address, "%s", config->address);
	return OPD_OK;
}

static opd_status open_listener(struct server *server, const struct config_listener *config, bool metrics, opd_error *error)
{
	if (config->kind == LISTEN_TLS && server->config->tls_context == NULL)
		return cannot_listen(config, "no certificate was loaded", error);
	struct listener *listener = calloc(1, sizeof *listener);
	if (listener == NULL)
		return cannot_listen(config, "out of memory", error);
	listener->server = server;
	listener->kind = config->kind;
	listener->remote = config->kind != LISTEN_UNIX && !config->loopback;
	listener->metrics = metrics;
	int failed = init_stream(&server->loops[0].loop, config->kind, &listener->pipe, &listener->tcp);
	if (failed != 0) {
		free(listener);
		return cannot_listen(config, uv_strerror(failed), error);
	}
	listener->handle.data = listener;
	const int lock = config->kind == LISTEN_UNIX && config->fd == 0 ? lock_folder(config->path) : -1;
	opd_status status = config->fd != 0 ? take_passed(listener, config, error)
	                    : config->kind == LISTEN_UNIX ? bind_unix(listener, config, error)
	                                                  : bind_tcp(listener, config, error);
	if (status == OPD_OK) {
		failed = uv_listen(&listener->stream, BACKLOG, on_connection);
		if (failed != 0)
			status = cannot_listen(config, uv_strerror(failed), error);
	}
	if (lock >= 0)
		(void)close(lock);
	if (status != OPD_OK) {
		uv_close(&listener->handle, on_listener_closed);
		return status;
	}
	if (config->kind != LISTEN_UNIX)
		name_tcp(listener, config);
	listener->next = server->listeners;
	server->listeners = listener;
	return OPD_OK;
}

opd_status listener_open(struct server *server, const struct config_listener *config, opd_error *error)
{
	return open_listener(server, config, false, error);
}

opd_status listener_open_metrics(struct server *server, const struct config_listener *config, opd_error *error)
{
	opd_status status = open_listener(server, config, true, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "metrics");
	LOG(server->log, LOG_INFO, "metrics endpoint", LOG_STR("address", server->listeners->address));
	return OPD_OK;
}

void listener_close_all(struct server *server)
{
	while (server->listeners != NULL) {
		struct listener *listener = server->listeners;
		server->listeners = listener->next;
		if (listener->path != NULL)
			(void)unlink(listener->path);
		uv_close(&listener->handle, on_listener_closed);
	}
}

uint32_t listener_list(const struct server *server, struct msg_text *out, uint32_t count)
{
	uint32_t found = 0;
	for (const struct listener *listener = server->listeners; listener != NULL; listener = listener->next) {
		if (!listener->metrics && found < count)
			out[found] = msg_text(listener->address);
		found += !listener->metrics;
	}
	return found;
}
