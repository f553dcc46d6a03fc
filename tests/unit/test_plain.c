/* The hand-written codec against protobuf-c: golden frames, frames with random changes, random messages, encodings that nobody writes. */
#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../lib/plain_same.h"
#include "proto/bounds.h"
#include "tests/lib/suite.h"

#define ARENA_CAP (8u << 20)
#define CHANGES 4000 /* of each golden frame */
#define MESSAGES 5000

static uint64_t seed = 20261126;

static uint32_t chance(uint32_t below)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(seed >> 33) % below;
}

static void ck_same(bool reply, struct arena *arena, const uint8_t *envelope, size_t bytes, bool *plain, const char *what)
{
	/* As long as the envelope: ASan sees one byte too many. */
	uint8_t *copy = malloc(bytes == 0 ? 1 : bytes);
	ck_assert_ptr_nonnull(copy);
	if (bytes != 0)
		memcpy(copy, envelope, bytes);
	const char *wrong = reply ? plain_same_reply(arena, copy, bytes, plain) : plain_same_request(arena, copy, bytes, plain);
	free(copy);
	ck_assert_msg(wrong == NULL, "%s: %s", what, wrong);
	arena_reset(arena);
}

/* ---- Golden frames ---- */

struct golden {
	char name[128];
	uint8_t bytes[8192];
	size_t length;
	bool reply;
};

static bool golden_load(struct golden *golden, const char *name)
{
	char path[512], line[512];
	(void)snprintf(path, sizeof path, OPD_TESTS_DIR "/golden/frames/%s", name);
	(void)snprintf(golden->name, sizeof golden->name, "%s", name);
	FILE *file = fopen(path, "r");
	ck_assert_ptr_nonnull(file);
	golden->length = 0;
	while (fgets(line, sizeof line, file) != NULL) {
		unsigned byte;
		int used;
		for (const char *at = line; line[0] != '#' && sscanf(at, "%2x%n", &byte, &used) == 1; at += used) {
			ck_assert_uint_lt(golden->length, sizeof golden->bytes);
			golden->bytes[golden->length++] = (uint8_t)byte;
		}
	}
	(void)fclose(file);
	struct frame_header header;
	ck_assert_int_eq(frame_decode(golden->bytes, &header, NULL), OPD_OK);
	golden->reply = header.type == FRAME_REPLY;
	golden->length = header.envelope_bytes;
	memmove(golden->bytes, golden->bytes + FRAME_HEADER_BYTES, header.envelope_bytes);
	return header.type == FRAME_REQUEST || header.type == FRAME_REPLY;
}

/* Returns how many there were. */
static int golden_each(void (*visit)(const struct golden *golden))
{
	DIR *folder = opendir(OPD_TESTS_DIR "/golden/frames");
	ck_assert_ptr_nonnull(folder);
	static struct golden golden;
	int count = 0;
	for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
		const char *dot = strrchr(entry->d_name, '.');
		if (dot != NULL && strcmp(dot, ".hex") == 0 && golden_load(&golden, entry->d_name)) {
			visit(&golden);
			count++;
		}
	}
	(void)closedir(folder);
	return count;
}

static int plain_count;

static void visit_golden(const struct golden *golden)
{
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	bool plain;
	ck_same(golden->reply, &arena, golden->bytes, golden->length, &plain, golden->name);
	plain_count += plain;
	arena_fini(&arena);
}

START_TEST(every_golden_run_and_its_reply_is_taken_as_protobuf_takes_it)
{
	plain_count = 0;
	ck_assert_int_gt(golden_each(visit_golden), 30);
	ck_assert_int_ge(plain_count, 5);
}
END_TEST

/* ---- Changes ---- */

/* One change, of a kind that finds its way into the middle of a message: a byte, a bit, a piece dropped, doubled, or moved. */
static size_t change(uint8_t *bytes, size_t length, size_t room)
{
	const size_t at = chance((uint32_t)length), piece = 1 + chance(12);
	switch (chance(6)) {
	case 0:
		bytes[at] = (uint8_t)chance(256);
		return length;
	case 1:
		bytes[at] ^= (uint8_t)(1u << chance(8));
		return length;
	case 2:
		bytes[at] = (uint8_t)(bytes[at] + 1);
		return length;
	case 3:
		if (at + piece >= length)
			return length;
		memmove(bytes + at, bytes + at + piece, length - at - piece);
		return length - piece;
	case 4:
		if (at + piece > length || length + piece > room)
			return length;
		memmove(bytes + at + piece, bytes + at, length - at);
		return length + piece;
	default:
		if (length + 1 > room)
			return length;
		memmove(bytes + at + 1, bytes + at, length - at);
		bytes[at] = (uint8_t)chance(256);
		return length + 1;
	}
}

