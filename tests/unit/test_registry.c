/* What may be registered, and what a failed registration leaves behind: the promises about ops and implementations. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "providers/builtin.h"
#include "server/priority.h"
#include "server/registry.h"
#include "tests/lib/lab.h"

#define LOG_PATH "/tmp/opd-test-registry-XXXXXX"

static char log_path[sizeof LOG_PATH];
static struct log test_log;
static struct registry *registry;
static opd_error error;

static void *allocate(void *context, uint64_t bytes)
{
	(void)context;
	return aligned_alloc(64, (bytes + 64) / 64 * 64);
}

static void give_back(void *context, void *memory)
{
	(void)context;
	free(memory);
}

static void open_registry(void)
{
	const struct registry_services services = {.alloc = allocate, .free = give_back};
	memcpy(log_path, LOG_PATH, sizeof log_path);
	int fd = mkstemp(log_path);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(log_init(&test_log, LOG_WARN, LOG_TEXT, log_path, &error), OPD_OK);
	ck_assert_int_eq(registry_create(&test_log, &services, &registry, &error), OPD_OK);
	ck_assert_int_eq(registry_open_builtin(registry, &native_module, &error), OPD_OK);
	ck_assert_msg(lab_open(registry, &error) == OPD_OK, "%s", error.text);
}

static void close_registry(void)
{
	registry_destroy(registry);
	log_fini(&test_log);
	(void)remove(log_path);
}

/* How many lines of the log hold the text. */
static int logged(const char *text)
{
	char line[2000];
	int count = 0;
	FILE *file = fopen(log_path, "re");
	ck_assert_ptr_nonnull(file);
	while (fgets(line, sizeof line, file) != NULL)
		count += strstr(line, text) != NULL;
	(void)fclose(file);
	return count;
}

/* ---- A module whose open does what the test says ---- */

static opd_status (*on_open)(const opd_host *host, opd_error *failure);
static bool closed;

static opd_status open_as_told(const opd_host *host, void *state, opd_error *failure)
{
	ck_assert_int_eq(((unsigned char *)state)[31], 0);
	return on_open(host, failure);
}

static void close_told(const opd_host *host, void *state)
{
	(void)host;
	(void)state;
	closed = true;
}

static opd_module told = {.abi = OPD_PROVIDER_ABI,
                          .struct_bytes = sizeof told,
                          .name = "told",
                          .version = "1",
                          .state_bytes = 32,
                          .open = open_as_told,
                          .close = close_told};

static opd_op told_op;
static opd_impl told_native; /* of any op that told registers */
static opd_impl told_impl;
static const opd_impl *registered = &told_impl; /* what register_impl registers */

static opd_status register_op(const opd_host *host, opd_error *failure)
{
	return host->register_op(host, &told_op, failure);
}

static opd_status register_impl(const opd_host *host, opd_error *failure)
{
	return host->register_impl(host, registered, failure);
}

static opd_status open_with(opd_status (*what)(const opd_host *, opd_error *))
{
	on_open = what;
	error.text[0] = '\0';
	return registry_open_builtin(registry, &told, &error);
}

static void refuses(opd_status (*what)(const opd_host *, opd_error *), opd_status expected, const char *text)
{
	opd_status status = open_with(what);
	ck_assert_msg(status == expected, "%s instead of %s: %s", opd_status_name(status), opd_status_name(expected), error.text);
	ck_assert_msg(strstr(error.text, text) != NULL, "\"%s\" isn't in \"%s\"", text, error.text);
}

static opd_op op_of(const char *schema)
{
	opd_op op = lab_scale;
	told_native = *lab_scale.native;
	told_native.op = NULL;
	op.schema = schema;
	op.native = &told_native;
	return op;
}

static opd_impl impl_of(const char *schema)
{
	return (opd_impl){.struct_bytes = sizeof(opd_impl),
	                  .op = "lab_scale",
	                  .schema = schema,
	                  .device = "cpu",
	                  .uuid = LAB_UUID,
	                  .run = lab_scale_run};
}

