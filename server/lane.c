#include "server/lane.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/clock.h"
#include "server/shares.h"

/* Threads that one submission wakes itself; the woken wake the others, so that the I/O loop doesn't pay for all of them. */
#define WAKE_MAX 4u
#define THREADS_MAX 1024u
#define SEGMENT_NS_DEFAULT 2000000u
#define NAME_BYTES 32u
#define DEFAULT_NAME "cpu"

struct worker {
	struct lane *lane;
	uint32_t number;
	bool parked; /* on the lane's stack of sleeping workers */
	struct worker *next_parked;
	bool asleep;  /* nobody has woken it yet */
	sem_t woken;  /* unparked, or its loop's last helper has left, or it is no spare any more */
	uint32_t crowded; /* spins to leave out: its core is wanted by others */
	pthread_t thread;
	/* Under the mutex. */
	const struct lane_job *job; /* that it runs */
	const struct worker *helps; /* whose loop it helps with */
	bool replaced;              /* another has its number */
	bool spare;                 /* … and it waits to be wanted again */
	struct worker *next_spare;
};

/* One parallel_for: on its caller's stack. Listed while it has an owner that still claims shares. */
struct loop {
	struct loop *next, **link;
	struct worker *owner;
	opd_range_fn range;
	void *argument;
	uint64_t items;
	uint32_t shares;
	_Atomic uint32_t claimed; /* shares begun; may run past `shares` */
	_Atomic uint32_t helpers; /* changed under the lane's mutex; read without by the spinning owner */
	_Atomic uint64_t helped_ns; /* their time */
};

/* Jobs that have ended, newest first: one list an owner, each in a cache line of its own. */
struct done_list {
	_Atomic(struct lane_job *) newest;
	char apart[64 - sizeof(struct lane_job *)];
};

struct lane {
	char name[NAME_BYTES];
	/* Written by every submission, read by spinning threads. */
	_Atomic uint32_t load;   /* jobs queued or running */
	_Atomic uint32_t hints;  /* jobs queued, and loops with a share left: what a spinning thread watches */
	struct done_list done[LANE_OWNERS_MAX];

	pthread_mutex_t mutex;
	struct scheduler scheduler; /* of queued jobs */
	struct sched_group own_group;
	struct sched_flow own_flow; /* of jobs that are nobody's */
	struct histogram waits[CLASS_COUNT]; /* written under the mutex */
	_Atomic uint64_t segment_ns;
	_Atomic uint32_t batch_rows;
	struct batch_queue batches; /* queued jobs that others may take along */
	uint64_t ready_ns; /* all that is queued waits for its rate until then; UINT64_MAX: nothing does */
	uint32_t spinning; /* threads that look for work without sleeping */
	uint32_t waking;   /* unparked, not yet running */
	struct worker *parked;
	struct worker *spares;
	uint32_t stuck; /* replaced, and still in their job */
	struct loop *loops;
	bool stopping;

	uint32_t threads; /* of options */
	uint32_t started;
	uint64_t spin_ns;
	uint32_t owners;
	void (*wake)(void *argument, uint32_t owner);
	void *wake_argument;
	struct worker workers[]; /* [2 * threads]: as many again may take the place of stuck ones */
};

/* NULL on threads that are no lane's. */
static _Thread_local struct worker *self;

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* ---- Waking ------------------------------------------------------------------------------------------------------------ */

/* Under the mutex. The loop of a job that is stuck is left to those who are in it: whoever took their place has their numbers. */
static uint32_t loop_left(const struct loop *loop)
{
	if (loop->owner->replaced)
		return 0;
	uint32_t claimed = atomic_load_explicit(&loop->claimed, memory_order_relaxed);
	return claimed < loop->shares ? loop->shares - claimed : 0;
}

/* How many threads could work now. Under the mutex. */
static uint64_t demand(const struct lane *lane)
{
	uint64_t wanted = lane->ready_ns == UINT64_MAX ? lane->scheduler.queued : 0; /* a thread sleeps until then already */
	for (const struct loop *loop = lane->loops; loop != NULL; loop = loop->next)
		wanted += loop_left(loop);
	return wanted;
}

/* Sleeps until it is woken, or until then (NULL: whenever); under the mutex before and after. It may come back for nothing. False: it is time. No condition variable: a thread that
 * one has woken takes the mutex as if others waited for it, and lets it go by a system call that wakes nobody, which every hand-over of a job paid for. */
