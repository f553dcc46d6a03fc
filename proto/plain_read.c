/* Run and RunGraph, from envelopes to messages, and the tensors that their reply has too. */
#include <string.h>

#include "proto/bounds.h"
#include "proto/plain_internal.h"
#include "proto/text.h"

bool plain_count_fields(struct wire in, uint32_t counts[PLAIN_NUMBERS])
{
	memset(counts, 0, PLAIN_NUMBERS * sizeof counts[0]);
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || field.tag >> 3 >= PLAIN_NUMBERS)
			return false;
		counts[field.tag >> 3]++;
	}
	return true;
}

bool plain_read_text(struct arena *arena, struct wire in, size_t bound, struct msg_text *out)
{
	const size_t bytes = (size_t)(in.end - in.at);
	*out = (struct msg_text){"", 0};
	if (bytes == 0)
		return true;
	if (bytes > bound || !text_valid((const char *)in.at, bytes))
		return false;
	*out = (struct msg_text){arena_text(arena, (const char *)in.at, bytes), bytes};
	return out->data != NULL;
}

/* ---- Messages of numbers ---- */

/* Numbers 1, 2, … of a message that has only varints; those that aren't there are left. */
bool plain_read_numbers(struct wire in, uint32_t count, uint64_t *const out[])
{
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || (field.tag & 7) != 0)
			return false;
		const uint32_t number = field.tag >> 3;
		if (number == 0 || number > count)
			return false;
		*out[number - 1] = field.value;
	}
	return true;
}

bool plain_read_handle(struct wire in, struct msg_handle *out)
{
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field))
			return false;
		switch (field.tag) {
		case WIRE_VARINT(1u):
			out->index = (uint32_t)field.value;
			break;
		case WIRE_FIXED64(2u):
			out->generation = field.value;
			break;
		default:
			return false;
		}
	}
	return true;
}

static bool read_shared(struct wire in, uint32_t *region, uint64_t *offset, uint64_t *bytes)
{
	uint64_t number = 0;
	uint64_t *const numbers[] = {&number, offset, bytes};
	if (!plain_read_numbers(in, 3, numbers))
		return false;
	*region = (uint32_t)number;
	return true;
}

static bool read_result_ref(struct wire in, struct msg_tensor *out)
{
	uint64_t output = 0;
	uint64_t *const numbers[] = {&out->result.request, &output};
	if (!plain_read_numbers(in, 2, numbers))
		return false;
	out->result.output = (uint32_t)output;
	return true;
}

static bool read_range(struct wire in, struct msg_tensor *out)
{
	uint64_t *const numbers[] = {&out->payload.offset, &out->payload.bytes};
	return plain_read_numbers(in, 2, numbers);
}

static bool read_node_output(struct wire in, struct msg_tensor *out)
{
	uint64_t node = 0, output = 0;
	uint64_t *const numbers[] = {&node, &output};
	if (!plain_read_numbers(in, 2, numbers))
		return false;
	out->node = (struct msg_node_output){(uint32_t)node, (uint32_t)output};
	return true;
}

/* ---- Tensors and arguments ---- */

static bool read_dtype(int32_t number, opd_dtype *out)
{
	if (number != OPD_DTYPE_NONE && !opd_dtype_valid(number))
		return false;
	*out = (opd_dtype)number;
	return true;
}

static bool read_dims(struct wire in, uint32_t *count, int64_t out[OPD_RANK_MAX])
{
	while (in.at != in.end) {
		uint64_t value;
		if (*count == OPD_RANK_MAX || !wire_varint(&in, &value))
			return false;
		out[(*count)++] = (int64_t)value;
	}
	return true;
}

static bool add_dim(uint64_t value, uint32_t *count, int64_t out[OPD_RANK_MAX])
{
	if (*count == OPD_RANK_MAX)
		return false;
	out[(*count)++] = (int64_t)value;
	return true;
}

static bool read_inline(struct arena *arena, struct wire in, struct msg_tensor *out)
{
	const size_t bytes = (size_t)(in.end - in.at);
	if (bytes == 0)
		return true;
	uint8_t *data = arena_alloc(arena, bytes);
	if (data == NULL)
		return false;
	memcpy(data, in.at, bytes);
	out->inlined.data = data;
	out->inlined.bytes = bytes;
	return true;
}

