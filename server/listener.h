/* Listening sockets: Unix, TCP, TLS over TCP; whoever connects becomes a conn.
 *
 * Layer: server. Threads: the loop's.
 * A Unix socket left behind by a killed daemon is replaced; one that still answers is refused. */
#ifndef OPD_SERVER_LISTENER_H
#define OPD_SERVER_LISTENER_H

#include "proto/message.h"
#include "server/config.h"

struct conn;
struct server;

/* UNAVAILABLE names the address and what the system said. */
OPD_MUST_USE opd_status listener_open(struct server *server, const struct config_listener *config, opd_error *error);
/* The metrics endpoint's (server/scrape.h): not in listener_list. */
OPD_MUST_USE opd_status listener_open_metrics(struct server *server, const struct config_listener *config, opd_error *error);
/* A new turn of the loop: takes connections that the one before had no time for. */
void listener_turn(struct server *server);
/* Stops all of them; their memory goes in the close callbacks. Removes the sockets' files. */
void listener_close_all(struct server *server);
/* Whether its identity may have the session, which counts already: RESOURCE_EXHAUSTED in *refused, which stays where it says something else. At accept where the kernel says who it is,
 * else at Hello. */
void listener_check(const struct conn *conn, opd_error *refused);
/* Addresses with the port that the system chose, at most `count`; returns how many there are. */
uint32_t listener_list(const struct server *server, struct msg_text *out, uint32_t count);

#endif
