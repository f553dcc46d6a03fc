/* Provider `cpu` on its own: every kernel at every instruction set of this machine against a plain f64 reference, odd sizes, alignments,
 * NaN and infinities, and the bits that it promises. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "providers/builtin.h"
#include "providers/cpu/isa.h"
#include "tests/conformance/host.h"

/* ---- Tensors and calls ------------------------------------------------------------------------------------------------- */

struct box {
	opd_tensor tensor;
	int64_t shape[4];
	int64_t strides[4];
	unsigned char *memory;
};

/* Rows of `last` elements, `gap` elements between them, the first `lead` elements into memory that ends with the last row. */
static void box_init(struct box *box, opd_dtype dtype, int64_t rows, int64_t last, int64_t gap, int64_t lead)
{
	size_t bytes = opd_dtype_bytes(dtype);
	int64_t elements = rows * last;
	int64_t span = rows == 0 ? 0 : (rows - 1) * (last + gap) + last;
	memset(box, 0, sizeof *box);
	box->shape[0] = rows, box->shape[1] = last;
	box->strides[0] = last + gap, box->strides[1] = 1;
	box->memory = calloc(1, (size_t)(span + lead) * bytes + 1);
	ck_assert_ptr_nonnull(box->memory);
	box->tensor = (opd_tensor){
		.struct_bytes = sizeof(opd_tensor),
		.dtype = dtype,
		.rank = 2,
		.shape = box->shape,
		.strides = box->strides,
		.data = box->memory,
		.byte_offset = (uint64_t)lead * bytes,
		.elements = (uint64_t)elements,
		.alignment = (uint32_t)bytes,
		.flags = (gap == 0 || rows <= 1 || elements == 0 ? OPD_TENSOR_CONTIGUOUS : 0u) | (elements == 0 ? OPD_TENSOR_EMPTY : 0u),
	};
}

static void box_init_vector(struct box *box, opd_dtype dtype, int64_t count)
{
	box_init(box, dtype, 1, count, 0, 0);
	box->tensor.rank = 1;
	box->shape[0] = count;
	box->strides[0] = 1;
}

static void box_fini(struct box *box)
{
	free(box->memory);
}

static void *box_at(const struct box *box, int64_t row, int64_t column)
{
	int64_t at = box->tensor.rank == 1 ? column : row * box->strides[0] + column;
	return (unsigned char *)opd_tensor_data(&box->tensor) + (size_t)at * opd_dtype_bytes(box->tensor.dtype);
}

static double box_get(const struct box *box, int64_t row, int64_t column)
{
	return element_load_f64(box->tensor.dtype, box_at(box, row, column));
}

static void box_set(const struct box *box, int64_t row, int64_t column, double value)
{
	element_store_f64(box->tensor.dtype, box_at(box, row, column), value);
}

static int64_t box_last(const struct box *box)
{
	return opd_tensor_last(&box->tensor);
}

static int64_t box_rows(const struct box *box)
{
	return box->tensor.rank == 1 ? 1 : box->shape[0];
}

/* Sums of four uniforms: mean 0, a few units wide; the same sequence for one seed. */
static double noise(uint64_t *seed)
{
	double sum = -2;
	for (int i = 0; i < 4; i++) {
		*seed = *seed * 6364136223846793005u + 1442695040888963407u;
		sum += (double)(*seed >> 33) / 2147483648.0;
	}
	return sum * 2;
}

static void box_fill(const struct box *box, uint64_t seed)
{
	for (int64_t r = 0; r < box_rows(box); r++)
		for (int64_t c = 0; c < box_last(box); c++)
			box_set(box, r, c, noise(&seed));
}

struct call {
	opd_call call;
	opd_arg args[8];
	const opd_tensor *outputs[2];
};

static void call_init(struct call *call)
{
	memset(call, 0, sizeof *call);
	call->call = (opd_call){.struct_bytes = sizeof(opd_call), .args = call->args, .outputs = call->outputs};
}

static void call_tensor(struct call *call, const struct box *box)
{
	opd_arg *arg = &call->args[call->call.arg_count++];
	arg->kind = box == NULL ? OPD_ARG_NONE : OPD_ARG_TENSOR;
	arg->tensor = box == NULL ? NULL : &box->tensor;
}

static void call_float(struct call *call, double value)
{
	call->args[call->call.arg_count++] = (opd_arg){.kind = OPD_ARG_FLOAT, .f = value};
}

static void call_int(struct call *call, int64_t value)
{
	call->args[call->call.arg_count++] = (opd_arg){.kind = OPD_ARG_INT, .i = value};
}

static void call_none(struct call *call)
{
	call->args[call->call.arg_count++] = (opd_arg){.kind = OPD_ARG_NONE};
}

static void call_output(struct call *call, const struct box *box)
{
	call->outputs[call->call.output_count++] = &box->tensor;
}

/* ---- Per instruction set ------------------------------------------------------------------------------------------------ */

static struct host host;
static const char *const op_names[] = {"rms_norm", "fused_add_rms_norm", "silu_and_mul", "softmax", "linear"};
static const opd_dtype dtypes[] = {OPD_f32, OPD_bf16, OPD_f16};
/* Around every vector width, several vectors, several chains; 0 ends. */
static const int64_t widths[] = {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 0};

/* False when this machine lacks instruction set number `index`. */
static bool isa_open(int index)
{
	if (cpu_isas[index] == NULL || !cpu_isa_supported(cpu_isas[index]))
		return false;
	opd_error error;
	ck_assert_int_eq(setenv("OPD_CPU_ISA", cpu_isas[index]->isa, 1), 0);
	host_init(&host);
	ck_assert_int_eq(host_open(&host, &cpu_module, &error), OPD_OK);
	ck_assert_ptr_eq(host_find_impl(&host, "cpu", "softmax")->impl->user, cpu_isas[index]);
	ck_assert_uint_eq(host.warnings, 0);
	return true;
}

