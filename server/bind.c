#include "server/bind.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/tensor.h"
#include "proto/text.h"
#include "providers/estimate.h"
#include "server/module.h"

static const char *kind_name(msg_arg_kind kind)
{
	static const char *const names[] = {"None", "a tensor", "a list of tensors", "an int", "a list of ints", "a float", "a bool", "a str"};
	return names[kind];
}

static const char *show(struct msg_text text, char *out, size_t out_bytes)
{
	return text_escape(text.data == NULL ? "" : text.data, text.bytes, out, out_bytes);
}

static opd_status out_of_arena(const struct op *op, opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: the request's arguments need more memory than a request may use", op->schema->name);
}

/* Which parameter an argument is for; -1 with the error written. */
static int find_param(const struct op *op, const struct msg_arg *arg, uint32_t position, bool named_before, opd_error *error)
{
	const struct schema *schema = op->schema;
	char shown[160];
	if (arg->name.bytes == 0) {
		if (named_before)
			(void)opd_fail(error, OPD_INVALID_ARGUMENT, "%s: argument %u is positional but follows a named one; schema: %s", schema->name,
			               (unsigned)position, schema->text);
		else if (position >= schema->param_count)
			(void)opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %u arguments, at most %u expected; schema: %s", schema->name,
			               (unsigned)position + 1, (unsigned)schema->param_count, schema->text);
		else
			return (int)position;
		return -1;
	}
	int found = schema_find(schema, arg->name.data, arg->name.bytes);
	if (found < 0)
		(void)opd_fail(error, OPD_INVALID_ARGUMENT, "%s: unknown argument \"%s\"; schema: %s", schema->name,
		               show(arg->name, shown, sizeof shown), schema->text);
	return found;
}

static opd_status wrong_type(const struct op *op, const struct schema_param *param, const struct msg_arg *arg, opd_error *error)
{
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: argument %s is %s, expected %s; schema: %s", op->schema->name, param->name,
	                kind_name(arg->kind), schema_type_text(param->type), op->schema->text);
}

/* Tensors of the argument become operands, in order. */
static opd_status bind_tensors(struct arena *arena, struct bound *bound, const struct schema_param *param, const struct msg_arg *arg,
                               opd_arg *value, opd_error *error)
{
	uint32_t count = arg->kind == MSG_ARG_TENSOR ? 1 : arg->count;
	const opd_tensor **list = NULL;
	if (arg->kind == MSG_ARG_TENSORS) {
		list = arena_array(arena, count, sizeof list[0]);
		if (list == NULL)
			return out_of_arena(bound->op, error);
	}
	for (uint32_t i = 0; i < count; i++) {
		struct operand *operand = &bound->operands[bound->operand_count++];
		*operand = (struct operand){.param = param->name, .source = &arg->tensor[i]};
		if (list != NULL)
			list[i] = &operand->tensor;
		else
			value->tensor = &operand->tensor;
	}
	if (list != NULL) {
		value->tensors = list;
		value->count = count;
	}
	return OPD_OK;
}

static opd_status bind_value(struct arena *arena, struct bound *bound, const struct schema_param *param, const struct msg_arg *arg,
                             opd_arg *value, opd_error *error)
{
	opd_arg_kind wanted = schema_type_kind(param->type);
	if (arg->kind == MSG_ARG_NONE && schema_type_optional(param->type)) {
		*value = (opd_arg){.kind = OPD_ARG_NONE};
		return OPD_OK;
	}
	*value = (opd_arg){.kind = wanted};
	if (arg->kind == MSG_ARG_INT && wanted == OPD_ARG_FLOAT) { /* as in PyTorch, an int does for a float */
		value->f = (double)arg->i;
		return OPD_OK;
	}
	if ((int)arg->kind != (int)wanted)
		return wrong_type(bound->op, param, arg, error);
	switch (arg->kind) {
	case MSG_ARG_TENSOR:
	case MSG_ARG_TENSORS:
		return bind_tensors(arena, bound, param, arg, value, error);
	case MSG_ARG_INT:
		value->i = arg->i;
		break;
	case MSG_ARG_INTS:
		value->ints = arg->ints;
		value->count = arg->count;
		break;
	case MSG_ARG_FLOAT:
		value->f = arg->f;
		break;
	case MSG_ARG_BOOL:
		value->b = arg->b;
		break;
	case MSG_ARG_STR:
		value->str = arg->str.data == NULL ? "" : arg->str.data;
		value->count = (uint32_t)arg->str.bytes;
		break;
	case MSG_ARG_NONE:
		break;
	}
	return OPD_OK;
}

static opd_status fill_defaults(const struct bound *bound, uint64_t given, opd_error *error)
{
	const struct schema *schema = bound->op->schema;
	for (uint32_t i = 0; i < schema->param_count; i++) {
		if ((given >> i & 1) != 0)
			continue;
		if (!schema->params[i].has_default)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: argument %s (%s) is missing; schema: %s", schema->name, schema->params[i].name,
			                schema_type_text(schema->params[i].type), schema->text);
		bound->args[i] = schema->params[i].value;
	}
	return OPD_OK;
}

