/* Kept tensors given to single runs (SEMANTICS 31 to 33): who sees what, in which memory, and what an end of each kind leaves. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

#define ELEMENTS 1024
#define BYTES (ELEMENTS * sizeof(float))

static struct house house;
static opd_client *client;
static opd_error error;
static float ones[ELEMENTS], fives[ELEMENTS];

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static void open_house(void)
{
	house_start(&house, NULL);
	client = house_client(&house);
	for (int i = 0; i < ELEMENTS; i++) {
		ones[i] = 1;
		fives[i] = 5;
	}
}

static void open_checked(void)
{
	house_start(&house, (const char *const[]){"checked", "true", NULL});
	client = house_client(&house);
	for (int i = 0; i < ELEMENTS; i++)
		ones[i] = fives[i] = 1;
}

static void open_narrow(void)
{
	house_start(&house, (const char *const[]){"limits.session", "64 KiB", "limits.request", "64 KiB", NULL});
	client = house_client(&house);
}

static void close_house(void)
{
	opd_close(client);
	house_stop(&house);
}

static void says(const char *part)
{
	ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" isn't in \"%s\"", part, error.text);
}

static opd_operand host(const float *data)
{
	static const int64_t shape = ELEMENTS;
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = &shape, .data = data};
}

static opd_operand of_handle(opd_handle handle, bool donate)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle, .donate = donate};
}

static opd_handle upload(const float *data)
{
	const opd_operand operand = host(data);
	opd_handle handle = {0};
	OK(opd_upload(client, &operand, NULL, &handle, &error));
	return handle;
}

/* lab_add(x, by) of one provider, result copied if asked; x and by as given. */
static opd_request *add(const char *provider, opd_operand x, opd_operand by, bool copy)
{
	opd_request *request = opd_request_create("lab_add");
	opd_request_tensor(request, NULL, &x);
	opd_request_tensor(request, NULL, &by);
	opd_request_priority(request, &provider, 1);
	opd_request_output(request, 0, false, copy);
	return request;
}

static opd_status run(opd_request *request, opd_result **result_out)
{
	const opd_status status = opd_run(client, request, result_out, &error);
	opd_request_destroy(request);
	return status;
}

static void fails(opd_request *request, opd_status expected, const char *part)
{
	opd_result *result = NULL;
	const opd_status got = run(request, &result);
	opd_result_destroy(result);
	ck_assert_msg(got == expected, "%s: %s", opd_status_name(got), got == OPD_OK ? "" : error.text);
	says(part);
}

/* Its new handle. */
static opd_handle donate_to(const char *provider, opd_handle handle)
{
	opd_result *result = NULL;
	OK(run(add(provider, of_handle(handle, true), host(fives), false), &result));
	const opd_handle now = opd_result_handle(result, 0);
	opd_result_destroy(result);
	ck_assert_uint_eq(now.index, handle.index);
	ck_assert_uint_ne(now.generation, 0);
	ck_assert_uint_ne(now.generation, handle.generation);
	return now;
}

