/* server/lane.h: every job once, every item once, nothing lost when stopping. Made to be run under ThreadSanitizer as well. */
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "server/lane.h"
#include "server/shares.h"

struct test_job {
	struct lane_job job;
	_Atomic uint32_t runs;
	uint32_t dones;
	uint32_t order;
	uint64_t items;
	_Atomic uint32_t *hits; /* one an item */
};

/* The loop's side: an eventfd that `wake` writes. */
struct bench {
	struct lane *lane;
	int event;
	_Atomic uint32_t wakes;
	uint32_t taken;
};

static struct bench bench;
static _Atomic uint32_t running_order;
static _Atomic uint32_t broken; /* promises, as the lane's threads and the inner loops saw them: libcheck is for the main thread */

static void expect(bool kept)
{
	if (!kept)
		atomic_fetch_add(&broken, 1);
}

static void on_wake(void *argument, uint32_t owner)
{
	(void)owner;
	struct bench *self = argument;
	uint64_t one = 1;
	atomic_fetch_add(&self->wakes, 1);
	expect(write(self->event, &one, sizeof one) == sizeof one);
}

static void start_with(uint32_t threads, uint64_t spin_ns)
{
	opd_error error;
	bench = (struct bench){.event = eventfd(0, EFD_CLOEXEC)};
	struct lane_options options = {.threads = threads, .spin_ns = spin_ns, .wake = on_wake, .wake_argument = &bench};
	ck_assert_int_eq(lane_create(&options, &bench.lane, &error), OPD_OK);
}

static void stop(void)
{
	lane_destroy(bench.lane);
	(void)close(bench.event);
	ck_assert_uint_eq(atomic_load(&broken), 0);
}

static void on_done(struct lane_job *job)
{
	((struct test_job *)job)->dones++;
}

/* As the I/O loop does it: sleeps until woken, takes all. */
static void take_until(uint32_t count)
{
	while (bench.taken < count) {
		uint64_t events;
		ck_assert_int_eq(read(bench.event, &events, sizeof events), sizeof events);
		bench.taken += lane_finish_done(bench.lane, 0);
	}
	ck_assert_uint_eq(bench.taken, count);
}

static void run_count(struct lane_job *job, struct lane_exec *exec)
{
	struct test_job *mine = (struct test_job *)job;
	expect(exec->threads == lane_threads(exec->lane));
	atomic_fetch_add(&mine->runs, 1);
	mine->order = atomic_fetch_add(&running_order, 1);
}

static struct test_job *make_jobs(size_t count, void (*run)(struct lane_job *, struct lane_exec *))
{
	struct test_job *jobs = calloc(count, sizeof *jobs);
	ck_assert_ptr_nonnull(jobs);
	for (size_t i = 0; i < count; i++)
		jobs[i].job = (struct lane_job){.run = run, .done = on_done};
	return jobs;
}

static void expect_once(const struct test_job *jobs, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		expect(atomic_load(&jobs[i].runs) == 1);
		expect(jobs[i].dones == 1);
	}
	ck_assert_uint_eq(atomic_load(&broken), 0);
}

/* Three segments, if somebody waits at their ends. */
static void run_segments(struct lane_job *job, struct lane_exec *exec)
{
	struct test_job *mine = (struct test_job *)job;
	const uint32_t segment = atomic_fetch_add(&mine->runs, 1) + 1;
	exec->again = segment < 3 && lane_should_yield(exec);
	if (!exec->again)
		mine->order = atomic_fetch_add(&running_order, 1);
}

static const uint32_t thread_counts[] = {1, 2, 3, 8};
static const uint64_t spins[] = {0, LANE_SPIN_NS_DEFAULT, 200000};

