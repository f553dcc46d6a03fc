/* A whole daemon, asked over a socket pair by the thread that turns its loop. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "server/access.h"
#include "server/conn.h"
#include "server/daemon.h"
#include "session.h"

#define PATIENCE_S 600
#define OUT_BYTES (256u << 10) /* so much waits for a turn at most */
#define LOOP_KERNEL_NS 1000000u /* what is estimated below runs on the loop */

/* ---- Reading ---- */

static void learn_handles(struct peer *peer, const struct msg_reply *reply)
{
	peer->handle_count = 0;
	for (uint32_t i = 0; i < reply->generated.count && peer->handle_count < PEER_HANDLES; i++) {
		const struct msg_arg *arg = &reply->generated.args[i];
		if (arg->kind != MSG_ARG_TENSOR || arg->tensor->source != MSG_SOURCE_HANDLE)
			continue;
		struct peer_handle *handle = &peer->handles[peer->handle_count++];
		handle->handle = arg->tensor->handle;
		(void)snprintf(handle->param, sizeof handle->param, "%s", arg->name.data);
	}
}

static void learn_kept(struct peer *peer, struct msg_handle handle)
{
	if (handle.generation != 0)
		peer->kept[peer->kept_count++ % PEER_HANDLES] = handle;
}

static void on_reply(struct peer *peer, uint64_t id, const uint8_t *envelope, size_t bytes)
{
	struct arena arena;
	struct msg_reply reply;
	opd_error error;
	arena_init(&arena, 64u << 20);
	if (codec_decode_reply(&arena, envelope, bytes, &reply, &error) != OPD_OK)
		fuzz_fail("the reply to request %llu can't be decoded: %s", (unsigned long long)id, error.text);
	if (reply.status != OPD_OK && reply.message.bytes == 0)
		fuzz_fail("request %llu failed with %s and no text", (unsigned long long)id, opd_status_name(reply.status));
	if (reply.status == OPD_INTERNAL)
		fuzz_fail("request %llu: INTERNAL: %s", (unsigned long long)id, reply.message.data);
	if (!peer->rude && (id == 0 || id >= peer->next_id || peer->replies[id]++ != 0))
		fuzz_fail("request %llu is answered, but wasn't sent or was answered before", (unsigned long long)id);
	if (reply.kind == MSG_REPLY_GENERATED)
		learn_handles(peer, &reply);
	for (uint32_t i = 0; reply.kind == MSG_REPLY_RUN && i < reply.run.output_count; i++)
		learn_kept(peer, reply.run.outputs[i].kept);
	for (uint32_t i = 0; reply.kind == MSG_REPLY_PUBLICATIONS && i < reply.publications.count; i++)
		learn_kept(peer, reply.publications.items[i].handle);
	if (reply.kind == MSG_REPLY_MEMORY)
		peer->region = reply.memory.region;
	if (reply.kind == MSG_REPLY_OPS)
		script_learn(&reply);
	if (reply.kind == MSG_REPLY_OP)
		script_learn_dims(&reply);
	arena_fini(&arena);
}

static void keep_answer(struct peer *peer, const struct frame_header *header)
{
	struct peer_answer *answer = &peer->answer;
	const bool chunked = (header->flags & FRAME_CHUNKED) != 0;
	answer->envelope_bytes = header->envelope_bytes;
	answer->payload_bytes = 0;
	answer->payload_due = chunked ? 0 : header->payload_bytes;
	answer->chunked = chunked;
	answer->data = realloc(answer->data, answer->envelope_bytes + answer->payload_due + 1);
	if (answer->data == NULL)
		fuzz_fail("out of memory");
	memcpy(answer->data, peer->in + FRAME_HEADER_BYTES, answer->envelope_bytes);
	peer->watched = 0;
}

/* The first frame of what was read; false: it isn't whole. */
static bool take_frame(struct peer *peer)
{
	struct frame_header header;
	opd_error error;
	if (peer->in_bytes < FRAME_HEADER_BYTES)
		return false;
	if (frame_decode(peer->in, &header, &error) != OPD_OK)
		fuzz_fail("the daemon sent a bad header: %s", error.text);
	size_t head = FRAME_HEADER_BYTES + header.envelope_bytes;
	if (peer->in_bytes < head)
		return false;
	if (header.type == FRAME_REPLY && header.request_id == peer->watched && peer->watched != 0)
		keep_answer(peer, &header);
	if (header.type == FRAME_REPLY)
		on_reply(peer, header.request_id, peer->in + FRAME_HEADER_BYTES, header.envelope_bytes);
	else if (header.type == FRAME_GOAWAY)
		peer->ended = true;
	else if (header.type == FRAME_HELLO_REPLY)
		peer->greeted = true;
	else if (header.type != FRAME_DATA)
		fuzz_fail("the daemon sent a frame of type %u", header.type);
	peer->skip = (header.flags & FRAME_CHUNKED) != 0 ? 0 : header.payload_bytes;
	peer->in_bytes -= head;
	memmove(peer->in, peer->in + head, peer->in_bytes);
	return true;
}

