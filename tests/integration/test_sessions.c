/* What a session holds and in which order things happen in it: kept tensors, references, frees, views, limits, ends of every
 * kind; and the ledger after each. */
#include <check.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

static struct house house;
static opd_client *client;
static opd_error error;
static float values[64];

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static void open_with(const char *const *settings)
{
	house_start(&house, settings);
	client = house_client(&house);
	for (int i = 0; i < 64; i++)
		values[i] = (float)(i + 1);
}

static void open_house(void)
{
	open_with(NULL);
}

static void open_narrow(void)
{
	open_with((const char *const[]){"limits.session", "1 MiB", "limits.request", "1 MiB", "limits.kept", "8", NULL});
}

static void open_one_at_a_time(void)
{
	open_with((const char *const[]){"limits.in_flight", "1", NULL});
}

static void close_house(void)
{
	opd_close(client);
	house_stop(&house);
}

/* ---- Short words ---- */

static void says(const char *part)
{
	ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" isn't in \"%s\"", part, error.text);
}

static opd_operand of_handle(opd_handle handle)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle};
}

static opd_operand of_result(opd_ticket ticket)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = ticket};
}

static opd_request *request_on(const char *op, opd_operand operand, bool keep)
{
	static const char *const native = "native";
	opd_request *request = opd_request_create(op);
	opd_request_tensor(request, NULL, &operand);
	opd_request_priority(request, &native, 1);
	if (keep)
		opd_request_output(request, 0, true, true);
	return request;
}

/* Good until the next call: a request copies the shape. */
static opd_operand host_vector(int64_t elements)
{
	static int64_t shape;
	shape = elements;
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = &shape, .data = values};
}

static opd_ticket submit(opd_request *request)
{
	opd_ticket ticket = 0;
	OK(opd_submit(client, request, &ticket, &error));
	return ticket;
}

static opd_result *wait_for(opd_ticket ticket, opd_status expected)
{
	opd_result *result = NULL;
	opd_status status = opd_wait(client, ticket, 20000000, &result, &error);
	ck_assert_msg(status == expected, "%s: %s", opd_status_name(status), status == OPD_OK ? "" : error.text);
	return result;
}

static void finish(opd_ticket ticket, opd_status expected)
{
	opd_result_destroy(wait_for(ticket, expected));
}

static float first_of(const opd_result *result)
{
	return *(const float *)opd_tensor_data(opd_result_tensor(result, 0));
}

