/* A lost device: what becomes of its work, its memory and its implementations. */
#include "server/daemon.h"
#include "server/device_work.h"

/* What tensors still hold is forgotten when the device is reset, and freed as usual when it isn't. */
static void give_back(struct device_lane *lane)
{
	device_drop_stream(lane);
	device_ring_drop(lane);
	while (lane->event_count != 0)
		lane->device.backend->event_destroy(lane->device.state, lane->events[--lane->event_count]);
	while (memory_evict(&lane->memory))
		;
	(void)memory_trim(&lane->memory);
}

static opd_status reset(struct device_lane *lane, opd_error *error)
{
	const opd_backend *backend = lane->device.backend;
	if (backend->device_reset == NULL)
		return opd_fail(error, OPD_UNIMPLEMENTED, "the backend can't reset it");
	return backend->device_reset(lane->device.state, lane->device.ordinal, error);
}

/* Before the failed request is answered, and before the log says so: who has read either must not be sent there again. */
void device_tell_loss(struct device_lane *lane)
{
	registry_set_lost(lane->server->registry, lane->number, lane->loss.text);
	LOG(lane->server->log, LOG_ERROR, "device lost", LOG_STR("device", lane->device.name), LOG_STR("error", lane->loss.text));
}

void device_give_up(struct device_lane *lane)
{
	opd_error error = {0};
	give_back(lane);
	lane->given_back = true;
	if (reset(lane, &error) != OPD_OK) {
		LOG(lane->server->log, LOG_ERROR, "the device stays out of use", LOG_STR("device", lane->device.name), LOG_STR("reason", error.text));
		return;
	}
	memory_forget(&lane->memory);
	atomic_store_explicit(&lane->memory.lost, false, memory_order_release);
	lane->lost = false;
	registry_set_lost(lane->server->registry, lane->number, NULL);
	LOG(lane->server->log, LOG_WARN, "device reset", LOG_STR("device", lane->device.name));
}
