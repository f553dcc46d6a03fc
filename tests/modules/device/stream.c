/* Streams and events: a thread a stream, which does what was enqueued, in order. */
#include "device.h"

#include <stdlib.h>

enum command_kind { COMMAND_COPY_IN, COMMAND_COPY_OUT, COMMAND_COPY_DEVICE, COMMAND_KERNEL, COMMAND_RECORD };

struct command {
	struct command *next;
	enum command_kind kind;
	void *to; /* host or device, as the kind says */
	const void *from;
	uint64_t to_offset;
	uint64_t from_offset;
	uint64_t bytes;
	struct event *event;
	struct device_launch launch;
};

/* What was enqueued while a stream captured. */
struct captured {
	struct command *first;
	struct command **end;
};

struct stream {
	struct device *device;
	uint32_t ordinal;
	struct captured *capturing; /* NULL: it isn't */
	pthread_t thread;
	pthread_mutex_t mutex; /* of the queue and stopping */
	pthread_cond_t wake;
	struct command *queue;
	struct command **queue_end;
	bool stopping;
	opd_error failure; /* the thread's: the first since the last event */
};

enum event_state { EVENT_IDLE, EVENT_RECORDED, EVENT_COME };

struct event {
	_Atomic int state;
	uint64_t reported_ns; /* from then on it says so */
	opd_error failure;    /* of the work before it; constant once it has come */
};

/* ---- The thread ---- */

static opd_status do_copy(struct stream *stream, const struct command *command, opd_error *error)
{
	struct device *device = stream->device;
	unsigned char *to = command->to;
	const unsigned char *from = command->from;
	if (command->kind != COMMAND_COPY_OUT)
		to = device_contents(device, stream->ordinal, command->to, command->to_offset, command->bytes, "a copy's target", error);
	if (to != NULL && command->kind != COMMAND_COPY_IN)
		from = device_contents(device, stream->ordinal, command->from, command->from_offset, command->bytes, "a copy's source",
		                       error);
	if (to == NULL || from == NULL)
		return OPD_INTERNAL;
	memcpy(to, from, command->bytes);
	return OPD_OK;
}

static opd_status do_kernel(struct stream *stream, const struct command *command, opd_error *error)
{
	device_sleep_us(stream->device->delay_us + (stream->ordinal == 0 ? stream->device->slow_us : 0));
	if (device_faulty(stream->device, DEVICE_FAULT_HANG))
		device_await_gate("OPD_TEST_DEVICE_GATE");
	if (device_faulty(stream->device, DEVICE_FAULT_KERNEL))
		return opd_fail(error, OPD_INTERNAL, "kernel: injected failure");
	if (device_faulty(stream->device, DEVICE_FAULT_LOST))
		atomic_store(&stream->device->lost[stream->ordinal], true);
	if (device_check_lost(stream->device, stream->ordinal, error) != OPD_OK)
		return OPD_DATA_LOSS;
	return command->launch.kernel(stream->device, stream->ordinal, &command->launch, error);
}

/* The failure is this event's alone: the next one's work starts anew. */
static void do_record(struct stream *stream, struct event *event)
{
	event->failure = stream->failure;
	if (event->failure.status == OPD_OK)
		(void)!device_check_lost(stream->device, stream->ordinal, &event->failure);
	event->reported_ns = device_now_ns() + stream->device->event_us * 1000;
	stream->failure = (opd_error){0};
	atomic_store_explicit(&event->state, EVENT_COME, memory_order_release);
}

static void do_command(struct stream *stream, const struct command *command)
{
	opd_error error = {0};
	opd_status status = OPD_OK;
	if (command->kind == COMMAND_RECORD)
		do_record(stream, command->event);
	else if (stream->failure.status == OPD_OK) /* what follows a failure is skipped, as on a GPU */
		status = command->kind == COMMAND_KERNEL ? do_kernel(stream, command, &error) : do_copy(stream, command, &error);
	if (status != OPD_OK)
		stream->failure = error;
}

static void *stream_main(void *argument)
{
	struct stream *stream = argument;
	for (;;) {
		(void)pthread_mutex_lock(&stream->mutex);
		while (stream->queue == NULL && !stream->stopping)
			(void)pthread_cond_wait(&stream->wake, &stream->mutex);
		struct command *command = stream->queue;
		if (command != NULL)
			stream->queue = command->next;
		if (stream->queue == NULL)
			stream->queue_end = &stream->queue;
		(void)pthread_mutex_unlock(&stream->mutex);
		if (command == NULL)
			return NULL;
		do_command(stream, command);
		free(command);
	}
}

/* ---- Streams ---- */

