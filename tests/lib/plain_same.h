/* Does the hand-written codec (proto/plain.h) do what protobuf-c does? For its test and its fuzz target.
 *
 * Layer: tests. Both functions return NULL when both ways agree, else what is wrong. *plain_out: the hand-written way took the envelope.
 * Messages are compared as protobuf-c encodes them; it leaves out what has no meaning (a handle without a generation). */
#ifndef OPD_TESTS_PLAIN_SAME_H
#define OPD_TESTS_PLAIN_SAME_H

#include <string.h>

#include "proto/plain.h"

static inline bool plain_same_bytes(const struct codec_buffer *a, const struct codec_buffer *b)
{
	return a->envelope_bytes == b->envelope_bytes && memcmp(a->frame + FRAME_HEADER_BYTES, b->frame + FRAME_HEADER_BYTES, a->envelope_bytes) == 0;
}

static inline const char *plain_same_request(struct arena *arena, const uint8_t *envelope, size_t bytes, bool *plain_out)
{
	struct msg_request plain, packed;
	struct codec_buffer a, b, c;
	opd_error error;
	const struct arena_mark mark = arena_mark(arena);
	*plain_out = plain_read_request(arena, envelope, bytes, &plain);
	if (!*plain_out)
		return mark.next != NULL && arena->next != mark.next ? "a refusal left something in the arena" : NULL;
	const opd_status status = codec_unpack_request(arena, envelope, bytes, &packed, &error);
	if (status == OPD_RESOURCE_EXHAUSTED)
		return NULL; /* protobuf-c takes more memory */
	if (status != OPD_OK)
		return "protobuf-c refuses the request";
	if (codec_pack_request(arena, &packed, &a, &error) != OPD_OK || codec_pack_request(arena, &plain, &b, &error) != OPD_OK)
		return NULL;
	if (!plain_same_bytes(&a, &b))
		return "protobuf-c decodes another request";
	if (!plain_write_request(arena, &packed, &c))
		return "the request isn't written";
	return plain_same_bytes(&a, &c) ? NULL : "protobuf-c encodes another request";
}

static inline const char *plain_same_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, bool *plain_out)
{
	struct msg_reply plain, packed;
	struct codec_buffer a, b, c;
	opd_error error;
	const struct arena_mark mark = arena_mark(arena);
	*plain_out = plain_read_reply(arena, envelope, bytes, &plain);
	if (!*plain_out)
		return mark.next != NULL && arena->next != mark.next ? "a refusal left something in the arena" : NULL;
	const opd_status status = codec_unpack_reply(arena, envelope, bytes, &packed, &error);
	if (status == OPD_RESOURCE_EXHAUSTED)
		return NULL;
	if (status != OPD_OK)
		return "protobuf-c refuses the reply";
	if (codec_pack_reply(arena, &packed, &a, &error) != OPD_OK || codec_pack_reply(arena, &plain, &b, &error) != OPD_OK)
		return NULL;
	if (!plain_same_bytes(&a, &b))
		return "protobuf-c decodes another reply";
	if (!plain_write_reply(arena, &packed, &c))
		return "the reply isn't written";
	return plain_same_bytes(&a, &c) ? NULL : "protobuf-c encodes another reply";
}

#endif
