/* The native ops of the families norm, activation, elementwise and reduce, where the golden cases don't look: layouts, ties, NaN,
 * wrapping, threads, refusals. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"

/* ---- A host ------------------------------------------------------------------------------------------------------------ */

static bool host_cancels;
static int host_loops; /* calls of parallel_for */

/* Shares as small as they may be, the last first. */
static void split_backwards(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	host_loops++;
	for (uint64_t end = items; end > 0;) {
		uint64_t begin = end > grain ? end - grain : 0;
		range(argument, begin, end, exec->threads - 1);
		end = begin;
	}
}

static bool cancelled(const opd_exec *exec)
{
	(void)exec;
	return host_cancels;
}

static const opd_host host = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof host,
	.parallel_for = split_backwards,
	.cancelled = cancelled,
};

/* ---- Calls ------------------------------------------------------------------------------------------------------------- */

/* A tensor with its own shape and strides. */
struct operand {
	opd_tensor tensor;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
};

/* strides NULL: row-major */
static const opd_tensor *operand_init(struct operand *operand, opd_dtype dtype, void *data, uint32_t rank, const int64_t *shape,
                                      const int64_t *strides)
{
	uint64_t elements = 1;
	bool contiguous = true;
	for (uint32_t i = rank; i-- > 0;) {
		operand->shape[i] = shape[i];
		operand->strides[i] = strides != NULL ? strides[i] : (int64_t)elements;
		contiguous = contiguous && operand->strides[i] == (int64_t)elements;
		elements *= (uint64_t)shape[i];
	}
	operand->tensor = (opd_tensor){
		.struct_bytes = sizeof operand->tensor,
		.dtype = dtype,
		.rank = rank,
		.shape = operand->shape,
		.strides = operand->strides,
		.data = data,
		.elements = elements,
		.alignment = 1,
		.flags = (contiguous || elements == 0 ? OPD_TENSOR_CONTIGUOUS : 0u) | (elements == 0 ? OPD_TENSOR_EMPTY : 0u),
	};
	return &operand->tensor;
}

static opd_arg tensor_arg(const opd_tensor *tensor)
{
	return tensor == NULL ? (opd_arg){.kind = OPD_ARG_NONE} : (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = tensor};
}

static opd_arg int_arg(int64_t value)
{
	return (opd_arg){.kind = OPD_ARG_INT, .i = value};
}

static opd_arg float_arg(double value)
{
	return (opd_arg){.kind = OPD_ARG_FLOAT, .f = value};
}

static opd_arg bool_arg(bool value)
{
	return (opd_arg){.kind = OPD_ARG_BOOL, .b = value};
}

static opd_arg str_arg(const char *value)
{
	return (opd_arg){.kind = OPD_ARG_STR, .count = (uint32_t)strlen(value), .str = value};
}

static const opd_op *find_op(const char *name)
{
	static const opd_op *const *const families[] = {ops_norm, ops_activation, ops_elementwise, ops_reduce};
	for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
		for (const opd_op *const *op = families[i]; *op != NULL; op++)
			if (strcmp((*op)->native->op, name) == 0)
				return *op;
	ck_abort_msg("no op %s", name);
	return NULL;
}

#define RESULTS 2
#define RESULT_BYTES 131072

/* What came of a call. */
struct outcome {
	opd_status status;
	opd_error error;
	struct operand results[RESULTS];
	unsigned char *data[RESULTS]; /* [RESULT_BYTES] each */
};

static struct outcome outcome;

static void setup(void)
{
	for (int i = 0; i < RESULTS; i++)
		ck_assert_int_eq(posix_memalign((void **)&outcome.data[i], OPD_TENSOR_ALIGNMENT, RESULT_BYTES), 0);
	host_cancels = false;
	host_loops = 0;
}

static void teardown(void)
{
	for (int i = 0; i < RESULTS; i++)
		free(outcome.data[i]);
}

static uint32_t result_count(const opd_op *op)
{
	return strstr(op->schema, "-> (Tensor, Tensor)") != NULL ? 2 : 1;
}

