#include "server/device_lane.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/module.h"
#include "server/request.h"

/* Jobs enqueued on the stream and not yet complete. */
#define IN_FLIGHT_MAX 16u
/* How the thread waits for the device: it looks again at once while a kernel may be a short one, then lets others have the core, then sleeps, so
 * that a kernel of many milliseconds costs no core and is noticed at most 5 % late. */
#define POLL_SPIN_NS 20000u
#define POLL_YIELD_NS 1000000u
#define POLL_SLEEP_NS 50000

struct device_lane {
	struct server *server;
	struct device device; /* copied: snapshots come and go */
	uint32_t number;
	_Atomic uint32_t load; /* jobs submitted and not yet ended */
	pthread_t thread;
	bool joined;
	pthread_mutex_t mutex; /* of queue, done and stopping */
	pthread_cond_t wake;
	bool stopping;
	struct device_job *queue;
	struct device_job **queue_end;
	struct device_job *done;
	struct device_job **done_end;
	/* the thread's own */
	void *stream; /* NULL: made for the next job */
	uint64_t progress_ns; /* when a job was last enqueued or ended */
	struct device_job *flight; /* oldest first */
	struct device_job **flight_end;
	uint32_t in_flight;
};

/* What a job has on the device. Arguments are the host's with `data` replaced. */
struct device_work {
	void *event;
	bool recorded;
	void *scratch;
	uint32_t memory_count;
	void **memory; /* [memory_count] to be freed */
	opd_arg *args;
	opd_tensor *outputs;
	const opd_tensor **output_list;
	opd_call call;
	struct arena arena;
};

static bool poll_flight(struct device_lane *lane);

/* ---- Waiting ---- */

static void pause_polling(const struct device_lane *lane)
{
	const struct timespec sleep = {.tv_nsec = POLL_SLEEP_NS};
	uint64_t waited = request_now_ns() - lane->progress_ns;
	if (waited > POLL_YIELD_NS)
		(void)nanosleep(&sleep, NULL);
	else if (waited > POLL_SPIN_NS)
		(void)sched_yield();
}

/* Waits until the oldest job in flight has ended; false: there is none. */
static bool wait_for_oldest(struct device_lane *lane)
{
	if (lane->flight == NULL)
		return false;
	while (!poll_flight(lane))
		pause_polling(lane);
	return true;
}

/* ---- One job ---- */

/* A step of the job failed in a function of the backend: the text says where, also when the module said nothing. */
static opd_status device_failed(const struct device_lane *lane, struct device_job *job, opd_status status, const char *what)
{
	status = module_failure(status, &job->error, "%s failed", what);
	return opd_error_prefix(&job->error, status, "%s on %s", job->op->schema->name, lane->device.name);
}

/* On the lane's thread: making a context may take long. After a failure the next job tries again. */
static opd_status need_stream(struct device_lane *lane, struct device_job *job)
{
	if (lane->stream != NULL)
		return OPD_OK;
	opd_status status = lane->device.backend->stream_create(lane->device.state, lane->device.ordinal, &lane->stream, &job->error);
	if (status == OPD_OK)
		return OPD_OK;
	lane->stream = NULL;
	return device_failed(lane, job, status, "stream_create");
}

/* Nothing enqueued on the stream touches memory any more when this returns. */
static void drop_stream(struct device_lane *lane)
{
	if (lane->stream != NULL)
		lane->device.backend->stream_destroy(lane->device.state, lane->stream);
	lane->stream = NULL;
}

static void work_destroy(struct device_lane *lane, struct device_work *work)
{
	const opd_backend *backend = lane->device.backend;
	if (work == NULL)
		return;
	for (uint32_t i = 0; i < work->memory_count; i++)
		backend->free(lane->device.state, lane->device.ordinal, work->memory[i]);
	if (work->event != NULL)
		backend->event_destroy(lane->device.state, work->event);
	arena_fini(&work->arena);
	free(work);
}

