/* Executing the chosen implementation: on the loop when it is tiny, on the CPU lane, or on a device's lane. */
#include <inttypes.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/tensor.h"
#include "server/batch.h"
#include "server/bring.h"
#include "server/containment.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/device_run.h"
#include "server/graph_schedule.h"
#include "server/module.h"
#include "server/request.h"
#include "server/shared.h"

/* Estimated kernel time that a loop may spend in one turn. */
#define INLINE_TURN_NS 20000u
#define INLINE_MEASURED_EVERY 32u /* a clock of CPU time is a system call */
/* Two threads save half of such a kernel at best, 20 us: what waking one costs (SCHEDULE_STAGE_NS). */
#define DIRECT_STEP_NS (2 * SCHEDULE_STAGE_NS)
/* Of a session's kernels on the loop, before the lane's order is told. */
#define INLINE_CHARGE_NS 100000u

/* Behind every output in checked mode. */
#define CANARY_BYTES 64u
#define CANARY 0xa5

static bool wants_clock(const struct request *request)
{
	return request->message.run.explain;
}

/* ---- Outputs ---- */

static void outputs_drop(struct request_run *run)
{
	for (uint32_t i = 0; run->outputs != NULL && i < run->bound.call.output_count; i++) {
		buffer_unref(run->outputs[i]);
		run->outputs[i] = NULL;
	}
}

/* What an attempt before has left on a device is no result of this one. */
static void resident_drop(struct request_run *run)
{
	for (uint32_t i = 0; run->resident != NULL && i < run->bound.call.output_count; i++) {
		buffer_unref(run->resident[i]);
		run->resident[i] = NULL;
	}
}

/* A result that only stays on its device needs no host memory. */
static bool needs_memory(const struct request *request, uint32_t index)
{
	return request->run.dispatch.impl->on_host || !run_leaves_out(request, index);
}

/* Of an attempt before by a provider that isn't checked: there is no room for a canary. */
static void drop_narrow(struct request *request, uint32_t index, uint64_t bytes)
{
	struct request_run *run = &request->run;
	if (!run->checked || run->outputs[index] == NULL || donate_is_in_place(request, index) || run->outputs[index]->bytes >= bytes + CANARY_BYTES)
		return;
	buffer_unref(run->outputs[index]);
	run->outputs[index] = NULL;
}

/* One buffer an output: each may be kept, sent or dropped alone. */
static opd_status outputs_alloc(struct request *request)
{
	struct request_run *run = &request->run;
	const struct containment_policy *policy = containment_policy(request->context->server->containment, run->dispatch.impl->provider);
	const bool checked = atomic_load_explicit(&policy->checked, memory_order_relaxed);
	run->checked = checked; /* a reload may change it before this request has ended */
	if (run->outputs == NULL)
		run->outputs = arena_array(&request->arena, run->bound.call.output_count, sizeof run->outputs[0]);
	if (run->outputs == NULL)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "run: out of memory");
	for (uint32_t i = 0; i < run->bound.call.output_count; i++) {
		opd_tensor *output = &run->bound.outputs[i];
		uint64_t bytes = output->elements * opd_dtype_bytes(output->dtype); /* checked by bind_outputs */
		if ((output->data = shared_result(request, i)) != NULL || !needs_memory(request, i)) {
			if (!donate_is_in_place(request, i)) {
				buffer_unref(run->outputs[i]); /* of an attempt before */
				run->outputs[i] = NULL;
			}
			continue; /* no canary there: what lies behind is the client's */
		}
		drop_narrow(request, i, bytes);
		if (run->outputs[i] == NULL && run->dispatch.impl->on_host)
			run->outputs[i] = donate_output(request, i);
		if (run->outputs[i] == NULL) {
			opd_status status = buffer_alloc(request->session->account, bytes, checked ? CANARY_BYTES : 0, &run->outputs[i], &request->error);
			if (status != OPD_OK)
				return opd_error_prefix(&request->error, status, "%s: result %u", run->op->schema->name, (unsigned)i);
		}
		output->data = run->outputs[i]->data;
		if (checked && !donate_is_in_place(request, i))
			memset(run->outputs[i]->data + bytes, CANARY, CANARY_BYTES);
	}
	return OPD_OK;
}

/* Byte of the canary behind `data` that isn't as it was; CANARY_BYTES: it is whole. */
static uint32_t canary_broken(const unsigned char *data, uint64_t bytes)
{
	uint32_t k = 0;
	while (k < CANARY_BYTES && data[bytes + k] == CANARY)
		k++;
	return k;
}