START_TEST(every_job_runs_once_and_is_done_once)
{
	enum { COUNT = 10000 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	start_with(thread_counts[_i % 4], spins[_i / 4]);
	for (size_t i = 0; i < COUNT; i++)
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	take_until(COUNT);
	ck_assert(!lane_busy(bench.lane));
	expect_once(jobs, COUNT);
	stop();
	free(jobs);
}
END_TEST

START_TEST(one_thread_runs_jobs_in_the_order_of_submission)
{
	enum { COUNT = 3000 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	start_with(1, 0);
	for (size_t i = 0; i < COUNT; i += 3) {
		jobs[i].job.next = &jobs[i + 1].job;
		jobs[i + 1].job.next = &jobs[i + 2].job;
		lane_submit_list(bench.lane, &jobs[i].job);
	}
	lane_submit_list(bench.lane, NULL);
	take_until(COUNT);
	for (size_t i = 0; i < COUNT; i++)
		expect(jobs[i].order == i);
	expect_once(jobs, COUNT);
	stop();
	free(jobs);
}
END_TEST

START_TEST(done_jobs_come_in_the_order_in_which_they_ended)
{
	enum { COUNT = 100 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	start_with(1, 0);
	for (size_t i = 0; i < COUNT; i++)
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	lane_stop(bench.lane);
	struct lane_job *job = lane_take_done(bench.lane, 0);
	for (size_t i = 0; i < COUNT; i++, job = job->next)
		ck_assert_ptr_eq(job, &jobs[i].job);
	ck_assert_ptr_null(job);
	ck_assert_ptr_null(lane_take_done(bench.lane, 0));
	stop();
	free(jobs);
}
END_TEST

START_TEST(wake_is_called_only_when_the_list_was_empty)
{
	enum { COUNT = 5000 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	start_with(4, 0);
	for (size_t i = 0; i < COUNT; i++)
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	lane_stop(bench.lane); /* nobody took one */
	ck_assert_uint_eq(atomic_load(&bench.wakes), 1);
	ck_assert_uint_eq(lane_finish_done(bench.lane, 0), COUNT);
	expect_once(jobs, COUNT);
	stop();
	free(jobs);
}
END_TEST

static _Atomic uint32_t woken[3]; /* by owner */

static void on_wake_of(void *argument, uint32_t owner)
{
	expect(argument == &bench && owner < 3);
	(void)atomic_fetch_add(&woken[owner], 1);
}

START_TEST(each_owner_is_woken_for_and_gets_its_own_jobs_alone)
{
	enum { COUNT = 3000 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	opd_error error;
	start_with(1, 0); /* for stop */
	lane_destroy(bench.lane);
	const struct lane_options options = {.threads = 4, .owners = 3, .wake = on_wake_of, .wake_argument = &bench};
	ck_assert_int_eq(lane_create(&options, &bench.lane, &error), OPD_OK);
	for (size_t i = 0; i < COUNT; i++) {
		jobs[i].job.owner = i % 3;
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	}
	lane_stop(bench.lane);
	for (uint32_t owner = 0; owner < 3; owner++) {
		uint32_t count = 0;
		for (struct lane_job *job = lane_take_done(bench.lane, owner); job != NULL; job = job->next, count++) {
			ck_assert_uint_eq(job->owner, owner);
			on_done(job);
		}
		ck_assert_uint_eq(count, COUNT / 3);
		ck_assert_uint_eq(atomic_load(&woken[owner]), 1);
	}
	expect_once(jobs, COUNT);
	stop();
	free(jobs);
}
END_TEST

START_TEST(too_many_owners_are_refused)
{
	opd_error error;
	struct lane *lane = NULL;
	const struct lane_options options = {.threads = 1, .owners = LANE_OWNERS_MAX + 1, .wake = on_wake};
	ck_assert_int_eq(lane_create(&options, &lane, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "lane: 33 owners, expected at most 32");
}
END_TEST

struct submitter {
	pthread_t thread;
	struct test_job *jobs;
	size_t count;
};

static void *submit_all(void *argument)
{
	struct submitter *mine = argument;
	for (size_t i = 0; i < mine->count; i++)
		expect(lane_submit(bench.lane, &mine->jobs[i].job));
	return NULL;
}

static void count_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct test_job *mine = argument;
	expect(thread < lane_threads(bench.lane));
	for (uint64_t i = begin; i < end; i++)
		atomic_fetch_add_explicit(&mine->hits[i], 1, memory_order_relaxed);
}

/* Every third job is a parallel loop. */
static void run_mixed(struct lane_job *job, struct lane_exec *exec)
{
	struct test_job *mine = (struct test_job *)job;
	if (mine->items > 0)
		lane_parallel_for(exec, mine->items, 3, count_range, mine);
	atomic_fetch_add(&mine->runs, 1);
}

START_TEST(jobs_and_loops_of_several_submitters_are_all_done)
{
	enum { SUBMITTERS = 4, COUNT = 1500, ITEMS = 100 };
	struct submitter submitters[SUBMITTERS];
	_Atomic uint32_t *hits = calloc(SUBMITTERS * COUNT * ITEMS, sizeof *hits);
	start_with(thread_counts[_i % 4], spins[_i / 4]);
	for (size_t s = 0; s < SUBMITTERS; s++) {
		submitters[s].jobs = make_jobs(COUNT, run_mixed);
		submitters[s].count = COUNT;
		for (size_t i = 0; i < COUNT; i++) {
			submitters[s].jobs[i].items = i % 3 == 0 ? ITEMS : 0;
			submitters[s].jobs[i].hits = hits + (s * COUNT + i) * ITEMS;
		}
		ck_assert_int_eq(pthread_create(&submitters[s].thread, NULL, submit_all, &submitters[s]), 0);
	}
	take_until(SUBMITTERS * COUNT);
	for (size_t s = 0; s < SUBMITTERS; s++) {
		ck_assert_int_eq(pthread_join(submitters[s].thread, NULL), 0);
		expect_once(submitters[s].jobs, COUNT);
		for (size_t i = 0; i < COUNT; i++)
			for (size_t k = 0; k < ITEMS; k++)
				expect(atomic_load(&submitters[s].jobs[i].hits[k]) == (i % 3 == 0));
		free(submitters[s].jobs);
	}
	stop();
	free(hits);
}
END_TEST

/* What shares saw: each thread number is used by one share at a time. */
static _Atomic bool in_use[64];
static _Atomic uint64_t covered;
static _Atomic uint32_t shares_seen;
static uint64_t least_share;

static void check_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)argument;
	expect(thread < lane_threads(bench.lane));
	expect(!atomic_exchange(&in_use[thread], true));
	expect(end - begin >= least_share);
	atomic_fetch_add(&covered, end - begin);
	atomic_fetch_add(&shares_seen, 1);
	(void)sched_yield();
	atomic_store(&in_use[thread], false);
}

static const struct {
	uint64_t items, grain;
} loops[] = {
	{0, 1}, {1, 1}, {1, 0}, {7, 1}, {1000, 1}, {1000, 999}, {1000, 1000}, {1000, 1001}, {1000, UINT64_MAX}, {UINT64_MAX, 1}, {UINT64_MAX, 0},
	{UINT64_MAX, UINT64_MAX}, {65, 16},
};

static void run_loops(struct lane_job *job, struct lane_exec *exec)
{
	for (size_t i = 0; i < sizeof loops / sizeof *loops; i++) {
		atomic_store(&covered, 0);
		atomic_store(&shares_seen, 0);
		least_share = loops[i].grain < loops[i].items ? loops[i].grain : loops[i].items;
		lane_parallel_for(exec, loops[i].items, loops[i].grain, check_range, NULL);
		expect(atomic_load(&covered) == loops[i].items);
		expect(atomic_load(&shares_seen) <= SHARES_PER_THREAD * exec->threads);
		expect(loops[i].items == 0 || atomic_load(&shares_seen) >= 1);
	}
	run_count(job, exec);
}

START_TEST(a_loop_covers_every_item_with_distinct_thread_numbers)
{
	struct test_job *jobs = make_jobs(1, run_loops);
	start_with(thread_counts[_i], LANE_SPIN_NS_DEFAULT);
	ck_assert(lane_submit(bench.lane, &jobs[0].job));
	take_until(1);
	expect_once(jobs, 1);
	stop();
	free(jobs);
}
END_TEST

static pthread_barrier_t barrier;
static _Atomic uint32_t meetings;

static void meet(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)argument;
	(void)thread;
	if (begin < 2 && end > 0) {
		(void)pthread_barrier_wait(&barrier);
		atomic_fetch_add(&meetings, 1);
	}
}

static void run_meet(struct lane_job *job, struct lane_exec *exec)
{
	lane_parallel_for(exec, 2, 1, meet, NULL);
	run_count(job, exec);
}

START_TEST(an_idle_thread_joins_a_loop)
{
	struct test_job *jobs = make_jobs(50, run_meet);
	ck_assert_int_eq(pthread_barrier_init(&barrier, NULL, 2), 0);
	start_with(2, _i == 0 ? 0 : LANE_SPIN_NS_DEFAULT);
	for (uint32_t i = 0; i < 50; i++) {
		ck_assert(lane_submit(bench.lane, &jobs[i].job)); /* would hang if one thread ran both shares */
		take_until(i + 1);
	}
	ck_assert_uint_eq(atomic_load(&meetings), 100);
	stop();
	free(jobs);
}
END_TEST

static _Atomic uint32_t rendezvous;

static void run_rendezvous(struct lane_job *job, struct lane_exec *exec)
{
	(void)pthread_barrier_wait(&barrier);
	atomic_fetch_add(&rendezvous, 1);
	run_count(job, exec);
}

START_TEST(a_batch_wakes_as_many_threads_as_it_has_jobs)
{
	enum { THREADS = 12, ROUNDS = 30 };
	ck_assert_int_eq(pthread_barrier_init(&barrier, NULL, THREADS), 0);
	start_with(THREADS, spins[_i]);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		struct test_job *jobs = make_jobs(THREADS, run_rendezvous);
		for (size_t i = 0; i + 1 < THREADS; i++)
			jobs[i].job.next = &jobs[i + 1].job;
		lane_submit_list(bench.lane, &jobs[0].job); /* would hang if one stayed asleep */
		take_until((round + 1) * THREADS);
		expect_once(jobs, THREADS);
		free(jobs);
	}
	stop();
}
END_TEST

START_TEST(single_submissions_wake_as_many_threads_as_there_are_jobs)
{
	enum { THREADS = 6, ROUNDS = 100 };
	ck_assert_int_eq(pthread_barrier_init(&barrier, NULL, THREADS), 0);
	start_with(THREADS, spins[_i]);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		struct test_job *jobs = make_jobs(THREADS, run_rendezvous);
		for (size_t i = 0; i < THREADS; i++)
			ck_assert(lane_submit(bench.lane, &jobs[i].job));
		take_until((round + 1) * THREADS);
		free(jobs);
	}
	stop();
}
END_TEST

