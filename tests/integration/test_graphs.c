/* Graphs, asked of a whole daemon through the client library: what they compute, how often they are dispatched, what becomes of
 * states, what is refused. */
#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "opd/client.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

static struct house house;
static opd_client *client;
static opd_error error;
static float values[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

static void open_house(void)
{
	house_start(&house, NULL);
	client = house_client(&house);
}

static void close_house(void)
{
	opd_close(client);
	house_stop(&house);
}

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static void says(const char *part)
{
	ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" isn't in \"%s\"", part, error.text);
}

/* ---- Short words ---- */

static opd_value scale_by(opd_graph *graph, const char *name, opd_value x, double factor, const char *provider)
{
	opd_request *node = opd_request_create("lab_scale");
	opd_request_value(node, NULL, x);
	opd_request_float(node, "factor", factor);
	if (provider != NULL)
		opd_request_priority(node, &provider, 1);
	opd_value value = opd_graph_node(graph, name, node);
	opd_request_destroy(node);
	return value;
}

static opd_value add_to(opd_graph *graph, const char *name, opd_value x, opd_value by, bool donate, const char *provider)
{
	opd_request *node = opd_request_create("lab_add");
	opd_request_tensor(
	    node, NULL, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .donate = donate, .value = x});
	opd_request_value(node, NULL, by);
	if (provider != NULL)
		opd_request_priority(node, &provider, 1);
	opd_value value = opd_graph_node(graph, name, node);
	opd_request_destroy(node);
	return value;
}

/* Registers and destroys. */
static uint64_t registered(opd_graph *graph)
{
	uint64_t id = 0;
	OK(opd_graph_register(client, graph, &id, &error));
	opd_graph_destroy(graph);
	return id;
}

static void refused(opd_graph *graph, opd_status expected, const char *part)
{
	uint64_t id;
	opd_status status = opd_graph_register(client, graph, &id, &error);
	ck_assert_msg(status == expected, "%s instead of %s: %s", opd_status_name(status), opd_status_name(expected), error.text);
	says(part);
	opd_graph_destroy(graph);
}

static opd_request *run_of(uint64_t id, int64_t elements)
{
	opd_request *request = opd_request_graph(id);
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, elements));
	return request;
}

static opd_result *run(opd_request *request)
{
	opd_result *result = NULL;
	OK(opd_run(client, request, &result, &error));
	opd_request_destroy(request);
	return result;
}

static void fails(opd_request *request, opd_status expected, const char *part)
{
	opd_result *result = NULL;
	opd_status status = opd_run(client, request, &result, &error);
	ck_assert_msg(status == expected, "%s instead of %s: %s", opd_status_name(status), opd_status_name(expected),
	              status == OPD_OK ? "" : error.text);
	says(part);
	ck_assert_uint_eq(result == NULL ? 0 : opd_result_count(result), 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
}

static float first_of(const opd_result *result, uint32_t output)
{
	const opd_tensor *tensor = opd_result_tensor(result, output);
	ck_assert_ptr_nonnull(tensor);
	ck_assert_ptr_nonnull(tensor->data);
	return *(const float *)opd_tensor_data(tensor);
}

static void gives(opd_request *request, float first)
{
	opd_result *result = run(request);
	ck_assert_float_eq(first_of(result, 0), first);
	opd_result_destroy(result);
}

/* A kept tensor of `elements`, factor, 2·factor, 3·factor … */
static opd_handle kept_of(int64_t elements, double factor)
{
	opd_request *request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, elements));
	opd_request_float(request, "factor", factor);
	opd_request_output(request, 0, true, false);
	opd_result *result = run(request);
	opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	return handle;
}

static opd_request *read_of(opd_handle handle)
{
	opd_request *request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle});
	opd_request_float(request, "factor", 1);
	return request;
}

static uint64_t dispatches(void)
{
	const opd_server_info *info;
	OK(opd_info(client, &info, &error));
	uint64_t count = info->graph_dispatches;
	opd_document_free(info);
	return count;
}

/* x → ·2 → ·3 → y */
static opd_graph *chain_graph(void)
{
	opd_graph *graph = opd_graph_create("chain");
	opd_value x = opd_graph_input(graph, "x");
	opd_value y = scale_by(graph, "threefold", scale_by(graph, "twofold", x, 2, NULL), 3, NULL);
	opd_graph_output(graph, "y", y);
	return graph;
}

/* sum ← sum + x·factor, and its double */
static opd_graph *counter_graph(opd_handle sum, double factor, const char *provider)
{
	opd_graph *graph = opd_graph_create("counter");
	opd_value x = opd_graph_input(graph, "x");
	opd_value state = opd_graph_state(graph, "sum", sum);
	opd_value more = add_to(graph, "more", state, scale_by(graph, "part", x, factor, NULL), true, provider);
	opd_graph_output(graph, "double", scale_by(graph, "double", more, 2, NULL));
	return graph;
}

/* ---- What they compute ---- */

START_TEST(a_graph_computes_what_its_ops_compute)
{
	uint64_t id = registered(chain_graph());
	opd_result *result = run(run_of(id, 16));
	const float *y = opd_tensor_data(opd_result_tensor(result, 0));
	ck_assert_uint_eq(opd_result_count(result), 1);
	for (int i = 0; i < 16; i++)
		ck_assert_float_eq(y[i], 6 * values[i]);
	opd_result_destroy(result);
}
END_TEST

START_TEST(a_rerun_is_not_dispatched_again_until_something_changes)
{
	uint64_t id = registered(chain_graph());
	uint64_t before = dispatches();
	for (int i = 0; i < 5; i++)
		gives(run_of(id, 16), 6);
	ck_assert_uint_eq(dispatches(), before + 1);
	gives(run_of(id, 8), 6); /* another shape */
	gives(run_of(id, 16), 6);
	gives(run_of(id, 8), 6);
	ck_assert_uint_eq(dispatches(), before + 2);
	const char *plain = "plain";
	const opd_priority_entry entry = {"lab_scale", &plain, 1}, other = {"lab_wait", NULL, 0};
	OK(opd_priority_push(client, &other, 1, &error)); /* a list outside of its path */
	gives(run_of(id, 16), 6);
	ck_assert_uint_eq(dispatches(), before + 2);
	OK(opd_priority_push(client, &entry, 1, &error));
	opd_request *request = run_of(id, 16);
	opd_request_explain(request, true);
	opd_result *result = run(request);
	ck_assert_str_eq(opd_result_graph(result)->nodes[0].provider, "plain");
	ck_assert_str_eq(opd_result_graph(result)->nodes[0].explain.level, "session");
	opd_result_destroy(result);
	ck_assert_uint_eq(dispatches(), before + 3);
	ck_assert_int_eq(registry_set_shape(house.server->registry, "lab_scale", lab_shape_longer, &error),
	                 OPD_OK); /* another snapshot */
	fails(run_of(id, 16), OPD_INTERNAL, "node 'twofold'");
}
END_TEST