static uint32_t impls_of(const char *name)
{
	struct snapshot *snapshot = registry_snapshot(registry);
	const struct op *op = snapshot_op(snapshot, name, strlen(name));
	uint32_t count = op == NULL ? 0 : op->impl_count;
	snapshot_unref(snapshot);
	return count;
}

/* ---- Ops ---- */

START_TEST(promise_1_an_ops_name_follows_the_rule)
{
	static const char *const good[] = {"a(Tensor x) -> Tensor", "_9(Tensor x) -> Tensor", "rms_norm2(Tensor x) -> Tensor"};
	static const char *const bad[] = {"Rms(Tensor x) -> Tensor",     "9a(Tensor x) -> Tensor",  "a-b(Tensor x) -> Tensor",
	                                  "(Tensor x) -> Tensor",        "a.b(Tensor x) -> Tensor", "a b(Tensor x) -> Tensor",
	                                  "\303\244(Tensor x) -> Tensor"};
	for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
		struct schema *schema;
		ck_assert_msg(schema_parse(good[i], &schema, &error) == OPD_OK, "%s", error.text);
		schema_destroy(schema);
	}
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
		told_op = op_of(bad[i]);
		refuses(register_op, OPD_INVALID_ARGUMENT, "schema \"");
	}
}
END_TEST

START_TEST(promise_1_a_second_op_of_a_taken_name_is_an_error_and_the_first_stays)
{
	told_op = op_of("lab_scale(Tensor other) -> Tensor");
	refuses(register_op, OPD_ALREADY_EXISTS, "op lab_scale is registered already");
	struct snapshot *snapshot = registry_snapshot(registry);
	ck_assert_str_eq(snapshot_op(snapshot, "lab_scale", 9)->schema->text, LAB_SCALE);
	ck_assert_ptr_eq(snapshot_op(snapshot, "lab_scale", 9)->def, &lab_scale);
	ck_assert_ptr_null(snapshot_op(snapshot, "lab_scal", 8));
	ck_assert_ptr_null(snapshot_op(snapshot, "lab_scalex", 10));
	ck_assert_ptr_null(snapshot_op(snapshot, "", 0));
	snapshot_unref(snapshot);
}
END_TEST

static void canonical(const char *text, const char *expected)
{
	struct schema *schema;
	ck_assert_msg(schema_parse(text, &schema, &error) == OPD_OK, "%s", error.text);
	ck_assert_str_eq(schema->text, expected);
	schema_destroy(schema);
}

START_TEST(promise_2_the_schema_is_pytorchs_grammar)
{
	struct schema *schema;
	canonical(" a( Tensor  x ,int? k = None )->Tensor ", "a(Tensor x, int? k=None) -> Tensor");
	canonical("a(Tensor[] x, int[] k=[1,-2 ,3], str s='b, c', bool b=True) -> ( Tensor,Tensor )",
	          "a(Tensor[] x, int[] k=[1, -2, 3], str s='b, c', bool b=True) -> (Tensor, Tensor)");
	ck_assert_int_eq(schema_parse(LAB_TYPES, &schema, &error), OPD_OK);
	ck_assert_uint_eq(schema->param_count, 10);
	static const schema_type types[] = {
	    SCHEMA_TENSOR, SCHEMA_TENSOR_OPTIONAL, SCHEMA_TENSORS,        SCHEMA_INT,  SCHEMA_INT_OPTIONAL,
	    SCHEMA_INTS,   SCHEMA_FLOAT,           SCHEMA_FLOAT_OPTIONAL, SCHEMA_BOOL, SCHEMA_STR};
	for (uint32_t i = 0; i < 10; i++)
		ck_assert_int_eq(schema->params[i].type, types[i]);
	ck_assert_str_eq(schema->params[9].value.str, "none");
	ck_assert_int_eq(schema_find(schema, "parts", 5), 2);
	ck_assert_int_eq(schema_find(schema, "part", 4), -1);
	schema_destroy(schema);
	ck_assert_int_eq(schema_parse(LAB_SCALE, &schema, &error), OPD_OK);
	ck_assert(schema->params[1].has_default);
	ck_assert_double_eq(schema->params[1].value.f, 2.0);
	ck_assert_int_eq(schema->params[2].value.kind, OPD_ARG_NONE);
	schema_destroy(schema);
}
END_TEST

