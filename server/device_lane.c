#include "server/device_lane.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "server/batch.h"
#include "server/daemon.h"
#include "server/device_work.h"
#include "server/pins.h"
#include "server/request.h"

/* Jobs enqueued on the stream and not yet complete. */
#define IN_FLIGHT_MAX 32u
/* How the thread waits for the device: it looks again at once while a kernel may be a short one, then lets others have the core, then sleeps, so
 * that a kernel of many milliseconds costs no core and is noticed at most 5 % late, or on time where it is known how long it takes. */
#define POLL_SPIN_NS 20000u
#define POLL_YIELD_NS 1000000u
#define POLL_SLEEP_NS 50000
#define JOB_ARENA_BYTES (16u << 20)
/* So long before the end of a lone job its loop is woken, and so long after it the loop may sleep again; one shorter than the other the loop looks after itself. */
#define ATTEND_NS 100000u
#define ATTEND_WHOLE_NS 400000u
/* A loop that looks after it itself looks again and again, for so long in one turn, when its end is so near. */
#define LOOK_AHEAD_NS 10000u
#define LOOK_NS 5000u
/* So long before its end its `near` is called: while a client's thread wakes. */
#define NEAR_NS 12000u
/* So long before the stream should be empty the next job comes to it, however long that one is. */
#define NEXT_AHEAD_NS 300000u
/* Jobs taken out of the queue at once: each time the mutex and the scheduler's heaps change cores with the loop that submits. */
#define PICKED_MAX 8u
/* Where events are shared: so that the oldest of many doesn't wait long for its own end to be told. */
#define JOBS_AN_EVENT 8u

static bool poll_flight(struct device_lane *lane);
static void mark_end(struct device_lane *lane);

/* ---- Waiting ---- */

/* Whether there is time for a sleep before the oldest job should have ended: one of a kind that was seen before isn't noticed late. */
static bool far_from_end(const struct device_lane *lane, uint64_t now_ns)
{
	const uint64_t estimate_ns = lane->flight == NULL ? 0 : lane->flight->item.estimate_ns;
	const uint64_t since_ns = now_ns - (lane->flight != NULL && lane->flight->started_ns > lane->busy_until_ns ? lane->flight->started_ns : lane->busy_until_ns);
	return estimate_ns == 0 || since_ns > 2 * estimate_ns || since_ns + 2 * POLL_SLEEP_NS + estimate_ns / 16 < estimate_ns;
}

static void pause_polling(const struct device_lane *lane)
{
	const struct timespec sleep = {.tv_nsec = POLL_SLEEP_NS};
	const uint64_t now_ns = request_now_ns(), waited = now_ns - lane->progress_ns;
	if (waited > POLL_YIELD_NS && far_from_end(lane, now_ns))
		(void)nanosleep(&sleep, NULL);
	else if (waited > POLL_SPIN_NS)
		(void)sched_yield();
}

/* A lone job that its loop has begun itself, and that should end within so long. */
static bool ends_soon(const struct device_lane *lane, uint64_t ahead_ns, uint64_t now_ns)
{
	const struct device_job *job = lane->flight;
	if (lane->in_flight != 1 || job->here_ns == 0 || job->item.estimate_ns == 0)
		return false;
	const uint64_t end_ns = job->started_ns + job->item.estimate_ns;
	return end_ns <= now_ns + ahead_ns && now_ns <= end_ns + ATTEND_NS;
}

/* Its loop stays awake, or wakes, until then. */
static void let_attend(struct device_lane *lane)
{
	struct device_job *job = lane->flight;
	const uint64_t now_ns = request_now_ns();
	if (!ends_soon(lane, ATTEND_NS, now_ns) || job->attended)
		return;
	const uint64_t end_ns = job->started_ns + job->item.estimate_ns;
	job->attended = true;
	io_loop_attend(&lane->server->loops[job->loop], (end_ns > now_ns ? end_ns : now_ns) + ATTEND_NS);
}

bool device_wait(struct device_lane *lane)
{
	if (lane->flight == NULL)
		return false;
	mark_end(lane);
	while (!poll_flight(lane))
		pause_polling(lane);
	return true;
}

/* ---- The watchdog ---- */

void device_watch(struct device_job *job, const struct watch_subject *subject, uint64_t budget_ns)
{
	watch_begin(&job->watch, subject, budget_ns);
}

void device_watched(struct device_lane *lane, struct device_job *job)
{
	if (lane->flight != NULL)
		watch_pause(&job->watch);
}

bool device_watch_end(struct device_lane *lane, struct device_job *job)
{
	const bool overdue = watch_end(&job->watch);
	if (overdue)
		device_lane_set_stuck(lane, false);
	return overdue;
}

/* The oldest on the stream is what the device works on. */
static void watch_oldest(struct device_lane *lane)
{
	if (lane->flight != NULL && lane->flight != lane->watched)
		watch_resume(&lane->flight->watch);
	lane->watched = lane->flight;
}

/* ---- One job ---- */

