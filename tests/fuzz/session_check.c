/* A call that the daemon makes up, in several ways, one after the other: alone, again with operands and results that come and go otherwise, in a graph, with operands given away. What the first time succeeded
 * must succeed each time, but for want of memory, and give the same bytes; a handle that was given can be fetched, and has the bytes that the reply had. */
#include <stdio.h>

#include "proto/tensor.h"
#include "session.h"

#define ARGS_MAX 24u
#define RESULTS_MAX 4u
#define LIST_MAX 4u
#define PLACE_BYTES (PEER_SHARED_BYTES / 8) /* of an operand in shared memory, and of a result */
#define PAYLOAD_MAX 65536u

/* A reply, and what of it is in the arena. */
struct answer {
	struct msg_reply reply;
	const uint8_t *payload; /* NULL: in frames of its own */
};

/* A tensor's bytes; data NULL: they aren't known. */
struct bytes {
	const uint8_t *data;
	size_t bytes;
};

struct result {
	struct msg_tensor tensor; /* dtype and shape */
	struct msg_handle kept;
	struct bytes bytes;
};

struct check {
	struct arena *arena;
	struct peer *peer;
	struct fuzz_input *input;
	const struct schema *op;
	struct msg_text provider;
	struct msg_text list[2]; /* it, and native for what it doesn't do */
	uint32_t arg_count;
	struct msg_arg args[ARGS_MAX];
	struct bytes operands[ARGS_MAX]; /* of those that are one tensor */
	uint32_t result_count;
	struct result results[RESULTS_MAX]; /* of the first time */
	uint8_t payload[PAYLOAD_MAX];
	size_t payload_bytes;
};

/* ---- Asking ---- */

static void copy_answer(struct check *check, struct answer *answer)
{
	const struct peer_answer *from = &check->peer->answer;
	opd_error error;
	uint8_t *data = script_take(check->arena, from->envelope_bytes + from->payload_bytes + 1, 1);
	memcpy(data, from->data, from->envelope_bytes + from->payload_bytes);
	if (codec_decode_reply(check->arena, data, from->envelope_bytes, &answer->reply, &error) != OPD_OK)
		fuzz_fail("a reply can't be decoded: %s", error.text);
	answer->payload = from->chunked ? NULL : data + from->envelope_bytes;
}

/* False: it wasn't sent, or the connection has ended. */
static bool ask(struct check *check, const struct msg_request *request, struct answer *answer)
{
	struct peer *peer = check->peer;
	const size_t bytes = check->payload_bytes;
	check->payload_bytes = 0;
	if (peer->next_id == PEER_IDS)
		return false;
	peer->watched = peer->next_id;
	const uint64_t id = peer_request(peer, request, 0, bytes);
	peer_send(peer, check->payload, bytes);
	peer_wait(peer, id);
	while (!peer->ended && peer->answer.payload_bytes < peer->answer.payload_due)
		peer_turn(peer);
	if (peer->ended)
		return false;
	copy_answer(check, answer);
	return true;
}

/* What was right before: false when memory was missing, or a graph has nodes of several devices. */
static bool ask_again(struct check *check, const struct msg_request *request, const char *what, struct answer *answer)
{
	if (!ask(check, request, answer))
		return false;
	const opd_status status = answer->reply.status;
	if (status == OPD_RESOURCE_EXHAUSTED || (status == OPD_UNIMPLEMENTED && request->kind == MSG_REQUEST_RUN_GRAPH))
		return false;
	if (status != OPD_OK)
		fuzz_fail("%s of %s by %s: %s: %s", what, check->op->name, check->provider.data, opd_status_name(status), answer->reply.message.data);
	return true;
}

static struct bytes find_bytes(const struct check *check, const struct answer *answer, const struct msg_tensor *tensor)
{
	uint64_t bytes;
	if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &bytes))
		fuzz_fail("%s: a result has a shape that none can have", check->op->name);
	if (tensor->source == MSG_SOURCE_INLINE && tensor->inlined.bytes == bytes)
		return (struct bytes){tensor->inlined.data, bytes};
	if (tensor->source == MSG_SOURCE_PAYLOAD && tensor->payload.bytes == bytes)
		return (struct bytes){answer->payload == NULL ? NULL : answer->payload + tensor->payload.offset, bytes};
	if (tensor->source == MSG_SOURCE_SHARED && tensor->shared.bytes == bytes)
		return (struct bytes){check->peer->shared + tensor->shared.offset, bytes};
	return (struct bytes){NULL, bytes};
}

static bool fetch(struct check *check, const struct msg_tensor *tensor, const char *what, struct bytes *out)
{
	struct msg_tensor copy = *tensor;
	const struct msg_request request = {.kind = MSG_REQUEST_FETCH, .fetch.tensor = &copy};
	struct answer answer;
	if (!ask_again(check, &request, what, &answer) || answer.reply.run.output_count != 1)
		return false;
	*out = find_bytes(check, &answer, &answer.reply.run.outputs[0].tensor);
	return out->data != NULL;
}

