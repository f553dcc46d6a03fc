/* A kernel's parallel loops in a worker process, and the threads that help with them when the daemon says so.
 *
 * Layer: server, of the worker process alone. Threads: worker_loop_run on the one that serves calls, or inside a share; the rest on that one.
 * Life: zeroed memory but for `helpers` -1 → worker_loop_set_helpers → worker_loop_run… → the process's end.
 * A thread here helps only while a lane thread of the daemon waits for it (server/isolated_help.h): what runs in the lane and in all workers together is never more than the lane's threads. How one asks the other:
 * where a loop is worth it, SPLIT goes to the daemon with the loop's number; each idle lane thread then sends a packet with it over a socket pair of its own, which wakes one thread here; it takes shares of that
 * loop until none is left, sends the packet back and sleeps. So packets are back soon after the loop's end. A worker that dies closes that socket: whoever waits for it goes on. */
#ifndef OPD_SERVER_WORKER_LOOP_H
#define OPD_SERVER_WORKER_LOOP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"

struct worker_loop {
	int helpers;      /* the socket that packets come by; -1: nobody helps */
	int daemon;       /* that SPLIT goes to */
	uint32_t started; /* threads that wait for packets */
	/* Under the mutex. */
	pthread_mutex_t mutex;
	pthread_cond_t left; /* the last helper has */
	bool open;           /* shares may be taken */
	uint32_t number;     /* of this loop, or the last one */
	uint32_t threads;    /* numbers that shares may have */
	uint32_t next_number;
	uint32_t inside;     /* helpers */
	/* Of the open loop. */
	opd_range_fn range;
	void *argument;
	uint64_t items;
	uint32_t shares;
	_Atomic uint32_t claimed; /* may run past `shares` */
};

/* takes `fd`. */
void worker_loop_set_helpers(struct worker_loop *loop, int fd);
/* As opd_host.parallel_for. threads: that the call has, this one included. */
void worker_loop_run(struct worker_loop *loop, uint32_t threads, uint64_t items, uint64_t grain, opd_range_fn range, void *argument);

#endif