static const struct host_impl *impl_of(const char *op)
{
	const struct host_impl *impl = host_find_impl(&host, "cpu", op);
	ck_assert_ptr_nonnull(impl);
	return impl;
}

static bool accepts(const char *op, const struct call *call, opd_reason *reason)
{
	const struct host_impl *impl = impl_of(op);
	return impl->impl->predicate(impl->impl, impl->state, &call->call, reason);
}

static void run_on(const char *op, const struct call *call, uint32_t threads)
{
	opd_error error = {0};
	ck_assert(accepts(op, call, NULL));
	ck_assert_msg(host_run(&host, impl_of(op), &call->call, threads, &error) == OPD_OK, "%s", error.text);
}

/* Within the dtype's tolerance of SEMANTICS; NaN equals NaN, an infinity itself. */
static void assert_near(opd_dtype dtype, double got, double want, double slack, const char *what, int64_t width)
{
	unsigned char rounded[8];
	element_store_f64(dtype, rounded, want);
	want = element_load_f64(dtype, rounded);
	double atol = dtype == OPD_f32 ? 1e-5 : 1e-3;
	double rtol = dtype == OPD_f32 ? 1.3e-6 : dtype == OPD_f16 ? 2e-3 : 1.6e-2;
	bool same = isnan(want) ? isnan(got) : isinf(want) ? got == want : fabs(got - want) <= atol + rtol * fabs(want) + slack;
	ck_assert_msg(same, "%s %s, width %lld: got %.9g, want %.9g", what, opd_dtype_name(dtype), (long long)width, got, want);
}

/* Rows [first, first + rows(part)) of `whole` are bit for bit those of `part`. */
static void assert_same_rows(const struct box *part, const struct box *whole, int64_t first, const char *what)
{
	size_t bytes = (size_t)box_last(part) * opd_dtype_bytes(part->tensor.dtype);
	for (int64_t r = 0; r < box_rows(part); r++)
		ck_assert_msg(memcmp(box_at(part, r, 0), box_at(whole, first + r, 0), bytes) == 0, "%s: row %lld, width %lld has other bits",
		              what, (long long)r, (long long)box_last(part));
}

/* ---- Calls of each op, with a weight and bias of x's dtype ------------------------------------------------------------------ */

struct inputs {
	struct box x, second, weight, bias;
};

/* Results; `second` of fused_add_rms_norm only. */
struct results {
	struct box first, second;
};

enum { OP_RMS, OP_FUSED, OP_SILU, OP_SOFTMAX, OP_LINEAR, OPS };

static int64_t op_result_last(int op, int64_t width)
{
	return op == OP_LINEAR ? 21 : width;
}

static void inputs_init(struct inputs *in, int op, opd_dtype dtype, int64_t rows, int64_t width, int64_t gap, int64_t lead)
{
	memset(in, 0, sizeof *in);
	box_init(&in->x, dtype, rows, op == OP_SILU ? 2 * width : width, gap, lead);
	box_fill(&in->x, 1);
	box_init(&in->second, dtype, rows, width, gap, lead);
	box_fill(&in->second, 2);
	if (op == OP_LINEAR)
		box_init(&in->weight, dtype, op_result_last(op, width), width, gap, lead);
	else
		box_init_vector(&in->weight, dtype, width);
	box_fill(&in->weight, 3);
	box_init_vector(&in->bias, dtype, op_result_last(op, width));
	box_fill(&in->bias, 4);
}

static void inputs_fini(struct inputs *in)
{
	box_fini(&in->x);
	box_fini(&in->second);
	box_fini(&in->weight);
	box_fini(&in->bias);
}

static void results_init(struct results *out, int op, opd_dtype dtype, int64_t rows, int64_t width, int64_t lead)
{
	box_init(&out->first, dtype, rows, op_result_last(op, width), 0, lead);
	box_init(&out->second, dtype, rows, op_result_last(op, width), 0, lead);
}

static void results_fini(struct results *out)
{
	box_fini(&out->first);
	box_fini(&out->second);
}

static void call_of(struct call *call, int op, const struct inputs *in, const struct results *out)
{
	call_init(call);
	call_tensor(call, &in->x);
	if (op == OP_FUSED)
		call_tensor(call, &in->second);
	if (op == OP_RMS || op == OP_FUSED) {
		call_tensor(call, &in->weight);
		call_float(call, 1e-6);
		call_none(call);
	} else if (op == OP_SOFTMAX) {
		call_int(call, -1);
	} else if (op == OP_LINEAR) {
		call_tensor(call, &in->weight);
		call_tensor(call, &in->bias);
	}
	call_output(call, &out->first);
	if (op == OP_FUSED)
		call_output(call, &out->second);
}

/* ---- References --------------------------------------------------------------------------------------------------------- */

static double rounded(opd_dtype dtype, double value)
{
	unsigned char bytes[8];
	element_store_f64(dtype, bytes, value);
	return element_load_f64(dtype, bytes);
}

static void check_norm_row(const struct inputs *in, const struct results *out, int64_t r, bool fused)
{
	opd_dtype dtype = in->x.tensor.dtype;
	int64_t width = box_last(&in->x);
	double squares = 0;
	for (int64_t c = 0; c < width; c++)
		squares += pow(box_get(&in->x, r, c) + (fused ? box_get(&in->second, r, c) : 0), 2);
	double factor = 1 / sqrt(squares / (double)width + 1e-6);
	for (int64_t c = 0; c < width; c++) {
		double sum = box_get(&in->x, r, c) + (fused ? box_get(&in->second, r, c) : 0);
		double y = rounded(in->weight.tensor.dtype, sum * factor) * box_get(&in->weight, 0, c);
		assert_near(dtype, box_get(&out->first, r, c), y, dtype == OPD_f16 ? 9e-3 : 0, "norm", width);
		if (fused)
			assert_near(dtype, box_get(&out->second, r, c), sum, 0, "sum", width);
	}
}

