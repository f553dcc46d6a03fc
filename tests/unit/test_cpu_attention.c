/* Provider `cpu`, attention over more keys than a split: bits depend neither on who computes which split, nor in what order, nor on the other queries of a call, at every instruction set
 * of this machine. What the values are is the conformance tool's to check. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "providers/builtin.h"
#include "providers/cpu/attend.h"
#include "providers/cpu/isa.h"
#include "tests/conformance/host.h"

enum { HEAD_SIZE = 64 };

static struct host host;
static const opd_dtype dtypes[] = {OPD_f32, OPD_bf16, OPD_f16};

struct shape {
	int64_t queries, keys, heads, kv_heads;
};

/* One query of all kv heads together, alone or in groups, whole splits and not; tiles of several queries, some of which see keys of fewer splits than others. */
static const struct shape shapes[] = {
	{1, 4 * ATTEND_SPLIT + 87, 8, 8}, {1, 3 * ATTEND_SPLIT, 12, 3}, {1, 2 * ATTEND_SPLIT + 1, 64, 1}, {40, 2 * ATTEND_SPLIT + 20, 8, 2}, {2, 4 * ATTEND_SPLIT + 1, 4, 4},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

/* False when this machine lacks instruction set number `index`. */
static bool isa_open(int index)
{
	if (!cpu_isa_supported(cpu_isas[index]))
		return false;
	opd_error error;
	ck_assert_int_eq(setenv("OPD_CPU_ISA", cpu_isas[index]->isa, 1), 0);
	host_init(&host);
	ck_assert_int_eq(host_open(&host, &cpu_module, &error), OPD_OK);
	return true;
}

/* [1, tokens, heads, HEAD_SIZE] */
struct rows {
	opd_tensor tensor;
	int64_t shape[4], strides[4];
	unsigned char *memory;
};

static void rows_init(struct rows *rows, opd_dtype dtype, int64_t tokens, int64_t heads, uint64_t seed)
{
	const int64_t elements = tokens * heads * HEAD_SIZE;
	*rows = (struct rows){.shape = {1, tokens, heads, HEAD_SIZE}, .strides = {elements, heads * HEAD_SIZE, HEAD_SIZE, 1}};
	rows->memory = calloc((size_t)elements, opd_dtype_bytes(dtype));
	ck_assert_ptr_nonnull(rows->memory);
	for (int64_t i = 0; i < elements; i++) {
		seed = seed * 6364136223846793005u + 1442695040888963407u;
		element_store_f64(dtype, rows->memory + (size_t)i * opd_dtype_bytes(dtype), (double)(seed >> 33) / 1073741824.0 - 1);
	}
	rows->tensor = (opd_tensor){
		.struct_bytes = sizeof(opd_tensor),
		.dtype = dtype,
		.rank = 4,
		.shape = rows->shape,
		.strides = rows->strides,
		.data = rows->memory,
		.elements = (uint64_t)elements,
		.alignment = 16,
		.flags = OPD_TENSOR_CONTIGUOUS,
	};
}

static uint64_t rows_bytes(const struct rows *rows)
{
	return rows->tensor.elements * opd_dtype_bytes(rows->tensor.dtype);
}

struct attention {
	struct rows query, key, value, y;
};

static void attention_init(struct attention *attention, opd_dtype dtype, const struct shape *shape)
{
	rows_init(&attention->query, dtype, shape->queries, shape->heads, 1);
	rows_init(&attention->key, dtype, shape->keys, shape->kv_heads, 2);
	rows_init(&attention->value, dtype, shape->keys, shape->kv_heads, 3);
	rows_init(&attention->y, dtype, shape->queries, shape->heads, 4);
}

static void attention_fini(struct attention *attention)
{
	free(attention->query.memory);
	free(attention->key.memory);
	free(attention->value.memory);
	free(attention->y.memory);
}

static opd_status attention_try(struct attention *attention, uint32_t threads, opd_error *error)
{
	const opd_arg args[] = {
		{.kind = OPD_ARG_TENSOR, .tensor = &attention->query.tensor}, {.kind = OPD_ARG_TENSOR, .tensor = &attention->key.tensor},
		{.kind = OPD_ARG_TENSOR, .tensor = &attention->value.tensor}, {.kind = OPD_ARG_FLOAT, .f = 0.5},
		{.kind = OPD_ARG_BOOL, .b = true},
	};
	const opd_tensor *outputs[] = {&attention->y.tensor};
	const opd_call call = {.struct_bytes = sizeof call, .args = args, .arg_count = 5, .outputs = outputs, .output_count = 1};
	memset(attention->y.memory, 0xa5, rows_bytes(&attention->y));
	return host_run(&host, host_find_impl(&host, "cpu", "attention"), &call, threads, error);
}

static void attention_run(struct attention *attention, uint32_t threads)
{
	opd_error error = {0};
	ck_assert_msg(attention_try(attention, threads, &error) == OPD_OK, "%s", error.text);
}

/* The last item first, each a share of its own: the split that completes a result is the one that begins it. */
static void backwards(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	(void)grain;
	for (uint64_t i = items; i-- > 0;)
		range(argument, i, i + 1, (uint32_t)(i % exec->threads));
}

/* Every other item, then those between. */
static void with_gaps(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	(void)grain;
	for (uint64_t odd = 0; odd < 2; odd++)
		for (uint64_t i = odd; i < items; i += 2)
			range(argument, i, i + 1, (uint32_t)(i % exec->threads));
}

static void check_orders(opd_dtype dtype, const struct shape *shape)
{
	void (*const threads)(const opd_exec *, uint64_t, uint64_t, opd_range_fn, void *) = host.table.parallel_for;
	void (*const orders[])(const opd_exec *, uint64_t, uint64_t, opd_range_fn, void *) = {threads, backwards, with_gaps};
	struct attention attention;
	attention_init(&attention, dtype, shape);
	attention_run(&attention, 1);
	const uint64_t bytes = rows_bytes(&attention.y);
	unsigned char *alone = malloc(bytes);
	ck_assert_ptr_nonnull(alone);
	memcpy(alone, attention.y.memory, bytes);
	for (size_t i = 0; i < sizeof orders / sizeof orders[0]; i++) {
		host.table.parallel_for = orders[i];
		attention_run(&attention, 16);
		ck_assert_msg(memcmp(attention.y.memory, alone, bytes) == 0, "%s, %lld queries of %lld heads, %lld keys: other bits in order %zu", opd_dtype_name(dtype),
		              (long long)shape->queries, (long long)shape->heads, (long long)shape->keys, i);
	}
	host.table.parallel_for = threads;
	free(alone);
	attention_fini(&attention);
}

START_TEST(splits_in_any_order_and_on_any_thread_give_the_same_bits)
{
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++)
		for (size_t s = 0; s < SHAPES; s++)
			check_orders(dtypes[d], &shapes[s]);
	host_fini(&host);
}
END_TEST