/* Shape function, then kernel. `bend`: the first result is allocated one element too short in its last dimension. */
static opd_status call_with(const char *name, const opd_arg *args, uint32_t arg_count, uint32_t threads, bool bend)
{
	const opd_op *op = find_op(name);
	int64_t shapes[RESULTS][OPD_RANK_MAX];
	opd_output outputs[RESULTS];
	opd_output *output_pointers[RESULTS];
	const opd_tensor *tensors[RESULTS];
	opd_call call = {.struct_bytes = sizeof call, .arg_count = arg_count, .output_count = result_count(op), .args = args};
	for (uint32_t i = 0; i < call.output_count; i++) {
		outputs[i] = (opd_output){.struct_bytes = sizeof outputs[i], .rank_max = OPD_RANK_MAX, .shape = shapes[i]};
		output_pointers[i] = &outputs[i];
	}
	outcome.status = op->shape(op, &call, output_pointers, &outcome.error);
	if (outcome.status != OPD_OK)
		return outcome.status;
	if (bend)
		shapes[0][outputs[0].rank - 1]--;
	for (uint32_t i = 0; i < call.output_count; i++) {
		memset(outcome.data[i], 0xa5, RESULT_BYTES);
		tensors[i] = operand_init(&outcome.results[i], outputs[i].dtype, outcome.data[i], outputs[i].rank, shapes[i], NULL);
		ck_assert_uint_le(tensors[i]->elements * opd_dtype_bytes(tensors[i]->dtype), RESULT_BYTES);
	}
	call.outputs = tensors;
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = threads, .host = &host};
	outcome.status = op->native->run(op->native, NULL, &call, &exec, &outcome.error);
	return outcome.status;
}

#define CALL(name, ...)                                                                                                          \
	call_with(name, (const opd_arg[]){__VA_ARGS__}, sizeof((const opd_arg[]){__VA_ARGS__}) / sizeof(opd_arg), 1, false)

static const float *floats(int result)
{
	return (const float *)(const void *)outcome.data[result];
}

static const int64_t *integers(int result)
{
	return (const int64_t *)(const void *)outcome.data[result];
}

static uint64_t result_bytes(int result)
{
	const opd_tensor *tensor = &outcome.results[result].tensor;
	return tensor->elements * opd_dtype_bytes(tensor->dtype);
}

/* ---- Layouts ----------------------------------------------------------------------------------------------------------- */

#define ROWS 3
#define COLUMNS 4

/* The arguments of each op, x [ROWS, COLUMNS] being the first, other [COLUMNS] a weight or second operand. */
static uint32_t layout_args(const char *name, const opd_tensor *x, const opd_tensor *other, opd_arg *args)
{
	args[0] = tensor_arg(x);
	if (strcmp(name, "rms_norm") == 0) {
		args[1] = tensor_arg(other);
		args[2] = float_arg(1e-6);
		args[3] = int_arg(3);
		return 4;
	}
	if (strcmp(name, "fused_add_rms_norm") == 0) {
		args[1] = tensor_arg(x);
		args[2] = tensor_arg(other);
		args[3] = float_arg(1e-6);
		args[4] = (opd_arg){.kind = OPD_ARG_NONE};
		return 5;
	}
	if (strcmp(name, "layer_norm") == 0) {
		args[1] = args[2] = tensor_arg(other);
		args[3] = float_arg(1e-6);
		return 4;
	}
	if (strcmp(name, "gelu_and_mul_sparse") == 0) {
		args[1] = float_arg(-0.5);
		args[2] = str_arg("tanh");
		return 3;
	}
	if (strcmp(name, "argmax") == 0) {
		args[1] = int_arg(0);
		args[2] = bool_arg(false);
		return 3;
	}
	if (strcmp(name, "add") == 0 || strcmp(name, "sub") == 0 || strcmp(name, "mul") == 0)
		args[1] = tensor_arg(other);
	else if (strcmp(name, "gelu") == 0 || strcmp(name, "gelu_and_mul") == 0)
		args[1] = str_arg("none");
	else if (strcmp(name, "cast") == 0)
		args[1] = str_arg("i16");
	else if (strcmp(name, "softmax") == 0)
		args[1] = int_arg(0);
	else if (strcmp(name, "topk") == 0)
		args[1] = int_arg(3);
	else
		return 1;
	return 2;
}

static const char *const all_ops[] = {
	"rms_norm",
	"fused_add_rms_norm",
	"layer_norm",
	"silu_and_mul",
	"mul_and_silu",
	"gelu_and_mul",
	"gelu_and_mul_sparse",
	"silu",
	"gelu",
	"relu",
	"relu2",
	"sigmoid",
	"add",
	"sub",
	"mul",
	"cast",
	"softmax",
	"argmax",
	"topk",
};