static opd_status fetch(opd_handle handle, float *first_out)
{
	const opd_operand operand = of_handle(handle, false);
	opd_result *result = NULL;
	const opd_status status = opd_fetch(client, &operand, &result, &error);
	if (status == OPD_OK)
		*first_out = ((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[ELEMENTS - 1];
	opd_result_destroy(result);
	return status;
}

static void expect_value(opd_handle handle, float value)
{
	float got = 0;
	OK(fetch(handle, &got));
	ck_assert_float_eq(got, value);
}

static void expect_error(opd_handle handle, opd_status status, const char *part)
{
	float got;
	ck_assert_int_eq(fetch(handle, &got), status);
	says(part);
}

START_TEST(promise_31_without_donation_inputs_stay_and_outputs_are_fresh)
{
	const opd_handle x = upload(ones);
	opd_result *result = NULL;
	opd_request *request = add("native", of_handle(x, false), host(fives), true);
	opd_request_output(request, 0, true, true);
	OK(run(request, &result));
	const opd_handle y = opd_result_handle(result, 0);
	ck_assert(y.index != x.index);
	opd_result_destroy(result);
	expect_value(x, 1);
	expect_value(y, 6);
	house_await_bytes(&house, 2 * BYTES);
}
END_TEST

START_TEST(promise_32_the_result_takes_its_place_in_the_same_memory_or_in_fresh)
{
	static const char *const providers[] = {"native", "aside"};
	opd_handle x = upload(ones);
	const opd_handle first = x;
	for (int i = 0; i < 2; i++) {
		const opd_handle before = x;
		x = donate_to(providers[i], x);
		expect_value(x, (float)(1 + 5 * (i + 1)));
		expect_error(before, OPD_FAILED_PRECONDITION, "was donated to request");
		house_await_bytes(&house, BYTES);
	}
	float got;
	ck_assert_int_ne(fetch(first, &got), OPD_OK);
	OK(opd_free(client, &x, 1, &error));
	expect_error(x, OPD_NOT_FOUND, "is no tensor of this session");
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(promise_32_a_result_that_is_copied_too_is_a_copy)
{
	opd_handle x = upload(ones);
	opd_result *results[4];
	for (int i = 0; i < 4; i++) {
		OK(run(add("native", of_handle(x, true), host(fives), true), &results[i]));
		x = opd_result_handle(results[i], 0);
	}
	for (int i = 0; i < 4; i++) {
		ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(results[i], 0)))[7], (float)(1 + 5 * (i + 1)));
		opd_result_destroy(results[i]);
	}
	expect_value(x, 21);
}
END_TEST

START_TEST(promise_32_requests_accepted_before_read_the_old_value)
{
	lab_reset();
	const opd_handle x = upload(ones);
	const opd_operand reads = of_handle(x, false);
	opd_request *slow = opd_request_create("lab_wait");
	opd_request_tensor(slow, NULL, &reads);
	opd_ticket ticket = 0;
	OK(opd_submit(client, slow, &ticket, &error));
	house_await_count(&lab_counts.waiting, 1);
	const opd_handle now = donate_to("native", x);
	expect_value(now, 6);
	lab_gate(true);
	opd_result *result = NULL;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[3], 2);
	opd_result_destroy(result);
	opd_request_destroy(slow);
	expect_value(now, 6);
}
END_TEST

START_TEST(promise_32_the_donated_output_may_be_named_by_its_request)
{
	opd_handle x = upload(ones);
	opd_request *request = add("native", of_handle(x, true), host(fives), false);
	opd_ticket ticket = 0;
	OK(opd_submit(client, request, &ticket, &error));
	opd_request_destroy(request);
	const opd_operand named = {.struct_bytes = sizeof named, .source = OPD_FROM_RESULT, .ticket = ticket};
	opd_request *fetching = opd_fetch_create(&named);
	opd_result *result = NULL;
	OK(opd_run(client, fetching, &result, &error));
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[0], 6);
	opd_result_destroy(result);
	opd_request_destroy(fetching);
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	x = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_operand again = named;
	again.donate = true;
	OK(run(add("native", again, host(fives), false), &result));
	expect_value(opd_result_handle(result, 0), 11);
	opd_result_destroy(result);
	expect_error(x, OPD_FAILED_PRECONDITION, "was donated");
}
END_TEST

