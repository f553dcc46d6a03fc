/* Running a prepared graph's nodes: stage after stage on a lane's threads, or on the loop where all of it is tiny. */
#include <inttypes.h>
#include <pthread.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/containment.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/graph_run.h"
#include "server/module.h"
#include "server/request.h"
#include "server/shared.h"

#define CANARY 0xa5

/* ---- Memory ---- */

static void describe_output(struct graph_run *run, uint32_t index)
{
	opd_tensor *output = &run->request->run.bound.outputs[index];
	*output = run->prepared->outputs[index];
	memcpy(run->shapes[index][0], output->shape, output->rank * sizeof output->shape[0]);
	memcpy(run->shapes[index][1], output->strides, output->rank * sizeof output->strides[0]);
	output->shape = run->shapes[index][0];
	output->strides = run->shapes[index][1];
}

static opd_status alloc_outputs(struct graph_run *run, opd_error *error)
{
	const struct prepared *prepared = run->prepared;
	struct request *request = run->request;
	uint64_t canary = prepared->checked ? GRAPH_CANARY_BYTES : 0;
	for (uint32_t i = 0; i < prepared->output_count; i++) {
		uint64_t bytes = bound_bytes(&prepared->outputs[i]);
		opd_tensor *output = &request->run.bound.outputs[i];
		output->data = prepared->checked ? NULL : shared_result(request, i); /* what lies behind a range is the client's: no canary there */
		if (output->data != NULL)
			continue;
		opd_status status = buffer_alloc(request->session->account, bytes, canary, &request->run.outputs[i], error);
		if (status != OPD_OK)
			return opd_error_prefix(error, status, "graph '%s': output '%s'", run->graph->name.data,
			                        run->graph->outputs[i].name.data);
		output->data = request->run.outputs[i]->data;
	}
	return OPD_OK;
}

/* Whoever was accepted before reads the old value in peace: then a copy is written. */
static opd_status copy_states(struct graph_run *run, opd_error *error)
{
	for (uint32_t i = 0; i < run->graph->state_count; i++) {
		struct state_use *state = &run->states[i];
		const struct kept_tensor *from = state->tensor;
		const bool aside = state->shared || from->buffer->device != 0;
		if (state->donated && !aside)
			buffer_drop_mirrors(from->buffer, NULL); /* it is written where it is */
		if (!state->donated || !aside)
			continue;
		struct buffer *buffer = NULL;
		opd_status status = buffer_alloc(run->request->session->account, from->bytes, 0, &buffer, error);
		if (status != OPD_OK)
			return opd_error_prefix(error, status, "graph '%s': state '%s', which is still read", run->graph->name.data,
			                        run->graph->inputs[run->graph->states[i]].name.data);
		if (from->bytes != 0)
			memcpy(buffer->data, graph_host_data(run, run->graph->states[i], from), from->bytes);
		state->fresh = kept_tensor_create(from->dtype, from->rank, from->shape, from->bytes, buffer);
		buffer_unref(buffer);
		if (state->fresh == NULL)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph '%s': out of memory", run->graph->name.data);
	}
	return OPD_OK;
}

static opd_status allocate(struct graph_run *run, opd_error *error)
{
	opd_status status = buffer_alloc(run->request->session->account, run->prepared->sizes.peak_bytes, 0, &run->arena, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "graph '%s': its intermediate results", run->graph->name.data);
	status = alloc_outputs(run, error);
	return status == OPD_OK ? copy_states(run, error) : status;
}

/* ---- Addresses ---- */

void graph_set_base(struct prepared *prepared, uint32_t base, void *address)
{
	if (prepared->bases[base] == address)
		return;
	prepared->bases[base] = address;
	for (uint32_t i = prepared->first_patch[base]; i < prepared->first_patch[base + 1]; i++)
		prepared->patches[i].tensor->data = (unsigned char *)address + prepared->patches[i].offset;
}

/* Kept operands have an identity, by which a provider may keep derived copies; with the offset in it, which is 0 here: a view from further on has none. */
static void set_operand(struct prepared *prepared, uint32_t base, const opd_tensor *operand)
{
	const bool whole = operand->byte_offset == 0;
	graph_set_base(prepared, base, operand->data == NULL ? NULL : opd_tensor_data(operand));
	for (uint32_t i = prepared->first_patch[base]; i < prepared->first_patch[base + 1]; i++) {
		opd_tensor *tensor = prepared->patches[i].tensor;
		tensor->id = whole ? operand->id : 0;
		tensor->version = whole ? operand->version : 0;
		tensor->flags = (tensor->flags & ~(uint32_t)OPD_TENSOR_CONSTANT) | (whole ? operand->flags & OPD_TENSOR_CONSTANT : 0);
	}
}

