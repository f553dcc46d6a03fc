/* Requests that run as one kernel on a device: their rows put one below the other in memory that the driver copies from at once, and their results taken from there. */
#include <stdlib.h>
#include <string.h>

#include "server/batch.h"
#include "server/daemon.h"
#include "server/device_work.h"
#include "server/module.h"
#include "server/request.h"

/* A job of the lane's own: its memory is the daemon's, no session of its members is to pay for the others. */
struct device_batch {
	struct device_job job;
	uint64_t rows;
	uint32_t count;
	bool spans_loops;
	uint64_t largest; /* elements of the largest operand or result */
	struct batch_call *call; /* in the job's arena */
};

/* Host memory for the rows of all. */
struct stage {
	unsigned char *data;
	void *mapped; /* where kernels reach it; NULL: nowhere */
};

static struct request *request_of(struct device_job *member)
{
	return (struct request *)((char *)member - offsetof(struct request, device_job));
}

static const opd_tensor *operand_of(struct device_job *member, uint32_t param)
{
	return request_of(member)->run.bound.call.args[param].tensor;
}

static uint64_t largest_of(const opd_call *call)
{
	uint64_t largest = 0;
	for (uint32_t i = 0; i < call->arg_count; i++)
		if (call->args[i].kind == OPD_ARG_TENSOR && call->args[i].tensor->elements > largest)
			largest = call->args[i].tensor->elements;
	for (uint32_t i = 0; i < call->output_count; i++)
		largest = call->outputs[i]->elements > largest ? call->outputs[i]->elements : largest;
	return largest;
}

/* ---- Rows ---- */

static opd_status stage_take(struct device_lane *lane, struct device_job *job, uint64_t bytes, struct stage *stage_out)
{
	struct buffer *buffer;
	stage_out->data = device_ring_take(lane, job, bytes, &stage_out->mapped);
	if (stage_out->data != NULL)
		return OPD_OK;
	stage_out->mapped = NULL;
	opd_status status = buffer_alloc(job->account, bytes, 0, &buffer, &job->error);
	if (status != OPD_OK)
		return status;
	stage_out->data = buffer->data;
	return device_hold(job, buffer);
}

/* Over the link, where the kernel may read or write so (server/device_run.c). */
static bool stays_in_stage(const struct device_batch *batch, const struct stage *stage, const opd_tensor *tensor)
{
	struct device_job *first = batch->job.members;
	return (request_of(first)->run.dispatch.impl->def->flags & OPD_IMPL_MAPPED) != 0 && stage->mapped != NULL && tensor->elements >= batch->largest / 2 &&
	       bound_bytes(tensor) <= DEVICE_MAPPED_RING_BYTES;
}

static opd_status place_rows(struct device_lane *lane, struct device_batch *batch, uint32_t index)
{
	struct device_job *job = &batch->job;
	opd_tensor *all = &batch->call->operands[index].tensor;
	struct stage stage;
	struct buffer *there;
	opd_status status = stage_take(lane, job, bound_bytes(all), &stage);
	if (status != OPD_OK)
		return status;
	unsigned char *to = stage.data;
	for (struct device_job *member = job->members; member != NULL; member = member->next) {
		const opd_tensor *from = operand_of(member, batch->call->params[index]);
		memcpy(to, opd_tensor_data(from), bound_bytes(from));
		to += bound_bytes(from);
	}
	all->data = stage.mapped;
	if (stays_in_stage(batch, &stage, all))
		return OPD_OK;
	status = device_alloc(lane, job, bound_bytes(all), &there);
	if (status != OPD_OK)
		return status;
	all->data = there->data;
	status = lane->device.backend->copy_in(lane->device.state, lane->stream, there->data, 0, stage.data, bound_bytes(all), &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_in");
}

static opd_status land_rows(struct device_batch *batch, uint32_t index, const struct stage *stage)
{
	const unsigned char *from = stage->data;
	for (struct device_job *member = batch->job.members; member != NULL; member = member->next) {
		const opd_tensor *to = &request_of(member)->run.bound.outputs[index];
		if (!device_ring_land(&batch->job, opd_tensor_data(to), from, bound_bytes(to)))
			return device_no_memory(&batch->job);
		from += bound_bytes(to);
	}
	return OPD_OK;
}

/* ---- The call ---- */

/* What all of them read: it stays there for the next. */
static opd_status place_shared(struct device_lane *lane, struct device_batch *batch, uint32_t param)
{
	struct device_job *job = &batch->job;
	const struct request *first = request_of(job->members);
	const opd_tensor *host = batch->call->args[param].tensor;
	const struct kept_tensor *kept = first->run.kept[bound_index(&first->run.bound, host)];
	opd_tensor *tensor = arena_alloc(&job->arena, sizeof *tensor);
	struct buffer *here;
	bool moved;
	if (tensor == NULL)
		return device_no_memory(job);
	opd_status status = device_bring(lane, job, kept->buffer, kept->bytes, &here, &moved);
	if (status != OPD_OK)
		return status;
	*tensor = *host;
	tensor->data = here->data;
	tensor->device = lane->number;
	batch->call->args[param].tensor = tensor;
	return OPD_OK;
}

static opd_status place_operands(struct device_lane *lane, struct device_batch *batch)
{
	struct batch_call *call = batch->call;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < call->operand_count; i++) {
		call->operands[i].tensor.device = lane->number;
		status = place_rows(lane, batch, i);
	}
	for (uint32_t i = 0, rows = 0; status == OPD_OK && i < call->call.arg_count; i++) {
		if (rows < call->operand_count && call->params[rows] == i)
			rows++;
		else if (call->args[i].kind == OPD_ARG_TENSOR)
			status = place_shared(lane, batch, i);
	}
	return status;
}

