/* libopd against a scripted peer: what is said when all goes well. What goes wrong is in test_client_broken.c, sending in
 * test_client_sending.c. */
#include "tests/unit/test_client.h"

#include <poll.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <time.h>

static void script_echo(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, NULL);
	peer_echo(peer);
}

/* ---- Connecting ---- */

START_TEST(connects_over_unix_tcp4_and_tcp6)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, (peer_kind)_i, script_echo, NULL);
	opd_client *client = test_connect(&peer, 0);
	const opd_session *session = opd_client_session(client);
	ck_assert_str_eq(session->server, "peer 1");
	ck_assert_str_eq(session->tenant, "tests");
	ck_assert_uint_eq(session->session, 7);
	ck_assert(session->admin);
	ck_assert_uint_eq(session->chunk_bytes, 1 << 20);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static const struct {
	const char *address;
	opd_status status;
	const char *text;
} bad_addresses[] = {
    {"", OPD_INVALID_ARGUMENT, "expected unix:/path"},
    {"nonsense", OPD_INVALID_ARGUMENT, "expected unix:/path"},
    {"http://localhost:80", OPD_INVALID_ARGUMENT, "expected unix:/path"},
    {"unix:", OPD_INVALID_ARGUMENT, "path of 0 bytes"},
    {"tcp://", OPD_INVALID_ARGUMENT, "expected tcp://host:port"},
    {"tcp://host", OPD_INVALID_ARGUMENT, "expected tcp://host:port"},
    {"tcp://host:0", OPD_INVALID_ARGUMENT, "port 0"},
    {"tcp://host:65536", OPD_INVALID_ARGUMENT, "port 65536"},
    {"tcp://host:7x", OPD_INVALID_ARGUMENT, "port 7x"},
    {"tcp://::1:7777", OPD_INVALID_ARGUMENT, "stands in brackets"},
    {"tcp://[::1]", OPD_INVALID_ARGUMENT, "expected tcp://host:port"},
    {"tcp://127.0.0.1:1", OPD_UNAVAILABLE, "refused"},
    {"unix:/nonexistent/opd.sock", OPD_UNAVAILABLE, "No such file"},
    {"embedded:", OPD_UNIMPLEMENTED, "libopd-embedded"},
};

START_TEST(bad_addresses_are_typed_errors)
{
	opd_client *client = NULL;
	opd_error error = {0};
	ck_assert_int_eq(opd_connect(bad_addresses[_i].address, NULL, &client, &error), bad_addresses[_i].status);
	ck_assert_msg(strstr(error.text, bad_addresses[_i].text) != NULL, "%s", error.text);
	ck_assert_ptr_null(client);
}
END_TEST

START_TEST(an_overlong_path_is_refused)
{
	char address[300];
	opd_client *client;
	opd_error error;
	memset(address, 'x', sizeof address);
	memcpy(address, "unix:/", 6);
	address[sizeof address - 1] = '\0';
	ck_assert_int_eq(opd_connect(address, NULL, &client, &error), OPD_INVALID_ARGUMENT);
}
END_TEST

static void script_refuse(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, &(struct msg_hello_reply){.status = OPD_RESOURCE_EXHAUSTED,
	                                           .message = msg_text("sessions: 4096 are open, at most 4096")});
}

START_TEST(a_refused_session_says_why)
{
	struct peer peer;
	opd_client *client;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_refuse, NULL);
	ck_assert_int_eq(opd_connect(peer.address, NULL, &client, &error), OPD_UNAVAILABLE);
	ck_assert_msg(strstr(error.text, "RESOURCE_EXHAUSTED: sessions: 4096") != NULL, "%s", error.text);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_silent(struct peer *peer, void *argument)
{
	(void)argument;
	peer_stage_wait(peer, 1);
}

START_TEST(a_silent_server_times_out)
{
	struct peer peer;
	opd_client *client;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_silent, NULL);
	const opd_connect_options options = {.struct_bytes = sizeof options, .timeout_us = 30000};
	ck_assert_int_eq(opd_connect(peer.address, &options, &client, &error), OPD_UNAVAILABLE);
	ck_assert_msg(strstr(error.text, "in time") != NULL, "%s", error.text);
	peer_stage_set(&peer, 1);
	ck_assert(peer_join(&peer));
}
END_TEST

/* ---- Running ---- */