START_TEST(promise_32_what_cannot_be_donated_is_refused_by_name_and_stays)
{
	const opd_handle x = upload(ones), other = upload(fives);
	opd_operand bytes = host(ones);
	bytes.donate = true;
	fails(add("native", bytes, host(fives), false), OPD_INVALID_ARGUMENT, "x is donated: expected a kept tensor");
	fails(add("native", of_handle(x, false), of_handle(other, true), false), OPD_INVALID_ARGUMENT, "by is donated, but no result may take its place");
	fails(add("native", of_handle(x, true), of_handle(x, false), false), OPD_INVALID_ARGUMENT, "x is donated, but by is the same tensor");
	const opd_operand scaled = of_handle(x, true);
	opd_request *request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL, &scaled);
	fails(request, OPD_INVALID_ARGUMENT, "no result may take its place");
	opd_operand part = of_handle(x, true);
	part.dtype = OPD_f32;
	part.rank = 1;
	part.shape = (const int64_t[]){4};
	opd_operand four = host(fives);
	four.shape = part.shape;
	fails(add("native", part, four, false), OPD_INVALID_ARGUMENT, "only 16 of its 4096 bytes");
	expect_value(x, 1);
	expect_value(other, 5);
}
END_TEST

START_TEST(promise_32_a_shape_may_be_restated)
{
	const opd_handle x = upload(ones);
	opd_operand restated = of_handle(x, true);
	restated.dtype = OPD_f32;
	restated.rank = 2;
	restated.shape = (const int64_t[]){2, ELEMENTS / 2};
	opd_operand by = host(fives);
	by.rank = 2;
	by.shape = restated.shape;
	opd_result *result = NULL;
	OK(run(add("native", restated, by, false), &result));
	const opd_handle now = opd_result_handle(result, 0);
	opd_result_destroy(result);
	const opd_operand whole = of_handle(now, false);
	OK(opd_fetch(client, &whole, &result, &error));
	ck_assert_uint_eq(opd_result_tensor(result, 0)->rank, 2);
	opd_result_destroy(result);
}
END_TEST

START_TEST(promise_32_a_request_that_ends_before_its_kernel_has_given_nothing)
{
	const opd_handle x = upload(ones);
	opd_operand wrong = host(fives);
	wrong.shape = (const int64_t[]){ELEMENTS / 2};
	fails(add("native", of_handle(x, true), wrong, false), OPD_INVALID_ARGUMENT, "another shape");
	expect_value(x, 1);
	fails(add("nobody", of_handle(x, true), host(fives), false), OPD_NOT_FOUND, "nobody");
	expect_value(x, 1);
	opd_result *result = NULL;
	opd_request *dry = add("native", of_handle(x, true), host(fives), false);
	opd_request_mode(dry, OPD_MODE_DRY);
	OK(run(dry, &result));
	opd_result_destroy(result);
	expect_value(x, 1);
	expect_value(donate_to("native", x), 6);
}
END_TEST

START_TEST(promise_32_a_tensor_that_a_failed_kernel_may_have_written_is_lost)
{
	const opd_handle x = upload(ones);
	opd_request *request = add("halfway", of_handle(x, true), host(fives), false);
	static const char *const both[] = {"halfway", "native"};
	opd_request_priority(request, both, 2);
	opd_request_retry(request, true); /* nobody else tries */
	opd_result *result = NULL;
	ck_assert_int_ne(run(request, &result), OPD_OK);
	opd_result_destroy(result);
	expect_error(x, OPD_DATA_LOSS, "the tensor is lost");
	fails(add("native", of_handle(x, true), host(fives), false), OPD_DATA_LOSS, "the tensor is lost");
	OK(opd_free(client, &x, 1, &error));
	house_await_bytes(&house, 0);
}
END_TEST

