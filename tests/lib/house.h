/* A daemon in this process for tests: the built-in providers, the lab's (lab.h), a Unix socket, a captured log, and a direct way
 * in.
 *
 * Layer: tests. Threads: house_start and house_stop on the test's; the daemon has a thread of its own. One house at a time.
 * Life: house_start → house_client… → every client closed → house_stop, which checks that the ledger is back at zero.
 * No list is set: the default one for every op is taken away.
 * Failures end the test (libcheck). */
#ifndef OPD_TESTS_HOUSE_H
#define OPD_TESTS_HOUSE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/client.h"
#include "server/server.h"

struct house {
	struct server *server;
	struct log log;
	pthread_t thread;
	char folder[64];
	char log_path[96];
	char address[112]; /* "unix:…/sock" */
	char way[256];     /* … or what OPD_HOUSE_WAY makes of it */
};

/* settings: pairs of configuration key and value, then NULL; "module" takes name=/path. NULL: none. */
void house_start(struct house *house, const char *const *settings);
void house_stop(struct house *house);

/* A client over the socket, or as the environment's OPD_HOUSE_WAY says ("?rings", "tls"): how whole suites run over another transport. OPD_HOUSE_LOOPS: so many I/O loops. */
opd_client *house_client(const struct house *house);
/* A client that may call the dispatcher directly: a socket pair, and the scheme that libopd-embedded has too. */
opd_client *house_direct_client(struct house *house);

/* Everything logged so far, to be freed; and how many lines of it hold both texts (NULL: any). */
char *house_log(const struct house *house);
size_t house_log_count(const struct house *house, const char *event, const char *also);
void house_log_level(struct house *house, log_level level);

/* Waits until the ledger shows `bytes`: replies are released a moment after the client has read them. */
void house_await_bytes(const struct house *house, uint64_t bytes);

/* Waits until a counter of the lab's has come so far. */
void house_await_count(const _Atomic uint64_t *counter, uint64_t count);

#endif
