#include "client/greeting.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "proto/bounds.h"
#include "proto/codec.h"

#define CONNECT_TIMEOUT_US ((uint64_t)30000000)

static opd_status check_chunk(const opd_client *client, uint64_t chunk_bytes, opd_error *error)
{
	const bool wanted = client->session.chunk_bytes != 0; /* what we asked for, see greeting_exchange */
	if (chunk_bytes == 0 && !wanted)
		return OPD_OK;
	if (wanted && chunk_bytes >= BOUND_CHUNK_BYTES_MIN && chunk_bytes <= BOUND_CHUNK_BYTES_MAX)
		return OPD_OK;
	return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: chunk size %llu, expected %s",
	                (unsigned long long)chunk_bytes, wanted ? "64 KiB to 64 MiB" : "0, as asked");
}

/* Who is refused for who it is learns that by the status; any other refusal may be gone at the next try. */
static opd_status refused(opd_client *client, const struct msg_hello_reply *reply, opd_error *error)
{
	const bool who = reply->status == OPD_UNAUTHENTICATED || reply->status == OPD_PERMISSION_DENIED;
	(void)opd_fail(error, who ? reply->status : OPD_UNAVAILABLE, "the server refused the session: %s: %.*s", opd_status_name(reply->status),
	               (int)(reply->message.bytes < 400 ? reply->message.bytes : 400),
	               reply->message.data == NULL ? "" : reply->message.data);
	client->leaving = true;
	return who ? reply->status : OPD_UNAVAILABLE;
}

/* "publish, drain", in the session's arena. */
static const char *join_rights(opd_client *client, const struct msg_hello_reply *reply)
{
	size_t bytes = 1, at = 0;
	for (uint32_t i = 0; i < reply->right_count; i++)
		bytes += reply->rights[i].bytes + 2;
	char *text = arena_alloc(&client->session_arena, bytes);
	if (text == NULL)
		return "";
	text[0] = '\0';
	for (uint32_t i = 0; i < reply->right_count; i++)
		at += (size_t)snprintf(text + at, bytes - at, "%s%s", i == 0 ? "" : ", ", reply->rights[i].data == NULL ? "" : reply->rights[i].data);
	return text;
}

static const char cancel_feature[] = "cancel";
static const char memory_feature[] = "shm";
static const char rings_feature[] = "rings";

static bool has_feature(const struct msg_hello_reply *reply, const char *name)
{
	for (uint32_t i = 0; i < reply->feature_count; i++)
		if (reply->features[i].bytes == strlen(name) && memcmp(reply->features[i].data, name, reply->features[i].bytes) == 0)
			return true;
	return false;
}

opd_status greeting_accept(opd_client *client, const uint8_t *envelope, size_t bytes, opd_error *error)
{
	struct msg_hello_reply reply;
	opd_error reason;
	arena_reset(&client->session_arena);
	opd_status status = codec_decode_hello_reply(&client->session_arena, envelope, bytes, &reply, &reason);
	if (status != OPD_OK)
		return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: Hello: %.400s", reason.text);
	if (reply.status != OPD_OK)
		return refused(client, &reply, error);
	if (reply.version != FRAME_VERSION)
		return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: protocol version %u, expected %u", reply.version,
		                FRAME_VERSION);
	status = check_chunk(client, reply.chunk_bytes, error);
	if (status != OPD_OK)
		return status;
	client->session = (opd_session){
	    .struct_bytes = sizeof client->session,
	    .admin = reply.admin,
	    .session = reply.session,
	    .server = reply.server.data == NULL ? "" : reply.server.data,
	    .tenant = reply.tenant.data == NULL ? "" : reply.tenant.data,
	    .chunk_bytes = reply.chunk_bytes,
	    .payload_bytes = reply.limits.payload_bytes,
	    .session_bytes = reply.limits.session_bytes,
	    .in_flight = reply.limits.in_flight,
	    .resumed = client->tls != NULL && client_tls_resumed(client->tls),
	    .identity = reply.identity.data == NULL ? "" : reply.identity.data,
	    .rights = join_rights(client, &reply),
	};
	client->envelope_limit = reply.limits.envelope_bytes;
	client->cancels = has_feature(&reply, cancel_feature);
	client->shares = has_feature(&reply, memory_feature);
	client->rings = has_feature(&reply, rings_feature);
	client->greeted = true;
	return OPD_OK;
}

