/* An op on a device: operands brought there, the kernel enqueued, results that stay left there and the others brought back. */
#include "server/device_run.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/batch.h"
#include "server/daemon.h"
#include "server/device_work.h"
#include "server/metrics.h"
#include "server/module.h"
#include "server/pins.h"
#include "server/placement.h"
#include "server/request.h"

/* What one attempt has on the device; in the job's arena. Arguments are the host's with `data` replaced. */
struct device_run {
	opd_arg *args;
	opd_tensor *outputs;
	const opd_tensor **output_list;
	struct buffer **results; /* [output_count] borrowed from the job */
	opd_call call;
	uint64_t largest; /* elements of the largest operand or result: what has as many is read or written about once */
	struct buffer *fault; /* NULL: index contents were checked in host memory */
	opd_index_fault found;
};

static struct request *request_of(struct device_job *job)
{
	return (struct request *)((char *)job - offsetof(struct request, device_job));
}

/* Where the bytes that the tensor touches end, from the start of its memory. */
static uint64_t touched_bytes(const opd_tensor *tensor)
{
	uint64_t end = 0;
	return tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strides, tensor->byte_offset, &end) ? end : 0;
}

void device_note_move(struct request *request, const char *what, uint32_t from, uint32_t to, uint64_t bytes)
{
	struct request_run *run = &request->run;
	const struct device *devices = request->snapshot->devices;
	if (run->moves != NULL)
		run->moves[run->move_count++] = (struct msg_move){msg_text(what), msg_text(devices[from].name), msg_text(devices[to].name), bytes};
}

/* Bytes that nobody keeps: this run's alone. A view far into a large tensor takes along only what it touches; whole lines are left out, so that its alignment stays. */
static opd_status copy_touched(struct device_lane *lane, struct request *request, const char *what, const opd_tensor *host, opd_tensor *tensor)
{
	struct buffer *buffer;
	const bool empty = opd_tensor_empty(host);
	const uint64_t skip = empty ? 0 : host->byte_offset / OPD_TENSOR_ALIGNMENT * OPD_TENSOR_ALIGNMENT;
	const uint64_t bytes = empty ? 0 : touched_bytes(host) - skip;
	opd_status status = device_alloc(lane, &request->device_job, bytes, &buffer);
	if (status != OPD_OK)
		return status;
	tensor->data = buffer->data;
	tensor->byte_offset = empty ? 0 : host->byte_offset - skip;
	device_note_move(request, what, 0, lane->number, bytes);
	return bytes == 0 ? OPD_OK : device_copy_in(lane, &request->device_job, buffer, 0, (const unsigned char *)host->data + skip, bytes);
}

/* ---- Over the link ---- */

/* A kernel that touches each element about once may do so over the link: a copy before or behind it costs more than the wait. From some MiB on copies are as fast, and leave the kernel's
 * multiprocessors to others. */
#define MAPPED_BYTES (4u << 20)

static uint64_t largest_of(const struct request *request)
{
	const struct bound *bound = &request->run.bound;
	uint64_t largest = 0;
	for (uint32_t i = 0; i < bound->operand_count; i++)
		largest = bound->operands[i].tensor.elements > largest ? bound->operands[i].tensor.elements : largest;
	for (uint32_t i = 0; i < bound->call.output_count; i++)
		largest = bound->outputs[i].elements > largest ? bound->outputs[i].elements : largest;
	return largest;
}

static bool may_be_mapped(const struct request *request, const struct device_run *mine, const opd_tensor *host)
{
	return (request->run.dispatch.impl->def->flags & OPD_IMPL_MAPPED) != 0 && !opd_tensor_empty(host) && opd_tensor_contiguous(host) && host->elements >= mine->largest / 2 &&
	       host->elements * opd_dtype_bytes(host->dtype) <= MAPPED_BYTES;
}

/* Its row-major elements where kernels reach them; false: nowhere. */
static bool map_operand(struct device_lane *lane, struct request *request, const struct device_run *mine, const opd_tensor *host, opd_tensor *tensor)
{
	const uint64_t bytes = host->elements * opd_dtype_bytes(host->dtype);
	const unsigned char *data = (const unsigned char *)host->data + host->byte_offset;
	void *mapped = NULL;
	if (!may_be_mapped(request, mine, host))
		return false;
	if (!pins_use(&lane->device, data, bytes, &mapped) && bytes <= DEVICE_MAPPED_RING_BYTES) {
		unsigned char *piece = device_ring_take(lane, &request->device_job, bytes, &mapped);
		if (piece != NULL && mapped != NULL)
			memcpy(piece, data, bytes);
	}
	tensor->data = mapped;
	tensor->byte_offset = 0;
	return mapped != NULL;
}

