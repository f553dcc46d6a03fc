/* The floor under every figure: a libuv server that moves as many bytes as opd does and nothing else, and its clients.
 *
 * Layer: bench; knows nothing of opd. Threads: floor_start and floor_stop by one; clients by one each.
 * Life: floor_start (forks) → floor_connect → floor_exchange or floor_pipeline… → close(fd) → floor_stop.
 * The protocol: a connection begins with a struct floor_shape; from then on every request is request_bytes and is answered by
 * reply_bytes. The server reads straight into one reused buffer and replies out of it; the replies of a loop turn leave in one
 * write. So one shape serves as echo (equal sizes), bulk upload (tiny reply) and bulk download (tiny request). Errors: a
 * benchmark can't go on without its floor; every failure ends the process with a text (report.h, bench_fail). */
#ifndef OPD_BENCH_FLOOR_H
#define OPD_BENCH_FLOOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct floor_shape {
	uint64_t request_bytes; /* at least 1 */
	uint64_t reply_bytes;   /* at least 1 */
	uint64_t window;        /* requests in flight at most */
};

struct floor_server {
	pid_t pid;
	uint16_t port;  /* TCP, loopback */
	char path[100]; /* of the Unix socket */
};

/* Listens in `directory` and on loopback, and forks the server. */
void floor_start(struct floor_server *server, const char *directory);
void floor_stop(struct floor_server *server);

/* A blocking socket (TCP_NODELAY over TCP) whose connection has `shape`. The caller closes it. */
int floor_connect(const struct floor_server *server, bool tcp, const struct floor_shape *shape);

/* Memory for transfers: zeroed, resident, in huge pages where it is large. Freed by floor_memory_free. */
void *floor_memory(size_t bytes);
void floor_memory_free(void *memory, size_t bytes);

/* One request and its reply, blocking: `request` holds request_bytes, `reply` has room for reply_bytes. */
void floor_exchange(int fd, const struct floor_shape *shape, const void *request, void *reply);

/* `total` requests with `window` of them in flight, requests and replies coalesced as far as the socket takes them; returns
 * nanoseconds. `memory` has room for window times the larger of request and reply, twice. */
uint64_t floor_pipeline(int fd, const struct floor_shape *shape, uint64_t total, void *memory);
size_t floor_pipeline_bytes(const struct floor_shape *shape);

/* Bytes a second of a memcpy between two resident buffers of `bytes`, best of `rounds`. */
double floor_memcpy_rate(size_t bytes, unsigned rounds);

#endif