START_TEST(promise_2_what_is_no_schema_is_refused_at_registration)
{
	static const struct {
		const char *schema;
		const char *text;
	} cases[] = {
	    {"a(Tensor x, *, int k=1) -> Tensor", "keyword-only parameters (*) are refused"},
	    {"a(Tensor x, Tensor x) -> Tensor", "this parameter is there already"},
	    {"a(int k=1, Tensor x) -> Tensor", "a default: the parameter before has one"},
	    {"a(Tensor X) -> Tensor", "a parameter's name"},
	    {"a(Tensorx) -> Tensor", "a blank between type and name"},
	    {"a(Int k) -> Tensor", "a type"},
	    {"a(Tensor x", ", or )"},
	    {"a(Tensor x) Tensor", "->"},
	    {"a(Tensor x) -> int", "Tensor: every result is one"},
	    {"a(Tensor x) -> ()", "a type"},
	    {"a(Tensor x) -> Tensor, Tensor", "the end"},
	    {"a(int k=1.5) -> Tensor", ", or )"},
	    {"a(int k=99999999999999999999) -> Tensor", "an integer of 64 bits"},
	    {"a(int k=None) -> Tensor", "only Tensor?, int?, float? may be None"},
	    {"a(Tensor? x=1) -> Tensor", "a tensor has no other default"},
	    {"a(bool b=true) -> Tensor", "True or False"},
	    {"a(str s=none) -> Tensor", "a quoted text"},
	    {"a(str s=\"none) -> Tensor", "a quoted text"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		told_op = op_of(cases[i].schema);
		refuses(register_op, OPD_INVALID_ARGUMENT, cases[i].text);
		ck_assert_ptr_nonnull(strstr(error.text, "at character "));
		ck_assert_uint_eq(impls_of("a"), 0);
	}
}
END_TEST

START_TEST(promise_3_native_is_every_ops_first_implementation_and_supports_all_arguments)
{
	struct snapshot *snapshot = registry_snapshot(registry);
	ck_assert_uint_ge(snapshot->op_count, 30);
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		const struct impl *native = snapshot->ops[i].impls[0];
		ck_assert_str_eq(native->provider->name, "native");
		ck_assert(native->supported && native->complete && native->on_host);
		ck_assert_ptr_null(native->def->predicate);
	}
	snapshot_unref(snapshot);
	told_op = op_of("mine(Tensor x, float factor=2.0) -> Tensor");
	told_native.unsupported = "never";
	refuses(register_op, OPD_INVALID_ARGUMENT, "must run on cpu and support all arguments");
	told_native.unsupported = NULL;
	told_native.device = "toy";
	refuses(register_op, OPD_INVALID_ARGUMENT, "must run on cpu and support all arguments");
	told_op.native = NULL;
	refuses(register_op, OPD_INVALID_ARGUMENT, "op mine has no native implementation");
	told_op.native = lab_scale.native;
	refuses(register_op, OPD_INVALID_ARGUMENT, "its native implementation is one of \"lab_scale\"");
	told_op = op_of(told_op.schema);
	told_op.shape = NULL;
	refuses(register_op, OPD_INVALID_ARGUMENT, "op mine has no shape function");
	told_op.shape = lab_scale.shape;
	ck_assert_int_eq(open_with(register_op), OPD_OK);
	ck_assert_uint_eq(impls_of("mine"), 1);
}
END_TEST

static opd_status set_shape_of_another(const opd_host *host, opd_error *failure)
{
	return host->set_shape(host, "lab_scale", lab_shape_longer, failure);
}

START_TEST(promise_4_only_the_ops_owner_may_register_another_shape_function)
{
	uint64_t version = registry_version(registry);
	refuses(set_shape_of_another, OPD_PERMISSION_DENIED, "op lab_scale belongs to lab, not to told");
	ck_assert_uint_eq(registry_version(registry), version);
}
END_TEST

/* ---- Implementations ---- */

