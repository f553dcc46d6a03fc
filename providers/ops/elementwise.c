/* add, sub, mul, cast.
 *
 * Floats are computed in f32 (f64 for f64 operands) and rounded to their dtype; integers wrap, computed modulo 2^64 and cut. cast
 * goes through no other dtype: one rounding. */
#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"
#include "uuid/native_elementwise.h"

static uint64_t chunks_of(const opd_tensor *out)
{
	return (out->elements + KERNEL_CHUNK - 1) / KERNEL_CHUNK;
}

static uint64_t elementwise_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 7);
}

/* ---- add, sub, mul ----------------------------------------------------------------------------------------------------- */

enum arithmetic {
	ARITHMETIC_ADD,
	ARITHMETIC_SUB,
	ARITHMETIC_MUL,
};

static const enum arithmetic arithmetic_add = ARITHMETIC_ADD;
static const enum arithmetic arithmetic_sub = ARITHMETIC_SUB;
static const enum arithmetic arithmetic_mul = ARITHMETIC_MUL;

struct arithmetic_context {
	enum arithmetic arithmetic;
	struct kernel_view a;
	struct kernel_view b;
	struct kernel_line out;
};

static opd_status arithmetic_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *a = kernel_tensor(call, 0);
	const opd_tensor *b = kernel_tensor(call, 1);
	int64_t shape[OPD_RANK_MAX];
	opd_status status = kernel_expect_dtype_of(op, "b", b, "a", a, error);
	if (status != OPD_OK)
		return status;
	if (a->dtype == OPD_bool)
		return kernel_invalid(op, error, "a is bool, expected an integer or float dtype");
	status = kernel_broadcast(op, "a", a, a->rank, "b", b, b->rank, shape, error);
	if (status != OPD_OK)
		return status;
	return kernel_output_set(op, outputs[0], a->dtype, a->rank > b->rank ? a->rank : b->rank, shape, error);
}

static double arithmetic_floats(enum arithmetic arithmetic, double a, double b)
{
	switch (arithmetic) {
	case ARITHMETIC_ADD:
		return a + b;
	case ARITHMETIC_SUB:
		return a - b;
	case ARITHMETIC_MUL:
		break;
	}
	return a * b;
}

static int64_t arithmetic_integers(enum arithmetic arithmetic, int64_t a, int64_t b)
{
	switch (arithmetic) {
	case ARITHMETIC_ADD:
		return (int64_t)((uint64_t)a + (uint64_t)b);
	case ARITHMETIC_SUB:
		return (int64_t)((uint64_t)a - (uint64_t)b);
	case ARITHMETIC_MUL:
		break;
	}
	return (int64_t)((uint64_t)a * (uint64_t)b);
}

static void arithmetic_float_chunk(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct arithmetic_context *context = job->context;
	const int64_t begin = (int64_t)item * KERNEL_CHUNK;
	const int64_t count = kernel_chunk(begin, context->out.extent);
	double a[KERNEL_CHUNK];
	double b[KERNEL_CHUNK];
	(void)scratch;
	kernel_gather(&context->a, (uint64_t)begin, count, a);
	kernel_gather(&context->b, (uint64_t)begin, count, b);
	for (int64_t i = 0; i < count; i++)
		a[i] = arithmetic_floats(context->arithmetic, a[i], b[i]);
	kernel_store(&context->out, begin, count, a);
}

static void arithmetic_integer_chunk(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct arithmetic_context *context = job->context;
	const int64_t begin = (int64_t)item * KERNEL_CHUNK;
	const int64_t count = kernel_chunk(begin, context->out.extent);
	int64_t a[KERNEL_CHUNK];
	int64_t b[KERNEL_CHUNK];
	(void)scratch;
	kernel_gather_i64(&context->a, (uint64_t)begin, count, a);
	kernel_gather_i64(&context->b, (uint64_t)begin, count, b);
	for (int64_t i = 0; i < count; i++)
		a[i] = arithmetic_integers(context->arithmetic, a[i], b[i]);
	kernel_store_i64(&context->out, begin, count, a);
}

static opd_status arithmetic_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	const opd_tensor *out = call->outputs[0];
	if (status != OPD_OK || out->elements == 0)
		return status;
	struct arithmetic_context context = {
		.arithmetic = *(const enum arithmetic *)((const opd_op *)impl->user)->user,
		.a = kernel_view(kernel_tensor(call, 0), out->rank, out->shape),
		.b = kernel_view(kernel_tensor(call, 1), out->rank, out->shape),
		.out = kernel_flat(out),
	};
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &context};
	kernel_item_fn chunk = opd_dtype_is_integer(out->dtype) ? arithmetic_integer_chunk : arithmetic_float_chunk;
	return kernel_for(&job, chunks_of(out), KERNEL_CHUNK * 18, chunk, error);
}

/* variants: the same shape; b one row; a one column and b one row; a of rank 0; b broadcast in the middle */
static opd_status arithmetic_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	enum { VARIANTS = 5 };
	opd_status status = kernel_generator_begin(op, generator, VARIANTS, error);
	if (status != OPD_OK)
		return status;
	if (generator->dtype == OPD_bool)
		return kernel_invalid(op, error, "dtype is bool, expected an integer or float dtype");
	const int64_t rows = generator->dims[0], hidden = generator->dims[1];
	const struct {
		uint32_t a_rank, b_rank;
		int64_t a[3], b[3];
	} forms[VARIANTS] = {
		{2, 2, {rows, hidden}, {rows, hidden}}, {2, 1, {rows, hidden}, {hidden}},
		{2, 2, {rows, 1}, {1, hidden}},         {0, 2, {0}, {rows, hidden}},
		{3, 3, {rows, 3, hidden}, {rows, 1, hidden}},
	}, *form = &forms[generator->variant];
	status = kernel_generate(op, generator, "a", generator->dtype, form->a_rank, form->a, 1, error);
	return status != OPD_OK ? status : kernel_generate(op, generator, "b", generator->dtype, form->b_rank, form->b, 1, error);
}