static void visit_changed(const struct golden *golden)
{
	static uint8_t bytes[8192 + 64];
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	for (int i = 0; golden->length != 0 && i < CHANGES; i++) {
		memcpy(bytes, golden->bytes, golden->length);
		size_t length = golden->length;
		for (uint32_t changes = 1 + chance(3); changes > 0 && length > 1; changes--)
			length = change(bytes, length, sizeof bytes);
		bool plain;
		ck_same(golden->reply, &arena, bytes, length, &plain, golden->name);
		plain_count += plain;
	}
	arena_fini(&arena);
}

START_TEST(no_change_of_a_golden_frame_is_taken_as_something_else)
{
	plain_count = 0;
	(void)golden_each(visit_changed);
	ck_assert_int_gt(plain_count, 1000);
}
END_TEST

/* ---- Random messages ---- */

static uint64_t random_number(void)
{
	const uint64_t wide = (uint64_t)chance(UINT32_MAX) << 32 | chance(UINT32_MAX);
	static const uint64_t edges[] = {0, 1, 127, 128, 16383, 16384, UINT32_MAX, INT64_MAX, (uint64_t)INT64_MIN, UINT64_MAX};
	return chance(2) == 0 ? edges[chance(10)] : wide >> chance(64);
}

static struct msg_text random_text(void)
{
	static const char *const texts[] = {"", "x", "rms_norm", "schön", "a name that is so long that its length still takes one byte",
	                                    "one that takes more: 0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890"};
	return msg_text(texts[chance(6)]);
}

static void random_tensor(struct msg_tensor *tensor)
{
	*tensor = (struct msg_tensor){.dtype = (opd_dtype)chance(OPD_DTYPE_COUNT), .rank = chance(OPD_RANK_MAX + 1), .donate = chance(2), .byte_offset = random_number()};
	tensor->strided = tensor->rank != 0 && chance(2);
	for (uint32_t i = 0; i < tensor->rank; i++) {
		tensor->shape[i] = (int64_t)random_number();
		tensor->strides[i] = (int64_t)random_number();
	}
	tensor->source = (msg_source)chance(MSG_SOURCE_NODE + 1);
	switch (tensor->source) {
	case MSG_SOURCE_NONE:
		break;
	case MSG_SOURCE_INLINE:
		tensor->inlined.data = (const uint8_t *)"0123456789";
		tensor->inlined.bytes = chance(11);
		break;
	case MSG_SOURCE_PAYLOAD:
		tensor->payload.offset = random_number();
		tensor->payload.bytes = random_number();
		break;
	case MSG_SOURCE_HANDLE:
		tensor->handle = (struct msg_handle){(uint32_t)random_number(), random_number() | 1};
		break;
	case MSG_SOURCE_RESULT:
		tensor->result.request = random_number();
		tensor->result.output = (uint32_t)random_number();
		break;
	case MSG_SOURCE_SHARED:
		tensor->shared.region = (uint32_t)random_number();
		tensor->shared.offset = random_number();
		tensor->shared.bytes = random_number();
		break;
	case MSG_SOURCE_GRAPH_INPUT:
		tensor->graph_input = (uint32_t)random_number();
		break;
	case MSG_SOURCE_NODE:
		tensor->node = (struct msg_node_output){(uint32_t)random_number(), (uint32_t)random_number()};
		break;
	}
}

static struct msg_arg random_arg(struct msg_tensor *tensor)
{
	static const int64_t ints[] = {0, -1, 1, INT64_MAX, INT64_MIN, 300};
	struct msg_arg arg = {.name = random_text(), .kind = (msg_arg_kind)chance(MSG_ARG_STR + 1)};
	switch (arg.kind) {
	case MSG_ARG_NONE:
		break;
	case MSG_ARG_TENSOR:
	case MSG_ARG_TENSORS: /* written by hand, read by protobuf-c */
		random_tensor(tensor);
		arg.count = 1;
		arg.tensor = tensor;
		break;
	case MSG_ARG_INT:
		arg.i = (int64_t)random_number();
		break;
	case MSG_ARG_INTS:
		arg.count = chance(7);
		arg.ints = ints;
		break;
	case MSG_ARG_FLOAT:
		arg.f = (double)(int64_t)random_number() / 3;
		break;
	case MSG_ARG_BOOL:
		arg.b = chance(2);
		break;
	case MSG_ARG_STR:
		arg.str = random_text();
		break;
	}
	return arg;
}

