/* The parts of the wire below the envelopes: frame headers, texts of a peer, the arena. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "proto/arena.h"
#include "proto/bounds.h"
#include "proto/frame.h"
#include "proto/text.h"

/* ---- Frame headers ----------------------------------------------------------------------------------------------------- */

static void ck_frame(const struct frame_header *header, const char *text_part)
{
	uint8_t bytes[FRAME_HEADER_BYTES];
	frame_encode(header, bytes);
	struct frame_header out;
	opd_error error = {0};
	opd_status status = frame_decode(bytes, &out, &error);
	if (text_part == NULL) {
		ck_assert_msg(status == OPD_OK, "%s", error.text);
		ck_assert(out.type == header->type && out.flags == header->flags && out.request_id == header->request_id);
		ck_assert(out.envelope_bytes == header->envelope_bytes && out.payload_bytes == header->payload_bytes);
		return;
	}
	ck_assert_int_eq(status, OPD_INVALID_ARGUMENT);
	ck_assert_msg(strstr(error.text, text_part) != NULL, "\"%s\" in: %s", text_part, error.text);
}

#define FRAME(...) (&(struct frame_header){.version = FRAME_VERSION, __VA_ARGS__})

START_TEST(frame_headers_are_checked)
{
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = UINT64_MAX, .envelope_bytes = 1, .payload_bytes = BOUND_PAYLOAD_BYTES),
	         NULL);
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = 1, .envelope_bytes = BOUND_ENVELOPE_BYTES), NULL);
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = 1, .payload_bytes = BOUND_PAYLOAD_BYTES + 1),
	         "payload of 1099511627777 bytes");
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = 1, .payload_bytes = 1ull << 63), "payload of 9223372036854775808 bytes");
	ck_frame(FRAME(.type = FRAME_REPLY, .request_id = 1, .payload_bytes = UINT64_MAX), "payload of 18446744073709551615 bytes");
	ck_frame(FRAME(.type = FRAME_REQUEST, .envelope_bytes = BOUND_ENVELOPE_BYTES + 1),
	         "envelope of 16777217 bytes, at most 16777216");
	ck_frame(FRAME(.type = FRAME_REQUEST, .envelope_bytes = UINT32_MAX), "envelope of 4294967295 bytes");
	ck_frame(FRAME(.type = FRAME_HELLO, .envelope_bytes = BOUND_HELLO_BYTES + 1),
	         "HELLO has an envelope of 4097 bytes, at most 4096");
	ck_frame(FRAME(.type = FRAME_HELLO, .payload_bytes = 1), "HELLO has a payload of 1 bytes, at most 0");
	ck_frame(FRAME(.type = FRAME_HELLO, .request_id = 1), "HELLO has request id 1, expected 0");
	ck_frame(FRAME(.type = 0), "type 0");
	ck_frame(FRAME(.type = 9), "type 9");
	ck_frame(FRAME(.type = 255), "type 255");
	ck_frame(FRAME(.type = FRAME_REQUEST, .flags = 2), "REQUEST has flags 0x0002, may have 0x0001");
	ck_frame(FRAME(.type = FRAME_DATA, .flags = 1, .envelope_bytes = 8, .payload_bytes = 1), "DATA has flags 0x0001");
	ck_frame(FRAME(.type = FRAME_REQUEST, .flags = FRAME_CHUNKED, .payload_bytes = 0), "chunked");
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 8, .payload_bytes = 64), NULL);
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 7, .payload_bytes = 64),
	         "envelope of 7 bytes, expected 8");
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 9, .payload_bytes = 64),
	         "envelope of 9 bytes, at most 8");
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 8), "without a byte");
	ck_frame(FRAME(.type = FRAME_DATA, .envelope_bytes = 8, .payload_bytes = BOUND_CHUNK_BYTES_MAX + 1),
	         "payload of 67108865 bytes");
	ck_frame(FRAME(.type = FRAME_ABORT, .request_id = 1, .envelope_bytes = 1), "ABORT has an envelope of 1 bytes");
	ck_frame(&(struct frame_header){.version = 2, .type = FRAME_HELLO}, "version 2, expected 1");
}
END_TEST

