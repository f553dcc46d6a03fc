/* Frames' headers and envelopes: what decodes must encode, and decode to the same again; the hand-written codec does what protobuf-c does. */
#include "../lib/plain_same.h"
#include "fuzz.h"

#define CAP_BYTES (16u << 20)

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

static void check_again(const struct codec_buffer *first, const struct codec_buffer *second)
{
	if (first->envelope_bytes != second->envelope_bytes ||
	    memcmp(first->frame + FRAME_HEADER_BYTES, second->frame + FRAME_HEADER_BYTES, first->envelope_bytes) != 0)
		fuzz_fail("a message that was decoded, encoded, decoded and encoded has changed");
}

static void try_request(struct arena *arena, const uint8_t *data, size_t bytes)
{
	struct msg_request message;
	struct codec_buffer first, second;
	opd_error error;
	bool plain;
	const char *wrong = plain_same_request(arena, data, bytes, &plain);
	if (wrong != NULL)
		fuzz_fail("%s", wrong);
	if (codec_decode_request(arena, data, bytes, &message, &error) != OPD_OK || codec_encode_request(arena, &message, &first, &error) != OPD_OK)
		return;
	if (codec_decode_request(arena, first.frame + FRAME_HEADER_BYTES, first.envelope_bytes, &message, &error) != OPD_OK ||
	    codec_encode_request(arena, &message, &second, &error) != OPD_OK)
		fuzz_fail("what was encoded can't be decoded: %s", error.text);
	check_again(&first, &second);
}

static void try_reply(struct arena *arena, const uint8_t *data, size_t bytes)
{
	struct msg_reply message;
	struct codec_buffer first, second;
	opd_error error;
	bool plain;
	const char *wrong = plain_same_reply(arena, data, bytes, &plain);
	if (wrong != NULL)
		fuzz_fail("%s", wrong);
	if (codec_decode_reply(arena, data, bytes, &message, &error) != OPD_OK || codec_encode_reply(arena, &message, &first, &error) != OPD_OK)
		return;
	if (codec_decode_reply(arena, first.frame + FRAME_HEADER_BYTES, first.envelope_bytes, &message, &error) != OPD_OK ||
	    codec_encode_reply(arena, &message, &second, &error) != OPD_OK)
		fuzz_fail("what was encoded can't be decoded: %s", error.text);
	check_again(&first, &second);
}

static void try_greetings(struct arena *arena, const uint8_t *data, size_t bytes)
{
	struct msg_hello hello;
	struct msg_hello_reply reply;
	struct msg_goaway goaway;
	struct codec_buffer buffer;
	opd_error error;
	bool fits = true;
	if (codec_decode_hello(arena, data, bytes, &hello, &error) == OPD_OK)
		fits = codec_encode_hello(arena, &hello, &buffer, &error) == OPD_OK;
	if (codec_decode_hello_reply(arena, data, bytes, &reply, &error) == OPD_OK)
		fits = codec_encode_hello_reply(arena, &reply, &buffer, &error) == OPD_OK && fits;
	if (codec_decode_goaway(arena, data, bytes, &goaway, &error) == OPD_OK)
		fits = codec_encode_goaway(arena, &goaway, &buffer, &error) == OPD_OK && fits;
	if (!fits)
		fuzz_fail("a greeting that was decoded can't be encoded: %s", error.text);
}

static void try_header(const uint8_t *data)
{
	struct frame_header header;
	uint8_t out[FRAME_HEADER_BYTES];
	opd_error error;
	if (frame_decode(data, &header, &error) != OPD_OK)
		return;
	frame_encode(&header, out);
	if (memcmp(out, data, sizeof out) != 0)
		fuzz_fail("a header that was decoded encodes to another");
}

/* The first byte says as what the rest is taken. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct arena arena;
	if (bytes == 0)
		return 0;
	arena_init(&arena, CAP_BYTES);
	switch (data[0] % 4) {
	case 0:
		try_request(&arena, data + 1, bytes - 1);
		break;
	case 1:
		try_reply(&arena, data + 1, bytes - 1);
		break;
	case 2:
		try_greetings(&arena, data + 1, bytes - 1);
		break;
	default:
		if (bytes > FRAME_HEADER_BYTES)
			try_header(data + 1);
	}
	arena_fini(&arena);
	return 0;
}
