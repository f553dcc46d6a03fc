/* Runs of graphs: accepting them, their order within a session, their states, their end. */
#include "server/graph_run.h"

#include <inttypes.h>
#include <string.h>

#include "server/daemon.h"
#include "server/metrics.h"
#include "server/request.h"

static opd_status out_of_memory(struct request *request)
{
	return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "run_graph: out of memory");
}

/* ---- Accepting ---- */

/* The registered graph, or the one that comes with the request. Referenced. */
static opd_status find_graph(struct request *request, struct graph **graph_out)
{
	const struct msg_run *message = &request->message.run;
	if (graphs_get(request->session) == NULL)
		return out_of_memory(request);
	if (message->once != NULL && message->graph == 0)
		return graph_create(request, message->once, 0, graph_out);
	if (message->once != NULL)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT,
		                "run_graph: names graph %" PRIu64 " and brings one: expected one of them", message->graph);
	opd_status status = graphs_find(request->session, message->graph, graph_out, &request->error);
	if (status == OPD_OK)
		(void)graph_ref(*graph_out);
	return status;
}

static opd_status state_error(const struct graph *graph, uint32_t state, opd_status status, opd_error *error)
{
	return opd_error_prefix(error, status, "graph '%s': state '%s'", graph->name.data,
	                        graph->inputs[graph->states[state]].name.data);
}

/* From here on the states' former handles are refused. A run that only asks donates nothing. */
static opd_status donate_states(struct graph_run *run)
{
	struct request *request = run->request;
	struct kept *kept = &request->session->kept;
	const struct graph *graph = run->graph;
	for (uint32_t i = 0; i < graph->state_count; i++) {
		const struct graph_input *input = &graph->inputs[graph->states[i]];
		const struct kept_tensor *tensor = kept_follow(kept, input->slot, input->lineage, &run->states[i].handle, &request->error);
		if (tensor != NULL && tensor->hold != NULL && input->donated != GRAPH_NONE)
			(void)opd_fail(&request->error, OPD_FAILED_PRECONDITION, "it is published, hence read-only");
		if (tensor == NULL || request->error.status != OPD_OK)
			return state_error(graph, i, (opd_status)request->error.status, &request->error);
	}
	for (uint32_t i = 0; i < graph->state_count && request->message.run.mode == MSG_RUN; i++) { /* all, or none */
		const struct graph_input *input = &graph->inputs[graph->states[i]];
		run->states[i].donated = input->donated != GRAPH_NONE;
		if (run->states[i].donated)
			run->states[i].handle = kept_lend(kept, input->slot, request->id, &run->states[i].lend);
	}
	return OPD_OK;
}

static opd_status accept_run(struct graph_run *run)
{
	struct request *request = run->request;
	const struct msg_run *message = &request->message.run;
	struct graph *graph = run->graph;
	request->run.op = &graph->op;
	if (message->output_count > graph->output_count)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: options for %u outputs, it has %u", graph->name.data,
		                (unsigned)message->output_count, (unsigned)graph->output_count);
	run->states = arena_array(&request->arena, graph->state_count, sizeof run->states[0]);
	if (message->explain)
		run->node_ns = arena_array(&request->arena, graph->node_count, sizeof run->node_ns[0]);
	if (run->states == NULL || (message->explain && run->node_ns == NULL))
		return out_of_memory(request);
	opd_status status = bind_args(&request->arena, &graph->op, message, &request->run.bound, &request->error);
	struct bound *bound = &request->run.bound;
	request->run.outputs =
	    status != OPD_OK ? NULL : arena_array(&request->arena, graph->output_count, sizeof request->run.outputs[0]);
	bound->outputs = status != OPD_OK ? NULL : arena_array(&request->arena, graph->output_count, sizeof bound->outputs[0]);
	run->shapes = status != OPD_OK ? NULL : arena_array(&request->arena, graph->output_count, sizeof run->shapes[0]);
	if (status == OPD_OK && (request->run.outputs == NULL || bound->outputs == NULL || run->shapes == NULL))
		return out_of_memory(request);
	if (status == OPD_OK)
		run->lists = graph_lists_get(graph, request);
	if (status == OPD_OK && run->lists == NULL)
		status = (opd_status)request->error.status;
	if (status == OPD_OK)
		status = run_take(request);
	return status == OPD_OK ? donate_states(run) : status;
}

