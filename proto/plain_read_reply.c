/* RunReply, from envelopes to messages. */
#include "proto/bounds.h"
#include "proto/plain_internal.h"

static bool read_result(struct arena *arena, struct wire in, struct msg_result *out)
{
	bool tensor = false, kept = false;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field))
			return false;
		bool taken = false;
		if (field.tag == WIRE_BYTES(1u) && !tensor)
			taken = tensor = plain_read_tensor(arena, field.bytes, &out->tensor);
		else if (field.tag == WIRE_BYTES(2u) && !kept)
			taken = kept = plain_read_handle(field.bytes, &out->kept);
		if (!taken)
			return false;
	}
	return true;
}

static bool read_skip(struct arena *arena, struct wire in, struct msg_skip *out)
{
	out->provider = out->reason = (struct msg_text){"", 0};
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field))
			return false;
		bool taken = false;
		if (field.tag == WIRE_BYTES(1u)) {
			taken = plain_read_text(arena, field.bytes, BOUND_STR_BYTES, &out->provider);
		} else if (field.tag == WIRE_VARINT(2u)) {
			out->code = (opd_reason_code)(uint32_t)field.value;
			taken = true;
		} else if (field.tag == WIRE_BYTES(3u)) {
			taken = plain_read_text(arena, field.bytes, BOUND_STR_BYTES, &out->reason);
		}
		if (!taken)
			return false;
	}
	return true;
}

static bool read_times(struct wire in, struct msg_times *out)
{
	uint64_t *const numbers[] = {&out->decode, &out->dispatch, &out->queue, &out->kernel, &out->moves, &out->pack, &out->receive};
	return plain_read_numbers(in, 7, numbers);
}

struct explain_arrays {
	struct msg_skip *next_skip;
	struct msg_text *next_name;
};

static bool read_explain_field(struct arena *arena, const struct wire_field *field, struct explain_arrays *arrays, struct msg_explain *out)
{
	switch (field->tag) {
	case WIRE_BYTES(1u):
		return read_skip(arena, field->bytes, arrays->next_skip++);
	case WIRE_BYTES(2u):
		return plain_read_text(arena, field->bytes, BOUND_STR_BYTES, arrays->next_name++);
	case WIRE_VARINT(3u):
		out->level = (msg_level)(int32_t)field->value;
		return true;
	case WIRE_BYTES(4u):
		return read_times(field->bytes, &out->times);
	case WIRE_BYTES(6u):
		return plain_read_text(arena, field->bytes, BOUND_STR_BYTES, &out->device);
	case WIRE_VARINT(7u):
		out->on_loop = field->value != 0;
		return true;
	case WIRE_BYTES(8u):
		return plain_read_text(arena, field->bytes, BOUND_STR_BYTES, &out->narrowed);
	default: /* moves and whom it waited behind among them: a copy between devices, or a wait, costs more than protobuf-c */
		return false;
	}
}

/* `out` is zeroed. */
static bool read_explain(struct arena *arena, struct wire in, struct msg_explain *out)
{
	uint32_t counts[PLAIN_NUMBERS];
	if (!plain_count_fields(in, counts) || counts[1] > BOUND_LIST || counts[4] > 1)
		return false;
	struct explain_arrays arrays = {.next_skip = arena_array(arena, counts[1], sizeof *arrays.next_skip)};
	if (arrays.next_skip == NULL || !plain_new_texts(arena, counts[2], BOUND_LIST, &arrays.next_name))
		return false;
	out->device = out->narrowed = (struct msg_text){"", 0};
	out->skip_count = counts[1];
	out->skipped = arrays.next_skip;
	out->effective_count = counts[2];
	out->effective = arrays.next_name;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || !read_explain_field(arena, &field, &arrays, out))
			return false;
	}
	return true;
}

static bool read_node_explain(struct arena *arena, struct wire in, struct msg_node_explain *out)
{
	bool explained = false;
	out->node = out->op = out->provider = (struct msg_text){"", 0};
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field))
			return false;
		bool taken = false;
		if (field.tag == WIRE_BYTES(1u))
			taken = plain_read_text(arena, field.bytes, BOUND_NAME_BYTES, &out->node);
		else if (field.tag == WIRE_BYTES(2u))
			taken = plain_read_text(arena, field.bytes, BOUND_NAME_BYTES, &out->op);
		else if (field.tag == WIRE_BYTES(3u))
			taken = plain_read_text(arena, field.bytes, BOUND_NAME_BYTES, &out->provider);
		else if (field.tag == WIRE_BYTES(4u) && !explained)
			taken = explained = read_explain(arena, field.bytes, &out->explain);
		if (!taken)
			return false;
	}
	return true;
}

