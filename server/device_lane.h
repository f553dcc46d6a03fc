/* The lane of one device: its thread enqueues copies and kernels on a stream and learns of their completion from events.
 *
 * Layer: server. Threads: device_lane_get, _submit on a context's thread; enqueue and complete on the lane's own; `done` on the job's loop's.
 * Life: device_lane_get (made on first use) → device_lane_submit… → device_lane_drain (finishes what is queued, joins) → device_lane_stop (when nobody has a tensor there any more).
 * While work is in flight the thread polls; otherwise it sleeps. Several jobs are in flight at once: the next one's copies overlap the last one's kernel as far as the device's
 * stream lets them. Which comes next is a scheduler's to say, as on the CPU lane; what is on the stream can't be overtaken, so that no more is put there than `segment` of the configuration
 * (by estimates), but for one job. A job's device time is what the device worked on it alone: from the end of the one before, or its own beginning; of jobs whose end one event tells
 * (opd_backend.flags), an equal part.
 * The thread takes several small jobs out of the queue at once, as many as may be on the stream anyway.
 * Jobs that wait and may run together (server/batch_queue.h) are one job on the stream: the lane's own, whose members they are. When it fails each of them is begun again alone.
 * A lone short job needs no other thread: while the lane is idle, device_lane_run does the same work on its caller's, which looks for the job's end for as long as the job may take, and
 * leaves it to the lane's thread after that, or, if it is a loop and the job should end before long (400 us), keeps the lane and looks in each of its turns (io_loop.kept) until somebody
 * else wants it. One thread at a time works with the device.
 * The stream is made on the lane's thread by its first job: a device's context may take long to make, and a loop must not wait for it.
 * Not here: what a job does on the device (device_run.c: an op, device_move.c: a copy), and what those share (server/device_work.h). */
#ifndef OPD_SERVER_DEVICE_LANE_H
#define OPD_SERVER_DEVICE_LANE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/arena.h"
#include "server/batch_queue.h"
#include "server/lane.h"
#include "server/registry.h"
#include "server/tensors.h"
#include "server/watch.h"

struct server;
struct device_lane;
struct device_held;
struct device_mirror;
struct device_landing;

/* Embedded in what its owner runs; the owner keeps everything that it points to until `done`. */
struct device_job {
	struct device_job *next;
	struct sched_item item;   /* flow, class and estimate are the owner's */
	struct batch_item batch;  /* whom it may take along, and who it: at most `batching.rows` of the configuration */
	uint32_t loop;            /* on which `done` is called */
	struct lane_refusal refusal; /* by a device_lane_submit that was false */
	const char *name;         /* for texts: an op's, or of another kind of request */
	struct account *account;  /* the session's: pays for what the job takes on the device */
	uint64_t deadline_ns;
	uint64_t here_ns; /* so long a caller of device_lane_run looks for its end */
	bool by_loop;     /* that caller is its loop */
	void (*near)(struct device_job *job); /* on its loop, which looks for its end, once: that should come in some 10 us. NULL: nobody asks */
	const _Atomic bool *unwanted; /* true: nobody wants the result any more, it isn't started. NULL: that can't happen */
	/* On the thread that has the lane: enqueues. Writes status and error. */
	void (*enqueue)(struct device_lane *lane, struct device_job *job);
	/* On the thread that has the lane, when the device is done with it and `status` says how it went, or nothing was enqueued; before its memory goes. NULL: nothing to do. */
	void (*complete)(struct device_lane *lane, struct device_job *job);
	/* On its loop, between its beginning on the stream and `done`, once somebody has asked (device_lane_ask): all that comes to the lane from now on finds what the job writes. NULL: nobody asks. */
	void (*begun)(struct device_job *job);
	void (*done)(struct device_job *job);
	opd_status status;
	opd_error error;
	uint64_t queued_ns;
	uint64_t started_ns;
	uint64_t ended_ns;
	uint64_t moves_ns; /* host time spent enqueueing copies */
	uint64_t device_ns; /* once it is done: what the device worked on it alone, or on its rows of what it ran together with */
	/* the lane's */
	struct device_job *members; /* that this one, which is nobody's, is all of; linked by next. NULL: it is its owner's */
	struct device_job *others;  /* taken along when it was picked, linked by next */
	void *event;   /* NULL: a later job's tells of its end, or nothing was enqueued */
	bool enqueued;
	bool recorded;
	struct watch watch; /* of its kernel */
	struct device_held *held; /* device memory that it uses */
	struct device_job *next_begun;
	bool asked;     /* under the lane's mutex: for `begun` */
	bool on_stream; /* … enqueued, and not handed over yet */
	bool attended;  /* its loop was told that its end is near */
	bool writes;    /* its kernels are about to write what it holds for that (device_writes) */
	struct device_mirror *mirrors; /* that it makes: they count once it has succeeded */
	struct device_landing *landings; /* what came back into the ring and belongs elsewhere */
	uint64_t ring_end;        /* of the ring, up to here, is free when it has ended; 0: it uses nothing of it */
	struct arena arena;       /* from enqueue to complete */
};

