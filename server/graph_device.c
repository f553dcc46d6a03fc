/* Runs of a graph whose nodes all run on one device: one job of its lane, memory that stays between runs, and, where the backend can, one launch.
 *
 * A prepared graph keeps what its kernels touch where it is: a buffer for intermediate results, one for each input that a run brings, one for each result, the states and constants
 * where they live. A run brings new inputs to those places and enqueues node after node. From the second run on what is enqueued is captured once and launched from then on; a
 * state that was moved, or a constant's mirror that went, makes a new capture. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/device_work.h"
#include "server/graph_run.h"
#include "server/module.h"
#include "server/request.h"

/* What was brought to an input's place from the device's own memory. */
struct content {
	uint64_t version; /* of the bytes there (struct buffer); 0: others, or nobody knows */
	uint64_t offset;
	bool sure; /* the run that brought it has succeeded */
};

struct graph_device {
	struct content *contents; /* [input_count] */
	const struct device_job *latest; /* the run that was enqueued last */
	struct buffer **bases; /* [base_count]: places of its own, referenced; NULL: of states and constants, which live elsewhere */
	struct buffer *scratch;
	struct buffer *fault;
	void *captured; /* the backend's; NULL: not yet, or no more */
	uint32_t runs;
	bool checks; /* some node's kernels check indices */
	bool plain;  /* can't be captured */
	_Atomic uint64_t last_ns; /* that the device took for the last captured run; 0: there was none */
};

static struct request *request_of(struct device_job *job)
{
	return (struct request *)((char *)job - offsetof(struct request, device_job));
}

static const struct device *device_of(const struct prepared *prepared)
{
	return &prepared->snapshot->devices[prepared->device];
}

/* ---- What stays between runs ---- */

static void forget_captured(const struct prepared *prepared)
{
	struct graph_device *mine = prepared->on_device;
	if (mine->captured != NULL)
		device_of(prepared)->backend->graph_destroy(device_of(prepared)->state, mine->captured);
	mine->captured = NULL;
}

void graph_device_release(struct prepared *prepared)
{
	struct graph_device *mine = prepared->on_device;
	if (mine == NULL)
		return;
	forget_captured(prepared);
	for (uint32_t i = 0; i < prepared->base_count; i++)
		buffer_unref(mine->bases[i]);
	buffer_unref(mine->scratch);
	buffer_unref(mine->fault);
	free(mine->bases);
	free(mine->contents);
	free(mine);
	prepared->on_device = NULL;
}

static bool create(struct prepared *prepared)
{
	struct graph_device *mine = calloc(1, sizeof *mine);
	struct buffer **bases = calloc(prepared->base_count, sizeof *bases);
	struct content *contents = calloc((size_t)prepared->input_count + 1, sizeof *contents);
	if (mine == NULL || bases == NULL || contents == NULL) {
		free(mine);
		free(bases);
		free(contents);
		return false;
	}
	mine->bases = bases;
	mine->contents = contents;
	mine->plain = device_of(prepared)->backend->capture_begin == NULL;
	for (uint32_t i = 0; i < prepared->step_count; i++) {
		const struct step *step = &prepared->steps[i];
		mine->checks = mine->checks || step->def->check != NULL;
		mine->plain = mine->plain || (step->impl->def->flags & OPD_IMPL_NO_CAPTURE) != 0;
	}
	prepared->on_device = mine;
	return true;
}

/* A place that the prepared graph keeps: made once, of use to every run. */
static opd_status keep(struct device_lane *lane, struct device_job *job, struct buffer **place, uint64_t bytes)
{
	if (*place != NULL)
		return device_hold(job, buffer_ref(*place));
	struct buffer *buffer;
	opd_status status = device_alloc(lane, job, bytes, &buffer);
	if (status == OPD_OK)
		*place = buffer_ref(buffer);
	return status;
}

