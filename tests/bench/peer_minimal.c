/* A minimal op server: one libuv loop, a protobuf-c envelope, the kernel, one write a reply. No registry, sessions, accounting,
 * limits, priorities or errors: whatever opd takes longer than this is the price of what it does besides. */
#include "tests/bench/peer_minimal.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <uv.h>

#include "peer_minimal.pb-c.h"
#include "tests/bench/report.h"

/* Requests are read where they are received; a reply is written from `out`, and nothing is read while one is being written. */
struct minimal_conn {
	union {
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	};
	struct minimal_buffer in;
	char *out; /* a payload begins at MINIMAL_HEAD_BYTES */
	size_t out_room;
	float *kept;
	size_t kept_elements;
	bool writing;
	uv_write_t write;
};

static void on_closed(uv_handle_t *handle)
{
	struct minimal_conn *conn = handle->data;
	minimal_buffer_fini(&conn->in);
	free(conn->out);
	free(conn->kept);
	free(conn);
}

static void conn_close(struct minimal_conn *conn)
{
	if (!uv_is_closing((uv_handle_t *)&conn->stream))
		uv_close((uv_handle_t *)&conn->stream, on_closed);
}

/* ---- Replies ---- */

static void conn_work(struct minimal_conn *conn);
static void conn_read(struct minimal_conn *conn);

static void on_written(uv_write_t *request, int status)
{
	struct minimal_conn *conn = request->data;
	conn->writing = false;
	if (status != 0) {
		conn_close(conn);
		return;
	}
	conn_work(conn);
	if (!conn->writing)
		conn_read(conn);
}

static void conn_write(struct minimal_conn *conn, char *bytes, size_t count)
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
	(void)uv_read_stop(&conn->stream);
	if (uv_write(&conn->write, &conn->stream, &buffer, 1, on_written) != 0)
		conn_close(conn);
}

/* Envelope and header go right before the payload, so that all of it is one piece. */
static void conn_reply(struct minimal_conn *conn, uint64_t id, size_t elements, uint64_t kernel_ns)
{
	int64_t shape[] = {(int64_t)elements};
	Opd__Bench__MinimalTensor tensor = OPD__BENCH__MINIMAL_TENSOR__INIT;
	Opd__Bench__MinimalReply reply = OPD__BENCH__MINIMAL_REPLY__INIT;
	tensor.dtype = MINIMAL_DTYPE_F32;
	tensor.n_shape = 1;
	tensor.shape = shape;
	tensor.bytes = elements * sizeof(float);
	reply.id = id;
	reply.n_outputs = elements > 0;
	reply.outputs = &(Opd__Bench__MinimalTensor *){&tensor};
	reply.kernel_ns = kernel_ns;
	struct minimal_header header = {opd__bench__minimal_reply__get_packed_size(&reply), tensor.bytes};
	size_t bytes;
	if (!minimal_frame_bytes(&header, &bytes))
		bench_fail("minimal: a reply of %llu envelope bytes", (unsigned long long)header.envelope_bytes);
	char *begin = conn->out + MINIMAL_HEAD_BYTES - minimal_head_bytes(&header);
	memcpy(begin, &header, sizeof header);
	(void)opd__bench__minimal_reply__pack(&reply, (uint8_t *)begin + sizeof header);
	conn_write(conn, begin, bytes);
}

/* ---- Requests ---- */

static void conn_reserve(struct minimal_conn *conn, size_t payload_bytes)
{
	size_t bytes = MINIMAL_HEAD_BYTES + minimal_padded(payload_bytes);
	if (bytes <= conn->out_room)
		return;
	free(conn->out);
	conn->out = peer_memory(bytes);
	conn->out_room = bytes;
}

/* The memory of the last one serves again where it is as large. */
static float *conn_kept(struct minimal_conn *conn, size_t elements)
{
	if (elements != conn->kept_elements) {
		free(conn->kept);
		conn->kept = peer_memory(elements * sizeof *conn->kept);
		conn->kept_elements = elements;
	}
	return conn->kept;
}