/* Hardening: handles-donated */
START_TEST(promise_32_a_tensor_that_is_being_given_is_nobodys_meanwhile)
{
	lab_reset();
	const opd_handle x = upload(ones);
	const opd_operand slow_input = host(fives);
	opd_request *slow = opd_request_create("lab_wait");
	opd_request_tensor(slow, NULL, &slow_input);
	opd_request_output(slow, 0, true, false);
	opd_ticket waited = 0, ticket = 0;
	OK(opd_submit(client, slow, &waited, &error));
	const opd_operand pending = {.struct_bytes = sizeof pending, .source = OPD_FROM_RESULT, .ticket = waited};
	opd_request *request = add("native", of_handle(x, true), pending, false);
	OK(opd_submit(client, request, &ticket, &error));
	const opd_kept_list *list = NULL;
	OK(opd_kept_tensors(client, &list, &error));
	ck_assert_uint_eq(list->count, 1);
	const opd_handle now = list->tensors[0].handle;
	opd_document_free(list);
	expect_error(now, OPD_FAILED_PRECONDITION, "hasn't ended");
	ck_assert_int_eq(opd_free(client, &now, 1, &error), OPD_FAILED_PRECONDITION);
	expect_error(x, OPD_FAILED_PRECONDITION, "was donated to request");
	lab_gate(true);
	opd_result *result = NULL;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	OK(opd_wait(client, waited, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	expect_value(now, 11);
	opd_request_destroy(slow);
	opd_request_destroy(request);
}
END_TEST

/* ---- Results still to come ---- */

static opd_operand of_result(opd_ticket ticket, bool donate)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = ticket, .donate = donate};
}

static opd_ticket submitted(opd_request *request)
{
	opd_ticket ticket = 0;
	OK(opd_submit(client, request, &ticket, &error));
	opd_request_destroy(request);
	return ticket;
}

/* Twice `data`, kept, once the gate is open. */
static opd_ticket waiting_result(const float *data)
{
	const opd_operand input = host(data);
	lab_reset();
	opd_request *request = opd_request_create("lab_wait");
	opd_request_tensor(request, NULL, &input);
	opd_request_output(request, 0, true, false);
	return submitted(request);
}

static opd_ticket fetching(opd_ticket ticket)
{
	const opd_operand operand = of_result(ticket, false);
	return submitted(opd_fetch_create(&operand));
}

/* Its handle, and its first value where it was copied. */
static opd_handle done(opd_ticket ticket, float *value_out)
{
	opd_result *result = NULL;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	if (value_out != NULL)
		*value_out = *(const float *)opd_tensor_data(opd_result_tensor(result, 0));
	const opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	return handle;
}

static void ends(opd_ticket ticket, opd_status expected, const char *part)
{
	opd_result *result = NULL;
	const opd_status got = opd_wait(client, ticket, UINT64_MAX, &result, &error);
	opd_result_destroy(result);
	ck_assert_msg(got == expected, "%s: %s", opd_status_name(got), got == OPD_OK ? "" : error.text);
	says(part);
}

START_TEST(promise_32_a_result_still_to_come_may_be_donated_in_the_order_of_acceptance)
{
	float before = 0;
	const opd_ticket made = waiting_result(ones), reader = fetching(made);
	const opd_ticket first = submitted(add("native", of_result(made, true), host(fives), false));
	ends(fetching(made), OPD_FAILED_PRECONDITION, "was donated to request");
	fails(add("native", of_result(made, true), host(fives), false), OPD_FAILED_PRECONDITION, "was donated to request");
	const opd_ticket second = submitted(add("native", of_result(first, true), host(fives), true)), third = fetching(second);
	const opd_ticket both = submitted(add("native", of_result(second, true), of_result(second, false), false));
	lab_gate(true);
	ends(both, OPD_INVALID_ARGUMENT, "x is donated, but by is the same tensor");
	(void)done(reader, &before);
	ck_assert_float_eq(before, 2);
	expect_error(done(made, NULL), OPD_NOT_FOUND, "is no tensor of this session"); /* two donations ago */
	expect_error(done(first, NULL), OPD_FAILED_PRECONDITION, "was donated to request");
	expect_value(done(second, &before), 12);
	ck_assert_float_eq(before, 12);
	(void)done(third, &before);
	ck_assert_float_eq(before, 12);
}
END_TEST

