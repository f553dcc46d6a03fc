/* The wire, without sockets: frames, envelopes, texts, the arena, checked sizes, elements. Golden frames were made by another protobuf
 * (tests/golden/frames/make.py); hostile ones are made here byte by byte. */
#include <check.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/arena.h"
#include "proto/bounds.h"
#include "proto/codec.h"
#include "proto/element.h"
#include "proto/frame.h"
#include "proto/message.h"
#include "proto/tensor.h"
#include "proto/text.h"

#define ARENA_CAP (8u << 20)

/* ---- Golden frames ----------------------------------------------------------------------------------------------------- */

struct golden {
	char name[128];
	uint8_t bytes[8192];
	size_t length;
	struct frame_header header;
};

static uint8_t *golden_envelope(struct golden *golden)
{
	return golden->bytes + FRAME_HEADER_BYTES;
}

/* The repository's root, from where this file was compiled. */
static const char *source_path(const char *relative)
{
	static char path[4096];
	const char *here = strstr(__FILE__, "tests/unit/test_proto.c");
	ck_assert_ptr_nonnull(here);
	(void)snprintf(path, sizeof path, "%.*s%s", (int)(here - __FILE__), __FILE__, relative);
	return path;
}

static void golden_load(struct golden *golden, const char *name)
{
	char relative[256];
	(void)snprintf(relative, sizeof relative, "tests/golden/frames/%s", name);
	FILE *file = fopen(source_path(relative), "r");
	ck_assert_msg(file != NULL, "%s: no such frame", name);
	*golden = (struct golden){0};
	(void)snprintf(golden->name, sizeof golden->name, "%s", name);
	char line[512];
	while (fgets(line, sizeof line, file) != NULL) {
		unsigned byte;
		int used;
		for (const char *at = line; line[0] != '#' && sscanf(at, "%2x%n", &byte, &used) == 1; at += used) {
			ck_assert_uint_lt(golden->length, sizeof golden->bytes);
			golden->bytes[golden->length++] = (uint8_t)byte;
		}
	}
	(void)fclose(file);
	opd_error error = {0};
	ck_assert_msg(frame_decode(golden->bytes, &golden->header, &error) == OPD_OK, "%s: %s", name, error.text);
	ck_assert_uint_le(FRAME_HEADER_BYTES + golden->header.envelope_bytes, golden->length);
}

static void golden_each(void (*visit)(struct golden *golden))
{
	DIR *folder = opendir(source_path("tests/golden/frames"));
	ck_assert_ptr_nonnull(folder);
	static struct golden golden;
	int count = 0;
	for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
		const char *dot = strrchr(entry->d_name, '.');
		if (dot == NULL || strcmp(dot, ".hex") != 0)
			continue;
		golden_load(&golden, entry->d_name);
		visit(&golden);
		count++;
	}
	(void)closedir(folder);
	ck_assert_int_ge(count, 37);
}

union message {
	struct msg_hello hello;
	struct msg_hello_reply hello_reply;
	struct msg_request request;
	struct msg_reply reply;
	struct msg_goaway goaway;
};

static opd_status decode(struct arena *arena, uint8_t type, const uint8_t *envelope, size_t bytes, union message *out, opd_error *error)
{
	switch (type) {
	case FRAME_HELLO:
		return codec_decode_hello(arena, envelope, bytes, &out->hello, error);
	case FRAME_HELLO_REPLY:
		return codec_decode_hello_reply(arena, envelope, bytes, &out->hello_reply, error);
	case FRAME_REQUEST:
		return codec_decode_request(arena, envelope, bytes, &out->request, error);
	case FRAME_REPLY:
		return codec_decode_reply(arena, envelope, bytes, &out->reply, error);
	default:
		return codec_decode_goaway(arena, envelope, bytes, &out->goaway, error);
	}
}

static opd_status encode(struct arena *arena, uint8_t type, const union message *in, struct codec_buffer *out, opd_error *error)
{
	switch (type) {
	case FRAME_HELLO:
		return codec_encode_hello(arena, &in->hello, out, error);
	case FRAME_HELLO_REPLY:
		return codec_encode_hello_reply(arena, &in->hello_reply, out, error);
	case FRAME_REQUEST:
		return codec_encode_request(arena, &in->request, out, error);
	case FRAME_REPLY:
		return codec_encode_reply(arena, &in->reply, out, error);
	default:
		return codec_encode_goaway(arena, &in->goaway, out, error);
	}
}

static bool has_message(uint8_t type)
{
	return type <= FRAME_REPLY || type == FRAME_GOAWAY;
}

static void golden_round_trip(struct golden *golden)
{
	uint8_t header[FRAME_HEADER_BYTES];
	frame_encode(&golden->header, header);
	ck_assert_msg(memcmp(header, golden->bytes, sizeof header) == 0, "%s: another header", golden->name);
	if (!has_message(golden->header.type))
		return;
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	union message message;
	opd_error error = {0};
	opd_status status = decode(&arena, golden->header.type, golden_envelope(golden), golden->header.envelope_bytes, &message, &error);
	ck_assert_msg(status == OPD_OK, "%s: %s", golden->name, error.text);
	struct codec_buffer buffer;
	ck_assert_int_eq(encode(&arena, golden->header.type, &message, &buffer, &error), OPD_OK);
	ck_assert_msg(buffer.envelope_bytes == golden->header.envelope_bytes, "%s: %zu bytes of envelope, expected %u", golden->name,
	              buffer.envelope_bytes, golden->header.envelope_bytes);
	ck_assert_msg(memcmp(buffer.frame + FRAME_HEADER_BYTES, golden_envelope(golden), buffer.envelope_bytes) == 0,
	              "%s: another envelope", golden->name);
	arena_fini(&arena);
}

START_TEST(every_golden_frame_decodes_and_encodes_to_the_same_bytes)
{
	golden_each(golden_round_trip);
}
END_TEST

/* OK or a typed error with a text, whatever the bytes are. The copy is as long as the envelope, so that ASan sees one byte too many. */
static opd_status decode_hostile(struct arena *arena, uint8_t type, const uint8_t *envelope, size_t bytes, opd_error *error)
{
	uint8_t *copy = malloc(bytes == 0 ? 1 : bytes);
	ck_assert_ptr_nonnull(copy);
	if (bytes != 0)
		memcpy(copy, envelope, bytes);
	union message message;
	*error = (opd_error){0};
	opd_status status = decode(arena, type, copy, bytes, &message, error);
	free(copy);
	ck_assert(status == OPD_OK || status == OPD_INVALID_ARGUMENT || status == OPD_RESOURCE_EXHAUSTED);
	if (status != OPD_OK)
		ck_assert(error->text[0] != '\0' && error->status == (int32_t)status);
	return status;
}

