/* The parts of opctl that need no daemon: options, numbers, schemas, tensor forms, comparison, summaries, latencies.
 *
 * Prints each broken promise and exits 1 if there is one. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/opctl/compare.h"
#include "client/opctl/latency.h"
#include "client/opctl/options.h"
#include "client/opctl/schema.h"
#include "client/opctl/summary.h"
#include "client/opctl/tensor_spec.h"
#include "proto/tensor.h"

static unsigned failures;

static bool check(bool holds, const char *promise, const char *detail)
{
	if (!holds) {
		failures++;
		(void)printf("FAIL %s (%s)\n", promise, detail);
	}
	return holds;
}

/* ---- Options and numbers ---- */

static void test_options(void)
{
	char *argv[] = {"opctl", "--json", "run", "-1", "--device=cpu", "-o", "y.npy", "-.5", "-inf", "--", "--strict", NULL};
	struct options options;
	opd_error error = {0};
	check(options_parse(&options, 11, argv, &error) == OPD_OK, "a good command line is taken", error.text);
	check(options.count == 5 && strcmp(options.positional[0], "run") == 0 && strcmp(options.positional[1], "-1") == 0 &&
	          strcmp(options.positional[2], "-.5") == 0 && strcmp(options.positional[4], "--strict") == 0,
	      "negative numbers and what follows -- are values", "count");
	check(options_has(&options, OPTION_JSON) && !options_has(&options, OPTION_STRICT) &&
	          strcmp(options.values[OPTION_DEVICE], "cpu") == 0 && strcmp(options.values[OPTION_OUTPUT], "y.npy") == 0,
	      "options are found anywhere, with = or without", "json, device, o");
	options_fini(&options);
	static char *const bad[][3] = {{"opctl", "--nonsense", NULL}, {"opctl", "-q", NULL},         {"opctl", "--device", NULL},
	                               {"opctl", "--jso", NULL},      {"opctl", "--json=yes", NULL}, {"opctl", "--json", "--json"}};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
		check(options_parse(&options, bad[i][2] == NULL ? 2 : 3, (char **)bad[i], &error) == OPD_INVALID_ARGUMENT,
		      "a bad option is refused", bad[i][1]);
		options_fini(&options);
	}
}

static void test_numbers(void)
{
	int64_t i = 7;
	double f = 7;
	uint64_t us = 7;
	opd_error error;
	check(parse_int("n", "-9223372036854775808", INT64_MIN, INT64_MAX, &i, &error) == OPD_OK && i == INT64_MIN,
	      "the least int fits", "n");
	check(parse_float("f", "-1.5e-3", &f, &error) == OPD_OK && f == -1.5e-3, "a float is read", "f");
	check(parse_seconds("s", "0.25", &us, &error) == OPD_OK && us == 250000, "seconds are read", "s");
	static const char *const bad[] = {"",    " 1",   "1 ", "x", "1x", "9223372036854775808", "-9223372036854775809",
	                                  "1.0", "0x10", "\t1"};
	for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++)
		check(parse_int("n", bad[k], INT64_MIN, INT64_MAX, &i, &error) == OPD_INVALID_ARGUMENT && i == INT64_MIN,
		      "a bad int is refused", bad[k]);
	check(parse_int("n", "300", 0, 255, &i, &error) == OPD_INVALID_ARGUMENT &&
	          strstr(error.text, "n is 300, expected 0 to 255") != NULL,
	      "an int out of range is named", error.text);
	static const char *const bad_floats[] = {"", " 1", "1e999", "1e5x", "--1"};
	for (size_t k = 0; k < sizeof bad_floats / sizeof bad_floats[0]; k++)
		check(parse_float("f", bad_floats[k], &f, &error) == OPD_INVALID_ARGUMENT, "a bad float is refused", bad_floats[k]);
	check(parse_seconds("s", "-1", &us, &error) == OPD_INVALID_ARGUMENT &&
	          parse_seconds("s", "nan", &us, &error) == OPD_INVALID_ARGUMENT,
	      "bad seconds are refused", "s");
}

