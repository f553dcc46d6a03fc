#include "device.h"

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static const char *const fault_names[DEVICE_FAULT_COUNT] = {
    [DEVICE_FAULT_ALLOC] = "alloc",   [DEVICE_FAULT_STREAM] = "stream",   [DEVICE_FAULT_EVENT] = "event",
    [DEVICE_FAULT_RECORD] = "record", [DEVICE_FAULT_COPY_IN] = "copy_in", [DEVICE_FAULT_COPY_OUT] = "copy_out",
    [DEVICE_FAULT_LAUNCH] = "launch", [DEVICE_FAULT_KERNEL] = "kernel",   [DEVICE_FAULT_MUTE] = "mute",
    [DEVICE_FAULT_CAPTURE] = "capture",
    [DEVICE_FAULT_LOST] = "lost",     [DEVICE_FAULT_HANG] = "hang",       [DEVICE_FAULT_STALL] = "stall",
    [DEVICE_FAULT_HALT] = "halt",     [DEVICE_FAULT_TOGETHER] = "together",
};

uint64_t device_now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void device_sleep_us(uint64_t us)
{
	const struct timespec sleep = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000 * 1000)};
	if (us != 0)
		(void)nanosleep(&sleep, NULL);
}

bool device_faulty(struct device *device, enum device_fault point)
{
	uint32_t seen = 1 + atomic_fetch_add(&device->fault_seen[point], 1);
	return device->fault_first[point] != 0 && seen >= device->fault_first[point] && seen <= device->fault_last[point];
}

opd_status device_enter(struct device *device, uint32_t ordinal, const char *what, opd_error *error)
{
	if (atomic_exchange(&device->inside[ordinal], true))
		return opd_fail(error, OPD_INTERNAL, "test:%u: %s while another thread works with it", (unsigned)ordinal, what);
	if (device_check_lost(device, ordinal, error) == OPD_OK)
		return OPD_OK;
	device_leave(device, ordinal);
	return OPD_DATA_LOSS;
}

void device_leave(struct device *device, uint32_t ordinal)
{
	atomic_store(&device->inside[ordinal], false);
}

opd_status device_check_lost(struct device *device, uint32_t ordinal, opd_error *error)
{
	return atomic_load(&device->lost[ordinal]) ? opd_fail(error, OPD_DATA_LOSS, "test:%u fell off the bus", (unsigned)ordinal) : OPD_OK;
}

/* ---- The environment ---- */

static bool read_number(const char *name, uint64_t *number)
{
	const char *text = getenv(name);
	if (text == NULL)
		return true;
	char *end;
	*number = strtoull(text, &end, 10);
	return end != text && *end == '\0';
}

/* "kernel:2+" */
static bool read_fault(struct device *device, const char *text, size_t bytes)
{
	for (uint32_t point = 0; point < DEVICE_FAULT_COUNT; point++) {
		size_t name_bytes = strlen(fault_names[point]);
		if (bytes < name_bytes + 2 || strncmp(text, fault_names[point], name_bytes) != 0 || text[name_bytes] != ':')
			continue;
		char *end;
		unsigned long first = strtoul(text + name_bytes + 1, &end, 10);
		bool onwards = *end == '+';
		device->fault_first[point] = (uint32_t)first;
		device->fault_last[point] = onwards ? UINT32_MAX : (uint32_t)first;
		return first != 0 && end + onwards == text + bytes;
	}
	return false;
}

static bool read_faults(struct device *device)
{
	const char *at = getenv("OPD_TEST_DEVICE_FAULT");
	while (at != NULL && *at != '\0') {
		size_t bytes = strcspn(at, ",");
		if (!read_fault(device, at, bytes))
			return false;
		at += bytes + (at[bytes] == ',');
	}
	return true;
}

void device_await_gate(const char *name)
{
	const char *gate = getenv(name);
	while (gate != NULL && access(gate, F_OK) != 0)
		device_sleep_us(2000);
}

/* ---- Life ---- */