static bool share_a_state(const struct graph *a, const struct graph *b)
{
	uint32_t i = 0, k = 0;
	if ((a->slot_mask & b->slot_mask) == 0)
		return false;
	while (i < a->state_count && k < b->state_count && a->slots[i] != b->slots[k])
		*(a->slots[i] < b->slots[k] ? &i : &k) += 1;
	return i < a->state_count && k < b->state_count;
}

/* One runs after the other: runs of one graph, or of one state. */
static bool conflict(const struct graph_run *a, const struct graph_run *b)
{
	return a->graph == b->graph || share_a_state(a->graph, b->graph);
}

/* A run that is on a device is asked to let it go on behind it. */
static void wait_for(struct graph_run *run, struct graph_run *other)
{
	run->blockers++;
	if (other->lending)
		graph_device_ask(other);
}

static void enqueue(struct graph_run *run)
{
	struct graphs *graphs = run->request->session->graphs;
	for (struct graph_run *other = graphs->first; other != NULL; other = other->next)
		if (conflict(other, run))
			wait_for(run, other);
	run->previous = graphs->last;
	*(graphs->last == NULL ? &graphs->first : &graphs->last->next) = run;
	graphs->last = run;
	run->queued = true;
}

opd_status graph_run_accept(struct request *request)
{
	struct graph_run *run = arena_zalloc(&request->arena, sizeof *run);
	if (run == NULL)
		return out_of_memory(request);
	run->request = request;
	request->graph_run = run;
	opd_status status = find_graph(request, &run->graph);
	if (status == OPD_OK)
		status = accept_run(run);
	if (status == OPD_OK)
		enqueue(run);
	return status;
}

/* ---- Order ---- */

static void dequeue(struct graph_run *run)
{
	struct graphs *graphs = run->request->session->graphs;
	if (!run->queued)
		return;
	run->queued = false;
	for (struct graph_run *later = run->next; later != NULL; later = later->next)
		later->blockers -= conflict(run, later);
	*(run->previous == NULL ? &graphs->first : &run->previous->next) = run->next;
	*(run->next == NULL ? &graphs->last : &run->next->previous) = run->previous;
	run->next = run->previous = NULL;
}

/* The tensors as the runs before have left them. */
static opd_status take_states(struct graph_run *run)
{
	const struct graph *graph = run->graph;
	struct kept *kept = &run->request->session->kept;
	opd_error *error = &run->request->error;
	for (uint32_t i = 0; i < graph->state_count; i++) {
		const struct graph_input *input = &graph->inputs[graph->states[i]];
		struct state_use *state = &run->states[i];
		struct msg_handle handle;
		struct kept_tensor *tensor = kept_follow(kept, input->slot, input->lineage, &handle, error);
		if (tensor == NULL)
			return state_error(graph, i, (opd_status)error->status, error);
		state->shared = atomic_load_explicit(&tensor->refs, memory_order_acquire) > 1 || buffer_shared(tensor->buffer);
		state->tensor = kept_tensor_ref(tensor);
	}
	return OPD_OK;
}

/* Its inputs are in host memory. */
static void begin_here(struct graph_run *run)
{
	struct request *request = run->request;
	const struct prepared *prepared = run->prepared;
	if (request->status != OPD_OK) {
		request_fail(request);
		return;
	}
	request->run.cost_ns = prepared == NULL ? 0 : prepared->cost_ns;
	if (prepared == NULL || !prepared->can_be_inline || !execute_fits_loop(request, prepared->cost_ns, prepared->width > 1 ? UINT64_MAX : prepared->step_ns)) {
		execute_graph(request);
		return;
	}
	struct lane_exec serial = lane_exec_serial(NULL);
	request->run.on_loop = true;
	if (!execute_unwanted(request, &serial)) {
		const uint64_t cost_ns = prepared->cost_ns;
		graph_execute(run, &serial);
		metrics_ran_on_loop(request->context->metrics, NULL, cost_ns, request->status);
	}
	execute_done(request);
}

/* Where it runs is known once it is prepared. */
static void begin(struct graph_run *run)
{
	struct request *request = run->request;
	if (run->prepared == NULL)
		run->prepared = prepared_find(run);
	if (run->prepared == NULL || request->message.run.mode != MSG_RUN)
		execute_graph(request);
	else if (run->prepared->device != 0)
		graph_bring(run, run->prepared->device, graph_device_start);
	else
		graph_bring(run, 0, begin_here);
}