/* The kernel writes a result that only the reply brings where that lies, or into the ring, from where it goes there. */
static bool map_result(struct device_lane *lane, struct request *request, const struct device_run *mine, uint32_t index, opd_tensor *output)
{
	const opd_tensor *host = &request->run.bound.outputs[index];
	const uint64_t bytes = host->elements * opd_dtype_bytes(host->dtype);
	void *mapped = NULL;
	if (host->data == NULL || run_keeps(request, index) || !may_be_mapped(request, mine, host))
		return false;
	if (!pins_use(&lane->device, host->data, bytes, &mapped) && bytes <= DEVICE_MAPPED_RING_BYTES) {
		const unsigned char *piece = device_ring_take(lane, &request->device_job, bytes, &mapped);
		if (piece == NULL || mapped == NULL || !device_ring_land(&request->device_job, host->data, piece, bytes))
			return false;
	}
	output->data = mapped;
	return mapped != NULL;
}

/* ---- Operands ---- */

/* A kept tensor comes over whole and stays, for the next that reads it; a view of a small part of a large one comes alone. */
static opd_status place_kept(struct device_lane *lane, struct request *request, uint32_t index, opd_tensor *tensor)
{
	const struct operand *operand = &request->run.bound.operands[index];
	const struct kept_tensor *kept = request->run.kept[index];
	struct buffer *here;
	bool moved;
	if (operand->tensor.data != NULL && !buffer_is_on(kept->buffer, lane->number) && touched_bytes(&operand->tensor) - operand->tensor.byte_offset < kept->bytes / 4)
		return copy_touched(lane, request, operand->param, &operand->tensor, tensor);
	opd_status status = device_bring(lane, &request->device_job, kept->buffer, kept->bytes, &here, &moved);
	if (status != OPD_OK)
		return status;
	tensor->data = here->data;
	if (moved)
		device_note_move(request, operand->param, 0, lane->number, kept->bytes);
	return OPD_OK;
}

/* Its place is the result's: where it lies if nobody else reads it, or in a copy of this run's own. False: neither, it is an operand like others. */
static bool place_donated(struct device_lane *lane, struct request *request, struct device_run *mine, uint32_t index, opd_tensor *tensor, opd_status *status_out)
{
	struct device_job *job = &request->device_job;
	struct kept_tensor *kept = request->run.kept[index];
	struct donation *donation = donate_of(request, index);
	struct buffer *place;
	if (donation == NULL || (request->run.dispatch.impl->def->flags & OPD_IMPL_IN_PLACE) == 0)
		return false;
	if (kept->buffer->device == lane->number) {
		if (!donate_in_place(request, donation))
			return false;
		place = buffer_ref(kept->buffer);
		device_changes(lane, place);
		*status_out = device_hold(job, place);
	} else {
		struct buffer *host = buffer_on(kept->buffer, 0);
		if (host == NULL)
			return false;
		const void *from = host->data;
		*status_out = device_hold(job, host);
		if (*status_out == OPD_OK)
			*status_out = device_alloc(lane, job, kept->bytes, &place);
		if (*status_out == OPD_OK)
			*status_out = device_copy_in(lane, job, place, 0, from, kept->bytes);
		if (*status_out == OPD_OK)
			device_note_move(request, request->run.bound.operands[index].param, 0, lane->number, kept->bytes);
	}
	if (*status_out == OPD_OK) {
		tensor->data = place->data;
		mine->results[donation->result] = place;
	}
	return true;
}

static opd_status place_operand(struct device_lane *lane, struct request *request, struct device_run *mine, const opd_tensor *host,
                                const opd_tensor **tensor_out)
{
	const uint32_t index = bound_index(&request->run.bound, host);
	const struct operand *operand = &request->run.bound.operands[index];
	opd_tensor *tensor = arena_alloc(&request->device_job.arena, sizeof *tensor);
	if (tensor == NULL)
		return device_no_memory(&request->device_job);
	*tensor = *host;
	tensor->device = lane->number;
	*tensor_out = tensor;
	opd_status status = OPD_OK;
	if (request->run.kept[index] == NULL && map_operand(lane, request, mine, host, tensor)) {
		device_note_move(request, operand->param, 0, lane->number, host->elements * opd_dtype_bytes(host->dtype));
		return OPD_OK;
	}
	*tensor = *host;
	tensor->device = lane->number;
	if (request->run.kept[index] == NULL)
		return copy_touched(lane, request, operand->param, host, tensor);
	if (place_donated(lane, request, mine, index, tensor, &status))
		return status;
	return place_kept(lane, request, index, tensor);
}

