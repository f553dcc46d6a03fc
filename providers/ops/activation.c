/* silu_and_mul, mul_and_silu, gelu_and_mul, gelu_and_mul_sparse, silu, gelu, relu, relu2, sigmoid.
 *
 * Functions are evaluated in double and rounded once: the value that f32 arithmetic approximates. Where f32 arithmetic makes an
 * infinity or NaN out of a limit (gelu and silu of −infinity are NaN) so does the same formula in double. */
#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"
#include "uuid/native_activation.h"

#include <math.h>

typedef double (*activation_fn)(double x);

static double sigmoid_of(double x)
{
	return 1 / (1 + exp(-x));
}

static double silu_of(double x)
{
	return x / (1 + exp(-x));
}

/* x·Φ(x). erfc keeps the digits that 1 + erf loses for negative x. */
static double gelu_of(double x)
{
	return 0.5 * x * erfc(-x * M_SQRT1_2);
}

static double gelu_tanh_of(double x)
{
	return 0.5 * x * (1 + tanh(M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x)));
}

static double relu_of(double x)
{
	return x > 0 || isnan(x) ? x : 0;
}

static double relu2_of(double x)
{
	return relu_of(x) * relu_of(x);
}

/* Which half of the last dimension goes through the function; the other multiplies. */
enum activation_form {
	ACTIVATION_ALONE, /* no halves: the result has x's shape */
	ACTIVATION_FIRST,
	ACTIVATION_SECOND,
};

/* What an op of this file is: its `user`. */
struct activation {
	enum activation_form form;
	activation_fn function;
	activation_fn tanh_form; /* for approximate="tanh"; NULL: the op has no such parameter */
	uint32_t approximate;    /* its number */
};

static activation_fn activation_function(const struct activation *activation, const opd_call *call)
{
	bool approximate = activation->tanh_form != NULL && strcmp(kernel_str(call, activation->approximate), "tanh") == 0;
	return approximate ? activation->tanh_form : activation->function;
}

/* ---- Shapes ------------------------------------------------------------------------------------------------------------ */

/* [..., 2d] → [..., d] */
static opd_status halved_output(const opd_op *op, opd_output *output, const opd_tensor *x, opd_error *error)
{
	opd_status status = kernel_expect_rank_min(op, "x", x, 1, error);
	if (status != OPD_OK)
		return status;
	if (opd_tensor_last(x) % 2 != 0)
		return kernel_invalid(op, error, "x has shape %s, expected an even last dimension", kernel_shape_text(x).text);
	status = kernel_output_like(op, output, x->dtype, x, error);
	if (status == OPD_OK)
		output->shape[x->rank - 1] /= 2;
	return status;
}

static opd_status activation_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const struct activation *activation = op->user;
	const opd_tensor *x = kernel_tensor(call, 0);
	opd_status status = kernel_expect_float(op, "x", x, error);
	if (status == OPD_OK && activation->tanh_form != NULL)
		status = kernel_expect_approximate(op, kernel_str(call, activation->approximate), error);
	if (status != OPD_OK)
		return status;
	if (activation->form == ACTIVATION_ALONE)
		return kernel_output_like(op, outputs[0], x->dtype, x, error);
	return halved_output(op, outputs[0], x, error);
}

/* ---- Element by element ------------------------------------------------------------------------------------------------ */

struct activation_context {
	activation_fn function;
	bool gated;
	struct kernel_view x;     /* what goes through the function */
	struct kernel_view other; /* what multiplies */
	struct kernel_line out;
};

static void activation_chunk(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct activation_context *context = job->context;
	const int64_t begin = (int64_t)item * KERNEL_CHUNK;
	const int64_t count = kernel_chunk(begin, context->out.extent);
	double y[KERNEL_CHUNK];
	double other[KERNEL_CHUNK];
	(void)scratch;

	kernel_gather(&context->x, (uint64_t)begin, count, y);
	for (int64_t i = 0; i < count; i++)
		y[i] = context->function(y[i]);
	if (context->gated) {
		kernel_gather(&context->other, (uint64_t)begin, count, other);
		for (int64_t i = 0; i < count; i++)
			y[i] *= other[i];
	}
	kernel_store(&context->out, begin, count, y);
}