/* Of a state or a constant, which the job holds: a reference beyond it would make a state look shared. What is captured is right while the address is the same. */
static void set_base(struct prepared *prepared, uint32_t base, const struct buffer *buffer)
{
	if (prepared->bases[base] != buffer->data)
		forget_captured(prepared);
	graph_set_base(prepared, base, buffer->data);
}

static opd_status keep_base(struct device_lane *lane, struct device_job *job, struct prepared *prepared, uint32_t base, uint64_t bytes)
{
	struct graph_device *mine = prepared->on_device;
	const bool fresh = mine->bases[base] == NULL;
	opd_status status = keep(lane, job, &mine->bases[base], bytes);
	if (status == OPD_OK && fresh)
		graph_set_base(prepared, base, mine->bases[base]->data);
	return status;
}

/* ---- Inputs ---- */

static uint64_t extent_of(const opd_tensor *tensor)
{
	uint64_t end = 0;
	return tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strides, 0, &end) ? end : 0;
}

/* From where it lies on the device, unless the last run has left the very bytes there. */
static opd_status bring_here(struct device_lane *lane, struct device_job *job, struct graph_device *mine, uint32_t index, const struct buffer *here, uint64_t offset, uint64_t bytes)
{
	struct content *content = &mine->contents[index];
	if (content->sure && content->version == here->version && content->offset == offset)
		return OPD_OK;
	*content = (struct content){.version = here->version, .offset = offset};
	return device_gather(lane, job, mine->bases[1 + index], here, offset, bytes);
}

/* It was on the device when the run was submitted, and what came before has since taken its room there: then host memory has it only if it was brought from there. */
static opd_status bring_from_host(struct device_lane *lane, struct device_job *job, struct buffer *there, const struct kept_tensor *kept, const opd_tensor *tensor, uint64_t bytes)
{
	if (tensor->data != NULL)
		return device_gather_in(lane, job, there, opd_tensor_data(tensor), bytes);
	struct buffer *host = kept == NULL ? NULL : buffer_on(kept->buffer, 0);
	if (host == NULL)
		return opd_fail(&job->error, OPD_RESOURCE_EXHAUSTED, "%s: an operand's copy on %s has given way to other tensors", job->name, lane->device.name);
	opd_status status = device_hold(job, host);
	return status == OPD_OK ? device_gather_in(lane, job, there, host->data + tensor->byte_offset, bytes) : status;
}

/* What a run brings goes to its place. */
static opd_status bring_operand(struct device_lane *lane, struct device_job *job, struct graph_run *run, uint32_t index)
{
	struct prepared *prepared = run->prepared;
	const struct request_run *own = &run->request->run;
	const opd_tensor *tensor = graph_run_operand(&own->bound, &run->graph->inputs[index]);
	const struct kept_tensor *kept = own->kept[bound_index(&own->bound, tensor)];
	const uint64_t bytes = extent_of(&prepared->inputs[index].tensor);
	opd_status status = keep_base(lane, job, prepared, 1 + index, bytes);
	if (status != OPD_OK || bytes == 0)
		return status;
	struct graph_device *mine = prepared->on_device;
	struct buffer *here = kept == NULL ? NULL : buffer_on(kept->buffer, lane->number);
	if (here == NULL) {
		mine->contents[index] = (struct content){0};
		return bring_from_host(lane, job, mine->bases[1 + index], kept, tensor, bytes);
	}
	status = device_hold(job, here);
	return status == OPD_OK ? bring_here(lane, job, mine, index, here, tensor->byte_offset, bytes) : status;
}

