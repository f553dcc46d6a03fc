/* What jobs do on a device lane's thread: take device memory, enqueue copies, say what failed.
 *
 * Layer: server, private to device_*.c and graph_device.c. Threads: the lane's own.
 * Order: a job's enqueue calls device_begin, then the others; what it took is its own until the device is done with it. */
#ifndef OPD_SERVER_DEVICE_WORK_H
#define OPD_SERVER_DEVICE_WORK_H

#include <pthread.h>

#include "proto/latch.h"
#include "server/config.h"
#include "server/device_lane.h"

/* Events that are kept for the next jobs. */
#define DEVICE_EVENTS_KEPT 32u
/* And arenas: as many jobs as one event tells of give theirs back together. */
#define DEVICE_ARENAS_KEPT 8u
/* Of a device, taken once: a driver locks such memory at half a millisecond a MiB. */
#define DEVICE_RING_BYTES (8u << 20)
/* Larger copies go from and to where the bytes lie: what a driver does for them costs less then than a second copy. */
#define DEVICE_RING_PIECE_BYTES (256u << 10)
/* So much of it kernels read and write over the link, instead of a copy: what the ring's own copy costs on the lane. */
#define DEVICE_MAPPED_RING_BYTES (64u << 10)

struct device_lane {
	struct server *server;
	struct device device; /* copied: snapshots come and go */
	uint32_t number;
	struct memory memory; /* the device's */
	_Atomic bool stuck; /* in a kernel that has exceeded its budget */
	_Atomic uint64_t stream_until_ns; /* when what is on the stream should have ended, by its estimates */
	pthread_t thread;
	bool joined;
	pthread_mutex_t mutex; /* of scheduler, done, stopping and taken */
	pthread_cond_t wake;   /* of CLOCK_MONOTONIC */
	bool stopping;
	bool taken; /* somebody works with the device: the lane's thread, or one that runs a lone job itself. What is "the thread's own" below is whose this is */
	_Atomic bool wanted; /* by its thread: a loop that has kept it lets it go. Set under the mutex */
	struct scheduler scheduler;
	struct batch_queue batches; /* queued jobs that others may take along */
	struct histogram waits[CLASS_COUNT]; /* written under the mutex */
	struct device_done {
		struct device_job *first, **end;
		struct device_job *begun; /* asked for, and on the stream */
	} done[CONFIG_LOOPS_MAX]; /* by loop */
	/* the thread's own */
	bool measured; /* the memory's limit is known */
	bool lost;     /* the backend said so: nothing more is begun until it was reset */
	bool given_back;
	opd_error loss;
	void *stream;  /* NULL: made for the next job */
	uint64_t progress_ns; /* when a job was last enqueued or ended */
	struct device_job *flight; /* oldest first */
	struct device_job **flight_end;
	uint32_t in_flight;
	const struct device_job *watched; /* the oldest of the flight, when its time counts */
	uint64_t versions; /* of buffers' bytes, given so far */
	uint32_t making; /* jobs that make mirrors: in flight, or being enqueued */
	struct device_job *again, **again_end; /* that have failed together with others: each is begun alone */
	/* Taken out of the queue together, and not begun yet. More come under the mutex, one goes under the latch, by its thread, or under both. */
	struct latch picked_latch;
	struct device_job *picked, **picked_end;
	_Atomic uint32_t picked_count;
	_Atomic uint64_t picked_ns; /* what they are estimated to take */
	struct device_job *newest;  /* of the flight, where no event follows it yet; NULL: one does */
	uint32_t unmarked;          /* jobs since the last event */
	uint64_t flight_ns;     /* what they were estimated to take */
	uint64_t busy_until_ns; /* when the last one ended */
	unsigned char *ring; /* host memory that is fast to copy from and to; NULL: not taken yet, or there is none */
	unsigned char *ring_mapped; /* where kernels reach it; NULL: nowhere */
	bool ring_refused;
	uint64_t ring_head; /* bytes handed out since it was taken; jobs end in the order in which they began, and so do its pieces */
	uint64_t ring_tail;
	uint32_t event_count;
	void *events[DEVICE_EVENTS_KEPT];
	uint32_t arena_count;
	struct arena arenas[DEVICE_ARENAS_KEPT]; /* reset */
	uint32_t gathered_count; /* copies of the job that is being enqueued */
	opd_copy gathered[OPD_COPIES_MAX];
	struct device_many {
		const struct impl *impl; /* of all of them */
		uint32_t count;
		struct request *requests[OPD_CALLS_MAX];
		const opd_call *calls[OPD_CALLS_MAX]; /* in their jobs' arenas */
	} many; /* kernels of jobs in flight that are yet to be enqueued, together */
};

/* A kernel of the job is enqueued now: its time counts from here on. device_watched: it is, and on the stream its turn comes when what is before it has ended. */
void device_watch(struct device_job *job, const struct watch_subject *subject, uint64_t budget_ns);
void device_watched(struct device_lane *lane, struct device_job *job);
/* It has ended. True: too late, its request is answered. */
bool device_watch_end(struct device_lane *lane, struct device_job *job);
/* Whether one event may tell of several jobs' end: where no work on the device fails alone. */
bool device_shares_events(const struct device_lane *lane);
/* device_many.c. What run is given, without plan, scratch and fault. */
opd_exec device_exec(const struct device_lane *lane, const struct impl *impl, struct lane_exec *serial);
/* Enqueues the request's kernel. */
OPD_MUST_USE opd_status device_kernel(struct device_lane *lane, struct request *request, const opd_call *call, const opd_exec *exec);
/* The request's kernel waits for others of its implementation, until device_many_end; `call` lives as long as the job, whose status may be a failure's by then. All that its job enqueues behind the
 * kernel is to follow device_many_end. False: it can't, and nothing has happened. */
