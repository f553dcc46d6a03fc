/* The floor under a remote op on a GPU: plain blocking sockets, pinned memory, no protobuf, one request in flight; and what the device does when nobody is remote.
 *
 * Layer: bench; knows nothing of opd but the kernel, which is the module's own, so that only the way there differs. Threads: remote_floor_start, _stop by one; clients by one each.
 * Life: remote_floor_start (forks; the child opens the module) → remote_connect → remote_exchange… → close → remote_floor_stop.
 * The protocol: a connection begins with a struct remote_ask; from then on each request is request_bytes and is answered by reply_bytes. Every connection has a thread of its own
 * in the server, so that those that wait cost nothing while one works. Errors: bench_fail, in the server too (the connection then ends). */
#ifndef OPD_BENCH_GPU_REMOTE_FLOOR_H
#define OPD_BENCH_GPU_REMOTE_FLOOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { REMOTE_HIDDEN = 4096, REMOTE_CHAIN = 100 };

enum remote_mode {
	REMOTE_ECHO,   /* no device: the bytes go in and come out */
	REMOTE_PINNED, /* rms_norm of bf16 rows: received into pinned memory, copied in, the kernel, copied out, synchronised, sent */
	REMOTE_MAPPED, /* the same, and the kernel reads and writes the pinned memory itself */
	REMOTE_STORE,  /* an upload: received into two pinned pieces in turn, each copied in while the other is received; then a byte */
	REMOTE_STEP,   /* `rows` kernels over 16 rows that lie there, each of what the one before it gave, captured if there are several: launched and synchronised between request and reply */
	REMOTE_BARE,   /* a byte in, a struct remote_bare out */
};

struct remote_ask {
	uint32_t mode;
	uint32_t rows; /* of REMOTE_HIDDEN bf16; of the modes that run the kernel. Of a step: its kernels, 1 to REMOTE_CHAIN */
	uint64_t request_bytes;
	uint64_t reply_bytes;
};

/* What the device takes with nothing before or behind it: of the kernel over 16 rows that lie there. */
struct remote_bare {
	double launch_us;   /* one launch and its synchronisation */
	double launch_rate; /* launches a second, enqueued without waiting */
	double chain_us;    /* REMOTE_CHAIN of them, each of what the one before it gave (the very chain of opd's graph), captured in one graph: between its events */
	double link_in;     /* bytes a second of a copy from pinned memory of 256 MiB, and back */
	double link_out;
};

struct remote_floor {
	pid_t pid;
	uint16_t port;
	char path[100];
};

void remote_floor_start(struct remote_floor *floor, const char *directory, const char *module);
void remote_floor_stop(struct remote_floor *floor);
/* A blocking socket; the caller closes it. */
int remote_connect(const struct remote_floor *floor, bool tcp, const struct remote_ask *ask);
void remote_exchange(int fd, const struct remote_ask *ask, const void *request, void *reply);

/* The rows' weight, as both sides make it. */
void remote_weight(uint16_t weight[REMOTE_HIDDEN]);

#endif
