/* Copies between a device and the host for requests that run nothing there: fetches, uploads, tensors that a provider elsewhere must read. */
#include <semaphore.h>
#include <string.h>

#include "server/conn.h"
#include "server/daemon.h"
#include "server/device_run.h"
#include "server/device_work.h"
#include "server/placement.h"
#include "server/priority.h"
#include "server/request.h"

static struct request *request_of(struct device_job *job)
{
	return (struct request *)((char *)job - offsetof(struct request, device_job));
}

static void job_done(struct device_job *job)
{
	struct request *request = request_of(job);
	request->device_done(request);
}

/* A direct caller waits on its own thread for what the loop takes from a lane. */
static void job_done_direct(struct device_job *job)
{
	(void)sem_post(request_of(job)->owner);
}

/* To the lane, in the session's place there. From success on the job is the lane's until it is done, or *ended_out. */
static opd_status submit(struct request *request, struct device_lane *lane, bool *ended_out)
{
	struct device_job *job = &request->device_job;
	job->item.flow = session_flow(request->session, lane->number);
	if (job->item.flow == NULL)
		return device_no_memory(job);
	if (device_lane_is_stuck(lane))
		return opd_fail(&job->error, OPD_UNAVAILABLE, "%s: a kernel on %s has exceeded its budget and still runs", job->name, device_lane_name(lane));
	const enum device_ran ran = job->here_ns == 0 ? DEVICE_BUSY : device_lane_run(lane, job);
	*ended_out = ran == DEVICE_ENDED;
	if (ran != DEVICE_BUSY || device_lane_submit(lane, job))
		return OPD_OK;
	return execute_refused(request, job->name, &job->refusal, device_lane_name(lane), &job->error);
}

static void job_near(struct device_job *job)
{
	const struct session *session = request_of(job)->session;
	if (session->conn != NULL && session->in_flight == 1)
		conn_expect_reply(session->conn);
}

void device_submit(struct request *request, struct device_lane *lane, void (*done)(struct request *request))
{
	const bool direct = request->direct;
	bool ended = false;
	request->device_lane = lane;
	request->device_done = done;
	request->device_job.loop = request->context->loop;
	request->device_job.by_loop = !direct;
	request->device_job.near = direct ? NULL : job_near;
	request->device_job.done = direct ? job_done_direct : job_done;
	const opd_status status = submit(request, lane, &ended);
	if (status != OPD_OK) {
		request->device_lane = NULL;
		request->device_job.status = status;
	} else if (!direct && !ended) {
		return;
	}
	while (status == OPD_OK && !ended && sem_wait(request->owner) != 0)
		;
	done(request);
}

opd_status device_wanted(struct request *request, struct msg_text text, uint32_t *number_out)
{
	const struct snapshot *snapshot = request->snapshot;
	const struct placement_wish wish = {.device = text, .class = request->session->class};
	struct device_filter filter;
	*number_out = 0;
	if (text.bytes == 0)
		return OPD_OK;
	opd_status status = device_filter_parse(text, &filter, &request->error);
	if (status != OPD_OK)
		return status;
	const char *host = snapshot->devices[0].kind;
	if (strlen(host) == filter.kind_bytes && memcmp(host, filter.kind, filter.kind_bytes) == 0 && filter.ordinal <= 0)
		return OPD_OK;
	*number_out = placement_choose(request->context->server, snapshot, request->session, &wish);
	return *number_out != 0 ? OPD_OK : opd_fail(&request->error, OPD_FAILED_PRECONDITION, "device %s: there is none", text.data);
}

static void move_enqueue(struct device_lane *lane, struct device_job *job)
{
	struct device_move *move = &request_of(job)->move;
	job->status = device_begin(lane, job);
	if (job->status == OPD_OK && move->buffer == NULL) {
		job->status = device_alloc(lane, job, move->bytes, &move->buffer);
		move->taken = job->status == OPD_OK;
	} else if (job->status == OPD_OK) {
		if (!move->out)
			device_changes(lane, move->buffer);
		job->status = device_hold(job, buffer_ref(move->buffer));
	}
	if (job->status == OPD_OK && move->out)
		job->status = device_copy_out(lane, job, move->host, move->buffer, move->offset, move->bytes);
	else if (job->status == OPD_OK && move->host != NULL)
		job->status = device_copy_in(lane, job, move->buffer, move->offset, move->host, move->bytes);
}

static void move_complete(struct device_lane *lane, struct device_job *job)
{
	struct device_move *move = &request_of(job)->move;
	(void)lane;
	if (!move->taken)
		return;
	if (job->status == OPD_OK)
		(void)buffer_ref(move->buffer); /* the caller's */
	else
		move->buffer = NULL;
}

static void move_done(struct request *request)
{
	const struct device_job *job = &request->device_job;
	request->status = job->status;
	if (job->status != OPD_OK)
		request->error = job->error;
	request->move_done(request);
}

void device_move_start(struct request *request, const char *name, void (*done)(struct request *request))
{
	struct device_lane *lane = NULL;
	const uint32_t device = request->move.device;
	request->move.taken = false;
	request->move_done = done;
	request->status = device_lane_get(request->context->server, &request->snapshot->devices[device], device, &lane, &request->error);
	if (request->status != OPD_OK) {
		done(request);
		return;
	}
	request->device_job = (struct device_job){
		.name = name,
		.account = request->session->account,
		.item = {.class = (uint8_t)request->session->class},
		.unwanted = &request->session->gone,
		.enqueue = move_enqueue,
		.complete = move_complete,
	};
	device_submit(request, lane, move_done);
}