/* A session may have two tensors and a half: each step must write where the one before it did. */
START_TEST(promise_32_a_chain_of_steps_that_waits_for_none_stays_in_one_memory)
{
	static float large[6 * ELEMENTS];
	static const int64_t shape = 6 * ELEMENTS;
	const opd_operand input = {.struct_bytes = sizeof input, .dtype = OPD_f32, .rank = 1, .shape = &shape, .data = large};
	opd_handle by = {0};
	for (int64_t i = 0; i < shape; i++)
		large[i] = 1;
	lab_reset();
	OK(opd_upload(client, &input, NULL, &by, &error));
	opd_request *request = opd_request_create("lab_wait");
	const opd_operand named = of_handle(by, false);
	opd_request_tensor(request, NULL, &named);
	opd_request_output(request, 0, true, false);
	opd_ticket step = submitted(request);
	opd_ticket steps[12];
	for (int i = 0; i < 12; i++) {
		steps[i] = step;
		step = submitted(add("native", of_result(step, true), of_handle(by, false), false));
	}
	lab_gate(true);
	for (int i = 0; i < 12; i++)
		(void)done(steps[i], NULL);
	const opd_handle last = done(step, NULL);
	opd_result *result = NULL;
	OK(opd_free(client, &by, 1, &error));
	const opd_operand all = of_handle(last, false);
	OK(opd_fetch(client, &all, &result, &error));
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[shape - 1], 14);
	opd_result_destroy(result);
}
END_TEST

START_TEST(promise_32_a_promise_ends_with_the_request_that_it_was_made_to)
{
	float value = 0;
	opd_operand wrong = host(fives);
	wrong.shape = (const int64_t[]){ELEMENTS / 2};
	const opd_ticket made = waiting_result(ones);
	const opd_ticket cancelled = submitted(add("native", of_result(made, true), host(fives), false));
	opd_cancel(client, cancelled);
	OK(opd_ping(client, &error));
	const opd_ticket again = fetching(made);
	const opd_ticket failing = submitted(add("native", of_result(made, true), wrong, false));
	lab_gate(true);
	(void)done(again, &value);
	ck_assert_float_eq(value, 2);
	ends(failing, OPD_INVALID_ARGUMENT, "another shape");
	expect_value(done(made, NULL), 2);
}
END_TEST

START_TEST(promise_32_a_result_that_never_comes_is_given_to_nobody)
{
	const opd_ticket slow = waiting_result(ones);
	opd_request *broken = add("aside", of_result(slow, false), host(fives), false);
	opd_request_output(broken, 0, true, false);
	const opd_ticket made = submitted(broken);
	const opd_ticket given = submitted(add("native", of_result(made, true), host(fives), false));
	const opd_ticket dependent = submitted(add("native", of_result(given, true), host(fives), false));
	opd_cancel(client, made); /* it still waits for `slow` */
	ends(given, OPD_ABORTED, "failed");
	ends(dependent, OPD_ABORTED, "failed");
	lab_gate(true);
	expect_value(done(slow, NULL), 2);
}
END_TEST

START_TEST(a_session_that_ends_with_promises_leaves_nothing)
{
	opd_client *mine = client, *leaving = house_client(&house);
	client = leaving;
	opd_ticket step = waiting_result(ones);
	for (int i = 0; i < 20; i++)
		step = submitted(add(i % 2 == 0 ? "native" : "aside", of_result(step, true), host(fives), false));
	OK(opd_ping(client, &error));
	opd_close(leaving);
	client = mine;
	lab_gate(true);
	house_await_bytes(&house, 0);
	OK(opd_ping(client, &error));
}
END_TEST

START_TEST(promise_33_donated_or_not_the_bits_are_the_same)
{
	static float x[ELEMENTS], by[ELEMENTS];
	for (int i = 0; i < ELEMENTS; i++) {
		x[i] = (float)rand() / 3e8f;
		by[i] = (float)rand() / 7e9f;
	}
	opd_result *fresh = NULL, *donated = NULL;
	OK(run(add("native", of_handle(upload(x), false), host(by), true), &fresh));
	OK(run(add("native", of_handle(upload(x), true), host(by), true), &donated));
	ck_assert(memcmp(opd_tensor_data(opd_result_tensor(fresh, 0)), opd_tensor_data(opd_result_tensor(donated, 0)), BYTES) == 0);
	opd_result_destroy(fresh);
	opd_result_destroy(donated);
}
END_TEST