START_TEST(a_run_returns_what_the_server_sent)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_echo, NULL);
	opd_client *client = test_connect(&peer, 0);
	static const int64_t sizes[] = {0, 1, 15, 16, 17, 200, 4096, 20000, 100000, 262144, 262145, 1000000};
	opd_result *results[sizeof sizes / sizeof *sizes];
	float *data[sizeof sizes / sizeof *sizes];
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
		data[i] = test_floats((size_t)sizes[i], (unsigned)i);
		opd_request *request = test_vector(data[i], sizes[i]);
		for (int again = 0; again < 3; again++) { /* the same request may be run again, with its envelope kept */
			MUST(opd_run(client, request, &results[i], &error));
			if (again != 2)
				opd_result_destroy(results[i]);
		}
		opd_request_destroy(request);
	}
	opd_close(client);
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) { /* results outlive their client */
		const opd_tensor *tensor = opd_result_tensor(results[i], 0);
		ck_assert_str_eq(opd_result_provider(results[i]), "echo");
		ck_assert_uint_eq(opd_result_count(results[i]), 1);
		ck_assert_ptr_null(opd_result_tensor(results[i], 1));
		ck_assert_int_eq(tensor->shape[0], sizes[i]);
		ck_assert_ptr_nonnull(tensor->data);
		ck_assert_uint_eq((uintptr_t)tensor->data % 64, 0);
		ck_assert_int_eq(memcmp(opd_tensor_data(tensor), data[i], (size_t)sizes[i] * 4), 0);
		opd_result_destroy(results[i]);
		free(data[i]);
	}
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_exhausted(struct peer *peer, void *argument)
{
	const struct msg_reply reply = {.status = OPD_RESOURCE_EXHAUSTED, .message = msg_text("quota"), .retry_after_us = 1500};
	struct peer_frame frame;
	(void)argument;
	peer_hello(peer, NULL);
	for (uint64_t id = 1; id <= 3; id++) {
		if (!PEER_CHECK(peer, peer_read(peer, &frame)))
			return;
		peer_frame_free(&frame);
		(void)PEER_CHECK(peer, id == 2 ? peer_reply_status(peer, id, OPD_RESOURCE_EXHAUSTED, "memory") : peer_reply(peer, id, &reply, NULL, 0));
	}
}

START_TEST(a_failure_that_time_heals_says_when_to_try_again)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_exhausted, NULL);
	opd_client *client = test_connect(&peer, 0);
	opd_request *request = opd_request_create("relu");
	for (int i = 0; i < 2; i++) { /* the second time nobody knows */
		opd_result *result;
		ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_RESOURCE_EXHAUSTED);
		ck_assert_uint_eq(error.retry_after_us, i == 0 ? 1500 : 0);
		ck_assert_uint_eq(opd_result_retry_after_us(result), i == 0 ? 1500 : 0);
		opd_result_destroy(result);
	}
	ck_assert_int_eq(opd_ping(client, &error), OPD_RESOURCE_EXHAUSTED);
	ck_assert_uint_eq(error.retry_after_us, 1500);
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* What the server must see of the request in operands_are_laid_out_as_the_wire_wants. */
static void script_layout(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	struct msg_request request;
	struct arena arena;
	(void)argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request)))
		return;
	const struct msg_run *run = &request.run;
	(void)PEER_CHECK(peer, frame.header.request_id == 1 && run->arg_count == 7);
	const struct msg_tensor *row = run->args[0].tensor, *view = run->args[1].tensor, *wide = run->args[2].tensor;
	(void)PEER_CHECK(peer, row->payload.offset == 0 && row->payload.bytes == 12 && !row->strided);
	for (int i = 12; i < 64; i++)
		(void)PEER_CHECK(peer, frame.payload[i] == 0);
	/* columns 1 and 2 of a [3, 4] matrix: elements 1 to 10 are reached, and nothing else is sent */
	(void)PEER_CHECK(peer, view->payload.offset == 64 && view->payload.bytes == 40 && view->strided && view->byte_offset == 0);
	(void)PEER_CHECK(peer, view->strides[0] == 4 && view->strides[1] == 1 && ((float *)(void *)(frame.payload + 64))[0] == 1.0f);
	(void)PEER_CHECK(peer, wide->payload.bytes == 4 && wide->strides[0] == 0 && wide->shape[0] == 1000000);
	(void)PEER_CHECK(peer, run->args[3].tensor->source == MSG_SOURCE_HANDLE && run->args[3].tensor->dtype == OPD_DTYPE_NONE);
	(void)PEER_CHECK(peer, run->args[3].tensor->handle.index == 3 && run->args[3].tensor->handle.generation == 99);
	(void)PEER_CHECK(peer, run->args[4].tensor->source == MSG_SOURCE_RESULT && run->args[4].tensor->result.request == 5);
	(void)PEER_CHECK(peer, run->args[4].tensor->dtype == OPD_f32 && run->args[4].tensor->byte_offset == 8 &&
	                           run->args[4].tensor->result.output == 1);
	(void)PEER_CHECK(peer, run->args[5].kind == MSG_ARG_TENSORS && run->args[5].count == 2 &&
	                           strcmp(run->args[5].name.data, "rest") == 0);
	(void)PEER_CHECK(peer, run->args[5].tensor[1].payload.offset % 64 == 0 && run->args[5].tensor[1].payload.bytes == 12);
	(void)PEER_CHECK(peer, run->args[6].kind == MSG_ARG_FLOAT && run->args[6].f == 0.5);
	(void)PEER_CHECK(peer, run->priority.present && run->priority.count == 2 && strcmp(run->priority.names[1].data, "cpu") == 0);
	(void)PEER_CHECK(peer, run->strict && run->explain && run->uuid && run->retry && run->allow_tf32 && run->timeout_us == 77);
	(void)PEER_CHECK(peer, strcmp(run->device.data, "cuda:1") == 0 && run->output_count == 2);
	(void)PEER_CHECK(peer, run->outputs[1].keep && run->outputs[1].no_copy && !run->outputs[0].keep && !run->outputs[0].no_copy);
	(void)PEER_CHECK(peer, peer_reply_status(peer, 1, OPD_NOT_FOUND, "handle 3"));
	peer_frame_free(&frame);
	arena_fini(&arena);
}