static opd_status place_arg(struct device_lane *lane, struct request *request, struct device_run *mine, uint32_t index)
{
	const opd_arg *host = &request->run.bound.call.args[index];
	opd_arg *arg = &mine->args[index];
	*arg = *host;
	if (host->kind == OPD_ARG_TENSOR)
		return place_operand(lane, request, mine, host->tensor, &arg->tensor);
	if (host->kind != OPD_ARG_TENSORS)
		return OPD_OK;
	const opd_tensor **list = arena_array(&request->device_job.arena, host->count, sizeof list[0]);
	opd_status status = list == NULL ? device_no_memory(&request->device_job) : OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < host->count; i++)
		status = place_operand(lane, request, mine, host->tensors[i], &list[i]);
	arg->tensors = list;
	return status;
}

static opd_status place_result(struct device_lane *lane, struct request *request, struct device_run *mine, uint32_t index)
{
	opd_tensor *output = &mine->outputs[index];
	*output = request->run.bound.outputs[index];
	output->device = lane->number;
	mine->output_list[index] = output;
	if (mine->results[index] == NULL && map_result(lane, request, mine, index, output)) {
		device_note_move(request, "result", lane->number, 0, touched_bytes(output));
		return OPD_OK;
	}
	output->data = NULL;
	opd_status status = mine->results[index] != NULL
	                        ? OPD_OK
	                        : device_alloc(lane, &request->device_job, touched_bytes(output), &mine->results[index]);
	if (status == OPD_OK)
		output->data = mine->results[index]->data;
	return status;
}

static opd_status place_all(struct device_lane *lane, struct request *request, struct device_run *mine)
{
	const opd_call *call = &request->run.bound.call;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < call->arg_count; i++)
		status = place_arg(lane, request, mine, i);
	for (uint32_t i = 0; status == OPD_OK && i < call->output_count; i++)
		status = place_result(lane, request, mine, i);
	mine->call = *call;
	mine->call.args = mine->args;
	mine->call.outputs = mine->output_list;
	return status;
}

/* ---- Index contents ---- */

bool device_is_index(const opd_op *def, const struct operand *operand)
{
	const char *at = def->struct_bytes >= offsetof(opd_op, indices) + sizeof def->indices ? def->indices : NULL;
	const size_t bytes = strlen(operand->param);
	if (def->check == NULL)
		return false;
	if (at == NULL)
		return operand->tensor.dtype == OPD_i32 || operand->tensor.dtype == OPD_i64;
	for (; at != NULL; at = strchr(at, ',')) {
		at += *at == ',';
		if (strncmp(at, operand->param, bytes) == 0 && (at[bytes] == ',' || at[bytes] == '\0'))
			return true;
	}
	return false;
}

/* Some index operand lies on the device alone: the kernels look. */
static bool checked_there(const struct request *request)
{
	const struct bound *bound = &request->run.bound;
	bool there = false;
	for (uint32_t i = 0; i < bound->operand_count; i++)
		there = there || (bound->operands[i].tensor.data == NULL && !opd_tensor_empty(&bound->operands[i].tensor) &&
		                  device_is_index(bound->op->def, &bound->operands[i]));
	return there;
}

/* In host memory, before anything is copied. */
static opd_status check_contents(struct request *request)
{
	const opd_op *def = request->run.op->def;
	return module_check_contents(request->run.dispatch.impl->provider->module, def, &request->run.bound.call, NULL, &request->device_job.error);
}

static opd_status fault_make(struct device_lane *lane, struct device_job *job, struct device_run *mine)
{
	static const opd_index_fault none;
	const opd_backend *backend = lane->device.backend;
	opd_status status = device_alloc(lane, job, sizeof none, &mine->fault);
	if (status != OPD_OK)
		return status;
	if (backend->zero == NULL)
		return device_copy_in(lane, job, mine->fault, 0, &none, sizeof none);
	status = backend->zero(lane->device.state, lane->stream, mine->fault->data, 0, sizeof none, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "zero");
}