static const int64_t elementwise_dims[] = {4, 4096};

#define ARITHMETIC(name, schema_text, doc_text)                                                                                  \
	static const opd_op name##_op;                                                                                               \
	static const opd_impl name##_native =                                                                                        \
		KERNEL_NATIVE(#name, &name##_op, arithmetic_run, elementwise_cost, OPD_UUID_native_elementwise);                         \
	static const opd_op name##_op = {                                                                                            \
		.struct_bytes = sizeof name##_op,                                                                                        \
		.schema = (schema_text),                                                                                                 \
		.doc = (doc_text),                                                                                                       \
		.activations = "a,b",                                                                                                    \
		.shape = arithmetic_shape,                                                                                               \
		.generate = arithmetic_generate,                                                                                         \
		.dims = "rows,hidden",                                                                                                   \
		.default_dims = elementwise_dims,                                                                                        \
		.dim_count = 2,                                                                                                          \
		.native = &name##_native,                                                                                                \
		.user = &arithmetic_##name,                                                                                              \
	}

ARITHMETIC(add, "add(Tensor a, Tensor b) -> Tensor", "a + b, broadcasting; integers wrap");
ARITHMETIC(sub, "sub(Tensor a, Tensor b) -> Tensor", "a - b, broadcasting; integers wrap");
ARITHMETIC(mul, "mul(Tensor a, Tensor b) -> Tensor", "a · b, element by element, broadcasting; integers wrap");

/* ---- cast -------------------------------------------------------------------------------------------------------------- */

struct cast_context {
	struct kernel_view x;
	struct kernel_line out;
};

#define CAST_DTYPES "bool, u8, i8, i16, i32, i64, f16, bf16, f32, f64, f8_e4m3fn or f8_e5m2"

static opd_status cast_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	opd_dtype dtype = opd_dtype_parse(kernel_str(call, 1));
	if (dtype == OPD_DTYPE_NONE)
		return kernel_invalid(op, error, "dtype is \"%.64s\", expected " CAST_DTYPES, kernel_str(call, 1));
	return kernel_output_like(op, outputs[0], dtype, kernel_tensor(call, 0), error);
}

static void cast_number_chunk(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct cast_context *context = job->context;
	const int64_t begin = (int64_t)item * KERNEL_CHUNK;
	const int64_t count = kernel_chunk(begin, context->out.extent);
	double values[KERNEL_CHUNK];
	(void)scratch;
	kernel_gather(&context->x, (uint64_t)begin, count, values);
	for (int64_t i = 0; i < count; i++)
		element_store_f64(context->out.dtype, kernel_line_at(&context->out, begin + i), values[i]);
}

static void cast_integer_chunk(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct cast_context *context = job->context;
	const int64_t begin = (int64_t)item * KERNEL_CHUNK;
	const int64_t count = kernel_chunk(begin, context->out.extent);
	int64_t values[KERNEL_CHUNK];
	(void)scratch;
	kernel_gather_i64(&context->x, (uint64_t)begin, count, values);
	kernel_store_i64(&context->out, begin, count, values);
}

static opd_status cast_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	const opd_tensor *x = kernel_tensor(call, 0);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct cast_context context = {.x = kernel_view(x, x->rank, x->shape), .out = kernel_flat(call->outputs[0])};
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &context};
	bool integer = opd_dtype_is_integer(x->dtype) || x->dtype == OPD_bool;
	return kernel_for(&job, chunks_of(x), KERNEL_CHUNK * 12, integer ? cast_integer_chunk : cast_number_chunk, error);
}

/* variants: the dtype that is cast to; the first is what models cast to, f32 from bf16 and bf16 from others, so that it is what is timed */
static opd_status cast_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	static const opd_dtype targets[] = {OPD_bf16, OPD_f32, OPD_f16, OPD_f64, OPD_f8_e4m3fn, OPD_f8_e5m2,
	                                    OPD_i8,   OPD_u8,  OPD_i16, OPD_i32, OPD_i64,       OPD_bool};
	opd_status status = kernel_generator_begin(op, generator, sizeof targets / sizeof targets[0], error);
	if (status != OPD_OK)
		return status;
	uint32_t target = generator->dtype == OPD_bf16 && generator->variant < 2 ? 1 - generator->variant : generator->variant;
	generator->set_str(generator, "dtype", opd_dtype_name(targets[target]));
	return kernel_generate(op, generator, "x", generator->dtype, 2, generator->dims, 1, error);
}

static const opd_op cast_op;
static const opd_impl cast_native = KERNEL_NATIVE("cast", &cast_op, cast_run, elementwise_cost, OPD_UUID_native_elementwise);
static const opd_op cast_op = {
	.struct_bytes = sizeof cast_op,
	.schema = "cast(Tensor x, str dtype) -> Tensor",
	.doc = "x in another dtype: rounded to nearest even; f8 and integers saturate; integer to integer wraps",
	.activations = "x",
	.flags = OPD_OP_ROWS,
	.shape = cast_shape,
	.generate = cast_generate,
	.dims = "rows,hidden",
	.default_dims = elementwise_dims,
	.dim_count = 2,
	.native = &cast_native,
};

const opd_op *const ops_elementwise[] = {&add_op, &sub_op, &mul_op, &cast_op, NULL};