START_TEST(explain_tells_of_every_node_and_of_memory)
{
	opd_graph *graph = opd_graph_create("mixed");
	opd_value v = opd_graph_input(graph, "x");
	for (int i = 0; i < 20; i++) {
		char name[16];
		(void)snprintf(name, sizeof name, "step%d", i);
		v = scale_by(graph, name, v, 1, i == 3 ? "even_only" : i == 4 ? "planner" : NULL);
	}
	opd_graph_output(graph, NULL, v);
	uint64_t id = registered(graph);
	opd_request *request = run_of(id, 15);
	opd_request_explain(request, true);
	opd_result *result = run(request);
	const opd_graph_explain *explain = opd_result_graph(result);
	ck_assert_uint_eq(explain->count, 20);
	ck_assert(explain->dispatched);
	ck_assert_str_eq(explain->nodes[3].node, "step3");
	ck_assert_str_eq(explain->nodes[3].op, "lab_scale");
	ck_assert_str_eq(explain->nodes[3].provider, "native"); /* 15 elements */
	ck_assert_str_eq(explain->nodes[3].explain.level, "node");
	ck_assert_uint_eq(explain->nodes[3].explain.skip_count, 1);
	ck_assert_str_eq(explain->nodes[3].explain.skipped[0].provider, "even_only");
	ck_assert_str_eq(explain->nodes[4].explain.skipped[0].provider, "planner"); /* its plan refuses */
	ck_assert_str_eq(explain->nodes[5].explain.level, "none");
	ck_assert_uint_eq(explain->unshared_bytes, 19 * 64);
	ck_assert_uint_eq(explain->arena_bytes, 2 * 64);
	ck_assert_uint_gt(opd_result_explain(result)->kernel_ns, 0);
	opd_result_destroy(result);
	request = run_of(id, 8); /* the plan takes it, with scratch */
	opd_request_explain(request, true);
	result = run(request);
	ck_assert_str_eq(opd_result_graph(result)->nodes[3].provider, "even_only");
	ck_assert_str_eq(opd_result_graph(result)->nodes[4].provider, "planner");
	ck_assert_uint_eq(opd_result_graph(result)->arena_bytes, 2 * 64 + 256);
	opd_result_destroy(result);
}
END_TEST

START_TEST(views_of_inputs_and_outputs_are_read_in_place)
{
	static const int64_t four[] = {4}, two[] = {2, 2}, twisted[] = {1, 2};
	opd_graph *graph = opd_graph_create("views");
	opd_value x = opd_graph_input(graph, "x");
	opd_request *node = opd_request_create("relu");
	opd_request_tensor(node, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand),
	                                  .source = OPD_FROM_VALUE,
	                                  .dtype = OPD_f32,
	                                  .rank = 1,
	                                  .shape = four,
	                                  .byte_offset = 16,
	                                  .value = x});
	opd_value part = opd_graph_node(graph, "part", node);
	opd_request_destroy(node);
	node = opd_request_create("relu");
	opd_request_tensor(node, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand),
	                                  .source = OPD_FROM_VALUE,
	                                  .dtype = OPD_f32,
	                                  .rank = 2,
	                                  .shape = two,
	                                  .strides = twisted,
	                                  .value = part});
	opd_graph_output(graph, "y", opd_graph_node(graph, "turned", node));
	opd_request_destroy(node);
	uint64_t id = registered(graph);
	opd_result *result = run(run_of(id, 16));
	const opd_tensor *y = opd_result_tensor(result, 0);
	const float *data = opd_tensor_data(y);
	ck_assert_uint_eq(y->rank, 2);
	ck_assert(data[0] == 5 && data[1] == 7 && data[2] == 6 && data[3] == 8);
	opd_result_destroy(result);
	fails(run_of(id, 6), OPD_INVALID_ARGUMENT, "node 'part': relu: x of f32, shape [4]");
}
END_TEST

/* One graph for prompts of any length. */
START_TEST(a_view_may_take_its_first_extent_from_what_it_views)
{
	static const int64_t halves[] = {-1, 1, 2}, columns[] = {-1, 1}, apart[] = {4, 1}, too_wide[] = {-1, 5};
	opd_graph *graph = opd_graph_create("open");
	opd_value x = opd_graph_input(graph, "x");
	const opd_operand views[] = {
	    {.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .dtype = OPD_f32, .rank = 3, .shape = halves, .value = x},
	    {.struct_bytes = sizeof(opd_operand),
	     .source = OPD_FROM_VALUE,
	     .dtype = OPD_f32,
	     .rank = 2,
	     .shape = columns,
	     .strides = apart,
	     .byte_offset = 8,
	     .value = x},
	    {.struct_bytes = sizeof(opd_operand),
	     .source = OPD_FROM_VALUE,
	     .dtype = OPD_f32,
	     .rank = 2,
	     .shape = too_wide,
	     .value = x},
	};
	uint64_t ids[2];
	for (uint32_t i = 0; i < 3; i++) {
		opd_request *node = opd_request_create("relu");
		opd_request_tensor(node, NULL, &views[i]);
		opd_graph_output(graph, NULL, opd_graph_node(graph, NULL, node));
		opd_request_destroy(node);
		if (i != 0)
			OK(opd_graph_register(client, graph, &ids[i - 1], &error));
	}
	opd_graph_destroy(graph);
	for (int64_t rows = 1; rows <= 3; rows++) {
		opd_request *request = opd_request_graph(ids[0]);
		opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, rows, 4));
		opd_result *result = run(request);
		ck_assert_int_eq(opd_result_tensor(result, 0)->shape[0], rows);
		ck_assert_int_eq(opd_result_tensor(result, 1)->shape[0], rows);
		ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 1)))[rows - 1], (float)(4 * rows - 1));
		opd_result_destroy(result);
	}
	opd_request *request = opd_request_graph(ids[1]);
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 3, 4));
	fails(request, OPD_INVALID_ARGUMENT, "node 'n2': relu: x of f32, shape [3, 5]");
}
END_TEST

