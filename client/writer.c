/* The sending half. Frames wait in two lists: whole ones (`ready`) and flights with DATA left (`bulk`). A batch takes all that is
 * ready and then one DATA frame each of the bulk flights in turn, so that a small request waits for at most one batch of
 * somebody's upload. Nothing is copied but envelopes and small payloads: the pieces of a batch point into the callers' memory. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "client/connection.h"

#define BATCH_PIECES 256u
#define BATCH_PIECES_SENDMSG 1024u /* the kernel's limit of one call */
/* A batch ends once it has this much. Larger ones gain nothing (a socket takes about 200 KiB at once) and make small requests
 * wait longer. */
#define BATCH_BYTES ((size_t)256 << 10)

bool writer_init(struct writer *writer)
{
	list_init(&writer->ready);
	list_init(&writer->bulk);
	list_init(&writer->waiting);
	return writer_reserve(writer, BATCH_PIECES);
}

void writer_fini(struct writer *writer)
{
	free(writer->batch.pieces);
	free(writer->batch.owners);
	writer->batch = (struct batch){0};
}

bool writer_reserve(struct writer *writer, size_t pieces)
{
	struct batch *batch = &writer->batch;
	if (pieces <= batch->capacity)
		return true;
	struct iovec *grown = realloc(batch->pieces, pieces * sizeof *grown);
	if (grown == NULL)
		return false;
	batch->pieces = grown;
	struct flight **owners = realloc(batch->owners, pieces * sizeof *owners);
	if (owners == NULL)
		return false;
	batch->owners = owners;
	batch->capacity = pieces;
	return true;
}

/* ---- Queueing ---- */

static void writer_ready(opd_client *client, struct flight *flight)
{
	flight->counted = true;
	client->counted++;
	client->writer.ready_bytes += flight->frame_bytes + (flight->chunked ? 0 : (size_t)flight->payload_bytes);
	list_append(&client->writer.ready, &flight->send);
}

static bool writer_room(const opd_client *client)
{
	return client->session.in_flight == 0 || client->counted < client->session.in_flight;
}

void writer_add(opd_client *client, struct flight *flight)
{
	flight->state = FLIGHT_QUEUED;
	if (list_empty(&client->writer.waiting) && writer_room(client))
		writer_ready(client, flight);
	else
		list_append(&client->writer.waiting, &flight->send);
}

void writer_admit(opd_client *client)
{
	while (!list_empty(&client->writer.waiting) && writer_room(client)) {
		struct flight *flight = LIST_ENTRY(client->writer.waiting.next, struct flight, send);
		list_remove(&flight->send);
		writer_ready(client, flight);
	}
}

bool writer_pending(const opd_client *client)
{
	const struct writer *writer = &client->writer;
	return writer->batch.index != writer->batch.count || !list_empty(&writer->ready) || !list_empty(&writer->bulk) ||
	       (client->tls != NULL && client_tls_unsent(client->tls) && !writer->broken);
}

void writer_stop(opd_client *client, struct flight *flight)
{
	switch (flight->state) {
	case FLIGHT_QUEUED:
		list_remove(&flight->send);
		flight->state = FLIGHT_SENT;
		client->writer.passing -= flight->descriptor != 0;
		flight->descriptor = 0;
		if (flight->counted) {
			flight->counted = false;
			client->counted--;
		}
		return;
	case FLIGHT_DATA:
		list_remove(&flight->send);
		flight->state = FLIGHT_ABORT;
		list_append(&client->writer.ready, &flight->send);
		return;
	case FLIGHT_ABORT:
	case FLIGHT_CANCEL:
	case FLIGHT_SENT:
		return;
	}
}

void writer_cancel(opd_client *client, struct flight *flight)
{
	if (!client->cancels || client->writer.broken || flight->state != FLIGHT_SENT)
		return;
	flight->state = FLIGHT_CANCEL;
	list_append(&client->writer.ready, &flight->send);
}

