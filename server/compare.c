#include "server/compare.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/element.h"
#include "proto/tensor.h"
#include "providers/estimate.h"
#include "providers/ops/tolerance.h"

static bool is_real(opd_dtype dtype)
{
	return opd_dtype_is_float(dtype) || opd_dtype_is_f8(dtype);
}

/* ---- What sums may differ by ---- */

static const opd_tensor *tensor_arg(const struct op *op, const opd_call *call, const char *name)
{
	const int at = schema_find(op->schema, name, strlen(name));
	return at < 0 || call->args[at].kind != OPD_ARG_TENSOR ? NULL : call->args[at].tensor;
}

/* Address of element `index` in row-major order. */
static const unsigned char *element_at(const opd_tensor *tensor, uint64_t index)
{
	uint64_t offset = 0;
	for (uint32_t d = tensor->rank; d-- > 0;) {
		offset += index % (uint64_t)tensor->shape[d] * (uint64_t)tensor->strides[d];
		index /= (uint64_t)tensor->shape[d];
	}
	return (const unsigned char *)opd_tensor_data(tensor) + offset * opd_dtype_bytes(tensor->dtype);
}

/* Products an element, or the most keys that a query sees. */
static double terms_of(const struct op *op, const opd_call *call)
{
	const opd_tensor *lengths = tensor_arg(op, call, "seq_lens");
	const opd_tensor *key = tensor_arg(op, call, "key");
	double most = 0;
	if (op->def->sum == OPD_SUM_PRODUCTS)
		return (double)opd_tensor_last(call->args[0].tensor);
	if (lengths == NULL)
		return key != NULL && key->rank > 1 ? (double)key->shape[1] : 0;
	for (uint64_t i = 0; i < lengths->elements; i++)
		most = fmax(most, (double)element_load_i64(lengths->dtype, element_at(lengths, i)));
	return most;
}

#define SPARE 8u /* elements behind a copy */

static uint64_t wide_bytes(const opd_tensor *tensor)
{
	return estimate_multiply(estimate_add(tensor->elements, SPARE), sizeof(double));
}

/* A row-major f64 copy, of magnitudes if `absolute`. NULL: out of memory. */
static const opd_tensor *widen(struct arena *arena, const opd_tensor *from, bool absolute, double **data_out)
{
	opd_tensor *tensor = arena_zalloc(arena, sizeof *tensor);
	int64_t *strides = arena_array(arena, OPD_RANK_MAX, sizeof strides[0]);
	double *data = malloc(wide_bytes(from));
	*data_out = data;
	if (tensor == NULL || strides == NULL || data == NULL)
		return NULL;
	for (uint64_t i = 0; i < from->elements; i++) {
		data[i] = element_load_f64(from->dtype, element_at(from, i));
		data[i] = absolute ? fabs(data[i]) : data[i];
	}
	tensor_row_major(from->rank, from->shape, strides);
	tensor_describe(tensor, OPD_f64, from->rank, from->shape, strides, 0);
	tensor->struct_bytes = sizeof *tensor;
	tensor->alignment = sizeof(double);
	tensor->data = data;
	return tensor;
}

/* Every factor of products as a magnitude and no bias; of attention the values. */
static bool widen_args(const struct op *op, const opd_call *call, struct arena *arena, opd_arg *args, double **widened)
{
	for (uint32_t i = 0; i < call->arg_count; i++) {
		const char *name = op->schema->params[i].name;
		const bool absolute = op->def->sum == OPD_SUM_PRODUCTS || strcmp(name, "value") == 0 || strcmp(name, "value_cache") == 0;
		args[i] = call->args[i];
		if (strcmp(name, "bias") == 0)
			args[i] = (opd_arg){.kind = OPD_ARG_NONE};
		else if (args[i].kind == OPD_ARG_TENSOR && is_real(args[i].tensor->dtype) &&
		         (args[i].tensor = widen(arena, args[i].tensor, absolute, &widened[i])) == NULL)
			return false;
	}
	return true;
}

static opd_status sum_magnitudes(const struct op *op, const opd_call *call, const opd_exec *exec, struct arena *arena, double **widened, double *magnitudes,
                                 opd_error *error)
{
	const opd_tensor *result = call->outputs[0];
	opd_tensor *output = arena_zalloc(arena, sizeof *output);
	opd_arg *args = arena_array(arena, call->arg_count, sizeof args[0]);
	if (output == NULL || args == NULL || !widen_args(op, call, arena, args, widened))
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "comparison: out of memory");
	*output = *result;
	output->dtype = OPD_f64;
	output->data = magnitudes;
	output->byte_offset = 0;
	const opd_tensor *outputs[] = {output};
	const opd_call wide = {.struct_bytes = sizeof wide, .arg_count = call->arg_count, .output_count = 1, .args = args, .outputs = outputs};
	const struct impl *native = op->impls[0];
	opd_exec own = *exec;
	own.plan = NULL;
	own.scratch = NULL;
	return native->def->run(native->def, native->state, &wide, &own, error);
}

