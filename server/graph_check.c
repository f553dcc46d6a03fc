/* What can be said of a graph without shapes: its nodes' ops and arguments, what they name, who donates what, in which order they
 * run. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/bind.h"
#include "server/graph.h"

#define SCRATCH_BYTES ((size_t)64 << 20)

struct checking {
	struct graph *graph;
	const struct snapshot *snapshot;
	const struct msg_graph *message;
	struct arena scratch; /* of one node's binding at a time */
	opd_error *error;
};

static opd_status out_of_memory(struct checking *check)
{
	return opd_fail(check->error, OPD_RESOURCE_EXHAUSTED, "graph '%s': out of memory", check->graph->name.data);
}

/* ---- Copying a node ---- */

static bool copy_text(struct arena *arena, struct msg_text in, struct msg_text *out)
{
	*out = (struct msg_text){arena_text(arena, in.data == NULL ? "" : in.data, in.bytes), in.bytes};
	return out->data != NULL;
}

static bool copy_bytes(struct arena *arena, const void *from, size_t bytes, void **to)
{
	*to = arena_alloc(arena, bytes);
	if (*to != NULL && bytes != 0)
		memcpy(*to, from, bytes);
	return *to != NULL;
}

static bool copy_arg(struct arena *arena, const struct msg_arg *in, struct msg_arg *out)
{
	void *copy = NULL;
	*out = *in;
	if (!copy_text(arena, in->name, &out->name))
		return false;
	switch (in->kind) {
	case MSG_ARG_TENSOR:
	case MSG_ARG_TENSORS:
		if (!copy_bytes(arena, in->tensor, (in->kind == MSG_ARG_TENSOR ? 1 : in->count) * sizeof in->tensor[0], &copy))
			return false;
		out->tensor = copy;
		return true;
	case MSG_ARG_INTS:
		if (!copy_bytes(arena, in->ints, in->count * sizeof in->ints[0], &copy))
			return false;
		out->ints = copy;
		return true;
	case MSG_ARG_STR:
		return copy_text(arena, in->str, &out->str);
	case MSG_ARG_NONE:
	case MSG_ARG_INT:
	case MSG_ARG_FLOAT:
	case MSG_ARG_BOOL:
		return true;
	}
	return true;
}

static bool copy_run(struct arena *arena, const struct msg_graph_node *in, struct msg_run *out)
{
	*out = (struct msg_run){.arg_count = in->arg_count, .strict = in->strict, .allow_tf32 = in->allow_tf32};
	out->args = arena_array(arena, in->arg_count, sizeof out->args[0]);
	bool copied = out->args != NULL && copy_text(arena, in->op, &out->op) && copy_text(arena, in->device, &out->device);
	for (uint32_t i = 0; copied && i < in->arg_count; i++)
		copied = copy_arg(arena, &in->args[i], &out->args[i]);
	if (!copied || !in->priority.present)
		return copied;
	struct msg_text *names = arena_array(arena, in->priority.count, sizeof names[0]);
	for (uint32_t i = 0; names != NULL && i < in->priority.count; i++)
		if (!copy_text(arena, in->priority.names[i], &names[i]))
			return false;
	out->priority = (struct msg_list){.present = true, .count = in->priority.count, .names = names};
	return names != NULL;
}

static bool copy_name(struct arena *arena, char letter, uint32_t number, struct msg_text in, struct msg_text *out)
{
	char made[16];
	if (in.bytes != 0)
		return copy_text(arena, in, out);
	int bytes = snprintf(made, sizeof made, "%c%u", letter, (unsigned)number);
	return copy_text(arena, (struct msg_text){made, (size_t)bytes}, out);
}

/* ---- One node ---- */

static opd_status add_node(struct checking *check, uint32_t index)
{
	struct graph *graph = check->graph;
	struct graph_node *node = &graph->nodes[index];
	const struct msg_graph_node *message = &check->message->nodes[index];
	if (!copy_name(&graph->arena, 'n', index, message->name, &node->name) || !copy_run(&graph->arena, message, &node->run))
		return out_of_memory(check);
	opd_status status = graph_check_name("node", node->name, check->error);
	if (status != OPD_OK)
		return status;
	const struct op *op = snapshot_find_op(check->snapshot, node->run.op, check->error);
	if (op == NULL)
		return graph_node_error(graph, index, OPD_NOT_FOUND, check->error);
	node->op_index = op->index;
	node->first_value = graph->value_count;
	node->result_count = op->schema->result_count;
	graph->value_count += node->result_count;
	if (message->priority.present)
		status = plist_check(check->snapshot, op, node->run.priority.names, node->run.priority.count, check->error);
	struct device_filter filter;
	if (status == OPD_OK && node->run.device.bytes != 0)
		status = device_filter_parse(node->run.device, &filter, check->error);
	return status == OPD_OK ? OPD_OK : graph_node_error(graph, index, status, check->error);
}

