/* Published tensors: held once, found by name and contents, by those they are for; withdrawn and orphaned while in use; and the ledger after it all. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

#define ELEMENTS (1 << 16)
#define BYTES (ELEMENTS * sizeof(float))

static struct house house;
static opd_client *client;
static opd_error error;
static float weights[ELEMENTS];

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static void open_house(void)
{
	house_start(&house, NULL);
	client = house_client(&house);
	for (int i = 0; i < ELEMENTS; i++)
		weights[i] = (float)(i % 251);
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

static opd_handle upload(opd_client *to)
{
	const opd_operand operand = OPD_OPERAND(OPD_f32, weights, ELEMENTS);
	opd_handle handle = {0};
	OK(opd_upload(to, &operand, NULL, &handle, &error));
	return handle;
}

static opd_status publish(opd_client *by, opd_handle handle, const char *name, bool all, bool lasting)
{
	const opd_publish_options options = {.struct_bytes = sizeof options, .all = all, .lasting = lasting};
	const opd_publication *publication = NULL;
	const opd_status status = opd_publish(by, handle, name, &options, &publication, &error);
	if (status == OPD_OK) {
		ck_assert_str_eq(publication->name, name);
		ck_assert_uint_eq(publication->bytes, BYTES);
		ck_assert_uint_eq(publication->handle.generation, handle.generation);
		opd_document_free(publication);
	}
	return status;
}

static opd_status open_named(opd_client *by, const char *name, opd_handle *handle_out)
{
	const opd_publication *publication = NULL;
	const opd_status status = opd_open(by, name, &publication, &error);
	if (status == OPD_OK) {
		*handle_out = publication->handle;
		ck_assert_uint_ne(handle_out->generation, 0);
		opd_document_free(publication);
	}
	return status;
}

static void expect_weights(opd_client *by, opd_handle handle)
{
	const opd_operand operand = {.struct_bytes = sizeof operand, .source = OPD_FROM_HANDLE, .handle = handle};
	opd_result *result = NULL;
	OK(opd_fetch(by, &operand, &result, &error));
	ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), weights, BYTES) == 0);
	opd_result_destroy(result);
}

static uint32_t count_published(opd_client *by)
{
	const opd_publication_list *list = NULL;
	OK(opd_publications(by, &list, &error));
	const uint32_t count = list->count;
	opd_document_free(list);
	return count;
}

START_TEST(ten_clients_that_publish_or_open_the_same_weights_hold_them_once)
{
	opd_client *clients[10];
	OK(publish(client, upload(client), "w", false, false));
	for (int i = 0; i < 10; i++) {
		clients[i] = house_client(&house);
		opd_handle handle = {0};
		if (i % 2 == 0) {
			OK(open_named(clients[i], "w", &handle));
		} else {
			char name[16];
			(void)snprintf(name, sizeof name, "w%d", i);
			handle = upload(clients[i]);
			OK(publish(clients[i], handle, i == 1 ? "w" : name, false, false));
		}
		house_await_bytes(&house, BYTES);
		expect_weights(clients[i], handle);
	}
	house_await_bytes(&house, BYTES);
	for (int i = 0; i < 10; i++)
		opd_close(clients[i]);
	house_await_bytes(&house, BYTES);
}
END_TEST

/* Hardening: promise-no-peeking */
START_TEST(what_was_published_is_found_by_the_hash_of_its_bytes)
{
	OK(publish(client, upload(client), "model/layer0.w", false, false));
	const opd_publication_list *list = NULL;
	OK(opd_publications(client, &list, &error));
	ck_assert_uint_eq(list->count, 1);
	uint8_t sha256[32];
	memcpy(sha256, list->publications[0].sha256, 32);
	ck_assert_uint_eq(list->publications[0].holders, 1);
	opd_document_free(list);
	opd_client *other = house_client(&house);
	const opd_publication *publication = NULL;
	OK(opd_open_contents(other, sha256, &publication, &error));
	expect_weights(other, publication->handle);
	opd_document_free(publication);
	sha256[0] ^= 1;
	ck_assert_int_eq(opd_open_contents(other, sha256, &publication, &error), OPD_NOT_FOUND);
	says("contents");
	opd_close(other);
}
END_TEST

