#include "providers/cuda/backend.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "providers/cuda/call.h"

/* The oldest that the kernels' PTX runs on. */
enum { CAPABILITY_MAJOR = 8 };

static opd_status use(uint32_t ordinal, const char *what, opd_error *error)
{
	return cudart_status(what, (int)cudaSetDevice((int)ordinal), error);
}

/* ---- The probe --------------------------------------------------------------------------------------------------------- */

static bool is_too_old(int ordinal, char *missing, size_t bytes)
{
	int major = 0, minor = 0;
	if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) == cudaSuccess &&
	    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) == cudaSuccess && major >= CAPABILITY_MAJOR)
		return false;
	(void)snprintf(missing, bytes, "not available: device %d has compute capability %d.%d, expected %d.0 or above", ordinal, major, minor, CAPABILITY_MAJOR);
	return true;
}

uint32_t cuda_backend_probe(char *missing, size_t bytes)
{
	/* The runtime is linked in and opens the driver by itself; this asks first, for a text that names what is missing. */
	void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
	int count = 0;
	if (driver == NULL) {
		(void)snprintf(missing, bytes, "not available: libcuda.so.1 not found");
		return 0;
	}
	cudaError_t failed = cudaGetDeviceCount(&count);
	(void)dlclose(driver); /* the runtime holds it */
	if (failed != cudaSuccess || count == 0) {
		(void)snprintf(missing, bytes, "not available: %s", failed == cudaSuccess ? "no device" : cudaGetErrorString(failed));
		return 0;
	}
	for (int i = 0; i < count; i++)
		if (is_too_old(i, missing, bytes))
			return 0;
	return (uint32_t)count;
}

static opd_status device_info(void *state, uint32_t ordinal, opd_device_info *info_out, opd_error *error)
{
	(void)state;
	struct cudaDeviceProp properties;
	opd_status status = cudart_status("cudaGetDeviceProperties", (int)cudaGetDeviceProperties(&properties, (int)ordinal), error);
	if (status != OPD_OK)
		return status;
	info_out->memory_bytes = properties.totalGlobalMem;
	(void)snprintf(info_out->name, sizeof info_out->name, "%.120s", properties.name);
	return OPD_OK;
}

/* ---- Memory ------------------------------------------------------------------------------------------------------------- */

static opd_status memory_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **memory_out, opd_error *error)
{
	(void)state;
	opd_status status = use(ordinal, "alloc", error);
	return status != OPD_OK ? status : cudart_status("cudaMalloc", (int)cudaMalloc(memory_out, bytes == 0 ? 1 : bytes), error);
}

static void memory_free(void *state, uint32_t ordinal, void *memory)
{
	(void)state;
	(void)cudaSetDevice((int)ordinal);
	(void)cudaFree(memory); /* of a lost device: nothing is left to free */
	(void)cudaGetLastError();
}

static opd_status memory_host_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **host_out, void **device_out, opd_error *error)
{
	(void)state;
	opd_status status = use(ordinal, "host_alloc", error);
	if (status == OPD_OK)
		status = cudart_status("cudaHostAlloc", (int)cudaHostAlloc(host_out, bytes == 0 ? 1 : bytes, cudaHostAllocPortable | cudaHostAllocMapped), error);
	if (status != OPD_OK || device_out == NULL)
		return status;
	if (cudaHostGetDevicePointer(device_out, *host_out, 0) != cudaSuccess) {
		(void)cudaGetLastError();
		*device_out = NULL;
	}
	return OPD_OK;
}

static void memory_host_free(void *state, uint32_t ordinal, void *host)
{
	(void)state;
	(void)cudaSetDevice((int)ordinal);
	(void)cudaFreeHost(host);
	(void)cudaGetLastError();
}

static opd_status memory_host_register(void *state, void *memory, uint64_t bytes, opd_error *error)
{
	(void)state;
	return cudart_status("cudaHostRegister", (int)cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped), error);
}

static void memory_host_unregister(void *state, void *memory)
{
	(void)state;
	(void)cudaHostUnregister(memory);
	(void)cudaGetLastError();
}

static void *memory_host_mapped(void *state, uint32_t ordinal, void *host)
{
	(void)state, (void)ordinal; /* one address space: it is the same for all devices */
	void *mapped;
	if (cudaHostGetDevicePointer(&mapped, host, 0) == cudaSuccess)
		return mapped;
	(void)cudaGetLastError();
	return NULL;
}

/* ---- Streams, copies ------------------------------------------------------------------------------------------------------ */

static opd_status stream_create(void *state, uint32_t ordinal, void **stream_out, opd_error *error)
{
	(void)state;
	cudaStream_t stream;
	opd_status status = use(ordinal, "stream_create", error);
	if (status == OPD_OK)
		status = cudart_status("cudaStreamCreate", (int)cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), error);
	if (status == OPD_OK)
		*stream_out = stream;
	return status;
}

static void stream_destroy(void *state, void *stream)
{
	(void)state;
	(void)cudaStreamSynchronize(stream);
	(void)cudaStreamDestroy(stream);
	(void)cudaGetLastError();
}

static opd_status copy(void *to, uint64_t to_offset, const void *from, uint64_t from_offset, uint64_t bytes, enum cudaMemcpyKind kind, void *stream,
                       opd_error *error)
{
	return cudart_status("cudaMemcpyAsync",
	                   (int)cudaMemcpyAsync((unsigned char *)to + to_offset, (const unsigned char *)from + from_offset, bytes, kind, stream), error);
}

