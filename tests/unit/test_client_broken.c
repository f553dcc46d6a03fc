/* libopd against a peer that breaks the protocol, cuts frames anywhere, or leaves. */
#include "tests/unit/test_client.h"

#define COUNT 40

static uint8_t *good_reply(uint64_t id, const float *data, size_t *bytes_out)
{
	struct msg_result result;
	const struct msg_reply reply = peer_vector(&result, COUNT);
	return peer_encode_reply(&reply, id, 0, data, COUNT * 4, bytes_out);
}

static bool read_one(struct peer *peer)
{
	struct peer_frame frame;
	const bool good = PEER_CHECK(peer, peer_read(peer, &frame));
	peer_frame_free(&frame);
	return good;
}

/* ---- Cut ---- */

/* Sends each of many replies in two parts, cut after every possible byte. */
static void script_cuts(struct peer *peer, void *argument)
{
	peer_hello(peer, NULL);
	uint64_t id = 1;
	for (size_t cut = 1;; cut++, id++) {
		size_t bytes;
		uint8_t *reply = good_reply(id, argument, &bytes);
		if (cut >= bytes || !read_one(peer)) {
			free(reply);
			break;
		}
		peer->split = cut;
		(void)peer_send(peer, reply, cut);
		peer->split = 0;
		(void)peer_send(peer, reply + cut, bytes - cut);
		free(reply);
	}
	peer_stage_set(peer, (int)id);
}

START_TEST(a_reply_may_be_cut_after_any_byte)
{
	struct peer peer;
	opd_error error;
	float *data = test_floats(COUNT, 1);
	size_t bytes;
	free(good_reply(1, data, &bytes));
	peer_start(&peer, _i == 0 ? PEER_UNIX : PEER_TCP4, script_cuts, data);
	opd_client *client = test_connect(&peer, 0);
	opd_request *request = test_vector(data, COUNT);
	for (size_t cut = 1; cut < bytes; cut++) {
		opd_result *result;
		MUST(opd_run(client, request, &result, &error));
		ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data, COUNT * 4), 0);
		opd_result_destroy(result);
	}
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
	free(data);
}
END_TEST

static void script_dribble(struct peer *peer, void *argument)
{
	peer->split = 1;
	peer_hello(peer, NULL);
	for (uint64_t id = 1; id <= 3 && read_one(peer); id++) {
		size_t bytes;
		uint8_t *reply = good_reply(id, argument, &bytes);
		(void)peer_send(peer, reply, bytes);
		free(reply);
	}
}

START_TEST(bytes_may_come_one_at_a_time)
{
	struct peer peer;
	opd_error error;
	float *data = test_floats(COUNT, 1);
	peer_start(&peer, PEER_UNIX, script_dribble, data);
	opd_client *client = test_connect(&peer, 5000000);
	opd_request *request = test_vector(data, COUNT);
	for (int i = 0; i < 3; i++) {
		opd_result *result;
		MUST(opd_run(client, request, &result, &error));
		ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data, COUNT * 4), 0);
		opd_result_destroy(result);
	}
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
	free(data);
}
END_TEST

