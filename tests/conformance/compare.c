#include "tests/conformance/compare.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "providers/ops/tolerance.h"

/* ---- Σ over magnitudes ----------------------------------------------------------------------------------------------------- */

static const struct operand *case_operand(const struct conf_case *conf_case, const char *name)
{
	int index = schema_find(conf_case->schema, name);
	return index < 0 || conf_case->args[index].kind != OPD_ARG_TENSOR ? NULL : &conf_case->operands[index];
}

/* Products an element, or the most keys that a query sees. */
static double terms_of(const opd_op *op, const struct conf_case *conf_case)
{
	const struct operand *lengths = case_operand(conf_case, "seq_lens");
	const struct operand *key = case_operand(conf_case, "key");
	double most = 0;
	if (op->sum == OPD_SUM_PRODUCTS)
		return (double)opd_tensor_last(&conf_case->operands[0].tensor);
	if (lengths == NULL)
		return key != NULL && key->tensor.rank > 1 ? (double)key->shape[1] : 0;
	for (uint64_t i = 0; i < lengths->tensor.elements; i++)
		most = fmax(most, operand_get(lengths, i));
	return most;
}

static bool is_float_operand(const struct conf_case *conf_case, uint32_t param)
{
	if (conf_case->args[param].kind != OPD_ARG_TENSOR)
		return false;
	opd_dtype dtype = conf_case->operands[param].tensor.dtype;
	return opd_dtype_is_float(dtype) || opd_dtype_is_f8(dtype) || dtype == OPD_i8;
}

/* The call in f64: of products every factor as a magnitude and no bias, of attention the values as magnitudes. */
static void magnitude_case(struct conf_case *made, const opd_op *op, const struct conf_case *from, const struct schema *schema)
{
	memset(made, 0, sizeof *made);
	made->schema = schema;
	for (uint32_t p = 0; p < schema->param_count; p++) {
		const char *name = schema->params[p].name;
		bool absolute = op->sum == OPD_SUM_PRODUCTS || strcmp(name, "value") == 0 || strcmp(name, "value_cache") == 0;
		made->args[p] = from->args[p];
		if (strcmp(name, "bias") == 0) {
			made->args[p] = (opd_arg){.kind = OPD_ARG_NONE};
		} else if (is_float_operand(from, p)) {
			operand_to_f64(&made->operands[p], &from->operands[p], absolute);
			made->args[p].tensor = &made->operands[p].tensor;
		}
	}
}

static opd_status magnitude_run(const struct host *host, const opd_op *op, const struct conf_case *conf_case, double *magnitudes,
                                uint64_t elements, opd_error *error)
{
	struct results sums;
	const struct host_impl native = {.impl = op->native, .provider = "native"};
	opd_status status = results_init(&sums, op, conf_case, error);
	if (status == OPD_OK) {
		opd_call call = case_call(conf_case, &sums);
		status = host_run(host, &native, &call, 1, error);
	}
	if (status == OPD_OK && sums.outputs[0].tensor.elements != elements)
		status = opd_fail(error, OPD_INTERNAL, "%s: in f64 it has another number of results", conf_case->schema->name);
	for (uint64_t i = 0; i < elements && status == OPD_OK; i++)
		magnitudes[i] = operand_get(&sums.outputs[0], i);
	results_fini(&sums);
	return status;
}

static double scale_at(const struct operand *scale, uint64_t index)
{
	return scale == NULL ? 1 : fabs(operand_get(scale, scale->tensor.elements == 1 ? 0 : index));
}

/* scaled_mm has no f64 form: its Σ is linear's, times the scales. */
static void magnitudes_scale(const struct conf_case *conf_case, const struct results *native, double *magnitudes)
{
	const struct operand *a = case_operand(conf_case, "scale_a");
	const struct operand *b = case_operand(conf_case, "scale_b");
	uint64_t columns = (uint64_t)opd_tensor_last(&native->outputs[0].tensor);
	for (uint64_t i = 0; i < native->outputs[0].tensor.elements; i++)
		magnitudes[i] *= scale_at(a, i / columns) * scale_at(b, i % columns);
}

static opd_status bounds_fill(struct bounds *bounds, const struct host *host, const opd_op *op, const struct conf_case *conf_case,
                              const struct results *native, opd_error *error)
{
	bool scaled = case_operand(conf_case, "scale_a") != NULL;
	const opd_op *plain = scaled ? host_find_op(host, "linear") : op;
	struct schema schema;
	struct conf_case magnitudes;
	if (plain == NULL || !schema_read(plain->schema, &schema))
		return opd_fail(error, OPD_INTERNAL, "%s: no op gives its sums", conf_case->schema->name);
	magnitude_case(&magnitudes, op, conf_case, &schema);
	opd_status status = magnitude_run(host, plain, &magnitudes, bounds->magnitudes, native->outputs[0].tensor.elements, error);
	if (status == OPD_OK && scaled)
		magnitudes_scale(conf_case, native, bounds->magnitudes);
	case_fini(&magnitudes);
	return status;
}

static opd_status bounds_fill_finite(struct bounds *bounds, const struct host *host, const opd_op *op, const struct conf_case *from,
                                     opd_error *error)
{
	struct conf_case finite;
	const struct host_impl native = {.impl = op->native, .provider = "native"};
	case_copy(&finite, from, CASE_CONTIGUOUS);
	case_make_finite(&finite);
	opd_status status = results_init(&bounds->finite, op, &finite, error);
	if (status == OPD_OK) {
		opd_call call = case_call(&finite, &bounds->finite);
		status = host_run(host, &native, &call, 1, error);
	}
	case_fini(&finite);
	return status;
}