static bool doze(struct worker *worker, const struct timespec *until)
{
	worker->asleep = true;
	(void)pthread_mutex_unlock(&worker->lane->mutex);
	const int failed = until == NULL ? sem_wait(&worker->woken) : sem_clockwait(&worker->woken, CLOCK_MONOTONIC, until);
	const bool late = failed != 0 && errno == ETIMEDOUT;
	(void)pthread_mutex_lock(&worker->lane->mutex);
	worker->asleep = false;
	return !late;
}

/* Under the mutex. What the thread waits for is there. */
static void rouse(struct worker *worker)
{
	if (worker->asleep)
		(void)sem_post(&worker->woken);
	worker->asleep = false;
}

/* Takes sleeping threads off the stack for work that no thread already on its way will do. They are woken after the mutex is
 * released, so that they don't run into it. */
static uint32_t unpark(struct lane *lane, struct worker *woken[WAKE_MAX])
{
	uint32_t count = 0;
	if (lane->parked == NULL)
		return 0;
	for (uint64_t wanted = demand(lane); count < WAKE_MAX && lane->parked != NULL; count++) {
		if (wanted <= (uint64_t)lane->spinning + lane->waking)
			break;
		struct worker *worker = lane->parked;
		lane->parked = worker->next_parked;
		worker->parked = false;
		worker->asleep = false;
		lane->waking++;
		woken[count] = worker;
	}
	return count;
}

/* Releases the mutex. */
static void unlock_and_wake(struct lane *lane)
{
	struct worker *woken[WAKE_MAX];
	uint32_t count = unpark(lane, woken);
	(void)pthread_mutex_unlock(&lane->mutex);
	for (uint32_t i = 0; i < count; i++)
		(void)sem_post(&woken[i]->woken);
}

/* Jobs wait for their tenants' rates: not longer than that. Comes back off the stack of sleeping threads, counted as one that was woken. */
static void wait_until_ready(struct worker *worker)
{
	struct lane *lane = worker->lane;
	const struct timespec until = {(time_t)(lane->ready_ns / 1000000000u), (long)(lane->ready_ns % 1000000000u)};
	bool in_time = true;
	while (worker->parked && in_time)
		in_time = doze(worker, &until);
	if (!worker->parked)
		return;
	struct worker **link = &lane->parked;
	while (*link != worker)
		link = &(*link)->next_parked;
	*link = worker->next_parked;
	worker->parked = false;
	lane->waking++;
}

/* Sleeps until somebody unparks this thread. Under the mutex, before and after. */
static void park(struct worker *worker)
{
	struct lane *lane = worker->lane;
	worker->parked = true;
	worker->next_parked = lane->parked;
	lane->parked = worker;
	if (lane->ready_ns != UINT64_MAX)
		wait_until_ready(worker);
	while (worker->parked)
		(void)doze(worker, NULL);
	lane->waking--;
}

/* A yield that takes longer has let somebody else run, where a lone one takes 0.3 us. */
#define YIELD_NS 2000u
/* Then so many spins are left out before one tries again. */
#define CROWDED_SPINS 32u

/* False: somebody else wants this core. */
static bool yield(void)
{
	const uint64_t begin = clock_now_ns();
	(void)sched_yield();
	return clock_now_ns() - begin < YIELD_NS;
}

/* Watches for work for at most spin_ns; under the mutex before and after. Yields first: the thread that submits may share this core, and a
 * spin that keeps it off was measured to double a hand-off (9 µs instead of 5). Where somebody does share it, each yield is a switch of threads
 * and back, so sleeping is the cheaper way to wait: a token of kjv-llama on one core took 110 us outside of kernels with the spin, 78 without. */
static void spin(struct worker *worker)
{
	struct lane *lane = worker->lane;
	if (lane->spin_ns == 0)
		return;
	if (worker->crowded != 0) {
		worker->crowded--;
		return;
	}
	lane->spinning++;
	(void)pthread_mutex_unlock(&lane->mutex);
	uint64_t end = clock_now_ns() + lane->spin_ns;
	do {
		if (!yield())
			worker->crowded = CROWDED_SPINS;
		for (int i = 0; i < 16 && atomic_load_explicit(&lane->hints, memory_order_relaxed) == 0; i++)
			pause_cpu();
	} while (worker->crowded == 0 && atomic_load_explicit(&lane->hints, memory_order_relaxed) == 0 && clock_now_ns() < end);
	(void)pthread_mutex_lock(&lane->mutex);
	lane->spinning--;
}

