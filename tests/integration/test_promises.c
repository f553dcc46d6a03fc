/* The promises of the acceptance list, each by its number, asked of a whole daemon through the client library. */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "opd/embedded.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

static struct house house;
static opd_client *client;
static opd_error error;

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

/* ---- Short words for long calls ---- */

#define LIST(...) (const char *const[]){__VA_ARGS__}, sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)
#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static float values[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

static opd_request *scale_of(int64_t elements)
{
	opd_request *request = opd_request_create("lab_scale");
	ck_assert_ptr_nonnull(request);
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, elements));
	opd_request_explain(request, true);
	return request;
}

static opd_request *scale_with(int64_t elements, const char *const *providers, size_t count)
{
	opd_request *request = scale_of(elements);
	opd_request_priority(request, providers, count);
	return request;
}

/* Runs and destroys the request; the result is the caller's. */
static opd_result *run_by(opd_client *who, opd_request *request)
{
	opd_result *result = NULL;
	OK(opd_run(who, request, &result, &error));
	opd_request_destroy(request);
	return result;
}

static opd_result *run(opd_request *request)
{
	return run_by(client, request);
}

/* The same for one that must fail; the text is in `error`. */
static void fails(opd_request *request, opd_status expected)
{
	opd_result *result = NULL;
	opd_status status = opd_run(client, request, &result, &error);
	ck_assert_msg(status == expected, "%s instead of %s: %s", opd_status_name(status), opd_status_name(expected),
	              status == OPD_OK ? "" : error.text);
	opd_result_destroy(result);
	opd_request_destroy(request);
}

static void ran(opd_result *result, const char *provider)
{
	ck_assert_str_eq(opd_result_provider(result), provider);
	opd_result_destroy(result);
}

static void says(const char *part)
{
	ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" isn't in \"%s\"", part, error.text);
}

static void skipped(const opd_result *result, uint32_t index, const char *provider, opd_reason_code code, const char *reason)
{
	const opd_explain *explain = opd_result_explain(result);
	ck_assert_ptr_nonnull(explain);
	ck_assert_uint_lt(index, explain->skip_count);
	ck_assert_str_eq(explain->skipped[index].provider, provider);
	ck_assert_int_eq(explain->skipped[index].code, code);
	ck_assert_str_eq(explain->skipped[index].reason, reason);
}

static void joined(const char *const *texts, uint32_t count, char *out, size_t bytes)
{
	out[0] = '\0';
	for (uint32_t i = 0; i < count; i++)
		(void)snprintf(out + strlen(out), bytes - strlen(out), "%s%s", i == 0 ? "" : " ", texts[i]);
}

static void effective_is(const char *expected, const char *level)
{
	const opd_priority *priority;
	char list[256];
	OK(opd_priority_get(client, "lab_scale", &priority, &error));
	joined(priority->effective, priority->effective_count, list, sizeof list);
	ck_assert_str_eq(list, expected);
	ck_assert_str_eq(priority->level, level);
	opd_document_free(priority);
}

static void set(opd_scope scope, const char *op, const char *const *providers, size_t count)
{
	OK(opd_priority_set(client, scope, &(opd_priority_entry){op, providers, count}, &error));
}

static void push(const char *op, const char *const *providers, size_t count)
{
	OK(opd_priority_push(client, &(opd_priority_entry){op, providers, count}, 1, &error));
}

static uint32_t op_count(void)
{
	const opd_op_list *ops;
	OK(opd_ops(client, &ops, &error));
	uint32_t count = ops->count;
	opd_document_free(ops);
	return count;
}

/* ---- Ops ---- */

START_TEST(promise_4_a_fake_run_gives_shapes_and_moves_and_shows_no_data)
{
	opd_request *request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand),
	                                  .dtype = OPD_f32,
	                                  .rank = 2,
	                                  .source = OPD_FROM_NOTHING,
	                                  .shape = (int64_t[]){1 << 20, 1 << 20}});
	opd_request_mode(request, OPD_MODE_FAKE);
	opd_result *result = run(request);
	ck_assert_uint_eq(opd_result_count(result), 1);
	ck_assert_int_eq(opd_result_tensor(result, 0)->dtype, OPD_f32);
	ck_assert_int_eq(opd_result_tensor(result, 0)->shape[1], 1 << 20);
	ck_assert_ptr_null(opd_result_tensor(result, 0)->data);
	ck_assert_str_eq(opd_result_provider(result), "");
	opd_result_destroy(result);
	ck_assert_uint_eq(lab_counts.shapes, 1);
	ck_assert_uint_eq(lab_counts.runs, 0);
	ck_assert_uint_eq(house_log_count(&house, "priority not set", NULL), 0);
}
END_TEST

START_TEST(promise_4_another_shape_function_takes_effect_at_once_and_cached_plans_drop)
{
	const char *const planner[] = {"planner"};
	ran(run(scale_with(8, planner, 1)), "planner");
	ran(run(scale_with(8, planner, 1)), "planner");
	ck_assert_uint_eq(lab_counts.plans, 1);
	OK(registry_set_shape(house.server->registry, "lab_scale", lab_shape_longer, &error));
	opd_request *fake = scale_of(8);
	opd_request_mode(fake, OPD_MODE_FAKE);
	opd_result *result = run(fake);
	ck_assert_int_eq(opd_result_tensor(result, 0)->shape[0], 9);
	opd_result_destroy(result);
	fails(scale_with(8, planner, 1), OPD_INTERNAL);
	ck_assert_uint_eq(lab_counts.plans, 2);
	OK(registry_set_shape(house.server->registry, "lab_scale", lab_scale.shape, &error));
	ran(run(scale_with(8, planner, 1)), "planner");
}
END_TEST

/* Every shape function of the catalogue, replaced by one of another opinion. */
static opd_shape_fn real_shape;

static opd_status longer_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *failure)
{
	opd_status status = real_shape(op, call, outputs, failure);
	if (status == OPD_OK && outputs[0]->rank > 0)
		outputs[0]->shape[outputs[0]->rank - 1]++;
	else if (status == OPD_OK)
		outputs[0]->shape[outputs[0]->rank++] = 2;
	return status;
}

static opd_status other_dtype(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *failure)
{
	opd_status status = real_shape(op, call, outputs, failure);
	outputs[0]->dtype = outputs[0]->dtype == OPD_f32 ? OPD_i32 : OPD_f32;
	return status;
}

static opd_request *generated(const char *op, opd_dtype dtype)
{
	opd_request *request = NULL;
	const opd_generate_options options = {.struct_bytes = sizeof options, .dtype = dtype, .seed = 7};
	if (opd_generate(client, op, &options, &request, &error) == OPD_OK)
		return request;
	return NULL;
}

static opd_request *generated_any(const char *op)
{
	static const opd_dtype dtypes[] = {OPD_f32, OPD_bf16, OPD_f8_e4m3fn, OPD_i8};
	opd_request *request = NULL;
	for (size_t i = 0; request == NULL && i < sizeof dtypes / sizeof dtypes[0]; i++)
		request = generated(op, dtypes[i]);
	ck_assert_msg(request != NULL, "%s: %s", op, error.text);
	return request;
}