START_TEST(constants_live_as_long_as_the_graph)
{
	opd_handle weight = kept_of(4, 10);
	opd_graph *graph = opd_graph_create("add");
	opd_value x = opd_graph_input(graph, "x");
	opd_value w = opd_graph_constant(graph, "w", weight);
	opd_graph_output(graph, "y", add_to(graph, "sum", x, w, false, NULL));
	uint64_t id = registered(graph);
	OK(opd_free(client, &weight, 1, &error));
	gives(run_of(id, 4), 11);
	OK(opd_graph_free(client, id, &error));
	fails(run_of(id, 4), OPD_NOT_FOUND, "not registered");
	ck_assert_int_eq(opd_graph_free(client, id, &error), OPD_NOT_FOUND);
}
END_TEST

START_TEST(results_are_kept_and_named_by_later_requests)
{
	uint64_t id = registered(chain_graph());
	opd_request *request = run_of(id, 16);
	opd_request_output(request, 0, true, false);
	opd_ticket ticket;
	OK(opd_submit(client, request, &ticket, &error));
	/* answered or not: the next run reads it */
	opd_request *next = opd_request_graph(id);
	opd_request_tensor(next, "x",
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = ticket});
	gives(next, 36);
	opd_result *result;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert_ptr_null(opd_result_tensor(result, 0)->data);
	gives(read_of(opd_result_handle(result, 0)), 6);
	opd_result_destroy(result);
	opd_request_destroy(request);
}
END_TEST

START_TEST(a_graph_runs_once_without_being_registered)
{
	opd_graph *graph = chain_graph();
	opd_request *request = opd_request_once(graph);
	opd_request_tensor(request, "x", &(opd_operand)OPD_OPERAND(OPD_f32, values, 4));
	for (int i = 0; i < 3; i++) {
		opd_result *result = NULL;
		OK(opd_run(client, request, &result, &error));
		ck_assert_float_eq(first_of(result, 0), 6);
		opd_result_destroy(result);
	}
	opd_request_destroy(request);
	opd_graph_destroy(graph);
}
END_TEST

START_TEST(fake_and_dry_runs_move_no_data)
{
	uint64_t id = registered(chain_graph());
	uint64_t runs = atomic_load(&lab_counts.runs);
	opd_request *request = run_of(id, 16);
	opd_request_mode(request, OPD_MODE_DRY);
	opd_result *result = run(request);
	ck_assert_uint_eq(opd_result_graph(result)->count, 2);
	ck_assert_int_eq(opd_result_tensor(result, 0)->shape[0], 16);
	ck_assert_ptr_null(opd_result_tensor(result, 0)->data);
	opd_result_destroy(result);
	request = run_of(id, 12);
	opd_request_mode(request, OPD_MODE_FAKE);
	result = run(request);
	ck_assert_int_eq(opd_result_tensor(result, 0)->shape[0], 12);
	opd_result_destroy(result);
	ck_assert_uint_eq(atomic_load(&lab_counts.runs), runs);
}
END_TEST

START_TEST(the_direct_way_runs_graphs_too)
{
	opd_client *socket = client;
	client = house_direct_client(&house);
	OK(opd_direct_begin(client, &error));
	opd_handle sum = kept_of(4, 0);
	uint64_t chain = registered(chain_graph()), counter = registered(counter_graph(sum, 1, NULL));
	gives(run_of(chain, 16), 6);
	gives(run_of(counter, 4), 2);
	gives(run_of(counter, 4), 4);
	fails(opd_request_graph(chain), OPD_INVALID_ARGUMENT, "argument x (Tensor) is missing");
	opd_direct_end(client);
	gives(run_of(counter, 4), 6);
	opd_close(client);
	client = socket;
}
END_TEST

/* ---- States ---- */

START_TEST(a_state_carries_over_from_run_to_run)
{
	opd_handle sum = kept_of(4, 0);
	uint64_t id = registered(counter_graph(sum, 1, NULL));
	opd_result *result = NULL;
	for (int i = 1; i <= 3; i++) {
		opd_result_destroy(result);
		result = run(run_of(id, 4));
		ck_assert_float_eq(first_of(result, 0), (float)(2 * i));
	}
	opd_handle now = opd_result_state(result, 0);
	ck_assert_uint_eq(now.index, sum.index);
	ck_assert_uint_ne(now.generation, sum.generation);
	gives(read_of(now), 3);
	fails(read_of(sum), OPD_NOT_FOUND, "is no tensor of this session"); /* two donations ago */
	opd_result_destroy(result);
	result = run(run_of(id, 4));
	fails(read_of(now), OPD_FAILED_PRECONDITION, "was donated to request");
	opd_result_destroy(result);
	ck_assert_uint_eq(opd_result_state(NULL == result ? result : (result = run(run_of(id, 4))), 5).generation, 0);
	opd_result_destroy(result);
}
END_TEST

START_TEST(a_state_that_is_still_read_is_copied)
{
	opd_handle sum = kept_of(4, 1);
	uint64_t id = registered(counter_graph(sum, 1, NULL));
	/* accepted before the run, executed after it */
	opd_request *reader = opd_request_create("lab_wait");
	opd_request_tensor(reader, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = sum});
	opd_request_float(reader, "factor", 1);
	opd_ticket ticket;
	OK(opd_submit(client, reader, &ticket, &error));
	house_await_count(&lab_counts.waiting, 1);
	gives(run_of(id, 4), 4);
	lab_gate(true);
	opd_result *result;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert_float_eq(first_of(result, 0), 1);
	opd_result_destroy(result);
	opd_request_destroy(reader);
	gives(run_of(id, 4), 6);
}
END_TEST

START_TEST(an_implementation_that_works_aside_updates_the_state_all_the_same)
{
	opd_handle sum = kept_of(4, 0);
	uint64_t id = registered(counter_graph(sum, 1, "aside"));
	gives(run_of(id, 4), 2);
	opd_result *result = run(run_of(id, 4));
	ck_assert_float_eq(first_of(result, 0), 4);
	gives(read_of(opd_result_state(result, 0)), 2);
	opd_result_destroy(result);
}
END_TEST

/* As prefill and decode share a cache; none waits for a reply. */
START_TEST(graphs_that_share_a_state_run_in_order)
{
	enum { RUNS = 60 };
	opd_handle sum = kept_of(4, 0);
	uint64_t one = registered(counter_graph(sum, 1, NULL)), hundred = registered(counter_graph(sum, 100, "aside"));
	opd_ticket tickets[RUNS];
	float expected = 0;
	for (int i = 0; i < RUNS; i++) {
		opd_request *request = run_of(i % 3 == 0 ? hundred : one, 4);
		OK(opd_submit(client, request, &tickets[i], &error));
		opd_request_destroy(request);
	}
	for (int i = 0; i < RUNS; i++) {
		opd_result *result;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		expected += i % 3 == 0 ? 100 : 1;
		ck_assert_float_eq(first_of(result, 0), 2 * expected);
		opd_result_destroy(result);
	}
}
END_TEST