START_TEST(a_name_with_other_contents_is_taken_and_a_bad_one_is_named)
{
	const opd_handle handle = upload(client);
	OK(publish(client, handle, "w", false, false));
	OK(publish(client, handle, "w", false, false)); /* the same again */
	ck_assert_uint_eq(count_published(client), 1);
	weights[5] = -1;
	const opd_handle other = upload(client);
	ck_assert_int_eq(publish(client, other, "w", false, false), OPD_ALREADY_EXISTS);
	says("w is published already, with other contents");
	ck_assert_int_eq(publish(client, other, "a b\n", false, false), OPD_INVALID_ARGUMENT);
	says("a b\\n");
	opd_handle none;
	ck_assert_int_eq(open_named(client, "nobody", &none), OPD_NOT_FOUND);
	says("nobody");
	ck_assert_int_eq(opd_withdraw(client, "nobody", &error), OPD_NOT_FOUND);
	opd_handle forged = other;
	forged.generation ^= 1;
	ck_assert_int_eq(publish(client, forged, "x", false, false), OPD_NOT_FOUND);
	const opd_operand bare = {.struct_bytes = sizeof bare, .dtype = OPD_f32, .rank = 1, .shape = (const int64_t[]){8}, .source = OPD_FROM_NOTHING};
	opd_request *request = opd_upload_create(&bare);
	opd_result *result = NULL;
	OK(opd_run(client, request, &result, &error));
	ck_assert_int_eq(publish(client, opd_result_handle(result, 0), "x", false, false), OPD_FAILED_PRECONDITION);
	opd_result_destroy(result);
	opd_request_destroy(request);
}
END_TEST

START_TEST(a_published_tensor_is_read_only)
{
	const opd_handle handle = upload(client);
	OK(publish(client, handle, "w", false, false));
	const opd_operand donated = {.struct_bytes = sizeof donated, .source = OPD_FROM_HANDLE, .handle = handle, .donate = true};
	const opd_operand by = OPD_OPERAND(OPD_f32, weights, ELEMENTS);
	opd_request *request = opd_request_create("lab_add");
	opd_request_tensor(request, NULL, &donated);
	opd_request_tensor(request, NULL, &by);
	opd_result *result = NULL;
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_FAILED_PRECONDITION);
	says("published");
	opd_result_destroy(result);
	opd_request_destroy(request);
	expect_weights(client, handle);
}
END_TEST

/* Hardening: handles-withdrawn */
START_TEST(withdrawn_or_orphaned_while_a_kernel_reads_it_stays_for_those_who_have_it)
{
	lab_reset();
	opd_client *publisher = house_client(&house);
	OK(publish(publisher, upload(publisher), "w", false, false));
	opd_handle handle = {0};
	OK(open_named(client, "w", &handle));
	const opd_operand operand = {.struct_bytes = sizeof operand, .source = OPD_FROM_HANDLE, .handle = handle};
	opd_request *request = opd_request_create("lab_wait");
	opd_request_tensor(request, NULL, &operand);
	opd_ticket ticket = 0;
	OK(opd_submit(client, request, &ticket, &error));
	house_await_count(&lab_counts.waiting, 1);
	if (_i == 0)
		OK(opd_withdraw(publisher, "w", &error));
	opd_close(publisher);
	while (count_published(client) != 0)
		;
	opd_handle again;
	ck_assert_int_eq(open_named(client, "w", &again), OPD_NOT_FOUND);
	lab_gate(true);
	opd_result *result = NULL;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[7], 14);
	opd_result_destroy(result);
	opd_request_destroy(request);
	expect_weights(client, handle);
	OK(opd_free(client, &handle, 1, &error));
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(a_lasting_one_outlives_its_session_until_withdrawn)
{
	opd_client *publisher = house_client(&house);
	OK(publish(publisher, upload(publisher), "w", false, true));
	opd_close(publisher);
	house_await_bytes(&house, BYTES);
	const opd_server_info *info = NULL;
	OK(opd_info(client, &info, &error));
	ck_assert_uint_eq(info->session_memory_bytes, 0); /* it isn't this session's to pay */
	opd_document_free(info);
	opd_handle handle = {0};
	OK(open_named(client, "w", &handle));
	expect_weights(client, handle);
	OK(opd_withdraw(client, "w", &error));
	house_await_bytes(&house, BYTES);
	OK(opd_free(client, &handle, 1, &error));
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(two_names_of_the_same_bytes_hold_them_once)
{
	OK(publish(client, upload(client), "w", false, true));
	OK(publish(client, upload(client), "v", true, false));
	house_await_bytes(&house, BYTES);
	OK(opd_withdraw(client, "w", &error));
	OK(opd_withdraw(client, "v", &error));
	ck_assert_uint_eq(count_published(client), 0);
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
	Suite *suite = suite_create("publications");
	TCase *tests = add_case(suite, "publications", open_house);
	tcase_add_test(tests, ten_clients_that_publish_or_open_the_same_weights_hold_them_once);
	tcase_add_test(tests, what_was_published_is_found_by_the_hash_of_its_bytes);
	tcase_add_test(tests, a_name_with_other_contents_is_taken_and_a_bad_one_is_named);
	tcase_add_test(tests, a_published_tensor_is_read_only);
	tcase_add_loop_test(tests, withdrawn_or_orphaned_while_a_kernel_reads_it_stays_for_those_who_have_it, 0, 2);
	tcase_add_test(tests, a_lasting_one_outlives_its_session_until_withdrawn);
	tcase_add_test(tests, two_names_of_the_same_bytes_hold_them_once);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