static void writes_no_other_shape(const struct op *op, const struct impl *impl, opd_shape_fn wrong)
{
	opd_request *request = generated_any(op->schema->name);
	opd_request_priority(request, &impl->provider->name, 1);
	real_shape = op->shape;
	OK(registry_set_shape(house.server->registry, op->schema->name, wrong, &error));
	opd_result *result = NULL;
	opd_status status = opd_run(client, request, &result, &error);
	OK(registry_set_shape(house.server->registry, op->schema->name, real_shape, &error));
	ck_assert_msg(status == OPD_INTERNAL, "%s.%s: %s", impl->provider->name, op->schema->name, opd_status_name(status));
	opd_result_destroy(result);
	opd_request_destroy(request);
}

/* Hardening: providers-shape */
START_TEST(promise_4_an_implementation_that_would_write_another_shape_fails_with_internal)
{
	struct snapshot *snapshot = registry_snapshot(house.server->registry);
	uint32_t tried = 0;
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		const struct op *op = &snapshot->ops[i];
		if (strncmp(op->schema->name, "lab_", 4) == 0)
			continue;
		for (uint32_t k = 0; k < op->impl_count; k++) {
			if (!op->impls[k]->supported)
				continue;
			writes_no_other_shape(op, op->impls[k], longer_shape);
			writes_no_other_shape(op, op->impls[k], other_dtype);
			tried++;
		}
	}
	snapshot_unref(snapshot);
	ck_assert_uint_ge(tried, 27);
}
END_TEST

/* Hardening: providers-overrun */
START_TEST(promise_4_checked_mode_finds_a_kernel_that_writes_past_the_end)
{
	fails(scale_with(16, LIST("spills")), OPD_INTERNAL);
	says("spills.lab_scale wrote past the end of result 0, at byte 64 of 64");
	ran(run(scale_with(16, LIST("plain"))), "plain");
	opd_request *retry = scale_with(16, LIST("spills", "plain"));
	opd_request_retry(retry, true);
	ran(run(retry), "plain");
}
END_TEST

static void prints_schema(opd_request *request, const char *schema)
{
	opd_result *result = NULL;
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_INVALID_ARGUMENT);
	says(schema);
	opd_result_destroy(result);
	opd_request_destroy(request);
}

START_TEST(promise_5_every_op_prints_its_whole_schema_in_binding_errors)
{
	const opd_op_list *ops;
	OK(opd_ops(client, &ops, &error));
	for (uint32_t i = 0; i < ops->count; i++) {
		opd_request *request = opd_request_create(ops->ops[i].name);
		opd_request_int(request, "no_such_parameter", 1);
		prints_schema(request, ops->ops[i].schema);
		prints_schema(opd_request_create(ops->ops[i].name), ops->ops[i].schema); /* its first is missing */
		request = opd_request_create(ops->ops[i].name);
		for (int k = 0; k < 40; k++)
			opd_request_int(request, NULL, k);
		prints_schema(request, ops->ops[i].schema);
	}
	opd_document_free(ops);
}
END_TEST

START_TEST(promise_6_an_op_is_listed_described_and_printed)
{
	const opd_op_description *op;
	char list[256];
	ck_assert_uint_ge(op_count(), 27);
	set(OPD_SCOPE_SESSION, "lab_scale", LIST("even_only"));
	OK(opd_describe(client, "lab_scale", &op, &error));
	ck_assert_str_eq(op->schema, LAB_SCALE);
	ck_assert_str_eq(op->doc, "y = factor * x");
	joined(op->effective, op->effective_count, list, sizeof list);
	ck_assert_str_eq(list, "even_only native");
	ck_assert_str_eq(op->level, "session");
	ck_assert_uint_eq(op->implementation_count, 10);
	ck_assert_str_eq(op->implementations[0].provider, "native");
	for (uint32_t i = 0; i < op->implementation_count; i++) {
		const opd_implementation *impl = &op->implementations[i];
		bool absent = strcmp(impl->provider, "absent") == 0;
		ck_assert_uint_eq(strlen(impl->uuid), 64);
		ck_assert(impl->supported == !absent);
		ck_assert_str_eq(impl->reason, absent ? "needs a flux capacitor" : "");
		ck_assert(impl->plan_may_refuse == (strcmp(impl->provider, "planner") == 0));
	}
	opd_document_free(op);
	ck_assert_int_eq(opd_describe(client, "no_such_op", &op, &error), OPD_NOT_FOUND);
	says("no op \"no_such_op\"");
}
END_TEST

/* ---- Implementations ---- */

START_TEST(promise_13_a_refusal_has_a_code_and_a_detail)
{
	opd_result *result = run(scale_with(3, LIST("even_only", "native")));
	skipped(result, 0, "even_only", OPD_REASON_SHAPE, "shape: x has 3 elements, an odd number");
	ran(result, "native");
}
END_TEST

/* SHA-256 by coreutils over the sources of one family, in the order that the build names. */
static void sha256_of(const char *sources, char *out)
{
	char command[2000];
	(void)snprintf(command, sizeof command, "cd '%s/../providers' && cat %s | sha256sum", OPD_TESTS_DIR, sources);
	FILE *pipe = popen(command, "r");
	ck_assert_ptr_nonnull(pipe);
	ck_assert_uint_eq(fread(out, 1, 64, pipe), 64);
	out[64] = '\0';
	ck_assert_int_eq(pclose(pipe), 0);
}

static void uuid_is(const char *op_name, const char *provider, const char *sources)
{
	const opd_op_description *op;
	char expected[65];
	bool found = false;
	sha256_of(sources, expected);
	OK(opd_describe(client, op_name, &op, &error));
	for (uint32_t i = 0; i < op->implementation_count; i++) {
		if (strcmp(op->implementations[i].provider, provider) == 0) {
			ck_assert_str_eq(op->implementations[i].uuid, expected);
			found = true;
		}
	}
	opd_document_free(op);
	ck_assert(found);
	opd_request *request = generated_any(op_name);
	opd_request_priority(request, &provider, 1);
	opd_request_uuid(request, true);
	opd_result *result = run(request);
	ck_assert_str_eq(opd_result_uuid(result), expected);
	ran(result, provider);
}

START_TEST(promise_14_uuid_is_the_sha256_of_the_sources_and_comes_with_results_that_ask)
{
	uuid_is("relu", "native", "ops/activation.c ops/kernel.c ops/kernel.h ../proto/element.c");
	uuid_is("rms_norm", "native", "ops/norm.c ops/kernel.c ops/kernel.h ../proto/element.c");
	opd_result *result = run(scale_with(3, LIST("plain")));
	ck_assert_str_eq(opd_result_uuid(result), "");
	opd_result_destroy(result);
}
END_TEST

/* ---- Priority ---- */

