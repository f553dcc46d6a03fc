#include "client/connection.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

/* Receives of one opd_process: a fast server must not keep the caller's event loop for ever. */
#define POLL_RECEIVES 16u

uint64_t clock_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t clock_us(void)
{
	return clock_ns() / 1000u;
}

uint64_t deadline_after(uint64_t timeout_us)
{
	uint64_t deadline;
	return __builtin_add_overflow(clock_us(), timeout_us, &deadline) ? UINT64_MAX : deadline;
}

/* ---- Failure ---- */

static void drop_unanswered(opd_client *client)
{
	struct flights *flights = &client->flights;
	bool found;
	do { /* removing moves entries, so a scan is repeated until it finds none */
		found = false;
		for (size_t i = 0; i < flights->capacity; i++) {
			struct flight *flight = flights->slots[i];
			if (flight == NULL || flight->answered)
				continue;
			found = true;
			client->live -= !flight->forgotten;
			flight_drop_reply(flight, client->pool);
			flights_remove(flights, flight);
			flight_settle(flights, flight);
		}
	} while (found);
	client->counted = 0;
}

void connection_break(opd_client *client, const opd_error *failure)
{
	if (client->failure.status != OPD_OK)
		return;
	client->failure = *failure;
	writer_clear(client);
	client->reader.sink = SINK_NONE;
	client->reader.sink_to = NULL;
	client->reader.sink_left = 0;
	client->reader.flight = NULL;
	drop_unanswered(client);
	(void)shutdown(client->fd, SHUT_RDWR); /* the descriptor stays until close: the caller may be polling it */
}

opd_status connection_check(opd_client *client, opd_error *error)
{
	if (client->failure.status == OPD_OK)
		return OPD_OK;
	const opd_status status = client->failure_told ? OPD_UNAVAILABLE : (opd_status)client->failure.status;
	client->failure_told = true;
	return opd_fail(error, status, "%s", client->failure.text);
}

/* ---- Sending and receiving ---- */

/* Receives once, records a failure, and writes what the news has made possible. */
static opd_status receive_once(opd_client *client, bool wait, bool *more_out, opd_error *error)
{
	opd_error failure;
	if (reader_receive(client, wait, more_out, &failure) != OPD_OK) {
		connection_break(client, &failure);
		return connection_check(client, error);
	}
	if (writer_pending(client))
		writer_flush(client);
	return OPD_OK;
}

/* Waits for the socket. False: the deadline has passed and nothing came. */
static bool wait_socket(const opd_client *client, short events, uint64_t deadline_us, short *ready_out)
{
	struct timespec left, *limit = NULL;
	if (deadline_us != UINT64_MAX) {
		const uint64_t now = clock_us(), us = deadline_us > now ? deadline_us - now : 0;
		left = (struct timespec){.tv_sec = (time_t)(us / 1000000u), .tv_nsec = (long)(us % 1000000u) * 1000};
		limit = &left;
	}
	struct pollfd entry = {.fd = client->fd, .events = events};
	const int count = ppoll(&entry, 1, limit, NULL);
	*ready_out = count > 0 ? entry.revents : 0;
	return count != 0; /* an interruption counts as news: the caller looks at its deadline again */
}

opd_status connection_pump(opd_client *client, uint64_t deadline_us, bool fresh, opd_error *error)
{
	opd_status status = connection_check(client, error);
	if (status != OPD_OK)
		return status;
	writer_flush(client);
	bool more;
	if (client->ring != NULL)
		return ring_sleep(client, deadline_us) ? receive_once(client, false, &more, error) : OPD_DEADLINE_EXCEEDED;
	if (client->tls != NULL && client_tls_pending(client->tls))
		return receive_once(client, false, &more, error);
	/* Nothing to write and no other deadline than the socket's own: one call less than poll and receive, where that pays. */
	const bool pending = writer_pending(client);
	if (!pending && client->receive_blocks && (deadline_us == UINT64_MAX || (fresh && client->receive_timeout)))
		return receive_once(client, true, &more, error);
	short ready;
	if (!wait_socket(client, pending ? POLLIN | POLLOUT : POLLIN, deadline_us, &ready))
		return OPD_DEADLINE_EXCEEDED;
	if ((ready & ~POLLOUT) != 0)
		return receive_once(client, false, &more, error);
	return OPD_OK;
}

opd_status connection_poll(opd_client *client, opd_error *error)
{
	opd_status status = connection_check(client, error);
	if (status != OPD_OK)
		return status;
	writer_flush(client);
	bool more = true;
	/* What is opened already must not wait for the socket: nobody would be woken for it. */
	for (unsigned i = 0; (more && i < POLL_RECEIVES && status == OPD_OK) || (status == OPD_OK && client->tls != NULL && client_tls_pending(client->tls)); i++)
		status = receive_once(client, false, &more, error);
	if (client->ring != NULL)
		ring_watch(client);
	return status;
}