static opd_status check_before(const struct device_lane *lane, struct device_job *job)
{
	if (lane->lost)
		return opd_fail(&job->error, OPD_UNAVAILABLE, "%s: %s is lost: %.200s", job->name, lane->device.name, lane->loss.text);
	if (job->unwanted != NULL && atomic_load_explicit(job->unwanted, memory_order_relaxed))
		return opd_fail(&job->error, OPD_CANCELLED, "%s: the session has ended", job->name);
	if (job->deadline_ns != 0 && request_now_ns() >= job->deadline_ns)
		return opd_fail(&job->error, OPD_DEADLINE_EXCEEDED, "%s: not started within its timeout", job->name);
	return OPD_OK;
}

/* Recorded also after a failure: what was enqueued before it still uses the job's memory. */
static void record_end(struct device_lane *lane, struct device_job *job)
{
	opd_error error = {0};
	opd_status status = lane->device.backend->event_record(lane->device.state, job->event, lane->stream, &error);
	job->recorded = status == OPD_OK;
	if (status == OPD_OK)
		return;
	/* No event will tell when the job's memory may be freed: the stream's end does, and the next job gets another one. */
	device_drop_stream(lane);
	if (job->status == OPD_OK) {
		job->error = error;
		job->status = device_failed(lane, job, status, "event_record");
	}
}

bool device_shares_events(const struct device_lane *lane)
{
	return (lane->device.backend->flags & OPD_BACKEND_FAILS_WHOLE) != 0;
}

/* The jobs since the last event get theirs. */
static void mark_end(struct device_lane *lane)
{
	device_many_end(lane);
	if (lane->newest != NULL)
		record_end(lane, lane->newest);
	lane->newest = NULL;
	lane->unmarked = 0;
}

static void flight_add(struct device_lane *lane, struct device_job *job)
{
	job->next = NULL;
	*lane->flight_end = job;
	lane->flight_end = &job->next;
	lane->in_flight++;
	lane->flight_ns += job->item.estimate_ns;
	lane->progress_ns = job->started_ns;
	if (!job->enqueued)
		return;
	if (lane->newest != NULL) { /* this one's event will tell of it too */
		device_give_event(lane, lane->newest->event);
		lane->newest->event = NULL;
	}
	lane->newest = job;
	lane->unmarked++;
	if (!device_shares_events(lane) || lane->unmarked == JOBS_AN_EVENT)
		mark_end(lane);
}

/* It is on the stream, behind what is there. */
static void expect(struct device_lane *lane, const struct device_job *job)
{
	const uint64_t until_ns = atomic_load_explicit(&lane->stream_until_ns, memory_order_relaxed);
	const uint64_t from_ns = lane->in_flight != 0 && until_ns > job->started_ns ? until_ns : job->started_ns;
	atomic_store_explicit(&lane->stream_until_ns, from_ns + job->item.estimate_ns, memory_order_relaxed);
}

static void wake_loop(struct device_lane *lane, uint32_t loop)
{
	atomic_store_explicit(&lane->server->loops[loop].device_done, true, memory_order_release);
	io_loop_wake(&lane->server->loops[loop]);
}

/* Under the mutex: whoever has asked is told. */
static void add_begun(struct device_lane *lane, struct device_job *job)
{
	struct device_done *done = &lane->done[job->loop];
	job->next_begun = done->begun;
	done->begun = job;
}

/* Its enqueueing is over. */
static void tell_begun(struct device_lane *lane, struct device_job *job)
{
	if (job->begun == NULL || job->status != OPD_OK)
		return;
	(void)pthread_mutex_lock(&lane->mutex);
	const bool asked = job->asked;
	job->on_stream = true;
	if (asked)
		add_begun(lane, job);
	(void)pthread_mutex_unlock(&lane->mutex);
	if (asked)
		wake_loop(lane, job->loop);
}

void device_lane_ask(struct device_lane *lane, struct device_job *job)
{
	(void)pthread_mutex_lock(&lane->mutex);
	const bool there = !job->asked && job->on_stream;
	job->asked = true;
	if (there)
		add_begun(lane, job);
	(void)pthread_mutex_unlock(&lane->mutex);
	if (there)
		wake_loop(lane, job->loop);
}

static void take_arena(struct device_lane *lane, struct device_job *job)
{
	if (lane->arena_count != 0)
		job->arena = lane->arenas[--lane->arena_count];
	else
		arena_init(&job->arena, JOB_ARENA_BYTES);
}

static void job_enqueue(struct device_lane *lane, struct device_job *job)
{
	job->started_ns = request_now_ns();
	take_arena(lane, job);
	job->status = check_before(lane, job);
	if (job->status == OPD_OK)
		job->enqueue(lane, job);
	expect(lane, job);
	flight_add(lane, job);
	watch_oldest(lane);
	tell_begun(lane, job);
}

/* Nobody waits for the rest of it any more: it is begun, and ends so. */
static bool begin_unwanted(struct device_lane *lane, struct device_job *job)
{
	if (check_before(lane, job) == OPD_OK)
		return false;
	job_enqueue(lane, job);
	return true;
}

