/* A CPU lane: a pool of threads that runs jobs in the order that a scheduler gives them, and helps with the parallel loops of those that run.
 *
 * Layer: server, bottom (knows nothing of requests). Threads: lane_create, lane_stop, lane_destroy by one; everything else any.
 * Life: lane_create → lane_submit… and lane_take_done of an owner whenever `wake` was called for it → lane_stop (runs what is queued, joins) → lane_take_done once
 * more → lane_destroy.
 * Promises: no lock is held while a job or a share runs; `run` is called exactly once for a submitted job (and again as often as it has yielded), and the job then comes out of
 * lane_take_done exactly once, cancelled or not, unless lane_withdraw took it back before. A job is its owner's memory: the lane doesn't
 * touch it once it is in the list of done ones.
 * Cost, on a 2-core Zen 4 VM (submitter asleep in poll, woken by an eventfd): from lane_submit to the job back in hand 5 µs, of which 3 are that
 * wake-up and 1.9 the job's start; lane_submit itself 0.03 µs while a thread still spins and 1 to 5 µs when one must be woken. A parallel loop
 * that nobody joins costs 0.06 µs. On another, idle core a wake-up takes the 50 to 70 µs of that machine.
 * Device time: a job is charged, to the flow that it names, the time that its thread and its loops' helpers spent on it.
 * Not here: who runs next (server/scheduler.h, under the lane's mutex), and lanes of devices. */
#ifndef OPD_SERVER_LANE_H
#define OPD_SERVER_LANE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"
#include "providers/provider.h"
#include "server/batch_queue.h"
#include "server/histogram.h"
#include "server/scheduler.h"

struct lane;
struct lane_exec;
struct derived_run;

/* Whose queue was full. */
struct lane_refusal {
	sched_full full;
	uint32_t queued;
	uint32_t limit;
	uint64_t wait_ns; /* how long what is queued will take */
};

/* Embedded in what its owner runs. Zeroed but for the callbacks when it is submitted. */
struct lane_job {
	struct lane_job *next; /* the lane's; of a list to submit or to take: the next one */
	struct sched_item item; /* flow, class, estimate, unbounded and first are the owner's. No flow: the lane's own work, which is never refused, as `interactive` */
	uint32_t owner;         /* below lane_options.owners: who takes it when it is done */
	uint64_t charge_ns;     /* device time of the flow's that went by the lane: charged with the submission */
	void (*run)(struct lane_job *job, struct lane_exec *exec); /* on a lane thread */
	void (*done)(struct lane_job *job);                        /* for whoever takes the done jobs: the lane doesn't call it itself */
	_Atomic bool cancelled;                                    /* by lane_cancel */
	struct lane_refusal refusal;                               /* by a lane_submit that was false */
	uint64_t waited_ns; /* once it is done: until it was begun */
	uint64_t device_ns;
	struct batch_item batch; /* whom it may take along, and who it; together at most so many rows as lane_set_batch says. Those taken along: lane_exec.others */
	bool begun;         /* it has yielded: it can't be withdrawn any more */
};

/* What a job may use while it runs. */
struct lane_exec {
	struct lane *lane;    /* NULL: a serial one */
	struct lane_job *job; /* that runs now; NULL: nothing to cancel */
	struct lane_job *leader; /* that the lane has begun: `job`, or one that has taken it along; NULL: a serial one */
	uint32_t threads;     /* that a parallel loop may use, this one included */
	bool in_loop;         /* a parallel loop is open */
	uint64_t helped_ns;   /* time that other threads spent on its loops */
	uint64_t began_ns;
	bool may_yield; /* it can go on later where it was */
	bool again;     /* it wants to: by `run`, which then returns and is called once more when its turn has come */
	struct lane_job *others; /* taken along: `run` of `job` runs these too, and theirs isn't called; linked by next, which stays as it is */
	bool together;           /* what runs is all of them's: cancelled when all are */
	const char *tenant; /* whose job it is, for those who count failures; NULL: nobody's */
	struct derived_run *derived; /* the job's: derived copies that its kernel has; NULL: it gets none */
};

/* A thread without work watches for so long before it sleeps, and yields meanwhile: enough for the next job of a busy client (then lane_submit
 * needs no system call), too short to keep an idle machine busy. Where a yield shows that others want its core it sleeps at once, and so the next times. */
#define LANE_SPIN_NS_DEFAULT 4000u

#define LANE_OWNERS_MAX 32u