opd_status device_fault_error(const struct op *op, const opd_index_fault *fault, opd_error *error)
{
	const char *param = fault->param < op->schema->param_count ? op->schema->params[fault->param].name : "an operand";
	if (fault->low > fault->high)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s[%" PRIu64 "] is %" PRIi64 ", expected none at all", op->schema->name, param,
		                fault->position, fault->value);
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s[%" PRIu64 "] is %" PRIi64 ", expected %" PRIi64 " to %" PRIi64, op->schema->name, param,
	                fault->position, fault->value, fault->low, fault->high);
}

/* What it reads and writes; `from_host`: no more than what comes from or goes to host memory, which is what has its address by now. */
static uint64_t bytes_of(const struct request *request, bool from_host)
{
	const struct bound *bound = &request->run.bound;
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < bound->operand_count; i++)
		if (!from_host || bound->operands[i].tensor.data != NULL)
			bytes += bound_bytes(&bound->operands[i].tensor);
	for (uint32_t i = 0; i < bound->call.output_count; i++)
		if (!from_host || bound->outputs[i].data != NULL)
			bytes += bound_bytes(&bound->outputs[i]);
	return bytes;
}

/* Its operands and results lie there: it is enqueued in no time, nothing follows its kernel, and others' may wait for it. */
static bool may_wait(const struct request *request)
{
	const struct request_run *run = &request->run;
	return run->dispatch.impl->run_many != NULL && run->donation_count == 0 && !run->dispatch.plan_missing && bytes_of(request, true) == 0;
}

/* ---- The kernel ---- */

static void watch_kernel(struct device_lane *lane, struct request *request)
{
	const struct impl *impl = request->run.dispatch.impl;
	const struct watch_subject subject = {.impl = impl, .provider = impl->provider, .request = request, .device = lane};
	device_watch(&request->device_job, &subject, watch_budget_ns(lane->server, impl->provider));
}

static opd_status make_plan(struct device_lane *lane, struct request *request)
{
	struct dispatch *dispatch = &request->run.dispatch;
	if (!dispatch->plan_missing)
		return OPD_OK;
	device_many_end(lane); /* it may take long */
	watch_kernel(lane, request);
	opd_status status = plans_make(dispatch->plans, dispatch->snapshot, dispatch->impl, &request->run.bound.call, &dispatch->plan,
	                               &request->device_job.error);
	if (device_watch_end(lane, &request->device_job))
		status = opd_fail(&request->device_job.error, OPD_CANCELLED, "%s: its plan came too late", request->run.op->schema->name);
	if (status == OPD_OK) {
		dispatch->plan_missing = false;
		request->run.plan_refused = dispatch->plan->refused;
	}
	return status;
}

static opd_status enqueue_kernel(struct device_lane *lane, struct request *request, struct device_run *mine)
{
	struct device_job *job = &request->device_job;
	const struct impl *impl = request->run.dispatch.impl;
	const struct plan *plan = request->run.dispatch.plan;
	struct lane_exec serial;
	struct buffer *scratch;
	opd_exec exec = device_exec(lane, impl, &serial);
	exec.plan = plan == NULL ? NULL : &plan->made;
	exec.fault = mine->fault == NULL ? NULL : mine->fault->data;
	if (plan != NULL && plan->made.scratch_bytes != 0) {
		opd_status status = device_alloc(lane, job, plan->made.scratch_bytes, &scratch);
		if (status != OPD_OK)
			return status;
		exec.scratch = scratch->data;
	}
	request->run.written = true;
	watch_kernel(lane, request);
	opd_status status = OPD_OK;
	if (!may_wait(request) || mine->fault != NULL || !device_many_add(lane, request, &mine->call)) {
		device_many_end(lane);
		status = device_kernel(lane, request, &mine->call, &exec);
	}
	device_watched(lane, job);
	return status;
}

/* Those that the reply brings, and the word that says whether an index was bad. */
static opd_status copy_results(struct device_lane *lane, struct request *request, struct device_run *mine)
{
	struct device_job *job = &request->device_job;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < mine->call.output_count; i++) {
		const opd_tensor *host = &request->run.bound.outputs[i];
		if (host->data == NULL || mine->results[i] == NULL) /* the kernel writes it there */
			continue;
		const uint64_t bytes = touched_bytes(host);
		status = device_copy_out(lane, job, host->data, mine->results[i], 0, bytes);
		device_note_move(request, "result", lane->number, 0, bytes);
	}
	if (status == OPD_OK && mine->fault != NULL)
		status = device_copy_out(lane, job, &mine->found, mine->fault, 0, sizeof mine->found);
	return status;
}

