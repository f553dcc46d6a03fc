/* What the benchmarks of a running daemon share: the setting, calls through libopd, and the list of benchmarks.
 *
 * Layer: bench, on libopd's public header alone. Threads: one at a time but for what a function says.
 * Every figure is a median over blocks; opd's block and its floor's take turns within one run, on the same cores. */
#ifndef OPD_BENCH_BENCH_H
#define OPD_BENCH_BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "opd/client.h"
#include "tests/bench/daemon.h"
#include "tests/bench/floor.h"
#include "tests/bench/peers.h"
#include "tests/bench/report.h"

struct bench {
	bool quick;          /* fewer and shorter blocks: a look, not a measurement */
	const char *binary;  /* of the daemon */
	const char *counter; /* path of the preloaded counter (counter.h); NULL: not built */
	const char *cores;   /* as --cores says; NULL: all that the process may use */
	char directory[64];  /* for sockets */
	struct floor_server floor;
	struct peer peers[PEERS];
};

/* Each starts a daemon of its own and prints one section. */
void bench_latency(struct bench *bench);
void bench_rate(struct bench *bench);
void bench_loops(struct bench *bench);
void bench_bulk(struct bench *bench);
void bench_connections(struct bench *bench);
void bench_counts(struct bench *bench);
void bench_graph(struct bench *bench);
void bench_memory(struct bench *bench);
void bench_product(struct bench *bench);
void bench_rings(struct bench *bench);

/* ---- Placement ---- */

/* Where a measurement runs: cores by tests/lib/pin.h. */
struct placement {
	const char *name;
	int server;
	int client;
};
extern const struct placement placement_same, placement_two;

/* Pins the caller and the peers' clients to the client's core; the floor, the peers and all threads of the daemon to the server's. */
void placement_apply(const struct placement *placement, const struct bench *bench, const struct daemon *daemon);

/* Pins one more process to the server's core. */
void placement_server(const struct placement *placement, pid_t pid);

/* ---- Calls ---- */

opd_client *call_connect(const char *address);
/* With the feature "shm". */
opd_client *call_connect_shared(const char *address);

/* Runs and drops the result. */
void call_run(opd_client *client, const opd_request *request);

/* Makes a request on a client, as the benchmarks below want it; the caller destroys it. */
typedef opd_request *(*call_build_fn)(opd_client *client);
/* rms_norm of 1x4096 f32 with a kept weight: 16 KiB in, 16 KiB out. */
opd_request *call_norm(opd_client *client);
/* relu of 16 f32: 64 bytes in, 64 bytes out. */
opd_request *call_tiny(opd_client *client);

/* The same norm of a kept tensor, whose result is kept: nothing but envelopes on the wire. */
opd_request *call_resident(opd_client *client);
/* The same with its tensor, and its result, in memory that both sides map. The client was connected with shared_memory; *memory_out is the caller's to destroy. */
opd_request *call_shared(opd_client *client, opd_memory **memory_out);

/* Sends a host tensor through relu, which must not change it, and keeps the result in the session. */
opd_handle call_keep(opd_client *client, const float *data, int64_t elements);

/* Median of the kernel's own nanoseconds, by explain. */
double call_kernel_ns(opd_client *client, opd_request *request, unsigned calls);

/* The bytes that one call moves each way, as the kernel counts them on a TCP connection. */
struct floor_shape call_shape(const struct daemon *daemon, call_build_fn build, uint64_t window);

#endif
