/* The daemon in this process: over its socket pair, and called directly. */
#include <check.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "opd/client.h"
#include "opd/embedded.h"

#define MUST(call)                                                                                                               \
	do {                                                                                                                         \
		const opd_status must_status = (call);                                                                                   \
		ck_assert_msg(must_status == OPD_OK, "%s: %s: %s", #call, opd_status_name(must_status), error.text);                     \
	} while (0)

static opd_client *connect_embedded(void)
{
	opd_client *client;
	opd_error error = {0};
	opd_embedded_register();
	opd_embedded_register(); /* once or more */
	MUST(opd_connect("embedded:", NULL, &client, &error));
	return client;
}

static opd_request *vector_request(const char *op, const float *data, int64_t elements)
{
	opd_request *request = opd_request_create(op);
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, elements));
	opd_request_priority(request, (const char *[]){"native"}, 1);
	return request;
}

START_TEST(an_embedded_client_is_an_administrator_of_its_own_daemon)
{
	opd_error error;
	opd_client *first = connect_embedded(), *second = connect_embedded();
	const opd_server_info *info;
	ck_assert(opd_client_session(first)->admin);
	MUST(opd_priority_set(first, OPD_SCOPE_SERVER, &(opd_priority_entry){"relu", (const char *[]){"native"}, 1}, &error));
	const opd_priority *priority;
	MUST(opd_priority_get(second, "relu", &priority, &error)); /* another client has another daemon */
	ck_assert_str_ne(priority->level, "server");
	opd_document_free(priority);
	MUST(opd_info(first, &info, &error));
	ck_assert_uint_eq(info->pid, (uint64_t)getpid());
	ck_assert_uint_eq(info->listener_count, 0);
	opd_document_free(info);
	opd_close(first);
	MUST(opd_ping(second, &error));
	opd_close(second);
}
END_TEST

START_TEST(a_direct_call_gives_the_same_bits_provider_and_errors)
{
	opd_error error, direct_error;
	opd_client *client = connect_embedded();
	float data[1000];
	for (int i = 0; i < 1000; i++)
		data[i] = sinf((float)i);
	opd_request *request = vector_request("softmax", data, 1000);
	opd_request *bad = opd_request_create("no_such_op");
	opd_result *framed, *direct, *none;
	MUST(opd_run(client, request, &framed, &error));
	const opd_status status = opd_run(client, bad, &none, &error);
	opd_result_destroy(none);
	MUST(opd_direct_begin(client, &direct_error));
	MUST(opd_direct_begin(client, &direct_error));
	MUST(opd_run(client, request, &direct, &direct_error));
	opd_direct_end(client);
	ck_assert_int_eq(opd_run(client, bad, &none, &direct_error), status);
	ck_assert_str_eq(error.text, direct_error.text);
	opd_result_destroy(none);
	opd_direct_end(client);
	MUST(opd_ping(client, &error));
	opd_close(client);
	ck_assert_str_eq(opd_result_provider(framed), opd_result_provider(direct)); /* results outlive client and daemon */
	ck_assert_int_eq(memcmp(opd_result_tensor(framed, 0)->data, opd_result_tensor(direct, 0)->data, sizeof data), 0);
	ck_assert_uint_eq((uintptr_t)opd_result_tensor(direct, 0)->data % 64, 0);
	opd_result_destroy(framed);
	opd_result_destroy(direct);
	opd_request_destroy(request);
	opd_request_destroy(bad);
}
END_TEST

