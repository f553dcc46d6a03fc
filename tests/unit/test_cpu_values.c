/* Provider `cpu`, element by element: what cast, the f8 formats, topk and products make of every bit pattern, or of the ones that are hard, at every
 * instruction set of this machine. The conformance tool compares what ops' generators draw; here are the values that they seldom draw. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "providers/builtin.h"
#include "providers/cpu/isa.h"
#include "tests/conformance/host.h"

static struct host host;

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

/* A vector with its own shape; its memory is exactly as long. */
struct vector {
	opd_tensor tensor;
	int64_t shape[1], strides[1];
	unsigned char *memory;
};

static void vector_init(struct vector *vector, opd_dtype dtype, uint64_t count)
{
	memset(vector, 0, sizeof *vector);
	vector->shape[0] = (int64_t)count;
	vector->strides[0] = 1;
	vector->memory = malloc(count * opd_dtype_bytes(dtype));
	ck_assert_ptr_nonnull(vector->memory);
	vector->tensor = (opd_tensor){
		.struct_bytes = sizeof(opd_tensor),
		.dtype = dtype,
		.rank = 1,
		.shape = vector->shape,
		.strides = vector->strides,
		.data = vector->memory,
		.elements = count,
		.alignment = 16,
		.flags = OPD_TENSOR_CONTIGUOUS,
	};
}

static void *vector_at(const struct vector *vector, uint64_t index)
{
	return vector->memory + index * opd_dtype_bytes(vector->tensor.dtype);
}

static void run(const char *op, const opd_arg *args, uint32_t arg_count, const opd_tensor *const *outputs, uint32_t output_count)
{
	const struct host_impl *impl = host_find_impl(&host, "cpu", op);
	opd_call call = {.struct_bytes = sizeof call, .arg_count = arg_count, .output_count = output_count, .args = args, .outputs = outputs};
	opd_error error = {0};
	ck_assert_ptr_nonnull(impl);
	ck_assert_msg(host_run(&host, impl, &call, 1, &error) == OPD_OK, "%s: %s", op, error.text);
}

/* ---- cast --------------------------------------------------------------------------------------------------------------- */

static bool is_number(opd_dtype dtype)
{
	return opd_dtype_is_float(dtype) || opd_dtype_is_f8(dtype);
}

/* What the catalogue's cast makes of one element. */
static void cast_element(opd_dtype from, const void *x, opd_dtype to, void *y)
{
	if (is_number(from))
		element_store_f64(to, y, element_load_f64(from, x));
	else
		element_store_i64(to, y, element_load_i64(from, x));
}

static bool same_element(opd_dtype dtype, const void *a, const void *b)
{
	if (is_number(dtype) && isnan(element_load_f64(dtype, a)))
		return isnan(element_load_f64(dtype, b));
	return memcmp(a, b, opd_dtype_bytes(dtype)) == 0;
}

static void check_casts(const struct vector *x)
{
	opd_dtype from = x->tensor.dtype;
	for (int to = 1; to < OPD_DTYPE_COUNT; to++) {
		struct vector y;
		vector_init(&y, (opd_dtype)to, x->tensor.elements);
		const opd_tensor *output = &y.tensor;
		const opd_arg args[] = {{.kind = OPD_ARG_TENSOR, .tensor = &x->tensor}, {.kind = OPD_ARG_STR, .str = opd_dtype_name((opd_dtype)to)}};
		run("cast", args, 2, &output, 1);
		for (uint64_t i = 0; i < x->tensor.elements; i++) {
			unsigned char want[8];
			cast_element(from, vector_at(x, i), (opd_dtype)to, want);
			if (!same_element((opd_dtype)to, want, vector_at(&y, i))) /* an assertion each would take longer than the casts */
				ck_abort_msg("%s %.17g to %s: got %.17g, want %.17g", opd_dtype_name(from), element_load_f64(from, vector_at(x, i)),
				             opd_dtype_name((opd_dtype)to), element_load_f64((opd_dtype)to, vector_at(&y, i)),
				             element_load_f64((opd_dtype)to, want));
		}
		free(y.memory);
	}
}

