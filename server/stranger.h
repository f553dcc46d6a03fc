/* Connections over a network that have not said who they are: at most limits.handshakes of them, the oldest goes when a newer one needs its place.
 *
 * Layer: server. Threads: the loop's. Of several loops each has its part of the places, as it has of the connections. An honest client is a stranger for milliseconds; whoever opens connections and says nothing pushes out its own.
 * Not here: how long a stranger may stay (conn_tick). */
#ifndef OPD_SERVER_STRANGER_H
#define OPD_SERVER_STRANGER_H

#include <stdbool.h>
#include <stdint.h>

struct conn;
struct server;

/* In struct conn. */
struct stranger {
	struct conn *next; /* newer */
	struct conn *previous;
	bool is;
};

/* In struct io_loop. */
struct strangers {
	struct conn *oldest;
	struct conn *newest;
	uint32_t count;
};

/* May close the oldest. */
void stranger_add(struct conn *conn);
/* It has said Hello, or is gone. Does nothing to one that is none. */
void stranger_remove(struct conn *conn);

#endif