/* The job and those that it has taken along: as one, else one after the other. */
static void enqueue_picked(struct device_lane *lane, struct device_job *job)
{
	struct device_job *wanted = NULL, **end = &wanted;
	if (job->others == NULL) {
		job_enqueue(lane, job);
		return;
	}
	job->next = job->others;
	job->others = NULL;
	for (struct device_job *next; job != NULL; job = next) {
		next = job->next;
		if (begin_unwanted(lane, job))
			continue;
		job->next = NULL;
		*end = job;
		end = &job->next;
	}
	struct device_job *all = wanted == NULL || wanted->next == NULL ? NULL : device_batch_create(lane, wanted);
	if (all != NULL) {
		job_enqueue(lane, all);
		return;
	}
	for (struct device_job *next; wanted != NULL; wanted = next) {
		next = wanted->next;
		job_enqueue(lane, wanted);
	}
}

/* The job whose event tells of the oldest one's end; NULL: none was recorded yet. */
static struct device_job *marked(const struct device_lane *lane)
{
	struct device_job *job = lane->flight;
	if (job != NULL && !job->enqueued)
		return job;
	while (job != NULL && job->event == NULL)
		job = job->next;
	return job == lane->newest ? NULL : job;
}

/* Whether the device is done with the jobs up to this one. */
static bool job_complete(struct device_lane *lane, struct device_job *job)
{
	if (!job->recorded)
		return true;
	opd_error error = {0};
	opd_status status = lane->device.backend->event_query(lane->device.state, job->event, &error);
	if (status == OPD_UNAVAILABLE)
		return false;
	device_note(lane, status, &error);
	for (struct device_job *told = lane->flight; status != OPD_OK; told = told->next) {
		if (told->status == OPD_OK) {
			told->error = error;
			told->status = device_failed(lane, told, status, "the work");
		}
		if (told == job)
			break;
	}
	return true;
}

/* ---- The thread ---- */

/* Jobs on a stream run one after the other: the device worked on these since the one before had ended, or since the first of them came. */
static uint64_t device_time(struct device_lane *lane, const struct device_job *first, uint64_t ended_ns)
{
	const uint64_t from_ns = first->started_ns > lane->busy_until_ns ? first->started_ns : lane->busy_until_ns;
	lane->busy_until_ns = ended_ns;
	return ended_ns > from_ns ? ended_ns - from_ns : 0;
}

/* True: too late, its request is answered. */
static bool end_job(struct device_lane *lane, struct device_job *job, uint64_t ended_ns, uint64_t device_ns)
{
	job->ended_ns = lane->progress_ns = ended_ns;
	job->device_ns += device_ns; /* it may have failed together with others before */
	lane->in_flight--;
	lane->flight_ns -= job->item.estimate_ns;
	const bool overdue = device_watch_end(lane, job); /* then it was answered as failed */
	device_inherit_failure(job);
	device_mirrors_settle(lane, job);
	device_ring_settle(lane, job);
	if (job->complete != NULL)
		job->complete(lane, job);
	if (job->status != OPD_OK || overdue)
		device_bequeath_failure(job);
	device_release(lane, job);
	return overdue;
}

/* In what time they ended together, by their rows. */
static void end_members(struct device_job *all)
{
	uint64_t rows = 0;
	for (const struct device_job *job = all->members; job != NULL; job = job->next)
		rows += job->batch.rows;
	for (struct device_job *job = all->members; job != NULL; job = job->next) {
		job->started_ns = all->started_ns;
		job->ended_ns = all->ended_ns;
		job->moves_ns = all->moves_ns;
		job->device_ns += (uint64_t)((double)all->device_ns * job->batch.rows / (double)rows);
		job->status = all->status;
		if (all->status != OPD_OK)
			job->error = all->error;
	}
}

/* Whoever's fault it was: each runs alone, unless they have their answer, or the device is lost with what was on it. */
static bool members_again(struct device_lane *lane, struct device_job *all, bool overdue)
{
	if (all->status == OPD_OK || all->status == OPD_DATA_LOSS || overdue)
		return false;
	*lane->again_end = all->members;
	for (struct device_job *job = all->members; job != NULL; job = job->next)
		lane->again_end = &job->next;
	return true;
}

/* The jobs that are their owners' again: this one, or its members. */
static struct device_job *end_of(struct device_lane *lane, struct device_job *job, uint64_t ended_ns, uint64_t device_ns)
{
	const bool overdue = end_job(lane, job, ended_ns, device_ns);
	struct device_job *members = job->members;
	if (members == NULL)
		return job;
	end_members(job);
	if (members_again(lane, job, overdue))
		members = NULL;
	free(job);
	return members;
}

