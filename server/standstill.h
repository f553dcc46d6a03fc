/* A standstill: one I/O loop looks at, or changes, what belongs to the others, while these wait between two of their callbacks.
 *
 * Layer: server, internal. Threads: the loops'.
 * Life: standstill_init → standstill_begin, standstill_end…; standstill_wait on each loop whenever it is woken → standstill_fini.
 * For administration: a reload, a drain, lists of sessions and changes of them. What a request's path reads (the configuration, a session's class, the list of connections) then needs neither a lock nor a
 * reference: nobody changes it but its own loop, or a loop at whose word all stand still. It takes as long as the longest callback of another loop, and a few microseconds; one loop alone never waits.
 * Between begin and end: no lock may be waited for that a loop holds across callbacks (there is none), and nothing that another loop would have to do. Not nested. */
#ifndef OPD_SERVER_STANDSTILL_H
#define OPD_SERVER_STANDSTILL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct io_loop;
struct server;

struct standstill {
	pthread_mutex_t mutex;  /* of what follows */
	pthread_cond_t changed;
	_Atomic bool held; /* all but one stand still, or shall; read without the mutex too */
	uint32_t standing;
};

void standstill_init(struct standstill *standstill);
void standstill_fini(struct standstill *standstill);

/* On the thread of `io` (NULL: on one that is no loop's): returns when all other loops stand still. What may take long follows: a device's lane that a loop has for itself (io_loop_keep) is let go of by all. */
void standstill_begin(struct server *server, struct io_loop *io);
void standstill_end(struct server *server);
/* On the thread of `io`, between callbacks: while another wants it, it stands still. */
void standstill_wait(struct server *server, struct io_loop *io);

#endif