static bool read_graph_explain_field(struct arena *arena, const struct wire_field *field, struct msg_node_explain **next, struct msg_graph_explain *out)
{
	switch (field->tag) {
	case WIRE_BYTES(1u):
		return read_node_explain(arena, field->bytes, (*next)++);
	case WIRE_VARINT(2u):
		out->node_count = (uint32_t)field->value;
		return true;
	case WIRE_VARINT(3u):
		out->dispatched = field->value != 0;
		return true;
	case WIRE_VARINT(4u):
		out->arena_bytes = field->value;
		return true;
	case WIRE_VARINT(5u):
		out->unshared_bytes = field->value;
		return true;
	case WIRE_VARINT(6u):
		out->prepare_ns = field->value;
		return true;
	case WIRE_VARINT(7u):
		out->width = (uint32_t)field->value;
		return true;
	default:
		return false;
	}
}

static bool read_graph_explain(struct arena *arena, struct wire in, const struct msg_graph_explain **out)
{
	uint32_t counts[PLAIN_NUMBERS];
	struct msg_graph_explain *explain = arena_zalloc(arena, sizeof *explain);
	if (explain == NULL || !plain_count_fields(in, counts) || counts[1] > BOUND_GRAPH_EXPLAIN)
		return false;
	struct msg_node_explain *next = arena_array(arena, counts[1], sizeof *next);
	if (next == NULL)
		return false;
	*out = explain;
	explain->count = counts[1];
	explain->nodes = next;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || !read_graph_explain_field(arena, &field, &next, explain))
			return false;
	}
	return true;
}

static bool read_new_explain(struct arena *arena, struct wire in, const struct msg_explain **out)
{
	struct msg_explain *explain = arena_zalloc(arena, sizeof *explain);
	*out = explain;
	return explain != NULL && read_explain(arena, in, explain);
}

struct reply_arrays {
	struct msg_result *next_output;
	struct msg_handle *next_state;
};

static bool read_run_reply_field(struct arena *arena, const struct wire_field *field, struct reply_arrays *arrays, struct msg_run_reply *out)
{
	switch (field->tag) {
	case WIRE_BYTES(1u):
		return plain_read_text(arena, field->bytes, BOUND_STR_BYTES, &out->provider);
	case WIRE_BYTES(2u):
		return read_result(arena, field->bytes, arrays->next_output++);
	case WIRE_BYTES(3u):
		return read_new_explain(arena, field->bytes, &out->explain);
	case WIRE_BYTES(4u):
		return plain_read_text(arena, field->bytes, BOUND_STR_BYTES, &out->uuid);
	case WIRE_BYTES(6u):
		return read_graph_explain(arena, field->bytes, &out->graph);
	case WIRE_BYTES(7u):
		return plain_read_handle(field->bytes, arrays->next_state++);
	default:
		return false;
	}
}

static bool read_run_reply(struct arena *arena, struct wire in, struct msg_run_reply *out)
{
	uint32_t counts[PLAIN_NUMBERS];
	if (!plain_count_fields(in, counts) || counts[2] > BOUND_OUTPUTS || counts[7] > BOUND_GRAPH_STATES || counts[3] > 1 || counts[6] > 1)
		return false;
	struct reply_arrays arrays = {arena_array(arena, counts[2], sizeof *arrays.next_output), arena_array(arena, counts[7], sizeof *arrays.next_state)};
	if (arrays.next_output == NULL || arrays.next_state == NULL)
		return false;
	out->provider = out->uuid = (struct msg_text){"", 0};
	out->output_count = counts[2];
	out->outputs = arrays.next_output;
	out->state_count = counts[7];
	out->states = arrays.next_state;
	while (in.at != in.end) {
		struct wire_field field;
		if (!wire_next(&in, &field) || !read_run_reply_field(arena, &field, &arrays, out))
			return false;
	}
	return true;
}

/* Of a success; a failure's reply is read once. */
static bool read_reply(struct arena *arena, struct wire in, struct msg_reply *out)
{
	struct wire_field field;
	out->message = (struct msg_text){"", 0};
	if (in.at == in.end || !wire_next(&in, &field) || in.at != in.end || field.tag != WIRE_BYTES(3u))
		return false;
	out->kind = MSG_REPLY_RUN;
	return read_run_reply(arena, field.bytes, &out->run);
}

bool plain_read_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_reply *out)
{
	const struct arena_mark mark = arena_mark(arena);
	struct msg_reply reply = {0};
	if (bytes == 0 || !read_reply(arena, (struct wire){envelope, envelope + bytes}, &reply)) {
		arena_rewind(arena, mark);
		return false;
	}
	*out = reply;
	return true;
}