opd_status device_open(struct device *device, const opd_host *host, opd_error *error)
{
	device->host = host;
	device->memory_bytes = 64u << 20;
	if (!read_number("OPD_TEST_DEVICE_MEMORY", &device->memory_bytes) ||
	    !read_number("OPD_TEST_DEVICE_DELAY_US", &device->delay_us) || !read_number("OPD_TEST_DEVICE_SLOW_US", &device->slow_us) ||
	    !read_number("OPD_TEST_DEVICE_EVENT_US", &device->event_us) || !read_number("OPD_TEST_DEVICE_INSTANT", &device->instant) || !read_number("OPD_TEST_DEVICE_RESET", &device->reset) || !read_number("OPD_TEST_DEVICE_TELL", &device->tell) ||
	    !read_number("OPD_TEST_DEVICE_WHOLE", &device->whole) || !read_faults(device))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "one of the OPD_TEST_DEVICE_ variables can't be read");
	(void)pthread_mutex_init(&device->mutex, NULL);
	device->opened = true;
	device_await_gate("OPD_TEST_DEVICE_OPEN_GATE");
	opd_backend backend = device_backend;
	backend.flags = device->whole != 0 ? OPD_BACKEND_FAILS_WHOLE : 0;
	opd_status status = host->register_backend(host, &backend, error);
	if (status == OPD_OK)
		status = device_register_kernels(host, error);
	return status == OPD_OK ? device_register_resident(host, error) : status;
}

/* Tests look for this line. */
void device_close(struct device *device)
{
	char text[160];
	uint32_t allocations = 0;
	if (!device->opened)
		return;
	while (device->allocations != NULL) {
		void *oldest = device->allocations;
		device_free(device, UINT32_MAX, oldest);
		allocations++;
	}
	bool clean = allocations + device->streams + device->events + device->plans + device->graphs + device->hosts + device->locked == 0;
	(void)snprintf(text, sizeof text, "graphs: %u captured, %u launches, %u left", (unsigned)device->captures, (unsigned)device->launches,
	               (unsigned)device->graphs);
	device->host->log(device->host, OPD_LOG_INFO, text);
	(void)snprintf(text, sizeof text, "together: %u launches of %u calls", (unsigned)device->together, (unsigned)device->calls);
	device->host->log(device->host, OPD_LOG_INFO, text);
	(void)snprintf(text, sizeof text, "host memory: locked %u times", (unsigned)device->locks);
	device->host->log(device->host, OPD_LOG_INFO, text);
	(void)snprintf(text, sizeof text, "%s: %u allocations, %u streams, %u events, %u plans were left",
	               clean ? "closed clean" : "closed with leaks", (unsigned)allocations, (unsigned)device->streams,
	               (unsigned)device->events, (unsigned)device->plans);
	device->host->log(device->host, clean ? OPD_LOG_INFO : OPD_LOG_ERROR, text);
	(void)pthread_mutex_destroy(&device->mutex);
}

static opd_status device_describe(void *state, uint32_t ordinal, opd_device_info *info_out, opd_error *error)
{
	const struct device *device = state;
	if (ordinal >= DEVICE_COUNT)
		return opd_fail(error, OPD_NOT_FOUND, "test:%u: there are %d", (unsigned)ordinal, DEVICE_COUNT);
	info_out->memory_bytes = device->memory_bytes;
	(void)snprintf(info_out->name, sizeof info_out->name, "threads");
	return OPD_OK;
}

const opd_backend device_backend = {
    .struct_bytes = sizeof device_backend,
    .device_count = DEVICE_COUNT,
    .kind = "test",
    .device_info = device_describe,
    .alloc = device_alloc,
    .free = device_free,
    .stream_create = device_stream_create,
    .stream_destroy = device_stream_destroy,
    .copy_in = device_copy_in,
    .copy_out = device_copy_out,
    .copy_device = device_copy_device,
    .event_create = device_event_create,
    .event_destroy = device_event_destroy,
    .event_record = device_event_record,
    .event_query = device_event_query,
    .capture_begin = device_capture_begin,
    .capture_end = device_capture_end,
    .graph_launch = device_graph_launch,
    .graph_destroy = device_graph_destroy,
    .host_alloc = device_host_alloc,
    .host_free = device_host_free,
    .host_register = device_host_register,
    .host_unregister = device_host_unregister,
    .device_reset = device_reset,
    .copy_many = device_copy_many,
};

/* ---- The module ---- */

static opd_status module_open(const opd_host *host, void *state, opd_error *error)
{
	return device_open(state, host, error);
}

static void module_close(const opd_host *host, void *state)
{
	(void)host;
	device_close(state);
}

static const opd_module module = {
    .abi = OPD_PROVIDER_ABI,
    .struct_bytes = sizeof module,
    .name = "testdev",
    .version = "1.0",
    .state_bytes = sizeof(struct device),
    .open = module_open,
    .close = module_close,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
