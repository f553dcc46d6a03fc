#include "proto/frame.h"

#include <inttypes.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"

/* What a frame of a type may carry. */
struct shape {
	const char *name; /* NULL: no such type */
	uint16_t flags;   /* that may be set */
	uint32_t envelope_max;
	uint64_t payload_max;
	bool numbered; /* has a request id; otherwise it is 0 */
};

static const struct shape shapes[] = {
    [FRAME_HELLO] = {"HELLO", 0, BOUND_HELLO_BYTES, 0, false},
    [FRAME_HELLO_REPLY] = {"HELLO_REPLY", 0, BOUND_ENVELOPE_BYTES, 0, false},
    [FRAME_REQUEST] = {"REQUEST", FRAME_CHUNKED, BOUND_ENVELOPE_BYTES, BOUND_PAYLOAD_BYTES, true},
    [FRAME_REPLY] = {"REPLY", FRAME_CHUNKED, BOUND_ENVELOPE_BYTES, BOUND_PAYLOAD_BYTES, true},
    [FRAME_DATA] = {"DATA", 0, FRAME_DATA_OFFSET_BYTES, BOUND_CHUNK_BYTES_MAX, true},
    [FRAME_ABORT] = {"ABORT", 0, 0, 0, true},
    [FRAME_CANCEL] = {"CANCEL", 0, 0, 0, true},
    [FRAME_GOAWAY] = {"GOAWAY", 0, BOUND_ENVELOPE_BYTES, 0, false},
};

uint32_t frame_envelope_bytes(const uint8_t bytes[FRAME_HEADER_BYTES])
{
	return (uint32_t)frame_load_u64(bytes + 16);
}

void frame_encode(const struct frame_header *header, uint8_t out[FRAME_HEADER_BYTES])
{
	frame_store_u64(out, FRAME_MAGIC | (uint64_t)header->version << 32 | (uint64_t)header->type << 40 | (uint64_t)header->flags << 48);
	frame_store_u64(out + 8, header->request_id);
	frame_store_u64(out + 16, header->envelope_bytes); /* and four zeros */
	frame_store_u64(out + 24, header->payload_bytes);
}

/* Who speaks so; NULL: nobody we know. */
static const char *stranger(const uint8_t *bytes)
{
	static const struct {
		const char *prefix;
		const char *who;
	} known[] = {
	    {"GET ", "an HTTP request"},
	    {"POST", "an HTTP request"},
	    {"PUT ", "an HTTP request"},
	    {"HEAD", "an HTTP request"},
	    {"DELE", "an HTTP request"},
	    {"OPTI", "an HTTP request"},
	    {"CONN", "an HTTP request"},
	    {"PATC", "an HTTP request"},
	    {"HTTP", "an HTTP response"},
	    {"PRI ", "HTTP/2 (gRPC?)"},
	    {"SSH-", "SSH"},
	};
	if (bytes[0] == 0x16 && bytes[1] == 0x03)
		return "a TLS handshake, and this is a plain port";
	if (bytes[0] == 0x15 && bytes[1] == 0x03)
		return "a TLS alert, and this is a plain connection";
	for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
		if (memcmp(bytes, known[i].prefix, 4) == 0)
			return known[i].who;
	return NULL;
}

static opd_status fail_magic(const uint8_t *bytes, opd_error *error)
{
	const char *who = stranger(bytes);
	if (who != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: begins like %s, expected \"OPD1\"", who);
	char seen[24];
	return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: begins with \"%s\" (%02x %02x %02x %02x), expected \"OPD1\"",
	                text_escape((const char *)bytes, 4, seen, sizeof seen), bytes[0], bytes[1], bytes[2], bytes[3]);
}

static opd_status check_lengths(const struct frame_header *header, const struct shape *shape, opd_error *error)
{
	if (header->envelope_bytes > shape->envelope_max)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: %s has an envelope of %" PRIu32 " bytes, at most %" PRIu32,
		                shape->name, header->envelope_bytes, shape->envelope_max);
	if (header->payload_bytes > shape->payload_max)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: %s has a payload of %" PRIu64 " bytes, at most %" PRIu64,
		                shape->name, header->payload_bytes, shape->payload_max);
	if (header->type == FRAME_DATA && header->envelope_bytes != FRAME_DATA_OFFSET_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: DATA has an envelope of %" PRIu32 " bytes, expected %u (its offset)",
		                header->envelope_bytes, FRAME_DATA_OFFSET_BYTES);
	if (header->type == FRAME_DATA && header->payload_bytes == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: DATA without a byte of data");
	if ((header->flags & FRAME_CHUNKED) != 0 && header->payload_bytes == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: %s is chunked, but has no payload", shape->name);
	return OPD_OK;
}

static opd_status check_header(const struct frame_header *header, uint32_t reserved, opd_error *error)
{
	if (header->version != FRAME_VERSION)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: version %u, expected %u", header->version, FRAME_VERSION);
	if (header->type >= sizeof shapes / sizeof shapes[0] || shapes[header->type].name == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: type %u, expected 1 (HELLO) to 8 (GOAWAY)", header->type);
	const struct shape *shape = &shapes[header->type];
	if ((header->flags & ~shape->flags) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: %s has flags 0x%04x, may have 0x%04x", shape->name, header->flags,
		                shape->flags);
	if (reserved != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: reserved bytes are 0x%08" PRIx32 ", expected 0", reserved);
	if (!shape->numbered && header->request_id != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "frame: %s has request id %" PRIu64 ", expected 0", shape->name,
		                header->request_id);
	return check_lengths(header, shape, error);
}

opd_status frame_decode(const uint8_t bytes[FRAME_HEADER_BYTES], struct frame_header *header_out, opd_error *error)
{
	const uint64_t first = frame_load_u64(bytes), lengths = frame_load_u64(bytes + 16);
	if ((uint32_t)first != FRAME_MAGIC)
		return fail_magic(bytes, error);
	struct frame_header header = {
	    .version = bytes[4],
	    .type = bytes[5],
	    .flags = (uint16_t)(first >> 48),
	    .request_id = frame_load_u64(bytes + 8),
	    .envelope_bytes = (uint32_t)lengths,
	    .payload_bytes = frame_load_u64(bytes + 24),
	};
	opd_status status = check_header(&header, (uint32_t)(lengths >> 32), error);
	if (status == OPD_OK)
		*header_out = header;
	return status;
}
