/* Small copies between a device and the host go through a ring of memory that the driver has locked: from other memory a driver may make the lane's thread wait for each of them. */
#include <string.h>

#include "proto/tensor.h"
#include "server/device_work.h"

struct device_landing {
	struct device_landing *next;
	void *to;
	const unsigned char *piece;
	uint64_t bytes;
};

static bool ring_there(struct device_lane *lane)
{
	const opd_backend *backend = lane->device.backend;
	void *host = NULL;
	void *mapped = NULL;
	opd_error error = {0};
	if (lane->ring != NULL || lane->ring_refused || backend->host_alloc == NULL)
		return lane->ring != NULL;
	if (backend->host_alloc(lane->device.state, lane->device.ordinal, DEVICE_RING_BYTES, &host, &mapped, &error) == OPD_OK)
		lane->ring = host;
	lane->ring_mapped = lane->ring == NULL ? NULL : mapped;
	lane->ring_refused = lane->ring == NULL;
	return lane->ring != NULL;
}

unsigned char *device_ring_take(struct device_lane *lane, struct device_job *job, uint64_t bytes, void **mapped_out)
{
	uint64_t aligned;
	if (mapped_out != NULL)
		*mapped_out = NULL;
	if (bytes == 0 || bytes > DEVICE_RING_PIECE_BYTES || !size_align(bytes, &aligned) || !ring_there(lane))
		return NULL;
	const uint64_t at = lane->ring_head % DEVICE_RING_BYTES;
	const uint64_t skipped = at + aligned > DEVICE_RING_BYTES ? DEVICE_RING_BYTES - at : 0;
	if (lane->ring_head + skipped + aligned - lane->ring_tail > DEVICE_RING_BYTES)
		return NULL;
	unsigned char *piece = lane->ring + (lane->ring_head + skipped) % DEVICE_RING_BYTES;
	if (mapped_out != NULL && lane->ring_mapped != NULL)
		*mapped_out = lane->ring_mapped + (piece - lane->ring);
	lane->ring_head += skipped + aligned;
	job->ring_end = lane->ring_head;
	return piece;
}

bool device_ring_land(struct device_job *job, void *to, const unsigned char *piece, uint64_t bytes)
{
	struct device_landing *landing = arena_alloc(&job->arena, sizeof *landing);
	if (landing == NULL)
		return false;
	*landing = (struct device_landing){job->landings, to, piece, bytes};
	job->landings = landing;
	return true;
}

void device_ring_settle(struct device_lane *lane, struct device_job *job)
{
	for (const struct device_landing *landing = job->landings; landing != NULL && job->status == OPD_OK; landing = landing->next)
		memcpy(landing->to, landing->piece, landing->bytes);
	job->landings = NULL;
	if (job->ring_end != 0)
		lane->ring_tail = job->ring_end;
	job->ring_end = 0;
}

void device_ring_drop(struct device_lane *lane)
{
	if (lane->ring != NULL)
		lane->device.backend->host_free(lane->device.state, lane->device.ordinal, lane->ring);
	lane->ring = lane->ring_mapped = NULL;
	lane->ring_refused = false;
	lane->ring_head = lane->ring_tail = 0;
}