static void golden_truncate(struct golden *golden)
{
	if (!has_message(golden->header.type))
		return;
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	opd_error error;
	unsigned refused = 0;
	for (uint32_t bytes = 0; bytes < golden->header.envelope_bytes; bytes++) {
		arena_reset(&arena);
		refused += decode_hostile(&arena, golden->header.type, golden_envelope(golden), bytes, &error) != OPD_OK;
	}
	if (golden->header.envelope_bytes > 8)
		ck_assert_msg(refused > 0, "%s: every truncation was taken", golden->name);
	arena_fini(&arena);
}

START_TEST(truncation_at_every_byte_is_a_typed_error_or_a_shorter_message)
{
	golden_each(golden_truncate);
}
END_TEST

static void golden_mutate(struct golden *golden)
{
	if (!has_message(golden->header.type))
		return;
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	opd_error error;
	uint8_t *envelope = golden_envelope(golden);
	static const uint8_t values[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
	for (uint32_t i = 0; i < golden->header.envelope_bytes; i++) {
		const uint8_t was = envelope[i];
		for (unsigned k = 0; k < 8 + sizeof values; k++) {
			envelope[i] = k < 8 ? (uint8_t)(was ^ 1u << k) : values[k - 8];
			arena_reset(&arena);
			(void)decode_hostile(&arena, golden->header.type, envelope, golden->header.envelope_bytes, &error);
		}
		envelope[i] = was;
	}
	arena_fini(&arena);
}

START_TEST(no_changed_byte_breaks_the_decoder)
{
	golden_each(golden_mutate);
}
END_TEST

START_TEST(random_envelopes_never_break_the_decoder)
{
	struct arena arena;
	arena_init(&arena, 1u << 20);
	uint64_t state = 88172645463325252u;
	opd_error error;
	uint8_t bytes[96];
	for (int round = 0; round < 40000; round++) {
		for (size_t i = 0; i < sizeof bytes; i++) {
			state ^= state << 13, state ^= state >> 7, state ^= state << 17;
			/* Small numbers make tags and lengths that fit more often than uniform bytes. */
			bytes[i] = (uint8_t)(state >> 32 & (state & 1 ? 0x1f : 0xff));
		}
		arena_reset(&arena);
		(void)decode_hostile(&arena, (uint8_t)(1 + round % 4), bytes, (size_t)round % sizeof bytes, &error);
	}
	arena_fini(&arena);
}
END_TEST

/* The worked example in README.md is the golden frame, line by line. */
START_TEST(the_worked_example_of_the_readme_is_the_golden_frame)
{
	static char readme[256 << 10];
	FILE *file = fopen(source_path("proto/README.md"), "r");
	ck_assert_ptr_nonnull(file);
	readme[fread(readme, 1, sizeof readme - 1, file)] = '\0';
	(void)fclose(file);
	static const char *const names[] = {"request-rms-norm.hex", "reply-rms-norm.hex", "hello.hex"};
	for (size_t i = 0; i < 3; i++) {
		char relative[128];
		(void)snprintf(relative, sizeof relative, "tests/golden/frames/%s", names[i]);
		file = fopen(source_path(relative), "r");
		ck_assert_ptr_nonnull(file);
		char line[512];
		while (fgets(line, sizeof line, file) != NULL) {
			line[strcspn(line, "\n")] = '\0';
			ck_assert_msg(line[0] == '#' || strstr(readme, line) != NULL, "README.md lacks %s's line %s", names[i], line);
		}
		(void)fclose(file);
	}
}
END_TEST

/* ---- What the messages say --------------------------------------------------------------------------------------------- */

static bool text_is(struct msg_text text, const char *expected)
{
	return text.bytes == strlen(expected) && strcmp(text.data, expected) == 0;
}

static const union message *golden_message(struct arena *arena, const char *name)
{
	static struct golden golden;
	static union message message;
	golden_load(&golden, name);
	opd_error error = {0};
	ck_assert_int_eq(decode(arena, golden.header.type, golden_envelope(&golden), golden.header.envelope_bytes, &message, &error), OPD_OK);
	return &message;
}

START_TEST(a_run_has_every_field_where_it_belongs)
{
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	const struct msg_run *run = &golden_message(&arena, "every-run.hex")->request.run;
	ck_assert(text_is(run->op, "some_op") && text_is(run->device, "cuda:1"));
	ck_assert(run->priority.present && run->priority.count == 2 && text_is(run->priority.names[0], "onednn"));
	ck_assert(run->strict && run->explain && run->retry && run->allow_tf32 && run->uuid && run->inline_results);
	ck_assert(run->mode == MSG_DRY && run->timeout_us == 1ull << 63);
	ck_assert(run->output_count == 3 && run->outputs[0].keep && !run->outputs[0].no_copy && run->outputs[1].no_copy);
	ck_assert_uint_eq(run->arg_count, 10);
	const struct msg_arg *args = run->args;
	ck_assert(args[0].name.bytes == 0 && args[0].name.data != NULL && args[0].kind == MSG_ARG_TENSOR && args[0].count == 1);
	ck_assert(args[1].kind == MSG_ARG_TENSORS && args[1].count == 6 && text_is(args[1].name, "list"));
	ck_assert(args[2].kind == MSG_ARG_TENSORS && args[2].count == 0);
	ck_assert(args[3].kind == MSG_ARG_INT && args[3].i == INT64_MIN);
	ck_assert(args[4].kind == MSG_ARG_FLOAT && args[4].f == -0.1);
	ck_assert(args[5].kind == MSG_ARG_BOOL && args[5].b && args[6].kind == MSG_ARG_BOOL && !args[6].b);
	ck_assert(args[7].kind == MSG_ARG_STR && text_is(args[7].str, "grüße, 世界 \U0001f600"));
	ck_assert(args[8].kind == MSG_ARG_INTS && args[8].count == 3 && args[8].ints[1] == -1 && args[8].ints[2] == 1ll << 62);
	ck_assert(args[9].kind == MSG_ARG_NONE && text_is(args[9].name, "none"));
	arena_fini(&arena);
}
END_TEST

START_TEST(a_tensor_has_every_source)
{
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	const struct msg_tensor *t = golden_message(&arena, "every-run.hex")->request.run.args[1].tensor;
	ck_assert(t[0].dtype == OPD_bf16 && t[0].rank == 2 && t[0].shape[1] == 3 && t[0].strided && t[0].strides[0] == 3);
	ck_assert(t[0].byte_offset == 2 && t[0].donate && t[0].source == MSG_SOURCE_INLINE && t[0].inlined.bytes == 14);
	ck_assert(t[0].inlined.data[13] == 13);
	ck_assert(t[1].rank == 0 && !t[1].strided && t[1].source == MSG_SOURCE_PAYLOAD && t[1].payload.offset == 128 && t[1].payload.bytes == 8);
	ck_assert(t[2].dtype == OPD_DTYPE_NONE && t[2].source == MSG_SOURCE_HANDLE && t[2].handle.index == 5);
	ck_assert_uint_eq(t[2].handle.generation, 0xfedcba9876543210u);
	ck_assert(t[3].rank == 8 && t[3].source == MSG_SOURCE_RESULT && t[3].result.request == 1ull << 40 && t[3].result.output == 2);
	ck_assert(t[4].shape[1] == -1 && t[4].shape[2] == INT64_MIN && t[4].source == MSG_SOURCE_SHARED && t[4].shared.region == 3);
	ck_assert(t[4].shared.offset == 1ull << 50 && t[4].shared.bytes == 9);
	ck_assert(t[5].source == MSG_SOURCE_NONE && t[5].strided && t[5].strides[0] == 0);
	arena_fini(&arena);
}
END_TEST

START_TEST(session_messages_have_every_field_where_it_belongs)
{
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	const struct msg_hello *hello = &golden_message(&arena, "every-hello.hex")->hello;
	ck_assert(hello->version_min == 1 && hello->version_max == 3 && hello->feature_count == 2 && hello->no_chunks);
	ck_assert(text_is(hello->features[1], "cancel") && text_is(hello->client, "client 2.1") && hello->chunk_bytes == 65536);
	const struct msg_hello_reply *reply = &golden_message(&arena, "every-hello-reply.hex")->hello_reply;
	ck_assert(reply->status == OPD_UNAVAILABLE && text_is(reply->message, "draining") && reply->version == 1 && reply->admin);
	ck_assert(reply->limits.envelope_bytes == 1u << 20 && reply->limits.payload_bytes == 1ull << 32 && reply->limits.in_flight == 1024);
	ck_assert(reply->limits.session_bytes == 1ull << 33 && reply->session == 77 && text_is(reply->tenant, "uid:1000"));
	ck_assert(text_is(reply->server, "opd 0.1.0") && reply->feature_count == 2 && reply->chunk_bytes == 1u << 20);
	const struct msg_goaway *goaway = &golden_message(&arena, "every-goaway.hex")->goaway;
	ck_assert(goaway->status == OPD_UNAVAILABLE && text_is(goaway->message, "draining: shutting down"));
	arena_fini(&arena);
}
END_TEST

START_TEST(a_reply_has_every_field_where_it_belongs)
{
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	const struct msg_run_reply *run = &golden_message(&arena, "every-reply-run.hex")->reply.run;
	ck_assert(text_is(run->provider, "cpu") && text_is(run->uuid, "0123456789abcdef") && run->output_count == 2);
	ck_assert(run->outputs[0].kept.index == 9 && run->outputs[0].kept.generation == 1ull << 63 && run->outputs[1].kept.generation == 0);
	const struct msg_explain *explain = run->explain;
	ck_assert(explain->skip_count == 2 && explain->skipped[0].code == OPD_REASON_DTYPE && text_is(explain->skipped[1].provider, "cuda"));
	ck_assert(text_is(explain->skipped[0].reason, "dtype: weight bf16, x f32") && explain->level == MSG_LEVEL_SESSION);
	ck_assert(explain->times.decode == 1 && explain->times.dispatch == 2 && explain->times.queue == 3);
	ck_assert(explain->times.kernel == 1ull << 40 && explain->times.moves == 5 && explain->times.pack == 6);
	ck_assert(explain->move_count == 1 && text_is(explain->moves[0].from, "cpu") && text_is(explain->moves[0].to, "cuda:0"));
	ck_assert(text_is(explain->effective[1], "cpu") && explain->on_loop && text_is(explain->device, "cpu"));
	const struct msg_info *info = &golden_message(&arena, "every-reply-info.hex")->reply.info;
	ck_assert(info->uptime_us == 1 && info->loops == 2 && info->threads == 3 && info->sessions == 4 && info->requests == 5);
	ck_assert(info->memory_bytes == 6 && info->memory_limit_bytes == 7 && info->session_memory_bytes == 8 && info->pid == 9);
	const struct msg_impl *impl = &golden_message(&arena, "every-reply-op.hex")->reply.op.impls[1];
	ck_assert(text_is(impl->provider, "cuda") && text_is(impl->reason, "why") && text_is(impl->device, "cuda") && text_is(impl->schema, "s"));
	const struct msg_provider *provider = &golden_message(&arena, "every-reply-providers.hex")->reply.providers.items[0];
	ck_assert(text_is(provider->version, "12.4") && text_is(provider->reason, "libcuda.so.1 not found") && provider->op_count == 2);
	const struct msg_priority_reply *priority = &golden_message(&arena, "every-reply-priority.hex")->reply.priority;
	ck_assert(priority->level == MSG_LEVEL_CONFIGURATION && text_is(priority->stored[0], "gone") && text_is(priority->effective[1], "native"));
	ck_assert_str_eq(msg_level_name(priority->level), "configuration");
	arena_fini(&arena);
}
END_TEST

START_TEST(an_empty_list_differs_from_none)
{
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	const struct msg_run *run = &golden_message(&arena, "run-empty-list.hex")->request.run;
	ck_assert(run->priority.present && run->priority.count == 0 && run->mode == MSG_FAKE);
	ck_assert(!golden_message(&arena, "request-clear-priority.hex")->request.set.list.present);
	ck_assert(!golden_message(&arena, "request-rms-norm.hex")->request.run.priority.present);
	ck_assert_int_eq(golden_message(&arena, "request-no-body.hex")->request.kind, MSG_REQUEST_NONE);
	arena_fini(&arena);
}
END_TEST

/* ---- Hostile envelopes ------------------------------------------------------------------------------------------------- */

/* Protobuf by hand. */
struct wire {
	uint8_t *bytes;
	size_t length;
	size_t capacity;
};

static void wire_bytes(struct wire *wire, const void *bytes, size_t count)
{
	if (wire->length + count > wire->capacity) {
		wire->capacity = (wire->length + count) * 2;
		wire->bytes = realloc(wire->bytes, wire->capacity);
		ck_assert_ptr_nonnull(wire->bytes);
	}
	if (count != 0)
		memcpy(wire->bytes + wire->length, bytes, count);
	wire->length += count;
}

static void wire_varint(struct wire *wire, uint64_t value)
{
	do {
		uint8_t byte = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
		wire_bytes(wire, &byte, 1);
		value >>= 7;
	} while (value != 0);
}

static void wire_number(struct wire *wire, unsigned field, uint64_t value)
{
	wire_varint(wire, field << 3);
	wire_varint(wire, value);
}

static void wire_blob(struct wire *wire, unsigned field, const void *bytes, size_t count)
{
	wire_varint(wire, field << 3 | 2);
	wire_varint(wire, count);
	wire_bytes(wire, bytes, count);
}

/* Puts what `wire` holds into a field of its own. */
static void wire_wrap(struct wire *wire, unsigned field)
{
	struct wire outer = {0};
	wire_blob(&outer, field, wire->bytes, wire->length);
	free(wire->bytes);
	*wire = outer;
}

/* Decodes as a request and frees `wire`. */
static opd_status request_of(struct wire *wire, size_t cap, opd_error *error)
{
	struct arena arena;
	arena_init(&arena, cap);
	opd_status status = decode_hostile(&arena, FRAME_REQUEST, wire->bytes, wire->length, error);
	ck_assert_uint_le(arena.used_bytes, cap);
	arena_fini(&arena);
	free(wire->bytes);
	*wire = (struct wire){0};
	return status;
}

#define ck_refused(wire, text_part)                                                                   \
	do {                                                                                              \
		opd_error error_;                                                                             \
		ck_assert_int_eq(request_of((wire), ARENA_CAP, &error_), OPD_INVALID_ARGUMENT);               \
		ck_assert_msg(strstr(error_.text, (text_part)) != NULL, "\"%s\" in: %s", text_part, error_.text); \
	} while (0)

#define ck_taken(wire)                                                                    \
	do {                                                                                  \
		opd_error error_;                                                                 \
		ck_assert_msg(request_of((wire), ARENA_CAP, &error_) == OPD_OK, "%s", error_.text); \
	} while (0)

/* A run with one argument that is the tensor in `wire`. */
static void wrap_tensor(struct wire *wire)
{
	wire_wrap(wire, 2);
	wire_wrap(wire, 2);
	wire_wrap(wire, 1);
}

START_TEST(ranks_strides_and_dtypes_are_checked)
{
	struct wire wire = {0};
	wire_blob(&wire, 2, "\1\1\1\1\1\1\1\1", 8);
	wrap_tensor(&wire);
	ck_taken(&wire);
	wire_blob(&wire, 2, "\1\1\1\1\1\1\1\1\1", 9);
	wrap_tensor(&wire);
	ck_refused(&wire, "argument 0: shape: rank 9, at most 8");
	for (int i = 0; i < 65; i++)
		wire_number(&wire, 2, 1); /* unpacked */
	wrap_tensor(&wire);
	ck_refused(&wire, "rank 65, at most 8");
	wire_blob(&wire, 2, "\1\1", 2);
	wire_blob(&wire, 3, "\1", 1);
	wrap_tensor(&wire);
	ck_refused(&wire, "strides: 1 of them, expected none or 2");
	wire_number(&wire, 1, 13);
	wrap_tensor(&wire);
	ck_refused(&wire, "dtype 13");
	wire_number(&wire, 1, (uint64_t)-1);
	wrap_tensor(&wire);
	ck_refused(&wire, "dtype -1");
}
END_TEST

START_TEST(packed_and_unpacked_integers_both_parse)
{
	struct wire wire = {0};
	wire_number(&wire, 2, 2);
	wire_blob(&wire, 2, "\3\4", 2);
	wire_number(&wire, 2, (uint64_t)INT64_MIN);
	wrap_tensor(&wire);
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	struct msg_request request;
	ck_assert_int_eq(codec_decode_request(&arena, wire.bytes, wire.length, &request, NULL), OPD_OK);
	const struct msg_tensor *tensor = request.run.args[0].tensor;
	ck_assert(tensor->rank == 4 && tensor->shape[0] == 2 && tensor->shape[2] == 4 && tensor->shape[3] == INT64_MIN);
	free(wire.bytes);
	arena_fini(&arena);
}
END_TEST

START_TEST(names_are_utf8_without_nul_and_bounded)
{
	static const struct {
		const char *name;
		size_t bytes;
		const char *error;
	} cases[] = {
		{"rms_norm\0x", 10, "op: \"rms_norm\\x00x\" is not UTF-8"}, {"\xc3\x28", 2, "op: \"\\xc3(\""}, {"\xed\xa0\x80", 3, "UTF-8"},
		{"\xc0\x80", 2, "UTF-8"},                                   {"\xf4\x90\x80\x80", 4, "UTF-8"},  {"a\xe2\x82", 3, "UTF-8"},
		{"\n\x1b[2J\xff", 6, "\\n\\x1b[2J\\xff"},
	};
	struct wire wire = {0};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		wire_blob(&wire, 1, cases[i].name, cases[i].bytes);
		wire_wrap(&wire, 1);
		ck_refused(&wire, cases[i].error);
	}
	static char name[1 << 20];
	memset(name, 'a', sizeof name);
	wire_blob(&wire, 1, name, BOUND_NAME_BYTES);
	wire_wrap(&wire, 1);
	ck_taken(&wire);
	wire_blob(&wire, 1, name, BOUND_NAME_BYTES + 1);
	wire_wrap(&wire, 1);
	ck_refused(&wire, "op: 129 bytes, at most 128");
	wire_blob(&wire, 1, name, sizeof name);
	wire_wrap(&wire, 1);
	ck_refused(&wire, "op: 1048576 bytes, at most 128: \"aaaa");
}
END_TEST

