/* Connecting, closing, and what a client says of itself. */
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "client/connection.h"
#include "client/greeting.h"
#include "client/token.h"
#include "proto/bounds.h"

#define CONNECT_TIMEOUT_US ((uint64_t)30000000)
#define SCRATCH_BYTES ((size_t)64 << 20)
#define SESSION_ARENA_BYTES ((size_t)1 << 20)

const char *opd_version(void)
{
	return OPD_VERSION;
}

static opd_client *client_create(uint64_t timeout_us)
{
	opd_client *client = calloc(1, sizeof *client);
	if (client == NULL)
		return NULL;
	client->fd = -1;
	client->timeout_us = timeout_us;
	list_init(&client->done);
	list_init(&client->writer.ready);
	list_init(&client->writer.bulk);
	list_init(&client->writer.waiting);
	arena_init(&client->scratch, SCRATCH_BYTES);
	arena_init(&client->session_arena, SESSION_ARENA_BYTES);
	client->pool = pool_create();
	if (client->pool == NULL || !writer_init(&client->writer) || !reader_init(&client->reader)) {
		opd_close(client);
		return NULL;
	}
	return client;
}

static void close_flights(opd_client *client)
{
	opd_error closed;
	(void)opd_fail(&closed, OPD_UNAVAILABLE, "closed");
	connection_break(client, &closed);
	while (!list_empty(&client->done))
		connection_forget(client, LIST_ENTRY(client->done.next, struct flight, done));
	flights_fini(&client->flights);
}

void opd_close(opd_client *client)
{
	if (client == NULL)
		return;
	if (client->direct_depth != 0) {
		client->direct_depth = 1;
		opd_direct_end(client);
	}
	memory_detach_all(client->memories);
	writer_clear(client); /* a connection that has failed already has nothing waiting */
	close_flights(client);
	client_tls_destroy(client->tls, client->fd);
	if (client->fd >= 0)
		(void)close(client->fd);
	ring_destroy(client->ring);
	if (client->scheme != NULL)
		client->scheme->disconnect(client->scheme_state);
	writer_fini(&client->writer);
	reader_fini(&client->reader);
	arena_fini(&client->scratch);
	arena_fini(&client->session_arena);
	pool_unref(client->pool);
	free(client);
}

/* The part of the caller's struct that it knows, zeroes for the rest. */
static opd_status read_options(const opd_connect_options *options, opd_connect_options *out, opd_error *error)
{
	*out = (opd_connect_options){.struct_bytes = sizeof *out};
	if (options == NULL)
		return OPD_OK;
	if (options->struct_bytes < sizeof options->struct_bytes)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "connect options: struct_bytes %u, expected %zu", options->struct_bytes,
		                sizeof *options);
	memcpy(out, options, options->struct_bytes < sizeof *out ? options->struct_bytes : sizeof *out);
	if (out->chunk_bytes != 0 && (out->chunk_bytes < BOUND_CHUNK_BYTES_MIN || out->chunk_bytes > BOUND_CHUNK_BYTES_MAX))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "connect options: chunk_bytes %llu, expected 0 or %u to %u",
		                (unsigned long long)out->chunk_bytes, BOUND_CHUNK_BYTES_MIN, BOUND_CHUNK_BYTES_MAX);
	return OPD_OK;
}

/* Who asks for a server to be verified must not be served by one that isn't. */
static opd_status check_tls_options(const char *address, const opd_connect_options *options, opd_error *error)
{
	const bool asked = options->ca_file != NULL || options->certificate_file != NULL || options->key_file != NULL || options->server_name != NULL || options->fingerprint != NULL;
	if (!asked || strncmp(address, "tls://", 6) == 0)
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: a CA, a certificate, a key, a server name or a fingerprint is given, and those are of tls:// addresses", address);
}

static opd_status client_dial(opd_client *client, const char *address, const opd_connect_options *options, uint64_t timeout_us, opd_error *error)
{
	const char *rest;
	const struct scheme *scheme = scheme_find(address, &rest);
	if (scheme == NULL)
		return dial(address, options, timeout_us, &client->fd, &client->tls, error);
	opd_status status = scheme->connect(rest, &client->fd, &client->scheme_state, error);
	if (status == OPD_OK)
		client->scheme = scheme;
	return status;
}

