/* The CPU lanes of a daemon: everybody's, and those that the configuration keeps for some tenants.
 *
 * Layer: server. Threads: any, but lanes_start, lanes_stop and lanes_destroy, which are loop 0's, and lanes_finish_done.
 * Life: lanes_start → lanes_finish_done whenever one of them wakes a loop → lanes_stop → lanes_destroy.
 * How many threads there are is settled once, when the daemon starts: those that the configuration names, else those of the machine (server/machine.h), less one for each I/O loop behind the first that the configuration asks for.
 * Not here: what one lane does (server/lane.h), whose lane is which (server/tenant.h), lanes of devices (server/device_lane.h). */
#ifndef OPD_SERVER_LANES_H
#define OPD_SERVER_LANES_H

#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"

struct io_loop;
struct server;

OPD_MUST_USE opd_status lanes_start(struct server *server, opd_error *error);
/* The configuration's bounds of queues and segments become theirs. */
void lanes_bound(struct server *server);
/* On the loop's thread: calls `done` of every job of its that has ended. */
void lanes_finish_done(struct io_loop *io);
/* Something is queued or running on one of them. */
bool lanes_busy(const struct server *server);
/* Threads of them all. */
uint32_t lanes_threads(const struct server *server);
/* Threads that are stuck in kernels. */
uint32_t lanes_stuck(const struct server *server);
/* Runs what is queued, ends the threads and waits for them. */
void lanes_stop(struct server *server);
void lanes_destroy(struct server *server);

#endif
