/* libopd against a scripted peer: inspecting, administration, generated requests, goodbyes, the direct scope. */
#include "tests/unit/test_client.h"

#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "client/scheme.h"

static void script_echo(struct peer *peer, void *argument)
{
	(void)argument;
	peer_hello(peer, NULL);
	peer_echo(peer);
}

/* ---- Inspecting ---- */

static void answer_document(struct peer *peer, uint64_t id, const struct msg_request *request)
{
	const struct msg_text names[] = {msg_text("cpu"), msg_text("native")};
	const struct msg_impl impls[] = {
	    {.provider = msg_text("native"),
	     .supported = true,
	     .device = msg_text("cpu"),
	     .schema = msg_text("s()"),
	     .uuid = msg_text("u")},
	    {.provider = msg_text("cuda"), .reason = msg_text("platform: no GPU"), .predicate = true, .plan_may_refuse = true}};
	const struct msg_in_place in_place = {msg_text("x"), 1};
	const struct msg_text dims[] = {msg_text("rows"), msg_text("features")};
	const int64_t sizes[] = {32, 4096};
	const struct msg_op op = {.name = msg_text("rms_norm"),
	                          .schema = msg_text("rms_norm(Tensor x) -> Tensor"),
	                          .doc = msg_text("doc"),
	                          .impl_count = 2,
	                          .impls = impls,
	                          .effective_count = 2,
	                          .effective = names,
	                          .level = MSG_LEVEL_SERVER,
	                          .activations = msg_text("x"),
	                          .in_place_count = 1,
	                          .in_place = &in_place,
	                          .dim_count = 2,
	                          .dims = dims,
	                          .default_dim_count = 2,
	                          .default_dims = sizes};
	const struct msg_provider provider = {.name = msg_text("cpu"),
	                                      .version = msg_text("1"),
	                                      .available = true,
	                                      .source = msg_text("built in"),
	                                      .op_count = 2,
	                                      .ops = names,
	                                      .device_count = 1,
	                                      .devices = names};
	struct msg_reply reply = {.kind = MSG_REPLY_EMPTY};
	switch (request->kind) {
	case MSG_REQUEST_GET_PRIORITY:
		reply.kind = MSG_REPLY_PRIORITY;
		reply.priority = (struct msg_priority_reply){
		    .effective_count = 2, .effective = names, .level = MSG_LEVEL_CONFIGURATION, .stored_count = 1, .stored = names};
		break;
	case MSG_REQUEST_LIST_OPS:
		reply.kind = MSG_REPLY_OPS;
		reply.ops.count = 1;
		reply.ops.items = &op;
		break;
	case MSG_REQUEST_DESCRIBE:
		reply.kind = MSG_REPLY_OP;
		reply.op = op;
		break;
	case MSG_REQUEST_LIST_PROVIDERS:
		reply.kind = MSG_REPLY_PROVIDERS;
		reply.providers.count = 1;
		reply.providers.items = &provider;
		break;
	case MSG_REQUEST_INFO:
		reply.kind = MSG_REPLY_INFO;
		reply.info = (struct msg_info){
		    .version = msg_text("0.1.0"), .uptime_us = 5, .listener_count = 2, .listeners = names, .threads = 2, .pid = 42};
		break;
	default:
		break;
	}
	(void)peer_reply(peer, id, &reply, NULL, 0);
}

static void script_documents(struct peer *peer, void *argument)
{
	struct arena arena;
	struct peer_frame frame;
	struct msg_request request;
	(void)argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	while (peer_read_request(peer, &arena, &frame, &request)) {
		answer_document(peer, frame.header.request_id, &request);
		peer_frame_free(&frame);
		arena_reset(&arena);
	}
	arena_fini(&arena);
}

