/* Binding and dispatch without a daemon: what predicates and kernels see, and what the hot path may not do. The linker leads
 * malloc, locks, comparisons of strings and formatting through counters (see CMakeLists.txt). */
#include <check.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "providers/builtin.h"
#include "server/bind.h"
#include "server/dispatch.h"
#include "tests/lib/lab.h"

static _Atomic uint64_t forbidden; /* calls of what dispatch must not call */

void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
int __real_pthread_mutex_lock(pthread_mutex_t *mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t *mutex);
int __real_strcmp(const char *a, const char *b);
int __wrap_strcmp(const char *a, const char *b);
int __real_strncmp(const char *a, const char *b, size_t bytes);
int __wrap_strncmp(const char *a, const char *b, size_t bytes);
int __wrap_vsnprintf(char *out, size_t bytes, const char *format, va_list args);
int __real_vsnprintf(char *out, size_t bytes, const char *format, va_list args);
int __wrap_snprintf(char *out, size_t bytes, const char *format, ...);

void *__wrap_malloc(size_t bytes)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_calloc(count, bytes);
}

void *__wrap_realloc(void *memory, size_t bytes)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_realloc(memory, bytes);
}

int __wrap_pthread_mutex_lock(pthread_mutex_t *mutex)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_pthread_mutex_lock(mutex);
}

int __wrap_strcmp(const char *a, const char *b)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_strcmp(a, b);
}

int __wrap_strncmp(const char *a, const char *b, size_t bytes)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_strncmp(a, b, bytes);
}

int __wrap_vsnprintf(char *out, size_t bytes, const char *format, va_list args)
{
	atomic_fetch_add(&forbidden, 1);
	return __real_vsnprintf(out, bytes, format, args);
}

int __wrap_snprintf(char *out, size_t bytes, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	atomic_fetch_add(&forbidden, 1);
	int length = __real_vsnprintf(out, bytes, format, args);
	va_end(args);
	return length;
}

/* ---- */

static struct log test_log;
static struct registry *registry;
static struct snapshot *snapshot;
static struct plans *plans;
static struct arena arena;
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
	lab_reset();
	ck_assert_int_eq(log_init(&test_log, LOG_ERROR, LOG_TEXT, NULL, &error), OPD_OK);
	ck_assert_int_eq(registry_create(&test_log, &services, &registry, &error), OPD_OK);
	for (size_t i = 0; builtin_modules[i] != NULL; i++)
		ck_assert_msg(registry_open_builtin(registry, builtin_modules[i], &error) == OPD_OK, "%s", error.text);
	ck_assert_msg(lab_open(registry, &error) == OPD_OK, "%s", error.text);
	ck_assert_int_eq(plans_create(16, 1 << 20, &plans, &error), OPD_OK);
	snapshot = registry_snapshot(registry);
	arena_init(&arena, 1 << 20);
}

static void close_registry(void)
{
	arena_fini(&arena);
	plans_destroy(plans);
	snapshot_unref(snapshot);
	registry_destroy(registry);
	log_fini(&test_log);
}

static const struct op *op_named(const char *name)
{
	const struct op *op = snapshot_op(snapshot, name, strlen(name));
	ck_assert_ptr_nonnull(op);
	return op;
}

_Alignas(64) static float values[64];

static struct msg_tensor vector(int64_t elements)
{
	return (struct msg_tensor){.dtype = OPD_f32,
	                           .rank = 1,
	                           .shape = {elements},
	                           .source = MSG_SOURCE_INLINE,
	                           .inlined = {(const uint8_t *)values, (size_t)elements * sizeof values[0]}};
}

#define ARG(id, type, ...) ((struct msg_arg){.name = msg_text(id), .kind = (type), __VA_ARGS__})

static opd_status bind(const char *op, struct msg_arg *args, uint32_t count, struct bound *bound)
{
	struct msg_run message = {.arg_count = count, .args = args};
	error.text[0] = '\0';
	return bind_args(&arena, op_named(op), &message, bound, &error);
}