START_TEST(a_failed_run_loses_the_states_it_wrote_and_no_other)
{
	opd_handle left = kept_of(4, 1), right = kept_of(4, 2);
	opd_graph *graph = opd_graph_create("two");
	opd_value x = opd_graph_input(graph, "x");
	opd_value a = opd_graph_state(graph, "left", left), b = opd_graph_state(graph, "right", right);
	add_to(graph, "whole", a, x, true, "halfway");
	opd_graph_output(graph, "y", add_to(graph, "never", b, x, true, NULL));
	uint64_t id = registered(graph);
	fails(run_of(id, 4), OPD_INTERNAL, "node 'whole': halfway: it always stops there");
	fails(run_of(id, 4), OPD_DATA_LOSS, "state 'left': the tensor is lost");
	fails(read_of(left), OPD_DATA_LOSS, "the tensor is lost: a kernel of request");
	OK(opd_free(client, &left, 1, &error)); /* by the only handle that was ever told */
	gives(read_of(right), 2); /* its donation is undone */
	/* bad arguments end before the kernel */
	opd_handle sum = kept_of(4, 1);
	id = registered(counter_graph(sum, 1, NULL));
	fails(run_of(id, 5), OPD_INVALID_ARGUMENT, "node 'more': lab_add: by has another shape than x");
	gives(read_of(sum), 1);
	gives(run_of(id, 4), 4);
}
END_TEST

START_TEST(a_freed_state_is_told_of)
{
	opd_handle sum = kept_of(4, 1);
	uint64_t id = registered(counter_graph(sum, 1, NULL));
	OK(opd_free(client, &sum, 1, &error));
	opd_handle other = kept_of(4, 1); /* in the same slot */
	ck_assert_uint_eq(other.index, sum.index);
	fails(run_of(id, 4), OPD_NOT_FOUND, "state 'sum'");
}
END_TEST

START_TEST(readers_run_before_the_one_who_donates)
{
	opd_handle sum = kept_of(4, 1);
	opd_graph *graph = opd_graph_create("readers");
	opd_value x = opd_graph_input(graph, "x");
	opd_value state = opd_graph_state(graph, "sum", sum);
	opd_value more = add_to(graph, "more", state, x, true, NULL);
	opd_graph_output(graph, "old", scale_by(graph, "old", state, 1, NULL)); /* added later, run first */
	opd_graph_output(graph, "new", more);
	uint64_t id = registered(graph);
	opd_result *result = run(run_of(id, 4));
	ck_assert_float_eq(first_of(result, 0), 1);
	ck_assert_float_eq(first_of(result, 1), 2);
	opd_result_destroy(result);
	result = run(run_of(id, 4));
	ck_assert_float_eq(first_of(result, 0), 2);
	ck_assert_float_eq(first_of(result, 1), 3);
	opd_result_destroy(result);

	graph = opd_graph_create("late");
	x = opd_graph_input(graph, "x");
	state = opd_graph_state(graph, "sum", kept_of(4, 1));
	more = add_to(graph, "more", state, x, true, NULL);
	opd_graph_output(graph, "y", add_to(graph, "late", more, state, false, NULL)); /* the old value, after it is gone */
	refused(graph, OPD_INVALID_ARGUMENT, "'more' waits for 'late' waits for 'more'");
}
END_TEST

START_TEST(a_nodes_result_may_be_donated_within_the_graph)
{
	for (int aside = 0; aside < 2; aside++) {
		opd_graph *graph = opd_graph_create("inner");
		opd_value x = opd_graph_input(graph, "x");
		opd_value twice = scale_by(graph, "twice", x, 2, NULL);
		opd_value more = add_to(graph, "more", twice, x, true, aside ? "aside" : NULL);
		opd_value most = add_to(graph, "most", more, x, true, NULL);
		opd_graph_output(graph, "y", most);
		opd_graph_output(graph, "z", scale_by(graph, "z", most, 10, NULL));
		opd_graph_output(graph, "again", most);
		uint64_t id = registered(graph);
		opd_result *result = run(run_of(id, 4));
		ck_assert_float_eq(first_of(result, 0), 4);
		ck_assert_float_eq(first_of(result, 1), 40);
		ck_assert_float_eq(first_of(result, 2), 4);
		opd_result_destroy(result);
	}
	opd_graph *graph = opd_graph_create("gone");
	opd_value x = opd_graph_input(graph, "x");
	opd_value twice = scale_by(graph, "twice", x, 2, NULL);
	add_to(graph, "more", twice, x, true, NULL);
	opd_graph_output(graph, "y", twice);
	refused(graph, OPD_INVALID_ARGUMENT, "output 'y' names a result of node 'twice' that node 'more' donates");
}
END_TEST

/* ---- What is refused ---- */