START_TEST(reserved_bytes_of_a_frame_are_zero)
{
	for (int i = 20; i < 24; i++) {
		uint8_t bytes[FRAME_HEADER_BYTES];
		frame_encode(FRAME(.type = FRAME_HELLO), bytes);
		bytes[i] = 1;
		struct frame_header header;
		opd_error error;
		ck_assert_int_eq(frame_decode(bytes, &header, &error), OPD_INVALID_ARGUMENT);
		ck_assert_ptr_nonnull(strstr(error.text, "reserved"));
	}
}
END_TEST

START_TEST(strangers_are_recognised)
{
	static const struct {
		const char *bytes;
		const char *text;
	} cases[] = {
	    {"GET / HTTP/1.1\r\nHost: example\r\n\r\n", "HTTP request"},
	    {"POST /v1/run HTTP/1.1\r\nHost: exam\r\n", "HTTP request"},
	    {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n--------", "gRPC"},
	    {"HTTP/1.1 400 Bad Request\r\n\r\n----", "HTTP response"},
	    {"\x16\x03\x01\x02------------------------------", "TLS"},
	    {"\x1b[2J\n-------------------------------", "\"\\x1b[2J\" (1b 5b 32 4a)"},
	    {"OPD2--------------------------------", "\"OPD2\" (4f 50 44 32), expected \"OPD1\""},
	};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		struct frame_header header;
		opd_error error;
		ck_assert_int_eq(frame_decode((const uint8_t *)cases[i].bytes, &header, &error), OPD_INVALID_ARGUMENT);
		ck_assert_msg(strstr(error.text, cases[i].text) != NULL, "\"%s\" in: %s", cases[i].text, error.text);
	}
}
END_TEST

/* ---- Texts ------------------------------------------------------------------------------------------------------------- */

static void ck_escape(const char *text, size_t bytes, const char *expected)
{
	char out[64];
	ck_assert_str_eq(text_escape(text, bytes, out, sizeof out), expected);
}

START_TEST(escaped_text_is_fit_for_a_terminal)
{
	ck_escape("plain, grüße 世界", strlen("plain, grüße 世界"), "plain, grüße 世界");
	ck_escape("a\nb\tc\rd", 7, "a\\nb\\tc\\x0dd");
	ck_escape("\0\x1b[31m\x7f", 7, "\\x00\\x1b[31m\\x7f");
	ck_escape("\xc2\x9b", 2, "\\u{009b}");           /* C1: CSI */
	ck_escape("\xe2\x80\xae", 3, "\\u{202e}");       /* right-to-left override */
	ck_escape("\xe2\x81\xa6", 3, "\\u{2066}");       /* left-to-right isolate */
	ck_escape("\xe2\x80\xa8", 3, "\\u{2028}");       /* line separator */
	ck_escape("\xef\xbb\xbf", 3, "\\u{feff}");       /* byte order mark */
	ck_escape("\xf3\xa0\x81\x81", 4, "\\u{e0041}");  /* tag */
	ck_escape("\xed\xa0\x80", 3, "\\xed\\xa0\\x80"); /* surrogate */
	ck_escape("\xc0\xaf\xff", 3, "\\xc0\\xaf\\xff"); /* overlong */
	ck_escape("\xe2\x82", 2, "\\xe2\\x82");          /* cut */
	ck_escape("", 0, "");
}
END_TEST

START_TEST(escaped_text_is_cut_and_says_so)
{
	char out[64];
	for (size_t size = 8; size < 40; size++) {
		char *exact = malloc(size);
		(void)text_escape("0123456789abcdefghij", 20, exact, size);
		if (size > 20)
			ck_assert_str_eq(exact, "0123456789abcdefghij");
		else
			ck_assert(strlen(exact) == size - 1 && strcmp(exact + size - 4, "…") == 0);
		free(exact);
	}
	/* Pieces are never halved. */
	ck_assert_str_eq(text_escape("\n\n\n\n\n", 5, out, 8), "\\n\\n…");
	ck_assert_str_eq(text_escape("世界世界", 12, out, 10), "世界…");
	ck_assert_str_eq(text_escape("\xe2\x80\xae\xe2\x80\xae", 6, out, 8), "…");
	for (size_t size = 8; size < 30; size++) {
		(void)text_escape("ab\xe2\x80\xae世\n\xff界\x1b", 13, out, size);
		ck_assert(strlen(out) < size && text_valid(out, strlen(out)));
	}
}
END_TEST

