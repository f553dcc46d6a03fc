/* The minimal peer's frames, as server (peer_minimal.c) and client (peer_minimal_client.c) see them.
 *
 * Layer: bench, internal to the minimal peer. Threads: any.
 * A frame: struct minimal_header, a protobuf envelope, zeros up to a multiple of 64, the payload, zeros up to a multiple of 64. So
 * payloads lie aligned wherever frames follow each other in one buffer. */
#ifndef OPD_BENCH_PEER_MINIMAL_H
#define OPD_BENCH_PEER_MINIMAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tests/bench/peer_program.h"

struct minimal_header {
	uint64_t envelope_bytes;
	uint64_t payload_bytes;
};

#define MINIMAL_HEAD_BYTES 256 /* the most that header and envelope take */
#define MINIMAL_PAYLOAD_BYTES ((uint64_t)1 << 30)
#define MINIMAL_BUFFER_BYTES ((size_t)256 << 10)
#define MINIMAL_DTYPE_F32 9

static inline size_t minimal_padded(size_t bytes)
{
	return (bytes + 63) & ~(size_t)63;
}

static inline size_t minimal_head_bytes(const struct minimal_header *header)
{
	return minimal_padded(sizeof *header + header->envelope_bytes);
}

/* The whole frame. False: the header isn't one of ours. */
static inline bool minimal_frame_bytes(const struct minimal_header *header, size_t *bytes_out)
{
	if (header->envelope_bytes > MINIMAL_HEAD_BYTES - sizeof *header || header->payload_bytes > MINIMAL_PAYLOAD_BYTES)
		return false;
	*bytes_out = minimal_head_bytes(header) + minimal_padded(header->payload_bytes);
	return true;
}

/* Received bytes, of which [at, end) are still to be read. */
struct minimal_buffer {
	char *bytes;
	size_t room;
	size_t at;
	size_t end;
};

void minimal_buffer_init(struct minimal_buffer *buffer);
void minimal_buffer_fini(struct minimal_buffer *buffer);

/* The next whole frame, consumed; NULL: more must be received, for which there is room behind `end` now. Frames that were handed
 * out before are gone then. */
const struct minimal_header *minimal_buffer_next(struct minimal_buffer *buffer);

/* Moves what is left to the front, into larger memory where a frame of so many bytes doesn't fit otherwise. */
void minimal_buffer_make_room(struct minimal_buffer *buffer, size_t frame_bytes);

extern const struct peer_program_ops minimal_client;

#endif