static opd_status no_memory(struct device_job *job)
{
	return opd_fail(&job->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory on the way to the device", job->op->schema->name);
}

static opd_status device_alloc(struct device_lane *lane, struct device_job *job, uint64_t bytes, void **memory_out)
{
	const opd_backend *backend = lane->device.backend;
	struct device_work *work = job->work;
	opd_status status;
	do /* what other jobs hold comes back when they end: only a job that is alone on the device is too large for it */
		status = backend->alloc(lane->device.state, lane->device.ordinal, bytes == 0 ? 1 : bytes, memory_out, &job->error);
	while (status == OPD_RESOURCE_EXHAUSTED && wait_for_oldest(lane));
	if (status != OPD_OK)
		return device_failed(lane, job, status, "alloc");
	work->memory[work->memory_count++] = *memory_out;
	return OPD_OK;
}

/* Where the bytes that the tensor touches end, from the start of its memory. */
static uint64_t touched_bytes(const opd_tensor *tensor)
{
	uint64_t end = 0;
	return tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strides, tensor->byte_offset, &end) ? end : 0;
}

static opd_status move_in(struct device_lane *lane, struct device_job *job, const opd_tensor *host, const opd_tensor **tensor_out)
{
	opd_tensor *tensor = arena_alloc(&job->work->arena, sizeof *tensor);
	if (tensor == NULL)
		return no_memory(job);
	*tensor = *host;
	tensor->device = lane->number;
	/* A view far into a large tensor takes along only what it touches; whole lines are left out, so that its alignment stays. */
	uint64_t skip = opd_tensor_empty(host) ? 0 : host->byte_offset / OPD_TENSOR_ALIGNMENT * OPD_TENSOR_ALIGNMENT;
	uint64_t bytes = opd_tensor_empty(host) ? 0 : touched_bytes(host) - skip;
	tensor->byte_offset = opd_tensor_empty(host) ? 0 : host->byte_offset - skip;
	opd_status status = device_alloc(lane, job, bytes, &tensor->data);
	*tensor_out = tensor;
	if (status != OPD_OK || bytes == 0)
		return status;
	status = lane->device.backend->copy_in(lane->device.state, lane->stream, tensor->data, 0, (const unsigned char *)host->data + skip, bytes,
	                                       &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_in");
}

static opd_status move_arg(struct device_lane *lane, struct device_job *job, const opd_arg *host, opd_arg *arg)
{
	*arg = *host;
	if (host->kind == OPD_ARG_TENSOR)
		return move_in(lane, job, host->tensor, &arg->tensor);
	if (host->kind != OPD_ARG_TENSORS)
		return OPD_OK;
	const opd_tensor **list = arena_array(&job->work->arena, host->count, sizeof list[0]);
	opd_status status = list == NULL ? no_memory(job) : OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < host->count; i++)
		status = move_in(lane, job, host->tensors[i], &list[i]);
	arg->tensors = list;
	return status;
}

static uint32_t count_tensors(const opd_call *call)
{
	uint32_t count = call->output_count + 1; /* and scratch */
	for (uint32_t i = 0; i < call->arg_count; i++)
		count += call->args[i].kind == OPD_ARG_TENSOR ? 1 : call->args[i].kind == OPD_ARG_TENSORS ? call->args[i].count : 0;
	return count;
}

static opd_status work_create(struct device_lane *lane, struct device_job *job)
{
	struct device_work *work = calloc(1, sizeof *work);
	if (work == NULL)
		return no_memory(job);
	job->work = work;
	arena_init(&work->arena, 16u << 20);
	work->memory = arena_array(&work->arena, count_tensors(job->call), sizeof work->memory[0]);
	work->args = arena_array(&work->arena, job->call->arg_count, sizeof work->args[0]);
	work->outputs = arena_array(&work->arena, job->call->output_count, sizeof work->outputs[0]);
	work->output_list = arena_array(&work->arena, job->call->output_count, sizeof work->output_list[0]);
	if (work->memory == NULL || work->args == NULL || work->outputs == NULL || work->output_list == NULL)
		return no_memory(job);
	opd_status status = lane->device.backend->event_create(lane->device.state, lane->device.ordinal, &work->event, &job->error);
	if (status == OPD_OK)
		return OPD_OK;
	work->event = NULL;
	return device_failed(lane, job, status, "event_create");
}