static opd_status canaries_check(struct request *request)
{
	const struct request_run *run = &request->run;
	const char *provider = run->dispatch.impl->provider->name;
	const char *op = run->op->schema->name;
	for (uint32_t i = 0; i < run->bound.call.output_count; i++) {
		const opd_tensor *output = &run->bound.outputs[i];
		uint64_t bytes = output->elements * opd_dtype_bytes(output->dtype);
		if (run->outputs[i] == NULL || donate_is_in_place(request, i))
			continue;
		uint32_t broken = canary_broken(run->outputs[i]->data, bytes);
		if (broken != CANARY_BYTES)
			return opd_fail(&request->error, OPD_INTERNAL, "%s.%s wrote past the end of result %u, at byte %" PRIu64 " of %" PRIu64, provider, op,
			                (unsigned)i, bytes + broken, bytes);
	}
	return OPD_OK;
}

/* A kernel gets its results' descriptions to read. One that writes another shape into them has also computed another. */
static uint64_t outputs_print(const struct request_run *run)
{
	uint64_t print = 0xcbf29ce484222325u;
	for (uint32_t i = 0; i < run->bound.call.output_count; i++) {
		const opd_tensor *output = &run->bound.outputs[i];
		const uint64_t fixed[] = {(uint64_t)(uint32_t)output->dtype, output->rank, output->elements, output->byte_offset, (uint64_t)(uintptr_t)output->data,
		                          (uint64_t)(uintptr_t)output->shape, (uint64_t)(uintptr_t)output->strides};
		for (size_t k = 0; k < sizeof fixed / sizeof fixed[0]; k++)
			print = (print ^ fixed[k]) * 0x100000001b3u;
	}
	return print;
}

/* The same of the shapes and strides themselves; only while the descriptions are as they were. */
static uint64_t shapes_print(const struct request_run *run)
{
	uint64_t print = 0xcbf29ce484222325u;
	for (uint32_t i = 0; i < run->bound.call.output_count; i++) {
		const opd_tensor *output = &run->bound.outputs[i];
		for (uint32_t d = 0; d < output->rank; d++)
			print = ((print ^ (uint64_t)output->shape[d]) * 0x100000001b3u ^ (uint64_t)output->strides[d]) * 0x100000001b3u;
	}
	return print;
}

static opd_status shapes_check(struct request *request, uint64_t outputs_before, uint64_t shapes_before)
{
	const struct request_run *run = &request->run;
	if (outputs_print(run) == outputs_before && shapes_print(run) == shapes_before)
		return OPD_OK;
	return opd_fail(&request->error, OPD_INTERNAL, "%s.%s changed the dtype, shape or place of a result that it was given", run->dispatch.impl->provider->name,
	                run->op->schema->name);
}

/* ---- On the CPU ---- */

static opd_status make_scratch(struct request *request, const struct plan *plan, opd_exec *exec)
{
	if (plan == NULL || plan->made.scratch_bytes == 0)
		return OPD_OK;
	const uint64_t bytes = plan->made.scratch_bytes;
	const uint64_t canary = request->run.checked ? CANARY_BYTES : 0;
	opd_status status = buffer_alloc(request->session->account, bytes, canary, &request->run.scratch, &request->error);
	if (status != OPD_OK)
		return opd_error_prefix(&request->error, status, "%s: scratch", request->run.op->schema->name);
	exec->scratch = request->run.scratch->data;
	memset(request->run.scratch->data + bytes, CANARY, canary);
	return OPD_OK;
}

static opd_status scratch_check(struct request *request, const opd_plan *plan)
{
	const struct request_run *run = &request->run;
	if (run->scratch == NULL)
		return OPD_OK;
	const uint32_t broken = canary_broken(run->scratch->data, plan->scratch_bytes);
	if (broken == CANARY_BYTES)
		return OPD_OK;
	return opd_fail(&request->error, OPD_INTERNAL, "%s.%s wrote past the end of its scratch, at byte %" PRIu64 " of %" PRIu64,
	                run->dispatch.impl->provider->name, run->op->schema->name, plan->scratch_bytes + broken, plan->scratch_bytes);
}

/* What a kernel has left behind, in checked mode. */
static opd_status results_check(struct request *request, const opd_plan *plan, uint64_t outputs_before, uint64_t shapes_before)
{
	opd_status status = shapes_check(request, outputs_before, shapes_before);
	if (status == OPD_OK)
		status = canaries_check(request);
	if (status == OPD_OK)
		status = scratch_check(request, plan);
	if (status != OPD_OK)
		containment_failed(request->context->server->containment, request->run.dispatch.impl, FAILURE_OVERRUN, request->session->tenant->name);
	return status;
}