START_TEST(counts_are_bounded)
{
	struct wire wire = {0};
	for (int i = 0; i < 100000; i++)
		wire_blob(&wire, 2, "\x20\x01", 2);
	wire_wrap(&wire, 1);
	opd_error error;
	ck_assert_int_eq(request_of(&wire, 64u << 20, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "args: 100000 entries, at most 256");
	for (int i = 0; i < 10000; i++)
		wire_blob(&wire, 1, "a", 1);
	wire_wrap(&wire, 3);
	wire_wrap(&wire, 1);
	ck_refused(&wire, "providers: 10000 entries, at most 64");
	for (unsigned i = 0; i <= BOUND_LIST; i++)
		wire_blob(&wire, 1, "", 0);
	wire_wrap(&wire, 2);
	ck_refused(&wire, "tensors: 4097 entries, at most 4096");
	for (unsigned i = 0; i <= BOUND_OUTPUTS; i++)
		wire_blob(&wire, 8, "", 0);
	wire_wrap(&wire, 1);
	ck_refused(&wire, "outputs: 65 entries, at most 64");
	for (unsigned i = 0; i <= BOUND_PRIORITY_OPS; i++)
		wire_blob(&wire, 1, "", 0);
	wire_wrap(&wire, 3);
	ck_refused(&wire, "priorities: 1025 entries, at most 1024");
}
END_TEST

START_TEST(memory_stays_under_the_arenas_cap)
{
	struct wire wire = {0};
	opd_error error;
	for (int i = 0; i < 100000; i++)
		wire_blob(&wire, 2, "\x20\x01", 2);
	wire_wrap(&wire, 1);
	ck_assert_int_eq(request_of(&wire, 1u << 20, &error), OPD_RESOURCE_EXHAUSTED);
	ck_assert_str_eq(error.text, "envelope: decoding takes more than 1048576 bytes");
	for (int i = 0; i < 200000; i++)
		wire_number(&wire, 1000, 7); /* unknown fields: kept by protobuf-c, so they cost memory too */
	ck_assert_int_eq(request_of(&wire, 1u << 20, &error), OPD_RESOURCE_EXHAUSTED);
	for (int i = 0; i < 20000; i++) /* a message field again and again: protobuf-c merges, in quadratic memory */
		wire_blob(&wire, 3, "\x0a\x01x", 3);
	wire_wrap(&wire, 1);
	ck_assert_int_eq(request_of(&wire, 1u << 20, &error), OPD_RESOURCE_EXHAUSTED);
}
END_TEST

START_TEST(unknown_fields_are_ignored)
{
	struct wire wire = {0};
	for (int i = 0; i < 1000; i++) {
		wire_number(&wire, 2000, 1);
		wire_blob(&wire, 2001, "xyz", 3);
	}
	wire_blob(&wire, 10, "", 0); /* ping */
	ck_taken(&wire);
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	wire_blob(&wire, 999, "\1\2\3", 3); /* a body of a later version */
	struct msg_request request;
	ck_assert_int_eq(codec_decode_request(&arena, wire.bytes, wire.length, &request, NULL), OPD_OK);
	ck_assert_int_eq(request.kind, MSG_REQUEST_NONE);
	free(wire.bytes);
	arena_fini(&arena);
}
END_TEST

START_TEST(what_is_no_protobuf_is_refused)
{
	static const struct {
		const char *bytes;
		size_t count;
	} cases[] = {
		{"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12}, /* a length of 11 bytes */
		{"\x0a\xff\xff\xff\xff\x7f", 6},                          /* of 2^35 */
		{"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 10},         /* of 2^63 - 1 */
		{"\x08\x01", 2},                                          /* run as a varint */
		{"\x0b\x0c", 2},                                          /* a group */
		{"\x00\x00", 2},                                          /* field 0 */
		{"\x0f", 1},                                              /* wire type 7 */
	};
	struct wire wire = {0};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		wire_bytes(&wire, cases[i].bytes, cases[i].count);
		char expected[80];
		(void)snprintf(expected, sizeof expected, "envelope: not a valid opd.v1.Request (%zu bytes)", cases[i].count);
		ck_refused(&wire, expected);
	}
	wire_blob(&wire, 2000, "", 0);
	for (int i = 0; i < 10000; i++) /* deep nesting, inside a field nobody knows: skipped, not walked */
		if (wire.length < 4u << 20)
			wire_wrap(&wire, 2000);
	ck_taken(&wire);
}
END_TEST

START_TEST(modes_scopes_and_missing_values_are_refused)
{
	struct wire wire = {0};
	wire_number(&wire, 5, 3);
	wire_wrap(&wire, 1);
	ck_refused(&wire, "mode: 3, expected 0 (run), 1 (fake) or 2 (dry)");
	wire_number(&wire, 1, 2);
	wire_wrap(&wire, 5);
	ck_refused(&wire, "scope: 2, expected 0 (session) or 1 (server)");
	wire_blob(&wire, 1, "alpha", 5);
	wire_wrap(&wire, 2);
	wire_wrap(&wire, 1);
	ck_refused(&wire, "argument alpha: no value");
	wire_number(&wire, 2, 14);
	wire_wrap(&wire, 12);
	ck_refused(&wire, "dtype 14");
}
END_TEST

START_TEST(numbers_of_a_reply_that_nobody_knows_are_tolerated)
{
	struct wire wire = {0};
	wire_number(&wire, 1, 99);
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	struct msg_reply reply;
	ck_assert_int_eq(codec_decode_reply(&arena, wire.bytes, wire.length, &reply, NULL), OPD_OK);
	ck_assert(reply.status == OPD_UNKNOWN && reply.kind == MSG_REPLY_NONE && reply.message.data != NULL);
	ck_assert_str_eq(msg_level_name((msg_level)99), "unknown");
	free(wire.bytes);
	arena_fini(&arena);
}
END_TEST

START_TEST(encoding_into_a_full_arena_is_resource_exhausted)
{
	struct arena big;
	arena_init(&big, ARENA_CAP);
	const union message *message = golden_message(&big, "every-run.hex");
	opd_error error = {0};
	struct codec_buffer buffer;
	bool fitted = false;
	for (size_t cap = 0; cap < 8192; cap += 48) {
		struct arena arena;
		arena_init(&arena, cap);
		opd_status status = codec_encode_request(&arena, &message->request, &buffer, &error);
		ck_assert(status == OPD_OK || status == OPD_RESOURCE_EXHAUSTED);
		ck_assert(!fitted || status == OPD_OK);
		fitted = status == OPD_OK;
		arena_fini(&arena);
	}
	ck_assert(fitted);
	arena_fini(&big);
}
END_TEST

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
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = UINT64_MAX, .envelope_bytes = 1, .payload_bytes = BOUND_PAYLOAD_BYTES), NULL);
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = 1, .envelope_bytes = BOUND_ENVELOPE_BYTES), NULL);
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = 1, .payload_bytes = BOUND_PAYLOAD_BYTES + 1), "payload of 1099511627777 bytes");
	ck_frame(FRAME(.type = FRAME_REQUEST, .request_id = 1, .payload_bytes = 1ull << 63), "payload of 9223372036854775808 bytes");
	ck_frame(FRAME(.type = FRAME_REPLY, .request_id = 1, .payload_bytes = UINT64_MAX), "payload of 18446744073709551615 bytes");
	ck_frame(FRAME(.type = FRAME_REQUEST, .envelope_bytes = BOUND_ENVELOPE_BYTES + 1), "envelope of 16777217 bytes, at most 16777216");
	ck_frame(FRAME(.type = FRAME_REQUEST, .envelope_bytes = UINT32_MAX), "envelope of 4294967295 bytes");
	ck_frame(FRAME(.type = FRAME_HELLO, .envelope_bytes = BOUND_HELLO_BYTES + 1), "HELLO has an envelope of 4097 bytes, at most 4096");
	ck_frame(FRAME(.type = FRAME_HELLO, .payload_bytes = 1), "HELLO has a payload of 1 bytes, at most 0");
	ck_frame(FRAME(.type = FRAME_HELLO, .request_id = 1), "HELLO has request id 1, expected 0");
	ck_frame(FRAME(.type = 0), "type 0");
	ck_frame(FRAME(.type = 9), "type 9");
	ck_frame(FRAME(.type = 255), "type 255");
	ck_frame(FRAME(.type = FRAME_REQUEST, .flags = 2), "REQUEST has flags 0x0002, may have 0x0001");
	ck_frame(FRAME(.type = FRAME_DATA, .flags = 1, .envelope_bytes = 8, .payload_bytes = 1), "DATA has flags 0x0001");
	ck_frame(FRAME(.type = FRAME_REQUEST, .flags = FRAME_CHUNKED, .payload_bytes = 0), "chunked");
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 8, .payload_bytes = 64), NULL);
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 7, .payload_bytes = 64), "envelope of 7 bytes, expected 8");
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 9, .payload_bytes = 64), "envelope of 9 bytes, at most 8");
	ck_frame(FRAME(.type = FRAME_DATA, .request_id = 1, .envelope_bytes = 8), "without a byte");
	ck_frame(FRAME(.type = FRAME_DATA, .envelope_bytes = 8, .payload_bytes = BOUND_CHUNK_BYTES_MAX + 1), "payload of 67108865 bytes");
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
		{"GET / HTTP/1.1\r\nHost: example\r\n\r\n", "HTTP request"},  {"POST /v1/run HTTP/1.1\r\nHost: exam\r\n", "HTTP request"},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n--------", "gRPC"},       {"HTTP/1.1 400 Bad Request\r\n\r\n----", "HTTP response"},
		{"\x16\x03\x01\x02------------------------------", "TLS"},    {"\x1b[2J\n-------------------------------", "\"\\x1b[2J\" (1b 5b 32 4a)"},
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
	ck_escape("\xc2\x9b", 2, "\\u{009b}");             /* C1: CSI */
	ck_escape("\xe2\x80\xae", 3, "\\u{202e}");         /* right-to-left override */
	ck_escape("\xe2\x81\xa6", 3, "\\u{2066}");         /* left-to-right isolate */
	ck_escape("\xe2\x80\xa8", 3, "\\u{2028}");         /* line separator */
	ck_escape("\xef\xbb\xbf", 3, "\\u{feff}");         /* byte order mark */
	ck_escape("\xf3\xa0\x81\x81", 4, "\\u{e0041}");    /* tag */
	ck_escape("\xed\xa0\x80", 3, "\\xed\\xa0\\x80");   /* surrogate */
	ck_escape("\xc0\xaf\xff", 3, "\\xc0\\xaf\\xff");   /* overlong */
	ck_escape("\xe2\x82", 2, "\\xe2\\x82");            /* cut */
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

