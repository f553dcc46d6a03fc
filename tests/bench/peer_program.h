/* What every peer's program shares: its command line, the blocks of calls that opd-bench asks for, and the kernels.
 *
 * A peer is a server that runs ops for others as opd does, made another way. Its program is the server and the client, as two
 * processes: `PROGRAM serve PATH` listens on a Unix socket and a free loopback port and prints that port; `PROGRAM call PATH PORT`
 * reads commands from standard input and answers each by one line; `PROGRAM check` runs both and compares every op's result with
 * its definition.
 *     connect unix|tcp                     a connection, which keeps a weight of 4096 floats; "ok"
 *     close                                ends it; "ok"
 *     block OP ELEMENTS CALLS WINDOW TIMED  runs CALLS calls; "total-ns kernel-ns p50 p90 p99" (kernel: sum of all when TIMED)
 *
 * Layer: bench; knows nothing of opd. Threads: peer_program and the functions it calls on the main one.
 * C and C++. Errors: as everywhere in the benchmarks, bench_fail. Not here: starting the programs (peers.h). */
#ifndef OPD_BENCH_PEER_PROGRAM_H
#define OPD_BENCH_PEER_PROGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PEER_EPSILON 1e-5f
#define PEER_WEIGHT_ELEMENTS 4096

/* f32 everywhere. A connection keeps one tensor, which `keep` replaces. */
typedef enum peer_op {
	PEER_NORM,  /* rms_norm of x, one row, by the kept weight */
	PEER_RELU,  /* relu of x */
	PEER_PROBE, /* x travels; the first and the last element come back */
	PEER_KEEP,  /* relu of x is kept; no result */
	PEER_FETCH, /* no x; relu of the kept tensor */
	PEER_OPS,
} peer_op;

/* A name as it travels; PEER_OPS when there is none such. */
const char *peer_op_name(peer_op op);
peer_op peer_op_of(const char *name, size_t bytes);

struct peer_call {
	peer_op op;
	const float *x;
	size_t elements; /* of x, or of the kept tensor */
	bool timed;      /* the reply says the kernel's time */
};

/* Elements that travel to the server; elements of the result. */
size_t peer_call_inputs(const struct peer_call *call);
size_t peer_call_results(peer_op op, size_t elements);

/* Runs the op's kernel; `kept` has `elements` too. PEER_KEEP and PEER_FETCH: from x or kept into y. Returns its nanoseconds, 0
 * when not timed. */
uint64_t peer_kernel(peer_op op, const float *x, const float *kept, size_t elements, float *y, bool timed);

/* A client, one at a time; its own state is the program's. */
struct peer_program_ops {
	const char *name;
	/* Never returns. Calls peer_listening once it accepts connections. */
	void (*serve)(const char *path);
	void (*connect)(const char *path, uint16_t port, bool tcp);
	void (*close)(void);
	/* One call and its reply; the kernel's nanoseconds. *result_out: borrowed until the next call. */
	uint64_t (*exchange)(const struct peer_call *call, const float **result_out);
	/* `total` calls, `window` of them in flight; returns the kernels' nanoseconds. */
	uint64_t (*pipeline)(const struct peer_call *call, uint64_t total, uint64_t window);
};

int peer_program(const struct peer_program_ops *program, int argc, char **argv);

void peer_listening(uint16_t port);

/* Zeroed memory, resident, in huge pages where it is large; freed by free(). */
void *peer_memory(size_t bytes);

#ifdef __cplusplus
}
#endif

#endif
