#include "tests/conformance/cases.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "tests/conformance/host.h"


/* ---- Operands ---------------------------------------------------------------------------------------------------------- */

static bool strides_contiguous(const opd_tensor *tensor)
{
	int64_t step = 1;
	for (uint32_t i = tensor->rank; i-- > 0;) {
		if (tensor->shape[i] != 1 && tensor->strides[i] != step)
			return false;
		step *= tensor->shape[i];
	}
	return true;
}

static uint32_t alignment_of(const void *address)
{
	uintptr_t bits = (uintptr_t)address | OPD_TENSOR_ALIGNMENT;
	return (uint32_t)(bits & (~bits + 1));
}

static void *memory_of(uint64_t bytes)
{
	void *memory = host_memory(bytes);
	if (memory == NULL)
		abort();
	return memory;
}

/* Describes and allocates: shape and strides are in `operand`; element 0 comes `lead` elements after the first guard. */
static void operand_finish(struct operand *operand, opd_dtype dtype, uint32_t rank, uint64_t lead)
{
	uint64_t elements = 1, span = 1;
	for (uint32_t i = 0; i < rank; i++) {
		elements *= (uint64_t)operand->shape[i];
		if (operand->shape[i] > 0)
			span += (uint64_t)(operand->shape[i] - 1) * (uint64_t)operand->strides[i];
	}
	uint64_t bytes = (lead + (elements == 0 ? 0 : span)) * opd_dtype_bytes(dtype);
	operand->bytes = (bytes + 63) / 64 * 64 + 2 * CASE_GUARD;
	operand->memory = memory_of(operand->bytes);
	memset(operand->memory, CASE_GUARD_BYTE, operand->bytes);
	operand->tensor = (opd_tensor){
		.struct_bytes = sizeof(opd_tensor),
		.dtype = dtype,
		.rank = rank,
		.shape = operand->shape,
		.strides = operand->strides,
		.data = operand->memory + CASE_GUARD,
		.byte_offset = lead * opd_dtype_bytes(dtype),
		.elements = elements,
	};
	operand->tensor.alignment = alignment_of(opd_tensor_data(&operand->tensor));
	operand->tensor.flags = elements == 0 ? (uint32_t)OPD_TENSOR_EMPTY | (uint32_t)OPD_TENSOR_CONTIGUOUS
	                                      : strides_contiguous(&operand->tensor) ? (uint32_t)OPD_TENSOR_CONTIGUOUS : 0;
}

static void operand_init(struct operand *operand, opd_dtype dtype, uint32_t rank, const int64_t *shape)
{
	int64_t step = 1;
	memset(operand, 0, sizeof *operand);
	for (uint32_t i = rank; i-- > 0;) {
		operand->shape[i] = shape[i];
		operand->strides[i] = step;
		step *= shape[i];
	}
	operand_finish(operand, dtype, rank, 0);
}

void operand_fini(struct operand *operand)
{
	free(operand->memory);
	memset(operand, 0, sizeof *operand);
}

void *operand_at(const struct operand *operand, uint64_t index)
{
	const opd_tensor *tensor = &operand->tensor;
	uint64_t offset = 0;
	if (opd_tensor_contiguous(tensor))
		return (unsigned char *)opd_tensor_data(tensor) + index * opd_dtype_bytes(tensor->dtype);
	for (uint32_t i = tensor->rank; i-- > 0;) {
		uint64_t extent = (uint64_t)tensor->shape[i];
		offset += index % extent * (uint64_t)tensor->strides[i];
		index /= extent;
	}
	return (unsigned char *)opd_tensor_data(tensor) + offset * opd_dtype_bytes(tensor->dtype);
}

double operand_get(const struct operand *operand, uint64_t index)
{
	return element_load_f64(operand->tensor.dtype, operand_at(operand, index));
}

void operand_to_f64(struct operand *made, const struct operand *from, bool absolute)
{
	operand_init(made, OPD_f64, from->tensor.rank, from->shape);
	for (uint64_t i = 0; i < from->tensor.elements; i++) {
		double value = operand_get(from, i);
		value = !isfinite(value) ? 0 : absolute ? fabs(value) : value;
		element_store_f64(OPD_f64, operand_at(made, i), value);
	}
}