START_TEST(kept_tensors_and_references_work_on_both_ways)
{
	opd_error error;
	opd_client *client = connect_embedded();
	const float data[4] = {-1, 2, -3, 4};
	for (int direct = 0; direct < 2; direct++) {
		if (direct == 1)
			MUST(opd_direct_begin(client, &error));
		opd_request *first = vector_request("relu", data, 4), *second = opd_request_create("add");
		opd_request_output(first, 0, true, false);
		opd_ticket ticket, last;
		MUST(opd_submit(client, first, &ticket, &error));
		opd_operand kept = {.struct_bytes = sizeof kept, .source = OPD_FROM_RESULT, .ticket = ticket};
		opd_request_tensor(second, "a", &kept);
		opd_request_tensor(second, "b", &(opd_operand)OPD_OPERAND(OPD_f32, data, 4));
		opd_request_priority(second, (const char *[]){"native"}, 1);
		MUST(opd_submit(client, second, &last, &error));
		opd_result *result;
		MUST(opd_wait(client, ticket, UINT64_MAX, &result, &error));
		const opd_handle handle = opd_result_handle(result, 0);
		ck_assert_uint_ne(handle.generation, 0);
		ck_assert_ptr_null(opd_result_tensor(result, 0)->data);
		opd_result_destroy(result);
		MUST(opd_wait(client, last, UINT64_MAX, &result, &error));
		ck_assert_float_eq(((float *)opd_tensor_data(opd_result_tensor(result, 0)))[3], 8.0f);
		opd_result_destroy(result);
		MUST(opd_free(client, &handle, 1, &error));
		ck_assert_int_eq(opd_free(client, &handle, 1, &error), OPD_NOT_FOUND);
		opd_request_destroy(first);
		opd_request_destroy(second);
		if (direct == 1)
			opd_direct_end(client);
	}
	opd_close(client);
}
END_TEST

START_TEST(large_tensors_go_both_ways)
{
	opd_error error;
	opd_client *client = connect_embedded();
	const size_t count = (size_t)3 << 20;
	float *data = malloc(count * sizeof *data);
	for (size_t i = 0; i < count; i++)
		data[i] = (float)(i % 1000);
	opd_request *large = vector_request("relu", data, (int64_t)count), *small = vector_request("relu", data, 8);
	for (int i = 0; i < 3; i++) {
		opd_ticket ticket;
		opd_result *result;
		MUST(opd_submit(client, large, &ticket, &error));
		MUST(opd_submit(client, large, &ticket, &error));
		MUST(opd_submit(client, small, &ticket, &error));
		for (int k = 0; k < 3; k++) {
			MUST(opd_wait_any(client, 60000000, &ticket, &result, &error));
			const opd_tensor *tensor = opd_result_tensor(result, 0);
			ck_assert_int_eq(memcmp(tensor->data, data, tensor->elements * 4), 0);
			opd_result_destroy(result);
		}
	}
	opd_request_destroy(large);
	opd_request_destroy(small);
	opd_close(client);
	free(data);
}
END_TEST

START_TEST(generated_requests_run_on_both_ways)
{
	opd_error error;
	opd_client *client = connect_embedded();
	for (int i = 0; i < 4; i++) {
		const opd_generate_options options = {.struct_bytes = sizeof options, .dtype = OPD_f32, .seed = 3, .keep = i % 2 == 1};
		opd_request *request;
		opd_result *result;
		if (i == 2)
			MUST(opd_direct_begin(client, &error));
		MUST(opd_generate(client, "rms_norm", &options, &request, &error));
		opd_request_priority(request, (const char *[]){"native"}, 1);
		MUST(opd_run(client, request, &result, &error));
		ck_assert_str_eq(opd_result_provider(result), "native");
		opd_result_destroy(result);
		opd_request_destroy(request);
	}
	opd_direct_end(client);
	opd_close(client);
}
END_TEST

START_TEST(a_bad_configuration_is_no_client)
{
	opd_error error;
	opd_client *client = NULL;
	opd_embedded_register();
	ck_assert_int_ne(opd_connect("embedded:/nonexistent/opd.yaml", NULL, &client, &error), OPD_OK);
	ck_assert_msg(strstr(error.text, "/nonexistent/opd.yaml") != NULL, "%s", error.text);
	ck_assert_ptr_null(client);
}
END_TEST

START_TEST(a_configuration_file_is_read_without_its_listeners)
{
	opd_error error;
	opd_client *client;
	char path[] = "/tmp/opd-embedded-XXXXXX", address[64];
	const int fd = mkstemp(path);
	const char *yaml =
	    "listen: [\"unix:/nonexistent/folder/opd.sock\"]\nlimits: {session: 8 MiB, request: 1 MiB}\nlog: {level: error}\n";
	ck_assert_int_eq(write(fd, yaml, strlen(yaml)), (ssize_t)strlen(yaml));
	(void)close(fd);
	(void)snprintf(address, sizeof address, "embedded:%s", path);
	opd_embedded_register();
	MUST(opd_connect(address, NULL, &client, &error));
	ck_assert_uint_eq(opd_client_session(client)->payload_bytes, 1 << 20);
	opd_close(client);
	(void)unlink(path);
}
END_TEST