static void refuses(const char *op, struct msg_arg *args, uint32_t count, const char *text)
{
	struct bound bound;
	ck_assert_int_eq(bind(op, args, count, &bound), OPD_INVALID_ARGUMENT);
	ck_assert_msg(strstr(error.text, text) != NULL, "\"%s\" isn't in \"%s\"", text, error.text);
	char schema[600];
	(void)snprintf(schema, sizeof schema, "; schema: %s", op_named(op)->schema->text);
	ck_assert_msg(strstr(error.text, schema) != NULL, "no schema in \"%s\"", error.text);
}

START_TEST(promise_5_arguments_are_bound_by_position_and_name_and_defaults_fill_the_rest)
{
	struct msg_tensor x = vector(8);
	struct bound bound;
	struct msg_arg args[] = {ARG(NULL, MSG_ARG_TENSOR, .count = 1, .tensor = &x), ARG("mode", MSG_ARG_INT, .i = 7)};
	ck_assert_int_eq(bind("lab_scale", args, 2, &bound), OPD_OK);
	ck_assert_uint_eq(bound.call.arg_count, 3);
	ck_assert_int_eq(bound.args[0].kind, OPD_ARG_TENSOR);
	ck_assert_int_eq(bound.args[1].kind, OPD_ARG_FLOAT);
	ck_assert_double_eq(bound.args[1].f, 2.0);
	ck_assert_int_eq(bound.args[2].kind, OPD_ARG_INT);
	ck_assert_int_eq(bound.args[2].i, 7);
	ck_assert_int_eq(bind("lab_scale", args, 1, &bound), OPD_OK);
	ck_assert_int_eq(bound.args[2].kind, OPD_ARG_NONE);
	struct msg_arg integer[] = {ARG(NULL, MSG_ARG_TENSOR, .count = 1, .tensor = &x), ARG(NULL, MSG_ARG_INT, .i = 3)};
	ck_assert_int_eq(bind("lab_scale", integer, 2, &bound), OPD_OK);
	ck_assert_int_eq(bound.args[1].kind, OPD_ARG_FLOAT); /* an int does for a float, and is one from here on */
	ck_assert_double_eq(bound.args[1].f, 3.0);
}
END_TEST

START_TEST(promise_5_wrong_calls_are_errors_that_name_the_parameter_and_print_the_schema)
{
	struct msg_tensor x = vector(8);
	const struct msg_arg tensor = ARG(NULL, MSG_ARG_TENSOR, .count = 1, .tensor = &x);
	refuses("lab_scale",
	        (struct msg_arg[]){tensor, ARG(NULL, MSG_ARG_FLOAT, .f = 1), ARG(NULL, MSG_ARG_INT, .i = 1),
	                           ARG(NULL, MSG_ARG_INT, .i = 1)},
	        4, "4 arguments, at most 3 expected");
	refuses("lab_scale", (struct msg_arg[]){tensor, ARG("fact", MSG_ARG_FLOAT, .f = 1)}, 2, "unknown argument \"fact\"");
	refuses("lab_scale", (struct msg_arg[]){tensor, ARG("x", MSG_ARG_TENSOR, .count = 1, .tensor = &x)}, 2,
	        "argument x is given twice");
	refuses("lab_scale", (struct msg_arg[]){ARG("mode", MSG_ARG_INT, .i = 1), tensor}, 2,
	        "argument 1 is positional but follows a named one");
	refuses("lab_scale", (struct msg_arg[]){ARG("factor", MSG_ARG_FLOAT, .f = 1)}, 1, "argument x (Tensor) is missing");
	refuses("lab_scale", NULL, 0, "argument x (Tensor) is missing");
	refuses("lab_scale", (struct msg_arg[]){ARG("x", MSG_ARG_NONE, .count = 0)}, 1, "argument x is None, expected Tensor");
	refuses("lab_scale", (struct msg_arg[]){tensor, ARG("factor", MSG_ARG_NONE, .count = 0)}, 2,
	        "argument factor is None, expected float");
	refuses("lab_scale", (struct msg_arg[]){tensor, ARG("mode", MSG_ARG_FLOAT, .f = 1)}, 2,
	        "argument mode is a float, expected int?");
}
END_TEST