/* A field of the oneof. A second one would be merged with the first, or take its place. */
static bool read_source(struct arena *arena, const struct wire_field *field, struct msg_tensor *out)
{
	if (out->source != MSG_SOURCE_NONE)
		return false;
	switch (field->tag) {
	case WIRE_BYTES(5u):
		out->source = MSG_SOURCE_INLINE;
		return read_inline(arena, field->bytes, out);
	case WIRE_BYTES(6u):
		out->source = MSG_SOURCE_PAYLOAD;
		return read_range(field->bytes, out);
	case WIRE_BYTES(7u):
		out->source = MSG_SOURCE_HANDLE;
		return plain_read_handle(field->bytes, &out->handle);
	case WIRE_BYTES(8u):
		out->source = MSG_SOURCE_RESULT;
		return read_result_ref(field->bytes, out);
	case WIRE_BYTES(9u):
		out->source = MSG_SOURCE_SHARED;
		return read_shared(field->bytes, &out->shared.region, &out->shared.offset, &out->shared.bytes);
	case WIRE_VARINT(11u):
		out->source = MSG_SOURCE_GRAPH_INPUT;
		out->graph_input = (uint32_t)field->value;
		return true;
	case WIRE_BYTES(12u):
		out->source = MSG_SOURCE_NODE;
		return read_node_output(field->bytes, out);
	default:
		return false;
	}
}

static bool read_tensor_field(struct arena *arena, const struct wire_field *field, uint32_t *strides, struct msg_tensor *out)
{
	switch (field->tag) {
	case WIRE_VARINT(1u):
		return read_dtype((int32_t)field->value, &out->dtype);
	case WIRE_BYTES(2u):
		return read_dims(field->bytes, &out->rank, out->shape);
	case WIRE_VARINT(2u):
		return add_dim(field->value, &out->rank, out->shape);
	case WIRE_BYTES(3u):
		return read_dims(field->bytes, strides, out->strides);
	case WIRE_VARINT(3u):
		return add_dim(field->value, strides, out->strides);
	case WIRE_VARINT(4u):
		out->byte_offset = field->value;
		return true;
	case WIRE_VARINT(10u):
		out->donate = field->value != 0;
		return true;
	default:
		return read_source(arena, field, out);
	}
}

/* `out` is zeroed. */
bool plain_read_tensor(struct arena *arena, struct wire in, struct msg_tensor *out)
{
	uint32_t strides = 0;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || !read_tensor_field(arena, &field, &strides, out))
			return false;
	}
	out->strided = strides != 0;
	return strides == 0 || strides == out->rank;
}

static bool read_ints(struct arena *arena, struct wire in, struct msg_arg *out)
{
	struct wire_field field;
	if (in.at == in.end)
		return true;
	if (!wire_next(&in, &field) || field.tag != WIRE_BYTES(1u) || in.at != in.end)
		return false;
	const size_t most = (size_t)(field.bytes.end - field.bytes.at);
	int64_t *ints = most > BOUND_LIST ? NULL : arena_alloc(arena, most * sizeof *ints);
	if (ints == NULL)
		return false;
	while (field.bytes.at != field.bytes.end) {
		uint64_t value;
		if (!wire_varint(&field.bytes, &value))
			return false;
		ints[out->count++] = (int64_t)value;
	}
	out->ints = ints;
	return true;
}