START_TEST(what_is_wrong_is_found_before_anything_runs)
{
	opd_graph *graph = chain_graph();
	opd_request *node = opd_request_create("lab_scael");
	opd_graph_node(graph, "typo", node);
	refused(graph, OPD_NOT_FOUND, "node 'typo': no op \"lab_scael\"");
	opd_request_destroy(node);

	graph = chain_graph();
	scale_by(graph, "dangling", (opd_value){77, 0}, 1, NULL);
	refused(graph, OPD_NOT_FOUND, "node 'dangling': x names node 77, but the graph has 3");

	graph = chain_graph();
	scale_by(graph, "dangling", (opd_value){0, 1}, 1, NULL);
	refused(graph, OPD_NOT_FOUND, "x names output 1 of node 'twofold', but lab_scale has 1");

	graph = chain_graph();
	scale_by(graph, "dangling", (opd_value){OPD_GRAPH_INPUT, 3}, 1, NULL);
	refused(graph, OPD_NOT_FOUND, "x names input 3, but the graph has 1");

	graph = chain_graph();
	scale_by(graph, "round", (opd_value){3, 0}, 1, NULL);
	scale_by(graph, "about", (opd_value){2, 0}, 1, NULL);
	refused(graph, OPD_INVALID_ARGUMENT,
	        "graph 'chain': its nodes wait for each other: 'round' waits for 'about' waits for 'round'");

	graph = chain_graph();
	scale_by(graph, "twofold", (opd_value){0, 0}, 1, NULL);
	refused(graph, OPD_ALREADY_EXISTS, "two nodes are called 'twofold': 0 and 2");

	graph = chain_graph();
	scale_by(graph, "unknown", (opd_value){0, 0}, 1, "nobody");
	refused(graph, OPD_NOT_FOUND, "node 'unknown'");

	graph = chain_graph();
	node = opd_request_create("lab_scale");
	opd_request_str(node, "x", "text");
	opd_graph_node(graph, "type", node);
	opd_request_destroy(node);
	refused(graph, OPD_INVALID_ARGUMENT, "node 'type': lab_scale: argument x is a str, expected Tensor");

	graph = chain_graph();
	opd_value x = {OPD_GRAPH_INPUT, 0};
	add_to(graph, "input", x, (opd_value){0, 0}, true, NULL);
	refused(graph, OPD_INVALID_ARGUMENT, "node 'input': x donates input 'x', which is no state");

	graph = opd_graph_create("nothing");
	refused(graph, OPD_INVALID_ARGUMENT, "0 nodes");

	graph = opd_graph_create("bad name");
	refused(graph, OPD_INVALID_ARGUMENT, "name \"bad name\"");

	graph = chain_graph();
	opd_graph_constant(graph, "w", (opd_handle){.index = 3, .generation = 4});
	refused(graph, OPD_NOT_FOUND, "input 'w': handle 3.");

	graph = opd_graph_create("device");
	node = opd_request_create("lab_scale");
	opd_request_value(node, NULL, opd_graph_input(graph, "x"));
	opd_request_device(node, "toy:x");
	opd_graph_node(graph, "far", node);
	opd_request_destroy(node);
	refused(graph, OPD_INVALID_ARGUMENT, "node 'far': device \"toy:x\"");

	uint64_t id = registered(chain_graph());
	opd_request *request = opd_request_graph(id);
	opd_request_tensor(request, "z", &(opd_operand)OPD_OPERAND(OPD_f32, values, 4));
	fails(request, OPD_INVALID_ARGUMENT, "chain: unknown argument \"z\"; schema: chain(Tensor x) -> (Tensor)");
}
END_TEST

START_TEST(a_failing_node_is_named_and_nothing_is_delivered)
{
	opd_graph *graph = opd_graph_create("fails");
	opd_value x = opd_graph_input(graph, "x");
	opd_graph_output(graph, "first", scale_by(graph, "first", x, 2, NULL));
	opd_graph_output(graph, "second", scale_by(graph, "second", x, 2, "breaks"));
	uint64_t id = registered(graph);
	opd_request *request = run_of(id, 4);
	opd_request_output(request, 0, true, true);
	fails(request, OPD_INTERNAL, "node 'second': breaks: it always does");
}
END_TEST

START_TEST(a_graph_of_too_many_nodes_is_refused_and_many_are_run)
{
	opd_graph *graph = opd_graph_create("many");
	opd_value v = opd_graph_input(graph, "x");
	opd_request *node = opd_request_create("lab_scale");
	opd_request_float(node, "factor", 1);
	for (int i = 0; i < 12000; i++) {
		opd_request_destroy(node);
		node = opd_request_create("lab_scale");
		opd_request_value(node, NULL, v);
		opd_request_float(node, "factor", 1);
		v = opd_graph_node(graph, NULL, node);
	}
	opd_graph_output(graph, "y", v);
	uint64_t id = registered(graph);
	gives(run_of(id, 4), 1);
	gives(run_of(id, 4), 1);

	graph = opd_graph_create("toomany");
	for (int i = 0; i < 100000; i++)
		opd_graph_node(graph, NULL, node);
	opd_request_destroy(node);
	refused(graph, OPD_INVALID_ARGUMENT, "more than 65536 nodes");
	gives(run_of(id, 4), 1);
}
END_TEST

struct registering {
	opd_client *client;
	opd_graph *graph;
	uint64_t id;
	opd_status status;
	_Atomic bool ended;
};

static void *register_main(void *argument)
{
	struct registering *registering = argument;
	opd_error own;
	registering->status = opd_graph_register(registering->client, registering->graph, &registering->id, &own);
	atomic_store(&registering->ended, true);
	return NULL;
}

static uint32_t in_flight_of(uint64_t session)
{
	const opd_sharing *sharing = NULL;
	uint32_t in_flight = 0;
	OK(opd_sessions(client, session, &sharing, &error));
	for (uint32_t i = 0; i < sharing->session_count; i++)
		if (sharing->sessions[i].session == session)
			in_flight = sharing->sessions[i].in_flight;
	opd_document_free(sharing);
	return in_flight;
}

static void await_in_flight(uint64_t session, uint32_t count)
{
	for (int i = 0; i < 5000 && in_flight_of(session) != count; i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	ck_assert_uint_eq(in_flight_of(session), count);
}

/* Both of the lane's threads are kept: what only they can do isn't done, and everybody else is served. */
START_TEST(a_large_graph_is_read_on_the_lane_and_holds_nobody_up)
{
	opd_ticket tickets[2];
	pthread_t thread;
	struct registering registering = {.client = house_client(&house), .graph = opd_graph_create("large")};
	opd_value v = opd_graph_input(registering.graph, "x");
	for (int i = 0; i < 8000; i++)
		v = scale_by(registering.graph, NULL, v, 1, NULL);
	opd_graph_output(registering.graph, "y", v);
	lab_reset();
	for (int i = 0; i < 2; i++) {
		opd_request *request = opd_request_create("lab_wait");
		opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 16));
		OK(opd_submit(client, request, &tickets[i], &error));
		opd_request_destroy(request);
	}
	house_await_count(&lab_counts.waiting, 2);
	ck_assert_int_eq(pthread_create(&thread, NULL, register_main, &registering), 0);
	await_in_flight(opd_client_session(registering.client)->session, 1); /* it has come, and waits for a thread */
	for (int i = 0; i < 40; i++)
		OK(opd_ping(client, &error));
	ck_assert(!atomic_load(&registering.ended));
	lab_gate(true);
	(void)pthread_join(thread, NULL);
	ck_assert_int_eq(registering.status, OPD_OK);
	for (int i = 0; i < 2; i++) {
		opd_result *result = NULL;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		opd_result_destroy(result);
	}
	opd_client *mine = client;
	client = registering.client;
	gives(run_of(registering.id, 4), 1);
	client = mine;
	opd_graph_destroy(registering.graph);
	opd_close(registering.client);
}
END_TEST