START_TEST(an_operands_layout_does_not_show_in_the_result)
{
	const char *name = all_ops[_i];
	const int64_t shape[2] = {ROWS, COLUMNS}, padded[2] = {2, 2 * ROWS + 1};
	const int64_t row = COLUMNS, doubled = 2;
	float dense[ROWS * COLUMNS], scattered[2 + COLUMNS * (2 * ROWS + 1)], weight[COLUMNS], spread[1 + 2 * COLUMNS];
	for (int i = 0; i < ROWS * COLUMNS; i++) { /* element (r, c) of the other lies transposed, with gaps, behind an offset */
		dense[i] = (float)((i * 7) % 11) - 4.5f;
		scattered[2 + (i / COLUMNS) * 2 + (i % COLUMNS) * (2 * ROWS + 1)] = dense[i];
	}
	for (int i = 0; i < COLUMNS; i++)
		spread[1 + 2 * i] = weight[i] = 0.5f + (float)i;
	struct operand x, other;
	opd_arg args[5];
	unsigned char expected[RESULTS][256];

	operand_init(&x, OPD_f32, dense, 2, shape, NULL);
	operand_init(&other, OPD_f32, weight, 1, &row, NULL);
	uint32_t count = layout_args(name, &x.tensor, &other.tensor, args);
	ck_assert_msg(call_with(name, args, count, 1, false) == OPD_OK, "%s", outcome.error.text);
	const uint32_t results = result_count(find_op(name));
	for (uint32_t i = 0; i < results; i++)
		memcpy(expected[i], outcome.data[i], result_bytes((int)i));

	operand_init(&x, OPD_f32, scattered, 2, shape, padded);
	x.tensor.byte_offset = 2 * sizeof(float);
	operand_init(&other, OPD_f32, spread, 1, &row, &doubled);
	other.tensor.byte_offset = sizeof(float);
	ck_assert_msg(call_with(name, args, count, 1, false) == OPD_OK, "%s", outcome.error.text);
	for (uint32_t i = 0; i < results; i++)
		ck_assert_mem_eq(outcome.data[i], expected[i], result_bytes((int)i));
}
END_TEST

START_TEST(a_row_repeated_by_stride_0_is_computed_as_often)
{
	float one[] = {3, 4};
	const int64_t shape[2] = {5, 2}, strides[2] = {0, 1};
	struct operand x;
	operand_init(&x, OPD_f32, one, 2, shape, strides);
	ck_assert_int_eq(CALL("rms_norm", tensor_arg(&x.tensor), tensor_arg(NULL), float_arg(0), (opd_arg){.kind = OPD_ARG_NONE}),
	                 OPD_OK);
	for (int r = 0; r < 5; r++) {
		ck_assert_float_eq_tol(floats(0)[2 * r], 3 / sqrtf(12.5f), 1e-6f);
		ck_assert_float_eq_tol(floats(0)[2 * r + 1], 4 / sqrtf(12.5f), 1e-6f);
	}
}
END_TEST

START_TEST(a_line_longer_than_its_memory_costs_no_more_than_that)
{
	uint8_t one[] = {7};
	const int64_t shape[2] = {1, 1ll << 40}, strides[2] = {0, 0};
	struct operand x;
	operand_init(&x, OPD_u8, one, 2, shape, strides);
	ck_assert_int_eq(CALL("argmax", tensor_arg(&x.tensor), int_arg(1), bool_arg(false)), OPD_OK);
	ck_assert_int_eq(integers(0)[0], 0);
	ck_assert_int_eq(CALL("topk", tensor_arg(&x.tensor), int_arg(3)), OPD_OK);
	ck_assert_mem_eq(outcome.data[0], "\7\7\7", 3);
	ck_assert_int_eq(integers(1)[2], 2);
}
END_TEST

START_TEST(a_stride_of_a_dimension_of_1_is_never_followed)
{
	float one[] = {1, 2};
	const int64_t shape[3] = {1, 2, 1}, strides[3] = {INT64_MAX, 1, INT64_MAX};
	struct operand x;
	operand_init(&x, OPD_f32, one, 3, shape, strides);
	ck_assert_int_eq(CALL("add", tensor_arg(&x.tensor), tensor_arg(&x.tensor)), OPD_OK);
	ck_assert_float_eq(floats(0)[1], 4);
	ck_assert_int_eq(CALL("softmax", tensor_arg(&x.tensor), int_arg(2)), OPD_OK);
	ck_assert_float_eq(floats(0)[1], 1);
}
END_TEST