struct parts {
	struct msg_tensor tensors[8];
	struct msg_arg args[8];
	struct msg_output_option options[4];
	struct msg_text names[4];
	struct msg_result results[4];
	struct msg_handle states[4];
	struct msg_skip skips[3];
	struct msg_move moves[2];
	struct msg_behind behind;
	struct msg_explain explain;
	struct msg_node_explain nodes[3];
	struct msg_graph_explain graph;
};

static struct msg_request random_request(struct parts *parts)
{
	struct msg_request request = {.kind = chance(2) ? MSG_REQUEST_RUN : MSG_REQUEST_RUN_GRAPH};
	struct msg_run *run = &request.run;
	run->arg_count = chance(9);
	run->args = parts->args;
	for (uint32_t i = 0; i < run->arg_count; i++)
		parts->args[i] = random_arg(&parts->tensors[i]);
	run->output_count = chance(5);
	run->outputs = parts->options;
	for (uint32_t i = 0; i < run->output_count; i++) {
		parts->options[i] = (struct msg_output_option){.keep = chance(2), .no_copy = chance(2)};
		if (chance(2))
			parts->options[i].shared = (struct msg_shared_range){1 + chance(3), random_number(), random_number()};
	}
	run->mode = (msg_mode)chance(3);
	run->explain = chance(2);
	run->timeout_us = random_number();
	run->inline_results = chance(2);
	run->service_class = chance(MSG_SERVICE_CLASS_MAX + 1);
	if (request.kind == MSG_REQUEST_RUN_GRAPH) {
		run->graph = random_number();
		return request;
	}
	run->op = random_text();
	run->device = random_text();
	run->strict = chance(2);
	run->retry = chance(2);
	run->allow_tf32 = chance(2);
	run->uuid = chance(2);
	run->priority = (struct msg_list){.present = chance(2), .names = parts->names};
	run->priority.count = run->priority.present ? chance(5) : 0;
	for (uint32_t i = 0; i < run->priority.count; i++)
		parts->names[i] = random_text();
	return request;
}

static struct msg_explain random_explain(struct parts *parts)
{
	struct msg_explain explain = {.skip_count = chance(4), .skipped = parts->skips, .effective_count = chance(5), .effective = parts->names,
	                              .level = (msg_level)chance(6), .device = random_text(), .narrowed = random_text(), .on_loop = chance(2)};
	explain.move_count = chance(8) == 0 ? chance(3) : 0; /* read by protobuf-c */
	explain.moves = parts->moves;
	explain.times = (struct msg_times){random_number(), random_number(), random_number(), random_number(), random_number(), random_number(), random_number()};
	parts->behind = (struct msg_behind){random_number(), random_number(), random_number(), random_number(), random_number(),
	                                    random_number(), random_number(), random_number(), random_number(), random_number()};
	explain.behind = chance(8) == 0 ? &parts->behind : NULL; /* read by protobuf-c */
	explain.batched = chance(8) == 0 ? (uint32_t)random_number() : 0; /* … too */
	return explain;
}

static struct msg_reply random_reply(struct parts *parts)
{
	struct msg_reply reply = {.kind = MSG_REPLY_RUN};
	struct msg_run_reply *run = &reply.run;
	for (int i = 0; i < 4; i++) {
		parts->names[i] = random_text();
		random_tensor(&parts->results[i].tensor);
		parts->results[i].kept = (struct msg_handle){(uint32_t)random_number(), chance(2) ? random_number() | 1 : 0};
		parts->states[i] = (struct msg_handle){(uint32_t)random_number(), random_number()};
		if (parts->results[i].kept.generation == 0)
			parts->results[i].kept.index = 0;
	}
	for (int i = 0; i < 3; i++)
		parts->skips[i] = (struct msg_skip){random_text(), (opd_reason_code)random_number(), random_text()};
	for (int i = 0; i < 2; i++)
		parts->moves[i] = (struct msg_move){random_text(), random_text(), random_text(), random_number()};
	parts->explain = random_explain(parts);
	for (int i = 0; i < 3; i++)
		parts->nodes[i] = (struct msg_node_explain){random_text(), random_text(), random_text(), random_explain(parts)};
	parts->graph = (struct msg_graph_explain){chance(4), parts->nodes, (uint32_t)random_number(), chance(2), random_number(), random_number(), random_number(), (uint32_t)random_number()};
	run->provider = random_text();
	run->uuid = random_text();
	run->output_count = chance(5);
	run->outputs = parts->results;
	run->state_count = chance(5);
	run->states = parts->states;
	run->explain = chance(2) ? &parts->explain : NULL;
	run->graph = chance(2) ? &parts->graph : NULL;
	return reply;
}