/* ---- Parallel loops ---------------------------------------------------------------------------------------------------- */

/* Runs shares until none is left. */
static void run_shares(struct lane *lane, struct loop *loop, uint32_t number)
{
	for (;;) {
		uint32_t share = atomic_fetch_add_explicit(&loop->claimed, 1, memory_order_relaxed);
		if (share >= loop->shares)
			return;
		if (share == loop->shares - 1)
			(void)atomic_fetch_sub_explicit(&lane->hints, 1, memory_order_relaxed);
		loop->range(loop->argument, shares_begin(loop->items, loop->shares, share), shares_begin(loop->items, loop->shares, share + 1), number);
	}
}

/* Under the mutex, before and after; false: there is nothing to help with. */
static bool help(struct worker *worker)
{
	struct lane *lane = worker->lane;
	struct loop *loop = lane->loops;
	while (loop != NULL && loop_left(loop) == 0)
		loop = loop->next;
	if (loop == NULL)
		return false;
	(void)atomic_fetch_add_explicit(&loop->helpers, 1, memory_order_relaxed);
	worker->helps = loop->owner;
	unlock_and_wake(lane);
	const uint64_t began = clock_now_ns();
	run_shares(lane, loop, worker->number);
	(void)atomic_fetch_add_explicit(&loop->helped_ns, clock_now_ns() - began, memory_order_relaxed);
	(void)pthread_mutex_lock(&lane->mutex);
	worker->helps = NULL;
	/* The owner may return, and the loop be gone, as soon as it sees zero. */
	struct worker *owner = loop->owner;
	if (atomic_fetch_sub_explicit(&loop->helpers, 1, memory_order_release) == 1)
		rouse(owner);
	return true;
}

static void loop_open(struct lane *lane, struct loop *loop)
{
	(void)atomic_fetch_add_explicit(&lane->hints, 1, memory_order_relaxed);
	(void)pthread_mutex_lock(&lane->mutex);
	loop->next = lane->loops;
	loop->link = &lane->loops;
	if (loop->next != NULL)
		loop->next->link = &loop->next;
	lane->loops = loop;
	unlock_and_wake(lane);
}

/* A helper is in its last share: it is worth a short spin, since sleeping costs more than what is left of most shares. */
static void wait_for_helpers(struct lane *lane, struct loop *loop)
{
	for (uint64_t end = clock_now_ns() + lane->spin_ns; clock_now_ns() < end; (void)sched_yield())
		if (atomic_load_explicit(&loop->helpers, memory_order_acquire) == 0)
			return;
	(void)pthread_mutex_lock(&lane->mutex);
	while (atomic_load_explicit(&loop->helpers, memory_order_acquire) != 0)
		(void)doze(loop->owner, NULL);
	(void)pthread_mutex_unlock(&lane->mutex);
}

static void loop_close(struct lane *lane, struct loop *loop)
{
	(void)pthread_mutex_lock(&lane->mutex);
	*loop->link = loop->next;
	if (loop->next != NULL)
		loop->next->link = loop->link;
	bool helped = atomic_load_explicit(&loop->helpers, memory_order_acquire) != 0;
	(void)pthread_mutex_unlock(&lane->mutex);
	if (helped)
		wait_for_helpers(lane, loop);
}

void lane_parallel_for(struct lane_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	uint32_t shares = shares_count(items, grain, exec->threads);
	if (items == 0)
		return;
	if (exec->lane == NULL || exec->threads == 1 || shares <= 1 || exec->in_loop) {
		range(argument, 0, items, exec->lane == NULL ? 0 : self->number);
		return;
	}
	struct loop loop = {.owner = self, .range = range, .argument = argument, .items = items, .shares = shares};
	exec->in_loop = true;
	loop_open(exec->lane, &loop);
	run_shares(exec->lane, &loop, self->number);
	loop_close(exec->lane, &loop);
	exec->helped_ns += atomic_load_explicit(&loop.helped_ns, memory_order_relaxed);
	exec->in_loop = false;
}

/* ---- Batches: under the mutex -------------------------------------------------------------------------------------------- */

static void note_begun(struct lane *lane, struct lane_job *job, uint64_t began_ns)
{
	job->waited_ns = began_ns > job->item.queued_ns ? began_ns - job->item.queued_ns : 0;
	job->device_ns = 0;
	histogram_add(&lane->waits[job->item.class], job->waited_ns, false);
}

