#include "tests/lib/peer.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PEER_PATIENCE_MS 20000 /* a stuck test ends by itself */

bool peer_check(struct peer *peer, bool ok, const char *what, int line)
{
	if (!ok && !peer->failed) {
		peer->failed = true;
		(void)snprintf(peer->failure, sizeof peer->failure, "script, line %d: %s", line, what);
	}
	return ok;
}

void peer_stage_set(struct peer *peer, int stage)
{
	atomic_store(&peer->stage, stage);
}

void peer_stage_wait(struct peer *peer, int stage)
{
	for (int i = 0; i < PEER_PATIENCE_MS * 10 && atomic_load(&peer->stage) < stage; i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	(void)peer_check(peer, atomic_load(&peer->stage) >= stage, "a stage was reached in time", stage);
}

/* ---- Life ---- */

static int listen_unix(struct peer *peer)
{
	static _Atomic int number;
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	(void)snprintf(peer->path, sizeof peer->path, "%s/opd-test-%d-%d.sock", getenv("TMPDIR") == NULL ? "/tmp" : getenv("TMPDIR"),
	               (int)getpid(), atomic_fetch_add(&number, 1));
	(void)snprintf(name.sun_path, sizeof name.sun_path, "%.100s", peer->path);
	(void)snprintf(peer->address, sizeof peer->address, "unix:%s", peer->path);
	(void)unlink(peer->path);
	const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	return bind(fd, (const struct sockaddr *)&name, sizeof name) == 0 ? fd : -1;
}

static int listen_tcp4(struct peer *peer)
{
	struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t bytes = sizeof name;
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(fd, (const struct sockaddr *)&name, bytes) != 0 || getsockname(fd, (struct sockaddr *)&name, &bytes) != 0)
		return -1;
	(void)snprintf(peer->address, sizeof peer->address, "tcp://127.0.0.1:%u", ntohs(name.sin_port));
	return fd;
}

static int listen_tcp6(struct peer *peer)
{
	struct sockaddr_in6 name = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	socklen_t bytes = sizeof name;
	const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(fd, (const struct sockaddr *)&name, bytes) != 0 || getsockname(fd, (struct sockaddr *)&name, &bytes) != 0)
		return -1;
	(void)snprintf(peer->address, sizeof peer->address, "tcp://[::1]:%u", ntohs(name.sin6_port));
	return fd;
}

