/* The watchdog: kernels on lanes whose provider has a budget, and what becomes of those that exceed it.
 *
 * Layer: server. Threads: watch_begin, watch_pause, watch_resume and watch_end on the lane's, around the kernel; the rest on the loop's. One lock, which the answer to an overdue request is given under, so
 * that either the kernel's end or the budget's comes first.
 * Life: watches_open → watch_begin, watch_end… → watches_close, before the loop is closed. Zeroed memory may be closed. An entry is the lane thread's stack, or a device's job.
 * A kernel can't be taken back. When its budget is over: the log says so, the failure is counted, and its request (each, where several were taken along) is answered with DEADLINE_EXCEEDED. All that the kernel may
 * touch stays until it returns: the request is released then. On a CPU the kernel is told that nobody wants its result (host->cancelled), and another thread takes the place of the stuck one (lane_replace). A graph's
 * run is answered during the node, none of its nodes is begun after it, and it leaves its session's order (server/graph_run.h).
 * On a device the time counts from when the kernel is enqueued, or all before it on the stream has ended; a graph there has the sum of its nodes' budgets (unless one has none), and a failure of it counts for
 * their provider, if it is one. Until the device is done with it, it takes nothing new (device_lane_is_stuck): work goes to another device of the kind, or is UNAVAILABLE.
 * Not watched: kernels on the loop (linked in, microseconds; containment_ran_on_loop looks at a sample), calls without frames (the caller's own thread waits), copies from and to devices. Isolated modules'
 * (server/isolated.h) are ended with their worker. */
#ifndef OPD_SERVER_WATCH_H
#define OPD_SERVER_WATCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

struct device_job;
struct device_lane;
struct impl;
struct lane_exec;
struct provider;
struct request;
struct server;

/* Whose time it is. */
struct watch_subject {
	const struct impl *impl;         /* NULL: of several, nobody knows which */
	const struct provider *provider; /* whose these are; NULL: of several */
	const char *node;                /* of a graph; NULL: the request is no graph's, or it is all of its nodes */
	struct request *request;
	struct lane_exec *exec;          /* NULL: on a device */
	struct device_lane *device;
	struct device_job *members; /* on a device, of several requests: theirs, linked by next; NULL: it is this request's alone */
};

struct watch {
	struct watch *next, **link; /* link NULL: its time isn't counted now */
	struct watch_subject subject;
	uint64_t began_ns;
	uint64_t budget_ns; /* 0: it isn't watched */
	struct watches *watches; /* its request's loop's */
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

/* A kernel's; 0: any. */
uint64_t watch_budget_ns(const struct server *server, const struct provider *provider);
/* The kernel (or plan) begins; nothing happens where there is no budget, or on a lane that is none. */
void watch_begin(struct watch *watch, const struct watch_subject *subject, uint64_t budget_ns);
/* The same on the CPU, with the budget of the implementation's provider. */
void watch_begin_kernel(struct watch *watch, const struct impl *impl, const char *node, struct request *request, struct lane_exec *exec);
/* Its time doesn't count until watch_resume, from where it counts anew. Nothing happens to what isn't watched, or is overdue. */
void watch_pause(struct watch *watch);
void watch_resume(struct watch *watch);
/* It has ended; true: after its request was answered. Zeroed memory may be ended, and again what has ended. */
bool watch_end(struct watch *watch);

#endif
