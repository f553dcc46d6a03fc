#include "proto/ring.h"

#include <string.h>

#include "proto/bounds.h"

bool ring_bytes_valid(uint64_t bytes)
{
	return bytes >= BOUND_RING_BYTES_MIN && bytes <= BOUND_RING_BYTES_MAX && (bytes & (bytes - 1)) == 0;
}

uint64_t ring_memory_bytes(uint64_t request_bytes, uint64_t reply_bytes)
{
	return RING_HEADER_BYTES + request_bytes + reply_bytes;
}

void ring_reader_init(struct ring_reader *reader, _Atomic uint64_t *head, _Atomic uint64_t *tail, const uint8_t *data, uint64_t bytes)
{
	*reader = (struct ring_reader){.head = head, .tail = tail, .data = data, .bytes = bytes};
}

void ring_writer_init(struct ring_writer *writer, _Atomic uint64_t *head, _Atomic uint64_t *tail, uint8_t *data, uint64_t bytes)
{
	*writer = (struct ring_writer){.head = head, .tail = tail, .data = data, .bytes = bytes};
}

/* True: it waits for `reason`, and is to be woken: once, since the word is cleared. Whatever else it waited for, it looks for itself then. */
static bool is_to_wake(_Atomic uint32_t *waits, uint32_t reason)
{
	return (atomic_load(waits) & reason) != 0 && atomic_exchange(waits, 0) != 0;
}

void ring_wait(_Atomic uint32_t *waits, uint32_t reasons)
{
	if (reasons == 0)
		atomic_store_explicit(waits, 0, memory_order_relaxed); /* a wake-up too many does no harm */
	else
		atomic_store(waits, reasons);
}

/* ---- Reading ---- */

uint64_t ring_filled(const struct ring_reader *reader)
{
	const uint64_t filled = atomic_load(reader->head) - reader->at;
	return filled <= reader->bytes ? filled : RING_BROKEN;
}

void ring_read(struct ring_reader *reader, void *to, uint64_t bytes)
{
	const uint64_t begin = reader->at & (reader->bytes - 1), left = reader->bytes - begin;
	const uint64_t first = bytes < left ? bytes : left;
	memcpy(to, reader->data + begin, first);
	if (first != bytes)
		memcpy((uint8_t *)to + first, reader->data, bytes - first);
	reader->at += bytes;
}

bool ring_release(struct ring_reader *reader, _Atomic uint32_t *writer_waits)
{
	if (reader->released == reader->at)
		return false;
	reader->released = reader->at;
	atomic_store(reader->tail, reader->at);
	return is_to_wake(writer_waits, RING_WAITS_ROOM);
}

/* ---- Writing ---- */

uint64_t ring_room(const struct ring_writer *writer)
{
	const uint64_t used = writer->at - atomic_load(writer->tail);
	return used <= writer->bytes ? writer->bytes - used : RING_BROKEN;
}

void ring_write(struct ring_writer *writer, const void *from, uint64_t bytes)
{
	const uint64_t begin = writer->at & (writer->bytes - 1), left = writer->bytes - begin;
	const uint64_t first = bytes < left ? bytes : left;
	memcpy(writer->data + begin, from, first);
	if (first != bytes)
		memcpy(writer->data, (const uint8_t *)from + first, bytes - first);
	writer->at += bytes;
}

bool ring_publish(struct ring_writer *writer, _Atomic uint32_t *reader_waits)
{
	atomic_store(writer->head, writer->at);
	return is_to_wake(reader_waits, RING_WAITS_BYTES);
}