static void *peer_main(void *argument)
{
	struct peer *peer = argument;
	struct pollfd entry = {.fd = peer->listener, .events = POLLIN};
	peer->fd = poll(&entry, 1, PEER_PATIENCE_MS) == 1 ? accept(peer->listener, NULL, NULL) : -1;
	if (peer->fd < 0)
		return NULL; /* tests that never connect */
	const struct timeval patience = {.tv_sec = PEER_PATIENCE_MS / 1000};
	(void)setsockopt(peer->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	(void)setsockopt(peer->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	const int on = 1;
	(void)setsockopt(peer->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	peer->script(peer, peer->argument);
	(void)close(peer->fd);
	return NULL;
}

void peer_start(struct peer *peer, peer_kind kind, peer_fn *script, void *argument)
{
	*peer = (struct peer){.script = script, .argument = argument, .fd = -1};
	peer->listener = kind == PEER_UNIX ? listen_unix(peer) : kind == PEER_TCP4 ? listen_tcp4(peer) : listen_tcp6(peer);
	if (peer->listener < 0 || listen(peer->listener, 4) != 0 || pthread_create(&peer->thread, NULL, peer_main, peer) != 0) {
		perror("peer_start");
		abort();
	}
}

bool peer_join(struct peer *peer)
{
	(void)pthread_join(peer->thread, NULL);
	(void)close(peer->listener);
	if (peer->path[0] != '\0')
		(void)unlink(peer->path);
	if (peer->failed)
		(void)fprintf(stderr, "%s\n", peer->failure);
	return !peer->failed;
}

/* ---- Reading ---- */

static bool read_all(struct peer *peer, void *to, size_t bytes)
{
	uint8_t *at = to;
	while (bytes != 0) {
		const ssize_t got = recv(peer->fd, at, bytes, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		at += got;
		bytes -= (size_t)got;
	}
	return true;
}

void peer_wait_readable(struct peer *peer)
{
	uint8_t byte;
	(void)PEER_CHECK(peer, recv(peer->fd, &byte, 1, MSG_PEEK) == 1);
}

bool peer_read(struct peer *peer, struct peer_frame *frame)
{
	uint8_t header[FRAME_HEADER_BYTES];
	*frame = (struct peer_frame){0};
	if (!read_all(peer, header, sizeof header))
		return false;
	opd_error error;
	if (frame_decode(header, &frame->header, &error) != OPD_OK)
		return PEER_CHECK(peer, !"the client sent a bad frame header");
	frame->envelope = malloc(frame->header.envelope_bytes + 1);
	const bool here = (frame->header.flags & FRAME_CHUNKED) == 0;
	frame->payload = malloc(here ? frame->header.payload_bytes + 1 : 1);
	if (!read_all(peer, frame->envelope, frame->header.envelope_bytes) ||
	    (here && !read_all(peer, frame->payload, frame->header.payload_bytes))) {
		peer_frame_free(frame);
		return false;
	}
	return true;
}

void peer_frame_free(struct peer_frame *frame)
{
	free(frame->envelope);
	free(frame->payload);
	*frame = (struct peer_frame){0};
}

static bool read_chunks(struct peer *peer, struct peer_frame *frame)
{
	const uint64_t total = frame->header.payload_bytes;
	free(frame->payload);
	frame->payload = malloc(total + 1);
	for (uint64_t have = 0; have < total;) {
		struct peer_frame data;
		if (!peer_read(peer, &data))
			return false;
		const uint64_t bytes = data.header.payload_bytes;
		const bool good =
		    PEER_CHECK(peer, data.header.type == FRAME_DATA && data.header.request_id == frame->header.request_id) &&
		    PEER_CHECK(peer, data.header.envelope_bytes == 8 && frame_load_u64(data.envelope) == have) &&
		    PEER_CHECK(peer, bytes <= peer->chunk_bytes && bytes <= total - have);
		if (good)
			memcpy(frame->payload + have, data.payload, bytes);
		have += bytes;
		peer_frame_free(&data);
		if (!good)
			return false;
	}
	return true;
}

bool peer_read_request(struct peer *peer, struct arena *arena, struct peer_frame *frame, struct msg_request *request)
{
	if (!peer_read(peer, frame))
		return false;
	opd_error error;
	bool good =
	    PEER_CHECK(peer, frame->header.type == FRAME_REQUEST) &&
	    PEER_CHECK(peer, codec_decode_request(arena, frame->envelope, frame->header.envelope_bytes, request, &error) == OPD_OK);
	if (good && (frame->header.flags & FRAME_CHUNKED) != 0)
		good = read_chunks(peer, frame);
	if (!good)
		peer_frame_free(frame);
	return good;
}

/* ---- Writing ---- */

/* Until the client has read all that was sent. */
static void wait_read(struct peer *peer)
{
	int left = 1;
	for (int i = 0; i < 20000000 && ioctl(peer->fd, SIOCOUTQ, &left) == 0 && left > 0; i++)
		(void)sched_yield();
}

bool peer_send(struct peer *peer, const void *data, size_t bytes)
{
	const uint8_t *at = data;
	while (bytes != 0) {
		const size_t some = peer->split != 0 && peer->split < bytes ? peer->split : bytes;
		const ssize_t sent = send(peer->fd, at, some, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			return false;
		at += sent;
		bytes -= (size_t)sent;
		if (peer->split != 0)
			wait_read(peer);
	}
	return true;
}

bool peer_send_frame(struct peer *peer, frame_type type, uint16_t flags, uint64_t id, const void *envelope,
                     uint32_t envelope_bytes, const void *payload, uint64_t payload_bytes)
{
	const bool here = (flags & FRAME_CHUNKED) == 0;
	const size_t bytes = FRAME_HEADER_BYTES + envelope_bytes + (here && payload != NULL ? payload_bytes : 0);
	uint8_t *frame = malloc(bytes);
	const struct frame_header header = {.version = FRAME_VERSION,
	                                    .type = (uint8_t)type,
	                                    .flags = flags,
	                                    .request_id = id,
	                                    .envelope_bytes = envelope_bytes,
	                                    .payload_bytes = payload_bytes};
	frame_encode(&header, frame);
	if (envelope_bytes != 0)
		memcpy(frame + FRAME_HEADER_BYTES, envelope, envelope_bytes);
	if (bytes > FRAME_HEADER_BYTES + envelope_bytes)
		memcpy(frame + FRAME_HEADER_BYTES + envelope_bytes, payload, payload_bytes);
	const bool sent = peer_send(peer, frame, bytes);
	free(frame);
	return sent;
}

uint8_t *peer_encode_reply(const struct msg_reply *reply, uint64_t id, uint16_t flags, const void *payload,
                           uint64_t payload_bytes, size_t *bytes_out)
{
	struct arena arena;
	struct codec_buffer buffer;
	opd_error error;
	arena_init(&arena, (size_t)64 << 20);
	if (codec_encode_reply(&arena, reply, &buffer, &error) != OPD_OK) {
		(void)fprintf(stderr, "peer: %s\n", error.text);
		abort();
	}
	const struct frame_header header = {.version = FRAME_VERSION,
	                                    .type = FRAME_REPLY,
	                                    .flags = flags,
	                                    .request_id = id,
	                                    .envelope_bytes = (uint32_t)buffer.envelope_bytes,
	                                    .payload_bytes = payload_bytes};
	frame_encode(&header, buffer.frame);
	const size_t head = FRAME_HEADER_BYTES + buffer.envelope_bytes;
	const size_t rest = payload != NULL && (flags & FRAME_CHUNKED) == 0 ? payload_bytes : 0;
	uint8_t *frame = malloc(head + rest);
	memcpy(frame, buffer.frame, head);
	if (rest != 0)
		memcpy(frame + head, payload, rest);
	arena_fini(&arena);
	*bytes_out = head + rest;
	return frame;
}

static bool send_reply(struct peer *peer, uint64_t id, const struct msg_reply *reply, uint16_t flags, const void *payload,
                       uint64_t payload_bytes)
{
	size_t bytes;
	uint8_t *frame = peer_encode_reply(reply, id, flags, payload, payload_bytes, &bytes);
	const bool sent = peer_send(peer, frame, bytes);
	free(frame);
	return sent;
}

bool peer_reply(struct peer *peer, uint64_t id, const struct msg_reply *reply, const void *payload, uint64_t payload_bytes)
{
	return send_reply(peer, id, reply, 0, payload, payload_bytes);
}

bool peer_send_data(struct peer *peer, uint64_t id, uint64_t offset, const void *data, uint64_t bytes)
{
	uint8_t envelope[FRAME_DATA_OFFSET_BYTES];
	frame_store_u64(envelope, offset);
	return peer_send_frame(peer, FRAME_DATA, 0, id, envelope, sizeof envelope, data, bytes);
}

bool peer_reply_chunked(struct peer *peer, uint64_t id, const struct msg_reply *reply, const void *payload,
                        uint64_t payload_bytes, uint64_t chunk)
{
	bool sent = send_reply(peer, id, reply, FRAME_CHUNKED, NULL, payload_bytes);
	for (uint64_t at = 0; sent && at < payload_bytes; at += chunk) {
		const uint64_t some = payload_bytes - at < chunk ? payload_bytes - at : chunk;
		sent = peer_send_data(peer, id, at, (const uint8_t *)payload + at, some);
	}
	return sent;
}

bool peer_reply_status(struct peer *peer, uint64_t id, opd_status status, const char *message)
{
	const struct msg_reply reply = {.status = status, .message = msg_text(message)};
	return peer_reply(peer, id, &reply, NULL, 0);
}

void peer_hello(struct peer *peer, const struct msg_hello_reply *answer)
{
	struct msg_hello_reply reply = {
	    .version = FRAME_VERSION, .server = msg_text("peer 1"), .tenant = msg_text("tests"), .session = 7, .admin = true};
	struct peer_frame frame;
	struct arena arena;
	struct msg_hello hello;
	struct codec_buffer buffer;
	opd_error error;
	arena_init(&arena, 1 << 20);
	if (answer != NULL)
		reply = *answer;
	if (PEER_CHECK(peer, peer_read(peer, &frame)) && PEER_CHECK(peer, frame.header.type == FRAME_HELLO) &&
	    PEER_CHECK(peer, codec_decode_hello(&arena, frame.envelope, frame.header.envelope_bytes, &hello, &error) == OPD_OK)) {
		if (reply.chunk_bytes == 0 && !hello.no_chunks)
			reply.chunk_bytes = hello.chunk_bytes == 0 ? 1 << 20 : hello.chunk_bytes;
		peer->chunk_bytes = reply.chunk_bytes;
		if (PEER_CHECK(peer, codec_encode_hello_reply(&arena, &reply, &buffer, &error) == OPD_OK))
			(void)peer_send_frame(peer, FRAME_HELLO_REPLY, 0, 0, buffer.frame + FRAME_HEADER_BYTES,
			                      (uint32_t)buffer.envelope_bytes, NULL, 0);
	}
	peer_frame_free(&frame);
	arena_fini(&arena);
}

/* ---- Canned answers ---- */

struct msg_reply peer_vector(struct msg_result *result, int64_t elements)
{
	*result = (struct msg_result){.tensor = {.dtype = OPD_f32,
	                                         .rank = 1,
	                                         .shape = {elements},
	                                         .source = MSG_SOURCE_PAYLOAD,
	                                         .payload = {.offset = 0, .bytes = (uint64_t)elements * 4}}};
	return (struct msg_reply){.kind = MSG_REPLY_RUN,
	                          .run = {.provider = msg_text("native"), .output_count = 1, .outputs = result}};
}

static bool echo_one(struct peer *peer, const struct peer_frame *frame, const struct msg_request *request)
{
	const uint64_t id = frame->header.request_id;
	if (request->kind != MSG_REQUEST_RUN || request->run.arg_count == 0 || request->run.args[0].kind != MSG_ARG_TENSOR) {
		const struct msg_reply empty = {.kind = MSG_REPLY_EMPTY};
		return peer_reply(peer, id, &empty, NULL, 0);
	}
	struct msg_result result = {.tensor = *request->run.args[0].tensor};
	const struct msg_reply reply = {.kind = MSG_REPLY_RUN,
	                                .run = {.provider = msg_text("echo"), .output_count = 1, .outputs = &result}};
	const uint64_t offset = result.tensor.payload.offset, bytes = result.tensor.payload.bytes;
	result.tensor.payload.offset = 0;
	if (peer->chunk_bytes != 0 && bytes > peer->chunk_bytes)
		return peer_reply_chunked(peer, id, &reply, frame->payload + offset, bytes, peer->chunk_bytes);
	return peer_reply(peer, id, &reply, frame->payload + offset, bytes);
}

void peer_echo(struct peer *peer)
{
	struct arena arena;
	struct peer_frame frame;
	struct msg_request request;
	bool going = true;
	arena_init(&arena, (size_t)16 << 20);
	while (going && peer_read_request(peer, &arena, &frame, &request)) {
		going = echo_one(peer, &frame, &request);
		peer_frame_free(&frame);
		arena_reset(&arena);
	}
	arena_fini(&arena);
}