static opd_status run_kernel(struct request *request, struct lane_exec *lane)
{
	struct request_run *run = &request->run;
	const struct impl *impl = run->dispatch.impl;
	const struct plan *plan = run->dispatch.plan;
	opd_exec exec = {
		.struct_bytes = sizeof exec,
		.threads = lane->threads,
		.host = &impl->provider->module->host,
		.plan = plan == NULL ? NULL : &plan->made,
		.lane = lane,
	};
	opd_status status = module_check_contents(impl->provider->module, run->op->def, &run->bound.call, lane, &request->error);
	if (status == OPD_OK)
		status = make_scratch(request, plan, &exec);
	if (status != OPD_OK)
		return status;
	struct derived_run derived = {.count = 0};
	const uint64_t outputs_before = run->checked ? outputs_print(run) : 0;
	const uint64_t shapes_before = run->checked ? shapes_print(run) : 0;
	lane->derived = &derived;
	lane->tenant = request->session->tenant->name;
	run->written = true;
	request->error.text[0] = '\0';
	struct watch watch;
	watch_begin_kernel(&watch, impl, NULL, request, lane);
	status = impl->def->run(impl->def, impl->state, &run->bound.call, &exec, &request->error);
	(void)watch_end(&watch);
	lane->derived = NULL;
	derived_end(request->context->server->derived, &derived);
	if (status != OPD_OK) {
		status = module_failure(status, &request->error, "%s.%s failed", impl->provider->name, run->op->schema->name);
		containment_note(request->context->server->containment, impl, status, request->session->tenant->name);
	} else if (run->checked) {
		status = results_check(request, exec.plan, outputs_before, shapes_before);
	}
	buffer_unref(run->scratch);
	run->scratch = NULL;
	return status;
}

/* The native definition's name comes first in the texts of its own errors; a provider's failure says whose it was. */
static void run_here(struct request *request, struct lane_exec *lane)
{
	bool clock = wants_clock(request);
	if (clock)
		request->clock.started = request_now_ns();
	request->status = run_kernel(request, lane);
	if (clock)
		request->clock.ended = request_now_ns();
}

/* Nobody reads what a session that has ended still has queued: without this a drain's end, and other sessions, would wait for all of it. */
static bool is_unwanted(struct request *request, const struct lane_exec *lane)
{
	const bool gone = atomic_load_explicit(&request->session->gone, memory_order_relaxed);
	if (!gone && !lane_cancelled(lane))
		return false;
	request->status = opd_fail(&request->error, OPD_CANCELLED, "%s: the %s", request->run.op->schema->name,
	                           gone ? "session has ended" : "client cancelled the request");
	return true;
}

static bool is_late(struct request *request)
{
	if (request->run.deadline_ns == 0 || request_now_ns() < request->run.deadline_ns)
		return false;
	request->status = opd_fail(&request->error, OPD_DEADLINE_EXCEEDED, "%s: not started within its timeout of %" PRIu64 " us",
	                           request->run.op->schema->name, request->message.run.timeout_us);
	return true;
}

bool execute_unwanted(struct request *request, const struct lane_exec *lane)
{
	return is_unwanted(request, lane) || is_late(request);
}

/* On a lane thread: the plan that is missing; false when it refused or failed. */
static bool make_plan(struct request *request, struct lane_exec *exec)
{
	struct request_run *run = &request->run;
	struct dispatch *dispatch = &run->dispatch;
	struct watch watch;
	watch_begin_kernel(&watch, dispatch->impl, NULL, request, exec);
	request->status = plans_make(dispatch->plans, dispatch->snapshot, dispatch->impl, &run->bound.call, &dispatch->plan, &request->error);
	(void)watch_end(&watch);
	if (request->status != OPD_OK)
		return false;
	dispatch->plan_missing = false;
	run->plan_refused = dispatch->plan->refused;
	return !run->plan_refused;
}

static void run_alone(struct request *request, struct lane_exec *exec)
{
	if (execute_unwanted(request, exec))
		return;
	if (request->run.dispatch.plan_missing && !make_plan(request, exec))
		return;
	run_here(request, exec);
}

/* With those that the lane has taken along: as one kernel, else one after the other. */
static void lane_run(struct lane_job *job, struct lane_exec *exec)
{
	struct request *request = (struct request *)((char *)job - offsetof(struct request, job));
	if (exec->others != NULL && !execute_unwanted(request, exec) && batch_run(request, exec))
		return;
	run_alone(request, exec);
	for (struct lane_job *other = exec->others; other != NULL; other = other->next) {
		exec->job = other;
		if (other->batch.rows != 0) /* else it has its answer */
			run_alone((struct request *)((char *)other - offsetof(struct request, job)), exec);
	}
	exec->job = job;
}