START_TEST(checked_mode_writes_no_canary_behind_a_donated_tensor)
{
	opd_handle x = upload(ones);
	for (int i = 0; i < 3; i++)
		x = donate_to("native", x);
	expect_value(x, 4);
}
END_TEST

START_TEST(direct_calls_donate_as_frames_do)
{
	opd_close(client);
	client = house_direct_client(&house);
	OK(opd_direct_begin(client, &error));
	const opd_handle x = upload(ones);
	const opd_handle now = donate_to("native", x);
	expect_value(now, 6);
	expect_error(x, OPD_FAILED_PRECONDITION, "was donated");
	opd_direct_end(client);
}
END_TEST

START_TEST(a_session_that_ends_with_donations_under_way_leaves_nothing)
{
	opd_client *leaving = house_client(&house);
	opd_client *mine = client;
	client = leaving;
	opd_handle x = upload(ones);
	for (int i = 0; i < 20; i++) {
		opd_request *request = add(i % 2 == 0 ? "native" : "aside", of_handle(x, true), host(fives), false);
		opd_ticket ticket = 0;
		OK(opd_submit(leaving, request, &ticket, &error));
		opd_request_destroy(request);
	}
	opd_close(leaving);
	client = mine;
	house_await_bytes(&house, 0);
	OK(opd_ping(client, &error));
}
END_TEST

static TCase *add_case(Suite *suite, const char *name, void (*setup)(void))
{
	TCase *tests = tcase_create(name);
	tcase_add_checked_fixture(tests, setup, close_house);
	tcase_set_timeout(tests, 60);
	suite_add_tcase(suite, tests);
	return tests;
}

int main(void)
{
	Suite *suite = suite_create("donations");
	TCase *tests = add_case(suite, "donations", open_house);
	tcase_add_test(tests, promise_31_without_donation_inputs_stay_and_outputs_are_fresh);
	tcase_add_test(tests, promise_32_the_result_takes_its_place_in_the_same_memory_or_in_fresh);
	tcase_add_test(tests, promise_32_a_result_that_is_copied_too_is_a_copy);
	tcase_add_test(tests, promise_32_requests_accepted_before_read_the_old_value);
	tcase_add_test(tests, promise_32_the_donated_output_may_be_named_by_its_request);
	tcase_add_test(tests, promise_32_what_cannot_be_donated_is_refused_by_name_and_stays);
	tcase_add_test(tests, promise_32_a_shape_may_be_restated);
	tcase_add_test(tests, promise_32_a_request_that_ends_before_its_kernel_has_given_nothing);
	tcase_add_test(tests, promise_32_a_tensor_that_a_failed_kernel_may_have_written_is_lost);
	tcase_add_test(tests, promise_32_a_tensor_that_is_being_given_is_nobodys_meanwhile);
	tcase_add_test(tests, promise_32_a_result_still_to_come_may_be_donated_in_the_order_of_acceptance);
	tcase_add_test(tests, promise_32_a_promise_ends_with_the_request_that_it_was_made_to);
	tcase_add_test(tests, promise_32_a_result_that_never_comes_is_given_to_nobody);
	tcase_add_test(tests, a_session_that_ends_with_promises_leaves_nothing);
	tcase_add_test(tests, promise_33_donated_or_not_the_bits_are_the_same);
	tcase_add_test(tests, direct_calls_donate_as_frames_do);
	tcase_add_test(tests, a_session_that_ends_with_donations_under_way_leaves_nothing);
	tests = add_case(suite, "checked", open_checked);
	tcase_add_test(tests, checked_mode_writes_no_canary_behind_a_donated_tensor);
	tests = add_case(suite, "narrow", open_narrow);
	tcase_add_test(tests, promise_32_a_chain_of_steps_that_waits_for_none_stays_in_one_memory);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