static void start(struct graph_run *run)
{
	struct request *request = run->request;
	run->started = true;
	if (take_states(run) != OPD_OK) {
		request_fail(request);
		return;
	}
	(void)atomic_fetch_add_explicit(&request->context->server->graph_runs, 1, memory_order_relaxed);
	begin(run);
}

bool graph_run_has_begun(const struct request *request)
{
	return request->graph_run->begun;
}

void graph_run_execute(struct request *request, struct lane_exec *lane)
{
	/* One that has begun may have written states: it ends by itself, at its next node. */
	if (request->graph_run->begun || !execute_unwanted(request, lane))
		graph_execute(request->graph_run, lane);
}

/* A run that ends starts others, which may end at once: one after the other, never one inside the other. */
static void schedule(struct session *session)
{
	struct graphs *graphs = session->graphs;
	if (graphs->scheduling)
		return;
	(void)session_ref(session);
	graphs->scheduling = true;
	struct graph_run *run = graphs->first;
	while (run != NULL) {
		if (!run->ready || run->started || run->blockers != 0) {
			run = run->next;
			continue;
		}
		start(run);
		run = graphs->first; /* the list may have changed */
	}
	graphs->scheduling = false;
	session_unref(session);
}

void graph_run_ready(struct request *request)
{
	request->graph_run->ready = true;
	schedule(request->session);
}

bool graphs_run_uses(const struct session *session, uint32_t slot)
{
	const struct graph_run *run = session->graphs == NULL ? NULL : session->graphs->first;
	for (; run != NULL; run = run->next)
		for (uint32_t i = 0; i < run->graph->state_count; i++)
			if (run->graph->slots[i] == slot)
				return true;
	return false;
}

/* ---- Ending ---- */

/* What became of the states. */
static void settle_states(struct graph_run *run, bool succeeded)
{
	struct kept *kept = &run->request->session->kept;
	const struct graph *graph = run->graph;
	for (uint32_t i = 0; run->states != NULL && i < graph->state_count; i++) {
		const struct graph_input *input = &graph->inputs[graph->states[i]];
		struct state_use *state = &run->states[i];
		if (!state->donated)
			continue;
		state->donated = false;
		kept_returned(kept, input->slot, input->lineage, &state->lend, succeeded);
		if (run->passed && succeeded)
			continue;
		if (run->passed)
			kept_lose(kept, input->slot, input->lineage, run->request->id);
		else if (succeeded && state->fresh != NULL)
			kept_replace(kept, input->slot, input->lineage, kept_tensor_ref(state->fresh));
		else if (succeeded)
			kept_tensor_changed(state->tensor);
		else if (state->written && state->fresh == NULL) /* else the old value is whole */
			kept_lose(kept, input->slot, input->lineage, run->request->id);
	}
}

/* The tensors as the runs behind it find them; until it has ended nobody else does. */
static void hand_states(struct graph_run *run)
{
	for (uint32_t i = 0; i < run->graph->state_count; i++) {
		const struct graph_input *input = &run->graph->inputs[run->graph->states[i]];
		struct state_use *state = &run->states[i];
		if (state->donated && state->fresh != NULL)
			kept_replace(&run->request->session->kept, input->slot, input->lineage, kept_tensor_ref(state->fresh));
		else if (state->donated)
			kept_tensor_changed(state->tensor);
	}
}

static void drop_states(struct graph_run *run)
{
	for (uint32_t i = 0; run->states != NULL && i < run->graph->state_count; i++) {
		kept_tensor_unref(run->states[i].tensor);
		kept_tensor_unref(run->states[i].fresh);
		run->states[i].tensor = NULL;
		run->states[i].fresh = NULL;
	}
}

static void add_states(struct graph_run *run)
{
	struct request *request = run->request;
	struct msg_handle *handles = arena_array(&request->arena, run->graph->state_count, sizeof handles[0]);
	for (uint32_t i = 0; handles != NULL && i < run->graph->state_count; i++)
		handles[i] = run->states[i].handle;
	request->reply.run.states = handles;
	request->reply.run.state_count = handles == NULL ? 0 : run->graph->state_count;
}

static void leave_order(struct graph_run *run)
{
	const bool queued = run->queued;
	dequeue(run);
	if (queued)
		schedule(run->request->session);
}