START_TEST(random_requests_are_written_as_protobuf_writes_them)
{
	static struct parts parts;
	struct arena arena;
	struct codec_buffer plain, packed;
	arena_init(&arena, ARENA_CAP);
	plain_count = 0;
	for (int i = 0; i < MESSAGES; i++) {
		const struct msg_request request = random_request(&parts);
		ck_assert_int_eq(codec_pack_request(&arena, &request, &packed, NULL), OPD_OK);
		ck_assert_msg(plain_write_request(&arena, &request, &plain), "message %d isn't written", i);
		ck_assert_msg(plain_same_bytes(&plain, &packed), "message %d is written differently", i);
		bool taken;
		ck_same(false, &arena, packed.frame + FRAME_HEADER_BYTES, packed.envelope_bytes, &taken, "a random request");
		plain_count += taken;
	}
	ck_assert_int_gt(plain_count, MESSAGES / 4);
	arena_fini(&arena);
}
END_TEST

START_TEST(random_replies_are_written_as_protobuf_writes_them)
{
	static struct parts parts;
	struct arena arena;
	struct codec_buffer plain, packed;
	arena_init(&arena, ARENA_CAP);
	plain_count = 0;
	for (int i = 0; i < MESSAGES; i++) {
		const struct msg_reply reply = random_reply(&parts);
		ck_assert_int_eq(codec_pack_reply(&arena, &reply, &packed, NULL), OPD_OK);
		ck_assert_msg(plain_write_reply(&arena, &reply, &plain), "message %d isn't written", i);
		ck_assert_msg(plain_same_bytes(&plain, &packed), "message %d is written differently", i);
		bool taken;
		ck_same(true, &arena, packed.frame + FRAME_HEADER_BYTES, packed.envelope_bytes, &taken, "a random reply");
		plain_count += taken;
	}
	ck_assert_int_gt(plain_count, MESSAGES / 4);
	arena_fini(&arena);
}
END_TEST

/* ---- Encodings that nobody writes ---- */

struct odd {
	const char *what;
	const char *bytes;
	size_t length;
	bool plain; /* taken by hand; else left to protobuf-c */
};

#define ODD(what, text, plain) {what, text, sizeof text - 1, plain}

START_TEST(odd_encodings_mean_what_protobuf_says)
{
	static const struct odd odds[] = {
	    ODD("a bare run", "\x0a\x03\x0a\x01x", true),
	    ODD("nothing", "", false),
	    ODD("two bodies", "\x0a\x03\x0a\x01x\x0a\x02\x20\x01", false),
	    ODD("an op twice: the last", "\x0a\x06\x0a\x01x\x0a\x01y", true),
	    ODD("fields in another order", "\x0a\x0b\x30\x01\x12\x04\x12\x02\x50\x01\x0a\x01x", true),
	    ODD("an unknown field", "\x0a\x07\x0a\x01x\xf8\x07\x01\x01", false),
	    ODD("a flag in ten bytes", "\x0a\x0e\x0a\x01x\x20\x81\x80\x80\x80\x80\x80\x80\x80\x80\x00", true),
	    ODD("a flag of more than 64 bits", "\x0a\x0e\x0a\x01x\x20\x80\x80\x80\x80\x80\x80\x80\x80\x80\x02", false),
	    ODD("a varint of eleven bytes", "\x0a\x0f\x0a\x01x\x20\x81\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00", false),
	    ODD("a length in five bytes", "\x0a\x83\x80\x80\x80\x00\x0a\x01x", true),
	    ODD("a length in six bytes", "\x0a\x83\x80\x80\x80\x80\x00\x0a\x01x", false),
	    ODD("a tag in two bytes", "\x8a\x00\x03\x0a\x01x", true),
	    ODD("a tag in three bytes", "\x8a\x80\x00\x03\x0a\x01x", false),
	    ODD("a length past the end", "\x0a\x04\x0a\x01x", false),
	    ODD("a length of 2^32-1", "\x0a\xff\xff\xff\xff\x0f\x0a\x01x", false),
	    ODD("a group", "\x0a\x05\x0a\x01x\x13\x14", false),
	    ODD("a number as bytes", "\x0a\x06\x0a\x01x\x22\x01\x01", false),
	    ODD("an argument with two values", "\x0a\x08\x12\x04\x20\x01\x30\x01\x30\x01", false),
	    ODD("an argument without a value", "\x0a\x02\x12\x00", false),
	    ODD("a shape in pieces", "\x0a\x0b\x12\x09\x12\x07\x12\x02\x01\x02\x10\x03\x50\x00", false),
	    ODD("a shape packed and not", "\x0a\x0a\x12\x08\x12\x06\x12\x02\x01\x02\x10\x03", true),
	    ODD("nine dimensions", "\x0a\x0f\x12\x0d\x12\x0b\x12\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01", false),
	    ODD("a range in two parts is merged", "\x0a\x0c\x12\x0a\x12\x08\x32\x02\x08\x40\x32\x02\x10\x04", false),
	    ODD("a name that is no UTF-8", "\x0a\x03\x0a\x01\xff", false),
	    ODD("a mode that there isn't", "\x0a\x02\x28\x03", false),
	    ODD("a run of a graph", "\xca\x01\x02\x08\x07", true),
	    ODD("a graph to run once", "\xca\x01\x02\x12\x00", false),
	};
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	for (size_t i = 0; i < sizeof odds / sizeof odds[0]; i++) {
		bool plain;
		ck_same(false, &arena, (const uint8_t *)odds[i].bytes, odds[i].length, &plain, odds[i].what);
		ck_assert_msg(plain == odds[i].plain, "%s: %s", odds[i].what, plain ? "taken by hand" : "left to protobuf-c");
	}
	arena_fini(&arena);
}
END_TEST