/* ---- Values ------------------------------------------------------------------------------------------------------------ */

START_TEST(a_row_longer_than_a_chunk_is_normalised_as_one)
{
	enum { HIDDEN = 2 * KERNEL_CHUNK + 77 };
	static float row[HIDDEN];
	const int64_t shape[2] = {1, HIDDEN};
	for (int i = 0; i < HIDDEN; i++)
		row[i] = i < KERNEL_CHUNK ? 0.0f : 2.0f;
	struct operand x;
	operand_init(&x, OPD_f32, row, 2, shape, NULL);
	const double mean_square = 4.0 * (HIDDEN - KERNEL_CHUNK) / HIDDEN;
	ck_assert_int_eq(CALL("rms_norm", tensor_arg(&x.tensor), tensor_arg(NULL), float_arg(0), (opd_arg){.kind = OPD_ARG_NONE}),
	                 OPD_OK);
	ck_assert_float_eq(floats(0)[0], 0);
	ck_assert_double_eq_tol((double)floats(0)[HIDDEN - 1], 2 / sqrt(mean_square), 1e-6);
	ck_assert_int_eq(CALL("softmax", tensor_arg(&x.tensor), int_arg(-1)), OPD_OK);
	const double sum = KERNEL_CHUNK * exp(-2.0) + (HIDDEN - KERNEL_CHUNK);
	ck_assert_double_eq_tol((double)floats(0)[0] * sum, exp(-2.0), 1e-6);
	ck_assert_double_eq_tol((double)floats(0)[HIDDEN - 1] * sum, 1, 1e-6);
	ck_assert_int_eq(CALL("topk", tensor_arg(&x.tensor), int_arg(2)), OPD_OK);
	ck_assert_int_eq(integers(1)[0], KERNEL_CHUNK);
	ck_assert_int_eq(integers(1)[1], KERNEL_CHUNK + 1);
}
END_TEST

START_TEST(layer_norm_of_a_large_mean_loses_nothing)
{
	float row[] = {1e6f - 1, 1e6f + 1, 1e6f - 1, 1e6f + 1};
	const int64_t shape[2] = {1, 4};
	struct operand x;
	operand_init(&x, OPD_f32, row, 2, shape, NULL);
	ck_assert_int_eq(CALL("layer_norm", tensor_arg(&x.tensor), tensor_arg(NULL), tensor_arg(NULL), float_arg(0)), OPD_OK);
	for (int i = 0; i < 4; i++)
		ck_assert_float_eq(floats(0)[i], i % 2 == 0 ? -1.0f : 1.0f);
}
END_TEST

START_TEST(fused_add_rms_norm_normalises_the_unrounded_sum)
{
	/* 256 + 1 is no bf16: the second result is 256. With the rounded sum both elements would be equal and the first result 1. */
	uint16_t x_bits[2] = {0x4380, 0x4380}, r_bits[2] = {0x3f80, 0x0000}; /* {256, 256}, {1, 0} */
	const int64_t shape[2] = {1, 2};
	struct operand x, residual, weight;
	float weights[2] = {1.00390625f, 1.00390625f}; /* puts the two on different sides of a rounding to bf16 */
	operand_init(&x, OPD_bf16, x_bits, 2, shape, NULL);
	operand_init(&residual, OPD_bf16, r_bits, 2, shape, NULL);
	operand_init(&weight, OPD_f32, weights, 1, &shape[1], NULL);
	ck_assert_int_eq(CALL("fused_add_rms_norm", tensor_arg(&x.tensor), tensor_arg(&residual.tensor), tensor_arg(&weight.tensor),
	                      float_arg(0), (opd_arg){.kind = OPD_ARG_NONE}),
	                 OPD_OK);
	const uint16_t *normed = (const uint16_t *)(const void *)outcome.data[0];
	const uint16_t *sum = (const uint16_t *)(const void *)outcome.data[1];
	ck_assert_uint_eq(sum[0], 0x4380);
	ck_assert_uint_eq(sum[1], 0x4380);
	double root = sqrt((257.0 * 257.0 + 256.0 * 256.0) / 2);
	ck_assert_uint_eq(normed[0], element_f32_to_bf16((float)(257 / root * 1.00390625)));
	ck_assert_uint_eq(normed[1], element_f32_to_bf16((float)(256 / root * 1.00390625)));
	ck_assert_uint_ne(normed[0], normed[1]);
}
END_TEST