static struct lane_job *job_of(struct batch_item *batch)
{
	return (struct lane_job *)(void *)((char *)batch - offsetof(struct lane_job, batch));
}

/* Those that wait and may run with a job that is begun, oldest first, linked by `next`; they are begun too. */
static struct lane_job *take_along(struct lane *lane, struct lane_job *leader, uint64_t began_ns)
{
	struct lane_job *first = NULL, **end = &first;
	batch_queue_remove(&lane->batches, &leader->batch);
	struct batch_item *taken = batch_queue_take(&lane->batches, &lane->scheduler, &leader->batch, atomic_load_explicit(&lane->batch_rows, memory_order_relaxed), began_ns);
	for (; taken != NULL; taken = taken->next) {
		struct lane_job *job = job_of(taken);
		(void)atomic_fetch_sub_explicit(&lane->hints, 1, memory_order_relaxed);
		note_begun(lane, job, began_ns);
		job->next = NULL;
		*end = job;
		end = &job->next;
	}
	return first;
}

/* They have taken device_ns together: each by its rows. */
static void complete(struct lane *lane, struct lane_job *leader, struct lane_job *others, uint64_t device_ns)
{
	uint64_t rows = 0;
	for (const struct lane_job *job = others; job != NULL; job = job->next)
		rows += job->batch.rows;
	const uint64_t all = rows + leader->batch.rows;
	const uint64_t own_ns = rows == 0 ? device_ns : (uint64_t)((double)device_ns * leader->batch.rows / (double)all);
	leader->device_ns += own_ns;
	scheduler_complete(&lane->scheduler, leader->item.flow, (sched_class)leader->item.class, leader->item.estimate_ns, own_ns);
	for (struct lane_job *job = others; job != NULL; job = job->next) {
		job->device_ns = (uint64_t)((double)device_ns * job->batch.rows / (double)(all == 0 ? 1 : all));
		scheduler_complete(&lane->scheduler, job->item.flow, (sched_class)job->item.class, job->item.estimate_ns, job->device_ns);
	}
}

/* ---- Jobs -------------------------------------------------------------------------------------------------------------- */

/* Under the mutex. */
static bool enqueue(struct lane *lane, struct lane_job *job, uint64_t time_ns)
{
	struct sched_item *item = &job->item;
	assert(!lane->stopping && job->owner < lane->owners);
	if (item->flow == NULL) {
		item->flow = &lane->own_flow;
		item->class = CLASS_INTERACTIVE;
		item->unbounded = true;
	}
	if (job->charge_ns != 0) {
		scheduler_charge(&lane->scheduler, item->flow, (sched_class)item->class, job->charge_ns);
		job->charge_ns = 0;
	}
	if (!scheduler_submit(&lane->scheduler, item, time_ns)) {
		struct lane_refusal *refusal = &job->refusal;
		refusal->full = scheduler_full(&lane->scheduler, item->flow, &refusal->queued, &refusal->limit);
		refusal->wait_ns = scheduler_wait_ns(&lane->scheduler, item->flow, (sched_class)item->class);
		return false;
	}
	(void)atomic_fetch_add_explicit(&lane->load, 1, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&lane->hints, 1, memory_order_relaxed);
	lane->ready_ns = UINT64_MAX; /* whether it may run is the next pick's to say */
	if (job->batch.number != 0)
		batch_queue_add(&lane->batches, &job->batch, item);
	return true;
}

bool lane_submit(struct lane *lane, struct lane_job *job)
{
	const uint64_t time_ns = clock_now_ns();
	(void)pthread_mutex_lock(&lane->mutex);
	bool queued = enqueue(lane, job, time_ns);
	unlock_and_wake(lane);
	return queued;
}

void lane_submit_list(struct lane *lane, struct lane_job *first)
{
	const uint64_t time_ns = clock_now_ns();
	(void)pthread_mutex_lock(&lane->mutex);
	for (struct lane_job *job = first, *next; job != NULL; job = next) {
		next = job->next;
		bool queued = enqueue(lane, job, time_ns);
		assert(queued && job->item.flow == &lane->own_flow);
		(void)queued;
	}
	unlock_and_wake(lane);
}

struct scheduler *lane_scheduler_lock(struct lane *lane)
{
	(void)pthread_mutex_lock(&lane->mutex);
	return &lane->scheduler;
}