START_TEST(operands_are_laid_out_as_the_wire_wants)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_layout, NULL);
	opd_client *client = test_connect(&peer, 0);
	float matrix[12];
	for (int i = 0; i < 12; i++)
		matrix[i] = (float)i;
	opd_request *request = opd_request_create("anything");
	const int64_t stride_one[] = {1}, strides[] = {4, 1}, zero[] = {0};
	opd_operand row = OPD_OPERAND(OPD_f32, matrix, 3), view = OPD_OPERAND(OPD_f32, matrix, 3, 2),
	            wide = OPD_OPERAND(OPD_f32, matrix, 1000000);
	row.strides = stride_one;
	view.strides = strides;
	view.byte_offset = 4;
	view.data_bytes = sizeof matrix;
	wide.strides = zero;
	opd_request_tensor(request, NULL, &row);
	opd_request_tensor(request, NULL, &view);
	opd_request_tensor(request, NULL, &wide);
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = {3, 0, 99}});
	opd_operand result = OPD_OPERAND(OPD_f32, NULL, 2);
	result.source = OPD_FROM_RESULT;
	result.ticket = 5;
	result.output = 1;
	result.byte_offset = 8;
	opd_request_tensor(request, NULL, &result);
	opd_request_tensors(request, "rest", (const opd_operand[]){row, row}, 2);
	opd_request_float(request, "epsilon", 0.5);
	opd_request_priority(request, (const char *[]){"cuda", "cpu"}, 2);
	opd_request_strict(request, true);
	opd_request_explain(request, true);
	opd_request_uuid(request, true);
	opd_request_retry(request, true);
	opd_request_allow_tf32(request, true);
	opd_request_timeout(request, 77);
	opd_request_device(request, "cuda:1");
	opd_request_output(request, 1, true, false);
	opd_result *reply;
	ck_assert_int_eq(opd_run(client, request, &reply, &error), OPD_NOT_FOUND);
	ck_assert_str_eq(error.text, "handle 3");
	ck_assert_int_eq(opd_result_status(reply), OPD_NOT_FOUND);
	ck_assert_str_eq(opd_result_message(reply), "handle 3");
	opd_result_destroy(reply);
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_fake(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	struct msg_request request;
	struct arena arena;
	(void)argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request)))
		return;
	(void)PEER_CHECK(peer, frame.header.payload_bytes == 0 && request.run.mode == MSG_FAKE);
	(void)PEER_CHECK(peer, request.run.args[0].tensor->source == MSG_SOURCE_NONE && request.run.args[0].tensor->shape[0] == 1000);
	struct msg_result result = {.tensor = {.dtype = OPD_bf16, .rank = 2, .shape = {2, 3}}, .kept = {4, 5}};
	const struct msg_reply reply = {.kind = MSG_REPLY_RUN, .run = {.output_count = 1, .outputs = &result}};
	(void)peer_reply(peer, 1, &reply, NULL, 0);
	peer_frame_free(&frame);
	arena_fini(&arena);
}