/* A result kept in the session: 2, 4, 6, … */
static opd_handle keep(int64_t elements)
{
	opd_request *request = request_on("lab_scale", host_vector(elements), true);
	opd_result *result = NULL;
	OK(opd_run(client, request, &result, &error));
	opd_handle handle = opd_result_handle(result, 0);
	ck_assert_uint_ne(handle.generation, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return handle;
}

/* ---- References ---- */

START_TEST(a_result_not_yet_there_is_waited_for_through_a_chain)
{
	opd_ticket tickets[6];
	opd_request *requests[6];
	requests[0] = request_on("lab_wait", host_vector(4), true);
	tickets[0] = submit(requests[0]);
	for (int i = 1; i < 6; i++) {
		requests[i] = request_on("lab_scale", of_result(tickets[i - 1]), i < 5);
		tickets[i] = submit(requests[i]);
	}
	opd_result *result = NULL;
	ck_assert_int_eq(opd_wait(client, tickets[5], 20000, &result, &error), OPD_DEADLINE_EXCEEDED);
	lab_gate(true);
	result = wait_for(tickets[5], OPD_OK);
	ck_assert_float_eq(first_of(result), 64);
	opd_result_destroy(result);
	for (int i = 0; i < 6; i++) {
		if (i < 5)
			finish(tickets[i], OPD_OK);
		opd_request_destroy(requests[i]);
	}
}
END_TEST

START_TEST(those_who_name_a_failed_result_are_aborted_and_told_which)
{
	enum { CHAIN = 900 };
	static opd_ticket tickets[CHAIN];
	char text[80];
	opd_request *gate = request_on("lab_wait", host_vector(4), true);
	opd_ticket first = submit(gate);
	const char *const breaks = "breaks";
	opd_request *broken = request_on("lab_scale", of_result(first), true);
	opd_request_priority(broken, &breaks, 1);
	opd_ticket before = submit(broken);
	(void)snprintf(text, sizeof text, "request %" PRIu64 ", whose output 0 is named, failed", before);
	for (int i = 0; i < CHAIN; i++) { /* each names the one before */
		opd_request *request = request_on("lab_scale", of_result(i == 0 ? before : tickets[i - 1]), true);
		tickets[i] = submit(request);
		opd_request_destroy(request);
	}
	lab_gate(true);
	finish(first, OPD_OK);
	finish(before, OPD_INTERNAL);
	finish(tickets[0], OPD_ABORTED);
	says(text);
	for (int i = 1; i < CHAIN; i++)
		finish(tickets[i], OPD_ABORTED);
	opd_request *late = request_on("lab_scale", of_result(before), false); /* and later too */
	finish(submit(late), OPD_ABORTED);
	says(text);
	opd_request_destroy(late);
	opd_request_destroy(gate);
	opd_request_destroy(broken);
}
END_TEST

START_TEST(a_result_whose_request_never_ran_is_aborted_too)
{
	opd_request *bad = opd_request_create("lab_scale"); /* x is missing: it fails before it is bound */
	opd_request_output(bad, 0, true, true);
	opd_ticket ticket = submit(bad);
	opd_request *dependent = request_on("lab_scale", of_result(ticket), false);
	opd_ticket second = submit(dependent);
	finish(ticket, OPD_INVALID_ARGUMENT);
	finish(second, OPD_ABORTED);
	opd_request *plain = request_on("lab_scale", host_vector(4), false);
	ticket = submit(plain);
	opd_request *other = request_on("lab_scale", of_result(ticket), false);
	second = submit(other);
	finish(ticket, OPD_OK);
	finish(second, OPD_NOT_FOUND);
	says("was not kept");
	opd_request_destroy(bad);
	opd_request_destroy(dependent);
	opd_request_destroy(plain);
	opd_request_destroy(other);
}
END_TEST

START_TEST(a_free_waits_for_requests_accepted_before_it)
{
	opd_handle handle = keep(4);
	opd_request *gate = request_on("lab_wait", of_handle(handle), false);
	opd_ticket ticket = submit(gate);
	OK(opd_free(client, &handle, 1, &error));
	opd_request *late = request_on("lab_scale", of_handle(handle), false);
	finish(submit(late), OPD_NOT_FOUND);
	ck_assert_int_eq(opd_free(client, &handle, 1, &error), OPD_NOT_FOUND);
	says("is no tensor of this session");
	lab_gate(true);
	opd_result *result = wait_for(ticket, OPD_OK);
	ck_assert_float_eq(first_of(result), 4);
	opd_result_destroy(result);
	opd_request_destroy(gate);
	opd_request_destroy(late);
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(a_handle_of_another_session_is_not_found)
{
	opd_handle handle = keep(4);
	opd_client *own = client;
	client = house_client(&house);
	opd_request *request = request_on("lab_scale", of_handle(handle), false);
	finish(submit(request), OPD_NOT_FOUND);
	ck_assert_int_eq(opd_free(client, &handle, 1, &error), OPD_NOT_FOUND);
	opd_close(client);
	client = own;
	finish(submit(request), OPD_OK);
	opd_request_destroy(request);
}
END_TEST

/* ---- Views ---- */

static void view_gives(opd_handle handle, uint32_t rank, const int64_t *shape, const int64_t *strides, uint64_t offset,
                       const float *expected, size_t count)
{
	opd_operand view = of_handle(handle);
	view.dtype = OPD_f32;
	view.rank = rank;
	view.shape = shape;
	view.strides = strides;
	view.byte_offset = offset;
	opd_request *request = request_on("lab_scale", view, false);
	opd_result *result = wait_for(submit(request), OPD_OK);
	ck_assert_uint_eq(opd_result_tensor(result, 0)->elements, count);
	for (size_t i = 0; i < count; i++)
		ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[i], expected[i]);
	opd_result_destroy(result);
	opd_request_destroy(request);
}

#define SHAPE(...)                                                                                                               \
	sizeof((int64_t[]){__VA_ARGS__}) / 8, (const int64_t[])                                                                      \
	{                                                                                                                            \
		__VA_ARGS__                                                                                                              \
	}
#define STRIDES(...) ((const int64_t[]){__VA_ARGS__})
#define GIVES(...) (const float[]){__VA_ARGS__}, sizeof((float[]){__VA_ARGS__}) / sizeof(float)

START_TEST(a_view_reads_through_shape_strides_and_offset)
{
	opd_handle handle = keep(12); /* 2, 4, …, 24 */
	view_gives(handle, SHAPE(2, 2), NULL, 0, GIVES(4, 8, 12, 16));
	view_gives(handle, SHAPE(3), STRIDES(4), 4, GIVES(8, 24, 40));
	view_gives(handle, SHAPE(2, 3), STRIDES(1, 4), 0, GIVES(4, 20, 36, 8, 24, 40)); /* transposed */
	view_gives(handle, SHAPE(3), STRIDES(0), 44, GIVES(48, 48, 48));
	view_gives(handle, SHAPE(2), STRIDES(11), 0, GIVES(4, 48)); /* the last element just fits */
}
END_TEST

static void view_refused(opd_handle handle, opd_dtype dtype, uint32_t rank, const int64_t *shape, const int64_t *strides,
                         uint64_t offset, const char *text)
{
	opd_operand view = of_handle(handle);
	view.dtype = dtype;
	view.rank = rank;
	view.shape = shape;
	view.strides = strides;
	view.byte_offset = offset;
	opd_request *request = request_on("lab_scale", view, false);
	finish(submit(request), OPD_INVALID_ARGUMENT);
	says(text);
	opd_request_destroy(request);
}

START_TEST(a_view_that_leaves_its_tensor_is_refused)
{
	opd_handle handle = keep(12);
	view_refused(handle, OPD_f32, SHAPE(13), NULL, 0, "doesn't lie in its 48 bytes");
	view_refused(handle, OPD_f32, SHAPE(12), NULL, 4, "doesn't lie in its 48 bytes");
	view_refused(handle, OPD_f32, SHAPE(2), STRIDES(12), 0, "doesn't lie in its 48 bytes");
	view_refused(handle, OPD_f32, SHAPE(1), NULL, 48, "doesn't lie in its 48 bytes");
	view_refused(handle, OPD_i32, SHAPE(12), NULL, 0, "views a tensor of f32 as i32");
	view_gives(handle, SHAPE(1), NULL, 44, GIVES(48));
}
END_TEST

/* ---- Limits and the ledger ---- */

START_TEST(the_sessions_byte_limit_names_limit_and_value_and_the_session_goes_on)
{
	enum { ELEMENTS = 100000 };
	float *data = calloc(ELEMENTS, sizeof *data);
	opd_handle handles[3];
	uint32_t kept = 0;
	opd_request *request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, ELEMENTS));
	opd_request_output(request, 0, true, false);
	for (;; kept++) {
		opd_result *result = NULL;
		opd_status status = opd_run(client, request, &result, &error);
		if (status == OPD_OK)
			handles[kept] = opd_result_handle(result, 0);
		opd_result_destroy(result);
		if (status == OPD_OK) {
			ck_assert_uint_lt(kept, 2);
			continue;
		}
		ck_assert_int_eq(status, OPD_RESOURCE_EXHAUSTED);
		says("1048576"); /* the limit */
		says("400000");  /* what was wanted */
		break;
	}
	ck_assert_uint_eq(kept, 1); /* 400 kB kept, 400 kB sent: no room for 400 kB of result */
	house_await_bytes(&house, 400000);
	OK(opd_free(client, handles, kept, &error));
	house_await_bytes(&house, 0);
	opd_result *result = NULL;
	OK(opd_run(client, request, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(request);
	free(data);
}
END_TEST

START_TEST(the_limit_of_kept_tensors_is_named_and_failed_requests_give_their_place_back)
{
	opd_handle handles[8];
	const char *const breaks = "breaks";
	for (int i = 0; i < 20; i++) {
		opd_request *request = request_on("lab_scale", host_vector(4), true);
		opd_request_priority(request, &breaks, 1);
		finish(submit(request), OPD_INTERNAL);
		opd_request_destroy(request);
	}
	for (int i = 0; i < 8; i++)
		handles[i] = keep(4);
	opd_request *request = request_on("lab_scale", host_vector(4), true);
	finish(submit(request), OPD_RESOURCE_EXHAUSTED);
	says("8 of at most 8 there");
	OK(opd_free(client, &handles[3], 1, &error));
	finish(submit(request), OPD_OK);
	opd_request_destroy(request);
}
END_TEST

static void run_some_way_to_an_end(int way)
{
	static const char *const providers[] = {"plain", "breaks", "even_only"};
	opd_request *request = request_on("lab_scale", host_vector(way == 2 ? 3 : 4), way == 3);
	opd_result *result = NULL;
	opd_request_priority(request, &providers[way % 3], 1);
	opd_request_strict(request, way == 2);
	if (way == 4)
		opd_request_int(request, "nonsense", 1);
	if (way == 5)
		opd_request_mode(request, OPD_MODE_DRY);
	static const opd_status expected[] = {OPD_OK, OPD_INTERNAL, OPD_FAILED_PRECONDITION, OPD_OK, OPD_INVALID_ARGUMENT, OPD_OK};
	ck_assert_int_eq(opd_run(client, request, &result, &error), expected[way]);
	if (way == 3) {
		opd_handle handle = opd_result_handle(result, 0);
		OK(opd_free(client, &handle, 1, &error));
	}
	opd_result_destroy(result);
	opd_request_destroy(request);
}

START_TEST(after_every_kind_of_end_the_ledger_is_at_zero)
{
	run_some_way_to_an_end(_i);
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(a_disconnect_while_kernels_run_and_others_wait_frees_everything)
{
	for (int i = 0; i < 4; i++) {
		(void)keep(64);
		opd_ticket gate = 0;
		for (int k = 0; k < 6; k++) {
			opd_request *request = request_on("lab_wait", host_vector(64), true);
			gate = submit(request);
			opd_request_destroy(request);
		}
		for (int k = 0; k < 6; k++) {
			opd_request *request = request_on("lab_scale", of_result(gate), true);
			(void)submit(request);
			opd_request_destroy(request);
		}
		house_await_count(&lab_counts.waiting, 1);
		opd_close(client);
		client = house_client(&house);
		OK(opd_ping(client, &error));
		ck_assert_uint_gt(server_memory_bytes(house.server), 0); /* the kernels are at it */
		lab_gate(true);
		house_await_bytes(&house, 0);
		lab_reset();
	}
}
END_TEST

START_TEST(a_request_that_could_not_start_in_time_fails_by_its_deadline)
{
	opd_request *gate = request_on("lab_wait", host_vector(4), true);
	opd_ticket first = submit(gate);
	opd_request *late = request_on("lab_wait", of_result(first), false);
	opd_request_timeout(late, 1000);
	opd_ticket second = submit(late);
	opd_request *patient = request_on("lab_wait", of_result(first), false);
	opd_request_timeout(patient, 60000000);
	opd_ticket third = submit(patient);
	opd_result *none = NULL;
	ck_assert_int_eq(opd_wait(client, third, 5000, &none, &error), OPD_DEADLINE_EXCEEDED); /* of the wait, not the request */
	finish(second, OPD_DEADLINE_EXCEEDED);
	says("not started within its timeout of 1000 us");
	lab_gate(true);
	finish(first, OPD_OK);
	finish(third, OPD_OK);
	opd_request_destroy(gate);
	opd_request_destroy(late);
	opd_request_destroy(patient);
}
END_TEST

/* ---- Many at once ---- */

START_TEST(one_request_at_a_time_still_gets_a_large_payload_through)
{
	enum { ELEMENTS = 1 << 20 };
	float *data = calloc(ELEMENTS, sizeof *data);
	for (int i = 0; i < 4; i++) { /* whole, and in chunks */
		opd_close(client);
		const opd_connect_options options = {.struct_bytes = sizeof options, .no_chunks = i % 2 == 0, .timeout_us = 20000000};
		OK(opd_connect(house.address, &options, &client, &error));
		opd_request *request = opd_request_create("lab_scale");
		opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, ELEMENTS));
		opd_result *result = NULL;
		OK(opd_run(client, request, &result, &error));
		opd_result_destroy(result);
		opd_request_destroy(request);
		for (int k = 0; k < 20; k++) { /* the client keeps to the limit and queues the rest */
			request = request_on("lab_scale", host_vector(4), false);
			(void)submit(request);
			opd_request_destroy(request);
		}
		for (int k = 0; k < 20; k++) {
			opd_ticket ticket;
			OK(opd_wait_any(client, 20000000, &ticket, &result, &error));
			opd_result_destroy(result);
		}
	}
	free(data);
}
END_TEST