opd_status bind_args(struct arena *arena, const struct op *op, const struct msg_run *run, struct bound *bound, opd_error *error)
{
	const struct schema *schema = op->schema;
	uint32_t tensors = 0;
	for (uint32_t i = 0; i < run->arg_count; i++)
		tensors += run->args[i].kind == MSG_ARG_TENSOR ? 1 : run->args[i].kind == MSG_ARG_TENSORS ? run->args[i].count : 0;
	*bound = (struct bound){.op = op};
	bound->args = arena_alloc(arena, schema->param_count * sizeof bound->args[0]);
	bound->operands = arena_alloc(arena, tensors * sizeof bound->operands[0]);
	if (bound->args == NULL || bound->operands == NULL)
		return out_of_arena(op, error);

	uint64_t given = 0; /* bit i: parameter i */
	bool named = false;
	for (uint32_t i = 0; i < run->arg_count; i++) {
		const struct msg_arg *arg = &run->args[i];
		int index = find_param(op, arg, i, named, error);
		if (index < 0)
			return OPD_INVALID_ARGUMENT;
		named = named || arg->name.bytes != 0;
		const struct schema_param *param = &schema->params[index];
		if ((given >> index & 1) != 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: argument %s is given twice; schema: %s", schema->name, param->name, schema->text);
		given |= 1ull << index;
		opd_status status = bind_value(arena, bound, param, arg, &bound->args[index], error);
		if (status != OPD_OK)
			return status;
	}
	bound->call = (opd_call){
		.struct_bytes = sizeof bound->call,
		.flags = run->allow_tf32 ? OPD_CALL_ALLOW_TF32 : 0,
		.arg_count = schema->param_count,
		.output_count = schema->result_count,
		.args = bound->args,
	};
	return fill_defaults(bound, given, error);
}

/* "[2, -1, 4]" */
static const char *show_shape(uint32_t rank, const int64_t *shape, char *out, size_t out_bytes)
{
	size_t at = (size_t)snprintf(out, out_bytes, "[");
	for (uint32_t i = 0; i < rank && at < out_bytes; i++)
		at += (size_t)snprintf(out + at, out_bytes - at, "%s%" PRId64, i == 0 ? "" : ", ", shape[i]);
	if (at < out_bytes)
		(void)snprintf(out + at, out_bytes - at, "]");
	return out;
}

static opd_status bad_shape(const struct op *op, const struct operand *operand, opd_error *error)
{
	const struct msg_tensor *source = operand->source;
	char shape[200];
	if (!opd_dtype_valid(source->dtype))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s has no dtype", op->schema->name, operand->param);
	show_shape(source->rank, source->shape, shape, sizeof shape);
	for (uint32_t i = 0; i < source->rank; i++)
		if (source->shape[i] < 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s has shape %s: dimension %u is negative", op->schema->name, operand->param,
			                shape, (unsigned)i);
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s has shape %s of %s: more than 2^63 - 1 bytes", op->schema->name, operand->param,
	                shape, opd_dtype_name(source->dtype));
}

static opd_status bad_layout(const struct op *op, const struct operand *operand, uint64_t bytes, opd_error *error)
{
	const struct msg_tensor *source = operand->source;
	char shape[200];
	char strides[200] = "row-major";
	show_shape(source->rank, source->shape, shape, sizeof shape);
	if (source->strided)
		show_shape(source->rank, source->strides, strides, sizeof strides);
	for (uint32_t i = 0; source->strided && i < source->rank; i++)
		if (source->strides[i] < 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s has strides %s: none may be negative", op->schema->name, operand->param,
			                strides);
	if (source->byte_offset % opd_dtype_bytes(source->dtype) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s has byte offset %" PRIu64 ", expected a multiple of %zu (%s)", op->schema->name,
		                operand->param, source->byte_offset, opd_dtype_bytes(source->dtype), opd_dtype_name(source->dtype));
	return opd_fail(error, OPD_INVALID_ARGUMENT,
	                "%s: %s of %s, shape %s, strides %s, byte offset %" PRIu64 " doesn't lie in its %" PRIu64 " bytes", op->schema->name,
	                operand->param, opd_dtype_name(source->dtype), shape, strides, source->byte_offset, bytes);
}