/* ---- Batches ---- */

static void batch_add(struct batch *batch, struct flight *owner, const void *data, size_t bytes)
{
	batch->pieces[batch->count] = (struct iovec){(void *)(uintptr_t)data, bytes};
	batch->owners[batch->count] = owner;
	batch->count++;
	batch->bytes += bytes;
	owner->batched++;
}

/* False: no room for all its pieces in what is left of the batch. */
static bool batch_add_request(opd_client *client, struct flight *flight)
{
	struct batch *batch = &client->writer.batch;
	const size_t pieces = flight->chunked ? 0 : flight->piece_count;
	if (batch->capacity - batch->count < pieces + 1)
		return false;
	batch_add(batch, flight, flight->frame, flight->frame_bytes);
	for (size_t i = 0; i < pieces; i++)
		batch_add(batch, flight, flight->pieces[i].iov_base, flight->pieces[i].iov_len);
	list_remove(&flight->send);
	flight->state = flight->chunked ? FLIGHT_DATA : FLIGHT_SENT;
	if (flight->chunked)
		list_append(&client->writer.bulk, &flight->send);
	return true;
}

/* ABORT or CANCEL, as its state says. */
static bool batch_add_end(opd_client *client, struct flight *flight)
{
	struct batch *batch = &client->writer.batch;
	if (batch->capacity == batch->count)
		return false;
	const frame_type type = flight->state == FLIGHT_ABORT ? FRAME_ABORT : FRAME_CANCEL;
	const struct frame_header header = {.version = FRAME_VERSION, .type = (uint8_t)type, .request_id = flight->id};
	frame_encode(&header, flight->data_header);
	batch_add(batch, flight, flight->data_header, FRAME_HEADER_BYTES);
	list_remove(&flight->send);
	flight->state = FLIGHT_SENT;
	return true;
}

/* The next DATA frame of a flight, as long as chunk size, batch and pieces allow. False: no room. */
static bool batch_add_data(opd_client *client, struct flight *flight)
{
	struct batch *batch = &client->writer.batch;
	if (batch->capacity - batch->count < 2)
		return false;
	uint64_t limit = flight->payload_bytes - flight->payload_sent;
	if (limit > client->session.chunk_bytes)
		limit = client->session.chunk_bytes;
	if (limit > BATCH_BYTES)
		limit = BATCH_BYTES;
	flight->data_batch = batch->number;
	batch_add(batch, flight, flight->data_header, sizeof flight->data_header);
	uint64_t bytes = 0;
	while (bytes < limit && batch->count < batch->capacity) {
		const struct iovec *piece = &flight->pieces[flight->piece_index];
		size_t take = piece->iov_len - flight->piece_offset;
		if (take > limit - bytes)
			take = (size_t)(limit - bytes);
		batch_add(batch, flight, (const uint8_t *)piece->iov_base + flight->piece_offset, take);
		bytes += take;
		flight->piece_offset += take;
		if (flight->piece_offset == piece->iov_len) {
			flight->piece_index++;
			flight->piece_offset = 0;
		}
	}
	const struct frame_header header = {.version = FRAME_VERSION,
	                                    .type = FRAME_DATA,
	                                    .request_id = flight->id,
	                                    .envelope_bytes = FRAME_DATA_OFFSET_BYTES,
	                                    .payload_bytes = bytes};
	frame_encode(&header, flight->data_header);
	frame_store_u64(flight->data_header + FRAME_HEADER_BYTES, flight->payload_sent);
	flight->payload_sent += bytes;
	list_remove(&flight->send);
	if (flight->payload_sent == flight->payload_bytes)
		flight->state = FLIGHT_SENT;
	else
		list_append(&client->writer.bulk, &flight->send);
	return true;
}

