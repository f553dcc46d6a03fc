/* libopd against a scripted peer: chunks, early answers, cancelled and half-sent requests, both directions at once. */
#include "tests/unit/test_client.h"

#include <sys/socket.h>

#define CHUNK (64u << 10)

static opd_client *connect_chunked(const struct peer *peer, bool no_chunks)
{
	opd_client *client = NULL;
	opd_error error = {0};
	const opd_connect_options options = {
	    .struct_bytes = sizeof options, .chunk_bytes = no_chunks ? 0 : CHUNK, .no_chunks = no_chunks};
	const opd_status status = opd_connect(peer->address, &options, &client, &error);
	ck_assert_msg(status == OPD_OK, "%s", error.text);
	ck_assert_uint_eq(opd_client_session(client)->chunk_bytes, no_chunks ? 0 : CHUNK);
	return client;
}

static void script_echo(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, NULL);
	peer_echo(peer);
}

/* ---- Large ---- */

START_TEST(huge_payloads_go_both_ways)
{
	struct peer peer;
	opd_error error;
	const size_t count = (size_t)4 << 20; /* 16 MiB */
	peer_start(&peer, _i % 2 == 0 ? PEER_UNIX : PEER_TCP4, script_echo, NULL);
	opd_client *client = connect_chunked(&peer, _i >= 2);
	float *data = test_floats(count, 5);
	for (int i = 0; i < 3; i++) {
		opd_request *request = test_vector(data + i, (int64_t)count - i);
		opd_result *result;
		MUST(opd_run(client, request, &result, &error));
		ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data + i, (count - (size_t)i) * 4), 0);
		opd_result_destroy(result);
		opd_request_destroy(request);
	}
	opd_close(client);
	ck_assert(peer_join(&peer));
	free(data);
}
END_TEST

#define FLOOD_BYTES ((size_t)8 << 20)

/* Answers the first request with a flood before it reads a byte of the second. */
static void script_flood(struct peer *peer, void *argument)
{
	struct arena arena;
	struct peer_frame frame;
	struct msg_request request;
	uint8_t *flood = calloc(1, FLOOD_BYTES);
	(void)argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request)))
		return;
	peer_frame_free(&frame);
	struct msg_result result;
	const struct msg_reply reply = peer_vector(&result, FLOOD_BYTES / 4);
	(void)PEER_CHECK(peer, peer_reply(peer, 1, &reply, flood, FLOOD_BYTES));
	arena_reset(&arena);
	if (PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request))) {
		(void)PEER_CHECK(peer, frame.header.payload_bytes == FLOOD_BYTES);
		(void)peer_reply(peer, 2, &reply, flood, FLOOD_BYTES);
		peer_frame_free(&frame);
	}
	free(flood);
	arena_fini(&arena);
}