START_TEST(integers_wrap)
{
	int64_t wide[] = {INT64_MAX, INT64_MIN, 1ll << 62}, wide_b[] = {1, -1, 4};
	uint8_t narrow[] = {255, 0, 16}, narrow_b[] = {1, 1, 16};
	const int64_t shape[1] = {3};
	struct operand a, b;
	operand_init(&a, OPD_i64, wide, 1, shape, NULL);
	operand_init(&b, OPD_i64, wide_b, 1, shape, NULL);
	ck_assert_int_eq(CALL("add", tensor_arg(&a.tensor), tensor_arg(&b.tensor)), OPD_OK);
	ck_assert(integers(0)[0] == INT64_MIN && integers(0)[1] == INT64_MAX);
	ck_assert_int_eq(CALL("mul", tensor_arg(&a.tensor), tensor_arg(&b.tensor)), OPD_OK);
	ck_assert(integers(0)[1] == INT64_MIN && integers(0)[2] == 0);
	operand_init(&a, OPD_u8, narrow, 1, shape, NULL);
	operand_init(&b, OPD_u8, narrow_b, 1, shape, NULL);
	ck_assert_int_eq(CALL("add", tensor_arg(&a.tensor), tensor_arg(&b.tensor)), OPD_OK);
	ck_assert_uint_eq(outcome.data[0][0], 0);
	ck_assert_int_eq(CALL("sub", tensor_arg(&a.tensor), tensor_arg(&b.tensor)), OPD_OK);
	ck_assert_uint_eq(outcome.data[0][1], 255);
	ck_assert_int_eq(CALL("mul", tensor_arg(&a.tensor), tensor_arg(&b.tensor)), OPD_OK);
	ck_assert_uint_eq(outcome.data[0][2], 0);
}
END_TEST

START_TEST(an_f8_sum_saturates)
{
	uint8_t largest[] = {0x7e}; /* 448 */
	const int64_t shape[1] = {1};
	struct operand a;
	operand_init(&a, OPD_f8_e4m3fn, largest, 1, shape, NULL);
	ck_assert_int_eq(CALL("add", tensor_arg(&a.tensor), tensor_arg(&a.tensor)), OPD_OK);
	ck_assert_uint_eq(outcome.data[0][0], 0x7e);
}
END_TEST

START_TEST(topk_puts_nan_first_and_equals_by_index)
{
	float row[] = {0.0f, 1, NAN, -0.0f, 1, NAN, 0.0f, -INFINITY};
	const int64_t order[] = {2, 5, 1, 4, 0, 3, 6, 7};
	const int64_t shape[2] = {1, 8};
	struct operand x;
	operand_init(&x, OPD_f32, row, 2, shape, NULL);
	for (int64_t k = 0; k <= 8; k++) {
		ck_assert_int_eq(CALL("topk", tensor_arg(&x.tensor), int_arg(k)), OPD_OK);
		ck_assert_int_eq(outcome.results[0].shape[1], k);
		for (int64_t i = 0; i < k; i++) {
			ck_assert_int_eq(integers(1)[i], order[i]);
			ck_assert_mem_eq(&floats(0)[i], &row[order[i]], sizeof(float));
		}
	}
}
END_TEST

START_TEST(argmax_takes_the_first_nan_else_the_first_maximum)
{
	float rows[] = {1, 5, 5, NAN, 7, NAN, -0.0f, 0.0f, 0.0f};
	const int64_t shape[2] = {3, 3};
	struct operand x;
	operand_init(&x, OPD_f32, rows, 2, shape, NULL);
	ck_assert_int_eq(CALL("argmax", tensor_arg(&x.tensor), int_arg(-1), bool_arg(false)), OPD_OK);
	ck_assert_int_eq(integers(0)[0], 1);
	ck_assert_int_eq(integers(0)[1], 0);
	ck_assert_int_eq(integers(0)[2], 0);
}
END_TEST

START_TEST(a_bool_of_any_non_zero_byte_is_1)
{
	uint8_t bits[] = {0, 2, 1, 0x80};
	const int64_t shape[1] = {4};
	struct operand x;
	operand_init(&x, OPD_bool, bits, 1, shape, NULL);
	ck_assert_int_eq(CALL("argmax", tensor_arg(&x.tensor), int_arg(0), bool_arg(false)), OPD_OK);
	ck_assert_int_eq(integers(0)[0], 1);
	ck_assert_int_eq(CALL("topk", tensor_arg(&x.tensor), int_arg(3)), OPD_OK);
	ck_assert_mem_eq(outcome.data[0], "\1\1\1", 3);
	ck_assert_int_eq(integers(1)[2], 3);
	ck_assert_int_eq(CALL("cast", tensor_arg(&x.tensor), str_arg("bool")), OPD_OK);
	ck_assert_mem_eq(outcome.data[0], "\0\1\1\1", 4);
}
END_TEST