static void take_frames(struct peer *peer)
{
	do {
		size_t skipped = peer->skip < peer->in_bytes ? (size_t)peer->skip : peer->in_bytes;
		if (peer->answer.payload_bytes < peer->answer.payload_due) {
			memcpy(peer->answer.data + peer->answer.envelope_bytes + peer->answer.payload_bytes, peer->in, skipped);
			peer->answer.payload_bytes += skipped;
		}
		peer->skip -= skipped;
		peer->in_bytes -= skipped;
		memmove(peer->in, peer->in + skipped, peer->in_bytes);
	} while (peer->skip == 0 && take_frame(peer));
}

/* False: nothing was there. */
static bool receive(struct peer *peer)
{
	if (peer->in_room - peer->in_bytes < 65536) {
		peer->in_room = peer->in_room == 0 ? 131072 : peer->in_room * 2;
		peer->in = realloc(peer->in, peer->in_room);
		if (peer->in == NULL)
			fuzz_fail("out of memory");
	}
	ssize_t got = recv(peer->fd, peer->in + peer->in_bytes, peer->in_room - peer->in_bytes, MSG_DONTWAIT);
	if (got < 0 && errno == EAGAIN)
		return false;
	if (got <= 0) {
		peer->ended = true;
		return false;
	}
	peer->in_bytes += (size_t)got;
	take_frames(peer);
	return true;
}

/* ---- Writing ---- */

/* As much as the socket takes. */
static void send_out(struct peer *peer)
{
	if (peer->out_bytes == 0 || peer->ended)
		return;
	ssize_t sent = send(peer->fd, peer->out, peer->out_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent < 0 && errno != EAGAIN)
		peer->ended = true; /* what the daemon said before is still read */
	if (sent <= 0)
		return;
	peer->out_bytes -= (size_t)sent;
	memmove(peer->out, peer->out + sent, peer->out_bytes);
}

/* False: nothing came. */
static bool turn(struct peer *peer, uv_run_mode mode)
{
	bool came = false;
	send_out(peer);
	(void)uv_run(&peer->daemon->server->loops[0].loop, mode);
	while (!peer->ended && receive(peer))
		came = true;
	return came;
}

void peer_turn(struct peer *peer)
{
	(void)turn(peer, UV_RUN_NOWAIT);
}

/* Sleeps in the loop until there is something to do: a lane has ended a job, or its tick, once a second. */
static void turn_until(struct peer *peer, bool (*done)(const struct peer *peer, uint64_t id), uint64_t id, const char *what)
{
	for (time_t began = time(NULL); !done(peer, id); (void)turn(peer, UV_RUN_ONCE))
		if (time(NULL) - began > PATIENCE_S)
			fuzz_fail("%s for %d s", what, PATIENCE_S);
}

static bool is_sent(const struct peer *peer, uint64_t id)
{
	(void)id;
	return peer->ended || peer->out_bytes == 0;
}

static void flush(struct peer *peer)
{
	send_out(peer);
	turn_until(peer, is_sent, 0, "the daemon doesn't read");
}

void peer_send(struct peer *peer, const void *data, size_t bytes)
{
	if (bytes == 0 || peer->ended)
		return;
	if (peer->out_bytes + bytes > peer->out_room) {
		peer->out_room = (peer->out_bytes + bytes) * 2;
		peer->out = realloc(peer->out, peer->out_room);
		if (peer->out == NULL)
			fuzz_fail("out of memory");
	}
	memcpy(peer->out + peer->out_bytes, data, bytes);
	peer->out_bytes += bytes;
	if (peer->out_bytes >= OUT_BYTES)
		flush(peer);
}

void peer_frame(struct peer *peer, frame_type type, uint64_t id, uint16_t flags, const void *envelope, size_t envelope_bytes, uint64_t payload_bytes)
{
	uint8_t head[FRAME_HEADER_BYTES];
	const struct frame_header header = {
		.version = FRAME_VERSION,
		.type = type,
		.flags = flags,
		.request_id = id,
		.envelope_bytes = (uint32_t)envelope_bytes,
		.payload_bytes = payload_bytes,
	};
	frame_encode(&header, head);
	peer_send(peer, head, sizeof head);
	if (envelope_bytes != 0)
		peer_send(peer, envelope, envelope_bytes);
}