START_TEST(promise_15_the_nearest_level_wins_whole_and_an_ops_own_entry_beats_the_star)
{
	effective_is("native", "none");
	OK(registry_set_priority(house.server->registry, MSG_LEVEL_CONFIGURATION, "*", (const char *const[]){"older"}, 1, &error));
	effective_is("older native", "configuration");
	OK(registry_set_priority(house.server->registry, MSG_LEVEL_CONFIGURATION, "lab_scale", (const char *const[]){"breaks"}, 1,
	                         &error));
	effective_is("breaks native", "configuration");
	set(OPD_SCOPE_SERVER, "*", LIST("picky"));
	effective_is("picky native", "server");
	set(OPD_SCOPE_SERVER, "lab_scale", LIST("plain"));
	effective_is("plain", "server");
	set(OPD_SCOPE_SESSION, "*", LIST("even_only"));
	effective_is("even_only native", "session");
	set(OPD_SCOPE_SESSION, "lab_scale", LIST("planner"));
	effective_is("planner native", "session");
	push("lab_wait", LIST("native")); /* says nothing of lab_scale: the map below does */
	effective_is("planner native", "session");
	push("lab_scale", LIST("even_only", "plain"));
	effective_is("even_only plain", "session");
	ran(run(scale_of(2)), "even_only");
	opd_result *result = run(scale_with(2, LIST("plain")));
	ck_assert_str_eq(opd_result_explain(result)->level, "request");
	ran(result, "plain");
	OK(opd_priority_pop(client, &error));
	OK(opd_priority_pop(client, &error));
	effective_is("planner native", "session");
	ck_assert_int_eq(opd_priority_pop(client, &error), OPD_FAILED_PRECONDITION);
	OK(opd_priority_clear(client, OPD_SCOPE_SESSION, "lab_scale", &error));
	effective_is("even_only native", "session");
	OK(opd_priority_clear(client, OPD_SCOPE_SESSION, "*", &error));
	effective_is("plain", "server");
	OK(opd_priority_clear(client, OPD_SCOPE_SERVER, "lab_scale", &error));
	effective_is("picky native", "server");
	OK(opd_priority_clear(client, OPD_SCOPE_SERVER, "*", &error));
	effective_is("breaks native", "configuration");
}
END_TEST

START_TEST(promise_15_a_disconnect_drops_the_sessions_lists)
{
	push("lab_scale", LIST("plain"));
	opd_close(client);
	client = house_client(&house);
	effective_is("native", "none");
}
END_TEST