/* The first dimension, not the last, that is longer than 1; -1: none, or no float tensor. */
static int broadcast_dim(const struct operand *operand)
{
	if (operand->memory == NULL || !opd_dtype_is_float(operand->tensor.dtype) || operand->tensor.elements == 0)
		return -1;
	for (uint32_t i = 0; i + 1 < operand->tensor.rank; i++)
		if (operand->shape[i] > 1)
			return (int)i;
	return -1;
}

/* `count` elements that lie `to_step` and `from_step` bytes apart. */
static void copy_elements(unsigned char *to, uint64_t to_step, const unsigned char *from, uint64_t from_step, uint64_t count, size_t bytes)
{
	if (to_step == bytes && from_step == bytes)
		memcpy(to, from, count * bytes);
	for (uint64_t i = 0; i < count && (to_step != bytes || from_step != bytes); i++)
		memcpy(to + i * to_step, from + i * from_step, bytes);
}

/* Elements of two operands of one shape, row by row: an index's division by each extent is what the whole suite would wait for. */
static void operand_copy_elements(struct operand *made, const struct operand *from)
{
	uint64_t last = (uint64_t)opd_tensor_last(&from->tensor);
	size_t bytes = opd_dtype_bytes(from->tensor.dtype);
	uint32_t rank = from->tensor.rank;
	uint64_t to_step = rank == 0 ? bytes : (uint64_t)made->strides[rank - 1] * bytes;
	uint64_t from_step = rank == 0 ? bytes : (uint64_t)from->strides[rank - 1] * bytes;
	for (uint64_t i = 0; i < from->tensor.elements; i += last)
		copy_elements(operand_at(made, i), to_step, operand_at(from, i), from_step, last, bytes);
}

static void operand_copy(struct operand *made, const struct operand *from, enum case_layout layout)
{
	uint32_t rank = from->tensor.rank;
	int zero = layout == CASE_BROADCAST ? broadcast_dim(from) : -1;
	int64_t step = layout == CASE_STRIDED ? 2 : 1;
	memset(made, 0, sizeof *made);
	for (uint32_t i = rank; i-- > 0;) {
		made->shape[i] = from->shape[i];
		made->strides[i] = (int)i == zero ? 0 : step;
		step *= (int)i == zero ? 1 : from->shape[i];
		if (i + 1 == rank && (layout == CASE_PADDED || layout == CASE_STRIDED))
			step += 3;
	}
	operand_finish(made, from->tensor.dtype, rank, layout == CASE_PADDED ? 1 : 0);
	operand_copy_elements(made, from);
}

/* ---- The generator's host ------------------------------------------------------------------------------------------------- */

static struct conf_case *case_of(opd_generator *generator)
{
	return (struct conf_case *)generator;
}

static uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static int case_param(opd_generator *generator, const char *name)
{
	int index = schema_find(case_of(generator)->schema, name);
	if (index < 0) {
		(void)fprintf(stderr, "%s: its generator names a parameter %s that it hasn't\n", case_of(generator)->schema->name, name);
		abort();
	}
	return index;
}

/* Past the largest caches there are: 1 GiB of f32. */
#define CASE_ELEMENTS_MAX 0x1p28

static void *on_tensor(opd_generator *generator, const char *name, opd_dtype dtype, uint32_t rank, const int64_t *shape)
{
	int index = case_param(generator, name);
	struct operand *operand = &case_of(generator)->operands[index];
	double elements = 1;
	for (uint32_t i = 0; i < rank; i++)
		elements *= shape[i] < 0 ? 1e18 : (double)shape[i];
	if (rank > OPD_RANK_MAX || elements > CASE_ELEMENTS_MAX)
		return NULL;
	operand_fini(operand);
	operand_init(operand, dtype, rank, shape);
	memset(operand->tensor.data, 0, operand->bytes - 2 * CASE_GUARD);
	case_of(generator)->args[index] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = &operand->tensor};
	return operand->tensor.data;
}