START_TEST(promise_5_every_type_is_checked_against_every_kind)
{
	struct msg_tensor x = vector(8);
	static const int64_t ints[] = {1, 2};
	const struct msg_arg kinds[] = {
	    ARG("", MSG_ARG_NONE, .count = 0),
	    ARG("", MSG_ARG_TENSOR, .count = 1, .tensor = &x),
	    ARG("", MSG_ARG_TENSORS, .count = 1, .tensor = &x),
	    ARG("", MSG_ARG_INT, .i = 1),
	    ARG("", MSG_ARG_INTS, .count = 2, .ints = ints),
	    ARG("", MSG_ARG_FLOAT, .f = 1),
	    ARG("", MSG_ARG_BOOL, .b = true),
	    ARG("", MSG_ARG_STR, .str = {"a", 1}),
	};
	/* Rows: parameters of lab_types; columns: the kinds above. */
	static const char *const taken[] = {"01000000", "11000000", "00100000", "00010000", "10010000",
	                                    "00001000", "00010100", "10010100", "00000010", "00000001"};
	const struct schema *schema = op_named("lab_types")->schema;
	for (uint32_t p = 0; p < schema->param_count; p++) {
		for (uint32_t k = 0; k < 8; k++) {
			struct msg_arg args[10];
			struct bound bound;
			for (uint32_t i = 0; i < 10; i++) {
				args[i] = kinds[i == p ? k : i == 2 ? 2 : strcspn(taken[i], "1")];
				args[i].name = msg_text(schema->params[i].name);
			}
			if (taken[p][k] == '1')
				ck_assert_msg(bind("lab_types", args, 10, &bound) == OPD_OK, "%s", error.text);
			else {
				char text[100];
				(void)snprintf(text, sizeof text, "lab_types: argument %s is ", schema->params[p].name);
				refuses("lab_types", args, 10, text);
			}
			arena_reset(&arena);
		}
	}
}
END_TEST

/* A bound call of lab_scale on so many elements. */
static void bind_scale(struct bound *bound, struct msg_arg *arg, struct msg_tensor *x, int64_t elements)
{
	*x = vector(elements);
	*arg = ARG(NULL, MSG_ARG_TENSOR, .count = 1, .tensor = x);
	ck_assert_int_eq(bind("lab_scale", arg, 1, bound), OPD_OK);
	ck_assert_int_eq(bind_place(bound->op, &bound->operands[0], values, (uint64_t)elements * 4, true, &error), OPD_OK);
	ck_assert_int_eq(bind_outputs(&arena, bound, &error), OPD_OK);
}

static struct effective *cut(const char *const *names, uint32_t count)
{
	struct msg_text texts[8];
	for (uint32_t i = 0; i < count; i++)
		texts[i] = msg_text(names[i]);
	struct effective *effective = effective_create(snapshot, op_named("lab_scale"), MSG_LEVEL_REQUEST, texts, count, NULL, NULL);
	ck_assert_ptr_nonnull(effective);
	return effective;
}

static void dispatches(const struct effective *effective, const opd_call *call, const char *expected)
{
	struct dispatch dispatch;
	const struct op *op = op_named("lab_scale");
	uint64_t before = atomic_load(&forbidden);
	opd_status status = dispatch_init(&dispatch, snapshot, effective, plans, &test_log, op, false, call, &error);
	bool found = status == OPD_OK && dispatch_walk(&dispatch, call);
	uint64_t calls = atomic_load(&forbidden) - before;
	ck_assert(found);
	ck_assert_str_eq(dispatch.impl->provider->name, expected);
	ck_assert_msg(calls == 0, "%llu forbidden calls on the way to %s", (unsigned long long)calls, expected);
	dispatch_fini(&dispatch);
}