/* False: nothing waits. At most one DATA frame a flight, since its header has one place. */
static bool batch_fill(opd_client *client)
{
	struct writer *writer = &client->writer;
	struct batch *batch = &writer->batch;
	batch->count = 0;
	batch->index = 0;
	batch->bytes = 0;
	batch->number++;
	while (!list_empty(&writer->ready) && batch->bytes < BATCH_BYTES) {
		struct flight *flight = LIST_ENTRY(writer->ready.next, struct flight, send);
		if (!(flight->state == FLIGHT_QUEUED ? batch_add_request(client, flight) : batch_add_end(client, flight)))
			break;
	}
	if (list_empty(&writer->ready))
		writer->ready_bytes = 0;
	while (!list_empty(&writer->bulk) && batch->bytes < BATCH_BYTES) {
		struct flight *flight = LIST_ENTRY(writer->bulk.next, struct flight, send);
		if (flight->data_batch == batch->number || !batch_add_data(client, flight))
			break;
	}
	return batch->count != 0;
}

static void batch_drop_piece(opd_client *client)
{
	struct batch *batch = &client->writer.batch;
	struct flight *owner = batch->owners[batch->index++];
	owner->batched--;
	flight_settle(&client->flights, owner);
}

static void batch_advance(opd_client *client, size_t bytes)
{
	struct batch *batch = &client->writer.batch;
	while (batch->index < batch->count && bytes >= batch->pieces[batch->index].iov_len) {
		bytes -= batch->pieces[batch->index].iov_len;
		batch_drop_piece(client);
	}
	if (bytes != 0) {
		struct iovec *piece = &batch->pieces[batch->index];
		piece->iov_base = (uint8_t *)piece->iov_base + bytes;
		piece->iov_len -= bytes;
	}
}

/* ---- Writing ---- */

/* A descriptor goes with the first byte of its frame, and with no other's: the call ends before the next frame that has one. Returns whose it passes; NULL: none. */
static struct flight *batch_pass(const struct batch *batch, struct msghdr *message, void *control, size_t control_bytes)
{
	struct flight *passed = NULL;
	for (size_t i = 0; i < message->msg_iovlen; i++) {
		struct flight *owner = batch->owners[batch->index + i];
		if (owner->descriptor == 0 || batch->pieces[batch->index + i].iov_base != owner->frame)
			continue;
		if (i != 0) {
			message->msg_iovlen = i;
			break;
		}
		memset(control, 0, control_bytes);
		message->msg_control = control;
		message->msg_controllen = control_bytes;
		struct cmsghdr *header = CMSG_FIRSTHDR(message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof owner->descriptor);
		memcpy(CMSG_DATA(header), &owner->descriptor, sizeof owner->descriptor);
		passed = owner;
	}
	return passed;
}

/* Pieces up to this size are copied together before they are sent. */
#define JOIN_PIECE_BYTES 512u
#define JOIN_BYTES ((size_t)16 << 10)

/* Sends the first pieces, small ones that are copied into one, which costs less than the kernel's work for each: msg_iovlen then says how many. All of them where large ones
 * are among them. Not inlined: the room would spread what a lone request touches over more pages. */
static __attribute__((noinline)) ssize_t send_joined(const opd_client *client, struct msghdr *message, int flags)
{
	uint8_t room[JOIN_BYTES];
	const struct iovec *pieces = message->msg_iov;
	size_t bytes = 0, count = 0;
	for (; count < message->msg_iovlen && pieces[count].iov_len <= JOIN_PIECE_BYTES && pieces[count].iov_len <= sizeof room - bytes; count++) {
		memcpy(room + bytes, pieces[count].iov_base, pieces[count].iov_len);
		bytes += pieces[count].iov_len;
	}
	if (count < 2 || (count < message->msg_iovlen && pieces[count].iov_len > JOIN_PIECE_BYTES))
		return sendmsg(client->fd, message, flags);
	message->msg_iovlen = count;
	return send(client->fd, room, bytes, flags);
}