/* Takes the jobs that are complete out of the flight, oldest first, with their share of the device's time; false: none was. *ended_out: those that go back to their owners. */
static bool take_complete(struct device_lane *lane, struct device_job **ended_out)
{
	struct device_job *first = lane->flight, *last = marked(lane);
	*ended_out = NULL;
	if (last == NULL || !job_complete(lane, last))
		return false;
	const uint64_t ended_ns = request_now_ns();
	uint64_t count = 1;
	for (const struct device_job *job = first; job != last; job = job->next)
		count++;
	const uint64_t device_ns = device_time(lane, first, ended_ns) / count;
	lane->flight = last->next;
	if (lane->flight == NULL)
		lane->flight_end = &lane->flight;
	last->next = NULL;
	lane->watched = NULL; /* it may be another's place by the time the next one is */
	for (struct device_job *job = first, *next; job != NULL; job = next) {
		next = job->next;
		job->next = NULL;
		*ended_out = end_of(lane, job, ended_ns, device_ns);
		while (*ended_out != NULL)
			ended_out = &(*ended_out)->next;
	}
	atomic_store_explicit(&lane->stream_until_ns, ended_ns + lane->flight_ns, memory_order_relaxed);
	watch_oldest(lane);
	return true;
}

/* Under the mutex. */
static void account_jobs(struct device_lane *lane, const struct device_job *jobs)
{
	for (const struct device_job *job = jobs; job != NULL; job = job->next)
		scheduler_complete(&lane->scheduler, job->item.flow, (sched_class)job->item.class, job->item.estimate_ns, job->device_ns);
}

/* To the loops that wait for them. From the end of this on the jobs may be gone. */
static void hand_over(struct device_lane *lane, struct device_job *ended)
{
	bool told[CONFIG_LOOPS_MAX] = {false};
	(void)pthread_mutex_lock(&lane->mutex);
	account_jobs(lane, ended);
	for (struct device_job *job = ended, *next; job != NULL; job = next) {
		struct device_done *done = &lane->done[job->loop];
		next = job->next;
		job->next = NULL;
		job->on_stream = false;
		*done->end = job;
		done->end = &job->next;
		told[job->loop] = true;
	}
	(void)pthread_mutex_unlock(&lane->mutex);
	for (uint32_t i = 0; i < CONFIG_LOOPS_MAX; i++)
		if (told[i])
			wake_loop(lane, i);
}

/* Ends the jobs that are complete; false: none was. */
static bool poll_flight(struct device_lane *lane)
{
	struct device_job *ended;
	if (!take_complete(lane, &ended))
		return false;
	if (ended != NULL)
		hand_over(lane, ended);
	return true;
}

/* What is on the stream can't be overtaken: one job, or as many as take no longer than a segment; and the next after a long one shortly before that should have ended, so that the device
 * doesn't wait for it. */
static bool has_room(const struct device_lane *lane)
{
	const uint64_t segment_ns = atomic_load_explicit(&lane->server->segment_ns, memory_order_relaxed);
	const uint32_t there = lane->in_flight + atomic_load_explicit(&lane->picked_count, memory_order_relaxed); /* as if all were on the stream */
	const uint64_t there_ns = lane->flight_ns + atomic_load_explicit(&lane->picked_ns, memory_order_relaxed);
	if (there == 0 || (there < IN_FLIGHT_MAX && there_ns < segment_ns))
		return true;
	return there == 1 && lane->in_flight == 1 && atomic_load_explicit(&lane->stream_until_ns, memory_order_relaxed) < request_now_ns() + NEXT_AHEAD_NS;
}

static struct device_job *job_of_item(struct sched_item *item)
{
	return (struct device_job *)(void *)((char *)item - offsetof(struct device_job, item));
}

/* Under the mutex. */
static void note_begun(struct device_lane *lane, const struct device_job *job, uint64_t now_ns)
{
	const uint64_t queued_ns = job->item.queued_ns;
	histogram_add(&lane->waits[job->item.class], now_ns > queued_ns ? now_ns - queued_ns : 0, false);
}

/* Under the mutex: those that wait and may run with a job that was picked. */
static void take_along(struct device_lane *lane, struct device_job *job, uint64_t now_ns)
{
	struct device_job **end = &job->others;
	job->others = NULL;
	if (job->batch.link == NULL)
		return;
	batch_queue_remove(&lane->batches, &job->batch);
	struct batch_item *taken = batch_queue_take(&lane->batches, &lane->scheduler, &job->batch, atomic_load_explicit(&lane->server->batch_rows, memory_order_relaxed), now_ns);
	for (; taken != NULL; taken = taken->next) {
		struct device_job *other = job_of_item(taken->item);
		note_begun(lane, other, now_ns);
		other->next = NULL;
		*end = other;
		end = &other->next;
	}
}

/* Under the mutex; NULL: none may run now, and *ready_ns_out says when to ask again. */
static struct device_job *pick(struct device_lane *lane, uint64_t now_ns, uint64_t *ready_ns_out)
{
	*ready_ns_out = UINT64_MAX;
	if (lane->scheduler.queued == 0 || !has_room(lane))
		return NULL;
	struct sched_item *item = scheduler_pick(&lane->scheduler, now_ns, ready_ns_out);
	if (item == NULL)
		return NULL;
	struct device_job *job = job_of_item(item);
	note_begun(lane, job, now_ns);
	take_along(lane, job, now_ns);
	return job;
}