/* A look-up among plans: the one lock there is, for implementations that have plans. */
static bool plan_of_nothing(const opd_call *call)
{
	const struct op *op = op_named("lab_scale");
	return plans_find(plans, snapshot, op_impl(op, snapshot_provider(snapshot, "planner", 7)), call) == NULL;
}

START_TEST(promise_30_dispatch_allocates_locks_compares_and_formats_nothing)
{
	struct bound bound;
	struct msg_arg arg;
	struct msg_tensor x;
	bind_scale(&bound, &arg, &x, 9);
	uint64_t before = atomic_load(&forbidden);
	plans_destroy(plans); /* what isn't hot is counted: the counters are in place */
	ck_assert_int_eq(plans_create(16, 1 << 20, &plans, &error), OPD_OK);
	ck_assert(plan_of_nothing(&bound.call));
	ck_assert_uint_ge(atomic_load(&forbidden), before + 2);
	static const char *const lists[][4] = {
	    {"plain"}, {"even_only", "older", "plain"}, {"even_only", "native"}, {"even_only", "picky", "breaks"}};
	static const uint32_t counts[] = {1, 3, 2, 3};
	static const char *const expected[] = {"plain", "older", "native", "picky"};
	for (size_t i = 0; i < 4; i++) {
		struct effective *effective = cut(lists[i], counts[i]);
		dispatches(effective, &bound.call, expected[i]);
		effective_unref(effective);
	}
}
END_TEST

/* What explain says of a planner that refuses nine elements, whatever has become of the cache since. `known`: its plan was made before the walk. */
static void refusal_is_told(struct effective *effective, const opd_call *call, bool known)
{
	const struct op *op = op_named("lab_scale");
	const struct impl *planner = op_impl(op, snapshot_provider(snapshot, "planner", 7));
	struct dispatch dispatch;
	struct arena told;
	struct plan *plan;
	uint32_t count = 0;
	arena_init(&told, 1u << 16);
	if (known) {
		ck_assert_int_eq(plans_make(plans, snapshot, planner, call, &plan, &error), OPD_OK);
		plan_unref(plan);
	}
	ck_assert_int_eq(dispatch_init(&dispatch, snapshot, effective, plans, &test_log, op, false, call, &error), OPD_OK);
	ck_assert(dispatch_walk(&dispatch, call));
	ck_assert(dispatch.plan_missing == !known);
	if (!known) {
		ck_assert_int_eq(plans_make(plans, snapshot, planner, call, &dispatch.plan, &error), OPD_OK);
		ck_assert(dispatch_next(&dispatch, call));
	}
	ck_assert_str_eq(dispatch.impl->provider->name, "plain");
	ck_assert_uint_eq(plans_trim(plans), 1);
	const struct msg_skip *skips = dispatch_skips(&dispatch, op, call, &told, &count);
	ck_assert_uint_eq(count, 1);
	ck_assert_msg(strcmp(skips[0].reason.data, "size: x has 9 elements, at most 8") == 0, "%s", skips[0].reason.data);
	dispatch_fini(&dispatch);
	arena_fini(&told);
}

START_TEST(a_plans_refusal_is_told_though_the_cache_has_dropped_it)
{
	struct bound bound;
	struct msg_arg arg;
	struct msg_tensor x;
	bind_scale(&bound, &arg, &x, 9);
	static const char *const list[] = {"planner", "plain"};
	struct effective *effective = cut(list, 2);
	(void)plans_trim(plans);
	refusal_is_told(effective, &bound.call, false);
	refusal_is_told(effective, &bound.call, true);
	effective_unref(effective);
}
END_TEST