static void lane_plan(struct lane_job *job, struct lane_exec *exec)
{
	struct request *request = (struct request *)((char *)job - offsetof(struct request, job));
	(void)make_plan(request, exec);
}

static void lane_graph(struct lane_job *job, struct lane_exec *exec)
{
	graph_run_execute((struct request *)((char *)job - offsetof(struct request, job)), exec);
}

/* A kernel, or a graph, that a lane has run; not what was cancelled before, nor plans. */
static void count_lane(struct request *request)
{
	const struct lane_job *job = &request->job;
	const bool graph = request->graph_run != NULL;
	if (!(graph ? graph_run_has_begun(request) : request->run.written))
		return;
	metrics_ran(request->context->metrics, graph ? NULL : request->run.dispatch.impl, job->waited_ns, job->device_ns, request->status);
	LOG(request->context->server->log, LOG_DEBUG, "lane ran", LOG_UINT("session", request->session->id), LOG_STR("op", request->run.op->schema->name),
	    LOG_STR("class", sched_class_name(job->item.class)), LOG_UINT("at_us", job->item.queued_ns / 1000), LOG_UINT("waited_us", job->waited_ns / 1000),
	    LOG_UINT("device_us", job->device_ns / 1000));
}

static void job_done(struct lane_job *job)
{
	struct request *request = (struct request *)((char *)job - offsetof(struct request, job));
	count_lane(request);
	execute_done(request);
}

/* A direct caller waits on its own thread for what the loop takes from a lane. */
static void job_done_direct(struct lane_job *job)
{
	struct request *request = (struct request *)((char *)job - offsetof(struct request, job));
	(void)sem_post(request->owner);
}

static void wait_for_lane(struct request *request)
{
	while (sem_wait(request->owner) != 0)
		;
	count_lane(request);
	execute_done(request);
}

opd_status execute_refused(struct request *request, const char *what, const struct lane_refusal *refusal, const char *lane, opd_error *error)
{
	struct session *session = request->session;
	const bool of_tenant = refusal->full == SCHED_FULL_GROUP;
	const char *whose = of_tenant ? " of tenant " : refusal->full == SCHED_FULL_FLOW ? " of this session" : "";
	if (refusal->full != SCHED_FULL_LANE)
		quota_count_refusal(of_tenant ? &session->tenant->quota : &session->quota, QUOTA_QUEUED);
	const uint64_t wait_us = refusal->wait_ns / 1000 + 1;
	(void)opd_fail(error, OPD_RESOURCE_EXHAUSTED,
	               "%s: %" PRIu32 " requests%s%s wait for the %s lane, at most %" PRIu32 " may: try again in about %" PRIu64 " us", what, refusal->queued,
	               whose, of_tenant ? session->tenant->name : "", lane, refusal->limit, wait_us);
	opd_error_retry_after(error, wait_us);
	return OPD_RESOURCE_EXHAUSTED;
}

static void lane_start(struct request *request, void (*run)(struct lane_job *, struct lane_exec *))
{
	struct session *session = request->session;
	request->job = (struct lane_job){
		.run = run,
		.done = request->direct ? job_done_direct : job_done,
		.owner = request->context->loop,
		.item = {.flow = &session->flow, .class = (uint8_t)request->run.class, .estimate_ns = request->run.cost_ns},
		.charge_ns = session->inline_ns,
	};
	if (run == lane_run)
		batch_offer(request);
	if (wants_clock(request)) {
		request->clock.queued = request_now_ns();
		request->job.item.behind = request->run.behind = arena_zalloc(&request->arena, sizeof *request->run.behind); /* without memory it isn't told */
	}
	if (!lane_submit(session->lane, &request->job)) {
		request->job.run = NULL;
		request->status = execute_refused(request, request->run.op->schema->name, &request->job.refusal, lane_name(session->lane), &request->error);
		execute_done(request);
		return;
	}
	session->inline_ns = 0;
	if (request->direct)
		wait_for_lane(request);
}

/* What runs on the loop counts as the lane's: told when the session comes there, or when it has become much. */
static void charge_inline(struct request *request, uint64_t cost_ns)
{
	struct session *session = request->session;
	session->inline_ns += cost_ns;
	if (session->inline_ns < INLINE_CHARGE_NS)
		return;
	struct lane *lane = session->lane;
	scheduler_charge(lane_scheduler_lock(lane), &session->flow, request->run.class, session->inline_ns);
	lane_scheduler_unlock(lane);
	session->inline_ns = 0;
}

