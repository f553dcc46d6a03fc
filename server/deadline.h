/* Requests with a timeout that haven't begun: answered when their time is over, not when their turn comes.
 *
 * Layer: server. Threads: the loop's.
 * Life: deadlines_open → deadline_set, deadline_clear → deadlines_close, before the loop is closed. Zeroed memory may be closed.
 * One timerfd for all, armed for the earliest; a libuv timer would cost every turn of the loop 0.6 us. */
#ifndef OPD_SERVER_DEADLINE_H
#define OPD_SERVER_DEADLINE_H

#include <stdint.h>
#include <uv.h>

#include "server/heap.h"

struct request;

struct deadlines {
	struct heap waiting; /* by request_run.deadline */
	uint64_t armed_ns;   /* 0: not */
	int fd;
	bool opened;
	uv_poll_t poll;
};

/* 0 or libuv's error. */
int deadlines_open(struct deadlines *deadlines, uv_loop_t *loop);
/* Its handle is closed by whoever closes the loop's. */
void deadlines_close(struct deadlines *deadlines);

/* From now on request_expire is called at request->run.deadline_ns, once, unless it is cleared before. */
void deadline_set(struct deadlines *deadlines, struct request *request);
/* One that isn't set is left alone. */
void deadline_clear(struct deadlines *deadlines, struct request *request);

#endif