START_TEST(a_fake_run_moves_no_tensor_data)
{
	struct peer peer;
	opd_error error;
	float data[1000];
	memset(data, 0, sizeof data);
	peer_start(&peer, PEER_UNIX, script_fake, NULL);
	opd_client *client = test_connect(&peer, 0);
	opd_request *request = test_vector(data, 1000);
	opd_request_mode(request, OPD_MODE_FAKE);
	opd_result *result;
	MUST(opd_run(client, request, &result, &error));
	const opd_tensor *tensor = opd_result_tensor(result, 0);
	ck_assert_ptr_null(tensor->data);
	ck_assert_int_eq(tensor->dtype, OPD_bf16);
	ck_assert_int_eq(tensor->strides[0], 3);
	ck_assert_uint_eq(tensor->elements, 6);
	ck_assert_uint_eq(opd_result_handle(result, 0).generation, 5);
	ck_assert_uint_eq(opd_result_handle(result, 1).generation, 0);
	ck_assert_str_eq(opd_result_provider(result), "");
	opd_result_destroy(result);
	opd_request_destroy(request);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_explain(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	(void)argument;
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read(peer, &frame)))
		return;
	peer_frame_free(&frame);
	const struct msg_skip skip = {msg_text("cuda"), OPD_REASON_PLAN, msg_text("plan: no")};
	const struct msg_text effective[] = {msg_text("cuda"), msg_text("native")};
	const struct msg_move move = {msg_text("x"), msg_text("cpu"), msg_text("cuda:0"), 64};
	const struct msg_explain explain = {.skip_count = 1,
	                                    .skipped = &skip,
	                                    .effective_count = 2,
	                                    .effective = effective,
	                                    .level = MSG_LEVEL_SESSION,
	                                    .times = {1, 2, 3, 4, 5, 6},
	                                    .move_count = 1,
	                                    .moves = &move,
	                                    .device = msg_text("cpu"),
	                                    .on_loop = true};
	uint8_t bytes[3] = {1, 2, 3};
	struct msg_result result = {
	    .tensor = {.dtype = OPD_u8, .rank = 1, .shape = {3}, .source = MSG_SOURCE_INLINE, .inlined = {bytes, 3}}};
	const struct msg_reply reply = {.kind = MSG_REPLY_RUN,
	                                .run = {.provider = msg_text("native"),
	                                        .output_count = 1,
	                                        .outputs = &result,
	                                        .explain = &explain,
	                                        .uuid = msg_text("abcd")}};
	(void)peer_reply(peer, 1, &reply, NULL, 0);
}

START_TEST(explain_uuid_and_inline_results_arrive)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_explain, NULL);
	opd_client *client = test_connect(&peer, 0);
	opd_request *request = opd_request_create("op");
	opd_result *result;
	MUST(opd_run(client, request, &result, &error));
	opd_request_destroy(request);
	opd_close(client);
	const opd_explain *explain = opd_result_explain(result);
	ck_assert_uint_eq(explain->skip_count, 1);
	ck_assert_str_eq(explain->skipped[0].provider, "cuda");
	ck_assert_str_eq(explain->skipped[0].reason, "plan: no");
	ck_assert_int_eq(explain->skipped[0].code, OPD_REASON_PLAN);
	ck_assert_str_eq(explain->effective[1], "native");
	ck_assert_str_eq(explain->level, "session");
	ck_assert_str_eq(explain->moves[0].to, "cuda:0");
	ck_assert_uint_eq(explain->pack_ns, 6);
	ck_assert(explain->on_loop);
	ck_assert_str_eq(opd_result_uuid(result), "abcd");
	ck_assert_uint_eq((uintptr_t)opd_result_tensor(result, 0)->data % 64, 0);
	ck_assert_int_eq(((uint8_t *)opd_result_tensor(result, 0)->data)[2], 3);
	opd_result_destroy(result);
	ck_assert(peer_join(&peer));
}
END_TEST