uint64_t peer_request(struct peer *peer, const struct msg_request *message, uint16_t flags, uint64_t payload_bytes)
{
	struct arena arena;
	struct codec_buffer buffer;
	opd_error error;
	if (peer->next_id == PEER_IDS)
		return 0;
	arena_init(&arena, 64u << 20);
	if (codec_encode_request(&arena, message, &buffer, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
	uint64_t id = peer->next_id++;
	peer_frame(peer, FRAME_REQUEST, id, flags, buffer.frame + FRAME_HEADER_BYTES, buffer.envelope_bytes, payload_bytes);
	arena_fini(&arena);
	return id;
}

uint64_t peer_request_with(struct peer *peer, const struct msg_request *message, int fd)
{
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof fd)] = {0};
	flush(peer);
	const uint64_t id = peer_request(peer, message, 0, 0);
	struct iovec bytes = {peer->out, peer->out_bytes};
	struct msghdr frame = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&frame);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	if (sendmsg(peer->fd, &frame, MSG_NOSIGNAL) != (ssize_t)peer->out_bytes)
		fuzz_fail("a request of %zu bytes didn't go into an empty socket", peer->out_bytes);
	peer->out_bytes = 0;
	return id;
}

/* ---- Life ---- */

/* As if it came by a Unix socket: by others, no descriptors can be passed. Rights are a user's: what others may change outlasts an input. */
static void accept_one(struct server *server, int fd)
{
	struct conn *conn = conn_create(io_loop_expect(&server->loops[0]), access_create("fuzz", "fuzz", ACCESS_USER));
	if (conn == NULL || uv_pipe_init(&conn->io->loop, &conn->pipe, 0) != 0)
		fuzz_fail("no connection");
	conn->handle.data = conn;
	if (uv_pipe_open(&conn->pipe, fd) != 0)
		fuzz_fail("no connection");
	(void)snprintf(conn->peer, sizeof conn->peer, "fuzz");
	conn->local = true;
	conn_start(conn, NULL);
}

static void send_hello(struct peer *peer, const struct peer_kind *kind)
{
	opd_error error;
	struct arena arena;
	struct codec_buffer buffer;
	const struct msg_text features[] = {msg_text("cancel"), msg_text("shm")};
	const struct msg_hello hello = {.version_min = 1,
	                                .version_max = 1,
	                                .feature_count = kind->shares ? 2 : 1,
	                                .features = features,
	                                .no_chunks = !kind->chunks,
	                                .chunk_bytes = kind->chunks ? 65536 : 0};
	arena_init(&arena, 65536);
	if (codec_encode_hello(&arena, &hello, &buffer, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
	peer_frame(peer, FRAME_HELLO, 0, 0, buffer.frame + FRAME_HEADER_BYTES, buffer.envelope_bytes, 0);
	arena_fini(&arena);
}

static bool is_greeted(const struct peer *peer, uint64_t id)
{
	(void)id;
	return peer->ended || peer->greeted;
}

void peer_open(struct peer *peer, const struct peer_kind *kind)
{
	int pair[2];
	*peer = (struct peer){.next_id = 1, .daemon = session_daemon(kind->modules)};
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		fuzz_fail("no sockets");
	peer->fd = pair[0];
	atomic_store(&peer->daemon->server->inline_ns, kind->lanes ? 0 : LOOP_KERNEL_NS);
	accept_one(peer->daemon->server, pair[1]);
	send_hello(peer, kind);
	if (!kind->shares)
		return;
	turn_until(peer, is_greeted, 0, "Hello isn't answered"); /* descriptors that come before it are let go */
	peer_attach(peer);
}

static bool is_answered(const struct peer *peer, uint64_t id)
{
	return peer->ended || peer->rude || peer->replies[id] != 0;
}

void peer_wait(struct peer *peer, uint64_t id)
{
	peer_turn(peer);
	if (id != 0)
		turn_until(peer, is_answered, id, "a request isn't answered");
}

void peer_settle(struct peer *peer)
{
	for (uint32_t i = 0; i < peer->half_count; i++)
		peer_frame(peer, FRAME_ABORT, peer->half[i].id, 0, NULL, 0, 0);
	peer->half_count = 0;
	flush(peer);
	for (uint64_t id = 1; id < peer->next_id; id++)
		if (!is_answered(peer, id))
			turn_until(peer, is_answered, id, "a request isn't answered");
}

/* A session that ended in the middle of a kernel holds its memory until that has ended. */
static bool is_gone(const struct peer *peer, uint64_t id)
{
	(void)id;
	return peer->daemon->server->loops[0].conns == NULL && server_memory_bytes(peer->daemon->server) <= peer->daemon->idle_bytes;
}

void peer_finish(struct peer *peer)
{
	peer_settle(peer);
	if (peer->ended && !peer->rude)
		fuzz_fail("the connection ended, and nothing was wrong with it");
	while (turn(peer, UV_RUN_NOWAIT)) /* what is said to one who was rude */
		;
	peer->ended = true;
	(void)close(peer->fd);
	turn_until(peer, is_gone, 0, "something of the session is left");
	free(peer->in);
	free(peer->out);
	free(peer->answer.data);
}
