/* Device memory: an address where nothing may be touched, and the bytes somewhere else. */
#include "device.h"

#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>

struct device_allocation {
	struct device_allocation *next;
	unsigned char *base; /* PROT_NONE */
	uint64_t base_bytes;
	uint64_t bytes;
	uint32_t ordinal;
	unsigned char *contents;
};

static uint64_t whole_pages(uint64_t bytes)
{
	return (bytes + 4095) / 4096 * 4096;
}

/* Under the mutex. */
static opd_status charge(struct device *device, uint32_t ordinal, uint64_t bytes, opd_error *error)
{
	uint64_t used = device->used_bytes[ordinal];
	if (bytes > device->memory_bytes || used > device->memory_bytes - bytes)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%" PRIu64 " bytes wanted, %" PRIu64 " of %" PRIu64 " in use", bytes, used,
		                device->memory_bytes);
	device->used_bytes[ordinal] += bytes;
	return OPD_OK;
}

static struct device_allocation *allocation_create(uint32_t ordinal, uint64_t bytes)
{
	struct device_allocation *allocation = calloc(1, sizeof *allocation);
	if (allocation == NULL)
		return NULL;
	*allocation = (struct device_allocation){
	    .bytes = bytes, .base_bytes = whole_pages(bytes), .ordinal = ordinal, .contents = malloc(bytes)};
	void *base = mmap(NULL, allocation->base_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED || allocation->contents == NULL) {
		if (base != MAP_FAILED)
			(void)munmap(base, allocation->base_bytes);
		free(allocation->contents);
		free(allocation);
		return NULL;
	}
	allocation->base = base;
	memset(allocation->contents, 0xcd, bytes); /* a kernel that reads what nobody wrote shows */
	return allocation;
}

opd_status device_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **memory_out, opd_error *error)
{
	struct device *device = state;
	opd_status status = device_enter(device, ordinal, "alloc", error);
	if (status != OPD_OK)
		return status;
	if (device_faulty(device, DEVICE_FAULT_ALLOC)) {
		device_leave(device, ordinal);
		return opd_fail(error, OPD_INTERNAL, "alloc: injected failure");
	}
	(void)pthread_mutex_lock(&device->mutex);
	status = charge(device, ordinal, bytes, error);
	struct device_allocation *allocation = status == OPD_OK ? allocation_create(ordinal, bytes) : NULL;
	if (allocation != NULL) {
		allocation->next = device->allocations;
		device->allocations = allocation;
		*memory_out = allocation->base;
	} else if (status == OPD_OK) {
		device->used_bytes[ordinal] -= bytes;
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "the system has no %" PRIu64 " bytes", bytes);
	}
	(void)pthread_mutex_unlock(&device->mutex);
	device_leave(device, ordinal);
	return status;
}

/* ordinal UINT32_MAX: `memory` is the allocation itself. */
void device_free(void *state, uint32_t ordinal, void *memory)
{
	struct device *device = state;
	(void)pthread_mutex_lock(&device->mutex);
	struct device_allocation **link = &device->allocations;
	while (*link != NULL && (ordinal == UINT32_MAX ? (void *)*link != memory : (*link)->base != memory))
		link = &(*link)->next;
	struct device_allocation *allocation = *link;
	if (allocation != NULL) {
		*link = allocation->next;
		device->used_bytes[allocation->ordinal] -= allocation->bytes;
	}
	(void)pthread_mutex_unlock(&device->mutex);
	if (allocation == NULL)
		abort(); /* freed twice, or never allocated */
	(void)munmap(allocation->base, allocation->base_bytes);
	memset(allocation->contents, 0xdd, allocation->bytes);
	free(allocation->contents);
	free(allocation);
}

opd_status device_host_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **host_out, void **device_out, opd_error *error)
{
	struct device *device = state;
	(void)ordinal;
	*host_out = aligned_alloc(64, bytes);
	if (*host_out == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "host_alloc: out of memory");
	*device_out = (void *)((uintptr_t)*host_out | DEVICE_MAPPED);
	(void)atomic_fetch_add(&device->hosts, 1);
	return OPD_OK;
}

void device_host_free(void *state, uint32_t ordinal, void *host)
{
	struct device *device = state;
	(void)ordinal;
	free(host);
	(void)atomic_fetch_sub(&device->hosts, 1);
}

opd_status device_host_register(void *state, void *memory, uint64_t bytes, opd_error *error)
{
	struct device *device = state;
	if ((uintptr_t)memory % 4096 != 0 || bytes == 0)
		return opd_fail(error, OPD_INTERNAL, "host_register: memory that isn't whole pages");
	(void)atomic_fetch_add(&device->locks, 1);
	(void)atomic_fetch_add(&device->locked, 1);
	return OPD_OK;
}

void device_host_unregister(void *state, void *memory)
{
	struct device *device = state;
	if (atomic_fetch_sub(&device->locked, 1) == 0)
		abort();
	(void)*(volatile unsigned char *)memory; /* it is still mapped, or this is a crash */
}

/* What was allocated there is gone; who frees it afterwards aborts. */
opd_status device_reset(void *state, uint32_t ordinal, opd_error *error)
{
	struct device *device = state;
	if (device->reset == 0)
		return opd_fail(error, OPD_UNAVAILABLE, "test:%u doesn't come back", (unsigned)ordinal);
	for (;;) {
		(void)pthread_mutex_lock(&device->mutex);
		struct device_allocation *allocation = device->allocations;
		while (allocation != NULL && allocation->ordinal != ordinal)
			allocation = allocation->next;
		(void)pthread_mutex_unlock(&device->mutex);
		if (allocation == NULL)
			break;
		device_free(device, UINT32_MAX, allocation);
	}
	atomic_store(&device->lost[ordinal], false);
	return OPD_OK;
}

unsigned char *device_contents(struct device *device, uint32_t ordinal, const void *memory, uint64_t offset, uint64_t bytes,
                               const char *name, opd_error *error)
{
	(void)pthread_mutex_lock(&device->mutex);
	const struct device_allocation *found = device->allocations;
	while (found != NULL && found->base != memory)
		found = found->next;
	unsigned char *contents = found == NULL ? NULL : found->contents;
	bool whole = found != NULL && found->ordinal == ordinal && offset <= found->bytes && bytes <= found->bytes - offset;
	uint64_t room = found == NULL ? 0 : found->bytes;
	(void)pthread_mutex_unlock(&device->mutex);
	if (contents == NULL)
		(void)opd_fail(error, OPD_INTERNAL, "test:%u: %s lies at an address that is no device memory", (unsigned)ordinal, name);
	else if (!whole)
		(void)opd_fail(error, OPD_INTERNAL,
		               "test:%u: %s wants bytes %" PRIu64 " + %" PRIu64 " of an allocation of %" PRIu64 ", or another device's",
		               (unsigned)ordinal, name, offset, bytes, room);
	return whole ? contents + offset : NULL;
}