OPD_MUST_USE opd_status device_lane_get(struct server *server, const struct device *device, uint32_t number, struct device_lane **lane_out,
                                        opd_error *error);
/* False: a queue is full (job->refusal); the job is still its owner's. */
OPD_MUST_USE bool device_lane_submit(struct device_lane *lane, struct device_job *job);
/* Runs a lone job on the calling thread if the lane is idle. DEVICE_BUSY: it isn't, and nothing has happened. DEVICE_ENDED: the job has, `done` isn't called. DEVICE_LEFT: as after device_lane_submit. */
enum device_ran { DEVICE_BUSY, DEVICE_ENDED, DEVICE_LEFT };
enum device_ran device_lane_run(struct device_lane *lane, struct device_job *job);
/* On the loop that has kept it (io_loop_keep): looks for the end of the lone job, and calls its `done`. True: not yet, look again. False: the lane isn't the loop's any more. */
OPD_MUST_USE bool device_lane_look(struct device_lane *lane);
/* The loop that has kept it looks no more. */
void device_lane_let_go(struct device_lane *lane);
/* The lane's scheduler, to read it or to change weights and bounds: for a few instructions. */
struct scheduler *device_lane_scheduler_lock(struct device_lane *lane);
void device_lane_scheduler_unlock(struct device_lane *lane);
/* How long its jobs have waited, by class. */
const struct histogram *device_lane_waits(const struct device_lane *lane, sched_class class);
const char *device_lane_name(const struct device_lane *lane);
/* Somebody waits for what the job writes: its `begun` is called soon, unless it ends before. Once a job; on its loop, between device_submit and `done`. */
void device_lane_ask(struct device_lane *lane, struct device_job *job);
/* It is in a kernel that has exceeded its budget: nothing is submitted to it. Set on the loop, taken back by its thread. */
void device_lane_set_stuck(struct device_lane *lane, bool stuck);
bool device_lane_is_stuck(const struct device_lane *lane);
/* How many of them are. */
uint32_t device_lanes_stuck(const struct server *server);
/* One that was started; NULL: it wasn't. Any thread. */
struct device_lane *device_lane_started(struct server *server, uint32_t number);
/* Takes back a job that hasn't begun, also one that has taken others along (they go on without it): `done` isn't called. False: it is on its way, or has ended, or was never
 * submitted (zeroed memory). Only by the thread that submitted it. */
OPD_MUST_USE bool device_lane_withdraw(struct device_lane *lane, struct device_job *job);
/* How long from now a job of this flow (NULL: of a session that has had none there), class and cost would take to be done, by the estimates of what is there; any thread. */
uint64_t device_lane_finish_ns(struct server *server, uint32_t number, const struct sched_flow *flow, sched_class class, uint64_t cost_ns, uint64_t now_ns);

struct device_lane_use {
	uint64_t memory_bytes;       /* of tensors and scratch */
	uint64_t cached_bytes;       /* free, and kept */
	uint64_t memory_limit_bytes; /* what it has; 0: not known yet */
	uint32_t jobs;               /* not done */
};

/* Loop: how much of the device is in use; zeros where nothing has run there yet. */
void device_lane_use(struct server *server, uint32_t number, struct device_lane_use *use_out);

/* On that loop: calls `done` of every job of its that has ended since. */
void device_lane_finish_done(struct device_lane *lane, uint32_t loop);
/* Waits until all that was submitted has ended; nothing may be submitted after it. */
void device_lane_drain(struct device_lane *lane);
void device_lane_stop(struct device_lane *lane);

#endif