START_TEST(documents_outlive_their_client)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_documents, NULL);
	opd_client *client = test_connect(&peer, 0);
	const opd_priority *priority;
	const opd_op_list *ops;
	const opd_op_description *op;
	const opd_provider_list *providers;
	const opd_server_info *info;
	MUST(opd_priority_get(client, "rms_norm", &priority, &error));
	MUST(opd_ops(client, &ops, &error));
	MUST(opd_describe(client, "rms_norm", &op, &error));
	MUST(opd_providers(client, &providers, &error));
	MUST(opd_info(client, &info, &error));
	opd_close(client);
	ck_assert_str_eq(priority->level, "configuration");
	ck_assert_uint_eq(priority->effective_count, 2);
	ck_assert_str_eq(priority->stored[0], "cpu");
	ck_assert_str_eq(ops->ops[0].name, "rms_norm");
	ck_assert_str_eq(op->implementations[1].reason, "platform: no GPU");
	ck_assert(op->implementations[0].supported && op->implementations[1].plan_may_refuse);
	ck_assert_str_eq(op->implementations[1].uuid, "");
	ck_assert_str_eq(op->dims[1], "features");
	ck_assert_int_eq(op->default_dims[1], 4096);
	ck_assert_str_eq(op->in_place_params[0], "x");
	ck_assert_uint_eq(op->in_place_results[0], 1);
	ck_assert_str_eq(op->level, "server");
	ck_assert_str_eq(providers->providers[0].ops[1], "native");
	ck_assert_uint_eq(providers->providers[0].device_count, 1);
	ck_assert_uint_eq(info->pid, 42);
	ck_assert_str_eq(info->listeners[1], "native");
	opd_document_free(priority);
	opd_document_free(ops);
	opd_document_free(op);
	opd_document_free(providers);
	opd_document_free(info);
	opd_document_free(NULL);
	ck_assert(peer_join(&peer));
}
END_TEST

/* Of one session, number 5; where the list is to go on comes from each request. */
static void script_sessions(struct peer *peer, void *argument)
{
	struct arena arena;
	struct peer_frame frame;
	struct msg_request request;
	struct msg_session_state session = {.session = 5, .tenant = msg_text("t"), .peer = msg_text("p")};
	const uint64_t *next = argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	while (peer_read_request(peer, &arena, &frame, &request)) {
		const struct msg_reply reply = {.kind = MSG_REPLY_SESSIONS, .sessions = {.session_count = request.first_session == 3 ? 0 : 1, .sessions = &session, .next = *next++}};
		(void)peer_reply(peer, frame.header.request_id, &reply, NULL, 0);
		peer_frame_free(&frame);
		arena_reset(&arena);
	}
	arena_fini(&arena);
}

START_TEST(a_list_of_sessions_that_would_go_on_for_ever_is_malformed)
{
	struct peer peer;
	opd_error error;
	const opd_sharing *page;
	uint64_t next[] = {6, 5, 1, 4, 7};
	const uint64_t first[] = {0, 0, 0, 0, 3}; /* the last page is empty */
	peer_start(&peer, PEER_UNIX, script_sessions, next);
	opd_client *client = test_connect(&peer, 0);
	MUST(opd_sessions(client, first[0], &page, &error));
	ck_assert_uint_eq(page->next, 6);
	opd_document_free(page);
	for (size_t i = 1; i < sizeof next / sizeof next[0]; i++) {
		ck_assert_int_eq(opd_sessions(client, first[i], &page, &error), OPD_DATA_LOSS);
		ck_assert_msg(strstr(error.text, "the list of sessions goes on at") != NULL, "%s", error.text);
	}
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* Answers each call OK if it is what it must be. */
static void script_calls(struct peer *peer, void *argument)
{
	struct arena arena;
	struct peer_frame frame;
	struct msg_request request;
	(void)argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	for (uint64_t id = 1; id <= 9; id++) {
		if (!PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request)))
			return;
		bool good = false;
		switch (id) {
		case 1:
			good = request.kind == MSG_REQUEST_PUSH_PRIORITY && request.push.count == 2 &&
			       strcmp(request.push.entries[1].op.data, "*") == 0 && request.push.entries[0].list.count == 2 &&
			       request.push.entries[1].list.present && request.push.entries[1].list.count == 0;
			break;
		case 2:
			good = request.kind == MSG_REQUEST_POP_PRIORITY;
			break;
		case 3:
			good = request.kind == MSG_REQUEST_SET_PRIORITY && request.set.scope == MSG_SCOPE_SERVER &&
			       request.set.list.present && strcmp(request.set.list.names[1].data, "native") == 0;
			break;
		case 4:
			good =
			    request.kind == MSG_REQUEST_SET_PRIORITY && request.set.scope == MSG_SCOPE_SESSION && !request.set.list.present;
			break;
		case 5:
			good = request.kind == MSG_REQUEST_FREE && request.free.count == 2 && request.free.tensors[1].handle.generation == 12;
			break;
		case 6:
			good = request.kind == MSG_REQUEST_LOAD_MODULE && strcmp(request.path.data, "/m.so") == 0;
			break;
		case 7:
			good = request.kind == MSG_REQUEST_SET_LOG_LEVEL && strcmp(request.log_level.data, "debug") == 0;
			break;
		case 8:
			good = request.kind == MSG_REQUEST_DRAIN && request.timeout_us == 1234;
			break;
		default:
			good = request.kind == MSG_REQUEST_PING;
			break;
		}
		(void)peer_check(peer, good, "the call has its arguments", (int)id);
		if (id == 9)
			(void)peer_reply_status(peer, id, OPD_PERMISSION_DENIED, "no");
		else
			(void)peer_reply(peer, id, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
		peer_frame_free(&frame);
		arena_reset(&arena);
	}
	arena_fini(&arena);
}

