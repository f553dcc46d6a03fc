/* Tensors and arguments, both ways. */
#include <inttypes.h>
#include <string.h>

#include "proto/codec_internal.h"
#include "proto/text.h"

/* ---- Reading ---- */

opd_status read_dtype(struct reader *reader, const char *field, int32_t number, opd_dtype *out)
{
	if (number != OPD_DTYPE_NONE && !opd_dtype_valid(number))
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: dtype %" PRId32 ", expected 1 (bool) to %d (f8_e5m2)", field,
		                number, OPD_DTYPE_COUNT - 1);
	*out = (opd_dtype)number;
	return OPD_OK;
}

static void read_source(const Opd__V1__Tensor *in, struct msg_tensor *out)
{
	out->source = MSG_SOURCE_NONE;
	switch (in->source_case) {
	case OPD__V1__TENSOR__SOURCE_INLINE:
		out->source = MSG_SOURCE_INLINE;
		out->inlined.data = in->inline_.data;
		out->inlined.bytes = in->inline_.len;
		break;
	case OPD__V1__TENSOR__SOURCE_PAYLOAD:
		out->source = MSG_SOURCE_PAYLOAD;
		out->payload.offset = in->payload->offset;
		out->payload.bytes = in->payload->bytes;
		break;
	case OPD__V1__TENSOR__SOURCE_HANDLE:
		out->source = MSG_SOURCE_HANDLE;
		out->handle = (struct msg_handle){in->handle->index, in->handle->generation};
		break;
	case OPD__V1__TENSOR__SOURCE_RESULT:
		out->source = MSG_SOURCE_RESULT;
		out->result.request = in->result->request;
		out->result.output = in->result->output;
		break;
	case OPD__V1__TENSOR__SOURCE_SHARED:
		out->source = MSG_SOURCE_SHARED;
		out->shared.region = in->shared->region;
		out->shared.offset = in->shared->offset;
		out->shared.bytes = in->shared->bytes;
		break;
	case OPD__V1__TENSOR__SOURCE_GRAPH_INPUT:
		out->source = MSG_SOURCE_GRAPH_INPUT;
		out->graph_input = in->graph_input;
		break;
	case OPD__V1__TENSOR__SOURCE_NODE:
		out->source = MSG_SOURCE_NODE;
		out->node = (struct msg_node_output){in->node->node, in->node->output};
		break;
	default: /* none, or one that this build doesn't know */
		break;
	}
}

opd_status read_tensor(struct reader *reader, const Opd__V1__Tensor *in, struct msg_tensor *out)
{
	if (in->n_shape > OPD_RANK_MAX)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "shape: rank %zu, at most %d", in->n_shape, OPD_RANK_MAX);
	if (in->n_strides != 0 && in->n_strides != in->n_shape)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "strides: %zu of them, expected none or %zu (the rank)",
		                in->n_strides, in->n_shape);
	opd_status status = read_dtype(reader, "tensor", (int32_t)in->dtype, &out->dtype);
	if (status != OPD_OK)
		return status;
	out->rank = (uint32_t)in->n_shape;
	out->strided = in->n_strides != 0;
	out->donate = in->donate;
	for (size_t i = 0; i < in->n_shape; i++)
		out->shape[i] = in->shape[i];
	for (size_t i = 0; i < in->n_strides; i++)
		out->strides[i] = in->strides[i];
	out->byte_offset = in->byte_offset;
	read_source(in, out);
	return OPD_OK;
}