START_TEST(promise_7_an_implementation_has_a_provider_schema_support_predicate_and_kernel)
{
	struct snapshot *snapshot = registry_snapshot(registry);
	const struct op *op = snapshot_op(snapshot, "lab_scale", 9);
	const struct impl *absent = op_impl(op, snapshot_provider(snapshot, "absent", 6));
	ck_assert(!absent->supported);
	ck_assert_str_eq(absent->unsupported, "needs a flux capacitor");
	ck_assert_ptr_null(snapshot_provider(snapshot, "absen", 5));
	ck_assert_ptr_null(snapshot_provider(snapshot, "", 0));
	snapshot_unref(snapshot);
	told_impl = impl_of(LAB_SCALE);
	told_impl.run = NULL;
	refuses(register_impl, OPD_INVALID_ARGUMENT, "run is missing");
	told_impl = impl_of(LAB_SCALE);
	told_impl.struct_bytes = 8;
	refuses(register_impl, OPD_INVALID_ARGUMENT, "opd_impl has 8 bytes");
	told_impl = impl_of(LAB_SCALE);
	told_impl.uuid = "123";
	refuses(register_impl, OPD_INVALID_ARGUMENT, "uuid \"123\", expected 64 lowercase hex digits");
	told_impl = impl_of(LAB_SCALE);
	told_impl.op = "no_such_op";
	refuses(register_impl, OPD_NOT_FOUND, "no op no_such_op");
}
END_TEST

static opd_status register_twice(const opd_host *host, opd_error *failure)
{
	opd_status status = host->register_impl(host, &told_impl, failure);
	return status != OPD_OK ? status : host->register_impl(host, &told_impl, failure);
}

START_TEST(promise_8_reserved_names_bad_names_and_second_implementations_are_errors)
{
	static const char *const names[] = {"native", "unfused", "Told", "9", "", "a-b", "a.b", "plain"};
	told_impl = impl_of(LAB_SCALE);
	uint32_t before = impls_of("lab_scale");
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
		told.name = names[i];
		refuses(register_impl, i == 7 ? OPD_ALREADY_EXISTS : OPD_INVALID_ARGUMENT,
		        i < 2   ? "is reserved"
		        : i < 7 ? "expected [a-z_][a-z_0-9]*"
		                : "provider plain is there already");
	}
	told.name = "told";
	refuses(register_twice, OPD_ALREADY_EXISTS, "told.lab_scale is registered already");
	ck_assert_uint_eq(impls_of("lab_scale"), before);
}
END_TEST

static opd_status register_twice_and_go_on(const opd_host *host, opd_error *failure)
{
	opd_impl second = told_impl;
	opd_status status = host->register_impl(host, &told_impl, failure);
	ck_assert_int_eq(host->register_impl(host, &second, failure), OPD_ALREADY_EXISTS);
	return status;
}

START_TEST(promise_8_of_two_implementations_the_first_stays)
{
	told_impl = impl_of(LAB_SCALE);
	ck_assert_int_eq(open_with(register_twice_and_go_on), OPD_OK);
	struct snapshot *snapshot = registry_snapshot(registry);
	const struct op *op = snapshot_op(snapshot, "lab_scale", 9);
	ck_assert_ptr_eq(op_impl(op, snapshot_provider(snapshot, "told", 4))->def, &told_impl);
	snapshot_unref(snapshot);
}
END_TEST

