/* The lane of one device: its thread enqueues copies and kernels on a stream and learns of their completion from events.
 *
 * Layer: server. Threads: device_lane_get, _submit on a context's thread; the rest on the lane's own; `done` on the loop's.
 * Life: device_lane_get (made on first use) → device_lane_submit… → device_lane_stop (finishes what is queued, joins).
 * While work is in flight the thread polls; otherwise it sleeps. Several jobs are in flight at once: the next one's copies overlap the last one's kernel as far as the device's
 * stream lets them. A job that finds no device memory waits for those in flight before it fails.
 * The stream is made on the lane's thread by its first job: a device's context may take long to make, and a loop must not wait for it.
 * Operands are host memory and are copied in and out: tensors that live on a device come with resident tensors. */
#ifndef OPD_SERVER_DEVICE_LANE_H
#define OPD_SERVER_DEVICE_LANE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "server/dispatch.h"

struct server;
struct device_lane;
struct device_work;

/* Embedded in what its owner runs; the owner keeps everything that it points to until `done`. */
struct device_job {
	struct device_job *next;
	struct device_job **link; /* the lane's: what points to it while it is queued, else NULL */
	const struct op *op;
	struct dispatch *dispatch; /* impl, and plan or plan_missing */
	const opd_call *call;      /* bound to host memory */
	uint64_t deadline_ns;
	const _Atomic bool *unwanted; /* true: nobody wants the result any more, it isn't started. NULL: that can't happen */
	void (*done)(struct device_job *job);
	opd_status status;
	opd_error error;
	bool begun; /* the kernel was enqueued */
	bool plan_refused;
	uint64_t started_ns;
	uint64_t ended_ns;
	uint64_t moves_ns; /* host time spent enqueueing copies */
	struct device_work *work; /* the lane's: device memory of the job */
};

OPD_MUST_USE opd_status device_lane_get(struct server *server, const struct device *device, uint32_t number, struct device_lane **lane_out,
                                        opd_error *error);
void device_lane_submit(struct device_lane *lane, struct device_job *job);
/* Takes a job that the lane's thread hasn't begun out of the queue: `done` isn't called. False: it is on its way, or has ended, or was never
 * submitted (zeroed memory). Only by the thread that submitted it. */
OPD_MUST_USE bool device_lane_withdraw(struct device_lane *lane, struct device_job *job);
/* Jobs of a device that haven't ended, of all sessions; any thread. */
uint32_t device_lane_load(struct server *server, uint32_t number);

/* On the loop: calls `done` of every job that has ended since. */
void device_lane_finish_done(struct device_lane *lane);
/* Waits until all that was submitted has ended; nothing may be submitted after it. */
void device_lane_drain(struct device_lane *lane);
void device_lane_stop(struct device_lane *lane);

#endif
