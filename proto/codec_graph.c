/* Graphs, both ways: their description, a run of one, and what its reply says beside results. */
#include "proto/codec_internal.h"

/* ---- Reading ---- */

static opd_status read_graph_input(struct reader *reader, const Opd__V1__GraphInput *in, struct msg_graph_input *out)
{
	if ((int)in->kind < MSG_GRAPH_INPUT || (int)in->kind > MSG_GRAPH_CONSTANT)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "kind %d, expected 0 (input), 1 (state) or 2 (constant)",
		                (int)in->kind);
	out->kind = (msg_graph_kind)in->kind;
	opd_status status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	if (status == OPD_OK && in->tensor != NULL)
		status = read_tensor(reader, in->tensor, &out->tensor);
	return status;
}

static opd_status read_graph_inputs(struct reader *reader, const Opd__V1__Graph *in, struct msg_graph *out)
{
	opd_status status = read_count(reader, "graph inputs", in->n_inputs, BOUND_GRAPH_INPUTS);
	if (status != OPD_OK)
		return status;
	out->inputs = arena_array(reader->arena, in->n_inputs, sizeof *out->inputs);
	if (out->inputs == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_inputs; i++) {
		status = read_graph_input(reader, in->inputs[i], &out->inputs[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "graph inputs[%zu]", i);
	}
	out->input_count = (uint32_t)in->n_inputs;
	return OPD_OK;
}

static opd_status read_graph_node(struct reader *reader, const Opd__V1__GraphNode *in, struct msg_graph_node *out)
{
	out->strict = in->strict;
	out->allow_tf32 = in->allow_tf32;
	opd_status status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	if (status == OPD_OK)
		status = read_text(reader, "op", in->op, BOUND_NAME_BYTES, &out->op);
	if (status == OPD_OK)
		status = read_text(reader, "device", in->device, BOUND_NAME_BYTES, &out->device);
	if (status == OPD_OK)
		status = read_list(reader, in->priority, &out->priority);
	if (status == OPD_OK)
		status = read_args(reader, in->n_args, in->args, &out->arg_count, &out->args);
	return status;
}

static opd_status read_graph_nodes(struct reader *reader, const Opd__V1__Graph *in, struct msg_graph *out)
{
	opd_status status = read_count(reader, "graph nodes", in->n_nodes, BOUND_GRAPH_NODES);
	if (status != OPD_OK)
		return status;
	out->nodes = arena_array(reader->arena, in->n_nodes, sizeof *out->nodes);
	if (out->nodes == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_nodes; i++) {
		status = read_graph_node(reader, in->nodes[i], &out->nodes[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "graph nodes[%zu]", i);
	}
	out->node_count = (uint32_t)in->n_nodes;
	return OPD_OK;
}

static opd_status read_graph_outputs(struct reader *reader, const Opd__V1__Graph *in, struct msg_graph *out)
{
	opd_status status = read_count(reader, "graph outputs", in->n_outputs, BOUND_OUTPUTS);
	if (status != OPD_OK)
		return status;
	out->outputs = arena_array(reader->arena, in->n_outputs, sizeof *out->outputs);
	if (out->outputs == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_outputs; i++) {
		const Opd__V1__GraphOutput *output = in->outputs[i];
		if (output->node != NULL)
			out->outputs[i].node = (struct msg_node_output){output->node->node, output->node->output};
		status = read_text(reader, "graph output's name", output->name, BOUND_NAME_BYTES, &out->outputs[i].name);
		if (status != OPD_OK)
			return status;
	}
	out->output_count = (uint32_t)in->n_outputs;
	return OPD_OK;
}

opd_status read_graph(struct reader *reader, const Opd__V1__Graph *in, struct msg_graph *out)
{
	if (in == NULL)
		return OPD_OK; /* one without nodes: the server says so */
	opd_status status = read_text(reader, "graph name", in->name, BOUND_NAME_BYTES, &out->name);
	if (status == OPD_OK)
		status = read_graph_inputs(reader, in, out);
	if (status == OPD_OK)
		status = read_graph_nodes(reader, in, out);
	if (status == OPD_OK)
		status = read_graph_outputs(reader, in, out);
	return status;
}

opd_status read_run_graph(struct reader *reader, const Opd__V1__RunGraph *in, struct msg_run *out)
{
	out->graph = in->graph;
	out->explain = in->explain;
	out->timeout_us = in->timeout_us;
	out->inline_results = in->inline_results;
	opd_status status = read_mode(reader, (int)in->mode, &out->mode);
	if (status == OPD_OK)
		status = read_service_class(reader, (int)in->service_class, &out->service_class);
	if (status == OPD_OK)
		status = read_args(reader, in->n_inputs, in->inputs, &out->arg_count, &out->args);
	if (status == OPD_OK)
		status = read_output_options(reader, in->n_outputs, in->outputs, out);
	if (status != OPD_OK || in->once == NULL)
		return status;
	struct msg_graph *once = arena_zalloc(reader->arena, sizeof *once);
	out->once = once;
	return once == NULL ? read_full(reader) : read_graph(reader, in->once, once);
}

static opd_status read_graph_explain(struct reader *reader, const Opd__V1__GraphExplain *in, struct msg_graph_explain *out)
{
	out->node_count = in->node_count;
	out->dispatched = in->dispatched;
	out->arena_bytes = in->arena_bytes;
	out->unshared_bytes = in->unshared_bytes;
	out->prepare_ns = in->prepare_ns;
	out->width = in->width;
	opd_status status = read_count(reader, "explained nodes", in->n_nodes, BOUND_GRAPH_EXPLAIN);
	if (status != OPD_OK)
		return status;
	struct msg_node_explain *nodes = arena_array(reader->arena, in->n_nodes, sizeof *nodes);
	if (nodes == NULL)
		return read_full(reader);
	for (size_t i = 0; status == OPD_OK && i < in->n_nodes; i++) {
		const Opd__V1__NodeExplain *node = in->nodes[i];
		status = read_text(reader, "node", node->node, BOUND_NAME_BYTES, &nodes[i].node);
		if (status == OPD_OK)
			status = read_text(reader, "op", node->op, BOUND_NAME_BYTES, &nodes[i].op);
		if (status == OPD_OK)
			status = read_text(reader, "provider", node->provider, BOUND_NAME_BYTES, &nodes[i].provider);
		if (status == OPD_OK && node->explain != NULL)
			status = read_explain(reader, node->explain, &nodes[i].explain);
	}
	out->count = (uint32_t)in->n_nodes;
	out->nodes = nodes;
	return status;
}

opd_status read_graph_reply(struct reader *reader, const Opd__V1__RunReply *in, struct msg_run_reply *out)
{
	opd_status status = read_count(reader, "states", in->n_states, BOUND_GRAPH_STATES);
	if (status != OPD_OK)
		return status;
	struct msg_handle *states = arena_array(reader->arena, in->n_states, sizeof *states);
	if (states == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_states; i++)
		states[i] = (struct msg_handle){in->states[i]->index, in->states[i]->generation};
	out->state_count = (uint32_t)in->n_states;
	out->states = states;
	if (in->graph == NULL)
		return OPD_OK;
	struct msg_graph_explain *explain = arena_zalloc(reader->arena, sizeof *explain);
	out->graph = explain;
	return explain == NULL ? read_full(reader) : read_graph_explain(reader, in->graph, explain);
}

/* ---- Writing ---- */

static Opd__V1__GraphInput *write_graph_input(struct arena *arena, const struct msg_graph_input *in)
{
	Opd__V1__GraphInput *out = write_new(arena, &opd__v1__graph_input__descriptor);
	if (out == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->kind = (Opd__V1__GraphInputKind)in->kind;
	if (in->kind != MSG_GRAPH_INPUT && (out->tensor = write_tensor(arena, &in->tensor)) == NULL)
		return NULL;
	return out;
}

static Opd__V1__GraphNode *write_graph_node(struct arena *arena, const struct msg_graph_node *in)
{
	Opd__V1__GraphNode *out = write_new(arena, &opd__v1__graph_node__descriptor);
	if (out == NULL)
		return NULL;
	bool fits;
	out->name = write_text(in->name);
	out->op = write_text(in->op);
	out->device = write_text(in->device);
	out->strict = in->strict;
	out->allow_tf32 = in->allow_tf32;
	out->priority = write_list(arena, &in->priority, &fits);
	return fits && write_args(arena, in->arg_count, in->args, &out->n_args, &out->args) ? out : NULL;
}

static Opd__V1__GraphOutput *write_graph_output(struct arena *arena, const struct msg_graph_output *in)
{
	Opd__V1__GraphOutput *out = write_new(arena, &opd__v1__graph_output__descriptor);
	if (out == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->node = write_node_output(arena, in->node);
	return out->node == NULL ? NULL : out;
}

static Opd__V1__Graph *write_graph(struct arena *arena, const struct msg_graph *in)
{
	Opd__V1__Graph *out = write_new(arena, &opd__v1__graph__descriptor);
	if (out == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->inputs = arena_array(arena, in->input_count, sizeof *out->inputs);
	out->nodes = arena_array(arena, in->node_count, sizeof *out->nodes);
	out->outputs = arena_array(arena, in->output_count, sizeof *out->outputs);
	bool fits = out->inputs != NULL && out->nodes != NULL && out->outputs != NULL;
	for (uint32_t i = 0; fits && i < in->input_count; i++)
		fits = (out->inputs[i] = write_graph_input(arena, &in->inputs[i])) != NULL;
	for (uint32_t i = 0; fits && i < in->node_count; i++)
		fits = (out->nodes[i] = write_graph_node(arena, &in->nodes[i])) != NULL;
	for (uint32_t i = 0; fits && i < in->output_count; i++)
		fits = (out->outputs[i] = write_graph_output(arena, &in->outputs[i])) != NULL;
	out->n_inputs = in->input_count;
	out->n_nodes = in->node_count;
	out->n_outputs = in->output_count;
	return fits ? out : NULL;
}

Opd__V1__RegisterGraph *write_register_graph(struct arena *arena, const struct msg_graph *in)
{
	Opd__V1__RegisterGraph *out = write_new(arena, &opd__v1__register_graph__descriptor);
	if (out == NULL || (out->graph = write_graph(arena, in)) == NULL)
		return NULL;
	return out;
}

Opd__V1__RunGraph *write_run_graph(struct arena *arena, const struct msg_run *in)
{
	Opd__V1__RunGraph *out = write_new(arena, &opd__v1__run_graph__descriptor);
	if (out == NULL || (in->once != NULL && (out->once = write_graph(arena, in->once)) == NULL))
		return NULL;
	out->graph = in->graph;
	out->mode = (Opd__V1__RunMode)in->mode;
	out->explain = in->explain;
	out->timeout_us = in->timeout_us;
	out->inline_results = in->inline_results;
	out->service_class = (Opd__V1__ServiceClass)in->service_class;
	if (!write_args(arena, in->arg_count, in->args, &out->n_inputs, &out->inputs) ||
	    !write_output_options(arena, in, &out->n_outputs, &out->outputs))
		return NULL;
	return out;
}

static Opd__V1__NodeExplain *write_node_explain(struct arena *arena, const struct msg_node_explain *in)
{
	Opd__V1__NodeExplain *out = write_new(arena, &opd__v1__node_explain__descriptor);
	if (out == NULL || (out->explain = write_explain(arena, &in->explain)) == NULL)
		return NULL;
	out->node = write_text(in->node);
	out->op = write_text(in->op);
	out->provider = write_text(in->provider);
	return out;
}

static Opd__V1__GraphExplain *write_graph_explain(struct arena *arena, const struct msg_graph_explain *in)
{
	Opd__V1__GraphExplain *out = write_new(arena, &opd__v1__graph_explain__descriptor);
	if (out == NULL || (out->nodes = arena_array(arena, in->count, sizeof *out->nodes)) == NULL)
		return NULL;
	for (uint32_t i = 0; i < in->count; i++) {
		out->nodes[i] = write_node_explain(arena, &in->nodes[i]);
		if (out->nodes[i] == NULL)
			return NULL;
	}
	out->n_nodes = in->count;
	out->node_count = in->node_count;
	out->dispatched = in->dispatched;
	out->arena_bytes = in->arena_bytes;
	out->unshared_bytes = in->unshared_bytes;
	out->prepare_ns = in->prepare_ns;
	out->width = in->width;
	return out;
}

bool write_graph_reply(struct arena *arena, const struct msg_run_reply *in, Opd__V1__RunReply *out)
{
	if (in->graph != NULL && (out->graph = write_graph_explain(arena, in->graph)) == NULL)
		return false;
	if (in->state_count == 0)
		return true;
	out->states = arena_array(arena, in->state_count, sizeof *out->states);
	for (uint32_t i = 0; out->states != NULL && i < in->state_count; i++) {
		out->states[i] = write_handle(arena, in->states[i]);
		if (out->states[i] == NULL)
			return false;
	}
	out->n_states = in->state_count;
	return out->states != NULL;
}