START_TEST(small_requests_overtake_a_chunked_one)
{
	enum { ELEMENTS = 8 << 20 };
	float *data = calloc(ELEMENTS, sizeof *data);
	data[ELEMENTS - 1] = 21;
	opd_request *bulk = opd_request_create("lab_scale");
	opd_request_tensor(bulk, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, ELEMENTS));
	opd_ticket slow = submit(bulk);
	opd_ticket first_done = 0;
	for (int i = 0; i < 50; i++) {
		opd_request *request = request_on("lab_scale", host_vector(4), false);
		(void)submit(request);
		opd_request_destroy(request);
	}
	for (int i = 0; i < 51; i++) {
		opd_ticket ticket;
		opd_result *result = NULL;
		OK(opd_wait_any(client, 30000000, &ticket, &result, &error));
		if (i == 0)
			first_done = ticket;
		if (ticket == slow)
			ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[ELEMENTS - 1], 42);
		else
			ck_assert_float_eq(first_of(result), 2);
		opd_result_destroy(result);
	}
	ck_assert_uint_ne(first_done, slow);
	opd_request_destroy(bulk);
	free(data);
}
END_TEST

struct worker {
	pthread_t thread;
	uint32_t number;
	uint32_t wrong;
};

/* Uploads, keeps, chains and frees; every value is checked. No assertion on this thread. */
static void *work(void *argument)
{
	struct worker *worker = argument;
	opd_client *mine = NULL;
	opd_error failure;
	float x[16];
	for (int i = 0; i < 16; i++)
		x[i] = (float)(worker->number * 100 + (uint32_t)i);
	if (opd_connect(house.address, NULL, &mine, &failure) != OPD_OK) {
		worker->wrong++;
		return NULL;
	}
	for (int round = 0; round < 60; round++) {
		opd_operand host = OPD_OPERAND(OPD_f32, x, 16);
		opd_request *first = request_on("lab_scale", host, true);
		opd_ticket one = 0;
		opd_ticket two = 0;
		worker->wrong += opd_submit(mine, first, &one, &failure) != OPD_OK;
		opd_request *second = request_on("lab_scale", of_result(one), false);
		worker->wrong += opd_submit(mine, second, &two, &failure) != OPD_OK;
		opd_result *a = NULL;
		opd_result *b = NULL;
		worker->wrong += opd_wait(mine, two, UINT64_MAX, &b, &failure) != OPD_OK;
		worker->wrong += opd_wait(mine, one, UINT64_MAX, &a, &failure) != OPD_OK;
		for (int i = 0; a != NULL && b != NULL && i < 16; i++)
			worker->wrong += ((const float *)opd_tensor_data(opd_result_tensor(b, 0)))[i] != 4 * x[i];
		opd_handle handle = a == NULL ? (opd_handle){0} : opd_result_handle(a, 0);
		worker->wrong += opd_free(mine, &handle, 1, &failure) != OPD_OK;
		opd_result_destroy(a);
		opd_result_destroy(b);
		opd_request_destroy(first);
		opd_request_destroy(second);
	}
	opd_close(mine);
	return NULL;
}