/* Under the latch, or at the end. */
static void insert_picked(struct device_lane *lane, struct device_job **link, struct device_job *job)
{
	job->next = *link;
	*link = job;
	if (job->next == NULL)
		lane->picked_end = &job->next;
	(void)atomic_fetch_add_explicit(&lane->picked_count, 1, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&lane->picked_ns, job->item.estimate_ns, memory_order_relaxed);
}

/* Under the latch. */
static void drop_picked(struct device_lane *lane, struct device_job **link)
{
	const struct device_job *job = *link;
	*link = job->next;
	if (job->next == NULL)
		lane->picked_end = link;
	(void)atomic_fetch_sub_explicit(&lane->picked_count, 1, memory_order_relaxed);
	(void)atomic_fetch_sub_explicit(&lane->picked_ns, job->item.estimate_ns, memory_order_relaxed);
}

/* The oldest that was picked and hasn't begun; NULL: none. */
static struct device_job *next_picked(struct device_lane *lane)
{
	if (atomic_load_explicit(&lane->picked_count, memory_order_relaxed) == 0)
		return NULL;
	latch_lock(&lane->picked_latch);
	struct device_job *job = lane->picked;
	if (job != NULL)
		drop_picked(lane, &lane->picked);
	latch_unlock(&lane->picked_latch);
	return job;
}

/* Under the latch: out of those that were picked; whom it has taken along go without it. False: it has begun. */
static bool leave_picked(struct device_lane *lane, struct device_job *job)
{
	for (struct device_job **link = &lane->picked; *link != NULL; link = &(*link)->next) {
		struct device_job **other = &(*link)->others;
		if (*link == job) {
			struct device_job *heir = job->others;
			drop_picked(lane, link);
			if (heir == NULL)
				return true;
			heir->others = heir->next;
			insert_picked(lane, link, heir);
			return true;
		}
		while (*other != NULL && *other != job)
			other = &(*other)->next;
		if (*other != NULL) {
			*other = job->next;
			return true;
		}
	}
	return false;
}

/* Under the mutex: one that was picked, and waits for those before it, whose enqueueing may take for ever. False: it has begun. */
static bool take_back(struct device_lane *lane, struct device_job *job)
{
	latch_lock(&lane->picked_latch);
	const bool found = leave_picked(lane, job);
	latch_unlock(&lane->picked_latch);
	if (found)
		scheduler_complete(&lane->scheduler, job->item.flow, (sched_class)job->item.class, job->item.estimate_ns, 0);
	return found;
}

/* What pick gives, and with it as many as there is room for; one that has taken others along is as many itself. */
static struct device_job *pick_some(struct device_lane *lane, uint64_t *ready_ns_out)
{
	const uint64_t now_ns = lane->scheduler.queued == 0 ? 0 : request_now_ns();
	struct device_job *job = pick(lane, now_ns, ready_ns_out);
	for (uint64_t later_ns; job != NULL;) {
		insert_picked(lane, lane->picked_end, job);
		job = job->others == NULL && atomic_load_explicit(&lane->picked_count, memory_order_relaxed) < PICKED_MAX ? pick(lane, now_ns, &later_ns) : NULL;
	}
	return next_picked(lane);
}

static void sleep_until(struct device_lane *lane, uint64_t ready_ns)
{
	const struct timespec until = {(time_t)(ready_ns / 1000000000u), (long)(ready_ns % 1000000000u)};
	if (ready_ns == UINT64_MAX)
		(void)pthread_cond_wait(&lane->wake, &lane->mutex);
	else
		(void)pthread_cond_timedwait(&lane->wake, &lane->mutex, &until);
}

/* One that has failed with others; NULL: none, or there is no room. */
static struct device_job *next_again(struct device_lane *lane)
{
	struct device_job *job = has_room(lane) ? lane->again : NULL;
	if (job == NULL)
		return NULL;
	lane->again = job->next;
	if (lane->again == NULL)
		lane->again_end = &lane->again;
	return job;
}

/* The next job, waiting for one only when nothing is in flight; NULL: none now. *stop_out: stopping, and nothing is left. */
static struct device_job *next_job(struct device_lane *lane, bool *stop_out)
{
	uint64_t ready_ns = UINT64_MAX;
	struct device_job *job = next_again(lane);
	*stop_out = false;
	if (job == NULL)
		job = next_picked(lane);
	if (job != NULL)
		return job;
	(void)pthread_mutex_lock(&lane->mutex);
	lane->taken = lane->taken && lane->in_flight != 0;
	if (lane->taken)
		job = pick_some(lane, &ready_ns);
	while (!lane->taken) {
		job = pick_some(lane, &ready_ns);
		if (job != NULL || lane->in_flight != 0 || (lane->lost && !lane->given_back) || (lane->stopping && lane->scheduler.queued == 0)) {
			lane->taken = true;
			break;
		}
		sleep_until(lane, ready_ns);
		while (lane->taken) /* by another thread, for a lone job */
			(void)pthread_cond_wait(&lane->wake, &lane->mutex);
	}
	*stop_out = lane->stopping && job == NULL && lane->scheduler.queued == 0 && lane->in_flight == 0;
	(void)pthread_mutex_unlock(&lane->mutex);
	return job;
}