START_TEST(writing_a_large_request_keeps_reading)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_flood, NULL);
	opd_client *client = connect_chunked(&peer, _i == 1);
	float *data = test_floats(FLOOD_BYTES / 4, 5);
	opd_request *small = test_vector(data, 1), *large = test_vector(data, FLOOD_BYTES / 4);
	opd_ticket first, second;
	opd_result *result;
	MUST(opd_submit(client, small, &first, &error));
	MUST(opd_submit(client, large, &second, &error));
	MUST(opd_wait(client, second, 20000000, &result, &error));
	opd_result_destroy(result);
	MUST(opd_wait(client, first, 0, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(small);
	opd_request_destroy(large);
	opd_close(client);
	ck_assert(peer_join(&peer));
	free(data);
}
END_TEST

static void script_overtake(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	uint64_t have[4] = {0};
	uint64_t small_at = 0, frames = 0;
	const uint64_t total = *(const uint64_t *)argument;
	bool interleaved = false;
	uint64_t last = 0;
	peer_hello(peer, NULL);
	peer_stage_wait(peer, 1); /* all three are queued before anything is read */
	while (have[1] + have[2] < 2 * total && PEER_CHECK(peer, peer_read(peer, &frame))) {
		const uint64_t id = frame.header.request_id;
		frames++;
		if (!PEER_CHECK(peer, id >= 1 && id <= 3))
			return;
		if (frame.header.type == FRAME_DATA) {
			(void)PEER_CHECK(peer, frame_load_u64(frame.envelope) == have[id] && frame.header.payload_bytes <= CHUNK);
			have[id] += frame.header.payload_bytes;
			interleaved = interleaved || (last == 2 && id == 1);
			last = id;
		} else if (id == 3) {
			small_at = have[1] + have[2];
		}
		peer_frame_free(&frame);
	}
	(void)PEER_CHECK(peer, frames > 3 && interleaved);
	(void)PEER_CHECK(peer, small_at != 0 && small_at < total); /* beyond what the socket had taken already */
	for (uint64_t id = 1; id <= 3; id++)
		(void)peer_reply(peer, id, &(struct msg_reply){.kind = MSG_REPLY_RUN}, NULL, 0);
	peer_stage_wait(peer, 2);
}

START_TEST(small_requests_overtake_bulk_and_bulk_is_fair)
{
	struct peer peer;
	opd_error error;
	uint64_t bytes = (uint64_t)4 << 20;
	peer_start(&peer, PEER_UNIX, script_overtake, &bytes);
	opd_client *client = connect_chunked(&peer, false);
	float *data = test_floats(bytes / 4, 9);
	opd_request *large = test_vector(data, (int64_t)bytes / 4), *small = test_vector(data, 2000);
	opd_ticket ticket;
	MUST(opd_submit(client, large, &ticket, &error));
	MUST(opd_submit(client, large, &ticket, &error));
	MUST(opd_submit(client, small, &ticket, &error));
	peer_stage_set(&peer, 1);
	for (int i = 0; i < 3; i++) {
		opd_result *result;
		MUST(opd_wait_any(client, 20000000, &ticket, &result, &error));
		opd_result_destroy(result);
	}
	peer_stage_set(&peer, 2);
	opd_request_destroy(large);
	opd_request_destroy(small);
	opd_close(client);
	ck_assert(peer_join(&peer));
	free(data);
}
END_TEST

/* ---- Chunked replies ---- */

static void script_interleave(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	const float *data = argument;
	const uint8_t *bytes = argument;
	const uint64_t total = 5 * CHUNK + 12;
	(void)data;
	peer_hello(peer, NULL);
	for (int i = 0; i < 3; i++) {
		if (!PEER_CHECK(peer, peer_read(peer, &frame)))
			return;
		peer_frame_free(&frame);
	}
	struct msg_result result;
	const struct msg_reply reply = peer_vector(&result, (int64_t)total / 4);
	peer->split = 10007; /* frames are cut anywhere on their way */
	for (uint64_t id = 1; id <= 2; id++) {
		size_t head;
		uint8_t *encoded = peer_encode_reply(&reply, id, FRAME_CHUNKED, NULL, total, &head);
		(void)peer_send(peer, encoded, head);
		free(encoded);
	}
	for (uint64_t at = 0; at < total; at += CHUNK) {
		const uint64_t some = total - at < CHUNK ? total - at : CHUNK;
		(void)peer_send_data(peer, 1, at, bytes + at, some);
		(void)peer_send_data(peer, 2, at, bytes + 4 + at, some);
		if (at == 2 * CHUNK)
			(void)peer_reply_status(peer, 3, OPD_ABORTED, "in between");
	}
	peer_stage_wait(peer, 1);
}

START_TEST(chunked_replies_are_assembled_interleaved)
{
	struct peer peer;
	opd_error error;
	float *data = test_floats(2 * 5 * CHUNK, 11);
	peer_start(&peer, PEER_UNIX, script_interleave, data);
	opd_client *client = connect_chunked(&peer, false);
	opd_request *request = test_vector(data, 1);
	opd_ticket tickets[3];
	opd_result *result;
	for (int i = 0; i < 3; i++)
		MUST(opd_submit(client, request, &tickets[i], &error));
	if (_i == 1)
		opd_cancel(client, tickets[0]); /* its reply is dropped while the other's is kept */
	ck_assert_int_eq(opd_wait(client, tickets[2], 20000000, &result, &error), OPD_ABORTED);
	opd_result_destroy(result);
	for (int i = _i; i < 2; i++) {
		MUST(opd_wait(client, tickets[i], 20000000, &result, &error));
		ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data + i, 5 * CHUNK + 12), 0);
		opd_result_destroy(result);
	}
	peer_stage_set(&peer, 1);
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
	free(data);
}
END_TEST

/* ---- Early answers and cancelling ---- */

#define LARGE_BYTES ((size_t)8 << 20)

