/* Graphs whose independent nodes run at once: same results, same errors, states and memory as one after the other. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

static struct house house;
static opd_client *client;
static opd_error error;

static void open_house_with(const char *threads, const char *checked)
{
	house_start(&house, (const char *const[]){"threads", threads, "checked", checked, NULL});
	client = house_client(&house);
}

static void open_house(void)
{
	open_house_with("2", "false");
}

static void close_house(void)
{
	opd_close(client);
	house_stop(&house);
}

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static opd_value work(opd_graph *graph, const char *name, opd_value x, double factor, int64_t ns, bool company)
{
	opd_request *node = opd_request_create("lab_work");
	opd_request_value(node, NULL, x);
	opd_request_float(node, "factor", factor);
	opd_request_int(node, "ns", ns);
	opd_request_bool(node, "company", company);
	opd_value value = opd_graph_node(graph, name, node);
	opd_request_destroy(node);
	return value;
}

static opd_value add(opd_graph *graph, opd_value x, opd_value by, bool donate)
{
	opd_request *node = opd_request_create("lab_add");
	opd_request_tensor(node, NULL, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .donate = donate, .value = x});
	opd_request_value(node, NULL, by);
	opd_value value = opd_graph_node(graph, NULL, node);
	opd_request_destroy(node);
	return value;
}

static uint64_t registered(opd_graph *graph)
{
	uint64_t id = 0;
	OK(opd_graph_register(client, graph, &id, &error));
	opd_graph_destroy(graph);
	return id;
}

static opd_request *run_of(uint64_t id, const float *x, int64_t elements)
{
	opd_request *request = opd_request_graph(id);
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, elements));
	return request;
}

static uint32_t width_of(uint64_t id, const float *x, int64_t elements)
{
	opd_result *result = NULL;
	opd_request *request = run_of(id, x, elements);
	opd_request_explain(request, true);
	OK(opd_run(client, request, &result, &error));
	const uint32_t width = opd_result_graph(result)->width;
	opd_result_destroy(result);
	opd_request_destroy(request);
	return width;
}

static opd_graph *branches(unsigned count, int64_t ns, bool company)
{
	opd_graph *graph = opd_graph_create("branches");
	opd_value x = opd_graph_input(graph, "x");
	opd_value sum = {0};
	for (unsigned i = 0; i < count; i++) {
		const opd_value branch = work(graph, NULL, x, i + 1, ns, company);
		sum = i == 0 ? branch : add(graph, sum, branch, false);
	}
	opd_graph_output(graph, "sum", sum);
	return graph;
}

START_TEST(independent_nodes_run_at_once)
{
	static const float x[16] = {1, 2, 3};
	const uint64_t id = registered(branches(4, 15000, true));
	lab_reset();
	opd_result *result = NULL;
	opd_request *request = run_of(id, x, 16);
	OK(opd_run(client, request, &result, &error));
	ck_assert_uint_ge(atomic_load(&lab_counts.working_most), 2);
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[1], 20);
	opd_result_destroy(result);
	opd_request_destroy(request);
	ck_assert_uint_ge(width_of(id, x, 16), 2);
}
END_TEST

START_TEST(small_nodes_and_large_ones_do_not)
{
	static const float x[16] = {1};
	ck_assert_uint_eq(width_of(registered(branches(50, 20, false)), x, 16), 1);
	ck_assert_uint_eq(width_of(registered(branches(3, 300000, false)), x, 16), 1);
}
END_TEST

/* Who has run it twice, so that it is prepared. */
static bool runs_here(uint64_t id, const float *x)
{
	bool here = false;
	for (int i = 0; i < 2; i++) {
		opd_result *result = NULL;
		opd_request *request = run_of(id, x, 16);
		opd_request_explain(request, true);
		OK(opd_run(client, request, &result, &error));
		here = opd_result_explain(result)->on_loop;
		opd_result_destroy(result);
		opd_request_destroy(request);
	}
	return here;
}

static opd_graph *chain(unsigned count, int64_t ns)
{
	opd_graph *graph = opd_graph_create("chain");
	opd_value x = opd_graph_input(graph, "x");
	for (unsigned i = 0; i < count; i++)
		x = work(graph, NULL, x, 1, ns, false);
	opd_graph_output(graph, "y", x);
	return graph;
}

