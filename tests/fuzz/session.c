/* A whole daemon, asked over a socket pair. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "server/session.h"
#include "session.h"

#define PATIENCE_MS 60000

static struct server *server;
static struct log server_log;
static pthread_t thread;
static uint64_t idle_bytes; /* what the daemon holds with no session */

/* ---- The daemon ---- */

static void *serve(void *argument)
{
	(void)argument;
	(void)server_run(server);
	return NULL;
}

/* At exit, so that a leak checker sees what a session left. */
static void stop(void)
{
	server_drain(server, 1000000);
	(void)pthread_join(thread, NULL);
	if (server_memory_bytes(server) > idle_bytes)
		fuzz_fail("%llu bytes are still charged at the end", (unsigned long long)server_memory_bytes(server));
	server_destroy(server);
	log_fini(&server_log);
	script_free();
}

static void set(struct config *config, const char *key, const char *value)
{
	opd_error error;
	if (config_set(config, key, value, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
}

/* The limits are low: what they refuse costs no time, and what they let through little. */
static struct config *configure(void)
{
	struct config *config = config_create();
	opd_error error;
	if (config == NULL)
		fuzz_fail("no configuration");
	set(config, "limits.memory", "16 MiB");
	set(config, "limits.session", "1 MiB");
	set(config, "limits.request", "1 MiB");
	set(config, "limits.cache", "4 MiB");
	set(config, "limits.in_flight", "64");
	set(config, "limits.kept", "64");
	set(config, "threads", "2");
	set(config, "checked", "true");
	if (config_add_listener(config, "tcp://127.0.0.1:0", &error) != OPD_OK || config_check(config, false, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
	config_clear_listeners(config);
	return config;
}

static void learn(void)
{
	struct peer peer;
	const struct msg_request request = {.kind = MSG_REQUEST_LIST_OPS};
	peer_open(&peer, server, false);
	peer_wait(&peer, peer_request(&peer, &request, 0, 0));
	peer_finish(&peer, server);
}

struct server *session_start(void)
{
	opd_error error;
	(void)signal(SIGPIPE, SIG_IGN);
	if (log_init(&server_log, LOG_ERROR, LOG_TEXT, "/dev/null", &error) != OPD_OK ||
	    server_create(configure(), &server_log, &server, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
	idle_bytes = server_memory_bytes(server);
	if (pthread_create(&thread, NULL, serve, NULL) != 0)
		fuzz_fail("no thread");
	(void)atexit(stop);
	learn();
	return server;
}

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
	if (reply.kind == MSG_REPLY_OPS)
		script_learn(&reply);
	arena_fini(&arena);
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
	if (header.type == FRAME_REPLY)
		on_reply(peer, header.request_id, peer->in + FRAME_HEADER_BYTES, header.envelope_bytes);
	else if (header.type == FRAME_GOAWAY)
		peer->ended = true;
	else if (header.type != FRAME_HELLO_REPLY && header.type != FRAME_DATA)
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
		peer->skip -= skipped;
		peer->in_bytes -= skipped;
		memmove(peer->in, peer->in + skipped, peer->in_bytes);
	} while (peer->skip == 0 && take_frame(peer));
}

void peer_poll(struct peer *peer)
{
	while (peer->fd >= 0) {
		if (peer->in_room - peer->in_bytes < 65536) {
			peer->in_room = peer->in_room == 0 ? 131072 : peer->in_room * 2;
			peer->in = realloc(peer->in, peer->in_room);
			if (peer->in == NULL)
				fuzz_fail("out of memory");
		}
		ssize_t got = recv(peer->fd, peer->in + peer->in_bytes, peer->in_room - peer->in_bytes, MSG_DONTWAIT);
		if (got < 0 && errno == EAGAIN)
			return;
		if (got <= 0) {
			peer->ended = true;
			return;
		}
		peer->in_bytes += (size_t)got;
		take_frames(peer);
	}
}

/* ---- Writing ---- */

static void sleep_until(struct peer *peer, short events, const char *what)
{
	struct pollfd poll_fd = {.fd = peer->fd, .events = (short)(events | POLLIN)};
	if (poll(&poll_fd, 1, PATIENCE_MS) == 0)
		fuzz_fail("%s: nothing for a minute", what);
}

void peer_send(struct peer *peer, const void *data, size_t bytes)
{
	const char *at = data;
	while (bytes > 0 && !peer->ended) {
		ssize_t sent = send(peer->fd, at, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent > 0) {
			at += sent;
			bytes -= (size_t)sent;
			continue;
		}
		if (errno != EAGAIN)
			peer->ended = true;
		else
			sleep_until(peer, POLLOUT, "the daemon doesn't read");
		peer_poll(peer);
	}
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

/* ---- Life ---- */

void peer_open(struct peer *peer, struct server *to, bool chunks)
{
	int pair[2];
	opd_error error;
	*peer = (struct peer){.next_id = 1};
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0 || server_adopt(to, pair[1], &peer->session, &error) != OPD_OK)
		fuzz_fail("no session");
	peer->fd = pair[0];
	peer->session->credential.kind = CREDENTIAL_NONE; /* nothing was sent yet: the loop doesn't look at it before Hello */
	struct arena arena;
	struct codec_buffer buffer;
	const struct msg_text cancel = msg_text("cancel");
	const struct msg_hello hello = {
		.version_min = 1, .version_max = 1, .feature_count = 1, .features = &cancel, .no_chunks = !chunks, .chunk_bytes = chunks ? 65536 : 0};
	arena_init(&arena, 65536);
	if (codec_encode_hello(&arena, &hello, &buffer, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
	peer_frame(peer, FRAME_HELLO, 0, 0, buffer.frame + FRAME_HEADER_BYTES, buffer.envelope_bytes, 0);
	arena_fini(&arena);
}

void peer_wait(struct peer *peer, uint64_t id)
{
	for (peer_poll(peer); id != 0 && !peer->ended && !peer->rude && peer->replies[id] == 0; peer_poll(peer))
		sleep_until(peer, 0, "a request isn't answered");
}

/* A session that ended in the middle of a kernel holds its memory until that has ended. */
static void wait_for_ledger(struct server *of)
{
	for (int i = 0; i < PATIENCE_MS * 10; i++) {
		if (server_memory_bytes(of) <= idle_bytes)
			return;
		(void)nanosleep(&(struct timespec){.tv_nsec = i < 100 ? 10000 : 100000}, NULL);
	}
	fuzz_fail("%llu bytes are still charged after the session's end", (unsigned long long)server_memory_bytes(of));
}

void peer_finish(struct peer *peer, struct server *from)
{
	for (uint32_t i = 0; i < peer->half_count; i++)
		peer_frame(peer, FRAME_ABORT, peer->half[i].id, 0, NULL, 0, 0);
	for (uint64_t id = 1; id < peer->next_id; id++)
		peer_wait(peer, id);
	if (peer->ended && !peer->rude)
		fuzz_fail("the connection ended, and nothing was wrong with it");
	(void)close(peer->fd);
	server_forget(from, peer->session);
	wait_for_ledger(from);
	free(peer->in);
}