/* Reads frames until ABORT of request 1; whatever DATA comes before is counted. Then serves a ping. */
static void read_until_abort(struct peer *peer, uint64_t ping)
{
	struct peer_frame frame;
	uint64_t have = 0;
	bool aborted = false;
	while (!aborted && PEER_CHECK(peer, peer_read(peer, &frame))) {
		aborted = frame.header.type == FRAME_ABORT;
		(void)PEER_CHECK(peer, frame.header.request_id == 1);
		if (frame.header.type == FRAME_DATA) {
			(void)PEER_CHECK(peer, frame_load_u64(frame.envelope) == have);
			for (uint64_t i = 0; i < frame.header.payload_bytes; i++) /* what does come is still what the caller had there */
				if (frame.payload[i] != 0x5a && !PEER_CHECK(peer, !"the caller's bytes"))
					break;
			have += frame.header.payload_bytes;
		}
		peer_frame_free(&frame);
	}
	(void)PEER_CHECK(peer, have < LARGE_BYTES);
	if (ping != 0 && PEER_CHECK(peer, peer_read(peer, &frame))) {
		(void)PEER_CHECK(peer, frame.header.type == FRAME_REQUEST && frame.header.request_id == ping);
		(void)peer_reply(peer, ping, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
		peer_frame_free(&frame);
	}
}

static void script_early(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	(void)argument;
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read(peer, &frame)))
		return;
	(void)PEER_CHECK(peer, (frame.header.flags & FRAME_CHUNKED) != 0 && frame.header.payload_bytes == LARGE_BYTES);
	peer_frame_free(&frame);
	(void)peer_reply_status(peer, 1, OPD_NOT_FOUND, "op nonsense");
	peer_stage_wait(peer, 1); /* by then the caller has taken the answer and scribbled over its operand */
	read_until_abort(peer, 2);
}

START_TEST(an_early_error_stops_the_payload_with_abort)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	float *data = malloc(LARGE_BYTES);
	memset(data, 0x5a, LARGE_BYTES);
	peer_start(&peer, PEER_UNIX, script_early, NULL);
	opd_client *client = connect_chunked(&peer, false);
	opd_request *request = test_vector(data, LARGE_BYTES / 4);
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_NOT_FOUND);
	ck_assert_str_eq(error.text, "op nonsense");
	memset(data, 0, LARGE_BYTES);
	free(data);
	opd_result_destroy(result);
	opd_request_destroy(request);
	peer_stage_set(&peer, 1);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* Without chunks the frame must be finished; what is left of it has been copied. */