static void set_addresses(struct graph_run *run)
{
	struct prepared *prepared = run->prepared;
	const struct graph *graph = run->graph;
	graph_set_base(prepared, 0, run->arena->data);
	for (uint32_t i = 0; i < graph->input_count; i++) {
		const struct graph_input *input = &graph->inputs[i];
		if (input->kind == MSG_GRAPH_INPUT) {
			set_operand(prepared, 1 + i, graph_run_operand(&run->request->run.bound, input));
		} else if (input->kind == MSG_GRAPH_CONSTANT) {
			graph_set_base(prepared, 1 + i, graph_host_data(run, i, input->constant));
		} else {
			const struct state_use *state = &run->states[input->state];
			graph_set_base(prepared, 1 + i, state->fresh != NULL ? state->fresh->buffer->data : graph_host_data(run, i, state->tensor));
		}
	}
	for (uint32_t i = 0; i < graph->output_count; i++)
		graph_set_base(prepared, 1 + graph->input_count + i, run->request->run.bound.outputs[i].data);
}

/* ---- Steps ---- */

static void make_copies(const struct prepared *prepared, uint32_t first, uint32_t count)
{
	for (uint32_t i = first; i < first + count; i++) {
		const struct copy *copy = &prepared->copies[i];
		uint64_t bytes = bound_bytes(copy->from);
		if (bytes != 0)
			memcpy(opd_tensor_data(copy->to), opd_tensor_data(copy->from), bytes);
	}
}

static void set_canaries(const struct step *step)
{
	for (uint32_t i = 0; step->donate_count == 0 && i < step->bound.call.output_count; i++) {
		const opd_tensor *output = &step->bound.outputs[i];
		memset((unsigned char *)output->data + bound_bytes(output), CANARY, GRAPH_CANARY_BYTES);
	}
}

static opd_status check_canaries(const struct step *step, opd_error *error)
{
	for (uint32_t i = 0; step->donate_count == 0 && i < step->bound.call.output_count; i++) {
		const opd_tensor *output = &step->bound.outputs[i];
		const unsigned char *behind = (const unsigned char *)output->data + bound_bytes(output);
		for (uint32_t k = 0; k < GRAPH_CANARY_BYTES; k++)
			if (behind[k] != CANARY)
				return opd_fail(error, OPD_INTERNAL, "%s.%s wrote past the end of result %u, at byte %" PRIu64 " of %" PRIu64,
				                step->impl->provider->name, step->bound.op->schema->name, (unsigned)i, bound_bytes(output) + k,
				                bound_bytes(output));
	}
	return OPD_OK;
}

static opd_status step_failed(const struct step *step, opd_status status, const char *what, opd_error *error)
{
	return module_failure(status, error, "%s.%s%s", step->impl->provider->name, step->bound.op->schema->name, what);
}

static opd_status run_step(struct graph_run *run, const struct step *step, opd_exec *exec, opd_error *error)
{
	const struct prepared *prepared = run->prepared;
	opd_status status = module_check_contents(step->impl->provider->module, step->def, &step->bound.call, exec->lane, error);
	if (status != OPD_OK)
		return status;
	error->text[0] = '\0';
	for (uint32_t i = 0; i < step->donate_count; i++)
		run->states[prepared->donates[step->donates + i]].written = true;
	exec->host = &step->impl->provider->module->host;
	exec->plan = step->plan;
	exec->scratch = step->scratch == NULL ? NULL : step->scratch->data;
	if (prepared->checked)
		set_canaries(step);
	struct watch watch;
	watch_begin_kernel(&watch, step->impl, run->graph->nodes[step->node].name.data, run->request, exec->lane);
	status = step->impl->def->run(step->impl->def, step->impl->state, &step->bound.call, exec, error);
	(void)watch_end(&watch);
	derived_end(run->request->context->server->derived, ((struct lane_exec *)exec->lane)->derived);
	struct containment *containment = run->request->context->server->containment;
	if (status != OPD_OK) {
		status = step_failed(step, status, " failed", error);
		containment_note(containment, step->impl, status, run->request->session->tenant->name);
		return status;
	}
	make_copies(prepared, step->copies, step->copy_count);
	status = prepared->checked ? check_canaries(step, error) : OPD_OK;
	if (status != OPD_OK)
		containment_failed(containment, step->impl, FAILURE_OVERRUN, run->request->session->tenant->name);
	return status;
}

/* Whoever would have failed first had one thread run them all: steps before it are still run, so that they can fail too, and none behind it. What depends on a
 * step stands behind it in that order. */
static void note_failure(struct graph_run *run, uint32_t order, opd_status status, const opd_error *error)
{
	static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* failures are rare */
	(void)pthread_mutex_lock(&mutex);
	if (order < atomic_load_explicit(&run->failed_order, memory_order_relaxed)) {
		run->request->error = *error;
		run->request->status = status;
		atomic_store_explicit(&run->failed_order, order, memory_order_relaxed);
	}
	(void)pthread_mutex_unlock(&mutex);
}