static void conn_run(struct minimal_conn *conn, const Opd__Bench__MinimalCall *call, const char *payload, size_t payload_bytes)
{
	peer_op op = peer_op_of((const char *)call->op.data, call->op.len);
	size_t elements = conn->kept_elements;
	const float *x = NULL;
	if (call->n_inputs == 1) {
		const Opd__Bench__MinimalTensor *input = call->inputs[0];
		elements = input->bytes / sizeof(float);
		if (input->offset % 64 != 0 || input->offset > payload_bytes || input->bytes > payload_bytes - input->offset)
			bench_fail("minimal: an operand outside of its payload");
		x = (const float *)(const void *)(payload + input->offset);
	}
	if (op == PEER_OPS || (x == NULL) != (op == PEER_FETCH) || (op == PEER_NORM && elements != conn->kept_elements) || elements == 0)
		bench_fail("minimal: a call that makes no sense");
	size_t results = peer_call_results(op, elements);
	conn_reserve(conn, results * sizeof(float));
	float *y = op == PEER_KEEP ? conn_kept(conn, elements) : (float *)(void *)(conn->out + MINIMAL_HEAD_BYTES);
	uint64_t kernel_ns = peer_kernel(op, x, conn->kept, elements, y, call->timed != 0);
	conn_reply(conn, call->id, results, kernel_ns);
}

static void conn_work(struct minimal_conn *conn)
{
	const struct minimal_header *header;
	while (!conn->writing && !uv_is_closing((uv_handle_t *)&conn->stream) && (header = minimal_buffer_next(&conn->in)) != NULL) {
		Opd__Bench__MinimalCall *call =
		    opd__bench__minimal_call__unpack(NULL, header->envelope_bytes, (const uint8_t *)(header + 1));
		if (call == NULL)
			bench_fail("minimal: an envelope that is none");
		conn_run(conn, call, (const char *)header + minimal_head_bytes(header), header->payload_bytes);
		opd__bench__minimal_call__free_unpacked(call, NULL);
	}
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer)
{
	(void)suggested;
	struct minimal_conn *conn = handle->data;
	*buffer = uv_buf_init(conn->in.bytes + conn->in.end, (unsigned)(conn->in.room - conn->in.end));
}

static void on_read(uv_stream_t *stream, ssize_t count, const uv_buf_t *buffer)
{
	(void)buffer;
	struct minimal_conn *conn = stream->data;
	if (count < 0) {
		conn_close(conn);
		return;
	}
	conn->in.end += (size_t)count;
	conn_work(conn);
}

static void conn_read(struct minimal_conn *conn)
{
	if (!uv_is_closing((uv_handle_t *)&conn->stream) && uv_read_start(&conn->stream, on_alloc, on_read) != 0)
		conn_close(conn);
}

/* ---- Listening ---- */

static void on_connection(uv_stream_t *listener, int status)
{
	struct minimal_conn *conn = calloc(1, sizeof *conn);
	if (status != 0 || conn == NULL)
		bench_fail("minimal: connection: %s", status != 0 ? uv_strerror(status) : "out of memory");
	minimal_buffer_init(&conn->in);
	conn_reserve(conn, MINIMAL_BUFFER_BYTES);
	if (listener->type == UV_TCP)
		(void)uv_tcp_init(listener->loop, &conn->tcp);
	else
		(void)uv_pipe_init(listener->loop, &conn->pipe, 0);
	conn->stream.data = conn;
	if (uv_accept(listener, &conn->stream) != 0)
		conn_close(conn);
	else if (listener->type == UV_TCP)
		(void)uv_tcp_nodelay(&conn->tcp, 1);
	conn_read(conn);
}

static void minimal_serve(const char *path)
{
	static uv_loop_t loop;
	static uv_pipe_t pipe;
	static uv_tcp_t tcp;
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int bytes = sizeof address;
	if (uv_loop_init(&loop) != 0 || uv_pipe_init(&loop, &pipe, 0) != 0 || uv_pipe_bind(&pipe, path) != 0 ||
	    uv_tcp_init(&loop, &tcp) != 0 || uv_tcp_bind(&tcp, (struct sockaddr *)&address, 0) != 0 ||
	    uv_listen((uv_stream_t *)&pipe, 128, on_connection) != 0 || uv_listen((uv_stream_t *)&tcp, 128, on_connection) != 0 ||
	    uv_tcp_getsockname(&tcp, (struct sockaddr *)&address, &bytes) != 0)
		bench_fail("minimal: %s: the server can't listen", path);
	peer_listening(ntohs(address.sin_port));
	(void)uv_run(&loop, UV_RUN_DEFAULT);
	exit(0);
}

int main(int argc, char **argv)
{
	struct peer_program_ops program = minimal_client;
	program.serve = minimal_serve;
	return peer_program(&program, argc, argv);
}
