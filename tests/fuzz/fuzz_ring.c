/* One end of a ring against a peer that writes anything into the memory that they share, between any two steps. */
#include <stdlib.h>

#include "fuzz.h"
#include "proto/ring.h"

#define BYTES 4096u /* the smallest ring there is */

/* Its own allocation each, so that a sanitizer sees a byte too many. */
static struct ring_header *header;
static uint8_t *data_in, *data_out;
static unsigned wakes;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

/* Indices that could be, and those that can't. */
static uint64_t pick_index(struct fuzz_input *input, uint64_t at)
{
	const uint8_t byte = fuzz_u8(input);
	switch (byte % 8) {
	case 0:
		return at;
	case 1:
		return at + fuzz_u8(input);
	case 2:
		return at + BYTES;
	case 3:
		return at + BYTES + 1;
	case 4:
		return at - 1 - fuzz_u8(input);
	case 5:
		return fuzz_u64(input);
	default:
		return at + ((uint64_t)fuzz_u8(input) << 4);
	}
}

/* False: the ring is broken, and its session would end. */
static bool read_some(struct ring_reader *reader, struct fuzz_input *input)
{
	const uint64_t filled = ring_filled(reader);
	if (filled == RING_BROKEN)
		return false;
	if (filled > BYTES)
		fuzz_fail("%llu bytes in a ring of %u", (unsigned long long)filled, BYTES);
	const uint64_t count = filled == 0 ? 0 : fuzz_u64(input) % (filled + 1);
	uint8_t *copy = malloc(count + 1);
	if (copy == NULL)
		fuzz_fail("out of memory");
	const uint64_t at = reader->at;
	ring_read(reader, copy, count);
	for (uint64_t i = 0; i < count; i++)
		if (copy[i] != data_in[(at + i) % BYTES])
			fuzz_fail("byte %llu of a read isn't the ring's", (unsigned long long)i);
	free(copy);
	if (fuzz_u8(input) % 2 == 0)
		wakes += ring_release(reader, &header->client_waits);
	return true;
}

static bool write_some(struct ring_writer *writer, struct fuzz_input *input)
{
	const uint64_t room = ring_room(writer);
	if (room == RING_BROKEN)
		return false;
	if (room > BYTES)
		fuzz_fail("room for %llu bytes in a ring of %u", (unsigned long long)room, BYTES);
	const uint64_t count = room == 0 ? 0 : fuzz_u64(input) % (room + 1);
	uint8_t *bytes = malloc(count + 1);
	if (bytes == NULL)
		fuzz_fail("out of memory");
	memset(bytes, fuzz_u8(input), count);
	const uint64_t at = writer->at;
	ring_write(writer, bytes, count);
	for (uint64_t i = 0; i < count; i++)
		if (data_out[(at + i) % BYTES] != bytes[i])
			fuzz_fail("byte %llu of a write isn't in the ring", (unsigned long long)i);
	free(bytes);
	if (fuzz_u8(input) % 2 == 0)
		wakes += ring_publish(writer, &header->client_waits);
	return true;
}

static void disturb(struct fuzz_input *input, const struct ring_reader *reader, const struct ring_writer *writer)
{
	size_t count;
	switch (fuzz_u8(input) % 6) {
	case 0:
	case 1:
		atomic_store(&header->request_head, pick_index(input, reader->at));
		return;
	case 2:
		atomic_store(&header->reply_tail, pick_index(input, writer->at - BYTES));
		return;
	case 3: /* words that are ours */
		atomic_store(&header->request_tail, fuzz_u64(input));
		atomic_store(&header->reply_head, fuzz_u64(input));
		return;
	case 4:
		atomic_store(&header->server_waits, fuzz_u8(input));
		atomic_store(&header->client_waits, fuzz_u8(input));
		return;
	default: {
		const uint64_t at = fuzz_u64(input) % BYTES;
		const uint8_t *bytes = fuzz_bytes(input, 64, &count);
		for (size_t i = 0; i < count; i++)
			data_in[(at + i) % BYTES] = data_out[(at + i) % BYTES] = bytes[i];
		return;
	}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_input input = {data, bytes};
	struct ring_reader reader;
	struct ring_writer writer;
	bool sound = ring_bytes_valid(BYTES);
	header = aligned_alloc(64, sizeof *header);
	data_in = calloc(1, BYTES);
	data_out = calloc(1, BYTES);
	if (header == NULL || data_in == NULL || data_out == NULL || !sound)
		fuzz_fail("no ring");
	memset(header, 0, sizeof *header);
	ring_reader_init(&reader, &header->request_head, &header->request_tail, data_in, BYTES);
	ring_writer_init(&writer, &header->reply_head, &header->reply_tail, data_out, BYTES);
	while (sound && input.bytes > 0) {
		switch (fuzz_u8(&input) % 4) {
		case 0:
			sound = read_some(&reader, &input);
			break;
		case 1:
			sound = write_some(&writer, &input);
			break;
		default:
			disturb(&input, &reader, &writer);
			ring_wait(&header->server_waits, fuzz_u8(&input) % 4);
		}
	}
	free(header);
	free(data_in);
	free(data_out);
	return 0;
}