static opd_graph *apart(unsigned count, int64_t ns)
{
	opd_graph *graph = opd_graph_create("apart");
	const opd_value x = opd_graph_input(graph, "x");
	for (unsigned i = 0; i < count; i++)
		opd_graph_output(graph, (const char *const[]){"a", "b", "c", "d"}[i], work(graph, NULL, x, i + 1, ns, false));
	return graph;
}

START_TEST(a_direct_caller_runs_what_several_threads_would_not_do_sooner)
{
	static const float x[16] = {1};
	opd_client *const socket = client;
	ck_assert(!runs_here(registered(chain(5, 30000)), x)); /* the loop is everybody's */
	client = house_direct_client(&house);
	const uint64_t small = registered(chain(5, 30000)), large = registered(chain(1, 90000)), wide = registered(apart(4, 15000));
	OK(opd_direct_begin(client, &error));
	ck_assert(runs_here(small, x));
	ck_assert(!runs_here(large, x));
	ck_assert(!runs_here(wide, x));
	opd_direct_end(client);
	opd_close(client);
	client = socket;
}
END_TEST

/* The last of a long branch fails late, one of another branch at once: what one thread would have met first is named, every time. */
START_TEST(of_several_failures_the_first_in_order_is_named)
{
	static const float x[16] = {1};
	opd_graph *graph = opd_graph_create("fails");
	opd_value input = opd_graph_input(graph, "x");
	opd_value slow = input;
	for (int i = 0; i < 10; i++)
		slow = work(graph, NULL, slow, 1, 15000, false);
	slow = work(graph, "late", slow, -1, 15000, false);
	opd_value quick = work(graph, "soon", input, -1, 15000, false);
	for (int i = 0; i < 10; i++)
		quick = work(graph, NULL, quick, 1, 15000, false);
	opd_graph_output(graph, "slow", slow);
	opd_graph_output(graph, "quick", quick);
	const uint64_t id = registered(graph);
	for (int i = 0; i < 20; i++) {
		opd_request *request = run_of(id, x, 16);
		opd_request_explain(request, true);
		opd_result *result = NULL;
		ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_INTERNAL);
		ck_assert_msg(strstr(error.text, "node 'late'") != NULL, "%s", error.text);
		ck_assert_uint_eq(opd_result_graph(result)->width, 2);
		opd_result_destroy(result);
		opd_request_destroy(request);
	}
}
END_TEST

/* ---- Random graphs ---- */

#define NODES 120
#define ELEMENTS 37

static uint64_t state;

static uint32_t below(uint32_t bound)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 33) % bound;
}

/* Builds it, and computes what it must give. */
static uint64_t random_graph(const float *x, float expected[ELEMENTS])
{
	static float made[NODES + 1][ELEMENTS];
	static const double factors[] = {0.5, 1, 2, 0.25};
	opd_value values[NODES + 1];
	opd_graph *graph = opd_graph_create("random");
	values[0] = opd_graph_input(graph, "x");
	memcpy(made[0], x, sizeof made[0]);
	const uint32_t near = 2 + below(NODES);
	for (uint32_t i = 1; i <= NODES; i++) {
		const uint32_t a = i - 1 - below(i < near ? i : near), b = i - 1 - below(i < near ? i : near);
		const double factor = factors[below(4)];
		if (below(2) == 0) {
			values[i] = work(graph, NULL, values[a], factor, 3000 + below(12000), false);
			for (int k = 0; k < ELEMENTS; k++)
				made[i][k] = (float)(made[a][k] * factor);
		} else {
			values[i] = add(graph, values[a], values[b], false);
			for (int k = 0; k < ELEMENTS; k++)
				made[i][k] = made[a][k] + made[b][k];
		}
	}
	opd_graph_output(graph, "last", values[NODES]);
	opd_value sum = values[NODES / 2];
	opd_graph_output(graph, "middle", sum);
	memcpy(expected, made[NODES], sizeof made[NODES]);
	return registered(graph);
}

