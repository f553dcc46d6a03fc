#include <stdlib.h>

#include "tests/bench/peer_minimal.h"
#include "tests/bench/report.h"

void minimal_buffer_init(struct minimal_buffer *buffer)
{
	*buffer = (struct minimal_buffer){.bytes = peer_memory(MINIMAL_BUFFER_BYTES), .room = MINIMAL_BUFFER_BYTES};
}

void minimal_buffer_fini(struct minimal_buffer *buffer)
{
	free(buffer->bytes);
	*buffer = (struct minimal_buffer){0};
}

void minimal_buffer_make_room(struct minimal_buffer *buffer, size_t frame_bytes)
{
	char *from = buffer->bytes;
	size_t left = buffer->end - buffer->at;
	if (frame_bytes > buffer->room) {
		buffer->bytes = peer_memory(frame_bytes);
		buffer->room = frame_bytes;
	}
	memmove(buffer->bytes, from + buffer->at, left);
	if (from != buffer->bytes)
		free(from);
	buffer->at = 0;
	buffer->end = left;
}

const struct minimal_header *minimal_buffer_next(struct minimal_buffer *buffer)
{
	const struct minimal_header *header = (const void *)(buffer->bytes + buffer->at);
	size_t left = buffer->end - buffer->at, bytes = sizeof *header;
	if (left >= sizeof *header && !minimal_frame_bytes(header, &bytes))
		bench_fail("minimal: a header of %llu envelope and %llu payload bytes", (unsigned long long)header->envelope_bytes,
		           (unsigned long long)header->payload_bytes);
	if (left < sizeof *header || left < bytes) {
		minimal_buffer_make_room(buffer, bytes);
		return NULL;
	}
	buffer->at += bytes;
	return header;
}