/* ---- Sizes ------------------------------------------------------------------------------------------------------------- */

START_TEST(sizes_are_checked)
{
	uint64_t out = 77;
	ck_assert(!size_add(INT64_MAX, 1, &out) && !size_add(UINT64_MAX, 1, &out) && !size_multiply(1ull << 32, 1ull << 31, &out));
	ck_assert(!size_multiply(UINT64_MAX, UINT64_MAX, &out) && !size_align(INT64_MAX, &out) && !size_align(UINT64_MAX, &out));
	ck_assert_uint_eq(out, 77);
	ck_assert(size_multiply(1ull << 31, 1ull << 31, &out) && out == 1ull << 62);
	ck_assert(size_align(0, &out) && out == 0 && size_align(1, &out) && out == 64 && size_align(64, &out) && out == 64);
}
END_TEST

START_TEST(shapes_are_checked)
{
	uint64_t out = 77;
	static const int64_t bad[][3] = {{INT64_MIN, 1, 1}, {-1, 0, 1}, {0, INT64_MAX, 2}, {INT64_MAX, 2, 0}, {1ll << 32, 1ll << 31, 1}, {0, -1, 5}};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
		ck_assert_msg(!tensor_elements(3, bad[i], &out), "shape %zu", i);
	ck_assert_uint_eq(out, 77);
	ck_assert(!tensor_elements(9, (const int64_t[9]){1, 1, 1, 1, 1, 1, 1, 1, 1}, &out));
	ck_assert(tensor_elements(0, NULL, &out) && out == 1);
	ck_assert(tensor_elements(3, (const int64_t[]){0, INT64_MAX, 1}, &out) && out == 0);
	/* The product fits, times the element's size it doesn't. */
	ck_assert(tensor_elements(1, (const int64_t[]){1ll << 61}, &out) && !tensor_bytes(OPD_f32, 1, (const int64_t[]){1ll << 61}, &out));
	ck_assert(!tensor_bytes(OPD_DTYPE_NONE, 0, NULL, &out) && !tensor_bytes((opd_dtype)13, 0, NULL, &out));
	ck_assert(tensor_bytes(OPD_f64, 2, (const int64_t[]){3, 5}, &out) && out == 120);
}
END_TEST

