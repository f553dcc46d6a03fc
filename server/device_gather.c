/* Small copies that belong together, in one piece of work where the backend can: what a captured run brings to its places, and what it takes from them. Each would cost the device 2 to 4 us,
 * and the thread that enqueues as much. */
#include <string.h>

#include "server/device_work.h"
#include "server/pins.h"

/* From here on a copy of its own is as fast, and leaves the multiprocessors to others. */
#define GATHER_HOST_BYTES (64u << 10)
#define GATHER_DEVICE_BYTES (1u << 20)

static bool gathers(const struct device_lane *lane, uint64_t bytes, uint64_t most)
{
	return lane->device.backend->copy_many != NULL && bytes <= most;
}

opd_status device_gather_end(struct device_lane *lane, struct device_job *job)
{
	const uint32_t count = lane->gathered_count;
	lane->gathered_count = 0;
	if (count == 0)
		return OPD_OK;
	opd_status status = lane->device.backend->copy_many(lane->device.state, lane->stream, lane->gathered, count, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_many");
}

static opd_status add(struct device_lane *lane, struct device_job *job, opd_copy copy)
{
	opd_status status = lane->gathered_count < OPD_COPIES_MAX ? OPD_OK : device_gather_end(lane, job);
	if (status == OPD_OK)
		lane->gathered[lane->gathered_count++] = copy;
	return status;
}

/* Where a kernel finds the host's bytes; NULL: nowhere. */
static void *reach(struct device_lane *lane, struct device_job *job, const void *from, uint64_t bytes)
{
	void *mapped = NULL;
	if (pins_use(&lane->device, from, bytes, &mapped))
		return mapped;
	unsigned char *piece = device_ring_take(lane, job, bytes, &mapped);
	if (piece != NULL && mapped != NULL)
		memcpy(piece, from, bytes);
	return mapped;
}

opd_status device_gather_in(struct device_lane *lane, struct device_job *job, const struct buffer *to, const void *from, uint64_t bytes)
{
	if (bytes == 0)
		return OPD_OK;
	void *mapped = gathers(lane, bytes, GATHER_HOST_BYTES) ? reach(lane, job, from, bytes) : NULL;
	return mapped == NULL ? device_copy_in(lane, job, to, 0, from, bytes) : add(lane, job, (opd_copy){.to = to->data, .from = mapped, .bytes = bytes});
}

opd_status device_gather_zeros(struct device_lane *lane, struct device_job *job, const struct buffer *to, const void *zeros, uint64_t bytes)
{
	return gathers(lane, bytes, GATHER_DEVICE_BYTES) ? add(lane, job, (opd_copy){.to = to->data, .bytes = bytes}) : device_copy_in(lane, job, to, 0, zeros, bytes);
}

opd_status device_gather(struct device_lane *lane, struct device_job *job, const struct buffer *to, const struct buffer *from, uint64_t from_offset, uint64_t bytes)
{
	if (bytes == 0)
		return OPD_OK;
	if (gathers(lane, bytes, GATHER_DEVICE_BYTES))
		return add(lane, job, (opd_copy){.to = to->data, .from = from->data, .from_offset = from_offset, .bytes = bytes});
	opd_status status = lane->device.backend->copy_device(lane->device.state, lane->stream, to->data, 0, from->data, from_offset, bytes, &job->error);
	return status == OPD_OK ? OPD_OK : device_failed(lane, job, status, "copy_device");
}

opd_status device_gather_out(struct device_lane *lane, struct device_job *job, void *to, const struct buffer *from, uint64_t bytes)
{
	void *mapped = NULL;
	if (bytes == 0)
		return OPD_OK;
	const unsigned char *piece = gathers(lane, bytes, GATHER_HOST_BYTES) ? device_ring_take(lane, job, bytes, &mapped) : NULL;
	if (piece == NULL || mapped == NULL)
		return device_copy_out(lane, job, to, from, 0, bytes);
	return device_ring_land(job, to, piece, bytes) ? add(lane, job, (opd_copy){.to = mapped, .from = from->data, .bytes = bytes}) : device_no_memory(job);
}