/* A blocking receive with the client's own timeout needs no poll before it. On a Unix socket it is woken for nothing, though, when the peer takes what was sent (the socket has room again,
 * and that wakes every reader of it that isn't polling): two switches of processes, on one core, for one call less. One small op there: 1.43 to 1.18 times the echo, whose client blocks. */
static void set_receiving(opd_client *client)
{
	struct sockaddr address = {.sa_family = AF_UNSPEC};
	socklen_t bytes = sizeof address;
	client->receive_blocks = getsockname(client->fd, &address, &bytes) == 0 && address.sa_family != AF_UNIX;
	if (!client->receive_blocks)
		return;
	const struct timeval value = {.tv_sec = (time_t)(client->timeout_us / 1000000u),
	                              .tv_usec = (suseconds_t)(client->timeout_us % 1000000u)};
	client->receive_timeout = client->timeout_us != 0 && client->timeout_us < (uint64_t)1 << 50 &&
	                          setsockopt(client->fd, SOL_SOCKET, SO_RCVTIMEO, &value, sizeof value) == 0;
}

/* An empty token is none; the file's is read into `room`. */
static opd_status find_token(opd_connect_options *known, char room[TOKEN_ROOM_BYTES], opd_error *error)
{
	if (known->token != NULL && known->token[0] == '\0')
		known->token = NULL;
	if (known->token != NULL || known->token_file == NULL)
		return OPD_OK;
	known->token = room;
	return token_read(known->token_file, room, error);
}

/* What address and options say together, before anything is opened. *address_in_out: without what it said of options, in `room` or where it was. */
static opd_status settle_options(const char **address_in_out, opd_connect_options *known, char room[DIAL_ROOM_BYTES], char token[TOKEN_ROOM_BYTES], opd_error *error)
{
	opd_status status = dial_options(*address_in_out, known, room, address_in_out, error);
	if (status == OPD_OK)
		status = check_tls_options(*address_in_out, known, error);
	return status == OPD_OK ? find_token(known, token, error) : status;
}

/* To whom it has reached: no token over a way that others read, then Hello. */
static opd_status introduce(opd_client *client, const char *address, const opd_connect_options *known, opd_error *error)
{
	opd_status status = known->token != NULL && client->tls == NULL ? token_check_way(client->fd, error) : OPD_OK;
	if (status == OPD_OK)
		status = greeting_exchange(client, known, error);
	return status == OPD_OK ? OPD_OK : opd_error_prefix(error, status, "%.200s", address);
}

opd_status opd_connect(const char *address, const opd_connect_options *options, opd_client **client_out, opd_error *error)
{
	opd_connect_options known;
	char room[DIAL_ROOM_BYTES], token[TOKEN_ROOM_BYTES];
	opd_status status = read_options(options, &known, error);
	if (status == OPD_OK)
		status = settle_options(&address, &known, room, token, error);
	if (status != OPD_OK)
		return status;
	opd_client *client = client_create(known.timeout_us);
	if (client == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for a client");
	status = client_dial(client, address, &known, known.timeout_us == 0 ? CONNECT_TIMEOUT_US : known.timeout_us, error);
	if (status == OPD_OK)
		status = introduce(client, address, &known, error);
	if (status == OPD_OK && known.rings)
		status = ring_attach(client, &known, error);
	if (status != OPD_OK) {
		opd_close(client);
		return status;
	}
	set_receiving(client);
	*client_out = client;
	return OPD_OK;
}

const opd_session *opd_client_session(const opd_client *client)
{
	return &client->session;
}

int opd_client_fd(const opd_client *client)
{
	return client->ring != NULL ? ring_fd(client->ring) : client->fd;
}

short opd_client_events(const opd_client *client)
{
	if (client->ring != NULL) {
		ring_watch((opd_client *)(uintptr_t)client); /* nothing of it that the caller sees changes */
		return POLLIN;
	}
	return writer_pending(client) ? POLLIN | POLLOUT : POLLIN;
}

opd_status opd_process(opd_client *client, opd_error *error)
{
	return connection_poll(client, error);
}

size_t opd_in_flight(const opd_client *client)
{
	return client->live;
}

size_t opd_finished(const opd_client *client)
{
	return client->done_count;
}