static void check_silu_row(const struct inputs *in, const struct results *out, int64_t r)
{
	int64_t width = box_last(&out->first);
	for (int64_t c = 0; c < width; c++) {
		double gate = box_get(&in->x, r, c);
		double want = gate / (1 + exp(-gate)) * box_get(&in->x, r, width + c);
		assert_near(in->x.tensor.dtype, box_get(&out->first, r, c), want, 0, "silu_and_mul", width);
	}
}

static void check_softmax_row(const struct inputs *in, const struct results *out, int64_t r)
{
	int64_t width = box_last(&in->x);
	double highest = -INFINITY, sum = 0;
	for (int64_t c = 0; c < width; c++)
		highest = fmax(highest, box_get(&in->x, r, c));
	for (int64_t c = 0; c < width; c++)
		sum += exp(box_get(&in->x, r, c) - highest);
	for (int64_t c = 0; c < width; c++)
		assert_near(in->x.tensor.dtype, box_get(&out->first, r, c), exp(box_get(&in->x, r, c) - highest) / sum, 0, "softmax", width);
}

static void check_linear_row(const struct inputs *in, const struct results *out, int64_t r)
{
	int64_t width = box_last(&in->x);
	for (int64_t n = 0; n < box_last(&out->first); n++) {
		double sum = 0, magnitude = 0;
		for (int64_t c = 0; c < width; c++) {
			double product = box_get(&in->x, r, c) * box_get(&in->weight, n, c);
			sum += product;
			magnitude += fabs(product);
		}
		double slack = 2 * sqrt((double)width) * 0x1p-24 * magnitude;
		assert_near(in->x.tensor.dtype, box_get(&out->first, r, n), sum + box_get(&in->bias, 0, n), slack, "linear", width);
	}
}

static void check_row(int op, const struct inputs *in, const struct results *out, int64_t r)
{
	if (op == OP_RMS || op == OP_FUSED)
		check_norm_row(in, out, r, op == OP_FUSED);
	else if (op == OP_SILU)
		check_silu_row(in, out, r);
	else if (op == OP_SOFTMAX)
		check_softmax_row(in, out, r);
	else
		check_linear_row(in, out, r);
}

static void check_op(int op, opd_dtype dtype, int64_t rows, int64_t width)
{
	struct inputs in;
	struct results out;
	struct call call;
	inputs_init(&in, op, dtype, rows, width, 0, 0);
	results_init(&out, op, dtype, rows, width, 0);
	call_of(&call, op, &in, &out);
	run_on(op_names[op], &call, 1);
	for (int64_t r = 0; r < rows; r++)
		check_row(op, &in, &out, r);
	inputs_fini(&in);
	results_fini(&out);
}

START_TEST(kernels_agree_with_f64_at_every_width)
{
	if (!isa_open(_i))
		return;
	for (int op = 0; op < OPS; op++)
		for (size_t d = 0; d < 3; d++)
			for (size_t w = 0; widths[w] > 0; w++)
				check_op(op, dtypes[d], 3, widths[w]);
	for (size_t d = 0; d < 3; d++) {
		check_op(OP_SOFTMAX, dtypes[d], 2, 5003);
		static const int64_t ks[] = {16, 511, 512, 513, 1030};
		for (size_t k = 0; k < 5; k++)
			check_op(OP_LINEAR, dtypes[d], 4 + (int64_t)k, ks[k]);
	}
	host_fini(&host);
}
END_TEST

START_TEST(f32_weights_and_no_weight_of_norms_agree_with_f64)
{
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++) {
		for (int form = 0; form < 4; form++) {
			int op = form / 2 == 0 ? OP_RMS : OP_FUSED;
			struct inputs in;
			struct results out;
			struct call call;
			inputs_init(&in, op, dtypes[d], 2, 37, 0, 0);
			results_init(&out, op, dtypes[d], 2, 37, 0);
			box_fini(&in.weight);
			box_init_vector(&in.weight, OPD_f32, 37);
			box_fill(&in.weight, 5);
			call_of(&call, op, &in, &out);
			if (form % 2 == 0) { /* none: the reference then multiplies by one, in f32 */
				for (int64_t c = 0; c < 37; c++)
					box_set(&in.weight, 0, c, 1);
				call.args[op == OP_RMS ? 1 : 2] = (opd_arg){.kind = OPD_ARG_NONE};
			}
			run_on(op_names[op], &call, 1);
			for (int64_t r = 0; r < 2; r++)
				check_row(op, &in, &out, r);
			inputs_fini(&in);
			results_fini(&out);
		}
	}
	host_fini(&host);
}
END_TEST

/* ---- Bits --------------------------------------------------------------------------------------------------------------- */

static void check_layouts(int op, opd_dtype dtype, int64_t width)
{
	struct inputs in, moved;
	struct results out, other;
	struct call call;
	inputs_init(&in, op, dtype, 5, width, 0, 0);
	inputs_init(&moved, op, dtype, 5, width, 3, 1);
	results_init(&out, op, dtype, 5, width, 0);
	results_init(&other, op, dtype, 5, width, 1);
	call_of(&call, op, &in, &out);
	run_on(op_names[op], &call, 1);
	call_of(&call, op, &moved, &other);
	run_on(op_names[op], &call, 1);
	assert_same_rows(&out.first, &other.first, 0, op_names[op]);
	if (op == OP_FUSED)
		assert_same_rows(&out.second, &other.second, 0, op_names[op]);
	inputs_fini(&in);
	inputs_fini(&moved);
	results_fini(&out);
	results_fini(&other);
}

START_TEST(strides_and_alignment_change_no_bit)
{
	if (!isa_open(_i))
		return;
	for (int op = 0; op < OPS; op++)
		for (size_t d = 0; d < 3; d++)
			for (size_t w = 0; widths[w] > 0; w++)
				check_layouts(op, dtypes[d], widths[w]);
	host_fini(&host);
}
END_TEST

