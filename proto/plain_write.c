/* Run, RunGraph and their reply, from messages to envelopes: fields in descending order, since a pen writes backwards. */
#include "proto/plain.h"

#include <string.h>

#include "proto/bounds.h"
#include "proto/wire.h"

static void write_text(struct pen *pen, uint32_t number, struct msg_text text)
{
	if (text.bytes != 0)
		pen_bytes(pen, number, text.data, text.bytes);
}

static void write_texts(struct pen *pen, uint32_t number, uint32_t count, const struct msg_text *texts)
{
	for (uint32_t i = count; i > 0; i--)
		pen_bytes(pen, number, texts[i - 1].data, texts[i - 1].bytes);
}

static void write_packed(struct pen *pen, uint32_t number, uint32_t count, const int64_t *values)
{
	if (count == 0)
		return;
	const uint8_t *end = pen->at;
	for (uint32_t i = count; i > 0; i--)
		pen_varint(pen, (uint64_t)values[i - 1]);
	pen_close(pen, number, end);
}

static void write_handle(struct pen *pen, uint32_t number, struct msg_handle handle)
{
	const uint8_t *end = pen->at;
	if (handle.generation != 0)
		pen_fixed64(pen, 2, handle.generation);
	pen_number(pen, 1, handle.index);
	pen_close(pen, number, end);
}

/* A message whose fields 1, 2, … are numbers. */
static void write_numbers(struct pen *pen, uint32_t number, uint32_t count, const uint64_t *values)
{
	const uint8_t *end = pen->at;
	for (uint32_t i = count; i > 0; i--)
		pen_number(pen, i, values[i - 1]);
	pen_close(pen, number, end);
}

#define WRITE_NUMBERS(pen, number, ...) \
	write_numbers((pen), (number), sizeof(uint64_t[]){__VA_ARGS__} / sizeof(uint64_t), (const uint64_t[]){__VA_ARGS__})

/* ---- Tensors and arguments ---- */

/* The members of the oneof, which lie around `donate`. */
static void write_source(struct pen *pen, const struct msg_tensor *in)
{
	switch (in->source) {
	case MSG_SOURCE_NONE:
	case MSG_SOURCE_GRAPH_INPUT:
	case MSG_SOURCE_NODE:
		break;
	case MSG_SOURCE_INLINE:
		pen_bytes(pen, 5, in->inlined.data, in->inlined.bytes);
		break;
	case MSG_SOURCE_PAYLOAD:
		WRITE_NUMBERS(pen, 6, in->payload.offset, in->payload.bytes);
		break;
	case MSG_SOURCE_HANDLE:
		write_handle(pen, 7, in->handle);
		break;
	case MSG_SOURCE_RESULT:
		WRITE_NUMBERS(pen, 8, in->result.request, in->result.output);
		break;
	case MSG_SOURCE_SHARED:
		WRITE_NUMBERS(pen, 9, in->shared.region, in->shared.offset, in->shared.bytes);
		break;
	}
}

static void write_tensor(struct pen *pen, uint32_t number, const struct msg_tensor *in)
{
	const uint8_t *end = pen->at;
	if (in->source == MSG_SOURCE_NODE)
		WRITE_NUMBERS(pen, 12, in->node.node, in->node.output);
	else if (in->source == MSG_SOURCE_GRAPH_INPUT)
		pen_member(pen, 11, in->graph_input);
	pen_number(pen, 10, in->donate);
	write_source(pen, in);
	pen_number(pen, 4, in->byte_offset);
	write_packed(pen, 3, in->strided ? in->rank : 0, in->strides);
	write_packed(pen, 2, in->rank, in->shape);
	pen_enum(pen, 1, (int)in->dtype);
	pen_close(pen, number, end);
}

static void write_tensors(struct pen *pen, uint32_t number, uint32_t count, const struct msg_tensor *in)
{
	const uint8_t *end = pen->at;
	for (uint32_t i = count; i > 0; i--)
		write_tensor(pen, 1, &in[i - 1]);
	pen_close(pen, number, end);
}

static void write_float(struct pen *pen, uint32_t number, double value)
{
	uint64_t bits;
	memcpy(&bits, &value, sizeof bits);
	pen_fixed64(pen, number, bits);
}

static void write_ints(struct pen *pen, uint32_t number, uint32_t count, const int64_t *ints)
{
	const uint8_t *end = pen->at;
	write_packed(pen, 1, count, ints);
	pen_close(pen, number, end);
}