/* ---- Memory ---- */

START_TEST(a_refusal_leaves_the_arena_as_it_was)
{
	/* 250 arguments before what is refused: blocks were added by then. */
	static uint8_t body[250 * 4 + 8];
	size_t length = 0;
	for (int i = 0; i < 250; i++) {
		memcpy(body + length, "\x12\x02\x12\x00", 4);
		length += 4;
	}
	body[length++] = 0x0a; /* an op that is no text */
	body[length++] = 0x01;
	body[length++] = 0xff;
	uint8_t envelope[sizeof body + 8] = {0x0a, (uint8_t)(length & 0x7f) | 0x80, (uint8_t)(length >> 7)};
	memcpy(envelope + 3, body, length);
	struct arena arena;
	struct msg_request request;
	opd_error error = {0};
	arena_init(&arena, ARENA_CAP);
	char *kept = arena_alloc(&arena, 100);
	memset(kept, 7, 100);
	const size_t used = arena.used_bytes;
	const char *next = arena.next;
	ck_assert(!plain_read_request(&arena, envelope, length + 3, &request));
	ck_assert_uint_eq(arena.used_bytes, used);
	ck_assert_ptr_eq(arena.next, next);
	ck_assert_int_eq(kept[99], 7);
	ck_assert_int_eq(codec_decode_request(&arena, envelope, length + 3, &request, &error), OPD_INVALID_ARGUMENT);
	ck_assert_ptr_nonnull(strstr(error.text, "op: \"\\xff\" is not UTF-8"));
	arena_fini(&arena);
}
END_TEST

START_TEST(neither_way_passes_the_arenas_cap)
{
	struct msg_tensor tensor = {.dtype = OPD_f32, .rank = 1, .shape = {4}};
	struct msg_arg arg = {.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &tensor};
	const struct msg_request request = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text("relu"), .arg_count = 1, .args = &arg}};
	struct codec_buffer buffer;
	struct msg_request decoded;
	opd_error error = {0};
	struct arena arena, small;
	arena_init(&arena, ARENA_CAP);
	arena_init(&small, 40);
	ck_assert_int_eq(codec_encode_request(&small, &request, &buffer, &error), OPD_RESOURCE_EXHAUSTED);
	ck_assert_int_eq(codec_encode_request(&arena, &request, &buffer, &error), OPD_OK);
	ck_assert_int_eq(codec_decode_request(&small, buffer.frame + FRAME_HEADER_BYTES, buffer.envelope_bytes, &decoded, &error), OPD_RESOURCE_EXHAUSTED);
	ck_assert_uint_le(small.used_bytes, 40);
	arena_fini(&small);
	arena_fini(&arena);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("plain");
	TCase *same = tcase_create("same");
	tcase_set_timeout(same, 120);
	tcase_add_test(same, every_golden_run_and_its_reply_is_taken_as_protobuf_takes_it);
	tcase_add_test(same, no_change_of_a_golden_frame_is_taken_as_something_else);
	tcase_add_test(same, random_requests_are_written_as_protobuf_writes_them);
	tcase_add_test(same, random_replies_are_written_as_protobuf_writes_them);
	tcase_add_test(same, odd_encodings_mean_what_protobuf_says);
	tcase_add_test(same, a_refusal_leaves_the_arena_as_it_was);
	tcase_add_test(same, neither_way_passes_the_arenas_cap);
	suite_add_tcase(suite, same);
	return suite_run(suite);
}