/* Hardening: sessions-list-changed */
START_TEST(promise_15_a_list_changed_later_leaves_requests_in_flight_alone)
{
	opd_ticket waiting;
	opd_ticket scaled;
	opd_result *result;
	push("lab_scale", LIST("plain"));
	opd_request *gate = opd_request_create("lab_wait");
	opd_request_tensor(gate, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 4));
	opd_request_output(gate, 0, true, false);
	OK(opd_submit(client, gate, &waiting, &error));
	opd_request *request = opd_request_create("lab_scale"); /* waits for the gate's result */
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = waiting});
	OK(opd_submit(client, request, &scaled, &error));
	OK(opd_priority_pop(client, &error));
	push("lab_scale", LIST("even_only", "native"));
	lab_gate(true);
	OK(opd_wait(client, scaled, UINT64_MAX, &result, &error));
	ran(result, "plain");
	OK(opd_run(client, request, &result, &error));
	ran(result, "even_only");
	OK(opd_wait(client, waiting, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(gate);
	opd_request_destroy(request);
}
END_TEST

START_TEST(promise_16_a_list_may_name_only_providers_of_the_op_else_nothing_changes)
{
	push("lab_scale", LIST("plain"));
	const opd_priority_entry unknown = {"lab_scale", (const char *const[]){"even_only", "nobody"}, 2};
	ck_assert_int_eq(opd_priority_set(client, OPD_SCOPE_SESSION, &unknown, &error), OPD_NOT_FOUND);
	says("priority for lab_scale: \"nobody\" is no provider of it (there are: native,"); /* and what the default lists name beside */
	says("even_only, plain,");
	const opd_priority_entry other = {"lab_scale", (const char *const[]){"cpu"}, 1}; /* a provider, but not of this op */
	ck_assert_int_eq(opd_priority_set(client, OPD_SCOPE_SERVER, &other, &error), OPD_NOT_FOUND);
	const opd_priority_entry maps[] = {{"lab_scale", (const char *const[]){"even_only"}, 1},
	                                   {"*", (const char *const[]){"nobody"}, 1}};
	ck_assert_int_eq(opd_priority_push(client, maps, 2, &error), OPD_NOT_FOUND);
	const opd_priority_entry none = {"no_such_op", (const char *const[]){"native"}, 1};
	ck_assert_int_eq(opd_priority_set(client, OPD_SCOPE_SESSION, &none, &error), OPD_NOT_FOUND);
	const opd_priority_entry nameless = {"", (const char *const[]){"plain"}, 1};
	ck_assert_int_eq(opd_priority_set(client, OPD_SCOPE_SERVER, &nameless, &error), OPD_NOT_FOUND);
	const opd_priority_entry empty = {"lab_scale", (const char *const[]){""}, 1};
	ck_assert_int_eq(opd_priority_set(client, OPD_SCOPE_SESSION, &empty, &error), OPD_NOT_FOUND);
	effective_is("plain", "session");
	fails(scale_with(4, LIST("nobody")), OPD_NOT_FOUND);
	OK(opd_priority_pop(client, &error));
	effective_is("native", "none");
}
END_TEST

START_TEST(promise_16_a_star_list_names_providers_of_any_op_and_passes_over_those_without_this_one)
{
	push("*", LIST("cpu", "even_only", "plain"));
	opd_result *result = run(scale_of(3));
	skipped(result, 0, "cpu", OPD_REASON_NO_IMPLEMENTATION, "no implementation: lab_scale");
	skipped(result, 1, "even_only", OPD_REASON_SHAPE, "shape: x has 3 elements, an odd number");
	ran(result, "plain");
	const opd_priority_entry opless = {"*", (const char *const[]){"lab"}, 1}; /* owns ops, implements none */
	ck_assert_int_eq(opd_priority_push(client, &opless, 1, &error), OPD_NOT_FOUND);
	says("priority for *: \"lab\" is no provider of any op");
}
END_TEST

START_TEST(promise_17_statically_unsupported_names_are_dropped_and_the_answer_says_why)
{
	opd_result *result = run(scale_with(4, LIST("absent", "plain")));
	skipped(result, 0, "absent", OPD_REASON_PLATFORM, "platform: needs a flux capacitor");
	ran(result, "plain");
	ck_assert_uint_eq(house_log_count(&house, "warn", NULL), 0);
}
END_TEST

static void cut_is(const char *const *providers, size_t count, const char *expected)
{
	char list[256];
	opd_result *result = run(scale_with(4, providers, count));
	const opd_explain *explain = opd_result_explain(result);
	joined(explain->effective, explain->effective_count, list, sizeof list);
	ck_assert_str_eq(list, expected);
	opd_result_destroy(result);
}

START_TEST(promise_18_the_list_is_cut_right_after_the_first_that_supports_all_arguments)
{
	cut_is(LIST("even_only", "plain", "planner"), "even_only plain");
	cut_is(LIST("even_only", "native", "plain"), "even_only native");
	cut_is(LIST("planner", "plain", "native"), "planner plain");
	cut_is(LIST("older", "plain", "native"), "older plain"); /* a prefix of the schema is no support of all arguments */
	cut_is(LIST("older"), "older native");
	cut_is(LIST("plain", "plain"), "plain");
	cut_is(LIST("even_only", "even_only"), "even_only native");
	cut_is(LIST("absent", "plain"), "plain");
}
END_TEST

START_TEST(promise_18_a_device_filters_the_list_first_native_included)
{
	opd_request *request = scale_with(4, LIST("plain", "toy", "native"));
	opd_request_device(request, "toy:1");
	opd_result *result = run(request);
	skipped(result, 0, "plain", OPD_REASON_DEVICE, "device: wanted toy:1");
	ck_assert_str_eq(opd_result_explain(result)->device, "toy:1");
	ck_assert_uint_eq(opd_result_explain(result)->effective_count, 1);
	ck_assert_uint_eq(opd_result_explain(result)->move_count, 2);
	ck_assert_str_eq(opd_result_explain(result)->moves[0].operand, "x");
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[3], 8);
	ran(result, "toy");
	request = scale_with(4, LIST("plain"));
	opd_request_device(request, "toy");
	fails(request, OPD_FAILED_PRECONDITION);
	says("plain (device: wanted toy)");
	says("native (device: wanted toy)");
	says("; not on it: ");
	ck_assert_ptr_nonnull(strstr(strstr(error.text, "; not on it: "), "toy"));
	ck_assert_ptr_null(strstr(strstr(error.text, "; not on it: "), "even_only")); /* it has the op, on another device */
	request = scale_of(4);
	opd_request_device(request, "toy:7");
	fails(request, OPD_FAILED_PRECONDITION);
	says("native (device: wanted toy:7)");
	request = scale_with(4, LIST("toy"));
	opd_request_device(request, "cpu");
	result = run(request);
	skipped(result, 0, "toy", OPD_REASON_DEVICE, "device: wanted cpu");
	ran(result, "native");
	request = scale_of(4);
	opd_request_device(request, "toy:x");
	fails(request, OPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(promise_19_a_possible_fallback_warns_once_an_op_and_stored_list)
{
	const char *event = "falling back to native is possible";
	for (int i = 0; i < 3; i++) {
		push("lab_scale", LIST("even_only"));
		ran(run(scale_of(2)), "even_only");
		ran(run(scale_of(3)), "native");
		effective_is("even_only native", "session");
		ck_assert_uint_eq(house_log_count(&house, event, "op=lab_scale"), (size_t)i + 1); /* another list each time */
		OK(opd_priority_pop(client, &error));
	}
	ck_assert_uint_eq(house_log_count(&house, "add native to the list to silence this", "level=session"), 3);
	set(OPD_SCOPE_SERVER, "lab_scale", LIST("even_only"));
	for (int i = 0; i < 3; i++) {
		opd_client *other = house_client(&house); /* the list is the server's, not the session's */
		ran(run_by(other, scale_of(2)), "even_only");
		opd_close(other);
		ck_assert_uint_eq(house_log_count(&house, event, "level=server"), 1);
	}
	set(OPD_SCOPE_SERVER, "lab_wait", LIST("native")); /* another snapshot, the same list */
	ran(run(scale_of(2)), "even_only");
	ck_assert_uint_eq(house_log_count(&house, event, "level=server"), 1);
	push("lab_scale", LIST("even_only", "native"));
	ran(run(scale_of(3)), "native");
	ck_assert_uint_eq(house_log_count(&house, event, NULL), 4);
}
END_TEST

START_TEST(promise_19_warnings_for_lists_in_requests_are_limited)
{
	opd_client *direct = house_direct_client(&house);
	for (int i = 0; i < 50; i++) {
		ran(run(scale_with(3, LIST("even_only"))), "native");
		OK(opd_direct_begin(direct, &error));
		ran(run_by(direct, scale_with(3, LIST("even_only"))), "native");
		opd_direct_end(direct);
	}
	opd_close(direct);
	size_t lines = house_log_count(&house, "falling back to native is possible", "level=request");
	ck_assert_uint_ge(lines, 10);
	ck_assert_uint_le(lines, 20); /* ten a minute, and a minute may end just now */
}
END_TEST

START_TEST(promise_20_get_priority_returns_the_effective_list)
{
	const opd_priority *priority;
	set(OPD_SCOPE_SESSION, "lab_scale", LIST("even_only"));
	effective_is("even_only native", "session");
	set(OPD_SCOPE_SESSION, "lab_scale", LIST("absent", "plain"));
	effective_is("plain", "session");
	OK(opd_priority_get(client, "lab_scale", &priority, &error));
	ck_assert_uint_eq(priority->stored_count, 2);
	ck_assert_str_eq(priority->stored[0], "absent");
	opd_document_free(priority);
	ck_assert_int_eq(opd_priority_get(client, "no_such_op", &priority, &error), OPD_NOT_FOUND);
}
END_TEST

/* Hardening: sessions-list-unsupported */
START_TEST(promise_21_an_empty_list_and_one_of_unsupported_names_become_native_with_a_warning)
{
	const char *event = "priority list is empty or has only unsupported providers";
	OK(opd_priority_set(client, OPD_SCOPE_SESSION, &(opd_priority_entry){"lab_scale", NULL, 0}, &error));
	effective_is("native", "session"); /* not "none" */
	ran(run(scale_of(2)), "native");
	ran(run(scale_of(2)), "native");
	ck_assert_uint_eq(house_log_count(&house, event, "op=lab_scale"), 1);
	set(OPD_SCOPE_SESSION, "lab_scale", LIST("absent"));
	effective_is("native", "session");
	ran(run(scale_of(2)), "native");
	ck_assert_uint_eq(house_log_count(&house, event, "op=lab_scale"), 2);
	opd_request *request = scale_of(2);
	opd_request_priority(request, NULL, 0);
	opd_result *result = run(request);
	ck_assert_str_eq(opd_result_explain(result)->level, "request");
	ran(result, "native");
	ck_assert_uint_eq(house_log_count(&house, event, "level=request"), 1);
	ck_assert_uint_eq(house_log_count(&house, "priority not set", NULL), 0);
}
END_TEST

START_TEST(promise_22_without_a_list_native_runs_and_a_warning_says_so_once_an_op)
{
	for (int i = 0; i < 3; i++) {
		opd_client *other = house_client(&house);
		opd_result *result = run_by(other, scale_of(2));
		ck_assert_str_eq(opd_result_explain(result)->level, "none");
		ran(result, "native");
		opd_close(other);
	}
	ck_assert_uint_eq(house_log_count(&house, "priority not set, using native", "op=lab_scale"), 1);
	opd_request *relu = generated_any("relu");
	ran(run(relu), "native");
	ck_assert_uint_eq(house_log_count(&house, "priority not set, using native", "op=relu"), 1);
	ck_assert_uint_eq(house_log_count(&house, "priority not set, using native", NULL), 2);
}
END_TEST

struct tenant {
	pthread_t thread;
	const char *provider; /* that its session asks for */
	uint32_t wrong;
};

/* No assertion on threads of our own: the test's thread looks at `wrong`. */
static void *run_tenant(void *argument)
{
	struct tenant *tenant = argument;
	opd_client *mine = NULL;
	opd_error failure;
	tenant->wrong += opd_connect(house.address, NULL, &mine, &failure) != OPD_OK;
	for (int i = 0; mine != NULL && i < 150; i++) {
		const opd_priority_entry entry = {"lab_scale", &tenant->provider, 1};
		tenant->wrong += opd_priority_push(mine, &entry, 1, &failure) != OPD_OK;
		for (int k = 0; k < 4; k++) {
			opd_request *request = scale_of(4);
			opd_result *result = NULL;
			tenant->wrong += opd_run(mine, request, &result, &failure) != OPD_OK;
			tenant->wrong += result == NULL || strcmp(opd_result_provider(result), tenant->provider) != 0;
			opd_result_destroy(result);
			opd_request_destroy(request);
		}
		tenant->wrong += opd_priority_pop(mine, &failure) != OPD_OK;
	}
	opd_close(mine);
	return NULL;
}

START_TEST(promise_23_sessions_do_not_see_each_others_lists_under_load)
{
	static const char *const providers[] = {"plain", "even_only", "planner", "older", "picky", "native"};
	struct tenant tenants[6] = {0};
	for (size_t i = 0; i < 6; i++) {
		tenants[i].provider = providers[i];
		ck_assert_int_eq(pthread_create(&tenants[i].thread, NULL, run_tenant, &tenants[i]), 0);
	}
	for (int i = 0; i < 60; i++) { /* the registry changes under them all the while */
		const char *const list[] = {i % 2 == 0 ? "plain" : "native"};
		OK(registry_set_priority(house.server->registry, MSG_LEVEL_SERVER, "lab_scale", list, 1, &error));
		ran(run(scale_of(4)), list[0]);
	}
	for (size_t i = 0; i < 6; i++) {
		ck_assert_int_eq(pthread_join(tenants[i].thread, NULL), 0);
		ck_assert_msg(tenants[i].wrong == 0, "%s: %u wrong", tenants[i].provider, tenants[i].wrong);
	}
}
END_TEST

static opd_request *strictly(opd_request *request)
{
	opd_request_strict(request, true);
	return request;
}

START_TEST(promise_24_a_strict_request_refuses_fallback_and_tells_every_reason)
{
	fails(strictly(scale_of(4)), OPD_FAILED_PRECONDITION);
	says("no priority is set for lab_scale");
	fails(strictly(scale_with(9, LIST("absent", "even_only", "planner"))), OPD_FAILED_PRECONDITION);
	says("absent (platform: needs a flux capacitor)");
	says("even_only (shape: x has 9 elements, an odd number)");
	says("planner (size: x has 9 elements, at most 8)");
	fails(strictly(scale_with(9, LIST("absent"))), OPD_FAILED_PRECONDITION);
	says("absent (platform: needs a flux capacitor)");
	opd_request *empty = scale_of(4);
	opd_request_priority(empty, NULL, 0);
	fails(strictly(empty), OPD_FAILED_PRECONDITION);
	says("the list is empty");
	opd_result *result = run(strictly(scale_with(4, LIST("absent", "even_only"))));
	skipped(result, 0, "absent", OPD_REASON_PLATFORM, "platform: needs a flux capacitor");
	ck_assert_uint_eq(opd_result_explain(result)->effective_count, 1); /* nothing was appended */
	ran(result, "even_only");
	ran(run(strictly(scale_with(3, LIST("even_only", "native")))), "native");
	ck_assert_uint_eq(house_log_count(&house, "warn", NULL), 0);
}
END_TEST

START_TEST(promise_24_a_failed_strict_request_still_carries_its_explain)
{
	opd_request *request = strictly(scale_with(3, LIST("even_only")));
	opd_result *result = NULL;
	ck_assert_int_eq(opd_run(client, request, &result, &error), OPD_FAILED_PRECONDITION);
	ck_assert_ptr_nonnull(result);
	skipped(result, 0, "even_only", OPD_REASON_SHAPE, "shape: x has 3 elements, an odd number");
	opd_result_destroy(result);
	opd_request_destroy(request);
}
END_TEST

/* ---- Dispatch ---- */

START_TEST(promise_25_the_first_whose_predicate_accepts_runs)
{
	ran(run(scale_with(8, LIST("planner", "even_only", "plain"))), "planner");
	ran(run(scale_with(10, LIST("planner", "even_only", "plain"))), "even_only");
	opd_result *result = run(scale_with(11, LIST("planner", "even_only", "plain")));
	skipped(result, 0, "planner", OPD_REASON_SIZE, "size: x has 11 elements, at most 8");
	skipped(result, 1, "even_only", OPD_REASON_SHAPE, "shape: x has 11 elements, an odd number");
	ran(result, "plain");
	opd_request *request = scale_with(4, LIST("older", "plain"));
	opd_request_int(request, "mode", 3);
	result = run(request);
	skipped(result, 0, "older", OPD_REASON_SCHEMA, "schema: mode not known");
	ran(result, "plain");
	request = scale_with(4, LIST("older", "plain"));
	opd_request_none(request, "mode"); /* its default, said aloud */
	ran(run(request), "older");
	ran(run(scale_with(4, LIST("toy"))), "toy"); /* moving the operands is no refusal */
}
END_TEST

START_TEST(promise_26_refusals_are_logged_at_debug_level_and_formatted_only_there)
{
	for (int i = 0; i < 3; i++) {
		opd_request *request = scale_with(3, LIST("even_only", "native"));
		opd_request_explain(request, false);
		ran(run(request), "native");
	}
	ck_assert_uint_eq(lab_counts.predicates, 3);
	ck_assert_uint_eq(lab_counts.reasons, 0);
	ck_assert_uint_eq(house_log_count(&house, "provider skipped", NULL), 0);
	OK(opd_set_log_level(client, "debug", &error));
	opd_request *request = scale_with(3, LIST("even_only", "native"));
	opd_request_explain(request, false);
	ran(run(request), "native");
	ck_assert_uint_eq(lab_counts.reasons, 1);
	ck_assert_uint_eq(
	    house_log_count(&house, "provider skipped provider=even_only op=lab_scale reason=shape", "arguments=\"x f32[3]\""), 1);
	for (int i = 0; i < 1500; i++) {
		request = scale_with(3, LIST("even_only", "native"));
		opd_request_explain(request, false);
		ran(run(request), "native");
	}
	ck_assert_uint_le(house_log_count(&house, "provider skipped", NULL), 1200); /* 600 a minute; a minute may have ended */
	OK(opd_set_log_level(client, "warn", &error));
}
END_TEST

START_TEST(promise_27_a_module_that_comes_later_takes_its_place_in_stored_lists)
{
	opd_close(client);
	house_stop(&house);
	house_start(&house, (const char *const[]){"module", "missing=/nowhere/opd-provider-missing.so", NULL});
	client = house_client(&house);
	set(OPD_SCOPE_SESSION, "*", LIST("missing", "plain"));
	set(OPD_SCOPE_SESSION, "lab_scale", LIST("missing", "plain"));
	opd_result *result = run(scale_of(4));
	ck_assert_uint_eq(opd_result_explain(result)->skip_count, 1);
	skipped(result, 0, "missing", OPD_REASON_MODULE, "module: /nowhere/opd-provider-missing.so: No such file or directory");
	ran(result, "plain");
	opd_module module = *lab_modules[2]; /* plain, under the missing name */
	module.name = "missing";
	OK(registry_open_builtin(house.server->registry, &module, &error));
	result = run(scale_of(4));
	ck_assert_uint_eq(opd_result_explain(result)->skip_count, 0);
	ran(result, "missing");
	opd_close(client);
	house_stop(&house); /* while `module` is in scope */
	open_house();
}
END_TEST

START_TEST(promise_27_a_request_dispatched_earlier_keeps_its_snapshot)
{
	opd_ticket ticket;
	opd_result *result;
	opd_request *gate = opd_request_create("lab_wait");
	opd_request_tensor(gate, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 4));
	OK(opd_submit(client, gate, &ticket, &error));
	house_await_count(&lab_counts.waiting, 1);
	for (int i = 0; i < 5; i++)
		OK(registry_set_shape(house.server->registry, "lab_wait", lab_shape_longer, &error));
	ran(run(scale_of(4)), "native");
	lab_gate(true);
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert_int_eq(opd_result_tensor(result, 0)->shape[0], 4);
	ran(result, "native");
	opd_request_destroy(gate);
}
END_TEST

/* Hardening: promise-one-outcome, providers-fails */
START_TEST(promise_28_a_kernels_failure_is_the_requests_unless_it_allows_another_try)
{
	fails(scale_with(4, LIST("breaks", "plain")), OPD_INTERNAL);
	says("breaks: it always does");
	opd_request *request = scale_with(4, LIST("breaks", "plain"));
	opd_request_retry(request, true);
	opd_result *result = run(request);
	skipped(result, 0, "breaks", OPD_REASON_NONE, "none: accepted, but its kernel failed");
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[1],
	                   4); /* nothing of the failed one is left */
	ran(result, "plain");
	request = scale_with(4, LIST("breaks"));
	opd_request_retry(request, true);
	ran(run(request), "native");
	request = strictly(scale_with(4, LIST("breaks")));
	opd_request_retry(request, true);
	fails(request, OPD_INTERNAL); /* nobody else is left: the kernel's own words */
	says("breaks: it always does");
	request = opd_request_create("embedding"); /* a bad argument isn't a failure that another could mend */
	const int64_t ids[] = {99};
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_i64, ids, 1));
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 4, 4));
	opd_request_retry(request, true);
	fails(request, OPD_INVALID_ARGUMENT);
}
END_TEST