static struct device_run *device_run_create(struct request *request)
{
	struct arena *arena = &request->device_job.arena;
	const opd_call *call = &request->run.bound.call;
	struct device_run *mine = arena_zalloc(arena, sizeof *mine);
	if (mine == NULL)
		return NULL;
	mine->args = arena_array(arena, call->arg_count, sizeof mine->args[0]);
	mine->outputs = arena_array(arena, call->output_count, sizeof mine->outputs[0]);
	mine->output_list = arena_array(arena, call->output_count, sizeof mine->output_list[0]);
	mine->results = arena_array(arena, call->output_count, sizeof mine->results[0]);
	mine->largest = largest_of(request);
	return mine->args == NULL || mine->outputs == NULL || mine->output_list == NULL || mine->results == NULL ? NULL : mine;
}

static opd_status enqueue_all(struct device_lane *lane, struct request *request, struct device_run *mine, bool there)
{
	struct device_job *job = &request->device_job;
	const bool told = request->run.moves != NULL; /* else nobody asks for the time */
	const uint64_t moves_from = told ? request_now_ns() : 0;
	opd_status status = place_all(lane, request, mine);
	if (status == OPD_OK && there)
		status = fault_make(lane, job, mine);
	job->moves_ns = told ? request_now_ns() - moves_from : 0;
	if (status == OPD_OK)
		status = enqueue_kernel(lane, request, mine);
	return status == OPD_OK ? copy_results(lane, request, mine) : status;
}

static void run_enqueue(struct device_lane *lane, struct device_job *job)
{
	struct request *request = request_of(job);
	const bool there = checked_there(request);
	request->run.on_device = NULL;
	job->status = there ? OPD_OK : check_contents(request);
	if (job->status == OPD_OK)
		job->status = make_plan(lane, request);
	if (job->status != OPD_OK || request->run.plan_refused)
		return;
	job->status = may_wait(request) ? device_begin_beside(lane, job) : device_begin(lane, job);
	struct device_run *mine = job->status == OPD_OK ? device_run_create(request) : NULL;
	if (job->status == OPD_OK && mine == NULL)
		job->status = device_no_memory(job);
	if (job->status != OPD_OK)
		return;
	request->run.on_device = mine;
	job->status = enqueue_all(lane, request, mine, there);
}

/* What stays is the request's from here on. */
static void run_complete(struct device_lane *lane, struct device_job *job)
{
	struct request *request = request_of(job);
	struct request_run *run = &request->run;
	const struct device_run *mine = run->on_device;
	(void)lane;
	run->on_device = NULL;
	if (job->status == OPD_OK && mine != NULL && mine->found.state != 0)
		job->status = device_fault_error(run->op, &mine->found, &job->error);
	if (job->status != OPD_OK || mine == NULL)
		return;
	for (uint32_t i = 0; i < mine->call.output_count; i++)
		if (run_keeps(request, i)) /* then it has a place there */
			run->resident[i] = buffer_ref(mine->results[i]);
}

/* ---- On the context's thread ---- */

/* How large a call is, as far as costs go. */
static uint64_t work_bytes(const struct request *request)
{
	return bytes_of(request, false);
}

static void run_done(struct request *request)
{
	struct device_job *job = &request->device_job;
	request->status = job->status;
	if (job->status != OPD_OK)
		request->error = job->error;
	request->clock.started = job->started_ns;
	request->clock.ended = job->ended_ns;
	request->clock.moves = job->moves_ns;
	if (request->run.written)
		metrics_ran(request->context->metrics, request->run.dispatch.impl, job->started_ns - job->queued_ns, job->ended_ns - job->started_ns, job->status);
	if (request->run.written && job->status == OPD_OK && request->run.batched == 0) /* what it costs alone */
		placement_note(request->context->server->placement, request->run.dispatch.impl, request->run.device, work_bytes(request), job->device_ns, job->ended_ns);
	execute_device_done(request);
}

/* Bytes of the request's operands that lie there. */
static uint64_t home_bytes(const void *what, uint32_t device)
{
	const struct request_run *run = &((const struct request *)what)->run;
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < run->bound.operand_count; i++)
		if (run->kept[i] != NULL && buffer_is_on(run->kept[i]->buffer, device))
			bytes += run->kept[i]->bytes;
	return bytes;
}

