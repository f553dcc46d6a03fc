/* Describing, registering and running graphs. A graph is the wire's message being built: everything in it is copied but kept tensors' names. */
#include <stdlib.h>

#include "client/connection.h"
#include "client/request.h"
#include "proto/bounds.h"
#include "proto/text.h"

#define GRAPH_ARENA_BYTES ((size_t)256 << 20)

struct opd_graph {
	struct arena arena;
	opd_error error; /* the first thing that went wrong */
	struct msg_graph message;
	uint32_t input_room;
	uint32_t node_room;
	uint32_t output_room;
};

OPD_PRINTF(3, 4)
static void graph_fail(opd_graph *graph, opd_status status, const char *format, ...)
{
	if (graph->error.status != OPD_OK)
		return;
	va_list args;
	va_start(args, format);
	graph->error.status = (int32_t)status;
	(void)vsnprintf(graph->error.text, sizeof graph->error.text, format, args);
	va_end(args);
}

static void graph_fail_memory(opd_graph *graph)
{
	graph_fail(graph, OPD_RESOURCE_EXHAUSTED, "graph: out of memory");
}

/* False: remembered. */
static bool copy_text(opd_graph *graph, const char *what, const char *text, struct msg_text *out)
{
	const size_t bytes = text == NULL ? 0 : strlen(text);
	if (bytes > BOUND_NAME_BYTES || !text_valid(text == NULL ? "" : text, bytes)) {
		graph_fail(graph, OPD_INVALID_ARGUMENT, "graph: %s's name has %zu bytes, expected UTF-8 of at most %u", what, bytes, BOUND_NAME_BYTES);
		return false;
	}
	*out = (struct msg_text){bytes == 0 ? "" : arena_text(&graph->arena, text, bytes), bytes};
	if (out->data == NULL)
		graph_fail_memory(graph);
	return out->data != NULL;
}

/* The array with room for one more; NULL: remembered. */
static void *grow(opd_graph *graph, void *array, uint32_t count, uint32_t bound, uint32_t *room, size_t element_bytes, const char *what)
{
	if (graph->error.status != OPD_OK)
		return NULL;
	if (count == bound) {
		graph_fail(graph, OPD_INVALID_ARGUMENT, "graph: more than %u %ss", bound, what);
		return NULL;
	}
	if (count < *room)
		return array;
	const uint32_t larger = *room == 0 ? 16 : *room * 2;
	void *grown = arena_array(&graph->arena, larger, element_bytes);
	if (grown == NULL) {
		graph_fail_memory(graph);
		return NULL;
	}
	if (count != 0)
		memcpy(grown, array, count * element_bytes);
	*room = larger;
	return grown;
}

opd_graph *opd_graph_create(const char *name)
{
	opd_graph *graph = calloc(1, sizeof *graph);
	if (graph == NULL)
		return NULL;
	arena_init(&graph->arena, GRAPH_ARENA_BYTES);
	(void)copy_text(graph, "the graph", name, &graph->message.name);
	return graph;
}

void opd_graph_destroy(opd_graph *graph)
{
	if (graph == NULL)
		return;
	arena_fini(&graph->arena);
	free(graph);
}

/* ---- Describing ---- */

static opd_value add_input(opd_graph *graph, const char *name, msg_graph_kind kind, opd_handle handle)
{
	struct msg_graph *message = &graph->message;
	const opd_value value = {OPD_GRAPH_INPUT, message->input_count};
	struct msg_graph_input *inputs =
	    grow(graph, message->inputs, message->input_count, BOUND_GRAPH_INPUTS, &graph->input_room, sizeof *inputs, "input");
	if (inputs == NULL)
		return value;
	message->inputs = inputs;
	struct msg_graph_input *input = &inputs[message->input_count];
	*input = (struct msg_graph_input){.kind = kind};
	if (kind != MSG_GRAPH_INPUT) {
		input->tensor.source = MSG_SOURCE_HANDLE;
		input->tensor.handle = (struct msg_handle){handle.index, handle.generation};
	}
	if (copy_text(graph, "an input", name, &input->name))
		message->input_count++;
	return value;
}

opd_value opd_graph_input(opd_graph *graph, const char *name)
{
	return add_input(graph, name, MSG_GRAPH_INPUT, (opd_handle){0});
}

opd_value opd_graph_state(opd_graph *graph, const char *name, opd_handle handle)
{
	return add_input(graph, name, MSG_GRAPH_STATE, handle);
}

opd_value opd_graph_constant(opd_graph *graph, const char *name, opd_handle handle)
{
	return add_input(graph, name, MSG_GRAPH_CONSTANT, handle);
}

static bool copy_value(opd_graph *graph, const struct msg_arg *from, struct msg_arg *to)
{
	const bool tensors = from->kind == MSG_ARG_TENSOR || from->kind == MSG_ARG_TENSORS;
	const void *data = tensors ? (const void *)from->tensor : from->kind == MSG_ARG_INTS ? (const void *)from->ints : from->str.data;
	const size_t bytes = tensors ? (from->kind == MSG_ARG_TENSOR ? 1 : from->count) * sizeof *from->tensor
	                     : from->kind == MSG_ARG_INTS ? from->count * sizeof *from->ints
	                                                  : from->str.bytes;
	*to = *from;
	to->name.data = arena_text(&graph->arena, from->name.data == NULL ? "" : from->name.data, from->name.bytes);
	if (to->name.data == NULL)
		return false;
	if (!tensors && from->kind != MSG_ARG_INTS && from->kind != MSG_ARG_STR)
		return true;
	void *copy = arena_zalloc(&graph->arena, bytes + 1);
	if (copy == NULL)
		return false;
	if (bytes != 0)
		memcpy(copy, data, bytes);
	if (tensors)
		to->tensor = copy;
	else if (from->kind == MSG_ARG_INTS)
		to->ints = copy;
	else
		to->str.data = copy;
	return true;
}