static bool runs_on_loop(void)
{
	opd_request *request = opd_request_create("lab_work");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 16));
	opd_request_float(request, "factor", 2);
	opd_request_int(request, "ns", -5000000); /* 5 ms, and 100 ns by its estimate */
	opd_request_explain(request, true);
	opd_result *result = run(request);
	const bool on_loop = opd_result_explain(result)->on_loop;
	ran(result, "native");
	return on_loop;
}

START_TEST(a_kernel_that_takes_too_long_on_the_loop_leaves_it_for_good)
{
	while (runs_on_loop()) /* one in a few is measured */
		;
	for (int i = 0; i < 3; i++)
		ck_assert(!runs_on_loop());
}
END_TEST

START_TEST(promise_29_a_result_names_its_provider_and_explains_on_request)
{
	opd_request *request = scale_with(3, LIST("even_only", "plain"));
	opd_request_explain(request, false);
	opd_result *result = run(request);
	ck_assert_ptr_null(opd_result_explain(result));
	ran(result, "plain");
	lab_gate(true);
	request = opd_request_create("lab_wait");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 16));
	opd_request_explain(request, true);
	result = run(request);
	const opd_explain *explain = opd_result_explain(result);
	ck_assert_str_eq(explain->level, "none");
	ck_assert_str_eq(explain->device, "cpu");
	ck_assert(!explain->on_loop);
	ck_assert_uint_gt(explain->decode_ns, 0);
	ck_assert_uint_gt(explain->kernel_ns, 0);
	ck_assert_uint_gt(explain->queue_ns, 0);
	ck_assert_uint_gt(explain->pack_ns, 0);
	ck_assert_uint_lt(explain->kernel_ns + explain->queue_ns + explain->decode_ns, 5000000000u);
	ran(result, "native");
}
END_TEST