START_TEST(calls_carry_their_arguments)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_calls, NULL);
	opd_client *client = test_connect(&peer, 1000000);
	const char *const list[] = {"cpu", "native"};
	const opd_priority_entry entries[] = {{"rms_norm", list, 2}, {"*", NULL, 0}};
	MUST(opd_priority_push(client, entries, 2, &error));
	MUST(opd_priority_pop(client, &error));
	MUST(opd_priority_set(client, OPD_SCOPE_SERVER, entries, &error));
	MUST(opd_priority_clear(client, OPD_SCOPE_SESSION, "*", &error));
	MUST(opd_free(client, (const opd_handle[]){{1, 0, 11}, {2, 0, 12}}, 2, &error));
	MUST(opd_load_module(client, "/m.so", &error));
	MUST(opd_set_log_level(client, "debug", &error));
	MUST(opd_drain(client, 1234, &error));
	ck_assert_int_eq(opd_ping(client, &error), OPD_PERMISSION_DENIED);
	ck_assert_int_eq(opd_priority_clear(client, OPD_SCOPE_SESSION, NULL, &error), OPD_INVALID_ARGUMENT);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_generate(struct peer *peer, void *argument)
{
	struct arena arena;
	struct peer_frame frame;
	struct msg_request request;
	(void)argument;
	arena_init(&arena, 1 << 20);
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request)))
		return;
	(void)PEER_CHECK(peer, request.kind == MSG_REQUEST_GENERATE && request.generate.dim_count == 2 && request.generate.seed == 5);
	peer_frame_free(&frame);
	struct msg_tensor tensors[2] = {
	    {.dtype = OPD_f32, .rank = 1, .shape = {4}, .source = MSG_SOURCE_PAYLOAD, .payload = {64, 16}},
	    {.dtype = OPD_DTYPE_NONE, .source = MSG_SOURCE_HANDLE, .handle = {1, 2}},
	};
	struct msg_arg args[] = {{.name = msg_text("x"), .kind = MSG_ARG_TENSOR, .tensor = &tensors[0]},
	                         {.name = msg_text("weight"), .kind = MSG_ARG_TENSOR, .tensor = &tensors[1]},
	                         {.name = msg_text("mode"), .kind = MSG_ARG_STR, .str = msg_text("tanh")}};
	uint8_t payload[80] = {0};
	memcpy(payload + 64, (float[]){1, 2, 3, 4}, 16);
	const struct msg_reply reply = {.kind = MSG_REPLY_GENERATED, .generated = {.count = 3, .args = args}};
	(void)peer_reply(peer, 1, &reply, payload, sizeof payload);
	arena_reset(&arena);
	if (!PEER_CHECK(peer, peer_read_request(peer, &arena, &frame, &request)))
		return;
	(void)PEER_CHECK(peer,
	                 request.kind == MSG_REQUEST_RUN && strcmp(request.run.op.data, "gelu") == 0 && request.run.arg_count == 3);
	(void)PEER_CHECK(peer, frame.header.payload_bytes == 16 && memcmp(frame.payload, payload + 64, 16) == 0);
	(void)PEER_CHECK(peer, request.run.args[1].tensor->source == MSG_SOURCE_HANDLE &&
	                           strcmp(request.run.args[2].str.data, "tanh") == 0);
	struct msg_result result;
	const struct msg_reply ran = peer_vector(&result, 4);
	(void)peer_reply(peer, 2, &ran, frame.payload, 16);
	peer_frame_free(&frame);
	arena_fini(&arena);
}

