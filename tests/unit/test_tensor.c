/* Checked sizes of shapes, strides and offsets; one element of any dtype, exhaustively for the small floats. */
#include <check.h>
#include <math.h>
#include <stdbool.h>

#include "proto/element.h"
#include "proto/tensor.h"

/* ---- Sizes ------------------------------------------------------------------------------------------------------------- */

START_TEST(sizes_are_checked)
{
	uint64_t out = 77;
	ck_assert(!size_add(INT64_MAX, 1, &out) && !size_add(UINT64_MAX, 1, &out) && !size_multiply(1ull << 32, 1ull << 31, &out));
	ck_assert(!size_multiply(UINT64_MAX, UINT64_MAX, &out) && !size_align(INT64_MAX, &out) && !size_align(UINT64_MAX, &out));
	ck_assert_uint_eq(out, 77);
	ck_assert(size_multiply(1ull << 31, 1ull << 31, &out) && out == 1ull << 62);
	ck_assert(size_align(0, &out) && out == 0 && size_align(1, &out) && out == 64 && size_align(64, &out) && out == 64);
}
END_TEST

START_TEST(shapes_are_checked)
{
	uint64_t out = 77;
	static const int64_t bad[][3] = {{INT64_MIN, 1, 1},         {-1, 0, 1}, {0, INT64_MAX, 2}, {INT64_MAX, 2, 0},
	                                 {1ll << 32, 1ll << 31, 1}, {0, -1, 5}};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
		ck_assert_msg(!tensor_elements(3, bad[i], &out), "shape %zu", i);
	ck_assert_uint_eq(out, 77);
	ck_assert(!tensor_elements(9, (const int64_t[9]){1, 1, 1, 1, 1, 1, 1, 1, 1}, &out));
	ck_assert(tensor_elements(0, NULL, &out) && out == 1);
	ck_assert(tensor_elements(3, (const int64_t[]){0, INT64_MAX, 1}, &out) && out == 0);
	/* The product fits, times the element's size it doesn't. */
	ck_assert(tensor_elements(1, (const int64_t[]){1ll << 61}, &out) &&
	          !tensor_bytes(OPD_f32, 1, (const int64_t[]){1ll << 61}, &out));
	ck_assert(!tensor_bytes(OPD_DTYPE_NONE, 0, NULL, &out) && !tensor_bytes((opd_dtype)13, 0, NULL, &out));
	ck_assert(tensor_bytes(OPD_f64, 2, (const int64_t[]){3, 5}, &out) && out == 120);
}
END_TEST

START_TEST(extents_are_checked)
{
	const int64_t shape[] = {3, 4};
	uint64_t out = 77;
	ck_assert(tensor_extent(OPD_f32, 2, shape, NULL, 8, &out) && out == 56);
	ck_assert(tensor_extent(OPD_f32, 2, shape, (const int64_t[]){0, 0}, 0, &out) && out == 4);
	ck_assert(tensor_extent(OPD_f32, 2, shape, (const int64_t[]){10, 2}, 4, &out) && out == 4 + 27 * 4);
	ck_assert(tensor_extent(OPD_f32, 2, (const int64_t[]){0, 4}, (const int64_t[]){INT64_MAX, 1}, 12, &out) && out == 12);
	out = 77;
	ck_assert(!tensor_extent(OPD_f32, 2, shape, (const int64_t[]){-1, 1}, 0, &out));
	ck_assert(!tensor_extent(OPD_f32, 2, shape, (const int64_t[]){INT64_MAX, 1}, 0, &out));
	ck_assert(!tensor_extent(OPD_f32, 2, shape, (const int64_t[]){1ll << 60, 1}, 0, &out));
	ck_assert(!tensor_extent(OPD_f32, 2, shape, NULL, 2, &out)); /* no multiple of the element */
	ck_assert(!tensor_extent(OPD_f32, 2, shape, NULL, UINT64_MAX - 3, &out) &&
	          !tensor_extent(OPD_f32, 2, shape, NULL, INT64_MAX - 3, &out));
	ck_assert_uint_eq(out, 77);
	opd_tensor tensor = {0};
	int64_t strides[2];
	tensor_row_major(2, shape, strides);
	tensor_describe(&tensor, OPD_f32, 2, shape, strides, 8);
	ck_assert(strides[0] == 4 && strides[1] == 1 && tensor.elements == 12 && opd_tensor_contiguous(&tensor) &&
	          !opd_tensor_empty(&tensor));
	tensor_describe(&tensor, OPD_f32, 2, shape, (const int64_t[]){5, 1}, 0);
	ck_assert(!opd_tensor_contiguous(&tensor));
	ck_assert(tensor_alignment((const void *)0x1000, 64) == 64 && tensor_alignment((const void *)0x1000, 0) == 4096);
}
END_TEST