/* Dtypes of one and two bytes: every bit pattern. */
START_TEST(cast_of_every_small_value_is_exact)
{
	if (!isa_open(_i))
		return;
	for (int dtype = 1; dtype < OPD_DTYPE_COUNT; dtype++) {
		size_t bytes = opd_dtype_bytes((opd_dtype)dtype);
		struct vector x;
		if (bytes > 2)
			continue;
		vector_init(&x, (opd_dtype)dtype, bytes == 1 ? 256 : 65536);
		for (uint64_t i = 0; i < x.tensor.elements; i++)
			memcpy(vector_at(&x, i), &i, bytes);
		check_casts(&x);
		free(x.memory);
	}
	host_fini(&host);
}
END_TEST

static uint64_t random_bits(uint64_t *state)
{
	*state += 0x9e3779b97f4a7c15u;
	uint64_t z = (*state ^ *state >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

/* Midpoints between neighbours of every narrow float, and a hair to each side of them: where a second rounding shows. */
static uint64_t fill_midpoints(double *values, uint64_t room)
{
	static const opd_dtype narrow[] = {OPD_bf16, OPD_f16, OPD_f8_e4m3fn, OPD_f8_e5m2};
	uint64_t count = 0;
	for (size_t d = 0; d < 4; d++) {
		size_t bytes = opd_dtype_bytes(narrow[d]);
		for (uint32_t code = 0; code + 1 < 1u << (8 * bytes - 1) && count + 6 <= room; code += bytes == 1 ? 1 : 13) {
			uint32_t next = code + 1;
			double middle = (element_load_f64(narrow[d], &code) + element_load_f64(narrow[d], &next)) / 2;
			const double near[] = {middle, nextafter(middle, 0), nextafter(middle, INFINITY)};
			for (int i = 0; i < 3; i++) {
				values[count++] = near[i];
				values[count++] = -near[i];
			}
		}
	}
	return count;
}

START_TEST(cast_of_floats_rounds_once)
{
	enum { ROOM = 80000 };
	if (!isa_open(_i))
		return;
	uint64_t state = 1;
	struct vector wide, single;
	vector_init(&wide, OPD_f64, ROOM);
	uint64_t count = fill_midpoints((double *)wide.memory, ROOM / 2);
	for (; count < ROOM; count++) { /* any exponent, and exponents that narrow floats have */
		uint64_t bits = random_bits(&state);
		double value = ldexp(1 + (double)(bits >> 12) * 0x1p-52, (int)(bits % 340) - 170) * (bits & 0x400 ? -1 : 1);
		memcpy(vector_at(&wide, count), count % 2 == 0 ? (void *)&bits : (void *)&value, sizeof bits);
	}
	vector_init(&single, OPD_f32, ROOM);
	for (uint64_t i = 0; i < ROOM; i++)
		element_store_f64(OPD_f32, vector_at(&single, i), element_load_f64(OPD_f64, vector_at(&wide, i)));
	check_casts(&wide);
	check_casts(&single);
	free(wide.memory);
	free(single.memory);
	host_fini(&host);
}
END_TEST

/* Around each power of two, and around the midpoints of the floats there. */
START_TEST(cast_of_integers_rounds_once_and_wraps)
{
	enum { ROOM = 64 * 600 };
	if (!isa_open(_i))
		return;
	uint64_t state = 7;
	struct vector wide, word;
	vector_init(&wide, OPD_i64, ROOM);
	vector_init(&word, OPD_i32, ROOM);
	for (uint64_t i = 0; i < ROOM; i++) {
		uint64_t bit = 1ull << (i % 64), low = random_bits(&state);
		uint64_t places = low % 40, kept = (bit | (low & (bit - 1))) & ~((places < 64 ? 1ull << places : 0) - 1);
		int64_t value = (int64_t)(kept + (low >> 40) % 3 - 1);
		memcpy(vector_at(&wide, i), &value, sizeof value);
		element_store_i64(OPD_i32, vector_at(&word, i), i % 2 == 0 ? value : -value);
	}
	const int64_t ends[] = {INT64_MIN, INT64_MAX, INT32_MIN, INT32_MAX, (1ll << 53) + 1, -(1ll << 53) - 1, (1ll << 62) + 1};
	memcpy(wide.memory, ends, sizeof ends);
	check_casts(&wide);
	check_casts(&word);
	free(wide.memory);
	free(word.memory);
	host_fini(&host);
}
END_TEST

/* ---- topk --------------------------------------------------------------------------------------------------------------- */

static bool ranks_above(opd_dtype dtype, const void *a, const void *b)
{
	if (!is_number(dtype))
		return element_load_i64(dtype, a) > element_load_i64(dtype, b);
	double x = element_load_f64(dtype, a), y = element_load_f64(dtype, b);
	return isnan(x) ? !isnan(y) : x > y;
}

/* Many equals, both zeros, several NaNs: sorted all the way, order and ties are seen. */
static void check_topk(opd_dtype dtype, uint64_t count, uint64_t k)
{
	struct vector x, values, indices;
	uint64_t state = count;
	vector_init(&x, dtype, count);
	vector_init(&values, dtype, k);
	vector_init(&indices, OPD_i64, k);
	for (uint64_t i = 0; i < count; i++) {
		uint64_t bits = random_bits(&state);
		element_store_f64(dtype, vector_at(&x, i), bits % 11 == 0 ? (double)NAN : bits % 7 == 0 ? -0.0 : (double)(int)(bits % 9) - 4);
	}
	const opd_arg args[] = {{.kind = OPD_ARG_TENSOR, .tensor = &x.tensor}, {.kind = OPD_ARG_INT, .i = (int64_t)k}};
	const opd_tensor *outputs[] = {&values.tensor, &indices.tensor};
	run("topk", args, 2, outputs, 2);
	for (uint64_t i = 0; i < k; i++) {
		int64_t at = ((int64_t *)indices.memory)[i];
		ck_assert_msg(at >= 0 && (uint64_t)at < count && memcmp(vector_at(&values, i), vector_at(&x, (uint64_t)at), opd_dtype_bytes(dtype)) == 0,
		              "%s: result %llu isn't the element that it names", opd_dtype_name(dtype), (unsigned long long)i);
		if (i == 0)
			continue;
		int64_t before = ((int64_t *)indices.memory)[i - 1];
		const void *a = vector_at(&x, (uint64_t)before), *b = vector_at(&x, (uint64_t)at);
		ck_assert_msg(ranks_above(dtype, a, b) || (!ranks_above(dtype, b, a) && before < at), "%s: results %llu and %llu are out of order",
		              opd_dtype_name(dtype), (unsigned long long)i - 1, (unsigned long long)i);
	}
	free(x.memory);
	free(values.memory);
	free(indices.memory);
}

START_TEST(topk_orders_equals_by_index)
{
	static const uint64_t sizes[][2] = {{1, 1}, {5, 5}, {127, 127}, {128, 3}, {129, 128}, {1000, 1000}, {5000, 700}};
	if (!isa_open(_i))
		return;
	for (int dtype = 1; dtype < OPD_DTYPE_COUNT; dtype++)
		for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
			check_topk((opd_dtype)dtype, sizes[s][0], sizes[s][1]);
	host_fini(&host);
}
END_TEST

/* ---- Products ----------------------------------------------------------------------------------------------------------- */

/* A view of a vector as a matrix. */
struct matrix {
	opd_tensor tensor;
	int64_t shape[2], strides[2];
};

static void matrix_init(struct matrix *matrix, const struct vector *vector, int64_t rows, int64_t columns, int64_t row_stride,
                        int64_t column_stride)
{
	matrix->tensor = vector->tensor;
	matrix->shape[0] = rows, matrix->shape[1] = columns;
	matrix->strides[0] = row_stride, matrix->strides[1] = column_stride;
	matrix->tensor.rank = 2;
	matrix->tensor.shape = matrix->shape;
	matrix->tensor.strides = matrix->strides;
	matrix->tensor.elements = (uint64_t)(rows * columns);
	bool contiguous = row_stride == columns && column_stride == 1;
	matrix->tensor.flags = rows * columns == 0 ? (uint32_t)OPD_TENSOR_EMPTY | (uint32_t)OPD_TENSOR_CONTIGUOUS
	                                           : contiguous ? (uint32_t)OPD_TENSOR_CONTIGUOUS : 0;
}

static void fill_noise(const struct vector *vector, uint64_t seed)
{
	for (uint64_t i = 0; i < vector->tensor.elements; i++)
		element_store_f64(vector->tensor.dtype, vector_at(vector, i), (double)(int64_t)(random_bits(&seed) >> 40) * 0x1p-22 - 2);
}

/* a · b once with b as it is and once with b's columns contiguous; then its last row alone: two ways through b, and the packing of both. */
static void check_matmul(opd_dtype dtype, int64_t rows, int64_t depth, int64_t columns)
{
	struct vector a, b, turned, y, other;
	struct matrix left, right, right_turned, result, result_other;
	vector_init(&a, dtype, (uint64_t)(rows * depth));
	vector_init(&b, dtype, (uint64_t)(depth * columns));
	vector_init(&turned, dtype, (uint64_t)(depth * columns));
	vector_init(&y, dtype, (uint64_t)(rows * columns));
	vector_init(&other, dtype, (uint64_t)(rows * columns));
	fill_noise(&a, 1);
	fill_noise(&b, 2);
	for (int64_t k = 0; k < depth; k++)
		for (int64_t n = 0; n < columns; n++)
			memcpy(vector_at(&turned, (uint64_t)(n * depth + k)), vector_at(&b, (uint64_t)(k * columns + n)), opd_dtype_bytes(dtype));
	matrix_init(&left, &a, rows, depth, depth, 1);
	matrix_init(&right, &b, depth, columns, columns, 1);
	matrix_init(&right_turned, &turned, depth, columns, 1, depth);
	matrix_init(&result, &y, rows, columns, columns, 1);
	matrix_init(&result_other, &other, rows, columns, columns, 1);
	const opd_tensor *output = &result.tensor, *output_other = &result_other.tensor;
	opd_arg args[] = {{.kind = OPD_ARG_TENSOR, .tensor = &left.tensor}, {.kind = OPD_ARG_TENSOR, .tensor = &right.tensor}};
	run("matmul", args, 2, &output, 1);
	args[1].tensor = &right_turned.tensor;
	run("matmul", args, 2, &output_other, 1);
	ck_assert_msg(memcmp(y.memory, other.memory, y.tensor.elements * opd_dtype_bytes(dtype)) == 0,
	              "%s %lld x %lld x %lld: strides of b change bits", opd_dtype_name(dtype), (long long)rows, (long long)depth,
	              (long long)columns);
	for (int way = 0; way < 2; way++) {
		left.tensor.byte_offset = (uint64_t)((rows - 1) * depth) * opd_dtype_bytes(dtype);
		left.shape[0] = result_other.shape[0] = 1;
		left.tensor.elements = (uint64_t)depth;
		result_other.tensor.elements = (uint64_t)columns;
		args[1].tensor = way == 0 ? &right.tensor : &right_turned.tensor;
		run("matmul", args, 2, &output_other, 1);
		ck_assert_msg(memcmp(vector_at(&y, (uint64_t)((rows - 1) * columns)), other.memory, (size_t)columns * opd_dtype_bytes(dtype)) == 0,
		              "%s %lld x %lld x %lld: a row alone has other bits", opd_dtype_name(dtype), (long long)rows, (long long)depth,
		              (long long)columns);
	}
	free(a.memory);
	free(b.memory);
	free(turned.memory);
	free(y.memory);
	free(other.memory);
}

START_TEST(matmul_has_the_same_bits_on_every_way)
{
	static const opd_dtype dtypes[] = {OPD_f32, OPD_bf16, OPD_f16};
	static const int64_t sizes[][3] = {{5, 1, 1}, {7, 513, 33}, {3, 512, 129}, {100, 1030, 70}, {97, 40, 513}};
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++)
		for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
			check_matmul(dtypes[d], sizes[s][0], sizes[s][1], sizes[s][2]);
	host_fini(&host);
}
END_TEST

/* scaled_mm of i8 that are all `left` and all `right`, scales 1, f32 out: the product itself where f32 holds it. */
static float scaled_of(int8_t left, int8_t right, int64_t rows, int64_t depth)
{
	enum { COLUMNS = 7 };
	struct vector a, b, scale, y;
	struct matrix left_matrix, right_matrix, result;
	vector_init(&a, OPD_i8, (uint64_t)(rows * depth) + 1);
	vector_init(&b, OPD_i8, (uint64_t)(COLUMNS * depth) + 1);
	vector_init(&scale, OPD_f32, 1);
	vector_init(&y, OPD_f32, (uint64_t)rows * COLUMNS);
	memset(a.memory, left, (size_t)(rows * depth));
	memset(b.memory, right, (size_t)(COLUMNS * depth));
	*(float *)scale.memory = 1;
	matrix_init(&left_matrix, &a, rows, depth, depth, 1);
	matrix_init(&right_matrix, &b, COLUMNS, depth, depth, 1);
	matrix_init(&result, &y, rows, COLUMNS, COLUMNS, 1);
	const opd_arg args[] = {
		{.kind = OPD_ARG_TENSOR, .tensor = &left_matrix.tensor}, {.kind = OPD_ARG_TENSOR, .tensor = &right_matrix.tensor},
		{.kind = OPD_ARG_TENSOR, .tensor = &scale.tensor},       {.kind = OPD_ARG_TENSOR, .tensor = &scale.tensor},
		{.kind = OPD_ARG_NONE},                                  {.kind = OPD_ARG_STR, .str = "f32"}};
	const opd_tensor *output = &result.tensor;
	run("scaled_mm", args, 6, &output, 1);
	float first = *(float *)y.memory;
	for (uint64_t i = 0; i < y.tensor.elements; i++)
		ck_assert_float_eq(((float *)y.memory)[i], first);
	free(a.memory);
	free(b.memory);
	free(scale.memory);
	free(y.memory);
	return first;
}

START_TEST(scaled_mm_of_i8_is_exact_at_its_ends)
{
	static const int64_t depths[] = {0, 1, 15, 63, 64, 65, 1000, 131071};
	static const int8_t ends[] = {-128, -1, 127};
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < sizeof depths / sizeof depths[0]; d++)
		for (int64_t rows = 1; rows < 7; rows += 5)
			for (int i = 0; i < 9; i++) {
				int64_t want = (int64_t)ends[i / 3] * ends[i % 3] * depths[d];
				ck_assert_float_eq(scaled_of(ends[i / 3], ends[i % 3], rows, depths[d]), (float)want);
			}
	host_fini(&host);
}
END_TEST