START_TEST(extents_are_checked)
{
	const int64_t shape[] = {3, 4};
	uint64_t out = 77;
	ck_assert(tensor_extent(OPD_f32, 2, shape, NULL, 8, &out) && out == 56);
	ck_assert(tensor_extent(OPD_f32, 2, shape, (const int64_t[]){0, 0}, 0, &out) && out == 4);
	ck_assert(tensor_extent(OPD_f32, 2, shape, (const int64_t[]){10, 2}, 4, &out) && out == 4 + 27 * 4);
	ck_assert(tensor_extent(OPD_f32, 2, (const int64_t[]){0, 4}, (const int64_t[]){INT64_MAX, 1}, 12, &out) && out == 12);
	out = 77;
	ck_assert(!tensor_extent(OPD_f32, 2, shape, (const int64_t[]){-1, 1}, 0, &out));
	ck_assert(!tensor_extent(OPD_f32, 2, shape, (const int64_t[]){INT64_MAX, 1}, 0, &out));
	ck_assert(!tensor_extent(OPD_f32, 2, shape, (const int64_t[]){1ll << 60, 1}, 0, &out));
	ck_assert(!tensor_extent(OPD_f32, 2, shape, NULL, 2, &out)); /* no multiple of the element */
	ck_assert(!tensor_extent(OPD_f32, 2, shape, NULL, UINT64_MAX - 3, &out) && !tensor_extent(OPD_f32, 2, shape, NULL, INT64_MAX - 3, &out));
	ck_assert_uint_eq(out, 77);
	opd_tensor tensor = {0};
	int64_t strides[2];
	tensor_row_major(2, shape, strides);
	tensor_describe(&tensor, OPD_f32, 2, shape, strides, 8);
	ck_assert(strides[0] == 4 && strides[1] == 1 && tensor.elements == 12 && opd_tensor_contiguous(&tensor) && !opd_tensor_empty(&tensor));
	tensor_describe(&tensor, OPD_f32, 2, shape, (const int64_t[]){5, 1}, 0);
	ck_assert(!opd_tensor_contiguous(&tensor));
	ck_assert(tensor_alignment((const void *)0x1000, 64) == 64 && tensor_alignment((const void *)0x1000, 0) == 4096);
}
END_TEST

