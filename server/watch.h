/* The watchdog: kernels on the CPU lane whose provider has a budget, and what becomes of those that exceed it.
 *
 * Layer: server. Threads: watch_begin and watch_end on the lane's, around the kernel; the rest on the loop's. One lock, which the answer to an overdue request is given under, so that either the
 * kernel's end or the budget's comes first.
 * Life: watches_open → watch_begin, watch_end… → watches_close, before the loop is closed. Zeroed memory may be closed. An entry is the lane thread's stack.
 * A kernel on a CPU can't be taken back. When its budget is over: the log says so, it is told that nobody wants its result (host->cancelled), the failure is counted, a run is answered with
 * DEADLINE_EXCEEDED, and another thread takes the place of the stuck one (lane_replace). All that the kernel may touch stays until it returns: the request is released then. A graph's run is answered
 * when its kernel returns: what other runs of it share can't be let go before.
 * Not watched: kernels on the loop (linked in, microseconds; containment_ran_on_loop looks at a sample), calls without frames (the caller's own thread waits), devices. Isolated modules' (server/isolated.h) are ended
 * with their worker. */
#ifndef OPD_SERVER_WATCH_H
#define OPD_SERVER_WATCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

struct impl;
struct lane_exec;
struct request;
struct server;

struct watch {
	struct watches *watches; /* of its request's loop */
	struct watch *next, **link;
	const struct impl *impl; /* NULL: it isn't watched */
	struct request *request;
	struct lane_exec *exec;
	uint64_t began_ns;
	uint64_t budget_ns;
	bool overdue;
};

struct watches {
	pthread_mutex_t mutex; /* of what follows */
	struct watch *first;
	uint64_t armed_ns; /* 0: not */
	int fd;            /* timerfd */
	bool opened;
	uv_poll_t poll;
	struct server *server;
};

/* 0 or libuv's error. */
int watches_open(struct watches *watches, struct server *server, uv_loop_t *loop);
/* Its handle is closed by whoever closes the loop's. */
void watches_close(struct watches *watches);

/* The kernel (or plan) of this implementation begins; nothing happens where its provider has no budget. */
void watch_begin(struct watch *watch, const struct impl *impl, struct request *request, struct lane_exec *exec);
/* It has ended. */
void watch_end(struct watch *watch);

#endif
