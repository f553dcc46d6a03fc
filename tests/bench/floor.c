#include "tests/bench/floor.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/bench/floor_server.h"
#include "tests/bench/report.h"
#include "tests/lib/clock.h"

#define HUGE_PAGE_BYTES ((size_t)2 << 20)

/* ---- Memory ---- */

void *floor_memory(size_t bytes)
{
	void *memory = NULL;
	if (posix_memalign(&memory, bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 4096, bytes == 0 ? 1 : bytes) != 0)
		bench_fail("floor: no memory for %zu bytes", bytes);
	if (bytes >= HUGE_PAGE_BYTES)
		(void)madvise(memory, bytes, MADV_HUGEPAGE);
	memset(memory, 0, bytes);
	return memory;
}

void floor_memory_free(void *memory, size_t bytes)
{
	(void)bytes;
	free(memory);
}

double floor_memcpy_rate(size_t bytes, unsigned rounds)
{
	char *from = floor_memory(bytes), *to = floor_memory(bytes);
	double best = 0;
	for (unsigned i = 0; i < rounds; i++) {
		uint64_t begin = clock_ns();
		memcpy(to, from, bytes);
		__asm__ volatile("" : : "r"(to) : "memory"); /* the copy is wanted */
		double rate = (double)bytes * 1e9 / (double)(clock_ns() - begin);
		if (rate > best)
			best = rate;
	}
	floor_memory_free(from, bytes);
	floor_memory_free(to, bytes);
	return best;
}

/* ---- The server's process ---- */

static int listen_unix(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	(void)snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 128) != 0)
		bench_fail("floor: %s: %s", path, strerror(errno));
	return fd;
}

static int listen_tcp(uint16_t *port_out)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t bytes = sizeof address;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 128) != 0 ||
	    getsockname(fd, (struct sockaddr *)&address, &bytes) != 0)
		bench_fail("floor: loopback: %s", strerror(errno));
	*port_out = ntohs(address.sin_port);
	return fd;
}

void floor_start(struct floor_server *server, const char *directory)
{
	if ((size_t)snprintf(server->path, sizeof server->path, "%s/floor.sock", directory) >= sizeof server->path)
		bench_fail("floor: %s: the path is too long for a Unix socket", directory);
	int unix_listener = listen_unix(server->path);
	int tcp_listener = listen_tcp(&server->port);
	(void)fflush(stdout);
	server->pid = fork();
	if (server->pid < 0)
		bench_fail("floor: fork: %s", strerror(errno));
	if (server->pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a benchmark that was interrupted leaves nothing behind */
		floor_serve(unix_listener, tcp_listener);
	}
	(void)close(unix_listener);
	(void)close(tcp_listener);
}

void floor_stop(struct floor_server *server)
{
	(void)kill(server->pid, SIGKILL);
	(void)waitpid(server->pid, NULL, 0);
	(void)unlink(server->path);
}

/* ---- Clients ---- */

static void send_all(int fd, const void *bytes, size_t count)
{
	for (const char *at = bytes; count > 0;) {
		ssize_t sent = send(fd, at, count, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			bench_fail("floor: send: %s", strerror(errno));
		at += sent;
		count -= (size_t)sent;
	}
}

static void receive_all(int fd, void *bytes, size_t count)
{
	for (char *at = bytes; count > 0;) {
		ssize_t received = recv(fd, at, count, 0);
		if (received < 0 && errno == EINTR)
			continue;
		if (received <= 0)
			bench_fail("floor: receive: %s", received == 0 ? "the server has closed" : strerror(errno));
		at += received;
		count -= (size_t)received;
	}
}

static int connect_tcp(uint16_t port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
		bench_fail("floor: connect to port %u: %s", port, strerror(errno));
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
	return fd;
}

static int connect_unix(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	(void)snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
		bench_fail("floor: connect to %s: %s", path, strerror(errno));
	return fd;
}

int floor_connect(const struct floor_server *server, bool tcp, const struct floor_shape *shape)
{
	int fd = tcp ? connect_tcp(server->port) : connect_unix(server->path);
	send_all(fd, shape, sizeof *shape);
	return fd;
}

void floor_exchange(int fd, const struct floor_shape *shape, const void *request, void *reply)
{
	send_all(fd, request, shape->request_bytes);
	receive_all(fd, reply, shape->reply_bytes);
}

size_t floor_pipeline_bytes(const struct floor_shape *shape)
{
	uint64_t larger = shape->request_bytes > shape->reply_bytes ? shape->request_bytes : shape->reply_bytes;
	return (size_t)(2 * shape->window * larger);
}

/* Bytes sent and received so far, of a run of `total` requests. */
struct pipeline {
	int fd;
	const struct floor_shape *shape;
	uint64_t total;
	uint64_t sent;
	uint64_t received;
	char *out;
	char *in;
	size_t room; /* of out and of in */
};

/* Bytes that the window lets out now. */
static uint64_t pipeline_due(const struct pipeline *p)
{
	uint64_t allowed = p->received / p->shape->reply_bytes + p->shape->window;
	return (allowed < p->total ? allowed : p->total) * p->shape->request_bytes - p->sent;
}

/* Sends what is due as far as the socket takes it; true when nothing is left over. */
static bool pipeline_send(struct pipeline *p)
{
	for (uint64_t due = pipeline_due(p); due > 0; due = pipeline_due(p)) {
		ssize_t sent = send(p->fd, p->out, due < p->room ? due : p->room, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0 && errno == EAGAIN)
			return false;
		if (sent < 0)
			bench_fail("floor: send: %s", strerror(errno));
		p->sent += (uint64_t)sent;
	}
	return true;
}

static void pipeline_receive(struct pipeline *p, int flags)
{
	ssize_t received = recv(p->fd, p->in, p->room, flags);
	if (received < 0 && errno == EAGAIN)
		return;
	if (received <= 0)
		bench_fail("floor: receive: %s", received == 0 ? "the server has closed" : strerror(errno));
	p->received += (uint64_t)received;
}

uint64_t floor_pipeline(int fd, const struct floor_shape *shape, uint64_t total, void *memory)
{
	size_t room = floor_pipeline_bytes(shape) / 2;
	struct pipeline p = {.fd = fd, .shape = shape, .total = total, .out = memory, .in = (char *)memory + room, .room = room};
	uint64_t begin = clock_ns();
	while (p.received < total * shape->reply_bytes) {
		if (pipeline_send(&p)) {
			pipeline_receive(&p, 0); /* nothing to send before a reply is here */
			continue;
		}
		struct pollfd poller = {.fd = fd, .events = POLLIN | POLLOUT};
		if (poll(&poller, 1, -1) > 0 && (poller.revents & ~POLLOUT) != 0)
			pipeline_receive(&p, MSG_DONTWAIT);
	}
	return clock_ns() - begin;
}