static void *lane_main(void *argument)
{
	struct device_lane *lane = argument;
	(void)prctl(PR_SET_TIMERSLACK, 1ul); /* else each sleep takes 50 us more */
	for (bool stop = false; !stop;) {
		struct device_job *job = next_job(lane, &stop);
		if (job != NULL)
			enqueue_picked(lane, job);
		else
			mark_end(lane);
		/* While jobs come that one event will tell of, the device isn't asked for each of them. */
		if ((job == NULL || lane->newest == NULL) && !poll_flight(lane) && job == NULL && !stop) {
			let_attend(lane);
			pause_polling(lane);
		}
		if (lane->lost && !lane->given_back && lane->flight == NULL)
			device_give_up(lane);
	}
	return NULL;
}

/* ---- On a caller's thread ---- */

/* The lane is the caller's, with this job as its only one. False: somebody has it, or it hasn't run anything yet, or may run nothing. */
static bool take_lane(struct device_lane *lane, struct device_job *job)
{
	uint64_t ready_ns;
	(void)pthread_mutex_lock(&lane->mutex);
	bool taken = !lane->taken && !lane->stopping && !lane->lost && lane->stream != NULL && lane->in_flight == 0 && lane->scheduler.queued == 0;
	if (taken && !scheduler_submit(&lane->scheduler, &job->item, job->queued_ns))
		taken = false;
	if (taken && pick(lane, job->queued_ns, &ready_ns) == NULL) {
		(void)scheduler_withdraw(&lane->scheduler, &job->item); /* a rate doesn't let it run now */
		taken = false;
	}
	lane->taken = lane->taken || taken;
	if (taken)
		atomic_store_explicit(&lane->wanted, false, memory_order_relaxed);
	(void)pthread_mutex_unlock(&lane->mutex);
	return taken;
}

/* Under the mutex. One that has ended here is told of by that alone: its owner may give it back at once. */
static void forget_begun(struct device_lane *lane, struct device_job *job)
{
	struct device_job **link = &lane->done[job->loop].begun;
	while (*link != NULL && *link != job)
		link = &(*link)->next_begun;
	if (*link != NULL)
		*link = job->next_begun;
	job->on_stream = false;
}

static void give_lane(struct device_lane *lane, struct device_job *ended)
{
	(void)pthread_mutex_lock(&lane->mutex);
	account_jobs(lane, ended);
	for (struct device_job *job = ended; job != NULL; job = job->next)
		forget_begun(lane, job);
	lane->taken = false;
	if (lane->in_flight != 0 || lane->scheduler.queued != 0 || lane->stopping || lane->lost)
		(void)pthread_cond_signal(&lane->wake);
	(void)pthread_mutex_unlock(&lane->mutex);
}

/* The lane stays its loop's, which looks again in each of its turns: another thread that looked would have to wake it, and takes its time for that. */
static bool keep(struct device_lane *lane, const struct device_job *job)
{
	return job->by_loop && ends_soon(lane, ATTEND_WHOLE_NS, request_now_ns()) && io_loop_keep(&lane->server->loops[job->loop], lane);
}

static void tell_near(struct device_job *job, uint64_t now_ns)
{
	if (job == NULL || job->near == NULL || now_ns + NEAR_NS < job->started_ns + job->item.estimate_ns)
		return;
	job->near(job);
	job->near = NULL;
}

enum device_ran device_lane_run(struct device_lane *lane, struct device_job *job)
{
	job->next = NULL;
	job->queued_ns = request_now_ns();
	if (!take_lane(lane, job))
		return DEVICE_BUSY;
	job_enqueue(lane, job);
	mark_end(lane);
	struct device_job *ended;
	bool over = take_complete(lane, &ended);
	for (uint64_t now_ns = job->started_ns; !over && now_ns - job->started_ns < job->here_ns; over = take_complete(lane, &ended)) {
		now_ns = request_now_ns();
		tell_near(job, now_ns);
	}
	if (!over && keep(lane, job))
		return DEVICE_LEFT;
	give_lane(lane, ended);
	return over ? DEVICE_ENDED : DEVICE_LEFT;
}

bool device_lane_look(struct device_lane *lane)
{
	struct device_job *ended;
	const uint64_t began_ns = request_now_ns();
	uint64_t now_ns = began_ns;
	bool over = take_complete(lane, &ended);
	if (!over)
		tell_near(lane->flight, now_ns);
	while (!over && ends_soon(lane, LOOK_AHEAD_NS, now_ns) && now_ns - began_ns < LOOK_NS) {
		tell_near(lane->flight, now_ns);
		over = take_complete(lane, &ended);
		now_ns = request_now_ns();
	}
	if (!over && !atomic_load_explicit(&lane->wanted, memory_order_relaxed) && ends_soon(lane, ATTEND_WHOLE_NS, now_ns))
		return true;
	give_lane(lane, ended);
	for (struct device_job *next; ended != NULL; ended = next) { /* it was a lone one, of this loop */
		next = ended->next;
		ended->done(ended);
	}
	return false;
}