/* The list grows and shrinks with it; a graph that needs more than is left fails, and nothing stays charged. */
START_TEST(a_quota_reached_in_mid_graph_leaks_nothing)
{
	opd_close(client);
	house_stop(&house);
	house_start(&house, (const char *const[]){"limits.session", "1048576", NULL});
	client = house_client(&house);
	opd_graph *graph = opd_graph_create("large");
	opd_value x = opd_graph_input(graph, "x");
	opd_value wide[20];
	for (int i = 0; i < 20; i++)
		wide[i] = scale_by(graph, NULL, x, i, NULL);
	for (int i = 1; i < 20; i++)
		wide[0] = add_to(graph, NULL, wide[0], wide[i], false, NULL);
	opd_graph_output(graph, "y", wide[0]);
	uint64_t id = registered(graph);
	static float large[64 * 1024];
	gives(run_of(id, 16), 190);
	const opd_server_info *info;
	OK(opd_info(client, &info, &error));
	uint64_t before = info->session_memory_bytes;
	opd_document_free(info);
	opd_request *request = opd_request_graph(id);
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, large, 32 * 1024));
	fails(request, OPD_RESOURCE_EXHAUSTED, "graph 'large': its intermediate results");
	OK(opd_info(client, &info, &error));
	ck_assert_uint_lt(info->session_memory_bytes, before + 32 * 1024 * sizeof large[0]); /* what is prepared for the shape stays, of the results not a single one */
	opd_document_free(info);
	gives(run_of(id, 16), 190);
}
END_TEST

START_TEST(a_graph_freed_while_it_runs_ends_in_peace)
{
	opd_graph *graph = opd_graph_create("slow");
	opd_request *node = opd_request_create("lab_wait");
	opd_request_value(node, NULL, opd_graph_input(graph, "x"));
	opd_graph_output(graph, "y", opd_graph_node(graph, "wait", node));
	opd_request_destroy(node);
	uint64_t id = registered(graph);
	opd_ticket tickets[2];
	opd_request *request = run_of(id, 4);
	OK(opd_submit(client, request, &tickets[0], &error));
	OK(opd_submit(client, request, &tickets[1], &error));
	house_await_count(&lab_counts.waiting, 1);
	OK(opd_graph_free(client, id, &error));
	lab_gate(true);
	for (int i = 0; i < 2; i++) {
		opd_result *result;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		ck_assert_float_eq(first_of(result, 0), 2);
		opd_result_destroy(result);
	}
	opd_request_destroy(request);
}
END_TEST

START_TEST(a_client_that_leaves_in_mid_run_leaves_nothing)
{
	opd_handle sum = kept_of(4, 0);
	opd_graph *graph = opd_graph_create("slow");
	opd_value x = opd_graph_input(graph, "x");
	opd_request *node = opd_request_create("lab_wait");
	opd_request_value(node, NULL, x);
	opd_value waited = opd_graph_node(graph, "wait", node);
	opd_request_destroy(node);
	opd_value state = opd_graph_state(graph, "sum", sum);
	opd_graph_output(graph, "y", add_to(graph, "more", state, waited, true, NULL));
	uint64_t id = registered(graph);
	for (int i = 0; i < 5; i++) {
		opd_request *request = run_of(id, 4);
		opd_ticket ticket;
		OK(opd_submit(client, request, &ticket, &error));
		opd_request_destroy(request);
	}
	house_await_count(&lab_counts.waiting, 1);
	opd_close(client);
	lab_gate(true);
	house_await_bytes(&house, 0);
	client = house_client(&house);
}
END_TEST

/* One is running, the others wait for their turn; the state has what those that weren't cancelled added. */
START_TEST(cancelled_runs_leave_the_state_to_the_others)
{
	enum { RUNS = 6 };
	opd_handle sum = kept_of(4, 0);
	opd_graph *graph = opd_graph_create("slow");
	opd_value x = opd_graph_input(graph, "x");
	opd_request *node = opd_request_create("lab_wait");
	opd_request_value(node, NULL, x);
	opd_value waited = opd_graph_node(graph, "wait", node);
	opd_request_destroy(node);
	opd_graph_output(graph, "y", add_to(graph, "more", opd_graph_state(graph, "sum", sum), waited, true, NULL));
	uint64_t id = registered(graph);
	opd_ticket tickets[RUNS];
	for (int i = 0; i < RUNS; i++) {
		opd_request *request = run_of(id, 4);
		OK(opd_submit(client, request, &tickets[i], &error));
		opd_request_destroy(request);
	}
	house_await_count(&lab_counts.waiting, 1);
	opd_cancel(client, tickets[2]);
	opd_cancel(client, tickets[0]); /* running: ends before the node that writes the state */
	opd_cancel(client, tickets[RUNS - 1]);
	OK(opd_ping(client, &error)); /* the server has heard of it */
	lab_gate(true);
	float seen[RUNS] = {0};
	for (int i = 0; i < RUNS; i++) {
		opd_result *result;
		if (i == 0 || i == 2 || i == RUNS - 1)
			continue;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		seen[i] = first_of(result, 0);
		opd_result_destroy(result);
	}
	ck_assert_float_ne(seen[1], 0);
	ck_assert_float_eq(seen[3], 2 * seen[1]);
	ck_assert_float_eq(seen[4], 3 * seen[1]);
	ck_assert_uint_eq(atomic_load(&lab_counts.waiting), 4);
}
END_TEST

static opd_graph *waiting_graph(opd_handle sum);

/* Its name while a run writes it can be had from the list alone; what it holds then is nobody's. */
START_TEST(a_state_that_a_run_may_write_is_read_by_nobody_else_meanwhile)
{
	enum { RUNS = 3 };
	opd_ticket tickets[RUNS];
	opd_handle sum = kept_of(4, 1);
	const uint64_t id = registered(waiting_graph(sum));
	for (int i = 0; i < RUNS; i++) {
		opd_request *request = run_of(id, 4);
		OK(opd_submit(client, request, &tickets[i], &error));
		opd_request_destroy(request);
	}
	house_await_count(&lab_counts.waiting, 1);
	opd_cancel(client, tickets[1]);
	const opd_kept_list *list = NULL;
	OK(opd_kept_tensors(client, &list, &error));
	ck_assert_uint_eq(list->count, 1);
	const opd_handle now = list->tensors[0].handle;
	opd_document_free(list);
	ck_assert_uint_ne(now.generation, sum.generation);
	fails(read_of(now), OPD_FAILED_PRECONDITION, "hasn't ended");
	fails(read_of(sum), OPD_NOT_FOUND, "is no tensor of this session"); /* donated three times since */
	ck_assert_int_eq(opd_free(client, &now, 1, &error), OPD_FAILED_PRECONDITION);
	lab_gate(true);
	for (int i = 0; i < RUNS; i++) {
		opd_result *result = NULL;
		(void)!opd_wait(client, tickets[i], UINT64_MAX, &result, &error);
		opd_result_destroy(result);
	}
	gives(read_of(now), 5); /* 1 + 2 * 2 */
}
END_TEST