static struct msg_tensor by_handle(struct msg_handle handle)
{
	return (struct msg_tensor){.source = MSG_SOURCE_HANDLE, .handle = handle};
}

static void give_back(struct check *check, struct msg_handle handle)
{
	struct msg_tensor tensor = by_handle(handle);
	const struct msg_request request = {.kind = MSG_REQUEST_FREE, .free = {1, &tensor}};
	struct answer answer;
	(void)ask(check, &request, &answer);
}

/* ---- Comparing ---- */

static void compare_bytes(const struct check *check, const char *what, uint32_t output, struct bytes expected, struct bytes found)
{
	if (expected.data == NULL || found.data == NULL)
		return;
	if (expected.bytes != found.bytes)
		fuzz_fail("%s: result %u of %s by %s has %zu bytes, before it had %zu", what, output, check->op->name, check->provider.data, found.bytes, expected.bytes);
	for (size_t i = 0; i < found.bytes; i++)
		if (expected.data[i] != found.data[i])
			fuzz_fail("%s: byte %zu of %zu of result %u of %s by %s is %02x, before it was %02x", what, i, found.bytes, output, check->op->name, check->provider.data,
			          found.data[i], expected.data[i]);
}

/* A reply's results, as they came and as they are kept; these are freed. */
static void compare(struct check *check, const char *what, const struct answer *answer, const struct result *expected, uint32_t count)
{
	const struct msg_run_reply *run = &answer->reply.run;
	if (run->output_count != count)
		fuzz_fail("%s of %s by %s has %u results, before it had %u", what, check->op->name, check->provider.data, run->output_count, count);
	for (uint32_t i = 0; i < count; i++) {
		struct bytes found = find_bytes(check, answer, &run->outputs[i].tensor);
		compare_bytes(check, what, i, expected[i].bytes, found);
		if (run->outputs[i].kept.generation == 0)
			continue;
		const struct msg_tensor kept = by_handle(run->outputs[i].kept);
		if (fetch(check, &kept, "a fetch of a result", &found))
			compare_bytes(check, what, i, expected[i].bytes, found);
		give_back(check, kept.handle);
	}
}

/* ---- The call ---- */

static bool is_plain(const struct msg_arg *arg)
{
	return arg->kind == MSG_ARG_TENSOR && arg->tensor->source == MSG_SOURCE_HANDLE && !arg->tensor->strided && arg->tensor->byte_offset == 0 && arg->tensor->dtype != OPD_DTYPE_NONE;
}

static bool make_call(struct check *check)
{
	struct msg_request request = {.kind = MSG_REQUEST_GENERATE};
	struct answer answer;
	script_pick_generate(check->arena, check->input, &request.generate);
	check->op = script_find_op(request.generate.op);
	if (!ask(check, &request, &answer) || answer.reply.status != OPD_OK || answer.reply.generated.count > ARGS_MAX)
		return false;
	check->arg_count = answer.reply.generated.count;
	memcpy(check->args, answer.reply.generated.args, check->arg_count * sizeof check->args[0]);
	for (uint32_t i = 0; i < check->arg_count; i++)
		if (is_plain(&check->args[i]) && !fetch(check, check->args[i].tensor, "a fetch of an operand", &check->operands[i]))
			return false;
	return true;
}

static struct msg_request make_run(struct check *check)
{
	struct msg_request request = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text(check->op->name), .arg_count = check->arg_count, .strict = true}};
	request.run.args = script_take(check->arena, check->arg_count, sizeof request.run.args[0]);
	memcpy(request.run.args, check->args, check->arg_count * sizeof check->args[0]);
	request.run.priority = (struct msg_list){true, 2, check->list};
	return request;
}

static bool run_first(struct check *check)
{
	struct msg_request request = make_run(check);
	struct msg_output_option options[RESULTS_MAX] = {{.keep = true}, {.keep = true}, {.keep = true}, {.keep = true}};
	struct answer answer;
	if (check->op->result_count > RESULTS_MAX)
		return false;
	request.run.outputs = options;
	request.run.output_count = check->op->result_count;
	if (!ask(check, &request, &answer) || answer.reply.status != OPD_OK)
		return false;
	check->result_count = answer.reply.run.output_count;
	for (uint32_t i = 0; i < check->result_count; i++) {
		const struct msg_result *made = &answer.reply.run.outputs[i];
		struct result *result = &check->results[i];
		*result = (struct result){made->tensor, made->kept, find_bytes(check, &answer, &made->tensor)};
		if (made->kept.generation == 0)
			fuzz_fail("result %u of %s was to be kept, and isn't", i, check->op->name);
		struct bytes found;
		const struct msg_tensor kept = by_handle(made->kept);
		if (fetch(check, &kept, "a fetch of the first result", &found))
			compare_bytes(check, "fetched", i, result->bytes, found);
	}
	return true;
}