static void nested_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)begin;
	(void)end;
	expect(thread < lane_threads(bench.lane));
	lane_parallel_for(argument, 1000, 1, check_range, NULL);
}

static void run_nested(struct lane_job *job, struct lane_exec *exec)
{
	least_share = 1000; /* the inner one is in one piece */
	atomic_store(&covered, 0);
	lane_parallel_for(exec, 40, 1, nested_range, exec);
	expect(atomic_load(&covered) == 1000 * (uint64_t)atomic_load(&shares_seen));
	run_count(job, exec);
}

START_TEST(a_loop_inside_a_loop_runs_serially_on_the_thread_that_meets_it)
{
	struct test_job *jobs = make_jobs(1, run_nested);
	start_with(4, 0);
	ck_assert(lane_submit(bench.lane, &jobs[0].job));
	take_until(1);
	expect_once(jobs, 1);
	stop();
	free(jobs);
}
END_TEST

static void serial_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	uint64_t *items = argument;
	expect(begin == 0 && thread == 0);
	*items += end;
}

START_TEST(a_serial_token_needs_no_lane)
{
	struct lane_job job = {0};
	struct lane_exec exec = lane_exec_serial(&job);
	uint64_t items = 0;
	lane_parallel_for(&exec, 12345, 1, serial_range, &items);
	ck_assert_uint_eq(items, 12345);
	ck_assert(!lane_cancelled(&exec));
	lane_cancel(&job);
	ck_assert(lane_cancelled(&exec));
	exec = lane_exec_serial(NULL);
	ck_assert(!lane_cancelled(&exec));
}
END_TEST