/* A list of one name that narrows `plain`. */
static void narrow(struct plist *plain, const char *text, const char *name)
{
	struct priority_key key;
	struct plist *list = plist_create(MSG_LEVEL_CONFIGURATION, false, &(struct msg_text){name, strlen(name)}, 1);
	ck_assert_int_eq(priority_key_parse(text, &key, &error), OPD_OK);
	ck_assert_int_eq(plist_add_case(plain, text, &key, list, &error), OPD_OK);
	plist_unref(list);
}

START_TEST(promise_30_the_list_for_a_dtype_and_few_rows_is_found_by_comparing_numbers)
{
	struct bound bound;
	struct msg_arg arg;
	struct msg_tensor x;
	const struct op *op = op_named("lab_scale");
	struct plist *plain = plist_create(MSG_LEVEL_CONFIGURATION, false, &(struct msg_text){"native", 6}, 1);
	narrow(plain, "lab_scale/rows<=1", "plain"); /* asked last */
	narrow(plain, "lab_scale/f32", "older");
	narrow(plain, "lab_scale/bf16", "breaks");
	narrow(plain, "lab_scale/f32/rows<=8", "picky");
	narrow(plain, "lab_scale/f32/rows<=2", "even_only");
	struct effective *effective = effective_create(snapshot, op, MSG_LEVEL_CONFIGURATION, plain->names, plain->count, NULL, plain);
	ck_assert(effective_add_cases(effective, snapshot, op, plain, NULL));
	bind_scale(&bound, &arg, &x, 8);
	int64_t shape[2] = {1, 8}; /* rows, and what is left of eight elements */
	opd_tensor tensor = *bound.call.args[0].tensor;
	opd_arg args[OPD_RANK_MAX];
	memcpy(args, bound.call.args, bound.call.arg_count * sizeof args[0]);
	opd_call call = bound.call;
	tensor.rank = 2;
	tensor.shape = shape;
	args[0].tensor = &tensor;
	call.args = args;
	static const struct {
		int64_t rows;
		opd_dtype dtype;
		const char *expected;
	} cases[] = {{1, OPD_f32, "even_only"}, {2, OPD_f32, "even_only"}, {4, OPD_f32, "picky"}, {8, OPD_f32, "picky"}, {1, OPD_bf16, "breaks"}, {8, OPD_bf16, "breaks"},
	             {1, OPD_f16, "plain"},     {2, OPD_f16, "native"}};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		shape[0] = cases[i].rows;
		shape[1] = 8 / cases[i].rows;
		tensor.dtype = cases[i].dtype;
		uint64_t before = atomic_load(&forbidden);
		const struct effective *found = effective_for(effective, &call);
		ck_assert_uint_eq(atomic_load(&forbidden), before);
		ck_assert_msg(strcmp(found->impls[0]->provider->name, cases[i].expected) == 0, "case %zu: %s", i, found->impls[0]->provider->name);
		ck_assert((found->narrowed == NULL) == (found == effective));
	}
	dispatches(effective, &bound.call, "even_only"); /* one row of eight f32 */
	effective_unref(effective);
	plist_unref(plain);
}
END_TEST

START_TEST(promise_30_the_catalogues_predicates_keep_to_the_hot_path_too)
{
	struct msg_tensor tensors[2] = {vector(64), vector(64)};
	static const char *const ops[] = {"relu", "silu", "gelu", "silu_and_mul", "softmax", "add"};
	uint32_t asked = 0;
	for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
		struct bound bound;
		struct msg_arg args[] = {ARG(NULL, MSG_ARG_TENSOR, .count = 1, .tensor = &tensors[0]),
		                         ARG(NULL, MSG_ARG_TENSOR, .count = 1, .tensor = &tensors[1])};
		ck_assert_msg(bind(ops[i], args, i == 5 ? 2 : 1, &bound) == OPD_OK, "%s", error.text);
		for (uint32_t k = 0; k < bound.operand_count; k++)
			ck_assert_int_eq(bind_place(bound.op, &bound.operands[k], values, 256, true, &error), OPD_OK);
		ck_assert_int_eq(bind_outputs(&arena, &bound, &error), OPD_OK);
		for (uint32_t k = 0; k < bound.op->impl_count; k++) {
			uint64_t before = atomic_load(&forbidden);
			(void)dispatch_accepts(bound.op->impls[k], bound.op, &bound.call, NULL);
			ck_assert_msg(atomic_load(&forbidden) == before, "%s.%s", bound.op->impls[k]->provider->name, ops[i]);
			asked += bound.op->impls[k]->def->predicate != NULL;
		}
	}
	ck_assert_uint_gt(asked, 0);
}
END_TEST