START_TEST(promise_29_a_dry_run_says_what_would_run_plans_included_and_runs_nothing)
{
	const int64_t sizes[] = {8, 10, 11};
	const char *const expected[] = {"planner", "even_only", "native"};
	for (size_t i = 0; i < 3; i++) {
		opd_request *request = scale_with(sizes[i], LIST("planner", "even_only"));
		opd_request_mode(request, OPD_MODE_DRY);
		opd_result *result = run(request);
		ck_assert_ptr_null(opd_result_tensor(result, 0)->data);
		ck_assert_uint_eq(opd_result_explain(result)->skip_count, i);
		ran(result, expected[i]);
	}
	ck_assert_uint_eq(lab_counts.plans, 3);
	ck_assert_uint_eq(lab_counts.runs, 0);
	ran(run(scale_with(8, LIST("planner"))), "planner");
	ck_assert_uint_eq(lab_counts.plans, 3); /* the dry run's plan serves */
}
END_TEST

/* ---- In place ---- */

START_TEST(promise_31_kept_inputs_are_unchanged_bit_for_bit_and_outputs_are_fresh)
{
	const opd_op_list *ops;
	uint32_t checked = 0;
	OK(opd_ops(client, &ops, &error));
	for (uint32_t i = 0; i < ops->count; i++) {
		const opd_generate_options options = {.struct_bytes = sizeof options, .dtype = OPD_f32, .seed = 3, .keep = true};
		opd_request *kept;
		if (strcmp(ops->ops[i].name, "lab_types") == 0 ||
		    opd_generate(client, ops->ops[i].name, &options, &kept, &error) != OPD_OK)
			continue;
		lab_gate(true);
		/* The same inputs twice: had the first run changed one, the second's bits would show it. */
		opd_result *first = NULL;
		opd_result *second = NULL;
		OK(opd_run(client, kept, &first, &error));
		OK(opd_run(client, kept, &second, &error));
		for (uint32_t k = 0; k < opd_result_count(first); k++) {
			const opd_tensor *a = opd_result_tensor(first, k);
			const opd_tensor *b = opd_result_tensor(second, k);
			ck_assert_mem_eq(opd_tensor_data(a), opd_tensor_data(b), a->elements * opd_dtype_bytes(a->dtype));
		}
		opd_result_destroy(first);
		opd_result_destroy(second);
		opd_request_destroy(kept);
		checked++;
	}
	opd_document_free(ops);
	ck_assert_uint_ge(checked, 24);
}
END_TEST