opd_status bind_place(const struct op *op, struct operand *operand, void *data, uint64_t bytes, bool exact, opd_error *error)
{
	struct msg_tensor *source = operand->source;
	uint64_t end;
	if (!tensor_bytes(source->dtype, source->rank, source->shape, &end))
		return bad_shape(op, operand, error);
	const bool laid_out = source->strided || source->byte_offset != 0; /* else its bytes are its extent */
	if (laid_out &&
	    !tensor_extent(source->dtype, source->rank, source->shape, source->strided ? source->strides : NULL, source->byte_offset, &end))
		return bad_layout(op, operand, bytes, error);
	if (end > bytes)
		return bad_layout(op, operand, bytes, error);
	if (exact && !laid_out && end != bytes) {
		char shape[200];
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s of %s, shape %s has %" PRIu64 " bytes, but %" PRIu64 " were sent",
		                op->schema->name, operand->param, opd_dtype_name(source->dtype),
		                show_shape(source->rank, source->shape, shape, sizeof shape), end, bytes);
	}
	if (!source->strided)
		tensor_row_major(source->rank, source->shape, source->strides);
	tensor_describe(&operand->tensor, source->dtype, source->rank, source->shape, source->strides, source->byte_offset);
	operand->tensor.data = data;
	/* No more than every buffer has: a plan is kept for that, and a device's copy has no more either. */
	uint32_t alignment = tensor_alignment(data, source->byte_offset);
	operand->tensor.alignment = data == NULL || alignment > OPD_TENSOR_ALIGNMENT ? OPD_TENSOR_ALIGNMENT : alignment;
	return OPD_OK;
}

opd_status bind_outputs(struct arena *arena, struct bound *bound, opd_error *error)
{
	const struct op *op = bound->op;
	const uint32_t count = bound->call.output_count;
	struct output {
		opd_output spec;
		int64_t shape[OPD_RANK_MAX];
		int64_t strides[OPD_RANK_MAX];
	} *outputs = arena_alloc(arena, count * sizeof *outputs);
	opd_output **specs = arena_alloc(arena, count * sizeof *specs);
	const opd_tensor **list = arena_alloc(arena, count * sizeof *list);
	bound->outputs = arena_array(arena, count, sizeof bound->outputs[0]);
	if (outputs == NULL || specs == NULL || list == NULL || bound->outputs == NULL)
		return out_of_arena(op, error);
	for (uint32_t i = 0; i < count; i++) {
		outputs[i].spec = (opd_output){.struct_bytes = sizeof(opd_output), .rank_max = OPD_RANK_MAX, .shape = outputs[i].shape};
		specs[i] = &outputs[i].spec;
		list[i] = &bound->outputs[i];
	}
	bound->call.outputs = NULL;
	error->text[0] = '\0';
	opd_status status = op->shape(op->def, &bound->call, specs, error);
	if (status != OPD_OK)
		return module_failure(status, error, "%s: its shape function failed", op->schema->name);
	bound->output_bytes = 0;
	for (uint32_t i = 0; i < count; i++) {
		opd_output *spec = &outputs[i].spec;
		uint64_t bytes;
		if (spec->rank > OPD_RANK_MAX || !tensor_bytes(spec->dtype, spec->rank, spec->shape, &bytes) || !size_align(bytes, &bytes) ||
		    !size_add(bound->output_bytes, bytes, &bound->output_bytes)) {
			char shape[200];
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: result %u would have dtype %s and shape %s: more than fits", op->schema->name,
			                (unsigned)i, opd_dtype_name(spec->dtype),
			                show_shape(spec->rank > OPD_RANK_MAX ? OPD_RANK_MAX : spec->rank, spec->shape, shape, sizeof shape));
		}
		tensor_row_major(spec->rank, spec->shape, outputs[i].strides);
		tensor_describe(&bound->outputs[i], spec->dtype, spec->rank, spec->shape, outputs[i].strides, 0);
		bound->outputs[i].alignment = OPD_TENSOR_ALIGNMENT;
	}
	bound->call.outputs = list;
	return OPD_OK;
}

/* ---- Cost ---- */

/* Of an index that is checked: half of one of a table's row, a third of one of paged_attention's sequences, which has two more. */
#define CHECK_ELEMENT_NS 4u

static uint64_t index_elements(const opd_tensor *tensor)
{
	return tensor->dtype == OPD_i32 || tensor->dtype == OPD_i64 ? tensor->elements : 0;
}

/* All elements, also where strides of 0 repeat them: what a check makes of those is its own business. */
static uint64_t checked_elements(const struct bound *bound)
{
	uint64_t elements = 0;
	for (uint64_t bits = bound->op->index_params; bits != 0; bits &= bits - 1) {
		const opd_arg *arg = &bound->args[__builtin_ctzll(bits)];
		if (arg->kind == OPD_ARG_TENSOR)
			elements = estimate_add(elements, index_elements(arg->tensor));
		for (uint32_t i = 0; arg->kind == OPD_ARG_TENSORS && i < arg->count; i++)
			elements = estimate_add(elements, index_elements(arg->tensors[i]));
	}
	return elements;
}

uint64_t bound_cost_ns(const struct bound *bound, const struct impl *impl)
{
	const uint64_t kernel_ns = impl->def->cost_ns == NULL ? 0 : impl->def->cost_ns(impl->def, &bound->call);
	if (kernel_ns == 0 || bound->op->index_params == 0)
		return kernel_ns;
	return estimate_add(kernel_ns, estimate_multiply(checked_elements(bound), CHECK_ELEMENT_NS));
}