/* A batch of many rows on 4 threads, and each of some of its rows alone on one. */
static void check_batch(int op, opd_dtype dtype, int64_t rows, int64_t width)
{
	struct inputs in;
	struct results out, one;
	struct call call;
	inputs_init(&in, op, dtype, rows, width, 0, 0);
	results_init(&out, op, dtype, rows, width, 0);
	call_of(&call, op, &in, &out);
	ck_assert_uint_gt(impl_of(op_names[op])->impl->cost_ns(impl_of(op_names[op])->impl, &call.call), 20000);
	run_on(op_names[op], &call, 4);
	results_init(&one, op, dtype, rows, width, 0);
	call_of(&call, op, &in, &one);
	run_on(op_names[op], &call, 1);
	assert_same_rows(&one.first, &out.first, 0, op_names[op]);
	results_fini(&one);
	for (int64_t r = 0; r < rows; r += 7) {
		struct inputs row = in;
		results_init(&one, op, dtype, 1, width, 0);
		row.x.tensor.shape = row.x.shape, row.second.tensor.shape = row.second.shape;
		row.x.tensor.strides = row.x.strides, row.second.tensor.strides = row.second.strides;
		row.x.shape[0] = row.second.shape[0] = 1;
		row.x.tensor.elements /= (uint64_t)rows, row.second.tensor.elements /= (uint64_t)rows;
		row.x.tensor.byte_offset = (uint64_t)((unsigned char *)box_at(&in.x, r, 0) - in.x.memory);
		row.second.tensor.byte_offset = (uint64_t)((unsigned char *)box_at(&in.second, r, 0) - in.second.memory);
		call_of(&call, op, &row, &one);
		run_on(op_names[op], &call, 1);
		assert_same_rows(&one.first, &out.first, r, op_names[op]);
		results_fini(&one);
	}
	inputs_fini(&in);
	results_fini(&out);
}

START_TEST(threads_and_other_rows_change_no_bit)
{
	if (!isa_open(_i))
		return;
	for (int op = 0; op < OPS; op++) {
		for (size_t d = 0; d < 3; d++) {
			check_batch(op, dtypes[d], 150, 1999);
			check_batch(op, dtypes[d], 300, 1024);
			check_batch(op, dtypes[d], 24, 9001); /* softmax of 16-bit rows: past the length that keeps e^x */
		}
	}
	host_fini(&host);
}
END_TEST

/* Wide enough for several items of columns, and for threads to share one row's columns. */
START_TEST(linear_splits_columns_without_changing_bits)
{
	if (!isa_open(_i))
		return;
	struct box x, weight, many, one;
	struct call call;
	box_init(&x, OPD_f32, 6, 700, 0, 0);
	box_init(&weight, OPD_f32, 1237, 700, 0, 0);
	box_init(&many, OPD_f32, 6, 1237, 0, 0);
	box_init(&one, OPD_f32, 1, 1237, 0, 0);
	box_fill(&x, 1);
	box_fill(&weight, 2);
	call_init(&call);
	call_tensor(&call, &x);
	call_tensor(&call, &weight);
	call_none(&call);
	call_output(&call, &many);
	run_on("linear", &call, 3);
	x.shape[0] = 1, x.tensor.elements = 700;
	call.outputs[0] = &one.tensor;
	run_on("linear", &call, 1);
	assert_same_rows(&one, &many, 0, "linear");
	memset(one.memory, 0, 1237 * sizeof(float));
	run_on("linear", &call, 4);
	assert_same_rows(&one, &many, 0, "linear");
	box_fini(&x);
	box_fini(&weight);
	box_fini(&many);
	box_fini(&one);
	host_fini(&host);
}
END_TEST

/* Which NaN of two a product hands on differs between ways through the kernel: results have one form. */
START_TEST(linear_gives_one_nan_on_every_way)
{
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++) {
		struct inputs in;
		struct results many, one;
		struct call call;
		inputs_init(&in, OP_LINEAR, dtypes[d], 9, 50, 0, 0);
		for (int64_t n = 0; n < 21; n++) {
			box_set(&in.x, 0, n, -(double)NAN);
			box_set(&in.weight, n, 20 - n, (double)NAN);
			box_set(&in.bias, 0, n, n % 2 == 0 ? -(double)NAN : 1);
		}
		results_init(&many, OP_LINEAR, dtypes[d], 9, 50, 0);
		results_init(&one, OP_LINEAR, dtypes[d], 1, 50, 0);
		call_of(&call, OP_LINEAR, &in, &many);
		run_on("linear", &call, 1);
		in.x.shape[0] = 1, in.x.tensor.elements = 50;
		call_of(&call, OP_LINEAR, &in, &one);
		run_on("linear", &call, 1);
		assert_same_rows(&one.first, &many.first, 0, "linear of NaN");
		for (int64_t n = 0; n < 21; n++)
			ck_assert(!signbit(box_get(&one.first, 0, n)) && isnan(box_get(&one.first, 0, n)));
		inputs_fini(&in);
		results_fini(&many);
		results_fini(&one);
	}
	host_fini(&host);
}
END_TEST

START_TEST(fused_add_in_place_gives_the_same_bits)
{
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++) {
		for (size_t w = 0; widths[w] > 0; w++) {
			struct inputs in;
			struct results out;
			struct call call;
			inputs_init(&in, OP_FUSED, dtypes[d], 3, widths[w], 0, 0);
			results_init(&out, OP_FUSED, dtypes[d], 3, widths[w], 0);
			call_of(&call, OP_FUSED, &in, &out);
			run_on("fused_add_rms_norm", &call, 1);
			call.outputs[0] = &in.x.tensor;
			call.outputs[1] = &in.second.tensor;
			run_on("fused_add_rms_norm", &call, 1);
			assert_same_rows(&out.first, &in.x, 0, "in place");
			assert_same_rows(&out.second, &in.second, 0, "in place");
			inputs_fini(&in);
			results_fini(&out);
		}
	}
	host_fini(&host);
}
END_TEST

