#include "client/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/connection.h"
#include "client/request.h"

static opd_status system_error(const char *what, uint64_t bytes, int number, opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "shared memory of %llu bytes: %s: %s", (unsigned long long)bytes, what, strerrordesc_np(number));
}

opd_status memory_file(uint64_t bytes, int *fd_out, opd_error *error)
{
	const int made = memfd_create("opd-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	const int fd = made < 0 ? -1 : fcntl(made, F_DUPFD_CLOEXEC, 3); /* a submission's descriptor is never 0 */
	const int number = errno;
	if (made >= 0)
		(void)close(made);
	if (fd < 0)
		return system_error("memfd", bytes, number, error);
	if (bytes > INT64_MAX || ftruncate(fd, (off_t)bytes) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
		opd_status status = system_error("size and seals", bytes, errno, error);
		(void)close(fd);
		return status;
	}
	*fd_out = fd;
	return OPD_OK;
}

static opd_status attach(opd_client *client, int fd, uint64_t bytes, uint32_t *region_out, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_ATTACH_MEMORY, .memory_bytes = bytes};
	struct codec_buffer envelope;
	arena_reset(&client->scratch);
	opd_status status = codec_encode_request(&client->scratch, &message, &envelope, error);
	const struct submission submission = {.envelope = &envelope, .expected = MSG_REPLY_MEMORY, .descriptor = fd};
	struct flight *flight;
	opd_result *result = NULL;
	if (status == OPD_OK)
		status = connection_submit(client, &submission, &flight, error);
	if (status == OPD_OK)
		status = connection_finish(client, flight, &result, error);
	if (status == OPD_OK)
		*region_out = result->reply.memory.region;
	opd_result_destroy(result);
	return status;
}

opd_status opd_memory_create(opd_client *client, uint64_t bytes, opd_memory **memory_out, opd_error *error)
{
	if (!client->shares || client->direct_depth != 0)
		return opd_fail(error, OPD_FAILED_PRECONDITION,
		                "shared memory: this session can't: it needs a Unix socket, the connect option shared_memory, and a server with the feature \"shm\"");
	if (bytes == 0 || bytes > SIZE_MAX / 2)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "shared memory of %llu bytes, expected at least 1", (unsigned long long)bytes);
	opd_memory *memory = calloc(1, sizeof *memory);
	if (memory == NULL)
		return system_error("memory", bytes, ENOMEM, error);
	int fd = -1;
	opd_status status = memory_file(bytes, &fd, error);
	if (status != OPD_OK) {
		free(memory);
		return status;
	}
	void *map = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	status = map == MAP_FAILED ? system_error("mmap", bytes, errno, error) : attach(client, fd, bytes, &memory->region, error);
	(void)close(fd);
	if (status != OPD_OK) {
		if (map != MAP_FAILED)
			(void)munmap(map, (size_t)bytes);
		free(memory);
		return status;
	}
	memory->client = client;
	memory->data = map;
	memory->bytes = bytes;
	memory->next = client->memories;
	client->memories = memory;
	*memory_out = memory;
	return OPD_OK;
}

void *opd_memory_data(const opd_memory *memory)
{
	return memory->data;
}

uint64_t opd_memory_bytes(const opd_memory *memory)
{
	return memory->bytes;
}

/* The server keeps it mapped for what is in flight. */
static void detach(opd_memory *memory)
{
	opd_client *client = memory->client;
	struct opd_memory **link = &client->memories;
	while (*link != memory)
		link = &(*link)->next;
	*link = memory->next;
	const struct msg_request message = {.kind = MSG_REQUEST_DETACH_MEMORY, .region = memory->region};
	struct codec_buffer envelope;
	struct flight *flight;
	arena_reset(&client->scratch);
	if (codec_encode_request(&client->scratch, &message, &envelope, NULL) != OPD_OK)
		return; /* it goes with the session */
	const struct submission submission = {.envelope = &envelope, .expected = MSG_REPLY_EMPTY};
	opd_result *result = NULL;
	if (connection_submit(client, &submission, &flight, NULL) == OPD_OK)
		(void)!connection_finish(client, flight, &result, NULL);
	opd_result_destroy(result);
}

void opd_memory_destroy(opd_memory *memory)
{
	if (memory == NULL)
		return;
	if (memory->client != NULL)
		detach(memory);
	(void)munmap(memory->data, (size_t)memory->bytes);
	free(memory);
}

void memory_detach_all(struct opd_memory *first)
{
	while (first != NULL) {
		struct opd_memory *next = first->next;
		first->client = NULL;
		first->next = NULL;
		first = next;
	}
}

const struct opd_memory *memory_find(const struct opd_memory *first, uint32_t region)
{
	while (first != NULL && first->region != region)
		first = first->next;
	return first;
}

bool memory_offset(const struct opd_memory *memory, const void *data, uint64_t bytes, uint64_t *offset_out)
{
	const uintptr_t base = (uintptr_t)memory->data, at = (uintptr_t)data;
	if (at < base || at - base > memory->bytes || bytes > memory->bytes - (at - base))
		return false;
	*offset_out = at - base;
	return true;
}
