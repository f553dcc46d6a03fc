/* An I/O loop: its event loop, the connections that live on it, and what a turn of it needs.
 *
 * Layer: server, internal. Threads: the loop's own thread, but for io_loop_wake.
 * Life: zeroed and numbered → io_loop_open → uv_run of `loop` → io_loop_close (its connections are gone) → io_loop_fini, also after a failure to open.
 * A connection is accepted into one loop and stays there: nothing of it is read or written elsewhere, so that a request's path takes no lock here.
 * Not here: the daemon's life, listeners, administration, which are loop 0's (server/server.c). */
#ifndef OPD_SERVER_IO_LOOP_H
#define OPD_SERVER_IO_LOOP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "opd/status.h"
#include "server/conn_tls.h"
#include "server/context.h"
#include "server/deadline.h"
#include "server/stranger.h"
#include "server/watch.h"

struct conn;
struct metrics;
struct ring;
struct server;

struct io_loop {
	struct server *server;
	uint32_t number;      /* 0: the one that also has the listeners and the daemon's life */
	bool running;         /* the event loop is there */

	uv_loop_t loop;
	uv_poll_t wake;       /* lanes, posts, drain. No uv_async: when who wakes is interrupted by the loop that it wakes, libuv's spins for some 10 us and then yields */
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
	uint64_t flush_ns;      /* when this turn's replies went out */
	char *stage;            /* what connections read into before they know where it belongs */
	uint8_t *tls_stage;     /* ciphertext that connections read; NULL: no listener speaks TLS */
	uint8_t *tls_sealed;    /* … that they write */
	struct tls_jobs tls_jobs;

	struct conn *conns;     /* all, newest first */
	uint32_t conn_count;
	struct strangers strangers;
	struct conn *dirty;     /* have replies to write in this turn */
	struct ring *rings;     /* those awake: looked at in every turn */
	uint64_t slice_end_ns;  /* until when this turn may look at rings that poll */
	uint64_t polled_ns;     /* in looks that brought nothing, since the tick */
};

/* io->server and io->number are set; server->config is there. */
OPD_MUST_USE opd_status io_loop_open(struct io_loop *io, opd_error *error);
/* Closes what is still open in the event loop, and waits for the ends of it. */
void io_loop_close(struct io_loop *io);
void io_loop_fini(struct io_loop *io);

/* Any thread: the loop looks soon at what others have left for it. */
void io_loop_wake(struct io_loop *io);
/* In the first event of a descriptor that libuv polls: from now on its epoll tells of each write, whatever there is to read, so that an eventfd needn't be read back: a system call
 * less for each wake-up. libuv leaves that as long as what is polled for doesn't change. False: it goes on as before. */
bool io_loop_by_edges(struct io_loop *io, int fd);
/* The next poll doesn't sleep, so that what is dirty now leaves. */
void io_loop_flush_soon(struct io_loop *io);

#endif