static opd_status move_all_in(struct device_lane *lane, struct device_job *job)
{
	struct device_work *work = job->work;
	const opd_call *call = job->call;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < call->arg_count; i++)
		status = move_arg(lane, job, &call->args[i], &work->args[i]);
	for (uint32_t i = 0; status == OPD_OK && i < call->output_count; i++) {
		work->outputs[i] = *call->outputs[i];
		work->outputs[i].device = lane->number;
		work->output_list[i] = &work->outputs[i];
		status = device_alloc(lane, job, touched_bytes(&work->outputs[i]), &work->outputs[i].data);
	}
	work->call = *call;
	work->call.args = work->args;
	work->call.outputs = work->output_list;
	return status;
}

static opd_status enqueue_kernel(struct device_lane *lane, struct device_job *job)
{
	const struct impl *impl = job->dispatch->impl;
	const struct plan *plan = job->dispatch->plan;
	opd_exec exec = {
		.struct_bytes = sizeof exec,
		.threads = 1,
		.host = &impl->provider->module->host,
		.plan = plan == NULL ? NULL : &plan->made,
		.stream = lane->stream,
		.device = lane->number,
		.ordinal = lane->device.ordinal,
	};
	struct lane_exec serial = lane_exec_serial(NULL);
	exec.lane = &serial;
	if (plan != NULL && plan->made.scratch_bytes != 0) {
		opd_status status = device_alloc(lane, job, plan->made.scratch_bytes, &exec.scratch);
		if (status != OPD_OK)
			return status;
	}
	job->begun = true;
	opd_status status = impl->def->run(impl->def, impl->state, &job->work->call, &exec, &job->error);
	return status == OPD_OK ? OPD_OK : module_failure(status, &job->error, "%s.%s failed", impl->provider->name, job->op->schema->name);
}

static opd_status move_all_out(struct device_lane *lane, struct device_job *job)
{
	const opd_backend *backend = lane->device.backend;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < job->call->output_count; i++) {
		const opd_tensor *host = job->call->outputs[i];
		uint64_t bytes = touched_bytes(host);
		if (bytes != 0)
			status = backend->copy_out(lane->device.state, lane->stream, host->data, job->work->outputs[i].data, 0, bytes, &job->error);
	}
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_out");
}

/* Index contents lie in host memory still: they are checked there, before anything is copied. */
static opd_status check_before(struct device_job *job)
{
	const opd_op *def = job->op->def;
	if (job->unwanted != NULL && atomic_load_explicit(job->unwanted, memory_order_relaxed))
		return opd_fail(&job->error, OPD_CANCELLED, "%s: the session has ended", job->op->schema->name);
	if (job->deadline_ns != 0 && request_now_ns() >= job->deadline_ns)
		return opd_fail(&job->error, OPD_DEADLINE_EXCEEDED, "%s: not started within its timeout", job->op->schema->name);
	if (def->check == NULL)
		return OPD_OK;
	opd_status status = def->check(def, job->call, &job->error);
	if (status == OPD_OK)
		return OPD_OK;
	return module_failure(status, &job->error, "%s: the operands' contents are refused", job->op->schema->name);
}

static opd_status make_plan(struct device_job *job)
{
	struct dispatch *dispatch = job->dispatch;
	if (!dispatch->plan_missing)
		return OPD_OK;
	opd_status status = plans_make(dispatch->plans, dispatch->snapshot, dispatch->impl, job->call, &dispatch->plan, &job->error);
	if (status == OPD_OK) {
		dispatch->plan_missing = false;
		job->plan_refused = dispatch->plan->refused;
	}
	return status;
}

/* Recorded also after a failure: what was enqueued before it still uses the job's memory. */
static void record_end(struct device_lane *lane, struct device_job *job)
{
	opd_error error = {0};
	opd_status status = lane->device.backend->event_record(lane->device.state, job->work->event, lane->stream, &error);
	job->work->recorded = status == OPD_OK;
	if (status == OPD_OK)
		return;
	/* No event will tell when the job's memory may be freed: the stream's end does, and the next job gets another one. */
	drop_stream(lane);
	if (job->status == OPD_OK) {
		job->error = error;
		job->status = device_failed(lane, job, status, "event_record");
	}
}