/* Zeros, aligned as a tensor is. */
static void *aligned_zeros(size_t bytes)
{
	void *memory = aligned_alloc(64, bytes);
	ck_assert_ptr_nonnull(memory);
	memset(memory, 0, bytes);
	return memory;
}

START_TEST(norms_past_the_caches_give_the_same_bits)
{
	enum { WIDEST = 1056 };
	const struct cpu_kernels *kernels = cpu_isas[_i];
	if (!cpu_isa_supported(kernels))
		return;
	struct inputs in;
	unsigned char *y[2], *sum[2];
	for (size_t s = 0; s < 2; s++)
		y[s] = aligned_zeros(WIDEST * 4), sum[s] = aligned_zeros(WIDEST * 4);
	for (size_t d = 0; d < 3; d++) {
		const unsigned dtype = cpu_dtype_index(dtypes[d]);
		inputs_init(&in, OP_FUSED, dtypes[d], 1, WIDEST, 0, 0);
		for (size_t width = 32; width <= WIDEST; width += 512) { /* rows of whole cache lines, as norm.c asks for */
			struct cpu_norm norm = {.x = box_at(&in.x, 0, 0), .residual = box_at(&in.second, 0, 0), .weight = box_at(&in.weight, 0, 0), .count = width, .squares = width, .epsilon = 1e-5f};
			norm.x_next = norm.x, norm.residual_next = norm.residual;
			for (size_t weight = CPU_WEIGHT_NONE; weight <= CPU_WEIGHT_SAME; weight++) {
				for (size_t s = 0; s < 2; s++) {
					norm.y = y[s], norm.sum = sum[s], norm.streams = s == 1;
					kernels->norm->fused_add_rms_norm[dtype][weight](&norm);
				}
				ck_assert_mem_eq(y[0], y[1], WIDEST * 4);
				ck_assert_mem_eq(sum[0], sum[1], WIDEST * 4);
				for (size_t s = 0; s < 2; s++) {
					norm.y = y[s], norm.streams = s == 1;
					kernels->norm->rms_norm[dtype][weight](&norm);
				}
				ck_assert_mem_eq(y[0], y[1], WIDEST * 4);
			}
			for (size_t s = 0; s < 2; s++) {
				struct cpu_layer_norm layer = {.x = norm.x, .next = norm.x, .weight = norm.weight, .bias = norm.residual, .y = y[s], .count = width, .epsilon = 1e-5f, .streams = s == 1};
				kernels->moments->layer_norm[dtype][0][0](&layer);
			}
			ck_assert_mem_eq(y[0], y[1], WIDEST * 4);
		}
		inputs_fini(&in);
	}
	for (size_t s = 0; s < 2; s++)
		free(y[s]), free(sum[s]);
}
END_TEST

/* Whole lines, and rows that end within a vector, of up to several steps of powers. */
START_TEST(softmax_past_the_caches_gives_the_same_bits)
{
	enum { WIDEST = 5008 }; /* whole lines of f32 */
	const struct cpu_kernels *kernels = cpu_isas[_i];
	if (!cpu_isa_supported(kernels))
		return;
	struct inputs in;
	unsigned char *y[2] = {aligned_zeros(WIDEST * 4), aligned_zeros(WIDEST * 4)};
	float *kept = aligned_zeros(WIDEST * 4);
	for (size_t d = 0; d < 3; d++) {
		inputs_init(&in, OP_SOFTMAX, dtypes[d], 1, WIDEST, 0, 0);
		for (size_t width = 1; width <= WIDEST; width = width * 3 / 2 + 3) {
			for (size_t s = 0; s < 2; s++)
				kernels->softmax->softmax[cpu_dtype_index(dtypes[d])](box_at(&in.x, 0, 0), box_at(&in.x, 0, 0), y[s], width, s == 0 ? NULL : kept);
			ck_assert_msg(memcmp(y[0], y[1], WIDEST * 4) == 0, "%s, width %zu: other bits past the caches", opd_dtype_name(dtypes[d]), width);
		}
		inputs_fini(&in);
	}
	free(y[0]), free(y[1]), free(kept);
}
END_TEST

/* What single passes read and write: PASS elements, results from `at` bytes into a line on. */
enum { PASS = 1021, PASS_BYTES = 4160 };

struct pass {
	const void *x, *other;
	unsigned char *y[2]; /* as memory has it; past the caches */
	size_t at;
	enum cpu_reach reach; /* of the second */
};

static void assert_same_pass(const struct pass *pass, const char *what, size_t number)
{
	ck_assert_msg(memcmp(pass->y[0], pass->y[1], PASS_BYTES) == 0, "%s %zu, results %zu bytes into a line: other bits past the caches", what, number, pass->at);
}

static void compare_passes(const struct cpu_kernels *kernels, opd_dtype dtype, const struct pass *pass)
{
	const unsigned index = cpu_dtype_index(dtype);
	for (size_t f = 0; f < CPU_ACTIVATIONS; f++) {
		for (size_t s = 0; s < 2; s++)
			kernels->activation->alone[f][index](pass->x, NULL, pass->y[s] + pass->at, PASS, s == 0 ? CPU_NEAR : pass->reach);
		assert_same_pass(pass, "activation", f);
		for (size_t s = 0; s < 2; s++)
			kernels->activation->times[f][index](pass->x, pass->other, pass->y[s] + pass->at, PASS, s == 0 ? CPU_NEAR : pass->reach);
		assert_same_pass(pass, "product with activation", f);
	}
	for (size_t steps = 0; steps < 4; steps++) {
		for (size_t s = 0; s < 2; s++)
			kernels->arithmetic->run[CPU_MUL][dtype](pass->x, steps & 1, pass->other, steps >> 1, pass->y[s] + pass->at, PASS, s == 0 ? CPU_NEAR : pass->reach);
		assert_same_pass(pass, "product of steps", steps);
	}
	for (size_t to = 0; to < OPD_DTYPE_COUNT; to++) {
		cpu_cast_fn cast = kernels->cast->narrow[dtype][to];
		for (size_t s = 0; cast != NULL && s < 2; s++)
			cast(pass->x, pass->y[s] + pass->at, PASS, s == 0 ? CPU_NEAR : pass->reach);
		assert_same_pass(pass, "cast to dtype", to);
	}
}