opd_status device_stream_create(void *state, uint32_t ordinal, void **stream_out, opd_error *error)
{
	struct device *device = state;
	if (device_faulty(device, DEVICE_FAULT_STREAM))
		return opd_fail(error, OPD_UNAVAILABLE, "stream_create: injected failure");
	struct stream *stream = calloc(1, sizeof *stream);
	if (stream == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "stream_create: out of memory");
	stream->device = device;
	stream->ordinal = ordinal;
	stream->queue_end = &stream->queue;
	(void)pthread_mutex_init(&stream->mutex, NULL);
	(void)pthread_cond_init(&stream->wake, NULL);
	if (pthread_create(&stream->thread, NULL, stream_main, stream) != 0) {
		free(stream);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "stream_create: no thread");
	}
	(void)atomic_fetch_add(&device->streams, 1);
	*stream_out = stream;
	return OPD_OK;
}

/* Does what is queued first. */
void device_stream_destroy(void *state, void *stream_of)
{
	struct device *device = state;
	struct stream *stream = stream_of;
	if (stream == NULL)
		return;
	(void)pthread_mutex_lock(&stream->mutex);
	stream->stopping = true;
	(void)pthread_cond_signal(&stream->wake);
	(void)pthread_mutex_unlock(&stream->mutex);
	(void)pthread_join(stream->thread, NULL);
	(void)pthread_cond_destroy(&stream->wake);
	(void)pthread_mutex_destroy(&stream->mutex);
	free(stream);
	(void)atomic_fetch_sub(&device->streams, 1);
}

static opd_status append(struct stream *stream, const struct command *command, opd_error *error)
{
	if (stream->device->instant != 0 && stream->ordinal == 0 && stream->capturing == NULL) { /* nothing is ever queued then */
		do_command(stream, command);
		return OPD_OK;
	}
	struct command *copy = malloc(sizeof *copy);
	if (copy == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "enqueue: out of memory");
	*copy = *command;
	copy->next = NULL;
	if (stream->capturing != NULL) {
		*stream->capturing->end = copy;
		stream->capturing->end = &copy->next;
		return OPD_OK;
	}
	(void)pthread_mutex_lock(&stream->mutex);
	*stream->queue_end = copy;
	stream->queue_end = &copy->next;
	(void)pthread_cond_signal(&stream->wake);
	(void)pthread_mutex_unlock(&stream->mutex);
	return OPD_OK;
}

static opd_status enqueue(struct stream *stream, const struct command *command, opd_error *error)
{
	opd_status status = device_enter(stream->device, stream->ordinal, "enqueue", error);
	if (status != OPD_OK)
		return status;
	status = append(stream, command, error);
	device_leave(stream->device, stream->ordinal);
	return status;
}

/* ---- Capture: what may be captured is kept in a list, and launched as copies of it ---- */

static void captured_destroy(struct captured *captured)
{
	while (captured->first != NULL) {
		struct command *command = captured->first;
		captured->first = command->next;
		free(command);
	}
	free(captured);
}

opd_status device_capture_begin(void *state, void *stream_of, opd_error *error)
{
	struct stream *stream = stream_of;
	if (device_faulty(state, DEVICE_FAULT_CAPTURE))
		return opd_fail(error, OPD_INTERNAL, "capture_begin: injected failure");
	stream->capturing = calloc(1, sizeof *stream->capturing);
	if (stream->capturing == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "capture_begin: out of memory");
	stream->capturing->end = &stream->capturing->first;
	return OPD_OK;
}

opd_status device_capture_end(void *state, void *stream_of, void **graph_out, opd_error *error)
{
	struct device *device = state;
	struct stream *stream = stream_of;
	(void)error;
	*graph_out = stream->capturing;
	stream->capturing = NULL;
	(void)atomic_fetch_add(&device->captures, 1);
	(void)atomic_fetch_add(&device->graphs, 1);
	return OPD_OK;
}

opd_status device_graph_launch(void *state, void *graph, void *stream_of, opd_error *error)
{
	struct device *device = state;
	opd_status status = OPD_OK;
	for (const struct command *command = ((struct captured *)graph)->first; command != NULL && status == OPD_OK; command = command->next)
		status = enqueue(stream_of, command, error);
	(void)atomic_fetch_add(&device->launches, 1);
	if (device->tell != 0)
		device->host->log(device->host, OPD_LOG_INFO, "a graph is enqueued");
	return status;
}

void device_graph_destroy(void *state, void *graph)
{
	struct device *device = state;
	captured_destroy(graph);
	(void)atomic_fetch_sub(&device->graphs, 1);
}

/* Enqueued while it captures, a copy with the host can't be replayed. */
static opd_status refuse_capturing(const struct stream *stream, const char *what, opd_error *error)
{
	return stream->capturing == NULL ? OPD_OK : opd_fail(error, OPD_INTERNAL, "%s while the stream captures", what);
}

opd_status device_enqueue(void *stream_of, const struct device_launch *launch, opd_error *error)
{
	struct stream *stream = stream_of;
	struct command command = {.kind = COMMAND_KERNEL, .launch = *launch};
	return enqueue(stream, &command, error);
}

