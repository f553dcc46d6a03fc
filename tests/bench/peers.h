/* The peers of a benchmark: servers that do what opd does, made another way, and their clients, each a process of its own
 * (peer_program.h has the commands); blocks of their calls, and their rows below opd's.
 *
 * Layer: bench. Threads: one at a time.
 * Life: peer_start → (peer_connect → peer_block… → peer_close)… → peer_stop. A peer whose program isn't there (NULL) is skipped:
 * all of this may be called, does nothing, and its rows say so. Errors: as everywhere in the benchmarks, bench_fail. */
#ifndef OPD_BENCH_PEERS_H
#define OPD_BENCH_PEERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#define PEERS 2
#define PEER_ROUNDS_MAX 15

struct peer {
	const char *name;
	const char *why_skipped; /* NULL: it runs */
	uint64_t divisor;        /* a slow peer makes as many calls less than opd */
	pid_t server;
	pid_t client;
	FILE *commands;
	FILE *answers;
	char path[112]; /* of the Unix socket */
};

void peer_start(struct peer *peer, const char *binary, const char *directory);
void peer_stop(struct peer *peer);

/* The server's core and the client's (tests/lib/pin.h). */
void peer_pin(const struct peer *peer, int server, int client);

/* The connection keeps 4096 weights. */
void peer_connect(struct peer *peer, bool tcp);
void peer_close(struct peer *peer);

/* Nanoseconds; the quantiles only with one in flight, the kernels' sum only when timed. */
struct peer_block {
	uint64_t calls;
	uint64_t total_ns;
	uint64_t kernel_ns;
	uint64_t quantile_ns[3]; /* 0.5, 0.9, 0.99 */
};

/* `calls` by the peer's divisor, `window` in flight, of an op as peer_op_name says it. */
struct peer_block peer_block(struct peer *peer, const char *op, size_t elements, uint64_t calls, uint64_t window, bool timed);

/* What the rounds of one row gave for one peer. */
struct peer_series {
	unsigned rounds;
	double value[PEER_ROUNDS_MAX];
	double kernel[PEER_ROUNDS_MAX];
	double ratio[PEER_ROUNDS_MAX];  /* peer over floor, without the peer's kernel */
	double versus[PEER_ROUNDS_MAX]; /* opd over peer, both without their kernels */
};

/* `opd`: without its kernel. */
void peer_series_add(struct peer_series *series, double value, double kernel, double floor, double opd);
/* The row below opd's. `kernel`: whether rows of this benchmark have one. */
void peer_series_print(struct peer_series *series, const struct peer *peer, const char *unit, bool kernel);

#endif
