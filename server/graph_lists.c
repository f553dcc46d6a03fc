/* The effective lists of a graph's nodes, as they hold when a run is accepted. */
#include <stdlib.h>
#include <string.h>

#include "server/daemon.h"
#include "server/graph.h"
#include "server/request.h"

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: out of memory");
}

void graph_lists_unref(struct graph_lists *lists)
{
	if (lists == NULL || atomic_fetch_sub_explicit(&lists->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (uint32_t i = 0; i < lists->count; i++)
		effective_unref(lists->effective[i]);
	free(lists);
}

/* A list of the node's own, or one that its device filters: cut for it alone. */
static struct effective *cut_list(const struct graph_node *node, const struct snapshot *snapshot, const struct plist *list)
{
	const struct msg_list *own = &node->run.priority;
	struct device_filter filter;
	bool filtered = node->run.device.bytes != 0 && device_filter_parse(node->run.device, &filter, NULL) == OPD_OK;
	const struct op *op = &snapshot->ops[node->op_index];
	struct effective *effective =
		effective_create(snapshot, op, own->present ? MSG_LEVEL_NODE : list->level, own->present ? own->names : list->names,
	                     own->present ? own->count : list->count, filtered ? &filter : NULL, NULL);
	if (effective != NULL && !own->present && !effective_add_cases(effective, snapshot, op, list, filtered ? &filter : NULL)) {
		effective_unref(effective);
		return NULL;
	}
	return effective;
}

/* before: what held for the node at the last run, of the same snapshot; NULL: nothing. */
static opd_status find_list(const struct graph_node *node, struct request *request, struct effective *before,
                            struct effective **effective_out)
{
	const struct snapshot *snapshot = request->snapshot;
	const struct op *op = &snapshot->ops[node->op_index];
	const struct msg_list *own = &node->run.priority;
	struct plist *list = session_priority(request->session, node->op_index);
	opd_status status = own->present ? plist_check(snapshot, op, own->names, own->count, &request->error) : OPD_OK;
	if (status != OPD_OK)
		return status;
	if (own->present && before != NULL)
		*effective_out = effective_ref(before);
	else if (own->present || node->run.device.bytes != 0)
		*effective_out = cut_list(node, snapshot, list != NULL ? list : op->fallback->list);
	else
		*effective_out = list != NULL ? effective_get(snapshot, op, list) : effective_ref(op->fallback);
	if (*effective_out == NULL)
		return out_of_memory(&request->error);
	_Atomic uint32_t *once = own->present ? NULL : list != NULL ? list->warned : op->fallback->list->warned;
	if (!node->run.strict && *effective_out != before)
		effective_warn(*effective_out, op, request->context->server->log, once, &request->context->server->list_warnings);
	return OPD_OK;
}

static bool lists_equal(const struct graph_lists *a, const struct graph_lists *b)
{
	return a->version == b->version && memcmp(a->effective, b->effective, a->count * sizeof a->effective[0]) == 0;
}

static struct graph_lists *lists_create(const struct graph *graph, struct request *request)
{
	struct graph_lists *lists = calloc(1, sizeof *lists + graph->node_count * sizeof lists->effective[0]);
	if (lists == NULL) {
		(void)out_of_memory(&request->error);
		return NULL;
	}
	lists->refs = 1;
	lists->epoch = request->session->priority_epoch;
	lists->version = request->snapshot->version;
	const struct graph_lists *seen = graph->lists != NULL && graph->lists->version == lists->version ? graph->lists : NULL;
	for (uint32_t i = 0; i < graph->node_count; i++) {
		opd_status status = find_list(&graph->nodes[i], request, seen == NULL ? NULL : seen->effective[i], &lists->effective[i]);
		if (status != OPD_OK) {
			(void)graph_node_error(graph, i, status, &request->error);
			graph_lists_unref(lists);
			return NULL;
		}
		lists->count = i + 1;
	}
	return lists;
}

struct graph_lists *graph_lists_get(struct graph *graph, struct request *request)
{
	struct graph_lists *seen = graph->lists;
	if (seen == NULL || seen->epoch != request->session->priority_epoch || seen->version != request->snapshot->version) {
		struct graph_lists *lists = lists_create(graph, request);
		if (lists == NULL)
			return NULL;
		if (seen != NULL &&
		    lists_equal(seen, lists)) { /* a list elsewhere has changed, or came back: what is prepared still holds */
			seen->epoch = lists->epoch;
			graph_lists_unref(lists);
		} else {
			graph_lists_unref(seen);
			graph->lists = lists;
		}
	}
	(void)atomic_fetch_add_explicit(&graph->lists->refs, 1, memory_order_relaxed);
	return graph->lists;
}