/* ---- Elements ---------------------------------------------------------------------------------------------------------- */

/* Decodes a small float by its definition. */
static double small_float(unsigned bits, int exponent_bits, int mantissa_bits, bool infinite)
{
	int bias = (1 << (exponent_bits - 1)) - 1;
	unsigned mantissa = bits & ((1u << mantissa_bits) - 1);
	unsigned exponent = bits >> mantissa_bits & ((1u << exponent_bits) - 1);
	double sign = bits >> (exponent_bits + mantissa_bits) != 0 ? -1 : 1;
	if (exponent + 1 == 1u << exponent_bits && (infinite || mantissa + 1 == 1u << mantissa_bits))
		return infinite && mantissa == 0 ? sign * INFINITY : NAN;
	double fraction = (exponent == 0 ? 0.0 : 1.0) + mantissa * pow(2, -mantissa_bits);
	return sign * fraction * pow(2, (exponent == 0 ? 1 : (int)exponent) - bias);
}

struct small_format {
	opd_dtype dtype;
	int exponent_bits;
	int mantissa_bits;
	bool infinite;
	bool saturates;
};

static const struct small_format small_formats[] = {
    {OPD_f16, 5, 10, true, false},
    {OPD_bf16, 8, 7, true, false},
    {OPD_f8_e4m3fn, 4, 3, false, true},
    {OPD_f8_e5m2, 5, 2, true, true},
};

static unsigned store_bits(opd_dtype dtype, double value)
{
	uint16_t bits = 0;
	element_store_f64(dtype, &bits, value);
	return bits;
}

START_TEST(every_small_float_loads_as_defined_and_stores_back)
{
	const struct small_format *format = &small_formats[_i];
	unsigned count = 1u << (1 + format->exponent_bits + format->mantissa_bits);
	for (unsigned bits = 0; bits < count; bits++) {
		uint16_t element = (uint16_t)bits;
		double want = small_float(bits, format->exponent_bits, format->mantissa_bits, format->infinite);
		double got = element_load_f64(format->dtype, &element);
		if (isnan(want)) {
			ck_assert(isnan(got) && isnan(element_load_f32(format->dtype, &element)));
			uint16_t again = (uint16_t)store_bits(format->dtype, got);
			ck_assert(isnan(element_load_f64(format->dtype, &again)));
			continue;
		}
		ck_assert(got == want && (double)element_load_f32(format->dtype, &element) == want && !signbit(got) == !signbit(want));
		if (!isinf(want) || !format->saturates)
			ck_assert_uint_eq(store_bits(format->dtype, want), bits);
	}
}
END_TEST