static opd_status copy_in(void *state, void *stream, void *to, uint64_t to_offset, const void *host_from, uint64_t bytes, opd_error *error)
{
	(void)state;
	return copy(to, to_offset, host_from, 0, bytes, cudaMemcpyHostToDevice, stream, error);
}

static opd_status copy_out(void *state, void *stream, void *host_to, const void *from, uint64_t from_offset, uint64_t bytes, opd_error *error)
{
	(void)state;
	return copy(host_to, 0, from, from_offset, bytes, cudaMemcpyDeviceToHost, stream, error);
}

static opd_status copy_device(void *state, void *stream, void *to, uint64_t to_offset, const void *from, uint64_t from_offset, uint64_t bytes,
                              opd_error *error)
{
	(void)state;
	return copy(to, to_offset, from, from_offset, bytes, cudaMemcpyDeviceToDevice, stream, error);
}

/* Both devices lie in one address space; the runtime knows whose an address is. */
static opd_status copy_peer(void *state, void *stream, void *to, uint64_t to_offset, uint32_t from_ordinal, const void *from, uint64_t from_offset,
                            uint64_t bytes, opd_error *error)
{
	(void)state, (void)from_ordinal;
	return copy(to, to_offset, from, from_offset, bytes, cudaMemcpyDefault, stream, error);
}

static opd_status copy_many(void *state, void *stream, const opd_copy *copies, uint32_t count, opd_error *error)
{
	(void)state;
	struct cuda_copy_call call = {.count = count};
	memcpy(call.copies, copies, count * sizeof copies[0]);
	return cudart_status("copies", cuda_copy_launch(&call, stream), error);
}

static opd_status zero(void *state, void *stream, void *to, uint64_t to_offset, uint64_t bytes, opd_error *error)
{
	(void)state;
	return cudart_status("cudaMemsetAsync", (int)cudaMemsetAsync((unsigned char *)to + to_offset, 0, bytes, stream), error);
}

/* ---- Events ----------------------------------------------------------------------------------------------------------------- */

static opd_status event_create(void *state, uint32_t ordinal, void **event_out, opd_error *error)
{
	(void)state;
	cudaEvent_t event;
	opd_status status = use(ordinal, "event_create", error);
	if (status == OPD_OK)
		status = cudart_status("cudaEventCreate", (int)cudaEventCreateWithFlags(&event, cudaEventDisableTiming), error);
	if (status == OPD_OK)
		*event_out = event;
	return status;
}

static void event_destroy(void *state, void *event)
{
	(void)state;
	(void)cudaEventDestroy(event);
	(void)cudaGetLastError();
}

static opd_status event_record(void *state, void *event, void *stream, opd_error *error)
{
	(void)state;
	return cudart_status("cudaEventRecord", (int)cudaEventRecord(event, stream), error);
}

static opd_status event_query(void *state, void *event, opd_error *error)
{
	(void)state;
	cudaError_t code = cudaEventQuery(event);
	return code == cudaErrorNotReady ? OPD_UNAVAILABLE : cudart_status("the work on the device", (int)code, error);
}

static opd_status stream_wait(void *state, void *stream, void *event, opd_error *error)
{
	(void)state;
	return cudart_status("cudaStreamWaitEvent", (int)cudaStreamWaitEvent(stream, event, 0), error);
}

/* ---- Graphs ------------------------------------------------------------------------------------------------------------------- */

static opd_status capture_begin(void *state, void *stream, opd_error *error)
{
	(void)state;
	return cudart_status("cudaStreamBeginCapture", (int)cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), error);
}

static opd_status capture_end(void *state, void *stream, void **graph_out, opd_error *error)
{
	(void)state;
	cudaGraph_t graph = NULL;
	cudaGraphExec_t made = NULL;
	opd_status status = cudart_status("cudaStreamEndCapture", (int)cudaStreamEndCapture(stream, &graph), error);
	if (status != OPD_OK)
		return status;
	status = cudart_status("cudaGraphInstantiate", (int)cudaGraphInstantiate(&made, graph, 0), error);
	(void)cudaGraphDestroy(graph);
	if (status == OPD_OK)
		*graph_out = made;
	return status;
}

static opd_status graph_launch(void *state, void *graph, void *stream, opd_error *error)
{
	(void)state;
	return cudart_status("cudaGraphLaunch", (int)cudaGraphLaunch(graph, stream), error);
}

static void graph_destroy(void *state, void *graph)
{
	(void)state;
	(void)cudaGraphExecDestroy(graph);
	(void)cudaGetLastError();
}

void cuda_backend_init(opd_backend *backend, uint32_t device_count)
{
	*backend = (opd_backend){
		.struct_bytes = sizeof *backend,
		.device_count = device_count,
		.kind = "cuda",
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
		.host_register = memory_host_register,
		.host_unregister = memory_host_unregister,
		.host_alloc = memory_host_alloc,
		.host_free = memory_host_free,
		.zero = zero,
		.stream_wait = stream_wait,
		.copy_peer = copy_peer,
		.capture_begin = capture_begin,
		.capture_end = capture_end,
		.graph_launch = graph_launch,
		.graph_destroy = graph_destroy,
		.host_mapped = memory_host_mapped,
		.flags = OPD_BACKEND_FAILS_WHOLE, /* an error of the work is sticky */
		.copy_many = copy_many,
	};
}