START_TEST(a_drained_daemon_is_unavailable)
{
	opd_error error;
	opd_client *client = connect_embedded();
	MUST(opd_drain(client, 1000000, &error));
	opd_status status = OPD_OK;
	for (int i = 0; i < 100 && status == OPD_OK; i++)
		status = opd_ping(client, &error);
	ck_assert_int_eq(status, OPD_UNAVAILABLE);
	ck_assert_int_eq(opd_direct_begin(client, &error), OPD_UNAVAILABLE);
	opd_close(client);
}
END_TEST

/* Signals sent to the process must find the program's own thread. */
static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
	interrupted += number == SIGUSR2;
}

/* What a direct call gives to a lane comes back through the loop, which must not be gone by then. */
START_TEST(a_drain_in_a_direct_scope_waits_for_the_scope_to_end)
{
	enum { MANY = 1 << 20 };
	opd_error error = {0};
	opd_client *client = connect_embedded();
	float *data = calloc(MANY, sizeof data[0]);
	opd_request *request = vector_request("softmax", data, MANY);
	opd_result *result;
	MUST(opd_direct_begin(client, &error));
	MUST(opd_drain(client, 1000000, &error));
	(void)usleep(200000);
	opd_status status = opd_run(client, request, &result, &error);
	ck_assert_msg(status == OPD_OK || status == OPD_UNAVAILABLE || status == OPD_CANCELLED, "%s: %s", opd_status_name(status), error.text);
	opd_result_destroy(result);
	opd_direct_end(client);
	ck_assert_int_ne(opd_direct_begin(client, &error), OPD_OK);
	opd_request_destroy(request);
	opd_close(client);
	free(data);
}
END_TEST

START_TEST(its_threads_take_no_signals_and_interrupted_calls_go_on)
{
	opd_error error;
	opd_client *client = connect_embedded();
	struct sigaction action = {.sa_handler = on_signal};
	(void)sigaction(SIGUSR2, &action, NULL);
	for (int i = 0; i < 50; i++) {
		(void)kill(getpid(), SIGUSR2); /* delivered here before kill returns, since no other thread takes it */
		ck_assert_int_eq(interrupted, i + 1);
		MUST(opd_ping(client, &error));
	}
	opd_close(client);
}
END_TEST

START_TEST(clients_come_and_go)
{
	opd_error error;
	for (int i = 0; i < 20; i++) {
		opd_client *client = connect_embedded();
		const float data[4] = {-1, 2, -3, 4};
		opd_request *request = vector_request("relu", data, 4);
		opd_ticket ticket;
		for (int k = 0; k < i; k++)
			MUST(opd_submit(client, request, &ticket, &error));
		if (i % 3 == 1)
			MUST(opd_ping(client, &error));
		opd_request_destroy(request);
		opd_close(client); /* with requests in flight */
	}
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("embedded");
	TCase *tests = tcase_create("embedded");
	tcase_set_timeout(tests, 120);
	tcase_add_test(tests, an_embedded_client_is_an_administrator_of_its_own_daemon);
	tcase_add_test(tests, a_direct_call_gives_the_same_bits_provider_and_errors);
	tcase_add_test(tests, kept_tensors_and_references_work_on_both_ways);
	tcase_add_test(tests, large_tensors_go_both_ways);
	tcase_add_test(tests, generated_requests_run_on_both_ways);
	tcase_add_test(tests, a_bad_configuration_is_no_client);
	tcase_add_test(tests, a_configuration_file_is_read_without_its_listeners);
	tcase_add_test(tests, a_drained_daemon_is_unavailable);
	tcase_add_test(tests, a_drain_in_a_direct_scope_waits_for_the_scope_to_end);
	tcase_add_test(tests, its_threads_take_no_signals_and_interrupted_calls_go_on);
	tcase_add_test(tests, clients_come_and_go);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