static void write_value(struct pen *pen, const struct msg_arg *in)
{
	switch (in->kind) {
	case MSG_ARG_NONE:
		pen_bytes(pen, 9, NULL, 0);
		break;
	case MSG_ARG_TENSOR:
		write_tensor(pen, 2, in->tensor);
		break;
	case MSG_ARG_TENSORS:
		write_tensors(pen, 3, in->count, in->tensor);
		break;
	case MSG_ARG_INT:
		pen_member(pen, 4, (uint64_t)in->i);
		break;
	case MSG_ARG_FLOAT:
		write_float(pen, 5, in->f);
		break;
	case MSG_ARG_BOOL:
		pen_member(pen, 6, in->b);
		break;
	case MSG_ARG_STR:
		pen_bytes(pen, 7, in->str.data, in->str.bytes);
		break;
	case MSG_ARG_INTS:
		write_ints(pen, 8, in->count, in->ints);
		break;
	}
}

static void write_args(struct pen *pen, uint32_t number, uint32_t count, const struct msg_arg *in)
{
	for (uint32_t i = count; i > 0; i--) {
		const uint8_t *end = pen->at;
		write_value(pen, &in[i - 1]);
		write_text(pen, 1, in[i - 1].name);
		pen_close(pen, number, end);
	}
}

/* ---- Run and RunGraph ---- */

static void write_options(struct pen *pen, uint32_t number, const struct msg_run *in)
{
	for (uint32_t i = in->output_count; i > 0; i--) {
		const struct msg_output_option *option = &in->outputs[i - 1];
		const uint8_t *end = pen->at;
		if (option->shared.region != 0)
			WRITE_NUMBERS(pen, 3, option->shared.region, option->shared.offset, option->shared.bytes);
		pen_number(pen, 2, option->no_copy);
		pen_number(pen, 1, option->keep);
		pen_close(pen, number, end);
	}
}

static void write_list(struct pen *pen, uint32_t number, const struct msg_list *in)
{
	if (!in->present)
		return;
	const uint8_t *end = pen->at;
	write_texts(pen, 1, in->count, in->names);
	pen_close(pen, number, end);
}

static void write_run(struct pen *pen, const struct msg_run *in)
{
	const uint8_t *end = pen->at;
	pen_enum(pen, 14, (int)in->service_class);
	pen_number(pen, 13, in->inline_results);
	pen_number(pen, 12, in->uuid);
	pen_number(pen, 11, in->timeout_us);
	pen_number(pen, 10, in->allow_tf32);
	pen_number(pen, 9, in->retry);
	write_options(pen, 8, in);
	write_text(pen, 7, in->device);
	pen_number(pen, 6, in->explain);
	pen_enum(pen, 5, (int)in->mode);
	pen_number(pen, 4, in->strict);
	write_list(pen, 3, &in->priority);
	write_args(pen, 2, in->arg_count, in->args);
	write_text(pen, 1, in->op);
	pen_close(pen, 1, end);
}

static void write_run_graph(struct pen *pen, const struct msg_run *in)
{
	const uint8_t *end = pen->at;
	pen_enum(pen, 9, (int)in->service_class);
	pen_number(pen, 8, in->inline_results);
	pen_number(pen, 7, in->timeout_us);
	pen_number(pen, 6, in->explain);
	pen_enum(pen, 5, (int)in->mode);
	write_options(pen, 4, in);
	write_args(pen, 3, in->arg_count, in->args);
	pen_number(pen, 1, in->graph);
	pen_close(pen, 25, end);
}

/* ---- RunReply ---- */

static void write_results(struct pen *pen, uint32_t number, const struct msg_run_reply *in)
{
	for (uint32_t i = in->output_count; i > 0; i--) {
		const uint8_t *end = pen->at;
		if (in->outputs[i - 1].kept.generation != 0)
			write_handle(pen, 2, in->outputs[i - 1].kept);
		write_tensor(pen, 1, &in->outputs[i - 1].tensor);
		pen_close(pen, number, end);
	}
}

static void write_moves(struct pen *pen, uint32_t number, const struct msg_explain *in)
{
	for (uint32_t i = in->move_count; i > 0; i--) {
		const struct msg_move *move = &in->moves[i - 1];
		const uint8_t *end = pen->at;
		pen_number(pen, 4, move->bytes);
		write_text(pen, 3, move->to);
		write_text(pen, 2, move->from);
		write_text(pen, 1, move->operand);
		pen_close(pen, number, end);
	}
}