static ssize_t batch_send(const opd_client *client, struct msghdr *message)
{
	const int flags = MSG_NOSIGNAL | MSG_DONTWAIT;
	if (client->tls != NULL)
		return client_tls_send(client->tls, client->fd, message->msg_iov, message->msg_iovlen);
	if (message->msg_control != NULL)
		return sendmsg(client->fd, message, flags);
	if (message->msg_iovlen == 1)
		return send(client->fd, message->msg_iov[0].iov_base, message->msg_iov[0].iov_len, flags);
	return send_joined(client, message, flags);
}

void writer_flush(opd_client *client)
{
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
	struct batch *batch = &client->writer.batch;
	if (client->tls != NULL && !client_tls_flush(client->tls, client->fd) && errno == EAGAIN)
		return;
	while (!client->writer.broken) {
		if (batch->index == batch->count && !batch_fill(client))
			return;
		const size_t left = batch->count - batch->index;
		struct msghdr message = {.msg_iov = &batch->pieces[batch->index],
		                               .msg_iovlen = left < BATCH_PIECES_SENDMSG ? left : BATCH_PIECES_SENDMSG};
		struct flight *passed = client->writer.passing == 0 ? NULL : batch_pass(batch, &message, control, sizeof control);
		const ssize_t sent = client->ring != NULL ? ring_send(client, &message) : batch_send(client, &message);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS))
			return;
		if (sent < 0) { /* what the peer said before it left is still to be read, and reading tells that it left */
			writer_clear(client);
			client->writer.broken = true;
			return;
		}
		if (passed != NULL) {
			passed->descriptor = 0;
			client->writer.passing--;
		}
		const size_t end = batch->index + message.msg_iovlen;
		batch_advance(client, (size_t)sent);
		if (batch->index < end && (client->tls == NULL || client_tls_unsent(client->tls)))
			return;
	}
}

static bool owns(const struct flight *flight, const void *data)
{
	const uintptr_t at = (uintptr_t)data;
	const uintptr_t frame = (uintptr_t)flight->frame, header = (uintptr_t)flight->data_header;
	return (at >= frame && at < frame + flight->frame_capacity) || (at >= header && at < header + sizeof flight->data_header);
}

static bool borrowed(const opd_client *client, const struct flight *flight, size_t index)
{
	const struct batch *batch = &client->writer.batch;
	return batch->owners[index] == flight && !owns(flight, batch->pieces[index].iov_base);
}

bool writer_detach(opd_client *client, struct flight *flight)
{
	struct batch *batch = &client->writer.batch;
	size_t bytes = 0;
	for (size_t i = batch->index; i < batch->count; i++)
		if (borrowed(client, flight, i))
			bytes += batch->pieces[i].iov_len;
	if (bytes == 0 || flight->detached != NULL)
		return true;
	uint8_t *copy = malloc(bytes);
	if (copy == NULL)
		return false;
	flight->detached = copy;
	for (size_t i = batch->index; i < batch->count; i++) {
		if (!borrowed(client, flight, i))
			continue;
		memcpy(copy, batch->pieces[i].iov_base, batch->pieces[i].iov_len);
		batch->pieces[i].iov_base = copy;
		copy += batch->pieces[i].iov_len;
	}
	return true;
}

static void clear_list(opd_client *client, struct list *list)
{
	while (!list_empty(list)) {
		struct flight *flight = LIST_ENTRY(list->next, struct flight, send);
		list_remove(&flight->send);
		flight->state = FLIGHT_SENT;
		flight_settle(&client->flights, flight);
	}
}

void writer_clear(opd_client *client)
{
	struct writer *writer = &client->writer;
	writer->passing = 0;
	clear_list(client, &writer->ready);
	clear_list(client, &writer->bulk);
	clear_list(client, &writer->waiting);
	while (writer->batch.index < writer->batch.count)
		batch_drop_piece(client);
}
