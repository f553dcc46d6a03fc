#include "tests/bench/floor_server.h"

#include <stdlib.h>
#include <string.h>
#include <uv.h>

#include "tests/bench/floor.h"
#include "tests/bench/report.h"

/* One connection. Requests gather in `in`; whole ones are answered by as many reply bytes out of the same memory, which is `out`
 * from then on until written, while further requests gather in the other half. With one request in flight nothing can arrive
 * before the reply is read: one half serves, as warm as can be. */
struct floor_conn {
	union {
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	};
	struct floor_conn *next; /* of the loop's list */
	struct floor_shape shape;
	size_t shape_bytes; /* received of it */
	char *memory;       /* two halves */
	size_t half_bytes;
	char *in;
	size_t in_bytes;
	bool writing;
	bool stopped; /* reading, because `in` is full */
	uv_write_t write;
};

struct floor_loop {
	uv_loop_t loop;
	uv_check_t check;
	uv_pipe_t unix_listener;
	uv_tcp_t tcp_listener;
	struct floor_conn *conns;
};

static void on_closed(uv_handle_t *handle)
{
	struct floor_conn *conn = handle->data;
	struct floor_loop *floor = handle->loop->data;
	struct floor_conn **link = &floor->conns;
	while (*link != conn)
		link = &(*link)->next;
	*link = conn->next;
	if (conn->memory != NULL)
		floor_memory_free(conn->memory, conn->half_bytes * 2);
	free(conn);
}

static void conn_close(struct floor_conn *conn)
{
	if (!uv_is_closing((uv_handle_t *)&conn->stream))
		uv_close((uv_handle_t *)&conn->stream, on_closed);
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer)
{
	(void)suggested;
	struct floor_conn *conn = handle->data;
	if (conn->memory == NULL)
		*buffer = uv_buf_init((char *)&conn->shape + conn->shape_bytes, (unsigned)(sizeof conn->shape - conn->shape_bytes));
	else
		*buffer = uv_buf_init(conn->in + conn->in_bytes, (unsigned)(conn->half_bytes - conn->in_bytes));
}

static void conn_flush(struct floor_conn *conn);

static void on_written(uv_write_t *request, int status)
{
	struct floor_conn *conn = request->data;
	conn->writing = false;
	if (status != 0) {
		conn_close(conn);
		return;
	}
	conn_flush(conn);
}

/* Writes at once what the socket takes and leaves the rest to the loop. */
static void conn_write(struct floor_conn *conn, char *bytes, size_t count)
{
	uv_buf_t buffer = uv_buf_init(bytes, (unsigned)count);
	int written = uv_try_write(&conn->stream, &buffer, 1);
	if (written < 0 && written != UV_EAGAIN) {
		conn_close(conn);
		return;
	}
	if (written > 0) {
		buffer.base += written;
		buffer.len -= (size_t)written;
	}
	if (buffer.len == 0)
		return;
	conn->writing = true;
	conn->write.data = conn;
	if (uv_write(&conn->write, &conn->stream, &buffer, 1, on_written) != 0)
		conn_close(conn);
}

static void on_read(uv_stream_t *stream, ssize_t count, const uv_buf_t *buffer);

static void conn_flush(struct floor_conn *conn)
{
	size_t whole = conn->memory == NULL ? 0 : conn->in_bytes / conn->shape.request_bytes;
	if (whole == 0 || conn->writing || uv_is_closing((uv_handle_t *)&conn->stream))
		return;
	char *out = conn->in;
	size_t rest = conn->in_bytes - whole * conn->shape.request_bytes;
	if (conn->shape.window > 1) {
		conn->in = out == conn->memory ? conn->memory + conn->half_bytes : conn->memory;
		memcpy(conn->in, out + conn->in_bytes - rest, rest);
	}
	conn->in_bytes = rest;
	conn_write(conn, out, whole * conn->shape.reply_bytes);
	if (conn->stopped && !uv_is_closing((uv_handle_t *)&conn->stream)) {
		conn->stopped = false;
		(void)uv_read_start(&conn->stream, on_alloc, on_read);
	}
}

/* The shape is complete: makes room for `window` requests or replies. */
static void conn_begin(struct floor_conn *conn)
{
	conn->half_bytes = floor_pipeline_bytes(&conn->shape) / 2;
	conn->memory = floor_memory(conn->half_bytes * 2);
	conn->in = conn->memory;
}

static void on_read(uv_stream_t *stream, ssize_t count, const uv_buf_t *buffer)
{
	(void)buffer;
	struct floor_conn *conn = stream->data;
	if (count < 0) {
		conn_close(conn);
		return;
	}
	if (conn->memory == NULL) {
		conn->shape_bytes += (size_t)count;
		if (conn->shape_bytes == sizeof conn->shape)
			conn_begin(conn);
		return;
	}
	conn->in_bytes += (size_t)count;
	if (conn->shape.window == 1)
		conn_flush(conn);
	if (conn->in_bytes == conn->half_bytes) {
		conn->stopped = true;
		(void)uv_read_stop(stream);
	}
}

/* After all reads of a turn: that is what coalesces replies. */
static void on_check(uv_check_t *check)
{
	struct floor_loop *floor = check->data;
	for (struct floor_conn *conn = floor->conns; conn != NULL; conn = conn->next)
		conn_flush(conn);
}

static void on_connection(uv_stream_t *listener, int status)
{
	struct floor_loop *floor = listener->loop->data;
	struct floor_conn *conn = calloc(1, sizeof *conn);
	if (status != 0 || conn == NULL)
		bench_fail("floor: connection: %s", status != 0 ? uv_strerror(status) : "out of memory");
	if (listener->type == UV_TCP) {
		(void)uv_tcp_init(listener->loop, &conn->tcp);
		(void)uv_tcp_nodelay(&conn->tcp, 1);
	} else {
		(void)uv_pipe_init(listener->loop, &conn->pipe, 0);
	}
	conn->stream.data = conn;
	conn->next = floor->conns;
	floor->conns = conn;
	if (uv_accept(listener, &conn->stream) != 0 || uv_read_start(&conn->stream, on_alloc, on_read) != 0)
		conn_close(conn);
	if (listener->type == UV_TCP)
		(void)uv_tcp_nodelay(&conn->tcp, 1);
}

void floor_serve(int unix_listener, int tcp_listener)
{
	static struct floor_loop floor;
	if (uv_loop_init(&floor.loop) != 0)
		bench_fail("floor: uv_loop_init failed");
	floor.loop.data = &floor;
	floor.check.data = &floor;
	if (uv_check_init(&floor.loop, &floor.check) != 0 || uv_check_start(&floor.check, on_check) != 0 ||
	    uv_pipe_init(&floor.loop, &floor.unix_listener, 0) != 0 || uv_pipe_open(&floor.unix_listener, unix_listener) != 0 ||
	    uv_tcp_init(&floor.loop, &floor.tcp_listener) != 0 || uv_tcp_open(&floor.tcp_listener, tcp_listener) != 0 ||
	    uv_listen((uv_stream_t *)&floor.unix_listener, 128, on_connection) != 0 ||
	    uv_listen((uv_stream_t *)&floor.tcp_listener, 128, on_connection) != 0)
		bench_fail("floor: the server can't listen");
	(void)uv_run(&floor.loop, UV_RUN_DEFAULT);
	exit(0);
}