/* ---- Elements ---------------------------------------------------------------------------------------------------------- */

/* Decodes a small float by its definition. */
static double small_float(unsigned bits, int exponent_bits, int mantissa_bits, bool infinite)
{
	int bias = (1 << (exponent_bits - 1)) - 1;
	unsigned mantissa = bits & ((1u << mantissa_bits) - 1);
	unsigned exponent = bits >> mantissa_bits & ((1u << exponent_bits) - 1);
	double sign = bits >> (exponent_bits + mantissa_bits) != 0 ? -1 : 1;
	if (exponent + 1 == 1u << exponent_bits && (infinite || mantissa + 1 == 1u << mantissa_bits))
		return infinite && mantissa == 0 ? sign * INFINITY : NAN;
	double fraction = (exponent == 0 ? 0.0 : 1.0) + mantissa * pow(2, -mantissa_bits);
	return sign * fraction * pow(2, (exponent == 0 ? 1 : (int)exponent) - bias);
}

struct small_format {
	opd_dtype dtype;
	int exponent_bits;
	int mantissa_bits;
	bool infinite;
	bool saturates;
};

static const struct small_format small_formats[] = {
	{OPD_f16, 5, 10, true, false},
	{OPD_bf16, 8, 7, true, false},
	{OPD_f8_e4m3fn, 4, 3, false, true},
	{OPD_f8_e5m2, 5, 2, true, true},
};