static void script_large_envelope(struct peer *peer, void *argument)
{
	struct msg_text *names = calloc(4096, sizeof *names);
	char *name = argument;
	peer_hello(peer, NULL);
	for (size_t i = 0; i < 4096; i++)
		names[i] = (struct msg_text){name, 100};
	if (read_one(peer)) {
		const struct msg_reply reply = {.kind = MSG_REPLY_PRIORITY, .priority = {.stored_count = 4096, .stored = names}};
		(void)peer_reply(peer, 1, &reply, NULL, 0);
	}
	if (read_one(peer))
		(void)peer_reply(peer, 2, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
	free(names);
}

START_TEST(an_envelope_may_be_larger_than_the_stage)
{
	struct peer peer;
	opd_error error;
	char name[101];
	memset(name, 'n', 100);
	name[100] = '\0';
	peer_start(&peer, PEER_UNIX, script_large_envelope, name);
	opd_client *client = test_connect(&peer, 0);
	const opd_priority *priority;
	MUST(opd_priority_get(client, "x", &priority, &error));
	ck_assert_uint_eq(priority->stored_count, 4096);
	ck_assert_str_eq(priority->stored[4095], name);
	opd_document_free(priority);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* ---- Leaving ---- */

struct leave {
	size_t cut;
	const float *data;
};

static void script_leave(struct peer *peer, void *argument)
{
	const struct leave *leave = argument;
	size_t bytes;
	peer_hello(peer, NULL);
	if (!read_one(peer) || !read_one(peer))
		return;
	uint8_t *first = good_reply(1, leave->data, &bytes);
	(void)peer_send(peer, first, bytes);
	free(first);
	uint8_t *second = good_reply(2, leave->data, &bytes);
	(void)peer_send(peer, second, leave->cut);
	free(second);
}

START_TEST(a_server_that_leaves_is_unavailable_and_what_came_before_stays)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	float *data = test_floats(COUNT, 1);
	size_t bytes;
	free(good_reply(2, data, &bytes));
	for (size_t cut = 0; cut < bytes; cut += cut < 100 ? 7 : 31) {
		struct leave leave = {cut, data};
		opd_ticket tickets[2], any;
		peer_start(&peer, PEER_UNIX, script_leave, &leave);
		opd_client *client = test_connect(&peer, 0);
		opd_request *request = test_vector(data, COUNT);
		MUST(opd_submit(client, request, &tickets[0], &error));
		MUST(opd_submit(client, request, &tickets[1], &error));
		ck_assert_int_eq(opd_wait(client, tickets[1], UINT64_MAX, &result, &error), OPD_UNAVAILABLE);
		ck_assert_msg((strstr(error.text, "in the middle") != NULL) == (cut != 0), "%s", error.text);
		ck_assert_ptr_null(result);
		ck_assert_uint_eq(opd_in_flight(client), 1);
		MUST(opd_wait_any(client, UINT64_MAX, &any, &result, &error));
		ck_assert_uint_eq(any, tickets[0]);
		ck_assert_int_eq(opd_submit(client, request, &any, &error), OPD_UNAVAILABLE);
		ck_assert_int_eq(opd_process(client, &error), OPD_UNAVAILABLE);
		opd_cancel(client, tickets[1]);
		opd_close(client);
		ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data, COUNT * 4), 0);
		opd_result_destroy(result);
		opd_request_destroy(request);
		ck_assert(peer_join(&peer));
	}
	free(data);
}
END_TEST

static void script_reset(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, NULL);
	peer_wait_readable(peer);
	(void)peer_reply_status(peer, 1, OPD_INTERNAL, "last words");
}

START_TEST(the_last_words_of_a_server_that_stopped_reading_are_heard)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	opd_ticket ticket;
	float *data = calloc(1, (size_t)8 << 20);
	peer_start(&peer, PEER_UNIX, script_reset, NULL);
	opd_client *client = test_connect(&peer, 0);
	opd_request *request = test_vector(data, 2 << 20);
	MUST(opd_submit(client, request, &ticket, &error));
	ck_assert(peer_join(&peer)); /* it has said its words and closed, with our bytes unread */
	const opd_status status = opd_wait(client, ticket, UINT64_MAX, &result, &error);
	ck_assert_msg(status == OPD_INTERNAL || status == OPD_UNAVAILABLE, "%s", error.text);
	opd_result_destroy(result);
	ck_assert_int_eq(opd_ping(client, &error), OPD_UNAVAILABLE);
	opd_request_destroy(request);
	opd_close(client);
	free(data);
}
END_TEST

/* ---- Malformed ---- */

/* A RUN reply with one f32 vector of COUNT elements, changed by the case before it is sent. */
struct bad_reply {
	const char *name;
	const char *text; /* that the error must contain */
	void (*send)(struct peer *peer);
};

static void send_tensor(struct peer *peer, const struct msg_tensor *tensor, uint16_t flags, uint64_t payload_bytes)
{
	struct msg_result result = {.tensor = *tensor};
	const struct msg_reply reply = {.kind = MSG_REPLY_RUN,
	                                .run = {.provider = msg_text("x"), .output_count = 1, .outputs = &result}};
	size_t bytes;
	uint8_t payload[1024] = {0};
	uint8_t *frame = peer_encode_reply(&reply, 1, flags, payload_bytes <= sizeof payload ? payload : NULL, payload_bytes, &bytes);
	(void)peer_send(peer, frame, bytes);
	free(frame);
}

static const struct msg_tensor vector = {
    .dtype = OPD_f32, .rank = 1, .shape = {COUNT}, .source = MSG_SOURCE_PAYLOAD, .payload = {0, COUNT * 4}};

/* A function that sends the vector with one thing changed. */
#define BAD_TENSOR(name, change, flags, payload_bytes)                                                                           \
	static void name(struct peer *peer)                                                                                          \
	{                                                                                                                            \
		struct msg_tensor tensor = vector;                                                                                       \
		tensor.change;                                                                                                           \
		send_tensor(peer, &tensor, flags, payload_bytes);                                                                        \
	}
