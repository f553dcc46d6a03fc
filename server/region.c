#include "server/region.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "proto/text.h"
#include "server/pins.h"
#include "server/reaper.h"

/* What a descriptor is, as the system calls it: "pipe:[4711]", "/etc". */
static const char *describe(int fd, char *out, size_t out_bytes)
{
	char path[40];
	char name[128];
	(void)snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	const ssize_t bytes = readlink(path, name, sizeof name);
	return bytes <= 0 ? "something else" : text_escape(name, (size_t)bytes, out, out_bytes);
}

/* The seals are asked for first: only a memory file has any, and nothing else about a descriptor can be asked without perhaps waiting for whoever is behind it. */
opd_status region_check_file(int fd, uint64_t bytes, const char *what, struct stat *file_out, opd_error *error)
{
	char shown[600];
	struct statfs system;
	const int seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the descriptor is %s, expected a memfd", what, describe(fd, shown, sizeof shown));
	if (fstatfs(fd, &system) != 0 || system.f_type != TMPFS_MAGIC || fstat(fd, file_out) != 0 || !S_ISREG(file_out->st_mode))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the descriptor is %s, expected a memfd of ordinary pages", what, describe(fd, shown, sizeof shown));
	if ((seals & F_SEAL_SHRINK) == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the memfd isn't sealed against shrinking (F_SEAL_SHRINK; its seals are 0x%x)", what, (unsigned)seals);
	if ((seals & F_SEAL_WRITE) != 0 || (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the memfd can't be written (seals 0x%x), expected one open for reading and writing", what,
		                (unsigned)seals);
	if (bytes == 0 || file_out->st_size < 0 || bytes > (uint64_t)file_out->st_size)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %" PRIu64 " bytes of a memfd of %" PRIi64, what, bytes, (int64_t)file_out->st_size);
	return OPD_OK;
}

static opd_status check_room(const struct regions *regions, const struct config_limits *limits, uint64_t bytes, opd_error *error)
{
	if (regions->count >= limits->regions || regions->last_id == UINT32_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attach_memory: the session has %u regions, at most %u", (unsigned)regions->count,
		                (unsigned)limits->regions);
	if (bytes > limits->shared_bytes || regions->bytes > limits->shared_bytes - bytes)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attach_memory: %" PRIu64 " bytes wanted, %" PRIu64 " of at most %" PRIu64 " in use", bytes,
		                regions->bytes, limits->shared_bytes);
	return OPD_OK;
}

opd_status regions_attach(struct regions *regions, struct account *account, const struct config_limits *limits, int fd, uint64_t bytes, uint32_t *id_out,
                          opd_error *error)
{
	struct stat file;
	opd_status status = region_check_file(fd, bytes, "attach_memory", &file, error);
	if (status == OPD_OK)
		status = check_room(regions, limits, bytes, error);
	if (status == OPD_OK && (status = account_charge(account, bytes, error)) != OPD_OK)
		(void)opd_error_prefix(error, status, "attach_memory");
	if (status != OPD_OK)
		return status;
	struct region *region = calloc(1, sizeof *region);
	void *map = region == NULL ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED) {
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attach_memory: %" PRIu64 " bytes can't be mapped: %s", bytes, strerror(region == NULL ? ENOMEM : errno));
		free(region);
		account_release(account, bytes);
		return status;
	}
	(void)madvise(map, bytes, MADV_DONTDUMP);
	pins_add(map, bytes);
	region->refs = 1;
	region->id = ++regions->last_id;
	region->bytes = bytes;
	region->data = map;
	region->device = file.st_dev;
	region->inode = file.st_ino;
	region->account = account_ref(account);
	region->next = regions->first;
	regions->first = region;
	regions->count++;
	regions->bytes += bytes;
	*id_out = region->id;
	return OPD_OK;
}

static opd_status unknown(uint32_t id, opd_error *error)
{
	return opd_fail(error, OPD_NOT_FOUND, "region %u isn't attached to this session", (unsigned)id);
}

opd_status regions_detach(struct regions *regions, uint32_t id, opd_error *error)
{
	struct region **link = &regions->first;
	while (*link != NULL && (*link)->id != id)
		link = &(*link)->next;
	struct region *region = *link;
	if (region == NULL)
		return unknown(id, error);
	*link = region->next;
	regions->count--;
	regions->bytes -= region->bytes;
	region_unref(region);
	return OPD_OK;
}

struct region *regions_find(const struct regions *regions, uint32_t id, opd_error *error)
{
	struct region *region = regions->first;
	while (region != NULL && region->id != id)
		region = region->next;
	if (region == NULL)
		(void)unknown(id, error);
	else
		(void)atomic_fetch_add_explicit(&region->refs, 1, memory_order_relaxed);
	return region;
}

void region_unref(struct region *region)
{
	if (region == NULL || atomic_fetch_sub_explicit(&region->refs, 1, memory_order_acq_rel) != 1)
		return;
	pins_remove(region->data);
	reaper_unmap(region->data, region->bytes);
	account_release(region->account, region->bytes);
	account_unref(region->account);
	free(region);
}

void regions_fini(struct regions *regions)
{
	while (regions->first != NULL)
		(void)!regions_detach(regions, regions->first->id, NULL);
}
