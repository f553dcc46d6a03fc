/* The minimal peer's client: blocking, or with a window in flight; the envelope of every request is packed, of every reply read. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "peer_minimal.pb-c.h"
#include "tests/bench/peer_minimal.h"
#include "tests/bench/report.h"

static struct {
	int fd;
	struct minimal_buffer in;
	uint64_t sent; /* ids count from 1 */
	uint64_t taken;
} client;

static void client_connect(const char *path, uint16_t port, bool tcp)
{
	struct sockaddr_un local = {.sun_family = AF_UNIX};
	struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	(void)snprintf(local.sun_path, sizeof local.sun_path, "%s", path);
	const struct sockaddr *address = tcp ? (const struct sockaddr *)&loopback : (const struct sockaddr *)&local;
	client.fd = socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (client.fd < 0 || connect(client.fd, address, tcp ? sizeof loopback : sizeof local) != 0)
		bench_fail("minimal: connect to %s, port %u: %s", path, port, strerror(errno));
	if (tcp)
		(void)setsockopt(client.fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
	minimal_buffer_init(&client.in);
	client.sent = client.taken = 0;
}

static void client_close(void)
{
	(void)close(client.fd);
	minimal_buffer_fini(&client.in);
}

/* Receives what is there, into room that the last minimal_buffer_next has made. */
static void client_receive(int flags)
{
	ssize_t received = recv(client.fd, client.in.bytes + client.in.end, client.in.room - client.in.end, flags);
	if (received < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (received <= 0)
		bench_fail("minimal: receive: %s", received == 0 ? "the server has closed" : strerror(errno));
	client.in.end += (size_t)received;
}

static size_t call_pack(const struct peer_call *call, uint64_t id, char *head, size_t *frame_bytes_out)
{
	int64_t shape[] = {1, (int64_t)call->elements};
	Opd__Bench__MinimalTensor tensor = OPD__BENCH__MINIMAL_TENSOR__INIT;
	Opd__Bench__MinimalCall message = OPD__BENCH__MINIMAL_CALL__INIT;
	const char *name = peer_op_name(call->op);
	tensor.dtype = MINIMAL_DTYPE_F32;
	tensor.n_shape = 2;
	tensor.shape = shape;
	tensor.bytes = call->elements * sizeof(float);
	message.id = id;
	message.op = (ProtobufCBinaryData){strlen(name), (uint8_t *)(uintptr_t)name};
	message.n_inputs = peer_call_inputs(call) > 0;
	message.inputs = &(Opd__Bench__MinimalTensor *){&tensor};
	message.timed = call->timed;
	struct minimal_header header = {opd__bench__minimal_call__get_packed_size(&message), peer_call_inputs(call) * sizeof(float)};
	if (!minimal_frame_bytes(&header, frame_bytes_out))
		bench_fail("minimal: a call of %zu elements", call->elements);
	memcpy(head, &header, sizeof header);
	(void)opd__bench__minimal_call__pack(&message, (uint8_t *)head + sizeof header);
	return minimal_head_bytes(&header);
}

static void parts_advance(struct iovec *parts, size_t count, size_t bytes)
{
	for (size_t i = 0; i < count; i++) {
		size_t part = bytes < parts[i].iov_len ? bytes : parts[i].iov_len;
		parts[i].iov_base = (char *)parts[i].iov_base + part;
		parts[i].iov_len -= part;
		bytes -= part;
	}
}

/* `piped`: the server may wait for its replies to be read, so they are read where it doesn't take more. `in` has room for a whole
 * window. */
static void client_submit(const struct peer_call *call, bool piped)
{
	static const char zeros[64];
	char head[MINIMAL_HEAD_BYTES] = {0};
	size_t left, payload = peer_call_inputs(call) * sizeof(float);
	size_t head_bytes = call_pack(call, ++client.sent, head, &left);
	struct iovec parts[] = {{head, head_bytes},
	                        {(void *)(uintptr_t)call->x, payload},
	                        {(void *)(uintptr_t)zeros, left - head_bytes - payload}};
	while (left > 0) {
		struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
		ssize_t sent = sendmsg(client.fd, &message, MSG_NOSIGNAL | (piped ? MSG_DONTWAIT : 0));
		if (sent < 0 && errno == EAGAIN) {
			struct pollfd poller = {.fd = client.fd, .events = POLLIN | POLLOUT};
			if (client.in.end == client.in.room)
				minimal_buffer_make_room(&client.in, 0);
			if (poll(&poller, 1, -1) > 0 && (poller.revents & ~POLLOUT) != 0)
				client_receive(MSG_DONTWAIT);
		} else if (sent < 0 && errno != EINTR) {
			bench_fail("minimal: send: %s", strerror(errno));
		} else if (sent > 0) {
			parts_advance(parts, 3, (size_t)sent);
			left -= (size_t)sent;
		}
	}
}

static uint64_t client_take(const struct peer_call *call, const float **result_out)
{
	const struct minimal_header *header;
	while ((header = minimal_buffer_next(&client.in)) == NULL)
		client_receive(0);
	Opd__Bench__MinimalReply *reply =
	    opd__bench__minimal_reply__unpack(NULL, header->envelope_bytes, (const uint8_t *)(header + 1));
	size_t results = peer_call_results(call->op, call->elements);
	if (reply == NULL || reply->id != ++client.taken || reply->status != 0 || reply->n_outputs != (results > 0) ||
	    header->payload_bytes != results * sizeof(float))
		bench_fail("minimal: reply %llu to %s isn't what was asked for", (unsigned long long)client.taken, peer_op_name(call->op));
	uint64_t kernel_ns = reply->kernel_ns;
	*result_out = (const float *)(const void *)((const char *)header + minimal_head_bytes(header));
	opd__bench__minimal_reply__free_unpacked(reply, NULL);
	return kernel_ns;
}

static uint64_t client_exchange(const struct peer_call *call, const float **result_out)
{
	client_submit(call, false);
	return client_take(call, result_out);
}

/* A whole window of replies may have to be taken in while a request waits to be sent. */
static void client_widen(const struct peer_call *call, uint64_t window)
{
	size_t reply = MINIMAL_HEAD_BYTES + minimal_padded(peer_call_results(call->op, call->elements) * sizeof(float));
	if (client.in.at != client.in.end)
		bench_fail("minimal: a reply that nobody asked for");
	if (client.in.room < (window + 1) * reply * 2) {
		minimal_buffer_fini(&client.in);
		client.in.room = (window + 1) * reply * 2;
		client.in.bytes = peer_memory(client.in.room);
	}
	client.in.at = client.in.end = 0;
}

/* Take one, submit one. */
static uint64_t client_pipeline(const struct peer_call *call, uint64_t total, uint64_t window)
{
	uint64_t kernel_ns = 0, submitted = 0;
	const float *result;
	client_widen(call, window);
	for (uint64_t taken = 0; taken < total; taken++) {
		for (; submitted < total && submitted - taken < window; submitted++)
			client_submit(call, true);
		kernel_ns += client_take(call, &result);
	}
	return kernel_ns;
}

const struct peer_program_ops minimal_client = {
    .name = "minimal",
    .connect = client_connect,
    .close = client_close,
    .exchange = client_exchange,
    .pipeline = client_pipeline,
};
