/* The metrics endpoint: answers GET /metrics with what server/stats.h tells, over HTTP/1.1, one request a connection.
 *
 * Layer: server. Threads: the loop's.
 * Life: a listener calls scrape_accept → the answer is written, or time is over (scrape_tick) → closed; scrape_close_all at the end.
 * Off unless configured, and on Unix sockets and loopback addresses alone: nobody is authenticated here, and tenants' names are told.
 * One method, one path, no body, no second request: an HTTP library (libmicrohttpd was looked at) would bring a thread and a poll loop of its own for less than this file has. */
#ifndef OPD_SERVER_SCRAPE_H
#define OPD_SERVER_SCRAPE_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "opd/status.h"

struct server;

/* Somebody has connected to this listening pipe (unix) or TCP socket. False: there is no memory for it, and it still waits there (libuv looks at the socket again only when it was taken). */
OPD_MUST_USE bool scrape_accept(struct server *server, uv_stream_t *listening, bool unix_socket);
/* Once a second: ends those that don't ask, or don't read. */
void scrape_tick(struct server *server, uint64_t now_us);
void scrape_close_all(struct server *server);

#endif
