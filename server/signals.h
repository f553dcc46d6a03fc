/* Signals: SIGTERM and SIGINT drain, SIGHUP reads the configuration again, SIGUSR1 opens the log file again; between them the service manager's watchdog is told that all I/O loops turn.
 *
 * Layer: server, beside main.c. Threads: all on the main thread; signals are waited for on a thread of their own, so that none interrupts a call.
 * Life: signals_block, before any other thread → signals_start → signals_serve(server) → signals_serve(NULL) → signals_stop. */
#ifndef OPD_SERVER_SIGNALS_H
#define OPD_SERVER_SIGNALS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "server/log.h"
#include "server/options.h"
#include "server/server.h"

/* What the signal thread and main share. */
struct signals {
	const struct options *options;
	struct log *log;
	pthread_mutex_t mutex;
	struct server *server; /* NULL: not yet there, or gone */
	bool gone;
	unsigned ends;        /* SIGTERM and SIGINT so far */
	_Atomic bool beating; /* a watchdog's beat is on its way through the loops */
	bool over;            /* the thread ends at its next signal */
	pthread_t thread;
};

/* All threads started from here on inherit the mask: only the signal thread hears of a signal. */
void signals_block(void);

/* options and log outlive it. false: no thread to be had. */
OPD_MUST_USE bool signals_start(struct signals *signals, const struct options *options, struct log *log);
void signals_stop(struct signals *signals);

/* From now on this server is what signals are for; one that came while it was made counts. NULL: it is gone. */
void signals_serve(struct signals *signals, struct server *server);

#endif
