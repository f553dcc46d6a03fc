/* Tensors that clients bring and take: uploads whole and in parts, fetches, the list; what is refused; and the ledger after every end. */
#include <check.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

static struct house house;
static opd_client *client;
static opd_error error;
static float values[1 << 18];

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static void open_with(const char *const *settings)
{
	house_start(&house, settings);
	client = house_client(&house);
	for (size_t i = 0; i < sizeof values / sizeof values[0]; i++)
		values[i] = (float)(i % 9973);
}

static void open_house(void)
{
	open_with(NULL);
}

static void open_narrow(void)
{
	open_with((const char *const[]){"limits.session", "1 MiB", "limits.request", "512 KiB", "limits.kept", "4", NULL});
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

static void fails(opd_status got, opd_status expected, const char *part)
{
	ck_assert_msg(got == expected, "%s: %s", opd_status_name(got), got == OPD_OK ? "" : error.text);
	says(part);
}

static opd_operand of_handle(opd_handle handle)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle};
}

static opd_operand of_result(opd_ticket ticket)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = ticket};
}

/* Good until the next call. */
static opd_operand vector(int64_t elements, opd_operand_source source)
{
	static int64_t shape;
	shape = elements;
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = &shape, .source = source, .data = values};
}

static opd_handle upload(int64_t elements)
{
	const opd_operand operand = vector(elements, OPD_FROM_HOST);
	opd_handle handle = {0};
	OK(opd_upload(client, &operand, NULL, &handle, &error));
	ck_assert_uint_ne(handle.generation, 0);
	return handle;
}

static opd_handle upload_bare(int64_t elements)
{
	const opd_operand operand = vector(elements, OPD_FROM_NOTHING);
	opd_request *request = opd_upload_create(&operand);
	opd_result *result = NULL;
	OK(opd_run(client, request, &result, &error));
	const opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return handle;
}

static opd_status write_part(opd_handle handle, uint64_t offset, uint64_t bytes)
{
	opd_request *request = opd_write_create(handle, offset, (const char *)values + (offset < sizeof values ? offset : 0), bytes);
	opd_result *result = NULL;
	const opd_status status = opd_run(client, request, &result, &error);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return status;
}

static opd_status fetch(opd_operand operand, opd_result **result_out)
{
	return opd_fetch(client, &operand, result_out, &error);
}

/* Fetched, it is the first `elements` of values. */
static void expect_values(opd_handle handle, int64_t elements)
{
	opd_result *result = NULL;
	OK(fetch(of_handle(handle), &result));
	const opd_tensor *tensor = opd_result_tensor(result, 0);
	ck_assert_int_eq(tensor->dtype, OPD_f32);
	ck_assert_uint_eq(tensor->rank, 1);
	ck_assert_int_eq(tensor->shape[0], elements);
	ck_assert(elements == 0 || memcmp(opd_tensor_data(tensor), values, (size_t)elements * 4) == 0);
	opd_result_destroy(result);
}

static opd_status scale(opd_operand operand, opd_result **result_out)
{
	opd_request *request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL, &operand);
	const opd_status status = opd_run(client, request, result_out, &error);
	opd_request_destroy(request);
	return status;
}

/* ---- Uploads and fetches ---- */

START_TEST(an_upload_is_read_by_ops_and_fetched_bit_for_bit)
{
	static const int64_t sizes[] = {0, 1, 63, 4096, 1 << 18};
	for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
		const opd_handle handle = upload(sizes[i]);
		expect_values(handle, sizes[i]);
		opd_result *result = NULL;
		OK(scale(of_handle(handle), &result));
		const float *y = opd_tensor_data(opd_result_tensor(result, 0));
		for (int64_t k = 0; k < sizes[i]; k++)
			ck_assert_float_eq(y[k], 2 * values[k]);
		opd_result_destroy(result);
		OK(opd_free(client, &handle, 1, &error));
	}
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(an_upload_may_be_named_before_it_is_answered)
{
	const opd_operand operand = vector(1 << 18, OPD_FROM_HOST);
	opd_request *first = opd_upload_create(&operand);
	opd_ticket ticket = 0;
	opd_ticket last = 0;
	OK(opd_submit(client, first, &ticket, &error));
	const opd_operand named = of_result(ticket);
	opd_request *second = opd_fetch_create(&named);
	OK(opd_submit(client, second, &last, &error));
	opd_result *result = NULL;
	OK(opd_wait(client, last, UINT64_MAX, &result, &error));
	ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), values, sizeof values) == 0);
	opd_result_destroy(result);
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(first);
	opd_request_destroy(second);
}
END_TEST