static void run_random_graphs(void)
{
	float x[ELEMENTS], expected[ELEMENTS];
	uint32_t wide = 0;
	for (int k = 0; k < ELEMENTS; k++)
		x[k] = (float)(k % 7 + 1);
	for (uint32_t seed = 1; seed <= 12; seed++) {
		state = seed;
		const uint64_t id = random_graph(x, expected);
		for (int again = 0; again < 3; again++) {
			opd_result *result = NULL;
			opd_request *request = run_of(id, x, ELEMENTS);
			OK(opd_run(client, request, &result, &error));
			ck_assert_mem_eq(opd_tensor_data(opd_result_tensor(result, 0)), expected, sizeof expected);
			opd_result_destroy(result);
			opd_request_destroy(request);
		}
		wide += width_of(id, x, ELEMENTS) > 1;
		OK(opd_graph_free(client, id, &error));
	}
	ck_assert_uint_gt(wide, 6);
}

START_TEST(random_graphs_give_the_bits_that_one_thread_gives)
{
	run_random_graphs();
}
END_TEST

START_TEST(they_do_so_with_many_threads_and_canaries_behind_every_result)
{
	close_house();
	open_house_with("7", "true");
	run_random_graphs();
}
END_TEST

/* ---- States ---- */

static opd_handle zeros(void)
{
	static const float x[16];
	opd_request *request = opd_request_create("lab_scale");
	opd_result *result = NULL;
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, 16));
	opd_request_output(request, 0, true, true);
	OK(opd_run(client, request, &result, &error));
	const opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return handle;
}

/* Each branch adds to its state what it has made; what they were before is read by others first. */
START_TEST(states_are_read_before_they_are_written_whoever_writes)
{
	static const float x[16] = {1};
	opd_graph *graph = opd_graph_create("states");
	opd_value input = opd_graph_input(graph, "x");
	opd_value olds[4], total = {0};
	opd_handle handles[4];
	for (unsigned i = 0; i < 4; i++) {
		char name[8];
		(void)snprintf(name, sizeof name, "s%u", i);
		handles[i] = zeros();
		const opd_value kept = opd_graph_state(graph, name, handles[i]);
		const opd_value part = work(graph, NULL, input, i + 1, 12000, false);
		const opd_value sum = add(graph, kept, part, true);
		olds[i] = work(graph, NULL, kept, 1, 12000, false);
		total = i == 0 ? sum : add(graph, total, sum, false);
	}
	opd_graph_output(graph, "total", total);
	for (unsigned i = 0; i < 4; i++)
		opd_graph_output(graph, NULL, olds[i]);
	const uint64_t id = registered(graph);
	for (int round = 1; round <= 5; round++) {
		opd_result *result = NULL;
		opd_request *request = run_of(id, x, 16);
		OK(opd_run(client, request, &result, &error));
		ck_assert_float_eq(*(const float *)opd_tensor_data(opd_result_tensor(result, 0)), (float)(10 * round));
		for (unsigned i = 0; i < 4; i++)
			ck_assert_float_eq(*(const float *)opd_tensor_data(opd_result_tensor(result, 1 + i)), (float)((i + 1) * (unsigned)(round - 1)));
		opd_result_destroy(result);
		opd_request_destroy(request);
	}
	ck_assert_uint_gt(width_of(id, x, 16), 1);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("graph_parallel");
	TCase *tests = tcase_create("graph_parallel");
	tcase_add_checked_fixture(tests, open_house, close_house);
	tcase_set_timeout(tests, 120);
	tcase_add_test(tests, independent_nodes_run_at_once);
	tcase_add_test(tests, small_nodes_and_large_ones_do_not);
	tcase_add_test(tests, a_direct_caller_runs_what_several_threads_would_not_do_sooner);
	tcase_add_test(tests, of_several_failures_the_first_in_order_is_named);
	tcase_add_test(tests, random_graphs_give_the_bits_that_one_thread_gives);
	tcase_add_test(tests, they_do_so_with_many_threads_and_canaries_behind_every_result);
	tcase_add_test(tests, states_are_read_before_they_are_written_whoever_writes);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