/* A direct caller waits anyway, and a lane is three hand-overs away (to it, by it to the loop, back): its own thread does what several threads wouldn't do sooner by more than those cost. */
static bool fits_caller(const struct request *request, uint64_t step_ns)
{
	return step_ns <= DIRECT_STEP_NS || lane_threads(request->session->lane) == 1;
}

bool execute_fits_loop(struct request *request, uint64_t cost_ns, uint64_t step_ns)
{
	struct server *server = request->context->server;
	if (cost_ns == 0)
		return false;
	if (request->direct && fits_caller(request, step_ns))
		return true;
	if (cost_ns > atomic_load_explicit(&server->inline_ns, memory_order_relaxed))
		return false;
	if (request->direct)
		return true;
	if (lane_busy(request->session->lane) || request->context->inline_ns + cost_ns > INLINE_TURN_NS)
		return false;
	request->context->inline_ns += cost_ns;
	charge_inline(request, cost_ns);
	return true;
}

/* Small enough for the loop: less than a hand-off costs, from a provider that is linked in, with nobody waiting for the lane before us. */
static bool fits_loop(struct request *request)
{
	const struct impl *impl = request->run.dispatch.impl;
	request->run.cost_ns = bound_cost_ns(&request->run.bound, impl);
	if (impl->provider->module->library != NULL || request->run.dispatch.plan_missing || containment_off_loop(request->context->server->containment, impl))
		return false;
	return execute_fits_loop(request, request->run.cost_ns, request->run.cost_ns);
}

/* ---- On a device ---- */

void execute_device_done(struct request *request)
{
	struct containment *containment = request->context->server->containment;
	const struct impl *impl = request->run.dispatch.impl;
	if (request->overdue) { /* that was the failure */
		execute_done(request);
		return;
	}
	if (request->status == OPD_OK && !request->run.plan_refused && request->run.checked) {
		request->status = canaries_check(request);
		if (request->status != OPD_OK)
			containment_failed(containment, impl, FAILURE_OVERRUN, request->session->tenant->name);
	} else if (request->run.written && request->status != OPD_DATA_LOSS) { /* a lost device is passed over as such */
		containment_note(containment, impl, request->status, request->session->tenant->name);
	}
	execute_done(request);
}

void execute_place(struct request *request)
{
	request->run.device = request->run.dispatch.impl->on_host ? 0 : device_choose(request);
}

/* ---- */

static uint64_t thread_cpu_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Estimates may be wrong, and everybody waits here: CPU time, because another process may have the core. */
static void run_on_loop(struct request *request, struct lane_exec *serial)
{
	const struct impl *impl = request->run.dispatch.impl;
	struct containment *containment = request->context->server->containment;
	const bool measured = !request->direct && (request->context->inline_runs++ % INLINE_MEASURED_EVERY == 0 || containment_suspects(containment, impl));
	const uint64_t before_ns = measured ? thread_cpu_ns() : 0;
	run_here(request, serial);
	if (measured)
		containment_ran_on_loop(containment, impl, thread_cpu_ns() - before_ns);
}

/* The lanes are stopped: what a job that has just ended would start next is nobody's any more. */
static bool refused_at_end(struct request *request)
{
	if (!request->context->server->ending)
		return false;
	request->run.written = false;
	request->status = opd_fail(&request->error, OPD_UNAVAILABLE, "%s: the server ends", request->run.op->schema->name);
	execute_done(request);
	return true;
}

void execute_run(struct request *request)
{
	if (refused_at_end(request))
		return;
	request->run.written = false;
	request->run.on_loop = false;
	request->run.batched = 0;
	execute_place(request);
	donate_again(request);
	resident_drop(&request->run);
	if (!bring_operands(request))
		return;
	request->status = outputs_alloc(request);
	if (request->status != OPD_OK) {
		outputs_drop(&request->run);
		execute_done(request);
		return;
	}
	if (!request->run.dispatch.impl->on_host) {
		device_run_start(request);
	} else if (fits_loop(request)) {
		struct lane_exec serial = lane_exec_serial(NULL);
		request->run.on_loop = true;
		request->run.behind = NULL;
		if (!is_late(request)) {
			request->clock.queued = 0;
			run_on_loop(request, &serial);
			metrics_ran_on_loop(request->context->metrics, request->run.dispatch.impl, request->run.cost_ns, request->status);
		}
		execute_done(request);
	} else {
		lane_start(request, lane_run);
	}
}

void execute_plan(struct request *request)
{
	if (refused_at_end(request))
		return;
	request->run.written = false;
	lane_start(request, lane_plan);
}

void execute_graph(struct request *request)
{
	if (!refused_at_end(request))
		lane_start(request, lane_graph);
}