/* All of them, the one whose node is running first or last. */
START_TEST(of_runs_that_all_end_early_the_state_keeps_its_handle)
{
	enum { RUNS = 3 };
	const opd_handle sum = kept_of(4, 1);
	const uint64_t id = registered(waiting_graph(sum));
	for (int turn = 0; turn < 2; turn++) {
		opd_ticket tickets[RUNS];
		lab_reset();
		for (int i = 0; i < RUNS; i++) {
			opd_request *request = run_of(id, 4);
			OK(opd_submit(client, request, &tickets[i], &error));
			opd_request_destroy(request);
		}
		house_await_count(&lab_counts.waiting, 1);
		for (int i = 0; i < RUNS; i++)
			opd_cancel(client, tickets[turn == 0 ? i : RUNS - 1 - i]);
		OK(opd_ping(client, &error)); /* the server has heard of it */
		lab_gate(true);
		opd_status status = OPD_FAILED_PRECONDITION; /* until the one that was running has ended */
		while (status == OPD_FAILED_PRECONDITION) {
			opd_result *result = NULL;
			opd_request *read = read_of(sum);
			status = opd_run(client, read, &result, &error);
			opd_request_destroy(read);
			opd_result_destroy(result);
		}
		ck_assert_msg(status == OPD_OK, "%s", error.text);
		gives(read_of(sum), 1);
	}
	OK(opd_free(client, &sum, 1, &error));
}
END_TEST

static opd_graph *waiting_graph(opd_handle sum)
{
	opd_graph *graph = opd_graph_create("waiting");
	opd_value x = opd_graph_input(graph, "x"), state = opd_graph_state(graph, "sum", sum);
	opd_request *node = opd_request_create("lab_wait");
	opd_request_value(node, NULL, x);
	opd_value waited = opd_graph_node(graph, "wait", node);
	opd_request_destroy(node);
	opd_value part = scale_by(graph, "part", waited, 1, NULL);
	opd_graph_output(graph, "y", add_to(graph, "more", state, part, true, NULL));
	return graph;
}

START_TEST(a_run_behind_another_may_be_late_and_then_donates_nothing)
{
	opd_handle sum = kept_of(4, 1);
	uint64_t id = registered(waiting_graph(sum));
	opd_ticket first, late;
	opd_request *request = run_of(id, 4);
	OK(opd_submit(client, request, &first, &error));
	house_await_count(&lab_counts.waiting, 1);
	opd_request_timeout(request, 1);
	OK(opd_submit(client, request, &late, &error));
	OK(opd_ping(client, &error)); /* both are accepted */
	lab_gate(true);
	opd_result *result = NULL;
	OK(opd_wait(client, first, UINT64_MAX, &result, &error));
	ck_assert_float_eq(first_of(result, 0), 3);
	opd_handle now = opd_result_state(result, 0);
	opd_result_destroy(result);
	ck_assert_int_eq(opd_wait(client, late, UINT64_MAX, &result, &error), OPD_DEADLINE_EXCEEDED);
	says("not started within its timeout of 1 us");
	opd_result_destroy(result);
	gives(read_of(now), 3);
	opd_request_destroy(request);
}
END_TEST

START_TEST(lists_hold_as_they_were_when_the_run_was_sent)
{
	opd_handle sum = kept_of(4, 1);
	uint64_t id = registered(waiting_graph(sum));
	const char *plain = "plain";
	const opd_priority_entry entry = {"lab_scale", &plain, 1};
	opd_ticket tickets[3];
	opd_request *request = run_of(id, 4);
	opd_request_explain(request, true);
	OK(opd_submit(client, request, &tickets[0], &error));
	OK(opd_submit(client, request, &tickets[1], &error));
	house_await_count(&lab_counts.waiting, 1);
	OK(opd_priority_push(client, &entry, 1, &error));
	OK(opd_submit(client, request, &tickets[2], &error));
	OK(opd_priority_pop(client, &error));
	lab_gate(true);
	for (int i = 0; i < 3; i++) {
		opd_result *result;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		ck_assert_str_eq(opd_result_graph(result)->nodes[1].provider, i == 2 ? "plain" : "native");
		ck_assert_float_eq(first_of(result, 0), (float)(3 + 2 * i));
		opd_result_destroy(result);
	}
	opd_request_destroy(request);
}
END_TEST

START_TEST(canaries_stand_behind_every_result)
{
	opd_close(client);
	house_stop(&house);
	house_start(&house, (const char *const[]){"checked", "true", NULL});
	client = house_client(&house);
	opd_handle sum = kept_of(16, 0);
	uint64_t counter = registered(counter_graph(sum, 1, NULL)), aside = registered(counter_graph(kept_of(16, 0), 1, "aside"));
	for (int i = 1; i <= 2; i++) {
		gives(run_of(counter, 16), (float)(2 * i));
		gives(run_of(aside, 16), (float)(2 * i));
	}
	for (int wanted = 0; wanted < 2; wanted++) { /* in the arena, and in a buffer of the reply */
		opd_graph *graph = opd_graph_create("spilling");
		opd_value x = opd_graph_input(graph, "x");
		opd_value spilt = scale_by(graph, "spilt", x, 2, "spills");
		opd_graph_output(graph, "y", wanted ? spilt : scale_by(graph, "after", spilt, 2, NULL));
		fails(run_of(registered(graph), 16), OPD_INTERNAL,
		      "node 'spilt': spills.lab_scale wrote past the end of result 0, at byte 64 of 64");
	}
}
END_TEST

START_TEST(a_graph_is_its_sessions_alone)
{
	uint64_t id = registered(chain_graph());
	opd_client *mine = client;
	client = house_client(&house);
	fails(run_of(id, 4), OPD_NOT_FOUND, "is not registered in this session");
	ck_assert_int_eq(opd_graph_free(client, id, &error), OPD_NOT_FOUND);
	opd_close(client);
	client = mine;
	gives(run_of(id, 4), 6);
}
END_TEST