/* ---- Builder ---- */

static opd_status submit_status(opd_request *request, opd_client *client, opd_error *error)
{
	opd_ticket ticket;
	const opd_status status = opd_submit(client, request, &ticket, error);
	opd_request_destroy(request);
	return status;
}

START_TEST(a_bad_argument_is_remembered_and_named)
{
	struct peer peer;
	opd_error error;
	float data[4] = {0};
	peer_start(&peer, PEER_UNIX, script_echo, NULL);
	opd_client *client = test_connect(&peer, 0);
	opd_operand operand = OPD_OPERAND(OPD_f32, data, 2, 4);
	operand.data_bytes = 16;
	opd_request *request = opd_request_create("op");
	opd_request_tensor(request, "x", &operand);
	opd_request_int(request, "later", 1);
	ck_assert_int_eq(submit_status(request, client, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "op: x reaches to byte 32, its data has 16");
	const opd_operand bad[] = {
	    {.struct_bytes = sizeof(opd_operand), .dtype = (opd_dtype)99, .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_DTYPE_NONE, .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 9, .shape = (int64_t[9]){1}, .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = (int64_t[]){-1}, .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = (int64_t[]){INT64_MIN}, .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 2, .shape = (int64_t[]){INT64_MAX, 2}, .data = data},
	    {.struct_bytes = sizeof(opd_operand),
	     .dtype = OPD_f32,
	     .rank = 1,
	     .shape = (int64_t[]){2},
	     .strides = (int64_t[]){-1},
	     .data = data},
	    {.struct_bytes = sizeof(opd_operand),
	     .dtype = OPD_f32,
	     .rank = 1,
	     .shape = (int64_t[]){2},
	     .byte_offset = 2,
	     .data = data},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = (int64_t[]){2}},
	    {.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .source = (opd_operand_source)9, .data = data},
	    {.struct_bytes = 4, .dtype = OPD_f32, .data = data},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		request = opd_request_create("op");
		opd_request_tensor(request, NULL, &bad[i]);
		ck_assert_msg(submit_status(request, client, &error) == OPD_INVALID_ARGUMENT, "case %zu", i);
		ck_assert_msg(strstr(error.text, "argument 0") != NULL, "%s", error.text);
	}
	request = opd_request_create("op");
	opd_request_str(request, "s", "\xff\xfe");
	ck_assert_int_eq(submit_status(request, client, &error), OPD_INVALID_ARGUMENT);
	request = opd_request_create("op");
	for (int i = 0; i < 257; i++)
		opd_request_int(request, NULL, i);
	ck_assert_int_eq(submit_status(request, client, &error), OPD_INVALID_ARGUMENT);
	ck_assert_uint_eq(opd_in_flight(client), 0);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* ---- Many in flight ---- */

#define OUT_OF_ORDER 8

static void script_reverse(struct peer *peer, void *argument)
{
	struct peer_frame frames[OUT_OF_ORDER];
	(void)argument;
	peer_hello(peer, NULL);
	for (int i = 0; i < OUT_OF_ORDER; i++)
		if (!PEER_CHECK(peer, peer_read(peer, &frames[i])))
			return;
	for (int i = OUT_OF_ORDER - 1; i >= 0; i--) {
		struct msg_result result;
		const struct msg_reply reply = peer_vector(&result, 4);
		(void)peer_reply(peer, frames[i].header.request_id, &reply, frames[i].payload, 16);
		peer_frame_free(&frames[i]);
	}
	peer_stage_wait(peer, 1);
}

START_TEST(replies_out_of_order_find_their_requests)
{
	struct peer peer;
	opd_error error;
	opd_ticket tickets[OUT_OF_ORDER];
	peer_start(&peer, PEER_UNIX, script_reverse, NULL);
	opd_client *client = test_connect(&peer, 0);
	for (int i = 0; i < OUT_OF_ORDER; i++) {
		const float data[4] = {(float)i};
		opd_request *request = test_vector(data, 4);
		MUST(opd_submit(client, request, &tickets[i], &error));
		opd_request_destroy(request);
		ck_assert_uint_eq(tickets[i], (opd_ticket)i + 1);
	}
	opd_result *result;
	ck_assert_uint_eq(opd_in_flight(client), OUT_OF_ORDER);
	ck_assert_int_eq(opd_wait(client, 99, 0, &result, &error), OPD_NOT_FOUND);
	MUST(opd_wait(client, tickets[0], UINT64_MAX, &result, &error)); /* the last to be answered: all others are here */
	ck_assert_float_eq(((float *)opd_result_tensor(result, 0)->data)[0], 0.0f);
	opd_result_destroy(result);
	ck_assert_uint_eq(opd_finished(client), OUT_OF_ORDER - 1);
	ck_assert_int_eq(opd_wait(client, tickets[0], 0, &result, &error), OPD_NOT_FOUND);
	opd_cancel(client, tickets[3]);
	for (int i = OUT_OF_ORDER - 1; i >= 1; i--) {
		opd_ticket ticket;
		if (i == 3)
			continue;
		MUST(opd_wait_any(client, UINT64_MAX, &ticket, &result, &error));
		ck_assert_uint_eq(ticket, tickets[i]);
		ck_assert_float_eq(((float *)opd_result_tensor(result, 0)->data)[0], (float)i);
		opd_result_destroy(result);
	}
	opd_ticket none;
	ck_assert_int_eq(opd_wait_any(client, 0, &none, &result, &error), OPD_NOT_FOUND);
	peer_stage_set(&peer, 1);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

#define PIPELINED 10000

START_TEST(ten_thousand_requests_in_one_pipeline)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, _i == 0 ? PEER_UNIX : PEER_TCP4, script_echo, NULL);
	opd_client *client = test_connect(&peer, 0);
	float *data = test_floats(16 + PIPELINED, 1);
	char *seen = calloc(PIPELINED + 1, 1);
	for (int i = 0; i < PIPELINED; i++) { /* nothing is taken meanwhile: replies must be read while requests are written */
		opd_ticket ticket;
		opd_request *request = test_vector(data + i, 16);
		MUST(opd_submit(client, request, &ticket, &error));
		opd_request_destroy(request);
	}
	for (int i = 0; i < PIPELINED; i++) {
		opd_ticket ticket;
		opd_result *result;
		MUST(opd_wait_any(client, UINT64_MAX, &ticket, &result, &error));
		ck_assert_int_eq(seen[ticket]++, 0);
		ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data + ticket - 1, 64), 0);
		opd_result_destroy(result);
	}
	ck_assert_uint_eq(opd_in_flight(client), 0);
	opd_close(client);
	free(data);
	free(seen);
	ck_assert(peer_join(&peer));
}
END_TEST

