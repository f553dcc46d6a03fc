#include "server/lane.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Threads that one submission wakes itself; the woken wake the others, so that the I/O loop doesn't pay for all of them. */
#define WAKE_MAX 4u
/* Shares a thread of a loop: a helper that comes late, or a core that is slower, then costs a quarter of a share at most. */
#define SHARES_PER_THREAD 4u
#define THREADS_MAX 1024u

struct worker {
	struct lane *lane;
	uint32_t number;
	bool parked; /* on the lane's stack of sleeping workers */
	struct worker *next_parked;
	pthread_cond_t cond; /* unparked, or its loop's last helper has left */
	pthread_t thread;
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
};

struct lane {
	/* Written by every submission, read by spinning threads. */
	_Atomic uint32_t load;   /* jobs queued or running */
	_Atomic uint32_t hints;  /* jobs queued, and loops with a share left: what a spinning thread watches */
	_Atomic(struct lane_job *) done; /* newest first */

	pthread_mutex_t mutex;
	struct lane_job *head, **tail; /* queued */
	uint32_t queued;
	uint32_t spinning; /* threads that look for work without sleeping */
	uint32_t waking;   /* unparked, not yet running */
	struct worker *parked;
	struct loop *loops;
	bool stopping;

	uint32_t threads; /* of options */
	uint32_t started;
	uint64_t spin_ns;
	void (*wake)(void *argument);
	void *wake_argument;
	struct worker workers[];
};

/* NULL on threads that are no lane's. */
static _Thread_local struct worker *self;

static uint64_t now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* ---- Waking ------------------------------------------------------------------------------------------------------------ */

static uint32_t loop_left(const struct loop *loop)
{
	uint32_t claimed = atomic_load_explicit(&loop->claimed, memory_order_relaxed);
	return claimed < loop->shares ? loop->shares - claimed : 0;
}

/* How many threads could work now. Under the mutex. */
static uint64_t demand(const struct lane *lane)
{
	uint64_t wanted = lane->queued;
	for (const struct loop *loop = lane->loops; loop != NULL; loop = loop->next)
		wanted += loop_left(loop);
	return wanted;
}

/* Takes sleeping threads off the stack for work that no thread already on its way will do. Their conditions are signalled after the mutex is
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
		(void)pthread_cond_signal(&woken[i]->cond);
}

/* Sleeps until somebody unparks this thread. Under the mutex, before and after. */
static void park(struct worker *worker)
{
	struct lane *lane = worker->lane;
	worker->parked = true;
	worker->next_parked = lane->parked;
	lane->parked = worker;
	while (worker->parked)
		(void)pthread_cond_wait(&worker->cond, &lane->mutex);
	lane->waking--;
}

/* Watches for work for at most spin_ns; under the mutex before and after. Yields first: the thread that submits may share this core, and a
 * spin that keeps it off was measured to double a hand-off (9 µs instead of 5). */
static void spin(struct lane *lane)
{
	if (lane->spin_ns == 0)
		return;
	lane->spinning++;
	(void)pthread_mutex_unlock(&lane->mutex);
	uint64_t end = now_ns() + lane->spin_ns;
	do {
		(void)sched_yield();
		for (int i = 0; i < 16 && atomic_load_explicit(&lane->hints, memory_order_relaxed) == 0; i++)
			pause_cpu();
	} while (atomic_load_explicit(&lane->hints, memory_order_relaxed) == 0 && now_ns() < end);
	(void)pthread_mutex_lock(&lane->mutex);
	lane->spinning--;
}

/* ---- Parallel loops ---------------------------------------------------------------------------------------------------- */

static uint64_t share_begin(const struct loop *loop, uint32_t share)
{
	uint64_t each = loop->items / loop->shares;
	uint64_t more = loop->items % loop->shares; /* so many of the first have one item more */
	return each * share + (share < more ? share : more);
}