/* Query `q` of a call of many, and alone over the keys that it sees. */
static void check_query(struct attention *many, const struct shape *shape, int64_t q)
{
	const opd_dtype dtype = many->y.tensor.dtype;
	const struct shape alone = {1, shape->keys - (shape->queries - 1 - q), shape->heads, shape->kv_heads};
	struct attention one;
	attention_init(&one, dtype, &alone);
	const uint64_t row_bytes = rows_bytes(&one.query);
	memcpy(one.query.memory, many->query.memory + (uint64_t)q * row_bytes, row_bytes);
	attention_run(&one, 4);
	ck_assert_msg(memcmp(one.y.memory, many->y.memory + (uint64_t)q * row_bytes, row_bytes) == 0, "%s: query %lld of %lld has other bits alone", opd_dtype_name(dtype),
	              (long long)q, (long long)shape->queries);
	attention_fini(&one);
}

START_TEST(a_query_has_the_same_bits_alone_and_among_others)
{
	const struct shape shape = {40, ATTEND_SPLIT + 20, 8, 2}; /* the first ones see one split, the last ones two */
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++) {
		struct attention many;
		attention_init(&many, dtypes[d], &shape);
		attention_run(&many, 4);
		for (int64_t q = 0; q < shape.queries; q += 13)
			check_query(&many, &shape, q);
		attention_fini(&many);
	}
	host_fini(&host);
}
END_TEST

START_TEST(a_cancelled_call_leaves_splits_out_and_says_so)
{
	struct attention attention;
	opd_error error = {0};
	ck_assert(isa_open(0));
	attention_init(&attention, OPD_f32, &shapes[0]);
	host.cancel = true;
	ck_assert_int_eq(attention_try(&attention, 2, &error), OPD_CANCELLED);
	attention_fini(&attention);
	host_fini(&host);
}
END_TEST