START_TEST(generated_arguments_become_a_request_that_owns_them)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_generate, NULL);
	opd_client *client = test_connect(&peer, 0);
	const opd_generate_options options = {
	    .struct_bytes = sizeof options, .dtype = OPD_f32, .seed = 5, .dim_count = 2, .dims = (int64_t[]){1, 4}};
	opd_request *request;
	opd_result *result;
	MUST(opd_generate(client, "gelu", &options, &request, &error));
	MUST(opd_run(client, request, &result, &error));
	ck_assert_float_eq(((float *)opd_result_tensor(result, 0)->data)[3], 4.0f);
	opd_close(client);
	opd_request_destroy(request);
	opd_result_destroy(result);
	ck_assert(peer_join(&peer));
}
END_TEST

static void script_goodbye(struct peer *peer, void *argument)
{
	struct peer_frame frame;
	(void)argument;
	peer_hello(peer, NULL);
	if (!PEER_CHECK(peer, peer_read(peer, &frame)))
		return;
	struct arena arena;
	struct codec_buffer buffer;
	opd_error error;
	arena_init(&arena, 4096 * 4);
	const struct msg_goaway goaway = {OPD_UNAVAILABLE, msg_text("draining")};
	(void)PEER_CHECK(peer, codec_encode_goaway(&arena, &goaway, &buffer, &error) == OPD_OK);
	(void)peer_send_frame(peer, FRAME_GOAWAY, 0, 0, buffer.frame + FRAME_HEADER_BYTES, (uint32_t)buffer.envelope_bytes, NULL, 0);
	(void)peer_reply(peer, 1, &(struct msg_reply){.kind = MSG_REPLY_EMPTY}, NULL, 0);
	peer_frame_free(&frame);
	arena_fini(&arena);
	peer_stage_wait(peer, 1);
}

START_TEST(after_goodbye_answers_still_come_and_new_requests_are_refused)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_goodbye, NULL);
	opd_client *client = test_connect(&peer, 0);
	MUST(opd_ping(client, &error));
	ck_assert_int_eq(opd_ping(client, &error), OPD_UNAVAILABLE);
	ck_assert_msg(strstr(error.text, "draining") != NULL, "%s", error.text);
	peer_stage_set(&peer, 1);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

/* ---- Direct scope ---- */

/* A scheme whose direct path doubles its first operand. */
static struct {
	struct peer peer;
	int begun, ended, released;
	const void *seen;
	uint64_t last_id;
} direct;

static opd_status direct_connect(const char *rest, int *fd_out, void **state_out, opd_error *error)
{
	(void)rest;
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	(void)snprintf(name.sun_path, sizeof name.sun_path, "%.100s", direct.peer.path);
	*fd_out = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(*fd_out, (const struct sockaddr *)&name, sizeof name) != 0)
		return opd_fail(error, OPD_UNAVAILABLE, "no peer");
	*state_out = &direct;
	return OPD_OK;
}

static void direct_disconnect(void *state)
{
	ck_assert_ptr_eq(state, &direct);
}

static opd_status direct_begin(void *state, opd_error *error)
{
	(void)state;
	(void)error;
	direct.begun++;
	return OPD_OK;
}

static void direct_end(void *state)
{
	(void)state;
	direct.ended++;
}

struct direct_owner {
	_Alignas(64) float data[16];
	struct msg_result result;
};

static void direct_release(void *owner)
{
	direct.released++;
	free(owner);
}

static void direct_run(void *state, uint64_t id, const struct msg_request *request, struct scheme_reply *out)
{
	(void)state;
	direct.last_id = id;
	if (request->kind != MSG_REQUEST_RUN) {
		*out = (struct scheme_reply){.reply = {.kind = MSG_REPLY_EMPTY}};
		return;
	}
	const struct msg_tensor *x = request->run.args[0].tensor;
	direct.seen = x->inlined.data;
	struct direct_owner *owner = aligned_alloc(64, sizeof *owner);
	memset(owner, 0, sizeof *owner);
	for (size_t i = 0; i < x->inlined.bytes / 4 && i < 16; i++)
		owner->data[i] = 2 * ((const float *)(const void *)x->inlined.data)[i];
	owner->result.tensor = *x;
	owner->result.tensor.inlined.data = (const uint8_t *)owner->data;
	*out = (struct scheme_reply){
	    .reply = {.kind = MSG_REPLY_RUN, .run = {.provider = {"nativeXX", 6}, .output_count = 1, .outputs = &owner->result}},
	    .owner = owner,
	    .release = direct_release};
}