START_TEST(a_failed_run_explains_itself)
{
	opd_graph *graph = opd_graph_create("fails");
	opd_value x = opd_graph_input(graph, "x");
	opd_graph_output(graph, "y", scale_by(graph, "broken", scale_by(graph, "first", x, 2, "even_only"), 2, "breaks"));
	opd_request *request = run_of(registered(graph), 3);
	opd_request_explain(request, true);
	opd_result *result = NULL;
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_INTERNAL);
	ck_assert_ptr_nonnull(result);
	ck_assert_str_eq(opd_result_graph(result)->nodes[0].explain.skipped[0].provider, "even_only");
	ck_assert_str_eq(opd_result_graph(result)->nodes[1].provider, "breaks");
	opd_result_destroy(result);
	opd_request_destroy(request);
}
END_TEST

/* A token's keys and values into a cache that stays, read by attention in the same run: the shape of a model's decode step. */
START_TEST(a_paged_cache_is_updated_in_place)
{
	static const int64_t cache_shape[] = {2, 4, 1, 8};
	static float zeros[64], key[8], query[8];
	static int64_t slot[1];
	opd_handle caches[2];
	for (int i = 0; i < 2; i++) {
		opd_request *request = opd_request_create("relu");
		opd_request_tensor(
		    request, NULL,
		    &(opd_operand){
		        .struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 4, .shape = cache_shape, .data = zeros});
		opd_request_output(request, 0, true, false);
		opd_result *result = run(request);
		caches[i] = opd_result_handle(result, 0);
		opd_result_destroy(result);
	}
	opd_graph *graph = opd_graph_create("cache");
	opd_value k = opd_graph_input(graph, "k"), slots = opd_graph_input(graph, "slots");
	opd_value keys = opd_graph_state(graph, "keys", caches[0]), data = opd_graph_state(graph, "values", caches[1]);
	opd_request *node = opd_request_create("reshape_and_cache");
	opd_request_value(node, NULL, k);
	opd_request_value(node, NULL, k);
	opd_request_tensor(
	    node, NULL, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .donate = true, .value = keys});
	opd_request_tensor(
	    node, NULL, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .donate = true, .value = data});
	opd_request_value(node, NULL, slots);
	opd_value updated = opd_graph_node(graph, "cache", node);
	opd_request_destroy(node);
	node = opd_request_create("relu");
	opd_request_value(node, NULL, opd_value_output(updated, 1));
	opd_graph_output(graph, "all", opd_graph_node(graph, "all", node));
	opd_request_destroy(node);
	uint64_t id = registered(graph);
	(void)query;
	for (int t = 0; t < 8; t++) {
		for (int i = 0; i < 8; i++)
			key[i] = (float)(t + 1);
		slot[0] = t;
		opd_request *request = opd_request_graph(id);
		opd_request_tensor(request, "k", &(opd_operand)OPD_OPERAND(OPD_f32, key, 1, 1, 8));
		opd_request_tensor(request, "slots", &(opd_operand)OPD_OPERAND(OPD_i64, slot, 1));
		opd_result *result = run(request);
		const float *all = opd_tensor_data(opd_result_tensor(result, 0));
		for (int i = 0; i < 8; i++)
			ck_assert_float_eq(all[8 * i], i <= t ? (float)(i + 1) : 0);
		opd_result_destroy(result);
	}
	slot[0] = 8;
	opd_request *request = opd_request_graph(id);
	opd_request_tensor(request, "k", &(opd_operand)OPD_OPERAND(OPD_f32, key, 1, 1, 8));
	opd_request_tensor(request, "slots", &(opd_operand)OPD_OPERAND(OPD_i64, slot, 1));
	fails(request, OPD_INVALID_ARGUMENT, "node 'cache': reshape_and_cache: slot_mapping");
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("graphs");
	TCase *tests = tcase_create("graphs");
	tcase_add_checked_fixture(tests, open_house, close_house);
	tcase_set_timeout(tests, 120);
	tcase_add_test(tests, a_graph_computes_what_its_ops_compute);
	tcase_add_test(tests, a_rerun_is_not_dispatched_again_until_something_changes);
	tcase_add_test(tests, explain_tells_of_every_node_and_of_memory);
	tcase_add_test(tests, views_of_inputs_and_outputs_are_read_in_place);
	tcase_add_test(tests, a_view_may_take_its_first_extent_from_what_it_views);
	tcase_add_test(tests, constants_live_as_long_as_the_graph);
	tcase_add_test(tests, results_are_kept_and_named_by_later_requests);
	tcase_add_test(tests, a_graph_runs_once_without_being_registered);
	tcase_add_test(tests, fake_and_dry_runs_move_no_data);
	tcase_add_test(tests, the_direct_way_runs_graphs_too);
	tcase_add_test(tests, a_state_carries_over_from_run_to_run);
	tcase_add_test(tests, a_state_that_is_still_read_is_copied);
	tcase_add_test(tests, an_implementation_that_works_aside_updates_the_state_all_the_same);
	tcase_add_test(tests, graphs_that_share_a_state_run_in_order);
	tcase_add_test(tests, a_failed_run_loses_the_states_it_wrote_and_no_other);
	tcase_add_test(tests, a_freed_state_is_told_of);
	tcase_add_test(tests, readers_run_before_the_one_who_donates);
	tcase_add_test(tests, a_nodes_result_may_be_donated_within_the_graph);
	tcase_add_test(tests, what_is_wrong_is_found_before_anything_runs);
	tcase_add_test(tests, a_failing_node_is_named_and_nothing_is_delivered);
	tcase_add_test(tests, a_graph_of_too_many_nodes_is_refused_and_many_are_run);
	tcase_add_test(tests, a_large_graph_is_read_on_the_lane_and_holds_nobody_up);
	tcase_add_test(tests, a_quota_reached_in_mid_graph_leaks_nothing);
	tcase_add_test(tests, a_graph_freed_while_it_runs_ends_in_peace);
	tcase_add_test(tests, a_client_that_leaves_in_mid_run_leaves_nothing);
	tcase_add_test(tests, cancelled_runs_leave_the_state_to_the_others);
	tcase_add_test(tests, of_runs_that_all_end_early_the_state_keeps_its_handle);
	tcase_add_test(tests, a_state_that_a_run_may_write_is_read_by_nobody_else_meanwhile);
	tcase_add_test(tests, a_run_behind_another_may_be_late_and_then_donates_nothing);
	tcase_add_test(tests, lists_hold_as_they_were_when_the_run_was_sent);
	tcase_add_test(tests, canaries_stand_behind_every_result);
	tcase_add_test(tests, a_graph_is_its_sessions_alone);
	tcase_add_test(tests, a_failed_run_explains_itself);
	tcase_add_test(tests, a_paged_cache_is_updated_in_place);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