struct lane_options {
	const char *name; /* copied; at most 31 bytes. NULL: "cpu" */
	uint32_t threads; /* 1 to 1024 */
	uint64_t spin_ns;
	uint32_t owners;  /* that take done jobs, each its own: at most LANE_OWNERS_MAX; 0: one */
	/* The list of this owner's done jobs is no longer empty: take it soon. On a lane thread, without a lock; not called again before lane_take_done of it. */
	void (*wake)(void *argument, uint32_t owner);
	void *wake_argument;
};

/* RESOURCE_EXHAUSTED: memory or threads. The threads are called opd-lane-0… (of other lanes than "cpu": opd-NAME-0…, as far as it fits) and get no signals. */
OPD_MUST_USE opd_status lane_create(const struct lane_options *options, struct lane **lane_out, opd_error *error);

/* False: the queue of the job's flow, of its group or the lane's is full (job->refusal); the job is still its owner's. Not after lane_stop. Doesn't block but for the queue's own lock, held for
 * a few instructions. */
OPD_MUST_USE bool lane_submit(struct lane *lane, struct lane_job *job);
/* Jobs of the lane's own, linked by next: one lock and at most a few wake-ups for all. */
void lane_submit_list(struct lane *lane, struct lane_job *first);

/* The lane's scheduler, to read it or to change weights and bounds: for a few instructions. */
struct scheduler *lane_scheduler_lock(struct lane *lane);
void lane_scheduler_unlock(struct lane *lane);

/* How long its jobs have waited, by class. */
const struct histogram *lane_waits(const struct lane *lane, sched_class class);

/* A job that can go on later has run for a segment while others wait: it sets exec->again and returns. One relaxed load while nobody waits. */
bool lane_should_yield(const struct lane_exec *exec);
/* How many rows a batch has at most; 0, as at first: nobody is taken along. */
void lane_set_batch(struct lane *lane, uint32_t rows);
/* How long a segment is; 2 ms at first. */
void lane_set_segment(struct lane *lane, uint64_t segment_ns);

/* All of an owner's jobs done since the last call, in the order in which they ended, linked by next; NULL: none. Lock-free. */
struct lane_job *lane_take_done(struct lane *lane, uint32_t owner);
/* The same, and calls done of each (NULL: skipped). Returns how many. */
uint32_t lane_finish_done(struct lane *lane, uint32_t owner);

/* Something is queued or running: a small kernel should then not run on the I/O loop ahead of it. One relaxed load. */
bool lane_busy(const struct lane *lane);
uint32_t lane_threads(const struct lane *lane);
const char *lane_name(const struct lane *lane);

/* Nobody wants the result any more. A queued job is still run: its `run` asks lane_cancelled first. */
void lane_cancel(struct lane_job *job);
bool lane_cancelled(const struct lane_exec *exec);
/* Takes a job that no thread has begun out of the queue, in constant time: it is its owner's again, neither run nor done is called. False: it
 * runs, has ended, or was never submitted (zeroed memory). Only by the thread that submitted it and would take it when done. */
OPD_MUST_USE bool lane_withdraw(struct lane *lane, struct lane_job *job);

/* For a kernel that runs on the I/O loop itself. job: NULL where nothing cancels it. */
struct lane_exec lane_exec_serial(struct lane_job *job);

/* Splits [0, items) into shares of at least `grain` items (0 is taken as 1), runs some of them itself, lets idle threads run others, and
 * returns when all are done. Inside another loop, and where there is one thread or one share, it is a plain call. The thread numbers that
 * `range` sees are below exec->threads, and no two shares run at once with one number. */
void lane_parallel_for(struct lane_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument);

/* A job that runs won't end for long, and its thread is lost to the lane meanwhile: another thread takes its place, and that of threads that help with its loops. When the
 * job ends after all, its thread waits for the next time that one is wanted. False: it doesn't run, or no thread could be started (as many as the lane has can be stuck at once). Any thread. */
bool lane_replace(struct lane *lane, const struct lane_job *job);
/* How many threads are stuck in such jobs now. */
uint32_t lane_stuck(struct lane *lane);

/* Runs all that is queued, ends the threads and waits for them. NULL is allowed. */
void lane_stop(struct lane *lane);
/* After lane_stop, or instead of it. Done jobs that nobody took are forgotten (they are their owners' memory). NULL is allowed. */
void lane_destroy(struct lane *lane);

#endif