/* The value that a donating node writes: where it lies if this run alone has it there, else a copy that takes its place when the run has succeeded. */
static opd_status bring_donated(struct device_lane *lane, struct device_job *job, struct graph_run *run, uint32_t index, struct state_use *state)
{
	struct kept_tensor *tensor = state->tensor;
	struct buffer *place;
	if (tensor->buffer->device == lane->number && !state->shared) {
		buffer_drop_mirrors(tensor->buffer, NULL);
		device_changes(lane, tensor->buffer);
		opd_status held = device_hold(job, buffer_ref(tensor->buffer));
		if (held != OPD_OK)
			return held;
		device_writes(job, tensor->buffer);
		set_base(run->prepared, 1 + index, tensor->buffer);
		return OPD_OK;
	}
	struct buffer *here = buffer_on(tensor->buffer, lane->number);
	struct buffer *from = here != NULL ? here : buffer_on(tensor->buffer, 0);
	if (from == NULL)
		return opd_fail(&job->error, OPD_INTERNAL, "%s: a state is neither on %s nor in host memory", job->name, lane->device.name);
	opd_status status = device_hold(job, from);
	if (status == OPD_OK)
		status = device_alloc(lane, job, tensor->bytes, &place);
	if (status == OPD_OK)
		device_writes(job, place);
	if (status == OPD_OK)
		status = here != NULL ? device_gather(lane, job, place, from, 0, tensor->bytes) : device_copy_in(lane, job, place, 0, from->data, tensor->bytes);
	if (status != OPD_OK)
		return status;
	state->fresh = kept_tensor_create(tensor->dtype, tensor->rank, tensor->shape, tensor->bytes, place);
	if (state->fresh == NULL)
		return device_no_memory(job);
	set_base(run->prepared, 1 + index, place);
	return OPD_OK;
}

static opd_status bring_kept(struct device_lane *lane, struct device_job *job, struct graph_run *run, uint32_t index, struct kept_tensor *kept)
{
	struct buffer *here;
	bool moved;
	opd_status status = device_bring(lane, job, kept->buffer, kept->bytes, &here, &moved);
	if (status == OPD_OK)
		set_base(run->prepared, 1 + index, here);
	return status;
}

static opd_status bring_inputs(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < run->graph->input_count; i++) {
		const struct graph_input *input = &run->graph->inputs[i];
		if (input->kind == MSG_GRAPH_INPUT)
			status = bring_operand(lane, job, run, i);
		else if (input->kind == MSG_GRAPH_CONSTANT)
			status = bring_kept(lane, job, run, i, input->constant);
		else if (run->states[input->state].donated)
			status = bring_donated(lane, job, run, i, &run->states[input->state]);
		else
			status = bring_kept(lane, job, run, i, run->states[input->state].tensor);
	}
	return status;
}

static opd_status make_room(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	struct prepared *prepared = run->prepared;
	struct graph_device *mine = prepared->on_device;
	opd_status status = keep_base(lane, job, prepared, 0, prepared->sizes.peak_bytes);
	for (uint32_t i = 0; status == OPD_OK && i < prepared->output_count; i++)
		status = keep_base(lane, job, prepared, 1 + prepared->input_count + i, extent_of(&prepared->outputs[i]));
	if (status == OPD_OK && prepared->scratch_bytes != 0)
		status = keep(lane, job, &mine->scratch, prepared->scratch_bytes);
	if (status == OPD_OK && mine->checks)
		status = keep(lane, job, &mine->fault, sizeof(opd_index_fault));
	return status;
}

/* ---- Nodes ---- */

static opd_status clear_fault(struct device_lane *lane, struct device_job *job, const struct graph_device *mine)
{
	static const opd_index_fault none;
	return mine->fault == NULL ? OPD_OK : device_gather_zeros(lane, job, mine->fault, &none, sizeof none);
}

static opd_status enqueue_copies(struct device_lane *lane, struct device_job *job, const struct prepared *prepared, uint32_t first, uint32_t count)
{
	const opd_backend *backend = lane->device.backend;
	for (uint32_t i = first; i < first + count; i++) {
		const struct copy *copy = &prepared->copies[i];
		const uint64_t bytes = copy->from->elements * opd_dtype_bytes(copy->from->dtype);
		if (bytes == 0)
			continue;
		opd_status status = backend->copy_device(lane->device.state, lane->stream, copy->to->data, copy->to->byte_offset, copy->from->data,
		                                         copy->from->byte_offset, bytes, &job->error);
		if (status != OPD_OK)
			return device_failed(lane, job, status, "copy_device");
	}
	return OPD_OK;
}

