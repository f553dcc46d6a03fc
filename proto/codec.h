/* Envelopes to messages and back. The one place that sees protobuf's generated header.
 *
 * Layer: proto, internal. Threads: pure but for the arena.
 * Decoding checks what the envelope alone can tell: protobuf's grammar, bounds (proto/bounds.h), UTF-8 without NUL, ranks, dtypes, list
 * lengths; INVALID_ARGUMENT or RESOURCE_EXHAUSTED (past the arena's cap) with a text that names the field. It doesn't check names against a
 * registry nor sizes against a payload.
 * Encoding writes the envelope into the arena with FRAME_HEADER_BYTES free in front of it, so that header and envelope leave in one piece;
 * RESOURCE_EXHAUSTED when the arena is full.
 * Both allocate from the arena alone: no malloc once its first block is there. */
#ifndef OPD_PROTO_CODEC_H
#define OPD_PROTO_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "proto/arena.h"
#include "proto/frame.h"
#include "proto/message.h"

/* Header and envelope: `frame` begins with FRAME_HEADER_BYTES that the caller fills in by frame_encode. */
struct codec_buffer {
	uint8_t *frame;
	size_t envelope_bytes;
};

OPD_MUST_USE opd_status codec_decode_hello(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_hello *out, opd_error *error);
OPD_MUST_USE opd_status codec_decode_hello_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_hello_reply *out,
                                                 opd_error *error);
OPD_MUST_USE opd_status codec_decode_goaway(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_goaway *out, opd_error *error);
OPD_MUST_USE opd_status codec_decode_request(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out,
                                             opd_error *error);
OPD_MUST_USE opd_status codec_decode_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_reply *out, opd_error *error);

OPD_MUST_USE opd_status codec_encode_hello(struct arena *arena, const struct msg_hello *message, struct codec_buffer *out, opd_error *error);
OPD_MUST_USE opd_status codec_encode_hello_reply(struct arena *arena, const struct msg_hello_reply *message, struct codec_buffer *out,
                                                 opd_error *error);
OPD_MUST_USE opd_status codec_encode_goaway(struct arena *arena, const struct msg_goaway *message, struct codec_buffer *out, opd_error *error);
OPD_MUST_USE opd_status codec_encode_request(struct arena *arena, const struct msg_request *message, struct codec_buffer *out, opd_error *error);
OPD_MUST_USE opd_status codec_encode_reply(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out, opd_error *error);

#endif