static void on_int(opd_generator *generator, const char *name, int64_t value)
{
	case_of(generator)->args[case_param(generator, name)] = (opd_arg){.kind = OPD_ARG_INT, .i = value};
}

static void on_float(opd_generator *generator, const char *name, double value)
{
	case_of(generator)->args[case_param(generator, name)] = (opd_arg){.kind = OPD_ARG_FLOAT, .f = value};
}

static void on_bool(opd_generator *generator, const char *name, bool value)
{
	case_of(generator)->args[case_param(generator, name)] = (opd_arg){.kind = OPD_ARG_BOOL, .b = value};
}

static void on_str(opd_generator *generator, const char *name, const char *value)
{
	int index = case_param(generator, name);
	char *text = case_of(generator)->texts[index];
	(void)snprintf(text, SCHEMA_NAME, "%s", value);
	case_of(generator)->args[index] = (opd_arg){.kind = OPD_ARG_STR, .count = (uint32_t)strlen(text), .str = text};
}

static int64_t on_pick(opd_generator *generator, int64_t low, int64_t high)
{
	uint64_t range = (uint64_t)high - (uint64_t)low + 1;
	uint64_t bits = random_next(&case_of(generator)->random);
	return (int64_t)((uint64_t)low + (range == 0 ? bits : bits % range));
}