static opd_status enqueue_step(struct device_lane *lane, struct device_job *job, struct graph_run *run, const struct step *step, opd_exec *exec)
{
	const struct prepared *prepared = run->prepared;
	exec->host = &step->impl->provider->module->host;
	exec->plan = step->plan;
	exec->fault_node = (uint32_t)(step - prepared->steps);
	exec->fault = step->def->check == NULL ? NULL : prepared->on_device->fault->data;
	opd_status status = step->impl->def->run(step->impl->def, step->impl->state, &step->bound.call, exec, &job->error);
	device_note(lane, status, &job->error);
	if (status != OPD_OK)
		status = module_failure(status, &job->error, "%s.%s failed", step->impl->provider->name, step->bound.op->schema->name);
	if (status == OPD_OK)
		status = enqueue_copies(lane, job, prepared, step->copies, step->copy_count);
	return status == OPD_OK ? OPD_OK : graph_node_error(run->graph, step->node, status, &job->error);
}

static opd_status enqueue_steps(struct device_lane *lane, struct device_job *job, struct graph_run *run, uint32_t flags)
{
	const struct prepared *prepared = run->prepared;
	struct lane_exec serial = lane_exec_serial(NULL);
	opd_exec exec = {.struct_bytes = sizeof exec,
	                 .threads = 1,
	                 .lane = &serial,
	                 .stream = lane->stream,
	                 .device = lane->number,
	                 .ordinal = lane->device.ordinal,
	                 .flags = flags,
	                 .scratch = prepared->on_device->scratch == NULL ? NULL : prepared->on_device->scratch->data};
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < prepared->step_count; i++)
		status = enqueue_step(lane, job, run, &prepared->steps[i], &exec);
	return status == OPD_OK ? enqueue_copies(lane, job, prepared, prepared->first_late, prepared->copy_count - prepared->first_late) : status;
}

/* What can't be captured is enqueued as before, now and from then on. */
static void capture(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	const opd_backend *backend = lane->device.backend;
	struct graph_device *mine = run->prepared->on_device;
	opd_error error = {0};
	if (mine->plain || mine->captured != NULL || mine->runs == 0)
		return;
	opd_status status = backend->capture_begin(lane->device.state, lane->stream, &error);
	if (status == OPD_OK) {
		const opd_status enqueued = enqueue_steps(lane, job, run, OPD_EXEC_CAPTURING);
		status = backend->capture_end(lane->device.state, lane->stream, &mine->captured, &error);
		if (status != OPD_OK)
			mine->captured = NULL;
		if (enqueued != OPD_OK)
			forget_captured(run->prepared);
		job->error = (opd_error){0};
	}
	device_note(lane, status, &error);
	mine->plain = mine->captured == NULL;
	if (mine->plain)
		LOG(lane->server->log, LOG_WARN, "a graph can't be captured", LOG_STR("graph", run->graph->name.data), LOG_STR("device", lane->device.name),
		    LOG_STR("error", error.text));
}

static void mark_written(struct device_job *job, struct graph_run *run)
{
	job->writes = true;
	for (uint32_t i = 0; i < run->graph->state_count; i++)
		run->states[i].written = run->states[i].donated;
}

/* Their budgets added up; one without a budget may take any time. */
static uint64_t budget_of(const struct server *server, const struct prepared *prepared)
{
	uint64_t sum_ns = 0;
	for (uint32_t i = 0; i < prepared->step_count; i++) {
		const uint64_t budget_ns = watch_budget_ns(server, prepared->steps[i].impl->provider);
		if (budget_ns == 0)
			return 0;
		sum_ns += budget_ns;
	}
	return sum_ns;
}