static unsigned store_bits(opd_dtype dtype, double value)
{
	uint16_t bits = 0;
	element_store_f64(dtype, &bits, value);
	return bits;
}

START_TEST(every_small_float_loads_as_defined_and_stores_back)
{
	const struct small_format *format = &small_formats[_i];
	unsigned count = 1u << (1 + format->exponent_bits + format->mantissa_bits);
	for (unsigned bits = 0; bits < count; bits++) {
		uint16_t element = (uint16_t)bits;
		double want = small_float(bits, format->exponent_bits, format->mantissa_bits, format->infinite);
		double got = element_load_f64(format->dtype, &element);
		if (isnan(want)) {
			ck_assert(isnan(got) && isnan(element_load_f32(format->dtype, &element)));
			uint16_t again = (uint16_t)store_bits(format->dtype, got);
			ck_assert(isnan(element_load_f64(format->dtype, &again)));
			continue;
		}
		ck_assert(got == want && (double)element_load_f32(format->dtype, &element) == want && !signbit(got) == !signbit(want));
		if (!isinf(want) || !format->saturates)
			ck_assert_uint_eq(store_bits(format->dtype, want), bits);
	}
}
END_TEST

/* Between two neighbours: just under the middle goes down, just over it up, the middle to the even one. */
START_TEST(small_floats_round_to_nearest_even_once)
{
	const struct small_format *format = &small_formats[_i];
	unsigned finite = (1u << (format->exponent_bits + format->mantissa_bits)) - (format->infinite ? 1u << format->mantissa_bits : 1);
	for (unsigned bits = 0; bits + 1 < finite; bits++) {
		double low = small_float(bits, format->exponent_bits, format->mantissa_bits, format->infinite);
		double high = small_float(bits + 1, format->exponent_bits, format->mantissa_bits, format->infinite);
		double middle = low + (high - low) / 2;
		ck_assert_uint_eq(store_bits(format->dtype, middle), (bits & 1) == 0 ? bits : bits + 1);
		ck_assert_uint_eq(store_bits(format->dtype, nextafter(middle, -INFINITY)), bits);
		ck_assert_uint_eq(store_bits(format->dtype, nextafter(middle, INFINITY)), bits + 1);
		uint16_t single = 0;
		element_store_f32(format->dtype, &single, (float)middle);
		ck_assert_uint_eq(single, (bits & 1) == 0 ? bits : bits + 1);
	}
	unsigned largest = finite - 1;
	unsigned over = format->saturates ? largest : largest + 1; /* the code after the largest finite one is infinity */
	ck_assert_uint_eq(store_bits(format->dtype, INFINITY), over);
	ck_assert_uint_eq(store_bits(format->dtype, 1e300), over);
}
END_TEST

START_TEST(integers_saturate_from_floats_and_wrap_from_integers)
{
	int8_t i8;
	element_store_f64(OPD_i8, &i8, 1e9);
	ck_assert_int_eq(i8, 127);
	element_store_f64(OPD_i8, &i8, -128.9);
	ck_assert_int_eq(i8, -128);
	element_store_f64(OPD_i8, &i8, NAN);
	ck_assert_int_eq(i8, 0);
	element_store_i64(OPD_i8, &i8, 300);
	ck_assert_int_eq(i8, 44);
	int64_t i64;
	element_store_f64(OPD_i64, &i64, 0x1p63);
	ck_assert(i64 == INT64_MAX);
	element_store_f64(OPD_i64, &i64, -INFINITY);
	ck_assert(i64 == INT64_MIN);
	uint8_t flag;
	element_store_f64(OPD_bool, &flag, NAN);
	ck_assert_uint_eq(flag, 1);
	element_store_f64(OPD_bool, &flag, -0.0);
	ck_assert_uint_eq(flag, 0);
	flag = 7;
	ck_assert(element_load_f64(OPD_bool, &flag) == 1);
}
END_TEST