#define LIMIT 4
#define LIMITED 20

static void script_limit(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, &(struct msg_hello_reply){.version = FRAME_VERSION, .limits = {.in_flight = LIMIT, .payload_bytes = 4096}});
	uint64_t unanswered[LIMIT + 1];
	uint64_t last = 0;
	size_t count = 0;
	for (size_t answered = 0; answered < LIMITED - 1;) {
		const bool more = answered + count < LIMITED - 1;
		while (more && count < LIMIT && answered + count < LIMITED - 1) {
			struct peer_frame frame;
			if (!PEER_CHECK(peer, peer_read(peer, &frame)))
				return;
			(void)PEER_CHECK(peer, frame.header.request_id > last);
			last = frame.header.request_id;
			unanswered[count++] = last;
			peer_frame_free(&frame);
		}
		struct peer_frame extra; /* no fifth comes while four wait for their answers */
		(void)PEER_CHECK(peer, recv(peer->fd, &extra, 1, MSG_DONTWAIT | MSG_PEEK) < 0);
		struct msg_result result;
		const struct msg_reply reply = peer_vector(&result, 0);
		(void)peer_reply(peer, unanswered[--count], &reply, NULL, 0);
		answered++;
	}
	peer_stage_wait(peer, 1);
}

START_TEST(the_servers_limit_of_requests_in_flight_is_kept)
{
	struct peer peer;
	opd_error error;
	opd_result *result;
	opd_ticket ticket;
	float data[2048] = {0};
	peer_start(&peer, PEER_UNIX, script_limit, NULL);
	opd_client *client = test_connect(&peer, 0);
	opd_request *request = test_vector(data, 1);
	for (int i = 0; i < LIMITED; i++)
		MUST(opd_submit(client, request, &ticket, &error));
	opd_request_destroy(request);
	opd_cancel(client, 10); /* not sent yet: it never is */
	for (int i = 0; i < LIMITED - 1; i++) {
		MUST(opd_wait_any(client, UINT64_MAX, &ticket, &result, &error));
		ck_assert_uint_ne(ticket, 10);
		opd_result_destroy(result);
	}
	request = test_vector(data, 2048);
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_RESOURCE_EXHAUSTED);
	ck_assert_msg(strstr(error.text, "8192") != NULL && strstr(error.text, "4096") != NULL, "%s", error.text);
	ck_assert_ptr_null(result);
	opd_request_destroy(request);
	peer_stage_set(&peer, 1);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* Reads nothing after the greeting until it is let: what is larger than the socket's buffers then waits in the client. */
