/* The daemon as a library: what opd's main, the embedded client and the tests start.
 *
 * Layer: server, top. Threads: server_create, server_run and server_destroy on one thread, which becomes I/O loop 0 while in server_run; others have threads of their own; the functions marked
 * "any thread" wake that loop.
 * Life: server_create (opens providers, binds listeners) → server_run (until drained) → server_destroy.
 * Not here: flags, signals, exit codes (server/main.c). */
#ifndef OPD_SERVER_SERVER_H
#define OPD_SERVER_SERVER_H

#include "opd/status.h"
#include "server/config.h"
#include "server/log.h"

struct server;
struct session;

/* Takes `config` on success; borrows `log`. Loads the providers and binds the listeners (with an empty listener list, as config_check never leaves it: none). Logs the start
 * line: listeners, providers that are there, providers that aren't and why. INVALID_ARGUMENT: a priority or module of the configuration; UNAVAILABLE: a listener. */
OPD_MUST_USE opd_status server_create(struct config *config, struct log *log, struct server **server_out, opd_error *error);

/* Serves until a drain has ended. OK, or DEADLINE_EXCEEDED when the drain's limit cut off work. */
opd_status server_run(struct server *server);
void server_destroy(struct server *server);

/* Any thread, also a signal handler's: stop accepting, tell clients, finish, then server_run returns. 0: the configuration's limit. A second call ends at once. */
void server_drain(struct server *server, uint64_t timeout_us);

/* On loop 0's thread, or before server_run: takes over `config` as far as that is possible while running (priorities, log level, limits, modules that are new; a change of listeners or
 * threads or loops is refused and named), all or nothing. On failure the old one stays, and the caller destroys the new one. */
OPD_MUST_USE opd_status server_reload(struct server *server, struct config *config, opd_error *error);

/* Any thread: calls `callback(argument)` once on loop 0's thread soon (how main handles SIGHUP and SIGUSR1). */
OPD_MUST_USE opd_status server_post(struct server *server, void (*callback)(void *argument), void *argument, opd_error *error);
/* Any thread: calls `callback(argument, true)` once on the last loop's thread when every loop has come by since, one after the other: as long as one of them hangs it isn't called. false: not all
 * could be asked (no memory, or the daemon ends). */
OPD_MUST_USE opd_status server_round(struct server *server, void (*callback)(void *argument, bool all), void *argument, opd_error *error);

/* Any thread: serves a connected stream socket as if accepted on a Unix listener, with administrator's rights. Takes fd on success. *session_out (borrowed) names the session for
 * server_direct_*; it is valid until server_forget. */
OPD_MUST_USE opd_status server_adopt(struct server *server, int fd, struct session **session_out, opd_error *error);
/* Any thread: the adopter won't use `session` any more. */
void server_forget(struct server *server, struct session *session);

/* The direct path of an adopted session (client/scheme.h has the contract). begin waits until the loop has handed the session over: FAILED_PRECONDITION when requests are in flight. server_run
 * doesn't return before the end (or server_forget). */
struct msg_request;
struct msg_reply;
OPD_MUST_USE opd_status server_direct_begin(struct server *server, struct session *session, opd_error *error);
void server_direct_end(struct server *server, struct session *session);

struct server_reply; /* owns a reply and its results */
/* The thread of begin. Never NULL but when out of memory. */
struct server_reply *server_direct_call(struct server *server, struct session *session, uint64_t request_id, const struct msg_request *request);
const struct msg_reply *server_reply_message(const struct server_reply *reply);
void server_reply_release(struct server_reply *reply);

/* Ledger in bytes, for tests and statistics; any thread. */
uint64_t server_memory_bytes(const struct server *server);

#endif
