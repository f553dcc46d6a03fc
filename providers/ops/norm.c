/* rms_norm, fused_add_rms_norm, layer_norm.
 *
 * Sums are taken in double. The mean square, the variance and the reciprocal root are then rounded to f32 (f64 for f64 operands),
 * so that what overflows f32 is infinite here too; layer_norm's mean stays in double: a difference from it loses nothing. */
#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"
#include "uuid/native_norm.h"

#include <math.h>

/* 1/√(v + epsilon), v the mean of `count` squares whose sum is given. */
static double reciprocal_root(opd_dtype dtype, double sum, int64_t count, double epsilon)
{
	double v = kernel_round_work(dtype, sum / (double)count);
	return kernel_round_work(dtype, 1 / sqrt(kernel_round_work(dtype, v + kernel_round_work(dtype, epsilon))));
}

static opd_status expect_weight(const opd_op *op, const char *name, const opd_tensor *weight, const opd_tensor *x,
                                opd_error *error)
{
	const int64_t hidden = opd_tensor_last(x);
	opd_status status = kernel_expect_dtype_of_or_f32(op, name, weight, "x", x, error);
	return status != OPD_OK ? status : kernel_expect_shape(op, name, weight, 1, &hidden, "last dimension of x", error);
}

static opd_status expect_rows(const opd_op *op, const opd_tensor *x, opd_error *error)
{
	opd_status status = kernel_expect_float(op, "x", x, error);
	return status != OPD_OK ? status : kernel_expect_rank_min(op, "x", x, 1, error);
}

/* ---- rms_norm, fused_add_rms_norm --------------------------------------------------------------------------------------- */

/* Where an op of the two has its arguments. */
struct rms_parameters {
	uint32_t residual; /* 0: none */
	uint32_t weight;
	uint32_t epsilon;
	uint32_t variance_size;
};

static const struct rms_parameters rms_parameters = {0, 1, 2, 3};
static const struct rms_parameters fused_parameters = {1, 2, 3, 4};

/* The arguments of a call. */
struct rms {
	const opd_tensor *x;
	const opd_tensor *residual; /* NULL: none */
	const opd_tensor *weight;   /* NULL: none */
	double epsilon;
	int64_t variance_size;
};

static struct rms rms_arguments(const opd_op *op, const opd_call *call)
{
	const struct rms_parameters *parameters = op->user;
	const opd_tensor *x = kernel_tensor(call, 0);
	return (struct rms){
		.x = x,
		.residual = parameters->residual == 0 ? NULL : kernel_tensor(call, parameters->residual),
		.weight = kernel_tensor(call, parameters->weight),
		.epsilon = kernel_float(call, parameters->epsilon),
		.variance_size = kernel_int(call, parameters->variance_size, opd_tensor_last(x)),
	};
}

static opd_status rms_expect_variance_size(const opd_op *op, const opd_call *call, const struct rms *rms, opd_error *error)
{
	const struct rms_parameters *parameters = op->user;
	const int64_t hidden = opd_tensor_last(rms->x);
	bool given = call->args[parameters->variance_size].kind != OPD_ARG_NONE;
	if (!given || (rms->variance_size >= 1 && rms->variance_size <= hidden))
		return OPD_OK;
	return kernel_invalid(op, error, "variance_size is %lld, expected 1 to %lld (last dimension of x)",
	                      (long long)rms->variance_size, (long long)hidden);
}

static opd_status rms_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	struct rms rms = rms_arguments(op, call);
	opd_status status = expect_rows(op, rms.x, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "x_residual", rms.residual, "x", rms.x, error);
	if (status == OPD_OK)
		status = kernel_expect_shape_of(op, "x_residual", rms.residual, "x", rms.x, error);
	if (status == OPD_OK)
		status = expect_weight(op, "weight", rms.weight, rms.x, error);
	if (status == OPD_OK)
		status = kernel_expect_finite(op, "epsilon", rms.epsilon, error);
	if (status == OPD_OK)
		status = rms_expect_variance_size(op, call, &rms, error);
	for (uint32_t i = 0; i < call->output_count && status == OPD_OK; i++)
		status = kernel_output_like(op, outputs[i], rms.x->dtype, rms.x, error);
	return status;
}