static ssize_t send_some(opd_client *client, const uint8_t *data, size_t bytes)
{
	if (client->tls == NULL)
		return send(client->fd, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
	return client_tls_send(client->tls, client->fd, &(struct iovec){(void *)(uintptr_t)data, bytes}, 1);
}

/* A fresh socket takes a frame of a few hundred bytes whole; should it not, it is waited for. */
static opd_status send_all(opd_client *client, const uint8_t *data, size_t bytes, uint64_t deadline_us, opd_error *error)
{
	while (bytes != 0) {
		const ssize_t sent = send_some(client, data, bytes);
		if (sent >= 0) {
			data += sent;
			bytes -= (size_t)sent;
			continue;
		}
		if (client->tls != NULL && (errno == EPIPE || errno == ECONNRESET))
			return OPD_OK; /* the server refuses our certificate: its alert is there to be read */
		if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
			return opd_fail(error, OPD_UNAVAILABLE, "%s", strerrordesc_np(errno));
		const uint64_t now = clock_us();
		if (now >= deadline_us)
			return opd_fail(error, OPD_UNAVAILABLE, "no answer: the server doesn't read");
		struct pollfd entry = {.fd = client->fd, .events = POLLOUT};
		(void)poll(&entry, 1, (int)((deadline_us - now) / 1000 + 1 < 1000 ? (deadline_us - now) / 1000 + 1 : 1000));
	}
	return OPD_OK;
}

static opd_status send_hello(opd_client *client, const opd_connect_options *options, uint64_t deadline_us, opd_error *error)
{
	const char *name = options->client == NULL ? "libopd " OPD_VERSION : options->client;
	struct msg_text features[3];
	uint32_t feature_count = 0;
	features[feature_count++] = msg_text(cancel_feature);
	if (options->shared_memory)
		features[feature_count++] = msg_text(memory_feature);
	if (options->rings)
		features[feature_count++] = msg_text(rings_feature);
	const struct msg_hello hello = {
	    .version_min = FRAME_VERSION,
	    .version_max = FRAME_VERSION,
	    .feature_count = feature_count,
	    .features = features,
	    .client = msg_text(name),
	    .chunk_bytes = options->chunk_bytes,
	    .no_chunks = options->no_chunks,
	    .token = options->token == NULL ? (struct msg_text){0} : msg_text(options->token),
	};
	struct codec_buffer buffer;
	opd_status status = codec_encode_hello(&client->scratch, &hello, &buffer, error);
	if (status != OPD_OK)
		return status;
	const struct frame_header header = {
	    .version = FRAME_VERSION, .type = FRAME_HELLO, .envelope_bytes = (uint32_t)buffer.envelope_bytes};
	frame_encode(&header, buffer.frame);
	return send_all(client, buffer.frame, FRAME_HEADER_BYTES + buffer.envelope_bytes, deadline_us, error);
}

opd_status greeting_exchange(opd_client *client, const opd_connect_options *options, opd_error *error)
{
	const uint64_t deadline_us = deadline_after(options->timeout_us == 0 ? CONNECT_TIMEOUT_US : options->timeout_us);
	client->session.chunk_bytes = options->no_chunks ? 0 : BOUND_CHUNK_BYTES_DEFAULT;
	opd_status status = send_hello(client, options, deadline_us, error);
	while (status == OPD_OK && !client->greeted && !client->leaving)
		status = connection_pump(client, deadline_us, false, error);
	if (status == OPD_DEADLINE_EXCEEDED)
		return opd_fail(error, OPD_UNAVAILABLE, "no answer to Hello in time");
	if (status == OPD_OK && !client->greeted)
		return opd_fail(error, OPD_UNAVAILABLE, "the server refused the session: %s", client->leaving_text);
	return status;
}
