/* Which steps of a prepared graph run at once, in which order they stand, and where their memory lies. */
#include <string.h>

#include "server/daemon.h"
#include "server/graph_prepare.h"
#include "server/request.h"

/* Running steps at once takes memory for each. So much of it is fine, or four times what one after the other takes; but never more than a part of the session's limit:
 * a graph that fits must not be refused for being faster. */
#define FREELY_BYTES (64ull << 20)
#define TIMES 4u
#define SHARE_OF_LIMIT 8u

/* The graph's edges between steps, which stand in the order of graph->order. False: out of memory. */
static bool steps_before(struct preparing *p, struct schedule_steps *steps)
{
	const struct graph *graph = p->graph;
	struct graph_edges edges = {0};
	uint32_t *step_of = arena_array(&p->scratch, graph->node_count, sizeof step_of[0]);
	uint32_t *first = arena_array(&p->scratch, (size_t)graph->node_count + 1, sizeof first[0]);
	bool made = step_of != NULL && first != NULL && graph_edges_make(graph, &edges);
	uint32_t *before = made ? arena_array(&p->scratch, edges.count, sizeof before[0]) : NULL;
	uint64_t *cost = made ? arena_array(&p->scratch, graph->node_count, sizeof cost[0]) : NULL;
	made = before != NULL && cost != NULL;
	for (uint32_t i = 0; made && i < graph->node_count; i++) {
		step_of[graph->order[i]] = i;
		cost[i] = p->prepared->steps[i].cost_ns < SCHED_ESTIMATE_MAX_NS ? p->prepared->steps[i].cost_ns : SCHED_ESTIMATE_MAX_NS; /* the sum of all is a number */
	}
	uint32_t count = 0;
	for (uint32_t i = 0; made && i < graph->node_count; i++) {
		const uint32_t node = graph->order[i];
		first[i] = count;
		for (uint32_t k = edges.first[node]; k < edges.first[node + 1]; k++)
			before[count++] = step_of[edges.before[k]];
	}
	graph_edges_fini(&edges);
	if (!made)
		return false;
	first[graph->node_count] = count;
	*steps = (struct schedule_steps){graph->node_count, first, before, cost};
	return true;
}

static bool fits(const struct preparing *p, const struct plan_sizes *at_once, const struct plan_sizes *serial)
{
	const uint64_t limit = atomic_load_explicit(&p->prepared->account->limit_bytes, memory_order_relaxed) / SHARE_OF_LIMIT;
	if (at_once->peak_bytes <= serial->peak_bytes)
		return true;
	return at_once->peak_bytes <= limit && (at_once->peak_bytes <= FREELY_BYTES || at_once->peak_bytes / TIMES <= serial->peak_bytes);
}

/* Steps as the schedule has them. False: out of memory. */
static bool sort_steps(struct preparing *p, const struct schedule *schedule)
{
	struct prepared *prepared = p->prepared;
	struct step *sorted = arena_array(&p->scratch, schedule->step_count, sizeof sorted[0]);
	prepared->parts = arena_array(&prepared->arena, schedule->part_count, sizeof prepared->parts[0]);
	prepared->stages = arena_array(&prepared->arena, schedule->stage_count, sizeof prepared->stages[0]);
	if (sorted == NULL || prepared->parts == NULL || prepared->stages == NULL)
		return false;
	for (uint32_t i = 0; i < schedule->step_count; i++)
		sorted[i] = prepared->steps[schedule->steps[i]];
	memcpy(prepared->steps, sorted, schedule->step_count * sizeof sorted[0]);
	memcpy(prepared->parts, schedule->parts, schedule->part_count * sizeof prepared->parts[0]);
	memcpy(prepared->stages, schedule->stages, schedule->stage_count * sizeof prepared->stages[0]);
	prepared->stage_count = schedule->stage_count;
	prepared->width = schedule->width;
	return true;
}

static bool arrange(struct preparing *p, struct schedule *at_once, struct schedule *serial)
{
	const struct layout layout = {p->items, p->item_count, p->uses, p->use_count};
	const uint32_t threads = lane_threads(p->run->request->session->lane);
	struct plan_sizes *sizes = &p->prepared->sizes, wide;
	struct schedule_steps steps;
	if (!schedule_serial(p->graph->node_count, serial) || !graph_layout(&layout, serial, sizes))
		return false;
	if (threads <= 1 || p->graph->node_count == 1 || p->device != 0) /* a device has an order of its own */
		return sort_steps(p, serial);
	if (!steps_before(p, &steps) || !schedule_make(&steps, threads, at_once))
		return false;
	if (at_once->width == 1)
		return sort_steps(p, serial);
	if (!graph_layout(&layout, at_once, &wide))
		return false;
	if (!fits(p, &wide, sizes))
		return graph_layout(&layout, serial, sizes) && sort_steps(p, serial);
	*sizes = wide;
	return sort_steps(p, at_once);
}

opd_status prepare_arrange(struct preparing *p)
{
	struct schedule at_once = {0}, serial = {0};
	const bool arranged = arrange(p, &at_once, &serial);
	schedule_fini(&at_once);
	schedule_fini(&serial);
	return arranged ? OPD_OK : prepare_memory(p->error);
}
