/* The device backend: memory, copies, queues, events. In-order queues; an event is a marker in one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/opencl/opencl.h"

struct event {
	cl_event marker; /* NULL: nothing was recorded */
};

opd_status opencl_status(cl_int code, const char *what, opd_error *error)
{
	if (code == CL_SUCCESS)
		return OPD_OK;
	const bool memory = code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_HOST_MEMORY || code == CL_OUT_OF_RESOURCES || code == CL_INVALID_BUFFER_SIZE;
	const opd_status status = memory ? OPD_RESOURCE_EXHAUSTED : code == CL_DEVICE_NOT_AVAILABLE ? OPD_DATA_LOSS : OPD_INTERNAL;
	return opd_fail(error, status, "%s: %s (%d)", what, library_error(code), (int)code);
}

static opd_status device_info(void *state, uint32_t ordinal, opd_device_info *info_out, opd_error *error)
{
	struct opencl *cl = state;
	cl_ulong bytes = 0;
	const cl_device_id id = cl->devices[ordinal].id;
	cl_int code = cl->cl.GetDeviceInfo(id, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof bytes, &bytes, NULL);
	if (code == CL_SUCCESS)
		code = cl->cl.GetDeviceInfo(id, CL_DEVICE_NAME, sizeof info_out->name, info_out->name, NULL);
	if (code == CL_INVALID_VALUE) { /* a longer name */
		(void)snprintf(info_out->name, sizeof info_out->name, "an OpenCL device");
		code = CL_SUCCESS;
	}
	info_out->memory_bytes = bytes;
	return opencl_status(code, "clGetDeviceInfo", error);
}

static opd_status memory_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **memory_out, opd_error *error)
{
	struct opencl *cl = state;
	cl_int code;
	cl_mem memory = cl->cl.CreateBuffer(cl->devices[ordinal].context, CL_MEM_READ_WRITE, bytes, NULL, &code);
	if (code == CL_SUCCESS)
		*memory_out = memory;
	return opencl_status(code, "clCreateBuffer", error);
}

static void memory_free(void *state, uint32_t ordinal, void *memory)
{
	struct opencl *cl = state;
	(void)ordinal;
	(void)cl->cl.ReleaseMemObject(memory);
}

static opd_status stream_create(void *state, uint32_t ordinal, void **stream_out, opd_error *error)
{
	struct opencl *cl = state;
	struct opencl_device *device = &cl->devices[ordinal];
	struct opencl_stream *stream = calloc(1, sizeof *stream);
	cl_int code;
	if (stream == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "stream: out of memory");
	stream->device = device;
	stream->queue = cl->cl.CreateCommandQueue(device->context, device->id, 0, &code);
	if (code == CL_SUCCESS)
		*stream_out = stream;
	else
		free(stream);
	return opencl_status(code, "clCreateCommandQueue", error);
}

static void stream_destroy(void *state, void *stream_of)
{
	struct opencl *cl = state;
	struct opencl_stream *stream = stream_of;
	if (stream == NULL)
		return;
	(void)cl->cl.Finish(stream->queue);
	(void)cl->cl.ReleaseCommandQueue(stream->queue);
	free(stream);
}

static opd_status copy_in(void *state, void *stream_of, void *to, uint64_t to_offset, const void *host_from, uint64_t bytes, opd_error *error)
{
	struct opencl *cl = state;
	const struct opencl_stream *stream = stream_of;
	cl_int code = cl->cl.EnqueueWriteBuffer(stream->queue, to, CL_FALSE, to_offset, bytes, host_from, 0, NULL, NULL);
	return opencl_status(code, "clEnqueueWriteBuffer", error);
}

static opd_status copy_out(void *state, void *stream_of, void *host_to, const void *from, uint64_t from_offset, uint64_t bytes, opd_error *error)
{
	struct opencl *cl = state;
	const struct opencl_stream *stream = stream_of;
	cl_int code = cl->cl.EnqueueReadBuffer(stream->queue, (cl_mem)(uintptr_t)from, CL_FALSE, from_offset, bytes, host_to, 0, NULL, NULL);
	return opencl_status(code, "clEnqueueReadBuffer", error);
}