static void test_lists(void)
{
	struct name_list list;
	opd_error error;
	check(name_list_parse("l", "a,b", &list, &error) == OPD_OK && list.count == 2 && strcmp(list.names[1], "b") == 0,
	      "a list is cut at commas", "a,b");
	name_list_fini(&list);
	check(name_list_parse("l", "", &list, &error) == OPD_OK && list.count == 0, "an empty text is an empty list", "");
	name_list_fini(&list);
	char many[200];
	memset(many, ',', sizeof many);
	many[sizeof many - 1] = '\0';
	check(name_list_parse("l", many, &list, &error) == OPD_INVALID_ARGUMENT, "a list that is too long is refused", "200");
}

/* ---- Schemas ---- */

static void test_schemas(void)
{
	struct schema schema;
	opd_error error;
	check(schema_parse("f(Tensor x, Tensor? w, float e, int? n=None, int[] k=[1, 2], str s=\"a,)\", bool b=True, Tensor[] ts) -> "
	                   "(Tensor, Tensor)",
	                   &schema, &error) == OPD_OK,
	      "a schema is read", error.text);
	static const param_type types[] = {PARAM_TENSOR, PARAM_TENSOR, PARAM_FLOAT, PARAM_INT,
	                                   PARAM_INTS,   PARAM_STR,    PARAM_BOOL,  PARAM_TENSORS};
	check(schema.count == 8 && schema.results == 2, "its parameters and results are counted", "8, 2");
	for (size_t i = 0; i < 8 && i < schema.count; i++)
		check(schema.params[i].type == types[i], "its types are known", schema.params[i].name);
	check(schema.params[1].optional && schema.params[3].optional && !schema.params[0].optional, "? is optional", "w, n");
	check(schema_find(&schema, "ts", 2) == &schema.params[7] && schema_find(&schema, "t", 1) == NULL, "names are found whole",
	      "ts");
	check(schema_parse("f() -> Tensor", &schema, &error) == OPD_OK && schema.count == 0 && schema.results == 1,
	      "no parameter is fine", "f()");
	check(schema_parse("f(complex z) -> Tensor", &schema, &error) == OPD_OK && schema.params[0].type == PARAM_UNKNOWN,
	      "a new type is unknown", "complex");
	static const char *const bad[] = {
	    "", "f", "f(", "f(Tensor", "f(Tensor x", "f(Tensor x, ", "f(x) -> Tensor", "f(,)", "f(Tensor x=\"", "f(int[] k=[1"};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
		check(schema_parse(bad[i], &schema, &error) == OPD_INVALID_ARGUMENT, "a broken schema is refused", bad[i]);
	char *wide = malloc(4096);
	if (wide == NULL)
		exit(2);
	size_t at = (size_t)sprintf(wide, "f(");
	for (unsigned i = 0; i <= BOUND_ARGS; i++)
		at += (size_t)sprintf(wide + at, "int a%u,", i);
	check(schema_parse(wide, &schema, &error) == OPD_INVALID_ARGUMENT, "too many parameters are refused", "257");
	(void)sprintf(wide, "f(int %0200d)", 1);
	check(schema_parse(wide, &schema, &error) == OPD_INVALID_ARGUMENT, "too long a name is refused", "200 bytes");
	free(wide);
}

/* ---- Tensors ---- */

static opd_status read_spec(const char *text, struct file_tensor *tensor, opd_error *error)
{
	uint64_t seed = 0;
	memset(tensor, 0, sizeof *tensor);
	return tensor_spec_read("x", text, &seed, tensor, error);
}

