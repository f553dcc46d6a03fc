/* The envelopes that a session sends by the thousand (Run, RunGraph and their reply), read and written by hand: a fifth of protobuf-c's time.
 *
 * Layer: proto, internal: codec.c's. Threads: pure but for the arena.
 * What these take or make is what protobuf-c would (tests/unit/test_plain.c, tests/fuzz/fuzz_codec.c compare them); they say no to everything else: other
 * messages, what is unusual (a field twice, unknown fields), and whatever is wrong, so that there is one place that words errors. A no leaves the arena as it was.
 * Not here: the way through protobuf-c, which is also what they are compared with (codec_unpack_request and its like, in this header only for that). */
#ifndef OPD_PROTO_PLAIN_H
#define OPD_PROTO_PLAIN_H

#include "proto/codec.h"

OPD_MUST_USE bool plain_read_request(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out);
OPD_MUST_USE bool plain_read_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_reply *out);
OPD_MUST_USE bool plain_write_request(struct arena *arena, const struct msg_request *message, struct codec_buffer *out);
OPD_MUST_USE bool plain_write_reply(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out);

/* codec_decode_request and its like, through protobuf-c whatever the envelope is. */
OPD_MUST_USE opd_status codec_unpack_request(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out,
                                             opd_error *error);
OPD_MUST_USE opd_status codec_unpack_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_reply *out, opd_error *error);
OPD_MUST_USE opd_status codec_pack_request(struct arena *arena, const struct msg_request *message, struct codec_buffer *out, opd_error *error);
OPD_MUST_USE opd_status codec_pack_reply(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out, opd_error *error);

#endif
