/* The floor of tests/soak --storm: a libuv server that sends back what it reads and nothing else, and a client that measures it.
 *     opd-bench-storm-peer serve PATH             until it is killed; says "ready"
 *     opd-bench-storm-peer p99 PATH SECONDS BYTES round trips of so many bytes, one at a time: the p99 in nanoseconds */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <uv.h>

#include "tests/lib/clock.h"
#include "tests/lib/histogram.h"

#define WARMUP_NS 100000000u

static char stage[64 << 10];

static void need(bool good, const char *what)
{
	if (good)
		return;
	(void)fprintf(stderr, "opd-bench-storm-peer: %s\n", what);
	exit(1);
}

/* ---- Serving ---- */

static void on_closed(uv_handle_t *handle)
{
	free(handle);
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
	(void)handle, (void)suggested;
	*buf = uv_buf_init(stage, sizeof stage);
}

static void on_read(uv_stream_t *stream, ssize_t got, const uv_buf_t *buf)
{
	const uv_buf_t back = uv_buf_init(buf->base, got < 0 ? 0 : (unsigned)got);
	if (got < 0 || (got > 0 && uv_try_write(stream, &back, 1) != got))
		uv_close((uv_handle_t *)stream, on_closed);
}

static void on_connection(uv_stream_t *listener, int status)
{
	uv_pipe_t *pipe = malloc(sizeof *pipe);
	need(status == 0 && pipe != NULL && uv_pipe_init(listener->loop, pipe, 0) == 0 && uv_accept(listener, (uv_stream_t *)pipe) == 0, "accept");
	(void)uv_read_start((uv_stream_t *)pipe, on_alloc, on_read);
}

static int serve(const char *path)
{
	uv_pipe_t listener;
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	need(uv_pipe_init(uv_default_loop(), &listener, 0) == 0 && uv_pipe_bind(&listener, path) == 0 && uv_listen((uv_stream_t *)&listener, 1024, on_connection) == 0, "can't listen");
	(void)puts("ready");
	(void)fflush(stdout);
	return uv_run(uv_default_loop(), UV_RUN_DEFAULT);
}

/* ---- Measuring ---- */

static int connect_to(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	(void)snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	need(fd >= 0 && connect(fd, (const struct sockaddr *)&address, sizeof address) == 0, "can't connect");
	return fd;
}

static void call(int fd, char *bytes, size_t count)
{
	need(write(fd, bytes, count) == (ssize_t)count, "write");
	for (size_t at = 0; at < count;) {
		const ssize_t got = read(fd, bytes + at, count - at);
		need(got > 0, "read");
		at += (size_t)got;
	}
}

static int measure(const char *path, double seconds, size_t count)
{
	static struct histogram times;
	char *bytes = calloc(1, count);
	const int fd = connect_to(path);
	const uint64_t from_ns = clock_ns() + WARMUP_NS, until_ns = from_ns + (uint64_t)(seconds * 1e9);
	need(bytes != NULL && count <= sizeof stage, "too many bytes");
	for (uint64_t began_ns = clock_ns(); began_ns < until_ns; began_ns = clock_ns()) {
		call(fd, bytes, count);
		if (began_ns >= from_ns)
			histogram_add(&times, clock_ns() - began_ns);
	}
	(void)printf("%llu\n", (unsigned long long)histogram_quantile(&times, 0.99));
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "serve") == 0)
		return serve(argv[2]);
	need(argc == 5 && strcmp(argv[1], "p99") == 0, "usage: opd-bench-storm-peer serve PATH | p99 PATH SECONDS BYTES");
	return measure(argv[2], strtod(argv[3], NULL), strtoul(argv[4], NULL, 10));
}