static void script_early_whole(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	(void)argument;
	peer_hello(peer, NULL);
	peer_wait_readable(peer);
	if (argument == NULL) /* else the client hasn't been answered, it has cancelled */
		(void)peer_reply_status(peer, 1, OPD_NOT_FOUND, "op nonsense");
	peer_stage_wait(peer, 1);
	if (!PEER_CHECK(peer, peer_read(peer, &frame)))
		return;
	(void)PEER_CHECK(peer, frame.header.payload_bytes == LARGE_BYTES && (frame.header.flags & FRAME_CHUNKED) == 0);
	size_t same = 0;
	while (same < LARGE_BYTES && frame.payload[same] == 0x5a)
		same++;
	(void)PEER_CHECK(peer, same == LARGE_BYTES);
	peer_frame_free(&frame);
	if (argument != NULL)
		(void)peer_reply_status(peer, 1, OPD_OK, "");
	if (PEER_CHECK(peer, peer_read(peer, &frame)))
		(void)peer_reply(peer, 2, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
	peer_frame_free(&frame);
}

START_TEST(an_early_error_without_chunks_finishes_the_frame)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	float *data = malloc(LARGE_BYTES);
	memset(data, 0x5a, LARGE_BYTES);
	peer_start(&peer, PEER_UNIX, script_early_whole, NULL);
	opd_client *client = connect_chunked(&peer, true);
	opd_request *request = test_vector(data, LARGE_BYTES / 4);
	opd_ticket ticket;
	MUST(opd_submit(client, request, &ticket, &error)); /* the peer answers at once: the frame has begun */
	ck_assert_int_eq(opd_wait(client, ticket, 20000000, &result, &error), OPD_NOT_FOUND);
	memset(data, 0, LARGE_BYTES);
	free(data);
	opd_result_destroy(result);
	opd_request_destroy(request);
	peer_stage_set(&peer, 1);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

START_TEST(cancelling_a_half_sent_request_without_chunks_finishes_it_from_a_copy)
{
	struct peer peer;
	opd_error error;
	float *data = malloc(LARGE_BYTES);
	memset(data, 0x5a, LARGE_BYTES);
	peer_start(&peer, PEER_UNIX, script_early_whole, &peer);
	opd_client *client = connect_chunked(&peer, true);
	opd_request *request = test_vector(data, LARGE_BYTES / 4);
	opd_ticket ticket;
	MUST(opd_submit(client, request, &ticket, &error));
	opd_cancel(client, ticket);
	ck_assert_uint_eq(opd_in_flight(client), 0);
	memset(data, 0, LARGE_BYTES);
	free(data);
	opd_request_destroy(request);
	peer_stage_set(&peer, 1);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_cancelled(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, NULL);
	peer_stage_wait(peer, 1);
	struct peer_frame frame;
	if (!PEER_CHECK(peer, peer_read(peer, &frame)))
		return;
	peer_frame_free(&frame);
	read_until_abort(peer, 0);
	(void)peer_reply_status(peer, 1, OPD_CANCELLED, "aborted"); /* nobody waits for it */
	if (PEER_CHECK(peer, peer_read(peer, &frame)) && PEER_CHECK(peer, frame.header.request_id == 2))
		(void)peer_reply(peer, 2, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
	peer_frame_free(&frame);
}

START_TEST(cancelling_a_half_sent_request_aborts_it)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	float *data = malloc(LARGE_BYTES);
	memset(data, 0x5a, LARGE_BYTES);
	peer_start(&peer, PEER_UNIX, script_cancelled, NULL);
	opd_client *client = connect_chunked(&peer, false);
	opd_request *request = test_vector(data, LARGE_BYTES / 4);
	opd_ticket ticket;
	MUST(opd_submit(client, request, &ticket, &error));
	opd_cancel(client, ticket);
	opd_cancel(client, ticket);
	opd_cancel(client, 77);
	ck_assert_int_eq(opd_wait(client, ticket, 0, &result, &error), OPD_NOT_FOUND);
	memset(data, 0, LARGE_BYTES);
	free(data);
	opd_request_destroy(request);
	peer_stage_set(&peer, 1);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static void expect_frame(struct peer *peer, frame_type type, uint64_t id)
{
	struct peer_frame frame;
	if (PEER_CHECK(peer, peer_read(peer, &frame)))
		(void)(PEER_CHECK(peer, frame.header.type == type) && PEER_CHECK(peer, frame.header.request_id == id));
	peer_frame_free(&frame);
}

static void script_takes_cancel(struct peer *peer, void *argument)
{
	const struct msg_text features[] = {msg_text("other"), msg_text("cancel")};
	(void)argument;
	peer_hello(peer, &(struct msg_hello_reply){.version = FRAME_VERSION, .feature_count = 2, .features = features});
	expect_frame(peer, FRAME_REQUEST, 1);
	expect_frame(peer, FRAME_REQUEST, 2);
	struct msg_result result;
	const struct msg_reply reply = peer_vector(&result, 4);
	(void)peer_reply(peer, 2, &reply, "0123456789abcde", 16);
	expect_frame(peer, FRAME_CANCEL, 1);
	expect_frame(peer, FRAME_REQUEST, 3); /* one CANCEL, and none for what is answered */
	(void)peer_reply_status(peer, 1, OPD_CANCELLED, "cancelled"); /* nobody waits for it */
	(void)peer_reply(peer, 3, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
}

START_TEST(cancelling_tells_a_server_that_can)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	float data[4] = {1, 2, 3, 4};
	peer_start(&peer, PEER_UNIX, script_takes_cancel, NULL);
	opd_client *client = connect_chunked(&peer, false);
	opd_request *request = test_vector(data, 4);
	opd_ticket tickets[2];
	MUST(opd_submit(client, request, &tickets[0], &error));
	MUST(opd_submit(client, request, &tickets[1], &error));
	MUST(opd_wait(client, tickets[1], UINT64_MAX, &result, &error));
	opd_cancel(client, tickets[0]);
	opd_cancel(client, tickets[0]);
	opd_cancel(client, tickets[1]);
	ck_assert_uint_eq(opd_in_flight(client), 0);
	opd_result_destroy(result);
	ck_assert_int_eq(opd_wait(client, tickets[0], 0, &result, &error), OPD_NOT_FOUND);
	MUST(opd_ping(client, &error));
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* ---- Timeouts ---- */

static void script_late(struct peer *peer, void *argument)
{
	struct peer_frame frames[2];
	(void)argument;
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read(peer, &frames[0])))
		return;
	peer_stage_wait(peer, 1);
	struct msg_result result;
	const struct msg_reply reply = peer_vector(&result, 4);
	(void)peer_reply(peer, 1, &reply, frames[0].payload, 16); /* nobody waits for it any more */
	if (!PEER_CHECK(peer, peer_read(peer, &frames[1])))
		return;
	peer_stage_wait(peer, 2);
	(void)peer_reply(peer, 2, &reply, frames[1].payload, 16);
	peer_frame_free(&frames[0]);
	peer_frame_free(&frames[1]);
	peer_stage_wait(peer, 3);
}

START_TEST(a_timed_out_run_is_forgotten_and_a_timed_out_wait_is_not)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	opd_ticket ticket;
	const float data[4] = {1, 2, 3, 4}, more[4] = {5, 6, 7, 8};
	peer_start(&peer, PEER_UNIX, script_late, NULL);
	opd_client *client = test_connect(&peer, 30000);
	opd_request *first = test_vector(data, 4), *second = test_vector(more, 4);
	ck_assert_int_eq(opd_run(client, first, &result, &error), OPD_DEADLINE_EXCEEDED);
	ck_assert_ptr_null(result);
	ck_assert_uint_eq(opd_in_flight(client), 0);
	peer_stage_set(&peer, 1);
	MUST(opd_submit(client, second, &ticket, &error));
	ck_assert_int_eq(opd_wait(client, ticket, 0, &result, &error), OPD_DEADLINE_EXCEEDED);
	ck_assert_int_eq(opd_wait(client, ticket, 20000, &result, &error), OPD_DEADLINE_EXCEEDED);
	ck_assert_int_eq(opd_wait(client, ticket, 30000, &result, &error), OPD_DEADLINE_EXCEEDED);
	ck_assert_int_eq(opd_wait_any(client, 1000, &ticket, &result, &error), OPD_DEADLINE_EXCEEDED);
	ck_assert_uint_eq(opd_in_flight(client), 1);
	peer_stage_set(&peer, 2);
	MUST(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert_float_eq(((float *)opd_result_tensor(result, 0)->data)[0], 5.0f);
	opd_result_destroy(result);
	peer_stage_set(&peer, 3);
	opd_request_destroy(first);
	opd_request_destroy(second);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_blocked(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, NULL);
	peer_stage_wait(peer, 1);
}

START_TEST(a_server_that_does_not_read_times_out_too)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	float *data = calloc(1, LARGE_BYTES);
	peer_start(&peer, PEER_UNIX, script_blocked, NULL);
	opd_client *client = test_connect(&peer, 30000);
	opd_request *request = test_vector(data, LARGE_BYTES / 4);
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_DEADLINE_EXCEEDED);
	free(data);
	opd_request_destroy(request);
	opd_close(client); /* with a request half sent */
	peer_stage_set(&peer, 1);
	ck_assert(peer_join(&peer));
}
END_TEST

Suite *sending_suite(void)
{
	Suite *suite = suite_create("client, sending");
	TCase *tests = tcase_create("sending");
	tcase_set_timeout(tests, 60);
	tcase_add_loop_test(tests, huge_payloads_go_both_ways, 0, 4);
	tcase_add_loop_test(tests, writing_a_large_request_keeps_reading, 0, 2);
	tcase_add_test(tests, small_requests_overtake_bulk_and_bulk_is_fair);
	tcase_add_loop_test(tests, chunked_replies_are_assembled_interleaved, 0, 2);
	tcase_add_test(tests, an_early_error_stops_the_payload_with_abort);
	tcase_add_test(tests, an_early_error_without_chunks_finishes_the_frame);
	tcase_add_test(tests, cancelling_a_half_sent_request_without_chunks_finishes_it_from_a_copy);
	tcase_add_test(tests, cancelling_a_half_sent_request_aborts_it);
	tcase_add_test(tests, cancelling_tells_a_server_that_can);
	tcase_add_test(tests, a_timed_out_run_is_forgotten_and_a_timed_out_wait_is_not);
	tcase_add_test(tests, a_server_that_does_not_read_times_out_too);
	suite_add_tcase(suite, tests);
	return suite;
}
