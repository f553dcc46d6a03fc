#include "server/worker_loop.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server/clock.h"
#include "server/isolated_call.h"
#include "server/shares.h"

/* What is left of a loop after its first share, as that one went: less isn't worth the three threads that must wake one after the other (the daemon's, one of its lane, one here) before somebody helps. */
#define SPLIT_NS 50000u

/* Of a helper: its number in the loop that it is in. */
static _Thread_local uint32_t own_number;
static _Thread_local bool in_loop;

/* False: none is left. */
static bool run_share(struct worker_loop *loop)
{
	const uint32_t share = atomic_fetch_add_explicit(&loop->claimed, 1, memory_order_relaxed);
	if (share >= loop->shares)
		return false;
	loop->range(loop->argument, shares_begin(loop->items, loop->shares, share), shares_begin(loop->items, loop->shares, share + 1), own_number);
	return true;
}

static void run_shares(struct worker_loop *loop)
{
	while (run_share(loop))
		;
}

/* ---- Helpers ---- */

/* False: that loop is over, or all numbers for threads in it are taken. */
static bool join(struct worker_loop *loop, uint32_t number)
{
	(void)pthread_mutex_lock(&loop->mutex);
	const bool joined = loop->open && loop->number == number && loop->next_number < loop->threads;
	if (joined) {
		own_number = loop->next_number++;
		loop->inside++;
	}
	(void)pthread_mutex_unlock(&loop->mutex);
	return joined;
}

static void leave(struct worker_loop *loop)
{
	(void)pthread_mutex_lock(&loop->mutex);
	if (--loop->inside == 0)
		(void)pthread_cond_signal(&loop->left);
	(void)pthread_mutex_unlock(&loop->mutex);
}

static bool receive(int fd, uint32_t *packet)
{
	ssize_t got;
	do
		got = recv(fd, packet, sizeof *packet, 0);
	while (got < 0 && errno == EINTR);
	return got == (ssize_t)sizeof *packet;
}

static void *helper_main(void *argument)
{
	struct worker_loop *loop = argument;
	uint32_t packet;
	in_loop = true;
	while (receive(loop->helpers, &packet)) {
		if (join(loop, packet)) {
			run_shares(loop);
			leave(loop);
		}
		if (send(loop->helpers, &packet, sizeof packet, MSG_NOSIGNAL) != (ssize_t)sizeof packet)
			break;
	}
	return NULL; /* the daemon is gone: the thread that serves ends the process */
}

/* So many as there may be at once, or as the system gives. */
static void start_helpers(struct worker_loop *loop, uint32_t threads)
{
	pthread_t thread;
	while (loop->started + 1 < threads && pthread_create(&thread, NULL, helper_main, loop) == 0) {
		(void)pthread_detach(thread);
		loop->started++;
	}
}

void worker_loop_set_helpers(struct worker_loop *loop, int fd)
{
	if (fd < 0)
		return;
	if (loop->helpers >= 0) { /* a thread may wait there */
		(void)close(fd);
		return;
	}
	(void)pthread_mutex_init(&loop->mutex, NULL);
	(void)pthread_cond_init(&loop->left, NULL);
	loop->helpers = fd;
}

/* ---- Loops ---- */

static void open_loop(struct worker_loop *loop, uint32_t threads)
{
	struct isolated_message split = {.kind = ISOLATED_SPLIT};
	(void)pthread_mutex_lock(&loop->mutex);
	loop->open = true;
	split.number = ++loop->number;
	loop->threads = threads;
	loop->next_number = 1;
	(void)pthread_mutex_unlock(&loop->mutex);
	if (!isolated_send(loop->daemon, &split, -1))
		_exit(0); /* it is gone */
}

static void close_loop(struct worker_loop *loop)
{
	(void)pthread_mutex_lock(&loop->mutex);
	loop->open = false;
	while (loop->inside != 0)
		(void)pthread_cond_wait(&loop->left, &loop->mutex);
	(void)pthread_mutex_unlock(&loop->mutex);
}

/* The first share says whether the others are worth help. */
static bool wants_help(struct worker_loop *loop, uint32_t threads)
{
	const uint64_t began_ns = clock_now_ns();
	(void)run_share(loop);
	if (loop->helpers < 0 || (clock_now_ns() - began_ns) * (loop->shares - 1) < SPLIT_NS)
		return false;
	start_helpers(loop, threads);
	return loop->started != 0;
}

void worker_loop_run(struct worker_loop *loop, uint32_t threads, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	const uint32_t shares = shares_count(items, grain, threads);
	if (items == 0)
		return;
	if (threads == 1 || shares <= 1 || in_loop) {
		range(argument, 0, items, own_number);
		return;
	}
	loop->range = range;
	loop->argument = argument;
	loop->items = items;
	loop->shares = shares;
	atomic_store_explicit(&loop->claimed, 0, memory_order_relaxed);
	in_loop = true;
	const bool helped = wants_help(loop, threads);
	if (helped)
		open_loop(loop, threads);
	run_shares(loop);
	if (helped)
		close_loop(loop);
	in_loop = false;
}