START_TEST(passes_past_the_caches_give_the_same_bits)
{
	const struct cpu_kernels *kernels = cpu_isas[_i];
	if (!cpu_isa_supported(kernels))
		return;
	struct inputs in;
	struct pass pass = {.y = {aligned_zeros(PASS_BYTES), aligned_zeros(PASS_BYTES)}};
	for (size_t d = 0; d < 3; d++) {
		inputs_init(&in, OP_FUSED, dtypes[d], 1, PASS, 0, 0);
		pass.x = box_at(&in.x, 0, 0), pass.other = box_at(&in.second, 0, 0);
		for (pass.at = 0; pass.at <= 64; pass.at += opd_dtype_bytes(dtypes[d]) * 4) /* also where a line is begun in its middle, which nothing may be streamed to */
			for (pass.reach = CPU_PAST; pass.reach <= CPU_PAST_AHEAD; pass.reach++)
				compare_passes(kernels, dtypes[d], &pass);
		inputs_fini(&in);
	}
	free(pass.y[0]), free(pass.y[1]);
}
END_TEST

/* ---- Special values ------------------------------------------------------------------------------------------------------- */

/* One row of `width` copies of `rest`, with `special` at `at`; the result's element `read`. */
static double run_special(int op, opd_dtype dtype, int64_t width, double rest, double special, int64_t at, int64_t read)
{
	struct inputs in;
	struct results out;
	struct call call;
	inputs_init(&in, op, dtype, 1, width, 0, 0);
	results_init(&out, op, dtype, 1, width, 0);
	for (int64_t c = 0; c < box_last(&in.x); c++)
		box_set(&in.x, 0, c, c == at ? special : rest);
	call_of(&call, op, &in, &out);
	run_on(op_names[op], &call, 1);
	double got = box_get(&out.first, 0, read);
	inputs_fini(&in);
	results_fini(&out);
	return got;
}

START_TEST(nan_and_infinities_propagate)
{
	if (!isa_open(_i))
		return;
	for (size_t d = 0; d < 3; d++) {
		opd_dtype t = dtypes[d];
		for (int64_t at = 0; at < 40; at += 3) {
			ck_assert(isnan(run_special(OP_RMS, t, 40, 1, NAN, at, 39)));
			ck_assert(isnan(run_special(OP_SOFTMAX, t, 40, 1, NAN, at, 39)));
			ck_assert(isnan(run_special(OP_SOFTMAX, t, 40, 1, INFINITY, at, 39)));
			ck_assert(isnan(run_special(OP_LINEAR, t, 40, 1, NAN, at, 20)));
			ck_assert(isnan(run_special(OP_SILU, t, 40, 1, NAN, at, at)));
			ck_assert(!isnan(run_special(OP_SILU, t, 40, 1, NAN, at, at == 0 ? 1 : at - 1)));
			ck_assert_double_eq(run_special(OP_SOFTMAX, t, 40, 1, -INFINITY, at, at), 0);
			ck_assert(isnan(run_special(OP_RMS, t, 40, 1, INFINITY, at, at)));
			ck_assert_double_eq(fabs(run_special(OP_RMS, t, 40, 1, INFINITY, at, at == 0 ? 1 : 0)), 0);
		}
		ck_assert(isnan(run_special(OP_SOFTMAX, t, 37, -INFINITY, -INFINITY, 0, 36)));
		ck_assert_double_eq(run_special(OP_SOFTMAX, t, 37, -INFINITY, 5, 36, 36), 1);
		ck_assert_double_eq(run_special(OP_SILU, t, 40, 1, INFINITY, 3, 3), INFINITY);
		ck_assert(isnan(run_special(OP_SILU, t, 40, 1, -INFINITY, 3, 3)));
	}
	host_fini(&host);
}
END_TEST

/* Each bit pattern plus zero, through the sum of fused_add_rms_norm. */
START_TEST(every_16_bit_value_survives_load_and_store)
{
	if (!isa_open(_i))
		return;
	for (size_t d = 1; d < 3; d++) {
		struct box x, zero, sum, y;
		struct call call;
		box_init(&x, dtypes[d], 1, 65536, 0, 0);
		box_init(&zero, dtypes[d], 1, 65536, 0, 0);
		box_init(&sum, dtypes[d], 1, 65536, 0, 0);
		box_init(&y, dtypes[d], 1, 65536, 0, 0);
		for (uint32_t i = 0; i < 65536; i++) {
			uint16_t bits = (uint16_t)i;
			memcpy(box_at(&x, 0, i), &bits, 2);
		}
		call_init(&call);
		call_tensor(&call, &x);
		call_tensor(&call, &zero);
		call_none(&call);
		call_float(&call, 1e-6);
		call_none(&call);
		call_output(&call, &y);
		call_output(&call, &sum);
		run_on("fused_add_rms_norm", &call, 1);
		for (uint32_t i = 0; i < 65536; i++) {
			double want = box_get(&x, 0, i), got = box_get(&sum, 0, i);
			ck_assert_msg(isnan(want) ? isnan(got) : got == want, "%s bits %04x: got %g", opd_dtype_name(dtypes[d]), i, got);
		}
		box_fini(&x);
		box_fini(&zero);
		box_fini(&sum);
		box_fini(&y);
	}
	host_fini(&host);
}
END_TEST