void device_lane_let_go(struct device_lane *lane)
{
	give_lane(lane, NULL);
}

/* ---- Life ---- */

static opd_status source_alloc(void *context, uint64_t bytes, void **memory_out, opd_error *error)
{
	const struct device_lane *lane = context;
	return lane->device.backend->alloc(lane->device.state, lane->device.ordinal, bytes, memory_out, error);
}

static void source_free(void *context, void *memory)
{
	const struct device_lane *lane = context;
	lane->device.backend->free(lane->device.state, lane->device.ordinal, memory);
}

/* It is held for a few instructions, by a loop that submits and the thread that picks, for each of many small jobs: whoever finds it taken looks again for a while before it sleeps. */
static void init_mutex(pthread_mutex_t *mutex)
{
	pthread_mutexattr_t attributes;
	(void)pthread_mutexattr_init(&attributes);
	(void)pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
	(void)pthread_mutex_init(mutex, &attributes);
	(void)pthread_mutexattr_destroy(&attributes);
}

static void init_cond(pthread_cond_t *cond)
{
	pthread_condattr_t attributes;
	(void)pthread_condattr_init(&attributes);
	(void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	(void)pthread_cond_init(cond, &attributes);
	(void)pthread_condattr_destroy(&attributes);
}

/* As the CPU lane's are: the configuration is the loop's alone, and this may be another thread. */
static void bound_queues(struct device_lane *lane)
{
	scheduler_init(&lane->scheduler);
	const struct scheduler *cpu = lane_scheduler_lock(lane->server->lane);
	lane->scheduler.queue_max = cpu->queue_max;
	lane->scheduler.flow_queue_max = cpu->flow_queue_max;
	lane_scheduler_unlock(lane->server->lane);
}

static opd_status lane_start(struct server *server, const struct device *device, uint32_t number, struct device_lane **lane_out,
                              opd_error *error)
{
	struct device_lane *lane = calloc(1, sizeof *lane);
	if (lane == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "device lane: out of memory");
	lane->device = *device;
	lane->server = server;
	lane->number = number;
	bound_queues(lane);
	memory_map_small(&server->memory);
	for (uint32_t i = 0; i < CONFIG_LOOPS_MAX; i++)
		lane->done[i].end = &lane->done[i].first;
	lane->flight_end = &lane->flight;
	lane->again_end = &lane->again;
	lane->picked_end = &lane->picked;
	batch_queue_init(&lane->batches);
	const struct memory_source source = {source_alloc, source_free, lane};
	memory_init_device(&lane->memory, number, device->name, UINT64_MAX, source);
	init_mutex(&lane->mutex);
	init_cond(&lane->wake);
	sigset_t all, before;
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	int failed = pthread_create(&lane->thread, NULL, lane_main, lane);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed != 0) {
		memory_fini(&lane->memory);
		(void)pthread_cond_destroy(&lane->wake);
		(void)pthread_mutex_destroy(&lane->mutex);
		free(lane);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "device lane: no thread: %s", strerror(failed));
	}
	*lane_out = lane;
	return OPD_OK;
}

opd_status device_lane_get(struct server *server, const struct device *device, uint32_t number, struct device_lane **lane_out, opd_error *error)
{
	(void)pthread_mutex_lock(&server->mutex); /* a direct caller may ask beside the loop */
	struct device_lane *lane = atomic_load_explicit(&server->device_lanes[number], memory_order_relaxed);
	opd_status status = lane != NULL ? OPD_OK : lane_start(server, device, number, &lane, error);
	atomic_store_explicit(&server->device_lanes[number], lane, memory_order_release);
	(void)pthread_mutex_unlock(&server->mutex);
	*lane_out = lane;
	return status;
}

uint64_t device_lane_finish_ns(struct server *server, uint32_t number, const struct sched_flow *flow, sched_class class, uint64_t cost_ns, uint64_t now_ns)
{
	struct device_lane *lane = device_lane_started(server, number);
	if (lane == NULL)
		return cost_ns;
	const uint64_t ns = scheduler_finish_ns(device_lane_scheduler_lock(lane), flow, class, cost_ns);
	(void)pthread_mutex_unlock(&lane->mutex); /* nothing has changed that its thread should wake for */
	const uint64_t until_ns = atomic_load_explicit(&lane->stream_until_ns, memory_order_relaxed);
	return ns + (until_ns > now_ns ? until_ns - now_ns : 0);
}

void device_lane_use(struct server *server, uint32_t number, struct device_lane_use *use_out)
{
	struct device_lane *lane = atomic_load_explicit(&server->device_lanes[number], memory_order_acquire);
	*use_out = (struct device_lane_use){0};
	if (lane == NULL)
		return;
	const uint64_t limit_bytes = atomic_load_explicit(&lane->memory.limit_bytes, memory_order_relaxed);
	*use_out = (struct device_lane_use){
		.memory_bytes = atomic_load_explicit(&lane->memory.used_bytes, memory_order_relaxed),
		.cached_bytes = memory_cached_bytes(&lane->memory),
		.memory_limit_bytes = limit_bytes == UINT64_MAX ? 0 : limit_bytes,
	};
	(void)pthread_mutex_lock(&lane->mutex);
	use_out->jobs = lane->scheduler.queued + lane->scheduler.running;
	(void)pthread_mutex_unlock(&lane->mutex);
}