opd_status device_copy_in(void *state, void *stream, void *to, uint64_t to_offset, const void *host_from, uint64_t bytes,
                          opd_error *error)
{
	struct command command = {.kind = COMMAND_COPY_IN, .to = to, .to_offset = to_offset, .from = host_from, .bytes = bytes};
	if (device_faulty(state, DEVICE_FAULT_COPY_IN))
		return opd_fail(error, OPD_INTERNAL, "copy_in: injected failure");
	if (refuse_capturing(stream, "copy_in", error) != OPD_OK)
		return OPD_INTERNAL;
	return enqueue(stream, &command, error);
}

opd_status device_copy_out(void *state, void *stream, void *host_to, const void *from, uint64_t from_offset, uint64_t bytes,
                           opd_error *error)
{
	struct command command = {.kind = COMMAND_COPY_OUT, .to = host_to, .from = from, .from_offset = from_offset, .bytes = bytes};
	if (device_faulty(state, DEVICE_FAULT_COPY_OUT))
		return opd_fail(error, OPD_INTERNAL, "copy_out: injected failure");
	if (refuse_capturing(stream, "copy_out", error) != OPD_OK)
		return OPD_INTERNAL;
	return enqueue(stream, &command, error);
}

opd_status device_copy_device(void *state, void *stream, void *to, uint64_t to_offset, const void *from, uint64_t from_offset,
                              uint64_t bytes, opd_error *error)
{
	(void)state;
	struct command command = {
	    .kind = COMMAND_COPY_DEVICE, .to = to, .to_offset = to_offset, .from = from, .from_offset = from_offset, .bytes = bytes};
	return enqueue(stream, &command, error);
}

static opd_status copy_one(void *state, void *stream, const opd_copy *copy, opd_error *error)
{
	static const unsigned char zeros[256];
	const bool to_host = ((uintptr_t)copy->to & DEVICE_MAPPED) != 0, from_host = ((uintptr_t)copy->from & DEVICE_MAPPED) != 0;
	const void *from = (const void *)(((uintptr_t)copy->from & ~DEVICE_MAPPED) + copy->from_offset);
	if ((to_host && (from_host || copy->from == NULL)) || (copy->from == NULL && copy->bytes > sizeof zeros))
		return opd_fail(error, OPD_INTERNAL, "copy_many: a copy that this device doesn't know");
	if (to_host)
		return device_copy_out(state, stream, (void *)(((uintptr_t)copy->to & ~DEVICE_MAPPED) + copy->to_offset), copy->from, copy->from_offset, copy->bytes, error);
	if (from_host || copy->from == NULL)
		return device_copy_in(state, stream, copy->to, copy->to_offset, copy->from == NULL ? zeros : from, copy->bytes, error);
	return device_copy_device(state, stream, copy->to, copy->to_offset, copy->from, copy->from_offset, copy->bytes, error);
}

opd_status device_copy_many(void *state, void *stream, const opd_copy *copies, uint32_t count, opd_error *error)
{
	opd_status status = count == 0 || count > OPD_COPIES_MAX ? opd_fail(error, OPD_INTERNAL, "copy_many: %u copies", (unsigned)count) : OPD_OK;
	for (uint32_t i = 0; i < count && status == OPD_OK; i++)
		status = copy_one(state, stream, &copies[i], error);
	return status;
}

/* ---- Events ---- */

opd_status device_event_create(void *state, uint32_t ordinal, void **event_out, opd_error *error)
{
	struct device *device = state;
	(void)ordinal;
	if (device_faulty(device, DEVICE_FAULT_EVENT))
		return opd_fail(error, OPD_INTERNAL, "event_create: injected failure");
	struct event *event = calloc(1, sizeof *event);
	if (event == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "event_create: out of memory");
	(void)atomic_fetch_add(&device->events, 1);
	*event_out = event;
	return OPD_OK;
}

void device_event_destroy(void *state, void *event_of)
{
	struct device *device = state;
	struct event *event = event_of;
	if (event == NULL)
		return;
	if (atomic_load(&event->state) == EVENT_RECORDED)
		abort(); /* the stream's thread will write to it */
	free(event);
	(void)atomic_fetch_sub(&device->events, 1);
}

opd_status device_event_record(void *state, void *event_of, void *stream, opd_error *error)
{
	struct event *event = event_of;
	struct command command = {.kind = COMMAND_RECORD, .event = event};
	if (device_faulty(state, DEVICE_FAULT_RECORD))
		return opd_fail(error, OPD_INTERNAL, "event_record: injected failure");
	atomic_store(&event->state, EVENT_RECORDED);
	opd_status status = enqueue(stream, &command, error);
	if (status != OPD_OK)
		atomic_store(&event->state, EVENT_IDLE);
	return status;
}

opd_status device_event_query(void *state, void *event_of, opd_error *error)
{
	const struct event *event = event_of;
	(void)state;
	int now = atomic_load_explicit(&event->state, memory_order_acquire);
	if (now == EVENT_IDLE)
		return OPD_OK;
	if (now == EVENT_RECORDED || device_now_ns() < event->reported_ns)
		return OPD_UNAVAILABLE;
	if (event->failure.status != OPD_OK)
		*error = event->failure;
	return (opd_status)event->failure.status;
}