START_TEST(a_fetch_waits_for_a_result_still_to_come_and_fails_with_it)
{
	lab_reset();
	const opd_operand host = vector(8, OPD_FROM_HOST);
	opd_request *slow = opd_request_create("lab_wait");
	opd_request_tensor(slow, NULL, &host);
	opd_request_output(slow, 0, true, false);
	opd_ticket ticket = 0;
	opd_ticket fetching = 0;
	OK(opd_submit(client, slow, &ticket, &error));
	const opd_operand named = of_result(ticket);
	opd_request *request = opd_fetch_create(&named);
	OK(opd_submit(client, request, &fetching, &error));
	opd_result *result = NULL;
	ck_assert_int_eq(opd_wait(client, fetching, 20000, &result, &error), OPD_DEADLINE_EXCEEDED);
	lab_gate(true);
	OK(opd_wait(client, fetching, UINT64_MAX, &result, &error));
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[3], 2 * values[3]);
	opd_result_destroy(result);
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(request);
	opd_request_destroy(slow);
	fails(fetch(of_result(ticket + 1000), &result), OPD_NOT_FOUND, "was not kept");
	opd_result_destroy(result);
}
END_TEST

START_TEST(a_fetched_view_is_laid_out_row_major)
{
	const opd_handle handle = upload(6);
	opd_operand view = of_handle(handle);
	view.dtype = OPD_f32;
	view.rank = 2;
	view.shape = (const int64_t[]){3, 2};
	view.strides = (const int64_t[]){1, 3};
	opd_result *result = NULL;
	OK(fetch(view, &result));
	const float *y = opd_tensor_data(opd_result_tensor(result, 0));
	const float expected[] = {0, 3, 1, 4, 2, 5};
	ck_assert(memcmp(y, expected, sizeof expected) == 0);
	opd_result_destroy(result);
	view.strides = NULL;
	view.shape = (const int64_t[]){2, 2};
	view.byte_offset = 8;
	OK(fetch(view, &result));
	ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), values + 2, 16) == 0);
	opd_result_destroy(result);
	view.strides = (const int64_t[]){0, 1}; /* repeated */
	OK(fetch(view, &result));
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[2], 2);
	opd_result_destroy(result);
	view.shape = (const int64_t[]){0, 2};
	OK(fetch(view, &result));
	ck_assert_int_eq(opd_result_tensor(result, 0)->shape[0], 0);
	opd_result_destroy(result);
	view.shape = (const int64_t[]){4, 3};
	view.strides = NULL;
	fails(fetch(view, &result), OPD_INVALID_ARGUMENT, "the view");
	opd_result_destroy(result);
	view.dtype = OPD_f16;
	fails(fetch(view, &result), OPD_INVALID_ARGUMENT, "f16");
	opd_result_destroy(result);
	house_await_bytes(&house, 24);
}
END_TEST

/* ---- Parts ---- */

START_TEST(parts_come_in_any_order_and_again_and_nothing_reads_before_the_last)
{
	const opd_handle handle = upload_bare(1 << 18);
	opd_result *result = NULL;
	OK(write_part(handle, 512 << 10, 512 << 10));
	fails(scale(of_handle(handle), &result), OPD_FAILED_PRECONDITION, "524288 of its 1048576 bytes are uploaded");
	opd_result_destroy(result);
	OK(write_part(handle, 512 << 10, 512 << 10)); /* again */
	OK(write_part(handle, 0, 4));
	OK(write_part(handle, 100 << 10, 412 << 10));
	fails(fetch(of_handle(handle), &result), OPD_FAILED_PRECONDITION, "bytes are uploaded");
	opd_result_destroy(result);
	OK(write_part(handle, 0, 101 << 10));
	expect_values(handle, 1 << 18);
	fails(write_part(handle, 0, 4), OPD_FAILED_PRECONDITION, "is complete");
	expect_values(handle, 1 << 18);
}
END_TEST