START_TEST(integers_past_2_to_53_are_compared_and_cast_exactly)
{
	int64_t big[] = {(1ll << 53) + 1, (1ll << 53) + 2, 1ll << 53};
	const int64_t shape[1] = {3};
	struct operand x;
	operand_init(&x, OPD_i64, big, 1, shape, NULL);
	ck_assert_int_eq(CALL("topk", tensor_arg(&x.tensor), int_arg(3)), OPD_OK);
	ck_assert_int_eq(integers(1)[0], 1);
	ck_assert_int_eq(integers(1)[1], 0);
	ck_assert_int_eq(CALL("cast", tensor_arg(&x.tensor), str_arg("i64")), OPD_OK);
	ck_assert_mem_eq(outcome.data[0], big, sizeof big);
}
END_TEST

START_TEST(softmax_of_only_minus_infinity_or_with_infinity_is_nan)
{
	float rows[] = {-INFINITY, -INFINITY, INFINITY, 1, -INFINITY, 1};
	const int64_t shape[2] = {3, 2};
	struct operand x;
	operand_init(&x, OPD_f32, rows, 2, shape, NULL);
	ck_assert_int_eq(CALL("softmax", tensor_arg(&x.tensor), int_arg(-1)), OPD_OK);
	for (int i = 0; i < 4; i++)
		ck_assert_float_nan(floats(0)[i]);
	ck_assert_float_eq(floats(0)[4], 0);
	ck_assert_float_eq(floats(0)[5], 1);
}
END_TEST

START_TEST(rank_0_is_one_element_for_elementwise_softmax_and_argmax)
{
	float value[] = {-3};
	struct operand x;
	operand_init(&x, OPD_f32, value, 0, NULL, NULL);
	ck_assert_int_eq(CALL("relu2", tensor_arg(&x.tensor)), OPD_OK);
	ck_assert_float_eq(floats(0)[0], 0);
	ck_assert_int_eq(CALL("mul", tensor_arg(&x.tensor), tensor_arg(&x.tensor)), OPD_OK);
	ck_assert_float_eq(floats(0)[0], 9);
	ck_assert_int_eq(CALL("softmax", tensor_arg(&x.tensor), int_arg(0)), OPD_OK);
	ck_assert_float_eq(floats(0)[0], 1);
	ck_assert_int_eq(CALL("argmax", tensor_arg(&x.tensor), int_arg(-1), bool_arg(true)), OPD_OK);
	ck_assert_uint_eq(outcome.results[0].tensor.rank, 0);
	ck_assert_int_eq(integers(0)[0], 0);
	ck_assert_int_eq(CALL("softmax", tensor_arg(&x.tensor), int_arg(1)), OPD_INVALID_ARGUMENT);
}
END_TEST

/* ---- The contract ------------------------------------------------------------------------------------------------------ */

static double noise(uint32_t *state)
{
	*state = *state * 1664525u + 1013904223u;
	return (double)(*state >> 8) / 0x1p22 - 2;
}

START_TEST(bits_do_not_depend_on_the_number_of_threads)
{
	enum { COUNT = 16000 };
	static const char *const ops[] = {"rms_norm", "softmax", "silu_and_mul", "gelu_and_mul_sparse", "topk", "add"};
	static float values[COUNT];
	static unsigned char expected[RESULT_BYTES];
	uint32_t state = 7;
	for (int i = 0; i < COUNT; i++)
		values[i] = (float)noise(&state);
	const int64_t shape[2] = {COUNT / COLUMNS, COLUMNS}, row = COLUMNS;
	float weights[COLUMNS] = {1, 2, 3, 4};
	struct operand x, other;
	opd_arg args[5];
	operand_init(&x, OPD_f32, values, 2, shape, NULL);
	operand_init(&other, OPD_f32, weights, 1, &row, NULL);
	for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
		uint32_t count = layout_args(ops[i], &x.tensor, &other.tensor, args);
		ck_assert_msg(call_with(ops[i], args, count, 1, false) == OPD_OK, "%s", outcome.error.text);
		memcpy(expected, outcome.data[0], RESULT_BYTES);
		ck_assert_msg(call_with(ops[i], args, count, 8, false) == OPD_OK, "%s", outcome.error.text);
		ck_assert_mem_eq(outcome.data[0], expected, RESULT_BYTES);
		ck_assert_int_eq(host_loops, (int)i + 1);
	}
}
END_TEST