BAD_TENSOR(send_misaligned, payload.offset = 32, 0, 192)
BAD_TENSOR(send_past_end, payload.offset = 64, 0, 160)
BAD_TENSOR(send_wrapping, payload.offset = UINT64_MAX - 63, 0, 160)
BAD_TENSOR(send_short_range, payload.bytes = 156, 0, 160)
BAD_TENSOR(send_large_shape, shape[0] = INT64_MAX, 0, 160)
BAD_TENSOR(send_negative_shape, shape[0] = -1, 0, 160)
BAD_TENSOR(send_no_dtype, dtype = OPD_DTYPE_NONE, 0, 160)
BAD_TENSOR(send_byte_offset, byte_offset = 4, 0, 160)
BAD_TENSOR(send_trailing, rank = 1, 0, 512)
BAD_TENSOR(send_trailing_huge, rank = 1, FRAME_CHUNKED, 1ull << 40)

static void send_strides(struct peer *peer)
{
	struct msg_tensor tensor = vector;
	tensor.strided = true;
	tensor.strides[0] = 2;
	send_tensor(peer, &tensor, 0, 160);
}

static void send_handle_source(struct peer *peer)
{
	struct msg_tensor tensor = vector;
	tensor.source = MSG_SOURCE_HANDLE;
	tensor.handle = (struct msg_handle){1, 2};
	send_tensor(peer, &tensor, 0, 0);
}

static void send_short_inline(struct peer *peer)
{
	struct msg_tensor tensor = vector;
	tensor.source = MSG_SOURCE_INLINE;
	tensor.inlined.data = (const uint8_t *)"abc";
	tensor.inlined.bytes = 3;
	send_tensor(peer, &tensor, 0, 0);
}

static void send_raw(struct peer *peer, frame_type type, uint16_t flags, uint64_t id, const char *envelope,
                     uint32_t envelope_bytes, uint64_t payload)
{
	static const uint8_t zeroes[256];
	(void)peer_send_frame(peer, type, flags, id, envelope, envelope_bytes, payload <= sizeof zeroes ? zeroes : NULL, payload);
}