/* The op's results are sums whose terms' magnitudes matter. */
static bool is_sum(const struct op *op, const opd_call *call)
{
	return op->def->sum != OPD_SUM_NONE && call->output_count != 0 && is_real(call->outputs[0]->dtype);
}

/* … but nothing says how large they are. */
static bool is_unknown(const struct op *op, const opd_call *call)
{
	return tensor_arg(op, call, "scale_a") != NULL || call->output_count != 1;
}

uint64_t compare_bounds_bytes(const struct op *op, const opd_call *call)
{
	if (!is_sum(op, call) || is_unknown(op, call))
		return 0;
	uint64_t bytes = wide_bytes(call->outputs[0]);
	for (uint32_t i = 0; i < call->arg_count; i++)
		if (call->args[i].kind == OPD_ARG_TENSOR && is_real(call->args[i].tensor->dtype))
			bytes = estimate_add(bytes, wide_bytes(call->args[i].tensor));
	return bytes;
}

opd_status compare_bounds_make(const struct op *op, const opd_call *call, const opd_exec *exec, struct compare_bounds *bounds_out, opd_error *error)
{
	struct arena arena;
	*bounds_out = (struct compare_bounds){0};
	if (!is_sum(op, call))
		return OPD_OK;
	bounds_out->unknown = is_unknown(op, call);
	if (bounds_out->unknown)
		return OPD_OK;
	bounds_out->factor = 2 * sqrt(terms_of(op, call)) * (call->args[0].tensor->dtype == OPD_f64 ? 0x1p-53 : 0x1p-24);
	bounds_out->magnitudes = calloc(1, wide_bytes(call->outputs[0]));
	double **widened = calloc(call->arg_count + 1, sizeof widened[0]);
	arena_init(&arena, 1u << 20);
	opd_status status = bounds_out->magnitudes == NULL || widened == NULL
	                        ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "comparison: out of memory")
	                        : sum_magnitudes(op, call, exec, &arena, widened, bounds_out->magnitudes, error);
	for (uint32_t i = 0; widened != NULL && i < call->arg_count; i++)
		free(widened[i]);
	free(widened);
	arena_fini(&arena);
	if (status != OPD_OK)
		compare_bounds_free(bounds_out);
	return status;
}

void compare_bounds_free(struct compare_bounds *bounds)
{
	free(bounds->magnitudes);
	bounds->magnitudes = NULL;
}

/* ---- Elements ---- */

static bool is_near(double got, double wanted, double bound)
{
	if (isnan(got) || isnan(wanted))
		return isnan(got) && isnan(wanted);
	return got == wanted || (!isinf(got) && !isinf(wanted) && fabs(got - wanted) <= bound);
}

static bool real_equal(const opd_op *op, const struct compare_bounds *bounds, uint32_t result, const opd_tensor *got, const opd_tensor *wanted,
                       struct difference *difference)
{
	const opd_tolerance tolerance = tolerance_of(op, got->dtype);
	const uint32_t bytes = (uint32_t)opd_dtype_bytes(got->dtype);
	const double *magnitudes = result == 0 ? bounds->magnitudes : NULL;
	for (uint64_t i = 0; i < got->elements; i++) {
		const double a = element_load_f64(got->dtype, (const unsigned char *)opd_tensor_data(got) + i * bytes);
		const double b = element_load_f64(wanted->dtype, (const unsigned char *)opd_tensor_data(wanted) + i * bytes);
		if (magnitudes != NULL && !(magnitudes[i] <= (double)FLT_MAX))
			continue; /* in another order it may overflow on its way */
		if (is_near(a, b, tolerance.atol + tolerance.rtol * fabs(b) + (magnitudes == NULL ? 0 : bounds->factor * magnitudes[i])))
			continue;
		*difference = (struct difference){result, i, a, b};
		return false;
	}
	return true;
}

static bool bits_equal(uint32_t result, const opd_tensor *got, const opd_tensor *wanted, struct difference *difference)
{
	const uint64_t bytes = opd_dtype_bytes(got->dtype);
	for (uint64_t i = 0; i < got->elements; i++) {
		const unsigned char *a = (const unsigned char *)opd_tensor_data(got) + i * bytes, *b = (const unsigned char *)opd_tensor_data(wanted) + i * bytes;
		if (memcmp(a, b, bytes) == 0)
			continue;
		*difference = (struct difference){result, i, (double)element_load_i64(got->dtype, a), (double)element_load_i64(got->dtype, b)};
		return false;
	}
	return true;
}

bool compare_outputs(const opd_op *op, const struct compare_bounds *bounds, const opd_tensor *const *got, const opd_tensor *const *wanted, uint32_t count,
                     struct difference *difference_out)
{
	for (uint32_t i = 0; i < count; i++)
		if (is_real(got[i]->dtype) ? !real_equal(op, bounds, i, got[i], wanted[i], difference_out) : !bits_equal(i, got[i], wanted[i], difference_out))
			return false;
	return true;
}
