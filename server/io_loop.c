#include "server/io_loop.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "server/conn.h"
#include "server/daemon.h"
#include "server/listener.h"
#include "server/metrics.h"
#include "server/request.h"
#include "server/ring.h"

#define BUSY_US 1000000u

void io_loop_wake(struct io_loop *io)
{
	const uint64_t one = 1;
	if (!atomic_exchange_explicit(&io->woken, true, memory_order_acq_rel))
		(void)!write(io->wake_fd, &one, sizeof one);
}

bool io_loop_by_edges(struct io_loop *io, int fd)
{
	struct epoll_event edges = {.events = EPOLLIN | EPOLLET, .data.fd = fd}; /* libuv knows its descriptors by that */
	return epoll_ctl(uv_backend_fd(&io->loop), EPOLL_CTL_MOD, fd, &edges) == 0;
}

struct io_loop *io_loop_expect(struct io_loop *io)
{
	(void)atomic_fetch_add(&io->conn_count, 1);
	(void)atomic_fetch_add(&io->busy_count, 1);
	return io;
}

/* A drain may wait for the last one. */
void io_loop_forget(struct io_loop *io, bool busy)
{
	(void)atomic_fetch_sub(&io->busy_count, busy);
	(void)atomic_fetch_sub(&io->conn_count, 1);
	server_wake(io->server);
}

/* Busy ones first: a hundred that are only open cost a loop nothing, and two that are busy on one loop have half of it each. */
static bool has_less(const struct io_loop *io, const struct io_loop *other)
{
	const uint32_t busy = atomic_load(&io->busy_count), others = atomic_load(&other->busy_count);
	return busy != others ? busy < others : atomic_load(&io->conn_count) < atomic_load(&other->conn_count);
}

struct io_loop *io_loop_choose(struct server *server)
{
	struct io_loop *best = &server->loops[0];
	for (uint32_t i = 1; i < server->loop_count; i++)
		if (has_less(&server->loops[i], best))
			best = &server->loops[i];
	return best;
}