static void write_skips(struct pen *pen, uint32_t number, const struct msg_explain *in)
{
	for (uint32_t i = in->skip_count; i > 0; i--) {
		const struct msg_skip *skip = &in->skipped[i - 1];
		const uint8_t *end = pen->at;
		write_text(pen, 3, skip->reason);
		pen_number(pen, 2, (uint32_t)skip->code);
		write_text(pen, 1, skip->provider);
		pen_close(pen, number, end);
	}
}

static void write_explain(struct pen *pen, uint32_t number, const struct msg_explain *in)
{
	const uint8_t *end = pen->at;
	const struct msg_behind *behind = in->behind;
	pen_number(pen, 21, in->batched);
	if (behind != NULL)
		WRITE_NUMBERS(pen, 20, behind->own_jobs, behind->tenant_jobs, behind->other_jobs, behind->realtime_jobs, behind->interactive_jobs, behind->batch_jobs,
		              behind->own_ns, behind->tenant_ns, behind->other_ns, behind->running);
	write_text(pen, 8, in->narrowed);
	pen_number(pen, 7, in->on_loop);
	write_text(pen, 6, in->device);
	write_moves(pen, 5, in);
	WRITE_NUMBERS(pen, 4, in->times.decode, in->times.dispatch, in->times.queue, in->times.kernel, in->times.moves, in->times.pack,
	              in->times.receive);
	pen_enum(pen, 3, (int)in->level);
	write_texts(pen, 2, in->effective_count, in->effective);
	write_skips(pen, 1, in);
	pen_close(pen, number, end);
}

static void write_graph_explain(struct pen *pen, uint32_t number, const struct msg_graph_explain *in)
{
	const uint8_t *end = pen->at;
	pen_number(pen, 7, in->width);
	pen_number(pen, 6, in->prepare_ns);
	pen_number(pen, 5, in->unshared_bytes);
	pen_number(pen, 4, in->arena_bytes);
	pen_number(pen, 3, in->dispatched);
	pen_number(pen, 2, in->node_count);
	for (uint32_t i = in->count; i > 0; i--) {
		const struct msg_node_explain *node = &in->nodes[i - 1];
		const uint8_t *node_end = pen->at;
		write_explain(pen, 4, &node->explain);
		write_text(pen, 3, node->provider);
		write_text(pen, 2, node->op);
		write_text(pen, 1, node->node);
		pen_close(pen, 1, node_end);
	}
	pen_close(pen, number, end);
}

static void write_run_reply(struct pen *pen, const struct msg_run_reply *in)
{
	const uint8_t *end = pen->at;
	for (uint32_t i = in->state_count; i > 0; i--)
		write_handle(pen, 7, in->states[i - 1]);
	if (in->graph != NULL)
		write_graph_explain(pen, 6, in->graph);
	write_text(pen, 4, in->uuid);
	if (in->explain != NULL)
		write_explain(pen, 3, in->explain);
	write_results(pen, 2, in);
	write_text(pen, 1, in->provider);
	pen_close(pen, 3, end);
}

/* ---- Room ----
 *
 * What a message can take at the most, roughly: too little makes the pen full, and protobuf-c's way is taken; too much is the arena's for a while. */

#define MESSAGE_BYTES 64u /* any message's numbers and heads, without its texts, tensors and lists */
#define TENSOR_BYTES 64u
#define VARINT_BYTES 10u

static size_t room_of_tensors(uint32_t count, const struct msg_tensor *in)
{
	size_t bytes = 0;
	for (uint32_t i = 0; i < count; i++)
		bytes += TENSOR_BYTES + in[i].rank * VARINT_BYTES * (in[i].strided ? 2u : 1u) + (in[i].source == MSG_SOURCE_INLINE ? in[i].inlined.bytes : 0);
	return bytes;
}

static size_t room_of_args(uint32_t count, const struct msg_arg *in)
{
	size_t bytes = 0;
	for (uint32_t i = 0; i < count; i++) {
		bytes += MESSAGE_BYTES + in[i].name.bytes;
		if (in[i].kind == MSG_ARG_TENSOR || in[i].kind == MSG_ARG_TENSORS)
			bytes += room_of_tensors(in[i].kind == MSG_ARG_TENSOR ? 1 : in[i].count, in[i].tensor);
		else if (in[i].kind == MSG_ARG_INTS)
			bytes += in[i].count * (size_t)VARINT_BYTES;
		else if (in[i].kind == MSG_ARG_STR)
			bytes += in[i].str.bytes;
	}
	return bytes;
}