static opd_status activation_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	const struct activation *activation = ((const opd_op *)impl->user)->user;
	const opd_tensor *x = kernel_tensor(call, 0);
	struct activation_context context = {
		.function = activation_function(activation, call),
		.gated = activation->form != ACTIVATION_ALONE,
		.out = kernel_flat(call->outputs[0]),
	};
	if (context.gated) {
		int64_t half = opd_tensor_last(x) / 2;
		bool second = activation->form == ACTIVATION_SECOND;
		context.x = kernel_view_half(x, second ? half : 0);
		context.other = kernel_view_half(x, second ? 0 : half);
	} else {
		context.x = kernel_view(x, x->rank, x->shape);
	}
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &context};
	uint64_t chunks = (call->outputs[0]->elements + KERNEL_CHUNK - 1) / KERNEL_CHUNK;
	return kernel_for(&job, chunks, KERNEL_CHUNK * 16, activation_chunk, error);
}

static uint64_t activation_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 8);
}

/* ---- gelu_and_mul_sparse ------------------------------------------------------------------------------------------------ */

#define SPARSE_MULTIPLIER 1 /* parameter number */

static opd_status sparse_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	opd_status status = kernel_expect_finite(op, "std_multiplier", kernel_float(call, SPARSE_MULTIPLIER), error);
	return status != OPD_OK ? status : activation_shape(op, call, outputs, error);
}

/* Σ (gate − from), or Σ (gate − from)², over the first `half` elements of x. */
static double sparse_sum(const struct kernel_line *x, int64_t half, double from, bool squares)
{
	double values[KERNEL_CHUNK];
	double sum = 0;
	for (int64_t begin = 0; begin < half; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, half);
		double part = 0;
		kernel_load(x, begin, count, values);
		for (int64_t i = 0; i < count; i++) {
			double difference = kernel_round_work(x->dtype, values[i] - from);
			part += squares ? difference * difference : difference;
		}
		sum += part;
	}
	return sum;
}

/* mean + std·multiplier of a gate row. Each step is rounded to x's dtype; the standard deviation is taken about the unrounded
 * mean. */
static double sparse_cutoff(const struct kernel_line *x, int64_t half, double multiplier)
{
	double mean = sparse_sum(x, half, 0, false) / (double)half;
	double variance = kernel_round_work(x->dtype, sparse_sum(x, half, mean, true) / (double)half);
	double std = kernel_round(x->dtype, sqrt(variance));
	double above = kernel_round(x->dtype, std * kernel_round_work(x->dtype, multiplier));
	return kernel_round(x->dtype, kernel_round(x->dtype, mean) + above);
}

static void sparse_row(const struct kernel_job *job, uint64_t row, void *scratch)
{
	const struct activation_context *context = job->context;
	struct kernel_line x = kernel_row(kernel_tensor(job->call, 0), row);
	struct kernel_line out = kernel_row(job->call->outputs[0], row);
	double cutoff = sparse_cutoff(&x, out.extent, kernel_float(job->call, SPARSE_MULTIPLIER));
	double y[KERNEL_CHUNK];
	double up[KERNEL_CHUNK];
	(void)scratch;

	for (int64_t begin = 0; begin < out.extent; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, out.extent);
		kernel_load(&x, begin, count, y);
		kernel_load(&x, out.extent + begin, count, up);
		for (int64_t i = 0; i < count; i++) {
			double gate = relu_of(kernel_round(x.dtype, y[i] - cutoff));
			y[i] = kernel_round(x.dtype, context->function(gate)) * up[i];
		}
		kernel_store(&out, begin, count, y);
	}
}

static opd_status sparse_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	const opd_tensor *out = call->outputs[0];
	struct activation_context context = {.function = activation_function(((const opd_op *)impl->user)->user, call)};
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &context};
	return kernel_for(&job, kernel_lines(out, out->rank - 1), (uint64_t)opd_tensor_last(out) * 40, sparse_row, error);
}

static uint64_t sparse_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 14);
}

/* ---- Generators -------------------------------------------------------------------------------------------------------- */

/* variants: both values of approximate, where the op has it; then three dimensions */
static opd_status activation_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	const struct activation *activation = op->user;
	const uint32_t forms = activation->tanh_form != NULL ? 2 : 1;
	opd_status status = kernel_generator_begin(op, generator, forms + 1, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	const int64_t last = generator->dims[1] * (activation->form == ACTIVATION_ALONE ? 1 : 2);
	const int64_t flat[2] = {generator->dims[0], last};
	const int64_t deep[3] = {generator->dims[0], 3, last};
	bool third = generator->variant == forms;
	if (activation->tanh_form != NULL)
		generator->set_str(generator, "approximate", generator->variant == 1 ? "tanh" : "none");
	return kernel_generate(op, generator, "x", generator->dtype, third ? 3 : 2, third ? deep : flat, 1, error);
}