START_TEST(promise_9_an_implementations_schema_equals_the_ops_or_is_a_prefix_with_defaults)
{
	static const char *const bad[] = {
	    "lab_scale(Tensor y, float factor=2.0, int? mode=None) -> Tensor",
	    "lab_scale(Tensor? x, float factor=2.0, int? mode=None) -> Tensor",
	    "lab_scale(Tensor x, float factor=3.0, int? mode=None) -> Tensor",
	    "lab_scale(Tensor x, float factor, int? mode=None) -> Tensor",
	    "lab_scale(Tensor x, float? factor=2.0, int? mode=None) -> Tensor",
	    "lab_scale(Tensor x, float factor=2.0, int? mode=0) -> Tensor",
	    "lab_scale(Tensor x, float factor=2.0, int? mode=None) -> (Tensor, Tensor)",
	    "lab_wait(Tensor x, float factor=2.0) -> Tensor",
	    "lab_scale(Tensor x, float factor=2.0, int? mode=None, int k=1) -> Tensor",
	    "lab_scale() -> Tensor",
	};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
		told_impl = impl_of(bad[i]);
		refuses(register_impl, OPD_INVALID_ARGUMENT, bad[i]); /* prints both */
		ck_assert_ptr_nonnull(strstr(error.text, LAB_SCALE));
	}
	static const char *const good[] = {"lab_scale(Tensor x) -> Tensor", "lab_scale(Tensor x,float factor=2)->Tensor", LAB_SCALE};
	static const char *const names[] = {"one", "two", "three"};
	static opd_impl impls[3];
	static opd_module modules[3];
	for (size_t i = 0; i < 3; i++) {
		modules[i] = told;
		modules[i].name = names[i];
		impls[i] = impl_of(good[i]);
		registered = &impls[i];
		on_open = register_impl;
		ck_assert_msg(registry_open_builtin(registry, &modules[i], &error) == OPD_OK, "%s", error.text);
	}
	struct snapshot *snapshot = registry_snapshot(registry);
	const struct op *op = snapshot_op(snapshot, "lab_scale", 9);
	ck_assert_uint_eq(op_impl(op, snapshot_provider(snapshot, "one", 3))->params, 1);
	ck_assert_uint_eq(op_impl(op, snapshot_provider(snapshot, "two", 3))->params, 2);
	ck_assert(!op_impl(op, snapshot_provider(snapshot, "two", 3))->complete);
	ck_assert(op_impl(op, snapshot_provider(snapshot, "three", 5))->complete);
	snapshot_unref(snapshot);
}
END_TEST

static opd_status register_and_fail(const opd_host *host, opd_error *failure)
{
	ck_assert_int_eq(host->register_op(host, &told_op, failure), OPD_OK);
	ck_assert_int_eq(host->register_impl(host, &told_impl, failure), OPD_OK);
	return opd_fail(failure, OPD_UNAVAILABLE, "the platform is on fire");
}

START_TEST(promise_10_a_failed_registration_leaves_everything_as_it_was)
{
	struct snapshot *before = registry_snapshot(registry);
	told_op = op_of("mine(Tensor x, float factor=2.0) -> Tensor");
	told_impl = impl_of(LAB_SCALE);
	closed = false;
	refuses(register_and_fail, OPD_UNAVAILABLE, "told: the platform is on fire");
	ck_assert(closed);
	struct snapshot *after = registry_snapshot(registry);
	ck_assert_ptr_eq(before, after);
	ck_assert_ptr_null(snapshot_provider(after, "told", 4));
	snapshot_unref(before);
	snapshot_unref(after);
	ck_assert_int_eq(open_with(register_impl), OPD_OK); /* and the name is free */
}
END_TEST

static void effective_names(const char *op_name, char *out, size_t bytes)
{
	struct snapshot *snapshot = registry_snapshot(registry);
	const struct effective *effective = snapshot_op(snapshot, op_name, strlen(op_name))->fallback;
	out[0] = '\0';
	for (uint32_t i = 0; i < effective->count; i++)
		(void)snprintf(out + strlen(out), bytes - strlen(out), "%s ", effective->impls[i]->provider->name);
	snapshot_unref(snapshot);
}