/* Runs shares until none is left. */
static void run_shares(struct lane *lane, struct loop *loop, uint32_t number)
{
	for (;;) {
		uint32_t share = atomic_fetch_add_explicit(&loop->claimed, 1, memory_order_relaxed);
		if (share >= loop->shares)
			return;
		if (share == loop->shares - 1)
			(void)atomic_fetch_sub_explicit(&lane->hints, 1, memory_order_relaxed);
		loop->range(loop->argument, share_begin(loop, share), share_begin(loop, share + 1), number);
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
	unlock_and_wake(lane);
	run_shares(lane, loop, worker->number);
	(void)pthread_mutex_lock(&lane->mutex);
	/* The owner may return, and the loop be gone, as soon as it sees zero. */
	struct worker *owner = loop->owner;
	if (atomic_fetch_sub_explicit(&loop->helpers, 1, memory_order_release) == 1)
		(void)pthread_cond_signal(&owner->cond);
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
	for (uint64_t end = now_ns() + lane->spin_ns; now_ns() < end; (void)sched_yield())
		if (atomic_load_explicit(&loop->helpers, memory_order_acquire) == 0)
			return;
	(void)pthread_mutex_lock(&lane->mutex);
	while (atomic_load_explicit(&loop->helpers, memory_order_acquire) != 0)
		(void)pthread_cond_wait(&loop->owner->cond, &lane->mutex);
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

static uint32_t count_shares(uint64_t items, uint64_t grain, uint32_t threads)
{
	uint64_t shares = items / (grain == 0 ? 1 : grain);
	uint64_t most = (uint64_t)threads * SHARES_PER_THREAD;
	return (uint32_t)(shares < most ? shares : most);
}

void lane_parallel_for(struct lane_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	uint32_t shares = count_shares(items, grain, exec->threads);
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
	exec->in_loop = false;
}

/* ---- Jobs -------------------------------------------------------------------------------------------------------------- */

void lane_submit(struct lane *lane, struct lane_job *job)
{
	job->next = NULL;
	lane_submit_list(lane, job);
}

void lane_submit_list(struct lane *lane, struct lane_job *first)
{
	if (first == NULL)
		return;
	uint32_t count = 1;
	struct lane_job *last = first;
	for (; last->next != NULL; last = last->next)
		count++;
	(void)atomic_fetch_add_explicit(&lane->load, count, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&lane->hints, count, memory_order_relaxed);
	(void)pthread_mutex_lock(&lane->mutex);
	assert(!lane->stopping);
	*lane->tail = first;
	for (struct lane_job **link = lane->tail; *link != NULL; link = &(*link)->next)
		(*link)->link = link;
	lane->tail = &last->next;
	lane->queued += count;
	unlock_and_wake(lane);
}

/* To the list of done ones; from then on the job is its owner's. */
static void job_finish(struct lane *lane, struct lane_job *job)
{
	(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	struct lane_job *newest = atomic_load_explicit(&lane->done, memory_order_relaxed);
	do
		job->next = newest;
	while (!atomic_compare_exchange_weak_explicit(&lane->done, &newest, job, memory_order_release, memory_order_relaxed));
	if (newest == NULL)
		lane->wake(lane->wake_argument);
}

struct lane_job *lane_take_done(struct lane *lane)
{
	struct lane_job *newest = atomic_exchange_explicit(&lane->done, NULL, memory_order_acquire);
	struct lane_job *oldest = NULL;
	while (newest != NULL) {
		struct lane_job *next = newest->next;
		newest->next = oldest;
		oldest = newest;
		newest = next;
	}
	return oldest;
}

uint32_t lane_finish_done(struct lane *lane)
{
	uint32_t count = 0;
	for (struct lane_job *job = lane_take_done(lane), *next; job != NULL; job = next, count++) {
		next = job->next; /* done may free or submit the job */
		if (job->done != NULL)
			job->done(job);
	}
	return count;
}

/* Under the mutex. */
static void dequeue(struct lane *lane, struct lane_job *job)
{
	*job->link = job->next;
	if (job->next != NULL)
		job->next->link = job->link;
	else
		lane->tail = job->link;
	job->link = NULL;
	lane->queued--;
	(void)atomic_fetch_sub_explicit(&lane->hints, 1, memory_order_relaxed);
}

bool lane_withdraw(struct lane *lane, struct lane_job *job)
{
	(void)pthread_mutex_lock(&lane->mutex);
	bool queued = job->link != NULL;
	if (queued)
		dequeue(lane, job);
	(void)pthread_mutex_unlock(&lane->mutex);
	if (queued)
		(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	return queued;
}

/* Under the mutex, before and after; false: nothing is queued. */
static bool run_next(struct worker *worker)
{
	struct lane *lane = worker->lane;
	struct lane_job *job = lane->head;
	if (job == NULL)
		return false;
	dequeue(lane, job);
	unlock_and_wake(lane);
	struct lane_exec exec = {.lane = lane, .job = job, .threads = lane->threads};
	job->run(job, &exec);
	job_finish(lane, job);
	(void)pthread_mutex_lock(&lane->mutex);
	return true;
}

/* Loops first: their job has been running, and holds memory, for longer. */
static bool work(struct worker *worker)
{
	return help(worker) || run_next(worker);
}

static void *worker_main(void *argument)
{
	struct worker *worker = argument;
	struct lane *lane = worker->lane;
	self = worker;
	(void)pthread_mutex_lock(&lane->mutex);
	for (;;) {
		if (work(worker))
			continue;
		if (lane->stopping)
			break;
		spin(lane);
		if (!work(worker) && !lane->stopping)
			park(worker);
	}
	(void)pthread_mutex_unlock(&lane->mutex);
	return NULL;
}

bool lane_busy(const struct lane *lane)
{
	return atomic_load_explicit(&lane->load, memory_order_relaxed) != 0;
}

uint32_t lane_threads(const struct lane *lane)
{
	return lane->threads;
}

void lane_cancel(struct lane_job *job)
{
	atomic_store_explicit(&job->cancelled, true, memory_order_relaxed);
}

bool lane_cancelled(const struct lane_exec *exec)
{
	return exec->job != NULL && atomic_load_explicit(&exec->job->cancelled, memory_order_relaxed);
}

struct lane_exec lane_exec_serial(struct lane_job *job)
{
	return (struct lane_exec){.job = job, .threads = 1};
}

/* ---- Life -------------------------------------------------------------------------------------------------------------- */

static uint32_t count_cores(void)
{
	cpu_set_t set;
	if (sched_getaffinity(0, sizeof set, &set) != 0)
		return 1;
	int count = CPU_COUNT(&set);
	return count < 1 ? 1 : (uint32_t)count;
}

static bool start_worker(struct lane *lane, uint32_t number)
{
	struct worker *worker = &lane->workers[number];
	worker->lane = lane;
	worker->number = number;
	(void)pthread_cond_init(&worker->cond, NULL);
	if (pthread_create(&worker->thread, NULL, worker_main, worker) != 0) {
		(void)pthread_cond_destroy(&worker->cond);
		return false;
	}
	char name[16];
	(void)snprintf(name, sizeof name, "opd-lane-%u", number % 100000);
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

opd_status lane_create(const struct lane_options *options, struct lane **lane_out, opd_error *error)
{
	uint32_t threads = options->threads == 0 ? count_cores() : options->threads;
	if (threads > THREADS_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "lane: %u threads, expected at most %u", threads, THREADS_MAX);
	struct lane *lane = calloc(1, sizeof *lane + threads * sizeof lane->workers[0]);
	if (lane == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "lane: out of memory");
	(void)pthread_mutex_init(&lane->mutex, NULL);
	lane->tail = &lane->head;
	lane->threads = threads;
	lane->spin_ns = options->spin_ns;
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
		(void)pthread_cond_signal(&lane->parked->cond);
	}
}

void lane_stop(struct lane *lane)
{
	if (lane == NULL)
		return;
	(void)pthread_mutex_lock(&lane->mutex);
	lane->stopping = true;
	unpark_all(lane);
	(void)pthread_mutex_unlock(&lane->mutex);
	for (; lane->started > 0; lane->started--) {
		struct worker *worker = &lane->workers[lane->started - 1];
		(void)pthread_join(worker->thread, NULL);
		(void)pthread_cond_destroy(&worker->cond);
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
