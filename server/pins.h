/* Host memory that a device's driver has locked: copies from and to it run at the link's rate, and kernels reach it where it lies.
 *
 * Layer: server. Threads: any; one table for the process, as there is one address space. Locking is slow (half a millisecond a MiB), so that it is done on a device's lane, outside the
 * table's lock, and only for memory that comes to a device for the second time: buffers of the pool come again, what is uploaded once doesn't.
 * Life: pins_add when memory is mapped → pins_use… → pins_remove before it is unmapped; pins_forget before a backend's module may be closed.
 * Who calls pins_use keeps the memory mapped until that returns. Memory of heaps isn't known here, and is never locked.
 * Not here: the lanes' own rings (device_ring.c), for what is too small to be mapped alone. */
#ifndef OPD_SERVER_PINS_H
#define OPD_SERVER_PINS_H

#include <stdbool.h>
#include <stdint.h>

struct device;

/* Of the whole process: so much can't be moved or given back by the system. */
#define PINS_BYTES_MAX (UINT64_C(4) << 30)

/* Whole pages. Without memory for the table it is as if they weren't there. */
void pins_add(void *base, uint64_t bytes);
void pins_remove(void *base);

/* On the device's lane: whether [at, at + bytes) is locked for it, or now is. *mapped_out: where kernels of the device reach it; NULL: nowhere. */
bool pins_use(const struct device *device, const void *at, uint64_t bytes, void **mapped_out);

/* Unlocks what was locked through this state of a backend; none of its lanes uses memory any more. */
void pins_forget(const void *state);

#endif