static opd_result *kept_copy(opd_handle handle)
{
	opd_request *request = opd_request_create("cast");
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle});
	opd_request_str(request, "dtype", "f32");
	opd_request_priority(request, LIST("native"));
	return run(request);
}

START_TEST(promise_31_an_op_with_in_place_pairs_leaves_an_undonated_input_alone)
{
	opd_handle handles[2];
	for (int i = 0; i < 2; i++) {
		opd_request *request = scale_with(16, LIST("plain"));
		opd_request_output(request, 0, true, false);
		opd_result *result = run(request);
		handles[i] = opd_result_handle(result, 0);
		opd_result_destroy(result);
	}
	opd_request *norm = opd_request_create("fused_add_rms_norm");
	for (int i = 0; i < 2; i++)
		opd_request_tensor(norm, NULL,
		                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handles[i]});
	opd_request_none(norm, NULL);
	opd_request_float(norm, "epsilon", 1e-5);
	opd_request_priority(norm, LIST("cpu", "native"));
	opd_result_destroy(run(norm));
	for (int i = 0; i < 2; i++) {
		opd_result *copy = kept_copy(handles[i]);
		for (int k = 0; k < 16; k++)
			ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(copy, 0)))[k], 2 * values[k]);
		opd_result_destroy(copy);
	}
}
END_TEST

/* ---- The direct path ---- */

/* What a run came to, as text, times left out. */
static void outcome(opd_client *who, opd_request *request, char *out, size_t bytes)
{
	opd_result *result = NULL;
	opd_status status = opd_run(who, request, &result, &error);
	(void)snprintf(out, bytes, "%s|%s|", opd_status_name(status), status == OPD_OK ? "" : error.text);
	if (result != NULL) {
		const opd_explain *explain = opd_result_explain(result);
		(void)snprintf(out + strlen(out), bytes - strlen(out), "%s|%s|", opd_result_provider(result), opd_result_uuid(result));
		for (uint32_t i = 0; explain != NULL && i < explain->skip_count; i++)
			(void)snprintf(out + strlen(out), bytes - strlen(out), "%s %s,", explain->skipped[i].provider,
			               explain->skipped[i].reason);
		for (uint32_t i = 0; explain != NULL && i < explain->effective_count; i++)
			(void)snprintf(out + strlen(out), bytes - strlen(out), "%s,", explain->effective[i]);
		for (uint32_t i = 0; i < opd_result_count(result); i++) {
			const opd_tensor *tensor = opd_result_tensor(result, i);
			(void)snprintf(out + strlen(out), bytes - strlen(out), "%s[", opd_dtype_name(tensor->dtype));
			for (uint32_t k = 0; k < tensor->rank; k++)
				(void)snprintf(out + strlen(out), bytes - strlen(out), "%lld,", (long long)tensor->shape[k]);
			const unsigned char *data = tensor->data == NULL ? NULL : opd_tensor_data(tensor);
			uint64_t sum = 1469598103934665603u;
			for (uint64_t k = 0; data != NULL && k < tensor->elements * opd_dtype_bytes(tensor->dtype); k++)
				sum = (sum ^ data[k]) * 1099511628211u;
			(void)snprintf(out + strlen(out), bytes - strlen(out), "]%llx ", (unsigned long long)sum);
		}
	}
	opd_result_destroy(result);
}

/* Encoded, then direct, on the same client. */
static void same_both_ways(opd_client *who, opd_request *request)
{
	char encoded[4000];
	char direct[4000];
	opd_request_uuid(request, true);
	outcome(who, request, encoded, sizeof encoded);
	OK(opd_direct_begin(who, &error));
	outcome(who, request, direct, sizeof direct);
	opd_direct_end(who);
	ck_assert_str_eq(encoded, direct);
	opd_request_destroy(request);
}

static void compare_ways(opd_client *who)
{
	const opd_op_list *ops;
	OK(opd_ops(who, &ops, &error));
	for (uint32_t i = 0; i < ops->count; i++) {
		opd_request *request;
		const opd_generate_options options = {.struct_bytes = sizeof options, .dtype = OPD_f32, .seed = 5};
		if (strcmp(ops->ops[i].name, "lab_types") != 0 &&
		    opd_generate(who, ops->ops[i].name, &options, &request, &error) == OPD_OK) {
			opd_request_explain(request, true);
			same_both_ways(who, request);
		}
		request = opd_request_create(ops->ops[i].name);
		opd_request_int(request, "h\303\244", 1);
		same_both_ways(who, request);
	}
	opd_document_free(ops);
	same_both_ways(who, opd_request_create("no_such_op"));
}

START_TEST(promise_34_results_providers_and_errors_are_the_same_on_the_direct_path)
{
	opd_client *who = house_direct_client(&house);
	lab_gate(true);
	compare_ways(who);
	for (int64_t n = 7; n < 12; n++) {
		same_both_ways(who, scale_with(n, LIST("planner", "even_only", "absent")));
		same_both_ways(who, strictly(scale_with(n, LIST("planner", "even_only", "absent"))));
		same_both_ways(who, strictly(scale_of(n)));
		same_both_ways(who, scale_with(n, LIST("breaks")));
		same_both_ways(who, scale_with(n, LIST("toy")));
		same_both_ways(who, scale_with(n, LIST("nobody")));
		same_both_ways(who, scale_with(n, LIST("spills")));
	}
	opd_close(who);
}
END_TEST

START_TEST(promise_34_a_badly_aligned_operand_is_taken_by_the_same_provider_both_ways)
{
	_Alignas(64) static float memory[32];
	opd_client *who = house_direct_client(&house);
	for (int offset = 0; offset < 16; offset++) {
		opd_request *request = opd_request_create("lab_scale");
		opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, memory + offset, 8));
		opd_request_explain(request, true);
		opd_request_priority(request, LIST("picky", "plain"));
		same_both_ways(who, request);
	}
	opd_close(who);
}
END_TEST

START_TEST(promise_34_scopes_nest_and_only_that_client_is_affected)
{
	opd_client *who = house_direct_client(&house);
	ck_assert_int_eq(opd_direct_begin(client, &error), OPD_FAILED_PRECONDITION); /* over a socket there is no direct path */
	OK(opd_direct_begin(who, &error));
	OK(opd_direct_begin(who, &error));
	ran(run_by(who, scale_with(4, LIST("plain"))), "plain");
	opd_direct_end(who);
	ran(run_by(who, scale_with(4, LIST("plain"))), "plain"); /* still direct */
	ran(run(scale_with(4, LIST("plain"))), "plain");
	opd_direct_end(who);
	ran(run_by(who, scale_with(4, LIST("plain"))), "plain");
	opd_ticket ticket;
	opd_result *result;
	opd_request *gate = opd_request_create("lab_wait");
	opd_request_tensor(gate, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, 4));
	OK(opd_submit(who, gate, &ticket, &error));
	ck_assert_int_eq(opd_direct_begin(who, &error), OPD_FAILED_PRECONDITION);
	lab_gate(true);
	OK(opd_wait(who, ticket, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(gate);
	OK(opd_direct_begin(who, &error));
	opd_direct_end(who);
	opd_close(who);
}
END_TEST

START_TEST(promise_34_kept_tensors_and_lists_of_one_way_hold_on_the_other)
{
	opd_client *who = house_direct_client(&house);
	opd_request *request = scale_with(4, LIST("plain"));
	opd_request_output(request, 0, true, false);
	OK(opd_direct_begin(who, &error));
	opd_result *result = run_by(who, request);
	opd_handle direct = opd_result_handle(result, 0);
	opd_result_destroy(result);
	OK(opd_priority_push(who, &(opd_priority_entry){"lab_scale", (const char *const[]){"even_only"}, 1}, 1, &error));
	ran(run_by(who, scale_of(4)), "even_only");
	opd_direct_end(who);
	ran(run_by(who, scale_of(4)), "even_only");
	request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = direct});
	opd_request_output(request, 0, true, true);
	result = run_by(who, request);
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[3], 16);
	opd_handle encoded = opd_result_handle(result, 0);
	opd_result_destroy(result);
	OK(opd_direct_begin(who, &error));
	OK(opd_priority_pop(who, &error));
	request = opd_request_create("lab_scale");
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = encoded});
	result = run_by(who, request);
	ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 0)))[3], 32);
	OK(opd_free(who, (opd_handle[]){direct, encoded}, 2, &error));
	opd_direct_end(who);
	ran(result, "native");
	opd_close(who);
	house_await_bytes(&house, 0);
}
END_TEST