/* Halfway cases, overflow, denormals: f32 weights scale one known value through the store. */
START_TEST(stores_round_to_nearest_even_once)
{
	if (!isa_open(_i))
		return;
	static const float values[] = {1.00390625f, 1.01171875f, 65519.0f, 65520.0f, 3.39e38f, 5.9604645e-8f, 2.9802322e-8f, 8.9406967e-8f,
	                               6.1e-5f, 1.00048828125f, 1.00146484375f, 1e-40f, 9.2e-41f, 1e30f, -1.00390625f, 3.1e-8f, 70000.0f};
	/* Whole vectors without the denormal ones, whole vectors with them, and a rest. */
	enum { COUNT = sizeof values / sizeof values[0], NORMAL = 11, FIRST = 128, COLUMNS = FIRST + 8 * COUNT };
	for (size_t d = 1; d < 3; d++) {
		struct box x, weight, y;
		struct call call;
		box_init(&x, dtypes[d], 1, COLUMNS, 0, 0);
		box_init_vector(&weight, OPD_f32, COLUMNS);
		box_init(&y, dtypes[d], 1, COLUMNS, 0, 0);
		for (int64_t c = 0; c < COLUMNS; c++) {
			box_set(&x, 0, c, 1);
			box_set(&weight, 0, c, (double)values[c < FIRST ? c % NORMAL : c % COUNT]);
		}
		call_init(&call);
		call_tensor(&call, &x);
		call_tensor(&call, &weight);
		call_float(&call, 0); /* the norm of ones is one, exactly */
		call_none(&call);
		call_output(&call, &y);
		run_on("rms_norm", &call, 1);
		for (int64_t c = 0; c < COLUMNS; c++)
			ck_assert_double_eq(box_get(&y, 0, c), rounded(dtypes[d], box_get(&weight, 0, c)));
		box_fini(&x);
		box_fini(&weight);
		box_fini(&y);
	}
	host_fini(&host);
}
END_TEST

/* silu of x is x·s; its relative error against the C library's is that of e^x, a sum and a quotient. */
static void check_exp(opd_dtype dtype, double reach, double unit)
{
	enum { COUNT = 20000 };
	struct box x, y;
	struct call call;
	box_init(&x, dtype, 1, 2 * COUNT, 0, 0);
	box_init(&y, dtype, 1, COUNT, 0, 0);
	for (int64_t c = 0; c < COUNT; c++) {
		box_set(&x, 0, c, -reach + (double)c * (2 * reach / COUNT) + 1e-3);
		box_set(&x, 0, COUNT + c, 1);
	}
	call_init(&call);
	call_tensor(&call, &x);
	call_output(&call, &y);
	run_on("silu_and_mul", &call, 1);
	for (int64_t c = 0; c < COUNT; c++) {
		double v = box_get(&x, 0, c), want = v / (1 + exp(-v));
		ck_assert_msg(fabs(box_get(&y, 0, c) - want) <= 4 * unit * fabs(want), "silu(%.17g) of %s: got %.17g, want %.17g", v, opd_dtype_name(dtype),
		              box_get(&y, 0, c), want);
	}
	box_fini(&x);
	box_fini(&y);
}

START_TEST(exp_is_within_a_few_ulp_over_its_whole_range)
{
	if (!isa_open(_i))
		return;
	check_exp(OPD_f32, 86, 0x1p-23);
	check_exp(OPD_f64, 700, 0x1p-52);
	host_fini(&host);
}
END_TEST

/* ---- Edges --------------------------------------------------------------------------------------------------------------- */

static void check_empty(int op, int64_t rows, int64_t width)
{
	struct inputs in;
	struct results out;
	struct call call;
	inputs_init(&in, op, OPD_bf16, rows, width, 0, 0);
	results_init(&out, op, OPD_bf16, rows, width, 0);
	if (op == OP_LINEAR)
		in.x.tensor.data = in.weight.tensor.data = NULL;
	call_of(&call, op, &in, &out);
	run_on(op_names[op], &call, 2);
	if (op == OP_LINEAR)
		for (int64_t r = 0; r < rows; r++)
			for (int64_t n = 0; n < box_last(&out.first); n++)
				ck_assert_double_eq(box_get(&out.first, r, n), box_get(&in.bias, 0, n));
	inputs_fini(&in);
	results_fini(&out);
}

START_TEST(empty_operands_and_a_sum_over_nothing)
{
	if (!isa_open(_i))
		return;
	for (int op = 0; op < OPS; op++) {
		check_empty(op, 0, 5 * (op != OP_LINEAR));
		check_empty(op, 4, 0);
	}
	check_empty(OP_LINEAR, 1, 0);
	host_fini(&host);
}
END_TEST

static void assert_refused(const char *op, const struct call *call, opd_reason_code code, const char *detail)
{
	opd_reason reason = {0};
	ck_assert(!accepts(op, call, NULL));
	ck_assert(!accepts(op, call, &reason));
	ck_assert_int_eq(reason.code, (int)code);
	ck_assert_str_eq(reason.detail, detail);
}

START_TEST(refusals_name_their_reason)
{
	ck_assert(isa_open(0));
	struct inputs in;
	struct results out;
	struct call call;
	inputs_init(&in, OP_RMS, OPD_i64, 2, 8, 0, 0);
	results_init(&out, OP_RMS, OPD_i64, 2, 8, 0);
	for (int op = 0; op < OPS; op++) {
		call_of(&call, op, &in, &out);
		assert_refused(op_names[op], &call, OPD_REASON_DTYPE, op == OP_LINEAR ? "x i64, only f32, bf16, f16" : "x i64, only f32, bf16, f16, f64");
	}
	in.x.tensor.dtype = OPD_f64;
	call_of(&call, OP_LINEAR, &in, &out);
	assert_refused("linear", &call, OPD_REASON_DTYPE, "x f64, only f32, bf16, f16");
	in.x.tensor.dtype = OPD_f32;
	in.x.strides[1] = 2;
	in.x.tensor.flags = 0;
	for (int op = 0; op < OPS; op++) {
		call_of(&call, op, &in, &out);
		assert_refused(op_names[op], &call, OPD_REASON_LAYOUT, "x has stride 2 in its last dimension, only 1");
	}
	in.x.strides[1] = 1;
	call_of(&call, OP_RMS, &in, &out);
	call.args[3] = (opd_arg){.kind = OPD_ARG_INT, .i = 4};
	ck_assert(accepts("rms_norm", &call, NULL));
	call_of(&call, OP_SOFTMAX, &in, &out);
	for (int64_t dim = -2; dim < 2; dim++) {
		call.args[1].i = dim;
		ck_assert(accepts("softmax", &call, NULL));
	}
	inputs_fini(&in);
	results_fini(&out);
	host_fini(&host);
}
END_TEST