struct device_lane *device_lane_started(struct server *server, uint32_t number)
{
	return atomic_load_explicit(&server->device_lanes[number], memory_order_acquire);
}

/* Under the mutex: there is something for the lane's thread. */
static void ask_for_lane(struct device_lane *lane)
{
	atomic_store_explicit(&lane->wanted, true, memory_order_relaxed);
	(void)pthread_cond_signal(&lane->wake);
}

struct scheduler *device_lane_scheduler_lock(struct device_lane *lane)
{
	(void)pthread_mutex_lock(&lane->mutex);
	return &lane->scheduler;
}

/* A changed rate may let somebody go on. */
void device_lane_scheduler_unlock(struct device_lane *lane)
{
	ask_for_lane(lane);
	(void)pthread_mutex_unlock(&lane->mutex);
}

const struct histogram *device_lane_waits(const struct device_lane *lane, sched_class class)
{
	return &lane->waits[class];
}

void device_lane_set_stuck(struct device_lane *lane, bool stuck)
{
	atomic_store_explicit(&lane->stuck, stuck, memory_order_relaxed);
}

bool device_lane_is_stuck(const struct device_lane *lane)
{
	return atomic_load_explicit(&lane->stuck, memory_order_relaxed);
}

uint32_t device_lanes_stuck(const struct server *server)
{
	uint32_t stuck = 0;
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++) {
		const struct device_lane *lane = atomic_load_explicit(&server->device_lanes[i], memory_order_acquire);
		stuck += lane != NULL && device_lane_is_stuck(lane);
	}
	return stuck;
}

const char *device_lane_name(const struct device_lane *lane)
{
	return lane->device.name;
}

bool device_lane_submit(struct device_lane *lane, struct device_job *job)
{
	job->next = NULL;
	job->queued_ns = request_now_ns();
	(void)pthread_mutex_lock(&lane->mutex);
	const bool queued = scheduler_submit(&lane->scheduler, &job->item, job->queued_ns);
	if (queued && job->batch.number != 0)
		batch_queue_add(&lane->batches, &job->batch, &job->item);
	if (!queued) {
		job->refusal.full = scheduler_full(&lane->scheduler, job->item.flow, &job->refusal.queued, &job->refusal.limit);
		job->refusal.wait_ns = scheduler_wait_ns(&lane->scheduler, job->item.flow, (sched_class)job->item.class);
	}
	ask_for_lane(lane);
	(void)pthread_mutex_unlock(&lane->mutex);
	return queued;
}

bool device_lane_withdraw(struct device_lane *lane, struct device_job *job)
{
	(void)pthread_mutex_lock(&lane->mutex);
	const bool queued = scheduler_withdraw(&lane->scheduler, &job->item);
	if (queued)
		batch_queue_remove(&lane->batches, &job->batch);
	const bool withdrawn = queued || take_back(lane, job);
	(void)pthread_mutex_unlock(&lane->mutex);
	return withdrawn;
}

void device_lane_finish_done(struct device_lane *lane, uint32_t loop)
{
	struct device_done *done = &lane->done[loop];
	(void)pthread_mutex_lock(&lane->mutex);
	struct device_job *job = done->first, *begun = done->begun;
	done->first = done->begun = NULL;
	done->end = &done->first;
	(void)pthread_mutex_unlock(&lane->mutex);
	for (struct device_job *next; begun != NULL; begun = next) { /* before their ends, which may be here too */
		next = begun->next_begun;
		begun->begun(begun);
	}
	while (job != NULL) {
		struct device_job *next = job->next;
		job->done(job);
		job = next;
	}
}

void device_lane_drain(struct device_lane *lane)
{
	if (lane->joined)
		return;
	(void)pthread_mutex_lock(&lane->mutex);
	lane->stopping = true;
	scheduler_forget_rates(&lane->scheduler);
	ask_for_lane(lane);
	(void)pthread_mutex_unlock(&lane->mutex);
	(void)pthread_join(lane->thread, NULL);
	lane->joined = true;
}

void device_lane_stop(struct device_lane *lane)
{
	if (lane == NULL)
		return;
	device_lane_drain(lane);
	device_drop_stream(lane);
	while (lane->event_count != 0)
		lane->device.backend->event_destroy(lane->device.state, lane->events[--lane->event_count]);
	while (lane->arena_count != 0)
		arena_fini(&lane->arenas[--lane->arena_count]);
	device_ring_drop(lane);
	pins_forget(lane->device.state);
	memory_fini(&lane->memory);
	(void)pthread_cond_destroy(&lane->wake);
	(void)pthread_mutex_destroy(&lane->mutex);
	free(lane);
}