START_TEST(promise_34_the_embedded_daemon_answers_the_same_both_ways)
{
	opd_client *who;
	opd_embedded_register();
	OK(opd_connect("embedded:", NULL, &who, &error));
	compare_ways(who);
	opd_close(who);
}
END_TEST

/* ---- Tolerances ---- */

START_TEST(promise_35_every_op_has_an_input_generator)
{
	const opd_op_list *ops;
	OK(opd_ops(client, &ops, &error));
	for (uint32_t i = 0; i < ops->count; i++) {
		opd_request_destroy(generated_any(ops->ops[i].name));
		opd_request *request;
		const opd_generate_options past = {.struct_bytes = sizeof past, .dtype = OPD_f32, .variant = 1000};
		opd_status status = opd_generate(client, ops->ops[i].name, &past, &request, &error);
		ck_assert_msg(status == OPD_OUT_OF_RANGE || status == OPD_INVALID_ARGUMENT, "%s: %s", ops->ops[i].name,
		              opd_status_name(status));
	}
	opd_document_free(ops);
}
END_TEST

/* ---- */

static void open_checked(void)
{
	house_start(&house, (const char *const[]){"checked", "true", NULL});
	client = house_client(&house);
}

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
	Suite *suite = suite_create("promises");
	TCase *tests = add_case(suite, "ops", open_house);
	tcase_add_test(tests, promise_4_a_fake_run_gives_shapes_and_moves_and_shows_no_data);
	tcase_add_test(tests, promise_4_another_shape_function_takes_effect_at_once_and_cached_plans_drop);
	tcase_add_test(tests, promise_4_an_implementation_that_would_write_another_shape_fails_with_internal);
	tcase_add_test(tests, promise_5_every_op_prints_its_whole_schema_in_binding_errors);
	tcase_add_test(tests, promise_6_an_op_is_listed_described_and_printed);
	tcase_add_test(tests, promise_13_a_refusal_has_a_code_and_a_detail);
	tcase_add_test(tests, promise_14_uuid_is_the_sha256_of_the_sources_and_comes_with_results_that_ask);
	tests = add_case(suite, "checked", open_checked);
	tcase_add_test(tests, promise_4_checked_mode_finds_a_kernel_that_writes_past_the_end);
	tests = add_case(suite, "priority", open_house);
	tcase_add_test(tests, promise_15_the_nearest_level_wins_whole_and_an_ops_own_entry_beats_the_star);
	tcase_add_test(tests, promise_15_a_disconnect_drops_the_sessions_lists);
	tcase_add_test(tests, promise_15_a_list_changed_later_leaves_requests_in_flight_alone);
	tcase_add_test(tests, promise_16_a_list_may_name_only_providers_of_the_op_else_nothing_changes);
	tcase_add_test(tests, promise_16_a_star_list_names_providers_of_any_op_and_passes_over_those_without_this_one);
	tcase_add_test(tests, promise_17_statically_unsupported_names_are_dropped_and_the_answer_says_why);
	tcase_add_test(tests, promise_18_the_list_is_cut_right_after_the_first_that_supports_all_arguments);
	tcase_add_test(tests, promise_18_a_device_filters_the_list_first_native_included);
	tcase_add_test(tests, promise_19_a_possible_fallback_warns_once_an_op_and_stored_list);
	tcase_add_test(tests, promise_19_warnings_for_lists_in_requests_are_limited);
	tcase_add_test(tests, promise_20_get_priority_returns_the_effective_list);
	tcase_add_test(tests, promise_21_an_empty_list_and_one_of_unsupported_names_become_native_with_a_warning);
	tcase_add_test(tests, promise_22_without_a_list_native_runs_and_a_warning_says_so_once_an_op);
	tcase_add_test(tests, promise_23_sessions_do_not_see_each_others_lists_under_load);
	tcase_add_test(tests, promise_24_a_strict_request_refuses_fallback_and_tells_every_reason);
	tcase_add_test(tests, promise_24_a_failed_strict_request_still_carries_its_explain);
	tests = add_case(suite, "dispatch", open_house);
	tcase_add_test(tests, promise_25_the_first_whose_predicate_accepts_runs);
	tcase_add_test(tests, promise_26_refusals_are_logged_at_debug_level_and_formatted_only_there);
	tcase_add_test(tests, promise_27_a_module_that_comes_later_takes_its_place_in_stored_lists);
	tcase_add_test(tests, promise_27_a_request_dispatched_earlier_keeps_its_snapshot);
	tcase_add_test(tests, promise_28_a_kernels_failure_is_the_requests_unless_it_allows_another_try);
	tcase_add_test(tests, a_kernel_that_takes_too_long_on_the_loop_leaves_it_for_good);
	tcase_add_test(tests, promise_29_a_result_names_its_provider_and_explains_on_request);
	tcase_add_test(tests, promise_29_a_dry_run_says_what_would_run_plans_included_and_runs_nothing);
	tcase_add_test(tests, promise_31_kept_inputs_are_unchanged_bit_for_bit_and_outputs_are_fresh);
	tcase_add_test(tests, promise_31_an_op_with_in_place_pairs_leaves_an_undonated_input_alone);
	tests = add_case(suite, "direct", open_house);
	tcase_add_test(tests, promise_34_results_providers_and_errors_are_the_same_on_the_direct_path);
	tcase_add_test(tests, promise_34_a_badly_aligned_operand_is_taken_by_the_same_provider_both_ways);
	tcase_add_test(tests, promise_34_scopes_nest_and_only_that_client_is_affected);
	tcase_add_test(tests, promise_34_kept_tensors_and_lists_of_one_way_hold_on_the_other);
	tcase_add_test(tests, promise_34_the_embedded_daemon_answers_the_same_both_ways);
	tcase_add_test(tests, promise_35_every_op_has_an_input_generator);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