static opd_status copy_device(void *state, void *stream_of, void *to, uint64_t to_offset, const void *from, uint64_t from_offset, uint64_t bytes,
                              opd_error *error)
{
	struct opencl *cl = state;
	const struct opencl_stream *stream = stream_of;
	cl_int code = cl->cl.EnqueueCopyBuffer(stream->queue, (cl_mem)(uintptr_t)from, to, from_offset, to_offset, bytes, 0, NULL, NULL);
	return opencl_status(code, "clEnqueueCopyBuffer", error);
}

static opd_status memory_zero(void *state, void *stream_of, void *to, uint64_t to_offset, uint64_t bytes, opd_error *error)
{
	struct opencl *cl = state;
	const struct opencl_stream *stream = stream_of;
	const cl_uchar zero = 0;
	cl_int code = cl->cl.EnqueueFillBuffer(stream->queue, to, &zero, sizeof zero, to_offset, bytes, 0, NULL, NULL);
	return opencl_status(code, "clEnqueueFillBuffer", error);
}

static opd_status event_create(void *state, uint32_t ordinal, void **event_out, opd_error *error)
{
	struct event *event = calloc(1, sizeof *event);
	(void)state, (void)ordinal;
	if (event == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "event: out of memory");
	*event_out = event;
	return OPD_OK;
}

static void event_forget(struct opencl *cl, struct event *event)
{
	if (event->marker != NULL)
		(void)cl->cl.ReleaseEvent(event->marker);
	event->marker = NULL;
}

static void event_destroy(void *state, void *event)
{
	if (event == NULL)
		return;
	event_forget(state, event);
	free(event);
}

/* The flush is what makes a driver begin. */
static opd_status event_record(void *state, void *event_of, void *stream_of, opd_error *error)
{
	struct opencl *cl = state;
	struct event *event = event_of;
	const struct opencl_stream *stream = stream_of;
	event_forget(cl, event);
	cl_int code = cl->cl.EnqueueMarkerWithWaitList(stream->queue, 0, NULL, &event->marker);
	if (code != CL_SUCCESS) {
		event->marker = NULL;
		return opencl_status(code, "clEnqueueMarkerWithWaitList", error);
	}
	return opencl_status(cl->cl.Flush(stream->queue), "clFlush", error);
}

static opd_status event_query(void *state, void *event_of, opd_error *error)
{
	struct opencl *cl = state;
	const struct event *event = event_of;
	cl_int done = CL_COMPLETE;
	if (event->marker == NULL)
		return OPD_OK;
	cl_int code = cl->cl.GetEventInfo(event->marker, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof done, &done, NULL);
	if (code != CL_SUCCESS)
		return opencl_status(code, "clGetEventInfo", error);
	if (done < 0)
		return opencl_status(done, "a command", error);
	return done == CL_COMPLETE ? OPD_OK : OPD_UNAVAILABLE;
}

static void *native_handle(void *state, uint32_t ordinal, const char *what)
{
	struct opencl *cl = state;
	if (strcmp(what, "context") == 0)
		return cl->devices[ordinal].context;
	return strcmp(what, "device") == 0 ? cl->devices[ordinal].id : NULL;
}

const opd_backend opencl_backend = {
	.struct_bytes = sizeof opencl_backend,
	.kind = "opencl",
	.device_info = device_info,
	.alloc = memory_alloc,
	.free = memory_free,
	.stream_create = stream_create,
	.stream_destroy = stream_destroy,
	.copy_in = copy_in,
	.copy_out = copy_out,
	.copy_device = copy_device,
	.event_create = event_create,
	.event_destroy = event_destroy,
	.event_record = event_record,
	.event_query = event_query,
	.native_handle = native_handle,
	.zero = memory_zero,
};