/* What an operand names is there. */
static opd_status check_source(struct checking *check, const struct operand *operand)
{
	const struct graph *graph = check->graph;
	const struct msg_tensor *source = operand->source;
	if (source->source == MSG_SOURCE_GRAPH_INPUT) {
		if (source->graph_input < graph->input_count)
			return OPD_OK;
		return opd_fail(check->error, OPD_NOT_FOUND, "%s names input %u, but the graph has %u", operand->param,
		                (unsigned)source->graph_input, (unsigned)graph->input_count);
	}
	if (source->source != MSG_SOURCE_NODE)
		return opd_fail(check->error, OPD_INVALID_ARGUMENT,
		                "%s names neither an input of the graph nor a node's output: bytes and handles come as inputs",
		                operand->param);
	if (source->node.node >= graph->node_count)
		return opd_fail(check->error, OPD_NOT_FOUND, "%s names node %u, but the graph has %u", operand->param,
		                (unsigned)source->node.node, (unsigned)graph->node_count);
	const struct graph_node *from = &graph->nodes[source->node.node];
	if (source->node.output < from->result_count)
		return OPD_OK;
	return opd_fail(check->error, OPD_NOT_FOUND, "%s names output %u of node '%s', but %s has %u", operand->param,
	                (unsigned)source->node.output, from->name.data, from->run.op.data, (unsigned)from->result_count);
}

static bool has_pair(const opd_op *def, uint32_t param)
{
	for (uint32_t i = 0; i < def->in_place_count; i++)
		if (def->in_place[i].param == param)
			return true;
	return false;
}

static bool same_source(const struct msg_tensor *a, const struct msg_tensor *b)
{
	if (a->source != b->source)
		return false;
	return a->source == MSG_SOURCE_NODE ? a->node.node == b->node.node && a->node.output == b->node.output
	                                    : a->graph_input == b->graph_input;
}

/* SEMANTICS 32 within a graph: a state or a node's output, once, in a pair of the op's, and nothing else of the node reads it. */
static opd_status check_donation(struct checking *check, uint32_t index, const struct bound *bound, const struct operand *operand)
{
	struct graph *graph = check->graph;
	const struct msg_tensor *source = operand->source;
	const struct op *op = bound->op;
	uint32_t *donated;
	bool paired = false;
	for (uint32_t i = 0; i < bound->call.arg_count; i++)
		paired = paired ||
		         (bound->args[i].kind == OPD_ARG_TENSOR && bound->args[i].tensor == &operand->tensor && has_pair(op->def, i));
	if (!paired)
		return opd_fail(check->error, OPD_INVALID_ARGUMENT, "%s can't be donated: %s has no result that may take its place",
		                operand->param, op->schema->name);
	if (source->strided || source->byte_offset != 0)
		return opd_fail(check->error, OPD_INVALID_ARGUMENT, "%s is donated as a view: a donated operand is a whole tensor",
		                operand->param);
	for (uint32_t i = 0; i < bound->operand_count; i++)
		if (&bound->operands[i] != operand && same_source(bound->operands[i].source, source))
			return opd_fail(check->error, OPD_INVALID_ARGUMENT, "%s is donated, and %s reads the same tensor", operand->param,
			                bound->operands[i].param);
	if (source->source == MSG_SOURCE_GRAPH_INPUT) {
		struct graph_input *input = &graph->inputs[source->graph_input];
		if (input->kind != MSG_GRAPH_STATE)
			return opd_fail(check->error, OPD_INVALID_ARGUMENT, "%s donates input '%s', which is no state", operand->param,
			                input->name.data);
		donated = &input->donated;
	} else {
		donated = &graph->values[graph_value_of(graph, source)].donated;
	}
	if (*donated != GRAPH_NONE)
		return opd_fail(check->error, OPD_INVALID_ARGUMENT, "%s is donated by node '%s' already", operand->param,
		                graph->nodes[*donated].name.data);
	*donated = index;
	return OPD_OK;
}

static opd_status check_node(struct checking *check, uint32_t index)
{
	struct graph_node *node = &check->graph->nodes[index];
	const struct op *op = &check->snapshot->ops[node->op_index];
	struct bound bound;
	arena_reset(&check->scratch);
	opd_status status = bind_args(&check->scratch, op, &node->run, &bound, check->error);
	for (uint32_t i = 0; status == OPD_OK && i < bound.operand_count; i++)
		status = check_source(check, &bound.operands[i]);
	for (uint32_t i = 0; status == OPD_OK && i < bound.operand_count; i++)
		if (bound.operands[i].source->donate)
			status = check_donation(check, index, &bound, &bound.operands[i]);
	return status == OPD_OK ? OPD_OK : graph_node_error(check->graph, index, status, check->error);
}

/* ---- Outputs ---- */