/* One query of 32 heads and `keys` keys of one, whose tensors are one element seen again and again: what a caller can say in a few bytes. */
static opd_status paged_try(uint64_t keys, uint32_t threads, opd_error *error)
{
	const int64_t query_shape[] = {1, 32, 1}, cache_shape[] = {1, 1500000000, 1, 1}, table_shape[] = {1, INT64_MAX / 1500000000}, one[] = {1}, two[] = {2};
	const int64_t nowhere[] = {0, 0, 0, 0}, rows[] = {32, 1, 1}, each[] = {1};
	uint16_t elements[32] = {0}, y[32];
	int32_t block = 0;
	int64_t length = (int64_t)keys, starts[] = {0, 1};
	const opd_tensor half = {.struct_bytes = sizeof half, .dtype = OPD_f16, .rank = 3, .shape = query_shape, .strides = rows, .data = elements, .elements = 32, .alignment = 2};
	opd_tensor cache = half, table = half, lengths = half, begins = half, result = half;
	cache.rank = 4, cache.shape = cache_shape, cache.strides = nowhere, cache.elements = 1500000000;
	table.dtype = OPD_i32, table.rank = 2, table.shape = table_shape, table.strides = nowhere, table.data = &block, table.elements = (uint64_t)table_shape[1];
	lengths.dtype = OPD_i64, lengths.rank = 1, lengths.shape = one, lengths.strides = each, lengths.data = &length, lengths.elements = 1;
	begins.dtype = OPD_i64, begins.rank = 1, begins.shape = two, begins.strides = each, begins.data = starts, begins.elements = 2;
	result.data = y, result.flags = OPD_TENSOR_CONTIGUOUS;
	const opd_arg args[] = {
		{.kind = OPD_ARG_TENSOR, .tensor = &half}, {.kind = OPD_ARG_TENSOR, .tensor = &cache}, {.kind = OPD_ARG_TENSOR, .tensor = &cache},
		{.kind = OPD_ARG_TENSOR, .tensor = &table}, {.kind = OPD_ARG_TENSOR, .tensor = &lengths}, {.kind = OPD_ARG_TENSOR, .tensor = &begins},
		{.kind = OPD_ARG_FLOAT, .f = 1}, {.kind = OPD_ARG_BOOL, .b = true},
	};
	const opd_tensor *outputs[] = {&result};
	const opd_call call = {.struct_bytes = sizeof call, .args = args, .arg_count = 8, .outputs = outputs, .output_count = 1};
	return host_run(&host, host_find_impl(&host, "cpu", "paged_attention"), &call, threads, error);
}

/* The three lengths for which memory for each split's result (of 4, 8 and 16 lanes) once came to 2^64 bytes and a few. */
START_TEST(a_length_that_a_caller_makes_up_takes_no_memory_for_each_of_its_splits)
{
	static const uint64_t divisors[] = {13, 21, 37};
	if (!isa_open(_i))
		return;
	host.cancel = true;
	for (size_t i = 0; i < 3; i++) {
		opd_error error = {0};
		const uint64_t keys = ((UINT64_C(1) << 58) / divisors[i] + 1) * 128;
		ck_assert_msg(paged_try(keys, 2, &error) == OPD_CANCELLED, "%llu keys: %s", (unsigned long long)keys, error.text);
	}
	host_fini(&host);
}
END_TEST

static Suite *attention_suite(void)
{
	Suite *suite = suite_create("cpu_attention");
	TCase *each = tcase_create("each instruction set");
	int sets = 0;
	while (cpu_isas[sets] != NULL)
		sets++;
	tcase_set_timeout(each, 120);
	tcase_add_loop_test(each, splits_in_any_order_and_on_any_thread_give_the_same_bits, 0, sets);
	tcase_add_loop_test(each, a_query_has_the_same_bits_alone_and_among_others, 0, sets);
	tcase_add_loop_test(each, a_length_that_a_caller_makes_up_takes_no_memory_for_each_of_its_splits, 0, sets);
	tcase_add_test(each, a_cancelled_call_leaves_splits_out_and_says_so);
	suite_add_tcase(suite, each);
	return suite;
}

int main(void)
{
	SRunner *runner = srunner_create(attention_suite());
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