static void watch_nodes(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	const struct prepared *prepared = run->prepared;
	struct watch_subject subject = {.request = run->request, .device = lane};
	if (prepared->step_count == 0)
		return;
	subject.provider = prepared->steps[0].impl->provider;
	for (uint32_t i = 1; i < prepared->step_count; i++)
		if (prepared->steps[i].impl->provider != subject.provider)
			subject.provider = NULL;
	device_watch(job, &subject, budget_of(lane->server, prepared));
}

static opd_status launch(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	opd_status status = lane->device.backend->graph_launch(lane->device.state, run->prepared->on_device->captured, lane->stream, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "graph_launch");
}

static opd_status enqueue_nodes(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	struct graph_device *mine = run->prepared->on_device;
	capture(lane, job, run);
	mine->runs++;
	mark_written(job, run);
	watch_nodes(lane, job, run);
	opd_status status = mine->captured == NULL ? enqueue_steps(lane, job, run, 0) : launch(lane, job, run);
	device_watched(lane, job);
	return status;
}

/* ---- Results ---- */

/* Those that stay get a place of their own: the graph's is written again by the next run. */
static opd_status take_results(struct device_lane *lane, struct device_job *job, struct graph_run *run)
{
	const struct prepared *prepared = run->prepared;
	struct request *request = run->request;
	struct graph_device *mine = prepared->on_device;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < prepared->output_count; i++) {
		const struct buffer *from = mine->bases[1 + prepared->input_count + i];
		const uint64_t bytes = extent_of(&prepared->outputs[i]);
		struct buffer *kept = NULL;
		if (run_keeps(request, i))
			status = device_alloc(lane, job, bytes, &kept);
		if (status == OPD_OK && kept != NULL)
			device_writes(job, kept);
		if (status == OPD_OK && kept != NULL)
			status = device_gather(lane, job, kept, from, 0, bytes);
		if (status == OPD_OK && kept != NULL)
			request->run.resident[i] = buffer_ref(kept);
		if (status == OPD_OK && request->run.bound.outputs[i].data != NULL)
			status = device_gather_out(lane, job, request->run.bound.outputs[i].data, from, bytes);
	}
	if (status == OPD_OK && mine->fault != NULL)
		status = device_gather_out(lane, job, &run->found, mine->fault, sizeof run->found);
	return status == OPD_OK ? device_gather_end(lane, job) : status;
}

/* ---- The job ---- */

static void graph_enqueue(struct device_lane *lane, struct device_job *job)
{
	struct graph_run *run = request_of(job)->graph_run;
	job->status = device_begin(lane, job);
	if (job->status == OPD_OK && run->prepared->on_device == NULL && !create(run->prepared))
		job->status = device_no_memory(job);
	if (job->status != OPD_OK)
		return;
	run->found = (opd_index_fault){0};
	run->prepared->on_device->latest = job;
	job->status = make_room(lane, job, run);
	const uint64_t moves_from = request_now_ns();
	if (job->status == OPD_OK)
		job->status = bring_inputs(lane, job, run);
	if (job->status == OPD_OK)
		job->status = clear_fault(lane, job, run->prepared->on_device);
	if (job->status == OPD_OK)
		job->status = device_gather_end(lane, job);
	job->moves_ns = request_now_ns() - moves_from;
	if (job->status == OPD_OK)
		job->status = enqueue_nodes(lane, job, run);
	if (job->status == OPD_OK)
		job->status = take_results(lane, job, run);
}

/* Of the last run: what it has brought is there. A failed one may not have brought it, nor one behind it what it found to be there. */
static void settle_contents(const struct prepared *prepared, const struct device_job *job)
{
	struct graph_device *mine = prepared->on_device;
	for (uint32_t i = 0; i < prepared->input_count; i++) {
		if (job->status != OPD_OK)
			mine->contents[i] = (struct content){0};
		else if (mine->latest == job)
			mine->contents[i].sure = mine->contents[i].version != 0;
	}
}

