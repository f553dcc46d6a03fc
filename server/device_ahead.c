/* Uploads to a device that are copied there while their bytes still come: the last of them is there soon after it has been received, instead of the first.
 *
 * What has come is copied in pieces, one at a time, each a job of the lane: another one begins when the last has ended and enough has come meanwhile. The copies are apart from their request, which
 * may end before them (its client goes, or takes it back): they have references of their own to what they touch, and go when their piece has ended. */
#include <stdlib.h>

#include "server/daemon.h"
#include "server/device_run.h"
#include "server/device_work.h"
#include "server/request.h"

/* Of less there is nothing to gain; and pieces of less aren't worth a job. At 55 GB/s the last one takes 0.1 ms. */
#define AHEAD_BYTES (8u << 20)
#define PIECE_BYTES (4u << 20)
/* Pieces begin at such places. */
#define PIECE_ALIGNMENT 4096u

struct device_ahead {
	struct device_job job;   /* of one piece */
	struct request *request; /* NULL: it has ended */
	struct session *session; /* referenced */
	struct device_lane *lane;
	struct buffer *payload; /* referenced: host memory, to which more comes */
	uint64_t bytes;         /* of all of it */
	struct buffer *there;   /* referenced, on the device; NULL: not yet */
	uint64_t copied;
	uint64_t piece_bytes; /* that are being copied */
	bool busy;            /* the job is the lane's */
	request_task_fn done; /* all has come, and so it goes on then; NULL: not yet */
};

static struct device_ahead *ahead_of(struct device_job *job)
{
	return (struct device_ahead *)((char *)job - offsetof(struct device_ahead, job));
}

static void destroy(struct device_ahead *ahead)
{
	buffer_unref(ahead->there);
	buffer_unref(ahead->payload);
	session_unref(ahead->session);
	free(ahead);
}

/* ---- On the lane's thread ---- */

