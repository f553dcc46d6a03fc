/* Closes descriptors that came from clients, without waiting: what is behind one decides how long its close takes (a socket that lingers, a file system in somebody's process).
 *
 * Layer: server, bottom. Threads: its owner's; the closing is done by a thread of its own, made when the first one comes that isn't memory.
 * Life: zeroed → closer_close… → closer_fini, which doesn't wait either: a close that hangs keeps its thread, which has nothing of the owner's. */
#ifndef OPD_SERVER_CLOSER_H
#define OPD_SERVER_CLOSER_H

#include <stdbool.h>

struct closer {
	bool running;
	int to; /* its thread reads what to close from there */
};

/* Takes the descriptor. A memfd, whose close waits for nobody, goes to server/reaper.h. */
void closer_close(struct closer *closer, int fd);
void closer_fini(struct closer *closer);

#endif