/* ---- Again, otherwise ---- */

static void in_payload(struct check *check, struct msg_tensor *tensor, struct bytes from)
{
	tensor->source = MSG_SOURCE_PAYLOAD;
	tensor->payload.offset = check->payload_bytes;
	tensor->payload.bytes = from.bytes;
	memcpy(check->payload + check->payload_bytes, from.data, from.bytes);
	check->payload_bytes = (check->payload_bytes + from.bytes + 63) & ~(size_t)63;
}

static void in_shared(struct check *check, struct msg_tensor *tensor, uint32_t index, struct bytes from)
{
	tensor->source = MSG_SOURCE_SHARED;
	tensor->shared = (struct msg_shared_range){check->peer->region, (uint64_t)index * PLACE_BYTES, from.bytes};
	memcpy(check->peer->shared + tensor->shared.offset, from.data, from.bytes);
}

static void in_line(struct msg_tensor *tensor, struct bytes from)
{
	tensor->source = MSG_SOURCE_INLINE;
	tensor->inlined.data = from.data;
	tensor->inlined.bytes = from.bytes;
}

/* The same operand from elsewhere. */
static void bring_otherwise(struct check *check, struct msg_arg *arg, uint32_t index)
{
	const uint8_t byte = fuzz_u8(check->input);
	const struct bytes from = check->operands[index];
	struct msg_tensor *tensor = script_take(check->arena, 1, sizeof *tensor);
	if (!is_plain(arg) || from.data == NULL)
		return;
	*tensor = *arg->tensor;
	if (byte % 4 == 1)
		in_line(tensor, from);
	else if (byte % 4 == 2 && check->payload_bytes + from.bytes + 64 <= PAYLOAD_MAX)
		in_payload(check, tensor, from);
	else if (byte % 4 == 3 && check->peer->region != 0 && index < 4 && from.bytes <= PLACE_BYTES)
		in_shared(check, tensor, index, from);
	arg->tensor = tensor;
}

static struct msg_output_option *pick_results(struct check *check, uint32_t count)
{
	struct msg_output_option *options = script_take(check->arena, RESULTS_MAX, sizeof options[0]);
	for (uint32_t i = 0; i < count; i++) {
		const uint8_t byte = fuzz_u8(check->input);
		options[i].keep = byte % 2 != 0;
		options[i].no_copy = byte % 4 >= 2;
		if (byte % 8 >= 4 && !options[i].keep && check->peer->region != 0 && check->results[i].bytes.bytes <= PLACE_BYTES)
			options[i].shared = (struct msg_shared_range){check->peer->region, (4 + i) * (uint64_t)PLACE_BYTES, PLACE_BYTES};
	}
	return options;
}

static void run_again(struct check *check)
{
	struct msg_request request = make_run(check);
	struct answer answer;
	const uint8_t byte = fuzz_u8(check->input);
	for (uint32_t i = 0; i < check->arg_count; i++)
		bring_otherwise(check, &request.run.args[i], i);
	request.run.outputs = pick_results(check, check->result_count);
	request.run.output_count = check->result_count;
	request.run.inline_results = byte % 2 != 0;
	request.run.explain = byte % 4 >= 2;
	if (ask_again(check, &request, "a second run", &answer))
		compare(check, "run again", &answer, check->results, check->result_count);
}

/* Whether an operand may be given away is the daemon's to say. */
static void run_donating(struct check *check)
{
	struct msg_request request = make_run(check);
	const uint32_t index = check->arg_count == 0 ? 0 : fuzz_u8(check->input) % check->arg_count;
	struct answer answer;
	if (check->arg_count == 0 || !is_plain(&request.run.args[index]))
		return;
	request.run.args[index].tensor->donate = true;
	if (ask(check, &request, &answer) && answer.reply.status == OPD_OK)
		compare(check, "with an operand given away", &answer, check->results, check->result_count);
}

/* ---- In a graph ---- */

static void make_node(struct check *check, struct msg_graph *graph, struct msg_run *run)
{
	struct msg_graph_node *node = &graph->nodes[0];
	*node = (struct msg_graph_node){.op = msg_text(check->op->name), .arg_count = check->arg_count, .strict = true, .priority = {true, 2, check->list}};
	node->args = script_take(check->arena, check->arg_count, sizeof node->args[0]);
	memcpy(node->args, check->args, check->arg_count * sizeof check->args[0]);
	for (uint32_t i = 0; i < check->arg_count; i++) {
		if (node->args[i].kind != MSG_ARG_TENSOR)
			continue;
		struct msg_tensor *tensor = script_take(check->arena, 1, sizeof *tensor);
		struct msg_graph_input *input = &graph->inputs[graph->input_count];
		char *name = script_take(check->arena, 8, 1);
		(void)snprintf(name, 8, "i%u", graph->input_count);
		*input = (struct msg_graph_input){.name = msg_text(name)};
		tensor->source = MSG_SOURCE_GRAPH_INPUT;
		tensor->graph_input = graph->input_count++;
		run->args[run->arg_count] = check->args[i];
		run->args[run->arg_count].name = msg_text("");
		bring_otherwise(check, &run->args[run->arg_count++], i);
		node->args[i].tensor = tensor;
	}
	graph->node_count = 1;
}