opd_status bounds_init(struct bounds *bounds, const struct host *host, const opd_op *op, const struct conf_case *conf_case,
                       const struct results *native, opd_error *error)
{
	*bounds = (struct bounds){0};
	if (op->sum == OPD_SUM_NONE)
		return conf_case->generator.values == OPD_VALUES_EXTREME ? bounds_fill_finite(bounds, host, op, conf_case, error) : OPD_OK;
	bounds->skip = op->sum == OPD_SUM_ATTENTION && conf_case->generator.values == OPD_VALUES_EXTREME;
	bounds->factor = 2 * sqrt(terms_of(op, conf_case)) * (conf_case->operands[0].tensor.dtype == OPD_f64 ? 0x1p-53 : 0x1p-24);
	bounds->magnitudes = calloc(native->outputs[0].tensor.elements + 1, sizeof(double));
	if (bounds->magnitudes == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for bounds");
	opd_status status = bounds_fill(bounds, host, op, conf_case, native, error);
	if (status != OPD_OK)
		bounds_fini(bounds);
	return status;
}

void bounds_fini(struct bounds *bounds)
{
	free(bounds->magnitudes);
	results_fini(&bounds->finite);
	*bounds = (struct bounds){0};
}

/* ---- Comparison ------------------------------------------------------------------------------------------------------------ */

static double ratio_of(double got, double want, double bound)
{
	if (isnan(want) || isnan(got))
		return isnan(want) && isnan(got) ? 0 : (double)INFINITY;
	if (got == want)
		return 0;
	return isinf(want) || isinf(got) ? (double)INFINITY : fabs(got - want) / bound;
}

/* Of element `index` of result `result`; false: not compared. */
static bool bound_of(const struct bounds *bounds, const opd_tolerance *tolerance, uint32_t result, uint64_t index, double want,
                     double *bound_out)
{
	*bound_out = tolerance->atol + tolerance->rtol * fabs(want);
	if (bounds->magnitudes == NULL || result != 0)
		return true;
	*bound_out += bounds->factor * bounds->magnitudes[index];
	return bounds->magnitudes[index] <= (double)FLT_MAX;
}

/* NaN for an infinity that only f64 makes. The factor is below f32's range when times the largest value it stays below this. */
static bool is_lost_infinity(const struct bounds *bounds, uint32_t result, uint64_t index, double got, double want)
{
	if (!isnan(got) || !isinf(want) || result >= bounds->finite.count)
		return false;
	const struct operand *finite = &bounds->finite.outputs[result];
	return fabs(operand_get(finite, index)) <= dtype_largest(finite->tensor.dtype) * (double)FLT_MIN;
}

/* The first element from `index` on whose bits differ, or the number of elements. Results lie contiguous; most of them are equal to the bit, and looking at bytes costs a tenth of a conversion. */
static uint64_t next_difference(const opd_tensor *native, const opd_tensor *got, uint64_t index)
{
	enum { STRETCH = 16 };
	size_t bytes = opd_dtype_bytes(native->dtype);
	const unsigned char *want = opd_tensor_data(native);
	const unsigned char *have = opd_tensor_data(got);
	while (index + STRETCH <= native->elements && memcmp(want + index * bytes, have + index * bytes, STRETCH * bytes) == 0)
		index += STRETCH;
	while (index < native->elements && memcmp(want + index * bytes, have + index * bytes, bytes) == 0)
		index++;
	return index;
}

static double compare_result(const opd_op *op, const struct bounds *bounds, uint32_t result, const struct operand *native,
                             const struct operand *got, char *detail, size_t bytes)
{
	opd_tolerance tolerance = tolerance_of(op, native->tensor.dtype);
	double worst = 0;
	for (uint64_t i = next_difference(&native->tensor, &got->tensor, 0); i < native->tensor.elements;
	     i = next_difference(&native->tensor, &got->tensor, i + 1)) {
		double want = operand_get(native, i), have = operand_get(got, i), bound;
		if (!bound_of(bounds, &tolerance, result, i, want, &bound) || is_lost_infinity(bounds, result, i, have, want))
			continue;
		double ratio = ratio_of(have, want, bound);
		if (ratio > worst) {
			worst = ratio;
			if (ratio > 1)
				(void)snprintf(detail, bytes, "result %u element %llu of %llu: got %.9g, native %.9g, bound %.3g", result,
				               (unsigned long long)i, (unsigned long long)native->tensor.elements, have, want, bound);
		}
	}
	return worst;
}

double compare_results(const opd_op *op, const struct bounds *bounds, const struct results *native, const struct results *got,
                       char *detail, size_t bytes)
{
	double worst = 0;
	for (uint32_t r = 0; r < native->count && !bounds->skip; r++) {
		char text[256];
		double ratio = compare_result(op, bounds, r, &native->outputs[r], &got->outputs[r], text, sizeof text);
		if (ratio > worst && ratio > 1)
			(void)snprintf(detail, bytes, "%s", text);
		worst = fmax(worst, ratio);
	}
	return worst;
}

bool compare_bits(const struct results *part, const struct results *whole, const uint64_t *first)
{
	for (uint32_t r = 0; r < part->count; r++) {
		const opd_tensor *tensor = &part->outputs[r].tensor;
		if (tensor->dtype != whole->outputs[r].tensor.dtype)
			return false;
		size_t bytes = opd_dtype_bytes(tensor->dtype);
		uint64_t offset = first == NULL ? 0 : first[r];
		const unsigned char *from = (const unsigned char *)opd_tensor_data(&whole->outputs[r].tensor) + offset * bytes;
		if (memcmp(opd_tensor_data(tensor), from, tensor->elements * bytes) != 0)
			return false;
	}
	return true;
}