uint64_t io_loop_cpu_ns(const struct io_loop *io)
{
	struct timespec used;
	if (!atomic_load_explicit(&io->has_clock, memory_order_acquire) || clock_gettime(io->cpu_clock, &used) != 0)
		return 0;
	return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

/* ---- What others leave for it ---- */

/* A call that another thread wants made on the loop's. */
struct post {
	struct post *next;
	void (*callback)(void *argument);
	void *argument;
};

opd_status io_loop_post(struct io_loop *io, void (*callback)(void *argument), void *argument, opd_error *error)
{
	struct post *post = calloc(1, sizeof *post);
	if (post == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: out of memory");
	post->callback = callback;
	post->argument = argument;
	(void)pthread_mutex_lock(&io->mutex);
	const bool ended = io->ended;
	if (!ended) {
		*(io->posts_last == NULL ? &io->posts : &io->posts_last->next) = post;
		io->posts_last = post;
	}
	(void)pthread_mutex_unlock(&io->mutex);
	if (ended) {
		free(post);
		return opd_fail(error, OPD_UNAVAILABLE, "server: it has ended");
	}
	io_loop_wake(io);
	return OPD_OK;
}

static void run_posts(struct io_loop *io)
{
	(void)pthread_mutex_lock(&io->mutex);
	struct post *post = io->posts;
	io->posts = io->posts_last = NULL;
	(void)pthread_mutex_unlock(&io->mutex);
	while (post != NULL) {
		struct post *next = post->next;
		post->callback(post->argument);
		free(post);
		post = next;
	}
}

void io_loop_end_posts(struct io_loop *io)
{
	(void)pthread_mutex_lock(&io->mutex);
	io->ended = true; /* who posted before must not wait for ever */
	(void)pthread_mutex_unlock(&io->mutex);
	run_posts(io);
}

static void finish_devices(struct io_loop *io)
{
	for (uint32_t i = 0; i < REGISTRY_DEVICES_MAX; i++) {
		struct device_lane *lane = device_lane_started(io->server, i);
		if (lane != NULL)
			device_lane_finish_done(lane, io->number);
	}
}

void io_loop_finish(struct io_loop *io)
{
	lanes_finish_done(io);
	if (atomic_exchange_explicit(&io->device_done, false, memory_order_acquire))
		finish_devices(io);
	run_posts(io);
}

void io_loop_attend(struct io_loop *io, uint64_t until_ns)
{
	atomic_store_explicit(&io->attend_until_ns, until_ns, memory_order_relaxed);
	io_loop_wake(io);
}

bool io_loop_keep(struct io_loop *io, struct device_lane *lane)
{
	if (io->kept != NULL)
		return false;
	io->kept = lane;
	io_loop_flush_soon(io);
	return true;
}

void io_loop_let_go(struct io_loop *io)
{
	if (io->kept != NULL)
		device_lane_let_go(io->kept);
	io->kept = NULL;
}

/* What follows a job's end may keep the lane again. */
static void look_at_kept(struct io_loop *io)
{
	struct device_lane *lane = io->kept;
	io->kept = NULL;
	if (lane != NULL && device_lane_look(lane))
		io->kept = lane;
}

/* Whether it stays awake for a device; what that has done meanwhile is taken. */
static bool attend(struct io_loop *io, uint64_t now_ns)
{
	look_at_kept(io);
	const uint64_t until_ns = atomic_load_explicit(&io->attend_until_ns, memory_order_relaxed);
	if (until_ns == 0)
		return io->kept != NULL;
	const bool done = atomic_exchange_explicit(&io->device_done, false, memory_order_acquire);
	if (done)
		finish_devices(io);
	if (done || now_ns >= until_ns)
		atomic_store_explicit(&io->attend_until_ns, 0, memory_order_relaxed);
	return io->kept != NULL || (!done && now_ns < until_ns);
}

static void on_wake(uv_poll_t *wake, int status, int events)
{
	struct io_loop *io = wake->data;
	uint64_t count;
	(void)status;
	(void)events;
	if (!io->wake_by_edges) {
		io->wake_by_edges = io_loop_by_edges(io, io->wake_fd);
		(void)!read(io->wake_fd, &count, sizeof count);
	}
	(void)atomic_exchange_explicit(&io->woken, false, memory_order_acq_rel); /* before it looks: who comes after that wakes again */
	standstill_wait(io->server, io);
	io_loop_finish(io);
	if (io->number == 0)
		server_on_wake(io->server);
	else if (atomic_load_explicit(&io->stopping, memory_order_relaxed))
		uv_stop(&io->loop);
}

/* ---- Turns ---- */

/* While it is active the loop doesn't sleep in its poll: there is nothing else to do. */
static void on_again(uv_idle_t *again)
{
	(void)again;
}

/* Before polling too something may become writable (a write that libuv finished at once is reported then): without this the poll would sleep on it
 * until the next tick. */
void io_loop_flush_soon(struct io_loop *io)
{
	if (!uv_is_active((uv_handle_t *)&io->again))
		(void)uv_idle_start(&io->again, on_again);
}

static void flush_dirty(struct io_loop *io)
{
	struct conn *conn = io->dirty;
	io->dirty = NULL;
	if (conn != NULL)
		io->now_ns = request_now_ns(); /* once for all replies: they go out together */
	while (conn != NULL) {
		struct conn *next = conn->next_dirty;
		conn->dirty = false;
		conn_flush(conn);
		conn = next;
	}
}

/* After polling: a new turn begins; what came by rings is served, the replies leave together, and again while rings that poll bring something in this turn's slice. */
static void on_flush(uv_check_t *check)
{
	struct io_loop *io = check->data;
	io->turn++;
	io->crowded = io->turn_conns > 1;
	io->turn_conns = 0;
	io->now_ns = request_now_ns();
	io->turn_us = io->now_ns / 1000;
	io->context.inline_ns = 0;
	io->slice_end_ns = io->now_ns + RING_SLICE_NS;
	if (io->number == 0)
		listener_turn(io->server);
	const bool attends = attend(io, io->now_ns);
	if (attends)
		io_loop_flush_soon(io);
	do {
		rings_serve(io);
		flush_dirty(io);
	} while (io->rings != NULL && rings_look(io));
	if (io->dirty == NULL && io->rings == NULL && io->kept == NULL && !attends)
		(void)uv_idle_stop(&io->again);
}

/* What it sent in the last second counts. */
static void count_busy(struct io_loop *io, struct conn *conn, uint64_t now_us)
{
	const bool busy = now_us < conn->read_us + BUSY_US;
	if (busy && !conn->busy)
		(void)atomic_fetch_add(&io->busy_count, 1);
	else if (!busy && conn->busy)
		(void)atomic_fetch_sub(&io->busy_count, 1);
	conn->busy = busy;
}

static void on_tick(uv_poll_t *tick, int status, int events)
{
	(void)status;
	(void)events;
	struct io_loop *io = tick->data;
	uint64_t expirations;
	if (read(io->tick_fd, &expirations, sizeof expirations) != sizeof expirations)
		return;
	const uint64_t now_ns = request_now_ns();
	io->polled_ns = 0;
	for (struct conn *conn = io->conns, *next; conn != NULL; conn = next) {
		next = conn->next;
		count_busy(io, conn, now_ns / 1000);
		conn_tick(conn, now_ns / 1000);
	}
	if (io->number == 0)
		server_on_tick(io->server, now_ns);
}

/* ---- Life ---- */

/* 0 or libuv's error. The descriptor is closed by io_loop_fini, also after a failure. */
static int open_tick(struct io_loop *io)
{
	const struct itimerspec second = {.it_interval = {.tv_sec = 1}, .it_value = {.tv_sec = 1}};
	io->tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (io->tick_fd < 0 || timerfd_settime(io->tick_fd, 0, &second, NULL) != 0)
		return uv_translate_sys_error(errno);
	return uv_poll_init(&io->loop, &io->tick, io->tick_fd);
}

/* The same. */
static int open_wake(struct io_loop *io)
{
	io->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return io->wake_fd < 0 ? uv_translate_sys_error(errno) : uv_poll_init(&io->loop, &io->wake, io->wake_fd);
}

static opd_status open_events(struct io_loop *io, opd_error *error)
{
	if (uv_loop_init(&io->loop) != 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: no event loop");
	int failed = open_wake(io);
	if (failed == 0)
		failed = uv_check_init(&io->loop, &io->flush);
	if (failed == 0)
		failed = uv_idle_init(&io->loop, &io->again);
	if (failed == 0)
		failed = open_tick(io);
	if (failed == 0)
		failed = deadlines_open(&io->deadlines, &io->loop);
	if (failed == 0)
		failed = watches_open(&io->watches, io->server, &io->loop);
	io->wake.data = io->flush.data = io->again.data = io->tick.data = io;
	if (failed == 0)
		failed = uv_check_start(&io->flush, on_flush);
	if (failed == 0)
		failed = uv_poll_start(&io->tick, UV_READABLE, on_tick);
	if (failed == 0)
		failed = uv_poll_start(&io->wake, UV_READABLE, on_wake);
	io->running = failed == 0;
	return failed == 0 ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: event loop: %s", uv_strerror(failed));
}

opd_status io_loop_open(struct io_loop *io, opd_error *error)
{
	const bool tls = io->server->config->tls_context != NULL;
	io->tick_fd = io->wake_fd = -1;
	(void)pthread_mutex_init(&io->mutex, NULL); /* of glibc, it can't fail */
	io->turn_us = request_now_ns() / 1000;
	io->metrics = metrics_create(false);
	context_init(&io->context, io->server);
	io->context.io = io;
	io->context.loop = io->number;
	io->context.metrics = io->metrics;
	io->stage = malloc(CONN_STAGE_BYTES);
	if (tls) {
		io->tls_stage = malloc(TLS_STAGE_BYTES);
		io->tls_sealed = malloc(TLS_SEALED_BYTES);
	}
	if (io->metrics == NULL || io->stage == NULL || (tls && (io->tls_stage == NULL || io->tls_sealed == NULL)))
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: out of memory");
	return open_events(io, error);
}

/* ---- Threads ---- */

void io_loop_run(struct io_loop *io)
{
	if (!io->has_clock && pthread_getcpuclockid(pthread_self(), &io->cpu_clock) == 0)
		atomic_store_explicit(&io->has_clock, true, memory_order_release);
	(void)uv_run(&io->loop, UV_RUN_DEFAULT);
}

static void *loop_main(void *argument)
{
	io_loop_run(argument);
	return NULL;
}

/* Signals are the main thread's business. */
opd_status io_loop_start(struct io_loop *io, opd_error *error)
{
	sigset_t all, before;
	char name[16];
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	const int failed = pthread_create(&io->thread, NULL, loop_main, io);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed != 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "server: no thread for an I/O loop: %s", strerror(failed));
	io->started = true;
	(void)snprintf(name, sizeof name, "opd-loop-%u", (unsigned)io->number % 1000);
	(void)pthread_setname_np(io->thread, name);
	return OPD_OK;
}

void io_loop_stop(struct io_loop *io)
{
	if (!io->started)
		return;
	atomic_store(&io->stopping, true);
	io_loop_wake(io);
	(void)pthread_join(io->thread, NULL);
	io->started = false;
	atomic_store(&io->has_clock, false);
}

static void close_handle(uv_handle_t *handle, void *argument)
{
	(void)argument;
	if (!uv_is_closing(handle))
		uv_close(handle, NULL);
}

void io_loop_close(struct io_loop *io)
{
	uv_walk(&io->loop, close_handle, NULL);
	while (uv_loop_close(&io->loop) == UV_EBUSY)
		(void)uv_run(&io->loop, UV_RUN_DEFAULT);
	io->running = false;
}

void io_loop_fini(struct io_loop *io)
{
	context_fini(&io->context);
	closer_fini(&io->closer);
	metrics_destroy(io->metrics);
	if (io->tick_fd >= 0)
		(void)close(io->tick_fd);
	if (io->wake_fd >= 0)
		(void)close(io->wake_fd);
	deadlines_close(&io->deadlines);
	watches_close(&io->watches);
	free(io->stage);
	free(io->tls_stage);
	free(io->tls_sealed);
	(void)pthread_mutex_destroy(&io->mutex);
}