START_TEST(a_write_outside_its_tensor_or_to_none_is_refused)
{
	const opd_handle handle = upload_bare(16);
	fails(write_part(handle, 61, 4), OPD_INVALID_ARGUMENT, "don't lie in the tensor's 64");
	fails(write_part(handle, UINT64_MAX - 1, 4), OPD_INVALID_ARGUMENT, "don't lie in the tensor's 64");
	fails(write_part(handle, 0, 0), OPD_INVALID_ARGUMENT, "at least one element");
	opd_handle forged = handle;
	forged.generation ^= 1;
	fails(write_part(forged, 0, 4), OPD_NOT_FOUND, "is no tensor of this session");
	OK(opd_free(client, &handle, 1, &error)); /* unfinished */
	fails(write_part(handle, 0, 4), OPD_NOT_FOUND, "is no tensor of this session");
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(more_gaps_than_are_counted_are_refused_until_some_are_filled)
{
	const opd_handle handle = upload_bare(4096);
	for (uint64_t i = 0; i < 1024; i++)
		OK(write_part(handle, 8 * i, 4));
	fails(write_part(handle, 8 * 1024, 4), OPD_RESOURCE_EXHAUSTED, "separate ranges, at most 1024");
	OK(write_part(handle, 0, 8 << 10));
	OK(write_part(handle, 8 << 10, 8 << 10));
	expect_values(handle, 4096);
}
END_TEST

struct watched {
	uint64_t calls;
	uint64_t last;
};

static void watch(void *data, uint64_t done, uint64_t total)
{
	struct watched *watched = data;
	ck_assert_uint_gt(done, watched->last);
	ck_assert_uint_eq(total, sizeof values);
	watched->last = done;
	watched->calls++;
}

START_TEST(a_watched_upload_goes_in_parts_and_tells_how_far_it_is)
{
	struct watched watched = {0};
	const opd_upload_options options = {.struct_bytes = sizeof options, .part_bytes = 60000, .on_progress = watch, .progress_data = &watched};
	const opd_operand operand = vector(1 << 18, OPD_FROM_HOST);
	opd_handle handle = {0};
	OK(opd_upload(client, &operand, &options, &handle, &error));
	ck_assert_uint_eq(watched.calls, (sizeof values + 59999) / 60000);
	ck_assert_uint_eq(watched.last, sizeof values);
	expect_values(handle, 1 << 18);
}
END_TEST

/* ---- The list ---- */

START_TEST(the_list_names_what_the_session_keeps)
{
	const opd_handle whole = upload(6);
	const opd_handle bare = upload_bare(1000);
	OK(write_part(bare, 0, 100));
	const opd_kept_list *list = NULL;
	OK(opd_kept_tensors(client, &list, &error));
	ck_assert_uint_eq(list->count, 2);
	for (uint32_t i = 0; i < 2; i++) {
		const opd_kept_tensor *tensor = &list->tensors[i];
		const bool is_bare = tensor->handle.index == bare.index;
		ck_assert_uint_eq(tensor->handle.generation, is_bare ? bare.generation : whole.generation);
		ck_assert_int_eq(tensor->dtype, OPD_f32);
		ck_assert_uint_eq(tensor->rank, 1);
		ck_assert_int_eq(tensor->shape[0], is_bare ? 1000 : 6);
		ck_assert_uint_eq(tensor->bytes, is_bare ? 4000 : 24);
		ck_assert_uint_eq(tensor->received_bytes, is_bare ? 100 : 24);
		ck_assert_uint_ne(tensor->ticket, 0);
	}
	opd_document_free(list);
	opd_client *other = house_client(&house);
	OK(opd_kept_tensors(other, &list, &error));
	ck_assert_uint_eq(list->count, 0);
	opd_document_free(list);
	opd_close(other);
}
END_TEST

START_TEST(a_list_of_several_pages_is_whole)
{
	enum { COUNT = 9000 };
	const opd_operand operand = vector(1, OPD_FROM_HOST);
	opd_request *request = opd_upload_create(&operand);
	for (int i = 0; i < COUNT; i++) {
		opd_ticket ticket = 0;
		opd_result *result = NULL;
		OK(opd_submit(client, request, &ticket, &error));
		if (i % 500 == 499)
			while (opd_in_flight(client) != 0) {
				OK(opd_wait_any(client, UINT64_MAX, &ticket, &result, &error));
				opd_result_destroy(result);
			}
	}
	const opd_kept_list *list = NULL;
	OK(opd_kept_tensors(client, &list, &error));
	ck_assert_uint_eq(list->count, COUNT);
	for (uint32_t i = 1; i < list->count; i++)
		ck_assert_uint_gt(list->tensors[i].handle.index, list->tensors[i - 1].handle.index);
	opd_document_free(list);
	opd_request_destroy(request);
}
END_TEST

/* ---- Limits ---- */

START_TEST(quotas_are_named_before_anything_is_taken)
{
	const opd_operand bare = vector(1 << 19, OPD_FROM_NOTHING); /* 2 MiB of 1 */
	opd_request *request = opd_upload_create(&bare);
	opd_result *result = NULL;
	fails(opd_run(client, request, &result, &error), OPD_RESOURCE_EXHAUSTED, "1048576");
	opd_result_destroy(result);
	opd_request_destroy(request);
	house_await_bytes(&house, 0);
	const opd_operand large = vector(200 << 10, OPD_FROM_HOST); /* 800 KiB, more than a request may have: in parts, the last of which fit */
	const opd_upload_options options = {.struct_bytes = sizeof options, .part_bytes = 16 << 10};
	opd_handle handle = {0};
	OK(opd_upload(client, &large, &options, &handle, &error));
	expect_values(handle, 200 << 10);
	opd_handle second = {0};
	fails(opd_upload(client, &large, &options, &second, &error), OPD_RESOURCE_EXHAUSTED, "1048576");
	house_await_bytes(&house, 800 << 10);
	for (int i = 0; i < 3; i++)
		(void)upload(1);
	const opd_operand one = vector(1, OPD_FROM_HOST);
	fails(opd_upload(client, &one, NULL, &second, &error), OPD_RESOURCE_EXHAUSTED, "kept tensors");
	OK(opd_free(client, &handle, 1, &error));
	(void)upload(1);
}
END_TEST

/* ---- Bad calls ---- */

START_TEST(what_is_no_upload_or_fetch_is_refused_with_its_name)
{
	opd_handle handle = {0};
	opd_result *result = NULL;
	opd_operand strided = vector(2, OPD_FROM_HOST);
	strided.strides = (const int64_t[]){2};
	fails(opd_upload(client, &strided, NULL, &handle, &error), OPD_INVALID_ARGUMENT, "row-major");
	opd_operand kept = of_handle(upload(1));
	fails(opd_upload(client, &kept, NULL, &handle, &error), OPD_INVALID_ARGUMENT, "expected host data");
	opd_operand none = vector(2, OPD_FROM_HOST);
	none.data = NULL;
	fails(opd_upload(client, &none, NULL, &handle, &error), OPD_INVALID_ARGUMENT, "no data");
	fails(fetch(vector(2, OPD_FROM_HOST), &result), OPD_INVALID_ARGUMENT, "expected a handle or a result");
	opd_request *request = opd_fetch_create(&kept);
	opd_request_int(request, "more", 3);
	fails(opd_run(client, request, &result, &error), OPD_INVALID_ARGUMENT, "argument more, which only runs have");
	opd_request_destroy(request);
	expect_values(kept.handle, 1);
}
END_TEST

/* ---- Ends ---- */

static void leave_uploading_whole(opd_client *leaving)
{
	const opd_operand operand = vector(1 << 18, OPD_FROM_HOST);
	opd_request *request = opd_upload_create(&operand);
	opd_ticket ticket = 0;
	OK(opd_submit(leaving, request, &ticket, &error));
	opd_close(leaving);
	opd_request_destroy(request);
}

static void leave_after_some_parts(opd_client *leaving)
{
	opd_client *mine = client;
	client = leaving;
	const opd_handle handle = upload_bare(1 << 18);
	OK(write_part(handle, 4096, 300000));
	opd_request *request = opd_write_create(handle, 0, values, 512 << 10);
	opd_ticket ticket = 0;
	OK(opd_submit(leaving, request, &ticket, &error));
	opd_close(leaving);
	opd_request_destroy(request);
	client = mine;
}

static void leave_with_kept_tensors(opd_client *leaving)
{
	opd_client *mine = client;
	client = leaving;
	(void)upload(1 << 18);
	(void)upload(0);
	opd_close(leaving);
	client = mine;
}

static void leave_while_fetching(opd_client *leaving)
{
	opd_client *mine = client;
	client = leaving;
	const opd_operand named = of_handle(upload(1 << 18));
	opd_request *request = opd_fetch_create(&named);
	opd_ticket ticket = 0;
	for (int i = 0; i < 8; i++)
		OK(opd_submit(leaving, request, &ticket, &error));
	opd_close(leaving);
	opd_request_destroy(request);
	client = mine;
}

static void leave_while_a_fetch_waits(opd_client *leaving)
{
	lab_reset();
	const opd_operand host = vector(8, OPD_FROM_HOST);
	opd_request *slow = opd_request_create("lab_wait");
	opd_request_tensor(slow, NULL, &host);
	opd_request_output(slow, 0, true, false);
	opd_ticket ticket = 0;
	OK(opd_submit(leaving, slow, &ticket, &error));
	const opd_operand named = of_result(ticket);
	opd_request *request = opd_fetch_create(&named);
	OK(opd_submit(leaving, request, &ticket, &error));
	house_await_count(&lab_counts.waiting, 1);
	opd_close(leaving);
	lab_gate(true);
	opd_request_destroy(request);
	opd_request_destroy(slow);
}

/* Hardening: promise-ledger */
START_TEST(after_every_kind_of_end_the_ledger_is_at_zero)
{
	static void (*const ends[])(opd_client *) = {leave_uploading_whole, leave_after_some_parts, leave_with_kept_tensors, leave_while_fetching,
	                                             leave_while_a_fetch_waits};
	for (int round = 0; round < 5; round++) {
		ends[_i](house_client(&house));
		house_await_bytes(&house, 0);
	}
	OK(opd_ping(client, &error));
}
END_TEST

START_TEST(direct_calls_upload_write_and_fetch_as_frames_do)
{
	opd_close(client);
	client = house_direct_client(&house);
	OK(opd_direct_begin(client, &error));
	const opd_handle handle = upload(1000);
	expect_values(handle, 1000);
	const opd_handle bare = upload_bare(1000);
	OK(write_part(bare, 0, 2000));
	opd_result *result = NULL;
	fails(fetch(of_handle(bare), &result), OPD_FAILED_PRECONDITION, "bytes are uploaded");
	opd_result_destroy(result);
	OK(write_part(bare, 2000, 2000));
	expect_values(bare, 1000);
	opd_direct_end(client);
	expect_values(bare, 1000);
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
	Suite *suite = suite_create("tensors");
	TCase *tests = add_case(suite, "resident", open_house);
	tcase_add_test(tests, an_upload_is_read_by_ops_and_fetched_bit_for_bit);
	tcase_add_test(tests, an_upload_may_be_named_before_it_is_answered);
	tcase_add_test(tests, a_fetch_waits_for_a_result_still_to_come_and_fails_with_it);
	tcase_add_test(tests, a_fetched_view_is_laid_out_row_major);
	tcase_add_test(tests, parts_come_in_any_order_and_again_and_nothing_reads_before_the_last);
	tcase_add_test(tests, a_write_outside_its_tensor_or_to_none_is_refused);
	tcase_add_test(tests, more_gaps_than_are_counted_are_refused_until_some_are_filled);
	tcase_add_test(tests, a_watched_upload_goes_in_parts_and_tells_how_far_it_is);
	tcase_add_test(tests, the_list_names_what_the_session_keeps);
	tcase_add_test(tests, a_list_of_several_pages_is_whole);
	tcase_add_test(tests, what_is_no_upload_or_fetch_is_refused_with_its_name);
	tcase_add_test(tests, direct_calls_upload_write_and_fetch_as_frames_do);
	tcase_add_loop_test(tests, after_every_kind_of_end_the_ledger_is_at_zero, 0, 5);
	tests = add_case(suite, "limits", open_narrow);
	tcase_add_test(tests, quotas_are_named_before_anything_is_taken);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