static void graph_complete(struct device_lane *lane, struct device_job *job)
{
	struct graph_run *run = request_of(job)->graph_run;
	const struct prepared *prepared = run->prepared;
	struct graph_device *mine = prepared->on_device;
	(void)lane;
	if (mine != NULL)
		settle_contents(prepared, job);
	if (mine != NULL && mine->captured != NULL)
		atomic_store_explicit(&mine->last_ns, job->device_ns, memory_order_relaxed);
	if (job->status != OPD_OK || run->found.state == 0)
		return;
	const struct step *step = &prepared->steps[run->found.node < prepared->step_count ? run->found.node : 0];
	job->status = graph_node_error(run->graph, step->node, device_fault_error(step->bound.op, &run->found, &job->error), &job->error);
}

static void graph_done(struct request *request)
{
	const struct device_job *job = &request->device_job;
	request->graph_run->lending = false;
	request->status = job->status;
	if (job->status != OPD_OK)
		request->error = job->error;
	request->clock.started = job->started_ns;
	request->clock.ended = job->ended_ns;
	request->clock.moves = job->moves_ns;
	execute_done(request);
}

/* Results that the reply brings have host memory. */
static opd_status alloc_results(struct graph_run *run)
{
	struct request *request = run->request;
	request->run.resident = arena_array(&request->arena, run->prepared->output_count, sizeof request->run.resident[0]);
	if (request->run.resident == NULL)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "graph '%s': out of memory", run->graph->name.data);
	opd_status status = graph_describe_outputs(run);
	if (status != OPD_OK)
		return status;
	for (uint32_t i = 0; i < run->prepared->output_count; i++) {
		opd_tensor *output = &request->run.bound.outputs[i];
		if (run_leaves_out(request, i))
			continue;
		status = buffer_alloc(request->session->account, extent_of(output), 0, &request->run.outputs[i], &request->error);
		if (status != OPD_OK)
			return opd_error_prefix(&request->error, status, "graph '%s': output '%s'", run->graph->name.data, run->graph->outputs[i].name.data);
		output->data = request->run.outputs[i]->data;
	}
	return OPD_OK;
}

/* A captured one is enqueued in one launch: by whoever waits for it, who also looks for its end if that is near. */
static uint64_t graph_here_ns(const struct graph_run *run, uint64_t last_ns)
{
	const struct graph_device *mine = run->prepared->on_device;
	return mine == NULL || mine->captured == NULL || last_ns == 0 ? 0 : device_here_ns(run->request, last_ns);
}

static void graph_begun(struct device_job *job)
{
	graph_run_begun(request_of(job)->graph_run);
}

void graph_device_ask(struct graph_run *run)
{
	device_lane_ask(run->request->device_lane, &run->request->device_job);
}

void graph_device_start(struct graph_run *run)
{
	struct request *request = run->request;
	const uint32_t device = run->prepared->device;
	struct device_lane *lane = NULL;
	if (request->status == OPD_OK)
		request->status = alloc_results(run);
	if (request->status == OPD_OK)
		request->status = device_lane_get(request->context->server, device_of(run->prepared), device, &lane, &request->error);
	if (request->status != OPD_OK) {
		execute_done(request);
		return;
	}
	const struct graph_device *mine = run->prepared->on_device;
	const uint64_t last_ns = mine == NULL ? 0 : atomic_load_explicit(&mine->last_ns, memory_order_relaxed);
	run->held = prepared_ref(run->prepared);
	request->device_job = (struct device_job){
		.name = run->graph->name.data,
		.account = request->session->account,
		.deadline_ns = request->run.deadline_ns,
		.item = {.class = (uint8_t)request->run.class, .estimate_ns = last_ns},
		.here_ns = graph_here_ns(run, last_ns),
		.unwanted = &request->session->gone,
		.enqueue = graph_enqueue,
		.complete = graph_complete,
		.begun = request->direct ? NULL : graph_begun,
		.asked = run->next != NULL,
	};
	if (request->message.run.explain)
		request->clock.queued = request_now_ns();
	run->lending = !request->direct;
	device_submit(request, lane, graph_done);
}