START_TEST(another_output_than_the_kernel_writes_is_internal)
{
	ck_assert(isa_open(0));
	for (int op = 0; op < OPS; op++) {
		for (int what = 0; what < 2; what++) {
			struct inputs in;
			struct results out;
			struct call call;
			opd_error error = {0};
			inputs_init(&in, op, OPD_f32, 2, 8, 0, 0);
			results_init(&out, op, OPD_f32, 2, 8, 0);
			if (what == 0)
				out.first.tensor.dtype = OPD_bf16;
			else
				out.first.shape[1]--;
			call_of(&call, op, &in, &out);
			ck_assert_int_eq(host_run(&host, impl_of(op_names[op]), &call.call, 1, &error), OPD_INTERNAL);
			ck_assert(strncmp(error.text, op_names[op], strlen(op_names[op])) == 0);
			for (size_t i = 0; i < 2 * 8 * sizeof(float) && op != OP_LINEAR; i++)
				ck_assert_uint_eq(out.first.memory[i], 0);
			inputs_fini(&in);
			results_fini(&out);
		}
	}
	host_fini(&host);
}
END_TEST

START_TEST(a_cancelled_call_ends_early)
{
	ck_assert(isa_open(0));
	struct inputs in;
	struct results out;
	struct call call;
	opd_error error = {0};
	inputs_init(&in, OP_SILU, OPD_f32, 4000, 1000, 0, 0);
	results_init(&out, OP_SILU, OPD_f32, 4000, 1000, 0);
	call_of(&call, OP_SILU, &in, &out);
	host.cancel = true;
	ck_assert_int_eq(host_run(&host, impl_of("silu_and_mul"), &call.call, 1, &error), OPD_CANCELLED);
	ck_assert_double_eq(box_get(&out.first, 3999, 0), 0);
	inputs_fini(&in);
	results_fini(&out);
	host_fini(&host);
}
END_TEST

START_TEST(an_instruction_set_that_cannot_be_had_is_warned_about)
{
	char warning[160];
	const struct cpu_kernels *best = cpu_isa_pick(NULL, warning, sizeof warning);
	ck_assert_str_eq(warning, "");
	ck_assert_ptr_eq(cpu_isa_pick("", warning, sizeof warning), best);
	ck_assert_str_eq(warning, "");
	ck_assert_ptr_eq(cpu_isa_pick("mmx", warning, sizeof warning), best);
	ck_assert_ptr_nonnull(strstr(warning, best->isa));
	for (size_t i = 0; cpu_isas[i] != NULL; i++) {
		const struct cpu_kernels *picked = cpu_isa_pick(cpu_isas[i]->isa, warning, sizeof warning);
		ck_assert_ptr_eq(picked, cpu_isa_supported(cpu_isas[i]) ? cpu_isas[i] : best);
		ck_assert_int_eq(warning[0] != '\0', !cpu_isa_supported(cpu_isas[i]));
	}
	opd_error error;
	ck_assert_int_eq(setenv("OPD_CPU_ISA", "mmx", 1), 0);
	host_init(&host);
	ck_assert_int_eq(host_open(&host, &cpu_module, &error), OPD_OK);
	ck_assert_uint_eq(host.warnings, 1);
	host_fini(&host);
}
END_TEST

static Suite *cpu_suite(void)
{
	Suite *suite = suite_create("cpu");
	TCase *each = tcase_create("each instruction set");
	int sets = 0;
	while (cpu_isas[sets] != NULL)
		sets++;
	tcase_set_timeout(each, 300);
	tcase_add_loop_test(each, kernels_agree_with_f64_at_every_width, 0, sets);
	tcase_add_loop_test(each, f32_weights_and_no_weight_of_norms_agree_with_f64, 0, sets);
	tcase_add_loop_test(each, strides_and_alignment_change_no_bit, 0, sets);
	tcase_add_loop_test(each, threads_and_other_rows_change_no_bit, 0, sets);
	tcase_add_loop_test(each, linear_splits_columns_without_changing_bits, 0, sets);
	tcase_add_loop_test(each, linear_gives_one_nan_on_every_way, 0, sets);
	tcase_add_loop_test(each, fused_add_in_place_gives_the_same_bits, 0, sets);
	tcase_add_loop_test(each, norms_past_the_caches_give_the_same_bits, 0, sets);
	tcase_add_loop_test(each, softmax_past_the_caches_gives_the_same_bits, 0, sets);
	tcase_add_loop_test(each, passes_past_the_caches_give_the_same_bits, 0, sets);
	tcase_add_loop_test(each, nan_and_infinities_propagate, 0, sets);
	tcase_add_loop_test(each, every_16_bit_value_survives_load_and_store, 0, sets);
	tcase_add_loop_test(each, stores_round_to_nearest_even_once, 0, sets);
	tcase_add_loop_test(each, exp_is_within_a_few_ulp_over_its_whole_range, 0, sets);
	tcase_add_loop_test(each, empty_operands_and_a_sum_over_nothing, 0, sets);
	suite_add_tcase(suite, each);
	TCase *module = tcase_create("module");
	tcase_set_timeout(module, 300);
	tcase_add_test(module, refusals_name_their_reason);
	tcase_add_test(module, another_output_than_the_kernel_writes_is_internal);
	tcase_add_test(module, a_cancelled_call_ends_early);
	tcase_add_test(module, an_instruction_set_that_cannot_be_had_is_warned_about);
	suite_add_tcase(suite, module);
	return suite;
}

int main(void)
{
	SRunner *runner = srunner_create(cpu_suite());
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