static void test_tensor_specs(void)
{
	struct file_tensor tensor;
	opd_error error = {0};
	if (check(read_spec("i32[2,2]=1,-2,3,4", &tensor, &error) == OPD_OK, "values are read", error.text)) {
		const int32_t *data = tensor.data;
		check(tensor.rank == 2 && tensor.shape[1] == 2 && tensor.strides[0] == 2 && data[1] == -2 && data[3] == 4,
		      "values lie row-major", "1,-2,3,4");
	}
	file_tensor_fini(&tensor);
	if (check(read_spec("f32[3]=0.5", &tensor, &error) == OPD_OK, "one value fills", error.text))
		check(((float *)tensor.data)[2] == 0.5f, "one value fills", "0.5");
	file_tensor_fini(&tensor);
	if (check(read_spec("arange:i64[3]", &tensor, &error) == OPD_OK, "arange counts", error.text))
		check(((int64_t *)tensor.data)[2] == 2, "arange counts", "2");
	file_tensor_fini(&tensor);
	if (check(read_spec("randn:f32[1000]", &tensor, &error) == OPD_OK, "randn makes numbers", error.text)) {
		double sum = 0, squares = 0;
		for (int i = 0; i < 1000; i++) {
			sum += ((float *)tensor.data)[i];
			squares += (double)((float *)tensor.data)[i] * ((float *)tensor.data)[i];
		}
		check(fabs(sum / 1000) < 0.15 && fabs(squares / 1000 - 1) < 0.2, "randn is normal", "mean 0, variance 1");
	}
	file_tensor_fini(&tensor);
	check(read_spec("bf16[]", &tensor, &error) == OPD_OK && tensor.data == NULL && tensor.rank == 0, "a bare shape has no data",
	      error.text);
	check(read_spec("zeros:f32[0,4]", &tensor, &error) == OPD_OK && tensor.bytes == 0, "an empty tensor is made", error.text);
	file_tensor_fini(&tensor);
	static const char *const bad[] = {"",
	                                  "f32",
	                                  "f32[",
	                                  "f32[2",
	                                  "f32[2]x",
	                                  "f32[-1]",
	                                  "f32[x]",
	                                  "f32[1,1,1,1,1,1,1,1,1]",
	                                  "f33[2]",
	                                  "f32[2]=",
	                                  "f32[2]=1,2,",
	                                  "f32[0]=1,2",
	                                  "u8[1]=-1",
	                                  "bool[1]=2",
	                                  "i64[1]=1.5",
	                                  "randn:i8[1]",
	                                  "ones:f32[2]=1",
	                                  "zeros:f32",
	                                  "ones:@x.npy",
	                                  "@",
	                                  "@x",
	                                  "@x.npy.txt",
	                                  "f32[9223372036854775807]",
	                                  "f32[4294967296,4294967296,0]"};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
		check(read_spec(bad[i], &tensor, &error) == OPD_INVALID_ARGUMENT, "a bad tensor is refused", bad[i]);
		file_tensor_fini(&tensor);
	}
	check(tensor_spec_looks_like("@x") && tensor_spec_looks_like("f32[2]") && tensor_spec_looks_like("ones:") &&
	          !tensor_spec_looks_like("[1,2]") && !tensor_spec_looks_like("tanh"),
	      "a tensor is told from a word", "looks");
}

/* ---- Comparing ---- */

static void make(opd_tensor *tensor, opd_dtype dtype, const int64_t *shape, void *data)
{
	static const int64_t strides[1] = {1};
	memset(tensor, 0, sizeof *tensor);
	tensor_describe(tensor, dtype, 1, shape, strides, 0);
	tensor->data = data;
}

static bool equal(opd_dtype dtype, int64_t count, void *got, void *want, double atol, double rtol, struct comparison *out)
{
	const int64_t shape[1] = {count};
	opd_tensor tensor;
	make(&tensor, dtype, shape, got);
	struct file_tensor file = {.dtype = dtype, .rank = 1, .shape = {count}, .strides = {1}, .data = want};
	compare_tensors(&tensor, &file, atol, rtol, out);
	return out->equal;
}