/* ---- Attention ----------------------------------------------------------------------------------------------------------- */

enum { ATTEND_KEYS = 83, ATTEND_HEADS = 8, ATTEND_SIZE = 64 };

/* Gives a vector the shape [1, tokens, heads, ATTEND_SIZE]. */
static void attention_shape(struct vector *vector, int64_t tokens, int64_t heads, int64_t shape[4], int64_t strides[4])
{
	const int64_t extents[] = {1, tokens, heads, ATTEND_SIZE};
	int64_t stride = 1;
	for (int i = 3; i >= 0; i--) {
		shape[i] = extents[i];
		strides[i] = stride;
		stride *= extents[i];
	}
	vector->tensor.rank = 4;
	vector->tensor.shape = shape;
	vector->tensor.strides = strides;
}

/* Keys so large that queries are denormal (odd heads) or just not (even ones). */
static double attention_query(uint64_t head)
{
	return head % 2 == 1 ? 0x1p-127 : 0x1p-124;
}

static double attention_key(uint64_t key)
{
	return 0x1p122 * (double)(key / 12);
}

static void attention_run(int64_t tokens, const struct vector *key, const struct vector *value, struct vector *y_out)
{
	const uint64_t elements = (uint64_t)tokens * ATTEND_HEADS * ATTEND_SIZE;
	int64_t shapes[2][4], strides[2][4];
	struct vector query;
	vector_init(&query, OPD_bf16, elements);
	vector_init(y_out, OPD_bf16, elements);
	attention_shape(&query, tokens, ATTEND_HEADS, shapes[0], strides[0]);
	attention_shape(y_out, tokens, ATTEND_HEADS, shapes[1], strides[1]);
	for (uint64_t i = 0; i < elements; i++)
		element_store_f64(OPD_bf16, vector_at(&query, i), attention_query(i / ATTEND_SIZE % ATTEND_HEADS));
	const opd_tensor *output = &y_out->tensor;
	const opd_arg args[] = {{.kind = OPD_ARG_TENSOR, .tensor = &query.tensor}, {.kind = OPD_ARG_TENSOR, .tensor = &key->tensor},
	                        {.kind = OPD_ARG_TENSOR, .tensor = &value->tensor}, {.kind = OPD_ARG_FLOAT, .f = 0.25}, {.kind = OPD_ARG_BOOL, .b = false}};
	run("attention", args, 5, &output, 1);
	free(query.memory);
}