static void job_enqueue(struct device_lane *lane, struct device_job *job)
{
	job->started_ns = request_now_ns();
	job->status = check_before(job);
	if (job->status == OPD_OK)
		job->status = make_plan(job);
	if (job->status != OPD_OK || job->plan_refused)
		return;
	job->status = need_stream(lane, job);
	uint64_t moves_from = request_now_ns();
	if (job->status == OPD_OK)
		job->status = work_create(lane, job);
	if (job->status == OPD_OK)
		job->status = move_all_in(lane, job);
	job->moves_ns = request_now_ns() - moves_from;
	if (job->status == OPD_OK)
		job->status = enqueue_kernel(lane, job);
	if (job->status == OPD_OK)
		job->status = move_all_out(lane, job);
	if (job->work != NULL && job->work->event != NULL)
		record_end(lane, job);
}

/* Whether the device is done with the job. */
static bool job_complete(struct device_lane *lane, struct device_job *job)
{
	if (job->work == NULL || !job->work->recorded)
		return true;
	opd_error error = {0};
	opd_status status = lane->device.backend->event_query(lane->device.state, job->work->event, &error);
	if (status == OPD_UNAVAILABLE)
		return false;
	if (status != OPD_OK && job->status == OPD_OK) {
		job->error = error;
		job->status = device_failed(lane, job, status, "the work");
	}
	return true;
}

/* ---- The thread ---- */

static void finish_job(struct device_lane *lane, struct device_job *job)
{
	job->ended_ns = lane->progress_ns = request_now_ns();
	work_destroy(lane, job->work);
	job->work = NULL;
	job->next = NULL;
	(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	(void)pthread_mutex_lock(&lane->mutex);
	*lane->done_end = job;
	lane->done_end = &job->next;
	(void)pthread_mutex_unlock(&lane->mutex);
	atomic_store_explicit(&lane->server->device_done, true, memory_order_release);
	server_wake(lane->server);
}

/* Ends the jobs that are complete; false: none was. */
static bool poll_flight(struct device_lane *lane)
{
	bool any = false;
	while (lane->flight != NULL && job_complete(lane, lane->flight)) {
		struct device_job *job = lane->flight;
		lane->flight = job->next;
		if (lane->flight == NULL)
			lane->flight_end = &lane->flight;
		lane->in_flight--;
		finish_job(lane, job);
		any = true;
	}
	return any;
}

/* Under the mutex. */
static void dequeue(struct device_lane *lane, struct device_job *job)
{
	*job->link = job->next;
	if (job->next != NULL)
		job->next->link = job->link;
	else
		lane->queue_end = job->link;
	job->link = NULL;
}

/* The next job, waiting for one only when nothing is in flight; NULL: none now. *stop_out: stopping, and nothing is left. */
static struct device_job *next_job(struct device_lane *lane, bool *stop_out)
{
	(void)pthread_mutex_lock(&lane->mutex);
	while (lane->queue == NULL && lane->in_flight == 0 && !lane->stopping)
		(void)pthread_cond_wait(&lane->wake, &lane->mutex);
	struct device_job *job = lane->in_flight < IN_FLIGHT_MAX ? lane->queue : NULL;
	if (job != NULL) {
		dequeue(lane, job);
		job->next = NULL;
	}
	*stop_out = lane->stopping && job == NULL && lane->queue == NULL && lane->in_flight == 0;
	(void)pthread_mutex_unlock(&lane->mutex);
	return job;
}

static void *lane_main(void *argument)
{
	struct device_lane *lane = argument;
	for (bool stop = false; !stop;) {
		struct device_job *job = next_job(lane, &stop);
		if (job != NULL) {
			job_enqueue(lane, job);
			*lane->flight_end = job;
			lane->flight_end = &job->next;
			lane->in_flight++;
			lane->progress_ns = job->started_ns;
		}
		if (!poll_flight(lane) && job == NULL && !stop)
			pause_polling(lane);
	}
	return NULL;
}

/* ---- Life ---- */

static opd_status device_lane_create(struct server *server, const struct device *device, uint32_t number, struct device_lane **lane_out,
                              opd_error *error)
{
	struct device_lane *lane = calloc(1, sizeof *lane);
	if (lane == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "device lane: out of memory");
	lane->device = *device;
	lane->server = server;
	lane->number = number;
	lane->queue_end = &lane->queue;
	lane->done_end = &lane->done;
	lane->flight_end = &lane->flight;
	(void)pthread_mutex_init(&lane->mutex, NULL);
	(void)pthread_cond_init(&lane->wake, NULL);
	sigset_t all, before;
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	int failed = pthread_create(&lane->thread, NULL, lane_main, lane);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed != 0) {
		(void)pthread_cond_destroy(&lane->wake);
		(void)pthread_mutex_destroy(&lane->mutex);
		free(lane);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "device lane: no thread: %s", strerror(failed));
	}
	*lane_out = lane;
	return OPD_OK;
}

