/* The wire, without sockets: frames, envelopes, texts, the arena, checked sizes, elements. Golden frames were made by another
 * protobuf (tests/golden/frames/make.py); hostile ones are made here byte by byte. */
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
#include "tests/lib/suite.h"

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

static opd_status decode(struct arena *arena, uint8_t type, const uint8_t *envelope, size_t bytes, union message *out,
                         opd_error *error)
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
	opd_status status =
	    decode(&arena, golden->header.type, golden_envelope(golden), golden->header.envelope_bytes, &message, &error);
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

/* OK or a typed error with a text, whatever the bytes are. The copy is as long as the envelope, so that ASan sees one byte too
 * many. */
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
	ck_assert_int_eq(decode(arena, golden.header.type, golden_envelope(&golden), golden.header.envelope_bytes, &message, &error),
	                 OPD_OK);
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
	ck_assert(run->mode == MSG_DRY && run->timeout_us == 1ull << 63 && run->service_class == 3);
	ck_assert(run->output_count == 4 && run->outputs[3].shared.region == 1 && run->outputs[3].shared.bytes == 64 && run->outputs[0].keep && !run->outputs[0].no_copy && run->outputs[1].no_copy);
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
	ck_assert(t[1].rank == 0 && !t[1].strided && t[1].source == MSG_SOURCE_PAYLOAD && t[1].payload.offset == 128 &&
	          t[1].payload.bytes == 8);
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
	ck_assert(reply->limits.envelope_bytes == 1u << 20 && reply->limits.payload_bytes == 1ull << 32 &&
	          reply->limits.in_flight == 1024);
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
	ck_assert(run->outputs[0].kept.index == 9 && run->outputs[0].kept.generation == 1ull << 63 &&
	          run->outputs[1].kept.generation == 0);
	const struct msg_explain *explain = run->explain;
	ck_assert(explain->skip_count == 2 && explain->skipped[0].code == OPD_REASON_DTYPE &&
	          text_is(explain->skipped[1].provider, "cuda"));
	ck_assert(text_is(explain->skipped[0].reason, "dtype: weight bf16, x f32") && explain->level == MSG_LEVEL_SESSION);
	ck_assert(explain->times.decode == 1 && explain->times.dispatch == 2 && explain->times.queue == 3);
	ck_assert(explain->times.kernel == 1ull << 40 && explain->times.moves == 5 && explain->times.pack == 6);
	ck_assert(explain->move_count == 1 && text_is(explain->moves[0].from, "cpu") && text_is(explain->moves[0].to, "cuda:0"));
	ck_assert(text_is(explain->effective[1], "cpu") && explain->on_loop && text_is(explain->device, "cpu"));
	const struct msg_info *info = &golden_message(&arena, "every-reply-info.hex")->reply.info;
	ck_assert(info->uptime_us == 1 && info->loops == 2 && info->threads == 3 && info->sessions == 4 && info->requests == 5);
	ck_assert(info->memory_bytes == 6 && info->memory_limit_bytes == 7 && info->session_memory_bytes == 8 && info->pid == 9);
	ck_assert(info->unhealthy_count == 2 && text_is(info->unhealthy[1], "lane: stuck") && info->degraded_count == 1);
	ck_assert(info->stuck == 16 && info->compared == 17 && info->diverged == 18 && info->left_out == 19 && info->device_state_count == 1);
	const struct msg_device_state *device = &info->device_states[0];
	ck_assert(text_is(device->name, "cuda:1") && device->memory_bytes == 20 && device->cached_bytes == 21 && device->memory_limit_bytes == 22);
	ck_assert(device->jobs == 23 && text_is(device->lost, "illegal access"));
	const struct msg_impl *impl = &golden_message(&arena, "every-reply-op.hex")->reply.op.impls[1];
	ck_assert(text_is(impl->provider, "cuda") && text_is(impl->reason, "why") && text_is(impl->device, "cuda") &&
	          text_is(impl->schema, "s"));
	const struct msg_provider *provider = &golden_message(&arena, "every-reply-providers.hex")->reply.providers.items[0];
	ck_assert(text_is(provider->version, "12.4") && text_is(provider->reason, "libcuda.so.1 not found") &&
	          provider->op_count == 2);
	const struct msg_priority_reply *priority = &golden_message(&arena, "every-reply-priority.hex")->reply.priority;
	ck_assert(priority->level == MSG_LEVEL_CONFIGURATION && text_is(priority->stored[0], "gone") &&
	          text_is(priority->effective[1], "native"));
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

#define ck_refused(wire, text_part)                                                                                              \
	do {                                                                                                                         \
		opd_error error_;                                                                                                        \
		ck_assert_int_eq(request_of((wire), ARENA_CAP, &error_), OPD_INVALID_ARGUMENT);                                          \
		ck_assert_msg(strstr(error_.text, (text_part)) != NULL, "\"%s\" in: %s", text_part, error_.text);                        \
	} while (0)

#define ck_taken(wire)                                                                                                           \
	do {                                                                                                                         \
		opd_error error_;                                                                                                        \
		ck_assert_msg(request_of((wire), ARENA_CAP, &error_) == OPD_OK, "%s", error_.text);                                      \
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
	    {"rms_norm\0x", 10, "op: \"rms_norm\\x00x\" is not UTF-8"},
	    {"\xc3\x28", 2, "op: \"\\xc3(\""},
	    {"\xed\xa0\x80", 3, "UTF-8"},
	    {"\xc0\x80", 2, "UTF-8"},
	    {"\xf4\x90\x80\x80", 4, "UTF-8"},
	    {"a\xe2\x82", 3, "UTF-8"},
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
		failures +=
		    codec_decode_request(&arena, golden_envelope(&golden), golden.header.envelope_bytes, &request, NULL) != OPD_OK;
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
	printf("codec: a request of 3 arguments decodes in %.0f ns, a reply of 1 output encodes in %.0f ns\n",
	       (middle - start) / rounds, (end - middle) / rounds);
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

int main(void)
{
	Suite *suite = suite_create("proto");
	add_envelopes(suite);
	return suite_run(suite);
}