/* Between two neighbours: just under the middle goes down, just over it up, the middle to the even one. */
START_TEST(small_floats_round_to_nearest_even_once)
{
	const struct small_format *format = &small_formats[_i];
	unsigned finite =
	    (1u << (format->exponent_bits + format->mantissa_bits)) - (format->infinite ? 1u << format->mantissa_bits : 1);
	for (unsigned bits = 0; bits + 1 < finite; bits++) {
		double low = small_float(bits, format->exponent_bits, format->mantissa_bits, format->infinite);
		double high = small_float(bits + 1, format->exponent_bits, format->mantissa_bits, format->infinite);
		double middle = low + (high - low) / 2;
		ck_assert_uint_eq(store_bits(format->dtype, middle), (bits & 1) == 0 ? bits : bits + 1);
		ck_assert_uint_eq(store_bits(format->dtype, nextafter(middle, -INFINITY)), bits);
		ck_assert_uint_eq(store_bits(format->dtype, nextafter(middle, INFINITY)), bits + 1);
		uint16_t single = 0;
		element_store_f32(format->dtype, &single, (float)middle);
		ck_assert_uint_eq(single, (bits & 1) == 0 ? bits : bits + 1);
	}
	unsigned largest = finite - 1;
	unsigned over = format->saturates ? largest : largest + 1; /* the code after the largest finite one is infinity */
	ck_assert_uint_eq(store_bits(format->dtype, INFINITY), over);
	ck_assert_uint_eq(store_bits(format->dtype, 1e300), over);
}
END_TEST

START_TEST(integers_saturate_from_floats_and_wrap_from_integers)
{
	int8_t i8;
	element_store_f64(OPD_i8, &i8, 1e9);
	ck_assert_int_eq(i8, 127);
	element_store_f64(OPD_i8, &i8, -128.9);
	ck_assert_int_eq(i8, -128);
	element_store_f64(OPD_i8, &i8, NAN);
	ck_assert_int_eq(i8, 0);
	element_store_i64(OPD_i8, &i8, 300);
	ck_assert_int_eq(i8, 44);
	int64_t i64;
	element_store_f64(OPD_i64, &i64, 0x1p63);
	ck_assert(i64 == INT64_MAX);
	element_store_f64(OPD_i64, &i64, -INFINITY);
	ck_assert(i64 == INT64_MIN);
	uint8_t flag;
	element_store_f64(OPD_bool, &flag, NAN);
	ck_assert_uint_eq(flag, 1);
	element_store_f64(OPD_bool, &flag, -0.0);
	ck_assert_uint_eq(flag, 0);
	flag = 7;
	ck_assert(element_load_f64(OPD_bool, &flag) == 1);
}
END_TEST

START_TEST(a_large_integer_rounds_once)
{
	/* 2^62 + 2^51 + 1: just over a tie of bf16 and f16's scale; rounding through f64 first would land on the tie and go down. */
	int64_t value = (1ll << 62) + (1ll << 54) + 1;
	uint16_t bits;
	element_store_i64(OPD_bf16, &bits, value);
	ck_assert(element_load_f64(OPD_bf16, &bits) == 0x1p62 + 0x1p55);
	element_store_i64(OPD_bf16, &bits, value - 1);
	ck_assert(element_load_f64(OPD_bf16, &bits) == 0x1p62);
	float single;
	element_store_i64(OPD_f32, &single, (1ll << 62) + (1ll << 38) + 1);
	ck_assert(single == 0x1p62f + 0x1p39f);
	value = (1ll << 62) + (1ll << 38) + 1;
	ck_assert(element_load_f32(OPD_i64, &value) == 0x1p62f + 0x1p39f);
}
END_TEST

/* ---- Suite ------------------------------------------------------------------------------------------------------------- */

static TCase *tcase(Suite *suite, const char *name)
{
	TCase *made = tcase_create(name);
	tcase_set_timeout(made, 120);
	suite_add_tcase(suite, made);
	return made;
}

int main(void)
{
	Suite *suite = suite_create("tensor");
	TCase *sizes = tcase(suite, "sizes");
	tcase_add_test(sizes, sizes_are_checked);
	tcase_add_test(sizes, shapes_are_checked);
	tcase_add_test(sizes, extents_are_checked);
	TCase *elements = tcase(suite, "elements");
	tcase_add_loop_test(elements, every_small_float_loads_as_defined_and_stores_back, 0, 4);
	tcase_add_loop_test(elements, small_floats_round_to_nearest_even_once, 0, 4);
	tcase_add_test(elements, integers_saturate_from_floats_and_wrap_from_integers);
	tcase_add_test(elements, a_large_integer_rounds_once);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
