/* The scheme "embedded:": a daemon of its own for each client, on a thread of its own, reached over a socket pair or directly.
 *
 * The thread creates, runs and destroys the server, as server.h asks. It is kept from destroying it by references: the client's,
 * and one for every direct result that is still in somebody's hands (its tensors lie in the server's memory). */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client/scheme.h"
#include "opd/embedded.h"
#include "server/config.h"
#include "server/log.h"
#include "server/server.h"

typedef enum phase {
	PHASE_STARTING = 0,
	PHASE_RUNNING,
	PHASE_FAILED, /* could not start */
	PHASE_ENDED,  /* drained */
} phase;

struct embedded {
	_Atomic size_t references;
	pthread_t thread;
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	phase phase;
	bool unused;           /* no reference is left: the thread may destroy the server */
	struct config *config; /* until the server takes it */
	struct log log;
	struct server *server;
	struct session *session;
	opd_error error;
};

/* What keeps a direct result alive. */
struct reply_owner {
	struct embedded *embedded;
	struct server_reply *reply;
};

/* ---- Thread ---- */

static void set_phase(struct embedded *embedded, phase next)
{
	(void)pthread_mutex_lock(&embedded->mutex);
	embedded->phase = next;
	(void)pthread_cond_broadcast(&embedded->changed);
	(void)pthread_mutex_unlock(&embedded->mutex);
}

static void *serve(void *argument)
{
	struct embedded *embedded = argument;
	if (server_create(embedded->config, &embedded->log, &embedded->server, &embedded->error) != OPD_OK) {
		set_phase(embedded, PHASE_FAILED);
		return NULL;
	}
	embedded->config = NULL;
	set_phase(embedded, PHASE_RUNNING);
	(void)server_run(embedded->server);
	set_phase(embedded, PHASE_ENDED);
	(void)pthread_mutex_lock(&embedded->mutex);
	while (!embedded->unused)
		(void)pthread_cond_wait(&embedded->changed, &embedded->mutex);
	(void)pthread_mutex_unlock(&embedded->mutex);
	server_destroy(embedded->server);
	return NULL;
}

/* Signals are the program's business, not this thread's or any that it starts. */
static int start_thread(struct embedded *embedded)
{
	sigset_t all, before;
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	const int number = pthread_create(&embedded->thread, NULL, serve, embedded);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	return number;
}

static phase wait_started(struct embedded *embedded)
{
	(void)pthread_mutex_lock(&embedded->mutex);
	while (embedded->phase == PHASE_STARTING)
		(void)pthread_cond_wait(&embedded->changed, &embedded->mutex);
	const phase now = embedded->phase;
	(void)pthread_mutex_unlock(&embedded->mutex);
	return now;
}

/* ---- Life ---- */

static void embedded_free(struct embedded *embedded)
{
	config_destroy(embedded->config);
	log_fini(&embedded->log);
	(void)pthread_cond_destroy(&embedded->changed);
	(void)pthread_mutex_destroy(&embedded->mutex);
	free(embedded);
}

static void embedded_unref(struct embedded *embedded)
{
	if (atomic_fetch_sub(&embedded->references, 1) != 1)
		return;
	(void)pthread_mutex_lock(&embedded->mutex);
	embedded->unused = true;
	(void)pthread_cond_broadcast(&embedded->changed);
	(void)pthread_mutex_unlock(&embedded->mutex);
	(void)pthread_join(embedded->thread, NULL);
	embedded_free(embedded);
}

/* The file's configuration, or the defaults with warnings alone on stderr. */
static opd_status embedded_configure(struct embedded *embedded, const char *path, opd_error *error)
{
	embedded->config = config_create();
	if (embedded->config == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "embedded: out of memory");
	struct config *config = embedded->config;
	opd_status status = OPD_OK;
	if (path[0] == '\0')
		config->level = LOG_WARN;
	else
		status = config_load(config, path, error);
	if (config->loops == 0)
		config->loops = 1; /* its one client is this process, which has other uses for its threads */
	if (status == OPD_OK)
		status = config_check(config, true, error);
	if (status != OPD_OK)
		return status;
	config_clear_listeners(config); /* this daemon serves its client alone, whatever the file says for one that runs by itself */
	return log_init(&embedded->log, config->level, config->format, config->log_path, error);
}