/* What is normalised: x, or x + x_residual in f32, unrounded. */
static void rms_load(const struct kernel_line *x, const struct kernel_line *residual, int64_t begin, int64_t count, double *to)
{
	double other[KERNEL_CHUNK];
	kernel_load(x, begin, count, to);
	if (residual == NULL)
		return;
	kernel_load(residual, begin, count, other);
	for (int64_t i = 0; i < count; i++)
		to[i] = kernel_round_work(x->dtype, to[i] + other[i]);
}

static double rms_scale(const struct rms *rms, const struct kernel_line *x, const struct kernel_line *residual)
{
	double s[KERNEL_CHUNK];
	double sum = 0;
	for (int64_t begin = 0; begin < rms->variance_size; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, rms->variance_size);
		double part = 0;
		rms_load(x, residual, begin, count, s);
		for (int64_t i = 0; i < count; i++)
			part += s[i] * s[i];
		sum += part;
	}
	return reciprocal_root(x->dtype, sum, rms->variance_size, rms->epsilon);
}

/* y, rounded to the weight's dtype, times the weight in that dtype (f64 with f64 x). */
static void rms_weigh(const struct rms *rms, int64_t begin, int64_t count, double *y)
{
	double w[KERNEL_CHUNK];
	struct kernel_line weight = kernel_row(rms->weight, 0);
	opd_dtype dtype = rms->x->dtype == OPD_f64 ? OPD_f64 : weight.dtype;
	kernel_load(&weight, begin, count, w);
	for (int64_t i = 0; i < count; i++)
		y[i] = kernel_round(dtype, kernel_round(dtype, y[i]) * w[i]);
}

static void rms_row(const struct kernel_job *job, uint64_t row, void *scratch)
{
	const struct rms *rms = job->context;
	struct kernel_line x = kernel_row(rms->x, row);
	struct kernel_line out = kernel_row(job->call->outputs[0], row);
	struct kernel_line residual, sum;
	double y[KERNEL_CHUNK];
	bool fused = rms->residual != NULL;
	(void)scratch;

	if (fused) {
		residual = kernel_row(rms->residual, row);
		sum = kernel_row(job->call->outputs[1], row);
	}
	double scale = rms_scale(rms, &x, fused ? &residual : NULL);
	for (int64_t begin = 0; begin < x.extent; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, x.extent);
		rms_load(&x, fused ? &residual : NULL, begin, count, y);
		if (fused)
			kernel_store(&sum, begin, count, y);
		for (int64_t i = 0; i < count; i++)
			y[i] = kernel_round_work(x.dtype, y[i] * scale);
		if (rms->weight != NULL)
			rms_weigh(rms, begin, count, y);
		kernel_store(&out, begin, count, y);
	}
}

static opd_status rms_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct rms rms = rms_arguments(impl->user, call);
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &rms};
	uint64_t rows = kernel_lines(rms.x, rms.x->rank - 1);
	return kernel_for(&job, rows, (uint64_t)opd_tensor_last(rms.x) * 12, rms_row, error);
}

static uint64_t norm_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_cost_pass(call, 7);
}

/* variants: the weight's dtype, its absence, variance_size, a third dimension */
enum {
	RMS_WEIGHT,
	RMS_NO_WEIGHT,
	RMS_F32_WEIGHT,
	RMS_VARIANCE_SIZE,
	RMS_F32_WEIGHT_VARIANCE_SIZE,
	RMS_NO_WEIGHT_VARIANCE_SIZE,
	RMS_RANK_3,
	RMS_VARIANTS,
};