opd_status device_lane_get(struct server *server, const struct device *device, uint32_t number, struct device_lane **lane_out, opd_error *error)
{
	(void)pthread_mutex_lock(&server->mutex); /* a direct caller may ask beside the loop */
	struct device_lane *lane = atomic_load_explicit(&server->device_lanes[number], memory_order_relaxed);
	opd_status status = lane != NULL ? OPD_OK : device_lane_create(server, device, number, &lane, error);
	atomic_store_explicit(&server->device_lanes[number], lane, memory_order_release);
	(void)pthread_mutex_unlock(&server->mutex);
	*lane_out = lane;
	return status;
}

uint32_t device_lane_load(struct server *server, uint32_t number)
{
	const struct device_lane *lane = atomic_load_explicit(&server->device_lanes[number], memory_order_acquire);
	return lane == NULL ? 0 : atomic_load_explicit(&lane->load, memory_order_relaxed);
}

void device_lane_submit(struct device_lane *lane, struct device_job *job)
{
	job->next = NULL;
	(void)atomic_fetch_add_explicit(&lane->load, 1, memory_order_relaxed);
	(void)pthread_mutex_lock(&lane->mutex);
	*lane->queue_end = job;
	job->link = lane->queue_end;
	lane->queue_end = &job->next;
	(void)pthread_cond_signal(&lane->wake);
	(void)pthread_mutex_unlock(&lane->mutex);
}

bool device_lane_withdraw(struct device_lane *lane, struct device_job *job)
{
	(void)pthread_mutex_lock(&lane->mutex);
	bool queued = job->link != NULL;
	if (queued)
		dequeue(lane, job);
	(void)pthread_mutex_unlock(&lane->mutex);
	if (queued)
		(void)atomic_fetch_sub_explicit(&lane->load, 1, memory_order_relaxed);
	return queued;
}

void device_lane_finish_done(struct device_lane *lane)
{
	(void)pthread_mutex_lock(&lane->mutex);
	struct device_job *job = lane->done;
	lane->done = NULL;
	lane->done_end = &lane->done;
	(void)pthread_mutex_unlock(&lane->mutex);
	while (job != NULL) {
		struct device_job *next = job->next;
		job->done(job);
		job = next;
	}
}

void device_lane_drain(struct device_lane *lane)
{
	if (lane->joined)
		return;
	(void)pthread_mutex_lock(&lane->mutex);
	lane->stopping = true;
	(void)pthread_cond_signal(&lane->wake);
	(void)pthread_mutex_unlock(&lane->mutex);
	(void)pthread_join(lane->thread, NULL);
	lane->joined = true;
}

void device_lane_stop(struct device_lane *lane)
{
	if (lane == NULL)
		return;
	device_lane_drain(lane);
	drop_stream(lane);
	(void)pthread_cond_destroy(&lane->wake);
	(void)pthread_mutex_destroy(&lane->mutex);
	free(lane);
}