static opd_status sparse_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	/* 1.645: the 95th percentile of a normal gate, as models with sparse feed-forward layers use it */
	generator->set_float(generator, "std_multiplier", generator->variant == 2 ? -0.25 : 1.6448536269514722);
	return activation_generate(op, generator, error);
}

/* ---- The ops ----------------------------------------------------------------------------------------------------------- */

static const int64_t activation_dims[] = {4, 4096};

/* An op and its native implementation. */
#define ACTIVATION(name, schema_text, doc_text, form, function, tanh_form, approximate)                                          \
	static const struct activation name##_activation = {form, function, tanh_form, approximate};                                 \
	static const opd_op name##_op;                                                                                               \
	static const opd_impl name##_native =                                                                                        \
		KERNEL_NATIVE(#name, &name##_op, activation_run, activation_cost, OPD_UUID_native_activation);                           \
	static const opd_op name##_op = {                                                                                            \
		.struct_bytes = sizeof name##_op,                                                                                        \
		.schema = (schema_text),                                                                                                 \
		.doc = (doc_text),                                                                                                       \
		.activations = "x",                                                                                                      \
		.flags = OPD_OP_ROWS,                                                                                                    \
		.shape = activation_shape,                                                                                               \
		.generate = activation_generate,                                                                                         \
		.dims = "rows,hidden",                                                                                                   \
		.default_dims = activation_dims,                                                                                         \
		.dim_count = 2,                                                                                                          \
		.native = &name##_native,                                                                                                \
		.user = &name##_activation,                                                                                              \
	}

ACTIVATION(silu_and_mul, "silu_and_mul(Tensor x) -> Tensor", "silu of the last dimension's first half, times the second half",
           ACTIVATION_FIRST, silu_of, NULL, 0);
ACTIVATION(mul_and_silu, "mul_and_silu(Tensor x) -> Tensor", "the last dimension's first half, times silu of the second half",
           ACTIVATION_SECOND, silu_of, NULL, 0);
ACTIVATION(gelu_and_mul, "gelu_and_mul(Tensor x, str approximate=\"none\") -> Tensor",
           "gelu of the last dimension's first half, times the second half", ACTIVATION_FIRST, gelu_of, gelu_tanh_of, 1);
ACTIVATION(silu, "silu(Tensor x) -> Tensor", "x·sigmoid(x)", ACTIVATION_ALONE, silu_of, NULL, 0);
ACTIVATION(gelu, "gelu(Tensor x, str approximate=\"none\") -> Tensor",
           "x times the normal distribution function of x, by erf or (approximate=\"tanh\") by its tanh form", ACTIVATION_ALONE,
           gelu_of, gelu_tanh_of, 1);
ACTIVATION(relu, "relu(Tensor x) -> Tensor", "x where it is positive, else 0", ACTIVATION_ALONE, relu_of, NULL, 0);
ACTIVATION(relu2, "relu2(Tensor x) -> Tensor", "relu(x) squared", ACTIVATION_ALONE, relu2_of, NULL, 0);
ACTIVATION(sigmoid, "sigmoid(Tensor x) -> Tensor", "1 / (1 + exp(−x))", ACTIVATION_ALONE, sigmoid_of, NULL, 0);

static const struct activation sparse_activation = {ACTIVATION_FIRST, gelu_of, gelu_tanh_of, 2};

static const opd_op sparse_op;
static const opd_impl sparse_native =
    KERNEL_NATIVE("gelu_and_mul_sparse", &sparse_op, sparse_run, sparse_cost, OPD_UUID_native_activation);
static const opd_op sparse_op = {
	.struct_bytes = sizeof sparse_op,
	.schema = "gelu_and_mul_sparse(Tensor x, float std_multiplier, str approximate=\"none\") -> Tensor",
	.doc = "gelu of what exceeds mean + std_multiplier·std of the first half's row, times the second half",
	.activations = "x",
	.flags = OPD_OP_ROWS,
	.shape = sparse_shape,
	.generate = sparse_generate,
	.dims = "rows,hidden",
	.default_dims = activation_dims,
	.dim_count = 2,
	.native = &sparse_native,
	.user = &sparse_activation,
};

const opd_op *const ops_activation[] = {
	&silu_and_mul_op, &mul_and_silu_op, &gelu_and_mul_op, &sparse_op, &silu_op, &gelu_op, &relu_op, &relu2_op, &sigmoid_op, NULL,
};
