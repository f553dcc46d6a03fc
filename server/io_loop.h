/* An I/O loop: its event loop, the connections that live on it, and what a turn of it needs.
 *
 * Layer: server, internal. Threads: the loop's own thread, but for what says otherwise; open, start, stop, close and fini by loop 0's.
 * Life: zeroed and numbered → io_loop_open → io_loop_start (of loop 0: io_loop_run) → io_loop_stop → io_loop_close (its connections are gone) → io_loop_fini, also after a failure to open.
 * A connection is accepted into one loop and stays there: nothing of it is read or written elsewhere, so that a request's path takes no lock here. Loop 0 accepts, and hands the
 * socket to the loop of which the fewest connections have anything to do. What a loop must know or change of another's it does at a standstill (server/standstill.h), or asks it to (io_loop_post).
 * Not here: the daemon's life, listeners, administration, which are loop 0's (server/server.c). */
#ifndef OPD_SERVER_IO_LOOP_H
#define OPD_SERVER_IO_LOOP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <uv.h>

#include "opd/status.h"
#include "server/closer.h"
#include "server/config.h"
#include "server/conn_tls.h"
#include "server/context.h"
#include "server/deadline.h"
#include "server/histogram.h"
#include "server/stranger.h"
#include "server/watch.h"

struct conn;
struct device_lane;
struct metrics;
struct post;
struct ring;
struct server;

struct io_loop {
	struct server *server;
	uint32_t number;      /* 0: the one that also has the listeners and the daemon's life */
	bool running;         /* the event loop is there */

	uv_loop_t loop;
	uv_poll_t wake;       /* lanes, posts, a standstill; of loop 0 also a drain. No uv_async: when who wakes is interrupted by the loop that it wakes, libuv's spins for some 10 us and then yields */
	int wake_fd;          /* its eventfd */
	bool wake_by_edges;   /* io_loop_by_edges */
	_Atomic bool woken;   /* wake_fd was written to, and the loop hasn't looked since */
	uv_check_t flush;     /* after polling: replies of the turn leave together */
	uv_idle_t again;      /* active while a connection has more to do than one turn allows */
	uv_poll_t tick;       /* once a second: handshakes, stalls, the drain's end */
	int tick_fd;          /* its timerfd. A loop without a libuv timer sleeps without a time limit, which spares arming one: 0.6 us a call */
	struct deadlines deadlines;
	struct watches watches;

	struct context context;
	struct metrics *metrics;
	uint64_t turn;          /* number of the loop's turn */
	uint64_t turn_us;       /* monotonic time of its start */
	uint32_t turn_conns;    /* connections that did something in it */
	bool crowded;           /* in the one before, more than one did */
	uint64_t now_ns;        /* the clock, as this turn last read it: when it began, and each time that replies went out */
	char *stage;            /* what connections read into before they know where it belongs */
	uint8_t *tls_stage;     /* ciphertext that connections read; NULL: no listener speaks TLS */
	uint8_t *tls_sealed;    /* … that they write */
	struct tls_jobs tls_jobs;

	struct conn *conns;     /* all, newest first */
	_Atomic uint32_t conn_count; /* they, and those that are on their way here */
	_Atomic uint32_t busy_count; /* of them, those that sent something in the last second, or came in it (conn.busy) */
	struct closer closer;   /* of descriptors that clients passed */
	struct strangers strangers;
	struct conn *dirty;     /* have replies to write in this turn */
	struct ring *rings;     /* those awake: looked at in every turn */
	uint64_t slice_end_ns;  /* until when this turn may look at rings that poll */
	uint64_t polled_ns;     /* in looks that brought nothing, since the tick; without what others took of the core meanwhile */

	tally lanes_done[1 + CONFIG_LANES_MAX]; /* jobs of its, by CPU lane; written here, read by loop 0 */
	_Atomic bool device_done; /* a device lane has finished jobs of its */
	_Atomic uint64_t attend_until_ns; /* it doesn't sleep until then, or until device_done: a lone job's end is near. 0: none is */
	struct device_lane *kept; /* a lone job runs on it that this loop has begun, and whose end it looks for in each turn, without sleeping; NULL: none */
	pthread_mutex_t mutex;    /* of what other threads ask for: */
	struct post *posts;
	struct post *posts_last;
	bool ended;               /* under mutex: nobody runs posts any more */

	pthread_t thread;         /* of a loop behind the first */
	bool started;
	_Atomic bool stopping;
	clockid_t cpu_clock;      /* its thread's; valid while it runs */
	_Atomic bool has_clock;
};

/* io->server and io->number are set; server->config is there. */
OPD_MUST_USE opd_status io_loop_open(struct io_loop *io, opd_error *error);
/* A thread of its own, which runs it until io_loop_stop. */
OPD_MUST_USE opd_status io_loop_start(struct io_loop *io, opd_error *error);
/* On this thread, until uv_stop. */
void io_loop_run(struct io_loop *io);
/* Waits for the thread's end; again, or of one that wasn't started: nothing happens. */
void io_loop_stop(struct io_loop *io);
/* Its thread has ended, or is this one: nothing is posted to it any more; what was is done. */
void io_loop_end_posts(struct io_loop *io);
/* What lanes and posts have for it. */
void io_loop_finish(struct io_loop *io);
/* Closes what is still open in the event loop, and waits for the ends of it. */
void io_loop_close(struct io_loop *io);
void io_loop_fini(struct io_loop *io);

/* Any thread: calls `callback(argument)` once on the loop's thread soon. */
OPD_MUST_USE opd_status io_loop_post(struct io_loop *io, void (*callback)(void *argument), void *argument, opd_error *error);
/* Any thread: a connection is on its way to it (returns io), and counts from now on, as a busy one; it has ended, or doesn't come. */
struct io_loop *io_loop_expect(struct io_loop *io);
void io_loop_forget(struct io_loop *io, bool busy);
/* Loop 0's: the one that gets the next connection. */
struct io_loop *io_loop_choose(struct server *server);
/* Any thread: CPU time that its thread has had, in nanoseconds; 0: it doesn't run. */
uint64_t io_loop_cpu_ns(const struct io_loop *io);
/* Any thread: the loop looks soon at what others have left for it. */
void io_loop_wake(struct io_loop *io);
/* In the first event of a descriptor that libuv polls: from now on its epoll tells of each write, whatever there is to read, so that an eventfd needn't be read back: a system call
 * less for each wake-up. libuv leaves that as long as what is polled for doesn't change. False: it goes on as before. */
bool io_loop_by_edges(struct io_loop *io, int fd);
/* Any thread: a lane expects to be done with a lone job before long, whose answer shouldn't wait for the loop to be woken (15 us). It serves others as ever, but doesn't sleep meanwhile. */
void io_loop_attend(struct io_loop *io, uint64_t until_ns);
/* On its thread: it looks for the end of the lone job that it has just begun there. False: it does so for another. */
OPD_MUST_USE bool io_loop_keep(struct io_loop *io, struct device_lane *lane);
/* On its thread, or after that has ended: not any more. */
void io_loop_let_go(struct io_loop *io);
/* The next poll doesn't sleep, so that what is dirty now leaves. */
void io_loop_flush_soon(struct io_loop *io);

#endif