void lane_scheduler_unlock(struct lane *lane)
{
	if (scheduler_runnable(&lane->scheduler)) /* somebody's rate may be another one now, and the threads still sleep until the old one's time */
		lane->ready_ns = UINT64_MAX;
	unlock_and_wake(lane);
}

/* To the list of done ones; from then on the job is its owner's. */
static void job_finish(struct lane *lane, struct lane_job *job)
{
	(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	const uint32_t owner = job->owner;
	_Atomic(struct lane_job *) *list = &lane->done[owner].newest;
	struct lane_job *newest = atomic_load_explicit(list, memory_order_relaxed);
	do
		job->next = newest;
	while (!atomic_compare_exchange_weak_explicit(list, &newest, job, memory_order_release, memory_order_relaxed));
	if (newest == NULL)
		lane->wake(lane->wake_argument, owner);
}

struct lane_job *lane_take_done(struct lane *lane, uint32_t owner)
{
	struct lane_job *newest = atomic_exchange_explicit(&lane->done[owner].newest, NULL, memory_order_acquire);
	struct lane_job *oldest = NULL;
	while (newest != NULL) {
		struct lane_job *next = newest->next;
		newest->next = oldest;
		oldest = newest;
		newest = next;
	}
	return oldest;
}

uint32_t lane_finish_done(struct lane *lane, uint32_t owner)
{
	uint32_t count = 0;
	for (struct lane_job *job = lane_take_done(lane, owner), *next; job != NULL; job = next, count++) {
		next = job->next; /* done may free or submit the job */
		if (job->done != NULL)
			job->done(job);
	}
	return count;
}

bool lane_withdraw(struct lane *lane, struct lane_job *job)
{
	(void)pthread_mutex_lock(&lane->mutex);
	bool queued = !job->begun && scheduler_withdraw(&lane->scheduler, &job->item);
	if (queued)
		batch_queue_remove(&lane->batches, &job->batch);
	(void)pthread_mutex_unlock(&lane->mutex);
	if (queued) {
		(void)atomic_fetch_sub_explicit(&lane->hints, 1, memory_order_relaxed);
		(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	}
	return queued;
}

/* Under the mutex; NULL: none may run now. */
static struct lane_job *pick(struct lane *lane, uint64_t time_ns)
{
	struct sched_item *item = scheduler_pick(&lane->scheduler, time_ns, &lane->ready_ns);
	if (item == NULL)
		return NULL;
	(void)atomic_fetch_sub_explicit(&lane->hints, 1, memory_order_relaxed);
	return (struct lane_job *)(void *)((char *)item - offsetof(struct lane_job, item));
}

/* Under the mutex: it has yielded, and waits for its next segment. */
static void requeue(struct lane *lane, struct lane_job *job)
{
	job->begun = true;
	job->item.estimate_ns = atomic_load_explicit(&lane->segment_ns, memory_order_relaxed);
	scheduler_resubmit(&lane->scheduler, &job->item, clock_now_ns());
	(void)atomic_fetch_add_explicit(&lane->hints, 1, memory_order_relaxed);
	lane->ready_ns = UINT64_MAX;
}

/* Under the mutex, before and after; false: nothing is queued that may run. */
static bool run_next(struct worker *worker)
{
	struct lane *lane = worker->lane;
	if (lane->scheduler.queued == 0) {
		lane->ready_ns = UINT64_MAX;
		return false;
	}
	const uint64_t began_ns = clock_now_ns();
	struct lane_job *job = pick(lane, began_ns);
	if (job == NULL)
		return false;
	if (!job->begun)
		note_begun(lane, job, began_ns);
	struct lane_job *const others = job->batch.number == 0 ? NULL : take_along(lane, job, began_ns);
	worker->job = job;
	unlock_and_wake(lane);
	struct lane_exec exec = {.lane = lane, .job = job, .leader = job, .threads = lane->threads, .began_ns = began_ns, .may_yield = true, .others = others};
	job->run(job, &exec);
	const uint64_t device_ns = clock_now_ns() - began_ns + exec.helped_ns;
	/* Before the job is its owner's again, who may then free the flow. */
	(void)pthread_mutex_lock(&lane->mutex);
	complete(lane, job, others, device_ns);
	worker->job = NULL;
	if (exec.again)
		requeue(lane, job);
	if (worker->replaced) /* it wasn't counted any more */
		(void)atomic_fetch_add_explicit(&lane->load, 1, memory_order_relaxed);
	(void)pthread_mutex_unlock(&lane->mutex);
	if (!exec.again)
		job_finish(lane, job);
	for (struct lane_job *each = others, *next; each != NULL; each = next) {
		next = each->next;
		job_finish(lane, each);
	}
	(void)pthread_mutex_lock(&lane->mutex);
	return true;
}

/* Loops first: their job has been running, and holds memory, for longer. */
static bool work(struct worker *worker)
{
	return help(worker) || run_next(worker);
}

/* Another thread has taken its number while it was stuck: waits until it is given one again. Under the mutex. */
static void wait_as_spare(struct worker *worker)
{
	struct lane *lane = worker->lane;
	lane->stuck--;
	worker->spare = true;
	worker->next_spare = lane->spares;
	lane->spares = worker;
	while (worker->spare && !lane->stopping)
		(void)doze(worker, NULL);
	worker->replaced = false;
}

static void *worker_main(void *argument)
{
	struct worker *worker = argument;
	struct lane *lane = worker->lane;
	self = worker;
	(void)pthread_mutex_lock(&lane->mutex);
	for (;;) {
		if (worker->replaced)
			wait_as_spare(worker);
		if (worker->spare) /* to the end */
			break;
		if (work(worker))
			continue;
		if (lane->stopping)
			break;
		spin(worker);
		if (!work(worker) && !lane->stopping)
			park(worker);
	}
	(void)pthread_mutex_unlock(&lane->mutex);
	return NULL;
}

bool lane_should_yield(const struct lane_exec *exec)
{
	if (!exec->may_yield || exec->in_loop || atomic_load_explicit(&exec->lane->hints, memory_order_relaxed) == 0)
		return false;
	return clock_now_ns() - exec->began_ns >= atomic_load_explicit(&exec->lane->segment_ns, memory_order_relaxed);
}

void lane_set_batch(struct lane *lane, uint32_t rows)
{
	atomic_store_explicit(&lane->batch_rows, rows, memory_order_relaxed);
}

void lane_set_segment(struct lane *lane, uint64_t segment_ns)
{
	atomic_store_explicit(&lane->segment_ns, segment_ns, memory_order_relaxed);
}

const struct histogram *lane_waits(const struct lane *lane, sched_class class)
{
	return &lane->waits[class];
}

bool lane_busy(const struct lane *lane)
{
	return atomic_load_explicit(&lane->load, memory_order_relaxed) != 0;
}

uint32_t lane_threads(const struct lane *lane)
{
	return lane->threads;
}

const char *lane_name(const struct lane *lane)
{
	return lane->name;
}

void lane_cancel(struct lane_job *job)
{
	atomic_store_explicit(&job->cancelled, true, memory_order_relaxed);
}

bool lane_cancelled(const struct lane_exec *exec)
{
	bool cancelled = exec->job != NULL && atomic_load_explicit(&exec->job->cancelled, memory_order_relaxed);
	for (const struct lane_job *job = exec->together ? exec->others : NULL; cancelled && job != NULL; job = job->next)
		cancelled = job->batch.rows == 0 || atomic_load_explicit(&job->cancelled, memory_order_relaxed);
	return cancelled;
}

struct lane_exec lane_exec_serial(struct lane_job *job)
{
	return (struct lane_exec){.job = job, .threads = 1};
}

/* ---- Life -------------------------------------------------------------------------------------------------------------- */

/* Of the lane's threads, the next that isn't started yet. */
static bool start_worker(struct lane *lane, uint32_t number)
{
	struct worker *worker = &lane->workers[lane->started];
	worker->lane = lane;
	worker->number = number;
	(void)sem_init(&worker->woken, 0, 0);
	if (pthread_create(&worker->thread, NULL, worker_main, worker) != 0) {
		(void)sem_destroy(&worker->woken);
		return false;
	}
	char name[16];
	const bool only = strcmp(lane->name, DEFAULT_NAME) == 0;
	(void)snprintf(name, sizeof name, "opd-%.5s-%u", only ? "lane" : lane->name, number % 100000);
	(void)pthread_setname_np(worker->thread, name);
	lane->started++;
	return true;
}

/* Signals are the main thread's business: the new threads inherit a mask that blocks them all. */
static void start_workers(struct lane *lane)
{
	sigset_t all, before;
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	for (uint32_t i = 0; i < lane->threads; i++)
		if (!start_worker(lane, i))
			break;
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Under the mutex. */
static bool replace(struct lane *lane, struct worker *stuck)
{
	struct worker *spare = lane->spares;
	if (spare != NULL) {
		lane->spares = spare->next_spare;
		spare->number = stuck->number;
		spare->spare = false;
		rouse(spare);
	} else {
		sigset_t all, before;
		(void)sigfillset(&all);
		(void)pthread_sigmask(SIG_SETMASK, &all, &before);
		const bool started = lane->started < 2 * lane->threads && start_worker(lane, stuck->number);
		(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
		if (!started)
			return false;
	}
	stuck->replaced = true;
	lane->stuck++;
	return true;
}

bool lane_replace(struct lane *lane, const struct lane_job *job)
{
	struct worker *owner = NULL;
	(void)pthread_mutex_lock(&lane->mutex);
	const uint32_t started = lane->started;
	for (uint32_t i = 0; i < started; i++)
		if (lane->workers[i].job == job && !lane->workers[i].replaced)
			owner = &lane->workers[i];
	bool replaced = owner != NULL && !lane->stopping && replace(lane, owner);
	if (replaced)
		(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	for (uint32_t i = 0; replaced && i < started; i++)
		if (lane->workers[i].helps == owner && !lane->workers[i].replaced)
			(void)replace(lane, &lane->workers[i]);
	(void)pthread_mutex_unlock(&lane->mutex);
	return replaced;
}

uint32_t lane_stuck(struct lane *lane)
{
	(void)pthread_mutex_lock(&lane->mutex);
	const uint32_t stuck = lane->stuck;
	(void)pthread_mutex_unlock(&lane->mutex);
	return stuck;
}

opd_status lane_create(const struct lane_options *options, struct lane **lane_out, opd_error *error)
{
	const uint32_t threads = options->threads;
	if (threads == 0 || threads > THREADS_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "lane: %u threads, expected 1 to %u", threads, THREADS_MAX);
	if (options->owners > LANE_OWNERS_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "lane: %u owners, expected at most %u", options->owners, LANE_OWNERS_MAX);
	struct lane *lane = calloc(1, sizeof *lane + 2 * (size_t)threads * sizeof lane->workers[0]);
	if (lane == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "lane: out of memory");
	(void)snprintf(lane->name, sizeof lane->name, "%s", options->name == NULL ? DEFAULT_NAME : options->name);
	(void)pthread_mutex_init(&lane->mutex, NULL);
	scheduler_init(&lane->scheduler);
	lane->scheduler.servers = threads;
	sched_group_init(&lane->own_group, SCHED_WEIGHT_DEFAULT);
	sched_flow_init(&lane->own_flow, &lane->own_group, SCHED_WEIGHT_DEFAULT);
	batch_queue_init(&lane->batches);
	lane->ready_ns = UINT64_MAX;
	lane->segment_ns = SEGMENT_NS_DEFAULT;
	lane->threads = threads;
	lane->spin_ns = options->spin_ns;
	lane->owners = options->owners == 0 ? 1 : options->owners;
	lane->wake = options->wake;
	lane->wake_argument = options->wake_argument;
	start_workers(lane);
	if (lane->started < threads) {
		opd_status status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "lane: %u of %u threads could be started", lane->started, threads);
		lane_destroy(lane);
		return status;
	}
	*lane_out = lane;
	return OPD_OK;
}

static void unpark_all(struct lane *lane)
{
	for (; lane->parked != NULL; lane->parked = lane->parked->next_parked) {
		lane->parked->parked = false;
		lane->waking++;
		rouse(lane->parked);
	}
}

void lane_stop(struct lane *lane)
{
	if (lane == NULL)
		return;
	(void)pthread_mutex_lock(&lane->mutex);
	lane->stopping = true;
	scheduler_forget_rates(&lane->scheduler);
	unpark_all(lane);
	for (struct worker *spare = lane->spares; spare != NULL; spare = spare->next_spare)
		rouse(spare);
	(void)pthread_mutex_unlock(&lane->mutex);
	for (; lane->started > 0; lane->started--) {
		struct worker *worker = &lane->workers[lane->started - 1];
		(void)pthread_join(worker->thread, NULL);
		(void)sem_destroy(&worker->woken);
	}
}

void lane_destroy(struct lane *lane)
{
	if (lane == NULL)
		return;
	lane_stop(lane);
	(void)pthread_mutex_destroy(&lane->mutex);
	free(lane);
}