static struct embedded *embedded_create(void)
{
	struct embedded *embedded = calloc(1, sizeof *embedded);
	if (embedded == NULL)
		return NULL;
	atomic_init(&embedded->references, 1);
	(void)pthread_mutex_init(&embedded->mutex, NULL);
	(void)pthread_cond_init(&embedded->changed, NULL);
	return embedded;
}

static void embedded_discard(struct embedded *embedded)
{
	config_destroy(embedded->config);
	(void)pthread_cond_destroy(&embedded->changed);
	(void)pthread_mutex_destroy(&embedded->mutex);
	free(embedded);
}

static opd_status embedded_start(struct embedded *embedded, opd_error *error)
{
	const int number = start_thread(embedded);
	if (number != 0) {
		embedded_free(embedded);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "embedded: no thread for the daemon: %s", strerrordesc_np(number));
	}
	if (wait_started(embedded) != PHASE_FAILED)
		return OPD_OK;
	(void)pthread_join(embedded->thread, NULL);
	opd_status status = opd_fail(error, (opd_status)embedded->error.status, "%s", embedded->error.text);
	embedded_free(embedded);
	return status;
}

/* ---- Scheme ---- */

static void embedded_disconnect(void *state)
{
	struct embedded *embedded = state;
	if (embedded->session != NULL)
		server_forget(embedded->server, embedded->session);
	server_drain(embedded->server, 0);
	embedded_unref(embedded);
}

static opd_status embedded_adopt(struct embedded *embedded, int *fd_out, opd_error *error)
{
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "embedded: no socket pair: %s", strerrordesc_np(errno));
	opd_status status = server_adopt(embedded->server, pair[1], &embedded->session, error);
	if (status != OPD_OK) {
		embedded->session = NULL;
		(void)close(pair[0]);
		(void)close(pair[1]);
		return status;
	}
	*fd_out = pair[0];
	return OPD_OK;
}

static opd_status embedded_connect(const char *rest, int *fd_out, void **state_out, opd_error *error)
{
	struct embedded *embedded = embedded_create();
	if (embedded == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "embedded: out of memory");
	opd_status status = embedded_configure(embedded, rest, error);
	if (status != OPD_OK) {
		embedded_discard(embedded);
		return status;
	}
	status = embedded_start(embedded, error);
	if (status != OPD_OK)
		return status;
	status = embedded_adopt(embedded, fd_out, error);
	if (status != OPD_OK) {
		embedded_disconnect(embedded);
		return status;
	}
	*state_out = embedded;
	return OPD_OK;
}

static opd_status embedded_direct_begin(void *state, opd_error *error)
{
	struct embedded *embedded = state;
	(void)pthread_mutex_lock(&embedded->mutex);
	const bool running = embedded->phase == PHASE_RUNNING;
	(void)pthread_mutex_unlock(&embedded->mutex);
	if (!running)
		return opd_fail(error, OPD_UNAVAILABLE, "direct calls: the embedded daemon has been drained");
	return server_direct_begin(embedded->server, embedded->session, error);
}

static void embedded_direct_end(void *state)
{
	struct embedded *embedded = state;
	server_direct_end(embedded->server, embedded->session);
}

static void reply_release(void *argument)
{
	struct reply_owner *owner = argument;
	struct embedded *embedded = owner->embedded;
	server_reply_release(owner->reply);
	free(owner);
	embedded_unref(embedded);
}

static void embedded_direct_call(void *state, uint64_t request_id, const struct msg_request *request,
                                 struct scheme_reply *reply_out)
{
	struct embedded *embedded = state;
	struct reply_owner *owner = malloc(sizeof *owner);
	struct server_reply *reply =
	    owner == NULL ? NULL : server_direct_call(embedded->server, embedded->session, request_id, request);
	if (reply == NULL) {
		free(owner);
		*reply_out = (struct scheme_reply){
		    .reply = {.status = OPD_RESOURCE_EXHAUSTED, .message = msg_text("embedded: out of memory for a direct call")}};
		return;
	}
	atomic_fetch_add(&embedded->references, 1);
	*owner = (struct reply_owner){embedded, reply};
	*reply_out = (struct scheme_reply){.reply = *server_reply_message(reply), .owner = owner, .release = reply_release};
}

static const struct scheme embedded_scheme = {
    .name = "embedded",
    .connect = embedded_connect,
    .disconnect = embedded_disconnect,
    .direct_begin = embedded_direct_begin,
    .direct_end = embedded_direct_end,
    .direct_call = embedded_direct_call,
};

void opd_embedded_register(void)
{
	opd_scheme_register(&embedded_scheme);
}