static bool copy_list(opd_graph *graph, const struct msg_list *from, struct msg_list *to)
{
	struct msg_text *names = arena_array(&graph->arena, from->count, sizeof *names);
	for (uint32_t i = 0; names != NULL && i < from->count; i++)
		if (!copy_text(graph, "a provider", from->names[i].data, &names[i]))
			return false;
	*to = (struct msg_list){.present = from->present, .count = from->count, .names = names};
	return names != NULL;
}

static bool copy_node(opd_graph *graph, const opd_request *request, struct msg_graph_node *node)
{
	const struct msg_run *run = &request->message.run;
	node->strict = run->strict;
	node->allow_tf32 = run->allow_tf32;
	node->arg_count = run->arg_count;
	node->args = arena_array(&graph->arena, run->arg_count, sizeof *node->args);
	bool copied = node->args != NULL && copy_text(graph, "an op", run->op.data, &node->op) &&
	              copy_text(graph, "a device", run->device.data, &node->device) && copy_list(graph, &run->priority, &node->priority);
	for (uint32_t i = 0; copied && i < run->arg_count; i++)
		copied = copy_value(graph, &run->args[i], &node->args[i]);
	return copied;
}

opd_value opd_graph_node(opd_graph *graph, const char *name, const opd_request *request)
{
	struct msg_graph *message = &graph->message;
	const opd_value value = {message->node_count, 0};
	const char *op = request->message.run.op.data;
	if (request->error.status != OPD_OK)
		graph_fail(graph, (opd_status)request->error.status, "%s", request->error.text);
	else if (request->host_count != 0)
		graph_fail(graph, OPD_INVALID_ARGUMENT, "graph: node '%s' (%s) has an operand in host memory: give it as an input of the graph",
		           name == NULL ? "" : name, op);
	struct msg_graph_node *nodes = grow(graph, message->nodes, message->node_count, BOUND_GRAPH_NODES, &graph->node_room, sizeof *nodes, "node");
	if (nodes == NULL)
		return value;
	message->nodes = nodes;
	struct msg_graph_node *node = &nodes[message->node_count];
	*node = (struct msg_graph_node){0};
	if (!copy_text(graph, "a node", name, &node->name))
		return value;
	if (copy_node(graph, request, node))
		message->node_count++;
	else
		graph_fail_memory(graph);
	return value;
}

void opd_graph_output(opd_graph *graph, const char *name, opd_value value)
{
	struct msg_graph *message = &graph->message;
	struct msg_graph_output *outputs =
	    grow(graph, message->outputs, message->output_count, BOUND_OUTPUTS, &graph->output_room, sizeof *outputs, "output");
	if (outputs == NULL)
		return;
	message->outputs = outputs;
	if (value.node == OPD_GRAPH_INPUT) {
		graph_fail(graph, OPD_INVALID_ARGUMENT, "graph: output '%s' is an input: outputs are what nodes give", name == NULL ? "" : name);
		return;
	}
	struct msg_graph_output *output = &outputs[message->output_count];
	output->node = (struct msg_node_output){value.node, value.output};
	if (copy_text(graph, "an output", name, &output->name))
		message->output_count++;
}

opd_status graph_description(const opd_graph *graph, const struct msg_graph **graph_out, opd_error *error)
{
	if (graph->error.status != OPD_OK)
		return opd_fail(error, (opd_status)graph->error.status, "%s", graph->error.text);
	*graph_out = &graph->message;
	return OPD_OK;
}

/* ---- Registering ---- */

opd_status opd_graph_register(opd_client *client, opd_graph *graph, uint64_t *id_out, opd_error *error)
{
	const struct msg_graph *description = NULL;
	opd_status status = graph_description(graph, &description, error);
	if (status != OPD_OK)
		return status;
	const struct msg_request message = {.kind = MSG_REQUEST_REGISTER_GRAPH, .graph = *description};
	opd_result *result;
	status = client_call(client, &message, MSG_REPLY_REGISTERED, &result, error);
	if (status != OPD_OK)
		return status;
	*id_out = result->reply.registered.graph;
	opd_result_destroy(result);
	return OPD_OK;
}

opd_status opd_graph_free(opd_client *client, uint64_t id, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_FREE_GRAPH, .graph_id = id};
	opd_result *result;
	opd_status status = client_call(client, &message, MSG_REPLY_EMPTY, &result, error);
	if (status == OPD_OK)
		opd_result_destroy(result);
	return status;
}

/* ---- Running ---- */

opd_request *opd_request_graph(uint64_t id)
{
	char name[32];
	(void)snprintf(name, sizeof name, "graph %llu", (unsigned long long)id);
	opd_request *request = opd_request_create(name);
	if (request == NULL)
		return NULL;
	request->message.kind = MSG_REQUEST_RUN_GRAPH;
	request->message.run.graph = id;
	return request;
}

opd_request *opd_request_once(const opd_graph *graph)
{
	opd_request *request = opd_request_create(graph->message.name.bytes == 0 ? "graph" : graph->message.name.data);
	if (request == NULL)
		return NULL;
	request->message.kind = MSG_REQUEST_RUN_GRAPH;
	request->once = graph;
	return request;
}
