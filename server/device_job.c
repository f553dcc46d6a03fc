#include <string.h>

#include "server/device_work.h"
#include "server/module.h"
#include "server/pins.h"

struct device_held {
	struct device_held *next;
	struct buffer *buffer;
	bool written; /* by the job */
};

/* A copy on its way to the device. */
struct device_mirror {
	struct device_mirror *next;
	struct buffer *of; /* kept by the job's owner */
	struct buffer *mirror; /* held by the job */
};

opd_status device_failed(struct device_lane *lane, struct device_job *job, opd_status status, const char *what)
{
	device_note(lane, status, &job->error);
	status = module_failure(status, &job->error, "%s failed", what);
	return opd_error_prefix(&job->error, status, "%s on %s", job->name, lane->device.name);
}

void device_note(struct device_lane *lane, opd_status status, const opd_error *error)
{
	if (status != OPD_DATA_LOSS || lane->lost)
		return;
	lane->lost = true;
	lane->given_back = false;
	lane->loss = *error;
	atomic_store_explicit(&lane->memory.lost, true, memory_order_release);
	device_tell_loss(lane);
}

opd_status device_no_memory(struct device_job *job)
{
	return opd_fail(&job->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory on the way to the device", job->name);
}

/* How much memory the device has: asked for on the lane's thread, since that may make its context. */
static opd_status measure(struct device_lane *lane, struct device_job *job)
{
	opd_device_info info = {.struct_bytes = sizeof info};
	if (lane->measured)
		return OPD_OK;
	opd_status status = lane->device.backend->device_info(lane->device.state, lane->device.ordinal, &info, &job->error);
	if (status != OPD_OK)
		return device_failed(lane, job, status, "device_info");
	atomic_store_explicit(&lane->memory.limit_bytes, info.memory_bytes, memory_order_relaxed);
	lane->measured = true;
	return OPD_OK;
}

/* After a failure the next job tries again. */
static opd_status need_stream(struct device_lane *lane, struct device_job *job)
{
	if (lane->stream != NULL)
		return OPD_OK;
	opd_status status = measure(lane, job);
	if (status != OPD_OK)
		return status;
	status = lane->device.backend->stream_create(lane->device.state, lane->device.ordinal, &lane->stream, &job->error);
	if (status == OPD_OK)
		return OPD_OK;
	lane->stream = NULL;
	return device_failed(lane, job, status, "stream_create");
}

void device_drop_stream(struct device_lane *lane)
{
	if (lane->stream != NULL)
		lane->device.backend->stream_destroy(lane->device.state, lane->stream);
	lane->stream = NULL;
}

static opd_status need_event(struct device_lane *lane, struct device_job *job)
{
	if (lane->event_count != 0) {
		job->event = lane->events[--lane->event_count];
		return OPD_OK;
	}
	opd_status status = lane->device.backend->event_create(lane->device.state, lane->device.ordinal, &job->event, &job->error);
	if (status == OPD_OK)
		return OPD_OK;
	job->event = NULL;
	return device_failed(lane, job, status, "event_create");
}

void device_give_event(struct device_lane *lane, void *event)
{
	if (event != NULL && lane->event_count < DEVICE_EVENTS_KEPT)
		lane->events[lane->event_count++] = event;
	else if (event != NULL)
		lane->device.backend->event_destroy(lane->device.state, event);
}

opd_status device_begin(struct device_lane *lane, struct device_job *job)
{
	device_many_end(lane);
	return device_begin_beside(lane, job);
}

/* The event is there before anything is enqueued: without one nobody would learn of the end. */
opd_status device_begin_beside(struct device_lane *lane, struct device_job *job)
{
	opd_status status = need_stream(lane, job);
	lane->gathered_count = 0; /* of a job that has failed */
	if (status == OPD_OK)
		status = need_event(lane, job);
	job->enqueued = status == OPD_OK;
	return status;
}

/* One thread at a time has the device: nobody else writes it. */
static void count_in_jobs(struct buffer *buffer, uint32_t more)
{
	if (buffer->device != 0)
		atomic_store_explicit(&buffer->in_jobs, atomic_load_explicit(&buffer->in_jobs, memory_order_relaxed) + more, memory_order_release);
}

opd_status device_hold(struct device_job *job, struct buffer *buffer)
{
	struct device_held *held = arena_alloc(&job->arena, sizeof *held);
	if (held == NULL || buffer_lost(buffer)) {
		opd_status status = held == NULL ? device_no_memory(job)
		                                 : opd_fail(&job->error, OPD_DATA_LOSS, "%s: a tensor is lost: it lay on a device, %s", job->name, buffer_lost_why(buffer));
		buffer_unref(buffer);
		return status;
	}
	*held = (struct device_held){.next = job->held, .buffer = buffer};
	job->held = held;
	count_in_jobs(buffer, 1);
	return OPD_OK;
}

void device_writes(struct device_job *job, const struct buffer *buffer)
{
	struct device_held *held = job->held;
	while (held != NULL && held->buffer != buffer) /* it has just been held: it is the first */
		held = held->next;
	if (held != NULL)
		held->written = true;
}

/* A job before it has failed, after this one had begun to count on it. */
void device_inherit_failure(struct device_job *job)
{
	for (const struct device_held *held = job->held; held != NULL && job->status == OPD_OK; held = held->next)
		if (atomic_load_explicit(&held->buffer->failed, memory_order_acquire))
			job->status = opd_fail(&job->error, OPD_ABORTED, "%s: what it reads was to be written by a run before it, which failed", job->name);
}

void device_bequeath_failure(const struct device_job *job)
{
	for (const struct device_held *held = job->held; held != NULL && job->writes; held = held->next)
		if (held->written)
			atomic_store_explicit(&held->buffer->failed, true, memory_order_release);
}

void device_changes(struct device_lane *lane, struct buffer *buffer)
{
	buffer->version = ++lane->versions;
}

static bool make_room(struct device_lane *lane)
{
	return memory_trim(&lane->memory) || device_wait(lane) || memory_evict(&lane->memory);
}

opd_status device_alloc(struct device_lane *lane, struct device_job *job, uint64_t bytes, struct buffer **buffer_out)
{
	struct account *account = account_on(job->account, &lane->memory);
	if (account == NULL)
		return device_no_memory(job);
	opd_status status;
	do
		status = buffer_alloc(account, bytes, 0, buffer_out, &job->error);
	while (status == OPD_RESOURCE_EXHAUSTED && make_room(lane));
	if (status != OPD_OK)
		return device_failed(lane, job, status, "alloc");
	device_changes(lane, *buffer_out);
	return device_hold(job, *buffer_out);
}

opd_status device_copy_in(struct device_lane *lane, struct device_job *job, const struct buffer *to, uint64_t offset, const void *from, uint64_t bytes)
{
	void *mapped;
	if (bytes == 0)
		return OPD_OK;
	unsigned char *piece = pins_use(&lane->device, from, bytes, &mapped) ? NULL : device_ring_take(lane, job, bytes, NULL);
	if (piece != NULL)
		from = memcpy(piece, from, bytes);
	opd_status status = lane->device.backend->copy_in(lane->device.state, lane->stream, to->data, offset, from, bytes, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_in");
}

opd_status device_copy_out(struct device_lane *lane, struct device_job *job, void *to, const struct buffer *from, uint64_t offset, uint64_t bytes)
{
	void *mapped;
	if (bytes == 0)
		return OPD_OK;
	unsigned char *piece = pins_use(&lane->device, to, bytes, &mapped) ? NULL : device_ring_take(lane, job, bytes, NULL);
	if (piece != NULL && device_ring_land(job, to, piece, bytes))
		to = piece;
	opd_status status = lane->device.backend->copy_out(lane->device.state, lane->stream, to, from->data, offset, bytes, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_out");
}

void device_release(struct device_lane *lane, struct device_job *job)
{
	for (struct device_held *held = job->held; held != NULL; held = held->next) {
		count_in_jobs(held->buffer, UINT32_MAX);
		buffer_unref(held->buffer);
	}
	device_give_event(lane, job->event);
	job->event = NULL;
	job->held = NULL;
	if (lane->arena_count < DEVICE_ARENAS_KEPT) {
		arena_reset(&job->arena);
		lane->arenas[lane->arena_count++] = job->arena;
		job->arena = (struct arena){0};
	} else {
		arena_fini(&job->arena);
	}
}

/* ---- Mirrors ---- */

static struct buffer *mirror_of(const struct device_job *job, const struct buffer *buffer)
{
	const struct device_mirror *mirror = job->mirrors;
	while (mirror != NULL && mirror->of != buffer)
		mirror = mirror->next;
	return mirror == NULL ? NULL : mirror->mirror;
}

/* A job in flight makes it: whether its copy is good is known when that has ended, and a failure must not become others'. */
static bool mirror_pending(const struct device_lane *lane, const struct buffer *buffer)
{
	if (lane->making == 0)
		return false;
	for (const struct device_job *job = lane->flight; job != NULL; job = job->next)
		if (mirror_of(job, buffer) != NULL)
			return true;
	return false;
}

static opd_status mirror_make(struct device_lane *lane, struct device_job *job, struct buffer *buffer, uint64_t bytes, struct buffer **mirror_out)
{
	struct buffer *host = buffer_on(buffer, 0);
	if (host == NULL)
		return opd_fail(&job->error, OPD_RESOURCE_EXHAUSTED, "%s: an operand's copy on %s has given way to other tensors, and host memory has none", job->name, lane->device.name);
	const void *from = host->data;
	opd_status status = device_hold(job, host);
	if (status == OPD_OK)
		status = device_alloc(lane, job, bytes, mirror_out);
	if (status == OPD_OK)
		status = device_copy_in(lane, job, *mirror_out, 0, from, bytes);
	struct device_mirror *made = status == OPD_OK ? arena_alloc(&job->arena, sizeof *made) : NULL;
	if (status != OPD_OK || made == NULL)
		return status != OPD_OK ? status : device_no_memory(job);
	*made = (struct device_mirror){job->mirrors, buffer, *mirror_out};
	lane->making += job->mirrors == NULL;
	job->mirrors = made;
	return OPD_OK;
}

opd_status device_bring(struct device_lane *lane, struct device_job *job, struct buffer *buffer, uint64_t bytes, struct buffer **here_out, bool *moved_out)
{
	*moved_out = false;
	while (mirror_pending(lane, buffer))
		(void)device_wait(lane);
	*here_out = mirror_of(job, buffer); /* an operand twice */
	if (*here_out != NULL)
		return OPD_OK;
	*here_out = buffer_on(buffer, lane->number);
	if (*here_out != NULL)
		return device_hold(job, *here_out);
	*moved_out = true;
	return mirror_make(lane, job, buffer, bytes, here_out);
}

void device_mirrors_settle(struct device_lane *lane, struct device_job *job)
{
	lane->making -= job->mirrors != NULL;
	for (struct device_mirror *mirror = job->mirrors; mirror != NULL && job->status == OPD_OK; mirror = mirror->next)
		buffer_add_mirror(mirror->of, mirror->mirror);
	job->mirrors = NULL;
}