START_TEST(names_match_their_grammar)
{
	static const char *const good[] = {"a", "_", "rms_norm", "_x9", "f8_e4m3fn"};
	static const char *const bad[] = {"", "9a", "A", "a-b", "a b", "ä", "a.b", "*"};
	for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
		ck_assert(text_is_name(good[i], strlen(good[i])));
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
		ck_assert(!text_is_name(bad[i], strlen(bad[i])));
	char name[BOUND_NAME_BYTES + 1];
	memset(name, 'a', sizeof name);
	ck_assert(text_is_name(name, BOUND_NAME_BYTES) && !text_is_name(name, BOUND_NAME_BYTES + 1));
	ck_assert(!text_is_name("a\0b", 3) && !text_valid("a\0b", 3) && text_valid("\x7f\x01", 2));
}
END_TEST

/* ---- Arena ------------------------------------------------------------------------------------------------------------- */

START_TEST(the_arena_is_aligned_bounded_and_reusable)
{
	struct arena arena;
	arena_init(&arena, 100000);
	ck_assert_uint_eq(arena.used_bytes, 0);
	ck_assert_ptr_nonnull(arena_alloc(&arena, 0));
	size_t total = 0;
	for (size_t bytes = 1;; bytes = bytes * 7 % 4093) {
		unsigned char *p = arena_alloc(&arena, bytes);
		if (p == NULL)
			break;
		ck_assert_uint_eq((uintptr_t)p % 16, 0);
		memset(p, 0xa5, bytes);
		total += bytes;
	}
	ck_assert_uint_gt(total, 50000);
	ck_assert_uint_le(arena.used_bytes, 100000);
	arena_reset(&arena);
	ck_assert_uint_le(arena.used_bytes, 4096);
	ck_assert_ptr_nonnull(arena.blocks);
	const unsigned char *zeroed = arena_zalloc(&arena, 1000);
	for (int i = 0; i < 1000; i++)
		ck_assert_uint_eq(zeroed[i], 0);
	arena_fini(&arena);
	arena_fini(&arena);
}
END_TEST

START_TEST(the_arena_refuses_what_cannot_be)
{
	struct arena arena;
	arena_init(&arena, SIZE_MAX);
	ck_assert_ptr_null(arena_alloc(&arena, SIZE_MAX));
	ck_assert_ptr_null(arena_alloc(&arena, SIZE_MAX - 15));
	ck_assert_ptr_null(arena_array(&arena, SIZE_MAX / 2, 4));
	ck_assert_ptr_null(arena_text(&arena, "", SIZE_MAX));
	ck_assert_str_eq(arena_text(&arena, "abcdef", 3), "abc");
	arena_fini(&arena);
	arena_init(&arena, 1u << 20);
	ck_assert_ptr_nonnull(arena_alloc(&arena, 500000)); /* a large first block isn't kept */
	arena_reset(&arena);
	ck_assert_uint_eq(arena.used_bytes, 0);
	ck_assert_ptr_null(arena_alloc(&arena, 1u << 20));
	ck_assert_ptr_nonnull(arena_alloc(&arena, (1u << 20) - 16));
	arena_fini(&arena);
}
END_TEST

/* ---- Suite ------------------------------------------------------------------------------------------------------------- */

static TCase *tcase(Suite *suite, const char *name)
{
	TCase *made = tcase_create(name);
	tcase_set_timeout(made, 120);
	suite_add_tcase(suite, made);
	return made;
}

int main(void)
{
	Suite *suite = suite_create("frame");
	TCase *frames = tcase(suite, "frame headers");
	tcase_add_test(frames, frame_headers_are_checked);
	tcase_add_test(frames, reserved_bytes_of_a_frame_are_zero);
	tcase_add_test(frames, strangers_are_recognised);
	TCase *texts = tcase(suite, "texts");
	tcase_add_test(texts, escaped_text_is_fit_for_a_terminal);
	tcase_add_test(texts, escaped_text_is_cut_and_says_so);
	tcase_add_test(texts, names_match_their_grammar);
	TCase *memory = tcase(suite, "arena");
	tcase_add_test(memory, the_arena_is_aligned_bounded_and_reusable);
	tcase_add_test(memory, the_arena_refuses_what_cannot_be);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