static void send_garbage(struct peer *peer)
{
	(void)peer_send(peer, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", 47);
}

static void send_type(struct peer *peer)
{
	send_raw(peer, (frame_type)77, 0, 1, "", 0, 0);
}

static void send_client_frame(struct peer *peer)
{
	send_raw(peer, FRAME_ABORT, 0, 1, "", 0, 0);
}

static void send_second_hello(struct peer *peer)
{
	send_raw(peer, FRAME_HELLO_REPLY, 0, 0, "", 0, 0);
}

static void send_bad_envelope(struct peer *peer)
{
	send_raw(peer, FRAME_REPLY, 0, 1, "\xff\xff\xff\xff", 4, 0);
}

static void send_huge_envelope(struct peer *peer)
{
	uint8_t header[FRAME_HEADER_BYTES];
	frame_encode(&(struct frame_header){.version = 1, .type = FRAME_REPLY, .request_id = 1, .envelope_bytes = UINT32_MAX},
	             header);
	(void)peer_send(peer, header, sizeof header);
}

static void send_huge_payload(struct peer *peer)
{
	uint8_t header[FRAME_HEADER_BYTES];
	frame_encode(&(struct frame_header){.version = 1, .type = FRAME_REPLY, .request_id = 1, .payload_bytes = UINT64_MAX}, header);
	(void)peer_send(peer, header, sizeof header);
}

static void send_unknown_id(struct peer *peer)
{
	(void)peer_reply_status(peer, 99, OPD_OK, "");
}

static void send_id_zero(struct peer *peer)
{
	(void)peer_reply_status(peer, 0, OPD_OK, "");
}

static void send_wrong_body(struct peer *peer)
{
	(void)peer_reply(peer, 1, &(struct msg_reply){.kind = MSG_REPLY_INFO}, NULL, 0);
}

static void send_no_body(struct peer *peer)
{
	(void)peer_reply_status(peer, 1, OPD_OK, "");
}

static void send_stray_data(struct peer *peer)
{
	(void)peer_send_data(peer, 1, 0, "abcd", 4);
}

/* The head of a chunked reply of COUNT floats. */
static void send_chunked_head(struct peer *peer)
{
	send_tensor(peer, &vector, FRAME_CHUNKED, 160);
}

static void send_data_gap(struct peer *peer)
{
	send_chunked_head(peer);
	(void)peer_send_data(peer, 1, 64, "abcd", 4);
}

static void send_data_twice(struct peer *peer)
{
	send_chunked_head(peer);
	(void)peer_send_data(peer, 1, 0, "abcd", 4);
	(void)peer_send_data(peer, 1, 0, "abcd", 4);
}

static void send_data_beyond(struct peer *peer)
{
	uint8_t bytes[161] = {0};
	send_chunked_head(peer);
	(void)peer_send_data(peer, 1, 0, bytes, sizeof bytes);
}

static void send_data_short_envelope(struct peer *peer)
{
	send_chunked_head(peer);
	send_raw(peer, FRAME_DATA, 0, 1, "abcd", 4, 4);
}

static void send_data_empty(struct peer *peer)
{
	send_chunked_head(peer);
	send_raw(peer, FRAME_DATA, 0, 1, "\0\0\0\0\0\0\0\0", 8, 0);
}

static void send_second_reply(struct peer *peer)
{
	send_chunked_head(peer);
	(void)peer_reply_status(peer, 1, OPD_OK, "");
}

static const struct bad_reply bad_replies[] = {
    {"not opd", "HTTP", send_garbage},
    {"unknown frame type", "type 77", send_type},
    {"a client's frame", "type 6", send_client_frame},
    {"second hello", "second answer to Hello", send_second_hello},
    {"envelope that is no protobuf", "request 1", send_bad_envelope},
    {"huge envelope", "4294967295", send_huge_envelope},
    {"huge payload", "18446744073709551615", send_huge_payload},
    {"unknown request", "request 99", send_unknown_id},
    {"request 0", "0", send_id_zero},
    {"wrong body", "body 6, expected 1", send_wrong_body},
    {"no body", "body 0, expected 1", send_no_body},
    {"misaligned range", "multiple of 64", send_misaligned},
    {"range past the end", "[64, +160)", send_past_end},
    {"range that wraps", "[18446744073709551552, +160)", send_wrapping},
    {"range shorter than the shape", "has 156 bytes", send_short_range},
    {"shape that wraps", "dtype and shape", send_large_shape},
    {"negative shape", "dtype and shape", send_negative_shape},
    {"no dtype", "dtype and shape", send_no_dtype},
    {"strides", "row-major", send_strides},
    {"byte offset", "byte offset 4", send_byte_offset},
    {"handle as source", "source", send_handle_source},
    {"bytes after the last tensor", "tensors end at 160", send_trailing},
    {"a terabyte after the last tensor", "tensors end at 160", send_trailing_huge},
    {"short inline bytes", "3 inline bytes", send_short_inline},
    {"DATA without a chunked reply", "of which none is due", send_stray_data},
    {"DATA with a gap", "offset 64, expected 0", send_data_gap},
    {"DATA twice", "offset 0, expected 4", send_data_twice},
    {"DATA beyond the end", "161 bytes at offset 0", send_data_beyond},
    {"DATA without an offset", "4 bytes", send_data_short_envelope},
    {"empty DATA", "DATA", send_data_empty},
    {"second reply", "second reply", send_second_reply},
};

static void script_bad(struct peer *peer, void *argument)
{
	const struct bad_reply *bad = argument;
	peer_hello(peer, NULL);
	if (read_one(peer) && read_one(peer))
		bad->send(peer);
	peer_stage_wait(peer, 1);
}

START_TEST(a_malformed_reply_ends_the_connection_with_a_typed_error)
{
	struct bad_reply bad = bad_replies[_i];
	struct peer peer;
	opd_error error;
	opd_result *result;
	opd_ticket tickets[2];
	float data[COUNT] = {0};
	peer_start(&peer, PEER_UNIX, script_bad, &bad);
	opd_client *client = test_connect(&peer, 10000000);
	opd_request *request = test_vector(data, COUNT);
	MUST(opd_submit(client, request, &tickets[0], &error));
	MUST(opd_submit(client, request, &tickets[1], &error));
	const opd_status status = opd_wait(client, tickets[0], 10000000, &result, &error);
	ck_assert_msg(status == OPD_DATA_LOSS, "%s: %s %s", bad.name, opd_status_name(status), error.text);
	ck_assert_msg(strstr(error.text, bad.text) != NULL, "%s: %s", bad.name, error.text);
	ck_assert_ptr_null(result);
	ck_assert_uint_eq(opd_in_flight(client), 0);
	ck_assert_int_eq(opd_wait(client, tickets[1], 0, &result, &error), OPD_UNAVAILABLE);
	ck_assert_msg(strstr(error.text, bad.text) != NULL, "%s: %s", bad.name, error.text);
	ck_assert_int_eq(opd_ping(client, &error), OPD_UNAVAILABLE);
	opd_request_destroy(request);
	opd_close(client);
	peer_stage_set(&peer, 1);
	ck_assert(peer_join(&peer));
}
END_TEST

/* Random bytes after a good beginning: any answer will do that is one. */
static void script_noise(struct peer *peer, void *argument)
{
	unsigned *seed = argument;
	size_t bytes;
	float data[COUNT] = {0};
	peer_hello(peer, NULL);
	if (!read_one(peer))
		return;
	uint8_t *reply = good_reply(1, data, &bytes);
	for (int i = 0; i < 3; i++)
		reply[(size_t)rand_r(seed) % bytes] ^= (uint8_t)(1u << ((unsigned)rand_r(seed) % 8));
	(void)peer_send(peer, reply, bytes);
	free(reply);
}

START_TEST(flipped_bits_never_crash_it)
{
	unsigned seed = 1;
	for (int i = 0; i < 300; i++) {
		struct peer peer;
		opd_error error;
		opd_result *result;
		float data[COUNT] = {0};
		peer_start(&peer, PEER_UNIX, script_noise, &seed);
		opd_client *client = test_connect(&peer, 10000000);
		opd_request *request = test_vector(data, COUNT);
		const opd_status status = opd_run(client, request, &result, &error);
		ck_assert_msg(status != OPD_DEADLINE_EXCEEDED || result != NULL, "round %d: %s", i, error.text);
		opd_result_destroy(result);
		opd_request_destroy(request);
		opd_close(client);
		ck_assert(peer_join(&peer));
	}
}
END_TEST

/* ---- Greetings ---- */

static void script_greeting(struct peer *peer, void *argument)
{
	switch (*(const int *)argument) {
	case 0: /* leaves without a word */
		(void)read_one(peer);
		return;
	case 1:
		(void)read_one(peer);
		send_garbage(peer);
		break;
	case 2: /* another frame first */
		(void)read_one(peer);
		(void)peer_reply_status(peer, 1, OPD_OK, "");
		break;
	case 3:
		peer_hello(peer, &(struct msg_hello_reply){.version = 9});
		break;
	case 4:
		peer_hello(peer, &(struct msg_hello_reply){.version = 1, .chunk_bytes = 7});
		break;
	case 5:
		peer_hello(peer, &(struct msg_hello_reply){.version = 1, .chunk_bytes = 1ull << 40});
		break;
	default:
		(void)read_one(peer);
		send_raw(peer, FRAME_HELLO_REPLY, 0, 0, "\xff\xff\xff", 3, 0);
		break;
	}
	peer_stage_wait(peer, 1);
}

START_TEST(a_bad_greeting_is_no_session)
{
	struct peer peer;
	opd_error error;
	opd_client *client = NULL;
	peer_start(&peer, PEER_UNIX, script_greeting, &_i);
	const opd_connect_options options = {.struct_bytes = sizeof options, .timeout_us = 10000000};
	ck_assert_int_eq(opd_connect(peer.address, &options, &client, &error), _i == 0 ? OPD_UNAVAILABLE : OPD_DATA_LOSS);
	ck_assert_msg(strncmp(error.text, peer.address, strlen(peer.address)) == 0, "%s", error.text);
	ck_assert_ptr_null(client);
	peer_stage_set(&peer, 1);
	ck_assert(peer_join(&peer));
}
END_TEST

Suite *broken_suite(void)
{
	Suite *suite = suite_create("client, broken peers");
	TCase *tests = tcase_create("broken");
	tcase_set_timeout(tests, 60);
	tcase_add_loop_test(tests, a_reply_may_be_cut_after_any_byte, 0, 2);
	tcase_add_test(tests, bytes_may_come_one_at_a_time);
	tcase_add_test(tests, an_envelope_may_be_larger_than_the_stage);
	tcase_add_test(tests, a_server_that_leaves_is_unavailable_and_what_came_before_stays);
	tcase_add_test(tests, the_last_words_of_a_server_that_stopped_reading_are_heard);
	tcase_add_loop_test(tests, a_malformed_reply_ends_the_connection_with_a_typed_error, 0,
	                    sizeof bad_replies / sizeof *bad_replies);
	tcase_add_test(tests, flipped_bits_never_crash_it);
	tcase_add_loop_test(tests, a_bad_greeting_is_no_session, 0, 7);
	suite_add_tcase(suite, tests);
	return suite;
}