/* 0: nobody says. */
static uint64_t estimated_ns(const struct request *request)
{
	const struct impl *impl = request->run.dispatch.impl;
	return impl->def->cost_ns == NULL ? 0 : impl->def->cost_ns(impl->def, &request->run.bound.call);
}

uint32_t device_choose(const struct request *request)
{
	const struct placement_wish wish = {
		.device = request->message.run.device,
		.kind = request->run.dispatch.impl->def->device,
		.impl = request->run.dispatch.impl,
		.bytes = work_bytes(request),
		.estimate_ns = estimated_ns(request),
		.class = request->run.class,
		.home_bytes = home_bytes,
		.what = request,
	};
	return placement_choose(request->context->server, request->snapshot, request->session, &wish);
}

static opd_status prepare(struct request *request, struct device_lane **lane_out)
{
	struct request_run *run = &request->run;
	const uint32_t room = run->bound.operand_count + run->bound.call.output_count;
	if (run->device == 0)
		return opd_fail(&request->error, OPD_INTERNAL, "%s: no device of kind %s", run->op->schema->name, run->dispatch.impl->def->device);
	if (run->resident == NULL)
		run->resident = arena_array(&request->arena, run->bound.call.output_count, sizeof run->resident[0]);
	run->moves = request->message.run.explain ? run->moves : NULL;
	if (run->moves == NULL && request->message.run.explain)
		run->moves = arena_array(&request->arena, room + run->bound.operand_count, sizeof run->moves[0]);
	if (run->resident == NULL || (run->moves == NULL && request->message.run.explain))
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", run->op->schema->name);
	return device_lane_get(request->context->server, &request->snapshot->devices[run->device], run->device, lane_out, &request->error);
}

/* 0: not lately. */
static uint64_t measured_ns(const struct request *request)
{
	const struct request_run *run = &request->run;
	return placement_cost_ns(request->context->server->placement, run->dispatch.impl, run->device, work_bytes(request), request_now_ns());
}

/* A lone job that is over sooner than another thread would have begun it is run by whoever waits for it, and a longer one is enqueued by them. Only what has been measured, so that nothing is
 * made for the first time. */
#define HERE_NS 40000u
#define HERE_ENQUEUE_NS 10000u
#define HERE_TURN_NS 60000u
#define HERE_BYTES (256u << 10) /* that come from or go to host memory */

uint64_t device_here_ns(struct request *request, uint64_t cost_ns)
{
	struct context *context = request->context;
	const bool short_one = cost_ns <= HERE_NS;
	const uint64_t spent_ns = short_one ? cost_ns : HERE_ENQUEUE_NS;
	if (cost_ns == 0 || bytes_of(request, true) > HERE_BYTES)
		return 0;
	const bool lone = request->session->in_flight == 1 || request->graph_run != NULL; /* runs of a graph follow each other, however many are there */
	if (!request->direct && (!lone || context->inline_ns + spent_ns > HERE_TURN_NS))
		return 0;
	context->inline_ns += request->direct ? 0 : spent_ns;
	return short_one ? 2 * cost_ns : 1; /* the rest is left to the lane's thread, which wakes meanwhile */
}

static uint64_t run_here_ns(struct request *request, uint64_t cost_ns)
{
	return request->run.dispatch.plan_missing ? 0 : device_here_ns(request, cost_ns);
}

void device_run_start(struct request *request)
{
	struct request_run *run = &request->run;
	struct device_lane *lane = NULL;
	request->status = prepare(request, &lane);
	if (request->status != OPD_OK) {
		execute_done(request);
		return;
	}
	/* As it was measured there, else as the implementation estimates; when nobody says, the session's mean is taken. */
	const uint64_t cost_ns = measured_ns(request);
	request->device_job = (struct device_job){
		.name = run->op->schema->name,
		.account = request->session->account,
		.deadline_ns = run->deadline_ns,
		.item = {.class = (uint8_t)run->class, .estimate_ns = cost_ns != 0 ? cost_ns : estimated_ns(request)},
		.here_ns = run_here_ns(request, cost_ns),
		.unwanted = &request->session->gone,
		.enqueue = run_enqueue,
		.complete = run_complete,
	};
	run->behind = NULL;
	if (request->message.run.explain) {
		request->clock.queued = request_now_ns();
		request->device_job.item.behind = run->behind = arena_zalloc(&request->arena, sizeof *run->behind);
	}
	batch_offer(request);
	device_submit(request, lane, run_done);
}