static size_t room_of_texts(uint32_t count, const struct msg_text *texts)
{
	size_t bytes = 0;
	for (uint32_t i = 0; i < count; i++)
		bytes += texts[i].bytes + VARINT_BYTES;
	return bytes;
}

static size_t room_of_run(const struct msg_run *in)
{
	return 2 * MESSAGE_BYTES + in->op.bytes + in->device.bytes + room_of_texts(in->priority.count, in->priority.names) +
	       in->output_count * (size_t)MESSAGE_BYTES + room_of_args(in->arg_count, in->args);
}

static size_t room_of_explain(const struct msg_explain *in)
{
	size_t bytes = 3 * MESSAGE_BYTES + in->device.bytes + in->narrowed.bytes + room_of_texts(in->effective_count, in->effective);
	for (uint32_t i = 0; i < in->skip_count; i++)
		bytes += MESSAGE_BYTES + in->skipped[i].provider.bytes + in->skipped[i].reason.bytes;
	for (uint32_t i = 0; i < in->move_count; i++)
		bytes += MESSAGE_BYTES + in->moves[i].operand.bytes + in->moves[i].from.bytes + in->moves[i].to.bytes;
	return bytes;
}

static size_t room_of_run_reply(const struct msg_run_reply *in)
{
	size_t bytes = 2 * MESSAGE_BYTES + in->provider.bytes + in->uuid.bytes + in->state_count * (size_t)MESSAGE_BYTES;
	for (uint32_t i = 0; i < in->output_count; i++)
		bytes += MESSAGE_BYTES + room_of_tensors(1, &in->outputs[i].tensor);
	if (in->explain != NULL)
		bytes += room_of_explain(in->explain);
	for (uint32_t i = 0; in->graph != NULL && i < in->graph->count; i++) {
		const struct msg_node_explain *node = &in->graph->nodes[i];
		bytes += MESSAGE_BYTES + node->node.bytes + node->op.bytes + node->provider.bytes + room_of_explain(&node->explain);
	}
	return bytes + (in->graph == NULL ? 0 : MESSAGE_BYTES);
}

/* ---- Envelopes ---- */

static bool pen_init(struct pen *pen, struct arena *arena, size_t bytes)
{
	if (bytes > BOUND_ENVELOPE_BYTES)
		return false;
	pen->start = arena_alloc(arena, FRAME_HEADER_BYTES + bytes);
	if (pen->start == NULL)
		return false;
	pen->start += FRAME_HEADER_BYTES;
	pen->at = pen->start + bytes;
	pen->full = false;
	return true;
}

/* The frame's header goes right in front of the envelope, wherever that begins. */
static struct codec_buffer pen_frame(const struct pen *pen, const uint8_t *end)
{
	return (struct codec_buffer){pen->at - FRAME_HEADER_BYTES, (size_t)(end - pen->at)};
}

bool plain_write_request(struct arena *arena, const struct msg_request *message, struct codec_buffer *out)
{
	const bool graph = message->kind == MSG_REQUEST_RUN_GRAPH;
	if (message->kind != MSG_REQUEST_RUN && (!graph || message->run.once != NULL))
		return false;
	const struct arena_mark mark = arena_mark(arena);
	struct pen pen;
	if (!pen_init(&pen, arena, room_of_run(&message->run)))
		return false;
	const uint8_t *end = pen.at;
	if (graph)
		write_run_graph(&pen, &message->run);
	else
		write_run(&pen, &message->run);
	if (pen.full) {
		arena_rewind(arena, mark);
		return false;
	}
	*out = pen_frame(&pen, end);
	return true;
}

bool plain_write_reply(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out)
{
	if (message->status != OPD_OK || message->message.bytes != 0 || message->retry_after_us != 0 || message->kind != MSG_REPLY_RUN)
		return false;
	const struct arena_mark mark = arena_mark(arena);
	struct pen pen;
	if (!pen_init(&pen, arena, room_of_run_reply(&message->run)))
		return false;
	const uint8_t *end = pen.at;
	write_run_reply(&pen, &message->run);
	if (pen.full) {
		arena_rewind(arena, mark);
		return false;
	}
	*out = pen_frame(&pen, end);
	return true;
}