static void test_compare(void)
{
	struct comparison out;
	float one[3] = {1, NAN, INFINITY}, two[3] = {1.5f, NAN, INFINITY};
	check(equal(OPD_f32, 3, one, one, 0, 0, &out) && out.max_abs == 0 && out.why[0] == '\0', "NaN equals NaN, an infinity itself",
	      out.why);
	check(equal(OPD_f32, 3, two, one, 0.5, 0, &out) && out.max_abs == 0.5 && out.max_rel == 0.5, "atol is allowed", out.why);
	check(equal(OPD_f32, 3, two, one, 0, 0.5, &out), "rtol counts from what is wanted", out.why);
	check(!equal(OPD_f32, 3, two, one, 0.25, 0.2, &out) && strstr(out.why, "at [0] got 1.5, want 1") != NULL,
	      "past both it fails and says where", out.why);
	float nan = NAN, zero = 0, inf = INFINITY, minus = -INFINITY;
	check(!equal(OPD_f32, 1, &nan, &zero, 1e9, 1e9, &out) && !equal(OPD_f32, 1, &zero, &nan, 1e9, 1e9, &out),
	      "NaN equals no number", out.why);
	check(!equal(OPD_f32, 1, &inf, &minus, 1e9, 1e9, &out) && !equal(OPD_f32, 1, &zero, &inf, 1e9, 1e9, &out),
	      "no tolerance reaches infinity", out.why);
	int64_t big = INT64_MAX, less = INT64_MAX - 1;
	check(!equal(OPD_i64, 1, &big, &less, 100, 100, &out), "integers are exact, past 2^53 too", out.why);
	uint8_t yes = 1, no = 0, fp8 = 0x38, fp8_near = 0x39;
	check(!equal(OPD_bool, 1, &yes, &no, 9, 9, &out), "bools are exact", out.why);
	check(equal(OPD_f8_e4m3fn, 1, &fp8_near, &fp8, 0.125, 0, &out) && !equal(OPD_f8_e4m3fn, 1, &fp8_near, &fp8, 0.12, 0, &out),
	      "f8 is compared decoded", out.why);
	check(!equal(OPD_f32, 1, &one[0], &zero, NAN, 0, &out), "a NaN tolerance allows nothing", out.why);
}

static void test_summary(void)
{
	float data[5] = {NAN, -INFINITY, -1, 2, 5};
	const int64_t shape[1] = {5};
	opd_tensor tensor;
	struct summary summary;
	make(&tensor, OPD_f32, shape, data);
	summary_of(&tensor, &summary);
	check(summary.nan == 1 && summary.inf == 1 && summary.min == -1 && summary.max == 5 && summary.mean == 2,
	      "a summary is of the finite", "f32");
	int64_t ints[5] = {INT64_MIN, 0, 1, 2, INT64_MAX};
	make(&tensor, OPD_i64, shape, ints);
	summary_of(&tensor, &summary);
	check(summary.min_int == INT64_MIN && summary.max_int == INT64_MAX, "integers' range is exact", "i64");
	char text[64];
	element_text(&tensor, 4, text, sizeof text);
	check(strcmp(text, "9223372036854775807") == 0, "integers are printed in full", text);
}

static void test_latency(void)
{
	struct latency *latency = calloc(1, sizeof *latency);
	if (latency == NULL)
		exit(2);
	check(latency_at(latency, 0.5) == 0, "an empty histogram says 0", "p50");
	for (uint64_t ns = 1; ns <= 100000; ns++)
		latency_add(latency, ns);
	static const double fractions[] = {0.01, 0.5, 0.9, 0.99, 1};
	for (size_t i = 0; i < sizeof fractions / sizeof fractions[0]; i++) {
		const double want = fractions[i] * 100000, got = (double)latency_at(latency, fractions[i]);
		char detail[64];
		(void)snprintf(detail, sizeof detail, "%g: %g, want %g", fractions[i], got, want);
		check(fabs(got - want) <= want * 0.01, "percentiles are right within 1 %", detail);
	}
	latency_add(latency, UINT64_MAX);
	check(latency_at(latency, 1) > UINT64_MAX / 2, "the longest latency has a bucket", "2^64 - 1");
	free(latency);
}

int main(void)
{
	test_options();
	test_numbers();
	test_lists();
	test_schemas();
	test_tensor_specs();
	test_compare();
	test_summary();
	test_latency();
	(void)printf("%s\n", failures == 0 ? "all promises hold" : "some promises are broken");
	return failures == 0 ? 0 : 1;
}