/* Only the first piece counts as a use of the payload's memory (server/pins.h): none is locked for what comes once. */
static opd_status copy_piece(struct device_lane *lane, struct device_job *job)
{
	const struct device_ahead *ahead = ahead_of(job);
	const unsigned char *from = ahead->payload->data + ahead->copied;
	if (ahead->copied == 0)
		return device_copy_in(lane, job, ahead->there, 0, from, ahead->piece_bytes);
	opd_status status = lane->device.backend->copy_in(lane->device.state, lane->stream, ahead->there->data, ahead->copied, from, ahead->piece_bytes, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_in");
}

static void piece_enqueue(struct device_lane *lane, struct device_job *job)
{
	struct device_ahead *ahead = ahead_of(job);
	const bool first = ahead->there == NULL;
	struct buffer *there = NULL;
	job->status = device_begin(lane, job);
	if (job->status == OPD_OK)
		job->status = first ? device_alloc(lane, job, ahead->bytes, &there) : device_hold(job, buffer_ref(ahead->there));
	if (job->status != OPD_OK)
		return;
	if (first)
		ahead->there = buffer_ref(there);
	job->status = copy_piece(lane, job);
}

/* ---- On its loop ---- */

static void piece_done(struct device_job *job);

/* The lanes are stopped: a piece that has ended is the last one. */
static bool ends(const struct device_ahead *ahead)
{
	return ahead->request->context->server->ending;
}

/* All that has come, but for the rest that the next piece begins with; or nothing: false. */
static bool piece_begin(struct device_ahead *ahead, uint64_t received)
{
	const uint64_t bytes = received == ahead->bytes ? received - ahead->copied : (received - ahead->copied) / PIECE_ALIGNMENT * PIECE_ALIGNMENT;
	ahead->piece_bytes = bytes;
	ahead->job = (struct device_job){
		.name = "upload",
		.account = ahead->session->account,
		.item = {.flow = session_flow(ahead->session, ahead->lane->number), .class = (uint8_t)ahead->session->class},
		.loop = ahead->request->context->loop,
		.unwanted = &ahead->session->gone,
		.enqueue = piece_enqueue,
		.done = piece_done,
	};
	ahead->busy = ahead->job.item.flow != NULL && !ends(ahead) && !device_lane_is_stuck(ahead->lane) && device_lane_submit(ahead->lane, &ahead->job);
	return ahead->busy;
}

/* Nobody can be told yet that it is too full; the rest is tried again when more has come. */
static void go_on(struct device_ahead *ahead)
{
	const uint64_t received = ahead->request->payload_received;
	if (!ahead->busy && ahead->job.status == OPD_OK && received - ahead->copied >= PIECE_BYTES && received != ahead->bytes)
		(void)piece_begin(ahead, received);
}

static void finish(struct device_ahead *ahead, opd_status status)
{
	struct request *request = ahead->request;
	request->status = status;
	if (status == OPD_OK) {
		request->move.buffer = ahead->there; /* the request's from here on */
		ahead->there = NULL;
	} else {
		request->error = ahead->job.error;
	}
	ahead->done(request);
}

/* All has come. */
static void end(struct device_ahead *ahead)
{
	struct device_job *job = &ahead->job;
	if (job->status != OPD_OK || ahead->copied == ahead->bytes) {
		finish(ahead, job->status);
	} else if (!piece_begin(ahead, ahead->bytes)) {
		if (job->item.flow == NULL)
			job->status = device_no_memory(job);
		else if (ends(ahead))
			job->status = opd_fail(&job->error, OPD_UNAVAILABLE, "upload: the server ends");
		else if (device_lane_is_stuck(ahead->lane))
			job->status = opd_fail(&job->error, OPD_UNAVAILABLE, "upload: a kernel on %s has exceeded its budget and still runs", device_lane_name(ahead->lane));
		else
			job->status = execute_refused(ahead->request, job->name, &job->refusal, device_lane_name(ahead->lane), &job->error);
		finish(ahead, job->status);
	}
}

static void piece_done(struct device_job *job)
{
	struct device_ahead *ahead = ahead_of(job);
	ahead->busy = false;
	if (job->status == OPD_OK)
		ahead->copied += ahead->piece_bytes;
	if (ahead->request == NULL)
		destroy(ahead);
	else if (ahead->done != NULL)
		end(ahead);
	else
		go_on(ahead);
}

static struct device_ahead *create(struct request *request)
{
	struct device_lane *lane;
	opd_error error;
	const struct device *device = &request->snapshot->devices[request->move.device];
	if (device_lane_get(request->context->server, device, request->move.device, &lane, &error) != OPD_OK)
		return NULL; /* it is told when all is there */
	struct device_ahead *ahead = calloc(1, sizeof *ahead);
	if (ahead == NULL)
		return NULL;
	ahead->request = request;
	ahead->session = session_ref(request->session);
	ahead->lane = lane;
	ahead->payload = buffer_ref(request->payload);
	ahead->bytes = request->payload_bytes;
	return ahead;
}

void device_ahead_received(struct request *request)
{
	if (request->message.kind != MSG_REQUEST_UPLOAD || request->move.device == 0 || request->payload_bytes < AHEAD_BYTES || request->payload_received < PIECE_BYTES)
		return;
	if (request->ahead == NULL)
		request->ahead = create(request);
	if (request->ahead != NULL)
		go_on(request->ahead);
}

bool device_ahead_finish(struct request *request, request_task_fn done)
{
	struct device_ahead *ahead = request->ahead;
	if (ahead == NULL)
		return false;
	ahead->done = done;
	if (!ahead->busy)
		end(ahead);
	return true;
}

void device_ahead_release(struct request *request)
{
	struct device_ahead *ahead = request->ahead;
	if (ahead == NULL)
		return;
	request->ahead = NULL;
	ahead->request = NULL;
	if (!ahead->busy || device_lane_withdraw(ahead->lane, &ahead->job))
		destroy(ahead);
}