START_TEST(a_result_of_another_shape_is_internal_and_stays_unwritten)
{
	float values[ROWS * COLUMNS] = {1};
	const int64_t shape[2] = {ROWS, COLUMNS}, row = COLUMNS;
	float weights[COLUMNS] = {1, 1, 1, 1};
	struct operand x, other;
	opd_arg args[5];
	operand_init(&x, OPD_f32, values, 2, shape, NULL);
	operand_init(&other, OPD_f32, weights, 1, &row, NULL);
	uint32_t count = layout_args(all_ops[_i], &x.tensor, &other.tensor, args);
	ck_assert_int_eq(call_with(all_ops[_i], args, count, 1, true), OPD_INTERNAL);
	ck_assert_ptr_nonnull(strstr(outcome.error.text, all_ops[_i]));
	for (int i = 0; i < RESULT_BYTES; i++)
		ck_assert_uint_eq(outcome.data[0][i], 0xa5);
}
END_TEST

START_TEST(a_cancelled_run_says_so)
{
	float values[4] = {0};
	const int64_t shape[2] = {2, 2};
	struct operand x;
	operand_init(&x, OPD_f32, values, 2, shape, NULL);
	host_cancels = true;
	ck_assert_int_eq(CALL("silu", tensor_arg(&x.tensor)), OPD_CANCELLED);
	ck_assert_str_eq(outcome.error.text, "silu: cancelled while it ran");
}
END_TEST

