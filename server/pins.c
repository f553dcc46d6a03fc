#include "server/pins.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "server/registry.h"

/* Memory is locked when it comes for the second time. */
#define USES 2u

struct range {
	unsigned char *base;
	uint64_t bytes;
	uint32_t uses;
	bool refused;   /* the driver wouldn't, or is asked just now */
	struct device device; /* its backend and state: who has locked it; state NULL: nobody */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of what follows */
static struct range *ranges; /* by base */
static size_t count;
static size_t room;
static uint64_t locked_bytes;

/* The number of ranges that begin at or before `at`. */
static size_t before(const void *at)
{
	size_t low = 0, high = count;
	while (low < high) {
		const size_t middle = low + (high - low) / 2;
		if ((const void *)ranges[middle].base <= at)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct range *find(const void *at, uint64_t bytes)
{
	const size_t place = before(at);
	if (place == 0)
		return NULL;
	struct range *range = &ranges[place - 1];
	const uint64_t offset = (uint64_t)((const unsigned char *)at - range->base);
	return offset <= range->bytes && bytes <= range->bytes - offset ? range : NULL;
}

void pins_add(void *base, uint64_t bytes)
{
	(void)pthread_mutex_lock(&mutex);
	if (count == room) {
		struct range *grown = reallocarray(ranges, room == 0 ? 64 : room * 2, sizeof *grown);
		if (grown != NULL) {
			ranges = grown;
			room = room == 0 ? 64 : room * 2;
		}
	}
	if (count < room) {
		const size_t place = before(base);
		memmove(&ranges[place + 1], &ranges[place], (count - place) * sizeof ranges[0]);
		ranges[place] = (struct range){.base = base, .bytes = bytes};
		count++;
	}
	(void)pthread_mutex_unlock(&mutex);
}

/* Under the mutex. */
static struct device unlocked(struct range *range)
{
	const struct device device = range->device;
	if (device.state != NULL)
		locked_bytes -= range->bytes;
	range->device = (struct device){0};
	return device;
}

void pins_remove(void *base)
{
	struct device device = {0};
	(void)pthread_mutex_lock(&mutex);
	struct range *range = find(base, 0);
	if (range != NULL && range->base == base) {
		device = unlocked(range);
		memmove(range, range + 1, (size_t)(&ranges[count] - (range + 1)) * sizeof *range);
		count--;
	}
	if (count == 0) { /* nothing is left behind when the last server of the process has gone */
		free(ranges);
		ranges = NULL;
		room = 0;
	}
	(void)pthread_mutex_unlock(&mutex);
	if (device.state != NULL)
		device.backend->host_unregister(device.state, base);
}

/* Whether it is to be locked now, which makes it the caller's to do. Under the mutex. */
static bool begin(struct range *range)
{
	if (range->device.state != NULL || range->refused || ++range->uses < USES || range->bytes > PINS_BYTES_MAX - locked_bytes)
		return false;
	range->refused = true; /* for others, meanwhile */
	locked_bytes += range->bytes;
	return true;
}

static bool lock(const struct device *device, unsigned char *base, uint64_t bytes)
{
	opd_error error = {0};
	const bool done = device->backend->host_register(device->state, base, bytes, &error) == OPD_OK;
	(void)pthread_mutex_lock(&mutex);
	struct range *range = find(base, bytes); /* it may have moved in the table */
	range->refused = !done;
	range->device = done ? *device : (struct device){0};
	locked_bytes -= done ? 0 : bytes;
	(void)pthread_mutex_unlock(&mutex);
	return done;
}

bool pins_use(const struct device *device, const void *at, uint64_t bytes, void **mapped_out)
{
	const opd_backend *backend = device->backend;
	*mapped_out = NULL;
	if (backend->host_register == NULL)
		return false;
	(void)pthread_mutex_lock(&mutex);
	struct range *range = find(at, bytes);
	const bool now = range != NULL && begin(range);
	bool locked = range != NULL && range->device.state == device->state;
	unsigned char *base = range == NULL ? NULL : range->base;
	const uint64_t whole = range == NULL ? 0 : range->bytes;
	(void)pthread_mutex_unlock(&mutex);
	if (now)
		locked = lock(device, base, whole);
	if (locked && backend->host_mapped != NULL)
		*mapped_out = backend->host_mapped(device->state, device->ordinal, (void *)(uintptr_t)at);
	return locked;
}

void pins_forget(const void *state)
{
	(void)pthread_mutex_lock(&mutex);
	for (size_t i = 0; i < count; i++)
		if (ranges[i].device.state == state) {
			const struct device device = unlocked(&ranges[i]);
			device.backend->host_unregister(device.state, ranges[i].base);
		}
	(void)pthread_mutex_unlock(&mutex);
}