/* Step after step, on one thread, from part->first + from on. Returns how many are behind it: fewer than there are when others are to come first. */
static uint32_t run_part(struct graph_run *run, const struct schedule_part *part, uint32_t from, struct lane_exec *lane)
{
	const struct prepared *prepared = run->prepared;
	const struct request *request = run->request;
	opd_exec exec = {.struct_bytes = sizeof exec, .threads = lane->threads, .lane = lane};
	struct derived_run derived = {.count = 0};
	opd_error error;
	lane->derived = &derived;
	lane->tenant = request->session->tenant->name;
	uint32_t i = part->first + from;
	for (; i < part->first + part->count; i++) {
		if (i != part->first + from && lane_should_yield(lane))
			break;
		const struct step *step = &prepared->steps[i];
		uint64_t began = run->node_ns == NULL ? 0 : request_now_ns();
		if (step->order > atomic_load_explicit(&run->failed_order, memory_order_relaxed))
			continue;
		if (atomic_load_explicit(&request->session->gone, memory_order_relaxed) || lane_cancelled(lane)) {
			note_failure(run, step->order, opd_fail(&error, OPD_CANCELLED, "graph '%s': nobody wants its results any more", run->graph->name.data), &error);
			i = part->first + part->count;
			break;
		}
		opd_status status = run_step(run, step, &exec, &error);
		if (status != OPD_OK)
			note_failure(run, step->order, graph_node_error(run->graph, step->node, status, &error), &error);
		if (run->node_ns != NULL)
			run->node_ns[i] = request_now_ns() - began;
	}
	lane->derived = NULL;
	return i - part->first;
}

struct stage_run {
	struct graph_run *run;
	const struct schedule_stage *stage;
	const struct lane_exec *lane;
};

/* Kernels may open loops of their own: threads that have no part left help with those. */
static void run_parts(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct stage_run *stage = argument;
	(void)thread;
	for (uint64_t i = begin; i < end; i++) {
		struct lane_exec mine = {.lane = stage->lane->lane, .job = stage->lane->job, .leader = stage->lane->leader, .threads = stage->lane->threads};
		(void)run_part(stage->run, &stage->run->prepared->parts[stage->stage->first + i], 0, &mine);
	}
}

/* A stage of one part: it may go on later where it is. */
static void run_alone(struct graph_run *run, const struct schedule_part *part, struct lane_exec *lane)
{
	run->at_step = run_part(run, part, run->at_step, lane);
	lane->again = run->at_step < part->count;
	if (!lane->again)
		run->at_step = 0;
}

static opd_status run_stages(struct graph_run *run, struct lane_exec *lane)
{
	const struct prepared *prepared = run->prepared;
	if (!run->begun)
		atomic_store_explicit(&run->failed_order, GRAPH_NONE, memory_order_relaxed);
	const uint32_t began_at = run->at_stage;
	for (; run->at_stage < prepared->stage_count && !lane->again; run->at_stage += !lane->again) {
		struct stage_run stage = {run, &prepared->stages[run->at_stage], lane};
		if (run->at_stage != began_at && lane_should_yield(lane))
			lane->again = true;
		else if (stage.stage->count == 1)
			run_alone(run, &prepared->parts[stage.stage->first], lane);
		else
			lane_parallel_for(lane, stage.stage->count, 1, run_parts, &stage);
	}
	run->begun = true;
	if (lane->again)
		return OPD_OK;
	if (atomic_load_explicit(&run->failed_order, memory_order_relaxed) != GRAPH_NONE)
		return run->request->status;
	make_copies(prepared, prepared->first_late, prepared->copy_count - prepared->first_late);
	return OPD_OK;
}

/* ---- */

/* And that those that are wanted in shared memory fit there. */
opd_status graph_describe_outputs(struct graph_run *run)
{
	for (uint32_t i = 0; i < run->prepared->output_count; i++)
		describe_output(run, i);
	return shared_check_results(run->request);
}

/* Some input of a graph of the CPU must come from a device first. */
static bool lies_elsewhere(const struct graph_run *run)
{
	return run->hosts == NULL && graph_brings(run);
}

/* To its end, or until others are to come first. */
static void go_on(struct graph_run *run, struct lane_exec *lane)
{
	run->request->status = run_stages(run, lane);
	run->request->clock.ended = request_now_ns();
}

void graph_execute(struct graph_run *run, struct lane_exec *lane)
{
	struct request *request = run->request;
	opd_status status = OPD_OK;
	if (run->begun) {
		go_on(run, lane);
		return;
	}
	if (run->prepared == NULL) {
		uint64_t began = request_now_ns();
		run->dispatched = true;
		(void)atomic_fetch_add_explicit(&request->context->server->graph_dispatches, 1, memory_order_relaxed);
		status = prepared_make(run, &request->error);
		run->prepare_ns = request_now_ns() - began;
	}
	if (status == OPD_OK)
		status = graph_describe_outputs(run);
	if (request->message.run.mode != MSG_RUN) { /* what these ask for is prepared */
		request->status = status;
		return;
	}
	if (status == OPD_OK && (run->prepared->device != 0 || lies_elsewhere(run))) {
		run->prepared_only = true;
		request->status = OPD_OK;
		return;
	}
	if (status == OPD_OK)
		status = allocate(run, &request->error);
	request->clock.started = request_now_ns();
	request->status = status;
	if (status == OPD_OK) {
		set_addresses(run);
		go_on(run, lane);
	} else {
		request->clock.ended = request_now_ns();
	}
}
