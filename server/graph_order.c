/* In which order a graph's nodes run, or that they can't. */
#include <stdio.h>
#include <stdlib.h>

#include "server/graph.h"

static bool edge_add(struct graph_edges *edges, uint32_t node, uint32_t before)
{
	if (edges->count == edges->room) {
		uint32_t room = edges->room == 0 ? 256 : edges->room * 2;
		void *pairs = realloc(edges->pairs, room * sizeof edges->pairs[0]);
		if (pairs == NULL)
			return false;
		edges->pairs = pairs;
		edges->room = room;
	}
	edges->pairs[edges->count][0] = node;
	edges->pairs[edges->count++][1] = before;
	return true;
}

/* A node runs after those that it names, and one that donates after all other readers of the old value. */
static bool edges_of_operand(const struct graph *graph, struct graph_edges *edges, uint32_t index, const struct msg_tensor *source)
{
	bool from_node = source->source == MSG_SOURCE_NODE;
	uint32_t donated =
	    from_node ? graph->values[graph_value_of(graph, source)].donated : graph->inputs[source->graph_input].donated;
	if (from_node && !edge_add(edges, index, source->node.node))
		return false;
	return donated == GRAPH_NONE || donated == index || edge_add(edges, donated, index);
}

static bool edges_sort(const struct graph *graph, struct graph_edges *edges)
{
	edges->first = calloc((size_t)graph->node_count + 2, sizeof edges->first[0]);
	edges->before = calloc((size_t)edges->count + 1, sizeof edges->before[0]);
	if (edges->first == NULL || edges->before == NULL)
		return false;
	for (uint32_t i = 0; i < edges->count; i++)
		edges->first[edges->pairs[i][0] + 2]++;
	for (uint32_t i = 2; i < graph->node_count + 2; i++)
		edges->first[i] += edges->first[i - 1];
	for (uint32_t i = 0; i < edges->count; i++)
		edges->before[edges->first[edges->pairs[i][0] + 1]++] = edges->pairs[i][1];
	return true;
}

bool graph_edges_make(const struct graph *graph, struct graph_edges *edges)
{
	for (uint32_t n = 0; n < graph->node_count; n++) {
		const struct msg_run *run = &graph->nodes[n].run;
		for (uint32_t i = 0; i < run->arg_count; i++) {
			const struct msg_arg *arg = &run->args[i];
			uint32_t count = arg->kind == MSG_ARG_TENSOR ? 1 : arg->kind == MSG_ARG_TENSORS ? arg->count : 0;
			for (uint32_t k = 0; k < count; k++)
				if (!edges_of_operand(graph, edges, n, &arg->tensor[k]))
					return false;
		}
	}
	return edges_sort(graph, edges);
}

void graph_edges_fini(struct graph_edges *edges)
{
	free(edges->pairs);
	free(edges->first);
	free(edges->before);
}

/* The path from a node back to itself, as "'a' waits for 'b', 'b' for 'c', …". */
static opd_status refuse_cycle(const struct graph *graph, const uint32_t *path, uint32_t depth, uint32_t again, opd_error *error)
{
	char text[300];
	size_t at = 0;
	uint32_t from = depth;
	while (from > 0 && path[from - 1] != again)
		from--;
	from = from == 0 ? 0 : from - 1;
	for (uint32_t i = from; i < depth && i < from + 8 && at < sizeof text; i++)
		at += (size_t)snprintf(text + at, sizeof text - at, "'%s' waits for ", graph->nodes[path[i]].name.data);
	if (depth - from > 8 && at < sizeof text)
		at += (size_t)snprintf(text + at, sizeof text - at, "… ");
	return opd_fail(
	    error, OPD_INVALID_ARGUMENT,
	    "graph '%s': its nodes wait for each other: %s'%s' (a node that donates waits for all readers of the old value)",
	    graph->name.data, text, graph->nodes[again].name.data);
}

enum mark { MARK_NEW, MARK_OPEN, MARK_DONE };

struct walk {
	uint32_t *path; /* [node_count]: from the root down */
	uint32_t *next; /* [node_count]: of each on the path, the edge to follow next */
	uint8_t *marks; /* [node_count] */
	uint32_t placed;
};

/* Depth first from node `root`, along what must run before. */
static opd_status visit(struct graph *graph, const struct graph_edges *edges, uint32_t root, struct walk *walk, opd_error *error)
{
	uint32_t *path = walk->path, *next = walk->next;
	uint8_t *marks = walk->marks;
	uint32_t depth = 0;
	path[depth] = root;
	next[depth++] = edges->first[root];
	marks[root] = MARK_OPEN;
	while (depth > 0) {
		uint32_t node = path[depth - 1];
		if (next[depth - 1] == edges->first[node + 1]) {
			marks[node] = MARK_DONE;
			graph->order[walk->placed++] = node;
			depth--;
			continue;
		}
		uint32_t before = edges->before[next[depth - 1]++];
		if (marks[before] == MARK_OPEN)
			return refuse_cycle(graph, path, depth, before, error);
		if (marks[before] == MARK_DONE)
			continue;
		marks[before] = MARK_OPEN;
		path[depth] = before;
		next[depth++] = edges->first[before];
	}
	return OPD_OK;
}

/* In the order given, but for what must run earlier. */
opd_status graph_order(struct graph *graph, opd_error *error)
{
	struct graph_edges edges = {0};
	struct walk walk = {
	    .path = calloc(graph->node_count, sizeof walk.path[0]),
	    .next = calloc(graph->node_count, sizeof walk.next[0]),
	    .marks = calloc(graph->node_count, sizeof walk.marks[0]),
	};
	bool made = walk.path != NULL && walk.next != NULL && walk.marks != NULL && graph_edges_make(graph, &edges);
	opd_status status = made ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph '%s': out of memory", graph->name.data);
	for (uint32_t i = 0; status == OPD_OK && i < graph->node_count; i++)
		if (walk.marks[i] == MARK_NEW)
			status = visit(graph, &edges, i, &walk, error);
	graph_edges_fini(&edges);
	free(walk.path);
	free(walk.next);
	free(walk.marks);
	return status;
}
