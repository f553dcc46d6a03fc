/* What a run of a graph says of itself: per node who ran, who was passed over and how long it took; memory; whether it was
 * dispatched anew. */
#include <string.h>

#include "server/graph_run.h"
#include "server/request.h"

static struct msg_node_explain explain_node(struct graph_run *run, uint32_t index)
{
	const struct step *step = &run->prepared->steps[index];
	const struct graph_node *node = &run->graph->nodes[step->node];
	struct arena *arena = &run->request->arena;
	struct msg_node_explain out = {.node = node->name, .op = node->run.op, .provider = msg_text(step->impl->provider->name)};
	out.explain.level = step->dispatch.effective->level;
	const char *narrowed = step->dispatch.effective->narrowed;
	if (narrowed != NULL)
		out.explain.narrowed = msg_text(arena_text(arena, narrowed, strlen(narrowed)));
	out.explain.device = msg_text(run->prepared->snapshot->devices[run->prepared->device].name);
	out.explain.skipped = dispatch_skips(&step->dispatch, step->bound.op, &step->bound.call, arena, &out.explain.skip_count);
	out.explain.effective = effective_list_names(step->dispatch.effective, step->dispatch.count, arena);
	out.explain.effective_count = out.explain.effective == NULL ? 0 : step->dispatch.count;
	out.explain.times.kernel = run->node_ns == NULL ? 0 : run->node_ns[index];
	return out;
}

static uint64_t between(uint64_t from, uint64_t to)
{
	return from == 0 || to < from ? 0 : to - from;
}

/* Of the run as a whole. */
static void explain_times(struct graph_run *run)
{
	struct request *request = run->request;
	const struct request_clock *clock = &request->clock;
	struct msg_explain *explain = arena_zalloc(&request->arena, sizeof *explain);
	if (explain == NULL)
		return;
	explain->device = msg_text(run->prepared->snapshot->devices[run->prepared->device].name);
	explain->on_loop = request->run.on_loop;
	explain->times = (struct msg_times){
	    .decode = between(clock->received, clock->accepted),
	    .dispatch = run->prepare_ns,
	    .queue = between(clock->queued, clock->started),
	    .kernel = between(clock->started, clock->ended) - (clock->moves < between(clock->started, clock->ended) ? clock->moves : 0),
	    .moves = clock->moves,
	    .pack = clock->ended == 0 ? 0 : between(clock->ended, request_now_ns()),
	};
	request->reply.run.explain = explain;
}

void graph_explain(struct graph_run *run)
{
	struct request *request = run->request;
	const struct msg_run *message = &request->message.run;
	if ((!message->explain && message->mode != MSG_DRY) || run->prepared == NULL)
		return;
	const struct prepared *prepared = run->prepared;
	uint32_t count = prepared->step_count < BOUND_GRAPH_EXPLAIN ? prepared->step_count : BOUND_GRAPH_EXPLAIN;
	struct msg_graph_explain *explain = arena_zalloc(&request->arena, sizeof *explain);
	struct msg_node_explain *nodes = arena_array(&request->arena, count, sizeof nodes[0]);
	if (explain == NULL || nodes == NULL)
		return; /* the reply goes without it */
	for (uint32_t i = 0; i < count; i++)
		nodes[i] = explain_node(run, i);
	*explain = (struct msg_graph_explain){
	    .count = count,
	    .nodes = nodes,
	    .node_count = prepared->step_count,
	    .dispatched = run->dispatched,
	    .arena_bytes = prepared->sizes.peak_bytes,
	    .unshared_bytes = prepared->sizes.sum_bytes,
	    .prepare_ns = run->prepare_ns,
	    .width = prepared->width,
	};
	request->reply.kind = MSG_REPLY_RUN;
	request->reply.run.graph = explain;
	explain_times(run);
}