START_TEST(many_clients_at_once_each_get_their_own_values)
{
	struct worker workers[12] = {0};
	for (uint32_t i = 0; i < 12; i++) {
		workers[i].number = i + 1;
		ck_assert_int_eq(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
	}
	for (uint32_t i = 0; i < 12; i++) {
		ck_assert_int_eq(pthread_join(workers[i].thread, NULL), 0);
		ck_assert_uint_eq(workers[i].wrong, 0);
	}
	house_await_bytes(&house, 0);
}
END_TEST

static bool resumes(opd_resumption *kept)
{
	opd_client *other;
	OK(opd_connect(house.way, &(opd_connect_options){.struct_bytes = sizeof(opd_connect_options), .resumption = kept}, &other, &error));
	OK(opd_ping(other, &error));
	const bool resumed = opd_client_session(other)->resumed;
	opd_close(other);
	return resumed;
}

/* Over TLS; elsewhere there is nothing to resume. */
START_TEST(a_connection_goes_on_where_an_earlier_one_was)
{
	const bool tls = strncmp(house.way, "tls:", 4) == 0;
	opd_resumption *kept = opd_resumption_create();
	ck_assert(!resumes(kept));
	for (int i = 0; i < 3; i++)
		ck_assert_int_eq(resumes(kept), tls);
	ck_assert(!resumes(NULL));
	opd_client *last;
	OK(opd_connect(house.way, &(opd_connect_options){.struct_bytes = sizeof(opd_connect_options), .resumption = kept}, &last, &error));
	opd_resumption_destroy(kept); /* the client has it still */
	OK(opd_ping(last, &error));
	opd_close(last);
}
END_TEST

static TCase *add_case(Suite *suite, const char *name, void (*setup)(void))
{
	TCase *tests = tcase_create(name);
	tcase_add_checked_fixture(tests, setup, close_house);
	tcase_set_timeout(tests, 120);
	suite_add_tcase(suite, tests);
	return tests;
}

int main(void)
{
	Suite *suite = suite_create("sessions");
	TCase *tests = add_case(suite, "kept", open_house);
	tcase_add_test(tests, a_result_not_yet_there_is_waited_for_through_a_chain);
	tcase_add_test(tests, those_who_name_a_failed_result_are_aborted_and_told_which);
	tcase_add_test(tests, a_result_whose_request_never_ran_is_aborted_too);
	tcase_add_test(tests, a_free_waits_for_requests_accepted_before_it);
	tcase_add_test(tests, a_handle_of_another_session_is_not_found);
	tcase_add_test(tests, a_view_reads_through_shape_strides_and_offset);
	tcase_add_test(tests, a_view_that_leaves_its_tensor_is_refused);
	tests = add_case(suite, "limits", open_narrow);
	tcase_add_test(tests, the_sessions_byte_limit_names_limit_and_value_and_the_session_goes_on);
	tcase_add_test(tests, the_limit_of_kept_tensors_is_named_and_failed_requests_give_their_place_back);
	tests = add_case(suite, "ends", open_house);
	tcase_add_loop_test(tests, after_every_kind_of_end_the_ledger_is_at_zero, 0, 6);
	tcase_add_test(tests, a_disconnect_while_kernels_run_and_others_wait_frees_everything);
	tcase_add_test(tests, a_request_that_could_not_start_in_time_fails_by_its_deadline);
	tests = add_case(suite, "one at a time", open_one_at_a_time);
	tcase_add_test(tests, one_request_at_a_time_still_gets_a_large_payload_through);
	tests = add_case(suite, "many", open_house);
	tcase_add_test(tests, a_connection_goes_on_where_an_earlier_one_was);
	tcase_add_test(tests, small_requests_overtake_a_chunked_one);
	tcase_add_test(tests, many_clients_at_once_each_get_their_own_values);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