static const struct scheme direct_scheme = {"direct", direct_connect, direct_disconnect, direct_begin, direct_end, direct_run};

START_TEST(a_direct_scope_calls_the_dispatcher_without_copies)
{
	opd_error error;
	opd_client *client;
	opd_scheme_register(&direct_scheme);
	peer_start(&direct.peer, PEER_UNIX, script_echo, NULL);
	MUST(opd_connect("direct:anything", NULL, &client, &error));
	const float data[4] = {1, 2, 3, 4};
	opd_request *request = test_vector(data, 4);
	opd_result *results[3];
	opd_ticket ticket;
	MUST(opd_submit(client, request, &ticket, &error));
	ck_assert_int_eq(opd_direct_begin(client, &error), OPD_FAILED_PRECONDITION);
	MUST(opd_wait(client, ticket, UINT64_MAX, &results[0], &error));
	MUST(opd_direct_begin(client, &error));
	MUST(opd_direct_begin(client, &error));
	MUST(opd_run(client, request, &results[1], &error));
	ck_assert_ptr_eq(direct.seen, data);
	ck_assert_uint_eq(direct.last_id, ticket + 1);
	opd_direct_end(client);
	MUST(opd_submit(client, request, &ticket, &error));
	ck_assert_uint_eq(opd_finished(client), 1);
	MUST(opd_ping(client, &error));
	MUST(opd_wait_any(client, 0, &ticket, &results[2], &error));
	ck_assert_int_eq(direct.begun, 1);
	ck_assert_int_eq(direct.ended, 0);
	opd_direct_end(client);
	ck_assert_int_eq(direct.ended, 1);
	opd_result *again;
	MUST(opd_run(client, request, &again, &error)); /* over the socket again, with an id that rose meanwhile */
	ck_assert_str_eq(opd_result_provider(again), "echo");
	opd_request_destroy(request);
	opd_close(client);
	ck_assert_int_eq(direct.released, 0);
	ck_assert_str_eq(opd_result_provider(results[1]), "native");
	ck_assert_float_eq(((float *)opd_result_tensor(results[1], 0)->data)[3], 8.0f);
	ck_assert_float_eq(((float *)opd_result_tensor(results[0], 0)->data)[3], 4.0f);
	for (int i = 0; i < 3; i++)
		opd_result_destroy(results[i]);
	opd_result_destroy(again);
	ck_assert_int_eq(direct.released, 2);
	ck_assert(peer_join(&direct.peer));
}
END_TEST

START_TEST(a_direct_scope_needs_a_daemon_in_this_process)
{
	struct peer peer;
	opd_error error;
	peer_start(&peer, PEER_UNIX, script_echo, NULL);
	opd_client *client = test_connect(&peer, 0);
	ck_assert_int_eq(opd_direct_begin(client, &error), OPD_FAILED_PRECONDITION);
	opd_close(client);
	ck_assert(peer_join(&peer));
}
END_TEST

Suite *calls_suite(void)
{
	Suite *suite = suite_create("client, calls");
	TCase *tests = tcase_create("calls");
	tcase_set_timeout(tests, 60);
	tcase_add_test(tests, documents_outlive_their_client);
	tcase_add_test(tests, a_list_of_sessions_that_would_go_on_for_ever_is_malformed);
	tcase_add_test(tests, calls_carry_their_arguments);
	tcase_add_test(tests, generated_arguments_become_a_request_that_owns_them);
	tcase_add_test(tests, after_goodbye_answers_still_come_and_new_requests_are_refused);
	tcase_add_test(tests, a_direct_scope_calls_the_dispatcher_without_copies);
	tcase_add_test(tests, a_direct_scope_needs_a_daemon_in_this_process);
	suite_add_tcase(suite, tests);
	return suite;
}