/* Where the kernel writes: memory of the device, or the stage itself. */
static opd_status place_result(struct device_lane *lane, struct device_batch *batch, uint32_t index, struct stage *stage, struct buffer **there_out)
{
	opd_tensor *all = &batch->call->results[index].tensor;
	*there_out = NULL;
	opd_status status = stage_take(lane, &batch->job, bound_bytes(all), stage);
	all->device = lane->number;
	all->data = status == OPD_OK ? stage->mapped : NULL;
	if (status != OPD_OK || stays_in_stage(batch, stage, all))
		return status;
	status = device_alloc(lane, &batch->job, bound_bytes(all), there_out);
	if (status == OPD_OK)
		all->data = (*there_out)->data;
	return status;
}

static opd_status copy_result(struct device_lane *lane, struct device_batch *batch, uint32_t index, const struct stage *stage, const struct buffer *there)
{
	struct device_job *job = &batch->job;
	opd_status status = OPD_OK;
	if (there != NULL)
		status = lane->device.backend->copy_out(lane->device.state, lane->stream, stage->data, there->data, 0, bound_bytes(&batch->call->results[index].tensor), &job->error);
	return status == OPD_OK ? land_rows(batch, index, stage) : device_failed(lane, job, status, "copy_out");
}

static opd_status enqueue_kernel(struct device_lane *lane, struct device_batch *batch)
{
	struct device_job *job = &batch->job;
	struct request *first = request_of(job->members);
	const struct impl *impl = first->run.dispatch.impl;
	struct lane_exec serial;
	const opd_exec exec = device_exec(lane, impl, &serial);
	const struct watch_subject subject = {.impl = impl, .provider = impl->provider, .request = first, .device = lane, .members = job->members};
	if (impl->def->predicate != NULL && !impl->def->predicate(impl->def, impl->state, &batch->call->call, NULL))
		return opd_fail(&job->error, OPD_UNIMPLEMENTED, "%s: refused together", job->name); /* each runs alone then */
	for (struct device_job *member = job->members; member != NULL; member = member->next)
		request_of(member)->run.written = true;
	device_watch(job, &subject, batch->spans_loops ? 0 : watch_budget_ns(lane->server, impl->provider)); /* there was none when a batch of several loops was made */
	opd_status status = impl->def->run(impl->def, impl->state, &batch->call->call, &exec, &job->error);
	device_watched(lane, job);
	if (status == OPD_OK)
		return OPD_OK;
	device_note(lane, status, &job->error);
	return module_failure(status, &job->error, "%s.%s failed", impl->provider->name, job->name);
}

/* ---- The job ---- */

static opd_status enqueue_all(struct device_lane *lane, struct device_batch *batch)
{
	struct stage stages[BATCH_ARGS_MAX];
	struct buffer *there[BATCH_ARGS_MAX];
	const uint32_t results = batch->call->call.output_count;
	const uint64_t moves_from = request_now_ns();
	opd_status status = place_operands(lane, batch);
	for (uint32_t i = 0; status == OPD_OK && i < results; i++)
		status = place_result(lane, batch, i, &stages[i], &there[i]);
	batch->job.moves_ns = request_now_ns() - moves_from;
	if (status == OPD_OK)
		status = enqueue_kernel(lane, batch);
	for (uint32_t i = 0; status == OPD_OK && i < results; i++)
		status = copy_result(lane, batch, i, &stages[i], there[i]);
	return status;
}

static void batch_enqueue(struct device_lane *lane, struct device_job *job)
{
	struct device_batch *batch = (struct device_batch *)(void *)job;
	job->status = device_begin(lane, job);
	if (job->status != OPD_OK)
		return;
	batch->call = arena_alloc(&job->arena, sizeof *batch->call);
	if (batch->call == NULL) {
		job->status = device_no_memory(job);
		return;
	}
	batch_describe(batch->call, request_of(job->members), batch->rows);
	batch->largest = largest_of(&batch->call->call);
	job->status = enqueue_all(lane, batch);
}

static void tell_moves(struct device_lane *lane, const struct device_batch *batch, struct device_job *member)
{
	struct request *request = request_of(member);
	const struct batch_call *call = batch->call;
	for (uint32_t i = 0; i < call->operand_count; i++)
		device_note_move(request, request->run.op->schema->params[call->params[i]].name, 0, lane->number, bound_bytes(operand_of(member, call->params[i])));
	for (uint32_t i = 0; i < call->call.output_count; i++)
		device_note_move(request, "result", lane->number, 0, bound_bytes(&request->run.bound.outputs[i]));
}

static void batch_complete(struct device_lane *lane, struct device_job *job)
{
	const struct device_batch *batch = (const struct device_batch *)(const void *)job;
	if (job->status != OPD_OK)
		return;
	for (struct device_job *member = job->members; member != NULL; member = member->next) {
		request_of(member)->run.batched = batch->count;
		tell_moves(lane, batch, member);
	}
	batch_count(request_of(job->members), batch->count);
}

struct device_job *device_batch_create(struct device_lane *lane, struct device_job *members)
{
	struct device_batch *batch = calloc(1, sizeof *batch);
	if (batch == NULL)
		return NULL;
	batch->job.name = members->name;
	batch->job.account = lane->server->account;
	batch->job.enqueue = batch_enqueue;
	batch->job.complete = batch_complete;
	batch->job.members = members;
	for (const struct device_job *member = members; member != NULL; member = member->next) {
		batch->job.item.estimate_ns += member->item.estimate_ns;
		batch->spans_loops = batch->spans_loops || member->loop != members->loop;
		batch->rows += member->batch.rows;
		batch->count++;
	}
	return &batch->job;
}