static bool read_value(struct arena *arena, const struct wire_field *field, struct msg_arg *out)
{
	switch (field->tag) {
	case WIRE_BYTES(2u):
		out->kind = MSG_ARG_TENSOR;
		out->count = 1;
		out->tensor = arena_zalloc(arena, sizeof *out->tensor);
		return out->tensor != NULL && plain_read_tensor(arena, field->bytes, out->tensor);
	case WIRE_VARINT(4u):
		out->kind = MSG_ARG_INT;
		out->i = (int64_t)field->value;
		return true;
	case WIRE_FIXED64(5u):
		out->kind = MSG_ARG_FLOAT;
		memcpy(&out->f, &field->value, sizeof out->f);
		return true;
	case WIRE_VARINT(6u):
		out->kind = MSG_ARG_BOOL;
		out->b = field->value != 0;
		return true;
	case WIRE_BYTES(7u):
		out->kind = MSG_ARG_STR;
		return plain_read_text(arena, field->bytes, BOUND_STR_BYTES, &out->str);
	case WIRE_BYTES(8u):
		out->kind = MSG_ARG_INTS;
		return read_ints(arena, field->bytes, out);
	case WIRE_BYTES(9u):
		out->kind = MSG_ARG_NONE;
		return field->bytes.at == field->bytes.end;
	default: /* a list of tensors, or none that we know */
		return false;
	}
}

/* One name at the most and one value exactly. `out` is zeroed. */
static bool read_arg(struct arena *arena, struct wire in, struct msg_arg *out)
{
	uint32_t values = 0;
	out->name = (struct msg_text){"", 0};
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field))
			return false;
		if (field.tag == WIRE_BYTES(1u)) {
			if (!plain_read_text(arena, field.bytes, BOUND_NAME_BYTES, &out->name))
				return false;
		} else if (values++ != 0 || !read_value(arena, &field, out)) {
			return false;
		}
	}
	return values == 1;
}

/* ---- Run and RunGraph ---- */

static bool read_option(struct wire in, struct msg_output_option *out)
{
	bool shared = false;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field))
			return false;
		switch (field.tag) {
		case WIRE_VARINT(1u):
			out->keep = field.value != 0;
			break;
		case WIRE_VARINT(2u):
			out->no_copy = field.value != 0;
			break;
		case WIRE_BYTES(3u):
			if (shared || !read_shared(field.bytes, &out->shared.region, &out->shared.offset, &out->shared.bytes))
				return false;
			shared = true;
			break;
		default:
			return false;
		}
	}
	return true;
}

bool plain_new_texts(struct arena *arena, uint32_t count, uint32_t count_bound, struct msg_text **out)
{
	*out = count > count_bound ? NULL : arena_array(arena, count, sizeof **out);
	return *out != NULL;
}

static bool read_list(struct arena *arena, struct wire in, struct msg_list *out)
{
	uint32_t counts[PLAIN_NUMBERS];
	struct msg_text *names;
	if (!plain_count_fields(in, counts) || !plain_new_texts(arena, counts[1], BOUND_PROVIDERS, &names))
		return false;
	out->present = true;
	out->names = names;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || field.tag != WIRE_BYTES(1u) ||
		    !plain_read_text(arena, field.bytes, BOUND_NAME_BYTES, &names[out->count++]))
			return false;
	}
	return true;
}

/* The arrays of a run: what is read goes to their next place. */
struct run_arrays {
	struct msg_arg *next_arg;
	struct msg_output_option *next_output;
};

static bool make_arrays(struct arena *arena, uint32_t args, uint32_t outputs, struct msg_run *out, struct run_arrays *arrays)
{
	if (args > BOUND_ARGS || outputs > BOUND_OUTPUTS)
		return false;
	arrays->next_arg = arena_array(arena, args, sizeof *arrays->next_arg);
	arrays->next_output = arena_array(arena, outputs, sizeof *arrays->next_output);
	out->arg_count = args;
	out->args = arrays->next_arg;
	out->output_count = outputs;
	out->outputs = arrays->next_output;
	return out->args != NULL && out->outputs != NULL;
}

static bool read_mode(uint64_t value, msg_mode *out)
{
	const uint32_t mode = (uint32_t)value;
	*out = (msg_mode)mode;
	return mode <= MSG_DRY;
}

/* One that is none is left to the other decoder, which says so. */
static bool read_service_class(uint64_t value, uint32_t *out)
{
	*out = (uint32_t)value;
	return *out <= MSG_SERVICE_CLASS_MAX;
}