static opd_status add_output(struct checking *check, uint32_t index)
{
	struct graph *graph = check->graph;
	const struct msg_graph_output *message = &check->message->outputs[index];
	struct graph_output *output = &graph->outputs[index];
	if (!copy_name(&graph->arena, 'o', index, message->name, &output->name))
		return out_of_memory(check);
	opd_status status = graph_check_name("output", output->name, check->error);
	if (status != OPD_OK)
		return status;
	if (message->node.node >= graph->node_count)
		return opd_fail(check->error, OPD_NOT_FOUND, "graph '%s': output '%s' names node %u, but there are %u", graph->name.data,
		                output->name.data, (unsigned)message->node.node, (unsigned)graph->node_count);
	const struct graph_node *node = &graph->nodes[message->node.node];
	if (message->node.output >= node->result_count)
		return opd_fail(check->error, OPD_NOT_FOUND, "graph '%s': output '%s' names output %u of node '%s', but %s has %u",
		                graph->name.data, output->name.data, (unsigned)message->node.output, node->name.data, node->run.op.data,
		                (unsigned)node->result_count);
	output->value = node->first_value + message->node.output;
	struct graph_value *value = &graph->values[output->value];
	if (value->donated != GRAPH_NONE)
		return opd_fail(check->error, OPD_INVALID_ARGUMENT,
		                "graph '%s': output '%s' names a result of node '%s' that node '%s' donates", graph->name.data,
		                output->name.data, node->name.data, graph->nodes[value->donated].name.data);
	value->output = index;
	return OPD_OK;
}

static opd_status check_names(struct checking *check, const char *what, uint32_t count,
                              struct msg_text (*name)(const struct graph *, uint32_t))
{
	struct arena *scratch = &check->scratch;
	arena_reset(scratch);
	struct msg_text *names = arena_array(scratch, count, sizeof names[0]);
	if (names == NULL)
		return out_of_memory(check);
	for (uint32_t i = 0; i < count; i++)
		names[i] = name(check->graph, i);
	return graph_check_unique(scratch, what, names, count, check->error);
}

static struct msg_text node_name(const struct graph *graph, uint32_t index)
{
	return graph->nodes[index].name;
}

static struct msg_text output_name(const struct graph *graph, uint32_t index)
{
	return graph->outputs[index].name;
}

/* ---- */

static opd_status add_nodes(struct checking *check)
{
	struct graph *graph = check->graph;
	const struct msg_graph *message = check->message;
	if (message->node_count == 0 || message->node_count > BOUND_GRAPH_NODES)
		return opd_fail(check->error, message->node_count == 0 ? OPD_INVALID_ARGUMENT : OPD_RESOURCE_EXHAUSTED,
		                "graph '%s': %u nodes, expected 1 to %u", graph->name.data, (unsigned)message->node_count,
		                BOUND_GRAPH_NODES);
	graph->nodes = arena_array(&graph->arena, message->node_count, sizeof graph->nodes[0]);
	graph->order = arena_array(&graph->arena, message->node_count, sizeof graph->order[0]);
	if (graph->nodes == NULL || graph->order == NULL)
		return out_of_memory(check);
	graph->node_count = message->node_count;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < message->node_count; i++)
		status = add_node(check, i);
	return status == OPD_OK ? check_names(check, "node", graph->node_count, node_name) : status;
}

static opd_status add_values(struct checking *check)
{
	struct graph *graph = check->graph;
	graph->values = arena_array(&graph->arena, graph->value_count, sizeof graph->values[0]);
	if (graph->values == NULL)
		return out_of_memory(check);
	for (uint32_t n = 0; n < graph->node_count; n++)
		for (uint32_t k = 0; k < graph->nodes[n].result_count; k++)
			graph->values[graph->nodes[n].first_value + k] = (struct graph_value){n, GRAPH_NONE, GRAPH_NONE};
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < graph->node_count; i++)
		status = check_node(check, i);
	return status;
}

static opd_status add_outputs(struct checking *check)
{
	struct graph *graph = check->graph;
	uint32_t count = check->message->output_count;
	if (count > BOUND_OUTPUTS)
		return opd_fail(check->error, OPD_RESOURCE_EXHAUSTED, "graph '%s': %u outputs, at most %u", graph->name.data,
		                (unsigned)count, BOUND_OUTPUTS);
	graph->outputs = arena_array(&graph->arena, count, sizeof graph->outputs[0]);
	if (graph->outputs == NULL)
		return out_of_memory(check);
	graph->output_count = count;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < count; i++)
		status = add_output(check, i);
	return status == OPD_OK ? check_names(check, "output", count, output_name) : status;
}

opd_status graph_check(struct graph *graph, const struct snapshot *snapshot, const struct msg_graph *message, opd_error *error)
{
	struct checking check = {.graph = graph, .snapshot = snapshot, .message = message, .error = error};
	arena_init(&check.scratch, SCRATCH_BYTES);
	opd_status status = add_nodes(&check);
	if (status == OPD_OK)
		status = add_values(&check);
	if (status == OPD_OK)
		status = add_outputs(&check);
	if (status == OPD_OK)
		status = graph_order(graph, error);
	arena_fini(&check.scratch);
	return status;
}