START_TEST(promise_12_without_a_predicate_an_implementation_takes_everything)
{
	struct bound bound;
	struct msg_arg arg;
	struct msg_tensor x;
	const struct op *op = op_named("lab_scale");
	for (int64_t elements = 0; elements < 64; elements++) {
		bind_scale(&bound, &arg, &x, elements);
		for (uint32_t i = 0; i < op->impl_count; i++) {
			opd_reason reason = {0};
			bool accepts = dispatch_accepts(op->impls[i], op, &bound.call, &reason);
			bool odd = strcmp(op->impls[i]->provider->name, "even_only") == 0 && elements % 2 == 1;
			ck_assert_msg(accepts == !odd, "%s, %d elements", op->impls[i]->provider->name, (int)elements);
			ck_assert(op->impls[i]->def->predicate != NULL || accepts);
		}
		arena_reset(&arena);
	}
}
END_TEST

START_TEST(plans_are_bounded_and_freed_and_refusals_are_cached)
{
	struct bound bound;
	struct msg_arg arg;
	struct msg_tensor x;
	const struct op *op = op_named("lab_scale");
	const struct impl *planner = op_impl(op, snapshot_provider(snapshot, "planner", 7));
	for (int round = 0; round < 2; round++) {
		for (int64_t elements = 0; elements < 40; elements++) { /* sixteen fit */
			struct plan *plan;
			bind_scale(&bound, &arg, &x, elements);
			ck_assert_ptr_null(plans_find(plans, snapshot, planner, &bound.call));
			ck_assert_int_eq(plans_make(plans, snapshot, planner, &bound.call, &plan, &error), OPD_OK);
			ck_assert(plan->refused == (elements > 8));
			struct plan *again = plans_find(plans, snapshot, planner, &bound.call);
			ck_assert_ptr_eq(plan, again);
			plan_unref(plan);
			plan_unref(again);
			arena_reset(&arena);
		}
	}
	ck_assert_uint_eq(lab_counts.plans, 80);
	ck_assert_uint_eq(lab_counts.plans_freed, 18); /* nine of each round were made, and later ones pushed them out */
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("dispatch");
	TCase *tests = tcase_create("dispatch");
	tcase_add_checked_fixture(tests, open_registry, close_registry);
	tcase_add_test(tests, promise_5_arguments_are_bound_by_position_and_name_and_defaults_fill_the_rest);
	tcase_add_test(tests, promise_5_wrong_calls_are_errors_that_name_the_parameter_and_print_the_schema);
	tcase_add_test(tests, promise_5_every_type_is_checked_against_every_kind);
	tcase_add_test(tests, promise_12_without_a_predicate_an_implementation_takes_everything);
	tcase_add_test(tests, promise_30_dispatch_allocates_locks_compares_and_formats_nothing);
	tcase_add_test(tests, promise_30_the_list_for_a_dtype_and_few_rows_is_found_by_comparing_numbers);
	tcase_add_test(tests, promise_30_the_catalogues_predicates_keep_to_the_hot_path_too);
	tcase_add_test(tests, plans_are_bounded_and_freed_and_refusals_are_cached);
	tcase_add_test(tests, a_plans_refusal_is_told_though_the_cache_has_dropped_it);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