OPD_MUST_USE bool device_many_add(struct device_lane *lane, struct request *request, const opd_call *call);
/* Whatever waits is enqueued. */
void device_many_end(struct device_lane *lane);
/* device_job.c, from here on but where another file is named. The stream is there, and the job has its event; what comes on the stream from now on stands behind all that came before.
 * device_begin_beside: others' kernels may still wait (device_many_add). What the job enqueues then must not touch what they do, until device_many_end. */
OPD_MUST_USE opd_status device_begin(struct device_lane *lane, struct device_job *job);
OPD_MUST_USE opd_status device_begin_beside(struct device_lane *lane, struct device_job *job);
/* A step of the job failed in a function of the backend: the text says where, also when the module said nothing. */
opd_status device_failed(struct device_lane *lane, struct device_job *job, opd_status status, const char *what);
opd_status device_no_memory(struct device_job *job);
/* Any status of the backend's or of an implementation's on the device: OPD_DATA_LOSS means that the device is lost. */
void device_note(struct device_lane *lane, opd_status status, const opd_error *error);
/* device_run.c. For the request's explain, if it wants one. */
void device_note_move(struct request *request, const char *what, uint32_t from, uint32_t to, uint64_t bytes);
/* device_ring.c. A piece of the ring for the job, until it has ended; NULL: too large, or none is free, or the backend has no such memory. */
unsigned char *device_ring_take(struct device_lane *lane, struct device_job *job, uint64_t bytes, void **mapped_out); /* mapped_out: where kernels reach it (NULL: nowhere); may be NULL */
/* The piece's bytes go to `to` when the job has succeeded. False: out of memory. */
OPD_MUST_USE bool device_ring_land(struct device_job *job, void *to, const unsigned char *piece, uint64_t bytes);
void device_ring_settle(struct device_lane *lane, struct device_job *job); /* it has ended */
void device_ring_drop(struct device_lane *lane);                           /* nothing is in flight */
/* device_gather.c. The job's small copies, which are enqueued together by device_gather_end, or each at once where the backend can't: to and from the start of a buffer, none to where another
 * reads or writes. */
OPD_MUST_USE opd_status device_gather_in(struct device_lane *lane, struct device_job *job, const struct buffer *to, const void *from, uint64_t bytes);
OPD_MUST_USE opd_status device_gather_out(struct device_lane *lane, struct device_job *job, void *to, const struct buffer *from, uint64_t bytes);
OPD_MUST_USE opd_status device_gather(struct device_lane *lane, struct device_job *job, const struct buffer *to, const struct buffer *from, uint64_t from_offset,
                                      uint64_t bytes); /* on the device */
OPD_MUST_USE opd_status device_gather_zeros(struct device_lane *lane, struct device_job *job, const struct buffer *to, const void *zeros, uint64_t bytes); /* `zeros`: constant ones of the host's */
OPD_MUST_USE opd_status device_gather_end(struct device_lane *lane, struct device_job *job);
/* device_lost.c. The device has just been lost: new requests pass it over from here on, then the log says so. */
void device_tell_loss(struct device_lane *lane);
/* Nothing is in flight on a lost device: all is given back, the device reset if the backend can. */
void device_give_up(struct device_lane *lane);
/* Drops the stream: nothing enqueued on it touches memory any more when this returns; and events kept for later. */
void device_drop_stream(struct device_lane *lane);

/* Device memory for the job, borrowed until it is complete. When there is none: what is only cached goes, then jobs in flight are waited for, then mirrors go that nobody uses. */
OPD_MUST_USE opd_status device_alloc(struct device_lane *lane, struct device_job *job, uint64_t bytes, struct buffer **buffer_out);
/* The job uses it until it is complete; takes the reference, also when it fails (RESOURCE_EXHAUSTED). */
OPD_MUST_USE opd_status device_hold(struct device_job *job, struct buffer *buffer);
/* The job holds it, and its kernels write it: others may be told so before it has ended. If it fails after job->writes was set, whoever has come to hold the buffer fails with it. */
void device_writes(struct device_job *job, const struct buffer *buffer);
/* What is enqueued next writes it: whoever knows its bytes by their version doesn't any more. A fresh buffer of device_alloc has a version of its own. */
void device_changes(struct device_lane *lane, struct buffer *buffer);
/* Waits until the oldest job in flight has ended; false: there is none. */
bool device_wait(struct device_lane *lane);
/* The buffer's bytes on this device, for the job to read: where they lie already, or a mirror that is made now from a copy in host memory (there must be one). *moved_out: whether it was. */
OPD_MUST_USE opd_status device_bring(struct device_lane *lane, struct device_job *job, struct buffer *buffer, uint64_t bytes, struct buffer **here_out,
                                     bool *moved_out);

OPD_MUST_USE opd_status device_copy_in(struct device_lane *lane, struct device_job *job, const struct buffer *to, uint64_t offset, const void *from,
                                       uint64_t bytes);
OPD_MUST_USE opd_status device_copy_out(struct device_lane *lane, struct device_job *job, void *to, const struct buffer *from, uint64_t offset,
                                        uint64_t bytes);

/* At a job's end, by the lane, in this order. A job before it has failed whose results it reads: so has this one. */
void device_inherit_failure(struct device_job *job);
/* Of one that succeeded: its mirrors are there for others. */
void device_mirrors_settle(struct device_lane *lane, struct device_job *job);
/* It has failed: so will those that have come to hold what it writes. */
void device_bequeath_failure(const struct device_job *job);
/* What it held, its event and its arena are given back. */
void device_release(struct device_lane *lane, struct device_job *job);
/* Kept for a job to come, or destroyed; NULL is allowed. */
void device_give_event(struct device_lane *lane, void *event);

#endif