static void expect_refusal(opd_status status, const char *text)
{
	ck_assert_int_eq(status, OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(outcome.error.text, text);
}

START_TEST(a_refusal_names_the_object_the_value_and_what_was_expected)
{
	float values[8] = {0};
	uint8_t bits[8] = {0};
	const int64_t shape[2] = {2, 4}, three = 3, none[2] = {2, 0};
	struct operand x, w, flag, empty, scalar;
	operand_init(&x, OPD_f32, values, 2, shape, NULL);
	operand_init(&w, OPD_f32, values, 1, &three, NULL);
	operand_init(&flag, OPD_bool, bits, 2, shape, NULL);
	operand_init(&empty, OPD_f32, values, 2, none, NULL);
	operand_init(&scalar, OPD_f32, values, 0, NULL, NULL);
	const opd_arg no_size = {.kind = OPD_ARG_NONE};
	expect_refusal(CALL("rms_norm", tensor_arg(&x.tensor), tensor_arg(&w.tensor), float_arg(1e-6), no_size),
	               "rms_norm: weight has shape [3], expected [4] (last dimension of x)");
	expect_refusal(CALL("rms_norm", tensor_arg(&x.tensor), tensor_arg(NULL), float_arg((double)NAN), no_size),
	               "rms_norm: epsilon is nan, expected a finite number");
	expect_refusal(CALL("rms_norm", tensor_arg(&scalar.tensor), tensor_arg(NULL), float_arg(0), no_size),
	               "rms_norm: x has shape [], expected rank 1 or more");
	expect_refusal(CALL("rms_norm", tensor_arg(&x.tensor), tensor_arg(NULL), float_arg(0), int_arg(5)),
	               "rms_norm: variance_size is 5, expected 1 to 4 (last dimension of x)");
	expect_refusal(CALL("add", tensor_arg(&flag.tensor), tensor_arg(&flag.tensor)),
	               "add: a is bool, expected an integer or float dtype");
	expect_refusal(CALL("add", tensor_arg(&x.tensor), tensor_arg(&w.tensor)),
	               "add: a has shape [2, 4], b has shape [3]: 4 and 3 don't broadcast");
	expect_refusal(CALL("silu", tensor_arg(&flag.tensor)), "silu: x is bool, expected f16, bf16, f32 or f64");
	expect_refusal(CALL("gelu", tensor_arg(&x.tensor), str_arg("erf")),
	               "gelu: approximate is \"erf\", expected \"none\" or \"tanh\"");
	expect_refusal(CALL("argmax", tensor_arg(&empty.tensor), int_arg(-1), bool_arg(false)),
	               "argmax: x has shape [2, 0], expected at least 1 element along dimension 1");
	expect_refusal(CALL("softmax", tensor_arg(&x.tensor), int_arg(INT64_MIN)),
	               "softmax: dim is -9223372036854775808, expected -2 to 1 (x has shape [2, 4])");
	expect_refusal(CALL("topk", tensor_arg(&x.tensor), int_arg(5)), "topk: k is 5, expected 0 to 4 (last dimension of x)");
}
END_TEST

START_TEST(an_empty_operand_gives_an_empty_result)
{
	const int64_t shape[2] = {3, 0};
	struct operand x;
	operand_init(&x, OPD_f16, NULL, 2, shape, NULL);
	const opd_arg none = {.kind = OPD_ARG_NONE};
	ck_assert_int_eq(CALL("rms_norm", tensor_arg(&x.tensor), none, float_arg(0), none), OPD_OK);
	ck_assert_int_eq(CALL("silu_and_mul", tensor_arg(&x.tensor)), OPD_OK);
	ck_assert_int_eq(CALL("softmax", tensor_arg(&x.tensor), int_arg(1)), OPD_OK);
	ck_assert_int_eq(CALL("topk", tensor_arg(&x.tensor), int_arg(0)), OPD_OK);
	ck_assert_int_eq(CALL("cast", tensor_arg(&x.tensor), str_arg("f64")), OPD_OK);
	ck_assert_uint_eq(outcome.results[0].tensor.elements, 0);
}
END_TEST

START_TEST(an_op_says_what_it_is)
{
	const opd_op *op = find_op(all_ops[_i]);
	const opd_impl *native = op->native;
	ck_assert_uint_eq(strlen(native->uuid), 64);
	ck_assert_str_eq(native->device, "cpu");
	ck_assert_ptr_null(native->predicate);
	ck_assert_ptr_eq(native->user, op);
	ck_assert_int_eq(strncmp(op->schema, native->op, strlen(native->op)), 0);
	ck_assert_int_eq(op->schema[strlen(native->op)], '(');
	ck_assert_ptr_nonnull(op->generate);
	uint32_t dims = 1;
	for (const char *at = op->dims; *at != '\0'; at++)
		dims += *at == ',';
	ck_assert_uint_eq(dims, op->dim_count);
}
END_TEST

static Suite *suite(void)
{
	const int ops = (int)(sizeof all_ops / sizeof all_ops[0]);
	Suite *s = suite_create("ops_a");
	TCase *t = tcase_create("native");
	suite_add_tcase(s, t);
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_loop_test(t, an_operands_layout_does_not_show_in_the_result, 0, ops);
	tcase_add_test(t, a_row_repeated_by_stride_0_is_computed_as_often);
	tcase_add_test(t, a_line_longer_than_its_memory_costs_no_more_than_that);
	tcase_add_test(t, a_stride_of_a_dimension_of_1_is_never_followed);
	tcase_add_test(t, a_row_longer_than_a_chunk_is_normalised_as_one);
	tcase_add_test(t, layer_norm_of_a_large_mean_loses_nothing);
	tcase_add_test(t, fused_add_rms_norm_normalises_the_unrounded_sum);
	tcase_add_test(t, integers_wrap);
	tcase_add_test(t, an_f8_sum_saturates);
	tcase_add_test(t, topk_puts_nan_first_and_equals_by_index);
	tcase_add_test(t, argmax_takes_the_first_nan_else_the_first_maximum);
	tcase_add_test(t, a_bool_of_any_non_zero_byte_is_1);
	tcase_add_test(t, integers_past_2_to_53_are_compared_and_cast_exactly);
	tcase_add_test(t, softmax_of_only_minus_infinity_or_with_infinity_is_nan);
	tcase_add_test(t, rank_0_is_one_element_for_elementwise_softmax_and_argmax);
	tcase_add_test(t, bits_do_not_depend_on_the_number_of_threads);
	tcase_add_loop_test(t, a_result_of_another_shape_is_internal_and_stays_unwritten, 0, ops);
	tcase_add_test(t, a_cancelled_run_says_so);
	tcase_add_test(t, a_refusal_names_the_object_the_value_and_what_was_expected);
	tcase_add_test(t, an_empty_operand_gives_an_empty_result);
	tcase_add_loop_test(t, an_op_says_what_it_is, 0, ops);
	return s;
}

int main(void)
{
	SRunner *runner = srunner_create(suite());
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