static void script_echo_when_let(struct peer *peer, void *argument)
{
	peer_hello(peer, NULL);
	while (!atomic_load((_Atomic bool *)argument))
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	peer_echo(peer);
}

START_TEST(an_event_loop_drives_it_through_fd_and_process)
{
	static _Atomic bool let;
	atomic_store(&let, false);
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_echo_when_let, &let);
	opd_client *client = test_connect(&peer, 0);
	float *data = test_floats(1 << 20, 3);
	opd_request *large = test_vector(data, 1 << 20), *small = test_vector(data, 8);
	opd_ticket ticket;
	MUST(opd_submit(client, small, &ticket, &error));
	MUST(opd_submit(client, large, &ticket, &error));
	size_t taken = 0;
	bool wrote = false;
	while (taken < 2) {
		struct pollfd entry = {.fd = opd_client_fd(client), .events = opd_client_events(client)};
		wrote = wrote || (entry.events & POLLOUT) != 0;
		atomic_store(&let, true); /* the first time round the peer has read nothing */
		ck_assert_int_eq(poll(&entry, 1, 10000), 1);
		MUST(opd_process(client, &error));
		while (opd_finished(client) != 0) {
			opd_result *result;
			MUST(opd_wait_any(client, 0, &ticket, &result, &error));
			ck_assert_int_eq(memcmp(opd_result_tensor(result, 0)->data, data, opd_result_tensor(result, 0)->elements * 4), 0);
			opd_result_destroy(result);
			taken++;
		}
	}
	ck_assert(wrote);
	opd_request_destroy(large);
	opd_request_destroy(small);
	opd_close(client);
	free(data);
	ck_assert(peer_join(&peer));
}
END_TEST

static Suite *client_suite(void)
{
	Suite *suite = suite_create("client");
	TCase *tests = tcase_create("client");
	tcase_set_timeout(tests, 60);
	tcase_add_loop_test(tests, connects_over_unix_tcp4_and_tcp6, 0, 3);
	tcase_add_loop_test(tests, bad_addresses_are_typed_errors, 0, sizeof bad_addresses / sizeof *bad_addresses);
	tcase_add_test(tests, an_overlong_path_is_refused);
	tcase_add_test(tests, a_refused_session_says_why);
	tcase_add_test(tests, a_silent_server_times_out);
	tcase_add_test(tests, a_run_returns_what_the_server_sent);
	tcase_add_test(tests, a_failure_that_time_heals_says_when_to_try_again);
	tcase_add_test(tests, operands_are_laid_out_as_the_wire_wants);
	tcase_add_test(tests, a_fake_run_moves_no_tensor_data);
	tcase_add_test(tests, explain_uuid_and_inline_results_arrive);
	tcase_add_test(tests, a_bad_argument_is_remembered_and_named);
	tcase_add_test(tests, replies_out_of_order_find_their_requests);
	tcase_add_loop_test(tests, ten_thousand_requests_in_one_pipeline, 0, 2);
	tcase_add_test(tests, the_servers_limit_of_requests_in_flight_is_kept);
	tcase_add_test(tests, an_event_loop_drives_it_through_fd_and_process);
	suite_add_tcase(suite, tests);
	return suite;
}

int main(void)
{
	SRunner *runner = srunner_create(client_suite());
	srunner_add_suite(runner, broken_suite());
	srunner_add_suite(runner, sending_suite());
	srunner_add_suite(runner, calls_suite());
	srunner_run_all(runner, CK_NORMAL);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