static opd_status rms_generate_operands(const opd_op *op, opd_generator *generator, opd_error *error)
{
	const struct rms_parameters *parameters = op->user;
	const int64_t shape[3] = {generator->dims[0], 2, generator->dims[1]};
	const int64_t flat[2] = {generator->dims[0], generator->dims[1]};
	bool deep = generator->variant == RMS_RANK_3;
	uint32_t rank = deep ? 3 : 2;
	opd_status status = kernel_generate(op, generator, "x", generator->dtype, rank, deep ? shape : flat, 1, error);
	if (status == OPD_OK && parameters->residual != 0)
		status = kernel_generate(op, generator, "x_residual", generator->dtype, rank, deep ? shape : flat, 1, error);
	return status;
}

static opd_status rms_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	opd_status status = kernel_generator_begin(op, generator, RMS_VARIANTS, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status == OPD_OK)
		status = rms_generate_operands(op, generator, error);
	if (status != OPD_OK)
		return status;
	const int64_t hidden = generator->dims[1];
	const uint32_t variant = generator->variant;
	generator->set_float(generator, "epsilon", 1e-6);
	if ((variant == RMS_VARIANCE_SIZE || variant == RMS_F32_WEIGHT_VARIANCE_SIZE || variant == RMS_NO_WEIGHT_VARIANCE_SIZE) &&
	    hidden > 0)
		generator->set_int(generator, "variance_size", (hidden + 1) / 2);
	if (variant == RMS_NO_WEIGHT || variant == RMS_NO_WEIGHT_VARIANCE_SIZE)
		return OPD_OK;
	bool wide = (variant == RMS_F32_WEIGHT || variant == RMS_F32_WEIGHT_VARIANCE_SIZE);
	return kernel_generate(op, generator, "weight", wide ? OPD_f32 : generator->dtype, 1, &hidden, 1, error);
}

static const int64_t norm_dims[] = {4, 4096};
static const opd_tolerance rms_tolerances[] = {{.dtype = OPD_f16, .atol = 1e-2, .rtol = 2e-3}};

static const opd_op rms_norm;
static const opd_impl rms_norm_native = KERNEL_NATIVE("rms_norm", &rms_norm, rms_run, norm_cost, OPD_UUID_native_norm);
static const opd_op rms_norm = {
	.struct_bytes = sizeof rms_norm,
	.schema = "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
	.doc = "x over the root of its mean square along the last dimension, times weight",
	.activations = "x",
	.flags = OPD_OP_ROWS,
	.shape = rms_shape,
	.generate = rms_generate,
	.dims = "rows,hidden",
	.default_dims = norm_dims,
	.dim_count = 2,
	.tolerance_count = 1,
	.tolerances = rms_tolerances,
	.native = &rms_norm_native,
	.user = &rms_parameters,
};

static const opd_in_place fused_in_place[] = {{.param = 0, .result = 0}, {.param = 1, .result = 1}};

static const opd_op fused_add_rms_norm;
static const opd_impl fused_native =
	KERNEL_NATIVE("fused_add_rms_norm", &fused_add_rms_norm, rms_run, norm_cost, OPD_UUID_native_norm);
static const opd_op fused_add_rms_norm = {
	.struct_bytes = sizeof fused_add_rms_norm,
	.schema = "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None)"
              " -> (Tensor, Tensor)",
	.doc = "rms_norm of x + x_residual, and that sum",
	.activations = "x,x_residual",
	.flags = OPD_OP_ROWS,
	.shape = rms_shape,
	.generate = rms_generate,
	.dims = "rows,hidden",
	.default_dims = norm_dims,
	.dim_count = 2,
	.tolerance_count = 1,
	.tolerances = rms_tolerances,
	.in_place_count = 2,
	.in_place = fused_in_place,
	.native = &fused_native,
	.user = &fused_parameters,
};

/* ---- layer_norm -------------------------------------------------------------------------------------------------------- */

struct layer_statistics {
	double mean;
	double scale; /* 1/√(variance + epsilon) */
};

static opd_status layer_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	opd_status status = expect_rows(op, x, error);
	if (status == OPD_OK)
		status = expect_weight(op, "weight", kernel_tensor(call, 1), x, error);
	if (status == OPD_OK)
		status = expect_weight(op, "bias", kernel_tensor(call, 2), x, error);
	if (status == OPD_OK)
		status = kernel_expect_finite(op, "epsilon", kernel_float(call, 3), error);
	return status != OPD_OK ? status : kernel_output_like(op, outputs[0], x->dtype, x, error);
}