/* Results that others were told of. */
static void lose_results(struct graph_run *run)
{
	struct request *request = run->request;
	struct kept *kept = &request->session->kept;
	opd_error freed; /* by now */
	for (uint32_t i = 0; run->passed && request->run.handles != NULL && i < run->graph->output_count; i++) {
		const struct msg_handle handle = request->run.handles[i];
		const uint64_t lineage = handle.generation == 0 ? 0 : kept_lineage(kept, handle, &freed);
		if (lineage != 0)
			kept_lose(kept, handle.index, lineage, request->id);
	}
}

static void end_failed(struct graph_run *run)
{
	settle_states(run, false);
	lose_results(run);
	drop_states(run);
	leave_order(run);
}

/* A kernel of it runs on for nobody knows how long, and may write the states that it or a node before it was given: those are lost, but for those whose copy is written. Where several threads run nodes, others
 * may be about to begin one. The flags are left as the lane sees them. */
static void abandon(struct graph_run *run)
{
	struct kept *kept = &run->request->session->kept;
	const struct graph *graph = run->graph;
	const bool others = run->prepared->width > 1;
	run->abandoned = true;
	for (uint32_t i = 0; i < graph->state_count; i++) {
		const struct graph_input *input = &graph->inputs[graph->states[i]];
		struct state_use *state = &run->states[i];
		if (!state->donated)
			continue;
		kept_returned(kept, input->slot, input->lineage, &state->lend, false);
		if (run->passed || (state->fresh == NULL && (state->written || others)))
			kept_lose(kept, input->slot, input->lineage, run->request->id);
	}
	lose_results(run);
	prepared_take(run);
	leave_order(run);
}

void graph_run_failed(struct request *request)
{
	struct graph_run *run = request->graph_run;
	if (run == NULL || run->graph == NULL)
		return;
	if (!request->overdue)
		end_failed(run);
	else if (run->prepared != NULL) /* else it is still being prepared, with what is the graph's: others wait for its end */
		abandon(run);
}

void graph_run_returned(struct request *request)
{
	struct graph_run *run = request->graph_run;
	if (run->abandoned) {
		drop_states(run);
		if (run->held == NULL)
			prepared_unref(run->prepared);
		run->prepared = NULL;
	} else {
		end_failed(run);
	}
}

/* The runs behind it may begin: their work comes to the same stream, and what they read through host memory is copied from there. Only a run that can't fail any more but on the device is passed. */
void graph_run_begun(struct graph_run *run)
{
	struct request *request = run->request;
	struct session *session = request->session;
	const opd_error before = request->error;
	const bool fits = run_check_inline(request) == OPD_OK;
	request->error = before;
	if (!run->queued || request->replied || !fits)
		return;
	(void)session_ref(session);
	if (run_keep(request)) {
		run->passed = true;
		hand_states(run);
		drop_states(run);
		dequeue(run);
		schedule(session);
	}
	session_unref(session);
}

/* The order of things: what is told of the prepared graph is told before the next run may use it; the states are settled before
 * it starts. */
void graph_run_done(struct request *request)
{
	struct graph_run *run = request->graph_run;
	struct session *session = request->session;
	opd_status status = request->status;
	if (status == OPD_OK && run->prepared_only) {
		run->prepared_only = false;
		begin(run);
		return;
	}
	graph_explain(run);
	buffer_unref(run->arena);
	run->arena = NULL;
	if (status == OPD_OK) /* the states are whole, whatever becomes of the reply */
		settle_states(run, true);
	if (status == OPD_OK && request->message.run.mode == MSG_RUN)
		status = run_check_inline(request);
	if (status != OPD_OK) {
		request_fail(request);
		return;
	}
	drop_states(run);
	dequeue(run);
	(void)session_ref(session);
	add_states(run);
	if (request->message.run.mode == MSG_RUN)
		run_reply_results(request);
	else
		run_reply_fake(request);
	schedule(session);
	session_unref(session);
}

void graph_run_release(struct request *request)
{
	struct graph_run *run = request->graph_run;
	if (run == NULL)
		return;
	buffer_unref(run->arena);
	if (run->graph != NULL)
		graph_bring_release(run);
	graph_lists_unref(run->lists);
	prepared_unref(run->held);
	if (run->graph != NULL)
		graph_unref(run->graph);
	request->graph_run = NULL;
}
