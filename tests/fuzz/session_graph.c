/* Graphs of a few nodes whose operands nearly fit, and runs of them: right and wrong names, views, donations, states that are
 * bound to what is there. */
#include "session.h"

#define NODES_MAX 6u
#define INPUTS_MAX 4u

/* An input of the graph or a node's output, mostly one that is there; whole, or a view. */
static void pick_value(struct fuzz_input *input, const struct msg_graph *graph, struct msg_tensor *tensor)
{
	uint8_t byte = fuzz_u8(input);
	bool view = byte % 8 == 7;
	if (byte % 2 == 0) {
		tensor->source = MSG_SOURCE_GRAPH_INPUT;
		tensor->graph_input = byte < 250 ? (byte / 2) % (graph->input_count + 1) : byte;
	} else {
		tensor->source = MSG_SOURCE_NODE;
		tensor->node = (struct msg_node_output){(byte / 2) % graph->node_count, byte >= 240 ? byte : byte % 16 == 1};
	}
	tensor->donate = byte % 5 == 4;
	if (!view) {
		tensor->dtype = OPD_DTYPE_NONE;
		tensor->rank = 0;
		tensor->strided = false;
		tensor->byte_offset = 0;
	}
}

static void pick_node(struct arena *arena, struct peer *peer, struct fuzz_input *input, const struct msg_graph *graph,
                      struct msg_graph_node *node)
{
	const struct schema *op = script_pick_op(input);
	uint8_t byte = fuzz_u8(input);
	uint64_t payload = 0;
	node->op = msg_text(op->name);
	node->arg_count = byte < 240 ? op->param_count : byte % (op->param_count + 1);
	node->args = script_take(arena, op->param_count, sizeof node->args[0]);
	for (uint32_t i = 0; i < node->arg_count; i++) {
		struct msg_arg *arg = &node->args[i];
		script_pick_arg(arena, peer, input, op->params[i].type, arg, &payload);
		for (uint32_t k = 0; (arg->kind == MSG_ARG_TENSOR || arg->kind == MSG_ARG_TENSORS) && k < arg->count && byte != 239; k++)
			pick_value(input, graph, &arg->tensor[k]);
	}
	struct msg_text *names = script_take(arena, 1, sizeof names[0]);
	names[0] = msg_text(byte % 3 == 0 ? "cpu" : "native");
	node->priority = (struct msg_list){byte % 4 == 0, byte % 8 == 0, names};
	node->strict = byte % 16 == 0;
}

static void pick_inputs(struct peer *peer, struct fuzz_input *input, struct msg_graph *graph)
{
	static const char *const names[INPUTS_MAX] = {"a", "b", "c", "d"};
	for (uint32_t i = 0; i < graph->input_count; i++) {
		uint8_t byte = fuzz_u8(input);
		struct msg_graph_input *made = &graph->inputs[i];
		made->name = msg_text(byte == 255 ? "a" : names[i]);
		made->kind = (msg_graph_kind)(byte % 3);
		if (made->kind == MSG_GRAPH_INPUT)
			continue;
		made->tensor.source = MSG_SOURCE_HANDLE;
		made->tensor.handle =
		    peer->handle_count == 0 ? (struct msg_handle){byte, byte} : peer->handles[byte % peer->handle_count].handle;
	}
}

static void pick_graph(struct arena *arena, struct peer *peer, struct fuzz_input *input, struct msg_graph *graph)
{
	uint8_t byte = fuzz_u8(input);
	*graph = (struct msg_graph){.name = msg_text(byte % 32 == 31 ? "a b" : "g"),
	                            .input_count = byte % (INPUTS_MAX + 1),
	                            .node_count = 1 + byte % NODES_MAX,
	                            .output_count = byte % 3};
	graph->inputs = script_take(arena, INPUTS_MAX, sizeof graph->inputs[0]);
	graph->nodes = script_take(arena, NODES_MAX, sizeof graph->nodes[0]);
	graph->outputs = script_take(arena, 3, sizeof graph->outputs[0]);
	pick_inputs(peer, input, graph);
	for (uint32_t i = 0; i < graph->node_count; i++)
		pick_node(arena, peer, input, graph, &graph->nodes[i]);
	for (uint32_t i = 0; i < graph->output_count; i++)
		graph->outputs[i].node = (struct msg_node_output){fuzz_u8(input) % graph->node_count, 0};
}

static void run_graph(struct arena *arena, struct peer *peer, struct fuzz_input *input, uint64_t id, const struct msg_graph *once)
{
	uint8_t byte = fuzz_u8(input);
	uint64_t payload = 0;
	struct msg_output_option *options = script_take(arena, 2, sizeof options[0]);
	struct msg_request request = {.kind = MSG_REQUEST_RUN_GRAPH,
	                              .run = {.graph = once == NULL ? id : 0, .once = once, .outputs = options}};
	options[0] = (struct msg_output_option){.keep = byte % 2 != 0, .no_copy = byte % 3 == 0};
	request.run.output_count = byte % 4 == 0;
	request.run.explain = byte % 5 == 0;
	request.run.inline_results = byte % 7 == 0;
	request.run.mode = byte % 13 == 0 ? MSG_DRY : byte % 17 == 0 ? MSG_FAKE : MSG_RUN;
	request.run.timeout_us = byte % 23 == 0 ? byte : 0;
	request.run.arg_count = byte % (INPUTS_MAX + 1);
	request.run.args = script_take(arena, INPUTS_MAX, sizeof request.run.args[0]);
	beside_run(peer, &request.run, options);
	for (uint32_t i = 0; i < request.run.arg_count; i++)
		script_pick_arg(arena, peer, input, SCHEMA_TENSOR, &request.run.args[i], &payload);
	(void)script_send_run(peer, &request, payload, byte % 4 == 3);
}

void script_graph(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	uint8_t byte = fuzz_u8(input);
	struct msg_request request = {.kind = MSG_REQUEST_REGISTER_GRAPH};
	pick_graph(arena, peer, input, &request.graph);
	if (byte % 8 == 0) {
		run_graph(arena, peer, input, 0, &request.graph);
		return;
	}
	uint64_t id = script_send_run(peer, &request, 0, false);
	for (uint32_t i = 0; i < byte % 4u; i++)
		run_graph(arena, peer, input, byte == 255 ? byte : id, NULL);
	if (byte % 16 == 1)
		return;
	request = (struct msg_request){.kind = MSG_REQUEST_FREE_GRAPH, .graph_id = id};
	(void)script_send_run(peer, &request, 0, false);
}