/* An op of tensors alone, each the first result: alone, and in the graph's second node. False: it isn't one, or refuses them. */
static bool make_second(struct check *check, struct msg_graph *graph, struct result *expected)
{
	const struct schema *op = script_pick_op(check->input);
	struct msg_graph_node *node = &graph->nodes[1];
	struct msg_request alone = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text(op->name), .arg_count = op->param_count, .priority = {true, 2, check->list}}};
	struct answer answer;
	alone.run.args = script_take(check->arena, op->param_count, sizeof alone.run.args[0]);
	*node = (struct msg_graph_node){.op = msg_text(op->name), .arg_count = op->param_count, .priority = {true, 2, check->list}};
	node->args = script_take(check->arena, op->param_count, sizeof node->args[0]);
	for (uint32_t i = 0; i < op->param_count; i++) {
		if (schema_type_kind(op->params[i].type) != OPD_ARG_TENSOR)
			return false;
		alone.run.args[i] = node->args[i] = (struct msg_arg){.kind = MSG_ARG_TENSOR, .count = 1};
		alone.run.args[i].tensor = script_take(check->arena, 1, sizeof(struct msg_tensor));
		*alone.run.args[i].tensor = by_handle(check->results[0].kept);
		node->args[i].tensor = script_take(check->arena, 1, sizeof(struct msg_tensor));
		node->args[i].tensor->source = MSG_SOURCE_NODE;
	}
	if (op->result_count != 1 || !ask(check, &alone, &answer) || answer.reply.status != OPD_OK || answer.reply.run.output_count != 1)
		return false;
	*expected = (struct result){.bytes = find_bytes(check, &answer, &answer.reply.run.outputs[0].tensor)};
	graph->node_count = 2;
	return true;
}

static void run_graph(struct check *check)
{
	struct msg_graph graph = {.name = msg_text("check")};
	struct msg_request request = {.kind = MSG_REQUEST_RUN_GRAPH, .run = {.once = &graph}};
	struct result expected[RESULTS_MAX];
	struct answer answer;
	graph.inputs = script_take(check->arena, ARGS_MAX, sizeof graph.inputs[0]);
	graph.nodes = script_take(check->arena, 2, sizeof graph.nodes[0]);
	graph.outputs = script_take(check->arena, RESULTS_MAX, sizeof graph.outputs[0]);
	request.run.args = script_take(check->arena, ARGS_MAX, sizeof request.run.args[0]);
	const bool second = check->result_count != 0 && make_second(check, &graph, &expected[0]);
	if (!second)
		memcpy(expected, check->results, sizeof expected);
	check->payload_bytes = 0;
	make_node(check, &graph, &request.run);
	if (second) {
		graph.node_count = 2;
		graph.outputs[graph.output_count++].node = (struct msg_node_output){1, 0};
	}
	for (uint32_t i = 0; !second && i < check->result_count; i++)
		graph.outputs[graph.output_count++].node = (struct msg_node_output){0, i};
	request.run.outputs = pick_results(check, graph.output_count);
	request.run.output_count = graph.output_count;
	if (ask_again(check, &request, "a graph", &answer))
		compare(check, "in a graph", &answer, expected, graph.output_count);
}

/* ---- All of it ---- */

void script_check(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	static const char *const providers[] = {"native", "cpu", "testdev", "derived"};
	struct check *check = script_take(arena, 1, sizeof *check);
	peer_settle(peer);
	if (peer->rude || peer->ended)
		return;
	*check = (struct check){.arena = arena, .peer = peer, .input = input};
	const uint8_t byte = fuzz_u8(input);
	check->provider = check->list[0] = msg_text(providers[byte % 4]);
	check->list[1] = msg_text("native");
	const bool made = make_call(check);
	if (made && run_first(check)) {
		run_again(check);
		run_graph(check);
		if (byte >= 128)
			run_again(check);
		run_donating(check);
	}
	for (uint32_t i = 0; i < check->arg_count; i++)
		if (is_plain(&check->args[i]))
			give_back(check, check->args[i].tensor->handle);
	for (uint32_t i = 0; i < check->result_count; i++)
		give_back(check, check->results[i].kept);
}