/* Mean 0, standard deviation 1: the sum of twelve uniforms of 16 bits. */
static double random_normal(uint64_t *state)
{
	uint64_t sum = 0;
	for (int i = 0; i < 3; i++) {
		uint64_t bits = random_next(state);
		sum += (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
	}
	return (double)sum * 0x1p-16 - (6 - 6 * 0x1p-16);
}

double dtype_largest(opd_dtype dtype)
{
	switch (dtype) {
	case OPD_f16:
		return 65504;
	case OPD_bf16:
		return 0x1.fep127;
	case OPD_f32:
		return (double)FLT_MAX;
	case OPD_f64:
		return DBL_MAX;
	case OPD_f8_e4m3fn:
		return 448;
	case OPD_f8_e5m2:
		return 57344;
	default:
		return ldexp(1, (int)(8 * opd_dtype_bytes(dtype)));
	}
}

/* One of the values that break things. */
static double special_value(opd_dtype dtype, uint64_t which)
{
	const double tiny = dtype == OPD_f16 ? 0x1p-24 : dtype == OPD_f64 ? 0x1p-1074 : dtype == OPD_bf16 ? 0x1p-133 : 0x1p-149;
	const double values[] = {(double)NAN, (double)INFINITY, -(double)INFINITY, dtype_largest(dtype), -dtype_largest(dtype), tiny, -0.0, 0};
	return values[which % 8];
}

/* Extreme values come in stretches of one kind, so that a call has rows with NaN and rows without. */
static void on_fill(opd_generator *generator, void *memory, opd_dtype dtype, uint64_t elements, double scale)
{
	enum { STRETCH = 257 };
	uint64_t *state = &case_of(generator)->random;
	uint64_t kind = 0;
	for (uint64_t i = 0; i < elements; i++) {
		void *at = (unsigned char *)memory + i * opd_dtype_bytes(dtype);
		double value = random_normal(state) * scale;
		if (i % STRETCH == 0)
			kind = random_next(state);
		if (generator->values == OPD_VALUES_SMALL)
			value = (double)(random_next(state) % 7) - 3;
		else if (generator->values == OPD_VALUES_EXTREME && kind % 2 == 0 && random_next(state) % 16 == 0)
			value = special_value(dtype, kind >> 1);
		if (dtype == OPD_u8)
			value = fabs(value);
		element_store_f64(dtype, at, value);
	}
}

opd_status case_generate(struct conf_case *made, const opd_op *op, const struct schema *schema, opd_dtype dtype, opd_values values,
                         uint32_t variant, const int64_t *dims, uint64_t seed, opd_error *error)
{
	memset(made, 0, sizeof *made);
	made->schema = schema;
	made->random = seed;
	made->generator = (opd_generator){
		.struct_bytes = sizeof(opd_generator),
		.dtype = dtype,
		.values = values,
		.variant = variant,
		.seed = seed,
		.dim_count = op->dim_count,
		.dims = dims,
		.tensor = on_tensor,
		.set_int = on_int,
		.set_float = on_float,
		.set_bool = on_bool,
		.set_str = on_str,
		.fill = on_fill,
		.pick = on_pick,
	};
	for (uint32_t i = 0; i < schema->param_count; i++)
		made->args[i] = schema->params[i].fallback;
	opd_status status = op->generate(op, &made->generator, error);
	if (status != OPD_OK)
		case_fini(made);
	return status;
}

/* Arguments that aren't tensors. */
static void case_copy_values(struct conf_case *made, const struct conf_case *from)
{
	memset(made, 0, sizeof *made);
	made->schema = from->schema;
	memcpy(made->args, from->args, sizeof made->args);
	memcpy(made->texts, from->texts, sizeof made->texts);
	for (uint32_t i = 0; i < SCHEMA_PARAMS; i++)
		if (from->args[i].kind == OPD_ARG_STR && from->args[i].str == from->texts[i])
			made->args[i].str = made->texts[i];
}

void case_copy(struct conf_case *made, const struct conf_case *from, enum case_layout layout)
{
	case_copy_values(made, from);
	for (uint32_t i = 0; i < from->schema->param_count; i++) {
		if (from->args[i].kind != OPD_ARG_TENSOR)
			continue;
		operand_copy(&made->operands[i], &from->operands[i], layout);
		made->args[i].tensor = &made->operands[i].tensor;
	}
}

bool case_make_uniform(struct conf_case *conf_case)
{
	bool any = false;
	for (uint32_t p = 0; p < conf_case->schema->param_count; p++) {
		struct operand *operand = &conf_case->operands[p];
		int dim = broadcast_dim(operand);
		if (dim < 0)
			continue;
		any = true;
		/* Dimensions before `dim` have extent 1: the first slice is the first elements. */
		uint64_t slice = operand->tensor.elements / (uint64_t)operand->shape[dim];
		for (uint64_t i = slice; i < operand->tensor.elements; i++)
			memcpy(operand_at(operand, i), operand_at(operand, i % slice), opd_dtype_bytes(operand->tensor.dtype));
	}
	return any;
}

void case_make_finite(struct conf_case *conf_case)
{
	for (uint32_t p = 0; p < conf_case->schema->param_count; p++) {
		struct operand *operand = &conf_case->operands[p];
		for (uint64_t i = 0; operand->memory != NULL && i < operand->tensor.elements; i++) {
			double value = operand_get(operand, i);
			if (isinf(value))
				element_store_f64(operand->tensor.dtype, operand_at(operand, i), copysign(dtype_largest(operand->tensor.dtype), value));
		}
	}
}

void case_flush_bf16(struct conf_case *conf_case)
{
	for (uint32_t p = 0; p < conf_case->schema->param_count; p++) {
		struct operand *operand = &conf_case->operands[p];
		for (uint64_t i = 0; operand->memory != NULL && operand->tensor.dtype == OPD_bf16 && i < operand->tensor.elements; i++) {
			double value = operand_get(operand, i);
			if (fabs(value) < 0x1p-126)
				element_store_f64(OPD_bf16, operand_at(operand, i), copysign(0, value));
		}
	}
}

static bool is_listed(const char *list, const char *name)
{
	size_t length = strlen(name);
	for (const char *at = list; at != NULL && *at != '\0';) {
		size_t item = strcspn(at, ",");
		if (item == length && strncmp(at, name, length) == 0)
			return true;
		at += item;
		at += *at == ',';
	}
	return false;
}

bool case_cut(struct conf_case *made, const struct conf_case *from, const char *activations, int64_t extent, int64_t begin, int64_t end)
{
	case_copy_values(made, from);
	for (uint32_t p = 0; p < from->schema->param_count; p++) {
		const struct operand *operand = &from->operands[p];
		if (from->args[p].kind != OPD_ARG_TENSOR)
			continue;
		bool cut = is_listed(activations, from->schema->params[p].name);
		if (cut && (operand->tensor.rank < 2 || operand->shape[0] != extent)) {
			case_fini(made);
			return false;
		}
		int64_t shape[OPD_RANK_MAX];
		memcpy(shape, operand->shape, sizeof shape);
		if (cut)
			shape[0] = end - begin;
		operand_init(&made->operands[p], operand->tensor.dtype, operand->tensor.rank, shape);
		uint64_t first = cut ? operand->tensor.elements / (uint64_t)extent * (uint64_t)begin : 0;
		if (made->operands[p].tensor.elements > 0) /* generated operands are contiguous */
			memcpy(operand_at(&made->operands[p], 0), operand_at(operand, first),
			       made->operands[p].tensor.elements * opd_dtype_bytes(operand->tensor.dtype));
		made->args[p].tensor = &made->operands[p].tensor;
	}
	return true;
}

void case_make_constant(struct conf_case *conf_case, const char *activations, bool all)
{
	static uint64_t last_id;
	for (uint32_t p = 0; p < conf_case->schema->param_count; p++) {
		opd_tensor *tensor = &conf_case->operands[p].tensor;
		if (conf_case->args[p].kind != OPD_ARG_TENSOR || (!all && is_listed(activations, conf_case->schema->params[p].name)))
			continue;
		tensor->id = ++last_id;
		tensor->version = 1;
		tensor->flags |= OPD_TENSOR_CONSTANT;
	}
}

void case_fini(struct conf_case *conf_case)
{
	for (uint32_t i = 0; i < SCHEMA_PARAMS; i++)
		operand_fini(&conf_case->operands[i]);
	memset(conf_case, 0, sizeof *conf_case);
}

/* ---- Results ------------------------------------------------------------------------------------------------------------- */

opd_status results_init(struct results *results, const opd_op *op, const struct conf_case *conf_case, opd_error *error)
{
	int64_t shapes[SCHEMA_RESULTS][OPD_RANK_MAX];
	opd_output outputs[SCHEMA_RESULTS];
	opd_output *pointers[SCHEMA_RESULTS];
	memset(results, 0, sizeof *results);
	uint32_t count = conf_case->schema->result_count;
	for (uint32_t i = 0; i < SCHEMA_RESULTS; i++) {
		outputs[i] = (opd_output){.struct_bytes = sizeof(opd_output), .rank_max = OPD_RANK_MAX, .shape = shapes[i]};
		pointers[i] = &outputs[i];
	}
	opd_call call = case_call(conf_case, NULL);
	call.output_count = count;
	opd_status status = op->shape(op, &call, pointers, error);
	if (status != OPD_OK)
		return status;
	for (uint32_t i = 0; i < count; i++) {
		operand_init(&results->outputs[i], outputs[i].dtype, outputs[i].rank, shapes[i]);
		results->pointers[i] = &results->outputs[i].tensor;
	}
	results->count = count;
	return OPD_OK;
}

bool results_guarded(const struct results *results)
{
	for (uint32_t i = 0; i < results->count; i++) {
		const struct operand *output = &results->outputs[i];
		uint64_t used = CASE_GUARD + output->tensor.elements * opd_dtype_bytes(output->tensor.dtype);
		for (uint64_t b = 0; b < output->bytes; b = b + 1 == CASE_GUARD ? used : b + 1)
			if (output->memory[b] != CASE_GUARD_BYTE)
				return false;
	}
	return true;
}

void results_fini(struct results *results)
{
	for (uint32_t i = 0; i < SCHEMA_RESULTS; i++)
		operand_fini(&results->outputs[i]);
	memset(results, 0, sizeof *results);
}

opd_call case_call(const struct conf_case *conf_case, const struct results *results)
{
	return (opd_call){
		.struct_bytes = sizeof(opd_call),
		.arg_count = conf_case->schema->param_count,
		.output_count = results == NULL ? 0 : results->count,
		.args = conf_case->args,
		.outputs = results == NULL ? NULL : results->pointers,
	};
}

const char *case_layout_name(enum case_layout layout)
{
	static const char *const names[] = {"contiguous", "padded", "strided", "broadcast"};
	return layout < CASE_LAYOUTS ? names[layout] : "unknown";
}