static bool read_run_field(struct arena *arena, const struct wire_field *field, struct run_arrays *arrays, struct msg_run *out)
{
	switch (field->tag) {
	case WIRE_BYTES(1u):
		return plain_read_text(arena, field->bytes, BOUND_NAME_BYTES, &out->op);
	case WIRE_BYTES(2u):
		return read_arg(arena, field->bytes, arrays->next_arg++);
	case WIRE_BYTES(3u):
		return read_list(arena, field->bytes, &out->priority);
	case WIRE_VARINT(4u):
		out->strict = field->value != 0;
		return true;
	case WIRE_VARINT(5u):
		return read_mode(field->value, &out->mode);
	case WIRE_VARINT(6u):
		out->explain = field->value != 0;
		return true;
	case WIRE_BYTES(7u):
		return plain_read_text(arena, field->bytes, BOUND_NAME_BYTES, &out->device);
	case WIRE_BYTES(8u):
		return read_option(field->bytes, arrays->next_output++);
	case WIRE_VARINT(9u):
		out->retry = field->value != 0;
		return true;
	case WIRE_VARINT(10u):
		out->allow_tf32 = field->value != 0;
		return true;
	case WIRE_VARINT(11u):
		out->timeout_us = field->value;
		return true;
	case WIRE_VARINT(12u):
		out->uuid = field->value != 0;
		return true;
	case WIRE_VARINT(13u):
		out->inline_results = field->value != 0;
		return true;
	case WIRE_VARINT(14u):
		return read_service_class(field->value, &out->service_class);
	default:
		return false;
	}
}

static bool read_run(struct arena *arena, struct wire in, struct msg_run *out)
{
	uint32_t counts[PLAIN_NUMBERS];
	struct run_arrays arrays;
	if (!plain_count_fields(in, counts) || counts[3] > 1 || !make_arrays(arena, counts[2], counts[8], out, &arrays))
		return false;
	out->op = out->device = (struct msg_text){"", 0};
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || !read_run_field(arena, &field, &arrays, out))
			return false;
	}
	return true;
}

static bool read_run_graph_field(struct arena *arena, const struct wire_field *field, struct run_arrays *arrays, struct msg_run *out)
{
	switch (field->tag) {
	case WIRE_VARINT(1u):
		out->graph = field->value;
		return true;
	case WIRE_BYTES(3u):
		return read_arg(arena, field->bytes, arrays->next_arg++);
	case WIRE_BYTES(4u):
		return read_option(field->bytes, arrays->next_output++);
	case WIRE_VARINT(5u):
		return read_mode(field->value, &out->mode);
	case WIRE_VARINT(6u):
		out->explain = field->value != 0;
		return true;
	case WIRE_VARINT(7u):
		out->timeout_us = field->value;
		return true;
	case WIRE_VARINT(8u):
		out->inline_results = field->value != 0;
		return true;
	case WIRE_VARINT(9u):
		return read_service_class(field->value, &out->service_class);
	default: /* `once` among them: a whole graph, which is read once and not by the thousand */
		return false;
	}
}

static bool read_run_graph(struct arena *arena, struct wire in, struct msg_run *out)
{
	uint32_t counts[PLAIN_NUMBERS];
	struct run_arrays arrays;
	if (!plain_count_fields(in, counts) || !make_arrays(arena, counts[3], counts[4], out, &arrays))
		return false;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || !read_run_graph_field(arena, &field, &arrays, out))
			return false;
	}
	return true;
}

static bool read_request(struct arena *arena, struct wire in, struct msg_request *out)
{
	struct wire_field field;
	if (in.at == in.end || !wire_next(&in, &field) || in.at != in.end)
		return false;
	switch (field.tag) {
	case WIRE_BYTES(1u):
		out->kind = MSG_REQUEST_RUN;
		return read_run(arena, field.bytes, &out->run);
	case WIRE_BYTES(25u):
		out->kind = MSG_REQUEST_RUN_GRAPH;
		return read_run_graph(arena, field.bytes, &out->run);
	default:
		return false;
	}
}

bool plain_read_request(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out)
{
	const struct arena_mark mark = arena_mark(arena);
	struct msg_request request = {0};
	if (bytes == 0 || !read_request(arena, (struct wire){envelope, envelope + bytes}, &request)) {
		arena_rewind(arena, mark);
		return false;
	}
	*out = request;
	return true;
}