/* Values are the numbers of their keys. */
static double attention_want(uint64_t head)
{
	double sum = 0, mixed = 0;
	for (uint64_t j = 0; j < ATTEND_KEYS; j++) {
		double weight = exp(0.25 * ATTEND_SIZE * attention_query(head) * attention_key(j));
		sum += weight;
		mixed += weight * (double)j;
	}
	return mixed / sum;
}

/* Instructions for pairs of bf16 take denormals for 0. */
START_TEST(attention_keeps_denormal_queries_and_the_bits_of_a_decode_step)
{
	if (!isa_open(_i))
		return;
	int64_t shapes[2][4], strides[2][4];
	struct vector key, value, alone, among;
	vector_init(&key, OPD_bf16, ATTEND_KEYS * ATTEND_SIZE);
	vector_init(&value, OPD_bf16, ATTEND_KEYS * ATTEND_SIZE);
	attention_shape(&key, ATTEND_KEYS, 1, shapes[0], strides[0]);
	attention_shape(&value, ATTEND_KEYS, 1, shapes[1], strides[1]);
	for (uint64_t i = 0; i < ATTEND_KEYS * ATTEND_SIZE; i++) {
		element_store_f64(OPD_bf16, vector_at(&key, i), attention_key(i / ATTEND_SIZE));
		element_store_f64(OPD_bf16, vector_at(&value, i), (double)(i / ATTEND_SIZE));
	}
	attention_run(1, &key, &value, &alone);
	attention_run(5, &key, &value, &among);
	for (uint64_t i = 0; i < ATTEND_HEADS * ATTEND_SIZE; i++)
		ck_assert_double_eq_tol(element_load_f64(OPD_bf16, vector_at(&alone, i)), attention_want(i / ATTEND_SIZE), 0.3);
	for (uint64_t t = 0; t < 5; t++)
		ck_assert_mem_eq(alone.memory, vector_at(&among, t * ATTEND_HEADS * ATTEND_SIZE), ATTEND_HEADS * ATTEND_SIZE * 2);
	free(key.memory);
	free(value.memory);
	free(alone.memory);
	free(among.memory);
	host_fini(&host);
}
END_TEST

static Suite *values_suite(void)
{
	Suite *suite = suite_create("cpu values");
	TCase *each = tcase_create("each instruction set");
	int sets = 0;
	while (cpu_isas[sets] != NULL)
		sets++;
	tcase_set_timeout(each, 300);
	tcase_add_loop_test(each, cast_of_every_small_value_is_exact, 0, sets);
	tcase_add_loop_test(each, cast_of_floats_rounds_once, 0, sets);
	tcase_add_loop_test(each, cast_of_integers_rounds_once_and_wraps, 0, sets);
	tcase_add_loop_test(each, topk_orders_equals_by_index, 0, sets);
	tcase_add_loop_test(each, matmul_has_the_same_bits_on_every_way, 0, sets);
	tcase_add_loop_test(each, scaled_mm_of_i8_is_exact_at_its_ends, 0, sets);
	tcase_add_loop_test(each, attention_keeps_denormal_queries_and_the_bits_of_a_decode_step, 0, sets);
	suite_add_tcase(suite, each);
	return suite;
}

int main(void)
{
	SRunner *runner = srunner_create(values_suite());
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