static void run_until_cancelled(struct lane_job *job, struct lane_exec *exec)
{
	while (!lane_cancelled(exec))
		(void)sched_yield();
	run_count(job, exec);
}

START_TEST(a_cancelled_job_is_told_and_still_comes_back_once)
{
	struct test_job *jobs = make_jobs(3, run_until_cancelled);
	start_with(1, 0);
	for (size_t i = 0; i < 3; i++)
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	ck_assert(lane_busy(bench.lane));
	for (size_t i = 3; i-- > 0;) /* queued ones first */
		lane_cancel(&jobs[i].job);
	take_until(3);
	expect_once(jobs, 3);
	ck_assert(!lane_busy(bench.lane));
	stop();
	free(jobs);
}
END_TEST

START_TEST(a_queued_job_that_is_withdrawn_is_neither_run_nor_done)
{
	enum { COUNT = 6 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	jobs[0].job.run = run_until_cancelled; /* the only thread is in it */
	struct lane_job never = {0};
	start_with(1, 0);
	ck_assert(lane_submit(bench.lane, &jobs[0].job));
	while (lane_withdraw(bench.lane, &jobs[0].job)) /* until the thread has it */
		ck_assert(lane_submit(bench.lane, &jobs[0].job));
	for (size_t i = 1; i < COUNT; i++)
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	ck_assert(lane_withdraw(bench.lane, &jobs[3].job)); /* amid, first, last */
	ck_assert(lane_withdraw(bench.lane, &jobs[1].job));
	ck_assert(lane_withdraw(bench.lane, &jobs[COUNT - 1].job));
	ck_assert(!lane_withdraw(bench.lane, &jobs[3].job));
	ck_assert(!lane_withdraw(bench.lane, &never));
	ck_assert(lane_submit(bench.lane, &jobs[1].job)); /* it is its owner's again; now behind the others */
	lane_cancel(&jobs[0].job);
	take_until(4);
	ck_assert(!lane_busy(bench.lane));
	ck_assert(!lane_withdraw(bench.lane, &jobs[2].job));
	ck_assert_uint_eq(atomic_load(&jobs[3].runs) + jobs[3].dones + atomic_load(&jobs[COUNT - 1].runs) + jobs[COUNT - 1].dones, 0);
	ck_assert_uint_eq(jobs[1].order, jobs[4].order + 1);
	stop();
	free(jobs);
}
END_TEST

START_TEST(a_job_that_yields_goes_on_when_others_have_had_their_turn)
{
	enum { COUNT = 3 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	struct sched_group group;
	struct sched_flow flows[2];
	jobs[0].job.run = run_until_cancelled;
	jobs[1].job.run = run_segments;
	start_with(1, 0);
	lane_set_segment(bench.lane, 0);
	sched_group_init(&group, 100);
	for (int i = 0; i < 2; i++) {
		sched_flow_init(&flows[i], &group, 100);
		jobs[i + 1].job.item = (struct sched_item){.flow = &flows[i], .class = CLASS_BATCH};
	}
	for (size_t i = 0; i < COUNT; i++)
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	lane_cancel(&jobs[0].job);
	take_until(COUNT);
	ck_assert(!lane_busy(bench.lane));
	ck_assert_uint_eq(atomic_load(&jobs[1].runs), 2); /* it has yielded once, and had nobody to yield to then */
	ck_assert_uint_eq(jobs[1].order, jobs[2].order + 1);
	ck_assert_uint_eq(jobs[1].dones + jobs[2].dones, 2);
	ck_assert(flows[0].queued == 0 && flows[0].running == 0 && flows[0].usage.jobs == 2 && jobs[1].job.device_ns == flows[0].usage.device_ns);
	stop();
	free(jobs);
}
END_TEST

/* Withdrawing races with the threads that take jobs: every job is either withdrawn or run and done, once. */
START_TEST(a_job_is_either_withdrawn_or_done)
{
	enum { COUNT = 20000, BATCH = 8 };
	struct test_job *jobs = make_jobs(COUNT, run_count);
	bool *withdrawn = calloc(COUNT, sizeof *withdrawn);
	uint32_t left = COUNT;
	start_with(thread_counts[_i], LANE_SPIN_NS_DEFAULT);
	for (size_t i = 0; i < COUNT; i += BATCH) {
		for (size_t k = i; k < i + BATCH; k++)
			ck_assert(lane_submit(bench.lane, &jobs[k].job));
		for (size_t k = i + BATCH; k-- > i + i % 3;) {
			withdrawn[k] = lane_withdraw(bench.lane, &jobs[k].job);
			left -= withdrawn[k];
		}
	}
	take_until(left);
	ck_assert(!lane_busy(bench.lane));
	for (size_t i = 0; i < COUNT; i++) {
		expect(atomic_load(&jobs[i].runs) == !withdrawn[i]);
		expect(jobs[i].dones == !withdrawn[i]);
	}
	stop();
	free(withdrawn);
	free(jobs);
}
END_TEST

static void run_slow(struct lane_job *job, struct lane_exec *exec)
{
	(void)nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
	run_mixed(job, exec);
}

START_TEST(stopping_runs_what_is_queued)
{
	enum { COUNT = 40, ITEMS = 100 };
	_Atomic uint32_t *hits = calloc(COUNT * ITEMS, sizeof *hits);
	struct test_job *jobs = make_jobs(COUNT, run_slow);
	start_with(thread_counts[_i], 0);
	for (size_t i = 0; i < COUNT; i++) {
		jobs[i].items = ITEMS;
		jobs[i].hits = hits + i * ITEMS;
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	}
	lane_stop(bench.lane);
	ck_assert(!lane_busy(bench.lane));
	ck_assert_uint_eq(lane_finish_done(bench.lane, 0), COUNT);
	expect_once(jobs, COUNT);
	for (size_t i = 0; i < COUNT * ITEMS; i++)
		expect(atomic_load(&hits[i]) == 1);
	lane_stop(bench.lane); /* again does nothing */
	stop();
	free(jobs);
	free(hits);
}
END_TEST

START_TEST(starting_and_stopping_at_once_leaves_nothing)
{
	for (int i = 0; i < 50; i++) {
		struct test_job *jobs = make_jobs(4, run_count);
		start_with(4, spins[i % 3]);
		for (int k = 0; k < i % 5; k++)
			ck_assert(lane_submit(bench.lane, &jobs[k].job));
		stop();
		free(jobs);
	}
	lane_destroy(NULL);
	lane_stop(NULL);
}
END_TEST

static char thread_name[16];
static sigset_t thread_mask;

static void run_inspect(struct lane_job *job, struct lane_exec *exec)
{
	/* The name is given by the creating thread, perhaps a moment after this one began. */
	for (int i = 0; i < 1000 && strncmp(thread_name, "opd-lane-", 9) != 0; i++) {
		(void)sched_yield();
		(void)pthread_getname_np(pthread_self(), thread_name, sizeof thread_name);
	}
	(void)pthread_sigmask(SIG_SETMASK, NULL, &thread_mask);
	run_count(job, exec);
}

START_TEST(threads_have_names_and_get_no_signals)
{
	struct test_job *jobs = make_jobs(1, run_inspect);
	sigset_t mine;
	start_with(1, 0);
	ck_assert(lane_submit(bench.lane, &jobs[0].job));
	take_until(1);
	ck_assert_str_eq(thread_name, "opd-lane-0");
	ck_assert_int_eq(sigismember(&thread_mask, SIGTERM), 1);
	ck_assert_int_eq(sigismember(&thread_mask, SIGHUP), 1);
	(void)pthread_sigmask(SIG_SETMASK, NULL, &mine);
	ck_assert_int_eq(sigismember(&mine, SIGTERM), 0);
	stop();
	free(jobs);
}
END_TEST

START_TEST(too_many_threads_are_refused)
{
	opd_error error;
	struct lane *lane = NULL;
	struct lane_options options = {.threads = 5000, .wake = on_wake};
	ck_assert_int_eq(lane_create(&options, &lane, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "lane: 5000 threads, expected 1 to 1024");
	ck_assert_ptr_null(lane);
	options.threads = 0;
	ck_assert_int_eq(lane_create(&options, &lane, &error), OPD_INVALID_ARGUMENT);
}
END_TEST

/* ---- Who runs next ---- */

static void run_busy(struct lane_job *job, struct lane_exec *exec)
{
	struct test_job *mine = (struct test_job *)(void *)job;
	struct timespec now, end;
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_nsec += (long)mine->items;
	end.tv_sec += end.tv_nsec / 1000000000;
	end.tv_nsec %= 1000000000;
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while (now.tv_sec < end.tv_sec || (now.tv_sec == end.tv_sec && now.tv_nsec < end.tv_nsec));
	run_count(job, exec);
}

START_TEST(flows_take_turns_by_their_weights_and_not_by_who_came_first)
{
	enum { EACH = 60 };
	struct test_job *jobs = make_jobs(2 * EACH + 1, run_busy);
	struct sched_group group;
	struct sched_flow light, heavy;
	sched_group_init(&group, 1);
	sched_flow_init(&light, &group, 1);
	sched_flow_init(&heavy, &group, 3);
	start_with(1, 0);
	jobs[2 * EACH].items = 20000000; /* while the others are queued */
	ck_assert(lane_submit(bench.lane, &jobs[2 * EACH].job));
	for (size_t i = 0; i < 2 * EACH; i++) {
		jobs[i].items = 100000;
		jobs[i].job.item.flow = i < EACH ? &light : &heavy;
		jobs[i].job.item.estimate_ns = 100000;
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	}
	take_until(2 * EACH + 1);
	/* How many turns each has is for test_scheduler.c, on a clock that nothing disturbs. Here: who came last had its first turn second. */
	uint32_t before = 0;
	for (size_t i = 0; i < EACH; i++)
		before += jobs[i].order < jobs[EACH].order;
	ck_assert_uint_eq(before, 1);
	ck_assert_uint_ge(light.usage.device_ns, EACH * 100000);
	stop();
	free(jobs);
}
END_TEST

static uint64_t items_of(const struct batch_item *batch)
{
	return ((const struct test_job *)(const void *)((const char *)batch - offsetof(struct test_job, job.batch)))->items;
}

static bool joins_even(const struct batch_item *leader, const struct batch_item *item)
{
	return items_of(leader) % 2 == items_of(item) % 2;
}

/* The job and those that it took along, in the order in which they came; the last of them takes no part. */
static void run_batch(struct lane_job *job, struct lane_exec *exec)
{
	run_count(job, exec);
	for (struct lane_job *other = exec->others; other != NULL; other = other->next) {
		struct test_job *mine = (struct test_job *)(void *)other;
		mine->order = atomic_fetch_add(&running_order, 1);
		atomic_fetch_add(&mine->runs, 1);
	}
	exec->together = true;
	atomic_store_explicit(&job->cancelled, true, memory_order_relaxed);
	expect(lane_cancelled(exec) == (exec->others == NULL)); /* not all of them are */
	exec->together = false;
	expect(lane_cancelled(exec));
}

START_TEST(what_may_run_together_is_taken_along_and_everything_once)
{
	enum { COUNT = 12 };
	struct test_job *jobs = make_jobs(COUNT + 1, run_batch);
	struct sched_group group;
	struct sched_flow flows[3];
	sched_group_init(&group, 1);
	for (int i = 0; i < 3; i++)
		sched_flow_init(&flows[i], &group, 1);
	start_with(1, 0);
	lane_set_batch(bench.lane, 8);
	for (int i = 1; i < 3; i++) { /* so that job 1 is the first to be begun */
		scheduler_charge(lane_scheduler_lock(bench.lane), &flows[i], CLASS_REALTIME, 1000000);
		lane_scheduler_unlock(bench.lane);
	}
	jobs[COUNT].job.run = run_until_cancelled;
	ck_assert(lane_submit(bench.lane, &jobs[COUNT].job));
	while (lane_withdraw(bench.lane, &jobs[COUNT].job))
		ck_assert(lane_submit(bench.lane, &jobs[COUNT].job));
	for (size_t i = 0; i < COUNT; i++) {
		jobs[i].items = i == 3; /* one that nobody joins */
		jobs[i].job.item.flow = &flows[(i + 2) % 3];
		jobs[i].job.batch.number = i == 7 ? 64 + 5 : 5; /* another number in the same list */
		jobs[i].job.batch.rows = i == 2 ? 3 : 1;
		jobs[i].job.batch.joins = joins_even;
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	}
	ck_assert(lane_withdraw(bench.lane, &jobs[0].job));
	ck_assert(lane_withdraw(bench.lane, &jobs[11].job));
	ck_assert(lane_submit(bench.lane, &jobs[11].job));
	lane_cancel(&jobs[COUNT].job);
	take_until(COUNT);
	ck_assert(!lane_busy(bench.lane));
	const uint32_t first = jobs[1].order;
	/* Its batch: 1, 2 (of three rows), 4, 5, 6, 8 are 8 rows. */
	static const uint32_t together[] = {2, 4, 5, 6, 8};
	for (uint32_t i = 0; i < 5; i++)
		ck_assert_uint_eq(jobs[together[i]].order, first + 1 + i);
	uint32_t least = UINT32_MAX, most = 0; /* 9, 10 and 11 are the next, whoever of them leads */
	for (uint32_t i = 9; i < COUNT; i++) {
		least = jobs[i].order < least ? jobs[i].order : least;
		most = jobs[i].order > most ? jobs[i].order : most;
	}
	ck_assert_uint_eq(most - least, 2);
	for (size_t i = 1; i < COUNT; i++)
		ck_assert_uint_eq(atomic_load(&jobs[i].runs), 1);
	ck_assert_uint_eq(flows[0].usage.jobs + flows[1].usage.jobs + flows[2].usage.jobs, COUNT - 1 + 2); /* … and what was charged */
	ck_assert(flows[0].running == 0 && flows[1].running == 0 && flows[2].running == 0);
	stop();
	free(jobs);
}
END_TEST

START_TEST(a_full_queue_refuses_its_flow_alone)
{
	struct test_job *jobs = make_jobs(6, run_count);
	struct sched_group group;
	struct sched_flow flow, other;
	sched_group_init(&group, 1);
	sched_flow_init(&flow, &group, 1);
	sched_flow_init(&other, &group, 1);
	start_with(1, 0);
	lane_scheduler_lock(bench.lane)->flow_queue_max = 2;
	lane_scheduler_unlock(bench.lane);
	jobs[0].job.run = run_until_cancelled;
	ck_assert(lane_submit(bench.lane, &jobs[0].job));
	while (lane_withdraw(bench.lane, &jobs[0].job))
		ck_assert(lane_submit(bench.lane, &jobs[0].job));
	for (size_t i = 1; i < 5; i++)
		jobs[i].job.item.flow = i < 4 ? &flow : &other;
	ck_assert(lane_submit(bench.lane, &jobs[1].job));
	ck_assert(lane_submit(bench.lane, &jobs[2].job));
	ck_assert(!lane_submit(bench.lane, &jobs[3].job));
	ck_assert(lane_submit(bench.lane, &jobs[4].job));
	ck_assert(lane_submit(bench.lane, &jobs[5].job));
	lane_cancel(&jobs[0].job);
	take_until(5);
	ck_assert_uint_eq(atomic_load(&jobs[3].runs), 0);
	ck_assert(!lane_busy(bench.lane));
	ck_assert(lane_submit(bench.lane, &jobs[3].job));
	take_until(6);
	stop();
	free(jobs);
}
END_TEST

START_TEST(a_flow_beyond_its_rate_waits_and_then_runs_though_nobody_else_comes)
{
	enum { COUNT = 8 };
	struct test_job *jobs = make_jobs(COUNT, run_busy);
	struct sched_group group;
	struct sched_flow flow;
	struct timespec begin, end;
	sched_group_init(&group, 1);
	sched_flow_init(&flow, &group, 1);
	start_with(_i == 0 ? 1 : 3, _i == 1 ? 0 : LANE_SPIN_NS_DEFAULT);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	sched_group_set_rate(lane_scheduler_lock(bench.lane), &group, 10000000, (uint64_t)begin.tv_sec * 1000000000 + (uint64_t)begin.tv_nsec);
	lane_scheduler_unlock(bench.lane);
	for (size_t i = 0; i < COUNT; i++) {
		jobs[i].items = 2000000; /* 16 ms in all, of 10 ms a second and a full bucket of 10 */
		jobs[i].job.item.flow = &flow;
		jobs[i].job.item.estimate_ns = 2000000;
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	}
	take_until(COUNT);
	clock_gettime(CLOCK_MONOTONIC, &end);
	ck_assert_msg((end.tv_sec - begin.tv_sec) * 1000 + (end.tv_nsec - begin.tv_nsec) / 1000000 > 200, "16 ms of work in less than 200 ms");
	expect_once(jobs, COUNT);
	stop();
	free(jobs);
}
END_TEST

START_TEST(stopping_does_not_wait_for_a_rate)
{
	struct test_job *jobs = make_jobs(4, run_busy);
	struct sched_group group;
	struct sched_flow flow;
	sched_group_init(&group, 1);
	sched_flow_init(&flow, &group, 1);
	start_with(2, 0);
	sched_group_set_rate(lane_scheduler_lock(bench.lane), &group, 1, 0);
	lane_scheduler_unlock(bench.lane);
	for (size_t i = 0; i < 4; i++) {
		jobs[i].items = 1000000;
		jobs[i].job.item.flow = &flow;
		ck_assert(lane_submit(bench.lane, &jobs[i].job));
	}
	lane_stop(bench.lane);
	ck_assert_uint_eq(lane_finish_done(bench.lane, 0), 4);
	expect_once(jobs, 4);
	stop();
	free(jobs);
}
END_TEST

static _Atomic bool gate;

/* Stuck until the gate opens, in a loop of its own that a second thread helps with. */
static void stuck_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	_Atomic uint32_t *inside = argument;
	(void)begin, (void)end, (void)thread;
	(void)atomic_fetch_add(inside, 1);
	while (!atomic_load(&gate))
		(void)sched_yield();
}

static void run_stuck(struct lane_job *job, struct lane_exec *exec)
{
	struct test_job *mine = (struct test_job *)job;
	atomic_fetch_add(&mine->runs, 1);
	lane_parallel_for(exec, 2, 1, stuck_range, mine->hits);
}

START_TEST(a_stuck_thread_is_replaced_and_used_again)
{
	enum { OTHERS = 200 };
	_Atomic uint32_t inside;
	start_with(2, spins[_i]);
	for (unsigned turn = 0; turn < 3; turn++) {
		struct test_job *stuck = make_jobs(1, run_stuck);
		struct test_job *jobs = make_jobs(OTHERS, run_count);
		const uint32_t before = bench.taken;
		atomic_store(&gate, false);
		atomic_store(&inside, 0);
		stuck[0].hits = &inside;
		ck_assert(!lane_replace(bench.lane, &stuck[0].job)); /* it doesn't run */
		ck_assert(lane_submit(bench.lane, &stuck[0].job));
		while (atomic_load(&inside) != 2)
			(void)sched_yield();
		ck_assert(lane_replace(bench.lane, &stuck[0].job));
		ck_assert(!lane_replace(bench.lane, &stuck[0].job)); /* it has been */
		ck_assert_uint_eq(lane_stuck(bench.lane), 2);
		for (size_t i = 0; i < OTHERS; i++)
			ck_assert(lane_submit(bench.lane, &jobs[i].job));
		take_until(before + OTHERS);
		expect_once(jobs, OTHERS);
		ck_assert(!lane_busy(bench.lane)); /* what is stuck doesn't count */
		atomic_store(&gate, true);
		take_until(before + OTHERS + 1);
		while (lane_stuck(bench.lane) != 0)
			(void)sched_yield();
		expect_once(stuck, 1);
		free(stuck);
		free(jobs);
	}
	stop();
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("lane");
	TCase *tests = tcase_create("lane");
	tcase_set_timeout(tests, 120);
	tcase_add_loop_test(tests, every_job_runs_once_and_is_done_once, 0, 12);
	tcase_add_test(tests, a_job_that_yields_goes_on_when_others_have_had_their_turn);
	tcase_add_test(tests, one_thread_runs_jobs_in_the_order_of_submission);
	tcase_add_test(tests, done_jobs_come_in_the_order_in_which_they_ended);
	tcase_add_test(tests, wake_is_called_only_when_the_list_was_empty);
	tcase_add_test(tests, each_owner_is_woken_for_and_gets_its_own_jobs_alone);
	tcase_add_test(tests, too_many_owners_are_refused);
	tcase_add_loop_test(tests, jobs_and_loops_of_several_submitters_are_all_done, 0, 12);
	tcase_add_loop_test(tests, a_loop_covers_every_item_with_distinct_thread_numbers, 0, 4);
	tcase_add_loop_test(tests, an_idle_thread_joins_a_loop, 0, 2);
	tcase_add_loop_test(tests, a_batch_wakes_as_many_threads_as_it_has_jobs, 0, 3);
	tcase_add_loop_test(tests, single_submissions_wake_as_many_threads_as_there_are_jobs, 0, 3);
	tcase_add_test(tests, a_loop_inside_a_loop_runs_serially_on_the_thread_that_meets_it);
	tcase_add_test(tests, a_serial_token_needs_no_lane);
	tcase_add_test(tests, a_cancelled_job_is_told_and_still_comes_back_once);
	tcase_add_test(tests, a_queued_job_that_is_withdrawn_is_neither_run_nor_done);
	tcase_add_loop_test(tests, a_job_is_either_withdrawn_or_done, 0, 4);
	tcase_add_loop_test(tests, stopping_runs_what_is_queued, 0, 4);
	tcase_add_test(tests, starting_and_stopping_at_once_leaves_nothing);
	tcase_add_test(tests, threads_have_names_and_get_no_signals);
	tcase_add_test(tests, too_many_threads_are_refused);
	tcase_add_test(tests, flows_take_turns_by_their_weights_and_not_by_who_came_first);
	tcase_add_test(tests, what_may_run_together_is_taken_along_and_everything_once);
	tcase_add_test(tests, a_full_queue_refuses_its_flow_alone);
	tcase_add_loop_test(tests, a_flow_beyond_its_rate_waits_and_then_runs_though_nobody_else_comes, 0, 3);
	tcase_add_test(tests, stopping_does_not_wait_for_a_rate);
	tcase_add_loop_test(tests, a_stuck_thread_is_replaced_and_used_again, 0, 2);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