opd_status read_tensors(struct reader *reader, const char *field, size_t count, Opd__V1__Tensor *const *in, uint32_t *count_out,
                        struct msg_tensor **out)
{
	opd_status status = read_count(reader, field, count, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_tensor *tensors = arena_array(reader->arena, count, sizeof *tensors);
	if (tensors == NULL)
		return read_full(reader);
	for (size_t i = 0; i < count; i++) {
		status = read_tensor(reader, in[i], &tensors[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "%s[%zu]", field, i);
	}
	*count_out = (uint32_t)count;
	*out = tensors;
	return OPD_OK;
}

static opd_status read_value(struct reader *reader, const Opd__V1__Argument *in, struct msg_arg *out)
{
	switch (in->value_case) {
	case OPD__V1__ARGUMENT__VALUE_TENSOR:
		out->kind = MSG_ARG_TENSOR;
		out->count = 1;
		out->tensor = arena_zalloc(reader->arena, sizeof *out->tensor);
		return out->tensor == NULL ? read_full(reader) : read_tensor(reader, in->tensor, out->tensor);
	case OPD__V1__ARGUMENT__VALUE_TENSORS:
		out->kind = MSG_ARG_TENSORS;
		return read_tensors(reader, "tensors", in->tensors->n_items, in->tensors->items, &out->count, &out->tensor);
	case OPD__V1__ARGUMENT__VALUE_INT:
		out->kind = MSG_ARG_INT;
		out->i = in->int_;
		return OPD_OK;
	case OPD__V1__ARGUMENT__VALUE_INTS:
		out->kind = MSG_ARG_INTS;
		return read_ints(reader, "ints", in->ints->n_items, in->ints->items, BOUND_LIST, &out->count, &out->ints);
	case OPD__V1__ARGUMENT__VALUE_FLOAT:
		out->kind = MSG_ARG_FLOAT;
		out->f = in->float_;
		return OPD_OK;
	case OPD__V1__ARGUMENT__VALUE_BOOL:
		out->kind = MSG_ARG_BOOL;
		out->b = in->bool_;
		return OPD_OK;
	case OPD__V1__ARGUMENT__VALUE_STR:
		out->kind = MSG_ARG_STR;
		return read_text(reader, "str", in->str, BOUND_STR_BYTES, &out->str);
	case OPD__V1__ARGUMENT__VALUE_NONE:
		out->kind = MSG_ARG_NONE;
		return OPD_OK;
	default:
		/* Not taken for None: a value of a kind that we don't know would be dropped silently, and the call run without it. */
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "no value, or one of a kind that this build doesn't know");
	}
}

static opd_status read_arg(struct reader *reader, size_t index, const Opd__V1__Argument *in, struct msg_arg *out)
{
	opd_status status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	if (status != OPD_OK)
		return opd_error_prefix(reader->error, status, "argument %zu", index);
	status = read_value(reader, in, out);
	if (status == OPD_OK)
		return OPD_OK;
	if (out->name.bytes == 0)
		return opd_error_prefix(reader->error, status, "argument %zu", index);
	char shown[BOUND_NAME_BYTES + 1];
	return opd_error_prefix(reader->error, status, "argument %s",
	                        text_escape(out->name.data, out->name.bytes, shown, sizeof shown));
}

opd_status read_args(struct reader *reader, size_t count, Opd__V1__Argument *const *in, uint32_t *count_out, struct msg_arg **out)
{
	opd_status status = read_count(reader, "args", count, BOUND_ARGS);
	if (status != OPD_OK)
		return status;
	struct msg_arg *args = arena_array(reader->arena, count, sizeof *args);
	if (args == NULL)
		return read_full(reader);
	for (size_t i = 0; i < count; i++) {
		status = read_arg(reader, i, in[i], &args[i]);
		if (status != OPD_OK)
			return status;
	}
	*count_out = (uint32_t)count;
	*out = args;
	return OPD_OK;
}

/* ---- Writing ---- */

Opd__V1__Handle *write_handle(struct arena *arena, struct msg_handle in)
{
	Opd__V1__Handle *out = write_new(arena, &opd__v1__handle__descriptor);
	if (out != NULL) {
		out->index = in.index;
		out->generation = in.generation;
	}
	return out;
}

static Opd__V1__Range *write_range(struct arena *arena, uint64_t offset, uint64_t bytes)
{
	Opd__V1__Range *out = write_new(arena, &opd__v1__range__descriptor);
	if (out != NULL) {
		out->offset = offset;
		out->bytes = bytes;
	}
	return out;
}

static Opd__V1__ResultRef *write_result_ref(struct arena *arena, uint64_t request, uint32_t output)
{
	Opd__V1__ResultRef *out = write_new(arena, &opd__v1__result_ref__descriptor);
	if (out != NULL) {
		out->request = request;
		out->output = output;
	}
	return out;
}

static Opd__V1__SharedRange *write_shared(struct arena *arena, uint32_t region, uint64_t offset, uint64_t bytes)
{
	Opd__V1__SharedRange *out = write_new(arena, &opd__v1__shared_range__descriptor);
	if (out != NULL) {
		out->region = region;
		out->offset = offset;
		out->bytes = bytes;
	}
	return out;
}

Opd__V1__NodeOutput *write_node_output(struct arena *arena, struct msg_node_output in)
{
	Opd__V1__NodeOutput *out = write_new(arena, &opd__v1__node_output__descriptor);
	if (out != NULL) {
		out->node = in.node;
		out->output = in.output;
	}
	return out;
}

static bool write_source(struct arena *arena, const struct msg_tensor *in, Opd__V1__Tensor *out)
{
	switch (in->source) {
	case MSG_SOURCE_NONE:
		return true;
	case MSG_SOURCE_INLINE:
		out->source_case = OPD__V1__TENSOR__SOURCE_INLINE;
		out->inline_ = (ProtobufCBinaryData){in->inlined.bytes, (uint8_t *)(uintptr_t)in->inlined.data};
		return true;
	case MSG_SOURCE_PAYLOAD:
		out->source_case = OPD__V1__TENSOR__SOURCE_PAYLOAD;
		return (out->payload = write_range(arena, in->payload.offset, in->payload.bytes)) != NULL;
	case MSG_SOURCE_HANDLE:
		out->source_case = OPD__V1__TENSOR__SOURCE_HANDLE;
		return (out->handle = write_handle(arena, in->handle)) != NULL;
	case MSG_SOURCE_RESULT:
		out->source_case = OPD__V1__TENSOR__SOURCE_RESULT;
		return (out->result = write_result_ref(arena, in->result.request, in->result.output)) != NULL;
	case MSG_SOURCE_SHARED:
		out->source_case = OPD__V1__TENSOR__SOURCE_SHARED;
		return (out->shared = write_shared(arena, in->shared.region, in->shared.offset, in->shared.bytes)) != NULL;
	case MSG_SOURCE_GRAPH_INPUT:
		out->source_case = OPD__V1__TENSOR__SOURCE_GRAPH_INPUT;
		out->graph_input = in->graph_input;
		return true;
	case MSG_SOURCE_NODE:
		out->source_case = OPD__V1__TENSOR__SOURCE_NODE;
		return (out->node = write_node_output(arena, in->node)) != NULL;
	}
	return true;
}

/* Shape and strides are borrowed from the message: protobuf-c only reads them. */
Opd__V1__Tensor *write_tensor(struct arena *arena, const struct msg_tensor *in)
{
	Opd__V1__Tensor *out = write_new(arena, &opd__v1__tensor__descriptor);
	if (out == NULL)
		return NULL;
	out->dtype = (Opd__V1__DType)in->dtype;
	out->n_shape = in->rank;
	out->shape = (int64_t *)(uintptr_t)in->shape;
	out->n_strides = in->strided ? in->rank : 0;
	out->strides = (int64_t *)(uintptr_t)in->strides;
	out->byte_offset = in->byte_offset;
	out->donate = in->donate;
	return write_source(arena, in, out) ? out : NULL;
}

bool write_tensors(struct arena *arena, uint32_t count, const struct msg_tensor *in, size_t *count_out, Opd__V1__Tensor ***out)
{
	Opd__V1__Tensor **tensors = arena_array(arena, count, sizeof *tensors);
	if (tensors == NULL)
		return false;
	for (uint32_t i = 0; i < count; i++) {
		tensors[i] = write_tensor(arena, &in[i]);
		if (tensors[i] == NULL)
			return false;
	}
	*count_out = count;
	*out = tensors;
	return true;
}

static bool write_value(struct arena *arena, const struct msg_arg *in, Opd__V1__Argument *out)
{
	switch (in->kind) {
	case MSG_ARG_NONE:
		out->value_case = OPD__V1__ARGUMENT__VALUE_NONE;
		return (out->none = write_new(arena, &opd__v1__none__descriptor)) != NULL;
	case MSG_ARG_TENSOR:
		out->value_case = OPD__V1__ARGUMENT__VALUE_TENSOR;
		return (out->tensor = write_tensor(arena, in->tensor)) != NULL;
	case MSG_ARG_TENSORS:
		out->value_case = OPD__V1__ARGUMENT__VALUE_TENSORS;
		out->tensors = write_new(arena, &opd__v1__tensor_list__descriptor);
		return out->tensors != NULL && write_tensors(arena, in->count, in->tensor, &out->tensors->n_items, &out->tensors->items);
	case MSG_ARG_INT:
		out->value_case = OPD__V1__ARGUMENT__VALUE_INT;
		out->int_ = in->i;
		return true;
	case MSG_ARG_INTS:
		out->value_case = OPD__V1__ARGUMENT__VALUE_INTS;
		out->ints = write_new(arena, &opd__v1__int_list__descriptor);
		if (out->ints == NULL)
			return false;
		out->ints->n_items = in->count;
		out->ints->items = (int64_t *)(uintptr_t)in->ints;
		return true;
	case MSG_ARG_FLOAT:
		out->value_case = OPD__V1__ARGUMENT__VALUE_FLOAT;
		out->float_ = in->f;
		return true;
	case MSG_ARG_BOOL:
		out->value_case = OPD__V1__ARGUMENT__VALUE_BOOL;
		out->bool_ = in->b;
		return true;
	case MSG_ARG_STR:
		out->value_case = OPD__V1__ARGUMENT__VALUE_STR;
		out->str = write_text(in->str);
		return true;
	}
	return true;
}

bool write_args(struct arena *arena, uint32_t count, const struct msg_arg *in, size_t *count_out, Opd__V1__Argument ***out)
{
	Opd__V1__Argument **args = arena_array(arena, count, sizeof *args);
	if (args == NULL)
		return false;
	for (uint32_t i = 0; i < count; i++) {
		args[i] = write_new(arena, &opd__v1__argument__descriptor);
		if (args[i] == NULL || !write_value(arena, &in[i], args[i]))
			return false;
		args[i]->name = write_text(in[i].name);
	}
	*count_out = count;
	*out = args;
	return true;
}