START_TEST(promise_10_a_new_implementation_changes_nothing_until_named_and_warns_where_a_list_is_set)
{
	static const int levels[] = {MSG_LEVEL_SERVER, MSG_LEVEL_CONFIGURATION};
	static const char *const names[] = {"one", "two", "three", "four", "five"};
	static opd_module modules[5];
	char list[200];
	int warnings = 0;
	told_impl = impl_of(LAB_SCALE);
	on_open = register_impl;
	for (size_t i = 0; i < 5; i++) {
		modules[i] = told;
		modules[i].name = names[i];
		if (i > 0)
			ck_assert_int_eq(registry_set_priority(registry, levels[i % 2], i < 3 ? "lab_scale" : "*",
			                                       (const char *const[]){"plain"}, 1, &error),
			                 OPD_OK);
		ck_assert_msg(registry_open_builtin(registry, &modules[i], &error) == OPD_OK, "%s", error.text);
		warnings += i > 0;
		ck_assert_int_eq(logged("implementation registered while a priority is set"), warnings);
		effective_names("lab_scale", list, sizeof list);
		ck_assert_str_eq(list, i == 0 ? "native " : "plain ");
		if (i > 0)
			ck_assert_int_eq(registry_set_priority(registry, levels[i % 2], i < 3 ? "lab_scale" : "*", NULL, 0, &error), OPD_OK);
	}
	ck_assert_int_eq(logged("provider=two op=lab_scale"), 1);
	ck_assert_int_eq(registry_set_priority(registry, MSG_LEVEL_SERVER, "lab_scale", (const char *const[]){"two"}, 1, &error),
	                 OPD_OK);
	effective_names("lab_scale", list, sizeof list);
	ck_assert_str_eq(list, "two ");
}
END_TEST

START_TEST(promise_16_a_list_for_a_module_that_could_not_be_loaded_does_not_break)
{
	char list[200];
	ck_assert_int_ne(registry_load(registry, "/nowhere/x.so", "missing", true, &error), OPD_OK);
	ck_assert_int_ne(registry_load(registry, "/nowhere/y.so", "forgotten", false, &error), OPD_OK);
	const char *const names[] = {"missing", "plain"};
	ck_assert_int_eq(registry_set_priority(registry, MSG_LEVEL_SERVER, "lab_scale", names, 2, &error), OPD_OK);
	ck_assert_int_eq(registry_set_priority(registry, MSG_LEVEL_SERVER, "*", names, 2, &error), OPD_OK);
	const char *const forgotten[] = {"forgotten"};
	ck_assert_int_eq(registry_set_priority(registry, MSG_LEVEL_SERVER, "*", forgotten, 1, &error), OPD_NOT_FOUND);
	effective_names("lab_scale", list, sizeof list);
	ck_assert_str_eq(list, "plain ");
	struct snapshot *snapshot = registry_snapshot(registry);
	const struct effective *effective = snapshot_op(snapshot, "lab_scale", 9)->fallback;
	ck_assert_uint_eq(effective->skip_count, 1);
	ck_assert_int_eq(effective->skips[0].code, OPD_REASON_MODULE);
	ck_assert_str_eq(effective->skips[0].reason, "/nowhere/x.so: No such file or directory");
	snapshot_unref(snapshot);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("registry");
	TCase *tests = tcase_create("registry");
	tcase_add_checked_fixture(tests, open_registry, close_registry);
	tcase_add_test(tests, promise_1_an_ops_name_follows_the_rule);
	tcase_add_test(tests, promise_1_a_second_op_of_a_taken_name_is_an_error_and_the_first_stays);
	tcase_add_test(tests, promise_2_the_schema_is_pytorchs_grammar);
	tcase_add_test(tests, promise_2_what_is_no_schema_is_refused_at_registration);
	tcase_add_test(tests, promise_3_native_is_every_ops_first_implementation_and_supports_all_arguments);
	tcase_add_test(tests, promise_4_only_the_ops_owner_may_register_another_shape_function);
	tcase_add_test(tests, promise_7_an_implementation_has_a_provider_schema_support_predicate_and_kernel);
	tcase_add_test(tests, promise_8_reserved_names_bad_names_and_second_implementations_are_errors);
	tcase_add_test(tests, promise_8_of_two_implementations_the_first_stays);
	tcase_add_test(tests, promise_9_an_implementations_schema_equals_the_ops_or_is_a_prefix_with_defaults);
	tcase_add_test(tests, promise_10_a_failed_registration_leaves_everything_as_it_was);
	tcase_add_test(tests, promise_10_a_new_implementation_changes_nothing_until_named_and_warns_where_a_list_is_set);
	tcase_add_test(tests, promise_16_a_list_for_a_module_that_could_not_be_loaded_does_not_break);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