START_TEST(a_large_integer_rounds_once)
{
	/* 2^62 + 2^51 + 1: just over a tie of bf16 and f16's scale; rounding through f64 first would land on the tie and go down. */
	int64_t value = (1ll << 62) + (1ll << 54) + 1;
	uint16_t bits;
	element_store_i64(OPD_bf16, &bits, value);
	ck_assert(element_load_f64(OPD_bf16, &bits) == 0x1p62 + 0x1p55);
	element_store_i64(OPD_bf16, &bits, value - 1);
	ck_assert(element_load_f64(OPD_bf16, &bits) == 0x1p62);
	float single;
	element_store_i64(OPD_f32, &single, (1ll << 62) + (1ll << 38) + 1);
	ck_assert(single == 0x1p62f + 0x1p39f);
	value = (1ll << 62) + (1ll << 38) + 1;
	ck_assert(element_load_f32(OPD_i64, &value) == 0x1p62f + 0x1p39f);
}
END_TEST

/* ---- Speed, printed --------------------------------------------------------------------------------------- */

/* Of this thread, so that a busy machine doesn't show. */
static double now_ns(void)
{
	struct timespec time;
	(void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

START_TEST(the_codec_allocates_once)
{
	static struct golden golden;
	golden_load(&golden, "request-rms-norm.hex");
	struct arena arena;
	arena_init(&arena, ARENA_CAP);
	struct msg_request request;
	struct msg_result output = {.tensor = {.dtype = OPD_f32, .rank = 2, .shape = {2, 4}, .source = MSG_SOURCE_PAYLOAD}};
	struct msg_reply reply = {.kind = MSG_REPLY_RUN, .run = {.provider = {"cpu", 3}, .output_count = 1, .outputs = &output}};
	struct codec_buffer buffer;
	const int rounds = 20000;
	int failures = 0; /* counted: check's assertions write to a pipe, which would be what we measure */
	double start = now_ns();
	for (int i = 0; i < rounds; i++) {
		arena_reset(&arena);
		failures += codec_decode_request(&arena, golden_envelope(&golden), golden.header.envelope_bytes, &request, NULL) != OPD_OK;
	}
	double middle = now_ns();
	ck_assert_msg(arena.blocks != NULL && arena.used_bytes == 4096, "%zu bytes", arena.used_bytes);
	for (int i = 0; i < rounds; i++) {
		arena_reset(&arena);
		failures += codec_encode_reply(&arena, &reply, &buffer, NULL) != OPD_OK;
	}
	double end = now_ns();
	ck_assert_int_eq(failures, 0);
	ck_assert_uint_eq(arena.used_bytes, 4096);
	printf("codec: a request of 3 arguments decodes in %.0f ns, a reply of 1 output encodes in %.0f ns\n", (middle - start) / rounds,
	       (end - middle) / rounds);
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

static void add_envelopes(Suite *suite)
{
	TCase *golden = tcase(suite, "golden frames");
	tcase_add_test(golden, every_golden_frame_decodes_and_encodes_to_the_same_bytes);
	tcase_add_test(golden, truncation_at_every_byte_is_a_typed_error_or_a_shorter_message);
	tcase_add_test(golden, no_changed_byte_breaks_the_decoder);
	tcase_add_test(golden, random_envelopes_never_break_the_decoder);
	tcase_add_test(golden, the_worked_example_of_the_readme_is_the_golden_frame);
	TCase *fields = tcase(suite, "fields");
	tcase_add_test(fields, a_run_has_every_field_where_it_belongs);
	tcase_add_test(fields, a_tensor_has_every_source);
	tcase_add_test(fields, session_messages_have_every_field_where_it_belongs);
	tcase_add_test(fields, a_reply_has_every_field_where_it_belongs);
	tcase_add_test(fields, an_empty_list_differs_from_none);
	TCase *hostile = tcase(suite, "hostile envelopes");
	tcase_add_test(hostile, ranks_strides_and_dtypes_are_checked);
	tcase_add_test(hostile, packed_and_unpacked_integers_both_parse);
	tcase_add_test(hostile, names_are_utf8_without_nul_and_bounded);
	tcase_add_test(hostile, counts_are_bounded);
	tcase_add_test(hostile, memory_stays_under_the_arenas_cap);
	tcase_add_test(hostile, unknown_fields_are_ignored);
	tcase_add_test(hostile, what_is_no_protobuf_is_refused);
	tcase_add_test(hostile, modes_scopes_and_missing_values_are_refused);
	tcase_add_test(hostile, numbers_of_a_reply_that_nobody_knows_are_tolerated);
	tcase_add_test(hostile, encoding_into_a_full_arena_is_resource_exhausted);
	tcase_add_test(hostile, the_codec_allocates_once);
}

static void add_rest(Suite *suite)
{
	TCase *frames = tcase(suite, "frame headers");
	tcase_add_test(frames, frame_headers_are_checked);
	tcase_add_test(frames, reserved_bytes_of_a_frame_are_zero);
	tcase_add_test(frames, strangers_are_recognised);
	TCase *texts = tcase(suite, "texts");
	tcase_add_test(texts, escaped_text_is_fit_for_a_terminal);
	tcase_add_test(texts, escaped_text_is_cut_and_says_so);
	tcase_add_test(texts, names_match_their_grammar);
	TCase *memory = tcase(suite, "arena and sizes");
	tcase_add_test(memory, the_arena_is_aligned_bounded_and_reusable);
	tcase_add_test(memory, the_arena_refuses_what_cannot_be);
	tcase_add_test(memory, sizes_are_checked);
	tcase_add_test(memory, shapes_are_checked);
	tcase_add_test(memory, extents_are_checked);
	TCase *elements = tcase(suite, "elements");
	tcase_add_loop_test(elements, every_small_float_loads_as_defined_and_stores_back, 0, 4);
	tcase_add_loop_test(elements, small_floats_round_to_nearest_even_once, 0, 4);
	tcase_add_test(elements, integers_saturate_from_floats_and_wrap_from_integers);
	tcase_add_test(elements, a_large_integer_rounds_once);
}

int main(void)
{
	Suite *suite = suite_create("proto");
	add_envelopes(suite);
	add_rest(suite);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
