/* What goes beside a request whatever it is: payload bytes that nobody asked for, operands and results in memory that both share, a device. Each is right alone; together some are refused, and the rest must work. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "session.h"

#define UNIT 64u /* of offsets in the region */

/* One for all sessions; each daemon maps it anew. */
static int shared_memory(uint8_t **data_out)
{
	static int fd = -1;
	static uint8_t *data;
	if (fd < 0) {
		fd = memfd_create("shared", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		if (fd < 0 || ftruncate(fd, PEER_SHARED_BYTES) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0)
			fuzz_fail("no shared memory");
		data = mmap(NULL, PEER_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (data == MAP_FAILED)
			fuzz_fail("no shared memory");
	}
	*data_out = data;
	return fd;
}

void peer_attach(struct peer *peer)
{
	const struct msg_request request = {.kind = MSG_REQUEST_ATTACH_MEMORY, .memory_bytes = PEER_SHARED_BYTES};
	const int fd = shared_memory(&peer->shared);
	for (uint32_t i = 0; i < PEER_SHARED_BYTES; i++)
		peer->shared[i] = (uint8_t)(i * 7);
	peer_wait(peer, peer_request_with(peer, &request, fd));
	if (peer->region == 0)
		fuzz_fail("no region: attach_memory was refused");
}

static uint8_t decide(const struct peer *peer)
{
	return fuzz_u8(peer->beside);
}

static void pick_range(const struct peer *peer, uint64_t bytes, struct msg_shared_range *range)
{
	const uint8_t byte = decide(peer);
	range->region = byte < 250 ? peer->region : byte;
	range->offset = (uint64_t)(byte % (PEER_SHARED_BYTES / UNIT)) * UNIT;
	range->bytes = byte % 16 == 15 ? byte : bytes;
}

bool beside_source(const struct peer *peer, struct msg_tensor *tensor, uint64_t bytes)
{
	if (peer->beside == NULL || peer->region == 0)
		return false;
	tensor->source = MSG_SOURCE_SHARED;
	pick_range(peer, bytes, &tensor->shared);
	return true;
}

static struct msg_text pick_device(uint8_t byte)
{
	static const char *const devices[] = {"", "", "test:0", "test:1", "test", "cpu", "cpu:0", "test:7"};
	return msg_text(devices[byte % 8]);
}

void beside_run(const struct peer *peer, struct msg_run *run, struct msg_output_option *options)
{
	if (peer->beside == NULL)
		return;
	const uint8_t byte = decide(peer);
	if (run->device.bytes == 0)
		run->device = pick_device(byte);
	for (uint32_t i = 0; byte >= 128 && i < run->output_count; i++)
		if (peer->region != 0 && decide(peer) % 2 == 0)
			pick_range(peer, PEER_SHARED_BYTES / 4, &options[i].shared);
}

void beside_upload(const struct peer *peer, struct msg_upload *upload)
{
	if (peer->beside != NULL)
		upload->device = pick_device(decide(peer));
}

void beside_fetch(const struct peer *peer, struct msg_fetch *fetch)
{
	if (peer->beside != NULL && peer->region != 0 && decide(peer) % 2 == 0)
		pick_range(peer, PEER_SHARED_BYTES / 4, &fetch->into);
}

uint64_t beside_payload(const struct peer *peer)
{
	const uint8_t byte = peer->beside == NULL ? 0 : decide(peer);
	return byte < 208 ? 0 : (uint64_t)(byte - 207) * 8;
}
