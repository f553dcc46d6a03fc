/* The frame: a fixed header of 32 bytes, an envelope, a payload. README.md has the layout and a worked example.
 *
 * Layer: proto, internal. Threads: pure.
 * Not here: what an envelope says (proto/codec.h), and reading or writing sockets. */
#ifndef OPD_PROTO_FRAME_H
#define OPD_PROTO_FRAME_H

#include <endian.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "opd/status.h"

#define FRAME_HEADER_BYTES 32u
#define FRAME_MAGIC 0x3144504fu /* "OPD1" as it lies on the wire, read as a little-endian u32 */
#define FRAME_VERSION 1u
#define FRAME_BEGIN_BYTES 5u /* that every frame begins with: magic and version */
#define FRAME_DATA_OFFSET_BYTES 8u /* a DATA frame's envelope: the payload offset, u64 little-endian */

typedef enum frame_type {
	FRAME_HELLO = 1,       /* client → server, first */
	FRAME_HELLO_REPLY = 2, /* server → client, first */
	FRAME_REQUEST = 3,
	FRAME_REPLY = 4,
	FRAME_DATA = 5,   /* both ways: a piece of the payload of the request or reply of this id */
	FRAME_ABORT = 6,  /* client → server: the rest of this request's payload won't come */
	FRAME_CANCEL = 7, /* client → server: this request's result isn't wanted (feature "cancel") */
	FRAME_GOAWAY = 8, /* server → client */
} frame_type;

enum {
	FRAME_CHUNKED = 1u << 0, /* REQUEST, REPLY: the payload follows in DATA frames, none of it here */
};

struct frame_header {
	uint8_t version;
	uint8_t type; /* a frame_type */
	uint16_t flags;
	uint64_t request_id;
	uint32_t envelope_bytes;
	uint64_t payload_bytes; /* of the whole request or reply, also when it is chunked; of a DATA frame: its bytes */
};

void frame_encode(const struct frame_header *header, uint8_t out[FRAME_HEADER_BYTES]);

/* Checks magic, version, type, flags and reserved bits: all that a header alone can tell. INVALID_ARGUMENT with what was seen; the connection
 * can't go on, since the next frame's place is unknown. HTTP and TLS on a plain port are recognised and said so. */
OPD_MUST_USE opd_status frame_decode(const uint8_t bytes[FRAME_HEADER_BYTES], struct frame_header *header_out, opd_error *error);

/* What frame_decode would find, for whoever has a header and needs to know how much belongs to it. */
uint32_t frame_envelope_bytes(const uint8_t bytes[FRAME_HEADER_BYTES]);

/* u64 little-endian at any alignment. */
static inline uint64_t frame_load_u64(const uint8_t *bytes)
{
	uint64_t value;
	memcpy(&value, bytes, sizeof value);
	return le64toh(value);
}

static inline void frame_store_u64(uint8_t *bytes, uint64_t value)
{
	value = htole64(value);
	memcpy(bytes, &value, sizeof value);
}

#endif