/* Σ (x − from)^power over a row, each difference rounded to f32. */
static double layer_sum(const struct kernel_line *x, double from, bool squares)
{
	double values[KERNEL_CHUNK];
	double sum = 0;
	for (int64_t begin = 0; begin < x->extent; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, x->extent);
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

static struct layer_statistics layer_statistics(const struct kernel_line *x, double epsilon)
{
	double mean = layer_sum(x, 0, false) / (double)x->extent;
	double scale = reciprocal_root(x->dtype, layer_sum(x, mean, true), x->extent, epsilon);
	return (struct layer_statistics){.mean = mean, .scale = scale};
}

static void layer_row(const struct kernel_job *job, uint64_t row, void *scratch)
{
	const opd_tensor *weight = kernel_tensor(job->call, 1);
	const opd_tensor *bias = kernel_tensor(job->call, 2);
	struct kernel_line x = kernel_row(kernel_tensor(job->call, 0), row);
	struct kernel_line out = kernel_row(job->call->outputs[0], row);
	struct layer_statistics statistics = layer_statistics(&x, kernel_float(job->call, 3));
	double y[KERNEL_CHUNK];
	double factor[KERNEL_CHUNK];
	(void)scratch;

	for (int64_t begin = 0; begin < x.extent; begin += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(begin, x.extent);
		kernel_load(&x, begin, count, y);
		for (int64_t i = 0; i < count; i++)
			y[i] = kernel_round_work(x.dtype, y[i] - statistics.mean) * statistics.scale;
		if (weight != NULL) {
			struct kernel_line line = kernel_row(weight, 0);
			kernel_load(&line, begin, count, factor);
			for (int64_t i = 0; i < count; i++)
				y[i] *= factor[i];
		}
		if (bias != NULL) {
			struct kernel_line line = kernel_row(bias, 0);
			kernel_load(&line, begin, count, factor);
			for (int64_t i = 0; i < count; i++)
				y[i] += factor[i];
		}
		kernel_store(&out, begin, count, y);
	}
}

static opd_status layer_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	const opd_tensor *x = kernel_tensor(call, 0);
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec};
	return kernel_for(&job, kernel_lines(x, x->rank - 1), (uint64_t)opd_tensor_last(x) * 15, layer_row, error);
}

static opd_status layer_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	enum { BOTH, NEITHER, NO_BIAS, NO_WEIGHT, F32_BOTH, VARIANTS };
	opd_status status = kernel_generator_begin(op, generator, VARIANTS, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "x", generator->dtype, 2, generator->dims, 1, error);
	if (status != OPD_OK)
		return status;
	const uint32_t variant = generator->variant;
	const opd_dtype dtype = variant == F32_BOTH ? OPD_f32 : generator->dtype;
	generator->set_float(generator, "epsilon", 1e-5);
	if (variant != NEITHER && variant != NO_WEIGHT)
		status = kernel_generate(op, generator, "weight", dtype, 1, &generator->dims[1], 1, error);
	if (status == OPD_OK && variant != NEITHER && variant != NO_BIAS)
		status = kernel_generate(op, generator, "bias", dtype, 1, &generator->dims[1], 1, error);
	return status;
}

static const opd_op layer_norm;
static const opd_impl layer_native = KERNEL_NATIVE("layer_norm", &layer_norm, layer_run, norm_cost, OPD_UUID_native_norm);
static const opd_op layer_norm = {
	.struct_bytes = sizeof layer_norm,
	.schema = "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor",
	.doc = "x less its mean over its standard deviation along the last dimension, times weight, plus bias",
	.activations = "x",
	.flags = OPD_OP_ROWS,
	.shape = layer_shape,
	.generate = layer_generate,
	.dims = "rows,hidden",
	.default_dims = norm_dims,
	.dim_count = 2,
	.native = &layer_native,
};

const opd_op *const ops_norm[] = {&rms_norm, &fused_add_rms_norm, &layer_norm, NULL};
