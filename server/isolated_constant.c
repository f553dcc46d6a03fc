#include "server/isolated_constant.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "server/reaper.h"

void constant_unref(struct constant *constant)
{
	if (constant == NULL || atomic_fetch_sub_explicit(&constant->refs, 1, memory_order_acq_rel) != 1)
		return;
	if (constant->fd >= 0)
		reaper_close(constant->fd);
	free(constant);
}

bool constant_is_dropped(const struct constant *constant)
{
	return atomic_load_explicit(&constant->gone, memory_order_relaxed);
}

static void on_release(struct derived_own *own)
{
	struct constant *constant = (struct constant *)own;
	atomic_store_explicit(&constant->gone, true, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&constant->all->dropped, 1, memory_order_release);
	constant_unref(constant);
}

static bool write_all(int fd, const unsigned char *data, uint64_t bytes)
{
	for (uint64_t at = 0; at < bytes;) {
		const ssize_t wrote = pwrite(fd, data + at, bytes - at, (off_t)at);
		if (wrote < 0 && errno == EINTR)
			continue;
		if (wrote <= 0)
			return false;
		at += (uint64_t)wrote;
	}
	return true;
}

/* Nobody can write to it any more, nor change its size: not the worker either. */
static bool fill(struct constant *constant, const opd_tensor *tensor)
{
	constant->fd = memfd_create("opd-constant", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	return constant->fd >= 0 && write_all(constant->fd, opd_tensor_data(tensor), constant->bytes) &&
	       fcntl(constant->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) == 0;
}

static struct constant *create(struct constants *all, uint64_t bytes)
{
	struct constant *constant = calloc(1, sizeof *constant);
	if (constant == NULL)
		return NULL;
	constant->own.release = on_release;
	constant->all = all;
	atomic_store_explicit(&constant->refs, 1, memory_order_relaxed);
	constant->number = atomic_fetch_add_explicit(&all->made, 1, memory_order_relaxed) + 1;
	constant->bytes = bytes;
	constant->fd = -1;
	return constant;
}

static struct constant *make(struct constants *all, struct derived *derived, struct derived_run *run, const opd_tensor *tensor, uint64_t bytes)
{
	struct constant *constant = create(all, bytes);
	if (constant == NULL)
		return NULL;
	if (!derived_make_own(derived, run, all, tensor, bytes, &constant->own)) {
		constant_unref(constant);
		return NULL;
	}
	if (!fill(constant, tensor)) /* the run's end releases it */
		return NULL;
	derived_keep(derived, run, &constant->own);
	return constant;
}

struct constant *constant_get(struct constants *all, struct derived *derived, struct derived_run *run, const opd_tensor *tensor, uint64_t bytes)
{
	if (bytes < CONSTANT_BYTES_MIN || (tensor->flags & OPD_TENSOR_CONSTANT) == 0)
		return NULL;
	struct constant *constant = (struct constant *)(uintptr_t)derived_find(derived, run, all, tensor, NULL, 0);
	if (constant == NULL)
		constant = make(all, derived, run, tensor, bytes);
	if (constant != NULL) /* the run has it until its end */
		(void)atomic_fetch_add_explicit(&constant->refs, 1, memory_order_relaxed);
	return constant;
}
